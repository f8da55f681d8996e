"""Every built-in encoder keeps the contract; towers give their libraries' own states, from their libraries' own files."""

from __future__ import annotations

import io

import open_clip
import pytest
import timm
import torch
from PIL import Image

from benchmarks.families import WAV2VEC2, WAV2VEC2_LARGE, WAVLM, WAVLM_LARGE
from benchmarks.text_checkpoints import write_checkpoint
from metalm.config import build
from metalm.data.audio import encode_wav
from metalm.encoders import ENCODERS
from metalm.encoders.base import Encoder
from metalm.encoders.text import TextProcessor
from metalm.encoders.video import black_film
from metalm.errors import ConfigError, DataError
from metalm.nn.freezing import set_trainable
from metalm.testing import check_encoder

SIZE = {"layers": 3, "width": 16, "heads": 2, "vocab_size": 30}
VIT = {"type": "timm", "name": "vit_tiny_patch16_224", "image_size": 32, "arguments": {"depth": 3, "embed_dim": 24}}
CLIP = {"type": "open_clip", "name": "ViT-S-32-alt", "image_size": 64}  # open_clip's cheapest plain ViT
SPEECH = {"type": "speech", "chunk_seconds": 0.5}
CONFIGS = {
    "text": {"type": "text", **SIZE},
    "BERT": {"type": "transformers", "name": "bert", "pretrained": True},  # a family's name: of a checkpoint that is made
    "two_tower": {"type": "two_tower", **SIZE},
    "causal": {"type": "causal", **SIZE},
    "fused": {"type": "fused", **SIZE, "image_size": 16, "patch_size": 8},
    "vit": {"type": "vit", "layers": 3, "width": 16, "heads": 2, "image_size": 16, "patch_size": 8},
    "fused, experts": {"type": "fused", **SIZE, "image_size": 16, "patch_size": 8, "experts": True, "fusion_layers": 1},
    "timm ViT": VIT,
    "timm BEiT": {
        "type": "timm",
        "name": "beit_base_patch16_224",
        "image_size": 32,
        "arguments": {"depth": 3, "embed_dim": 24, "num_heads": 2},
    },
    "timm EVA-02": {"type": "timm", "name": "eva02_tiny_patch14_224", "image_size": 28, "arguments": {"depth": 3}},
    "timm DINOv2, registers": {
        "type": "timm",
        "name": "vit_small_patch14_reg4_dinov2",
        "image_size": 28,
        "arguments": {"depth": 3, "embed_dim": 24, "num_heads": 2},
    },
    "timm SigLIP": {
        "type": "timm",
        "name": "vit_base_patch16_siglip_224",
        "image_size": 32,
        "arguments": {"depth": 3, "embed_dim": 24, "num_heads": 2},
    },
    "timm ResNet": {"type": "timm", "name": "resnet10t", "image_size": 64, "arguments": {"output_stride": 16}},
    "timm ConvNeXt": {"type": "timm", "name": "convnext_atto", "image_size": 70},
    "timm ViT, the layer before the last, tiles": {
        **VIT,
        "arguments": {"depth": 4, "embed_dim": 24},
        "layer": -2,
        "tiles": 4,
        "activation_checkpointing": True,
    },
    "naflex": {
        "type": "naflex",
        "name": "naflexvit_base_patch16_gap",
        "max_patches": 9,
        "arguments": {"depth": 3, "embed_dim": 24, "num_heads": 2},
    },
    "open_clip": CLIP,
    "video": {
        "type": "video",
        "image": {"type": "vit", "layers": 2, "width": 16, "heads": 2, "image_size": 16, "patch_size": 8},
    },
    "log_mel": {"type": "log_mel", "layers": 3, "width": 16, "heads": 2, "sample_rate": 8000, "chunk_seconds": 0.5},
    "wav2vec 2.0": {**SPEECH, "name": "wav2vec2_model", "arguments": WAV2VEC2},
    "wav2vec 2.0, large": {**SPEECH, "name": "wav2vec2_model", "arguments": WAV2VEC2_LARGE},
    "WavLM": {**SPEECH, "name": "wavlm_model", "arguments": WAVLM},
    "WavLM, large": {**SPEECH, "name": "wavlm_model", "arguments": WAVLM_LARGE},
}


