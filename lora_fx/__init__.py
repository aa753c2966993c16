"""lora-fx: a compiler for low-rank adaptation. See README.md.

Everything is imported on first use, so that `import lora_fx` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "lora_fx.adapter.adapter": ("Adapter",),
    "lora_fx.adapter.lowrank": ("Full", "LowRank"),
    "lora_fx.adapter.origin": ("Origin",),
    "lora_fx.adapter.truncate": ("truncate",),
    "lora_fx.checkpoint.doctor": ("doctor",),
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
    "lora_fx.passes.verbs.modes": ("Batch", "Load", "Switch", "TrainStep"),
    "lora_fx.passes.verbs.open": ("capture",),
    "lora_fx.passes.verbs.plan": ("plan",),
    "lora_fx.passes.verbs.verify": ("verify",),
}
"""A module → the names that are imported from it on first use."""
__all__ = [
    "AdaptedModule",
    "Adapter",
    "Batch",
    "Captured",
    "Full",
    "Load",
    "LoraFxError",
    "LowRank",
    "Origin",
    "Switch",
    "TrainStep",
    "__version__",
    "attach",
    "capture",
    "detach",
    "doctor",
    "export",
    "extract",
    "find",
    "fold",
    "insert",
    "load_adapter",
    "load_model",
    "merge",
    "plan",
    "save_adapter",
    "truncate",
    "verify",
]

if TYPE_CHECKING:
    from lora_fx.adapter.adapter import Adapter
    from lora_fx.adapter.lowrank import Full, LowRank
    from lora_fx.adapter.origin import Origin
    from lora_fx.adapter.truncate import truncate
    from lora_fx.checkpoint.doctor import doctor
    from lora_fx.checkpoint.extract import extract
    from lora_fx.errors import LoraFxError
    from lora_fx.formats.io import load_adapter, save_adapter
    from lora_fx.fx.capture.capture import Captured
    from lora_fx.fx.load.models import load_model
    from lora_fx.fx.module.adapted import AdaptedModule
    from lora_fx.passes.verbs.adapt import find, fold, insert
    from lora_fx.passes.verbs.attach import attach, detach
    from lora_fx.passes.verbs.export import export
    from lora_fx.passes.verbs.merge import merge
    from lora_fx.passes.verbs.modes import Batch, Load, Switch, TrainStep
    from lora_fx.passes.verbs.open import capture
    from lora_fx.passes.verbs.plan import plan
    from lora_fx.passes.verbs.verify import verify


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(module), name)
    raise AttributeError(f"module 'lora_fx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
