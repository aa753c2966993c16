"""The groups of options that several commands share, or that become one object of a verb.

Beside each group stand the rules that say when one of its options has no say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_fx.cli.options import (
    FROM_1,
    TRUST,
    Rules,
    count_option,
    flag,
    label_column,
    option,
    repeatable,
    seed_option,
    selectors,
)
from lora_fx.errors import LoraFxError, NoSay
from lora_fx.text import JsonView

if TYPE_CHECKING:
    from lora_fx.checkpoint.merge_plan import MergeOptions
    from lora_fx.fx.train.loss import Loss
    from lora_fx.fx.train.state import Saving, Settings
    from lora_fx.inputs import Named
    from lora_fx.passes.verbs.options import InsertOptions

MAX_LENGTH = "Tokens of a text.  [default: 128; 1024 for causal language models]"
QUANTISE = "Store the base's weights as nf4, int4 or int8; of the default plan, or those named."
SCORES = "ce, mse or module:function."


def _is(suffix: str, name: str = "model") -> Callable[[JsonView], bool]:
    return lambda asked: str(asked[name]).endswith(suffix)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is loaded and captured."""

    weights: str | None = option(
        "--weights", metavar="FILE", help="Weights for a model built from code."
    )
    inputs_file: str | None = option("--inputs", metavar="FILE.npz", help="Example inputs by name.")
    dynamic: tuple[str, ...] = repeatable(
        "--dynamic", "NAME:0=batch,2=h", "Dimensions that may vary."
    )
    static: tuple[str, ...] = repeatable("--static", "NAME[:DIM]", "Dimensions that may not.")
    trust: bool = flag("--trust", "Read pickled tensors: .bin, and in a .pt2.")
    no_repeat: bool = flag("--no-repeat", "Trace each of equal layers: slower, the same graph.")


