"""TensorRT as a UNet engine, for the row counts it was built for."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.engines import cache, parity, tensorrt_library
from dsd_fast.diffusion.engines.base import UNetEngine, UNetShape
from dsd_fast.diffusion.engines.onnx_export import OUTPUT, export_unet
from dsd_fast.diffusion.engines.tensorrt_library import Capability, Library

log = logging.getLogger(__name__)

# Rows of one batch of guidance: four embeddings with perp-neg, and twice that for two levels.
DEFAULT_ROWS = (4, 8)


@dataclass
class _Profile:
    """The context of one row count, and the buffers it was told the addresses of."""

    context: Any
    inputs: dict[str, Tensor]
    output: Tensor


class TensorRTEngine:
    """Runs a UNet through TensorRT or TensorRT-RTX (see `dsd_fast.diffusion.engines.base`).

    The engine is loaded or built at the first call, which tells the sizes; it is compared with
    the eager module before its first result is handed out. An engine that cannot be built, or
    that computes something else, costs one warning. From then on, as for row counts that it was
    not built for, calls go to `fallback`.

    Inputs are copied to fixed buffers and all work is enqueued in the order of torch's current
    stream. Once the engine has run, a CUDA graph can hold a call if the library says so; otherwise
    a call within a capture raises RuntimeError.

    Args:
        unet: a module on a CUDA device, in eval mode.
        library: of `find_library`, one that supports the device.
        fallback: engine for other row counts.
        rows: row counts to build for.
    """

    def __init__(
        self,
        unet: nn.Module,
        library: Library,
        fallback: UNetEngine,
        rows: Sequence[int] = DEFAULT_ROWS,
    ):
        self.unet = unet
        self.library = library
        self.fallback = fallback
        self.rows = tuple(rows)
        self._shape: UNetShape | None = None
        self._engine: Any = None
        self._profiles: dict[int, _Profile] = {}
        self._refused: set[int] = set()
        self._disabled = False

    @torch.no_grad()
    def __call__(self, latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
        rows = len(latents)
        if rows not in self.rows:
            self._mention(rows)
        elif self._ready(latents, condition):
            if torch.cuda.is_current_stream_capturing() and not self._can_capture(rows):
                raise RuntimeError(f"{self.library.name} cannot be a part of a CUDA graph here")
            with torch.cuda.device(latents.device):
                return self._run(latents, t, condition).clone()
        return self.fallback(latents, t, condition)

    def release_graphs(self) -> None:
        """Those of the fallback: the library's memory is the engine's own."""
        self.fallback.release_graphs()

    def _ready(self, latents: Tensor, condition: Condition) -> bool:
        """Open the engine at the first call; False once that has failed."""
        if self._disabled:
            return False
        shape = UNetShape.of(latents, condition)
        if self._engine is None:
            try:
                with torch.cuda.device(latents.device):
                    self._open(shape, latents.dtype, latents.device)
            # Of the build and the parity gate, a GPU without memory for both engines, the disk, a
            # missing onnx, and a library that does not start, which its bindings report as a
            # TypeError.
            except (RuntimeError, OSError, ImportError, TypeError) as error:
                log.warning("going on without %s: %s", self.library.name, error)
                self._disabled = True
                return False
        if shape != self._shape:
            raise ValueError(f"the engine was built for {self._shape}, got {shape}")
        return True

    def _open(self, shape: UNetShape, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = shape
        self._stream = torch.cuda.Stream(device)
        self._engine, self._runtime = open_engine(
            self.unet, shape, self.rows, dtype, self.library, torch.cuda.get_device_capability()
        )
        try:
            for rows in self.rows:
                self._profiles[rows] = self._profile(shape, rows, dtype, device)
                found = parity.gate(self._run, self.unet, shape, rows, self.library.name)
                log.info(
                    "%s, %d rows: relative error %.1e, allowed %.1e",
                    self.library.name,
                    rows,
                    found.error,
                    found.allowed,
                )
        except Exception:
            self._engine = None
            self._profiles.clear()
            raise

    def _profile(
        self, shape: UNetShape, rows: int, dtype: torch.dtype, device: torch.device
    ) -> _Profile:
        # One context each: switching the profile of a context cannot be captured.
        context = self.library.context(self._engine)
        if context is None:
            raise RuntimeError(f"{self.library.name}: no memory for {rows} rows")
        stream = torch.cuda.current_stream(device)
        context.set_optimization_profile_async(self.rows.index(rows), stream.cuda_stream)
        stream.synchronize()
        shapes = shape.inputs(rows)
        inputs = {
            name: torch.zeros(
                shapes[name], dtype=torch.int64 if name == "t" else dtype, device=device
            )
            for name in shapes
        }
        output = torch.empty(shapes["latents"], dtype=dtype, device=device)
        for name, tensor in inputs.items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        context.set_tensor_address(OUTPUT, output.data_ptr())
        return _Profile(context, inputs, output)

    def _run(self, latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """One forward; the result is overwritten by the next one of as many rows."""
        profile = self._profiles[len(latents)]
        for name, tensor in {"latents": latents, "t": t, **condition}.items():
            profile.inputs[name].copy_(tensor)
        current = torch.cuda.current_stream(latents.device)
        # On the default stream the library would wait for the GPU at every call.
        stream = self._stream if current.cuda_stream == 0 else current
        stream.wait_stream(current)
        if not profile.context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"{self.library.name} failed to run the UNet")
        current.wait_stream(stream)
        return profile.output

    def _can_capture(self, rows: int) -> bool:
        stream = torch.cuda.current_stream().cuda_stream
        return self._profiles[rows].context.is_stream_capturable(stream)

    def _mention(self, rows: int) -> None:
        if rows not in self._refused:
            self._refused.add(rows)
            built = " and ".join(map(str, self.rows))
            log.info("%d rows: not TensorRT, which was built for %s", rows, built)


def open_engine(
    unet: nn.Module,
    shape: UNetShape,
    rows: Sequence[int],
    dtype: torch.dtype,
    library: Library,
    capability: Capability,
) -> tuple[Any, Any]:
    """The deserialised engine of the cache, built if it is not there, and its runtime.

    The runtime has to live as long as the engine.
    """
    path = cache.path_of(engine_key(unet, shape, rows, dtype, library, capability))
    runtime = library.module.Runtime(library.logger())

    def load(file: Path) -> Any:
        return runtime.deserialize_cuda_engine(file.read_bytes())

    def build() -> Any:
        with tempfile.TemporaryDirectory(prefix="dsd_fast-") as folder:
            onnx_file = export_unet(unet, shape, Path(folder))
            return tensorrt_library.build(library, onnx_file, shape, rows, (capability,))

    return cache.load_or_build(path, load, build), runtime


def engine_key(
    unet: nn.Module,
    shape: UNetShape,
    rows: Sequence[int],
    dtype: torch.dtype,
    library: Library,
    capability: Capability,
) -> str:
    """The cache's name of the engine of a UNet."""
    weights = cache.weights_digest(unet)
    return cache.key(weights, shape, rows, dtype, library.name, library.version, capability)


def make_tensorrt(
    unet: nn.Module, device: torch.device, fallback: UNetEngine, library: str = "auto"
) -> UNetEngine:
    """A TensorRTEngine, or, where no library supports the GPU, one log line and the fallback.

    Raises:
        ImportError: no TensorRT package; says how to install one.
    """
    try:
        found = tensorrt_library.find_library(library, torch.cuda.get_device_capability(device))
    except tensorrt_library.UnsupportedGPU as error:
        log.warning("%s; going on without it", error)
        return fallback
    return TensorRTEngine(unet, found, fallback)
