"""The origin of an update: facts about its tensor from its file or its model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from lora_fx.spellings import warn_caller
from lora_fx.text import short


@dataclass(frozen=True)
class FileLayer:
    """The place in a file of an update whose key alone does not identify its tensor.

    PEFT puts an update of a parameter (a stack of experts, say) into a layer around the module that
    holds it, one in another for several parameters, and does not say which is which.

    Attributes:
        lead: The file's name of the layer.
        of: How many layers there are around the module; 0 where it is none of these.
        module: The module, where the key does not name a parameter.
        depth: How many of the layers lie around this one.
        candidates: Leaf name of each parameter that it may be → (rank, alpha) that it has then.
    """

    lead: str
    of: int = 0
    module: str = ""
    depth: int = 0
    candidates: Mapping[str, tuple[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """Facts about the tensor of an update, from its file or its model.

    Readers of files fill it in, `bind` reads it and puts the model's facts in their place, and
    writers of files read those. No arithmetic depends on it, and two updates that differ in it
    alone are equal.

    Attributes:
        op: The op that reads the weight (linear, addmm, conv2d, embedding, experts …), where that
            is known. in of an embedding is its rows.
        kernel: The kernel of a convolution, where it is known; in is C_in/groups · ∏kernel.
        tied: True where the update applies to all uses of a tensor that several modules share.
        twins: Other names of that tensor in a file: what they name changes alike.
        layer: Where a file has the update, for `lora_fx.adapter.expert_stacks.place` and for
            writing it again.
    """

    op: str = ""
    kernel: tuple[int, ...] = ()
    tied: bool = False
    twins: tuple[str, ...] = ()
    layer: FileLayer | None = None

    __repr__ = short

    @property
    def candidates(self) -> Mapping[str, tuple[int, float]]:
        """The parameters that the update may be for, if its file does not say; see FileLayer."""
        if self.layer is None:
            return {}
        return self.layer.candidates


# Until `origin` came, its facts were fields of the update. Code that is written so goes on working.
OLDER_FIELDS = tuple(field.name for field in fields(Origin))
"""Names of the facts, which pickles of older versions have as fields of the update."""

Update = TypeVar("Update")


def with_older_fields(update: type[Update]) -> type[Update]:
    """Let a dataclass with a field `origin` accept and show its facts under their old names.

    `LowRank(a, b, alpha, op="embedding")`, `replace(low, tied=True)` and `low.kernel` mean those
    of its origin, and warn.
    """
    initialise: Any = update.__init__

    @functools.wraps(initialise)
    def initialise_from_either(self: Update, *args: object, **values: Any) -> None:
        facts = {name: values.pop(name) for name in OLDER_FIELDS if name in values}
        if facts:
            names = ", ".join(f"{name}=…" for name in facts)
            warn_caller(f"{update.__name__}({names}) is deprecated: use origin=Origin({names})")
            values["origin"] = replace(values.get("origin", Origin()), **facts)
        initialise(self, *args, **values)

    def older_attribute(self: Any, name: str) -> object:
        if name not in (*OLDER_FIELDS, "candidates"):
            raise AttributeError(f"{update.__name__!r} object has no attribute {name!r}")
        warn_caller(f"{update.__name__}.{name} is deprecated: use origin.{name}")
        return getattr(self.origin, name)

    # Set here and not written in the class, so that type checkers know the names of now alone.
    setattr(update, "__init__", initialise_from_either)  # noqa: B010
    setattr(update, "__getattr__", older_attribute)  # noqa: B010
    return update
