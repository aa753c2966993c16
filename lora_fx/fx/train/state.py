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

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, stamp
from lora_fx.files.atomic import check_output, replacing
from lora_fx.files.safetensors import write_tensors
from lora_fx.fx.tensors import from_numpy, to_numpy
from lora_fx.fx.train.optimizer import Optimizer
from lora_fx.fx.train.processes import Processes
from lora_fx.fx.train.run_facts import Facts, differences
from lora_fx.fx.train.settings import Saving
from lora_fx.fx.train.state_folder import TENSORS, WORDS, checkpoints, read_folder
from lora_fx.fx.train.train_report import TrainReport


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
