"""One pre-norm Transformer stack for decoder, text encoder and towers; its choices are its `Config`.

x = x + attention(norm(x));  x = x + mlp(norm(x));  norm at the end        (x = x + norm(attention(norm(x))) with `post_norm`)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metalm.errors import ConfigError
from metalm.nn.attention import KVCache, LayerMasks, Mask, attend
from metalm.nn.positions import LearnedPositions, RelativeBias, SinusoidalPositions, rotary_tables, rotate, sinusoids


@dataclass
class TransformerConfig:
    """Shape and choices of a stack.

    `kv_heads`, `ffn` and `head_width` of 0 mean `heads`, 4 x `width` and `width` / `heads`, `norm_eps` 0 1e-5 (layer) or 1e-6
    (rms). `qkv_bias` is whether queries, keys and values have biases, where that differs from `bias`; `qk_norm` normalises
    queries and keys, head by head, before their rotation. `rotary_scaling` is Llama 3's, as its configuration has it.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int = 0
    ffn: int = 0
    head_width: int = 0
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 0.0
    mlp: Literal["gelu", "gelu_tanh", "relu", "swiglu", "geglu_tanh"] = "gelu"
    positions: Literal["sinusoidal", "learned", "rotary", "none"] = "sinusoidal"
    rotary_base: float = 10000.0
    rotary_scaling: dict[str, float] | None = None
    relative_bias: bool = False
    max_positions: int = 1024
    bias: bool = True
    qkv_bias: bool | None = None
    qk_norm: bool = False
    dropout: float = 0.0
    activation_checkpointing: bool = False

    # What a `TextStackConfig` alone may choose.
    post_norm: ClassVar[bool] = False
    attention_softcap: ClassVar[float] = 0.0
    scale_width: ClassVar[int] = 0
    local_rotary_base: ClassVar[float] = 0.0

    @property
    def windows(self) -> list[int]:
        """How far each layer sees, 0: all."""
        return [0] * self.layers

    def __post_init__(self):
        self.kv_heads = self.kv_heads or self.heads
        self.ffn = self.ffn or 4 * self.width
        self.norm_eps = self.norm_eps or (1e-6 if self.norm == "rms" else 1e-5)
        for name in ("layers", "width", "heads", "kv_heads", "ffn", "max_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if not self.head_width and self.width % self.heads:
            raise ConfigError(f"width {self.width} is not divisible by heads {self.heads}, and head_width is not set")
        self.head_width = self.head_width or self.width // self.heads
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}")
        if self.positions == "rotary" and self.head_width % 2:
            raise ConfigError(f"rotary positions need an even head width, not width / heads = {self.head_width}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout {self.dropout} is not in [0, 1)")


