"""Adapters in the format of diffusers: one safetensors file for all components of a pipeline.

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
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Dense, Entry
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.strict_json import json_object
from lora_fx.files.tensor_files import read_tensors, write_tensors
from lora_fx.formats.checked_file import Arrays, File, module_and_part
from lora_fx.formats.components import COMPONENTS, guess_component, has_home, split_component
from lora_fx.formats.format import FileHead, Format
from lora_fx.formats.header_json import FIELD, describe, probe_in_header, restore
from lora_fx.formats.naming import ForeignNames, taken_names
from lora_fx.formats.peft.build_config import build_config
from lora_fx.formats.peft.config import ALORA, MERGE, check_config, mutation
from lora_fx.formats.peft.form import PeftForm, module_form, to_tensors
from lora_fx.formats.peft.names import PREFIX, from_tensors
from lora_fx.formats.peft.pattern import Pattern
from lora_fx.formats.unsupported import refused, turned_notes
from lora_fx.text import Json

WEIGHTS = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"
_OLD = re.compile(r"(.+?)\.(?:processor\.)?(\w+)_lora\.(down|up)\.weight(\.alpha)?")
_PAIR = re.compile(r"(.+)\.lora(?:(?:_linear_layer)?\.(down|up)|_([AB]))\.weight")
_OTHER = re.compile(r"(.+)\.(alpha|lora_magnitude_vector|lora_B\.bias)(?:\.weight)?")
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_HALF = {"down": "A", "up": "B", "A": "A", "B": "B"}
_refused = partial(refused, "a diffusers file")


def detect(seen: FileHead) -> bool:
    """Whether a file has A/B pairs under a component's name, or diffusers' header."""
    if seen.config or any(name.startswith(PREFIX) for name in seen.names):
        return False
    if HEADER in seen.metadata:
        return any(_split_name(name) for name in seen.names)
    return any(_is_name_of_diffusers(name) for name in seen.names)


def _is_name_of_diffusers(name: str) -> bool:
    """Whether this names A or B, under a component or of an attention processor."""
    split = _split_name(name)
    if split is None or split[1] not in ("A", "B"):
        return False
    return has_home(name) or _OLD.fullmatch(name) is not None


def read(path: str | Path) -> Adapter:
    """Read an adapter from a file, or from a folder with pytorch_lora_weights.safetensors.

    Returns:
        An Adapter with the keys described above; layouts are None, and the updates of convolutions
        have their `op` and `kernel`. Of a file that lora-fx wrote, the keys and layouts that it was
        written from.

    Raises:
        LoraFxError: Half a pair, shapes that do not fit, other names, an alpha of 0, two alphas
            that differ, a config field that changes the maths.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS
    stored, header = read_tensors(path)
    file = File(str(path))
    what = "is not a name that diffusers writes; expected X.lora_A.weight, X.lora_B.weight …"
    unknown = partial(file.error, what=what, hint="check whether the file was edited")
    configs = _Configs(header, file)
    entries: dict[str, Entry] = {}
    for module, tensors in file.modules(stored, _split_name, unknown).items():
        entries |= _entries(module, tensors, configs, file)
    file.notes.extend(configs.notes())

    entries, metadata, are_restored = restore(entries, header, str(path))
    names = taken_names(metadata)
    if not are_restored and any(has_home(key) for key in entries):
        names = ForeignNames("diffusers", _components_of(entries))
    return Adapter(entries, {**metadata, "notes": file.notes}, names)


def _components_of(keys: Iterable[str]) -> tuple[str, ...]:
    """Return the components that keys begin with, sorted."""
    components = {split_component(key)[0] for key in keys}
    return tuple(sorted(components - {""}))


def _split_name(name: str) -> tuple[str, str] | None:
    """Return (module, part) of a name; part: A, B, alpha, lora_magnitude_vector, lora_B.bias.

    >>> _split_name("unet.mid.attn1.processor.to_out_lora.up.weight")
    ('unet.mid.attn1.to_out.0', 'B')
    >>> _split_name("text_encoder.x.self_attn.to_q_lora.down.weight")
    ('text_encoder.x.self_attn.q_proj', 'A')
    >>> _split_name("unet.x.lora_A.weight")
    ('unet.x', 'A')
    """
    by_processor = _OLD.fullmatch(name)
    if by_processor:
        attention, leaf, half, alpha = by_processor.groups()
        module = _module_of_processor(attention, leaf)
        if alpha:
            return module, "alpha"
        return module, _HALF[half]
    pair = _PAIR.fullmatch(name)
    if pair:
        module, direction, letter = pair.groups()
        return module, _HALF[direction or letter]
    return module_and_part(_OTHER, name)


