"""Trees of arguments and results: a facade of `torch.utils._pytree`.

A tree is a value, or a tuple, list, dict or registered class of trees; its leaves are the values,
in order. Tried with torch 2.13 and 2.15.
"""

from __future__ import annotations

from torch.utils._pytree import (
    SUPPORTED_NODES,
    LeafSpec,
    TreeSpec,
    register_dataclass,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_structure,
    tree_unflatten,
)

__all__ = [
    "LeafSpec",
    "TreeSpec",
    "has_unnamed_parts",
    "register_dataclass",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_structure",
    "tree_unflatten",
]


def has_unnamed_parts(value: object) -> bool:
    """Whether a value is of a class that was registered without the names of its parts.

    `tree_flatten_with_path` refuses such a class; the outputs of diffusers are of one.
    """
    node = SUPPORTED_NODES.get(type(value))
    return node is not None and node.flatten_with_keys_fn is None
