"""Models of transformers by their id on the Hub: built, adapted, and named in the adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.fx.load.models import load_model
from tests.files.hub_server import FakeHub, here, offline

pytest.importorskip("huggingface_hub")


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with here(tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with rectangular weights."""
    from transformers import BertConfig, BertModel

    path = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16, vocab_size=61,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(path)
    return path


def edited(folder: Path, **fields: Any) -> dict[str, bytes | str]:
    """The files of the folder with other fields in config.json."""
    files: dict[str, bytes | str] = {p.name: p.read_bytes() for p in folder.iterdir()}
    return files | {"config.json": json.dumps({**json.loads(files["config.json"]), **fields})}


def test_a_model_is_that_of_its_folder_and_its_adapter_names_it(
    there: FakeHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = there.push_folder("org/bert", folder, modeling__py="raise SystemExit")
    loaded, local = load_model("hf:org/bert@main"), load_model(folder)
    got, wanted = (m.module(**m.kwargs).last_hidden_state for m in (loaded, local))
    assert torch.equal(got, wanted) and loaded.origin == "hf:org/bert@main"
    offline(monkeypatch)
    model = lora_fx.insert("hf:org/bert", rank=2, include="query")
    lora_fx.save_adapter(model.adapter(), "adapter")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/bert", commit)
    held = pytest.importorskip("peft").PeftConfig.from_pretrained("adapter")
    assert (held.base_model_name_or_path, held.revision) == ("org/bert", commit)


def test_a_model_that_transformers_loaded_from_the_cache_is_named_too(
    there: FakeHub, folder: Path
) -> None:
    from transformers import AutoModel

    from lora_fx.files.hub import local

    commit = there.push_folder("org/bert", folder)
    net = AutoModel.from_pretrained(local("hf:org/bert"))
    x = {"input_ids": torch.arange(10).reshape(2, 5)}
    found = lora_fx.attach(net, kwargs=x, rank=2, include="query").adapter().metadata
    assert (found["base_model_name_or_path"], found["revision"]) == ("org/bert", commit)


def test_targets_read_no_weights(
    there: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there.push_folder("org/bert", folder)

    with pytest.raises(SystemExit) as stop:
        main(["targets", "hf:org/bert", "--json"])
    assert stop.value.code == 0
    keys = {t["key"] for t in json.loads(capsys.readouterr().out)["targets"]}
    assert keys >= {f"encoder.layer.0.attention.self.{n}.weight" for n in ("query", "key")}
    assert there.files() == {"org/bert/config.json"}
    assert load_model("hf:org/bert", meta=True).notes == () and len(there.files()) == 1


def test_code_of_a_repository_stays_there(there: FakeHub, folder: Path) -> None:
    """A class that transformers lacks is refused as in a folder; one that it has is its own."""
    auto = {"AutoModel": "modeling.Net"}
    code = {"modeling.py": "raise SystemExit('ran')"}
    unknown = {"model_type": "odd", "architectures": ["Net"], "auto_map": auto}
    there.push("org/odd", edited(folder, **unknown) | code)
    there.push("org/known", edited(folder, auto_map=auto) | code)
    with pytest.raises(LoraFxError, match="is unknown to transformers") as no:
        load_model("hf:org/odd")
    assert "the folder's own code (auto_map) is never run" in no.value.hint
    (note,) = load_model("hf:org/known").notes
    assert "its own code (auto_map) is not run" in note
    assert not [name for name in there.files() if name.endswith(".py")]
