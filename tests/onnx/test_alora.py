"""aLoRA in switch and batch: the base's cache to the bit, PEFT's tokens, rows of every kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import lora_fx
from lora_fx import Adapter, LoraFxError
from lora_fx.adapter.adapter import INVOCATION
from lora_fx.adapter.invocation import NEVER
from lora_fx.adapter.lowrank import draw
from lora_fx.compare import rel
from lora_fx.errors import NoEffectError
from lora_fx.fx.capture.decoder import decoder
from lora_fx.onnx import Session, adapter_starts, invocations
from lora_fx.onnx.session import open_session
from tests.onnx.decoders import MODELS, llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
Arrays = Mapping[str, Any]
STEPS = 8
TOKENS = (5, 6)
PROMPT = np.array([[8, 77, 12, 44, 3, 61, 90], [33, 21, 5, 6, 9, 70, 4]])
"""The second prompt has the invocation already; the last occurrence counts."""
TAIL = np.array([[5, 6, 40], [5, 6, 40]])
FULL = np.concatenate([PROMPT, TAIL], 1)


def adapter(model: Any, seed: int, rank: int, tokens: Sequence[int] = ()) -> Adapter:
    """A random one for the layers' weights, so large that it changes what is generated."""
    entries = {}
    for target in lora_fx.find(model).targets:
        if ".0." in target.key or ".1." in target.key:
            a, b = draw(target.key, target.layout, rank, seed, "probe")
            entries[target.key] = lora_fx.LowRank(a, b, 0.5 * rank, target.layout)
    return Adapter(entries, {INVOCATION: [*tokens]} if tokens else {})


