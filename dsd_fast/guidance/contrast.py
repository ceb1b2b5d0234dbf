"""Guided predictions with the contrast of predictions without guidance.

Classifier-free guidance raises a picture's contrast at every step that follows it. Distillation has
hundreds of them, and colours burst (Lin et al. 2023, arXiv 2305.08891, Sec. 3.4).
"""

from __future__ import annotations

from torch import Tensor

from dsd_fast.diffusion.noise_path import NoisePath

# Keeps the ratio of two standard deviations finite.
_STD_EPS = 1e-8


def rescaled(clean: Tensor, plain: Tensor, share: float) -> Tensor:
    """Clean images with a share of their contrast brought to that of plain ones (Lin et al. 2023,
    arXiv 2305.08891, Sec. 3.4, on clean images).

    Args:
        clean, plain: [G,...], with and without guidance; standard deviations are over an item.
        share: 0 to 1.
    """
    if share == 0:
        return clean
    of_plain, of_clean = (
        image.flatten(1).std(1).view(-1, *[1] * (image.ndim - 1)) + _STD_EPS
        for image in (plain, clean)
    )
    return share * (of_plain / of_clean) * clean + (1 - share) * clean


def rescaled_noise(
    guided: Tensor, plain: Tensor, z: Tensor, t: Tensor, path: NoisePath, share: float
) -> Tensor:
    """The noise whose clean image at z is the guided one's, `rescaled`.

    Args:
        guided, plain: predictions at z with and without guidance, [B,C,h,w] float32.
        z: [B,C,h,w] float32 at levels t, int64 [B].
        path: on the device of z.
        share: 0 to 1.
    """
    # About each channel's mean: about zero, which is a grey, backgrounds too would have to become
    # grey, and where they cannot, an object grows in front of them until it fills the picture.
    of_guided, of_plain = path.clean(z, guided, t), path.clean(z, plain, t)
    mean = of_guided.mean((2, 3), keepdim=True)
    around = of_plain - of_plain.mean((2, 3), keepdim=True)
    clean = mean + rescaled(of_guided - mean, around, share)
    alpha, sigma = path.at(t)
    return (z - alpha * clean) / sigma
