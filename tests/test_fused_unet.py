"""FusedUNet against diffusers' own forward, and the engine that runs it."""

import pytest
import torch
from conftest import cuda_only, relative_error
from tiny_model import toy_model
from torch import Tensor, nn

from dsd_fast.diffusion import load_model
from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.engines import make_engine
from dsd_fast.diffusion.engines.base import EagerEngine, GraphEngine
from dsd_fast.diffusion.engines.fused import FusedEngine, cannot_fuse
from dsd_fast.diffusion.networks.fused_unet import FusedUNet, unsupported

diffusers = pytest.importorskip("diffusers")

SMALL = {
    "sample_size": 16,
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "block_out_channels": (16, 32, 32),
    "attention_head_dim": [2, 4, 4],
    "use_linear_projection": True,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
CONFIGS = {
    "SD 2": {},
    "SD 1, inpainting": {
        "use_linear_projection": False,
        "attention_head_dim": 2,
        "in_channels": 9,
        "out_channels": 3,
    },
    "narrow end, two blocks": {
        "transformer_layers_per_block": 2,
        "layers_per_block": 1,
        "block_out_channels": (32, 16, 16),
    },
    "attention everywhere, scale_shift, text": {
        "resnet_time_scale_shift": "scale_shift",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}


def build(**config) -> nn.Module:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**(SMALL | config)).eval().requires_grad_(False)
    for parameter in unet.parameters():
        # diffusers starts biases near 0 and gains at 1, where a lost one would not show
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn_like(parameter)
    return unet


def inputs(unet: nn.Module, rows: int = 3, sides=(16, 8)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, unet.config.in_channels, *sides, generator=generator)
    text = torch.randn(rows, 7, unet.config.cross_attention_dim, generator=generator)
    t = torch.randint(0, 1000, (rows,), generator=generator)
    return latents.to(unet.device, unet.dtype), t.to(unet.device), text.to(unet.device, unet.dtype)


def conditioned(latents: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Condition]:
    """The same as engines take them."""
    return latents, t, Condition(text)


def eager(unet: nn.Module, *arguments: Tensor) -> Tensor:
    return EagerEngine(unet)(*conditioned(*arguments))


@pytest.mark.parametrize("name", CONFIGS)
def test_same_as_diffusers(name: str) -> None:
    unet = build(**CONFIGS[name])
    arguments = inputs(unet)
    expected = eager(unet, *arguments)
    fused = FusedUNet(unet)
    got = fused(*arguments)
    assert got.is_contiguous()
    assert relative_error(got, expected) < 1e-5
    assert relative_error(fused(*arguments), expected) < 1e-5  # nothing of a run is kept
    assert relative_error(eager(unet, *arguments), expected) < 3e-6  # nor its weights moved
    plain = FusedUNet(unet, split_upsampling=False)
    assert relative_error(plain(*arguments), expected) < 1e-5


def test_embedded_prior() -> None:
    unet = load_model("embedded").unet
    arguments = inputs(unet, rows=2, sides=(32, 32))
    expected = eager(unet, *arguments)
    assert relative_error(FusedUNet(unet)(*arguments), expected) < 1e-5


def test_weights_are_kept_once() -> None:
    unet = build()
    fused = FusedUNet(unet, split_upsampling=False)
    own = {tensor.untyped_storage().data_ptr() for tensor in unet.state_dict().values()}
    matrices = [m for m in tensors_of(fused) if m.ndim > 1]
    assert len(matrices) > 50
    assert {m.untyped_storage().data_ptr() for m in matrices} <= own
    vectors = {v.untyped_storage().data_ptr(): v.numel() for v in tensors_of(fused) if v.ndim == 1}
    copied = sum(size for data, size in vectors.items() if data not in own)
    assert copied < 0.05 * sum(p.numel() for p in unet.parameters())
    # and a change of the module is a change of the fused one
    arguments = inputs(unet)
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_k.weight.mul_(3)
    unet.mid_block.resnets[0].time_emb_proj.weight.mul_(2)
    assert relative_error(fused(*arguments), eager(unet, *arguments)) < 1e-5


def tensors_of(thing: object) -> list[Tensor]:
    """Every tensor that is reached from an object of ours, modules left aside."""
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, nn.Module) or not (hasattr(thing, "__dict__") or is_list(thing)):
        return []
    parts = thing if is_list(thing) else vars(thing).values()
    return [tensor for part in parts for tensor in tensors_of(part)]


