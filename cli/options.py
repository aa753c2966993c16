"""Options that commands share, those of train, and how arguments become a model."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lora_fx.cli.output import note, say
from lora_fx.errors import LoraFxError, NoSay, Terminated
from lora_fx.text import Json, JsonView, some

if TYPE_CHECKING:
    from lora_fx.adapter.adapter import Adapter
    from lora_fx.data import Buckets, Table
    from lora_fx.fx.capture.capture import Captured
    from lora_fx.fx.load.huggingface import LoadedModel
    from lora_fx.fx.module.adapted import AdaptedModule
    from lora_fx.fx.train.loss import Loss
    from lora_fx.fx.train.processes import Processes
    from lora_fx.fx.train.state import Saving, Settings

FROM_1 = click.IntRange(1, 2**31 - 1)
THREADS = click.IntRange(0, 2**10)
"""Of ONNX Runtime; 0 leaves the number to it."""
FORCE = "Replace an output that exists."


Command = Callable[..., object]
"""What click makes a command of."""
Option = Callable[[Command], Command]
"""What adds an option to a command."""


def flag_option(name: str, text: str) -> Option:
    """An option that is given or not."""
    return click.option(name, is_flag=True, help=text)


force_option = flag_option("--force", FORCE)


def text_option(name: str, metavar: str, text: str, **more: Any) -> Option:
    """An option of a text; `more` is what else click.option takes."""
    return click.option(name, metavar=metavar, help=text, **more)


def output_option(metavar: str, text: str) -> Option:
    """The option of the file or folder that a command writes."""
    return click.option("-o", "--output", required=True, metavar=metavar, help=text)


def selectors_option(name: str, text: str) -> Option:
    """A repeatable option of selectors; None where it is not given."""
    return text_option(
        name, "SELECTORS", text, multiple=True, callback=lambda ctx, param, value: value or None
    )


def label_option(of: str) -> Option:
    """The option of the column of labels, which is found by its usual names without it."""
    return click.option(
        "--label", default="", show_default=False, metavar="COL", help=f"{of}  [default: labels]"
    )


def seed_option(of: str) -> Option:
    """The option of a seed that torch and numpy both take."""
    return click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help=of)


def number_option(name: str, text: str, default: int | None = None) -> Option:
    """The option of a whole number from 1 on."""
    return click.option(name, type=FROM_1, metavar="N", default=default, help=text)


max_length_option = number_option(
    "--max-length", "Tokens of a text.  [default: 128; 1024 for causal language models]"
)


def combined(options: Sequence[Option]) -> Option:
    """One decorator that adds options, in the order that --help lists them in."""

    def add(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return add


GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
"""Where what the user asked for stands: on the command line, or in a config."""


def given_here(ctx: click.Context) -> dict[str, str]:
    """The parameters that the user gave, each as a long option, or as the help names it."""
    given = {}
    for param in ctx.command.params:
        name = param.name or ""
        asked = ctx.params.get(name)
        nothing = asked is None or asked is False or asked == ()  # false in a config, say
        if ctx.get_parameter_source(name) in GIVEN and not nothing:
            argument = isinstance(param, click.Argument)
            given[name] = param.human_readable_name if argument else max(param.opts, key=len)
    return given


def first_given(*names: str) -> str:
    """The first of these that the user gave, as a long option; else empty."""
    given = given_here(click.get_current_context())
    return next((given[n] for n in names if n in given), "")


def only_given(options: JsonView) -> Json:
    """The options that the user gave; a public function has the defaults of the others."""
    given = given_here(click.get_current_context())
    return {name: value for name, value in options.items() if name in given}


# When an option of a command has no say. Each command has a table of such rules.


Rules = Sequence[NoSay[JsonView]]


def _is(suffix: str, name: str = "model") -> Callable[[JsonView], bool]:
    return lambda asked: str(asked[name]).endswith(suffix)


def _reads_no_data(asked: JsonView) -> bool:
    """Whether --init takes nothing from data."""
    from lora_fx.adapter.variant import OF_DATA

    return asked["init"] not in OF_DATA


PROGRAM: Rules = (NoSay(("no_repeat",), _is(".pt2"), "for {0[model]}, which is traced already"),)
"""Of what loads a model."""
PLANNED: Rules = (
    NoSay(
        ("rank", "alpha", "include"), lambda asked: bool(asked["plan"]),
        "beside --plan {0[plan]}", "leave one of them out",
    ),
)  # fmt: skip
"""Of what a plan may choose targets for."""
STARTED: Rules = (
    NoSay(
        ("label", "loss"), _reads_no_data,
        "for --init {0[init]}, which reads no data",
    ),
    NoSay(
        ("loss",), lambda asked: asked["init"] == "eva", "for --init eva, which reads no gradient"
    ),
)  # fmt: skip
"""Of what only starts an adapter."""
TRAINED: Rules = (
    NoSay(
        ("warmup",), lambda asked: asked["schedule"] == "constant", "for --schedule constant",
        "--schedule constant_with_warmup has one",
    ),
    NoSay(
        ("validation",), lambda asked: bool(asked["eval_data"]),
        "beside --eval-data {0[eval_data]}", "leave one of them out",
    ),
    NoSay(
        ("epochs",), lambda asked: asked["steps"] is not None, "beside --steps {0[steps]}",
        "leave one of them out",
    ),
    NoSay(
        ("checks",), lambda asked: not _validates(asked) and not _keeps_states(asked),
        "where no example is held out, and no state is kept at a validation",
    ),
)  # fmt: skip
"""Of the loop of train."""


def _validates(asked: JsonView) -> bool:
    return bool(asked["validation"] or asked["eval_data"])


def _keeps_states(asked: JsonView) -> bool:
    """Whether states are kept as often as a validation would run."""
    return bool(asked["save_state"] or asked["resume"]) and not asked["save_every"]


CAPTURE = ("weights", "inputs_file", "dynamic", "static", "trust", "no_repeat")
"""What model_options give to captured."""


model_options = combined(
    [
        text_option("--weights", "FILE", "Weights for a model built from code."),
        click.option("--inputs", "inputs_file", metavar="FILE.npz", help="Example inputs by name."),
        text_option("--dynamic", "NAME:0=batch,2=h", "Dimensions that may vary.", multiple=True),
        text_option("--static", "NAME[:DIM]", "Dimensions that may not.", multiple=True),
        flag_option("--trust", "Read pickled tensors: .bin, and in a .pt2."),
        flag_option("--no-repeat", "Trace each of equal layers: slower, the same graph."),
    ]
)
"""Options of every command that loads and captures a model."""


quantise_option = text_option(
    "--quantise",
    "KIND[=SELECTORS]",
    "Store the base's weights as nf4, int4 or int8; of the default plan, or those named.",
    multiple=True,
)


target_options = combined(
    [
        text_option("--plan", "PLAN", "Targets and ranks, of lora-fx plan."),
        click.option("--rank", "-r", type=int, default=8, help="Rank of every target."),
        click.option("--alpha", type=float, help="Scale is alpha/rank.  [default: 2·rank]"),
        selectors_option(
            "--include", "Targets, instead of the default plan: q_proj,role:v,op:conv2d,re:…"
        ),
        selectors_option("--exclude", "Targets to leave out."),
        selectors_option("--also-train", "Tensors trained whole, such as a new head."),
        click.option(
            "--variant",
            metavar="lora|rslora|dora|lora-fa|lora+|qalora[:G]",
            default="lora",
            help="What an update is and how it learns.",
        ),
        click.option(
            "--init",
            type=click.Choice(
                ["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora-ga"]
            ),
            default="kaiming",
            help="What A and B start from.",
        ),
        click.option("--dropout", type=float, default=0.0, help="Dropout on the branches' inputs."),
        quantise_option,
        seed_option("Of initial values."),
        click.option(
            "--dead",
            type=click.Choice(["auto", "error", "drop", "keep", "allow"]),
            default="auto",
            help="Targets that no gradient reaches: refuse those you named and leave out others; "
            "refuse; leave out; keep; or prove nothing.",
        ),
    ]
)
"""Options that choose targets and ranks."""


def captured(
    model: str, options: Json, *, meta: bool = False, cache: bool = False
) -> tuple[LoadedModel, Captured]:
    """(LoadedModel, Captured) of a MODEL argument; takes its options out and prints notes."""
    from lora_fx.fx.capture.decoder import decoder
    from lora_fx.fx.load.huggingface import LoadedModel
    from lora_fx.fx.load.models import load_model
    from lora_fx.fx.pt2.captured import is_program, open_program
    from lora_fx.fx.tensors import from_numpy
    from lora_fx.inputs import parse_dynamic
    from lora_fx.passes.verbs.open import capture

    weights, inputs_file, dynamic, static, trust, whole = (options.pop(k, None) for k in CAPTURE)
    given = {k: from_numpy(v) for k, v in load_npz(inputs_file).items()}
    wanted = parse_dynamic(dynamic) or None
    if is_program(model):
        if weights:
            raise LoraFxError(f"{model} holds its weights", "leave --weights out")
        cap: Captured = open_program(model, (), given, wanted, static, trust=trust, meta=meta)
        loaded = LoadedModel(cap.model, (), dict(cap.named), model)
    else:
        loaded = load_model(model, weights=weights, meta=meta, trust=trust)
        note(*loaded.notes)
        if cache and (inputs_file or dynamic or static):
            raise LoraFxError(
                "with --cache the inputs and their dimensions are known",
                "leave --inputs, --dynamic and --static out",
            )
        if cache:
            cap = decoder(loaded.module, repeat=not whole)
        else:
            quiet = replace(loaded, notes=())  # they were told above
            cap = capture(quiet, (), given, wanted, static, repeat=not whole)
    note(*cap.notes, *(f"pinned: {pin}" for pin in cap.pinned))
    note(*(f"captured for: {c}" for c in cap.ranges))
    return loaded, cap


def refuse_given(model: str, names: Sequence[str]) -> None:
    """Raise for an option that was given and has no say for an .onnx file."""
    if option := first_given(*names):
        raise LoraFxError(f"{option} has no say for {model}, a graph as it is", "leave it out")


def held(cap: Captured) -> AdaptedModule:
    """The module of a .pt2 file that has branches; what chooses targets has nothing to choose."""
    from lora_fx.fx.module.adapted import AdaptedModule
    from lora_fx.fx.pt2.captured import FileCaptured
    from lora_fx.passes.verbs.open import module_of

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
    from lora_fx.data import read_npz

    return read_npz(path) if path else {}


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


def training_data(
    path: str, loaded: LoadedModel, cap: Captured, label: str, max_length: int | None = None
) -> Table:
    """The table of a DATA argument, in the inputs of a model; texts are tokenised by its own."""
    from lora_fx.data import training_table
    from lora_fx.fx.load.huggingface import tokenizer_of
    from lora_fx.fx.load.models import call_function
    from lora_fx.fx.train.language_data import language_table

    folder = loaded.tokenizer_folder
    if max_length and folder is None:
        raise LoraFxError("--max-length has no say for a model without a tokenizer", "leave it out")
    if folder and not label and path.endswith(".jsonl") and Path(path).is_file():
        found = language_table(path, loaded.module, folder, max_length)
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


def refuse_row_labels(table: Table, loaded: LoadedModel, data: str, loss: str) -> None:
    """Raise where DATA has one label a row and the model scores something else by itself."""
    from lora_fx.fx.train import row_labels

    if ":" not in loss:
        row_labels.refuse_row_labels(table, loaded.module, data, loaded.tokenizer_folder)


class Texts:
    """A tokenizer that knows whether it was given any text."""

    def __init__(self, tokenizer: Callable[[list[str]], Any] | None) -> None:
        self.tokenizer, self.seen = tokenizer, False

    def __call__(self, texts: list[str]) -> Any:
        """The columns of texts."""
        assert self.tokenizer is not None
        self.seen = True
        return self.tokenizer(texts)


def check_shares(options: JsonView) -> None:
    """Refuse, before any work, options of the held-out examples that contradict each other."""
    share, held_out = options["validation"], options["eval_data"]
    if not 0 <= share < 1:
        raise LoraFxError(f"--validation {share} is not in [0, 1)", "0.1 is usual")
    if options["patience"] and not (share or held_out):
        raise LoraFxError("--patience needs held-out examples", "--validation 0.1 is usual")


def tables_of(data: str, loaded: LoadedModel, cap: Captured, options: Json) -> tuple[Table, Table]:
    """Examples to train on and those that are held out; takes their options out."""
    from lora_fx.data import alike, repeated, split

    names = ("label", "max_length", "eval_data", "validation")
    label, longest, held_out, share = (options.pop(n) for n in names)
    table = training_data(data, loaded, cap, label, longest)
    refuse_row_labels(table, loaded, data, options["loss"])
    if table.words:
        note("labels: " + some([f"{i} = {word}" for i, word in enumerate(table.words)], 8))
    if not held_out:
        return split(table, share, options["seed"])
    other = alike(training_data(held_out, loaded, cap, label, longest), table, held_out, data)
    if count := repeated(other, table):
        told = f"{held_out}: {count} of {len(other)} examples are trained on too, from {data}"
        note(f"{told}: the validation loss says less of new ones", warns=True)
    return table, other


def adapter_of(path: str) -> Adapter:
    """An adapter from a file, what its reader had to say printed."""
    from lora_fx.formats.io import load_adapter

    adapter = load_adapter(path)
    note(*adapter.metadata.get("notes", []))
    return adapter


def named_adapters(texts: Sequence[str]) -> Json:
    """`ADAPTER[:W]` arguments by the name of the folder or file."""
    from lora_fx.formats.io import adapter_name

    result: Json = {}
    for path, weight in map(split_weight, texts):
        name = adapter_name(path)
        if name in result:
            raise LoraFxError(f"two adapters are called {name!r}", "rename one of them")
        result[name] = adapter_of(path).weighted(weight)
    return result


# Options of a start that reads data (--init eva, lora-ga), and the batches that it reads.


START = ("data", "label", "loss")
"""The options that start_from takes."""
BATCH = 32
"""Examples that run at a time."""


def start_from(loaded: LoadedModel, cap: Captured, options: Json) -> Json:
    """Keyword arguments of insert; empty for a start that reads no data. Takes its options out."""
    from lora_fx.adapter.variant import OF_DATA

    init, (data, label, loss) = options["init"], (options.pop(k) for k in START)
    if init not in OF_DATA:
        if data:
            raise LoraFxError(f"--init {init} reads no data", f"--init {' or '.join(OF_DATA)}")
        return {}
    if not data:
        raise LoraFxError(f"--init {init} reads data", "--data FILE, as train takes it")
    table = training_data(data, loaded, cap, label)
    if init == "lora-ga":
        refuse_row_labels(table, loaded, data, loss)
    gradient = {"loss": loss_of(loss)} if init == "lora-ga" else {}
    return {"data": batches_of(table), **gradient}


def loss_of(text: str) -> str | Loss:
    """Ce or mse as they are, the function of module:NAME."""
    from lora_fx.fx.load.models import load_function

    loss: str | Loss = load_function(text) if ":" in text else text
    return loss


def batches_of(table: Table | Buckets, seed: int = 0, rows: int = BATCH) -> Iterator[JsonView]:
    """The columns of one pass over the data, so many rows at a time."""
    for batch in table.batches(rows, seed):
        yield batch.columns


def some_batches(
    data: str | None, loaded: LoadedModel, cap: Captured, options: Json
) -> Iterator[JsonView] | None:
    """Batches of at most --examples of DATA, drawn by --seed; takes its options out."""
    import numpy as np

    label, longest = options.pop("label"), options.pop("max_length")
    most, seed = options.pop("examples"), options.pop("seed")
    if not data:
        return None
    table = training_data(data, loaded, cap, label, longest)
    if options["method"] not in ("uniform", "eva"):  # which compute no loss
        refuse_row_labels(table, loaded, data, options["loss"])
    drawn = np.random.default_rng(seed).permutation(len(table))[:most]
    return batches_of(table.rows(drawn), seed)


# Options that merge and merge-all share, and the arguments that pass them on.


FLAGS = {
    "allow-unused": "Leave out updates that the base has no tensor for.",
    "allow-missing": "Accept an adapter that lacks layers its config has.",
    "any-base": "Merge into other weights than it was trained on.",
    "other-readers": "Merge where more than its products reads a weight.",
    "untie": "Give a tied output head a tensor of its own.",
    "add": "Add whole tensors that the base lacks: a new head.",
    "again": "Merge an adapter that is in the base already.",
    "dequantise": "Store the weights of a quantised base as floats.",
    "requantise": "Store them as codes again, with the update in them.",
    "lossy": "Of --requantise: also where that loses most of the update.",
    "link": "Hard links for untouched files, instead of copies.",
    "trust": "Read pickles (.bin), by torch's unpickler that runs no code.",
}
trust_option = flag_option("--trust", FLAGS["trust"])


fuse_options = combined(
    [
        flag_option("--fuse", "q, k, v, or gate, up, become one, as in --base."),
        flag_option("--split", "The reverse."),
        click.option(
            "--map", "rows", metavar="FILE", help="Of both: whose rows are which, as JSON."
        ),
    ]
)


merge_options = combined(
    [
        text_option(
            "--dtype", "DTYPE", "Of touched tensors: bf16, fp16, fp32, fp64.  [default: as stored]"
        ),
        *(flag_option(f"--{name}", text) for name, text in FLAGS.items()),
        text_option("--max-shard-size", "SIZE", "Of --dequantise.  [default: 5GB]"),
    ]
)
"""Options of every command that merges."""


GROUPS = {
    "Data": "data eval_data label loss validation max_length examples",
    "Training": "epochs steps batch_size gradient_accumulation_steps accumulate checks patience "
    "mixed_precision activation_checkpointing curve",
    "Optimizer": "optimizer lr schedule warmup weight_decay clip",
    "States of a training": "save_state save_every save_total_limit resume",
    "Targets and ranks": "plan rank alpha energy max_rank params max_error max_abs_error include "
    "exclude also_train also_full whole variant init seed dropout quantise accuracy_level dead",
    "What is accepted": "allow_unused allow_missing any_base other_readers untie add again",
    "Quantised weights": "dtype dequantise requantise lossy max_shard_size",
    "ONNX": "opset optimise precision tol cache genai names delta triton max_batch",
    "Model and its inputs": "model weights inputs_file dynamic static trust no_repeat",
    "Run and result": "provider device threads dry_run run link report config save_config force "
    "as_json",
}
"""Titles in --help, and what stands below them; what is in none of them is a command's own."""


