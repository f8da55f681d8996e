"""Image towers that merge tokens: the contract, the counts that packing relies on, and what cannot be together with it."""

from __future__ import annotations

import io
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from metalm.config import build
from metalm.data.prompts import Interface
from metalm.data.tokenizer import Tokenizer
from metalm.encoders import ENCODERS
from metalm.encoders.video import black_film
from metalm.errors import ConfigError
from metalm.model import MetaLM, MetaLMConfig
from metalm.nn.merging import MergingBlocks, tokens_left
from metalm.segments import Document, Text, load_spans, make_batch
from metalm.testing import check_encoder

VIT = {"type": "vit", "layers": 3, "width": 16, "heads": 2, "image_size": 32, "patch_size": 8}
TIMM = {"type": "timm", "name": "vit_tiny_patch16_224", "image_size": 64, "arguments": {"depth": 3, "embed_dim": 24}}
REGISTERS = {
    "type": "timm",
    "name": "vit_small_patch14_reg4_dinov2",
    "image_size": 56,
    "arguments": {"depth": 3, "embed_dim": 24, "num_heads": 2},
}
CLIP = {"type": "open_clip", "name": "ViT-S-32-alt", "image_size": 128, "layer": 3}
TOWERS = {"vit": VIT, "timm": TIMM, "timm, registers": REGISTERS, "open_clip": CLIP}
SMALL = {"layers": 1, "width": 16, "heads": 2}


def make(values: dict, **changed):
    torch.manual_seed(0)
    cls = ENCODERS[values["type"]]
    return cls(build(cls.Config, values | changed, "test")).eval()


def picture(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def read(encoder, *pictures: bytes) -> Tensor:
    """States of all pictures, one after another."""
    collated = encoder.processor.collate([encoder.processor.load({"image": one}) for one in pictures])
    return encoder(**collated.inputs).flatten(0, 1)[collated.source]


def blocks_of(encoder) -> MergingBlocks:
    return next(module for module in encoder.modules() if isinstance(module, MergingBlocks))


@pytest.fixture(params=TOWERS)
def values(request) -> dict:
    return TOWERS[request.param]


def test_towers_that_merge_keep_the_contract(values):
    encoder = make(values, merge=2)
    assert encoder.processor.num_states({"image": picture(9, 9)}) == tokens_left(16, 2, 3) == 10
    assert len(encoder.layers()) == 3
    check_encoder(encoder, [{"image": picture(64, 48)}, {"image": picture(30, 30, seed=1)}, {"image": picture(80, 9, seed=2)}])


@torch.no_grad()
def test_where_nothing_merges_the_states_are_the_plain_towers(values):
    plain, merging = make(values), make(values, merge=2)
    assert not any(isinstance(module, MergingBlocks) for module in plain.modules())
    merging.load_state_dict(plain.state_dict())  # by the same names
    blocks_of(merging).merge, merging.processor = 0, plain.processor
    assert torch.equal(read(merging, picture(64, 48)), read(plain, picture(64, 48)))


def test_recomputed_layers_give_the_same_gradients(values):
    plain, again = make(values, merge=2), make(values, merge=2, activation_checkpointing=True)
    again.load_state_dict(plain.state_dict())
    for encoder in (plain, again):
        read(encoder.train(), picture(64, 48), picture(32, 32, seed=1)).square().sum().backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert not any(module._forward_hooks for encoder in (plain, again) for module in encoder.modules())


def test_bfloat16_is_read_as_well(values):
    encoder = make(values, merge=3).bfloat16()
    assert read(encoder, picture(64, 48)).isfinite().all()


@pytest.mark.parametrize("values", [TIMM, CLIP], ids=["timm", "open_clip"])
def test_layers_that_are_cut_merge_nothing_and_tiles_merge_by_themselves(values):
    size = values["image_size"]
    assert make(values, merge=2, layer=2).processor.row_states == 12
    tiled = make(values, merge=2, tiles=4)
    large = picture(2 * size, size)
    assert tiled.processor.num_states({"image": large}) == 3 * 10
    check_encoder(tiled, [{"image": large}, {"image": picture(20, 20)}])


def test_a_model_docks_what_is_left_and_comes_back_from_its_export(tmp_path):
    torch.manual_seed(0)
    eye = VIT | {"merge": 3, "connector": {"type": "linear"}}
    model = MetaLM(build(MetaLMConfig, {"decoder": SMALL | {"vocab_size": 300}, "encoders": {"eye": eye}}, "test")).eval()
    model.tokenizer = Tokenizer.train(["a"], 300)
    interface = Interface(None, model.processors, {"eye": model.config.encoders["eye"].connector}, 64)
    documents = [
        load_spans(Document([interface.span("eye", {"image": picture(40, 40, n)}), Text([1, 2, n])]), model.processors)
        for n in range(3)
    ]
    assert [len(document) for document in documents] == 3 * [7 + 3]
    with torch.no_grad():
        together = model(make_batch([documents], model.processors))
        torch.testing.assert_close(together, sum(model(make_batch([[one]], model.processors)) for one in documents))
        model.save_pretrained(tmp_path)
        again = MetaLM.from_pretrained(tmp_path)
        assert again.config.encoders["eye"].merge == 3
        torch.testing.assert_close(again(make_batch([documents], again.processors)), together)


def test_frames_of_films_merge_where_each_is_pooled():
    film = {"type": "video", "image": VIT | {"merge": 2}, "frames": 2, "heads": 2}
    check_encoder(make(film, pool="frame"), [{"video": black_film()}, {"video": black_film()}])
    with pytest.raises(ConfigError, match="merged states are of no place; set pool: frame, or merge: 0"):
        make(film)


def test_other_blocks_of_open_clip_are_refused(tmp_path):
    config = open_clip.get_model_config("ViT-S-32-alt")
    config["vision_cfg"]["block_type"] = "custom"
    (tmp_path / "ViT-S-32-custom.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    make(CLIP, name="ViT-S-32-custom")
    with pytest.raises(ConfigError, match="'ViT-S-32-custom' has blocks other than a plain ViT's; set merge: 0"):
        make(CLIP, name="ViT-S-32-custom", merge=2)


@pytest.mark.parametrize(
    "values, message",
    [
        (VIT | {"merge": -1}, "merge is -1"),
        (TIMM | {"merge": 2, "connector": {"type": "pixel_shuffle"}}, "pixel_shuffle reads a square of states"),
        (VIT | {"merge": 2, "connector": {"type": "convolution"}}, "convolution reads a square of states"),
        (
            {"type": "timm", "name": "resnet10t", "image_size": 64, "merge": 2},
            "'resnet10t' is a convolutional network and has no tokens",
        ),
        (
            TIMM | {"name": "beit_base_patch16_224", "merge": 2, "arguments": {"depth": 1, "embed_dim": 24, "num_heads": 2}},
            "other blocks than a plain ViT's, such as with positions in their attention; take a ViT or DeiT, or merge: 0",
        ),
        (
            {"type": "timm", "name": "eva02_tiny_patch14_224", "image_size": 28, "arguments": {"depth": 1}, "merge": 2},
            "'eva02_tiny_patch14_224' has other blocks",
        ),
    ],
)
def test_what_cannot_merge_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        make(values)
