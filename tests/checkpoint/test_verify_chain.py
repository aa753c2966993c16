"""verify of a file that several merges went into, one after the other."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import lora_fx
from lora_fx import Adapter, Full, LoraFxError, LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.checkpoint.verify import lines
from lora_fx.cli import main
from tests.checkpoint.made import Array, checkpoint, factors, read

Q, K, V, NORM = "model.q_proj.weight", "model.k_proj.weight", "model.v_proj.weight", "norm.weight"
SHAPES = {Q: (24, 16), K: (8, 16), V: (8, 16)}
BF16 = ml_dtypes.bfloat16


def update(seed: int, *names: str, **fields: Any) -> Adapter:
    rng, entries = np.random.default_rng(seed), {}
    for name in names:
        a, b = factors(rng, *SHAPES[name], 3)
        entries[name] = LowRank(a, b, 4.0, **fields)
    return Adapter(entries)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A base in bf16, adapters `x` of q and k and `y` of q and v, merged one after the other."""
    rng = np.random.default_rng(0)
    weights: dict[str, Array] = {n: rng.standard_normal(s).astype(BF16) for n, s in SHAPES.items()}
    weights[NORM] = np.ones(16, BF16)
    checkpoint(tmp_path / "base", weights, 2, config={"model_type": "llama"})
    for name, adapter in (("x", update(1, Q, K)), ("y", update(2, Q, V))):
        lora_fx.save_adapter(adapter, tmp_path / name)
    lora_fx.merge(tmp_path / "base", tmp_path / "x", tmp_path / "one")
    lora_fx.merge(tmp_path / "one", [(tmp_path / "y", 0.5)], tmp_path / "two")
    return tmp_path


