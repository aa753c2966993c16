"""The loading of a MODEL, as a user names it, as a module with example inputs.

Nothing is downloaded but what the prefix hf: names, pickles are read where they are trusted, as
tensors alone, and no code is run but the user's own factory.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from lora_fx.errors import LoraFxError, expect_path, near_path, one_line
from lora_fx.files.checkpoint import PICKLES
from lora_fx.files.hub import local
from lora_fx.files.read import trusting
from lora_fx.fx.load.factory import call_factory
from lora_fx.fx.load.huggingface import load_folder
from lora_fx.fx.load.library_models import RESERVED, library_model
from lora_fx.fx.load.loaded_model import FORMS, LoadedModel
from lora_fx.fx.load.weights_file import read_weights
from lora_fx.fx.trees import tree_map_only


def load_model(
    spec: str | Path,
    *,
    weights: str | Path | None = None,
    meta: bool = False,
    trust: bool = False,
    device: str | None = None,
) -> LoadedModel:
    """Load the model that `spec` names; random weights are the same in every run.

    Args:
        spec: A Hugging Face folder, `hf:ORG/NAME[@REVISION]`, `package.module:FACTORY`,
            `path/file.py:FACTORY`, `timm:NAME` or `torchvision:NAME`. A factory takes no arguments
            and returns (module, args, kwargs).
        weights: A safetensors file (or folder); every name and shape must fit.
        meta: Weights are not needed: folders and reserved names are built on the meta device
            (then `device` has no effect); a factory is called as it is.
        trust: Read pickled weights, by torch's unpickler that runs no code.
        device: Where module and inputs go, as torch names it.

    Raises:
        LoraFxError: An unknown form, a model that cannot be built, weights that do not fit.
    """
    expect_path(spec, "spec", "call load_model(path); a module needs no loading")
    text = str(local(spec, weights=not (meta or weights)))
    file = None if weights is None else Path(local(weights))
    place = check_device(device)
    with torch.random.fork_rng(devices=[]), trusting(trust):  # the caller's numbers are put back
        torch.default_generator.manual_seed(0)
        loaded = _load(text, file, meta)
    module = loaded.module.eval()
    if not any(parameter.is_meta for parameter in module.parameters()):
        module = module.to(place)
    input_device = torch.device("cpu") if meta else place
    args, kwargs = tree_map_only(
        torch.Tensor, lambda tensor: tensor.to(input_device), (loaded.args, loaded.kwargs)
    )
    return replace(loaded, module=module, args=args, kwargs=kwargs, origin=str(spec))


def _load(text: str, file: Path | None, meta: bool) -> LoadedModel:
    path = Path(text)
    library, _, name = text.partition(":")
    if library in RESERVED and name:
        return library_model(text, library, name, file, meta)
    if text and path.is_dir():
        return load_folder(path, file, meta=meta)
    if path.suffix in REFUSED:
        why, hint = REFUSED[path.suffix]
        hint = hint.format(file=text)
        if not path.exists():
            hint = near_path(text, hint)
        raise LoraFxError(f"{text}: {why}", hint)
    if path.is_file() and path.suffix != ".py":
        raise LoraFxError(f"{text}: unknown kind of file", FORMS)
    if ":" in text:
        module, args, kwargs = call_factory(text)
        notes: tuple[str, ...] = ()
        if file is not None:
            notes = read_weights(module, file)
        return LoadedModel(module, args, kwargs, text, notes)
    if path.suffix == ".py":
        raise LoraFxError(f"{text}: the name of a factory is missing", f"pass {text}:FACTORY")
    raise LoraFxError(f"{text!r} is not a model: no such file or folder", near_path(text, FORMS))


_BARE = "holds tensors but no code to run them"
_BESIDE = "pass the model, and the file as its weights: MODEL --weights {file}"
REFUSED = {
    ".pt2": (
        "a .pt2 file is a program, not a torch module",
        "pass its path to the verb; lora_fx.capture(path) opens it",
    ),
    ".onnx": (
        "an .onnx file cannot be opened as a torch model",
        "pass its path to export, merge or verify; lora-fx targets and insert take it too",
    ),
    ".safetensors": (_BARE, _BESIDE),
    **dict.fromkeys(PICKLES, (_BARE, _BESIDE)),
    **dict.fromkeys((".npz", ".csv", ".jsonl"), ("data, not a model", "the model comes first")),
}
"""The suffix of a file's name → the reason why it is not a model, and the hint."""


def check_device(device: str | None) -> torch.device:
    """Return the device of a name; raise LoraFxError if it cannot be used."""
    try:
        place = torch.device(device or "cpu")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise LoraFxError(
            f"device {device!r} cannot be used: {one_line(e, 120)}",
            "use cpu, which always works",
        ) from e
    return place
