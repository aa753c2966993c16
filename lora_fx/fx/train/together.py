"""Several runs side by side, over one base: each takes a step before any takes the next one.

Each run has its own batch, optimizer, schedule and random numbers, and a loss of its own, so its
numbers are those of `fit` on its module alone: bit for bit if the steps follow one another. On a
GPU, steps of equal shapes run in one vmap, whose products round differently. There the first step
of copies runs both ways, and they stay together only if both agree.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lora_fx.data import Buckets, Table
from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.copies import PlainPrograms, kind_of, own_tensors
from lora_fx.fx.tensors import device_of
from lora_fx.fx.train.copy_draws import Draws, DrawsApart
from lora_fx.fx.train.loop import Progress, TrainRun, prepared
from lora_fx.fx.train.loss import Loss
from lora_fx.fx.train.reduction import inputs_of
from lora_fx.fx.train.settings import Settings
from lora_fx.fx.train.state import Trail
from lora_fx.fx.train.train_report import TrainReport
from lora_fx.fx.trees import tree_flatten, tree_unflatten
from lora_fx.inputs import Named
from lora_fx.text import by_key

GATE = 1e-3
"""The largest difference of a gradient together from the same alone, of its largest element."""
HALF_GATE = 5e-2
"""The same in bfloat16."""
RunProgress = Callable[[int, int, int, float], None]
"""A function that is called with the number of a run, its step, its number of steps, its loss."""


def fit_together(
    models: Sequence[AdaptedModule],
    training: Table | Buckets,
    validation: Table | None,
    loss: str | Loss,
    settings: Sequence[Settings],
    progress: RunProgress | None = None,
    *,
    check_memory: bool = True,
    batched: bool | None = None,
) -> list[TrainReport]:
    """Train adapters side by side; afterwards each model holds its own best one.

    A run whose loss or gradient is not finite ends, and its report has the error; the others go on.

    Args:
        models: Copies of one module, as `insert(copies=…)` has them.
        training: As in fit; each run has its own order of it.
        validation: As in fit.
        loss: As in fit.
        settings: Those of each run.
        progress: Called as (run, step, steps, loss).
        check_memory: Refuse runs that cannot fit.
        batched: Whether steps of equal shapes run in one vmap; None: on a GPU. On a CPU larger
            products take as much time as several small ones, and the memory of all of them.

    Raises:
        LoraFxError: As in fit, but for a loss or gradient that is not finite.
    """
    lanes = []
    for number, (model, chosen) in enumerate(zip(models, settings, strict=True)):
        run = prepared(model, training, validation, loss, chosen)
        lanes.append(_Lane(number, run, Draws(device_of(model))))
    if batched is None:
        batched = device_of(models[0]).type == "cuda"
    lockstep = _Lockstep()
    with contextlib.ExitStack() as stack:
        for lane in lanes:
            stack.enter_context(lane.run.objective.alone())
        if check_memory:
            first = lanes[0].run
            alike = sum(lane.kind == lanes[0].kind for lane in lanes)
            is_one_vmap = batched and alike > 1
            with lockstep.plain.of(first.model) if is_one_vmap else contextlib.nullcontext():
                first.check_memory(loss, alike, batched=is_one_vmap)
        for lane in lanes:
            lane.start()
        if batched:
            lockstep.go(lanes, progress)
        else:
            _go_in_turn(lanes, progress)
    return [lane.run.finish(lane.trail) for lane in lanes]


@dataclass(eq=False)
class _Lane:
    """A run among others.

    Attributes:
        number: Its place among the models.
        run: The run.
        draws: Its random generators.
        trail: Its progress.
        batches: What it has still to see.
    """

    number: int
    run: TrainRun
    draws: Draws
    trail: Trail = field(default_factory=Trail)
    batches: Iterator[Table] = field(default_factory=lambda: iter(()))

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """A value that is equal for runs whose parts of equal shapes run together."""
        return kind_of(self.run.model)

    @cached_property
    def own(self) -> dict[str, nn.Parameter]:
        """The tensors of its model that it does not share."""
        return own_tensors(self.run.model)

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """A block with the run's generators; a value that is not finite ends the run."""
        with self.draws.used():
            try:
                yield
            except LoraFxError as error:
                if error.exit_code != 1:
                    raise
                self.trail.report.error = error.message

    def start(self) -> None:
        """Begin the run, with generators of its own seed."""
        with self.draws.used():
            self.trail = self.run.start()
        self.batches = self.run.batches(self.trail)


