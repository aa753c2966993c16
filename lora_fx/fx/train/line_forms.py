"""The form of a line of language data: text, prompt with completion, or messages."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lora_fx.errors import LoraFxError, one_line
from lora_fx.text import Json, JsonView

FORMS = (("text",), ("prompt", "completion"), ("messages",))


ROLES = ("system", "developer", "user", "assistant", "tool")


def _form(where: str, row: JsonView) -> tuple[str, ...]:
    """The form of a line; empty where it has none. One that is whole stands before parts.

    Tables of several forms have null for what a row lacks, and some keep a conversation's first
    turn as its prompt.
    """
    there = {name for name, value in row.items() if value is not None}
    whole = [form for form in FORMS if set(form) <= there]
    found = whole or [form for form in FORMS if set(form) & set(row)]
    if len(found) > 1:
        raise LoraFxError(
            f"{where} has {' and '.join(map(_named, found))}; expected one form", "leave one out"
        )
    if found and (lost := [name for name in found[0] if name not in row]):
        raise LoraFxError(f"{where} has no {lost[0]!r}", f"a line has {_named(found[0])}")
    return found[0] if found else ()


def _named(form: tuple[str, ...]) -> str:
    return " with ".join(map(repr, form))


def _text(row: Mapping[str, object], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        turns = isinstance(value, list) and name != "content"
        hint = "put turns under 'messages'" if turns else "a text in quotes"
        found = json.dumps(value, ensure_ascii=False)
        raise LoraFxError(f"{where}: {name!r} is {one_line(found, 60)}, expected a text", hint)
    return value


def _conversation(where: str, row: JsonView) -> Json:
    """The turns of a line and its tools, checked; of a turn what is null is left out."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        found = one_line(json.dumps(turns, ensure_ascii=False), 60)
        raise LoraFxError(f"{where}: 'messages' is {found}, expected turns", "a list of objects")
    for i, turn in enumerate(turns, 1):
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in ROLES:
            raise LoraFxError(
                f"{where}: message {i} has the role {one_line(repr(role), 60)}, expected one of "
                f"{', '.join(ROLES)}",
                'a message is {"role": "user", "content": "…"}',
            )
        if not turn.get("tool_calls") or turn.get("content") is not None:
            _text(turn, "content", f"{where}: message {i}")
    plain = [{k: v for k, v in turn.items() if v is not None} for turn in turns]
    return {"messages": plain, "tools": row.get("tools")}
