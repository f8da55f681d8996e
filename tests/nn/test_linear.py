"""Linear maps laid out for inference: packed weights change nothing, rounded ones are half a step away at most."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model
from torch import nn

from metalm.errors import ConfigError
from metalm.nn import linear as layouts
from metalm.nn.attention import soft_cap
from metalm.nn.linear import (
    FEW_INT8_ROWS,
    FEW_ROWS,
    Int4Linear,
    Int8Linear,
    Int8Products,
    PackedLinear,
    has_fbgemm,
    int4_or_int8,
)

needs_fbgemm = pytest.mark.skipif(not has_fbgemm(), reason="this torch has no FBGEMM")


def weights(outputs: int, inputs: int, dtype: torch.dtype):
    torch.manual_seed(0)
    return (torch.randn(outputs, inputs) * torch.rand(outputs, 1)).to(dtype), torch.randn(outputs).to(dtype)


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_weights_give_what_plain_ones_give(rows, with_bias):
    weight, bias = weights(24, 40, torch.bfloat16)
    bias = bias if with_bias else None
    packed, x = PackedLinear(weight, bias), torch.randn(2, rows, 40).bfloat16()
    assert torch.equal(packed.weight, weight)
    torch.testing.assert_close(
        packed(x).float(), F.linear(x.float(), weight.float(), None if bias is None else bias.float()), rtol=1e-2, atol=5e-2
    )


@needs_fbgemm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_few_rows_are_read_in_float16_and_multiplied_in_float32(dtype, with_bias):
    weight, bias = weights(24, 40, torch.bfloat16)
    packed, x = PackedLinear(weight, bias if with_bias else None), torch.randn(2, FEW_ROWS // 2, 40).to(dtype)
    exact = F.linear(x.double(), weight.double(), bias.double() if with_bias else None).to(dtype)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(packed(x), exact, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("reason", ["no FBGEMM", "beyond float16"])
def test_where_float16_cannot_be_the_other_layout_serves_all(monkeypatch, reason):
    weight, _ = weights(24, 40, torch.bfloat16)
    if reason == "beyond float16":
        weight[3, 5] = 70000
    else:
        monkeypatch.setattr(layouts, "has_fbgemm", lambda: False)
    packed, x = PackedLinear(weight), torch.randn(2, 40).bfloat16()
    assert packed.half is None
    torch.testing.assert_close(packed(x).float(), F.linear(x.float(), weight.float()), rtol=1e-2, atol=5e-2)


@needs_fbgemm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_of_integers_are_half_a_step_of_each_row_away_at_most(dtype, with_bias):
    weight, bias = weights(24, 40, dtype)
    linear = Int8Products(weight, bias if with_bias else None)
    step_O = weight.double().abs().amax(1) / 127
    rounding = {torch.bfloat16: 2**-8, torch.float32: 2**-20}[dtype] * weight.double().abs()
    assert ((linear.weight.double() - weight.double()).abs() <= step_O[:, None] / 2 + rounding).all()
    x = (torch.randn(2, 7, 40) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)  # each row has a scale of its own
    rounded_OI = (linear.weight.double() / step_O[:, None]).round() * step_O[:, None]
    exact = F.linear(x.double(), rounded_OI, bias.double() if with_bias else None)
    step = 2.02 * x.double().abs().amax(-1, keepdim=True) / (127 if linear.fewer_bits else 255)
    allowed = step / 2 * rounded_OI.abs().sum(1) + 2**-7 * exact.abs() + 1e-6
    assert ((linear(x).double() - exact).abs() <= allowed).all()
    assert ((linear(x).double() - exact).abs() > allowed / 1000).any()


@needs_fbgemm
def test_a_row_of_integers_is_the_same_alone_and_beside_others():
    weight, bias = weights(24, 40, torch.bfloat16)
    linear, x = Int8Products(weight, bias), torch.randn(6, 40).bfloat16()
    x[0] = x[0].abs()  # its least is not minus its largest
    assert torch.equal(linear(x), torch.cat([linear(row[None]) for row in x]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_int8_weights_are_half_a_step_away_at_most(dtype):
    weight, _ = weights(24, 40, dtype)
    found = Int8Linear(weight)
    step = found.scale_O.double()[:, None]
    rounding = {torch.bfloat16: 2**-8, torch.float32: 2**-22}.get(dtype, 1e-14) * weight.abs().amax(1, keepdim=True)
    assert ((found.steps_OI * step - weight).abs() <= step / 2 + rounding.double()).all()
    assert found.steps_OI.abs().max() == 127


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_reading_int8_weights_equals_turning_them_into_floats(dtype, with_bias):
    weight, bias = weights(32, 64, dtype)
    linear = Int8Linear(weight, bias if with_bias else None)
    x = torch.randn(FEW_INT8_ROWS + 1, 64).to(dtype)
    expected = F.linear(x.double(), linear.steps_OI * linear.scale_O.double()[:, None], bias.double() if with_bias else None)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(linear(x).double(), expected, **tolerance)  # as floats
    torch.testing.assert_close(linear(x[:-1].view(2, -1, 64)).flatten(0, 1).double(), expected[:-1], **tolerance)  # as they are


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear, pytest.param(Int8Products, marks=needs_fbgemm)])
def test_a_row_of_zeros_stays_one(kind):
    linear = kind(torch.zeros(16, 32))
    assert torch.equal(linear(torch.ones(1, 32)), torch.zeros(1, 16))
    if kind is Int8Products:
        linear = kind(torch.ones(16, 32))
        assert torch.equal(linear(torch.zeros(1, 32)), torch.zeros(1, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("inputs", "group"), [(128, 64), (96, 32)])
def test_int4_weights_are_half_a_step_away_at_most_within_their_group(dtype, inputs, group):
    weight, _ = weights(32, inputs, dtype)
    linear = Int4Linear(weight)
    assert linear.group == group
    grouped = weight.double().view(32, -1, group)
    step = (grouped.amax(-1) - grouped.amin(-1)) / 15
    rounding = {torch.bfloat16: 2**-6, torch.float32: 2**-10}[dtype] * grouped.abs().amax(-1)  # of scale, zero and product
    distance = (linear.weight.double().view(32, -1, group) - grouped).abs().amax(-1)
    assert (distance <= step / 2 + rounding).all()
    assert (distance > step / 8).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_reading_int4_weights_equals_turning_them_into_floats(dtype, rows, with_bias):
    weight, bias = weights(48, 64, dtype)
    linear, x = Int4Linear(weight, bias if with_bias else None), torch.randn(2, rows, 64).to(dtype)
    low, high = (bound(weight.float(), dim=1, keepdim=True) for bound in (torch.amin, torch.amax))  # one group of 64
    scale = ((high - low) / 15).to(dtype).float()
    zero = (low + 8 * scale).to(dtype).float()
    steps = ((weight.float() - zero) / scale + 8).round().clamp(0, 15)
    rounded = (zero + scale * (steps - 8)).double()
    expected = F.linear(x.double(), rounded, bias.double() if with_bias else None)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(linear(x).double(), expected, **tolerance)


@pytest.mark.parametrize("kind", [PackedLinear, Int8Linear, int4_or_int8, pytest.param(Int8Products, marks=needs_fbgemm)])
@pytest.mark.parametrize("outputs", [1, 7, 16, 48, 100])
@pytest.mark.parametrize("inputs", [1, 7, 24, 48, 64, 100, 344])
def test_maps_of_any_size_are_what_their_weights_say(kind, outputs, inputs):
    """The kernel for int8 weights reads beyond the end where it does not suit the inputs' number."""
    weight, _ = weights(outputs, inputs, torch.bfloat16)
    linear = kind(weight)
    for rows in (1, 5, 20):
        x = torch.randn(rows, inputs).bfloat16()
        expected = F.linear(x.double(), linear.weight.double())
        step = x.double().abs().amax(1, keepdim=True) / (127 if getattr(linear, "fewer_bits", False) else 255)
        allowed = 2**-7 * expected.abs() + 2**-8 * linear.weight.double().abs().amax(1) * inputs**0.5 + 1e-3
        if isinstance(linear, Int8Products):
            allowed = allowed + 1.05 * step * linear.weight.double().abs().sum(1)
        assert ((linear(x).double() - expected).abs() <= allowed).all()


