"""A UNet as an ONNX file, for the engines that are built from one."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

INPUTS = ("latents", "t", "text")
OUTPUT = "prediction"
# The newest that the TorchScript exporter writes and that every supported TensorRT reads; from 17
# on, layer normalisation is one operator, which keeps its half-precision sums inside one kernel.
_OPSET = 17
# More than one row, or the tracer takes "one row" for a constant.
_TRACED_ROWS = 2


@dataclass(frozen=True)
class UNetShape:
    """Sizes of a UNet's inputs, but for the number of rows."""

    channels: int
    height: int
    width: int
    text_tokens: int
    text_features: int

    @classmethod
    def of(cls, latents: Tensor, text: Tensor) -> UNetShape:
        """Sizes of latents [R,C,h,w] and text [R,L,D]."""
        return cls(*latents.shape[1:], *text.shape[1:])

    def inputs(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Shape of each input for a number of rows."""
        return {
            "latents": (rows, self.channels, self.height, self.width),
            "t": (rows,),
            "text": (rows, self.text_tokens, self.text_features),
        }

    def sample(
        self, rows: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Random latents and text in `dtype`, and int64 noise levels, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        shapes = self.inputs(rows)
        latents = torch.randn(shapes["latents"], generator=generator)
        t = torch.randint(0, 1000, shapes["t"], generator=generator)
        text = torch.randn(shapes["text"], generator=generator)
        return latents.to(device, dtype), t.to(device), text.to(device, dtype)


class _Positional(nn.Module):
    """A UNet called as an engine is: latents, levels, text."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.unet(latents, t, encoder_hidden_states=text, return_dict=False)[0]


def export_unet(unet: nn.Module, shape: UNetShape, folder: Path) -> Path:
    """Write `unet` to `folder` as ONNX, with any number of rows and any size of latents.

    Args:
        unet: UNet2DConditionModel in eval mode; the file has its dtype. It runs once, where it is,
            on small latents where they can stand for those of `shape`: half precision on a CPU
            would take minutes for large ones.
        shape: of the inputs that the file is for.
        folder: made if absent. Weights beyond 2 GiB lie beside the file that is returned.
    Returns:
        the path of the ONNX file: latents [R,C,h,w], t [R] int64, text [R,L,D] ->
        prediction [R,C,h,w].
    Raises:
        ImportError: the package onnx is missing.
    """
    _require_onnx()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "unet.onnx"
    parameter = next(unet.parameters())
    traced = shape
    # Sizes that do not halve evenly make diffusers interpolate to fixed sizes on the way up.
    if shape.height % _halvings(unet) == shape.width % _halvings(unet) == 0:
        side = 2 * _halvings(unet)
        traced = replace(shape, height=min(side, shape.height), width=min(side, shape.width))
    sample = traced.sample(_TRACED_ROWS, parameter.dtype, parameter.device)
    with torch.no_grad(), warnings.catch_warnings():
        # The tracer warns of each Python branch of diffusers; all depend on fixed sizes alone.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Positional(unet).eval(),
            sample,
            str(path),
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_axes={
                "latents": {0: "rows", 2: "height", 3: "width"},
                "t": {0: "rows"},
                "text": {0: "rows"},
                OUTPUT: {0: "rows", 2: "height", 3: "width"},
            },
            opset_version=_OPSET,
            # Lighter than the exporter through torch.export, which holds the weights three times.
            dynamo=False,
        )
    return path


def _halvings(unet: nn.Module) -> int:
    """Pixels of the latents for one of the innermost level; that needs two, one looks constant."""
    return 2 ** (len(unet.config.block_out_channels) - 1)


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "exporting a UNet needs the package onnx: pip install 'dsd_fast[tensorrt]'"
        ) from error
