"""Adapters of kohya's sd-scripts and of LyCORIS: one safetensors file, alpha as a tensor.

==========================================  ==================================================
tensors of X                                change of X's weight (biases where it says so)
==========================================  ==================================================
lora_down.weight [r, in], lora_up.weight    s · up @ down
lora_down [r, C_in, *k], lora_up [out, r,   s · up @ down of a convolution, in = C_in · ∏k
1, …]
… and lora_mid.weight [r, r, *k]            Tucker: down is 1×1, ΔW[o, c, k] = s · Σ up mid down
… and dora_scale [out, 1, …]                DoRA: rows of W + ΔW rescaled to these norms
diff [as the weight], diff_b [out]          added as they are, to the weight and to the bias
w_norm [n], b_norm [n]                      the same for a normalisation layer
hada_*, lokr_*                              LoHa and LoKr: see `lycoris`
==========================================  ==================================================

s = alpha / r with alpha the tensor `X.alpha`, or 1 where there is none. rsLoRA's factor is in the
stored alpha, so no flag is needed. A dora_scale along the inputs ([1, in, …]: LyCORIS's old default
and its wd_on_output=False, see its issue 216) rescales columns and is refused.

X is the path with "_" for ".", behind lora_unet_, lora_te_, lora_te1_, lora_te2_ and the like, or
(other trainers) the path itself. Keys keep it, with `.weight` or `.bias` behind, until
`Adapter.resolved` compares them with a model's names.

Facts: sd-scripts networks/lora.py; LyCORIS 4.1.3, modules/locon.py, full.py, norms.py.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Dense, Entry, Hadamard, Kronecker
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import read_tensors, write_tensors
from lora_fx.formats import lycoris
from lora_fx.formats.checked_file import Arrays, File, module_and_part
from lora_fx.formats.components import COMPONENTS, guess_component, split_component
from lora_fx.formats.format import FileHead, Format
from lora_fx.formats.header_json import FIELD, describe, probe_in_header, restore
from lora_fx.formats.naming import ForeignNames, taken_names
from lora_fx.formats.one_scale import multiplied
from lora_fx.formats.peft.form import module_form, to_tensors
from lora_fx.formats.peft.names import PREFIX
from lora_fx.formats.unsupported import refused, turned_notes, way_to_keep

_NAME = re.compile(
    r"(.+)\.(lora_(?:down|up|mid)\.weight|alpha|dora_scale|diff(?:_b)?|[wb]_norm"
    r"|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12]))"
)
_split_name = partial(module_and_part, _NAME)
"""Returns (module, end) of a tensor's name; None for a name of another format."""
_OTHER_METHODS = {
    "oft_": "OFT, which multiplies the weight by an orthogonal matrix",
    "boft_": "BOFT, which multiplies the weight by orthogonal matrices",
    "on_input": "IA³, which rescales inputs or outputs",
    "a1.weight": "GLoRA",
    "bias_values": "a sparse bias",
    "lora_up.bias": "a bias of lora_up",
}
_CHANGED_AS_STORED = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}
"""The end of a tensor that is a plain difference → the parameter that it is added to."""
_refused = partial(refused, "a kohya file")


def detect(seen: FileHead) -> bool:
    """Whether a file has tensors with these names that are not PEFT's."""
    if FIELD in seen.metadata:
        return any(".lora_down." in name or _split_name(name) for name in seen.names)
    return any(_is_name_of_kohya(name) for name in seen.names)


def _is_name_of_kohya(name: str) -> bool:
    """Whether only kohya files have a tensor with this name; several formats have alpha."""
    if name.endswith((".oft_blocks", ".oft_diag")):
        return True
    split = _split_name(name)
    return split is not None and split[1] != "alpha" and not name.startswith(PREFIX)


def read(path: str | Path) -> Adapter:
    """Read an adapter from one .safetensors file.

    Returns:
        An Adapter with the file's names as keys (see above); of a file that lora-fx wrote, the
        keys and layouts that it was written from. Layouts are None otherwise; `op` and
        `kernel` are there where tensors show a kernel.

    Raises:
        LoraFxError: Another method's tensors, half a pair, shapes that do not fit, an alpha of 0.
    """
    stored, header = read_tensors(Path(path))
    file = File(str(path))
    unknown = partial(_unknown_name, file=file)
    entries: dict[str, Entry] = {}
    for module, tensors in file.modules(stored, _split_name, unknown).items():
        entries |= _entries(module, tensors, file)
    entries, metadata, are_restored = restore(entries, header, str(path))
    written_names = taken_names(metadata)
    names = written_names if are_restored else ForeignNames("kohya")
    return Adapter(entries, {**metadata, "notes": file.notes}, names)


