"""A guidance step outside the UNet, in a few passes: from its output to its next input.

With the trajectory's noise in a table a step is text, link_table -> UNet -> gradient, each one
launch; from its states alone, text, state -> UNet -> link -> UNet -> gradient; an exact trajectory
takes `step` after each UNet call. Every pass writes the rows and levels of the UNet's next batch
beside its own result. `dsd.DSDGuidance` puts them together.

On CUDA, where Triton can be imported, the passes are the kernels of `dsd_fast.kernels.guidance`;
elsewhere, and with DSD_BACKEND=torch, the functions of this package that they are fused from
(`*_reference`). Neither waits for the device, so that a CUDA graph can hold them; they cannot see
whether the levels, which must be 0 to 999, are.

Rows of B items are those of `guidance.rows`: R = 4 an item with perp-neg weights, 2 without. A
negative whose weight is next to nothing still has its row: which ones those are differs from view
to view, and a batch of another size would be another graph, for a row in eight at the few azimuths
around 0 and 90 degrees.

Predictions are noise, of any floating dtype; arithmetic and results are float32 but for the rows.
Nothing here is differentiated: `dsd.DSDGuidance.at_plan` gives the loss its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsd_fast._backend import backend
from dsd_fast.diffusion.noise_path import WEIGHTINGS, NoisePath
from dsd_fast.guidance.rows import combine as combine_reference
from dsd_fast.guidance.rows import expand_rows, mixed_rows


@dataclass(frozen=True)
class Guide:
    """How rows become one prediction (mathematics.md 3.4), by the fields of `guidance.combine`."""

    # [B,2] float32 on the predictions' device with perp-neg, None without.
    weights: Tensor | None
    standard_cfg: bool = False
    pure_conditional: bool = False

    @property
    def rows(self) -> int:
        """Rows of the UNet's batch an item."""
        return 2 if self.weights is None else 4


