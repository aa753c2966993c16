"""Decoders with their cache: the tokens of transformers' generate, from the file alone."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import draw
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.decoder import decoder
from lora_fx.onnx import Session
from lora_fx.onnx.session import open_session
from tests.onnx.decoders import MODELS, gpt2, write_tokenizer
from tests.providers import PROVIDERS

pytest.importorskip("transformers")
STEPS = 20
IDS = np.array([[5, 17, 29, 31, 8, 77, 12], [0, 0, 0, 0, 44, 3, 61], [0, 90, 33, 21, 4, 9, 70]])
MASK = (np.arange(7) >= np.array([[0], [4], [1]])).astype(np.int64)
SINGLE = (IDS[0], IDS[1, 4:], IDS[2, 6:])
"""Prompts of seven, three and one token."""


def adapter(model: Any, seed: int, rank: int) -> Adapter:
    """A random one for every layer's weights, so large that it changes what is generated."""
    entries = {}
    layers = [t for t in lora_fx.find(model).targets if re.search(r"\.\d+\.", t.key)]
    for target in layers:
        a, b = draw(target.key, target.layout, rank, seed, "probe")
        entries[target.key] = lora_fx.LowRank(a, b, 0.5 * rank, target.layout)
    return Adapter(entries)


def with_delta(model: Any, updates: Adapter | None) -> Any:
    """A copy with W + s·BA in its weights, summed in fp64."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, delta in (updates.deltas() if updates else {}).items():
            parameters[key].copy_(parameters[key].double() + torch.tensor(delta))
    return model


def generated(model: Any, ids: Any, mask: Any, cache: bool = True) -> Any:
    call = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    out = model.generate(**call, max_new_tokens=STEPS, do_sample=False, use_cache=cache)
    return out.numpy()


def greedy(run: Any, inputs: Any, ids: Any, mask: Any, cache: bool = True) -> Any:
    """Tokens by a file; without the cache the whole sequence goes in at every step."""
    empty = {
        i.name: np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32)
        for i in inputs
        if i.name.startswith("past_key_values.")
    }
    tokens, new, past = ids, ids, empty
    for _ in range(STEPS):
        out = run({"input_ids": new, "attention_mask": mask, **past})
        new = out["logits"][:, -1].argmax(-1)[:, None]
        tokens = np.concatenate([tokens, new], 1)
        mask = np.concatenate([mask, np.ones_like(new)], 1)
        if cache:
            past = {n: out[n.replace("past_key_values", "present")] for n in past}
        else:
            new = tokens
    return tokens


def check(run: Any, inputs: Any, model: Any, cache: bool = True) -> Any:
    """A batch and single prompts; the batch's tokens."""
    expected = generated(model, IDS, MASK, cache)
    np.testing.assert_array_equal(greedy(run, inputs, IDS, MASK, cache), expected)
    for prompt in SINGLE:
        ids, mask = prompt[None], np.ones((1, len(prompt)), np.int64)
        mine = greedy(run, inputs, ids, mask, cache)
        np.testing.assert_array_equal(mine, generated(model, ids, mask, cache))
    return expected


