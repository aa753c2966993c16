"""Sizes that decide a path of the model: right everywhere, or refused by name.

On 788628f, through the public API: branch, pooled, total, short_batch, even and unlike ran wrong
without a word, ordered and last ended in a raw RuntimeError, cut lost its cut on the way to ONNX.
"""

from __future__ import annotations

import copy
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.conditions import SizeError
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.pt2.captured import open_program
from lora_fx.onnx.range_guards import RANGES
from lora_fx.passes.verbs.open import load_program
from lora_fx.passes.verbs.program import save_program
from tests.fx.module.test_module import perturb


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.table, self.ids = nn.Parameter(torch.randn(16, 4)), nn.Embedding(20, 4)


class Branch(Two):
    def forward(self, x: Tensor) -> Any:
        return self.a(x) if x.shape[1] < 8 else 2 * self.a(x)


class Pooled(Two):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        return (h[:, ::2] if x.shape[1] > 10 else h).mean(1)


class Total(Two):
    def forward(self, x: Tensor) -> Any:
        return self.a(x) * (2 if x.shape[0] * x.shape[1] > 30 else 1)


class ShortBatch(Two):
    def forward(self, x: Tensor) -> Any:
        return self.a(x) * (3 if x.shape[0] == 1 else 1)


class Even(Two):
    def forward(self, x: Tensor) -> Any:
        return self.a(x[:, ::2]) if x.shape[1] % 2 == 0 else self.a(x)


class Unlike(Two):
    def forward(self, x: Tensor) -> Any:
        return self.a(x) if x.shape[1] == 6 else self.a(x).flip(1) * 3


class Ordered(Two):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        longer = x.shape[1] > y.shape[1]
        return self.a(x).sum(1) + y.sum(1) if longer else self.a(y).sum(1)


class Last(Two):
    def forward(self, x: Tensor) -> Any:
        return self.a(x[:, -3:])


class Cut(Two):
    def forward(self, ids: Tensor) -> Any:
        return self.a(self.ids(ids[:, :16]))


class Twin(Two):
    def forward(self, x: Tensor) -> Any:
        return self.b(torch.relu(self.a(x)))


class Shifted(Two):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.a(x) + self.b(y[:, 1:])


class SameOnBothSides(Two):
    """As attention of transformers, whose code asks whether there is one token only."""

    def forward(self, x: Tensor) -> Any:
        return self.a(x) if x.shape[1] > 1 else self.a(x.flip(1))


class Positions(Two):
    def forward(self, x: Tensor) -> Any:
        return self.a(x + self.table[: x.shape[1]])