class Files:
    """A model, an aLoRA, a LoRA and another aLoRA, and its files with a cache."""

    def __init__(self, name: str, folder: Path) -> None:
        self.model = MODELS[name]()
        captured = decoder(self.model)
        self.adapters = {
            "checker": adapter(captured, 1, 3, TOKENS),
            "french": adapter(captured, 2, 5),
            "judge": adapter(captured, 3, 2, [40]),
        }
        self.folder = folder
        self.base, self.switch, self.batch = (
            folder / f"{kind}.onnx" for kind in ("base", "switch", "batch")
        )
        lora_fx.export(captured, self.base, cache=True, provider="cpu")
        self.reports = {
            mode: lora_fx.export(
                captured, folder / f"{mode}.onnx", adapters=self.adapters, mode=mode, cache=True,
                provider="cpu",
            )
            for mode in ("switch", "batch")
        }  # fmt: skip
        self.session = Session(self.switch, "cpu")
        for each in self.adapters:
            self.session.load(each, folder / f"{each}.onnx_adapter")

    def past(self, rows: int) -> dict[str, Any]:
        """An empty cache."""
        inputs = [i for i in onnx.load(self.base).graph.input if "past" in i.name]
        sizes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in inputs}
        return {n: np.zeros((rows, s[1], 0, s[3]), np.float32) for n, s in sizes.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    yield Files("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=MODELS)
def any_files(request: Any, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Files:
    if request.param == "llama":
        return files
    return Files(request.param, tmp_path_factory.mktemp(request.param))


def feeds(ids: Any, past: Arrays, seen: int = 0) -> dict[str, Any]:
    mask = np.ones((len(ids), seen + ids.shape[1]), np.int64)
    return {"input_ids": ids, "attention_mask": mask, **past}


def past_of(outputs: Arrays) -> dict[str, Any]:
    return {
        name.replace("present", "past_key_values"): value
        for name, value in outputs.items()
        if name.startswith("present")
    }


def caches(outputs: Arrays, tokens: int) -> dict[str, bytes]:
    """The bits of the first tokens' keys and values."""
    return {name: value[:, :, :tokens].tobytes() for name, value in past_of(outputs).items()}


def generate(run: Any, ids: Any, past: Arrays, seen: int = 0) -> Any:
    """Tokens of greedy generation, from a cache of `seen` tokens on."""
    tokens = []
    for _ in range(STEPS):
        outputs = run(feeds(ids, past, seen))
        seen += ids.shape[1]
        ids = outputs["logits"][:, -1].argmax(-1)[:, None]
        past = past_of(outputs)
        tokens.append(ids)
    return np.concatenate(tokens, 1)


def test_the_cache_before_the_invocation_is_the_bases_to_the_bit(any_files: Files) -> None:
    session = any_files.session
    own = open_session(any_files.base, "cpu").run(feeds(FULL, any_files.past(2)))
    base = session.run(feeds(FULL, any_files.past(2)))
    adapted = session.run(feeds(FULL, any_files.past(2)), adapter="checker")
    before = PROMPT.shape[1]
    assert adapter_starts(FULL, TOKENS).tolist() == [before, before]
    assert caches(base, 99) == caches(own, 99), "the base's own file, at the same shapes"
    assert caches(adapted, before) == caches(base, before)
    assert (adapted["logits"][:, :before] == base["logits"][:, :before]).all()
    assert (adapted["logits"][:, before:] != base["logits"][:, before:]).any(-1).all()
    prompt_alone = session.run(feeds(PROMPT, any_files.past(2)))
    for name, value in past_of(prompt_alone).items():
        np.testing.assert_allclose(past_of(adapted)[name][:, :, :before], value, atol=1e-6)


def test_tokens_are_those_of_peft_from_the_bases_cache(any_files: Files, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora_fx.save_adapter(any_files.adapters["checker"], tmp_path / "checker")
    theirs = peft.PeftModel.from_pretrained(any_files.model, tmp_path / "checker").eval()
    call = {"input_ids": torch.tensor(FULL), "attention_mask": torch.ones(FULL.shape).long()}
    with torch.no_grad():
        logits = theirs(**call).logits.numpy()
        expected = theirs.generate(**call, max_new_tokens=STEPS, do_sample=False)
    theirs.unload()

    session = any_files.session
    prefill = session.run(feeds(FULL, any_files.past(2)), adapter="checker")
    assert rel(prefill["logits"], logits) < 1e-6
    starts = adapter_starts(FULL, session.invocations["checker"])

    def run(inputs: Arrays) -> Any:
        return session.run({**inputs, "adapter_starts": starts}, adapter="checker")

    prompt = session.run(feeds(PROMPT, any_files.past(2)))
    tokens = generate(run, TAIL, past_of(prompt), PROMPT.shape[1])
    np.testing.assert_array_equal(tokens, expected.numpy()[:, FULL.shape[1] :])
    base = generate(session.run, TAIL, past_of(prompt), PROMPT.shape[1])
    assert (tokens != base).any(1).all(), "the adapter is seen"


def test_padding_on_the_left_counts_as_tokens(files: Files, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ids = FULL.copy()
    ids[1] = [0, 0, 0, 33, 21, 9, 5, 6, 70, 4]
    mask = (np.arange(ids.shape[1]) >= np.array([[0], [3]])).astype(np.int64)
    assert adapter_starts(ids, TOKENS).tolist() == [7, 6]
    lora_fx.save_adapter(files.adapters["checker"], tmp_path / "checker")
    theirs = peft.PeftModel.from_pretrained(files.model, tmp_path / "checker").eval()
    call = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    with torch.no_grad():
        expected = theirs.generate(**call, max_new_tokens=STEPS, do_sample=False)
    theirs.unload()
    starts = {"adapter_starts": adapter_starts(ids, TOKENS)}

    def run(inputs: Arrays) -> Any:
        length = inputs["attention_mask"].shape[1] - mask.shape[1]
        whole = np.concatenate([mask, np.ones((2, length), np.int64)], 1)
        return files.session.run({**inputs, "attention_mask": whole, **starts}, adapter="checker")

    tokens = generate(run, ids, files.past(2))
    np.testing.assert_array_equal(tokens, expected.numpy()[:, ids.shape[1] :])


def test_rows_of_base_lora_and_alora_in_one_batch(files: Files) -> None:
    names = ["", "checker", "french", "judge", "checker"]
    ids = np.stack([FULL[0], FULL[0], FULL[1], FULL[1], FULL[1]])
    ids[4, 2:4] = 50
    numbers = [0, *files.adapters]
    invoked = invocations(files.batch)
    assert [*invoked] == [*files.adapters]
    assert invoked == {"checker": (5, 6), "french": (), "judge": (40,)}
    starts = np.concatenate(
        [adapter_starts(row, invoked.get(name, ())) for row, name in zip(ids, names, strict=True)]
    )
    assert starts.tolist() == [0, 7, 0, 9, 7]
    session = open_session(files.batch, "cpu")
    by_row = {
        "adapter_ids": np.array([numbers.index(name or 0) for name in names]),
        "adapter_starts": starts,
    }
    together = generate(
        lambda inputs: session.run({**inputs, **by_row}), ids, files.past(len(names))
    )
    for row, name in enumerate(names):
        start = {"adapter_starts": starts[row : row + 1]}

        def alone(inputs: Arrays, name: str = name, start: Arrays = start) -> Any:
            return files.session.run({**inputs, **start}, adapter=name or None)

        expected = generate(alone, ids[row : row + 1], files.past(1))
        np.testing.assert_array_equal(together[row : row + 1], expected, err_msg=f"row {row}")
    assert len({tuple(tokens) for tokens in together.tolist()}) == len(names)


def test_numbers_of_starts(files: Files) -> None:
    """0 is a LoRA; beyond the row is the base, to the bit; within the past is everywhere."""
    session = files.session
    base = session.run(feeds(FULL, files.past(2)))

    def logits(start: int, adapter: str = "checker") -> Any:
        starts = {"adapter_starts": np.full(2, start)}
        return session.run({**feeds(FULL, files.past(2)), **starts}, adapter=adapter)["logits"]

    for start in (FULL.shape[1], NEVER):
        assert logits(start).tobytes() == base["logits"].tobytes()
    assert logits(-1).tobytes() == logits(0).tobytes()
    assert session.run(feeds(FULL, files.past(2)), adapter="french")["logits"].tobytes() == (
        logits(0, "french").tobytes()
    )
    plain = {**files.adapters["checker"].entries}
    session.load("plain", Adapter(plain))
    assert session.run(feeds(FULL, files.past(2)), adapter="plain")["logits"].tobytes() == (
        logits(0).tobytes()
    )


def test_a_past_needs_the_starts(files: Files) -> None:
    prompt = files.session.run(feeds(PROMPT, files.past(2)))
    step = feeds(TAIL, past_of(prompt), PROMPT.shape[1])
    with pytest.raises(LoraFxError, match="'adapter_starts' is missing: the adapter acts from"):
        files.session.run(step, adapter="checker")
    files.session.run(step, adapter="french")
    files.session.run(step)
    with pytest.raises(LoraFxError, match="begin to act at different tokens"):
        files.session.run(feeds(FULL, files.past(2)), adapter={"checker": 0.5, "french": 0.5})
    batch = open_session(files.batch, "cpu")
    by_row = {**feeds(FULL, files.past(2)), "adapter_ids": np.array([0, 1])}
    with pytest.raises(LoraFxError, match=r"'adapter_starts' is missing; expected int64 \[2\]"):
        batch.run(by_row)
    with pytest.raises(LoraFxError, match=r"'adapter_starts' is int32 \[2\]; expected int64"):
        batch.run({**by_row, "adapter_starts": np.array([0, 1], np.int32)})


def test_files_and_adapters_that_do_not_fit(files: Files, tmp_path: Path) -> None:
    moved = tmp_path / "other.onnx_adapter"
    moved.write_bytes((files.folder / "checker.onnx_adapter").read_bytes())
    with pytest.raises(LoraFxError, match="does not say from which tokens on it acts"):
        files.session.load("other", moved)
    captured = decoder(llama())
    plain = lora_fx.export(
        captured, tmp_path / "plain.onnx", adapters={"french": files.adapters["french"]},
        mode="switch", cache=True, provider="cpu", probe="none",
    )  # fmt: skip
    assert plain.ok
    graph = onnx.load(tmp_path / "plain.onnx", load_external_data=False).graph
    assert "adapter_starts" not in [value.name for value in graph.input]
    assert invocations(tmp_path / "plain.onnx") == {}
    with pytest.raises(LoraFxError, match="it is an aLoRA, and the file has no input"):
        Session(tmp_path / "plain.onnx", "cpu").load("checker", files.adapters["checker"])


def test_what_is_said(files: Files) -> None:
    for report in files.reports.values():
        assert report.ok
        notes = [note for note in report.warnings if "past" not in note]
        assert notes == [
            "no probe: an aLoRA (checker, judge) acts from its invocation tokens on, and a probe "
            "has one input for the base and all adapters"
        ]


def test_other_ways_out_are_refused_by_name(files: Files, tmp_path: Path) -> None:
    checker = {"checker": files.adapters["checker"]}
    call = {"input_ids": torch.tensor(FULL)}
    lora_fx.export(llama(), tmp_path / "x.onnx", (), call, provider="cpu", probe="none")
    with pytest.raises(LoraFxError, match=r"the file that it is exported from is an \.onnx graph"):
        lora_fx.export(tmp_path / "x.onnx", tmp_path / "y.onnx", adapters=checker, mode="switch")
    with pytest.raises(LoraFxError, match=r"a \.pt2 file of mode switch has no input"):
        lora_fx.export(llama(), tmp_path / "y.pt2", (), call, adapters=checker, mode="switch")
    with pytest.raises(LoraFxError, match="onnxruntime-genai gives a run no adapter_starts"):
        lora_fx.export(
            llama(), tmp_path / "y.onnx", adapters=checker, mode="switch", cache=True,
            genai=tmp_path / "genai",
        )  # fmt: skip
    names = {file.name.partition(".")[0] for file in tmp_path.iterdir()}
    assert names == {"x"}


def mask_nodes(path: Path) -> list[str]:
    """The nodes of the mask: op and what it reads, constants as numbers."""
    graph = onnx.load(path).graph
    numbers = {t.name: onnx.numpy_helper.to_array(t).tolist() for t in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    line = []

    def visit(name: str) -> str:
        if name in numbers:
            return str(numbers[name])
        if name not in made:
            return name
        node = made[name]
        return f"{node.op_type}({', '.join(visit(each) for each in node.input)})"

    for node in graph.node:
        if node.op_type == "Where" and "starts" in node.input[0]:
            line.append(visit(node.input[0]))
    return line


def test_the_mask_is_as_it_is_written_here(files: Files) -> None:
    places = (
        "Range(Gather(Shape(past_key_values.0.key), 2), Add(Gather(Shape(past_key_values.0.key), "
        "2), Gather(Shape(input_ids), 1)), 1)"
    )
    mask = f"Not(Less({places}, Reshape(adapter_starts, [-1, 1])))"
    for path in (files.switch, files.batch):
        nodes = mask_nodes(path)
        assert len(nodes) == 14, "seven targets of two layers"
        assert {*nodes} == {f"Reshape({mask}, [0, 0, 1])"}


@pytest.mark.parametrize("change", ["later", "earlier", "no past", "everywhere"])
def test_a_wrong_mask_is_seen(files: Files, tmp_path: Path, change: str) -> None:
    """What the tests above assert goes red for a file whose mask is wrong by one token."""
    model = onnx.load(files.switch)
    graph = model.graph
    ranges = next(node for node in graph.node if node.op_type == "Range")
    less = next(node for node in graph.node if ranges.output[0] in node.input)
    number = {"later": -1, "earlier": 1, "no past": 0, "everywhere": 10**6}[change]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(number), "moved"))
    moved = onnx.helper.make_node("Add", [ranges.output[0], "moved"], ["places"])
    if change == "no past":
        past = ranges.input[0]
        moved = onnx.helper.make_node("Sub", [ranges.output[0], past], ["places"])
    less.input[0] = "places"
    graph.node.insert([*graph.node].index(less), moved)
    onnx.save(model, tmp_path / "switch.onnx")
    session = Session(tmp_path / "switch.onnx", "cpu")
    session.load("checker", files.adapters["checker"])

    prompt = files.session.run(feeds(PROMPT, files.past(2)))
    starts = {"adapter_starts": adapter_starts(FULL, TOKENS)}
    step = {**feeds(TAIL, past_of(prompt), PROMPT.shape[1]), **starts}
    right = files.session.run(step, adapter="checker")["logits"]
    wrong = session.run(step, adapter="checker")["logits"]
    whole = {**feeds(FULL, files.past(2)), **starts}
    before = caches(files.session.run(whole), PROMPT.shape[1])
    cache_is_the_bases = caches(session.run(whole, adapter="checker"), PROMPT.shape[1]) == before
    assert rel(wrong, right) > 1e-3 or not cache_is_the_bases


def test_export_refuses_a_wrong_mask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The proof sees a start that is late by one token, and a first occurrence for the last."""
    from lora_fx.onnx import row_starts as module

    right = adapter_starts
    captured = decoder(llama())
    checker = {"checker": adapter(captured, 1, 3, TOKENS)}
    for mode, wrong in (("switch", 1), ("batch", -1)):
        monkeypatch.setattr(
            module, "adapter_starts",
            lambda ids, tokens, wrong=wrong: np.where(
                right(ids, tokens) == NEVER, NEVER, right(ids, tokens) + wrong
            ),
        )  # fmt: skip
        with pytest.raises(NoEffectError, match="differs"):
            lora_fx.export(
                captured, tmp_path / "x.onnx", adapters=checker, mode=mode, cache=True,
                provider="cpu",
            )  # fmt: skip
    assert not [*tmp_path.iterdir()]


class ByToken(torch.nn.Module):
    """Every token by itself; the smallest model with token ids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(96, 8)
        self.up = torch.nn.Linear(8, 16)
        self.head = torch.nn.Linear(16, 10)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.up(self.table(input_ids))))


CALL = (torch.tensor(FULL),)
ROWS = np.concatenate([FULL, np.full_like(FULL[:1], 7)])
"""The last row has no invocation."""


def small(seed: int, tokens: Sequence[int] = TOKENS) -> Adapter:
    """A random adapter of the model's layers."""
    entries = {}
    for target in lora_fx.find(ByToken(), CALL).targets:
        if target.key != "table.weight":
            a, b = draw(target.key, target.layout, 2, seed, "probe")
            entries[target.key] = lora_fx.LowRank(a, b, 2.0, target.layout)
    return Adapter(entries, {INVOCATION: [*tokens]} if tokens else {})


def exported(path: Path, *, mode: str = "switch", target: str = "cpu") -> Any:
    lora_fx.export(
        ByToken(), path, CALL, adapters={"mine": small(1)}, mode=mode, target=target,
        provider="cpu",
    )  # fmt: skip
    return path


def masked(adapter: Adapter) -> Any:
    """The reference in torch."""
    module = lora_fx.insert(ByToken(), CALL, adapter=adapter).eval()
    return module(torch.tensor(ROWS)).detach().numpy()


def output_of(path: Path, name: str, file: object, **more: Any) -> Any:
    session = Session(path, "cpu")
    session.load(name, file)
    return session.run({"input_ids": ROWS, **more}, adapter=name)["output"]


def test_the_file_of_a_portable_export_has_the_tokens(tmp_path: Path) -> None:
    path = exported(tmp_path / "x.onnx", target="portable")
    own = tmp_path / "mine.safetensors"
    assert lora_fx.load_adapter(own).invocation == TOKENS
    assert rel(output_of(path, "any", own), masked(small(1))) < 1e-6
    from lora_fx.formats.graph_inputs import write_inputs
    from lora_fx.onnx.manifest import manifest_of

    write_inputs(small(1, ()), manifest_of(path), own)
    with pytest.raises(LoraFxError, match=r"says nothing of invocation tokens.*\[5, 6\]"):
        output_of(path, "any", own)
    plain = own.rename(tmp_path / "plain.safetensors")
    assert output_of(path, "any", plain).shape == (3, 10, 10)


def test_no_file_is_written_under_the_name_of_other_tokens(tmp_path: Path) -> None:
    from lora_fx.formats.io import save_for

    path = str(exported(tmp_path / "x.onnx"))
    folder = tmp_path / "again"
    folder.mkdir()
    written = folder / "mine.onnx_adapter"
    for other, words in (
        (small(2, [40]), r"has the invocation tokens \[40\]"),
        (small(2, ()), "none"),
    ):
        with pytest.raises(LoraFxError, match=rf"{words}, and there 'mine' has \[5, 6\]") as caught:
            save_for(path, other, written, "onnx_adapter")
        assert caught.value.hint.startswith("load the adapter from its own file")
    with pytest.raises(LoraFxError, match="exported with no adapter of this name") as caught:
        save_for(path, small(2), folder / "other.onnx_adapter", "onnx_adapter")
    assert "pass -o mine.onnx_adapter" in caught.value.hint
    assert not [*folder.iterdir()]
    save_for(path, small(2), written, "onnx_adapter")
    assert rel(output_of(Path(path), "mine", written), masked(small(2))) < 1e-6
    assert rel(output_of(Path(path), "mine", small(3, [40])), masked(small(3, [40]))) < 1e-6


@pytest.mark.parametrize("shape", [(1,), (), (3, 1), (10,)])
def test_there_is_a_start_for_every_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    starts = np.full(shape, 2, np.int64)
    words = r"'adapter_starts' is int64 .*expected int64 \[3\]"
    path = exported(tmp_path / "x.onnx")
    with pytest.raises(LoraFxError, match=words):
        output_of(path, "mine", tmp_path / "mine.onnx_adapter", adapter_starts=starts)
    batch = exported(tmp_path / "y.onnx", mode="batch")
    feeds = {"input_ids": ROWS, "adapter_ids": np.ones(3, np.int64), "adapter_starts": starts}
    with pytest.raises(LoraFxError, match=words):
        open_session(batch, "cpu").run(feeds)


def test_why_there_is_no_probe(tmp_path: Path) -> None:
    path = exported(tmp_path / "x.onnx")
    with pytest.raises(LoraFxError, match="it has no probe") as caught:
        Session(path, "cpu", check=True)
    assert caught.value.hint.startswith("it holds an aLoRA")


def test_whole_tensors_know_no_invocation(tmp_path: Path) -> None:
    module = lora_fx.insert(
        ByToken(), CALL, rank=2, include="up", also_train=["head"], invocation=TOKENS
    )
    assert any("acts on every token of every row" in note for note in module.notes)
    for mode in ("switch", "batch"):
        with pytest.raises(LoraFxError, match=r"mine is an aLoRA that replaces 'head.bias' as a"):
            lora_fx.export(
                ByToken(), tmp_path / "x.onnx", CALL, adapters={"mine": module.adapter()},
                mode=mode, provider="cpu",
            )  # fmt: skip
    assert not [*tmp_path.iterdir()]
