"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

ΔW of a module X is s · B · A with s = lora_alpha / r, or lora_alpha / √r with use_rslora; the rank
and alpha of single modules come from rank_pattern and alpha_pattern. Modules of modules_to_save
are stored whole under their own names. With use_dora the rows of W + s · B · A (in [out, in]
order, see `lora_fx.adapter.dora`) get the norms lora_magnitude_vector. Checked against peft
0.21.2.

What PEFT cannot say (parts of a tensor, stacks, parameters that are no `.weight`) goes into the
same file under names that PEFT passes over, and is described, with the layouts of all updates,
by JSON under `lora_fx` in the header. Files without that JSON are read as PEFT reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from lora_fx import regexes
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.variant import expect_variant
from lora_fx.errors import LoraFxError
from lora_fx.files.replaceable import PROBE
from lora_fx.files.strict_json import json_object, read_json
from lora_fx.files.tensor_files import read_tensors, write_tensors
from lora_fx.formats.format import FileHead, Format
from lora_fx.formats.header_json import metadata_text, probe_in_header
from lora_fx.formats.peft import loha_lokr_oft, vera_vectors
from lora_fx.formats.peft.decode import decode
from lora_fx.formats.peft.encode import encode
from lora_fx.formats.peft.names import OWN, PREFIX
from lora_fx.formats.peft.peft_file import PeftFile
from lora_fx.probe.carried import FIELD
from lora_fx.text import Json, JsonView

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

Decode = Callable[[PeftFile, JsonView], Adapter]
"""A function of (file and config, lora-fx's JSON) that returns the adapter."""
KINDS: dict[str, Decode] = {
    "LORA": decode,
    **dict.fromkeys(loha_lokr_oft.KINDS, loha_lokr_oft.read_peft),
    "VERA": vera_vectors.read_peft,
}
"""peft_type → the function that reads its tensors."""


def detect(seen: FileHead) -> bool:
    """Whether a file has PEFT's prefix, or lora-fx's JSON."""
    if "lora_fx" in seen.metadata:
        return True
    return any(name.startswith((PREFIX, OWN)) for name in seen.names)


def read(path: str | Path) -> Adapter:
    """Read an adapter from a folder or a single file.

    Args:
        path: A folder with adapter_config.json and adapter_model.safetensors, or a .safetensors
            file that has a config inside (ours) or beside it.

    Returns:
        An Adapter of entries by parameter name, `X.weight` or `X.weight` of an alias:

        * LowRank `a` [r, in] and `b` [out, r] in fp32, with `magnitude` [out] for DoRA. In files
          of PEFT layouts are None, and other fields say what the file does:
          op embedding with in = rows, out = dim, and `twins`, to which the same change applies;
          op conv2d and its kernel with in = C_in · ∏k; op experts and `layer` for a parameter,
          `a` [E, r, in] and `b` [E, out, r], to be given to
          `lora_fx.adapter.expert_stacks.place` before keys are matched; `mutated` where the
          update is meant for `lora_fx.adapter.residual.residual` of the base weight.
        * Dense [out] for a bias of B, Rows for trained tokens, Full for biases and modules that
          were trained whole.

        metadata has dropout, the base model's name, the notes; "fan_in_fan_out": True where PEFT
        said that linear weights are stored [in, out] (it sets the flag by the last layer it saw,
        so shapes go first); "untouched_targets": names in target_modules without a tensor.

    Raises:
        LoraFxError: Anything that would silently change the result: a field in `config.REFUSED`,
            half a pair, shapes that do not fit, empty or non-finite tensors, unknown names.
    """
    path = Path(path)
    weights = path / WEIGHTS if path.is_dir() else path
    tensors, header = read_tensors(weights)
    ours = json_object(header.get("lora_fx", "{}"), f"{weights}: metadata lora_fx")
    config, where = config_of(weights, ours)
    if config is None:
        raise LoraFxError(
            f"{weights}: no config in its metadata and no {CONFIG} next to it; expected one of "
            "the two, which gives the scale of the updates",
            f"copy the adapter's {CONFIG} next to the file",
        )
    decode_type = _decoder(config.get("peft_type"), where)
    source = PeftFile(str(weights), tensors=tensors, config=config, config_file=where)
    return decode_type(source, ours)


