"""The packages `tensorrt` and `tensorrt_rtx`, which share one API: finding them, building engines.

TensorRT compiles on the GPU that the engine is for. TensorRT-RTX, the one for GeForce and RTX
cards, compiles for a compute capability and needs no GPU to do so.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dsd_fast.diffusion.engines.base import UNetShape

log = logging.getLogger(__name__)

# In the order of preference where both run: the one made for consumer cards comes first.
LIBRARIES = ("tensorrt_rtx", "tensorrt")
_INSTALL = {
    "tensorrt_rtx": "pip install 'dsd_fast[tensorrt]'",
    "tensorrt": "pip install tensorrt onnx",
}
_PROGRESS_SECONDS = 5.0

Capability = tuple[int, int]


class UnsupportedGPU(RuntimeError):
    """No installed library makes engines for this GPU."""


class BuildError(RuntimeError):
    """The library refused a network; the message holds its own words."""


@dataclass(frozen=True)
class Library:
    """An imported TensorRT package."""

    name: str
    module: ModuleType

    @property
    def version(self) -> str:
        return self.module.__version__

    @property
    def needs_gpu_to_build(self) -> bool:
        return self.name == "tensorrt"

    def supports(self, capability: Capability) -> bool:
        """Whether engines of this library run on a GPU of this compute capability."""
        if self.name == "tensorrt":
            return capability >= (7, 5)
        return hasattr(self.module.ComputeCapability, _member(capability))

    def context(self, engine: Any) -> Any:
        """An execution context of an engine; None without memory for it."""
        if self.name == "tensorrt":
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        # Kernels for the profile's shapes are compiled now. Otherwise general ones run until those
        # are there, which the parity gate would judge and a CUDA graph keep for good.
        strategies = self.module.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return engine.create_execution_context(config)

    def logger(self) -> Any:
        """A logger of the library that writes to ours, and keeps errors in `.errors`."""
        trt = self.module

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                    self.errors.append(message)
                    log.debug("%s: %s", trt.__name__, message)

        return Logger()


def find_library(name: str = "auto", capability: Capability | None = None) -> Library:
    """The TensorRT package to use.

    Args:
        name: "auto" (the first installed one that supports the GPU), "tensorrt", "tensorrt_rtx".
        capability: compute capability of the GPU, or None to take any installed package.
    Raises:
        ImportError: not installed; says how to install it.
        UnsupportedGPU: installed, and without support for the GPU.
    """
    if name != "auto" and name not in LIBRARIES:
        raise ValueError(f"unknown library {name!r}, expected auto, {', '.join(LIBRARIES)}")
    installed = []
    for candidate in LIBRARIES if name == "auto" else (name,):
        try:
            installed.append(Library(candidate, importlib.import_module(candidate)))
        # A package whose shared libraries do not load raises OSError.
        except (ImportError, OSError) as error:
            log.debug("%s: %s", candidate, error)
    if not installed:
        wanted = LIBRARIES[0] if name == "auto" else name
        raise ImportError(f"the package {wanted} is not installed: {_INSTALL[wanted]}")
    for library in installed:
        if capability is None or library.supports(capability):
            return library
    assert capability is not None
    names = " and ".join(library.name for library in installed)
    raise UnsupportedGPU(
        f"{names} cannot run on a GPU of compute capability {spelled(capability)}"
        + (": pip install tensorrt onnx, which can" if names == "tensorrt_rtx" else "")
    )


def spelled(capability: Capability) -> str:
    """(8, 9) as "8.9"."""
    return f"{capability[0]}.{capability[1]}"


def build(
    library: Library,
    onnx_file: Path,
    shape: UNetShape,
    rows: Sequence[int],
    capabilities: Sequence[Capability],
) -> Any:
    """Compile an ONNX UNet into one engine, logging the progress.

    The network is strongly typed: every layer computes in the dtype that the file gives it. Each
    row count has its own optimisation profile, in the order of `rows`, so that kernels are chosen
    for exactly that size.

    Args:
        capabilities: of the GPUs that the engine is to run on; tensorrt builds for the present
            GPU, whatever they are.
    Returns:
        the serialised engine, an object with the buffer interface.
    Raises:
        BuildError: the library cannot read the file or compile it.
    """
    trt = library.module
    logger = library.logger()
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # how the bindings report that they got no object
        raise BuildError(f"{library.name} does not start: {_words(logger)}") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_file)):
        problems = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise BuildError(f"{library.name} cannot read {onnx_file}: {'; '.join(problems)}")
    # The file takes latents of any size. Here only the rows stay open, so that all else folds.
    for i in range(network.num_inputs):
        entry = network.get_input(i)
        entry.shape = (-1, *shape.inputs(1)[entry.name][1:])
    config = builder.create_builder_config()
    for count in rows:
        profile = builder.create_optimization_profile()
        for name, size in shape.inputs(count).items():
            profile.set_shape(name, size, size, size)
        config.add_optimization_profile(profile)
    if library.name == "tensorrt_rtx":
        # What a CUDA graph asks for: nothing is allocated while the engine runs.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, _member(capability)), i)
    # The monitor must outlive the build: the configuration keeps no reference to it.
    monitor = _monitor(trt, f"{library.name} for {', '.join(map(spelled, capabilities))}")
    config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(f"{library.name} cannot compile the UNet: {_words(logger)}")
    return engine


def _member(capability: Capability) -> str:
    return f"SM{capability[0]}{capability[1]}"


def _words(logger: Any) -> str:
    return "; ".join(logger.errors) or "it gives no reason"


def _monitor(trt: ModuleType, title: str) -> Any:
    class Monitor(trt.IProgressMonitor):
        """The build's phases as a log line every few seconds."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.last = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps
            if parent_phase is None:
                log.info("%s: %s", title, phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            if now - self.last >= _PROGRESS_SECONDS:
                self.last = now
                total = self.totals.get(phase_name, 0)
                log.info("%s: %s, %d of %d", title, phase_name, min(step + 1, total), total)
            return True  # False would cancel the build

        def phase_finish(self, phase_name: str) -> None:
            self.totals.pop(phase_name, None)

    return Monitor()
