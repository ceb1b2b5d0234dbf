"""Compositing and visibility: the peers' numbers, a float64 reference, gradients, and laws."""

import pytest
import torch
from conftest import cuda_only
from torch import Tensor

from dsd_fast.graphs import captured
from dsd_fast.ops.composite import (
    composite,
    composite_full,
    composite_full_reference,
    composite_reference,
    visibility,
    visibility_reference,
)

# Samples of each ray: around the warp size, none, one, and a ray much longer than the others.
LENGTHS = [0, 1, 5, 31, 32, 33, 0, 64, 65, 100, 3001, 2, 0]
VALUES = ("sigmas", "rgbs", "normals")
INTERVALS = ("t_starts", "t_ends", "ray_indices")


def packed(lengths: list[int], density: float = 5.0, seed: int = 0) -> dict[str, Tensor]:
    """Random samples with gaps between them; opaque, empty and zero-length ones among them."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    gaps = 0.01 * torch.rand(n, generator=generator)
    widths = 0.02 * torch.rand(n, generator=generator)
    sigmas = density * torch.rand(n, generator=generator)
    sigmas[5::50] = 0.0
    sigmas[45::50] *= 1e4  # alpha is 1 to the last bit
    widths[9::70] = 0.0
    rays = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths).long())
    starts = torch.cat(
        [torch.cumsum(part, 0) for part in (gaps + widths).split(lengths)] or [torch.zeros(0)]
    )
    return {
        "sigmas": sigmas,
        "rgbs": torch.rand(n, 3, generator=generator),
        "normals": torch.randn(n, 3, generator=generator),
        "t_starts": 1.0 + starts - widths,
        "t_ends": 1.0 + starts,
        "ray_indices": rays,
    }


def full_args(samples: dict[str, Tensor], n_rays: int) -> tuple:
    return (*(samples[name] for name in (*VALUES, *INTERVALS)), n_rays)


def double(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in samples.items()}


def relative(got: Tensor, expected: Tensor) -> float:
    """RMS error relative to the RMS of the expected values."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_relative(name: str, got: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert got.shape == expected.shape, name
    assert bool(torch.isfinite(got).all()), name
    error = relative(got, expected)
    assert error <= bound, f"{name}: relative error {error:.2e} above {bound:.0e}"


@pytest.mark.parametrize("reference", [False, True], ids=["compiled", "reference"])
def test_golden(golden, device, reference):
    """nerfacc's weights, colours, opacities and density gradient."""
    if reference and device.type != "cpu":
        pytest.skip("the reference is compared on the CPU")
    tensors, _ = golden("peer_render")
    n = {k.removeprefix("nerfacc."): v.to(device) for k, v in tensors.items() if "nerfacc." in k}
    sigmas = n["sigmas"].clone().requires_grad_()
    n_rays = len(n["color"])
    function = composite_reference if reference else composite
    color, opacity, _, weights = function(
        sigmas, n["rgbs"], n["t_starts"], n["t_ends"], n["ray_indices"], n_rays
    )
    assert_relative("color", color, n["color"])
    assert_relative("opacity", opacity, n["opacity"])
    assert_relative("weights", weights, n["weights"])
    ((color * n["ct_color"]).sum() + (opacity * n["ct_opacity"]).sum()).backward()
    assert_relative("g_sigmas", sigmas.grad, n["g_sigmas"])


def test_golden_visibility(golden, device):
    tensors, _ = golden("peer_render")
    n = {k.removeprefix("nerfacc."): v.to(device) for k, v in tensors.items() if "nerfacc." in k}
    seen = visibility(
        n["sigmas"], n["t_starts"], n["t_ends"], n["ray_indices"], len(n["color"]), 0.01, 0.2
    )
    clear = (n["alphas"] - 0.01).abs() > 1e-6
    clear &= (n["trans"] - 0.2).abs() > 1e-5
    expected = (n["alphas"] >= 0.01) & (n["trans"] >= 0.2)
    assert torch.equal(seen[clear], expected[clear])
    assert 0 < int(seen.sum()) < len(seen)


