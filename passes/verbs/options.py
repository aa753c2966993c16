"""The options of each verb: one frozen object, made and checked in the verb's first line.

The fields are the arguments of the public functions, which say what they mean. An object that
exists is in order: whatever the options alone show to be wrong was refused when it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.invocation import checked
from lora_fx.adapter.starts import OF_DATA, OF_WEIGHT, check_init
from lora_fx.adapter.variant import asked, named_variant, variant_of
from lora_fx.errors import (
    LoraFxError,
    NoSay,
    expect,
    given_options,
    refuse_no_say,
)
from lora_fx.inputs import Dynamic, Named
from lora_fx.passes.verbs.refused_updates import check_kinds
from lora_fx.targets.found import Found
from lora_fx.targets.plan import Plan, make_plan
from lora_fx.targets.rank_plan import GivenRanks, RankPlan
from lora_fx.targets.selectors import select_names

if TYPE_CHECKING:
    from lora_fx.fx.train.loss import Loss

Dead = Literal["auto", "error", "drop", "keep", "allow"]
NormStats = Literal["frozen", "update"]
Provider = Literal["auto", "cpu", "cuda", "webgpu"]
Selectors = str | Sequence[str] | None
"""A comma list, or a list of comma lists; None if no selectors are given."""
ExportAdapters = Adapter | Mapping[str, Adapter] | Sequence[Adapter]
"""One adapter, or several: by name, or in the order of their ids."""


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """The options of a capture of MODEL; see `lora_fx.passes.verbs.open.captured_of`.

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
        later: Trace nothing yet: its caller has something to say of the example.
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
    later: bool = False

    def __post_init__(self) -> None:
        """Raise for `static` of another type, and for inputs together with a cache."""
        if isinstance(self.static, str):
            raise LoraFxError(
                f"static is the text {self.static!r}; expected a list of inputs, NAME or NAME:DIM",
                f"static=[{self.static!r}]",
            )
        for text in self.static:
            expect(text, str, "static", "a list of inputs, NAME or NAME:DIM", "pass static=['x:1']")
        if self.cache and (self.args or self.kwargs or self.dynamic or self.static):
            raise LoraFxError(*KNOWN_WITH_CACHE)

    def refuse_for_captured(self) -> None:
        """Raise for other sizes or weights of a model that is already captured.

        Example inputs are allowed: a caller may pass the inputs of the capture again.
        """
        options: Named = {
            "dynamic": self.dynamic or None,
            "static": self.static or None,
            "weights": self.weights or None,
        }
        rule = NoSay[Named](
            tuple(options), bool, "with a captured model, which has its sizes and weights already"
        )
        refuse_no_say([rule], options, given_options(options))


KNOWN_WITH_CACHE = (
    "with a cache, lora-fx sets the inputs and their dimensions itself",
    "leave inputs and their dimensions out",
)
"""The message and the hint for inputs that are given together with a cache."""


def _plan_says(options: BranchOptions, what: str) -> bool:
    """Whether a plan names the rank or alpha of each target and differs from the option.

    A plan that has the option's value already is no contradiction.
    """
    plan = options.plan
    if isinstance(plan, RankPlan):
        plan = plan.ranks
    if not isinstance(plan, Mapping):
        return plan is not None
    rows = [row if isinstance(row, Mapping) else {"rank": row} for row in plan.values()]
    if not all(what in row for row in rows):
        return False
    return any(row[what] != getattr(options, what) for row in rows)


BRANCH_RULES: tuple[NoSay[BranchOptions], ...] = (
    NoSay(
        ("rank",),
        lambda o: _plan_says(o, "rank"),
        "with a plan, which sets the rank of every target",
    ),
    NoSay(
        ("alpha",),
        lambda o: _plan_says(o, "alpha"),
        "with a plan, which sets the alpha of every target",
    ),
    NoSay(
        ("alpha",),
        lambda o: named_variant(o.variant).scale_is_one,
        "with variant vera, whose scale is 1",
    ),
    NoSay(("include",), lambda o: o.plan is not None, "with a plan, which names its targets"),
    NoSay(
        ("exclude", "also_train"),
        lambda o: isinstance(o.plan, Plan),
        "with a Plan object, which holds every target",
    ),
)
"""The rules of insert's options for torch and .onnx graphs."""


