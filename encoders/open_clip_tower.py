"""Image towers of open_clip: their patch states, with the model's own preprocessing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metalm.encoders.base import layers_up_to
from metalm.encoders.image import ImageProcessor, ImageTower, TowerConfig
from metalm.errors import ConfigError
from metalm.nn.merging import MergingBlocks, tokens_left
from metalm.registry import did_you_mean


@dataclass(kw_only=True)
class OpenClipConfig(TowerConfig):
    """`name` as in open_clip, e.g. `ViT-B-32`; `pretrained` a tag (`laion2b_s34b_b79k`), a checkpoint file, or empty.

    As a type, `open_clip:ViT-B-32/laion2b_s34b_b79k` is both. `preprocess` is open_clip's `mean`, `std` and `interpolation` of
    pixels where they are not those of `pretrained`, or without it the model's own: an export keeps them.
    """

    pretrained: str = ""
    preprocess: dict[str, Any] | None = None

    @staticmethod
    def from_spec(spec: str) -> dict:
        name, _, pretrained = spec.partition("/")
        return {"name": name, "pretrained": pretrained}


class OpenClipEncoder(ImageTower):
    """The visual tower of an open_clip model: its patch states before pooling and projection."""

    Config = OpenClipConfig

    def __init__(self, config: OpenClipConfig):
        super().__init__()
        import open_clip

        names = open_clip.list_models()
        if config.name not in names:
            raise ConfigError(f"open_clip has no model {config.name!r}{did_you_mean(config.name, names)}")
        self.name = config.name
        size = {"force_image_size": config.image_size} if config.image_size else {}
        try:
            visual = open_clip.create_model(
                config.name,
                pretrained=config.pretrained or None,
                device=torch.get_default_device(),
                force_preprocess_cfg=config.preprocess,
                **size,
            ).visual
        except (RuntimeError, OSError, ValueError) as error:
            raise ConfigError(f"open_clip model {config.name!r} cannot be made: {error}") from error
        if not isinstance(visual, open_clip.transformer.VisionTransformer):
            raise ConfigError(f"open_clip tower {config.name!r} is no plain ViT; for timm towers use type: timm")
        visual.output_tokens = True
        visual.proj = None  # projects the pooled vector only, which is not used
        if config.layer:
            visual.transformer.resblocks = layers_up_to(visual.transformer.resblocks, config.layer, config.name)
            visual.ln_post = nn.Identity()
        num_layers = len(visual.transformer.resblocks)
        if config.merge:
            visual.transformer = MergingTransformer(visual.transformer, config)
        elif config.activation_checkpointing:
            visual.set_grad_checkpointing()
        self.model = visual
        self.width = visual.conv1.out_channels
        self.set_pixel_statistics(visual.preprocess_cfg["mean"], visual.preprocess_cfg["std"])
        num_states = tokens_left(visual.grid_size[0] * visual.grid_size[1], config.merge, num_layers)
        interpolation = visual.preprocess_cfg["interpolation"]
        self.processor = ImageProcessor(visual.image_size[0], num_states, interpolation, config.tiles)

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        return self.checked(self.model(self.normalize(pixels_N3HW))[1])

    def save_files(self, folder: Path, plain: dict) -> None:
        """No file, but how pixels are normalised: some weights bring that along."""
        plain["preprocess"] = {key: self.model.preprocess_cfg[key] for key in ("mean", "std", "interpolation")}

    def layers(self) -> list[nn.Module]:
        *blocks, last = self.model.transformer.resblocks
        return [*blocks, nn.ModuleList([last, self.model.ln_post])]


class MergingClipBlocks(MergingBlocks):
    """open_clip's blocks, matched by their keys. PyTorch's attention does not hand them out; their mean over heads is one small
    product with the mean of the heads' matrices."""

    def attention(self, block: nn.Module, x_NSD: Tensor, bias_NS: Tensor | None) -> tuple[Tensor, Tensor]:
        normed_NSD = block.ln_1(x_NSD)
        attended, _ = block.attn(normed_NSD, normed_NSD, normed_NSD, need_weights=False, key_padding_mask=bias_NS)
        return x_NSD + block.ls_1(attended), self.keys(block.attn, normed_NSD)

    @torch.no_grad()
    def keys(self, attention: nn.MultiheadAttention, normed_NSD: Tensor) -> Tensor:
        weight_HKD = attention.in_proj_weight.chunk(3)[1].unflatten(0, (attention.num_heads, -1))
        bias_HK = attention.in_proj_bias.chunk(3)[1].unflatten(0, (attention.num_heads, -1))
        return F.linear(normed_NSD, weight_HKD.mean(0), bias_HK.mean(0))

    def mlp(self, block: nn.Module, x_NSD: Tensor) -> Tensor:
        return x_NSD + block.ls_2(block.mlp(block.ln_2(x_NSD)))


class MergingTransformer(nn.Module):
    """In place of open_clip's Transformer, with its parameters by the same names."""

    def __init__(self, transformer: nn.Module, config: OpenClipConfig):
        super().__init__()
        from open_clip.transformer import ResidualAttentionBlock

        blocks = transformer.resblocks
        if not transformer.batch_first or any(type(block) is not ResidualAttentionBlock for block in blocks):
            raise ConfigError(f"merge {config.merge}: {config.name!r} has blocks other than a plain ViT's; set merge: 0")
        self.resblocks = MergingClipBlocks(blocks, config.merge, kept=1, recompute=config.activation_checkpointing)

    def forward(self, x_NSD: Tensor) -> Tensor:
        return self.resblocks(x_NSD)
