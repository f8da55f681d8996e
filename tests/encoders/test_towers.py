"""What towers of timm and open_clip can do: a layer before the last, tiles, recomputed activations, one name for all."""

from __future__ import annotations

import copy
import io
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from metalm.config import build
from metalm.data.prompts import Interface
from metalm.data.sample import Sample
from metalm.data.shards import write_shards
from metalm.data.stream import DataConfig, PackedStream
from metalm.data.tokenizer import Tokenizer
from metalm.data.views import View
from metalm.encoders import ENCODERS
from metalm.encoders.naflex import NaFlexConfig
from metalm.encoders.open_clip_tower import OpenClipConfig
from metalm.encoders.timm_tower import TimmConfig
from metalm.errors import ConfigError
from metalm.model import MetaLM, MetaLMConfig
from metalm.segments import Document, Text, load_spans, make_batch

DECODER = {"layers": 1, "width": 16, "heads": 2}
VIT = {"type": "timm", "name": "vit_tiny_patch16_224", "image_size": 32, "arguments": {"depth": 3, "embed_dim": 24}}
CLIP = {"type": "open_clip", "name": "ViT-S-32-alt", "image_size": 64}
RESNET = {"type": "timm", "name": "resnet10t", "image_size": 64}
CONVNEXT = {"type": "timm", "name": "convnext_atto", "image_size": 64}
NAFLEX = {
    "type": "naflex",
    "name": "naflexvit_base_patch16_gap",
    "arguments": {"depth": 2, "embed_dim": 24, "num_heads": 2},
}


def make(values: dict, **changed):
    torch.manual_seed(0)
    cls = ENCODERS[values["type"]]
    return cls(build(cls.Config, values | changed, "test")).eval()


