"""A UNet as an ONNX file, for the engines that are built from one."""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from dsd_fast.diffusion.condition import Condition, forward
from dsd_fast.diffusion.engines.base import UNetShape
from dsd_fast.diffusion.networks import Network

OUTPUT = "prediction"
# The newest that the TorchScript exporter writes and that every supported TensorRT reads; from 17
# on, layer normalisation is one operator, which keeps its half-precision sums inside one kernel.
_OPSET = 17
# More than one row, or the tracer takes "one row" for a constant.
_TRACED_ROWS = 2


class _Positional(nn.Module):
    """A UNet called with latents, levels and the tensors of a condition of the given names."""

    def __init__(self, unet: nn.Module, names: list[str]):
        super().__init__()
        self.unet, self.names = unet, names

    def forward(self, latents: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        return forward(self.unet, latents, t, Condition(**dict(zip(self.names, condition))))


def export_unet(unet: nn.Module, shape: UNetShape, folder: Path) -> Path:
    """Write `unet` to `folder` as ONNX, with any number of rows and any size of latents.

    Args:
        unet: UNet2DConditionModel in eval mode; the file has its dtype. It runs once, where it is,
            on small latents where they can stand for those of `shape`: half precision on a CPU
            would take minutes for large ones.
        shape: of the inputs that the file is for.
        folder: made if absent. Weights beyond 2 GiB lie beside the file that is returned.
    Returns:
        the path of the ONNX file: latents [R,C,h,w], t [R] int64, and the tensors of the condition
        by their names -> prediction [R,C,h,w].
    Raises:
        ImportError: the package onnx is missing.
    """
    _require_onnx()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "unet.onnx"
    parameter = next(unet.parameters())
    traced = shape
    # Sizes that do not halve evenly make diffusers interpolate to fixed sizes on the way up.
    channels, *sides = shape.latents
    has_image = "image" in dict(shape.condition)
    if not has_image and all(side % _halvings(unet) == 0 for side in sides):
        small = (min(side, 2 * _halvings(unet)) for side in sides)
        traced = replace(shape, latents=(channels, *small))
    latents, t, condition = traced.sample(_TRACED_ROWS, parameter.dtype, parameter.device)
    inputs = list(traced.inputs(_TRACED_ROWS))
    axes = {name: {0: "rows"} for name in inputs}
    for name in ("latents", "image", OUTPUT):
        axes[name] = {0: "rows", 2: "height", 3: "width"}
    with torch.no_grad(), warnings.catch_warnings():
        # The tracer warns of each Python branch of diffusers; all depend on fixed sizes alone.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Positional(unet, list(condition)).eval(),
            (latents, t, *condition.values()),
            str(path),
            input_names=inputs,
            output_names=[OUTPUT],
            dynamic_axes={name: axes[name] for name in (*inputs, OUTPUT)},
            opset_version=_OPSET,
            # Lighter than the exporter through torch.export, which holds the weights three times.
            dynamo=False,
        )
    return path


def _halvings(unet: Network) -> int:
    """Pixels of the latents for one of the innermost level; that needs two, one looks constant."""
    return 2 ** (len(unet.config.block_out_channels) - 1)


def _require_onnx() -> None:
    if find_spec("onnx") is None:
        raise ImportError(
            "exporting a UNet needs the package onnx: pip install 'dsd_fast[tensorrt]'"
        )
