"""The capture of a model with quantised weights: a base for insert, training or export."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.dotted_names import named_tensors, parameter_of
from lora_fx.fx.quantised_parameters import forms, occupied_name, tensors_of
from lora_fx.fx.sharing_copy import sharing_copy
from lora_fx.passes.find import find
from lora_fx.passes.quantise import Quantise, turned_rows
from lora_fx.passes.verbs.options import Selectors
from lora_fx.progress import stage
from lora_fx.targets.found import Found
from lora_fx.targets.plan import make_plan
from lora_fx.targets.target import Target
from lora_fx.text import human, some

KINDS = ("nf4", "int4", "int8")
Wanted = str | Sequence[str] | Mapping[str, Selectors]
"""KIND for the default plan's weights, KIND=SELECTORS, several of these, or {kind: selectors}."""


@stage("coding weights")
def quantised(cap: Captured, wanted: Wanted, leave: Collection[str] = ()) -> Captured:
    """Return a copy of a capture in which some weights are stored as codes.

    Args:
        cap: The capture; neither it nor its model is changed.
        wanted: What is quantised, and how.
        leave: Parameters that are trained whole, and stay as they are.

    Raises:
        LoraFxError: A kind that is not known, a selector without a match, a model that cannot be
            copied.
    """
    targets = find(cap.fx_graph())
    kinds, notes = _chosen(cap.model, targets, parse(wanted), leave)
    coded = copy.copy(cap)
    coded.model = sharing_copy(cap.model)
    coded.tracings = {
        training: [replace(tracing, analyses={}) for tracing in tracings]
        for training, tracings in cap.tracings.items()
    }
    bytes_before = sum(parameter_of(cap.model, name).nbytes for name in kinds)
    Quantise(kinds)(cap.fx_graph(root=coded.model))
    bytes_after = 0
    for name in kinds:
        bytes_after += sum(tensor.nbytes for tensor in tensors_of(coded.model, name))

    kinds_used = " and ".join(dict.fromkeys(kinds.values()))
    note = (
        f"quantised to {kinds_used}: {len(kinds)} weights, {human(bytes_before)}B as floats, "
        f"{human(bytes_after)}B as codes"
    )
    coded.notes = [*cap.notes, note, *notes]
    return coded


def said_of_large_floats(coded: Captured, leave: Collection[str] = ()) -> list[str]:
    """Return a line if weights that could be codes, but are floats, are most of a file's bytes.

    The default plan leaves lookup tables and heads in float: of a small language model with a large
    vocabulary, these are more than all layers as codes.

    Args:
        coded: A quantised capture. Its bfloat16 weights are float32 in a file.
        leave: Parameters that are trained whole.
    """
    targets = find(coded.fx_graph())
    stored = forms(coded.model)
    bytes_in_file = 0
    large: dict[str, int] = {}
    for name in dict.fromkeys(named_tensors(coded.model)[0].values()):
        if name in stored:
            bytes_in_file += sum(tensor.nbytes for tensor in tensors_of(coded.model, name))
            continue
        parameter = parameter_of(coded.model, name)
        size = parameter.nbytes * (2 if parameter.dtype is torch.bfloat16 else 1)
        bytes_in_file += size
        if _targets_of(targets, name) and not _why_not(coded.model, targets, name, leave):
            large[name] = size

    bytes_of_floats = sum(large.values())
    if bytes_of_floats <= bytes_in_file / 2:
        return []
    selectors = ",".join(name.removesuffix(".weight") for name in large)
    sizes = f"{human(bytes_of_floats)}B as floats, of {human(bytes_in_file)}B in all"
    return [
        f"{some([*large])}: {sizes}; to store them in 8 bits, add int8={selectors} to what is "
        "quantised"
    ]


def parse(wanted: Wanted) -> list[tuple[str, Selectors]]:
    """Return the kinds, each with its selectors, or with None for the default plan.

    >>> parse("nf4"), parse(["int4", "int4=lm_head,embed"])
    ([('nf4', None)], [('int4', None), ('int4', 'lm_head,embed')])
    """
    if isinstance(wanted, Mapping):
        return list(wanted.items())
    texts: object = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise LoraFxError(
            f"unknown kind {wanted!r} of quantised weights",
            f"use one of {', '.join(KINDS)}, or {{kind: selectors}}",
        )
    kinds: list[tuple[str, Selectors]] = []
    for text in texts:
        kind, _, selectors = text.partition("=")
        kinds.append((kind, selectors or None))
    return kinds


def _chosen(
    model: nn.Module,
    targets: Found,
    wanted: Sequence[tuple[str, Selectors]],
    leave: Collection[str],
) -> tuple[dict[str, str], list[str]]:
    """Return the kind of each parameter, and notes on parameters that stay in float.

    Kinds with selectors come first, and what they name has to be quantised; the default plan
    leaves in float what cannot be, and lookup tables.
    """
    kinds: dict[str, str] = {}
    reasons: dict[str, str] = {}  # parameter that is left in float → why
    for kind, selectors in sorted(wanted, key=lambda item: item[1] is None):
        if kind not in KINDS:
            raise LoraFxError(
                f"unknown kind {kind!r} of quantised weights", f"use one of {', '.join(KINDS)}"
            )
        keys = make_plan(targets, {}, rank=1, include=selectors).entries
        for name in dict.fromkeys(targets[key].parameter.name for key in keys):
            reason = _why_not(model, targets, name, leave)
            if reason and selectors:
                raise LoraFxError(f"{name} cannot be quantised: {reason}", "leave it out")
            if not reason and not selectors and _is_lookup_table(targets, name):
                reason = "it is also a lookup table"
            if reason:
                reasons[name] = reason
            elif kinds.setdefault(name, kind) != kind and selectors:
                raise LoraFxError(
                    f"{name}: selected for {kinds[name]} and for {kind}",
                    "select it for one kind only",
                )
    if not kinds:
        raise LoraFxError(
            "no weight is left to quantise",
            "; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
        )
    return kinds, [f"{name}: left in float, {reason}" for name, reason in reasons.items()]


def _targets_of(targets: Found, name: str) -> list[Target]:
    """Return the targets of one parameter."""
    return [
        target for target in (*targets.targets, *targets.optional) if target.parameter.name == name
    ]


def _is_lookup_table(targets: Found, name: str) -> bool:
    return any("embedding" in target.uses for target in _targets_of(targets, name))


def _why_not(model: nn.Module, targets: Found, name: str, leave: Collection[str]) -> str:
    """Return why a parameter cannot be quantised; empty if it can."""
    form = _targets_of(targets, name)[0].parameter.format
    if form:
        return f"it is quantised already ({form})"
    if name in leave:
        return "it is trained whole"
    if name.endswith("~"):
        return "it is computed from other parameters"
    if turned_rows(targets, name) is None:
        return "its uses do not agree on which axis holds the rows"
    other = occupied_name(model, name)
    if other:
        return f"its module already has a {other}"
    return ""
