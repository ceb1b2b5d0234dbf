"""The grid's policy: which cells are visited when. (Its kernels: test_occupancy.py.)"""

import pytest
import torch

from dsd_fast import ops
from dsd_fast.scene.field import Field, FieldConfig, GridConfig
from dsd_fast.scene.occupancy import OccupancyConfig, OccupancyGrid

STEP_SIZE = 1.732 * 4 / 512


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _grid(**changes) -> OccupancyGrid:
    return OccupancyGrid(OccupancyConfig(**changes), radius=2.0, step_size=STEP_SIZE)


def test_initial_blob_occupies_the_known_cells(device):
    grid = _grid().to(device)
    field = Field(FieldConfig(grid=GridConfig(log2_table_size=12)), _generator()).to(device)
    assert grid.update(0, field.density, _generator())
    assert float(grid.occs.mean()) == pytest.approx(3.3e-4, rel=0.1)
    assert int(grid.binary.sum()) == pytest.approx(670, rel=0.1)
    assert grid.alpha_threshold() == float(grid.occs.mean())
    assert grid.binary[15, 15, 15] and not grid.binary[0, 0, 0]


def test_only_every_sixteenth_step_updates():
    grid = _grid(resolution=4)
    steps = [step for step in range(40) if grid.update(step, lambda p: p[:, 0], _generator())]
    assert steps == [0, 16, 32]


def test_points_lie_in_their_cells_in_x_major_order():
    grid = _grid(resolution=4)
    seen = []

    def density(points):
        seen.append(points)
        return points[:, 0] + 10

    grid.update(0, density, _generator())
    (points,) = seen
    cells = ((points + 2.0) / 1.0).floor().long()
    assert torch.equal((cells * torch.tensor([16, 4, 1])).sum(-1), torch.arange(64))
    torch.testing.assert_close(grid.occs, (points[:, 0] + 10) * STEP_SIZE)


def test_threshold_is_capped():
    grid = _grid(resolution=4)
    grid.update(0, lambda p: torch.full((len(p),), 1e3), _generator())
    assert grid.alpha_threshold() == 0.01
    assert grid.binary.all()


def test_after_warmup_a_part_is_visited_and_empty_cells_fade():
    grid = _grid(resolution=8)
    grid.update(0, lambda p: torch.where(p[:, 0] > 0, 5.0, 0.0), _generator())
    before, n_occupied = grid.occs.clone(), int(grid.binary.sum())
    assert n_occupied == 256
    counts = []

    def empty(points):
        counts.append(len(points))
        return torch.zeros(len(points))

    grid.update(256, empty, _generator())
    # A quarter of the cells at random, and as many of the occupied ones.
    assert counts == [128 + 128]
    ratio = grid.occs[before > 0] / before[before > 0]
    torch.testing.assert_close(ratio.unique(), torch.tensor([0.95, 1.0]))


def test_resumes_from_its_state():
    first, second = _grid(resolution=4), _grid(resolution=4)
    first.update(0, lambda p: p[:, 2].exp(), _generator())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.binary, second.binary)
    assert first.alpha_threshold() == second.alpha_threshold()


@pytest.mark.parametrize("name", ["resolution", "update_interval"])
def test_bad_configurations(name):
    with pytest.raises(ValueError, match=f"{name}: expected 1 or more, got 0"):
        _grid(**{name: 0})


@pytest.mark.parametrize("cells", ["ball", "corner", "rod", "all", "one"])
def test_a_march_through_the_tight_cube_finds_the_same_samples(cells):
    grid = _grid()
    x, y, z = torch.meshgrid(*3 * [torch.arange(32)], indexing="ij")
    grid.binary = {
        "ball": (x - 18) ** 2 + (y - 13) ** 2 + (z - 16) ** 2 < 30,
        "corner": (x > 28) & (y > 28) & (z < 2),
        "rod": (x == 31) & (z == 0) & (y > 3),
        "all": torch.ones_like(x, dtype=torch.bool),
        "one": (x == 7) & (y == 8) & (z == 30),
    }[cells]
    part, box = grid.tight()
    assert part.sum() == grid.binary.sum() and part.is_contiguous()
    assert part.shape == (len(part),) * 3 and (cells == "all") == (len(part) == 32)
    assert box[3] - box[0] == pytest.approx(len(part) / 8) and max(map(abs, box)) <= 2
    origins = torch.randn(4000, 3, generator=_generator(1)) * 3
    targets = torch.rand(4000, 3, generator=_generator(2)) * 4 - 2
    dirs = torch.nn.functional.normalize(targets - origins, dim=-1)
    whole = ops.march(origins, dirs, grid.binary, grid.aabb, STEP_SIZE)
    tight = ops.march(origins, dirs, part, box, STEP_SIZE)
    assert len(whole[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(whole, tight))


def test_a_grid_without_occupied_cells_has_no_tight_cube():
    grid = _grid(resolution=4)
    part, box = grid.tight()
    assert part is grid.binary and box == grid.aabb


def test_grown_cells_share_a_face_and_do_not_wrap_around(device):
    def density(points):
        corner, middle = torch.tensor([[-1.75] * 3, [0.25] * 3]).to(points)
        near = [(points - place).abs().amax(-1) < 0.25 for place in (corner, middle)]
        return (near[0] | near[1]).float()

    grid = _grid(resolution=8, grow=True, max_threshold=1e-9).to(device)
    grid.update(0, density, _generator())
    expected = {(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (4, 4, 4)}
    expected |= {(3, 4, 4), (5, 4, 4), (4, 3, 4), (4, 5, 4), (4, 4, 3), (4, 4, 5)}
    assert set(map(tuple, grid.binary.nonzero().tolist())) == expected
    # What was stored is of the cells themselves: nothing grows from update to update.
    assert int((grid.occs > 0).sum()) == 2
    grid.update(16, density, _generator(1))
    assert set(map(tuple, grid.binary.nonzero().tolist())) == expected