def in_groups(params: Sequence[click.Parameter]) -> dict[str, list[click.Option]]:
    """The options of a command below their titles; one that would stand alone is its own."""
    options = [p for p in params if isinstance(p, click.Option)]
    groups = {
        title: [p for name in names.split() for p in options if p.name == name]
        for title, names in GROUPS.items()
    }
    groups = {title: found for title, found in groups.items() if len(found) > 1}
    grouped = [p for found in groups.values() for p in found]
    return {"Options": [p for p in options if p not in grouped], **groups}


def load_numpy() -> None:
    """Import numpy with one BLAS thread, where nothing has imported it or said how many.

    A merge has threads of its own. BLAS's are started as it is loaded, and spin in wait for work:
    that is .1 s of a core on two cores.
    """
    name = "OPENBLAS_NUM_THREADS"
    if "numpy" in sys.modules or name in os.environ:
        return
    os.environ[name] = "1"
    try:
        import numpy  # noqa: F401
    finally:
        del os.environ[name]


# Options of the loop of train, states, processes.


ABOVE_0 = click.FloatRange(min=0, min_open=True)
FROM_0 = click.FloatRange(min=0)
SHARE = click.FloatRange(min=0, max=1, max_open=True)


class OfLaunch(click.Option):
    """An option that `accelerate launch` always gives, by its environment: a config wins."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Nothing where the table of --config has the option."""
        return None if self.name in (ctx.default_map or {}) else super().resolve_envvar_value(ctx)