class Case:
    """A model, two adapters of different ranks, and its files."""

    def __init__(self, name: str, folder: Path) -> None:
        self.model = MODELS[name]()
        captured = self.captured = decoder(self.model)
        self.adapters = {"de": adapter(captured, 1, 3), "fr": adapter(captured, 2, 5)}
        self.merged, self.switch = folder / "merged.onnx", folder / "switch.onnx"
        self.captured, self.batch = captured, folder / "batch.onnx"
        before = copy.deepcopy(self.model.state_dict())
        config = self.model.config.to_dict()
        self.report = lora_fx.export(
            captured, self.merged, adapters=self.adapters["de"], cache=True, provider="cpu"
        )
        self.folder, self.shown = folder, {}
        if name == "llama":
            self.shown = self.by_command()
        else:
            lora_fx.export(
                captured, self.switch, adapters=self.adapters, cache=True, mode="switch",
                provider="cpu",
            )  # fmt: skip
        assert all(torch.equal(v, before[k]) for k, v in self.model.state_dict().items())
        assert self.model.config.to_dict() == config
        assert type(self.model) is type(MODELS[name]()) and not self.model.training

    def by_command(self) -> dict[str, Any]:
        """The switch file as the command line writes it, from a folder; what it prints."""
        copy.deepcopy(self.model).save_pretrained(self.folder / "model")  # writes into its config
        write_tokenizer(self.folder / "model")
        (self.folder / "model" / "generation_config.json").write_text('{"eos_token_id": 95}')
        for name, one in self.adapters.items():
            lora_fx.save_adapter(one, self.folder / name)
        argv = [*self.argv(*self.adapters), "-o", str(self.switch), "--mode", "switch", "--json"]
        argv += ["--genai", str(self.folder / "genai")]
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            assert run(argv) == 0
        return dict(json.loads(shown.getvalue()))

    def batch_file(self) -> Path:
        """All adapters in one file, proven at steps of one token too; written once."""
        if not self.batch.exists():
            report = lora_fx.export(
                self.captured, self.batch, adapters=self.adapters, cache=True, mode="batch",
                provider="cpu",
            )  # fmt: skip
            steps = [(p.sizes["input_ids"][1], p.sizes["attention_mask"][1]) for p in report.parity]
            assert [n for n, _ in steps[:4]] == [5, 7, 11, 1] and {k - n for n, k in steps} > {0}
        return self.batch

    def argv(self, *adapters: str) -> list[str]:
        given = [str(self.folder / n) for n in ("model", *adapters)]
        return ["export", *given, "--cache", "--provider", "cpu"]


def run(argv: list[str]) -> int:
    from lora_fx.cli import main

    with pytest.raises(SystemExit) as stop:
        main(argv)
    return int(stop.value.code or 0)


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_merged_gives_the_tokens_of_generate(case: Case, provider: str) -> None:
    session = open_session(case.merged, provider)
    inputs, model = session.session.get_inputs(), with_delta(case.model, case.adapters["de"])
    tokens = check(session.run, inputs, model)
    np.testing.assert_array_equal(tokens, check(session.run, inputs, model, cache=False))
    assert (tokens != generated(case.model, IDS, MASK)).any(1).all()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_switch_gives_them_for_two_adapters_in_one_session(case: Case, provider: str) -> None:
    session = Session(case.switch, provider)
    found = []
    for name in case.adapters:
        session.load(name, case.switch.with_name(f"{name}.onnx_adapter"))
    for name in ("de", None, "fr"):
        model = with_delta(case.model, case.adapters[name] if name else None)
        found.append(
            check(lambda f, n=name: session.run(f, n), session.session.get_inputs(), model)
        )
    assert (found[0] != found[1]).any() and (found[0] != found[2]).any()
    assert (found[1] != found[2]).any()


