"""Which tensor of a checkpoint each entry of an adapter changes, and how it lies there.

No graph is read, so the shapes decide: a weight stored [out, in] or, as GPT-2's Conv1D, [in, out].
For a square one, the rest of the adapter and the model's family decide. Where the head is the
embedding, the two uses of one tensor are told apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.adapter.adapter import Adapter, means_all
from lora_fx.adapter.fused import IN_OUT_EXPERTS, ExpertLayout, experts_of, family_of, laid, place
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import (
    Change,
    Dense,
    Entry,
    ReplacedRows,
    Rotation,
    is_tied,
    name_of,
    twins_of,
)
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.loaded_names import Stack
from lora_fx.checkpoint.model_families import (
    CONV1D_MODELS,
    CONV1D_NAMES,
    Tie,
    config_of,
    generates,
    is_head,
    is_table,
    tie_in,
)
from lora_fx.checkpoint.refusal import MISSING, SHAPES, TIED, UNUSED, MergeRefusal
from lora_fx.checkpoint.releases import stacked_experts
from lora_fx.checkpoint.renaming import Renaming, absent_of, known_rows, renaming
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.files.checkpoint import Checkpoint, open_checkpoint, says_tied, text_config
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.ir.layout import Layout, plain_layout
from lora_fx.ir.view import Region
from lora_fx.targets.target import base_name, split_key, split_use
from lora_fx.text import JsonView, near, some


@dataclass(frozen=True)
class Placed:
    """An entry of an adapter at its tensor.

    Attributes:
        key: The adapter's.
        tensor: Name in the checkpoint.
        bounds: The region that changes, half-open, per stored axis.
        entry: The entry with its layout.
    """

    key: str
    tensor: str
    bounds: Region
    entry: Entry

    def at_its_use(self, tie: Tie | None, base: Checkpoint, *, untie: bool) -> Placed:
        """An update of one use of a tensor, at the tensor that this use will read.

        Raises:
            LoraFxError: The base stores one tensor for this use and others, or nothing says that
                the one of this use is read by no other.
        """
        use, name = use_of(self.key, self.entry), base_name(self.key)
        if not use:
            return self
        known = tie is not None and self.tensor in (tie.table, tie.head, *tie.lookups)
        said = says_tied(base.config()) is False or (untie and name != use)
        if use == self.tensor and (known or (said and name in base.tensors)):
            return self
        if tie is not None and self.tensor == tie.table:
            if use == "op:embedding":
                return self
            if use.startswith("op:") and tie.head:
                return replace(self, tensor=tie.head)
        raise MergeRefusal(
            TIED,
            [self.key],
            f"{base.path}: the update of {self.key!r} means one use of {self.tensor!r} ({use}), "
            "which the base stores once for several; merged, it would change all of them",
            "train one update for all uses, or export the model itself: fold keeps uses apart",
        )


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
            placed += _apart(key, entry, stack)
            continue
        names = stored_names(key, entry, rename)
        if not names:
            lost.append(key)
            continue
        name = names[0]  # a tied tensor is stored under one of its names
        info = tensors[name]
        bounds = _bounds(key, info)
        bound = _bound(key, entry, info, bounds, name in turned)
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
        if any(map(_EXPERT.search, lost)) and any(map(_EXPERT.search, tensors)):
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


def stacked(adapter: Adapter, rename: Renaming) -> Adapter:
    """An adapter with its updates of expert stacks under their own names; see adapter/fused.py."""
    turned = stacks_turned(adapter, rename.config)
    entries = place(adapter.entries, rename.shape, turned=turned)
    return replace(adapter, entries=entries)


_EXPERT = re.compile(r"\.experts(\.|$)")
_NTH = re.compile(r"\.experts\.(\d+)\.")


def laid_for(adapter: Adapter, layout: ExpertLayout, base: str | None, kind: str | None) -> Adapter:
    """An adapter with its experts in a layout; the base, or its model_type, says how they lie."""
    types = frozenset({kind} if kind else ())
    if base:
        config = config_of(base)
        types = types or model_types(config) or frozenset({""})  # of no family
        if any(low.origin.op == "experts" for low in adapter.lowrank.values()):
            rename = renaming(adapter, open_checkpoint(base).tensors, config, [])
            # parameters that are one matrix, such as routers, stay as PEFT has them
            sizes = {k: rename.shape(k) or () for k in adapter.entries}
            flat = {k: e for k, e in adapter.entries.items() if len(sizes[k]) == 2}
            rest = {k: e for k, e in adapter.entries.items() if k not in flat}
            placed = stacked(replace(adapter, entries=rest), rename)
            adapter = replace(adapter, entries={**flat, **placed.entries})
        count = experts_of({**config, **text_config(config)})
        there = [int(n) for key in adapter.entries for n in _NTH.findall(key)]
        if there and not layout.apart and max(there) + 1 < count:
            raise LoraFxError(
                f"the adapter has experts 0 to {max(there)}, and {base} has {count}; a stack has "
                "an update of each",
                "--format per-expert keeps them one by one",
            )
    entries = laid(adapter.entries, layout, family_of(types), saved_by(adapter))
    facts = {**adapter.metadata.get("peft", {}), "peft_version": layout.version}
    metadata = {**adapter.metadata, "peft": facts}
    if not types and not layout.apart and any(_EXPERT.search(key) for key in entries):
        said = "without --base or --model-type stacks are taken to lie as all models' but Llama 4's"
        metadata["notes"] = [*metadata.get("notes", []), said]
    return replace(adapter, entries=entries, metadata=metadata)


def _apart(key: str, entry: Entry, stack: Stack) -> Iterator[Placed]:
    """An entry of a stack, or of a region of one, at the tensors that hold its matrices.

    ΔW [E, out, in] of the stack is s·b[e]·a[e] for expert e; a tensor that is rows low ≤ i < high
    of expert e gets s·b[e, low:high]·a[e]. So every part has the rank and the scale of the whole.

    Raises:
        LoraFxError: An update that is not low-rank, or whose axes cannot be taken apart.
    """
    bounds = _bounds(key, stack.info)
    bound = _bound(key, entry, stack.info, bounds, turned=False)
    (first, last), (top, bottom), columns = bounds
    for part in stack.parts:
        low, high = max(top, part.low), min(bottom, part.high)
        if first <= part.expert < last and low < high:
            piece = _piece(key, bound, part.expert - first, slice(low - top, high - top), stack)
            region = ((low - part.low, high - part.low), columns)
            name = f"{base_name(key)}[{part.expert}, {low}:{high}]"
            yield Placed(name, part.tensor, region, piece)


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


def use_of(key: str, entry: Entry) -> str:
    """The uses of a shared tensor that an entry means; empty for all of them."""
    return (entry.use if isinstance(entry, LowRank) else "") or split_use(key)[1]


def _bounds(key: str, info: TensorInfo) -> Region:
    try:
        bounds = split_key(key, info.shape)[1]
    except ValueError:
        bounds = ()
    inside = (0 <= lo < hi <= n for (lo, hi), n in zip(bounds, info.shape, strict=False))
    if len(bounds) != len(info.shape) or not all(inside):
        raise MisfitError(f"{info.file}: {key!r} is no region of a tensor {list(info.shape)}")
    return bounds


def _bound(key: str, entry: Entry, info: TensorInfo, bounds: Region, turned: bool) -> Entry:
    """The entry with the layout that it has in the tensor."""
    shape = tuple(hi - lo for lo, hi in bounds)
    if isinstance(entry, Full):
        if tuple(entry.value.shape) != shape:
            grown = "was the vocabulary resized? resize the base's embeddings first, then merge"
            hint = grown if entry.value.ndim == 2 else ""
            raise _misfit(key, info, f"a whole tensor {list(entry.value.shape)}", hint)
        return entry
    if isinstance(entry, ReplacedRows):
        fits = shape and shape == info.shape and tuple(entry.value.shape[1:]) == shape[1:]
        if not fits or not all(0 <= i < shape[0] for i in entry.index):
            last = max(entry.index, default=-1)
            raise _misfit(key, info, f"rows {list(entry.value.shape)} up to {last}", "")
        return entry
    if isinstance(entry, Rotation):
        return _rotation(key, entry, info)
    if entry.layout is not None:
        if entry.layout.stored != shape:
            raise _misfit(key, info, f"an update for {list(entry.layout.stored)}", "")
        return entry
    layout = _layout(entry, shape, turned)
    if layout is None:
        sides = " × ".join(str(n) for n in entry.shape)
        raise _misfit(key, info, f"an update of {sides} (out × in)", "")
    if isinstance(entry, LowRank) and (variant := variant_of(entry)).by_rows:
        for field, value in variant.beside(entry).items():
            if value.shape != (layout.out_size,):
                raise _misfit(key, info, f"a {field} {list(value.shape)}", "")
    return replace(entry, layout=layout)


def _rotation(key: str, entry: Rotation, info: TensorInfo) -> Rotation:
    if math.prod(info.shape[2:]) > 1:
        raise LoraFxError(
            f"{info.file}: tensor {list(info.shape)}, but the adapter's {key!r} is OFT of a "
            "kernel, which PEFT merges otherwise than it trains it; expected a kernel of 1",
            "merge it into its model with PEFT (merge_and_unload), if that is what you want",
        )
    if len(info.shape) < 2 or not entry.fits(math.prod(info.shape[1:])):
        blocks = f"{'shared' if entry.shared else len(entry.turn)} blocks of {entry.turn.shape[-1]}"
        raise _misfit(key, info, f"OFT of {blocks} along in", "")
    return replace(entry, layout=plain_layout(info.shape))


def _misfit(key: str, info: TensorInfo, what: str, hint: str) -> LoraFxError:
    return MergeRefusal(
        SHAPES,
        [key],
        f"{info.file}: tensor {list(info.shape)}, but the adapter's {key!r} is {what}",
        hint or "was the adapter trained on another model?",
    )


def _layout(change: Change, shape: tuple[int, ...], turned: bool) -> Layout | None:
    """How a change of [*batch, out, in] lies in a tensor of this shape; None where it cannot."""
    *batch, out, in_ = change.shape
    n = len(batch)
    if isinstance(change, Dense) and len(shape) == 1:
        return plain_layout(shape) if (out, in_) == (shape[0], 1) else None
    if len(shape) < n + 2 or tuple(batch) != shape[:n]:
        return None
    rows, rest = shape[n], math.prod(shape[n + 1 :])
    lead, tail = tuple(range(n)), tuple(range(n + 1, len(shape)))
    straight = Layout(shape, lead, (n,), tail, shape) if (rows, rest) == (out, in_) else None
    fits = len(shape) == n + 2 and (rows, rest) == (in_, out)
    swapped = Layout(shape, lead, (n + 1,), (n,), shape) if fits else None
    if lookup(change) or (turned and swapped):
        return swapped
    return straight or swapped


def _piece(key: str, entry: Entry, expert: int, rows: slice, stack: Stack) -> Entry:
    """Some rows of one expert of an entry, as an entry of a tensor of their own."""
    if isinstance(entry, Full):
        return Full(np.ascontiguousarray(entry.value[expert, rows]))
    layout = entry.layout if isinstance(entry, LowRank) else None
    axes = (layout.batch, layout.out, layout.in_) if layout else ()
    straight = axes == ((0,), (1,), (2,))
    if not isinstance(entry, LowRank) or not (straight or axes == ((0,), (2,), (1,))):
        raise LoraFxError(
            f"{stack.info.file}: the adapter's {key!r} is {name_of(entry)} of a stack that the "
            "file has as one tensor an expert; expected lora, rslora or a whole tensor",
            "save the base as the model has it: save_pretrained(…, save_original_format=False)",
        )
    a, b = entry.a[expert], entry.b[expert]
    if straight:
        b = b[rows]
        layout = plain_layout((len(b), a.shape[1]))
    else:
        a = a[:, rows]
        layout = plain_layout((a.shape[1], len(b))).transposed()
    return replace(entry, a=a, b=b, layout=layout, origin=replace(entry.origin, op=""))


# Square weights that are stored [in, out], where their shape cannot tell.
#
# One adapter may meet both kinds, as in a model of a BERT encoder and a GPT-2 decoder. So a weight
# is decided by its own kind: the same module name in the same part of the model first, then, for
# the names that Conv1D layers have, the other such names and the config.


Votes = dict[tuple[int, str, str], set[bool]]
"""(dimensions, part of the model, module name) → what shapes that can tell say."""


def lookup(entry: Entry) -> bool:
    """True for an update of a table that is looked up."""
    return isinstance(entry, LowRank) and entry.origin.op == "embedding"


def turned_weights(
    adapter: Adapter, rename: Renaming, where: str, notes: list[str]
) -> frozenset[str]:
    """Names of square weights that are stored [in, out].

    Raises:
        LoraFxError: fan_in_fan_out, where the model has no such layer.
    """
    votes: Votes = {}
    square, tensors = list[str](), rename.tensors
    for key, entry in adapter.entries.items():
        name = rename(base_name(key))
        info = tensors.get(name)
        if info is None or isinstance(entry, (Full, ReplacedRows, Rotation)) or lookup(entry):
            continue
        if entry.layout is not None or len(info.shape) < 2 or info.dtype == "int8":
            continue  # whoever quantises a layer to int8 stores it [out, in], Conv1D too
        sides, matrix = (entry.shape[-2], entry.shape[-1]), info.shape[-2:]
        if sides[0] == sides[1] == matrix[0] == matrix[1]:
            square.append(name)
        elif matrix in (sides, sides[::-1]):
            votes.setdefault(_kind(name, info), set()).add(matrix == sides[::-1])
    flag = bool(adapter.metadata.get("fan_in_fan_out"))
    kinds = model_types(rename.config)
    seen = set().union(*(v for k, v in votes.items() if k[0] == 2))
    linear = seen == {False} or (not seen and bool(kinds))
    if flag and square and linear and not kinds & CONV1D_MODELS:
        raise LoraFxError(
            f"{where}: the adapter has fan_in_fan_out, but the model's weights are [out, in]; "
            f"{square[0]!r} is square, so that its shape cannot tell",
            "set fan_in_fan_out to false in adapter_config.json if the model's layers are Linear",
        )
    flat = [n for n in square if len(tensors[n].shape) == 2]
    if flat and not votes and not flag and not kinds:
        notes.append(
            f"{where}: nothing says how square weights are stored, {flat[0]} among them; taken as "
            "[out, in]"
        )
    return frozenset(n for n in square if _turned(n, tensors[n], votes, kinds, flag))


def stacks_turned(adapter: Adapter, config: JsonView) -> bool | None:
    """How PEFT took the stacks of experts of a model, where its type says; see `Family`.

    PEFT writes in and out but not which of the two comes first in [E, …, …].

    Returns:
        True for [E, in, out], False for [E, out, in], None where it is not known.
    """
    family = family_of(kinds := model_types(config))
    if family is None or not (stacked_experts(kinds) or family.listed):
        return None
    return family.peft_turns(saved_by(adapter))


def saved_by(adapter: Adapter) -> str:
    """The release of PEFT that wrote an adapter's file; empty where it does not say."""
    facts = adapter.metadata.get("peft")
    return str(facts.get("peft_version") or "") if isinstance(facts, Mapping) else ""


