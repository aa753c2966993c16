"""The two sides of an extraction under the same names, where either is tied.

A tied file holds its table once, an untied one once for each use. What is one tensor on both
sides is compared once; what is two on either side gets an update for each, so that the adapter
says of every use what the tuned model has there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from lora_fx.checkpoint.tied_names import Tie, is_head
from lora_fx.checkpoint.tied_uses import check_scaled, tie_of
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import Tensors, same_bytes
from lora_fx.text import JsonView

NamedTensors = tuple[str, Tensors, JsonView]
"""A path, for messages, its tensors and its config.json."""


@dataclass(frozen=True)
class Sides:
    """What is compared.

    Attributes:
        old: The base's tensors; a use that the tuned model tells apart has a name of its own.
        new: The tuned model's, likewise.
        table: The table that is the head too, on both sides; empty where there is none, None where
            only its role can tell.
        tie: The tie of the base, else of the tuned model.
        notes: What has to be said.
    """

    old: Tensors
    new: Tensors
    table: str | None = None
    tie: Tie | None = None
    notes: tuple[str, ...] = ()


def sides_of(base: NamedTensors, tuned: NamedTensors) -> Sides:
    """Both sides with their ties resolved.

    Raises:
        LoraFxError: The tuned model has a head of its own, and the base cannot be given one.
    """
    old, new = dict(base[1]), dict(tuned[1])
    first, second = tie_of(old, base[2], new), tie_of(new, tuned[2], old)
    tie = first or second
    if tie is None:
        return Sides(old, new, "" if any(is_head(n) for n in new) else None)
    sources = tie.sources()
    for name, source in sources.items():
        if first and name in new and name not in old and source in old:
            old[name] = old[source]
        if second and name in old and name not in new and source in new:
            new[name] = new[source]
    copies = [n for n, s in sources.items() if _copy(old, n, s) and _copy(new, n, s)]
    for name in copies:
        del old[name], new[name]
    shape = old[tie.table].shape if tie.table in old else None
    unknown = not tie.head and any(n not in old and t.shape == shape for n, t in new.items())
    notes = []
    if first and tie.head in old and tie.head not in base[1]:
        check_scaled(first, base[2], base[0])
        notes.append(
            f"{tie.head}: a tensor of its own in {tuned[0]}, tied in {base[0]}: lora-fx merge "
            "--untie gives the base one"
        )
    one = first is not None and tie.head not in new and not unknown
    return Sides(old, new, tie.table if one else "", first, tuple(notes))


def _copy(side: Tensors, name: str, source: str) -> bool:
    """True where two names of a side have the same bytes."""
    return name in side and source in side and same_bytes(side[name], side[source])


def check_lookups(sides: Sides, scope: Collection[str], where: str) -> None:
    """Raise where lookups of one table differ, and updates of it cannot say how.

    An update of the table is one of all its lookups, so it has none of its own beside theirs.
    """
    tie = sides.tie
    own = [n for n in tie.lookups if n in scope] if tie is not None else []
    if tie is None or not own:
        return
    said = f"{where}: {own[0]!r} differs from {tie.table!r}, which is the same tensor in the base"
    if not tie.apart:
        raise LoraFxError(said, f"such models hold it once; --exclude {own[0]} leaves it out")
    if tie.table in scope and not same_bytes(sides.old[tie.table], sides.new[tie.table]):
        raise LoraFxError(
            f"{said}, and {tie.table!r} has changed as well: an update of it acts on all lookups",
            f"--exclude {tie.table} leaves it out, if the model looks nothing up in it",
        )
