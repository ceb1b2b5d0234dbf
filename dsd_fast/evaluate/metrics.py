"""Figures of a set of assets, each a function of feature arrays alone.

Arrays are numpy, computed in float64. S counts seeds, V views, A assets, N and M images, and D
features. The views of all assets are taken from the same azimuths in the same order.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

# Fewer images say nothing about a covariance, shrunk or not.
MIN_FRECHET = 16
# Pixels along a side of an outline.
OUTLINE = 96


def unit(x: np.ndarray) -> np.ndarray:
    """Rows [..., D] of length 1; rows of zeros stay zero."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _same_views(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 3 or features.shape[0] < 2:
        raise ValueError(
            f"expected features [S,V,D] of at least 2 seeds, got {list(features.shape)}"
        )
    return features.swapaxes(0, 1)


def _between_seeds(x: np.ndarray, metric: Literal["euclidean", "jaccard", "sqeuclidean"]) -> float:
    """Mean distance of pairs of seeds, by a name of `scipy.spatial.distance`; x is [V,S,D]."""
    from scipy.spatial.distance import pdist

    return float(np.mean([pdist(view, metric) for view in x]))


def pairwise_cosine(features: np.ndarray) -> float:
    """Mean cosine distance between seeds seen from the same side.

    mean_v 2/(S(S-1)) Σ_{s<t} (1 - cos(x_sv, x_tv)), in [0, 2]; 0 when all seeds look alike. The
    diversity score of Zhu et al., "Toward Multimodal Image-to-Image Translation" (2017): the
    mean distance of random pairs in the features of a network, here with cosine for LPIPS.

    Args:
        features: [S,V,D], S >= 2.
    """
    # Half the squared distance of unit vectors; of zeros a cosine would be NaN.
    return _between_seeds(unit(_same_views(features)), "sqeuclidean") / 2


def pairwise_euclidean(features: np.ndarray) -> float:
    """Mean Euclidean distance between seeds seen from the same side.

    mean_v 2/(S(S-1)) Σ_{s<t} ||x_sv - x_tv||, in units of the features; as `pairwise_cosine`.

    Args:
        features: [S,V,D], S >= 2.
    """
    return _between_seeds(_same_views(features), "euclidean")


def silhouettes_apart(masks: np.ndarray) -> float:
    """Mean distance of seeds' outlines seen from the same side: how far shapes differ, whatever
    their colours.

    mean_v 2/(S(S-1)) Σ_{s<t} (1 - |a_sv ∩ a_tv| / |a_sv ∪ a_tv|), in [0, 1], each outline first
    cropped to the square that holds it.

    Args:
        masks: [S,V,H,W] bool, S >= 2. Of two views with nothing in them the distance is 0.
    """
    masks = np.asarray(masks, bool)
    if masks.ndim != 4 or masks.shape[0] < 2:
        raise ValueError(f"expected masks [S,V,H,W] of at least 2 seeds, got {list(masks.shape)}")
    outlines = [[_outline(mask).ravel() for mask in view] for view in masks.swapaxes(0, 1)]
    return _between_seeds(np.array(outlines), "jaccard")


