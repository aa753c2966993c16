"""A base and an adapter side by side, for doctor: what is known of both, sound or not.

The checks that need the adapter's file alone are here, too.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank, grouped
from lora_fx.adapter.updates import Entry
from lora_fx.checkpoint.match import match, stacked, tie_and_names
from lora_fx.checkpoint.merge_plan import MergeOptions
from lora_fx.checkpoint.model_families import Tie
from lora_fx.checkpoint.provenance import adapter_hash, stretches
from lora_fx.checkpoint.renaming import Renaming, renaming
from lora_fx.checkpoint.requantise import int8_of
from lora_fx.dtypes import FLOATING, Array
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint, open_checkpoint
from lora_fx.files.quantised.dequantise import CodesInfo, dequantised
from lora_fx.files.read import json_object
from lora_fx.files.safetensors import TensorInfo, Tensors, finite, is_float, read_tensors
from lora_fx.formats.io import check_elements, format_of, load_adapter, tensor_file
from lora_fx.formats.peft.config import (
    KEEPS_BASE,
    MERGE,
    REDONE,
    REFUSED,
    Pattern,
    facts,
    group_of,
    wanted_by,
)
from lora_fx.formats.peft.file import KINDS, config_of
from lora_fx.formats.peft.names import (
    OWN,
    PREFIX,
    WRAPPER,
    Group,
    from_tensors,
    split_name,
    unwrapped,
)
from lora_fx.targets.target import base_name
from lora_fx.text import Json, JsonView, is_number

ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        keys: Keys of the adapter, or names of tensors, that it is about.
        found: What is there.
        expected: What should be.
        hint: What to do.
        severity: error: the pair is wrong; warning: look at it; note.
        check: Name of the check.
    """

    keys: Sequence[str]
    found: str
    expected: str
    hint: str
    severity: str = ERROR
    check: str = ""

    def to_json(self) -> Json:
        """One row of `findings[]`."""
        first = {"check": self.check, "severity": self.severity}
        return first | vars(self) | {"keys": list(self.keys)}


@dataclass(frozen=True)
class Pair:
    """What the checks look at.

    Attributes:
        base: The checkpoint.
        tensors: Its tensors, a tied head that is not stored among them; those that a merge takes
            by option only as floats.
        codes: All quantised weights of it as floats.
        tie: How its head and embedding are tied.
        path: The adapter.
        raw: Its file without judgement; an empty one for formats other than PEFT's.
        adapter: As far as it can be read.
        refusal: Why its reader does not take it.
        rename: The adapter's names → the base's.
        misfits: Key → why it does not fit its tensor.
        digest: The hash under which a merge records the adapter; empty where it is refused.
        options: Of the merge that is asked about.
    """

    base: Checkpoint
    tensors: Tensors
    codes: Tensors
    tie: Tie | None
    path: Path
    raw: Raw
    adapter: Adapter
    refusal: LoraFxError | None
    rename: Renaming
    misfits: Mapping[str, str]
    digest: str
    options: MergeOptions

    def tensor(self, key: str) -> TensorInfo | None:
        """The base's tensor of a key."""
        return self.rename.info(base_name(key), self.tensors)

    def ratio(self, key: str) -> float | None:
        """‖ΔW‖/‖W‖: ΔW exactly, W from samples of its tensor; None where it cannot be had."""
        low, name = self.adapter.lowrank.get(key), self.rename(base_name(key))
        info = self.codes.get(name, self.tensor(key))
        if low is None or info is None or info.dtype not in FLOATING or 0 in info.shape:
            return None
        weight = math.sqrt(math.prod(info.shape) * float(np.mean(np.square(sample(info)))))
        ratio = norm(low) / weight if weight else math.inf
        return ratio if math.isfinite(ratio) else None


Check = Callable[[Pair], Iterable[Finding]]


def about(keys: Sequence[str], found: str, expected: str, hint: str) -> Iterator[Finding]:
    """An error of all these keys; nothing where there are none."""
    if keys:
        yield Finding(keys, found, expected, hint)


