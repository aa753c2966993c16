"""The plan of a merge, from headers and adapters alone: outputs, and every refusal.

Only the headers of the base are read here, and samples of its weights if an adapter records
which weights it was trained on. Nothing is written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lora_fx.adapter.adapter import Adapter, mix
from lora_fx.adapter.bind import OTHER_READERS
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.match import match
from lora_fx.checkpoint.merge_plan import MergePlan, WeightedAdapter
from lora_fx.checkpoint.merge_settings import MergeOptions
from lora_fx.checkpoint.placed import Placed
from lora_fx.checkpoint.provenance import history, refuse_again
from lora_fx.checkpoint.refusal import READ_TOO, MergeRefusal
from lora_fx.checkpoint.renaming import renaming
from lora_fx.checkpoint.requantise import in_all, sampled
from lora_fx.checkpoint.stored_codes import refuse_codes
from lora_fx.checkpoint.tensor_change import TensorChange, change_of, requantised, scales_change
from lora_fx.checkpoint.tied_names import Tie
from lora_fx.checkpoint.tied_uses import (
    check_unknown,
    of_one_use,
    one_change,
    spread,
    tie_and_names,
)
from lora_fx.checkpoint.trained_on import base_note, other_model
from lora_fx.dtypes import FLOATING
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.quantised.dequantise import (
    CodesInfo,
    dequantised,
    is_view,
    refuse_left,
    view_notes,
)
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.text import by_key, human


def make_plan(
    base: Checkpoint, adapters: Sequence[WeightedAdapter], options: MergeOptions
) -> MergePlan:
    """Match adapters to a checkpoint, and check all that is possible without reading its values.

    Raises:
        LoraFxError: Every reason not to merge that headers and adapters show.
    """
    if not adapters:
        raise LoraFxError("no adapter to merge", "call merge(base, [adapter], out)")

    stored = base  # what the output is written from: as floats only where that is asked for
    if options.reads_codes and not is_view(base):
        base = dequantised(base, options.dtype_of_codes, options.shard_bytes)
        if options.dequantise:
            refuse_left(base)
            stored = base

    _check_adapters(base, adapters, options)
    adapters = [replace(item, adapter=item.adapter.resolved(base.tensors)) for item in adapters]
    matched = _match_all(base, adapters, options)
    check_unknown(matched.placed, matched.tie, base)
    base_notes = [
        base_note(item.adapter, item.where, base, matched.names, options.any_base)
        for item in adapters
    ]
    unverified = tuple(note for note in base_notes if note)

    parted = _part_uses(matched, base, options)
    changes = _changes(parted, base, stored, options)
    notes = [*matched.notes, *_int8_notes(changes, options), *view_notes(stored), *unverified]
    return MergePlan(
        stored,
        tuple(adapters),
        changes,
        added={name: _home(stored, parted.copies.get(name)) for name in parted.added},
        tie=matched.tie if parted.of_one_use else None,
        one_use=tuple(dict.fromkeys(update.key for update in parted.of_one_use)),
        notes=tuple(dict.fromkeys(notes)),
        options=options,
        unverified=unverified,
    )


@dataclass(frozen=True)
class _Matched:
    """The updates of all adapters, matched to their tensors.

    Attributes:
        placed: The updates, in the order of the adapters.
        tie: The tie of the base's head and embedding, where it has one.
        names: The base's tensors under every name that an adapter may use, and those to add.
        notes: Warnings for the user.
    """

    placed: list[Placed]
    tie: Tie | None
    names: Tensors
    notes: list[str]


def _match_all(
    base: Checkpoint, adapters: Sequence[WeightedAdapter], options: MergeOptions
) -> _Matched:
    """Match every adapter, or the mix of all adapters.

    Raises:
        LoraFxError: An adapter that does not fit the base.
    """
    config = base.config()
    notes = _check_other_readers(adapters, options)
    weighted = _weighted(adapters, options)
    keys: list[str] = []
    for adapter, _ in weighted:
        keys += adapter.entries
    tie, names = tie_and_names(base, keys)
    placed: list[Placed] = []
    for adapter, where in weighted:
        _check_codes(adapter, base, adapters, options)
        added = _new_tensors(adapter, base) if options.add else {}
        with _of_another_model(adapter, where, base):
            updates, match_notes = match(
                adapter,
                names,
                config,
                str(base.path),
                new=added,
                allow_unused=options.allow_unused,
                allow_missing=options.allow_missing,
                source=where,
            )
        notes += adapter.metadata.get("notes", ())
        notes += match_notes
        notes += [f"added: {name}" for name in added]
        if not updates:
            raise LoraFxError(
                f"{where}: none of its keys is in {base.path}",
                "check that it is an adapter of this model",
            )
        placed += [update.at_its_use(tie, base, untie=options.untie) for update in updates]
        names = {**names, **added}
    return _Matched(placed, tie, names, notes)


def _weighted(
    adapters: Sequence[WeightedAdapter], options: MergeOptions
) -> list[tuple[Adapter, str]]:
    """Return (adapter, name) pairs to add in order: the adapters themselves, or their mix."""
    if len(adapters) > 1 and options.how not in ("sum", "cat"):
        parts = [(item.adapter, item.weight) for item in adapters]
        where = " + ".join(item.where for item in adapters)
        return [(mix(parts, options.how, options.rank), where)]
    if options.rank is not None:
        raise LoraFxError(
            "rank applies only to an svd mix of several adapters",
            "pass --how svd and several adapters, or leave --rank out",
        )
    return [(item.adapter.weighted(item.weight), item.where) for item in adapters]


def _new_tensors(adapter: Adapter, base: Checkpoint) -> dict[str, TensorInfo]:
    """Return whole tensors that the base lacks (a new head), in the base's most used dtype."""
    last_shard = base.folder / list(base.shards)[-1]
    dtypes = [info.dtype for info in base.tensors.values() if info.dtype in FLOATING]
    dtypes = dtypes or ["float32"]
    most_used = max(dict.fromkeys(dtypes), key=dtypes.count)
    rename = renaming(adapter, base.tensors, base.config(), [])
    added: dict[str, TensorInfo] = {}
    for key, full in adapter.full.items():
        if rename.info(key) is None:
            dtype = full.value.dtype.name
            if dtype in FLOATING:
                dtype = most_used
            added[key] = TensorInfo(dtype, full.value.shape, last_shard, 0, 0)
    return added


