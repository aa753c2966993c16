"""optimise: rewrites of an exported graph that leave its outputs, each kept only where proven so.

The stages are lora_fx.onnx.stages.STAGES; a file's inputs come from its signature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING

from lora_fx.compare import Report
from lora_fx.files.read import remember
from lora_fx.inputs import Named
from lora_fx.onnx.load import load
from lora_fx.onnx.names import give_own_names, mark_changed, restore_weight_names
from lora_fx.onnx.precision import narrow
from lora_fx.onnx.session import feeds_of_sizes, open_session, signature
from lora_fx.onnx.stages import Rewrite, RewriteStage, apply_stages
from lora_fx.onnx.validity import blaming
from lora_fx.passes.verbs.export_options import ExportOptions

if TYPE_CHECKING:
    import onnx_ir as ir


def optimised(
    model: ir.Model,
    feeds: Sequence[Named],
    provider: str,
    stages: Mapping[str, Rewrite] | None = None,
) -> tuple[ir.Model, list[RewriteStage]]:
    """The model after the stages, with its weights' own names and no traces, and their rows."""
    made, rows = apply_stages(model, feeds, stages, provider)
    give_own_names(made, None, {})
    return made, rows


@blaming
def optimise_file(source: str | PathLike[str], options: ExportOptions) -> Report:
    """Optimise an .onnx file into another; see docs/export.md and lora_fx.passes.verbs.export.

    Args:
        source: The file; it is not changed.
        options: What export is asked for: the stages, a precision after them, or both.

    Raises:
        LoraFxError: The file does not load or run; nothing is written.
    """
    remember(source)
    provider, precision = options.provider, options.precision
    opened = load(source)
    restore_weight_names(opened)
    stored = opened.graph.initializers.items()
    values = {str(n): v.const_value.numpy for n, v in stored if v.const_value is not None}
    session = open_session(source, provider)
    feeds = list(feeds_of_sizes(signature(session), options.inputs or {}))
    model, stages = optimised(opened, feeds, provider, None if options.optimise else {})
    mark_changed(model, values)
    said = [*filter(None, [session.note])]
    if precision:
        made = narrow(model, precision, feeds, provider, options.tol)
        model = made.model
        said.append(made.said(precision))
    with options.output() as made_file:
        made_file.save(model)
    nodes = sum(1 for _ in model.graph.all_nodes())
    rows = [s.to_json() for s in stages]
    details = {"provider": session.provider, "mode": "optimised", "nodes": nodes, "stages": rows}
    outputs = tuple(map(str, made_file.files))
    return Report("export", True, (), outputs, tuple(said), details)
