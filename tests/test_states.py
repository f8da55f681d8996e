"""Stored states stand for a frozen encoder: the same positions, loss and gradients, and it never runs."""

from __future__ import annotations

import io
import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from metalm.config import build
from metalm.data.audio import encode_wav
from metalm.data.prompts import Interface
from metalm.data.sample import Sample, sample_from_members, sample_to_members
from metalm.data.states import pack_states, unpack_states
from metalm.data.views import View
from metalm.errors import ConfigError, DataError
from metalm.evaluation.blind import blank
from metalm.fingerprint import fingerprint, fingerprints
from metalm.model import MetaLM, MetaLMConfig
from metalm.nn.freezing import is_frozen
from metalm.segments import Batch, Document, Span, Text, make_batch
from metalm.training.loop import lasting_encoders

SIZE = {"layers": 2, "width": 16, "heads": 2}
WAV2VEC2 = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [[8, 10, 5], [8, 3, 2]],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 16,
    "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 8,
    "encoder_pos_conv_groups": 2,
    "encoder_num_layers": 1,
    "encoder_num_heads": 2,
    "encoder_attention_dropout": 0.1,
    "encoder_ff_interm_features": 32,
    "encoder_ff_interm_dropout": 0.1,
    "encoder_dropout": 0.1,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.0,
    "aux_num_out": None,
}
ENCODERS = {
    "vit": {"type": "vit", **SIZE, "image_size": 16, "patch_size": 8, "dropout": 0.1},
    "timm": {
        "type": "timm",
        "name": "vit_tiny_patch16_224",
        "image_size": 32,
        "tiles": 2,
        "arguments": {"embed_dim": 32, "depth": 1, "num_heads": 2, "drop_path_rate": 0.5},
    },
    "log_mel": {"type": "log_mel", **SIZE, "sample_rate": 8000, "chunk_seconds": 0.2},
    "speech": {"type": "speech", "name": "wav2vec2_model", "arguments": WAV2VEC2, "chunk_seconds": 0.02},
}
PERCEIVER = {"type": "perceiver", "latents": 3, "heads": 2}


def make_model(kind: str, connector: dict | None = None, **changes) -> MetaLM:
    torch.manual_seed(0)
    encoder = ENCODERS[kind] | {"trainable": "none", "connector": connector or {"type": "linear"}} | changes
    values = {"decoder": {**SIZE, "vocab_size": 40, "max_positions": 256}, "encoders": {"sense": encoder}}
    return MetaLM(build(MetaLMConfig, values, "test"))


def picture(seed: int, width: int, height: int) -> bytes:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "PNG")
    return out.getvalue()


def hiss(samples: int) -> bytes:
    return encode_wav(0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(samples)), 8000)


def make_samples(model: MetaLM) -> list[Sample]:
    """Two pictures of unequal shape and an album, or two sounds, the longer one of several chunks."""
    if "image" in model.processors["sense"].reads:
        album = Sample("c", picture(3, 20, 20), ["c"], more_images=[picture(4, 40, 20)])
        return [Sample("a", picture(1, 64, 20), ["a"]), Sample("b", picture(2, 30, 30), ["b"]), album]
    return [Sample("a", audio=hiss(4700), captions=["a"]), Sample("b", audio=hiss(800), captions=["b"])]


@torch.no_grad()
def with_states(model: MetaLM, samples: list[Sample], dtype: torch.dtype = torch.float32) -> list[Sample]:
    """The samples with the states of each medium in its place, written to a shard's members and read from them."""
    encoder, stored = model.encoders["sense"], []
    [kind] = encoder.processor.reads
    encoder.eval()
    for sample in samples:
        media = []
        for data in sample.encoded[kind]:
            collated = encoder.processor.collate([encoder.processor.load({kind: data})])
            media.append(encoder(**collated.inputs).flatten(0, 1)[collated.source].to(dtype))
        states = {kind: unpack_states(pack_states(media, fingerprints(model)["sense"]))}
        stored.append(Sample(sample.key, captions=sample.captions, states=states))
    encoder.train()
    return [sample_from_members(sample_to_members(sample)) for sample in stored]


def make_interface(model: MetaLM, frozen: bool = True) -> Interface:
    interface = Interface(None, model.processors, {"sense": model.config.encoders["sense"].connector}, 256)
    interface.fingerprints = fingerprints(model, frozen)
    return interface


