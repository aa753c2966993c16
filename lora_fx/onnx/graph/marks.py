"""The metadata by which passes mark nodes and values of an ONNX graph."""

from __future__ import annotations

import onnx_ir as ir

MARK = "lora_fx"
VIEW = "lora_fx.view"
"""The metadata key of views in weight form, which start at a sum and not at the weight."""
WAS = "lora_fx.was"
"""The metadata key of a site's value that gave its name to the sum with its branches."""
DATA = "lora_fx.data"
"""The metadata key of a constant that is the input (not the weight) of a product or lookup."""


def site_name(node: ir.Node) -> str:
    """Return the name that a node's first result had before any pass."""
    # by the result, since node names may be empty or repeated
    value = node.outputs[0]
    return value.metadata_props.get(WAS, str(value.name))
