"""The .pt2 archive, read by hand: checked JSON members and raw tensors, and no pickle unasked.

`torch.export.load` runs what a file's pickles say (sample inputs, pickled weights). Here the zip
is opened by Python's own module, sample inputs are left alone, and tensors are built from raw
bytes by what the JSON says of them, their checksums compared.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import weakref
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.read import open_input
from lora_fx.files.strict_json import json_object
from lora_fx.fx.operators import OpOverloadPacket
from lora_fx.fx.pt2.serialised import dtype_of_code
from lora_fx.text import Json, JsonView

MANIFEST = "data/extra/lora_fx.json"
AGAIN = "write it again: torch.export.save(program, FILE)"
BROKEN = "the file is damaged or was not written by torch.export.save"
Place = tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...], int]
"""The member that a tensor lies in, its dtype, sizes and strides, and its first element there."""


@dataclass
class Archive:
    """An open .pt2 file.

    Args:
        path: For messages.
        zip: The file.
        root: The folder that every member lies in.
        trust: Whether pickled tensors may be read (by torch.load with weights_only=True).
        meta: Tensors take no values: they are made on the meta device.
    """

    path: str
    zip: zipfile.ZipFile
    root: str
    trust: bool = False
    meta: bool = False
    tensors: dict[tuple[Place, bool, bool], torch.Tensor] = field(default_factory=dict)
    _raw: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def members(self) -> list[str]:
        """Names below the root folder."""
        return [n.removeprefix(self.root) for n in self.zip.namelist()]

    @property
    def programs(self) -> list[str]:
        """Names of the programs, as models/NAME.json."""
        names = [n for n in self.members if n.startswith("models/") and n.endswith(".json")]
        return [n[len("models/") : -len(".json")] for n in names]

    def bad(self, text: str, hint: str = BROKEN) -> LoraFxError:
        """An error about this file."""
        return LoraFxError(f"{self.path}: {text}", hint)

    def read(self, member: str) -> bytearray:
        """A member's bytes, checksum compared."""
        try:
            info = self.zip.getinfo(self.root + member)
            with self.zip.open(info) as f:
                data = bytearray(f.read())
        except KeyError as e:
            raise self.bad(f"the member {member} is missing") from e
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as e:
            raise self.bad(f"{member} cannot be read: {one_line(e, 120)}") from e
        if len(data) != info.file_size:
            raise self.bad(f"{member} is cut: {len(data)} of {info.file_size} bytes")
        return data

    def json(self, member: str) -> Json:
        """A member as a JSON object."""
        return json_object(bytes(self.read(member)), f"{self.path}: {member}", hint=BROKEN)

    def state(self, folder: str, program: str, kind: str) -> dict[str, torch.Tensor]:
        """{name: tensor} of one program; equal bytes read in equal ways are one tensor.

        Args:
            folder: data/weights/ or data/constants/.
            program: Name of the program.
            kind: weights or constants.
        """
        if f"{folder}{program}.pt" in self.members:
            raise self.bad(f"{folder}{program}.pt is a pickle of all {kind}", AGAIN)
        member = f"{folder}{program}_{kind}_config.json"
        rows = self.json(member).get("config")
        if not isinstance(rows, dict):
            raise self.bad(f"{member} has no table of tensors")
        result = {}
        for name, row in rows.items():
            try:
                result[name] = self._tensor(folder, name, row)
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
                raise self.bad(
                    f"{member}: {name!r} is described wrongly: {one_line(e, 120)}"
                ) from e
        return result

    def _tensor(self, folder: str, name: str, row: JsonView) -> torch.Tensor:
        file = row["path_name"]
        if not isinstance(file, str) or "/" in file or "\\" in file or file in ("", ".", ".."):
            raise self.bad(f"{name!r} lies in {file!r}, which is no name of a member")
        member, about = folder + file, row.get("tensor_meta")
        if about is None:
            raise self.bad(
                f"{member} ({name!r}) is a pickled Python object and is never read",
                "a program of tensors only can be opened",
            )
        if row.get("use_pickle"):
            return self._pickled(member, name, bool(row.get("is_param")))
        dtype = dtype_of_code(about["dtype"])
        sizes = tuple(_count(n) for n in about["sizes"])
        strides = tuple(_count(n) for n in about["strides"])
        offset = _count(about["storage_offset"])
        param, grad = bool(row.get("is_param")), bool(about.get("requires_grad"))
        key = ((member, dtype, sizes, strides, offset), param, grad)
        if key not in self.tensors:
            made = self._view(name, key[0])
            if param:
                made = torch.nn.Parameter(made, requires_grad=grad and made.is_floating_point())
            self.tensors[key] = made
        return self.tensors[key]

    def _view(self, name: str, place: Place) -> torch.Tensor:
        member, dtype, sizes, strides, offset = place
        if len(sizes) != len(strides):
            raise self.bad(f"{name!r} has {len(sizes)} sizes and {len(strides)} strides")
        steps = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        last = offset + steps + 1 if math.prod(sizes) else 0
        try:
            have = self.zip.getinfo(self.root + member).file_size
        except KeyError as e:
            raise self.bad(f"the member {member} ({name!r}) is missing") from e
        if last * dtype.itemsize > have or have % dtype.itemsize:
            raise self.bad(
                f"{member} has {have} bytes; {name!r}, {dtype} of {list(sizes)}, needs "
                f"{last * dtype.itemsize}"
            )
        if self.meta:
            return torch.empty_strided(sizes, strides, dtype=dtype, device="meta")
        if not last:
            return torch.empty_strided(sizes, strides, dtype=dtype)
        if member not in self._raw:
            self._raw[member] = torch.frombuffer(self.read(member), dtype=torch.uint8)
        return self._raw[member].view(dtype).as_strided(sizes, strides, offset)

    def _pickled(self, member: str, name: str, param: bool) -> torch.Tensor:
        if not self.trust:
            raise self.bad(
                f"{member} ({name!r}) is a pickle, which can run code, and is not read",
                "--trust reads it as weights only; or save a model of plain tensors",
            )
        data = io.BytesIO(self.read(member))
        try:
            value: object = torch.load(data, map_location="cpu", weights_only=True)
        except Exception as e:  # pickles fail as they like
            raise self.bad(
                f"{member} ({name!r}) holds more than tensors: {one_line(e, 120)}",
                "--trust reads tensors only; save a model of plain tensors",
            ) from e
        if not isinstance(value, torch.Tensor):
            raise self.bad(f"{member} ({name!r}) holds a {type(value).__name__}, not a tensor")
        if param and not isinstance(value, torch.nn.Parameter):
            return torch.nn.Parameter(value, requires_grad=value.is_floating_point())
        return value


