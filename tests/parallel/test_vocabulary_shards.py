"""The cross-entropy kernel over shards of the vocabulary, by Triton's interpreter, against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.parallel.harness import run_ranks

pytest.importorskip("triton", reason="Triton is not installed")

RANKS, ROWS, WIDTH, VOCAB, Z_LOSS = 3, 6, 8, 11, 1e-2  # the last shard is nothing but padding


def test_three_ranks_give_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)
    logits_NV = 5.0 * torch.randn(ROWS, RANKS * WIDTH)
    logits_NV[0] -= 200.0
    labels_N = torch.tensor([0, 7, 8, 10, 3, 9])
    arguments = {"logits_NV": logits_NV, "labels_N": labels_N, "vocab_size": VOCAB, "z_loss": Z_LOSS}
    told = run_ranks("tests.parallel.workers_vocabulary:losses", RANKS, arguments)

    exact_NV = logits_NV[:, :VOCAB].double().requires_grad_()
    loss_N = F.cross_entropy(exact_NV, labels_N, reduction="none")
    z_N = Z_LOSS * exact_NV.logsumexp(-1).square()
    (loss_N * torch.arange(1, ROWS + 1) + 0.5 * z_N).sum().backward()
    for found_loss_N, found_z_N, _ in told:
        torch.testing.assert_close(found_loss_N.double(), loss_N.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found_z_N.double(), z_N.detach(), atol=1e-5, rtol=1e-5)
    grad_NV = torch.cat([grad for _, _, grad in told], dim=1).double()
    torch.testing.assert_close(grad_NV[:, :VOCAB], exact_NV.grad, atol=1e-5, rtol=1e-5)
    assert not grad_NV[:, VOCAB:].any()
