"""extract where one side is tied and the other is not: merged again, it is the tuned model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import lora_fx
from lora_fx import LoraFxError
from lora_fx.checkpoint.extract import extraction
from lora_fx.checkpoint.extract_options import ExtractOptions
from lora_fx.checkpoint.file_targets import targets_of
from lora_fx.checkpoint.tensor_uses import uses
from lora_fx.checkpoint.tied_uses import tie_of
from lora_fx.files.checkpoint import tensors
from tests.checkpoint.families import FAMILIES, IDS, load, logits, tied
from tests.checkpoint.made import Array, checkpoint, read

SHARED, HEAD = "model.shared.weight", "lm_head.weight"
LOOKUPS = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
Values = dict[str, Array]


def tuned_of(name: str, folder: Path, change: Callable[[str, int], bool]) -> tuple[Path, Path]:
    """Folders `base`, tied, and `tuned`, untied by transformers, where `change` says so of a name.

    Every use starts from the base's tensor of it.
    """
    tied(name, folder / "base")
    tied(name, folder / "free", tie=False)
    old, (_, _, _, table, head) = read(folder / "base"), FAMILIES[name]
    rng, new = np.random.default_rng(0), {}
    names = [n for n in read(folder / "free") if n not in old]
    assert name == "t5" or head in names
    for n in (*old, *names, *({head} - {*names})):
        value = old[n if n in old else table if n.endswith("weight") else n.replace("decoder.", "")]
        if change(n, value.ndim):
            low = rng.standard_normal((value.shape[0], 2)), rng.standard_normal((2, value.size))
            value = value + 0.1 * (low[0] @ low[1])[:, : value.size // len(value)].reshape(
                value.shape
            )
        new[n] = value.astype("f4")
    checkpoint(folder / "tuned", new)
    config = json.loads((folder / "base" / "config.json").read_text())
    config["tie_word_embeddings"] = False
    (folder / "tuned" / "config.json").write_text(json.dumps(config))
    return folder / "base", folder / "tuned"


def check(name: str, base: Path, tuned: Path, out: Path, **options: Any) -> Any:
    """Extracted with all ranks and merged, through a file: every tensor and logit is TUNED's."""
    made = lora_fx.extract(base, tuned, rank=64, also_full=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora_fx.save_adapter(made, out.with_name("adapter"))
    lora_fx.merge(base, out.with_name("adapter"), out, **options)
    have, want = read(out), read(tuned)
    assert set(have) == set(want)
    for n, value in want.items():
        np.testing.assert_allclose(have[n], value, atol=2e-6 * np.abs(value).max(), err_msg=n)
    found, right = logits(load(name, out)), logits(load(name, tuned))
    assert float((found - right).abs().max()) < 1e-5 * float(right.abs().max())
    assert float((logits(load(name, base)) - right).abs().max()) > 1e-2 * float(right.abs().max())
    return made


def table_and_head(n: str, ndim: int) -> bool:
    tables = {f[3] for f in FAMILIES.values()} | {f[4] for f in FAMILIES.values()}
    return n in tables


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "marian"])
def test_an_untied_head(name: str, tmp_path: Path) -> None:
    """Table and head have moved apart; a head that has not moved is the old table."""
    _, _, _, table, head = FAMILIES[name]
    base, tuned = tuned_of(name, tmp_path, table_and_head)
    if name.startswith("bart") and table == SHARED:  # untied, its lookups are the two others
        values = read(tuned)
        values |= dict.fromkeys(LOOKUPS, values[SHARED])
        config = (tuned / "config.json").read_bytes()
        tuned = checkpoint(tmp_path / "second", values)
        (tuned / "config.json").write_bytes(config)
    made = check(name, base, tuned, tmp_path / "out", untie=True)
    assert set(made.entries) == {table, head}
    assert not any(e.origin.tied for e in made.lowrank.values())
    assert any(head in n and "--untie" in n for n in made.metadata["notes"])
    with pytest.raises(LoraFxError, match="one of two uses"):
        lora_fx.merge(base, made, tmp_path / "no")
    assert made.lowrank[table].origin.op == "embedding"


def only(*names: str) -> Callable[[str, int], bool]:
    return lambda n, ndim: n in names


@pytest.mark.parametrize("moved", [(HEAD,), ("model.embed_tokens.weight",)])
def test_one_of_the_two_has_moved(moved: tuple[str, ...], tmp_path: Path) -> None:
    base, tuned = tuned_of("llama", tmp_path, only(*moved))
    made = check("llama", base, tuned, tmp_path / "out", untie=True)
    assert set(made.entries) == {*moved}