@dataclass(frozen=True, kw_only=True)
class BranchOptions:
    """The options of an insert into a torch or an .onnx graph; see `lora_fx.insert`."""

    rules: ClassVar[tuple[NoSay[Any], ...]] = BRANCH_RULES
    """The rules that say when an option has no effect."""
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
        """Return options made from the given values; None leaves an option at its default.

        Raises:
            LoraFxError: One was given that has no effect.
        """
        keywords = {name: value for name, value in wanted.items() if value is not None}
        options = cls(**keywords)
        refuse_no_say(cls.rules, options, given_options(keywords))
        return options

    def __post_init__(self) -> None:
        """Raise for an unknown name, and replace dead="auto" by the value it stands for."""
        expect(
            self.alpha or 0,
            (int, float),
            "alpha",
            "a number",
            "leave it out for the default, 2·rank",
        )
        for name in ("include", "exclude", "also_train"):
            expect_selectors(getattr(self, name, None), name)
        named_variant(self.variant)
        check_init(self.init)
        if self.dead == "auto":
            object.__setattr__(self, "dead", self._dead_by_default())
        if self.dead not in ("error", "drop", "keep", "allow"):
            raise LoraFxError(
                f"unknown value {self.dead!r} of dead", "use auto, error, drop, keep or allow"
            )

    def _dead_by_default(self) -> str:
        """Return the value of dead="auto", which depends on what selected the targets."""
        if getattr(self, "adapter", None) is not None:
            return "keep"
        if self.include or self.plan is not None:
            return "error"
        return "drop"

    def planned(self, found: Found, names: Mapping[str, str] | None = None) -> Plan:
        """The plan of a model's targets; see `lora_fx.targets.plan.make_plan`."""
        if isinstance(self.plan, Plan):
            return self.plan
        return make_plan(
            found, names or {}, rank=self.rank, alpha=self.alpha, include=self.include,
            exclude=self.exclude, also_train=getattr(self, "also_train", None), ranks=self.plan,
        )  # fmt: skip


def _of_other_rank(options: InsertOptions) -> bool:
    """Whether the given adapter has an update whose rank differs from the option.

    An adapter of the same rank is no contradiction: the module is what was asked for.
    """
    if options.adapter is None:
        return False
    return any(asked(update)[0] != options.rank for update in options.adapter.lowrank.values())


def _of_other_alpha(options: InsertOptions) -> bool:
    """Whether the given adapter has an update whose alpha differs from the option."""
    if options.adapter is None:
        return False
    return any(asked(update)[1] != options.alpha for update in options.adapter.lowrank.values())


def _of_other_variant(options: InsertOptions) -> bool:
    """Whether the given adapter has an update whose variant differs from the option."""
    if options.adapter is None:
        return False
    variant = named_variant(options.variant)
    return any(variant_of(update) != variant for update in options.adapter.lowrank.values())


INSERT_RULES: tuple[NoSay[InsertOptions], ...] = (
    NoSay(
        ("rank",), _of_other_rank, "with an adapter, which has its own",
        "leave out this option or the adapter",
    ),
    NoSay(
        ("alpha",), _of_other_alpha, "with an adapter, which has its own",
        "leave out this option or the adapter",
    ),
    NoSay(
        ("variant",), _of_other_variant, "with an adapter, which has its own",
        "leave out this option or the adapter",
    ),
    NoSay(
        ("init", "seed", "data", "loss"),
        lambda o: o.adapter is not None,
        "with an adapter, which has its own",
        "leave out this option or the adapter",
    ),
    NoSay(
        ("data",), lambda o: o.init not in OF_DATA, "for init {0.init!r}, which reads no data",
        f"leave it out, or use --init {' or '.join(OF_DATA)}",
    ),
    NoSay(
        ("loss",), lambda o: o.init != "lora-ga", "for init {0.init!r}, which reads no gradient",
        "leave it out, or use --init lora-ga",
    ),
)  # fmt: skip
"""The rules of insert's options for torch models, in addition to BRANCH_RULES."""


