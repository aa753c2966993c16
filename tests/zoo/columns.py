"""The columns of the table: every check of a model as a short word or a number, and why not."""

from __future__ import annotations

import contextlib
import copy
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx.compare import Parity, rel
from lora_fx.errors import one_line, silenced

from . import checks, flops
from .models import ZOO
from .oracles import flat

OURS = {
    "eval": "eval",
    "train": "train",
    "targets": "targets",
    "share": "share",
    "flops": "FLOPs",
    "effect": "effect",
    "gradient": "gradient",
    "explicit": "W+s·BA",
    "fold": "fold",
    "onnx": "ONNX",
    "ort": "ORT ×3",
}
PEFT = {
    "peft": "PEFT",
    "peft_effect": "effect",
    "peft_gradient": "gradient",
    "peft_merge": "merge",
    "peft_onnx": "ONNX",
    "peft_ort": "ORT",
}
PEFT_TOL = 1e-5
"""Gate on PEFT's merge and on its ONNX file; ours are narrower."""


@dataclass(frozen=True)
class Cell:
    """One cell: what it shows, whether it passes, and the reason where it does not."""

    column: str
    shown: str
    ok: bool = True
    why: str = ""


class Skip(Exception):
    """A check that an earlier failure leaves without meaning."""


def first_words(error: BaseException) -> str:
    """The error as one line, without a path of this machine."""
    text = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
    here = str(Path(__file__).resolve().parents[2]) + "/"
    packages = str(Path(torch.__file__).resolve().parents[1]) + "/"
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # colours
    text = text.replace(here, "").replace(packages, "")
    return one_line(re.sub(r"(?<![\w./])/\S*/", "", text), 220)  # no other folder either


def tried(column: str, check: Callable[[], Cell]) -> Cell:
    """A check's cell, or the cell of its error."""
    try:
        return check()
    except Skip as e:
        return Cell(column, "–", False, str(e))
    except Exception as e:
        return Cell(column, "refused" if isinstance(e, lora_fx.LoraFxError) else "error", False,
                    first_words(e))  # fmt: skip


def _number(x: float) -> str:
    return "∞" if math.isinf(x) else "0" if x == 0 else f"{x:.0e}" if x < 1e-3 else f"{x:.2g}"


def parity(column: str, rows: list[Parity]) -> Cell:
    """The row nearest to its gate; all three sizes have to be there."""
    worst = max(rows, key=lambda p: p.rel / max(p.tol, 1e-30))
    shown = _number(worst.rel)
    if not worst.ok:
        sizes = ", ".join(f"{k} {list(v)}" for k, v in worst.sizes.items())
        why = f"output {worst.output!r} at {sizes}: rel {worst.rel:.1e}, gate {worst.tol:.1e}"
        return Cell(column, shown, False, why)
    if len(rows) < 3:
        return Cell(column, shown, False, f"only {len(rows)} of the three sizes could be compared")
    return Cell(column, shown)


def ours(name: str) -> Iterator[Cell]:
    """Our columns, each as soon as it is known."""
    torch.backends.mha.set_fastpath_enabled(False)
    state: dict[str, Any] = {}

    def need(what: str) -> Any:
        if what not in state:
            raise Skip(f"needs {what}")
        return state[what]

    def capture() -> Cell:
        state["subject"] = checks.built(name)
        state["eval"] = state["subject"].cap
        return Cell("eval", "ok")

    def train() -> Cell:
        state["train"] = need("eval").train
        return Cell("train", "ok")

    def targets() -> Cell:
        state["found"] = found = lora_fx.find(need("eval"))
        lost = [r.key for r in found.refusals] + [u.key for u in found.unreached]
        why = f"refused or unreached: {', '.join(lost)}" if lost else ""
        some = bool(found.targets or found.optional)
        return Cell("targets", str(len(found.targets)), some, why)

    def share() -> Cell:
        found = need("found")
        lost = checks.missed(name, found)
        why = "; ".join(f"{n}: {reason}" for n, reason in lost.items())
        return Cell("share", f"{found.reached_share:.1%}", not checks.undue(lost), why)

    def count() -> Cell:
        gap = flops.difference(need("subject"), need("found"))
        lost = flops.refused(state["found"])
        why = [f"refused: {', '.join(lost)}"] if lost else []
        if abs(gap) > flops.TOL:
            why.append(flops.DIFFER.get(name, "not what torch's counter says"))
        fine = not lost and (abs(gap) <= flops.TOL or name in flops.DROPS)
        return Cell("flops", f"{gap:+.1%}" if abs(gap) > flops.TOL else "ok", fine, "; ".join(why))

    def effect() -> Cell:
        need("eval")
        state["adapter"] = module = checks.perturbed(name)
        all_ = checks.effects(module)
        fine = bool(all_) and all(checks.seen(e) for e in all_)
        why = "" if fine else f"not within {checks.SEEN} at every size: {all_}"
        why = "; ".join([*([why] if why else []), *module.notes])  # what insert left out, by name
        moved = checks.moved_by_left_out(name, module)
        if moved:
            why += (
                f"; changed by half, each moves the original by at most {max(moved.values()):.0e}"
            )
        fine = fine and all(m <= checks.IDLE for m in moved.values())
        return Cell("effect", _number(max(all_)), fine, why)

    def gradient() -> Cell:
        need("adapter")
        lost = checks.without_gradient(name, checks.adapted(name))
        return Cell("gradient", "none" if lost else "ok", not lost, ", ".join(lost))

    def explicit() -> Cell:
        return parity("explicit", checks.explicit_parity(name, need("adapter")))

    def fold() -> Cell:
        module = need("adapter")
        return parity("fold", checks.fold_parity(module, lora_fx.fold(module)))

    def onnx() -> Cell:
        with tempfile.TemporaryDirectory() as folder:
            state["report"] = checks.export_report(need("adapter"), Path(folder) / "m.onnx")
        return Cell("onnx", "ok")

    def ort() -> Cell:
        if "report" not in state:
            raise Skip("no file was written")
        return parity("ort", checks.runtime_parity(state["report"]))

    first = (capture, train, targets, share, count)
    for check in (*first, effect, gradient, explicit, fold, onnx, ort):
        column = {capture: "eval", count: "flops"}.get(check, check.__name__)
        yield tried(column, check)