class Form(NamedTuple):
    """What a UNet's batch is made by, the same throughout a run."""

    path: NoisePath  # float32, on the device
    dtype: torch.dtype  # of the rows
    perp_neg: bool  # R = 4 rows an item, or 2

    @property
    def rows(self) -> int:
        """Rows of the UNet's batch an item."""
        return 4 if self.perp_neg else 2

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma, as kernels take them."""
        return self.path.alpha, self.path.sigma


class Batch(NamedTuple):
    """A pass's own result and the UNet's next batch."""

    # [B,C,h,w] float32: z at t_next, or the noise eps_o that renderings are linked by.
    value: Tensor
    # [R*B,C,h,w] in the UNet's dtype; of a linked pair [2*R*B,C,h,w], the rows of t_delta first.
    rows: Tensor
    # Level of each row, int64.
    levels: Tensor


class Gradient(NamedTuple):
    """What `GuidanceOutput` names the same."""

    # weight (eps_t - what it is compared with), and x - grad: [B,C,h,w] float32.
    grad: Tensor
    target: Tensor
    # 0.5 sum grad^2 / B and the norm over all elements, 0-dim float32.
    loss: Tensor
    grad_norm: Tensor
    # Whether grad is free of NaN and infinity, 0-dim bool. Bad elements stay as they are.
    finite: Tensor

    @classmethod
    def of(cls, grad: Tensor, x: Tensor) -> Gradient:
        """Of a gradient alone, in torch."""
        loss = 0.5 * grad.square().sum() / len(x)
        return cls(grad, x - grad, loss, grad.norm(), grad.isfinite().all())


def combine(eps: Tensor, guide: Guide, scale: float) -> Tensor:
    """Guided prediction [B,C,h,w] of a stack eps [R*B,C,h,w], as `guidance.combine`."""
    if not _on_kernels(eps):
        return _combine(eps, guide, scale)
    eps, weights, _ = _stack("combine", eps, guide)
    return _kernels().combine_fwd(eps, weights, scale, _mode(guide, scale), guide.rows)


def step(
    eps: Tensor, guide: Guide, scale: float, z: Tensor, t: Tensor, t_next: Tensor, form: Form
) -> Batch:
    """Combine, then DDIM with eta = 0 (Song et al. 2021) from t to t_next.

    z' = alpha' (z - sigma eps) / alpha + sigma' eps; items with t = t_next keep z.

    Args:
        eps: the UNet's stack for z, [R*B,C,h,w].
        z: [B,C,h,w] float32 at levels t.
        t, t_next: int64 [B], on the device of z.
        form: of the UNet's next batch.
    Raises:
        TypeError, ValueError: tensors that do not fit together.
    """
    if not _on_kernels(eps):
        return step_reference(eps, guide, scale, z, t, t_next, form)
    eps, weights, n_items = _stack("step", eps, guide)
    z = _item("step: z", z, eps, n_items)
    _check_levels("step", z, form.path, t, t_next)
    mode = _mode(guide, scale)
    return Batch(
        *_kernels().step_fwd(
            eps, weights, scale, mode, guide.rows, z, t, t_next, *form.tables, form.dtype
        )
    )


def state(
    states: Tensor,
    predictions: Tensor,
    slot: Tensor,
    slot_eps: Tensor,
    t: Tensor,
    t_next: Tensor,
    form: Form,
) -> Batch:
    """The DDIM step of `step` from tables of trajectory states and of guided predictions.

    Args:
        states, predictions: [S,C,h,w] and [P,C,h,w], any number of slots.
        slot, slot_eps: int64 [B], each item's slots in the two (not checked on the device).
        t: level of those slots, int64 [B]; where it equals t_next, the state itself is the result.
    """
    if not _on_kernels(states):
        return state_reference(states, predictions, slot, slot_eps, t, t_next, form)
    if states.ndim != 4 or predictions.shape[1:] != states.shape[1:] or slot.shape != t.shape:
        raise ValueError(
            "state: expected states and predictions [S,C,h,w] and slot [B], got "
            f"{list(states.shape)}, {list(predictions.shape)} and {list(slot.shape)}"
        )
    _check_levels("state", states, form.path, slot, slot_eps, t, t_next, n_items=len(t))
    return Batch(
        *_kernels().state_fwd(
            states.contiguous(),
            predictions.contiguous(),
            slot,
            slot_eps,
            t,
            t_next,
            *form.tables,
            form.rows,
            form.dtype,
        )
    )


def link(
    eps: Tensor,
    guide: Guide,
    scale: float,
    x: Tensor,
    t: Tensor,
    t_delta: Tensor,
    form: Form,
    mirrored: Tensor | None = None,
    pair: bool = True,
) -> Batch:
    """Combine to the trajectory's noise eps_o, and put renderings on it (mathematics.md 3.3).

    x_delta = alpha_delta x + sigma_delta eps_o and x_t = alpha_t x + sigma_t eps_o.

    Args:
        eps: the UNet's stack for the trajectory at t_delta, [R*B,C,h,w].
        x: renderings [B,C,h,w] float32.
        t, t_delta: int64 [B], on the device of x.
        mirrored: bool [B], items that take eps_o flipped left to right, or None.
        pair: rows of x at both levels; else of x_t alone, where nothing is asked about t_delta or
            t = t_delta for every item (deviations.md Q8).
    """
    if not _on_kernels(eps):
        return link_reference(eps, guide, scale, x, t, t_delta, form, mirrored, pair)
    eps, weights, n_items = _stack("link", eps, guide)
    x = _item("link: x", x, eps, n_items)
    _check_levels("link", x, form.path, t, t_delta)
    _check_mirrored("link", mirrored, n_items)
    mode = _mode(guide, scale)
    rows = guide.rows
    return Batch(
        *_kernels().link_fwd(
            eps, weights, scale, mode, rows, x, t, t_delta, *form.tables, mirrored, form.dtype, pair
        )
    )


def link_table(
    predictions: Tensor,
    slot: Tensor,
    slot_next: Tensor,
    mix: Tensor,
    x: Tensor,
    t: Tensor,
    t_delta: Tensor,
    form: Form,
    mirrored: Tensor | None = None,
    pair: bool = True,
) -> Batch:
    """`link` with eps_o from a table: eps = p[slot], eps_o = eps + mix (p[slot_next] - eps).

    Args:
        predictions: p, guided predictions [P,C,h,w] float32, any number of slots.
        slot, slot_next: int64 [B], 0 to P-1 (not checked on the device).
        mix: float32 [B], 0 to 1.
    """
    if not _on_kernels(predictions):
        where = (predictions, slot, slot_next, mix)
        return link_table_reference(*where, x, t, t_delta, form, mirrored, pair)
    n_items = len(t)
    x = _item("link_table: x", x, predictions, n_items)
    _check_levels("link_table", x, form.path, t, t_delta, slot, slot_next)
    _check_mirrored("link_table", mirrored, n_items)
    _check_number("link_table: mix", mix, x, n_items)
    return Batch(
        *_kernels().link_table_fwd(
            predictions.contiguous(),
            slot,
            slot_next,
            mix,
            form.rows,
            x,
            t,
            t_delta,
            *form.tables,
            mirrored,
            form.dtype,
            pair,
        )
    )


def text(bank: Tensor, first: Tensor, second: Tensor, share: Tensor, dtype: torch.dtype) -> Tensor:
    """Text rows share bank[first] + (1 - share) bank[second]: [N,L,D] in the UNet's dtype.

    Args:
        bank: [V,L,D]; first, second: int64 [N]; share: float32 [N] (`conditions.text.text_mix`).
    """
    if not first.shape == second.shape == share.shape == (len(first),):
        raise ValueError(
            "text: expected first, second and share of one shape [N], got "
            f"{list(first.shape)}, {list(second.shape)} and {list(share.shape)}"
        )
    if not _on_kernels(bank):
        return mixed_rows(bank, first, second, share).to(dtype)
    return _kernels().text_fwd(bank.contiguous(), first, second, share, dtype)


def gradient(
    eps: Tensor,
    guide: Guide,
    scales: tuple[float, float],
    x: Tensor,
    t: Tensor,
    path: NoisePath,
    weighting: str = "sds",
    done: Tensor | None = None,
    eps_o: Tensor | None = None,
    share: Tensor | None = None,
) -> Gradient:
    """Combine both levels; their weighted difference with loss and norm (mathematics.md 3.3).

    grad = w (eps_t - (1 - share) eps_delta - share eps_o) with w = sigma_t^2 ("sds") or
    sigma_t / alpha_t ("ddim").

    Args:
        eps: stack of `link`'s rows [2*R*B,C,h,w], or of one level [R*B,C,h,w] where one stack
            serves both: t = t_delta for every item (deviations.md Q8), or eps_delta has no share.
        scales: of eps_delta and of eps_t, 1 and the guidance scale.
        x: renderings [B,C,h,w] float32.
        done: int32 zero, 0-dim, on the device; one for each stream that calls this, kept from call
            to call. Without it a fresh one costs a launch.
        eps_o, share: the trajectory's noise [B,C,h,w] float32 and the share [B] float32 that it has
            of what eps_t is compared with; None for none.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    one_level = eps.shape[0] == guide.rows * x.shape[0]
    if (eps_o is None) != (share is None):
        raise ValueError("gradient: expected both of eps_o and share, or neither")
    if not _on_kernels(eps):
        return gradient_reference(eps, guide, scales, x, t, path, weighting, eps_o, share)
    first, weights, n_items = _stack("gradient", eps if one_level else eps.chunk(2)[0], guide)
    x = _item("gradient: x", x, first, n_items)
    if eps_o is not None and share is not None:
        eps_o = _item("gradient: eps_o", eps_o, eps, n_items)
        _check_number("gradient: share", share, x, n_items)
    _check_levels("gradient", x, path, t)
    if done is None:
        done = torch.zeros((), dtype=torch.int32, device=x.device)
    grad, target, numbers, finite = _kernels().gradient_fwd(
        eps.contiguous(),
        weights,
        scales,
        (_mode(guide, scales[0]), _mode(guide, scales[1])),
        guide.rows,
        x,
        t,
        path.alpha,
        path.sigma,
        WEIGHTINGS.index(weighting),
        done,
        eps_o,
        share,
    )
    return Gradient(grad, target, numbers[0], numbers[1], finite)


