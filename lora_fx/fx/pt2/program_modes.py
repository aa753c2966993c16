"""Find the mode that a graph was exported in, from ops that behave differently in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from lora_fx.fx.graph.nodes import argument, scope_of
from lora_fx.fx.operators import OpOverload
from lora_fx.text import by_key

NORMS = ("batch_norm", "instance_norm")


FLAGS = ("train", "training", "use_input_stats")
NAMES = {False: ("model", "eval"), True: ("train", "training")}
"""Training or not → names of programs that say so."""


@dataclass(frozen=True)
class Modal:
    """A node whose operator behaves otherwise in the other mode.

    Attributes:
        op: dropout, batch_norm …
        where: Path of the module that made it; may be empty.
        training: How it behaves here.
        norm: True for norms by running statistics, which can be frozen in training.
    """

    op: str
    where: str
    training: bool
    norm: bool = False


def modal_nodes(graph: fx.Graph) -> list[Modal]:
    """Every node of a graph that depends on the mode, dropout of probability 0 left out."""
    modals = []
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        modal = _modal(node, node.target)
        if modal is not None:
            modals.append(modal)
    return modals


def _modal(node: fx.Node, operator: OpOverload) -> Modal | None:
    """The way in which a node depends on the mode; None if it does not."""
    name = operator._schema.name.partition("::")[2].rstrip("_")
    if name == "bernoulli":
        return Modal(name, scope_of(node)[0], training=True)
    if name == "scaled_dot_product_attention" and argument(node, "dropout_p"):
        return Modal(name, scope_of(node)[0], training=True)
    if name == "_native_batch_norm_legit_no_training":
        return Modal("batch_norm", scope_of(node)[0], training=False, norm=True)

    arguments = {slot.name for slot in operator._schema.arguments}
    norm = any(norm_name in name for norm_name in NORMS)
    flag = next((flag for flag in FLAGS if flag in arguments), None)
    if flag is None or _is_idle(node, arguments, norm):
        return None
    return Modal(name, scope_of(node)[0], bool(argument(node, flag)), norm)


def _is_idle(node: fx.Node, arguments: Iterable[str], norm: bool) -> bool:
    """Whether a dropout drops nothing, or a norm has no running statistics."""
    if norm:
        return argument(node, "running_mean") is None
    probability = next((name for name in ("p", "dropout") if name in arguments), None)
    return probability is not None and not argument(node, probability)


def mode_of(graph: fx.Graph) -> bool | None:
    """True for a train graph, False for an eval graph, None where both modes agree."""
    modals = modal_nodes(graph)
    if not modals:
        return None
    return any(modal.training for modal in modals)


def pick_programs(modes: Mapping[str, bool | None]) -> dict[bool, str]:
    """{training: name of the program for it}, from the modes of a file's programs.

    A program that is the same in both modes serves both. Where several fit, the first is:
    1. one of this mode before one that serves both;
    2. one whose name says the mode (`NAMES`), in their order;
    3. the first of the file.
    """
    programs = {}
    for training in (False, True):
        ranks = {}
        for name, mode in modes.items():
            if mode in (training, None):
                ranks[name] = (mode is None, _rank_of_name(name, training))
        if ranks:
            programs[training] = min(ranks, key=lambda name: ranks[name])
    return programs


def _rank_of_name(name: str, training: bool) -> int:
    if name not in NAMES[training]:
        return len(NAMES[training])
    return NAMES[training].index(name)


def modals_text(modals: Iterable[Modal]) -> str:
    """The operators by name and place, once each, for a message."""
    texts = []
    for op, places in by_key((modal.op, modal.where) for modal in modals).items():
        text = op
        first = next((place for place in places if place), "")
        if first:
            text += f" of {first}"
        if len(places) > 1:
            text += f" and {len(places) - 1} more"
        texts.append(text)
    return ", ".join(texts)
