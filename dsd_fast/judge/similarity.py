"""How near an image comes to the true one: PSNR and SSIM, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

# Side of the structural similarity's window of sigma 1.5, in pixels.
_SSIM_WINDOW = 11


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
    from skimage.metrics import structural_similarity

    image, truth = _same_shape(image, truth)
    if min(image.shape[:2]) < _SSIM_WINDOW:
        raise ValueError(
            f"expected images of at least {_SSIM_WINDOW} pixels a side, got {list(image.shape)}"
        )
    mean: Any = structural_similarity(
        image,
        truth,
        data_range=1.0,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(mean)


def _same_shape(image: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image, truth = np.asarray(image, np.float64), np.asarray(truth, np.float64)
    if image.shape != truth.shape or image.ndim != 3:
        raise ValueError(
            f"expected two images of one shape [H,W,C], got {list(image.shape)} and "
            f"{list(truth.shape)}"
        )
    return image, truth
