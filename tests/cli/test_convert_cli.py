"""lora-fx convert: formats told by content and by name, refusals, and nothing left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.expert_families import family_of
from lora_fx.adapter.expert_layouts import LAYOUTS, laid
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.cli import main
from lora_fx.files.tensor_files import read_tensors, write_tensors
from lora_fx.formats.io import format_for, format_of, load_adapter, save_adapter

A, B = (
    np.random.default_rng(i).standard_normal(s).astype("f4") for i, s in ((0, (2, 6)), (1, (8, 2)))
)


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["convert", *argv])
    return int(stop.value.code or 0)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    low = LowRank(A, B, 3.0)
    save_adapter(Adapter({"up_blocks.0.a_b.weight": low}, {"dropout": 0.0}), "start")
    return tmp_path


def test_there_and_back(made: Path, capsys: Any) -> None:
    for source, out, name in (
        ("start", "k.safetensors", "kohya"),
        ("k.safetensors", "d.safetensors", "diffusers"),
        ("d.safetensors", "end", "peft"),
    ):
        assert run(source, "-o", out, "--format", name) == 0
        assert format_of(out) == name
    assert "1 update, diffusers → peft" in capsys.readouterr().out
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (made / "start" / file).read_bytes() == (made / "end" / file).read_bytes()


def test_json_and_notes(made: Path, capsys: Any) -> None:
    assert run("start", "-o", "x.onnx_adapter", "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["from"] == "peft" and whole["to"] == "onnx_adapter" and whole["updates"] == 1
    assert whole["outputs"] == ["x.onnx_adapter"] and "scales" in whole["warnings"][0]


def test_names_need_the_base(made: Path, capsys: Any) -> None:
    names = {"lora_down.weight": A, "lora_up.weight": B}
    save_file({f"lora_unet_a_b_c.{k}": v for k, v in names.items()}, "k.safetensors")
    assert run("k.safetensors", "-o", "out") == 2
    assert "--base" in capsys.readouterr().err and not Path("out").exists()
    Path("base").mkdir()
    write_tensors(Path("base/model.safetensors"), {"a.b_c.weight": np.zeros((8, 6), "f4")}, {})
    assert run("k.safetensors", "-o", "out", "--base", "base") == 0
    assert list(load_adapter("out")) == ["a.b_c.weight"]


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["start", "-o", "x.safetensors"], "pass --format with one of peft, kohya"),
        (["start", "-o", "x.bin"], "the file name does not determine the format"),
        (["start", "-o", "x", "--format", "kohya"], "needs a name that ends in .safetensors"),
        (["start", "-o", "x.onnx_adapter", "--format", "peft"], "format peft needs"),
        (["start", "-o", "x.safetensors", "--format", "gguf"], "a name that ends in .gguf"),
        (["start", "-o", "start"], "start exists"),
        (["gone", "-o", "x"], "no such file"),
        (
            ["odd.safetensors", "-o", "x"],
            "not an adapter in a known format: its tensors (1) are named odd",
        ),
        (["two.safetensors", "-o", "x"], "the format is ambiguous, kohya or torchtune"),
        (["lone.safetensors", "-o", "x"], "no adapter_config.json next to it"),
    ],
)
def test_refused(made: Path, capsys: Any, argv: list[str], word: str) -> None:
    save_file({"odd": A}, "odd.safetensors")
    save_file({"x.lora_a.weight": A, "x.lora_down.weight": A}, "two.safetensors")
    save_file({"x.lora_A.weight": A, "x.lora_B.weight": B}, "lone.safetensors")
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert word in err and err.startswith("Error: ") and err.count("\n") == 2
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*")} == before


def test_force(made: Path) -> None:
    Path("x.onnx_adapter").write_bytes(b"old")
    assert run("start", "-o", "x.onnx_adapter") == 2
    assert run("start", "-o", "x.onnx_adapter", "--force") == 0
    assert format_of("x.onnx_adapter") == "onnx_adapter"


def test_formats_that_names_ask_for() -> None:
    assert format_for("pytorch_lora_weights.safetensors") == "diffusers"
    assert format_for("my-adapter-v1.5") == "peft"


def test_needs_no_torch(made: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom lora_fx.cli import main\n"
        "try:\n    main(['convert', 'start', '-o', 'k.safetensors', '--format', 'kohya'])\n"
        "finally:\n    print(sorted({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


def test_some_updates_alone(made: Path, capsys: Any) -> None:
    low = LowRank(A, B, 3.0)
    names = [f"model.layers.{i}.{p}_proj.weight" for i in range(2) for p in "qv"]
    save_adapter(Adapter(dict.fromkeys(names, low)), "many")
    rows = [
        (["--include", "q_proj"], {names[0], names[2]}),
        (["--include", "layers.0.*,re:1.v_"], {names[0], names[1], names[3]}),
        (["--exclude", "layers.1.*"], {*names[:2]}),
        (["--include", "q_proj", "--exclude", "layers.1.*"], {names[0]}),
    ]
    for i, (more, kept) in enumerate(rows):
        assert run("many", "-o", f"part{i}", *more) == 0
        assert set(load_adapter(f"part{i}")) == kept
    capsys.readouterr()
    for more, words in (
        (["--include", "k_proj"], "include 'k_proj' matches no parameter"),
        (["--exclude", "*"], "no update of the adapter is left"),
    ):
        assert run("many", "-o", "none", *more) == 2
        assert words in capsys.readouterr().err and not Path("none").exists()


def experts(*, split: bool, halves: str = "gate_up_proj down_proj") -> Adapter:
    """Stacks of 3 experts, hidden 6, inner 5; or the same one by one, under Mixtral's names."""
    rng, entries = np.random.default_rng(0), {}
    for leaf, out, in_ in (("gate_up_proj", 10, 6), ("down_proj", 6, 5)):
        a = rng.standard_normal((3, 2, in_)).astype("f4")
        b = rng.standard_normal((3, out, 2)).astype("f4")
        if leaf in halves:
            entries[f"model.layers.0.mlp.experts.{leaf}"] = LowRank(
                a, b, 3.0, origin=Origin(op="experts")
            )
    given = laid(
        entries, LAYOUTS["per-expert" if split else "peft"], family_of(["mixtral"]), "0.21.2"
    )
    return Adapter(given, {"peft": {"peft_version": "0.21.2"}})


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Mixtral of one layer, as its file has it."""
    monkeypatch.chdir(tmp_path)
    sides = {"w1": (5, 6), "w2": (6, 5), "w3": (5, 6)}
    names = {f"{n}.{leaf}": size for n in range(3) for leaf, size in sides.items()}
    lead = "model.layers.0.block_sparse_moe.experts"
    tensors = {f"{lead}.{k}.weight": np.ones(size, "f4") for k, size in names.items()}
    Path("base").mkdir()
    save_file(tensors, "base/model.safetensors")
    Path("base/config.json").write_text(json.dumps({"model_type": "mixtral"}))
    return tmp_path


def tensors_of(folder: str) -> dict[str, Any]:
    return read_tensors(Path(folder) / "adapter_model.safetensors")[0]


def test_experts_by_the_base_and_by_its_type(mixture: Path, capsys: Any) -> None:
    save_adapter(experts(split=False), "stacks")
    for name, lead in (
        ("vllm", "block_sparse_moe.experts.2.w3"),
        ("sglang-3d", "mlp.experts.up_proj"),
    ):
        for how in (("--base", "base"), ("--model-type", "mixtral")):
            assert run("stacks", "-o", "x", "--format", name, *how, "--force", "--json") == 0
            assert json.loads(capsys.readouterr().out)["to"] == name
            assert f"base_model.model.model.layers.0.{lead}.lora_A.weight" in tensors_of("x")
            assert run("x", "-o", "y", "--format", "peft", *how, "--force") == 0
            capsys.readouterr()
            one, two = tensors_of("stacks"), tensors_of("y")
            assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize(
    ("adapter", "name", "said"),
    [
        (experts(split=False), "per-expert", "whether rows of gate and up alternate"),
        (experts(split=False), "vllm", "whether vLLM reads stacks"),
        (experts(split=False), "peft-0.18", "[E, out, in] or [E, in, out]"),
        (experts(split=True), "peft", "whether rows of gate and up alternate"),
        (experts(split=False, halves="gate_up_proj"), "peft", "which axis of the experts is in"),
    ],
)
def test_what_shapes_do_not_tell_is_refused_until_the_type_is_given(
    mixture: Path, capsys: Any, adapter: Adapter, name: str, said: str
) -> None:
    save_adapter(adapter, "a")
    assert run("a", "-o", "x", "--format", name) == 2
    wrong = capsys.readouterr().err
    assert said in wrong and "--model-type TYPE" in wrong and not Path("x").exists()
    assert run("a", "-o", "x") == 0, "without --format experts stay as they are"
    for how in (("--base", "base"), ("--model-type", "mixtral")):
        assert run("a", "-o", "x", "--format", name, *how, "--force") == 0


def test_the_shapes_of_the_base_tell_what_no_release_does(mixture: Path, capsys: Any) -> None:
    save_adapter(experts(split=False, halves="gate_up_proj"), "a")
    config = json.loads(Path("a/adapter_config.json").read_text())
    Path("a/adapter_config.json").write_text(json.dumps({**config, "peft_version": None}))
    assert run("a", "-o", "x", "--format", "peft", "--model-type", "mixtral") == 2
    assert "releases of PEFT differ" in capsys.readouterr().err
    assert run("a", "-o", "x", "--format", "peft-0.18", "--base", "base") == 0
    one, two = tensors_of("a"), tensors_of("x")
    assert {k: v.shape for k, v in one.items()} != {k: v.shape for k, v in two.items()}
    assert run("x", "-o", "y", "--format", "peft", "--base", "base") == 0
    assert all(np.array_equal(v, one[k]) for k, v in tensors_of("y").items())


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        (lambda e: {k: v for k, v in e.items() if ".1.w3" not in k}, "peft", ".1 is missing"),
        (lambda e: {k: v for k, v in e.items() if ".w3" not in k}, "peft", "need one update each"),
        (lambda e: {**e, **{k.replace("w1", "gate_proj"): v for k, v in e.items()}}, "peft",
         "second update"),
        (lambda e: {**e, **{k.replace("w1", "gate_up_proj"): v for k, v in e.items()}}, "peft",
         "need one update each"),
        (lambda e: {**e, **{k.replace(".0.w2", ".77777777.w2"): v for k, v in e.items()}}, "peft",
         ".3 is missing"),
        (lambda e: {k: v for k, v in e.items() if ".2.w2" not in k}, "peft",
         "different numbers of experts"),
        (lambda e: {k: replace(v, alpha=4.0) if ".1.w2" in k else v for k, v in e.items()}, "peft",
         "another shape or scale"),
        (lambda e: {k: replace(v, alpha=4.0) if ".w2" in k else v for k, v in e.items()}, "sglang",
         "SGLang uses one rank and scale"),
        (lambda e: {k: v for k, v in e.items() if ".w2" not in k}, "vllm",
         "needs both gate_up_proj"),
        (lambda e: {k: replace(v, magnitude=np.ones(len(v.b), "f4")) for k, v in e.items()}, "peft",
         "expected lora or rslora in a stack"),
    ],
)  # fmt: skip
def test_experts_that_a_layout_cannot_say(
    mixture: Path, capsys: Any, change: Any, name: str, said: str
) -> None:
    adapter = experts(split=True)
    save_adapter(replace(adapter, entries=change(adapter.entries)), "a")
    assert run("a", "-o", "x", "--format", name, "--model-type", "mixtral") == 2
    wrong = capsys.readouterr().err
    assert said in wrong and "lora-fx merge" in wrong and not Path("x").exists()
    if len(change(adapter.entries)) > len(adapter.entries):
        return  # names of no base
    with pytest.raises(SystemExit) as stop:
        main(["merge", "base", "a", "-o", "merged"])
    assert not stop.value.code, "the hint works"


def test_doctor_says_what_a_server_makes_of_it(mixture: Path, capsys: Any) -> None:
    save_adapter(experts(split=False), "stacks")
    for server, code, said in (
        ("vllm", 1, "vLLM 0.33.0 drops experts of a module that it names differently"),
        ("sglang", 1, "SGLang 0.5.23 refuses stacks under PEFT's names"),
        ("peft", 0, "PEFT 0.21.2 reads stacks"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["doctor", "base", "stacks", "--server", server])
        out = capsys.readouterr().out
        assert int(stop.value.code or 0) == code and said in out
        hint = f"lora-fx convert stacks -o OUT --format {server} --base base"
        assert (hint in out) == bool(code)
        if code:
            assert run(*hint.replace("OUT", server).split()[2:]) == 0
            capsys.readouterr()
            with pytest.raises(SystemExit):
                main(["doctor", "base", server, "--server", server, "--json"])
            found = json.loads(capsys.readouterr().out)["findings"]
            left = [f for f in found if f["check"] == "server"]
            assert left and all(f["severity"] == "note" for f in left), "the hint mends it"
    save_file({"lora_unet_x.lora_down.weight": A, "lora_unet_x.lora_up.weight": B}, "k.safetensors")
    with pytest.raises(SystemExit):
        main(["doctor", "base", "k.safetensors", "--server", "vllm"])
    assert "the file is not in PEFT's format" in capsys.readouterr().out
