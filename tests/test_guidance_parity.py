"""Guidance against numbers computed by the official code (mathematics.md 2 and 3)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsd_fast.diffusion import DiffusionModel
from dsd_fast.diffusion.noise_path import NoisePath
from dsd_fast.guidance import (
    DSDGuidance,
    GuidanceConfig,
    PromptEmbeddings,
    combine,
    dsd_gradient,
    timestep,
    view_embeddings,
)
from dsd_fast.guidance.levels import shifted_level

# Text rows are arithmetic alone; a gradient goes through up to nine float32 UNet forwards, whose
# convolutions sum in another order on another CPU (measured: at most 7e-6).
ROWS_TOLERANCE = 1e-6
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def official(golden) -> tuple[dict[str, Tensor], dict, DiffusionModel]:
    from dsd_fast.diffusion.components import quiet

    tensors, settings = golden("official_dsd")
    with quiet():
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel(**settings["unet_config"])
    weights = {k.removeprefix("unet."): v for k, v in tensors.items() if k.startswith("unet.")}
    unet.load_state_dict(weights)
    model = DiffusionModel(
        unet,
        torch.nn.Identity(),
        None,
        noise_path=NoisePath.of_scheduler(settings["scheduler"]),
    )
    return tensors, settings, model


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def levels_of(case: dict, settings: dict) -> tuple[Tensor, Tensor]:
    t = torch.tensor([case["t"]])
    u = torch.tensor([case["u"]], dtype=torch.float64)
    return t, shifted_level(t, u, settings["min_step_percent"])


def test_levels_of_steps(golden) -> None:
    _, settings = golden("official_dsd")
    low, high = settings["min_step_percent"], settings["max_step_percent"]
    for step, t in settings["t_of_step"].items():
        assert timestep(int(step), settings["max_steps"], low, high) == t
    for case in settings["cases"]:
        assert timestep(case["S"], settings["max_steps"], low, high) == case["t"]


def test_view_embeddings(golden) -> None:
    tensors, _ = golden("official_dsd")
    text, uncond = tensors["text_vd"], tensors["uncond_vd"]
    elevation, azimuth = tensors["view_elevation"], tensors["view_azimuth"]
    rows, weights = view_embeddings(text, uncond, elevation, azimuth)
    assert relative_error(rows, tensors["perp_embeddings"]) < ROWS_TOLERANCE
    assert relative_error(weights, tensors["perp_weights"]) < ROWS_TOLERANCE
    rows, weights = view_embeddings(text, uncond, elevation, azimuth, perp_neg=False)
    assert weights is None
    assert relative_error(rows, tensors["plain_embeddings"]) < ROWS_TOLERANCE


def test_dsd_gradient(official) -> None:
    """The public function with a predictor of the caller's own; plain mode, the smallest case."""
    tensors, settings, model = official
    case = settings["cases"][2]
    t, t_delta = levels_of(case, settings)
    rows, weights = view_embeddings(
        tensors["text_vd"],
        tensors["uncond_vd"],
        case["elevation"],
        case["azimuth"],
        case["perp_neg"],
    )

    def predict(z: Tensor, t: Tensor, scale: float) -> Tensor:
        copies = rows.shape[0]
        eps = model.unet(z.repeat(copies, 1, 1, 1), t.repeat(copies), rows).sample
        return combine(eps, weights, scale)

    grad = dsd_gradient(
        tensors[f"case{case['k']}.latents"],
        noise=tensors["noise"],
        t=t,
        t_delta=t_delta,
        predict=predict,
        alphas_cumprod=model.noise_path.alpha.square(),
        n_ddim_steps=settings["n_ddim_steps"],
        guidance_scale=settings["guidance_scale"],
    )
    assert relative_error(grad, tensors[f"case{case['k']}.grad"]) < TOLERANCE


@pytest.mark.parametrize("index", range(3))
def test_guidance_object(official, index: int) -> None:
    tensors, settings, model = official
    case = settings["cases"][index]
    guidance = DSDGuidance(
        GuidanceConfig(use_perp_neg=case["perp_neg"], trajectory="exact"),
        model,
        PromptEmbeddings(tensors["text_vd"], tensors["uncond_vd"]),
        tensors["noise"],
        settings["max_steps"],
    )
    t, t_delta = levels_of(case, settings)
    latents = tensors[f"case{case['k']}.latents"]
    output = guidance.at_levels(latents, case["elevation"], case["azimuth"], t, t_delta)
    assert relative_error(output.grad, tensors[f"case{case['k']}.grad"]) < TOLERANCE
    noisy = tensors[f"case{case['k']}.latents_noisy"]
    assert relative_error(output.latents_noisy, noisy) < TOLERANCE
