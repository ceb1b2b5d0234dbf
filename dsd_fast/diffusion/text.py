"""Prompts: the four views of one prompt, and their embeddings (mathematics.md 2.1)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsd_fast.diffusion.components import quiet
from dsd_fast.diffusion.model_files import brief
from dsd_fast.diffusion.network_loading import load_component

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from dsd_fast.diffusion.model import DiffusionModel

log = logging.getLogger(__name__)

# A word in so many pieces for its letters is spelled, not known. CLIP's own vocabulary cuts rare
# words into two or three; that of a small model knows little more than its captions.
_LETTERS_PER_PIECE_OF_SPELLING = 2.5

# The order is the row order of every [4,L,D] tensor of embeddings.
VIEWS = ("side", "front", "back", "overhead")
_PREFIXES = {
    "side": "side view of ",
    "front": "front view of ",
    "back": "backside view of ",
    "overhead": "overhead view of ",
}


@dataclass(frozen=True)
class PromptEmbeddings:
    """Embeddings of the four views: `text_vd` and `uncond_vd`, both [4,L,D] float32; `poor`
    [1,L,D], where it was asked for, is of what a picture should not be."""

    text_vd: Tensor
    uncond_vd: Tensor
    poor: Tensor | None = None


def view_prompts(
    prompt: str,
    *,
    prefix: bool = False,
    view_dependent: bool = True,
    overrides: Mapping[str, str] | None = None,
) -> list[str]:
    """The prompts of the views side, front, back, overhead, in this order.

    Args:
        prefix: "front view of {prompt}" instead of "{prompt}, front view".
        view_dependent: False gives the bare prompt four times.
        overrides: whole prompts by view name, used as they are.
    Raises:
        ValueError: the prompt is empty, or an override names no view.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; say what to make, for example 'an armchair'")
    overrides = overrides or {}
    unknown = sorted(set(overrides) - set(VIEWS))
    if unknown:
        raise ValueError(f"unknown view {unknown[0]!r}, expected one of {', '.join(VIEWS)}")

    def one(view: str) -> str:
        if view in overrides:
            return overrides[view]
        if not view_dependent:
            return prompt
        return _PREFIXES[view] + prompt if prefix else f"{prompt}, {view} view"

    return [one(view) for view in VIEWS]


def embed_views(
    model: DiffusionModel,
    prompt: str,
    negative: str = "",
    *,
    prefix: bool = False,
    view_dependent: bool = True,
    overrides: Mapping[str, str] | None = None,
    poor: str | None = None,
    release: bool = True,
) -> PromptEmbeddings:
    """Embed the views of a prompt and its negative, the same one for every view.

    Args:
        poor: a prompt of what a picture should not be, or None.
        release: drop the text encoder afterwards; nothing else in a run needs it.
    Raises:
        ValueError: an empty prompt, or one longer than the model reads (with both counts).
    """
    prompts = view_prompts(
        prompt, prefix=prefix, view_dependent=view_dependent, overrides=overrides
    )
    others = [negative] if poor is None else [negative, poor]
    embeddings = model.encode_prompt([*prompts, *others])
    if release:
        model.release_text_encoder()
    text, uncond = embeddings[:4], embeddings[4:5]
    return PromptEmbeddings(
        text,
        uncond.expand(4, -1, -1).contiguous(),
        None if poor is None else embeddings[5:],
    )


class ClipText:
    """CLIPTokenizer and CLIPTextModel in two folders, read at the first prompt.

    Runs in float32 whatever the dtype of the rest: it is used once, and rounding here would stay
    in the embeddings for the whole run.
    """

    def __init__(self, tokenizer: Path, text_encoder: Path, device: torch.device):
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self.device = device
        self._loaded: tuple | None = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [K,L,D] float32 of prompts.

        Raises:
            ValueError: files that are damaged, or a prompt of more tokens than the model reads.
        """
        if self._loaded is None:
            self._loaded = self._load()
        tokenizer, encoder = self._loaded
        limit = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        for prompt in prompts:
            # Both ends of the sequence are counted: the model reads them as tokens.
            count = len(self._tokens(prompt, verbose=False)[0])
            if count > limit:
                raise ValueError(
                    f"the prompt has {count} tokens, the model reads {limit} (view suffix and the "
                    f"two end marks included); shorten it: {prompt[:60]!r}"
                )
        spelled = _spelled_words(tokenizer, prompts)
        if spelled:
            log.warning(
                "the model does not know %s: expect little of what it stands for",
                ", ".join(repr(word) for word in spelled),
            )
        rows = [self._tokens(p, padding="max_length", max_length=limit)[0] for p in prompts]
        largest, known = max(map(max, rows)), encoder.config.vocab_size
        if largest >= known or {len(row) for row in rows} != {limit}:
            raise ValueError(
                f"{self.tokenizer}: it gives token {largest} and rows of "
                f"{len(rows[0])}; the text encoder knows {known} tokens and reads {limit}"
            )
        with torch.autocast(self.device.type, enabled=False):
            embeddings = encoder(torch.tensor(rows, device=self.device))[0].float()
        if not bool(torch.isfinite(embeddings).all()):
            raise ValueError(f"{self.text_encoder}: its embeddings are not finite")
        return embeddings

    def _tokens(self, prompt: str, **options: Any) -> list[list[int]]:
        """Token rows of a prompt; ValueError where the tokenizer's files do not let it work."""
        assert self._loaded is not None
        with self._errors_of_the_tokenizer():
            return self._loaded[0]([prompt], **options)["input_ids"]

    def release(self) -> None:
        self._loaded = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _load(self) -> tuple:
        with quiet():
            from transformers import CLIPTextModel, CLIPTokenizer

            with self._errors_of_the_tokenizer():
                tokenizer = CLIPTokenizer.from_pretrained(self.tokenizer, local_files_only=True)
        encoder = load_component(CLIPTextModel, self.text_encoder, torch.float32)
        return tokenizer, encoder.to(self.device).eval().requires_grad_(False)

    @contextmanager
    def _errors_of_the_tokenizer(self) -> Iterator[None]:
        try:
            yield
        # They are of any type, and panics of its Rust code are no Exceptions.
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                f"{self.tokenizer}: its files are damaged or do not belong together: "
                f"{type(error).__name__}: {brief(error)}"
            ) from error


def _spelled_words(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> list[str]:
    """Words of the prompts that the tokenizer can only spell, in order of appearance."""
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", " ".join(prompts).lower()))
    return [
        word
        for word in words
        if (pieces := len(tokenizer.tokenize(word))) > 2
        and len(word) <= _LETTERS_PER_PIECE_OF_SPELLING * pieces
    ]
