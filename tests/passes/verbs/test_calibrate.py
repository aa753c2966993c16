"""What calibration sees, against autograd on the model itself and rows gathered by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.starts import matrix
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.fx.calibration import Watched
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.site_rows import SiteRows, rows_of_part
from lora_fx.ir.graph import Site
from lora_fx.passes.verbs.calibrate import _layout_and_start, _Statistics, calibrate
from lora_fx.passes.verbs.open import capture
from tests.table import ROWS, Model, Row, example

EVERY = ("inputs", "power", "outputs", "gradient")


def loss(out: Any, labels: Any) -> Tensor:
    """Different at every output, so that no two gradients are the same."""
    wave = torch.arange(out.numel(), dtype=torch.float32).mul(0.7).sin().reshape(out.shape)
    result: Tensor = (out * wave).mean() + out.square().mean()
    return result


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_every_row(row: Row) -> None:
    """The gradient is autograd's, bit by bit: the same kernels run on the same numbers.

    ∂L/∂W = Σ dy xᵀ over the rows is a law that holds only where both are in the right order.
    """
    model, x = Model(row), example(row)
    cap = Captured(model, (x,))
    seen = calibrate(cap, dict.fromkeys(row.keys, ""), [{"x": x}], loss, EVERY)
    own = dict(model.named_parameters())
    if row.effective is not None:  # the gradient of the effective weight
        model.change = torch.zeros_like(model.eff(), requires_grad=True)
    loss(model(x), None).backward()
    products, missing = of_rows(row, cap, x)
    for key, target in products.targets.items():
        got = seen.moments[key].gradient
        p = own[target.parameter.name] if row.effective is None else model.change
        if key in row.dead:
            assert got is None and f"{key}: no gradient reaches it" in seen.notes
            continue
        assert got is not None and p is not None and p.grad is not None and np.any(got)
        np.testing.assert_array_equal(got, matrix(target, p.grad.numpy()))
        if key in missing:
            assert any(n.startswith(f"{key}: its") for n in seen.notes), "what is missing is said"
            continue
        rows = products.sums[key].total["product"] * target.sites[0].gain
        np.testing.assert_allclose(rows, got, rtol=1e-4, atol=1e-5 * np.abs(got).max())


def of_rows(row: Row, cap: Captured, x: Tensor) -> tuple[_Statistics, set[str]]:
    """Σ dy xᵀ of every target, and the targets with a use whose rows are not there."""
    seen = _Statistics(dict.fromkeys(row.keys, ""), frozenset(EVERY))
    xs: dict[str, SiteRows | None] = {}

    def saw(site: Site, keys: tuple[str, ...], rows: SiteRows | None) -> None:
        xs[site.id] = rows

    watched = Watched(cap, seen.choose, saw, weights=True, results=True)
    value = loss(watched._run((x,), {}), None)
    made = watched.last.zeros
    grads = torch.autograd.grad(value, [m.zeros for m in made], allow_unused=True) if made else ()
    left = {key: len(target.sites) for key, target in seen.targets.items()}
    for m, grad in zip(made, grads, strict=True):
        inputs, dy = xs[m.tap.site.id], None if grad is None else m.rows(grad)
        for key in m.tap.keys:
            own = seen.targets[key].layout
            way = _layout_and_start(m.tap.site, seen.targets[key])
            if way is None or dy is None or inputs is None:
                continue
            ids, n = inputs.value, inputs.one_hot
            right = rows_of_part(F.one_hot(ids, n).float() if n else ids, *way, own, out=False)
            product = rows_of_part(dy.value, *way, own, out=True).mT @ right
            seen.sums[key].add("product", product.numpy())
            left[key] -= 1
    return seen, {key for key, n in left.items() if n}


class Net(nn.Module):
    """A strided convolution, a fused q·k·v, a head tied to a lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.qkv = nn.Linear(8, 24)
        self.table = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = torch.relu_(self.conv(x)).flatten(2).mT + self.table(ids).unsqueeze(1)
        q, k, v = self.qkv(h).chunk(3, -1)
        h = F.scaled_dot_product_attention(q, k, v).mean(1)
        out: Tensor = self.head(torch.tanh(h))
        return out


def net() -> Net:
    torch.manual_seed(2)
    return Net().eval()


def batches(n: int = 3) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(4)
    sizes, colour = [5, 4, 3][:n], torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    return [
        {
            "x": torch.randn(s, 3, 7, 6, generator=g).cumsum(-1) * colour,
            "ids": torch.randint(0, 11, (s,), generator=g),
            "labels": torch.randint(0, 11, (s,), generator=g),
        }
        for s in sizes
    ]


