"""From an Adapter to the tensors of a diffusers file; see `lora_fx.formats.diffusers`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import is_plain, name_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.formats.naming import COMPONENTS, guess_component, split_component
from lora_fx.formats.peft_build import build_config
from lora_fx.formats.peft_forms import form_of, to_tensors
from lora_fx.formats.peft_names import PREFIX

_HINT = "save it as peft, which keeps everything"


def encode(
    adapter: Adapter,
) -> tuple[dict[str, Array], dict[str, str], dict[str, Any], tuple[str, ...]]:
    """The tensors, {key: its name in the file}, the header's config and the notes.

    Raises:
        LoraFxError: An update that the format cannot say, or of no known component.
    """
    tensors: dict[str, Array] = {}
    names: dict[str, str] = {}
    modules: dict[str, dict[str, LowRank]] = {}
    for key, entry in adapter.entries.items():
        if not isinstance(entry, LowRank):
            raise _refused(key, f"it is {name_of(entry)}", "kohya files hold LoHa, LoKr and .diff")
        if not is_plain(replace(entry, magnitude=None)):
            raise _refused(key, f"it is {name_of(entry)}", _HINT)
        form = form_of(key, entry)
        if form.kind == "embedding" or not form.module or form.transposed:
            why = form.why or (
                "the weight is stored [in, out]" if form.transposed else "it is an embedding's"
            )
            raise _refused(key, why, _HINT)
        component, rest = split_component(form.module)
        component = component or guess_component(form.module)
        if not component:
            raise _refused(
                key,
                "no component is named",
                f"put one before the keys: {', '.join(c + '.' for c in COMPONENTS)}",
            )
        name = f"{component}.{rest}"
        names[key] = f"{name}.weight"
        if rest in modules.setdefault(component, {}):
            raise _refused(key, f"two updates act on {name!r}", "merge the two first")
        modules[component][rest] = entry
        lead = f"{PREFIX}{form.lead}"
        tensors |= {name + n.removeprefix(lead): t for n, t in to_tensors(form, entry).items()}
    if not tensors:
        raise LoraFxError("the adapter has no update", "was it saved before training?")
    config: dict[str, Any] = {}
    for component, updates in modules.items():
        for field, value in _config(component, updates).items():
            config[f"{component}.{field}"] = value
    notes = []
    if adapter.metadata.get("fan_in_fan_out"):
        notes.append(
            "the model stores weights [in, out], of which readers of diffusers know nothing"
        )
    if any(low.scale != 1.0 for lows in modules.values() for low in lows.values()):
        notes.append(
            "alpha stands in the header, as lora_adapter_metadata: diffusers reads it since 2025; "
            "readers that do not take alpha = rank"
        )
    return tensors, names, config, tuple(notes)


def _config(component: str, updates: dict[str, LowRank]) -> dict[str, Any]:
    """PEFT's config of one component, as diffusers puts it into the header."""
    variants = {low.variant for low in updates.values()}
    with_magnitude = {low.magnitude is not None for low in updates.values()}
    if len(variants) > 1 or len(with_magnitude) > 1 or not variants <= {"lora", "rslora"}:
        raise LoraFxError(
            f"the updates of {component} are of several variants ({', '.join(sorted(variants))}"
            f"{', with and without DoRA' if len(with_magnitude) > 1 else ''}); expected one",
            "save them as two adapters",
        )
    numbers = {name: (low.rank, low.alpha) for name, low in updates.items()}
    fields = {"use_rslora": variants.pop() == "rslora", "use_dora": with_magnitude.pop()}
    return build_config(numbers, updates, (), {}, fields)


def _refused(key: str, why: str, hint: str) -> LoraFxError:
    return LoraFxError(f"a diffusers file cannot say the update of {key!r}: {why}", hint)
