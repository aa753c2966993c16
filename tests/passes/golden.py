"""Golden pairs of the passes as text that is read and executed: tests/fixtures/passes/NAME.txt.

A file is a head and sections. The head is a title and lines such as

    pass: Share()                          what is tested; any expression over the passes
    setup: Insert(updates("q.weight"))     what runs before it, on the graph of `model`
    tensors: q.weight=[4, 6] q.bias=[4]
    inputs: x=[3, 7, 6]

and the sections are graphs as Python functions of aten's operators: `model` (the graph as captured,
where there is a setup), `before`, `after`, and any number of twins, which must not change; a twin
may have a pass or a setup of its own, in lines before its function.

`python -m tests.passes.golden [NAME...]` writes before and after anew; read the difference.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.adapter.scaled_rows import GAINS
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.passes.clean import Clean
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold
from lora_fx.passes.fuse import Fuse
from lora_fx.passes.insert import Insert
from lora_fx.passes.recompute import Recompute
from lora_fx.passes.share import Share
from lora_fx.passes.verbs.open import capture

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "passes"
PASSES = (Clean, Fold, Fuse, Insert, Recompute, Share)
HEAD = re.compile(r"^(\w+): (.*)$", re.M)
SECTION = re.compile(r"^--- ([\w ]+)\n", re.M)
OPERATORS = {n: getattr(operator, n) for n in ("add", "eq", "floordiv", "getitem", "mul", "sub")}
"""Python's own, on sizes and tuples."""


@dataclass(frozen=True)
class Part:
    """A function, and what the head or the lines before it say."""

    code: str
    said: Mapping[str, str]

    def shapes(self, what: str) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the tensors or inputs."""
        rows = re.findall(r"(\S+)=\[([\d, ]*)\]", self.said.get(what, ""))
        return {n: tuple(int(d) for d in dims.split(",") if d.strip()) for n, dims in rows}


@dataclass
class File:
    """A golden file, read."""

    head: str
    parts: dict[str, Part] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str) -> File:
        head, *rest = SECTION.split((FOLDER / f"{name}.txt").read_text())
        file = cls(head.strip())
        for title, body in zip(rest[::2], rest[1::2], strict=True):
            lines, _, code = body.partition("def ")
            said = dict(HEAD.findall(head)) | dict(HEAD.findall(lines))
            file.parts[title] = Part(f"def {code.strip()}", said)
        return file

    @property
    def twins(self) -> list[str]:
        return [title for title in self.parts if title.startswith("twin")]


class Program(nn.Module):
    """A function of a file over tensors of its own, the same in every run."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for name, shape in part.shapes("tensors").items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for step in path:
                if step not in owner._modules:
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            scale = (shape[-1] if len(shape) > 1 else 10) ** -0.5
            owner.register_parameter(leaf, nn.Parameter(torch.randn(shape, generator=g) * scale))
        self.code = part.code
        inputs = part.shapes("inputs").items()
        self.inputs = {n: torch.randn(shape, generator=g) for n, shape in inputs}

    def forward(self, x: torch.Tensor) -> Any:
        return compiled(self.code, self.get_parameter)(x)


def compiled(code: str, tensor: Callable[[str], Any], more: Mapping[str, Any] = {}) -> Any:
    """The function that a text defines; `more` are operators that have no name of their own."""
    names = {"torch": torch, "aten": torch.ops.aten, "inf": float("inf"), **OPERATORS}
    names |= {"tensor": tensor, "device": torch.device, **more}
    exec(code, names)
    return names["forward"]


