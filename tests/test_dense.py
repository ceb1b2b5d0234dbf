"""Layers, UNet and VAE encoder on CPUs with AVX-512: against torch, and what bfloat16 changes."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.diffusion import DiffusionModel, load_model
from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.engines import on_cpu
from dsd_fast.diffusion.engines.base import EagerEngine
from dsd_fast.diffusion.engines.dense import DenseEngine
from dsd_fast.diffusion.networks import dense_unet, dense_vae
from dsd_fast.diffusion.networks.dense_unet import DenseUNet
from dsd_fast.diffusion.networks.dense_vae import DenseEncoder
from dsd_fast.diffusion.networks.multiview_unet import MultiViewUNet
from dsd_fast.guidance import dsd_gradient
from dsd_fast.ops import dense

FASTEST = dense.precision()
BF16 = torch.bfloat16
DTYPES = [
    pytest.param(torch.float32, marks=pytest.mark.skipif(FASTEST is None, reason="no AVX-512")),
    pytest.param(BF16, marks=pytest.mark.skipif(FASTEST != BF16, reason="no AVX512-BF16")),
]
needs_avx512 = pytest.mark.skipif(FASTEST is None, reason="no AVX-512")
needs_bf16 = pytest.mark.skipif(FASTEST != BF16, reason="no AVX512-BF16")
SEVERAL_VIEWS = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "context_dim": 24,
    "num_head_channels": 32,
    "camera_dim": 16,
}
# Sums in another order; bfloat16 has two and a half digits, and twins round the same numbers.
TOLERANCE = {torch.float32: 2e-6, BF16: 4e-3}


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(monkeypatch: pytest.MonkeyPatch, call):
    """What the kernels and what their twins in torch give."""
    got = call()
    with monkeypatch.context() as context:
        context.setenv("DSD_BACKEND", "torch")
        want = call()
    return got, want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows,inputs,outputs", [(1, 16, 4), (77, 48, 96), (200, 96, 40), (9, 2, 70)]
)
def test_linear(monkeypatch, dtype, rows, inputs, outputs):
    x, weight = (
        random(3, rows, inputs).to(dtype),
        dense.Weight(random(outputs, inputs, seed=1), dtype),
    )
    bias, residual = random(outputs, seed=2), random(3, rows, outputs, seed=3)
    for more in ({}, {"bias": bias}, {"bias": bias, "residual": residual}):
        got, want = both(monkeypatch, lambda more=more: dense.linear(x, weight, **more))
        assert got.dtype == torch.float32 and error(got, want) < 2e-6
    if dtype == BF16:
        got, want = both(monkeypatch, lambda: dense.linear(x, weight, bias, dtype=dtype))
        assert got.dtype == dtype and error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated(monkeypatch, dtype):
    x, weight = 2 * random(2, 21, 48), dense.Weight(random(64, 48, seed=1), dtype)
    bias, x = random(64, seed=2), x.to(dtype)
    got, want = both(monkeypatch, lambda: dense.linear(x, weight, bias, dtype=dtype, gated=True))
    assert got.shape == (2, 21, 32) and error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size,inputs,outputs", [((8, 8), 16, 16), ((4, 20), 48, 80), ((33, 6), 4, 7)]
)
def test_convolve(monkeypatch, dtype, size, inputs, outputs):
    framed = dense.framed(random(2, *size, inputs), dtype)
    weight, bias = dense.Weight(random(outputs, inputs, 3, 3, seed=1), dtype), random(outputs)
    add, residual = random(2, outputs, seed=2), random(2, *size, outputs, seed=3)
    got, want = both(
        monkeypatch, lambda: dense.convolve(framed, weight, bias, add=add, residual=residual)
    )
    assert error(got, want) < 2e-6
    if size[0] % 2 == 0:
        for border in (0, 1):
            got, want = both(
                monkeypatch,
                lambda border=border: dense.convolve(framed, weight, stride=2, border=border),
            )
            assert got.shape == (2, size[0] // 2, size[1] // 2, outputs) and error(got, want) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution_after_upsampling(monkeypatch, dtype):
    x, w, bias = random(2, 6, 10, 16), random(24, 16, 3, 3, seed=1), random(24, seed=2)
    weights = dense.upsampling_phases(w, dtype)
    got, want = both(
        monkeypatch, lambda: dense.convolve_phases(dense.framed(x, dtype), weights, bias)
    )
    large = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
    plain = F.conv2d(large, w, bias, padding=1).permute(0, 2, 3, 1)
    assert error(got, want) < 2e-6 and error(got, plain) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_halving(monkeypatch, dtype):
    w, dy = random(24, 16, 3, 3), random(2, 5, 7, 24, seed=1)
    weights = dense.halving_gradient(w, dtype)
    got, want = both(monkeypatch, lambda: dense.convolve_phases(dense.framed(dy, dtype), weights))
    x = torch.zeros(2, 16, 10, 14, requires_grad=True)
    y = F.conv2d(F.pad(x, (0, 1, 0, 1)), w, stride=2)
    (plain,) = torch.autograd.grad(y, x, dy.permute(0, 3, 1, 2))
    assert error(got, want) < 2e-6
    assert error(got, plain.permute(0, 2, 3, 1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(4, 4), (40, 30), (3, 700)])
def test_group_norm_and_its_gradient(monkeypatch, dtype, size):
    x, x2 = random(2, *size, 48) + 3, random(2, *size, 16, seed=1)
    weight, bias, scale_shift = random(64, seed=2), random(64, seed=3), random(2, 128, seed=4)
    got, want = both(
        monkeypatch,
        lambda: dense.group_norm(
            x, weight, bias, 8, 1e-5, True, dtype, x2=x2, scale_shift=scale_shift
        ),
    )
    assert got.dtype == dtype and error(got, want) < TOLERANCE[dtype]
    assert not got[:, 0].any() and not got[:, :, -1].any()
    stats, grad = torch.empty(2, 6, 2), random(2, *size, 48, seed=5)
    dense.group_norm(x, weight[:48], bias[:48], 6, 1e-5, True, dtype, stats=stats, frame=False)

    def gradient():
        plain = torch.empty_like(x)
        framed = dense.group_norm_grad(
            grad.clone(), x, weight[:48], bias[:48], stats, True, dtype, residual=x, plain=plain
        )
        return plain, framed

    got, want = both(monkeypatch, gradient)
    leaf = x.clone().requires_grad_()
    y = F.silu(F.group_norm(leaf.permute(0, 3, 1, 2), 6, weight[:48], bias[:48], 1e-5))
    (plain,) = torch.autograd.grad(y, leaf, grad.permute(0, 3, 1, 2))
    for g, w in zip(got, want):
        assert error(g, w) < TOLERANCE[g.dtype]
    assert error(got[0], plain + x) < 1e-5


def test_group_norm_of_what_hardly_varies():
    if FASTEST is None:
        pytest.skip("no AVX-512")
    x = 100 + 1e-3 * random(1, 64, 64, 16)
    ones, zeros = torch.ones(16), torch.zeros(16)
    got = dense.group_norm(x, ones, zeros, 4, 1e-12, False, torch.float32, frame=False)
    want = F.group_norm(x.double().permute(0, 3, 1, 2), 4, eps=1e-12).permute(0, 2, 3, 1)
    assert error(got, want) < 3e-3  # factor x + constant, each in float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(monkeypatch, dtype):
    x, weight, bias = random(3, 50, 40) + 5, random(40, seed=1), random(40, seed=2)
    got, want = both(monkeypatch, lambda: dense.layer_norm(x, weight, bias, 1e-5, dtype))
    assert got.dtype == dtype and error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "queries,keys,heads,width", [(64, 32, 2, 48), (9, 77, 3, 32), (5, 1100, 1, 160)]
)
def test_attention(monkeypatch, dtype, queries, keys, heads, width):
    q = random(2, queries, heads * width).to(dtype)
    k, v = random(2, keys, 2 * heads * width, seed=1).to(dtype).chunk(2, 2)
    got, want = both(monkeypatch, lambda: dense.attention(3 * q, k, v, heads))
    assert got.dtype == dtype and error(got, want) < 2 * TOLERANCE[dtype]


@needs_avx512
def test_threads_change_nothing():
    framed, weight = dense.framed(random(3, 24, 24, 48), torch.float32), random(48, 48, 3, 3)
    packed = dense.Weight(weight, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(dense.convolve(framed, packed))
            with dense.crew(), dense.crew():
                results += [dense.convolve(framed, packed) for _ in range(20)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_bad_arguments_are_told():
    with pytest.raises(ValueError, match=r"\[O,I\] or \[O,I,a,b\]"):
        dense.Weight(torch.zeros(3, 3, 3), torch.float32)
    with pytest.raises(ValueError, match="in pairs, got 3"):
        dense.Weight(torch.zeros(4, 3), BF16)
    weight = dense.Weight(torch.zeros(8, 4), torch.float32)
    with pytest.raises(ValueError, match=r"x must have shape \[2, 4\]"):
        dense.linear(torch.zeros(2, 5), weight)
    with pytest.raises(TypeError, match="must be float32"):
        dense.linear(torch.zeros(2, 4, dtype=BF16), weight)
    with pytest.raises(ValueError, match=r"bias must have shape \[8\]"):
        dense.linear(torch.zeros(2, 4), weight, torch.zeros(9))
    with pytest.raises(ValueError, match="x must be on cpu"):
        dense.linear(torch.zeros(2, 4, device="meta"), weight)
    with pytest.raises(ValueError, match="gated takes a bias"):
        dense.linear(torch.zeros(2, 4), weight, gated=True)
    with pytest.raises(ValueError, match="in vectors of 16"):
        ones = torch.ones(8)
        dense.group_norm(torch.zeros(1, 2, 2, 8), ones, ones, 2, 1e-5, True, torch.float32)
    with pytest.raises(ValueError, match="heads of an even width"):
        dense.attention(*3 * [torch.zeros(1, 4, 6)], heads=2)


# ---- the networks --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact() -> DiffusionModel:
    """The embedded model by diffusers' own forward, in float32."""
    return load_model("embedded", dtype=torch.float32, engine="eager")


