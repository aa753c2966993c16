"""A plan as a file: which rank every target gets, in JSON that people read and edit.

    {"format": "lora-fx plan", "version": 1, "model": …, "method": …, "budget": …, "unit": …,
     "limit": …, "used": …, "examples": …, "targets": {KEY: {"rank": 3, "alpha": 6}, …}}

`targets` are what `insert` and `train` take; a target of rank 0 is left out. The other fields say
where the ranks come from, and may be missing in a file that was written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from lora_fx.errors import LoraFxError, one_line
from lora_fx.text import near_names, table

FORMAT = "lora-fx plan"
VERSION = 1
FIELDS = {
    "format": str, "version": int, "model": str, "method": str, "budget": str, "unit": str,
    "limit": int, "used": int, "examples": int, "targets": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Ranked:
    """One target: its rank and alpha, what one rank costs, and the highest that it can have."""

    key: str
    rank: int
    alpha: float
    cost: int
    most: int


@dataclass(frozen=True)
class Planned:
    """Ranks under a budget.

    Attributes:
        rows: One a target, rank 0 where it is left out.
        method: Of lora_fx.ranking.
        budget: As it was asked for.
        unit: params or flops.
        limit: The budget in its unit.
        model: What was planned for; empty for a module.
        examples: How many calibration read.
        notes: What had to be said.
    """

    rows: tuple[Ranked, ...]
    method: str
    budget: str
    unit: str
    limit: int
    model: str = ""
    examples: int = 0
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def used(self) -> int:
        """Of the limit."""
        return sum(r.cost * r.rank for r in self.rows)

    @property
    def ranks(self) -> dict[str, dict[str, Any]]:
        """Key → rank and alpha: what insert takes as plan."""
        return {r.key: {"rank": r.rank, "alpha": r.alpha} for r in self.rows if r.rank}

    def to_json(self) -> dict[str, Any]:
        """The file."""
        targets = {r.key: {"rank": r.rank, "alpha": _plain(r.alpha)} for r in self.rows}
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "method": self.method,
            "budget": self.budget,
            "unit": self.unit,
            "limit": self.limit,
            "used": self.used,
            "examples": self.examples,
            "targets": targets,
        }

    def text(self) -> str:
        """The file's text, a target a line."""
        whole = self.to_json()
        rows = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in whole.pop("targets").items()]
        head = [f"  {json.dumps(k)}: {json.dumps(v)}," for k, v in whole.items()]
        return "\n".join(["{", *head, '  "targets": {', ",\n".join(rows), "  }", "}", ""])

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Write the file, all of it or nothing."""
        from lora_fx.checkpoint.osfile import replacing

        with replacing(fspath(path), force=force) as temporary:
            temporary.write_text(self.text(), encoding="utf-8")

    def __str__(self) -> str:
        """The report for people."""
        rows = [(r.key, str(r.rank), f"{r.alpha:g}", str(r.cost * r.rank)) for r in self.rows]
        lines = table([("key", "rank", "alpha", self.unit), *rows])
        kept = [r.rank for r in self.rows if r.rank]
        lines.append(
            f"{self.method}: {len(kept)} of {len(self.rows)} targets, ranks {min(kept)} to "
            f"{max(kept)}; {self.used} of {self.limit} {self.unit} used "
            f"({self.used / self.limit:.1%})"
        )
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def _plain(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def given_ranks(plan: Any) -> tuple[Mapping[str, Any] | None, str]:
    """(key → rank or {rank, alpha}, what to call it in an error) of what insert takes as plan."""
    if isinstance(plan, Planned):
        return plan.ranks, "the plan"
    if isinstance(plan, (str, PathLike)):
        return read_plan(plan), fspath(plan)
    return plan, "the plan"


def read_plan(path: str | PathLike[str]) -> dict[str, dict[str, Any]]:
    """Key → rank and alpha of a plan file; targets of rank 0 are left out.

    Raises:
        LoraFxError: No such file, no JSON, a field or a value that no plan has.
    """
    where = fspath(path)
    if not Path(where).is_file():
        raise LoraFxError(f"{where}: no such file", "lora-fx plan MODEL DATA -o FILE writes one")
    try:
        data = json.loads(Path(where).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise LoraFxError(f"{where} is no JSON: {one_line(e, 100)}", "write it again") from e
    if not isinstance(data, dict) or not isinstance(data.get("targets"), dict):
        raise LoraFxError(f"{where} is no plan: it has no targets", "lora-fx plan writes one")
    for name, value in data.items():
        if name not in FIELDS:
            raise LoraFxError(f"{where}: no field {name!r} in a plan", near_names(name, [*FIELDS]))
        if not isinstance(value, FIELDS[name]) or isinstance(value, bool):
            kind = FIELDS[name].__name__
            raise LoraFxError(f"{where}: {name} is {value!r}, expected {kind}", "correct the file")
    if data.get("format", FORMAT) != FORMAT or data.get("version", VERSION) != VERSION:
        raise LoraFxError(
            f"{where}: {data.get('format')!r} version {data.get('version')}; this is version "
            f"{VERSION} of {FORMAT!r}",
            "write the plan again",
        )
    found = {key: _entry(where, key, value) for key, value in data["targets"].items()}
    kept = {key: entry for key, entry in found.items() if entry["rank"]}
    if not kept:
        raise LoraFxError(f"{where}: no target has a rank above 0", "there is nothing to adapt")
    return kept


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [k for k, _ in pairs]
        twice = next(k for k in names if names.count(k) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


def _entry(where: str, key: str, value: Any) -> dict[str, Any]:
    given = {"rank": value} if isinstance(value, int) else value
    if not isinstance(given, Mapping) or "rank" not in given or set(given) - {"rank", "alpha"}:
        raise LoraFxError(
            f'{where}: {key!r} is {value!r}; expected {{"rank": 8, "alpha": 16}}',
            "correct the file",
        )
    rank, alpha = given["rank"], given.get("alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
        raise LoraFxError(
            f"{where}: the rank of {key!r} is {rank!r}; expected a whole number from 0 up",
            "correct the file",
        )
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if alpha is not None and not (number and 0 <= alpha < float("inf")):
        raise LoraFxError(
            f"{where}: the alpha of {key!r} is {alpha!r}; expected a number", "correct the file"
        )
    return {"rank": rank, **({} if alpha is None else {"alpha": float(alpha)})}
