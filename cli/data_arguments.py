"""Reads DATA arguments, --inputs and --loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fx.cli.output import note
from lora_fx.errors import LoraFxError
from lora_fx.progress import stage
from lora_fx.text import Json, JsonView, some

if TYPE_CHECKING:
    from lora_fx.cli.train_options import ExampleOptions
    from lora_fx.data import Buckets, Table
    from lora_fx.fx.capture.capture import Captured
    from lora_fx.fx.train.loss import Loss
    from lora_fx.run_defaults import RunDefaults


BATCH = 32
"""The number of examples that run at a time."""


def load_npz(path: str | None) -> Json:
    """Load the arrays of an --inputs file by name; return no arrays without a file."""
    from lora_fx.data_files import read_npz

    if not path:
        return {}
    return read_npz(path)


@stage("reading the data")
def training_data(path: str, cap: Captured, label: str, max_length: int | None = None) -> Table:
    """Read DATA as inputs of a model; the model's own tokenizer tokenises texts."""
    from lora_fx.data import training_table
    from lora_fx.fx.load.factory import call_function
    from lora_fx.fx.load.folder_tokenizer import tokenizer_of
    from lora_fx.fx.train.language_data import language_table
    from lora_fx.passes.verbs.open import user_module
    from lora_fx.run_defaults import OTHERS

    folder = cap.tokenizer_folder
    if max_length and folder is None:
        raise LoraFxError(
            "--max-length has no effect for a model without a tokenizer", "leave it out"
        )
    if folder and not label and path.endswith(".jsonl") and Path(path).is_file():
        examples = language_table(path, user_module(cap), folder, max_length)
        if examples is not None:
            table, notes = examples
            note(*notes)
            return table

    tokenizer = None
    if folder is not None:
        tokenizer = Texts(tokenizer_of(folder, max_length or OTHERS.longest))
    table = training_table(path, cap.inputs.names, call_function, label=label, tokenizer=tokenizer)
    if max_length and tokenizer is not None and not tokenizer.seen:
        raise LoraFxError(
            f"--max-length has no effect for {path}, which has no column of texts", "leave it out"
        )
    return table


def refuse_row_labels(table: Table, cap: Captured, data: str, loss: str) -> None:
    """Raise if DATA has one label per row and the model's own loss does not score rows."""
    from lora_fx.fx.train import row_labels
    from lora_fx.passes.verbs.open import user_module

    if ":" not in loss:
        row_labels.refuse_row_labels(table, user_module(cap), data, cap.tokenizer_folder)


class Texts:
    """A tokenizer that records whether it was called."""

    def __init__(self, tokenizer: Callable[[list[str]], Any]) -> None:
        self.tokenizer = tokenizer
        self.seen = False

    def __call__(self, texts: list[str]) -> Any:
        """Tokenise texts."""
        self.seen = True
        return self.tokenizer(texts)


def tables_of(
    data: str, cap: Captured, options: ExampleOptions, seed: int, defaults: RunDefaults
) -> tuple[Table, Table]:
    """Read the training examples and the held-out examples.

    Args:
        data: The DATA argument.
        cap: The model.
        options: The held-out examples and the names of columns.
        seed: The seed by which held-out examples are drawn.
        defaults: The share that is held out if the options name none.
    """
    from lora_fx.held_out import alike, repeated, split

    table = training_data(data, cap, options.label, options.max_length)
    refuse_row_labels(table, cap, data, options.loss)
    if table.words:
        labels = [f"{number} = {word}" for number, word in enumerate(table.words)]
        note(f"labels: {some(labels, 8)}")
    path = options.eval_data
    if not path:
        share = options.validation
        if share is None:
            share = defaults.share_of(len(table))
        return split(table, share, seed)

    read = training_data(path, cap, options.label, options.max_length)
    held_out = alike(read, table, path, data)
    count = repeated(held_out, table)
    if count:
        repeats = f"{path}: {count} of {len(held_out)} examples are trained on too, from {data}"
        note(f"{repeats}: the validation loss says less of new ones", warns=True)
    return table, held_out


def loss_of(text: str) -> str | Loss:
    """Load the function of `module:NAME`; return ce and mse as text."""
    from lora_fx.fx.load.factory import load_function

    if ":" not in text:
        return text
    loss: Loss = load_function(text)
    return loss


def batches_of(table: Table | Buckets, seed: int = 0, rows: int = BATCH) -> Iterator[JsonView]:
    """Yield the columns of the batches of one pass over the data."""
    for batch in table.batches(rows, seed):
        yield batch.columns
