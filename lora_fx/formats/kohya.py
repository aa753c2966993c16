"""Adapters as kohya's sd-scripts and LyCORIS store them: one safetensors file, alpha as a tensor.

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
from lora_fx.adapter.updates import Dense, Entry, Hadamard, Kronecker, Rotation, name_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import read_tensors, write_tensors
from lora_fx.formats import base, lycoris, naming
from lora_fx.formats.base import Arrays, File
from lora_fx.formats.format import FileHead, Format
from lora_fx.formats.peft.names import PREFIX
from lora_fx.formats.peft.write import module_form, to_tensors

_PART = re.compile(
    r"(.+)\.(lora_(?:down|up|mid)\.weight|alpha|dora_scale|diff(?:_b)?|[wb]_norm"
    r"|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12]))"
)
_part = partial(base.module_and_part, _PART)
_OTHERS = {
    "oft_": "OFT, which multiplies the weight by an orthogonal matrix",
    "boft_": "BOFT, which multiplies the weight by orthogonal matrices",
    "on_input": "IA³, which rescales inputs or outputs",
    "a1.weight": "GLoRA",
    "bias_values": "a sparse bias",
    "lora_up.bias": "a bias of lora_up",
}
_PLACES = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}


def detect(seen: FileHead) -> bool:
    """True for a file with tensors of these names that are not PEFT's."""
    if base.FIELD in seen.metadata:
        return any(".lora_down." in n or _part(n) for n in seen.names)
    return any(
        ((part := _part(n)) and part[1] != "alpha" and not n.startswith(PREFIX))
        or n.endswith((".oft_blocks", ".oft_diag"))
        for n in seen.names
    )


def read(path: str | Path) -> Adapter:
    """An adapter from one .safetensors file.

    Returns:
        An Adapter with the file's names as keys (see above); of a file that lora-fx wrote, the
        keys and layouts that it was written from. Layouts are None otherwise; `op` and
        `kernel` are there where tensors show a kernel.

    Raises:
        LoraFxError: Another method's tensors, half a pair, shapes that do not fit, an alpha of 0.
    """
    tensors, header = read_tensors(Path(path))
    file = File(str(path))
    entries: dict[str, Entry] = {}
    for module, parts in file.modules(tensors, _part, partial(_unknown, file=file)).items():
        entries |= _entries(module, parts, file)
    entries, metadata, named = base.restore(entries, header, str(path))
    told = naming.taken_names(metadata)
    names = told if named else naming.ForeignNames("kohya")
    return Adapter(entries, {**metadata, "notes": file.notes}, names)


def _entries(module: str, parts: Arrays, file: File) -> dict[str, Entry]:
    """The updates of one module: of its weight, and perhaps of its bias."""
    alpha = file.alpha(f"{module}.alpha", parts.get("alpha"))
    masters = {p: file.master(f"{module}.{p}", a) for p, a in parts.items() if p != "alpha"}
    entries: dict[str, Entry] = {}
    kinds = sorted({p.partition("_")[0] for p in masters} - {"dora"})
    for part in _PLACES.keys() & masters.keys():
        key = f"{module}.{_PLACES[part]}"
        if key in entries:
            raise file.error(module, f"has {', '.join(sorted(parts))}: two changes of one tensor")
        entries[key] = Dense(masters.pop(part))
    methods = [kind for kind in kinds if kind in ("hada", "lokr", "lora")]
    if len(methods) > 1 or (methods and f"{module}.weight" in entries):
        raise file.error(module, f"has {', '.join(sorted(parts))}: two changes of one tensor")
    if methods == ["lora"]:
        weight: Entry = _lowrank(module, masters, alpha, file)
    elif "dora_scale" in masters:
        raise file.error(
            module, f"has dora_scale beside {', '.join(kinds)}", "only LoRA takes dora_scale here"
        )
    elif methods:
        read = lycoris.loha if methods == ["hada"] else lycoris.lokr
        weight = read(masters, alpha, file, module)
    elif not entries:
        raise file.error(module, "has an alpha and nothing else")
    else:
        if alpha is not None:
            alone = f"{module}.alpha"
            file.notes.append(f"{file.name}: {alone!r} is not read: diff takes no scale")
        return entries
    return {f"{module}.weight": weight, **entries}


def _lowrank(module: str, parts: dict[str, Array], alpha: float | None, file: File) -> LowRank:
    magnitude = parts.pop("dora_scale", None)
    down, up = parts.get("lora_down.weight"), parts.get("lora_up.weight")
    if down is None or up is None:
        lost = "lora_up" if up is None else "lora_down"
        raise file.error(module, f"has no {lost}.weight; expected lora_down and lora_up")
    mid, kernel = parts.get("lora_mid.weight"), down.shape[2:]
    fits = down.ndim >= 2 and up.ndim >= 2 and set(up.shape[2:]) <= {1}
    fits = fits and down.shape[0] == up.shape[1]
    if mid is not None:
        kernel = mid.shape[2:]
        fits = fits and mid.shape[:2] == (len(down), len(down)) and set(down.shape[2:]) <= {1}
    if not fits:
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in sorted(parts.items()))
        raise file.error(
            module, f"has {shapes}; expected down [r, in, *kernel] and up [out, r, 1, …]"
        )
    a, b = down.reshape(len(down), -1), np.ascontiguousarray(up.reshape(up.shape[:2]))
    if mid is not None:
        a = lycoris.tucker(mid, b.T, a)[1]
    op = f"conv{len(kernel)}d" if kernel else ""
    if magnitude is not None:
        if magnitude.shape[0] != len(b) or magnitude.size != len(b):
            raise file.error(
                f"{module}.dora_scale",
                f"is {list(magnitude.shape)}; expected [{len(b)}, 1, …], one norm for each row",
                "it rescales columns; merge it with the trainer that made it",
            )
        magnitude = magnitude.reshape(-1)
    alpha = alpha or float(len(down))
    return LowRank(a, b, alpha, magnitude=magnitude, origin=Origin(op, kernel))