def _kind(name: str, info: TensorInfo) -> tuple[int, str, str]:
    module = name.removesuffix(".weight")
    return len(info.shape), name.partition(".")[0], module.rpartition(".")[2]


def _turned(name: str, info: TensorInfo, votes: Votes, kinds: frozenset[str], flag: bool) -> bool:
    dims, part, _ = kind = _kind(name, info)
    own = votes.get(kind, set())
    if len(own) == 1:
        return True in own
    same = {k: v for k, v in votes.items() if k[0] == dims}
    if dims != 2:
        every = set().union(*same.values())
        return True in every if len(every) == 1 else bool(kinds & IN_OUT_EXPERTS)
    conv1d = bool(CONV1D_NAMES.search(name))
    near = set().union(*(v for k, v in same.items() if k[1] == part and conv1d == _named(k[2])))
    if len(near) == 1:
        return True in near
    pure = bool(kinds) and kinds <= CONV1D_MODELS  # all parts of the model have such layers
    known = bool(kinds & CONV1D_MODELS)
    return pure or (conv1d if known else flag)


def _named(leaf: str) -> bool:
    return bool(CONV1D_NAMES.search(f"{leaf}.weight"))


def model_types(config: JsonView) -> frozenset[str]:
    """model_type of the model and of its parts."""
    inner = [v for v in config.values() if isinstance(v, dict)]
    types = [c.get("model_type") for c in (config, *inner)]
    return frozenset(t for t in types if isinstance(t, str) and t)


