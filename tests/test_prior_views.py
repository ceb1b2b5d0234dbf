"""The pose-conditioned prior: orbits, networks, training, export, scores; objects and truth."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from dsd_fast.diffusion import load_view_model
from dsd_fast.diffusion.reference_picture import CameraProjection, latent_feature_width
from dsd_fast.judge import captions, similarity
from dsd_fast.judge.truth import read_truth
from dsd_fast.prior import evaluate_views, models, objects, orbits, render, train, train_views
from dsd_fast.prior.train import load_part
from dsd_fast.prior.views import ORBIT_ELEVATION, STRETCH, sample_orbits

SHIPPED_TEXT = Path(models.__file__).parent.parent / "assets" / "prior"
CPU = torch.device("cpu")
# Of these the second and the last are held out.
IDS = ["a#1", "Kator Legaz#cafe-table", "a#2", "Scopia#van"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two orbits of four views of each of four models, as `render_views` writes them."""
    path = tmp_path / "orbits"
    path.mkdir()
    views = sample_orbits(8, 4, False, np.random.default_rng(0))
    n = len(views)
    rgba = np.zeros((n, 256, 256, 4), np.uint8)
    rng = np.random.default_rng(1)
    for row in range(n):  # a box of its model's colour, wider on one side
        left = int(rng.integers(60, 120))
        rgba[row, 80:180, left:200] = [60 * (row // 8), 90, 255 - 60 * (row // 8), 255]
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
        "captions": ["a box"],
    }
    (path / "index.json").write_text(json.dumps(index))
    return path


def test_orbits_share_light_and_paint():
    views = sample_orbits(3, 5, True, np.random.default_rng(0))
    assert len(views) == 15
    shared = (views.key, views.sky, views.gloss, views.colour, views.paint, views.stretch)
    for column in shared:
        by_orbit = column.reshape(3, 5, -1)
        assert (by_orbit == by_orbit[:, :1]).all()
    assert not (views.key[0] == views.key[5]).all()
    assert (views.centre == 0).all() and len(set(views.fovy.tolist())) == 1
    low, high = ORBIT_ELEVATION
    assert ((low <= views.elevation) & (views.elevation <= high)).all()
    distance = np.linalg.norm(views.position, axis=1)
    assert ((distance >= 1.5) & (distance <= 2)).all()
    # Evenly around: one azimuth in each fifth of the circle.
    assert sorted(((views.azimuth[:5] + 180) // 72).tolist()) == [0, 1, 2, 3, 4]


def test_half_of_the_orbits_are_stretched():
    stretch = sample_orbits(400, 1, False, np.random.default_rng(0)).stretch
    assert (stretch.max(axis=1) == 1).all() and stretch.min() >= STRETCH
    assert 0.4 < (stretch.min(axis=1) < 1).mean() < 0.6


def test_views_per_orbit_must_divide(tmp_path):
    for wrong, message in ((-1, "0 or more"), (5, "divisor of the 12 views")):
        with pytest.raises(ValueError, match=f"views_per_orbit: .*{message}"):
            render.render_views(render.RenderConfig(tmp_path, tmp_path, 12, wrong))


def test_held_out_models_are_never_trained_on(folder):
    seen, unseen = orbits.Orbits(folder, CPU), orbits.Orbits(folder, CPU, held_out=True)
    assert set(seen.models) == {"a#1", "a#2"}
    assert set(unseen.models) == {IDS[1], IDS[3]}
    halves = [orbits.Orbits(folder, CPU, rank, 2).rows for rank in range(2)]
    assert sorted(torch.cat(halves).flatten().tolist()) == sorted(seen.rows.flatten().tolist())


def test_views_without_orbits_are_refused(folder):
    with np.load(folder / "meta.npz") as file:
        meta = dict(file)
    np.savez(folder / "meta.npz", **{**meta, "orbit": np.full(len(meta["orbit"]), -1)})
    with pytest.raises(ValueError, match="--views-per-orbit"):
        orbits.Orbits(folder, CPU)
    del meta["orbit"]
    np.savez(folder / "meta.npz", **meta)
    with pytest.raises(ValueError, match="without orbit"):
        orbits.Orbits(folder, CPU)


class NumberingVae(torch.nn.Module):
    """Encodes a picture as the azimuth and elevation of its row, and 1 where it is mirrored."""

    def __init__(self, data: orbits.Orbits, folder: Path) -> None:
        super().__init__()
        with np.load(folder / "meta.npz") as file:
            self.azimuth, self.elevation = file["azimuth"], file["elevation"]
        self.rgba = np.load(folder / "rgba.npy")

    def encode(self, images: torch.Tensor):
        known = orbits.on_white(torch.from_numpy(self.rgba)) * 2 - 1
        latents = torch.zeros(len(images), 4, 1, 1)
        for i, image in enumerate(images):
            for mirrored, candidate in ((0, image), (1, image.flip(2))):
                error = (known - candidate).abs().mean((1, 2, 3))
                if error.min() == 0:
                    row = int(error.argmin())
                    latents[i, :3, 0, 0] = torch.tensor(
                        [self.azimuth[row], self.elevation[row], mirrored]
                    )
                    break

        class Posterior:
            mean, std = latents, torch.zeros_like(latents)

        class Encoded:
            latent_dist = Posterior

        return Encoded


def test_pairs_are_of_one_orbit_with_the_pose_between_them(folder):
    """The pose is that of the cameras, and of their mirror image where the pictures are."""
    rgba = np.load(folder / "rgba.npy")
    for row in range(len(rgba)):  # every picture another, and none its own mirror image
        rgba[row, :4, : 2 * row + 2] = [0, 0, 0, 255]
    np.save(folder / "rgba.npy", rgba)
    data = orbits.Orbits(folder, CPU)
    data.encode(NumberingVae(data, folder))
    torch.manual_seed(0)
    reference, target, pose = data.sample(64)
    azimuth, elevation, mirrored = (target[:, k, 0, 0] for k in range(3))
    at_azimuth, at_elevation, also = (reference[:, k, 0, 0] for k in range(3))
    assert torch.equal(mirrored, also) and set(mirrored.tolist()) == {0.0, 1.0}
    assert at_elevation.max() <= orbits.MAX_REFERENCE_ELEVATION + 0.05  # float16
    assert elevation.max() > at_elevation.max()
    turn = torch.deg2rad(azimuth - at_azimuth) * (1 - 2 * mirrored)
    torch.testing.assert_close(pose[:, 1], turn.sin(), atol=4e-3, rtol=0)
    torch.testing.assert_close(pose[:, 2], turn.cos(), atol=4e-3, rtol=0)
    polar = torch.deg2rad(at_elevation - elevation)
    torch.testing.assert_close(pose[:, 0], polar, atol=2e-3, rtol=0)
    assert pose[:, 3].abs().max() <= 0.5


def test_the_narrow_network_begins_as_the_text_models():
    state = load_part(SHIPPED_TEXT, "unet")
    narrow = models.narrowed(state)
    unet = models.build_view_unet()
    unet.load_state_dict(narrow)  # every name and shape
    # Untouched where the networks agree; the picture's channels have no effect yet.
    assert torch.equal(narrow["conv_out.weight"], state["conv_out.weight"])
    assert torch.equal(narrow["conv_in.weight"][:, :4], state["conv_in.weight"])
    assert narrow["conv_in.weight"][:, 4:].abs().max() == 0
    # Ten channels of every group of twelve.
    weight = state["down_blocks.2.resnets.0.norm2.weight"]
    expected = weight.view(16, 12)[:, :10].flatten()
    assert torch.equal(narrow["down_blocks.2.resnets.0.norm2.weight"], expected)
    # It still predicts: noise from pictures much better than nothing does.
    text = models.build_unet()
    text.load_state_dict(state)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 32, 32, generator=generator)
    t, context = torch.tensor([900, 900]), torch.zeros(2, 16, models.TEXT_WIDTH)
    with torch.no_grad():
        whole = text(z, t, context).sample
        part = unet(torch.cat([z, z], 1), t, context).sample
    assert torch.nn.functional.cosine_similarity(whole.flatten(), part.flatten(), 0) > 0.3


def test_the_network_ships_in_fifteen_megabytes():
    unet = models.build_view_unet()
    projection = CameraProjection(latent_feature_width(4), models.TEXT_WIDTH)
    count = sum(p.numel() for m in (unet, projection) for p in m.parameters())
    assert 2 * count < 14.95e6


def test_training_exports_a_model_that_guidance_loads(folder, tmp_path, monkeypatch):
    # A clock that looks move by half a second: as many steps on every machine.
    half_seconds = itertools.count(0.0, 0.5)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(half_seconds)))
    state = tmp_path / "state"
    cfg = train_views.ViewTrainConfig(
        views=folder, out=state, minutes=0.05, batch_size=2, compile=False
    )
    train_views.train_views(cfg)
    for share in (False, True):
        out = tmp_path / f"model{share}"
        train_views.export_views(
            train_views.ViewExportConfig(state=state, out=out, share_vae=share, int8=share)
        )
        name = f"diffusion_pytorch_model{'.int8' * share}.safetensors"
        assert {p.name for p in (out / "unet").iterdir()} == {"config.json", name}
        assert (out / "vae").exists() is not share
        model = load_view_model(out)
        assert model.latent_size == 32 and model.noise_path.prediction == "v_prediction"
        assert model.scaling_factor == pytest.approx(0.606369)
    trained = load_part(state, "unet")["conv_in.weight"]
    assert trained.shape == (48, 8, 3, 3)
    # Another piece goes on from the folder.
    train_views.train_views(
        train_views.ViewTrainConfig(
            views=folder,
            out=tmp_path / "more",
            minutes=0.05,
            batch_size=2,
            compile=False,
            resume=out,
            seed=1,
        )
    )
    again = load_part(tmp_path / "more", "camera_projection")
    assert again["proj.weight"].shape == (models.TEXT_WIDTH, 84)

    report = evaluate_views.evaluate_views(
        evaluate_views.ViewEvaluateConfig(
            views=folder, out=tmp_path / "report", model=str(out), device="cpu", pairs=3, steps=2
        )
    )
    assert report["pairs"] == 3 and report["held_out_models"] == 1
    assert report["autoencoder_of_truth"]["psnr_db"] > 25 > report["samples"]["psnr_db"]
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    assert imageio.imread(tmp_path / "report" / "view-samples.jpg").shape[2] == 3


