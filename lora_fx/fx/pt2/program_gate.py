"""The JSON of a program, checked before torch's deserialiser sees it.

torch evaluates a program's text in three places: size expressions go through `sympy.sympify`
(eval), operator names are looked up in all of torch, and names of values become Python code when
the graph is compiled. So expressions are parsed and held to a small grammar, operators must be
aten's, symbolic arithmetic, one of a few of control flow or our own, and names must be names.
What else torch would import or evaluate (guards, tree classes, source functions) is taken out.
"""

from __future__ import annotations

import re

import torch

from lora_fx.errors import LoraFxError
from lora_fx.fx.operators import OpOverloadPacket
from lora_fx.fx.pt2.output_trees import plain_tree
from lora_fx.fx.pt2.size_expressions import check_expression, refused_text
from lora_fx.text import Json

NAME = re.compile(r"[A-Za-z_]\w*", re.A)
PATH = re.compile(r"[\w.+\-~/@ ,:\[\]]*", re.A)
SYMBOLIC = frozenset((
    "_operator.eq", "_operator.ne", "_operator.le", "_operator.ge", "_operator.lt",
    "_operator.gt", "_operator.neg", "_operator.pos", "_operator.mul", "_operator.add",
    "_operator.sub", "_operator.floordiv", "_operator.mod", "_operator.pow",
    "_operator.truediv", "_operator.and_", "_operator.or_", "_operator.lshift",
    "_operator.rshift", "_operator.getitem", "torch.sym_not", "torch.sym_int",
    "torch.sym_float", "torch.sym_ite", "torch.sym_max", "torch.sym_min", "torch.sym_sqrt",
    "math.trunc", "math.ceil", "math.floor",
))  # fmt: skip
NESTED = frozenset((
    "torch.ops.higher_order.cond", "torch.ops.higher_order.wrap_with_set_grad_enabled",
    "torch.ops.higher_order.wrap_with_autocast", "torch.ops.higher_order.while_loop",
    "torch.ops.higher_order.scan", "torch.ops.higher_order.map_impl",
))  # fmt: skip
OURS = ("torch.ops.lora_fx.dequantise.default", "torch.ops.lora_fx.linear_in.default")
FILES = ("from_file",)
"""aten operators that open a file of the machine."""
NAMES = ("name", "as_name", "user_input_name")
PATHS = ("parameter_name", "buffer_name", "tensor_constant_name", "fqn")
TABLES = ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values")
KEPT = ("nn_module_stack", "custom", "stack_trace")


def clean_program(data: Json, where: str) -> Json:
    """Check or remove the texts in a program's JSON that torch would evaluate; edits `data`.

    Args:
        data: models/NAME.json.
        where: FILE: MEMBER, for messages.

    Raises:
        LoraFxError: An expression, operator, name or structure that is not allowed.
    """
    try:
        module = data["graph_module"]
        root_calls = [entry for entry in module["module_call_graph"] if entry["fqn"] == ""]
        call = root_calls[0]["signature"]
        named_tuples = module.get("treespec_namedtuple_fields") or {}
        fields = {name: list(row["field_names"]) for name, row in named_tuples.items()}
        call["in_spec"] = plain_tree(call["in_spec"], fields, where)
        call["out_spec"] = plain_tree(call["out_spec"], fields, where)

        # what torch would import or evaluate
        module["module_call_graph"] = root_calls[:1]
        module["metadata"] = {}
        module["treespec_namedtuple_fields"] = {}
        data["guards_code"] = []
        data["verifiers"] = ["TRAINING"]

        for text in data["range_constraints"]:  # a symbol, or a size computed of one: s32 + 1
            check_expression(text, where)
        for name in call.get("forward_arg_names") or ():
            _check_name(name, where)
        _check_values(data, where)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
        raise LoraFxError(
            f"{where} is not an exported program: {type(e).__name__} {e}", "write the file again"
        ) from e
    except RecursionError as e:
        raise LoraFxError(f"{where} is nested too deeply", "write the file again") from e
    return data


def _check_values(value: object, where: str) -> None:
    """Check every field of the objects in a value; takes unknown metadata out of them."""
    if isinstance(value, list):
        for entry in value:
            _check_values(entry, where)
        return
    if not isinstance(value, dict):
        return
    for key, inner in list(value.items()):
        if key == "metadata" and isinstance(inner, dict):
            value[key] = _texts_of_metadata(inner)
            continue
        _check_field(key, inner, where)
        _check_values(inner, where)


def _texts_of_metadata(metadata: Json) -> Json:
    """The texts of a node's metadata that are read; torch would import modules named by others."""
    texts = {}
    for key, value in metadata.items():
        if key in KEPT and isinstance(value, str):
            texts[key] = value
    return texts


def _check_field(key: str, value: object, where: str) -> None:
    """Refuse a field that torch would evaluate as more than a size, an operator or a name."""
    if key == "expr_str":
        check_expression(value, where)
    elif key in ("target", "as_operator"):
        check_operator(value, where)
    elif key in NAMES and isinstance(value, str) and value:
        _check_name(value, where)
    elif key in PATHS and not (isinstance(value, str) and PATH.fullmatch(value)):
        raise refused_text(where, f"the name {value!r}")
    elif key in ("custom_obj_values", "as_custom_obj", "custom_obj") and value:
        raise refused_text(where, "a custom Python object")
    elif key in TABLES and isinstance(value, dict):
        for name in value:
            _check_name(name, where)


def _check_name(value: object, where: str) -> None:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise refused_text(where, f"{str(value)[:60]!r} as the name of a value")


def check_operator(target: object, where: str) -> None:
    """Refuse every operator but aten's, symbolic arithmetic, a few of control flow, and ours."""
    if target in SYMBOLIC or target in NESTED or target in OURS:
        return
    if isinstance(target, str) and _is_aten(target):
        return
    raise LoraFxError(
        f"{where} calls {str(target)[:80]!r}, which is not an operator of aten",
        "insert into the model that the file was made from: programs with custom operators are "
        "not opened",
    )


def _is_aten(target: str) -> bool:
    """Whether a text is torch.ops.aten.NAME.OVERLOAD of an operator that opens no file."""
    path = target.split(".")
    if path[:3] != ["torch", "ops", "aten"] or len(path) != 5:
        return False
    name, overload = path[3:]
    if name in FILES:
        return False
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, OpOverloadPacket):
        return False
    return overload in packet.overloads()  # type: ignore[no-untyped-call]
