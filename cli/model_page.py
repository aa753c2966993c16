"""What the page of --report says of a model and of data that are in memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.cli.result_page import page_of_command

if TYPE_CHECKING:
    from lora_fx.data import Table
    from lora_fx.fx.capture.capture import Captured
    from lora_fx.targets.found import Found


def show_model(name: str, captured: Captured, *, meta: bool) -> None:
    """Show a model on the page of --report: a hash of its weights, and the order of its targets.

    The hash is that of a probe and of an adapter's base, over both ends of each matrix.

    Args:
        name: The MODEL argument.
        captured: The model.
        meta: Whether its weights were not read.
    """
    page_file = page_of_command()
    if page_file is None:
        return
    from lora_fx.fx.module.module_base import base_facts

    page_file.order = partial(_order_of_model, captured)
    if meta:
        return
    facts = base_facts(captured.model)
    if "sample" in facts:
        what = f"{facts['name']}: both ends of each of {facts['tensors']} matrices"
        row = {"of": "weights", "name": name, "what": what, "sha256": facts["sample"]}
        page_file.in_memory.append(row)


def show_data(name: str, training: Table, validation: Table) -> None:
    """Show a hash of data on the page of --report, where a function and no file has them.

    Args:
        name: The DATA argument.
        training: The examples.
        validation: The held-out examples.
    """
    page_file = page_of_command()
    if page_file is None or Path(name).exists():
        return
    from lora_fx.fx.train.run_facts import data_digest

    tables = (("training", training), ("validation", validation))
    for what, examples in [(what, table) for what, table in tables if len(table)]:
        counted = f"{len(examples)} {what} examples: every byte"
        row = {"of": "data", "name": name, "what": counted, "sha256": data_digest(examples)}
        page_file.in_memory.append(row)


def show_graph(model: str) -> None:
    """Show the targets of an .onnx file on the page of --report in the order of its graph."""
    page_file = page_of_command()
    if page_file is not None:
        page_file.order = partial(_order_of_file, model)


def _order_of_model(captured: Captured) -> list[str]:
    from lora_fx.passes.verbs.adapt import find

    return _keys(find(captured))


def _order_of_file(model: str) -> list[str]:
    from lora_fx.onnx.names import named_graph
    from lora_fx.passes.find import find

    return _keys(find(named_graph(model)[0]))


def _keys(found: Found) -> list[str]:
    return [target.key for target in (*found.targets, *found.optional)]
