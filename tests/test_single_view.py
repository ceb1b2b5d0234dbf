"""Reconstruction from one picture: the model of views, its guidance, the picture, whole runs."""

import json
import logging
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_model import build_tiny_model, build_tiny_view_model

from dsd_fast import train as module
from dsd_fast.config import preset
from dsd_fast.diffusion import load_view_model
from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.reference_picture import (
    latent_feature_width,
    latent_features,
    relative_pose,
)
from dsd_fast.evaluate import truth
from dsd_fast.evaluate.assets import open_run
from dsd_fast.guidance import Guidance, GuidanceConfig, dsd_gradient, make_guidance
from dsd_fast.guidance.conditions.pose import (
    OrbitBins,
    PoseConditions,
    Reference,
)
from dsd_fast.judge.truth import Truth
from dsd_fast.picture_file import read_rgba
from dsd_fast.run import checkpoint, outputs
from dsd_fast.scene import picture as single_view
from dsd_fast.scene.cameras import CameraBatch, RandomCameras, eval_camera
from dsd_fast.scene.field import Field, FieldConfig, GridConfig
from dsd_fast.scene.picture_scene import color_error, normal_smoothness, surface_smoothness
from dsd_fast.scene.renderer import RenderOutput
from dsd_fast.schedules import Schedule

REFERENCE = Reference(5.0, 0.0, (-10.0, 80.0), 8, 3)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    return build_tiny_view_model(tmp_path_factory.mktemp("views") / "clip")


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory) -> Path:
    return build_tiny_view_model(tmp_path_factory.mktemp("views") / "small", clip=False)


