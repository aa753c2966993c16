"""Mode batch: rows of one batch with different adapters equal each adapter's merged model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import draw
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.fx.capture.capture import Captured
from lora_fx.onnx import Session, row_axis
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.session import RuntimeSession, open_session
from lora_fx.passes import batch as batch_pass
from lora_fx.passes.find import find
from lora_fx.targets.keys import own_use
from tests.providers import PROVIDERS
from tests.zoo.shared import captured

SIZE = 0.15
"""Of random factors: larger ones make the model itself round by more than the gate."""


def adapter(cap: Captured, seed: int, rank: int, include: Any = None) -> Adapter:
    """Factors that move the outputs: any two seeds are far apart."""
    m = lora_fx.insert(cap, rank=rank, include=include, seed=seed, dead="allow")
    rng = np.random.default_rng(seed)
    made = {}
    for key, low in m.adapter().lowrank.items():
        a, b = (rng.standard_normal(v.shape).astype(np.float32) * SIZE for v in (low.a, low.b))
        made[key] = replace(low, a=a, b=b)
    return Adapter(made)


def bert(layers: int = 2) -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=32,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval(), (torch.randint(0, 50, (2, 5)),)


def gpt2(layers: int = 1) -> tuple[nn.Module, Any]:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=24, n_head=2, vocab_size=50, n_positions=32, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2Model(config).eval(), (torch.randint(0, 50, (2, 5)),)


class Image(nn.Module):
    """A strided, dilated and padded convolution, a 1×1 one, and a head of [batch, channels]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, (3, 2), stride=2, padding=1, dilation=(1, 2))
        self.second = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.relu(self.first(x))).mean((2, 3)))


class Words(nn.Module):
    """A lookup, and rows on axis 1 behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 6)
        self.mid = nn.Linear(6, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        turned = self.mid(self.table(ids).transpose(0, 1))
        return torch.tanh(turned).transpose(0, 1)


class Mixing(nn.Module):
    """Every row sees the others."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x - x.mean(0, keepdim=True).expand(x.shape[0], 4))


def check(tmp_path: Path, cap: Captured, adapters: list[Adapter], x: Any, provider: str) -> None:
    """A shuffled mixed batch, one id repeated and one 0, against merged files in ONNX Runtime."""
    report = lora_fx.export(
        cap, tmp_path / "b.onnx", adapters=adapters, mode="batch", provider=provider
    )
    base = tmp_path / "base.onnx"
    lora_fx.export(cap, base, provider=provider)
    assert report and len(report.parity) >= 3
    onnx.checker.check_model(onnx.load(tmp_path / "b.onnx"), full_check=True)
    session = open_session(tmp_path / "b.onnx", provider)
    name = next(n for n in session.input_names if n != "adapter_ids")
    rng = np.random.default_rng(5)
    ids = rng.permutation([*range(len(adapters) + 1), 2])
    rows = x(rng, len(ids))
    got = next(iter(session.run({name: rows, "adapter_ids": ids}).values()))
    alone = []
    for i in range(len(adapters) + 1):
        merged = tmp_path / f"{i}.onnx" if i else base
        if i:
            lora_fx.export(base, merged, adapters=adapters[i - 1], provider=provider)
        alone.append(next(iter(open_session(merged, provider).run({name: rows}).values())))
        for row in np.flatnonzero(ids == i):
            assert rel(got[row], alone[i][row]) < 1e-6, (i, row)
    for i, one in enumerate(alone):
        assert all(rel(one, other) > 0.05 for other in alone[:i]), "adapters too alike to tell"


