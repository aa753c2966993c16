"""lora-fx probe against `transformers serve`, which gives texts alone and serves merged folders."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_fx import merge
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.probe.server import Server
from tests.fx.train import language_models
from tests.probe.test_server import adapter

for library in ("fastapi", "uvicorn", "openai", "accelerate"):
    pytest.importorskip(library, reason="pip install 'transformers[serving]'")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, adapters `one` with its probe and `two`, and each merged."""
    root = tmp_path_factory.mktemp("serve")
    language_models.folder(root / "base")
    for seed, name in enumerate(("one", "two")):
        adapter(root / name, seed)
        merge(root / "base", [root / name], root / f"merged_{name}")
    with pytest.raises(SystemExit) as end:
        main(["probe", str(root / "one"), "--base", str(root / "base"), "-o", str(root / "one")])
    assert end.value.code == 0
    return root


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    """A running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", *words, "--dtype", "float32"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                Server(address).get("/models")
                break
            except LoraFxError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "verdict"),
    [
        ("merged_one", "right in texts"),
        ("base", "no effect in texts"),
        ("merged_two", "differs"),
    ],
)
def test_what_is_served(
    model: str, verdict: str, place: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["probe", str(place / "one"), "--server", url, "--model", str(place / model)]
    with pytest.raises(SystemExit) as end:
        main([*line, "--json", "-q"])
    told = json.loads(capsys.readouterr().out)
    (row,) = told["served"]
    assert (row["verdict"], row["by"]) == (verdict, "texts")
    assert end.value.code == (0 if model == "merged_one" else 1)
