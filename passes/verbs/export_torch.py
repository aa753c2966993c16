"""Functions that the exports of a torch model share: translation, gate, quantised base."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import ORT_TOL, compare
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.module.doubts import plain
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.module.module_base import Base
from lora_fx.fx.onnx_export.to_onnx import to_onnx
from lora_fx.fx.onnx_export.translation import OPSET
from lora_fx.onnx.bfloat16 import in_bfloat16, widen
from lora_fx.onnx.masked_scores import mask_by_infinity
from lora_fx.onnx.precision import GATES, at_level
from lora_fx.passes.verbs.export_files import named_adapters
from lora_fx.passes.verbs.export_options import ExportOptions
from lora_fx.passes.verbs.open import captured_of, opened, own_adapters
from lora_fx.passes.verbs.options import ExportAdapters
from lora_fx.passes.verbs.quantise import Wanted, quantised, said_of_large_floats
from lora_fx.progress import stage
from lora_fx.targets.target import Target

WIDENED = (
    "the file is in float32: it keeps the model's bfloat16 numbers, but does not round as bfloat16"
)


def translated(
    module: CapturedModule,
    options: ExportOptions,
    *,
    level: int = 0,
    apart: Mapping[str, Target] | None = None,
    whole: Collection[str] = (),
) -> tuple[Any, list[str]]:
    """Translate a module to ONNX in a dtype that the runtime supports; return notes on that.

    Args:
        module: The module.
        options: What export is asked for.
        level: The accuracy level of products over codes.
        apart: Uses whose weight the file is to store under a name of its own, by that name.
        whole: First names of parameters that the file is to store as they lie in the model.
    """
    opset = options.opset or OPSET
    model = to_onnx(module, opset, apart, whole=whole, repeat=options.capture.repeat)
    at_level(model, level)
    mask_by_infinity(model)
    if options.precision != "bfloat16":
        was_widened = widen(model)
        return model, [WIDENED] if was_widened else []
    if not in_bfloat16(model):
        raise LoraFxError(
            "precision bfloat16 needs a model in bfloat16",
            "use --precision float16 or --precision int8",
        )
    return model, ["bfloat16: ONNX Runtime's CPU provider supports few ops in this type"]


def level_gate(options: ExportOptions) -> float:
    """Return the gate of the accuracy level at which products over codes compute."""
    return options.tol or GATES.get(f"level {options.accuracy_level}", ORT_TOL)


def quantised_base(
    model: object, options: ExportOptions, wanted: Wanted
) -> tuple[Captured, ExportAdapters | None, list[str]]:
    """Return the quantised capture of the model, its adapters, and notes.

    If no adapters are given, a module that insert returned brings its own adapter.
    """
    model = opened(model)
    export_adapters = own_adapters(model, options.adapters)
    adapters: list[Adapter] = []
    if export_adapters:
        adapters += named_adapters(export_adapters).values()
    captured = captured_of(model, options.capture_of_base())

    trained_whole: set[str] = set()
    for adapter in adapters:
        trained_whole.update(adapter.full)
    coded = quantised(captured, wanted, trained_whole)
    with torch.no_grad(), stage("running the model with floats, and with codes"):
        before = execution_of(plain(captured)).flat(captured.named)
        after = execution_of(plain(coded)).flat(coded.named)
    difference = compare(after, before, {}, 1.0).rel
    coded.notes.append(
        f"quantising changes the base's outputs by up to {difference:.1e} of the largest number"
    )
    coded.notes += said_of_large_floats(coded, trained_whole)

    base = Base()
    for i, adapter in enumerate(adapters, 1):
        name = f"adapter {i}" if len(adapters) > 1 else "the adapter"
        base.check(adapter.metadata, coded.model, name)
    coded.notes += base.said
    return coded, export_adapters, coded.notes[len(captured.notes) :]


def folded_already() -> LoraFxError:
    """Return the error for a module whose weights are folded."""
    return LoraFxError(
        "this module's weights are folded already", "export the original model with adapters=…"
    )
