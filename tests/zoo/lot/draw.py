"""What there is to draw from, and the order in which a seed draws it."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

LIBRARIES = {"transformers": 3, "timm": 2, "torchvision": 1}
"""How often each is drawn. Its families come up equally often, whatever their number of models."""


@dataclass(frozen=True)
class Drawn:
    """One architecture: a class of transformers for a model type, or a name that others list."""

    library: str
    family: str
    name: str

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"


@lru_cache(maxsize=1)
def families() -> dict[str, dict[str, list[str]]]:
    """Library → family → names."""
    import timm
    import torchvision
    from transformers.models.auto import modeling_auto

    found: dict[str, dict[str, set[str]]] = {library: {} for library in LIBRARIES}
    for mapping in (n for n in dir(modeling_auto) if n.endswith("MAPPING_NAMES")):
        if mapping.startswith("MODEL_"):
            for kind, names in getattr(modeling_auto, mapping).items():
                own = found["transformers"].setdefault(kind, set())
                own.update([names] if isinstance(names, str) else names)
    for name in timm.list_models():
        family = timm.model_entrypoint(name).__module__
        found["timm"].setdefault(family, set()).add(name)
    for name in torchvision.models.list_models():
        family = torchvision.models.get_model_builder(name).__module__
        found["torchvision"].setdefault(family, set()).add(name)
    return {lib: {f: sorted(n) for f, n in sorted(kinds.items())} for lib, kinds in found.items()}


def draws(seed: int, slot: int) -> Iterator[Drawn]:
    """What a slot of a lot draws, one after another of the same library, until one will do."""
    rng = random.Random(f"{seed}/{slot}")
    (library,) = rng.choices(list(LIBRARIES), list(LIBRARIES.values()))
    while True:
        family = rng.choice(list(families()[library]))
        yield Drawn(library, family, rng.choice(families()[library][family]))


def preload() -> None:
    """Import once what every child needs."""
    names = "onnxscript onnxruntime timm torchvision transformers lora_fx.passes.verbs.attach"
    for name in (*names.split(), "torch.onnx._internal.exporter._core"):
        importlib.import_module(name)
    families()
