"""A routed training step on CUDA: nothing waits for the host, and a replayed graph does what launches do."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from chiar_megatron.config.load import config_from_dict, resolve_config
from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.runtime.distributed import single_process_world
from chiar_megatron.training.engine import MegatronEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

T, B, VOCAB = 256, 8, 1000
MODEL = {
    "schedule": "D R*2 A", "hidden_size": 256, "num_attention_heads": 4, "seq_length": T, "vocab_size": VOCAB,
    "router": {"kind": "learned", "target": 0.5},
}  # fmt: skip


def engine_of(precision: str = "bf16", **runtime: Any) -> MegatronEngine:
    fields = {
        "model": MODEL,
        "training": {"precision": precision, "global_batch_size": B, "micro_batch_size": B, "steps": 1000},
        "runtime": runtime,
    }
    config = resolve_config(config_from_dict(fields), vocab_size=None, eod_token=0)
    return MegatronEngine(config, single_process_world("cuda"))


def batch_of(seed: int) -> TokenBatch:
    """Text that can be learned: each token follows from the one before."""
    tokens = torch.randint(VOCAB, (B, 1), generator=torch.Generator().manual_seed(seed))
    rows = [tokens]
    for _ in range(T):
        rows.append((rows[-1] * 7 + 3) % VOCAB)
    ids_BS = torch.cat(rows, dim=1)
    mask_BS = torch.ones(B, T)
    return TokenBatch(ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous(), mask_BS, None, torch.arange(B))


def losses_of(engine: MegatronEngine, steps: int) -> list[float]:
    return [engine.train_step([batch_of(step)], step).sums.loss for step in range(steps)]


def test_nothing_waits_for_the_host_and_shares_are_held():
    engine = engine_of(compile=False, cuda_graph=False)
    losses_of(engine, 2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = engine.launch_step([batch_of(2)], 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    pending.result()
    shares = [engine.train_step([batch_of(step)], step).sums.routing.routed_fraction for step in range(3, 63)]
    mean = torch.tensor(shares[-30:]).mean(0)
    assert (mean - 0.5).abs().max() < 0.03, mean


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 2e-2), ("fp32", 1e-3)])
def test_compiled_and_replayed_steps_learn_as_eager_ones_do(precision: str, bound: float):
    eager = losses_of(engine_of(precision, compile=False, cuda_graph=False), 8)
    replayed = losses_of(engine_of(precision), 8)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert replayed == pytest.approx(eager, rel=bound)
    assert replayed[-1] < replayed[0]


def test_every_eager_step_takes_its_time():
    """One is under way while the host looks at the one before, and the last two are looked at together."""
    engine = engine_of(compile=False, cuda_graph=False)
    losses_of(engine, 3)
    batches, pending, ends = [batch_of(step) for step in range(8)], [], []
    started = time.monotonic()
    for step, batch in enumerate(batches, start=3):
        pending.append(engine.launch_step([batch], step))
        if len(pending) > 1:
            ends.append(pending.pop(0).result().ended)
    ends.append(pending.pop().result().ended)
    assert started < ends[0] and ends[-1] <= time.monotonic()
    seconds = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    usual = sorted(seconds)[len(seconds) // 2]
    assert min(seconds) > usual / 3, f"a step of {min(seconds)} s beside {usual} s"
