"""The tensors of a network that are a sample's: which, of what shapes, and how the network takes them back."""

from __future__ import annotations

from torch import Tensor, nn

from fekernels.posterior.store import Sample, shapes

__all__ = ["check_shapes", "is_split", "own_tensors", "unsharded", "weights_of"]


def own_tensors(model: nn.Module) -> Sample:
    saved = model.state_dict()
    sample = {name: value.detach() for name, value in model.named_parameters()}
    # state_dict leaves out the buffers that were registered as not persistent: they are no part of the weights.
    sample.update({n: value.detach() for n, value in model.named_buffers() if n in saved})
    return sample


def check_shapes(model: nn.Module, expected: dict[str, list[int]], whose: str) -> None:
    own = shapes(own_tensors(model))
    differ = [name for name in {**expected, **own} if own.get(name) != expected.get(name)]
    if differ:
        name = differ[0]
        raise ValueError(
            f"PosteriorSamples: model must have tensors of the names and shapes of {whose}, {name!r} of "
            f"{expected.get(name)}; got {own.get(name)}"
        )


def weights_of(model: nn.Module, sample: Sample) -> Sample:
    """``sample`` for a call of ``model``, on its devices; what the sample lacks is the model's."""
    weights: Sample = {}
    for name, own in model.named_parameters():
        if _is_sharded(own):
            raise ValueError(
                "PosteriorSamples: model must not be sharded to predict, as FSDP puts its own weights in; got a "
                f"DTensor parameter {name!r}. Open the directory, or load the file, with an unsharded copy of the model"
            )
        weights[name] = sample.get(name, own).to(own.device)
    # Copies, and of all of them: a forward that writes a buffer must reach neither the stored one nor the model's.
    for name, buffer in model.named_buffers():
        weights[name] = sample.get(name, buffer).to(buffer.device, copy=True)
    return weights


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which FSDP2 and tensor parallel keep a part on each rank."""
    return hasattr(tensor, "full_tensor")


def is_split(tensor: Tensor) -> bool:
    """Whether ranks hold different parts of it, so that to make its whole is a collective."""
    if not _is_sharded(tensor):
        return False
    sizes, placements = tensor.device_mesh.shape, tensor.placements  # type: ignore[attr-defined]
    return any(size > 1 and not at.is_replicate() for size, at in zip(sizes, placements, strict=True))


def unsharded(tensor: Tensor) -> Tensor:
    """A DTensor's whole, a collective; any other tensor as it is."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]