def peft(name: str) -> Iterator[Cell]:
    """PEFT's `all-linear` on the same model: attach, effect, gradient, merge, export, run.

    The example's sizes only, static; the fused inference path as torch has it by default.
    """
    from peft import LoraConfig, get_peft_model

    torch.backends.mha.set_fastpath_enabled(True)
    model, args, kwargs = ZOO[name].build()
    state: dict[str, Any] = {}

    def run(m: nn.Module) -> list[Any]:
        with torch.no_grad():
            return flat(m(*args, **kwargs))

    def worst(a: list[Any], b: list[Any]) -> float:
        return max(rel(x, y) for x, y in zip(a, b, strict=True))

    def need(what: str) -> Any:
        if what not in state:
            raise Skip(f"needs {what}")
        return state[what]

    def attach() -> Cell:
        base = run(model)
        torch.manual_seed(0)
        config = LoraConfig(target_modules="all-linear", r=2, lora_alpha=4, init_lora_weights=False)
        wrapped = get_peft_model(copy.deepcopy(model), config).eval()
        pairs = [p for n, p in wrapped.named_parameters() if "lora_B" in n]
        state["modules"] = wrapped, base, pairs
        return Cell("peft", str(len(pairs)))

    def effect() -> Cell:
        wrapped, base, pairs = need("modules")
        first = [p.detach().clone() for p in pairs]
        for factor in checks.FACTORS:
            for p, b in zip(pairs, first, strict=True):
                p.data = b * factor * 0.3
            state["adapted"] = adapted = run(wrapped)
            found = worst(adapted, base)
            if checks.seen(found):
                return Cell("peft_effect", _number(found))
        return Cell("peft_effect", _number(found), False, "the adapter is not seen in the output")

    def gradient() -> Cell:
        wrapped, _, pairs = need("modules")
        leaves = pytree.tree_leaves(wrapped(*args, **kwargs))
        outs = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        torch.manual_seed(0)
        if outs:
            torch.stack([(x * torch.randn_like(x)).sum() for x in outs]).sum().backward()
        dead = sum(1 for p in pairs if p.grad is None or not p.grad.any())
        why = f"{dead} of {len(pairs)} adapters get no gradient in eval mode" if dead else ""
        return Cell("peft_gradient", f"{len(pairs) - dead}/{len(pairs)}", not dead, why)

    def merge() -> Cell:
        wrapped, adapted = need("modules")[0], need("adapted")
        merged = wrapped.merge_and_unload().eval()
        found = worst(run(merged), adapted)
        state["merged"] = merged
        why = "" if found <= PEFT_TOL else "the merged model differs from the unmerged one"
        return Cell("peft_merge", _number(found), not why, why)

    def onnx() -> Cell:
        from lora_fx.fx.onnx_export.translation import LEAST

        with silenced(contextlib.redirect_stdout, LEAST), torch.no_grad():
            state["program"] = torch.onnx.export(
                need("merged"), args, kwargs=kwargs, dynamo=True, verbose=False
            )
        return Cell("peft_onnx", "ok")

    def ort() -> Cell:
        program = need("program")
        outputs = [x.numpy() for x in program(*args, **kwargs)]
        found = worst(outputs, run(state["merged"]))
        why = "" if found <= PEFT_TOL else "ONNX Runtime differs from torch"
        return Cell("peft_ort", _number(found), not why, why)

    for column, check in zip(PEFT, (attach, effect, gradient, merge, onnx, ort), strict=True):
        yield tried(column, check)
