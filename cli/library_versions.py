"""Versions of the libraries that are installed."""

from __future__ import annotations

import contextlib


def installed(*names: str) -> dict[str, str]:
    """{library: version} of those that are installed; nothing is imported."""
    from importlib import metadata

    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def two_runtimes() -> str:
    """A warning when onnxruntime and onnxruntime-gpu are both installed, else an empty text."""
    found = installed("onnxruntime", "onnxruntime-gpu")
    if len(found) < 2:
        return ""
    both = " and ".join(f"{name} {number}" for name, number in found.items())
    return (
        f"warning: {both} are both installed and overwrite each other's files; "
        "uninstall both, then install one"
    )
