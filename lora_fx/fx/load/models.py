"""From what a user names on the command line to a module with example inputs.

Nothing is downloaded but what the prefix hf: names, pickles are read where they are trusted, as
tensors alone, and no code is run but the user's own factory.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.dtypes import FLOATING
from lora_fx.errors import LoraFxError, near_path, one_line, silenced
from lora_fx.files.checkpoint import PICKLES, tensors
from lora_fx.files.hub import local
from lora_fx.files.read import trusting
from lora_fx.files.safetensors import TensorInfo, stored
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.load.factory import call_factory
from lora_fx.fx.load.huggingface import load_folder
from lora_fx.fx.tensors import from_numpy
from lora_fx.text import near, some

FORMS = (
    "MODEL is a Hugging Face folder, hf:ORG/NAME, package.module:FACTORY, path/file.py:FACTORY, "
    "timm:NAME or torchvision:NAME"
)
T = TypeVar("T")
RESERVED = ("timm", "torchvision")


@dataclass(frozen=True)
class LoadedModel:
    """A module in eval mode and inputs that it can be called with.

    Attributes:
        module: The model.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        origin: What was asked for.
        notes: What has to be said: random weights, casts, code that was not run.
        tokenizer_folder: The folder that holds a tokenizer for it, if one does.
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    origin: str = ""
    notes: tuple[str, ...] = ()
    tokenizer_folder: Path | None = None


def load_model(
    spec: str | Path,
    *,
    weights: str | Path | None = None,
    meta: bool = False,
    trust: bool = False,
    device: str | None = None,
) -> LoadedModel:
    """The model that `spec` names; random weights are the same in every run.

    Args:
        spec: A Hugging Face folder, `hf:ORG/NAME[@REVISION]`, `package.module:FACTORY`,
            `path/file.py:FACTORY`, `timm:NAME` or `torchvision:NAME`. A factory takes no arguments
            and returns (module, args, kwargs).
        weights: A safetensors file (or folder); every name and shape must fit.
        meta: Weights are not needed: folders and reserved names are built on the meta device
            (then `device` has no say); a factory is called as it is.
        trust: Read pickled weights, by torch's unpickler that runs no code.
        device: Where module and inputs go, as torch names it.

    Raises:
        LoraFxError: An unknown form, a model that cannot be built, weights that do not fit.
    """
    text = str(local(spec, weights=not (meta or weights)))
    file = None if weights is None else Path(local(weights))
    place = check_device(device)
    with torch.random.fork_rng(devices=[]), trusting(trust):  # the caller's numbers are put back
        torch.default_generator.manual_seed(0)
        loaded = _load(text, file, meta)
    module = loaded.module.eval()
    if not any(p.is_meta for p in module.parameters()):
        module = module.to(place)
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: t.to("cpu" if meta else place), (loaded.args, loaded.kwargs)
    )
    return replace(loaded, module=module, args=args, kwargs=kwargs, origin=str(spec))


def _load(text: str, file: Path | None, meta: bool) -> LoadedModel:
    path = Path(text)
    library, _, name = text.partition(":")
    if library in RESERVED and name:
        return _reserved(text, library, name, file, meta)
    if text and path.is_dir():
        built = load_folder(path, file, meta=meta)
        return LoadedModel(built.module, (), built.kwargs, text, built.notes, built.tokenizer)
    if path.suffix in REFUSED:
        why, hint = REFUSED[path.suffix]
        hint = hint.format(file=text)
        raise LoraFxError(f"{text}: {why}", hint if path.exists() else near_path(text, hint))
    if path.is_file() and path.suffix != ".py":
        raise LoraFxError(f"{text}: a file of a kind that is not known", FORMS)
    if ":" in text:
        module, args, kwargs = call_factory(text)
        notes = () if file is None else read_weights(module, file)
        return LoadedModel(module, args, kwargs, text, notes)
    if path.suffix == ".py":
        raise LoraFxError(f"{text}: which factory?", f"name it: {text}:FACTORY")
    raise LoraFxError(f"{text!r} is no model: no such file or folder", near_path(text, FORMS))


