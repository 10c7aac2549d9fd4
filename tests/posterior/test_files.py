"""PosteriorSamples in files: resumed, interrupted, saved and loaded, damaged."""

import os
import random
import time
import warnings

import pytest
import torch
from torch import nn

from fekernels.posterior import store as _sample_store
from fekernels.posterior.samples import PosteriorSamples
from tests.support import fork_server
from tests.support.posterior_samples import Constant, counting, marks


@pytest.mark.parametrize("policy", ["fifo", "reservoir"])
def test_disk_resumes_as_if_it_had_not_stopped(tmp_path, policy):
    model, settings = Constant(0.0), {"burn_in": 2, "thinning": 2, "max_samples": 4, "policy": policy}
    counting(PosteriorSamples(model, directory=tmp_path / "a", **settings), model, 14)
    # The count of calls is as of the last sample, so stop at one.
    again = PosteriorSamples(model, directory=str(tmp_path / "a"), **settings)
    assert again.calls == 14 and len(again) == 4
    counting(again, model, 16, start=14)
    straight = counting(PosteriorSamples(model, **settings), model, 30)
    assert marks(again) == marks(straight)
    assert len(list((tmp_path / "a").iterdir())) == 4 + 1


@pytest.mark.parametrize("crash_at", ["sample", "index", "remove"])
def test_a_crash_leaves_a_consistent_set(tmp_path, monkeypatch, crash_at):
    model = Constant(0.0)
    samples = counting(PosteriorSamples(model, directory=tmp_path, max_samples=2), model, 3)
    real, store = _sample_store._rename_into_place, _sample_store.DiskStore

    def rename(temporary, path):
        if path.name.startswith("sample") == (crash_at == "sample"):
            raise KeyboardInterrupt
        real(temporary, path)

    if crash_at == "remove":
        monkeypatch.setattr(store, "_remove", lambda self, names: 1 / 0)
    else:
        monkeypatch.setattr(_sample_store, "_rename_into_place", rename)
    with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
        counting(samples, model, 1, start=3)
    monkeypatch.undo()
    again = PosteriorSamples(model, directory=tmp_path, max_samples=2)
    assert marks(again) == ([3, 4] if crash_at == "remove" else [2, 3])
    counting(again, model, 2, start=10)
    assert marks(again) == marks(PosteriorSamples(model, directory=tmp_path, max_samples=2)) == [11, 12]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors", ".safetensors"]


def test_save_and_load(tmp_path):
    model, other = Constant(0.0, 0.0), Constant(0.0, 0.0)
    samples = counting(PosteriorSamples(model, thinning=2), model, 25)
    samples.save(tmp_path / "all.safetensors")
    for target in (PosteriorSamples(other), PosteriorSamples(other, directory=tmp_path / "d")):
        counting(target, other, 2)
        assert target.load(tmp_path / "all.safetensors") is target
        assert marks(target) == list(range(2, 25, 2)) and target.calls == 25
    assert marks(PosteriorSamples(other, directory=tmp_path / "d")) == list(range(2, 25, 2))
    assert other.value[0].item() == 2.0
    PosteriorSamples(model).save(tmp_path / "none.safetensors")
    assert len(samples.load(tmp_path / "none.safetensors")) == 0


def two_chains(samples):
    """40 draws of each, which disagree."""
    g = torch.Generator().manual_seed(0)
    for draw in torch.randn(40, 2, 1, generator=g):
        for value in draw + torch.tensor([[-5.0], [5.0]]):
            samples.collect({"value": value})
    return samples


def test_samples_know_of_how_many_chains_they_are(tmp_path):
    kept = two_chains(PosteriorSamples(Constant(0.0), chains=2, directory=tmp_path / "d", max_samples=75))
    kept.save(tmp_path / "file")
    rhat = kept.diagnostics().rhat_max
    assert rhat > 1.5
    for chains in (None, 2):
        again = PosteriorSamples(Constant(0.0), chains=chains, directory=tmp_path / "d")
        loaded = PosteriorSamples(Constant(0.0), chains=chains).load(tmp_path / "file")
        for samples in (again, loaded):
            assert samples.chains == 2 and samples.diagnostics().rhat_max == rhat
    again.collect()
    assert PosteriorSamples(Constant(0.0), directory=tmp_path / "d").chains == 2
    three = two_chains(PosteriorSamples(Constant(0.0), chains=3))
    with pytest.raises(
        ValueError, match=r"chains must be 2, of which the samples in .*d are, or None; got 3"
    ):
        PosteriorSamples(Constant(0.0), chains=3, directory=tmp_path / "d")
    with pytest.raises(ValueError, match=r"chains must be 2, of which the samples in .*file are, .*; got 3"):
        three.load(tmp_path / "file")
    assert three.chains == 3 and len(three) == 80


