"""The README's numbers come from the committed rows; its code is doctested."""

import re
from pathlib import Path

from rich.console import Console

from experiments import quickstart, records

ROOT = Path(__file__).parent.parent


def rendered_table() -> str:
    rows = records.read(ROOT / "experiments" / "results" / "quickstart" / "runs.jsonl")
    console = Console(width=80, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(quickstart.table(quickstart.best_runs(rows)))
    return "\n".join(line.rstrip() for line in capture.get().strip("\n").splitlines())


def test_quickstart_table_is_that_of_the_committed_rows():
    block = re.search(r"```text\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    assert block[1] == rendered_table()


def test_committed_rows_show_the_papers_claims():
    """OrLoMo's training loss is the lowest, at about half the time of PRSGDm."""
    rows = records.read(ROOT / "experiments" / "results" / "quickstart" / "runs.jsonl")
    best = quickstart.best_runs(rows)
    mean = lambda name, metric: sum(r[metric] for r in best[name]) / len(best[name])  # noqa: E731
    losses = {name: mean(name, "train_loss") for name in best}
    assert losses["orlomo"] == min(losses.values())
    assert losses["local_ormo_da"] > 3 * losses["al_sgd"]
    assert mean("orlomo", "virtual_time") < 0.6 * mean("prsgdm", "virtual_time")
