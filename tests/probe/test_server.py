"""lora-fx probe --server: every way in which a server can be wrong is found, and named or not."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx import Adapter, LowRank
from lora_fx.cli import main
from lora_fx.files.replaceable import PROBE as NAME
from lora_fx.probe.language import LanguageProbe
from lora_fx.probe.probe_file import read_probe
from lora_fx.probe.server import MOST_BYTES, TOKEN, Server
from tests.fx.train import language_models
from tests.probe import language_server as fake
from tests.probe.language_server import LanguageServer, applied, serving

LAYERS = 2
SHAPES = {
    "q": (24, 24), "k": (12, 24), "v": (12, 24), "o": (24, 24),
    "gate": (40, 24), "up": (40, 24), "down": (24, 40),
}  # fmt: skip


def adapter(path: Path, seed: int, strength: float = 0.35) -> Path:
    """A PEFT folder for every linear layer of the tiny model, with random A and B."""
    rng = np.random.default_rng(seed)
    entries = {}
    for layer in range(LAYERS):
        for role, (out, in_) in SHAPES.items():
            block = "mlp" if role in ("gate", "up", "down") else "self_attn"
            a = rng.standard_normal((2, in_)).astype("f4") / in_**0.5
            b = strength * rng.standard_normal((out, 2)).astype("f4")
            key = f"model.layers.{layer}.{block}.{role}_proj.weight"
            entries[key] = LowRank(a, b, alpha=4.0)
    lora_fx.save_adapter(Adapter(entries), path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base, and adapters `one` and `two` with their probes."""
    root = tmp_path_factory.mktemp("server")
    language_models.folder(root / "base")
    for seed, name in enumerate(("one", "two")):
        adapter(root / name, seed)
        with pytest.raises(SystemExit) as end:
            main(["probe", str(root / name), "--base", str(root / "base"), "-o", str(root / name)])
        assert end.value.code == 0
    yield root