def _module_of_processor(attention: str, leaf: str) -> str:
    """Return the module that a part of an attention processor acts on."""
    if attention.startswith("text_encoder"):
        leaf = _TEXT.get(leaf, leaf)
    elif leaf == "to_out":
        leaf = "to_out.0"
    component, _ = split_component(attention)
    # Before components were written only a UNet had processors.
    lead = "" if component else "unet."
    return f"{lead}{attention}.{leaf}"


def _entries(module: str, tensors: Arrays, configs: _Configs, file: File) -> dict[str, Entry]:
    """Return the update of one module, and the update of its bias if B has one."""
    if "A" not in tensors or "B" not in tensors:
        have = ", ".join(sorted(tensors))
        raise file.error(module, f"has {have}; expected lora_A and lora_B (or down and up)")
    stored_a = file.master(f"{module}.lora_A", tensors["A"])
    stored_b = file.master(f"{module}.lora_B", tensors["B"])
    a, b, op, kernel = from_tensors("linear", stored_a, stored_b, f"{file.name}: {module!r}")
    alpha, variant = _alpha_and_variant(module, tensors, configs, file, rank=len(a))

    rows = len(b)
    magnitude = _vector(module, "lora_magnitude_vector", tensors, rows, file)
    bias = _vector(module, "lora_B.bias", tensors, rows, file)
    origin = Origin(op, kernel)
    update = LowRank(a, b, alpha, variant=variant, magnitude=magnitude, origin=origin)
    entries: dict[str, Entry] = {f"{module}.weight": update}
    if bias is not None:
        entries[f"{module}.bias"] = Dense(bias, update.scale)
    return entries


def _alpha_and_variant(
    module: str, tensors: Arrays, configs: _Configs, file: File, *, rank: int
) -> tuple[float, str]:
    """Return (alpha, variant) of a module; alpha is from the tensor, the header, or the rank.

    Raises:
        LoraFxError: The two are there and differ.
    """
    stored = file.alpha(f"{module}.alpha", tensors.get("alpha"))
    in_header, variant = configs.of(module, rank)
    if stored is not None and in_header is not None and stored != in_header:
        raise file.error(
            f"{module}.alpha", f"is {stored:g}; the header's {HEADER} says {in_header:g}"
        )
    if stored is not None:
        return stored, variant
    if in_header is not None:
        return in_header, variant
    return float(rank), variant


def _vector(module: str, end: str, tensors: Arrays, rows: int, file: File) -> Array | None:
    """Return a magnitude or a bias of B; None if there is none."""
    if end not in tensors:
        return None
    return file.vector(f"{module}.{end}", tensors[end], rows)


class _Configs:
    """The configs in a file's header, one for each component; any may be missing."""

    def __init__(self, header: Mapping[str, str], file: File) -> None:
        self.file = file
        self.where = f"{file.name}: {HEADER}"
        self.configs: dict[str, Json] = {}
        for key, value in json_object(header.get(HEADER, "{}"), self.where).items():
            component, field = split_component(key)
            self.configs.setdefault(component, {})[field] = value
        self.alphas: dict[str, Pattern] = {}
        for component, config in self.configs.items():
            where = f"{self.where} {component}".rstrip()
            self._check(config, where)
            self.alphas[component] = Pattern(config, "alpha_pattern", "lora_alpha", where)

    def _check(self, config: Json, where: str) -> None:
        """Check a config by PEFT's rules; raise for anything but plain LoRA."""
        # DoRA and biases show in the tensors; the rest of the config is held to PEFT's rules.
        checked = {
            field: value
            for field, value in config.items()
            if field not in ("use_dora", "lora_bias")
        }
        self.file.notes.extend(check_config(checked, where))
        start = mutation(config)
        if not start and config.get("use_bdlora"):
            start = "BD-LoRA"
        if config.get(ALORA):
            raise LoraFxError(
                f"{where}: {ALORA} makes it an aLoRA; expected plain LoRA: a pipeline's models "
                "read no token ids that invoke it",
                "load it with PEFT",
            )
        if start:
            raise LoraFxError(
                f"{where}: the adapter was initialised with {start!r}; expected plain LoRA", MERGE
            )

    def of(self, module: str, rank: int) -> tuple[float | None, str]:
        """Return (alpha, variant) of a module; alpha is None if the header has no config for it."""
        component, name = split_component(module)
        if component not in self.alphas:
            component = ""
            name = module
        if component not in self.alphas:
            return None, "lora"
        config = self.configs[component]
        ranks = Pattern(config, "rank_pattern", "r", self.where)
        expected = ranks.of(name)
        if expected is not None and expected != rank:
            raise self.file.error(module, f"has rank {rank}; {self.where} says {expected:g}")
        alpha = self.alphas[component].of(name)
        variant = "rslora" if config.get("use_rslora") else "lora"
        return alpha, variant

    def notes(self) -> Iterator[str]:
        """Yield notes on alpha patterns that match no module, or that several patterns match."""
        for pattern in self.alphas.values():
            yield from pattern.notes()


