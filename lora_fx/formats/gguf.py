"""Adapters for llama.cpp: a .gguf file whose general.type is adapter.

==========================================  ==================================================
tensors, sizes as numpy has them            update of
==========================================  ==================================================
blk.N.attn_q.weight.lora_a [r, in],         model.layers.N.self_attn.q_proj.weight, and so on:
blk.N.attn_q.weight.lora_b [out, r]         ΔW = s · B A
blk.N.ffn_gate_exps.weight.lora_a [E, r,    the same of every expert E of a layer
in], .lora_b [E, out, r]
output.weight.lora_a, .lora_b               lm_head.weight
token_embd.weight.lora_a [rows, r],         model.embed_tokens.weight: the other way round
.lora_b [dim, r]
==========================================  ==================================================

s = alpha / r with the one `adapter.lora.alpha` of the file, or 1 where it is 0 or missing. An
update of another alpha has the ratio multiplied into B. The names are those of the package `gguf`,
for the architectures of `lora_fx.formats.llama_cpp_names`. Where llama.cpp turns neighbouring pairs
of rows of q and k, as torchtune does, B has them in that order (`lora_fx.formats.rotary_rows` has
the formula): the number of heads comes from the base's config.json, or from
`ARCH.attention.head_count` and `head_count_kv`, which are written here and which llama.cpp passes
over in an adapter.

A fused `mlp.gate_up_proj` stays one tensor (ffn_up, twice the rows); one of a stack of experts is
split into its halves, since llama.cpp keeps ffn_gate_exps and ffn_up_exps apart. Experts are read
under a name each, as checkpoints have them.

What llama.cpp does not apply is refused: DoRA, whole tensors (it passes over norms), and updates of
a table that is both embedding and head, whose two uses want A and B in two orders. The tokens that
invoke an aLoRA are `adapter.alora.invocation_tokens`.

Facts: the GGUF specification of ggml, docs/gguf.md; llama.cpp as in llama-cpp-python 0.3.36,
src/llama-adapter.cpp, src/llama-graph.cpp, convert_lora_to_gguf.py (which takes no notice of
use_rslora and alpha_pattern).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import INVOCATION, Adapter
from lora_fx.adapter.expert_families import experts_of
from lora_fx.adapter.invocation import checked
from lora_fx.adapter.lowrank import Factors, LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Entry, is_plain
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.read import AGAIN, open_input
from lora_fx.formats.checked_file import File
from lora_fx.formats.format import Format, Magic
from lora_fx.formats.llama_cpp_names import (
    HEAD,
    HEADS,
    OUTSIDE_LAYERS,
    TABLE,
    LlamaCppNames,
    gguf_package,
    names_of_architecture,
    names_of_base,
)
from lora_fx.formats.one_scale import most_frequent, multiplied
from lora_fx.formats.rotary_rows import to_halves, to_neighbours
from lora_fx.formats.unsupported import has_kernel_axes, refused
from lora_fx.probe.carried import FIELD
from lora_fx.probe.probe import PROPERTY
from lora_fx.text import Json, StrPath, counted

_KEY = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d{1,5})\.(.+)\.weight")
_EXPERT = re.compile(r"(.+\.experts)\.(\d{1,5})\.(\w+)")
_BLOCK = re.compile(r"0|[1-9]\d{0,4}", re.A)
_MOST_VALUES = 50_000
"""The largest number of header values that are read; an adapter has some thousands."""
ALORA = "adapter.alora.invocation_tokens"
"""An array of uint32, and llama.cpp takes no other: the tokens from which on the adapter acts."""
_UNCODED = {"F32", "F16", "BF16"}
"""The tensor types that are not quantised."""
_NO_EXPERT = -1
_ROUNDING = 2.0**-24
"""The largest relative difference between a number and its fp32."""
_refused = partial(refused, "a GGUF adapter")


def _contents(path: Path, file: File) -> tuple[Json, dict[str, Array]]:
    """Return the values of an adapter's header by key, and its tensors in fp32."""
    gguf = gguf_package()
    calls = itertools.count()

    class Strict(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        """A reader with limits: it stops at the file's end and after many values."""

        def _get(self, offset: int, dtype: type, count: int = 1, *order: str, **more: str) -> Array:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if next(calls) > _MOST_VALUES:
                what = (
                    f"its header has more than {_MOST_VALUES} values; expected the header of an "
                    "adapter"
                )
                raise LoraFxError(f"{file.name}: {what}", "pass a GGUF adapter, not a GGUF model")
            if end > self.data.size:
                raise ValueError(f"byte {end} is needed, but the file has {self.data.size}")
            value: Array = super()._get(offset, dtype, count, *order, **more)
            return value

    open_input(path).close()  # a regular file, and from now on an input of this run
    try:
        with np.errstate(all="ignore"):  # sizes that no whole number holds
            reader = Strict(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        kind = (fields.get("general.type"), fields.get("adapter.type"))
        if kind != ("adapter", "lora"):
            what = f"and adapter.type are {kind}; expected adapter and lora"
            raise file.error("general.type", what, "pass a GGUF adapter, not a GGUF model")
        _check_places(reader)
        tensors = {
            tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
            for tensor in reader.tensors
        }
    except (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        why = f"{type(error).__name__} {one_line(error)}"
        raise LoraFxError(f"{file.name}: the GGUF adapter cannot be read: {why}", AGAIN) from error
    coded_types = {tensor.tensor_type.name for tensor in reader.tensors} - _UNCODED
    if coded_types:
        types = ", ".join(sorted(coded_types))
        file.notes.append(f"{file.name}: tensors of {types} are read as fp32")
    return fields, {name: file.master(name, array) for name, array in tensors.items()}


def _check_places(reader: Any) -> None:
    """Raise ValueError for tensors that overlap, or whose position overflowed in the package."""
    data_start = int(reader.data_offset)
    starts = {tensor.name: data_start + int(tensor.field.parts[5][0]) for tensor in reader.tensors}
    end_so_far = data_start
    previous = "the header"
    for tensor in sorted(reader.tensors, key=lambda tensor: starts[tensor.name]):
        start = starts[tensor.name]
        elements = math.prod(map(int, tensor.shape))
        if start != tensor.data_offset or elements != tensor.n_elements:
            raise ValueError(f"the size or the offset of {tensor.name!r} is over 64 bits")
        if start < end_so_far:
            raise ValueError(f"{tensor.name!r} and {previous} overlap")
        end_so_far = start + int(tensor.n_bytes)
        previous = repr(tensor.name)


def read(path: StrPath, base: StrPath | None = None) -> Adapter:
    """Read an adapter from one .gguf file.

    Args:
        path: The file.
        base: Folder of the base model, for the number of heads; files that lora-fx wrote have it.

    Returns:
        An Adapter under Hugging Face's names; layouts are None. Experts have a key each.

    Raises:
        LoraFxError: No adapter, a damaged file, an architecture whose names or heads are not
            known, half a pair, invocation tokens that are none.
    """
    file = File(str(path))
    fields, tensors = _contents(Path(path), file)
    stored_alpha = fields.get("adapter.lora.alpha")
    alpha = file.alpha("adapter.lora.alpha", np.asarray(stored_alpha) if stored_alpha else None)
    names = _names_for(fields, base, file)
    entries: dict[str, Entry] = {}
    for name, tensor in tensors.items():
        stem, dot, half = name.rpartition(".lora_")
        if not dot and name.endswith("_norm.weight"):
            file.notes.append(f"{file.name}: {name!r} is not read: llama.cpp does not apply it")
            continue
        b = tensors.get(f"{stem}.lora_b")
        if b is None or half not in ("a", "b") or f"{stem}.lora_a" not in tensors:
            raise file.error(name, "is not half of a pair X.lora_a, X.lora_b")
        if half == "b":
            continue  # read with its a
        for key, update in _updates(stem, (tensor, b), alpha, names, file).items():
            if key in entries:
                raise file.error(stem, f"is a second update of {key!r}; expected one")
            entries[key] = update
    metadata: Json = {"notes": file.notes}
    if ALORA in fields:
        tokens = np.asarray(fields[ALORA])
        metadata[INVOCATION] = [*checked(tokens, f"{file.name}: {ALORA}")]
    if PROPERTY in fields:
        metadata[FIELD] = fields[PROPERTY]
    return Adapter(entries, metadata)


def _names_for(fields: Json, base: StrPath | None, file: File) -> LlamaCppNames:
    """Return the names for the base or the file's header; raise if the architectures differ."""
    architecture = str(fields.get("general.architecture"))
    heads = {name: fields.get(f"{architecture}.attention.{field}") for name, field in HEADS.items()}
    names = names_of_base(base) or names_of_architecture(architecture, heads, file.name)
    if names.architecture != architecture:
        what = f"is {architecture!r}, but {names.where} has {names.architecture!r}"
        raise file.error("general.architecture", what, "check that it is an adapter of this model")
    return names


def _updates(
    stem: str, pair: Factors, alpha: float | None, names: LlamaCppNames, file: File
) -> dict[str, Entry]:
    """Return the updates of one llama.cpp tensor, under Hugging Face names."""
    a, b = pair
    module = _module_outside_layers(stem)
    if module:
        if module == TABLE:
            a = np.ascontiguousarray(a.T)
        _check_shapes(stem, pair, (a, b), 2, file)
        origin = Origin(op="embedding" if module == TABLE else "")
        return {f"{module}.weight": LowRank(a, b, alpha or float(b.shape[-1]), origin=origin)}

    module = _module_of_layer(stem, names)
    if not module:
        raise file.error(stem, f"is not a known matrix of {names.architecture}")
    is_stack = ".experts." in module
    _check_shapes(stem, pair, (a, b), 3 if is_stack else 2, file)
    alpha = alpha or float(b.shape[-1])
    if not is_stack:
        rows = names.turned(b, module, file, to_halves)
        return {f"{module}.weight": LowRank(a, rows, alpha)}
    experts, _, leaf = module.rpartition(".")
    return {f"{experts}.{i}.{leaf}.weight": LowRank(a[i], b[i], alpha) for i in range(len(a))}


def _module_outside_layers(stem: str) -> str:
    """Return the Hugging Face module of the embedding or the head; empty for other tensors."""
    for module, name in OUTSIDE_LAYERS.items():
        if name == stem:
            return module
    return ""


def _module_of_layer(stem: str, names: LlamaCppNames) -> str:
    """Return the Hugging Face module of a tensor blk.N.…; empty if it is unknown."""
    block, _, name_in_layer = stem.removeprefix("blk.").partition(".")
    if not stem.startswith("blk.") or not _BLOCK.fullmatch(block):
        return ""
    for module, name in names.modules.items():
        if name == name_in_layer:
            return f"model.layers.{int(block)}.{module}"
    return ""


def _check_shapes(stem: str, stored: Factors, pair: Factors, axes: int, file: File) -> None:
    """Raise if A and B, as stored (transposed), do not have the expected axes."""
    a, b = pair
    has_axes = a.ndim == b.ndim == axes
    if has_axes and a.shape[:-2] == b.shape[:-2] and a.shape[-2] == b.shape[-1]:
        return
    stored_a, stored_b = stored
    shapes = f"lora_a {list(stored_a.shape)} and lora_b {list(stored_b.shape)}"
    raise file.error(
        stem, f"has {shapes}; expected [r, in] and [out, r], for experts with a first axis E"
    )


@dataclass(frozen=True)
class _Piece:
    """The factors that one update contributes to one llama.cpp tensor.

    Attributes:
        tensor: The tensor's name.
        expert: The number of the expert that it is of, or -1: all of the tensor.
        key: The key of the update.
        a: [r, in].
        b: [out, r].
    """

    tensor: str
    expert: int
    key: str
    a: Array
    b: Array


def write_file(adapter: Adapter, path: StrPath, base: StrPath | None = None) -> tuple[str, ...]:
    """Write one .gguf file in fp32; return notes, such as the scales that were folded into B.

    Args:
        adapter: Bound or not.
        path: The file to create.
        base: Folder of the base model, of which config.json is read.

    Raises:
        LoraFxError: No config.json, an architecture that is not known here, or what llama.cpp
            does not apply, by key.
    """
    names = names_of_base(base)
    if names is None:
        what = f"{base} has no config.json" if base else "no base is given"
        hint = "pass the folder of the base model with --base"
        raise LoraFxError(f"GGUF names depend on the base's architecture, but {what}", hint)
    file = File("the adapter")
    updates = {key: _plain(key, entry, names) for key, entry in adapter.entries.items()}
    alphas = {key: update.scale * update.rank for key, update in updates.items()}
    alpha = _one_alpha(alphas.values())
    rescaled = [
        key for key, other in alphas.items() if not math.isclose(other, alpha, rel_tol=_ROUNDING)
    ]
    pieces: dict[str, dict[int, _Piece]] = {}
    for key, update in updates.items():
        if key in rescaled:
            b = multiplied(update.b, alphas[key] / alpha, key, _refused)
            update = replace(update, b=b)
        for piece in _pieces(key, update, names, file):
            first = pieces.setdefault(piece.tensor, {}).setdefault(piece.expert, piece)
            if first.key != key:
                raise _refused(
                    key, f"{piece.tensor} has a second update", "merge the two updates first"
                )

    tensors: dict[str, Array] = {}
    for name, by_expert in pieces.items():
        if _NO_EXPERT in by_expert:
            piece = by_expert[_NO_EXPERT]
            a = piece.a
            b = piece.b
        else:
            a, b = _stacked(name, by_expert, names)
        tensors[f"{name}.lora_a"] = a
        tensors[f"{name}.lora_b"] = b
    masters = {name: file.master(name, array) for name, array in tensors.items()}
    _write(path, masters, alpha, names, adapter)

    if not rescaled:
        return ()
    return (
        f"a GGUF adapter has one alpha in fp32, here {alpha!r}: the scales of "
        f"{counted(len(rescaled), 'update')} with another alpha are multiplied into B",
    )


def _one_alpha(alphas: Iterable[float]) -> float:
    """Return the file's alpha: the most frequent nonzero one in fp32's range; else 1."""
    alpha = most_frequent(alpha for alpha in alphas if 1e-30 < abs(alpha) < 1e30)
    return float(np.float32(alpha))  # not 0, which would mean s = 1


def _plain(key: str, entry: Entry, names: LlamaCppNames) -> LowRank:
    """Return the update; raise if llama.cpp cannot apply it."""
    if not isinstance(entry, LowRank) or not is_plain(entry):
        raise _refused(key, entry)
    if has_kernel_axes(entry) or entry.use or "@" in key or key.endswith("]"):
        raise _refused(key, "it is for a convolution, or for a part or one use of a tensor")
    if key in (f"{HEAD}.weight", f"{TABLE}.weight"):
        is_tied_model = names.config.get("tie_word_embeddings") or "gemma" in names.architecture
        if is_tied_model or entry.origin.tied:
            raise _refused(
                key,
                "the model has one table for embedding and head",
                "pass --exclude to leave it out",
            )
    return entry


def _pieces(key: str, update: LowRank, names: LlamaCppNames, file: File) -> Iterator[_Piece]:
    """Yield the pieces of llama.cpp tensors that an update makes.

    1. The embedding and the head are tensors by themselves.
    2. A fused stack of gate and up goes into the two halves.
    3. A stack of experts is one piece an expert, as an update of one expert is.
    """
    name = OUTSIDE_LAYERS.get(key.removesuffix(".weight"))
    if name:
        a, b = _outside_layers(key, update)
        yield _Piece(name, _NO_EXPERT, key, a, b)
        return

    match = _KEY.fullmatch(key) or _KEY.fullmatch(f"{key}.weight")  # stacks are no modules
    number, module = match.groups() if match else ("", "")
    of_expert = _EXPERT.fullmatch(module)
    if of_expert:
        module = f"{of_expert[1]}.{of_expert[3]}"
    rows_of_modules = _split_gate_up(module, update.b)
    is_stack = ".experts." in module and of_expert is None
    is_of_module = is_stack or key.endswith(".weight")
    is_known = rows_of_modules.keys() <= names.modules.keys()
    if not is_known or not is_of_module or update.a.ndim != (3 if is_stack else 2):
        shape = list(update.shape)
        raise _refused(key, f"llama.cpp's {names.architecture} has no such matrix of {shape}")

    for module, rows in rows_of_modules.items():
        name = f"blk.{int(number)}.{names.modules[module]}"
        if is_stack:
            for i, (a, b) in enumerate(zip(update.a, rows, strict=True)):
                yield _Piece(name, i, key, a, b)
        else:
            expert = int(of_expert[2]) if of_expert else _NO_EXPERT
            b = names.turned(rows, f".{module}", file, to_neighbours)
            yield _Piece(name, expert, key, update.a, b)


def _outside_layers(key: str, update: LowRank) -> Factors:
    """Return A and B of the embedding or the head, in llama.cpp's order."""
    if TABLE not in key:
        return update.a, update.b
    if update.layout:
        is_looked_up = update.layout.out == (1,)
    else:
        is_looked_up = update.origin.op == "embedding"
    if is_looked_up:
        return update.a.T, update.b
    return update.b, update.a.T


def _split_gate_up(module: str, b: Array) -> dict[str, Array]:
    """Return module → rows of B; a fused gate_up_proj of experts is two modules."""
    if not module.endswith(".experts.gate_up_proj"):
        return {module: b}
    half = b.shape[-2] // 2
    experts = module.removesuffix("gate_up_proj")
    return {f"{experts}gate_proj": b[..., :half, :], f"{experts}up_proj": b[..., half:, :]}


def _stacked(name: str, by_expert: Mapping[int, _Piece], names: LlamaCppNames) -> Factors:
    """Return A and B of all experts of a layer, stacked; raise if one is missing or differs."""
    count = experts_of(names.config) or max(by_expert) + 1
    key = next(iter(by_expert.values())).key
    if len(by_expert) != count or max(by_expert) != count - 1:
        found = f"{len(by_expert)} updates, the last of expert {max(by_expert)}"
        raise _refused(key, f"{name} needs updates of the experts 0 to {count - 1}; found {found}")
    pieces = [by_expert[expert] for expert in range(count)]
    try:
        a = np.stack([piece.a for piece in pieces])
        b = np.stack([piece.b for piece in pieces])
    except ValueError as error:
        raise _refused(key, f"the experts of {name} have different ranks or shapes") from error
    return a, b


def _write(
    path: StrPath,
    tensors: Mapping[str, Array],
    alpha: float,
    names: LlamaCppNames,
    adapter: Adapter,
) -> None:
    writer = gguf_package().GGUFWriter(path, names.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    if adapter.invocation:
        kinds = gguf_package().GGUFValueType
        writer.add_key_value(ALORA, [*adapter.invocation], kinds.ARRAY, kinds.UINT32)
    if FIELD in adapter.metadata:
        writer.add_string(PROPERTY, adapter.metadata[FIELD])
    for field, key in HEADS.items():
        count = names.config.get(field)
        if isinstance(count, int):
            writer.add_uint32(f"{names.architecture}.attention.{key}", count)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class GgufAdapter(Format):
    """A llama.cpp adapter file; models have the same suffix and magic, and `read` refuses them."""

    name = "gguf"
    suffixes = (".gguf",)
    magic = Magic(b"GGUF")
    one_model = True
    keeps_probe = True
    keeps_invocation = True
    takes_base = True

    def is_adapter(self, head: bytes) -> bool:
        """Whether general.type is an adapter, and not a model."""
        return re.search(rb"(?s)general\.type.{12}adapter", head) is not None

    def read(self, path: Path, base: Path | None = None) -> Adapter:
        """Read one file."""
        return read(path, base)

    def write(self, adapter: Adapter, path: Path, base: Path | None = None) -> tuple[str, ...]:
        """Write one file."""
        return write_file(adapter, path, base)


GGUF = GgufAdapter()
