"""Objectives on text: how a document's tokens are laid out in segments, by name."""

from metalm.registry import Registry

OBJECTIVES = Registry(
    "objective",
    group="metalm.objectives",
    builtin={
        "causal": "metalm.objectives.causal:Causal",
        "prefix": "metalm.objectives.prefix:Prefix",
        "semicausal": "metalm.objectives.semicausal:SemiCausal",
    },
)