def tokens(rng: Any, n: int) -> Any:
    return rng.integers(0, 50, (n, 6))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_bert_rows_equal_merged_models(tmp_path: Path, provider: str) -> None:
    cap, *_ = captured("batch bert", bert)
    adapters = [adapter(cap, s, 2 + s % 3) for s in range(1, 5)]
    check(tmp_path, cap, adapters, tokens, provider)
    manifest = json.loads(
        {p.key: p.value for p in onnx.load(tmp_path / "b.onnx").metadata_props}["lora_fx.manifest"]
    )
    assert manifest["mode"] == "batch" and len(manifest["adapters"]) == 4
    with pytest.raises(LoraFxError, match="mode batch already contains its adapters"):
        Session(tmp_path / "b.onnx", provider="cpu")
    entry = manifest["targets"]["encoder.layer.0.intermediate.dense.weight"]
    shapes = {i.name: list(i.dims) for i in onnx.load(tmp_path / "b.onnx").graph.initializer}
    assert shapes[entry["a"]] == [5 * 4, 24] and shapes[entry["b"]] == [5 * 4, 40]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.slow
def test_64_adapters_in_one_batch(tmp_path: Path, provider: str) -> None:
    cap, *_ = captured("batch bert", bert)
    adapters = [adapter(cap, s, 2 + s % 3) for s in range(1, 65)]
    check(tmp_path, cap, adapters, tokens, provider)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("layers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gpt2_flattens_its_rows(layers: int, tmp_path: Path, provider: str) -> None:
    cap = lora_fx.capture(*gpt2(layers)) if layers > 1 else captured("batch gpt2", gpt2)[0]
    adapters = [adapter(cap, s, s) for s in (1, 2, 3)]
    check(tmp_path, cap, adapters, tokens, provider)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_convolutions(tmp_path: Path, provider: str) -> None:
    cap = lora_fx.capture(Image().eval(), (torch.randn(2, 3, 9, 8),))
    adapters = [adapter(cap, s, 2, ["first", "second", "head"]) for s in (1, 2, 3)]
    check(
        tmp_path, cap, adapters,
        lambda rng, n: rng.standard_normal((n, 3, 9, 8)).astype(np.float32), provider,
    )  # fmt: skip


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_lookup_and_rows_on_another_axis(tmp_path: Path, provider: str) -> None:
    cap = lora_fx.capture(Words().eval(), (torch.randint(0, 11, (2, 5)),))
    adapters = [adapter(cap, s, 2, ["table", "mid"]) for s in (1, 2, 3)]
    check(tmp_path, cap, adapters, lambda rng, n: rng.integers(0, 11, (n, 7)), provider)


class Front(nn.Module):
    """Rows flattened behind an axis of size 1, and heads beside the batch behind a Transpose."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mid, self.heads = nn.Embedding(50, 6), nn.Linear(6, 6), nn.Linear(3, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.mid(self.table(ids.reshape(1, -1)))).reshape(*ids.shape, 6)
        cut = x.transpose(0, 1).reshape(ids.shape[1], ids.shape[0] * 2, 3)
        return self.heads(cut).reshape(ids.shape[1], ids.shape[0], 8).transpose(0, 1)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rows_in_front_and_rows_with_heads(tmp_path: Path, provider: str) -> None:
    cap = lora_fx.capture(Front().eval(), (torch.randint(0, 50, (2, 5)),))
    adapters = [adapter(cap, s, 2, ["table", "mid", "heads"]) for s in (1, 2)]
    assert len(adapters[0].lowrank) == 3
    check(tmp_path, cap, adapters, tokens, provider)


class Innermost(nn.Module):
    """A lookup at every 40th token, the batch innermost: short inputs have one such token a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = torch.tanh(self.table(ids[:, ::40].T.reshape(-1)))
        return found.reshape(-1, ids.shape[0], 6).transpose(0, 1)


def test_a_lookup_with_the_batch_innermost_is_refused(tmp_path: Path) -> None:
    """A proof at short lengths would not tell it from one with the batch outermost."""
    cap = lora_fx.capture(Innermost().eval(), (torch.randint(0, 50, (2, 5)),))
    one = adapter(cap, 1, 2, ["table"])
    with pytest.raises(LoraFxError, match="cannot be computed row by row"):
        lora_fx.export(cap, tmp_path / "b.onnx", adapters=[one], mode="batch", provider="cpu")


class Attending(nn.Module):
    """Attention of torch's own: the batch is innermost in it, and a head shares the table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 12)
        self.body = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True)
        self.cross = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.body(self.table(ids))
        ends = torch.gather(x, 1, torch.topk(x, 2, dim=1).indices)
        return self.head(self.cross(x, ends, ends)[0])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_attention_of_torch_and_one_use_of_a_tied_table(tmp_path: Path, provider: str) -> None:
    cap = lora_fx.capture(Attending().eval(), (torch.randint(0, 50, (2, 6)),))
    adapters = [adapter(cap, s, 2) for s in (1, 2)]
    parts = {k.partition("[")[0] for k in adapters[0].lowrank if "[" in k}
    assert "table.weight@head.weight" in adapters[0].lowrank and parts == {"cross.in_proj_weight"}
    adapters.append(adapter(cap, 3, 2, ["table.weight"]))  # both uses
    assert [*adapters[2].lowrank] == ["table.weight"]
    check(tmp_path, cap, adapters, tokens, provider)


class Heads(nn.Module):
    """A table that is looked up, and two heads of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mid = nn.Embedding(50, 12), nn.Linear(12, 12)
        self.one, self.two = (nn.Linear(12, 50, bias=False) for _ in range(2))
        self.one.weight = self.two.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.mid(self.table(ids)))
        return self.one(x) + torch.tanh(self.two(torch.sin(x)))


