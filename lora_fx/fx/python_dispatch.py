"""Operators as torch dispatches them: a facade of torch's dispatch modes.

A `TorchDispatchMode` of our own sees each operator that runs.
Tried with torch 2.13 and 2.15.
"""

from __future__ import annotations

from torch._dispatch.python import enable_python_dispatcher
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TorchDispatchMode", "enable_python_dispatcher"]
