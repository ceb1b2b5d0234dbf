"""Training of the embedded prior: the VAE on rendered views, then UNet and text encoder on latents.

One process a GPU (start it with torchrun for more than one); every process holds its share of the
views in GPU memory. A run is bounded by wall-clock minutes, because that is what a borrowed GPU is
counted in: the learning rate follows the elapsed share of the budget, and the averaged weights
written at the end let the next piece go on from them.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import torch.distributed as dist
from annotated_types import Ge, Interval
from safetensors.torch import load_file, save_file

from dsd_fast.diffusion import int8
from dsd_fast.diffusion.noise_path import NoisePath
from dsd_fast.graphs import captured
from dsd_fast.prior import models
from dsd_fast.prior.dataset import CaptionTable, Views, composite
from dsd_fast.ranges import AnyPath, Decay, NonNegative, Positive, Seed, Share, check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

# Steps between two looks at the clock where several processes have to agree on it.
CLOCK_STEPS = 20
LOG_STEPS = 100
# A month.
MOST_MINUTES = 30 * 24 * 60
# Images a step.
BatchSize = Annotated[int, Interval(ge=1, le=2**16)]
# Floats between the starts of two parameters in a buffer: 256 bytes.
ALIGNMENT = 64
WARM_UP_STEPS = 300
# Least weight of a noise level before the mean is made one.
MIN_WEIGHT = 0.3


@dataclass(kw_only=True)
class TrainConfig:
    """Settings of one training piece.

    Raises:
        ValueError: a value out of its range.
    """

    # Folder of rendered views (see `render`).
    views: AnyPath
    # Folder for states and logs.
    out: AnyPath
    # Wall-clock budget of this piece, in minutes.
    minutes: Annotated[float, Interval(gt=0, le=MOST_MINUTES)] = 8.0
    # Diffusers folder to go on from, such as an exported prior; none starts anew.
    resume: AnyPath | None = None
    # Images a step and process.
    batch_size: BatchSize = 256
    # Peak learning rate.
    lr: Positive = 8e-4
    # Share of the budget after which the learning rate starts to fall to zero; 0 is a plain cosine.
    hold: Decay = 0.3
    # Decay of the exponential moving average of the weights.
    ema_decay: Decay = 0.999
    # Minutes between two saves of the averaged weights; they are always saved at the end.
    save_minutes: Positive = 3.0
    # Compile the networks (pays from about five minutes on).
    compile: bool = True
    # Seed of initialisation and draws.
    seed: Seed = 0

    def __post_init__(self) -> None:
        check(self)


@dataclass(kw_only=True)
class VaeConfig(TrainConfig):
    """Settings of the VAE's training."""

    batch_size: BatchSize = 48
    lr: Positive = 1e-3
    # Weight of the KL term, per latent element.
    kl_weight: NonNegative = 3e-4


@dataclass(kw_only=True)
class UnetConfig(TrainConfig):
    """Settings of the UNet's training."""

    # Trained VAE: a folder that `train-vae` wrote, or a diffusers folder.
    vae: AnyPath
    # Encodings of each view, each on another background and mirrored by a coin.
    encodings: Annotated[int, Interval(ge=1, le=64)] = 3
    # Share of rows trained without a caption, for classifier-free guidance (Ho and Salimans 2022).
    caption_dropout: Share = 0.1
    # Share of captioned rows whose embedding is interpolated between views by azimuth, as Perp-Neg
    # guidance will ask.
    interpolated: Share = 0.9
    # Largest weight of the noisy levels, where what and which side is shown is decided: rows weigh
    # 1/sqrt(SNR), at most this and at least 0.3. Plain noise prediction nearly ignores them.
    max_weight: Annotated[Positive, Ge(MIN_WEIGHT)] = 8.0


