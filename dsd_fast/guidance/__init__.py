"""Score distillation: text rows, noise levels, trajectories, and the formulations' gradients."""

from __future__ import annotations

from torch import Tensor

from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.text import PromptEmbeddings
from dsd_fast.guidance.base import (
    METHODS,
    Guidance,
    GuidanceConfig,
    GuidanceOutput,
    distillation_loss,
)
from dsd_fast.guidance.baselines import ASD, CSD, FSD, ISM, NFSD, SDI, SDS, settings
from dsd_fast.guidance.conditions.multiview import MultiViewConfig, MultiViewDSD, MultiViewSDS
from dsd_fast.guidance.conditions.text import combine, view_embeddings
from dsd_fast.guidance.dsd import DSDGuidance, dsd_gradient
from dsd_fast.guidance.levels import timestep
from dsd_fast.guidance.plan import Plan
from dsd_fast.guidance.trajectory import seed_noise
from dsd_fast.guidance.vsd import VSD
from dsd_fast.ranges import check

__all__ = [
    "METHODS",
    "DSDGuidance",
    "Guidance",
    "GuidanceConfig",
    "GuidanceOutput",
    "MultiViewConfig",
    "MultiViewDSD",
    "MultiViewSDS",
    "Plan",
    "PromptEmbeddings",
    "combine",
    "distillation_loss",
    "dsd_gradient",
    "make_guidance",
    "seed_noise",
    "settings",
    "timestep",
    "view_embeddings",
]

_CLASSES: dict[str, type[Guidance]] = {
    "dsd": DSDGuidance,
    "sds": SDS,
    "sdi": SDI,
    "asd": ASD,
    "csd": CSD,
    "nfsd": NFSD,
    "ism": ISM,
    "vsd": VSD,
    "fsd": FSD,
}


def make_guidance(
    cfg: GuidanceConfig,
    model: DiffusionModel,
    prompts: PromptEmbeddings,
    noise: Tensor,
    max_steps: int,
) -> Guidance:
    """The formulation that `cfg.method` names; arguments and errors as of `Guidance`."""
    check(cfg)
    if cfg.method not in _CLASSES:
        raise ValueError(f"guidance.method {cfg.method} is for a multi-view model alone")
    return _CLASSES[cfg.method](cfg, model, prompts, noise, max_steps)
