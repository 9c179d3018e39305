"""RBF mixing against a direct double loop in numpy."""

import math

import numpy as np
import pytest
import torch

from chiar_megatron.operators import rbf
from chiar_megatron.operators.rbf import causal_rbf_mixing, make_omega, rbf_features

S, B, H, R = 9, 2, 5, 4


def _phi(seed: int = 0) -> torch.Tensor:
    x = torch.randn(S, B, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rbf_features(x, make_omega(H, R, gamma=1.0, seed=3).double())


def _direct(phi: np.ndarray, positions: np.ndarray, documents: np.ndarray | None) -> np.ndarray:
    """One query at a time, straight from the definition; positions [Q, B]."""
    out = np.zeros((len(positions), B, phi.shape[-1]))
    for q in range(len(positions)):
        for b in range(B):
            place = positions[q, b]
            keys = [
                j for j in range(place + 1) if documents is None or documents[j, b] == documents[place, b]
            ]
            weights = np.array([math.exp(phi[place, b] @ phi[j, b]) for j in keys])
            out[q, b] = sum(w * phi[j, b] for w, j in zip(weights / weights.sum(), keys, strict=True))
    return out


def test_omega_is_seeded_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    omega = make_omega(256, 64, gamma=0.5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert omega.shape == (256, 64) and omega.dtype == torch.float32
    assert torch.equal(omega, make_omega(256, 64, gamma=0.5, seed=1))
    assert not torch.equal(omega, make_omega(256, 64, gamma=0.5, seed=2))
    assert omega.std().item() == pytest.approx(1.0, abs=0.03)
    assert make_omega(256, 64, gamma=2.0, seed=1).std().item() == pytest.approx(2.0, abs=0.06)


def test_features():
    x = torch.randn(3, 2, H, generator=torch.Generator().manual_seed(5)).bfloat16()
    omega = make_omega(H, R, gamma=1.0, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        phi = rbf_features(x, omega)
    assert phi.shape == (3, 2, 2 * R) and phi.dtype == torch.float32
    angle = x.double().numpy() @ omega.double().numpy() / math.sqrt(R)
    np.testing.assert_allclose(phi.numpy(), np.concatenate([np.cos(angle), np.sin(angle)], -1), atol=2e-6)


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("with_documents", [False, True])
def test_agrees_with_the_definition(monkeypatch, chunk, with_documents):
    monkeypatch.setattr(rbf, "QUERY_CHUNK", chunk)
    phi = _phi()
    documents = torch.tensor([[0, 0]] * 3 + [[0, 1]] * 2 + [[1, 2]] * 4) if with_documents else None
    direct_documents = None if documents is None else documents.numpy()
    everywhere = torch.arange(S)
    np.testing.assert_allclose(
        causal_rbf_mixing(phi, phi, everywhere, documents).numpy(),
        _direct(phi.numpy(), everywhere[:, None].repeat(1, B).numpy(), direct_documents),
        rtol=1e-12,
    )
    chosen = torch.tensor([[1, 0], [4, 2], [5, 3], [8, 7]])
    phi_query = phi.gather(0, chosen[..., None].expand(-1, -1, 2 * R))
    np.testing.assert_allclose(
        causal_rbf_mixing(phi_query, phi, chosen, documents).numpy(),
        _direct(phi.numpy(), chosen.numpy(), direct_documents),
        rtol=1e-12,
    )


def test_sees_no_future():
    phi = _phi()
    changed = phi.clone()
    changed[6:] = _phi(seed=1)[6:]
    positions = torch.arange(S)
    before, after = (causal_rbf_mixing(p, p, positions) for p in (phi, changed))
    assert torch.equal(before[:6], after[:6])
    assert not torch.equal(before[6], after[6])


def test_gradients_reach_queries_and_keys(monkeypatch):
    monkeypatch.setattr(rbf, "QUERY_CHUNK", 4)
    phi = _phi().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: causal_rbf_mixing(p, p, torch.arange(S)), phi)


def test_memory_kept_for_backward_does_not_grow_with_the_square(monkeypatch):
    monkeypatch.setattr(rbf, "QUERY_CHUNK", 8)
    s, features = 64, 4
    phi = torch.rand(s, 1, features, requires_grad=True)
    saved: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        causal_rbf_mixing(phi, phi, torch.arange(s))
    assert sum(saved.values()) < s * s * 4