@needs_avx512
def test_unet_in_float32_is_the_modules_own(exact):
    latents, t = random(3, 4, 32, 32), torch.tensor([3, 500, 980])
    tokens = random(3, 20, 128, seed=1)
    got = DenseUNet(exact.unet, torch.float32)(latents, t, tokens)
    assert error(got, exact.engine(latents, t, Condition(tokens))) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_unet_of_several_views(dtype):
    torch.manual_seed(0)
    unet = MultiViewUNet(SEVERAL_VIEWS).eval().requires_grad_(False)
    latents, t, tokens = random(8, 4, 16, 16), torch.full((8,), 700), random(8, 5, 24, seed=1)
    condition = Condition(tokens, camera=random(8, 16, seed=2))
    got = DenseEngine(unet, dtype)(latents, t, condition)
    assert error(got, EagerEngine(unet)(latents, t, condition)) < 2 * TOLERANCE[dtype]
    with pytest.raises(ValueError, match="4 rows an object"):
        DenseUNet(unet, dtype)(latents[:3], t[:3], tokens[:3], condition["camera"][:3])
    with pytest.raises(ValueError, match="sides in multiples of 2"):
        DenseUNet(unet, dtype)(latents[..., :15], t, tokens, condition["camera"])


def pictures() -> Tensor:
    """A shaded ball before plain grey, from four sides: [4,3,64,64]."""
    y, x = torch.meshgrid(*2 * [torch.linspace(-1.3, 1.3, 64)], indexing="ij")
    z = (1 - x**2 - y**2).clamp_min(0).sqrt()
    views = []
    for angle in torch.tensor([0.0, 1.5, 3.0, 4.5]):
        light = (0.5 * x * angle.cos() + 0.5 * z + 0.3 * y * angle.sin()).clamp(0, 1)
        color = torch.stack([0.2 + 0.7 * light, 0.3 * light + 0.2, 0.6 - 0.4 * light])
        views.append(torch.where(z > 0, color, torch.full_like(color, 0.7)))
    return torch.stack(views)


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoder_and_its_gradient(exact, dtype):
    rgb = F.interpolate(pictures()[:2], size=(128, 128), mode="bilinear").requires_grad_()
    wide = exact.vae.double()
    try:
        want = wide.encode(rgb.double() * 2 - 1).latent_dist.parameters
        weight = random(*want.shape, seed=7)
        (gradient,) = torch.autograd.grad((want * weight).sum(), rgb)
    finally:
        exact.vae.float()
    got = DenseEncoder(exact.vae, dtype).moments(rgb)
    (found,) = torch.autograd.grad((got * weight).sum(), rgb)
    assert error(got, want) < {torch.float32: 2e-5, BF16: 5e-3}[dtype]
    assert error(found, gradient) < {torch.float32: 2e-4, BF16: 2e-2}[dtype]
    cosine = F.cosine_similarity(found.flatten(1), gradient.flatten(1))
    assert bool((cosine > 0.9995).all()), cosine


