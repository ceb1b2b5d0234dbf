"""Trajectories and the guidance object, on a toy predictor; numbers of the official code are in
test_guidance_parity.py."""

from __future__ import annotations

import pytest
import torch
from conftest import cuda_only
from tiny_model import build_tiny_model, toy_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsd_fast.diffusion import DiffusionModel, embed_views, load_model
from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.noise_path import NoisePath
from dsd_fast.graphs import captured
from dsd_fast.guidance import (
    DSDGuidance,
    GuidanceConfig,
    GuidanceOutput,
    PromptEmbeddings,
    combine,
    dsd_gradient,
    seed_noise,
    view_embeddings,
)
from dsd_fast.guidance.conditions.text import ViewBins
from dsd_fast.guidance.passes import Batch
from dsd_fast.guidance.rows import expand_rows
from dsd_fast.guidance.trajectory import simulate

MODES = pytest.mark.parametrize("perp_neg", [True, False], ids=["perp-neg", "plain"])
TRAJECTORIES = pytest.mark.parametrize(
    "trajectory",
    [
        {"trajectory": "exact"},
        {"trajectory": "cached", "noise_table_step": 0},
        {"trajectory": "cached", "noise_table_step": 20},
    ],
    ids=["exact", "cached", "tabulated"],
)
CACHED = pytest.mark.parametrize("table_step", [0, 20])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def make_guidance(
    model: DiffusionModel | None = None,
    seed: int = 0,
    max_steps: int = 100,
    n_seeds: int = 1,
    **settings: object,
) -> DSDGuidance:
    model = model or toy_model()
    size = model.latent_size
    prompts = PromptEmbeddings(randn(4, 5, 3, seed=5), randn(1, 5, 3, seed=6).expand(4, -1, -1))
    noise = seed_noise(generator(seed), (n_seeds, 4, size, size))
    settings = {"trajectory": "exact", "noise_table_step": 0} | settings
    return DSDGuidance(GuidanceConfig(**settings), model, prompts, noise, max_steps)


def at(
    guidance: DSDGuidance, azimuth: float, t: int, t_delta: int, elevation: float = 10.0
) -> GuidanceOutput:
    latents = randn(1, 4, 6, 6, seed=9)
    return guidance.at_levels(latents, elevation, azimuth, t, t_delta)


@TRAJECTORIES
def test_mirrored_trajectory(trajectory: dict) -> None:
    """With the option, left and right see mirror images; officially they see the same picture."""
    official, mirrored = (
        make_guidance(**trajectory, mirror_trajectory=mirror) for mirror in (False, True)
    )

    def trajectory_noise(guidance: DSDGuidance, azimuth: float) -> Tensor:
        zeros = torch.zeros(1, 4, 6, 6)
        return guidance.at_levels(zeros, 10.0, azimuth, 500, 520).latents_noisy

    left, right = (trajectory_noise(official, a) for a in (60.0, -60.0))
    torch.testing.assert_close(left, right, rtol=0, atol=0)
    torch.testing.assert_close(trajectory_noise(mirrored, 60.0), left, rtol=0, atol=0)
    torch.testing.assert_close(trajectory_noise(mirrored, -60.0), left.flip(-1), rtol=0, atol=0)
    torch.testing.assert_close(trajectory_noise(mirrored, 300.0), left.flip(-1), rtol=0, atol=0)
    assert (left - left.flip(-1)).abs().max() > 0.1


def test_lattice_is_where_trajectories_are() -> None:
    assert GuidanceConfig(azimuth_bins=30).lattice == 30
    assert GuidanceConfig(trajectory="exact").lattice is None
    assert GuidanceConfig(use_perp_neg=False).lattice is None