def make(values: dict) -> Encoder:
    torch.manual_seed(0)
    cls = ENCODERS[values["type"]]
    return cls(build(cls.Config, values, "test")).eval()


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Encoder]:
    made = {}
    for name, values in CONFIGS.items():
        if values["type"] == "transformers":
            folder = tmp_path_factory.mktemp("checkpoint")
            write_checkpoint(folder, values["name"])
            values = values | {"name": str(folder)}
        made[name] = make(values)
    return made


@pytest.fixture(params=CONFIGS)
def encoder(request, encoders) -> Encoder:
    return encoders[request.param]


def noise(seed: int, size=(50, 40)) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "PNG")
    return out.getvalue()


def hiss(seconds: float) -> bytes:
    samples = round(8000 * seconds)
    return encode_wav(0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(samples)), 8000)


def some_inputs(encoder: Encoder) -> list[dict]:
    """Spans of every kind that the encoder reads."""
    inputs = []
    if encoder.processor.own_tokens:
        inputs += [{"text": "the red dog"}, {"text": " runs"}]
    elif "text" in encoder.processor.reads:
        inputs += [{"tokens": [1, 2, 3]}, {"tokens": [4]}]
    if "image" in encoder.processor.reads:
        inputs += [{"image": noise(0)}, {"image": noise(1, (20, 30))}]
    if "video" in encoder.processor.reads:
        inputs += [{"video": black_film()}, {"video": black_film()}]
    if "audio" in encoder.processor.reads:
        inputs += [{"audio": hiss(seconds)} for seconds in (0.3, 1.3, 0.01, 0.5)]
    if encoder.processor.reads == {"text", "image"}:
        inputs += [{"image": noise(2), "tokens": [5, 6]}]
    return inputs


def test_every_built_in_is_tested():
    assert {values["type"] for values in CONFIGS.values()} == set(ENCODERS.builtin)


def test_every_built_in_keeps_the_contract(encoder):
    check_encoder(encoder, some_inputs(encoder))


@pytest.mark.parametrize("trainable", ["all", "none", 1, 2])
def test_the_last_layers_alone_train(encoder, trainable):
    layers = encoder.layers()
    set_trainable(encoder, layers, trainable, "encoder")
    encoder.zero_grad()
    processor = encoder.processor
    states = encoder(**processor.collate([processor.load(one) for one in some_inputs(encoder)]).inputs)
    if trainable == "none":
        assert not states.requires_grad
        set_trainable(encoder, layers, "all", "encoder")
        return
    (states * torch.randn_like(states)).sum().backward()
    got = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    last = {id(p) for layer in layers[-trainable:] for p in layer.parameters()} if trainable != "all" else None
    expected = {n for n, p in encoder.named_parameters() if last is None or id(p) in last}
    assert got == expected  # nothing that counts as trained goes without a gradient
    stages = len(encoder.model.feature_info) if getattr(encoder, "convolutional", False) else 3
    assert len(layers) == (12 if isinstance(encoder, ENCODERS["open_clip"]) else stages)
    set_trainable(encoder, layers, "all", "encoder")


