"""optimise: rewrites of an exported graph that leave its outputs, each kept only where proven so.

The stages are lora_fx.onnx.optimise.stages.STAGES; here is where their inputs come from: a captured
model, or a file's own signature.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.compare import Report, sizes_text
from lora_fx.files.atomic import check_output
from lora_fx.files.read import remember
from lora_fx.inputs import SIZES, Named
from lora_fx.onnx.load import load
from lora_fx.onnx.names import mark_changed, restore_weight_names, strip_traces
from lora_fx.onnx.optimise.precision import Narrowed, narrow
from lora_fx.onnx.optimise.stages import RewriteStage, apply_stages
from lora_fx.onnx.save import output
from lora_fx.onnx.session import open_session, signature
from lora_fx.onnx.triton import Repository
from lora_fx.onnx.validity import blaming
from lora_fx.text import Json

if TYPE_CHECKING:
    import onnx_ir as ir

    from lora_fx.fx.module.module import CapturedModule


def optimise(
    model: ir.Model, reference: CapturedModule, arrays: Named | None, provider: str
) -> tuple[ir.Model, list[RewriteStage]]:
    """(onnx_ir model, its stages), on the inputs that export proves with."""
    from lora_fx.passes.proofs.parity import feeds_of  # imports torch, which files do without

    feeds = [f for _, f, extra in feeds_of(reference, arrays) if not extra]
    return _cleaned(*apply_stages(model, feeds, provider=provider))


def narrowed(
    model: ir.Model,
    reference: CapturedModule,
    arrays: Named | None,
    provider: str,
    precision: str,
) -> Narrowed:
    """A graph in fewer bits, on the inputs that export proves with."""
    from lora_fx.passes.proofs.parity import feeds_of

    feeds = [f for _, f, extra in feeds_of(reference, arrays) if not extra]
    return narrow(model, precision, feeds, provider)


@blaming
def optimise_file(
    source: str | PathLike[str],
    path: str | PathLike[str],
    *,
    inputs: Named | None = None,
    provider: str = "auto",
    force: bool = False,
    repository: Repository | None = None,
    optimise: bool = True,
    precision: str | None = None,
) -> Report:
    """Optimise an .onnx file into another; see docs/export.md and lora_fx.passes.verbs.export.

    Args:
        source: The file; it is not changed.
        path: Where to write.
        inputs: Arrays by input name, instead of sampled ones.
        provider: auto, cpu or cuda.
        force: Replace an existing file.
        repository: Where a copy goes, for Triton.
        optimise: Apply the stages.
        precision: float16 or int8, after them.

    Raises:
        LoraFxError: The file does not load or run; nothing is written.
    """
    remember(source)
    check_output(path, force=force)
    target = Path(path)
    opened = load(source)
    restore_weight_names(opened)
    stored = opened.graph.initializers.items()
    values = {str(n): v.const_value.numpy for n, v in stored if v.const_value is not None}
    session = open_session(source, provider)
    specs = signature(session)
    by_shape: dict[str, Json] = {}
    for size in specs.checks if inputs is None else SIZES[:1]:
        feed = {**specs.sample(size), **(inputs or {})}
        by_shape.setdefault(sizes_text({k: v.shape for k, v in feed.items()}), feed)
    feeds = list(by_shape.values())
    chosen: Named | None = None if optimise else {}
    model, stages = _cleaned(*apply_stages(opened, feeds, chosen, provider=provider))
    mark_changed(model, values)
    said = [session.note] if session.note else []
    if precision:
        made = narrow(model, precision, feeds, provider)
        model = made.model
        said.append(made.said(precision))
    with output(target, force=force, repository=repository) as made_file:
        made_file.save(model)
    return Report(
        "export",
        True,
        outputs=tuple(map(str, made_file.files)),
        warnings=tuple(said),
        details={
            "provider": session.provider,
            "mode": "optimised",
            "nodes": sum(1 for _ in model.graph.all_nodes()),
            "stages": [s.to_json() for s in stages],
        },
    )


def _cleaned(model: ir.Model, stages: list[RewriteStage]) -> tuple[ir.Model, list[RewriteStage]]:
    restore_weight_names(model)
    strip_traces(model)
    return model, stages