PROGRAM: Rules = (NoSay(("no_repeat",), _is(".pt2"), "for {0[model]}, which is traced already"),)


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Which targets get branches, of which rank, and what A and B start from."""

    plan: str | None = option("--plan", metavar="PLAN", help="Targets and ranks, of lora-fx plan.")
    rank: int = option("--rank", "-r", type=int, default=8, help="Rank of every target.")
    alpha: float | None = option(
        "--alpha", type=float, help="Scale is alpha/rank.  [default: 2·rank]"
    )
    include: tuple[str, ...] | None = selectors(
        "--include", "Targets, instead of the default plan: q_proj,role:v,op:conv2d,re:…"
    )
    exclude: tuple[str, ...] | None = selectors("--exclude", "Targets to leave out.")
    also_train: tuple[str, ...] | None = selectors(
        "--also-train", "Tensors trained whole, such as a new head."
    )
    variant: str = option(
        "--variant",
        metavar="lora|rslora|dora|lora-fa|lora+|qalora[:G]",
        default="lora",
        help="What an update is and how it learns.",
    )
    init: str = option(
        "--init",
        type=click.Choice(
            ["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora-ga"]
        ),
        default="kaiming",
        help="What A and B start from.",
    )
    dropout: float = option(
        "--dropout", type=float, default=0.0, help="Dropout on the branches' inputs."
    )
    quantise: tuple[str, ...] = repeatable("--quantise", "KIND[=SELECTORS]", QUANTISE)
    seed: int = seed_option("Of initial values.")
    dead: str = option(
        "--dead",
        type=click.Choice(["auto", "error", "drop", "keep", "allow"]),
        default="auto",
        help="Targets that no gradient reaches: refuse those you named and leave out others; "
        "refuse; leave out; keep; or prove nothing.",
    )

    def insert(self, data: Iterable[Named] | None = None, loss: str | Loss = "ce") -> InsertOptions:
        """What an insert is asked for.

        Args:
            data: The batches that a start of data reads.
            loss: The loss whose gradients a start of gradients reads.
        """
        from lora_fx.passes.verbs.options import InsertOptions

        return InsertOptions(
            plan=self.plan,
            rank=self.rank,
            alpha=self.alpha,
            include=self.include,
            exclude=self.exclude,
            also_train=self.also_train,
            variant=self.variant,
            init=self.init,
            dropout=self.dropout,
            seed=self.seed,
            dead=self.dead,
            data=data,
            loss=loss,
        )


PLANNED: Rules = (
    NoSay(
        ("rank", "alpha", "include"),
        lambda asked: bool(asked["plan"]),
        "beside --plan {0[plan]}",
        "leave one of them out",
    ),
)


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """The data that a start reads: --init eva, lora-ga."""

    data: str | None = option(
        "--data", metavar="DATA", help="Data that --init eva or lora-ga reads."
    )
    label: str = label_column("Its labels.")
    loss: str = option("--loss", default="ce", help=SCORES)


def _reads_no_data(asked: JsonView) -> bool:
    from lora_fx.adapter.variant import OF_DATA

    return asked["init"] not in OF_DATA


STARTED: Rules = (
    NoSay(("label", "loss"), _reads_no_data, "for --init {0[init]}, which reads no data"),
    NoSay(
        ("loss",), lambda asked: asked["init"] == "eva", "for --init eva, which reads no gradient"
    ),
)


@dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    """The examples that are trained on, those that are held out, and their loss."""

    label: str = label_column("Column to predict.")
    loss: str = option("--loss", default="ce", help=SCORES)
    validation: float = option("--validation", type=float, default=0.1, help="Share held out.")
    eval_data: str | None = option(
        "--eval-data", metavar="FILE", help="Held-out examples, instead of a share of DATA."
    )
    max_length: int | None = count_option("--max-length", MAX_LENGTH)

    def check(self, patience: int | None) -> None:
        """Refuse, before any work, options of the held-out examples that contradict each other."""
        if not 0 <= self.validation < 1:
            raise LoraFxError(f"--validation {self.validation} is not in [0, 1)", "0.1 is usual")
        if patience and not (self.validation or self.eval_data):
            raise LoraFxError("--patience needs held-out examples", "--validation 0.1 is usual")


ABOVE_0 = click.FloatRange(min=0, min_open=True)
FROM_0 = click.FloatRange(min=0)
SHARE = click.FloatRange(min=0, max=1, max_open=True)


class OfLaunch(click.Option):
    """An option that `accelerate launch` always gives, by its environment: a config wins."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Nothing where the table of --config has the option."""
        return None if self.name in (ctx.default_map or {}) else super().resolve_envvar_value(ctx)


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How the loop of train runs, what it writes beside the adapter, and its states."""

    curve: str | None = option(
        "--curve", metavar="FILE.csv", help="Write the losses: step, loss, validation."
    )
    device: str = option("--device", default="cpu", help="cpu or cuda.")
    epochs: float = option("--epochs", type=ABOVE_0, default=3.0, help="Passes over DATA.")
    steps: int | None = count_option("--steps", "Steps, instead of epochs.")
    batch_size: int = option("--batch-size", type=FROM_1, default=32, help="Examples a step.")
    lr: float = option("--lr", type=ABOVE_0, default=1e-3, help="Peak learning rate.")
    schedule: str = option(
        "--schedule",
        default="cosine",
        metavar="NAME",
        help="Of the rate: cosine, linear, constant, constant_with_warmup or inverse_sqrt.",
    )
    optimizer: str = option(
        "--optimizer",
        default="adamw_torch",
        metavar="NAME",
        help="adamw_torch, adamw_torch_fused, sgd, rmsprop or adagrad.",
    )
    weight_decay: float = option(
        "--weight-decay", type=FROM_0, default=0.01, help="Of AdamW, times the rate."
    )
    warmup: float = option(
        "--warmup", type=SHARE, default=0.05, help="Share of the steps that warm up."
    )
    clip: float = option(
        "--clip", type=FROM_0, default=1.0, help="Longest gradient (norm); 0 for any."
    )
    checks: int = option("--checks", type=FROM_1, default=10, help="Validations in the run.")
    patience: int | None = count_option("--patience", "Validations in vain that end the run.")
    accumulate: int = option(
        "--accumulate",
        type=FROM_1,
        default=1,
        metavar="N",
        cls=OfLaunch,
        envvar="ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        help="Parts that a step runs in, one after another, to save memory.",
    )
    gradient_accumulation_steps: int = count_option(
        "--gradient-accumulation-steps", "Batches of --batch-size that make one step.", 1
    )
    activation_checkpointing: bool = flag(
        "--activation-checkpointing", "Recompute blocks in backward."
    )
    mixed_precision: str = option(
        "--mixed-precision",
        type=click.Choice(["no", "bf16"]),
        default="no",
        cls=OfLaunch,
        envvar="ACCELERATE_MIXED_PRECISION",
        help="bf16: products in bfloat16; what is trained stays float32.",
    )
    save_state: str | None = option(
        "--save-state", metavar="DIR", help="Keep a state there to --resume from."
    )
    save_every: int | None = count_option(
        "--save-every", "Steps between two states.  [default: one at every validation]"
    )
    save_total_limit: int | None = count_option(
        "--save-total-limit",
        "Keep the last N states, as DIR/checkpoint-STEP.  [default: the last, as DIR]",
    )
    resume: str | None = option(
        "--resume", metavar="DIR", help="Go on from a state; it is kept current there."
    )

    def settings(self, seed: int) -> Settings:
        """What the loop is asked for.

        Batches that are accumulated are one larger batch that runs in as many more parts.
        """
        from lora_fx.fx.train.state import Settings

        batches = self.gradient_accumulation_steps
        return Settings(
            epochs=self.epochs,
            steps=self.steps,
            batch_size=batches * self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            clip=self.clip,
            checks=self.checks,
            seed=seed,
            patience=self.patience,
            accumulate=batches * self.accumulate,
            mixed_precision=self.mixed_precision,
            schedule=self.schedule,
            optimizer=self.optimizer,
        )

    def saving(self, *, force: bool) -> Saving:
        """Where states are kept; raises, before any work, for what cannot be written."""
        from lora_fx.files.atomic import check_output
        from lora_fx.fx.train.state import Saving, check_folder

        folder = self.save_state or self.resume
        if self.curve:
            check_output(self.curve, force=force)
        if (self.save_every or self.save_total_limit) and not folder:
            name = "--save-every" if self.save_every else "--save-total-limit"
            raise LoraFxError(f"{name}, but no state is kept", "--save-state DIR")
        if folder:
            resume = self.resume
            again = resume is not None and Path(folder).resolve() == Path(resume).resolve()
            check_folder(folder, force=force or again, own=again, limit=self.save_total_limit)
        return Saving(folder, self.save_every, self.resume, self.save_total_limit)


def _validates(asked: JsonView) -> bool:
    return bool(asked["validation"] or asked["eval_data"])


def _keeps_states(asked: JsonView) -> bool:
    """Whether states are kept as often as a validation would run."""
    return bool(asked["save_state"] or asked["resume"]) and not asked["save_every"]


TRAINED: Rules = (
    NoSay(
        ("warmup",),
        lambda asked: asked["schedule"] == "constant",
        "for --schedule constant",
        "--schedule constant_with_warmup has one",
    ),
    NoSay(
        ("validation",),
        lambda asked: bool(asked["eval_data"]),
        "beside --eval-data {0[eval_data]}",
        "leave one of them out",
    ),
    NoSay(
        ("epochs",),
        lambda asked: asked["steps"] is not None,
        "beside --steps {0[steps]}",
        "leave one of them out",
    ),
    NoSay(
        ("checks",),
        lambda asked: not _validates(asked) and not _keeps_states(asked),
        "where no example is held out, and no state is kept at a validation",
    ),
)


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """What a merge into a checkpoint writes, and what it accepts."""

    dtype: str | None = option(
        "--dtype",
        metavar="DTYPE",
        help="Of touched tensors: bf16, fp16, fp32, fp64.  [default: as stored]",
    )
    allow_unused: bool = flag(
        "--allow-unused", "Leave out updates that the base has no tensor for."
    )
    allow_missing: bool = flag(
        "--allow-missing", "Accept an adapter that lacks layers its config has."
    )
    any_base: bool = flag("--any-base", "Merge into other weights than it was trained on.")
    other_readers: bool = flag(
        "--other-readers", "Merge where more than its products reads a weight."
    )
    untie: bool = flag("--untie", "Give a tied output head a tensor of its own.")
    add: bool = flag("--add", "Add whole tensors that the base lacks: a new head.")
    again: bool = flag("--again", "Merge an adapter that is in the base already.")
    dequantise: bool = flag("--dequantise", "Store the weights of a quantised base as floats.")
    requantise: bool = flag("--requantise", "Store them as codes again, with the update in them.")
    lossy: bool = flag("--lossy", "Of --requantise: also where that loses most of the update.")
    link: bool = flag("--link", "Hard links for untouched files, instead of copies.")
    trust: bool = flag("--trust", TRUST)
    max_shard_size: str | None = option(
        "--max-shard-size", metavar="SIZE", help="Of --dequantise.  [default: 5GB]"
    )

    def merge(self, how: str = "sum", rank: int | None = None) -> MergeOptions:
        """What a merge is asked for; raises for options that contradict each other.

        Args:
            how: How several adapters become one.
            rank: The rank of an svd mix.
        """
        from lora_fx.checkpoint.merge_plan import MergeOptions

        return MergeOptions(
            how=how,
            rank=rank,
            dtype=self.dtype,
            allow_unused=self.allow_unused,
            untie=self.untie,
            add=self.add,
            again=self.again,
            allow_missing=self.allow_missing,
            any_base=self.any_base,
            other_readers=self.other_readers,
            trust=self.trust,
            dequantise=self.dequantise,
            requantise=self.requantise,
            lossy=self.lossy,
            max_shard_size=self.max_shard_size,
        )