loop_options = combined(
    [
        click.option("--epochs", type=ABOVE_0, default=3.0, help="Passes over DATA."),
        number_option("--steps", "Steps, instead of epochs."),
        click.option("--batch-size", type=FROM_1, default=32, help="Examples a step."),
        click.option("--lr", type=ABOVE_0, default=1e-3, help="Peak learning rate."),
        click.option(
            "--schedule",
            default="cosine",
            metavar="NAME",
            help="Of the rate: cosine, linear, constant, constant_with_warmup or inverse_sqrt.",
        ),
        click.option(
            "--optimizer",
            default="adamw_torch",
            metavar="NAME",
            help="adamw_torch, adamw_torch_fused, sgd, rmsprop or adagrad.",
        ),
        click.option("--weight-decay", type=FROM_0, default=0.01, help="Of AdamW, times the rate."),
        click.option("--warmup", type=SHARE, default=0.05, help="Share of the steps that warm up."),
        click.option(
            "--clip", type=FROM_0, default=1.0, help="Longest gradient (norm); 0 for any."
        ),
        click.option("--checks", type=FROM_1, default=10, help="Validations in the run."),
        number_option("--patience", "Validations in vain that end the run."),
        click.option(
            "--accumulate",
            type=FROM_1,
            default=1,
            metavar="N",
            cls=OfLaunch,
            envvar="ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            help="Parts that a step runs in, one after another, to save memory.",
        ),
        number_option(
            "--gradient-accumulation-steps", "Batches of --batch-size that make one step.", 1
        ),
        flag_option("--activation-checkpointing", "Recompute blocks in backward."),
        click.option(
            "--mixed-precision",
            type=click.Choice(["no", "bf16"]),
            default="no",
            cls=OfLaunch,
            envvar="ACCELERATE_MIXED_PRECISION",
            help="bf16: products in bfloat16; what is trained stays float32.",
        ),
        text_option("--save-state", "DIR", "Keep a state there to --resume from."),
        number_option(
            "--save-every", "Steps between two states.  [default: one at every validation]"
        ),
        number_option(
            "--save-total-limit",
            "Keep the last N states, as DIR/checkpoint-STEP.  [default: the last, as DIR]",
        ),
        text_option("--resume", "DIR", "Go on from a state; it is kept current there."),
    ]
)
"""Options of the loop, and those of its states."""


