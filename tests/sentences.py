"""Reads the source of the package: every text that it can raise or warn with."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import lightning_lora

PACKAGE = Path(lightning_lora.__file__).parent
ROOMS = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
SAID_BY = ("rank_zero_warn", "rank_zero_info", "warn")


class Sentence(NamedTuple):
    """A text in the package: the room that gives it, where it is written, and what it looks like."""

    room: str
    place: str
    pattern: str

    @property
    def text(self) -> str:
        """The pattern as one would write it."""
        return re.sub(r"\\(.)", r"\1", self.pattern.replace(".*", "..."))


class Scope(NamedTuple):
    """Where names in an expression are looked up."""

    file: Path
    module: ast.Module
    function: ast.AST


@functools.cache
def sentences() -> list[Sentence]:
    """Every text that a ``raise`` or a call in ``SAID_BY`` of the package gives, once for each of its forms."""
    modules = {room: ast.parse(path.read_text()) for room, path in ROOMS.items()}
    functions: dict[Any, Scope] = {}
    tellers: dict[ast.expr, tuple[str, Scope]] = {}
    for room, module in modules.items():
        for function in ast.walk(module):
            if isinstance(function, ast.FunctionDef):
                scope = Scope(ROOMS[room], module, function)
                functions[scope.file, function.name] = functions[None, function.name] = scope
                for node in ast.walk(function):  # an inner function comes after the outer one, and has the last word
                    text = told(node)
                    if text is not None:
                        tellers[text] = (room, scope)
    found: set[Sentence] = set()
    for text, (room, scope) in tellers.items():
        for expression, where in followed(text, scope, functions):
            place = f"{where.file.relative_to(PACKAGE.parent)}:{expression.lineno}"
            found |= {Sentence(room, place, pattern) for pattern in patterns(expression, where) if has_words(pattern)}
    return sorted(found)


def told(node: ast.AST) -> ast.expr | None:
    """The text that a statement tells the user; none for a bare ``raise`` and for abstract methods."""
    call = node.exc if isinstance(node, ast.Raise) else node
    if not isinstance(call, ast.Call) or not call.args:
        return None
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    return call.args[0] if isinstance(node, ast.Raise) or name in SAID_BY else None


def followed(text: ast.expr, scope: Scope, functions: Mapping[Any, Scope]) -> Iterator[tuple[ast.expr, Scope]]:
    """The text itself, or what the function of the package returns that it comes from."""
    if isinstance(text, ast.Name):
        text = next((value for value in assigned(text.id, scope.function) if isinstance(value, ast.Call)), text)
    name = name_of(text.func) if isinstance(text, ast.Call) else None
    there = functions.get((scope.file, name)) or functions.get((None, name))
    if there is None:
        yield text, scope
        return
    for node in ast.walk(there.function):
        if isinstance(node, ast.Return) and node.value is not None and getattr(node.value, "value", "") is not None:
            yield node.value, there


def assigned(name: str, within: ast.AST) -> list[ast.expr]:
    """What is assigned to a name; not from itself."""
    found = [n for n in ast.walk(within) if isinstance(n, ast.Assign) and name in map(name_of, n.targets)]
    return [node.value for node in found if name not in map(name_of, ast.walk(node.value))]


def name_of(node: ast.AST | None) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def patterns(node: ast.expr, scope: Scope) -> set[str]:
    """Regular expressions for what an expression may look like: its constant parts, and ``.*`` for the others."""
    if isinstance(node, ast.Constant):
        return {re.escape(str(node.value))}
    if isinstance(node, ast.FormattedValue):
        plain = node.conversion == -1 and isinstance(node.value, ast.IfExp | ast.Name | ast.Subscript)
        return patterns(node.value, scope) if plain else {".*"}
    if isinstance(node, ast.JoinedStr):
        return {"".join(parts) for parts in product(*(patterns(value, scope) for value in node.values))}
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return {"".join(parts) for parts in product(patterns(node.left, scope), patterns(node.right, scope))}
    if isinstance(node, ast.IfExp):
        return patterns(node.body, scope) | patterns(node.orelse, scope)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):  # an entry of a table of texts
        tables = [value for value in assigned(node.value.id, scope.module) if isinstance(value, ast.Dict)]
        return {pattern for table in tables for value in table.values for pattern in patterns(value, scope)} or {".*"}
    if isinstance(node, ast.Name):
        values = assigned(node.id, scope.function) or assigned(node.id, scope.module)
        more = [n for n in ast.walk(scope.function) if isinstance(n, ast.AugAssign) and name_of(n.target) == node.id]
        texts = {pattern for value in values for pattern in patterns(value, scope)} or {".*"}
        return texts | {text + end for text in texts for one in more for end in patterns(one.value, scope)}
    return {".*"}


def has_words(pattern: str) -> bool:
    """Tell whether a text says anything itself; otherwise it hands on what another error says."""
    return re.search("[a-z]{2}", pattern) is not None
