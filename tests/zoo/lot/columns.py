"""What one drawn model is put through: the zoo's columns, attach, mode switch, and torch's export.

The reference is the model's own code on W + s·BA, in fp64 where that runs; a model's own rounding
is the difference of the same in its own dtype, and of the same with every weight half a unit off.
"""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import draw
from lora_fx.compare import ORT_TOL, rel
from lora_fx.errors import LoraFxError, NoEffectError, one_line
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.onnx.adapter_session import Session
from lora_fx.onnx.session import open_session
from lora_fx.passes.proofs.proof_inputs import arrays_of
from lora_fx.targets.keys import base_name, split_key
from tests.zoo.base import Built
from tests.zoo.checks import EFFECT, FACTORS, seen
from tests.zoo.oracles import Subject, doubled, explicit, flat

COLUMNS = {
    "export": "torch.export by itself",
    "record": "make_fx by itself",
    "insert": "insert, with effect and gradient on every target",
    "explicit": "insert = W + s·BA",
    "attach": "attach, with effect and gradient on every target",
    "live": "attach = W + s·BA",
    "fold": "fold = unmerged",
    "onnx": "merged ONNX file = W + s·BA in ONNX Runtime",
    "switch": "mode switch = W + s·BA in ONNX Runtime",
}
TORCH = ("export", "record")
"""What torch does with the model without lora-fx; one that either takes is capturable."""
OURS = [c for c in COLUMNS if c not in TORCH]
VISIBLE = 1e-4
"""An effect, relative to the output, that cannot be the rounding of a wrong one."""
Arrays = list[np.ndarray[Any, Any]]


@dataclass
class Cell:
    """One check: passes, wrong, refused, raw (an exception that is no LoraFxError) or alarm."""

    column: str
    state: str
    why: str = ""
    notes: list[str] = field(default_factory=list)


class Wrong(Exception):
    """A number that is not what it has to be, and nobody said so."""


