"""Switch files in onnxruntime-web, in node and in headless Chromium.

The package is the one that samples/package-lock.json pins. web_runner.mjs runs a `Job` with the
functions that the samples of samples/runtimes have.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest

from lora_fx.dtypes import Array
from lora_fx.onnx.webgpu_faults import cpu_nodes
from tests.report.browser import PROGRAM, WEBGPU, Browser, browser
from tests.runtimes.environments import ROOT

SAMPLES = ROOT / "samples"
PACKAGE = SAMPLES / "node_modules" / "onnxruntime-web"
RUNNER = Path(__file__).parent / "web_runner.mjs"
NODE = shutil.which("node")
LIMIT = 900
"""Seconds for one job."""

needs_package = pytest.mark.skipif(not PACKAGE.is_dir(), reason="npm ci --prefix samples")
needs_node = pytest.mark.skipif(NODE is None, reason="apt install nodejs npm")
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="apt install chromium")


class Failed(NamedTuple):
    """A run that the runtime refused.

    Attributes:
        message: What it said.
    """

    message: str


Outputs = Mapping[str, Array]


@dataclass
class Job:
    """Runs of one file in one session.

    Attributes:
        model: The file.
        adapters: Files of tensors by name.
        cases: The name of an adapter, or base, and the other inputs by name.
        cpu: Nodes that WebGPU leaves to WebAssembly.
        rounds: How often runs are timed, in microseconds, and whether memory is measured; needs
            adapters a and b.
    """

    model: Path
    adapters: Mapping[str, Path]
    cases: Sequence[tuple[str, Mapping[str, Array]]]
    cpu: Sequence[str] = ()
    rounds: int = 0

    def to_json(self, provider: str, names: Mapping[Path, str]) -> dict[str, Any]:
        """What web_runner.mjs reads; files have the names that it can read."""
        return {
            "model": names[self.model],
            "provider": provider,
            "cpu": list(self.cpu),
            "adapters": {name: names[path] for name, path in self.adapters.items()},
            "cases": [
                {"adapter": adapter, "feeds": {name: numbers(x) for name, x in inputs.items()}}
                for adapter, inputs in self.cases
            ],
            "rounds": self.rounds,
        }

    @property
    def files(self) -> list[Path]:
        """All files that a run reads."""
        return [self.model, *self.adapters.values()]


@dataclass
class Results:
    """What came of a job.

    Attributes:
        error: The message of a session that could not be made, or nothing.
        cases: The outputs of each case, or its error.
        figures: Measured numbers by name, with the unit in the name.
    """

    error: str | None
    cases: Sequence[Outputs | Failed]
    figures: Mapping[str, float] = field(default_factory=dict)


def numbers(array: Array) -> dict[str, Any]:
    """An input as web_runner.mjs and the samples read it."""
    return {"type": str(array.dtype), "dims": list(array.shape), "data": array.ravel().tolist()}


def _array(stored: Mapping[str, Any]) -> Array:
    data = base64.b64decode(stored["data"])
    return np.frombuffer(data, stored["type"]).reshape(stored["dims"])


def _results(answer: Mapping[str, Any]) -> Results:
    cases: list[Outputs | Failed] = []
    for case in answer["cases"]:
        if case["error"] is not None:
            cases.append(Failed(case["error"]))
        else:
            cases.append({name: _array(stored) for name, stored in case["outputs"].items()})
    return Results(answer["error"], cases, answer["figures"])


INACCURATE = ("Cos", "Sin")
"""WGSL allows errors of 2^-11 in these, so rotary positions are right to 1e-4 only on WebGPU."""


def nodes_for_cpu(path: Path) -> list[str]:
    """The nodes of a file that WebGPU computes wrongly, or too roughly for a comparison."""
    model = onnx.load(path, load_external_data=False)
    inaccurate = [node.name for node in model.graph.node if node.op_type in INACCURATE]
    return sorted({*inaccurate, *cpu_nodes(model).names})


def version() -> str:
    """The version of the installed package."""
    found = json.loads((PACKAGE / "package.json").read_text(encoding="utf-8"))["version"]
    assert isinstance(found, str)
    return found


def node(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Run a program in node and return what it prints."""
    command = [str(NODE), "--expose-gc", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


class Node:
    """onnxruntime-web on WebAssembly in node."""

    name = "onnxruntime-web, node, WebAssembly"
    provider = "wasm"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, job: Job) -> Results:
        """The results of a job."""
        path = self._folder / "job.json"
        path.write_text(json.dumps(job.to_json("wasm", {f: str(f) for f in job.files})))
        return _results(json.loads(node(RUNNER, path)))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address at which the files of a folder are served, while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