@contextlib.contextmanager
def _of_another_model(adapter: Adapter, where: str, base: Checkpoint) -> Iterator[None]:
    """A block whose errors begin with both models' names if the configs name two models."""
    try:
        yield
    except LoraFxError as error:
        lead = other_model(adapter, where, base)
        if not lead:
            raise
        if isinstance(error, MergeRefusal):
            raise error.after(lead) from error
        raise LoraFxError(f"{lead}: {error.message}", error.hint) from error


def _check_adapters(
    base: Checkpoint, adapters: Sequence[WeightedAdapter], options: MergeOptions
) -> None:
    """Raise for a weight that is not finite, and for an adapter that is given twice."""
    names_by_hash: dict[str, str] = {}
    for item in adapters:
        if not math.isfinite(item.weight):
            raise LoraFxError(
                f"{item.where}: its weight is {item.weight:g}; expected a finite number",
                "pass ADAPTER:0.5, for example",
            )
        if item.hash in names_by_hash and not options.again:
            other = names_by_hash[item.hash]
            as_other = "" if item.where == other else f", also as {other}"
            raise LoraFxError(
                f"{item.where} is given twice{as_other}",
                "pass it once, with the sum of the weights; or pass --again to merge it twice",
            )
        names_by_hash[item.hash] = item.where
    hashes = [(item.where, item.hash) for item in adapters]
    refuse_again(base.path, history(base), hashes, again=options.again)


def _check_other_readers(adapters: Sequence[WeightedAdapter], options: MergeOptions) -> list[str]:
    """Return notes on updated weights that other operations read too, without the update.

    Raises:
        LoraFxError: There are such, and they are not allowed.
    """
    notes = []
    for item in adapters:
        readers = item.adapter.metadata.get(OTHER_READERS) or {}
        for key in readers:
            if key not in item.adapter.entries:
                continue
            names = ", ".join(readers[key])
            unreached = f"{item.where}: the update of {key!r} does not apply to {names}"
            if not options.other_readers:
                raise MergeRefusal(
                    READ_TOO,
                    [key],
                    f"{unreached}, which also reads the tensor and would also get the update in "
                    "a merge",
                    "use lora-fx export, which keeps the other readers unchanged; or pass "
                    "--other-readers to merge anyway",
                )
            notes.append(
                f"{unreached}, which also reads the merged tensor and so gets the update too"
            )
    return notes


def _check_codes(
    adapter: Adapter,
    base: Checkpoint,
    adapters: Sequence[WeightedAdapter],
    options: MergeOptions,
) -> None:
    """Raise if an update is for quantised codes; the hint gives the cost of each way to merge."""
    try:
        refuse_codes(adapter.entries, base, base.config())
    except LoraFxError as error:
        hint = error.hint
        if not options.reads_codes:
            hint = _cost_of_codes(base, adapters, options) or hint
        for low in adapter.lowrank.values():
            variant = variant_of(low)
            if variant.constant_over:
                title = variant.title
                hint = (
                    f"use lora-fx export, which folds {title} into the zero points without "
                    f"loss; {hint}"
                )
                break
        raise LoraFxError(error.message, hint) from error