def settings_of(options: Json) -> Settings:
    """Takes the loop's settings out of a command's options.

    Batches that are accumulated are one larger batch that runs in as many more parts.
    """
    from lora_fx.fx.train.state import Settings

    check_shares(options)
    batches = options.pop("gradient_accumulation_steps")
    options |= {name: batches * options[name] for name in ("batch_size", "accumulate")}
    names = [f.name for f in fields(Settings) if f.name != "seed"]  # which insert takes too
    return Settings(seed=options["seed"], **{name: options.pop(name) for name in names})


def saving_of(options: Json, curve: str | None, force: bool) -> Saving:
    """Takes what says where states are out of a command's options; checks what is written."""
    from lora_fx.files.atomic import check_output
    from lora_fx.fx.train.state import Saving, check_folder

    every, limit, resume = (options.pop(n) for n in ("save_every", "save_total_limit", "resume"))
    folder = options.pop("save_state") or resume
    if curve:
        check_output(curve, force=force)
    if (every or limit) and not folder:
        option = "--save-every" if every else "--save-total-limit"
        raise LoraFxError(f"{option}, but no state is kept", "--save-state DIR")
    if folder:
        again = resume is not None and Path(folder).resolve() == Path(resume).resolve()
        check_folder(folder, force=force or again, own=again, limit=limit)
    return Saving(folder, every, resume, limit)


