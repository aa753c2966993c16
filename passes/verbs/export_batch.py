"""The file of mode batch: one ONNX file whose batch rows each choose one of many adapters.

    base → batch → run: row b of a mixed batch == adapter ids[b] on that row, alone

Only where all rows agree (`prove_rows`) the file gets its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.evaluated import Evaluation
from lora_fx.compare import Report, demand
from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.inputs import SIZES, Named
from lora_fx.onnx.adapter_ids import IDS
from lora_fx.onnx.batch_inputs import SCALES as SCALES_BY_ROW
from lora_fx.onnx.batch_inputs import batch_symbol
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.values import dtype_name
from lora_fx.onnx.row_guards import outputs_without_nan
from lora_fx.onnx.session import RuntimeSession, open_session
from lora_fx.onnx.tensor_copies import join_copies
from lora_fx.onnx.whole_rows import Replacements
from lora_fx.passes.batch import Batch, StoredWeight
from lora_fx.passes.proofs.batch_rows import prove_rows
from lora_fx.passes.proofs.onnx_reference import FileRerun
from lora_fx.passes.proofs.probe_making import Subject
from lora_fx.passes.proofs.reference import Reference, Run
from lora_fx.passes.proofs.row_ids import prove_ids
from lora_fx.passes.proofs.starts_runs import starts_of, with_starts
from lora_fx.passes.verbs.export_files import (
    LARGE_TENSORS,
    on_device,
    refuse_unexchangeable,
    report_of,
    save_within,
)
from lora_fx.passes.verbs.export_options import ExportOptions
from lora_fx.passes.verbs.export_probe import probe_file

if TYPE_CHECKING:
    import onnx_ir as ir


def write_batch(
    graph: OnnxGraph,
    reference: Reference,
    sources: Mapping[str, tuple[str, StoredWeight]],
    adapters: Mapping[str, Adapter],
    options: ExportOptions,
    warnings: Sequence[str],
) -> Report:
    """Write one ONNX file that serves every adapter.

    Args:
        graph: The base; rewritten.
        reference: What its rows have to equal.
        sources: See lora_fx.passes.batch.Batch.
        adapters: Bound to the reference, in the order of their ids, 1, 2 …
        options: With scales the file has the input `adapter_scales`, a weight by row.
        warnings: To be reported.

    Raises:
        LoraFxError: A target whose rows cannot be told apart, or that has no form by row.
        NoEffectError: A row differs from its adapter alone; nothing is written.
    """
    evaluation = Evaluation(reference.weight)
    served = {name: evaluation(adapter) for name, adapter in adapters.items()}
    refuse_unexchangeable(served, "a file with one adapter for each row")
    _refuse_weights(adapters, options)
    model = graph.model
    nodes_of_base = _count_nodes(model)
    updates = {name: adapter.lowrank for name, adapter in served.items()}
    whole = _replacements(graph, adapters)
    starts = starts_of(adapters, reference)
    batch = Batch(updates, sources, options.scales, options.made_for, whole, starts)
    batch(graph)
    starts = batch.made[0] if batch.made else None
    join_copies(model, [name for name, stored in sources.values() if stored.keys])
    graph.lint()

    inputs_by_row = _inputs_by_row(model)
    with options.output() as output:
        notes = save_within(output, model, reference.conditions, reference.guards(), options)
        session = open_session(output.path, options.provider)
        parity = prove_rows(
            session.run,
            reference,
            adapters,
            inputs_by_row,
            scales=options.scales,
            starts=starts,
            rerun=FileRerun(output.path, options.provider),
            evaluate=evaluation,
        )
        demand(parity, "a batch differs")

        feeds = reference.feeds((4, SIZES[0][1]))
        rows = next(feeds[name].shape[0] for name in inputs_by_row if name in feeds)
        if options.scales:
            feeds[SCALES_BY_ROW] = np.ones(rows, np.float32)
        if starts is not None:
            feeds = with_starts(starts, feeds, None)
        prove_ids(session, model, feeds, rows, len(adapters) + 1)
        subject = _subject(session, reference, adapters, inputs_by_row, options)
        of_probe = probe_file(output.path, subject, options.probe, session.provider, notes)

    notes += [
        f"output {name!r} cannot hold NaN: if a runtime accepts adapter_ids out of range, such a "
        "row has the base model's values there"
        for name in outputs_without_nan(model)
    ]
    if session.note:
        notes.append(session.note)
    details = {
        "mode": "batch",
        "adapters": list(adapters),
        **({"whole_tensors": [tensor.name for tensor in whole]} if whole else {}),
        "nodes": _count_nodes(model),
        "nodes_of_base": nodes_of_base,
        **on_device(output, session),
        **reference.details(),
        **of_probe,
    }
    notes += _said_of_large_tables(whole)
    return report_of(output.files, session.provider, parity, [*warnings, *notes], details)


def _refuse_weights(adapters: Mapping[str, Adapter], options: ExportOptions) -> None:
    """Raise for weights by row beside whole tensors: a tensor is one adapter's or another's."""
    for name, adapter in adapters.items():
        if adapter.full and options.scales:
            raise LoraFxError(
                f"{name}: it holds the whole tensor {min(adapter.full)!r}, which is replaced and "
                "has no weight by row",
                "leave --scales out",
            )


def _replacements(graph: OnnxGraph, adapters: Mapping[str, Adapter]) -> list[Replacements]:
    """Return the values of every tensor that an adapter replaces, in the dtype of the graph."""
    keys: dict[str, None] = {}
    for adapter in adapters.values():
        keys |= dict.fromkeys(adapter.full)
    dtypes = {name: dtype_name(value) for name, value in graph.model.graph.initializers.items()}
    whole = []
    for key in keys:
        values: list[Array | None] = []
        for adapter in adapters.values():
            full = adapter.full.get(key)
            dtype = numpy_dtype(dtypes.get(key, "float32"))
            values.append(None if full is None else full.value.astype(dtype))
        whole.append(Replacements(key, values))
    return whole


def _said_of_large_tables(whole: Sequence[Replacements]) -> list[str]:
    """Return a line where the tables of whole tensors are large."""
    lines = []
    for tensor in whole:
        different = [value for value in tensor.values if value is not None]
        if different and different[0].nbytes * (len(different) + 1) > LARGE_TENSORS:
            each = different[0].nbytes >> 20
            lines.append(
                f"{tensor.name}: the file has it {len(different) + 1} times, {each} MB each, and "
                "where a product reads it, a run copies one for every row"
            )
    return lines


def _subject(
    session: RuntimeSession,
    reference: Reference,
    adapters: Mapping[str, Adapter],
    inputs_by_row: Sequence[str],
    options: ExportOptions,
) -> Subject:
    """Return a proven file as a probe is made of it."""
    runs = reference.varied()
    numbers = {name: number for number, name in enumerate(adapters, 1)}

    def of_file(name: str) -> Run:
        return partial(_run_with_id, session, inputs_by_row, options, numbers.get(name, 0))

    return Subject(
        mode="batch",
        run=of_file,
        reference=runs.run,
        vary=runs.run,
        is_slow=True,
        adapters=adapters,
        found=reference.targets(),
        feeds=reference.drawn,
        user_feeds=partial(reference.feeds, SIZES[0]),
        base=reference.base_facts(),
        numbers=numbers,
        precision=options.computes_in,
        narrow=runs.narrow,
    )


def _run_with_id(
    session: RuntimeSession,
    inputs_by_row: Sequence[str],
    options: ExportOptions,
    number: int,
    feeds: Named,
) -> dict[str, Array]:
    """Run with one adapter for every row."""
    rows = next(feeds[name].shape[0] for name in inputs_by_row if name in feeds)
    feeds = {**feeds, IDS: np.full(rows, number, np.int64)}
    if options.scales:
        feeds[SCALES_BY_ROW] = np.ones(rows, np.float32)
    return session.run(feeds)


def _count_nodes(model: ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())


def _inputs_by_row(model: ir.Model) -> list[str]:
    """Return the names of the inputs whose dimension 0 is the batch."""
    symbol = batch_symbol(model)
    names = []
    for value in model.graph.inputs:
        if value.shape and str(value.shape[0]) == symbol:
            names.append(str(value.name))
    return names