@needs_avx512
def test_a_gradient_is_taken_once(exact):
    rgb = pictures()[:1].requires_grad_()
    total = DenseEncoder(exact.vae, torch.float32).moments(rgb).sum()
    torch.autograd.grad(total, rgb, retain_graph=True)
    with pytest.raises(RuntimeError, match="taken already"):
        torch.autograd.grad(total, rgb)


@needs_bf16
def test_guidance_gradient_hardly_changes(exact):
    """What `--diffusion.dtype auto` rests on: the gradient, not the predictions it subtracts."""
    engine = DenseEngine(exact.unet, BF16)
    tokens = exact.encode_prompt(["an armchair", ""])
    with torch.no_grad():
        latents = exact.encode_with_noise(F.interpolate(pictures(), (256, 256)), None)
    noise = random(1, 4, 32, 32, seed=5)

    def gradient(of, t: int) -> Tensor:
        def predict(z: Tensor, level: Tensor, scale: float) -> Tensor:
            rows = torch.cat([z, z]), torch.cat([level, level])
            text = tokens.repeat_interleave(len(z), 0)
            given, free = of(*rows, Condition(text)).chunk(2)
            return free + scale * (given - free)

        return dsd_gradient(
            latents, noise=noise, t=t, t_delta=min(t + 40, 999), predict=predict,
            alphas_cumprod=exact.noise_path.alpha**2, n_ddim_steps=4, guidance_scale=5.0,
        )  # fmt: skip

    cosines = torch.cat(
        [
            F.cosine_similarity(
                gradient(engine, t).flatten(1), gradient(exact.engine, t).flatten(1)
            )
            for t in (960, 650, 350)
        ]
    )
    assert float(cosines.median()) >= 0.999, cosines