# A checkpoint whose output head is its embedding: one tensor, two uses.
#
# An adapter on one of the two must not reach the other. The file holds the tensor once, or twice
# with config.json tying them again when it is loaded: the two are untied or the merge is refused.


_SCALED = frozenset(("t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct", "udop"))
"""model_type of models whose logits are scaled where the head is tied, unless the config says."""
_SAYS_SCALE = frozenset(("t5", "umt5", "longt5"))
"""Those of them whose config can say it, as scale_decoder_outputs."""
_ALWAYS = frozenset(("t5", "mt5", "umt5", "longt5", "udop"))
"""model_type of models that are tied wherever no head is stored, whatever the config says."""


def tie_of(tensors: Tensors, config: JsonView, keys: Iterable[str] = ()) -> Tie | None:
    """The tie of a checkpoint by its names and config; None where there is none.

    `keys` are an adapter's: one of them may say what the head would be called.

    Without a word in the config a model that generates and has no head of its own is tied: that
    is the default of its class.
    """
    said = says_tied(config)
    heads = [n for n in tensors if is_head(n)]
    if said is False and (heads or config.get("model_type") not in _ALWAYS):
        return None
    named = config.get("architectures") or []
    if named and not generates(named):  # without a head, whatever its config was copied from
        return None
    tables = [n for n in tensors if is_table(n) and len(tensors[n].shape) == 2]
    family = tie_in(named, tables) or Tie("", "")
    tables = [n for n in tables if n not in family.lookups]
    if len(tables) != 1 or (heads and not said) or not (said or generates(named)):
        return None
    if heads:
        head = family.head if family.head in heads else heads[0]
    else:
        head = next((k for k in keys if is_head(k)), family.head)
    biases = {new: old for new, old in family.biases.items() if old in tensors}
    return replace(family, table=tables[0], head=head, biases=biases)