def step_reference(
    eps: Tensor, guide: Guide, scale: float, z: Tensor, t: Tensor, t_next: Tensor, form: Form
) -> Batch:
    """`step` in torch, any device; float64 is kept, as in all references."""
    return _moved(z, _combine(eps, guide, scale), t, t_next, form)


def state_reference(
    states: Tensor,
    predictions: Tensor,
    slot: Tensor,
    slot_eps: Tensor,
    t: Tensor,
    t_next: Tensor,
    form: Form,
) -> Batch:
    """`state` in torch, any device."""
    z, eps = _at_least_float(states[slot]), _at_least_float(predictions[slot_eps])
    return _moved(z, eps, t, t_next, form)


def link_reference(
    eps: Tensor,
    guide: Guide,
    scale: float,
    x: Tensor,
    t: Tensor,
    t_delta: Tensor,
    form: Form,
    mirrored: Tensor | None = None,
    pair: bool = True,
) -> Batch:
    """`link` in torch, any device."""
    eps_o = _combine(eps, guide, scale)
    return _linked(eps_o, x, t, t_delta, form, mirrored, pair)


def link_table_reference(
    predictions: Tensor,
    slot: Tensor,
    slot_next: Tensor,
    mix: Tensor,
    x: Tensor,
    t: Tensor,
    t_delta: Tensor,
    form: Form,
    mirrored: Tensor | None = None,
    pair: bool = True,
) -> Batch:
    """`link_table` in torch, any device."""
    eps = _at_least_float(predictions[slot])
    eps_o = eps + mix.view(-1, 1, 1, 1) * (predictions[slot_next] - eps)
    return _linked(eps_o, x, t, t_delta, form, mirrored, pair)


