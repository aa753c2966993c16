"""Folders for onnxruntime-genai: what genai_config.json says, and what is refused.

tests/onnx/test_decoder.py makes one by the command line, in mode switch. That the runtime generates
transformers' tokens from such folders is tests/onnx/test_genai_runtime.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.files.side_outputs import Beside
from lora_fx.fx.capture import decoder
from lora_fx.onnx.genai import GenaiFolder, genai_folder

GENERATION = {"eos_token_id": [95, 7], "temperature": 0.75, "do_sample": True, "max_new_tokens": 9}
FILES = {"tokenizer.json": "{}", "tokenizer_config.json": "[]", "chat_template.jinja": "{{ m }}"}
OTHERS = ("config.json", "model.safetensors", "notes.md", "tokenizing.py")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in (*FILES.items(), *((n, "") for n in OTHERS)):
        (folder / name).write_text(text)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def settings(**changed: Any) -> Any:
    """A config as transformers has them: with fields of its own, and those of the text."""
    fields = {
        "model_type": "llama", "max_position_embeddings": 64, "hidden_size": 24,
        "num_attention_heads": 4, "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 0,
    } | changed  # fmt: skip
    text = SimpleNamespace(**fields)
    return SimpleNamespace(_name_or_path="model", get_text_config=lambda: text)


def write_decoder(path: Path, widths: tuple[int, int] = (8, 8), data: str = "") -> None:
    """A file with the inputs and outputs of a decoder of two heads, three layers and 96 tokens."""
    kind, whole, dims = TensorProto.FLOAT, TensorProto.INT64, ("batch", 2, "past")
    make = helper.make_tensor_value_info
    inputs = [make(n, whole, ["batch", n]) for n in ("input_ids", "attention_mask")]
    outputs = [make("logits", kind, ["batch", "length", 96])]
    table = helper.make_tensor("table", kind, [97, 96], bytes(4 * 97 * 96), raw=True)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["logits"])]
    for i in range(3):
        for part, width in zip(("key", "value"), widths, strict=True):
            names = f"past_key_values.{i}.{part}", f"present.{i}.{part}"
            inputs.append(make(names[0], kind, [*dims, width]))
            outputs.append(make(names[1], kind, [*dims, width]))
            nodes.append(helper.make_node("Identity", [names[0]], [names[1]]))
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, [table])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path, save_as_external_data=bool(data), location=data or None)


def files(folder: Path) -> set[str]:
    """What lies in a folder, but for the list by which lora-fx knows its own."""
    return {p.name for p in folder.iterdir()} - {"lora_fx.json"}


def place(made: GenaiFolder, model: Path, *adapters: Path) -> list[Path]:
    with Beside() as beside:
        return made.place(model, beside, adapters)


def test_what_is_in_the_folder(source: Path) -> None:
    """Sizes of the file and of the config, ids and search of generation_config.json."""
    write_decoder(Path("m.onnx"), data="m.onnx.data")
    Path("de.onnx_adapter").write_text("de")
    made = genai_folder("genai", Path("m.onnx"), settings(), force=False)
    assert made.notes == [
        "model/generation_config.json: these fields are left out, since genai_config.json does not "
        "have them: max_new_tokens"
    ]
    written = place(made, Path("m.onnx"), Path("de.onnx_adapter"))
    names = {"genai_config.json", "model.onnx", "m.onnx.data", "de.onnx_adapter", *FILES}
    assert files(Path("genai")) == names == {p.name for p in written}
    for name, origin in {
        "model.onnx": "m.onnx", "m.onnx.data": "m.onnx.data", "de.onnx_adapter": "de.onnx_adapter",
        **{n: f"model/{n}" for n in FILES},
    }.items():  # fmt: skip
        assert Path("genai", name).read_bytes() == Path(origin).read_bytes()
    assert json.loads(Path("genai/genai_config.json").read_text()) == {
        "model": {
            "type": "llama", "vocab_size": 96, "context_length": 64, "pad_token_id": 0,
            "eos_token_id": [95, 7],
            "decoder": {
                "filename": "model.onnx", "session_options": {"provider_options": []},
                "head_size": 8, "hidden_size": 24, "num_attention_heads": 4,
                "num_key_value_heads": 2, "num_hidden_layers": 3,
                "inputs": {
                    "input_ids": "input_ids", "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits", "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": True, "temperature": 0.75, "top_k": 50, "top_p": 1.0,
            "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1,
            "length_penalty": 1.0, "early_stopping": False, "min_length": 0,
            "num_return_sequences": 1, "max_length": 64, "past_present_share_buffer": False,
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("made_for", "options"),
    [
        ("cpu", []),
        ("cuda", [{"cuda": {"enable_cuda_graph": "0"}}]),
        ("webgpu", [{"webgpu": {}}]),
        ("portable", []),
    ],
)
def test_the_provider_is_that_of_the_target(source: Path, made_for: str, options: Any) -> None:
    """With a cache that grows the runtime refuses CUDA graphs; the builder's own names, 0.18.0."""
    write_decoder(Path("m.onnx"))
    made = genai_folder("genai", Path("m.onnx"), settings(), force=False, made_for=made_for)
    place(made, Path("m.onnx"))
    config = json.loads(Path("genai/genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"] == {"provider_options": options}


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        ({}, {}, {"eos_token_id": 3, "pad_token_id": 0}),
        ({"eos_token_id": 5}, {"pad_token_id": None}, {"eos_token_id": 5, "pad_token_id": 5}),
        (
            {"eos_token_id": [9, 4], "bos_token_id": 2},
            {"pad_token_id": None, "bos_token_id": 1},
            {"eos_token_id": [9, 4], "pad_token_id": 9, "bos_token_id": 2},
        ),
        (None, {"bos_token_id": 1}, {"eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 1}),
        # what the runtime has no type for, or another one, is a decoder
        ({}, {"model_type": "gpt2"}, {"type": "decoder"}),
        ({}, {"model_type": "qwen2"}, {"type": "qwen2"}),
        # what is no value of a field's kind is left out, and said
        ({"top_k": "many"}, {}, {"top_k": 50, "said": "top_k"}),
        ({"do_sample": 1, "penalty_alpha": 0.6}, {}, {"do_sample": False, "said": "do_sample, pe"}),
        (
            {"top_p": None, "top_k": 5, "use_cache": True, "_from": 1},
            {},
            {"top_p": 1.0, "top_k": 5},
        ),
        ({"max_length": 64}, {}, {"max_length": 64}),
    ],
)
def test_what_the_model_says(
    source: Path, generation: Any, config: dict[str, Any], wanted: dict[str, Any]
) -> None:
    file = source / "generation_config.json"
    file.unlink() if generation is None else file.write_text(json.dumps(generation))
    made = genai_folder("genai", Path("m.onnx"), settings(**config), force=False)
    said = wanted.pop("said", None)
    assert [n.rpartition(": ")[2].startswith(said) for n in made.notes] == ([True] if said else [])
    every = {**made.model, **made.search}
    assert {n: every.get(n) for n in wanted} == wanted
    assert "bos_token_id" in wanted or "bos_token_id" not in every


def test_a_folder_is_replaced_where_lora_fx_made_it(source: Path) -> None:
    write_decoder(Path("m.onnx"), data="m.onnx.data")
    place(genai_folder("genai", Path("m.onnx"), settings(), force=False), Path("m.onnx"))
    with pytest.raises(LoraFxError, match="genai already exists"):
        genai_folder("genai", Path("m.onnx"), settings(), force=False)
    (source / "chat_template.jinja").unlink()
    write_decoder(Path("m.onnx"))
    made, before = genai_folder("genai", Path("m.onnx"), settings(), force=True), files(Path())
    with pytest.raises(ZeroDivisionError), Beside() as beside:
        made.place(Path("m.onnx"), beside)
        assert "m.onnx.data" not in files(Path("genai"))
        raise ZeroDivisionError
    assert files(Path()) == before and "m.onnx.data" in files(Path("genai"))
    place(made, Path("m.onnx"))
    left = {"genai_config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"}
    assert files(Path("genai")) == left
    with pytest.raises(
        LoraFxError, match=r"model: the folder holds files that lora-fx did not write"
    ):
        genai_folder("model", Path("m.onnx"), settings(), force=True)


@pytest.mark.parametrize("clones", [True, False])
def test_data_is_cloned_where_the_file_system_can(
    clones: bool, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never linked: onnx and onnx_ir refuse data of two names, and either file could change."""
    cloned: list[str] = []

    def clone(original: Path, copy: Path) -> bool:
        cloned.append(original.name)
        if clones:
            copy.write_bytes(b"cloned" + original.read_bytes()[6:])
        return clones

    write_decoder(Path("m.onnx"), data="m.onnx.data")
    monkeypatch.setattr("lora_fx.onnx.place.reflink", clone)
    place(genai_folder("genai", Path("m.onnx"), settings(), force=False), Path("m.onnx"))
    assert cloned == ["m.onnx.data"]

    data = Path("genai/m.onnx.data")
    original = Path("m.onnx.data").read_bytes()
    assert data.read_bytes() == (b"cloned" + original[6:] if clones else original)
    for path in (data, Path("m.onnx.data")):
        assert path.stat().st_nlink == 1
    onnx.load("m.onnx")
    onnx.load("genai/model.onnx")


def test_uneven_caches_are_refused(source: Path) -> None:
    write_decoder(Path("m.onnx"), (8, 6))
    made = genai_folder("genai", Path("m.onnx"), settings(), force=False)
    words = r"past_key_values\.0\.value has 2 heads of 6 and past_key_values\.0\.key 2 of 8"
    for refuse in (made.config, lambda path: place(made, path)):
        with pytest.raises(LoraFxError, match=words):
            refuse(Path("m.onnx"))
    assert files(Path()) == {"model", "m.onnx"}


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def generation(**fields: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(fields))


REFUSED: dict[str, tuple[Any, Any, str, str, str]] = {
    "no tokenizer": (
        unlink("tokenizer.json"), settings(), "genai", "model: it has no tokenizer.json",
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
    ),
    "its config": (
        unlink("tokenizer_config.json"), settings(), "genai", "no tokenizer_config.json",
        "save_pretrained(FOLDER)",
    ),
    "no end": (
        generation(), settings(eos_token_id=None), "genai", "has an eos_token_id",
        'put "eos_token_id": N into model/generation_config.json',
    ),
    "a text": (
        generation(eos_token_id=["</s>"]), settings(), "genai",
        "model: eos_token_id is ['</s>']; expected a whole number", "correct eos_token_id",
    ),
    "a list": (
        generation(pad_token_id=[1]), settings(), "genai", "pad_token_id is [1]", "correct pad",
    ),
    "damaged": (
        lambda folder: (folder / "generation_config.json").write_text("{"), settings(), "genai",
        "model/generation_config.json", "",
    ),
    "no length": (
        None, settings(model_type="bloom", max_position_embeddings=None), "genai",
        "the config of a bloom has no max_position_embeddings", "leave genai out",
    ),
    "no folder": (
        None, SimpleNamespace(_name_or_path=""), "genai",
        "the model comes from no folder: it has no tokenizer.json", "own folder",
    ),
    "a name of the Hub": (
        None, SimpleNamespace(_name_or_path="org/name"), "genai",
        "org/name: it has no tokenizer.json", "",
    ),
    "the same name": (None, settings(), "m.onnx", "m.onnx: the file and the folder", "genai=DIR"),
    "there": (None, settings(), "model", "model already exists", "force=True"),
    "nowhere": (None, settings(), "no/genai", "no does not exist", "create it first"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, source: Path) -> None:
    change, config, folder, words, hint = REFUSED[name]
    if change:
        change(source)
    with pytest.raises(LoraFxError) as caught:
        genai_folder(folder, Path("m.onnx"), config, force=False)
    assert words in caught.value.message and hint in str(caught.value)
    assert caught.value.exit_code == 2 and files(Path()) == {"model"}


def test_what_the_model_lacks_is_said_before_it_is_captured(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        **sizes, intermediate_size=16, vocab_size=32, bos_token_id=None, eos_token_id=None
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.config._name_or_path = str(source)
    (source / "generation_config.json").write_text("{}")
    monkeypatch.setattr(decoder, "with_forward", None)
    with pytest.raises(LoraFxError, match="has an eos_token_id"):
        lora_fx.export(model, "m.onnx", cache=True, genai="genai")


@pytest.mark.parametrize(
    ("options", "words", "hint"),
    [
        ({}, "cannot run a file of mode merged without a cache", "cache=True"),
        (
            {"cache": True, "mode": "load"},
            "cannot run a file of mode load with a cache",
            "mode='merged'",
        ),
        (
            {"cache": True, "mode": "batch"},
            "cannot run a file of mode batch with a cache",
            "merged",
        ),
    ],
)
def test_modes(source: Path, options: dict[str, Any], words: str, hint: str) -> None:
    with pytest.raises(LoraFxError, match=words) as caught:
        lora_fx.export("model", "m.onnx", genai="genai", **options)
    assert hint in str(caught.value) and files(Path()) == {"model"}
