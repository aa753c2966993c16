"""Whether the text of a size is arithmetic of sizes: torch evaluates it as Python code."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator

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
"""Functions that take a text → the texts that are allowed."""
MOST_TERMS = 2_000
"""Monomials of a size whose products and powers are multiplied out, as torch does to compare it.
`(s0 + … + s200)**64` would have 10^60 of them."""
MOST_BITS = 20_000
"""Bits of the largest number of a size that is multiplied out."""
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
        "open only files that you trust; a program that torch.export.save wrote is accepted",
    )


def check_expression(text: object, where: str) -> None:
    """Refuse a size expression that is more than arithmetic of sizes.

    >>> check_expression("Mul(Integer(5), Symbol('s28', positive=True, integer=True))", "f")
    >>> check_expression("(s0 + 1) // 2", "f")
    """
    refusal = refused_text(where, f"the size expression {str(text)[:60]!r}")
    if not isinstance(text, str):
        raise refusal
    if len(text) > 4000 or not text.isascii() or "\n" in text:
        raise refusal
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise refusal from e

    if not _is_arithmetic(tree):
        raise refusal
    try:
        _multiplied_out(tree.body)
    except (_TooLarge, RecursionError) as e:
        raise LoraFxError(
            f"{where}: the size {one_line(text, 60)} is too large when multiplied out: "
            f"{one_line(e)}",
            "write the program again with torch.export.save",
        ) from e


def _is_arithmetic(tree: ast.Expression) -> bool:
    """Whether an expression has nothing but sizes, numbers, operators and functions of sizes."""
    part_of_call: set[int] = set()  # names of functions, and the texts that these take
    for node in ast.walk(tree):  # a call comes before what it is called with
        if not isinstance(node, NODES) or isinstance(node, ast.MatMult):
            return False
        if _is_power(node) and not _is_small_power(node):
            return False
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
                return False
            part_of_call.add(id(node.func))
            part_of_call.update(id(text) for text in _texts_of_call(node, node.func.id))
            continue
        if not isinstance(node, (ast.Name, ast.Constant)) or id(node) in part_of_call:
            continue
        if not _is_size(node):
            return False
    return True


def _texts_of_call(call: ast.Call, function: str) -> Iterator[ast.Constant]:
    """The texts among the arguments of a call that its function may take."""
    if function not in TEXTS:
        return
    for argument in call.args:
        if not isinstance(argument, ast.Constant) or type(argument.value) is not str:
            continue
        if TEXTS[function].fullmatch(str(argument.value)):
            yield argument


def _is_size(node: ast.Name | ast.Constant) -> bool:
    """Whether a name or constant is a symbol of a size, a constant of sympy, or a number."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float))
    return node.id in CONSTANTS or SYMBOL.fullmatch(node.id) is not None


class _TooLarge(ValueError):
    """A size of more than MOST_TERMS or MOST_BITS."""


def _multiplied_out(node: ast.expr) -> tuple[int, int]:
    """The terms of an expression, products and powers multiplied out, and bits of its numbers.

    What is no sum, product or power is one term, whose operands are looked at by themselves.
    """
    operation, operands = _operation(node)
    sizes = [_multiplied_out(operand) for operand in operands]
    operand_terms = [terms for terms, _ in sizes]
    operand_bits = [bits for _, bits in sizes]

    terms = 1
    bits = max([64, *operand_bits])
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        bits = _bits_of_number(node.value)
    elif operation in ("Add", "Sub", "USub"):
        terms = max(1, sum(operand_terms))  # `Add()` is 0, a term as well
        bits += len(operands)
    elif operation in ("Mult", "Mul"):
        terms = math.prod(operand_terms)
        bits = sum(operand_bits)
    elif operation in ("Pow", *POWERS) and len(operands) == 2:
        numbers = [abs(number) for number in _numbers(operands[1])]
        power = int(min(1000, max([0, *numbers])))
        # As many as there are ways to take `power` of the base's terms, in any order.
        terms = math.comb(operand_terms[0] + power - 1, power)
        bits = operand_bits[0] * power
    if terms > MOST_TERMS or bits > MOST_BITS:
        raise _TooLarge(f"more than {MOST_TERMS} terms or {MOST_BITS} bits")
    return terms, bits


def _bits_of_number(number: float) -> int:
    """The bits of a number: 64 for a float.

    Raises:
        _TooLarge: A whole number of more than 64 bits, or an infinite float.
    """
    bits = 64
    if isinstance(number, int):
        bits = number.bit_length()
    is_infinite = isinstance(number, float) and math.isinf(number)
    if is_infinite or bits > 64:
        raise _TooLarge(f"a number of {bits} bits")
    return bits


def _operation(node: ast.expr) -> tuple[str, list[ast.expr]]:
    """The name of the operation of an expression, and its operands."""
    match node:
        case ast.BinOp(left, operator, right):
            return type(operator).__name__, [left, right]
        case ast.UnaryOp(operator, operand):
            return type(operator).__name__, [operand]
        case ast.BoolOp(_, values):
            return "", values
        case ast.Compare(left, _, comparators):
            return "", [left, *comparators]
        case ast.Call(ast.Name(name), arguments, keywords):
            for option in keywords:
                if any(abs(number) > MOST_DIGITS for number in _numbers(option.value)):
                    raise _TooLarge(f"{option.arg} is above {MOST_DIGITS}")
            return name, arguments
    return "", []


def _numbers(node: ast.AST) -> list[float]:
    """The numbers in an expression."""
    numbers = []
    for inner in ast.walk(node):
        if not isinstance(inner, ast.Constant) or isinstance(inner.value, bool):
            continue
        if isinstance(inner.value, (int, float)):
            numbers.append(inner.value)
    return numbers


def _is_power(node: ast.AST) -> bool:
    """Whether an expression is a power, or a shift: a product with a power of 2."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, (ast.Pow, ast.LShift))
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in POWERS


def _is_small_power(power: ast.AST) -> bool:
    """Whether a power holds no other power, and its exponent no product and no number above 64.

    Nested powers of numbers take forever.
    """
    if any(_is_power(inner) for inner in ast.walk(power) if inner is not power):
        return False
    exponents = getattr(power, "args", [])[-1:]
    if isinstance(power, ast.BinOp):
        exponents = [power.right]
    for exponent in exponents:
        if any(isinstance(inner, ast.BinOp) for inner in ast.walk(exponent)):
            return False
        if not all(abs(number) <= 64 for number in _numbers(exponent)):
            return False
    return True