def picture(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def read(encoder, *pictures: bytes, **inputs) -> Tensor:
    """States of all pictures, one after another."""
    processor = encoder.processor
    collated = processor.collate([processor.load({"image": one, **inputs}) for one in pictures])
    return encoder(**collated.inputs).flatten(0, 1)[collated.source]


@pytest.mark.parametrize(
    "values, layer, block", [(VIT, -2, "blocks.1"), (VIT, 2, "blocks.1"), (CLIP, -2, "transformer.resblocks.10")]
)
def test_a_layer_before_the_last_is_read_without_the_norm(values, layer, block):
    whole, cut = make(values), make(values, layer=layer)
    seen = []
    whole.model.get_submodule(block).register_forward_hook(lambda module, inputs, out: seen.append(out))
    with torch.no_grad():
        read(whole, picture(32, 32))
        states = read(cut, picture(32, 32))
    torch.testing.assert_close(states, seen[0][0, 1:])
    assert len(cut.layers()) == len(whole.layers()) - 1
    names = {name for name, _ in cut.named_parameters()}
    assert not any(name.startswith(("model.norm.", "model.ln_post.")) for name in names)


@pytest.mark.parametrize("values", [VIT, CLIP, CONVNEXT, NAFLEX])
def test_recomputed_activations_give_the_same_gradients(values):
    plain, again = make(values), make(values, activation_checkpointing=True)
    again.load_state_dict(plain.state_dict())
    calls = {plain: 0, again: 0}
    for encoder in calls:
        layer = encoder.layers()[1]
        *_, last = (module for module in layer.modules() if isinstance(module, torch.nn.LayerNorm))

        def count(module, inputs, out, encoder=encoder):
            calls[encoder] += 1

        last.register_forward_hook(count)
        read(encoder.train(), picture(64, 48), picture(32, 32, seed=1)).square().sum().backward()
    assert calls == {plain: 1, again: 2}
    for (name, one), (_, other) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_tiles_are_pictures_of_their_own():
    plain, tiled = make(VIT), make(VIT, tiles=4)
    large, small = picture(64, 32), picture(20, 20, seed=1)
    assert [tiled.processor.num_states({"image": one}) for one in (large, small)] == [12, 4]
    with Image.open(io.BytesIO(large)) as image:
        halves = []
        for left in (0, 32):
            out = io.BytesIO()
            image.crop((left, 0, left + 32, 32)).save(out, "PNG")
            halves.append(out.getvalue())
    with torch.no_grad():
        torch.testing.assert_close(read(tiled, small, large), read(plain, small, large, *halves))


def test_a_model_docks_pictures_of_different_numbers_of_tiles():
    torch.manual_seed(0)
    values = {
        "decoder": {"layers": 1, "width": 16, "heads": 2, "vocab_size": 20},
        "encoders": {"eye": VIT | {"tiles": 4, "connector": {"type": "linear"}}},
    }
    model = MetaLM(build(MetaLMConfig, values, "test")).eval()
    interface = Interface(None, model.processors, {"eye": model.config.encoders["eye"].connector}, 64)
    documents = [
        load_spans(Document([interface.span("eye", {"image": picture(*size)}), Text([1, 2, 3])]), model.processors)
        for size in ((20, 20), (64, 64), (32, 64))
    ]
    assert [len(document) for document in documents] == [4 + 3, 20 + 3, 12 + 3]
    with torch.no_grad():
        together = model(make_batch([documents], model.processors))
        alone = [model(make_batch([[document]], model.processors)) for document in documents]
    torch.testing.assert_close(together, sum(alone))


def test_naflex_states_are_timms_padded_or_not():
    encoder = make(NAFLEX, max_patches=12)
    wide, small = picture(96, 40), picture(20, 17, seed=1)
    assert encoder.processor.size({"image": wide}) == (32, 80)  # 2 x 5 patches: 3 x 6 would be too many
    assert encoder.processor.num_states({"image": small}) == 4
    model = encoder.model
    data = timm.data.resolve_model_data_config(model)

    def theirs(encoded: bytes, height: int, width: int) -> Tensor:
        with Image.open(io.BytesIO(encoded)) as image:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        pixels = nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
        pixels = (pixels / 255 - torch.tensor(data["mean"])) / torch.tensor(data["std"])
        patches = pixels.view(height // 16, 16, width // 16, 16, 3).transpose(1, 2).reshape(1, -1, 768)
        rows, columns = torch.meshgrid(torch.arange(height // 16), torch.arange(width // 16), indexing="ij")
        places = torch.stack([rows.flatten(), columns.flatten()], dim=1)[None]
        states = model.forward_features(patches, places, torch.ones(1, patches.shape[1], dtype=torch.bool))["patches"]
        return states[0, model.num_prefix_tokens :]

    with torch.no_grad():
        expected = torch.cat([theirs(wide, 32, 80), theirs(small, 32, 32)])
        torch.testing.assert_close(read(encoder, wide, small), expected, rtol=1e-4, atol=1e-5)


def test_naflex_reads_a_view_in_its_own_shape():
    encoder = make(NAFLEX)
    assert encoder.processor.num_states({"image": picture(64, 64), "view": View(0, 0, 1, 0.5)}) == 4 * 2
    with torch.no_grad():
        assert len(read(encoder, picture(64, 64), view=View(0, 0, 1, 0.5, mirrored=True))) == 8


@pytest.mark.parametrize("values", [VIT | {"tiles": 4}, NAFLEX | {"max_patches": 30}])
def test_crops_have_as_many_positions_as_they_have_states(values, tmp_path):
    torch.manual_seed(0)
    encoders = {"eye": values | {"connector": {"type": "linear"}}}
    model = MetaLM(build(MetaLMConfig, {"decoder": {**DECODER, "vocab_size": 300}, "encoders": encoders}, "test")).eval()
    samples = [Sample(f"{n}", picture(30 + 17 * n, 90, n), ["a red dog"]) for n in range(6)]
    write_shards(samples, tmp_path, samples_per_shard=6)
    source = {"shards": str(tmp_path), "task": "captioning", "crop": 0.4, "mirror": True}
    data = build(DataConfig, {"train": [source], "workers": 0, "rows": 2, "block": 12, "row_length": 96}, "test")
    interface = Interface.of(model, Tokenizer.train(["a red dog caption:"], 300), 96)
    lengths = set()
    for batch in itertools.islice(PackedStream(data.train, interface, data), 8):
        assert not batch.broken and model(batch).isfinite()
        lengths |= set(batch.spans["eye"].lengths.tolist())
    assert len(lengths) > 2


def test_one_name_stands_for_a_pretrained_tower():
    connector = {"type": "linear"}

    def config(spec: str, **keys):
        values = {"decoder": {"layers": 1, "width": 8, "heads": 1}, "encoders": {"eye": {"type": spec, **keys}}}
        return build(MetaLMConfig, values, "test").encoders["eye"]

    eye = config("timm:vit_small_patch16_224.augreg_in21k", connector=connector, trainable=2)
    assert isinstance(eye, TimmConfig) and eye.type == "timm" and eye.trainable == 2
    assert (eye.name, eye.pretrained) == ("vit_small_patch16_224.augreg_in21k", True)
    eye = config("open_clip:ViT-B-32/laion2b_s34b_b79k", connector=connector)
    assert isinstance(eye, OpenClipConfig) and (eye.name, eye.pretrained) == ("ViT-B-32", "laion2b_s34b_b79k")
    assert config("open_clip:ViT-B-32", connector=connector).pretrained == ""
    assert not config("timm:resnet10t", connector=connector, pretrained=False).pretrained
    assert isinstance(config("naflex:naflexvit_base_patch16_gap", connector=connector), NaFlexConfig)
    with pytest.raises(ConfigError, match="'vit' takes nothing after a colon, not 'b16'"):
        config("vit:b16", connector=connector)
    with pytest.raises(ConfigError, match="no encoder is called 'tim'; did you mean 'timm'"):
        config("tim:resnet10t", connector=connector)


@pytest.mark.parametrize(
    "values, message",
    [
        (VIT | {"layer": 4}, "layer 4: vit_tiny_patch16_224 has 3 layers"),
        (VIT | {"layer": -4}, "layer -4: vit_tiny_patch16_224 has 3 layers"),
        (RESNET | {"layer": -2}, "of a convolutional network, 'resnet10t', the last map is read"),
        (
            RESNET | {"activation_checkpointing": True},
            "'resnet10t' has batch norms: .* take each batch into their statistics twice",
        ),
        (CLIP | {"image_size": 20}, "image_size 20 is less than a patch"),
        (VIT | {"image_size": 8}, "image_size 8 is less than a patch"),
        (
            {"type": "video", "image": {"type": "text", "layers": 1, "width": 8, "heads": 1}},
            "type 'text' is no encoder of images",
        ),
        (VIT | {"tiles": 0}, "tiles is 0"),
        (VIT | {"tiles": 2, "connector": {"type": "pixel_shuffle"}}, "pixel_shuffle reads a square of states"),
        (NAFLEX | {"connector": {"type": "convolution"}}, "convolution reads a square of states"),
        (NAFLEX | {"name": "naflexvit_bas_patch16_gap"}, "did you mean 'naflexvit_base_patch16_gap'"),
        (NAFLEX | {"max_patches": 0}, "max_patches is 0"),
        (NAFLEX | {"arguments": {"embed_dimm": 3}}, "cannot be made"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        make(values)


def published(folder: Path) -> Path:
    """A model of timm's, its weights and its `config.json`, as timm's own `save_for_hf` writes them."""
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=3, embed_dim=24, num_classes=5)
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear"}
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


def with_eye(**eye) -> MetaLM:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a red dog"], 280)
    values = {
        "decoder": {**DECODER, "vocab_size": tokenizer.size},
        "encoders": {"eye": {"connector": {"type": "linear"}, **eye}},
    }
    model = MetaLM(build(MetaLMConfig, values, "test")).eval()
    model.tokenizer = tokenizer
    return model


@pytest.mark.parametrize("in_films", [False, True])
def test_an_export_stands_without_the_folder_that_its_tower_came_from(tmp_path, monkeypatch, in_films):
    source = published(tmp_path / "source")
    tower = {"type": f"timm:local-dir:{source}"}
    model = with_eye(**({"type": "video", "image": tower, "frames": 2, "heads": 2} if in_films else tower))
    eye = model.encoders["eye"].image if in_films else model.encoders["eye"]
    assert eye.processor.image_size == 48 and eye.processor.interpolation == "bilinear"
    weights = timm.create_model(f"local-dir:{source}", pretrained=True).state_dict()
    assert torch.equal(eye.model.blocks[2].mlp.fc1.weight, weights["blocks.2.mlp.fc1.weight"])
    model.save_pretrained(tmp_path / "export")
    shutil.rmtree(source)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert str(source) not in (tmp_path / "export/config.json").read_text()
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "export", moved)
    again = MetaLM.from_pretrained(moved)
    again.save_pretrained(moved)  # over itself
    again = MetaLM.from_pretrained(moved).encoders["eye"]
    again = again.image if in_films else again
    with torch.no_grad():
        assert torch.equal(read(again, picture(60, 50)), read(eye, picture(60, 50)))


def test_an_export_keeps_the_pixel_statistics_of_its_weights(tmp_path, monkeypatch):
    """A tag of open_clip may bring its own: these weights of ViT-L-14 have other ones than the model's name."""
    import open_clip

    small = open_clip.get_model_config("ViT-S-32-alt")
    monkeypatch.setattr(open_clip.factory, "get_model_config", lambda name: copy.deepcopy(small))
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: str(tmp_path / "weights.pt"))
    torch.save(open_clip.create_model("ViT-S-32-alt").state_dict(), tmp_path / "weights.pt")
    model = with_eye(type="open_clip:ViT-L-14/laion2b_s32b_b82k")
    eye = model.encoders["eye"]
    assert eye.pixel_mean.flatten().tolist() == [127.5] * 3
    model.save_pretrained(tmp_path / "export")
    again = MetaLM.from_pretrained(tmp_path / "export").encoders["eye"]
    with torch.no_grad():
        assert torch.equal(read(again, picture(60, 50)), read(eye, picture(60, 50)))


def test_what_does_not_fit_is_named_by_its_encoder():
    film = {"type": "video", "image": VIT, "heads": 5}
    for eye, message in (
        (VIT | {"connector": {"type": "perceiver", "heads": 3}}, r"encoders\.eye: connector\.heads 3 does not divide"),
        (film, r"encoders\.eye: width 24 is not divisible by heads 5"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_eye(**eye)


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("local-dir:{}", None, "there is no config.json that can be read"),
        ("local-dir:{}", "no JSON", "there is no config.json that can be read"),
        ("local-dir:{}", '{"model_type": "bert"}', "its config.json names no architecture of timm"),
        ("local-dir:{}", '{"architecture": "vit_tinny"}', "cannot be made: Unknown model"),
        ("hf-hub:no/such", None, "there is no config.json that can be read"),
        ("file:{}", None, r"before the colon goes hf-hub \(an id of the Hub\) or local-dir \(a folder\)"),
        ("some/model", None, "timm has no model 'some/model'"),
    ],
)
def test_a_source_that_is_no_model_of_timm_is_refused(tmp_path, monkeypatch, name, config, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        make(VIT, name=name.format(tmp_path))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_towers_train_in_bfloat16_by_the_attention_that_is_faster_then(name):
    """On a CPU: matrix products in training, the fused kernel otherwise; the same states to bfloat16's rounding."""
    size = 32 if "16" in name else 28
    heads = {"arguments": {"depth": 2, "embed_dim": 24, "num_heads": 2}}
    tower = make(VIT | {"name": name, "image_size": size} | heads)
    pixels = tower.processor.collate([tower.processor.load({"image": picture(40, 40)})]).inputs["pixels_N3HW"]
    with torch.no_grad():
        exact = tower(pixels)
    tower.bfloat16()
    states = {}
    for trained in (True, False):
        with torch.set_grad_enabled(trained):
            states[trained] = tower(pixels)
        assert {block.attn.fused_attn for block in tower.model.blocks} == {not trained}
        torch.testing.assert_close(states[trained].float(), exact, rtol=0.1, atol=0.1)
    assert states[True].requires_grad
    tower.requires_grad_(False)
    tower(pixels)
    assert all(block.attn.fused_attn for block in tower.model.blocks)
