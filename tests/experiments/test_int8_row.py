"""The benchmark of reports in int8."""

import pytest

from experiments.benchmarks import runtimes


@pytest.mark.slow
def test_a_report_in_int8_takes_about_a_quarter():
    (row,) = runtimes.int8_reports(1)
    assert row.bar is not None
    assert row.bar <= row.ratio < 4
    assert row.figure < row.limit
