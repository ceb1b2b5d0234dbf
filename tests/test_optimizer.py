"""Adam that leaves out what is not finite, and the loss scale."""

from contextlib import nullcontext

import pytest
import torch
from conftest import cuda_only

from dsd_fast.config import ConfigError, TrainConfig, check, preset
from dsd_fast.run import optimizer as module
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.run.optimizer import Adam
from dsd_fast.scene.field import FieldConfig, GridConfig
from dsd_fast.scene.field_scene import FieldScene
from dsd_fast.scene.protocol import Trainable
from dsd_fast.scene.rates import OptimizerConfig

YES, NO = torch.tensor(True), torch.tensor(False)


def small_config() -> TrainConfig:
    cfg = preset("dsd")
    cfg.field = FieldConfig(grid=GridConfig(n_levels=2, log2_table_size=8, start_level=1))
    return cfg


@pytest.fixture
def scene(device) -> FieldScene:
    return FieldScene(small_config(), torch.Generator().manual_seed(0)).to(device)


def make_optimizer(scene: FieldScene, device: torch.device) -> Adam:
    cfg = OptimizerConfig()
    return Adam(scene.trainables(), cfg.betas, cfg.eps, device)


def total(scene: FieldScene) -> torch.Tensor:
    return sum((p * (i + 1)).sum() for i, p in enumerate(scene.parameters()))


def snapshot(scene: FieldScene) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in scene.named_parameters()}


def unchanged(scene: FieldScene, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in scene.named_parameters())