@pytest.fixture
def picture(tmp_path) -> Path:
    """A red disc on nothing, 24 wide and 20 high."""
    y, x = np.mgrid[:20, :24]
    alpha = ((y - 9.5) ** 2 + (x - 11.5) ** 2 < 40) * 255
    rgba = np.zeros((20, 24, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, alpha
    imageio.imwrite(tmp_path / "disc.png", rgba)
    return tmp_path / "disc.png"


def conditioned(folder: Path):
    model = load_view_model(folder)
    rgb = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    model.condition(rgb)
    return model, rgb


# Conditioning.


def test_pose_is_zero123s():
    pose = relative_pose(
        torch.tensor([35.0]), torch.tensor([120.0]), torch.tensor([2.0]), 5.0, 30.0, 1.5
    )
    # [rad((90 - e) - (90 - e_ref)), sin, cos, difference of distance]
    expected = [math.radians(55 - 85), 1.0, 0.0, 0.5]
    torch.testing.assert_close(pose, torch.tensor([expected]), atol=1e-6, rtol=0)


def test_latent_features_are_means_by_part_with_their_place():
    latents = torch.randn(2, 4, 32, 32)
    features = latent_features(latents)
    assert features.shape == (2, 16, latent_feature_width(4))
    part = latents[1, :, 8:16, 16:24]  # second row, third column
    expected = F.avg_pool2d(part[None], 2).flatten()
    torch.testing.assert_close(features[1, 6, :64], expected)
    assert features[1, 6, 64:].argmax() == 6 and features[1, 6, 64:].sum() == 1


@pytest.mark.parametrize("kind", ["clip", "small"])
def test_view_model_asks_its_unet_for_both_kinds_of_rows(kind, clip_folder, small_folder):
    model, rgb = conditioned(clip_folder if kind == "clip" else small_folder)
    pose = torch.tensor([[0.1, 0.5, 0.8, -0.2], [0.0, -0.5, 0.8, 0.3]])
    condition = model.conditions(pose)
    latents = model._posterior(rgb)[0]
    if kind == "clip":
        image = F.interpolate(rgb, (28, 28), mode="bicubic", antialias=True).clamp(0, 1)
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
        features = model.image_encoder(pixel_values=(image - mean) / std).image_embeds[:, None]
    else:
        features = latent_features(latents)
    expected = model.projection(features.expand(2, -1, -1), pose)
    torch.testing.assert_close(condition.tokens, expected, atol=1e-6, rtol=1e-5)

    noisy = torch.randn(2, 4, 8, 8)
    t = torch.tensor([500, 500])
    known = condition.rows(0, 1)
    without = known.map(torch.zeros_like)
    both = Condition.cat([known, without])
    eps = model.predict_noise(noisy, t, both)
    # The posterior's mean without the scaling factor beside the first row, zeros beside the second.
    beside = torch.cat([latents, torch.zeros_like(latents)])
    with torch.no_grad():
        by_hand = model.unet(torch.cat([noisy, beside], 1), t, both.tokens).sample
    torch.testing.assert_close(eps, by_hand, atol=1e-6, rtol=1e-5)
    flipped = model.predict_noise(noisy, t, Condition.cat([without, known]))
    assert (flipped - eps).abs().max() > 1e-4
    told = model.conditions(pose[:1].expand(2, -1), torch.tensor([1.0, 0.0]))
    assert all(torch.equal(told[name], both[name]) for name in both)


def test_a_view_model_needs_a_picture_first(small_folder):
    model = load_view_model(small_folder)
    with pytest.raises(ValueError, match="call condition"):
        model.conditions(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"\[1,3,H,W\]"):
        model.condition(torch.rand(2, 3, 8, 8))


def test_a_vae_may_lie_in_another_folder(small_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small_folder, folder)
    shutil.move(folder / "vae", tmp_path / "shared")
    with pytest.raises(FileNotFoundError, match="vae"):
        load_view_model(folder)
    (folder / "model_index.json").write_text(json.dumps({"_vae_folder": "../shared"}))
    first, second = load_view_model(folder), load_view_model(small_folder)
    for a, b in zip(first.vae.parameters(), second.vae.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.model_hash == second.model_hash


@pytest.mark.parametrize(
    "piece, error, message",
    [
        ("clip_camera_projection", FileNotFoundError, "text-to-image model cannot"),
        ("image_encoder", FileNotFoundError, "image_encoder"),
        ("unet", FileNotFoundError, "config.json"),
        ("scheduler", FileNotFoundError, "scheduler_config.json"),
    ],
)
def test_a_missing_piece_is_named(piece, error, message, clip_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(clip_folder, folder)
    shutil.rmtree(folder / piece)
    with pytest.raises(error, match=message):
        load_view_model(folder)


def test_models_that_do_not_fit_are_refused(clip_folder, small_folder, tmp_path):
    text = build_tiny_model(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="camera_projection"):
        load_view_model(text)
    # A projection of the other kind: its width is not that of the features.
    folder = tmp_path / "mixed"
    shutil.copytree(clip_folder, folder)
    shutil.copytree(
        small_folder / "camera_projection", folder / "clip_camera_projection", dirs_exist_ok=True
    )
    with pytest.raises(ValueError, match="reads 80 features and a pose of 4, the picture gives 12"):
        load_view_model(folder)
    shutil.copytree(text / "unet", folder / "unet", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="4 input and 4 output channels; expected 8 and 4"):
        load_view_model(folder)


# Guidance.


def test_bins_are_keyed_by_azimuth_all_around_and_by_elevation():
    bins = OrbitBins(REFERENCE)
    assert len(bins) == 24
    centres = torch.tensor([bins.camera(i) for i in range(24)])
    assert bins.index(centres[:, 0], centres[:, 1]) == list(range(24))
    assert centres[:8, 0].unique().tolist() == [5.0]
    left, right = bins.index(torch.tensor([20.0, 20.0]), torch.tensor([60.0, -60.0]))
    assert left != right
    assert bins.index(torch.tensor([-30.0, 89.0]), torch.tensor([0.1, 360.1])) == [4, 20]
    elevation, azimuth = bins.snap(torch.tensor([24.0]), torch.tensor([181.0]))
    assert (elevation.item(), azimuth.item()) == (35.0, -157.5)
    with pytest.raises(ValueError, match="at least one"):
        OrbitBins(Reference(5.0, 0.0, (-10.0, 80.0), 0, 3))


def config(**changes) -> GuidanceConfig:
    values = {"guidance_scale": 3.0, "use_perp_neg": False, "standard_cfg": True, **changes}
    return GuidanceConfig(**values)


def by_pose(cfg: GuidanceConfig, model, noise: torch.Tensor) -> Guidance:
    return make_guidance(cfg, model, PoseConditions(REFERENCE, model, cfg), noise, 100)


def predictor(model, elevation: torch.Tensor, azimuth: torch.Tensor):
    """e_0 + s (e_c - e_0) by the model's own forward, one view at a time."""

    def predict(z, t, scale):
        out = []
        for i in range(len(z)):
            pose = relative_pose(
                elevation[i : i + 1], azimuth[i : i + 1], torch.zeros(1), 5.0, 0.0, 0.0
            )
            condition = model.conditions(pose)
            without = condition.map(torch.zeros_like)
            known = model.predict_noise(z[i : i + 1], t[i : i + 1], condition)
            empty = model.predict_noise(z[i : i + 1], t[i : i + 1], without)
            out.append(empty + scale * (known - empty))
        return torch.cat(out)

    return predict


@pytest.mark.parametrize("trajectory, table", [("exact", 0), ("cached", 0), ("cached", 1)])
@pytest.mark.parametrize("share", [0.0, 1.0, (400, 1.0, 0.2, 700)])
def test_dsd_is_that_of_text_with_poses_for_text(small_folder, trajectory, table, share):
    """On the bins' centres, where the cached trajectory is the view's own."""
    model, _ = conditioned(small_folder)
    bins = OrbitBins(REFERENCE)
    elevation, azimuth = bins.snap(torch.tensor([12.0, 70.0, 3.0]), torch.tensor([5.0, -100, 179]))
    noise = torch.randn(1, 4, 8, 8)
    cfg = config(trajectory=trajectory, noise_table_step=table, trajectory_share=share)
    guidance = by_pose(cfg, model, noise)
    x = torch.randn(3, 4, 8, 8, requires_grad=True)
    t, t_delta = torch.tensor([700, 640, 400]), torch.tensor([730, 640, 405])
    output = guidance.at_levels(x, elevation, azimuth, t, t_delta)
    expected = dsd_gradient(
        x.detach(),
        noise=noise,
        t=t,
        t_delta=t_delta,
        predict=predictor(model, elevation, azimuth),
        alphas_cumprod=model.noise_path.alpha.square(),
        guidance_scale=3.0,
        trajectory_share=torch.tensor([Schedule.parse(share)(level) for level in t.tolist()]),
    )
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(output.grad, expected, atol=2e-5, rtol=1e-4)
    output.loss.backward()
    torch.testing.assert_close(x.grad, output.grad / 3)


def test_left_and_right_are_guided_differently(small_folder):
    model, _ = conditioned(small_folder)
    guidance = by_pose(config(), model, torch.randn(1, 4, 8, 8))
    x = torch.randn(1, 4, 8, 8)
    grads = [
        guidance.at_levels(x, torch.tensor([5.0]), torch.tensor([a]), 600, 620).grad
        for a in (67.5, -67.5)
    ]
    assert (grads[0] - grads[1]).abs().max() > 1e-4


def test_sds_is_dreamfusions(small_folder):
    model, _ = conditioned(small_folder)
    guidance = by_pose(config(method="sds"), model, torch.zeros(1, 4, 8, 8))
    assert guidance.name == "sds"
    elevation, azimuth = torch.tensor([12.0, 33.0]), torch.tensor([40.0, -71.0])
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    noise, t = torch.randn(2, 4, 8, 8), torch.tensor([700, 300])
    output = guidance.at_levels(x, elevation, azimuth, t, t, {"eps": noise})
    abar = model.noise_path.alpha.square()[t].view(-1, 1, 1, 1)
    noisy = abar.sqrt() * x.detach() + (1 - abar).sqrt() * noise
    eps = predictor(model, elevation, azimuth)(noisy, t, 3.0)
    torch.testing.assert_close(output.grad, (1 - abar) * (eps - noise), atol=2e-5, rtol=1e-4)
    output.loss.backward()
    torch.testing.assert_close(x.grad, output.grad / 2)
    with pytest.raises(ValueError, match="eps"):
        guidance.plan_levels(elevation, azimuth, t, t)


def test_stable_zero123s_pose_ends_with_the_polar_angle(small_folder):
    model, _ = conditioned(small_folder)
    poses = [
        PoseConditions(replace(REFERENCE, polar=polar), model, config())
        .rows(torch.tensor([30.0]), torch.tensor([90.0]))
        .columns["pose"][0]
        for polar in (False, True)
    ]
    assert torch.equal(poses[0][:3], poses[1][:3])
    assert (poses[0][3].item(), poses[1][3].item()) == (0, pytest.approx(math.radians(85)))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_perp_neg": True},
        {"standard_cfg": False},
        {"mirror_trajectory": True},
        {"method": "sdi"},
    ],
)
def test_settings_of_text_are_refused(small_folder, changes):
    model, _ = conditioned(small_folder)
    with pytest.raises(ValueError, match=next(iter(changes))):
        by_pose(config(**changes), model, torch.randn(1, 4, 8, 8))


def test_cameras_stand_on_the_bins_of_cached_trajectories():
    cfg = preset("embedded", 100, True, "single-view")
    bins = OrbitBins(REFERENCE)
    centres = {(round(e, 3), round(a, 3)) for e, a in (bins.camera(i) for i in range(24))}
    generator = torch.Generator().manual_seed(0)
    free, fixed = RandomCameras(cfg.cameras), RandomCameras(cfg.cameras, bins)
    for step in range(20):
        views = fixed.sample(step, generator)
        at = (round(views.elevation_deg.item(), 3), round(views.azimuth_deg.item(), 3))
        assert at in centres
        position = views.camera_positions[0]
        assert position.norm() == pytest.approx(1.75, rel=1e-5)
        assert math.degrees(math.asin(position[2] / 1.75)) == pytest.approx(at[0], abs=1e-3)
    drawn = [free.sample(1, generator).azimuth_deg.item() for _ in range(20)]
    assert len(set(drawn)) == 20


# The picture.


def test_a_picture_is_padded_and_keeps_its_alpha(picture):
    rgba = single_view.read_picture(picture)
    assert rgba.shape == (1, 4, 24, 24)
    assert rgba[0, 3, :2].max() == 0 and rgba[0, 3, 12, 12] == 1
    white = single_view.on_color(rgba)
    assert white[0, :, 0, 0].tolist() == [1, 1, 1]
    torch.testing.assert_close(white[0, :, 12, 12], torch.tensor([200 / 255, 0, 0]))


def test_colours_of_what_is_not_there_do_not_bleed():
    rgba = torch.zeros(1, 4, 4, 4)
    rgba[:, 1] = 1  # green where nothing is
    rgba[:, :, :, 0] = torch.tensor([1.0, 0, 0, 1])[None, :, None]
    small = single_view.resized(rgba, 2)
    torch.testing.assert_close(small[0, :, 0, 0], torch.tensor([1.0, 0, 0, 0.5]))
    assert single_view.resized(rgba, 8).shape == (1, 4, 8, 8)


def test_a_recentred_object_fills_its_share(picture):
    rgba = single_view.read_picture(picture, recenter=True)
    rows = (rgba[0, 3] > 0.5).any(1).nonzero()
    size = rgba.shape[-1]
    filled = (rows[-1] - rows[0] + 1).item() / size
    assert filled == pytest.approx(single_view.RECENTRED_SIDE, abs=1.5 / size)
    assert abs(rows[0] + rows[-1] - (size - 1)) <= 1


@pytest.mark.parametrize("columns", [(0, 80), (1, 80), (50, 80), (0, 30)])
def test_an_object_at_the_pictures_edge_is_recentred(columns, tmp_path, caplog):
    rgba = np.zeros((30, 80, 4), np.uint8)
    rgba[4:26, slice(*columns)] = 200, 0, 0, 255
    imageio.imwrite(tmp_path / "tight.png", rgba)
    caplog.set_level(logging.INFO)
    read = [single_view.read_picture(tmp_path / "tight.png", again) for again in (False, True)]
    assert torch.equal(*read)
    single_view.read_picture(tmp_path / "tight.png")
    assert caplog.text.count("the object reaches the picture's edge") == 1


@pytest.mark.parametrize("rows", [(2, 28), (0, 30)])
def test_an_object_with_room_around_it_stays_where_it_is(rows, tmp_path):
    rgba = np.zeros((30, 80, 4), np.uint8)
    rgba[slice(*rows), 6:60] = 200, 0, 0, 255
    imageio.imwrite(tmp_path / "wide.png", rgba)
    seen = single_view.read_picture(tmp_path / "wide.png")
    assert seen.shape == (1, 4, 80, 80)
    there = torch.from_numpy(rgba.astype(np.float32) / 255).permute(2, 0, 1)
    assert torch.equal(seen[0, :, 25:55], there)
    assert seen[0, 3].sum() == there[3].sum()


def test_hair_beyond_the_outline_is_not_cut_off(tmp_path):
    rgba = np.zeros((60, 60, 4), np.uint8)
    rgba[10:40, 5:35] = 200, 0, 0, 100
    rgba[13:37, 8:32, 3] = 255
    imageio.imwrite(tmp_path / "fur.png", rgba)
    seen = single_view.read_picture(tmp_path / "fur.png", recenter=True)
    assert seen.shape == (1, 4, 32, 32)  # 24 are three quarters of it
    assert seen[0, 3, 1:31, 1:31].min() == 100 / 255
    torch.testing.assert_close(seen[0, 3].sum(), torch.tensor(rgba[..., 3].sum() / 255).float())


def test_grey_palettes_and_turned_photos_are_read(tmp_path):
    imageio.imwrite(tmp_path / "grey.png", np.full((8, 8), 40000, np.uint16))
    assert read_rgba(tmp_path / "grey.png")[0, 0].tolist() == [156, 156, 156, 255]

    palette = Image.new("P", (8, 6))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((2, 1), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    rgba = read_rgba(tmp_path / "palette.png")
    assert rgba[1, 2].tolist() == [40, 50, 60, 255] and rgba[0, 0, 3] == 0

    photo = Image.new("RGB", (8, 4), "red")
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned a quarter
    photo.save(tmp_path / "photo.jpg", exif=exif)
    assert read_rgba(tmp_path / "photo.jpg").shape == (8, 4, 4)


def test_a_background_needs_rembg(tmp_path, monkeypatch):
    imageio.imwrite(tmp_path / "photo.png", np.full((8, 8, 3), 90, np.uint8))
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(ImportError, match="pip install 'rembg"):
        single_view.read_picture(tmp_path / "photo.png")

    class Remover:
        @staticmethod
        def remove(rgb):
            alpha = np.zeros((*rgb.shape[:2], 1), np.uint8)
            alpha[2:6, 2:6] = 255
            return np.concatenate([rgb, alpha], axis=2)

    monkeypatch.setitem(sys.modules, "rembg", Remover)
    rgba = single_view.read_picture(tmp_path / "photo.png")
    assert rgba[0, 3].sum() == 16


def test_pictures_that_show_nothing_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        single_view.read_picture(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="not a picture that is PNG, JPEG or WebP"):
        single_view.read_picture(tmp_path / "text.png")
    empty = np.zeros((32, 32, 4), np.uint8)
    imageio.imwrite(tmp_path / "empty.png", empty)
    with pytest.raises(ValueError, match="it shows no object"):
        single_view.read_picture(tmp_path / "empty.png")


# Losses.


def test_losses_of_the_reference_view():
    truth = torch.rand(1, 6, 6, 4)
    behind = torch.ones(1, 1, 1, 3)
    alpha = truth[..., 3:]
    over = truth[..., :3] * alpha + 1 - alpha
    assert color_error(over, truth, behind) < 1e-12
    torch.testing.assert_close(color_error(over + 0.1, truth, behind), torch.tensor(0.01))


def test_normal_smoothness_is_of_neighbours():
    normal = torch.zeros(1, 4, 5, 3)
    assert normal_smoothness(normal) == 0
    normal[0, :, 3:, 0] = 1  # one step across in each of 4 rows, of 4 rows x 4 pairs x 3 channels
    torch.testing.assert_close(normal_smoothness(normal), torch.tensor(4 / 48))


def sphere_view() -> tuple[Field, CameraBatch, RenderOutput]:
    """A field whose surface is nearly a sphere of radius 0.3, and its picture by hand."""
    grid = GridConfig(n_levels=2, start_level=2, base_resolution=4, log2_table_size=8)
    field = Field(FieldConfig(grid=grid, radius=1.0, density_blob_std=0.3, half_table=False))
    cfg = preset("embedded", 10, True, "single-view").cameras
    views = eval_camera(cfg, size=(8, 8))
    shape = (1, 8, 8, 1)
    image = RenderOutput(
        rgb=torch.zeros(1, 8, 8, 3),
        opacity=torch.ones(shape),
        depth=torch.full(shape, 1.75 - 0.3),
        normal=torch.zeros(1, 8, 8, 3),
        z_variance=torch.zeros(shape),
        rgb_fg=torch.zeros(1, 8, 8, 3),
        orientation=torch.zeros(shape),
        n_samples=torch.tensor(64),
    )
    return field, views, image


def test_surface_smoothness_compares_normals_beside_each_other():
    field, views, image = sphere_view()
    offsets = 0.01 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    near = surface_smoothness(field, views, image, offsets)
    points = (views.rays_o + 1.45 * views.rays_d).reshape(-1, 3)
    expected = (field(points).normal - field(points + offsets).normal).abs().mean()
    torch.testing.assert_close(near, expected)
    assert surface_smoothness(field, views, image, 10 * offsets) > 3 * near > 0
    near.backward()
    assert field.density_network.layers[0].weight.grad.abs().max() > 0

    hidden = RenderOutput(**{**vars(image), "opacity": torch.zeros(1, 8, 8, 1)})
    nothing = surface_smoothness(field, views, hidden, offsets)
    assert nothing == 0
    nothing.backward()


# Whole runs.

SMALL = """
    --task single-view --device cpu --cameras.width 8 12 --cameras.height 8 12
    --cameras.batch-size 2 1 --cameras.eval-height 16 --cameras.eval-width 16
    --field.grid.n-levels 3 --field.grid.start-level 2 --field.grid.log2-table-size 10
    --renderer.num-samples-per-ray 48 --renderer.occupancy.resolution 16 --mesh.resolution 24
    --pictures.preview-size 16 --pictures.sheet-views 2 --pictures.no-turntable
    --trainer.log-every 1 --trainer.no-progress --single-view.azimuth-bins 4
    --single-view.elevation-bins 2
""".split()  # noqa: SIM905


def run(folder: Path, picture: Path | None, model: Path, *flags: str, steps: int = 6) -> int:
    argv = [*SMALL, "--output", str(folder), "--model", str(model), "--max-steps", str(steps)]
    if picture is not None:
        argv += ["--image", str(picture)]
    return module.main([*argv, *flags])


def folder_of(output: Path) -> outputs.RunFolder:
    (config,) = output.glob("*/disc+single-view*-seed0/config.json")
    return outputs.RunFolder(config.parent)


def tensors(output: Path, step: int) -> dict:
    flat: dict = {}
    path = checkpoint.step_path(folder_of(output).checkpoints, step)
    checkpoint._flatten(checkpoint.load(path), "", flat)
    return flat


@pytest.mark.parametrize(
    "flags", [(), ("--guidance.trajectory", "exact"), ("--guidance.method", "sds")]
)
def test_a_run_resumes_bit_for_bit(flags, small_folder, picture, tmp_path):
    """Across the change of resolution and of the number of views."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert run(whole, picture, small_folder, *flags) == 0
    assert run(pieces, picture, small_folder, *flags, "--stop-at", "2") == 0
    assert run(pieces, picture, small_folder, *flags, "--resume", "auto") == 0
    first, second = tensors(whole, 6), tensors(pieces, 6)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    lines = folder_of(whole).metrics.read_text().splitlines()
    last = json.loads(lines[-1])
    assert {"dsd", "rgb", "mask", "normal_smooth", "normal_smooth_3d", "orient"} <= last.keys()
    assert last["rgb"] < json.loads(lines[0])["rgb"]
    assert last["size"] == 12 and "convex" not in last
    files = {p.name for p in folder_of(whole).path.iterdir()}
    assert {"preview.png", "config.json", "metrics.jsonl"} <= files


def test_a_run_with_clip_features(clip_folder, picture, tmp_path):
    assert run(tmp_path / "out", picture, clip_folder, steps=2) == 0


def test_a_run_comes_to_look_like_its_picture(small_folder, picture, tmp_path):
    """Without guidance the reference view alone counts."""
    flags = (
        "--loss.lambda-dsd",
        "0",
        "--cameras.width",
        "12",
        "12",
        "--cameras.height",
        "12",
        "12",
        "--renderer.num-samples-per-ray",
        "96",
    )
    assert run(tmp_path / "out", picture, small_folder, *flags, steps=60) == 0
    last = json.loads(folder_of(tmp_path / "out").metrics.read_text().splitlines()[-1])
    assert last["rgb"] < 0.01 and last["mask"] < 0.02


def test_a_changed_picture_ends_a_resume(small_folder, picture, tmp_path, caplog):
    out = tmp_path / "out"
    assert run(out, picture, small_folder, "--stop-at", "2") == 0
    rgba = imageio.imread(picture)
    rgba[..., 1] = 90
    imageio.imwrite(picture, rgba)
    assert run(out, picture, small_folder, "--resume", "auto") == 2
    assert "not the picture that this run was started with" in caplog.text


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--guidance.use-perp-neg",), "use_perp_neg"),
        (("--cameras.camera-distance-range", "1.5", "2.0"), "stand as far away"),
        (("--cameras.fovy-range", "40", "70"), "field of view"),
        (("--cameras.height", "8", "16"), "renders squares"),
        (
            ("--material.diffuse-prob", "0.5", "--material.ambient-only-steps", "2"),
            "cannot be lit",
        ),
        (
            ("--single-view.elevation", "95"),
            "elevation: expected less than 90, got 95.0",
        ),
        (("--single-view.lambda-rgb", "1", "2"), "lambda_rgb"),
    ],
)
def test_bad_settings_end_before_any_work(flags, message, small_folder, picture, tmp_path, caplog):
    assert run(tmp_path / "out", picture, small_folder, *flags) == 2
    assert message in caplog.text
    assert not list((tmp_path / "out").rglob("checkpoints/*"))


def test_a_picture_or_a_prompt_is_asked_for(small_folder, picture, tmp_path, caplog):
    assert run(tmp_path, None, small_folder, "--prompt", "a disc") == 2
    assert "pass --image" in caplog.text
    assert run(tmp_path, tmp_path / "none.png", small_folder) == 2
    assert "no such file" in caplog.text
    assert run(tmp_path, picture, small_folder, "--guidance.method", "sdi") == 2
    assert "expected one of dsd, sds" in caplog.text


def test_the_presets_are_zero123s():
    """mathematics.md 11.2."""
    cfg = preset("dsd", None, False, "single-view")
    assert cfg.cameras.batch_size == (12, 4, 2) and cfg.cameras.width == (64, 128, 256)
    assert cfg.cameras.resolution_milestones == (200, 300) and cfg.max_steps == 600
    assert cfg.cameras.camera_distance_range == (3.8, 3.8)
    assert cfg.cameras.fovy_range == (20.0, 20.0) and cfg.cameras.elevation_range == (-10, 80)
    sds = preset("dsd", None, False, "single-view", method="sds").guidance
    assert sds.min_step_percent == (0, 0.4, 0.2, 200) and not sds.t_anneal
    assert sds.max_step_percent == (0, 0.85, 0.5, 200) and sds.guidance_scale == 3
    assert (cfg.single_view.lambda_rgb, cfg.single_view.lambda_mask) == (500, 50)
    assert (cfg.loss.lambda_dsd, cfg.loss.lambda_orient) == (0.1, 1.0)
    small = preset("embedded", 100, True, "single-view")
    assert (small.guidance.trajectory_share, cfg.guidance.trajectory_share) == (1.0, 0.0)
    assert preset("embedded", 100, True).task == "text"


# Scores.


def test_scores_against_true_views(small_folder, picture, tmp_path, caplog):
    """A run's own renderings score as perfect truth, turned ones do not."""
    out = tmp_path / "out"
    # Large steps, for in so few of them an object is to look different from its sides.
    flags = ("--pictures.no-mesh", "--optimizer.geometry-lr", "0.1")
    assert run(out, picture, small_folder, *flags, steps=6) == 0
    white = open_run(folder_of(out).path, torch.device("cpu"), (1.0, 1.0, 1.0))
    azimuth = np.array([0.0, 90.0, 200.0], np.float32)
    cameras = {
        "elevation": np.array([5.0, 15.0, 40.0], np.float32),
        "azimuth": azimuth,
        "distance": np.full(3, 1.6, np.float32),
        "fovy": np.full(3, 45.0, np.float32),
    }
    blank = Truth(rgba=np.zeros((3, 16, 16, 4), np.uint8), **cameras)
    images = truth.render_as(white, blank)
    assert images.std() > 0.01
    opaque = np.full((3, 16, 16, 1), 255, np.uint8)
    rgba = np.concatenate([(images * 255).round().astype(np.uint8), opaque], axis=3)

    figures = []
    for turn in (0.0, 97.0):
        objects = tmp_path / f"objects{turn:.0f}"
        (objects / "disc").mkdir(parents=True)
        turned = {**cameras, "azimuth": azimuth + turn}
        np.savez(objects / "disc" / "truth.npz", rgba=rgba, **turned)
        argv = [
            str(out),
            "--truth",
            str(objects),
            "--json",
            str(tmp_path / "t.json"),
            "--sheets",
            str(tmp_path / "sheets"),
            "--device",
            "cpu",
        ]
        assert truth.main(argv) == 0
        figures.append(json.loads((tmp_path / "t.json").read_text()))
    right, wrong = (entry["runs"][0] for entry in figures)
    assert right["object"] == "disc" and right["method"] == "dsd+1 cached"
    assert right["psnr_db"] > 50 > wrong["psnr_db"] and right["ssim"] > wrong["ssim"]
    assert right["by_view"]["azimuth"] == [0, 90, 200]
    assert figures[0]["methods"]["dsd+1 cached"]["psnr_db"] == right["psnr_db"]
    sheet = imageio.imread(tmp_path / "sheets" / "disc-dsd+1-cached-seed0.png")
    assert sheet.shape == (32, 48, 3)

    assert truth.main([str(out), "--truth", str(tmp_path), "--device", "cpu"]) == 2
    assert "render-objects" in caplog.text