def is_list(thing: object) -> bool:
    return isinstance(thing, (list, tuple))


def test_inputs_are_left_alone() -> None:
    unet = build()
    fused, arguments = FusedUNet(unet), inputs(unet)
    kept = [a.clone() for a in arguments]
    first = fused(*arguments)
    assert all(torch.equal(a, k) for a, k in zip(arguments, kept))
    assert torch.equal(fused(*arguments), first)
    with pytest.raises(ValueError, match=r"multiples of 4, got 6×8"):
        fused(arguments[0][:, :, :6], *arguments[1:])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"act_fn": "gelu"}, "act_fn = 'gelu'"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"only_cross_attention": (True, False, False)}, "only_cross_attention"),
        ({"conv_in_kernel": 1}, "conv_in_kernel = 1"),
        (
            {"down_block_types": ("AttnDownBlock2D", *SMALL["down_block_types"][1:])},
            "down_block_types with AttnDownBlock2D",
        ),
    ],
)
def test_unsupported_is_named(config, reason) -> None:
    assert reason in unsupported(build(**config))


def test_engine_choice() -> None:
    cpu = torch.device("cpu")
    assert "not a UNet2DConditionModel" in unsupported(toy_model().unet)
    with pytest.raises(ValueError, match="does not support a "):
        FusedUNet(toy_model().unet)
    unet = build()
    assert unsupported(unet) is None
    assert "not half precision" in cannot_fuse(unet)
    for kind in ("fused", "compiled"):
        with pytest.raises(ValueError, match=f"the {kind} engine needs a CUDA device"):
            make_engine(unet, cpu, kind)
    assert isinstance(make_engine(unet, cpu, "auto"), EagerEngine)


@cuda_only
def test_engine_on_cuda() -> None:
    unet = build(norm_num_groups=16, block_out_channels=(32, 64, 64)).half().cuda()
    arguments = inputs(unet)
    expected = eager(unet, *arguments)
    engine = make_engine(unet, unet.device, "auto")
    assert isinstance(engine, FusedEngine)
    assert relative_error(engine(*conditioned(*arguments)), expected) < 1e-2
    other = inputs(unet, rows=2)
    assert relative_error(engine(*conditioned(*other)), eager(unet, *other)) < 1e-2
    assert relative_error(engine(*conditioned(*arguments)), expected) < 1e-2
    assert engine.forward is not engine.eager
    assert relative_error(engine.plain(*conditioned(*arguments)), expected) < 1e-2
    with pytest.raises(ValueError, match="not half precision"):
        make_engine(build().cuda(), unet.device, "fused")
    assert type(make_engine(build().cuda(), unet.device, "auto")) is GraphEngine


@cuda_only
def test_fallback_when_a_kernel_fails(monkeypatch, caplog) -> None:
    unet = build(norm_num_groups=16, block_out_channels=(32, 64, 64)).half().cuda()
    arguments = inputs(unet)
    expected = eager(unet, *arguments)
    engine = make_engine(unet, unet.device, "auto")

    def fails(*_):
        raise OSError("no ptxas")

    monkeypatch.setattr(engine, "fused", fails)
    assert relative_error(engine(*conditioned(*arguments)), expected) < 1e-2
    assert "no ptxas" in caplog.text
    strict = make_engine(unet, unet.device, "fused")
    monkeypatch.setattr(strict, "fused", fails)
    with pytest.raises(RuntimeError, match="no ptxas"):
        strict(*conditioned(*arguments))
