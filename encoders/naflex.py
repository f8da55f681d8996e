"""timm's NaFlex towers: pictures in their own aspect ratio and resolution, as many patches as they have pixels for.

    480 x 320 pixels, patches of 16, up to 576 patches    ->  480 x 320, 30 x 20 = 600 is too many: 464 x 304, 29 x 19 = 551

Nothing is enlarged, and nothing squashed beyond rounding to whole patches. A batch is padded to its longest picture.
Source: NaViT (arXiv 2307.06304); SigLIP 2 (arXiv 2502.14786), section 2.4.

Shapes: N pictures, P patches of the largest, K numbers a patch, M states of all pictures, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from metalm.data.images import fit_picture, picture_size, read_picture
from metalm.encoders.base import Collated, Encoder, EncoderConfig, Processor
from metalm.encoders.image import SQUARE, black_png, one_pixel_png
from metalm.errors import ConfigError
from metalm.registry import did_you_mean


@dataclass(kw_only=True)
class NaFlexConfig(EncoderConfig):
    """`name` as in timm, e.g. `naflexvit_base_patch16_gap.e300_s576_in1k`; as a type, `naflex:NAME` is that with its weights.

    `max_patches` bounds a picture's states; `arguments` go to `timm.create_model` as they are.
    """

    name: str
    pretrained: bool = False
    max_patches: int = 576
    activation_checkpointing: bool = False
    arguments: dict[str, int | float | bool | str] | None = None

    def __post_init__(self):
        if self.max_patches < 1:
            raise ConfigError(f"max_patches is {self.max_patches}, it must be at least 1")
        if getattr(self.connector, "type", "") in SQUARE:
            raise ConfigError(f"connector {self.connector.type} reads a square of states, which these pictures have not")

    @staticmethod
    def from_spec(spec: str) -> dict:
        return {"name": spec, "pretrained": True}


@dataclass
class NaFlexProcessor(Processor):
    """Pictures as patches, each with its row and column."""

    patch_size: int
    max_patches: int
    interpolation: str
    reads = frozenset({"image"})

    def size(self, inputs: dict) -> tuple[int, int]:
        """Height and width in pixels, whole patches both, at which a picture is read."""
        from timm.data.naflex_transforms import get_image_size_for_seq

        width, height = picture_size(inputs["image"], inputs.get("view"))
        return get_image_size_for_seq((height, width), self.patch_size, self.max_patches, max_ratio=1.0)[1]

    def num_states(self, inputs: dict) -> int:
        if isinstance(inputs["image"], Tensor):  # loaded
            return len(inputs["image"])
        height, width = self.size(inputs)
        return (height // self.patch_size) * (width // self.patch_size)

    def load(self, inputs: dict) -> dict:
        from timm.data.naflex_transforms import patchify_image

        height, width = self.size(inputs)
        view = inputs.get("view")
        share = 1.0 if view is None else min(view.right - view.left, view.bottom - view.top)
        picture = read_picture(inputs["image"], round(max(height, width) / share))
        pixels = fit_picture(picture, width, height, self.interpolation, view)
        patches_PK, place_P2, _ = patchify_image(pixels, (self.patch_size, self.patch_size))
        return {"image": patches_PK, "place": place_P2}

    def collate(self, loaded: list[dict]) -> Collated:
        lengths = [len(inputs["image"]) for inputs in loaded]
        pad = nn.utils.rnn.pad_sequence
        inside_NP = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        inputs = {
            "patches_NPK": pad([inputs["image"] for inputs in loaded], batch_first=True),
            "place_NP2": pad([inputs["place"] for inputs in loaded], batch_first=True),
            "inside_NP": inside_NP,
        }
        return Collated(inputs, inside_NP.flatten().nonzero()[:, 0])

    def blank(self) -> dict:
        return {"image": one_pixel_png()}

    def largest(self, share: float = 1.0) -> dict:
        patches = max(1, math.floor(self.max_patches * share))
        rows = next(rows for rows in range(math.isqrt(patches), 0, -1) if patches % rows == 0)
        return {"image": black_png(patches // rows * self.patch_size, rows * self.patch_size)}


class NaFlexEncoder(Encoder):
    """A NaFlex ViT without its class and register tokens."""

    Config = NaFlexConfig

    def __init__(self, config: NaFlexConfig):
        super().__init__()
        import timm

        names = timm.list_models("naflexvit*")
        if config.name.split(".")[0] not in names:
            raise ConfigError(f"timm has no NaFlex model {config.name!r}{did_you_mean(config.name, names)}")
        arguments = dict(config.arguments or {})
        try:
            self.model = timm.create_model(config.name, pretrained=config.pretrained, num_classes=0, **arguments)
        except (TypeError, RuntimeError, OSError, ValueError, AssertionError, SafetensorError) as error:
            raise ConfigError(f"timm model {config.name!r} cannot be made: {error}") from error
        if self.model.attn_pool is not None:
            self.model.reset_classifier(0, "")  # what pools the states has no part in this
        self.model.fc_norm = nn.Identity()
        if config.activation_checkpointing:
            self.model.set_grad_checkpointing()
        data = timm.data.resolve_model_data_config(self.model)
        self.width = self.model.num_features
        self.skip = self.model.num_prefix_tokens
        for name in ("mean", "std"):
            self.register_buffer(f"pixel_{name}", 255 * torch.tensor(data[name]), persistent=False)
        patch_size = self.model.embeds.patch_size[0]
        self.processor = NaFlexProcessor(patch_size, config.max_patches, data["interpolation"])

    def forward(self, patches_NPK: Tensor, place_NP2: Tensor, inside_NP: Tensor) -> Tensor:
        if place_NP2.is_meta:  # where nobody can look for rows and columns, as timm does
            place_NP2 = torch.zeros(place_NP2.shape, dtype=torch.long, device="cpu")
        pixels = patches_NPK.unflatten(-1, (-1, 3))
        patches = ((pixels - self.pixel_mean) / self.pixel_std).flatten(2).to(next(self.model.parameters()).dtype)
        states = self.model.forward_features(patches, patch_coord=place_NP2, patch_valid=inside_NP)["patches"]
        return states[:, self.skip :]

    def layers(self) -> list[nn.Module]:
        blocks = self.model.blocks
        return [*blocks[:-1], nn.ModuleList([blocks[-1], self.model.norm])]
