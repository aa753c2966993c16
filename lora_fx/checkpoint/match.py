"""The match of adapter entries to checkpoint tensors, with each entry's layout.

No graph is read, so the shapes decide: a weight stored [out, in] or, as GPT-2's Conv1D, [in, out].
For a square one, the rest of the adapter and the model's family decide. Where the head is the
embedding, the two uses of one tensor are told apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Entry, twins_of
from lora_fx.checkpoint.fused_rows import known_rows
from lora_fx.checkpoint.missing_layers import missing_layers_of
from lora_fx.checkpoint.placed import Placed, region_of, use_of, with_layout
from lora_fx.checkpoint.refusal import MISSING, UNUSED, MergeRefusal
from lora_fx.checkpoint.renaming import Renaming, renaming
from lora_fx.checkpoint.storage_order import in_out_weights
from lora_fx.checkpoint.stored_stacks import EXPERT_NAME, placed_in_stack, stacked
from lora_fx.files.safetensors import Tensors
from lora_fx.targets.keys import base_name
from lora_fx.text import JsonView, near, some


def match(
    adapter: Adapter,
    tensors: Tensors,
    config: JsonView,
    where: str,
    *,
    new: Tensors | None = None,
    allow_unused: bool = False,
    allow_missing: bool = False,
    source: str = "ADAPTER",
) -> tuple[list[Placed], list[str]]:
    """Match every entry of an adapter to its tensor; also return notes.

    Args:
        adapter: Bound or not.
        tensors: The checkpoint's tensors.
        config: config.json of the checkpoint; empty where there is none.
        where: The checkpoint, for messages.
        new: Whole tensors that the checkpoint lacks and is to get, by the adapter's names.
        allow_unused: Entries without a tensor become notes.
        allow_missing: Layers that the adapter's config adapts and its file lacks become notes too.
        source: The adapter, for messages.

    Raises:
        LoraFxError: An entry without a tensor, a shape that does not fit, a doubt about how a
            weight is stored.
    """
    adapter = adapter.resolved(tensors)
    notes: list[str] = []
    rename = renaming(adapter, tensors, config, notes)
    adapter = stacked(adapter, rename)
    in_out = in_out_weights(adapter, rename, where, notes)

    placed: list[Placed] = []
    unmatched: list[str] = []
    for key, entry in adapter.entries.items():
        if new and key in new:
            bounds = tuple((0, size) for size in new[key].shape)
            placed.append(Placed(key, key, bounds, entry))
            continue
        stack = rename.stack(base_name(key))
        if stack is not None:
            placed += placed_in_stack(key, entry, stack)
            continue
        names = stored_names(key, entry, rename)
        if names:
            placed += _placed_at(key, entry, names, tensors, in_out)
        else:
            unmatched.append(key)

    if unmatched:
        if not allow_unused:
            raise MergeRefusal(
                UNUSED,
                unmatched,
                f"{where}: no tensor for {len(unmatched)} of the adapter's keys: {some(unmatched)}",
                _hint_for_unmatched(unmatched, adapter, rename, where, source),
            )
        notes.append(f"left out, because the base has no such tensor: {some(unmatched)}")
    notes += _check_missing(adapter, rename, where, allow_missing=allow_missing)
    return placed, notes


def stored_names(key: str, entry: Entry, rename: Renaming) -> list[str]:
    """Return the tensors that an entry changes: its own tensor first, then tensors tied to it.

    Empty where the checkpoint has none of them, or has a stack's matrices as tensors of their own.
    """
    use = use_of(key, entry)
    alias = use if use in rename.tensors else base_name(key)  # the name that it acts through
    names = [rename(alias), *map(rename, twins_of(entry))]
    return [name for name in names if name in rename.tensors]


def _placed_at(
    key: str, entry: Entry, names: list[str], tensors: Tensors, in_out: Collection[str]
) -> Iterator[Placed]:
    """Place an entry at its tensor, and at the tensors that PEFT tied to it.

    Args:
        key: The adapter's.
        entry: What changes.
        names: The names of its tensor and of those tied to it, which the checkpoint has.
        tensors: The checkpoint's.
        in_out: Names of square weights that are stored [in, out].
    """
    first = names[0]  # a tied tensor is stored under one of its names
    info = tensors[first]
    bounds = region_of(key, info)
    laid_entry = with_layout(key, entry, info, bounds, first in in_out)
    yield Placed(key, first, bounds, laid_entry)
    for name in names:
        if name != first and tensors[name].shape == info.shape:
            yield Placed(key, name, bounds, laid_entry)


def _hint_for_unmatched(
    unmatched: list[str], adapter: Adapter, rename: Renaming, where: str, source: str
) -> str:
    """Return a hint for an adapter with updates of tensors that the checkpoint lacks.

    The first of these that holds decides:
    1. both have experts: convert the adapter to their layout in the checkpoint;
    2. the checkpoint has the parts of a fused weight: convert the adapter to updates of those;
    3. it has the fused weight, and the adapter its parts: convert it the other way;
    4. no key has a tensor, whole tensors aside: the adapter is of another model;
    5. leave the entries out, or add them where all are whole tensors.
    """
    stored = rename.tensors
    if any(map(EXPERT_NAME.search, unmatched)) and any(map(EXPERT_NAME.search, stored)):
        convert = f"lora-fx convert {source} -o LAID --format peft --base {where}"
        return f"{convert}; then merge LAID: the adapter and the base lay out experts differently"

    wholes = known_rows(adapter, stored, rename.config, apart=True)
    if any(whole in unmatched for whole in wholes):
        return f"lora-fx convert {source} -o SPLIT --split --base {where}; then merge SPLIT"
    fused = known_rows(adapter, stored, rename.config, apart=False)
    if any(not parts.keys().isdisjoint(unmatched) for parts in fused.values()):
        return f"lora-fx convert {source} -o FUSED --fuse --base {where}; then merge FUSED"

    names = [*stored, *rename.loaded.names, *rename.loaded.stacks]
    nearest = near(unmatched[0], names, "the base uses other names;")
    is_of_other_model = len(unmatched) == len(adapter.entries)
    if is_of_other_model and not adapter.full:
        of_this_model = f"{nearest} check that it is an adapter of this model"
        return of_this_model + _hint_for_renamed(rename.config)
    hint = f"{nearest} pass --allow-unused to leave these updates out"
    if all(isinstance(adapter.entries[key], Full) for key in unmatched):
        return f"{hint}, or --add to write them as new tensors"
    return hint + _hint_for_renamed(rename.config)


def _hint_for_renamed(config: JsonView) -> str:
    """Return a hint for a base whose tensor names change when it is loaded; may be empty."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return ""
    return (
        "; if this is the right base: transformers 5 renames parameters when it loads some "
        f"models, and lora-fx does not know these names for {model_type!r}; save the base with "
        "the loaded model's names, save_pretrained(…, save_original_format=False), and merge "
        "into that"
    )


def _check_missing(
    adapter: Adapter, rename: Renaming, where: str, *, allow_missing: bool
) -> list[str]:
    """Return a note on layers that the adapter's config names and its file lacks, if any.

    Raises:
        LoraFxError: There are, and they are not allowed.
    """
    missing = missing_layers_of(adapter, rename)
    if not missing:
        return []
    name, target_module = next(iter(missing.items()))
    message = (
        f"{where}: the adapter's config adapts {name!r} (target_modules {target_module!r}), but "
        f"the adapter's file has no update for it: {len(missing)} such layers"
    )
    if not allow_missing:
        raise MergeRefusal(
            MISSING,
            [f"{name}.weight" for name in missing],
            message,
            "check that the file is complete and that this is its base; or pass "
            "--allow-missing to leave these layers unchanged",
        )
    return [message]
