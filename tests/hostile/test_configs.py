"""A folder's config.json reaches the constructors of a library as far as it describes its model."""

from __future__ import annotations

import json
import os
import pickle
import socket
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import TensorInfo
from lora_fx.files.sealed import sealed, unsealed
from lora_fx.fx.load.config_gate import named_by
from lora_fx.fx.load.folder_tokenizer import read_tokenizer
from lora_fx.fx.load.huggingface import load_folder
from lora_fx.fx.load.models import load_model
from lora_fx.fx.load.sealed_libraries import sealed_libraries
from lora_fx.fx.load.tensor_meter import Metered
from tests.hostile import configs
from tests.hostile.families import FAMILIES, save
from tests.hostile.watch import MARK, Payload


@pytest.fixture(autouse=True)
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who is logged in: what asks the Hub would send the token."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path)


def folder_of(family: str, folder: Path, **fields: Any) -> Path:
    """A good folder whose config.json says something else, too."""
    config = save(family, folder)
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reaches a socket, in this process."""
    found: list[str] = []

    def note(*args: Any, **kwargs: Any) -> Any:
        found.append(repr(args))
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", note)
    return found


TIMM = {"model_args": {"checkpoint_path": "evil.bin"}}
DPT = {"backbone_config": None, "backbone": "microsoft/resnet-50"}
ELSEWHERE: dict[str, tuple[str, dict[str, Any], str]] = {
    "timm's checkpoint": ("timm_wrapper", TIMM, "model_args.checkpoint_path"),
    "a checkpoint without an ending": (
        "timm_wrapper", {"model_args": {"checkpoint_path": "evil"}}, "model_args.checkpoint_path"
    ),
    "a folder": ("timm_wrapper", {"architecture": "local-dir:/etc"}, "architecture"),
    "the Hub": ("timm_wrapper", {"architecture": "hf-hub:timm/resnet18"}, "architecture"),
    "the Hub, as it was": ("timm_wrapper", {"architecture": "hf_hub:a/resnet18"}, "architecture"),
    "an address below": (
        "timm_wrapper", {"model_args": {"pretrained_cfg": {"url": "https://x.y/z"}}}, "url"
    ),
    "a cache": ("timm_wrapper", {"model_args": {"cache_dir": "elsewhere"}}, "cache_dir"),
    "a backbone of the Hub": ("dpt", DPT, "backbone"),
    "one with pretrained weights": ("dpt", {**DPT, "use_pretrained_backbone": True}, "backbone"),
    "one whose weights are not": ("dpt", {**DPT, "use_pretrained_backbone": False}, "backbone"),
    "a bare name": ("dpt", {**DPT, "backbone": "gpt2"}, "backbone 'gpt2'"),
    "a bare name of timm": ("dpt", {**DPT, "backbone": "resnet18"}, "backbone 'resnet18'"),
    "a backbone of detr": ("detr", {**DPT, "use_timm_backbone": False}, "backbone"),
    "a backbone of upernet": ("upernet", DPT, "backbone"),
    "a backbone of mask2former": ("mask2former", DPT, "backbone"),
    "a backbone of vitpose": ("vitpose", DPT, "backbone"),
    "a backbone of depth_anything": ("depth_anything", DPT, "backbone"),
    "a bare name in mask2former": ("mask2former", {**DPT, "backbone": "gpt2"}, "backbone 'gpt2'"),
    "timm's folder in depth_anything": (
        "depth_anything",
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "local-dir:/etc"}},
        "backbone_config.backbone",
    ),
    "a backbone's own config": (
        "dpt", {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:a/b"}},
        "backbone_config.backbone",
    ),
    "a vision config": (
        "clip", {"vision_config": {"model_type": "timm_wrapper", "architecture": "local-dir:/"}},
        "vision_config.architecture",
    ),
    "an activation that is a class": ("bert", {"hidden_act": "os.system"}, "hidden_act"),
    "an activation that is a path": ("llama", {"hidden_act": "../../gelu"}, "hidden_act"),
    "an address for a word": ("t5", {"feed_forward_proj": "https://x.y/gelu"}, "feed_forward_proj"),
    "a file for a list": ("swin", {"depths": "/etc/passwd"}, "depths"),
    "a rope of elsewhere": (
        "llama", {"rope_scaling": {"rope_type": "org/rope", "factor": 2.0}}, "rope_type"
    ),
    "deep in a list": ("gpt_neo", {"attention_types": [[["/x/y"], 1]]}, "attention_types[0][0][0]"),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_names_something_else_is_refused_by_name(
    name: str, tmp_path: Path, watched: list[str]
) -> None:
    family, fields, says = ELSEWHERE[name]
    folder = folder_of(family, tmp_path / "m", **fields)
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Payload(tmp_path)))
    (tmp_path / "evil").write_bytes(pickle.dumps(Payload(tmp_path)))
    for meta in (True, False):
        for trust in (False, meta):
            with pytest.raises(LoraFxError) as error:
                load_model(folder, meta=meta, trust=trust)
            assert says in error.value.message and "config.json" in error.value.message
            assert error.value.exit_code == 2 and error.value.hint
            assert "\n" not in error.value.message
    assert watched == [] and not (tmp_path / MARK).exists()


@pytest.mark.parametrize("family", ["dpt", "upernet", "mask2former", "vitpose", "depth_anything"])
def test_no_client_of_the_hub_is_made(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would read the certificates of the machine before anything is refused."""
    http = import_module("huggingface_hub.utils._http")
    monkeypatch.setattr(http, "_GLOBAL_CLIENT", None)
    made: list[object] = []
    factory = http._GLOBAL_CLIENT_FACTORY

    def noted() -> object:
        made.append(factory())
        return made[0]

    monkeypatch.setattr(http, "_GLOBAL_CLIENT_FACTORY", noted)
    folder = folder_of(family, tmp_path / "m", backbone_config=None, backbone="gpt2")
    with pytest.raises(LoraFxError, match=r"backbone 'gpt2': .*uses the network"):
        load_folder(folder, meta=True)
    assert made == []
    assert [http.get_session()] == made, "outside the block it is as it was"


