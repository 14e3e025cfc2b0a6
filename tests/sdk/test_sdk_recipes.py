"""Programs written for Tinker and for MinT, on SmolLM2-135M: they run as they are, and they learn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environments
import numpy as np
import pytest
import serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(home: Path) -> Path:
    """The model's directory: clients take the tokenizer from there, as they would from the hub."""
    from mint_engine.models.gguf import smollm2_directory

    return smollm2_directory(home)


@pytest.fixture(scope="module")
def home(smollm2_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the converted model, and a store of its own: the keys are not to lock other tests out."""
    own = tmp_path_factory.mktemp("recipes-home")
    (own / "models").symlink_to(smollm2_home / "models", target_is_directory=True)
    return own


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[serving.Server]:
    """In bfloat16, as by default."""
    with serving.serve(home, "smollm2-135m", "--kv-cache-bytes", str(1 << 30)) as server:
        yield server


@pytest.fixture(scope="module")
def float32_server(home: Path) -> Iterator[serving.Server]:
    flags = ("--dtype", "float32", "--kv-cache-bytes", str(1 << 30))
    with serving.serve(home, "smollm2-135m", *flags) as server:
        yield server


def cookbook(job: str, out: Path, server: serving.Server, model: Path) -> list[dict[str, Any]]:
    """The metrics that a cookbook loop logged, one dict a step."""
    environment = environments.environment("tinker-cookbook-0.6.1")
    serving.drive(environment, "cookbook", out, server, str(model), job)
    lines = (out / job / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def logged(metrics: list[dict[str, Any]], name: str) -> list[float]:
    return [step[name] for step in metrics if name in step]


def test_cookbook_supervised_nll_falls_by_a_third(server, smollm2, tmp_path):
    nll = logged(cookbook("sft", tmp_path, server, smollm2), "train_mean_nll")
    assert len(nll) == 12
    assert np.mean(nll[-3:]) < 2 / 3 * np.mean(nll[:3]), nll


def test_cookbook_reinforcement_learning_starts_on_policy(float32_server, smollm2, tmp_path):
    """What the sampler said is what the trainer says. (In bfloat16 two roundings of a log-probability are about 0.04
    apart, so that the mean over a few hundred tokens, which is what the cookbook calls KL v1, is noise of 0.003.)"""
    metrics = cookbook("rl-ppo", tmp_path, float32_server, smollm2)
    assert len(logged(metrics, "env/all/reward/total")) == 3, metrics
    for version in ("v1", "v2"):
        kl = logged(metrics, f"optim/kl_sample_train_{version}")
        assert abs(kl[0]) < 1e-4, (version, kl)


def test_cookbook_dpo_learns_to_prefer(server, smollm2, tmp_path):
    metrics = cookbook("dpo", tmp_path, server, smollm2)
    losses = logged(metrics, "dpo_loss")
    assert len(losses) == 6
    assert losses[0] == pytest.approx(np.log(2), abs=0.02)  # the policy is its own reference at first
    assert losses[-1] < losses[0] - 0.1, losses
    assert logged(metrics, "margin")[-1] > 0


def test_mint_quickstart(server, smollm2, tmp_path):
    environment = environments.environment("mindlab-toolkit-0.2.0")
    report = serving.drive(environment, "quickstart", tmp_path, server, str(smollm2))
    assert not report["failures"], "\n".join(report["failures"])
    values = report["values"]
    assert (len(values["losses"]), len(values["rewards"])) == (10, 5)
    assert values["losses"][-1] < 2 / 3 * values["losses"][0], values["losses"]
    assert all(values["finite"])
    assert sum(values["advantages"]) > 25, values["advantages"]  # of 160 samples, those that were trained on
    assert values["final checkpoint"].endswith("/weights/quickstart-rl-final")
