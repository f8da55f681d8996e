"""Fusion: spans that stand side by side read each other before the decoder does, a picture and the words about it.

    docked     [i i i i] [w w w]  a  b  [w w]  c            i = image's vectors, w = a text's
    runs        1 1 1 1   1 1 1   -  -   2 2   -            a few bidirectional layers over each run
    targets                    a  b            c

A run ends where something is predicted: what follows there, be it a span, is what is to be guessed, and must not be seen by
what comes before. So spans that are part of a text never read ahead, and a picture's branches do not change the picture.

Shapes: B rows, T positions, M fused positions of a row, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from metalm.nn.attention import Mask
from metalm.nn.transformer import Transformer, TransformerConfig
from metalm.segments import Batch

STEP = 64  # positions


@dataclass
class FusionConfig:
    """So many bidirectional layers, as wide as the decoder."""

    layers: int = 2
    heads: int = 8
    ffn: int = 0
    dropout: float = 0.0
    norm: Literal["layer", "rms"] = "layer"


def number_runs(docked_BT: Tensor, predicts_BT: Tensor, document_BT: Tensor, branch_BT: Tensor) -> Tensor:
    """The number of each position's run from 1 on, int64 [B, T]; 0 where no encoder feeds it.

    Args:
        docked_BT: bool, positions that encoders feed.
        predicts_BT: bool, positions that predict something.
    """
    begins_BT = docked_BT.clone()
    goes_on = docked_BT[:, :-1] & ~predicts_BT[:, :-1] & (document_BT[:, 1:] == document_BT[:, :-1])
    begins_BT[:, 1:] &= ~(goes_on & (branch_BT[:, 1:] == branch_BT[:, :-1]))
    return begins_BT.cumsum(1) * docked_BT


class Fusion(nn.Module):
    """A bidirectional Transformer over the docked vectors of each run, added to what they are; at the start it adds nothing, so
    that a trained model can be given one."""

    def __init__(self, config: FusionConfig, width: int):
        super().__init__()
        shape = {"layers": config.layers, "heads": config.heads, "ffn": config.ffn, "dropout": config.dropout}
        self.transformer = Transformer(TransformerConfig(width=width, norm=config.norm, positions="rotary", **shape))
        nn.init.zeros_(self.transformer.norm.weight)

    def forward(self, x_BTD: Tensor, batch: Batch) -> Tensor:
        """What the decoder reads, with fused vectors where encoders feed it."""
        docked_BT = torch.zeros_like(batch.tokens_BT, dtype=torch.bool)
        for span in batch.spans.values():
            docked_BT.view(-1)[span.positions] = True
        predicts_BT = torch.zeros_like(docked_BT)
        predicts_BT.view(-1)[batch.places_L] = True
        run_BT = number_runs(docked_BT, predicts_BT, batch.document_BT, batch.branch_BT)
        # The docked positions of each row, first; some at least, so that these layers take part in every step, and a multiple
        # of so many, so that few shapes occur.
        most = min(docked_BT.shape[1], STEP * max(1, math.ceil(int(docked_BT.sum(1).max()) / STEP)))
        place_BM = torch.argsort(~docked_BT, dim=1, stable=True)[:, :most]
        run_BM = run_BT.gather(1, place_BM)
        B, M = place_BM.shape
        column_M = torch.arange(M, device=place_BM.device)
        first_BM = torch.where(run_BM != torch.roll(run_BM, 1, dims=1), column_M, 0)
        first_BM[:, 0] = 0
        position_BM = column_M - first_BM.cummax(dim=1).values
        mask = Mask(lambda b, h, q, k: run_BM[b, q] == run_BM[b, k], B, M, M, place_BM.device)
        place_BMD = place_BM[..., None].expand(B, M, x_BTD.shape[-1])
        docked_BMD = x_BTD.gather(1, place_BMD)
        fused_BMD = docked_BMD + self.transformer(docked_BMD, position_BM, mask) * (run_BM > 0)[..., None]
        return x_BTD.scatter(1, place_BMD, fused_BMD.to(x_BTD.dtype))