Ask = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def ask(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Runs the command on a server; its exit code, its JSON, and its error."""
    monkeypatch.delenv(TOKEN, raising=False)

    def asked(url: str, *options: str, adapter: str = "one") -> tuple[int, dict[str, Any], str]:
        if "--model" not in options:
            options = ("--model", "lora", *options)
        capsys.readouterr()  # bars of transformers
        with pytest.raises(SystemExit) as end:
            main(["probe", str(place / adapter), "--server", url, *options, "--json", "-q"])
        out, err = capsys.readouterr()
        code = end.value.code
        assert isinstance(code, int)
        return code, json.loads(out), err

    return asked


def question(place: Path, name: str = "one") -> LanguageProbe:
    language = read_probe(str(place / name)).language
    assert language is not None
    return LanguageProbe.from_json(language, name)


def server(place: Path, **settings: Any) -> LanguageServer:
    """One that serves the base and the right adapter, unless told otherwise."""
    models = {"base": applied(place / "base"), "lora": applied(place / "base", place / "one")}
    models |= settings.pop("models", {})
    return LanguageServer(fake.words(place / "base"), models, **settings)


# What is served.


def verdicts(told: dict[str, Any], shape: str) -> list[str]:
    """The verdicts, without their ending where the server gives texts."""
    found = [row["verdict"] for row in told["served"]]
    if shape == "texts":
        assert all(verdict.endswith(" in texts") for verdict in found)
        return [verdict.removesuffix(" in texts") for verdict in found]
    return found


@pytest.mark.parametrize("shape", fake.SHAPES)
def test_the_right_adapter_and_its_base(shape: str, place: Path, ask: Ask) -> None:
    with serving(server(place, shape=shape)) as there:
        code, told, _ = ask(there.url, "--base-model", "base")
    assert code == 0 and told["ok"], told
    assert verdicts(told, shape) == ["right", "right"]
    by = "texts" if shape == "texts" else "log-probabilities"
    assert {row["by"] for row in told["served"]} == {by}
    paths = {path for _, path, _, _ in there.asked}
    assert paths == {"/v1/completions"}, "nothing else is asked for"


@pytest.mark.parametrize("shape", fake.SHAPES)
def test_the_base_under_the_name_of_the_adapter(shape: str, place: Path, ask: Ask) -> None:
    with serving(server(place, shape=shape, models={"lora": applied(place / "base")})) as there:
        code, told, _ = ask(there.url, "--base-model", "base")
    assert code == 1 and not told["ok"]
    assert verdicts(told, shape) == ["no effect", "right"]


@pytest.mark.parametrize("shape", fake.SHAPES)
def test_the_adapter_under_the_name_of_the_base(shape: str, place: Path, ask: Ask) -> None:
    models = {"base": applied(place / "base", place / "one")}
    with serving(server(place, shape=shape, models=models)) as there:
        code, told, _ = ask(there.url, "--base-model", "base")
    assert code == 1
    assert verdicts(told, shape) == ["right", "adapter one"]


@pytest.mark.parametrize("shape", fake.SHAPES)
def test_another_adapter(shape: str, place: Path, ask: Ask) -> None:
    models = {"lora": applied(place / "base", place / "two")}
    with serving(server(place, shape=shape, models=models)) as there:
        code, told, _ = ask(there.url)
        assert code == 1 and told["served"][0]["verdict"] == "differs"
        code, told, _ = ask(there.url, "--other", str(place / "two"))
        assert code == 1 and verdicts(told, shape) == ["adapter two"]


@pytest.mark.parametrize(("scale", "verdict"), [(2.0, "scaled by 2"), (0.5, "scaled by 0.5")])
@pytest.mark.parametrize("shape", ["vllm", "openai", "content"])
def test_another_scale(shape: str, scale: float, verdict: str, place: Path, ask: Ask) -> None:
    models = {"lora": applied(place / "base", place / "one", scale)}
    with serving(server(place, shape=shape, models=models)) as there:
        code, told, _ = ask(there.url)
    told_verdict = told["served"][0]["verdict"]
    assert code == 1
    # among five tokens there may be too few of the probe's
    assert told_verdict == verdict or (shape == "openai" and told_verdict == "differs")


@pytest.mark.parametrize("scale", [0.25, 0.8, 1.2, 1.5, 3.0, -1.0])
def test_a_scale_that_nothing_is_known_of_is_fitted_or_not_told(
    scale: float, place: Path, ask: Ask
) -> None:
    models = {"lora": applied(place / "base", place / "one", scale)}
    with serving(server(place, models=models)) as there:
        code, told, _ = ask(there.url)
    verdict = told["served"][0]["verdict"]
    assert code == 1
    if verdict != "differs":
        assert abs(float(verdict.removeprefix("scaled by ")) - scale) <= 0.1 * scale


def test_every_group_that_is_missing(place: Path, ask: Ask) -> None:
    groups = question(place).groups
    assert {name.partition(", ")[0] for name in groups} == set(SHAPES)
    for name in groups:
        without = fake.group_of(name, LAYERS)
        models = {"lora": applied(place / "base", place / "one", without=without)}
        with serving(server(place, models=models)) as there:
            code, told, _ = ask(there.url)
        (row,) = told["served"]
        assert code == 1 and row["verdict"] == f"without {name}", row


def test_one_target_that_is_missing_has_no_wrong_name(place: Path, ask: Ask) -> None:
    def without(key: str) -> bool:
        return key.endswith(("layers.0.self_attn.v_proj.weight", "layers.1.mlp.up_proj.weight"))

    models = {"lora": applied(place / "base", place / "one", without=without)}
    with serving(server(place, models=models)) as there:
        code, told, _ = ask(there.url)
    assert code == 1 and told["served"][0]["verdict"] == "differs"


def test_another_base(place: Path, ask: Ask) -> None:
    """With what the adapter changes unchanged: neither is right, and no cause is named."""
    other = applied(place / "base")
    both = applied(place / "base", place / "one")
    for model in (other, both):
        noise = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
        model.get_parameter("model.layers.0.self_attn.o_proj.weight").data += 0.1 * noise
    with serving(server(place, models={"base": other, "lora": both})) as there:
        code, told, _ = ask(there.url, "--base-model", "base")
    assert code == 1
    assert [row["verdict"] for row in told["served"]] == ["differs", "differs"]


def test_bfloat16_is_right_and_said(place: Path, ask: Ask) -> None:
    models = {
        "base": applied(place / "base", dtype=torch.bfloat16),
        "lora": applied(place / "base", place / "one", dtype=torch.bfloat16),
    }
    with serving(server(place, models=models)) as there:
        code, told, _ = ask(there.url, "--base-model", "base")
        assert code == 0
        assert {row["verdict"] for row in told["served"]} == {"right in bfloat16"}
        code, told, _ = ask(there.url, "--model", "base")
        assert code == 1 and told["served"][0]["verdict"] == "no effect in bfloat16"


def test_a_served_nan(place: Path, ask: Ask) -> None:
    broken = applied(place / "base", place / "one")
    broken.get_parameter("model.norm.weight").data.fill_(float("nan"))
    with serving(server(place, models={"lora": broken})) as there:
        code, told, _ = ask(there.url)
    assert code == 1 and told["served"][0]["verdict"] == "not finite"


def test_a_server_that_answers_to_any_name(place: Path, ask: Ask) -> None:
    with serving(server(place, any_name=True)) as there:
        code, told, _ = ask(there.url, "--model", "typo")
    assert code == 1 and told["served"][0]["verdict"] == "no effect"
    assert any("does not list 'typo'" in line for line in told["warnings"])


# Servers that cannot be asked: exit 2, one line, and a hint.


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "status 500": ({"fault": fake.of_status(500)}, (), "500: CUDA out of memory"),
    "status 503 without JSON": ({"fault": fake.of_status(503, "busy")}, (), "503: busy"),
    "status 429": ({"fault": fake.of_status(429, '{"detail": "slowly"}')}, (), "429: slowly"),
    "garbage": ({"fault": fake.of_bytes(b"\x00\xff{")}, (), "the answer is no JSON"),
    "nothing": ({"fault": fake.of_bytes(b"")}, (), "the answer is no JSON"),
    "a page": (
        {"fault": fake.of_bytes(b"<!DOCTYPE html><html></html>", "text/html")}, (),
        "the answer is a page for a browser",
    ),
    "other JSON": ({"fault": fake.of_bytes(b'{"hello": 1}')}, (), "no choices with a text"),
    "a list": ({"fault": fake.of_bytes(b"[1]")}, (), "no choices with a text"),
    "deep JSON": ({"fault": fake.of_bytes(b"[" * 200_000)}, (), "the answer is no JSON"),
    "no answer": ({"fault": fake.slow}, ("--timeout", "0.5"), "within 0.5 seconds"),
    "dripping": ({"fault": fake.dripping}, ("--timeout", "0.5"), "within 0.5 seconds"),
    "dripping headers": (
        {"fault": fake.dripping_headers}, ("--timeout", "0.5"), "within 0.5 seconds",
    ),
    "endless": ({"fault": fake.endless}, (), f"more than {MOST_BYTES} bytes"),
    "cut off": ({"fault": fake.cut_off}, (), "the answer ends before its length"),
    "closed": ({"fault": fake.closed}, (), "closed connection without response"),
    "unknown model": ({}, ("--model", "lorra"), "no model 'lorra'; it serves base, lora"),
    "another path": ({}, ("--path", "/api"), "/api/v1/completions: 404: Not Found"),
    "no token": ({"token": "secret"}, (), "401: Unauthorized"),
    "a token before": ({"first_token": 1}, (), "expected 21"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_server_that_cannot_be_asked(name: str, place: Path, ask: Ask) -> None:
    settings, options, message = REFUSED[name]
    path = ""
    if "--path" in options:
        path, options = options[1], ()
    with serving(server(place, **settings)) as there:
        begun = time.monotonic()
        code, told, err = ask(f"{there.url}{path}", *options)
        assert time.monotonic() - begun < 2
    lines = err.splitlines()
    assert code == 2 and len(lines) == 2, err
    assert lines[0].startswith("Error: ") and message in lines[0], err
    assert lines[1].startswith("Hint: ") and len(lines[1]) > 8
    assert told["ok"] is False and message in told["error"]


def test_hints_say_what_helps(place: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(server(place, token="secret")) as there:
        assert ask(there.url)[1]["hint"] == f"set {TOKEN} to the server's token"
        monkeypatch.setenv(TOKEN, "wrong")
        assert ask(there.url)[1]["hint"] == f"check the token in {TOKEN}"
        monkeypatch.setenv(TOKEN, "two\r\nlines")
        assert "is no token" in ask(there.url)[1]["error"]
        monkeypatch.setenv(TOKEN, "secret")
        assert ask(there.url)[0] == 0
        assert ask(there.url, "--model", "lorra")[1]["hint"] == "did you mean lora?"
    code, told, _ = ask("http://127.0.0.1:9")
    assert code == 2 and "connection refused" in told["error"]
    code, told, _ = ask("http://nowhere.invalid")
    assert code == 2 and "no such host: nowhere.invalid" in told["error"]


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://x", "file:///etc/passwd", "http://", "http://a:b@h", "http://h?x=1",
     "http://h:99999", "http://h/a b", "http://h\n/", "//h", ""],
)  # fmt: skip
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(lora_fx.LoraFxError) as error:
        Server(url)
    assert "b@" not in error.value.message, "a password is not printed"


@pytest.mark.parametrize(
    ("url", "path"),
    [("http://h:1", "http://h:1/v1"), ("https://h/v1/", "https://h/v1"),
     ("http://h/x/v1", "http://h/x/v1"), ("http://h/x/", "http://h/x/v1")],
)  # fmt: skip
def test_v1_may_be_left_out(url: str, path: str) -> None:
    assert Server(url).url == path


# Who is asked, and what is told.


def test_nobody_else_is_asked(place: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The URL's host and port, whatever the environment and the server say."""
    contacted: list[Any] = []

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "socket.connect" and watching[0]:
            contacted.append(args[1])

    watching = [False]
    sys.addaudithook(watch)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-private")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    with serving(server(place)) as there, serving(server(place)) as elsewhere:
        watching[0] = True
        assert ask(there.url, "--base-model", "base")[0] == 0
        for target in (elsewhere.url, there.url, "/v1/completions", "file:///etc/passwd"):
            there.fault = fake.to(target)
            code, told, _ = ask(there.url)
            assert code == 2 and f"redirects to {target}" in told["error"]
        watching[0] = False
    host, _, port = there.url.removeprefix("http://").partition(":")
    assert set(contacted) == {(host, int(port))}
    assert elsewhere.asked == []
    headers = [headers for _, _, headers, _ in there.asked]
    assert not any("Authorization" in header for header in headers)
    assert "sk-private" not in str(there.asked)


def test_what_is_sent(place: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of the probe and the name: no file name, no other text."""
    monkeypatch.setenv(TOKEN, "secret")
    with serving(server(place)) as there:
        assert ask(there.url)[0] == 0
    prompts = [list(prompt.tokens) for prompt in question(place).prompts]
    for _, _, headers, body in there.asked:
        assert headers["Authorization"] == "Bearer secret"
        assert body.pop("prompt") in prompts
        assert body == {
            "model": "lora", "max_tokens": 1, "temperature": 1, "top_p": 1, "logprobs": 20,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        assert str(place) not in str(headers)


def test_without_a_server_nothing_is_opened(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(SystemExit) as end:
        main(["probe", str(place / "one"), "--base", str(place / "base"), "-o", str(tmp_path)])
    assert end.value.code == 0
    made, before = (tmp_path / NAME).read_text(), (place / "one" / NAME).read_text()
    assert json.loads(made)["language"] == json.loads(before)["language"], "made alike again"


# The probe itself.


def test_a_probe_is_replaced_with_force_alone(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "one", tmp_path / "one")
    line = ["probe", str(tmp_path / "one"), "--base", str(place / "base"), "-o"]
    for out, options, expected in (
        (tmp_path / "one", [], 2),
        (tmp_path / "one", ["--force"], 0),
        (tmp_path / "one" / NAME, ["--force"], 0),
        (tmp_path / "one" / "adapter_config.json", ["--force"], 2),
        (tmp_path / "nowhere" / "x.json", [], 2),
    ):
        with pytest.raises(SystemExit) as end:
            main([*line, str(out), *options])
        assert end.value.code == expected, out
    adapter = lora_fx.load_adapter(tmp_path / "one")
    lora_fx.save_adapter(adapter, tmp_path / "one", force=True)
    assert (tmp_path / "one" / NAME).exists(), "it is the same adapter"
    lora_fx.save_adapter(adapter.weighted(2.0), tmp_path / "one", force=True)
    assert not (tmp_path / "one" / NAME).exists(), "the probe of another adapter is gone"


def test_the_adapter_folder_is_as_it_was(place: Path) -> None:
    names = {path.name for path in (place / "one").iterdir()}
    assert NAME in names and "adapter_model.safetensors" in names
    assert lora_fx.load_adapter(place / "one").lowrank.keys()


def test_the_numbers_are_those_of_the_model(place: Path) -> None:
    """By transformers and numpy, without lora-fx."""
    probe = question(place)
    models = {
        "base": applied(place / "base"),
        "adapter": applied(place / "base", place / "one"),
        "half": applied(place / "base", place / "one", 0.5),
        "double": applied(place / "base", place / "one", 2.0),
    }
    lists = {
        "base": probe.base.values, "adapter": probe.adapter.values,
        "half": probe.half, "double": probe.double,
    }  # fmt: skip
    for name, model in models.items():
        expected = []
        for prompt, token, _ in probe.points:
            ids = torch.tensor([list(probe.prompts[prompt].tokens)])
            with torch.no_grad():
                row = model(ids).logits[0, -1].double().log_softmax(-1)
            expected.append(float(row[token]))
        assert np.abs(np.array(expected) - lists[name]).max() < 1e-4, name


def test_a_folder_without_a_probe(place: Path, tmp_path: Path, ask: Ask) -> None:
    shutil.copytree(place / "one", tmp_path / "bare")
    (tmp_path / "bare" / NAME).unlink()
    code, told, _ = ask("http://127.0.0.1:9", adapter=str(tmp_path / "bare"))
    assert code == 2 and "the folder has no probe" in told["error"]
    assert "lora-fx probe" in told["hint"]


def test_made_and_asked_at_once(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "one", tmp_path / "one", ignore=shutil.ignore_patterns(NAME))
    with serving(server(place)) as there, pytest.raises(SystemExit) as end:
        main([
            "probe", str(tmp_path / "one"), "--base", str(place / "base"),
            "--server", f"{there.url}/v1/", "--model", "lora", "-q",
        ])  # fmt: skip
    out, _ = capsys.readouterr()
    assert end.value.code == 0 and out.startswith("lora: serves the adapter one (")
    assert not (tmp_path / "one" / NAME).exists()


HOSTILE: dict[str, Callable[[Any], object]] = {
    "no prompts": lambda data: data.pop("prompts"),
    "a prompt without tokens": lambda data: data["prompts"][0].update(tokens=[]),
    "many prompts": lambda data: data.update(prompts=data["prompts"] * 9),
    "a long prompt": lambda data: data["prompts"][0].update(tokens=[1] * 513),
    "a long text": lambda data: data["prompts"][0].update(text="x" * 4097),
    "a token that is none": lambda data: data["points"].__setitem__(0, [0, -1, "x"]),
    "a prompt that is none": lambda data: data["points"].__setitem__(0, [99, 1, "x"]),
    "many points": lambda data: data.update(points=data["points"] * 9),
    "fewer values": lambda data: data["base"]["values"].pop(),
    "a value that is none": lambda data: data["base"]["values"].__setitem__(0, "1"),
    "no tolerance": lambda data: data.update(tolerance=0),
    "many groups": lambda data: data["adapter"].update(
        groups={str(i): data["base"]["values"] for i in range(17)}
    ),
    "texts of another kind": lambda data: data["base"].update(texts=[1] * 8),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_question_is_refused_before_anybody_is_asked(
    name: str, place: Path, tmp_path: Path, ask: Ask
) -> None:
    data = json.loads((place / "one" / NAME).read_text())
    HOSTILE[name](data["language"])
    text = json.dumps(data)
    (tmp_path / NAME).write_text(text)
    with serving(server(place)) as there:
        code, told, err = ask(there.url, adapter=str(tmp_path / NAME))
    assert code == 2 and len(err.splitlines()) == 2
    assert "its probe" in told["error"]
    assert there.asked == []
