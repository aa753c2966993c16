"""What a verb is asked for: one frozen object, made and checked in the verb's first line.

The fields are the arguments of the public functions, which say what they mean. An object that
exists is in order: whatever the options alone show to be wrong was refused when it was made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Dense, Hadamard, Kronecker, ReplacedRows, Rotation, name_of
from lora_fx.adapter.variant import (
    OF_DATA,
    asked,
    check_init,
    named_variant,
    names_taken,
    variant_of,
)
from lora_fx.compare import Parity
from lora_fx.dtypes import long_name
from lora_fx.errors import (
    LoraFxError,
    NoSay,
    expect,
    expect_name,
    given_options,
    refuse_no_say,
)
from lora_fx.inputs import Dynamic, Named
from lora_fx.targets.plan import GivenRanks, Plan, RankPlan, make_plan, select_names
from lora_fx.targets.target import Found
from lora_fx.text import is_whole

if TYPE_CHECKING:
    from lora_fx.fx.train.loss import Loss
    from lora_fx.onnx.manifest import Manifest
    from lora_fx.onnx.output_file import Output
    from lora_fx.onnx.place import Place

Dead = Literal["auto", "error", "drop", "keep", "allow"]
NormStats = Literal["frozen", "update"]
Provider = Literal["auto", "cpu", "cuda"]
Selectors = str | Sequence[str] | None
"""A comma list, or a list of them; None where none was given."""
ExportAdapters = Adapter | Mapping[str, Adapter] | Sequence[Adapter]
"""One, or several: by name, or in the order of their ids."""


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """How a MODEL becomes a Captured; see `lora_fx.passes.verbs.open.captured_of`.

    Attributes:
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        dynamic: Dimensions that may vary, as in `lora_fx.capture`.
        static: Dimensions that may not, as there.
        repeat: Trace a block that repeats once, as there.
        cache: Capture a decoder with its key-value cache as tensors.
        check: Of such a decoder: called with its config before it is captured; it may raise.
        weights: The file of weights of a model that a name builds.
        meta: Read no weights of a model that is opened by its name.
        trust: Read pickled tensors, by torch's unpickler that runs no code.
        adapter: What the model is to hold: where it has a whole tensor for one name of a tied one,
            the capture is of a copy of the model in which this name has a tensor of its own.
        with_branches: A module that holds an adapter is captured as any other, its branches
            included; else it stands for the model that it was made from.
        example_sizes: Trace at the sizes of the example alone.
        tell: Called with what loading has to say, before the capture begins; without it the
            capture has these among its notes.
    """

    args: Sequence[object] = ()
    kwargs: Named | None = None
    dynamic: Dynamic | None = None
    static: Sequence[str] = ()
    repeat: bool = True
    cache: bool = False
    check: Callable[[Any], object] | None = None
    weights: str | None = None
    meta: bool = False
    trust: bool = False
    adapter: Adapter | None = None
    with_branches: bool = False
    example_sizes: bool = False
    tell: Callable[..., object] | None = None

    def __post_init__(self) -> None:
        """Raise for inputs beside a cache, whose inputs are all known."""
        if self.cache and (self.args or self.kwargs or self.dynamic or self.static):
            raise LoraFxError(*KNOWN_WITH_CACHE)

    def refuse_for_captured(self) -> None:
        """Raise for other sizes or weights of a model that is captured already.

        Example inputs are let be: a caller who passes those of the capture again asks for nothing
        else.
        """
        asked: Named = {"dynamic": self.dynamic, "static": self.static, "weights": self.weights}
        given = {name: value or None for name, value in asked.items()}
        captured = NoSay[Named](tuple(given), bool, "beside a captured model, which has its sizes")
        refuse_no_say([captured], given, given_options(given))


KNOWN_WITH_CACHE = (
    "with a cache the inputs and their dimensions are known",
    "leave inputs and their dimensions out",
)
"""Message and hint where inputs are given beside a cache."""


def _plan_says(options: BranchOptions, what: str) -> bool:
    """Whether a plan has another rank or alpha than was asked for, for every target that it names.

    One that it has already is no contradiction.
    """
    plan = options.plan.ranks if isinstance(options.plan, RankPlan) else options.plan
    if not isinstance(plan, Mapping):
        return plan is not None
    rows = [row if isinstance(row, Mapping) else {"rank": row} for row in plan.values()]
    wanted = getattr(options, what)
    return all(what in row for row in rows) and any(row[what] != wanted for row in rows)


BRANCH_RULES: tuple[NoSay[BranchOptions], ...] = (
    NoSay(("rank",), lambda o: _plan_says(o, "rank"), "beside a plan, which has every target's"),
    NoSay(("alpha",), lambda o: _plan_says(o, "alpha"), "beside a plan, which has every target's"),
    NoSay(("include",), lambda o: o.plan is not None, "beside a plan, which names its targets"),
    NoSay(("exclude", "also_train"), lambda o: isinstance(o.plan, Plan), "beside a whole Plan"),
)
"""Of an insert into a graph of either IR."""


@dataclass(frozen=True, kw_only=True)
class BranchOptions:
    """What an insert into a graph of either IR is asked for; see `lora_fx.insert`."""

    rules: ClassVar[tuple[NoSay[Any], ...]] = BRANCH_RULES
    """When an option has no say."""
    rank: int = 8
    alpha: float | None = None
    include: Selectors = None
    exclude: Selectors = None
    plan: Plan | GivenRanks | None = None
    variant: str = "lora"
    seed: int = 0
    init: str = "kaiming"
    dead: str = "auto"

    @classmethod
    def of(cls, wanted: Named) -> Self:
        """The options that were asked for; those that are None have their defaults.

        Raises:
            LoraFxError: One was given that has no say.
        """
        given = {name: value for name, value in wanted.items() if value is not None}
        options = cls(**given)
        refuse_no_say(cls.rules, options, given_options(given))
        return options

    def __post_init__(self) -> None:
        """Raise for a name that is not known; dead="auto" takes its meaning."""
        expect(self.alpha or 0, (int, float), "alpha", "a number", "2·rank is usual")
        for name in ("include", "exclude", "also_train"):
            expect_selectors(getattr(self, name, None), name)
        named_variant(self.variant)
        check_init(self.init)
        if self.dead == "auto":
            named = "error" if self.include or self.plan is not None else "drop"
            given = getattr(self, "adapter", None) is not None
            object.__setattr__(self, "dead", "keep" if given else named)
        if self.dead not in ("error", "drop", "keep", "allow"):
            raise LoraFxError(f"dead {self.dead!r} is not known", "auto, error, drop, keep, allow")

    def planned(self, found: Found, names: Mapping[str, str] | None = None) -> Plan:
        """The plan of a model's targets; see `lora_fx.targets.plan.make_plan`."""
        if isinstance(self.plan, Plan):
            return self.plan
        return make_plan(
            found, names or {}, rank=self.rank, alpha=self.alpha, include=self.include,
            exclude=self.exclude, also_train=getattr(self, "also_train", None), ranks=self.plan,
        )  # fmt: skip