def _coming(lanes: Sequence[_Lane]) -> dict[_Lane, Table]:
    """Return the next batch of each run that has not ended."""
    batches = {}
    for lane in lanes:
        batch = None if lane.trail.report.error else next(lane.batches, None)
        if batch is not None:
            batches[lane] = batch
    return batches


def _go_in_turn(lanes: Sequence[_Lane], progress: RunProgress | None) -> None:
    """Take the steps of all runs, one after another; one that ends leaves the others."""
    while batches := _coming(lanes):
        for lane, batch in batches.items():
            with lane.ending():
                lane.run.step(batch, lane.trail, _of_run(progress, lane.number))


@dataclass(frozen=True)
class _Result:
    """The loss of a part, and its gradients by the run's trained tensors, in their order."""

    loss: float
    gradients: Sequence[Tensor | None]


@dataclass(frozen=True)
class _Part:
    """A part of a run's batch, and its share of the batch's loss."""

    lane: _Lane
    table: Table
    share: float

    @property
    def kind(self) -> tuple[object, ...]:
        """A value that is equal for parts that one vmap can run."""
        columns = self.table.columns.items()
        return self.lane.kind, tuple((name, column.shape) for name, column in columns)

    def alone(self) -> _Result:
        """Return the loss and the gradients as the run alone would compute them."""
        with self.lane.draws.used():
            loss = self.lane.run.objective.loss(self.table) * self.share
            gradients = torch.autograd.grad(loss, self.trained, allow_unused=True)
            return _Result(float(loss.detach()), gradients)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trained tensors of its run."""
        return self.lane.run.optimizer.trained

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients to those of the run's trained tensors."""
        for tensor, gradient in zip(self.trained, gradients, strict=True):
            if tensor.grad is None:
                tensor.grad = gradient
            elif gradient is not None:
                tensor.grad += gradient


