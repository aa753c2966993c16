"""switch: every branch of an ONNX graph reads its factors from inputs that have defaults.

    y' = y + (x A) B        A [*batch, in, rank], B [*batch, rank, out], rank a symbol of its own

The branches are those of insert. What is added here is what ONNX Runtime should see: A and B are
stored the way the two products read them, so no transpose and no scale is left at run time, and
the defaults change nothing: rank 0, or one rank of zeros where the runtime is WebGPU's, and in the
weight form W + (A B)ᵀ, which convolutions take (their branch would need the rank as a number; of
rank 0, a runtime's convolution may read memory that nobody wrote). This pass works on onnx_ir only:
inputs with defaults are a matter of ONNX. A portable file has none, since other runtimes ignore
inputs that have a default.

A target that DoRA adapts has an input D [*batch, out] too, zeros by default, and B holds 1 + D:

    y' = y + D·(y − bias) + (x A) B        W + D·W + (A B)ᵀ in the weight form

With `starts`, of a file with aLoRA adapters, y' = y + (x A) B from the input `adapter_starts` on,
and y itself before it, to the bit: see lora_fx.onnx.starts_mask.

In mode load A and B stay initialisers of a fixed rank, and every use takes the weight form.

A tensor that an adapter holds whole, a new head for example, is such an input too, with the base's
own value as its default; in mode load an initialiser, which a session replaces.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.scaled_rows import GAINS
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.ir.einsum import Einsum
from lora_fx.ir.emitter import V
from lora_fx.ir.graph import Graph, Role, Site, TokenMask
from lora_fx.ir.kinds import Embedding
from lora_fx.onnx.accumulate import accumulate
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.manifest import PROPERTY, Manifest, WholeSlot
from lora_fx.onnx.row_starts import Starts
from lora_fx.onnx.starts_mask import StartsMask
from lora_fx.onnx.switch import put_factors, without_defaults
from lora_fx.onnx.whole_slots import make_inputs, whole_slots
from lora_fx.passes.base import PassResult
from lora_fx.passes.find import find
from lora_fx.passes.insert import Insert, changed
from lora_fx.targets.target import Target, check_storable

if TYPE_CHECKING:
    import onnx_ir as ir

OLDEST_IR = 4
"""The first IR version that tells constants from initialisers that an input can override."""


@dataclass(frozen=True)
class Switch:
    """Make the targets of `keys` switchable, and write the manifest into the metadata.

    Attributes:
        keys: Targets of the graph, in its own names.
        rank: 0 for inputs with defaults. Above 0, mode load: A and B are initialisers of that
            rank, and every use has the weight form, which ONNX Runtime folds when it loads
            the file.
        stored: Targets, of which the graph has the tensor by the key's name and computes what an
            op reads from it: they are changed where they are stored.
        turned: Keys whose in and out are the graph's swapped: adapters have the lookup of a tied
            tensor as its head is.
        least_rank: The least rank of the defaults. A product over rank 0 ends the process on some
            runtimes; one rank of zeros changes nothing either, and costs one more column.
        starts: The input of token ids and the invocation tokens of the adapters, if one is an
            aLoRA: the branches are masked by token.
        required: A and B are inputs without defaults, which every run has to give.
        gains: Key → hash of the weight, of targets that also get D, the factors of rows of DoRA.
        whole: The tensors that adapters replace, by key.
        made: Receives the manifest.
    """

    keys: Sequence[str]
    rank: int = 0
    stored: Sequence[Target] = ()
    turned: Collection[str] = ()
    least_rank: int = 0
    required: bool = False
    gains: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, WholeSlot] = field(default_factory=dict)
    starts: Starts | None = None
    made: list[Manifest] = field(default_factory=list, compare=False)

    def __call__(self, graph: OnnxGraph) -> PassResult[ir.Value]:
        """Add the branches; a graph that already has a manifest is not changed.

        Raises:
            LoraFxError: A key that is no target.
        """
        model = graph.model
        if PROPERTY in model.metadata_props:
            return PassResult(graph, False)
        whole = whole_slots(graph, self.whole)
        targets = self._targets(graph)
        role = Role.FROZEN if self.rank else Role.OPTIONAL_INPUT
        mask = None
        if self.starts is not None:
            self._refuse_stored()
            mask = StartsMask(graph, self.starts)
        keys = [*self.keys, *(target.key for target in self.stored)]
        by_key = dict(zip(keys, [*targets, *self.stored], strict=True))
        # a use of a tied weight has another key in the graph
        with_gains = {target.key for key, target in by_key.items() if key in self.gains}
        insert_switchable(
            graph, targets, role, free_rank=not self.rank, gains=with_gains, mask=mask
        )
        for target in self.stored:
            self._store(graph, target, role)

        slots = {}
        for i, (key, target) in enumerate(by_key.items()):
            rank_symbol = "" if self.rank else f"rank_{i}"
            rank = self._default_rank(target)
            slots[key] = put_factors(graph, target, rank, rank_symbol, self.gains.get(key))
        if not self.rank and mask is None:  # the sum is picked from, token by token
            accumulate(graph, slots.values())
        model.ir_version = max(model.ir_version, OLDEST_IR)
        if self.required:
            without_defaults(graph, slots.values())
        base: Mapping[str, Array] = {}
        if not self.rank:
            base = make_inputs(graph, whole, required=self.required)
        manifest = Manifest(
            slots,
            "load" if self.rank else "switch",
            required=self.required,
            whole=whole,
            base=base,
            starts=mask.starts if mask else None,
        )
        model.metadata_props[PROPERTY] = manifest.to_text()
        self.made.append(manifest)
        graph.changed()
        graph.lint()
        return PassResult(graph, True)

    def _targets(self, graph: OnnxGraph) -> list[Target]:
        """Return the targets of `keys`, with the layout that adapters use.

        Raises:
            LoraFxError: A key is no target, there is none at all, or mode load cannot fold one.
        """
        found = find(graph)
        targets: list[Target] = []
        for key in self.keys:
            target = found.get(key)
            if target is None:
                raise LoraFxError(
                    f"{key!r} is not a target of the exported graph", "leave it out with --exclude"
                )
            if self.rank:
                check_storable(target, "mode load folds when a session is made")
            if key in self.turned:
                target = replace(target, layout=target.layout.transposed())
            targets.append(target)
        if not targets and not self.stored and not self.whole:
            raise LoraFxError(
                "the model has no target that can be switched",
                "run lora-fx targets MODEL to list the targets",
            )
        return targets

    def _refuse_stored(self) -> None:
        """Raise for a target that is changed where it is stored, so for every token."""
        for target in self.stored:
            raise LoraFxError(
                f"{target.key!r}: the graph computes what an op reads from it, so an aLoRA cannot "
                "be masked there by token",
                "leave it out with --exclude",
            )

    def _store(self, graph: OnnxGraph, target: Target, role: Role) -> None:
        """Make every reader of a stored tensor read W + s·b·a."""
        value = graph.model.graph.initializers[target.key]
        uses = list(value.uses())
        e = graph.emit_first(target.key)
        update = zero_update(target, gains=target.key in self.gains)
        w = changed(e, target, update, value, value, role)
        for user, i in uses:
            user.replace_input_with(i, w)

    def _default_rank(self, target: Target) -> int:
        """Return the rank of the defaults: it changes nothing, and every use can run with it."""
        if self.rank:
            return self.rank
        if target in self.stored or not has_free_rank(target):
            return 1
        # [out, 0] @ [N, 0, n] is left as the memory was, by ONNX Runtime 1.31 on the CPU
        if any(getattr(site.kind, "form", "") == "left" for site in target.sites):
            return 1
        return self.least_rank


def insert_switchable(
    graph: Graph[V],
    targets: Sequence[Target],
    role: Role,
    *,
    free_rank: bool = True,
    gains: Collection[str] = (),
    mask: TokenMask | None = None,
) -> None:
    """Insert branches with updates of rank 1 and zeros, in forms that take any rank at run time.

    Args:
        graph: Edited in place.
        targets: Targets of the graph.
        role: What A and B are for.
        free_rank: False where the rank is fixed: every weight that can hold the sum holds it.
        gains: Keys of targets whose updates have factors of rows.
        mask: The tokens on which the branches act; None for all.
    """
    in_output_form: list[Target] = []
    in_weight_form: list[Target] = []
    for target in targets:
        # a quantised weight cannot hold the sum
        if target.no_fold or (free_rank and has_free_rank(target)):
            in_output_form.append(target)
        else:
            in_weight_form.append(target)
    Insert(_zeros(in_output_form, gains), role=role, mask=mask)(graph)
    Insert(_zeros(in_weight_form, gains), role=role, weight_form=True, mask=mask)(graph)


def has_free_rank(target: Target) -> bool:
    """True if the branch of every use takes any rank at run time."""
    return all(_has_free_rank(site) for site in target.sites)


def _has_free_rank(site: Site) -> bool:
    """True if the branch of a use takes any rank at run time."""
    if isinstance(site.kind, Embedding):
        return True
    return isinstance(site.kind, Einsum) and bool(site.kind.form)


def _zeros(targets: Sequence[Target], gains: Collection[str]) -> dict[str, LowRank]:
    return {target.key: zero_update(target, gains=target.key in gains) for target in targets}


def zero_update(target: Target, *, gains: bool = False) -> LowRank:
    """Return an update of rank 1 with zeros and scale 1, and with factors of rows if `gains`."""
    shape_of_a, shape_of_b = target.layout.factor_shapes(1)
    a = np.zeros(shape_of_a, np.float32)
    b = np.zeros(shape_of_b, np.float32)
    of_variant = {GAINS: np.zeros(shape_of_b[:-1], np.float32)} if gains else {}
    return LowRank(a, b, 1.0, target.layout, variant_tensors=of_variant)
