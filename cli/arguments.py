"""How the arguments of a command become a model, adapters and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fx.cli.options import first_given
from lora_fx.cli.output import note
from lora_fx.errors import LoraFxError
from lora_fx.text import Json, JsonView, some

if TYPE_CHECKING:
    from lora_fx.adapter.adapter import Adapter
    from lora_fx.cli.model_options import ModelOptions
    from lora_fx.cli.train_options import ExampleOptions
    from lora_fx.data import Buckets, Table
    from lora_fx.fx.capture.capture import Captured
    from lora_fx.fx.module.adapted import AdaptedModule
    from lora_fx.fx.train.loss import Loss

BATCH = 32
"""Examples that run at a time."""


def split_weight(text: str) -> tuple[str, float]:
    """`ADAPTER:W` as (path, W) where ADAPTER exists or is of the Hub; else (text, 1).

    >>> split_weight("adapter"), split_weight("hf:org/name:0.5")
    (('adapter', 1.0), ('hf:org/name', 0.5))
    """
    path, colon, number = text.rpartition(":")
    if colon and path and (path.startswith("hf:") or Path(path).exists()):
        try:
            return path, float(number)
        except ValueError as e:
            if path.endswith(".py"):
                raise LoraFxError(
                    f"{text} is a model, not an adapter", "the model comes first"
                ) from e
            raise LoraFxError(f"{number!r} is no weight", f"for example {path}:0.5") from e
    return text, 1.0


def captured(
    model: str,
    options: ModelOptions,
    *,
    meta: bool = False,
    cache: bool = False,
    check: Callable[[Any], object] | None = None,
) -> Captured:
    """The capture of a MODEL argument, whose notes are printed.

    Args:
        model: A path or name, as on the command line.
        options: How it is loaded and captured.
        meta: Read no weights.
        cache: Capture a decoder with its key-value cache.
        check: Of a decoder: called with its config before it is captured; it may raise.
    """
    from lora_fx.fx.tensors import from_numpy
    from lora_fx.inputs import parse_dynamic
    from lora_fx.passes.verbs.open import captured_of
    from lora_fx.passes.verbs.options import CaptureOptions

    arrays = load_npz(options.inputs_file)
    asked = CaptureOptions(
        kwargs={name: from_numpy(array) for name, array in arrays.items()},
        dynamic=parse_dynamic(options.dynamic) or None,
        static=options.static,
        repeat=not options.no_repeat,
        cache=cache,
        weights=options.weights,
        meta=meta,
        trust=options.trust,
        tell=note,
        check=check,
    )
    cap = captured_of(model, asked)
    note(*cap.notes, *(f"pinned: {pin}" for pin in cap.pinned))
    note(*(f"captured for: {condition}" for condition in cap.ranges))
    return cap


def module_with_adapter(cap: Captured) -> AdaptedModule:
    """The module of a .pt2 file that has branches; what chooses targets has nothing to choose."""
    from lora_fx.fx.module.adapted import AdaptedModule
    from lora_fx.fx.pt2.captured import FileCaptured
    from lora_fx.passes.verbs.build import module_of

    assert isinstance(cap, FileCaptured)
    chosen = ("rank", "alpha", "include", "exclude", "also_train", "variant", "dropout", "init")
    if option := first_given(*chosen, "plan", "quantise", "dead"):
        raise LoraFxError(
            f"{cap.path} holds an adapter, which is trained on, so {option} has no say",
            "leave it out, or start from the original model",
        )
    module = module_of(cap)
    assert isinstance(module, AdaptedModule)  # it has branches
    return module


def load_npz(path: str | None) -> Json:
    """Arrays of an --inputs file by name; empty without one."""
    from lora_fx.data_files import read_npz

    return read_npz(path) if path else {}


def training_data(path: str, cap: Captured, label: str, max_length: int | None = None) -> Table:
    """The table of a DATA argument, in the inputs of a model; texts are tokenised by its own."""
    from lora_fx.data import training_table
    from lora_fx.fx.load.huggingface import tokenizer_of
    from lora_fx.fx.load.models import call_function
    from lora_fx.fx.train.language_data import language_table
    from lora_fx.passes.verbs.open import user_module

    folder = cap.tokenizer_folder
    if max_length and folder is None:
        raise LoraFxError("--max-length has no say for a model without a tokenizer", "leave it out")
    if folder and not label and path.endswith(".jsonl") and Path(path).is_file():
        found = language_table(path, user_module(cap), folder, max_length)
        if found is not None:
            note(*found[1])
            return found[0]
    texts = Texts(None if folder is None else tokenizer_of(folder, max_length or 128))
    tokenizer = None if folder is None else texts
    table = training_table(path, cap.inputs.names, call_function, label=label, tokenizer=tokenizer)
    if max_length and not texts.seen:
        raise LoraFxError(
            f"--max-length has no say for {path}, which has no column of texts", "leave it out"
        )
    return table


def refuse_row_labels(table: Table, cap: Captured, data: str, loss: str) -> None:
    """Raise where DATA has one label a row and the model scores something else by itself."""
    from lora_fx.fx.train import row_labels
    from lora_fx.passes.verbs.open import user_module

    if ":" not in loss:
        row_labels.refuse_row_labels(table, user_module(cap), data, cap.tokenizer_folder)


class Texts:
    """A tokenizer that knows whether it was given any text."""

    def __init__(self, tokenizer: Callable[[list[str]], Any] | None) -> None:
        self.tokenizer, self.seen = tokenizer, False

    def __call__(self, texts: list[str]) -> Any:
        """The columns of texts."""
        assert self.tokenizer is not None
        self.seen = True
        return self.tokenizer(texts)


def tables_of(data: str, cap: Captured, options: ExampleOptions, seed: int) -> tuple[Table, Table]:
    """Examples to train on, and those that are held out.

    Args:
        data: The DATA argument.
        cap: The model.
        options: What is held out, and the names of columns.
        seed: That of the draw of examples that are held out.
    """
    from lora_fx.held_out import alike, repeated, split

    table = training_data(data, cap, options.label, options.max_length)
    refuse_row_labels(table, cap, data, options.loss)
    if table.words:
        note("labels: " + some([f"{i} = {word}" for i, word in enumerate(table.words)], 8))
    path = options.eval_data
    if not path:
        return split(table, options.validation, seed)

    read = training_data(path, cap, options.label, options.max_length)
    held_out = alike(read, table, path, data)
    if count := repeated(held_out, table):
        repeats = f"{path}: {count} of {len(held_out)} examples are trained on too, from {data}"
        note(f"{repeats}: the validation loss says less of new ones", warns=True)
    return table, held_out


def adapter_of(path: str) -> Adapter:
    """An adapter from a file, what its reader had to say printed."""
    from lora_fx.formats.io import load_adapter

    adapter = load_adapter(path)
    note(*adapter.metadata.get("notes", []))
    return adapter


def named_adapters(texts: Sequence[str]) -> dict[str, Adapter]:
    """`ADAPTER[:W]` arguments by the name of the folder or file."""
    from lora_fx.formats.io import adapter_name

    result: dict[str, Adapter] = {}
    for path, weight in map(split_weight, texts):
        name = adapter_name(path)
        if name in result:
            raise LoraFxError(f"two adapters are called {name!r}", "rename one of them")
        result[name] = adapter_of(path).weighted(weight)
    return result


def loss_of(text: str) -> str | Loss:
    """Ce or mse as they are, the function of module:NAME."""
    from lora_fx.fx.load.models import load_function

    loss: str | Loss = load_function(text) if ":" in text else text
    return loss


def batches_of(table: Table | Buckets, seed: int = 0, rows: int = BATCH) -> Iterator[JsonView]:
    """The columns of one pass over the data, so many rows at a time."""
    for batch in table.batches(rows, seed):
        yield batch.columns
