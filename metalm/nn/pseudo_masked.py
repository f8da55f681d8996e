"""Pseudo-masked attention: one pass reads a masked text as BERT does, and predicts its masked blocks one after another.

    columns    base                          originals        pseudo masks
               <s> a  M  M  d  M  f  </s>    b  c  e          P  P  P           [b c] is block 2, [e] is block 1
    position    0  1  2  3  4  5  6  7       2  3  5          2  3  5
    step        -  -  -  -  -  -  -  -       2  2  1          2  2  1

Every query sees the base, and the base nothing else, so its states are those of a plain pass. The K originals and the K
pseudo masks are queries appended to it:

    query \\ key      base    original               pseudo mask
    base             yes     no                     no
    original         yes     step_key <= step       no
    pseudo mask      yes     step_key <  step       step_key == step

At 15 % masked that is n^2 + 2k (n + 2k) = 1.39 n^2 scores where a dense mask takes (n + 2k)^2 = 1.69 n^2, and the base needs
no mask but that of its document. Source: UniLMv2 (arXiv 2002.12804), section 3.2 and figure 2.

Shapes: B rows, T base columns, K slots for masked tokens, N = T + 2K columns, Q queries, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metalm.nn.attention import Mask, Predicate, all_of, same_document
from metalm.nn.transformer import Section, Sections, Transformer

BASE, ORIGINAL, PSEUDO = range(3)


def sees(query_kind: Tensor, query_step: Tensor, key_kind: Tensor, key_step: Tensor) -> Tensor:
    """The table above, inside one document: bool, of the arguments' common shape."""
    original = (query_kind == ORIGINAL) & (key_step <= query_step) | (query_kind == PSEUDO) & (key_step < query_step)
    pseudo = (query_kind == PSEUDO) & (key_step == query_step)
    return (key_kind == BASE) | (key_kind == ORIGINAL) & original | (key_kind == PSEUDO) & pseudo


def pseudo_masked(document_BN: Tensor, step_BK: Tensor) -> Predicate:
    """`sees`, in the same document, on the columns of base, originals and pseudo masks.

    Args:
        document_BN: int64 from 1 on; 0 is padding.
        step_BK: int64, the step in which a slot's block is predicted, from 1 on; 0 is padding, which sees itself at least.
    """
    K = step_BK.shape[1]
    T = document_BN.shape[1] - 2 * K
    kind_N = torch.cat([step_BK.new_full((n,), kind) for n, kind in ((T, BASE), (K, ORIGINAL), (K, PSEUDO))])
    step_BN = torch.cat([torch.zeros_like(document_BN[:, :T]), step_BK, step_BK], dim=1)

    def predicate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees(kind_N[q], step_BN[b, q], kind_N[k], step_BN[b, k])

    return all_of(same_document(document_BN), predicate)


def one_pass(stack: Transformer, x_BND: Tensor, position_BN: Tensor, document_BN: Tensor, step_BK: Tensor) -> Tensor:
    """States [B, N, D] of base, originals and pseudo masks, in this order, in one pass through the stack.

    Args:
        x_BND: input vectors.
        position_BN: int64, position inside the document; the documents of the base lie side by side in the row.
        document_BN, step_BK: as in `pseudo_masked`.
    """
    B, N, _ = x_BND.shape
    K = step_BK.shape[1]
    T = N - 2 * K
    base = Mask(same_document(document_BN[:, :T]), B, T, T, x_BND.device)
    appended = Mask(pseudo_masked(document_BN, step_BK), B, 2 * K, N, x_BND.device, first_query=T)
    base_bias = appended_bias = None
    if stack.relative_bias is not None:
        column_T = torch.arange(T, device=x_BND.device)  # in the base, columns are as far from each other as positions
        base_bias = stack.relative_bias(column_T, column_T)
        appended_bias = stack.relative_bias(position_BN[:, T:], position_BN)
    return stack(x_BND, position_BN, Sections((Section(base, base_bias), Section(appended, appended_bias))))
