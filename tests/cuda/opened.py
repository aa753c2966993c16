"""Print what happens to each way of opening a session on a file, as JSON.

Tests start this as a script in a child process that sees the stand-in:
`python tests/cuda/opened.py FILE`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial

import lora_fx
from lora_fx.onnx import Session
from lora_fx.onnx.cuda_device import driver_present
from lora_fx.onnx.session import open_session


def main(path: str) -> None:
    results = {"driver": str(driver_present())}
    openings: dict[str, Callable[..., object]] = {"open_session": open_session, "Session": Session}
    for provider in ("auto", "cuda", "cpu"):
        for name, opening in openings.items():
            results[f"{name} {provider}"] = result_of(partial(opening, path, provider=provider))
    print(json.dumps(results))


def result_of(opening: partial[object]) -> str:
    """The message of an error, or "opened"."""
    try:
        opening()
    except lora_fx.LoraFxError as error:
        return error.message
    return "opened"


if __name__ == "__main__":
    main(sys.argv[1])
