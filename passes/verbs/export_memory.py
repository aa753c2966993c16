"""The memory of an export, told before a model is translated.

    folded     W + s·BA of the adapted weights, in the model's dtype, for the proof of the fold
               (mode merged with an adapter). Certain.
    sessions   ONNX Runtime's copies of the file's weights: none where it reads the data file's
               pages, one where it packs codes for its products, two where they lie inside the
               file, of which one is certain, and SESSIONS_OF_STEP in mode train
    rewriting  candidates of a rewritten graph, and the sessions that compare them
    writing    tensors on their way to the file: the writer's 64 MiB, and one tensor that is
               computed
    program    of a .pt2 file, as torch loads it for the proof, until its tensors are compared with
               the model's; there are no sessions then. Certain.

The file has float32 where the model has bfloat16, so its weights may be twice the model's. What is
not counted: the graph itself, the runs of the proofs, which are at small sizes, and the floats that
codes were made from, which are in memory already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.free_memory import free_memory
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.quantised_parameters import forms
from lora_fx.fx.tensors import has_values
from lora_fx.passes.verbs.export_options import ExportOptions
from lora_fx.peak_memory import MemoryPart, PeakMemory, check_memory
from lora_fx.targets.keys import base_name
from lora_fx.text import sized

WRITER = 1 << 26
"""The bytes that the writer of a data file has in flight."""
SESSIONS_OF_STEP = 1.5
"""What the sessions in the proof of a training step hold, as a multiple of the file (measured)."""
REWRITTEN = {"optimise": 1.5, "float16": 1.5, "int8": 4.0}
"""What the search for a rewritten graph takes, beside the weights of the file in float32: the
model's protobuf message, candidates, and their sessions (measured)."""


def check_export(model: object, options: ExportOptions) -> None:
    """Tell the memory of an export, and refuse an export that cannot fit.

    Nothing is told of a model that has to be opened first, or that has no weights.

    Raises:
        LoraFxError: What is certain to be needed is not there.
    """
    module = model.model if isinstance(model, Captured) else model
    if not isinstance(module, nn.Module):
        return
    tensors = [*module.parameters(), *module.buffers()]
    if not all(has_values(tensor) and tensor.device.type == "cpu" for tensor in tensors):
        return
    peak = memory_of_export(module, options)

    def ways_out(free: int) -> Iterator[str]:
        yield from _ways_out(module, options, free)

    check_memory(peak, free_memory(), ways_out)


def memory_of_export(module: nn.Module, options: ExportOptions) -> PeakMemory:
    """Return the estimate of an export of a model that is in memory."""
    tensors = [*module.parameters(), *module.buffers()]
    loaded = sum(tensor.nbytes for tensor in tensors)
    if options.is_program:
        largest = max((tensor.nbytes for tensor in tensors), default=0)
        program = (MemoryPart("the program", loaded, loaded), MemoryPart("writing", largest))
        return PeakMemory("export", program, loaded, f"the file has about {sized(loaded)}")
    keeps = options.precision == "bfloat16"
    in_file = sum(tensor.nbytes if keeps else _bytes_in_file(tensor) for tensor in tensors)
    largest = max((_bytes_in_file(tensor) for tensor in tensors), default=0)
    folded = _folded_bytes(module, options)

    is_inside = options.mode != "train" and in_file <= options.external_over
    sessions = 1.0 if forms(module) else 0.0
    if is_inside:
        sessions = 2
    if options.mode == "train":
        sessions = SESSIONS_OF_STEP
    rewriting = REWRITTEN.get(options.precision or "", 0.0)
    if options.optimise:
        rewriting += REWRITTEN["optimise"]
    parts = (
        MemoryPart("folded weights", folded, folded),
        MemoryPart(
            "ONNX Runtime's sessions", round(sessions * in_file), in_file if is_inside else 0
        ),
        MemoryPart("rewriting the graph", round(rewriting * in_file)),
        MemoryPart("writing", WRITER + largest),
    )
    return PeakMemory("export", parts, loaded, f"the file has about {sized(in_file)}")


def _bytes_in_file(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor in a file: floats take four, codes stay as they are."""
    if tensor.is_floating_point():
        return 4 * tensor.numel()
    return tensor.nbytes


def _folded_bytes(module: nn.Module, options: ExportOptions) -> int:
    """Return the bytes of the weights that the fold computes; 0 where none is folded."""
    if options.mode != "merged":
        return 0
    names: set[str] = set()
    if isinstance(options.adapters, Adapter):
        names = {base_name(key) for key in options.adapters.lowrank}
    elif isinstance(module, AdaptedModule):
        names = {base_name(key) for key in module.updates}
    return sum(p.nbytes for name, p in module.named_parameters() if name in names)


def _ways_out(module: nn.Module, options: ExportOptions, free: int) -> Iterator[str]:
    """Yield options without which the export fits, with what it needs then."""
    lighter = {}
    if options.optimise:
        lighter["leave --optimise out: it"] = replace(options, optimise=False)
    if options.precision in REWRITTEN:
        lighter[f"leave --precision {options.precision} out: it"] = replace(options, precision=None)
    for advice, other in lighter.items():
        needed = memory_of_export(module, other).expected
        if needed <= free:
            yield f"{advice} needs {sized(needed)} then"
    if options.is_program:
        return
    if options.mode != "train" and options.precision is None and not forms(module):
        yield "--quantise int4 makes the file and its session about a quarter"
