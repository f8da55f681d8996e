"""The learning rate of a step: linear warm-up, then linear or cosine decay."""

from __future__ import annotations

import math

from metalm.training.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of step 1, 2, … `config.steps`; it reaches `lr` at the end of warm-up and `min_lr * lr` at the last step."""
    if step < config.warmup:
        return config.lr * step / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.lr * (config.min_lr + (1 - config.min_lr) * decay) if config.schedule != "constant" else config.lr
