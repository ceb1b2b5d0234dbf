"""Variational Score Distillation: w (e^s(x_t) - e_LoRA(x_t; camera)), with fresh noise, s = 7.5
(ProlificDreamer, Wang et al. 2023).

e_LoRA is the same UNet with low-rank adapters, trained along with the object to predict the noise
of its noisy renderings: what they look like now, where e^s is what they should. It is told
the camera, by an embedding beside that of the level, in nine steps of ten. The frozen weights are
there once; only adapters and camera embedding are new, and are learned by AdamW.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.diffusion.networks import Network
from dsd_fast.guidance.baselines import ANY_LEVEL, Baseline
from dsd_fast.guidance.plan import Plan
from dsd_fast.guidance.registry import formulation

# Of the authors' code.
RANK, LEARNING_RATE = 4, 1e-4
CAMERA_DROPOUT = 0.1
# Sine and cosine of azimuth and elevation.
_CAMERA_NUMBERS = 4


@formulation
class VSD(Baseline):
    """See the module. For one run at a time: its adapters are that run's.

    Raises:
        ImportError: peft is missing.
        ValueError: several seeds, or a model without a UNet of diffusers.
    """

    name, one_run = "vsd", True
    defaults = ANY_LEVEL
    draws = ("eps", "own_eps", "own_level", "told")

    @classmethod
    def settings(cls, max_steps: int) -> dict[str, Any]:
        """The highest level falls after a fifth of the run: 5,000 of 25,000 steps in the authors'
        code."""
        later = max(max_steps // 5, 1)
        return cls.defaults | {"max_step_percent": (later, 0.98, 0.5, later + 1)}

    def _prepare(self) -> None:
        self._lora = _with_adapters(self.model.unet, self.name)
        self._learned = {name: p for name, p in self._lora.named_parameters() if p.requires_grad}
        # A CUDA graph can hold a step of it: the count of steps is on the device, gradients stay
        # where they are, and the device itself leaves a step out.
        self._optimizer: Any = torch.optim.AdamW(
            self._learned.values(),
            lr=LEARNING_RATE,
            fused=True,
            capturable=self.model.device.type == "cuda",
        )
        for p in self._learned.values():
            p.grad = torch.zeros_like(p)

    def draw_noise(self, n_items: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise of the gradient and of the adapters' own step, that one's levels (as a share of
        all), and whether the camera is told."""
        drawn = super().draw_noise(n_items, generator)
        return drawn | {
            "own_eps": torch.randn(drawn["eps"].shape, generator=generator),
            "own_level": torch.rand(n_items, generator=generator),
            "told": torch.rand(n_items, generator=generator) >= CAMERA_DROPOUT,
        }

    def _difference(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        tensors, n_items = plan.tensors, len(x)
        t, condition = tensors["t"], self.conditions.condition(tensors)
        noisy = self._path.noisy(x, tensors["eps"], t)
        parts = self._parts(noisy, t, condition, plan)
        positive = condition.tokens[:n_items]
        camera = self._camera(plan)
        with torch.no_grad():
            own = self._own(noisy, t, positive, camera)
        difference = parts.at(self.cfg.guidance_scale) - own
        self._learn_of(x, plan, positive, camera)
        return difference, noisy

    def _learn_of(self, x: Tensor, plan: Plan, text: Tensor, camera: Tensor) -> None:
        """`_learn` with what the plan drew for it; the camera [B,4] is told in most steps."""
        tensors = plan.tensors
        levels = (tensors["own_level"] * len(self._path)).long()
        self._learn(x, levels, text, camera * tensors["told"].view(-1, 1), tensors["own_eps"])

    def _camera(self, plan: Plan) -> Tensor:
        """[B,4] of the plan's angles; zeros are an untold camera."""
        azimuth, elevation = (
            torch.deg2rad(plan.tensors[name]) for name in ("azimuth", "elevation")
        )
        return torch.stack([azimuth.sin(), azimuth.cos(), elevation.sin(), elevation.cos()], 1)

    def _own(self, noisy: Tensor, t: Tensor, text: Tensor, camera: Tensor) -> Tensor:
        """e_LoRA [B,C,h,w] float32."""
        eps = self._plain(self._lora, noisy, t, text, class_labels=camera)
        return self._path.noise(eps, noisy, t)

    def _plain(self, unet: Network, z: Tensor, t: Tensor, text: Tensor, **more: Tensor) -> Tensor:
        """What a UNet predicts by its own forward, differentiable: [R,C,h,w] float32."""
        dtype = self.model.dtype
        with torch.autocast(z.device.type, dtype, enabled=dtype != torch.float32):
            z = z.to(dtype)
            return unet(z, t, encoder_hidden_states=text, return_dict=False, **more)[0].float()

    @torch.enable_grad()
    def _learn(self, x: Tensor, t: Tensor, text: Tensor, camera: Tensor, eps: Tensor) -> None:
        """One step of the adapters on the noise of x at levels t."""
        loss = F.mse_loss(self._own(self._path.noisy(x, eps, t), t, text, camera), eps)
        learned = list(self._learned.values())
        for p, gradient in zip(learned, torch.autograd.grad(loss, learned)):
            assert p.grad is not None  # from the beginning
            p.grad.copy_(gradient)
        # What a gradient scaler tells an optimizer.
        self._optimizer.found_inf = (~loss.isfinite()).float()
        self._optimizer.step()

    def learned_state(self) -> dict[str, Any]:
        """Adapters and camera embedding, and their optimizer's moments."""
        return {
            "adapters": {name: p.detach().cpu() for name, p in self._learned.items()},
            "moments": {
                name: {k: torch.as_tensor(v).cpu() for k, v in self._optimizer.state[p].items()}
                for name, p in self._learned.items()
                if p in self._optimizer.state
            },
        }

    def load_learned_state(self, state: Mapping[str, Any]) -> None:
        """Take over a `learned_state`.

        Raises:
            ValueError: it is of other adapters.
        """
        adapters = state.get("adapters", {})
        if adapters.keys() != self._learned.keys():
            raise ValueError("the checkpoint's adapters are not those of this model")
        moments = state.get("moments", {})
        with torch.no_grad():
            for name, p in self._learned.items():
                p.copy_(adapters[name])
                if name in moments:
                    self._optimizer.state[p] = {
                        k: v.to(p.device, copy=True) for k, v in moments[name].items()
                    }


def _with_adapters(unet: Network, method: str) -> Network:
    """A UNet with the same frozen weights, adapters in its attention, and a camera embedding."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            f"--guidance.method {method} needs peft: pip install 'dsd_fast[vsd]'"
        ) from error
    from diffusers.models.embeddings import TimestepEmbedding

    if getattr(unet, "time_embedding", None) is None or unet.class_embedding is not None:
        raise ValueError(
            f"--guidance.method {method} needs a UNet2DConditionModel without class embedding"
        )
    own = copy.deepcopy(unet)
    # The weights of a copy that shall not take memory.
    for mine, theirs in zip(own.parameters(), unet.parameters()):
        mine.data = theirs.data
    own.requires_grad_(False)
    width = own.time_embedding.linear_2.out_features
    device = next(own.parameters()).device
    # Adapters start from chance: the same chance whatever ran before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        own = inject_adapter_in_model(
            LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), own
        )
        own.class_embedding = TimestepEmbedding(_CAMERA_NUMBERS, width).to(device)
    for name, p in own.named_parameters():
        p.requires_grad_("lora_" in name or name.startswith("class_embedding"))
        if p.requires_grad:
            p.data = p.data.float()
    return own
