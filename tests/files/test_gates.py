"""What may be read by a name from a file, what an output may replace, and who remembers it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_fx
from lora_fx.checkpoint.merge import plan_merge
from lora_fx.checkpoint.merge_plan import MergePlan
from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import replacing
from lora_fx.files.checkpoint import model_config
from lora_fx.files.links import inside
from lora_fx.files.replaceable import CONTENTS
from lora_fx.files.run_files import remember, remembering
from lora_fx.files.side_outputs import Beside
from lora_fx.formats import registry  # noqa: F401 (what --force may replace, for the children)
from lora_fx.passes.verbs import merge as merging
from tests.checkpoint.made import adapter, factors
from tests.faults import Faults

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)


def base(folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file({"q.weight": RNG.standard_normal((6, 4)).astype("f4")}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base(tmp_path / "base")
    adapter(tmp_path / "adapter", {"q": factors(RNG, 6, 4, 2)})
    return tmp_path / "base", tmp_path / "adapter"


@pytest.mark.parametrize("which", [0, 1])
def test_an_input_that_changes_after_it_was_planned_with(
    pair: tuple[Path, Path], which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read of it before is of another file than what would be read now."""
    planned = plan_merge

    def plan_then_change(*arguments: Any) -> MergePlan:
        plan = planned(*arguments)
        file = next(pair[which].glob("*.safetensors"))
        os.utime(file, ns=(1, 1))
        return plan

    monkeypatch.setattr(merging, "plan_merge", plan_then_change)
    with pytest.raises(LoraFxError, match="changed"):
        lora_fx.merge(pair[0], [pair[1]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_the_cache_is_served(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Every file of it is a link into blobs."""
    home = tmp_path / "hub" / "models--a--b"
    snapshot, blobs = home / "snapshots" / "1f", home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(pair[0].iterdir())):
        (blobs / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    lora_fx.merge(snapshot, [pair[1]], tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    (snapshot / "tokenizer.json").unlink()
    (tmp_path / "secret").write_text("secret")
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(LoraFxError, match=r"tokenizer\.json: this link leads out"):
        lora_fx.merge(snapshot, [pair[1]], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_blobs_that_are_a_link_are_no_cache(tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    (home / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "x").write_text("secret")
    (home / "blobs").symlink_to(tmp_path / "etc")
    (home / "snapshots" / "1" / "x").symlink_to("../../blobs/x")
    assert inside(home / "snapshots" / "1", "x") is None


@pytest.mark.parametrize(
    "name", ["", "/x", "../x", "a/../../x", "a\\b", "C:x", "a\0b", "n" * 5000, "loop"]
)
def test_names_that_lead_nowhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert inside(tmp_path, name) is None


def test_names_that_hold_in_one_place_only(tmp_path: Path) -> None:
    """They lead to a file of the folder, by what lies around it."""
    (tmp_path / "x").write_text("x")
    assert inside(tmp_path, "x") is not None
    assert inside(tmp_path, str(tmp_path / "x")) is None
    assert inside(tmp_path, f"../{tmp_path.name}/x") is None


def test_links_within_a_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_text("x")
    (tmp_path / "y").symlink_to("sub/x")
    for name in ("sub/x", "y", "missing"):
        assert inside(tmp_path, name) is not None


def test_a_new_name_inside_the_base_is_allowed(pair: tuple[Path, Path]) -> None:
    out = pair[0] / "merged"
    before = {p.name for p in pair[0].iterdir()}
    lora_fx.merge(pair[0], [pair[1]], out)
    assert {p.name for p in pair[0].iterdir()} == before | {"merged"}
    contents = json.loads((out / CONTENTS).read_text())["files"]
    assert contents == {p.name: p.stat().st_size for p in out.iterdir() if p.name != CONTENTS}
    lora_fx.merge(pair[0], [pair[1]], pair[0] / "again")  # what lies in merged is no companion
    assert not (pair[0] / "again" / "merged").exists()
    assert load_file(pair[0] / "again" / "model.safetensors").keys() == {"q.weight"}


def test_force_replaces_an_output_and_nothing_that_came_into_it(pair: tuple[Path, Path]) -> None:
    out = pair[0].with_name("out")
    lora_fx.merge(pair[0], [pair[1]], out)
    lora_fx.merge(pair[0], [pair[1]], out, force=True)
    (out / "notes.md").write_text("years")
    with pytest.raises(LoraFxError, match=r"files that lora-fx did not write: notes\.md"):
        lora_fx.merge(pair[0], [pair[1]], out, force=True)
    (out / "notes.md").unlink()
    (out / "tokenizer.json").write_text('{"mine": 1}')  # of another size now
    with pytest.raises(LoraFxError, match=r"tokenizer\.json"):
        lora_fx.merge(pair[0], [pair[1]], out, force=True)


def test_an_output_of_before_there_was_a_list_is_replaced(pair: tuple[Path, Path]) -> None:
    out = pair[0].with_name("out")
    lora_fx.merge(pair[0], [pair[1]], out)
    (out / CONTENTS).unlink()
    lora_fx.merge(pair[0], [pair[1]], out, force=True)
    assert (out / CONTENTS).exists()


def test_a_run_remembers_until_its_end(tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    file.write_text("x")
    with remembering():
        remember(file)
        with (
            pytest.raises(LoraFxError, match="would replace the input"),
            replacing(file, force=True),
        ):
            pytest.fail("entered")
    with replacing(file, force=True) as temporary:
        temporary.write_text("y")
    assert file.read_text() == "y"


@pytest.mark.parametrize("before", ["old", ""])
@pytest.mark.parametrize("fails", [True, False])
def test_outputs_go_together(tmp_path: Path, before: str, fails: bool) -> None:
    beside_it, main = tmp_path / "a.onnx_adapter", tmp_path / "m.onnx"
    if before:
        beside_it.write_text(before)
    try:
        beside = Beside()
        with replacing(main, parts=beside) as temporary:
            temporary.write_text("model")
            with replacing(beside_it, force=True, beside=beside) as part:
                part.write_text("new")
            assert beside_it.read_text() == "new"
            if fails:
                raise KeyError
    except KeyError:
        assert not main.exists()
        assert (beside_it.read_text() if beside_it.exists() else "") == before
    else:
        assert main.read_text() == "model" and beside_it.read_text() == "new"
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def _write_together(folder: Path, part_name: str = "a.onnx_adapter") -> None:
    beside = Beside()
    with replacing(folder / "m.onnx", force=True, parts=beside) as temporary:
        temporary.write_text("model")
        with replacing(folder / part_name, force=True, beside=beside) as part:
            part.write_text("data")


def killed_at_any_call(memory: Path, before: str) -> None:
    """Every call in a fork of its own: to be run by a process that is small."""

    def made(name: str) -> Path:
        folder = memory / name
        folder.mkdir()
        for file in ("m.onnx", "a.onnx_adapter") if before else ():
            (folder / file).write_text(before)
        return folder

    whole = made("whole")
    with Faults() as seen:
        _write_together(whole)
    for at in range(1, len(seen.calls) + 1):
        folder = made(str(at))
        child = os.fork()
        if not child:
            with Faults(at, signal.SIGKILL):
                _write_together(folder)
            os._exit(0)
        os.waitpid(child, 0)
        main, data = folder / "m.onnx", folder / "a.onnx_adapter"
        where = f"killed at call {at} of {len(seen.calls)}, {seen.calls[at - 1]}"
        assert not main.exists() or main.read_text() in ("model", before), where
        named = main.exists() and main.read_text() == "model"
        assert not named or data.read_text() == "data", where
        _write_together(folder, "b.onnx_adapter")  # as a model's data, which replaces none
        # an empty lock counts for nothing, and goes with the next run that writes its name
        names = sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")
        assert not [n for n in names if n.startswith(".")], (where, names)
        left = {n: (folder / n).read_text() for n in names}
        assert left.pop("a.onnx_adapter", "") == ("data" if named else before), where
        assert left == {"m.onnx": "model", "b.onnx_adapter": "data"}, where


@pytest.mark.parametrize("before", ["old", ""])
def test_a_kill_at_any_call_leaves_nothing_after_the_next_run(memory: Path, before: str) -> None:
    code = f"from {__name__} import *; killed_at_any_call(Path(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", code, str(memory), before]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_is_not_replaced_costs_no_work(pair: tuple[Path, Path]) -> None:
    out, calls = pair[0].with_name("out"), []
    lora_fx.merge(pair[0], [pair[1]], out)
    (out / "thesis.tex").write_text("years")
    (out / CONTENTS).unlink()
    with pytest.raises(LoraFxError, match=r"thesis\.tex"):
        lora_fx.merge(
            pair[0], [pair[1]], out, force=True, progress=lambda *done: calls.append(done)
        )
    assert not calls


def test_a_config_may_have_infinity(tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    base(folder)
    config = {"model_type": "x", "tie_word_embeddings": True, "limit": [0.0, float("inf")]}
    (folder / "config.json").write_text(json.dumps(config))
    read = model_config(folder / "config.json")
    assert read["limit"] == [0.0, float("inf")]


def test_an_adapter_and_a_merged_checkpoint_do_not_replace_each_other(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """The record of a merge stands in the header, and is no name of an adapter's tensor."""
    update = lora_fx.LowRank(np.ones((2, 4), "f4"), np.ones((6, 2), "f4"), 2.0)
    small, merged = tmp_path / "a.safetensors", tmp_path / "m.safetensors"
    lora_fx.save_adapter(lora_fx.Adapter({"q.weight": update}), small)
    base_file = pair[0] / "model.safetensors"
    lora_fx.merge(base_file, [small], merged)
    lora_fx.merge(base_file, [pair[1]], merged, force=True)
    with pytest.raises(LoraFxError, match=r"is an adapter in a \.safetensors file"):
        lora_fx.merge(base_file, [pair[1]], small, force=True)
    with pytest.raises(LoraFxError, match=r"is a \.safetensors file, and an adapter"):
        lora_fx.save_adapter(lora_fx.Adapter({"q.weight": update}), merged, force=True)
