"""Whether a checkpoint is the base that an adapter was trained on."""

from __future__ import annotations

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.base_fingerprint import FIELD, NAMED, compared, sample_of
from lora_fx.checkpoint.provenance import history
from lora_fx.checkpoint.refusal import BASE, MergeRefusal
from lora_fx.checkpoint.renaming import renaming
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.safetensors import Tensors
from lora_fx.text import JsonView, is_whole


def other_model(adapter: Adapter, where: str, base: Checkpoint) -> str:
    """What the configs of an adapter and of a checkpoint say that each is of.

    Empty where one of them does not say it, or both name the same.
    """
    named, config = adapter.metadata.get(NAMED), base.config()
    theirs, kind = config.get("_name_or_path"), config.get("model_type")
    if not isinstance(named, str) or not named or not (theirs or kind):
        return ""
    last = named.rstrip("/").rpartition("/")[2].lower()
    if last in (str(theirs).rstrip("/").rpartition("/")[2].lower(), base.path.name.lower()):
        return ""
    size = config.get("hidden_size")
    described = repr(theirs) if theirs else f"a {kind}"
    described += f" of hidden size {size}" if is_whole(size) else ""
    return (
        f"{where} was trained on {named!r}, says its config; that of {base.path} says {described}"
    )


def base_note(
    adapter: Adapter, where: str, base: Checkpoint, known: Tensors, any_base: bool
) -> str:
    """Why an adapter's base is not verified; empty where the checkpoint is that base.

    Args:
        adapter: An adapter with metadata["base"], or without.
        where: The adapter, for messages.
        base: The checkpoint.
        known: Its tensors under every name that an adapter may use.
        any_base: Say so, instead of raising, where it is another base.

    Raises:
        LoraFxError: The adapter was trained on other weights.
    """
    rename = renaming(adapter, known, base.config(), [])
    recorded: JsonView | None = adapter.metadata.get(FIELD)
    same, why = compared(recorded, lambda n, dtype: sample_of(n, known.get(rename(n)), dtype))
    if same is None:
        if recorded is None and (named := adapter.metadata.get(NAMED)):
            why = f"its config names {named!r}, and holds no sample of the weights"
        return f"{where}: its base is not verified: {why}"
    if same:
        return ""
    said = f"{where}: it was trained on other weights than those of {base.path}"
    if history(base):
        return f"{said}, which other adapters were merged into"
    if any_base:
        return said
    assert recorded is not None  # it was compared
    raise MergeRefusal(
        BASE,
        adapter.lowrank,
        f"{said}: samples of the {len(recorded['names'])} tensors that it changed there differ",
        "merge it into the base that it was trained on; --any-base merges it anyway",
    )