def _cost_of_codes(
    base: Checkpoint, adapters: Sequence[WeightedAdapter], options: MergeOptions
) -> str:
    """Return the cost of each way to merge into quantised codes; empty if no way is possible."""
    try:
        plan = make_plan(base, adapters, replace(options, dequantise=True))
        folds = [
            (change.source, change.fold)
            for change in plan.changes.values()
            if isinstance(change.source, CodesInfo)
            and change.fold
            and change.fold.matrix.rectangles
        ]
        gain, noise = in_all(sampled(folds))
    except LoraFxError:
        return ""
    sizes = f"{human(plan.disk)}B of {options.dtype_of_codes} instead of {human(base.size)}B"
    return (
        f"pass --dequantise to write floats ({sizes}); or pass --requantise to keep the codes "
        f"and {gain:.0%} of the update, with noise of {noise:.1f} times its size (estimated "
        "from a sample of rows)"
    )


@dataclass(frozen=True)
class _Parted:
    """All updates, with the uses of a tied table separated if only one of them changes.

    Attributes:
        placed: The updates.
        of_one_use: The updates that are for one use of a tied table.
        copies: Tensor to add → the base's tensor that it starts as a copy of.
        added: All tensors to add, those copies among them.
    """

    placed: list[Placed]
    of_one_use: list[Placed]
    copies: Mapping[str, str]
    added: Mapping[str, TensorInfo]


def _part_uses(matched: _Matched, base: Checkpoint, options: MergeOptions) -> _Parted:
    """Separate the uses of a tied table if an update is for one of them.

    Raises:
        LoraFxError: The uses may not, or cannot, be separated.
    """
    tensors = base.tensors
    added: dict[str, TensorInfo] = {}
    for name, info in matched.names.items():
        if name not in tensors and info.stop == 0:
            added[name] = info
    tie = matched.tie
    if tie is None:
        return _Parted(matched.placed, [], {}, added)

    placed = one_change(matched.placed, tie)
    of_one = of_one_use(placed, tie, base.config(), str(base.path), untie=options.untie)
    copies = tie.new(tensors) if of_one else {}
    added |= {name: tensors[source] for name, source in copies.items()}
    return _Parted(spread(placed, tie, {*tensors, *added}), of_one, copies, added)


def _changes(
    parted: _Parted, base: Checkpoint, stored: Checkpoint, options: MergeOptions
) -> dict[str, TensorChange]:
    """Return the change of each tensor: tensors of the base in order, then added tensors.

    Args:
        parted: All updates.
        base: The checkpoint, its codes as floats where options ask for either way to merge them.
        stored: The checkpoint that the output is written from.
        options: As asked.

    Raises:
        LoraFxError: Updates of one tensor that exclude each other, or do not fit it.
    """
    by_tensor = by_key((update.tensor, update) for update in parted.placed)
    changes: dict[str, TensorChange] = {}
    for name, info in base.tensors.items():
        is_dequantised = options.dequantise and isinstance(info, CodesInfo)
        if name not in by_tensor and not is_dequantised:
            continue
        if options.requantise and isinstance(info, CodesInfo):
            changes |= requantised(name, info, by_tensor[name], stored)
            continue
        change = change_of(name, info, by_tensor.get(name, []), base, _output_dtype(info, options))
        changes |= _with_scales(change, by_tensor, base)

    for name, info in parted.added.items():
        change = change_of(name, info, by_tensor.get(name, []), base, _output_dtype(info, options))
        what: tuple[str, ...] = ("added",)
        if name in parted.copies and change.value is None:
            what = (f"copy of {parted.copies[name]}", *change.what)
        changes |= _with_scales(replace(change, what=what), by_tensor, base)
    return changes


def _output_dtype(info: TensorInfo, options: MergeOptions) -> str | None:
    """The dtype in which a float tensor is stored; None if it does not change."""
    if isinstance(info, CodesInfo):
        return options.dtype_of_codes
    return options.dtype


def _with_scales(
    change: TensorChange, by_tensor: Mapping[str, Sequence[Placed]], base: Checkpoint
) -> dict[str, TensorChange]:
    """Return name → change, for a tensor and for its int8 scales if it has any."""
    changes = {change.name: change}
    int8 = change.int8
    if int8 is None:
        return changes
    if int8.name in by_tensor:
        raise LoraFxError(
            f"{base.path}: {by_tensor[int8.name][0].key!r} changes the scales of an int8 weight "
            "that another update changes too",
            "merge one adapter after the other",
        )
    changes[int8.name] = scales_change(int8.name, int8.scales, change.name)
    return changes


def _int8_notes(changes: Mapping[str, TensorChange], options: MergeOptions) -> list[str]:
    """Return a note on the int8 tensors that stay int8 despite `dtype`."""
    int8 = [change.name for change in changes.values() if change.int8 is not None]
    if not int8 or options.dtype is None:
        return []
    return [f"--dtype {options.dtype}: {len(int8)} int8 tensors stay int8, such as {int8[0]}"]


def _home(base: Checkpoint, source: str | None) -> str:
    """Return the shard for a new tensor: the shard of its source tensor, else the last one."""
    for name, header in base.shards.items():
        if source in header.tensors:
            return name
    return list(base.shards)[-1]