def _unknown(name: str, file: File) -> LoraFxError:
    what = next((w for end, w in _OTHERS.items() if end in name), "")
    if what:
        return file.error(name, f"is of {what}: not supported", "merge it with its own trainer")
    return file.error(
        name,
        "is not a name that kohya or LyCORIS gives; expected X.lora_down.weight, X.alpha …",
        "was the file edited?",
    )


# From an Adapter to the tensors of a kohya file; see `lora_fx.formats.kohya`.


_refused = partial(base.refused, "a kohya file")


def write_file(adapter: Adapter, path: str | Path) -> tuple[str, ...]:
    """Write one .safetensors file; returns notes on what other readers will not see.

    Raises:
        LoraFxError: What the format cannot say, by key: whole tensors, embeddings, parts of a
            tensor, stacks, weights stored [in, out], two keys that are one text with "_".
    """
    tensors: dict[str, Array] = {}
    names: dict[str, str] = {}
    notes = base.turned_notes(adapter, "kohya")
    second = any(key.startswith("text_encoder_2.") for key in adapter)
    owner: dict[str, str] = {}
    kept = adapter.names is not None and adapter.names.format == "kohya"
    for key, entry in adapter.entries.items():
        module, parts, alpha = _parts(key, entry)
        name = module if kept else file_name(module, second=second)
        leaf = key.rpartition(".")[2]
        names[key] = f"{name}.{leaf}"
        if owner.setdefault(names[key], key) != key:
            raise LoraFxError(
                f"{owner[names[key]]!r} and {key!r} would both be {name!r} in the file: it has "
                "'_' for '.'",
                base.KEEPS,
            )
        tensors |= {f"{name}.{part}": array for part, array in parts.items()}
        if alpha is not None:
            tensors[f"{name}.alpha"] = _number(alpha)
    if any(name.startswith("lycoris_") for name in names.values()):
        notes.append(
            "names begin with lycoris_, which LyCORIS gives to models of any kind: image tools "
            "look for lora_unet_ and lora_te_"
        )
    write_tensors(Path(path), tensors, {base.FIELD: base.describe(adapter, names)})
    return tuple(notes)


def file_name(module: str, *, second: bool) -> str:
    """The name of a module in the file.

    Args:
        module: Its path in the model, with the component before it or not.
        second: True when the adapter also has updates of text_encoder_2.

    >>> file_name("unet.mid_block.resnets.0.conv1", second=False)
    'lora_unet_mid_block_resnets_0_conv1'
    >>> file_name("text_encoder.text_model.fc1", second=True), file_name("h.0.fc", second=False)
    ('lora_te1_text_model_fc1', 'lycoris_h_0_fc')
    """
    component, rest = naming.split_component(module)
    component = component or naming.guess_component(module)
    prefix = naming.COMPONENTS[component].prefixes[0] if component else "lycoris_"
    if component == "text_encoder" and second:
        prefix = "lora_te1_"
    return prefix + rest.replace(".", "_")


def _parts(key: str, entry: Entry) -> tuple[str, dict[str, Array], float | None]:
    """(module, tensors by the ends of their names, alpha) of one update."""
    module, _, leaf = key.rpartition(".")
    if isinstance(entry, LowRank):
        form = module_form(key, entry, _refused)
        tensors = to_tensors(form, entry)
        a, b = (tensors[name] for name in form.names)
        parts = {"lora_down.weight": a, "lora_up.weight": b}
        if entry.magnitude is not None:
            parts["dora_scale"] = entry.magnitude.reshape(-1, *(1 for _ in a.shape[1:]))
        # rsLoRA's factor goes into alpha, as LyCORIS stores it.
        alpha = entry.alpha if entry.variant == "lora" else entry.scale * entry.rank
        return form.module, parts, alpha
    if isinstance(entry, Dense) and module and leaf in ("weight", "bias"):
        value = entry.value if entry.scale == 1.0 else entry.value * np.float32(entry.scale)
        return module, {"diff" if leaf == "weight" else "diff_b": value}, None
    if isinstance(entry, (Hadamard, Kronecker)) and module and leaf == "weight":
        if entry.layout is not None and entry.layout.out != (0,):
            raise _refused(key, "the weight is stored [in, out]")
        return module, *lycoris.encode(entry)
    hint = "--as lora --rank R --base FOLDER" if isinstance(entry, Rotation) else base.KEEPS
    raise _refused(key, f"it is {name_of(entry)}", hint)


def _number(value: float) -> Array:
    """A scalar in fp32, or in fp64 where fp32 would round it."""
    narrow = np.asarray(value, np.float32)
    return narrow if float(narrow) == value else np.asarray(value, np.float64)


class Kohya(Format):
    """One safetensors file of sd-scripts or LyCORIS, whose names need a model to be understood."""

    name = "kohya"
    suffixes = (".safetensors",)

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
