"""Finds the files and models among the arguments and options of a command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_fx.text import JsonView

MODELS = ("model", "base", "tuned", "adapter", "adapters", "a", "b", "weights")
"""Arguments and options that can name a model or an adapter of the Hub."""


NAMED = (*MODELS, "data", "inputs_file", "names", "old_names", "plan", "eval_data")
"""Arguments and options that can name a file; values of others only look like file names."""


def input_paths(given: JsonView) -> list[Path]:
    """The existing files among the arguments, without `:W` and the function of `file.py:name`."""
    existing: dict[Path, None] = {}
    for text in texts_of(given, NAMED):
        if "\0" in text or len(text) > 4096:
            continue
        before_colon, _, _ = text.rpartition(":")
        for path in (Path(text), Path(before_colon)):
            if path.name and path.exists():
                existing[path] = None
                break
    return list(existing)


def texts_of(given: JsonView, names: Sequence[str]) -> Iterator[str]:
    """The values of these arguments and options, each of which may have several."""
    for name in names:
        value = given.get(name)
        texts = value if isinstance(value, (tuple, list)) else [value]
        for text in texts:
            if isinstance(text, str) and text:
                yield text