def test_maps_that_do_not_suit_4_bits_take_8():
    assert isinstance(int4_or_int8(torch.randn(16, 32)), Int4Linear)
    for size in ((17, 32), (16, 40)):
        assert isinstance(int4_or_int8(torch.randn(*size)), Int8Linear)


@pytest.mark.parametrize("weights", ["int4", "w8a8"])
def test_products_of_the_cpu_are_refused_on_another_device(weights):
    decoder = tiny_model(30).to("meta").decoder
    with pytest.raises(ConfigError, match=f"{weights} is for the CPU, this is meta: take int8"):
        decoder.prepare_for_inference(weights)


def test_w8a8_is_refused_without_its_products(monkeypatch):
    monkeypatch.setattr("metalm.decoder.has_fbgemm", lambda: False)
    with pytest.raises(ConfigError, match="w8a8 needs FBGEMM"):
        tiny_model(30).decoder.prepare_for_inference("w8a8")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.bfloat16, PackedLinear),
        (torch.float32, nn.Linear),
        (torch.float32, Int8Linear),
        (torch.float32, Int4Linear),
        (torch.bfloat16, Int8Linear),
        (torch.bfloat16, Int4Linear),
        pytest.param(torch.float32, Int8Products, marks=needs_fbgemm),
        pytest.param(torch.bfloat16, Int8Products, marks=needs_fbgemm),
    ],
)
def test_a_decoder_is_laid_out_as_a_whole(dtype, kind, tied):
    decoder = tiny_model(30, positions="rotary", tied=tied).to(dtype).decoder
    tokens, positions = torch.arange(12).view(2, 6), torch.arange(6).expand(2, 6)
    with torch.no_grad():
        before = decoder.logits(decoder(decoder.embed(tokens), positions))
        decoder.prepare_for_inference({Int8Linear: "int8", Int4Linear: "int4", Int8Products: "w8a8"}.get(kind, "as they are"))
        after = decoder.logits(decoder(decoder.embed(tokens), positions))
        few = decoder.logits(decoder(decoder.embed(tokens[:, :4]), positions[:, :4]))
    kinds = nn.Linear | PackedLinear | Int8Linear | Int4Linear | Int8Products
    maps = [module for module in decoder.modules() if isinstance(module, kinds)]
    assert {type(module) for module in maps} == ({Int4Linear, Int8Linear} if kind is Int4Linear else {kind})
    assert len(maps) == 2 * 4 + (not tied or kind is not nn.Linear)
    if kind is nn.Linear:
        assert torch.equal(before, after)
    else:
        share = 0.3 if kind is Int4Linear else 0.1
        for own, plain in ((after, before), (few, before[:, :4])):
            assert (own - plain).float().abs().mean() < share * plain.float().abs().mean()
    if kind is Int8Linear:
        hidden = torch.randn(3, 32).to(dtype)
        whole = F.linear(hidden.double(), decoder.softmax_weight.double())
        rounding = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(decoder.logits(hidden).double(), whole, rtol=rounding, atol=rounding)


