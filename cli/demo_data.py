"""The demo's data: docstrings of the standard library, labelled by their modules.

The top-level modules, in alphabetical order, are cut into volumes of about equal size, like those
of a printed manual. The label of a docstring is its volume. Each volume mixes unlike modules, so a
linear probe on a text encoder's features cannot separate the volumes well, and an adapter can.
"""

from __future__ import annotations

import ast
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass


SKIP = {
    "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "ensurepip",
    "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip


VOLUMES = 10


SEED = 20261124
"""Seed of the split. The settings were tuned on seed 0, so the demo uses another seed."""


WORDS = 4
"""The fewest words of a docstring; shorter ones do not show their module."""


@dataclass(frozen=True)
class Topics:
    """Texts with labels, split by a fixed seed; `names` are the volumes' first and last module."""

    names: tuple[str, ...]
    train: tuple[list[str], list[int]]
    test: tuple[list[str], list[int]]


def docstrings(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """(top-level module, docstring) of every definition; the files are parsed, not imported."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        components = path.relative_to(root).parts
        if SKIP & set(components) or components[0].startswith("config-"):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # files for other versions
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text.split()) >= WORDS:
                    yield components[0].removesuffix(".py"), text


def topics(train: int, test: int, seed: int = SEED, root: Path | None = None) -> Topics:
    """About `train` and `test` examples, in proportion from every volume; no text is repeated."""
    modules_of: dict[str, set[str]] = {}
    for module, text in docstrings(root):
        modules_of.setdefault(text, set()).add(module)
    rows = sorted(
        (next(iter(modules)), text) for text, modules in modules_of.items() if len(modules) == 1
    )
    volumes = _volumes(Counter(module for module, _ in rows))
    volume_of: dict[str, int] = {}
    for number, modules in enumerate(volumes):
        volume_of.update(dict.fromkeys(modules, number))

    order = np.random.default_rng(seed).permutation(len(rows))[: train + test]
    picked = [rows[index] for index in order]
    n_test = min(test, len(picked) // 4)
    names = tuple(f"{modules[0]} … {modules[-1]}" for modules in volumes)
    return Topics(
        names, _labelled(picked[n_test:], volume_of), _labelled(picked[:n_test], volume_of)
    )


def _volumes(counts: Mapping[str, int]) -> list[list[str]]:
    """Cut the modules, in alphabetical order, into volumes with about equal numbers of texts.

    A module that is larger than a volume leaves the next one empty; empty volumes are left out.
    """
    total = sum(counts.values())
    volumes: list[list[str]] = [[] for _ in range(VOLUMES)]
    texts_before = 0
    for module in sorted(counts):
        volumes[min(VOLUMES - 1, texts_before * VOLUMES // total)].append(module)
        texts_before += counts[module]
    return [modules for modules in volumes if modules]


def _labelled(
    rows: list[tuple[str, str]], volume_of: Mapping[str, int]
) -> tuple[list[str], list[int]]:
    """The texts of (module, text) rows, and the numbers of their volumes."""
    texts = [text for _, text in rows]
    labels = [volume_of[module] for module, _ in rows]
    return texts, labels
