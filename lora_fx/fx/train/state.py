"""A run: what it may be told, its optimizer, what it reports, and where it is.

A state is all that a later run needs to go on as if nothing had happened:

======================  ==========================================================================
now/NAME, best/NAME     what is trained, now and at the step that is kept
adam/NAME/FIELD         the optimizer's moments
losses                  of every step, float64
rng/RANK                of torch, a process a row: the CPU's, then the GPU's
state.json              step, epoch, batches of it that are done, validations, patience, the facts
======================  ==========================================================================
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_fx.adapter.variant import asked
from lora_fx.checkpoint.provenance import fingerprint
from lora_fx.data import Buckets, Table
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, check_format, stamp
from lora_fx.files.atomic import check_output, replacing
from lora_fx.files.replaceable import CURVE
from lora_fx.files.strict_json import read_json
from lora_fx.files.tensor_files import read_tensors, write_tensors
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.module.adapted import AdaptedModule, both_ends
from lora_fx.fx.tensors import device_of, from_numpy, to_numpy
from lora_fx.fx.train.loss import Loss
from lora_fx.fx.train.processes import Processes
from lora_fx.inputs import Named
from lora_fx.text import Json, short

Made = tuple[Callable[..., torch.optim.Optimizer], Json, tuple[str, ...]]
"""A class of torch, its arguments, and what it holds of a tensor; `step` is a number."""
OPTIMIZERS: dict[str, Made] = {
    "adamw_torch": (torch.optim.AdamW, {}, ("exp_avg", "exp_avg_sq", "step")),
    "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}, ("exp_avg", "exp_avg_sq", "step")),
    "sgd": (torch.optim.SGD, {}, ()),
    "rmsprop": (torch.optim.RMSprop, {}, ("square_avg", "step")),
    "adagrad": (torch.optim.Adagrad, {}, ("sum", "step")),
}
"""Optimizers by transformers' names, with the values that its Trainer gives them."""
SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "cosine": lambda at, rise, steps: 0.5 * (1 + math.cos(math.pi * _done(at, rise, steps))),
    "linear": lambda at, rise, steps: 1 - _done(at, rise, steps),
    "constant": lambda at, rise, steps: 1.0,
    "constant_with_warmup": lambda at, rise, steps: 1.0,
    "inverse_sqrt": lambda at, rise, steps: ((rise or 10_000) / (at + 10_000 * (not rise))) ** 0.5,
}
"""The share of the rate after the warm-up, by transformers' names, of (step, warm-up, steps)."""