def documents(interface: Interface, samples: list[Sample]) -> list[Document]:
    rng = random.Random(0)
    return [
        interface.load(Document([*interface.read(sample.media, []), Text([rng.randrange(40) for _ in range(5)])], sample.key))
        for sample in samples
    ]


def batch_of(model: MetaLM, samples: list[Sample]) -> Batch:
    found = documents(make_interface(model), samples)
    return make_batch([found[:1], found[1:]], model.processors)


def loss_and_gradients(model: MetaLM, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model.train()(batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_as_precise(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, but for float32's rounding in sums of terms as large as the largest."""
    assert (found - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 0.1)


def count_runs(model: MetaLM) -> list:
    runs: list = []
    model.encoders["sense"].register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("connector", [{"type": "linear"}, PERCEIVER], ids=["linear", "perceiver"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_loss_and_gradients_on_stored_states_are_those_on_media(kind, connector):
    model = make_model(kind, connector)
    samples = make_samples(model)
    raw, stored = batch_of(model, samples), batch_of(model, with_states(model, samples))
    for name in ("tokens_BT", "document_BT", "position_BT", "places_L", "targets_L"):
        assert torch.equal(getattr(raw, name), getattr(stored, name))
    assert torch.equal(raw.spans["sense"].positions, stored.spans["sense"].positions)

    runs = count_runs(model)
    expected, gradients = loss_and_gradients(model, raw)
    assert len(runs) == 1
    loss, own = loss_and_gradients(model, stored)
    assert len(runs) == 1, "the encoder ran on stored states"
    assert loss == pytest.approx(expected, rel=1e-6)
    assert own.keys() == gradients.keys() and any(name.startswith("connectors.") for name in own)
    assert not any(name.startswith("encoders.") for name in own)
    for name, gradient in gradients.items():
        assert_as_precise(own[name], gradient)

    rounded, _ = loss_and_gradients(model, batch_of(model, with_states(model, samples, torch.bfloat16)))
    assert rounded == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("connector", [{"type": "linear"}, PERCEIVER], ids=["linear", "perceiver"])
@pytest.mark.parametrize("kind", ["timm", "log_mel"])
def test_media_and_stored_states_mix_in_a_batch(kind, connector):
    model = make_model(kind, connector)
    samples = make_samples(model)
    expected, gradients = loss_and_gradients(model, batch_of(model, samples))
    for n in range(len(samples)):
        some = [*samples[:n], *with_states(model, samples[n : n + 1]), *samples[n + 1 :]]
        batch = batch_of(model, some)
        assert batch.spans["sense"].stored is not None and batch.spans["sense"].inputs
        loss, own = loss_and_gradients(model, batch)
        assert loss == pytest.approx(expected, rel=1e-6)
        for name, gradient in gradients.items():
            assert_as_precise(own[name], gradient)


def test_a_frozen_encoder_keeps_nothing_for_a_backward_pass_and_drops_nothing_out():
    model = make_model("vit").train()
    batch = batch_of(model, make_samples(model))
    encoder, kept = model.encoders["sense"], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        states = model.states("sense", batch.spans["sense"])
    assert is_frozen(encoder) and not encoder.training and not kept and not states.requires_grad
    assert torch.equal(states, model.states("sense", batch.spans["sense"]))
    model.dock("sense", batch.spans["sense"]).sum().backward()
    assert all(p.grad is not None for p in model.connectors.parameters())

    encoder.requires_grad_(True)
    assert model.train().encoders["sense"].training and model.states("sense", batch.spans["sense"]).requires_grad


def test_a_batch_without_the_modality_and_a_partly_frozen_encoder_go_on_as_before():
    for trainable in ("none", 1, "all"):
        model = make_model("vit", trainable=trainable)
        _, gradients = loss_and_gradients(model, make_batch([[Document([Text([1, 2, 3])])]], model.processors))
        assert {name for name, p in model.named_parameters() if p.requires_grad} == gradients.keys()
        assert all((g == 0).all() for name, g in gradients.items() if not name.startswith("decoder."))


def test_an_encoder_in_parts_runs_on_a_blank_for_all_processes_must_gather_it_together():
    """As under ZeRO-3, whose mark its weights bear; the loss is the same."""
    model = make_model("vit")
    batch = batch_of(model, with_states(model, make_samples(model)))
    expected, _ = loss_and_gradients(model, batch)
    runs = count_runs(model)
    for parameter in model.encoders.parameters():
        parameter.ds_id = 0
    assert loss_and_gradients(model, batch)[0] == pytest.approx(expected, rel=1e-6) and len(runs) == 1


def test_another_encoder_one_that_trains_and_views_are_refused():
    model = make_model("timm")
    sample = with_states(model, make_samples(model))[0]
    interface = make_interface(model)
    assert len(interface.read(sample.media, [])[0]) == interface.connectors["sense"].num_vectors(12)

    with pytest.raises(
        ConfigError, match=r"'sense' would soon make others: it trains.* model\.encoders\.sense\.trainable=none"
    ):
        make_interface(make_model("timm", trainable=1)).read(sample.media, [])
    other = make_model("timm", layer=1)
    with pytest.raises(ConfigError, match=r"this model's 'sense' is .*encode them anew by `metalm data encode`"):
        make_interface(other).read(sample.media, [])
    interface.views = {"image": View(0, 0, 0.5, 1)}
    with pytest.raises(ConfigError, match="leave crop, mirror, pad, noise and perturb out of the source"):
        interface.read(sample.media, [])


def test_a_fingerprint_is_that_of_what_makes_the_states():
    """Neither how a model uses the encoder nor rounding to bfloat16 changes it; a weight, a layer or a size does."""
    model = make_model("timm")
    encoder, config = model.encoders["sense"], model.config.encoders["sense"]
    own = fingerprint(encoder, config)
    used_otherwise = make_model("timm", PERCEIVER, trainable="all")
    used_otherwise.encoders["sense"].load_state_dict(encoder.state_dict())
    assert fingerprint(used_otherwise.encoders["sense"], used_otherwise.config.encoders["sense"]) == own
    for changes in ({"tiles": 1}, {"layer": 1}):
        assert fingerprints(make_model("timm", **changes))["sense"] != own
    assert fingerprint(encoder.bfloat16(), config) == own == fingerprint(encoder.float(), config)
    with torch.no_grad():
        encoder.model.norm.bias[0] += 0.01
    assert fingerprint(encoder, config) != own


def test_torn_states_and_too_few_of_them_are_named():
    model = make_model("vit")
    sample = make_samples(model)[2]
    [stored] = with_states(model, [sample])
    members = sample_to_members(stored)
    assert sample_from_members(members).states == stored.states
    whole = members["image.safetensors"]
    for torn in (whole[:-1], whole[:40], b"", b"{}" * 20, whole.replace(b'"encoder"', b'"Encoder"')):
        with pytest.raises(DataError, match="sample 'c': stored states that cannot be read"):
            sample_from_members(members | {"image.safetensors": torn})
    one = pack_states([stored.states["image"][0].tensor()], "x")
    with pytest.raises(DataError, match=r"sample 'c': stored states of 1 media \(image\), and 2 are there"):
        sample_from_members(sample_to_members(sample) | {"image.safetensors": one})


def test_blind_evaluation_blanks_media_and_refuses_where_there_are_states_alone():
    model = make_model("vit")
    sample = make_samples(model)[0]
    [stored] = with_states(model, [sample])
    both = Sample("a", sample.image, ["a"], states=stored.states)
    assert both.media != sample.media and blank(both).media == blank(sample).media
    with pytest.raises(ConfigError, match="here are stored states alone"):
        blank(stored)


def test_what_branches_off_stored_states_reads_them_once():
    model = make_model("vit")
    [stored] = with_states(model, make_samples(model)[:1])
    interface = make_interface(model)
    turns = [[*interface.read(stored.media, []), Text([n, n])] for n in (1, 2)]
    [document] = interface.documents(turns, "a")
    assert len(document.branches) == 2 and isinstance(document.segments[0], Span)
    batch = make_batch([[interface.load(document)]], model.processors)
    assert len(batch.spans["sense"].stored) == 4


def test_a_teacher_of_another_encoder_would_misread_the_states():
    model = make_model("vit")
    model.taught_by = SimpleNamespace(teacher=make_model("vit", trainable="all"))
    assert lasting_encoders(model) == fingerprints(model)
    with torch.no_grad():
        model.taught_by.teacher.encoders["sense"].patches.map.bias[0] += 1
    assert lasting_encoders(model) == {}