# ---- what is chosen ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fastest,asked,products,words",
    [
        (BF16, None, BF16, "products in bfloat16"),
        (BF16, torch.float32, torch.float32, "products in float32"),
        (torch.float32, None, torch.float32, "products in float32"),
        (torch.float32, BF16, None, "no AVX512-BF16"),
        (None, None, None, "no AVX-512"),
        (None, torch.float32, None, "no AVX-512"),
    ],
)
def test_products_follow_the_processor(exact, monkeypatch, caplog, fastest, asked, products, words):
    monkeypatch.setattr(dense, "precision", lambda: fastest)
    with caplog.at_level(logging.DEBUG):
        assert on_cpu(exact.unet, "auto", asked) == products
    assert words in caplog.text
    assert on_cpu(exact.unet, "eager", asked) is None


def test_unsupported_networks_are_named(exact):
    unet = MultiViewUNet(SEVERAL_VIEWS).to(BF16)
    assert dense_unet.unsupported(unet) == "weights that are not float32"
    with pytest.raises(ValueError, match="not float32"):
        DenseUNet(unet, BF16)
    assert "attention_head_dim" not in str(dense_unet.unsupported(exact.unet))
    assert "Identity" in str(dense_unet.unsupported(torch.nn.Identity()))
    assert "not an AutoencoderKL" in str(dense_vae.unsupported(torch.nn.Identity()))


@pytest.mark.parametrize("asked", [None, torch.float32, BF16])
def test_loaded_model_runs(asked, exact):
    model = load_model("embedded", dtype=asked)
    fits = asked != BF16 or FASTEST == BF16
    assert model.dtype == (torch.float32 if fits else BF16)
    latents, t = random(2, 4, 32, 32), torch.tensor([900, 100])
    condition = Condition(random(2, 8, 128, seed=1))
    got = model.predict_noise(latents, t, condition)
    assert error(got, exact.predict_noise(latents, t, condition)) < 2e-2
