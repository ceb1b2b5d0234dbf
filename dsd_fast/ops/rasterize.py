"""Rasterising: which triangle of a mesh each sample of a picture sees, and where on it."""

from typing import NamedTuple

import torch
from torch import Tensor

from dsd_fast._backend import address, backend, extension, target
from dsd_fast.ops._check import check_integer, check_tensor

# As in csrc/rasterize.h, for the reference.
SUBPIXELS = 256
LARGEST_SIZE = 1 << 14
GUARD_BAND = 64.0
MIN_W = 2.0**-100
NO_TRIANGLE = 2**63 - 1
# (x, y) of a pixel's samples in subpixels, by their number.
PATTERNS = {
    1: ((128, 128),),
    4: ((96, 32), (224, 96), (32, 160), (160, 224)),
    8: (
        (144, 80),
        (112, 176),
        (208, 144),
        (80, 48),
        (48, 208),
        (16, 112),
        (176, 240),
        (240, 16),
    ),
}
# Bytes of a vertex on the screen.
_SCREEN_VERTEX = 16
# Pairs of a triangle and a sample that the reference looks at in one go.
_PAIRS = 1 << 21


class Fragments(NamedTuple):
    """What the samples of pictures see of a mesh."""

    # int32 [B,H,W,S]: the triangle's row in `faces`, -1 where there is none.
    ids: Tensor
    # float32 [B,H,W,S,3]: of the triangle's corners, perspective-correct, not below 0, with sum 1;
    # zeros where there is none.
    weights: Tensor


def rasterize(
    positions: Tensor, faces: Tensor, height: int, width: int, n_samples: int = 1
) -> Fragments:
    """The nearest triangle at each sample of the pixels of B pictures of one mesh.

    Positions are in clip space: a point is seen at x / w, y / w in [-1, 1] (right, up), nearer ones
    at smaller z / w, and what is not in -w <= z <= w is cut off. Row 0 is the upper one. Triangles
    are seen from both sides. Edges are watertight: vertices are snapped to 1/256 of a pixel, and a
    sample on an edge that two triangles share belongs to one of them (the top-left rule). Among
    triangles at the same depth (31 bits of z / w) the first is seen. Triangles without an area on
    the screen, and those with a corner that is not finite, are not seen. The same on every backend,
    bit for bit, in any order of threads; on CUDA nothing waits for the device.

    Args:
        positions: float32 [B, V, 4], contiguous, as all tensors here.
        faces: int32 [F, 3], rows of positions. On CUDA a face with a number that is none is not
            seen.
        height, width: H and W of the pictures in pixels, 1 to 16384.
        n_samples: S samples a pixel: 1 (its middle), 4 or 8 (rotated grids). Colours of samples,
            averaged, make edges smooth.

    Returns:
        Fragments; nothing in it is differentiable.

    Raises:
        TypeError: an argument is no tensor, has another dtype, or is no integer.
        ValueError: another shape or device, not contiguous, numbers out of range, or (CPU) faces of
            vertices that there are none.
        RuntimeError, ImportError: no compiled code for the device, with the way out.

    Example:
        >>> corners = [[-1.0, -1.0, 0.0, 1.0], [3.0, -1.0, 0.0, 1.0], [-1.0, 3.0, 0.0, 1.0]]
        >>> faces = torch.tensor([[0, 1, 2]], dtype=torch.int32)
        >>> rasterize(torch.tensor([corners]), faces, 1, 1).weights.flatten()
        tensor([0.5000, 0.2500, 0.2500])
    """
    _check(positions, faces, height, width, n_samples)
    function = rasterize_reference if backend(positions) == "torch" else _rasterize_op
    return Fragments(*function(positions.detach(), faces, height, width, n_samples))


def _check(
    positions: Tensor,
    faces: Tensor,
    height: int,
    width: int,
    n_samples: int,
    dtype: torch.dtype | None = torch.float32,
) -> None:
    check_tensor("rasterize", "positions", positions, dtype, ("B", "V", 4))
    check_tensor("rasterize", "faces", faces, torch.int32, ("F", 3), positions.device)
    check_integer("rasterize", "height", height, 1, LARGEST_SIZE)
    check_integer("rasterize", "width", width, 1, LARGEST_SIZE)
    check_integer("rasterize", "n_samples", n_samples, 1, max(PATTERNS))
    if n_samples not in PATTERNS:
        raise ValueError(f"rasterize: n_samples must be 1, 4 or 8, got {n_samples}")


def _check_faces(faces: Tensor, n_vertices: int) -> None:
    if faces.numel() == 0:
        return
    low, high = int(faces.min()), int(faces.max())
    if low < 0 or high >= n_vertices:
        raise ValueError(
            f"rasterize: faces must be rows of positions, 0 to {n_vertices - 1}, got {low} to "
            f"{high}"
        )