def test_rows_of_a_batch_decode_with_adapters_of_their_own(case: Case, tmp_path: Path) -> None:
    """The tokens of merged files and of generate, each prompt alone and without its padding."""
    session, rows = open_session(case.batch_file(), "cpu"), np.array([0, 1, 2, 0, 1, 2, 0])
    who = [None, *case.adapters]
    ids = np.array([1, 2, 0, 2, 1, 2, 0])
    given = session.session.get_inputs()
    assert [(i.name, i.shape) for i in given if "adapter" in i.name] == [("adapter_ids", ["batch"])]
    tokens = greedy(lambda f: session.run({**f, "adapter_ids": ids}), given, IDS[rows], MASK[rows])
    merged = {"de": case.merged, "fr": tmp_path / "fr.onnx"}
    lora_fx.export(
        case.captured, merged["fr"], adapters=case.adapters["fr"], cache=True, provider="cpu"
    )
    alone = {n: open_session(path, "cpu") for n, path in merged.items()}
    seen = set()
    for row, (prompt, i) in enumerate(zip(rows, ids, strict=True)):
        whole, name = IDS[prompt : prompt + 1, MASK[prompt] == 1], who[i]
        mask = np.ones_like(whole)
        updates = case.adapters[name] if name else None
        expected = generated(with_delta(case.model, updates), whole, mask)[0, -STEPS:]
        np.testing.assert_array_equal(tokens[row, -STEPS:], expected)
        if name:
            inputs = alone[name].session.get_inputs()
            theirs = greedy(alone[name].run, inputs, whole, mask)[0, -STEPS:]
            np.testing.assert_array_equal(tokens[row, -STEPS:], theirs)
        seen.add((int(prompt), *expected))
    assert len(seen) == 7, "adapters too alike to tell"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_the_command_line_writes_the_same_batch_file(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "b.onnx"
    assert run([*case.argv(*case.adapters), "-o", str(out), "--mode", "batch"]) == 0
    assert out.read_bytes() == case.batch_file().read_bytes()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_file_with_a_cache_takes_another_adapter(
    case: Case, tmp_path: Path, provider: str
) -> None:
    report = lora_fx.export(
        case.merged, tmp_path / "l.onnx", mode="load", adapters={"fr": case.adapters["fr"]},
        provider=provider,
    )  # fmt: skip
    assert {p.sizes["past_key_values.0.key"][2] for p in report.parity} == {3, 0, 4, 2}
    session = Session(tmp_path / "l.onnx", provider, adapter=tmp_path / "fr.onnx_adapter")
    both = with_delta(with_delta(case.model, case.adapters["de"]), case.adapters["fr"])
    tokens = check(session.run, session.session.get_inputs(), both)
    assert (tokens != generated(with_delta(case.model, case.adapters["de"]), IDS, MASK)).any()
    with pytest.raises(LoraFxError, match="export cannot add a cache to it"):
        lora_fx.export(case.merged, tmp_path / "n.onnx", cache=True)


def test_logits_by_steps_equal_one_forward(case: Case) -> None:
    session = open_session(case.merged, "cpu")
    model = with_delta(case.model, case.adapters["de"])
    tokens = np.concatenate([IDS, IDS[:, ::-1].clip(1)], 1)
    mask = np.concatenate([MASK, np.ones_like(MASK)], 1)
    places = torch.tensor((mask.cumsum(1) - 1).clip(0))
    call = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
    with torch.no_grad():
        narrow = model(**call, position_ids=places).logits.numpy()
        full = copy.deepcopy(model).double()(**call, position_ids=places).logits.numpy()
    real = mask == 1  # what stands on padding is read by nothing
    gate = 4 * rel(narrow[real], full[real]) + 4 * 2.0**-24
    assert gate < 2e-5
    past = {
        i.name: np.zeros((3, i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.session.get_inputs()[2:]
    }
    done = 0
    for size in (7, 1, 3, 1, 2):
        feeds = {
            "input_ids": tokens[:, done : done + size],
            "attention_mask": mask[:, : done + size],
        }
        out = session.run({**feeds, **past})
        past = {n: out[n.replace("past_key_values", "present")] for n in past}
        seen = real[:, done : done + size]
        assert rel(out["logits"][seen], full[:, done : done + size][seen]) <= gate
        done += size
    assert done == 14
    for n, x in past.items():
        assert x.shape[2] == 14 and x.shape[1] == (2 if "Llama" in type(model).__name__ else 3), n


def test_names_and_dimensions(case: Case) -> None:
    model = onnx.load(case.merged)
    onnx.checker.check_model(model, full_check=True)

    def named(values: Any) -> dict[str, list[Any]]:
        return {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in values
        }

    inputs, outputs = named(model.graph.input), named(model.graph.output)
    heads = 2 if "llama" in str(case.merged) else 3
    pairs = [f"{i}.{k}" for i in range(2) for k in ("key", "value")]
    assert inputs == {
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "past + length"],
        **{f"past_key_values.{p}": ["batch", heads, "past", 8] for p in pairs},
    }
    assert list(outputs) == ["logits", *(f"present.{p}" for p in pairs)]
    assert outputs["logits"] == ["batch", "length", 96]
    weights = {i.name for i in model.graph.initializer}
    assert set(case.adapters["de"]) <= weights
    assert {p.of for p in case.report.parity} == {"fold", "onnxruntime"}
    pasts = {p.sizes["past_key_values.0.key"][2] for p in case.report.parity}
    assert pasts == {3, 0, 4, 2}
    assert {p.sizes["input_ids"][1] for p in case.report.parity} == {5, 7, 11, 1}


def test_the_inputs_of_the_check_fit_and_have_padding(case: Case) -> None:
    inputs = case.captured.bounded_inputs()
    heads = 2 if "llama" in str(case.merged) else 3
    assert inputs.checks == ((2, 5), (3, 7), (1, 11), (2, 1))
    for size, past, padded in zip(inputs.checks, (3, 0, 4, 2), (1, 0, 1, 1), strict=True):
        drawn = inputs.sample(size)
        assert drawn["input_ids"].shape == size and drawn["input_ids"].max() < 96
        assert drawn["past_key_values.1.value"].shape == (size[0], heads, past, 8)
        mask = np.ones((size[0], past + size[1]), np.int64)
        mask[0, :padded] = 0
        np.testing.assert_array_equal(drawn["attention_mask"], mask)


def test_an_adapted_module_brings_its_adapter_and_the_graph_may_be_optimised(
    tmp_path: Path,
) -> None:
    model = gpt2(layers=1)
    call = {"input_ids": torch.tensor(IDS), "use_cache": False}
    module = lora_fx.insert(model, (), call, rank=3, include="c_attn")
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    path = tmp_path / "m.onnx"
    report = lora_fx.export(module, path, cache=True, optimise=True, provider="cpu")
    assert any(s["kept"] for s in report.details["stages"])
    session = open_session(path, "cpu")
    inputs, folded = session.session.get_inputs(), with_delta(model, module.adapter())
    mask = np.ones_like(IDS[:1])
    tokens = greedy(session.run, inputs, IDS[:1], mask)
    np.testing.assert_array_equal(tokens, generated(folded, IDS[:1], mask))
    assert (tokens != generated(model, IDS[:1], mask)).any()
    module.load_state_dict(module.state_dict())  # its weights are now its own
    with pytest.raises(LoraFxError, match="no longer those of the model"):
        lora_fx.export(module, tmp_path / "n.onnx", cache=True)


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_the_command_line(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokens of the file that it wrote are those of `test_switch_gives_them…`."""
    out = tmp_path / "m.onnx"
    argv = [*case.argv("de"), "-o", str(out)]
    for more, words in (
        (("--dynamic", "input_ids:1"), "sets the inputs and their dimensions itself"),
        (("--mode", "train"), "mode train has no cache"),
    ):
        assert run(argv + list(more)) == 2
        assert words in capsys.readouterr().err
        assert not out.exists()
    assert [i["name"] for i in case.shown["inputs"]][:3] == [
        "input_ids", "attention_mask", "past_key_values.0.key",
    ]  # fmt: skip
    assert case.shown["inputs"][1]["shape"] == ["batch", "past + length"]


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_a_folder_for_genai(case: Case) -> None:
    """The file, its adapters and the tokenizer of the model's folder, by the command line."""
    folder, beside = case.folder / "genai", case.switch.parent
    adapters = [f"{n}.onnx_adapter" for n in case.adapters]
    told = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    named = {p.name for p in folder.iterdir()} - {"lora_fx.json"}
    assert named == {"genai_config.json", "model.onnx", *adapters, *told}
    assert {str(folder / n) for n in named} <= set(case.shown["outputs"])
    assert (folder / "model.onnx").read_bytes() == case.switch.read_bytes()
    for name in adapters:
        assert (folder / name).read_bytes() == (beside / name).read_bytes()
    config = json.loads((folder / "genai_config.json").read_text())
    model, decoder = config["model"], config["model"]["decoder"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("llama", 96, 64)
    assert (model["eos_token_id"], model["pad_token_id"]) == (95, 0)
    sizes = ("num_attention_heads", "num_key_value_heads", "head_size", "hidden_size")
    assert [decoder[n] for n in (*sizes, "num_hidden_layers")] == [4, 2, 8, 24, 2]
