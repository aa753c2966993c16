"""Let the exporter do work that is equal for many nodes only once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.export import ExportedProgram

from lora_fx.fx.lowering.decomposition import lowered
from lora_fx.fx.onnx_exporter import table_read_once, translated_once, typed_by_values
from lora_fx.onnx.onnxscript_rules import (
    inferred_once,
    matched_by_operator,
)
from lora_fx.patching import patched


def decomposed_by_kind() -> contextlib.AbstractContextManager[None]:
    """A block in which a program is decomposed by one node of every kind."""
    return patched(ExportedProgram, run_decompositions=lowered)


SHORTCUTS = (
    decomposed_by_kind,
    matched_by_operator,
    typed_by_values,
    translated_once,
    inferred_once,
)


@contextlib.contextmanager
def repeating() -> Iterator[None]:
    """A block in which the exporter does once what it would do for every node."""
    with table_read_once(), contextlib.ExitStack() as shortcuts:
        for shortcut in SHORTCUTS:
            # what a version of torch or onnxscript lacks goes the long way
            with contextlib.suppress(ImportError, AttributeError):
                shortcuts.enter_context(shortcut())
        yield
