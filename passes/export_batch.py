"""export in mode batch: one ONNX file for many adapters, a row of the batch each.

    base → batch → run: row b of a mixed batch == adapter ids[b] on that row, alone

Only where all rows agree (`prove_rows`) the file gets its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_fx.adapter.adapter import Adapter, check_plain
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError
from lora_fx.onnx.batch import batch_symbol
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.session import open_session
from lora_fx.passes.batch import Batch, Source
from lora_fx.passes.modes import Writing
from lora_fx.passes.proofs.batch import prove_rows
from lora_fx.passes.proofs.parity import Reference

Adapters = Adapter | Sequence[Adapter] | Mapping[str, Adapter]


def write_batch(
    graph: OnnxGraph,
    reference: Reference,
    sources: Mapping[str, tuple[str, Source]],
    adapters: Mapping[str, Adapter],
    how: Writing,
    *,
    scales: bool = False,
    fixed: bool = False,
    warnings: Sequence[str] = (),
) -> Report:
    """Write one ONNX file that serves every adapter.

    Args:
        graph: The base; rewritten.
        reference: What its rows have to equal.
        sources: See lora_fx.passes.batch.Batch.
        adapters: Bound to the reference, in the order of their ids, 1, 2 …
        how: Where and how to write.
        scales: Add the input `adapter_scales`, a weight by row.
        fixed: The reference has one size: a user's inputs.
        warnings: To be reported.

    Raises:
        LoraFxError: A target whose rows cannot be told apart, or that has no form by row.
        NoEffectError: A row differs from its adapter alone; nothing is written.
    """
    for name, adapter in adapters.items():
        check_plain(adapter, f"{name}: a file of one adapter a row")
        if adapter.full:
            raise LoraFxError(
                f"{name}: it holds the whole tensor {min(adapter.full)!r}",
                "rows of one batch share everything but low-rank updates",
            )
    model = graph.model
    before = sum(1 for _ in model.graph.all_nodes())
    Batch({n: a.lowrank for n, a in adapters.items()}, sources, scales)(graph)
    graph.lint()
    symbol = batch_symbol(model)
    rowed = [
        str(v.name)
        for v in model.graph.inputs
        if v.shape is not None and len(v.shape) and str(v.shape[0]) == symbol
    ]
    with how.output() as made_file:
        made_file.save(model, how.external_over)
        session = open_session(made_file.path, how.provider)
        parity = prove_rows(session.run, reference, adapters, rowed, fixed=fixed, scales=scales)
    sizes = {str(f): f.stat().st_size for f in made_file.files}
    said = [*warnings, *([session.note] if session.note else [])]
    details = {
        "files": sizes,
        "provider": session.provider,
        "mode": "batch",
        "adapters": list(adapters),
        "nodes": sum(1 for _ in model.graph.all_nodes()),
        "nodes_of_base": before,
    }
    return Report("export", True, tuple(parity), tuple(sizes), tuple(said), details)


def named(adapters: Any) -> dict[str, Adapter]:
    """Adapters by name, in the order of their ids."""
    if isinstance(adapters, Adapter):
        adapters = [adapters]
    if not adapters:
        raise LoraFxError("mode batch needs adapters", "adapters=[first, second, …]")
    if isinstance(adapters, Mapping):
        return dict(adapters)
    return {f"adapter_{i}": a for i, a in enumerate(adapters, 1)}
