"""What a mutation run changes in a module: one small thing at a time, in the text as it was written.

Comparisons are turned and their bounds moved, conditions negated, `and` and `or` exchanged, arithmetic turned, numbers
and words changed, statements removed, returned values dropped; in SQL the same, and locks, orders and states as well.
Left alone is what says nothing about behaviour: annotations, decorators, docstrings, asserts, log lines, and texts for
people, which are words with a space in between.
"""

from __future__ import annotations

import ast
import copy
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_COMPARISONS: Final[dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_CALLS: Final = {"min": "max", "max": "min", "any": "all", "all": "any"}

_IS_SQL: Final = re.compile(r"\b(SELECT|UPDATE|DELETE|INSERT|SAVEPOINT|BEGIN|LIMIT|BETWEEN)\b")
# What is found, and what stands in its place.
_SQL: Final = [
    (re.compile(pattern), to)
    for pattern, to in (
        (r"<=", "<"),
        (r"<=", ">"),
        (r">=", ">"),
        (r">=", "<"),
        (r"(?<= )<(?= )", "<="),
        (r"(?<= )<(?= )", ">="),
        (r"(?<= )<>(?= )", "="),
        (r"((?:WHERE|AND|ON|WHEN) [\w.{}]+) =(?= )", r"\1 <>"),
        (r"(?<= )\+(?= )", "-"),
        (r"(?<= )-(?= )", "+"),
        (r"(?<= )OR(?= )", "AND"),
        (r"IS NULL", "IS NOT NULL"),
        (r"IS NOT NULL", "IS NULL"),
        (r"IS DISTINCT FROM", "IS NOT DISTINCT FROM"),
        (r"\btrue\b", "false"),
        (r"\bfalse\b", "true"),
        (r"\bmin\(", "max("),
        (r"\bmax\(", "min("),
        (r"\bleast\(", "greatest("),
        (r"LIMIT (?=[1%])", "OFFSET "),
        (r"FOR NO KEY UPDATE SKIP LOCKED", ""),
        (r" SKIP LOCKED", ""),
        (r"NO KEY ", ""),
        (r"LEFT JOIN", "JOIN"),
        (r"DESC(?= LIMIT)", ""),
        (r"(ORDER BY [^\n()]*)(?= LIMIT)", r"\1 DESC"),
        (r"(?<=ORDER BY id)(?=\n)", " DESC"),
        (r"(?<= )'pending'", "'parked'"),
        (r"(?<= )'parked'", "'pending'"),
        (r"'delivered'", "'superseded'"),
        (r"'superseded'", "'delivered'"),
        (r"\('pending', 'parked'\)", "('pending')"),
        (r"\('pending', 'parked'\)", "('parked')"),
        (r"(?<=[ (])0(?=[, )])", "1"),
        (r"(?<=[ (])1(?=[, )])", "2"),
        (r"-1::", "0::"),
        (r"255::", "254::"),
        (r", \w+ = (?:NULL|false|\d+|'\w+'|(?:clock_timestamp|s|excluded|due)[\w.()]+)(?=[,\n])", ""),
        (r"statement_timestamp\(\)", "'infinity'"),
        (r"\bcoalesce\((\S+), (\S+)\)", r"\1"),
        (r"\bcoalesce\((\S+), (\S+)\)", r"\2"),
    )
]
# Only between two conditions: the AND of a BETWEEN belongs to its bounds.
_SQL_AND: Final = re.compile(r"(?<!BETWEEN l\.lane )(?<!BETWEEN c\.lane )\bAND\b")


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of a module: `old` at `line` becomes `new`; offsets are in bytes. `scope` is where, for readers."""

    scope: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def applied(self, source: str) -> str:
        text = source.encode()
        return (text[: self.start] + self.new.encode() + text[self.end :]).decode()

    def diff(self, source: str) -> str:
        """The lines that differ, those of before with `-`, those of after with `+`."""
        lines = difflib.unified_diff(source.splitlines(), self.applied(source).splitlines(), lineterm="", n=0)
        return "\n".join(line for line in list(lines)[2:] if not line.startswith("@@"))


def mutants(source: str) -> list[Mutant]:
    """All changes of a module, in the order of its text; those that are no Python are left out."""
    found: dict[tuple[int, int, str], Mutant] = {}
    for mutant in _Finder(source).find():
        try:
            compile(mutant.applied(source), "<mutant>", "exec")
        except SyntaxError:
            continue
        if mutant.new != mutant.old:
            found.setdefault((mutant.start, mutant.end, mutant.new), mutant)
    return sorted(found.values(), key=lambda mutant: (mutant.start, mutant.end, mutant.new))


class _Finder:
    def __init__(self, source: str) -> None:
        self._tree = ast.parse(source)
        self._text = source.encode()
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line.encode()))

    def find(self) -> Iterator[Mutant]:
        yield from self._visit(self._tree, "", None)

    def _visit(self, node: ast.AST, scope: str, whole: ast.JoinedStr | None) -> Iterator[Mutant]:
        """What can be changed in a node and below. Inside an f-string it is written anew as a whole."""
        if _silent(node):
            return
        if isinstance(node, ast.JoinedStr):
            whole = node
        if isinstance(node, ast.expr | ast.stmt):
            for new in _changes(node, at_module=not scope):
                yield self._mutant(whole or node, _exchanged(whole, node, new) if whole else new, scope)
        if whole is None:
            for test in _conditions(node):
                yield self._mutant(test, ast.UnaryOp(ast.Not(), test), scope)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from self._sql(node, scope)
        if isinstance(node, ast.stmt):
            yield from self._statements(node, scope)
        for child in _children(node):
            inner = child.name if isinstance(child, ast.FunctionDef | ast.ClassDef) else ""
            yield from self._visit(child, ".".join(filter(None, (scope, inner))), whole)

    def _statements(self, node: ast.stmt, scope: str) -> Iterator[Mutant]:
        match node:
            case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Delete() | ast.Raise():
                yield self._mutant(node, ast.Pass(), scope)
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]) if not scope.endswith("__init__"):
                yield self._mutant(node, ast.Pass(), scope)
            case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
                yield self._mutant(node, ast.Return(ast.Constant(None)), scope)
            case ast.Continue():
                yield self._mutant(node, ast.Break(), scope)
            case ast.Break():
                yield self._mutant(node, ast.Continue(), scope)

    def _sql(self, node: ast.Constant, scope: str) -> Iterator[Mutant]:
        start, end = self._span(node)
        text = self._text[start:end].decode()
        if not _IS_SQL.search(text):
            return
        for pattern, to in [*_SQL, (_SQL_AND, "OR")]:
            for found in pattern.finditer(text):
                at = start + len(text[: found.start()].encode())
                line = node.lineno + text[: found.start()].count("\n")
                old = found.group()
                yield Mutant(scope, line, at, at + len(old.encode()), old, found.expand(to))

    def _mutant(self, old: ast.stmt | ast.expr, new: ast.AST, scope: str) -> Mutant:
        start, end = self._span(old)
        text = ast.unparse(ast.fix_missing_locations(new))
        if isinstance(new, ast.expr) and not isinstance(new, ast.Constant | ast.Name | ast.Call | ast.JoinedStr):
            text = f"({text})"
        return Mutant(scope, old.lineno, start, end, self._text[start:end].decode(), text)

    def _span(self, node: ast.stmt | ast.expr) -> tuple[int, int]:
        end_line, end_column = node.end_lineno or node.lineno, node.end_col_offset or 0
        return self._starts[node.lineno - 1] + node.col_offset, self._starts[end_line - 1] + end_column


def _silent(node: ast.AST) -> bool:
    """Whether a node says nothing about behaviour, or says it to people."""
    match node:
        case ast.Assert() | ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Call(func=ast.Attribute(value=ast.Name(id="log"))):
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="log")))):
            return True
        case ast.Subscript(value=ast.Name(id="Literal")):
            return True
        case ast.JoinedStr(values=parts):
            return any(isinstance(part, ast.Constant) and " " in str(part.value) for part in parts)
    return False


def _children(node: ast.AST) -> Iterator[ast.AST]:
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "decorator_list", "bases", "keywords"} and not isinstance(node, ast.Call):
            continue
        if isinstance(node, ast.Raise):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child


def _changes(node: ast.expr | ast.stmt, *, at_module: bool) -> Iterator[ast.expr | ast.stmt]:  # noqa: C901 - a list
    """What may stand in the place of a node."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            for other in _COMPARISONS.get(type(op), ()):
                yield ast.Compare(left, [other()], [right])
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.UnaryOp(op=ast.USub(), operand=operand) if not isinstance(operand, ast.Constant):
            yield operand
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            if not (at_module and isinstance(op, ast.BitOr)):  # a union of types
                yield ast.BinOp(left, _ARITHMETIC[type(op)](), right)
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in _ARITHMETIC:
            yield ast.AugAssign(target, _ARITHMETIC[type(op)](), value)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in _CALLS:
            yield ast.Call(ast.Name(_CALLS[name]), args, keywords)
        case ast.Call(func=ast.Name(id="reversed" | "sorted"), args=[first, *_]):
            yield first
        case ast.Constant(value=value):
            yield from (ast.Constant(other) for other in _values(value))


def _conditions(node: ast.AST) -> Iterator[ast.expr]:
    """The parts of a node that decide something and are not turned around by another change."""
    match node:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            tests = [test]
        case ast.comprehension(ifs=tests) | ast.BoolOp(values=tests):
            pass
        case ast.match_case(guard=ast.expr() as guard):
            tests = [guard]
        case _:
            tests = []
    plain = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.NamedExpr)
    return (test for test in tests if isinstance(test, plain))


def _values(value: object) -> Iterator[bool | float | str]:
    """Other values than a constant's own: neighbours of small numbers, nothing for large ones."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int) and abs(value) <= 10:
        yield value + 1
        if value:
            yield value - 1
    elif isinstance(value, int | float):
        yield type(value)(0) if value else 1.0
    elif isinstance(value, str) and " " not in value:
        yield "" if value else "XX"


def _exchanged(whole: ast.JoinedStr, old: ast.AST, new: ast.AST) -> ast.JoinedStr:
    """A copy of `whole` with `new` in the place of `old`: what a deep copy is told to have copied already."""
    return copy.deepcopy(whole, {id(old): new})
