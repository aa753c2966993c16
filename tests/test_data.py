"""Data files and loaders: what they become, and the one line that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fx.data import Buckets, Table, read_table, table_of, training_table
from lora_fx.data_files import read_npz
from lora_fx.errors import LoraFxError
from lora_fx.held_out import alike, split


def tokens(texts: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Word lengths, padded on the right."""
    words = [[len(w) for w in t.split()] for t in texts]
    width = max(map(len, words))
    return {
        "input_ids": np.array([w + [0] * (width - len(w)) for w in words]),
        "attention_mask": np.array([[1] * len(w) + [0] * (width - len(w)) for w in words]),
    }


def test_words_are_numbered_in_order_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    file.write_bytes(b"\xef\xbb\xbfa,kind\r\n1,dog\r\n2,cat\r\n3,dog\r\n")
    t = read_table(str(file), label="kind")
    assert list(t.columns) == ["a", "kind"] and t.words == ("cat", "dog")
    assert t.columns["kind"].tolist() == [1, 0, 1] and t.rows([2]).words == t.words


HELD: dict[str, tuple[str, Any]] = {
    "the same": ("a,kind\n5,dog\n6,cat\n7,emu\n", [1, 0, 2]),
    "fewer": ("a,kind\n5,emu\n6,cat\n", [2, 0]),
    "a new one": (
        "a,kind\n5,fox\n6,cat\n",
        "held.csv has a, kind, cat, fox; expected a, kind, cat",
    ),
    "numbers": ("a,kind\n5,1\n6,0\n", "held.csv has a, kind; expected a, kind, cat, dog, emu"),
    "columns": ("b,kind\n5,dog\n", "held.csv has b, kind, dog; expected a, kind, cat, dog, emu"),
}


@pytest.mark.parametrize("name", HELD)
def test_words_of_held_out_labels_have_the_numbers_of_the_training(
    name: str, tmp_path: Path
) -> None:
    text, wanted = HELD[name]
    (tmp_path / "held.csv").write_text(text)
    (tmp_path / "d.csv").write_text("a,kind\n1,dog\n2,cat\n3,emu\n4,dog\n")
    held, training = (read_table(str(tmp_path / f"{n}.csv"), label="kind") for n in ("held", "d"))
    if isinstance(wanted, str):
        with pytest.raises(LoraFxError, match=wanted):
            alike(held, training, "held.csv", "d.csv")
        return
    made = alike(held, training, "held.csv", "d.csv")
    assert made.columns["kind"].tolist() == wanted and made.words == ("cat", "dog", "emu")
    assert made.columns["a"].tolist() == held.columns["a"].tolist()


def test_a_new_label_among_many_is_named_alone(tmp_path: Path) -> None:
    rows = "".join(f"{i},w{i}\n" for i in range(300))
    (tmp_path / "d.csv").write_text(f"a,kind\n{rows}")
    (tmp_path / "held.csv").write_text(f"a,kind\n{rows}7,fox\n")
    held, training = (read_table(str(tmp_path / f"{n}.csv"), label="kind") for n in ("held", "d"))
    with pytest.raises(LoraFxError, match=r"'kind' has 'fox'; expected only labels in d\.csv"):
        alike(held, training, "held.csv", "d.csv")
    (tmp_path / "held.csv").write_text("b,kind\n1,w1\n")
    held = read_table(str(tmp_path / "held.csv"), label="kind")
    with pytest.raises(LoraFxError, match=r"b, kind, w1; expected a, kind, w0, .* and 294 more"):
        alike(held, training, "held.csv", "d.csv")


def test_a_line_separator_inside_a_json_text_ends_no_row(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "a\u2028b", "labels": 0}\n\n{"text": "c", "labels": 1}\n', "utf-8")
    assert len(read_table(str(file), tokenizer=tokens)) == 2


def test_batches_carry_no_padding_that_none_of_them_needs() -> None:
    t = table_of({"text": ["a b c d", "a", "b"], "labels": [0, 1, 1]}, "here", tokenizer=tokens)
    shapes = [b.columns["input_ids"].shape for b in t.batches(1)]
    assert shapes == [(1, 4), (1, 1), (1, 1)]
    left = Table({k: v[:, ::-1] for k, v in t.columns.items() if k != "labels"})
    assert [b.columns["input_ids"].shape for b in left.batches(1)] == [(1, 4)] * 3
    pixels = Table({"x": np.ones((2, 4), np.float32), "attention_mask": np.eye(2, 4, dtype=int)})
    assert next(pixels.batches(2)).columns["x"].shape == (2, 4), "only what the mask masks"


