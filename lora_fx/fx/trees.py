"""Trees of arguments and results: a facade of `torch.utils._pytree`.

A tree is a value, or a tuple, list, dict or registered class of trees; its leaves are the values,
in order. Tried with torch 2.13 and 2.15.
"""

from __future__ import annotations

from torch.utils._pytree import (
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
    "register_dataclass",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_structure",
    "tree_unflatten",
]
