"""One program through insert, fold, attach and export, against W + ΔW put in by hand."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx.errors import LoraFxError
from tests.fuzz.programs import Program

SIZES = (
    (2, 6),
    (3, 7),
    (1, 11),
    (2, 1),
    (2, 5),
    (4, 16),
    (4, 17),
    (1, 1),
    (2, 30),
    (5, 8),
    (2, 91),
    (8, 90),
)
GATE = 1e-4
"""Of rel: what is wrong is wrong by more, and no drawn model rounds by as much."""


@dataclass
class Verdict:
    """What became of a program.

    Attributes:
        served: Verbs that gave a module or a file.
        refused: Verb → the error's first line.
        wrong: What gave another number or shape, where.
        raw: Exceptions that are none of ours.
    """

    seed: int
    served: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)


VERBS = ("insert", "fold", "attach", "export")


def check(program: Program, verbs: tuple[str, ...] = VERBS) -> Verdict:
    """Run a program; nothing is raised."""
    verdict = Verdict(program.seed)
    model, example = program.build(), program.example(*SIZES[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = _try(
            verdict,
            "insert",
            lambda: lora_fx.insert(model, (example,), rank=2, include="*", dead="allow"),
        )
        if module is not None:
            _draw(module)
            adapter = module.eval().adapter()
            by_hand = _by_hand(model, adapter)
            _compare(verdict, "insert", program, module, by_hand)
            if "fold" in verbs:
                folded = _try(verdict, "fold", lambda: lora_fx.fold(module))
                _compare(verdict, "fold", program, folded, by_hand)
            if "export" in verbs:
                _export(verdict, program, module, by_hand)
        if "attach" in verbs:
            live = copy.deepcopy(model)
            attached = _try(
                verdict,
                "attach",
                lambda: lora_fx.attach(live, (example,), rank=2, include="*", dead="allow"),
            )
            if attached is not None:
                _draw(attached)
                _compare(
                    verdict, "attach", program, attached.eval(), _by_hand(model, attached.adapter())
                )
    return verdict


def _try(verdict: Verdict, verb: str, run: Callable[[], Any]) -> Any:
    try:
        result = run()
    except LoraFxError as e:
        verdict.refused[verb] = e.message
        return None
    except Exception as e:
        verdict.raw.append(f"{verb}: {type(e).__name__}: {e}"[:300])
        return None
    verdict.served.append(verb)
    return result


def _draw(module: Any) -> None:
    """Random values for what trains."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def _by_hand(model: nn.Module, adapter: Any) -> nn.Module:
    """W + ΔW in the parameters; what only reads a weight reads the old one."""
    changed = copy.deepcopy(model)
    old: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for key, delta in adapter.deltas().items():
            name, _, _ = key.partition("[")
            p = changed.get_parameter(name.partition("@")[0])
            old.setdefault(id(p), p.detach().clone())
            region = key[len(name) :]
            where = eval(f"np.s_{region}") if region else ...
            p[where] += torch.from_numpy(np.asarray(delta)).float()
    changed.read = lambda w: old.get(id(w), w).norm()
    return changed


def _compare(verdict: Verdict, verb: str, program: Program, ours: Any, by_hand: nn.Module) -> None:
    if ours is None:
        return
    for size in SIZES:
        x = program.example(*size)
        want = _run(by_hand, x)
        try:
            got = _run(ours, x, raises=True)
        except LoraFxError as e:
            if want is not None:
                verdict.refused.setdefault(f"{verb} at {size}", e.message)
            continue
        except Exception as e:
            if want is not None:
                verdict.raw.append(f"{verb} at {size}: {type(e).__name__}: {e}"[:300])
            continue
        if want is not None:
            _near(verdict, f"{verb} at {size}", got, want)


def _run(model: Any, x: torch.Tensor, *, raises: bool = False) -> list[torch.Tensor] | None:
    try:
        with torch.no_grad():
            return [v for v in pytree.tree_leaves(model(x.clone())) if isinstance(v, torch.Tensor)]
    except Exception:
        if raises:
            raise
        return None


def _near(verdict: Verdict, where: str, got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            verdict.wrong.append(f"{where}: shape {tuple(a.shape)}, not {tuple(b.shape)}")
        elif b.numel():
            gap = float((a - b).abs().max() / b.abs().max().clamp_min(1e-6))
            if not gap <= GATE and bool(torch.isfinite(b).all()):
                verdict.wrong.append(f"{where}: rel {gap:.1e}")


def _export(verdict: Verdict, program: Program, module: Any, by_hand: nn.Module) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        report = _try(verdict, "export", lambda: lora_fx.export(module, path, provider="cpu"))
        if report is None:
            return
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        for size in SIZES:
            x = program.example(*size)
            want = _run(by_hand, x)
            try:
                got = [torch.from_numpy(v) for v in session.run(None, {"x": x.numpy()})]
            except Exception:  # a file that fails is not wrong
                continue
            if want is not None:
                _near(verdict, f"export at {size}", got, want)
