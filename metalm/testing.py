"""Contract checks for plug-ins: call them from your own tests, as ours do on every built-in.

    from metalm.testing import check_connector, check_encoder

    def test_my_encoder():
        encoder = MyEncoder(MyConfig(type="mine"))
        check_encoder(encoder, [{"audio": one}, {"audio": another}])

What fails is said in words, as an `AssertionError`.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import torch
from torch import Tensor

from metalm.connectors.base import Connector, ConnectorConfig
from metalm.encoders.base import Encoder
from metalm.nn.freezing import set_trainable


def check_encoder(encoder: Encoder, inputs: Sequence[dict], tolerance: float = 1e-4) -> None:
    """Holds an encoder, in float32, against the contract of `metalm.encoders.base`.

    Args:
        inputs: spans as a layout makes them, two or more of unequal length; media encoded.
        tolerance: between a span's states in company and alone.

    Raises:
        AssertionError: what does not hold.
    """
    assert len(inputs) > 1, "give two spans or more, of unequal length if the encoder takes such"
    encoder.eval()
    processor = encoder.processor
    announced = [processor.num_states(one) for one in inputs]
    loaded = [processor.load(one) for one in inputs]
    after = [processor.num_states(one) for one in loaded]
    assert after == announced, f"num_states says {announced} before `load` and {after} after it"
    assert pickle.loads(pickle.dumps(processor)) == processor, "the processor does not survive pickling, or has no equality"

    states = check_states(encoder, loaded, announced)
    alone = torch.cat([check_states(encoder, [one], [count]) for one, count in zip(loaded, announced)])
    worst = (states - alone).abs().max().item()
    assert worst <= tolerance * max(1.0, alone.abs().max().item()), (
        f"a span's states depend on the batch: they differ by {worst:.2g} from those that it has alone"
    )
    blank = processor.load(processor.blank())
    check_states(encoder, [blank], [processor.num_states(blank)])
    check_freezing(encoder, loaded)


@torch.no_grad()
def check_states(encoder: Encoder, loaded: list[dict], announced: list[int]) -> Tensor:
    """The spans' states [M, width], which are as many, as wide, and where `Collated.source` says."""
    collated = encoder.processor.collate(loaded)
    states = encoder(**collated.inputs)
    places = collated.source.tolist()
    assert states.ndim == 3 and states.shape[2] == encoder.width, (
        f"states are of shape {tuple(states.shape)}, not [rows, positions, width={encoder.width}]"
    )
    assert min(announced) >= 1, f"spans of {announced} states: each needs one at least"
    assert len(places) == sum(announced), f"source names {len(places)} states, num_states announces {sum(announced)}"
    assert len(set(places)) == len(places), "source names a state twice"
    assert max(places) < states.shape[0] * states.shape[1], "source names a state that is not there"
    chosen = states.flatten(0, 1)[collated.source]
    assert chosen.isfinite().all(), "a state is not finite"
    return chosen


def check_freezing(encoder: Encoder, loaded: list[dict]) -> None:
    """What counts as trained gets a gradient, be it all or the last layer alone; and nothing else does."""
    layers = encoder.layers()
    for trainable in ("all", 1) if layers else ("all",):
        set_trainable(encoder, layers, trainable, "encoder")
        encoder.zero_grad(set_to_none=True)
        collated = encoder.processor.collate(loaded)
        states = encoder(**collated.inputs).flatten(0, 1)[collated.source]
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            continue
        (states * torch.randn_like(states)).sum().backward()
        without = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, f"with trainable: {trainable}, these count as trained and get no gradient: {', '.join(without[:5])}"
    set_trainable(encoder, layers, "all", "encoder")
    encoder.zero_grad(set_to_none=True)


def check_connector(
    cls: type[Connector],
    config: ConnectorConfig,
    encoder_width: int = 12,
    decoder_width: int = 16,
    lengths: Sequence[int] = (6, 1, 4),
) -> None:
    """Holds a connector, in float64, against the contract of `metalm.connectors.base`.

    Args:
        lengths: states of three spans, the longest of them first, such as the connector takes.

    Raises:
        AssertionError: what does not hold.
    """
    torch.manual_seed(0)
    connector = cls(config, encoder_width, decoder_width).double()
    counts = [config.num_vectors(length) for length in lengths]
    longest = max(lengths)
    states = torch.randn(len(lengths), longest, encoder_width, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    if connector.pointwise:
        assert counts == list(lengths), f"a pointwise connector makes a vector a state, not {counts} of {list(lengths)}"
    out = connector(states) if connector.pointwise else connector(states, mask)
    shape = (len(lengths), max(counts), decoder_width)
    assert out.shape == shape, f"vectors are of shape {tuple(out.shape)}, not {shape}"

    vectors = torch.cat([one[:count] for one, count in zip(out, counts)])
    spans = [states[n, :length] for n, length in enumerate(lengths)]
    alone = [connector(span) if connector.pointwise else connector(span[None])[0] for span in spans]
    assert [len(one) for one in alone] == counts, f"spans alone give {[len(one) for one in alone]} vectors, not {counts}"
    assert torch.allclose(vectors, torch.cat(alone), rtol=1e-9, atol=1e-9), "a span's vectors depend on the batch"
    if not connector.pointwise:
        noise = torch.where(mask[:, :, None], states, 1e3 * torch.randn_like(states))
        again = torch.cat([one[:count] for one, count in zip(connector(noise, mask), counts)])
        assert torch.allclose(vectors, again, rtol=1e-9, atol=1e-9), "what stands in the padding changes the vectors"

    (vectors * torch.randn_like(vectors)).sum().backward()
    reached = states.grad.abs().sum(-1) > 0
    assert reached[mask].all(), "a state has no influence on the vectors"
    without = [name for name, parameter in connector.named_parameters() if parameter.grad is None]
    assert not without, f"no gradient reaches {', '.join(without[:5])}"
