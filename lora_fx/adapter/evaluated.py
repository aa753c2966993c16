"""Updates that read their base, evaluated on it once, so that they can be served without it.

An update whose W' is g·V, such as DoRA's, becomes one of `lora_fx.adapter.scaled_rows`. It is then
true for one base alone, whose numbers `base_number` tells from others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank, alpha_of
from lora_fx.adapter.scaled_rows import GAINS, has_gains
from lora_fx.adapter.updates import Entry, is_on_base, is_plain, name_of
from lora_fx.adapter.variant import variant_of
from lora_fx.dtypes import Array, widened
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.ir.layout import Layout
from lora_fx.ir.numpy_emitter import NumpyEmitter

BASE_NUMBER = "model_version"
"""The metadata field of the base's number: the name that a file of ONNX Runtime has for it."""
ANY_BASE = 1
"""The number of an adapter that is for any base."""
AS_TRAINED = (
    "give the adapter as it was trained, such as its PEFT folder, and not a file that an export "
    "wrote of it"
)
"""The hint for an update that was evaluated on a base."""


def can_be_evaluated(low: LowRank) -> bool:
    """Whether an update reads its base, and can be evaluated on it."""
    return is_on_base(low) and variant_of(low).stretches


def is_served(entry: Entry) -> bool:
    """Whether slots for A, B and factors of rows hold an entry: it needs no base any more."""
    return is_plain(entry) or (isinstance(entry, LowRank) and has_gains(entry))


def check_served(adapter: Adapter, what: str, hint: str) -> None:
    """Raise LoraFxError for an entry that needs its base, or that is neither sum nor tensor.

    Args:
        adapter: Bound or not.
        what: The thing that should take it, for messages.
        hint: What to do about it.
    """
    for key, entry in adapter.entries.items():
        if not is_served(entry):
            raise LoraFxError(f"{what}: the adapter's {key!r} is {name_of(entry)}", hint)


