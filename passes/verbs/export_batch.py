"""The file of mode batch: one ONNX file for many adapters, a row of the batch each.

    base → batch → run: row b of a mixed batch == adapter ids[b] on that row, alone

Only where all rows agree (`prove_rows`) the file gets its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Report, demand
from lora_fx.inputs import SIZES
from lora_fx.onnx.batch import SCALES as SCALES_BY_ROW
from lora_fx.onnx.batch import batch_symbol, join_copies, outputs_without_nan
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.session import open_session
from lora_fx.passes.batch import Batch, StoredWeight
from lora_fx.passes.proofs.reference import FileRerun, Reference, prove_rows
from lora_fx.passes.proofs.row_ids import prove_ids
from lora_fx.passes.verbs.export_options import ExportOptions

if TYPE_CHECKING:
    pass
from lora_fx.passes.verbs.export_files import check_shared, report_of, save_within


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
    check_shared(adapters, "a file of one adapter a row")
    model = graph.model
    before = sum(1 for _ in model.graph.all_nodes())
    Batch({n: a.lowrank for n, a in adapters.items()}, sources, options.scales)(graph)
    join_copies(model, [name for name, stored in sources.values() if stored.keys])
    graph.lint()
    symbol = batch_symbol(model)
    rowed = [str(v.name) for v in model.graph.inputs if v.shape and str(v.shape[0]) == symbol]
    with options.output() as made_file:
        told = save_within(made_file, model, reference.conditions, reference.guards(), options)
        session = open_session(made_file.path, options.provider)
        rerun = FileRerun(made_file.path, options.provider)
        parity = prove_rows(
            session.run, reference, adapters, rowed, scales=options.scales, rerun=rerun
        )
        demand(parity, "a batch differs")
        feeds = reference.feeds((4, SIZES[0][1]))
        rows = next(feeds[n].shape[0] for n in rowed if n in feeds)
        if options.scales:
            feeds[SCALES_BY_ROW] = np.ones(rows, np.float32)
        prove_ids(session, model, feeds, rows, len(adapters) + 1)
    told += [
        f"output {name!r} can hold no NaN: where a runtime does not refuse adapter_ids out of "
        "range, such a row has the base model's values there"
        for name in outputs_without_nan(model)
    ]
    said = [*warnings, *told, *filter(None, [session.note])]
    nodes = {"nodes": sum(1 for _ in model.graph.all_nodes()), "nodes_of_base": before}
    details = {"mode": "batch", "adapters": list(adapters), **nodes, **reference.details()}
    return report_of(made_file.files, session.provider, parity, said, details)
