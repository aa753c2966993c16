"""Errors and notes for updates that a format cannot store."""

from __future__ import annotations

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Entry, Hadamard, Kronecker, Rotation, name_of
from lora_fx.errors import LoraFxError

KEEPS = "save it as peft, which keeps everything"
"""True for every LowRank, whole ΔW, whole tensor and trained row; not for LoHa, LoKr and OFT."""
AS_LORA = "turn it into LoRA with lora-fx convert --as lora --rank R"


def refused(what: str, key: str, why: str | Entry, hint: str = "") -> LoraFxError:
    """Return an error for an update that a kind of file cannot store.

    Args:
        what: The kind of file, as in "a kohya file".
        key: The key of the update.
        why: The update, if the file cannot store any of its kind: the kind is the reason then, and
            the hint says what can store it. Otherwise the reason as text, about a LowRank.
        hint: What to do instead of that. For a text the default is to save it as peft.
    """
    if isinstance(why, str):
        reason = why
    else:
        reason = f"it is {name_of(why)}"
        hint = hint or way_to_keep(why)
    return LoraFxError(f"{what} cannot store the update of {key!r}: {reason}", hint or KEEPS)


def way_to_keep(entry: Entry) -> str:
    """Return a hint: the format that can store an update of this kind, or how to make it LoRA."""
    if isinstance(entry, Rotation):
        return f"{AS_LORA} --base FOLDER"
    if not isinstance(entry, (Hadamard, Kronecker)):
        return KEEPS
    if entry.layout is not None and entry.layout.out != (0,):  # stored [in, out]
        return f"{AS_LORA} --format peft"
    return f"save it as kohya, or {AS_LORA}"


def has_kernel_axes(update: LowRank) -> bool:
    """Whether the weight has axes besides out and in, as a convolution's kernel has.

    The file that an update was read from says so, or its layout in a model. The axes of a stack do
    not count.
    """
    if update.origin.kernel:
        return True
    layout = update.layout
    return layout is not None and len(layout.stored) > 2 and not layout.batch


def turned_notes(adapter: Adapter, format: str) -> list[str]:
    """Return a note on weights that are stored [in, out], which a format cannot express."""
    if not adapter.metadata.get("fan_in_fan_out"):
        return []
    return [f"the model stores weights [in, out], but readers of {format} expect [out, in]"]
