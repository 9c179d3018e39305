"""The DCT against scipy, in both forms and both directions."""

import numpy as np
import pytest
import scipy.fft
import torch

from chiar_megatron.operators.dct import CPU_FFT_BLOCK, dct, dct_matrix, idct, resolve_form

LENGTHS = [1, 2, 3, 4, 5, 17, 64, 96, 997, 1000, 1024]
FORMS = ["fft", "gemm", "auto"]


def _normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(shape[-1]))


def _relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual.double().numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("h", LENGTHS)
def test_agrees_with_scipy(h, form, dtype, tolerance):
    x = _normal(3, 2, h, dtype=dtype)
    exact = x.double().numpy()
    forward, inverse = dct(x, form), idct(x, form)
    assert forward.dtype == inverse.dtype == dtype
    assert _relative_error(forward, scipy.fft.dct(exact, norm="ortho")) < tolerance
    assert _relative_error(inverse, scipy.fft.idct(exact, norm="ortho")) < tolerance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("h", [1, 2, 7, 8])
def test_gradients(h, form):
    x = _normal(2, h).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: dct(v, form), x)
    assert torch.autograd.gradcheck(lambda v: idct(v, form), x)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_gives_a_float32_spectrum_also_under_autocast(form):
    x = _normal(4, 96).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spectrum = dct(x, form)
    assert spectrum.dtype == torch.float32
    exact = scipy.fft.dct(x.detach().double().numpy(), norm="ortho")
    assert _relative_error(spectrum.detach(), exact) < 1e-6
    spectrum.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["fft", "gemm"])
def test_strided_empty_and_blocked_inputs(form):
    h = 48
    transposed = _normal(h, 5).T
    assert not transposed.is_contiguous()
    expected = scipy.fft.dct(transposed.numpy(), norm="ortho")
    assert _relative_error(dct(transposed, form), expected) < 1e-12
    assert dct(torch.empty(0, 3, h), form).shape == (0, 3, h)
    many = _normal(2, CPU_FFT_BLOCK // h, h)  # more than one block, the last one short
    assert many.numel() > CPU_FFT_BLOCK
    assert _relative_error(dct(many, form), scipy.fft.dct(many.numpy(), norm="ortho")) < 1e-12
    assert _relative_error(idct(many, form), scipy.fft.idct(many.numpy(), norm="ortho")) < 1e-12


def test_nothing_is_saved_for_backward():
    saved = []
    x = _normal(4, 300).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        dct(x, "fft")
        idct(x, "gemm")
    assert saved == []


def test_matrix_is_orthogonal_and_usable_after_inference_mode():
    dct_matrix.cache_clear()
    with torch.inference_mode():
        dct(torch.ones(1, 12), "gemm")
        dct(torch.ones(1, 12), "fft")
    x = torch.ones(1, 12, requires_grad=True)
    for form in ("gemm", "fft"):
        dct(x, form).sum().backward()
    matrix = dct_matrix(1000, torch.float64, torch.device("cpu"))
    assert torch.allclose(matrix @ matrix.T, torch.eye(1000, dtype=torch.float64), atol=1e-13, rtol=0)


def test_form_is_chosen_by_length_and_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [resolve_form(h, cpu) for h in (64, 1024)] == ["gemm", "fft"]
    assert resolve_form(1024, cuda) == "gemm"
    assert resolve_form(64, cpu, "fft") == "fft"
    with pytest.raises(ValueError, match="'fast'"):
        dct(torch.ones(4), "fast")