def normalised(encoder: Encoder, image: bytes, mean, std) -> torch.Tensor:
    """As the libraries do it, on a picture of the right size already."""
    pixels = encoder.processor.load({"image": image})["image"].float() / 255
    return ((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[None]


@pytest.mark.parametrize("name", ["timm ViT", "timm BEiT", "timm EVA-02", "timm DINOv2, registers", "timm SigLIP"])
def test_timm_states_are_timms(encoders, name):
    """The library's own model, without its class and register tokens."""
    encoder, values = encoders[name], CONFIGS[name]
    torch.manual_seed(0)
    model = timm.create_model(values["name"], img_size=values["image_size"], **values["arguments"]).eval()
    model.load_state_dict(encoder.model.state_dict(), strict=False)
    config = timm.data.resolve_model_data_config(model)
    with torch.no_grad():
        states = model.forward_features(normalised(encoder, noise(3), config["mean"], config["std"]))
        states = states[:, model.num_prefix_tokens :]
        ours = encoder(encoder.processor.load({"image": noise(3)})["image"][None])
    torch.testing.assert_close(ours, states, rtol=1e-4, atol=1e-5)
    assert ours.shape[1] == (values["image_size"] // int(values["name"].split("patch")[1][:2])) ** 2


@pytest.mark.parametrize("name, places", [("timm ResNet", 16), ("timm ConvNeXt", 4)])
def test_a_convolutional_networks_states_are_its_feature_map(encoders, name, places):
    encoder, values = encoders[name], CONFIGS[name]
    model = timm.create_model(values["name"], num_classes=0, **values.get("arguments", {})).eval()
    assert not model.load_state_dict(encoder.model.state_dict(), strict=False).unexpected_keys
    config = timm.data.resolve_model_data_config(model)
    with torch.no_grad():
        features_NDHW = model.forward_features(normalised(encoder, noise(3), config["mean"], config["std"]))
        ours = encoder(encoder.processor.load({"image": noise(3)})["image"][None])
    assert ours.shape == (1, places, encoder.width)
    torch.testing.assert_close(ours, features_NDHW.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_batch_norms_learn_in_the_weights_precision():
    """DeepSpeed casts weights to bfloat16 and leaves the statistics in float32."""
    encoder = make(CONFIGS["timm ResNet"]).train()
    before = encoder.model.bn1.running_mean.clone()
    for parameter in encoder.parameters():
        parameter.data = parameter.data.bfloat16()
    pixels = torch.stack([encoder.processor.load({"image": noise(n)})["image"] for n in range(2)])
    states = encoder(pixels)
    states.float().square().sum().backward()
    assert states.dtype == torch.bfloat16 and encoder.model.conv1[0].weight.grad.isfinite().all()
    assert not torch.equal(encoder.model.bn1.running_mean.float(), before)


def test_frozen_batch_norms_go_on_by_what_they_learned():
    encoder = make(CONFIGS["timm ResNet"])
    pixels = torch.stack([encoder.processor.load({"image": noise(n)})["image"] for n in range(2)])
    with torch.no_grad():
        expected = encoder(pixels)
        set_trainable(encoder, encoder.layers(), "none", "encoder")
        assert torch.equal(encoder.train()(pixels), expected)
        set_trainable(encoder, encoder.layers(), "all", "encoder")
        assert not torch.equal(encoder.train()(pixels), expected)


def fused(**changes) -> tuple[Encoder, dict]:
    """A fused encoder and what it reads of a picture with words, and of words alone."""
    encoder = make({**CONFIGS["fused"], **changes})
    spans = [{"image": noise(2), "tokens": [5, 6]}, {"tokens": [1, 2, 3]}]
    return encoder, encoder.processor.collate([encoder.processor.load(one) for one in spans]).inputs


@torch.no_grad()
def test_the_fused_encoder_takes_every_choice_of_a_stack():
    plain, inputs = fused(positions="rotary")
    turned, _ = fused(positions="rotary", rotary_base=50.0)
    turned.load_state_dict(plain.state_dict())
    assert not torch.allclose(turned(**inputs), plain(**inputs))
    wide, _ = fused(head_width=12, qk_norm=True)
    assert wide.blocks[0].attention.qkv.out_features == 3 * 2 * 12 and wide(**inputs).isfinite().all()
    wide.blocks[0].attention.query_norm.weight.mul_(3)
    assert not torch.equal(wide(**inputs), fused(head_width=12, qk_norm=True)[0](**inputs))


def test_the_fused_encoder_recomputes_its_activations():
    grads = []
    for again in (False, True):
        encoder, inputs = fused(activation_checkpointing=again)
        runs = []
        encoder.blocks[0].attention.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        encoder.train()(**inputs).square().sum().backward()
        assert len(runs) == 1 + again
        grads.append([parameter.grad for parameter in encoder.parameters()])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_open_clip_states_are_open_clips(encoders):
    encoder = encoders["open_clip"]
    model = open_clip.create_model("ViT-S-32-alt", force_image_size=64).visual.eval()
    model.load_state_dict(encoder.model.state_dict(), strict=False)
    model.output_tokens = True
    config = model.preprocess_cfg
    with torch.no_grad():
        tokens = model(normalised(encoder, noise(3), config["mean"], config["std"]))[1]
        ours = encoder(encoder.processor.load({"image": noise(3)})["image"][None])
    torch.testing.assert_close(ours, tokens, rtol=1e-4, atol=1e-5)


def same_states(one: Encoder, other: Encoder) -> bool:
    pixels = one.processor.load({"image": noise(4)})["image"][None]
    with torch.no_grad():
        return torch.equal(one(pixels), other(pixels))


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_timm_checkpoints_load(tmp_path, form):
    """A file as timm's training writes it or as timm publishes it, with a classifier."""
    from safetensors.torch import save_file

    torch.manual_seed(1)
    published = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_classes=7).eval()
    path = tmp_path / f"model.{form}"
    if form == "pth":
        torch.save({"state_dict": published.state_dict()}, path)
    else:
        save_file(published.state_dict(), path)
    loaded = make({**VIT, "arguments": {**VIT["arguments"], "checkpoint_path": str(path)}})
    assert not same_states(loaded, make(VIT))
    pixels = loaded.processor.load({"image": noise(4)})["image"][None]
    with torch.no_grad():
        expected = published.forward_features(loaded.normalize(pixels))[:, 1:]
        torch.testing.assert_close(loaded(pixels), expected, rtol=0, atol=0)


def test_timm_checkpoints_adapt_to_the_image_size(tmp_path):
    published = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=3, embed_dim=24)
    torch.save(published.state_dict(), tmp_path / "48.pth")
    loaded = make({**VIT, "arguments": {**VIT["arguments"], "checkpoint_path": str(tmp_path / "48.pth")}})
    assert torch.equal(loaded.model.blocks[2].mlp.fc1.weight, published.blocks[2].mlp.fc1.weight)
    assert loaded.model.pos_embed.shape == (1, 1 + 4, 24)
    assert torch.equal(loaded.model.pos_embed[:, 0], published.pos_embed[:, 0])


@pytest.mark.parametrize("depth, message", [(2, "lacks blocks.2"), (4, "has blocks.3"), (0, "cannot be loaded")])
def test_a_checkpoint_of_another_model_is_refused(tmp_path, depth, message):
    path = tmp_path / "model.pth"
    if depth:
        torch.save(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=depth, embed_dim=24).state_dict(), path)
    else:
        path.write_bytes(b"no checkpoint")
    with pytest.raises(ConfigError, match=message):
        make({**VIT, "arguments": {**VIT["arguments"], "checkpoint_path": str(path)}})


def test_open_clip_checkpoints_load(tmp_path):
    """A file as open_clip's training writes it: both towers, in a dict with the epoch, under DDP's prefix."""
    torch.manual_seed(1)
    published = open_clip.create_model("ViT-S-32-alt", force_image_size=64)
    weights = {f"module.{name}": tensor for name, tensor in published.state_dict().items()}
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "name": "run", "state_dict": weights}, path)
    loaded = make({**CLIP, "pretrained": str(path)})
    assert not same_states(loaded, make(CLIP))
    published.visual.output_tokens = True
    pixels = loaded.processor.load({"image": noise(4)})["image"][None]
    with torch.no_grad():
        expected = published.visual.eval()(loaded.normalize(pixels))[1]
        torch.testing.assert_close(loaded(pixels), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "values, message",
    [
        ({**VIT, "name": "vit_tinny_patch16_224"}, "did you mean 'vit_tiny_patch16_224'"),
        ({**VIT, "name": "swin_tiny_patch4_window7_224", "arguments": {"depths": 1}}, "swin_tiny"),
        ({"type": "timm", "name": "swin_tiny_patch4_window7_224"}, "swin_tiny_patch4_window7_224' gives no patch states"),
        ({**VIT, "arguments": {"dept": 2}}, r"does not take these arguments: .*'dept'"),
        ({**VIT, "arguments": {"checkpoint_path": "/no/such.pth"}}, r"/no/such\.pth' cannot be loaded"),
        ({**CLIP, "name": "ViT-S-32-allt"}, "no model 'ViT-S-32-allt'; did you mean 'ViT-S-32-alt'"),
        ({**CLIP, "pretrained": "laion"}, "'laion' is not a known tag or valid file path"),
        ({**CLIP, "pretrained": "/no/such.pt"}, r"'/no/such\.pt' is not a known tag or valid file path"),
        ({"type": "open_clip", "name": "RN50"}, "is no plain ViT; for timm towers use type: timm"),
        ({"type": "text", "layers": 1, "width": 8, "heads": 1}, "vocab_size is not set"),
        ({"type": "fused", "layers": 1, "width": 8, "heads": 1}, "vocab_size is not set"),
        ({**CONFIGS["fused"], "patch_size": 5}, "image_size 16 is no multiple of patch_size 5"),
        ({**CONFIGS["vit"], "patch_size": 0}, "image_size 16 is no multiple of patch_size 0"),
        ({**CONFIGS["vit"], "image_size": 0}, "image_size 0 is no multiple of patch_size 8"),
        ({**CONFIGS["vit"], "max_positions": 64}, "max_positions is not for patches"),
        ({**CONFIGS["vit"], "relative_bias": True}, "relative_bias is not for patches"),
        ({**CONFIGS["fused"], "relative_bias": True}, "relative_bias is not for the fused encoder"),
    ],
)
def test_what_cannot_be_is_refused(values, message, capsys):
    with pytest.raises(ConfigError, match=message):
        make(values)