@pytest.mark.parametrize("density", [0.5, 50.0], ids="density={}".format)
def test_forward_and_gradients(device, density):
    """All outputs and all gradients of composite_full against the reference in float64."""
    samples = packed(LENGTHS, density)
    n_rays = len(LENGTHS)
    exact = double(samples)
    compiled = {name: tensor.to(device) for name, tensor in samples.items()}
    for name in VALUES:
        exact[name].requires_grad_()
        compiled[name].requires_grad_()
    expected = composite_full_reference(*full_args(exact, n_rays))
    got = composite_full(*full_args(compiled, n_rays))
    generator = torch.Generator().manual_seed(3)
    loss, exact_loss = 0.0, 0.0
    for name in expected._fields:
        a, b = getattr(got, name), getattr(expected, name)
        assert_relative(name, a, b)
        cotangent = torch.randn(b.shape, generator=generator)
        loss = loss + (a * cotangent.to(device)).sum()
        exact_loss = exact_loss + (b * cotangent.double()).sum()
    loss.backward()
    exact_loss.backward()
    for name in VALUES:
        assert_relative(f"gradient of {name}", compiled[name].grad, exact[name].grad)


@pytest.mark.parametrize("output", ["color", "opacity", "depth", "z_variance", "normal", "weights"])
def test_gradient_of_each_output(device, output):
    """One output at a time: the others' gradients are absent, not zero tensors."""
    samples = packed([40, 0, 7], density=20.0)
    exact = double(samples)
    compiled = {name: tensor.to(device) for name, tensor in samples.items()}
    for name in VALUES:
        exact[name].requires_grad_()
        compiled[name].requires_grad_()
    for function, arguments in ((composite_full, compiled), (composite_full_reference, exact)):
        (getattr(function(*full_args(arguments, 3)), output) ** 2).sum().backward()
    for name in VALUES:
        expected = exact[name].grad
        expected = torch.zeros_like(exact[name]) if expected is None else expected
        assert_relative(f"gradient of {name}", compiled[name].grad, expected)


def test_z_variance_below_the_opacity_floor(device):
    """Nearly empty rays, where the weights are divided by the floor instead of the opacity."""
    samples = packed([6, 40], density=1e-5)
    samples["sigmas"] = samples["sigmas"].clamp(max=1e-5)
    exact = double(samples)
    exact["sigmas"].requires_grad_()
    compiled = {name: tensor.to(device) for name, tensor in samples.items()}
    compiled["sigmas"].requires_grad_()
    expected = composite_full_reference(*full_args(exact, 2)).z_variance
    got = composite_full(*full_args(compiled, 2)).z_variance
    assert_relative("z_variance", got, expected)
    got.sum().backward()
    expected.sum().backward()
    assert_relative("gradient of sigmas", compiled["sigmas"].grad, exact["sigmas"].grad)


def test_composite_is_part_of_composite_full(device):
    samples = {name: tensor.to(device) for name, tensor in packed(LENGTHS).items()}
    full = composite_full(*full_args(samples, len(LENGTHS)))
    args = (samples[name] for name in ("sigmas", "rgbs", *INTERVALS))
    for part, whole in zip(
        composite(*args, len(LENGTHS)), (full.color, full.opacity, full.depth, full.weights)
    ):
        assert torch.equal(part, whole)


def test_gradcheck_of_the_reference():
    samples = double(packed([3, 0, 4, 1], density=20.0))
    values = tuple(samples[name].requires_grad_() for name in VALUES)
    rest = tuple(samples[name] for name in INTERVALS)
    assert torch.autograd.gradcheck(
        lambda *v: tuple(composite_full_reference(*v, *rest, 4)), values, atol=1e-7
    )


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def ray_directions(n_rays: int) -> Tensor:
    dirs = torch.randn(n_rays, 3, generator=torch.Generator().manual_seed(9))
    return torch.nn.functional.normalize(dirs, dim=-1)


def with_room(samples: dict[str, Tensor], room: int) -> dict[str, Tensor]:
    """The samples without ray indices, and NaN in `room` more behind them."""
    return {
        name: torch.cat([tensor, tensor.new_full((room, *tensor.shape[1:]), float("nan"))])
        for name, tensor in samples.items()
        if name != "ray_indices"
    }


