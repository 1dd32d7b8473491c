"""Tasks in threads: their results, and how they end after an error."""

import threading
import time

import pytest

from experiments.threads import in_threads


def test_results_come_as_tasks_end():
    first = threading.Event()

    def slow():
        assert first.wait(60)
        return "slow"

    found = []
    for result in in_threads([slow, lambda: "fast"], threading.Event()):
        found.append(result)
        first.set()
    assert sorted(found) == ["fast", "slow"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_stops_the_others(error):
    stop, ended, started = threading.Event(), [], []

    def fails():
        raise error("of a task")

    def others():
        started.append(1)
        while not stop.is_set():
            time.sleep(0.01)
        ended.append(1)

    with pytest.raises(error, match="of a task"):
        list(in_threads([fails, *[others] * 100], stop))
    assert len(ended) == len(started) < 100


def test_an_error_of_the_consumer_stops_them_too():
    stop = threading.Event()

    def waits():
        assert stop.wait(60)

    def consume():
        for _ in in_threads([lambda: 1, waits], stop):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        consume()
    assert stop.is_set()


def test_a_single_task_runs_in_this_thread():
    thread = threading.current_thread
    assert list(in_threads([thread], threading.Event())) == [thread()]
