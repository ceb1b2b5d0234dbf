"""Diverse Score Distillation: text rows, noise levels, trajectories, and their gradient."""

from dsd_fast.diffusion.text import PromptEmbeddings
from dsd_fast.guidance.dsd import (
    DSDGuidance,
    GuidanceConfig,
    GuidanceOutput,
    distillation_loss,
    dsd_gradient,
)
from dsd_fast.guidance.multiview import MultiViewConfig, MultiViewDSD, MultiViewSDS
from dsd_fast.guidance.plan import Plan
from dsd_fast.guidance.prompt import combine, view_embeddings
from dsd_fast.guidance.schedule import timestep
from dsd_fast.guidance.trajectory import seed_noise

__all__ = [
    "DSDGuidance",
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
    "seed_noise",
    "timestep",
    "view_embeddings",
]
