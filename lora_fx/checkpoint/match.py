"""Which tensor of a checkpoint each entry of an adapter changes, and how it lies there.

No graph is read, so the shapes decide: a weight stored [out, in] or, as GPT-2's Conv1D, [in, out].
For a square one, the rest of the adapter and the model's family decide. Where the head is the
embedding, the two uses of one tensor are told apart.
"""

from __future__ import annotations

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Entry, twins_of
from lora_fx.checkpoint.expert_stacks import EXPERT_NAME, placed_in_stack, stacked
from lora_fx.checkpoint.fused_rows import known_rows
from lora_fx.checkpoint.missing_layers import absent_of
from lora_fx.checkpoint.placed import Placed, region_of, use_of, with_layout
from lora_fx.checkpoint.refusal import MISSING, UNUSED, MergeRefusal
from lora_fx.checkpoint.renaming import Renaming, renaming
from lora_fx.checkpoint.storage_order import turned_weights
from lora_fx.files.safetensors import Tensors
from lora_fx.targets.target import base_name
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
    """Every entry at its tensor, and notes.

    Args:
        adapter: Bound or not.
        tensors: The checkpoint's tensors.
        config: config.json of the checkpoint; empty where there is none.
        where: The checkpoint, for messages.
        new: Whole tensors that the checkpoint lacks and is to get, by the adapter's names.
        allow_unused: Entries without a tensor become notes.
        allow_missing: So do layers that the adapter's own config adapts and its file lacks.
        source: The adapter, for messages.

    Raises:
        LoraFxError: An entry without a tensor, a shape that does not fit, a doubt about how a
            weight is stored.
    """
    adapter = adapter.resolved(tensors)
    notes: list[str] = []
    rename = renaming(adapter, tensors, config, notes)
    adapter = stacked(adapter, rename)
    placed, lost = [], []
    turned = turned_weights(adapter, rename, where, notes)
    for key, entry in adapter.entries.items():
        if new and key in new:
            placed.append(Placed(key, key, tuple((0, n) for n in new[key].shape), entry))
            continue
        stack = rename.stack(base_name(key))
        if stack is not None:
            placed += placed_in_stack(key, entry, stack)
            continue
        names = stored_names(key, entry, rename)
        if not names:
            lost.append(key)
            continue
        name = names[0]  # a tied tensor is stored under one of its names
        info = tensors[name]
        bounds = region_of(key, info)
        bound = with_layout(key, entry, info, bounds, name in turned)
        # What PEFT tied to this tensor changes alike.
        alike = [n for n in names if n != name and tensors[n].shape == info.shape]
        placed += (Placed(key, n, bounds, bound) for n in (name, *alike))
    if lost:
        whole = all(isinstance(adapter.entries[key], Full) for key in lost)
        known = [*tensors, *rename.loaded.names, *rename.loaded.stacks]
        hint = f"{near(lost[0], known, 'its names are others;')} --allow-unused leaves them out"
        hint += ", --add writes them as new tensors" if whole else _renamed(config)
        for apart, way in ((False, "-o FUSED --fuse"), (True, "-o SPLIT --split")):
            rows = known_rows(adapter, tensors, config, apart=apart)
            if {*lost} & {k for key, parts in rows.items() for k in ([key] if apart else parts)}:
                hint = f"lora-fx convert {source} {way} --base {where}; then merge that"
        if any(map(EXPERT_NAME.search, lost)) and any(map(EXPERT_NAME.search, tensors)):
            laid_out = f"lora-fx convert {source} -o LAID --format peft --base {where}"
            hint = f"{laid_out}; then merge that: experts are laid out in several ways"
        if not allow_unused:
            said = f"{where}: no tensor for {len(lost)} of the adapter's keys: {some(lost)}"
            raise MergeRefusal(UNUSED, lost, said, hint)
        notes.append(f"left out, the base has no such tensor: {some(lost)}")
    absent = absent_of(adapter, rename)
    if absent:
        name, by = next(iter(absent.items()))
        said = (
            f"{where}: {name!r} is adapted by the adapter's own config (target_modules {by!r}), "
            f"but its file has no update of it: {len(absent)} such layers"
        )
        hint = "is the file complete, and this its base? --allow-missing leaves them as they are"
        if not allow_missing:
            raise MergeRefusal(MISSING, [f"{name}.weight" for name in absent], said, hint)
        notes.append(said)
    return placed, notes


def stored_names(key: str, entry: Entry, rename: Renaming) -> list[str]:
    """The tensors of a checkpoint that an entry changes: its own first, then what is tied to it.

    Empty where the checkpoint has none of them, or has a stack's matrices as tensors of their own.
    """
    use = use_of(key, entry)
    name = rename(use if use in rename.tensors else base_name(key))  # the alias it acts through
    names = [name, *map(rename, twins_of(entry))]
    return [candidate for candidate in names if candidate in rename.tensors]


def _renamed(config: JsonView) -> str:
    """Why names may differ from the file's though it is the base, and what helps."""
    kind = config.get("model_type")
    return (
        "; if this is the base: transformers 5 renames parameters when it loads some models, and "
        f"of {kind!r} lora-fx does not know these names; save the base as the loaded model has "
        "them, save_pretrained(…, save_original_format=False), and merge into that"
        if isinstance(kind, str)
        else ""
    )
