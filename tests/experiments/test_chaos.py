"""The chaos command at a small size: kills of workers and of the driver, and poison."""

import sys

import jax
import numpy as np
import pytest

from experiments import chaos
from orlomo_jax import LocalUpdate, Report
from orlomo_jax.server import TaskId
from tests.support import helpers


@pytest.mark.slow
def test_a_run_that_is_shot_at_ends_as_a_calm_one(capsys):
    chaos.main(["--kills", "3", "--driver-share", "0.4", "--poison-share", "0.3", "--epochs", "30"])
    output = capsys.readouterr().out
    assert output.count("holds: ") == 5
    assert "'driver'" in output
    assert "'worker'" in output


def kinds(sent, report):
    """What is wrong with what was sent in the place of a report."""
    for bad in sent:
        leaves = jax.tree.leaves(bad.update)
        if bad.id.round < report.id.round:
            yield "replay"
        elif any(np.isnan(leaf).any() for leaf in leaves):
            yield "not finite"
        elif [leaf.shape for leaf in leaves] != [x.shape for x in jax.tree.leaves(report.update)]:
            yield "wrong shape"
    if len(sent) == 2 and sent[0] is sent[1]:
        yield "duplicate"


def test_poison_is_of_every_kind(tmp_path):
    report = Report(TaskId(0, 0, 0), LocalUpdate(helpers.tree(0), helpers.tree(1)))
    poison, seen = chaos.Poison(1.0, 0, tmp_path / "poison.txt"), []
    for round in range(40):
        current = report._replace(id=TaskId(0, round, 0))
        seen += kinds(poison(current), current)
    assert set(seen) == set(chaos.POISONS)


@pytest.mark.slow
def test_a_driver_that_fails_by_itself_is_reported(tmp_path):
    (tmp_path / "arrivals.jsonl").write_text("garbage\n")
    with pytest.raises(
        SystemExit, match=r"log\.txt, which ends with\n.*is not a line of a journal"
    ):
        chaos.main(["--kills", "1", "--folder", str(tmp_path)])
    assert "arrivals.jsonl:1 is not a line of a journal" in (tmp_path / "log.txt").read_text()


def test_without_ray_the_command_says_which_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r"pip install 'orlomo-jax\[ray\]'"):
        chaos.main(["--kills", "1"])
