"""Load models of timm and torchvision by name, with random weights or weights from a file."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
from torch import nn

from lora_fx.errors import LoraFxError, importing, near, retold, silenced
from lora_fx.fx.load.loaded_model import FORMS, LoadedModel
from lora_fx.fx.load.sealed_libraries import sealed_libraries
from lora_fx.fx.load.weights_file import read_weights

V = TypeVar("V")
RESERVED = ("timm", "torchvision")


def library_model(text: str, library: str, name: str, file: Path | None, meta: bool) -> LoadedModel:
    """A model of timm or torchvision, with the weights of a file or random ones.

    Args:
        text: What the user named, for messages.
        library: timm or torchvision.
        name: The library's name of the model.
        file: Its weights; None for random ones.
        meta: Build on the meta device where the constructor can.
    """
    with importing(f"{text}: {library}", f"pip install {library}"), silenced():
        package = importlib.import_module(library)
    make = _timm if library == "timm" else _torchvision
    errors = retold(f"{text} cannot be built", FORMS, most=200, named=True)
    with errors, silenced(), sealed_libraries(f"{text}: building it"):
        module, shape = _build(lambda: make(package, name), meta)
    notes: tuple[str, ...] = ()
    if file is not None:
        notes = read_weights(module, file)
    elif not meta:
        notes = (
            (
                f"random weights: {text} was built without weights; give them with --weights "
                "FILE.safetensors"
            ),
        )
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return LoadedModel(module, (example,), {}, text, notes)


def _build(make: Callable[[], V], meta: bool) -> V:
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
    config = getattr(module, "default_cfg", None) or {}
    size = config.get("input_size") or (3, 224, 224)
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
            "give file.py:FACTORY, which returns (module, args, kwargs)",
        )
    options = inspect.signature(builder).parameters
    # the default of a backbone downloads
    no_weights = [option for option in ("weights", "weights_backbone") if option in options]
    module = builder(**dict.fromkeys(no_weights))
    side = 299 if name == "inception_v3" else 224
    if group == "video":
        return module, (2, 3, 16, side, side)
    return module, (2, 3, side, side)
