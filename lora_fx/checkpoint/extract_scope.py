"""Choose the tensors of two checkpoints to compare, and refuse those that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_fx.checkpoint.extract_options import ExtractOptions
from lora_fx.errors import LoraFxError, lead_between, one_line
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.targets.found import Found
from lora_fx.targets.selectors import select, select_names, split
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
    base_path, base_tensors = base
    tuned_path, tuned_tensors = tuned
    chosen: set[str] | None = None
    if options.include is not None:
        chosen = _whole(select(found, options.include))
    only_tuned = [name for name in tuned_tensors if name not in base_tensors]
    excluded = _excluded(found, [*base_tensors, *only_tuned], options.exclude or ())

    def is_compared(name: str, info: TensorInfo) -> bool:
        if name in excluded:
            return False
        return chosen is None or len(info.shape) < 2 or name in chosen

    scope: list[str] = []
    misfits = _Misfits([], [name for name in only_tuned if is_compared(name, tuned_tensors[name])])
    for name, info in base_tensors.items():
        if not is_compared(name, info):
            continue
        if name not in tuned_tensors:
            misfits.only_base.append(name)
        elif tuned_tensors[name].shape != info.shape:
            misfits.reshaped.append(name)
        else:
            scope.append(name)

    problems = misfits.problems(base, tuned)
    if problems and not options.allow_missing:
        hint = (
            "--allow-missing leaves all of them out, --exclude NAMES only those; a resized "
            "vocabulary has no low-rank update"
        )
        if len(misfits.only_base) == len(base_tensors):
            hint = _prefix_hint(base_tensors, tuned_tensors)
        raise LoraFxError(
            f"{tuned_path} does not have the tensors of {base_path}: {'; '.join(problems)}", hint
        )
    return scope, [f"not in the adapter: {problem}" for problem in problems]


@dataclass(frozen=True)
class _Misfits:
    """Names of tensors that cannot be compared.

    Attributes:
        only_base: Those that the tuned model lacks.
        only_tuned: Those that the base lacks.
        reshaped: Those that have two shapes.
    """

    only_base: list[str]
    only_tuned: list[str]
    reshaped: list[str] = field(default_factory=list)

    def problems(self, base: HeaderOf, tuned: HeaderOf) -> list[str]:
        """Each kind of misfit in words."""
        base_path, base_tensors = base
        tuned_path, tuned_tensors = tuned
        problems: list[str] = []
        if self.only_base:
            names = some(_short(self.only_base))
            problems.append(f"{len(self.only_base)} only in {base_path}: {names}")
        if self.only_tuned:
            names = some(_short(self.only_tuned))
            problems.append(f"{len(self.only_tuned)} only in {tuned_path}: {names}")
        if self.reshaped:
            shapes = []
            for name in self.reshaped:
                base_shape = list(base_tensors[name].shape)
                tuned_shape = list(tuned_tensors[name].shape)
                shapes.append(f"{one_line(name, 100)} {base_shape} and {tuned_shape}")
            problems.append(f"{len(self.reshaped)} with different shapes: {some(shapes)}")
        return problems


def _short(names: Sequence[str]) -> list[str]:
    """Shorten names to what one line of an error can hold."""
    return [one_line(name, 100) for name in names]


def _whole(chosen: Sequence[str]) -> set[str]:
    """Selected keys, all of whole tensors; raises for one of a part."""
    for key in chosen:
        if key.endswith("]"):
            raise LoraFxError(
                f"{key!r} is a part of a tensor; expected whole tensors",
                "name the whole tensor; extract does not work with parts, merge and truncate do",
            )
    return set(chosen)


def _excluded(found: Found, names: Sequence[str], exclude: str | Sequence[str]) -> set[str]:
    """Names that a selector matches: as a target, else as any tensor."""
    excluded: set[str] = set()
    for text in split(exclude):
        try:
            excluded |= _whole(select(found, [text]))
        except LoraFxError as error:
            try:
                excluded |= set(select_names(names, [text]))
            except LoraFxError:
                raise error from None
    return excluded


def _prefix_hint(base_tensors: Tensors, tuned_tensors: Tensors) -> str:
    """The prefix that would make the names fit, if there is one."""
    verb, prefix = lead_between([*base_tensors][:3], tuned_tensors)
    if not verb:
        return "check that both are checkpoints of the same model"
    return f"the names in TUNED {verb} the prefix {prefix!r}"
