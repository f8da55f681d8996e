"""Products in 8-bit floats, emulated, which needs no GPU: near those in bfloat16, and training still learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metalm.config import build
from metalm.decoder import CausalDecoder, DecoderConfig
from metalm.errors import ConfigError
from metalm.training.config import TrainingConfig, load_run_config
from metalm.training.engine import make_engine, setup_distributed
from metalm.training.fp8 import use_fp8

pytest.importorskip("torchao")
SHAPE = {"layers": 2, "width": 64, "heads": 4, "norm": "rms", "mlp": "swiglu", "positions": "rotary", "vocab_size": 50}


def decoder(**changed) -> CausalDecoder:
    torch.manual_seed(0)
    return CausalDecoder(build(DecoderConfig, SHAPE | changed, "test")).bfloat16()


def loss(model: CausalDecoder, tokens_BT: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)
    logits = model.logits(model(model.embed(tokens_BT), positions)).float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())


def test_states_and_gradients_are_near_those_of_bfloat16():
    plain, eighth = decoder(), decoder()
    use_fp8(eighth, "emulated", stage=0)
    assert list(eighth.state_dict()) == list(plain.state_dict())
    tokens = torch.randint(50, (2, 33), generator=torch.Generator().manual_seed(1))
    losses = [loss(model, tokens) for model in (plain, eighth)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)
    assert losses[1].item() != losses[0].item()
    for one in losses:
        one.backward()
    for (name, ours), theirs in zip(eighth.named_parameters(), plain.parameters()):
        alike = F.cosine_similarity(ours.grad.flatten().float(), theirs.grad.flatten().float(), dim=0)
        assert alike > 0.95, name


def test_maps_outside_the_blocks_or_of_other_sizes_stay():
    model = decoder(ffn=72, tied=False)
    use_fp8(model, "emulated", stage=2)
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert kinds.pop("softmax") is nn.Linear
    plain = {name for name, kind in kinds.items() if kind is nn.Linear}
    assert plain == {f"transformer.blocks.{layer}.mlp.down" for layer in range(2)}
    assert len(kinds) == 2 * 4


def test_it_learns_under_the_engine():
    setup_distributed()
    config = build(TrainingConfig, {"steps": 1, "fp8": "emulated", "lr": 3e-3}, "test")
    engine = make_engine(decoder(), config, rows=1)
    tokens = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(1))
    first = last = loss(engine.module, tokens).item()
    for _ in range(40):
        now = loss(engine.module, tokens)
        engine.backward(now)
        engine.step()
        last = now.item()
    assert last < 0.3 * first


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fp8": "float8"}, "no GPU with 8-bit floats"),
        ({"fp8": "emulated", "deepspeed": "zero3"}, "take training.deepspeed=zero2"),
    ],
)
def test_what_cannot_be_is_refused(values, message, monkeypatch):
    setup_distributed()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        make_engine(decoder(), build(TrainingConfig, {"steps": 1, **values}, "test"), rows=1)


def test_a_configuration_names_it():
    demo = ["variables.scenes=scenes", "out=run"]
    for kind in ("none", "float8", "emulated"):
        assert load_run_config("demo/pretrain.yaml", [*demo, f"training.fp8={kind}"]).training.fp8 == kind


def test_what_does_not_train_stays():
    model = decoder()
    model.transformer.blocks[0].requires_grad_(False)
    use_fp8(model, "emulated", stage=0)
    first, second = (type(block.mlp.up) for block in model.transformer.blocks)
    assert first is nn.Linear and second is not nn.Linear


def test_a_model_without_fitting_maps_is_refused():
    with pytest.raises(ConfigError, match="multiples of 16"):
        use_fp8(decoder(width=40, heads=2, ffn=72), "emulated", stage=0)
