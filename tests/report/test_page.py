"""The page as text: what is in it, that nothing of a file's is markup, and how large it is."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from typing import Any

import pytest

from lora_fx.errors import visible
from lora_fx.report.html_text import number, percent
from lora_fx.report.loss_axis import LossAxis
from lora_fx.report.page import data_of_page, page
from lora_fx.report.rows import Row, rows_of
from lora_fx.report.structure import grouped
from lora_fx.text import strict_json
from tests.report.made import HOSTILE, everything, hostile, merged, target, trained
from tests.report.read import Page

LIMIT = 500_000
MADE = {"trained": lambda: trained(2), "everything": everything, "hostile": hostile}


def sections(seen: Page) -> list[str]:
    return [t["aria-labelledby"] or "" for name, t in seen.tags if name == "section"]


@pytest.mark.parametrize("make", [trained, merged], ids=["train", "merge"])
def test_500_targets_are_under_500_kb(make: Any) -> None:
    text = page(make(72))
    assert len(Page(text).targets) == 504
    assert len(text.encode()) < LIMIT


def test_one_row_per_target_with_its_numbers() -> None:
    result = trained(2)
    seen = Page(page(result)).targets
    total = result["flops"]["reached"] + result["flops"]["refused"]
    assert [r["target"] for r in seen] == [t["key"] for t in result["targets"]]
    spectra = result["page"]["adapters"][0]["updates"]
    for row, t, s in zip(seen, result["targets"], spectra, strict=True):
        assert row["rank"] == str(t["rank"]) and row["α"] == f"{t['alpha']:g}"
        assert (
            row["params"] == number(t["rank"] * (t["in"] + t["out"])) and row["role"] == t["role"]
        )
        assert row["shape"] == f"{t['shape'][0]} × {t['shape'][1]}"
        assert row["FLOPs"] == percent(t["flops"] / total)
        assert row["stable rank"] == number((s["norm"] / s["sigma"][0]) ** 2)
        assert row["‖ΔW‖"] == number(s["norm"])
        assert row["spectrum"] == f"[σ {number(s['sigma'][0])} to {number(s['sigma'][-1])}]"


def test_a_merge_says_what_rounding_lost() -> None:
    result = merged(1)
    seen = Page(page(result))
    for row, t in zip(seen.targets, result["tensors"], strict=True):
        assert row["rounding"] == percent(1 - t["gain"])
        assert row["unmoved"] == percent(t["lost"]) and row["effect"] == percent(t["ratio"])
    worst = max(result["tensors"], key=lambda t: 1 - t["gain"])
    assert f"Worst: {worst['key']}, {percent(1 - worst['gain'])}" in seen.text
    assert "rounding" in sections(seen)


def test_the_data_is_the_result() -> None:
    for make in MADE.values():
        result = make()
        assert Page(page(result)).data == strict_json(json.loads(json.dumps(result)))
    odd = Page(page({**trained(1), "before": math.nan, "losses": [math.inf, 1.0]}))
    assert odd.data["before"] is None and odd.data["losses"] == [None, 1.0]


def test_every_section_where_it_applies() -> None:
    assert sections(Page(page(everything()))) == [
        "warnings", "merge-1", "merge-2", "training", "parity", "structure", "rounding",
        "targets", "stages-of-the-graph", "not-adapted-and-why", "files", "this-run",
    ]  # fmt: skip
    bare = {"command": "convert", "ok": True, "from": "peft", "to": "kohya", "updates": 2}
    assert sections(Page(page(bare))) == []
    assert "Converted 2 updates from peft to kohya" in Page(page(bare)).text


def test_everything_that_was_said_is_there() -> None:
    result = everything()
    text = Page(page(result)).text
    for said in (
        result["error"], result["hint"], *result["warnings"], "an output head", "not faster",
        "no weight matmul uses it", "x, dimension 1 = 8", "no such file", "a.weight", "b.weight",
        "kept: step 50", "Stopped", "cd" * 32, "lora-fx train ./llama d.jsonl -o adapter", "3.13",
    ):  # fmt: skip
        assert said in text, said
    for step, loss in result["validation"].items():
        assert f"step {step}" in text and number(loss) in text


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_text(name: str) -> None:
    seen = Page(page(hostile()))
    assert visible(name) in [r["target"] for r in seen.targets]
    assert seen.text.count(visible(name)) >= 5
    assert seen.data["warnings"][HOSTILE.index(name)] == strict_json(name)


def test_a_hostile_name_is_no_markup() -> None:
    text = page(hostile())
    seen = Page(text)
    assert {t for t, _ in seen.tags} == {t for t, _ in Page(page(trained(1))).tags}
    for tag, attributes in seen.tags:
        assert not any(a.startswith("on") or a in ("src", "href") for a in attributes), tag
    assert sum(t == "script" for t, _ in seen.tags) == 2 and text.count("<script") == 2
    assert text.count("</script>") == 2 and "<!--" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert "\\u202egnp.exe" in seen.text and "a\\u0009b\\u000ac\\u0000d" in seen.text


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_nothing_is_asked_for(make: Any) -> None:
    text = page(make())
    for tag, attributes in Page(text).tags:
        assert not {"src", "href", "srcset", "action", "data", "xlink:href"} & set(attributes), tag
        assert tag not in ("link", "base", "img", "iframe", "object", "embed", "form", "image")
    assert (
        "url(" not in text
        and "@import" not in text
        and "http" not in text.replace("http-equiv", "")
    )
    assert "default-src 'none'" in text


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_every_drawing_says_what_it_shows(make: Any) -> None:
    tags = Page(page(make())).tags
    drawn = [a for t, a in tags if t == "svg"]
    assert drawn and all(a.get("role") == "img" and a.get("aria-label") for a in drawn)
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, a in tags:
        assert a.get("aria-labelledby", ids[0]) in ids
    levels = [int(t[1]) for t, _ in tags if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))


def test_blocks_follow_the_keys() -> None:
    keys = ["embed.weight", "h.0.q.weight", "h.0.mlp.fc.weight", "h.1.q.weight", "0.weight",
            "pool.dense.weight", "h.1.c_attn.weight[:, 0:768]"]  # fmt: skip
    found = [(name, [r.key for r in rows]) for name, rows in grouped([Row(k) for k in keys])]
    assert found == [
        ("", ["embed.weight", "0.weight"]),
        ("h.0", ["h.0.q.weight", "h.0.mlp.fc.weight"]),
        ("h.1", ["h.1.q.weight", "h.1.c_attn.weight[:, 0:768]"]),
        ("pool", ["pool.dense.weight"]),
    ]
    swin = [Row(f"layers.{i}.blocks.{j}.qkv.weight") for i in (0, 1) for j in range(1 + i)]
    names = [n for n, _ in grouped(swin)]
    assert names == ["layers.0", "layers.1.blocks.0", "layers.1.blocks.1"]
    experts = [Row(f"h.0.experts.{i}.{p}.weight") for i in range(9) for p in ("up", "down")]
    assert [n for n, _ in grouped(experts)] == [f"h.0.experts.{i}" for i in range(9)]


def test_an_adapters_key_means_the_target_that_ends_alike() -> None:
    names = {
        "model.h.0.q.weight": "h.0.q.weight",
        "model.h.10.q.weight": "base.model.h.10.q.weight",
        "unet.mid.k.weight": "lora_unet_mid_k",
    }
    updates = [
        {"key": k, "rank": 2, "parameters": 5, "sigma": [1.0], "norm": 1.0} for k in names.values()
    ]
    result = {"targets": [{"key": k} for k in names], "page": {"adapters": [{"updates": updates}]}}
    assert [(r.key, len(r.spectra)) for r in rows_of(result)] == [(k, 1) for k in names]
    two = {"targets": [{"key": "a.q.weight"}, {"key": "b.q.weight"}]}
    page_ = {"adapters": [{"updates": [{"key": "q.weight", "parameters": 5}]}]}
    assert len(rows_of({**two, "page": page_})) == 3, "which of the two is not known"


def test_several_adapters_of_one_tensor() -> None:
    update = {
        "key": "q.weight",
        "rank": 2,
        "alpha": 4.0,
        "parameters": 5,
        "sigma": [2.0, 1.0],
        "norm": 3.0,
    }
    both = [{"updates": [update]}, {"updates": [{**update, "rank": 3, "parameters": 7}]}]
    (row,) = rows_of({"tensors": [{"key": "q.weight", "gain": 1.0}], "page": {"adapters": both}})
    assert (row.rank, row.parameters, row.alpha) == ([2, 3], 12, [4.0, 4.0])
    (seen,) = Page(page({"page": {"adapters": both}})).targets
    assert seen["rank"] == "2 + 3" and seen["spectrum"].count("σ") == 2


LONG = "ad/adapter_model.safetensors: tensor 'a.b' is [8, 513]; expected [8, 512], of " + "a.b" * 20


def compared(rel: float, tol: float) -> dict[str, Any]:
    sizes = {"sizes": {"x": [2]}, "output": "y", "of": ""}
    return {**sizes, "max_abs": rel, "rel": rel, "tol": tol, "ok": rel <= tol}


RIGHT = {
    "adapter": None, "verdict": "right", "distance": 1e-9, "tolerance": 1e-5,
    "expected_effect": None, "found_effect": None, "sentence": "base: as it was",
}  # fmt: skip
WRONG = {**RIGHT, "adapter": "de", "verdict": "no effect", "distance": 0.5, "expected_effect": 1.0}


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"command": "verify", "ok": False, "parity": []}, "They differ"),
        ({"command": "verify", "ok": True, "fits": 3}, "The adapter fits: 3 low-rank updates"),
        (
            {"command": "verify", "ok": True, "targets": 4, "adapted": 3},
            "The adapter fits: 3 of 4 targets",
        ),
        ({"command": "verify", "ok": True, "verdicts": [RIGHT]}, "computes what its probe expects"),
        ({"command": "verify", "ok": False, "verdicts": [RIGHT, WRONG]}, "does not compute what"),
        ({"command": "verify", "ok": True, "tensors": 5, "equal": 5}, "5 of 5 tensors are equal"),
        (
            {"command": "verify", "ok": True, "tensors": 5, "equal": 5, "tol": 0.9},
            "5 of 5 tensors are equal within 0.9 of their largest element",
        ),
        (
            {"command": "merge", "ok": True, "tensors": [{"key": "a"}]},
            "1 tensor; nothing was written",
        ),
        (
            {"command": "export", "ok": True, "mode": "switch", "targets": 4},
            "ONNX file, mode switch",
        ),
        (
            {"command": "export", "ok": True, "mode": "switch", "outputs": ["m.pt2"]},
            "Program of torch, mode switch",
        ),
        ({"command": "plan", "ok": True}, "Done"),
        ({"command": "plan", "ok": False}, "The answer is no"),
        (
            {
                "command": "export",
                "ok": True,
                "parity": [compared(2e-3, 1e-2), compared(0.0, 1e-6)],
            },
            "ONNX file, mode merged, within 2.00e-03 of what it came from",
        ),
        (
            {"command": "verify", "ok": True, "parity": [compared(3e-4, 1e-3)]},
            "Within 3.00e-04 of each other",
        ),
        (
            {"command": "merge", "ok": False, "error": LONG, "hint": "h"},
            "tensor 'a.b' is [8, 513]; expected [8, 512] …",
        ),
    ],
)
def test_the_verdict_claims_no_more_than_the_result(result: dict[str, Any], said: str) -> None:
    seen = Page(page(result))
    assert said in seen.text
    assert "proven" not in seen.text
    marks = [a["class"] for t, a in seen.tags if t == "header"]
    assert marks == ["verdict ok" if result["ok"] else "verdict no"]


def test_the_losses_of_ranks_are_a_table() -> None:
    row = {
        "rank": 4, "parameters": 90, "error": 0.25, "loss": 1.75,
        "spread_error": 0.125, "spread_loss": 1.625,
    }  # fmt: skip
    seen = Page(page({"command": "truncate", "ok": True, "table": [row], "examples": 30}))
    assert sections(seen) == ["losses"]
    assert "1.750" in seen.text and "0.1250" in seen.text


def test_the_verdicts_of_a_probe_are_a_table() -> None:
    text = page({"command": "verify", "ok": False, "verdicts": [RIGHT, WRONG]})
    assert "<b class=good>right</b>" in text and "<b class=bad>no effect</b>" in text
    assert "1 of 2" in text and sections(Page(text)) == ["probe"]


def test_equal_is_said_of_what_was_held_to_a_gate_of_fp32() -> None:
    text = Page(page({"command": "export", "ok": True, "parity": [compared(4e-7, 2e-6)]})).text
    assert "ONNX file, mode merged, proven equal to what it came from" in text


def test_a_long_error_is_there_in_full() -> None:
    seen = Page(page({"command": "merge", "ok": False, "error": LONG, "hint": ""}))
    assert LONG in seen.text and seen.text.count("tensor 'a.b' is [8, 513]") >= 2
    short = Page(page({"command": "merge", "ok": False, "error": "no such file", "hint": ""}))
    assert short.text.partition("Stopped")[2].count("no such file") == 1


def test_the_error_of_truncate_is_a_number_and_no_message() -> None:
    result = {"command": "truncate", "ok": True, "error": 6.5, "relative": 0.25, "parameters": 4}
    seen = Page(page({**result, "parameters_before": 8}))
    assert "Truncated from 8 to 4 parameters" in seen.text
    assert "6.5" not in seen.text.partition('"command"')[0]


def test_a_training_without_a_result_says_so() -> None:
    result = trained(1, steps=40) | {"ok": False, "best_step": 20, "hint": "--resume s"}
    result["page"]["run"] = {"state": "interrupted", "step": 40, "steps": 80, "digest": None}
    text = page(result)
    seen = Page(text)
    assert "Training 7 targets: interrupted after step 40 of 80" in seen.text
    assert "best: step 20" in seen.text and "kept" not in seen.text.partition('"command"')[0]
    assert "<title>lora-fx train: interrupted</title>" in text and "verdict interrupted" in text
    assert "step 20 of 80" in seen.text and "--resume s" in seen.text
    running = {"state": "running", "step": 40, "steps": 80, "digest": None}
    again = page({**result, "ok": True, "page": {**result["page"], "run": running}})
    assert "location.reload()" in again and "location.reload()" not in text


def test_rows_of_adapters_are_in_the_order_of_the_page() -> None:
    keys = ["h.10.a.weight", "h.2.b.weight", "h.2.q.weight[4:8]", "h.2.q.weight[0:4]", "x.weight"]
    updates = [{"key": key, "rank": 2, "sigma": [1.0], "norm": 1.0} for key in keys]
    shown = {"adapters": [{"updates": updates}]}
    by_name = [row.key for row in rows_of({"page": shown})]
    assert by_name == [*keys[1:4], keys[0], keys[4]]
    order = ["h.2.q.weight", "h.2.b.weight", "h.10.a.weight"]
    in_order = [row.key for row in rows_of({"targets": 3, "page": {**shown, "order": order}})]
    assert in_order == [keys[3], keys[2], keys[1], keys[0], keys[4]]


def test_a_note_is_no_warning_and_a_run_says_when_it_was() -> None:
    more = {"notes": ["a note"], "when": "2026-01-02 03:04:05 +0000", "seconds": 12.3, "host": "h1"}
    result = {"command": "merge", "ok": True, "warnings": ["a note", "a warning"], "page": more}
    seen = Page(page(result))
    assert sections(seen)[:2] == ["warnings", "notes"]
    said = seen.text.partition('"command"')[0]
    assert said.index("a warning") < said.index("Notes") < said.index("a note")
    assert "lora-fx merge · 2026-01-02 03:04:05 +0000 · 12.3 s · h1" in " ".join(said.split())


@pytest.mark.parametrize(("best", "colour"), [(40, ""), (20, " class=good")])
def test_a_loss_that_still_falls_is_not_green(best: int, colour: str) -> None:
    result = trained(1, steps=40) | {"validation": {str(best): 1.0}, "best_step": best}
    assert f"<div{colour}><dt>Validation loss</dt>" in page(result | {"before": 2.0})


def test_a_merge_of_a_fleet_has_its_own_section() -> None:
    done = {"adapter": "de", "out": "m/de", "ok": True, "warnings": ["look"]}
    numbers = {"tensors": 14, "ratio": 0.031, "gain": 0.875}
    failed = {
        "adapter": "fr",
        "out": "m/fr",
        "ok": False,
        "error": "no such file",
        "hint": "where?",
    }
    kept = {"adapter": HOSTILE[0], "out": "m/x", "ok": True, "kept": True}
    seen = Page(page({"command": "merge-all", "merges": [done | numbers, failed, kept]}))
    assert sections(seen) == ["merge-1", "merge-2", "merge-3"]
    first, second, third = re.split(r"Merge \d: ", seen.text.partition('"command"')[0])[1:]
    assert all(t in first for t in ("de", "done", "14 tensors", "0.03100", "87.5", "look"))
    assert all(t in second for t in ("fr", "failed", "no such file", "where?"))
    assert "kept: it was there already" in third


def test_the_worst_comparison_is_in_the_strip() -> None:
    ok = {"sizes": {"x": [2]}, "max_abs": 1e-7, "rel": 1e-7, "tol": 1e-6, "output": "y", "of": ""}
    near = {**ok, "rel": 9e-4, "tol": 1e-3, "ok": True}
    text = page({"command": "verify", "ok": True, "parity": [{**ok, "ok": True}, near]})
    assert re.search(r"class=good><dt>Largest relative error</dt><dd class=value>9.00e-04", text)
    over = {**ok, "rel": 2e-6, "ok": False}
    text = page({"command": "verify", "ok": False, "parity": [near, over]})
    assert re.search(
        r"class=bad><dt>Relative error over its gate</dt><dd class=value>2.00e-06", text
    )


FOLD = {
    "sizes": {"x": [2]},
    "max_abs": 1e-7,
    "rel": 9.1e-7,
    "tol": 1e-6,
    "output": "y",
    "of": "fold",
}
INT8 = {**FOLD, "rel": 0.1183, "tol": 0.3, "of": "onnxruntime"}
BLANK = {**FOLD, "rel": 0.5, "tol": 2.0, "blank": True, "of": "b"}
EXACT = {**FOLD, "rel": 0.0, "of": "c"}


@pytest.mark.parametrize(
    ("parity", "value", "of"),
    [
        ([FOLD, INT8], "0.1183", "onnxruntime"),
        ([INT8, FOLD], "0.1183", "onnxruntime"),
        ([EXACT, FOLD], "9.10e-07", "fold"),
        ([BLANK, FOLD], "9.10e-07", "fold"),  # a comparison that proves nothing decides nothing
        (
            [{**FOLD, "rel": 3e-5, "tol": 4e-5}, {**INT8, "rel": 2e-5, "tol": 2.1e-5}],
            "3.00e-05",
            "fold",
        ),
        ([{**INT8, "rel": 1e-3, "tol": 0.3}, {**FOLD, "rel": 9.99e-7}], "1.00e-03", "onnxruntime"),
    ],
)
def test_the_largest_of_what_holds_comes_first(parity: list[Any], value: str, of: str) -> None:
    """It is the number of the heading: on 1358f462 the one nearest to its gate was called so."""
    rows = [{**p, "ok": True} for p in parity]
    text = page({"command": "export", "ok": True, "mode": "merged", "parity": rows})
    strip = (
        rf"class=good><dt>Largest relative error</dt><dd class=value>{value}</dd><dd class=beside>"
    )
    assert re.search(rf"{strip}gate [^<;]*; {of}; 2 comparisons", text)


def test_a_long_run_is_drawn_as_means_and_one_without_validation_says_so() -> None:
    long = page(trained(1, steps=10_000))
    assert "means of 25 steps" in long
    short = page({**trained(1, steps=20), "validation": {}, "before": None})
    assert "no validation" in short and "class=dots" not in short
    flat = page(
        {**trained(1, steps=2), "losses": [1.0, 1.0], "validation": {"2": 1.0}, "before": 1.0}
    )
    assert "nan" not in flat and "<svg" in flat
    target_free = {"key": "a.weight", "rank": 0}
    assert "<svg" in page({"targets": [target("a.weight", "", 2, 2, 0) | target_free]})


def test_the_curve_lies_where_the_losses_are() -> None:
    held = {"10": 2.0, "20": 1.0, "40": 3.0}
    result = trained(1, steps=40) | {"losses": [4.0, *[2.0] * 39], "validation": held}
    text = page(result | {"before": None, "best_step": 20})
    assert 'class=kept d="M500 0v300"' in text, "half of the way"
    assert "<b>step 20 (kept) 1.000</b>" in text and text.count("(kept)") == 1
    line = re.search(r'class="line held" d="M([^"]*)"', text)
    assert line
    found = [tuple(map(float, p.split())) for p in line[1].split("L")]
    assert [x for x, _ in found] == [250, 500, 1000]
    marks = [float(y) for y in re.findall(r"top:[\d.]+%>([\d.]+)</span>", text)]
    low, high = min(marks), max(marks)
    assert [high - y / 300 * (high - low) for _, y in found] == pytest.approx([2, 1, 3])


def test_untrained_updates_have_no_spectra() -> None:
    zero = {"key": "a.weight", "parameters": 5, "sigma": [0.0], "norm": 0.0}
    some = {**zero, "key": "b.weight", "sigma": [2.0], "norm": 2.0}
    (row,) = Page(page({"page": {"adapters": [{"updates": [zero]}]}})).targets
    assert row == {"target": "a.weight", "params": "5"}
    first, second = Page(page({"page": {"adapters": [{"updates": [zero, some]}]}})).targets
    assert first["spectrum"] == "all zero" and second["stable rank"] == "1.000"


def test_a_column_needs_one_row_that_knows() -> None:
    rows = [target("a.weight", "", 2, 3, 4), target("b.weight", "q", 2, 3, 4)]
    first, second = Page(page({"targets": rows})).targets
    assert (first["role"], second["role"]) == ("", "q")
    assert "rounding" not in first and "spectrum" not in first


def test_the_runs_of_a_sweep_are_one_picture_and_a_table() -> None:
    losses = [1.0, 0.8, 0.6, 0.5]
    rows: list[dict[str, Any]] = [
        {
            "run": run,
            "options": {"rank": 2 * run, "variant": "<b>lora", "lr": 3e-4},
            "adapter": None,
            "error": None,
            "losses": [run * loss for loss in losses],
            "validation": {"2": 0.9 * run, "4": 0.7 * run},
            "before": 1.1,
            "best_step": 4,
        }
        for run in (1, 2, 3)
    ]
    rows[2] |= {"error": "step 3: the loss is nan", "losses": [1.0, math.nan], "validation": {}}
    text = page({**trained(1), "best": 1, "runs": rows})
    shown = Page(text)
    assert "<h2 id=runs>Runs</h2>" in text and "<b>lora" not in text.partition("<script")[0]
    assert "Training and validation losses of 3 runs; best: run 1" in text
    picture = text.partition("<h2 id=runs>")[2].partition("</section>")[0]
    paths = re.findall(r'class="line (\w+)( faint)?" d="([^"]*)"', picture)
    assert [(kind, bool(faint)) for kind, faint, _ in paths] == [
        ("train", True), ("held", True), ("train", False), ("held", False),
    ]  # fmt: skip
    assert [path.count("M") for _, _, path in paths] == [2, 2, 1, 1]
    assert "step 3: the loss is nan" in picture and "0.7000" in picture and ">best" in picture
    assert shown.tags
    assert "id=runs" not in page(trained(1))


def test_losses_that_span_decades_have_a_logarithmic_axis() -> None:
    result = trained(1)
    narrow = Page(page({**result, "losses": [2.0, 1.0], "validation": {"2": 1.1}, "before": 2.1}))
    wide = Page(page({**result, "losses": [20.0, 0.02], "validation": {"2": 0.03}, "before": 25.0}))
    assert "logarithmic" not in narrow.text and "on a logarithmic axis" in wide.text
    axis = LossAxis.of([20.0, 0.02])
    assert (axis.low, axis.high, axis.ticks) == (0.02, 20.0, [0.1, 1.0, 10.0])
    depths = [axis.depth(tick) for tick in (10.0, 1.0, 0.1)]
    assert depths[1] - depths[0] == pytest.approx(depths[2] - depths[1])
    assert not LossAxis.of([20.0, 0.02, -1.0]).is_logarithmic, "a loss below zero has no logarithm"
    diverged = LossAxis.of([3e38, 1e-30])
    assert len(diverged.ticks) <= 8 and diverged.depth(3e38) < 0.1 < diverged.depth(1e-30)


def test_comparisons_with_equal_numbers_are_one_row() -> None:
    row = {"of": "fold", "output": "y", "max_abs": 0.0, "rel": 0.0, "tol": 1e-6, "ok": True}
    parity = [{**row, "sizes": {"x": [size, 8]}} for size in (2, 3, 1)]
    other = {**row, "of": "onnxruntime", "rel": 1e-7, "max_abs": 2e-7, "sizes": {"x": [2, 8]}}
    text = page({**trained(1), "parity": [*parity, other]})
    assert "x 2 × 8; x 3 × 8; x 1 × 8" in Page(text).text
    assert text.count("<td class=t>fold") == text.count("<td class=t>onnxruntime") == 1


OPENING = '<script type="application/json" id="data">'


def test_the_data_of_a_page_are_those_it_was_made_of() -> None:
    result = {
        "ok": True,
        "command": "train",
        "page": {"run": {"state": "failed", "digest": "</a>"}},
    }
    assert data_of_page(page(result))["page"]["run"]["digest"] == "</a>"


@pytest.mark.parametrize(
    "text",
    ["", OPENING, OPENING * 100_000, f"{OPENING}{'[' * 200_000}</script>", f"{OPENING}3</script>"],
    ids=["empty", "no end", "many without an end", "deep", "no object"],
)
def test_a_damaged_page_has_no_data(text: str) -> None:
    assert data_of_page(text) == {}
