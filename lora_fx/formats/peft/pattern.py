"""rank_pattern and alpha_pattern of PEFT: a number for each module."""

from __future__ import annotations

import math

from lora_fx.formats.peft.config import wrong_field
from lora_fx.regexes import PatternError, compiled, matched
from lora_fx.text import JsonView, is_number, near


class Pattern:
    """rank_pattern or alpha_pattern with its default: module name → number.

    PEFT takes the first pattern, in the order of the file, that matches the end of the name from
    a dot on; then a pattern that equals the name; then the default.
    """

    def __init__(self, config: JsonView, table: str, default: str, where: str) -> None:
        """Compile the patterns of `config[table]`; the default is `config.get(default)`."""
        self.where, self.table = where, table
        given = config.get(table) or {}
        if not isinstance(given, dict):
            raise wrong_field(f"{where}: {table} is {given!r}; expected an object")
        self.default = None if default not in config else self._number(default, config[default])
        self.numbers = {k: self._number(f"{table} {k!r}", v) for k, v in given.items()}
        self.unmatched = set(self.numbers)
        self.seen: set[str] = set()
        self.doubts: set[str] = set()  # where the order of the table decides
        try:
            self.regexes = {k: compiled(rf"(.*\.)?({k})$") for k in self.numbers}
        except PatternError as error:
            raise wrong_field(f"{where}: {table} holds a bad pattern: {error}") from error

    def of(self, module: str) -> float | None:
        """The number of one module; None where the config gives none."""
        self.seen.add(module)
        hits = [k for k, pattern in self.regexes.items() if matched(pattern, module)]
        hits += [module] if module in self.numbers else []
        self.unmatched -= set(hits)
        other = next((k for k in hits if self.numbers[k] != self.numbers[hits[0]]), None)
        if other is not None:
            self.doubts.add(
                f"{self.where}: {self.table} {hits[0]!r} ({self.numbers[hits[0]]:g}) and {other!r} "
                f"({self.numbers[other]:g}) both match {module!r}; the first counts, as in PEFT, "
                "which sorts them when it saves: was it the first in training?"
            )
        return self.numbers[hits[0]] if hits else self.default

    def unused(self, pattern: str) -> tuple[str, str]:
        """What a pattern that matched no module comes to, and the nearest names.

        PEFT ignores it, in training as in merging, so it may well be right; or a typing mistake.
        """
        ends = sorted({m.rpartition(".")[2] for m in self.seen} | self.seen)
        said = f"{self.table} {pattern!r} matches no module of the adapter"
        return said, near(pattern, ends)

    def notes(self) -> list[str]:
        """What to tell once every module has been asked for."""
        notes = []
        for pattern in sorted(self.unmatched):
            (said, hint), number = self.unused(pattern), f"{self.numbers[pattern]:g}"
            notes.append(f"{self.where}: {said}; its {number} is for none, as in PEFT; {hint}")
        return notes + sorted(self.doubts)

    def _number(self, what: str, value: object) -> float:
        if not is_number(value) or not math.isfinite(value):
            raise wrong_field(f"{self.where}: {what} is {value!r}; expected a number")
        return float(value)