USES = {
    "each head, and both": (["one.weight", "two.weight"], ["op:linear"], ["call:2"]),
    "the table": (["table.weight"], ["table.weight", "call:1"]),
    "a part of a use": (["one.weight[0:20]"], ["one.weight"], ["two.weight[10:30, 2:5]"]),
    "every use apart": (["op:embedding", "one.weight", "call:2"], [""]),
}


@pytest.mark.parametrize("case", USES)
def test_single_uses_share_what_is_stored(case: str, tmp_path: Path) -> None:
    """Uses that several keys name, calls and parts of uses; the table is in the file once."""
    cap = lora_fx.capture(Heads().eval(), (torch.randint(0, 50, (2, 5)),))
    found, adapters = lora_fx.find(cap), []
    for seed, uses in enumerate(USES[case]):
        made = {}
        for target in (found[f"table.weight@{u}" if u else "table.weight"] for u in uses):
            a, b = draw(target.key, target.layout, 2, seed, "probe")
            made[target.key] = lora_fx.LowRank(a, b, 6.0, target.layout, use=own_use(target.key))
        adapters.append(Adapter(made))
    path = tmp_path / "b.onnx"
    report = lora_fx.export(cap, path, adapters=adapters, mode="batch", provider="cpu")
    assert report and max(p.rel for p in report.parity) < 2e-6
    stored = {i.name: sorted(i.dims) for i in onnx.load(path).graph.initializer}
    assert [n for n, dims in stored.items() if dims == [12, 50]] == ["table.weight"]


def test_a_computed_weight_is_served(tmp_path: Path) -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh())
    cap = lora_fx.capture(net.eval(), (torch.randn(3, 4),))
    adapters = [adapter(cap, s, 2) for s in (1, 2)]
    assert all("0.weight~" in a.lowrank for a in adapters)
    check(tmp_path, cap, adapters, lambda rng, n: rng.standard_normal((n, 4), np.float32), "cpu")


class LastToken(nn.Module):
    """What one token of every row is, picked by (row, position): heads for classification."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(50, 12), nn.Linear(12, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(ids.shape[0], device=ids.device)
        return self.head(self.table(ids)[rows, ids.argmax(-1)])


def test_a_token_of_every_row_is_picked(tmp_path: Path) -> None:
    cap = lora_fx.capture(LastToken().eval(), (torch.randint(0, 50, (2, 6)),))
    check(tmp_path, cap, [adapter(cap, s, 2) for s in (1, 2)], tokens, "cpu")


class Relative(nn.Module):
    """A layer that reads tokens, and a norm of a table of positions: DeBERTa."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
        self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = self.key(self.norm(self.places.weight))
        return self.value(torch.softmax(self.key(x) @ places.T, -1) @ places)


