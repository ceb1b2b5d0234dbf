"""DSD's rivals on a prior whose score is known in closed form, and as methods of a run.

The prior is Gaussian: N(mu, S^2) with a prompt, whose mean stands in its embedding. Gradients are
held against the papers' formulas, written out again here in float64.
"""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import cuda_only
from runs import Runner
from tiny_model import SCHEDULER
from torch import nn

from dsd_fast import train
from dsd_fast.diffusion import DiffusionModel, load_model
from dsd_fast.diffusion.noise_path import NoisePath, alphas_cumprod
from dsd_fast.guidance import (
    FORMULATIONS,
    METHODS,
    GuidanceConfig,
    PromptEmbeddings,
    TextConditions,
    combine,
    make_guidance,
    settings,
)
from dsd_fast.guidance.surface_noise import SurfaceNoise
from dsd_fast.ranges import check
from dsd_fast.tasks.step_graphs import StepGraphs

ABAR = alphas_cumprod(SCHEDULER)
SPREAD = 0.5  # of the data around its mean
SIZE = 6
# Means that the texts stand for: the four views, the empty prompt, and a poor one.
MEANS, EMPTY, POOR = (0.7, 1.1, -0.4, 0.2), -0.3, 2.0
B = 3


class GaussianUNet(nn.Module):
    """The noise of N(mu, SPREAD^2) at level t; mu is the first number of the text."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.calls = 0

    def forward(self, x, t, encoder_hidden_states, return_dict):
        self.calls += 1
        mu = encoder_hidden_states[:, 0, 0].view(-1, 1, 1, 1)
        return (noise_of(x, ABAR[t].view(-1, 1, 1, 1), mu),)


def noise_of(z, abar, mu):
    """sigma (z - alpha mu) / (alpha^2 S^2 + sigma^2), of tensors of any dtype."""
    return (1 - abar).sqrt() * (z - abar.sqrt() * mu) / (abar * SPREAD**2 + 1 - abar)


def gaussian_guidance(method: str, n_seeds: int = B, max_steps: int = 100, **fields):
    model = DiffusionModel(
        GaussianUNet(),
        nn.Identity(),
        None,
        noise_path=NoisePath.diffusion(ABAR),
        latent_size=SIZE,
        engine="eager",
    )
    text = torch.tensor(MEANS).view(4, 1, 1)
    prompts = PromptEmbeddings(text, torch.full_like(text, EMPTY), torch.full((1, 1, 1), POOR))
    cfg = replace(GuidanceConfig(), method=method, **settings(method, max_steps))
    cfg = replace(cfg, **fields)
    noise = torch.randn(n_seeds, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return make_guidance(cfg, model, prompts, noise, max_steps)


class Reference:
    """A step of B views in float64: front, side and back, at levels t, with what was drawn."""

    azimuth = torch.tensor([0.0, 100.0, 180.0])
    mu = torch.tensor([MEANS[1], MEANS[0], MEANS[2]], dtype=torch.float64).view(B, 1, 1, 1)

    def __init__(self, guidance, t, t_delta):
        self.guidance = guidance
        self.t, self.t_delta = torch.tensor(t), torch.tensor(t_delta)
        generator = torch.Generator().manual_seed(1)
        self.chance = guidance.draw_noise(B, generator)
        self.x = torch.randn(B, 4, SIZE, SIZE, generator=generator)

    def got(self):
        return self.guidance.at_levels(
            self.x, torch.zeros(B), self.azimuth, self.t, self.t_delta, self.chance
        )

    def signal(self, t):
        abar = ABAR.double()[t].view(-1, 1, 1, 1)
        return abar, abar.sqrt(), (1 - abar).sqrt()

    def noisy(self, eps, t):
        _, alpha, sigma = self.signal(t)
        return alpha * self.x.double() + sigma * eps.double()

    def e(self, z, t, mu):
        return noise_of(z, self.signal(t)[0], mu)

    def cfg(self, z, t, scale):
        e_0 = self.e(z, t, EMPTY)
        return e_0 + scale * (self.e(z, t, self.mu) - e_0)

    def ddim(self, z, eps, here, there):
        _, alpha, sigma = self.signal(here)
        _, alpha_next, sigma_next = self.signal(there)
        return alpha_next * (z - sigma * eps) / alpha + sigma_next * eps

    def weighted(self, difference):
        return self.signal(self.t)[2].square() * difference


def sds(r, scale=100.0):
    eps = r.chance["eps"]
    return r.weighted(r.cfg(r.noisy(eps, r.t), r.t, scale) - eps)


def csd(r):
    z = r.noisy(r.chance["eps"], r.t)
    return r.weighted(r.e(z, r.t, r.mu) - r.e(z, r.t, EMPTY))


def nfsd(r):
    z = r.noisy(r.chance["eps"], r.t)
    e_0 = r.e(z, r.t, EMPTY)
    domain = torch.where((r.t < 200).view(-1, 1, 1, 1), e_0, e_0 - r.e(z, r.t, POOR))
    return r.weighted(domain + 7.5 * (r.e(z, r.t, r.mu) - e_0))


def asd(r):
    eps = r.chance["eps"]
    later = r.e(r.noisy(eps, r.t_delta), r.t_delta, r.mu)
    return r.weighted(r.cfg(r.noisy(eps, r.t), r.t, 7.5) - later)


def fsd(r):
    eps = torch.stack(
        [n.roll(-round(float(a) * SIZE / 360), -1) for n, a in zip(r.guidance.noise, r.azimuth)]
    )
    return r.weighted(r.cfg(r.noisy(eps, r.t), r.t, 7.5) - eps)


def ism(r):
    differences = []
    for i in range(B):
        one = Reference.__new__(Reference)
        one.x, one.mu = r.x[i : i + 1], r.mu[i : i + 1]
        t, s = int(r.t[i]), int(r.t[i]) - 50
        z, level = one.x.double(), 0
        while level < s:
            following = min(level + 200, s)
            z = one.ddim(z, one.e(z, [level], EMPTY), [level], [following])
            level = following
        at_s = one.e(z, [s], EMPTY)
        differences.append(one.cfg(one.ddim(z, at_s, [s], [t]), [t], 7.5) - at_s)
    _, alpha, sigma = r.signal(r.t)
    return sigma / alpha * torch.cat(differences)


def sdi(r):
    found = []
    for i in range(B):
        one = Reference.__new__(Reference)
        one.x, one.mu = r.x[i : i + 1], r.mu[i : i + 1]
        t = int(r.t[i])
        end = min(t + int(r.chance["above"][i] * 100), 999)
        levels = [*range(0, t, 100), end]
        z = one.x.double()
        for k, (here, there) in enumerate(itertools.pairwise(levels)):
            z = one.ddim(z, one.cfg(z, [here], -7.5), [here], [there])
            a, b = (float(ABAR.double()[level]) for level in (here, there))
            variance = (1 - a) / (1 - b) * (1 - b / a)
            z = z + 0.3 * variance**0.5 * r.chance["eps"][i, k].double()
        _, alpha, sigma = one.signal([end])
        kappa = (z - alpha * one.x) / sigma
        _, alpha, sigma = one.signal([t])
        x_t = alpha * one.x + sigma * kappa
        # x less what is left of x_t without its predicted noise
        found.append(one.x - (x_t - sigma * one.cfg(x_t, [t], 7.5)) / alpha)
    return torch.cat(found)


def cfd(r):
    # a latent has no surface: its noise is the seed's
    z = r.noisy(r.guidance.noise, r.t)
    _, alpha, sigma = r.signal(r.t)
    # x less the clean image that the prediction implies
    return r.x.double() - (z - sigma * r.cfg(z, r.t, 70.0)) / alpha


def sim(r):
    eps = r.chance["eps"].double()
    y = r.cfg(r.noisy(eps, r.t), r.t, 8.5) - eps
    n = 4 * SIZE**2
    length = (y.square().sum((1, 2, 3), keepdim=True) + n * 0.00054**2).sqrt()
    return n**0.5 * y / length


FORMULAS = [sds, csd, nfsd, asd, fsd, ism, sdi, cfd, sim]


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("t", [(980, 500, 100), (199, 200, 321)], ids=str)
def test_gradients_are_those_of_the_papers(formula, t):
    guidance = gaussian_guidance(formula.__name__, use_perp_neg=False)
    reference = Reference(guidance, t, [min(level + 19, 999) for level in t])
    output, want = reference.got(), formula(reference)
    assert output.finite and output.grad.dtype == torch.float32
    error = (output.grad.double() - want).norm() / want.norm()
    assert error < 2e-5
    torch.testing.assert_close(
        output.loss.double(), 0.5 * want.square().sum() / B, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("method", ["sds", "asd"])
def test_negatives_of_perp_neg_count(method):
    guidance = gaussian_guidance(method)
    reference = Reference(guidance, (700, 500, 300), (720, 510, 300))
    got = reference.got().grad.double()
    plan = guidance.plan_levels(
        torch.zeros(B), reference.azimuth, reference.t, reference.t_delta, reference.chance
    )
    eps = reference.chance["eps"]
    z = reference.noisy(eps, reference.t)
    first, second, share = (plan.tensors[name] for name in ("first", "second", "share"))
    bank = torch.tensor([*MEANS, *[EMPTY] * 4], dtype=torch.float64)
    mu = (share * bank[first] + (1 - share) * bank[second]).view(-1, 1, 1, 1)
    items = torch.tensor([*range(B), *range(B), *np.repeat(range(B), 2)])
    rows = noise_of(z[items], ABAR.double()[reference.t][items].view(-1, 1, 1, 1), mu)
    scale = guidance.cfg.guidance_scale
    target = combine(rows, plan.tensors["weights"], scale, standard_cfg=True)
    if method == "sds":
        linked = eps
    else:
        later = reference.noisy(eps, reference.t_delta)
        linked = noise_of(later, ABAR.double()[reference.t_delta].view(-1, 1, 1, 1), mu[:B])
    want = reference.weighted(target - linked)
    assert (got - want).norm() / want.norm() < 2e-5


def optimised(method: str, n_seeds: int = 16, steps: int = 300, **fields) -> torch.Tensor:
    """Latents [n_seeds,4,SIZE,SIZE] after Adam from zero, at scale 1 towards N(0.7, S^2)."""
    fields = {"guidance_scale": 1.0, "use_perp_neg": False, "standard_cfg": True} | fields
    guidance = gaussian_guidance(method, n_seeds, steps, **fields)
    guidance.conditions._bank.fill_(0.7)
    generator = torch.Generator().manual_seed(2)
    x = torch.zeros(n_seeds, 4, SIZE, SIZE, requires_grad=True)
    optimizer = torch.optim.Adam([x], 0.02)
    views = torch.zeros(n_seeds)
    for step in range(steps):
        output = guidance.from_latents(x, views, views, step, generator)
        optimizer.zero_grad()
        (n_seeds * output.loss).backward()
        optimizer.step()
    return x.detach()


def test_dsd_samples_the_prior_where_sds_seeks_its_mode():
    dsd = optimised("dsd", trajectory="exact")
    others = {method: optimised(method) for method in ("sds", "asd", "sdi")}
    for x in (dsd, *others.values()):
        assert x.mean() == pytest.approx(0.7, abs=0.06)
    # between the seeds, as far apart as the data
    assert dsd.std(0).mean() == pytest.approx(SPREAD, rel=0.15)
    for method, x in others.items():
        assert x.std(0).mean() < 0.25 * dsd.std(0).mean(), method


def test_fixed_noise_keeps_seeds_apart():
    assert optimised("fsd").std(0).mean() > 3 * optimised("sds").std(0).mean()


def test_consistent_flow_is_ddim_in_its_clean_variable():
    """A step down to a level, as long as sigma / alpha falls, is DDIM's, and x ends at its sample:
    of a Gaussian near mu + S eps."""
    steps = 200
    fields = {"guidance_scale": 1.0, "use_perp_neg": False, "standard_cfg": True}
    guidance = gaussian_guidance("cfd", 4, steps, **fields)
    guidance.conditions._bank.fill_(0.7)
    reference = Reference.__new__(Reference)
    views, levels = torch.zeros(4), torch.linspace(999, 1, steps).long()
    x = torch.full((4, 4, SIZE, SIZE), 0.7)
    _, alpha, sigma = reference.signal([999])
    eps = guidance.noise.double()
    z = alpha * 0.7 + sigma * eps
    for t, lower in itertools.pairwise(levels.tolist()):
        output = guidance.at_levels(x, views, views, torch.tensor(t), torch.tensor(t))
        (_, alpha, sigma), (_, alpha_next, sigma_next) = map(reference.signal, ([t], [lower]))
        # the gradient has sigma / alpha for its weight
        x = x - (1 - float(sigma_next / alpha_next * alpha / sigma)) * output.grad
        z = reference.ddim(z, reference.e(z, [t], 0.7), [t], [lower])
    torch.testing.assert_close(x.double(), (z - sigma_next * eps) / alpha_next, rtol=0, atol=1e-3)
    assert (x - 0.7 - SPREAD * eps).abs().mean() < 0.1 * SPREAD


def test_consistent_flow_keeps_seeds_apart_and_sim_does_not():
    """Adam comes to rest where e(x_t) = eps at the last level: at mu + S^2 alpha / sigma eps."""
    cfd, sim = optimised("cfd"), optimised("sim")
    for x in (cfd, sim):
        assert x.mean() == pytest.approx(0.7, abs=0.06)
    rest = SPREAD**2 * (ABAR[212] / (1 - ABAR[212])) ** 0.5
    assert cfd.std(0).mean() == pytest.approx(float(rest), rel=0.1)
    assert cfd.std(0).mean() == pytest.approx(SPREAD, rel=0.3)
    assert sim.std(0).mean() < 0.25 * cfd.std(0).mean()


def test_levels_of_consistent_flow_fall_in_three_pieces():
    for n in (1, 2, 7, 30, 25000):
        guidance = gaussian_guidance("cfd", 1, n)
        t = [int(guidance.levels(1, step, torch.Generator())[0]) for step in range(n)]
        assert t[0] == 980 and t == sorted(t, reverse=True)
    assert (t[2500], t[12500]) == (692, 404) and abs(t[-1] - 212) <= 1


def test_noise_of_a_view_moves_with_it():
    guidance = gaussian_guidance("fsd", n_seeds=1)

    def noise(elevation, azimuth):
        return guidance.noise_of_views(torch.tensor([elevation]), torch.tensor([azimuth]))[0]

    n = guidance.noise[0]
    torch.testing.assert_close(noise(0.0, 0.0), n)
    torch.testing.assert_close(noise(0.0, 60.0), n.roll(-1, -1))
    torch.testing.assert_close(noise(30.0, -60.0), n.roll((-1, 1), (-2, -1)))
    torch.testing.assert_close(noise(0.0, 360.0), n)


def test_what_a_method_draws_is_asked_for():
    guidance = gaussian_guidance("sds", n_seeds=1)
    x = torch.zeros(1, 4, SIZE, SIZE)
    with pytest.raises(ValueError, match="sds needs 'eps' of draw_noise for 1 items, got none"):
        guidance.at_levels(x, torch.zeros(1), torch.zeros(1), 500, 500)


def test_nfsd_needs_a_poor_prompt():
    guidance = gaussian_guidance("nfsd")
    text = torch.zeros(4, 1, 1)
    with pytest.raises(ValueError, match="poor prompt"):
        type(guidance)(
            guidance.cfg, guidance.model, PromptEmbeddings(text, text), guidance.noise, 10
        )


def test_methods_bring_their_settings_and_flags_win():
    from dsd_fast.run import cli

    def config(*flags):
        return cli.parse(["--prompt", "a chair", "--device", "cpu", *flags])[0].config.guidance

    assert config().method == "dsd" and config("--guidance.method", "dsd") == config()
    plain = config("--guidance.method", "sds")
    assert (plain.guidance_scale, plain.t_anneal, plain.lattice) == (100.0, False, None)
    assert config("--guidance.method=sds", "--guidance.guidance-scale", "9").guidance_scale == 9.0
    vsd = config("--guidance.method", "vsd", "--max-steps", "50")
    assert tuple(vsd.max_step_percent) == (10, 0.98, 0.5, 11)
    assert {m for m in METHODS if not settings(m, 10)} == {"dsd", "recon"}
    with pytest.raises(ValueError, match=r"method: expected one of dsd, sds.* got 'best'"):
        check(GuidanceConfig(method="best"))


# Runs

FLAGS = ["--pictures.no-turntable", "--pictures.no-mesh"]


@pytest.mark.parametrize("method", ["sds", "sdi", "nfsd", "fsd", "cfd", "sim"])
def test_a_run_in_pieces_is_the_run(tmp_path, tiny_model, method):
    """Bit for bit: the noise comes from the run's own stream."""
    flags = [*FLAGS, "--guidance.method", method, "--text.poor", "ugly"]
    straight, pieces = (Runner(tmp_path / name, tiny_model) for name in ("straight", "pieces"))
    assert straight(*flags, steps=6) == 0
    assert pieces(*flags, "--stop-at", "3", steps=6) == 0
    assert pieces("--resume", "auto", "--guidance.method", method, steps=6) == 0
    assert straight.metrics() == pieces.metrics() and len(straight.metrics()) == 6
    saved = json.loads(pieces.run.config.read_text())["guidance"]
    assert saved["method"] == method
    assert saved["guidance_scale"] == settings(method, 6)["guidance_scale"]


