"""The multi-view prior: quarter turns, its network, training, export, and what ships."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dsd_fast.diffusion import load_model
from dsd_fast.diffusion.ddim import sample_objects
from dsd_fast.judge import captions
from dsd_fast.prior import evaluate_multiview, models, quarters, render, train, train_multiview
from dsd_fast.prior.train import load_part
from dsd_fast.prior.views import QUARTER_ELEVATION, QUARTER_FOVY, QUARTER_FRAME, sample_quarters
from dsd_fast.scene.cameras import camera_condition

SHIPPED = Path(models.__file__).parent.parent / "assets"
CPU = torch.device("cpu")
# Of these the second is held out.
IDS = ["a#1", "Kator Legaz#cafe-table"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two objects of each of two models, as `render --quarter-turns` writes them."""
    path = tmp_path / "quarters"
    path.mkdir()
    views = sample_quarters(4, False, np.random.default_rng(0))
    n = len(views)
    rgba = np.zeros((n, 256, 256, 4), np.uint8)
    for row in range(n):  # a box of its row's brightness, to the left
        rgba[row, 80:180, 30:100] = [255, 10 * row, 0, 255]
    np.save(path / "rgba.npy", rgba)
    np.savez(
        path / "meta.npz",
        model=np.arange(n) // 8,
        noun=np.zeros(n, int),
        view=np.zeros(n, int),
        colour=np.full(n, -1),
        orbit=np.arange(n) // 4,
        azimuth=views.azimuth.astype(np.float32),
        elevation=views.elevation.astype(np.float32),
        distance=np.linalg.norm(views.position, axis=1).astype(np.float32),
        fovy=np.degrees(views.fovy).astype(np.float32),
        caption=np.zeros((n, 2), np.int32),
    )
    index = {
        "models": IDS,
        "nouns": ["box"],
        "views": captions.VIEWS,
        "colours": captions.COLOURS,
        "captions": ["a box, side view"],
    }
    (path / "index.json").write_text(json.dumps(index))
    return path


def test_four_views_are_a_quarter_turn_apart():
    views = sample_quarters(200, True, np.random.default_rng(3))
    azimuth, elevation = views.azimuth.reshape(-1, 4), views.elevation.reshape(-1, 4)
    turns = (azimuth - azimuth[:, :1]) % 360
    np.testing.assert_allclose(turns, np.broadcast_to([0, 90, 180, 270], turns.shape), atol=1e-9)
    assert (elevation == elevation[:, :1]).all()
    assert QUARTER_ELEVATION[0] <= elevation.min() < elevation.max() <= QUARTER_ELEVATION[1]
    first = azimuth[:, 0] % 90
    assert first.min() < 5 and first.max() > 85
    shared = (views.key, views.sky, views.gloss, views.colour, views.paint, views.stretch)
    for column in (*shared, views.fovy[:, None]):
        by_object = column.reshape(200, 4, -1)
        assert (by_object == by_object[:, :1]).all()
    fovy = np.degrees(views.fovy)
    assert QUARTER_FOVY[0] <= fovy.min() and fovy.max() <= QUARTER_FOVY[1]
    frame = np.linalg.norm(views.position, axis=1) * np.tan(views.fovy / 2)
    assert frame.min() >= QUARTER_FRAME[0] - 1e-9 and frame.max() <= QUARTER_FRAME[1] + 1e-9


def test_quarter_turns_are_four_views(tmp_path):
    for views, orbit, message in ((12, 12, "quarter turns make orbits of 4"), (6, 0, "divisor")):
        with pytest.raises(ValueError, match=f"views_per_orbit: .*{message}"):
            cfg = render.RenderConfig(tmp_path, tmp_path, views, orbit, quarter_turns=True)
            render.render_views(cfg)


def test_other_views_are_refused(folder):
    with np.load(folder / "meta.npz") as file:
        meta = dict(file)
    azimuth = meta["azimuth"].copy()
    azimuth[5] += 20
    for wrong in ({"azimuth": azimuth}, {"orbit": np.full(16, -1)}):
        np.savez(folder / "meta.npz", **{**meta, **wrong})
        with pytest.raises(ValueError, match="--quarter-turns"):
            quarters.Quarters(folder, CPU)
    np.savez(folder / "meta.npz", **{**meta, "model": np.ones(16, int)})
    with pytest.raises(ValueError, match="leave none for process 0 of 1; render more"):
        quarters.Quarters(folder, CPU)


class Left(torch.nn.Module):
    """Encodes a picture as its brightness at the left, in the middle and at the right, and green
    at the left."""

    def encode(self, images):
        rows = images[:, :, 128]
        places = [rows[:, 0, 60], rows[:, 0, 128], rows[:, 0, 200], rows[:, 1, 60]]
        mean = torch.stack(places, 1).view(-1, 4, 1, 1).expand(-1, -1, 32, 32)
        posterior = type("P", (), {"mean": mean, "std": torch.zeros_like(mean)})
        return type("E", (), {"latent_dist": posterior})