def _count(value: Any) -> int:
    """The whole number of {"as_int": n}; anything else is refused."""
    number = value["as_int"]
    if type(number) is not int or not 0 <= number < 1 << 62:
        raise ValueError(f"{number!r} is no size")
    return number


def open_archive(path: str, *, trust: bool = False, meta: bool = False) -> Archive:
    """Open a .pt2 file.

    Raises:
        LoraFxError: No such file, no zip, no .pt2 archive, or one of another version.
    """
    file = open_input(path)
    try:
        opened = zipfile.ZipFile(file)
        weakref.finalize(opened, file.close)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
        file.close()
        raise LoraFxError(f"{path}: no .pt2 file, or a cut one: {one_line(e, 120)}", BROKEN) from e
    infos = opened.infolist()
    names = [i.filename for i in infos]
    root = names[0].partition("/")[0] + "/" if names else ""
    archive = Archive(path, opened, root, trust, meta)
    members = archive.members
    if "serialized_exported_program.json" in names:
        raise archive.bad("an archive of an older torch", f"{AGAIN}, with torch 2.9 or newer")
    if not all(n.startswith(root) for n in names) or "archive_format" not in members:
        raise archive.bad("a zip, but no .pt2 archive")
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise archive.bad(f"the member {twice} is there twice")
    packed = next((i.filename for i in infos if i.compress_type != zipfile.ZIP_STORED), None)
    if packed:
        raise archive.bad(f"{packed} is compressed; torch stores members as they are")
    if bytes(archive.read("archive_format")) != b"pt2":  # not earlier: it may be a bomb
        raise archive.bad("a zip, but no .pt2 archive")
    version = bytes(archive.read("archive_version")) if "archive_version" in members else b"0"
    if version != b"0":
        raise archive.bad(f"archive version {one_line(version, 20)}, not 0", AGAIN)
    if "byteorder" in members and bytes(archive.read("byteorder")) != b"little":
        raise archive.bad("written on a big-endian machine", AGAIN)
    if not archive.programs:
        raise archive.bad("holds no program (models/NAME.json)", AGAIN)
    return archive