def gradient_reference(
    eps: Tensor,
    guide: Guide,
    scales: tuple[float, float],
    x: Tensor,
    t: Tensor,
    path: NoisePath,
    weighting: str = "sds",
    eps_o: Tensor | None = None,
    share: Tensor | None = None,
) -> Gradient:
    """`gradient` in torch, any device."""
    one_level = eps.shape[0] == guide.rows * x.shape[0]
    eps_delta, eps_t = (eps, eps) if one_level else eps.chunk(2)
    beside = _combine(eps_delta, guide, scales[0])
    if eps_o is not None and share is not None:
        share = share.view(-1, 1, 1, 1)
        beside = (1 - share) * beside + share * eps_o
    grad = path.weight(t, weighting) * (_combine(eps_t, guide, scales[1]) - beside)
    return Gradient.of(grad, x)


def _combine(eps: Tensor, guide: Guide, scale: float) -> Tensor:
    return combine_reference(
        eps,
        guide.weights,
        scale,
        standard_cfg=guide.standard_cfg,
        pure_conditional=guide.pure_conditional,
    )


def _moved(z: Tensor, eps: Tensor, t: Tensor, t_next: Tensor, form: Form) -> Batch:
    z = form.path.step(z, eps, t, t_next)
    rows = expand_rows(z, form.perp_neg).to(form.dtype)
    return Batch(z, rows, expand_rows(t_next, form.perp_neg))