def test_first_step_moves_each_group_by_its_rate(scene, device):
    before = snapshot(scene)
    norm = make_optimizer(scene, device).step(total(scene), YES.to(device))
    squares = [(i + 1) ** 2 * p.numel() for i, p in enumerate(scene.parameters())]
    assert norm.item() == pytest.approx(sum(squares) ** 0.5, rel=1e-5)
    for name, p in scene.named_parameters():
        rate = 0.01 if name.startswith("field.") else 0.001
        torch.testing.assert_close(before[name] - p, torch.full_like(p, rate), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_share_of_the_rate_reaches_the_half_copy(device, on_device):
    """Of an eighth, a number of the host or a tensor of the device; a step left out moves none."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 100, device=device))
    before, half = parameter.detach().clone(), parameter.detach().half()
    trainable = Trainable(parameter, 0.08, lambda: nullcontext(half))
    optimizer = Adam({"x": trainable}, (0.9, 0.99), 1e-15, device)
    share = torch.tensor(0.125, device=device) if on_device else 0.125
    optimizer.step((3 * parameter).sum(), YES.to(device), share)
    moved = torch.full_like(before, 0.01)
    torch.testing.assert_close(before - parameter, moved, rtol=1e-4, atol=1e-7)
    assert torch.equal(half, parameter.half())
    after = parameter.detach().clone()
    optimizer.step((3 * parameter).sum(), NO.to(device), share)
    assert torch.equal(parameter, after) and torch.equal(half, after.half())


def test_the_share_over_a_run():
    assert OptimizerConfig().share(7) is None and OptimizerConfig(lr_share=1).share(7) is None
    falling = OptimizerConfig(lr_share=(10, 1.0, 0.1, 20))
    assert [falling.share(step) for step in (0, 10, 15, 20, 99)] == pytest.approx(
        [1, 1, 0.55, 0.1, 0.1]
    )
    with pytest.raises(ConfigError, match="lr_share"):
        check(OptimizerConfig(lr_share=(10, 1.0, 2.0, 20)))


@pytest.mark.parametrize("case", ["nan", "inf", "veto"])
def test_a_step_that_is_not_finite_changes_nothing(scene, device, case):
    optimizer = make_optimizer(scene, device)
    optimizer.step(total(scene), YES.to(device))
    before = snapshot(scene)
    moments = {k: v.clone() for k, v in optimizer.state_dict()["adam"]["field.grid.table"].items()}
    loss = total(scene) * {"nan": float("nan"), "inf": float("inf"), "veto": 1.0}[case]
    optimizer.step(loss, (NO if case == "veto" else YES).to(device))
    assert unchanged(scene, before)
    after = optimizer.state_dict()["adam"]["field.grid.table"]
    assert all(torch.equal(after[k], moments[k]) for k in moments)
    assert (optimizer.skipped.item(), optimizer.bad_run.item()) == (1, 1)
    optimizer.step(total(scene), YES.to(device))
    assert (optimizer.skipped.item(), optimizer.bad_run.item()) == (1, 0)
    assert not unchanged(scene, before)


def test_loss_scale_halves_doubles_and_leaves_the_step_alone(scene, device, monkeypatch):
    monkeypatch.setattr(module, "GROWTH_INTERVAL", 3)
    optimizer = make_optimizer(scene, device)
    optimizer._scaling = True
    optimizer.scale = torch.tensor(2.0**16, device=device)
    plain = FieldScene(small_config(), torch.Generator().manual_seed(0)).to(device)
    reference = make_optimizer(plain, device)
    reference._scaling, reference.scale = False, torch.tensor(1.0, device=device)
    scales = []
    for ok in (YES, YES, NO, YES, YES, YES, YES):
        norm = optimizer.step(total(scene), ok.to(device))
        expected = reference.step(total(plain), ok.to(device))
        torch.testing.assert_close(norm, expected)
        scales.append(optimizer.scale.item() / 2**16)
    assert scales == [1, 1, 0.5, 0.5, 0.5, 1, 1]
    for p, q in zip(scene.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q)


def test_state_round_trip(scene, device):
    optimizer = make_optimizer(scene, device)
    for ok in (YES, NO, YES):
        optimizer.step(total(scene), ok.to(device))
    other = FieldScene(small_config()).to(device)
    other.load_state_dict(scene.state_dict())
    resumed = make_optimizer(other, device)
    resumed.load_state_dict(optimizer.state_dict())
    for each, its_scene in ((optimizer, scene), (resumed, other)):
        each.step(total(its_scene).square(), YES.to(device))
    assert unchanged(other, snapshot(scene))
    assert resumed.skipped.item() == 1


def test_moments_of_torchs_adam_go_on(scene, device):
    """A state written by torch.optim.Adam(fused=True) loads, and the next step is torch's."""
    plain = FieldScene(small_config(), torch.Generator().manual_seed(0)).to(device)
    cfg = OptimizerConfig()
    adam = torch.optim.Adam(
        [
            {"params": list(plain.field.parameters()), "lr": cfg.geometry_lr},
            {"params": list(plain.background.parameters()), "lr": cfg.background_lr},
        ],
        betas=cfg.betas,
        eps=cfg.eps,
        fused=True,
    )
    total(plain).backward()
    adam.step()
    scene.load_state_dict(plain.state_dict())
    optimizer = make_optimizer(scene, device)
    state = optimizer.state_dict()
    state["adam"] = {name: adam.state[p] for name, p in plain.named_parameters()}
    optimizer.load_state_dict(state)
    optimizer.step(total(scene).square(), YES.to(device))
    adam.zero_grad()
    total(plain).square().backward()
    adam.step()
    after = optimizer.state_dict()["adam"]
    for name, p in plain.named_parameters():
        torch.testing.assert_close(scene.get_parameter(name), p, rtol=1e-5, atol=1e-6)
        assert set(after[name]) == set(adam.state[p])
        assert after[name]["step"].item() == 2.0


@cuda_only
def test_the_half_table_follows_the_table(scene, device):
    """In the same pass, and also past a step that is left out."""
    optimizer = make_optimizer(scene, device)
    for ok in (YES, NO, YES):
        loss = scene.field(torch.rand(50, 3, device=device)).density.sum()
        optimizer.step(loss + total(scene), ok.to(device))
        address = scene.field.half_table().data_ptr()
        assert torch.equal(scene.field._half_table, scene.field.grid.table.half())
        assert scene.field.half_table().data_ptr() == address


def test_moments_that_do_not_fit(scene, device):
    optimizer = make_optimizer(scene, device)
    optimizer.step(total(scene), YES.to(device))
    state = optimizer.state_dict()
    state["adam"]["field.grid.table"] = {"exp_avg": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"does not fit .* field\.grid\.table"):
        optimizer.load_state_dict(state)
