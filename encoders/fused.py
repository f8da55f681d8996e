"""The fused vision-language encoder: image patches and text tokens are read together, bidirectionally.

A span is [patches; tokens], or either alone. With `experts` the feed-forward layers are VLMo's mixture of modality experts
(arXiv 2111.02358): patches and tokens share the attention but have networks of their own, and in the last
`fusion_layers` a third network takes over for spans that hold both. That is the paper's encoder of 192M parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metalm.data.images import decode_image
from metalm.encoders.base import Collated, Encoder, EncoderConfig, Processor, pack_spans
from metalm.encoders.text import check_room
from metalm.encoders.vit import ImageShape, PatchEmbedding
from metalm.errors import ConfigError
from metalm.nn.attention import Mask, same_document
from metalm.nn.positions import LearnedPositions, rotary_tables
from metalm.nn.transformer import MLP, Attention, TransformerConfig, init_weights, make_norm, start_blocks


@dataclass(kw_only=True)
class FusedEncoderConfig(ImageShape, TransformerConfig, EncoderConfig):
    """A stack over (`image_size` / `patch_size`) squared patches and up to `max_positions` tokens.

    Patches have learned positions; tokens have learned ones too (the paper's), or rotations, which find neighbours sooner.
    """

    positions: Literal["learned", "rotary"] = "learned"
    max_positions: int = 40
    experts: bool = False
    fusion_layers: int = 2
    vocab_size: int = 0

    def __post_init__(self):
        TransformerConfig.__post_init__(self)
        ImageShape.__post_init__(self)
        if self.relative_bias:
            raise ConfigError("relative_bias is not for the fused encoder: patches have no place in the text")


@dataclass
class FusedProcessor(Processor):
    """Host side: decodes pictures, packs spans into rows, and says which flat places patches and tokens take."""

    image_size: int
    num_patches: int
    max_positions: int
    reads = frozenset({"image", "text"})

    def num_states(self, inputs: dict) -> int:
        return (self.num_patches if "image" in inputs else 0) + check_room(len(inputs.get("tokens", ())), self.max_positions)

    def load(self, inputs: dict) -> dict:
        if "image" not in inputs:
            return inputs
        return {**inputs, "image": decode_image(inputs["image"], self.image_size, view=inputs.get("view"))}

    def collate(self, loaded: list[dict]) -> Collated:
        packed = pack_spans([self.num_states(inputs) for inputs in loaded])
        places: dict[str, list[Tensor]] = {name: [] for name in ("patch", "text", "patch_alone", "text_alone", "both")}
        tokens: list[int] = []
        for start, inputs in zip(packed.starts, loaded):
            middle = start + (self.num_patches if "image" in inputs else 0)
            end = start + self.num_states(inputs)
            patches, words = torch.arange(start, middle), torch.arange(middle, end)
            tokens += inputs.get("tokens", ())
            packed.position_RS.view(-1)[words] = words - middle
            places["patch"].append(patches)
            places["text"].append(words)
            both = len(patches) and len(words)
            places["both"] += [patches, words] if both else []
            places["patch_alone"] += [] if both else [patches]
            places["text_alone"] += [] if both else [words]
        images = [inputs["image"] for inputs in loaded if "image" in inputs]
        inputs = {
            "pixels_N3HW": torch.stack(images) if images else torch.zeros(0, 3, *[self.image_size] * 2, dtype=torch.uint8),
            "tokens_M": torch.tensor(tokens, dtype=torch.long),
            "span_RS": packed.span_RS,
            "position_RS": packed.position_RS,
        }
        empty = torch.zeros(0, dtype=torch.long)
        inputs |= {f"{name}_places": torch.cat([empty, *where]) for name, where in places.items()}
        return Collated(inputs, packed.source)

    def blank(self) -> dict:
        return {"tokens": [0]}


class FusedBlock(nn.Module):
    """Shared attention, then one network for all positions or one a modality."""

    def __init__(self, config: FusedEncoderConfig, fusion: bool):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.dropout = nn.Dropout(config.dropout)
        if config.experts:
            names = ["patch_alone", "text_alone", "both"] if fusion else ["patch", "text"]
            self.experts = nn.ModuleDict({name: MLP(config) for name in names})
        else:
            self.mlp = MLP(config)

    def forward(self, x_RSD: Tensor, mask: Mask, rotary: tuple[Tensor, Tensor] | None, places: dict[str, Tensor]) -> Tensor:
        q, k, v = self.attention.project(self.attention_norm(x_RSD), rotary)
        x_RSD = x_RSD + self.dropout(self.attention.out(self.attention(q, k, v, mask)))
        normed = self.mlp_norm(x_RSD)
        if not hasattr(self, "experts"):
            return x_RSD + self.dropout(self.mlp(normed))
        flat = normed.flatten(0, 1)
        out = torch.zeros_like(flat)
        # An expert without positions in this batch still runs, on none: all ranks do the same under ZeRO-3.
        for name, expert in self.experts.items():
            out = out.index_copy(0, places[name], expert(flat[places[name]]))
        return x_RSD + self.dropout(out.view_as(x_RSD))


class FusedEncoder(Encoder):
    Config = FusedEncoderConfig

    def __init__(self, config: FusedEncoderConfig):
        super().__init__()
        if config.vocab_size < 1:
            raise ConfigError("the fused encoder's vocab_size is not set and there is no tokenizer to take it from")
        self.config = config
        self.width = config.width
        self.processor = FusedProcessor(config.image_size, config.num_patches, config.max_positions)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.text_positions = LearnedPositions(config.max_positions, config.width)
        self.patches = PatchEmbedding(config, config.width)
        self.dropout = nn.Dropout(config.dropout)
        first_fusion = config.layers - config.fusion_layers
        self.blocks = nn.ModuleList(FusedBlock(config, layer >= first_fusion) for layer in range(config.layers))
        self.norm = make_norm(config)
        self.apply(init_weights)
        start_blocks(self.blocks)

    def forward(self, pixels_N3HW: Tensor, tokens_M: Tensor, span_RS: Tensor, position_RS: Tensor, **places: Tensor) -> Tensor:
        """States [R, S, D] of packed spans; `places` are the flat places of patches and tokens (see the processor)."""
        R, S = span_RS.shape
        places = {name.removesuffix("_places"): where for name, where in places.items()}
        words = self.embedding(tokens_M)
        rotary = None
        if self.config.positions == "rotary":
            c = self.config
            rotary = rotary_tables(position_RS, c.head_width, c.rotary_base, c.rotary_scaling)
        else:
            words = words + self.text_positions(position_RS.flatten()[places["text"]])
        patches = self.patches(pixels_N3HW)
        x = words.new_zeros(R * S, self.width)
        x = x.index_copy(0, places["text"], words).index_copy(0, places["patch"], patches.flatten(0, 1))
        x_RSD = self.dropout(x.view(R, S, self.width))
        mask = Mask(same_document(span_RS), R, S, S, span_RS.device)
        for block in self.blocks:
            if self.config.activation_checkpointing and self.training:
                x_RSD = checkpoint(block, x_RSD, mask, rotary, places, use_reentrant=False)
            else:
                x_RSD = block(x_RSD, mask, rotary, places)
        return self.norm(x_RSD)

    def layers(self) -> list[nn.Module]:
        return [*self.blocks[:-1], nn.ModuleList([self.blocks[-1], self.norm])]
