"""The command line: one command a file; each parses, calls the library and prints.

Nothing heavy is imported here, so that `lora-fx --help` is instant.
"""

from __future__ import annotations

from lora_fx.cli.common import main

__all__ = ["main"]
