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
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.files.stored_tensors import same_bytes
from lora_fx.text import JsonView

NamedTensors = tuple[str, Tensors, JsonView]
"""A path, for messages, its tensors and its config.json."""


@dataclass(frozen=True)
class Sides:
    """The tensors of both checkpoints, as they are compared.

    Attributes:
        base: The base's tensors; a use that the tuned model tells apart has a name of its own.
        tuned: The tuned model's, likewise.
        table: The table that is the head too, on both sides; empty where there is none, None where
            only its role can tell.
        tie: The tie of the base, else of the tuned model.
        notes: What has to be said.
    """

    base: Tensors
    tuned: Tensors
    table: str | None = None
    tie: Tie | None = None
    notes: tuple[str, ...] = ()


def sides_of(base_side: NamedTensors, tuned_side: NamedTensors) -> Sides:
    """Resolve the ties of both sides.

    Raises:
        LoraFxError: The tuned model has a head of its own, and the base cannot be given one.
    """
    base_path, base_tensors, base_config = base_side
    tuned_path, tuned_tensors, tuned_config = tuned_side
    base = dict(base_tensors)
    tuned = dict(tuned_tensors)
    base_tie = tie_of(base, base_config, tuned)
    tuned_tie = tie_of(tuned, tuned_config, base)
    tie = base_tie or tuned_tie
    if tie is None:
        has_head = any(is_head(name) for name in tuned)
        return Sides(base, tuned, "" if has_head else None)

    _name_uses(
        base, tuned, tie, base_is_tied=base_tie is not None, tuned_is_tied=tuned_tie is not None
    )
    notes = []
    if base_tie and tie.head in base and tie.head not in base_tensors:
        check_scaled(base_tie, base_config, base_path)
        notes.append(
            f"{tie.head}: a separate tensor in {tuned_path}, but tied in {base_path}; lora-fx "
            "merge --untie gives the base a separate one"
        )
    table = ""
    if base_tie is not None and tie.head not in tuned and not _may_have_head(base, tuned, tie):
        table = tie.table
    return Sides(base, tuned, table, base_tie, tuple(notes))


def _name_uses(
    base: dict[str, TensorInfo],
    tuned: dict[str, TensorInfo],
    tie: Tie,
    *,
    base_is_tied: bool,
    tuned_is_tied: bool,
) -> None:
    """Give each use of a tied tensor its own name, if one side stores the uses separately.

    1. A name that one side stores and the other ties stands for the tied tensor there.
    2. A name that is a copy on both sides is left out.
    """
    sources = tie.sources()
    for name, source in sources.items():
        if base_is_tied and name in tuned and name not in base and source in base:
            base[name] = base[source]
        if tuned_is_tied and name in base and name not in tuned and source in tuned:
            tuned[name] = tuned[source]
    copies = [
        name
        for name, source in sources.items()
        if _is_copy(base, name, source) and _is_copy(tuned, name, source)
    ]
    for name in copies:
        del base[name], tuned[name]


def _may_have_head(base: Tensors, tuned: Tensors, tie: Tie) -> bool:
    """Whether a tensor of the tuned model may be its head, if the head's name is unknown."""
    if tie.head:
        return False
    shape = base[tie.table].shape if tie.table in base else None
    return any(name not in base and info.shape == shape for name, info in tuned.items())


def _is_copy(side: Tensors, name: str, source: str) -> bool:
    """True where two names of a side have the same bytes."""
    return name in side and source in side and same_bytes(side[name], side[source])


def check_lookups(sides: Sides, scope: Collection[str], where: str) -> None:
    """Raise if lookups of one table differ in a way that updates cannot express.

    An update of the table acts on all its lookups, so the table cannot have another update.
    """
    tie = sides.tie
    if tie is None:
        return
    differing = next((name for name in tie.lookups if name in scope), None)
    if differing is None:
        return
    message = (
        f"{where}: {differing!r} differs from {tie.table!r}, which is the same tensor in the base"
    )
    if not tie.apart:
        raise LoraFxError(
            message, f"models of this type hold it once; --exclude {differing} leaves it out"
        )
    if tie.table in scope and not same_bytes(sides.base[tie.table], sides.tuned[tie.table]):
        raise LoraFxError(
            f"{message}, and {tie.table!r} has changed as well; an update of the table acts on "
            "all lookups",
            f"if the model does not read that table, --exclude {tie.table} leaves it out",
        )
