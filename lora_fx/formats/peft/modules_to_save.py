"""Which modules and tensors PEFT saves whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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
    return HEADS.get(task, ()) if isinstance(task, str) else ()


def listed_whole(config: JsonView) -> tuple[str, ...]:
    """The names in modules_to_save, with those that PEFT adds."""
    return tuple(dict.fromkeys((*texts_of(config.get("modules_to_save")), *heads_of(config))))


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
    """Modules that PEFT can save whole, and {key: reason} of the tensors it cannot."""
    holders = {k: k.rpartition(".")[0] for k in full}
    weighty = {holders[k] for k in full if k.endswith(".weight")}
    odd: dict[str, str] = {}
    for key, holder in holders.items():
        clash = next((m for m in sorted(modules) if holder and conflicts(holder, m)), None)
        if clash:
            odd[key] = f"modules_to_save {holder!r} would take the update off {clash!r}"
        elif not holder or holder not in weighty:
            odd[key] = "it is not a module with its weight, and PEFT saves modules whole"
    chosen = sorted({h for k, h in holders.items() if k not in odd})
    # A module inside a saved one is saved with it; listing both makes PEFT wrap it twice.
    return [m for m in chosen if not any(m.startswith(f"{o}.") for o in chosen)], odd


def partly_held(whole: list[str], full: Mapping[str, Full]) -> Iterator[str]:
    """Notes on modules of which the adapter may hold only some tensors."""
    for module in whole:
        leaves = sorted(k.removeprefix(f"{module}.") for k in full if k.startswith(f"{module}."))
        if leaves != ["bias", "weight"]:
            yield (
                f"PEFT will load modules_to_save {module!r} only if the module has no other "
                f"tensors than {', '.join(leaves)}"
            )