def run(home: Path, *argv: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of `verify`; names are folders of `home`."""
    args = [str(home / a) if (home / a.partition(":")[0]).exists() else a for a in argv]
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main(["verify", *args, "--json"])
    return int(stop.value.code or 0), json.loads(out.getvalue())


def said(found: dict[str, Any]) -> str:
    return "; ".join(w for w in found["warnings"] if "not verified" not in w)


@pytest.mark.parametrize("order", ["xy", "yx"])
def test_all_adapters_in_any_order(order: str, home: Path) -> None:
    one, two = order[0], order[1]
    code, found = run(home, "two", "base", "--adapter", one, "--adapter", two, "--all")
    assert code == 0 and found["touched"] == 3 and not found["differences"], found
    assert [(r["merge"], r["weight"], r["given"]) for r in found["recorded"]] == [
        (1, 1.0, True),
        (2, 0.5, True),
    ]
    assert not said(found)
    assert run(home, "two", "one", "--adapter", "y", "--all")[0] == 0


def test_two_roundings_are_allowed_and_no_more(home: Path) -> None:
    """q went through two merges: one rounding of the sum is not the file, three steps off is."""
    old, new = read(home / "base")[Q], read(home / "two")[Q]
    exact = old.astype("f8") + update(1, Q).deltas()[Q] + 0.5 * update(2, Q).deltas()[Q]
    assert np.count_nonzero(exact.astype(BF16) != new) > 0
    spacing = np.ldexp(1.0, np.frexp(new.astype("f8"))[1] - 8)
    weights = read(home / "two")
    for steps, code in ((0, 0), (3, 1)):
        moved = new.astype("f8") + steps * spacing * (np.arange(384).reshape(24, 16) == 77)
        folder = home / f"off{steps}"
        checkpoint(folder, {**weights, Q: moved.astype(BF16)}, metadata=metadata(home / "two"))
        args = (folder.name, "base", "--adapter", "x", "--adapter", "y", "--all")
        assert run(home, *args)[0] == code, steps


def metadata(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(sorted(folder.glob("*.safetensors"))[0], framework="np") as f:
        return dict(f.metadata())


@pytest.mark.parametrize("given", ["x", "y"])
def test_one_of_two_merges(given: str, home: Path) -> None:
    code, found = run(home, "two", "base", "--adapter", given)
    assert code == 1 and not found["ok"]
    assert "records 2 merged adapters" in said(found) and "1 of them were not given" in said(found)
    assert f"merge {'xy'.index(given) + 1}: {home / given}" in said(found)
    assert "another base" not in said(found)
    assert [r["given"] for r in found["recorded"]] == [given == "x", given == "y"]


def test_the_first_line_says_that_only_the_record_differs(home: Path) -> None:
    """The record has x at half its weight as another adapter, of the same effect."""
    half = lora_fx.load_adapter(home / "x").weighted(0.5)
    lora_fx.save_adapter(half, home / "half")
    lora_fx.merge(home / "base", home / "half", home / "merged")
    report = lora_fx.verify(home / "merged", home / "base", adapter=(home / "x", 0.5))
    head = "verify: FAILED: 1 of 1 recorded adapters not given; 4 of 4 tensors are as expected; 2 "
    assert not report and lines(report).startswith(head)


@pytest.mark.parametrize("given", ["x", "y"])
def test_one_of_two_adapters_of_one_merge(given: str, home: Path) -> None:
    lora_fx.merge(home / "base", [home / "x", home / "y"], home / "both")
    code, found = run(home, "both", "base", "--adapter", given)
    assert code == 1 and "1 of them were not given" in said(found)
    assert "another base" not in said(found)
    assert run(home, "both", "base", "--adapter", "y", "--adapter", "x", "--all")[0] == 0


def test_one_that_changed_nothing_that_is_sampled_is_missed_too(home: Path) -> None:
    """No row differs, and yet the answer is no: the file records more than was given."""
    lora_fx.save_adapter(update(3, K), home / "z")
    lora_fx.merge(home / "base", [(home / "x", 1.0), (home / "z", 0.0)], home / "both")
    code, found = run(home, "both", "base", "--adapter", "x", "--all")
    assert code == 1 and not found["differences"] and "with weight 0, not given" in said(found)


def test_a_really_different_base(home: Path) -> None:
    weights = read(home / "base")
    for name, change in (("second", {K: weights[K] + BF16(1)}), ("third", {"more": weights[V]})):
        checkpoint(home / name, {**weights, **change}, config={"model_type": "llama"})
    for base, given in (("second", "xy"), ("second", "x"), ("third", "xy"), ("third", "y")):
        args = [a for g in given for a in ("--adapter", g)]
        code, found = run(home, "two", base, *args)
        assert code == 1 and "records another base" in said(found), (base, given)
    code, found = run(home, "one", "two", "--adapter", "y")  # merged into more than A was
    assert code == 1 and "records another base" in said(found)


def test_weights_are_those_of_each_merge(home: Path) -> None:
    assert run(home, "two", "base", "--adapter", "x", "--adapter", "y:0.5", "--all")[0] == 0
    assert run(home, "two", "base", "--adapter", "x", "--adapter", "y:1.0", "--all")[0] == 1


def test_the_same_adapter_twice(home: Path) -> None:
    lora_fx.merge(home / "two", [(home / "x", 0.25)], home / "three", again=True)
    args = ("three", "base", "--all", "--adapter", "y", "--adapter", "x")
    code, found = run(home, *args)
    assert code == 0 and [r["weight"] for r in found["recorded"]] == [1.0, 0.5, 0.25]
    assert run(home, *args, "--adapter", "x")[0] == 0


def test_mixes_and_dtypes_of_each_merge(home: Path) -> None:
    """svd of two, in fp32; then a sum in what it finds, and one back in bf16."""
    pair = [home / "x", home / "y"]
    lora_fx.save_adapter(update(5, Q, K), home / "z")
    lora_fx.save_adapter(update(6, Q), home / "w")
    lora_fx.merge(home / "base", pair, home / "a", how="svd", rank=2, dtype="float32")
    lora_fx.merge(home / "a", home / "z", home / "b")
    lora_fx.merge(home / "b", home / "w", home / "c", dtype="bfloat16")
    assert read(home / "b")[K].dtype == np.float32 and read(home / "c")[Q].dtype == BF16
    args = [a for g in "wzyx" for a in ("--adapter", g)]
    assert run(home, "c", "base", "--all", *args)[0] == 0
    lora_fx.merge(home / "b", home / "w", home / "d")
    weights = read(home / "d")
    for by, code in ((0.0, 0), (1e-5, 1)):  # less than bf16 could tell
        weights[Q].reshape(-1)[np.abs(weights[Q]).argmax()] += by
        checkpoint(home / f"off{code}", weights, metadata=metadata(home / "d"))
        assert run(home, f"off{code}", "base", "--all", *args)[0] == code


def test_what_depends_on_the_file_between(home: Path) -> None:
    """DoRA rescales what was there, a whole tensor is no sum: apart they are fine, together not."""
    size = np.linspace(1, 2, 24).astype("f4")
    whole = Adapter({NORM: Full(np.full(16, 2, "f4"))})
    norm = Adapter({NORM: Full(np.full(16, 3, "f4")), **update(4, K).entries})
    made = {"dora": update(3, Q, magnitude=size), "whole": whole, "norm": norm}
    for name, adapter in made.items():
        lora_fx.save_adapter(adapter, home / name)
    lora_fx.merge(home / "base", home / "dora", home / "a")
    lora_fx.merge(home / "a", home / "norm", home / "b")
    lora_fx.merge(home / "b", home / "whole", home / "c")
    args = [a for g in made for a in ("--adapter", g)]
    assert run(home, "c", "base", "--all", *args)[0] == 0
    lora_fx.merge(home / "c", home / "x", home / "d")  # after DoRA, a sum
    assert run(home, "d", "base", "--all", *args, "--adapter", "x")[0] == 0
    lora_fx.merge(home / "one", home / "dora", home / "e")
    with pytest.raises(LoraFxError, match="without the file between the two") as caught:
        lora_fx.verify(home / "e", home / "base", adapter=[home / "x", home / "dora"])
    assert "against what it started from" in caught.value.hint
    assert run(home, "e", "one", "--adapter", "dora", "--all")[0] == 0


def test_a_head_that_the_first_merge_untied(home: Path) -> None:
    rng = np.random.default_rng(0)
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    checkpoint(home / "tied", {table: rng.standard_normal((40, 16)).astype("f4")}, config=config)
    SHAPES.update({table: (40, 16), head: (40, 16)})
    entries = {
        "h": update(1, head),
        "again": update(2, head),
        "both": update(3, table, origin=Origin(tied=True)),
    }
    last = home / "tied"
    for name, adapter in entries.items():
        lora_fx.save_adapter(adapter, home / name)
        lora_fx.merge(last, home / name, home / f"with-{name}", untie=True)
        last = home / f"with-{name}"
    args = [a for g in entries for a in ("--adapter", g)]
    assert run(home, last.name, "tied", "--all", *args)[0] == 0
    new = read(last)
    new[head][3, 4] += 1e-3
    checkpoint(home / "off", new, metadata=metadata(last))
    assert run(home, "off", "tied", "--all", *args)[0] == 1
