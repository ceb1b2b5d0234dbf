"""Noise that sticks to a surface: unit variance, white within a view, the same from view to view.

The surface is a sphere in front of nothing, seen by the training cameras' rays in closed form.
"""

import itertools
import math

import pytest
import torch
from runs import SMALL

from dsd_fast.guidance.plan import Plan, PlanKind
from dsd_fast.guidance.surface_noise import SHELLS, SurfaceNoise, equal_area
from dsd_fast.run import cli
from dsd_fast.scene.cameras import camera_rays, eval_camera, look_at, orbit_positions
from dsd_fast.scene.field_scene import FieldScene

SIZE, PIXELS = 32, 64
RADIUS, DISTANCE, FOVY = 0.6, 1.9, 60.0


def noise_of(seed, n=1, size=SIZE):
    return torch.randn(n, 4, size, size, generator=torch.Generator().manual_seed(seed))


def camera(azimuth, elevation=20.0, distance=DISTANCE):
    angles = (torch.deg2rad(torch.tensor([angle])) for angle in (elevation, azimuth))
    position = orbit_positions(*angles, torch.tensor([distance]))
    return look_at(position, torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 1.0]]))


def sphere(azimuth, radius=RADIUS, pixels=PIXELS, distance=DISTANCE):
    """[1,H,W,4]: what a camera sees of a sphere around the origin, and whether it does."""
    fovy = torch.tensor([math.radians(FOVY)])
    origins, directions = camera_rays(camera(azimuth, distance=distance), fovy, pixels, pixels)
    toward = (origins * directions).sum(-1)
    inside = toward.square() - origins.square().sum(-1) + radius**2
    t = -toward - inside.clamp_min(0).sqrt()
    points = origins + t[..., None] * directions
    return torch.cat([points, (inside > 0).float()[..., None]], -1)