def tie_and_names(base: Checkpoint, keys: Iterable[str]) -> tuple[Tie | None, Tensors]:
    """The tie of a checkpoint, and its tensors under every name that an adapter may use."""
    tie = tie_of(base.tensors, base.config(), keys)
    return tie, base.tensors if tie is None else tie.known(base.tensors)


def check_unknown(placed: Iterable[Placed], tie: Tie | None, base: Checkpoint) -> None:
    """Raise where an update means one use of a tensor that may be table and head as well.

    That is a table of all tokens of a model that generates and stores no head, or stores the table
    more than once, under names that are not known here; or a head beside which nothing else has
    a row for every token.
    """
    tensors, config = base.tensors, base.config()
    sizes = {c.get("vocab_size") for c in (config, text_config(config))}
    untied = says_tied(config) is False
    heads = {n: t.shape for n, t in tensors.items() if is_head(n) and len(t.shape) == 2}
    if tie is not None or untied or not generates(config.get("architectures") or []):
        return
    others = {t.shape[0] for n, t in tensors.items() if n not in heads and len(t.shape) == 2}
    for p in placed:
        shape = tensors[p.tensor].shape if p.tensor in tensors else ()
        of_both = isinstance(p.entry, LowRank) and is_tied(p.entry)
        looked_up = isinstance(p.entry, ReplacedRows) or lookup(p.entry)
        if p.tensor in heads and shape[0] not in others and not of_both:
            raise LoraFxError(
                f"{base.path}: {p.tensor!r} is the output head, and the file has no other tensor "
                f"of {shape[0]} rows: it is the embedding too, and the update would change both",
                "load the base in transformers and save it again, which names the embedding",
            )
        if not heads and looked_up and len(shape) == 2 and shape[0] in sizes:
            raise LoraFxError(
                f"{base.path}: {p.tensor!r} is a table of all tokens, the file has no output head "
                "of a known name, and config.json does not say that the two are untied; merged, "
                "the update might change the head too",
                "save the base with tie_word_embeddings false first, then merge",
            )