def open_pair(base: str | Path, adapter: str | Path, options: MergeOptions) -> Pair:
    """Read the headers of a base and the whole of an adapter.

    Raises:
        LoraFxError: A file that cannot be read at all.
    """
    checkpoint, path = open_checkpoint(Path(base)), Path(adapter)
    check_elements(tensor_file(path), 2 * checkpoint.elements)
    codes: Tensors = {}
    with contextlib.suppress(LoraFxError):  # told by a check of its own
        every = dequantised(checkpoint, "bfloat16").tensors
        codes = {n: t for n, t in every.items() if isinstance(t, CodesInfo)}
    asked = {n: t for n, t in codes.items() if int8_of(n, checkpoint) is None}
    read: Adapter | None = None
    refusal, digest = None, ""
    try:
        read = load_adapter(path, base=base, resolve=False)
        digest = adapter_hash(read)
        read = read.resolved({**checkpoint.tensors, **asked})
    except LoraFxError as error:
        refusal = error
    raw = Raw()
    with contextlib.suppress(LoraFxError):  # its reader has said so
        raw = read_raw(path)
    if refusal is not None and read is None and raw.file is None:
        raise refusal
    read = raw.adapter() if read is None else read
    config = checkpoint.config()
    tie, stored = tie_and_names(checkpoint, read.entries)
    tensors = {**stored, **asked}
    rename = renaming(read, tensors, config, [])
    with contextlib.suppress(LoraFxError):  # told by the last check
        read = stacked(read, tensors, config, rename)
    reasons = {key: _misfit(key, read, tensors, config, rename) for key in read.entries}
    misfits = {key: why for key, why in reasons.items() if why}
    return Pair(
        checkpoint, tensors, codes, tie, path, raw, read, refusal, rename, misfits, digest, options
    )


def _misfit(
    key: str, adapter: Adapter, tensors: Tensors, config: JsonView, rename: Renaming
) -> str:
    """Why one update does not fit its tensor; empty where it fits, or has none."""
    old = base_name(key)
    name, stack = rename(old), rename.stack(old)
    names = {part.tensor for part in stack.parts} if stack else {name} & {*tensors}
    if not names:
        return ""
    metadata = {k: v for k, v in adapter.metadata.items() if k == "fan_in_fan_out"}
    entries = {name + key.removeprefix(old): adapter.entries[key]}
    one = replace(adapter, entries=entries, metadata=metadata)
    try:
        match(one, {n: tensors[n] for n in names}, config, "")
    except LoraFxError as error:
        return error.message
    return ""


def norm(low: LowRank) -> float:
    """‖s·BA‖ in Frobenius norm, without BA: its square is s² Σ (AAᵀ ∘ BᵀB)."""
    a, b = low.a.astype(np.float64), low.b.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.sum((a @ np.swapaxes(a, -1, -2)) * (np.swapaxes(b, -1, -2) @ b))
        return float(abs(low.scale) * np.sqrt(max(square, 0.0)))


def sample(info: TensorInfo) -> Array:
    """Elements of a float tensor from its start, middle and end, in fp64."""
    try:
        parts = stretches(info, 4096, (0.0, 0.5, 1.0))
    except LoraFxError:  # codes or scales that are no numbers
        if not isinstance(info, CodesInfo):
            raise
        return np.full(1, np.nan)
    return np.concatenate(parts).astype(np.float64)


# A PEFT adapter read without judging it: what is there, under whatever names, sound or not.
#
# `peft.file` stops at the first thing that is wrong. A diagnosis needs everything else too, so here
# tensors are only sorted by their names, and nothing is refused but what is no file of tensors.


_ADAPTER = re.compile(r"(\.lora_(?:[AB]|embedding_[AB]|magnitude_vector))\.(?!weight$|bias$)\w+")
"""An adapter's own name within that of a tensor, which PEFT leaves out of its files."""
_WRAPPERS = (WRAPPER, "modules_to_save", "original_module")


