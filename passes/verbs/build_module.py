"""The updates that insert and attach start from, and the weights and data that those read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

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
from lora_fx.passes.fuse import Fuse
from lora_fx.passes.insert import Insert
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