# What the JSON of a program may say before torch's deserialiser sees it.
#
# torch evaluates a program's text in three places: size expressions go through `sympy.sympify`
# (eval), operator names are looked up in all of torch, and names of values become Python code when
# the graph is compiled. So expressions are parsed and held to a small grammar, operators must be
# aten's, symbolic arithmetic, one of a few of control flow or our own, and names must be names.
# What else torch would import or evaluate (guards, tree classes, source functions) is taken out.


FUNCTIONS = frozenset((
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Min", "Max", "Abs",
    "Equality", "Unequality", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "StrictLessThan", "LessThan",
    "StrictGreaterThan", "GreaterThan", "And", "Or", "Not", "floor", "ceiling", "FloorDiv",
    "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
    "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv",
    "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity",
    "IsNonOverlappingAndDenseIndicator",
))  # fmt: skip
POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift")
CONSTANTS = ("true", "false", "oo")
SYMBOL = re.compile(r"[A-Za-z_]+\d+")
TEXTS = {
    "Symbol": SYMBOL,
    "Integer": re.compile(r"-?\d{1,20}"),
    "Float": re.compile(r"-?\d{0,40}\.?\d{0,40}(e[+-]?\d{1,3})?"),  # an exponent is written out
}
"""Functions that take a text → what it may be."""
MOST_TERMS, MOST_BITS = 2_000, 20_000
"""What a size may come to with its products and powers multiplied out, as torch does to compare it:
monomials, and bits of the largest number. `(s0 + … + s200)**64` would have 10^60 of them."""
MOST_DIGITS = 1_000
"""Of an option of a function, such as the precision of a Float."""
NAME = re.compile(r"[A-Za-z_]\w*", re.A)
PATH = re.compile(r"[\w.+\-~/@ ,:\[\]]*", re.A)
NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Call, ast.keyword,
    ast.Name, ast.Constant, ast.Load, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
)  # fmt: skip
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
    """The program's JSON with what torch would evaluate checked or taken out; edits `data`.

    Args:
        data: models/NAME.json.
        where: FILE: MEMBER, for messages.

    Raises:
        LoraFxError: An expression, operator, name or structure that is not allowed.
    """
    try:
        module = data["graph_module"]
        roots = [e for e in module["module_call_graph"] if e["fqn"] == ""]
        call = roots[0]["signature"]
        tuples = module.get("treespec_namedtuple_fields") or {}
        fields = {k: list(v["field_names"]) for k, v in tuples.items()}
        call["in_spec"] = plain_tree(call["in_spec"], fields, where)
        call["out_spec"] = plain_tree(call["out_spec"], fields, where)
        module["module_call_graph"] = roots[:1]
        module["metadata"], module["treespec_namedtuple_fields"] = {}, {}
        data["guards_code"], data["verifiers"] = [], ["TRAINING"]
        for text in data["range_constraints"]:  # a symbol, or a size computed of one: s32 + 1
            check_expression(text, where)
        for name in call.get("forward_arg_names") or ():
            _name(name, where)
        _walk(data, where)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
        raise LoraFxError(
            f"{where} is no exported program: {type(e).__name__} {e}", "write the file again"
        ) from e
    except RecursionError as e:
        raise LoraFxError(f"{where} is nested too deeply", "write the file again") from e
    return data


