"""calibrate: run data through the captured graph, and record each target's inputs and gradients.

    Cx = E[x xᵀ]      Cy = E[dy dyᵀ]      G = ∂L/∂W      in the axes of each target's Layout

x are a target's inputs and dy the gradients of the loss at its results, a row a position (see
lora_fx.targets.moments). G is the gradient of the weight itself, so that it is there for every op
that insert reaches; x and dy are not for weights inside a recurrent op, a body of control flow, or
where the op broadcasts or gathers the weight. What could not be read is said by name.

The graph is that of eval mode: no dropout, running statistics. One batch is in memory at a time.
Positions that an `attention_mask` leaves out are no x; what gradient they get counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lora_fx.adapter.starts import matrix
from lora_fx.data import LABELS
from lora_fx.errors import LoraFxError, expect
from lora_fx.fx.calibration import Run, Watched
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.site_rows import SiteRows, readable, rows_of_part
from lora_fx.fx.tensors import from_numpy, to_numpy
from lora_fx.fx.train.loss import Loss, loss_function
from lora_fx.inputs import Named
from lora_fx.ir.graph import Site
from lora_fx.ir.layout import Layout
from lora_fx.passes.find import find, site_layout
from lora_fx.passes.insert import reached
from lora_fx.progress import stage
from lora_fx.targets.moments import STATISTICS, WIDE, Calibration, Moments, Sums
from lora_fx.targets.regions import contains, relative
from lora_fx.targets.target import Target


@stage("running the data through the model")
def calibrate(
    cap: Captured,
    uses: Mapping[str, str],
    data: Iterable[Named],
    loss: str | Loss = "ce",
    wanted: Sequence[str] = ("power", "outputs", "gradient"),
) -> Calibration:
    """Run data through the model once, and sum up the inputs and gradients of its targets.

    Args:
        cap: The model.
        uses: Target key → the alias through which its update applies; empty for all uses.
        data: Batches of arrays or tensors by argument name, with a column of labels.
        loss: ce, mse, or a function of (output, labels), as for train.
        wanted: Names in lora_fx.targets.moments.STATISTICS. Without outputs and gradient no label
            is needed.

    Raises:
        LoraFxError: No batch, a column that the model does not take, a loss that is not finite.
    """
    for name in wanted:
        if name not in STATISTICS:
            raise LoraFxError(f"unknown statistic {name!r}", f"use one of {', '.join(STATISTICS)}")
    weights = "gradient" in wanted
    results = "outputs" in wanted
    needs_loss = weights or results
    statistics = _Statistics(uses, frozenset(wanted))
    module = Watched(
        cap, statistics.choose, statistics.add_inputs, weights=weights, results=results
    )
    total_loss = 0.0
    count = 0
    for i, batch in enumerate(data):
        expect(
            batch,
            Mapping,
            f"batch {i + 1} of the data",
            "tensors by the names of the model's inputs",
            "pass --data FILE",
        )
        examples = len(next(iter(batch.values())))
        statistics.mask = _mask(batch)
        with torch.set_grad_enabled(needs_loss):
            batch_loss = _run(module, batch, loss, backward=needs_loss)
        if batch_loss is not None:
            number = float(batch_loss.detach())
            if not math.isfinite(number):
                raise _not_finite(number, i + 1, batch)
            statistics.add_gradients(module.last, batch_loss, examples)
            total_loss += number * examples
        count += examples
    if not count:
        raise LoraFxError(
            "the data has no batches", "pass a list; an iterator can be read only once"
        )

    mean_loss = total_loss / count if needs_loss else None
    moments = statistics.moments(count)
    return Calibration(moments, tuple(statistics.notes), count, mean_loss, statistics.dead)


def _not_finite(loss: float, number: int, batch: Named) -> LoraFxError:
    """Return the error of a batch, counted from 1, whose loss is not finite."""
    for name, values in batch.items():
        if bool(_tensor(values).isnan().any()):
            return LoraFxError(
                f"the loss of batch {number} is {loss:g}; its column {name!r} has NaN",
                "remove such rows from the data, or fill them",
            )
    return LoraFxError(f"the loss of batch {number} is {loss:g}", "check the data of that batch")


def _run(module: Watched, batch: Named, loss: str | Loss, *, backward: bool) -> Tensor | None:
    """Run a batch and return its loss; None if no loss is needed."""
    signature = execution_of(module).captured.signature
    device = next((parameter.device for parameter in module.parameters()), None)
    columns = {name: _tensor(value).to(device) for name, value in batch.items()}
    no_arguments = [
        name for name in columns if name not in signature.keywords and not signature.open
    ]
    if len(no_arguments) > 1:
        raise LoraFxError(
            f"the model has no arguments {no_arguments[0]!r} and {no_arguments[1]!r}",
            f"name the inputs {', '.join(sorted(signature.keywords))}; only one more column may "
            "hold the labels",
        )

    if no_arguments:
        label = no_arguments[0]
    else:
        label = next((name for name in LABELS if name in columns), "")
    compute, argument = loss_function(loss, label, lambda name: name in signature.keywords)
    arguments = dict(columns)
    if label and not argument and label not in signature.required:
        arguments.pop(label, None)
    output = module(**arguments)
    if not backward:
        return None
    return compute(output, columns.get(label))


def _mask(batch: Named) -> Tensor | None:
    """Return the attention mask [examples, positions] of a batch of texts, or None."""
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    tensor = _tensor(mask)
    return tensor if tensor.dim() == 2 else None


def _tensor(value: object) -> Tensor:
    return value if isinstance(value, Tensor) else from_numpy(np.asarray(value))


class _Statistics:
    """The sums of the statistics of all targets, and notes."""

    def __init__(self, uses: Mapping[str, str], wanted: frozenset[str]) -> None:
        self.uses = uses
        self.wanted = wanted
        self.sums = {key: Sums() for key in uses}
        self.notes: dict[str, None] = {}
        self.mask: Tensor | None = None
        self.differentiated: set[str] = set()
        self.reached: set[str] = set()
        self.targets: dict[str, Target] = {}

    def choose(self, graph: FxGraph) -> Sequence[tuple[Site, tuple[str, ...]]]:
        """Return the uses of the wanted targets in a program."""
        # the targets that these arguments reach
        targets, uses = reached(find(graph), self.uses)
        self.targets |= targets
        chosen = []
        for site, keys in uses:
            chosen.append((site, tuple(keys)))
            if self.wanted == {"gradient"} or readable(site):
                continue
            for key in keys:
                self.say(key, f"no separate inputs and gradients can be read from its {site.op}")
        return chosen

    def add_inputs(self, site: Site, keys: tuple[str, ...], rows: SiteRows | None) -> None:
        """Add the inputs x of one use to the sums, except at positions that are padding."""
        if rows is not None and self.mask is not None:
            rows = rows.kept(self.mask.to(rows.value.device))
        if not self.wanted & {"inputs", "power"}:
            return
        for key in keys:
            x = self._rows(key, site, rows, out=False)
            if x is None or rows is None:
                continue
            sums = self.sums[key]
            sums.add("power", _power(x, rows).numpy(force=True), rows.count)
            if "inputs" in self.wanted:
                moment: Tensor | None = x  # of one-hot rows, x counts them
                if not rows.one_hot:
                    moment = self._second_moment(key, x)
                if moment is not None:
                    sums.add("inputs", moment.numpy(force=True), rows.count)

    def add_gradients(self, run: Run, loss: Tensor, examples: int) -> None:
        """Add ∂L/∂W and dy of one batch to the sums."""
        leaves = [*run.leaves.values(), *(zero.zeros for zero in run.zeros)]
        if leaves and not loss.requires_grad:
            raise LoraFxError(
                "no gradient reaches any target: the loss does not depend on them",
                "check the loss, and the targets that lora-fx targets lists",
            )
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else ()
        grads_of_weights = grads[: len(run.leaves)]
        grads_of_results = grads[len(run.leaves) :]
        for (keys, _), grad in zip(run.leaves, grads_of_weights, strict=True):
            self._count_reached(keys, grad)
            if grad is None:
                continue
            for key in keys:
                gradient = matrix(self.targets[key], to_numpy(grad)) * examples
                self.sums[key].add("gradient", gradient)
        for zero, grad in zip(run.zeros, grads_of_results, strict=True):
            self._count_reached(zero.tap.keys, grad)
            if grad is None:
                continue
            rows = zero.rows(grad * examples)
            for key in zero.tap.keys:
                dy = self._rows(key, zero.tap.site, rows, out=True)
                if dy is None or rows is None:
                    continue
                moment = self._second_moment(key, dy)
                if moment is not None:
                    self.sums[key].add("outputs", moment.numpy(force=True), rows.count)

    def _count_reached(self, keys: Iterable[str], grad: Tensor | None) -> None:
        self.differentiated.update(keys)
        if grad is not None:
            self.reached.update(keys)

    def moments(self, examples: int) -> dict[str, Moments]:
        """Return the moments by key, in the order of `uses`."""
        for key in self.dead:
            self.say(key, "no gradient reaches it")
        moments_by_key = {key: sums.moments(examples) for key, sums in self.sums.items()}
        for key, moments in moments_by_key.items():
            for value in (moments.inputs, moments.outputs):
                if value is not None and not np.isfinite(value).all():
                    raise LoraFxError(
                        f"{key}: the data leads to NaN or infinite values in this target",
                        "check the data for such values, and for very large ones",
                    )
        return moments_by_key

    @property
    def dead(self) -> tuple[str, ...]:
        """The targets for which no gradient was ever computed, although one was needed."""
        unreached = self.differentiated - self.reached
        return tuple(key for key in self.uses if key in unreached)

    def say(self, key: str, why: str) -> None:
        """Add a note, unless it is there already."""
        self.notes[f"{key}: {why}"] = None

    def _rows(self, key: str, site: Site, rows: SiteRows | None, *, out: bool) -> Tensor | None:
        """Return a target's part of the rows of a use; for one-hot rows, return counts."""
        if rows is None:
            self._say_uncounted(key, site, "broadcasts the weight")
            return None
        target = self.targets[key]
        layout_and_start = _layout_and_start(site, target)
        if layout_and_start is None:
            self._say_uncounted(key, site, "reads the weight in other axes or parts")
            return None
        layout, start = layout_and_start
        value = rows.value
        if rows.one_hot:
            value = torch.bincount(value, minlength=rows.one_hot).unsqueeze(0)
        value = rows_of_part(value, layout, start, target.layout, out=out)
        return value[0] if rows.one_hot else value

    def _say_uncounted(self, key: str, site: Site, reason: str) -> None:
        self.say(key, f"its {site.op} {reason}: the rows of this use are not counted")

    def _second_moment(self, key: str, rows: Tensor) -> Tensor | None:
        """Compute Σ r rᵀ over the rows, in fp64 for at most 1024 columns."""
        side = rows.shape[-1]
        if side > WIDE:
            self.say(
                key,
                f"a side of {side} elements is above {WIDE}: its second moments are not computed",
            )
            return None
        rows = rows.double() if side <= 1024 else rows.float()
        return rows.mT @ rows


def _power(x: Tensor, rows: SiteRows) -> Tensor:
    """Compute Σ ‖x‖² over the rows, for each matrix of a stack."""
    if rows.one_hot:
        return x.sum(-1)
    return x.double().square().sum(-1).sum(-1)


def _layout_and_start(site: Site, target: Target) -> tuple[Layout, tuple[int, ...]] | None:
    """Return (layout of a use, start of the target in it); None if the axes do not match."""
    region_and_layout = site_layout(site, target.parameter.shape)
    if region_and_layout is None:
        return None
    region, layout = region_and_layout
    if not contains(region, target.region):
        return None
    bounds = relative(target.region, region)
    if layout.narrow(bounds) != target.layout:
        return None
    return layout, layout.starts(bounds)