class TestTrajectory:
    def test_closed_form(self) -> None:
        """A constant noise prediction fixes the clean image, and with it every state."""
        abar = toy_model().noise_path.alpha.square().double()
        noise, eps = randn(3, 4, 5, 5).double(), randn(3, 4, 5, 5, seed=1).double()
        t_delta = torch.tensor([999, 640, 320])
        z = simulate(noise, t_delta, lambda z, t, scale: eps, NoisePath.diffusion(abar), 10, 7.5)
        clean = (noise - (1 - abar[999]).sqrt() * eps) / abar[999].sqrt()
        level = abar[t_delta].view(-1, 1, 1, 1)
        expected = level.sqrt() * clean + (1 - level).sqrt() * eps
        torch.testing.assert_close(z, expected)
        assert torch.equal(z[0], noise[0])

    @TRAJECTORIES
    def test_a_seed_is_a_trajectory(self, trajectory: dict) -> None:
        outputs = [at(make_guidance(seed=seed, **trajectory), 30, 500, 510) for seed in (1, 1, 2)]
        assert torch.equal(outputs[0].grad, outputs[1].grad)
        assert (outputs[0].grad - outputs[2].grad).norm() > 0.1 * outputs[0].grad.norm()

    @MODES
    def test_bins(self, perp_neg: bool) -> None:
        bins = ViewBins(24, perp_neg)
        azimuth = torch.tensor([0.0, 7.4, -7.6, 90, 180, -180, 359, 20])
        elevation = torch.tensor([0.0] * 7 + [80])
        expected = [0, 0, 1, 12, 23, 23, 0, 24] if perp_neg else [1, 1, 1, 0, 2, 2, 1, 3]
        assert bins.index(elevation, azimuth) == expected
        for index in range(25 if perp_neg else 4):
            camera = torch.tensor([bins.camera(index)])
            assert bins.index(camera[:, 0], camera[:, 1]) == [index]


class TestCache:
    @pytest.mark.parametrize("azimuth", [-80.0, 10.0, 170.0])
    def test_plain_mode_is_exact(self, azimuth: float) -> None:
        exact, cached = (
            make_guidance(use_perp_neg=False, trajectory=kind) for kind in ("exact", "cached")
        )
        for t, t_delta in ((980, 985), (899, 899), (700, 720), (320, 320), (990, 999)):
            torch.testing.assert_close(
                at(cached, azimuth, t, t_delta).grad, at(exact, azimuth, t, t_delta).grad
            )

    def test_perp_neg_is_exact_at_the_middle_of_a_bin(self) -> None:
        exact, cached = make_guidance(), make_guidance(trajectory="cached", azimuth_bins=12)
        for azimuth in (7.5, -52.5, 142.5):
            torch.testing.assert_close(
                at(cached, azimuth, 400, 430).grad, at(exact, azimuth, 400, 430).grad
            )

    def test_more_bins_come_closer(self) -> None:
        exact = at(make_guidance(), 80, 500, 510).grad

        def distance(n_bins: int) -> float:
            cached = make_guidance(trajectory="cached", azimuth_bins=n_bins)
            return float((at(cached, 80, 500, 510).grad - exact).norm())

        # Bin centres 45 and 80.5 degrees.
        assert distance(180) < distance(2) / 4

    @MODES
    @CACHED
    def test_rebuilt_after_resume(self, perp_neg: bool, table_step: int) -> None:
        """Whatever filled the cache before, a step gives the same bits."""
        settings = {
            "trajectory": "cached",
            "noise_table_step": table_step,
            "use_perp_neg": perp_neg,
        }
        straight = make_guidance(**settings)
        history = [(10.0, 950), (170, 800), (-100, 640), (12, 500), (95, 350), (80, 420)]
        for azimuth, t in history:
            before = at(straight, azimuth, t, t + 5)
        resumed = make_guidance(seed=3, **settings)
        at(resumed, 80, 420, 425)
        resumed.load_state_dict(straight.state_dict())
        after = at(resumed, *history[-1], history[-1][1] + 5)
        assert torch.equal(before.grad, after.grad)
        assert torch.equal(before.latents_noisy, after.latents_noisy)

    def test_calls(self) -> None:
        guidance = make_guidance(trajectory="cached")
        rows = guidance.model.unet.rows
        at(guidance, 30, 750, 760)
        assert rows == [4, 4, 4, 4, 8]  # three levels, eps_o, the pair
        rows.clear()
        at(guidance, -31, 700, 710)
        assert rows == [4, 8]
        rows.clear()
        at(guidance, 30, 690, 690)
        assert rows == [4, 4, 4]  # one more level; equal levels share a batch

    def test_calls_with_a_table(self) -> None:
        guidance = make_guidance(trajectory="cached", noise_table_step=20)
        rows = guidance.model.unet.rows
        at(guidance, 30, 750, 770)
        assert rows == [4] * 5 + [8]  # 999, 899, 799, then 779 and 759, then the pair
        rows.clear()
        at(guidance, -30, 750, 765)
        assert rows == [8]
        at(guidance, 30, 770, 770)
        assert rows == [8, 4]
        rows.clear()
        at(guidance, 30, 720, 720)
        assert rows == [4, 4, 4]  # 739 and 719

    def test_table_is_exact_at_its_entries(self) -> None:
        exact = make_guidance()
        tabulated = make_guidance(trajectory="cached", azimuth_bins=12, noise_table_step=20)
        for t, t_delta in ((980, 999), (850, 879), (699, 699), (390, 399), (300, 319)):
            torch.testing.assert_close(
                at(tabulated, 7.5, t, t_delta).grad, at(exact, 7.5, t, t_delta).grad
            )

    @pytest.mark.parametrize("table_step", [0, 20])
    def test_trajectories_of_a_scale_of_their_own(self, table_step: int) -> None:
        own = {"trajectory_scale": 2.0}
        exact = make_guidance(**own)
        cached = make_guidance(
            trajectory="cached", azimuth_bins=12, noise_table_step=table_step, **own
        )
        for t, t_delta in ((980, 999), (850, 879), (699, 699), (390, 399)):
            grad = at(exact, 7.5, t, t_delta).grad
            torch.testing.assert_close(at(cached, 7.5, t, t_delta).grad, grad)
            one_scale = at(make_guidance(), 7.5, t, t_delta).grad
            assert float((grad - one_scale).norm() / grad.norm()) > 1e-2

    def test_a_finer_table_comes_closer(self) -> None:
        exact = at(make_guidance(), 70, 500, 510).grad

        def distance(step: int) -> float:
            cached = make_guidance(trajectory="cached", azimuth_bins=9, noise_table_step=step)
            return float((at(cached, 70, 500, 510).grad - exact).norm() / exact.norm())

        assert distance(10) < distance(40) < 0.05
        # Entries are no farther apart than the grid's levels, whatever the step.
        assert distance(100) == distance(1000)

    @CACHED
    def test_levels_below_the_schedule_enlarge_the_tables(self, table_step: int) -> None:
        settings = {"trajectory": "cached", "azimuth_bins": 9, "noise_table_step": table_step}
        guidance = make_guidance(**settings)
        before = at(guidance, 70, 400, 410).grad
        predictions = guidance._tables.predictions
        at(guidance, 70, 320, 320)
        assert guidance._tables.predictions is predictions
        exact = make_guidance(n_ddim_steps=10)
        for level in (150, 99, 0):
            torch.testing.assert_close(
                at(guidance, 70, level, level).grad,
                at(exact, 70, level, level).grad,
                rtol=0.02 if table_step else 1e-4,
                atol=0.02 if table_step else 1e-5,
            )
        assert len(guidance._tables.predictions) > len(predictions)
        assert torch.equal(at(guidance, 70, 400, 410).grad, before)