@pytest.mark.parametrize("chains", [None, 2])
def test_samples_of_earlier_releases_know_no_chains(tmp_path, monkeypatch, chains):
    """They are of one, unless it is said otherwise."""
    monkeypatch.setattr(PosteriorSamples, "_counts", lambda self: {"calls": self.calls, "seen": self.seen})
    kept = two_chains(PosteriorSamples(Constant(0.0), directory=tmp_path / "d"))
    kept.save(tmp_path / "file")
    monkeypatch.undo()
    assert "chains" not in (tmp_path / "d" / "index.json").read_text()
    for samples in (
        PosteriorSamples(Constant(0.0), chains=chains, directory=tmp_path / "d"),
        PosteriorSamples(Constant(0.0), chains=chains).load(tmp_path / "file"),
    ):
        assert samples.chains == (chains or 1) and len(samples) == 80
    again = PosteriorSamples(Constant(0.0), chains=chains, directory=tmp_path / "d")
    again.collect()
    assert PosteriorSamples(Constant(0.0), directory=tmp_path / "d").chains == (chains or 1)


def test_no_samples_are_of_no_chains(tmp_path):
    two_chains(PosteriorSamples(Constant(0.0), chains=2, directory=tmp_path))
    index = tmp_path / "index.json"
    index.write_text(index.read_text().replace('"chains": 2', '"chains": 0'))
    with pytest.raises(ValueError, match="must be an index of samples; got .*80 samples of 0 chains"):
        PosteriorSamples(Constant(0.0), directory=tmp_path)


@pytest.mark.parametrize("path", [None, 3, torch.zeros(1)])
def test_a_path_is_a_path(path):
    samples = PosteriorSamples(Constant(0.0))
    for method in ("save", "load"):
        kind = type(path).__name__
        with pytest.raises(TypeError, match=f"^PosteriorSamples.{method}: path must be a path; got {kind}"):
            getattr(samples, method)(path)


def test_a_file_is_saved_where_one_can_be(tmp_path):
    samples = PosteriorSamples(Constant(0.0))
    missing = tmp_path / "nowhere" / "x"
    with pytest.raises(
        ValueError, match="^PosteriorSamples.save: path must .* directory does not exist"
    ) as error:
        samples.save(missing)
    assert str(missing) in str(error.value) and not missing.parent.exists()
    with pytest.raises(ValueError, match="^PosteriorSamples.save: path must be a file's .*; got a directory"):
        samples.save(tmp_path)


def test_low_precision_and_strides_survive_the_disk(tmp_path):
    model = nn.Conv2d(2, 3, 3).to(torch.bfloat16).to(memory_format=torch.channels_last)
    samples = PosteriorSamples(model, directory=tmp_path)
    samples.collect()
    assert samples[0]["weight"].dtype == torch.bfloat16
    assert torch.equal(samples[0]["weight"], model.weight)


def test_another_model_is_refused(tmp_path):
    samples = PosteriorSamples(nn.Linear(2, 3), directory=tmp_path / "d")
    samples.collect()
    samples.save(tmp_path / "file")
    message = r"names and shapes of .*'weight' of \[3, 2\]; got \[3, 4\]"
    with pytest.raises(ValueError, match=message):
        PosteriorSamples(nn.Linear(4, 3), directory=tmp_path / "d")
    with pytest.raises(ValueError, match=message):
        PosteriorSamples(nn.Linear(4, 3)).load(tmp_path / "file")
    with pytest.raises(ValueError, match=r"'bias' of \[3\]; got None"):
        PosteriorSamples(nn.Linear(2, 3, bias=False)).load(tmp_path / "file")


