"""What the tests of load_model share."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lora_fx.errors import LoraFxError
from lora_fx.fx.load.loaded_model import LoadedModel
from lora_fx.fx.load.models import load_model
from lora_fx.passes.find import find
from lora_fx.passes.verbs.open import capture
from lora_fx.targets.found import Found

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def block_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any socket that is opened fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def net(loaded: LoadedModel) -> Any:
    """The module as what its attributes are, for mypy."""
    return loaded.module


def found(loaded: LoadedModel) -> Found:
    return find(capture(loaded.module, loaded.args, loaded.kwargs).fx_graph())


def refused(spec: str | Path, *texts: str, **options: Any) -> LoraFxError:
    with pytest.raises(LoraFxError) as caught:
        load_model(spec, **options)
    error = caught.value
    assert error.exit_code == 2 and "\n" not in error.message and error.hint
    for text in texts:
        assert text in str(error)
    return error
