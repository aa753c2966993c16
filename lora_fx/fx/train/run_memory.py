"""The memory of a training run, told before its first step, and what makes a run fit.

    expected = (1 + SLACK) · peak of a step + trained · (gradients + moments + best adapter)
    least    = what a step keeps for backward + trained · moments

The C library keeps some of what it was given back, and reuses it in part: a step takes up to a
quarter more than its tensors (measured: 1.0 to 1.25 of them), of which SLACK is expected. What is
kept for backward lives at one time, when the forward pass ends, beside the moments of the step
before: so much is certain. In mixed precision some of it has half the bytes, so half is certain.

What is not counted: a validation, which keeps nothing for backward, the examples, which are in
memory already, and copies that a product makes of one weight for a moment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_fx.data import Buckets, Table
from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.device_memory import free_on
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.tensors import device_of
from lora_fx.fx.train.loss import scores_of
from lora_fx.fx.train.objective import Objective
from lora_fx.fx.train.optimizer import Optimizer
from lora_fx.fx.train.step_memory import StepMemory, largest_batch, step_memory
from lora_fx.peak_memory import MemoryPart, PeakMemory, check_memory
from lora_fx.progress import said, stage
from lora_fx.targets.keys import base_name
from lora_fx.text import sized

SLACK = 0.15
"""The share of its tensors' bytes that a step is expected to take in addition."""
CODED = 4.5 / 8
"""The bytes of an element in int4, with its share of the scale of its group."""


@dataclass(frozen=True)
class RunMemory:
    """The memory of a run.

    Attributes:
        objective: Its loss.
        optimizer: Its optimizer, with the settings.
        training: Its examples.
        rows: How many of them run at a time.
        parts: How many parts a batch has, those of all processes together.
        copies: How many such runs take their steps together.
        batched: Whether these steps run in one vmap; otherwise one follows another.
    """

    objective: Objective
    optimizer: Optimizer
    training: Table | Buckets
    rows: int
    parts: int
    copies: int = 1
    batched: bool = False

    def check(self) -> None:
        """Tell the memory of the run, and refuse a run that cannot fit.

        Raises:
            LoraFxError: What is certain to be needed is not there.
        """
        batch = largest_batch(self.training, self.rows)
        try:
            with stage("estimating the memory of a step"):
                peak = self.peak_of(step_memory(self.objective, batch))
        except Exception as e:  # whatever a model does with tensors that have no values
            said(f"memory of a step: not known before it: {one_line(e, 120)}")
            return
        check_memory(peak, free_on(device_of(self._model)), self._ways_out)

    def peak_of(self, step: StepMemory) -> PeakMemory:
        """Return the estimate of a run whose largest step takes so much."""
        trained = self.copies * sum(p.numel() * p.element_size() for p in self.optimizer.trained)
        moments = trained * self.optimizer.moments_of_each
        steps = self.copies if self.batched else 1
        kept_at_once = steps * step.kept
        kept = round((1 + SLACK) * kept_at_once)
        certain = kept_at_once // 2 if self.objective.half else kept_at_once
        momentary = round((1 + SLACK) * steps * (step.peak - step.kept))
        shape = ", ".join(map(str, step.largest))
        parts = (
            MemoryPart("kept for backward", kept, certain),
            MemoryPart("operators' own tensors", momentary),
            MemoryPart("gradients, moments and the best adapter", 2 * trained + moments, moments),
        )
        parameters = self._model.parameters()
        loaded = sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad)
        return PeakMemory("training", parts, loaded, f"the largest tensor is [{shape}]")

    @property
    def _model(self) -> AdaptedModule:
        return self.objective.model

    def _ways_out(self, free: int) -> Iterator[str]:
        """Yield options that make the run fit, each with what it needs, or the least of all."""
        if self.copies > 1:
            yield f"--together 1 needs {sized(replace(self, copies=1)._needed(self.rows))}"
            return
        ways = [*self._by_fewer_rows(free), *self._by_checkpointing(free)]
        ways += [*self._by_shorter_rows(free), *self._by_codes(free)]
        yield from ways
        if ways:
            return
        options = f"--batch-size {self.parts}"
        with self._checkpointing() as is_checkpointing:
            needed = self._needed(1)
        if is_checkpointing:
            options += " --activation-checkpointing"
        even = "" if needed <= free else "even "
        yield f"{even}{options} needs {sized(needed)}"

    def _needed(self, rows: int, longest: int | None = None) -> int:
        """Return the bytes that are expected with other sizes of the batch."""
        batch = _cut(largest_batch(self.training, rows), longest)
        return self.peak_of(step_memory(self.objective, batch)).expected

    @contextlib.contextmanager
    def _checkpointing(self) -> Iterator[bool]:
        """A block in which the model's blocks run again in backward; False if it has none."""
        if self._model.is_activation_checkpointing:
            yield True
            return
        try:
            self._model.activation_checkpointing_enable()
        except LoraFxError:
            yield False
            return
        try:
            yield True
        finally:
            self._model.activation_checkpointing_disable()

    def _by_fewer_rows(self, free: int) -> Iterator[str]:
        rows = self.rows
        while rows > 1:
            rows //= 2
            needed = self._needed(rows)
            if needed <= free:
                yield f"--batch-size {rows * self.parts} needs {sized(needed)}"
                return

    def _by_checkpointing(self, free: int) -> Iterator[str]:
        if self._model.is_activation_checkpointing:
            return
        with self._checkpointing() as is_checkpointing:
            if not is_checkpointing:
                return
            needed = self._needed(self.rows)
        if needed <= free:
            yield f"--activation-checkpointing needs {sized(needed)}"

    def _by_shorter_rows(self, free: int) -> Iterator[str]:
        """Yield a length of texts that fits; a model without a tokenizer reads no texts."""
        mask = largest_batch(self.training, self.rows).columns.get("attention_mask")
        has_texts = execution_of(self._model).captured.tokenizer_folder is not None
        if mask is None or mask.ndim != 2 or not has_texts:
            return
        longest = mask.shape[1]
        while longest > 16:
            longest //= 2
            needed = self._needed(self.rows, longest)
            if needed <= free:
                yield f"--max-length {longest} needs {sized(needed)}"
                return

    def _by_codes(self, free: int) -> Iterator[str]:
        saved = self._saved_by_codes()
        if self._needed(self.rows) <= free + saved:
            yield f"--quantise int4 frees {sized(saved)}"

    def _saved_by_codes(self) -> int:
        """Return the bytes that the adapted weights would take less as int4 codes."""
        parameters = dict(self._model.named_parameters())
        saved = 0
        for name in {base_name(key) for key in self._model.updates}:
            weight = parameters.get(name)  # None: it is computed, or its bytes are codes already
            if weight is not None and weight.is_floating_point():
                saved += weight.numel() * weight.element_size() - round(weight.numel() * CODED)
        return saved


def without_own_loss(objective: Objective) -> Objective:
    """Return an objective whose loss is a sum of scores, in the place of a user's function.

    A user's function may do more than compute, and reads values; scores are most of its memory.
    """
    return replace(objective, compute=lambda out, labels: scores_of(out).float().sum())


def _cut(batch: Table, longest: int | None) -> Table:
    """Return a batch of tokens with shorter rows."""
    mask = batch.columns.get("attention_mask")
    if longest is None or mask is None:
        return batch
    columns = {
        name: column[:, :longest] if column.shape == mask.shape else column
        for name, column in batch.columns.items()
    }
    return replace(batch, columns=columns)
