"""Linear maps laid out for inference: packed weights change nothing, rounded ones are half a step away at most."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model
from torch import nn

from metalm.errors import ConfigError
from metalm.nn.linear import FEW_ROWS, Int4Linear, Int8Linear, PackedLinear, int4_or_int8


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
    x = torch.randn(FEW_ROWS + 1, 64).to(dtype)
    expected = F.linear(x.double(), linear.steps_OI * linear.scale_O.double()[:, None], bias.double() if with_bias else None)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(linear(x).double(), expected, **tolerance)  # as floats
    torch.testing.assert_close(linear(x[:-1].view(2, -1, 64)).flatten(0, 1).double(), expected[:-1], **tolerance)  # as they are


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_a_row_of_zeros_stays_one(kind):
    linear = kind(torch.zeros(16, 32))
    assert torch.equal(linear(torch.ones(1, 32)), torch.zeros(1, 16))


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
    expected = F.linear(x.double(), linear.weight.double(), bias.double() if with_bias else None)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(linear(x).double(), expected, **tolerance)


def test_maps_that_do_not_suit_4_bits_take_8():
    assert isinstance(int4_or_int8(torch.randn(16, 32)), Int4Linear)
    for size in ((17, 32), (16, 40)):
        assert isinstance(int4_or_int8(torch.randn(*size)), Int8Linear)


def test_int4_on_another_device_is_refused():
    decoder = tiny_model(30).to("meta").decoder
    with pytest.raises(ConfigError, match="int4 weights are for the CPU, this is meta"):
        decoder.prepare_for_inference("int4")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.bfloat16, PackedLinear),
        (torch.float32, nn.Linear),
        (torch.float32, Int8Linear),
        (torch.float32, Int4Linear),
        (torch.bfloat16, Int4Linear),
    ],
)
def test_a_decoder_is_laid_out_as_a_whole(dtype, kind, tied):
    decoder = tiny_model(30, positions="rotary", tied=tied).to(dtype).decoder
    tokens, positions = torch.arange(12).view(2, 6), torch.arange(6).expand(2, 6)
    with torch.no_grad():
        before = decoder.logits(decoder(decoder.embed(tokens), positions))
        decoder.prepare_for_inference({Int8Linear: "int8", Int4Linear: "int4"}.get(kind, "as they are"))
        after = decoder.logits(decoder(decoder.embed(tokens), positions))
    kinds = nn.Linear | PackedLinear | Int8Linear | Int4Linear
    maps = [module for module in decoder.modules() if isinstance(module, kinds)]
    assert {type(module) for module in maps} == ({Int4Linear, Int8Linear} if kind is Int4Linear else {kind})
    assert len(maps) == 2 * 4 + (not tied or kind is not nn.Linear)
    if kind is nn.Linear:
        assert torch.equal(before, after)
    else:
        share = 0.3 if kind is Int4Linear else 0.1
        assert (after - before).float().abs().mean() < share * before.float().abs().mean()
    if kind is Int8Linear:  # evaluations read the matrix itself
        hidden = torch.randn(3, 32)
        torch.testing.assert_close(decoder.logits(hidden), F.linear(hidden, decoder.softmax_weight))
