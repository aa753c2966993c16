"""A and B of a program's branches as inputs, in the form that the products read.

insert reads a [*batch, rank, in] and b [*batch, out, rank] from the tree. A program that takes them
as inputs gets A [*batch, in, rank] and B [*batch, rank, out], as a switchable ONNX file does, so
that one adapter has the same arrays for every runtime and no transpose is left at run time.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import fx

from lora_fx.adapter.factor_tensors import slot_names, tensor_name
from lora_fx.adapter.scaled_rows import GAINS
from lora_fx.errors import LoraFxError
from lora_fx.fx.dotted_names import owner
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import MARK, is_marked, make_marked, value
from lora_fx.ir.kinds import swap_last
from lora_fx.onnx.manifest import SwitchSlot, WholeSlot
from lora_fx.targets.target import Target
from lora_fx.text import free_name

aten = torch.ops.aten
EXAMPLE_RANK = 3
"""The rank of the example with which a program of any rank is exported."""


def input_slots(
    targets: Mapping[str, Target],
    rank: int,
    reserved: Iterable[str],
    gains: Mapping[str, str] | None = None,
) -> dict[str, SwitchSlot]:
    """Return the slot of each target, with names of inputs that Python takes as keywords.

    Args:
        targets: Key → target.
        rank: The rank of all slots; 0 where an adapter may have any.
        reserved: Names of the model's own inputs.
        gains: Key → hash of the weight, of slots with factors of rows.
    """
    used = {name.lower() for name in argument_names(reserved)}
    of_weights = gains or {}
    slots: dict[str, SwitchSlot] = {}
    for key, target in targets.items():
        halves = ["lora_A", "lora_B"]
        if key in of_weights:
            halves.append("lora_D")
        names = [_input_name(f"{key}.{half}", used) for half in halves]
        layout = target.layout
        stored = tuple(target.parameter.shape)
        slots[key] = SwitchSlot(
            names[0], names[1], layout.in_size, layout.out_size, layout.batch_shape, stored,
            target.op, target.role, rank or 1, d="".join(names[2:]), weight=of_weights.get(key, ""),
        )  # fmt: skip
    return slots


def whole_inputs(
    graph: FxGraph, whole: Mapping[str, WholeSlot], reserved: Iterable[str]
) -> dict[str, WholeSlot]:
    """Return the slots of whole tensors, with names of inputs, shapes and dtypes.

    Args:
        graph: It reads the parameters from its tree.
        whole: Key → a slot.
        reserved: Names of all other inputs.

    Raises:
        LoraFxError: A parameter that the graph does not read.
    """
    used = {name.lower() for name in argument_names(reserved)}
    parameters = {parameter.name: parameter for parameter in graph.parameters()}
    slots: dict[str, WholeSlot] = {}
    for key, slot in whole.items():
        if key not in parameters or not graph.nodes_of(key):
            raise LoraFxError(
                f"{key!r}: an adapter replaces this tensor, which no output depends on",
                f"run lora-fx convert ADAPTER -o OUT --exclude {key} to leave it out",
            )
        parameter = parameters[key]
        name = _input_name(key, used)
        slots[key] = replace(slot, name=name, shape=parameter.shape, dtype=parameter.dtype)
    return slots


def _input_name(name: str, used: set[str]) -> str:
    """Return the name of an input, in small letters as torch writes the inputs of a graph."""
    free = free_name(_identifier(name).lower(), used, "_")
    used.add(free)
    return free


def put_whole_inputs(graph: FxGraph, whole: Mapping[str, WholeSlot]) -> None:
    """Make a graph read parameters from inputs, which follow all others.

    Args:
        graph: It reads them from its tree; edited in place.
        whole: The slot of each key.
    """
    for key, slot in whole.items():
        with graph.graph.inserting_after(graph.graph.find_nodes(op="placeholder")[-1]):
            replaced = graph.graph.placeholder(slot.name)
        for node in graph.nodes_of(key):
            replaced.meta.setdefault("val", node.meta.get("val"))
            node.replace_all_uses_with(replaced)
            graph.graph.erase_node(node)


def argument_names(names: Iterable[str]) -> list[str]:
    """Return the names of a call's tensors as parameters of a Python function.

    An input of a cache has dots, and the key of a dict may be any text.

    >>> argument_names(["input_ids", "past_key_values.0.key", "class", "batch.x-y"])
    ['input_ids', 'past_key_values_0_key', 'class_', 'batch_x_y']
    """
    arguments: list[str] = []
    for name in names:
        arguments.append(free_name(_identifier(name), arguments, "_"))
    return arguments


def _identifier(name: str) -> str:
    """Return a name with an underscore for all that Python takes in no name of a parameter.

    >>> _identifier("0.weight[1:3].lora_A")
    '_0_weight_1_3__lora_A'
    """
    word = re.sub(r"\W", "_", name, flags=re.ASCII)
    if word[:1].isdigit():
        return f"_{word}"
    return f"{word}_" if keyword.iskeyword(word) else word


def inserted_names(key: str, slot: SwitchSlot) -> tuple[str, ...]:
    """Return the names under which insert puts the tensors of a slot into the tree."""
    if slot.d:
        return (*slot_names(key), tensor_name(key, GAINS))
    return slot_names(key)


def put_inputs(graph: fx.Graph, slots: Mapping[str, SwitchSlot]) -> None:
    """Make every branch of a graph read A and B from inputs, which follow all others.

    Args:
        graph: It reads a and b from its tree; edited in place.
        slots: The slot of each key.
    """
    for node in list(graph.nodes):
        if is_marked(node) and _is_product_with_one(node):  # the scale of an update of zeros
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)

    for key, slot in slots.items():
        perm = swap_last(len(slot.batch))
        for stored_name, input_name in zip(inserted_names(key, slot), slot.names, strict=True):
            with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
                factor = graph.placeholder(input_name)
            for node in graph.find_nodes(op="get_attr"):
                if node.target == stored_name and input_name == slot.d:
                    node.replace_all_uses_with(factor)
                    graph.erase_node(node)
                elif node.target == stored_name:
                    _read_transposed(node, factor, perm)
                    graph.erase_node(node)
    for node in graph.nodes:
        if is_marked(node):
            _set_beside_layer(node)


def _set_beside_layer(node: fx.Node) -> None:
    """Take a node of a branch out of the module of its layer, into the one around it.

    XNNPACK's partitioner of ExecuTorch 1.5 takes all nodes of a Linear for one product.
    """
    modules = dict(node.meta.get("nn_module_stack") or {})
    if modules:
        modules.popitem()
        node.meta["nn_module_stack"] = modules


def take_away_inputs(graph: fx.Graph, count: int) -> None:
    """Remove the last inputs of a graph whose branches are gone, with the asserts on their sizes.

    Args:
        graph: Edited in place.
        count: How many inputs are those of A and B.
    """
    inputs = graph.find_nodes(op="placeholder")
    for factor in inputs[len(inputs) - count :]:
        _erase_with_users(factor)


def read_from_tree(
    module: fx.GraphModule, whole: Mapping[str, str], values: Mapping[str, torch.Tensor]
) -> None:
    """Make a graph read parameters from its module again; the undoing of `put_whole_inputs`.

    Args:
        module: Edited in place. The inputs stay, and nothing reads them.
        whole: Name of an input → the parameter.
        values: The parameters.
    """
    graph = module.graph
    for node in graph.find_nodes(op="placeholder"):
        name = whole.get(str(node.target))
        if name is None:
            continue
        holder, leaf = owner(module, name, create=lambda _: torch.nn.Module())
        holder.register_parameter(leaf, torch.nn.Parameter(values[name], requires_grad=False))
        readers = [user for user in node.users if not _is_assert(user)]
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            stored = graph.get_attr(name)
        stored.meta = dict(node.meta)
        for user in readers:
            user.replace_input_with(node, stored)


def _is_assert(node: fx.Node) -> bool:
    """Whether a node only checks an input's metadata."""
    return node.target is aten._assert_tensor_metadata.default


