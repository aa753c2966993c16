"""The buffers that CUDA graphs read, on the CPU: their numbers, and their addresses.

A replay reads the addresses of the run that was captured. So whatever a session computes through
the same addresses on the CPU, with other inputs and adapters in them, is what a replay would read.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import ORT_TOL, rel
from lora_fx.errors import LoraFxError
from lora_fx.onnx import Session
from lora_fx.onnx import adapter_session as sessions
from lora_fx.onnx.adapter_buffers import BASE, AdapterBuffers
from lora_fx.onnx.graph_runs import GraphRuns, refuse_uncapturable
from lora_fx.onnx.session import open_session
from lora_fx.onnx.unverified import CUDA_GRAPHS, never_run
from tests.onnx.test_batch import adapter
from tests.onnx.token_net import TokenNet

RANKS = {"de": 2, "fr": 3, "it": 5}
CHOICES: tuple[Any, ...] = (None, "de", "it", "fr", {"de": 0.5, "fr": -1.0}, {}, "it", None, "de")


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter]:
    """Adapters of other ranks; the last one is for one of the layers only."""
    captured = lora_fx.capture(TokenNet().eval(), (torch.randint(0, 11, (2, 5)),))
    keys = {"de": ["table", "up", "down"], "fr": ["table", "up", "down"], "it": ["down"]}
    return {
        name: adapter(captured, seed, rank, keys[name])
        for seed, (name, rank) in enumerate(RANKS.items())
    }


@pytest.fixture(scope="module")
def file(adapters: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs") / "switch.onnx"
    lora_fx.export(
        TokenNet().eval(),
        path,
        (torch.randint(0, 11, (2, 5)),),
        mode="switch",
        adapters=adapters,
        provider="cpu",
    )
    return path


def loaded(session: Session, adapters: dict[str, Adapter]) -> Session:
    for name, one in adapters.items():
        session.load(name, one)
    return session


@pytest.fixture
def plain(file: Path, adapters: dict[str, Adapter]) -> Session:
    return loaded(Session(file, "cpu"), adapters)


@pytest.fixture
def on_buffers(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """A session with CUDA graphs, whose provider is the CPU."""

    def on_cpu(*arguments: Any, cuda_graph: bool, **options: Any) -> Any:
        assert cuda_graph
        opened = open_session(arguments[0], "cpu", **options)
        opened.provider = "cuda"
        return opened

    monkeypatch.setattr(sessions, "open_session", on_cpu)
    with pytest.warns(RuntimeWarning, match="never run on a GPU"):
        session = Session(file, cuda_graph=True)
    session.provider = "cpu"
    yield session


def ids(seed: int = 0, rows: int = 3, tokens: int = 6) -> dict[str, Any]:
    return {"ids": np.random.default_rng(seed).integers(0, 11, (rows, tokens))}


def output(outputs: dict[str, Any]) -> Any:
    (values,) = outputs.values()
    return values


def test_a_switch_through_the_buffers_equals_the_ordinary_session(
    plain: Session, on_buffers: Session, adapters: dict[str, Adapter]
) -> None:
    loaded(on_buffers, adapters)
    found = []
    for seed, choice in enumerate(CHOICES):
        feeds = ids(seed, rows=1 + seed % 2)
        found.append((output(on_buffers.run(feeds, choice)), output(plain.run(feeds, choice))))
    for values, expected in found:  # the later runs have not written over these
        assert rel(values, expected) <= ORT_TOL
    base = output(plain.run(ids()))
    for name in RANKS:
        assert rel(output(plain.run(ids(), name)), base) > 0.05


def addresses(runs: GraphRuns) -> dict[str, int]:
    """The address of every value that is bound, by what it is."""
    found = {name: value.data_ptr() for name, value in runs.buffers.values.items()}
    for shape, bound in runs.shapes.items():
        for name, value in bound.inputs.items():
            found[f"{shape} {name}"] = value.data_ptr()
        for number, value in enumerate(bound.outputs):
            found[f"{shape} output {number}"] = value.data_ptr()
    return found


def test_no_address_changes_while_inputs_and_adapters_do(
    on_buffers: Session, adapters: dict[str, Adapter]
) -> None:
    loaded(on_buffers, adapters)
    for rows in (3, 1):
        on_buffers.run(ids(rows=rows), "de")
    runs = on_buffers._graph_runs
    assert runs is not None
    before = addresses(runs)
    assert (
        len(before) == 3 * 2 + 2 * 2
    )  # A and B of three targets; inputs and outputs of two shapes
    for seed, choice in enumerate(CHOICES):
        on_buffers.run(ids(seed, rows=1 + 2 * (seed % 2)), choice)
    assert addresses(runs) == before
    graphs = [bound.options.get_run_config_entry("gpu_graph_id") for bound in runs.shapes.values()]
    assert graphs == ["1", "2"]


def test_an_adapter_is_copied_once_for_many_runs(
    on_buffers: Session, adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(on_buffers, adapters)
    on_buffers.run(ids(), "de")
    runs = on_buffers._graph_runs
    assert runs is not None
    copies: list[str] = []
    for name, value in runs.buffers.values.items():
        runs.buffers.values[name] = Counted(value, name, copies)
    on_buffers.run(ids(1), "de")
    assert copies == []
    on_buffers.run(ids(1), "it")
    assert len(copies) == 6  # one target's A and B, and zeros over those of the two others
    on_buffers.run(ids(1), None)
    assert len(copies) == 8


class Counted:
    """A value that counts the copies into it."""

    def __init__(self, value: Any, name: str, copies: list[str]) -> None:
        self.value = value
        self.name = name
        self.copies = copies

    def update_inplace(self, array: Any) -> None:
        self.copies.append(self.name)
        self.value.update_inplace(array)


def test_a_file_of_another_adapter_under_a_name(
    plain: Session, on_buffers: Session, adapters: dict[str, Adapter]
) -> None:
    loaded(on_buffers, adapters)
    on_buffers.run(ids(), "it")
    on_buffers.load("it", adapters["fr"])
    np.testing.assert_allclose(
        output(on_buffers.run(ids(), "it")), output(plain.run(ids(), "fr")), atol=1e-6
    )


def test_a_larger_rank_is_refused_by_name(
    on_buffers: Session, adapters: dict[str, Adapter]
) -> None:
    on_buffers.load("fr", adapters["fr"])
    on_buffers.run(ids(), "fr")
    with pytest.raises(LoraFxError, match=r"adapter 'it' has rank 5, but .* rank 3") as caught:
        on_buffers.load("it", adapters["it"])
    assert "rank=5" in str(caught.value.hint)
    assert on_buffers.adapters == ("fr",)
    on_buffers.load("de", adapters["de"])
    with pytest.raises(LoraFxError, match=r"the mix of 'fr' and 'de' has rank 5, but .* rank 3"):
        on_buffers.run(ids(), {"fr": 1.0, "de": 1.0})


def test_threads_do_not_mix(
    plain: Session, on_buffers: Session, adapters: dict[str, Adapter]
) -> None:
    loaded(on_buffers, adapters)
    jobs = [(ids(seed, 1 + seed % 2), choice) for seed in range(4) for choice in CHOICES]
    expected = [output(plain.run(*job)) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: output(on_buffers.run(*job)), jobs))
    assert all(rel(*pair) <= ORT_TOL for pair in zip(found, expected, strict=True))


def test_an_empty_batch_binds_nothing(on_buffers: Session) -> None:
    assert output(on_buffers.run(ids(rows=0))).shape == (0, 5)
    assert on_buffers._graph_runs is not None and not on_buffers._graph_runs.shapes


def test_arrays_of_the_caller_stay_his(on_buffers: Session) -> None:
    first = ids(0)
    kept = first["ids"].copy()
    on_buffers.run(first)
    on_buffers.run(ids(1))
    np.testing.assert_array_equal(first["ids"], kept)


def test_a_failed_run_is_told_and_the_next_one_is_right(
    plain: Session, on_buffers: Session
) -> None:
    with pytest.raises(LoraFxError):
        on_buffers.run({"ids": np.full((3, 6), 99)})
    np.testing.assert_allclose(output(on_buffers.run(ids())), output(plain.run(ids())), atol=1e-6)


def test_an_own_binding_is_refused(on_buffers: Session) -> None:
    assert on_buffers.note == never_run(CUDA_GRAPHS)
    with pytest.raises(LoraFxError, match="a replay looks at no other binding"):
        on_buffers.bind(ids())


def test_a_file_without_slots_has_inputs_and_outputs_alone(file: Path, plain: Session) -> None:
    """A merged file, or one of mode batch."""
    from dataclasses import replace

    opened = open_session(file, "cpu")
    buffers = AdapterBuffers(replace(plain.manifest, slots={}), 1, "cpu")
    runs = GraphRuns(opened.session, buffers, "cpu")
    for seed in range(3):
        feeds = ids(seed)
        assert np.array_equal(output(runs.run(feeds, BASE)), output(opened.run(feeds)))


@pytest.mark.parametrize("provider", ["cpu", "auto"])
def test_without_cuda_it_is_refused(file: Path, provider: str) -> None:
    with pytest.raises(
        LoraFxError, match="CUDA graphs were requested, but the session runs on cpu"
    ):
        Session(file, provider, cuda_graph=True)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "2"])
def test_a_rank_that_is_none(file: Path, rank: Any) -> None:
    with pytest.raises(LoraFxError, match="expected 1 or more"):
        Session(file, cuda_graph=True, rank=rank)


def test_a_rank_without_graphs(file: Path) -> None:
    with pytest.raises(LoraFxError, match="rank has no effect without cuda_graph"):
        Session(file, rank=4)


def test_a_file_that_cannot_be_captured_names_the_node(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    path = tmp_path / "m.onnx"
    lora_fx.export(Branches(), path, (torch.ones(2, 3),), provider="cpu")
    with pytest.raises(
        LoraFxError, match=r"no CUDA graph can be captured: If '.*' is control"
    ) as e:
        refuse_uncapturable(path)
    assert "--target cuda" in str(e.value.hint)
    path.write_bytes(b"junk")
    with pytest.raises(LoraFxError, match=r"m.onnx: cannot be read"):
        Session(path, cuda_graph=True)
