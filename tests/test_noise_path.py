"""Levels and predictions of diffusion models and flows."""

import pytest
import torch
from tiny_model import SCHEDULER

from dsd_fast.diffusion.noise_path import NoisePath


def draws(n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, n, 4, 5, 5, generator=generator, dtype=torch.float64)
    return x, eps


def path_of(prediction: str) -> NoisePath:
    if prediction == "flow":
        sigma = torch.linspace(0.001, 0.999, 1000, dtype=torch.float64)
        return NoisePath(1 - sigma, sigma, "flow")
    path = NoisePath.of_scheduler(SCHEDULER | {"prediction_type": prediction})
    return path.to("cpu", torch.float64)


KINDS = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
T = torch.tensor([3, 500, 998])


@KINDS
def test_what_a_network_is_to_predict_is_what_its_predictions_are_taken_for(prediction):
    path, (x, eps) = path_of(prediction), draws()
    z = path.noisy(x, eps, T)
    alpha, sigma = path.at(T)
    torch.testing.assert_close(z, alpha * x + sigma * eps)
    torch.testing.assert_close(path.noise(path.target(x, eps, T), z, T), eps)
    torch.testing.assert_close(path.clean(z, eps, T), x)


def test_targets_are_those_of_the_papers():
    x, eps = draws()
    assert path_of("epsilon").target(x, eps, T) is eps
    path = path_of("v_prediction")
    alpha, sigma = path.at(T)
    torch.testing.assert_close(path.target(x, eps, T), alpha * eps - sigma * x)
    assert torch.equal(path_of("flow").target(x, eps, T), eps - x)


def test_a_step_of_a_flow_is_eulers():
    path, (x, eps) = path_of("flow"), draws()
    velocity, lower = 1.7 * (eps - x), T - 2
    z = path.noisy(x, eps, T)
    moved = path.step(z, path.noise(velocity, z, T), T, lower)
    _, sigma = path.at(T)
    _, sigma_next = path.at(lower)
    torch.testing.assert_close(moved, z + (sigma_next - sigma) * velocity)


def test_a_step_is_ddims():
    from diffusers import DDIMScheduler

    path, (x, eps) = path_of("epsilon"), draws(1)
    theirs = DDIMScheduler(**SCHEDULER, clip_sample=False, set_alpha_to_one=False)
    theirs.set_timesteps(10)
    z = path.noisy(x, eps, torch.tensor([501]))
    want = theirs.step(2 * eps, 501, z, return_dict=False)[0]
    got = path.step(z, 2 * eps, torch.tensor([501]), torch.tensor([401]))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@KINDS
def test_a_step_of_no_length_is_none(prediction):
    path, (x, eps) = path_of(prediction), draws()
    lower = torch.tensor([3, 400, 998])
    moved = path.step(x, eps, T, lower)
    assert torch.equal(moved[[0, 2]], x[[0, 2]]) and not torch.equal(moved[1], x[1])


def test_weights():
    path = path_of("epsilon")
    alpha, sigma = path.at(T)
    torch.testing.assert_close(path.weight(T, "sds"), sigma**2)
    torch.testing.assert_close(path.weight(T, "ddim"), sigma / alpha)


def test_tables_that_are_no_path():
    with pytest.raises(ValueError, match=r"one shape \[levels\], got \[3\] and \[2\]"):
        NoisePath(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="prediction_type 'sample' is not supported"):
        NoisePath(torch.ones(3), torch.ones(3), "sample")
    with pytest.raises(ValueError, match="a flow has no betas"):
        NoisePath.of_scheduler({"prediction_type": "flow"})