LEGITIMATE: dict[str, tuple[str, dict[str, Any]]] = {
    "a backbone of timm by its name": (
        "conditional_detr",
        {"backbone_config": None, "backbone": "test_resnet", "use_pretrained_backbone": True},
    ),
    "where it comes from": ("llama", {"_name_or_path": "org/llama", "name_or_path": "/data/llama"}),
    "its code": ("llama", {"auto_map": {"AutoModel": "org/repo--modeling.Model"}}),
    "its pipeline": ("bert", {"custom_pipelines": {"x": {"impl": "pipe.Pipe"}}}),
    "its tokenizer": ("bert", {"tokenizer_class": "BertTokenizer", "processor_class": "a.B"}),
    "labels with slashes": ("bert", {"id2label": {"0": "and/or", "1": "n/a.txt"}}),
    "tasks": ("t5", {"task_specific_params": {"t": {"prefix": "from https://x.y/z to: "}}}),
    "a dtype": ("llama", {"dtype": "float32"}),
    "an older dtype": ("llama", {"torch_dtype": "float32"}),
    "an attention of the Hub": ("llama", {"_attn_implementation": "org/flash"}),
    "a field that nobody reads": ("vit", {"wandb_run_url": "https://w.ai/x", "teacher_id": "a/b"}),
    "what it was made of": ("llama", {"base_model": "org/base", "datasets": ["org/a", "org/b"]}),
    "what a card says": (
        "bert",
        {"language": "en/us", "license": "other/see-file", "author": "org/me", "task": "a/b",
         "description": "see https://x.y/z", "source": "https://x.y/z", "url": "https://x.y/z"},
    ),
    "who trained it": ("gpt2", {"commit": "org/repo", "version": "v1.beta", "dataset": "org/c4"}),
    "a tokenizer of elsewhere": ("t5", {"tokenizer": "org/tok", "tokenizer_name": "org/tok"}),
    "words about texts": ("clip", {"prefix": "a/b", "suffix": "n/a", "prompt": "yes/no"}),
    "timm's own record": (
        "timm_wrapper",
        {"pretrained_cfg": {"url": "https://x.y/z.pth", "hf_hub_id": "timm/test_resnet.r160_in1k"}},
    ),
    "a tag of timm": ("timm_wrapper", {"architecture": "test_resnet.r160_in1k"}),
    "numbers that are no sizes": ("llama", {"rope_theta": 1e9, "initializer_range": 1e-9}),
    "many positions that are not stored": ("llama", {"max_position_embeddings": 10_485_760}),
    "tokens seen": ("llama", {"seen_training_tokens": 15_000_000_000_000}),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGITIMATE)