class TestGuidance:
    def test_calls_of_exact(self) -> None:
        guidance = make_guidance()
        at(guidance, 30, 320, 320)
        assert guidance.model.unet.rows == [4] * 9
        guidance.model.unet.rows.clear()
        at(guidance, 30, 898, 950)
        assert guidance.model.unet.rows == [4, 4, 8]

    @MODES
    @TRAJECTORIES
    def test_batch_is_its_items(self, perp_neg: bool, trajectory: dict) -> None:
        guidance = make_guidance(use_perp_neg=perp_neg, **trajectory)
        latents = randn(3, 4, 6, 6, seed=4)
        elevation, azimuth = torch.tensor([0.0, 70, 30]), torch.tensor([100.0, 0, -20])
        # A different number of ODE steps each, none for the second.
        t, t_delta = torch.tensor([400, 990, 700]), torch.tensor([410, 999, 700])
        together = guidance.at_levels(latents, elevation, azimuth, t, t_delta)
        alone = [
            guidance.at_levels(latents[i : i + 1], elevation[i], azimuth[i], t[i], t_delta[i])
            for i in range(3)
        ]
        torch.testing.assert_close(together.grad, torch.cat([one.grad for one in alone]))
        torch.testing.assert_close(together.loss, sum(one.loss for one in alone) / 3)

    def test_loss(self) -> None:
        guidance = make_guidance()
        latents = randn(2, 4, 6, 6).requires_grad_()
        output = guidance.at_levels(latents, torch.zeros(2), torch.zeros(2), 600, 610)
        output.loss.backward()
        assert torch.equal(latents.grad, output.grad / 2)
        expected = 0.5 * (latents - output.target).square().sum() / 2
        torch.testing.assert_close(output.loss, expected)
        torch.testing.assert_close(output.grad_norm, (latents - output.target).norm())
        assert bool(output.finite) and not output.target.requires_grad

    @pytest.mark.parametrize("perp_neg", [True, False])
    @pytest.mark.parametrize("share, own", [(0.0, None), (0.3, None), (0.3, 2.0), (1.0, 1.0)])
    def test_public_function_is_the_same_code(
        self, perp_neg: bool, share: float, own: float | None
    ) -> None:
        guidance = make_guidance(
            use_perp_neg=perp_neg, trajectory_share=share, trajectory_scale=own
        )
        latents = randn(1, 4, 6, 6)
        text = guidance.conditions.prompts
        rows, weights = view_embeddings(text.text_vd, text.uncond_vd, 10.0, 50.0, perp_neg)

        def predict(z: Tensor, t: Tensor, scale: float) -> Tensor:
            z, t = expand_rows(z, perp_neg), expand_rows(t, perp_neg)
            return combine(guidance.model.predict_noise(z, t, Condition(rows)), weights, scale)

        for weighting in ("sds", "ddim"):
            guidance.cfg.weighting = weighting
            grad = dsd_gradient(
                latents,
                noise=guidance.noise,
                t=620,
                t_delta=torch.tensor([640]),
                predict=predict,
                alphas_cumprod=guidance.model.noise_path.alpha.square(),
                weighting=weighting,
                trajectory_share=share,
                trajectory_scale=own,
            )
            ours = guidance.at_levels(latents, 10.0, 50.0, 620, 640).grad
            torch.testing.assert_close(ours, grad)

    @pytest.mark.parametrize("perp_neg", [True, False])
    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_the_target_has_the_contrast_of_no_guidance(self, perp_neg: bool, share: float) -> None:
        """What it is compared with stays: the two differ by the clean images' difference."""
        flags = {"use_perp_neg": perp_neg, "trajectory_share": share, "weighting": "ddim"}
        x = randn(1, 4, 6, 6)
        plain, half = (
            make_guidance(**flags, rescale=rescale).at_levels(x, 10.0, 50.0, 620, 640)
            for rescale in (0.0, 0.5)
        )
        guidance = make_guidance(**flags)
        path, text = guidance.model.noise_path, guidance.conditions.prompts
        t = torch.tensor([620])
        # Its noise is the same at both levels.
        (alpha_d, sigma_d), (alpha, sigma) = path.at(torch.tensor([640])), path.at(t)
        z = plain.latents_noisy
        if share < 1:  # of the pair, x at t_delta is shown
            z = alpha * x + sigma * (z - alpha_d * x) / sigma_d
        rows, weights = view_embeddings(text.text_vd, text.uncond_vd, 10.0, 50.0, perp_neg)
        n_rows = len(rows)
        eps = guidance.model.predict_noise(
            expand_rows(z, perp_neg), t.expand(n_rows), Condition(rows)
        )
        guided = path.clean(z, combine(eps, weights, guidance.cfg.guidance_scale), t)
        own = path.clean(z, eps[:1], t)
        mean = guided.mean((2, 3), keepdim=True)
        around, own = guided - mean, own - own.mean((2, 3), keepdim=True)
        want = mean + around * (0.5 + 0.5 * own.std() / around.std())
        torch.testing.assert_close(plain.grad - half.grad, want - guided, rtol=1e-3, atol=1e-4)
        assert (want - guided).norm() > 0.02 * guided.norm()

    @pytest.mark.parametrize("t_delta", [500, 520])
    def test_beside_the_trajectory_it_rests_at_what_is_predicted(self, t_delta: int) -> None:
        """At DDIM's weight the gradient is x - x0(x_t), with half the rows of the UNet."""
        flags = {"trajectory_share": 1.0, "weighting": "ddim", "noise_table_step": 20}
        guidance, rows = make_guidance(**flags, trajectory="cached"), []
        engine, x = guidance.model.engine, randn(1, 4, 6, 6)

        def counted(z: Tensor, *others: object) -> Tensor:
            rows.append(len(z))
            return engine(z, *others)

        guidance.model.engine = counted
        guidance.at_levels(x, 10.0, 50.0, 500, t_delta)  # fills the table
        rows.clear()
        output = guidance.at_levels(x, 10.0, 50.0, 500, t_delta)
        abar = guidance.model.noise_path.alpha.square()[500].double()
        (alpha, sigma), x_t = (abar.sqrt(), (1 - abar).sqrt()), output.latents_noisy
        text = guidance.conditions.prompts
        context, weights = view_embeddings(text.text_vd, text.uncond_vd, 10.0, 50.0, True)
        eps = engine(expand_rows(x_t, True), torch.full((4,), 500), Condition(context))
        clean = (x_t - sigma * combine(eps, weights, guidance.cfg.guidance_scale)) / alpha
        torch.testing.assert_close(output.grad, (x - clean).float(), rtol=1e-4, atol=1e-4)
        assert sum(rows) == 4

    def test_share_follows_the_level(self) -> None:
        """Linear between the forms, and at a full share nothing is asked at t_delta."""
        guidance = make_guidance(trajectory_share=(320, 1.0, 0.25, 650, 0.0, 980))
        x = randn(1, 4, 6, 6)
        for t, share in ((980, 0.0), (650, 0.25), (485, 0.625), (320, 1.0)):
            grad = guidance.at_levels(x, 10.0, 50.0, t, t + 10).grad
            official, own = (
                make_guidance(trajectory_share=s).at_levels(x, 10.0, 50.0, t, t + 10).grad
                for s in (0.0, 1.0)
            )
            torch.testing.assert_close(grad, torch.lerp(official, own, share))
            assert float((official - own).norm() / official.norm()) > 1e-2
            plan = guidance.plan_levels(10.0, 50.0, t, t + 10)
            assert plan.kind.shared == (share == 1)

    @pytest.mark.parametrize("share", [-0.1, 1.5, (0, 0.5, 2.0, 900)])
    def test_share_beyond_its_range(self, share) -> None:
        with pytest.raises(ValueError, match=r"trajectory_share: expected values of 0 to 1, got"):
            make_guidance(trajectory_share=share)
        if isinstance(share, float):
            x = randn(1, 4, 6, 6)
            with pytest.raises(ValueError, match="trajectory_share: expected a share of 0 to 1"):
                dsd_gradient(
                    x,
                    noise=x,
                    t=500,
                    t_delta=500,
                    predict=lambda z, t, scale: z,
                    alphas_cumprod=toy_model().noise_path.alpha.square(),
                    trajectory_share=share,
                )

    def test_ddim_weight(self) -> None:
        official, ddim = (at(make_guidance(weighting=w), 0, 500, 520) for w in ("sds", "ddim"))
        abar = toy_model().noise_path.alpha.square()[500]
        ratio = ((1 - abar) / abar).sqrt() / (1 - abar)
        torch.testing.assert_close(ddim.grad, official.grad * ratio)

    def test_levels(self) -> None:
        annealed = make_guidance(max_steps=10000)
        t, t_delta = annealed.levels(2, 1000, generator())
        assert t.tolist() == [771, 771] and bool((t_delta >= t).all())
        assert t_delta[0] != t_delta[1]
        random = make_guidance(t_anneal=False)
        t, _ = random.levels(64, 0, generator())
        assert t.unique().numel() > 32 and int(t.min()) >= 320 and int(t.max()) <= 980
        falling = make_guidance(t_anneal=False, max_step_percent=(0, 0.98, 0.33, 50))
        assert int(falling.levels(64, 50, generator())[0].max()) <= 330
        both = make_guidance(min_step_percent=(0, 0.5, 0.4, 100), max_steps=100)
        assert both.levels(1, 100, generator())[0].tolist() == [400]

    def test_same_generator_same_step(self) -> None:
        guidance, latents = make_guidance(t_anneal=False), randn(1, 4, 6, 6)
        a, b, c = (
            guidance.from_latents(latents, 0.0, 20.0, 5, generator(seed)) for seed in (1, 1, 2)
        )
        assert torch.equal(a.grad, b.grad) and int(a.t) == int(b.t) != int(c.t)

    def test_latents_of_another_size(self) -> None:
        guidance = make_guidance()
        latents = randn(1, 4, 12, 9).requires_grad_()
        output = guidance.from_latents(latents, 0.0, 0.0, 3, generator())
        output.loss.backward()
        assert output.latents.shape == (1, 4, 6, 6) and latents.grad.abs().sum() > 0

    def test_not_a_number_is_reported(self) -> None:
        guidance = make_guidance()
        latents = randn(1, 4, 6, 6)
        latents[0, 0, 0, 0] = float("nan")
        output = guidance.at_levels(latents, 0.0, 0.0, 500, 510)
        assert not bool(output.finite)
        # Nothing of it stays: the next step is as if it had not been.
        assert bool(at(guidance, 0, 500, 510).finite)

    # CUDA has no deterministic backward of bilinear resizing; nothing here depends on its bits.
    @pytest.mark.filterwarnings("ignore:.*[Dd]eterministic")
    def test_real_model(self, tmp_path, device: torch.device) -> None:
        """Folder, prompt, rendering of another size, and the gradient back to its pixels."""
        model = load_model(build_tiny_model(tmp_path), device)
        prompts = embed_views(model, "an armchair")
        noise = seed_noise(generator(), (1, 4, 8, 8))
        guidance = DSDGuidance(GuidanceConfig(trajectory="cached"), model, prompts, noise, 10)
        rgb = torch.rand(2, 21, 13, 3, generator=generator()).to(device).requires_grad_()
        angles = torch.tensor([10.0, 20.0]), torch.tensor([-40.0, 130.0])
        first = guidance(rgb, *angles, 4, generator(7))
        first.loss.backward()
        assert rgb.grad.isfinite().all() and rgb.grad.abs().sum() > 0
        again = guidance(rgb, *angles, 4, generator(7))
        torch.testing.assert_close(first.grad, again.grad)