@dataclass
class _Lockstep:
    """The steps of several runs, those of equal shapes in one vmap.

    Attributes:
        plain: The programs that vmap runs.
        agreed: Whether copies of a kind give together what they give alone, once that is known.
    """

    plain: PlainPrograms = field(default_factory=PlainPrograms)
    agreed: dict[tuple[object, ...], bool] = field(default_factory=dict)

    def go(self, lanes: Sequence[_Lane], progress: RunProgress | None) -> None:
        """Take the steps of all runs; one that ends leaves the others."""
        while batches := _coming(lanes):
            first = next(iter(batches))
            with first.run.first_step(first.trail):
                losses = self._gradients(batches)
            for lane, value in losses.items():
                with lane.ending():
                    loss = lane.run.finished_gradients(value, lane.trail.step + 1)
                    lane.run.take(loss, lane.trail, _of_run(progress, lane.number))

    def _gradients(self, batches: dict[_Lane, Table]) -> dict[_Lane, float]:
        """Compute the gradients of a step of each run; return the losses."""
        parts: dict[_Lane, list[_Part]] = {}
        values = {}
        for lane, batch in batches.items():
            lane.run.model.train()
            lane.run.optimizer.clear()
            parts[lane] = [_Part(lane, table, share) for table, share in lane.run.parts(batch)]
            values[lane] = 0.0
        for present in _transposed(list(parts.values())):
            for group in by_key((part.kind, part) for part in present).values():
                losses = self._add_gradients(group)
                for part, value in zip(group, losses, strict=True):
                    values[part.lane] += value
        return values

    def _add_gradients(self, group: Sequence[_Part]) -> list[float]:
        """Add the gradients of parts of one kind to their runs' tensors; return their losses."""
        kind = group[0].lane.kind
        if len(group) > 1 and self.agreed.get(kind):
            losses = self._together(group, [part.lane.draws for part in group])
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            return [float(loss.detach()) for loss in losses]

        before = [part.lane.draws.copied() for part in group]
        results = [part.alone() for part in group]
        if len(group) > 1 and kind not in self.agreed:
            reason = self._disagreement(group, before, results)
            self.agreed[kind] = not reason
            if reason:
                line = f"its steps are not run together with those of other runs: {reason}"
                for part in group:
                    part.lane.trail.report.warnings.append(line)
        for part, result in zip(group, results, strict=True):
            part.add(result.gradients)
        return [result.loss for result in results]

    def _disagreement(
        self, group: Sequence[_Part], draws: Sequence[Draws], alone: Sequence[_Result]
    ) -> str:
        """Return why copies cannot run together, empty if they can.

        Args:
            group: A part of each copy.
            draws: The generators that they began with.
            alone: What each gave.
        """
        if group[0].lane.run.model.is_activation_checkpointing:
            return "--activation-checkpointing recomputes blocks, which vmap does not take"
        try:
            losses = self._together(group, draws)
            trained = [tensor for part in group for tensor in part.trained]
            # of the sum, as in the steps to come: what mixed the copies would show here
            total = torch.stack(losses).sum()
            gradients = iter(torch.autograd.grad(total, trained, allow_unused=True))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever an operator without a rule of vmap raises
            return one_line(f"{type(error).__name__}: {error}", 160)
        for expected in alone:
            computed = list(itertools.islice(gradients, len(expected.gradients)))
            difference = _difference(expected.gradients, computed)
            gate = HALF_GATE if group[0].lane.run.objective.half else GATE
            if not difference <= gate:
                return f"a gradient differs by {difference:.1e} from that of the run alone"
        return ""

    def _together(self, group: Sequence[_Part], draws: Sequence[Draws]) -> list[Tensor]:
        """Return the losses of parts of one kind, of one vmap over their runs' tensors."""
        objective = group[0].lane.run.objective
        model = objective.model
        trees = [part.lane.own for part in group]
        tensors = {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}
        arguments = [inputs_of(model, part.table, objective.own) for part in group]
        inputs = {name: torch.stack([row[name] for row in arguments]) for name in arguments[0]}
        structure: list[Any] = []  # leaves of the output, which of them are tensors, tree

        def run(number: Tensor, tensors: dict[str, Tensor], inputs: Named) -> list[Tensor]:
            with DrawsApart(draws, number):
                out = functional_call(model, tensors, (), dict(inputs))
            leaves, tree = tree_flatten(out)
            places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            structure[:] = [leaves, places, tree]
            return [leaves[place] for place in places]

        numbers = torch.arange(len(group))
        with self.plain.of(model), objective.precision(device_of(model)):
            results = vmap(run, randomness="error")(numbers, tensors, inputs)
            leaves, places, tree = structure
            losses = []
            for copy, part in enumerate(group):
                for place, result in zip(places, results, strict=True):
                    leaves[place] = result[copy]
                loss = objective.loss_of(tree_unflatten(leaves, tree), part.table)
                losses.append(loss * part.share)
        return losses


def _transposed(rows: Sequence[Sequence[_Part]]) -> Iterator[list[_Part]]:
    """Yield the first elements of all rows, then the second ones; shorter rows end earlier."""
    for column in itertools.zip_longest(*rows):
        yield [part for part in column if part is not None]


def _difference(alone: Sequence[Tensor | None], together: Sequence[Tensor | None]) -> float:
    """Return the largest difference of two lists of gradients, of the largest element."""
    largest = 0.0
    difference = 0.0
    for expected, computed in zip(alone, together, strict=True):
        if expected is None or computed is None:
            if expected is not computed:
                return math.inf
            continue
        largest = max(largest, float(expected.abs().max()))
        difference = max(difference, float((expected - computed).abs().max()))
    return difference / largest if largest else difference


def _of_run(progress: RunProgress | None, number: int) -> Progress | None:
    """Return the progress of one run."""
    if progress is None:
        return None

    def told(step: int, steps: int, loss: float) -> None:
        progress(number, step, steps, loss)

    return told
