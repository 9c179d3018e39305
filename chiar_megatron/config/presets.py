"""Named model sizes, applied beneath a recipe's own `model` fields by `model.preset`.

`17m` and `400m` have the paper's sizes and the paper's layer (arXiv:2606.08327): post-norm, LayerNorm,
exact GELU, biases, tied embeddings, RoPE, layer 1 spectral, the last one attention, the entropy router
and the MetaRouter over layer 1. A preset's `-twin` is the same layer with attention everywhere.

What differs from the paper's code, and why:

- `meta_router.pooling` stays `running`. The paper's `batch` mean shows each token the future, so its
  perplexity is not that of a causal model and cached generation is impossible; `running` reads an
  average over past steps. `model.meta_router.pooling=batch` gives the paper's.
- `meta_router.bias_init` stays 2.0, as the paper describes; in the authors' code a global
  initialisation overwrites it with 0.
- `router.dc_power_weight` stays 1, the exact entropy; the authors' transform counts the DC power twice.
- Norms, biases and filters are not decayed; the authors' code decays everything.

The dropout of the published 17m model is not known here: `17m` keeps the schema's 0.
`400m` has no optimizer: the published values are in `examples/chiar_400m/recipe.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping

_PAPER_LAYER: Mapping[str, object] = {
    "norm": "post",
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "activation": "gelu",
    "add_bias": True,
    "tie_embeddings": True,
    "rotary_base": 10000.0,
    "init_std": 0.02,
    "router": {"kind": "entropy"},
}
_CHIAR: Mapping[str, object] = {"meta_router": {"enabled": True, "pooling": "running", "bias_init": 2.0}}
_TWIN: Mapping[str, object] = {"meta_router": {"enabled": False}}

_TINY: Mapping[str, object] = {
    **_PAPER_LAYER, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 128,
}  # fmt: skip
_17M: Mapping[str, object] = {
    **_PAPER_LAYER, "hidden_size": 256, "num_attention_heads": 4, "seq_length": 256, "vocab_size": 50257,
}  # fmt: skip
_400M: Mapping[str, object] = {
    **_PAPER_LAYER, "hidden_size": 1024, "num_attention_heads": 16, "seq_length": 256, "vocab_size": 50257,
    "dropout": 0.1,
}  # fmt: skip

PRESETS: Mapping[str, Mapping[str, object]] = {
    "tiny": {**_TINY, **_CHIAR, "schedule": "D R*2 A"},
    "tiny-twin": {**_TINY, **_TWIN, "schedule": "A*4"},
    "17m": {**_17M, **_CHIAR, "schedule": "D R*2 A"},
    "17m-twin": {**_17M, **_TWIN, "schedule": "A*4"},
    "400m": {**_400M, **_CHIAR, "schedule": "D R*26 A"},
    "400m-twin": {**_400M, **_TWIN, "schedule": "A*28"},
}
"""Fields of `ModelConfig` by preset name; nested mappings are sections."""