def test_objects_are_whole_on_one_background_and_mirrored_with_their_cameras(folder):
    torch.manual_seed(0)
    data = quarters.Quarters(folder, CPU)
    assert data.models == ["a#1", "a#1"]
    assert quarters.Quarters(folder, CPU, held_out=True).models == [IDS[1]] * 2
    data.encode(Left(), 8)
    latents, cameras, rows = data.sample(64)
    assert latents.shape == (64, 4, 4, 32, 32) and cameras.shape == (64, 4, 16)
    seen = latents[:, :, :, 0, 0]  # [64,4,4]
    # The middle of the picture is its background, the same in all views.
    assert (seen[:, :, 1] - seen[:, :1, 1]).abs().max() < 1e-3
    assert len(set(seen[:, 0, 1].tolist())) > 4
    plain = seen[:, 0, 0] > 0.99  # the red box is at the left
    assert 0 < plain.sum() < 64 and (seen[~plain][:, 0, 2] > 0.99).all()
    for i in range(64):
        number = data.rows[:, 0].tolist().index(int(rows[i]))
        side = 1.0 if plain[i] else -1.0
        want = camera_condition(data.elevation[number], side * data.azimuth[number])
        torch.testing.assert_close(cameras[i], want)
        if plain[i]:  # views in their order
            green = torch.arange(int(rows[i]), int(rows[i]) + 4) * 10 / 255 * 2 - 1
            torch.testing.assert_close(seen[i, :, 3], green, atol=1e-3, rtol=0)


@torch.no_grad()
def test_the_network_begins_as_the_text_models():
    """Four times the same view, of a camera that says nothing yet."""
    state = load_part(SHIPPED / "prior", "unet")
    text, views = models.build_unet().eval(), models.build_multiview_unet().eval()
    text.load_state_dict(state)
    views.load_state_dict(models.of_multiview(state))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 32, 32, generator=generator).expand(4, -1, -1, -1).contiguous()
    tokens = torch.randn(1, 32, 128, generator=generator).expand(4, -1, -1).contiguous()
    t = torch.tensor([300] * 4)
    found = views(latents, t, tokens, torch.randn(4, 16, generator=generator))[0]
    want = text(latents, t, tokens, return_dict=False)[0]
    assert float((found - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("as_int8", [True, False])
def test_training_exports_a_model_that_guidance_loads(folder, tmp_path, monkeypatch, as_int8):
    # A clock that looks move by half a second: as many steps on every machine.
    half_seconds = itertools.count(0.0, 0.5)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(half_seconds)))
    monkeypatch.setattr(train, "WARM_UP_STEPS", 1)
    cfg = train_multiview.MultiviewTrainConfig(
        views=folder,
        out=tmp_path / "state",
        minutes=0.08,
        batch_size=2,
        encodings=1,
        compile=False,
    )
    train_multiview.train_multiview(cfg)
    began = models.of_multiview(load_part(SHIPPED / "prior", "unet"))
    trained = load_part(tmp_path / "state", "unet")
    # What the cameras say is learned, and attention and convolutions go on.
    for name in (
        "camera_embed.2.weight",
        "input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight",
    ):
        assert (trained[name] - began[name]).abs().max() > 1e-4, name
    out = tmp_path / "model"
    train_multiview.export_multiview(
        train_multiview.MultiviewExportConfig(state=tmp_path / "state", out=out, int8=as_int8)
    )
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    weights = f"unet/diffusion_pytorch_model{'.int8' * as_int8}.safetensors"
    own = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
    assert files == own | {weights}
    model = load_model(out, n_views=4)
    loaded = model.unet.state_dict()
    for name, tensor in trained.items():
        scale = tensor.abs().max().clamp_min(1e-6)
        assert float((loaded[name] - tensor).abs().max() / scale) < 0.01, name
    with pytest.raises(ValueError, match="predicts 4 views"):
        load_model(out)


def test_the_shipped_model_draws_one_object_from_four_sides():
    model = load_model("embedded", n_views=4)
    noise = torch.randn(2, 4, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    azimuth = (30.0 + 90.0 * torch.arange(4)).expand(2, -1)
    elevation = torch.full((2, 4), 15.0)
    prompts = ["a red car", "a blue car"]
    images = sample_objects(model, prompts, noise, elevation, azimuth, 8, 4.0)
    assert images.shape == (2, 4, 3, 256, 256)
    # In the middle of every view is the paint.
    red, _, blue = images[:, :, :, 100:156, 100:156].mean((3, 4)).unbind(2)
    assert (red[0] > blue[0] + 0.1).all() and (blue[1] > red[1] + 0.1).all()


def test_views_of_one_object_agree(monkeypatch):
    """A ball is a disc from everywhere; nothing is high up from two sides and low from two."""
    monkeypatch.setattr(evaluate_multiview, "SIZE", 24)
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, 48)], indexing="ij")

    def disc(height: float) -> torch.Tensor:
        inside = x**2 + (y + height) ** 2 < 0.15
        return torch.where(inside, torch.tensor([0.9, 0.2, 0.1]).view(3, 1, 1), torch.tensor(0.7))

    cameras = (
        torch.zeros(4),
        45.0 + 90.0 * torch.arange(4),
        torch.full((4,), 1.6),
        torch.full((4,), 50.0),
    )
    one = torch.stack([disc(0.0)] * 4)
    none = torch.stack([disc(0.4), disc(-0.4)] * 2)
    agree, differ = (evaluate_multiview.consistency(v, cameras, 120) for v in (one, none))
    assert agree > 20 and agree > differ + 4


def test_held_out_objects_are_evaluated(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_multiview, "SIZE", 16)
    cfg = evaluate_multiview.MultiviewEvaluateConfig(
        views=folder, out=tmp_path / "report", device="cpu", objects=1, fit_steps=2, steps=1
    )
    report = evaluate_multiview.evaluate_multiview(cfg)
    assert report["objects"] == 1
    assert all(np.isfinite(report[name]) for name in ("multi-view", "single views", "real"))
    assert json.loads((tmp_path / "report" / "multiview-report.json").read_text()) == report
