"""The module of a capture and its updates, proven; and what those updates start from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.adapter.factors import relearning
from lora_fx.adapter.initial import OF_DATA, OF_WEIGHT, check_init, initial
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant import named_variant
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module import with_signature
from lora_fx.passes.clean import Clean
from lora_fx.passes.find import find
from lora_fx.passes.fuse import Fuse
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.effect import prove_effect
from lora_fx.passes.recompute import Recompute
from lora_fx.passes.share import Share
from lora_fx.targets.found import Found
from lora_fx.targets.plan import Plan, make_plan


def check_variant(variant: str, init: str, dropout: float, data: object) -> tuple[str, ...]:
    """Notes on what options have no say together; raises for a name that is not known."""
    kind = named_variant(variant)
    check_init(init)
    if init in OF_DATA and data is None:
        raise LoraFxError(
            f"init {init!r} starts from data, and there is none", "data=… in Python, --data FILE"
        )
    if dropout and not kind.branches:
        return (f"dropout {dropout:g} acts on branches, and {variant} computes its weight instead",)
    return ()


def started(
    cap: Captured | None,
    found: Found,
    plan: Plan,
    read: Callable[[str], Array],
    variant: str,
    seed: int,
    init: str,
    data: Iterable[Mapping[str, Any]] | None,
    loss: Any,
) -> tuple[dict[str, LowRank], tuple[str, ...]]:
    """See `lora_fx.adapter.initial.initial`.

    Args:
        cap: The model, for a start from data.
        found: Its targets.
        plan: Target key → rank and alpha.
        read: The stored tensor of a parameter.
        variant: A name of `lora_fx.adapter.variant`.
        seed: Each target draws from (seed, key).
        init: A name of `lora_fx.adapter.initial`.
        data: Batches by argument name, for eva and lora-ga.
        loss: ce, mse, or a function of (output, labels).
    """
    moments, said = None, tuple[str, ...]()
    if init in OF_DATA:
        from lora_fx.passes.verbs.calibrate import calibrate

        if cap is None or data is None:
            raise LoraFxError(f"init {init!r} needs a model that one graph can hold, and data")
        uses = {key: entry.use for key, entry in plan.entries.items()}
        seen = calibrate(cap, uses, data, loss, (OF_DATA[init],))
        moments, said = seen.moments, seen.notes
    wanted = init in OF_WEIGHT or not named_variant(variant).branches
    made, notes = initial(found, plan, variant, seed, init, read if wanted else None, moments)
    return made, (*said, *notes)


def adapted_module(
    cap: Captured,
    found: Found,
    updates: Mapping[str, LowRank],
    whole: Sequence[str],
    notes: Sequence[str],
    metadata: Mapping[str, Any],
    dropout: float,
    norm_stats: str,
    fast: bool,
) -> AdaptedModule:
    """The module of these updates, before anything is proven of it."""

    def inserter(now: Mapping[str, LowRank], training: bool) -> Callable[[FxGraph], Any]:
        return Insert(now, dropout=dropout, training=training, missing="skip")

    module = with_signature(AdaptedModule, cap)(
        cap,
        found,
        updates,
        inserter,
        also_train=whole,
        norm_stats=norm_stats,
        notes=notes,
        metadata=metadata,
        speedups=speedups if fast else None,
    )
    assert isinstance(module, AdaptedModule)
    return module


def proven_module(
    build: Callable[[Mapping[str, LowRank], Sequence[str]], AdaptedModule],
    updates: Mapping[str, LowRank],
    notes: Sequence[str],
    dead: str,
) -> AdaptedModule:
    """What `build` makes of updates and notes, once every target is proven to take effect.

    Args:
        build: (updates, notes) → the module.
        updates: By target key.
        notes: What has to be said.
        dead: As in insert: error, drop or allow.

    Raises:
        NoEffectError: As insert.
    """
    module = build(updates, notes)
    if dead == "allow" or module.base_dtype is None or not updates:
        return module
    idle = prove_effect(module, drop=dead == "drop")
    if idle:
        kept = {k: u for k, u in updates.items() if k not in idle}
        module = build(kept, (*notes, *(f"{k}: left out, no gradient reaches it" for k in idle)))
        prove_effect(module)
    return module


def module_with(
    cap: Captured,
    adapter: Adapter,
    dropout: float,
    norm_stats: str,
    dead: str = "error",
    *,
    fast: bool = True,
) -> AdaptedModule:
    """The module that goes on from an adapter, which brings its own targets and ranks."""
    found = found_in(cap)
    bound = bind(adapter, found)
    updates, metadata = relearning(bound.lowrank, bound.metadata)
    metadata["dropout"] = dropout

    def build(now: Mapping[str, LowRank], notes: Sequence[str]) -> AdaptedModule:
        whole = tuple(bound.full)
        return adapted_module(cap, found, now, whole, notes, metadata, dropout, norm_stats, fast)

    module = proven_module(build, updates, (), dead)
    if bound.full:
        module.load_adapter(bound)
    module.check_base(adapter)
    return module


def found_in(cap: Captured, training: bool = False) -> Found:
    """The targets of a capture, with what had to be said and pinned on the way to it."""
    found = find(cap.fx_graph(training))
    return replace(found, pinned=tuple(cap.pinned), notes=tuple(cap.notes))


def speedups(blocks: Sequence[str]) -> list[Callable[[FxGraph], Any]]:
    """The passes of train programs, in order."""
    paths = tuple(blocks)
    return [Clean(), Share(paths), Fuse(), Recompute(paths)]


def plan_of(
    found: Found,
    names: Mapping[str, str],
    rank: int,
    alpha: float | None,
    include: Selectors,
    exclude: Selectors,
    also_train: Selectors,
    plan: Any,
) -> Plan:
    """The plan that the options of insert ask for; a Plan is taken as it is."""
    if isinstance(plan, Plan):
        return plan
    return make_plan(
        found,
        names,
        rank=rank,
        alpha=alpha,
        include=include,
        exclude=exclude,
        also_train=also_train,
        ranks=plan,
    )


Selectors = str | Sequence[str] | None
