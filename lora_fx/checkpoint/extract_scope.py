"""Which tensors of two checkpoints are compared, and the refusal of those that do not fit."""

from __future__ import annotations

from collections.abc import Sequence

from lora_fx.checkpoint.extract_options import ExtractOptions
from lora_fx.errors import LoraFxError, lead_between, one_line
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.targets.plan import select, select_names, split
from lora_fx.targets.target import Found
from lora_fx.text import some

HeaderOf = tuple[str, Tensors]
"""A path, for messages, and its tensors."""


def scope_of(
    found: Found, base: HeaderOf, tuned: HeaderOf, options: ExtractOptions
) -> tuple[list[str], list[str]]:
    """Names to compare, in the order of base, and notes.

    Vectors are in the scope whatever `include` says: which of them differ has to be told.

    Raises:
        LoraFxError: A selector without a match; tensors of one side only, or of two shapes.
    """
    (_, old), (_, new) = base, tuned
    chosen = None if options.include is None else _whole(select(found, options.include))
    gone = _excluded(found, [*old, *(n for n in new if n not in old)], options.exclude or ())

    def wanted(name: str, info: TensorInfo) -> bool:
        return name not in gone and (chosen is None or len(info.shape) < 2 or name in chosen)

    lost = [n for n, t in old.items() if wanted(n, t) and n not in new]
    extra = [n for n, t in new.items() if wanted(n, t) and n not in old]
    shapes = [n for n, t in old.items() if wanted(n, t) and n in new and new[n].shape != t.shape]
    both = [f"{one_line(n, 100)} {list(old[n].shape)} and {list(new[n].shape)}" for n in shapes]
    misfits = (
        ([one_line(n, 100) for n in lost], f"only in {base[0]}"),
        ([one_line(n, 100) for n in extra], f"only in {tuned[0]}"),
        (both, "of two shapes"),
    )
    problems = [f"{len(names)} {what}: {some(names)}" for names, what in misfits if names]
    if problems and not options.allow_missing:
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


def _hint(old: Tensors, new: Tensors) -> str:
    """The prefix that would make the names fit, if there is one."""
    verb, lead = lead_between([*old][:3], new)
    said = f"the names of the second {verb} the prefix {lead!r}"
    return said if verb else "are they of one model?"
