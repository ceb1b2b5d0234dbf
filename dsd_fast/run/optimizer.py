"""Adam with a loss scale, which leaves out steps that are not finite, without asking the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsd_fast import ops
from dsd_fast.run.checkpoint import CheckpointError
from dsd_fast.scene.protocol import Trainable

# The loss scale of mixed-precision training: where it starts, and the good steps before it doubles.
INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000


class Adam:
    """Adam over the trainables of a scene, by their names, each with a learning rate of its own.

    On CUDA the VAE's backward pass runs in float16, so the loss is scaled: the scale starts at
    2^16, doubles after 2000 good steps in a row and halves at a step whose gradients are not
    finite. Such a step changes no parameter, with or without a scale. The decision is taken on the
    device: nothing here waits for it.

    `skipped` and `bad_run` are 0-dim int64 tensors on the device: steps left out so far, and how
    many of them at the end were in a row.
    """

    def __init__(
        self,
        trainables: Mapping[str, Trainable],
        betas: tuple[float, float],
        eps: float,
        device: torch.device,
    ) -> None:
        self._trainables, self._betas, self._eps = trainables, betas, eps
        # By parameter name, each from its first gradient on: step, exp_avg and exp_avg_sq.
        self._moments: dict[str, dict[str, Tensor]] = {}
        self._scaling = device.type == "cuda"
        self.scale = torch.tensor(INITIAL_SCALE if self._scaling else 1.0, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_run = torch.zeros((), dtype=torch.int64, device=device)

    def step(self, loss: Tensor, ok: Tensor, share: Tensor | float | None = None) -> Tensor:
        """Back-propagate ``loss`` and update the parameters if every gradient is finite.

        ``ok`` (0-dim bool on the device) vetoes the update when False. ``share`` of the learning
        rates is taken, all of them without; on the device a CUDA graph can hold its schedule.
        Returns the norm of all gradients, 0-dim.
        """
        parameters = {name: each.parameter for name, each in self._trainables.items()}
        for parameter in parameters.values():
            parameter.grad = None
        (loss * self.scale).backward()
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        finite = norm.isfinite() & ok
        found_inf = (~finite).float()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                self._move(name, parameter.grad, found_inf, share)
        norm = norm / self.scale
        self._count(finite)
        return norm

    def _move(
        self, name: str, gradient: Tensor, found_inf: Tensor, share: Tensor | float | None
    ) -> None:
        parameter, rate, half_copy = self._trainables[name]
        if name not in self._moments:
            self._moments[name] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
        moments = self._moments[name]
        before = None if share is None else parameter.detach().clone()
        with half_copy() as half:
            ops.adam_step(
                parameter.detach().view(-1),
                gradient.reshape(-1),
                moments["exp_avg"].view(-1),
                moments["exp_avg_sq"].view(-1),
                moments["step"],
                rate,
                self._betas,
                self._eps,
                grad_scale=self.scale,
                found_inf=found_inf,
                half_copy=half if before is None else None,
            )
            if before is not None and share is not None:
                # Adam's step is proportional to its rate, which the operator wants as a number.
                parameter.detach().sub_(before).mul_(share).add_(before)
                if half is not None:
                    half.copy_(parameter.detach().view_as(half))

    def _count(self, finite: Tensor) -> None:
        bad = ~finite
        # In place: a CUDA graph that holds a step finds them where they were.
        self.skipped += bad
        self.bad_run.add_(1).mul_(bad)
        if not self._scaling:
            return
        self._good_steps.add_(1).mul_(finite)
        grow = self._good_steps == GROWTH_INTERVAL
        self.scale.mul_(1.0 + grow.float()).mul_(1.0 - 0.5 * bad.float())
        self._good_steps.mul_(~grow)

    def state_dict(self) -> dict:
        """Adam's moments by parameter name, the scale and the counters."""
        adam = {name: self._moments[name] for name in self._trainables if name in self._moments}
        counters = {
            "scale": self.scale,
            "good_steps": self._good_steps,
            "skipped": self.skipped,
            "bad_run": self.bad_run,
        }
        return {"adam": adam, "counters": counters}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken. CheckpointError for moments that do not fit."""
        for name, moments in state["adam"].items():
            trainable = self._trainables.get(name)
            if trainable is None or moments["exp_avg"].shape != trainable.parameter.shape:
                raise CheckpointError(
                    f"the checkpoint's optimizer state does not fit this configuration at {name}"
                )
            self._moments[name] = {
                key: value.to(trainable.parameter.device, copy=True)
                for key, value in moments.items()
            }
        counters, device = state["counters"], self.scale.device
        if self._scaling:
            # A run that began on the CPU has the scale 1 and begins to look for its own.
            saved = counters["scale"].item()
            self.scale = torch.tensor(saved if saved > 1.0 else INITIAL_SCALE, device=device)
        self._good_steps = counters["good_steps"].to(device, copy=True)
        self.skipped = counters["skipped"].to(device, copy=True)
        self.bad_run = counters["bad_run"].to(device, copy=True)