def test_what_a_config_may_say_is_taken(name: str, tmp_path: Path, watched: list[str]) -> None:
    family, fields = LEGITIMATE[name]
    folder = folder_of(family, tmp_path / "m", **fields)
    for meta in (True, False):
        load_folder(folder, meta=meta)
    assert watched == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_taken(family: str, tmp_path: Path) -> None:
    save(family, tmp_path / "m")
    for meta in (True, False):
        loaded = load_folder(tmp_path / "m", meta=meta)
        assert not [n for n in loaded.notes if "random" in n]


SIZES: dict[str, tuple[str, dict[str, Any], str]] = {
    "layers": ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "some more layers": ("llama", {"num_hidden_layers": 100}, "expected at most 64"),
    "depths": ("swin", {"depths": [1, 10**9]}, "depths[1]"),
    "types of layers": ("gpt_neo", {"attention_types": [[["global"], 10**9]]}, "attention_types"),
    "a decoder's layers": ("bart", {"decoder_layers": 10**8}, "decoder_layers"),
    "layers below": ("clip", {"text_config": {"num_hidden_layers": 10**9}}, "text_config."),
    "labels": ("bert", {"num_labels": 10**9}, "num_labels"),
    "a vocabulary": ("llama", {"vocab_size": 10**9}, "tensors of more than"),
    "a width": ("bert", {"intermediate_size": 10**9}, "tensors of more than"),
    "positions that are stored": ("bert", {"max_position_embeddings": 10**9}, "tensors of more"),
    "a table of masks": ("gpt_neo", {"max_position_embeddings": 10**6}, "tensors of more than"),
    "a window": ("swin", {"window_size": 10**6}, "tensors of more than"),
    "an image": ("vit", {"image_size": 10**6}, "image_size is 1000000"),
    "an image of many patches": ("vit", {"image_size": 4000, "patch_size": 1}, "tensors of more"),
    "a convolution": ("wav2vec2", {"conv_dim": [8, 10**9]}, "tensors of more than"),
    "a number of thirty digits": ("llama", {"max_position_embeddings": 10**30}, "2^53"),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_bounded_before_anything_is_built(name: str, tmp_path: Path) -> None:
    family, fields, says = SIZES[name]
    folder = folder_of(family, tmp_path / "m", **fields)
    for meta in (True, False):
        with pytest.raises(LoraFxError) as error:
            load_folder(folder, meta=meta)
        assert says in error.value.message and str(folder / "config.json") in error.value.message


def test_a_constructor_that_raises_is_one_line(tmp_path: Path) -> None:
    """With codes as with numbers."""
    for fields in ({}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}):
        folder = folder_of("llama", tmp_path / str(len(fields)), head_dim=-1, **fields)
        for meta in (True, False):
            with pytest.raises(LoraFxError) as error:
                load_folder(folder, meta=meta)
            assert str(folder) in error.value.message and "\n" not in error.value.message


def test_a_large_example_is_no_error_of_ours(tmp_path: Path) -> None:
    folder = folder_of("resnet", tmp_path / "m", num_channels=10**6)
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoraFxError, match="2 x 1000000 x 224 x 224 numbers"):
        load_folder(folder, meta=True)


ROTARY = {"n_embd": 64, "n_layer": 1, "n_head": 1, "rotary_dim": 64, "vocab_size": 64}
LISTENING = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64}
TABLES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gptj": ("GPTJModel", {**ROTARY, "n_positions": 32}, "n_positions"),
    "codegen": ("CodeGenModel", {**ROTARY, "n_head": 4, "n_positions": 32}, "n_positions"),
    "speech_to_text": (
        "Speech2TextModel", {**LISTENING, "max_source_positions": 32}, "max_source_positions"
    ),
    "m2m_100": (
        "M2M100Model", {**LISTENING, "max_position_embeddings": 32}, "max_position_embeddings"
    ),
}  # fmt: skip
"""Families that compute a table of all positions, which is no tensor of their files."""


