"""The judge: a head over ImageNet features that says what an image shows, and from which side."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dsd_fast.guidance.conditions.text import direction, wrapped
from dsd_fast.judge.captions import COUNTED_NOUNS, VIEWS
from dsd_fast.judge.features import FEATURE_WIDTH

# Width of each of the judge's two hidden layers.
HIDDEN = 512

# The judge tells views by bins of |azimuth|, whose edges include the boundaries between names, and
# one more for overhead. Neighbouring bins share the target of a view: an azimuth is a quantity.
N_BINS = 12
BIN_DEG = 180 / N_BINS
BLUR_DEG = 12.0


def _bin_centres(device: torch.device | None = None) -> torch.Tensor:
    """[N_BINS] float32, degrees."""
    return (torch.arange(N_BINS, device=device) + 0.5) * BIN_DEG


def bin_targets(view: torch.Tensor, azimuth_deg: torch.Tensor) -> torch.Tensor:
    """Target probabilities [B,N_BINS+1] float32 of views [B] seen from azimuths [B], any range."""
    distance = wrapped(azimuth_deg).abs()[:, None] - _bin_centres(view.device)
    around = torch.softmax(-0.5 * (distance / BLUR_DEG).square(), 1)
    overhead = (view == VIEWS.index("overhead"))[:, None]
    return torch.cat([around * ~overhead, overhead.float()], 1)


class Judge(nn.Module):
    """A noun head and a view head over features [B,FEATURE_WIDTH] float32.

    The view is judged for a noun that is known: the one shown, or asked for. It scales and shifts
    the hidden layer, since what tells a front from a back is the noun's own.
    """

    def __init__(self, n_nouns: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURE_WIDTH)
        self.noun_hidden = nn.Linear(FEATURE_WIDTH, HIDDEN)
        self.noun = nn.Linear(HIDDEN, n_nouns)
        self.view_hidden = nn.Linear(FEATURE_WIDTH, HIDDEN)
        self.scale = nn.Embedding(n_nouns, HIDDEN)
        self.shift = nn.Embedding(n_nouns, HIDDEN)
        self.bins = nn.Linear(HIDDEN, N_BINS + 1)
        nn.init.zeros_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)
        bin_view = torch.cat(
            [
                direction(torch.zeros(N_BINS), _bin_centres()),
                torch.tensor([VIEWS.index("overhead")]),
            ]
        )
        self.register_buffer("view_of_bin", F.one_hot(bin_view, len(VIEWS)).float())

    def forward(
        self, features: torch.Tensor, noun: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noun logits [B,n_nouns], and logits [B,N_BINS+1] of the view of `noun` [B] int64."""
        x = self.norm(features)
        h = F.dropout(F.relu(self.noun_hidden(x)), 0.3, self.training)
        v = self.view_hidden(x) * (1 + self.scale(noun)) + self.shift(noun)
        return self.noun(h), self.bins(F.dropout(F.relu(v), 0.3, self.training))

    def say(self, features: torch.Tensor, noun: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest noun, and the likeliest view of `noun`; all [B] int64."""
        nouns, bins = self(features, noun)
        return nouns.argmax(1), (bins.softmax(1) @ self.view_of_bin).argmax(1)


def save_judge(judge: Judge, path: Path) -> None:
    """Write the judge's weights, with the nouns that it knows, as safetensors."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.cpu().contiguous() for name, value in judge.state_dict().items()}
    save_file(state, path, metadata={"nouns": json.dumps(COUNTED_NOUNS)})


def load_judge(path: Path, device: torch.device | str = "cpu") -> Judge:
    """The judge that `save_judge` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a judge's, or was made for other nouns.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of a judge's weights")
    try:
        with safe_open(path, "pt") as file:
            nouns = json.loads((file.metadata() or {}).get("nouns", "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # torch has no tensors of some types and sizes that a damaged header may ask for.
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a safetensors file of a judge: {error}") from error
    if nouns != COUNTED_NOUNS:
        raise ValueError(
            f"{path}: not a judge of the nouns that this version counts; "
            "`python -m dsd_fast.prior evaluate` writes one"
        )
    judge = Judge(len(COUNTED_NOUNS))
    try:
        judge.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: not the weights of a judge: {error}") from error
    return judge.eval().requires_grad_(False).to(device)
