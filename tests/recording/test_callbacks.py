"""Callbacks: what they are told and in which order, and the ones of the library."""

import csv
import io
import struct
import subprocess
import sys
import time

import jax
import pytest
import rich.console
from tensorboardX.proto.event_pb2 import Event

from orlomo_jax import (
    Callback,
    Checkpointer,
    CSVLog,
    HealthLog,
    ProgressBar,
    StepRecord,
    TensorBoard,
    ThreadWorkers,
    simulate,
)
from tests.support import real_runs, toy
from tests.support.real_runs import Killed, killed_at
from tests.support.toy import PARAMS, STATE, batch_fn, loss_fn, method_of, schedule

T = 20


def simulated(engine):
    def run(**options):
        arguments = {
            "trace": toy.trace_of("orlomo", T),
            "key": jax.random.key(0),
            "model_state": STATE,
            "local_learning_rate": schedule,
            "evaluate": toy.evaluate,
            "evaluate_every": 8,
            "engine": engine,
        }
        arguments |= options
        return simulate(method_of("orlomo"), loss_fn, batch_fn, PARAMS, **arguments)

    return run


def on_threads(**options):
    return real_runs.run(num_steps=T, **{"evaluate_every": 8} | options)


RUNS = {"threads": on_threads, "compiled": simulated("compiled"), "eager": simulated("eager")}
runs = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


class Told(Callback):
    """Writes down what it is told."""

    def __init__(self, seen, name="", fails_at=None):
        self.seen, self.name, self.fails_at = seen, name, fails_at

    def _note(self, *what):
        self.seen.append((self.name, *what))
        if what == self.fails_at:
            raise ZeroDivisionError("of the callback")

    def on_start(self, step, num_steps):
        self._note("start", step, num_steps)

    def on_step(self, record):
        self._note("step", record.step)

    def on_end(self, result):
        self._note("end", result.status)

    def close(self):
        self._note("close")


def whole(name, first=0, status="finished"):
    steps = [(name, "step", step) for step in range(first + 1, T + 1)]
    return [(name, "start", first, T), *steps, (name, "end", status), (name, "close")]


@runs
def test_the_order_is_start_steps_end_close(run):
    seen = []
    run(callbacks=[Told(seen, "a"), Told(seen, "b")])
    for name in "ab":
        assert [event for event in seen if event[0] == name] == whole(name)
    assert seen[:4] == [
        ("a", "start", 0, T),
        ("b", "start", 0, T),
        ("a", "step", 1),
        ("b", "step", 1),
    ]


@runs
def test_a_resumed_run_tells_the_steps_after_its_checkpoint(run, tmp_path):
    with pytest.raises(Killed):
        run(callbacks=[killed_at(14)], checkpoint=Checkpointer(tmp_path, every=5))
    seen = []
    run(callbacks=[Told(seen)], checkpoint=Checkpointer(tmp_path, every=5))
    assert seen == whole("", first=10)


@runs
@pytest.mark.parametrize("where", [("start", 0, T), ("step", 3), ("end", "finished")])
def test_all_are_closed_after_the_error_of_one(run, where):
    seen = []
    with pytest.raises(ZeroDivisionError, match="of the callback"):
        run(callbacks=[Told(seen, "a"), Told(seen, "b", fails_at=where)])
    assert seen[-2:] == [("a", "close"), ("b", "close")]
    assert [event[1] for event in seen].count("close") == 2
    if where[0] != "end":
        assert "end" not in [event[1] for event in seen]


@runs
def test_they_are_closed_after_an_error_of_the_run(run):
    calls, seen = [], []

    def evaluate(params, model_state):
        calls.append(1)
        if len(calls) == 3:  # the first is before the first step
            raise ZeroDivisionError("of the evaluation")
        return {}

    with pytest.raises(ZeroDivisionError, match="of the evaluation"):
        run(callbacks=[Told(seen)], evaluate=evaluate)
    assert (seen[0], seen[-1]) == (("", "start", 0, T), ("", "close"))
    assert "end" not in [event[1] for event in seen]