def test_damage_is_reported(tmp_path):
    model = Constant(0.0)
    counting(PosteriorSamples(model, directory=tmp_path), model, 3)
    with pytest.raises(ValueError, match="max_samples must be at least 3.*got 2"):
        PosteriorSamples(model, directory=tmp_path, max_samples=2)
    victim = random.Random(0).choice(sorted(tmp_path.glob("*.safetensors")))
    victim.unlink()
    with pytest.raises(ValueError, match=f"all files of its index; got no {victim.name}"):
        PosteriorSamples(model, directory=tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="must be an index of samples"):
        PosteriorSamples(model, directory=tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match="must have an index.json beside its samples; got none"):
        PosteriorSamples(model, directory=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="must be a file of PosteriorSamples.save"):
        PosteriorSamples(model).load(next(tmp_path.iterdir()))
    with pytest.raises(ValueError, match="path must be a file; got"):
        PosteriorSamples(model).load(tmp_path)


# Stops where a snapshot is complete but not yet in its place.
HALF_A_SAVE = """
import time
import torch
from fekernels.posterior import store
from fekernels.posterior.samples import PosteriorSamples

write, count = store._rename_into_place, 0

def stop(temporary, path):
    global count
    if count == AT:
        print("writing", flush=True)
        time.sleep(600)
    count += 1
    write(temporary, path)

samples = PosteriorSamples(torch.nn.Linear(100, 100), directory=DIRECTORY)
store._rename_into_place = stop
samples.collect()
"""


@pytest.mark.parametrize("at", [0, 1, 2], ids=["first index", "sample", "index"])
def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path, at):
    writer = fork_server.Child(f"DIRECTORY, AT = {str(tmp_path)!r}, {at!r}\n{HALF_A_SAVE}", os.environ)
    try:
        while writer.poll() is None and not writer.said()[0]:
            time.sleep(0.02)
        assert writer.said() == ("writing\n", "")
        written = sorted(tmp_path.rglob("*"))
        assert any(path.is_file() and path.parent != tmp_path for path in written)
        PosteriorSamples(nn.Linear(100, 100), directory=tmp_path)
        PosteriorSamples(Constant(0.0)).save(tmp_path / "other")
        assert sorted(tmp_path.rglob("*")) == sorted([*written, tmp_path / "other"])
    finally:
        writer.kill()
        writer.communicate()
    (tmp_path / "other").unlink()
    PosteriorSamples(nn.Linear(100, 100), directory=tmp_path).collect()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["index.json", "sample-00000000.safetensors"]


def test_temporary_files_of_earlier_releases_go_once_nobody_writes_them(tmp_path):
    names = [".tmpCouJ0k", ".sample-00000003.safetensors.tmp", ".index.json.tmp"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".kept").touch()
    PosteriorSamples(Constant(0.0), directory=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    PosteriorSamples(Constant(0.0), directory=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".kept"]


def test_an_abandoned_file_of_save_goes_with_the_next_save(tmp_path):
    left = tmp_path / ".fekernels-writing-abandoned"
    left.mkdir()
    (left / "all.safetensors").touch()
    PosteriorSamples(Constant(0.0)).save(tmp_path / "all.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["all.safetensors"]


def test_a_second_run_into_a_directory_is_told_that_nothing_is_kept(tmp_path):
    model = Constant(0.0)

    def run(steps):
        samples = PosteriorSamples(model, burn_in=4, thinning=2, directory=tmp_path)
        return samples, [samples.update(step=step) for step in steps]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(range(1, 13))
        run(range(13, 15))  # goes on
        run(())  # only reads
    assert not caught
    told = "nothing is kept before step 15, as the 5 .* up to 14; got step 1. .* needs a new, empty directory"
    with pytest.warns(UserWarning, match=told) as caught:
        samples, kept = run(range(1, 17))
    assert len(caught) == 1 and caught[0].filename == __file__
    assert kept == [False] * 15 + [True] and len(samples) == 6


def test_a_run_that_goes_on_from_an_older_checkpoint_is_told_calmly_and_after_torchrun_nothing(
    tmp_path, monkeypatch
):
    def run(steps):
        samples = PosteriorSamples(Constant(0.0), thinning=2, directory=tmp_path)
        return [samples.update(step=step) for step in steps]

    run(range(1, 9))
    calmly = (
        "goes on at step 5; the 4 samples .* up to 8, which are not kept twice. .A new run needs a new, empty"
    )
    with pytest.warns(UserWarning, match=calmly) as caught:
        assert run(range(5, 11)) == [False] * 5 + [True]
    assert len(caught) == 1 and caught[0].filename == __file__
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(range(1, 13)) == [False] * 11 + [True]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.warns(UserWarning, match="nothing is kept before step 13"):
        run((1,))
