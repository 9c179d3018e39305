"""RBF mixing, the third operator of the paper's ablation: attention between random Fourier features.

    φ(x) = [cos(xΩ/√R), sin(xΩ/√R)],   A = softmax(φφᵀ), causal and unscaled,   mixed = Aφ

The projection W and the feed-forward layer that follow belong to the layer. Shape letters: S all
positions, Q queries, B batch, H hidden size, R random features, F = 2R.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

QUERY_CHUNK = 128  # queries at once: scores take QUERY_CHUNK·B·S floats


def make_omega(hidden_size: int, num_features: int, gamma: float, seed: int) -> Tensor:
    """Ω [hidden_size, num_features], float32 on the CPU: normals of standard deviation √(2·gamma).

    Drawn from a generator of its own, so it is the same on every rank and draws nothing from theirs.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(hidden_size, num_features, generator=generator) * math.sqrt(2 * gamma)


def rbf_features(x: Tensor, omega: Tensor) -> Tensor:
    """Random Fourier features φ(x).

    x: [..., H], any floating dtype. omega: [H, R]. Returns [..., 2R], cosines first, float32 (float64
    if x and omega are float64).
    """
    with torch.autocast(x.device.type, enabled=False):
        angle = x.to(omega.dtype) @ omega / math.sqrt(omega.shape[-1])
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


def causal_rbf_mixing(
    phi_query: Tensor, phi_all: Tensor, query_positions: Tensor, document_ids: Tensor | None = None
) -> Tensor:
    """Mix features over earlier positions: `softmax(φ_query φ_allᵀ, causal) φ_all`.

    phi_query: [Q, B, F]. phi_all: [S, B, F]. query_positions: integers, [Q] or [Q, B]: the place of each
    query in the sequence; it sees the positions up to and including its own. document_ids: integers
    [S, B] or None; where given, only those of its own document. Returns [Q, B, F] in phi_query's dtype,
    meant to be float32: the scores are not scaled and reach R.
    Memory is bounded by chunks of queries; the backward pass computes the scores again.
    """
    batch = phi_all.shape[1]
    positions_QB = query_positions
    if query_positions.dim() == 1:
        positions_QB = query_positions[:, None].expand(-1, batch)
    chunks = [
        checkpoint(
            _mix_chunk, phi, phi_all, positions, document_ids, use_reentrant=False, preserve_rng_state=False
        )
        for phi, positions in zip(
            torch.split(phi_query, QUERY_CHUNK), torch.split(positions_QB, QUERY_CHUNK), strict=True
        )
    ]
    return torch.cat(chunks)


def _mix_chunk(
    phi_QBF: Tensor, phi_SBF: Tensor, positions_QB: Tensor, document_ids_SB: Tensor | None
) -> Tensor:
    key_positions_S = torch.arange(len(phi_SBF), device=phi_SBF.device)
    visible_BQS = key_positions_S <= positions_QB.T[:, :, None]
    if document_ids_SB is not None:
        query_document_QB = document_ids_SB.gather(0, positions_QB)
        visible_BQS = visible_BQS & (document_ids_SB.T[:, None, :] == query_document_QB.T[:, :, None])
    with torch.autocast(phi_SBF.device.type, enabled=False):
        keys_BSF = phi_SBF.transpose(0, 1)
        scores_BQS = phi_QBF.transpose(0, 1) @ keys_BSF.transpose(1, 2)
        weights_BQS = scores_BQS.masked_fill(~visible_BQS, -math.inf).softmax(dim=-1)
        return (weights_BQS @ keys_BSF).transpose(0, 1)
