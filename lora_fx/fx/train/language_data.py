"""Data of a causal language model: lines of JSON as ids, attention mask and labels.

A line is one of three forms, and a file has one of them:

======================  ===========================================================================
text                    every token is trained on
prompt, completion      the completion's tokens are
messages                the assistant's, where the chat template marks what it generates; else all
======================  ===========================================================================

The end-of-sequence token follows a text or a completion that does not end in it; a chat template
writes its own. The first token of the completion is the first in which the ids of prompt and
completion together differ from those of the prompt. TRL's SFTTrainer does the same.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from lora_fx.data import LABELS, Table
from lora_fx.data_files import json_rows
from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.load.huggingface import read_tokenizer
from lora_fx.fx.train.chat import ChatTemplate, Rendered
from lora_fx.fx.train.loss import IGNORED
from lora_fx.text import Json, JsonView, some

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Encoded = tuple[list[int], list[bool]]
"""Ids, and which of them are trained on."""
FORMS = (("text",), ("prompt", "completion"), ("messages",))
ROLES = ("system", "developer", "user", "assistant", "tool")
LONGEST = 1024
"""Tokens of a line, where nobody says."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What marks the assistant's tokens in a chat template."""


def language_table(
    path: str, module: nn.Module, folder: Path, max_length: int | None
) -> tuple[Table, list[str]] | None:
    """The table of a .jsonl file, padded on the right, and what has to be said of it.

    Args:
        path: The file.
        module: The model, as transformers builds it.
        folder: Holds config.json and the tokenizer.
        max_length: The most tokens of a line, 1,024 by default; the model's own limit holds too.

    Returns:
        Columns input_ids, attention_mask and labels, int64 [rows, longest], -100 where a label is
        not trained on; None for a file in none of the forms, or a model of another kind.

    Raises:
        LoraFxError: The model is no causal language model, or a line is malformed or has nothing
            to train on: the file and the line are named.
    """
    rows = list(json_rows(path))
    if not rows or not _is_causal(module, folder, path, rows[0][1]):
        return None
    first = _form(*rows[0])
    if not first:
        if not set(rows[0][1]) & set(signature(module.forward).parameters):
            one = f"{rows[0][0]} has {some([repr(n) for n in rows[0][1]], 8) or 'nothing'}"
            forms = ", or ".join(map(_named, FORMS))
            raise LoraFxError(f"{one}; expected {forms}", "give a line's texts one of these names")
        return None
    tokenizer = read_tokenizer(folder)
    encode, what = _encoder(first, tokenizer, folder, path, rows)
    embedding = module.get_input_embeddings()  # type: ignore[operator]
    size = getattr(embedding, "num_embeddings", None)
    merged: list[str] = []
    encoded = []
    for where, row in rows:
        form = _form(where, row)
        if form != first:
            found = _named(form) or "none of the forms"
            one = f"{where} has {found}; the first line has {_named(first)}"
            raise LoraFxError(one, "a file has lines of one form")
        with _no_panic(where, folder):
            ids, trained = encode(where, row, merged)
        if not any(trained[1:]):  # the first token is predicted from nothing
            raise LoraFxError(f"{where}: no token is trained on", "leave the line out")
        if size and (top := max(ids)) >= size:
            raise LoraFxError(
                f"{where}: token {top} ({one_line(repr(tokenizer.decode([top])), 40)}), expected "
                f"ids below {size}, the rows of the model's embedding",
                f"is the tokenizer in {folder} that of this model?",
            )
        encoded.append((ids, trained))
    config: PreTrainedConfig = module.config
    own = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    longest = max_length or LONGEST
    longest = min(longest, own) if own > 0 else longest  # Bloom and Mamba have none, XLNet -1
    table, notes = _padded(path, [w for w, _ in rows], encoded, longest, what)
    if merged:
        notes.append(
            f"{path}: of {len(merged)} lines the last tokens of the prompt differ when the "
            f"completion follows, and are trained on with it: {_lines(merged)}"
        )
    taken = {*first, *(("tools",) if first == ("messages",) else ())}
    if other := sorted({key for _, row in rows for key in row} - taken):
        notes.append(f"{path}: ignored: {some([repr(n) for n in other], 8)}")
    return table, notes


@contextlib.contextmanager
def _no_panic(where: str, folder: Path) -> Iterator[None]:
    """A block in which a panic of the package tokenizers is an error of the line.

    It is no Exception of Python's: a pattern of a tokenizer.json that tries too long ends in one.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise LoraFxError(
            f"{where}: the tokenizer in {folder} fails: {one_line(error, 160)}",
            "is it the tokenizer of this model?",
        ) from error


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


def _lines(wheres: list[str]) -> str:
    numbers = [where.rpartition(" ")[2] for where in wheres]
    return f"line{'s' * (len(numbers) > 1)} {some(numbers, 5)}"


def _is_causal(module: nn.Module, folder: Path, path: str, row: JsonView) -> bool:
    """Whether it predicts next tokens; raises where the data is for such a model alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    kind = type(module).__name__
    if kind in NAMES.values():
        return True
    form = next((form for form in FORMS if set(form) <= set(row)), None)
    if form is None or set(LABELS) & set(row):
        return False
    config: PreTrainedConfig = module.config
    wanted = NAMES.get(config.model_type)
    if not config.architectures and wanted:
        raise LoraFxError(
            f"{folder}/config.json names no architectures, so the model is {kind}, which predicts "
            f"no token, and {path} has {_named(form)}",
            f'add "architectures": ["{wanted}"] to config.json',
        )
    if form != ("text",):
        raise LoraFxError(
            f"{path} has {_named(form)}, and {kind} is no causal language model",
            "such data trains a folder whose architecture is a ...ForCausalLM",
        )
    return False


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


def _padded(
    path: str, wheres: list[str], encoded: list[Encoded], longest: int, what: str
) -> tuple[Table, list[str]]:
    """The columns, of lines that still have a label after they were cut, and notes."""
    kept = [i for i, (_, trained) in enumerate(encoded) if any(trained[1:longest])]
    cut = [w for w, (ids, _) in zip(wheres, encoded, strict=True) if len(ids) > longest]
    gone = sorted(set(range(len(encoded))) - set(kept))
    if not kept:
        raise LoraFxError(
            f"{path}: no line has a token that is trained on among its first {longest}",
            "a larger --max-length",
        )
    width = max(min(longest, len(encoded[i][0])) for i in kept)
    ids = np.zeros((len(kept), width), np.int64)
    mask, labels = np.zeros_like(ids), np.full_like(ids, IGNORED)
    for row, i in enumerate(kept):
        one, trained = (np.asarray(part[:longest]) for part in encoded[i])
        ids[row, : len(one)], mask[row, : len(one)] = one, 1
        labels[row, : len(one)] = np.where(trained, one, IGNORED)
    counted, every = int((labels[:, 1:] != IGNORED).sum()), int(mask.sum())
    notes = [f"{path}: trained on {what}: {counted:,} of {every:,} tokens in {len(kept):,} lines"]
    if cut:
        notes.append(f"{path}: cut to {longest} tokens: {len(cut)} of {len(wheres)} lines")
    if gone:
        notes.append(
            f"{path}: left out, since none of their first {longest} tokens is trained on: "
            f"{len(gone)} of {len(wheres)} lines ({_lines([wheres[i] for i in gone])})"
        )
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return Table(columns, "labels"), notes
