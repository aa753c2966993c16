"""calibrate: run data through the captured graph and see what each target reads and is told.

    Cx = E[x xᵀ]      Cy = E[dy dyᵀ]      G = ∂L/∂W      in the axes of each target's Layout

x are a target's inputs and dy the gradients of the loss at its results, a row a position (see
lora_fx.targets.budget). G is the gradient of the weight itself, so that it is there for every op
that insert reaches; x and dy are not for weights inside a recurrent op, a body of control flow, or
where the op broadcasts or gathers the weight. What could not be read is said by name.

The graph is that of eval mode: no dropout, running statistics. One batch is in memory at a time.
Positions that an `attention_mask` leaves out are no x; what gradient they get counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lora_fx.adapter.variant import matrix
from lora_fx.data import LABELS
from lora_fx.errors import LoraFxError
from lora_fx.fx.calibration import Run, SiteRows, Watched, part, readable
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.tensors import from_numpy, to_numpy
from lora_fx.fx.train.loss import Loss, loss_function
from lora_fx.inputs import Named
from lora_fx.ir.graph import Site
from lora_fx.ir.layout import Layout
from lora_fx.passes.find import find, site_layout
from lora_fx.passes.insert import reached
from lora_fx.targets.budget import STATISTICS, WIDE, Calibration, Moments, Sums
from lora_fx.targets.target import Target, contains, relative


def calibrate(
    cap: Captured,
    uses: Mapping[str, str],
    data: Iterable[Named],
    loss: str | Loss = "ce",
    wanted: Sequence[str] = ("power", "outputs", "gradient"),
) -> Calibration:
    """One pass over data.

    Args:
        cap: The model.
        uses: Target key → the alias through which its update applies; empty for all uses.
        data: Batches of arrays or tensors by argument name, with a column of labels.
        loss: ce, mse, or a function of (output, labels), as for train.
        wanted: Names in lora_fx.targets.budget.STATISTICS. Without outputs and gradient no label
            is needed.

    Raises:
        LoraFxError: No batch, a column that the model does not take, a loss that is not finite.
    """
    unknown = [name for name in wanted if name not in STATISTICS]
    if unknown:
        raise LoraFxError(f"no statistic {unknown[0]!r}", f"there are {', '.join(STATISTICS)}")
    seen = _Seen(uses, frozenset(wanted))
    weights, results = "gradient" in wanted, "outputs" in wanted
    module = Watched(cap, seen.choose, seen.inputs, weights=weights, results=results)
    total, count = 0.0, 0
    for i, batch in enumerate(data):
        n = len(next(iter(batch.values())))
        seen.mask = _mask(batch)
        with torch.set_grad_enabled(weights or results):
            value = _run(module, batch, loss, backward=weights or results)
        if value is not None:
            if not torch.isfinite(value):
                raise LoraFxError(
                    f"the loss of batch {i + 1} is {float(value.detach()):g}", "look at the data"
                )
            seen.gradients(module.last, value, n)
            total += float(value.detach()) * n
        count += n
    if not count:
        raise LoraFxError("the data has no batch", "an iterator can be read once only")
    mean = total / count if weights or results else None
    moments = seen.moments(count)
    return Calibration(moments, tuple(seen.notes), count, mean, seen.dead)


def _run(module: Watched, batch: Named, loss: str | Loss, *, backward: bool) -> Tensor | None:
    """The loss of a batch; None where none is wanted."""
    signature = execution_of(module).captured.signature
    device = next((p.device for p in module.parameters()), None)
    given = {k: _tensor(v).to(device) for k, v in batch.items()}
    strange = [k for k in given if k not in signature.keywords and not signature.open]
    if len(strange) > 1:
        raise LoraFxError(
            f"the model takes no argument {strange[0]!r}, nor {strange[1]!r}",
            f"it takes {', '.join(sorted(signature.keywords))}; one more column holds the labels",
        )
    label = strange[0] if strange else next((n for n in LABELS if n in given), "")
    compute, own = loss_function(loss, label, lambda n: n in signature.keywords)
    dropped = label and not own and label not in signature.required
    out = module(**{k: v for k, v in given.items() if not (dropped and k == label)})
    return compute(out, given.get(label)) if backward else None


def _mask(batch: Named) -> Tensor | None:
    """The attention mask [examples, positions] of a batch of texts."""
    mask = batch.get("attention_mask")
    found = None if mask is None else _tensor(mask)
    return found if found is not None and found.dim() == 2 else None


def _tensor(value: object) -> Tensor:
    return value if isinstance(value, Tensor) else from_numpy(np.asarray(value))


class _Seen:
    """The sums of all targets, and what had to be said."""

    def __init__(self, uses: Mapping[str, str], wanted: frozenset[str]) -> None:
        self.uses, self.wanted = uses, wanted
        self.sums = {key: Sums() for key in uses}
        self.notes: dict[str, None] = {}
        self.mask: Tensor | None = None
        self.asked: set[str] = set()
        self.reached: set[str] = set()
        self.targets: dict[str, Target] = {}

    def choose(self, graph: FxGraph) -> Sequence[tuple[Site, tuple[str, ...]]]:
        """The uses of the wanted targets in a program."""
        targets, here = reached(find(graph), self.uses)  # those that these arguments reach
        self.targets |= targets
        for site, keys in here:
            for key in keys if self.wanted != {"gradient"} else ():
                if not readable(site):
                    self.say(key, f"its {site.op} shows no inputs and gradients of its own")
        return [(site, tuple(keys)) for site, keys in here]

    def inputs(self, site: Site, keys: tuple[str, ...], rows: SiteRows | None) -> None:
        """Add the x of one use; positions that are padding have none."""
        if rows is not None and self.mask is not None:
            rows = rows.kept(self.mask.to(rows.value.device))
        for key in keys if self.wanted & {"inputs", "power"} else ():
            x = self._rows(key, site, rows, out=False)
            if x is None or rows is None:
                continue
            power = x.sum(-1) if rows.one_hot else x.double().square().sum(-1).sum(-1)
            self.sums[key].add("power", power.numpy(force=True), rows.count)
            if "inputs" in self.wanted:
                value = x if rows.one_hot else self._second(key, x)
                if value is not None:
                    self.sums[key].add("inputs", value.numpy(force=True), rows.count)

    def gradients(self, run: Run, loss: Tensor, n: int) -> None:
        """Add ∂L/∂W and dy of one batch of n examples."""
        leaves = [*run.leaves.values(), *(made.zeros for made in run.zeros)]
        if leaves and not loss.requires_grad:
            raise LoraFxError(
                "the loss depends on no target: no gradient reaches any",
                "look at the loss, and at what lora-fx targets lists",
            )
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else ()
        asked = [*(keys for keys, _ in run.leaves), *(made.tap.keys for made in run.zeros)]
        for keys, grad in zip(asked, grads, strict=True):
            self.asked.update(keys)
            self.reached.update(keys if grad is not None else ())
        for (keys, _), grad in zip(run.leaves, grads, strict=False):
            for key in keys if grad is not None else ():
                self.sums[key].add("gradient", matrix(self.targets[key], to_numpy(grad)) * n)
        for made, grad in zip(run.zeros, grads[len(run.leaves) :], strict=True):
            rows = None if grad is None else made.rows(grad * n)
            for key in made.tap.keys if grad is not None else ():
                dy = self._rows(key, made.tap.site, rows, out=True)
                value = None if dy is None else self._second(key, dy)
                if value is not None and rows is not None:
                    self.sums[key].add("outputs", value.numpy(force=True), rows.count)

    def moments(self, examples: int) -> dict[str, Moments]:
        """The moments by key, in the order that was asked for."""
        for key in self.dead:
            self.say(key, "no gradient reaches it")
        found = {key: sums.moments(examples) for key, sums in self.sums.items()}
        for key, moments in found.items():
            for value in (moments.inputs, moments.outputs):
                if value is not None and not np.isfinite(value).all():
                    raise LoraFxError(
                        f"{key}: the data leads to NaN or infinite values there",
                        "are there such values, or very large ones, in the data?",
                    )
        return found

    @property
    def dead(self) -> tuple[str, ...]:
        """The targets of which a gradient was asked for and never came."""
        return tuple(key for key in self.uses if key in self.asked - self.reached)

    def say(self, key: str, why: str) -> None:
        """A note, once."""
        self.notes[f"{key}: {why}"] = None

    def _rows(self, key: str, site: Site, rows: SiteRows | None, *, out: bool) -> Tensor | None:
        """A target's own part of the rows of a use; counts where they are one-hot."""
        target = self.targets[key]
        way = _straight(site, target)
        if rows is None or way is None:
            other = "broadcasts it" if rows is None else "reads it in other axes or parts"
            self.say(key, f"its {site.op} {other}: its rows there are not counted")
            return None
        value = rows.value
        if rows.one_hot:
            value = torch.bincount(value, minlength=rows.one_hot).unsqueeze(0)
        value = part(value, *way, target.layout, out=out)
        return value[0] if rows.one_hot else value

    def _second(self, key: str, rows: Tensor) -> Tensor | None:
        """Σ r rᵀ over the rows; in fp64 where that is cheap."""
        side = rows.shape[-1]
        if side > WIDE:
            self.say(key, f"a side of {side} is above {WIDE}: its second moments are not taken")
            return None
        wide = rows.double() if side <= 1024 else rows.float()
        return wide.mT @ wide


def _straight(site: Site, target: Target) -> tuple[Layout, tuple[int, ...]] | None:
    """(Layout of a use, where the target begins in it); None where it reads it in other axes."""
    read = site_layout(site, target.parameter.shape)
    if read is None or not contains(read[0], target.region):
        return None
    bounds = relative(target.region, read[0])
    return (read[1], read[1].starts(bounds)) if read[1].narrow(bounds) == target.layout else None
