"""White noise that sticks to an object's surface: two views of one point see the same noise there.

Multi-view consistent noise of Consistent Flow Distillation (Yan et al. 2025, arXiv 2501.05445).
Noise lives in cells of the surface, many to a pixel. A latent pixel has the sum of the cells that
it sees over the root of their number, which is what the integral of white noise over its footprint
comes to (Chang et al. 2024): of unit variance whatever their number is. Each cell belongs to one
pixel of a view, that in which its middle lies, so that pixels of a view are independent. Where no
cell is seen, the seed noise shows, as a picture behind the object.

A cell is an area of directions from the centre of the box, in one of four shells of the distance
from it. Surfaces that come nearer or go away keep their noise, as most do while they are optimised;
one that is seen along the direction from the centre has few cells, and may show the seed noise. A
cell is the sum of four smaller ones over the root of their number, and so on: a view takes those
that are as large as its samples are dense, so that a small object and a near one both have many to
a pixel, and views of one object from afar and near still agree.

The authors rasterise the pixels' quadrilaterals into three maps of directions, 1024 or 2048 cells
wide; here pixels are sampled in a raster, which takes no rasteriser and which a CUDA graph can
hold, on an equal-area map.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsd_fast.resize import bilinear
from dsd_fast.rng import stream_seed

# Of pixels less opaque than this nothing is a surface: the authors'.
OPAQUE = 0.1
# Shells of the distance from the centre, in the box's half edge: the authors'.
SHELLS = 4
# Samples of a latent pixel along a side.
SAMPLES = 8
# The smallest cells along a side of the map for each latent pixel across, and the sizes there are,
# each twice the one before. Of an object that fills the picture a pixel sees 20 of the smallest.
CELLS, SIZES = 8, 4
# Samples that a cell is to have at least, of the typical pixel: fewer would miss some of the cells.
_PER_CELL = 4.0
# Parts in which the distance of a sample from its cell's middle is measured.
_PARTS = 1 << 10
_NO_SAMPLE = torch.iinfo(torch.int64).max
_TINY = 1e-8


class SurfaceNoise:
    """The noise of S seeds' surfaces; all of it is a function of their seed noise.

    Memory: 4/3 * 4 SHELLS CELLS^2 C h^2 bytes a seed, of Stable Diffusion's latents 21 MiB.

    Args:
        noise: seed noise [S*V,C,h,h] float32, of V views of an object.
        n_views: V.
    """

    def __init__(self, noise: Tensor, n_views: int = 1) -> None:
        self.size = noise.shape[-1]
        self.side = CELLS * self.size
        self._behind = noise.unflatten(0, (-1, n_views))  # [S,V,C,h,h]
        sides = [self.side >> i for i in range(SIZES)]
        begins = [sum(SHELLS * side**2 for side in sides[:i]) for i in range(SIZES + 1)]
        self._n_cells = begins.pop()  # of a seed
        # Of each size, on the device.
        self._sides, self._begins = (
            torch.tensor(each, device=noise.device) for each in (sides, begins)
        )
        self._cells = torch.cat([self._drawn(of_seed) for of_seed in self._behind])  # [S*cells,C]

    def _drawn(self, noise: Tensor) -> Tensor:
        """Noise of a seed's cells, from the smallest on: [cells,C], the same on every device."""
        bits = int.from_bytes(noise.flatten()[:4].cpu().numpy().tobytes(), "little")
        generator = torch.Generator().manual_seed(stream_seed(bits, "surface"))
        shape = (SHELLS, self.side, self.side, noise.shape[-3])
        sizes = [torch.randn(shape, generator=generator)]
        for _ in range(SIZES - 1):
            halves = sizes[-1].unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
            sizes.append(halves.sum((2, 4)) / 2)
        return torch.cat([cells.flatten(0, 2) for cells in sizes]).to(noise.device)

    def behind(self, n_views: int) -> Tensor:
        """The seed noise of so many views, one seed's or one item's each: [B*V,C,h,h]."""
        n_items = n_views // self._behind.shape[1]
        return self._behind.expand(n_items, -1, -1, -1, -1).flatten(0, 1)

    def of_views(self, surface: Tensor) -> Tensor:
        """Noise of views [B*V,C,h,h] float32, of one seed or, of B seeds, of one an item.

        Args:
            surface: [B*V,H,W,4] float32, as of `Plan.surface`.
        """
        n_views = len(surface)
        points, seen = self._samples(surface)
        cell, off = self._cell(points, seen)
        # The sample nearest to a cell's middle has it; of equally near ones the first.
        order = torch.arange(cell.shape[1], device=cell.device)
        rank = torch.where(seen, (off * _PARTS).long() * len(order) + order, _NO_SAMPLE)
        nearest = cell.new_full((n_views, self._n_cells), _NO_SAMPLE)
        nearest = nearest.scatter_reduce(1, cell, rank, "amin")
        has = seen & (nearest.gather(1, cell) == rank)
        pixels = (self.size, SAMPLES, self.size, SAMPLES)
        cells = self._of_seeds(cell) * has[..., None]
        total = cells.unflatten(1, pixels).sum((2, 4)).permute(0, 3, 1, 2)
        count = has.unflatten(1, pixels).sum((2, 4))[:, None]
        return torch.where(count > 0, total / count.clamp_min(1).sqrt(), self.behind(n_views))

    def _of_seeds(self, cell: Tensor) -> Tensor:
        """Noise [B*V,N,C] of the cells with these numbers [B*V,N], each of its view's seed."""
        n_seeds, n_views = self._behind.shape[:2]
        if n_seeds > 1:
            seed = torch.arange(len(cell), device=cell.device) // n_views
            cell = cell + self._n_cells * seed[:, None]
        return self._cells.index_select(0, cell.flatten()).unflatten(0, cell.shape)

    def _samples(self, surface: Tensor) -> tuple[Tensor, Tensor]:
        """Points [B,N,3] at a raster over the latent pixels, and whether there is surface [B,N]."""
        there = (surface[..., 3:] > OPAQUE).to(surface.dtype)
        # A mean over what is surface alone. A rendering that is not finite has no gradient that
        # counts, but its points are indices here.
        points = (surface[..., :3] * there).nan_to_num(0.0, 0.0, 0.0)
        fine = SAMPLES * self.size
        image = torch.cat([points, there], -1).permute(0, 3, 1, 2)
        each = bilinear(image, (fine, fine)).flatten(2).transpose(1, 2)
        return each[..., :3] / each[..., 3:].clamp_min(_TINY), each[..., 3] > 0.5

    def _cell(self, points: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the cells at points [B,N,3], int64 [B,N], and the squared distance from the
        middle of each in its sides, at most 0.5."""
        place = equal_area(points)
        size = self._size_of(place, seen)
        side = self._sides[size].view(-1, 1)
        place = place * side[..., None]
        whole = place.floor().clamp_min(0).minimum(side[..., None] - 1)
        off = (place - whole - 0.5).square().sum(-1).clamp_max(0.5)
        shell = (points.norm(dim=-1) * SHELLS).clamp_max(SHELLS - 1).long()
        across, down = whole.long().unbind(-1)
        return self._begins[size].view(-1, 1) + (shell * side + down) * side + across, off

    def _size_of(self, place: Tensor, seen: Tensor) -> Tensor:
        """Which size of cells suits views [B] that see these places of the map [B,N,2]: the
        smallest of which a sample has at most a share, in the geometric mean over samples."""
        fine = SAMPLES * self.size
        grid, seen = place.unflatten(1, (fine, fine)), seen.unflatten(1, (fine, fine))
        across = grid[:, :-1, 1:] - grid[:, :-1, :-1]
        down = grid[:, 1:, :-1] - grid[:, :-1, :-1]
        area = (across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0]).abs()
        whole = seen[:, :-1, :-1] & seen[:, :-1, 1:] & seen[:, 1:, :-1]
        log_area = torch.where(whole, area.clamp_min(_TINY**2).log2(), 0.0).sum((1, 2))
        log_area = log_area / whole.sum((1, 2)).clamp_min(1)
        # Cells a sample, each size a quarter of the one before.
        log_cells = log_area + math.log2(self.side**2 * _PER_CELL)
        return (log_cells / 2).ceil().clamp(0, SIZES - 1).long()


def equal_area(points: Tensor) -> Tensor:
    """Directions of points [...,3] on a square [0,1]^2, areas in proportion: [...,2].

    The octahedral map of Clarberg 2008 ("Fast Equal-Area Mapping of the (Hemi)Sphere using SIMD").
    The origin, which has no direction, is anywhere.
    """
    x, y, z = (points / points.norm(dim=-1, keepdim=True).clamp_min(_TINY)).unbind(-1)
    radius = (1 - z.abs()).clamp_min(0).sqrt()
    down = radius * torch.atan2(y.abs(), x.abs()) * (2 / math.pi)
    across = radius - down
    below = z < 0
    across, down = torch.where(below, 1 - down, across), torch.where(below, 1 - across, down)
    return (torch.stack([across.copysign(x), down.copysign(y)], -1) + 1) / 2