def inner(surface):
    """Latent pixels [h,w] that see nothing but the surface."""
    whole = torch.nn.functional.avg_pool2d(surface[..., 3], PIXELS // SIZE)[0] > 0.999
    return whole & (torch.nn.functional.avg_pool2d(whole[None].float(), 3, 1, 1)[0] > 0.999)


@pytest.fixture(scope="module")
def samples():
    """A view's noise for 200 seeds: [200,4,h,w], and which pixels are the sphere's."""
    surface = sphere(30.0)
    noises = [SurfaceNoise(noise_of(seed)).of_views(surface)[0] for seed in range(200)]
    return torch.stack(noises), inner(surface)


def test_it_has_unit_variance_everywhere(samples):
    noise, inside = samples
    assert 80 < inside.sum() < SIZE**2 / 2
    for part in (inside, ~inside):
        mean, variance = noise[:, :, part].mean((0, 1)), noise[:, :, part].var((0, 1))
        # 800 numbers a pixel: five standard errors
        assert mean.abs().max() < 5 / math.sqrt(800)
        assert (variance - 1).abs().max() < 5 * math.sqrt(2 / 800)
        assert variance.mean() == pytest.approx(1.0, abs=0.015)


def test_it_is_white_within_a_view(samples):
    noise, inside = samples
    for rows, columns in ((0, 1), (1, 0), (1, 1), (0, 2), (3, 2)):
        moved = noise.roll((-rows, -columns), (2, 3))
        both = inside & inside.roll((-rows, -columns), (0, 1))
        product = (noise * moved)[:, :, both].mean((0, 1))
        assert product.abs().max() < 5 / math.sqrt(800), (rows, columns)
        assert product.mean().abs() < 0.015
    # nor do the channels tell of each other
    assert (noise[:, 0] * noise[:, 1])[:, inside].mean().abs() < 0.01


def test_pixels_share_no_cell():
    """Exactly: where each cell's noise is its number's unit vector, pixels are orthogonal."""
    made = SurfaceNoise(noise_of(0, size=4))
    made._cells = torch.eye(len(made._cells))
    surface = sphere(0.0, 0.9, pixels=16)
    made._behind = torch.zeros(1, 1, len(made._cells), 4, 4)
    pixels = made.of_views(surface)[0].flatten(1)  # [cells, h w]
    gram = pixels.T @ pixels
    seen = gram.diagonal() > 0
    assert 8 < seen.sum() <= 16
    torch.testing.assert_close(gram, torch.diag(seen.float()))


def pixel_of(points, azimuth, distance=DISTANCE):
    """Rows, columns, and whether seen well from the front, of points [N,3] in a camera's latent."""
    c2w = camera(azimuth, distance=distance)[0]
    seen = (points - c2w[:3, 3]) @ c2w[:3, :3]
    focal = 0.5 * SIZE / math.tan(math.radians(FOVY) / 2)
    column, row = (
        (SIZE / 2 + sign * focal * seen[:, i] / -seen[:, 2]).long() for i, sign in ((0, 1), (1, -1))
    )
    toward = ((c2w[:3, 3] - points) * points).sum(-1)
    return row, column, toward > 0.6 * distance * points.norm(dim=-1)


def middles(surface):
    """Points [h w,3] at the middles of latent pixels."""
    pooled = torch.nn.functional.avg_pool2d(surface[0, ..., :3].permute(2, 0, 1), PIXELS // SIZE)
    return pooled.flatten(1).T


def correlation(a, b):
    return float((a * b).mean() / (a.std() * b.std()))


@pytest.mark.parametrize("radius", [RADIUS, 0.25])
@pytest.mark.parametrize("azimuth", [0.0, 0.5, 5.0, 20.0])
def test_a_point_has_the_same_noise_in_two_views(azimuth, radius):
    """A pixel of one view and that of another in which its middle lies overlap by up to the whole:
    on average over where in the pixel that is, by (3/4)^2. Of a small object as of a large one."""
    made = SurfaceNoise(noise_of(0))
    there, here = sphere(0.0, radius), sphere(azimuth, radius)
    first, second = (made.of_views(surface)[0] for surface in (there, here))
    inside = inner(here).flatten()
    row, column, front = pixel_of(middles(here)[inside], 0.0)
    assert front.sum() > (60 if radius == RADIUS else 8)
    a, b = first[:, row, column][:, front], second.flatten(1)[:, inside][:, front]
    assert correlation(a, b) > (0.97 if azimuth == 0 else 0.45)
    other = SurfaceNoise(noise_of(1)).of_views(there)[0][:, row, column][:, front]
    assert abs(float((other * b).mean())) < (0.2 if radius == RADIUS else 0.5)


def test_a_view_from_afar_has_the_noise_of_near_ones():
    """A pixel from twice as far covers four of a near view, whose noise it has half the sum of."""
    made = SurfaceNoise(noise_of(0))
    near, far = sphere(0.0), sphere(0.0, distance=2 * DISTANCE)
    of_near, of_far = (made.of_views(surface)[0] for surface in (near, far))
    inside = inner(near).flatten()
    row, column, front = pixel_of(middles(near)[inside], 0.0, 2 * DISTANCE)
    pixel = (row * SIZE + column)[front]
    total = torch.zeros(4, SIZE**2).index_add_(1, pixel, of_near.flatten(1)[:, inside][:, front])
    count = torch.zeros(SIZE**2).index_add_(0, pixel, torch.ones(len(pixel)))
    covered = count >= 3
    assert covered.sum() > 12
    half = total / count.clamp_min(1).sqrt()
    assert correlation(half[:, covered], of_far.flatten(1)[:, covered]) > 0.6


def test_a_cell_is_four_smaller_ones():
    made = SurfaceNoise(noise_of(0, size=4))
    sides, begins = made._sides.tolist(), made._begins.tolist()
    assert sides == [32, 16, 8, 4]
    levels = [
        made._cells[begin : begin + SHELLS * side**2].view(SHELLS, side, side, 4)
        for begin, side in zip(begins, sides)
    ]
    assert sum(level[..., 0].numel() for level in levels) == len(made._cells)
    for fine, coarse in itertools.pairwise(levels):
        four = fine[:, ::2, ::2] + fine[:, 1::2, ::2] + fine[:, ::2, 1::2] + fine[:, 1::2, 1::2]
        torch.testing.assert_close(coarse, four / 2)
    assert levels[0].var() == pytest.approx(1.0, abs=0.05)
    assert levels[2].var() == pytest.approx(1.0, abs=0.15)


def test_it_stays_where_the_surface_comes_nearer():
    made = SurfaceNoise(noise_of(0))
    near, far = sphere(0.0, 0.60), sphere(0.0, 0.62)
    both = inner(near) & inner(far)
    a, b = (made.of_views(surface)[0][:, both] for surface in (near, far))
    assert float((a * b).mean()) > 0.6
    # beyond the border of a shell it is another
    outer = made.of_views(torch.cat([near[..., :3] * (1 + 1 / SHELLS / 0.6), near[..., 3:]], -1))
    assert abs(float((a * outer[0][:, both]).mean())) < 0.2


def test_behind_the_object_is_the_seed_noise():
    noise = noise_of(0, 2)
    made, nothing = SurfaceNoise(noise), torch.zeros(2, PIXELS, PIXELS, 4)
    assert torch.equal(made.of_views(nothing), noise)
    assert torch.equal(made.behind(2), noise)
    assert torch.equal(SurfaceNoise(noise[:1]).behind(3), noise[:1].expand(3, -1, -1, -1))
    surface = sphere(0.0)
    corner = made.of_views(surface.expand(2, -1, -1, -1))[:, :, 0, 0]
    assert torch.equal(corner, noise[:, :, 0, 0])


def test_seeds_and_views_have_their_own():
    """Views of an item share what is on the surface, and not what is behind."""
    noise = noise_of(0, 4)  # two seeds of two views
    surface = torch.cat([sphere(azimuth) for azimuth in (0.0, 90.0)])
    made = SurfaceNoise(noise, n_views=2).of_views(torch.cat([surface, surface]))
    for seed in range(2):
        alone = SurfaceNoise(noise[2 * seed : 2 * seed + 2], n_views=2)
        assert torch.equal(made[2 * seed : 2 * seed + 2], alone.of_views(surface))
    assert not torch.equal(made[0], made[2])
    # one seed, two items
    one = SurfaceNoise(noise[:2], n_views=2).of_views(torch.cat([surface, surface]))
    assert torch.equal(one[:2], one[2:])
    same = SurfaceNoise(noise[:1])
    assert torch.equal(same.of_views(surface[:1]), SurfaceNoise(noise[:1]).of_views(surface[:1]))


def test_what_is_not_finite_is_nowhere():
    made, surface = SurfaceNoise(noise_of(0)), sphere(0.0)
    for value in (float("nan"), float("inf"), -float("inf"), 1e30):
        bad = surface.clone()
        bad[0, ::3, ::5] = value
        assert made.of_views(bad).isfinite().all()
    assert made.of_views(torch.ones_like(surface) * torch.tensor([0.0, 0, 0, 1])).isfinite().all()


def test_directions_take_their_share_of_the_map():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(400_000, 3, generator=generator)
    place = equal_area(points)
    assert place.min() >= 0 and place.max() <= 1
    counts = torch.histogramdd(place, bins=[8, 8], range=[0.0, 1.0, 0.0, 1.0]).hist
    expected = len(points) / 64
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)
    torch.testing.assert_close(equal_area(7 * points[:9]), place[:9])
    # near points are near, but where the map's border is folded
    moved = equal_area(points + 1e-4 * torch.randn(points.shape, generator=generator))
    assert ((moved - place).norm(dim=-1) < 0.01).float().mean() > 0.99


def test_a_plan_says_what_a_surface_is():
    t = torch.zeros(1, dtype=torch.int64)
    plan = Plan(PlanKind(1, "drawn", False), t, t, {"t": t}, t.device)
    surface = torch.zeros(1, 8, 8, 4)
    told = plan.seeing(surface)
    assert told.surface is surface and plan.surface is None and told.tensors is plan.tensors
    with pytest.raises(ValueError, match=r"expected a surface \[B,H,W,4\].*got \[1, 8, 8, 3\]"):
        plan.seeing(surface[..., :3])


def test_a_field_says_where_its_surface_is():
    """At the mean depth of each pixel's ray, in half edges of the box."""
    argv = ["--prompt", "a chair", *SMALL, "--field.radius", "2", "--renderer.no-grid-prune"]
    cfg = cli.parse(argv)[0].config
    scene = FieldScene(cfg, torch.Generator().manual_seed(0))
    views = eval_camera(cfg.cameras, 30.0, 15.0, size=(12, 12))
    image = scene.view(views, 0)
    surface = scene.surface(views, image)
    assert surface.shape == (1, 12, 12, 4) and not surface.requires_grad
    assert torch.equal(surface[..., 3:], image.opacity)
    seen = image.opacity[..., 0] > 0.05
    assert seen.any()
    depth = (2 * surface[..., :3] - views.rays_o).norm(dim=-1)
    torch.testing.assert_close((depth * image.opacity[..., 0])[seen], image.depth[..., 0][seen])
