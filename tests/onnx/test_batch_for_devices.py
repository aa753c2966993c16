"""Mode batch for devices: every row picks its own factors, and no node waits for the host."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.compare import rel
from lora_fx.onnx.cuda_obstacles import cuda_obstacles
from lora_fx.onnx.manifest import PROPERTY
from lora_fx.onnx.session import open_session
from tests.onnx.decoders import llama
from tests.onnx.test_batch import Image, adapter, bert, gpt2
from tests.onnx.test_batch import Words as RowsOnAnotherAxis
from tests.onnx.test_batch_forms import Attention
from tests.trust.test_row_ids import Words, runner, unrefused

COUNT = 3
DEVICES = ("cuda", "webgpu")


def tokens() -> tuple[torch.Tensor, ...]:
    return (torch.randint(0, 11, (2, 5)),)


@dataclass(frozen=True)
class Case:
    """A model, its example inputs, and what of it is adapted."""

    model: Callable[[], nn.Module]
    args: Callable[[], tuple[Any, ...]] = tokens
    include: tuple[str, ...] | None = None
    options: tuple[tuple[str, Any], ...] = ()
    tol: float = 2e-6


CASES = {
    "a lookup, a convolution, layers": Case(Words, include=("table", "conv", "mid", "head")),
    "weights by row": Case(Words, include=("table", "conv", "head"), options=(("scales", True),)),
    "convolutions of images": Case(Image, lambda: (torch.randn(2, 3, 9, 8),)),
    "rows on another axis": Case(RowsOnAnotherAxis, include=("table", "mid")),
    "rows that are innermost": Case(Attention, lambda: (torch.randn(3, 5, 8),)),
    "three layers that read one value": Case(lambda: bert(1)[0]),
    "rows that are flattened": Case(lambda: gpt2(1)[0]),
    "codes of four bits": Case(lambda: bert(1)[0], options=(("quantise", "int4"),)),
    "float16": Case(lambda: Words().half(), include=("table", "mid", "head"), tol=2e-3),
}


def exported(case: Case, folder: Path, target: str, **options: Any) -> Path:
    torch.manual_seed(0)
    cap = lora_fx.capture(case.model().eval(), case.args())
    include = None if case.include is None else [*case.include]
    adapters = [adapter(cap, seed, 2, include) for seed in range(1, COUNT + 1)]
    path = folder / f"{target}.onnx"
    lora_fx.export(
        cap, path, adapters=adapters, mode="batch", provider="cpu", target=target,
        **dict(case.options), **options,
    )  # fmt: skip
    return path


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx_ir.load(path).graph.all_nodes()}


@pytest.mark.parametrize("name", CASES)
def test_a_file_for_a_device_computes_what_the_cpu_s_does(name: str, tmp_path: Path) -> None:
    """The CPU's file, whose rows are compared with each adapter alone by other tests."""
    case = CASES[name]
    on_cpu = exported(case, tmp_path, "cpu")
    sessions = [open_session(on_cpu, "cpu")]
    for target in DEVICES:
        path = exported(case, tmp_path, target)
        assert "Unique" not in operators(path)
        assert cuda_obstacles(onnx_ir.load(path)) == []
        assert manifest(path)["factors"] == "each row's own"
        sessions.append(open_session(path, "cpu"))
    assert "factors" not in manifest(on_cpu)

    example = case.args()[0].numpy()
    rng = np.random.default_rng(0)
    for ids in ([0, 1, 2, 3, 3, 1], [2, 2, 2], [0], [3, 1, 0, 0, 2, 1, 3, 2]):
        rows = np.resize(rng.permutation(example, axis=-1), (len(ids), *example.shape[1:]))
        feeds = {input_name(sessions[0]): rows, "adapter_ids": np.array(ids)}
        if dict(case.options).get("scales"):
            feeds["adapter_scales"] = rng.uniform(0.5, 1.5, len(ids)).astype(np.float32)
        expected, *others = [session.run(feeds) for session in sessions]
        for outputs in others:
            for output, y in outputs.items():
                assert rel(y, expected[output]) < case.tol, (ids, output)

    empty = {input_name: value[:0] for input_name, value in feeds.items()}
    for session in sessions:
        for output, y in session.run(empty).items():
            assert y.shape == (0, *expected[output].shape[1:])


def manifest(path: Path) -> dict[str, Any]:
    (text,) = [entry.value for entry in onnx.load(path).metadata_props if entry.key == PROPERTY]
    content: dict[str, Any] = json.loads(text)
    return content


def input_name(session: Any) -> str:
    return next(name for name in session.input_names if not name.startswith("adapter_"))


def test_the_cpu_s_file_is_the_one_without_a_target(tmp_path: Path) -> None:
    case = CASES["a lookup, a convolution, layers"]
    named = exported(case, tmp_path, "cpu").read_bytes()
    torch.manual_seed(0)
    cap = lora_fx.capture(case.model().eval(), case.args())
    adapters = [adapter(cap, seed, 2, [*(case.include or ())]) for seed in (1, 2, 3)]
    path = tmp_path / "default.onnx"
    lora_fx.export(cap, path, adapters=adapters, mode="batch", provider="cpu")
    assert path.read_bytes() == named


@pytest.mark.slow
def test_a_decoder_with_a_cache(tmp_path: Path) -> None:
    """Only the position of the next token is computed of a size, as in every mode."""
    case = Case(lambda: llama(1), include=("q_proj", "v_proj", "down_proj"))
    path = exported(case, tmp_path, "cuda", cache=True)
    assert "Unique" not in operators(path)
    assert {o.op for o in cuda_obstacles(onnx_ir.load(path))} <= {"Add"}


def test_a_thousand_id_vectors_with_wrong_numbers_among_them(tmp_path: Path) -> None:
    """NaN in the rows that asked, and the numbers of a run alone in the others; or an error."""
    path = exported(CASES["a lookup, a convolution, layers"], tmp_path, "cuda")
    run = runner(unrefused(path))
    refusing = runner(path)
    rng = np.random.default_rng(0)
    words = rng.integers(0, 11, (6, 5))
    by_adapter = [
        run({"ids": words, "adapter_ids": np.full(6, number)})["logits"]
        for number in range(COUNT + 1)
    ]
    extremes = np.array([-1, COUNT + 1, 2**31, 2**32 + 1, 2**62, -(2**63), 2**63 - 1])
    wrong_rows = 0
    for number in range(1000):
        ids = rng.integers(0, COUNT + 1, 6)
        is_wrong = rng.random(6) < 0.3
        ids[is_wrong] = rng.choice(extremes, is_wrong.sum())
        feeds = {"ids": words, "adapter_ids": ids}
        logits = run(feeds)["logits"]
        assert np.isnan(logits[is_wrong]).all(), ids
        for row in np.flatnonzero(~is_wrong):
            assert rel(logits[row], by_adapter[ids[row]][row]) < 2e-6, (ids, row)
        wrong_rows += is_wrong.sum()
        if number < 20 and is_wrong.any():
            with pytest.raises(Exception, match="adapter_ids out of range"):
                refusing(feeds)
    assert wrong_rows > 1000