@pytest.mark.parametrize("family", TABLES)
def test_a_table_that_is_computed_is_bounded(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, fields, field = TABLES[family]
    monkeypatch.setitem(FAMILIES, family, (name, fields))
    folder = folder_of(family, tmp_path / "m", **{field: 3_000_000})
    with pytest.raises(LoraFxError, match=r"config\.json asks for tensors of more than"):
        load_folder(folder)
    load_folder(folder_of(family, tmp_path / "good"))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.outer(x, x), lambda x: torch.einsum("i,j->ij", x, x),
        lambda x: x[:, None] * x[None], lambda x: x.repeat(20_000),
        lambda x: torch.cat([x] * 20_000), lambda x: x[:, None] + x, lambda x: x.new_zeros(1 << 30),
        lambda x: torch.stack([x.expand(20_000, -1)] * 2),
    ],
)  # fmt: skip
def test_a_meter_looks_at_what_is_computed(
    make: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    line = torch.ones(20_000)
    file = {"w": TensorInfo("float32", (4,), tmp_path, 0, 16)}
    with Metered("x", file), pytest.raises(LoraFxError, match="x asks for tensors of"):
        make(line)
    with Metered("x", file):
        line[:, None].expand(-1, 1 << 20)  # takes no memory
        assert torch.outer(line[:5000], line[:5000]).shape == (5000, 5000)


def test_a_meter_counts_before_it_makes() -> None:
    with Metered("x", None), pytest.raises(LoraFxError, match="x asks for tensors of more than"):
        torch.empty(1 << 40, 1 << 20)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("gelu", ""), ("", ""), (" // ", ""), ("p2c|c2p", ""), ("5.24.0", ""), ("v1.0", ""),
        ("chunkwise--native", ""), ("torch.bfloat16", ""), ("float8_e4m3", ""), ("resnet18", ""),
        ("http://x", "an address"), ("git+ssh://x/y", "an address"), ("a/b", "another model"),
        ("hf:a/b", "another model"), ("timm:x", "another model"), ("/", ""), ("/x", "a path"),
        ("..", "a path"), ("a\\b", "a path"), ("~x", "a path"), ("x.PKL", "a path"),
        ("a/b/c", "a path"), ("os.system", "a class"), ("torch.nn.ReLU", "a class"),
        ("a:b", "a class"),
    ],
)  # fmt: skip
def test_what_a_text_names(text: str, kind: str) -> None:
    assert named_by(text) == kind


# The block, whatever a library does.


def connect() -> None:
    socket.create_connection(("127.0.0.1", 9), timeout=1)


def connect_raw() -> None:
    with socket.socket() as made:
        made.connect_ex(("127.0.0.1", 9))


def datagram() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as made:
        made.sendto(b"x", ("::1", 9))


def resolve() -> None:
    socket.gethostbyname("localhost")


def ask_the_hub() -> None:
    import_module("huggingface_hub").HfApi().repo_exists("org/model")


def download() -> None:
    import_module("huggingface_hub").hf_hub_download("org/model", "config.json")


def in_a_thread() -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            connect()
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    raise failed[0]


def unpickle() -> None:
    pickle.loads(pickle.dumps(Payload(Path.cwd())))


def unpickle_in_python() -> None:
    pickle._loads(pickle.dumps(Payload(Path.cwd())))  # type: ignore[attr-defined]


def load_tensors() -> None:
    torch.load("evil.bin", weights_only=True)


def load_by_its_module() -> None:
    torch.serialization.load("evil.bin", weights_only=True)


def load_anything() -> None:
    torch.load("evil.bin", weights_only=False)


def read_a_file() -> None:
    Path("evil.bin").read_bytes()


def read_the_token() -> None:
    Path("~/.cache/huggingface/token").expanduser().open()


