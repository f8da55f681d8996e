"""Distillation: a METALM learns from a larger one what it would say at each place, beside what was said.

    loss = (1 - weight) cross-entropy + weight T^2 KL(teacher || student) + states |norm(s) - norm(t)|^2 / width

The teacher reads the same batch: it must have the same tokens, and encoders that take the same inputs. It is no part of the
run's checkpoints and export; in validation the loss is the plain one. Cost: the teacher's forward pass. Sources: Hinton et al.
(arXiv 1503.02531); for states, FitNets (arXiv 1412.6550), here the last ones, normalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metalm.data.tokenizer import Tokenizer
from metalm.errors import CheckpointError, ConfigError
from metalm.model import MetaLM
from metalm.nn.soft_targets import soft_cross_entropy
from metalm.pretrained import load_pretrained
from metalm.segments import Batch


@dataclass
class DistillConfig:
    """`teacher` is a run, an export or a Hub id; `weight` that of its distributions at `temperature`, `states` that of its last
    states, which must be as wide as the student's."""

    teacher: str
    weight: float = 0.5
    temperature: float = 1.0
    states: float = 0.0

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"weight {self.weight} is that of the teacher against the texts, from 0 to 1")
        if self.temperature <= 0 or self.states < 0:
            raise ConfigError("temperature must be positive and states not negative")


class Distillation:
    """A frozen teacher, and what it adds to a student's loss."""

    def __init__(self, config: DistillConfig, student: nn.Module, tokenizer: Tokenizer, dtype: torch.dtype):
        """Raises:
        ConfigError: the student is no METALM, or the teacher cannot read what it reads.
        CheckpointError: there is no such teacher, or it was trained on other tokens.
        """
        if type(student) is not MetaLM:
            raise ConfigError(f"training.distill is for the model 'metalm', not {student.config.type!r}")
        self.config = config
        self.teacher, theirs = load_pretrained(config.teacher, dtype)
        if not isinstance(self.teacher, MetaLM):
            raise ConfigError(
                f"training.distill.teacher: {config.teacher} holds the model {self.teacher.config.type!r}, no METALM"
            )
        if not tokenizer.agrees_with(theirs):
            raise CheckpointError(f"training.distill.teacher: {config.teacher} was trained on other tokens")
        if student.processors != self.teacher.processors:
            raise ConfigError(
                f"training.distill.teacher: {config.teacher} has other encoders, or they take other inputs: "
                f"{self.teacher.processors}, here {student.processors}"
            )
        widths = student.config.decoder.width, self.teacher.config.decoder.width
        if config.states and widths[0] != widths[1]:
            raise ConfigError(f"training.distill.states compares states of one width, not {widths[0]} with {widths[1]}")
        self.teacher.requires_grad_(False)

    def __call__(self, loss: Tensor, hidden_LD: Tensor, batch: Batch, student: MetaLM) -> Tensor:
        """The loss with the teacher's part, which `student.parts` is told."""
        config, count = self.config, batch.num_targets
        with torch.no_grad():
            theirs_LE = self.teacher.to(hidden_LD.device).hidden(batch, places_N=batch.places_L)
        w_L = batch.weight_L if batch.weight_L is not None else hidden_LD.new_ones(count, dtype=torch.float32)
        weights = student.decoder.softmax_weight, self.teacher.decoder.softmax_weight
        softcaps = student.config.decoder.logit_softcap, self.teacher.config.decoder.logit_softcap
        soft = soft_cross_entropy(hidden_LD, weights[0], theirs_LE, weights[1], w_L, config.temperature, softcaps)
        student.parts["divergence"] = soft.detach(), count
        loss = (1 - config.weight) * loss + config.weight * soft
        if config.states:
            own, other = (nn.functional.layer_norm(x.float(), x.shape[-1:]) for x in (hidden_LD, theirs_LE))
            distance = (w_L * (own - other).square().mean(1)).sum()
            student.parts["state_distance"] = distance.detach(), count
            loss = loss + config.states * distance
        return loss
