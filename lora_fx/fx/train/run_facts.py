"""The facts of a run (model, data, settings), which a resumed state must share.

Facts are JSON, two levels deep: part → what → a short text or number. Of weights that are not
trained both ends of each tensor count, as in `lora_fx.checkpoint.provenance`; of data every byte.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from lora_fx.adapter.variant import asked
from lora_fx.checkpoint.base_fingerprint import fingerprint
from lora_fx.data import Buckets, Table
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module_base import both_ends
from lora_fx.fx.tensors import device_of
from lora_fx.fx.train.loss import Loss
from lora_fx.fx.train.optimizer import Optimizer
from lora_fx.inputs import Named

Facts = dict[str, dict[str, Any]]


def facts_of(
    model: AdaptedModule,
    training: Table | Buckets,
    validation: Table | None,
    loss: str | Loss,
    optimizer: Optimizer,
    processes: int,
) -> Facts:
    """Return the facts of a run, which are the same before and after any step."""
    settings = asdict(optimizer.settings)
    del settings["epochs"]
    return {
        "model": _model(model),
        "data": {"training": _data(training), "validation": _data(validation)},
        "settings": {
            **settings,
            "steps": optimizer.steps,
            "loss": loss if isinstance(loss, str) else _function(loss),
            "device": device_of(model).type,
            "processes": processes,
        },
    }


def _model(model: AdaptedModule) -> dict[str, Any]:
    """Return the facts of a model: its updates, trained tensors, graph and frozen weights."""
    facts: dict[str, Any] = {}
    for key, update in model.updates.items():
        rank, alpha = asked(update)
        facts[f"update of {key!r}"] = f"rank {rank}, alpha {alpha:g}, {update.variant}"
    frozen = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            text = f"{dtype_name(parameter.dtype)} {list(parameter.shape)}"
            facts[f"trained tensor {name!r}"] = text
        else:
            frozen.append((name, parameter))
    graph = str(model.graph(True).graph)
    facts["dropout"] = float(model.adapter().metadata.get("dropout") or 0.0)
    facts["graph"] = hashlib.sha256(graph.encode()).hexdigest()
    facts["weights"] = _weights([*frozen, *model.named_buffers()])
    return facts


def differences(state: Named, run: Facts) -> list[str]:
    """Return the differences between a state's facts and a run's, in words."""
    lines = []
    for part, facts in run.items():
        state_facts = state.get(part)
        if not isinstance(state_facts, Mapping):
            state_facts = {}
        for what in dict.fromkeys([*facts, *state_facts]):
            before = state_facts.get(what)
            now = facts.get(what)
            if before != now:
                lines.append(f"{part}: {what}: {_difference(before, now)}")
    return lines


def _difference(state: Any, run: Any) -> str:
    """Return two facts in words; for two hashes, only say that they differ."""
    if isinstance(state, str) and isinstance(run, str) and len(state) == len(run) == 64:
        return "another"
    before, now = ("none" if fact is None else str(fact) for fact in (state, run))
    return f"{before} in the state, {now} now"


def digests(model: AdaptedModule, facts: Facts) -> dict[str, bytes]:
    """Return sha256 digests, by name, of what all processes of a run must have in common."""
    trained = [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    texts = {part: json.dumps(facts[part], sort_keys=True) for part in facts}
    texts["initial values"] = _weights(trained)
    return {name: hashlib.sha256(text.encode()).digest() for name, text in texts.items()}


def _weights(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a hash of the first and last elements of each tensor."""
    samples = ((name, tuple(tensor.shape), both_ends(tensor)) for name, tensor in tensors)
    return str(fingerprint(samples)["sample"])


def _data(data: Table | Buckets | None) -> str:
    """Return the number of examples and a hash of every byte, by column."""
    if data is None:
        return "none"
    return f"{len(data)} examples, sha256 {data_digest(data)[:16]}"


def data_digest(data: Table | Buckets) -> str:
    """Return the sha256 of examples, over every byte, by column."""
    content = hashlib.sha256(json.dumps([data.label]).encode())
    tables = data.tables if isinstance(data, Buckets) else [data]
    for table in tables:
        for name, column in sorted(table.columns.items()):
            header = [name, str(column.dtype), list(column.shape)]
            content.update(json.dumps(header).encode())
            content.update(np.ascontiguousarray(column).tobytes())
    return content.hexdigest()


def _function(function: Loss) -> str:
    """Return a function's name and a hash of its source."""
    name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        return name
    return f"{name}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
