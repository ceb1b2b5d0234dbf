"""How near an image comes to the true one: PSNR and SSIM, in float64."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

# The window of the structural similarity, in pixels: its sigma, and how far it reaches each way.
_SSIM_SIGMA = 1.5
_SSIM_REACH = 5


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of images [H,W,C] in [0,1]; infinite where they are equal.

    -10 log10 of the mean squared difference over pixels and channels.
    """
    image, truth = _same_shape(image, truth)
    mse = float(np.mean((image - truth) ** 2))
    return float("inf") if mse == 0 else -10 * float(np.log10(mse))


def ssim(image: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of images [H,W,C] in [0,1], 1 where they are equal.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004):
    Gaussian window of sigma 1.5 and 11 pixels, biased covariances, mean over channels and the
    pixels around which the window is whole.

    Raises:
        ValueError: images of different shapes, or smaller than the window.
    """
    image, truth = _same_shape(image, truth)
    if min(image.shape[:2]) <= 2 * _SSIM_REACH:
        raise ValueError(
            f"expected images of at least {2 * _SSIM_REACH + 1} pixels a side, "
            f"got {list(image.shape)}"
        )

    def local(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, _SSIM_SIGMA, radius=_SSIM_REACH, axes=(0, 1))

    mean_x, mean_y = local(image), local(truth)
    var_x = local(image * image) - mean_x**2
    var_y = local(truth * truth) - mean_y**2
    cov = local(image * truth) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    edge = _SSIM_REACH  # where the window would stick out
    return float(np.mean((luminance * structure)[edge:-edge, edge:-edge]))


def _same_shape(image: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image, truth = np.asarray(image, np.float64), np.asarray(truth, np.float64)
    if image.shape != truth.shape or image.ndim != 3:
        raise ValueError(
            f"expected two images of one shape [H,W,C], got {list(image.shape)} and "
            f"{list(truth.shape)}"
        )
    return image, truth
