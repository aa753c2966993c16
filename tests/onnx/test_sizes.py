"""Sizes of foreign files: what a check draws and the model refuses, and what FLOPs assume."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import lora_fx
from lora_fx.cli import main
from lora_fx.conditions import Condition
from lora_fx.errors import LoraFxError
from lora_fx.onnx.range_guards import guard_within

RNG = np.random.default_rng(0)


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32), name)


def numbers(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


STRIDED = "strides=[4],kernel_shape=[4]"


class Ran(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def ran(*line: str) -> Ran:
    """What a command ends with, and says."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        main([*line])
    return Ran(int(stop.value.code or 0), out.getvalue(), err.getvalue())


REFUSING: dict[str, tuple[str, list[onnx.TensorProto], tuple[int, ...]]] = {
    "a reshape to a grid of patches": (
        "g (float[b,n,8] x) => (float[c,m,4] y) "
        "{ p = MatMul(x,w) q = Reshape(p,s) y = MatMul(q,v)}",
        [weight("w", 8, 8), numbers("s", -1, 16, 8), weight("v", 8, 4)],
        (2, 16, 8),
    ),
    "a table of positions": (
        "g (float[b,n,8] x) => (float[b,n,4] y) { p = Add(x,t) y = MatMul(p,v)}",
        [weight("t", 16, 8), weight("v", 8, 4)],
        (2, 16, 8),
    ),
    "windows of seven": (
        "g (float[b,n,8] x) => (float[c,m,4] y) { q = Reshape(x,s) y = MatMul(q,v)}",
        [numbers("s", -1, 7, 8), weight("v", 8, 4)],
        (2, 14, 8),
    ),
    "a reflection longer than the sound": (
        'g (float[b,1,n] x) => (float[b,8,m] y) { p = Pad<mode="reflect">(x,s) '
        "y = Conv<kernel_shape=[16],strides=[8]>(p,w)}",
        [numbers("s", 0, 0, 24, 0, 0, 24), weight("w", 8, 1, 16)],
        (2, 1, 64),
    ),
    "sides that four divides": (
        f"g (float[b,4,h] x) => (float[b,4,h] y) {{ a = Conv<{STRIDED}>(x,w) "
        f"u = ConvTranspose<{STRIDED}>(a,v) y = Add(u,x)}}",
        [weight("w", 8, 4, 4), weight("v", 8, 4, 4)],
        (2, 4, 16),
    ),
    "a head of so many numbers": (
        "g (float[b,n,8] x) => (float[c,4] y) { q = Reshape(x,s) y = MatMul(q,v)}",
        [numbers("s", -1, 64), weight("v", 64, 4)],
        (1, 8, 8),
    ),
}
COMMANDS = {
    "insert": ("insert {} -o o.onnx --rank 2",),
    "switch": ("export {} -o o.onnx --mode switch",),
    "optimise": ("export {} -o o.onnx --optimise",),
    "int8": ("export {} -o o.onnx --precision int8",),
}


def saved(path: Path, text: str, tensors: list[onnx.TensorProto]) -> Path:
    head = '<ir_version: 8, opset_import: ["" : 17]>\n'
    model = onnx.parser.parse_model(head + text)
    model.graph.initializer.extend(tensors)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", REFUSING)
def test_a_size_of_ours_has_a_way_out(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint names the options, blames nobody, and is right: with --inputs the command runs."""
    monkeypatch.chdir(tmp_path)
    text, tensors, shape = REFUSING[name]
    saved(Path("m.onnx"), text, tensors)
    line = COMMANDS[command][0].format("m.onnx").split()
    result = ran(*line)
    assert result.exit_code == 2
    error, hint = [t for t in result.stderr.splitlines() if t.startswith(("Error", "Hint"))]
    assert error.startswith("Error: ")
    assert "x [" in error
    assert "--inputs FILE.npz" in hint
    assert "--static NAME:DIM" in hint
    assert "check" not in hint
    assert not Path("o.onnx").exists()
    np.savez("x.npz", x=RNG.standard_normal(shape).astype(np.float32))
    again = ran(*line, "--inputs", "x.npz")
    assert again.exit_code == 0, again.stderr


class Net(nn.Module):
    """Convolutions, whose FLOPs grow with the image, and a head, whose FLOPs do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 12, 3)
        self.wide, self.head = nn.Linear(12, 400), nn.Linear(400, 300)

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(self.wide(y.mean((2, 3))))


