"""Where `PosteriorSamples` keeps its samples: in memory, or as safetensors files with an index."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fekernels._runtime.ranks import has_ranks
from fekernels.posterior.scratch_files import locked, remove_abandoned, scratch_directory

Sample = dict[str, Tensor]
Counts = dict[str, int]
Stamp = tuple[int, int, int] | None
Run = (
    dict[str, Any] | None
)  # what a run was given whose samples these are; None of samples that were collected

FORMAT = 1
INDEX = "index.json"
# What releases up to 0.1 (and safetensors for them) left of a killed process, beside the samples and with no lock. A
# writer touches its file all the time, so what has stood still for an hour has none.
EARLIER_TEMPORARIES = (".tmp??????", ".sample-*.safetensors.tmp", f".{INDEX}.tmp")
STILL_SECONDS = 3600
MADE_EARLY = (
    ". This one was made before there was a process group, when torch.distributed.group.WORLD is None"
)


def shapes(sample: Sample) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in sample.items()}


def place_of(directory: Any) -> Any:
    """The whole path of a directory, which may have been given relative to where a process is."""
    return os.path.abspath(directory) if isinstance(directory, (str, os.PathLike)) else directory


def counts_of(stored: dict[str, Any], samples: int) -> Counts:
    """What is written beside so many samples. Releases before 0.2 wrote no number of chains."""
    counts = {key: int(stored[key]) for key in ("calls", "seen")}
    if "chains" in stored:
        counts["chains"] = int(stored["chains"])
        if counts["chains"] < min(samples, 1):
            raise ValueError(f"{samples} samples of {counts['chains']} chains")
    return counts


def as_path(function: str, path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{function}: path must be a path; got {type(path).__name__}")
    return Path(path)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "PosteriorSamples: samples on disk need the safetensors package: pip install safetensors"
        ) from error
    return safetensors


def _rename_into_place(temporary: Path, path: Path) -> None:
    """Rename once the bytes are on the disk: a power cut leaves the old file or the new, never a half."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _save_tensors(path: Path, tensors: Sample, metadata: dict[str, str]) -> None:
    # safetensors stores no strides and refuses tensors that share memory.
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with scratch_directory(path.parent) as scratch:
        _safetensors().torch.save_file(ready, str(scratch / path.name), metadata=metadata)
        _rename_into_place(scratch / path.name, path)


def _save_sample(path: Path, sample: Sample) -> None:
    _save_tensors(path, sample, {"fekernels": f"posterior sample, format {FORMAT}"})


class MemoryStore:
    """Samples as copies on `device` (None: on the device they came from)."""

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._samples: list[Sample] = []
        self.counts: Counts = {"calls": 0, "seen": 0}
        self.run: Run = None

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    @property
    def shapes(self) -> dict[str, list[int]]:
        return shapes(self._samples[0]) if self._samples else {}

    def read(self, index: int) -> Sample:
        return dict(self._samples[index])

    def add(self, sample: Sample, drop: int | None, counts: Counts) -> None:
        copy = {
            n: v.to(v.device if self._device is None else self._device, copy=True) for n, v in sample.items()
        }
        if drop is not None:
            del self._samples[drop]
        self._samples.append(copy)
        self.counts = counts

    def note(self, counts: Counts) -> None:
        self.counts = counts

    def amend(self, index: int, changes: Sample) -> None:
        own = self._samples[index]
        self._samples[index] = {n: changes[n].to(v.device) if n in changes else v for n, v in own.items()}

    def replace_by_shards(self, own: dict[int, Sample], total: int, counts: Counts, run: Run) -> None:
        self.replace([own[index] for index in range(total)], counts)

    def replace(self, samples: list[Sample], counts: Counts) -> None:
        self._samples = []
        for sample in samples:
            self.add(sample, None, counts)
        self.counts = counts


