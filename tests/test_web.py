"""samples/web in headless Chromium: what its page trains is what Python trains.

Once in a browser without WebGPU, and once in one that computes it on the CPU. Slow, and skipped
where there is no chromium or no `npm ci --prefix samples`.
"""

from __future__ import annotations

import functools
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import lora_fx
from lora_fx.dtypes import Array
from lora_fx.onnx import Session, TrainSession
from tests.axe import SCRIPT, findings
from tests.report.browser import PROGRAM, WAIT, WEBGPU, Browser, browser
from tests.report.test_browser import CONTRAST

WEB = Path(__file__).resolve().parent.parent / "samples" / "web"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no chromium is installed"),
    pytest.mark.skipif(
        not (WEB.parent / "node_modules" / "onnxruntime-web").is_dir(),
        reason="npm ci --prefix samples",
    ),
]

STEPS, RATE, SHOWN = 30, 0.01, 300
LETTERS = {
    "A": [[(20, 90), (50, 10), (80, 90)], [(32, 60), (68, 60)]],
    "B": [[(30, 10), (30, 90), (60, 88), (72, 70), (55, 50), (30, 48), (65, 28), (30, 10)]],
    "C": [[(75, 25), (55, 10), (35, 20), (25, 50), (35, 80), (55, 90), (75, 75)]],
}
"""Strokes of the new classes, in hundredths of the canvas."""
STEMS = ("A", "B", "C", "A", "B", "C", "C")
"""What is drawn, each time a little otherwise."""
PIXELS = "import('./app.js').then(m => m.state.examples.map(e => [...e.pixels]))"
BATCH = (
    "import('./app.js').then(m => m.batch())"
    ".then(b => [[...b.input.data], [...b.labels.data].map(Number)])"
)
ADAPTER = (
    "import('./app.js').then(m => Object.fromEntries(Object.entries(m.state.yours)"
    ".map(([n, t]) => [n, [t.dims, [...t.data]]])))"
)
PREDICTED = (
    "import('./app.js').then(m => m.predict(m.state.examples.map(e => e.pixels), m.state.{}))"
)


READY = {
    "wasm": "Ready. This browser has no WebGPU: all runs on WebAssembly.",
    "webgpu": "Ready. The network runs on WebGPU, and its training on WebAssembly.",
}
"""What the page says when it is loaded, by the provider of its network."""


class Served(NamedTuple):
    provider: str
    folder: Path
    address: str
    tab: Browser
    downloads: Path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def wait(tab: Browser, condition: str) -> None:
    deadline = time.monotonic() + WAIT
    while not tab.value(condition):
        said = tab.value("document.getElementById('status').textContent")
        assert time.monotonic() < deadline, (condition, said, tab.errors)
        time.sleep(0.05)


def click(tab: Browser, selector: str) -> None:
    wait(tab, f"!document.querySelector({selector!r}).disabled")
    tab.value(f"document.querySelector({selector!r}).click()")


def draw(tab: Browser, letter: str, time_: int) -> None:
    """With the mouse, and added as an example of its class."""
    tab.value("document.getElementById('pad').scrollIntoView()")
    left, top, width = tab.value(
        "(r => [r.x, r.y, r.width])(document.getElementById('pad').getBoundingClientRect())"
    )
    rng = np.random.default_rng(time_)
    for stroke in LETTERS[letter]:
        points = np.array(stroke) + rng.uniform(-4, 4, (len(stroke), 2))
        tab.drag([(left + width * x / 100, top + width * y / 100) for x, y in points.tolist()])
    click(tab, f"#classes [value='{10 + 'ABC'.index(letter)}']")
    click(tab, "#add")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the page, built."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(WEB / "build.py"), str(folder)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.count("export: ok") == 2, done.stderr
    return folder