def evaluated(low: LowRank, weight: Array, where: str) -> LowRank:
    """Return an update that is evaluated on its base.

    Args:
        low: An update for which `can_be_evaluated`.
        weight: W as [*batch, out, in], in fp64.
        where: The weight, for messages.

    Raises:
        LoraFxError: A row of W + s·b·a has no direction.
    """
    variant = variant_of(low)
    if low.shape != weight.shape:
        raise MisfitError(
            f"{where}: the update is {list(low.shape)}; the weight is {list(weight.shape)}"
        )
    *batch, _, _ = axes = range(weight.ndim)
    layout = Layout(weight.shape, tuple(batch), (axes[-2],), (axes[-1],), weight.shape)
    e = NumpyEmitter()
    v = weight + low.matrix()
    beside = {field: widened(value) for field, value in variant.beside(low).items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        column = variant.stretch(e, layout, v, beside.__getitem__)
    if not np.isfinite(column).all():
        raise LoraFxError(
            f"{where}: a row of W + ΔW is zero or not finite; {variant.title} divides by its norm",
            "check that the adapter was trained on this model",
        )
    gains = np.asarray(column[..., 0] - 1.0)
    b = (low.b * column).astype(low.b.dtype)
    alpha = alpha_of(low.scale, low.rank)
    return replace(
        low,
        b=b,
        alpha=alpha,
        variant="lora",
        magnitude=None,
        frozen=0,
        variant_tensors={GAINS: gains.astype(low.b.dtype)},
    )


def weight_hash(weight: Array) -> str:
    """Return a hash of a weight [*batch, out, in] as fp32, by which it is told from others."""
    digest = hashlib.sha256(str(weight.shape).encode())
    digest.update(np.ascontiguousarray(weight, np.float32).tobytes())
    return digest.hexdigest()[:16]


def base_number(hashes: Mapping[str, str], keys: Iterable[str]) -> int:
    """Return the number, of 31 bits, of a base as some updates depend on it.

    Args:
        hashes: `weight_hash` by key.
        keys: The keys of the updates; without any, the number is ANY_BASE.
    """
    lines = [f"{key} {hashes.get(key, '')}" for key in sorted(keys)]
    if not lines:
        return ANY_BASE
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    return max(int.from_bytes(digest[:4]) >> 1, ANY_BASE + 1)


def keys_of_gains(entries: Mapping[str, Entry]) -> list[str]:
    """Return the keys of updates that have factors of rows."""
    return [key for key, low in entries.items() if isinstance(low, LowRank) and has_gains(low)]


def refuse_evaluated(adapter: Adapter, where: str, taker: str) -> None:
    """Raise LoraFxError for an update that was evaluated on a base.

    Args:
        adapter: Bound or not.
        where: What the message calls it.
        taker: What cannot take it.
    """
    for key in keys_of_gains(adapter.entries):
        raise LoraFxError(
            f"{where}: {key!r} is {name_of(adapter.entries[key])}, with the factors of its rows; "
            f"{taker} does not take these",
            AS_TRAINED,
        )


def check_number(adapter: Adapter, hash_of: Callable[[str], str]) -> None:
    """Raise LoraFxError for updates that were evaluated on another base.

    Args:
        adapter: Its keys are those of the base.
        hash_of: Gives the `weight_hash` of a key; called only for updates with factors of rows.
    """
    keys = keys_of_gains(adapter.entries)
    if not keys:
        return
    hashes = {key: hash_of(key) for key in keys}
    if adapter.metadata.get(BASE_NUMBER) != base_number(hashes, keys):
        raise LoraFxError(
            f"the adapter's {keys[0]!r} is {name_of(adapter.entries[keys[0]])}, and the factors of "
            "its rows were computed from another base than this model",
            AS_TRAINED,
        )


@dataclass(eq=False)
class Evaluation:
    """Evaluates adapters on one base; an update that comes again is not computed again.

    Attributes:
        read: Gives the weight of a key as [*batch, out, in], in fp64.
        hashes: `weight_hash` of the weights that were read so far, by key.
    """

    read: Callable[[str], Array]
    hashes: dict[str, str] = field(default_factory=dict)
    _results: dict[str, tuple[LowRank, LowRank]] = field(default_factory=dict)

    def __call__(self, adapter: Adapter) -> Adapter:
        """Return the adapter with every update evaluated that reads its base.

        Raises:
            LoraFxError: It has updates that were evaluated on another base.
        """
        check_number(adapter, self.hash_of)
        entries: dict[str, Entry] = {}
        for key, entry in adapter.entries.items():
            if isinstance(entry, LowRank) and can_be_evaluated(entry):
                entry = self._evaluated(key, entry)
            entries[key] = entry
        keys = keys_of_gains(entries)
        if not keys:
            return adapter
        metadata = {**adapter.metadata, BASE_NUMBER: base_number(self.hashes, keys)}
        return replace(adapter, entries=entries, metadata=metadata)

    def hash_of(self, key: str) -> str:
        """Return the hash of the weight of a key."""
        if key not in self.hashes:
            self.hashes[key] = weight_hash(self.read(key))
        return self.hashes[key]

    def _evaluated(self, key: str, low: LowRank) -> LowRank:
        """Return one update, evaluated."""
        if key in self._results:
            before, result = self._results[key]
            if before is low:
                return result
        weight = self.read(key)
        self.hashes[key] = weight_hash(weight)
        result = evaluated(low, weight, repr(key))
        self._results[key] = (low, result)
        return result


def hashes_of_gains(
    adapters: Mapping[str, Adapter], evaluation: Evaluation, keys: Iterable[str] = ()
) -> dict[str, str]:
    """Return key → hash of the weight, of slots that take factors of rows.

    Args:
        adapters: Evaluated; a slot takes the factors that one of them has.
        evaluation: What evaluated them.
        keys: The keys of slots that take factors in any case.
    """
    scaled = [*keys]
    for adapter in adapters.values():
        scaled += [key for key, low in adapter.lowrank.items() if has_gains(low)]
    return {key: evaluation.hash_of(key) for key in scaled}