@runs
def test_a_stopped_run_ends_and_closes(run):
    seen = []

    class Stops(Told):
        def on_step(self, record):
            super().on_step(record)
            return record.step == 9

    result = run(callbacks=[Stops(seen)])
    assert result.status == "stopped"
    assert seen[-2:] == [("", "end", "stopped"), ("", "close")]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


@runs
def test_a_csv_log_has_every_number(run, tmp_path):
    result = run(callbacks=[CSVLog(tmp_path / "run.csv")])
    header, *rows = rows_of(tmp_path / "run.csv")
    assert header == ["step", "time", "worker", "delay", "name", "value"]
    history = result.history
    losses = [row for row in rows if row[4] == "loss"]
    columns = (history.step, history.worker, history.delay, history.loss, history.time)
    for (step, at, worker, delay, _, loss), *wanted in zip(losses, *columns, strict=True):
        assert [int(step), int(worker), int(delay)] == [int(x) for x in wanted[:3]]
        assert float(loss) == pytest.approx(float(wanted[3]))
        assert float(at) == pytest.approx(float(wanted[4]))
    evaluations = [(int(row[0]), float(row[5])) for row in rows if row[4] == "a"]
    assert evaluations == [(e.step, e.metrics["a"]) for e in history.evaluations]
    assert len(rows) == T + 3


@pytest.mark.parametrize("engine", ["compiled", "eager"])
def test_a_resumed_csv_log_is_that_of_an_unbroken_run(engine, tmp_path):
    run = simulated(engine)
    run(callbacks=[CSVLog(tmp_path / "unbroken.csv")])
    log = CSVLog(tmp_path / "resumed.csv")
    with pytest.raises(Killed):
        run(callbacks=[log, killed_at(14)], checkpoint=Checkpointer(tmp_path / "run", every=5))
    assert max(int(row[0]) for row in rows_of(log.path)[1:]) == 14
    run(callbacks=[CSVLog(log.path)], checkpoint=Checkpointer(tmp_path / "run", every=5))
    assert rows_of(log.path) == rows_of(tmp_path / "unbroken.csv")
    assert sorted(path.name for path in tmp_path.glob("*.csv*")) == ["resumed.csv", "unbroken.csv"]


