"""lora-fx: a compiler for low-rank adaptation. See README.md.

Everything is imported on first use, so that `import lora_fx` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "lora_fx.adapter.adapter": ("Adapter",),
    "lora_fx.adapter.lowrank": ("Full", "LowRank"),
    "lora_fx.adapter.truncate": ("truncate",),
    "lora_fx.checkpoint.doctor.doctor": ("doctor",),
    "lora_fx.checkpoint.extract": ("extract",),
    "lora_fx.errors": ("LoraFxError",),
    "lora_fx.formats.io": ("load_adapter", "save_adapter"),
    "lora_fx.fx.capture.capture": ("Captured",),
    "lora_fx.fx.load.models": ("load_model",),
    "lora_fx.fx.module.adapted": ("AdaptedModule",),
    "lora_fx.passes.verbs.adapt": ("find", "fold", "insert"),
    "lora_fx.passes.verbs.attach": ("attach", "detach"),
    "lora_fx.passes.verbs.export": ("export",),
    "lora_fx.passes.verbs.merge": ("merge",),
    "lora_fx.passes.verbs.open": ("capture",),
    "lora_fx.passes.verbs.plan": ("plan",),
    "lora_fx.passes.verbs.verify": ("verify",),
}
"""Module → the names that are imported from it on first use."""
_PUBLIC = sorted(["__version__", *(n for names in _NAMES.values() for n in names)])

if TYPE_CHECKING:  # the same names, for whoever reads types
    from lora_fx.adapter.adapter import Adapter as Adapter
    from lora_fx.adapter.lowrank import Full as Full
    from lora_fx.adapter.lowrank import LowRank as LowRank
    from lora_fx.adapter.truncate import truncate as truncate
    from lora_fx.checkpoint.doctor.doctor import doctor as doctor
    from lora_fx.checkpoint.extract import extract as extract
    from lora_fx.errors import LoraFxError as LoraFxError
    from lora_fx.formats.io import load_adapter as load_adapter
    from lora_fx.formats.io import save_adapter as save_adapter
    from lora_fx.fx.capture.capture import Captured as Captured
    from lora_fx.fx.load.models import load_model as load_model
    from lora_fx.fx.module.adapted import AdaptedModule as AdaptedModule
    from lora_fx.passes.verbs.adapt import find as find
    from lora_fx.passes.verbs.adapt import fold as fold
    from lora_fx.passes.verbs.adapt import insert as insert
    from lora_fx.passes.verbs.attach import attach as attach
    from lora_fx.passes.verbs.attach import detach as detach
    from lora_fx.passes.verbs.export import export as export
    from lora_fx.passes.verbs.merge import merge as merge
    from lora_fx.passes.verbs.open import capture as capture
    from lora_fx.passes.verbs.plan import plan as plan
    from lora_fx.passes.verbs.verify import verify as verify
else:
    __all__ = _PUBLIC


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(module), name)
    raise AttributeError(f"module 'lora_fx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
