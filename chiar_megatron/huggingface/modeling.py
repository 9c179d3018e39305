"""CHIAR-Former as a `transformers` model: plain PyTorch, one process, batch first.

The mathematics is that of `operators/` and `routing/`, called as functions. Every operator sees every
token and one result is kept: what routing saves in training is not saved here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import RotaryScalingConfig
from chiar_megatron.huggingface.configuration import ChiarConfig
from chiar_megatron.huggingface.memory import remember
from chiar_megatron.huggingface.parts import (
    ChiarAttention,
    ChiarMLP,
    ChiarRBF,
    SpectralFilter,
    TokenContext,
    make_norm,
)
from chiar_megatron.huggingface.routers import ChiarMetaRouter, ChiarRouter, Routing
from chiar_megatron.operators.rotary import rotary_frequencies

# transformers is renaming it; the installed version's outputs tell.
CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class ChiarDecoderLayer(nn.Module):
    """One layer: spectral (D), attention (A) or routed (R), then the feed-forward layer."""

    def __init__(self, config: ChiarConfig, layer_idx: int) -> None:
        super().__init__()
        self.kind = parse_schedule(config.schedule)[layer_idx]
        self.is_post = config.norm == "post"
        self.sees_routed = config.router["keys_values"] == "routed"
        self.rbf: ChiarRBF | None = None
        if self.kind in "DR":
            self.spectral, self.spectral_norm = SpectralFilter(config.hidden_size), make_norm(config)
        if self.kind in "AR":
            self.self_attn, self.input_layernorm = ChiarAttention(config, layer_idx), make_norm(config)
        if self.kind == "R":
            self.router = ChiarRouter(config, layer_idx + 1)
            if config.blends_rbf:
                self.rbf, self.rbf_norm = ChiarRBF(config, layer_idx), make_norm(config)
        self.mlp, self.post_attention_layernorm = ChiarMLP(config), make_norm(config)
        self.meta_router = None
        if layer_idx == 0 and config.meta_router["enabled"]:
            self.meta_router = ChiarMetaRouter(config)

    def forward(
        self,
        x: Tensor,
        context: TokenContext,
        sums_BSH: Tensor | None = None,
        counts_BS1: Tensor | None = None,
    ) -> Tensor:
        """`[b, s, h]` to the same. sums_BSH, counts_BS1: for the MetaRouter's `causal` pooling; arguments of
        their own, so that checkpointing sees that gradients pass through them."""
        u = self._operate(x, context)
        norm = self.post_attention_layernorm
        out = norm(u + self.mlp(u)) if self.is_post else u + self.mlp(norm(u))
        if self.meta_router is None:
            return out  # type: ignore[no-any-return]
        present = None if context.present_BT is None else context.present_BT[:, -x.shape[1] :]
        gate = self.meta_router(x, sums_BSH, counts_BS1, present)
        if context.routing is not None:
            context.routing.meta_gate = gate.detach()
        gate = gate.to(out.dtype)
        return gate * out + (1.0 - gate) * x  # type: ignore[no-any-return]

    def _operate(self, x: Tensor, context: TokenContext) -> Tensor:
        if self.kind == "D":
            return self._residual(self.spectral_norm, x, self.spectral(self._input(self.spectral_norm, x)))
        if self.kind == "A":
            attended = self.self_attn(self._input(self.input_layernorm, x), context)
            return self._residual(self.input_layernorm, x, attended)
        light, gate, weights = self.router(x, context.ids_BS, context.position_BS, context.routing)
        attended = self.self_attn(
            self._input(self.input_layernorm, x), context, light if self.sees_routed else None
        )
        if gate is not None:
            attended = attended * gate[..., None].to(attended.dtype)
        outputs = [
            self._residual(self.spectral_norm, x, self.spectral(self._input(self.spectral_norm, x))),
            self._residual(self.input_layernorm, x, attended),
        ]
        if self.rbf is not None:
            mixed = self.rbf(self._input(self.rbf_norm, x), context)
            outputs.append(self._residual(self.rbf_norm, x, mixed))
        if weights is None:
            return torch.where(light[..., None], outputs[1], outputs[0])
        weights = weights.to(x.dtype)
        blended: Tensor = outputs[0] * weights[..., 0:1]
        for index in range(1, len(outputs)):
            blended = blended + outputs[index] * weights[..., index : index + 1]
        return blended

    def _input(self, norm: nn.Module, x: Tensor) -> Tensor:
        return x if self.is_post else norm(x)

    def _residual(self, norm: nn.Module, x: Tensor, update: Tensor) -> Tensor:
        return norm(x + update) if self.is_post else x + update


class ChiarPreTrainedModel(PreTrainedModel):
    """Base of the models: initial weights, loading and saving."""

    config_class = ChiarConfig
    config: ChiarConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChiarDecoderLayer"]
    _supports_sdpa = True
    # Thresholds lie a few thousandths from the scores they are compared with.
    _keep_in_fp32_modules = ["router", "meta_router", "omega"]
    _keep_in_fp32_modules_strict = ["router", "meta_router", "omega"]

    def _as_asked(self, output: Any, return_dict: bool | None) -> Any:
        """A model's output, or the tuple that the call or the config asks for."""
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Matrices N(0, initializer_range), biases 0, norms and filters 1 (paper, appendix)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, SpectralFilter)):
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, ChiarMetaRouter):
            nn.init.zeros_(module.gate_proj.weight)
            nn.init.constant_(module.gate_proj.bias, self.config.meta_router["bias_init"])