@dataclass(frozen=True)
class Raw:
    """An adapter's file as it is.

    Attributes:
        file: The tensors' file; None for a format other than PEFT's, of which nothing is here.
        tensors: All of them.
        config: adapter_config.json, or the one inside our own file; empty where there is none.
        updates: Key → the tensors of a low-rank update.
        whole: Key → the name of a whole tensor.
        prefixes: Name → what stands before it instead of PEFT's prefix.
        broken: Key → why its tensors make no update.
    """

    file: Path | None = None
    tensors: Mapping[str, Array] = field(default_factory=dict)
    config: JsonView = field(default_factory=dict)
    updates: dict[str, Group] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    prefixes: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def adapter(self) -> Adapter:
        """What of it makes an adapter; `broken` says what does not. alpha is NaN where unknown."""
        entries: dict[str, Entry] = {}
        for key, part in self.updates.items():
            try:
                entries[key] = self._update(key, part)
            except LoraFxError as error:
                self.broken[key] = error.message
        for key, name in self.whole.items():
            entries.setdefault(key, Full(self.tensors[name]))
        return Adapter(entries, {"peft": facts(self.config)})

    def _update(self, key: str, part: Group) -> LowRank:
        if not {"a", "b"} <= set(part.names):
            have, lost = ("A", "B") if "a" in part.names else ("B", "A")
            raise LoraFxError(f"it has {have} and no {lost}", "save the adapter again")
        a, b = (self.tensors[part.names[half]] for half in "ab")
        if not a.size or not b.size or not is_float(a) or not is_float(b):
            raise LoraFxError(
                f"A is {a.dtype} {list(a.shape)}, B is {b.dtype} {list(b.shape)}",
                "save the adapter again",
            )
        with np.errstate(over="ignore", invalid="ignore"):
            a, b = a.astype(np.float32), b.astype(np.float32)
        op, kernel = "", a.shape[:0]
        if not key.endswith("]") and a.ndim >= 2:
            a, b, op, kernel = from_tensors(part.kind, a, b, key)
        variant = "rslora" if self.config.get("use_rslora") else "lora"
        low = LowRank(a, b, self._alpha(key), None, variant, op=op, kernel=kernel)
        size = group_of(self.config) if part.kind == "linear" else 0
        return grouped(low, size) if size > 0 else low

    def _alpha(self, key: str) -> float:
        alpha = None
        with contextlib.suppress(LoraFxError):
            pattern = Pattern(self.config, "alpha_pattern", "lora_alpha", str(self.file))
            alpha = pattern.of(key.removesuffix(".weight"))
        return float("nan") if alpha is None else alpha


def read_raw(path: Path) -> Raw:
    """The file of an adapter of PEFT; an empty one where it has neither its config nor its names.

    Raises:
        LoraFxError: Not a file of tensors, or a config that is no JSON.
    """
    file = tensor_file(path)
    with contextlib.suppress(LoraFxError):  # of no format that is known
        if format_of(path) != "peft":
            return Raw()
    tensors, header = read_tensors(file)
    ours: JsonView = {}
    with contextlib.suppress(LoraFxError):  # damaged: there may be a config beside the file
        ours = json_object(header.get("lora_fx", "{}"), str(file))
    config, _ = config_of(file, ours)
    raw = Raw(file, tensors, config or {})
    for name in tensors if raw.config.get("peft_type", "LORA") == "LORA" else ():
        _sort(name, raw)
    return raw if config is not None or raw.updates else Raw()


def _sort(name: str, raw: Raw) -> None:
    at = name.find(PREFIX)
    own = name.startswith(OWN)
    core = name.removeprefix(OWN) if own else name[at + len(PREFIX) :] if at >= 0 else name
    if not own and at:
        raw.prefixes[name] = name[:at] if at > 0 else ""
    plain = _ADAPTER.sub(r"\1", core)
    split = split_name(plain) or split_name(f"{plain}.weight")
    if split is None:
        if ".base_layer." not in core and ".original_module." not in core:
            key = core.removesuffix(".full") if own else core
            raw.whole[unwrapped(key, _WRAPPERS)] = name
        return
    lead, kind, part = split
    module = unwrapped(lead, _WRAPPERS)
    group = raw.updates.setdefault(module if own else f"{module}.weight", Group(lead, "", {}))
    group.names[part] = name
    group.kind = kind if part in "ab" else group.kind


# doctor's checks of an adapter's file and config by themselves. A check yields its findings.


GATHER = "saved under ZeRO-3 or FSDP without gathering the shards; gather, then save again"


