"""One virtual environment per SDK version, under build/sdk/: made once, and used again until its requirements change.

The SDKs are what their publishers put on PyPI. An environment sees the project's own site-packages through a `.pth`
file, so that torch, transformers and numpy are not installed six times; what it installs itself comes first. Our own
`mint` and `mint_engine` are not importable there: the editable install hides behind a `.pth` of its own, and Python
does not follow one `.pth` from another.

    python tests/sdk/environments.py            # makes all of them
    build/sdk/tinker-0.38.0/bin/tinker --help
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).parent / "requirements"
ROOT = REPOSITORY / "build" / "sdk"

# Run in a new environment: the SDK is there, and ours is not.
_CHECK = """
import importlib.util, sys
import tinker
for name in ("mint_engine", *sys.argv[1:]):
    assert importlib.util.find_spec(name) is None, f"{name} of this project is importable in {sys.prefix}"
"""


@dataclass(frozen=True)
class Environment:
    """A made environment: its name and its directory."""

    name: str
    directory: Path

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    @property
    def tinker(self) -> Path:
        """The SDK's command line."""
        return self.directory / "bin" / "tinker"


def names() -> list[str]:
    """Every environment there is a requirements file for."""
    return sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))


def environment(name: str) -> Environment:
    """The environment `name`, made now if it is not there yet or its requirements have changed."""
    made = Environment(name, ROOT / name)
    with _locked(ROOT / f"{name}.lock"):
        stamp, wanted = made.directory / "requirements.sha256", _fingerprint(name)
        if not stamp.exists() or stamp.read_text() != wanted:
            _make(made)
            stamp.write_text(wanted)
    return made


def _requirements(name: str) -> Path:
    return REQUIREMENTS / f"{name}.txt"


def _fingerprint(name: str) -> str:
    """Of everything an environment depends on; `sys.prefix` because the `.pth` names it."""
    parts = [sys.version, sys.prefix, _requirements(name).read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _make(made: Environment) -> None:
    _run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(made.directory))
    paths = {key: sysconfig.get_path(key, vars={"base": str(made.directory)}) for key in ("purelib", "platlib")}
    shared = dict.fromkeys(sysconfig.get_path(key) for key in ("purelib", "platlib"))
    Path(paths["purelib"], "project.pth").write_text("".join(f"{path}\n" for path in shared))
    # The files name all that is wanted, with versions. Most of it is never imported, so nothing is compiled.
    pip = [sys.executable, "-m", "pip", "--python", str(made.python), "install", "--quiet", "--no-compile", "--no-deps"]
    _run(*pip, "--requirement", str(_requirements(made.name)))
    ours = [] if made.name.startswith("mindlab") else ["mint"]  # mindlab-toolkit's package has the name of ours
    _run(str(made.python), "-c", _CHECK, *ours)


def _run(*command: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    for name in sys.argv[1:] or names():
        print(environment(name).directory)
