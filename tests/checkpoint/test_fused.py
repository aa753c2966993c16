"""Updates of q, k, v for a fused weight, and back: what the model itself takes as q, k and v."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Dense
from lora_fx.checkpoint.merge import merge
from lora_fx.formats.io import load_adapter, save_adapter
from lora_fx.ir.layout import Layout, plain_layout
from tests.checkpoint import made
from tests.cli.test_cli import run

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 6, "vocab_size": 32}
GPT = {"n_embd": 24, "n_layer": 1, "n_head": 4, "vocab_size": 32}
GQA = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 40, "pad_token_id": 0}
# class → config, whether q, k and v go through the attention interface, the fused weight.
MODELS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "phi3": ("Phi3", GQA, "layers.0.self_attn.qkv_proj", ""),
    "neox": ("GPTNeoX", {**SMALL, "intermediate_size": 40},
             "layers.0.attention.query_key_value", ""),
    "bloom": ("Bloom", {"n_layer": 1, "n_head": 6, "hidden_size": 24, "vocab_size": 32},
              "h.0.self_attention.query_key_value", "_reshape"),
    "falcon": ("Falcon", {**SMALL, "num_kv_heads": 2, "new_decoder_architecture": True},
               "h.0.self_attention.query_key_value", "_split_heads"),
    "falcon, one key": ("Falcon", SMALL, "h.0.self_attention.query_key_value", "_split_heads"),
    "falcon, all keys": ("Falcon", {**SMALL, "multi_query": False},
                         "h.0.self_attention.query_key_value", "_split_heads"),
    "persimmon": ("Persimmon", {**SMALL, "intermediate_size": 40, "qk_layernorm": False},
                  "layers.0.self_attn.query_key_value", ""),
    "gpt2": ("GPT2", GPT, "h.0.attn.c_attn", ""),
    "bigcode": ("GPTBigCode", {**GPT, "multi_query": True}, "h.0.attn.c_attn", ""),
    "bigcode, all keys": ("GPTBigCode", {**GPT, "multi_query": False}, "h.0.attn.c_attn", ""),
    "codegen": ("CodeGen", {**GPT, "rotary_dim": 4}, "h.0.attn.qkv_proj", ""),
}  # fmt: skip


def seen(folder: Path, name: str) -> dict[str, np.ndarray[Any, Any]]:
    """What the model reads as q, k and v of one token [rows], and the input x of their weight."""
    _, _, module, method = MODELS[name]
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").double()
    found: dict[str, Any] = {}

    def spy(owner: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        found.update(q=q[0, :, 0], k=k[0, :, 0], v=v[0, :, 0])
        return torch.zeros_like(q).transpose(1, 2), None

    fused = model.get_submodule(module)
    fused.register_forward_hook(lambda m, args, out: found.update(x=args[0]))
    if method:
        owner = model.get_submodule(module.rpartition(".")[0])
        cut = getattr(owner, method)
        axis = 1 if method == "_reshape" else 2  # of heads

        def read(out: Any) -> Any:
            q, k, v = (t.movedim(axis, 1)[:, :, 0] for t in cut(out))
            keys = len(dict.fromkeys(map(bytes, k[0].detach().numpy())))  # Falcon repeats them
            found.update(q=q[0], k=k[0, :: len(k[0]) // keys], v=v[0, :: len(v[0]) // keys])
            return cut(out)

        setattr(owner, method, read)
    else:
        transformers.AttentionInterface.register("spy", spy)
        model.set_attn_implementation("spy")
    with torch.no_grad():
        model(torch.tensor([[5]]))
    return {k: v.detach().reshape(-1).numpy() for k, v in found.items()}


def base_of(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    kind, options, *_ = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_what_the_model_takes_as_q_k_and_v(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, module = base_of(name, tmp_path / "base"), MODELS[name][2]
    before = seen(base, name)
    rng, path = np.random.default_rng(1), module.rpartition(".")[0]
    ranks = {"q": 2, "k": 3, "v": 1}
    pairs = {
        f"{path}.{r}_proj": made.factors(rng, before[r].size, 24, ranks[r], 3.0) for r in ranks
    }
    pattern = {f"{r}_proj": n for r, n in ranks.items()}
    adapter = made.adapter(tmp_path / "apart", pairs, rank_pattern=pattern, lora_alpha=4)
    one, back, out = (str(tmp_path / n) for n in ("one", "back", "out"))
    code, _, err = run(capsys, "merge", str(base), str(adapter), "-o", out)
    assert code == 2 and f"lora-fx convert {adapter} -o FUSED --fuse --base {base}" in err
    code, told, err = run(capsys, "convert", str(adapter), "-o", one, "--fuse", "--base", str(base))
    assert code == 0 and f"→ {module}.weight" in told, err
    assert [*load_adapter(one)] == [f"{module}.weight"]
    merge(base, one, out)
    after = seen(tmp_path / "out", name)
    for role, rank in ranks.items():
        a, b = (m.astype(np.float64) for m in pairs[f"{path}.{role}_proj"])
        want = before[role] + 4 / rank * b @ (a @ before["x"])
        assert np.abs(want - before[role]).max() > 0.05 * np.abs(want).max()
        assert np.abs(after[role] - want).max() < 1e-5 * np.abs(want).max(), role
    assert run(capsys, "convert", one, "-o", back, "--split", "--base", str(base))[0] == 0
    again = load_adapter(back).lowrank
    assert again.keys() == {f"{m}.weight" for m in pairs}
    for m, (a, b) in pairs.items():
        low = again[f"{m}.weight"]
        assert np.array_equal(low.a, a) and np.array_equal(low.scale * low.b, 4 / len(a) * b)


def test_gate_and_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, found = base_of("phi3", tmp_path / "base"), list[Any]()

    def run_mlp(folder: Path) -> tuple[Any, Any, Any]:
        mlp = transformers.AutoModel.from_pretrained(folder).double().layers[0].mlp
        x = torch.randn(24, generator=torch.Generator().manual_seed(3)).double()
        mlp.down_proj.register_forward_hook(lambda m, args, out: found.append(args[0]))
        mlp(x)
        return x.numpy(), mlp.gate_up_proj(x), found[-1]

    x, both, h = run_mlp(base)
    halves = both.chunk(2)
    gate, up = (
        halves
        if torch.allclose(h, torch.nn.functional.silu(halves[0]) * halves[1])
        else halves[::-1]
    )
    rng = np.random.default_rng(2)
    pairs = {
        f"layers.0.mlp.{n}_proj": made.factors(rng, 40, 24, r, 3.0)
        for n, r in (("up", 2), ("gate", 2))
    }
    made.adapter(tmp_path / "apart", pairs)
    args = ["convert", str(tmp_path / "apart"), "-o", str(tmp_path / "one"), "--fuse"]
    assert run(capsys, *args, "--base", str(base))[0] == 0
    merge(base, tmp_path / "one", tmp_path / "out")
    deltas = {n: torch.from_numpy(2 * b.astype("f8") @ (a @ x)) for n, (a, b) in pairs.items()}
    want = torch.nn.functional.silu(gate + deltas["layers.0.mlp.gate_proj"]) * (
        up + deltas["layers.0.mlp.up_proj"]
    )
    got = run_mlp(tmp_path / "out")[2]
    assert (got - want).abs().max() < 1e-5 * want.abs().max() < (want - h).abs().max()


# The algebra, without a model: what is exact is equal bit by bit.

N, OUT = 10, {"q": 12, "k": 4, "v": 6}
SIZE = sum(OUT.values())
NAMES = [f"m.{r}_proj.weight" for r in OUT]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((SIZE, N)).astype("f4")
    config = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 2}
    made.checkpoint(Path("fused"), {"m.qkv_proj.weight": weight[: 12 + 8]}, config=config)
    split = np.split(weight, [12, 16])
    made.checkpoint(Path("split"), dict(zip(NAMES, split, strict=True)), config={})
    Path("map.json").write_text(
        json.dumps({"qkv": {"q_proj": "0:12", "k_proj": "12:16", "v_proj": "16:22"}})
    )
    yield tmp_path


def lows(**changes: Any) -> dict[str, LowRank]:
    """Updates of q, k and v, each with factors of its own."""
    rng = np.random.default_rng(5)
    pairs = [made.factors(rng, n, N, r) for n, r in zip(OUT.values(), (2, 1, 3), strict=True)]
    return {
        k: LowRank(a, b, 1.5 * len(a), **changes) for k, (a, b) in zip(NAMES, pairs, strict=True)
    }


def dense(adapter: Adapter, order: list[str]) -> np.ndarray[Any, Any]:
    parts = [adapter.lowrank[k] for k in order]
    return np.concatenate([p.scale * p.b.astype("f8") @ p.a.astype("f8") for p in parts])


def test_a_map_says_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(Adapter(lows()), "apart")
    assert run(capsys, "convert", "apart", "-o", "one", "--fuse", "--map", "map.json")[0] == 0
    one, apart = load_adapter("one"), load_adapter("apart")
    (low,) = one.lowrank.values()
    assert [*one.entries] == ["m.qkv.weight"] and low.rank == 6 and low.shape == (SIZE, N)
    assert np.abs(dense(one, ["m.qkv.weight"]) - dense(apart, NAMES)).max() < 1e-15
    assert run(capsys, "convert", "one", "-o", "back", "--split", "--map", "map.json")[0] == 0
    back = load_adapter("back").lowrank
    assert back.keys() == apart.lowrank.keys()
    for key, low in apart.lowrank.items():
        assert np.array_equal(low.a, back[key].a) and np.array_equal(low.b, back[key].b)
        assert low.alpha == back[key].alpha


def test_the_whole_and_its_part_add_up(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where they share A, and where the first has alpha 0."""
    rng = np.random.default_rng(7)
    a, b = made.factors(rng, SIZE, N, 3)
    part = rng.standard_normal((OUT["k"], 3)).astype("f4")
    for i, alpha in enumerate((3.0, 0.0)):
        both = {
            "m.qkv.weight": LowRank(a, b, alpha),
            "m.k_proj.weight": LowRank(a, part, 1.5),
        }
        save_adapter(Adapter(both), f"both{i}")
        done = run(capsys, "convert", f"both{i}", "-o", f"one{i}", "--fuse", "--map", "map.json")
        assert done[0] == 0, done
        want = alpha / 3 * b.astype("f8") @ a.astype("f8")
        want[12:16] += 0.5 * part.astype("f8") @ a.astype("f8")
        got = dense(load_adapter(f"one{i}"), ["m.qkv.weight"])
        assert np.abs(got - want).max() < 1e-6 * np.abs(want).max()