def write(adapter: Adapter, directory: str | Path) -> tuple[str, ...]:
    """Write a folder that `load_lora_weights` accepts; otherwise as `write_file`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return write_file(adapter, directory / WEIGHTS)


def write_file(adapter: Adapter, path: str | Path) -> tuple[str, ...]:
    """Write one .safetensors file; return notes on what other readers ignore.

    Raises:
        LoraFxError: A key without a known component, or an update that the format cannot store:
            whole tensors, embeddings, parts of a tensor, stacks, LoHa, LoKr.
    """
    tensors: dict[str, Array] = {}
    names: dict[str, str] = {}
    updates: dict[str, dict[str, LowRank]] = {}  # component → module → update
    for key, entry in adapter.entries.items():
        if not isinstance(entry, LowRank):
            raise _refused(key, entry)
        form = module_form(key, entry, _refused)
        component, module = _component_and_module(key, form)
        name = f"{component}.{module}"
        names[key] = f"{name}.weight"
        updates.setdefault(component, {})[module] = entry
        lead = f"{PREFIX}{form.lead}"
        for peft_name, tensor in to_tensors(form, entry).items():
            tensors[name + peft_name.removeprefix(lead)] = tensor

    config: Json = {}
    for component, of_component in updates.items():
        fields = _config(component, of_component)
        config |= {f"{component}.{field}": value for field, value in fields.items()}
    notes = turned_notes(adapter, "diffusers")
    if any(update.scale != 1.0 for update in adapter.lowrank.values()):
        notes.append(
            "alpha is in the header (lora_adapter_metadata), which diffusers reads since 2025; "
            "older readers use alpha = rank"
        )
    header = {
        "format": "pt",
        HEADER: json.dumps(config, sort_keys=True),
        FIELD: describe(adapter, names),
        **probe_in_header(adapter),
    }
    write_tensors(Path(path), tensors, header)
    return tuple(notes)


def _component_and_module(key: str, form: PeftForm) -> tuple[str, str]:
    """Return (component, module) of an update: the named component, or the only one that fits.

    Raises:
        LoraFxError: It may be of several components.
    """
    component, module = split_component(form.module)
    component = component or guess_component(form.module)
    if not component:
        starts = ", ".join(f"{name}." for name in COMPONENTS)
        raise _refused(
            key, "its key names no component", f"start the keys with a component: {starts}"
        )
    return component, module


def _config(component: str, updates: dict[str, LowRank]) -> Json:
    """Return PEFT's config of one component, as diffusers stores it in the header."""
    variants = {update.variant for update in updates.values()}
    with_magnitude = {update.magnitude is not None for update in updates.values()}
    if len(variants) > 1 or len(with_magnitude) > 1 or not variants <= {"lora", "rslora"}:
        dora = ", with and without DoRA" if len(with_magnitude) > 1 else ""
        raise LoraFxError(
            f"the updates of {component} have several variants "
            f"({', '.join(sorted(variants))}{dora}); expected one",
            "save them as two adapters",
        )
    numbers = {module: (update.rank, update.alpha) for module, update in updates.items()}
    fields = {"use_rslora": variants.pop() == "rslora", "use_dora": with_magnitude.pop()}
    return build_config(numbers, updates, (), {}, fields)


class DiffusersFile(Format):
    """One safetensors file for all components of a pipeline, in its folder or not."""

    name = "diffusers"
    suffixes = (".safetensors",)
    keeps_probe = True
    folder_files = (WEIGHTS,)
    pickles = ("pytorch_lora_weights.bin",)

    def detect(self, seen: FileHead) -> bool:
        """Whether the file has A/B pairs under a component's name, or diffusers' header."""
        return detect(seen)

    def read(self, path: Path, base: Path | None = None) -> Adapter:
        """Read one file, or a folder with that file."""
        return read(path)

    def write(self, adapter: Adapter, path: Path, base: Path | None = None) -> tuple[str, ...]:
        """Write one file, or a folder with that file."""
        if path.suffix in self.suffixes:
            return write_file(adapter, path)
        return write(adapter, path)


DIFFUSERS = DiffusersFile()
