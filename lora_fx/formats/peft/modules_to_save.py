"""Decide which modules and tensors PEFT saves whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from lora_fx.adapter.lowrank import Full
from lora_fx.formats.peft.config import texts_of
from lora_fx.regexes import PatternError, matched
from lora_fx.text import JsonView

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""task_type → what PEFT adds to modules_to_save for it: names of which a model has one."""


def heads_of(config: JsonView) -> tuple[str, ...]:
    """The names that PEFT adds to modules_to_save; older files have them in no list."""
    task = config.get("task_type")
    if not isinstance(task, str):
        return ()
    return HEADS.get(task, ())


def listed_whole(config: JsonView) -> tuple[str, ...]:
    """The names in modules_to_save, with those that PEFT adds."""
    listed = texts_of(config.get("modules_to_save"))
    return tuple(dict.fromkeys((*listed, *heads_of(config))))


def saved_whole(config: JsonView, module: str) -> bool:
    """True when modules_to_save lists the module or one around it (PEFT compares endings)."""
    names = listed_whole(config)
    path = module.split(".")
    return any(".".join(path[: i + 1]).endswith(names) for i in range(len(path)))


def conflicts(saved: str, module: str) -> bool:
    """True when PEFT, told to save `saved` whole, leaves out or wraps a low-rank `module`."""
    try:
        return module.endswith(saved) or bool(matched(pattern_around(saved), module))
    except PatternError:  # PEFT takes the name for a pattern, and would fail on this one
        return True


def pattern_around(saved: str) -> str:
    """The pattern by which PEFT takes a module for one in modules_to_save, or inside of one."""
    return rf"(^|.*\.){saved}($|\..*)"


def split_full(full: Mapping[str, Full], modules: set[str]) -> tuple[list[str], dict[str, str]]:
    """Modules that PEFT can save whole, and {key: reason} of the tensors it cannot.

    Args:
        full: Trained tensors by key.
        modules: The modules with low-rank updates, as PEFT compares them.
    """
    module_of = {key: key.rpartition(".")[0] for key in full}
    with_weight = {module_of[key] for key in full if key.endswith(".weight")}
    unsaved: dict[str, str] = {}
    for key, module in module_of.items():
        conflicting = _conflicting(module, modules)
        if conflicting:
            unsaved[key] = (
                f"with modules_to_save {module!r} PEFT would drop the update of {conflicting!r}"
            )
        elif not module or module not in with_weight:
            unsaved[key] = (
                "PEFT saves whole modules, and the adapter does not have the weight of this module"
            )
    saved = sorted({module for key, module in module_of.items() if key not in unsaved})
    # A module inside a saved one is saved with it; listing both makes PEFT wrap it twice.
    outermost = [module for module in saved if not _is_inside(module, saved)]
    return outermost, unsaved


def _conflicting(saved: str, modules: set[str]) -> str:
    """The first module whose update PEFT would drop to save this one; empty where there is none."""
    if not saved:
        return ""
    return next((module for module in sorted(modules) if conflicts(saved, module)), "")


def _is_inside(module: str, modules: Iterable[str]) -> bool:
    return any(module.startswith(f"{outer}.") for outer in modules)


def partly_held(modules: Iterable[str], full: Mapping[str, Full]) -> Iterator[str]:
    """Notes on saved modules of which the adapter may hold only some tensors."""
    for module in modules:
        start = f"{module}."
        leaves = sorted(key.removeprefix(start) for key in full if key.startswith(start))
        if leaves != ["bias", "weight"]:
            yield (
                f"PEFT will load modules_to_save {module!r} only if the module has no tensors "
                f"besides {', '.join(leaves)}"
            )
