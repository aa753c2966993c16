"""A capture whose weights are quantised: the base of an insert, a training or an export."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.dotted_names import parameter_of
from lora_fx.fx.quantised_parameters import occupied_name, tensors_of
from lora_fx.fx.sharing_copy import sharing_copy
from lora_fx.passes.find import find
from lora_fx.passes.quantise import Quantise, turned_rows
from lora_fx.passes.verbs.options import Selectors
from lora_fx.targets.plan import make_plan
from lora_fx.targets.target import Found, Target
from lora_fx.text import human

KINDS = ("nf4", "int4", "int8")
Wanted = str | Sequence[str] | Mapping[str, Selectors]
"""KIND, for the default plan's weights, KIND=SELECTORS, or several; or {kind: selectors}."""


def quantised(cap: Captured, wanted: Wanted, leave: Collection[str] = ()) -> Captured:
    """The same capture over another tree, which holds codes for some weights.

    Args:
        cap: The capture; neither it nor its model is changed.
        wanted: What is quantised, and how.
        leave: Parameters that are trained whole, and stay as they are.

    Raises:
        LoraFxError: A kind that is not known, a selector without a match, a model that cannot be
            copied.
    """
    found = find(cap.fx_graph())
    kinds, notes = _chosen(cap.model, found, parse(wanted), leave)
    new = copy.copy(cap)
    new.model = sharing_copy(cap.model)
    new.tracings = {k: [replace(t, analyses={}) for t in v] for k, v in cap.tracings.items()}
    before = sum(parameter_of(cap.model, n).nbytes for n in kinds)
    Quantise(kinds)(cap.fx_graph(root=new.model))
    after = sum(t.nbytes for n in kinds for t in tensors_of(new.model, n))
    said = " and ".join(dict.fromkeys(kinds.values()))
    size = f"{len(kinds)} weights, {human(before)}B as floats, {human(after)}B as codes"
    new.notes = [*cap.notes, f"quantised to {said}: {size}", *notes]
    return new


def parse(wanted: Wanted) -> list[tuple[str, Selectors]]:
    """Kinds, each with selectors, or None for the default plan.

    >>> parse("nf4"), parse(["int4", "int4=lm_head,embed"])
    ([('nf4', None)], [('int4', None), ('int4', 'lm_head,embed')])
    """
    if isinstance(wanted, Mapping):
        return list(wanted.items())
    texts: object = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
        raise LoraFxError(
            f"quantise={wanted!r} is no kind", f"{', '.join(KINDS)}, or {{kind: selectors}}"
        )
    parts = (text.partition("=") for text in texts)
    return [(kind, selectors or None) for kind, _, selectors in parts]


def _chosen(
    model: nn.Module,
    found: Found,
    asked: Sequence[tuple[str, Selectors]],
    leave: Collection[str],
) -> tuple[dict[str, str], list[str]]:
    """Parameter → kind, and what had to be left in float."""
    kinds: dict[str, str] = {}
    left: dict[str, str] = {}
    for kind, selectors in sorted(asked, key=lambda item: item[1] is None):  # named first
        if kind not in KINDS:
            raise LoraFxError(f"no kind {kind!r} of quantised weights", ", ".join(KINDS))
        keys = make_plan(found, {}, rank=1, include=selectors).entries
        for name in dict.fromkeys(found[k].parameter.name for k in keys):
            why = _why_not(found, name, leave)
            if not why and (other := occupied_name(model, name)):
                why = f"its module has a {other} already"
            if why and selectors:
                raise LoraFxError(f"{name} cannot be quantised: {why}", "leave it out")
            table = any("embedding" in t.uses for t in _targets(found, name))
            if not why and not selectors and table:
                why = "it is a lookup table too"
            if why:
                left[name] = why
            elif kinds.setdefault(name, kind) != kind and selectors:
                raise LoraFxError(f"{name}: {kinds[name]} and {kind} name it", "name it once")
    if not kinds:
        raise LoraFxError(
            "no weight is left to quantise", "; ".join(f"{n}: {w}" for n, w in left.items())
        )
    return kinds, [f"{name}: left in float, {why}" for name, why in left.items()]


def _targets(found: Found, name: str) -> list[Target]:
    return [t for t in (*found.targets, *found.optional) if t.parameter.name == name]


def _why_not(found: Found, name: str, leave: Collection[str]) -> str:
    target = _targets(found, name)[0]
    form = target.parameter.format
    reasons = {
        f"it is quantised ({form}), and keeps its bytes": form,
        "it is trained whole": name in leave,
        "it is computed from other parameters": name.endswith("~"),
        "its uses agree on no rows": turned_rows(found, name) is None,
    }
    return next((why for why, holds in reasons.items() if holds), "")
