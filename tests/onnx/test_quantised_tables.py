"""Lookup tables and heads as codes: rows are looked up as codes, and a note offers it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.compare import rel
from lora_fx.fx.codes import dequantised
from lora_fx.fx.onnx_export.quantised_products import rows_of_codes
from lora_fx.onnx.session import open_session

ROWS, WIDTH, BLOCK = 1000, 70, 32
IDS = torch.tensor([[3, 999, 0], [7, 7, 21]])


class Words(nn.Module):
    """A table, one layer and a head, which may be the table."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(ROWS, WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(self.table(ids)).relu())


def exported(path: Path, tied: bool, quantise: Any, dtype: torch.dtype = torch.float32) -> Any:
    model = Words(tied).to(dtype).eval()
    return lora_fx.export(model, path, (IDS,), quantise=quantise, provider="cpu")


def decoded(file: onnx.ModelProto, name: str) -> np.ndarray[Any, Any]:
    """A weight of the file from its codes and scales, in fp64."""
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in file.graph.initializer}
    codes = tensors[name]
    if codes.shape[-1] < BLOCK:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], BLOCK)
    middle = 128 if codes.shape[-1] == tensors[name].shape[-1] else 8
    scales = tensors[f"{name}_scale"].astype(np.float64)
    weight = (codes.astype(np.float64) - middle) * scales[..., None]
    return weight.reshape(len(codes), -1)[:, :WIDTH]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_table_stays_codes_in_a_run(tied: bool, kind: str, tmp_path: Path) -> None:
    """Nothing reads its codes but lookups of rows and products; the numbers are those of W̃."""
    path = tmp_path / "q.onnx"
    assert exported(path, tied, ["int4", f"{kind}=table,head"])
    file = onnx.load(path)
    readers = [node for node in file.graph.node if "table.weight" in node.input]
    assert {node.op_type for node in readers} == {"Gather", *(["MatMulNBits"] if tied else [])}

    fc = decoded(file, "fc.weight")
    table = decoded(file, "table.weight")
    head = table if tied else decoded(file, "head.weight")
    bias = Words(tied).fc.bias.detach().double().numpy()
    wanted = np.maximum(table[IDS.numpy()] @ fc.T + bias, 0) @ head.T
    (output,) = open_session(path, "cpu").run({"ids": IDS.numpy()}).values()
    assert rel(output, wanted) < 1e-6
    assert abs(wanted).max() > 0.5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ["none", "floats", "codes"])
def test_rows_have_the_bits_of_the_whole_table(bits: int, zeros: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    blocks = -(-WIDTH // BLOCK)
    codes = torch.randint(0, 256, (ROWS, blocks, BLOCK * bits // 8), generator=generator)
    scale = torch.rand(ROWS, blocks, generator=generator)
    zero = None
    if zeros == "floats":
        zero = 10 * torch.rand(ROWS, blocks, generator=generator)
    if zeros == "codes":
        packed = (ROWS * -(-blocks * bits // 8),)
        zero = torch.randint(0, 256, packed, generator=generator).to(torch.uint8)
    form = ([ROWS, WIDTH], f"int{bits}", BLOCK, False, torch.float32)
    tensors = (codes.to(torch.uint8), scale, zero, None)
    whole = dequantised(*tensors, *form)
    assert torch.equal(rows_of_codes(IDS, *tensors, *form), whole[IDS])
    assert whole.std() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats_that_are_most_of_a_file_are_named(dtype: torch.dtype, tmp_path: Path) -> None:
    """table and head, 1000 · 70 floats each; fc is 70 rows of 3 blocks of 16 bytes and a scale."""
    report = exported(tmp_path / "m.onnx", False, "int4", dtype)
    in_all = 2 * 4 * ROWS * WIDTH + 70 * 3 * (16 + 4) + 4 * WIDTH
    (said,) = [line for line in report.warnings if "in 8 bits" in line]
    sizes = f"560.0 kB as floats, of {in_all / 1000:.1f} kB in all"
    hint = "to store them in 8 bits, add int8=table,head to what is quantised"
    assert said == f"table.weight, head.weight: {sizes}; {hint}"
    smaller = exported(tmp_path / "s.onnx", False, ["int4", "int8=table,head"], dtype)
    assert not [line for line in smaller.warnings if "in 8 bits" in line]
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in "ms"]
    assert sizes[1] < 0.6 * sizes[0]


def test_floats_that_are_less_than_half_are_not_named(tmp_path: Path) -> None:
    """A tied table is named once, and one in codes is not named."""
    report = exported(tmp_path / "m.onnx", True, "int4")
    (said,) = [line for line in report.warnings if "in 8 bits" in line]
    assert said.startswith("table.weight: 280.0 kB as floats, of 284.5 kB in all")
    report = exported(tmp_path / "s.onnx", False, ["int4", "int8=table,head"])
    assert not [line for line in report.warnings if "in 8 bits" in line]