ATTEMPTS: tuple[Callable[[], None], ...] = (
    connect, connect_raw, datagram, resolve, ask_the_hub, download, in_a_thread, unpickle,
    unpickle_in_python, load_tensors, load_by_its_module, load_anything, read_a_file,
    read_the_token,
)  # fmt: skip


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda f: f.__name__)
def test_a_library_reaches_nothing_while_it_builds(
    attempt: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a folder and for a reserved name alike."""
    torch.save({"x": torch.ones(2)}, tmp_path / "evil.bin")
    folder = folder_of("timm_wrapper", tmp_path / "m")
    monkeypatch.chdir(tmp_path)

    def create(*args: Any, **kwargs: Any) -> Any:
        attempt()
        return torch.nn.Linear(2, 2)

    monkeypatch.setattr("timm.create_model", create)
    for spec in (folder, "timm:test_resnet"):
        with pytest.raises(LoraFxError) as error:
            load_model(spec)
        assert error.value.exit_code == 2 and "\n" not in error.value.message
    assert not (tmp_path / MARK).exists()


def test_a_factory_of_the_user_may_do_what_it_likes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": torch.ones(2)}, "w.bin")
    (tmp_path / "net.py").write_text(
        "import pickle, socket, torch\n\n\ndef build():\n"
        "    torch.load('w.bin')\n    pickle.loads(pickle.dumps(torch.nn.Linear))\n"
        "    socket.getaddrinfo('127.0.0.1', 9)\n"
        "    return torch.nn.Linear(3, 2), (torch.ones(4, 3),), {}\n"
    )
    assert load_model("net.py:build").module is not None


def test_other_threads_are_not_in_the_block(tmp_path: Path) -> None:
    """Nor what lora-fx itself reads in it."""
    (tmp_path / "x").write_text("x")
    ready, done, found = threading.Event(), threading.Event(), []

    def other() -> None:
        ready.wait(10)
        found.append((tmp_path / "x").read_text())
        found.append(pickle.loads(pickle.dumps(os.path.join)))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with sealed("building it"):
        ready.set()
        assert done.wait(10)
        with unsealed():
            found.append((tmp_path / "x").read_text())
    thread.join()
    assert found == ["x", os.path.join, "x"]


@pytest.mark.parametrize("within", [False, True])
def test_blocks_of_two_threads_end_in_any_order(within: bool, tmp_path: Path) -> None:
    """Until both have ended torch.load is refused in them, and allowed elsewhere."""
    torch.save({"x": torch.ones(2)}, tmp_path / "w.bin")
    plain = torch.load, torch.serialization.load
    opened, ended = threading.Event(), threading.Event()

    def other() -> None:
        with sealed_libraries("the other", tmp_path):
            opened.set()
            assert ended.wait(10)

    thread = threading.Thread(target=other)

    def end_other() -> None:
        assert torch.load(tmp_path / "w.bin")["x"].sum() == 2
        ended.set()
        thread.join()

    thread.start()
    assert opened.wait(10)
    refused = pytest.raises(LoraFxError, match="this one opens a pickle")
    with refused, sealed_libraries("this one", tmp_path):
        if within:
            with unsealed():
                end_other()
        torch.load(tmp_path / "w.bin")
    if not within:
        end_other()
    assert (torch.load, torch.serialization.load) == plain


# Tokenizers.


def test_a_tokenizer_reads_no_file_of_another_place(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nsecret\n")
    folder = tmp_path / "m"
    folder.mkdir()
    for value in (str(secret), os.path.relpath(secret)):
        told = {"tokenizer_class": "BertTokenizer", "vocab_file": value}
        (folder / "tokenizer_config.json").write_text(json.dumps(told))
        with pytest.raises(LoraFxError, match=r"vocab_file is .*a file outside the folder"):
            read_tokenizer(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"name_or_path": "org/model"}, {"vocab_file": None}, {"tokenizer_file": "x"},
        {"special_tokens_map_file": "/home/x/.cache/special_tokens_map.json"},
        {"tokenizer_file": "/not/here.json"},
    ],
)  # fmt: skip
def test_files_of_another_machine_are_no_error(fields: dict[str, Any], tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    told = {"tokenizer_class": "BertTokenizer", **fields}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    assert read_tokenizer(tmp_path)("hello")["input_ids"]


# A few drawn ones; `python -m tests.hostile.configs` runs a thousand.


def test_drawn_configs(memory: Path) -> None:
    *failed, counts = configs.rounds(4, 20261130, ["llama", "vit"], memory)
    assert not failed and sum(json.loads(counts[1]).values()) == 4
