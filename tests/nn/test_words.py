"""Words by their characters and the softmax over very many of them, against plain definitions and torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metalm.errors import ConfigError
from metalm.nn.words import BEGIN, END, AdaptiveSoftmax, CharacterConfig, CharacterEmbedding

WORDS = ["a", "dog", "déjà", "Donaudampfschifffahrt", "", "dig"]


def make(max_length: int = 24, words=WORDS) -> CharacterEmbedding:
    torch.manual_seed(0)
    embedding = CharacterEmbedding(CharacterConfig(5, [3, 4, 6], max_length), len(words), 8).double()
    embedding.spell(words)
    return embedding


def slow_embedding(embedding: CharacterEmbedding, word: str) -> torch.Tensor:
    """One word, window by window; past its end are zeros."""
    codes = [BEGIN, *(byte + 1 for byte in word.encode()), END]
    x = [embedding.characters.weight[code] for code in codes] + [torch.zeros(5, dtype=torch.double)] * 2
    features = []
    for k, conv in enumerate(embedding.convolutions, start=1):
        windows = [torch.stack(x[i : i + k], dim=1) for i in range(len(codes))]
        values = [(conv.weight * window).sum(dim=(1, 2)) + conv.bias for window in windows]
        features.append(torch.stack(values).amax(0).relu())
    x = torch.cat(features)
    new, carry = (embedding.highway.weight @ x + embedding.highway.bias).chunk(2)
    return embedding.out(carry.sigmoid() * x + (1 - carry.sigmoid()) * new.relu())


def test_a_words_vector_is_its_definition():
    expected = torch.stack([slow_embedding(make(), word) for word in WORDS])
    torch.testing.assert_close(make()(torch.arange(len(WORDS))), expected, rtol=1e-12, atol=1e-12)


def test_a_words_vector_depends_on_its_spelling_alone():
    vectors = make()(torch.tensor([[1, 0, 1], [5, 3, 2]]))
    assert vectors.shape == (2, 3, 8)
    assert torch.equal(vectors[0, 0], vectors[0, 2])
    torch.testing.assert_close(make(60)(torch.tensor([1])), make()(torch.tensor([1])), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(make(words=["dog", "dog"])(torch.tensor([1]))[0], vectors[0, 0], rtol=1e-12, atol=1e-12)


def test_long_words_are_cut_between_the_marks():
    embedding = make(max_length=6)
    assert embedding.table_VC[3].tolist() == [BEGIN, *(byte + 1 for byte in b"Dona"), END]
    assert embedding.table_VC[1].tolist() == [BEGIN, *(byte + 1 for byte in b"dog"), END, 0]


def test_gradients_of_repeated_words_add_up():
    embedding = make()
    once = torch.autograd.grad(embedding(torch.tensor([1])).sum(), list(embedding.parameters()))
    twice = torch.autograd.grad(embedding(torch.tensor([1, 1])).sum(), list(embedding.parameters()))
    for one, other in zip(once, twice):
        torch.testing.assert_close(2 * one, other)


def test_the_spelling_travels_with_the_weights():
    copy = CharacterEmbedding(CharacterConfig(5, [3, 4, 6], 24), len(WORDS), 8).double()
    with pytest.raises(ValueError, match="words without characters"):
        copy(torch.tensor([1]))
    copy.load_state_dict(make().state_dict())
    assert torch.equal(copy(torch.arange(6)), make()(torch.arange(6)))
    with pytest.raises(ValueError, match="7 words for a vocabulary of 6"):
        copy.spell([*WORDS, "more"])


def test_ids_beyond_the_words_are_written_as_nothing():
    embedding, fewer = make(), make()
    fewer.spell(WORDS[:4])
    assert torch.equal(fewer.table_VC, embedding.table_VC[[0, 1, 2, 3, 4, 4]])  # the fifth is ""


def test_on_the_meta_device_shapes_are_known():
    with torch.device("meta"):
        embedding = CharacterEmbedding(CharacterConfig(5, [3, 4, 6], 24), 6, 8)
        assert embedding(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 8)
        assert embedding(torch.zeros(4, 5, dtype=torch.long)).shape == (4, 5, 8)  # more tokens than words


def test_the_papers_filters_are_the_default():
    with torch.device("meta"):
        embedding = CharacterEmbedding(CharacterConfig(), 10, 1024)
    assert [(c.kernel_size[0], c.in_channels, c.out_channels) for c in embedding.convolutions] == [
        *((1, 128, 128), (2, 128, 256), (3, 128, 384)),
        *((4, 128, 512), (5, 128, 512), (6, 128, 512)),
    ]


def make_softmax(dtype=torch.float64) -> tuple[AdaptiveSoftmax, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    softmax = AdaptiveSoftmax(32, 50, [7, 20]).to(dtype)
    hidden = (3 * torch.randn(40, 32, dtype=torch.float64)).to(dtype).requires_grad_()
    return softmax, hidden, torch.randint(50, (40,))


def test_probabilities_sum_to_one():
    softmax, hidden, _ = make_softmax()
    total = softmax.log_prob(hidden).exp().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)
    every = torch.stack([softmax(hidden[:1], torch.tensor([word])) for word in range(50)])  # by the loss itself
    torch.testing.assert_close((-every).exp().sum(), total[0], rtol=1e-12, atol=0)


def test_the_loss_and_its_gradients_are_torchs():
    softmax, hidden, targets = make_softmax()
    inputs = [hidden, *softmax.parameters()]
    theirs = -nn.AdaptiveLogSoftmaxWithLoss.forward(softmax, hidden, targets).output.sum()
    ours = softmax(hidden, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    for one, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_clusters_without_a_target_take_part():
    """Every parameter has a gradient in every step, as ZeRO-3 needs."""
    softmax, hidden, _ = make_softmax()
    loss = softmax(hidden, torch.zeros(40, dtype=torch.long))
    loss.backward()
    assert all(parameter.grad is not None for parameter in softmax.parameters())
    softmax(hidden[:0], torch.zeros(0, dtype=torch.long)).backward()


def test_bfloat16_sums_in_float32():
    softmax, hidden, targets = make_softmax(torch.bfloat16)
    loss = softmax(hidden, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), softmax.double()(hidden.double(), targets), rtol=1e-2, atol=0)


def test_the_papers_clusters():
    with torch.device("meta"):
        softmax = AdaptiveSoftmax(1024, 800_000, [60_000, 220_000])
    assert softmax.head.weight.shape == (60_002, 1024)
    assert [tuple(words.weight.shape) for _, words in softmax.tail] == [(160_000, 256), (580_000, 64)]


@pytest.mark.parametrize("cutoffs", [[], [0, 5], [5, 5], [9, 5], [5, 50], [51]])
def test_cutoffs_that_do_not_rise_are_refused(cutoffs):
    with pytest.raises(ConfigError, match="must rise"):
        AdaptiveSoftmax(8, 50, cutoffs)