def test_settings_of_training_are_checked(folder, tmp_path):
    for name, value in (("dropout", 1.5), ("batch_size", 0)):
        with pytest.raises(ValueError, match=name):
            train_views.ViewTrainConfig(views=folder, out=tmp_path, **{name: value})


# Figures.


def test_psnr_and_ssim():
    rng = np.random.default_rng(0)
    a = rng.random((32, 40, 3))
    b = np.clip(a + 0.1 * rng.normal(size=a.shape), 0, 1)
    assert similarity.psnr(a, a) == np.inf and similarity.ssim(a, a) == pytest.approx(1)
    assert similarity.psnr(np.zeros((2, 2, 3)), np.full((2, 2, 3), 0.1)) == pytest.approx(20)

    def local(x: np.ndarray) -> np.ndarray:  # means over windows that lie within the image
        return gaussian_filter(x, 1.5, radius=5, axes=(0, 1))[5:-5, 5:-5]

    mean_a, mean_b = local(a), local(b)
    cov = local(a * b) - mean_a * mean_b
    variances = local(a * a) - mean_a**2 + local(b * b) - mean_b**2
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    expected = np.mean(luminance * (2 * cov + 9e-4) / (variances + 9e-4))
    assert similarity.ssim(a, b) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="one shape"):
        similarity.psnr(a, b[:-1])
    with pytest.raises(ValueError, match="11 pixels"):
        similarity.ssim(a[:8], b[:8])


