"""The marks that passes leave on the nodes and values of an ONNX graph, as metadata."""

from __future__ import annotations

import onnx_ir as ir

MARK = "lora_fx"
VIEW = "lora_fx.view"
"""Metadata key of the views of a use in weight form, which start at a sum, not at the weight."""
WAS = "lora_fx.was"
"""Metadata key of a site's value whose own name went to the sum with its branches."""
DATA = "lora_fx.data"
"""Metadata key of a constant that a product or a lookup has for its input: no weight."""


def site_name(node: ir.Node) -> str:
    """The name that a node's first result had before any pass."""
    # by the result, since node names may be empty or repeated
    value = node.outputs[0]
    return value.metadata_props.get(WAS, str(value.name))
