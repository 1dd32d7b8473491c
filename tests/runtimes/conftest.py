"""One local Ray cluster for all tests of a process."""

import pytest
import ray


@pytest.fixture(scope="session")
def cluster():
    """A cluster with a CPU for each of the toy problem's workers."""
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