def _erase_with_users(node: fx.Node) -> None:
    """Erase a node and all that is computed of it, which is no output."""
    if node.op == "output":
        raise LoraFxError(
            "an output depends on A and B without a branch that lora-fx marked",
            "use the file as lora-fx export wrote it",
        )
    for user in list(node.users):
        _erase_with_users(user)
    if not node._erased:
        node.graph.erase_node(node)


def _read_transposed(node: fx.Node, transposed: fx.Node, perm: tuple[int, ...]) -> None:
    """Let users of a node read its transpose, with as few transposes as possible.

    By what reads the node:
    1. A cast to float32, which A and B have, goes away, and its users read on; another one casts
       the transpose.
    2. A transpose by perm goes away.
    3. Everything else reads a transpose of the transpose.

    Args:
        node: What is read now.
        transposed: What is read then: the node, transposed by perm.
        perm: The permutation.
    """
    graph = node.graph
    for user in list(node.users):
        if user.target is aten.type_as.default and user.args[0] is node:
            cast = transposed
            if not _is_float32(user.args[1]):
                cast = _beside(user, aten.type_as.default, (transposed, user.args[1]))
            _read_transposed(user, cast, perm)
            graph.erase_node(user)
        elif user.target is aten.permute.default and user.args[1] == list(perm):
            user.replace_all_uses_with(transposed)
            graph.erase_node(user)
        else:
            back = _beside(user, aten.permute.default, (transposed, list(perm)))
            user.replace_input_with(node, back)


def _beside(user: fx.Node, target: object, args: tuple[object, ...]) -> fx.Node:
    """Make a node of the branch that a node belongs to, before this node."""
    site = user.meta["custom"][MARK]["site"]
    return make_marked(user, user, site, target, args)


def _is_product_with_one(node: fx.Node) -> bool:
    """Whether a node multiplies its first operand by the number 1."""
    if node.target not in (aten.mul.Scalar, aten.mul.Tensor):
        return False
    factor = node.args[1]
    return isinstance(factor, float) and factor == 1.0


def _is_float32(node: object) -> bool:
    """Whether a node is known to give float32."""
    assert isinstance(node, fx.Node)
    place = value(node)
    return isinstance(place, torch.Tensor) and place.dtype == torch.float32