def test_a_tower_that_pools_its_patches_is_refused():
    """CoCa's attention pooling gives 255 states whatever the picture; read as patches, they would be another's."""
    encoder = make({"type": "open_clip", "name": "coca_ViT-B-32", "image_size": 32})
    with pytest.raises(ConfigError, match="one for each of its patches"):
        encoder(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["text", "fused"])
def test_texts_too_long_for_an_encoder_are_refused(encoders, name):
    processor = encoders[name].processor
    limit = processor.max_positions
    assert processor.num_states({"tokens": [1] * limit}) == limit
    with pytest.raises(DataError, match=f"does not fit the encoder's max_positions={limit}"):
        processor.num_states({"tokens": [1] * (limit + 1)})


@pytest.mark.parametrize("name", ["timm ViT", "open_clip"])
def test_towers_build_without_memory(name):
    with torch.device("meta"):
        encoder = make(CONFIGS[name])
    assert all(parameter.is_meta for parameter in encoder.parameters())
    assert encoder(torch.zeros(2, 3, *[encoder.processor.image_size] * 2, device="meta")).shape[1:] == (4, encoder.width)


def test_broken_pictures_are_data_errors(encoders):
    for encoder in encoders.values():
        if "image" in encoder.processor.reads:
            with pytest.raises(DataError, match="not a complete picture"):
                encoder.processor.load({"image": noise(0)[:200]})


