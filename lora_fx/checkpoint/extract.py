"""extract: an adapter that turns one checkpoint into another, tensor by tensor.

Δ = tuned − base of every matrix that differs is approximated by the best b @ a of a rank (see
lowrank.py); alpha = rank, so that base + b @ a ≈ tuned. Peak memory is a few times one Δ, whatever
the size of the checkpoints; errors are measured on the fp32 factors, element by element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank, above_noise, balanced, leading, squared_distance
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Entry
from lora_fx.checkpoint.base_fingerprint import file_fingerprint
from lora_fx.checkpoint.extract_options import RANK, ExtractOptions
from lora_fx.checkpoint.extract_scope import scope_of
from lora_fx.checkpoint.extract_sides import check_lookups, sides_of
from lora_fx.checkpoint.extraction import Extracted, Extraction, Outcome
from lora_fx.checkpoint.file_targets import targets_of
from lora_fx.checkpoint.tensor_pair import TensorPair, pair_of
from lora_fx.checkpoint.tensor_uses import TensorUse, config_of, uses
from lora_fx.dtypes import FLOATING, Array
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.files.checkpoint import tensors
from lora_fx.files.hub import local, origin
from lora_fx.files.read import check_unchanged, remembering, trusting
from lora_fx.files.safetensors import same_bytes, stored
from lora_fx.inputs import generator
from lora_fx.targets.plan import select_names

LITTLE = 0.5
"""A share of ‖Δ‖² below which an update is said to keep little of its Δ."""


def extract(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    also_full: bool = False,
    allow_missing: bool = False,
    fan_in_fan_out: bool | None = None,
    seed: int = 0,
    whole: str | Sequence[str] | None = None,
    trust: bool = False,
) -> Adapter:
    """The adapter that turns `base` into `tuned`, as well as its ranks allow.

    Args:
        base: A Hugging Face folder, its id on the Hub (hf:ORG/NAME), or a .safetensors file.
        tuned: The same, with the same tensors.
        rank: The rank of every update, capped by the smaller side; 16 where energy is not given.
        energy: Instead of rank: per tensor the lowest rank that holds this share of ‖Δ‖².
        max_rank: Cap of what energy chooses; 128.
        include: Selectors of the weights to look at; all where none is given.
        exclude: Selectors of tensors to leave out, of any shape.
        also_full: Vectors that differ (norms, biases) go into the adapter as whole tensors.
        allow_missing: Leave out, with a note, tensors of one side only or of two shapes.
        fan_in_fan_out: Linear weights are stored [in, out]; None: config.json says.
        seed: The seed of the random subspaces; each key draws numbers of its own.
        whole: Selectors of tensors that go into the adapter whole where they differ, such as a
            head that was trained whole.
        trust: Read pickles, by torch's unpickler that runs no code.

    Returns:
        fp32 updates by tensor name, with layouts, alpha = rank. metadata["notes"] has what must be
        said; `extraction` also gives the errors.

    Raises:
        NoEffectError: Nothing differs.
        LoraFxError: Names or shapes that do not fit each other, integers or quantised values that
            differ, values that are not finite; all by name.
    """
    options = ExtractOptions(
        rank=rank, energy=energy, max_rank=max_rank, include=include, exclude=exclude,
        also_full=also_full, allow_missing=allow_missing, fan_in_fan_out=fan_in_fan_out, seed=seed,
        whole=whole, trust=trust,
    )  # fmt: skip
    return extraction(base, tuned, options).adapter


@remembering()
def extraction(
    base: str | Path,
    tuned: str | Path,
    options: ExtractOptions,
    progress: Callable[[float], None] | None = None,
) -> Extraction:
    """As extract, with the report; `progress` is told the share of bytes that is done."""
    base, tuned = local(base), local(tuned)
    with trusting(options.trust):
        sides = sides_of(*((str(p), tensors(p), config_of(p)) for p in (base, tuned)))
    old, new = sides.old, sides.new
    found = targets_of(old)
    kinds = uses(old, found, config_of(base), options.fan_in_fan_out, sides.table)
    scope, notes = scope_of(found, (str(base), old), (str(tuned), new), options)
    check_lookups(sides, scope, str(tuned))
    notes += (n for n in sides.notes if n.partition(":")[0] in scope)
    full = select_names(scope, options.whole or (), "whole")
    kinds |= {key: replace(kinds[key], layout=None) for key in full}
    entries: dict[str, Entry] = {}
    rows: list[Extracted] = []
    unchanged: list[str] = []
    left_out: list[str] = []
    done, total = 0, sum(old[k].stop - old[k].start for k in scope) or 1
    for key in scope:
        pair = pair_of(key, old[key], new[key], kinds[key].lead)
        change, row = _change(pair, kinds[key], options)
        if change is None:
            unchanged.append(key)
        elif isinstance(change, Full) and not options.also_full and key not in full:
            left_out.append(key)
        else:
            entries[key] = change
        if row is not None:
            rows.append(row)
        done += pair.base.stop - pair.base.start
        if progress is not None:
            progress(done / total)
    check_unchanged()
    if not entries:
        hint = f"only vectors differ ({left_out[0]} …); --also-full takes them" if left_out else ""
        raise NoEffectError(
            f"{tuned}: no weight differs from {base}", hint or "is it the tuned model?"
        )
    notes += _notes(rows, kinds, left_out)
    low = [k for k, entry in entries.items() if isinstance(entry, LowRank)]
    metadata = {"base_model_name_or_path": str(base), "notes": notes, **origin(base)}
    metadata |= file_fingerprint(low, old)
    skipped = len(old) - len(scope)
    return Extraction(
        Adapter(entries, metadata), tuple(rows), tuple(unchanged), tuple(left_out), skipped
    )


def _change(pair: TensorPair, use: TensorUse, options: ExtractOptions) -> Outcome:
    """What has become of one tensor; one without low-rank update is taken whole."""
    if same_bytes(pair.base, pair.tuned):
        return None, None
    for info in (pair.base, pair.tuned):
        if info.dtype not in FLOATING:
            raise LoraFxError(
                f"{info.file}: tensor {pair.key!r} is {info.dtype} and differs; expected one of "
                f"{', '.join(FLOATING)}",
                f"--exclude {pair.key} leaves it out",
            )
    if use.layout is not None:
        return _approximate(pair, use, options)
    if not any(pair.delta(i)[0].any() for i in range(pair.batch)):
        return None, None
    return Full(stored(pair.tuned).astype(pair.dtype, copy=False), use.tied), None


def _approximate(pair: TensorPair, use: TensorUse, options: ExtractOptions) -> Outcome:
    """The update of one tensor and its row."""
    delta = functools.lru_cache(1)(pair.delta)  # one matrix at a time
    limit = min(options.limit, pair.rows, pair.columns)
    k = limit if options.energy is None else min(limit, RANK)
    while True:
        parts, norms = [], []
        for i in range(pair.batch):
            matrix, changed, original = delta(i)
            norms.append((changed, original))
            parts.append(leading(matrix, k, generator(f"{pair.key}[{i}]", options.seed)))
        total = math.fsum(n for n, _ in norms)
        if not total:
            return None, None
        rank, enough = k, True
        if options.energy is not None:
            reached = np.cumsum(sum(s**2 for _, s, _ in parts)) >= options.energy * total
            enough = bool(reached.any())
            rank = int(np.argmax(reached)) + 1 if enough else k
        if enough or k == limit:
            break
        k = min(limit, 2 * k)
    factors = [balanced(*p, rank) for p in parts]
    lost = math.fsum(squared_distance(delta(i)[0], a, b) for i, (a, b) in enumerate(factors))
    first = math.fsum(float(s[0]) ** 2 for _, s, _ in parts)
    shape = (pair.rows, pair.columns)
    noise = [above_noise(s, n, shape) for (_, s, _), (n, _) in zip(parts, norms, strict=True)]
    row = Extracted(
        key=pair.key,
        shape=pair.base.shape,
        rank=rank,
        norm=math.sqrt(total),
        base_norm=math.sqrt(math.fsum(n for _, n in norms)),
        error=math.sqrt(lost),
        stable_rank=total / first,
        above_noise=max(noise),
        known=k,
        enough=enough,
    )
    return _update(use, factors), row


def _update(use: TensorUse, factors: Sequence[tuple[Array, Array]]) -> LowRank:
    """Factors of the stored matrices as an update."""
    a, b = (np.stack(side) for side in zip(*factors, strict=True))
    if use.swapped:
        a, b = np.swapaxes(b, -1, -2), np.swapaxes(a, -1, -2)
    if not use.lead:
        a, b = a[0], b[0]
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    origin = Origin(op=use.op, tied=use.tied)
    return LowRank(a, b, float(b.shape[-1]), use.layout, origin=origin)


def _notes(
    rows: Sequence[Extracted], kinds: dict[str, TensorUse], left_out: Sequence[str]
) -> Iterator[str]:
    for r in rows:
        said, kept = f"{r.key}: rank {r.rank}", 1 - r.relative**2
        if not r.enough:
            yield f"{said} is the cap and holds {kept:.1%} of ‖Δ‖²"
        elif kept < LITTLE:
            asked = f"was it trained whole? --whole {r.key} takes it so"
            yield f"{said} keeps {kept:.0%} of ‖Δ‖²: {asked}"
        if kinds[r.key].tied:
            yield f"{r.key}: the table is the output head too, and the update acts on both"
    if left_out:
        yield (
            "vectors that differ and are not in the adapter, which --also-full "
            f"would take: {', '.join(left_out)}"
        )
