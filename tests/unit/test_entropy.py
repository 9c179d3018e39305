"""Spectral entropy against a float64 definition by scipy, its calibration and the authors' outputs."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch

from chiar_megatron.routing.entropy import entropy_of_spectrum, spectral_entropy

FIXTURE = Path(__file__).parents[1] / "fixtures" / "reference" / "operators.pt"
METHODS = ["one_pass", "two_pass"]


def _by_scipy(x: torch.Tensor, dc_power_weight: float = 1.0) -> np.ndarray:
    power = scipy.fft.dct(x.double().numpy(), norm="ortho") ** 2
    power[..., 0] *= dc_power_weight
    return scipy.stats.entropy(power, axis=-1, base=x.shape[-1])


def _normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]), dtype=dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dc_power_weight", [1.0, 2.0])
@pytest.mark.parametrize("scale", [1e-18, 1e-3, 1.0, 1e18])
@pytest.mark.parametrize("h", [2, 3, 64, 997, 1024])
def test_agrees_with_scipy_at_any_scale(h, scale, dc_power_weight, method):
    x = _normal(50, 2, h)
    x[0, 0] = torch.cos(math.pi * (torch.arange(h) + 0.5) / h)  # one pure frequency
    x[1, 0] = 1.0 + 1e-3 * x[1, 0]  # nearly constant
    expected = _by_scipy(x, dc_power_weight)
    entropy = spectral_entropy(x * scale, dc_power_weight, method=method)
    assert entropy.shape == (50, 2) and entropy.dtype == torch.float32
    assert np.abs(entropy.double().numpy() - expected).max() < 2e-6
    assert entropy.min() >= 0 and entropy.max() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_limits(method):
    assert spectral_entropy(torch.zeros(3, 8), method=method).tolist() == [0, 0, 0]
    assert spectral_entropy(torch.tensor([[5.0], [0.0]]), method=method).tolist() == [0, 0]
    assert spectral_entropy(torch.full((1, 64), 3.0), method=method).item() == pytest.approx(0, abs=1e-6)
    assert entropy_of_spectrum(torch.ones(16), method=method).item() == pytest.approx(1, abs=1e-6)
    one_hot = torch.zeros(16)
    one_hot[5] = -7.0
    assert entropy_of_spectrum(one_hot, method=method).item() == 0
    bad = torch.ones(2, 8)
    bad[0, 3] = math.nan
    assert spectral_entropy(bad, method=method).isnan().tolist() == [True, False]


@pytest.mark.parametrize("method", METHODS)
def test_rounding_never_leaves_the_unit_interval(method):
    for h in range(2, 64):  # unclamped, 1.0000001 comes out at h = 7
        assert entropy_of_spectrum(torch.full((h,), 0.7), method=method).item() <= 1


def test_gaussian_noise_has_the_known_mean():
    entropy = spectral_entropy(_normal(4000, 1024))
    assert entropy.mean().item() == pytest.approx(0.8949, abs=3e-4)
    assert entropy.std().item() == pytest.approx(0.0040, abs=3e-4)
    low, high = torch.quantile(entropy, torch.tensor([0.33, 0.67])).tolist()
    assert (low, high) == (pytest.approx(0.8932, abs=5e-4), pytest.approx(0.8967, abs=5e-4))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("h", [64, 96, 1000, 1024])
def test_authors_entropy_counts_the_dc_power_twice(h, method):
    case = torch.load(FIXTURE, weights_only=True)[h]
    entropy = spectral_entropy(case["x"], dc_power_weight=2.0, method=method)
    assert (entropy - case["entropy"]).abs().max() < 1e-5
    assert (spectral_entropy(case["x"]) - case["entropy"]).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dc_power_weight", [1.0, 2.0])
def test_gradients(method, dc_power_weight):
    x = _normal(3, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: spectral_entropy(v, dc_power_weight, method=method), x)
    tiny = (1e-6 * _normal(3, 6, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: spectral_entropy(v, dc_power_weight, method=method) * 1e-6, tiny, eps=1e-12
    )


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_finite_where_the_logarithm_is_not(method):
    spectrum = torch.tensor([[1.0, 0.0, 2.0, 1e-30], [0.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]])
    spectrum.requires_grad_()
    entropy_of_spectrum(spectrum, method=method).sum().backward()
    assert spectrum.grad is not None and spectrum.grad.isfinite().all()
    assert spectrum.grad[0, 1] == 0 and spectrum.grad[0, 0] != 0
    assert spectrum.grad[1].tolist() == [0, 0, 0, 0]
    single = torch.ones(2, 1, requires_grad=True)
    spectral_entropy(single, method=method).sum().backward()
    assert single.grad is not None and single.grad.tolist() == [[0], [0]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("h", [4, 64, 2048])
def test_gradients_are_finite_between_the_bounds_we_name(h, method):
    spike = torch.zeros(1, h)
    spike[0, 1] = 1.0
    shapes = torch.cat([_normal(8, h).float().clamp(-1, 1), torch.ones(1, h), spike])
    shapes /= shapes.abs().amax(-1, keepdim=True)
    for scale in (1e-36, 1e34):
        x = (shapes * scale).requires_grad_()
        (grad,) = torch.autograd.grad(spectral_entropy(x, method=method).sum(), x)
        assert grad.isfinite().all() and grad.abs().max() > 0
    for beyond in (1e-39, torch.inf):
        x = (shapes * beyond).nan_to_num(0.0, torch.inf).requires_grad_()
        (grad,) = torch.autograd.grad(spectral_entropy(x, method=method).sum(), x)
        assert not grad.isfinite().all()


def test_half_precision_input_gives_float32():
    x = _normal(20, 1024).bfloat16()
    entropy = spectral_entropy(x)
    assert entropy.dtype == torch.float32
    assert np.abs(entropy.double().numpy() - _by_scipy(x)).max() < 2e-6


def test_unknown_method():
    with pytest.raises(ValueError, match="'three_pass'"):
        spectral_entropy(torch.ones(4), method="three_pass")
