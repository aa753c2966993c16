"""Which tensors of two checkpoints are compared, and the refusal of those that do not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lora_fx.checkpoint.difference import same_bytes
from lora_fx.checkpoint.model_families import is_head
from lora_fx.checkpoint.tied import Tie, check_scaled, tie_of
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.safetensors import TensorInfo
from lora_fx.targets.found import Found
from lora_fx.targets.selectors import select, select_names, split
from lora_fx.text import JsonView, some

HeaderOf = tuple[str, Mapping[str, TensorInfo]]
"""A path, for messages, and its tensors."""


def scope_of(
    found: Found,
    base: HeaderOf,
    tuned: HeaderOf,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    allow_missing: bool,
) -> tuple[list[str], list[str]]:
    """Names to compare, in the order of base, and notes.

    Vectors are in the scope whatever `include` says: which of them differ has to be told.

    Raises:
        LoraFxError: A selector without a match; tensors of one side only, or of two shapes.
    """
    (_, old), (_, new) = base, tuned
    chosen = None if include is None else _whole(select(found, include))
    gone = _excluded(found, [*old, *(n for n in new if n not in old)], exclude or ())

    def wanted(name: str, info: TensorInfo) -> bool:
        return name not in gone and (chosen is None or len(info.shape) < 2 or name in chosen)

    lost = [n for n, t in old.items() if wanted(n, t) and n not in new]
    extra = [n for n, t in new.items() if wanted(n, t) and n not in old]
    shapes = [n for n, t in old.items() if wanted(n, t) and n in new and new[n].shape != t.shape]
    problems = [
        f"{len(names)} {what}: {some(names)}"
        for names, what in (
            ([_name(n) for n in lost], f"only in {base[0]}"),
            ([_name(n) for n in extra], f"only in {tuned[0]}"),
            (
                [f"{_name(n)} {list(old[n].shape)} and {list(new[n].shape)}" for n in shapes],
                "of two shapes",
            ),
        )
        if names
    ]
    if problems and not allow_missing:
        raise LoraFxError(
            f"{tuned[0]} does not have the tensors of {base[0]}: {'; '.join(problems)}",
            _hint(old, new)
            if len(lost) == len(old)
            else "--allow-missing leaves them out, and "
            "--exclude those that it names; a grown vocabulary has no low-rank update",
        )
    bad = {*lost, *shapes}
    notes = [f"not in the adapter: {text}" for text in problems]
    return [n for n, t in old.items() if wanted(n, t) and n not in bad], notes


def _whole(chosen: Sequence[str]) -> set[str]:
    region = next((k for k in chosen if k.endswith("]")), None)
    if region is not None:
        raise LoraFxError(
            f"{region!r} is a part of a tensor; expected whole tensors",
            "name the tensor; merge and truncate work with parts, extract does not",
        )
    return set(chosen)


def _excluded(found: Found, names: Sequence[str], exclude: str | Sequence[str]) -> set[str]:
    """Names that a selector matches: as a target, else as any tensor."""
    gone: set[str] = set()
    for text in split(exclude):
        try:
            gone |= _whole(select(found, [text]))
        except LoraFxError as e:
            try:
                gone |= set(select_names(names, [text]))
            except LoraFxError:
                raise e from None
    return gone


def _hint(old: Mapping[str, TensorInfo], new: Mapping[str, TensorInfo]) -> str:
    """The prefix that would make the names fit, if there is one."""
    for name in list(old)[:3]:
        for other in new:
            for long, short, verb in ((name, other, "lacks"), (other, name, "adds")):
                if long.endswith(f".{short}"):
                    lead = long.removesuffix(short)
                    return f"the names of the second {verb.removesuffix('s')} the prefix {lead!r}"
    return "are they of one model?"


def _name(name: str) -> str:
    return one_line(name, 100)


# The two sides of an extraction under the same names, where either is tied.
#
# A tied file holds its table once, an untied one once for each use. What is one tensor on both
# sides is compared once; what is two on either side gets an update for each, so that the adapter
# says of every use what the tuned model has there.


Tensors = Mapping[str, TensorInfo]
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
        tie: Of the base, else of the tuned model.
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