@pytest.fixture(scope="module", params=READY)
def served(
    site: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Served]:
    """The page, opened, and trained on what was drawn."""
    provider: str = request.param
    downloads = tmp_path_factory.mktemp("downloads")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    options = WEBGPU if provider == "webgpu" else ()
    with browser(tmp_path_factory.mktemp("profile"), options) as tab:
        tab.download_to(downloads)
        tab.open(address)
        wait(tab, f"document.getElementById('status').textContent === {READY[provider]!r}")
        for i, letter in enumerate(STEMS):
            draw(tab, letter, i)
            wait(tab, f"document.querySelectorAll('#examples li').length === {i + 1}")
        tab.value(f"document.getElementById('steps').value = {STEPS}")
        click(tab, "#train")
        wait(tab, "!document.getElementById('save').disabled")
        yield Served(provider, site, address, tab, downloads)
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def trained(served: Served) -> tuple[TrainSession, list[float]]:
    """Python's own loop, from the same start on the page's batch."""
    pixels, labels = served.tab.value(BATCH)
    batch = {
        "input": np.array(pixels, np.float32).reshape(-1, 1, 8, 8),
        "labels": np.array(labels, np.int64),
    }
    session = TrainSession(served.folder / "step.onnx", lr=RATE, provider="cpu", threads=1)
    return session, [session.step(batch) for _ in range(STEPS)]


@pytest.fixture(scope="module")
def examples(served: Served) -> Array:
    return np.array(served.tab.value(PIXELS), np.float32).reshape(-1, 1, 8, 8)


def chances(scores: Array) -> Array:
    powers = np.exp(scores.astype(np.float64) - scores.max(1, keepdims=True))
    result: Array = powers / powers.sum(1, keepdims=True)
    return result


def forward(served: Served, feeds: dict[str, Array]) -> Array:
    """Chances by plain ONNX Runtime, A and B among the feeds."""
    session = ort.InferenceSession(
        served.folder / "forward.onnx", providers=["CPUExecutionProvider"]
    )
    return chances(session.run(None, feeds)[0])


def parameters(path: Path) -> dict[str, Array]:
    found = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    return {name: value.numpy().copy() for name, value in found.items()}


def downloaded(served: Served, button: str, name: str) -> Path:
    path = served.downloads / name
    click(served.tab, button)
    deadline = time.monotonic() + WAIT
    while not path.exists():
        assert time.monotonic() < deadline, list(served.downloads.iterdir())
        time.sleep(0.05)
    return path


def test_the_batch_is_what_was_drawn(served: Served, examples: Array) -> None:
    """A moved image is numpy's roll where no ink is at the edge that leaves."""
    pixels, labels = served.tab.value(BATCH)
    own = np.array(pixels[SHOWN * 64 :], np.float32).reshape(-1, 5, 8, 8)
    assert len(own) == len(STEMS) == len(np.unique(examples, axis=0))
    assert labels[SHOWN:] == [10 + "ABC".index(c) for c in STEMS for _ in range(5)]
    assert ((examples >= 0) & (examples <= 1)).all() and (examples.sum((1, 2, 3)) > 5).all()
    padded = np.pad(examples[:, 0], ((0, 0), (1, 1), (1, 1)))
    for k, (down, right) in enumerate([(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)]):
        wanted = padded[:, 1 - down : 9 - down, 1 - right : 9 - right]
        np.testing.assert_array_equal(own[:, k], wanted)


PROOF = "document.getElementById('proof').textContent"


def test_the_network_is_what_it_was(served: Served) -> None:
    """By the probe in its file, on the provider that runs it."""
    told = served.tab.value(PROOF)
    assert told == "The network computes here what it did when its file was written."


@pytest.mark.parametrize(
    ("properties", "told"),
    [
        (True, "The network does not compute here what it did when its file was written: "),
        (False, "The network cannot be checked here: the file has no probe"),
    ],
)
def test_another_network_is_told(properties: bool, told: str, site: Path, tmp_path: Path) -> None:
    """One whose weights have changed, and one without a probe."""
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    model = onnx.load(folder / "forward.onnx")
    weight = max(model.graph.initializer, key=lambda tensor: math.prod(tensor.dims))
    weight.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(weight), weight.name))
    if not properties:
        del model.metadata_props[:]
    onnx.save(model, folder / "forward.onnx")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with browser(tmp_path / "profile") as tab:
        tab.open(f"http://127.0.0.1:{server.server_port}/")
        wait(tab, f"document.getElementById('status').textContent === {READY['wasm']!r}")
        assert tab.value(PROOF).startswith(told)
    server.shutdown()
    server.server_close()


