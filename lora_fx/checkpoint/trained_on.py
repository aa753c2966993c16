"""Check whether a checkpoint is the base that an adapter was trained on."""

from __future__ import annotations

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.base_fingerprint import FIELD, NAMED, Sample, compared, sample_of
from lora_fx.checkpoint.provenance import history
from lora_fx.checkpoint.refusal import BASE, MergeRefusal
from lora_fx.checkpoint.renaming import renaming
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.safetensors import Tensors
from lora_fx.text import JsonView, is_whole


def other_model(adapter: Adapter, where: str, base: Checkpoint) -> str:
    """A message if the configs of an adapter and a checkpoint name different models.

    Empty if one of them names none, or both name the same.
    """
    trained_on = adapter.metadata.get(NAMED)
    config = base.config()
    base_name = config.get("_name_or_path")
    model_type = config.get("model_type")
    if not isinstance(trained_on, str) or not trained_on or not (base_name or model_type):
        return ""
    if _last_part(trained_on) in (_last_part(str(base_name)), base.path.name.lower()):
        return ""
    description = repr(base_name) if base_name else f"a {model_type}"
    size = config.get("hidden_size")
    if is_whole(size):
        description += f" of hidden size {size}"
    return (
        f"the config of {where} names the base {trained_on!r}; the config of {base.path} names "
        f"{description}"
    )


def _last_part(name: str) -> str:
    """The last part of a path or of a model's id, in small letters."""
    return name.rstrip("/").rpartition("/")[2].lower()


def base_note(
    adapter: Adapter, where: str, base: Checkpoint, known: Tensors, any_base: bool
) -> str:
    """Why the base could not be verified; empty if the adapter was trained on this checkpoint.

    Args:
        adapter: An adapter with metadata["base"], or without.
        where: The adapter, for messages.
        base: The checkpoint.
        known: Its tensors under every name that an adapter may use.
        any_base: Return a note, instead of raising, for another base.

    Raises:
        LoraFxError: The adapter was trained on other weights.
    """
    rename = renaming(adapter, known, base.config(), [])
    fingerprint: JsonView | None = adapter.metadata.get(FIELD)

    def sample(name: str, dtype: str) -> Sample:
        return sample_of(name, known.get(rename(name)), dtype)

    is_same, why = compared(fingerprint, sample)
    if is_same:
        return ""
    if is_same is None:
        trained_on = adapter.metadata.get(NAMED)
        if fingerprint is None and trained_on:
            why = f"its config names {trained_on!r}, but holds no sample of the weights"
        return f"{where}: its base is not verified: {why}"

    other_weights = f"{where}: it was trained on other weights than those of {base.path}"
    if history(base):
        return f"{other_weights}, into which other adapters were merged"
    if any_base:
        return other_weights
    assert fingerprint is not None  # it was compared
    count = len(fingerprint["names"])
    raise MergeRefusal(
        BASE,
        adapter.lowrank,
        f"{other_weights}: samples of the {count} tensors that it changes differ",
        "merge it into the base that it was trained on; --any-base merges it anyway",
    )
