"""Graphs cut at their choices: what a comparison of near-equal numbers decides.

A choice is a value of integers or booleans that a node computes from floats: the indices of TopK,
ArgMax or NonMaxSuppression, a comparison, a cast. Rounding alone turns it among near-equal scores,
and what is gathered by it are other numbers. A graph that is cut there takes the choices of another
run as inputs `NAME.chosen`, and gives its own, and the floats that they are among, as outputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from lora_fx.inputs import Named
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.save import save
from lora_fx.onnx.session import RuntimeSession, open_session

CHOSEN = ".chosen"
"""What the input for a choice has after its name."""
SIZES = {"Shape", "Size"}
"""Ops that make integers of floats, of which they read no number."""
Among = Mapping[str, tuple[str, ...]]
"""Choice → the computed floats that it is among."""


def choices_of(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """The choices of a graph, in their order; those of nested graphs are left out."""
    found: dict[str, tuple[str, ...]] = {}
    for node in model.graph:
        among = tuple(str(v.name) for v in node.inputs if v is not None and _is_computed_float(v))
        if node.op_type in SIZES or not among:
            continue
        found |= {str(v.name): among for v in node.outputs if _is_discrete(v)}
    return found


def _is_computed_float(value: ir.Value) -> bool:
    node = value.producer()
    computed = node is not None and node.op_type != "Constant"
    return computed and value.dtype is not None and value.dtype.is_floating_point()


def _is_discrete(value: ir.Value) -> bool:
    return value.dtype is not None and (value.dtype.is_integer() or value.dtype == ir.DataType.BOOL)


def watch(model: ir.Model, names: Iterable[str]) -> None:
    """Make values outputs of their graph, where they are not yet; edits it."""
    values = _values(model)
    outputs = {v.name for v in model.graph.outputs}
    model.graph.outputs.extend(values[n] for n in dict.fromkeys(names) if n not in outputs)


def cut(model: ir.Model, choices: Collection[str], among: Iterable[str]) -> None:
    """Take choices as inputs, and give the graph's own and what they are among; edits it."""
    values = _values(model)
    for name in choices:
        value = values[name]
        chosen = ir.Value(name=f"{name}{CHOSEN}", type=value.type, shape=value.shape)
        for use in tuple(value.uses()):
            use.node.replace_input_with(use.idx, chosen)
        model.graph.inputs.append(chosen)
    watch(model, [*choices, *among])


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return {str(v.name): v for node in model.graph for v in node.outputs}


def watched_file(path: Path, provider: str) -> tuple[RuntimeSession, dict[str, tuple[str, ...]]]:
    """A file that gives its choices and what they are among as well, and their names."""
    model = OnnxGraph(load(path)).model
    among = choices_of(model)
    watch(model, [*among, *(n for names in among.values() for n in names)])
    return _opened(model, provider), among


def cut_file(
    path: Path, provider: str, choices: Named, among: Among, stored: Named
) -> tuple[RuntimeSession, dict[str, str]] | None:
    """A file cut at the choices that it has among the same floats; None where it has none.

    Args:
        path: The file.
        provider: As in open_session.
        choices: Those of another run, by name.
        among: What they are among.
        stored: Arrays in the place of the file's initialisers.

    Returns:
        The session, and the name in the file of each choice.
    """
    model = OnnxGraph(load(path)).model
    names = _matched(model, choices, among)
    if not names:
        return None
    for name, array in stored.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    cut(model, names.values(), [n for name in names for n in among[name]])
    return _opened(model, provider), names


def _matched(model: ir.Model, choices: Named, among: Among) -> dict[str, str]:
    """Choice → that of a graph, by its name or else by what it is among, each once and in order."""
    known, values = choices_of(model), _values(model)
    free = [*known]
    result = {}
    for name, floats in among.items():
        alike = [
            n for n in free if {*floats} <= {*known[n]} and _dtype(values[n]) == choices[name].dtype
        ]
        if alike:
            result[name] = name if name in alike else alike[0]
            free.remove(result[name])
    return result


def _dtype(value: ir.Value) -> object:
    return None if value.dtype is None else value.dtype.numpy()


def _opened(model: ir.Model, provider: str) -> RuntimeSession:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cut.onnx"
        save(model, path)
        return open_session(path, provider)
