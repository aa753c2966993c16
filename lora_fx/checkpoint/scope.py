"""Which tensors of two checkpoints are compared, and the refusal of those that do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.safetensors import TensorInfo
from lora_fx.targets.found import Found
from lora_fx.targets.selectors import select, select_names, split

Side = tuple[str, Mapping[str, TensorInfo]]
"""A path, for messages, and its tensors."""


def scope_of(
    found: Found,
    base: Side,
    tuned: Side,
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
        f"{len(names)} {what}: {_some(names)}"
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


def _whole(chosen: Mapping[str, str]) -> set[str]:
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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
