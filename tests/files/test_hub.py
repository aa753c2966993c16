"""Models of the Hub by id: what is downloaded, from where, what is refused, what is kept of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_fx
from lora_fx import progress
from lora_fx.checkpoint.provenance import history
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.files.hub import fetch, known_as, local, origin, parse
from tests.checkpoint.made import Array, adapter, checkpoint, factors, raw, read
from tests.files.hub_server import FakeHub, here, offline

hub = pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).resolve().parent.parent.parent
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
SHAPES = {Q: (24, 16), UP: (40, 16)}
RANK, ALPHA = 3, 2
NEVER = {
    "README.md": "# model", "pytorch_model.bin": "pickle", "optimizer.pt": "state",
    "model.gguf": "GGUF", "onnx/model.onnx": "graph", "modeling.py": "code",
    "model.fp16.safetensors": "a copy", "consolidated.safetensors": "another",
    "checkpoint-5/rng_state.pth": "state", "checkpoint-5/model.safetensors": "older",
}  # fmt: skip
TAKEN = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}", "1_Pooling/config.json": "{ }"}


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub on this machine, an empty cache, nobody logged in."""
    with here(tmp_path, monkeypatch) as found:
        yield found


def weights(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {f"{n}.weight": rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}


def update() -> tuple[Array, Array]:
    return factors(np.random.default_rng(9), *SHAPES[Q], RANK)


def push_pair(there: FakeHub, tmp_path: Path) -> tuple[str, str]:
    """org/base in two shards and org/style, an adapter; both beside much else. Their commits."""
    base = checkpoint(tmp_path / "b", weights(), 2, config={"model_type": "llama"})
    style = adapter(tmp_path / "a", {Q: update()}, r=RANK, lora_alpha=ALPHA)
    more = {n.replace(".", "__"): t for n, t in (NEVER | TAKEN).items()}
    first = there.push_folder("org/base", base, **more)
    kept = {n: t for n, t in more.items() if not n.startswith("model__")}
    return first, there.push_folder("org/style", style, **kept)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    code = stop.value.code
    return (code if isinstance(code, int) else 0), out, err


def expected(weight: float) -> dict[str, Array]:
    """W + weight·(alpha/r)·B·A in fp64, and the other tensor as it was."""
    a, b = (x.astype(np.float64) for x in update())
    whole = weights()
    delta = weight * ALPHA / RANK * (b @ a)
    return whole | {f"{Q}.weight": (whole[f"{Q}.weight"] + delta).astype(np.float32)}


def same(got: dict[str, Array], wanted: dict[str, Array]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=2e-7 * np.abs(value).max())


def test_a_pair_is_downloaded_and_merged_then_again_without_a_network(
    there: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, style = push_pair(there, tmp_path)
    argv = ["merge", "hf:org/base", "hf:org/style@main:0.5", "-o"]
    code, out, err = run(capsys, *argv, "merged", "--json")
    assert code == 0, err
    same(read(Path("merged")), expected(0.5))
    got = there.files()
    names = {n.partition("/")[2].partition("/")[2] for n in got}
    assert not names & NEVER.keys() and names >= TAKEN.keys()
    assert {n for n in got if n.endswith(".safetensors")} == {
        "org/base/model-00001-of-00002.safetensors",
        "org/base/model-00002-of-00002.safetensors",
        "org/style/adapter_model.safetensors",
    }
    assert (Path("merged") / "1_Pooling/config.json").exists(), "the folder is whole"
    (record,) = history(open_checkpoint("merged"))
    assert record["base"]["hub"] == f"org/base@{base}"
    assert record["adapters"][0]["hub"] == f"org/style@{style}"
    warned = " ".join(json.loads(out)["warnings"])
    assert f"hf:org/base: commit {base}; not downloaded: README.md" in warned
    assert f"hf:org/style@main: commit {style}" in warned

    offline(monkeypatch)
    code, _, err = run(capsys, *argv, "again")
    assert code == 0, err
    for file in Path("merged").glob("*.safetensors"):
        assert file.read_bytes() == (Path("again") / file.name).read_bytes()


def test_a_branch_that_moves_is_another_folder_and_a_commit_asks_nobody(
    there: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "b", weights(0), config={})
    old = there.push_folder("org/base", folder)
    before = Path(local("hf:org/base"))
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    folder.rmdir()
    new = there.push_folder("org/base", checkpoint(folder, weights(1), config={}))
    after = Path(local("hf:org/base"))
    assert (before.name, after.name) == (old, new)
    same(read(before), weights(0))
    same(read(after), weights(1))
    there.asked.clear()
    assert local(f"hf:org/base@{old}") == before and there.asked == []
    offline(monkeypatch)
    assert local("hf:org/base") == after, "the commit that it had last"
    assert origin(after) == {"base_model_name_or_path": "org/base", "revision": new}


ANSWERS: dict[str, tuple[str, str, str]] = {
    # what → (the argument, what the message says, what the hint says)
    "no such model": ("hf:org/nothing", "no such model, or it is private", "hf auth login"),
    "private": ("hf:org/private", "no such model, or it is private", "HF_TOKEN"),
    "no such branch": (
        "hf:org/base@gone", "no revision 'gone' in org/base", "its main branch: hf:org/base",
    ),
    "no such commit": (
        f"hf:org/base@{'0' * 40}", f"no revision '{'0' * 40}'", "its main branch: hf:org/base",
    ),
    "gated": (
        "hf:org/gated", "its owner restricts access, and you have none", "/org/gated, then: hf",
    ),
    "pickles only": ("hf:org/pickled", "its weights are pickles (pytorch_model.bin)", "--trust"),
    "no weights": ("hf:org/gguf", "no .safetensors file; it has model.gguf", "hf download"),
    "in folders": (
        "hf:org/parts", "are in its folders de, fr", "give one of the folders: hf:org/parts/de",
    ),
    "no such part": ("hf:org/parts/it", "hf:org/parts/it: it is not in commit", "config.json"),
    "no such file": ("hf:org/base/x.safetensors", "x.safetensors is not in commit", "config.json"),
    "one name": ("hf:gpt2", "'hf:gpt2': expected hf:ORG/NAME[/PART][@REVISION]", "hf:org/name"),
    "empty": ("hf:", "expected hf:ORG/NAME", "hf:org/name"),
    "an empty revision": ("hf:org/base@", "expected hf:ORG/NAME", "hf:org/name@main"),
    "up": ("hf:org/..", "expected hf:ORG/NAME", "hf:org/name"),
    "up in a part": ("hf:org/base/../x", "expected hf:ORG/NAME", "hf:org/name"),
    "a weight of a base": ("hf:org/base:0.5", "expected hf:ORG/NAME", "leave :0.5 out"),
}  # fmt: skip


def push_odd(there: FakeHub, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "b", weights(), config={})
    there.push_folder("org/base", base)
    there.push_folder("org/gated", base)
    there.push_folder("org/private", base)
    there.gated, there.private = {"org/gated"}, {"org/private"}
    there.push("org/pickled", {"config.json": "{}", "pytorch_model.bin": "x"})
    there.push("org/gguf", {"model.gguf": "GGUF"})
    one = (base / "model.safetensors").read_bytes()
    parts = {f"{n}/model.safetensors": one for n in ("de", "fr")}
    there.push("org/parts", {"config.json": "{}", **parts})


@pytest.mark.parametrize("what", ANSWERS)
def test_what_cannot_be_had_is_one_line_a_hint_and_exit_2(
    what: str, there: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, message, hint = ANSWERS[what]
    push_odd(there, tmp_path)
    style = adapter(tmp_path / "a", {Q: update()}, r=RANK, lora_alpha=ALPHA)
    code, out, err = run(capsys, "merge", given, str(style), "-o", "out")
    assert (code, out) == (2, "")
    said = err.splitlines()
    assert len(said) == 2 and message in said[0] and hint in said[1], err
    assert [*Path().iterdir()] == []
    assert not [n for n in there.files() if n.endswith((".bin", ".gguf"))]


def followed(hint: str) -> str:
    """The id that a hint gives."""
    return next(word for word in hint.split() if word.startswith("hf:"))


@pytest.mark.parametrize("given", ["hf:org/base@gone", "hf:org/parts"])
def test_the_id_in_a_hint_works(given: str, there: FakeHub, tmp_path: Path) -> None:
    push_odd(there, tmp_path)
    with pytest.raises(LoraFxError) as no:
        fetch(given)
    same(read(Path(local(followed(no.value.hint)))), weights())


def test_a_path_that_looks_like_an_id_is_told_its_prefix(there: FakeHub, tmp_path: Path) -> None:
    push_pair(there, tmp_path)
    with pytest.raises(LoraFxError) as no:
        lora_fx.load_adapter("org/style")
    assert there.asked == [], "without the prefix nobody is asked"
    assert sorted(lora_fx.load_adapter(followed(no.value.hint))) == [f"{Q}.weight"]
    assert "no such file" in no.value.message
    style = Path(local(followed(no.value.hint)))
    with pytest.raises(LoraFxError) as no:
        lora_fx.merge("org/base", [style], "out")
    lora_fx.merge(followed(no.value.hint), [style], "out")
    same(read(Path("out")), expected(1.0))
    for text in ("org/base.safetensors", "folder/deep/base", str(tmp_path / "x" / "base")):
        with pytest.raises(LoraFxError) as no:
            lora_fx.merge(text, [style], "other")
        assert "hf:" not in no.value.hint, "a file, or a deeper path, is no id"


def test_an_output_that_is_refused_is_refused_before_the_download(
    there: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push_pair(there, tmp_path)
    Path("out").mkdir()
    for out, message in (("out", "out exists already"), ("no/out", "the folder no does not exist")):
        code, _, err = run(capsys, "merge", "hf:org/base", "hf:org/style", "-o", out)
        assert code == 2 and message in err, err
    assert there.asked == []
    code, _, err = run(capsys, "merge", "hf:org/base", "hf:org/style", "-o", "new")
    assert code == 0, err


LOGINS: dict[str, Callable[[pytest.MonkeyPatch, Path, str], object]] = {
    "HF_TOKEN": lambda patch, home, token: patch.setenv("HF_TOKEN", token),
    "stored": lambda patch, home, token: (home / "token").write_text(token),
}


@pytest.mark.parametrize("login", LOGINS)
def test_the_login_of_the_library_opens_gated_models(
    login: str, there: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_odd(there, tmp_path)
    LOGINS[login](monkeypatch, tmp_path, "hf_right")
    for given in ("hf:org/gated", "hf:org/private"):
        same(read(Path(local(given))), weights())
    assert {a for _, _, a in there.asked} == {"Bearer hf_right"}


def test_a_token_that_is_refused_is_said_to_be(
    there: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_odd(there, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(LoraFxError, match="rejects the token") as no:
        fetch("hf:org/base")
    assert "hf_wrong" not in str(no.value)
    monkeypatch.delenv("HF_TOKEN")  # as the hint says
    assert "unset HF_TOKEN" in no.value.hint and Path(local("hf:org/base")).is_dir()


def test_no_network_and_the_switch_are_told_apart(
    there: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_odd(there, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
        with pytest.raises(
            LoraFxError, match=r"127\.0\.0\.1:9 cannot be reached: ConnectError"
        ) as no:
            fetch("hf:org/base")
        assert "check the network and try again" in no.value.hint
    with monkeypatch.context() as patch:
        offline(patch)
        with pytest.raises(LoraFxError, match=r"in the cache .* and HF_HUB_OFFLINE is set") as no:
            fetch("hf:org/base")
    assert no.value.hint == "unset HF_HUB_OFFLINE to download it"
    fetch("hf:org/base", weights=False)
    offline(monkeypatch)
    with pytest.raises(LoraFxError, match="not complete in the cache"):
        fetch("hf:org/base")


def test_a_cache_that_another_program_filled_is_read_without_a_network(
    there: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the files and no list of them."""
    push_odd(there, tmp_path)
    for name in ("config.json", "model.safetensors"):
        hub.hf_hub_download("org/base", name)
    offline(monkeypatch)
    same(read(Path(local("hf:org/base"))), weights())


def test_without_the_library_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, err = run(capsys, "doctor", "hf:org/base", "hf:org/style")
    first, second = err.splitlines()
    assert code == 2 and "hf:org/base: huggingface_hub cannot be imported" in first
    assert second == "Hint: pip install 'lora-fx[hf]'"


def test_parts_and_files_come_alone(there: FakeHub, tmp_path: Path) -> None:
    """A folder of a repository, and a file that no config describes."""
    push_odd(there, tmp_path)
    style = adapter(tmp_path / "a", {Q: update()}, r=RANK, lora_alpha=ALPHA)
    files = {f"{n}/{f.name}": f.read_bytes() for n in ("de", "fr") for f in style.iterdir()}
    there.push("org/styles", files)
    assert sorted(lora_fx.load_adapter("hf:org/styles/fr@main")) == [f"{Q}.weight"]
    assert {n for n in there.files() if "safetensors" in n} == {
        "org/styles/fr/adapter_model.safetensors"
    }
    lora_fx.save_adapter(lora_fx.load_adapter(style), "one.safetensors", "kohya")
    one = raw(read(Path("one.safetensors")), None)  # as kohya writes it, without our metadata
    there.push("org/kohya", {"one.safetensors": one, "two.safetensors": b"another"})
    named = lora_fx.load_adapter("hf:org/kohya/one.safetensors", base="hf:org/base")
    assert sorted(named) == [f"{Q}.weight"], "by the names of the base"
    assert "org/kohya/two.safetensors" not in there.files()
    with pytest.raises(LoraFxError) as no:
        lora_fx.load_adapter("hf:org/kohya")
    assert len(lora_fx.load_adapter(no.value.hint.split(": ")[1])) == 1


def test_bytes_are_told_while_they_come(
    there: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_pair(there, tmp_path)
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    there.delay = 0.05
    lines: list[str] = []
    with progress.telling(lines.append):
        fetch("hf:org/base")
    begun = [line for line in lines if line.endswith("…")]
    assert begun[0] == f"asking {there.url} for hf:org/base …"
    name = "model-00001-of-00002.safetensors"
    size = len(there.commits["org/base"][there.refs["org/base", "main"]][name])
    total = sum(
        len(d)
        for n, d in there.commits["org/base"][there.refs["org/base", "main"]].items()
        if "-of-" in n
    )
    wanted = f"downloading {name} of hf:org/base, {size / 1000:.1f} kB, 1 of 2 files"
    assert begun[1] == f"{wanted}, {total / 1000:.1f} kB …"


VERBS: dict[str, Callable[[Any, Any], Any]] = {
    "doctor": lambda base, style: lora_fx.doctor(base, style).details["updates"],
    "verify": lambda base, style: lora_fx.verify(base, style).details,
    "compare": lambda base, style: lora_fx.verify(base, base).details,
    "extract": lambda base, style: sorted(lora_fx.extract(base, f"{style}-tuned")),
    "load": lambda base, style: sorted(lora_fx.load_adapter(style, base=base)),
    "merge": lambda base, style: lora_fx.merge(base, [(style, 0.5)], "out", force=True).details[
        "tensors"
    ],
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_of_python_take_ids_as_paths(verb: str, there: FakeHub, tmp_path: Path) -> None:
    push_pair(there, tmp_path)
    there.push_folder("org/style-tuned", checkpoint(tmp_path / "a-tuned", expected(1)))
    here = VERBS[verb](tmp_path / "b", tmp_path / "a")
    assert VERBS[verb]("hf:org/base", "hf:org/style") == here


def test_an_extracted_adapter_names_its_base_as_peft_does(there: FakeHub, tmp_path: Path) -> None:
    base, _ = push_pair(there, tmp_path)
    found = lora_fx.extract("hf:org/base", checkpoint(tmp_path / "tuned", expected(1)), rank=RANK)
    lora_fx.save_adapter(found, "again")
    config = json.loads(Path("again/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", base)


def test_a_merge_in_python_keeps_both_commits(there: FakeHub, tmp_path: Path) -> None:
    base, style = push_pair(there, tmp_path)
    lora_fx.merge("hf:org/base", "hf:org/style", "out")
    (record,) = history(open_checkpoint("out"))
    assert record["base"]["hub"] == f"org/base@{base}"
    assert record["adapters"][0]["hub"] == f"org/style@{style}"
    assert lora_fx.verify("out", "hf:org/base", adapter="hf:org/style")
    assert not lora_fx.verify("out", "hf:org/base", adapter=[("hf:org/style", 0.5)])


LINES = [
    "doctor BASE ADAPTER",
    "verify BASE ADAPTER",
    "verify TUNED BASE --adapter ADAPTER:0.5",
    "convert ADAPTER -o out.safetensors --format kohya",
    "convert ADAPTER -o out --as lora --rank 2 --base BASE",
    "truncate ADAPTER -o out --rank 1",
    "extract BASE TUNED -o out --rank 2",
    "merge BASE ADAPTER:0.5 -o out --dry-run",
    "targets FILE",
]


@pytest.mark.parametrize("line", LINES)
def test_commands_take_ids_as_paths(
    line: str, there: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same result, by an id and by the path of a folder that the user downloaded."""
    push_pair(there, tmp_path)
    tuned = checkpoint(tmp_path / "t", expected(0.5), config={"model_type": "llama"})
    there.push_folder("org/tuned", tuned)
    names = {"BASE": "org/base", "ADAPTER": "org/style", "TUNED": "org/tuned",
             "FILE": "org/tuned/model.safetensors"}  # fmt: skip
    folders = {"BASE": tmp_path / "b", "ADAPTER": tmp_path / "a", "TUNED": tuned,
               "FILE": tuned / "model.safetensors"}  # fmt: skip

    def said(fill: Callable[[str], str], at: str) -> tuple[Any, set[str]]:
        os.mkdir(at)
        os.chdir(at)
        words = []
        for word in line.split():
            name, colon, weight = word.partition(":")
            words.append(fill(name) + colon + weight)
        code, out, err = run(capsys, *words, "--json")
        assert code == 0, err
        whole = json.loads(out.strip().splitlines()[-1] if line.startswith("merge-all") else out)
        made = {p.relative_to(".").as_posix() for p in Path().rglob("*") if p.is_file()}
        kept = ("findings", "updates", "tensors", "targets", "differences", "fits", "ok", "rows")
        return {k: v for k, v in whole.items() if k in kept}, made

    here = said(lambda w: str(folders[w]) if w in folders else w, str(tmp_path / "here"))
    hubs = said(lambda w: f"hf:{names[w]}" if w in names else w, str(tmp_path / "hubs"))
    assert here == hubs


def test_outputs_are_named_by_repositories_and_not_by_commits(
    there: FakeHub, tmp_path: Path
) -> None:
    from lora_fx.checkpoint.merge_all import jobs_of
    from lora_fx.cli.adapter_arguments import named_adapters

    _, commit = push_pair(there, tmp_path)
    there.push_folder("me/style", tmp_path / "a")
    old = there.push_folder("org/style", tmp_path / "a", README__md="older")
    one, two, three = (
        str(local(f"hf:{x}")) for x in ("org/style", "me/style", f"org/style@{commit}")
    )
    assert [*named_adapters([f"{one}:0.5"])] == ["style"]

    def outs(*paths: str) -> list[str]:
        return [job.out.name for job in jobs_of([(p, 1.0) for p in paths], Path("out"))]

    assert outs(one) == ["style"] and outs(one, two) == ["me__style", "org__style"]
    assert sorted(outs(one, three)) == sorted(f"{c}__org__style" for c in (commit, old))
    assert known_as(f"{one}/de").endswith("/org/style/de") and known_as("a/b") == "a/b"


def test_nothing_is_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    style = adapter(tmp_path / "a", {Q: update()}, r=RANK, lora_alpha=ALPHA)
    code, _, err = run(capsys, "convert", str(style), "-o", "hf:org/new")
    assert (
        code == 2 and "hf:org/new: lora-fx does not upload to the Hub" in err and "hf upload" in err
    )
    with pytest.raises(LoraFxError, match="lora-fx does not upload to the Hub"):
        lora_fx.save_adapter(lora_fx.load_adapter(style), "hf:org/new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_process_of_its_own_takes_everything_from_the_environment(
    there: FakeHub, tmp_path: Path
) -> None:
    push_pair(there, tmp_path)
    there.private = {"org/style"}
    env = {**os.environ, "HF_ENDPOINT": there.url, "HF_HOME": str(tmp_path / "home"),
           "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_right", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    argv = [sys.executable, "-m", "lora_fx.cli", "merge", "hf:org/base", "hf:org/style:2", "-o"]
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([*argv, "merged"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same(read(Path("merged")), expected(2))
    assert (tmp_path / "home/hub/models--org--style").is_dir()


def test_ids_are_parsed() -> None:
    found = parse("hf:org/name/a/b.safetensors@refs/pr/1")
    assert (found.repo, found.part, found.revision) == ("org/name", "a/b.safetensors", "refs/pr/1")
    assert str(found) == "hf:org/name/a/b.safetensors@refs/pr/1"
