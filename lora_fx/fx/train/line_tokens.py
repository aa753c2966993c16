"""Tokens of a line of language data, and which of them are trained on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.errors import LoraFxError
from lora_fx.fx.train.chat import ChatTemplate, Rendered
from lora_fx.fx.train.line_forms import _conversation, _text
from lora_fx.text import JsonView

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Encoded = tuple[list[int], list[bool]]
"""Ids, and which of them are trained on."""


GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What marks the assistant's tokens in a chat template."""


def _encoder(
    form: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    path: str,
    rows: Sequence[tuple[str, JsonView]],
) -> tuple[Callable[[str, JsonView, list[str]], Encoded], str]:
    """What encodes a line, and what it trains on, in words."""
    if form != ("messages",):
        what = "every token" if form == ("text",) else "the completions' tokens"
        end = tokenizer.eos_token or ""
        what += "" if end else " (the tokenizer has no end-of-sequence token, and none is added)"
        return partial(_plain, tokenizer, end), what
    try:
        template = tokenizer.get_chat_template()
    except ValueError as e:
        raise LoraFxError(
            f"{folder}: the tokenizer has no chat template, and {path} has 'messages'",
            f"put a chat_template.jinja into {folder}, or write 'prompt' and 'completion'",
        ) from e
    marked = GENERATION.search(template) is not None
    every = "every token, of all roles, since the chat template has no {% generation %}"
    chats = ChatTemplate(template, str(folder), tokenizer.special_tokens_map, marked)
    conversations = {w: _conversation(w, r) for w, r in rows if r.get("messages") is not None}
    encode = partial(_chat, tokenizer, marked, chats.render(conversations))
    return encode, "the assistant's tokens" if marked else every


def _plain(
    tokenizer: PreTrainedTokenizerBase, end: str, where: str, row: JsonView, merged: list[str]
) -> Encoded:
    """A text, or a prompt with its completion."""
    plain = row.get("text") is not None or "prompt" not in row
    prompt = None if plain else _text(row, "prompt", where)
    name = "text" if prompt is None else "completion"
    text = _text(row, name, where)
    if not text:
        raise LoraFxError(f"{where}: the {name} is empty", "leave the line out")
    text += "" if text.endswith(end) else end
    ids: list[int] = tokenizer((prompt or "") + text)["input_ids"]
    before: list[int] = [] if prompt is None else tokenizer(prompt)["input_ids"]
    same = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), None)
    if same is not None:
        merged.append(where)
    start = min(len(before), len(ids)) if same is None else same
    return ids, [i >= start for i in range(len(ids))]


def _chat(
    tokenizer: PreTrainedTokenizerBase,
    marked: bool,
    rendered: Mapping[str, Rendered],
    where: str,
    row: JsonView,
    merged: list[str],
) -> Encoded:
    """A rendered conversation; a token is trained on where a span of the assistant's reaches it."""
    out = tokenizer(rendered[where].text, add_special_tokens=False)
    ids: list[int] = out["input_ids"]
    if not marked:
        return ids, [True] * len(ids)
    if not out.encodings:
        raise LoraFxError(
            f"{where}: the tokenizer does not tell which characters a token is of, and its chat "
            "template marks what the assistant generates",
            "a tokenizer with a tokenizer.json does",
        )
    spans = rendered[where].spans
    places = out.encodings[0].offsets
    return ids, [any(start < b and a < end for a, b in spans) for start, end in places]
