"""Versions of installed libraries."""

from __future__ import annotations

import contextlib


def installed(*names: str) -> dict[str, str]:
    """The versions of installed libraries by name; nothing is imported."""
    from importlib import metadata

    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def two_runtimes() -> str:
    """A warning when onnxruntime and onnxruntime-gpu are both installed, else an empty text."""
    runtimes = installed("onnxruntime", "onnxruntime-gpu")
    if len(runtimes) < 2:
        return ""
    names = " and ".join(f"{name} {number}" for name, number in runtimes.items())
    return (
        f"warning: {names} are both installed and overwrite each other's files; "
        "uninstall both, then install one"
    )
