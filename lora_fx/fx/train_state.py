"""Where a run is, all of it: what a later run needs to go on as if nothing had happened.

======================  ==========================================================================
now/NAME, best/NAME     what is trained, now and at the step that is kept
adam/NAME/FIELD         AdamW's moments
losses                  of every step, float64
rng/RANK                of torch, a process a row: the CPU's, then the GPU's
state.json              step, epoch, batches of it that are done, validations, patience, the facts
======================  ==========================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.fx.tensors import from_numpy, to_numpy
from lora_fx.fx.train_facts import Facts, differences
from lora_fx.fx.train_folder import TENSORS, WORDS, read_folder, write_folder
from lora_fx.fx.train_optimizer import MOMENTS, Optimizer
from lora_fx.fx.train_processes import Processes
from lora_fx.fx.train_report import TrainReport


@dataclass(frozen=True)
class Saving:
    """Where a run keeps its state, and from where it goes on.

    Args:
        folder: To be written, and replaced; None for none.
        every: Steps between two states; None for one at every validation.
        resume: The state of an earlier run to go on from.
    """

    folder: str | None = None
    every: int | None = None
    resume: str | None = None


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
        moved: What a state has moments of.
    """

    step: int = 0
    epoch: int = 0
    at: int = 0
    waited: int = 0
    best: float = math.inf
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    report: TrainReport = field(default_factory=TrainReport)
    moved: list[str] = field(default_factory=list)


def snapshot(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """A copy of what is trained."""
    return {name: p.detach().clone() for name, p in optimizer.named.items()}


@torch.no_grad()
def put_back(optimizer: Optimizer, values: dict[str, torch.Tensor]) -> None:
    """Set what is trained."""
    for name, p in optimizer.named.items():
        p.copy_(values[name])


def save_state(
    folder: str, trail: Trail, optimizer: Optimizer, facts: Facts, world: Processes
) -> None:
    """Write the state of a run; every process calls it, the first one writes.

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
        "step": trail.step,
        "epoch": trail.epoch,
        "at": trail.at,
        "waited": trail.waited,
        "best": trail.best if trail.kept else None,
        "best_step": report.best_step,
        "before": report.before,
        "stopped": report.stopped,
        "validation": {str(k): v for k, v in report.validation.items()},
        "moments": optimizer.moved,
        "facts": facts,
    }
    write_folder(folder, words, tensors)


def load_state(folder: str, optimizer: Optimizer, facts: Facts, world: Processes) -> Trail:
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
    for name in trail.moved:
        like = {field: named[name] for field in MOMENTS} | {"step": torch.zeros(())}
        of = f"adam/{name}/"
        optimizer.put(name, {f: _like(of + f, p, tensors, where) for f, p in like.items()})
    _put_rng(_like(f"rng/{world.rank}", None, tensors, where), named[next(iter(named))].device)
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
    trail = Trail(report=report, moved=list(words["moments"]))
    for name in trail.moved:
        if name not in optimizer.named:
            raise KeyError(name)
    trail.step, trail.epoch, trail.at, trail.waited = (
        int(words[k]) for k in ("step", "epoch", "at", "waited")
    )
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


def _put_rng(row: torch.Tensor, device: torch.device) -> None:
    size = torch.get_rng_state().numel()
    torch.set_rng_state(row[:size])
    if device.type == "cuda":
        torch.cuda.set_rng_state(row[size:], device)
