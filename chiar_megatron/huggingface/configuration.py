"""`ChiarConfig`: what a CHIAR model is, as `transformers` writes it into `config.json`."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from chiar_megatron.config.schedule import parse_schedule


class ChiarConfig(PretrainedConfig):
    """Sizes and kinds of a CHIAR-Former; fields that other models have bear their usual names.

    schedule: a letter a layer, D spectral, R routed, A attention ("D R*26 A"). norm: "post" or "pre".
    hidden_act: "gelu", or "silu" for SwiGLU. rotary_scaling: fields of `RotaryScalingConfig`.
    router: kind, dc_power_weight, operators, keys_values, has_controller. meta_router: enabled, pooling.
    mask_documents: tokens see their own document alone; documents end with eos_token_id.
    """

    model_type = "chiar"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        schedule: str = "D R*2 A",
        vocab_size: int = 50257,
        hidden_size: int = 128,
        intermediate_size: int | None = None,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 256,
        hidden_act: str = "gelu",
        norm: str = "post",
        normalization: str = "LayerNorm",
        norm_epsilon: float = 1e-5,
        use_bias: bool = True,
        attention_bias: bool | None = None,
        rotary_base: float = 10000.0,
        rotary_scaling: dict[str, Any] | None = None,
        dropout: float = 0.0,
        initializer_range: float = 0.02,
        mask_documents: bool = False,
        router: dict[str, Any] | None = None,
        meta_router: dict[str, Any] | None = None,
        rbf: dict[str, Any] | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        """attention_bias: of queries, keys and values; None: as use_bias. rbf: features and gamma."""
        self.schedule = schedule
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = len(parse_schedule(schedule))
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.norm = norm
        self.normalization = normalization
        self.norm_epsilon = norm_epsilon
        self.use_bias = use_bias
        self.attention_bias = use_bias if attention_bias is None else attention_bias
        self.rotary_base = rotary_base
        self.rotary_scaling = rotary_scaling or {"kind": "none"}
        self.dropout = dropout
        self.initializer_range = initializer_range
        self.mask_documents = mask_documents
        self.router = {
            "kind": "entropy",
            "dc_power_weight": 1.0,
            "operators": "spectral_attention",
            "keys_values": "all",
            "has_controller": False,
            **(router or {}),
        }
        self.meta_router = {"enabled": True, "pooling": "running", "bias_init": 2.0, **(meta_router or {})}
        self.rbf = {"features": 64, "gamma": 1.0, **(rbf or {})}
        # The mean over the whole window, later tokens included, cannot be cached; RBF mixing is not.
        batch_pooled = self.meta_router["enabled"] and self.meta_router["pooling"] == "batch"
        self.use_cache = use_cache and not batch_pooled and not self.blends_rbf
        kwargs.pop("num_hidden_layers", None)
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})

    @property
    def blends_rbf(self) -> bool:
        """Whether RBF mixing is a third operator."""
        blends = self.router["kind"] in ("soft", "hard")
        return blends and self.router["operators"] == "spectral_attention_rbf"