@pytest.mark.parametrize("n_seeds", [1, 2])
def test_a_run_says_where_its_surface_is(tmp_path, tiny_model, monkeypatch, n_seeds):
    seen, of_views = [], SurfaceNoise.of_views
    monkeypatch.setattr(
        SurfaceNoise, "of_views", lambda self, s: seen.append(s) or of_views(self, s)
    )
    run = Runner(tmp_path, tiny_model)
    flags = [*FLAGS, "--guidance.method", "cfd", "--num-seeds", str(n_seeds)]
    assert run(*flags, steps=2) == 0
    assert len(seen) == 2 and all(len(s) == n_seeds and s.shape[-1] == 4 for s in seen)
    assert all((s[..., 3] > 0.1).any() and not s.requires_grad for s in seen)


def test_a_picture_has_no_surface(tmp_path, tiny_model):
    argv = ["--task", "image", "--prompt", "a chair", "--model", str(tiny_model), "--device", "cpu"]
    argv += ["--guidance.method", "cfd", "--max-steps", "3", "--trainer.no-progress"]
    assert train.main([*argv, "--output", str(tmp_path)]) == 0


@pytest.mark.parametrize("method", ["sds", "cfd", "sim"])
def test_runs_side_by_side_are_the_runs_of_each(tmp_path, tiny_model, method):
    flags = [*FLAGS, "--guidance.method", method]
    alone, together = (Runner(tmp_path / name, tiny_model) for name in ("alone", "together"))
    assert together(*flags, "--num-seeds", "2") == 0 and alone(*flags) == 0
    losses = [[record["loss"] for record in runner.metrics()] for runner in (alone, together)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_resumed_run_keeps_its_method(tmp_path, tiny_model, caplog):
    runner = Runner(tmp_path, tiny_model)
    assert runner(*FLAGS, "--guidance.method", "sds", "--stop-at", "1") == 0
    assert runner("--resume", str(runner.run.path), "--guidance.method", "asd") == 2
    assert "a resumed run keeps its guidance.method ('sds')" in caplog.text


# VSD


ADAPTED = ["vsd", "dive3d"]


def vsd_guidance(model, method="vsd"):
    n = 2
    text = torch.randn(4, 77, 16, generator=torch.Generator().manual_seed(0))
    prompts = PromptEmbeddings(text, text.flip(0))
    cfg = replace(GuidanceConfig(), method=method, **settings(method, 100))
    guidance = make_guidance(cfg, model, prompts, torch.zeros(1, 4, 8, 8), 100)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, 8, 8, generator=generator)

    def step(i):
        return guidance.from_latents(x, torch.zeros(n), torch.tensor([0.0, 90.0]), i, generator)

    step.x = x
    return guidance, step