def test_shuffling_is_by_seed_and_loses_nothing() -> None:
    t = Table({"i": np.arange(10)})
    rows = [np.concatenate([b.columns["i"] for b in t.batches(3, seed)]) for seed in (1, 1, 2)]
    assert rows[0].tolist() == rows[1].tolist() != rows[2].tolist()
    assert sorted(rows[0]) == sorted(rows[2]) == list(range(10))
    made = Buckets([t.rows([0, 1]), t.rows([2])])
    assert len(made) == 3 and sorted(len(b) for b in made.batches(99, 0)) == [1, 2]


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_every_label_is_held_out_in_its_share(share: float) -> None:
    labels = np.repeat(np.arange(30), 8)
    _, held = split(Table({"labels": labels}, "labels"), share, 0)
    assert len(held) == share * len(labels)
    assert np.bincount(held.columns["labels"], minlength=30).max() <= 1 + share * 8


def test_whole_numbers_that_do_not_repeat_are_no_labels() -> None:
    training, held = split(Table({"y": np.arange(0, 700, 7)}, "y"), 0.1, 0)
    assert (len(training), len(held)) == (90, 10)
    assert [len(t) for t in split(Table({"y": np.arange(1)}, "y"), 0.1, 0)] == [1, 0]


def test_loaders_return_columns_or_batches() -> None:
    whole = table_of({"x": np.ones((6, 2)), "labels": [0, 1, 2] * 2}, "here")
    parts = ({"x": np.ones((3, 2)), "labels": [0, 1, 2]} for _ in range(2))
    joined = table_of(parts, "here")
    assert joined.label == "labels"
    for name, column in whole.columns.items():
        np.testing.assert_array_equal(joined.columns[name], column)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (3, "item 1 is not a dictionary"),
        ([{"x": [1]}, {"y": [1]}], "item 2 is not a dictionary with the keys of the first item"),
        ([], "no rows"),
        ({"x": np.array(3)}, "column 'x' has no rows"),
        ({"text": ["a", None]}, "column 'text' is text in row 1 and empty in row 2"),
        ({"labels": [1, "a"]}, "column 'labels' is a number in row 1 and text in row 2"),
        ({"x": [{}, {}]}, "neither numbers nor text"),
    ],
)
def test_bad_columns(raw: Any, message: str) -> None:
    with pytest.raises(LoraFxError) as info:
        table_of(raw, "load.py:load", tokenizer=tokens)
    assert message in info.value.message and "load.py:load" in info.value.message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", b"a,kind\n\xe9,p\n", "line 2 is not UTF-8"),
        ("d.csv", b"a,a\n1,2\n", "two columns are named 'a'"),
        ("d.csv", b"a,b\n1,2\n,3\n", "column 'a' is empty in row 2"),
        ("d.jsonl", b"[1]\n", "line 1: a JSON list, not an object"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LoraFxError) as info:
        read_table(str(tmp_path / name))
    assert message in info.value.message and name in info.value.message


def test_a_column_of_texts_that_are_numbers_needs_a_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"x": "1", "labels": 0}\n{"x": "2", "labels": 1}\n')
    with pytest.raises(LoraFxError, match="column 'x' is text"):
        read_table(str(file))


def test_a_table_of_labels_alone_trains_nothing(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", labels=np.arange(3))
    with pytest.raises(LoraFxError, match="there is no column besides 'labels'"):
        training_table(str(tmp_path / "d.npz"), ["x"], lambda text: None)


def test_a_small_file_does_not_unpack_to_gigabytes(tmp_path: Path) -> None:
    for size, fits in ((1 << 20, True), (1 << 28, False)):
        np.savez_compressed(tmp_path / "x.npz", x=np.zeros(size, np.int8))
        if fits:
            assert read_npz(str(tmp_path / "x.npz"))["x"].size == size
        else:
            with pytest.raises(LoraFxError, match="when unpacked"):
                read_npz(str(tmp_path / "x.npz"))
