"""The fused spectral kernels under Triton's interpreter, against float64 by scipy and the plain operators."""

import math
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch

pytest.importorskip("triton")

from chiar_megatron.operators import spectral_mixing as plain
from chiar_megatron.operators.kernels import spectral
from chiar_megatron.operators.kernels.spectral_tables import tables_of

# Powers of two and padded tiles, square and oblong, and the smallest.
WIDTHS = [14, 64, 96, 256, 768, 1000, 1024, 2048]
# Rounding of bfloat16, of inputs as of intermediates, relative to the largest value.
TOLERANCE = {"ieee": 1e-5, "bf16": 2e-2}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def entropy_by_scipy(x: torch.Tensor, dc_power_weight: float = 1.0) -> np.ndarray:
    power = scipy.fft.dct(x.double().numpy(), norm="ortho") ** 2
    power[..., 0] *= dc_power_weight
    return scipy.stats.entropy(power, axis=-1, base=x.shape[-1])


def mixing_in_float64(
    x: torch.Tensor, w: torch.Tensor, grad: torch.Tensor, rows: torch.Tensor
) -> list[torch.Tensor]:
    """y and the gradients to x and w, if only `rows` are transformed and the others are 0."""
    x, w = (t.detach().double().requires_grad_() for t in (x, w))
    y = torch.zeros_like(x).index_copy(0, rows.long(), plain.spectral_mixing(x[rows.long()], w))
    y.backward(grad.double())
    return [y.detach(), x.grad, w.grad]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    assert actual.shape == expected.shape
    assert (actual.detach().double() - expected).abs().sum().isfinite()
    assert not expected.numel() or (actual.detach().double() - expected).abs().max() < tolerance * scale


def test_factorisation_is_balanced_and_refuses_what_has_none():
    factors = {h: spectral.factorisation(h) for h in (2, 64, 96, 768, 1000, 1024, 2048, 4096)}
    assert factors == {
        2: (1, 2), 64: (8, 8), 96: (8, 12), 768: (24, 32), 1000: (25, 40), 1024: (32, 32), 2048: (32, 64),
        4096: (64, 64),
    }  # fmt: skip
    assert [spectral.factorisation(h) for h in (1, 3, 997, 2 * 67, 8192)] == [None] * 5
    with pytest.raises(ValueError, match="hidden size 997"):
        spectral.spectral_entropy(normal(2, 997))
    with pytest.raises(ValueError, match="fp8"):
        spectral.spectral_entropy(normal(2, 64), precision="fp8")


@pytest.mark.parametrize("h", WIDTHS)
def test_every_coefficient_has_one_place(h):
    k = tables_of(h, torch.float32, torch.device("cpu")).k
    assert k[k >= 0].sort().values.tolist() == list(range(h))


@pytest.mark.parametrize("h", WIDTHS)
def test_all_at_once_in_float32_agrees_with_float64(h):
    x, w, grad = normal(6, h), normal(h, seed=1), normal(6, h, seed=2)
    x[4] = 1.0 + 1e-3 * x[4]
    x.requires_grad_(), w.requires_grad_()
    entropy, y = spectral.entropy_and_mixing(x, w, 2.0, "ieee")
    y.backward(grad)
    assert not entropy.requires_grad and entropy.dtype == torch.float32
    assert np.abs(entropy.numpy() - entropy_by_scipy(x.detach(), 2.0)).max() < 3e-6
    for actual, expected in zip(
        [y, x.grad, w.grad], mixing_in_float64(x, w, grad, torch.arange(6)), strict=True
    ):
        assert_close(actual, expected, 1e-5)
    alone = spectral.spectral_entropy(x, 2.0, "ieee"), spectral.spectral_mixing(x, w, precision="ieee")
    assert torch.equal(alone[0], entropy) and torch.equal(alone[1], y)


