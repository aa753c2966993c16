"""The form of a line of language data: text, prompt with completion, or messages."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lora_fx.errors import LoraFxError, one_line
from lora_fx.text import Json, JsonView

FORMS = (("text",), ("prompt", "completion"), ("messages",))
ROLES = ("system", "developer", "user", "assistant", "tool")


def form_of(where: str, row: JsonView) -> tuple[str, ...]:
    """The form of a line; empty if it has none. A complete form is preferred to a part of one.

    Tables of several forms have null for what a row lacks, and some keep a conversation's first
    turn as its prompt.
    """
    filled = {name for name, value in row.items() if value is not None}
    forms = [form for form in FORMS if set(form) <= filled]
    if not forms:
        forms = [form for form in FORMS if set(form) & set(row)]
    if not forms:
        return ()
    if len(forms) > 1:
        raise LoraFxError(
            f"{where} has {' and '.join(map(in_words, forms))}; expected one form",
            "leave one of them out",
        )
    missing = [name for name in forms[0] if name not in row]
    if missing:
        raise LoraFxError(f"{where} has no {missing[0]!r}", f"a line has {in_words(forms[0])}")
    return forms[0]


def in_words(form: tuple[str, ...]) -> str:
    """A form as messages name it: 'prompt' with 'completion'."""
    return " with ".join(map(repr, form))


def text_of(row: Mapping[str, object], name: str, where: str) -> str:
    """The text of a row under a name.

    Raises:
        LoraFxError: It is something else.
    """
    value = row.get(name)
    if isinstance(value, str):
        return value
    hint = "write the text in quotes"
    if isinstance(value, list) and name != "content":
        hint = "put the turns under 'messages'"
    shown = one_line(json.dumps(value, ensure_ascii=False), 60)
    raise LoraFxError(f"{where}: {name!r} is {shown}, expected a text", hint)


def conversation_of(where: str, row: JsonView) -> Json:
    """The checked turns of a line and its tools; null values of a turn are left out."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        shown = one_line(json.dumps(turns, ensure_ascii=False), 60)
        raise LoraFxError(
            f"{where}: 'messages' is {shown}, expected turns",
            "write a list of objects, one for each turn",
        )
    for number, turn in enumerate(turns, 1):
        _check_turn(f"{where}: message {number}", turn)
    messages = [
        {field: value for field, value in turn.items() if value is not None} for turn in turns
    ]
    return {"messages": messages, "tools": row.get("tools")}


def _check_turn(where: str, turn: object) -> None:
    """Raise for a turn without a known role, or without a text where it calls no tools."""
    role = turn.get("role") if isinstance(turn, dict) else None
    if not isinstance(turn, dict) or role not in ROLES:
        raise LoraFxError(
            f"{where} has the role {one_line(repr(role), 60)}, expected one of {', '.join(ROLES)}",
            'a message is {"role": "user", "content": "…"}',
        )
    if not turn.get("tool_calls") or turn.get("content") is not None:
        text_of(turn, "content", where)
