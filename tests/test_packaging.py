"""What is packed: a wheel has what programs and type checkers need, a source distribution what its commands need."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked source distribution, made of a copy in which an extension has been built."""
    out = tmp_path_factory.mktemp("dist")
    strange = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "build", "*.egg-info", "*.so", "*.pyc")
    shutil.copytree(ROOT, out / "copy", ignore=strange, symlinks=True)
    (out / "copy" / "mint_engine" / "_native.so").touch()
    run("sdist", "--dist-dir", str(out), cwd=out / "copy")
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out / "unpacked", filter="data")
    return next((out / "unpacked").iterdir())


def run(*arguments: str, cwd: Path) -> None:
    command = [sys.executable, "setup.py", "-q", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_source_distribution_is_the_repository(source: Path) -> None:
    folders = ("benchmarks", "csrc", "docs", "examples", "kernels", "mint", "mint_engine", "tests")
    here = {f"{folder}/{name}" for folder in folders for name in names(ROOT / folder)}
    here |= {"README.md", "CONTRIBUTING.md", "NOTES.md", "LICENSE", "Makefile", "constraints.txt", "setup.py"}
    built = {name for name in here if "__pycache__" in name or name.endswith(".so") or "/." in name}
    linked = {name for name in here if name.startswith("mint_engine/kernels/")}
    packed = names(source)
    assert here - built - linked <= packed
    assert not {name for name in packed if name.endswith((".so", ".pyc")) or name.startswith("mint_engine/kernels/")}


def test_what_it_installs_is_python_plans_messages_and_the_mark_that_it_is_typed(source: Path, tmp_path: Path) -> None:
    run("build_py", "--build-lib", str(tmp_path), cwd=source)
    other = {name for name in names(tmp_path) if not name.endswith(".py")}
    plans = {f"mint_engine/kernels/plans/{path.name}" for path in (ROOT / "kernels" / "plans").glob("*.json")}
    messages = {"mint_engine/wire/messages.proto", "mint_engine/wire/messages.bin"}
    assert plans
    assert other == {"mint/py.typed", "mint_engine/py.typed", *plans, *messages}
    assert {"mint/__init__.py", "mint_engine/kernels/attention/__init__.py"} <= names(tmp_path)
