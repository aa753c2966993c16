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
        self.where = where
        self.table = table
        stored = config.get(table) or {}
        if not isinstance(stored, dict):
            raise wrong_field(f"{where}: {table} is {stored!r}; expected an object")
        self.default: float | None = None
        if default in config:
            self.default = self._number(default, config[default])
        self.numbers = {
            pattern: self._number(f"{table} {pattern!r}", value)
            for pattern, value in stored.items()
        }
        self.unmatched = set(self.numbers)
        self.modules: set[str] = set()
        self.doubts: set[str] = set()  # where the order of the table decides
        try:
            self.regexes = {pattern: compiled(rf"(.*\.)?({pattern})$") for pattern in self.numbers}
        except PatternError as error:
            raise wrong_field(f"{where}: {table} holds a bad pattern: {error}") from error

    def of(self, module: str) -> float | None:
        """The number of one module; None where the config gives none."""
        self.modules.add(module)
        matching = [pattern for pattern, regex in self.regexes.items() if matched(regex, module)]
        if module in self.numbers:
            matching.append(module)
        if not matching:
            return self.default
        self.unmatched -= set(matching)
        first = matching[0]
        number = self.numbers[first]
        for other in matching:
            if self.numbers[other] != number:
                self.doubts.add(
                    f"{self.where}: {self.table} {first!r} ({number:g}) and {other!r} "
                    f"({self.numbers[other]:g}) both match {module!r}; the first one is used, as "
                    "in PEFT, but PEFT sorts the patterns on saving: check that it was the first "
                    "in training"
                )
                break
        return number

    def unused(self, pattern: str) -> tuple[str, str]:
        """The message about a pattern that matched no module, and a hint with the nearest names.

        PEFT ignores it, in training as in merging, so it may well be right; or a typing mistake.
        """
        leaves = {module.rpartition(".")[2] for module in self.modules}
        fact = f"{self.table} {pattern!r} matches no module of the adapter"
        return fact, near(pattern, sorted(leaves | self.modules))

    def notes(self) -> list[str]:
        """Notes about the patterns, after `of` was called for every module."""
        notes = []
        for pattern in sorted(self.unmatched):
            fact, hint = self.unused(pattern)
            number = f"{self.numbers[pattern]:g}"
            notes.append(f"{self.where}: {fact}; its {number} is ignored, as in PEFT; {hint}")
        return notes + sorted(self.doubts)

    def _number(self, what: str, value: object) -> float:
        if not is_number(value) or not math.isfinite(value):
            raise wrong_field(f"{self.where}: {what} is {value!r}; expected a number")
        return float(value)
