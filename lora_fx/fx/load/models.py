"""From what a user names on the command line to a module with example inputs.

Nothing is downloaded but what the prefix hf: names, pickles are read where they are trusted, as
tensors alone, and no code is run but the user's own factory.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from lora_fx.dtypes import FLOATING
from lora_fx.errors import (
    LoraFxError,
    importing,
    lead_between,
    near,
    near_path,
    one_line,
    retold,
    silenced,
)
from lora_fx.files.checkpoint import PICKLES, tensors
from lora_fx.files.hub import local
from lora_fx.files.read import trusting
from lora_fx.files.safetensors import TensorInfo
from lora_fx.files.stored_tensors import stored
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.load.beside import importable, is_reserved
from lora_fx.fx.load.config_gate import sealed_libraries
from lora_fx.fx.load.huggingface import LoadedModel, load_folder
from lora_fx.fx.tensors import from_numpy
from lora_fx.fx.trees import tree_map_only
from lora_fx.text import some

FORMS = (
    "MODEL is a Hugging Face folder, hf:ORG/NAME, package.module:FACTORY, path/file.py:FACTORY, "
    "timm:NAME or torchvision:NAME"
)
T = TypeVar("T")
RESERVED = ("timm", "torchvision")


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
    args, kwargs = tree_map_only(
        torch.Tensor, lambda t: t.to("cpu" if meta else place), (loaded.args, loaded.kwargs)
    )
    return replace(loaded, module=module, args=args, kwargs=kwargs, origin=str(spec))


def _load(text: str, file: Path | None, meta: bool) -> LoadedModel:
    path = Path(text)
    library, _, name = text.partition(":")
    if library in RESERVED and name:
        return _reserved(text, library, name, file, meta)
    if text and path.is_dir():
        return load_folder(path, file, meta=meta)
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
    with importing(f"{text}: {library}", f"pip install {library}"), silenced():
        package = importlib.import_module(library)
    make = _timm if library == "timm" else _torchvision
    told = retold(f"{text} cannot be built", FORMS, most=200, named=True)
    with told, silenced(), sealed_libraries(f"{text}: building it"):
        module, shape = _on(meta, lambda: make(package, name))
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
        raise LoraFxError(f"timm has no model {name!r}", near(name, timm.list_models()))
    module = timm.create_model(name, pretrained=False)
    size = (getattr(module, "default_cfg", None) or {}).get("input_size") or (3, 224, 224)
    return module, (2, *size)


def _torchvision(torchvision: ModuleType, name: str) -> tuple[nn.Module, tuple[int, ...]]:
    models = torchvision.models
    if name.lower() not in models.list_models():
        raise LoraFxError(f"torchvision has no model {name!r}", near(name, models.list_models()))
    builder = models.get_model_builder(name)
    group = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    if group in ("detection", "optical_flow", "quantization"):
        raise LoraFxError(
            f"torchvision:{name}: no example inputs are known for {group} models",
            "give file.py:FACTORY, returning (module, args, kwargs)",
        )
    known = inspect.signature(builder).parameters
    # the default of a backbone downloads
    module = builder(**{n: None for n in ("weights", "weights_backbone") if n in known})
    side = 299 if name == "inception_v3" else 224
    return module, (2, 3, 16, side, side) if group == "video" else (2, 3, side, side)


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
    wrong: dict[str, list[str]] = {"missing": missing, "unexpected": unexpected}
    wrong |= {"of another shape": [], "of another kind": []}
    casts: dict[tuple[str, str], list[str]] = {}
    for name in (n for n in found if n in wanted):
        t, (shape, dtype) = found[name], wanted[name]
        if t.shape != shape:
            said = f"{name} {list(t.shape)} (expected {list(shape)})"
            wrong["of another shape"].append(said)
        if t.dtype != dtype:
            casts.setdefault((t.dtype, dtype), []).append(name)
            if not {t.dtype, dtype} <= {*FLOATING}:
                said = f"{name} {t.dtype} (expected {dtype})"
                wrong["of another kind"].append(said)
    problems = [f"{len(names)} {what}: {_some(names)}" for what, names in wrong.items() if names]
    if problems:
        raise LoraFxError(
            f"{where} does not fit the model: {'; '.join(problems)}", _hint(here, wanted)
        )
    return tuple(f"{where}: cast from {a} to {b}: {_some(n)}" for (a, b), n in casts.items())


def _some(names: list[str]) -> str:
    return some([one_line(n, 100) for n in names])


def _hint(here: set[str], wanted: Mapping[str, object]) -> str:
    """What to do, with the prefix that would make the names fit, if there is one."""
    verb, lead = lead_between(wanted, here)
    said = f"the file's names {verb} the prefix {lead!r}"
    return said if verb else "is it the state_dict of this very model?"


# A user's factory: the function that builds a model and its example inputs.


RETURNS = (
    "a factory returns (module, args, kwargs): the model and example inputs for one call, such as "
    "(model, (torch.randn(2, 3),), {})"
)
Result = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def call_factory(spec: str) -> Result:
    """Import and call `package.module:FACTORY` or `path/file.py:FACTORY`.

    Raises:
        LoraFxError: The code cannot be imported or raises (file and line are named), the name is
            not there, or what it returns is not a model with inputs.
    """
    with _found(spec) as factory:
        if isinstance(factory, nn.Module) or not callable(factory):
            raise LoraFxError(f"{spec} is a {type(factory).__name__}, not a factory", RETURNS)
        return _unpack(spec, _run(spec, factory))


def load_function(spec: str) -> Any:
    """The function of `package.module:NAME` or `path/file.py:NAME`, such as a loss.

    Raises:
        LoraFxError: As call_factory; so does the function, where it raises.
    """
    with _found(spec) as function:
        if not callable(function):
            raise LoraFxError(f"{spec} is a {type(function).__name__}, not a function", "name one")

        @functools.wraps(function)
        def run(*args: object) -> Any:
            return _run(spec, lambda: function(*args))

        return run


def call_function(spec: str) -> object:
    """What such a function returns when it is called without arguments."""
    with _found(spec) as function:
        return _run(spec, function)


@contextlib.contextmanager
def _found(spec: str) -> Iterator[Any]:
    """What a spec names, with its folder importable while the block runs."""
    where, _, name = spec.rpartition(":")
    is_file = where.endswith(".py")
    if not name or not (is_file or re.fullmatch(r"\w+(\.\w+)*", where)):
        raise LoraFxError(f"{spec!r} names no factory", "package.module:FACTORY or file.py:FACTORY")
    path = Path(where).absolute()
    if is_file and not path.is_file():
        raise LoraFxError(f"{where}: no such file", near_path(where))
    folder = str(path.parent if is_file else Path.cwd())
    with importable(folder):
        found: object = _run(
            where, lambda: _from_file(path) if is_file else _from_name(where, folder)
        )
        for part in name.split("."):
            if not hasattr(found, part):
                names = [n for n, v in vars(found).items() if callable(v) and n[0] != "_"]
                raise LoraFxError(
                    f"{where} has no {name!r}", near(part, names, f"it has {', '.join(names[:5])}")
                )
            found = getattr(found, part)
        yield found


def _from_name(name: str, folder: str) -> ModuleType:
    """Import a module; one of the folder with a reserved name under another, as a file."""
    first, _, inner = name.partition(".")
    file, package = Path(folder, f"{first}.py"), Path(folder, first)
    there = file.is_file() or (package / "__init__.py").is_file()
    if not there or not is_reserved(first, folder):
        return importlib.import_module(name)
    if file.is_file() and not inner:
        return _from_file(file)
    raise LoraFxError(
        f"{name}: {package} has the name of a module that Python or lora-fx needs",
        "give it another name, or give path/file.py:FACTORY",
    )


def _from_file(path: Path) -> ModuleType:
    """Run a file as a module of its own name under a prefix, so that it shadows no other."""
    name = f"lora_fx_user_{path.stem}"
    made = importlib.util.spec_from_file_location(name, path)
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        made.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _run(what: str, call: Callable[[], object]) -> object:
    """Call the user's code; what it raises becomes one line with file and line."""
    try:
        return call()
    except LoraFxError:
        raise
    except (Exception, SystemExit) as e:
        text = one_line(f"{type(e).__name__}: {e}", 200)
        hint = "-v prints the traceback"
        if isinstance(e, ModuleNotFoundError) and e.name and f"{what}.".startswith(f"{e.name}."):
            hint = "run from the folder that holds it, or give path/file.py:FACTORY"
            hint = near(what, ("timm", "torchvision"), hint, cutoff=0.8)
        place = _line_of(e)
        raise LoraFxError(f"{what} failed{f' at {place}' if place else ''}: {text}", hint) from e


def _line_of(error: BaseException) -> str:
    """file:line of the innermost frame of the user's own code, or an empty text."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    ours = str(Path(__file__).parent.parent) + os.sep
    stdlib = sysconfig.get_paths()["stdlib"] + os.sep
    inner = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = frame.f_code.co_filename
        if not path.startswith(("<", ours, stdlib)) and "site-packages" not in path:
            inner = f"{path}:{line}"
    return inner


def _unpack(spec: str, result: object) -> Result:
    parts: list[object] = list(result) if isinstance(result, tuple) else [result]
    kinds = ", ".join(type(part).__name__ for part in parts)
    parts += (None, (), {})[len(parts) :]  # what is left out is empty
    match parts:
        case [nn.Module() as module, torch.Tensor() | tuple() | list() as args, dict() as kwargs]:
            given = (args,) if isinstance(args, torch.Tensor) else tuple(args)
            if given or kwargs:
                return module, given, dict(kwargs)
            raise LoraFxError(f"{spec} returned no example inputs", RETURNS)
    found = f"({kinds})" if isinstance(result, tuple) else f"a {kinds}"
    raise LoraFxError(f"{spec} returned {found}", RETURNS)