class World:
    """The processes of this run, as torchrun describes them in the environment; one without it.

    All draw the same initial weights from `seed`; a Trainer's making tells their draws apart.

    Attributes: `rank`, `size`, and `device`, this process's CUDA device, or the CPU without CUDA.
    """

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")

    def average(self, values: torch.Tensor) -> None:
        """Replace `values` by their mean over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size

    def agree(self, value: float) -> float:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = torch.tensor([value], device=self.device, dtype=torch.float64)
        dist.broadcast(box, 0)
        return float(box)

    def close(self) -> None:
        """Leave the group of processes."""
        if self.size > 1:
            dist.destroy_process_group()


def flatten(modules: Iterable[torch.nn.Module]) -> torch.Tensor:
    """Move all parameters into one buffer, so that one kernel can update or average them all.

    The parameters stay what they are, as views into it with their own strides.

    Returns:
        the buffer, 1-dim float32 on the parameters' device; gaps between parameters are zero.
    """
    parameters = [p for module in modules for p in module.parameters()]
    starts = [0]
    for p in parameters:
        starts.append(starts[-1] + -(-p.numel() // ALIGNMENT) * ALIGNMENT)
    flat = torch.zeros(starts[-1], device=parameters[0].device)
    for p, start in zip(parameters, starts, strict=False):
        view = flat.as_strided(p.shape, p.stride(), start)
        view.copy_(p.detach())
        p.data = view
    return flat


class Trainer:
    """AdamW with an EMA over several modules, timed by the wall clock from its making on.

    All weights lie in one buffer, all gradients in another. On CUDA a step is two graph replays
    around one all-reduce: networks as small as these are otherwise bound by kernel launches.

    Args:
        modules: by name of the part (vae, unet, text_encoder), on the world's device; they start
            from `cfg.resume` where there is one.
    Raises:
        FileNotFoundError: `cfg.resume` lacks a part.
        ValueError: the part does not fit the network.
        OSError: the output folder cannot be made.
    """

    def __init__(self, cfg: TrainConfig, world: World, modules: dict[str, torch.nn.Module]) -> None:
        self.cfg, self.world = cfg, world
        # At the start, so that a wrong folder does not cost a training.
        cfg.out.mkdir(parents=True, exist_ok=True)
        if cfg.resume is not None:
            for name, module in modules.items():
                load_weights(module, cfg.resume, name)
        self.ema = {name: copy.deepcopy(m).requires_grad_(False) for name, m in modules.items()}
        self._average = flatten(self.ema.values())
        self._weights = torch.nn.Parameter(flatten(modules.values()))
        self._grad = self._weights.grad = torch.zeros_like(self._weights)
        start = self._weights.data_ptr()
        for p in (p for m in modules.values() for p in m.parameters()):
            offset = (p.data_ptr() - start) // p.element_size()
            p.grad = self._grad.as_strided(p.shape, p.stride(), offset)
        # On the device, where a captured step can read them.
        self._lr = torch.zeros((), device=world.device)
        self._ema_share = torch.zeros((), device=world.device)
        self._optimizer = torch.optim.AdamW(
            [self._weights],
            lr=self._lr,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=True,
            capturable=world.device.type == "cuda",
        )
        self.step_count = 0
        self._start = self._saved_at = time.monotonic()
        self.progress = 0.0
        torch.manual_seed(cfg.seed + 1000 + world.rank)

    def seconds(self) -> float:
        """Since the trainer was made."""
        return time.monotonic() - self._start

    def run(self, loss: Callable[[], tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> None:
        """Train until the budget is spent, then save; the processes part.

        Args:
            loss: draws a batch and gives its 0-dim loss with 0-dim values to be logged. On CUDA it
                is captured: it must neither wait for the device nor draw from anything but torch's
                generator of the device.
        Raises:
            ValueError: the budget was spent before the first step.
        """
        values: dict[str, torch.Tensor] = {}

        def descend() -> None:
            self._grad.zero_()
            value, logged = loss()
            value.backward()
            values.update({name: v.detach() for name, v in logged.items()})

        def update() -> None:
            torch.nn.utils.clip_grad_norm_([self._weights], 1.0)
            self._optimizer.step()
            self._average.lerp_(self._weights.detach(), self._ema_share)

        if self.world.device.type == "cuda":
            # At rate zero the steps before capture make the optimizer's state and change nothing.
            descend, update = captured(descend), captured(update)
            for moment in self._optimizer.state[self._weights].values():
                moment.zero_()
        while self._tick():
            descend()
            self.world.average(self._grad)
            update()
            self.step_count += 1
            self._log(values)
        self.save()
        self.world.close()

    def _tick(self) -> bool:
        """Set the rates of the next step; False when the budget is spent."""
        if self.world.device.type != "cuda" or self.step_count % CLOCK_STEPS == 0:
            if self.world.device.type == "cuda":
                torch.cuda.synchronize()  # replays queue up: the clock is to count done work
            now = time.monotonic()
            elapsed = (now - self._start) / (60 * self.cfg.minutes)
            self.progress = self.world.agree(min(elapsed, 1.0))
            if now - self._saved_at > 60 * self.cfg.save_minutes:
                self._saved_at = now
                self.save()
        if self.progress >= 1.0:
            if self.step_count == 0:
                raise ValueError(
                    f"minutes: loading the data took all of the {self.cfg.minutes:g} minutes; "
                    "allow more"
                )
            return False
        fall = max(0.0, (self.progress - self.cfg.hold) / (1 - self.cfg.hold))
        warm = min(1.0, (self.step_count + 1) / WARM_UP_STEPS)
        self._lr.fill_(self.cfg.lr * warm * (0.5 + 0.5 * math.cos(math.pi * fall)))
        steps = self.step_count + 1
        self._ema_share.fill_(1 - min(self.cfg.ema_decay, (1 + steps) / (10 + steps)))
        return True

    def _log(self, values: dict[str, torch.Tensor]) -> None:
        """Print `values` now and then, on one process; reading them waits for the device."""
        if self.step_count % LOG_STEPS == 0 and self.world.rank == 0:
            head = f"step {self.step_count}  {self.seconds():6.1f} s  {self.progress:.3f}"
            shown = (f"{name} {float(value):.4f}" for name, value in values.items())
            print(head, *shown, sep="  ", flush=True)

    def save(self) -> None:
        """Write `<module>.safetensors` into the output folder: the averaged weights in float16."""
        if self.world.rank != 0:
            return
        for name, module in self.ema.items():
            save_part(module, self.cfg.out, name)


def save_part(module: torch.nn.Module, folder: Path, name: str) -> None:
    """Write the weights of one part as `folder`/`name`.safetensors in float16."""
    state = {k: v.to("cpu", torch.float16).contiguous() for k, v in module.state_dict().items()}
    path = folder / f"{name}.safetensors"
    save_file(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_part(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Weights of one part (vae, unet, text_encoder) of a training's folder or a diffusers folder.

    Returns:
        float32 tensors on the CPU by name.
    Raises:
        FileNotFoundError: the folder has no such part.
    """
    candidates = [
        folder / f"{name}.safetensors",
        folder / name / "diffusion_pytorch_model.safetensors",
        folder / name / f"diffusion_pytorch_model.{int8.VARIANT}.safetensors",
        folder / name / "model.safetensors",
    ]
    for path in candidates:
        if path.is_file():
            return int8.unpack(load_file(path))
    raise FileNotFoundError(
        f"no weights of the {name}: expected one of {', '.join(map(str, candidates))}; "
        "pass a folder that a training wrote, or a diffusers folder"
    )