def gathered(model: Net) -> dict[str, np.ndarray[Any, Any]]:
    """x of three targets by torch's own hooks and unfold, all batches together, fp64."""
    kept: dict[str, list[Tensor]] = {"conv": [], "qkv": [], "head": []}
    for name in kept:
        module: nn.Module = getattr(model, name)
        module.register_forward_pre_hook(
            lambda m, args, name=name: kept[name].append(args[0].detach().clone())
        )
    with torch.no_grad():
        for b in batches():
            model(b["x"], b["ids"])
    windows = [F.unfold(t, 3, padding=1, stride=2).mT.flatten(0, 1) for t in kept["conv"]]
    return {
        "conv.weight": torch.cat(windows).double().numpy(),
        "qkv.weight": torch.cat([t.flatten(0, -2) for t in kept["qkv"]]).double().numpy(),
        "table.weight": torch.cat(kept["head"]).double().numpy(),
    }


EXAMPLE = (torch.randn(2, 3, 7, 6), torch.tensor([1, 2]))


def test_eva_starts_from_the_principal_axes_of_the_inputs() -> None:
    module = lora_fx.insert(
        net(), EXAMPLE, rank=3, include="conv,qkv,head", init="eva", data=iter(batches())
    )
    rows = gathered(net())
    assert len(module.updates) == 3
    for key, update in module.updates.items():
        _, s, vt = np.linalg.svd(rows[key.partition("@")[0]], full_matrices=False)
        assert min(s[:3] / s[1:4]) > 1.01, "the axes are unique"
        np.testing.assert_allclose(np.abs((update.a * vt[:3]).sum(1)), 1.0, atol=1e-5)
        assert not update.b.any()


def test_lora_ga_starts_from_the_gradient_of_the_weight() -> None:
    model = net()
    module = lora_fx.insert(
        model, EXAMPLE, rank=2, include="conv,qkv,head", init="lora-ga", data=batches()
    )
    for b in batches():
        (F.cross_entropy(model(b["x"], b["ids"]), b["labels"]) * len(b["x"]) / 12).backward()
    left = dict(model.named_parameters())
    for key, update in module.updates.items():
        grad = left[key.partition("@")[0]].grad
        if key.startswith("table"):  # of the head alone: the lookup has no update
            continue
        assert grad is not None
        u, s, vt = np.linalg.svd(grad.flatten(1).double().numpy(), full_matrices=False)
        a, b0 = update.a[:2], update.b[:, :2]
        assert s[1] / s[2] > 1.01 and s[3] / s[4] > 1.01
        for got, want in ((a, vt[:2]), (b0.T, u[:, 2:4].T)):
            unit = got / np.linalg.norm(got, axis=1, keepdims=True)
            np.testing.assert_allclose(np.abs((unit * want).sum(1)), 1.0, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(module(*EXAMPLE), net()(*EXAMPLE), atol=1e-5)


def test_one_use_of_a_tied_tensor_is_seen_alone() -> None:
    """The head's part of the gradient, not the lookup's."""
    model, cap = net(), capture(net(), EXAMPLE)
    b = batches(1)[0]
    use = {"table.weight": "head.weight"}
    one = calibrate(cap, use, [b]).moments["table.weight"].gradient
    model.head.weight = nn.Parameter(model.table.weight.detach().clone())
    F.cross_entropy(model(b["x"], b["ids"]), b["labels"]).backward()
    assert model.head.weight.grad is not None and model.table.weight.grad is not None
    np.testing.assert_array_equal(one, model.head.weight.grad.numpy())
    both = calibrate(cap, {"table.weight": ""}, [b])
    whole = model.head.weight.grad + model.table.weight.grad
    np.testing.assert_allclose(both.moments["table.weight"].gradient, whole, atol=1e-7)
    assert any("embedding reads the weight in other axes" in n for n in both.notes)


def test_a_part_of_a_fused_weight_has_its_own_rows() -> None:
    cap, data = capture(net(), EXAMPLE), batches()
    whole = calibrate(cap, {"qkv.weight": ""}, data, "ce", EVERY).moments["qkv.weight"]
    key = "qkv.weight[8:16, 2:6]"
    some = calibrate(cap, {key: ""}, data, "ce", EVERY).moments[key]
    assert whole.outputs is not None and whole.inputs is not None and whole.gradient is not None
    np.testing.assert_allclose(some.outputs, whole.outputs[8:16, 8:16], rtol=1e-9)
    np.testing.assert_allclose(some.inputs, whole.inputs[2:6, 2:6], rtol=1e-9)
    np.testing.assert_array_equal(some.gradient, whole.gradient[8:16, 2:6])
    assert whole.power is not None and some.rows == whole.rows == 12.0  # 4 × 3 places
    np.testing.assert_allclose(whole.power, np.trace(whole.inputs), rtol=1e-12)


def test_how_the_data_is_cut_does_not_matter() -> None:
    """Sums over examples: one batch of twelve gives what three of 5, 4 and 3 give."""
    cap, parts = capture(net(), EXAMPLE), batches()
    joined = [{k: torch.cat([b[k] for b in parts]) for k in parts[0]}]
    use = {"conv.weight": "", "qkv.weight": ""}
    one, three = (calibrate(cap, use, d, "ce", EVERY) for d in (joined, parts))
    assert one.examples == three.examples == 12 and one.loss == pytest.approx(three.loss, rel=1e-6)
    for key in use:
        for name in EVERY:
            a, b = getattr(one.moments[key], name), getattr(three.moments[key], name)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())


