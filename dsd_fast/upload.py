"""Small tensors from the CPU, where levels, angles and random numbers are made, to the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# CUDA takes a pageable source of this size over before the copy returns; a larger one would make
# the host wait for all work queued before it.
_PAGEABLE_BYTES = 1 << 16
# Each tensor of a pack begins at a multiple of this, as kernels like their pointers.
_ALIGNMENT = 16


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for the work already queued there.

    The source may be changed or freed at once. A plain `.to` would drain the stream every time.
    """
    if device.type == "cuda" and not tensor.is_cuda and tensor.nbytes > _PAGEABLE_BYTES:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


class Pack(Mapping[str, Tensor]):
    """Named small tensors in one buffer, so that one copy takes all of them to the device.

    Args:
        tensors: on the CPU.
        device: where they are to go; for CUDA the buffer is made in pinned memory, which torch
            gives to nobody else before copies from it are done.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device):
        data = bytearray()
        self._spans = {}
        for name, tensor in tensors.items():
            begin = len(data)
            data += tensor.numpy().tobytes()
            self._spans[name] = (begin, len(data), tensor.dtype, tensor.shape)
            data += bytes(-len(data) % _ALIGNMENT)
        self.buffer = torch.frombuffer(data, dtype=torch.uint8)
        if device.type == "cuda":
            self.buffer = self.buffer.pin_memory()

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of this name, a view of the buffer."""
        begin, end, dtype, shape = self._spans[name]
        return self.buffer[begin:end].view(dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def to(self, device: torch.device) -> Pack:
        """A copy on the device; the work queued there is not waited for."""
        other = object.__new__(Pack)
        other._spans = self._spans
        other.buffer = torch.empty_like(self.buffer, device=device, pin_memory=False)
        other.copy_(self)
        return other

    def copy_(self, other: Pack) -> None:
        """Take over the values of a pack of the same names, dtypes and shapes."""
        if other._spans != self._spans:
            raise ValueError("expected a pack of the same tensors")
        self.buffer.copy_(other.buffer, non_blocking=True)
