"""The command of the language experiment: rows, samples, resuming, real workers, errors."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import experiments.language.__main__ as command
from experiments import records
from experiments.language.model import SIZES, network
from experiments.language.sample import Samples, drawing, printable, sample
from orlomo_jax import StepRecord

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """A short run on twenty small files."""
    folder: Path = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"def f{number}(x):\n    return x\n" * 5)
    more = "--size tiny --local-steps 4 --num-reports 40 --batch-size 4 --evaluate-every 10"
    return ["--text", str(folder), *more.split(), "--sample-length", "12"]


def results(row):
    return {key: value for key, value in row.items() if key not in ("wall_time", "environment")}


@pytest.mark.slow
def test_a_run_shows_samples_and_writes_its_row(tmp_path, capsys, flags):
    output = tmp_path / "runs.jsonl"
    logs = tmp_path / "logs"
    command.main([*flags, "--output", str(output), "--tensorboard", str(logs), "--prompt", "fed "])
    (row,) = records.read(output)
    assert row["status"] == "finished"
    assert row["language"]["local_steps"] == "4"
    assert row["curve"]["step"] == [10, 20, 30, 40]
    assert row["curve"]["tokens"] == [step * 4 * 4 * TINY.context for step in (10, 20, 30, 40)]
    assert row["tokens"] == row["curve"]["tokens"][-1]
    assert row["loss"] == row["curve"]["loss"][-1] < row["curve"]["loss"][0] - 0.2
    assert row["perplexity"] == pytest.approx(np.exp(row["loss"]), rel=1e-4)
    assert row["num_parameters"] == TINY.num_parameters
    shown = capsys.readouterr().out
    assert shown.count("\nfed ") == 4
    assert f"report 40 of 40: held-out loss {row['loss']:.3f} nats per byte" in shown
    assert list(logs.glob("events*"))


@pytest.mark.slow
def test_a_resumed_run_is_the_unbroken_one(tmp_path, monkeypatch, flags):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    command.main([*flags, "--output", str(whole)])
    resumable = [*flags, "--output", str(broken), "--checkpoint-dir", str(tmp_path / "c")]
    resumable += ["--checkpoint-every", "10"]

    def interrupted(self, record):
        if record.step > 25:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Samples, "on_step", interrupted)
        with pytest.raises(SystemExit, match="--resume continues"):
            command.main(resumable)
    assert not broken.exists()
    with pytest.raises(SystemExit, match="holds checkpoints: add --resume"):
        command.main(resumable)
    with pytest.raises(SystemExit, match=r"run\.json is of a run with another clip"):
        command.main([*resumable, "--resume", "--clip", "2"])
    command.main([*resumable, "--resume"])
    (row,) = records.read(broken)
    assert results(row) == results(records.read(whole)[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ordered_outer_momentum", "orlomo"])
def test_threads_train_too(tmp_path, flags, method):
    output = tmp_path / "runs.jsonl"
    more = ["--runtime", "threads", "--server-learning-rate", "0.9", "--method", method]
    command.main([*flags, *more, "--local-steps", "dynamic:4", "--output", str(output)])
    (row,) = records.read(output)
    assert row["status"] == "finished"
    assert row["local_steps"] == [4, 2, 1, 1]
    assert row["health"]["rejected"] == {}
    assert row["curve"]["loss"][-1] < row["curve"]["loss"][0]
    assert "real_time" in row["curve"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume"], "--resume needs --checkpoint-dir"),
        (["--evaluate-every", "0"], "--evaluate-every must be ≥ 1, got 0"),
        (["--sample-length", "-1"], "--sample-length must be ≥ 0, got -1"),
        (["--temperature", "0"], "--temperature must be > 0, got 0"),
        (["--prompt", ""], "--prompt must have a character or more"),
        (["--text", "/nowhere"], "`text` must name files or folders that exist, got /nowhere"),
        (["--workers", "3"], "`workers` must be 4 for the cluster 'forgather_4to1'"),
        (["--shards", "disjoint", "--speeds", *["1"] * 500], "at least context"),
        (["--checkpoint-dir", "new", "--checkpoint-every", "0"], "`every` must be ≥ 1"),
        (["--output", "."], "cannot be written"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, flags, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        command.main([*flags, "--output", "runs.jsonl", *more])
    assert not (tmp_path / "runs.jsonl").exists()


def test_without_ray_the_error_names_the_extra(tmp_path, monkeypatch, flags):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r"pip install 'orlomo-jax\[ray\]'"):
        command.main([*flags, "--runtime", "ray", "--output", str(tmp_path / "runs.jsonl")])


def test_a_bad_setting_of_the_run_is_a_sentence_without_a_traceback(tmp_path, capsys, flags):
    with pytest.raises(SystemExit):
        command.main([*flags, "--num-reports", "0", "--output", str(tmp_path / "runs.jsonl")])
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "`num_reports` must be an integer ≥ 1, got num_reports=0" in shown
    assert "Traceback" not in shown


def test_a_cold_sample_takes_the_likeliest_byte_of_each_window():
    model = network(TINY)
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
    text = b"abc"
    for _ in range(10):  # beyond the context of 8
        seen = text[-TINY.context :]
        window = np.frombuffer(seen.ljust(TINY.context), np.uint8)[None]
        text += bytes([int(model.logits(params, window)[0, len(seen) - 1].argmax())])
    key = jax.random.key(0)
    drawn = sample(model, TINY.context, params, b"abc", 10, key, temperature=1e-6)
    assert b"abc" + drawn == text


def test_samples_depend_on_the_key_only():
    model = network(TINY)
    params = model.init(jax.random.key(0))
    one, again, other = (drawing(model, 8, b"ab", 20, 1.0, seed)(params) for seed in (0, 0, 1))
    assert one == again != other
    assert len(one) == 20


def test_bad_samples():
    for prompt, length, temperature in ((b"", 1, 1.0), (b"a", 0, 1.0), (b"a", 1, 0.0)):
        with pytest.raises(ValueError, match="`prompt` must not be empty, `length` ≥ 1 and"):
            sample(network(TINY), 8, {}, prompt, length, jax.random.key(0), temperature)


def test_a_sample_is_shown_with_its_evaluation():
    shown = []
    samples = Samples(
        lambda params, _: {"loss": params},
        lambda params: b"%d\0" % params,
        lambda *x: shown.append(x),
    )
    assert samples.evaluate(3, None) == {"loss": 3}
    for evaluation in (None, {"loss": 3.0}):
        samples.on_step(StepRecord(7, 0.0, 0, 0, 0.0, {}, evaluation))
    assert shown == [(7, {"loss": 3.0}, "3·")]


def test_bytes_that_are_not_text_are_dots():
    assert printable("aé\n\t".encode() + b"\x1b\xff\0") == "aé\n\t···"
