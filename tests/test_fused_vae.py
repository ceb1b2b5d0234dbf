"""The fused VAE encoder against diffusers' module and autograd."""

import json
from pathlib import Path

import pytest
import torch
from conftest import cuda_only, relative_error

import dsd_fast
from dsd_fast.diffusion.networks import vae_ops
from dsd_fast.diffusion.networks.fused_vae import FusedEncoder, unsupported

EMBEDDED = Path(dsd_fast.__file__).parent / "assets" / "prior" / "vae" / "config.json"
TINY = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "latent_channels": 3,
}


def vae(config: dict, dtype: torch.dtype = torch.float64):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    made = AutoencoderKL(**{k: v for k, v in config.items() if not k.startswith("_")})
    with torch.no_grad():
        for p in made.parameters():
            # fresh norms are the identity, and would hide a forgotten weight
            p.add_(torch.randn_like(p) * 0.1)
    return made.eval().requires_grad_(False).to(dtype)


def module_moments(module, rgb: torch.Tensor) -> torch.Tensor:
    return module.encode(rgb * 2 - 1).latent_dist.parameters


def parity(module, encoder: FusedEncoder, size: tuple[int, int]) -> tuple[float, float]:
    """Relative errors of moments and of the gradient to the image."""
    generator = torch.Generator().manual_seed(1)
    rgb = torch.rand(2, 3, *size, generator=generator).to(module.dtype).requires_grad_()
    want = module_moments(module, rgb)
    d = torch.randn(want.shape, generator=generator).to(module.dtype)
    (want_grad,) = torch.autograd.grad(want, rgb, d)
    got = encoder.moments(rgb)
    (got_grad,) = torch.autograd.grad(got, rgb, d)
    return relative_error(got, want), relative_error(got_grad, want_grad)


CONFIGS = pytest.mark.parametrize(
    "config",
    [
        TINY,
        {**TINY, "mid_block_add_attention": False, "use_quant_conv": False, "layers_per_block": 1},
        json.loads(EMBEDDED.read_text()),
    ],
    ids=["attention", "plain", "embedded"],
)


@CONFIGS
@pytest.mark.parametrize("flipped", [True, False])
def test_is_the_module(config, flipped) -> None:
    module = vae(config)
    assert max(parity(module, FusedEncoder(module, flipped), (24, 16))) < 1e-10
    module = module.float()
    assert max(parity(module, FusedEncoder(module, flipped), (24, 16))) < 1e-5


def test_on_kernels(monkeypatch) -> None:
    """With Triton's kernels, in its interpreter where there is no GPU."""
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setattr(vae_ops, "on_kernels", lambda x: True)
    module = vae(TINY, torch.float32)
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    assert max(parity(module, FusedEncoder(module), (8, 8))) < 1e-5


def test_without_gradient_and_twice() -> None:
    module = vae(TINY, torch.float32)
    encoder = FusedEncoder(module)
    rgb = torch.rand(1, 3, 8, 8, requires_grad=True)
    moments = encoder.moments(rgb)
    with torch.no_grad():
        torch.testing.assert_close(encoder.moments(rgb), moments)
    moments.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="encode once more"):
        moments.sum().backward()


def test_unsupported() -> None:
    config = {**TINY, "_class_name": "AutoencoderKL"}
    assert unsupported(config) is None
    assert "AutoencoderTiny" in unsupported({"_class_name": "AutoencoderTiny"})
    assert "Attn" in unsupported({**config, "down_block_types": ["AttnDownEncoderBlock2D"]})
    assert "relu" in unsupported({**config, "act_fn": "relu"})
    with pytest.raises(ValueError, match="sides that 4 divides"):
        FusedEncoder(vae(TINY, torch.float32)).moments(torch.rand(1, 3, 10, 8))


@cuda_only
@CONFIGS
def test_half_precision_in_a_graph(config) -> None:
    module = vae(config, torch.float32).cuda()
    half = vae(config, torch.float16).cuda().to(memory_format=torch.channels_last)
    rgb = torch.rand(1, 3, 64, 64, device="cuda", requires_grad=True)
    want = module_moments(module, rgb)
    d = torch.randn_like(want)
    (want_grad,) = torch.autograd.grad(want, rgb, d)
    encoder = FusedEncoder(half)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        # A leaf belongs to the stream that made it, which a capture must not wait for.
        image = rgb * 1.0
        moments = encoder.moments(image)
        return moments, torch.autograd.grad(moments, image, d)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, got_grad = run()
    graph.replay()
    assert relative_error(got, want) < 1e-2 and relative_error(got_grad, want_grad) < 2e-2
