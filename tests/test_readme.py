"""Checks README.md and docs/: size, generated tables, links; their examples are doctests."""

import re

import pytest

from experiments import quickstart, readme, records

PAGES = {str(page.relative_to(readme.ROOT)): page.read_text("utf-8") for page in readme.PAGES}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_number_is_that_of_the_committed_rows():
    for name, text in PAGES.items():
        assert readme.render(text) == text, f"{name}: run python -m experiments.readme"
    everything = "".join(PAGES.values())
    for name in readme.BLOCKS:
        assert everything.count(f"<!-- block {name} -->") == 1


def test_an_unknown_block_is_refused():
    with pytest.raises(ValueError, match=r"block must be one of .* got 'nothing'"):
        readme.render("<!-- block nothing -->\n<!-- end -->")


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


@pytest.mark.parametrize("name", PAGES)
def test_links_resolve(name):
    for link in LINK.findall(PAGES[name]):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = ((readme.ROOT / name).parent / path).resolve() if path else readme.ROOT / name
        assert target.exists(), f"{name} links to {link}"
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), f"{name} links to {link}"


def test_the_index_lists_every_page():
    listed = set(LINK.findall(PAGES["docs/index.md"]))
    others = {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")}
    assert others - {"index.md"} <= listed, f"docs/index.md lacks {sorted(others - listed)}"


def test_the_index_of_the_results_lists_every_page():
    folder = "experiments/results/"
    listed = set(LINK.findall(PAGES[f"{folder}README.md"]))
    others = {name.removeprefix(folder) for name in PAGES if name.startswith(folder)}
    assert others - {"README.md"} <= listed, f"it lacks {sorted(others - listed)}"


@pytest.mark.parametrize("name", PAGES)
def test_every_python_block_is_a_doctest(name):
    for block in re.findall(r"^```python\n(.*?)^```", PAGES[name], re.DOTALL | re.M):
        assert block.startswith(">>> "), f"{name} has an example that is not tested:\n{block}"
        assert block.endswith("\n\n"), f"{name} needs an empty line after the example:\n{block}"


def test_the_commands_that_scripts_run_are_there():
    commands = re.findall(r"^python3 -m venv .* -m (\S+)$", PAGES["README.md"], re.M)
    assert commands == ["experiments.quickstart", "pytest"]


def test_committed_rows_show_the_papers_claims():
    """OrLoMo's training loss is the lowest, at about half the time of PRSGDm."""
    rows = records.read(readme.RESULTS / "quickstart" / "runs.jsonl")
    best = quickstart.best_runs(rows)
    mean = lambda name, metric: sum(r[metric] for r in best[name]) / len(best[name])  # noqa: E731
    losses = {name: mean(name, "train_loss") for name in best}
    assert losses["orlomo"] == min(losses.values())
    assert losses["local_ormo_da"] > 3 * losses["al_sgd"]
    assert mean("orlomo", "virtual_time") < 0.6 * mean("prsgdm", "virtual_time")