class Experts(nn.Module):
    def __init__(self, pick: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.route, self.head = nn.Linear(16, 4), nn.Linear(24, 8)
        self.stack, self.pick = nn.Parameter(torch.randn(4, 16, 24)), pick

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.pick(self, x, self.route(x).argmax(-1)))
        return y


def _turned(m: Any, x: Tensor, picked: Tensor) -> Tensor:
    turned = m.stack.transpose(1, 2)[picked]
    y: Tensor = (turned @ x.unsqueeze(-1)).squeeze(-1)
    return y


PICKS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "indexed": lambda m, x, i: (x.unsqueeze(-2) @ m.stack[i]).squeeze(-2),
    "in an einsum": lambda m, x, i: torch.einsum("bni,bnio->bno", x, m.stack[i]),
    "index_select": lambda m, x, i: (
        x.unsqueeze(-2) @ m.stack.index_select(0, i.flatten()).reshape(*i.shape, 16, 24)
    ).squeeze(-2),
    "turned": _turned,
    "scaled": lambda m, x, i: (x.unsqueeze(-2) @ (m.stack[i] * 2.0)).squeeze(-2),
}


def exported(model: nn.Module, x: Tensor, dims: dict[int, str], path: Path) -> None:
    """A file as torch alone writes it."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), (x,), path, dynamo=True, dynamic_shapes=(dims,), verbose=False
        )


def listed(*line: str) -> Any:
    result = ran("targets", *line, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("side", [32, 48, 64, 96])
def test_shares_of_a_file_are_those_of_the_model(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 1358f462 a named height counted once, and --inputs was refused."""
    monkeypatch.chdir(tmp_path)
    x = torch.randn(1, 3, side, side)
    exported(
        Net(), torch.randn(2, 3, 64, 64), {0: "batch", 2: "height", 3: "width"}, Path("m.onnx")
    )
    found = lora_fx.find(Net(), (x,))
    assert found.sizes == {"x": (2, 3, side, side)}  # a trace of one row would fix the batch
    np.savez("x.npz", x=x.repeat(2, 1, 1, 1).numpy())
    rows = listed("m.onnx", "--inputs", "x.npz")
    assert rows["flops_at"] == {"x": [2, 3, side, side]}
    assert rows["flops"]["reached"] == found.flops["reached"]
    assert [t["flops"] for t in rows["targets"]] == [t.flops for t in found.targets]
    text = ran("targets", "m.onnx", "--inputs", "x.npz").stdout
    assert f"at x [2, 3, {side}, {side}]" in text
    if side == 64:  # what is assumed where nobody says
        assert listed("m.onnx")["flops_at"] == {"x": [1, 3, 64, 64]}
        assert listed("m.onnx")["reached_share"] == rows["reached_share"]