@contextlib.contextmanager
def together(device: str) -> Iterator[tuple[Processes, str]]:
    """The processes of the run, of which the first alone prints; a place for each on `device`.

    Yields (Processes, device). A process that ends because another one failed says nothing.
    """
    from lora_fx.fx.train.processes import Elsewhere, one_by_accelerate, processes

    try:
        with processes(device.startswith("cuda")) as world:
            if not world.first:
                click.get_current_context().find_root().obj["quiet"] = True
            if world.size > 1:
                note(f"{world.size} processes: each takes a share of every batch")
                device = f"cuda:{world.local}" if device == "cuda" else device
            elif one_by_accelerate():
                note(
                    "accelerate launch --cpu started one process: it starts several by MPI alone "
                    "(--mpirun_hostfile); --multi_gpu or torchrun starts them"
                )
            try:
                yield world, device
            except KeyboardInterrupt as stop:  # which came to all of them
                if world.first:
                    raise
                raise click.exceptions.Exit(143 if isinstance(stop, Terminated) else 130) from None
    except Elsewhere as e:
        raise click.exceptions.Exit(e.exit_code) from None


@contextlib.contextmanager
def stateful(saving: Saving) -> Iterator[None]:
    """What is stopped in this block says which state it leaves."""
    from lora_fx.fx.train.state import step_of

    before = None if saving.resume else _written(saving.folder)
    try:
        yield
    except (KeyboardInterrupt, LoraFxError) as stop:
        folder = saving.folder if _written(saving.folder) != before else None
        step = step_of(folder) if folder else None
        said = f"{folder} holds the state of step {step}"
        if step is not None and isinstance(stop, KeyboardInterrupt):
            stop.left = f"{said}: --resume {folder} goes on from there"  # type: ignore[attr-defined]
        elif step is not None and not saving.resume:
            say(said)
        raise


def _written(folder: str | None) -> tuple[int, int] | None:
    """Tells one state from the next; None where there is none."""
    path = Path(folder or "")
    return (path.stat().st_ino, path.stat().st_mtime_ns) if folder and path.is_dir() else None
