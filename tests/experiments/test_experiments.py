"""The experiments: their records and the quickstart at a small size."""

import subprocess
import sys

import pytest

from experiments import quickstart, records


class TestRecords:
    def test_rows_come_back_in_order(self, tmp_path):
        path = tmp_path / "folder" / "runs.jsonl"
        assert records.read(path) == []
        for number in range(3):
            records.append(path, {"number": number, "β": 0.9})
        assert [row["number"] for row in records.read(path)] == [0, 1, 2]

    def test_a_broken_line_is_named(self, tmp_path):
        path = tmp_path / "runs.jsonl"
        path.write_text('{"a": 1}\n{"a": \n')
        with pytest.raises(ValueError, match=r"runs.jsonl:2 is not a JSON row"):
            records.read(path)
        path.write_text("[1]\n")
        with pytest.raises(ValueError, match=r"runs.jsonl:1 must be a JSON object"):
            records.read(path)

    def test_a_failed_write_leaves_the_file_as_it_was(self, tmp_path, monkeypatch):
        path = tmp_path / "runs.jsonl"
        records.append(path, {"a": 1})
        before = path.read_bytes()
        with pytest.raises(ValueError, match="JSON"):
            records.append(path, {"a": float("nan")})

        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(records.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            records.append(path, {"a": 2})
        assert path.read_bytes() == before

    @pytest.mark.parametrize(
        ("last", "rows"), [('{"trunc', [{"a": 1}]), ('{"c": 3}', [{"a": 1}, {"c": 3}])]
    )
    def test_a_last_line_without_an_end_is_a_row_where_it_is_whole(self, tmp_path, last, rows):
        path = tmp_path / "runs.jsonl"
        path.write_text('{"a": 1}\n' + last)
        assert records.read(path) == rows
        records.append(path, {"b": 2})
        assert records.read(path) == [*rows, {"b": 2}]

    def test_lines_end_at_newlines_alone(self, tmp_path):
        row = {"error": "a\u2028b\u0085c\r"}
        records.append(tmp_path / "runs.jsonl", row)
        assert records.read(tmp_path / "runs.jsonl") == [row]

    def test_a_disk_that_fills_up_within_a_row(self, tmp_path):
        path = tmp_path / "runs.jsonl"
        records.append(path, {"a": 1})
        before = path.read_bytes()
        code = (
            "import resource, sys; from pathlib import Path; from experiments import records; "
            "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 10}, -1)); "
            "records.append(Path(sys.argv[1]), {'long': 'x' * 50})"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True
        )
        assert "File too large" in run.stderr
        assert path.read_bytes() == before

    def test_several_processes_append(self, tmp_path):
        path = tmp_path / "runs.jsonl"
        code = (
            "import sys; from pathlib import Path; from experiments import records; "
            "[records.append(Path(sys.argv[1]), {'x': 'y' * 5000}) for _ in range(20)]"
        )
        command = [sys.executable, "-c", code, str(path)]
        processes = [subprocess.Popen(command) for _ in range(3)]
        assert [process.wait() for process in processes] == [0, 0, 0]
        assert len(records.read(path)) == 60


class TestQuickstart:
    @pytest.mark.slow
    def test_a_small_one(self, tmp_path, capsys):
        flags = "--workers 4 --local-iterations 4 --epochs 20 --seeds 2 --hidden 8"
        flags += " --learning-rates 0.1 1e30"
        quickstart.main([*flags.split(), "--output", str(tmp_path)])
        rows = records.read(tmp_path / "runs.jsonl")
        assert len(rows) == 4 * 2 * 2
        for row in rows:
            assert row["status"] == ("finished" if row["learning_rate"] == 0.1 else "diverged")
        asynchronous = [row for row in rows if row["method"] != "prsgdm" and row["seed"] == 0]
        same_delays = {row["virtual_time"] for row in asynchronous}
        assert len(same_delays) == 1
        assert (tmp_path / "quickstart.png").stat().st_size > 10_000
        out = capsys.readouterr().out
        for title in quickstart.TITLES.values():
            assert title in out

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--seeds 0", "`seeds` must be ≥ 1, got seeds=0"),
            ("--workers 0", "workers=0"),
            ("--local-iterations 0", "local_iterations=0"),
            ("--batch-size 0", "batch_size=0"),
            ("--learning-rates 0.1 0.1", "must be distinct and > 0"),
            ("--learning-rates -1", "must be distinct and > 0"),
            ("--epochs 1", "`epochs` must give each worker a report, got epochs=1, 1 reports"),
        ],
    )
    def test_bad_flags_leave_earlier_results_alone(self, tmp_path, flags, message, capsys):
        earlier = tmp_path / "runs.jsonl"
        earlier.write_text("{}\n")
        with pytest.raises(SystemExit) as stopped:
            quickstart.main([*flags.split(), "--output", str(tmp_path)])
        # tyro frames what the settings themselves refuse.
        assert message in str(stopped.value) + " ".join(capsys.readouterr().err.split())
        assert earlier.read_text() == "{}\n"

    @pytest.mark.slow
    def test_an_infinite_loss_of_finite_parameters_is_divergence(self, tmp_path):
        flags = "--workers 1 --batch-size 1437 --local-iterations 1 --epochs 1 --seeds 1 --hidden 8"
        flags += " --learning-rates 1e30"
        quickstart.main([*flags.split(), "--output", str(tmp_path)])
        assert {row["status"] for row in records.read(tmp_path / "runs.jsonl")} == {"diverged"}

    def test_best_rate_is_the_lowest_mean_training_loss_without_divergence(self):
        def row(rate, loss, status="finished"):
            numbers = {"test_accuracy": 90.0, "virtual_time": 1.0, "max_delay": 3}
            settings = {"method": "orlomo", "learning_rate": rate, "status": status}
            return {**settings, **numbers, "train_loss": loss}

        rows = [row(0.1, 3.0), row(0.1, 1.0), row(0.2, 1.5), row(0.2, 1.6)]
        rows += [row(0.3, 0.1), row(0.3, None, "diverged")]
        best = quickstart.best_runs(rows)
        assert {r["learning_rate"] for r in best["orlomo"]} == {0.2}
        assert best["al_sgd"] == []
        cells = list(quickstart.table(best).columns[1].cells)
        assert cells == ["0.2", "none", "none", "none"]