def test_a_stored_head_that_is_the_table_is_tied(tmp_path: Path) -> None:
    base, tuned = tuned_of("llama", tmp_path, only("model.embed_tokens.weight"))
    values = read(tuned)
    tuned = checkpoint(tmp_path / "second", {**values, HEAD: values["model.embed_tokens.weight"]})
    made = lora_fx.extract(base, tuned, rank=64)
    (low,) = made.lowrank.values()
    assert low.origin.tied and not any("--untie" in n for n in made.metadata["notes"])
    lora_fx.merge(base, made, tmp_path / "out")
    np.testing.assert_allclose(read(tmp_path / "out")["model.embed_tokens.weight"],
                               values["model.embed_tokens.weight"], atol=1e-5)  # fmt: skip


def test_a_tuned_model_that_is_tied(tmp_path: Path) -> None:
    """The reverse: the base's head becomes the tuned table."""
    one, two = tuned_of("llama", tmp_path, table_and_head)
    made = lora_fx.extract(two, one, rank=64)
    assert set(made.entries) == {"model.embed_tokens.weight", HEAD}
    lora_fx.merge(two, made, tmp_path / "out")
    have, want = read(tmp_path / "out"), read(one)["model.embed_tokens.weight"]
    for n in ("model.embed_tokens.weight", HEAD):
        np.testing.assert_allclose(have[n], want, atol=2e-5)


def test_lookups_of_their_own(tmp_path: Path) -> None:
    base, tuned = tuned_of("bart", tmp_path, only(*LOOKUPS, HEAD))
    made = check("bart", base, tuned, tmp_path / "out", untie=True)
    assert set(made.entries) == {*LOOKUPS, HEAD}


def test_lookups_and_their_table_have_moved_apart(tmp_path: Path) -> None:
    base, tuned = tuned_of("bart", tmp_path, only(*LOOKUPS, SHARED, HEAD))
    with pytest.raises(LoraFxError, match="an update of the table acts on all lookups") as caught:
        lora_fx.extract(base, tuned)
    assert f"--exclude {SHARED}" in caught.value.hint
    made = lora_fx.extract(base, tuned, rank=64, exclude=SHARED)
    lora_fx.merge(base, made, tmp_path / "out", untie=True)
    have, want = read(tmp_path / "out"), read(tuned)
    for n in (*LOOKUPS, HEAD):
        np.testing.assert_allclose(have[n], want[n], atol=2e-5)


def test_lookups_that_cannot_be_told_apart(tmp_path: Path) -> None:
    base, tuned = tuned_of("t5", tmp_path, only(HEAD))
    values = read(tuned)
    name = "encoder.embed_tokens.weight"
    tuned = checkpoint(tmp_path / "second", {**values, name: values["shared.weight"] + 1})
    with pytest.raises(LoraFxError, match="same tensor in the base") as caught:
        lora_fx.extract(base, tuned)
    assert f"--exclude {name}" in caught.value.hint


def test_a_scale_that_only_a_tied_head_has(tmp_path: Path) -> None:
    base, tuned = tuned_of("t5", tmp_path, only(HEAD))
    config = json.loads((base / "config.json").read_text())
    config.pop("scale_decoder_outputs")
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoraFxError, match="scales its logits"):
        extraction(base, tuned, ExtractOptions())


def test_a_head_of_an_unknown_name(tmp_path: Path) -> None:
    """Left out by request: the table's update must not reach the head."""
    rng = np.random.default_rng(0)
    table = "funnel.embeddings.word_embeddings.weight"
    config = {"architectures": ["FunnelForMaskedLM"]}
    old = rng.standard_normal((12, 4)).astype("f4")
    base = checkpoint(tmp_path / "base", {table: old}, config=config)
    new = {table: old + 1, "own.weight": old + 2}
    tuned = checkpoint(tmp_path / "tuned", new, config=config | {"tie_word_embeddings": False})
    with pytest.raises(LoraFxError, match=r"own\.weight"):
        lora_fx.extract(base, tuned)
    low = lora_fx.extract(base, tuned, allow_missing=True).lowrank[table]
    assert not low.origin.tied and low.origin.op == "embedding"


def test_peft_applies_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, tuned = tuned_of("llama", tmp_path, table_and_head)
    lora_fx.save_adapter(lora_fx.extract(base, tuned, rank=64), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(load("llama", base), str(tmp_path / "adapter"))
    with torch.no_grad():
        found, want = model(IDS).logits, logits(load("llama", tuned))
    assert float((found - want).abs().max()) < 1e-5 * float(want.abs().max())


@pytest.mark.parametrize(
    ("own", "inner", "one"),
    [(True, False, True), (False, True, False), (None, True, True), (None, False, False)],
)
def test_the_config_says_of_a_table_alone_whether_it_is_the_head(
    own: bool | None, inner: bool, one: bool, tmp_path: Path
) -> None:
    text = {"tie_word_embeddings": inner}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": own,
        "text_config": text,
    }
    table = "model.embed_tokens.weight"
    save_file({table: np.ones((320, 8), "f4")}, tmp_path / "model.safetensors")
    every = tensors(tmp_path)
    use = uses(every, targets_of(every), config, fan_in_fan_out=None, table=None)[table]
    assert use.tied is one and (tie_of(every, config) is not None) is one
