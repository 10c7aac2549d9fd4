"""Rank-normalised split R-hat and effective sample sizes: ArviZ's numbers, exact cases, blocks of weights, errors."""

import math

import numpy as np
import pytest
import torch

import fekernels as fe
from fekernels._runtime import backends
from fekernels.reference.diagnostics import chain_statistics as reference

SHAPES = ((1, 4), (2, 4), (2, 5), (4, 7), (4, 11), (8, 10), (3, 100), (4, 501))
KINDS = {
    "independent": (0.0, 0.0),
    "sticky": (0.95, 0.0),
    "alternating": (-0.7, 0.0),
    "apart": (0.3, 2.0),
}


def autoregressive(shape: tuple[int, int], phi: float, apart: float, weights: int = 3) -> torch.Tensor:
    """[chains, draws, weights]: chains of a known autocorrelation, their means `apart` from each other."""
    noise = torch.randn(*shape, weights, dtype=torch.float64)
    draws = [noise[:, 0]]
    for i in range(1, shape[1]):
        draws.append(phi * draws[-1] + math.sqrt(1 - phi**2) * noise[:, i])
    return torch.stack(draws, 1) + apart * torch.arange(shape[0])[:, None, None]


@pytest.mark.parametrize("rounded", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.filterwarnings("ignore:.*scalar divide")
def test_numbers_are_those_of_arviz(shape: tuple[int, int], kind: str, rounded: bool) -> None:
    arviz = pytest.importorskip(
        "arviz_stats.base", reason="needs the package arviz-stats, which is not installed"
    )
    draws = autoregressive(shape, *KINDS[kind])
    if rounded:
        draws = draws.round()
    axes = dict(chain_axis=0, draw_axis=1)
    theirs = {
        "bulk": arviz.array_stats.ess(draws.numpy(), method="bulk", **axes),
        "tail": arviz.array_stats.ess(draws.numpy(), method="tail", prob=(0.05, 0.95), **axes),
        "rhat": arviz.array_stats.rhat(draws.numpy(), method="rank", **axes),
    }
    ours = {kind: fe.diagnostics.effective_sample_size(draws, kind) for kind in ("bulk", "tail")}
    if shape[0] > 1:  # of one chain it has none
        ours["rhat"] = fe.diagnostics.split_rhat(draws)
    for name, found in ours.items():
        np.testing.assert_allclose(found.numpy(), theirs[name], rtol=1e-9, err_msg=name)


def test_known_numbers_of_draws() -> None:
    """An AR(1) chain is worth (1 - phi) / (1 + phi) of its draws, within the 5 standard errors of its estimate."""
    for phi in (0.0, 0.5, 0.9):
        draws = autoregressive((4, 5000), phi, 0.0, weights=40)
        found = fe.diagnostics.effective_sample_size(draws).mean().item() / 20_000
        assert found == pytest.approx((1 - phi) / (1 + phi), rel=0.05)
        assert 1.0 <= fe.diagnostics.split_rhat(draws).median().item() < 1.01


def test_chains_that_disagree_show() -> None:
    """In their means, and in their spreads alone, of which only the folded draws know."""
    draws = torch.randn(4, 400, 2, dtype=torch.float64)
    draws[:2, :, 0] += 3.0
    draws[:2, :, 1] *= 5.0
    rhat = fe.diagnostics.split_rhat(draws)
    assert (rhat > 1.2).all()
    assert fe.diagnostics.effective_sample_size(draws)[0].item() < 20
    trend = torch.randn(1, 400) + torch.linspace(0, 4, 400)  # of one chain, against itself
    assert fe.diagnostics.split_rhat(trend).item() > 1.2


def test_many_weights_are_the_single_ones_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.randn(3, 20, 4, 5)
    measures = [fe.diagnostics.split_rhat, fe.diagnostics.effective_sample_size]
    measures.append(lambda x: fe.diagnostics.effective_sample_size(x, "tail"))
    for measure in measures:
        whole = measure(draws)
        assert whole.shape == (4, 5) and whole.dtype == torch.float64
        assert torch.equal(whole[1, 2], measure(draws[:, :, 1, 2]))
        monkeypatch.setattr(reference, "BLOCK", 3 * 20 * 7)
        assert torch.equal(measure(draws), whole)
        monkeypatch.undo()
        assert torch.equal(measure(draws.numpy()), whole)
        assert measure(draws[..., :0]).shape == (4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (1, 5), (2, 7), (3, 50), (4, 101), (2, 2000)], ids=str)
def test_the_kernel_has_the_references_numbers(shape: tuple[int, int], dtype: torch.dtype) -> None:
    if backends.choose("cpu") != "cpp":
        pytest.skip("no compiled kernels")
    kinds = [autoregressive(shape, *kind, weights=5) for kind in KINDS.values()]
    kinds += [kinds[0].round(), (kinds[0] > 1).double(), kinds[0] * 0 + 3, -kinds[0].sign() * 0]
    draws = torch.cat(kinds, -1).to(dtype)
    draws[0, 2, 0] = math.nan
    native = fe.diagnostics.chain_statistics(draws)
    with fe.use_backend("reference"):
        plain = fe.diagnostics.chain_statistics(draws)
    for ours, theirs in zip(native, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0, equal_nan=True)
    separate = [fe.diagnostics.split_rhat(draws)]
    separate += [fe.diagnostics.effective_sample_size(draws, kind) for kind in ("bulk", "tail")]
    for together, alone in zip(native, separate, strict=True):
        torch.testing.assert_close(together, alone, rtol=0, atol=0, equal_nan=True)


def test_draws_that_say_nothing() -> None:
    draws = torch.randn(2, 10, 4)
    draws[1, 3, 0], draws[0, 0, 1] = math.nan, math.inf
    draws[..., 2] = 7.0
    size, tail = (fe.diagnostics.effective_sample_size(draws, kind) for kind in ("bulk", "tail"))
    for found in (fe.diagnostics.split_rhat(draws), size, tail):
        assert found[:2].isnan().all() and found[3].isfinite()
    assert fe.diagnostics.split_rhat(draws)[2].isnan() and size[2].item() == tail[2].item() == 20


@pytest.mark.parametrize("shape", [(), (10,), (2, 3), (0, 10), (2, 0, 5)], ids=str)
def test_too_few_draws(shape: tuple[int, ...]) -> None:
    message = r"draws must have shape \(chains, draws, \.\.\.\) with at least 4 draws; got \("
    for measure in (fe.diagnostics.split_rhat, fe.diagnostics.effective_sample_size):
        with pytest.raises(ValueError, match=f"{measure.__name__}: {message}"):
            measure(torch.zeros(shape))


def test_other_arguments() -> None:
    with pytest.raises(ValueError, match="effective_sample_size: kind must be one of bulk, tail; got 'mean'"):
        fe.diagnostics.effective_sample_size(torch.zeros(2, 10), "mean")  # type: ignore[arg-type]
    for dtype in (torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"split_rhat: draws must be real numbers; got {dtype}"):
            fe.diagnostics.split_rhat(torch.zeros(2, 10, dtype=dtype))
