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
for the architectures of `_ARCHITECTURES`. Where llama.cpp turns neighbouring pairs of rows of q and
k, as torchtune does, B has them in that order (`lora_fx.formats.torchtune` has the formula): the
number of heads comes from the base's config.json, or from `ARCH.attention.head_count` and
`head_count_kv`, which are written here and which llama.cpp passes over in an adapter.

A fused `mlp.gate_up_proj` stays one tensor (ffn_up, twice the rows); one of a stack of experts is
split into its halves, since llama.cpp keeps ffn_gate_exps and ffn_up_exps apart. Experts are read
under a name each, as checkpoints have them.

What llama.cpp does not apply is refused: DoRA, whole tensors (it passes over norms), an aLoRA, and
updates of a table that is both embedding and head, whose two uses want A and B in two orders.

Facts: the GGUF specification of ggml, docs/gguf.md; llama.cpp as in llama-cpp-python 0.3.36,
src/llama-adapter.cpp, src/llama-graph.cpp, convert_lora_to_gguf.py (which takes no notice of
use_rslora and alpha_pattern).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.fused import experts_of
from lora_fx.adapter.lowrank import Factors, LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Entry, is_plain, name_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.checkpoint import model_config, text_config
from lora_fx.files.read import AGAIN, open_input
from lora_fx.formats.base import File, refused
from lora_fx.formats.format import Format, Magic
from lora_fx.formats.torchtune import heads_of, to_halves, to_neighbours
from lora_fx.text import Json, JsonView, StrPath, counted

_MLP = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = tuple(f"self_attn.{x}_proj" for x in "qkvo")
_DENSE = (*_ATTENTION, *(f"mlp.{x}" for x in _MLP))
_EXPERTS = (*_ATTENTION, "mlp.gate", *(f"mlp.experts.{x}" for x in _MLP))
_SHARED = ("mlp.shared_expert_gate", *(f"mlp.shared_expert.{x}" for x in _MLP))
_MIXTRAL = ("block_sparse_moe.gate", *(f"block_sparse_moe.experts.w{i}" for i in (1, 2, 3)))
_LIKE_LLAMA = ("smollm3", "granite", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2")
_ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "llama": (*_DENSE, *_MIXTRAL),
    **dict.fromkeys(_LIKE_LLAMA, _DENSE),
    "qwen2moe": (*_EXPERTS, *_SHARED),
    "qwen3moe": _EXPERTS,
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "starcoder2": (*_ATTENTION, "mlp.c_fc", "mlp.c_proj"),
}
"""llama.cpp's architecture → Hugging Face's modules of a layer, where nothing but q and k moves."""
_MODEL_TYPES = {"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3"}
_MODEL_TYPES |= {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
_NEIGHBOURS = ("llama", "smollm3", "granite")
"""Those in which the rows of q and k are put in neighbouring pairs."""
_HEADS = {"num_attention_heads": "head_count", "num_key_value_heads": "head_count_kv"}
_HEAD, _TABLE = "lm_head", "model.embed_tokens"
_WHOLE = {_HEAD: "output.weight", _TABLE: "token_embd.weight"}
_KEY = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d{1,5})\.(.+)\.weight")
_EXPERT = re.compile(r"(.+\.experts)\.(\d{1,5})\.(\w+)")
_BLOCK = re.compile(r"0|[1-9]\d{0,4}", re.A)
_MOST = 50_000
"""Values of a header that are read; an adapter has some thousands."""


@dataclass(frozen=True)
class _Names:
    """How an architecture calls its tensors: {Hugging Face's module of a layer: name in blk.N}."""

    architecture: str
    modules: Mapping[str, str]
    config: JsonView
    where: str

    def turned(self, b: Array, module: str, file: File, order: Callable[..., Array]) -> Array:
        """Rows of B in another order, where they are of q or k and llama.cpp has its own."""
        if self.architecture not in _NEIGHBOURS or not module.endswith((".q_proj", ".k_proj")):
            return b
        return order(b, heads_of(module, len(b), self.config, self.where, file))