_BARE = "holds tensors but no code to run them"
_BESIDE = "give the model, and the file as its weights: MODEL --weights {file}"
REFUSED = {
    ".pt2": (
        "a .pt2 file is a program without a module",
        "every verb takes its path; lora_fx.capture(path) opens it",
    ),
    ".onnx": (
        "an .onnx file cannot be opened as a torch model in this version",
        "export, merge and verify take its path; lora-fx targets and insert take it too",
    ),
    ".safetensors": (_BARE, _BESIDE),
    **dict.fromkeys(PICKLES, (_BARE, _BESIDE)),
    **dict.fromkeys((".npz", ".csv", ".jsonl"), ("data, not a model", "the model comes first")),
}
"""How a file's name ends → why it is no model, and what to do."""


# --- timm and torchvision ------------------------------------------------------------------------


def _reserved(text: str, library: str, name: str, file: Path | None, meta: bool) -> LoadedModel:
    try:
        with silenced():
            package = importlib.import_module(library)
    except ImportError as e:
        raise LoraFxError(
            f"{text}: {library} cannot be imported: {one_line(e, 120)}", f"pip install {library}"
        ) from e
    make = _timm if library == "timm" else _torchvision
    try:
        with silenced():
            module, shape = _on(meta, lambda: make(package, name))
    except LoraFxError:
        raise
    except Exception as e:  # builders raise what they like
        raise LoraFxError(
            f"{text} cannot be built: {one_line(f'{type(e).__name__}: {e}', 200)}", FORMS
        ) from e
    notes: tuple[str, ...] = ()
    if file is not None:
        notes = read_weights(module, file)
    elif not meta:
        notes = (f"random weights: {text} was built without weights (--weights FILE.safetensors)",)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return LoadedModel(module, (example,), {}, text, notes)


def _on(meta: bool, make: Callable[[], T]) -> T:
    """Build on the meta device; for real where the constructor reads values."""
    if meta:
        with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):
            return make()
    return make()


def _timm(timm: ModuleType, name: str) -> tuple[nn.Module, tuple[int, ...]]:
    plain = name.partition(".")[0]
    if ":" in name or "/" in name or not timm.is_model(plain):  # hf-hub: and the like download
        raise _no_name("timm", name, timm.list_models())
    module = timm.create_model(name, pretrained=False)
    size = (getattr(module, "default_cfg", None) or {}).get("input_size") or (3, 224, 224)
    return module, (2, *size)