class Operations(TorchDispatchMode):
    """Names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class TestPlan:
    ANGLES = (torch.tensor([10.0, 20.0]), torch.tensor([-40.0, 130.0]))

    @MODES
    @TRAJECTORIES
    def test_is_the_step(self, perp_neg: bool, trajectory: dict) -> None:
        guidance = make_guidance(use_perp_neg=perp_neg, **trajectory)
        latents = randn(2, 4, 6, 6).requires_grad_()
        whole = guidance.from_latents(latents, *self.ANGLES, 40, generator(3))
        plan = guidance.plan(*self.ANGLES, 40, generator(3))
        parts = guidance.at_plan(latents, plan)
        for name, value in whole._asdict().items():
            assert torch.equal(getattr(parts, name), value), name
        levels = guidance.at_levels(latents, *self.ANGLES, plan.t, plan.t_delta)
        assert torch.equal(levels.grad, whole.grad)
        parts.loss.backward()
        assert torch.equal(latents.grad, whole.grad / 2)

    @TRAJECTORIES
    @MODES
    def test_takes_over_another(self, perp_neg: bool, trajectory: dict) -> None:
        guidance = make_guidance(use_perp_neg=perp_neg, mirror_trajectory=True, **trajectory)
        latents = randn(2, 4, 6, 6)
        static, other = (
            guidance.plan(*angles, step, generator(step))
            for step, angles in ((1, self.ANGLES), (60, self.ANGLES[::-1]))
        )
        assert static.kind == other.kind and not static.kind.shared
        address = static.tensors.buffer.data_ptr()
        wanted = guidance.at_plan(latents, other)
        before = guidance.at_plan(latents, static)
        static.copy_(other)
        got = guidance.at_plan(latents, static)
        assert static.tensors.buffer.data_ptr() == address
        assert torch.equal(got.grad, wanted.grad) and torch.equal(got.t_delta, wanted.t_delta)
        assert not torch.equal(got.grad, before.grad)
        shared = guidance.plan(*self.ANGLES, 100, generator())
        assert shared.kind.shared and shared.t.tolist() == shared.t_delta.tolist() == [320, 320]
        with pytest.raises(ValueError, match=r"expected a plan of PlanKind.*shared=False"):
            static.copy_(shared)

    @CACHED
    def test_device_part_asks_the_host_for_nothing(self, table_step: int) -> None:
        guidance = make_guidance(trajectory="cached", noise_table_step=table_step)
        plan = guidance.plan(*self.ANGLES, 40, generator())
        assert plan.tensors.buffer.device == torch.device("cpu")  # and this is the one upload
        with Operations() as operations:
            guidance.at_plan(randn(2, 4, 6, 6), plan)
        waiting = ("_local_scalar_dense", "nonzero", "is_nonzero", "_pin_memory")
        assert not [name for name in operations.names if name.split(".")[1] in waiting]

    @cuda_only
    @CACHED
    @pytest.mark.parametrize("step", [40, 100], ids=["pair", "shared"])
    def test_in_a_graph(self, table_step: int, step: int) -> None:
        device = torch.device("cuda")
        model = toy_model(device=device, engine="eager")
        model.unet.to(device)
        guidance = make_guidance(model, trajectory="cached", noise_table_step=table_step)
        latents, outputs = randn(2, 4, 6, 6).to(device), []
        static = guidance.plan(*self.ANGLES, step, generator())
        replay = captured(lambda: outputs.append(guidance.at_plan(latents, static)))
        for seed in (1, 2):
            other = guidance.plan(*self.ANGLES[::-1], step, generator(seed))
            latents.normal_()
            static.copy_(other)
            replay()
            want = guidance.at_plan(latents, other)
            torch.testing.assert_close(outputs[-1].grad, want.grad)
            torch.testing.assert_close(outputs[-1].loss, want.loss)

    def test_draws_are_those_of_before(self) -> None:
        """t first where it is random, then t_delta; nothing else."""
        guidance = make_guidance(trajectory="cached", t_anneal=False)
        ours, theirs = generator(4), generator(4)
        plan = guidance.plan(*self.ANGLES, 40, ours)
        t, t_delta = guidance.levels(2, 40, theirs)
        assert torch.equal(plan.t, t) and torch.equal(plan.t_delta, t_delta)
        assert torch.equal(ours.get_state(), theirs.get_state())

    def test_latents_of_another_number_are_an_error(self) -> None:
        guidance = make_guidance(trajectory="cached")
        plan = guidance.plan(*self.ANGLES, 40, generator())
        with pytest.raises(ValueError, match=r"latents \[2, 4, 6, 6\], got \[1, 4, 6, 6\]"):
            guidance.at_plan(randn(1, 4, 6, 6), plan)


class TestSeeds:
    @MODES
    @TRAJECTORIES
    def test_each_item_follows_its_own(self, perp_neg: bool, trajectory: dict) -> None:
        together = make_guidance(n_seeds=3, use_perp_neg=perp_neg, **trajectory)
        latents, t, t_delta = randn(3, 4, 6, 6), torch.tensor([400, 600, 700]), [410, 655, 700]
        elevation, azimuth = torch.tensor([0.0, 70, 30]), torch.tensor([100.0, 0, 100])
        outputs = together.at_levels(latents, elevation, azimuth, t, torch.tensor(t_delta))
        for i in range(3):
            alone = make_guidance(use_perp_neg=perp_neg, **trajectory)
            alone.load_state_dict({"noise": together.noise[i : i + 1]})
            one = alone.at_levels(latents[i : i + 1], elevation[i], azimuth[i], t[i], t_delta[i])
            torch.testing.assert_close(outputs.grad[i : i + 1], one.grad)
        assert together.state_dict()["noise"].shape == (3, 4, 6, 6)

    def test_a_view_for_each_seed(self) -> None:
        guidance = make_guidance(n_seeds=3, trajectory="cached")
        with pytest.raises(ValueError, match="each of the 3 seeds, got 2"):
            guidance.plan(torch.zeros(2), torch.zeros(2), 0, generator())
        with pytest.raises(ValueError, match=r"seed noise \[3, 4, 6, 6\].*\[1, 4, 6, 6\]"):
            guidance.load_state_dict({"noise": torch.zeros(1, 4, 6, 6)})


class TestErrors:
    def test_inputs(self) -> None:
        guidance = make_guidance()
        with pytest.raises(ValueError, match=r"rgb \[B,H,W,3\].*\(1, 3, 8, 8\)"):
            guidance(torch.zeros(1, 3, 8, 8), 0.0, 0.0, 0, generator())
        with pytest.raises(ValueError, match="B > 0"):
            guidance(torch.zeros(0, 8, 8, 3), 0.0, 0.0, 0, generator())
        with pytest.raises(ValueError, match=r"latents \[B,4,h,w\].*\(1, 3, 6, 6\)"):
            guidance.from_latents(torch.zeros(1, 3, 6, 6), 0.0, 0.0, 0, generator())
        latents = torch.zeros(2, 4, 6, 6)
        with pytest.raises(ValueError, match=r"2 elevations.*got 1 and 2"):
            guidance.at_levels(latents, 0.0, torch.zeros(2), 500, 510)
        with pytest.raises(ValueError, match=r"t_delta: expected levels from 0 to 999.*1000"):
            guidance.at_levels(latents, torch.zeros(2), torch.zeros(2), 500, 1000)
        with pytest.raises(ValueError, match=r"t: expected one integer or 2.*\(3,\)"):
            guidance.at_levels(
                latents, torch.zeros(2), torch.zeros(2), torch.tensor([1, 2, 3]), 500
            )
        with pytest.raises(ValueError, match=r"seed noise \[1, 4, 6, 6\].*\[1, 4, 5, 5\]"):
            guidance.load_state_dict({"noise": torch.zeros(1, 4, 5, 5)})

    def test_function(self) -> None:
        common = {
            "t": 500,
            "t_delta": 510,
            "predict": lambda z, t, scale: z,
            "alphas_cumprod": toy_model().noise_path.alpha.square(),
        }
        with pytest.raises(ValueError, match="seed noise"):
            dsd_gradient(torch.zeros(2, 4, 6, 6), noise=torch.zeros(1, 4, 5, 5), **common)
        with pytest.raises(ValueError, match="weighting"):
            zeros = torch.zeros(1, 4, 6, 6)
            dsd_gradient(zeros, noise=zeros, weighting="sdi", **common)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"trajectory": "fast"}, "trajectory: expected 'exact' or 'cached', got 'fast'"),
            ({"weighting": "sdi"}, "weighting"),
            ({"delta_min": 1000}, "delta_min"),
            ({"azimuth_bins": 0}, "azimuth_bins"),
            ({"n_ddim_steps": 0}, "n_ddim_steps"),
            ({"noise_table_step": -1}, "noise_table_step"),
            ({"min_step_percent": (1, 2)}, "schedule"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_settings(self, settings: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_guidance(**settings)


@CACHED
def test_trajectories_that_begin_from_pictures(table_step) -> None:
    """They are DDIM from the noisy pictures at the run's highest level on, a bin's own each."""
    guidance = make_guidance(
        n_seeds=2,
        trajectory="cached",
        noise_table_step=table_step,
        azimuth_bins=3,
        max_step_percent=0.6,
        use_perp_neg=False,
        n_ddim_steps=4,
    )
    model, n_bins = guidance.model, len(guidance.conditions.bins)
    size = (model.latent_channels, model.latent_size, model.latent_size)
    pictures = randn(n_bins, *size, seed=5)
    guidance.begin_from(pictures)
    path, noise = model.noise_path, guidance.noise
    assert guidance._tables.grid == (600, 450, 300, 150, 0)
    for azimuth in (20.0, 100.0):
        asked = torch.full((2,), azimuth)
        view, _ = guidance.conditions.bins.index(torch.zeros(2), asked)
        plan = guidance.plan_levels(torch.zeros(2), asked, 450, 450)
        x = randn(2, *size, seed=6)
        noisy = guidance.at_plan(x, plan).latents_noisy
        z = path.noisy(pictures[view].expand(2, *size), noise, torch.tensor([600]))
        eps = torch.cat([predicted(guidance, z[i : i + 1], 600, view) for i in range(2)])
        z = path.step(z, eps, torch.tensor([600]), torch.tensor([450]))
        eps = torch.cat([predicted(guidance, z[i : i + 1], 450, view) for i in range(2)])
        wanted = path.noisy(x, eps, torch.tensor([450]))
        torch.testing.assert_close(noisy, wanted, atol=1e-5, rtol=1e-5)
    # Above them there is nothing.
    plan = guidance.plan_levels(torch.zeros(2), torch.zeros(2), 600, 640)
    assert plan.t_delta.tolist() == [600, 600]
    assert guidance.at_plan(randn(2, *size), plan).finite.all()


def predicted(guidance: DSDGuidance, z: Tensor, level: int, view: int) -> Tensor:
    """The guided noise on the trajectory of a bin."""
    rows = z.to(guidance.model.dtype).repeat(2, 1, 1, 1)
    return guidance._predict_bin(Batch(z, rows, torch.full((2,), level)), view)


def test_pictures_that_trajectories_cannot_begin_from() -> None:
    guidance = make_guidance(trajectory="cached", azimuth_bins=3)
    with pytest.raises(ValueError, match=r"expected pictures \[4, 4, \d+, \d+\], one of each bin"):
        guidance.begin_from(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"expected --guidance.trajectory cached, got exact"):
        make_guidance(trajectory="exact").begin_from(torch.zeros(1, 4, 8, 8))
