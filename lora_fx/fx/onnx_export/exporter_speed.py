"""The exporter does once what is the same for many nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from torch.export import ExportedProgram

from lora_fx.fx.lowering.decomposition import lowered
from lora_fx.fx.onnx_exporter import table_read_once, translated_once, typed_by_values
from lora_fx.onnx.onnxscript_rules import (
    inferred_once,
    matched_by_operator,
)
from lora_fx.patching import patched


@contextlib.contextmanager
def repeating() -> Iterator[None]:
    """A block in which the exporter does once, to the same graph, what it would for every node."""
    by_kind = partial(patched, ExportedProgram, run_decompositions=lowered)
    quick = (matched_by_operator, typed_by_values, translated_once, inferred_once)
    with table_read_once(), contextlib.ExitStack() as held:
        for part in (by_kind, *quick):  # what a version lacks goes the long way
            with contextlib.suppress(ImportError, AttributeError):
                held.enter_context(part())
        yield
