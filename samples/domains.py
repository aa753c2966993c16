"""What the samples of six domains share: 20 steps of training, and files that are proven.

Package registries have no small weights of these families. So each sample takes the published
code of its family at small sizes, draws random weights, and says so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import lora_fx
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError
from lora_fx.text import counted

Batch = dict[str, torch.Tensor]
Module = TypeVar("Module", bound=nn.Module)
STEPS = 20
LEFT_OUT = ": left out, "
TOLD = ("quantised", "captured", "recorded")
"""Words of the notes that are printed: codes, and what the capture chose."""


def redraw(model: Module) -> Module:
    """Draw each matrix anew with the variance 1 / fan-in, so that no layer's output vanishes.

    The values that training from nothing starts with are often small or 0: the model then gives
    nearly the same output for every input.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


def adapt(base: nn.Module, inputs: Batch, **options: Any) -> nn.Module:
    """Insert branches into a base; print how much they reach, and what they leave out."""
    adapted = lora_fx.insert(base, (), inputs, rank=8, **options)
    lines = str(adapted.report()).splitlines()
    print(lines[0])
    notes = [line.removeprefix("  note: ") for line in lines if "note:" in line]
    for note in notes:
        if any(word in note for word in TOLD):
            print(f"  {note}")
    left_out = [note.partition(LEFT_OUT)[0] for note in notes if LEFT_OUT in note]
    if left_out:
        print(f"  left out, no gradient reaches them: {', '.join(left_out)}")
    return adapted


def train(
    adapted: nn.Module, batches: list[Batch], loss: Callable[[nn.Module, Batch], torch.Tensor]
) -> None:
    """Take 20 steps of AdamW, and print the mean loss of all batches before and after."""

    @torch.no_grad()
    def mean_loss() -> float:
        adapted.eval()
        return sum(loss(adapted, batch).item() for batch in batches) / len(batches)

    before = mean_loss()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    adapted.train()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(adapted, batches[step % len(batches)]).backward()
        optimizer.step()
    print(f"{STEPS} steps: loss {before:.4f} → {mean_loss():.4f}")


def prove(
    base: nn.Module, adapted: nn.Module, inputs: Batch, *, others: Batch | None = None,
    **options: Any,
) -> None:  # fmt: skip
    """Save the adapter and load it again; export it in both modes, which compares the files.

    Args:
        base: The model without an adapter.
        adapted: The same with one, by `adapt`.
        inputs: What the model was captured with.
        others: Inputs of other sizes to compare at, where random ones do not fit the model.
        options: Those of `adapt`.
    """
    adapted.eval()
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "adapter"
        lora_fx.save_adapter(adapted.adapter(), saved)
        again = lora_fx.insert(base, (), inputs, adapter=saved, **options).eval()
        with torch.no_grad():
            pairs = zip(tensors(adapted(**inputs)), tensors(again(**inputs)), strict=True)
            print(f"saved and loaded again: {all(torch.equal(a, b) for a, b in pairs)}")

        for mode, adapters in (("merged", None), ("switch", {"mine": saved})):
            path = Path(folder) / f"{mode}.onnx"
            try:
                report = lora_fx.export(
                    adapted, path, adapters=adapters, mode=mode, inputs=others, provider="cpu"
                )
            except LoraFxError as error:  # codes take no update
                print(f"{mode}: refused: {error.message}")
                continue
            print(f"{mode}: {summary(report)}")


def summary(report: Report) -> str:
    """The largest difference of each comparison of a file, and the warnings about sizes."""
    worst: Mapping[str, float] = {}
    for row in report.parity:
        worst = {**worst, row.of: max(row.rel, worst.get(row.of, 0.0))}
    compared = ", ".join(f"{of} within {rel:.1e}" for of, rel in worst.items())
    sizes = counted(len({str(row.sizes) for row in report.parity}), "set")
    lines = [f"{'ok' if report else 'FAILED'}, {compared}, at {sizes} of sizes"]
    lines += [f"  warning: {text}" for text in report.warnings if "dimension" in text]
    return "\n".join(lines)


def tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of an output: a tensor, or a mapping with tensors and tuples of these."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    found: list[torch.Tensor] = []
    for part in parts:
        found += tensors(part)
    return found
