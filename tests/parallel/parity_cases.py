"""The grid of small models and the layouts in which they must compute the same.

Every router, operator, pooling and option stands in at least one case; `test_parity` checks that, and
runs every case under tensor parallelism with and without sequence parallelism, and in a pipeline.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from chiar_megatron.config.load import resolve_config
from chiar_megatron.config.schema import (
    MetaRouterConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RouterConfig,
    RunConfig,
    RuntimeConfig,
    TrainingConfig,
)
from tests.parallel.workers_parity import DOCUMENT_END, STEPS, Answer, train_case

OFF = MetaRouterConfig(enabled=False)


def _pooling(kind: Any) -> MetaRouterConfig:
    return MetaRouterConfig(pooling=kind, decay=0.5, bias_init=0.5)


def _case(
    router: RouterConfig, meta: MetaRouterConfig, z_loss: float = 0.0, eps: float = 1e-5, **model: Any
) -> RunConfig:
    """A resolved recipe; weights are large, so that every token matters to those after it.

    eps, of AdamW: with 1e-8 a gradient that is nothing but rounding moves its weight as far as any other.
    In some of these models that alone moves the loss by 1e-5: so does one process against itself when
    each initial weight is disturbed by half a unit in its last place (measured: 1.7e-5; with 1e-5, 5e-7).
    """
    sizes: dict[str, Any] = dict(hidden_size=32, num_attention_heads=4, vocab_size=301, ffn_hidden_size=48)
    settings = dict(schedule="D R*2 A", seq_length=16, init_std=0.2, rbf_features=8, **sizes)
    config = RunConfig(
        model=ModelConfig(**{**settings, **model}, router=router, meta_router=meta),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=2, eps=eps),
        training=TrainingConfig(steps=STEPS, global_batch_size=8, micro_batch_size=2, z_loss=z_loss),
        runtime=RuntimeConfig(device="cpu", threads_per_process=1),
    )
    return resolve_config(config, vocab_size=None, eod_token=DOCUMENT_END)


RBF: Any = "spectral_attention_rbf"
_PRE_SWIGLU: dict[str, Any] = dict(norm="pre", normalization="RMSNorm", activation="swiglu")

CASES: dict[str, RunConfig] = {
    "twin": _case(RouterConfig(), OFF, eps=1e-8, schedule="A*4"),
    "twin, pre, SwiGLU, GQA, untied, z-loss": _case(
        RouterConfig(),
        OFF,
        z_loss=1e-2,
        schedule="A*4",
        tie_embeddings=False,
        num_query_groups=2,
        **_PRE_SWIGLU,
    ),
    "entropy": _case(RouterConfig(kind="entropy"), _pooling("running"), eps=1e-8),
    "entropy, h=33, GQA": _case(
        RouterConfig(kind="entropy", dc_power_weight=2.0),
        _pooling("batch"),
        hidden_size=33,
        kv_channels=6,
        num_query_groups=2,
        mask_documents=True,
    ),
    "learned, pre, SwiGLU, untied": _case(
        RouterConfig(kind="learned"),
        _pooling("batch"),
        z_loss=1e-2,
        schedule="R D R A",
        tie_embeddings=False,
        **_PRE_SWIGLU,
    ),
    "learned, routed keys, masked documents": _case(
        RouterConfig(kind="learned", keys_values="routed"),
        _pooling("running"),
        hidden_size=36,
        num_attention_heads=6,
        num_query_groups=2,
        mask_documents=True,
    ),
    "entropy_gated, routed keys": _case(
        RouterConfig(kind="entropy_gated", keys_values="routed"),
        _pooling("causal"),
        normalization="RMSNorm",
        add_bias=False,
    ),
    "entropy_gated, masked documents": _case(
        RouterConfig(kind="entropy_gated"), _pooling("causal"), norm="pre", mask_documents=True
    ),
    "soft, RBF, collapse": _case(
        RouterConfig(kind="soft", operators=RBF, collapse_weight=0.5), _pooling("running")
    ),
    "soft, pre, RBF, masked documents": _case(
        RouterConfig(kind="soft", operators=RBF), _pooling("batch"), mask_documents=True, **_PRE_SWIGLU
    ),
    "hard, collapse, z-loss": _case(
        RouterConfig(kind="hard", collapse_weight=0.5), _pooling("causal"), z_loss=1e-2
    ),
    "hard, pre, RBF": _case(
        RouterConfig(kind="hard", operators=RBF, collapse_weight=0.5), OFF, norm="pre", tie_embeddings=False
    ),
    "random": _case(RouterConfig(kind="random"), _pooling("running"), vocab_size=302),
}


def _layout(
    tensor: int = 1, sequence: bool = False, pipeline: int = 1, sharded: bool = False, **options: Any
) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        sequence_parallel=sequence,
        pipeline_model_parallel_size=pipeline,
        distributed_optimizer=sharded,
        **options,
    )


# What communicates while it computes; the workers cut buckets so small that there are many.
_GRADS: dict[str, Any] = dict(overlap_grad_reduce=True)
_OVERLAPPED: dict[str, Any] = dict(sharded=True, overlap_grad_reduce=True, overlap_param_gather=True)
_VPP: dict[str, Any] = dict(virtual_pipeline_model_parallel_size=2)


_TWIN, _KEYS, _SOFT = "twin", "learned, routed keys, masked documents", "soft, RBF, collapse"
# Where replicas must count together: the running and the batch mean, U of each micro-batch.
_COUNTED = ("entropy", "entropy, h=33, GQA", "hard, collapse, z-loss")
# Without sequence parallelism one half of the cases runs in one stage, the other in two.
_ONE_STAGE, _TWO_STAGES = tuple(CASES)[::2], tuple(CASES)[1::2]

LAYOUTS: dict[int, dict[str, tuple[ParallelConfig, tuple[str, ...]]]] = {
    2: {
        "TP=2": (_layout(tensor=2), _ONE_STAGE),
        "TP=2+SP": (_layout(tensor=2, sequence=True), tuple(CASES)),
        "PP=2": (_layout(pipeline=2), tuple(CASES)),
        "PP=2, even": (_layout(pipeline=2, layout="even"), (_TWIN, _SOFT)),
        "PP=2, embedding alone": (_layout(pipeline=2, layout="E|t*4L"), ("entropy",)),
        "PP=2 VPP=2": (_layout(pipeline=2, **_VPP), (_TWIN, _KEYS, _SOFT, *_COUNTED)),
        "DP=2, gradients overlapped": (_layout(**_GRADS), (_TWIN, _KEYS)),
        "DP=2, distributed optimizer overlapped": (_layout(**_OVERLAPPED), (_TWIN, _SOFT, "entropy")),
        "DP=2": (_layout(), (_TWIN, _KEYS, *_COUNTED)),
        "DP=2, distributed optimizer": (_layout(sharded=True), (_TWIN, _SOFT, *_COUNTED)),
    },
    4: {
        "TP=2 PP=2": (_layout(tensor=2, pipeline=2), _TWO_STAGES),
        "TP=2+SP PP=2": (_layout(tensor=2, sequence=True, pipeline=2), (_TWIN, _KEYS, _SOFT)),
        "TP=4+SP": (_layout(tensor=4, sequence=True), ("entropy",)),
        "PP=4": (_layout(pipeline=4), ("entropy",)),
        "PP=4, loss alone": (_layout(pipeline=4, layout="Et|t|t*2|L"), ("entropy",)),
        "PP=2 VPP=2 DP=2, distributed optimizer overlapped": (
            _layout(pipeline=2, **_VPP, **_OVERLAPPED),
            (_TWIN, _KEYS, "hard, collapse, z-loss"),
        ),
    },
    8: {
        "TP=2+SP PP=2 DP=2, distributed optimizer": (
            _layout(tensor=2, sequence=True, pipeline=2, sharded=True),
            (_TWIN, "learned, pre, SwiGLU, untied", "hard, collapse, z-loss"),
        ),
    },
}
"""By number of processes: name -> layout and the cases that run in it."""


def calibrated(config: RunConfig, world: Any) -> RunConfig:
    """The same recipe with its threshold between the two middle scores of a first step: mixed decisions."""
    if config.model.router.kind not in ("entropy", "entropy_gated", "learned"):
        return config
    scores = list(train_case(config, world, 1, None).scores.values())
    if not scores:
        return config
    ordered = torch.cat(scores).sort().values
    middle = float(ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].double().mean())
    router = replace(config.model.router, threshold=middle)
    return replace(config, model=replace(config.model, router=router))


def one_process(config: RunConfig, world: Any, decisions: Path) -> Answer:
    """The run that all layouts are compared with; its decisions are written for them."""
    return train_case(config, world, STEPS, None, decisions)