def _outline(mask: np.ndarray) -> np.ndarray:
    """[OUTLINE,OUTLINE] bool: what of a mask [H,W] lies in the square around all that is set."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    out = np.zeros((OUTLINE, OUTLINE), bool)
    if not len(rows):
        return out
    side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    steps = (np.arange(OUTLINE) + 0.5) / OUTLINE - 0.5
    at = [
        np.floor(0.5 * (ends[0] + ends[-1] + 1) + side * steps).astype(int)
        for ends in (rows, columns)
    ]
    inside = [(i >= 0) & (i < n) for i, n in zip(at, mask.shape)]
    i, j = (a.clip(0, n - 1) for a, n in zip(at, mask.shape))
    return mask[np.ix_(i, j)] & inside[0][:, None] & inside[1]


def vendi_score(kernel: np.ndarray) -> float:
    """The effective number of different items, from 1 (all alike) to n (nothing in common).

    exp(-Σ_i λ_i ln λ_i) with λ the eigenvalues of K/n; Friedman and Dieng, "The Vendi Score" (TMLR
    2023, arXiv 2210.02410).

    Args:
        kernel: [n,n], positive semidefinite, ones on its diagonal.
    Raises:
        ValueError: the kernel is not square or its diagonal is not one.
    """
    from scipy.special import entr

    kernel = np.asarray(kernel, np.float64)
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or len(kernel) == 0:
        raise ValueError(f"expected a square kernel, got {list(kernel.shape)}")
    if not np.allclose(np.diag(kernel), 1, atol=1e-6):
        raise ValueError("expected a kernel with ones on its diagonal")
    eigenvalues = np.linalg.eigvalsh(kernel / len(kernel)).clip(min=0)
    return float(np.exp(entr(eigenvalues).sum()))


def vendi(features: np.ndarray) -> float:
    """Vendi score of the seeds under the cosine kernel, for each view, then averaged: in [1, S].

    Grows with S: compare sets of as many seeds.

    Args:
        features: [S,V,D], S >= 2, no row of zeros.
    """
    return float(np.mean([vendi_score(x @ x.T) for x in unit(_same_views(features))]))


def covariance(features: np.ndarray, shrink: bool) -> np.ndarray:
    """Covariance [D,D] of images' features [N,D], N >= 2.

    Without shrinkage the unbiased one, over N - 1. With it that of Ledoit and Wolf, "A
    well-conditioned estimator for large-dimensional covariance matrices" (2004): with S = XᵀX/N of
    the centred rows, m = tr S / D, d² = ||S - mI||²_F, b² = min(d², Σ_k ||x_k x_kᵀ - S||²_F / N²),

        Σ = b²/d² m I + (1 - b²/d²) S
    """
    x = np.asarray(features, np.float64)
    x = x - x.mean(0)
    n, width = x.shape
    if not shrink:
        return x.T @ x / (n - 1)
    s = x.T @ x / n
    mean = np.trace(s) / width
    d2 = np.sum(s**2) - width * mean**2
    # Σ ||x xᵀ - S||² = Σ |x|⁴ - N ||S||², without the N matrices
    b2 = max((np.sum(np.sum(x**2, 1) ** 2) / n - np.sum(s**2)) / n, 0.0)
    share = 1.0 if d2 <= 0 else min(b2 / d2, 1.0)
    return share * mean * np.eye(width) + (1 - share) * s


def _root(matrix: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semidefinite matrix [D,D]."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def gaussian_frechet(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians.

    ||μ₁ - μ₂||² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½); Dowson and Landau (1982). The trace of the root is that
    of (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric.

    Args:
        mean1, mean2: [D]; cov1, cov2: [D,D].
    """
    root = _root(cov1)
    eigenvalues = np.linalg.eigvalsh(root @ cov2 @ root)
    cross = np.sqrt(eigenvalues.clip(min=0)).sum()
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> tuple[float, bool]:
    """Fréchet distance between images and reference images, and whether covariances were shrunk.

    `gaussian_frechet` of the means and covariances; Heusel et al., "GANs Trained by a Two
    Time-Scale Update Rule" (2017). The features are not Inception's, so values compare with each
    other alone. Where either side has no more images than features, its sample covariance is
    singular and the distance too large by an amount that depends on N: then both covariances are
    shrunk (see `covariance`), which eases that and does not end it; compare equal N.

    Args:
        features: [N,D]; reference: [M,D].
    Raises:
        ValueError: fewer than MIN_FRECHET images on a side.
    """
    sides = [np.asarray(side, np.float64) for side in (features, reference)]
    counts = [len(side) for side in sides]
    if min(counts) < MIN_FRECHET:
        raise ValueError(
            f"the Fréchet distance needs at least {MIN_FRECHET} images on each side, "
            f"got {counts[0]} and {counts[1]}"
        )
    shrink = min(counts) <= sides[0].shape[1]
    (mean1, cov1), (mean2, cov2) = ((side.mean(0), covariance(side, shrink)) for side in sides)
    return gaussian_frechet(mean1, cov1, mean2, cov2), shrink


def nearest_models(features: np.ndarray, reference: np.ndarray, names: np.ndarray) -> list[str]:
    """For each asset the training model that its views are nearest to.

    argmax_m mean_v max_{r of m} cos(x_v, y_r): every view may be near another view of the model.
    The nearest-neighbour search by which generators are checked for memorising, as in Karras et
    al., "Progressive Growing of GANs" (2018); how many different models the seeds end at tells
    objects apart where a mean distance only tells pixels apart.

    Args:
        features: [A,V,D] of the assets' views.
        reference: [M,D] of the training models' views.
        names: [M] names of the models.
    Returns:
        A names.
    """
    models, model_of_row = np.unique(np.asarray(names), return_inverse=True)
    order = np.argsort(model_of_row, kind="stable")
    starts = np.searchsorted(model_of_row[order], np.arange(len(models)))
    rows = unit(reference)[order].T
    nearest = []
    for x in unit(features):  # an asset at a time: M may be a hundred thousand
        best = np.maximum.reduceat(x @ rows, starts, axis=1)
        nearest.append(str(models[best.mean(0).argmax()]))
    return nearest


def janus(said_front: np.ndarray, is_front: np.ndarray) -> float:
    """Mean number of views of an asset that are called a front and are none: 0 is consistent.

    mean_a Σ_v [said_av = front][v is no front]. A thing of several faces (the Janus problem, as in
    Armandpour et al., "Perp-Neg", 2023, arXiv 2304.04968) shows fronts where sides and back belong.

    Args:
        said_front: [A,V] bool, the judge's word.
        is_front: [V] or [A,V] bool, where the camera was.
    """
    said_front, is_front = np.broadcast_arrays(np.asarray(said_front, bool), is_front)
    return float((said_front & ~is_front.astype(bool)).sum(1).mean())


def share_right(said: np.ndarray, asked: np.ndarray) -> float:
    """Share of views [A,V] on which a judge says what was asked [A,V] (or [A,1] for nouns).

    mean_av [said_av = asked_av]; with a classifier in place of CLIP's ranking it is the
    R-precision of Park et al. (2021) that DreamFusion (Poole et al. 2022) gives for text-to-3D.
    """
    return float((np.asarray(said) == np.asarray(asked)).mean())


def clip_score(images: np.ndarray, text: np.ndarray) -> float:
    """Mean of 100 max(cos(x, y), 0) over an asset's views, as torchmetrics gives it.

    Hessel et al., "CLIPScore" (EMNLP 2021, arXiv 2104.08718), with w = 100 for their 2.5.

    Args:
        images: [V,D] CLIP embeddings of the views; text: [D] that of the prompt.
    """
    return float(100 * np.maximum(unit(images) @ unit(text), 0).mean())