def test_losses_are_pythons(served: Served, trained: tuple[TrainSession, list[float]]) -> None:
    losses = served.tab.value("import('./app.js').then(m => m.state.losses)")
    assert len(losses) == STEPS and losses[-1] < 0.5 * losses[0]
    np.testing.assert_allclose(losses, trained[1], rtol=1e-4)


def test_predictions_are_pythons(
    served: Served, trained: tuple[TrainSession, list[float]], examples: Array
) -> None:
    """Before and after, on every example; what the page shows is what they say."""
    start = parameters(served.folder / "step.onnx_adapter")
    slots = trained[0].manifest.tensors(trained[0].adapter())
    before, after = (forward(served, {"input": examples, **x}) for x in (start, slots))
    for name, wanted in (("base", before), ("yours", after)):
        found = np.array(served.tab.value(PREDICTED.format(name)))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert np.abs(after - before).max() > 0.5
    truth = np.array([10 + "ABC".index(c) for c in STEMS])
    right = int((after.argmax(1) == truth).sum())
    assert served.tab.value("document.getElementById('own-yours').textContent") == (
        f"{right} of {len(truth)}"
    )
    assert right > len(truth) / 2 and not (before.argmax(1) == truth).any()
    said = served.tab.value(
        "[...document.querySelectorAll('#examples p span:nth-child(2)')].map(e => e.textContent)"
    )
    rows = np.stack([before.argmax(1), after.argmax(1)], 1).reshape(-1)
    assert [s.split()[1] for s in said] == ["0123456789ABC"[i] for i in rows]


def test_the_reading_follows_the_switch(served: Served) -> None:
    """What is on the canvas is read by the adapter that is switched on."""
    first = "document.querySelector('#reading span').textContent"
    draw(served.tab, "A", 0)  # an example more, removed again; what it leaves is an empty canvas
    shown = "document.querySelectorAll('#examples li').length === {}".format
    wait(served.tab, shown(len(STEMS) + 1))
    click(served.tab, "#examples li:last-child button")
    wait(served.tab, shown(len(STEMS)))
    wait(served.tab, f"{first} === '–'")
    left, top, width = served.tab.value(
        "(r => [r.x, r.y, r.width])(document.getElementById('pad').getBoundingClientRect())"
    )
    for stroke in LETTERS["A"]:
        served.tab.drag([(left + width * x / 100, top + width * y / 100) for x, y in stroke])
    wait(served.tab, f"{first} === 'A'")
    click(served.tab, "#adapters [value=base]")
    wait(served.tab, f"'0123456789'.includes({first})")
    click(served.tab, "#adapters [value=yours]")
    wait(served.tab, f"{first} === 'A'")
    click(served.tab, "#clear")


def test_the_adapter_is_read_by_python(
    served: Served, trained: tuple[TrainSession, list[float]]
) -> None:
    """Bit by bit what the page holds, and what Python's loop gives."""
    adapter = lora_fx.load_adapter(downloaded(served, "#save", "adapter.onnx_adapter"))
    held = {
        n: np.array(x, np.float32).reshape(d) for n, (d, x) in served.tab.value(ADAPTER).items()
    }
    own = trained[0].adapter()
    assert {f"{key}.lora_{half}" for key in adapter.lowrank for half in "AB"} == set(held)
    for key, low in adapter.lowrank.items():
        assert low.scale == 1.0
        np.testing.assert_array_equal(low.a, held[f"{key}.lora_A"].T)
        np.testing.assert_array_equal(low.b, held[f"{key}.lora_B"].T)
        wanted = own.lowrank[key]  # 30 steps on, 1e-6 apart: two builds of the runtime
        np.testing.assert_allclose(low.a, wanted.a, rtol=0, atol=5e-6)
        np.testing.assert_allclose(low.b, wanted.scale * wanted.b, rtol=0, atol=5e-6)


