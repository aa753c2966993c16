"""The protocol of a variant: its tensors, how W' is computed, what trains, and how it is proven.

    W' = change(W, s·b·a),   a = a(tensors),   b = b(tensors)

The tensors of an update stand beside the parameter PATH.LEAF, one name a field:

==========  ==========================  ==================  =================================
field       name                        shape               trained
==========  ==========================  ==================  =================================
a           PATH.lora_A.LEAF            [*batch, r, in]     yes, but for lora-fa
b           PATH.lora_B.LEAF            [*batch, out, r]    yes
a0, b0      PATH.lora_A0.LEAF, …        the same            no: the last `frozen` ranks
FIELD       PATH.lora_FIELD.LEAF        as the variant says as the variant says
==========  ==========================  ==================  =================================

r is the trained rank. An update whose start was taken from W or its gradient has −b₀a₀ in its
frozen ranks, so that ΔW is zero at first while W stays what it was.

`LowRank.a` and `LowRank.b` are always the factors of ΔW, whatever tensors made them. So whoever
folds, merges or converts an update that is a sum, needs to know nothing of its variant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from lora_fx.adapter.lowrank import LowRank, alpha_of, draw
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.layout import Layout
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.text import Json, JsonView

WHOLE = "fold it into the model itself with lora_fx.fold or lora-fx export"
Read = Callable[[str], V]
"""Field → the value of that tensor in some IR."""


@dataclass(frozen=True)
class Beginning:
    """Facts that a variant may use for its initial values, together with a and b.

    Attributes:
        key: The key of the target.
        seed: The seed of the initial values.
        weight: The base weight as [*batch, out, in]; None where the variant does not read it.
        widest: The most inputs and the most outputs of all targets; None where those are unknown.
    """

    key: str
    seed: int = 0
    weight: Array | None = None
    widest: tuple[int, int] | None = None


@dataclass(frozen=True)
class Variant:
    """A kind of update. This class is LoRA; subclasses override what differs.

    Attributes:
        name: The variant's name, as `insert` and files have it.
        ratio: The learning rate of every tensor but a, over that of a.
        still: Fields of tensors that do not train.
        title: The name of such an update in messages; empty where that is `name`.
        made_of: Fields of the tensors that a and b are made of, where these are not a and b
            themselves. They are in `LowRank.variant_tensors`.
        also: Fields of the tensors beside them that only `change` reads. They are in
            `LowRank.variant_tensors` too.
        unsaved: Fields among them that a model holds as buffers, and not in its state dict.
        reads_weight: True where W' is more than W + s·b·a: it is computed from W itself.
        stretches: True where W' = g·V, see `stretch`. Only then an update that reads W gets a
            branch beside its op.
        by_rows: True where W' of some rows is computed from these rows of W and of b alone.
        proportional: The field that ΔW is in proportion to. Its gradient tells whether the update
            has an effect.
        zero_where: Fields of which one that is zero makes ΔW zero.
        peft_type: The type of PEFT's files that hold it; empty for a type of its own name, which
            no other reader takes for LoRA.
        learns_as_lora: True where files hold it as LoRA, and metadata says how it learns.
        scale_is_one: True where the variant has no alpha: ΔW = b·a.
        constant_over: Inputs in a row over which ΔW is constant; 0 where nothing is known.
    """

    name: str
    ratio: float = 1.0
    still: tuple[str, ...] = ()
    title: ClassVar[str] = ""
    made_of: ClassVar[tuple[str, ...]] = ()
    also: ClassVar[tuple[str, ...]] = ()
    unsaved: ClassVar[tuple[str, ...]] = ()
    reads_weight: ClassVar[bool] = False
    stretches: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False
    proportional: ClassVar[str] = "b"
    zero_where: ClassVar[tuple[str, ...]] = ("a", "b")
    scale_is_one: ClassVar[bool] = False
    peft_type: ClassVar[str] = ""

    @property
    def rows_apart(self) -> bool:
        """True if an update can be split into updates of single rows."""
        return self.by_rows or not self.reads_weight

    @property
    def learns_as_lora(self) -> bool:
        """See `learns_as_lora` in the attributes of the class."""
        return False

    @property
    def constant_over(self) -> int:
        """See `constant_over` in the attributes of the class."""
        return 0

    def with_argument(self, text: str) -> Variant | None:
        """Return the variant for the name `NAME:TEXT`; None if the variant takes no argument."""
        return None

    # The update.

    def check_init(self, init: str) -> None:
        """Raise LoraFxError for an init that this variant does not support."""
        if self.made_of and init != "kaiming":
            raise LoraFxError(
                f"init {init!r} sets a and b, but variant {self.name} computes them from other "
                "tensors",
                "leave --init out",
            )

    def prepared(self, low: LowRank, beginning: Beginning) -> LowRank:
        """Return the update with its initial values, for which W' = W.

        Args:
            low: An update of this variant with the a and b of its init.
            beginning: Other facts that it may start from.
        """
        return low

    def of(self, low: LowRank) -> Variant | None:
        """Return this variant if the update has its tensors and a and b match them; else None."""
        fields = {*self.made_of, *self.also}
        name = low.variant.partition(":")[0]
        if name != self.name or not fields or fields != set(low.variant_tensors):
            return None
        emitter = NumpyEmitter()
        read = self.tensors(low).__getitem__
        if not np.array_equal(self.a(emitter, read), low.a):
            return None
        if not np.array_equal(self.b(emitter, read), low.b):
            return None
        return self

    def tensors(self, low: LowRank) -> Mapping[str, Array]:
        """Return the tensors that a model stores for a and b, by field."""
        if self.made_of:
            return {field: low.variant_tensors[field] for field in self.made_of}
        return {"a": low.a, "b": low.b}

    def beside(self, low: LowRank) -> Mapping[str, Array]:
        """Return the tensors of `also`, by field; raise LoraFxError if the update lacks one."""
        for field in self.also:
            if field not in low.variant_tensors:
                raise LoraFxError(
                    f"an update of variant {self.name} has no tensor {field!r}",
                    f"create the update with insert(variant={self.name!r}), which makes the tensor",
                )
        return {field: low.variant_tensors[field] for field in self.also}

    def with_values(self, low: LowRank, values: Mapping[str, Array]) -> LowRank:
        """Return the update with other values in its tensors.

        Args:
            low: The update.
            values: Arrays by field, for every tensor that it has in a model.
        """
        tensors = {field: values[field] for field in (*self.made_of, *self.also)}
        emitter = NumpyEmitter()
        read = values.__getitem__
        a = self.a(emitter, read)
        b = self.b(emitter, read)
        if low.frozen:
            a = np.concatenate([a, values["a0"]], axis=-2)
            b = np.concatenate([b, values["b0"]], axis=-1)
        return replace(low, a=a, b=b, variant_tensors=tensors)

    def rows(self, low: LowRank, rows: slice | Array) -> LowRank:
        """Return the update of some rows of a weight [out, in]; a sum becomes plain LoRA.

        Args:
            low: An update with a [rank, in] and b [out, rank].
            rows: A slice, or the numbers of the rows.
        """
        if self.reads_weight:
            raise LoraFxError(f"an update of variant {self.name} cannot be split into parts", WHOLE)
        if self.made_of:
            low = plain(low)
        return replace(low, b=low.b[rows])

    def turned(self, low: LowRank, key: str) -> LowRank:
        """Return the update of Wᵀ; raise LoraFxError if this variant has none."""
        if self.reads_weight:
            raise LoraFxError(f"{key!r}: an update of variant {self.name} has no transpose", WHOLE)
        if self.made_of:
            low = plain(low)
        return replace(low, a=np.swapaxes(low.b, -1, -2), b=np.swapaxes(low.a, -1, -2))

    def within(self, low: LowRank, size: int) -> LowRank:
        """Return the update for a weight of `size` elements, where its file tells no inputs."""
        return low

    def fitted(self, low: LowRank, key: str, layout: Layout) -> LowRank:
        """Return the update with its tensors in a layout's shapes, or raise MisfitError."""
        return low

    def alpha(self, low: LowRank) -> float:
        """Return the alpha that the update was inserted with."""
        return low.alpha

    def asked(self, low: LowRank) -> tuple[int, float]:
        """Return the rank and alpha that the update was inserted with."""
        return low.rank, self.alpha(low)

    # The maths, in any IR.

    def a(self, e: Ops[V], read: Read[V]) -> V:
        """Return the factor a [*batch, rank, in].

        Args:
            e: An emitter of the IR.
            read: Gives the tensors of `made_of`; a and b where there are none.
        """
        return read("a")

    def b(self, e: Ops[V], read: Read[V]) -> V:
        """Return the factor b [*batch, out, rank]; see `a`."""
        return read("b")

    def change(self, e: Ops[V], layout: Layout, w: V, delta: V, read: Read[V]) -> V:
        """Return W' − W in the stored shape.

        Args:
            e: An emitter of the IR.
            layout: The layout of the update.
            w: The stored tensor, or the region that the update is for.
            delta: s·b·a in the same shape.
            read: Gives the tensors of `beside`.
        """
        return delta

    def stretch(self, e: Ops[V], layout: Layout, v: V, read: Read[V]) -> V:
        """Return the factor g [*batch, out, 1] of W' = g·V, V = W + s·b·a, if `stretches`.

        Args:
            e: An emitter of the IR.
            layout: How [*batch, out, in] lies in v.
            v: The sum W + s·b·a, as it is stored.
            read: Gives the tensors of `beside`.
        """
        raise NotImplementedError(f"{self.name} does not stretch rows")

    def row_factors(self, low: LowRank, rows: slice, squares: Array, where: str) -> Array:
        """Return the factor g of some rows of V, from their sums of squares; see `stretch`.

        Args:
            low: The update, its b in [out, rank].
            rows: Which rows.
            squares: The sum of squares of each, over all of in, in fp64.
            where: The weight, for messages.

        Raises:
            LoraFxError: W' is no such product, or a row has no direction.
        """
        raise LoraFxError(
            f"{where}: an update of variant {self.name} needs all of W, but a merge reads W in "
            "blocks of rows",
            WHOLE,
        )

    # Training and its proof.

    def rates(self, lr: float) -> dict[str, float]:
        """Return learning rates by field; every other field has the rate `lr`."""
        fields = (*self.made_of, *self.also, *self.zero_where)
        rates = dict.fromkeys(fields, lr * self.ratio)
        if "a" in rates:
            rates["a"] = lr
        return rates

    def drawn(self, low: LowRank, key: str, seed: int) -> Mapping[str, Array]:
        """Return random values for the trained tensors, by field, with ‖ΔW‖ about ‖W‖ at s = 1.

        Args:
            low: The update, bound.
            key: Its key.
            seed: Each key draws from (seed, key).
        """
        assert low.layout is not None
        rank = low.rank - low.frozen
        a, b = draw(key, low.layout, rank, seed, "probe", low.b.dtype.name)
        return {"a": a, "b": b}

    # Files.

    def facts(self, low: LowRank) -> Json:
        """Return facts of an update that its tensors lack, for its JSON and for `with_facts`."""
        return {}

    def with_facts(self, low: LowRank, facts: JsonView) -> LowRank:
        """Return the update with the facts that `facts` returned; unchanged if there are none."""
        return low


def plain(low: LowRank) -> LowRank:
    """Return the update as plain LoRA with the same ΔW."""
    alpha = alpha_of(low.scale, low.rank)
    return replace(low, variant="lora", alpha=alpha, variant_tensors={})