@torch.library.custom_op("dsd_fast::rasterize", mutates_args=())
def _rasterize_op(
    positions: Tensor, faces: Tensor, height: int, width: int, n_samples: int
) -> tuple[Tensor, Tensor]:
    _check(positions, faces, height, width, n_samples)
    n_views, n_vertices, n_faces = len(positions), positions.shape[1], len(faces)
    if not positions.is_cuda:
        _check_faces(faces, n_vertices)
    ids, weights = _empty(positions, height, width, n_samples)
    if ids.numel() == 0:
        return ids, weights
    vertices = positions.new_empty(n_views * n_vertices * _SCREEN_VERTEX, dtype=torch.uint8)
    keys = positions.new_full(ids.shape, NO_TRIANGLE, dtype=torch.int64)
    queue = None
    if positions.is_cuda:
        queue = positions.new_empty(1 + n_views * n_faces, dtype=torch.int64)
        queue[:1].zero_()
    extension().rasterize(
        address(positions),
        address(faces),
        (n_views, n_vertices, n_faces),
        (height, width, n_samples),
        (address(vertices), address(keys), address(queue)),
        address(ids),
        address(weights),
        *target(positions),
    )
    return ids, weights


@_rasterize_op.register_fake
def _(positions, faces, height, width, n_samples):
    return _empty(positions, height, width, n_samples)


def _empty(positions: Tensor, height: int, width: int, n_samples: int) -> tuple[Tensor, Tensor]:
    shape = (len(positions), height, width, n_samples)
    ids = positions.new_empty(shape, dtype=torch.int32)
    return ids, positions.new_empty((*shape, 3), dtype=torch.float32)


# ---- reference ----------------------------------------------------------------------------------


@torch.no_grad()
def rasterize_reference(
    positions: Tensor, faces: Tensor, height: int, width: int, n_samples: int = 1
) -> Fragments:
    """`rasterize` in pure torch, any floating dtype and device; it waits for the device."""
    _check(positions, faces, height, width, n_samples, dtype=None)
    n_vertices = positions.shape[1]
    if not positions.is_cuda:
        _check_faces(faces, n_vertices)
    ids, weights = _empty(positions, height, width, n_samples)
    exist = ((faces >= 0) & (faces < n_vertices)).all(1)
    for view, seen, seen_weights in zip(positions.double(), ids, weights):
        keys = faces.new_full((height * width * n_samples,), NO_TRIANGLE, dtype=torch.int64)
        screen, depth, inside = _project(view, height, width)
        whole = exist.clone()
        whole[exist] = inside[faces[exist].long()].all(1)
        numbers = whole.nonzero()[:, 0]
        corners = faces[numbers].long()
        _draw(keys, screen[corners], depth[corners], numbers, height, width, n_samples)
        for number in (exist & ~whole).nonzero()[:, 0].tolist():
            polygon = view.new_tensor(_clipped(view[faces[number].long()].tolist())).reshape(-1, 4)
            if len(polygon):
                screen_p, depth_p, _ = _project(polygon, height, width)
                fan = torch.tensor([[0, i, i + 1] for i in range(1, len(polygon) - 1)])
                fan = fan.to(view.device)
                same = numbers.new_full((len(fan),), number)
                _draw(keys, screen_p[fan], depth_p[fan], same, height, width, n_samples)
        keys = keys.view(height, width, n_samples)
        found = keys != NO_TRIANGLE
        seen.copy_(torch.where(found, keys & 0xFFFFFFFF, -1))
        seen_weights.zero_()
        seen_weights[found] = _weights(view, faces, seen, found)
    return Fragments(ids, weights)


def _planes(v: Tensor) -> Tensor:
    """Signed distances [V,7] of clip vertices [V,4] from the planes of what is seen."""
    x, y, z, w = v.unbind(1)
    wide = GUARD_BAND * w
    return torch.stack([w - MIN_W, w + z, w - z, wide - x, wide + x, wide - y, wide + y], 1)