def _decoder(peft_type: object, where: str) -> Decode:
    """Return the function that reads the tensors of a peft_type; raise for an unknown one."""
    if names_variant(peft_type):
        expect_variant(str(peft_type).removeprefix(OWN), f"{where}: the adapter")
        return decode
    if not isinstance(peft_type, str) or peft_type not in KINDS:
        raise LoraFxError(
            f"{where}: peft_type is {peft_type!r}; expected {' or '.join(map(repr, KINDS))}",
            "merge it into its model with PEFT (merge_and_unload) and use the merged model",
        )
    return KINDS[peft_type]


def names_variant(peft_type: object) -> bool:
    """Whether a peft_type names a variant that PEFT lacks: lora_fx.NAME."""
    return isinstance(peft_type, str) and peft_type.startswith(OWN)


def config_of(file: Path, ours: JsonView) -> tuple[Json | None, str]:
    """Return (config, its location) from lora-fx's JSON or next to the file; None without one.

    Regular expressions in it are counted anew, under the name of that place.
    """
    if isinstance(ours.get("config"), dict):
        where = f"{file}: config in metadata lora_fx"
        regexes.begin(where)
        return dict(ours["config"]), where
    beside = file.parent / CONFIG
    regexes.begin(str(beside))
    if not beside.is_file():
        return None, str(beside)
    return read_json(beside), str(beside)


def write(adapter: Adapter, directory: str | Path) -> tuple[str, ...]:
    """Write a folder that PEFT loads; return notes on what PEFT ignores.

    Args:
        adapter: Bound, or as read from a file of PEFT. metadata may hold dropout, task_type,
            base_model_name_or_path and revision for the config; all of it is kept for reading.
        directory: Created where it is missing; files of these names in it are replaced.

    Raises:
        LoraFxError: Both variants in one adapter, a variant that is neither lora nor rslora, DoRA
            on some updates only, an entry that is no LoRA at all, empty or non-finite tensors,
            metadata that is no JSON.
    """
    tensors, config, ours, notes = encode(adapter)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS, tensors, {"format": "pt", "lora_fx": metadata_text(ours)})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")
    if FIELD in adapter.metadata:
        (directory / PROBE).write_text(adapter.metadata[FIELD], encoding="utf-8")
    return notes


def write_file(adapter: Adapter, path: str | Path) -> tuple[str, ...]:
    """Write one .safetensors file with the config in its metadata; otherwise as `write`."""
    tensors, config, ours, notes = encode(adapter)
    ours = {**ours, "config": config}
    header = {"format": "pt", "lora_fx": metadata_text(ours), **probe_in_header(adapter)}
    write_tensors(Path(path), tensors, header)
    return notes


class Peft(Format):
    """A PEFT adapter: a folder with adapter_config.json, or one file with config in its header."""

    name = "peft"
    suffixes = (".safetensors",)
    folder_files = (WEIGHTS, CONFIG, PROBE)
    pickles = (PICKLED,)
    one_model = True
    takes_empty = True
    keeps_variants = True
    keeps_probe = True
    keeps_invocation = True

    def detect(self, seen: FileHead) -> bool:
        """Whether the file has PEFT's prefix, or lora-fx's JSON."""
        return detect(seen)

    def resembles(self, seen: FileHead) -> bool:
        """Whether there is a config or a name of A or B, but no prefix."""
        return seen.config or any(".lora_A" in name or ".lora_B" in name for name in seen.names)

    def read(self, path: Path, base: Path | None = None) -> Adapter:
        """Read a folder or a file."""
        return read(path)

    def write(self, adapter: Adapter, path: Path, base: Path | None = None) -> tuple[str, ...]:
        """Write a folder that PEFT loads, or one file."""
        if path.suffix in self.suffixes:
            return write_file(adapter, path)
        return write(adapter, path)


PEFT = Peft()