@pytest.mark.parametrize("room", [0, 1, 3000])
@pytest.mark.parametrize("lengths", [LENGTHS, [7], [0], [0, 0, 40], []], ids=str)
def test_offsets_in_place_of_ray_indices(device, lengths, room):
    """The same bits as with ray indices; zeros behind the last ray, whatever stands there."""
    n_samples, n_rays = sum(lengths), len(lengths)
    samples = {name: tensor.to(device) for name, tensor in packed(lengths).items()}
    wide = with_room(samples, room)
    for name in VALUES:
        samples[name].requires_grad_()
        wide[name].requires_grad_()
    offsets = offsets_of(lengths).to(device)
    assert torch.equal(offsets, offsets.sort()[0])
    expected = composite_full(**samples, n_rays=n_rays)
    got = composite_full(**wide, offsets=offsets)
    loss, wide_loss = 0.0, 0.0
    for name in expected._fields:
        a, b = getattr(got, name), getattr(expected, name)
        if name == "weights":
            assert a.shape == (n_samples + room,) and not bool(a[n_samples:].any())
            a = a[:n_samples]
        assert torch.equal(a, b), name
        wide_loss, loss = wide_loss + (a**2).sum(), loss + (b**2).sum()
    wide_loss.backward()
    loss.backward()
    for name in VALUES:
        assert torch.equal(wide[name].grad[:n_samples], samples[name].grad), name
        assert not bool(wide[name].grad[n_samples:].any()), name
    args = [wide[name] for name in ("sigmas", "rgbs", "t_starts", "t_ends")]
    for part, name in zip(
        composite(*args, offsets=offsets), ("color", "opacity", "depth", "weights")
    ):
        assert torch.equal(part, getattr(got, name)), name
    seen = visibility(args[0], *args[2:], None, None, 0.05, offsets=offsets)
    names = ("sigmas", "t_starts", "t_ends", "ray_indices")
    expected = visibility(*(samples[name] for name in names), n_rays, 0.05)
    assert torch.equal(seen[:n_samples], expected) and not bool(seen[n_samples:].any())


@pytest.mark.parametrize("density", [0.5, 50.0], ids="density={}".format)
def test_orientation(device, density):
    """Value and gradient against the reference in float64, together with the other outputs."""
    samples = packed(LENGTHS, density)
    offsets, dirs = offsets_of(LENGTHS), ray_directions(len(LENGTHS))
    wide = {name: tensor.to(device) for name, tensor in with_room(samples, 5).items()}
    exact = double(with_room(samples, 5))
    for name in VALUES:
        exact[name].requires_grad_()
        wide[name].requires_grad_()
    expected = composite_full_reference(**exact, offsets=offsets, dirs=dirs.double())
    got = composite_full(**wide, offsets=offsets.to(device), dirs=dirs.to(device))
    assert_relative("orientation", got.orientation, expected.orientation)
    (grad,) = torch.autograd.grad(got.orientation.sum(), wide["normals"], retain_graph=True)
    (want,) = torch.autograd.grad(expected.orientation.sum(), exact["normals"], retain_graph=True)
    assert_relative("gradient of normals", grad, want)
    sum((tensor**2).sum() for tensor in got).backward()
    sum((tensor**2).sum() for tensor in expected).backward()
    for name in VALUES:
        assert_relative(f"gradient of {name}", wide[name].grad, exact[name].grad)


def test_orientation_changes_nothing_else(device):
    samples = {name: tensor.to(device) for name, tensor in packed(LENGTHS).items()}
    dirs = ray_directions(len(LENGTHS)).to(device)
    samples["sigmas"].requires_grad_()
    samples["rgbs"].requires_grad_()
    plain = composite_full(*full_args(samples, len(LENGTHS)))
    out = composite_full(*full_args(samples, len(LENGTHS)), dirs=dirs)
    assert plain.orientation.shape == (0, 1)
    for name in plain._fields[:-1]:
        assert_relative(name, getattr(out, name), getattr(plain, name), 1e-6)
    out.orientation.sum().backward()
    assert not bool(samples["sigmas"].grad.any()) and not bool(samples["rgbs"].grad.any())


def test_gradients_of_long_rays(device):
    """Rays of many groups of samples, thin enough that all of them count."""
    lengths = [2000, 33, 4001]
    samples = packed(lengths, density=0.2)
    samples["sigmas"].clamp_(max=0.2)
    exact = double(samples)
    compiled = {name: tensor.to(device) for name, tensor in samples.items()}
    for name in VALUES:
        exact[name].requires_grad_()
        compiled[name].requires_grad_()
    for function, arguments in ((composite_full, compiled), (composite_full_reference, exact)):
        out = function(*full_args(arguments, len(lengths)))
        (out.color.sum() + (out.depth * out.opacity).sum() + out.z_variance.sum()).backward()
    for name in VALUES[:2]:
        assert_relative(f"gradient of {name}", compiled[name].grad, exact[name].grad)