@pytest.mark.parametrize("method", ADAPTED)
def test_adapters_learn_what_renderings_look_like(tiny_model, method):
    pytest.importorskip("peft")
    model = load_model(str(tiny_model), torch.device("cpu"))
    before = {name: p.clone() for name, p in model.unet.named_parameters()}
    guidance, step = vsd_guidance(model, method)
    for group in guidance._optimizer.param_groups:
        group["lr"] = 1e-2
    probe = guidance.draw_noise(2, torch.Generator().manual_seed(9))["own_eps"]

    def loss():
        """Of the adapters at fixed noise and levels: what the step minimises over all."""
        told = guidance._camera(plan)
        t = torch.tensor([300, 700])
        with torch.no_grad():
            text = guidance.conditions.condition(plan.tensors).tokens[:2]
            own = guidance._own(guidance.model.noise_path.noisy(x, probe, t), t, text, told)
        return float((own - probe).square().mean())

    views = torch.zeros(2), torch.tensor([0.0, 90.0])
    chance = guidance.draw_noise(2, torch.Generator().manual_seed(8))
    plan, x = guidance.plan_levels(*views, 500, 500, chance), step.x
    start = loss()
    outputs = [step(i) for i in range(60)]
    assert loss() < 0.95 * start
    assert all(output.finite for output in outputs)
    after = dict(model.unet.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # the frozen weights are there once
    shared = {p.data_ptr() for p in model.unet.parameters()}
    assert sum(p.data_ptr() in shared for p in guidance._lora.parameters()) == len(before)


@pytest.mark.parametrize("method", ADAPTED)
def test_adapters_leave_out_a_step_that_is_not_finite(tiny_model, method):
    pytest.importorskip("peft")
    guidance, step = vsd_guidance(load_model(str(tiny_model), torch.device("cpu")), method)
    step(0)
    before = {name: p.clone() for name, p in guidance._learned.items()}
    step.x.fill_(float("inf"))
    assert not step(1).finite
    assert all(torch.equal(before[name], p) for name, p in guidance._learned.items())
    step.x.zero_()
    step(2)
    assert not all(torch.equal(before[name], p) for name, p in guidance._learned.items())


def test_vsd_is_the_difference_of_two_predictions(tiny_model):
    pytest.importorskip("peft")
    model = load_model(str(tiny_model), torch.device("cpu"))
    guidance, _ = vsd_guidance(model)
    generator = torch.Generator().manual_seed(3)
    x, chance = torch.randn(1, 4, 8, 8, generator=generator), guidance.draw_noise(1, generator)
    t = torch.tensor([400])
    plan = guidance.plan_levels(torch.zeros(1), torch.zeros(1), t, t, chance)
    text = guidance.conditions.condition(plan.tensors).tokens
    abar = float(ABAR[400])
    z = abar**0.5 * x + (1 - abar) ** 0.5 * chance["eps"]
    with torch.no_grad():
        rows = torch.cat([z] * 4)
        eps = model.unet(rows, t.expand(4), text, return_dict=False)[0]
        camera = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
        own = guidance._lora(z, t, text[:1], class_labels=camera, return_dict=False)[0]
    target = combine(eps, plan.tensors["weights"], 7.5, standard_cfg=True)
    got = guidance.at_plan(x, plan).grad
    torch.testing.assert_close(got, (1 - abar) * (target - own), rtol=1e-4, atol=1e-5)


def test_dive3d_goes_through_both_predictions(tiny_model):
    """Along a direction, its loss written out again changes as its gradient says."""
    pytest.importorskip("peft")
    model = load_model(str(tiny_model), torch.device("cpu"))
    guidance, step = vsd_guidance(model, "dive3d")
    for i in range(3):
        step(i)  # a student that is not the teacher
    generator = torch.Generator().manual_seed(3)
    x, chance = torch.randn(1, 4, 8, 8, generator=generator), guidance.draw_noise(1, generator)
    along = torch.randn(x.shape, generator=generator)
    t, abar, eps = torch.tensor([400]), float(ABAR[400]), chance["eps"]
    plan = guidance.plan_levels(torch.zeros(1), torch.zeros(1), t, t, chance)
    text = guidance.conditions.condition(plan.tensors).tokens
    camera = torch.tensor([[0.0, 1.0, 0.0, 1.0]])

    @torch.no_grad()
    def loss(x):
        z = abar**0.5 * x + (1 - abar) ** 0.5 * eps
        rows = model.unet(torch.cat([z] * 4), t.expand(4), text, return_dict=False)[0].double()
        target = combine(rows, plan.tensors["weights"], 8.5, standard_cfg=True)
        own = guidance._lora(z, t, text[:1], class_labels=camera, return_dict=False)[0].double()
        y = target - own
        unit = y / (y.square().mean() + 0.00054**2).sqrt()
        return float((unit * (own - eps)).sum()) * ((1 - abar) / abar) ** 0.5

    step_size = 1e-2
    want = (loss(x + step_size * along) - loss(x - step_size * along)) / (2 * step_size)
    output = guidance.at_plan(x, plan)
    assert output.finite
    assert float((output.grad * along).sum()) == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize("method", ADAPTED)
def test_a_vsd_run_in_pieces_is_the_run(tmp_path, tiny_model, caplog, method):
    pytest.importorskip("peft")
    flags = [*FLAGS, "--guidance.method", method]
    straight, pieces = (Runner(tmp_path / name, tiny_model) for name in ("straight", "pieces"))
    assert straight(*flags, steps=6) == 0
    assert pieces(*flags, "--stop-at", "3", steps=6) == 0
    assert pieces("--resume", "auto", "--guidance.method", method, steps=6) == 0
    assert straight.metrics() == pieces.metrics() and len(straight.metrics()) == 6
    assert straight(*flags, "--num-seeds", "2", "--seed", "7") == 2
    assert "adapters for one run: drop --num-seeds" in caplog.text


@cuda_only
@pytest.mark.parametrize("method", [m for m, f in FORMULATIONS.items() if TextConditions.suit(f)])
def test_a_graph_holds_every_method(tmp_path, method, monkeypatch):
    """At learning rates of zero the object stays, and a step with graphs is that without."""
    if method in ADAPTED:
        pytest.importorskip("peft")
    captured, capture = [], StepGraphs._captured

    def watched(self, key, function):
        captured.append(capture(self, key, function))
        return captured[-1]

    monkeypatch.setattr(StepGraphs, "_captured", watched)
    still = ["--optimizer.geometry-lr", "0", "--optimizer.background-lr", "0"]
    # The preset's field, which graphs can hold.
    argv = ["--prompt", "a chair", "--device", "cuda", "--max-steps", "24", *FLAGS, *still]
    argv += ["--guidance.method", method, "--trainer.log-every", "1", "--trainer.no-progress"]
    seen = []
    for name, more in (("with", []), ("without", ["--trainer.no-graphs"])):
        assert train.main([*argv, "--output", str(tmp_path / name), *more]) == 0
        (metrics,) = (tmp_path / name).rglob("metrics.jsonl")
        seen.append([json.loads(line)["dsd"] for line in metrics.read_text().splitlines()])
    assert captured and None not in captured
    np.testing.assert_allclose(*seen, rtol=0.02)
