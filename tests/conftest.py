"""Two CPU devices on every machine; compiled programs are shared, and dropped in time."""

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest

COUNT = pytest.StashKey[int]()  # of the tests that a process has run

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
# The CUDA plugin compiles without a GPU, but asks libraries for versions that then do not answer.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Let all processes of this run share what one of them has compiled; the next starts anew.

    A fourth of the run's compiling is of programs that another test or process has compiled.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # the user's, or of the process that began
        return
    folder = tempfile.TemporaryDirectory(prefix="orlomo-jax-compiled-")
    config.add_cleanup(folder.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


SLOW_PAGES = ("docs/", "orlomo_jax/testing.py", "orlomo_jax/recording/sweep_progress.py")
"""Examples that run with the slow tests."""

MANY_MAPS = 30_000
"""Memory maps of a process from which on its compiled programs are dropped.

Linux allows 65,530. Each program that XLA compiles for a CPU takes a few, and a process without a
free one crashes.
"""


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Drop the compiled programs before the process has too many memory maps."""
    item.config.stash[COUNT] = count = item.config.stash.get(COUNT, 0) + 1
    maps = Path("/proc/self/maps")
    if count % 10 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        import jax  # not at the top: the environment above comes first

        jax.clear_caches()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the tests of programs for GPUs without JAX's CUDA plugin."""
    if collection_path.name != "test_gpu_programs.py" or importlib.util.find_spec("jax_plugins"):
        return None
    return True


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long examples and the tests of exact rules with the slow tests."""
    names = ("buffer_rules", "buffer_rules_input", "equal_momentum_rules", "momentum_rules")
    exact = tuple(f"tests/rules/test_{name}" for name in (*names, "momentum_rules_input"))
    for item in items:
        is_exact = item.nodeid.startswith(exact) and "bad" not in item.nodeid
        if is_exact or item.nodeid.startswith(SLOW_PAGES):
            item.add_marker(pytest.mark.slow)
