"""Which mode a graph was exported in: the operators that behave otherwise in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from lora_fx.fx.graph.nodes import argument, scope_of
from lora_fx.fx.operators import OpOverload
from lora_fx.text import by_key

NORMS = ("batch_norm", "instance_norm")


FLAGS = ("train", "training", "use_input_stats")


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
    found = []
    for node in graph.nodes:
        target = node.target
        if node.op != "call_function" or not isinstance(target, OpOverload):
            continue
        name = target._schema.name.partition("::")[2].rstrip("_")
        arguments = {a.name for a in target._schema.arguments}
        norm = any(n in name for n in NORMS)
        flag = next((f for f in FLAGS if f in arguments), None)
        attention = name == "scaled_dot_product_attention"
        if name == "bernoulli" or (attention and argument(node, "dropout_p")):
            found.append(Modal(name, scope_of(node)[0], True))
        elif name == "_native_batch_norm_legit_no_training":
            found.append(Modal("batch_norm", scope_of(node)[0], False, True))
        elif flag is not None and not _idle(node, arguments, norm):
            found.append(Modal(name, scope_of(node)[0], bool(argument(node, flag)), norm))
    return found


def _idle(node: fx.Node, arguments: Iterable[str], norm: bool) -> bool:
    """A dropout that drops nothing, or a norm without running statistics."""
    if norm:
        return argument(node, "running_mean") is None
    chance = next((n for n in ("p", "dropout") if n in arguments), None)
    return chance is not None and not argument(node, chance)


def mode_of(graph: fx.Graph) -> bool | None:
    """True for a train graph, False for an eval graph, None where both modes agree."""
    modes = [m.training for m in modal_nodes(graph)]
    return any(modes) if modes else None


def pick_programs(modes: Mapping[str, bool | None]) -> dict[bool, str]:
    """{training: name of the program for it}, from the modes of a file's programs.

    A program that is the same in both modes serves both. "model", then a name that says the
    mode, goes first where several fit.
    """
    result = {}
    for training in (False, True):
        said = ("train", "training") if training else ("model", "eval")
        fit = [n for n, mode in modes.items() if mode in (training, None)]
        rank = {n: said.index(n) if n in said else len(said) for n in fit}
        if fit:
            result[training] = min(fit, key=lambda n: (modes[n] is None, rank[n]))
    return result


def says(modals: Iterable[Modal]) -> str:
    """The operators by name and place, once each, for a message."""
    parts = []
    for op, places in by_key((m.op, m.where) for m in modals).items():
        first = next((p for p in places if p), "")
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        parts.append(f"{op}{f' of {first}' if first else ''}{more}")
    return ", ".join(parts)
