"""Protobuf's text format, as far as the config of a model for Triton needs it.

Read without the message's definition, into {field: [values]}: protobuf's own reader cannot skip the
lists of messages, `instance_group [ { … } ]`, of a config that was edited by hand.
"""

from __future__ import annotations

import re
from typing import Any

from lora_fx.errors import LoraFxError

_ORDER = (
    "INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "STRING", "BF16",
)  # fmt: skip
KINDS = {number: f"TYPE_{name}" for number, name in enumerate(_ORDER)}
"""Triton's numbers of dtypes."""

Message = dict[str, list[Any]]
_TOKEN = re.compile(
    r"""(?:\s|\#[^\n]*)*("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|[-+.\w]+|[{}<>\[\]:,;])""", re.S
)
_REST = re.compile(r"(?:\s|#[^\n]*)*")
_ESCAPE = re.compile(rb"\\([0-7]{1,3}|[xX][0-9a-fA-F]{1,2}|.)", re.S)
_SIMPLE = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b", b"f": b"\f"}


def quoted(text: str) -> str:
    r"""A string literal.

    >>> print(quoted('a"b'), quoted("c\nd"))
    "a\"b" "c\012d"
    """
    parts = ("\\" + c if c in '"\\' else c if c >= " " else f"\\{ord(c):03o}" for c in text)
    return f'"{"".join(parts)}"'


def unquoted(literal: str) -> str:
    """The inverse of quoted, for every escape of the format but those of code points."""

    def one(found: re.Match[bytes]) -> bytes:
        code = found[1]
        if code[:1] in b"01234567":
            return bytes([int(code, 8) & 255])
        return bytes([int(code[1:], 16)]) if code[1:] else _SIMPLE.get(code, code)

    return _ESCAPE.sub(one, literal[1:-1].encode()).decode()


class Reader:
    """A text, token by token; `where` is what errors call it."""

    def __init__(self, text: str, where: str) -> None:
        self.where, self.tokens, at = where, [""], 0
        while found := _TOKEN.match(text, at):
            self.tokens.append(found[1])
            at = found.end()
        if _REST.fullmatch(text, at) is None:
            raise self.error(f"after {self.tokens[-1]!r}, line {text.count(chr(10), 0, at) + 1}")
        self.tokens = self.tokens[:0:-1]

    def error(self, what: str) -> LoraFxError:
        """What is wrong with the text."""
        return LoraFxError(f"{self.where}: no ModelConfig: {what}", "write it anew")

    def next(self, *wanted: str) -> str:
        """The next token if it is one of these, else empty."""
        return self.tokens.pop() if self.tokens and self.tokens[-1] in wanted else ""

    def message(self, end: str = "") -> Message:
        """Fields up to `end`, or up to the end of the text.

        Raises:
            LoraFxError: It is not in the format.
        """
        made: Message = {}
        while self.tokens and self.tokens[-1] != end:
            name = self.tokens.pop()
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise self.error(f"{name!r} is no field")
            self.next(":")
            values = made.setdefault(name, [])
            if self.next("["):
                while not self.next("]"):
                    values.append(self.value())
                    self.next(",")
            else:
                values.append(self.value())
            self.next(",", ";")
        if end and not self.next(end):
            raise self.error(f"a {end!r} is missing")
        return made

    def value(self) -> Any:
        """A message, a string, or the text of a number, a name or true and false."""
        if opened := self.next("{", "<"):
            return self.message("}" if opened == "{" else ">")
        if not self.tokens or self.tokens[-1] in "}>]:,;[":
            raise self.error("a value is missing")
        if self.tokens[-1][0] not in "\"'":
            return self.tokens.pop()
        text = ""
        while self.tokens and self.tokens[-1][0] in "\"'":  # literals in a row are one string
            try:
                text += unquoted(self.tokens.pop())
            except UnicodeDecodeError as error:
                raise self.error("a string that is no UTF-8") from error
        return text

    def one(self, message: Message, name: str, default: Any) -> Any:
        """The value of a field that is there once at most."""
        values = message.get(name, [default])
        if len(values) != 1 or isinstance(values[0], dict) != isinstance(default, dict):
            raise self.error(f"{name} is {values}")
        return values[0]

    def numbers(self, message: Message, name: str) -> tuple[int, ...]:
        """The whole numbers of a field."""
        try:
            return tuple(int(v, 0) for v in message.get(name, []))
        except (TypeError, ValueError) as error:
            raise self.error(f"{name} is {message[name]}") from error
