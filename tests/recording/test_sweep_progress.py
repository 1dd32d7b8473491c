"""The bar of a sweep: what it counts, which run is best, and that it goes."""

import io
import sys
import threading

import jax
import jax.numpy as jnp
import pytest
import rich.console

from orlomo_jax import RunStart, StepRecord, simulate_many
from orlomo_jax.recording import SweepProgress
from tests.support import toy
from tests.support.real_runs import Killed, killed_at
from tests.support.toy import PARAMS, STATE, batch_fn, loss_fn, method_of, schedule

T = 20


def terminal():
    screen = io.StringIO()
    return screen, rich.console.Console(file=screen, force_terminal=True, width=150)


def starts(bar, count, *callbacks, rate=schedule):
    trace = toy.trace_of("orlomo", T)
    return [
        RunStart(
            *(PARAMS, trace, jax.random.key(seed), rate, STATE),
            callbacks=[bar.run(f"seed {seed}"), *callbacks],
        )
        for seed in range(count)
    ]


def sweep(runs, **options):
    options = {"evaluate": toy.evaluate, "evaluate_every": 8} | options
    results = simulate_many(method_of("orlomo"), loss_fn, batch_fn, runs, **options)
    assert results is not None
    return results


@pytest.mark.parametrize(
    ("over_runs", "highest"),
    [
        pytest.param("vmap", True, marks=pytest.mark.slow),
        ("loop", False),
        pytest.param("vmap", False, marks=pytest.mark.slow),
        pytest.param("loop", True, marks=pytest.mark.slow),
    ],
)
def test_the_bar_shows_all_runs_and_the_best(over_runs, highest):
    screen, console = terminal()
    bar = SweepProgress(3, "a", highest=highest, console=console, every=0)
    results = sweep(starts(bar, 3), over_runs=over_runs)
    shown = screen.getvalue()
    values = [result.history.evaluations[-1].metrics["a"] for result in results]
    assert len(set(values)) == 3
    best = (max if highest else min)(values)
    assert bar.best == (f"seed {values.index(best)}", best)
    for part in ("0/3 runs", "3/3 runs", f"{3 * T} steps", f"best {bar.best[0]}: a {best:.4g}"):
        assert part in shown
    with console.status("the terminal is free again"):
        pass


@pytest.mark.slow
def test_a_run_counts_when_it_has_ended():
    screen, console = terminal()
    bar = SweepProgress(3, console=console, every=0)
    sweep(starts(bar, 2))
    assert (bar.finished, bar.best) == (2, None)
    assert "3/3" not in screen.getvalue()
    sweep(starts(bar, 1))
    assert bar.finished == 3
    assert "3/3 runs" in screen.getvalue()


def test_a_diverged_run_is_never_the_best():
    def diverging(step):
        return jnp.where(step < 10, 1e-6, 1e30)

    bar = SweepProgress(2, "a", highest=True, every=0)
    fine, bad = starts(bar, 2)
    results = sweep([fine, bad._replace(local_learning_rate=diverging)], over_runs="loop")
    values = [result.history.evaluations[0].metrics["a"] for result in results]
    assert values[1] > values[0], "it was the best before it diverged"
    assert [result.status for result in results] == ["finished", "diverged"]
    assert bar.best is not None
    assert bar.best[0] == "seed 0"
    assert bar.finished == 2


@pytest.mark.slow
def test_the_bar_goes_after_an_error():
    screen, console = terminal()
    bar = SweepProgress(2, console=console)
    with pytest.raises(Killed):
        sweep(starts(bar, 2, killed_at(4)))
    assert screen.getvalue().count("\x1b[?25h") == 1, "the cursor is shown again"
    assert bar.finished == 0


def test_the_runs_may_be_in_several_threads():
    screen, console = terminal()
    bar = SweepProgress(80, "a", console=console, every=0)
    started = threading.Barrier(8)

    def some(first):
        runs = [bar.run(f"run {first + index}") for index in range(10)]
        for run in runs:
            run.on_start(0, 5)
        started.wait()
        for run in runs:
            for step in range(1, 6):
                value = {"a": float(first) - step}
                run.on_step(StepRecord(step, 0.0, 0, 0, 0.0, {}, value))
            run.on_end(result)
            run.close()

    (result,) = sweep(starts(SweepProgress(1), 1))
    threads = [threading.Thread(target=some, args=(10 * index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bar.finished == 80
    assert bar.best == ("run 0", -5.0)
    assert "80/80 runs" in screen.getvalue()
    assert "400 steps" in screen.getvalue()
    assert screen.getvalue().count("\x1b[?25h") == 1, "one bar, for all threads"


def test_nothing_is_written_to_a_file():
    screen = io.StringIO()
    bar = SweepProgress(2, "a", console=rich.console.Console(file=screen), every=0)
    sweep(starts(bar, 2))
    assert screen.getvalue() == ""
    assert bar.finished == 2


def test_an_unknown_metric_is_named():
    bar = SweepProgress(2, "b", console=terminal()[1])
    with pytest.raises(ValueError, match=r"`metric` must be one of .*'a'.*, got metric='b'"):
        sweep(starts(bar, 2))


def test_bad_arguments():
    with pytest.raises(ValueError, match="`total` must be ≥ 1, got total=0"):
        SweepProgress(0)
    with pytest.raises(ValueError, match="`every` must be ≥ 0, got every=-1"):
        SweepProgress(1, every=-1)


def test_a_missing_rich_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"SweepProgress needs rich: pip install 'orlomo-jax\["):
        SweepProgress(1)
