"""Films: frames in their order and number, the image encoder's own states, and learning what only time tells."""

from __future__ import annotations

import io
import random
import sys

import av
import numpy as np
import pytest
import torch

from metalm.config import build
from metalm.data.prompts import Interface, captioning
from metalm.data.sample import Sample, extension_of
from metalm.data.tokenizer import Tokenizer
from metalm.data.video import decode_frames
from metalm.data.views import View
from metalm.encoders import ENCODERS
from metalm.encoders.video import black_film
from metalm.errors import ConfigError, DataError
from metalm.model import MetaLM, MetaLMConfig
from metalm.segments import make_batch
from metalm.testing import check_encoder

VIT = {"type": "vit", "layers": 1, "width": 16, "heads": 2, "image_size": 32, "patch_size": 16}
VIDEO = {"type": "video", "image": VIT, "frames": 4, "heads": 2}


def film(positions: list[int], kind: str = "mp4", codec: str = "mpeg4") -> bytes:
    """A white bar that stands at these columns of 64, frame by frame."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for position in positions:
            pixels = np.zeros((64, 64, 3), np.uint8)
            pixels[:, position : position + 8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def bar(picture_3HW: torch.Tensor) -> int:
    """The column where the white bar begins."""
    return int((picture_3HW[0, 32] > 128).int().argmax())


def make(values: dict):
    torch.manual_seed(0)
    return ENCODERS["video"](build(ENCODERS["video"].Config, values, "test")).eval()


@pytest.mark.parametrize("kind, codec", [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("mp4", "libx264")])
@pytest.mark.parametrize("count", [1, 4, 20, 30])
def test_frames_are_spread_over_the_film(kind, codec, count):
    encoded = film([2 * n for n in range(20)], kind, codec)
    assert extension_of(encoded) in ("mp4", "mkv", "avi")
    found = [bar(frame) for frame in decode_frames(encoded, count)]
    expected = [2 * round(n * 19 / max(1, count - 1)) for n in range(count)]
    assert len(found) == count and max(abs(a - b) for a, b in zip(found, expected)) <= 1


def test_broken_films_are_named():
    whole = film([1, 2, 3] * 20)
    for broken in (b"", b"no film", whole[:200], whole[: len(whole) // 2]):
        with pytest.raises(DataError, match="film"):
            decode_frames(broken, 4)


def test_without_pyav_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"pip install 'metalm\[video\]'"):
        decode_frames(b"", 2)
    with pytest.raises(ConfigError, match=r"pip install 'metalm\[video\]'"):
        black_film()


@pytest.mark.parametrize("values", [VIDEO, VIDEO | {"pool": "frame", "layers": 2}])
def test_the_contract_is_kept(values):
    encoder = make(values)
    check_encoder(encoder, [{"video": film([0, 20, 40])}, {"video": film([40] * 12)}])
    assert encoder.processor.num_states({"video": b""}) == (4 if values.get("pool") == "frame" else 4 * 4)


@torch.no_grad()
def test_frames_are_read_by_the_image_encoder_and_a_view_shows_the_same_part_of_each():
    encoder = make(VIDEO)
    clip = film([0, 10, 20, 30, 40, 50])
    loaded = encoder.processor.load({"video": clip})["video"]
    assert loaded.shape == (4, 3, 32, 32)
    for block in encoder.time.blocks:  # no attention, no network: what is left is time and norm
        block.attention.out.weight.zero_(), block.mlp.down.weight.zero_()
    states = encoder(loaded)
    time_F1D = encoder.time.positions.weight[:, None]
    expected = encoder.time.norm(encoder.image(loaded) + time_F1D).flatten(0, 1)
    torch.testing.assert_close(states[0], expected)
    mirrored = encoder.processor.load({"video": clip, "view": View(0, 0, 1, 1, True)})["video"]
    assert torch.equal(mirrored, loaded.flip(-1))


def test_a_model_tells_which_way_the_bar_goes():
    """The first and last frames of all films are the same pictures: left and right differ by their order alone."""
    samples = []
    for shift in range(6):
        path = [shift + 8 * n for n in range(6)]
        samples += [Sample(f"right{shift}", captions=["right"], video=film(path))]
        samples += [Sample(f"left{shift}", captions=["left"], video=film(path[::-1]))]
    tokenizer = Tokenizer.train(["left right caption:"] * 4, 270)
    decoder = {"layers": 1, "width": 32, "heads": 2, "positions": "rotary", "vocab_size": tokenizer.size}
    image = {**VIT, "width": 32}
    video = {"type": "video", "image": image, "frames": 4, "heads": 2, "pool": "frame", "connector": {"type": "linear"}}
    torch.manual_seed(0)
    model = MetaLM(build(MetaLMConfig, {"decoder": decoder, "encoders": {"film": video}}, "test"))
    interface = Interface.of(model, tokenizer, 64)
    rows = [[interface.load(next(captioning(interface, sample, random.Random(0))))] for sample in samples]
    batch = make_batch(rows, model.processors)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(batch) / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    assert loss < 0.1  # guessing costs log 2 = 0.69


def test_only_encoders_of_images_read_frames():
    with pytest.raises(ConfigError, match="'text' is no encoder of images of one size"):
        make(VIDEO | {"image": {"type": "text", "layers": 1, "width": 16, "heads": 2, "vocab_size": 9}})
    with pytest.raises(ConfigError, match=r"image\.init_from belongs to the encoder of films itself"):
        make(VIDEO | {"image": VIT | {"init_from": "runs/photos"}})
    with pytest.raises(ConfigError, match="frames, layers and heads must be at least 1"):
        make(VIDEO | {"frames": 0})
