"""What predictions are conditioned on: named tensors, how networks get them, and a kind of one's
own, which takes one file."""

import copy
from collections.abc import Mapping

import pytest
import torch
from conftest import cuda_only
from tiny_model import SCHEDULER, ToyUNet
from torch import Tensor, nn

from dsd_fast.diffusion import DiffusionModel, PromptEmbeddings
from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.engines import make_engine, parity
from dsd_fast.diffusion.engines.base import EagerEngine, UNetShape
from dsd_fast.diffusion.noise_path import NoisePath
from dsd_fast.guidance import FORMULATIONS, GuidanceConfig, dsd_gradient, make_guidance
from dsd_fast.guidance.conditions.base import Conditions, Rows
from dsd_fast.guidance.conditions.bins import CameraGrid


def condition(n_rows: int = 3) -> Condition:
    tokens, camera = torch.randn(n_rows, 5, 8), torch.randn(n_rows, 16)
    return Condition(tokens, camera=camera, size_ids=torch.arange(n_rows))


# ---- named tensors ------------------------------------------------------------------------------


def test_rows_and_their_order():
    whole = condition()
    assert (len(whole.tokens), list(whole)) == (3, ["tokens", "camera", "size_ids"])
    parts = Condition.cat([whole.rows(0, 1), whole.rows(1)])
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert torch.equal(whole.rows(-2)["size_ids"], torch.tensor([1, 2]))


def test_only_numbers_with_fractions_change_their_dtype():
    half = condition().to(torch.float16)
    assert [tensor.dtype for tensor in half.values()] == [torch.float16] * 2 + [torch.int64]


def test_numbers_are_taken_over_at_the_same_addresses():
    first, second = condition(), condition()
    addresses = [tensor.data_ptr() for tensor in first.values()]
    assert first.shapes == second.shapes != condition(2).shapes
    first.copy_(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert addresses == [tensor.data_ptr() for tensor in first.values()]


# ---- how networks get them ----------------------------------------------------------------------


def small_unet(**settings: object) -> nn.Module:
    import diffusers

    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "cross_attention_dim": 16,
            **settings,
        }
    ).eval()


def test_pooled_text_and_sizes_are_sdxls():
    unet = small_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )
    latents, t, tokens = torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randn(2, 7, 16)
    pooled, size_ids = torch.randn(2, 12), torch.full((2, 6), 64)
    got = EagerEngine(unet)(latents, t, Condition(tokens, pooled=pooled, size_ids=size_ids))
    added = {"text_embeds": pooled, "time_ids": size_ids}
    with torch.no_grad():
        want = unet(latents, t, tokens, added_cond_kwargs=added).sample
    assert torch.equal(got, want)


def test_an_image_stands_beside_the_noisy_latents():
    unet = small_unet(in_channels=8)
    latents, image = torch.randn(2, 2, 4, 8, 8)
    t, tokens = torch.tensor([5, 700]), torch.randn(2, 7, 16)
    got = EagerEngine(unet)(latents, t, Condition(tokens, image=image))
    with torch.no_grad():
        want = unet(torch.cat([latents, image], 1), t, tokens).sample
    assert torch.equal(got, want)


IMAGE_SHAPE = UNetShape((4, 8, 8), (("tokens", (7, 16)), ("image", (4, 8, 8))))


def test_the_gate_measures_with_all_that_a_network_reads():
    unet = small_unet(in_channels=8)
    assert parity.gate(EagerEngine(unet), unet, IMAGE_SHAPE, 2, "eager").passed
    other = copy.deepcopy(unet)
    with torch.no_grad():
        other.conv_in.weight[:, 4:] = 0  # deaf to the image
    with pytest.raises(parity.ParityError):
        parity.gate(EagerEngine(other), unet, IMAGE_SHAPE, 2, "deaf")