class Limited(Two):
    """Positions from a buffer, by expand: torch's condition on them is an alternative."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(120)[None] % 16)

    def forward(self, x: Tensor) -> Any:
        places = self.get_buffer("places")[:, : x.shape[1]].expand(x.shape[0], x.shape[1])
        return self.a(x + self.table[places])


class Long(Two):
    """Turns where no proof looks by itself."""

    limit = 70

    def forward(self, x: Tensor) -> Any:
        return self.a(x) if x.shape[1] < self.limit else 2 * self.a(x)


SIZES = [(2, 6), (3, 7), (1, 11), (2, 8), (2, 16), (4, 17), (1, 1), (2, 30)]
PATHS = [Branch, Pooled, Total, ShortBatch, Even, Unlike, Ordered, Last, Cut]
TWINS = [Twin, Shifted, SameOnBothSides, Positions]


def example(kind: type[Two], rows: int, steps: int) -> tuple[Tensor, ...]:
    torch.manual_seed(rows * 100 + steps)
    if kind is Cut:
        return (torch.randint(0, 20, (rows, steps)),)
    x = torch.randn(rows, steps, 4)
    if kind is Ordered:
        return x, torch.randn(rows, 7, 4)
    return (x, torch.randn(rows, steps + 1, 4)) if kind is Shifted else (x,)


def adapted(kind: type[Two]) -> tuple[Any, nn.Module]:
    """The module of insert, and the model with W + ΔW put in by hand."""
    torch.manual_seed(0)
    model = kind().eval()
    module = lora_fx.insert(
        model, example(kind, 2, 6), rank=2, include=["a", "b"][: kind in TWINS[:2]] or "a"
    )
    perturb(module)
    by_hand = copy.deepcopy(model)
    parameters = dict(by_hand.named_parameters())
    with torch.no_grad():
        for key, delta in module.adapter().deltas().items():
            parameters[key].add_(torch.from_numpy(np.asarray(delta)).float())
    return module.eval(), by_hand


@pytest.mark.parametrize("kind", [*PATHS, *TWINS])
def test_insert_and_fold_are_right_at_every_size(kind: type[Two]) -> None:
    module, by_hand = adapted(kind)
    folded = lora_fx.fold(module)
    for size in SIZES:
        x = example(kind, *size)
        if kind is Positions and size[1] > 16:  # the model itself does not run
            with pytest.raises(SizeError, match=r"'x' has size \d+ in dimension 1.*test_sizes.py"):
                module(*x)
            continue
        want = by_hand(*x)
        torch.testing.assert_close(module(*x), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(folded(*x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [Branch, Total, ShortBatch, Even, Unlike, Ordered, Cut, Shifted, SameOnBothSides]
)
def test_a_file_is_right_or_refuses(kind: type[Two], tmp_path: Path) -> None:
    """Plain ONNX Runtime, without a word of lora-fx, fails where the file is not the model."""
    module, by_hand = adapted(kind)
    report = lora_fx.export(module, tmp_path / "m.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), options, ["CPUExecutionProvider"])
    ranges = report.details["ranges"]
    right = 0
    for size in SIZES:
        x = example(kind, *size)
        feeds = {i.name: v.numpy() for i, v in zip(session.get_inputs(), x, strict=True)}
        try:
            got = session.run(None, feeds)[0]
        except Exception:
            assert ranges or report.warnings
            continue
        np.testing.assert_allclose(got, by_hand(*x).detach().numpy(), rtol=1e-5, atol=1e-5)
        right += 1
    if kind in (*TWINS, Cut):
        assert right == len(SIZES)
        assert ranges == []
    elif kind is Branch:
        (row,) = ranges
        assert {k: row[k] for k in ("input", "dim", "min", "max")} == {
            "input": "x", "dim": 1, "min": None, "max": 7
        }  # fmt: skip
        assert "test_sizes.py" in row["line"]
        assert "x.shape[1] < 8" in row["line"]
    assert right >= (1 if kind is Unlike else 2)


def test_within_leaves_the_guard_out_and_the_ranges_in(tmp_path: Path) -> None:
    module, _ = adapted(Branch)
    checked = lora_fx.export(module, tmp_path / "a.onnx")
    trusted = lora_fx.export(module, tmp_path / "b.onnx", within=True)
    assert trusted.details["ranges"] == checked.details["ranges"]
    assert trusted.details["nodes"] < checked.details["nodes"]
    session = ort.InferenceSession(str(tmp_path / "b.onnx"), providers=["CPUExecutionProvider"])
    held = session.get_modelmeta().custom_metadata_map[RANGES]
    assert "s0 <= 7" in held
    assert str(Path(__file__).parent) not in held


class Apart(Two):
    """The other path has another weight, and another structure of outputs."""

    def forward(self, x: Tensor) -> Any:
        return self.a(x) if x.shape[1] < 8 else {"y": self.b(x), "z": 2 * self.a(x)}


class Nested(Two):
    """Three lengths, and a batch of one."""

    def forward(self, x: Tensor) -> Any:
        if x.shape[0] == 1:
            return 5 * self.a(x)
        return self.a(x) * (1 if x.shape[1] < 8 else 2 if x.shape[1] < 16 else 3)


class Trained(Two):
    """A path that the train mode alone has."""

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return y + (x if x.shape[1] < 8 else 2 * x) if self.training else y


class Missing(Two):
    """Another path at one size, which is no number of a loop."""

    def forward(self, x: Tensor) -> Any:
        return 2 * self.a(x) if x.shape[1] == 7 else self.a(x)


class Unrolled(Two):
    def forward(self, x: Tensor) -> Any:
        return sum(self.a(x[:, i]) for i in range(x.shape[1]))


PROGRAMS = {  # programs in eval and train mode; sizes that the file refuses
    **dict.fromkeys((Branch, Pooled, Total, ShortBatch, Even, Unlike, Ordered), (2, 2, 0)),
    **dict.fromkeys((Last, Cut, *TWINS), (1, 1, 0)),
    **{
        Apart: (2, 2, 0),
        Nested: (4, 4, 0),
        Trained: (1, 2, 0),
        Missing: (2, 2, 0),
        Long: (2, 2, 0),
    },
    **{Positions: (1, 1, 2), Unrolled: (1, 1, 7)},
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_program_in_a_file_serves_every_path_or_refuses(kind: type[Two], tmp_path: Path) -> None:
    """torch's own loader opens the example's path, and refuses the others."""
    module, by_hand = adapted(kind)
    save_program(module, tmp_path / "m.pt2")
    loaded = load_program(tmp_path / "m.pt2")
    plain = torch.export.load(tmp_path / "m.pt2").module()
    evals, trains, lost = PROGRAMS[kind]
    held = open_program(tmp_path / "m.pt2").programs
    assert {m: len(n) for m, n in held.items()} == {False: evals, True: trains}
    for training in (False, True):
        refused, by_torch = 0, 0
        for size in [*SIZES, *[(2, 70)] * (kind is Long)]:
            x = example(kind, *size)
            try:
                got = loaded.train(training)(*x)
            except SizeError:
                refused += 1
            else:
                want = by_hand.train(training)(*x)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            try:
                torch.testing.assert_close(plain(*x), by_hand.eval()(*x), rtol=1e-5, atol=1e-5)
            except (AssertionError, RuntimeError) as e:
                assert "not close" not in str(e) and "mismatch" not in str(e)
                by_torch += 1
        assert refused == lost
        assert by_torch >= lost + (evals > 1)


def test_every_verb_reads_every_path_of_a_file(tmp_path: Path) -> None:
    module, by_hand = adapted(Branch)
    file, folded, again = (str(tmp_path / f"{n}.pt2") for n in ("m", "folded", "again"))
    save_program(module, file)
    long, short = (example(Branch, *size)[0] for size in ((2, 30), (2, 6)))
    said = json.loads(zipfile.ZipFile(file).read("m/data/extra/lora_fx.json"))
    assert said["format"] == said["version"] == 2  # which an older lora-fx refuses as newer
    assert lora_fx.verify(file, module) and lora_fx.verify(module, file)
    assert [t.key for t in lora_fx.find(file).targets] == ["a.weight"]
    save_program(lora_fx.fold(file), folded)
    inserted = lora_fx.insert(folded, rank=2, include="a")
    save_program(inserted, again)
    for model in (lora_fx.fold(file), load_program(folded), inserted, load_program(again)):
        for x in (long, short):
            torch.testing.assert_close(model.eval()(x), by_hand(x), rtol=1e-5, atol=1e-5)
    (row,) = lora_fx.export(file, tmp_path / "m.onnx").details["ranges"]
    assert (row["min"], row["max"]) == (None, 7)  # an ONNX file has the example's side


def test_a_file_without_branches_on_sizes_is_as_old_readers_know_it(tmp_path: Path) -> None:
    save_program(adapted(Cut)[0], tmp_path / "m.pt2")
    said = json.loads(zipfile.ZipFile(tmp_path / "m.pt2").read("m/data/extra/lora_fx.json"))
    assert said["format"] == 1 and said["programs"] == {"model": "eval", "train": "train"}


def test_a_switchable_file_and_its_session_know_the_sizes(tmp_path: Path) -> None:
    module, by_hand = adapted(Branch)
    lora_fx.export(module, tmp_path / "s.onnx", mode="switch", within=True)
    from lora_fx.onnx import Session

    session = Session(tmp_path / "s.onnx", "cpu")
    session.load("adapter", tmp_path / "adapter.onnx_adapter")
    x = example(Branch, 2, 6)[0]
    got = session.run({"x": x.numpy()}, adapter="adapter")
    np.testing.assert_allclose(next(iter(got.values())), by_hand(x).detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(SizeError, match=r"'x' has size 30 in dimension 1"):
        session.run({"x": np.zeros((2, 30, 4), np.float32)}, adapter="adapter")


def test_a_limit_beyond_the_sizes_of_proofs_is_a_limit(tmp_path: Path) -> None:
    module, by_hand = adapted(Limited)
    for steps in (6, 1, 120):
        x = example(Limited, 2, steps)[0]
        torch.testing.assert_close(module(x), by_hand(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="120"):  # torch's own, as in eager mode
        by_hand(torch.randn(2, 121, 4))
    report = lora_fx.export(module, tmp_path / "m.onnx")
    assert max(p.sizes["x"][1] for p in report.parity) == 120


@pytest.mark.parametrize("limit", [69, 70, 71, 100, 513, 5000])
def test_a_branch_at_any_size_is_seen(limit: int) -> None:
    model = Long().eval()
    model.limit = limit
    module = lora_fx.insert(model, (torch.randn(2, 6, 4),), rank=2, include="a")
    assert [c.bounds() for c in insertion_of(module).found.ranges] == [(None, limit - 1)]
    for steps in (limit - 1, limit, limit + 1, 6):
        x = torch.randn(1, steps, 4)
        torch.testing.assert_close(module(x), model(x))


class Hole(Two):
    """Another path at one size, where two sizes add up to one, or where a quarter is one."""

    size, of = 7, "length"

    def forward(self, x: Tensor) -> Any:
        return 2 * self.a(x) if self.inside(*x.shape[:2]) else self.a(x)

    def inside(self, batch: int, length: int) -> bool:
        if self.of == "length":
            return length == self.size
        return batch + length == self.size if self.of == "sum" else length // 4 == self.size


@pytest.mark.parametrize("of", ["length", "sum", "quarter"])
@pytest.mark.parametrize("size", [4, 7, 20, 70, 513])
def test_a_size_left_out_of_a_range_is_refused_by_the_file(
    size: int, of: str, tmp_path: Path
) -> None:
    model = Hole().eval()
    model.size, model.of = size, of
    module = lora_fx.insert(model, (torch.randn(2, 6, 4),), rank=2, include="a")
    report = lora_fx.export(module, tmp_path / "m.onnx")
    assert len(report.details["ranges"]) >= 1
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(tmp_path / "m.onnx", options, ["CPUExecutionProvider"])
    turn = {"length": size, "sum": size - 2, "quarter": 4 * size}[of]
    for length in (turn - 1, turn, turn + 1, turn + 4):
        x = torch.randn(2, length, 4)
        torch.testing.assert_close(module(x), model(x))
        if model.inside(2, length):
            with pytest.raises(Exception, match="lora_fx holds for"):
                session.run(None, {"x": x.numpy()})
        else:
            got = session.run(None, {"x": x.numpy()})[0]
            np.testing.assert_allclose(got, model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_runtime_that_would_end_the_process_is_not_asked(kind: str, tmp_path: Path) -> None:
    """ONNX Runtime 1.31 divides by zero, or aborts, in a recurrent layer of no steps."""

    class Recurrent(Two):
        def __init__(self) -> None:
            super().__init__()
            self.r = getattr(nn, kind)(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.r(x[:, 1:] if x.shape[1] > 1 else x)[0]

    model = Recurrent().eval()
    lora_fx.export(model, tmp_path / "m.onnx", (torch.randn(2, 6, 4),), provider="cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(tmp_path / "m.onnx", options, ["CPUExecutionProvider"])
    x = torch.randn(2, 3, 4)
    got = session.run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(got, model(x).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match="lora_fx holds for"):
        session.run(None, {"x": x[:, :1].numpy()})


def test_a_path_for_every_size_ends_in_a_refusal() -> None:
    model = Unrolled().eval()
    module = lora_fx.insert(model, (torch.randn(2, 3, 4),), rank=2, include="a")
    for steps in range(2, 10):
        x = torch.randn(2, steps, 4)
        torch.testing.assert_close(module(x), model(x))
    with pytest.raises(SizeError, match="captured for sizes"):
        module(torch.randn(2, 12, 4))
