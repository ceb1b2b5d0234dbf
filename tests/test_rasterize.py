"""Rasterising: the reference against the kernels bit for bit, edges, clipping, perspective."""

import math

import pytest
import torch
from torch import Tensor

from dsd_fast.ops import rasterize
from dsd_fast.ops.rasterize import PATTERNS, rasterize_reference
from dsd_fast.scene.cameras import CameraConfig, clip_matrices, eval_camera

FACES = [
    pytest.param(rasterize, id="compiled"),
    pytest.param(rasterize_reference, id="reference"),
]
SAMPLES = sorted(PATTERNS)


def sphere(n: int) -> tuple[Tensor, Tensor]:
    """A closed surface around the origin of 2 n (n - 1) triangles."""
    rings, sides = torch.meshgrid(torch.arange(n + 1), torch.arange(n), indexing="ij")
    up, around = rings * math.pi / n, sides * 2 * math.pi / n
    points = torch.stack([up.sin() * around.cos(), up.sin() * around.sin(), up.cos()], -1)
    points[0], points[-1] = points[0, 0], points[-1, 0]
    here = rings * n + sides
    right = rings * n + (sides + 1) % n
    a, b, c, d = here[:-1], right[:-1], here[1:], right[1:]
    faces = torch.cat([torch.stack([a, c, d], -1), torch.stack([a, d, b], -1)])
    return points.reshape(-1, 3), faces.reshape(-1, 3).int()


def seen_from(points: Tensor, distances: list[float], near: float = 0.1) -> Tensor:
    """Points [V,3] from places at these distances from the origin, in clip space [B,V,4]."""
    views = []
    for number, distance in enumerate(distances):
        turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(number))).Q
        x, y, z = (points @ turn.T).unbind(1)
        w = distance - z
        depth = (20 + near) / (20 - near) * w - 2 * 20 * near / (20 - near)
        views.append(torch.stack([1.9 * x, 1.9 * y, depth, w], 1))
    return torch.stack(views).contiguous()


