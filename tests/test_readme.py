"""The README's numbers come from the committed rows; its code is doctested."""

import pytest

from experiments import quickstart, readme, records


def test_every_number_is_that_of_the_committed_rows():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.render(text) == text
    for name in readme.BLOCKS:
        assert text.count(f"<!-- block {name} -->") == 1


def test_an_unknown_block_is_refused():
    with pytest.raises(ValueError, match=r"block must be one of .* got 'nothing'"):
        readme.render("<!-- block nothing -->\n<!-- end -->")


def test_committed_rows_show_the_papers_claims():
    """OrLoMo's training loss is the lowest, at about half the time of PRSGDm."""
    rows = records.read(readme.RESULTS / "quickstart" / "runs.jsonl")
    best = quickstart.best_runs(rows)
    mean = lambda name, metric: sum(r[metric] for r in best[name]) / len(best[name])  # noqa: E731
    losses = {name: mean(name, "train_loss") for name in best}
    assert losses["orlomo"] == min(losses.values())
    assert losses["local_ormo_da"] > 3 * losses["al_sgd"]
    assert mean("orlomo", "virtual_time") < 0.6 * mean("prsgdm", "virtual_time")