def _project(v: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places int64 [V,2] in subpixels, depths [V], and whether vertices [V,4] need no clipping."""
    inside = (_planes(v) >= 0).all(1)
    x, y, z, w = v.unbind(1)
    w = torch.where(w > MIN_W, w, MIN_W)
    right = 0.5 * (x / w) + 0.5
    down = -0.5 * (y / w) + 0.5
    size = right.new_tensor([width * SUBPIXELS, height * SUBPIXELS])
    screen = torch.round(torch.stack([right, down], 1) * size)
    screen = screen.nan_to_num(0.0).clamp(-(2.0**28), 2.0**28).long()
    return screen, (z / w).clamp(-1.0, 1.0), inside


def _clipped(triangle: list[list[float]]) -> list[list[float]]:
    """What the volume leaves of three corners: a polygon, of no vertices where that is nothing."""
    polygon = triangle
    if not all(-3.5e38 < value < 3.5e38 for corner in polygon for value in corner):
        return []
    for plane in range(7):
        distances = _planes(torch.tensor(polygon, dtype=torch.float64))[:, plane].tolist()
        kept = []
        for k, here in enumerate(polygon):
            after = (k + 1) % len(polygon)
            d, d_next = distances[k], distances[after]
            if d >= 0:
                kept.append(here)
            if (d >= 0) != (d_next >= 0):
                inner, outer = (here, polygon[after]) if d >= 0 else (polygon[after], here)
                d_in, d_out = (d, d_next) if d >= 0 else (d_next, d)
                t = d_in / (d_in - d_out)
                kept.append([a + t * (b - a) for a, b in zip(inner, outer)])
        polygon = kept
        if not polygon:
            break
    return polygon if len(polygon) >= 3 else []


def _draw(
    keys: Tensor,
    corners: Tensor,
    depth: Tensor,
    numbers: Tensor,
    height: int,
    width: int,
    n_samples: int,
) -> None:
    """Put triangles, corners int64 [T,3,2] and depth [T,3], into `keys` where they are nearest."""
    a, b, c = corners.unbind(1)
    area = _cross(b - a, c - a)
    turned = (area < 0)[:, None]
    b, c = torch.where(turned, c, b), torch.where(turned, b, c)
    za, zb, zc = depth.unbind(1)
    zb, zc = torch.where(turned[:, 0], zc, zb), torch.where(turned[:, 0], zb, zc)
    low = (corners.amin(1) >> 8).clamp(min=0)
    limit = low.new_tensor([width, height])
    high = torch.minimum((corners.amax(1) >> 8) + 1, limit)
    size = (high - low).clamp(min=0)
    n_pixels = size.prod(1) * (area != 0)
    end = n_pixels.cumsum(0)
    area = area.abs().double()
    inverse = torch.where(area > 0, 1.0 / area, 0.0)
    pattern = keys.new_tensor(PATTERNS[n_samples])
    total = int(end[-1]) if len(end) else 0
    for start in range(0, total, _PAIRS // n_samples):
        pair = torch.arange(start, min(start + _PAIRS // n_samples, total), device=keys.device)
        t = torch.searchsorted(end, pair, right=True)
        local = pair - (end[t] - n_pixels[t])
        pixel = torch.stack([local % size[t, 0], local // size[t, 0]], 1) + low[t]
        at = (pixel * SUBPIXELS)[:, None] + pattern
        edges = []
        covered = torch.ones(at.shape[:2], dtype=torch.bool, device=keys.device)
        for first, last in ((b, c), (c, a), (a, b)):
            direction = (last - first)[t, None]
            edge = _cross(direction, at - first[t, None])
            # The top-left rule.
            dx, dy = direction.unbind(-1)
            covered &= (edge > 0) | ((edge == 0) & ((dy < 0) | ((dy == 0) & (dx > 0))))
            edges.append(edge)
        share_b = edges[1].double() * inverse[t, None]
        share_c = edges[2].double() * inverse[t, None]
        z = za[t, None] + share_b * (zb - za)[t, None] + share_c * (zc - za)[t, None]
        level = ((z + 1.0) * 2.0**30).clamp(0.0, 2.0**31 - 1).long()
        key = (level << 32) | numbers[t, None]
        place = (pixel[:, 1:] * width + pixel[:, :1]) * n_samples
        place = place + torch.arange(n_samples, device=keys.device)
        keys.scatter_reduce_(0, place[covered], key[covered], "amin")


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _weights(view: Tensor, faces: Tensor, ids: Tensor, found: Tensor) -> Tensor:
    """Of the corners, float64 [N,3], at the samples that found a triangle."""
    height, width, n_samples = ids.shape
    row, column, sample = found.nonzero().unbind(1)
    at = torch.stack([column, row], 1) * SUBPIXELS + row.new_tensor(PATTERNS[n_samples])[sample]
    size = view.new_tensor([width * SUBPIXELS, height * SUBPIXELS])
    x, y = (at * (2.0 / size) - 1.0).unbind(1)
    y = -y
    corners = view[faces[ids[found].long()].long()]
    u = corners[..., 0] - x[:, None] * corners[..., 3]
    v = corners[..., 1] - y[:, None] * corners[..., 3]
    parts = u.roll(-1, 1) * v.roll(-2, 1) - u.roll(-2, 1) * v.roll(-1, 1)
    parts = torch.where(parts.sum(1, keepdim=True) > 0, parts, -parts).clamp(min=0.0)
    total = parts.sum(1, keepdim=True)
    return torch.where(total > 0, parts / total, 1.0 / 3.0).float()
