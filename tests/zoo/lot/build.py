"""One drawn architecture as a small model that runs, with its example inputs."""

from __future__ import annotations

import contextlib
import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.zoo.base import Built, redraw
from tests.zoo.lot import feed
from tests.zoo.lot.draw import Drawn
from tests.zoo.lot.shrink import LEVELS, overrides, without_repeats
from tests.zoo.oracles import flat

LARGEST = 40e6
"""Parameters of a model after it was made small."""
GIANT = 1.2e9
"""Parameters that are never allocated, be it only to drop repeated blocks."""

SECONDS = 30
"""Of CPU for all the ways to make one small; what began is not interrupted."""


class Unbuilt(Exception):
    """This name has to be replaced: it cannot be made small, or no rule makes its inputs."""


def build(drawn: Drawn) -> tuple[Built, str]:
    """(module in eval mode, args, kwargs), and how it was made small.

    Raises:
        Unbuilt: With the reason.
    """
    why = "nothing was tried"
    end = time.process_time() + SECONDS
    ways = _transformers if drawn.library == "transformers" else _vision
    for make, calls, how in ways(drawn):
        if time.process_time() > end:
            raise Unbuilt(f"not small within {SECONDS} s of CPU: {why}")
        try:
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if _count(make) > GIANT:
                    why = "more than 1.2 billion parameters"
                    continue
                model = make().eval()
        except Exception as e:
            why = _text(e)
            continue
        if sum(p.numel() for p in model.parameters()) > LARGEST:
            why = "more than 40 million parameters"
            continue
        for args, kwargs in calls(model):
            try:
                _outputs(model, args, kwargs)
            except Exception as e:
                why = _text(e)
                continue
            return (_redrawn(model, args, kwargs), args, kwargs), how
    raise Unbuilt(why)


def _count(make: Callable[[], nn.Module]) -> float:
    try:
        with torch.device("meta"), contextlib.redirect_stdout(None):
            return sum(p.numel() for p in make().parameters())
    except Exception:  # some models compute with their weights when they are made
        return 0.0


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def _outputs(model: nn.Module, args: Any, kwargs: Any) -> list[np.ndarray[Any, Any]]:
    with torch.no_grad():
        torch.manual_seed(0)
        out = [x for x in flat(model(*args, **kwargs)) if x.dtype.kind == "f" and x.size]
    if not out or not all(np.isfinite(x).any() for x in out):
        raise Unbuilt("no output is a finite number")
    return out


def _redrawn(model: nn.Module, args: Any, kwargs: Any) -> nn.Module:
    """Every parameter drawn anew, unless the model's numbers leave reason then."""
    own = {k: v.clone() for k, v in model.state_dict().items()}
    redraw(model)
    try:
        sizes = [float(np.abs(x).max()) for x in _outputs(model, args, kwargs)]
        if max(sizes) < 1e4:
            return model
    except Exception:
        pass
    model.load_state_dict(own)
    return model


Way = tuple[Callable[[], nn.Module], Callable[[nn.Module], Iterator[tuple[Any, Any]]], str]


def _transformers(drawn: Drawn) -> Iterator[Way]:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if drawn.family not in CONFIG_MAPPING or not hasattr(transformers, drawn.name):
        return
    kind = getattr(transformers, drawn.name)
    wanted = getattr(kind, "config_class", None) or CONFIG_MAPPING[drawn.family]
    for level in range(LEVELS):
        try:
            base = wanted()
            config = wanted(**overrides(base, level))
        except Exception as e:
            error = e
            yield lambda error=error: _raise(error), lambda m: iter(()), ""  # type: ignore[misc]
            continue

        def calls(model: nn.Module, config: Any = config) -> Iterator[tuple[Any, Any]]:
            return (((), named) for named in feed.of_transformers(model, config))

        yield lambda config=config: kind(config), calls, f"config level {level}"  # type: ignore[misc]


def _raise(error: Exception) -> nn.Module:
    raise error


def _vision(drawn: Drawn) -> Iterator[Way]:
    if drawn.library == "timm":
        import timm

        cfg = timm.get_pretrained_cfg(drawn.name)
        own = cfg.input_size[-1] if cfg else 224

        def make(**more: Any) -> nn.Module:
            return timm.create_model(drawn.name, pretrained=False, num_classes=10, **more)

        sizes: list[tuple[dict[str, Any], tuple[int, ...]]] = [
            ({"img_size": n}, (n,)) for n in (64, 128)
        ]
        sizes += [({}, (64, 96, 128, own))]
    else:
        import torchvision

        def make(**more: Any) -> nn.Module:
            builder = torchvision.models.get_model_builder(drawn.name)
            given = {n: None for n in ("weights", "weights_backbone")}
            fields = inspect.signature(builder).parameters
            return builder(**{k: v for k, v in (given | more).items() if k in fields or k in more})

        sizes = [({"min_size": 64, "max_size": 96}, (64,)), ({}, (64, 128, 224, 299))]
    for more, sides in sizes:

        def calls(model: nn.Module, sides: tuple[int, ...] = sides) -> Iterator[tuple[Any, Any]]:
            return ((args, {}) for args in feed.of_vision(model, sides))

        how = ", ".join(f"{k}={v}" for k, v in more.items())
        yield lambda more=more: without_repeats(make(**more)), calls, f"{how} repeats dropped"  # type: ignore[misc]
        yield lambda more=more: make(**more), calls, how  # type: ignore[misc]