def both(p: Placed, tie: Tie, placed: Iterable[Placed]) -> bool:
    """True for an update of both uses at once; rows of tokens are PEFT's for table and head."""
    if isinstance(p.entry, ReplacedRows):
        return not any(isinstance(q.entry, ReplacedRows) and q.tensor == tie.head for q in placed)
    return is_tied(p.entry)


def one_change(placed: Sequence[Placed], tie: Tie) -> list[Placed]:
    """The updates, with whole tensors of table, head and lookups as one where they are equal.

    PEFT saves a tied table under each name of its modules, and the same numbers where it keeps
    them tied (ensure_weight_tying).
    """
    names = {tie.table, tie.head, *tie.lookups}
    whole = {p.tensor: p.entry for p in placed if p.tensor in names and isinstance(p.entry, Full)}
    if not {tie.table, tie.head} <= set(whole) or not means_all(whole, names):
        return list(placed)
    return [
        replace(p, entry=replace(p.entry, tied=True)) if isinstance(p.entry, Full) else p
        for p in placed
        if p.tensor not in whole or p.tensor == tie.table
    ]


def of_one_use(
    placed: Sequence[Placed], tie: Tie, config: JsonView, where: str, *, untie: bool
) -> list[Placed]:
    """The updates that mean one use of a tied table, but not all: for them the two are untied.

    Raises:
        LoraFxError: There are such, and the two may not, or cannot, be untied.
    """
    names = {tie.table, tie.head, *tie.lookups}
    ours = [p for p in placed if p.tensor in names and not both(p, tie, placed)]
    if not ours:
        return []
    shared = next((p for p in ours if p.tensor in tie.lookups and not tie.apart), None)
    if shared is not None:
        raise LoraFxError(
            f"{where}: {shared.key!r} means one of several lookups of {tie.table!r}, which such "
            "models hold once, tied or not",
            f"train one update of {tie.table!r} for all lookups",
        )
    unread = next((p for p in ours if isinstance(p.entry, Full) and p.tensor == tie.table), None)
    if unread is not None and tie.lookups:
        raise LoraFxError(
            f"{where}: {unread.key!r} is a whole tensor of that name alone, and such models read "
            f"their table as {some(list(tie.lookups))}: PEFT's copy of it changes nothing",
            "save the adapter with all names of the table (ensure_weight_tying)",
        )
    check_scaled(tie, config, where)
    if not tie.head:
        raise LoraFxError(
            f"{where}: {tie.table!r} is the output head too, and what a head of its own would "
            "be called is not known",
            "save the base with tie_word_embeddings false first, then merge",
        )
    if not untie:
        raise MergeRefusal(
            TIED,
            dict.fromkeys(p.key for p in ours),
            f"{where}: {ours[0].key!r} is one of two uses of a tied tensor "
            f"({tie.table!r} is also the output head); merged into it, the update would change "
            "both",
            "--untie writes the head as a tensor of its own and says so in config.json",
        )
    return ours


