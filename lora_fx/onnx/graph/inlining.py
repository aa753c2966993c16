"""Inlining of model functions in an ONNX model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import onnx_ir as ir


def inline_functions(model: ir.Model) -> None:
    """Replace each call of a model function by the function's nodes."""
    from onnx_ir.passes.common import InlinePass

    with _counted_names():
        InlinePass()(model)


@contextlib.contextmanager
def _counted_names() -> Iterator[None]:
    """A block in which onnx_ir's inliner remembers the number of copies of each name.

    Without it, the inliner tries NAME_2, NAME_3 … anew for each copy: 4,096 of one name take 12 s.
    The names are the same, since a name that was given once stays in use.
    """
    from onnx_ir.passes.common import inliner

    last_counts: dict[tuple[str, int], int] = {}

    def make_unique_name(name: str, callstack: list[str], used_names: set[str]) -> str:
        count = last_counts.get((name, id(used_names)), 1)
        candidate = name
        while candidate in used_names:
            count += 1
            candidate = f"{name}_{count}"
        last_counts[name, id(used_names)] = count
        used_names.add(candidate)
        return candidate

    original = inliner._make_unique_name
    try:
        inliner._make_unique_name = make_unique_name
        yield
    finally:
        inliner._make_unique_name = original
