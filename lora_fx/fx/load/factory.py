"""A user's factory: the function that builds a model and its example inputs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lora_fx.errors import (
    LoraFxError,
    near,
    near_path,
    one_line,
)
from lora_fx.fx.load.factory_imports import importable, is_reserved

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
