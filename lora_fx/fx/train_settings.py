"""What a training run may be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What `fit` may be told. `steps` overrides `epochs`; validation runs `checks` times.

    Args:
        epochs: Passes over the training data.
        steps: Of the optimizer, instead of epochs.
        batch_size: Examples a step, of all processes together.
        lr: Highest learning rate of a; the variant says that of b.
        weight_decay: Of AdamW: what a weight loses in a step is lr · weight_decay of itself.
        warmup: Share of the steps in which the rate rises; then it falls as half a cosine.
        clip: The longest gradient, as the norm of all of them together; 0 clips nothing.
        checks: Validations in a run.
        seed: Of dropout and of the order of the examples.
        patience: Validations in a row without a new lowest loss that end the run.
        accumulate: Parts that a process's share of a step runs in, one after another.
        mixed_precision: no, or bf16: products in bfloat16, what is trained stays float32.
    """

    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip: float = 1.0
    checks: int = 10
    seed: int = 0
    patience: int | None = None
    accumulate: int = 1
    mixed_precision: str = "no"