def load_weights(module: torch.nn.Module, folder: Path, name: str) -> None:
    """Fill `module` with the weights that `load_part` finds.

    Raises:
        FileNotFoundError: the folder has no such part.
        ValueError: the weights are of another network.
    """
    try:
        module.load_state_dict(load_part(folder, name))
    except RuntimeError as error:
        raise ValueError(
            f"{folder}: the weights of the {name} are not of the network that is trained here "
            f"({str(error).splitlines()[-1].strip()})"
        ) from error


def train_vae(cfg: VaeConfig) -> None:
    """Train the autoencoder on views over random backgrounds; writes vae.safetensors.

    The loss is L1 + 2 L2 + L1 of the differences of neighbours + the KL term (Kingma and Welling
    2014).

    Raises:
        FileNotFoundError, ValueError: unusable views or weights to go on from, or no time for a
            step.
        OSError: the output folder cannot be written.
    """
    world = World(cfg.seed)
    vae = models.build_vae().to(world.device, memory_format=torch.channels_last)
    trainer = Trainer(cfg, world, {"vae": vae})
    views = Views(cfg.views, world.device, world.rank, world.size)

    def reconstruct(images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = vae.quant_conv(vae.encoder(images)).float().chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        latents = mean + torch.exp(0.5 * logvar) * noise
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return vae.decoder(vae.post_quant_conv(latents)).float(), kl

    forward = torch.compile(reconstruct, dynamic=False) if cfg.compile else reconstruct

    def loss() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images, _ = views.batch(cfg.batch_size, soften=0.15)
        images = images.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(
            cfg.batch_size, 4, models.LATENT_SIZE, models.LATENT_SIZE, device=world.device
        )
        with torch.autocast(world.device.type, torch.bfloat16):
            output, kl = forward(images, noise)
        error = output - images
        # Edges weigh as much as areas: the difference of neighbours keeps thin legs and outlines
        # sharp.
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        mse = error.square().mean()
        total = error.abs().mean() + 2.0 * mse + edges + cfg.kl_weight * kl
        return total, {"psnr": 10 * torch.log10(4 / mse), "kl": kl}

    trainer.run(loss)


@torch.no_grad()
def encode_views(
    vae: AutoencoderKL, views: Views, encodings: int, batch: int = 256
) -> torch.Tensor:
    """Latents of this process's views, each on a fresh background and mirrored by a coin.

    Args:
        vae: AutoencoderKL on the device of `views`, left in evaluation mode.
        batch: images encoded at once.
    Returns:
        [encodings, N, 4, 32, 32] float16 on that device, posterior samples without the scaling
        factor.
    """
    vae.eval()
    shape = encodings, len(views), 4, models.LATENT_SIZE, models.LATENT_SIZE
    out = torch.empty(shape, dtype=torch.float16, device=views.device)
    for k in range(encodings):
        for i in range(0, len(views), batch):
            rows = torch.arange(i, min(i + batch, len(views)), device=views.device)
            images = composite(views.rgba[rows], mirror=True)
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(views.device.type, torch.bfloat16):
                posterior = vae.encode(images).latent_dist
            out[k, rows] = posterior.sample().to(torch.float16)
    return out


def _inherited(resume: Path) -> tuple[CLIPTokenizer, float]:
    """Tokenizer and scaling factor of the model to go on from: what its weights were trained with.

    Raises:
        FileNotFoundError: no diffusers folder.
    """
    config = resume / "vae" / "config.json"
    missing = [path for path in (config, resume / "tokenizer") if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"resume: expected a diffusers folder, such as `export` writes, with {missing[0]}"
        )
    from transformers import CLIPTokenizer

    scale = json.loads(config.read_text(encoding="utf-8"))["scaling_factor"]
    return CLIPTokenizer.from_pretrained(resume / "tokenizer"), float(scale)


def level_weights(path: NoisePath, max_weight: float) -> torch.Tensor:
    """Weight of each noise level in the loss: 1/sqrt(SNR) within [MIN_WEIGHT, max_weight], mean 1.

    SNR is (alpha / sigma)^2. Returns [levels] float32.
    """
    weights = (path.sigma / path.alpha).clamp(MIN_WEIGHT, max_weight)
    return weights / weights.mean()


def draw_levels(batch: int, count: int, device: torch.device) -> torch.Tensor:
    """[batch] int64 in [0, count), stratified: uniform, with less noise in the loss."""
    u = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
    return (u * count).long().clamp(max=count - 1)


def train_unet(cfg: UnetConfig) -> None:
    """Train UNet and text encoder on the noisy latents of the views.

    The UNet predicts the velocity (Salimans and Ho 2022), which stays accurate where noise hides
    nearly everything: there the picture implied by a predicted noise has that noise's error
    fifteen-fold. The loss is the error of the implied noise, weighted by `level_weights`.

    Writes unet.safetensors, text_encoder.safetensors, vae.safetensors, the tokenizer and the
    latents' scaling factor: what `export` needs.

    Raises:
        FileNotFoundError, ValueError: unusable views, VAE or model to go on from, or no time for a
            step.
        OSError: the output folder cannot be written.
    """
    world = World(cfg.seed)
    device = world.device
    # Before anything that takes time: a missing piece shows at once.
    tokenizer, scale = (None, None) if cfg.resume is None else _inherited(cfg.resume)
    vae = models.build_vae().to(device, memory_format=torch.channels_last)
    load_weights(vae, cfg.vae, "vae")
    table = CaptionTable(cfg.views, device, tokenizer)
    unet = models.build_unet().to(device, memory_format=torch.channels_last)
    text_encoder = models.build_text_encoder(table.tokenizer).to(device)
    trainer = Trainer(cfg, world, {"unet": unet, "text_encoder": text_encoder})

    views = Views(cfg.views, device, world.rank, world.size)
    latents = encode_views(vae, views, cfg.encodings)
    if scale is None:  # rank 0 decides, so that all train the same model
        scale = world.agree(1.0 / float(latents[:, ::7].float().std()))
    latents *= scale
    views.free_images()
    if world.rank == 0:
        count, each = latents.shape[:2]
        print(f"{count} x {each} latents a process, scaling factor {scale:.5f}", flush=True)
        save_part(vae, cfg.out, "vae")
        (cfg.out / "scaling_factor").write_text(f"{scale:.6f}\n", encoding="ascii")
        table.tokenizer.save_pretrained(cfg.out / "tokenizer")

    path = NoisePath.of_scheduler(models.SCHEDULER).to(device)
    weights = level_weights(path, cfg.max_weight)
    forward = torch.compile(unet, dynamic=False) if cfg.compile else unet
    batch = cfg.batch_size

    def loss() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rows = views.sample(batch)
        x0 = latents[torch.randint(cfg.encodings, (batch,), device=device), rows].float()
        first, second, share = table.draw(views, rows, cfg.interpolated, cfg.caption_dropout)
        noise = torch.randn_like(x0)
        t = draw_levels(batch, len(path), device)
        noisy = path.noisy(x0, noise, t).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            both = text_encoder(torch.cat([first, second])).last_hidden_state
            text = torch.lerp(both[batch:], both[:batch], share.view(-1, 1, 1).to(both.dtype))
            velocity = forward(noisy, t, text, return_dict=False)[0].float()
        error = path.noise(velocity, noisy, t) - noise
        total = (weights[t] * error.square().mean((1, 2, 3))).mean()
        return total, {"loss": total}

    trainer.run(loss)
