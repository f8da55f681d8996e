"""A plain vision Transformer of our own, made to be trained from scratch together with the decoder.

    pixels -> patches, normalised -> linear map + position -> pre-norm Transformer -> one state a patch

Pretrained towers, and convolutional networks, which learn to see from fewer pictures, come from timm and open_clip; see
`metalm.encoders.image`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from metalm.encoders.base import Encoder
from metalm.encoders.image import ImageProcessor, MergeConfig
from metalm.errors import ConfigError
from metalm.nn.merging import MergingBlocks, tokens_left
from metalm.nn.transformer import Block, Transformer, TransformerConfig, init_weights


@dataclass
class ImageShape:
    """`image_size` pixels a side in patches of `patch_size`."""

    image_size: int = 224
    patch_size: int = 16

    def __post_init__(self):
        if min(self.patch_size, self.image_size) < 1 or self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(kw_only=True)
class ViTConfig(ImageShape, TransformerConfig, MergeConfig):
    """A stack over (`image_size` / `patch_size`) squared patches, whose positions are learned."""

    positions: Literal["none"] = "none"  # the patches bring their own

    def __post_init__(self):
        TransformerConfig.__post_init__(self)
        ImageShape.__post_init__(self)
        MergeConfig.__post_init__(self)
        if self.relative_bias:
            raise ConfigError("relative_bias is not for patches, which lie in two dimensions")
        if self.max_positions != TransformerConfig.max_positions:
            raise ConfigError("max_positions is not for patches: image_size and patch_size say how many there are")


class PatchEmbedding(nn.Module):
    """Pixels of each patch, normalised, to one vector of the size of a token's embedding, with the patch's position added.

    Raw pixels share a large mean (a white wall), which an optimizer's step multiplies by the number of pixels; normalised
    ones train at the rate of the other matrices. Source: Dual PatchNorm (arXiv 2302.01327), the norm before the map.
    Positions start at random, as far apart as token embeddings: sinusoids of so few places would all look alike.
    """

    def __init__(self, shape: ImageShape, width: int):
        super().__init__()
        self.patch_size = shape.patch_size
        self.norm = nn.LayerNorm(3 * shape.patch_size**2)
        self.map = nn.Linear(3 * shape.patch_size**2, width)
        self.scale = width**-0.5
        self.positions = nn.Embedding(shape.num_patches, width)

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> [N, P, D], patches in reading order."""
        N, C, H, W = pixels_N3HW.shape
        p = self.patch_size
        patches = pixels_N3HW.view(N, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(N, H * W // p**2, C * p * p)
        return self.map(self.norm(patches.to(self.map.weight.dtype) / 255)) * self.scale + self.positions.weight


class MergingViTBlocks(MergingBlocks):
    """Our own blocks, matched by their keys."""

    def attention(self, block: Block, x_NSD: Tensor, bias_NS: Tensor | None) -> tuple[Tensor, Tensor]:
        bias_N11S = None if bias_NS is None else bias_NS[:, None, None]
        q, k, v = block.before(x_NSD, None)
        attended = block.attention.out(block.attention(q, k, v, "full", bias_N11S))
        return x_NSD + block.dropout(attended), k.detach().mean(1)

    def mlp(self, block: Block, x_NSD: Tensor) -> Tensor:
        return x_NSD + block.dropout(block.mlp(block.mlp_norm(x_NSD)))


class ViT(Encoder):
    Config = ViTConfig

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.width = config.width
        num_states = tokens_left(config.num_patches, config.merge, config.layers)
        self.processor = ImageProcessor(config.image_size, num_states, "bicubic")
        self.patches = PatchEmbedding(config, config.width)
        self.patches.apply(init_weights)
        self.transformer = Transformer(config)
        self.merges = config.merge > 0
        if self.merges:
            blocks = self.transformer.blocks
            self.transformer.blocks = MergingViTBlocks(blocks, config.merge, recompute=config.activation_checkpointing)

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        x_NPD = self.patches(pixels_N3HW)
        if self.merges:
            return self.transformer.norm(self.transformer.blocks(self.transformer.dropout(x_NPD)))
        return self.transformer(x_NPD, torch.arange(x_NPD.shape[1], device=x_NPD.device).expand(x_NPD.shape[:2]))

    def layers(self) -> list[nn.Module]:
        *blocks, last = self.transformer.blocks
        return [*blocks, nn.ModuleList([last, self.transformer.norm])]