class Lot:
    """The state of one model's checks."""

    def __init__(self, name: str, built: Built) -> None:
        self.model, self.args, self.kwargs = built
        self.name = name
        self.model.requires_grad_(False)
        self.model.train()  # see run
        self.model.eval()
        self.module: Any = None
        self.attached: Any = None
        self.alike = False
        self.adapter: Adapter | None = None
        self.exact: Arrays | None = None
        self.outputs: list[str] = []
        self.rounding: float | None = None

    def run(self, model: Any) -> Arrays:
        """The tensors of the example's output, with one state of the random numbers.

        A model may keep what its weights made (Levit its attention biases) until its mode is set.
        """
        own = isinstance(model, nn.Module) and not isinstance(model, CapturedModule)
        if own and not model.training:
            model.train()
            model.eval()
        torch.manual_seed(0)
        with torch.no_grad():
            return flat(model(*self.args, **self.kwargs))

    def cells(self) -> Iterator[Cell]:
        """Every column, each as soon as it is known."""
        torch.backends.mha.set_fastpath_enabled(False)
        for column in COLUMNS:
            check: Callable[[], str] = getattr(self, f"_{column}")
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    yield Cell(column, "ok", check() or "")
            except Wrong as e:
                yield Cell(column, "wrong", str(e))
            except LoraFxError as e:
                text = one_line(e.message, 600)
                state = "alarm" if column not in TORCH and self._is_alarm(text) else "refused"
                yield Cell(column, state, f"{text}; own rounding {self.rounding}")
            except Exception as e:
                state = "refused" if column in TORCH else "raw"
                yield Cell(column, state, one_line(f"{type(e).__name__}: {e}", 400))

    def _export(self) -> str:
        model = copy.deepcopy(self.model)
        named = dict(self.kwargs)
        try:
            program = torch.export.export(model, tuple(self.args), named, strict=False)
        except RuntimeError as e:
            if "Cache" not in str(e):
                raise
            named["use_cache"] = False  # what torch does not know as an output
            program = torch.export.export(model, tuple(self.args), named, strict=False)
        return f"{len(program.graph.nodes)} nodes"

    def _record(self) -> str:
        model = copy.deepcopy(self.model)
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        leaves, spec = pytree.tree_flatten((tuple(self.args), dict(self.kwargs)))
        places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]

        def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            values = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                values[place] = tensor
            args, kwargs = pytree.tree_unflatten(values, spec)
            out = torch.func.functional_call(model, state, args, kwargs)
            return [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]

        with torch.no_grad():
            graph = make_fx(
                run, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False
            )([leaves[i] for i in places]).graph
        return f"{len(graph.nodes)} nodes"

    def _insert(self) -> str:
        module = lora_fx.insert(self.model, self.args, self.kwargs, rank=2)
        self._use(module)
        base, adapted = (self.run(m) for m in (self.model, module))
        effect = _worst(adapted, base)
        if not effect > VISIBLE:
            raise Wrong(f"an effect of {effect:.1e}")
        lost = self._without_gradient(module)
        if lost:
            raise Wrong(f"no gradient: {', '.join(lost[:5])}")
        notes = "; ".join(n for n in module.notes if "left out" in n or "not proven" in n)
        return f"{len(module.updates)} targets, effect {effect:.2g}; {one_line(notes, 300)}"

    def _use(self, module: Any) -> None:
        """Random factors of an effect that is seen and does not swamp the output."""
        base = self.run(self.model)
        for factor in FACTORS:
            updates = {}
            for key, u in module.updates.items():
                a, b = draw(key, u.layout, u.rank, 0, "probe")
                updates[key] = replace(u, a=a, b=b * np.float32(EFFECT * factor))
            module.load_adapter(Adapter(updates))
            if seen(_worst(self.run(module.eval()), base)):
                break
        self.module, self.adapter = module, Adapter(updates)

    def _without_gradient(self, trained: Any) -> list[str]:
        """Names of lora_B without gradient in train mode; in eval where the model has no other."""
        try:
            torch.manual_seed(0)
            with torch.no_grad():
                copy.deepcopy(self.model).train()(*self.args, **self.kwargs)
            trained.train()
        except Exception:  # a detector wants the boxes; a norm wants more than one value
            trained.eval()
        wanted = {n: p for n, p in trained.named_parameters() if p.requires_grad}
        wanted = {n: p for n, p in wanted.items() if "lora_B" in n} or wanted
        found: set[str] = set()
        for seed in range(4):  # a layer may be left out at random
            torch.manual_seed(seed)
            out = pytree.tree_leaves(trained(*self.args, **self.kwargs))
            out = [x for x in out if isinstance(x, torch.Tensor) and x.requires_grad]
            if not out:
                break
            torch.stack([(x * torch.randn_like(x)).sum() for x in out]).sum().backward()
            for n, p in wanted.items():
                if p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()):
                    found.add(n)
                p.grad = None
            if len(found) == len(wanted):
                break
        trained.eval()
        return sorted(set(wanted) - found)

    def _reference(self) -> Arrays:
        """The outputs of the model's own code on W + s·BA, and its rounding."""
        if self.exact is None:
            if self.module is None:  # a proof may have refused it wrongly
                module = lora_fx.insert(self.model, self.args, self.kwargs, rank=2, dead="allow")
                self._use(module)
            cap = execution_of(self.module).captured
            subject = Subject(self.name, self.model, self.args, self.kwargs, cap)
            feeds = arrays_of(cap.named)

            def once(double: bool) -> Arrays:
                torch.manual_seed(0)
                made = explicit(subject, self.module, double=double)(feeds)
                self.outputs = list(made)
                return list(made.values())

            plain = once(False)
            try:
                self.exact = once(True)
                if _worst(plain, self.exact) > 1e-2:  # other code runs in fp64, or other choices
                    self.exact = plain
            except Exception:  # it writes x.float()
                self.exact = plain
            self.rounding = _worst(plain, self.exact)
            for seed in range(3):
                moved = replace(subject, model=_moved(self.model, seed))
                torch.manual_seed(0)
                values = list(explicit(moved, self.module, double=False)(feeds).values())
                self.rounding = max(self.rounding, _worst(values, self.exact))
        return self.exact

    def _equal(self, got: Arrays, what: str) -> str:
        want = self._reference()
        found, gate = _worst(got, want), max(5 * ORT_TOL, 4 * (self.rounding or 0.0) + 1e-7)
        if not found <= gate:
            raise Wrong(f"{what} differs by {found:.1e}, the gate is {gate:.1e}")
        return f"{found:.1e}"

    def _explicit(self) -> str:
        self._needs_module()
        return self._equal(self.run(self.module), "insert")

    def _needs_module(self) -> None:
        if self.adapter is None or self.module is None:
            self._reference()

    def _attach(self) -> str:
        model = copy.deepcopy(self.model)
        base = self.run(model)
        lora_fx.attach(model, self.args, self.kwargs, rank=2)
        self.attached = model
        if self.adapter is not None and set(model.adapter().lowrank) == set(self.adapter.lowrank):
            model.load_adapter(self.adapter)
            self.alike = True
        else:
            updates = {}
            for key, u in model.adapter().lowrank.items():
                a, b = draw(key, u.layout, u.rank, 0, "probe")
                updates[key] = replace(u, a=a, b=b * np.float32(EFFECT))
            model.load_adapter(Adapter(updates))
        effect = _worst(self.run(model.eval()), base)
        if not effect > VISIBLE:
            raise Wrong(f"an effect of {effect:.1e}")
        lost = self._without_gradient(model)
        if lost:
            raise Wrong(f"no gradient: {', '.join(lost[:5])}")
        return f"{len(model.adapter().lowrank)} targets, effect {effect:.2g}"

    def _live(self) -> str:
        model = self.attached
        if model is None:
            raise LoraFxError("nothing is attached", "")
        got = self.run(model.eval())
        said = self._equal(got, "attach") if self.alike else self._by_hand(model, got)
        lora_fx.detach(model)
        if not all(map(np.array_equal, self.run(model), self.run(self.model))):
            raise Wrong("detach does not give the original back")
        return said

    def _by_hand(self, model: Any, got: Arrays) -> str:
        """W + s·BA put into plain parameters."""
        own = copy.deepcopy(self.model)
        for key, delta in model.adapter().deltas().items():
            if "@" in key or key.endswith("~"):
                return "not compared: an update of one use, or of a computed weight"
            p = own.get_parameter(base_name(key))
            _, region = split_key(key, tuple(p.shape))
            where = tuple(slice(lo, hi) for lo, hi in region)
            p.data[where] += torch.from_numpy(delta).to(p).reshape(p[where].shape)
        want = self.run(own)
        own_error = max(_worst(self.run(_moved(own, seed)), want) for seed in range(3))
        found, gate = _worst(got, want), max(1e-5, 4 * own_error)
        if not found <= gate:
            raise Wrong(f"attach differs by {found:.1e}, the gate is {gate:.1e}")
        return f"{found:.1e}"

    def _fold(self) -> str:
        self._needs_module()
        return self._equal(self.run(lora_fx.fold(self.module, adapter=self.adapter)), "fold")

    def _onnx(self) -> str:
        self._needs_module()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.onnx"
            report = lora_fx.export(self.module, path, provider="cpu")
            got = open_session(path, "cpu").run(arrays_of(execution_of(self.module).captured.named))
            said = self._equal(self._named(got), "ONNX Runtime")
        return f"{said}; {one_line('; '.join(report.warnings), 200)}"

    def _switch(self) -> str:
        self._needs_module()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "s.onnx"
            lora_fx.export(self.module, path, mode="switch", provider="cpu")
            session = Session(path, "cpu")
            session.load("one", self.module.adapter())
            got = session.run(arrays_of(execution_of(self.module).captured.named), "one")
            return self._equal(self._named(got), "mode switch")

    def _named(self, got: dict[str, np.ndarray[Any, Any]]) -> Arrays:
        """The outputs of a file in the order of the reference's, where they have its names."""
        self._reference()
        return [got[n] for n in self.outputs] if set(got) == set(self.outputs) else [*got.values()]

    def _is_alarm(self, text: str) -> bool:
        """True where the difference that was refused is the model's own rounding."""
        sizes = [float(x) for x in re.findall(r"\b(?:rel|by) (\d\.?\d*e[+-]\d+)", text)]
        if not sizes:
            return False
        try:
            self._reference()
        except (LoraFxError, NoEffectError, RuntimeError):
            self.rounding = _own(self)
        return min(sizes) <= 4 * (self.rounding or 0.0) + 2 * ORT_TOL


def _own(lot: Lot) -> float:
    """The base model's rounding: fp32 against fp64, and weights half a unit off."""
    want = lot.run(lot.model)
    worst = max(_worst(lot.run(_moved(lot.model, s)), want) for s in range(3))
    try:
        wide = pytree.tree_map(
            lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x,
            (lot.args, lot.kwargs),
        )
        with torch.no_grad():
            exact = flat(doubled(lot.model)(*wide[0], **wide[1]))
        return max(worst, _worst(want, exact))
    except Exception:
        return worst


def _moved(model: nn.Module, seed: int) -> nn.Module:
    """A copy with every weight half a unit of its last place up or down."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            if p.is_floating_point():
                signs = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
                p.mul_(1 + signs * torch.finfo(p.dtype).eps / 2)
    return other


def _worst(got: Arrays, want: Arrays) -> float:
    """The largest relative difference; infinite where outputs are missing."""
    if len(got) != len(want):
        return float("inf")
    pairs = zip(got, want, strict=True)
    return max(
        (0.0 if np.array_equal(a, b, equal_nan=True) else rel(a, b) for a, b in pairs), default=0.0
    )
