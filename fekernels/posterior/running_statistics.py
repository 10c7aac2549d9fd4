"""The running statistics of batch norms, measured again for given weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fekernels._runtime.torch_internals import AnyBatchNorm, AnyNorm
from fekernels.posterior.model_calls import as_inputs, modes_restored

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def tracking_norms(model: nn.Module) -> dict[str, AnyNorm]:
    """Every norm that predicts with statistics of its past batches, by its name."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, AnyNorm))
    return {name: norm for name, norm in found if norm.running_mean is not None}


def measure(
    model: nn.Module, weights: dict[str, Tensor], loader: Iterable[Any], device: torch.device | str | None
) -> dict[str, Tensor]:
    """The statistics of `weights` over the batches of `loader`, by their names in the state dict.

    As `torch.optim.swa_utils.update_bn` measures them: in training mode, every batch counting the same. Nothing of
    the model changes, and of `weights` only the buffers.
    """
    norms = tracking_norms(model)
    momenta = {name: norm.momentum for name, norm in norms.items()}
    own = {f"{name}.{key}".lstrip(".") for name in norms for key in STATISTICS}
    for name in own & weights.keys():
        weights[name].fill_(1 if name.endswith("running_var") else 0)
    batches = 0
    with modes_restored(model), torch.no_grad():
        try:
            model.train()
            for batch in loader:
                for norm in norms.values():
                    # A plain average of all batches instead of a decaying one. A batch norm counts its calls for
                    # that; an instance norm takes None for 0.
                    norm.momentum = None if isinstance(norm, AnyBatchNorm) else 1 / (batches + 1)
                args, kwargs = _inputs_of(batch, device)
                torch.func.functional_call(model, weights, args, kwargs)
                batches += 1
        finally:
            for name, norm in norms.items():
                norm.momentum = momenta[name]
    if not batches:
        raise ValueError("PosteriorSamples.refresh_statistics: loader must hold a batch; got none")
    return {name: weights[name] for name in own & weights.keys()}


def _inputs_of(batch: Any, device: torch.device | str | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model is called with: the batch, or the first of a batch that is a list or tuple."""
    if isinstance(batch, (list, tuple)):
        batch = batch[0]
    args, kwargs = as_inputs(batch)
    if device is None:
        return args, kwargs

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return tuple(moved(v) for v in args), {k: moved(v) for k, v in kwargs.items()}