def _others(options: InsertOptions, place: int) -> bool:
    """Whether an adapter has another rank (0) or alpha (1) than was asked for.

    One that it has already is no contradiction: the module is what was asked for.
    """
    if options.adapter is None:
        return False
    wanted = (options.rank, options.alpha)[place]
    return any(asked(update)[place] != wanted for update in options.adapter.lowrank.values())


def _of_other_variant(options: InsertOptions) -> bool:
    """Whether an adapter has an update of another variant than was asked for."""
    if options.adapter is None:
        return False
    wanted = named_variant(options.variant)
    return any(variant_of(update) != wanted for update in options.adapter.lowrank.values())


INSERT_RULES: tuple[NoSay[InsertOptions], ...] = (
    NoSay(
        ("rank",), lambda o: _others(o, 0), "beside an adapter, which brings its own",
        "leave it out, or the adapter",
    ),
    NoSay(
        ("alpha",), lambda o: _others(o, 1), "beside an adapter, which brings its own",
        "leave it out, or the adapter",
    ),
    NoSay(
        ("variant",), _of_other_variant, "beside an adapter, which brings its own",
        "leave it out, or the adapter",
    ),
    NoSay(
        ("init", "seed", "data", "loss"),
        lambda o: o.adapter is not None,
        "beside an adapter, which brings its own",
        "leave it out, or the adapter",
    ),
    NoSay(
        ("data",), lambda o: o.init not in OF_DATA, "for init {0.init!r}, which reads no data",
        f"leave it out, or --init {' or '.join(OF_DATA)}",
    ),
    NoSay(
        ("loss",), lambda o: o.init != "lora-ga", "for init {0.init!r}, which reads no gradient",
        "leave it out, or --init lora-ga",
    ),
)  # fmt: skip
"""Of an insert of a model of torch, beside those of any insert."""