def config(pair: Pair) -> Iterator[Finding]:
    """adapter_config.json is there, and says nothing that has no weight form."""
    if pair.raw.file is None:
        return  # not of PEFT
    if not pair.raw.config:
        yield Finding(
            [str(pair.path)],
            "no adapter_config.json beside the tensors or inside the file",
            "one: ranks, scales and targets are stored there",
            "take it from where the adapter comes from",
        )
    kind = pair.raw.config.get("peft_type")
    if pair.raw.config and kind not in KINDS:
        yield Finding(["peft_type"], f"peft_type = {kind!r}", " or ".join(KINDS), MERGE)
    for name, (why, hint) in REFUSED.items():
        value = pair.raw.config.get(name)
        if value not in (None, False, [], {}, ""):
            yield Finding([name], f"{name} = {value!r}: {why}", "it off", hint)


def scale(pair: Pair) -> Iterator[Finding]:
    """lora_alpha is a number; alpha, of LoHa and LoKr. OFT has none."""
    kind = pair.raw.config.get("peft_type")
    if kind not in KINDS or kind == "OFT":
        return
    name = "lora_alpha" if kind == "LORA" else "alpha"
    value = pair.raw.config.get(name)
    if not is_number(value) or not np.isfinite(value):
        found = f"no {name}" if value is None else f"{name} = {value!r}"
        yield Finding(
            [name],
            f"{found}; PEFT would take 8 without a word",
            f"a number: the scale of every update is {name} / r",
            f"add the {name} that the adapter was trained with",
        )


def ranks(pair: Pair) -> Iterator[Finding]:
    """The ranks of the tensors are those of the config."""
    if not pair.raw.config or pair.raw.config.get("target_parameters"):
        return
    try:
        pattern = Pattern(pair.raw.config, "rank_pattern", "r", "")
    except LoraFxError:
        return  # told by patterns
    wrong: dict[tuple[int, float], list[str]] = {}
    for key, low in pair.adapter.lowrank.items():
        want = pattern.of(key.removesuffix(".weight"))
        known = key in pair.raw.updates and key.endswith(".weight")
        if known and want is not None and want != low.rank:
            wrong.setdefault((low.rank, want), []).append(key)
    for (rank, want), keys in wrong.items():
        expected = f"rank {want:g}, as the config says: the scale would be in doubt"
        yield Finding(keys, f"rank {rank}", expected, "correct r or rank_pattern")


def patterns(pair: Pair) -> Iterator[Finding]:
    """Every entry of rank_pattern and alpha_pattern matches a module of the adapter."""
    keys = [*pair.raw.updates, *pair.adapter.lowrank]  # of modules; of parameters too
    modules = [k.removesuffix(".weight") for k in keys]
    for table, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        try:
            pattern = Pattern(pair.raw.config, table, default, str(pair.path))
        except LoraFxError as error:
            yield Finding([table], error.message, "patterns and numbers", "correct the config")
            continue
        for module in modules:
            pattern.of(module)
        for name in sorted(pattern.unmatched):
            found, hint = pattern.unused(name)
            yield Finding(
                [name],
                found,
                "a module's name or the end of one; PEFT ignores it without a word",
                "is it a mistake in the name? then the adapter was trained without its number; "
                f"correct it, or take it out; {hint}",
                WARNING,
            )


def start(pair: Pair) -> Iterator[Finding]:
    """init_lora_weights left the base as it is: no PiSSA, OLoRA, … that was not converted."""
    value = pair.raw.config.get("init_lora_weights", True)
    if value in (True, False, None, *KEEPS_BASE):
        return
    redone = str(value).lower() in REDONE
    yield Finding(
        list(pair.adapter.lowrank),
        f"init_lora_weights = {value!r}: a part of every base weight was taken off before training",
        "an adapter that was converted: on the original weights this one is wrong",
        "lora-fx merge takes that part off again; other tools do not"
        if redone
        else "save it again with save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        WARNING if redone else ERROR,
    )


