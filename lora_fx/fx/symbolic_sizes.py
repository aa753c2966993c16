"""Symbolic sizes: a facade of torch's symbolic shapes and of its formula printer.

A `ShapeEnv` holds the symbols of one trace, and what was learnt about them. Sympy is loaded with
this file. Tried with torch 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, canonicalize_bool_expr
from torch.utils._sympy.printers import PythonPrinter

from lora_fx.patching import patched

__all__ = [
    "LOGGER",
    "ShapeEnv",
    "canonical",
    "equal_sizes_shared",
    "ones_stay_free",
    "python_source",
]

LOGGER = "torch.fx.experimental.symbolic_shapes"
"""The name of the logger that prints the graph of a failing trace."""


def canonical(comparison: Any) -> str:
    """Return a comparison of symbols as text, the same for all its spellings."""
    return str(canonicalize_bool_expr(comparison))


def python_source(formula: Any) -> str:
    """Return a formula of symbols as Python source.

    Raises:
        NotImplementedError, TypeError: It has a function that Python lacks.
    """
    return str(PythonPrinter().doprint(formula))


def ones_stay_free() -> contextlib.AbstractContextManager[None]:
    """Return a block in which free dimensions of size 1 in the example stay free in an export."""
    patch: contextlib.AbstractContextManager[None] = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patch


def equal_sizes_shared() -> contextlib.AbstractContextManager[None]:
    """A block in which dimensions of equal example size share one symbol in an export.

    An export gives each a symbol of its own, and solves an equation wherever a model demands that
    two are equal. The block is for examples in which all sizes that need not be equal differ.
    """
    create_symbol: Any = ShapeEnv.create_symbol  # DUCK: one symbol for one size

    def shared(argument: object) -> object:
        return DimDynamic.DUCK if argument is DimDynamic.DYNAMIC else argument

    def create(env: Any, *args: object, **named: object) -> Any:
        named = {name: shared(argument) for name, argument in named.items()}
        return create_symbol(env, *map(shared, args), **named)

    return patched(ShapeEnv, create_symbol=create)