@dataclass(frozen=True, kw_only=True)
class InsertOptions(BranchOptions):
    """What `lora_fx.insert` and `lora_fx.attach` are asked for; attach has no `fast`."""

    rules = (*INSERT_RULES, *BRANCH_RULES)
    also_train: Selectors = None
    dropout: float = 0.0
    adapter: Adapter | None = None
    norm_stats: str = "frozen"
    data: Iterable[Named] | None = None
    loss: str | Loss = "ce"
    fast: bool = True

    def __post_init__(self) -> None:
        """Raise for what is not known, out of range, or excludes something else."""
        super().__post_init__()
        if self.init in OF_DATA and self.data is None:
            raise LoraFxError(
                f"init {self.init!r} starts from data, and there is none",
                "--data FILE",
            )
        expect(self.dropout, (int, float), "dropout", "a number", "0.05 is usual")
        if not 0.0 <= self.dropout < 1.0:
            raise LoraFxError(f"dropout {self.dropout} is not in [0, 1)", "0.05 is usual")
        if self.norm_stats not in ("frozen", "update"):
            raise LoraFxError(f"no norm_stats {self.norm_stats!r}", "frozen or update")
        chosen = self.include or self.exclude or self.also_train or self.plan is not None
        if self.adapter is not None:
            check_kinds(self.adapter, "the adapter", "a graph")
        if self.adapter is not None and chosen:
            raise LoraFxError(
                "an adapter brings its own targets and ranks",
                "leave out include, exclude, also_train and plan, or the adapter",
            )

    def whole(self, names: Mapping[str, str]) -> set[str]:
        """The first names of what is trained whole, or comes whole with the adapter."""
        named = select_names(list(names), self.also_train or ())
        return {names.get(n, n) for n in (*named, *(self.adapter.full if self.adapter else ()))}

    @property
    def notes(self) -> tuple[str, ...]:
        """Options that have no say beside others."""
        if not self.dropout or not named_variant(self.variant).reads_weight:
            return ()
        acts = f"dropout {self.dropout:g} acts on branches"
        return (f"{acts}, and {self.variant} computes its weight instead",)


MODES: Mapping[str, tuple[str, ...]] = {
    "switch": ("include", "exclude"),
    "batch": ("scales",),
    "merged": ("optimise", "precision"),
    "load": ("rank",),
    "train": ("loss", "optimizer", "weight_decay", "clip"),
}
"""Mode of export → the options that it alone has; load has those of switch too, train of both."""
PRECISIONS = ("float32", "bfloat16", "float16", "int8")


def check_kinds(adapter: Adapter, name: str, taker: str, *, reading_weight: bool = True) -> None:
    """Raise for an update that no graph can hold, which the adapter alone tells.

    Args:
        adapter: Bound or not.
        name: What the message calls it.
        taker: What should take it, such as "mode switch".
        reading_weight: A variant that reads W itself is taken.
    """
    for key, entry in adapter.entries.items():
        reads = isinstance(entry, LowRank) and variant_of(entry).reads_weight
        other = isinstance(entry, (Hadamard, Kronecker, Rotation))
        if other or (reads and not reading_weight):
            *names, last = names_taken(reading_weight=reading_weight)
            known = f"{', '.join(names)} and {last}"
            raise LoraFxError(
                f"{name}: {key!r} is {name_of(entry)}; {taker} takes {known}",
                f"lora-fx convert {name} -o OUT --as lora --base MODEL approximates it, and says "
                "how well",
            )


def check_adapters(adapters: Mapping[str, Adapter], mode: str) -> None:
    """Raise for what an adapter holds and a file of a mode has no place for.

    The adapters alone tell, so this comes before a model is captured. Mode switch folds the whole
    tensors of a single adapter into the base.
    """
    for name, adapter in adapters.items():
        check_kinds(adapter, name, f"mode {mode}", reading_weight=mode in ("merged", "train"))
        entries = adapter.entries.items()
        whole = [key for key, entry in entries if isinstance(entry, (Full, Dense, ReplacedRows))]
        alone = mode == "switch" and len(adapters) == 1
        if whole and mode not in ("merged", "train") and not alone:
            raise LoraFxError(
                f"{name}: it holds the whole tensor {whole[0]!r}; mode {mode} has a place for low-"
                "rank updates alone",
                exclude_hint(name, whole),
            )
        if mode == "batch":
            check_rows(adapter, name)