def test_a_layer_that_also_reads_a_norm_of_a_table(tmp_path: Path) -> None:
    cap = lora_fx.capture(Relative().eval(), (torch.randn(2, 3, 8),))
    one = adapter(cap, 1, 2)
    report = lora_fx.export(cap, tmp_path / "s.onnx", adapters=one, mode="switch")
    assert report and "key.weight" in one.lowrank
    with pytest.raises(LoraFxError, match=r"'key.weight' .*the same for every row"):
        lora_fx.export(cap, tmp_path / "b.onnx", adapters=[one], mode="batch")


ROWS: dict[str, tuple[str, dict[str, list[Any]], row_axis.RowAxis | None]] = {
    "gather": ("i = ArgMax<axis=2>(x) y = GatherElements<axis=2>(x, i)", {}, row_axis.RowAxis(0)),
    "gather rows": ("i = ArgMax<axis=0>(x) y = GatherElements<axis=0>(x, i)", {}, None),
    "largest": ("y, i = TopK<axis=1>(x, two)", {}, row_axis.RowAxis(0)),
    "largest rows": ("y, i = TopK<axis=0>(x, two)", {}, None),
    "one of the first axis": (
        "t = Transpose<perm=[1, 0, 2]>(x) y = GatherND(t, last)",
        {},
        row_axis.RowAxis(1),
    ),
    "one of the rows": ("y = GatherND(x, last)", {}, None),
    "pad": ("y = Pad(x, sides)", {}, row_axis.RowAxis(0)),
    "pad by axes": ("y = Pad(x, one_two, , width)", {}, row_axis.RowAxis(0)),
    "pad rows by axes": ("y = Pad(x, one_two, , rows)", {}, None),
    "pad rows": ("y = Pad(x, ends)", {}, None),
    "inner": (
        "t = Transpose<perm=[1, 0, 2]>(x) y = Reshape(t, flat)",
        {"t": [4, "batch", 6], "y": ["4*batch", 6]},
        row_axis.RowAxis(0, exact=False, inner=True),
    ),
    "inner and back": (
        "t = Transpose<perm=[1, 0, 2]>(x) f = Reshape(t, flat) y = Reshape(f, four)",
        {"t": [4, "batch", 6], "f": ["4*batch", 6], "y": [4, "batch", 6]},
        row_axis.RowAxis(1),
    ),
    "heads": (
        "t = Transpose<perm=[1, 0, 2]>(x) y = Reshape(t, heads)",
        {"t": [4, "batch", 6], "y": [4, "3*batch", 2]},
        row_axis.RowAxis(1, exact=False),
    ),
    "heads and back": (
        "t = Transpose<perm=[1, 0, 2]>(x) h = Reshape(t, heads) y = Reshape(h, flat)",
        {"t": [4, "batch", 6], "h": [4, "3*batch", 2], "y": ["4*batch", 6]},
        row_axis.RowAxis(0, exact=False, inner=True),
    ),
    "rows cut up": (
        "t = Transpose<perm=[1, 0, 2]>(x) y = Reshape(t, odd)",
        {"t": [4, "batch", 6], "y": ["2*batch", 12]},
        None,
    ),
    "inner through einsum": (
        "t = Transpose<perm=[1, 0, 2]>(x) f = Reshape(t, flat) "
        'y = Einsum<equation="nd,nd->nd">(f, f)',
        {"t": [4, "batch", 6], "f": ["4*batch", 6], "y": ["4*batch", 6]},
        row_axis.RowAxis(0, exact=False, inner=True),
    ),
    "rows in two axes": (
        "t = Transpose<perm=[1, 0, 2]>(x) y = Reshape(t, pairs)",
        {"t": [4, "batch", 6], "y": ["2*batch", 2, 6]},
        None,
    ),
    "unknown sizes": (
        "t = Transpose<perm=[1, 0, 2]>(x) y = Reshape(t, twelve)",
        {"t": [None, "batch", 6], "y": [None, "batch", 12]},
        None,
    ),
    "heads, repeated": (
        "t = Transpose<perm=[1, 0, 2]>(x) h = Reshape(t, heads) u = Unsqueeze(h, rows) "
        "y = Expand(u, twice)",
        {"t": [4, "batch", 6], "h": [4, "3*batch", 2]},
        row_axis.RowAxis(2, exact=False),
    ),
    "flattened and turned": (
        "f = Reshape(x, flat) y = Transpose(f)",
        {"f": ["4*batch", 6], "y": [6, "4*batch"]},
        row_axis.RowAxis(1, exact=False),
    ),
    "an unknown axis": (
        "f = Reshape(x, pairs) y = Transpose(f)",
        {"f": [None, 2, 6], "y": [6, 2, None]},
        None,
    ),
    "one in front and back": (
        "f = Reshape(x, one) y = Reshape(f, flat)",
        {"f": [1, "24*batch"], "y": ["4*batch", 6]},
        row_axis.RowAxis(0, exact=False),
    ),
    "one in front": ("y = Reshape(x, front)", {"y": [1, "batch", 24]}, row_axis.RowAxis(1)),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_are_where_the_walk_says(case: str) -> None:
    """Row 1 of three is changed: what changes in y is where row 1 is said to be."""
    body, shapes, claim = ROWS[case]
    sizes: dict[str, list[Any]] = {
        "two": [2],
        "sides": [0, 1, 0, 0, 0, 2],
        "ends": [1, 0, 0, 0, 0, 0],
    }
    sizes |= {"flat": [-1, 6], "four": [4, -1, 6], "heads": [4, -1, 2], "odd": [-1, 12]}
    sizes |= {"front": [1, -1, 24], "pairs": [-1, 2, 6], "twelve": [2, -1, 12], "one": [1, -1]}
    sizes |= {"one_two": [1, 2], "width": [-1], "rows": [0], "twice": [2, 1, 1, 1], "last": [[2]]}
    tensors = {k: np.array(v) for k, v in sizes.items()}
    given = ", ".join(
        f"int64{[*v.shape]} {k} = {{{', '.join(map(str, v.ravel()))}}}" for k, v in tensors.items()
    )
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    g (float[batch, 4, 6] x) => (y) <{given}> {{ {body} }}"""
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = onnx_ir.from_proto(proto)
    for value in (v for n in model.graph for v in n.outputs if v.name in shapes):
        value.shape = onnx_ir.Shape(shapes[str(value.name)])
    y = next(v for n in model.graph for v in n.outputs if v.name == "y")
    found = row_axis.provenance(model, "batch")[y]
    assert (None if found.lost else found) == claim
    session = ort.InferenceSession(proto.SerializeToString())
    x = np.random.default_rng(0).standard_normal((3, 4, 6)).astype("f")
    other = x.copy()
    other[1] *= -2
    moved = np.not_equal(*(session.run(["y"], {"x": v})[0] for v in (x, other)))
    if claim is None:
        return
    k = claim.axis
    assert k is not None
    if claim.inner:  # [k · batch]
        moved, k = moved.reshape(-1, 3, *moved.shape[1:]), 1
    elif not claim.exact:  # [batch · h]
        moved = moved.reshape(*moved.shape[:k], 3, -1, *moved.shape[k + 1 :])
    where = moved.any(axis=tuple(a for a in range(moved.ndim) if a != k))
    assert where.tolist() == [False, True, False]


def test_a_model_that_mixes_rows_is_refused(tmp_path: Path) -> None:
    cap = lora_fx.capture(Mixing().eval(), (torch.randn(3, 4),))
    one = adapter(cap, 1, 2)
    with pytest.raises(LoraFxError, match="its rows are not those of the batch"):
        lora_fx.export(cap, tmp_path / "b.onnx", adapters=[one], mode="batch")
    assert not list(tmp_path.iterdir())


def test_weights_by_row_and_ids_out_of_range(tmp_path: Path) -> None:
    cap, *_ = captured("batch gpt2", gpt2)
    one, two = (adapter(cap, s, 2) for s in (1, 2))
    lora_fx.export(
        cap, tmp_path / "b.onnx", adapters={"one": one, "two": two}, mode="batch",
        scales=True, provider="cpu",
    )  # fmt: skip
    run = open_session(tmp_path / "b.onnx", "cpu").run
    ids = np.arange(6).reshape(2, 3)
    weights = np.array([0.5, 1.5], np.float32)
    feeds: dict[str, Any] = {"input_ids": ids, "adapter_scales": weights}
    got = run({**feeds, "adapter_ids": np.array([2, 1])})["last_hidden_state"]
    for row, given in enumerate((two.weighted(0.5), one.weighted(1.5))):
        folded = lora_fx.fold(cap, adapter=given)
        want = folded(torch.from_numpy(ids)).last_hidden_state[row].detach().numpy()
        assert rel(got[row], want) < 2e-6
    for bad in (-1, 3):
        with pytest.raises(Exception, match="out of"):
            run({**feeds, "adapter_ids": np.array([0, bad])})


def test_an_overflow_of_one_adapter_is_no_nan_of_other_rows(tmp_path: Path) -> None:
    """A row times A of its neighbour's adapter may be Inf; the row has no part in it."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 5).eval(), torch.randn(2, 6)
    plain, large = (adapter(Captured(model, (x,), {}), s, 3) for s in (1, 2))
    (low,) = large.lowrank.values()
    large = Adapter(
        {"weight": replace(low, a=low.a * np.float32(1e35), b=low.b / np.float32(1e35))}
    )
    lora_fx.export(
        model, tmp_path / "b.onnx", (x,), adapters=[plain, large], mode="batch", provider="cpu"
    )
    session, rows = open_session(tmp_path / "b.onnx", "cpu"), x.numpy() * [[1e5], [1]]
    rows = rows.astype(np.float32)
    name, *_ = session.input_names
    got = next(iter(session.run({name: rows, "adapter_ids": np.array([1, 2])}).values()))
    for row, one in enumerate((plain, large)):
        w = model.weight.detach().double().numpy() + one.deltas(dtype="float64")["weight"]
        expected = rows[row] @ w.T + model.bias.detach().double().numpy()
        assert rel(got[row], expected) < 1e-5, row
    a = large.lowrank["weight"].a
    most = np.finfo(np.float32).max
    assert np.abs(rows[0].astype(float) @ a.T).max() > most, "nothing overflows"


@pytest.mark.parametrize("opset, first", [(11, "length, batch"), (20, "batch, length")])
def test_two_products_of_one_activation_share_theirs_with_a(
    tmp_path: Path, opset: int, first: str
) -> None:
    """In old opsets too, and where rows are on axis 1: against x · (W + w·ΔW) in fp64."""
    turn = "Transpose<perm = [1, 0, 2]>" if first.startswith("length") else "Identity"
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
    g (float[batch, length, 6] x) => (float[batch, length, 5] y, float[batch, length, 4] z)
    <float[6, 5] q, float[6, 4] k> {{
        t = {turn}(x)
        a = MatMul(t, q)
        c = MatMul(t, k)
        y = {turn}(a)
        z = {turn}(c)
    }}"""
    rng = np.random.default_rng(0)
    weights = {
        n: rng.standard_normal((6, out)).astype(np.float32)
        for n, out in zip("qk", (5, 4), strict=True)
    }
    model = onnx.parser.parse_model(text)
    del model.graph.initializer[:]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(w, n) for n, w in weights.items())
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "m.onnx")
    graph = OnnxGraph(load(tmp_path / "m.onnx"))
    adapters = [
        Adapter(
            {
                t.key: lora_fx.LowRank(*draw(t.key, t.layout, 3, seed, "probe"), 3.0, t.layout)
                for t in find(graph).targets
            }
        )
        for seed in (1, 2)
    ]
    path = tmp_path / "b.onnx"
    lora_fx.export(
        tmp_path / "m.onnx", path, adapters=adapters, mode="batch", scales=True, provider="cpu"
    )
    made = onnx.load(path)
    onnx.checker.check_model(made, full_check=True)
    assert [n.op_type for n in made.graph.node].count("Split") == 1
    x, ids = rng.standard_normal((3, 7, 6)).astype(np.float32), np.array([2, 0, 1])
    factors = np.array([0.5, 1, 2], np.float32)
    feeds = {"x": x, "adapter_ids": ids, "adapter_scales": factors}
    got = open_session(path, "cpu").run(feeds)
    for row, i in enumerate(ids):
        for name, key in ("yq", "zk"):
            delta = adapters[i - 1].deltas()[key] * factors[row] if i else 0.0
            assert rel(got[name][row], x[row].astype(float) @ (weights[key] + delta)) < 1e-6


@pytest.mark.parametrize("broken", ["order", "scale"])
def test_a_wrong_stack_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    cap, *_ = captured("batch gpt2", gpt2)
    adapters = [adapter(cap, s, 2) for s in (1, 2)]
    right = batch_pass._joined

    def wrong(updates: Any, shape: Any, region: Any, layout: Any, gain: float) -> Any:
        if broken == "scale":
            return right(updates, shape, region, layout, gain * 1.01)
        second = adapters[1].lowrank
        return right({k: second[k] for k in updates}, shape, region, layout, gain)

    monkeypatch.setattr(batch_pass, "_joined", wrong)
    with pytest.raises(NoEffectError, match="mixed batch"):
        lora_fx.export(cap, tmp_path / "b.onnx", adapters=adapters, mode="batch")
    assert not list(tmp_path.iterdir())


def test_the_base_is_compared_with_one_row_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed batches have several rows, and the lengths of few."""
    cap, *_ = captured("batch gpt2", gpt2)
    right = RuntimeSession.run

    def wrong(self: RuntimeSession, feeds: Any) -> Any:
        return {n: v + (len(v) == 1) for n, v in right(self, feeds).items()}

    monkeypatch.setattr(RuntimeSession, "run", wrong)
    with pytest.raises(NoEffectError, match=r"differs from the model \(base\).* \[1, 11\]"):
        lora_fx.export(cap, tmp_path / "b.onnx", adapters=[adapter(cap, 1, 2)], mode="batch")


class Either(nn.Module):
    """One of two layers reads x; equal in shape, and both read it from outside their branch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
        chosen: torch.Tensor = torch.cond(flag.sum() > 0, self.one, self.two, (x,))
        return chosen


def test_layers_of_two_branches_share_no_product(tmp_path: Path) -> None:
    """What one branch of an If computes is not there in the other."""
    model, x, flag = Either().eval(), torch.randn(3, 4, 6), torch.ones(2)
    cap = lora_fx.capture(model, (x, flag), static=["flag"])
    adapters = [adapter(cap, s, s + 1) for s in (1, 2)]
    lora_fx.export(cap, tmp_path / "b.onnx", adapters=adapters, mode="batch", provider="cpu")
    run, ids = open_session(tmp_path / "b.onnx", "cpu").run, np.array([2, 0, 1])
    for sign, name in ((1, "one"), (-1, "two")):
        feeds = {"x": x.numpy(), "flag": sign * flag.numpy(), "adapter_ids": ids}
        (got,) = run(feeds).values()
        layer = model.get_submodule(name)
        for row, i in enumerate(ids):
            w = layer.weight.detach().double().numpy()
            if i:
                w = w + adapters[i - 1].deltas(dtype="float64")[f"{name}.weight"]
            wanted = x[row].double().numpy() @ w.T + layer.bias.detach().double().numpy()
            assert rel(got[row], wanted) < 2e-6, (name, i)