def token_context(
    config: ChiarConfig,
    x: Tensor,
    ids_BS: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    routing: Routing | None,
) -> TokenContext:
    """What the layers are told of the tokens whose embeddings are x `[b, s, h]`."""
    past = 0 if cache is None else int(cache.get_seq_length())
    total = past + x.shape[1]
    present = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[1] != total:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}, must be [batch, {total}]"
            )
        present = attention_mask.bool()
        if bool(present.all()):
            present = None
    if position_ids is not None and attention_mask is None and bool((position_ids.diff(dim=1) != 1).any()):
        raise ValueError(
            "position_ids that jump or begin anew (sequences packed into one row) are not supported: tokens "
            "would see the sequence before; give each a row of its own, with attention_mask"
        )
    if position_ids is None:
        if present is None:
            position_ids = torch.arange(past, total, device=x.device)[None]
        else:
            position_ids = (present.long().cumsum(dim=1) - 1).clamp_min(0)[:, past:]
    scaling = RotaryScalingConfig(**config.rotary_scaling)
    frequency_D = rotary_frequencies(config.head_dim, config.rotary_base, scaling, x.device)
    angle = position_ids.float()[..., None, None] * frequency_D
    return TokenContext(position_ids, angle.cos(), angle.sin(), ids_BS, present, cache, routing, past)


def recall(config: ChiarConfig, x: Tensor, context: TokenContext) -> tuple[Tensor | None, Tensor | None]:
    """Documents into the context; the prefix mean's sums and counts. Under a cache they lie in a slot of
    their own, or in layer 1's where it has no attention."""
    pools = config.meta_router["enabled"] and config.meta_router["pooling"] == "causal"
    end = None
    if config.mask_documents:
        if config.document_end is None or context.ids_BS is None:
            raise ValueError(
                "mask_documents: documents end with eos_token_id, so the config must name it, and input_ids "
                "must be given, not inputs_embeds"
            )
        end = context.ids_BS == config.document_end
    first_is_free = parse_schedule(config.schedule)[0] == "D"  # its slot tells how many tokens were seen
    if not pools and end is None and not first_is_free:
        return None, None
    present = None if context.present_BT is None else context.present_BT[:, context.past :]
    slot = 0 if first_is_free else config.num_hidden_layers
    memory = remember(x, end, present, pools, context.cache, slot)
    context.document_BT = memory.documents_BT
    return memory.sums_BSH, memory.counts_BS1


class ChiarModel(ChiarPreTrainedModel):
    """Embedding, layers, final norm: ids `[b, s]` to `[b, s, h]`."""

    def __init__(self, config: ChiarConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChiarDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table."""
        self.embed_tokens = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        routing: Routing | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """attention_mask: `[b, past + s]`, 0 for padding. cache: a DynamicCache, also as past_key_values.
        others: output_hidden_states; what else transformers passes is not used."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if others.get("output_attentions"):
            raise ValueError("output_attentions: this model's attention keeps no weights to show")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(others.get("past_key_values") if cache is None else cache, use_cache)
        context = token_context(self.config, x, input_ids, attention_mask, position_ids, cache, routing)
        sums_BSH, counts_BS1 = recall(self.config, x, context)
        x = F.dropout(x, self.config.dropout, self.training)
        states = [x]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, context, sums_BSH, counts_BS1)
            else:
                x = layer(x, context, sums_BSH, counts_BS1)
            states.append(x)
        x = self.norm(x)
        states[-1] = x
        shown = others.get("output_hidden_states") or self.config.output_hidden_states
        hidden = tuple(states) if shown else None
        output = BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden, **{CACHE_FIELD: cache})  # type: ignore[arg-type]
        return self._as_asked(output, return_dict)  # type: ignore[no-any-return]

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        if cache is None and (not use_cache or self.training):
            return None
        if cache is not None and (not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False)):
            raise ValueError(
                f"a {type(cache).__name__} of fixed size, quantised or offloaded is not supported; pass a "
                "DynamicCache(), or no cache_implementation"
            )
        if self.gradient_checkpointing and self.training:
            raise ValueError("gradient checkpointing would fill the cache twice; train without one")
        if config.meta_router["enabled"] and config.meta_router["pooling"] == "batch":
            raise ValueError(
                "meta_router.pooling batch averages over the whole window, later tokens included, so nothing "
                "can be cached; pass use_cache=False, and input_ids"
            )
        if config.blends_rbf:
            raise ValueError("RBF mixing keeps no cache in this model; pass use_cache=False, and input_ids")
        return DynamicCache() if cache is None else cache


class ChiarForCausalLM(ChiarPreTrainedModel, GenerationMixin):
    """CHIAR-Former with its language-model head: ids `[b, s]` to logits `[b, s, vocab]`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ChiarConfig) -> None:
        super().__init__(config)
        self.model = ChiarModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]
        if not config.use_cache and self.generation_config is not None:
            self.generation_config.use_cache = False

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        head: nn.Module = self.lm_head
        return head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        """labels: `[b, s]` as input_ids, -100 where no loss is wanted; shifted here. Other inputs are those
        of `ChiarModel`."""
        loss_inputs = {"num_items_in_batch": inputs.pop("num_items_in_batch", None)}
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **inputs)
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_inputs
            )
        answer = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_FIELD: getattr(outputs, CACHE_FIELD)},
        )
        return self._as_asked(answer, return_dict)  # type: ignore[no-any-return]
