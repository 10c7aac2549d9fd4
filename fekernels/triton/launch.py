"""What every launch shares."""

import contextlib

import torch

# Bit-equality with the C++ and CUDA kernels rests on this: no multiplication and addition become an fma.
EXACT = {"enable_fp_fusion": False}


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's. CPU tensors are the interpreter's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
