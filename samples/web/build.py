"""Build the page of samples/web: a network that reads digits, its training step and the runtime.

Run `npm ci --prefix samples && python samples/web/build.py [FOLDER]`; FOLDER is `dist` in the
folder of this file by default. It needs `pip install 'lora-fx[samples]'`. To serve the page, run
`python -m http.server --bind 127.0.0.1 --directory FOLDER`.

The network is trained on scikit-learn's digits. Its last three classes are spare: no digit has such
a label, so that a visitor can teach them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import lora_fx

HERE = Path(__file__).resolve().parent
PAGE = ("index.html", "style.css", "app.js", "onnx_adapter.js")
PROBE = HERE.parent / "probe" / "probe.mjs"
"""What reads the probe of the network's file."""
RUNTIME = (
    "ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)  # fmt: skip
"""The runtime without WebGPU, and with it: a browser loads the second where it has WebGPU."""
CLASSES, SPARE, RANK = 10, 3, 4
SHOWN, HELD = 30, 300
"""Digits of each class that the page trains with, and digits that training never sees."""


def network() -> nn.Module:
    """A network from 8 × 8 pixels in 0 … 1 to scores of the digits and the spare classes."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 4 * 4, 96), nn.ReLU(), nn.Linear(96, CLASSES + SPARE),
    )  # fmt: skip


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int = 800) -> None:
    """Train by AdamW; digits are shifted by up to a pixel, because visitors draw less evenly."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        picked = torch.randint(len(x), (64,), generator=generator)
        down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
        optimizer.zero_grad()
        cross_entropy(model(x[picked].roll((down, right), (2, 3))), y[picked]).backward()
        optimizer.step()


def build(folder: Path) -> None:
    """Write all files that are served."""
    runtime = HERE.parent / "node_modules" / "onnxruntime-web" / "dist"
    if not runtime.is_dir():
        sys.exit(f"Error: {runtime} does not exist\nHint: npm ci --prefix {HERE.parent}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("step.*", "forward.*"):  # export does not overwrite an old file
        for old in folder.glob(name):
            old.unlink()
    page = [HERE / name for name in PAGE]
    for path in (*page, PROBE, *(runtime / name for name in RUNTIME)):
        shutil.copy(path, folder)

    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.from_numpy(data.images[:, None] / 16).float(), torch.from_numpy(data.target).long()
    model = network()
    train(model, x[:-HELD], y[:-HELD])
    with torch.no_grad():
        right = (model(x[-HELD:]).argmax(1) == y[-HELD:]).float().mean()
    print(f"the network reads {right:.1%} of {HELD} digits that it was not trained on")

    shown = np.concatenate([np.flatnonzero(data.target[:-HELD] == c)[:SHOWN] for c in range(10)])
    parts = {"shown": shown, "held": np.arange(len(x) - HELD, len(x))}
    digits = {
        name: {
            "pixels": data.images[rows].astype(int).reshape(-1).tolist(),
            "labels": data.target[rows].tolist(),
        }
        for name, rows in parts.items()
    }
    (folder / "digits.json").write_text(json.dumps(digits))
    report = lora_fx.export(
        model.eval(), folder / "step.onnx", (x[:2],), mode=lora_fx.TrainStep(rank=RANK),
        provider="cpu",
    )  # fmt: skip
    print(report)
    # step.switch.onnx has defaults for A and B, for which onnxruntime-web takes no other value
    report = lora_fx.export(
        model, folder / "forward.onnx", (x[:2],), mode="switch", target="portable", provider="cpu"
    )
    print(report)
    print(f"python -m http.server --bind 127.0.0.1 --directory {folder}")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "dist")