@pytest.mark.parametrize("name", PICKS)
def test_what_is_gathered_counts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stack of experts that no branch reaches is no hundred percent."""
    monkeypatch.chdir(tmp_path)
    model, x = Experts(PICKS[name]).eval(), torch.randn(2, 5, 16)
    found = lora_fx.find(model, (x,))
    flops = 2 * 2 * 5 * 16 * 24
    assert [u.flops for u in found.unreached] == [flops]
    assert found.data_flops == 0
    rest = 2 * 2 * 5 * (16 * 4 + 24 * 8)
    assert found.reached_share == pytest.approx(rest / (rest + flops))
    assert "at x [2, 5, 16]" in str(found)
    exported(model, x, {0: "b", 1: "n"}, Path("m.onnx"))
    np.savez("x.npz", x=x.numpy())
    assert listed("m.onnx", "--inputs", "x.npz")["reached_share"] == pytest.approx(
        found.reached_share, rel=1e-4
    )


def test_products_of_activations_are_no_weights() -> None:
    """Attention, and rows of a table that is a target, count as they did."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(40, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            y = self.table(ids)
            z: Tensor = self.head(torch.softmax(y @ y.transpose(1, 2), -1) @ y)
            return z

    found = lora_fx.find(Attention(), (torch.zeros(2, 5, dtype=torch.int64),))
    assert found.flops["unreached"] == 0
    assert found.data_flops == 2 * 2 * 2 * 5 * 5 * 8
    assert found.reached_share == 1.0


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"z": (1, 3, 8, 8)}, "no input is named 'z'"),
        ({"x": (1, 4, 8, 8)}, "takes [batch, 3, height, width], but --inputs has [1, 4, 8, 8]"),
        ({"x": (3, 8, 8)}, "--inputs has [3, 8, 8]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    arrays: dict[str, tuple[int, ...]], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (
        "g (float[batch,3,height,width] x) => (float[batch,4,h,w] y) "
        "{ y = Conv<kernel_shape=[3,3]>(x,w)}"
    )
    saved(Path("m.onnx"), text, [weight("w", 4, 3, 3, 3)])
    np.savez("x.npz", **{n: np.zeros(s, np.float32) for n, s in arrays.items()})
    result = ran("targets", "m.onnx", "--inputs", "x.npz")
    assert result.exit_code == 2
    assert said in result.stderr


def test_the_hint_is_pythons_in_python(tmp_path: Path) -> None:
    text, tensors, _ = REFUSING["a table of positions"]
    path = saved(tmp_path / "m.onnx", text, tensors)
    with pytest.raises(LoraFxError) as caught:
        lora_fx.export(path, tmp_path / "o.onnx", optimise=True, provider="cpu")
    assert "--" not in str(caught.value).partition("Hint:")[2]


BOUNDS = (
    ("(s0 == min(512, s0)) or (min(512, s0) == 1)", "min(512, s0) == s0"),
    ("s0 <= 7", "min(7, s0) == s0"),
    ("s0 == min(7, s0) or s0 < 3", "min(7, s0) == s0", "s0 <= 7"),
    ("s0 <= 7", "s0 <= 7"),
)
"""Conditions that are told apart by their texts alone."""


@pytest.mark.parametrize("texts", BOUNDS)
def test_conditions_of_one_bound_have_guards_of_their_own_names(texts: tuple[str, ...]) -> None:
    """A guard is named for what it says, and ONNX Runtime refuses two nodes of one name."""
    parsed = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> m (float[batch,n] x) => (float[batch,n] y) '
        "{ y = Relu(x) }"
    )
    model = ir.from_proto(parsed)
    guard_within(model, [Condition(text, (("s0", "x", 1),)) for text in texts])
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    top = 512 if "512" in texts[0] else 7
    assert session.run(None, {"x": np.ones((2, top), np.float32)})[0].shape == (2, top)
    with pytest.raises(Exception, match=rf"x\[1\] <= {top}"):
        session.run(None, {"x": np.ones((2, top + 1), np.float32)})


def test_conditions_of_two_bounds_are_two_guards() -> None:
    """The twin of the above: bounds that differ are guarded each."""
    parsed = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> m (float[batch,n] x) => (float[batch,n] y) '
        "{ y = Relu(x) }"
    )
    model = ir.from_proto(parsed)
    guard_within(model, [Condition(text, (("s0", "x", 1),)) for text in ("s0 <= 7", "s0 >= 3")])
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    for refused in (2, 8):
        with pytest.raises(Exception, match=r"x\[1\] [<>]= [37]"):
            session.run(None, {"x": np.ones((2, refused), np.float32)})
