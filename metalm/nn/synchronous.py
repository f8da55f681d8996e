"""Synchronous attention: two sides that write towards each other look at what the other has written up to the same step.

    H = attention(Q, K own, V own) + weight attention(Q, K other, V other)

    forward    <s> the  cat  |  sat  on             position 2 is step 0: sees <r2l> mat the
                    1    2      3    4                       3       1           and down
    backward   <r2l> mat the |  down slept          position 2 is step 0: sees <s> the cat
                0    1    2     3    4

Positions before step 0, the contexts, see their own side alone, so they are those of a plain reading. Under rotary positions a
query that looks across stands where the other side stands at its step: what is next to the hole is near for both sides.
Source: "Meet in the Middle" (arXiv 2303.07295); fusion as in Zhou et al., "Synchronous Bidirectional Neural Machine
Translation" (2019).

Shapes: B rows, T positions, H heads, G key-value heads, K keys, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metalm.nn.attention import Mask, Predicate, attend
from metalm.nn.positions import rotate

PLAIN = -1  # of a position that does not look across


@dataclass
class Synchronous:
    """Attention to one's own side and, times `weight_BT`, to the other side; a `metalm.nn.transformer.Attends`.

    Attributes:
        own, other: both over all keys. A position of weight 0 may see anything through `other`, but one key at least.
        turn: rotary tables from a position to the one across at the same step; None where positions are not rotary.
    """

    own: Mask
    other: Mask
    weight_BT: Tensor
    turn: tuple[Tensor, Tensor] | None

    def attend(self, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, dropout: float, softcap: float) -> Tensor:
        own = attend(q_BHTD, k_BGKD, v_BGKD, self.own, None, dropout, softcap)
        across = q_BHTD if self.turn is None else rotate(q_BHTD, *self.turn)
        weight_B1T1 = self.weight_BT[:, None, :, None].to(own.dtype)
        return own + weight_B1T1 * attend(across, k_BGKD, v_BGKD, self.other, None, dropout, softcap)


def synchronous(
    own: Mask,
    other: Predicate,
    position_BT: Tensor,
    other_position_BT: Tensor,
    weight: float,
    rotary: Callable[[Tensor], tuple[Tensor, Tensor] | None],
) -> Synchronous:
    """The attention of rows in which some positions look across.

    Args:
        other: which keys a position that looks across sees there.
        position_BT: int64, positions in their own side.
        other_position_BT: int64, the position across at the same step; `PLAIN` where a position does not look across.
        rotary: the tables of positions, `metalm.nn.transformer.Transformer.rotary`.
    """
    looks_BT = other_position_BT != PLAIN

    def across(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Who does not look sees one key, for its weight is 0: none would be no number, and all of them a dense block mask."""
        return torch.where(looks_BT[b, q], other(b, h, q, k), k == 0)

    mask = Mask(across, own.rows, own.queries, own.keys, own.device)
    turn_BT = torch.where(looks_BT, other_position_BT - position_BT, 0)
    return Synchronous(own, mask, weight * looks_BT, rotary(turn_BT))
