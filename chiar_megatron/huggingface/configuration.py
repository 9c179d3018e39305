"""`ChiarConfig`: what a CHIAR model is, as `transformers` writes it into `config.json`."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from chiar_megatron.config.schedule import parse_schedule

_DEFAULTS: dict[str, Any] = {
    "schedule": "D R*2 A",
    "vocab_size": 50257,
    "hidden_size": 128,
    "intermediate_size": None,
    "num_attention_heads": 4,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 256,
    "hidden_act": "gelu",
    "norm": "post",
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "use_bias": True,
    "attention_bias": None,
    "rotary_base": 10000.0,
    "rotary_scaling": None,
    "dropout": 0.0,
    "initializer_range": 0.02,
    "mup_base_hidden_size": None,
    "mask_documents": False,
    "router": None,
    "meta_router": None,
    "rbf": None,
    "use_cache": True,
    "tie_word_embeddings": True,
}


class ChiarConfig(PretrainedConfig):
    """Sizes and kinds of a CHIAR-Former; fields that other models have bear their usual names.

    schedule: a letter a layer, D spectral, R routed, A attention ("D R*26 A"). norm: "post" or "pre".
    hidden_act: "gelu", or "silu" for SwiGLU. rotary_scaling: fields of `RotaryScalingConfig`.
    router: fields of `RouterConfig`, and has_controller. meta_router: fields of `MetaRouterConfig`.
    mup_base_hidden_size: of the recipe, for further training by it. rbf: features and gamma.
    mask_documents: tokens see their own document alone; documents end with eos_token_id. attention_bias: of
    queries, keys and values; null: as use_bias.
    """

    model_type = "chiar"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    schedule: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    hidden_act: str
    norm: str
    normalization: str
    norm_epsilon: float
    use_bias: bool
    attention_bias: bool
    rotary_base: float
    rotary_scaling: Any
    dropout: float
    initializer_range: float
    mup_base_hidden_size: Any
    mask_documents: bool
    router: Any
    meta_router: Any
    rbf: Any
    use_cache: bool
    tie_word_embeddings: bool

    def __init__(self, **fields: Any) -> None:
        """fields: those of `_DEFAULTS`, and any of `PretrainedConfig`; null ones follow from the others."""
        given = {name: fields.pop(name, default) for name, default in _DEFAULTS.items()}
        derived = {
            "intermediate_size": 4 * given["hidden_size"],
            "num_key_value_heads": given["num_attention_heads"],
            "head_dim": given["hidden_size"] // given["num_attention_heads"],
            "attention_bias": given["use_bias"],
        }
        for name, value in given.items():
            setattr(self, name, derived.get(name) if value is None else value)
        self.num_hidden_layers = len(parse_schedule(self.schedule))
        self.rotary_scaling = self.rotary_scaling or {"rope_type": "none"}
        self.router = {
            "kind": "entropy",
            "dc_power_weight": 1.0,
            "operators": "spectral_attention",
            "keys_values": "all",
            "has_controller": False,
            **(self.router or {}),
        }
        gate = {"enabled": True, "pooling": "running", "bias_init": 2.0}
        self.meta_router = {**gate, **(self.meta_router or {})}
        self.rbf = {"features": 64, "gamma": 1.0, **(self.rbf or {})}
        # The mean over the whole window, later tokens included, cannot be cached; RBF mixing is not.
        batch_pooled = self.meta_router["enabled"] and self.meta_router["pooling"] == "batch"
        own_cache = self.use_cache and not batch_pooled and not self.blends_rbf
        tied = self.tie_word_embeddings
        fields.pop("num_hidden_layers", None)
        super().__init__(**{"use_cache": own_cache, "tie_word_embeddings": tied, **fields})
        self.use_cache = own_cache

    @property
    def document_end(self) -> int | None:
        """The token that ends a document: the first where several end a generation."""
        eos = getattr(self, "eos_token_id", None)  # not every transformers has a default for it
        return next(iter(eos), None) if isinstance(eos, (list, tuple)) else eos

    @property
    def blends_rbf(self) -> bool:
        """Whether RBF mixing is a third operator."""
        blends = self.router["kind"] in ("soft", "hard")
        return blends and self.router["operators"] == "spectral_attention_rbf"