class DiskStore:
    """One safetensors file per sample; `index.json` says which files count, in order.

    A change writes the new file, then the index, then removes what the index no longer names. A crash between
    two of these leaves a file that the index does not name; it is ignored, and removed by the next change. Before the
    first file there is an index that names none. What a killed process left half written is removed as soon as the
    directory is opened again. One object writes: where the index is no longer what this one has read or written last,
    a change raises, and nothing is overwritten.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: list[str] = []
        self._serial = 0
        self._known: Stamp = None
        self._tidy = False
        self._made_early = not has_ranks()
        self.shapes: dict[str, list[int]] = {}
        self.counts: Counts = {"calls": 0, "seen": 0}
        self.run: Run = None
        _safetensors()
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"PosteriorSamples: directory must be a directory; got the file {directory}")
        if (directory / INDEX).exists():
            self._read_index()
        elif len(list(directory.glob("sample-*.safetensors"))) > 1:
            raise ValueError(
                f"PosteriorSamples: {directory} must have an {INDEX} beside its samples; got none"
            )
        else:
            directory.mkdir(parents=True, exist_ok=True)
        self._remove_temporaries()

    def _remove_temporaries(self) -> None:
        remove_abandoned(self._directory)
        for pattern in EARLIER_TEMPORARIES:
            for path in self._directory.glob(pattern):
                with contextlib.suppress(OSError):  # another removes it too, or it may only be read
                    if time.time() - path.stat().st_mtime > STILL_SECONDS:
                        path.unlink()

    def _stamp(self) -> Stamp:
        """Of the index: a written one is always a new file."""
        try:
            found = (self._directory / INDEX).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """To change something in.

        Raises:
            RuntimeError: another has changed something since.
        """
        with locked(self._directory):
            if self._stamp() != self._known:
                raise RuntimeError(
                    f"PosteriorSamples: directory {self._directory} must have one writer; another process or object "
                    "has written to it since this one opened it. Under torch.distributed give every rank "
                    "process_group=torch.distributed.group.WORLD, of which one writes, or a directory of its own"
                    + (MADE_EARLY if self._made_early and has_ranks() else "")
                )
            yield

    def _read_index(self) -> None:
        path = self._directory / INDEX
        self._known = self._stamp()
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            version, self._files, self.shapes = index["format"], list(index["files"]), dict(index["shapes"])
            self._serial = int(index["serial"])
            self.run = None if index.get("run") is None else dict(index["run"])
            self.counts = counts_of(index["counts"], len(self._files))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"PosteriorSamples: {path} must be an index of samples; got {error!r}"
            ) from error
        if version != FORMAT:
            raise ValueError(f"PosteriorSamples: {path} must have format {FORMAT}; got {version!r}")
        missing = [name for name in self._files if not (self._directory / name).is_file()]
        if missing:
            raise ValueError(
                f"PosteriorSamples: {self._directory} must hold all files of its index; got no {missing[0]}"
            )

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(index) for index in range(len(self)))

    def read(self, index: int) -> Sample:
        return dict(_safetensors().torch.load_file(str(self._directory / self._files[index])))

    def add(self, sample: Sample, drop: int | None, counts: Counts) -> None:
        self._change([sample], [name for i, name in enumerate(self._files) if i != drop], counts)

    def note(self, counts: Counts) -> None:
        with self._alone():
            self._write_index(self._files, self._serial, self.shapes, counts)

    def replace_by_shards(self, own: dict[int, Sample], total: int, counts: Counts, run: Run) -> None:
        """By samples by their indices among ``total`` new ones: all of them."""
        self._change([own[index] for index in range(total)], [], counts, run)

    def replace(self, samples: list[Sample], counts: Counts) -> None:
        self._change(samples, [], counts)

    def amend(self, index: int, changes: Sample) -> None:
        """Put `changes` into sample `index`: a new file in its place."""
        with self._alone():
            name, files = f"sample-{self._serial:08d}.safetensors", list(self._files)
            _save_sample(self._directory / name, {**self.read(index), **changes})
            files[index], before = name, files[index]
            self._write_index(files, self._serial + 1, self.shapes, self.counts, self.run)
            self._remove({before})

    def _change(self, new: list[Sample], kept: list[str], counts: Counts, run: Run = None) -> None:
        with self._alone():
            self._begin()
            files, before = list(kept), self._files
            for offset, sample in enumerate(new):
                files.append(self._write(offset, sample))
            self._write_index(files, self._serial + len(new), shapes(new[0]) if new else {}, counts, run)
            self._remove(set(before) - set(files))

    def _begin(self) -> None:
        """Before files are written: no strays, and an index, without which those of a killed process were taken for
        samples that have lost theirs."""
        if not self._tidy:
            # Only a writer may tidy: a reader could delete the file that a running sampler is about to index.
            strays = {path.name for path in self._directory.glob("sample-*.safetensors")} - set(self._files)
            self._remove(strays)
            self._tidy = True
        if self._known is None:
            self._write_index([], self._serial, {}, self.counts)

    def _write(self, offset: int, sample: Sample) -> str:
        name = f"sample-{self._serial + offset:08d}.safetensors"
        _save_sample(self._directory / name, sample)
        return name

    def _write_index(
        self, files: list[str], serial: int, form: dict[str, list[int]], counts: Counts, run: Run = None
    ) -> None:
        index = {"format": FORMAT, "files": files, "serial": serial, "shapes": form, "counts": counts}
        if run is not None:
            index["run"] = run
        with scratch_directory(self._directory) as scratch:
            (scratch / INDEX).write_text(json.dumps(index), encoding="utf-8")
            _rename_into_place(scratch / INDEX, self._directory / INDEX)
        self._known = self._stamp()
        self._files, self._serial, self.shapes, self.counts = files, serial, form, counts
        self.run = run

    def _remove(self, names: set[str]) -> None:
        for name in names:
            (self._directory / name).unlink(missing_ok=True)


def opened(directory: Any, device: torch.device | None, group: Any) -> MemoryStore | DiskStore:
    """Where samples are kept; a directory by one writer of the group's ranks."""
    if directory is None:
        return MemoryStore(device)
    if group is not None:
        from fekernels.posterior.shared_store import SharedDiskStore

        return SharedDiskStore(Path(directory), group)
    return DiskStore(Path(directory))


def write_file(path: Path, samples: list[Sample], counts: Counts) -> None:
    """All samples in one safetensors file; tensor `name` of sample i is called `i/name`."""
    tensors = {
        f"{index}/{name}": value for index, sample in enumerate(samples) for name, value in sample.items()
    }
    _save_tensors(
        path,
        tensors,
        {"fekernels": json.dumps({"format": FORMAT, "samples": len(samples), "counts": counts})},
    )


def read_file(path: Path) -> tuple[list[Sample], Counts]:
    """The samples and counts of `write_file`; ValueError for any other file."""
    if not path.is_file():
        raise ValueError(f"PosteriorSamples.load: path must be a file; got {path}")
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["fekernels"])
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']!r}")
            samples: list[Sample] = [{} for _ in range(header["samples"])]
            for key in file.keys():
                index, name = key.split("/", 1)
                samples[int(index)][name] = file.get_tensor(key)
            return samples, counts_of(header["counts"], len(samples))
    except (KeyError, ValueError, IndexError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"PosteriorSamples.load: path must be a file of PosteriorSamples.save; got {path} ({error!r})"
        ) from error