@needs_fbgemm
@pytest.mark.parametrize("choices", [{}, {"norm": "rms", "mlp": "swiglu", "qk_norm": True, "kv_heads": 2}, {"post_norm": True}])
def test_states_of_few_rows_are_those_of_float32(choices):
    """Weights of bfloat16 and nothing else is rounded; a prompt of more rows is read in bfloat16."""
    torch.manual_seed(0)
    decoder = tiny_model(30, positions="rotary", **choices).bfloat16().decoder
    exact = copy.deepcopy(decoder).float()
    decoder.prepare_for_inference()
    tokens, positions = torch.arange(16).view(2, 8), torch.arange(8).expand(2, 8)
    with torch.inference_mode():
        few, whole, expected = (
            one.logits(one(one.embed(tokens[:, :n]), positions[:, :n])) for one, n in ((decoder, 4), (decoder, 8), (exact, 8))
        )
    assert (few.dtype, whole.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(few, expected[:, :4], rtol=1e-5, atol=1e-5)
    assert (whole - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("chunk", [1, 60, 1 << 24])
def test_nats_of_tokens_are_those_of_the_loss(monkeypatch, softcap, chunk):
    monkeypatch.setattr("metalm.decoder.CHUNK_LOGITS", chunk)
    decoder = tiny_model(30, positions="rotary", logit_softcap=softcap).double().decoder
    hidden, targets = torch.randn(7, 32, dtype=torch.float64), torch.arange(7)
    expected = -soft_cap(hidden @ decoder.softmax_weight.T, softcap).log_softmax(-1)[range(7), targets]
    torch.testing.assert_close(decoder.nats(hidden, targets), expected)
    assert decoder.nats(hidden[:0], targets[:0]).shape == (0,)


@pytest.mark.parametrize("weights", ["as they are", "int8", "int4", pytest.param("w8a8", marks=needs_fbgemm)])
def test_nats_are_of_the_weights_as_laid_out_and_capped_exactly(weights):
    torch.manual_seed(0)
    decoder = tiny_model(30, positions="rotary", logit_softcap=30.0).bfloat16().decoder
    decoder.prepare_for_inference(weights)
    hidden, targets = (8 * torch.randn(30, 32)).bfloat16(), torch.arange(30)
    with torch.no_grad():
        scores = decoder.scores(hidden).double()
    expected = -soft_cap(scores, 30.0).log_softmax(-1)[range(30), targets]
    assert expected.max() > 10  # where bfloat16's steps are an eighth
    torch.testing.assert_close(decoder.nats(hidden, targets).double(), expected, rtol=1e-5, atol=1e-5)
