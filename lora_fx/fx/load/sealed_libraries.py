"""A block in which the libraries that build models can open only some folders."""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lora_fx.files.sealed import HUB_CLIENT, TORCH_LOAD, sealed
from lora_fx.patching import patched


@contextlib.contextmanager
def sealed_libraries(what: str, *folders: Path) -> Iterator[None]:
    """A block in which libraries can open only files of some folders; see `sealed`.

    torch.load is refused in it too. So is a client of the Hub, which reads the certificates of the
    machine as it is made, before it connects.

    Args:
        what: What is built, as the subject of a sentence.
        folders: Those whose files may be opened.
    """
    tempfile.gettempdir()  # Python finds it by writing a file: importing torch._dynamo asks for it
    with sealed(what, *folders), _audited_calls():
        yield


_patches = contextlib.ExitStack()


_patches_lock = threading.Lock()


_blocks = [0]
"""The number of active `_audited_calls` blocks, in a list; threads may overlap."""


@contextlib.contextmanager
def _audited_calls() -> Iterator[None]:
    """A block in which torch.load and new Hub clients raise an audit event first, in any thread."""
    with _patches_lock:
        if not _blocks[0]:
            load = _audited(torch.load, TORCH_LOAD)
            _patches.enter_context(patched(torch, load=load))
            _patches.enter_context(patched(torch.serialization, load=load))
            # whatever builds a model of transformers or timm has imported it
            http = sys.modules.get("huggingface_hub.utils._http")
            if http:
                names = vars(http)
                make_client = names["_GLOBAL_CLIENT_FACTORY"]
                client = _audited(make_client, HUB_CLIENT, names["constants"].ENDPOINT)
                _patches.enter_context(patched(http, _GLOBAL_CLIENT_FACTORY=client))
        _blocks[0] += 1
    try:
        yield
    finally:
        with _patches_lock:
            _blocks[0] -= 1
            if not _blocks[0]:
                _patches.close()


def _audited(plain: Callable[..., Any], event: str, *details: str) -> Callable[..., Any]:
    """Return a function that raises an audit event and then calls another function."""

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        sys.audit(event, *details)
        return plain(*args, **kwargs)

    return call
