"""GGUF adapters, held to llama.cpp's own converter, its reader and its formulas."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lora_fx.adapter.adapter import INVOCATION, Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Entry
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import format_for, format_of, load_adapter, save_adapter
from lora_fx.ir.layout import Layout, plain_layout
from tests.formats.gguf_families import FAMILIES, LLAMA_CPP, adapter, config, digest

Array = np.ndarray[Any, Any]
Q, K = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk")
UP = "model.layers.0.mlp.up_proj.weight"


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def low(seed: int, out: int, in_: int = 20, rank: int = 2, alpha: float = 6.0) -> LowRank:
    return LowRank(normal(seed, rank, in_), normal(seed + 100, out, rank), alpha)


def model(folder: Path, name: str, **fields: Any) -> Path:
    """A folder with the config.json of a model."""
    whole = {k: v for k, v in {**config(name), **fields}.items() if v is not None}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def written(folder: Path, given: Adapter, name: str, **fields: Any) -> Path:
    out = folder / "x.gguf"
    save_adapter(given, out, "gguf", base=model(folder / "base", name, **fields), force=True)
    return out


def deltas(path: Path) -> dict[str, Array]:
    """ΔW as llama.cpp computes it, from what its reader returns: s B A, s = alpha / rank of B."""
    reader = GGUFReader(path)
    tensors = {t.name: np.asarray(t.data, np.float64) for t in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    found = {}
    for name in (n.removesuffix(".lora_a") for n in tensors if n.endswith(".lora_a")):
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = alpha / b.shape[-1] if alpha else 1.0
        found[name] = scale * (a @ b.T if name == "token_embd.weight" else b @ a)
    return found


def neighbours(rows: Array, heads: int) -> Array:
    """Row h·d + 2i + j is row h·d + j·d/2 + i of Hugging Face."""
    result, d = np.empty_like(rows), len(rows) // heads
    for h in range(heads):
        for i in range(d // 2):
            for j in (0, 1):
                result[h * d + 2 * i + j] = rows[h * d + j * (d // 2) + i]
    return result


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_that_of_llama_cpps_converter(tmp_path: Path, name: str) -> None:
    out, given = written(tmp_path, adapter(name), name), adapter(name)
    assert digest(out) == LLAMA_CPP[name]
    assert format_of(out) == format_for(out) == "gguf"
    again = load_adapter(out)
    assert set(again) == set(given) and not again.metadata["notes"]
    for key, want in given.lowrank.items():
        got = again.lowrank[key]
        np.testing.assert_array_equal(got.a, want.a, strict=True)
        np.testing.assert_array_equal(got.b, want.b, strict=True)
        assert (got.alpha, got.origin.op) == (6.0, want.origin.op)


def test_invocation_tokens_are_an_array_of_uint32(tmp_path: Path) -> None:
    """As src/llama-adapter.cpp reads them, and no other type (llama-cpp-python 0.3.36)."""
    given = replace(adapter("llama"), metadata={INVOCATION: [7, 128_255]})
    out = written(tmp_path, given, "llama")
    field = GGUFReader(out).fields["adapter.alora.invocation_tokens"]
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    assert field.contents() == [7, 128_255]
    assert load_adapter(out).invocation == (7, 128_255)
    assert load_adapter(written(tmp_path, adapter("llama"), "llama")).invocation == ()


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 5), groups=st.integers(1, 3), half=st.integers(1, 4),
    ranks=st.lists(st.integers(1, 4), min_size=4, max_size=4), in_=st.integers(1, 9),
    alphas=st.lists(st.sampled_from([3.0, 4.5, -2.0, 0.0, 1e-3]), min_size=4, max_size=4),
    variant=st.sampled_from(["lora", "rslora"]), name=st.sampled_from(["llama", "qwen3"]),
)  # fmt: skip
def test_the_change_is_the_same_in_every_shape(
    tmp_path_factory: pytest.TempPathFactory, heads: int, groups: int, half: int, ranks: list[int],
    in_: int, alphas: list[float], variant: str, name: str,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("gguf")
    rows = {Q: 2 * half * heads, K: 2 * half * groups, UP: 7, "lm_head.weight": 11}
    entries = {
        key: replace(low(i, n, in_, ranks[i], alphas[i]), variant=variant)
        for i, (key, n) in enumerate(rows.items())
    }
    fields = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": None}
    out = written(folder, Adapter(entries), name, **fields)
    found = deltas(out)
    want = {k: v.scale * v.b.astype(np.float64) @ v.a for k, v in entries.items()}
    again = load_adapter(out).deltas()
    for key, stem in (
        (Q, "blk.1.attn_q.weight"), (K, "blk.1.attn_k.weight"), (UP, "blk.0.ffn_up.weight"),
        ("lm_head.weight", "output.weight"),
    ):  # fmt: skip
        delta = want[key]
        if name == "llama" and key in (Q, K):
            delta = neighbours(delta, heads if key == Q else groups)
        limit = 4e-7 * np.abs(delta).max()
        np.testing.assert_allclose(found[stem], delta, rtol=0, atol=limit)
        np.testing.assert_allclose(again[key], want[key], rtol=0, atol=limit)


def test_one_alpha_for_the_file_and_the_others_in_b(tmp_path: Path) -> None:
    entries: dict[str, Entry] = {Q: low(0, 24), K: low(1, 8), UP: low(2, 14, alpha=5.0)}
    base = model(tmp_path / "base", "qwen2")
    (note,) = save_adapter(Adapter(entries), tmp_path / "x.gguf", "gguf", base=base)
    assert "one alpha in fp32, here 6.0" in note and "1 update with another" in note
    tensors = {t.name: t.data for t in GGUFReader(tmp_path / "x.gguf").tensors}
    assert tensors["blk.1.attn_q.weight.lora_b"].tobytes() == normal(100, 24, 2).tobytes()
    scaled = normal(102, 14, 2) * np.float32(5 / 6)
    np.testing.assert_array_equal(tensors["blk.0.ffn_up.weight.lora_b"], scaled)


def test_an_alpha_that_fp32_rounds_is_no_other_alpha(tmp_path: Path) -> None:
    adapter = Adapter({Q: low(0, 24, alpha=0.7), K: low(1, 8, alpha=0.7)})
    base = model(tmp_path / "base", "qwen2")
    assert save_adapter(adapter, tmp_path / "x.gguf", "gguf", base=base) == ()
    tensors = {t.name: t.data for t in GGUFReader(tmp_path / "x.gguf").tensors}
    assert tensors["blk.1.attn_q.weight.lora_b"].tobytes() == normal(100, 24, 2).tobytes()


def test_a_stack_of_experts_is_split_into_its_halves(tmp_path: Path) -> None:
    stack = LowRank(normal(0, 3, 2, 20), normal(1, 3, 28, 2), 6.0)
    stack = replace(
        stack,
        layout=Layout((3, 28, 20), (0,), (1,), (2,), (3, 28, 20)),
        origin=Origin(op="experts"),
    )
    key = "model.layers.4.mlp.experts.gate_up_proj"
    out = written(tmp_path, Adapter({key: stack}), "qwen3_moe")
    want, found = stack.matrix(), deltas(out)
    np.testing.assert_array_equal(found["blk.4.ffn_gate_exps.weight"], want[:, :14])
    np.testing.assert_array_equal(found["blk.4.ffn_up_exps.weight"], want[:, 14:])
    again = load_adapter(out).deltas()
    for i in range(3):
        for j, leaf in enumerate(("gate", "up")):
            one = again[f"model.layers.4.mlp.experts.{i}.{leaf}_proj.weight"]
            np.testing.assert_array_equal(one, want[i, 14 * j : 14 * (j + 1)])


def test_a_table_in_the_layout_of_the_graph_and_of_a_file(tmp_path: Path) -> None:
    key, file = "model.embed_tokens.weight", low(0, 20, 34)
    looked_up = replace(file, origin=Origin(op="embedding"))
    rows = replace(looked_up, layout=Layout((34, 20), (), (1,), (0,), (34, 20)))
    head = LowRank(file.b.T.copy(), file.a.T.copy(), 6.0, plain_layout((34, 20)))
    want = file.matrix().T
    swapped = replace(head, origin=Origin(op="embedding"))  # a lookup in the layout of a head
    for entry in (looked_up, rows, head, swapped, replace(head, layout=None)):
        out = written(tmp_path, Adapter({key: entry}), "llama")
        np.testing.assert_allclose(deltas(out)["token_embd.weight"], want, rtol=1e-12)


EXPERT = "model.layers.0.mlp.experts.{}.up_proj.weight"
REFUSED: dict[str, tuple[str, dict[str, Entry], dict[str, Any], str]] = {
    "other module": ("llama", {"model.layers.0.mlp.gate_up_proj.weight": low(0, 28)}, {},
                     "llama has no such matrix of [28, 20]"),
    "vision": ("qwen2", {"model.visual.blocks.0.mlp.up_proj.weight": low(0, 28)}, {}, "no such"),
    "packed experts": ("qwen3_moe", {"model.layers.0.mlp.experts.down_proj": low(0, 28)}, {},
                       "no such matrix"),
    "tied head": ("qwen2", {"lm_head.weight": low(0, 34)}, {"tie_word_embeddings": True},
                  "one table for embedding and head"),
    "gemma": ("gemma", {"model.embed_tokens.weight": low(0, 34)}, {"tie_word_embeddings": False},
              "one table for embedding and head"),
    "an expert missing": ("qwen3_moe", {EXPERT.format(i): low(i, 14) for i in (0, 2)}, {},
                          "updates of the experts 0 to 2; found 2 updates, the last of expert 2"),
    "an expert too many": ("qwen3_moe", {EXPERT.format(i): low(i, 14) for i in (0, 1, 3)}, {},
                           "updates of the experts 0 to 2; found 3 updates, the last of expert 3"),
    "experts of two ranks": ("qwen3_moe", {EXPERT.format(i): low(i, 14, rank=1 + i % 2)
                                           for i in range(3)}, {}, "different ranks"),
    "twice": ("llama", {Q: low(0, 24), Q.replace("model.", "model.language_model."): low(1, 24)},
              {}, "has a second update"),
    "scales too far apart": (
        "qwen2", {Q: low(0, 24, alpha=1e-29), K: low(1, 8, alpha=1e29)}, {},
        f"{K!r}: the file has no field for its scale, and its numbers times 1e+58 are out of "
        "fp32's range"),
    "heads": ("llama", {Q: low(0, 22)}, {}, "22 rows"),
    "no heads": ("llama", {Q: low(0, 24)}, {"num_attention_heads": None}, "no number of heads"),
    "other model": ("llama", {Q: low(0, 24)}, {"model_type": "mamba"}, "for llama, "),
    "NaN": ("qwen2", {Q: replace(low(0, 24), a=normal(0, 2, 20) * np.float32("nan"))}, {}, "NaN"),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_what_llama_cpp_cannot_apply_is_refused_by_name(tmp_path: Path, row: str) -> None:
    name, entries, fields, word = REFUSED[row]
    base = model(tmp_path / "base", name, **fields)
    with pytest.raises(LoraFxError) as caught:
        save_adapter(Adapter(entries), tmp_path / "x.gguf", "gguf", base=base)
    assert word in caught.value.message and "\n" not in caught.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_writing_needs_the_base(tmp_path: Path) -> None:
    for base, word in ((None, "no base is given"), (tmp_path, f"{tmp_path} has no config.json")):
        with pytest.raises(LoraFxError, match=word) as caught:
            save_adapter(Adapter({Q: low(0, 24)}), tmp_path / "x.gguf", "gguf", base=base)
        assert "--base" in caught.value.hint


def foreign(path: Path, tensors: dict[str, Array], arch: str = "llama", **fields: Any) -> Path:
    """A file as another program writes it."""
    writer = GGUFWriter(path, arch)
    writer.add_type(fields.get("type", "adapter"))
    writer.add_string("adapter.type", fields.get("kind", "lora"))
    if "alpha" in fields:
        writer.add_float32("adapter.lora.alpha", fields["alpha"])
    if "tokens" in fields:
        writer.add_array("adapter.alora.invocation_tokens", fields["tokens"])
    for name, array in tensors.items():
        code = fields.get("code")
        data = array if code is None else gguf.quants.quantize(array, code)
        writer.add_tensor(name, data, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(stem: str, out: int, in_: int = 64, rank: int = 32) -> dict[str, Array]:
    return {f"{stem}.lora_a": normal(0, rank, in_), f"{stem}.lora_b": normal(1, out, rank)}


@pytest.mark.parametrize("code", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_files_of_others_in_every_type(tmp_path: Path, code: str) -> None:
    kind = gguf.GGMLQuantizationType[code]
    given = pair("blk.3.ffn_down.weight", 24)
    read = load_adapter(foreign(tmp_path / "x.gguf", given, code=kind))
    (got,) = read.lowrank.values()
    want = {
        k: gguf.quants.dequantize(gguf.quants.quantize(v, kind), kind) for k, v in given.items()
    }
    np.testing.assert_array_equal(got.a, want["blk.3.ffn_down.weight.lora_a"], strict=True)
    np.testing.assert_array_equal(got.b, want["blk.3.ffn_down.weight.lora_b"], strict=True)
    assert list(read) == ["model.layers.3.mlp.down_proj.weight"] and got.scale == 1.0
    assert bool(read.metadata["notes"]) == code.startswith("Q")


def test_heads_come_from_the_base_where_the_file_has_none(tmp_path: Path) -> None:
    given = pair("blk.0.attn_k.weight", 24)
    given |= {"blk.0.attn_norm.weight": normal(2, 64)}
    file = foreign(tmp_path / "x.gguf", given, alpha=16.0)
    with pytest.raises(LoraFxError, match=r"24 rows, but .* has no number of heads") as caught:
        load_adapter(file)
    assert "--base" in caught.value.hint
    read = load_adapter(file, base=model(tmp_path / "base", "llama", head_dim=12))
    (got,) = read.lowrank.values()
    np.testing.assert_array_equal(neighbours(got.b, 2), given["blk.0.attn_k.weight.lora_b"])
    assert got.scale == 0.5
    assert any("attn_norm" in note for note in read.metadata["notes"])


BAD: dict[str, tuple[dict[str, Array], dict[str, Any], str]] = {
    "a model": (pair("blk.0.ffn_up.weight", 24), {"type": "model"}, "('model', 'lora')"),
    "control vector": (pair("blk.0.ffn_up.weight", 24), {"kind": "control"}, "('adapter', 'cont"),
    "alora": (pair("blk.0.ffn_up.weight", 24), {"tokens": [1, -2]}, "list of 1 to 4096 token ids"),
    "nan": (pair("blk.0.ffn_up.weight", 24), {"alpha": float("nan")}, "adapter.lora.alpha"),
    "architecture": (pair("blk.0.ffn_up.weight", 24), {"arch": "t5"}, "architecture 't5'"),
    "half": ({"blk.0.ffn_up.weight.lora_a": normal(0, 2, 8)}, {}, "is not half of a pair"),
    "no half": ({"blk.0.ffn_up.weight": normal(0, 2, 8)}, {}, "is not half of a pair"),
    "unknown": (pair("blk.0.ssm_in.weight", 24), {}, "is not a known matrix of llama"),
    "no block": (pair("blk.x.ffn_up.weight", 24), {}, "is not a known matrix of llama"),
    "ranks": ({**pair("output.weight", 24), "output.weight.lora_a": normal(0, 3, 8)}, {},
              "expected [r, in]"),
    "axes": ({f"output.weight.lora_{x}": normal(0, 8) for x in "ab"}, {}, "expected [r, in]"),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD)
def test_files_of_others_that_are_no_adapter(tmp_path: Path, row: str) -> None:
    tensors, fields, word = BAD[row]
    file = foreign(tmp_path / "x.gguf", tensors, **fields)
    with pytest.raises(LoraFxError) as caught:
        load_adapter(file)
    assert word in caught.value.message and str(file) in caught.value.message
    assert "\n" not in caught.value.message and caught.value.hint


def test_a_file_for_another_architecture(tmp_path: Path) -> None:
    file = written(tmp_path, adapter("qwen2"), "qwen2")
    with pytest.raises(LoraFxError, match=r"is 'qwen2', but .*config\.json has 'llama'"):
        load_adapter(file, base=model(tmp_path / "other", "llama"))


def field(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def header(tensors: int, *fields: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(fields)) + b"".join(fields)


HOSTILE = {
    "an array without end": header(0, field(b"x", 9, struct.pack("<IQ", 4, 1 << 60))),
    "texts without end": header(0, field(b"x", 9, struct.pack("<IQ", 8, 1 << 40))),
    "arrays in arrays": header(0, field(b"x", 9, struct.pack("<IQ", 9, 1) * 5000)),
    "many values": header(0, field(b"x", 9, struct.pack("<IQ", 0, 60_000) + bytes(60_000))),
    "a text of 2^63": header(0, field(b"x", 8, struct.pack("<Q", 1 << 63))),
    "a type of its own": header(0, field(b"x", 77, b"")),
    "keys without end": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 62),
    "tensors without end": b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "empty": b"GGUF",
}


@pytest.mark.parametrize("row", HOSTILE)
def test_hostile_headers(tmp_path: Path, row: str) -> None:
    (tmp_path / "x.gguf").write_bytes(HOSTILE[row])
    with pytest.raises(LoraFxError, match=r"x\.gguf: ") as caught:
        load_adapter(tmp_path / "x.gguf")
    assert "\n" not in caught.value.message
    assert ("more than 50000 values" in caught.value.message) == (row == "many values")


def test_tensors_that_share_their_bytes(tmp_path: Path) -> None:
    file = foreign(tmp_path / "x.gguf", pair("output.weight", 32, 32))
    data = file.read_bytes()
    at = data.index(b"output.weight.lora_b") + 20 + 4 + 16 + 4
    assert load_adapter(file)
    for rest in (data[at + 8 :], data[at + 8 :][:-4096]):
        file.write_bytes(data[:at] + bytes(8) + rest)
        with pytest.raises(LoraFxError, match="overlap"):
            load_adapter(file)


def with_offset(data: bytes, name: bytes, offset: int) -> bytes:
    """A file in which a tensor of two axes is said to lie somewhere else."""
    at = data.index(name) + len(name) + 4 + 16 + 4
    return data[:at] + struct.pack("<Q", offset & ((1 << 64) - 1)) + data[at + 8 :]


def with_sizes(data: bytes, name: bytes, *sizes: int) -> bytes:
    at = data.index(name) + len(name) + 4
    return data[:at] + struct.pack("<2Q", *sizes) + data[at + 16 :]


A, B = b"output.weight.lora_a", b"output.weight.lora_b"
PLACES: dict[str, Callable[[bytes], bytes]] = {
    "into the header": lambda data: with_offset(data, B, -64),
    "into the header, the first": lambda data: with_offset(data, A, -32),
    "a whole turn": lambda data: with_offset(data, B, -(1 << 63)),
    "all bits": lambda data: with_offset(data, B, -1),
    "over the end": lambda data: with_offset(data, B, 1 << 40),
    "half over the other": lambda data: with_offset(data, B, 32),
    "both at one place": lambda data: with_offset(with_offset(data, A, 0), B, 0),
    "sizes that wrap": lambda data: with_sizes(data, B, 1 << 33, 1 << 31),
    "sizes that wrap to the count": lambda data: with_sizes(data, B, (1 << 62) + 8, 4),
}


@pytest.mark.parametrize("row", PLACES)
def test_places_that_wrap_or_overlap(tmp_path: Path, row: str) -> None:
    file = foreign(tmp_path / "x.gguf", pair("output.weight", 32, 32))
    file.write_bytes(PLACES[row](file.read_bytes()))
    with pytest.raises(LoraFxError, match=r"x\.gguf: ") as caught:
        load_adapter(file)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("block", ["00", "01", "0x0", "-0", "+0", "0_0", "\u0660", "9" * 5000, ""])
def test_a_block_has_one_name(tmp_path: Path, block: str) -> None:
    """blk.00 beside blk.0 would be a second update of layer 0."""
    whole = pair("blk.0.ffn_up.weight", 48, 20)
    other = pair(f"blk.{block}.ffn_up.weight", 48, 20)
    file = foreign(tmp_path / "x.gguf", {**whole, **other})
    with pytest.raises(LoraFxError, match="is not a known matrix of llama"):
        load_adapter(file)
    assert len(load_adapter(foreign(tmp_path / "x.gguf", whole))) == 1


def test_a_name_begins_with_blk(tmp_path: Path) -> None:
    file = foreign(tmp_path / "x.gguf", pair("0.ffn_up.weight", 48, 20))
    with pytest.raises(LoraFxError, match="is not a known matrix of llama"):
        load_adapter(file)


def test_cut_off_and_changed_files_are_one_line(tmp_path: Path) -> None:
    whole = written(tmp_path, Adapter({Q: low(0, 24), UP: low(1, 14)}), "llama").read_bytes()
    rng, file = np.random.default_rng(0), tmp_path / "y.gguf"
    for end in range(4, len(whole) - 1, 37):
        file.write_bytes(whole[:end])
        with pytest.raises(LoraFxError, match=rf"is needed, but the file has {end}\n"):
            load_adapter(file)
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(4, 900, 3):
            data[at] = rng.integers(256)
        file.write_bytes(data)
        try:
            load_adapter(file)
        except LoraFxError as error:
            assert "\n" not in error.message and str(file) in error.message


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, adapter("qwen2"), "qwen2")
    monkeypatch.setitem(sys.modules, "gguf", None)
    act: list[Callable[[], Any]] = [
        lambda: load_adapter(file),
        lambda: written(tmp_path, adapter("qwen2"), "qwen2"),
    ]
    for step in act:
        with pytest.raises(LoraFxError, match="needs the package gguf") as caught:
            step()
        assert caught.value.hint == "pip install 'lora-fx[gguf]'"


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main([*argv])
    return int(stop.value.code or 0)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    model(Path("base"), "llama", num_hidden_layers=1, head_dim=None)
    sides = {"self_attn.q_proj": 24, "self_attn.k_proj": 8, "mlp.gate_proj": 14}
    names = {f"model.layers.0.{m}.weight": n for m, n in sides.items()}
    weights = {k: normal(9 + n, n, 20) for k, n in names.items()}
    save_file(weights, "base/model.safetensors")
    save_adapter(Adapter({k: low(n, n) for k, n in names.items()}), "start")
    assert run("convert", "start", "-o", "x.gguf") == 2
    assert "--base" in capsys.readouterr().err and not Path("x.gguf").exists()
    assert run("convert", "start", "-o", "x.gguf", "--base", "base") == 0
    assert "3 updates, peft → gguf" in capsys.readouterr().out
    assert run("merge", "base", "start", "-o", "one") == 0
    assert run("merge", "base", "x.gguf", "-o", "two") == 0
    first, second = (load_file(f"{x}/model.safetensors") for x in ("one", "two"))
    for key, w in weights.items():
        assert second[key].tobytes() == first[key].tobytes()
        want = w + low(names[key], names[key]).matrix()
        np.testing.assert_allclose(second[key], want, rtol=0, atol=1e-6 * np.abs(want).max())
    assert run("merge", "base", "x.gguf:0.5", "-o", "three") == 0
    assert run("verify", "base", "x.gguf") == 0
    assert run("verify", "two", "base", "--adapter", "x.gguf") == 0
    assert run("doctor", "base", "x.gguf") == 0
    assert run("truncate", "x.gguf", "-o", "small", "--rank", "1") == 0
    assert run("convert", "x.gguf", "-o", "again") == 0
    name = "adapter_model.safetensors"
    assert (Path("again") / name).read_bytes() == (Path("start") / name).read_bytes()
    assert run("convert", "start", "-o", "x.gguf", "--base", "base", "--force") == 0
    capsys.readouterr()
    foreign(Path("model.gguf"), weights, type="model")
    for argv in (
        ["merge", "base", "model.gguf", "-o", "four"],
        ["convert", "start", "-o", "model.gguf", "--base", "base", "--force"],
    ):
        assert run(*argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("Error: model.gguf: ") and err.count("\n") == 2
    assert not Path("four").exists()
