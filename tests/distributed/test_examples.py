"""The examples for several processes: by torchrun, as users launch them, or as torchrun launches its ranks."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support import ROOT
from tests.support.fork_server import Child
from tests.support.pages import blocks

EXAMPLES = ROOT / "docs" / "examples"
TRAINERS = sorted(EXAMPLES.glob("trainer_*.py"))
LIMIT = 400.0  # seconds, of what takes ten on an idle machine


def torchrun(folder: Path, *command: str, world: int = 2, **variables: str) -> str:
    """What the ranks print; AssertionError with it where one fails or all take too long."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    process = subprocess.Popen(
        [sys.executable, *launch, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group of its own, to end all of it
    )
    try:
        printed, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        raise AssertionError(f"{' '.join(command)}: no end after {LIMIT:g} s\n{printed}") from None
    assert process.returncode == 0, f"{' '.join(command)}: exit code {process.returncode}\n{printed}"
    return printed


# What torchrun tells every rank, of which scripts and torch read their place; the agent keeps the store.
OF_THE_LAUNCH = {"LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
                 "TORCHELASTIC_USE_AGENT_STORE", "WORLD_SIZE"}  # fmt: skip
OF_A_RANK = {"LOCAL_RANK", "RANK"}


def ranks(folder: Path, *command: str, world: int = 2, imported: tuple[str, ...] = ()) -> str:
    """As `torchrun`, from a process that has imported torch, which the launcher and each rank do anew.

    Args:
        imported: what one process imports before the ranks are forked from it, for all of them.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    values = dict.fromkeys(OF_THE_LAUNCH, str(world)) | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    code = (
        f"import os, torch; os.chdir({str(folder)!r}); torch.set_num_threads(1)\n"
        f"from tests.support import run_scripts\n"
        f"run_scripts.ranks({world}, {sorted(OF_A_RANK)!r}, {imported!r}, {int(LIMIT)}, {command!r})"
    )
    child = Child(code, {**os.environ, **values})
    printed = "\n".join(child.communicate(LIMIT + 60))  # the ranks end before
    assert child.poll() == 0, f"{' '.join(command)}: exit code {child.poll()}\n{printed}"
    return printed


SAID = {
    "distributed_particles": ("2 processes, ", "every bit of every particle is the same"),
    "distributed_posterior": ("mutual information",),
    "distributed_training": ("2 ranks, ",),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("distributed_*.py")), ids=lambda path: path.stem)
def test_two_ranks(script: Path, tmp_path: Path) -> None:
    for package in re.findall(r"^(?:from|import) (sklearn|matplotlib)\b", script.read_text(), re.MULTILINE):
        pytest.importorskip(package)
    if script.stem == "distributed_particles":  # the quickest, so that torchrun itself starts one
        printed = torchrun(tmp_path, "-m", "tests.support.run_scripts", str(tmp_path), str(script))
        assert OF_THE_LAUNCH | OF_A_RANK <= set(re.findall(r"^variable (\w+)$", printed, re.MULTILINE))
    else:
        printed = ranks(tmp_path, str(tmp_path), str(script))
    for said in SAID[script.stem]:
        assert printed.count(said) == 1, said


@pytest.mark.slow
def test_torchrun_starts_all_ranks_again_where_one_was_killed(tmp_path: Path) -> None:
    """From the last whole checkpoint, by the path of a run that nothing happened to."""
    pytest.importorskip("sklearn")
    script = str(ROOT / "tests" / "distributed" / "restart_ranks.py")
    # As the page says, or ranks that are started again look for those that have ended.
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    printed = torchrun(tmp_path, "--max-restarts", "1", script, "--folder", str(tmp_path), **own_store)
    assert re.findall(r"^attempt .*$", printed, re.MULTILINE) == [
        "attempt 0, killed: from step 0, 0 counted",
        "attempt 1, killed: from step 4, 8 counted",
        "attempt 1, whole: from step 0, 0 counted",
    ]
    for rank in (0, 1):
        assert f"rank {rank}: 13 tensors are equal to the bit: True" in printed
    assert "PosteriorSamples" not in printed  # no rank warns of samples that are there already


def losses(printed: str) -> list[float]:
    return [float(value) for value in re.findall(r" (\d\.\d{4})", printed)]


@pytest.mark.slow
def test_trainers_on_one_process_and_on_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rows, the same noise, and so the same test losses but for the rounding of the gradients' sum."""
    for package in ("lightning", "accelerate", "transformers", "sklearn"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}, which is not installed")
    assert len(TRAINERS) == 3
    alone = {}
    for script in TRAINERS:
        monkeypatch.setattr(sys, "argv", [str(script), "--quick"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(script), run_name="__main__")
        alone[script.stem] = capsys.readouterr().out
        assert len(re.findall("equal to the bit: True", alone[script.stem])) == 2
    sharded = ROOT / "tests" / "distributed" / "model_parallel_ranks.py"
    together = ranks(
        tmp_path,
        str(tmp_path),
        *map(str, TRAINERS),
        str(sharded),
        imported=("lightning.pytorch", "accelerate", "transformers", "sklearn.datasets"),
    )
    for rank in (0, 1):
        assert f"sharded, 6 samples on rank {rank}: True" in together
    assert "refused: PosteriorSamples: process_group must be given for a model that is sharded" in together
    for rank in (0, 1):
        assert together.count(f"rank {rank} of 2: the resumed run's weights are equal to the bit: True") == 3
    assert len(losses(together)) == 8
    assert losses(together) == pytest.approx(
        [loss for script in TRAINERS for loss in losses(alone[script.stem])], abs=2e-3
    )


def test_the_page_shows_lines_of_the_examples() -> None:
    """Those of its section on trainers; a class in it is of a test."""
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    section = page.partition("\n## Trainers")[2].partition("\n## ")[0]
    shown = [block.code for block in blocks(section) if not block.code.startswith("class ")]
    names = re.findall(r"^\[.*\]\(examples/(trainer_\w+\.py)\).*:$", section, re.MULTILINE)
    assert len(shown) == len(names) == len(TRAINERS)
    for name, code in zip(names, shown, strict=True):
        written = {line.strip() for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()}
        assert {line.strip() for line in code.splitlines()} <= written, name
