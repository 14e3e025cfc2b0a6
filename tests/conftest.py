"""Tests run quietly, offline and away from the user's own ~/.mint-engine."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# How long an example takes on a busy machine says nothing.
settings.register_profile("mint-engine", deadline=None)
settings.load_profile("mint-engine")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton decides when it is imported. Where there is no GPU its kernels are interpreted, by the tests that ask for them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def _homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Places for fresh homes, not made: a disk takes half a minute to remove thousands of empty directories."""
    directory = tmp_path_factory.mktemp("homes")
    return (directory / str(i) for i in itertools.count())


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, _homes: Iterator[Path]) -> Iterator[None]:
    """No MINT_* variable of the developer reaches a test; MINT_HOME is fresh, and its engine ends with it."""
    for name in [n for n in os.environ if n.startswith("MINT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MINT_HOME", str(next(_homes)))
    yield
    if (module := sys.modules.get("mint_engine.engine")) is not None:
        module.close_engines()


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with tied embeddings: QK-norm, GQA, and the head adapter on a shared weight."""
    from tiny_models import build_tiny

    return build_tiny("qwen3", tmp_path_factory.mktemp("tiny-tied"), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def smollm2_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory that has smollm2-135m, converted by the first process of this run that wants it."""
    from mint_engine.models.gguf import smollm2_directory

    run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # it has a directory of its own within that of the run
        run = run.parent
    home = tmp_path_factory.mktemp("smollm2-home")
    (home / "models").symlink_to(smollm2_directory(run / "smollm2").parent, target_is_directory=True)
    return home


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the Triton kernels that "meta" tensors are given to: counted, and left out."""
    from triton.runtime.interpreter import InterpretedFunction

    from mint_engine.kernels import triton_common

    names: list[str] = []

    def getitem(self: Any, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: names.append(self.fn.__name__)

    monkeypatch.setattr(InterpretedFunction, "__getitem__", getitem)
    monkeypatch.setattr(triton_common, "DEVICES", {"meta"})
    return names
