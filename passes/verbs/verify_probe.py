"""verify of one file alone: the file is run on its own probe, without its model or data."""

from __future__ import annotations

from os import PathLike, fspath

from lora_fx.compare import Report
from lora_fx.errors import LoraFxError
from lora_fx.onnx.probe_runs import ProbeRuns, probe_of, run_probe
from lora_fx.probe.probe import Probe
from lora_fx.probe.sentences import findings_of, of_codes, tolerant
from lora_fx.probe.verdict import UNCHECKED_IDS
from lora_fx.text import Json

IDS_UNCHECKED = (
    "an id that names no adapter gives numbers: this runtime, or this file, does not check "
    "adapter_ids"
)


def verify_probe(
    path: str | PathLike[str],
    *,
    provider: str = "auto",
    tol: float | None = None,
    threads: int = 0,
) -> Report:
    """Run a file on its probe; `bool(report)` tells whether base and adapters are what they were.

    Args:
        path: An .onnx file.
        provider: auto, cpu, cuda or webgpu.
        tol: Accept outputs that differ by this share of the largest, where that is more than the
            file's own tolerance.
        threads: The number of threads; 0 leaves it to the runtime.

    Raises:
        LoraFxError: The file has no probe, or a damaged one, or does not run.
    """
    probe = probe_of(path)
    if tol is not None:
        probe = tolerant(probe, tol)
    runs = run_probe(path, probe, provider, threads)
    return report_on(path, probe, runs)


def report_on(
    path: str | PathLike[str], probe: Probe, runs: ProbeRuns, *, quantised: bool = False
) -> Report:
    """Make the report on the runs of a file's probe.

    Args:
        path: The file.
        probe: Its probe.
        runs: What it gave.
        quantised: Its weights are codes, of which the probe knows nothing.

    Raises:
        LoraFxError: No run could be asked.
    """
    findings = findings_of(probe, runs.answers)
    if quantised:
        findings = [of_codes(finding) for finding in findings]
    if not findings:
        raise LoraFxError(
            f"{fspath(path)}: its probe knows nothing that can be asked", "export the file again"
        )
    ids_checked = runs.ids != UNCHECKED_IDS
    warnings = [f"{name} is not verified: {why}" for name, why in runs.absent.items()]
    warnings += [f"{name} is refused: {why}" for name, why in runs.refused.items()]
    warnings += [runs.note] if runs.note else []
    warnings += [] if ids_checked else [IDS_UNCHECKED]
    details: Json = {
        "mode": probe.mode,
        "provider": runs.provider,
        "probe": {"bytes": probe.size, "facts": dict(probe.facts)},
        "verdicts": [finding.to_json() for finding in findings],
    }
    if runs.ids:
        details["ids"] = runs.ids
    ok = ids_checked and not runs.refused and all(finding.passed for finding in findings)
    return Report("verify", ok, warnings=tuple(warnings), details=details)
