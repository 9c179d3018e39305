"""Spectral mixing against scipy and the authors' own outputs."""

from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch

from chiar_megatron.operators.dct import dct
from chiar_megatron.operators.spectral_mixing import SpectralMixing, spectral_mixing

FIXTURE = Path(__file__).parents[1] / "fixtures" / "reference" / "operators.pt"


def _inputs(h: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(h)
    x = torch.randn(3, 2, h, generator=generator, dtype=torch.float64)
    w = torch.rand(h, generator=generator, dtype=torch.float64) + 0.5
    return x.to(dtype), w.to(dtype)


def _by_scipy(x: torch.Tensor, w: torch.Tensor) -> np.ndarray:
    spectrum = scipy.fft.dct(x.double().numpy(), norm="ortho")
    return scipy.fft.idct(spectrum * w.double().numpy(), norm="ortho")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("form", ["fft", "gemm"])
@pytest.mark.parametrize("h", [1, 7, 64, 1000])
def test_agrees_with_scipy(h, form, dtype, tolerance):
    x, w = _inputs(h, dtype)
    expected = _by_scipy(x, w)
    for y in (spectral_mixing(x, w, form), spectral_mixing(x, w, form, spectrum=dct(x))):
        assert y.dtype == dtype
        assert np.linalg.norm(y.double().numpy() - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("h", [64, 96, 1000, 1024])
@pytest.mark.parametrize("form", ["fft", "gemm"])
def test_authors_mixing_is_ours_with_the_filter_doubled(h, form):
    case = torch.load(FIXTURE, weights_only=True)[h]
    theirs = case["mixed"]
    ours = spectral_mixing(case["x"], 2 * case["w"], form)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    # their forward transform: 2√(2/h) Σ x cos(…) for every k
    scale = torch.full((h,), 2.0)
    scale[0] = 2 * 2**0.5
    spectrum = dct(case["x"], form) * scale
    assert (spectrum - case["spectrum"]).abs().max() < 1e-5 * case["spectrum"].abs().max()


@pytest.mark.parametrize("with_spectrum", [False, True])
@pytest.mark.parametrize("h", [1, 6, 7])
def test_gradients(h, with_spectrum):
    x, w = (t.requires_grad_() for t in _inputs(h))

    def mix(x_: torch.Tensor, w_: torch.Tensor) -> torch.Tensor:
        return spectral_mixing(x_, w_, "fft", spectrum=dct(x_.detach()) if with_spectrum else None)

    assert torch.autograd.gradcheck(mix, (x, w))


def test_a_spectrum_inside_the_graph_is_not_counted_twice():
    x, w = _inputs(8)
    gradients = []
    for reuse in (False, True):
        leaf = x.clone().requires_grad_()
        spectral_mixing(leaf, w, spectrum=dct(leaf) if reuse else None).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients, rtol=1e-12)


def test_half_precision_rounds_once_and_keeps_little():
    x, w = _inputs(64, torch.bfloat16)
    leaf, filter_ = x.requires_grad_(), torch.nn.Parameter(w.float())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = spectral_mixing(leaf, filter_)
    assert y.dtype == torch.bfloat16
    expected = _by_scipy(leaf.detach(), filter_.detach())
    assert np.abs(y.detach().double().numpy() - expected).max() <= 2**-8 * np.abs(expected).max()
    assert sum(t.nbytes for t in saved) == leaf.nbytes + filter_.nbytes
    y.float().sum().backward()
    assert leaf.grad.dtype == torch.bfloat16 and filter_.grad.dtype == torch.float32
    # dw = Σ dct(1)·dct(x): only the first entry is not 0
    spectrum = scipy.fft.dct(leaf.detach().double().numpy(), norm="ortho")
    assert filter_.grad[0].item() == pytest.approx(8 * spectrum[..., 0].sum(), rel=1e-2)
    assert filter_.grad[1:].abs().max() < 1e-4


def test_module_starts_as_the_identity():
    module = SpectralMixing(40, params_dtype=torch.float64)
    assert [(name, tuple(p.shape)) for name, p in module.named_parameters()] == [("weight", (40,))]
    x, w = _inputs(40)
    assert torch.allclose(module(x), x, atol=1e-14)
    module.load_state_dict({"weight": w})
    assert torch.equal(module(x), spectral_mixing(x, w))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_only_chosen_tokens_are_mixed(share):
    module = SpectralMixing(40, params_dtype=torch.float64)
    x = torch.randn(5, 7, 40, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        module.weight.copy_(torch.randn(40))
    chosen = torch.rand(5, 7) < share if share < 1.0 else torch.ones(5, 7, dtype=torch.bool)
    direction = torch.randn_like(x)
    expected = torch.where(chosen[..., None], spectral_mixing(x, module.weight), 0)
    actual = module(x, chosen)
    torch.testing.assert_close(actual, expected, atol=1e-14, rtol=0)
    inputs = (x, module.weight)
    ours = torch.autograd.grad((actual * direction).sum(), inputs)
    theirs = torch.autograd.grad((expected * direction).sum(), inputs)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_each_token_stands_alone():
    x, w = _inputs(64, torch.float32)
    changed = x.clone()
    changed[2] += 1.0
    assert torch.equal(spectral_mixing(changed, w)[:2], spectral_mixing(x, w)[:2])