@dataclass(kw_only=True)
class TextStackConfig(TransformerConfig):
    """A stack that reads text: what language models choose beyond the rest.

    A position sees those less than `window` positions away (0: all), or as far as a list says, layer by layer; a list that is
    shorter than the layers repeats: [4096, 0]. Layers with a window rotate by `local_rotary_base`, unscaled, where that is set.
    `post_norm` normalises what attention and MLP give, too. Attention's scores are divided by the root of `scale_width` (0:
    `head_width`), and `attention_softcap` s makes x of them into s tanh(x / s), at the cost of the fused kernel. Source: Gemma
    2 and 3 (arXiv 2408.00118, 2503.19786).
    """

    window: int | list[int] = 0
    local_rotary_base: float = 0.0
    post_norm: bool = False
    attention_softcap: float = 0.0
    scale_width: int = 0

    def __post_init__(self):
        super().__post_init__()
        windows = self.window if isinstance(self.window, list) else [self.window]
        if not windows or min(windows) < 0:
            raise ConfigError(f"window is {self.window}, it must be positive, or 0 for none, or a list of such")
        if len(windows) > self.layers:
            raise ConfigError(f"window lists {len(windows)} layers, there are {self.layers}")
        windows = [windows[layer % len(windows)] for layer in range(self.layers)]
        self.window = windows if len(set(windows)) > 1 else windows[0]
        for name in ("attention_softcap", "scale_width", "local_rotary_base"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be positive, or 0 for none")
        if self.local_rotary_base and (self.positions != "rotary" or not self.window):
            raise ConfigError("local_rotary_base is for rotary positions, in layers with a window: set positions and window")

    @property
    def windows(self) -> list[int]:
        return self.window if isinstance(self.window, list) else [self.window] * self.layers


def make_norm(config: TransformerConfig) -> nn.Module:
    return (RMSNorm if config.norm == "rms" else nn.LayerNorm)(config.width, eps=config.norm_eps)


def make_dropout(config: TransformerConfig) -> nn.Module:
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()


class RMSNorm(nn.RMSNorm):
    """torch's, which on CPU is eight kernels; without gradients it is one, since the layer norm of [x, -x], whose mean is 0, is
    [x, -x] / rms(x). A compiled one fuses."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        if torch.compiler.is_compiling():
            return F.rms_norm(x, self.normalized_shape, eps=self.eps) * self.weight
        (D,) = self.normalized_shape
        mirrored = F.layer_norm(torch.cat([x, -x], dim=-1), (2 * D,), eps=self.eps)
        return mirrored[..., :D] * self.weight


gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu}
GATES = {"swiglu": F.silu, "geglu_tanh": gelu_tanh}


class MLP(nn.Module):
    """Two linear maps around GELU or ReLU, or gated by SiLU or GELU with gate and up in one product."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.kind = config.mlp
        self.up = nn.Linear(config.width, config.ffn * (2 if self.kind in GATES else 1), bias=config.bias)
        self.down = nn.Linear(config.ffn, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind in GATES:
            gate, up = x.chunk(2, dim=-1)
            return self.down(GATES[self.kind](gate) * up)
        return self.down(ACTIVATIONS[self.kind](x))


class Attends(Protocol):
    """A way of attending other than one mask for all queries: what the queries take from the keys' values, [B, H, T, D]."""

    def attend(self, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, dropout: float, softcap: float) -> Tensor: ...


class Section(NamedTuple):
    """Queries with a mask of their own: `mask.queries` of them from `mask.first_query` on, over the first `mask.keys` keys."""

    mask: Mask
    bias_BHQK: Tensor | None = None

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, dropout: float, softcap: float) -> Tensor:
        first, keys = self.mask.first_query, self.mask.keys
        q_BHQD = q_BHTD[:, :, first : first + self.mask.queries]
        return attend(q_BHQD, k_BGTD[:, :, :keys], v_BGTD[:, :, :keys], self.mask, self.bias_BHQK, dropout, softcap)


class Sections(NamedTuple):
    """All queries, section by section."""

    sections: tuple[Section, ...]

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, dropout: float, softcap: float) -> Tensor:
        return torch.cat([section.attend(q_BHTD, k_BGTD, v_BGTD, dropout, softcap) for section in self.sections], dim=2)


class Attention(nn.Module):
    """Multi-head self-attention with grouped-query heads and an optional cache: `project`, attend (`forward`), and `out`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_width, self.qk_norm = config.head_width, config.qk_norm
        self.dropout, self.softcap = config.dropout, config.attention_softcap
        self.query_scale = (self.head_width / (config.scale_width or self.head_width)) ** 0.5
        bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_width, bias=bias)
        self.query_norm, self.key_norm = (
            RMSNorm(self.head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        self.out = nn.Linear(self.heads * self.head_width, config.width, bias=config.bias)

    def match_queries_to_keys(self) -> None:
        """Starts every second head with its key's matrix as the query's: they look at what is alike, so that looking things
        up need not be found by chance. After "Mimetic initialization" (arXiv 2305.09828)."""
        with torch.no_grad():
            query, key, _ = self.qkv.weight.split([n * self.head_width for n in (self.heads, self.kv_heads, self.kv_heads)])
            keys = key.view(self.kv_heads, self.head_width, -1).repeat_interleave(self.heads // self.kv_heads, dim=0)
            query.view_as(keys)[::2] = keys[::2]

    def project(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, W], keys and values [B, G, T, W], turned by their positions."""
        B, T, _ = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, -1, self.head_width).transpose(1, 2)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.qk_norm:
            q, k = qk.split([self.heads, self.kv_heads], dim=1)
            qk = torch.cat([self.query_norm(q), self.key_norm(k)], dim=1)
        if rotary is not None:
            qk = rotate(qk, *rotary)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        if self.query_scale != 1:  # `attend` divides by the root of the head's width
            q = q * self.query_scale
        return q, k, v

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask | str | Attends,
        bias_1HQK: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """What the queries find, [B, T, H W]."""
        dtype = q.dtype
        if cache is not None:
            k, v = cache.append(layer, k, v)
            q = q.to(k.dtype)
        dropout = self.dropout if self.training else 0.0
        if isinstance(mask, Mask | str):
            out = attend(q, k, v, mask, bias_1HQK, dropout, self.softcap)
        else:
            out = mask.attend(q, k, v, dropout, self.softcap)
        return out.transpose(1, 2).flatten(2).to(dtype)


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.attention_post_norm, self.mlp_post_norm = (
            make_norm(config) if config.post_norm else nn.Identity() for _ in range(2)
        )
        self.dropout = make_dropout(config)

    def forward(
        self,
        x_BTD: Tensor,
        mask: Mask | str | Attends,
        rotary: tuple[Tensor, Tensor] | None = None,
        bias_1HQK: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        places_N: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D], or [N, D] of the `places_N` of [B x T] alone: what comes after attention is left out for the others."""
        q, k, v = self.before(x_BTD, rotary)
        attended_BTD = self.attention(q, k, v, mask, bias_1HQK, cache, layer)
        if places_N is not None:
            x_BTD, attended_BTD = (x.flatten(0, 1).index_select(0, places_N) for x in (x_BTD, attended_BTD))
        return self.after(x_BTD, attended_BTD)

    def before(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before attention; with `after` it is compiled where a run asks for that (`metalm.training.compiling`)."""
        return self.attention.project(self.attention_norm(x_BTD), rotary)

    def after(self, x_BTD: Tensor, attended_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention_post_norm(self.attention.out(attended_BTD)))
        return x_BTD + self.dropout(self.mlp_post_norm(self.mlp(self.mlp_norm(x_BTD))))


