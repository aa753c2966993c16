"""Do the tensors of a file fit a model? Names and shapes, without reading a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.safetensors import FLOATING, TensorInfo


def check_fit(
    found: Mapping[str, TensorInfo],
    wanted: Mapping[str, tuple[tuple[int, ...], str]],
    ties: Mapping[str, str],
    where: str,
    optional: Iterable[str] = (),
) -> tuple[str, ...]:
    """Check that `found` is the whole of `wanted` and nothing else.

    Args:
        found: The tensors of the file.
        wanted: Name → (shape, dtype) of the model; tied tensors under every name.
        ties: Every name → the first name of the same tensor; one of them is enough.
        where: The file, for messages.
        optional: Names that may be missing.

    Returns:
        What the dtypes will change: one note for each pair of dtypes that differ.

    Raises:
        LoraFxError: Missing and unexpected names and shapes that differ, all in one line.
    """
    here = {ties.get(name, name) for name in found}
    missing = [n for n in wanted if ties.get(n, n) not in here and n not in set(optional)]
    unexpected = [n for n in found if n not in wanted]
    shared = [(n, found[n], wanted[n]) for n in found if n in wanted]
    shapes = [
        f"{n} {list(t.shape)} (expected {list(w[0])})" for n, t, w in shared if t.shape != w[0]
    ]
    kinds = [
        f"{n} {t.dtype} (expected {w[1]})"
        for n, t, w in shared
        if t.dtype != w[1] and not (t.dtype in FLOATING and w[1] in FLOATING)
    ]
    problems = [
        f"{len(names)} {what}: {_some(names)}"
        for names, what in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (shapes, "of another shape"),
            (kinds, "of another kind"),
        )
        if names
    ]
    if problems:
        raise LoraFxError(
            f"{where} does not fit the model: {'; '.join(problems)}", _hint(here, wanted)
        )
    casts: dict[tuple[str, str], list[str]] = {}
    for name, t, (_, dtype) in shared:
        if t.dtype != dtype:
            casts.setdefault((t.dtype, dtype), []).append(name)
    return tuple(f"{where}: cast from {a} to {b}: {_some(n)}" for (a, b), n in casts.items())


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(one_line(n, 100) for n in names[:3]) + rest


def _hint(here: set[str], wanted: Mapping[str, object]) -> str:
    """What to do, with the prefix that would make the names fit, if there is one."""
    for name in wanted:
        for other in here:
            for long, short, verb in ((name, other, "lacks"), (other, name, "adds")):
                if long != short and long.endswith(f".{short}"):
                    return f"the file's names {verb} the prefix {long.removesuffix(short)!r}"
    return "is it the state_dict of this very model?"
