"""The check of one run at load: it raises where `verify` would report."""

from __future__ import annotations

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import NoEffectError, visible
from lora_fx.probe.probe import BASE, Probe
from lora_fx.probe.sentences import findings_of
from lora_fx.probe.verdict import NO_EFFECT

HINT = "run lora-fx verify FILE to see all that its probe tells; or make the session without check"


def check_run(probe: Probe, name: str | None, found: Array) -> None:
    """Raise unless a run of a file gives what its probe expects.

    An adapter that the probe does not know, made after the file, has to be finite and to change the
    outputs.

    Args:
        probe: That of the file.
        name: The adapter's; BASE for the base, None for an adapter that the probe does not know.
        found: The outputs at the points.

    Raises:
        NoEffectError: The base is another one, or the adapter is not the one of this name, or it
            has no effect.
    """
    if name is None or (name != BASE and name not in probe.adapters):
        _check_unknown(probe, name or "the adapter", found)
        return
    for finding in findings_of(probe, {name: found}):
        if not finding.passed:
            raise NoEffectError(str(finding), HINT)


def _check_unknown(probe: Probe, name: str, found: Array) -> None:
    """Raise where an adapter that the probe does not know has no effect, or is not finite."""
    if not np.isfinite(found).all():
        raise NoEffectError(visible(f"{name}: outputs are not finite (NaN or infinite)"), HINT)
    if probe.base is not None and probe.gauge().excess(found, probe.base) <= 1:
        raise NoEffectError(
            visible(f"{name}: {NO_EFFECT}: the outputs are those of the base"), HINT
        )
