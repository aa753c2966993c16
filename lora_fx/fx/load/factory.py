"""A user's factory: a function that builds a model and its example inputs."""

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

from lora_fx.errors import LoraFxError, near, near_path, one_line, type_of
from lora_fx.fx.load.factory_imports import importable, is_reserved

RETURNS = (
    "a factory returns (module, args, kwargs): the model and example inputs for one call, such as "
    "(model, (torch.randn(2, 3),), {})"
)
Result = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""The model, and positional and keyword arguments for one call."""


def call_factory(spec: str) -> Result:
    """Import and call `package.module:FACTORY` or `path/file.py:FACTORY`.

    Raises:
        LoraFxError: The code cannot be imported or raises (file and line are named), the name is
            not there, or what it returns is not a model with inputs.
    """
    with _named_by(spec) as factory:
        if isinstance(factory, nn.Module) or not callable(factory):
            raise LoraFxError(f"{spec} is {type_of(factory)}, not a factory", RETURNS)
        return _unpack(spec, _run(spec, factory))


def load_function(spec: str) -> Any:
    """Load the function `package.module:NAME` or `path/file.py:NAME`, such as a loss.

    Raises:
        LoraFxError: As call_factory; so does the function, where it raises.
    """
    with _named_by(spec) as function:
        if not callable(function):
            raise LoraFxError(
                f"{spec} is {type_of(function)}, not a function",
                "name a function, such as a loss",
            )

        @functools.wraps(function)
        def run(*args: object) -> Any:
            return _run(spec, lambda: function(*args))

        return run


def call_function(spec: str) -> object:
    """Call a function, given as in load_function, without arguments, and return its result."""
    with _named_by(spec) as function:
        return _run(spec, function)


@contextlib.contextmanager
def _named_by(spec: str) -> Iterator[Any]:
    """A block with the object that a spec names; modules of its folder are importable inside."""
    where, _, name = spec.rpartition(":")
    is_file = where.endswith(".py")
    if not name or not (is_file or re.fullmatch(r"\w+(\.\w+)*", where)):
        raise LoraFxError(
            f"{spec!r} is not the name of a factory",
            "pass package.module:FACTORY or file.py:FACTORY",
        )
    path = Path(where).absolute()
    if is_file and not path.is_file():
        raise LoraFxError(f"{where}: no such file", near_path(where))
    folder = str(path.parent if is_file else Path.cwd())
    with importable(folder):
        if is_file:
            module = _run(where, lambda: _from_file(path))
        else:
            module = _run(where, lambda: _from_name(where, folder))
        yield _attribute(module, name, where)


def _attribute(module: object, path: str, where: str) -> object:
    """Return the attribute of a module that a dotted path names.

    Raises:
        LoraFxError: The module, or what it names on the way, has no such attribute.
    """
    value = module
    for name in path.split("."):
        if not hasattr(value, name):
            public = []
            for attribute, member in vars(value).items():
                if callable(member) and attribute[0] != "_":
                    public.append(attribute)
            raise LoraFxError(
                f"{where} has no {path!r}", near(name, public, f"it has {', '.join(public[:5])}")
            )
        value = getattr(value, name)
    return value


def _from_name(name: str, folder: str) -> ModuleType:
    """Import a module by name; a reserved name in the folder is run as a file instead."""
    first, _, inner = name.partition(".")
    file = Path(folder, f"{first}.py")
    package = Path(folder, first)
    is_in_folder = file.is_file() or (package / "__init__.py").is_file()
    if not is_in_folder or not is_reserved(first, folder):
        return importlib.import_module(name)
    if file.is_file() and not inner:
        return _from_file(file)
    raise LoraFxError(
        f"{name}: {package} has the name of a module that Python or lora-fx needs",
        "rename it, or pass path/file.py:FACTORY",
    )


def _from_file(path: Path) -> ModuleType:
    """Run a file as a module with a prefixed name, so that it hides no other module."""
    name = f"lora_fx_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _run(what: str, call: Callable[[], object]) -> object:
    """Call the user's code; its error becomes one line with file name and line number."""
    try:
        return call()
    except LoraFxError:
        raise
    except (Exception, SystemExit) as e:
        text = one_line(f"{type(e).__name__}: {e}", 200)
        hint = "pass -v to print the traceback"
        if _is_missing(what, e):
            hint = "run from the folder that holds it, or pass path/file.py:FACTORY"
            hint = near(what, ("timm", "torchvision"), hint, cutoff=0.8)
        failure = f"{what} failed"
        line = _line_of(e)
        if line:
            failure += f" at {line}"
        raise LoraFxError(f"{failure}: {text}", hint) from e


def _is_missing(module: str, error: BaseException) -> bool:
    """Whether an error says that a module, or a package around it, is missing."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return False
    return f"{module}.".startswith(f"{error.name}.")


def _line_of(error: BaseException) -> str:
    """Return file:line of the innermost frame of the user's code, or an empty text."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    ours = str(Path(__file__).parent.parent) + os.sep
    stdlib = sysconfig.get_paths()["stdlib"] + os.sep
    innermost = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = frame.f_code.co_filename
        if not path.startswith(("<", ours, stdlib)) and "site-packages" not in path:
            innermost = f"{path}:{line}"
    return innermost


def _unpack(spec: str, result: object) -> Result:
    """Return the model and the example inputs from a factory's result; missing ones are empty.

    Raises:
        LoraFxError: It returned something else, or no inputs.
    """
    values: list[object] = list(result) if isinstance(result, tuple) else [result]
    kinds = ", ".join(type(value).__name__ for value in values)
    defaults: tuple[object, ...] = (None, (), {})
    values += defaults[len(values) :]
    match values:
        case [nn.Module() as module, torch.Tensor() | tuple() | list() as args, dict() as kwargs]:
            inputs = (args,) if isinstance(args, torch.Tensor) else tuple(args)
            if inputs or kwargs:
                return module, inputs, dict(kwargs)
            raise LoraFxError(f"{spec} returned no example inputs", RETURNS)
    returned = f"a {kinds}"
    if isinstance(result, tuple):
        returned = f"({kinds})"
    raise LoraFxError(f"{spec} returned {returned}", RETURNS)
