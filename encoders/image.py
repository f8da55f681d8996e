"""What encoders of images share: pictures of one size in, a state a patch or a place of the feature map out."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from torch import Tensor

from metalm.data.images import decode_image
from metalm.encoders.base import Collated, Encoder, Processor
from metalm.errors import ConfigError


@dataclass
class ImageProcessor(Processor):
    """Decodes to the tower's input size; a picture is one row of states."""

    image_size: int
    num_patches: int
    interpolation: str
    reads = frozenset({"image"})

    def num_states(self, inputs: dict) -> int:
        return self.num_patches

    def load(self, inputs: dict) -> dict:
        return {"image": decode_image(inputs["image"], self.image_size, self.interpolation, inputs.get("view"))}

    def collate(self, loaded: list[dict]) -> Collated:
        pixels = torch.stack([inputs["image"] for inputs in loaded])
        return Collated({"pixels_N3HW": pixels}, torch.arange(len(loaded) * self.num_patches))

    def blank(self) -> dict:
        return {"image": one_pixel_png()}


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
        expected = (self.processor.num_patches, self.width)
        if states_NPD.shape[1:] != expected:
            raise ConfigError(
                f"{self.name!r} gives states of shape {tuple(states_NPD.shape[1:])} a picture, not one for each of its "
                f"patches {expected}: take a plain ViT, DeiT, BEiT or EVA, or a convolutional network"
            )
        return states_NPD


def one_pixel_png() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (1, 1)).save(out, "PNG")
    return out.getvalue()
