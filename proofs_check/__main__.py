"""Implements ``python -m proofs_check``: runs the checks and prints a table.

Exit status 0: every statement holds. 1: a statement failed. 2: wrong arguments, or a package is
missing.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from proofs_check import counterexamples, coverage
from proofs_check.optional import require
from proofs_check.registry import CHECKS, STATEMENTS, Outcome, Size, Subject, chosen, run


def parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    size = Size()
    p = argparse.ArgumentParser(
        prog="python -m proofs_check",
        description="Check every statement of the OrLoMo paper on the code that trains.",
    )
    p.add_argument(
        "--lemma", action="append", metavar="NAME",
        help="only this statement (repeatable): a number, or one of " + ", ".join(STATEMENTS),
    )  # fmt: skip
    p.add_argument("--check", action="append", choices=list(CHECKS), metavar="NAME",
                   help="only this check (repeatable): one of " + ", ".join(CHECKS))  # fmt: skip
    p.add_argument("--examples", type=int, default=size.examples,
                   help="Hypothesis examples (default: %(default)s)")  # fmt: skip
    p.add_argument(
        "--exhaustive", type=int, nargs=2, action="append", metavar=("K", "T"),
        help="run all K^T arrival orders (repeatable); default: " + ", ".join(
            f"{k}^{t}" for k, t in size.exhaustive),
    )  # fmt: skip
    p.add_argument(
        "--seed", type=int, default=size.seed, help="seed of all draws (default: %(default)s)"
    )
    p.add_argument("--json", metavar="FILE", help="write the table as JSON ('-': to stdout only)")
    p.add_argument("--plots", metavar="DIR", help="write the log-log plots of Remarks 4 and 5")
    p.add_argument("--map", action="store_true", help="print each statement's code and checks")
    p.add_argument("--replay", metavar="FILE", help="run a counterexample again ('-': stdin)")
    p.add_argument("--counterexample", metavar="FILE", help="write the first counterexample here")
    p.add_argument("--rule", metavar="MODULE:FACTORY", help="check your own server rule")
    p.add_argument(
        "--no-worker-momentum", action="store_true", help="its workers report no local momentum"
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack the symbols
    p = parser()
    args = p.parse_args(arguments)
    try:
        if args.replay:
            from_stdin = args.replay == "-"
            text = sys.stdin.buffer.read() if from_stdin else Path(args.replay).read_bytes()
            content = json.loads(text)
            residual, allowance = counterexamples.replay(
                _subject(args.rule or content.get("rule"), not args.no_worker_momentum), content
            )
            held = residual <= allowance
            verdict = "holds" if held else "FAILS"
            name = STATEMENTS[content["statement"]].title
            print(f"{name} {verdict}: residual {residual:.6g}, allowance {allowance:.6g}")
            return 0 if held else 1
        subject = _subject(args.rule, not args.no_worker_momentum)
        size = replace(Size(), examples=args.examples, seed=args.seed, plots=args.plots)
        if args.exhaustive:
            size = replace(size, exhaustive=tuple(tuple(pair) for pair in args.exhaustive))
        checks = args.check or [c.name for c in CHECKS.values() if c.rule_only or not args.rule]
        statements = [_statement(name) for name in args.lemma] if args.lemma else None
        chosen(checks, statements)
        require(["matplotlib"] if args.plots else [])
    except (ValueError, OSError, ImportError, AttributeError) as error:
        p.error(str(error))
    if args.map:
        for line in coverage.lines(_note if sys.stderr.isatty() else None):
            print(line)
        return 0
    began = time.perf_counter()
    outcomes = _run(subject, size, checks, statements)
    rows = [asdict(outcome) for outcome in outcomes]
    if args.json == "-":
        print(_printable(rows, indent=1))
    else:
        print(table(outcomes))
        failed = [o for o in outcomes if not o.passed]
        seconds = time.perf_counter() - began
        print(f"{len(outcomes) - len(failed)} of {len(outcomes)} hold, in {seconds:.0f} s")
        for file in _counterexamples(failed, size, args.rule):
            print(f"\ncounterexample to {STATEMENTS[file['statement']].title} "
                  f"({file['check']}); save it and run it again with --replay FILE")  # fmt: skip
            print(_printable(file))
    if args.json and args.json != "-":
        Path(args.json).write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", "utf-8")
    files = _counterexamples([o for o in outcomes if not o.passed], size, args.rule)
    if args.counterexample and files:
        Path(args.counterexample).write_text(json.dumps(files[0], ensure_ascii=False), "utf-8")
    return 0 if outcomes and all(outcome.passed for outcome in outcomes) else 1


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a table of plain text.

    Example:
        >>> print(table([Outcome("lemma-1", 8, 0.0, 0.0, True, "exact", None, "c", "symbolic")]))
        statement  strength  check  cases  worst  allowed  verdict  note
        Lemma 1    symbolic  c          8      0        0  holds    exact
    """
    rows = [("statement", "strength", "check", "cases", "worst", "allowed", "verdict", "note")]
    for o in sorted(outcomes, key=lambda o: list(STATEMENTS).index(o.statement)):
        rows.append((
            STATEMENTS[o.statement].title, o.strength, o.check, str(o.cases), f"{o.residual:.3g}",
            f"{o.allowance:.3g}", "holds" if o.passed else "FAILS", o.note,
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = (3, 4, 5)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _printable(content: Any, indent: int | None = None) -> str:
    """Return JSON text for stdout; non-ASCII characters are escaped unless stdout is UTF-8."""
    escaped = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    return json.dumps(content, ensure_ascii=escaped, indent=indent)


def _run(subject: Subject, size: Size, checks: list[str], statements: Any) -> list[Outcome]:
    """Run the checks with a progress bar on stderr."""
    progress = _progress(len(checks))
    try:
        outcomes = []
        for name in checks:
            progress(name, 0)
            outcomes += run(subject, size, checks=[name], statements=statements)
            progress(name, 1)
        return outcomes
    finally:
        progress("", -1)


def _progress(total: int) -> Callable[[str, int], None]:
    """Return ``progress(name, steps)``, which shows Rich's bar on a terminal; −1 closes it.

    Without Rich it prints the names, also on a terminal only.
    """
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        return lambda name, steps: _note(name) if steps == 0 and sys.stderr.isatty() else None
    bar = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
    bar.start()
    task = bar.add_task("", total=total)

    def progress(name: str, steps: int) -> None:
        if steps < 0:
            bar.stop()
        else:
            bar.update(task, description=name, advance=steps)

    return progress


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _counterexamples(failed: list[Outcome], size: Size, rule: str | None) -> list[dict[str, Any]]:
    """Return one counterexample for each failed check: the one with the fewest arrivals."""
    by_check: dict[str, Outcome] = {}
    for outcome in failed:
        if outcome.check not in by_check or _arrivals(outcome) < _arrivals(by_check[outcome.check]):
            by_check[outcome.check] = outcome
    files = [(counterexamples.as_json(o, size, rule), _arrivals(o)) for o in by_check.values()]
    return [file for file, _ in sorted(files, key=lambda pair: pair[1])]


def _arrivals(outcome: Outcome) -> float:
    case = outcome.counterexample or {}
    return len(case["trace"]["workers"]) if "trace" in case else float("inf")


def _subject(rule: str | None, worker_momentum: bool) -> Subject:
    if rule is None:
        return Subject(worker_momentum=worker_momentum)
    module, _, factory = rule.partition(":")
    if not factory:
        raise ValueError(f"`--rule` must be MODULE:FACTORY, got {rule!r}")
    sys.path.insert(0, "")
    found = getattr(importlib.import_module(module), factory)
    try:
        rule_of = found(2, momentum=0.9, learning_rate=1.0, delay_weight=None)
        if not (callable(rule_of.init) and callable(rule_of.update)):
            raise TypeError("init and update must be functions")
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"`--rule` must name a factory(num_workers, momentum, learning_rate, delay_weight) of "
            f"optax transformations, got {rule!r}: {error}"
        ) from None
    return Subject(rule, rule=found, worker_momentum=worker_momentum)


def _statement(name: str) -> str:
    key = f"lemma-{name}" if name.isdigit() else name
    if key not in STATEMENTS:
        raise ValueError(f"`--lemma` must be a number or one of {list(STATEMENTS)}, got {name!r}")
    return key


if __name__ == "__main__":
    sys.exit(main())