def test_what_cannot_run_is_one_error() -> None:
    cap, use = capture(net(), EXAMPLE), {"qkv.weight": ""}
    with pytest.raises(LoraFxError, match="no batch"):
        calibrate(cap, use, [])
    wrong = [{**batches(1)[0], "a": torch.zeros(5), "b": torch.zeros(5)}]
    with pytest.raises(LoraFxError, match="no argument 'labels', nor 'a'"):
        calibrate(cap, use, wrong)
    broken = [{**batches(1)[0], "x": torch.full((5, 3, 7, 6), torch.nan)}]
    with pytest.raises(LoraFxError, match="the loss of batch 1 is nan"):
        calibrate(cap, use, broken)
    with pytest.raises(LoraFxError, match="unknown statistic 'mean'"):
        calibrate(cap, use, batches(), "ce", ("mean",))
    with pytest.raises(LoraFxError, match="calibration could not read this target"):
        row = next(r for r in ROWS if r.name == "gru")
        x = example(row)
        lora_fx.insert(Model(row), (x,), init="eva", data=[{"x": x}])


@pytest.mark.parametrize("init", ["eva", "lora-ga"])
def test_train_reads_its_own_data(init: str, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "def build():\n    torch.manual_seed(0)\n"
        "    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))\n"
        "    return net, (torch.zeros(2, 6),), {}\n"
    )
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 6)).astype(np.float32), np.arange(40) % 4
    np.savez(tmp_path / "data.npz", input=x, labels=y)
    args = ["train", f"{tmp_path}/model.py:build", f"{tmp_path}/data.npz", "-o", f"{tmp_path}/a"]
    args += ["--init", init, "--rank", "2", "--steps", "2", "--validation", "0"]
    with pytest.raises(SystemExit) as done:
        main(args)
    assert done.value.code == 0
    assert lora_fx.load_adapter(tmp_path / "a").lowrank.keys() == {"0.weight", "2.weight"}


class Text(nn.Module):
    """Mean of the tokens that the mask keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.out = nn.Embedding(11, 6), nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = torch.tanh(self.up(self.table(ids))) * attention_mask.unsqueeze(-1)
        out: Tensor = self.out(h.sum(1) / attention_mask.sum(1, keepdim=True))
        return out


def test_padding_is_no_input() -> None:
    torch.manual_seed(0)
    model = Text().eval()
    ids = torch.randint(0, 10, (4, 5))
    mask = (torch.arange(5) < torch.tensor([[5], [3], [2], [4]])).long()
    ids[mask == 0] = 10
    batch = {"ids": ids.numpy(), "attention_mask": mask.numpy(), "labels": np.arange(4) % 3}
    use = {"up.weight": "", "table.weight": "", "out.weight": ""}
    seen = calibrate(capture(model, (ids, mask)), use, [batch], "ce", EVERY).moments
    x = model.table.weight.detach().double().numpy()[ids[mask == 1]]
    np.testing.assert_allclose(seen["up.weight"].inputs, x.T @ x / 14, rtol=1e-6)
    want = np.bincount(ids[mask == 1], minlength=11) / 14
    np.testing.assert_allclose(seen["table.weight"].inputs, want, rtol=1e-12)
    assert want[10] == 0 and seen["out.weight"].rows == 1.0


def test_data_that_leads_to_infinite_values_is_refused() -> None:
    model, x = nn.Linear(4, 6), torch.ones(3, 4)
    x[1, 2] = torch.inf
    cap = Captured(model, (torch.ones(3, 4),))
    with pytest.raises(LoraFxError, match=r"weight: the data leads to NaN or infinite"):
        calibrate(cap, {"weight": ""}, [{next(iter(cap.named)): x}], "mse", ("inputs",))
