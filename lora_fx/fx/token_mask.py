"""The mask of an aLoRA in a torch graph: the tokens from the last invocation of a row on.

    found[b, t]  = ids[b, t : t + L] are the invocation, of L tokens
    count        = cumulative sum of found along t
    active[b, t] = count[b, t] = count[b, T − 1] and count[b, t] > 0

count reaches its last value where the last occurrence begins. The ids are padded with −1, which is
no id, so that no row is too short. No size is read: the mask holds for every batch and length.

The mask stands once at the top of a graph, [batch, tokens], and in the shapes that results need:
[batch, tokens, 1 …] where a result has these two axes first, [batch · tokens, 1] where they are
one. A result of any other shape is refused by name: its rows are not known to be the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.call import leaf_names
from lora_fx.fx.capture.example import rows_reached
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import is_marked, make_marked, shape_of
from lora_fx.inputs import Named
from lora_fx.ir.graph import Site

aten = torch.ops.aten
MASK = "invocation"
"""The mark of the nodes of the mask, where those of a branch have their site's id."""
_LAST = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class InvocationMask:
    """Which tokens an aLoRA acts on, as nodes of a torch graph."""

    invocation: tuple[int, ...]

    def of(self, graph: object, site: Site) -> fx.Node:
        """Return the mask in a shape that broadcasts with the result of a site.

        Raises:
            LoraFxError: The graph has no token ids, or the rows of the result are not the tokens.
        """
        assert isinstance(graph, FxGraph)
        ids = token_ids(graph)
        if ids is None:
            raise LoraFxError(
                "an aLoRA acts from its invocation tokens on, and the model takes no token ids "
                "[batch, tokens]",
                "insert a plain LoRA, without --invocation",
            )
        form = _form(graph, site, ids)
        *_, last = graph.graph.find_nodes(op="placeholder")
        masks: dict[str, fx.Node] = {}
        following = last.next
        while is_marked(following, MASK):
            masks[following.name] = following
            following = following.next

        for name in dict.fromkeys((TOKENS, form)):
            if name not in masks:
                active = masks.get(TOKENS)
                nodes = _Nodes(following, ids)
                masks[name] = nodes.shaped(active, name) if active else nodes.of(self.invocation)
                masks[name].name = name
        return masks[form]


TOKENS = "invocation_tokens"
"""The name of the mask [batch, tokens]."""
FLAT = "invocation_flat"
"""The name of the mask [batch · tokens, 1]."""


def token_ids(graph: FxGraph) -> fx.Node | None:
    """Return the input of token ids [batch, tokens]: the one that looks up the largest table."""
    rows: dict[fx.Node, int] = {}
    for place in graph.graph.find_nodes(op="placeholder"):
        if len(shape_of(place) or ()) == 2:
            rows[place] = max(rows_reached(place), default=0)
    ids = max(rows, key=rows.__getitem__, default=None)
    return ids if ids is not None and rows[ids] else None


def check_ids(graph: FxGraph, invocation: Sequence[int]) -> None:
    """Raise for an invocation token that the model's lookup table has no row for."""
    ids = token_ids(graph)
    rows = max(rows_reached(ids), default=0) if ids is not None else 0
    beyond = [token for token in invocation if token >= rows]
    if rows and beyond:
        raise LoraFxError(
            f"the invocation token {beyond[0]} is none of the model's: its ids are 0 to {rows - 1}",
            "pass ids of the model's own tokenizer; a token that was added to it needs a row in "
            "the model: model.resize_token_embeddings(len(tokenizer))",
        )


def name_of_ids(graph: FxGraph, named: Named) -> str:
    """Return the name of the input with the token ids; empty if there is none.

    Args:
        graph: The graph of a call.
        named: The arguments of the call.
    """
    ids = token_ids(graph)
    places = graph.graph.find_nodes(op="placeholder")
    for name, place in zip(leaf_names(named), places, strict=False):
        if place is ids:
            return name
    return ""


def _form(graph: FxGraph, site: Site, ids: fx.Node) -> str:
    """Return the name of the mask that fits the result of a site.

    Raises:
        LoraFxError: The first axes of the result are not batch and tokens.
    """
    y = shape_of(graph.output(site)) or ()
    batch, tokens = shape_of(ids) or ()
    sizes = [str(size) for size in y]
    if len(y) > 2 and sizes[:2] == [str(batch), str(tokens)]:
        return f"invocation_{len(y)}"
    if len(y) == 2 and sizes[0] == str(batch * tokens):
        return FLAT
    raise LoraFxError(
        f"{site.parameter!r} ({site.op}, node {site.id}): its result is [{', '.join(sizes)}], "
        f"which does not begin with the tokens [{batch}, {tokens}], so an aLoRA cannot be masked "
        "there by token",
        f"pass --exclude {site.parameter.removesuffix('.weight')}",
    )


class _Nodes:
    """A maker of nodes of the mask, before a node of the graph."""

    def __init__(self, before: fx.Node, ids: fx.Node) -> None:
        self.before = before
        self.ids = ids

    def make(self, target: Any, *args: Any) -> fx.Node:
        """Add one op."""
        return make_marked(self.before, self.ids, MASK, target, args)

    def of(self, invocation: Sequence[int]) -> fx.Node:
        """Add the mask [batch, tokens] of a graph's ids."""
        behind = len(invocation) - 1
        padded = self.make(aten.constant_pad_nd.default, self.ids, [0, behind], -1)
        found: fx.Node | None = None
        for offset, token in enumerate(invocation):
            stop = offset - behind if offset < behind else _LAST
            part = self.make(aten.slice.Tensor, padded, 1, offset, stop)
            equal = self.make(aten.eq.Scalar, part, token)
            found = equal if found is None else self.make(aten.logical_and.default, found, equal)
        count = self.make(aten.cumsum.default, found, 1)
        total = self.make(aten.sum.dim_IntList, found, [1], True)
        is_last = self.make(aten.eq.Tensor, count, total)
        is_any = self.make(aten.gt.Scalar, count, 0)
        return self.make(aten.logical_and.default, is_last, is_any)

    def shaped(self, active: fx.Node, form: str) -> fx.Node:
        """Add the mask in the shape of a form."""
        if form == FLAT:
            return self.make(aten.reshape.default, active, [-1, 1])
        for _ in range(int(form.rpartition("_")[2]) - 2):
            active = self.make(aten.unsqueeze.default, active, -1)
        return active
