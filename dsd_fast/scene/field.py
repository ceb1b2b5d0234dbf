"""The 3D field: hash grid → density, features, normals ("implicit volume").

All arithmetic is float32 with autocast off (or float64, for a field converted to double). One fused
operator does the work of a field of the usual shape (`ops.fused_field`); on CUDA it reads a float16
copy of the table unless `FieldConfig.half_table` is off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from annotated_types import Interval
from torch import Tensor, nn

from dsd_fast import ops, ranges
from dsd_fast._backend import backend
from dsd_fast.ops.field import FieldShape, activate, can_fuse, density_and_normal, density_bias
from dsd_fast.ops.hashgrid import GridSpec
from dsd_fast.ranges import ConfigError, check
from dsd_fast.scene.encoding import HashGrid
from dsd_fast.scene.mlp import MLP

# Points per block of a query without gradients. Small blocks stay in the CPU's caches; on a GPU the
# block only bounds memory (about 400 bytes a point).
_QUERY_BLOCK = {"cpu": 16384, "cuda": 1 << 19}


@dataclass
class GridConfig:
    # Number of resolutions.
    n_levels: Annotated[int, Interval(ge=1, le=32)] = 16
    # Features per level.
    n_features: Literal[2, 4] = 2
    # Base-2 logarithm of the largest table of a level.
    log2_table_size: Annotated[int, Interval(ge=3, le=24)] = 19
    # Resolution of the coarsest level.
    base_resolution: Annotated[int, Interval(ge=2, le=4096)] = 16
    # Growth of the resolution from level to level.
    per_level_scale: Annotated[float, Interval(ge=1, le=64)] = 1.447269237440378
    # Levels used from the start.
    start_level: ranges.Count = 8
    # Step after which further levels are unlocked.
    start_step: ranges.CountOrNone = 2000
    # Steps from one unlocked level to the next.
    update_steps: ranges.Count = 500

    def validate(self) -> None:
        """Raise ConfigError for settings that do not go together."""
        if self.start_level > self.n_levels:
            raise ConfigError(
                f"start_level: expected 1 to n_levels = {self.n_levels}, got {self.start_level}"
            )


@dataclass
class FieldConfig:
    # The hash grid and when its levels are unlocked.
    grid: GridConfig = field(default_factory=GridConfig)
    # Half the edge of the box around the object.
    radius: Annotated[ranges.Length, tyro.conf.arg(aliases=["--renderer.radius"])] = 2.0
    # Initial shape added to the raw density: a cone (blob_magic3d), a Gaussian (blob_dreamfusion),
    # or a constant.
    density_bias: Literal["blob_magic3d", "blob_dreamfusion"] | ranges.Number = "blob_magic3d"
    # Height of the initial blob in raw density.
    density_blob_scale: ranges.Number = 10.0
    # Size of the initial blob.
    density_blob_std: ranges.Length = 0.5
    # From raw density to density.
    density_activation: Literal["softplus", "exp", "trunc_exp"] = "softplus"
    # How much finer grid levels count for the density, and not for colours: a level of resolution r
    # as the coarsest one's over r, to this power. 0: all alike; 1: none makes surfaces steeper than
    # another.
    density_fade: Annotated[float, Interval(ge=0, le=4)] = 0.0
    # Where normals come from: the density's gradient (analytic), differences of densities
    # (finite_difference, finite_difference_laplacian), or a network of their own (pred).
    normal_type: Literal["analytic", "finite_difference", "finite_difference_laplacian", "pred"] = (
        "analytic"
    )
    # Distance of the points of finite differences.
    finite_difference_normal_eps: Annotated[float, Interval(ge=1e-6, le=1e3)] = 0.01
    # Neurons of the hidden layers.
    n_neurons: ranges.Neurons = 64
    # Hidden layers of each network.
    n_hidden_layers: ranges.Layers = 1
    # On CUDA, look up features in a float16 copy of the table and run the networks on tensor cores;
    # the table itself, its gradient and the optimizer stay float32.
    half_table: bool = True

    def validate(self) -> None:
        """Raise ConfigError for settings that do not go together."""
        if self.normal_type == "analytic" and self.n_hidden_layers != 1:
            raise ConfigError(
                "normal_type: 'analytic' needs n_hidden_layers = 1, got "
                f"{self.n_hidden_layers}; use 'finite_difference' for deeper networks"
            )


class FieldOutput(NamedTuple):
    density: Tensor  # [N]
    features: Tensor  # [N,3] before any activation
    normal: Tensor | None  # [N,3] unit, outward


class Field(nn.Module):
    """Density, features and normals at points of the box [-radius, radius]³.

    `grid.table` starts with the same numbers for every seed; the networks are drawn from
    `generator`.
    """

    _level_weights: Tensor | None

    def __init__(self, cfg: FieldConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check(cfg)
        self.cfg = cfg
        self.grid = HashGrid(
            cfg.grid.n_levels,
            cfg.grid.n_features,
            cfg.grid.log2_table_size,
            cfg.grid.base_resolution,
            cfg.grid.per_level_scale,
        )

        def network(n_outputs: int) -> MLP:
            return MLP(
                self.grid.spec.n_outputs,
                n_outputs,
                n_neurons=cfg.n_neurons,
                n_hidden_layers=cfg.n_hidden_layers,
                generator=generator,
            )

        self.density_network = network(1)
        self.feature_network = network(3)
        self.register_buffer("_level_weights", _level_weights(self.grid.spec, cfg), False)
        self.normal_network = network(3) if cfg.normal_type == "pred" else None
        self._can_fuse = (
            cfg.normal_type != "pred"
            and cfg.n_hidden_layers == 1
            and can_fuse(self.grid.spec, cfg.n_neurons)
        )
        self._half_table: Tensor | None = None
        self._half_of: tuple[int, int] | None = None  # address and version that were copied
        self.set_step(0)

    @property
    def shape(self) -> FieldShape:
        """What the field's arithmetic depends on beside its parameters."""
        cfg = self.cfg
        return FieldShape(
            self.grid.spec,
            cfg.radius,
            cfg.density_bias,
            cfg.density_blob_scale,
            cfg.density_blob_std,
            cfg.density_activation,
        )

    def set_step(self, step: int) -> None:
        """Unlock the levels of a training step; the others read zero."""
        grid = self.cfg.grid
        unlocked = max(step - grid.start_step, 0) // grid.update_steps
        self.grid.n_active_levels = min(grid.start_level + unlocked, grid.n_levels)

    def density(self, points: Tensor, n_valid: Tensor | None = None) -> Tensor:
        """Density [N] at points [N,3] in world units.

        Without gradients the points are taken in blocks, so that memory stays small. `n_valid` is
        as in `forward`.
        """
        self._check_rows(points, n_valid)
        with torch.autocast(points.device.type, enabled=False):
            if self._is_fused(points):
                return self._fused(points, n_valid, features=False, normals=False)[0]
            if torch.is_grad_enabled():
                return self._density(points)
            density = points.new_empty(len(points))
            for block in _blocks(points):
                density[block] = self._density(points[block])
            return density

    def forward(
        self, points: Tensor, normals: bool = True, n_valid: Tensor | None = None
    ) -> FieldOutput:
        """Everything at points [N,3]; `normal` is None where it is not asked for.

        Gradients go to the grid and the networks, from normals too; not to the points. With
        `n_valid`, 0-dim int64 on their device, points from this one on give zeros and take no
        part in gradients; only where `skips_rows` says so.
        """
        self._check_rows(points, n_valid)
        with torch.autocast(points.device.type, enabled=False):
            if self._is_fused(points):
                return self._evaluate_fused(points, normals, n_valid)
            if torch.is_grad_enabled():
                return self._evaluate(points, normals)
            outputs = [self._evaluate(points[block], normals) for block in _blocks(points)]
            density, features, normal = zip(*outputs, strict=True)
            return FieldOutput(
                torch.cat(density), torch.cat(features), torch.cat(normal) if normals else None
            )

    def reads_half_table(self) -> bool:
        """Whether features are looked up in `half_table`."""
        return self.cfg.half_table and self.skips_rows(self.grid.table.device)

    def half_table(self) -> Tensor:
        """The float16 copy of the table, [spec.n_params]; made anew when the table has changed."""
        table, half = self.grid.table, self._half_table
        if half is None or half.device != table.device:
            half = self._half_table = torch.empty_like(table, dtype=torch.float16)
            self._half_of = None
        if self._half_of != (table.data_ptr(), table._version):
            half.copy_(table.detach())
            self._half_of = (table.data_ptr(), table._version)
        return half

    @contextmanager
    def changing_table(self) -> Iterator[Tensor | None]:
        """Within it whoever changes the table changes this float16 copy too; None if unused."""
        half, table = self.half_table() if self.reads_half_table() else None, self.grid.table
        yield half
        if half is not None:
            self._half_of = (table.data_ptr(), table._version)

    def skips_rows(self, device: torch.device) -> bool:
        """Whether `n_valid` is taken, for points of float32 on this device.

        Never on the CPU: nothing is gained there by not counting, and rows that are left out would
        make sums depend on how much room there was.
        """
        return device.type == "cuda" and self._fuses_on(device)

    def _fuses_on(self, device: torch.device) -> bool:
        return self._can_fuse and device.type in ("cpu", "cuda") and backend(device) != "torch"

    def _check_rows(self, points: Tensor, n_valid: Tensor | None) -> None:
        if n_valid is None:
            return
        if not (self._is_fused(points) and self.skips_rows(points.device)):
            raise ValueError(
                "n_valid: expected None for this field, dtype and device (see skips_rows); take "
                "the valid rows alone"
            )

    def _is_fused(self, points: Tensor) -> bool:
        is_float = points.dtype == self.grid.table.dtype == torch.float32
        return is_float and self._fuses_on(points.device)

    def _fused(
        self, points: Tensor, n_valid: Tensor | None, *, features: bool, normals: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        (w1d, w2d), (w1f, w2f) = self._density_weights(), self.feature_network.weights
        return ops.fused_field(
            points.contiguous(),
            self.grid.table,
            w1d,
            w2d,
            w1f,
            w2f,
            self.shape,
            self.grid.n_active_levels,
            features=features,
            normals=normals,
            half_table=self.half_table() if self.reads_half_table() else None,
            n_valid=n_valid,
        )

    def _evaluate_fused(self, points: Tensor, normals: bool, n_valid: Tensor | None) -> FieldOutput:
        analytic = self.cfg.normal_type == "analytic"
        density, features, normal = self._fused(
            points, n_valid, features=True, normals=normals and analytic
        )
        assert features is not None
        if normals and not analytic:
            normal = self._difference_normal(points, density)
        return FieldOutput(density, features, normal)

    def _evaluate(self, points: Tensor, normals: bool) -> FieldOutput:
        if normals and self.cfg.normal_type == "analytic":
            encoded, jacobian = self.grid.value_and_jacobian(self._to_unit_cube(points))
            w1, w2 = self._density_weights()
            density, normal = density_and_normal(points, encoded, jacobian, w1, w2, self.shape)
            return FieldOutput(density, self.feature_network(encoded), normal)
        encoded = self.grid(self._to_unit_cube(points))
        density = self._density_of(points, encoded)
        features = self.feature_network(encoded)
        if not normals:
            return FieldOutput(density, features, None)
        if self.normal_network is not None:
            normal = F.normalize(self.normal_network(encoded), dim=-1, eps=1e-12)
        else:
            normal = self._difference_normal(points, density)
        return FieldOutput(density, features, normal)

    def _density(self, points: Tensor) -> Tensor:
        if self._is_fused(points):
            return self._fused(points, None, features=False, normals=False)[0]
        return self._density_of(points, self.grid(self._to_unit_cube(points)))

    def _density_weights(self) -> list[Tensor]:
        """Of the density's network as it reads the encoding itself."""
        first, *others = self.density_network.weights
        return [first if self._level_weights is None else first * self._level_weights, *others]

    def _density_of(self, points: Tensor, encoded: Tensor) -> Tensor:
        if self._level_weights is not None:
            encoded = encoded * self._level_weights
        raw = self.density_network(encoded)[:, 0] + density_bias(points, self.shape)[0]
        return activate(raw, self.shape)[0]

    def _difference_normal(self, points: Tensor, density: Tensor) -> Tensor:
        eps = self.cfg.finite_difference_normal_eps
        offsets = eps * torch.eye(3, dtype=points.dtype, device=points.device)

        def shifted_density(offsets: Tensor) -> Tensor:
            shifted = points[:, None, :] + offsets
            shifted = shifted.clamp(-self.cfg.radius, self.cfg.radius)
            return self._density(shifted.reshape(-1, 3)).reshape(-1, 3)

        if self.cfg.normal_type == "finite_difference":
            difference = shifted_density(offsets) - density[:, None]
        else:
            difference = 0.5 * (shifted_density(offsets) - shifted_density(-offsets))
        return -F.normalize(difference / eps, dim=-1, eps=1e-12)

    def _to_unit_cube(self, points: Tensor) -> Tensor:
        return torch.add(0.5, points, alpha=0.5 / self.cfg.radius)


def _level_weights(spec: GridSpec, cfg: FieldConfig) -> Tensor | None:
    """What the density's network takes of each column of the encoding, [n_outputs]; None: all.

    A feature of a level of resolution r changes over 1 / r: with weights ~ 1 / r, what an
    optimizer's equal steps do to the features tilts the surface equally on all levels, and not by
    the finest most, as gravel.
    """
    if cfg.density_fade == 0:
        return None
    coarsest = spec.levels[0].resolution
    shares = [(coarsest / level.resolution) ** cfg.density_fade for level in spec.levels]
    return torch.tensor(shares).repeat_interleave(spec.n_features)


def _blocks(points: Tensor) -> Iterator[slice]:
    """At least one, of no points if there are none."""
    size = _QUERY_BLOCK.get(points.device.type, _QUERY_BLOCK["cuda"])
    for start in range(0, max(len(points), 1), size):
        yield slice(start, start + size)
