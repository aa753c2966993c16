"""What is rewritten on the way to ONNX: equal to torch's own op, and runs in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import fx, nn

import lora_fx
from lora_fx.fx.onnx_export.portable import make_portable
from lora_fx.fx.onnx_export.projected_lstm import projected_lstm
from lora_fx.fx.onnx_export.real_fourier import LONGEST, real_fourier

aten = torch.ops.aten


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("layers", "both_ways"), [(1, False), (2, True)])
def test_a_projected_lstm_is_plain_ones(
    layers: int, both_ways: bool, bias: bool, batch_first: bool
) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(
        5, 7, layers, bias=bias, batch_first=batch_first, bidirectional=both_ways, proj_size=3
    ).double()
    n = layers * (2 if both_ways else 1)
    x = torch.randn((2, 6, 5) if batch_first else (6, 2, 5), dtype=torch.float64)
    state = (torch.randn(n, 2, 3).double(), torch.randn(n, 2, 7).double())
    with torch.no_grad():
        y, (h, c) = lstm(x, state)
        ours = projected_lstm(
            x, state, lstm._flat_weights, bias, layers, 0.0, False, both_ways, batch_first
        )
    for got, want in zip(ours, (y, h, c), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dims", [(1, 2), (2,), (0, 1, 2), (-1, 1)])
def test_the_real_part_of_a_transform_is_products(dims: tuple[int, ...]) -> None:
    x = torch.randn(3, 8, 5, dtype=torch.float64)
    want = torch.fft.fftn(x, dim=dims).real
    torch.testing.assert_close(real_fourier(x, dims), want, rtol=0, atol=1e-12)


class Mixed(nn.Module):
    """A transform, a check of values, a number less integers, a projected LSTM with its state."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.lstm = nn.LSTM(6, 8, proj_size=4, batch_first=True, bidirectional=True)
        self.first = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        torch._check_tensor_all(mask >= 0, lambda: "a mask is not negative")
        x = torch.fft.fftn(self.lin(x), dim=(1, 2)).real * 0.2
        x = x * (1.0 - 0.5 * (1.0 - mask)).unsqueeze(-1)
        h = torch.tanh(self.first(x.mean(1))).expand(2, -1, -1).contiguous()
        c = torch.cat([h, h], -1)
        y: torch.Tensor = self.lstm(x, (h, c))[0]
        return y


def test_the_file_of_all_of_them_equals_torch_at_three_sizes(tmp_path: Path) -> None:
    model = Mixed().eval()
    args = (torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.long))
    module = lora_fx.insert(model, args, rank=2)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    report = lora_fx.export(module, tmp_path / "m.onnx")
    rows = [p for p in report.parity if p.of == "onnxruntime"]
    assert report and len({p.sizes["x"] for p in rows}) == 3
    assert max(p.rel for p in rows) < 2e-6