def _linked(
    eps_o: Tensor,
    x: Tensor,
    t: Tensor,
    t_delta: Tensor,
    form: Form,
    mirrored: Tensor | None,
    pair: bool,
) -> Batch:
    if mirrored is not None:
        eps_o = torch.where(mirrored.view(-1, 1, 1, 1), eps_o.flip(-1), eps_o)
    path, perp_neg = form.path, form.perp_neg
    rows = expand_rows(path.noisy(x, eps_o, t), perp_neg)
    levels = expand_rows(t, perp_neg)
    if pair:
        rows = torch.cat([expand_rows(path.noisy(x, eps_o, t_delta), perp_neg), rows])
        levels = torch.cat([expand_rows(t_delta, perp_neg), levels])
    return Batch(eps_o, rows.to(form.dtype), levels)


def _at_least_float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _on_kernels(tensor: Tensor) -> bool:
    return backend(tensor) == "triton"


def _kernels():
    # Imported when first needed: Triton takes a second and is absent on many machines.
    from dsd_fast.kernels import guidance

    return guidance


def _mode(guide: Guide, scale: float) -> int:
    kernels = _kernels()
    if guide.pure_conditional and scale == 1.0:
        return kernels.POSITIVE
    if guide.weights is not None:
        return kernels.PERP_NEG
    return kernels.STANDARD if guide.standard_cfg else kernels.PLAIN


def _stack(op: str, eps: Tensor, guide: Guide) -> tuple[Tensor, Tensor | None, int]:
    """(contiguous stack, float32 weights or None, B), or ValueError."""
    n_items = eps.shape[0] // guide.rows
    if eps.ndim != 4 or n_items == 0 or n_items * guide.rows != eps.shape[0]:
        raise ValueError(f"{op}: expected eps [{guide.rows}B,C,h,w], got {list(eps.shape)}")
    weights = guide.weights
    if weights is not None:
        if weights.shape != (n_items, 2) or weights.device != eps.device:
            raise ValueError(
                f"{op}: expected weights [{n_items},2] on {eps.device}, "
                f"got {list(weights.shape)} on {weights.device}"
            )
        weights = weights.float().contiguous()
    return eps.contiguous(), weights, n_items


def _item(name: str, tensor: Tensor, eps: Tensor, n_items: int) -> Tensor:
    expected = (n_items, *eps.shape[1:])
    if tensor.shape != expected or tensor.dtype != torch.float32 or tensor.device != eps.device:
        raise ValueError(
            f"{name}: expected float32 {list(expected)} on {eps.device}, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    return tensor.detach().contiguous()


def _check_number(name: str, value: Tensor, like: Tensor, n_items: int) -> None:
    if value.dtype != torch.float32 or value.shape != (n_items,) or value.device != like.device:
        raise ValueError(
            f"{name}: expected float32 [{n_items}] on {like.device}, "
            f"got {value.dtype} {list(value.shape)} on {value.device}"
        )


def _check_mirrored(op: str, mirrored: Tensor | None, n_items: int) -> None:
    if mirrored is not None and (mirrored.dtype != torch.bool or mirrored.shape != (n_items,)):
        raise ValueError(
            f"{op}: expected mirrored bool [{n_items}], got {mirrored.dtype} {list(mirrored.shape)}"
        )


def _check_levels(
    op: str, like: Tensor, path: NoisePath, *levels: Tensor, n_items: int | None = None
) -> None:
    n_items = like.shape[0] if n_items is None else n_items
    for table in (path.alpha, path.sigma):
        if table.dtype != torch.float32 or table.device != like.device:
            raise ValueError(
                f"{op}: expected a noise path of float32 on {like.device}, "
                f"got {table.dtype} on {table.device}"
            )
    for level in levels:
        if (
            level.shape != (n_items,)
            or level.dtype != torch.int64
            or level.device != like.device
            or not level.is_contiguous()
        ):
            raise ValueError(
                f"{op}: expected contiguous int64 [{n_items}] on {like.device}, "
                f"got {level.dtype} {list(level.shape)} on {level.device}"
            )
