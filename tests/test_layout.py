"""The shape of the code: which way imports point, and what the top level holds."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import typing
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import orlomo_jax

ROOT = Path(__file__).parent.parent
# A package may import the levels before its own.
LEVELS = (
    {"checks", "jax_settings", "memo"},
    {"trees", "traces"},
    {"rules"},
    {"worker"},
    {"methods"},
    {"server"},
    {"recording"},
    {"simulation", "runtimes"},
    {"adapters", "inspect", "testing"},
)
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
PUBLIC_MODULES = {"testing", "trees"}  # the others are read through their packages
INSPECTS = (
    "experiments/gpu_programs/training.py"  # compiles the simulator's program without running it
)


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


def package_of(path: Path) -> str:
    return path.relative_to(ROOT / "orlomo_jax").parts[0].removesuffix(".py")


LIBRARY = [p for p in sorted((ROOT / "orlomo_jax").rglob("*.py")) if p.parent.name != "__pycache__"]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    if (package := package_of(path)) == "__init__":
        return
    for name in imports(path):
        if name.startswith("orlomo_jax.") and (other := name.split(".")[1]) in LEVEL:
            allowed = other == package or LEVEL[other] < LEVEL[package]
            assert allowed, f"{path.name} imports {name}"


def test_the_version_has_one_place():
    assert orlomo_jax.__version__ == version("orlomo-jax")
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text("utf-8"), re.M)
    code = (ROOT / "orlomo_jax" / "__init__.py").read_text("utf-8")
    assert not re.search(r"__version__ = [\"'][\d.]+", code)


def test_traces_need_numpy_alone():
    for path in (ROOT / "orlomo_jax" / "traces").glob("*.py"):
        foreign = {module.split(".")[0] for module in imports(path)}
        assert foreign - set(sys.stdlib_module_names) <= {"numpy", "orlomo_jax"}


@pytest.mark.parametrize("folder", ["orlomo_jax", "proofs_check", "experiments", "tests"])
def test_no_private_name_is_imported(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module != "__future__":
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{path} imports {private}"


def test_files_are_short():
    for path in LIBRARY:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, path


def test_the_library_needs_jax_optax_and_numpy_alone():
    foreign = set()
    for path in LIBRARY:
        foreign |= {module.split(".")[0] for module in imports(path, at_import_time=True)}
    assert foreign - set(sys.stdlib_module_names) <= {"jax", "optax", "numpy", "orlomo_jax"}


@pytest.mark.parametrize("folder", ["experiments", "proofs_check"])
def test_others_import_the_public_api_only(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path == ROOT / INSPECTS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orlomo_")):
                continue
            _, _, module = node.module.partition(".")
            names = {alias.name for alias in node.names}
            if not module:
                assert names <= set(orlomo_jax.__all__), f"{path} imports {names}"
            elif module not in PUBLIC_MODULES:
                assert module in LEVEL, f"{path} imports orlomo_jax.{module}"
                assert names <= set(dir(importlib.import_module(node.module))), (path, names)


def test_public_names_are_sorted_documented_and_there():
    assert orlomo_jax.__all__ == sorted(set(orlomo_jax.__all__))
    assert len(orlomo_jax.__all__) < 45
    for name in orlomo_jax.__all__:
        assert getattr(orlomo_jax, name).__doc__, name


@pytest.mark.parametrize("package", sorted(set(LEVEL) - {"checks", "memo"}))
def test_type_hints_of_public_functions_can_be_read(package):
    module = importlib.import_module(f"orlomo_jax.{package}")
    for name in dir(module):
        value = getattr(module, name)
        if name.startswith("_") or not callable(value) or not hasattr(value, "__module__"):
            continue
        if value.__module__.startswith("orlomo_jax"):
            typing.get_type_hints(value)
            for method in vars(value).values() if inspect.isclass(value) else ():
                if inspect.isfunction(method):
                    typing.get_type_hints(method)


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

from experiments.data import datasets, tfds_cache

for name in ("train", "reproduce", "benchmarks.__main__", "prepare"):
    module = importlib.import_module(f"experiments.{name}")
    try:
        module.main(["--help"])
    except SystemExit as end:
        assert end.code == 0, name
for function in (datasets.digits, tfds_cache.need_tfds):
    try:
        function()
    except tfds_cache.DataError as error:
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
