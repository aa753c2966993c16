"""A plan file: the rank of every target, in JSON that people read and edit.

    {"format": "lora-fx plan", "version": 1, "model": …, "method": …, "budget": …, "unit": …,
     "limit": …, "used": …, "examples": …, "targets": {KEY: {"rank": 3, "alpha": 6}, …}}

`targets` are what `insert` and `train` take; a target of rank 0 is left out. The other fields say
where the ranks come from, and may be missing in a file that was written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from os import PathLike, fspath

from lora_fx.errors import LoraFxError, check_format, expect_file
from lora_fx.files.strict_json import read_json
from lora_fx.text import Json, JsonView, is_number, is_whole, near, plain_number, table

FORMAT = "lora-fx plan"


FIELDS = {
    "format": str, "version": int, "model": str, "method": str, "budget": str, "unit": str,
    "limit": int, "used": int, "examples": int, "targets": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Ranked:
    """A target's rank and alpha, and the cost of one rank."""

    key: str
    rank: int
    alpha: float
    cost: int


@dataclass(frozen=True)
class RankPlan:
    """Ranks that were chosen for a budget.

    Attributes:
        rows: One for each target, with rank 0 where it is left out.
        method: A name of lora_fx.targets.rank_methods.
        budget: The text of the budget.
        unit: The unit of costs: params or flops.
        limit: The budget in its unit.
        model: The path of the model; empty for a module.
        examples: How many examples calibration read.
        notes: Sentences on the plan for the user.
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
        """The part of the limit that these ranks use."""
        return sum(row.cost * row.rank for row in self.rows)

    @property
    def ranks(self) -> dict[str, Json]:
        """Key → rank and alpha, in the form of a plan for insert."""
        return {row.key: {"rank": row.rank, "alpha": row.alpha} for row in self.rows if row.rank}

    def to_json(self) -> Json:
        """The plan file as an object."""
        targets = {
            row.key: {"rank": row.rank, "alpha": plain_number(row.alpha)} for row in self.rows
        }
        # `version` is the number of the format; `format` was taken before it was a rule
        return {
            "format": FORMAT,
            "version": 1,
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
        """Return the file's text, one line for each target."""
        fields = self.to_json()
        targets = fields.pop("targets")
        field_lines = [f"  {json.dumps(name)}: {json.dumps(fields[name])}," for name in fields]
        target_lines = [f"    {json.dumps(key)}: {json.dumps(targets[key])}" for key in targets]
        lines = ["{", *field_lines, '  "targets": {', ",\n".join(target_lines), "  }", "}", ""]
        return "\n".join(lines)

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Write the file atomically."""
        from lora_fx.files.atomic import replacing

        with replacing(fspath(path), force=force) as temporary:
            temporary.write_text(self.text(), encoding="utf-8")

    def __str__(self) -> str:
        """A table for people: key, rank, alpha and cost."""
        rows: list[tuple[str, ...]] = [("key", "rank", "alpha", self.unit)]
        for row in self.rows:
            rows.append((row.key, str(row.rank), f"{row.alpha:g}", str(row.cost * row.rank)))
        lines = table(rows)
        ranks = [row.rank for row in self.rows if row.rank]
        span = f"rank {min(ranks)}"
        if min(ranks) < max(ranks):
            span = f"ranks {min(ranks)} to {max(ranks)}"
        lines.append(
            f"{self.method}: {len(ranks)} of {len(self.rows)} targets, {span}; "
            f"{self.used} of {self.limit} {self.unit} used ({self.used / self.limit:.1%})"
        )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


GivenRanks = RankPlan | str | PathLike[str] | JsonView
"""A plan for insert: key → rank or {rank, alpha}, or the path of a plan file."""


def given_ranks(plan: GivenRanks | None) -> tuple[JsonView | None, str]:
    """Read the plan that was given to insert.

    Returns:
        Key → rank or {rank, alpha}, or None for no plan; and how errors call the plan.
    """
    if isinstance(plan, RankPlan):
        return plan.ranks, "the plan"
    if isinstance(plan, (str, PathLike)):
        return read_plan(plan), fspath(plan)
    if plan is None:
        return None, "the plan"
    if not isinstance(plan, Mapping):
        raise LoraFxError(
            f"the plan has the type {type(plan).__name__}; expected {{key: rank}}, the path of a "
            "plan file, or the result of lora_fx.plan",
            OWN_PLAN,
        )
    return {key: _row_of(key, value) for key, value in plan.items()}, "the plan"


OWN_PLAN = "pass {'fc.weight': 8} or {'fc.weight': {'rank': 8, 'alpha': 16}}, for example"


def _row_of(key: str, value: object) -> Json:
    """Return the rank and alpha of a key in a Python plan; numpy numbers are accepted.

    Raises:
        LoraFxError: The rank is not a whole number, or alpha is not a number.
    """
    row = value if isinstance(value, Mapping) else {"rank": value}
    unknown_names = sorted(set(row) - {"rank", "alpha"})
    if unknown_names:
        name = unknown_names[0]
        raise LoraFxError(f"the plan has an unknown field {name!r} for {key!r}", OWN_PLAN)

    checked: Json = {}
    if "rank" in row:
        rank = row["rank"]
        if not isinstance(rank, Integral) or isinstance(rank, bool):
            raise LoraFxError(
                f"the plan: the rank of {key!r} is {_shown(rank)}; expected a whole number",
                OWN_PLAN,
            )
        checked["rank"] = int(rank)
    alpha = row.get("alpha")
    if alpha is not None:
        if not isinstance(alpha, Real) or isinstance(alpha, bool):
            raise LoraFxError(
                f"the plan: the alpha of {key!r} is {_shown(alpha)}; expected a number", OWN_PLAN
            )
        checked["alpha"] = float(alpha)
    return checked


def _shown(value: object) -> str:
    """Return a short value as Python writes it; for other values the name of the class."""
    if value is None or isinstance(value, (str, int, float)):
        return repr(value)
    return f"of type {type(value).__name__}"


def read_plan(path: str | PathLike[str]) -> dict[str, Json]:
    """Return key → rank and alpha of a plan file, without targets of rank 0.

    Raises:
        LoraFxError: No such file, not JSON, or a field or value that a plan does not have.
    """
    where = fspath(path)
    expect_file(where, "write one with lora-fx plan MODEL DATA -o FILE")
    data = read_json(where, hint="write it again")
    if not isinstance(data.get("targets"), dict):
        raise LoraFxError(
            f"{where} is not a plan: it has no targets", "write one with lora-fx plan"
        )
    _check_fields(data, where)
    rows = {key: _entry(where, key, value) for key, value in data["targets"].items()}
    rows = {key: row for key, row in rows.items() if row["rank"]}
    if not rows:
        raise LoraFxError(
            f"{where}: no target has a rank above 0", "give at least one target a rank above 0"
        )
    return rows


def _check_fields(data: JsonView, where: str) -> None:
    """Raise for an unknown field, a value of another type, or a file of a later version."""
    for name, value in data.items():
        if name not in FIELDS:
            raise LoraFxError(f"{where}: unknown field {name!r} in the plan", near(name, FIELDS))
        if not isinstance(value, FIELDS[name]) or isinstance(value, bool):
            kind = FIELDS[name].__name__
            raise LoraFxError(f"{where}: {name} is {value!r}; expected {kind}", "correct the file")
    if data.get("format", FORMAT) != FORMAT:
        raise LoraFxError(
            f"{where}: a file of {data['format']!r}; expected {FORMAT!r}", "write the plan again"
        )
    check_format({"format": data.get("version", 1)}, where)


def _entry(where: str, key: str, value: object) -> Json:
    """Return the rank and alpha of a key in a plan file; raise LoraFxError for anything else."""

    def wrong(what: str) -> LoraFxError:
        return LoraFxError(f"{where}: {what}", "correct the file")

    row = {"rank": value} if isinstance(value, int) else value
    if not isinstance(row, Mapping) or "rank" not in row or set(row) - {"rank", "alpha"}:
        raise wrong(f'{key!r} is {value!r}; expected {{"rank": 8, "alpha": 16}}')
    rank = row["rank"]
    if not is_whole(rank) or rank < 0:
        raise wrong(f"the rank of {key!r} is {rank!r}; expected a whole number of 0 or more")
    alpha = row.get("alpha")
    if alpha is None:
        return {"rank": rank}
    if not is_number(alpha) or not 0 <= alpha < float("inf"):
        raise wrong(f"the alpha of {key!r} is {alpha!r}; expected a number")
    return {"rank": rank, "alpha": float(alpha)}