class Miscounting(TextProcessor):
    def num_states(self, inputs: dict) -> int:
        return len(inputs["tokens"]) + 1


class Broken(ENCODERS["text"]):
    """A text encoder with a defect, by its name."""

    def __init__(self, defect: str):
        torch.manual_seed(0)
        super().__init__(build(self.Config, CONFIGS["text"], "test"))
        self.defect = defect
        if defect == "idle":
            self.idle = torch.nn.Parameter(torch.zeros(1))
        if defect == "count":
            self.processor = Miscounting(64)
        if defect == "width":
            self.width += 1

    def forward(self, tokens_RS, span_RS, position_RS):
        span_RS = torch.ones_like(span_RS) if self.defect == "leak" else span_RS
        states = super().forward(tokens_RS, span_RS, position_RS)
        return states / 0 if self.defect == "infinite" else states


@pytest.mark.parametrize(
    "defect, message",
    [
        ("idle", r"get no gradient: idle"),
        ("count", "source names 4 states, num_states announces 6"),
        ("width", r"not \[rows, positions, width=17\]"),
        ("leak", "a span's states depend on the batch"),
        ("infinite", "not finite"),
    ],
)
def test_what_breaks_the_contract_is_said(defect, message):
    encoder = Broken(defect)
    with pytest.raises(AssertionError, match=message):
        check_encoder(encoder, [{"tokens": [1, 2, 3]}, {"tokens": [4]}])
