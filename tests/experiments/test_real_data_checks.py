"""The commands that judge a run on real data, here on digits and on images made up."""

from contextlib import nullcontext

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import against_optax, merged_statistics
from experiments.config import Run
from experiments.data import datasets


def made_up(name="cifar10", *_, **__) -> datasets.Dataset:
    """Ten classes of 8×8 images, each a colour of its own under noise."""
    rng = np.random.default_rng(0)
    colours = rng.uniform(0, 255, (10, 1, 1, 3))

    def split(count):
        labels = rng.integers(0, 10, count)
        images = 0.5 * colours[labels] + 0.5 * rng.uniform(0, 255, (count, 8, 8, 3))
        return datasets.Split(jnp.asarray(images, jnp.uint8), jnp.asarray(labels, jnp.int32))

    return datasets.Dataset(name, split(2000), split(500), 10, (0.5,) * 3, (0.25,) * 3, padding=0)


@pytest.fixture
def images(monkeypatch, tmp_path):
    """A data_dir of its own, since parts are cached by data_dir."""
    monkeypatch.setattr(datasets, "load", made_up)
    return tmp_path


class TestAgainstOptax:
    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["orlomo", "al_sgd"])
    def test_one_worker_with_one_step_is_optax(self, method):
        run = Run(method, "mlp", "digits", workers=1, local_iterations=1, batch_size=32, epochs=1)
        found = against_optax.compare(run, evaluations=1)
        assert found.simulated.keys() == found.plain.keys() == {44}
        ours, theirs = found.simulated[44], found.plain[44]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["train_loss"] < 2  # it learns: 2.3 at the start
        assert found.distance < 1e-5

    @pytest.mark.slow
    def test_another_momentum_is_seen(self, monkeypatch):
        run = Run(model="mlp", dataset="digits", workers=1, local_iterations=1, epochs=1)
        plain = optax.trace
        monkeypatch.setattr(against_optax.optax, "trace", lambda _: plain(0.8))
        assert against_optax.compare(run).distance > 0.01

    @pytest.mark.parametrize(
        ("accuracy", "controls", "fails"),
        [
            (90.5, (90.1,), True),  # 0.45 from the mean; 3 σ are 0.21
            (90.5, (91.0, 89.0), False),  # 3 σ are 3
            (93.5, (91.0, 89.0), True),
            (90.15, (90.0, 90.0), False),  # within the tolerance
        ],
    )
    def test_more_than_rounding_does_fails_the_command(
        self, monkeypatch, capsys, accuracy, controls, fails
    ):
        sides = [{7: {"test_accuracy": a, "train_loss": 0.1}} for a in (accuracy, 90.0, *controls)]
        ours, plain, *controls = sides
        comparison = against_optax.Comparison(ours, plain, controls, distance=1e-6)
        monkeypatch.setattr(against_optax, "compare", lambda *_: comparison)
        with pytest.raises(SystemExit, match="the accuracy differs") if fails else nullcontext():
            against_optax.main([])
        assert f"step 7: test accuracy {accuracy:.2f} % simulated" in capsys.readouterr().out

    def test_several_workers_have_no_counterpart(self, capsys):
        with pytest.raises(SystemExit) as error:
            against_optax.main(["--workers", "2"])
        shown = f"{error.value} {capsys.readouterr().err}"  # newer versions of tyro print it
        assert "got workers=2, local_iterations=1" in " ".join(shown.split())


@pytest.mark.slow
def test_merged_statistics_are_as_good_as_recomputed_ones(images):
    """Without the merge the accuracy collapses."""
    run = Run(
        model="resnet8",
        width=0.25,
        workers=4,
        local_iterations=4,
        batch_size=20,
        epochs=6,
        learning_rate=0.1,
    )
    found = merged_statistics.accuracies(run, images)
    assert found["recomputed"] > 85
    assert abs(found["merged"] - found["recomputed"]) < 2  # 500 images: 0.5 would be two of them
    assert found["initial"] < 50
