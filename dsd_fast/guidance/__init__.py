"""Score distillation: what views ask for, noise levels, trajectories, and the gradients of the
formulations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.text import PromptEmbeddings

# Formulations register themselves, and are listed in the order of these imports.
from dsd_fast.guidance.dsd import DSDGuidance, dsd_gradient  # isort: skip
from dsd_fast.guidance import baselines, vsd, cfd, sim  # noqa: F401  isort: skip
from dsd_fast.guidance.base import Guidance, GuidanceOutput, distillation_loss
from dsd_fast.guidance.conditions.base import Conditions
from dsd_fast.guidance.conditions.multiview import MultiViewConditions, MultiViewConfig
from dsd_fast.guidance.conditions.pose import PoseConditions
from dsd_fast.guidance.conditions.text import TextConditions, view_embeddings
from dsd_fast.guidance.config import GuidanceConfig
from dsd_fast.guidance.levels import timestep
from dsd_fast.guidance.plan import Plan
from dsd_fast.guidance.registry import FORMULATIONS, formulation
from dsd_fast.guidance.rows import combine
from dsd_fast.guidance.trajectory import seed_noise
from dsd_fast.ranges import check

__all__ = [
    "FORMULATIONS",
    "METHODS",
    "Conditions",
    "DSDGuidance",
    "Guidance",
    "GuidanceConfig",
    "GuidanceOutput",
    "MultiViewConditions",
    "MultiViewConfig",
    "Plan",
    "PoseConditions",
    "PromptEmbeddings",
    "TextConditions",
    "combine",
    "distillation_loss",
    "dsd_gradient",
    "formulation",
    "make_guidance",
    "seed_noise",
    "settings",
    "timestep",
    "view_embeddings",
]

# Names of the formulations, those registered later included.
METHODS = FORMULATIONS.keys()


def settings(method: str, max_steps: int) -> dict[str, Any]:
    """Fields of GuidanceConfig that `--guidance.method` brings along; none for DSD."""
    return FORMULATIONS[method].settings(max_steps)


def make_guidance(
    cfg: GuidanceConfig,
    model: DiffusionModel,
    conditions: Conditions | PromptEmbeddings,
    noise: Tensor,
    max_steps: int,
) -> Guidance:
    """The formulation that `cfg.method` names; arguments and errors as of `Guidance`."""
    check(cfg)
    return FORMULATIONS[cfg.method](cfg, model, conditions, noise, max_steps)