def _walk(value: object, where: str) -> None:
    if isinstance(value, list):
        for v in value:
            _walk(v, where)
        return
    if not isinstance(value, dict):
        return
    for key, v in list(value.items()):
        if key == "expr_str":
            check_expression(v, where)
        elif key in ("target", "as_operator"):
            check_operator(v, where)
        elif key in NAMES and isinstance(v, str) and v:
            _name(v, where)
        elif key in PATHS and not (isinstance(v, str) and PATH.fullmatch(v)):
            raise _refused(where, f"the name {v!r}")
        elif key == "metadata" and isinstance(v, dict):
            value[key] = {k: t for k, t in v.items() if k in KEPT and isinstance(t, str)}
            continue
        elif key in ("custom_obj_values", "as_custom_obj", "custom_obj") and v:
            raise _refused(where, "a custom Python object")
        elif key in TABLES and isinstance(v, dict):
            for name in v:
                _name(name, where)
        _walk(v, where)


def _refused(where: str, what: str) -> LoraFxError:
    return LoraFxError(
        f"{where} holds {what}, which could run code and is not opened",
        "open only files whose origin you know; a program that torch.export.save wrote passes",
    )


def _name(value: object, where: str) -> None:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise _refused(where, f"{str(value)[:60]!r} as the name of a value")


def check_operator(target: object, where: str) -> None:
    """Refuse every operator but aten's, symbolic arithmetic, a few of control flow, and ours."""
    if target in SYMBOLIC or target in NESTED or target in OURS:
        return
    parts = target.split(".") if isinstance(target, str) else []
    if parts[:3] == ["torch", "ops", "aten"] and len(parts) == 5 and parts[3] not in FILES:
        packet = getattr(torch.ops.aten, parts[3], None)
        known = isinstance(packet, OpOverloadPacket)
        if known and parts[4] in packet.overloads():  # type: ignore[union-attr]
            return
    raise LoraFxError(
        f"{where} calls {str(target)[:80]!r}, which is no operator of aten",
        "programs with custom operators cannot be opened; insert from the source",
    )


def check_expression(text: object, where: str) -> None:
    """Refuse a size expression that is more than arithmetic of sizes.

    >>> check_expression("Mul(Integer(5), Symbol('s28', positive=True, integer=True))", "f")
    >>> check_expression("(s0 + 1) // 2", "f")
    """
    bad = _refused(where, f"the size expression {str(text)[:60]!r}")
    if not isinstance(text, str) or len(text) > 4000 or not text.isascii() or "\n" in text:
        raise bad
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise bad from e
    allowed: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, NODES) or isinstance(node, ast.MatMult):
            raise bad
        if _is_power(node):
            inner = [n for n in ast.walk(node) if n is not node]
            if any(_is_power(n) for n in inner) or not _small(node):
                raise bad  # nested powers of numbers take forever
        match node:  # a call comes before what it is called with
            case ast.Call(ast.Name(name), args) if name in FUNCTIONS:
                texts = [a for a in args if isinstance(a, ast.Constant) and type(a.value) is str]
                good = [a for a in texts if name in TEXTS and TEXTS[name].fullmatch(str(a.value))]
                allowed |= {id(n) for n in (node.func, *good)}
            case ast.Name(name) if name in CONSTANTS or SYMBOL.fullmatch(name):
                pass
            case ast.Constant(int() | float()):
                pass
            case ast.Call() | ast.Name() | ast.Constant() if id(node) not in allowed:
                raise bad
    try:
        _multiplied_out(tree.body)
    except (_TooLarge, RecursionError) as e:
        raise LoraFxError(
            f"{where}: the size {one_line(text, 60)} is too large, multiplied out: {one_line(e)}",
            "a program that torch.export.save wrote has smaller ones; write it again",
        ) from e


class _TooLarge(ValueError):
    """A size of more than MOST_TERMS or MOST_BITS."""


def _multiplied_out(node: ast.expr) -> tuple[int, int]:
    """The terms of an expression, products and powers multiplied out, and bits of its numbers.

    What is no sum, product or power is one term, whose operands are looked at by themselves.
    """
    name, parts = _operation(node)
    sizes = [_multiplied_out(part) for part in parts]
    terms, bits = 1, max([64, *(bits for _, bits in sizes)])
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        bits = node.value.bit_length() if isinstance(node.value, int) else 64
        if (isinstance(node.value, float) and math.isinf(node.value)) or bits > 64:
            raise _TooLarge(f"a number of {bits} bits")
    elif name in ("Add", "Sub", "USub"):
        terms = sum(terms for terms, _ in sizes)
        bits += len(sizes)
    elif name in ("Mult", "Mul"):
        terms = math.prod(terms for terms, _ in sizes)
        bits = sum(bits for _, bits in sizes)
    elif name in ("Pow", *POWERS) and len(parts) == 2:
        power = int(min(1000, max([0, *(abs(n) for n in _numbers(parts[1]))])))
        # As many as there are ways to take `power` of the base's terms, in any order.
        terms = math.comb(sizes[0][0] + power - 1, power)
        bits = sizes[0][1] * power
    if terms > MOST_TERMS or bits > MOST_BITS:
        raise _TooLarge(f"more than {MOST_TERMS} terms or {MOST_BITS} bits")
    return terms, bits