KILLED = """
import os, signal, sys
from orlomo_jax import CSVLog, StepRecord
log = CSVLog(sys.argv[1])
log.on_start(int(sys.argv[2]), 9)
for step in range(int(sys.argv[2]) + 1, int(sys.argv[3]) + 1):
    log.on_step(StepRecord(step, 0.5, 0, 0, 2.0, {}, None))
os._exit(9)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_the_rows_of_its_steps(tmp_path):
    path = tmp_path / "run.csv"
    for first, last, steps in ((0, 4, [1, 2, 3, 4]), (3, 3, [1, 2, 3]), (3, 5, [1, 2, 3, 4, 5])):
        command = [sys.executable, "-c", KILLED, str(path), str(first), str(last)]
        assert subprocess.run(command).returncode == 9
        assert [int(row[0]) for row in rows_of(path)[1:]] == steps


def test_a_csv_log_takes_an_empty_file_and_half_a_line(tmp_path):
    path = tmp_path / "run.csv"
    for text in ("", "step,time,worker,delay,name,value\n1,0.5,0,0,loss,2.0\n2,0.5,0"):
        path.write_text(text)
        log = CSVLog(path)
        log.on_start(1, 9)
        log.on_step(StepRecord(2, 0.75, 1, 0, 3.0, {"norms": [1.0, [2.0]]}, None))
        log.close()
        assert [row[0] for row in rows_of(path)[1:]] == (["1"] if text else []) + ["2", "2", "2"]
    assert [row[4:] for row in rows_of(path)[2:]] == [
        ["loss", "3.0"],
        ["metrics['norms'][0]", "1.0"],
        ["metrics['norms'][1][0]", "2.0"],
    ]


def test_another_file_is_no_csv_log(tmp_path):
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"mine\.csv was not written by CSVLog: choose another"):
        simulated("eager")(callbacks=[CSVLog(tmp_path / "mine.csv")])
    assert (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"


def events_of(folder):
    """Every (tag, step, value, time) of the TensorBoard files in a folder."""
    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [
                (value.tag, event.step, value.simple_value, event.wall_time)
                for value in event.summary.value
            ]
            at += length + 16
    return found


@pytest.mark.parametrize("run", [RUNS["threads"], RUNS["compiled"]], ids=["threads", "compiled"])
def test_tensorboard_has_every_evaluation(run, tmp_path):
    result = run(callbacks=[TensorBoard(tmp_path / "events")])
    history = result.history
    wanted = {}
    for step, at, metrics in history.evaluations:
        wanted["a", step] = metrics["a"], at
        wanted["loss", step] = history.loss[step - 1], at
        wanted["delay", step] = history.delay[step - 1], at
    found = {(tag, step): (value, at) for tag, step, value, at in events_of(tmp_path / "events")}
    assert found.keys() == wanted.keys()
    for key, pair in wanted.items():
        assert found[key] == pytest.approx(pair), key


@runs
def test_a_progress_bar_shows_the_run_and_goes(run):
    screen = io.StringIO()
    console = rich.console.Console(file=screen, force_terminal=True, width=150)
    run(callbacks=[ProgressBar("my run", console, every=0, tokens_per_step=1000)])
    shown = screen.getvalue()
    for part in ("my run", f"{T}/{T}", "loss ", "delay ", "a ", "tokens/s"):
        assert part in shown
    with console.status("the terminal is free again"):
        pass


def test_a_progress_bar_goes_after_an_error():
    screen = io.StringIO()
    console = rich.console.Console(file=screen, force_terminal=True, width=150)
    with pytest.raises(Killed):
        simulated("eager")(callbacks=[ProgressBar("mine", console), killed_at(4)])
    assert screen.getvalue().endswith("\x1b[2K"), "the line is cleared"
    assert screen.getvalue().count("\x1b[?25h") == 1, "the cursor is shown again"


@pytest.mark.parametrize(
    ("make", "package"), [(ProgressBar, "rich"), (lambda: TensorBoard("x"), "tensorboardX")]
)
def test_a_missing_package_is_named(make, package, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress" if package == "rich" else package, None)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'orlomo-jax\[callbacks"):
        make()


def test_a_health_log_tells_how_a_real_run_fares():
    texts, steps = [], []

    def on_step(record):
        steps.append(record.step)
        time.sleep(0.05)

    workers = ThreadWorkers(slowdowns=[1, 1, 2])
    real_runs.run(workers=workers, callbacks=[HealthLog(0.2, texts.append), on_step])
    assert 1 <= len(texts) <= len(steps) * 0.05 / 0.2 + 20
    assert all(text.startswith("step ") and "share/idle" in text for text in texts)
    shown = [int(text.split(",")[0].split()[1]) for text in texts]
    assert shown == sorted(shown)


def test_a_health_log_writes_to_the_librarys_logger(caplog):
    with caplog.at_level("INFO", logger="orlomo_jax"):
        real_runs.run(callbacks=[HealthLog(0.1), lambda record: time.sleep(0.05)])
    assert any("share/idle" in message for message in caplog.messages)


def test_a_simulated_run_has_no_health():
    texts = []
    simulated("eager")(callbacks=[HealthLog(1e-9, texts.append)])
    assert texts == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HealthLog(0), "`every` must be > 0, got every=0"),
        (lambda: ProgressBar(every=-1), "`every` must be ≥ 0, got every=-1"),
        (lambda: ProgressBar(tokens_per_step=0), "`tokens_per_step` must be > 0, got tokens"),
    ],
)
def test_bad_periods(make, message):
    with pytest.raises(ValueError, match=message):
        make()