class Chromium:
    """onnxruntime-web in headless Chromium.

    Attributes:
        name: What the table of consumers calls it.
        provider: wasm or webgpu.
        build: The file of the package that is imported.
        folder: What is served; the page of samples/runtimes lies there too.
        address: Where.
        tab: The browser.
    """

    def __init__(self, provider: str, folder: Path, address: str, tab: Browser) -> None:
        backend = {"wasm": "WebAssembly", "webgpu": "WebGPU"}[provider]
        self.name = f"onnxruntime-web, Chromium, {backend}"
        self.provider = provider
        self.build = f"ort.{provider}.bundle.min.mjs"
        self.folder, self.address, self.tab = folder, address, tab

    def serve(self, path: Path) -> str:
        """Let a file be served, and return its name there."""
        name = f"{path.parent.name}-{path.name}"
        with contextlib.suppress(FileExistsError):
            (self.folder / name).symlink_to(path)
        return name

    def run(self, job: Job) -> Results:
        """The results of a job; every job has a page of its own."""
        names = {path: self.serve(path) for path in job.files}
        (self.folder / "job.json").write_text(json.dumps(job.to_json(self.provider, names)))
        self.tab.open(f"{self.address}empty.html")
        self.tab.value(
            f"""(async () => {{
                const ort = await import('./onnxruntime-web/{self.build}');
                ort.env.wasm.numThreads = 1;
                const sample = await import('./switch.mjs');
                const {{runJob}} = await import('./web_runner.mjs');
                const read = async path =>
                    (await fetch(path, {{cache: 'no-store'}})).arrayBuffer();
                const job = await (await fetch('job.json', {{cache: 'no-store'}})).json();
                return runJob(ort, sample, read, job);
            }})().then(results => window.results = results, error => window.failed = `${{error}}`),
            null"""
        )
        deadline = time.monotonic() + LIMIT
        while not self.tab.value("'results' in window"):
            assert self.tab.value("window.failed ?? null") is None, self.tab.value("window.failed")
            assert time.monotonic() < deadline, f"{job.model}: no result"
            time.sleep(0.2)
        answer = self.tab.value("window.results")
        return _results(answer)


@contextlib.contextmanager
def chromium(provider: str, folder: Path) -> Iterator[Chromium]:
    """A browser that runs jobs on WebAssembly or on WebGPU; it ends with the block."""
    served = folder / "served"
    served.mkdir()
    (served / "empty.html").write_text('<!doctype html><link rel="icon" href="data:,">')
    (served / "onnxruntime-web").symlink_to(PACKAGE / "dist")
    for path in (RUNNER, *(SAMPLES / "runtimes").glob("*.mjs"), *SAMPLES.glob("runtimes/*.html")):
        (served / path.name).symlink_to(path)
    options = WEBGPU if provider == "webgpu" else ()
    with serving(served) as address, browser(folder / "profile", options) as tab:
        yield Chromium(provider, served, address, tab)


def first_words(message: str) -> str:
    """An error's own words, without what the runtime writes before them on every error."""
    own = message.rsplit("Status Message: ", 1)[-1].rsplit("ERROR_MESSAGE: ", 1)[-1]
    return re.sub(r"/\S+/onnxruntime/", "", own).strip()
