"""Save how far a run is, and resume another run from this state.

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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, stamp
from lora_fx.files.atomic import check_output, replacing
from lora_fx.files.tensor_files import write_tensors
from lora_fx.fx.tensors import from_numpy, to_numpy
from lora_fx.fx.train.optimizer import Optimizer
from lora_fx.fx.train.processes import Processes
from lora_fx.fx.train.run_facts import Facts, differences
from lora_fx.fx.train.settings import Saving
from lora_fx.fx.train.state_folder import TENSORS, WORDS, checkpoints, read_folder
from lora_fx.fx.train.train_report import TrainReport


@dataclass
class Trail:
    """The progress of a run, without its weights.

    Args:
        step: Steps that are done.
        epoch: Passes over the data that are done.
        at: Batches of the next one that are done.
        waited: Validations in a row without a new lowest loss.
        best: The lowest validation loss.
        kept: The trained tensors as they were then; empty before the first validation.
        report: The report of the run so far.
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
    return {name: parameter.detach().clone() for name, parameter in optimizer.named.items()}


@torch.no_grad()
def set_trained(optimizer: Optimizer, values: dict[str, torch.Tensor]) -> None:
    """Set what is trained."""
    for name, parameter in optimizer.named.items():
        parameter.copy_(values[name])


def save(to: Saving, trail: Trail, optimizer: Optimizer, facts: Facts, world: Processes) -> None:
    """Write the state of a run; every process calls it, the first one writes.

    States beyond the limit are removed, the oldest first, when the new one is on disk.

    Raises:
        LoraFxError: The disk is full, or the folder cannot be written.
    """
    random_states = world.gathered(_random_state(optimizer))
    if not world.first:
        return
    words = _words_of(trail, optimizer, facts)
    tensors = _tensors_of(trail, optimizer, random_states)
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
    if to.limit:
        for outdated in checkpoints(folder.parent)[: -to.limit]:
            check_output(outdated, force=True, own=True, names=(WORDS, TENSORS))
            shutil.rmtree(outdated)


def _random_state(optimizer: Optimizer) -> torch.Tensor:
    """Torch's random numbers in this process: the CPU's, then the GPU's."""
    device = optimizer.trained[0].device
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _words_of(trail: Trail, optimizer: Optimizer, facts: Facts) -> dict[str, Any]:
    """The part of a state that is JSON."""
    report = trail.report
    return {
        **{name: getattr(trail, name) for name in COUNTS},
        "best": trail.best if trail.kept else None,
        "best_step": report.best_step,
        "before": report.before,
        "stopped": report.stopped,
        "validation": {str(step): loss for step, loss in report.validation.items()},
        "moments": optimizer.moved,
        "facts": facts,
    }


def _tensors_of(
    trail: Trail, optimizer: Optimizer, random_states: Sequence[torch.Tensor]
) -> dict[str, Array]:
    """The part of a state that is tensors."""
    tensors: dict[str, Array] = {"losses": np.array(trail.report.losses, np.float64)}
    for rank, state in enumerate(random_states):
        tensors[f"rng/{rank}"] = to_numpy(state)
    for name, parameter in optimizer.named.items():
        tensors[f"now/{name}"] = to_numpy(parameter)
    for name, tensor in trail.kept.items():
        tensors[f"best/{name}"] = to_numpy(tensor)
    for name, moment in optimizer.moments().items():
        tensors[f"adam/{name}"] = to_numpy(moment)
    return tensors


def load(folder: str, optimizer: Optimizer, facts: Facts, world: Processes) -> Trail:
    """Set a run to a state, random numbers too.

    Raises:
        LoraFxError: There is no state, it is damaged, or it is of another model, other data or
            other settings: the first difference is named.
    """
    words, tensors = read_folder(folder)
    _refuse_other_run(folder, words.get("facts"), facts)
    try:
        trail = _trail(words, tensors, optimizer)
    except (LookupError, TypeError, ValueError) as e:
        raise LoraFxError(
            f"{folder}/{WORDS}: damaged: {e!r}", "start the run again without this state"
        ) from e

    where = f"{folder}/{TENSORS}"
    named = optimizer.named
    set_trained(
        optimizer,
        {name: _like(f"now/{name}", like, tensors, where) for name, like in named.items()},
    )
    if trail.kept:
        trail.kept = {
            name: _like(f"best/{name}", like, tensors, where) for name, like in named.items()
        }
    for name in words["moments"]:
        moments = {
            field: _like(f"adam/{name}/{field}", like, tensors, where)
            for field, like in optimizer.like(name).items()
        }
        optimizer.put(name, moments)
    _set_random_state(optimizer, _tensor(f"rng/{world.rank}", tensors, where))
    return trail


def _refuse_other_run(folder: str, state: object, run: Facts) -> None:
    """Raise for a state of another run; the message names the first difference."""
    lines = differences(state if isinstance(state, dict) else {}, run)
    if not lines:
        return
    more = f"; {len(lines) - 1} more differences" if len(lines) > 1 else ""
    raise LoraFxError(
        f"{folder} is the state of another run: {lines[0]}{more}",
        "resume it with the model, data and settings that it began with",
    )


def _set_random_state(optimizer: Optimizer, state: torch.Tensor) -> None:
    """Set torch's random numbers in this process, as _random_state gives them."""
    cpu_size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:cpu_size])
    device = optimizer.trained[0].device
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[cpu_size:], device)


def _trail(words: dict[str, Any], tensors: dict[str, Array], optimizer: Optimizer) -> Trail:
    """The progress of the run of a state; trained tensors keep their current values.

    Raises:
        LookupError, TypeError, ValueError: The state is damaged.
    """
    report = TrainReport(
        [float(loss) for loss in tensors["losses"]],
        {int(step): float(loss) for step, loss in words["validation"].items()},
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
        trail.best = float(words["best"])
        trail.kept = snapshot(optimizer)
    return trail


def _like(name: str, like: torch.Tensor, tensors: dict[str, Array], where: str) -> torch.Tensor:
    """A tensor of a state, which has the shape and the dtype of another, on its device."""
    tensor = _tensor(name, tensors, where)
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise LoraFxError(
            f"{where}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}; expected "
            f"{like.dtype} {list(like.shape)}",
            "the state is damaged: start the run again without it",
        )
    return tensor.to(like.device)


def _tensor(name: str, tensors: dict[str, Array], where: str) -> torch.Tensor:
    if name not in tensors:
        raise LoraFxError(
            f"{where}: no tensor {name!r}", "the state is damaged: start the run again without it"
        )
    return from_numpy(tensors[name])