def test_scales_that_differ(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {
        k: LowRank(v.a, v.b, alpha)
        for (k, v), alpha in zip(lows().items(), (3.0, 0.7, 5.0), strict=True)
    }
    save_adapter(Adapter(parts), "apart")
    assert run(capsys, "convert", "apart", "-o", "one", "--fuse", "--map", "map.json")[0] == 0
    one, want = load_adapter("one"), dense(Adapter(parts), NAMES)
    assert np.abs(dense(one, ["m.qkv.weight"]) - want).max() < 1e-7 * np.abs(want).max()
    _, out, _ = run(
        capsys, "convert", "apart", "-o", "two", "--fuse", "--map", "map.json", "--json"
    )
    notes = [n for n in json.loads(out)["warnings"] if "is rescaled in fp32" in n]
    assert [n.split("'")[1] for n in notes] == NAMES[1:]


def test_one_a_is_kept_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(6)
    a, b = made.factors(rng, SIZE, N, 3)
    save_adapter(Adapter({"m.qkv.weight": LowRank(a, b, 2.0, variant="rslora")}), "whole")
    assert run(capsys, "convert", "whole", "-o", "apart", "--split", "--map", "map.json")[0] == 0
    parts = load_adapter("apart").lowrank
    assert all(np.array_equal(p.a, a) for p in parts.values()) and parts.keys() == {*NAMES}
    assert np.array_equal(np.concatenate([parts[n].b for n in NAMES]), b)
    assert run(capsys, "convert", "apart", "-o", "again", "--fuse", "--map", "map.json")[0] == 0
    low = load_adapter("again").lowrank["m.qkv.weight"]
    assert np.array_equal(low.a, a) and np.array_equal(low.b, b)
    assert (low.alpha, low.variant) == (2.0, "rslora")


def test_to_a_split_base_and_of_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(7)
    a, b = made.factors(rng, SIZE, N, 3)
    save_adapter(Adapter({"x.m.Wqkv.weight": LowRank(a, b, 3.0)}), "whole")
    code, _, err = run(capsys, "merge", "split", "whole", "-o", "out")
    assert code == 2 and "convert whole -o SPLIT --split --base split; then merge SPLIT" in err
    assert run(capsys, "convert", "whole", "-o", "apart", "--split", "--base", "split")[0] == 0
    assert {*load_adapter("apart")} == {f"x.{n}" for n in NAMES}
    merge("split", "apart", "out")
    after, before = made.read(Path("out")), made.read(Path("split"))
    delta = np.concatenate([after[n].astype("f8") - before[n] for n in NAMES])
    want = b.astype("f8") @ a
    assert np.abs(delta - want).max() < 1e-6 < np.abs(want).max()
    save_adapter(Adapter(lows()), "three")
    assert run(capsys, "convert", "three", "-o", "one", "--fuse", "--base", "split")[0] == 0
    assert [*load_adapter("one")] == ["m.qkv_proj.weight"]


def test_other_readers_stay_known(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(Adapter(lows(), {"other_readers": {NAMES[1]: ["norm"]}}), "apart")
    assert run(capsys, "convert", "apart", "-o", "one", "--fuse", "--map", "map.json")[0] == 0
    made.checkpoint(Path("base"), {"m.qkv.weight": np.ones((SIZE, N), "f4")})
    code, _, err = run(capsys, "merge", "base", "one", "-o", "out")
    assert code == 2 and "does not apply to norm" in err


@pytest.mark.parametrize(
    ("bases", "keys", "fits"),
    [
        (["a.b."], "a.b.", True),
        (["b."], "a.b.", True),
        (["a.b."], "b.", True),
        (["a.b.", "b."], "b.", True),
        (["a.b.", "c.b."], "b.", False),  # of two towers nobody knows which
        (["bb."], "b.", False),
    ],
)
def test_prefixes(
    bases: list[str], keys: str, fits: bool, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {f"{lead}m.qkv_proj.weight": np.ones((20, N), "f4") for lead in bases}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 2}
    made.checkpoint(Path("base"), weights, config=heads)
    save_adapter(Adapter({f"{keys}{k}": low for k, low in [*lows().items()][:2]}), "apart")
    code, _, err = run(capsys, "convert", "apart", "-o", "one", "--fuse", "--base", "base")
    assert code == (0 if fits else 2), err
    assert not fits or [*load_adapter("one")] == [f"{keys}m.qkv_proj.weight"]


def test_a_part_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = {k: v for k, v in lows().items() if "v_proj" in k}
    save_adapter(Adapter(only), "v")
    assert run(capsys, "convert", "v", "-o", "one", "--fuse", "--map", "map.json")[0] == 0
    low = load_adapter("one").lowrank["m.qkv.weight"]
    assert low.b.shape == (SIZE, 3) and not low.b[:16].any()
    assert run(capsys, "convert", "one", "-o", "back", "--split", "--map", "map.json")[0] == 0
    assert [*load_adapter("back")] == NAMES[2:]


def test_dora(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sized = {
        k: LowRank(v.a, v.b, v.alpha, magnitude=np.linspace(1, 2, len(v.b), dtype="f4"))
        for k, v in lows().items()
    }
    save_adapter(Adapter(sized), "apart")
    assert run(capsys, "convert", "apart", "-o", "one", "--fuse", "--map", "map.json")[0] == 0
    low = load_adapter("one").lowrank["m.qkv.weight"]
    assert low.magnitude is not None
    assert np.array_equal(low.magnitude, np.concatenate([v.magnitude for v in sized.values()]))
    assert run(capsys, "convert", "one", "-o", "back", "--split", "--map", "map.json")[0] == 0
    back = load_adapter("back").lowrank
    for key, was in sized.items():
        assert np.array_equal(back[key].magnitude, was.magnitude) and back[key].rank == was.rank
    code, _, err = run(
        capsys,
        "convert",
        "apart",
        "-o",
        "two",
        "--fuse",
        "--map",
        "map.json",
        "--exclude",
        "k_proj",
    )
    assert (
        code == 2
        and "only 18 of its 22 rows have a DoRA magnitude" in err
        and not Path("two").exists()
    )


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("target", ["peft", "kohya", "diffusers"])
def test_regions_leave_our_format(
    turned: bool, target: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(8)
    shape = (N, SIZE) if turned else (SIZE, N)
    made.checkpoint(Path("base"), {"unet.c.weight": rng.standard_normal(shape).astype("f4")})
    entries, want = {}, np.zeros((SIZE, N))
    for low, high, rank in ((0, 12, 2), (16, 22, 1)):
        a, b = made.factors(rng, high - low, N, rank)
        layout = plain_layout((high - low, N))
        if turned:
            layout = Layout((N, high - low), (), (1,), (0,), (N, high - low))
        text = f"unet.c.weight[:, {low}:{high}]" if turned else f"unet.c.weight[{low}:{high}]"
        entries[text] = LowRank(a, b, 4.0, layout)
        want[low:high] = 4 / rank * b.astype("f8") @ a
    save_adapter(Adapter(entries), "ours")
    out = {"peft": "out"}.get(target, "out.safetensors")
    args = ["convert", "ours", "-o", out, "--format", target]
    if target != "peft":
        code, _, err = run(capsys, *args)
        assert code == 2 and "--fuse --base" in err
    assert run(capsys, *args, "--fuse", "--base", "base")[0] == 0
    got = load_adapter(out, base="base")
    assert [*got] == ["unet.c.weight"] and (target != "peft" or not got.metadata["notes"])
    assert np.abs(dense(got, ["unet.c.weight"]) - want).max() < 1e-6
    merge("base", "ours", "one")
    merge("base", out, "two")
    one, two = (made.read(Path(n))["unet.c.weight"] for n in ("one", "two"))
    assert np.abs(one - two).max() < 1e-6 < np.abs(want).max()


def test_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = lows()
    q, whole = parts[NAMES[0]], LowRank(np.ones((1, N), "f4"), np.ones((SIZE, 1), "f4"), 1.0)
    odd = {
        "conv": {NAMES[0]: LowRank(q.a, q.b, 2.0, origin=Origin(op="embedding"))},
        "short": {**parts, NAMES[1]: parts[NAMES[2]]},
        "narrow": {**parts, NAMES[1]: LowRank(parts[NAMES[1]].a[:, :7], parts[NAMES[1]].b, 2.0)},
        "both": {**parts, "m.qkv.weight": whole},
        "bias": {**parts, "m.q_proj.bias": Dense(np.ones(12, "f4"))},
        "apart": parts,
        "ambiguous": {"m.query_key_value.weight": whole},
        "unknown": {k.replace("m.", "attn."): v for k, v in parts.items()},
    }  # fmt: skip
    for name, entries in odd.items():
        save_adapter(Adapter(entries), name)
    torch.manual_seed(0)
    wide = np.ones((3 * N, N), "f4")
    made.checkpoint(
        Path("odd"), {"attn.query_key_value.weight": wide}, config={"model_type": "new"}
    )
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 5}
    for kind, said in (
        ("minimax", {}),  # which has two orders
        ("llama", heads),  # 20, 5 and 5 rows, or 10 each
        ("few", {**heads, "head_dim": 4}),
    ):
        names = {"attn.qkv_proj.weight": wide[: 28 if kind == "few" else 30]}
        made.checkpoint(Path(kind), names, config={"model_type": kind, **said})
    maps = {
        "gap": {"qkv": {"q_proj": "0:12", "k_proj": "12:16", "v_proj": "17:23"}},
        "twice": {"qkv": {"q_proj": "0:12", "k_proj": "11:15", "v_proj": "16:22"}},
        "text": {"qkv": {"q_proj": "all"}},
        "list": {"qkv": ["q_proj"]},
        "zero": {"qkv": {"q_proj": "0:12:0"}},
        "empty": {"qkv": {"q_proj": "5:5:9"}},
        "huge": {"qkv": {"q_proj": "0:1:999999", "k_proj": "1:999999:999999"}},
        "other": {"kv": {"left": "0:4", "right": "4:8"}},
    }
    for name, table in maps.items():
        Path(f"{name}.json").write_text(json.dumps(table))
    Path("no.json").write_text("[1]")
    fuse, table = ["--fuse"], ["--map", "map.json"]
    rows: list[tuple[str, list[str], str]] = [
        ("apart", [*fuse], "expected one of --fuse and --split, with --base or --map"),
        ("apart", [*fuse, "--split", *table], "expected one of --fuse and --split"),
        ("apart", table, "expected one of --fuse and --split"),
        ("apart", ["--split", *table], "no update of the whole"),
        ("apart", [*fuse, "--map", "other.json"], "no update of a part"),
        ("both", ["--split", *table], "already has another update"),
        ("conv", [*fuse, *table], "expected LoRA or DoRA of a linear layer"),
        ("short", [*fuse, *table], "'m.k_proj.weight' is [6, 10], [out, in]; expected [4, 10]"),
        ("narrow", [*fuse, *table], "'m.k_proj.weight' is [4, 7], [out, in]; expected [4, 10]"),
        ("bias", [*fuse, *table], "'m.q_proj.bias' is trained too"),
        ("unknown", [*fuse, "--base", "odd"],
         "parts of 'attn.query_key_value.weight' are not known"),
        ("ambiguous", ["--split", "--base", "split"], "'m.query_key_value.weight' are not known"),
        ("unknown", [*fuse, "--base", "minimax"], "parts of 'attn.qkv_proj.weight' are not known"),
        ("unknown", [*fuse, "--base", "llama"], "parts of 'attn.qkv_proj.weight' are not known"),
        ("unknown", [*fuse, "--base", "few"], "parts of 'attn.qkv_proj.weight' are not known"),
        ("apart", [*fuse, "--base", "fused"], "m.v_proj.weight"),
        ("apart", [*fuse, "--map", "gap.json"], "has 23 rows, and the parts"),
        ("apart", [*fuse, "--map", "twice.json"], "has 22 rows, and the parts"),
        ("apart", [*fuse, "--map", "text.json"], "expected the rows of each part"),
        ("apart", [*fuse, "--map", "list.json"], "expected the rows of each part"),
        ("apart", [*fuse, "--map", "zero.json"], "expected the rows of each part"),
        ("apart", [*fuse, "--map", "empty.json"], "do not cover each row once"),
        ("apart", [*fuse, "--map", "huge.json"], "for a part of 'm.qkv.weight'"),
        ("apart", [*fuse, "--map", "no.json"], "no.json"),
        ("apart", [*fuse, "--map", "gone.json"], "gone.json"),
    ]  # fmt: skip
    for adapter, more, words in rows:
        code, _, err = run(capsys, "convert", adapter, "-o", "out", *more)
        assert code == 2 and words in err and err.count("\n") == 2, (adapter, more, err)
        assert not Path("out").exists()


WHOLE = LowRank(np.ones((1, N), "f4"), np.ones((SIZE, 1), "f4"), 1.0)


@pytest.mark.parametrize(
    ("entries", "how", "base"),
    [
        ({k.replace("m.", "attn."): v for k, v in lows().items()}, "--fuse", "odd"),
        ({"m.query_key_value.weight": WHOLE}, "--split", "split"),
    ],
)
def test_the_map_of_a_hint_is_one(
    here: Path, entries: dict[str, Any], how: str, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lacks what nobody knows, whose rows are which, and is a division of the whole."""
    wide = {"attn.query_key_value.weight": np.ones((SIZE, N), "f4")}
    made.checkpoint(Path("odd"), wide, config={"model_type": "new"})
    save_adapter(Adapter(entries), "start")
    code, _, err = run(capsys, "convert", "start", "-o", "out", how, "--base", base)
    assert code == 2
    Path("told.json").write_text(err.partition("--map FILE with content such as ")[2])
    code, _, err = run(capsys, "convert", "start", "-o", "out", how, "--map", "told.json")
    assert code == 0, err


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_peft_reads_what_was_fused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    base, rng = base_of("phi3", tmp_path / "base"), np.random.default_rng(9)
    pairs = {
        f"layers.0.self_attn.{r}_proj": made.factors(rng, n, 24, 2, 3.0)
        for r, n in (("q", 24), ("v", 8))
    }
    adapter, one = made.adapter(tmp_path / "apart", pairs), tmp_path / "one"
    assert (
        run(capsys, "convert", str(adapter), "-o", str(one), "--fuse", "--base", str(base))[0] == 0
    )
    merge(base, one, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(base), one)
    want = model.merge_and_unload().state_dict()["layers.0.self_attn.qkv_proj.weight"].numpy()
    name = "layers.0.self_attn.qkv_proj.weight"
    got, old = (made.read(tmp_path / n)[name] for n in ("out", "base"))
    assert np.array_equal(got[24:32], old[24:32]) and np.abs(got - want).max() < 1e-6
    assert np.abs(want - old)[:24].max() > 0.1 and np.abs(want - old)[32:].max() > 0.1


@pytest.mark.parametrize("target", ["diffusers", "kohya", "onnx_adapter"])
def test_files_of_image_tools(target: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {f"transformer.b.0.to_{n[2]}.weight": low for n, low in lows().items()}
    save_adapter(Adapter(names), "apart.safetensors", "diffusers")
    Path("rows.json").write_text(
        json.dumps({"to_qkv": {"to_q": "0:12", "to_k": "12:16", "to_v": "16:22"}})
    )
    out = "one.onnx_adapter" if target == "onnx_adapter" else "one.safetensors"
    args = ["convert", "apart.safetensors", "-o", out, "--format", target]
    assert run(capsys, *args, "--fuse", "--map", "rows.json")[0] == 0
    ((key, low),) = load_adapter(out).lowrank.items()
    assert key.removesuffix(".weight").replace(".", "_").endswith("b_0_to_qkv")
    want = dense(Adapter(names), [*names])
    assert np.abs(low.scale * low.b.astype("f8") @ low.a - want).max() < 1e-6 < np.abs(want).max()
