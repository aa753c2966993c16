"""Whether the text of a size is arithmetic of sizes: torch evaluates it as Python code."""

from __future__ import annotations

import ast
import math
import re

from lora_fx.errors import LoraFxError, one_line

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


NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Call, ast.keyword,
    ast.Name, ast.Constant, ast.Load, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
)  # fmt: skip


def refused_text(where: str, what: str) -> LoraFxError:
    """An error about a text that could run code."""
    return LoraFxError(
        f"{where} holds {what}, which could run code and is not opened",
        "open only files whose origin you know; a program that torch.export.save wrote passes",
    )


def check_expression(text: object, where: str) -> None:
    """Refuse a size expression that is more than arithmetic of sizes.

    >>> check_expression("Mul(Integer(5), Symbol('s28', positive=True, integer=True))", "f")
    >>> check_expression("(s0 + 1) // 2", "f")
    """
    bad = refused_text(where, f"the size expression {str(text)[:60]!r}")
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
