"""Names for values that a rewrite adds to a model: names that no value has."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.onnx.graph.values import values_of
from lora_fx.text import free_name


class NewNames:
    """A source of names that nothing in a model has, inner graphs included."""

    def __init__(self, model: ir.Model) -> None:
        self._taken = {str(value.name) for value in values_of(model)}

    def take(self, stem: str) -> str:
        """Return the stem, with a number behind it where a value has that name already."""
        name = free_name(stem, self._taken, "_")
        self._taken.add(name)
        return name