def _operation(node: ast.expr) -> tuple[str, list[ast.expr]]:
    """The name of what an expression computes, and its operands."""
    match node:
        case ast.BinOp(left, op, right):
            return type(op).__name__, [left, right]
        case ast.UnaryOp(op, operand):
            return type(op).__name__, [operand]
        case ast.BoolOp(_, values):
            return "", values
        case ast.Compare(left, _, others):
            return "", [left, *others]
        case ast.Call(ast.Name(name), args, keywords):
            for option in keywords:
                if any(abs(n) > MOST_DIGITS for n in _numbers(option.value)):
                    raise _TooLarge(f"{option.arg} is above {MOST_DIGITS}")
            return name, args
    return "", []


def _numbers(node: ast.AST) -> list[float]:
    """The numbers in an expression."""
    found = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    return [n for n in found if isinstance(n, (int, float)) and not isinstance(n, bool)]


def _is_power(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, (ast.Pow, ast.LShift))
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in POWERS


def _small(power: ast.AST) -> bool:
    """True where the exponent of a power holds no number above 64."""
    parts = [power.right] if isinstance(power, ast.BinOp) else getattr(power, "args", [])[-1:]
    products = any(isinstance(n, ast.BinOp) for p in parts for n in ast.walk(p))
    return not products and all(abs(n) <= 64 for p in parts for n in _numbers(p))


# --- what goes in and comes out ------------------------------------------------------------------

LEAF: Json = {"type": None, "context": None, "children_spec": []}


def plain_tree(text: str, fields: Mapping[str, list[str]], where: str) -> str:
    """A tree of arguments or outputs with classes replaced by dicts and tuples.

    A class whose names are known (an output class of transformers, a named tuple) becomes a dict
    of them, so nothing needs to be imported to call the program.
    """
    version, tree = json.loads(text)
    if version != 1:
        raise LoraFxError(f"{where}: trees of version {version!r}, not 1", "another torch wrote it")
    return json.dumps([1, _plain(tree, fields, where)])


def _plain(tree: JsonView, fields: Mapping[str, list[str]], where: str) -> Any:
    kind, context = tree["type"], tree["context"]
    children = [_plain(c, fields, where) for c in tree["children_spec"]]
    if kind is None:
        return LEAF
    if kind in ("builtins.tuple", "builtins.list"):
        return {"type": kind, "context": "null", "children_spec": children}
    names: Any = None
    if kind in ("builtins.dict", "collections.OrderedDict") or isinstance(context, str):
        names = json.loads(context) if isinstance(context, str) else context
    if kind == "collections.namedtuple" or names is None or isinstance(names, str):
        names = fields.get(str(names if isinstance(names, str) else context), names)
    found = named_children(names, children)
    if found is None:
        raise LoraFxError(
            f"{where}: the structure {str(kind)[:80]!r} is not known",
            "export a model that takes and returns tensors, tuples, lists and dicts",
        )
    return found


def named_children(names: Any, children: Sequence[Json]) -> Json | None:
    """A container as a dict of its children; None where what its type keeps is no names of them."""
    if isinstance(names, (list, tuple)) and len(names) == 2 and isinstance(names[0], list):
        names = names[0]  # a dataclass: its fields, and those that are None
    fit = isinstance(names, (list, tuple)) and len(names) == len(children)
    if not fit or not all(isinstance(n, (str, int)) for n in names):
        return None
    return {"type": "builtins.dict", "context": json.dumps(list(names)), "children_spec": children}
