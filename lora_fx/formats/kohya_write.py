"""From an Adapter to the tensors of a kohya file; see `lora_fx.formats.kohya`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Dense, Entry, Hadamard, Kronecker, is_plain, name_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.formats import lycoris
from lora_fx.formats.naming import COMPONENTS, guess_component, split_component
from lora_fx.formats.peft_forms import form_of, to_tensors

_HINT = "save it as peft, which keeps everything"


def encode(adapter: Adapter) -> tuple[dict[str, Array], dict[str, str], tuple[str, ...]]:
    """The tensors, {key: its name in the file} and the notes of an adapter.

    Raises:
        LoraFxError: An update that the format cannot say, two names that become one.
    """
    tensors: dict[str, Array] = {}
    names: dict[str, str] = {}
    notes: list[str] = []
    second = any(key.startswith("text_encoder_2.") for key in adapter)
    owner: dict[str, str] = {}
    kept = adapter.metadata.get("naming") == "kohya"
    for key, entry in adapter.entries.items():
        module, parts, alpha = _parts(key, entry)
        name = module if kept else file_name(module, second=second)
        leaf = key.rpartition(".")[2]
        names[key] = f"{name}.{leaf}"
        if owner.setdefault(names[key], key) != key:
            raise LoraFxError(
                f"{owner[names[key]]!r} and {key!r} would both be {name!r} in the file: it has "
                "'_' for '.'",
                _HINT,
            )
        tensors |= {f"{name}.{part}": array for part, array in parts.items()}
        if alpha is not None:
            tensors[f"{name}.alpha"] = _number(alpha)
    if not tensors:
        raise LoraFxError("the adapter has no update", "was it saved before training?")
    if adapter.metadata.get("fan_in_fan_out"):
        notes.append("the model stores weights [in, out], of which readers of kohya know nothing")
    if any(name.startswith("lycoris_") for name in names.values()):
        notes.append(
            "names begin with lycoris_, which LyCORIS gives to models of any kind: image tools "
            "look for lora_unet_ and lora_te_"
        )
    return tensors, names, tuple(notes)


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
    component, rest = split_component(module)
    component = component or guess_component(module)
    prefix = COMPONENTS[component].prefixes[0] if component else "lycoris_"
    if component == "text_encoder" and second:
        prefix = "lora_te1_"
    return prefix + rest.replace(".", "_")


def _parts(key: str, entry: Entry) -> tuple[str, dict[str, Array], float | None]:
    """(module, tensors by the ends of their names, alpha) of one update."""
    module, _, leaf = key.rpartition(".")
    if isinstance(entry, LowRank):
        return _lowrank(key, entry)
    if isinstance(entry, Dense) and module and leaf in ("weight", "bias"):
        value = entry.value if entry.scale == 1.0 else entry.value * np.float32(entry.scale)
        return module, {"diff" if leaf == "weight" else "diff_b": value}, None
    if isinstance(entry, (Hadamard, Kronecker)) and module and leaf == "weight":
        if entry.layout is not None and entry.layout.out != (0,):
            raise _refused(key, "the weight is stored [in, out]")
        return module, *lycoris.encode(entry)
    raise _refused(key, f"it is {name_of(entry)}")


def _lowrank(key: str, low: LowRank) -> tuple[str, dict[str, Array], float]:
    if not is_plain(replace(low, magnitude=None)):
        raise _refused(key, f"it is {name_of(low)}")
    form = form_of(key, low)
    if form.kind == "embedding":
        raise _refused(key, "it is the update of an embedding")
    if not form.module:
        raise _refused(key, form.why)
    if form.transposed:
        raise _refused(key, "the weight is stored [in, out]")
    tensors = to_tensors(form, low)
    a, b = (tensors[name] for name in form.names)
    parts = {"lora_down.weight": a, "lora_up.weight": b}
    if low.magnitude is not None:
        parts["dora_scale"] = low.magnitude.reshape(-1, *(1 for _ in a.shape[1:]))
    # rsLoRA's factor goes into alpha, as LyCORIS stores it.
    alpha = low.alpha if low.variant == "lora" else low.scale * low.rank
    return form.module, parts, alpha


def _number(value: float) -> Array:
    """A scalar in fp32, or in fp64 where fp32 would round it."""
    narrow = np.asarray(value, np.float32)
    return narrow if float(narrow) == value else np.asarray(value, np.float64)


def _refused(key: str, why: str) -> LoraFxError:
    return LoraFxError(f"a kohya file cannot say the update of {key!r}: {why}", _HINT)
