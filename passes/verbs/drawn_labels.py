"""Random labels for the proof of a training step, in the form that the loss takes."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from lora_fx.dtypes import Array
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.tensors import from_numpy, to_numpy
from lora_fx.fx.train.loss import IGNORED, Loss, loss_function, scores_of
from lora_fx.inputs import Named


class DrawnLabels:
    """Random labels for the batches of a training step's proof, in the form that the loss takes.

    Attributes:
        loss: The function of (output, labels), and the argument by which the model takes labels
            and computes its loss itself; empty where it does not.
        fractions: Whether labels are a number for each score, and no class for each row of them.
    """

    def __init__(self, module: AdaptedModule, loss: str | Loss | None) -> None:
        self.module = module
        self.execution = execution_of(module)
        keywords = self.execution.captured.signature.keywords
        self.loss = loss_function(loss or "ce", "labels", lambda name: name in keywords)
        self.of_function = callable(loss)
        self.fractions = False
        self.fractions = loss == "mse" or self._takes_fractions()

    def _takes_fractions(self) -> bool:
        """Whether the loss function takes a number per score, and no class per row of scores."""
        compute, argument = self.loss
        if argument or not self.of_function:
            return False
        self.module.eval()
        with torch.no_grad():
            output = self.execution.run(self.execution.captured.named)
            scores = scores_of(output)
            for fractions in (False, True):
                self.fractions = fractions
                # a function raises what it likes for labels of another shape or dtype
                with contextlib.suppress(Exception):
                    compute(output, self._drawn(scores, None))
                    return fractions
        return False

    def labelled(self, named: Named) -> tuple[dict[str, Any], Array]:
        """Return the call of a batch, with labels if the model takes them, and the labels."""
        argument = self.loss[1]
        signature = self.execution.captured.signature
        # where the example has labels, theirs are shape and dtype
        example: Any = named.get(argument)
        named = {name: value for name, value in named.items() if name != argument}
        to_run = named
        if example is not None and argument in signature.required:
            to_run = {**named, argument: torch.zeros_like(example)}
        self.module.eval()
        with torch.no_grad():
            scores = scores_of(self.execution.run(to_run)).detach()
        labels = self._drawn(scores, example)
        if argument:
            named = signature.bind((), {**named, argument: labels})
        return dict(named), to_numpy(labels)

    def _drawn(self, scores: torch.Tensor, example: torch.Tensor | None) -> torch.Tensor:
        """Draw labels for scores; one label is the ignored index if no example sets their form."""
        like = self.without_values(scores) if example is None else example
        generator = np.random.default_rng(scores.numel())
        if like.is_floating_point():
            # a function of probabilities takes none outside [0, 1]
            draw = generator.random if self.of_function else generator.standard_normal
            return from_numpy(draw(tuple(like.shape)).astype(np.float32))

        # a model's own labels of pixels stand where its scores have their second axis
        classes_last = example is None or scores.dim() < 2 or like.shape == scores.shape[:-1]
        classes = scores.shape[-1 if classes_last else 1]
        labels = generator.integers(0, classes, like.shape)
        if labels.size > 3 and example is None and not self.of_function:
            labels.reshape(-1)[-1] = IGNORED
        return from_numpy(labels)

    def without_values(self, scores: torch.Tensor) -> torch.Tensor:
        """Return zero labels for scores: a number per score, or a class per row of scores."""
        if self.fractions:
            return torch.zeros(tuple(scores.shape), dtype=torch.float32)
        return torch.zeros(tuple(scores.shape[:-1]), dtype=torch.int64)