RECURRENT = ("lstm", "gru", "rnn")
"""How the ops of recurrent layers begin."""


def check_rows(adapter: Adapter, name: str) -> None:
    """Raise for updates that a row of mode batch cannot have, as the op in the file tells."""
    kinds = {key: _without_rows(entry) for key, entry in adapter.lowrank.items()}
    refused = [key for key, kind in kinds.items() if kind]
    if refused:
        raise LoraFxError(
            f"{name}: {refused[0]!r} is of {kinds[refused[0]]}; mode batch has no form by row for "
            f"it{f', nor for {len(refused) - 1} more' if len(refused) > 1 else ''}",
            f"{_exclude_command(name, refused)} leaves it out; modes switch and load take it",
        )


def _without_rows(entry: LowRank) -> str:
    """What the weight of an update is, where mode batch has no form for it; empty where it has."""
    op = entry.origin.op
    if op.startswith("conv_transpose"):
        return "a transposed convolution"
    if op.startswith(RECURRENT):
        return "a recurrent layer"
    if entry.a.ndim > 2:
        return "a grouped convolution" if op.startswith("conv") else "a stack of matrices"
    return ""


def exclude_hint(name: str, keys: Sequence[str]) -> str:
    """How to go on without the whole tensors of an adapter, or with them in the base."""
    return (
        f"{_exclude_command(name, keys)} leaves it out; with --include in its place, OUT holds it "
        "alone, and lora-fx merge puts that into the base"
    )


