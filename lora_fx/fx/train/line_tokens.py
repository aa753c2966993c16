"""Tokens of a line of language data, and which of them are trained on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.errors import LoraFxError
from lora_fx.fx.train.chat import ChatTemplate, Rendered
from lora_fx.fx.train.line_forms import conversation_of, text_of
from lora_fx.text import JsonView

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Encoded = tuple[list[int], list[bool]]
"""Ids, and which of them are trained on."""


GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The mark of the assistant's tokens in a chat template."""


Encode = Callable[[str, JsonView, list[str]], Encoded]
"""Encodes a line: (its place, the line, the places of lines with merged tokens)."""


def encoder(
    form: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    path: str,
    rows: Sequence[tuple[str, JsonView]],
) -> tuple[Encode, str]:
    """The function that encodes a line, and a text on which tokens it trains."""
    if form != ("messages",):
        what = "every token" if form == ("text",) else "the completions' tokens"
        end = tokenizer.eos_token or ""
        if not end:
            what += " (the tokenizer has no end-of-sequence token, so none is added)"
        return partial(_plain, tokenizer, end), what
    try:
        template = tokenizer.get_chat_template()
    except ValueError as e:
        raise LoraFxError(
            f"{folder}: the tokenizer has no chat template, but {path} has 'messages'",
            f"put a chat_template.jinja into {folder}, or write 'prompt' and 'completion'",
        ) from e
    is_marked = GENERATION.search(template) is not None
    what = "every token, of all roles, since the chat template has no {% generation %}"
    if is_marked:
        what = "the assistant's tokens"
    chats = ChatTemplate(template, str(folder), tokenizer.special_tokens_map, is_marked)
    conversations = {
        where: conversation_of(where, row) for where, row in rows if row.get("messages") is not None
    }
    return partial(_chat, tokenizer, is_marked, chats.render(conversations)), what


def _plain(
    tokenizer: PreTrainedTokenizerBase, end: str, where: str, row: JsonView, merged: list[str]
) -> Encoded:
    """A text, or a prompt with its completion."""
    is_text = row.get("text") is not None or "prompt" not in row
    prompt = "" if is_text else text_of(row, "prompt", where)
    name = "text" if is_text else "completion"
    text = text_of(row, name, where)
    if not text:
        raise LoraFxError(f"{where}: the {name} is empty", "leave the line out")
    if not text.endswith(end):
        text += end
    ids: list[int] = tokenizer(prompt + text)["input_ids"]
    if is_text:
        return ids, [True] * len(ids)

    prompt_ids: list[int] = tokenizer(prompt)["input_ids"]
    start = min(len(prompt_ids), len(ids))
    for i, (alone, followed) in enumerate(zip(prompt_ids, ids, strict=False)):
        if alone != followed:
            merged.append(where)
            start = i
            break
    return ids, [i >= start for i in range(len(ids))]


def _chat(
    tokenizer: PreTrainedTokenizerBase,
    is_marked: bool,
    rendered: Mapping[str, Rendered],
    where: str,
    row: JsonView,
    merged: list[str],
) -> Encoded:
    """A rendered conversation; a token is trained on where a span of the assistant's reaches it."""
    out = tokenizer(rendered[where].text, add_special_tokens=False)
    ids: list[int] = out["input_ids"]
    if not is_marked:
        return ids, [True] * len(ids)
    if not out.encodings:
        raise LoraFxError(
            f"{where}: the chat template marks what the assistant generates, but the tokenizer "
            "does not report which characters a token covers",
            "use a tokenizer with a tokenizer.json",
        )
    spans = rendered[where].spans
    trained = []
    for start, end in out.encodings[0].offsets:
        is_generated = any(start < stop and first < end for first, stop in spans)
        trained.append(is_generated)
    return ids, trained