class Transformer(nn.Module):
    """Positions, blocks and the final norm; embeddings and heads belong to the owner."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.positions = make_positions(config)
        self.relative_bias = RelativeBias(config.heads) if config.relative_bias else None
        self.dropout = make_dropout(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.apply(init_weights)
        start_blocks(self.blocks)

    def forward(
        self,
        x_BTD: Tensor,
        position_BT: Tensor,
        mask: Mask | LayerMasks | str | Attends = "full",
        cache: KVCache | None = None,
        places_N: Tensor | None = None,
    ) -> Tensor:
        """States [B, T, D] from input vectors [B, T, D] and position ids int64 [B, T].

        Args:
            mask: one for all queries, or for those of each layer, whose relative bias is that of their columns; or another
                way of attending, which brings its masks and its relative bias.
            places_N: places of [B x T] whose states [N, D] alone are wanted, which spares the last layer the others.
        """
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(position_BT).to(x_BTD.dtype)
        x_BTD = self.dropout(x_BTD)
        masks = mask.masks if isinstance(mask, LayerMasks) else (mask,) * len(self.blocks)
        local = [bool(window and self.config.local_rotary_base) for window in self.config.windows]
        rotary, bias = {kind: self.rotary(position_BT, kind) for kind in set(local)}, None
        if self.relative_bias is not None and isinstance(mask, Mask | LayerMasks | str):
            index_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
            bias = self.relative_bias(index_T, index_T)
        for layer, block in enumerate(self.blocks):
            wanted_N = places_N if layer == len(self.blocks) - 1 else None
            inputs = x_BTD, masks[layer], rotary[local[layer]], bias, cache, layer, wanted_N
            if self.config.activation_checkpointing and self.training:
                x_BTD = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x_BTD = block(*inputs)
        if cache is not None:
            cache.advance(position_BT.shape[1])
        return self.norm(x_BTD)

    def rotary(self, position_BT: Tensor, local: bool = False) -> tuple[Tensor, Tensor] | None:
        """The tables that turn queries and keys at these positions; None where positions are not rotary.

        Args:
            local: those of layers that rotate by `local_rotary_base`.
        """
        config = self.config
        if config.positions != "rotary":
            return None
        if local:
            return rotary_tables(position_BT, config.head_width, config.local_rotary_base)
        return rotary_tables(position_BT, config.head_width, config.rotary_base, config.rotary_scaling)


def make_positions(config: TransformerConfig) -> nn.Module | None:
    if config.positions == "sinusoidal":
        return SinusoidalPositions(config.max_positions, config.width)
    if config.positions == "learned":
        return LearnedPositions(config.max_positions, config.width)
    return None


def init_weights(module: nn.Module) -> None:
    """Normal with variance 1 / fan-in for matrices, 1 / width for embeddings, zero for biases: the same for any width.

    Learned positions start as sinusoids of the embeddings' size, for which attending to a neighbour is one rotation and
    need not be learned place by place.
    """
    if isinstance(module, LearnedPositions):
        positions, width = module.weight.shape
        with torch.no_grad():
            module.weight.copy_(sinusoids(positions, width) * (2 / width) ** 0.5)
    elif isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
        fan_in = module.weight[0].numel()  # an embedding's row is its width
        nn.init.normal_(module.weight, std=fan_in**-0.5)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def start_blocks(blocks: nn.ModuleList) -> None:
    """What blocks with an `attention` start with beyond `init_weights`.

    The matrices that write to the residual stream are divided by sqrt(2 x layers), so depth keeps its variance (GPT-2's).
    """
    for block in blocks:
        block.attention.match_queries_to_keys()
    for name, parameter in blocks.named_parameters():
        if name.endswith(("out.weight", "down.weight")):
            with torch.no_grad():
                parameter.div_((2 * len(blocks)) ** 0.5)