@cuda_only
def test_a_graph_composites_anew():
    """A CUDA graph of forward and backward follows the offsets that it is given."""
    device, room, n_rays = torch.device("cuda"), 4000, len(LENGTHS)
    samples = {k: v.to(device) for k, v in with_room(packed(LENGTHS), room).items()}
    dirs = ray_directions(n_rays).to(device)
    offsets = offsets_of(LENGTHS).to(device)
    for name in VALUES:
        samples[name].requires_grad_()
    results = []

    def step() -> None:
        out = composite_full(**samples, offsets=offsets, dirs=dirs)
        loss = sum((tensor**2).sum() for tensor in out)
        results.append([*out, *torch.autograd.grad(loss, [samples[name] for name in VALUES])])

    replay = captured(step)
    written = results[-1]
    for lengths in ([5] * n_rays, [0] * n_rays, LENGTHS[::-1]):
        new = with_room(packed(lengths), sum(LENGTHS) + room - sum(lengths))
        offsets.copy_(offsets_of(lengths))
        with torch.no_grad():
            for name, tensor in samples.items():
                tensor.copy_(new[name])
        replay()
        step()
        assert all(torch.equal(a, b) for a, b in zip(written, results[-1]))


def test_laws(device):
    """Weights and what passes the ray make 1; opacity in [0, 1]; depth within the ray."""
    samples = packed(LENGTHS, density=50.0)
    on_device = {name: tensor.to(device) for name, tensor in samples.items()}
    out = composite_full(*full_args(on_device, len(LENGTHS)))
    thickness = samples["sigmas"].double() * (samples["t_ends"] - samples["t_starts"]).double()
    total = torch.zeros(len(LENGTHS), dtype=torch.float64)
    total.index_add_(0, samples["ray_indices"], thickness)
    opacity = out.opacity[:, 0].cpu().double()
    torch.testing.assert_close(
        opacity + torch.exp(-total), torch.ones_like(total), rtol=0, atol=1e-6
    )
    assert bool((out.weights >= 0).all())
    assert bool(((out.opacity >= 0) & (out.opacity <= 1 + 1e-6)).all())
    assert bool((out.z_variance >= 0).all())
    white = composite_full(
        on_device["sigmas"],
        torch.ones_like(on_device["rgbs"]),
        *full_args(on_device, len(LENGTHS))[2:],
    )
    torch.testing.assert_close(white.color, out.opacity.expand(-1, 3), rtol=1e-6, atol=1e-7)


def test_opaque_sample_has_the_true_gradient(device):
    """Behind alpha = 1 nothing counts; in front of it, making a sample denser hides it."""
    sigmas = torch.tensor([1.0, 1e9, 3.0], device=device, requires_grad=True)
    t = torch.tensor([0.0, 1.0, 2.0, 3.0], device=device)
    rgbs = torch.tensor([[0.0] * 3, [1.0] * 3, [5.0] * 3], device=device)
    rays = torch.zeros(3, dtype=torch.int64, device=device)
    color, _, _, weights = composite(sigmas, rgbs, t[:-1], t[1:], rays, 1)
    color[0, 0].backward()
    transmittance = torch.exp(torch.tensor(-1.0))
    expected = torch.tensor([-float(transmittance), 0.0, 0.0])
    torch.testing.assert_close(sigmas.grad.cpu(), expected, rtol=1e-6, atol=0)
    assert float(weights[2].detach()) == 0.0