def soup(n: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """n triangles in clip space, some across the planes of what is seen, some without an area."""
    generator = torch.Generator().manual_seed(n)
    corners = torch.randn(2, n, 3, 4, generator=generator) * spread
    size = torch.rand(2, n, 1, 1, generator=generator) ** 3
    corners = corners[:, :, :1] + size * (corners - corners[:, :, :1])
    corners[:, ::7, 2] = corners[:, ::7, 1]
    faces = torch.arange(3 * n).reshape(n, 3).int()
    return corners.reshape(2, 3 * n, 4).contiguous(), faces


def assert_same(positions: Tensor, faces: Tensor, height: int, width: int, n_samples: int) -> None:
    got = rasterize(positions, faces, height, width, n_samples)
    want = rasterize_reference(positions, faces, height, width, n_samples)
    assert got.ids.dtype == torch.int32 and got.weights.dtype == torch.float32
    assert got.ids.shape == (len(positions), height, width, n_samples)
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.weights, want.weights, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n_samples", SAMPLES)
@pytest.mark.parametrize("n", [3, 8, 70])
def test_same_triangles_as_reference(n, n_samples, device) -> None:
    """From outside, from inside, and through the surface."""
    points, faces = sphere(n)
    positions = seen_from(points, [3.0, 0.2, 1.01]).to(device)
    assert_same(positions, faces.to(device), 45, 67, n_samples)


@pytest.mark.parametrize("spread", [0.3, 2.0, 500.0])
@pytest.mark.parametrize("n", [1, 33, 400])
def test_same_triangles_of_a_soup(n, spread, device) -> None:
    positions, faces = soup(n, spread)
    assert_same(positions.to(device), faces.to(device), 61, 40, 4)


def test_same_triangles_where_all_are_as_large_as_the_picture(device) -> None:
    corners = torch.randn(1, 300, 4, generator=torch.Generator().manual_seed(0)) * 3
    corners[..., 3] = corners[..., 3].abs() + 3
    corners[..., 2] *= 0.5
    faces = torch.arange(300).reshape(100, 3).int()
    assert_same(corners.to(device), faces.to(device), 150, 130, 4)


@pytest.mark.parametrize("n_samples", SAMPLES)
@pytest.mark.parametrize("function", FACES)
def test_shared_edges_are_watertight(function, n_samples, device) -> None:
    """Triangles that fill the picture, drawn one by one: each sample is in exactly one of them.

    Vertices lie on samples, on edges of pixels and anywhere.
    """
    n = 6
    generator = torch.Generator().manual_seed(1)
    steps = torch.linspace(-1.0, 1.0, n + 1)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    move = torch.rand(2, n + 1, n + 1, generator=generator) * 0.2
    move[:, ::2] = move[:, ::2].mul(24).round() / 24
    x, y = x + move[0] * (x.abs() < 1), y + move[1] * (y.abs() < 1)
    at = torch.arange((n + 1) ** 2).reshape(n + 1, n + 1)
    a, b, c, d = at[:-1, :-1], at[:-1, 1:], at[1:, :-1], at[1:, 1:]
    faces = torch.cat([torch.stack([a, b, c], -1), torch.stack([b, d, c], -1)]).reshape(-1, 3)
    w = 1 + torch.rand(x.shape, generator=generator)
    positions = torch.stack([x * w, y * w, torch.zeros_like(x), w], -1).reshape(1, -1, 4).to(device)
    faces = faces.int().to(device)
    seen = [(function(positions, face[None], 24, 32, n_samples).ids == 0).int() for face in faces]
    assert torch.equal(sum(seen), torch.ones_like(seen[0]))
    assert (function(positions, faces, 24, 32, n_samples).ids >= 0).all()


def test_a_closed_surface_has_no_gaps(device) -> None:
    """From inside, however fine: every sample sees some triangle."""
    points, faces = sphere(200)
    positions = seen_from(points, [0.05, 0.5, 0.95], near=1e-3).to(device)
    assert (rasterize(positions, faces.to(device), 300, 300, 4).ids >= 0).all()


@pytest.mark.parametrize("function", FACES)
def test_weights_are_correct_in_perspective(function, device) -> None:
    """The weighted corners of a triangle lie where the sample looks, also beyond the near plane."""
    corners = torch.tensor(
        [[-0.4, -0.5, 1.2], [0.9, 0.1, -4.0], [-0.3, 0.8, 3.0]], dtype=torch.float32
    )
    positions = seen_from(corners, [2.0], near=0.1).to(device)
    faces = torch.tensor([[0, 1, 2]], dtype=torch.int32, device=device)
    found = function(positions, faces, 64, 48, 4)
    seen = found.ids >= 0
    assert 0.05 < seen.float().mean() < 0.95
    torch.testing.assert_close(found.weights[seen].sum(-1), torch.ones_like(found.ids[seen] * 1.0))
    at = found.weights[seen].double() @ positions[0].double()
    pattern = torch.tensor(PATTERNS[4], device=device) / 256
    _, row, column, sample = seen.nonzero().unbind(1)
    x = 2 * (column + pattern[sample, 0]) / 48 - 1
    y = 1 - 2 * (row + pattern[sample, 1]) / 64
    inside = (found.weights[seen] > 1e-3).all(-1)  # elsewhere the nearest place on the triangle
    assert inside.sum() > 100
    for i, want in ((0, x), (1, y)):
        error = (at[:, i] / at[:, 3] - want)[inside].abs()
        assert error.max() < 1e-5
    assert (at[inside, 2] >= -at[inside, 3] - 1e-5).all()  # in front of the near plane


@pytest.mark.parametrize("function", FACES)
def test_the_nearest_is_seen_and_the_first_of_equals(function, device) -> None:
    def square(z: float) -> list[list[float]]:
        return [[-1, -1, z, 1], [1, -1, z, 1], [1, 1, z, 1], [-1, 1, z, 1]]

    positions = torch.tensor([square(0.5) + square(-0.25) + square(-0.25)], dtype=torch.float32)
    quads = [[4 * i, 4 * i + 1, 4 * i + 2] for i in range(3)]
    quads += [[4 * i, 4 * i + 2, 4 * i + 3] for i in range(3)]
    faces = torch.tensor(quads, dtype=torch.int32, device=device)
    ids = function(positions.to(device), faces, 5, 7).ids
    assert set(ids.flatten().tolist()) == {1, 4}


@pytest.mark.parametrize("function", FACES)
def test_from_both_sides(function, device) -> None:
    corners = torch.tensor([[[-1.0, -1, 0, 1], [1, -1, 0, 1], [0, 1, 0, 1]]], device=device)
    one = function(corners, torch.tensor([[0, 1, 2]], dtype=torch.int32, device=device), 9, 9, 4)
    other = function(corners, torch.tensor([[2, 1, 0]], dtype=torch.int32, device=device), 9, 9, 4)
    assert torch.equal(one.ids, other.ids) and (one.ids == 0).any()
    torch.testing.assert_close(one.weights, other.weights.flip(-1))


BEHIND = [[-1.0, -1, -1.4, -1], [1, -1, -1.4, -1], [0, 1, -1.4, -1]]
NO_AREA = [[-1.0, -1, 0, 1], [1, 1, 0, 1], [0, 0, 0, 1]]
NOT_FINITE = [[-1.0, -1, 0, 1], [math.nan, -1, 0, 1], [0, math.inf, 0, 1]]
TOO_NEAR = [[-1.0, -1, -1.1, 1], [1, -1, -1.1, 1], [0, 1, -1.1, 1]]
TOO_FAR = [[-1.0, -1, 1.1, 1], [1, -1, 1.1, 1], [0, 1, 1.1, 1]]
AT_THE_EYE = [[0.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("function", FACES)
@pytest.mark.parametrize(
    "corners", [BEHIND, NO_AREA, NOT_FINITE, TOO_NEAR, TOO_FAR, AT_THE_EYE], ids=str
)
def test_what_is_not_seen(function, corners, device) -> None:
    positions = torch.tensor([corners], device=device)
    faces = torch.tensor([[0, 1, 2]], dtype=torch.int32, device=device)
    found = function(positions, faces, 8, 8, 4)
    assert (found.ids == -1).all() and (found.weights == 0).all()


@pytest.mark.parametrize("function", FACES)
def test_a_triangle_through_the_plane_of_the_eye(function, device) -> None:
    """A floor to the horizon: what lies in front is seen below it, what lies behind is not."""
    floor = torch.tensor([[-1e3, -1, -1e3], [1e3, -1, -1e3], [0, -1, 2e3]])
    x, y, z = floor.unbind(1)
    w, near, far = -z, 0.1, 5e3
    depth = (far + near) / (far - near) * w - 2 * far * near / (far - near)
    positions = torch.stack([x, y, depth, w], 1)[None].to(device)
    ids = function(
        positions, torch.tensor([[0, 1, 2]], dtype=torch.int32, device=device), 40, 40
    ).ids
    assert (ids[0, :20] == -1).all() and (ids[0, 21:] == 0).all()


def test_pixels_are_where_rays_go(device) -> None:
    """What a sample sees of a triangle lies on the ray of its pixel."""
    cfg = CameraConfig(eval_camera_distance=2.2, eval_fovy_deg=50.0)
    cameras = eval_camera(cfg, 40.0, 20.0, size=(30, 44), device=device)
    points, faces = sphere(12)
    points, faces = points.to(device) + 0.1, faces.to(device)
    positions = torch.cat([points, torch.ones_like(points[:, :1])], 1)
    positions = positions @ clip_matrices(cameras, 0.5, 5.0).transpose(1, 2)
    found = rasterize(positions.contiguous(), faces, 30, 44)
    seen = found.ids[..., 0] >= 0
    assert 0.1 < seen.float().mean() < 0.9
    corners = points[faces[found.ids[..., 0][seen].long()].long()]
    at = (found.weights[..., 0, :][seen][..., None] * corners).sum(1)
    towards = torch.nn.functional.normalize(at - cameras.camera_positions, dim=-1)
    error = (towards - cameras.rays_d[seen]).norm(dim=-1)
    assert error.median() < 1e-6
    assert error.max() < 2e-4  # at outlines, where a sample is up to a subpixel off


def test_share_of_a_triangle_in_the_samples(device) -> None:
    """Averaged over many pixels the samples measure the area."""
    corners = torch.tensor([[[-0.9, -0.8, 0, 1], [0.7, -0.3, 0, 1], [-0.2, 0.9, 0, 1]]])
    a, b, c = corners[0, :, :2]
    area = ((b - a)[0] * (c - a)[1] - (b - a)[1] * (c - a)[0]) / 8
    faces = torch.tensor([[0, 1, 2]], dtype=torch.int32, device=device)
    found = rasterize(corners.to(device), faces, 101, 103, 8)
    assert abs((found.ids >= 0).float().mean().item() - area.item()) < 1e-3


@pytest.mark.parametrize("n_samples", SAMPLES)
def test_patterns(n_samples) -> None:
    """No two samples of a pixel share a row or a column; their mean is its middle."""
    x, y = torch.tensor(PATTERNS[n_samples]).unbind(1)
    assert len(set(x.tolist())) == len(set(y.tolist())) == n_samples
    assert x.double().mean() == 128 and y.double().mean() == 128


@pytest.mark.parametrize("function", FACES)
@pytest.mark.parametrize("shape", [(0, 3, 1), (2, 0, 0), (2, 3, 0)], ids=str)
def test_nothing_to_draw(function, shape, device) -> None:
    n_views, n_vertices, n_faces = shape
    faces = torch.zeros(n_faces, 3, dtype=torch.int32, device=device)
    found = function(torch.zeros(n_views, n_vertices, 4, device=device), faces, 3, 5, 4)
    assert found.ids.shape == (n_views, 3, 5, 4) and found.weights.shape == (n_views, 3, 5, 4, 3)
    assert (found.ids == -1).all()


def test_threads_do_not_matter() -> None:
    positions, faces = soup(3000)
    n_threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(rasterize(positions, faces, 90, 70, 4))
    finally:
        torch.set_num_threads(n_threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_faces_without_vertices(device) -> None:
    """An error where it costs no waiting, nothing to see elsewhere."""
    corners = torch.tensor([[[-1.0, -1, 0, 1], [1, -1, 0, 1], [0, 1, 0, 1]]], device=device)
    for bad in ([0, 1, 3], [-1, 1, 2]):
        faces = torch.tensor([bad], dtype=torch.int32, device=device)
        if device.type == "cuda":
            assert (rasterize(corners, faces, 4, 4).ids == -1).all()
        else:
            with pytest.raises(ValueError, match="faces must be rows of positions, 0 to 2, got"):
                rasterize(corners, faces, 4, 4)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"height": 0}, ValueError, "height must be at least 1, got 0"),
        ({"width": 20000}, ValueError, "width must be at most 16384, got 20000"),
        ({"n_samples": 3}, ValueError, "n_samples must be 1, 4 or 8, got 3"),
        ({"n_samples": 2.0}, TypeError, "n_samples must be an integer"),
    ],
)
def test_errors_name_what_was_expected(arguments, error, text) -> None:
    given = {"height": 4, "width": 4} | arguments
    faces = torch.zeros(0, 3, dtype=torch.int32)
    with pytest.raises(error, match=text):
        rasterize(torch.zeros(1, 3, 4), faces, **given)


def test_opcheck(device) -> None:
    positions, faces = soup(5)
    arguments = positions.to(device), faces.to(device), 6, 7, 4
    torch.library.opcheck(torch.ops.dsd_fast.rasterize.default, arguments)


def test_a_cuda_graph_holds_it(device) -> None:
    """With other positions a replay sees other triangles."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    points, faces = sphere(30)
    near, far = (seen_from(points, [d]).to(device) for d in (2.0, 4.0))
    faces, place = faces.to(device), near.clone()
    rasterize(place, faces, 64, 64, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = rasterize(place, faces, 64, 64, 4)
    for positions in (far, near):
        place.copy_(positions)
        graph.replay()
        want = rasterize(positions, faces, 64, 64, 4)
        assert all(torch.equal(a, b) for a, b in zip(found, want))