def spread(placed: Sequence[Placed], tie: Tie, names: Collection[str]) -> list[Placed]:
    """The updates, and each once more for every other tensor among `names` that it means.

    An update of the table is one of all its lookups, and of the head where it means both uses. The
    two names of a bias are one, unless each has an update. A name that is no tensor of its own is
    the one that it stands for.
    """
    given = {p.tensor for p in placed}
    sources = {n: s for n, s in tie.sources().items() if n not in tie.biases or not {n, s} <= given}
    moved: dict[tuple[int, str], Placed] = {}
    for p in placed:
        source = sources.get(p.tensor, p.tensor)
        name = p.tensor if p.tensor in names and p.tensor not in tie.biases else source
        moved.setdefault((id(p.entry), name), replace(p, tensor=name))
    for p in tuple(moved.values()):
        for name, source in sources.items():
            skip = name == tie.head and not both(p, tie, placed)
            if source == p.tensor and name in names and not skip:
                moved.setdefault((id(p.entry), name), replace(p, tensor=name))
    return list(moved.values())


def check_scaled(tie: Tie, config: JsonView, where: str) -> None:
    """Raise where untying alone would change what the model computes."""
    kind, said = config.get("model_type"), config.get("tie_word_embeddings")
    if kind not in _SCALED or "scale_decoder_outputs" in config:
        return
    if kind in _SAYS_SCALE and said is False:  # it does not scale
        return
    raise LoraFxError(
        f"{where}: a {kind} scales its logits where {tie.table!r} is also the head, and its config "
        "does not say so apart; untied, they would be too large",
        "save the base once with transformers 5, whose config has scale_decoder_outputs"
        if kind in _SAYS_SCALE
        else "train an update of other weights than the table's and the head's",
    )
