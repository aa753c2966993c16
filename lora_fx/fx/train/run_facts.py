"""What a run is about: model, data and settings, so that no other run goes on from its state.

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
from lora_fx.checkpoint.provenance import fingerprint
from lora_fx.data import Buckets, Table
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.module.adapted import AdaptedModule, both_ends
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
