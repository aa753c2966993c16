"""What every model of the zoo is put through. The tests and the table share these functions.

Numbers come back as ``Parity`` rows whose gates are those of ``prove``: FOLD_TOL and ORT_TOL, and
beyond them 4 × the model's own fp32-against-fp64 error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import draw
from lora_fx.compare import FOLD_TOL, ORT_TOL, Parity, Report, rel
from lora_fx.fx.module.execution import execution_of
from lora_fx.inputs import SIZES
from lora_fx.passes.proofs.parity import prove, torch_run
from lora_fx.passes.proofs.proof_inputs import arrays_of
from lora_fx.targets.found import Found
from lora_fx.targets.keys import base_name

from .base import Entry
from .models import ZOO
from .oracles import Subject, doubled, explicit, flat, matters, multiplied
from .shared import zoo

EFFECT = 0.15
"""Factor on a random B: the adapter is seen in the output and does not swamp it."""
SEEN = (0.05, 5.0)
"""A parity test of a no-op proves nothing: the effect, relative to the output, lies between."""
FACTORS = (1.0, 0.3, 3.0, 0.1, 10.0)
"""Tried in turn on EFFECT until the effect is within SEEN at every size."""
IDLE = 1e-12
"""In fp64, relative to the output: a weight that moves it by less has no effect."""


def facts(name: str) -> Entry:
    """The entry of a name that `zoo` takes."""
    return ZOO[name.partition("/")[0]]


@lru_cache(maxsize=2)
def built(name: str) -> Subject:
    """Built and captured in eval mode."""
    model, args, kwargs = zoo(name)
    model.requires_grad_(False)  # torch folds some matmuls otherwise where a weight wants grad
    return Subject(name, model, args, kwargs, lora_fx.capture(model, args, kwargs))


def adapted(name: str, **options: Any) -> Any:
    """Inserted with zero B."""
    entry = facts(name)
    options = {"dead": "drop" if entry.idle else "error", **options}
    return lora_fx.insert(built(name).cap, rank=2, include=entry.include, **options)


def perturbed(name: str) -> Any:
    """An adapter with a random B on every target of the plan, large enough to be seen."""
    module = adapted(name)
    for factor in FACTORS:
        updates = {}
        for key, u in module.updates.items():
            a, b = draw(key, u.layout, u.rank, 0, "probe")
            updates[key] = replace(u, a=a, b=b * np.float32(EFFECT * facts(name).gain * factor))
        module.load_adapter(Adapter(updates))
        if all(seen(e) for e in effects(module)):
            break
    return module


def seen(effect: float) -> bool:
    """True when an effect is neither lost in the output nor swamps it."""
    return SEEN[0] < effect < SEEN[1]


def effects(module: Any) -> list[float]:
    """The adapted against the unadapted output at every size."""
    result = []
    for size in SIZES:
        named = execution_of(module).sample(size)
        shapes = {k: v.shape for k, v in arrays_of(named).items()}
        if any(
            shapes.get(n.replace(".", "_"), (0,) * 9)[d] == 1
            for n, d in execution_of(module).not_one
        ):
            continue  # the model refuses size one, and so does the module
        ours = execution_of(module).flat(named)
        with module.base():
            base = execution_of(module).flat(named)
        result.append(max(rel(ours[n], base[n]) for n in base))
    return result


def same(ours: Any, reference: Any) -> bool:
    """True when two outputs have equal bits."""
    return all(np.array_equal(a, b) for a, b in zip(flat(ours), flat(reference), strict=True))


def near(ours: Any, reference: Any) -> bool:
    """True when two outputs differ by rounding at most."""
    pairs = zip(flat(ours), flat(reference), strict=True)
    return all(np.array_equal(a, b) or rel(a, b) < ORT_TOL for a, b in pairs)


def explicit_parity(name: str, module: Any) -> list[Parity]:
    """Insert against the explicit sum, at every size."""
    return prove(explicit(built(name), module), module, of="explicit")


def missed(name: str, found: Found) -> dict[str, str]:
    """Parameters that the model multiplies activations with and no target reaches: why not."""
    reached = {t.parameter.name for t in found.targets}
    computed = [t.key.rpartition(".")[0] for t in found.targets if t.key.endswith("~")]

    def is_reached(operand: frozenset[str]) -> bool:
        return bool(operand & reached) or any(n.startswith(c) for n in operand for c in computed)

    subject = built(name)
    lost = {n for operand in multiplied(subject) if not is_reached(operand) for n in operand}
    reasons = {r.key: r.reason for r in found.refusals}
    unseen = "not seen, and not counted"
    return {n: reasons.get(n, unseen) for n in sorted(lost) if matters(subject, n)}


def undue(lost: Mapping[str, str]) -> list[str]:
    """What is missed but for depthwise kernels: those are refused on purpose."""
    return [n for n, why in lost.items() if not why.startswith("depthwise")]


def moved_by_left_out(name: str, module: Any) -> dict[str, float]:
    """How far the original's outputs move when a target that insert left out changes by half.

    In fp64: a softmax over equal values is their mean whatever its weights, up to rounding.
    """
    keys = left_out(module)
    if not keys:
        return {}
    subject = built(name)
    model = doubled(subject.model)
    named = pytree.tree_map(
        lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x,
        (subject.args, subject.kwargs),
    )
    found = {}
    with torch.no_grad():
        before = flat(model(*named[0], **named[1]))
        for key in keys:
            weight = model.get_parameter(base_name(key))
            kept = weight.clone()
            weight.mul_(1.5)
            after = flat(model(*named[0], **named[1]))
            weight.copy_(kept)
            found[key] = max(rel(a, b) for a, b in zip(after, before, strict=True))
    return found


def left_out(module: Any) -> list[str]:
    """Keys of the plan that dead="drop" left without an adapter."""
    return [n.partition(": left out")[0] for n in module.notes if ": left out" in n]


def fold_parity(module: Any, folded: Any) -> list[Parity]:
    """Fold against insert, at every size."""
    return prove(torch_run(folded), module, tol=FOLD_TOL, of="fold")


def export_report(module: Any, path: Path, provider: str = "cpu") -> Report:
    """The merged ONNX file, which export has proven with ONNX Runtime at every size."""
    report: Report = lora_fx.export(module, path, provider=provider)
    return report


def runtime_parity(report: Report) -> list[Parity]:
    """ONNX Runtime's rows of a report."""
    return [p for p in report.parity if p.of == "onnxruntime"]


def without_gradient(name: str, module: Any) -> list[str]:
    """Names of the lora_B that backward passes in train mode leave without gradient.

    The gradients of the example; where a cond takes one branch at a time, those of random inputs.
    """
    subject = built(name)
    module.train()
    torch.manual_seed(0)
    calls = [subject.cap.named]
    if facts(name).branches:
        calls = [execution_of(module).sample(seed=seed) for seed in range(6)]
    for named in calls:
        outs = [
            x
            for x in pytree.tree_leaves(execution_of(module).run(named))
            if isinstance(x, torch.Tensor) and x.requires_grad
        ]
        torch.stack([(x * torch.randn_like(x)).sum() for x in outs]).sum().backward()
    return [
        key
        for key, p in module.named_parameters()
        if p.requires_grad
        and "lora_B" in key
        and (p.grad is None or not 0 < float(p.grad.abs().max()) < math.inf)
    ]