def test_infinite_density(device):
    """An infinitely dense sample is a wall, and stays so for its own ray alone."""
    samples = packed([3, 40, 2])
    samples["sigmas"][1] = float("inf")
    samples["sigmas"][20] = float("inf")
    on_device = {name: tensor.to(device) for name, tensor in samples.items()}
    on_device["sigmas"].requires_grad_()
    out = composite_full(*full_args(on_device, 3))
    out.color.sum().backward()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in out)
    assert bool(torch.isfinite(on_device["sigmas"].grad).all())
    torch.testing.assert_close(out.opacity[:2].cpu(), torch.ones(2, 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("lengths", [[], [0, 0, 0]], ids=["no rays", "no samples"])
def test_empty(device, lengths):
    samples = {name: tensor.to(device) for name, tensor in packed(lengths).items()}
    for name in VALUES:
        samples[name].requires_grad_()
    out = composite_full(*full_args(samples, len(lengths)))
    assert out.color.shape == (len(lengths), 3)
    assert not bool(out.color.any()) and not bool(out.z_variance.any())
    (out.color.sum() + out.z_variance.sum()).backward()
    assert samples["sigmas"].grad.shape == (0,)
    args = [samples[name] for name in ("sigmas", "t_starts", "t_ends", "ray_indices")]
    assert visibility(*args, len(lengths), 0.1).shape == (0,)
    reference = composite_full_reference(*full_args(packed(lengths), len(lengths)))
    assert [a.shape for a in out] == [b.shape for b in reference]


def units(got: Tensor, exact: Tensor) -> Tensor:
    """Errors in units in the last place of the float32 numbers next to `exact`."""
    near = exact.float().abs()
    unit = torch.nextafter(near, torch.tensor(torch.inf)) - near
    return (got.detach().cpu().double() - exact).abs() / unit.double()


def test_exponentials_are_right_to_two_units(device):
    """Opacity of one sample, and what it lets through to a wall, from tiny to opaque."""
    x = torch.cat([torch.logspace(-38, 2, 20_001), torch.linspace(0.0, 104.0, 20_002)])
    n = len(x)
    sigmas = torch.stack([x, torch.full_like(x, 1e9)], dim=1).flatten().to(device)
    starts = torch.tensor([0.0, 1.0], device=device).repeat(n)
    rays = torch.arange(n, device=device).repeat_interleave(2)
    _, _, _, weights = composite(sigmas, starts.new_ones(2 * n, 3), starts, starts + 1, rays, n)
    assert units(weights[0::2], -torch.expm1(-x.double())).max() <= 2.0
    assert units(weights[1::2], torch.exp(-x.double())).max() <= 2.0


@pytest.mark.parametrize("density", [5.0, 50.0])
def test_errors_stay_within_twice_those_of_torch(density):
    """Against float64: the compiled results and the float32 reference's, both with gradients."""
    samples = packed(LENGTHS, density)
    errors = []
    exact = None
    for function, inputs in (
        (composite_full_reference, double(samples)),
        (composite_full_reference, {k: v.clone() for k, v in samples.items()}),
        (composite_full, {k: v.clone() for k, v in samples.items()}),
    ):
        for name in VALUES:
            inputs[name].requires_grad_()
        out = function(*full_args(inputs, len(LENGTHS)))
        sum(image.sum() for image in out[:5]).backward()
        # Without directions there is no orientation.
        values = [*out[:-1], *(inputs[name].grad for name in VALUES)]
        exact = exact or values
        errors.append([relative(value, right) for value, right in zip(values, exact)])
    _, torchs, ours = errors
    names = (*out._fields, *VALUES)
    assert [name for name, a, b in zip(names, ours, torchs) if a > 2 * b + 1e-8] == []


def test_one_long_ray(device):
    """20000 thin samples: float32 sums in order would lose 1e-4 of the transmittance."""
    n = 20_000
    sigmas = torch.rand(n, generator=torch.Generator().manual_seed(0)) * 1e-1
    t = torch.linspace(0.0, 100.0, n + 1)
    samples = {
        "sigmas": sigmas,
        "rgbs": torch.rand(n, 3),
        "normals": torch.randn(n, 3),
        "t_starts": t[:-1].contiguous(),
        "t_ends": t[1:].contiguous(),
        "ray_indices": torch.zeros(n, dtype=torch.int64),
    }
    expected = composite_full_reference(*full_args(double(samples), 1))
    got = composite_full(*full_args({k: v.to(device) for k, v in samples.items()}, 1))
    for name in expected._fields:
        assert_relative(name, getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.05])
def test_visibility(device, threshold):
    samples = packed(LENGTHS, density=50.0)
    names = ("sigmas", "t_starts", "t_ends", "ray_indices")
    args = [samples[name].to(device) for name in names]
    got = visibility(*args, len(LENGTHS), threshold)
    as_tensor = torch.tensor(threshold, device=device)
    assert torch.equal(got, visibility(*args, len(LENGTHS), as_tensor))
    exact = [double(samples)[name] for name in names]
    # a sample within rounding of a threshold may fall on either side
    strict = visibility_reference(*exact, len(LENGTHS), threshold * (1 + 1e-5), 1e-4 * (1 + 1e-4))
    loose = visibility_reference(*exact, len(LENGTHS), threshold * (1 - 1e-5), 1e-4 * (1 - 1e-4))
    assert bool((strict <= got.cpu()).all()) and bool((got.cpu() <= loose).all())
    assert 0 < int(got.sum()) < len(got)


def test_deterministic(device):
    """The same bits from any number of threads and in every run, gradients included."""
    samples = {name: tensor.to(device) for name, tensor in packed(LENGTHS * 20).items()}
    n_rays = 20 * len(LENGTHS)
    threads = torch.get_num_threads()
    results = []
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        values = [samples[name].clone().requires_grad_() for name in VALUES]
        out = composite_full(*values, *(samples[name] for name in INTERVALS), n_rays)
        sum((tensor**2).sum() for tensor in out).backward()
        results.append([*out, *(value.grad for value in values)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_second_backward_is_refused(device):
    samples = {name: tensor.to(device) for name, tensor in packed([4]).items()}
    samples["sigmas"].requires_grad_()
    color = composite_full(*full_args(samples, 1)).color
    (grad,) = torch.autograd.grad(color.sum(), samples["sigmas"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), samples["sigmas"])


def test_backward_leaves_its_inputs_alone(device):
    samples = {name: tensor.to(device) for name, tensor in packed([4, 40]).items()}
    before = {name: tensor.clone() for name, tensor in samples.items()}
    samples["sigmas"].requires_grad_()
    loss = composite_full(*full_args(samples, 2)).depth.sum()
    (first,) = torch.autograd.grad(loss, samples["sigmas"], retain_graph=True)
    (second,) = torch.autograd.grad(loss, samples["sigmas"])
    assert torch.equal(first, second)
    assert all(torch.equal(samples[name], before[name]) for name in samples)


def test_backend_choice(monkeypatch):
    samples = packed([3, 0, 40])
    compiled = composite_full(*full_args(samples, 3))
    monkeypatch.setenv("DSD_BACKEND", "torch")
    chosen = composite_full(*full_args(samples, 3))
    reference = composite_full_reference(*full_args(samples, 3))
    for name in compiled._fields:
        assert torch.equal(getattr(chosen, name), getattr(reference, name))
        assert_relative(name, getattr(chosen, name), getattr(compiled, name))


def test_operators(device):
    samples = {name: tensor.to(device) for name, tensor in packed([3, 0, 5]).items()}
    intervals = [samples[name] for name in INTERVALS]
    args = [samples["sigmas"], *intervals, 3, torch.tensor(0.01, device=device), 1e-4]
    torch.library.opcheck(torch.ops.dsd_fast.visibility.default, args)
    for name in VALUES:
        samples[name].requires_grad_()
    values = [samples[name] for name in VALUES]
    torch.library.opcheck(torch.ops.dsd_fast.composite.default, [*values[:2], *intervals, 3])
    torch.library.opcheck(torch.ops.dsd_fast.composite_full.default, [*values, *intervals, 3])
    values = [value.detach() for value in values]
    out = composite_full(*values, *intervals, 3)
    grads = [torch.randn_like(tensor) for tensor in out[:6]]
    saved = [out.opacity, out.depth, out.z_variance]
    bwd = torch.ops.dsd_fast.composite_bwd.default
    torch.library.opcheck(bwd, [*grads, *values, *intervals, 3, *saved])
    dirs = torch.randn(3, 3, device=device)
    offsets = torch.tensor([0, 3, 3, 8], device=device)
    full = [*values, *intervals[:2], None, 3]
    torch.library.opcheck(torch.ops.dsd_fast.composite_full.default, [*full, offsets, dirs])
    grad_orientation = torch.randn(3, 1, device=device)
    torch.library.opcheck(bwd, [*grads, *full, *saved, offsets, dirs, grad_orientation])
    grads[3] = grads[4] = None
    without_normals = [*values[:2], None]
    torch.library.opcheck(bwd, [*grads, *without_normals, *intervals, 3, *saved[:2], None])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"sigmas": [1.0]}, TypeError, ["sigmas", "tensor", "list"]),
        ({"sigmas": torch.zeros(5).half()}, TypeError, ["sigmas", "float32", "float16"]),
        ({"sigmas": torch.zeros(5, 1)}, ValueError, ["sigmas", r"\[S\]", r"\[5, 1\]"]),
        ({"rgbs": torch.zeros(5, 4)}, ValueError, ["rgbs", r"\[5, 3\]", r"\[5, 4\]"]),
        ({"normals": torch.zeros(4, 3)}, ValueError, ["normals", r"\[5, 3\]", r"\[4, 3\]"]),
        ({"normals": torch.zeros(3, 5).t()}, ValueError, ["normals", "contiguous", "strides"]),
        ({"t_ends": torch.zeros(5, device="meta")}, ValueError, ["t_ends", "cpu", "meta"]),
        ({"ray_indices": torch.zeros(5).int()}, TypeError, ["ray_indices", "int64", "int32"]),
        ({"ray_indices": torch.tensor([0, 1, 0, 1, 1])}, ValueError, ["ray_indices", "sorted"]),
        ({"ray_indices": torch.tensor([0, 0, 0, 1, 9])}, ValueError, [r"\[0, 2\)", "0 to 9"]),
        ({"ray_indices": torch.tensor([-1, 0, 0, 1, 1])}, ValueError, [r"\[0, 2\)", "-1 to 1"]),
        ({"n_rays": -1}, ValueError, ["n_rays", "got -1"]),
        ({"n_rays": None}, ValueError, ["ray_indices and n_rays or offsets", "neither"]),
        ({"offsets": torch.tensor([0, 3, 5])}, ValueError, ["offsets replace", "both"]),
        ({"dirs": torch.zeros(3, 3)}, ValueError, ["dirs", r"\[2, 3\]", r"\[3, 3\]"]),
        ({"dirs": torch.zeros(2, 3).double()}, TypeError, ["dirs", "float32", "float64"]),
    ],
)
def test_errors(changes, error, words):
    samples = packed([3, 2])
    with pytest.raises(error, match="(?s)" + ".*".join(words)):
        composite_full(**{**samples, "n_rays": 2, **changes})