def test_objects_are_seen_from_the_azimuth_of_their_picture(tmp_path):
    cfg = objects.ObjectsConfig(pack=tmp_path, out=tmp_path, views=4, azimuth=30.0)
    views = objects.object_views(cfg, 3)
    assert views.azimuth.tolist() == [30, 30, 120, 210, 300]
    assert views.elevation.tolist() == [5, 15, 15, 15, 15]
    assert np.linalg.norm(views.position, axis=1) == pytest.approx(1.75)
    assert (views.key == views.key[0]).all() and (views.colour == -1).all()
    assert objects.object_name("Scopia#Kitchen small/1") == "kitchen-small-1"


def test_truth_is_checked(tmp_path):
    with pytest.raises(ValueError, match="render-objects"):
        read_truth(tmp_path)
    np.savez(tmp_path / "truth.npz", rgba=np.zeros((2, 8, 8, 4), np.uint8))
    with pytest.raises(ValueError, match="elevation"):
        read_truth(tmp_path)


SHIPPED = SHIPPED_TEXT.parent / "view_prior"


def test_the_shipped_model_turns_what_it_sees():
    """It is complete, small, and another pose gives another picture."""
    files = {p.relative_to(SHIPPED).as_posix() for p in SHIPPED.rglob("*") if p.is_file()}
    assert files == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "camera_projection/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.int8.safetensors",
    }
    assert sum((SHIPPED / name).stat().st_size for name in files) < 8e6
    model = load_view_model("embedded")
    picture = torch.ones(1, 3, 256, 256)
    picture[:, :, 90:170, 60:200] = torch.tensor([0.7, 0.1, 0.1])[:, None, None]
    model.condition(picture)
    pose = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 32, 32, generator=generator).expand(2, -1, -1, -1)
    same, turned = evaluate_views.sample_view(model, pose, noise, 8, 3.0)
    truth_ = picture[0].permute(1, 2, 0).numpy()
    near, far = (similarity.psnr(x.permute(1, 2, 0).numpy(), truth_) for x in (same, turned))
    assert near > 18 and near > far
