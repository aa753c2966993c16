"""find for the paths of files that need no capture: .onnx files, and files of tensors."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike, fspath
from typing import TypeGuard

import numpy as np

from lora_fx.checkpoint.file_targets import file_targets
from lora_fx.errors import NoSay, given_options, refuse_no_say
from lora_fx.inputs import Named
from lora_fx.onnx.fixed_shapes import with_fixed_shapes
from lora_fx.onnx.graph.graph import UNKNOWN_SHAPES, OnnxGraph
from lora_fx.onnx.names import named_graph
from lora_fx.onnx.validity import blaming
from lora_fx.passes.find import find
from lora_fx.passes.verbs.options import CaptureOptions
from lora_fx.targets.found import Found
from lora_fx.text import StrPath

TENSORS = (".safetensors", ".bin")
"""The ends of files whose targets are found by names and shapes alone."""


def needs_no_capture(model: object) -> TypeGuard[StrPath]:
    """Whether a model is the path of an .onnx file or of a file of tensors."""
    return isinstance(model, (str, PathLike)) and fspath(model).endswith((".onnx", *TENSORS))


def find_in_file(path: StrPath, options: CaptureOptions, training: bool) -> Found:
    """Find the targets of a file.

    Args:
        path: The file.
        options: What `find` was given for a capture; of an .onnx file, kwargs count alone.
        training: Whether it was asked for the train graph.

    Raises:
        LoraFxError: An argument that only a model which is captured has.
    """
    asked: Named = {
        "args": options.args or None,
        "kwargs": options.kwargs or None,
        "dynamic": options.dynamic or None,
        "static": options.static or None,
        "training": training,
    }
    without_effect = tuple(asked)
    why = f"for {fspath(path)}, a file of which only names and shapes are read"
    if fspath(path).endswith(".onnx"):
        without_effect = ("args", "dynamic", "static", "training")
        why = f"for {fspath(path)}, which is already a graph"
    rule = NoSay[Named](without_effect, bool, why)
    refuse_no_say([rule], asked, given_options(asked))

    if fspath(path).endswith(TENSORS):
        return file_targets(fspath(path))
    inputs = {name: np.asarray(array) for name, array in (options.kwargs or {}).items()}
    return find_in_onnx(fspath(path), inputs)


@blaming
def find_in_onnx(path: str, inputs: Named) -> Found:
    """Find the targets of an .onnx file.

    Args:
        path: The file.
        inputs: Arrays by input name, whose sizes the FLOPs are counted at.
    """
    graph, _ = named_graph(path)
    at_sizes, sizes = with_fixed_shapes(graph.model, inputs, path)
    with_sizes = OnnxGraph(at_sizes)
    notes = (*(n for n in graph.notes if n != UNKNOWN_SHAPES), *with_sizes.notes)
    return replace(find(with_sizes), notes=notes, sizes=sizes)
