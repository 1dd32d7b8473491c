"""Implements ``--map``: each statement's code, its checks, and the faults that they caught.

The code is found by the citations in the library's docstrings and comments. The functions that a
check uses are found by the subject's fields in its source and in the functions it calls. The
negative controls are run.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import orlomo_jax
import proofs_check
from proofs_check.mutants.catalogue import Control, controls
from proofs_check.registry import CHECKS, STATEMENTS, Subject


def citations(pattern: str, package: Any = orlomo_jax) -> list[str]:
    """Return "file:line function" for each match in a package's source.

    If the match cites lines of an algorithm, they follow. Each function is named once for each
    range of lines that it cites.

    Example:
        >>> any("delay_adaptive" in place for place in citations(r"Eq[.] [(]6[)]"))
        True
    """
    root = Path(inspect.getsourcefile(package)).parent  # pyright: ignore[reportArgumentType]
    found: dict[tuple[str, str, str], str] = {}
    for path in sorted(root.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        spans = [
            (node.lineno, node.end_lineno or node.lineno, node.name)
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        for number, line in enumerate(source.splitlines(), 1):
            if re.search(pattern, line):
                inside = [s for s in spans if s[0] <= number <= s[1]]
                name = max(inside)[2] if inside else "module"
                cited = re.search(r"(?=Alg).*?, l(ines?|\.) [\d–, and]*\d", line)
                lines = cited.group().strip("*# (") if cited else ""
                place = f"{path.relative_to(root.parent)}:{number} {name}"
                found.setdefault((str(path), name, lines), f"{place}  {lines}".rstrip())
    return list(found.values())


def location(function: Callable[..., Any]) -> str:
    """Return "file:line" of a function's source."""
    path = Path(inspect.getsourcefile(function))  # pyright: ignore[reportArgumentType]
    root = Path(inspect.getsourcefile(proofs_check)).parent.parent  # pyright: ignore
    return f"{path.relative_to(root)}:{inspect.getsourcelines(function)[1]}"


@cache
def used_by(name: str) -> list[str]:
    """Return the names of the library's public functions that a check uses.

    Example:
        >>> used_by("worked-example")
        ['orlomo']
    """
    functions = _functions()
    fields = {f for f in Subject.__dataclass_fields__ if f not in ("name", "claims")}
    pending, seen, used = [CHECKS[name].function.__name__], set(), set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        for node in functions.get(current, ()):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if owner == "subject" and node.attr in fields:
                    used.add(node.attr)
                pending.append(node.attr)
            if isinstance(node, ast.Name):
                pending.append(node.id)
    values = [getattr(Subject(), f) for f in sorted(used)]
    return [value.__name__ for value in values if callable(value)]


def _exercised(statement: str) -> list[str]:
    """Return the library's functions that a statement's checks run, if the source cites none."""
    names = {n for c in CHECKS.values() if statement in c.statements for n in used_by(c.name)}
    values = {v.__name__: v for v in vars(Subject()).values() if inspect.isroutine(v)}
    places = [f"{location(values[n])} {n}, run by its checks" for n in sorted(names & set(values))]
    return places or ["none: the statement is only mathematics"]


@lru_cache(maxsize=1)
def _functions() -> dict[str, list[ast.AST]]:
    """Return the syntax nodes of every function and class of this package, by name."""
    root = Path(inspect.getsourcefile(proofs_check)).parent  # pyright: ignore[reportArgumentType]
    found: dict[str, list[ast.AST]] = {}
    for path in sorted(root.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.setdefault(node.name, []).extend(ast.walk(node))
    return found


def caught(control: Control) -> bool:
    """Run a negative control's check and return whether it found every violated statement."""
    failed = {outcome.statement for outcome in control.outcomes() if not outcome.passed}
    return failed >= set(control.statements)


def lines(on_control: Callable[[str], None] | None = None) -> Iterator[str]:
    """Yield the map, statement by statement.

    Args:
        on_control: Called with the name of each negative control before it is run.
    """
    by_statement: dict[str, dict[str, list[str]]] = {key: {} for key in STATEMENTS}
    for name, control in controls().items():
        if on_control is not None:
            on_control(name)
        verdict = "" if caught(control) else " (NOT CAUGHT)"
        for statement in control.statements:
            names = by_statement[statement].setdefault(control.caught_by, [])
            names.append(control.subject.name + verdict)
    for key, statement in STATEMENTS.items():
        yield f"{statement.title}: {statement.says}"
        for place in citations(statement.cited) or _exercised(key):
            yield f"  code   {place}"
        for item in CHECKS.values():
            if key not in item.statements:
                continue
            uses = ", ".join(used_by(item.name)) or "only mathematics"
            yield f"  check  {item.name} ({item.strength}), {location(item.function)}: {uses}"
            for broken in by_statement[key].get(item.name, []):
                yield f"    caught  {broken}"