def test_onnx_has_an_input_for_each_name(tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from dsd_fast.diffusion.engines.onnx_export import export_unet

    unet = small_unet(in_channels=8)
    path = export_unet(unet, IMAGE_SHAPE, tmp_path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    latents, t, read = IMAGE_SHAPE.sample(3, torch.float32, "cpu")
    feed = {name: tensor.numpy() for name, tensor in {"latents": latents, "t": t, **read}.items()}
    assert {entry.name for entry in session.get_inputs()} == set(feed)
    got = torch.from_numpy(session.run(None, feed)[0])
    torch.testing.assert_close(got, EagerEngine(unet)(latents, t, read), rtol=1e-4, atol=1e-4)


@cuda_only
@pytest.mark.parametrize("kind", ["graph", "fused"])
def test_graphs_read_every_tensor_anew(kind):
    unet = small_unet(in_channels=8, block_out_channels=(32, 64)).half().cuda()
    engine, eager = make_engine(unet, torch.device("cuda"), kind), EagerEngine(unet)
    for seed in range(3):
        inputs = IMAGE_SHAPE.sample(2, torch.float16, "cuda", seed)
        got, want = engine(*inputs).float(), eager(*inputs).float()
        assert (got - want).norm() / want.norm() < 2e-2


# ---- a kind of one's own ------------------------------------------------------------------------


class TintedUNet(ToyUNet):
    """Reads a colour a row beside the text."""

    def forward(self, latents, t, encoder_hidden_states, return_dict, tint):
        (eps,) = super().forward(latents, t, encoder_hidden_states, return_dict)
        return (eps + tint[:, :, None, None],)


class TintConditions(Conditions):
    """One prompt for all views, and a colour that turns with the azimuth."""

    kind, title = "tint", "a model of colours"

    def __init__(self, prompts: PromptEmbeddings, cfg: GuidanceConfig) -> None:
        super().__init__(cfg)
        self.text = torch.stack([prompts.text_vd[1], prompts.uncond_vd[1]])
        self.bins = CameraGrid(8, 1, (-180.0, 180.0), (-90.0, 90.0))

    def rows(self, elevation_deg: Tensor, azimuth_deg: Tensor) -> Rows:
        around = torch.deg2rad(azimuth_deg)
        tint = torch.stack([around.sin(), around.cos(), around.sin(), 0 * around], 1)
        which = torch.arange(2).repeat_interleave(len(azimuth_deg))
        return Rows({"which": which, "tint": torch.cat([tint, 0 * tint])})

    def condition(self, columns: Mapping[str, Tensor]) -> Condition:
        return Condition(self.text[columns["which"]], tint=columns["tint"])


@pytest.mark.parametrize("method", ["dsd", "sds"])
def test_conditions_of_ones_own_take_one_file(method):
    path = NoisePath.of_scheduler(SCHEDULER)
    model = DiffusionModel(TintedUNet(), nn.Identity(), None, noise_path=path, latent_size=6)
    text, uncond = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    cfg = GuidanceConfig(
        method=method, use_perp_neg=False, standard_cfg=True, trajectory="exact", n_ddim_steps=3
    )
    conditions = TintConditions(PromptEmbeddings(text, uncond), cfg)
    noise, x, eps = torch.randn(3, 1, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    guidance = make_guidance(cfg, model, conditions, noise, 10)

    def predict(z: Tensor, t: Tensor, scale: float) -> Tensor:
        azimuth = torch.deg2rad(torch.tensor(40.0))
        tint = torch.stack([azimuth.sin(), azimuth.cos(), azimuth.sin(), 0 * azimuth])[None]
        with torch.no_grad():
            known = model.unet(z, t, text[1:2], False, tint)[0]
            empty = model.unet(z, t, uncond[1:2], False, 0 * tint)[0]
        return empty + scale * (known - empty)

    if method == "dsd":
        got = guidance.at_levels(x, 0.0, 40.0, 600, 620).grad
        alphas = path.alpha.square()
        want = dsd_gradient(x, noise=noise, t=600, t_delta=620, predict=predict,
                            alphas_cumprod=alphas, n_ddim_steps=3)  # fmt: skip
    else:
        got = guidance.at_levels(x, 0.0, 40.0, 600, 600, {"eps": eps}).grad
        t = torch.tensor([600])
        want = path.weight(t, "sds") * (predict(path.noisy(x, eps, t), t, 7.5) - eps)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    fitting = [name for name, f in FORMULATIONS.items() if TintConditions.suit(f)]
    assert fitting[:2] == ["dsd", "sds"] and "vsd" not in fitting
    cfg.method = "vsd"
    with pytest.raises(ValueError, match=r"expected one of dsd, sds.* with a model of colours"):
        TintConditions(PromptEmbeddings(text, uncond), cfg)
