"""Token merging: similar patches become one as a tower goes on, so that its later layers, and the decoder, read fewer.

    x = x + attention(norm(x))      logits + log(size): a token counts as often as patches that it stands for
    x, size = merge(x, size)        the `merge` most similar pairs become their means, weighted by size
    x = x + mlp(norm(x))

Pairs: of the tokens every second one is on either side; each of the one side is matched with the most similar of the other,
by the cosine of their keys (mean over heads), and the best of these matches merge. Several may merge into the same token.
What is left stays in reading order, and class and register tokens as they are, in front. Nothing is learned: a trained tower
can merge as well as one that is trained so. The choice itself has no gradient.

A layer takes `merge` tokens away, at most half of them, so the number of states is known beforehand. Matching costs a product
of S/2 x S/2 keys a layer. Near ties may be decided by rounding.

Source: Bolya et al., "Token Merging: Your ViT But Faster" (arXiv 2210.09461), section 3; there what is left is not in order.

Shapes: N pictures, S tokens, R of them merged away, A and B tokens of either side, K width of a key, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def tokens_left(tokens: int, merge: int, layers: int) -> int:
    """How many of a picture's tokens come out of so many layers; class and register tokens do not count."""
    for _ in range(layers):
        tokens -= min(merge, tokens // 2)
    return tokens


@torch.no_grad()
def best_matches(key_NSK: Tensor, merge: int) -> tuple[Tensor, Tensor]:
    """The tokens to be merged away and, for each, the one that it becomes part of, both int64 [N, R].

    `merge` is at most S // 2. Even places look for their like among the odd ones.
    """
    unit_NSK = F.normalize(key_NSK, dim=-1)
    similarity_NAB = unit_NSK[:, ::2] @ unit_NSK[:, 1::2].transpose(1, 2)
    best_NA, partner_NA = similarity_NAB.max(dim=-1)
    chosen_NR = best_NA.argsort(dim=1, descending=True, stable=True)[:, :merge]
    return 2 * chosen_NR, 2 * partner_NA.gather(1, chosen_NR) + 1


def merge_tokens(x_NSD: Tensor, size_NS: Tensor, source_NR: Tensor, target_NR: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [N, S - R, D] and their sizes [N, S - R], with each source averaged into its target.

    Args:
        size_NS: how many patches a token stands for, in float32 at least, in which means are taken.
        source_NR, target_NR: places; no source is a target.
    """
    N, S, D = x_NSD.shape
    sum_NSD = x_NSD * size_NS[:, :, None]
    moved_NRD = sum_NSD.gather(1, source_NR[:, :, None].expand(-1, -1, D))
    sum_NSD = sum_NSD.scatter_add(1, target_NR[:, :, None].expand(-1, -1, D), moved_NRD)
    size_NS = size_NS.scatter_add(1, target_NR, size_NS.gather(1, source_NR))
    gone_NS = torch.zeros(N, S, dtype=torch.int8, device=x_NSD.device).scatter(1, source_NR, 1)
    left_NT = gone_NS.argsort(dim=1, stable=True)[:, : S - source_NR.shape[1]]
    size_NT = size_NS.gather(1, left_NT)
    mean_NTD = sum_NSD.gather(1, left_NT[:, :, None].expand(-1, -1, D)) / size_NT[:, :, None]
    return mean_NTD.to(x_NSD.dtype), size_NT


class MergingBlocks(nn.Sequential):
    """Pre-norm blocks that merge `merge` tokens each, between attention and network; the first `kept` tokens never merge.

    Parameters are called as those of the blocks in a list. What a block is made of, a subclass knows.
    """

    def __init__(self, blocks: Iterable[nn.Module], merge: int, kept: int = 0, recompute: bool = False):
        super().__init__(*blocks)
        self.merge, self.kept, self.recompute = merge, kept, recompute

    @abstractmethod
    def attention(self, block: nn.Module, x_NSD: Tensor, bias_NS: Tensor | None) -> tuple[Tensor, Tensor]:
        """The block's first half, x + attention(norm(x)), and its keys [N, S, K], the mean over heads.

        Args:
            bias_NS: to be added to the logits of every key, in the precision of `x_NSD`.
        """

    @abstractmethod
    def mlp(self, block: nn.Module, x_NSD: Tensor) -> Tensor:
        """The block's second half, x + mlp(norm(x))."""

    def layer(self, block: nn.Module, x_NSD: Tensor, size_NS: Tensor | None) -> tuple[Tensor, Tensor | None]:
        bias_NS = None if size_NS is None else size_NS.log().to(x_NSD.dtype)
        x_NSD, key_NSK = self.attention(block, x_NSD, bias_NS)
        merge = min(self.merge, (x_NSD.shape[1] - self.kept) // 2)
        if merge:
            source_NR, target_NR = best_matches(key_NSK[:, self.kept :], merge)
            if size_NS is None:
                size_NS = torch.ones_like(x_NSD[:, :, 0], dtype=torch.promote_types(x_NSD.dtype, torch.float32))
            x_NSD, size_NS = merge_tokens(x_NSD, size_NS, source_NR + self.kept, target_NR + self.kept)
        return self.mlp(block, x_NSD), size_NS

    def forward(self, x_NSD: Tensor) -> Tensor:
        """[N, S, D] -> [N, kept + tokens_left(S - kept), D]."""
        size_NS = None
        for block in self:
            if self.recompute and self.training:
                x_NSD, size_NS = checkpoint(self.layer, block, x_NSD, size_NS, use_reentrant=False)
            else:
                x_NSD, size_NS = self.layer(block, x_NSD, size_NS)
        return x_NSD


@contextmanager
def mean_keys(norm: nn.Module) -> Iterator[list[Tensor]]:
    """A list of the keys [N, H, S, K] that leave a key norm while this lasts, each as the mean over heads [N, S, K]."""
    found: list[Tensor] = []
    hook = norm.register_forward_hook(lambda module, inputs, keys_NHSK: found.append(keys_NHSK.detach().mean(1)))
    try:
        yield found
    finally:
        hook.remove()
