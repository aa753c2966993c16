"""Adapters as diffusers stores them: one safetensors file for all components of a pipeline.

==================================================  ===========================================
names, behind `unet.`, `text_encoder.` …            written by
==================================================  ===========================================
X.lora_A.weight, X.lora_B.weight                    diffusers with PEFT; we write it
X.lora_magnitude_vector, X.lora_B.bias              the same: DoRA, lora_bias
X.lora.down.weight, X.lora.up.weight                diffusers before it
X.lora_linear_layer.down.weight, ….up.weight        the same, text encoders
Y.processor.to_q_lora.down.weight, ….up.weight      attention processors: the module is Y.to_q,
                                                    and Y.to_out.0 of to_out_lora
text_encoder.….self_attn.to_q_lora.down.weight      q_proj, k_proj, v_proj, out_proj
==================================================  ===========================================

ΔW = s · B A with s = alpha / r. alpha is the tensor `X.alpha`, or stands in the header: JSON under
`lora_adapter_metadata` with PEFT's config of every component, `unet.lora_alpha` and so on
(diffusers since its pull request 11324, 2025). Where there is neither, alpha = r, as diffusers has
it.

Keys carry the component, `unet.X.weight`, and the adapter's `names` list the components. Other
tools write `diffusion_model.` for it. Files of one model without a prefix (save_lora_adapter) have
bare keys.

Facts: diffusers 0.42.1, loaders/lora_base.py, utils/state_dict_utils.py, utils/peft_utils.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Dense, Entry, name_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.strict_json import json_object
from lora_fx.files.tensor_files import read_tensors, write_tensors
from lora_fx.formats import base, naming
from lora_fx.formats.base import Arrays, File
from lora_fx.formats.format import FileHead, Format
from lora_fx.formats.peft.config import MERGE, Pattern, build_config, check_config, mutation
from lora_fx.formats.peft.names import PREFIX, from_tensors
from lora_fx.formats.peft.write import module_form, to_tensors
from lora_fx.text import Json

WEIGHTS = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"
_OLD = re.compile(r"(.+?)\.(?:processor\.)?(\w+)_lora\.(down|up)\.weight(\.alpha)?")
_PAIR = re.compile(r"(.+)\.lora(?:(?:_linear_layer)?\.(down|up)|_([AB]))\.weight")
_REST = re.compile(r"(.+)\.(alpha|lora_magnitude_vector|lora_B\.bias)(?:\.weight)?")
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_HALF = {"down": "A", "up": "B", "A": "A", "B": "B"}


def detect(seen: FileHead) -> bool:
    """True for a file with pairs under a component's name, or with diffusers' header."""
    if any(n.startswith(PREFIX) for n in seen.names) or seen.config:
        return False
    if HEADER in seen.metadata:
        return any(_part(n) for n in seen.names)
    return any(
        (part := _part(n)) and part[1] in "AB" and (naming.has_home(n) or _OLD.fullmatch(n))
        for n in seen.names
    )


def read(path: str | Path) -> Adapter:
    """An adapter from a file, or from a folder with pytorch_lora_weights.safetensors.

    Returns:
        An Adapter with the keys described above; layouts are None, and the updates of convolutions
        have their `op` and `kernel`. Of a file that lora-fx wrote, the keys and layouts that it was
        written from.

    Raises:
        LoraFxError: Half a pair, shapes that do not fit, other names, an alpha of 0, two alphas
            that differ, a config field that changes the maths.
    """
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    tensors, header = read_tensors(path)
    file = File(str(path))
    what = "is not a name that diffusers gives; expected X.lora_A.weight, X.lora_B.weight …"
    unknown = partial(file.error, what=what, hint="was the file edited?")
    configs = _Configs(header, file)
    entries: dict[str, Entry] = {}
    for module, parts in file.modules(tensors, _part, unknown).items():
        entries |= _entries(module, parts, configs, file)
    file.notes.extend(configs.notes())
    entries, metadata, named = base.restore(entries, header, str(path))
    components = {naming.split_component(key)[0] for key in entries} - {""}
    names = naming.taken_names(metadata)
    if not named and any(naming.has_home(key) for key in entries):
        names = naming.ForeignNames("diffusers", tuple(sorted(components)))
    return Adapter(entries, {**metadata, "notes": file.notes}, names)


def _part(name: str) -> tuple[str, str] | None:
    """(module, what) of a tensor's name; what is A, B, alpha, lora_magnitude_vector, lora_B.bias.

    >>> _part("unet.mid.attn1.processor.to_out_lora.up.weight")
    ('unet.mid.attn1.to_out.0', 'B')
    >>> _part("text_encoder.x.self_attn.to_q_lora.down.weight"), _part("unet.x.lora_A.weight")
    (('text_encoder.x.self_attn.q_proj', 'A'), ('unet.x', 'A'))
    """
    if match := _OLD.fullmatch(name):
        module, leaf = match[1], match[2]
        if module.startswith("text_encoder"):
            leaf = _TEXT.get(leaf, leaf)
        elif leaf == "to_out":
            leaf = "to_out.0"
        # Before components were written only a UNet had processors.
        lead = "" if naming.split_component(module)[0] else "unet."
        return f"{lead}{module}.{leaf}", "alpha" if match[4] else _HALF[match[3]]
    if match := _PAIR.fullmatch(name):
        return match[1], _HALF[match[2] or match[3]]
    return base.module_and_part(_REST, name)


def _entries(module: str, parts: Arrays, configs: _Configs, file: File) -> dict[str, Entry]:
    if "A" not in parts or "B" not in parts:
        have = ", ".join(sorted(parts))
        raise file.error(module, f"has {have}; expected lora_A and lora_B (or down and up)")
    a, b = (file.master(f"{module}.lora_{half}", parts[half]) for half in "AB")
    a, b, op, kernel = from_tensors("linear", a, b, f"{file.name}: {module!r}")
    stored = file.alpha(f"{module}.alpha", parts.get("alpha"))
    alpha, variant = configs.of(module, len(a))
    if stored is not None and alpha is not None and stored != alpha:
        raise file.error(f"{module}.alpha", f"is {stored:g}; the header's {HEADER} says {alpha:g}")
    number = next((n for n in (stored, alpha) if n is not None), float(len(a)))
    length, bias = (
        file.vector(f"{module}.{part}", parts[part], len(b)) if part in parts else None
        for part in ("lora_magnitude_vector", "lora_B.bias")
    )
    origin = Origin(op, kernel)
    low = LowRank(a, b, number, variant=variant, magnitude=length, origin=origin)
    own: dict[str, Entry] = {f"{module}.weight": low}
    return own if bias is None else {**own, f"{module}.bias": Dense(bias, low.scale)}


class _Configs:
    """The configs in a file's header, one a component; all may be missing."""

    def __init__(self, header: Mapping[str, str], file: File) -> None:
        self.file = file
        self.where = f"{file.name}: {HEADER}"
        self.configs: dict[str, Json] = {}
        for key, value in json_object(header.get(HEADER, "{}"), self.where).items():
            component, field = naming.split_component(key)
            self.configs.setdefault(component, {})[field] = value
        self.alphas: dict[str, Pattern] = {}
        for component, config in self.configs.items():
            # DoRA and biases show in the tensors; the rest of the config is held to PEFT's rules.
            plain = {k: v for k, v in config.items() if k not in ("use_dora", "lora_bias")}
            where = f"{self.where} {component}".rstrip()
            file.notes.extend(check_config(plain, where))
            if changed := mutation(config) or ("BD-LoRA" if config.get("use_bdlora") else ""):
                raise LoraFxError(f"{where}: its start is {changed!r}; expected plain LoRA", MERGE)
            self.alphas[component] = Pattern(config, "alpha_pattern", "lora_alpha", where)

    def of(self, module: str, rank: int) -> tuple[float | None, str]:
        """(alpha, variant) of one module; no alpha where the header has no config of it."""
        component, rest = naming.split_component(module)
        component, rest = (component, rest) if component in self.alphas else ("", module)
        if component not in self.alphas:
            return None, "lora"
        config = self.configs[component]
        ranks = Pattern(config, "rank_pattern", "r", self.where)
        if ranks.of(rest) not in (None, rank):
            raise self.file.error(module, f"has rank {rank}; {self.where} says {ranks.of(rest):g}")
        return self.alphas[component].of(rest), "rslora" if config.get("use_rslora") else "lora"

    def notes(self) -> list[str]:
        """Alphas that no module has, or more than one pattern gives."""
        return [note for pattern in self.alphas.values() for note in pattern.notes()]


