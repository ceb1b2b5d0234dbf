"""The UNet of MVDream (Shi et al. 2023, arXiv 2308.16512): four views of one object at once.

Stable Diffusion's UNet with two changes. Every view has a camera, sixteen numbers that a small
network adds to the embedding of the noise level; and self-attention runs over the tokens of an
object's views together, so that they agree. Cross-attention and convolutions see one view each.

Module names are those of the weights (`input_blocks`, `middle_block`, `output_blocks`), in which
MVDream is distributed, so a state dict fits as it is.

The embedded multi-view prior is the same network with three settings more, which are diffusers':
`use_scale_shift_norm`, where the embedding scales and shifts what a block has normalised;
`norm_num_groups`; and `addition_embed_type` "text", the text's pooled embedding beside the level's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsd_fast.diffusion import int8
from dsd_fast.diffusion.model_files import FLOATS, brief, headers

CLASS_NAME = "MultiViewUNetModel"
# Views of one object; the distributed models are trained on so many, and no configuration says so.
N_VIEWS = 4
# A camera-to-world matrix.
CAMERA_NUMBERS = 16

# Of group norms, and of the pooled text's attention, where a configuration does not say.
_NORM_GROUPS = 32
_POOL_HEADS = 64
_BLOCK_EPS, _TRANSFORMER_EPS = 1e-5, 1e-6
_MAX_PERIOD = 10000.0
_FEED_FORWARD = 4

_REQUIRED = (
    "in_channels",
    "out_channels",
    "model_channels",
    "num_res_blocks",
    "attention_resolutions",
    "channel_mult",
    "context_dim",
)
# Settings that change the network, and their only value here (or none at all).
_FIXED: dict[str, tuple[Any, ...]] = {
    "dims": (2,),
    "conv_resample": (True,),
    "num_classes": (None,),
    "adm_in_channels": (None,),
    "n_embed": (None,),
    "use_scale_shift_norm": (False, True),
    "addition_embed_type": (None, "text"),
    "resblock_updown": (False,),
    "num_attention_blocks": (None,),
    "use_linear_in_transformer": (True,),
    "use_spatial_transformer": (True,),
    "camera_dim": (CAMERA_NUMBERS,),
}


def check_config(config: Mapping[str, Any], where: str = "unet/config.json") -> None:
    """Raise ValueError, naming `where`, for a configuration that `MultiViewUNet` cannot be."""
    missing = [name for name in _REQUIRED if config.get(name) is None]
    if missing:
        raise ValueError(
            f"{where}: a {CLASS_NAME} needs {', '.join(_REQUIRED)}; {', '.join(missing)} missing"
        )
    if config.get("ip_dim"):
        raise ValueError(
            f"{where}: ip_dim = {config['ip_dim']!r}: an ImageDream model, which needs a picture "
            "beside the prompt, is not supported; expected MVDream (ip_dim 0)"
        )
    if config.get("camera_dim") is None:
        raise ValueError(
            f"{where}: camera_dim is not set; expected {CAMERA_NUMBERS}, a model that is told "
            "where its cameras are"
        )
    for name, known in _FIXED.items():
        if config.get(name, known[0]) not in known:
            raise ValueError(
                f"{where}: {name} = {config[name]!r} is not supported, expected {known[0]!r}"
            )
    depth = config.get("transformer_depth", 1)
    if not isinstance(depth, int) or depth < 1:
        raise ValueError(f"{where}: transformer_depth must be a positive integer, got {depth!r}")
    multipliers, blocks = config["channel_mult"], config["num_res_blocks"]
    if not isinstance(blocks, int) and len(blocks) != len(multipliers):
        raise ValueError(
            f"{where}: num_res_blocks must be one number or {len(multipliers)}, one for each of "
            f"channel_mult, got {blocks!r}"
        )
    heads, width = config.get("num_heads", -1), config.get("num_head_channels", -1)
    if heads == -1 and width == -1:
        raise ValueError(f"{where}: expected num_heads or num_head_channels, got neither")
    groups = config.get("norm_num_groups", _NORM_GROUPS)
    for name, value in (
        ("norm_num_groups", groups),
        ("addition_embed_type_num_heads", config.get("addition_embed_type_num_heads", _POOL_HEADS)),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {name} must be a positive integer, got {value!r:.80}")
    if config.get("addition_embed_type") == "text" and (
        config["context_dim"] % config.get("addition_embed_type_num_heads", _POOL_HEADS)
    ):
        raise ValueError(
            f"{where}: context_dim = {config['context_dim']} is not a whole number of "
            f"{config.get('addition_embed_type_num_heads', _POOL_HEADS)} heads "
            "(addition_embed_type_num_heads)"
        )
    for channels in {config["model_channels"] * m for m in (1, *multipliers)}:
        if channels % groups:
            raise ValueError(
                f"{where}: every level needs a multiple of {groups} channels for its group "
                f"norms, got {channels} (model_channels times channel_mult)"
            )
    attended = [m for i, m in enumerate(multipliers) if 2**i in config["attention_resolutions"]]
    for channels in {config["model_channels"] * m for m in (*attended, multipliers[-1])}:
        if channels % (width if width != -1 else heads):
            raise ValueError(f"{where}: {channels} channels are not a whole number of heads")


class MultiViewUNet(nn.Module):
    """See the module's text. Rows of a batch are [views of object 0 | views of object 1 | ...].

    Args:
        config: the content of the model's unet/config.json.
    Raises:
        ValueError: a configuration that is not supported (`check_config`).
    """

    n_views = N_VIEWS

    def __init__(self, config: Mapping[str, Any]):
        check_config(config)
        super().__init__()
        self.config = dict(config)
        base = config["model_channels"]
        multipliers = config["channel_mult"]
        n_blocks = config["num_res_blocks"]
        n_blocks = [n_blocks] * len(multipliers) if isinstance(n_blocks, int) else list(n_blocks)
        attended = set(config["attention_resolutions"])
        embedding = 4 * base
        groups = config.get("norm_num_groups", _NORM_GROUPS)
        scale_shift = bool(config.get("use_scale_shift_norm"))

        def residual(channels_in: int, channels: int) -> _Residual:
            return _Residual(channels_in, channels, embedding, groups, scale_shift)

        def attention(channels: int) -> _SpatialTransformer:
            width = config.get("num_head_channels", -1)
            heads = channels // width if width != -1 else config["num_heads"]
            depth = config.get("transformer_depth", 1)
            return _SpatialTransformer(channels, heads, config["context_dim"], depth, groups)

        self._base = base
        self.time_embed = _embedder(base, embedding)
        self.camera_embed = _embedder(CAMERA_NUMBERS, embedding)
        self.text_embed = None
        if config.get("addition_embed_type") == "text":
            pool_heads = config.get("addition_embed_type_num_heads", _POOL_HEADS)
            self.text_embed = _PooledText(config["context_dim"], embedding, pool_heads)
        first = nn.Conv2d(config["in_channels"], base, 3, padding=1)
        self.input_blocks = nn.ModuleList([_Block(first)])
        channels, kept, factor = base, [base], 1
        for level, multiplier in enumerate(multipliers):
            for _ in range(n_blocks[level]):
                layers: list[nn.Module] = [residual(channels, multiplier * base)]
                channels = multiplier * base
                if factor in attended:
                    layers.append(attention(channels))
                self.input_blocks.append(_Block(*layers))
                kept.append(channels)
            if level != len(multipliers) - 1:
                self.input_blocks.append(_Block(_Downsample(channels)))
                kept.append(channels)
                factor *= 2
        self.middle_block = _Block(
            residual(channels, channels), attention(channels), residual(channels, channels)
        )
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for i in range(n_blocks[level] + 1):
                layers = [residual(channels + kept.pop(), multiplier * base)]
                channels = multiplier * base
                if factor in attended:
                    layers.append(attention(channels))
                if level and i == n_blocks[level]:
                    layers.append(_Upsample(channels))
                    factor //= 2
                self.output_blocks.append(_Block(*layers))
        self.out = nn.Sequential(
            nn.GroupNorm(groups, channels, _BLOCK_EPS),
            nn.SiLU(),
            nn.Conv2d(channels, config["out_channels"], 3, padding=1),
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.out.parameters()).dtype

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        camera: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Noise predictions of views, called as diffusers' UNet2DConditionModel with cameras.

        Args:
            latents: [4G,C,h,w] in the weights' dtype, h and w multiples of the deepest level's.
            t: [4G] int64.
            encoder_hidden_states: text [4G,L,D], in the weights' dtype.
            camera: [4G,16] (`cameras.camera_condition`), in the weights' dtype.
            return_dict: of no effect.
        Returns:
            a tuple of [4G,C,h,w].
        Raises:
            ValueError: rows that are no whole number of objects.
        """
        if latents.shape[0] % N_VIEWS:
            raise ValueError(
                f"a multi-view UNet takes {N_VIEWS} rows an object, one a view, got "
                f"{latents.shape[0]} rows"
            )
        level = sinusoids(t, self._base).to(latents.dtype)
        embedding = self.time_embed(level) + self.camera_embed(camera)
        if self.text_embed is not None:
            embedding = embedding + self.text_embed(encoder_hidden_states)
        x, kept = latents, []
        for block in self.input_blocks:
            x = block(x, embedding, encoder_hidden_states)
            kept.append(x)
        x = self.middle_block(x, embedding, encoder_hidden_states)
        for block in self.output_blocks:
            x = block(torch.cat([x, kept.pop()], dim=1), embedding, encoder_hidden_states)
        return (self.out(x),)


