"""What is shipped, and how the modules may depend on each other."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("pipeline", "flows")
    for path in sorted((ROOT / package).rglob("*.py"))
}
TORCH = {"torch", "transformers", "peft", "tokenizers", "safetensors"}
READING = ("ledger", "versions", "verify", "history", "report", "submit", "intake", "vault", "runs", "workspace")
"""The side that an audit, or whoever takes notices in, starts: without torch."""


def imported(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Every name that a module imports, as ``package.module``; imports under TYPE_CHECKING do not run."""
    tree = ast.parse(path.read_text())
    nodes = list(tree.body) if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph(top_level_only: bool = False) -> dict[str, set[str]]:
    """Module → modules of ours that it imports."""
    return {m: {i for i in imported(p, top_level_only) if i in MODULES and i != m} for m, p in MODULES.items()}


def reachable(start: str) -> set[str]:
    """Everything that importing a module imports, ours and foreign, by walking its top-level imports."""
    found, waiting = set[str](), [start]
    while waiting:
        for name in imported(MODULES[waiting.pop()], top_level_only=True):
            if name in MODULES and name not in found:
                waiting.append(name)
            found.add(name)
    return found


def test_pipeline_knows_neither_flows_nor_prefect() -> None:
    for module, path in MODULES.items():
        if module.startswith("pipeline"):
            assert not [i for i in imported(path) if i.split(".")[0] in ("flows", "prefect")], module


@pytest.mark.parametrize("name", READING)
def test_reading_side_does_not_import_torch(name: str) -> None:
    assert not [i for i in reachable(f"pipeline.{name}") if i.split(".")[0] in TORCH]


def test_no_import_cycles() -> None:
    edges = graph()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(edges[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_nothing_but_declared_dependencies_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *extras["parquet"], *extras["redis"]]
    declared = {re.split(r"[\[<>=~! ]", d)[0].replace("-", "_") for d in named}
    # Parts of declared ones: tokenizers and huggingface_hub of transformers, markupsafe of jinja2, uvicorn of prefect.
    parts = {"tokenizers", "huggingface_hub", "markupsafe", "uvicorn"}
    known = declared | set(sys.stdlib_module_names) | parts | {"pipeline", "flows"}
    known |= {"pydantic_core"}
    # Extras that are imported only where a setting asks for them; without them that is told.
    clusters = {"prefect_dask", "distributed", "prefect_ray", "ray"}  # the second and fourth come with the others
    known |= clusters if {"dask", "ray"} <= project["optional-dependencies"].keys() else set()
    for module, path in MODULES.items():
        foreign = {i.split(".")[0] for i in imported(path)} - known
        assert not foreign, module


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes, and the public methods of those classes."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{node.name}.")


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree), module
    # Methods and properties of one line may speak for themselves; functions and classes may not.
    missing = [n for n, node in public(tree.body) if "." not in n and not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert not missing


def test_distribution_owns_both_import_names() -> None:
    owners = importlib.metadata.packages_distributions()
    for name in ("pipeline", "flows"):
        assert set(owners.get(name, [])) <= {"takedown-pipeline"}


@pytest.mark.slow
def test_wheel_holds_the_two_packages_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copyfile(ROOT / name, source / name)
    for name in ("pipeline", "flows", "takedowns", "tests"):  # data and tests lie beside them, and must stay out
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "-w", tmp_path, source], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        info = {n.split("/", 1)[1]: archive.read(n).decode() for n in archive.namelist() if ".dist-info/" in n}
    expected = {str(p.relative_to(ROOT)) for p in MODULES.values()} | {"pipeline/py.typed"}
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "pipeline" / "templates").glob("*.html")}
    assert names == expected
    assert "takedown = flows.cli:main" in info["entry_points.txt"]
    assert "licenses/LICENSE" in info
