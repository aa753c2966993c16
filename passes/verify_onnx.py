"""verify, where both models are .onnx files: no torch, and an adapter goes into the second."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Report, compare, shapes_of
from lora_fx.errors import LoraFxError
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.match import match
from lora_fx.onnx.names import restore_weight_names
from lora_fx.onnx.session import open_session
from lora_fx.passes.find import find
from lora_fx.passes.proofs.reference import reference_of


def verify_onnx(
    a: str | PathLike[str],
    b: str | PathLike[str],
    inputs: Mapping[str, Any] | None,
    adapter: Any,
    tol: float,
    provider: str,
) -> Report:
    """Outputs of a against those of b, with an adapter's branches where one is given.

    Raises:
        LoraFxError: Inputs of other names, an adapter that does not fit b.
    """
    load(a)  # which names what is wrong with a file better than the runtime does
    graph, one = _graph(b, needed=adapter is not None), open_session(a, provider)
    bound = None if graph is None or adapter is None else _bound(adapter, graph)
    with reference_of(Path(b), graph, provider, inputs) as reference:
        names = reference.session.input_names
        if set(one.input_names) != set(names):
            raise LoraFxError(
                f"{a} takes {sorted(one.input_names)}, {b} takes {sorted(names)}",
                "two models with the same inputs can be compared",
            )
        expected = reference.run(bound)
        parity = []
        for feeds in reference.sizes():
            parity.append(compare(one.run(feeds), expected(feeds), shapes_of(feeds), tol))
    ok = bool(parity) and all(p.ok for p in parity)
    return Report("verify", ok, tuple(parity), (), (one.note,) if one.note else ())


def _graph(path: str | PathLike[str], *, needed: bool) -> OnnxGraph | None:
    """The graph; None for an opset that we do not read, where nothing has to be inserted."""
    model = load(path)
    restore_weight_names(model)
    try:
        return OnnxGraph(model)
    except LoraFxError:
        if needed:
            raise
        return None


def _bound(adapter: Any, graph: OnnxGraph) -> Adapter:
    if not isinstance(adapter, Adapter):
        from lora_fx.formats.io import load_adapter

        if isinstance(adapter, (list, tuple)):
            raise LoraFxError("models are run with one adapter", "merge them first, or mix them")
        adapter = load_adapter(adapter)
    matched = match(adapter, graph, find(graph))
    if matched.whole:
        raise LoraFxError(
            f"the adapter holds the whole tensor {min(matched.whole)!r}",
            "branches are s·b·a; merge the adapter, and verify the two files",
        )
    return Adapter(dict(matched.updates))
