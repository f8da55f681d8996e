"""What encoders of images share: pictures of one size in, a state a patch or a place of the feature map out."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metalm.data.images import decode_image, picture_size
from metalm.data.tiles import decode_tiles, tile_grid
from metalm.encoders.base import Collated, Encoder, EncoderConfig, Processor
from metalm.errors import ConfigError


@dataclass
class ImageProcessor(Processor):
    """Decodes to the tower's input size; a picture is one row of states or, with `tiles` above 1, one for the whole and one a
    tile where the picture is larger than the input. `row_states` are those of a row: its patches, or what merging left."""

    image_size: int
    row_states: int
    interpolation: str
    tiles: int = 1
    reads = frozenset({"image"})

    def __post_init__(self):
        if self.row_states < 1:
            raise ConfigError(f"image_size {self.image_size} is less than a patch")

    def grid(self, inputs: dict) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return tile_grid(*picture_size(inputs["image"], inputs.get("view")), self.image_size, self.tiles)

    def num_states(self, inputs: dict) -> int:
        if self.tiles == 1:
            return self.row_states
        if isinstance(inputs["image"], Tensor):  # loaded
            return self.row_states * len(self.squares(inputs))
        tiles = math.prod(self.grid(inputs))
        return self.row_states * (1 if tiles == 1 else 1 + tiles)

    def squares(self, inputs: dict) -> Tensor:
        """A loaded picture and its tiles, [1 + tiles, 3, size, size]."""
        return inputs["image"].view(-1, 3, self.image_size, self.image_size)

    def load(self, inputs: dict) -> dict:
        grid, view = (1, 1) if self.tiles == 1 else self.grid(inputs), inputs.get("view")
        if grid == (1, 1):
            return {"image": decode_image(inputs["image"], self.image_size, self.interpolation, view)}
        return {"image": decode_tiles(inputs["image"], self.image_size, grid, self.interpolation, view)}

    def collate(self, loaded: list[dict]) -> Collated:
        pixels = torch.cat([self.squares(inputs) for inputs in loaded])
        return Collated({"pixels_N3HW": pixels}, torch.arange(len(pixels) * self.row_states))

    def blank(self) -> dict:
        return {"image": one_pixel_png()}

    def largest(self, share: float = 1.0) -> dict:
        tiles = max(1, math.floor(self.tiles * share))
        return {"image": black_png(tiles * self.image_size, self.image_size)}


SQUARE = ("pixel_shuffle", "convolution")  # connectors that read a picture's states as a square


@dataclass(kw_only=True)
class MergeConfig(EncoderConfig):
    """`merge` tokens a layer, at most half of them, become part of others that are like them (`metalm.nn.merging`): faster
    layers, and fewer states, which are no square of places any more. 0: none; as the published models, 8 to 16 of 196."""

    merge: int = 0

    def __post_init__(self):
        if self.merge < 0:
            raise ConfigError(f"merge is {self.merge}, it must be positive, or 0 for none")
        if self.merge and getattr(self.connector, "type", "") in SQUARE:
            raise ConfigError(
                f"connector {self.connector.type} reads a square of states, of which merge: {self.merge} leaves none; take "
                "another connector (perceiver, feedforward, …) or merge: 0"
            )


@dataclass(kw_only=True)
class TowerConfig(MergeConfig):
    """What the towers of both libraries can do.

    Attributes:
        image_size: 0 is the model's own; position embeddings are resized to another.
        layer: whose states are read, as they are: the n-th, or -2 for the one before the last, which LLaVA reads of CLIP. What
            comes after is left out of the model. 0 is the last with the norm after it.
        tiles: so many at most, beside the picture as a whole, where it is larger than `image_size`: a picture takes up to
            1 + `tiles` times the positions.
        activation_checkpointing: layers are run again in the backward pass instead of being remembered.
    """

    name: str
    image_size: int = 0
    layer: int = 0
    tiles: int = 1
    activation_checkpointing: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.tiles < 1:
            raise ConfigError(f"tiles is {self.tiles}, it must be at least 1")
        if self.tiles > 1 and getattr(self.connector, "type", "") in SQUARE:
            raise ConfigError(f"connector {self.connector.type} reads a square of states, which a picture in tiles has not")


class ImageTower(Encoder):
    """What the towers of both libraries share: uint8 in, normalised on the device, patch states out."""

    name: str
    processor: ImageProcessor

    def set_pixel_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.register_buffer("pixel_mean", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", 255 * torch.tensor(std)[:, None, None], persistent=False)

    def normalize(self, pixels_N3HW: Tensor) -> Tensor:
        """In float32, then as the weights are: buffers need not share their precision (under DeepSpeed they do not)."""
        pixels = (pixels_N3HW - self.pixel_mean) / self.pixel_std
        return pixels.to(next(self.model.parameters()).dtype)

    def checked(self, states_NPD: Tensor) -> Tensor:
        """The states, if they are one a patch: a tower that pools them would be read at the wrong places."""
        expected = (self.processor.row_states, self.width)
        if states_NPD.shape[1:] != expected:
            raise ConfigError(
                f"{self.name!r} gives states of shape {tuple(states_NPD.shape[1:])} a picture, not one for each of its "
                f"patches {expected}: take a plain ViT, DeiT, BEiT or EVA, or a convolutional network"
            )
        return states_NPD


def one_pixel_png() -> bytes:
    return black_png(1, 1)


def black_png(width: int, height: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return out.getvalue()
