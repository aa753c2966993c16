"""The files and models that a command was given, by the names of its arguments and options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_fx.text import JsonView

MODELS = ("model", "base", "tuned", "adapter", "adapters", "a", "b", "weights")
"""Arguments and options that can name a model or an adapter of the Hub."""


NAMED = (*MODELS, "data", "inputs_file", "names", "old_names", "plan", "eval_data")
"""Arguments and options that can name a file. Not every word that is one's name is meant so."""


def input_paths(given: JsonView) -> list[Path]:
    """The files that were given: weights, and the function of `file.py:name`, cut off."""
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
    """The texts that these arguments and options were given, one or several each."""
    for name in names:
        value = given.get(name)
        texts = value if isinstance(value, (tuple, list)) else [value]
        for text in texts:
            if isinstance(text, str) and text:
                yield text