class Rotary(nn.Module):
    """Positions as complex numbers, whose dimensions come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 16)
        self.register_buffer("turns", torch.polar(torch.ones(16, 4), torch.randn(16, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = torch.view_as_complex(self.q(x).reshape(*x.shape[:-1], 2, 4, 2))
        turns = self.turns[: x.shape[1]].unsqueeze(0).unsqueeze(-2).expand(x.shape[0], -1, 2, -1)
        first = torch.view_as_real(turns.select(-2, 0)).flatten(2)
        return torch.view_as_real(q * turns).flatten(3).select(2, 1) + first


def test_complex_positions_have_a_file(tmp_path: Path) -> None:
    model, x = Rotary().eval(), torch.randn(2, 5, 8)
    module = lora_fx.insert(model, (x,), rank=2)
    with torch.no_grad():
        module.get_parameter("q.lora_B.weight").normal_(std=0.3)
    report = lora_fx.export(module, tmp_path / "m.onnx")
    assert max(p.rel for p in report.parity if p.of == "onnxruntime") < 2e-6


def test_an_output_goes_by_its_name_whatever_the_order_of_its_class(tmp_path: Path) -> None:
    """transformers rebuilds its classes in the order of their fields."""
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> object:
            made = outputs.BaseModelOutputWithPooling(pooler_output=x.mean(1))
            made["last_hidden_state"] = self.l(x)
            return made

    module = lora_fx.insert(Swapped().eval(), (torch.randn(2, 5, 4),), rank=2)
    report = lora_fx.export(module, tmp_path / "m.onnx")
    assert {p.output for p in report.parity} == {"pooler_output", "last_hidden_state"}


def test_what_needs_no_rewriting_stays() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(5, 7)

        def forward(self, x: torch.Tensor, long: torch.Tensor) -> tuple[torch.Tensor, ...]:
            whole = torch.fft.fft(x)
            return self.lstm(x)[0], 1.0 - x, whole.real + whole.imag, torch.fft.fft(long).real

    cap = lora_fx.capture(Plain().eval(), (torch.randn(4, 2, 5), torch.randn(2, LONGEST + 1)))
    graph: fx.Graph = cap.fx_graph().graph
    before = [n.target for n in graph.nodes]
    make_portable(graph)
    after = [n.target for n in graph.nodes]
    assert aten.lstm.input in after and aten.rsub.Scalar in after
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1, "real(fft(x)) alone"


class Pooled(nn.Module):
    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.lin, self.pool = nn.Linear(6, 4), pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.pool(self.lin(x).movedim(-1, 1))
        return y.flatten(1)


@pytest.mark.parametrize(
    ("pool", "dims"),
    [(nn.AdaptiveAvgPool1d(1), 1), (nn.AdaptiveAvgPool2d(1), 2), (nn.AdaptiveAvgPool3d(1), 3)],
)
def test_a_pooled_mean_behind_a_permute_is_a_mean(
    pool: nn.Module, dims: int, tmp_path: Path
) -> None:
    x = torch.randn(2, *range(3, 3 + dims), 6)
    report = lora_fx.export(Pooled(pool).eval(), tmp_path / "m.onnx", (x,))
    ops = {n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node}
    assert report and "ReduceMean" in ops and not ops & {"Gather", "GatherND", "GatherElements"}


def test_a_pool_of_several_means_stays() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(2, 3, 4, 6)
    graph.output(graph.call_function(aten.adaptive_avg_pool2d.default, (x, [1, 2])))
    make_portable(graph)
    assert [n.target for n in graph.nodes][1] is aten.adaptive_avg_pool2d.default


def _windows(x: torch.Tensor) -> torch.Tensor:
    """Overlapping chunks of a transposed view, as Longformer makes them."""
    x = x.view(8, 2, 6).transpose(0, 1)
    x = x.view(2, 2, 4, 6)
    size, stride = [*x.shape], [*x.stride()]
    size[1], stride[1] = 2 * size[1] - 1, stride[1] // 2
    return x.as_strided(size, stride)


STRIDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it lies": lambda x: x.as_strided((2, 5, 3), (48, 6, 1)),
    "transposed": lambda x: x.mT.as_strided((2, 5, 3), (48, 6, 1)),
    "a permute of four": lambda x: (
        x.view(2, 2, 4, 6).permute(2, 0, 3, 1).as_strided((3, 4), (7, 2))
    ),
    "in chunks that overlap": _windows,
    "the same of a view": lambda x: (
        x.view(8, 2, 6).transpose(0, 1).as_strided((2, 3, 4), (6, 24, 1))
    ),
    "from a place on": lambda x: x.mT.as_strided((4, 5), (9, 2), 11),
    "of the second row": lambda x: x[1:].as_strided((4, 5), (2, 3), 50),
    "of a row, transposed": lambda x: x[1:].mT.as_strided((4, 5), (2, 3)),
    "with a size of 1": lambda x: x.mT[:, None].as_strided((2, 1, 5), (48, 3, 2)),
    "by channels": lambda x: (
        x.view(2, 2, 4, 6).contiguous(memory_format=torch.channels_last).as_strided((2, 7), (48, 3))
    ),
}


@pytest.mark.parametrize("name", STRIDED)
def test_a_view_by_strides_reads_the_storage(name: str, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = STRIDED[name](self.first(x))
            return torch.tanh(y.flatten(1) + self.second(x).mean())

    x = torch.randn(2, 8, 6)
    sized = lora_fx.capture(Net().eval(), (x,), static=("x",))
    report = lora_fx.export(sized, tmp_path / "m.onnx", provider="cpu")
    assert report and max(p.tol for p in report.parity) < 1e-4