def dora(pair: Pair) -> Iterator[Finding]:
    """use_dora is on where there are magnitudes, and off where there are none."""
    on = bool(pair.raw.config.get("use_dora"))
    odd = [k for k, p in pair.raw.updates.items() if ("magnitude" in p.names) != on]
    if on:
        yield from about(
            odd,
            "use_dora is on, but they have no lora_magnitude_vector",
            "a magnitude for each",
            "correct use_dora, or save the adapter again",
        )
    else:
        yield from about(
            odd,
            "lora_magnitude_vector tensors, but use_dora is off: they would be dropped",
            "use_dora true, or no magnitudes",
            "set use_dora to true if it was trained with DoRA",
        )


def _bad(pair: Pair, test: Callable[[Array], object]) -> list[str]:
    return [name for name, value in pair.raw.tensors.items() if test(value)]


def numbers(pair: Pair) -> Iterator[Finding]:
    """No NaN, no infinity."""
    yield from about(
        _bad(pair, lambda value: is_float(value) and not finite(value)),
        "NaN or infinite values",
        "finite numbers",
        "training has diverged; use an earlier checkpoint",
    )


def dtypes(pair: Pair) -> Iterator[Finding]:
    """Float tensors."""
    names = _bad(pair, lambda value: not is_float(value))
    names = [n for n in names if re.search(r"\.(lora|hada|lokr)_|\.weight$", n)]
    yield from about(
        names,
        f"dtype {', '.join(sorted({str(pair.raw.tensors[n].dtype) for n in names}))}",
        "float32, float16 or bfloat16",
        "the adapter was quantised or cast; save it again in a float dtype",
    )


def sizes(pair: Pair) -> Iterator[Finding]:
    """No empty tensors, in the adapter or in what it changes of the base."""
    yield from about(_bad(pair, lambda value: not value.size), "size 0", "values", GATHER)
    empty = [k for k in pair.adapter.entries if (t := pair.tensor(k)) and 0 in t.shape]
    yield from about(empty, "their tensors of the base have size 0", "weights", GATHER)


def halves(pair: Pair) -> Iterator[Finding]:
    """A and B come in pairs whose shapes fit each other."""
    for key, why in pair.raw.broken.items():
        if "it has" in why:
            yield Finding([key], why, "A and B", "the file is incomplete: save or fetch it again")
        elif "; expected" in why:
            found, _, expected = why.partition("; expected ")
            yield Finding([key], found, expected, "do A and B come from the same file?")


def names(pair: Pair) -> Iterator[Finding]:
    """Every tensor has the prefix that PEFT writes."""
    by_prefix: dict[str, list[str]] = {}
    for name, prefix in pair.raw.prefixes.items():
        by_prefix.setdefault(prefix, []).append(name)
    for prefix, these in by_prefix.items():
        what = f"the prefix {prefix!r} before PEFT's" if prefix else f"no prefix {PREFIX!r}"
        yield Finding(
            these,
            f"names with {what}: PEFT would load none of them",
            f"{PREFIX}MODULE.lora_A.weight and so on",
            f"take {prefix!r} off the names" if prefix else f"put {PREFIX!r} before the names",
        )


def dropped(pair: Pair) -> Iterator[Finding]:
    """target_modules has every module that the file has an update of."""
    fields = {**pair.raw.config, "modules_to_save": None}
    listed = fields.get("target_modules")
    if not listed or listed == "all-linear" or fields.get("target_parameters"):
        return
    out = [
        key
        for key, part in pair.raw.updates.items()
        if key.endswith(".weight")
        and part.names.get("a", "").startswith(PREFIX)
        and not _named(fields, part.names["a"], key)
    ]
    yield from about(
        out,
        "target_modules leaves them out: PEFT would drop their updates",
        "names in target_modules for all that the file holds",
        "correct target_modules in adapter_config.json",
    )


def _named(fields: Json, name: str, key: str) -> bool:
    outer = name.removeprefix(PREFIX).partition(".base_layer.")[0]
    tied = fields.get("ensure_weight_tying")
    return any(wanted_by(fields, m) for m in (key.removesuffix(".weight"), outer)) or bool(tied)


OF_FILE: dict[str, Check] = {
    "config": config,
    "alpha": scale,
    "ranks": ranks,
    "patterns": patterns,
    "initialisation": start,
    "dora": dora,
    "finite numbers": numbers,
    "dtypes": dtypes,
    "empty tensors": sizes,
    "pairs": halves,
    "names": names,
    "target_modules": dropped,
}
