"""Build the page of samples/web: a network that reads digits, its training step and the runtime.

Run `npm ci --prefix samples/web && python samples/web/build.py [FOLDER]`; FOLDER is `dist` in the
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
import onnx
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import lora_fx

HERE = Path(__file__).resolve().parent
PAGE = ("index.html", "style.css", "app.js", "onnx_adapter.js")
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
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


def without_defaults(path: Path, output: Path) -> None:
    """Make A and B required inputs: onnxruntime-web takes no value for an input with a default."""
    model = onnx.load(path, load_external_data=False)
    inputs = {i.name for i in model.graph.input}
    kept = [t for t in model.graph.initializer if t.name not in inputs]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, output)


def build(folder: Path) -> None:
    """Write all files that are served."""
    runtime = HERE / "node_modules" / "onnxruntime-web" / "dist"
    if not runtime.is_dir():
        sys.exit(f"Error: {runtime} does not exist\nHint: npm ci --prefix {HERE}")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("step.*"):  # export does not overwrite an old data file
        old.unlink()
    for path in (*(HERE / name for name in PAGE), *(runtime / name for name in RUNTIME)):
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
    without_defaults(folder / "step.switch.onnx", folder / "forward.onnx")
    print(f"python -m http.server --bind 127.0.0.1 --directory {folder}")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "dist")