def _entries(module: str, tensors: Arrays, file: File) -> dict[str, Entry]:
    """Return the updates of one module: of its weight, and perhaps of its bias.

    Args:
        module: Its name in the file.
        tensors: By the ends of their names.
        file: The file.
    """
    alpha = file.alpha(f"{module}.alpha", tensors.get("alpha"))
    masters = {
        end: file.master(f"{module}.{end}", tensor)
        for end, tensor in tensors.items()
        if end != "alpha"
    }
    two_changes = f"has {', '.join(sorted(tensors))}, which are two changes of one tensor"
    entries: dict[str, Entry] = {}
    for end, leaf in _CHANGED_AS_STORED.items():
        if end not in masters:
            continue
        key = f"{module}.{leaf}"
        if key in entries:
            raise file.error(module, two_changes)
        entries[key] = Dense(masters[end])

    factors = {end: tensor for end, tensor in masters.items() if end not in _CHANGED_AS_STORED}
    kinds = sorted({end.partition("_")[0] for end in masters} - {"dora"})
    methods = [kind for kind in kinds if kind in ("hada", "lokr", "lora")]
    if len(methods) > 1 or (methods and f"{module}.weight" in entries):
        raise file.error(module, two_changes)
    if methods == ["lora"]:
        return {f"{module}.weight": _lowrank(module, factors, alpha, file), **entries}
    if "dora_scale" in factors:
        raise file.error(
            module,
            f"has dora_scale together with {', '.join(kinds)}",
            "use dora_scale only with LoRA",
        )
    if methods == ["hada"]:
        return {f"{module}.weight": lycoris.loha(factors, alpha, file, module), **entries}
    if methods == ["lokr"]:
        return {f"{module}.weight": lycoris.lokr(factors, alpha, file, module), **entries}
    if not entries:
        raise file.error(module, "has only an alpha; expected the tensors of an update too")
    if alpha is not None:
        alpha_name = f"{module}.alpha"
        file.notes.append(f"{file.name}: {alpha_name!r} is not read: diff has no scale")
    return entries


def _lowrank(module: str, tensors: Arrays, alpha: float | None, file: File) -> LowRank:
    """Return the low-rank update of one module.

    Args:
        module: Its name in the file.
        tensors: lora_down.weight, lora_up.weight, and perhaps lora_mid.weight and dora_scale.
        alpha: None: the rank.
        file: The file.
    """
    factors = {end: tensor for end, tensor in tensors.items() if end != "dora_scale"}
    down = factors.get("lora_down.weight")
    up = factors.get("lora_up.weight")
    if down is None or up is None:
        missing = "lora_up" if up is None else "lora_down"
        raise file.error(module, f"has no {missing}.weight; expected lora_down and lora_up")
    mid = factors.get("lora_mid.weight")
    if not _fit(down, up, mid):
        shapes = ", ".join(f"{end} {list(factor.shape)}" for end, factor in sorted(factors.items()))
        raise file.error(
            module, f"has {shapes}; expected down [r, in, *kernel] and up [out, r, 1, …]"
        )

    kernel = down.shape[2:] if mid is None else mid.shape[2:]
    a = down.reshape(len(down), -1)
    b = np.ascontiguousarray(up.reshape(up.shape[:2]))
    if mid is not None:
        _, a = lycoris.tucker(mid, b.T, a)
    op = f"conv{len(kernel)}d" if kernel else ""
    return LowRank(
        a,
        b,
        alpha or float(len(down)),
        magnitude=_magnitude(module, tensors.get("dora_scale"), len(b), file),
        origin=Origin(op, kernel),
    )


def _fit(down: Array, up: Array, mid: Array | None) -> bool:
    """Whether the shapes are [r, in, *kernel] and [out, r, 1, …], or those of a Tucker product."""
    if down.ndim < 2 or up.ndim < 2 or not set(up.shape[2:]) <= {1}:
        return False
    rank = len(down)
    if rank != up.shape[1]:
        return False
    if mid is None:
        return True
    return mid.shape[:2] == (rank, rank) and set(down.shape[2:]) <= {1}


def _magnitude(module: str, dora_scale: Array | None, rows: int, file: File) -> Array | None:
    """Return the norms of the rows; raise for norms of columns."""
    if dora_scale is None:
        return None
    if dora_scale.shape[0] != rows or dora_scale.size != rows:
        raise file.error(
            f"{module}.dora_scale",
            f"is {list(dora_scale.shape)}; expected [{rows}, 1, …], one norm for each row",
            "it rescales columns; merge it with the program that trained it",
        )
    return dora_scale.reshape(-1)


def _unknown_name(name: str, file: File) -> LoraFxError:
    """Return the error for a tensor that kohya and LyCORIS do not write."""
    for end, method in _OTHER_METHODS.items():
        if end in name:
            return file.error(
                name,
                f"belongs to {method}, which is not supported",
                "merge it with the program that trained it",
            )
    return file.error(
        name,
        "is not a name that kohya or LyCORIS writes; expected X.lora_down.weight, X.alpha …",
        "check whether the file was edited",
    )


