"""Model functions of an ONNX model in the place of their calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def counted_names() -> Iterator[None]:
    """A block in which onnx_ir's inliner remembers how far it has counted the copies of a name.

    Unasked it tries NAME_2, NAME_3 … anew for each copy: 4,096 of one name take 12 s. The names
    that come of it are the same, since none is given back.
    """
    from onnx_ir.passes.common import inliner

    last: dict[tuple[str, int], int] = {}

    def unique(name: str, callstack: list[str], used_names: set[str]) -> str:
        count, candidate = last.get((name, id(used_names)), 1), name
        while candidate in used_names:
            count += 1
            candidate = f"{name}_{count}"
        last[name, id(used_names)] = count
        used_names.add(candidate)
        return candidate

    before = inliner._make_unique_name
    try:
        inliner._make_unique_name = unique
        yield
    finally:
        inliner._make_unique_name = before