@dataclass(frozen=True, kw_only=True)
class InsertOptions(BranchOptions):
    """The options of `lora_fx.insert` and `lora_fx.attach`; attach has no `fast`."""

    rules = (*INSERT_RULES, *BRANCH_RULES)
    also_train: Selectors = None
    dropout: float = 0.0
    adapter: Adapter | None = None
    norm_stats: str = "frozen"
    data: Iterable[Named] | None = None
    loss: str | Loss = "ce"
    fast: bool = True
    invocation: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Raise for an option that is unknown, out of range, or excluded by another option."""
        super().__post_init__()
        if self.invocation is not None:
            self._check_invocation(checked(self.invocation, "invocation"))
        if self.init in OF_DATA and self.data is None:
            raise LoraFxError(
                f"init {self.init!r} starts from data, but no data was given",
                "pass --data FILE",
            )
        expect(self.dropout, (int, float), "dropout", "a number", "pass 0.05, for example")
        if not 0.0 <= self.dropout < 1.0:
            raise LoraFxError(f"dropout {self.dropout} is not in [0, 1)", "pass 0.05, for example")
        if self.norm_stats not in ("frozen", "update"):
            raise LoraFxError(f"unknown norm_stats {self.norm_stats!r}", "use frozen or update")
        if self.adapter is not None:
            self._check_adapter(self.adapter)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens from which on the updates act; empty for all tokens."""
        if self.adapter is not None:
            return self.adapter.invocation
        return tuple(self.invocation or ())

    def _check_invocation(self, tokens: tuple[int, ...]) -> None:
        """Raise for what cannot be masked by token, and for an adapter that acts otherwise."""
        variant = named_variant(self.variant)
        if variant.reads_weight or variant.constant_over or variant.peft_type != "LORA":
            raise LoraFxError(
                f"invocation with variant {self.variant!r}: an aLoRA is plain LoRA, masked by "
                "token",
                "use variant lora, rslora, lora-fa or lora+",
            )
        if self.init in OF_WEIGHT:
            raise LoraFxError(
                f"invocation with init {self.init!r}, which subtracts a part of W for every token",
                "use init kaiming, gaussian or orthogonal",
            )
        if self.adapter is not None and self.adapter.invocation != tokens:
            raise LoraFxError(
                f"invocation is {[*tokens]}, and the adapter has {[*self.adapter.invocation]}",
                "leave invocation out: an adapter brings its own",
            )

    def _check_adapter(self, adapter: Adapter) -> None:
        """Raise for updates that a graph cannot hold, and for targets other than the adapter's."""
        check_kinds(adapter, "the adapter", "a graph")
        selectors = (self.include, self.exclude, self.also_train)
        if any(selectors) or self.plan is not None:
            raise LoraFxError(
                "an adapter brings its own targets and ranks",
                "leave out include, exclude, also_train and plan, or the adapter",
            )

    def whole(self, names: Mapping[str, str]) -> set[str]:
        """Return the first names of tensors that are trained whole or that the adapter holds."""
        chosen = [*select_names(list(names), self.also_train or ())]
        if self.adapter:
            chosen += self.adapter.full
        return {names.get(name, name) for name in chosen}

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on options that have no effect together with other options."""
        if not self.dropout or not named_variant(self.variant).reads_weight:
            return ()
        return (
            f"dropout {self.dropout:g} has no effect: it acts on branches, and {self.variant} "
            "computes its weight instead",
        )


def expect_selectors(given: Any, name: str) -> None:
    """Raise for anything but a comma list, a list of comma lists, or None."""
    expect(
        given or "",
        (str, Collection),
        name,
        "selectors",
        f"pass {name}=['q_proj', 'fc1'], for example",
    )
    for selector in () if isinstance(given, str) else given or ():
        expect(
            selector,
            str,
            f"the selector {selector!r} of {name}",
            "a text",
            f"pass {name}=['q_proj', 'fc1'], for example",
        )


def is_given(option: object) -> bool:
    """Whether an option of a mode has a value; an empty sequence does not count as a value."""
    if option is None or option is False:
        return False
    return not (isinstance(option, Sequence) and not option)