def _torchvision(torchvision: ModuleType, name: str) -> tuple[nn.Module, tuple[int, ...]]:
    models = torchvision.models
    if name.lower() not in models.list_models():
        raise _no_name("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    group = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    if group in ("detection", "optical_flow", "quantization"):
        raise LoraFxError(
            f"torchvision:{name}: no example inputs are known for {group} models",
            "give file.py:FACTORY, returning (module, args, kwargs)",
        )
    known = inspect.signature(builder).parameters
    options = {"weights": None}
    if "weights_backbone" in known:  # its default downloads
        options["weights_backbone"] = None
    module = builder(**options)
    side = 299 if name == "inception_v3" else 224
    return module, (2, 3, 16, side, side) if group == "video" else (2, 3, side, side)


def _no_name(library: str, name: str, names: list[str]) -> LoraFxError:
    return LoraFxError(f"{library} has no model {name!r}", near(name, names))


# --- weights -------------------------------------------------------------------------------------


def read_weights(module: nn.Module, path: Path) -> tuple[str, ...]:
    """Fill a module from a file of tensors; every name and shape must fit. Returns notes.

    On the meta device the names and shapes are checked and nothing is read. Tied tensors need
    one of their names; counters of batches seen may be missing, as in older files.
    """
    found = tensors(path)
    state = module.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    ties = {name: first.setdefault(id(t), name) for name, t in state.items()}
    wanted = {n: (tuple(t.shape), dtype_name(t.dtype)) for n, t in state.items()}
    optional = [n for n in state if n.endswith("num_batches_tracked")]
    notes = check_fit(found, wanted, ties, str(path), optional)
    filled: dict[str, str] = {}
    for name, info in found.items():
        target = state[name]
        if target.is_meta:
            continue
        value = from_numpy(stored(info)).to(target.device, target.dtype)
        other = filled.setdefault(ties[name], name)
        if other != name and not torch.equal(value, target):
            raise LoraFxError(
                f"{path}: {other!r} and {name!r} differ, but are one tensor of the model",
                "untie them in the model, or leave one out of the file",
            )
        with torch.no_grad():
            target.copy_(value)
    return notes


# --- the ground under it -------------------------------------------------------------------------


def check_device(device: str | None) -> torch.device:
    """The device of a name, tried; LoraFxError where it cannot be used."""
    try:
        place = torch.device(device or "cpu")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise LoraFxError(
            f"device {device!r} cannot be used: {one_line(e, 120)}", "cpu is always there"
        ) from e
    return place


# Do the tensors of a file fit a model? Names and shapes, without reading a tensor.


def check_fit(
    found: Mapping[str, TensorInfo],
    wanted: Mapping[str, tuple[tuple[int, ...], str]],
    ties: Mapping[str, str],
    where: str,
    optional: Iterable[str] = (),
) -> tuple[str, ...]:
    """Check that `found` is the whole of `wanted` and nothing else.

    Args:
        found: The tensors of the file.
        wanted: Name → (shape, dtype) of the model; tied tensors under every name.
        ties: Every name → the first name of the same tensor; one of them is enough.
        where: The file, for messages.
        optional: Names that may be missing.

    Returns:
        What the dtypes will change: one note for each pair of dtypes that differ.

    Raises:
        LoraFxError: Missing and unexpected names and shapes that differ, all in one line.
    """
    here = {ties.get(name, name) for name in found}
    missing = [n for n in wanted if ties.get(n, n) not in here and n not in set(optional)]
    unexpected = [n for n in found if n not in wanted]
    shared = [(n, found[n], wanted[n]) for n in found if n in wanted]
    shapes = [
        f"{n} {list(t.shape)} (expected {list(w[0])})" for n, t, w in shared if t.shape != w[0]
    ]
    kinds = [
        f"{n} {t.dtype} (expected {w[1]})"
        for n, t, w in shared
        if t.dtype != w[1] and not (t.dtype in FLOATING and w[1] in FLOATING)
    ]
    wrong = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": shapes,
        "of another kind": kinds,
    }
    problems = [f"{len(names)} {what}: {_some(names)}" for what, names in wrong.items() if names]
    if problems:
        raise LoraFxError(
            f"{where} does not fit the model: {'; '.join(problems)}", _hint(here, wanted)
        )
    casts: dict[tuple[str, str], list[str]] = {}
    for name, t, (_, dtype) in shared:
        if t.dtype != dtype:
            casts.setdefault((t.dtype, dtype), []).append(name)
    return tuple(f"{where}: cast from {a} to {b}: {_some(n)}" for (a, b), n in casts.items())


def _some(names: list[str]) -> str:
    return some([one_line(n, 100) for n in names])


def _hint(here: set[str], wanted: Mapping[str, object]) -> str:
    """What to do, with the prefix that would make the names fit, if there is one."""
    for name in wanted:
        for other in here:
            for long, short, verb in ((name, other, "lacks"), (other, name, "adds")):
                if long != short and long.endswith(f".{short}"):
                    return f"the file's names {verb} the prefix {long.removesuffix(short)!r}"
    return "is it the state_dict of this very model?"
