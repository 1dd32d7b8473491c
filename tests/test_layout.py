"""The shape of the code: which way imports point, and what the top level holds."""

import ast
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import orlomo_jax

ROOT = Path(__file__).parent.parent
# Each room may import what stands before it.
ORDER = (
    "checks",
    "fingerprint",
    "locks",
    "memo",
    "order",
    "trace",
    "arrivals",
    "books",
    "plan",
    "rules",
    "masks",
    "worker",
    "workload",
    "methods",
    "arrays",
    "buffers",
    "reports",
    "state",
    "step",
    "identity",
    "schedules",
    "server",
    "audit",
    "narrow",
    "pure",
    "health",
    "history",
    "callbacks",
    "journal",
    "recorder",
    "compiled",
    "eager",
    "engine",
    "together",
    "checkpoint",
    "saving",
    "interrupts",
    "simulator",
    "runtimes",
    "adapters",
)
# Used by the experiments before it is public.
INTERNAL = {"simulator", "simulator.RunStart", "simulator.simulate_together"}
INSPECTS = (
    "experiments/gpu_programs/training.py"  # compiles the simulator's program without running it
)
NUMPY_ONLY = ("checks", "order", "trace", "arrivals", "books", "plan")


def imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    """All modules that a file imports, by dotted name; those in functions too unless told."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if at_import_time else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(ROOT / "orlomo_jax").parts[0].removesuffix(".py")


LIBRARY = [p for p in sorted((ROOT / "orlomo_jax").rglob("*.py")) if p.parent.name != "__pycache__"]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    if room(path) == "__init__":
        return
    assert room(path) in ORDER, "a new room: give it its place in ORDER"
    for name in imports(path):
        if name.startswith("orlomo_jax.") and (other := name.split(".")[1]) in ORDER:
            assert ORDER.index(other) <= ORDER.index(room(path)), f"{path.name} imports {name}"


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_arrivals_need_numpy_alone(name):
    foreign = {module.split(".")[0] for module in imports(ROOT / "orlomo_jax" / f"{name}.py")}
    assert foreign - set(sys.stdlib_module_names) <= {"numpy", "orlomo_jax"}


def test_the_library_needs_jax_optax_and_numpy_alone():
    foreign = set()
    for path in LIBRARY:
        foreign |= {module.split(".")[0] for module in imports(path, at_import_time=True)}
    assert foreign - set(sys.stdlib_module_names) <= {"jax", "optax", "numpy", "orlomo_jax"}


@pytest.mark.parametrize("package", ["experiments", "proofs_check"])
def test_others_import_the_public_api_only(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        if path == ROOT / INSPECTS:
            continue
        for name in imports(path):
            if name.split(".")[0] == "orlomo_jax":
                public = name.removeprefix("orlomo_jax").removeprefix(".")
                known = {"", *INTERNAL, *orlomo_jax.__all__}
                assert public in known, f"{path} imports {name}"


def test_public_names_are_sorted_documented_and_there():
    assert len(set(orlomo_jax.__all__)) == len(orlomo_jax.__all__)
    for name in orlomo_jax.__all__:
        assert getattr(orlomo_jax, name).__doc__, name


def test_import_leaves_x64_off_and_loads_no_extra():
    code = (
        "import sys, orlomo_jax, jax; assert not jax.config.jax_enable_x64; "
        "extras = {'ray', 'flax', 'orbax', 'sympy', 'hypothesis', 'matplotlib', 'rich', 'tyro'}; "
        "print(sorted(extras & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def with_dependencies(*names: str) -> set[str]:
    """Return installed packages and all that they need, their names in lower case with hyphens."""
    found, todo = set(), [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        for extra in {"", *requirement.extras} - {e for n, e in found if n == requirement.name}:
            found.add((requirement.name, extra))
            try:
                needs = [Requirement(line) for line in requires(requirement.name) or ()]
            except PackageNotFoundError:  # of another platform
                continue
            todo += [r for r in needs if r.marker is None or r.marker.evaluate({"extra": extra})]
    return {name.lower().replace("_", "-") for name, _ in found}


FEW_PACKAGES = """
import importlib
import sys

sys.modules |= dict.fromkeys(sys.argv[1:])  # their import raises

from experiments import data, decoded

for name in ("train", "reproduce", "benchmarks.__main__", "prepare"):
    module = importlib.import_module(f"experiments.{name}")
    try:
        module.main(["--help"])
    except SystemExit as end:
        assert end.code == 0, name
for function in (data.digits, decoded.need_tfds):
    try:
        function()
    except decoded.DataError as error:
        print(error)
"""


def test_the_main_commands_start_with_few_packages():
    packages = with_dependencies("jax", "flax", "optax", "orbax-checkpoint", "tyro", "rich")
    foreign = [
        module
        for module, owners in packages_distributions().items()
        if not (packages | {"orlomo-jax"}) & {name.lower().replace("_", "-") for name in owners}
    ]
    assert {"PIL", "tensorflow_datasets", "array_record", "sklearn", "ray"} <= set(foreign)
    command = [sys.executable, "-c", FEW_PACKAGES, *foreign]
    run = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for command in ("train", "reproduce", "benchmarks", "prepare"):
        assert f"usage: python -m experiments.{command}" in run.stdout
    digits, tfds = run.stdout.splitlines()[-2:]
    assert digits.startswith("the data set digits needs scikit-learn")
    assert tfds.startswith("a TFDS data set needs tensorflow-datasets, array_record and Pillow")
    assert all(line.endswith(": pip install 'orlomo-jax[experiments]'") for line in (digits, tfds))