def test_the_served_file_is_read_by_the_runtime(served: Served, examples: Array) -> None:
    path = downloaded(served, "#serve", "served.onnx_adapter")
    session = Session(served.folder / "step.switch.onnx", provider="cpu")
    session.load("yours", path)
    (scores,) = session.run({"input": examples}, adapter="yours").values()
    wanted = np.array(served.tab.value(PREDICTED.format("yours")))
    np.testing.assert_allclose(chances(scores), wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        forward(served, {"input": examples, **parameters(path)}), wanted, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("width", [500, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_readable(served: Served, width: int, dark: bool) -> None:
    served.tab.look(width=width, dark=dark)
    wait(served.tab, f"matchMedia('(prefers-color-scheme: {'dark' if dark else 'light'})').matches")
    time.sleep(0.3)
    assert served.tab.value("document.documentElement.scrollWidth") == width
    pale = [t["text"] for t in served.tab.value(CONTRAST) if t["ratio"] < 4.5]
    assert pale == ["None yet. Three or four of each class are enough."]  # hidden, no longer true


@pytest.mark.skipif(not SCRIPT.is_file(), reason="npm ci --prefix samples")
def test_axe_has_no_findings(served: Served) -> None:
    """With examples, a curve and an adapter on the page."""
    for width in (1280, 500):
        for dark in (False, True):
            served.tab.look(width=width, dark=dark)
            assert findings(served.tab) == [], (width, dark)


FOCUSED = "(e => e.id || e.getAttribute('aria-label') || e.name)(document.activeElement)"


def tab_to(tab: Browser, name: str) -> None:
    """Press Tab until an element has the focus."""
    passed: list[str] = []
    while (focused := tab.value(FOCUSED)) != name:
        assert len(passed) < 20, passed
        passed.append(focused)
        tab.press("Tab")


def test_the_keyboard_alone_teaches(site: Path, tmp_path: Path) -> None:
    """Draw two letters, name one's class, train, switch and remove, without a pointer."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with browser(tmp_path / "profile") as tab:
        tab.open(f"http://127.0.0.1:{server.server_port}/")
        wait(tab, f"document.getElementById('status').textContent === {READY['wasm']!r}")
        if SCRIPT.is_file():
            assert findings(tab) == []
        for number, stroke in enumerate((["ArrowUp"] * 9, ["ArrowRight"] * 9), 1):
            tab_to(tab, "pad")
            tab.press("ArrowLeft", "Space", *stroke)
            assert tab.value("document.getElementById('pen').textContent") == "The pen is down."
            tab.press("Space")
            tab_to(tab, "class")
            tab.press("ArrowRight")  # from A to B, then to C
            tab_to(tab, "add")
            tab.press("Enter")
            wait(tab, f"document.querySelectorAll('#examples li').length === {number}")
            assert tab.value(FOCUSED) == "pad"
        labels = "import('./app.js').then(m => m.state.examples.map(e => e.label))"
        assert tab.value(labels) == [11, 12]

        tab.value("document.getElementById('steps').value = 2")
        tab_to(tab, "train")
        tab.press("Enter")
        wait(tab, "!document.getElementById('save').disabled")
        wait(tab, f"{FOCUSED} === 'train'")
        tab_to(tab, "adapter")
        tab.press("ArrowLeft")
        assert tab.value("document.querySelector('#adapters :checked').value") == "base"
        tab_to(tab, "Remove example 2")
        tab.press("Enter")
        wait(tab, "document.querySelectorAll('#examples li').length === 1")
        wait(tab, f"{FOCUSED} === 'pad'")
    server.shutdown()
    server.server_close()


def test_nothing_leaves_the_machine(served: Served) -> None:
    """Neither by itself, nor if it tried: the browser holds it to what it was served from."""
    own = (served.address, "data:", f"blob:{served.address}")
    assert len(served.tab.requests) >= 12
    assert [r for r in served.tab.requests if not r.startswith(own)] == []
    none = '"text": "No available adapters."'
    expected = 0 if served.provider == "webgpu" else 1
    assert [none in e for e in served.tab.errors] == [True] * expected, served.tab.errors
    tried = "fetch('http://127.0.0.1:9/').then(() => '', e => e.message)"
    assert "CSP" in (said := served.tab.value(tried)) or "Failed to fetch" in said
    assert any("Content Security Policy" in e for e in served.tab.errors)
