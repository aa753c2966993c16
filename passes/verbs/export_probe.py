"""The probe that export puts into a file, once the file is proven."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lora_fx.adapter.adapter_hash import adapter_hash
from lora_fx.onnx.probe_runs import add_probe, size_and_precision
from lora_fx.passes.proofs.probe_making import FEWEST_GROUPS, Subject, make_probe
from lora_fx.probe.probe import NONE, Probe
from lora_fx.text import Json, some

LARGE = 1 << 30
"""The size of a file in bytes above which an adapter has few groups: each is a run of the model."""
LIBRARIES = ("lora-fx", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy")
"""The libraries whose versions a probe has."""


def probe_file(
    path: Path,
    subject: Subject,
    kind: str,
    provider: str,
    warnings: list[str],
    add: Callable[[Path, Probe], None] = add_probe,
) -> Json:
    """Make the probe of a proven file and put it into the file.

    Args:
        path: The file, which has no name yet.
        subject: The file, as a probe is made of it.
        kind: full, short or none.
        provider: Where the file was proven.
        warnings: Gets what the probe does not show.
        add: Puts it into a file of this kind.

    Returns:
        The field `probe` of the report.
    """
    if kind == NONE:
        return {}
    invoked = [name for name, adapter in subject.adapters.items() if adapter.invocation]
    if invoked:
        warnings.append(
            f"no probe: an aLoRA ({some(invoked)}) acts from its invocation tokens on, and a probe "
            "has one input for the base and all adapters"
        )
        return {}
    if add is add_probe:
        subject = _as_written(subject, path)
    probe, notes = make_probe(subject, kind, facts_of(subject, provider))
    warnings += notes
    if probe is None:
        return {}
    add(path, probe)
    return {"probe": summary(probe)}


def _as_written(subject: Subject, path: Path) -> Subject:
    """Return the subject with the precision of an .onnx file, and few groups for a large one."""
    size, precision = size_and_precision(path)
    if subject.precision == "float32":
        subject = replace(subject, precision=precision)
    if size > LARGE:
        subject = replace(subject, most_groups=FEWEST_GROUPS)
    return subject


def summary(probe: Probe) -> Json:
    """Return a probe's size, and the effect of each adapter on its input."""
    effects = {name: float(f"{probe.effect(name):.4g}") for name in probe.adapters}
    groups = {name: len(adapter.groups) for name, adapter in probe.adapters.items()}
    return {"bytes": probe.size, "effects": effects, "groups": groups}


def facts_of(subject: Subject, provider: str) -> Json:
    """Return what a probe says for people: versions, processor, provider, and hashes."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    hashes = {name: adapter_hash(adapter) for name, adapter in subject.adapters.items()}
    return {
        "base": dict(subject.base),
        "versions": versions,
        "processor": processor(),
        "provider": provider,
        "adapters": hashes,
    }


def processor() -> str:
    """Return the name of the processor, or at least of its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # another system than Linux
    return platform.processor() or platform.machine()
