"""Films: an image encoder reads each frame, then each place of the picture attends over time.

    frames -> image encoder -> states [F, P, D] -> + time -> Transformer over the F states of each place -> [F * P, D]

Space and time apart, as in TimeSformer (arXiv 2102.05095): the cost grows with F² P and not with (F P)². With `pool` the states
of a frame are averaged to one.

Shapes: N films, F frames, P states of a frame, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metalm.config import plugin
from metalm.data.images import fit_picture
from metalm.data.video import decode_frames, import_av
from metalm.encoders import ENCODERS
from metalm.encoders.base import Collated, Encoder, EncoderConfig, Processor
from metalm.encoders.image import ImageProcessor
from metalm.errors import ConfigError
from metalm.nn.transformer import Transformer, TransformerConfig


@dataclass(kw_only=True)
class VideoConfig(EncoderConfig):
    """`frames` of every film, each read by the encoder `image`, of any type; `layers` over time, of `heads` heads."""

    image: Any = plugin(ENCODERS)
    frames: int = 8
    layers: int = 1
    heads: int = 8
    pool: Literal["none", "frame"] = "none"

    def __post_init__(self):
        if min(self.frames, self.layers, self.heads) < 1:
            raise ConfigError("frames, layers and heads must be at least 1")
        if hasattr(self.image, "vocab_size"):
            raise ConfigError(f"image: type {self.image.type!r} is no encoder of images of one size")
        if getattr(self.image, "merge", 0) and self.pool == "none":
            raise ConfigError(
                "video.image.merge: attention over time follows each place of the picture, and merged states are of no place; "
                "set pool: frame, or merge: 0"
            )
        for name, default in (("init_from", ""), ("trainable", "all"), ("connector", None)):
            if getattr(self.image, name) != default:
                raise ConfigError(f"image.{name} belongs to the encoder of films itself, which has its frames read by it")


@dataclass
class VideoProcessor(Processor):
    """Frames at the image encoder's size."""

    image: ImageProcessor
    frames: int
    states: int
    reads = frozenset({"video"})

    def num_states(self, inputs: dict) -> int:
        return self.states

    def load(self, inputs: dict) -> dict:
        pictures = decode_frames(inputs["video"], self.frames)
        size = self.image.image_size
        fit = [fit_picture(one, size, size, self.image.interpolation, inputs.get("view")) for one in pictures]
        return {"video": torch.stack(fit)}

    def collate(self, loaded: list[dict]) -> Collated:
        pixels = torch.cat([inputs["video"] for inputs in loaded])
        return Collated({"pixels_M3HW": pixels}, torch.arange(len(loaded) * self.states))

    def blank(self) -> dict:
        return {"video": black_film()}


class VideoEncoder(Encoder):
    Config = VideoConfig

    def __init__(self, config: VideoConfig):
        super().__init__()
        self.image = ENCODERS[config.image.type](config.image)
        images = self.image.processor
        if not isinstance(images, ImageProcessor):
            raise ConfigError(f"video.image: type {config.image.type!r} is no encoder of images of one size")
        if images.tiles > 1:
            raise ConfigError("video.image: frames are read whole, without tiles")
        self.frames, self.pool = config.frames, config.pool == "frame"
        self.width = self.image.width
        shape = TransformerConfig(config.layers, self.width, config.heads, positions="learned", max_positions=config.frames)
        self.time = Transformer(shape)
        states = config.frames * (1 if self.pool else images.row_states)
        self.processor = VideoProcessor(images, config.frames, states)

    def forward(self, pixels_M3HW: Tensor) -> Tensor:
        states_NFPD = self.image(pixels_M3HW).unflatten(0, (-1, self.frames))
        if self.pool:
            states_NFPD = states_NFPD.mean(2, keepdim=True)
        N, F, P, D = states_NFPD.shape
        over_time = states_NFPD.transpose(1, 2).reshape(N * P, F, D)
        time_F = torch.arange(F, device=over_time.device)
        over_time = self.time(over_time, time_F.expand(N * P, F))
        return over_time.view(N, P, F, D).transpose(1, 2).flatten(1, 2)

    def save_files(self, folder: Path, plain: dict) -> None:
        self.image.save_files(folder, plain["image"])

    def layers(self) -> list[nn.Module]:
        blocks = self.time.blocks
        return [*self.image.layers(), *blocks[:-1], nn.ModuleList([blocks[-1], self.time.norm])]


def black_film() -> bytes:
    """A film of one small black picture."""
    import io

    from PIL import Image

    av = import_av()
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as film:
        stream = film.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for packet in [*stream.encode(av.VideoFrame.from_image(Image.new("RGB", (16, 16)))), *stream.encode()]:
            film.mux(packet)
    return out.getvalue()
