"""The data of a causal language model: lines of JSON as ids, attention mask and labels.

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
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from lora_fx.data import LABELS, Table
from lora_fx.data_files import json_rows
from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.load.folder_tokenizer import read_tokenizer
from lora_fx.fx.train.line_forms import FORMS, form_of, in_words
from lora_fx.fx.train.line_tokens import encoder
from lora_fx.fx.train.loss import IGNORED
from lora_fx.run_defaults import CAUSAL
from lora_fx.text import JsonView, some

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def language_table(
    path: str, module: nn.Module, folder: Path, max_length: int | None
) -> tuple[Table, list[str]] | None:
    """Read a .jsonl file as a table, padded on the right; return notes too.

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
    form = form_of(*rows[0])
    if not form:
        _refuse_no_argument(module, *rows[0])
        return None

    tokenizer = read_tokenizer(folder)
    encode, what = encoder(form, tokenizer, folder, path, rows)
    embedding = module.get_input_embeddings()  # type: ignore[operator]
    size = getattr(embedding, "num_embeddings", None)
    merged: list[str] = []
    lines = []
    for where, row in rows:
        _refuse_other_form(where, form_of(where, row), form)
        with _no_panic(where, folder):
            ids, trained = encode(where, row, merged)
        if not any(trained[1:]):  # the first token is predicted from nothing
            raise LoraFxError(f"{where}: it has no token to train on", "leave the line out")
        if size:
            _refuse_unknown_token(where, ids, size, tokenizer, folder)
        lines.append(_Line(where, ids, trained))

    table, notes = _padded(path, lines, _longest(module, max_length), what)
    if merged:
        notes.append(
            f"{path}: in {len(merged)} lines the last tokens of the prompt change when the "
            f"completion follows, so they are trained on too: {_lines(merged)}"
        )
    used = {*form, "tools"} if form == ("messages",) else set(form)
    columns: set[str] = set().union(*(row for _, row in rows))
    ignored = sorted(columns - used)
    if ignored:
        notes.append(
            f"{path}: these columns are ignored: {some([repr(name) for name in ignored], 8)}"
        )
    return table, notes


@dataclass(frozen=True)
class _Line:
    """A line of the file: its place, its ids, and which ids are trained on."""

    where: str
    ids: list[int]
    trained: list[bool]


def _refuse_no_argument(module: nn.Module, where: str, row: JsonView) -> None:
    """Raise for a line that has no known form and no argument of the model."""
    if set(row) & set(signature(module.forward).parameters):
        return
    names = some([repr(name) for name in row], 8) or "nothing"
    forms = ", or ".join(map(in_words, FORMS))
    raise LoraFxError(
        f"{where} has {names}; expected {forms}", "give a line's texts one of these names"
    )


def _refuse_other_form(where: str, form: tuple[str, ...], first: tuple[str, ...]) -> None:
    if form != first:
        words = in_words(form) or "none of the forms"
        raise LoraFxError(
            f"{where} has {words}; the first line has {in_words(first)}",
            "use one form in the whole file",
        )


def _refuse_unknown_token(
    where: str, ids: list[int], size: int, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Raise for an id that has no row in the model's embedding of `size` rows."""
    top = max(ids)
    if top >= size:
        raise LoraFxError(
            f"{where}: token {top} ({one_line(repr(tokenizer.decode([top])), 40)}); expected "
            f"ids below {size}, the rows of the model's embedding",
            f"check that {folder} holds the tokenizer of this model",
        )


def _longest(module: nn.Module, max_length: int | None) -> int:
    """Return the most tokens of a line: the option's or the default, within the model's limit."""
    config: PreTrainedConfig = module.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    longest = max_length or CAUSAL.longest
    if limit > 0:  # Bloom and Mamba have none, XLNet -1
        return min(longest, limit)
    return longest


@contextlib.contextmanager
def _no_panic(where: str, folder: Path) -> Iterator[None]:
    """A block in which a panic of the tokenizers package becomes an error for the line.

    A panic is not a Python Exception; a pattern in tokenizer.json that runs too long causes one.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise LoraFxError(
            f"{where}: the tokenizer in {folder} failed: {one_line(error, 160)}",
            "check that it is the tokenizer of this model",
        ) from error


def _lines(wheres: list[str]) -> str:
    numbers = [where.rpartition(" ")[2] for where in wheres]
    return f"line{'s' * (len(numbers) > 1)} {some(numbers, 5)}"


def is_causal(module: nn.Module) -> bool:
    """Whether the model's class is one of transformers that predicts next tokens."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return type(module).__name__ in NAMES.values()


def _is_causal(module: nn.Module, folder: Path, path: str, row: JsonView) -> bool:
    """Whether the model predicts next tokens; raise if the data needs such a model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    if is_causal(module):
        return True
    kind = type(module).__name__
    form = next((form for form in FORMS if set(form) <= set(row)), None)
    if form is None or set(LABELS) & set(row):
        return False
    config: PreTrainedConfig = module.config
    causal_class = NAMES.get(config.model_type)
    if not config.architectures and causal_class:
        raise LoraFxError(
            f"{folder}/config.json names no architectures, so the model is {kind}, which predicts "
            f"no next token, but {path} has {in_words(form)}",
            f'add "architectures": ["{causal_class}"] to config.json',
        )
    if form != ("text",):
        raise LoraFxError(
            f"{path} has {in_words(form)}, but {kind} is not a causal language model",
            "use such data for a folder whose architecture is a ...ForCausalLM",
        )
    return False


def _padded(path: str, lines: list[_Line], longest: int, what: str) -> tuple[Table, list[str]]:
    """Return the columns of all lines with a label after cutting, and notes."""
    labelled = [line for line in lines if any(line.trained[1:longest])]
    if not labelled:
        raise LoraFxError(
            f"{path}: no line has a token to train on among its first {longest}",
            "raise --max-length",
        )
    width = max(min(longest, len(line.ids)) for line in labelled)
    ids = np.zeros((len(labelled), width), np.int64)
    mask = np.zeros_like(ids)
    labels = np.full_like(ids, IGNORED)
    for row, line in enumerate(labelled):
        line_ids = np.asarray(line.ids[:longest])
        trained = np.asarray(line.trained[:longest])
        count = len(line_ids)
        ids[row, :count] = line_ids
        mask[row, :count] = 1
        labels[row, :count] = np.where(trained, line_ids, IGNORED)

    counted = int((labels[:, 1:] != IGNORED).sum())
    total = int(mask.sum())
    notes = [
        f"{path}: trained on {what}: {counted:,} of {total:,} tokens in {len(labelled):,} lines"
    ]
    cut = [line for line in lines if len(line.ids) > longest]
    if cut:
        notes.append(f"{path}: cut to {longest} tokens: {len(cut)} of {len(lines)} lines")
    unlabelled = [line.where for line in lines if not any(line.trained[1:longest])]
    if unlabelled:
        notes.append(
            f"{path}: left out, since none of their first {longest} tokens is trained on: "
            f"{len(unlabelled)} of {len(lines)} lines ({_lines(unlabelled)})"
        )
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return Table(columns, "labels"), notes
