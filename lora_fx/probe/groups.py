"""Groups of an adapter's targets: those of one role, in one part of the depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora_fx.targets.target import Target

MOST_GROUPS = 16
"""The largest number of groups that a probe has for an adapter."""
PARTS: Sequence[Sequence[str]] = (
    (", first third", ", middle third", ", last third"),
    (", first half", ", second half"),
    ("",),
)
"""The names of the parts of a depth, for three parts, two and one."""


def groups_of(targets: Iterable[Target], most: int = MOST_GROUPS) -> dict[str, list[str]]:
    """Return the keys of each group by its name, such as "q, first third".

    A target without a role is grouped by its op. Of three parts of the depth, two and one, the
    first is taken that makes no more than `most` groups. Where there are more roles than that,
    the thirds of all targets are the groups.

    Args:
        targets: In the order of the model.
        most: The largest number of groups, 3 or more.
    """
    all_targets = list(targets)
    by_role: dict[str, list[str]] = {}
    for target in all_targets:
        by_role.setdefault(target.role or target.op, []).append(target.key)

    for parts in PARTS:
        groups: dict[str, list[str]] = {}
        for role, keys in by_role.items():
            groups |= _split(role, keys, parts)
        if len(groups) <= most:
            return groups
    return _split("all", [target.key for target in all_targets], PARTS[0])


def _split(name: str, keys: Sequence[str], parts: Sequence[str]) -> dict[str, list[str]]:
    """Return consecutive parts of the keys by name; one part where there are fewer keys."""
    if len(keys) < len(parts):
        return {name: list(keys)}
    groups: dict[str, list[str]] = {}
    for number, key in enumerate(keys):
        part = parts[number * len(parts) // len(keys)]
        groups.setdefault(f"{name}{part}", []).append(key)
    return groups
