"""sample_posterior(directory=) that is started again, after it was killed or has finished: the same samples."""

import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fekernels as fe
from fekernels.posterior import PosteriorRun
from fekernels.posterior import run as posterior_run
from tests.support import fork_server

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))


def loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch[:, :1].sin()).square().mean() / 2


def run(directory: Path | None, **changes: Any) -> PosteriorRun:
    options: dict[str, Any] = {
        "model": network(), "loader": list(X.split(12)), "data_size": 48, "prior_precision": 1.0, "chains": 4,
        "samples": 4, "burn_in": 10, "thinning": 1, "seed": 1,
    }  # fmt: skip
    with mock.patch.object(
        posterior_run, "TRAIN_STEPS", 20
    ):  # most of the time of a run, whose files are looked at
        return fe.sample_posterior(
            loss_fn=loss, directory=directory, progress=False, **{**options, **changes}
        )


# Ends, as by the system's out-of-memory killer, when file number AT is about to be renamed into its place, or after.
KILLED = """
import os, signal
from pathlib import Path
from fekernels.posterior import store
from tests.posterior.test_restarted_runs import run

rename, count = store._rename_into_place, 0

def killed(temporary, path):
    global count
    if count == AT and not AFTER:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(temporary, path)
    if count == AT:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1

store._rename_into_place = killed
run(Path(DIRECTORY))
"""


def kill(directory: Path, at: int, after: bool = False) -> None:
    done = fork_server.run(f"DIRECTORY, AT, AFTER = {str(directory)!r}, {at}, {after}\n{KILLED}")
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Tensor]]:
    return list(run(None).samples)


def check(result: PosteriorRun, expected: list[dict[str, Tensor]], directory: Path) -> None:
    for samples in (result.samples, fe.PosteriorSamples(network(), directory=directory)):
        assert len(samples) == samples.seen == len(expected) == 16
        for sample, other in zip(samples, expected, strict=True):
            assert all(torch.equal(sample[name], value) for name, value in other.items())
    assert len(list(directory.iterdir())) == 16 + 1


@pytest.mark.parametrize(
    ("at", "after"), [(0, False), (0, True), (1, True), (2, True), (9, False), (17, False), (17, True)]
)
def test_a_killed_run_is_started_again_to_the_same_samples(
    tmp_path: Path, expected: list[dict[str, Tensor]], at: int, after: bool
) -> None:
    """Killed before the first index, between it and a sample, between samples, before the last index and after it."""
    kill(tmp_path, at, after)
    assert len(fe.PosteriorSamples(network(), directory=tmp_path)) == (16 if (at, after) == (17, True) else 0)
    check(run(tmp_path), expected, tmp_path)


def test_a_finished_run_is_whole_while_it_is_made_again(
    tmp_path: Path, expected: list[dict[str, Tensor]]
) -> None:
    finished = run(tmp_path)
    kill(tmp_path, 5)
    assert len(finished.samples) == len(fe.PosteriorSamples(network(), directory=tmp_path)) == 16
    kill(tmp_path, 16, after=True)  # with the new samples in the index, and the old ones beside them
    again = run(tmp_path)
    check(again, expected, tmp_path)
    assert torch.equal(again.report.trace, finished.report.trace)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "another seed: 1 there, 2 here"),
        ({"samples": 5}, "another samples: 4 there, 5 here"),
        ({"prior_precision": 1.5}, "another prior_precision: 1 there, 1.5 here"),
        ({"data_size": 96}, "another data_size: 48 there, 96 here"),
        ({"model": network(1)}, "another model: "),
        ({"loader": list(X.split(24))}, "another the number of batches of loader: 4 there, 2 here"),
        ({"loader": list((X + 1).split(12))}, "another what loader gives: "),
    ],
)
def test_samples_of_another_run_are_kept_and_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    told = f"directory must hold no samples but those of this very run; got {tmp_path} with 16 that have {message}"
    with pytest.raises(ValueError, match=f"sample_posterior: {told}"):
        run(tmp_path, **changes)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_samples_that_were_collected_are_no_runs(tmp_path: Path, expected: list[dict[str, Tensor]]) -> None:
    samples = fe.PosteriorSamples(network(), directory=tmp_path / "own", chains=4)
    samples.collect()
    with pytest.raises(ValueError, match="with 1 that were collected otherwise"):
        run(tmp_path / "own")
    finished = run(tmp_path / "run").samples
    finished.refresh_statistics(list(X.split(12)))  # leaves what they are of
    check(run(tmp_path / "run"), expected, tmp_path / "run")
    fe.PosteriorSamples(network(), directory=tmp_path / "run").collect()
    with pytest.raises(ValueError, match="with 17 that were collected otherwise"):
        run(tmp_path / "run")


def test_random_data_are_compared_by_their_number(tmp_path: Path) -> None:
    class Crops:
        def __iter__(self) -> Any:
            return iter([part + torch.rand(()) for part in X.split(12)])

    assert len(run(tmp_path, loader=Crops()).samples) == len(run(tmp_path, loader=Crops()).samples) == 16


def test_one_killed_while_it_reads_many_samples_from_a_file(tmp_path: Path) -> None:
    """``load`` into a new directory writes as many files before the index that names them."""
    run(None).samples.save(tmp_path / "all")
    done = fork_server.run(
        f"DIRECTORY, AT, AFTER = {str(tmp_path / 'own')!r}, 5, False\n"
        + KILLED.replace(
            "run(Path(DIRECTORY))",
            "import fekernels as fe\nfrom tests.posterior.test_restarted_runs import network\n"
            f"fe.PosteriorSamples(network(), directory=DIRECTORY).load({str(tmp_path / 'all')!r})",
        )
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(fe.PosteriorSamples(network(), directory=tmp_path / "own").load(tmp_path / "all")) == 16
    assert len(list((tmp_path / "own").iterdir())) == 17