def printed(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    """A graph as the text of a function, and its operators that have no name in torch."""
    lines: list[str] = []
    more: dict[str, Any] = {}
    names = {n: n.name.removeprefix("named_") if n.op == "placeholder" else n.name
             for n in graph.nodes}  # fmt: skip

    def shown(a: Any) -> str:
        if isinstance(a, fx.Node):
            return names[a]
        if isinstance(a, (list, tuple)):
            inner = ", ".join(map(shown, a))
            return f"[{inner}]" if isinstance(a, list) else f"({inner}{',' * (len(a) == 1)})"
        return repr(a)

    for n in graph.nodes:
        if n.op == "get_attr":
            lines.append(f'{names[n]} = tensor("{n.target}")')
        elif n.op == "call_function":
            op = getattr(n.target, "__name__", type(n.target).__name__)
            if isinstance(n.target, torch._ops.OpOverload):
                op = str(n.target)
            elif op not in OPERATORS:
                more[op] = n.target
            given = [*map(shown, n.args), *(f"{k}={shown(v)}" for k, v in n.kwargs.items())]
            lines.append(f"{names[n]} = {op}({', '.join(given)})")
        elif n.op == "output":
            lines.append(f"return {shown(tuple(n.args[0]))}")
    given = ", ".join(names[n] for n in graph.nodes if n.op == "placeholder")
    return "\n    ".join([f"def forward({given}):", *lines]), more


class Case:
    """A part of a file as a live graph, set up, and the pass that is to run on it."""

    def __init__(self, file: File, title: str) -> None:
        own = file.parts.get("model", file.parts["before"])
        self.part = file.parts[title] if title.startswith("twin") else own
        model = Program(self.part)
        captured = capture(model, tuple(model.inputs.values()))
        self.x = model.inputs["x"]
        self.source, _ = printed(captured.fx_graph(training=True).graph)
        self.graph: FxGraph = captured.fx_graph(training=True, root=Program(self.part))
        self.found = find(self.graph)
        names = {p.__name__: p for p in PASSES} | {
            "updates": self.updates, "scaled": self.scaled
        }  # fmt: skip
        said = self.part.said
        self.setup = eval(said["setup"], names) if "setup" in said else None
        self.step = eval(said["pass"], names)
        if self.setup is not None:
            assert self.setup(self.graph).modified

    def updates(self, *keys: str) -> dict[str, LowRank]:
        """Random ones of rank 2 and scale 2."""
        made = {}
        for key in keys:
            layout = self.found[key].layout
            a, b = draw(key, layout, 2, 0, "probe")
            made[key] = LowRank(a, b * np.float32(0.2), 4.0, layout)
        return made

    def scaled(self, *keys: str) -> dict[str, LowRank]:
        """The same with factors of rows, as DoRA has them once it is evaluated on a base."""
        made = {}
        for key, low in self.updates(*keys).items():
            gains = np.random.default_rng(1).uniform(-0.4, 0.4, low.b.shape[:-1])
            made[key] = replace(low, variant_tensors={GAINS: gains.astype(np.float32)})
        return made

    def text(self) -> str:
        """The graph as it is now."""
        return printed(self.graph.graph)[0]

    def run(self) -> np.ndarray:
        """What the graph computes now."""
        self.graph.lint()
        module = fx.GraphModule(self.graph.root, self.graph.graph)
        return next(iter(module(self.x))).detach().numpy()

    def run_text(self, code: str) -> np.ndarray:
        """What a text computes, with the graph's tensors."""
        call = compiled(code, self.graph.root.get_parameter, printed(self.graph.graph)[1])
        return next(iter(call(self.x))).detach().numpy()

    def wanted(self, *steps: Any) -> np.ndarray:
        """What the model's text computes in fp64, on W + s·BA of every update of the passes."""
        model = Program(Part(self.source, self.part.said)).double()
        with torch.no_grad():
            for step in steps:
                for key, low in getattr(step, "updates", {}).items():
                    plain = replace(low, variant_tensors={})
                    weight = model.get_parameter(key)
                    gains = low.variant_tensors.get(GAINS)
                    if gains is not None:
                        weight.mul_(torch.from_numpy(1 + gains.astype(np.float64))[:, None])
                    weight.add_(torch.from_numpy(Adapter({key: plain}).deltas()[key]))
            return next(iter(model(self.x.double()))).numpy()


def main(names: list[str]) -> None:
    """Write the texts of the files anew."""
    for name in names or sorted(p.stem for p in FOLDER.glob("*.txt")):
        file = File.read(name)
        case = Case(file, "before")
        written = {"before": case.text()}
        if "model" in file.parts:
            written["model"] = case.source
        case.step(case.graph)
        written["after"] = case.text()
        written |= {title: Case(file, title).source for title in file.twins}
        text = (FOLDER / f"{name}.txt").read_text()
        for title, code in written.items():
            pattern = rf"(^--- {title}\n(?:\w+: [^\n]*\n)*)def .*?(?=\n+---|\n*\Z)"
            found = re.search(pattern, text, flags=re.M | re.S)
            assert found is not None, title
            text = text[: found.start()] + found[1] + code + text[found.end() :]
        (FOLDER / f"{name}.txt").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