def _exclude_command(name: str, keys: Sequence[str]) -> str:
    """The command that writes an adapter without some keys."""
    modules = list(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", key) for key in keys))
    return f"lora-fx convert {name} -o OUT --exclude {','.join(modules[:8])}"


def expect_selectors(given: object, name: str) -> None:
    """Refuse what is no comma list and no list of them; nothing at all is taken."""
    expect(given or "", (str, Collection), name, "selectors", f"{name}=['q_proj', 'fc1']")


def is_given(option: object) -> bool:
    """Whether an option of a mode has a value; an empty sequence is none."""
    empty = isinstance(option, Sequence) and not option
    return option is not None and option is not False and not empty


@dataclass(frozen=True)
class Companions:
    """What was proven and written beside a file over its data, and what has to be said."""

    parity: Sequence[Parity] = ()
    files: Sequence[Path] = ()
    warnings: Sequence[str] = ()


EXPORT_RULES: tuple[NoSay[ExportOptions], ...] = (
    NoSay(
        ("external_over",), lambda o: o.mode == "train",
        "in mode train, whose two files share the weights of a third",
    ),
)  # fmt: skip
"""Of every export, beside those of its mode, which ExportOptions knows."""
REWRITE_RULES: tuple[NoSay[ExportOptions], ...] = (
    NoSay(
        ("inputs", "within"),
        lambda o: o.mode == "merged" and not o.rewrites,
        "where an adapter is merged into an .onnx file, which is compared tensor by tensor",
        "leave it out; --optimise and --precision run the file, and lora-fx merge --run does",
    ),
)
"""Of an export of an .onnx file."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What `lora_fx.export` is asked for; it has the defaults, and says what the fields mean."""

    target: Path
    adapters: ExportAdapters | None
    mode: str
    include: Selectors
    exclude: Selectors
    rank: int | None
    scales: bool
    names: Mapping[str, str] | None
    inputs: Named | None
    provider: str
    opset: int | None
    external_over: int
    capture: CaptureOptions
    force: bool
    optimise: bool
    precision: str | None
    places: Sequence[Place]
    within: bool = False
    accuracy_level: int = 0
    loss: str | Loss | None = None
    optimizer: str | None = None
    weight_decay: float | None = None
    clip: float | None = None
    owner: Path | None = None
    also: Callable[[Output, Manifest], Companions] | None = None
    tol: float | None = None

    def __post_init__(self) -> None:
        """Raise for a mode that is not known, and for an option that it would ignore."""
        expect_name(self.mode, MODES, "no mode", "merged, switch, load, batch or train")
        for mode, names in MODES.items():
            more = {"load": ("switch",), "train": ("switch", "load")}.get(self.mode, ())
            if mode not in (self.mode, *more) and any(is_given(getattr(self, n)) for n in names):
                raise LoraFxError(
                    f"mode {self.mode} would ignore what is for mode {mode}: {' and '.join(names)}",
                    "leave it out",
                )
        for name in ("include", "exclude"):
            expect_selectors(getattr(self, name), name)
        if self.rank is not None and (not is_whole(self.rank) or self.rank < 1):
            raise LoraFxError(
                f"rank {self.rank!r} is not a positive whole number", "8 or 16 is usual"
            )
        object.__setattr__(self, "precision", long_name(self.precision))
        if self.precision is not None:
            known = "float32, bfloat16, float16 or int8"
            expect_name(self.precision, PRECISIONS, "no precision", known)
        if self.precision == "int8" and self.optimise:
            raise LoraFxError(
                "int8 starts from the graph as exported: fused nodes would stay in float32",
                "leave --optimise out",
            )
        exact = self.mode in ("batch", "train")
        if self.accuracy_level not in (0, 4) or (self.accuracy_level and exact):
            raise LoraFxError(
                f"no accuracy level {self.accuracy_level} in mode {self.mode}",
                "0, or 4 in merged, switch and load: x in int8 for products over codes",
            )
        if self.capture.cache and self.mode == "train":
            raise LoraFxError("mode train has no cache", "merged, switch, load or batch")
        if self.mode == "train":
            self._check_step()
        if self.tol is not None:
            self._check_tol(self.tol)

    def _check_step(self) -> None:
        if not callable(self.loss) and self.loss not in (None, "ce", "mse"):
            raise LoraFxError(f"no loss {self.loss!r}", "ce, mse or module:function")
        if self.optimizer not in (None, "adamw", "sgd"):
            raise LoraFxError(f"no optimizer {self.optimizer!r}", "adamw or sgd")
        for name in ("weight_decay", "clip"):
            given = getattr(self, name)
            expect(given or 0, Real, name, "a number", f"{name}=0.01")
            if given is not None and not 0 <= given < math.inf:
                raise LoraFxError(f"{name} {given} is not 0 or more", "0 leaves it out")
        if self.places:
            raise LoraFxError("a server takes no training step", "--triton with --mode switch")

    def _check_tol(self, tol: float) -> None:
        from lora_fx.onnx.precision import GATES  # as in output

        expect(tol, (int, float), "tol", "a number", "0.1 accepts a tenth of the largest")
        rounding = f"level {self.accuracy_level}" if self.accuracy_level else self.precision or ""
        gate = GATES.get(rounding, 1.0)
        if not gate < tol < 1:
            more = f"more than the gate of {rounding}, {gate:g}, and less than 1"
            raise LoraFxError(
                f"tol is {tol:g}; expected {more if gate < 1 else 'none: nothing is rounded here'}",
                "leave --tol out; or give --precision float16, int8 or --accuracy-level 4 too",
            )

    def capture_of_base(self) -> CaptureOptions:
        """How the base is captured: for the adapter, where there is one alone."""
        if isinstance(self.adapters, Adapter):
            return replace(self.capture, adapter=self.adapters)
        values = self.adapters.values() if isinstance(self.adapters, Mapping) else self.adapters
        adapters = [*(values or ())]
        return replace(self.capture, adapter=adapters[0] if len(adapters) == 1 else None)

    @property
    def rewrites(self) -> bool:
        """Whether the graph of an .onnx file is rewritten beyond its weights, and so run."""
        return self.optimise or self.precision is not None

    def output(self) -> AbstractContextManager[Output]:
        """The file, and its copies, which get their names when the block ends."""
        # insert and merge share this file and need no ONNX
        from lora_fx.onnx.output_file import output

        return output(self.target, force=self.force, places=self.places, owner=self.owner)

    def chosen(self, found: Found, adapters: Mapping[str, Adapter]) -> tuple[list[str], bool]:
        """The targets, and whether the default plan chose them: some may be left out then."""
        keys = list(dict.fromkeys(key for a in adapters.values() for key in a))
        if keys and not self.include and not self.exclude:
            return keys, False
        plan = make_plan(found, {}, rank=1, include=self.include, exclude=self.exclude)
        return list(plan.entries), not self.include