def load_multiview_unet(
    config: Mapping[str, Any], files: Sequence[Path], dtype: torch.dtype
) -> MultiViewUNet:
    """The UNet of a folder: unet/config.json and its safetensors files, on the CPU.

    Raises:
        ValueError: a configuration that is not supported, files that cannot be read, or weights
            that are not this network's.
    """
    from safetensors.torch import load_file

    folder = files[0].parent
    is_int8 = any(f".{int8.VARIANT}." in file.name for file in files)
    try:
        shapes = headers(files, FLOATS | {"I8"} if is_int8 else FLOATS)
    except ValueError as error:
        raise ValueError(f"cannot read {error}") from error
    check_config(config, str(folder / "config.json"))
    _refuse_layers(config, folder / "config.json", shapes)
    try:
        with torch.device("meta"):
            unet = MultiViewUNet(config)
    except (RuntimeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no UNet: {brief(error)}") from error
    wanted = unet.state_dict()
    missing = sorted(set(wanted) - set(shapes))
    if missing:
        raise ValueError(
            f"{folder}: the weights lack {len(missing)} of the tensors that its config.json asks "
            f"for, first {missing[0]!r}"
        )
    scales = {f"{name}.scale" for name in wanted} if is_int8 else set()
    unknown = sorted(set(shapes) - set(wanted) - scales)
    if unknown:
        raise ValueError(
            f"{folder}: the weights hold {len(unknown)} tensors that its config.json does not ask "
            f"for, first {unknown[0]!r}: it describes another network"
        )
    for name, tensor in wanted.items():
        if shapes[name] != tuple(tensor.shape):
            raise ValueError(
                f"{folder}: {name} has shape {list(shapes[name])}, its config.json asks for "
                f"{list(tensor.shape)}"
            )
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    try:
        stored = int8.unpack(stored) if is_int8 else stored
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    weights = {name: tensor.to(dtype) for name, tensor in stored.items()}
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{folder}: {name} is not finite in {dtype}: the weights are damaged")
    unet.load_state_dict(weights, assign=True)
    return unet


def _refuse_layers(config: Mapping[str, Any], file: Path, names: Iterable[str]) -> None:
    """ValueError for far more layers than there are weights for, which nobody waits for."""
    blocks, levels = config["num_res_blocks"], len(config["channel_mult"])
    blocks = blocks * levels if isinstance(blocks, int) else sum(blocks)
    for key, asked, pattern in (
        ("num_res_blocks", blocks + levels, r"input_blocks\.(\d+)\."),
        ("transformer_depth", config.get("transformer_depth", 1), r".*transformer_blocks\.(\d+)\."),
    ):
        found = {m[1] for name in names if (m := re.match(pattern, name))}
        if asked > 2 * max(1, len(found)):
            raise ValueError(
                f"{file}: {key} = {config[key]!r} asks for {asked} layers, the weights hold "
                f"{len(found)}"
            )


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Embedding of noise levels: cosines, then sines, of falling frequencies (Ho et al. 2020).

    Args:
        t: [R], any dtype.
        width: even.
    Returns:
        [R,width] float32.
    """
    half = width // 2
    rising = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(_MAX_PERIOD) / half * rising)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _embedder(width: int, embedding: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))


class _Block(nn.Sequential):
    """Layers, each given what it needs beside the features."""

    def forward(self, x: Tensor, embedding: Tensor, text: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, _Residual):
                x = layer(x, embedding)
            elif isinstance(layer, _SpatialTransformer):
                x = layer(x, text)
            else:
                x = layer(x)
        return x


class _Residual(nn.Module):
    """Two convolutions around the embedding of level and camera, and a way past them."""

    def __init__(
        self, channels_in: int, channels: int, embedding: int, groups: int, scale_shift: bool
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels_in, _BLOCK_EPS),
            nn.SiLU(),
            nn.Conv2d(channels_in, channels, 3, padding=1),
        )
        width = 2 * channels if scale_shift else channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, width))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, channels, _BLOCK_EPS),
            nn.SiLU(),
            nn.Identity(),  # where training has its dropout; it counts in the weights' names
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        same = channels_in == channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        inner, said = self.in_layers(x), self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = said.chunk(2, dim=1)
            norm, *rest = self.out_layers
            inner = norm(inner) * (1 + scale) + shift
            for layer in rest:
                inner = layer(inner)
        else:
            inner = self.out_layers(inner + said)
        return self.skip_connection(x) + inner


class _Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of views, [4G,C,h,w]."""

    def __init__(self, channels: int, heads: int, context: int, depth: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, _TRANSFORMER_EPS)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            _TransformerBlock(channels, heads, context) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [4G,h*w,C]
        for block in self.transformer_blocks:
            tokens = block(tokens, text)
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class _TransformerBlock(nn.Module):
    """Self-attention over an object's views together, cross-attention and feed-forward in each."""

    def __init__(self, channels: int, heads: int, context: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = _Attention(channels, channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = _Attention(channels, context, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = _FeedForward(channels)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        rows, length, channels = tokens.shape
        together = tokens.reshape(rows // N_VIEWS, N_VIEWS * length, channels)
        normed = self.norm1(together)
        tokens = (together + self.attn1(normed, normed)).reshape(rows, length, channels)
        tokens = tokens + self.attn2(self.norm2(tokens), text)
        return tokens + self.ff(self.norm3(tokens))


class _Attention(nn.Module):
    def __init__(self, channels: int, context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,heads,L,d]
            for rows in (self.to_q(tokens), self.to_k(context), self.to_v(context))
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class _PooledText(nn.Module):
    """A text's tokens [R,L,D] as one embedding [R,E], by attention from their mean.

    diffusers' TextTimeEmbedding (DeepFloyd IF), with its names of weights.
    """

    def __init__(self, context: int, embedding: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(context)
        self.pool = _AttentionPooling(context, heads)
        self.proj = nn.Linear(context, embedding)
        self.norm2 = nn.LayerNorm(embedding)

    def forward(self, text: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(text))))


class _AttentionPooling(nn.Module):
    """What the mean of tokens finds among them and itself: [R,L,D] -> [R,D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        mean = tokens.mean(dim=1, keepdim=True) + self.positional_embedding.to(tokens.dtype)
        tokens = torch.cat([mean, tokens], dim=1)
        q, k, v = (
            rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [R,heads,L,d]
            for rows in (self.q_proj(mean), self.k_proj(tokens), self.v_proj(tokens))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)


class _FeedForward(nn.Module):
    """Twice as wide as its gate leaves over (GEGLU, Shazeer 2020)."""

    def __init__(self, channels: int):
        super().__init__()
        inner = _FEED_FORWARD * channels
        # Names of the weights: net.0.proj and net.2.
        self.net = nn.Sequential(_Gated(channels, inner), nn.Identity(), nn.Linear(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Gated(nn.Module):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)
