"""verify for two .onnx files: this needs no torch, and an adapter applies to the second file."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import ORT_TOL, Parity, Report, compare, shapes_of
from lora_fx.errors import LoraFxError
from lora_fx.inputs import Named
from lora_fx.passes.verbs.verify_run import RunOptions, expect_outputs, gate_of, report_of

if TYPE_CHECKING:
    from lora_fx.onnx.graph.graph import OnnxGraph
    from lora_fx.passes.proofs.reference import Run


def verify_onnx(a: str | PathLike[str], b: str | PathLike[str], options: RunOptions) -> Report:
    """Compare the outputs of a and b, with the branches of an adapter if one is given.

    Raises:
        LoraFxError: Inputs of other names, an adapter that does not fit b.
    """
    from lora_fx.onnx.load import load
    from lora_fx.onnx.on_device import of_files
    from lora_fx.onnx.session import few_runs, open_session
    from lora_fx.onnx.session_memory import check_sessions
    from lora_fx.passes.proofs.onnx_reference import FileRerun, reference_of

    load(a)  # which names what is wrong with a file better than the runtime does
    with_branches = options.adapter is not None
    graph = _graph(b, needed=with_branches)
    check_sessions("comparing", [a, b], options.provider, packed=False)
    with few_runs():
        session = open_session(a, options.provider)
    bound = _bound(options, graph) if graph is not None and with_branches else None
    with reference_of(Path(b), graph, options.provider, options.inputs) as reference:
        names = reference.session.input_names
        if set(session.input_names) != set(names):
            raise LoraFxError(
                f"{a} takes the inputs {sorted(session.input_names)}, {b} takes {sorted(names)}",
                "compare two models with the same inputs",
            )
        expect_outputs(a, session.output_names, reference.session.output_names)
        gate = gate_of(session, reference.session)
        if options.tol is None and gate == ORT_TOL:
            # widened by what the runtime's own rewrites do
            rerun = FileRerun(Path(a), options.provider)
            parity = reference.prove(session.run, bound, "", rerun)
        else:
            tol = gate if options.tol is None else options.tol
            parity = _compared(session.run, reference.run(bound), reference.sizes(), tol)
        note = reference.session.note
    device = of_files([fspath(a), fspath(b)], session.provider)
    return report_of(parity, [note] if note else [], device)


def _compared(run: Run, expected: Run, feeds_of_sizes: Iterable[Named], tol: float) -> list[Parity]:
    """Compare the outputs of two models on the same inputs, with one gate."""
    parity = []
    for feeds in feeds_of_sizes:
        parity.append(compare(run(feeds), expected(feeds), shapes_of(feeds), tol))
    return parity


def _graph(path: str | PathLike[str], *, needed: bool) -> OnnxGraph | None:
    """Return the graph; None for an unsupported opset if no adapter is inserted."""
    from lora_fx.onnx.graph.graph import OnnxGraph
    from lora_fx.onnx.load import load
    from lora_fx.onnx.names import restore_weight_names

    model = load(path)
    restore_weight_names(model)
    try:
        return OnnxGraph(model)
    except LoraFxError:
        if needed:
            raise
        return None


def _bound(options: RunOptions, graph: OnnxGraph) -> Adapter:
    """Return the adapter with the keys and layouts of the graph."""
    from lora_fx.onnx.match import match
    from lora_fx.passes.find import find

    adapter = options.adapter_alone()
    assert adapter is not None  # verify_onnx asked
    matched = match(adapter, graph, find(graph))
    if matched.whole:
        raise LoraFxError(
            f"the adapter holds the whole tensor {min(matched.whole)!r}; expected low-rank "
            "updates only",
            "merge the adapter, then compare the two files",
        )
    return Adapter(dict(matched.updates))