def write_file(adapter: Adapter, path: str | Path) -> tuple[str, ...]:
    """Write one .safetensors file; return notes on what other readers ignore.

    Raises:
        LoraFxError: The format cannot store an update: whole tensors, embeddings, parts of a
            tensor, stacks, weights stored [in, out], two keys that are equal with "_".
    """
    tensors: dict[str, Array] = {}
    names: dict[str, str] = {}
    notes = turned_notes(adapter, "kohya")
    has_second_encoder = any(key.startswith("text_encoder_2.") for key in adapter)
    has_names_of_kohya = adapter.names is not None and adapter.names.format == "kohya"
    for key, entry in adapter.entries.items():
        module, changes, alpha = _encoded(key, entry)
        name = module if has_names_of_kohya else file_name(module, second=has_second_encoder)
        leaf = key.rpartition(".")[2]
        names[key] = f"{name}.{leaf}"
        for end, array in changes.items():
            tensors[f"{name}.{end}"] = array
        if alpha is not None:
            tensors[f"{name}.alpha"] = _number(alpha)
    if any(name.startswith("lycoris_") for name in names.values()):
        notes.append(
            "the names begin with lycoris_, as LyCORIS names any model; image tools expect "
            "lora_unet_ and lora_te_"
        )
    header = {FIELD: describe(adapter, names), **probe_in_header(adapter)}
    write_tensors(Path(path), tensors, header)
    return tuple(notes)


def file_name(module: str, *, second: bool) -> str:
    """Return the name of a module in the file.

    Args:
        module: Its path in the model, with the component before it or not.
        second: True when the adapter also has updates of text_encoder_2.

    >>> file_name("unet.mid_block.resnets.0.conv1", second=False)
    'lora_unet_mid_block_resnets_0_conv1'
    >>> file_name("text_encoder.text_model.fc1", second=True), file_name("h.0.fc", second=False)
    ('lora_te1_text_model_fc1', 'lycoris_h_0_fc')
    """
    component, path = split_component(module)
    component = component or guess_component(module)
    if not component:
        prefix = "lycoris_"
    elif component == "text_encoder" and second:
        prefix = "lora_te1_"
    else:
        prefix = COMPONENTS[component].prefixes[0]
    return prefix + path.replace(".", "_")


def _encoded(key: str, entry: Entry) -> tuple[str, dict[str, Array], float | None]:
    """Return (module, tensors by the ends of their names, alpha) of one update.

    Raises:
        LoraFxError: The format cannot store it.
    """
    module, _, leaf = key.rpartition(".")
    if isinstance(entry, LowRank):
        return _encoded_lowrank(key, entry)
    if isinstance(entry, Dense) and module and leaf in ("weight", "bias"):
        value = entry.value
        if entry.scale != 1.0:
            value = multiplied(value, entry.scale, key, _refused)
        end = "diff" if leaf == "weight" else "diff_b"
        return module, {end: value}, None
    if isinstance(entry, (Hadamard, Kronecker)) and module and leaf == "weight":
        if entry.layout is not None and entry.layout.out != (0,):
            raise _refused(key, "the weight is stored [in, out]", way_to_keep(entry))
        factors, alpha = lycoris.encode(entry)
        return module, factors, alpha
    raise _refused(key, entry)


def _encoded_lowrank(key: str, update: LowRank) -> tuple[str, dict[str, Array], float]:
    """Return (module, factors by the ends of their names, alpha) of a low-rank update."""
    form = module_form(key, update, _refused)
    tensors = to_tensors(form, update)
    a_name, b_name = form.names
    a = tensors[a_name]
    factors = {"lora_down.weight": a, "lora_up.weight": tensors[b_name]}
    if update.magnitude is not None:
        factors["dora_scale"] = update.magnitude.reshape(-1, *(1 for _ in a.shape[1:]))
    if update.variant == "lora":
        return form.module, factors, update.alpha
    # rsLoRA's factor goes into alpha, as LyCORIS stores it.
    return form.module, factors, update.scale * update.rank


def _number(value: float) -> Array:
    """Return a scalar in fp32, or in fp64 if fp32 would round it."""
    with np.errstate(over="ignore"):
        narrow = np.asarray(value, np.float32)
    if float(narrow) == value:
        return narrow
    return np.asarray(value, np.float64)


class Kohya(Format):
    """A safetensors file of sd-scripts or LyCORIS, whose names only a model resolves."""

    name = "kohya"
    suffixes = (".safetensors",)
    keeps_probe = True

    def detect(self, seen: FileHead) -> bool:
        """Whether tensors have these names, and not PEFT's."""
        return detect(seen)

    def read(self, path: Path, base: Path | None = None) -> Adapter:
        """Read one file."""
        return read(path)

    def write(self, adapter: Adapter, path: Path, base: Path | None = None) -> tuple[str, ...]:
        """Write one file."""
        return write_file(adapter, path)


KOHYA = Kohya()
