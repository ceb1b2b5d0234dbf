"""One step of Adam over a flat parameter, as after each backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.case import Call, Workload
from dsd_fast import ops
from dsd_fast.ops.adam import adam_step_reference

_LR, _BETAS, _EPS = 0.01, (0.9, 0.99), 1e-15


def step(n: int, device: torch.device, generator: torch.Generator, half: bool = False) -> Workload:
    """Parameter and moments of n numbers, with a loss scale that is read on the device."""
    param, grad = (torch.randn(n, generator=generator).to(device) for _ in range(2))
    guards = {
        "grad_scale": torch.full((), 2.0**10, device=device),
        "found_inf": torch.zeros((), device=device),
    }

    def call(function) -> Call:
        names = ("param", "exp_avg", "exp_avg_sq")
        values = (param.clone(), torch.zeros_like(param), torch.zeros_like(param))
        state: dict[str, Tensor] = dict(zip(names, values))
        count = torch.zeros((), device=device)
        copy = param.half() if half else None

        def run() -> tuple[Tensor, ...]:
            function(
                **state,
                grad=grad,
                step=count,
                lr=_LR,
                betas=_BETAS,
                eps=_EPS,
                **guards,
                half_copy=copy,
            )
            return (*state.values(), copy) if half else tuple(state.values())

        return run

    outputs = ("param", "exp_avg", "exp_avg_sq")
    return Workload(
        compiled=call(ops.adam_step),
        reference=call(adam_step_reference),
        outputs=(*outputs, "half_copy") if half else outputs,
        n_items=n,
        # Gradient in; parameter and moments in and out.
        n_bytes=(4 + 3 * 8 + (2 if half else 0)) * n,
        peers={} if half else _peers(param, grad, guards),
        capture_peers=True,
    )


def _peers(param: Tensor, grad: Tensor, guards: dict[str, Tensor]) -> dict[str, Call]:
    if not param.is_cuda:
        return {}
    leaf = param.clone().requires_grad_()
    leaf.grad = grad.clone()  # torch's kernel writes back what it divided by the scale
    adam = torch.optim.Adam([leaf], lr=_LR, betas=_BETAS, eps=_EPS, fused=True, capturable=True)
    for name, value in guards.items():
        setattr(adam, name, value)

    def run() -> Tensor:
        adam.step()
        return leaf

    return {f"torch {torch.__version__} fused": run}