def _names(architecture: str, config: JsonView, where: str) -> _Names:
    gguf, known = _package(), (*_ARCHITECTURES, *_MODEL_TYPES)
    if architecture not in known:
        raise LoraFxError(
            f"{where}: architecture {architecture!r}; llama.cpp's names are known here for {known}",
            "take PEFT's own folder; llama.cpp's convert_lora_to_gguf.py converts it for others",
        )
    architecture = _MODEL_TYPES.get(architecture, architecture)
    number = {name: n for n, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(number, 1)
    found = {m: table.get_name(f"model.layers.0.{m}") for m in _ARCHITECTURES[architecture]}
    modules = {m: f"{name.removeprefix('blk.0.')}.weight" for m, name in found.items()}
    return _Names(architecture, modules, config, where)


def _base_names(base: StrPath | None) -> _Names | None:
    """The names of a base model, by its config.json; None where there is none."""
    home = Path(base) if base else None
    path = (home if home.is_dir() else home.parent) / "config.json" if home else None
    if path is None or not path.is_file():
        return None
    config = model_config(path)
    config = {**config, **text_config(config)}
    return _names(str(config.get("model_type")), config, str(path))


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        hint = "pip install 'lora-fx[gguf]'"
        raise LoraFxError("GGUF needs the package gguf, which is not installed", hint) from error
    return gguf


def _contents(path: Path, file: File) -> tuple[Json, dict[str, Array]]:
    """The values of an adapter's header by key, and its tensors in fp32."""
    gguf, calls = _package(), itertools.count()

    class Strict(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        """The package's goes on behind the end of a file, and through any number of values."""

        def _get(self, offset: int, dtype: type, count: int = 1, *order: str, **more: str) -> Array:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if next(calls) > _MOST:
                what = f"its header has more than {_MOST} values; expected an adapter's"
                raise LoraFxError(f"{file.name}: {what}", "a GGUF file of a model is no adapter")
            if end > self.data.size:
                raise ValueError(f"byte {end} is needed, and there are {self.data.size}")
            got: Array = super()._get(offset, dtype, count, *order, **more)
            return got

    open_input(path).close()  # a regular file, and from now on an input of this run
    try:
        with np.errstate(all="ignore"):  # sizes that no whole number holds
            reader = Strict(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        kind = fields.get("general.type"), fields.get("adapter.type")
        if kind != ("adapter", "lora"):
            what = f"and adapter.type are {kind}; expected adapter and lora"
            raise file.error("general.type", what, "a GGUF file of a model is no adapter")
        _check_places(reader)
        tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    except (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        why = f"{type(error).__name__} {one_line(error)}"
        raise LoraFxError(f"{file.name}: no GGUF adapter that can be read: {why}", AGAIN) from error
    if coded := {t.tensor_type.name for t in reader.tensors} - {"F32", "F16", "BF16"}:
        file.notes.append(f"{file.name}: tensors of {', '.join(sorted(coded))} are read as fp32")
    return fields, {name: file.master(name, array) for name, array in tensors.items()}


def _check_places(reader: Any) -> None:
    """Raise ValueError for tensors that overlap, or whose places the package's sums wrapped to."""
    reached, last = int(reader.data_offset), "the header"
    places = {t.name: int(reader.data_offset) + int(t.field.parts[5][0]) for t in reader.tensors}
    for tensor in sorted(reader.tensors, key=lambda t: places[t.name]):
        start, elements = int(places[tensor.name]), math.prod(map(int, tensor.shape))
        if start != tensor.data_offset or elements != tensor.n_elements:
            raise ValueError(f"the size or the offset of {tensor.name!r} is over 64 bits")
        if start < reached:
            raise ValueError(f"{tensor.name!r} and {last} share their bytes")
        reached, last = start + int(tensor.n_bytes), repr(tensor.name)


def read(path: StrPath, base: StrPath | None = None) -> Adapter:
    """An adapter from one .gguf file.

    Args:
        path: The file.
        base: Folder of the base model, for the number of heads; files that lora-fx wrote have it.

    Returns:
        An Adapter under Hugging Face's names; layouts are None. Experts have a key each.

    Raises:
        LoraFxError: No adapter, a damaged file, an architecture whose names or heads are not
            known, half a pair, an aLoRA.
    """
    file = File(str(path))
    fields, tensors = _contents(Path(path), file)
    own, told = str(fields.get("general.architecture")), fields.get("adapter.lora.alpha")
    alpha = file.alpha("adapter.lora.alpha", np.asarray(told) if told else None)
    heads = {name: fields.get(f"{own}.attention.{key}") for name, key in _HEADS.items()}
    names = _base_names(base) or _names(own, heads, file.name)
    if names.architecture != own:
        what = f"is {own!r}; {names.where} is of {names.architecture!r}"
        raise file.error("general.architecture", what, "is it the adapter of this model?")
    if (alora := "adapter.alora.invocation_tokens") in fields:
        what = "makes it an aLoRA, which acts from those tokens on: no weight has its change"
        raise file.error(alora, what, "use it in llama.cpp")
    entries: dict[str, Entry] = {}
    for name, a in tensors.items():
        stem, dot, half = name.rpartition(".lora_")
        b = tensors.get(f"{stem}.lora_b")
        if not dot and name.endswith("_norm.weight"):
            file.notes.append(f"{file.name}: {name!r} is not read: llama.cpp does not apply it")
        elif b is None or half not in ("a", "b") or f"{stem}.lora_a" not in tensors:
            raise file.error(name, "is no half of a pair X.lora_a, X.lora_b")
        elif half == "a":
            for key, update in _updates(stem, (a, b), alpha, names, file).items():
                if key in entries:
                    raise file.error(stem, f"is a second update of {key!r}; expected one")
                entries[key] = update
    return Adapter(entries, {"notes": file.notes})


def _updates(
    stem: str, pair: Factors, alpha: float | None, names: _Names, file: File
) -> dict[str, Entry]:
    """The updates of one tensor of llama.cpp, under Hugging Face's names."""
    a, b = pair
    block, _, rest = stem.removeprefix("blk.").partition(".")
    whole = next((key for key, name in _WHOLE.items() if name == stem), "")
    of_layer = stem.startswith("blk.") and _BLOCK.fullmatch(block)
    module = next((m for m, n in names.modules.items() if n == rest and of_layer), whole)
    if not module:
        raise file.error(stem, f"is no matrix of {names.architecture} that is known here")
    a = np.ascontiguousarray(a.T) if whole == _TABLE else a
    axes = 3 if ".experts." in module else 2
    if not a.ndim == b.ndim == axes or (*a.shape[:-2], a.shape[-2]) != (*b.shape[:-2], b.shape[-1]):
        shapes = f"lora_a {list(pair[0].shape)} and lora_b {list(b.shape)}"
        raise file.error(stem, f"has {shapes}; expected [r, in] and [out, r], E before of experts")
    alpha = alpha or float(b.shape[-1])
    if whole:
        origin = Origin(op="embedding" if whole == _TABLE else "")
        return {f"{whole}.weight": LowRank(a, b, alpha, origin=origin)}
    key = f"model.layers.{int(block)}.{module}"
    if axes == 2:
        return {f"{key}.weight": LowRank(a, names.turned(b, key, file, to_halves), alpha)}
    home, _, leaf = key.rpartition(".")
    return {f"{home}.{i}.{leaf}.weight": LowRank(a[i], b[i], alpha) for i in range(len(a))}


# From an Adapter to the tensors of a GGUF file.


_refused = partial(refused, "a GGUF adapter")


def write_file(adapter: Adapter, path: StrPath, base: StrPath | None = None) -> tuple[str, ...]:
    """Write one .gguf file in fp32; returns notes, such as which scales went into B.

    Args:
        adapter: Bound or not.
        path: The file to create.
        base: Folder of the base model, of which config.json is read.

    Raises:
        LoraFxError: No config.json, an architecture that is not known here, or what llama.cpp
            does not apply, by key.
    """
    names, file = _base_names(base), File("the adapter")
    if names is None:
        what = f"{base} has no config.json" if base else "no base is given"
        hint = "give the folder of the base model: --base"
        raise LoraFxError(f"GGUF's names are those of the base's architecture; {what}", hint)
    scales = {k: _plain(k, low, names).scale for k, low in adapter.entries.items()}
    alphas = {k: scales[k] * low.rank for k, low in adapter.lowrank.items()}
    usable = Counter(x for x in alphas.values() if 1e-30 < abs(x) < 1e30)  # 0 would mean s = 1
    alpha = float(np.float32(usable.most_common(1)[0][0])) if usable else 1.0
    pieces: dict[str, dict[int, tuple[str, Array, Array]]] = {}
    for key, low in adapter.lowrank.items():
        if alphas[key] != alpha:
            low = replace(low, b=low.b * np.float32(alphas[key] / alpha))
        for name, expert, a, b in _parts(key, low, names, file):
            if pieces.setdefault(name, {}).setdefault(expert, (key, a, b))[0] != key:
                raise _refused(key, f"{name} has a second update", "one tensor has one update")
    tensors: dict[str, Array] = {}
    for name, held in pieces.items():
        a, b = held[-1][1:] if -1 in held else _stacked(name, held, names)
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    _write(path, {k: file.master(k, array) for k, array in tensors.items()}, alpha, names)
    others = sum(x != alpha for x in alphas.values())
    updates = counted(others, "update")
    note = f"a GGUF adapter has one alpha in fp32, {alpha!r}: the scales of {updates} of "
    return (f"{note}another are multiplied into B",) if others else ()


def _plain(key: str, entry: Entry, names: _Names) -> LowRank:
    """The update, where llama.cpp can apply it."""
    if not isinstance(entry, LowRank) or not is_plain(entry):
        raise _refused(key, f"it is {name_of(entry)}")
    if entry.origin.kernel or entry.use or "@" in key or key.endswith("]"):
        raise _refused(key, "it is of a convolution, or of a part or one use of the tensor")
    tied = names.config.get("tie_word_embeddings") or "gemma" in names.architecture
    if (tied or entry.origin.tied) and key in (f"{_HEAD}.weight", f"{_TABLE}.weight"):
        raise _refused(key, "the model has one table for embedding and head", "--exclude it")
    return entry


def _parts(
    key: str, low: LowRank, names: _Names, file: File
) -> Iterator[tuple[str, int, Array, Array]]:
    """(tensor of llama.cpp, number of the expert or -1, A and B) of an update."""
    a, b = low.a, low.b
    if name := _WHOLE.get(key.removesuffix(".weight")):
        if _TABLE in key:
            looked_up = low.layout.out == (1,) if low.layout else low.origin.op == "embedding"
            a, b = (a.T, b) if looked_up else (b, a.T)
        yield name, -1, a, b
        return
    match = _KEY.fullmatch(key) or _KEY.fullmatch(f"{key}.weight")  # stacks are no modules
    number, module = match.groups() if match else ("", "")
    if expert := _EXPERT.fullmatch(module):
        module = f"{expert[1]}.{expert[3]}"
    parts = {module: b}
    if module.endswith(".experts.gate_up_proj"):
        half, home = b.shape[-2] // 2, module.removesuffix("gate_up_proj")
        parts = {f"{home}gate_proj": b[..., :half, :], f"{home}up_proj": b[..., half:, :]}
    stack = ".experts." in module and expert is None
    if not parts.keys() <= names.modules.keys() or a.ndim != 2 + stack:
        shape = list(low.shape)
        raise _refused(key, f"llama.cpp's {names.architecture} has no such matrix of {shape}")
    for part, rows in parts.items():
        name = f"blk.{int(number)}.{names.modules[part]}"
        if stack:
            yield from ((name, i, *pair) for i, pair in enumerate(zip(a, rows, strict=True)))
        else:
            one = int(expert[2]) if expert else -1
            yield name, one, a, names.turned(rows, f".{part}", file, to_neighbours)


def _stacked(name: str, held: Mapping[int, tuple[str, Array, Array]], names: _Names) -> Factors:
    """A and B of all experts of a layer, which have to be there, and of one shape."""
    count = experts_of(names.config) or max(held) + 1
    key = next(iter(held.values()))[0]
    if len(held) != count or max(held) != count - 1:
        raise _refused(key, f"{name} is one tensor of {count} experts; {len(held)} have updates")
    try:
        a, b = (np.stack([held[i][half] for i in range(count)]) for half in (1, 2))
    except ValueError as error:
        raise _refused(key, f"the experts of {name} have several ranks or shapes") from error
    return a, b


def _write(path: StrPath, tensors: Mapping[str, Array], alpha: float, names: _Names) -> None:
    writer = _package().GGUFWriter(path, names.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for field, key in _HEADS.items():
        if isinstance(count := names.config.get(field), int):
            writer.add_uint32(f"{names.architecture}.attention.{key}", count)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class GgufAdapter(Format):
    """One file of llama.cpp; models have the same ending and magic, which `read` refuses."""

    name = "gguf"
    suffixes = (".gguf",)
    magic = Magic(b"GGUF")
    one_model = True
    takes_base = True

    def is_adapter(self, head: bytes) -> bool:
        """Whether general.type says so, and not a model."""
        return re.search(rb"(?s)general\.type.{12}adapter", head) is not None

    def read(self, path: Path, base: Path | None = None) -> Adapter:
        """Read one file."""
        return read(path, base)

    def write(self, adapter: Adapter, path: Path, base: Path | None = None) -> tuple[str, ...]:
        """Write one file."""
        return write_file(adapter, path, base)


GGUF = GgufAdapter()
