"""Learnable encodings of points in the unit cube."""

import torch
from torch import Tensor, nn

from dsd_fast.ops.hashgrid import GridSpec, hashgrid, hashgrid_jacobian

# Start of the table, as in tiny-cuda-nn: small enough to be nearly zero, not zero, so that hash
# collisions are told apart from the first step on.
INIT_RANGE = 1e-4
INIT_SEED = 1337


class HashGrid(nn.Module):
    """Multiresolution hash grid with a learnable table (see `dsd_fast.ops.hashgrid`).

    Args:
        n_levels, n_features, log2_table_size, base_resolution, per_level_scale: shape of the grid,
            see `GridSpec`, which raises ValueError for impossible ones.

    Attributes:
        table: float32 Parameter [spec.n_params] in tiny-cuda-nn's element order, started at
            U(-1e-4, 1e-4) from a generator of its own with seed 1337, so the start does not depend
            on the run's seed.
        n_active_levels: finer levels than the first so many give zeros and cost nothing.
        spec: the GridSpec.

    Example:
        >>> grid = HashGrid(8, 2, 12, 4, 1.5)
        >>> grid(torch.rand(10, 3)).shape
        torch.Size([10, 16])
    """

    def __init__(
        self,
        n_levels: int,
        n_features: int,
        log2_table_size: int,
        base_resolution: int,
        per_level_scale: float,
    ) -> None:
        super().__init__()
        self.spec = GridSpec(
            n_levels, n_features, log2_table_size, base_resolution, per_level_scale
        )
        self.n_active_levels = n_levels
        generator = torch.Generator().manual_seed(INIT_SEED)
        table = torch.empty(self.spec.n_params)
        self.table = nn.Parameter(table.uniform_(-INIT_RANGE, INIT_RANGE, generator=generator))

    @property
    def n_outputs(self) -> int:
        """Columns of the encoding, inactive levels included."""
        return self.spec.n_outputs

    def forward(self, x: Tensor) -> Tensor:
        """Encodes x [N, 3] float32 in [0, 1]^3 -> [N, n_outputs]; twice differentiable in both."""
        return hashgrid(x, self.table, self.spec, self.n_active_levels)

    def value_and_jacobian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(encoding [N, n_outputs], its derivative by x [N, n_outputs, 3]) in one pass."""
        return hashgrid_jacobian(x, self.table, self.spec, self.n_active_levels)

    def extra_repr(self) -> str:
        finest = self.spec.levels[-1].resolution
        return (
            f"{self.spec.n_levels} levels x {self.spec.n_features} features, resolution "
            f"{self.spec.levels[0].resolution} to {finest}, {self.spec.n_params} parameters"
        )