# From an Adapter to the tensors of a diffusers file; see `lora_fx.formats.diffusers`.


_refused = partial(base.refused, "a diffusers file")


def write(adapter: Adapter, directory: str | Path) -> tuple[str, ...]:
    """Write a folder that `load_lora_weights` takes; otherwise as `write_file`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return write_file(adapter, directory / WEIGHTS)


def write_file(adapter: Adapter, path: str | Path) -> tuple[str, ...]:
    """Write one .safetensors file; returns notes on what other readers will not see.

    Raises:
        LoraFxError: A key whose component is not known, or what the format cannot say, by key:
            whole tensors, embeddings, parts of a tensor, stacks, LoHa, LoKr.
    """
    tensors: dict[str, Array] = {}
    names: dict[str, str] = {}
    modules: dict[str, dict[str, LowRank]] = {}
    for key, entry in adapter.entries.items():
        if not isinstance(entry, LowRank):
            raise _refused(key, f"it is {name_of(entry)}", "kohya files hold LoHa, LoKr and .diff")
        form = module_form(key, entry, _refused)
        component, rest = naming.split_component(form.module)
        component = component or naming.guess_component(form.module)
        if not component:
            raise _refused(
                key,
                "no component is named",
                f"put one before the keys: {', '.join(c + '.' for c in naming.COMPONENTS)}",
            )
        name = f"{component}.{rest}"
        names[key] = f"{name}.weight"
        if rest in modules.setdefault(component, {}):
            raise _refused(key, f"two updates act on {name!r}", "merge the two first")
        modules[component][rest] = entry
        lead = f"{PREFIX}{form.lead}"
        tensors |= {name + n.removeprefix(lead): t for n, t in to_tensors(form, entry).items()}
    config = {
        f"{component}.{field}": value
        for component, updates in modules.items()
        for field, value in _config(component, updates).items()
    }
    notes = base.turned_notes(adapter, "diffusers")
    if any(low.scale != 1.0 for lows in modules.values() for low in lows.values()):
        notes.append(
            "alpha stands in the header, as lora_adapter_metadata: diffusers reads it since 2025; "
            "readers that do not take alpha = rank"
        )
    header = {
        "format": "pt",
        HEADER: json.dumps(config, sort_keys=True),
        base.FIELD: base.describe(adapter, names),
    }
    write_tensors(Path(path), tensors, header)
    return tuple(notes)


def _config(component: str, updates: dict[str, LowRank]) -> Json:
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


class DiffusersFile(Format):
    """One safetensors file for all components of a pipeline, in its folder or not."""

    name = "diffusers"
    suffixes = (".safetensors",)
    folder_files = (WEIGHTS,)
    pickles = ("pytorch_lora_weights.bin",)

    def detect(self, seen: FileHead) -> bool:
        """Whether there are pairs under a component's name, or diffusers' header."""
        return detect(seen)

    def read(self, path: Path, base: Path | None = None) -> Adapter:
        """Read one file, or a folder with it."""
        return read(path)

    def write(self, adapter: Adapter, path: Path, base: Path | None = None) -> tuple[str, ...]:
        """Write one file, or a folder with it."""
        if path.suffix in self.suffixes:
            return write_file(adapter, path)
        return write(adapter, path)


DIFFUSERS = DiffusersFile()