class Optimizer:
    """The optimizer of a run.

    Args:
        model: From insert; what requires grad is trained.
        settings: Learning rate, weight decay, warm-up, schedule.
        steps: The steps of the whole run.
    """

    def __init__(self, model: AdaptedModule, settings: Settings, steps: int) -> None:
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        make, given, self.fields = OPTIMIZERS[settings.optimizer]
        groups = model.parameter_groups(settings.lr, settings.weight_decay)
        self._inner = make(groups, lr=settings.lr, **given)
        self._peaks = [group["lr"] for group in self._inner.param_groups]
        self.steps, self.settings = steps, settings

    @property
    def trained(self) -> list[nn.Parameter]:
        """What it moves."""
        return list(self.named.values())

    def clear(self) -> None:
        """Forget the gradients."""
        self._inner.zero_grad()

    def take(self, step: int) -> None:
        """Take a step, counted from 1, with the gradients as they are."""
        share = factor(step - 1, self.steps, self.settings.warmup, self.settings.schedule)
        for group, peak in zip(self._inner.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share
        self._inner.step()

    @property
    def moved(self) -> list[str]:
        """Names of what has moments: all but what never had a gradient."""
        return [name for name, p in self.named.items() if self._inner.state.get(p)]

    def moments(self) -> dict[str, torch.Tensor]:
        """`NAME/exp_avg` … of every tensor that has moved."""
        state = self._inner.state
        return {
            f"{n}/{field}": state[self.named[n]][field] for n in self.moved for field in self.fields
        }

    def like(self, name: str) -> dict[str, torch.Tensor]:
        """A tensor of the shape, dtype and device of each moment of one tensor, by field."""
        p = self.named[name]
        step = torch.zeros((), device=p.device if self._inner.defaults.get("fused") else "cpu")
        return {field: step if field == "step" else p for field in self.fields}

    def put(self, name: str, moments: dict[str, torch.Tensor]) -> None:
        """Go on from such moments of one tensor, by field."""
        self._inner.state[self.named[name]] = dict(moments)


def factor(step: int, steps: int, warmup: float, schedule: str = "cosine") -> float:
    """The share of the learning rate at a step, counted from 0.

    transformers' own after the warm-up. In it a step has the share that the next one has there,
    where the first step moves nothing.
    """
    rise = 0 if schedule == "constant" else math.ceil(steps * warmup)
    return (step + 1) / rise if step < rise else SCHEDULES[schedule](step, rise, steps)


def _done(step: int, rise: int, steps: int) -> float:
    """The share of the steps after the warm-up that lie before this one."""
    return (step - rise) / max(1, steps - rise)


@dataclass(frozen=True)
class Settings:
    """What `fit` may be told. `steps` overrides `epochs`; validation runs `checks` times.

    Args:
        epochs: Passes over the training data.
        steps: Steps of the optimizer, instead of epochs.
        batch_size: Examples a step, of all processes together.
        lr: Highest learning rate of a; the variant says that of b.
        weight_decay: What a weight loses in a step of AdamW is lr · weight_decay of itself.
        warmup: Share of the steps in which the rate rises; then the schedule has it.
        clip: The longest gradient, as the norm of all of them together; 0 clips nothing.
        checks: Validations in a run.
        seed: The seed of dropout and of the order of the examples.
        patience: Validations in a row without a new lowest loss that end the run.
        accumulate: Parts that a process's share of a step runs in, one after another.
        mixed_precision: no, or bf16: products in bfloat16, what is trained stays float32.
        schedule: A name in SCHEDULES.
        optimizer: A name in OPTIMIZERS.

    Raises:
        LoraFxError: A schedule or an optimizer that is not known.
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
    schedule: str = "cosine"
    optimizer: str = "adamw_torch"

    def __post_init__(self) -> None:
        """Refuse a name that is not known."""
        for what, names in (("schedule", list(SCHEDULES)), ("optimizer", list(OPTIMIZERS))):
            if (name := getattr(self, what)) not in names:
                raise LoraFxError(f"no {what} {name!r}", f"one of {', '.join(names)}")


@dataclass(frozen=True)
class Saving:
    """Where a run keeps its state, and from where it goes on.

    Args:
        folder: The folder that is written, and replaced; None for none.
        every: Steps between two states; None for one at every validation.
        resume: The state of an earlier run to go on from.
        limit: How many states are kept, the last ones, as `checkpoint-STEP` in the folder; None
            for one, which is the folder itself.
    """

    folder: str | None = None
    every: int | None = None
    resume: str | None = None
    limit: int | None = None


# What a run did: losses by step, what was kept, and a verdict in one line.


@dataclass
class TrainReport:
    """Losses by step, and what was kept: the adapter in the model is that of `best_step`.

    `before` is the validation loss before the first step, None without validation.
    `stopped` is the step at which patience ended the run, or None where it went to its end.
    `resumed` is the step from which the run went on, None where it began at the first.
    """

    losses: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    before: float | None = None
    best_step: int = 0
    stopped: int | None = None
    resumed: int | None = None
    warnings: list[str] = field(default_factory=list)

    __repr__ = short

    @property
    def verdict(self) -> str:
        """Whether the validation loss rose, in one line that names the step that was kept."""
        line = verdict(self.validation, self.best_step)
        return line if self.stopped is None else f"{line}; patience ended at step {self.stopped}"

    def __str__(self) -> str:
        """Which step was kept, from where the run went on, and the verdict."""
        best = self.validation.get(self.best_step)
        said = f"kept step {self.best_step} of {len(self.losses)}"
        said += f", validation loss {best:.4f}" if best is not None else ""
        said += f" (went on from step {self.resumed})" if self.resumed is not None else ""
        return f"{said}\n{self.verdict}"

    def to_json(self) -> Json:
        """What report files hold."""
        return {
            "losses": [round(x, 6) for x in self.losses],
            "validation": {str(k): round(v, 6) for k, v in self.validation.items()},
            "before": None if self.before is None else round(self.before, 6),
            "best_step": self.best_step,
            "stopped": self.stopped,
            "resumed": self.resumed,
            "verdict": self.verdict,
        }

    def to_csv(self) -> str:
        """A line of step, loss and validation for every step; step 0 is before the first one."""
        told = {0: self.before, **self.validation}
        rows = [f"{i},{x},{told.get(i, '')}" for i, x in enumerate(self.losses, 1)]
        return "\n".join([CURVE, *([f"0,,{told[0]}"] if told[0] is not None else []), *rows, ""])


def verdict(validation: Mapping[int, float], kept: int) -> str:
    """One line on overfitting.

    Args:
        validation: Step → loss, in the order of the steps.
        kept: The step whose adapter is kept; of `validation`, unless that is empty.
    """
    if not validation:
        return f"no validation: overfitting would not be seen; kept the last step, {kept}"
    steps, ending = list(validation), f"; kept step {kept}"
    last = steps[-1]
    if len(steps) == 1:
        return f"one validation, at step {last}: no rise or fall can be seen" + ending
    if kept == last:
        fall = _change(validation[steps[-2]], validation[last])
        line = f"validation loss still falling at the last step (by {fall} since {steps[-2]})"
        return line + ending
    if validation[last] == validation[kept]:
        return f"validation loss did not fall after step {kept}" + ending
    rise = _change(validation[kept], validation[last])
    return f"validation loss rose {rise} after step {kept}" + ending


def _change(old: float, new: float) -> str:
    """The size of a change in per cent; as a number where the old value is not above zero."""
    if old <= 0:
        return f"{abs(new - old):.3g}"
    share = 100 * abs(new - old) / old
    if share < 0.1:
        return "less than 0.1 %"
    return f"{share:.0f} %" if share >= 9.95 else f"{share:.1f} %"


# How far a run is, and the state from which another one goes on.


@dataclass
class Trail:
    """How far a run is, beside its weights.

    Args:
        step: Steps that are done.
        epoch: Passes over the data that are done.
        at: Batches of the next one that are done.
        waited: Validations in a row without a new lowest loss.
        best: The lowest validation loss.
        kept: What is trained, as it was then; empty before the first validation.
        report: What the run has to say so far.
    """

    step: int = 0
    epoch: int = 0
    at: int = 0
    waited: int = 0
    best: float = math.inf
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    report: TrainReport = field(default_factory=TrainReport)


COUNTS = ("step", "epoch", "at", "waited")
"""The numbers of a Trail, by which a state has them too."""


def snapshot(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """A copy of what is trained."""
    return {name: p.detach().clone() for name, p in optimizer.named.items()}


@torch.no_grad()
def put_back(optimizer: Optimizer, values: dict[str, torch.Tensor]) -> None:
    """Set what is trained."""
    for name, p in optimizer.named.items():
        p.copy_(values[name])


def save(to: Saving, trail: Trail, optimizer: Optimizer, facts: Facts, world: Processes) -> None:
    """Write the state of a run; every process calls it, the first one writes.

    States beyond the limit are removed, the oldest first, when the new one is on disk.

    Raises:
        LoraFxError: The disk is full, or the folder cannot be written.
    """
    device = optimizer.trained[0].device
    own = [torch.get_rng_state()]
    own += [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    rows = world.gathered(torch.cat(own))
    if not world.first:
        return
    report = trail.report
    tensors: dict[str, Array] = {"losses": np.array(report.losses, np.float64)}
    tensors |= {f"rng/{rank}": to_numpy(row) for rank, row in enumerate(rows)}
    for part, values in (("now", optimizer.named), ("best", trail.kept)):
        tensors |= {f"{part}/{name}": to_numpy(t) for name, t in values.items()}
    tensors |= {f"adam/{name}": to_numpy(t) for name, t in optimizer.moments().items()}
    words = {
        **{name: getattr(trail, name) for name in COUNTS},
        "best": trail.best if trail.kept else None,
        "best_step": report.best_step,
        "before": report.before,
        "stopped": report.stopped,
        "validation": {str(k): v for k, v in report.validation.items()},
        "moments": optimizer.moved,
        "facts": facts,
    }
    folder = Path(to.folder or "")
    if to.limit:
        folder.mkdir(exist_ok=True)
        folder /= f"checkpoint-{trail.step}"
    # the old state stands until the new one is whole and on disk
    with replacing(folder, force=True, own=True) as stage:
        stage.mkdir()
        text = json.dumps({**stamp(), **words}, indent=1, allow_nan=False)
        (stage / WORDS).write_text(text + "\n", encoding="utf-8")
        write_tensors(stage / TENSORS, tensors, {})
    for old in checkpoints(folder.parent)[: -to.limit] if to.limit else ():
        check_output(old, force=True, own=True, names=(WORDS, TENSORS))
        shutil.rmtree(old)


def load(folder: str, optimizer: Optimizer, facts: Facts, world: Processes) -> Trail:
    """Set a run to a state, random numbers too.

    Raises:
        LoraFxError: There is no state, it is damaged, or it is of another model, other data or
            other settings: the first difference is named.
    """
    words, tensors = read_folder(folder)
    there = words.get("facts")
    found = differences(there if isinstance(there, dict) else {}, facts)
    if found:
        more = f"; {len(found) - 1} more differences" if found[1:] else ""
        raise LoraFxError(
            f"{folder} is the state of another run: {found[0]}{more}",
            "a run goes on with the model, data and settings that it began with",
        )
    try:
        trail = _trail(words, tensors, optimizer)
    except (LookupError, TypeError, ValueError) as e:
        raise LoraFxError(f"{folder}/{WORDS}: damaged: {e!r}", "start anew") from e
    named, where = optimizer.named, f"{folder}/{TENSORS}"
    put_back(optimizer, {n: _like(f"now/{n}", p, tensors, where) for n, p in named.items()})
    if trail.kept:
        trail.kept = {n: _like(f"best/{n}", p, tensors, where) for n, p in named.items()}
    for name in words["moments"]:
        of, like = f"adam/{name}/", optimizer.like(name)
        optimizer.put(name, {f: _like(of + f, p, tensors, where) for f, p in like.items()})
    rng, size = _like(f"rng/{world.rank}", None, tensors, where), torch.get_rng_state().numel()
    torch.set_rng_state(rng[:size])
    if (device := optimizer.trained[0].device).type == "cuda":
        torch.cuda.set_rng_state(rng[size:], device)
    return trail


def _trail(words: dict[str, Any], tensors: dict[str, Array], optimizer: Optimizer) -> Trail:
    report = TrainReport(
        [float(x) for x in tensors["losses"]],
        {int(k): float(v) for k, v in words["validation"].items()},
        before=words["before"],
        best_step=int(words["best_step"]),
        stopped=words["stopped"],
    )
    if len(report.losses) != words["step"]:
        raise ValueError(f"{len(report.losses)} losses of {words['step']} steps")
    counts: dict[str, Any] = {name: int(words[name]) for name in COUNTS}
    trail = Trail(**counts, report=report)
    for name in words["moments"]:
        if name not in optimizer.named:
            raise KeyError(name)
    if words["best"] is not None:
        trail.best, trail.kept = float(words["best"]), snapshot(optimizer)
    return trail


def _like(
    name: str, like: torch.Tensor | None, tensors: dict[str, Array], where: str
) -> torch.Tensor:
    if name not in tensors:
        raise LoraFxError(f"{where}: no tensor {name!r}", "the state is damaged: start anew")
    found = from_numpy(tensors[name])
    if like is None:
        return found
    if found.shape != like.shape or found.dtype != like.dtype:
        raise LoraFxError(
            f"{where}: tensor {name!r} is {found.dtype} {list(found.shape)}; expected "
            f"{like.dtype} {list(like.shape)}",
            "the state is damaged: start anew",
        )
    return found.to(like.device)


# A run's state on disk: a folder of state.json and state.safetensors, replaced as a whole.
#
# Numbers that JSON would round are tensors; floats in JSON are written so that they come back the
# same. Nothing is unpickled.


WORDS, TENSORS = "state.json", "state.safetensors"
STEP = re.compile(r"checkpoint-\d+")


def check_folder(folder: str, *, force: bool, own: bool = False, limit: int | None = None) -> None:
    """Refuse, before any work, a folder that no state can be written to.

    Args:
        folder: To be made.
        force: Replace a state that is there; a folder that holds anything else never is.
        own: The state of this run, which goes on from it.
        limit: As in Saving; states of another run are not mixed with those of this one.
    """
    path = Path(folder)
    several = checkpoints(path)
    if several and not (limit and own):
        hint = f"choose another folder, or --resume {folder} --save-total-limit N"
        raise LoraFxError(f"{folder} holds states of a run, the last {several[-1].name}", hint)
    if not several:
        check_output(folder, force=force, own=own, names=(WORDS, TENSORS))
    if (path / WORDS).exists() and (limit or STEP.fullmatch(path.name)):
        raise LoraFxError(f"{folder} is one state, and is kept", "--save-state DIR, another one")


def checkpoints(folder: Path) -> list[Path]:
    """The states in a folder of several, the oldest first."""
    found = [p for p in folder.glob("*") if STEP.fullmatch(p.name) and (p / WORDS).is_file()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def step_of(folder: str) -> int | None:
    """The step of a state; None where there is none."""
    try:
        return int(read_folder(folder)[0]["step"])
    except (LoraFxError, LookupError, TypeError, ValueError):
        return None


def read_folder(folder: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """A state's JSON and tensors; the last one's of a folder of several.

    Raises:
        LoraFxError: There is none, or it is damaged or of another version.
    """
    path = [Path(folder), *checkpoints(Path(folder))][-1]
    if not (path / WORDS).is_file() or not (path / TENSORS).is_file():
        raise LoraFxError(
            f"{folder}: no training state: {WORDS} and {TENSORS} are not both there",
            "train --save-state writes one",
        )
    words = read_json(path / WORDS, hint="start anew")
    check_format(words, str(path / WORDS))
    return words, read_tensors(path / TENSORS)[0]


# What a run is about: model, data and settings, so that no other run goes on from its state.
#
# Facts are JSON, two levels deep: part → what → a short text or number. Of weights that are not
# trained both ends of each tensor count, as in `lora_fx.checkpoint.provenance`; of data every byte.


Facts = dict[str, dict[str, Any]]


def facts_of(
    model: AdaptedModule,
    training: Table | Buckets,
    validation: Table | None,
    loss: str | Loss,
    optimizer: Optimizer,
    processes: int,
) -> Facts:
    """The facts of a run, before or after any step of it."""
    targets = {
        f"update of {key!r}": "rank {}, alpha {:g}, {}".format(*asked(u), u.variant)
        for key, u in model.updates.items()
    }
    named = list(model.named_parameters())
    trained = {n: f"{dtype_name(p.dtype)} {list(p.shape)}" for n, p in named if p.requires_grad}
    frozen = [*((n, p) for n, p in named if n not in trained), *model.named_buffers()]
    graph = str(model.graph(True).graph)
    return {
        "model": {
            **targets,
            **{f"trained tensor {name!r}": what for name, what in trained.items()},
            "dropout": float(model.adapter().metadata.get("dropout") or 0.0),
            "graph": hashlib.sha256(graph.encode()).hexdigest(),
            "weights": _weights(frozen),
        },
        "data": {"training": _data(training), "validation": _data(validation)},
        "settings": {
            **{k: v for k, v in asdict(optimizer.settings).items() if k != "epochs"},
            "steps": optimizer.steps,
            "loss": loss if isinstance(loss, str) else _function(loss),
            "device": device_of(model).type,
            "processes": processes,
        },
    }


def differences(there: Named, here: Facts) -> list[str]:
    """What differs between a state's facts and a run's, in words; most telling first."""
    found = []
    for part, facts in here.items():
        old = there.get(part)
        old = old if isinstance(old, Mapping) else {}
        for what in [*facts, *(k for k in old if k not in facts)]:
            a, b = old.get(what), facts.get(what)
            if a != b:
                both = isinstance(a, str) and isinstance(b, str) and len(a) == len(b) == 64
                then, now = ("none" if x is None else str(x) for x in (a, b))
                told = "another" if both else f"{then} there, {now} here"
                found.append(f"{part}: {what}: {told}")
    return found


def digests(model: AdaptedModule, facts: Facts) -> dict[str, bytes]:
    """What every process of a run must have in common, in words, with sha256 digests."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    texts = {part: json.dumps(facts[part], sort_keys=True) for part in facts}
    texts["initial values"] = _weights(trained)
    return {name: hashlib.sha256(text.encode()).digest() for name, text in texts.items()}


def _weights(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    return str(fingerprint((n, tuple(t.shape), both_ends(t)) for n, t in tensors)["sample"])


def _data(data: Table | Buckets | None) -> str:
    """Number of examples and a hash of every byte, by column."""
    if data is None:
        return "none"
    whole = hashlib.sha256(json.dumps([data.label]).encode())
    for table in data.tables if isinstance(data, Buckets) else [data]:
        for name, column in sorted(table.columns.items()):
            head = [name, str(column.dtype), list(column.shape)]
            whole.update(json.dumps(head).encode())
            whole.update(np.ascontiguousarray(column).tobytes())
    return f"{len(data)} examples, sha256 {whole.hexdigest()[:16]}"


def _function(function: Loss) -> str:
    """A function's name and a hash of its text."""
    name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        return name
    return f"{name}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