@pytest.mark.parametrize(
    ("offsets", "error", "words"),
    [
        ([0, 3, 5], TypeError, ["offsets", "tensor", "list"]),
        (torch.tensor([0, 3, 5]).int(), TypeError, ["offsets", "int64", "int32"]),
        (torch.tensor([[0, 3, 5]]), ValueError, ["offsets", r"\[R \+ 1\]", r"\[1, 3\]"]),
        (torch.tensor([]).long(), ValueError, ["offsets", r"\[R \+ 1\]", r"\[0\]"]),
        (torch.tensor([0, 3, 5], device="meta"), ValueError, ["offsets", "cpu", "meta"]),
        (torch.tensor([0, 3, 6]), ValueError, ["offsets", "at most 5", "0 to 6"]),
        (torch.tensor([1, 3, 5]), ValueError, ["offsets", "from 0", "1 to 5"]),
        (torch.tensor([0, 4, 3]), ValueError, ["offsets", "not rising"]),
    ],
)
def test_offsets_errors(offsets, error, words):
    samples = packed([3, 2])
    del samples["ray_indices"]
    with pytest.raises(error, match="(?s)" + ".*".join(words)):
        composite_full(**samples, offsets=offsets)
    del samples["normals"]
    with pytest.raises(error, match="(?s)" + ".*".join(words)):
        composite(**samples, offsets=offsets)


@cuda_only
def test_offsets_without_sense_stay_within_bounds():
    """Wrong numbers are allowed; an access out of bounds is not (a sanitizer sees it)."""
    wide = {k: v.cuda() for k, v in with_room(packed([40, 7]), 3).items()}
    for name in VALUES:
        wide[name].requires_grad_()
    for offsets in ([-5, 40, 900], [99, 98, 97], [40, 10, 1 << 40]):
        out = composite_full(**wide, offsets=torch.tensor(offsets).cuda())
        sum(tensor.sum() for tensor in out).backward()
    torch.cuda.synchronize()


def test_visibility_threshold_errors():
    samples = packed([3])
    args = [samples[name] for name in ("sigmas", "t_starts", "t_ends", "ray_indices")]
    with pytest.raises(ValueError, match=r"alpha_threshold must have shape \[\].*\[1\]"):
        visibility(*args, 1, torch.zeros(1))