@pytest.mark.parametrize("precision", ["bf16", "ieee"])
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("h", [96, 1000, 1024])
def test_any_number_of_rows_dark_light_or_mixed(h, n, precision):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Rows lie apart in memory, and those between are not to be touched.
    wide = normal(n, h + 16, dtype=dtype).requires_grad_()
    w, grad = normal(h, seed=1).requires_grad_(), normal(n, h, dtype=dtype, seed=2)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(torch.int32)
    for count in sorted({0, n // 3, n}):
        wide.grad = w.grad = None
        x = wide[:, :h]
        dark = order[:count]
        light = torch.ones(n, dtype=torch.bool).index_fill(0, dark.long(), False)
        subset = spectral.Subset(order, torch.tensor([count], dtype=torch.int32), ~light)
        y = spectral.spectral_mixing(x, w, subset, precision)
        assert y.dtype == dtype
        y.backward(grad)
        expected = mixing_in_float64(x, w, grad, dark)
        for actual, right in zip([y, wide.grad[:, :h], w.grad], expected, strict=True):
            assert_close(actual, right, TOLERANCE[precision])
        assert not y[light].any() and not wide.grad[light].any() and not wide.grad[:, h:].any()
    if n:
        entropy = spectral.spectral_entropy(wide.detach()[:, :h], 1.0, precision).numpy()
        error = np.abs(entropy - entropy_by_scipy(wide.detach()[:, :h]))
        assert error.max() < (3e-6 if precision == "ieee" else 1e-3)


@pytest.mark.parametrize("precision", ["bf16", "ieee"])
def test_entropy_at_its_limits(precision):
    h = 1024
    x = normal(8, h)
    x[1] = 0
    x[2] = torch.cos(math.pi * (torch.arange(h) + 0.5) * 77 / h)
    x[3] = 3.0
    x[4, 5] = math.nan
    x[5], x[6] = x[0] * 1e-18, x[0] * 1e18
    # The transform of an impulse at the end of a flat spectrum: close to 1.
    x[7] = torch.from_numpy(scipy.fft.idct(np.ones(h), norm="ortho")).float()
    entropy = spectral.spectral_entropy(x, 1.0, precision)
    tolerance = 3e-6 if precision == "ieee" else 2e-3
    assert entropy[1] == 0 and entropy[4].isnan() and entropy.isnan().sum() == 1
    assert abs(entropy[2]) < tolerance and abs(entropy[3]) < tolerance
    assert abs(entropy[7] - 1) < tolerance and entropy[7] <= 1
    assert (entropy[5:7] - entropy[0]).abs().max() < tolerance / 10
    assert spectral.spectral_entropy(x[3:4], 0.0, precision).item() <= 1


def test_bfloat16_entropy_puts_nearly_all_tokens_on_the_right_side_of_the_median():
    x = normal(2000, 1024, dtype=torch.bfloat16)
    expected = entropy_by_scipy(x)
    entropy = spectral.spectral_entropy(x).double().numpy()
    assert ((entropy > np.median(expected)) == (expected > np.median(expected))).mean() >= 0.99


def test_any_number_of_programs_and_an_expanded_gradient(monkeypatch):
    x, w = normal(37, 96).requires_grad_(), normal(96, seed=1).requires_grad_()
    y = spectral.spectral_mixing(x, w, precision="ieee")
    y.sum().backward()  # its gradient has stride 0
    expected = mixing_in_float64(x, w, torch.ones(37, 96), torch.arange(37))
    for actual, right in zip([y, x.grad, w.grad], expected, strict=True):
        assert_close(actual, right, 1e-5)
    for programs in (1, 5, 64):
        monkeypatch.setattr(spectral, "INTERPRETED_PROGRAMS", programs)
        again = [z.detach().requires_grad_() for z in (x, w)]
        shared = spectral.spectral_mixing(*again, precision="ieee")
        shared.sum().backward()
        for actual, right in zip([shared, *(z.grad for z in again)], expected, strict=True):
            assert_close(actual, right, 1e-5)


def test_wide_tokens_take_a_launch_of_their_own():
    swept, wide = (spectral._tuning("mixing_subset", spectral.dims_of(h)) for h in (1024, 4096))
    assert swept == spectral.DEFAULTS["mixing_subset"] and wide == swept._replace(warps=4, registers=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_are_well_formed(dtype):
    """Schemas, fake tensors and autograd, as torch.compile relies on them."""
    x, w = normal(5, 96, dtype=dtype).requires_grad_(), normal(96, seed=1).requires_grad_()
    # All rows, since what is not in the subset is not written.
    rows = torch.tensor([4, 1, 0, 2, 3], dtype=torch.int32)
    count, chosen = torch.tensor([5], dtype=torch.int32), torch.ones(5, dtype=torch.bool)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, arguments in [
        (torch.ops.chiar.spectral_entropy, (x.detach(), 1.0, "ieee", None)),
        (torch.ops.chiar.spectral_mixing, (x, w, rows, count, chosen, "ieee", None)),
        (torch.ops.chiar.entropy_and_mixing, (x, w, 1.0, "ieee", None)),
        (
            torch.ops.chiar.spectral_mixing_backward,
            (x.detach(), x.detach(), w.detach(), *(None,) * 2, "ieee", None),
        ),
    ]:
        results = torch.library.opcheck(op, arguments, test_utils=checks)
        assert set(results.values()) == {"SUCCESS"}
