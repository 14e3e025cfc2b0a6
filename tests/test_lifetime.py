"""Beginnings and ends: resuming in a new process, exits, forks, clients that are gone, closed engines."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from engine_helpers import ADAM, VOCAB, new_model, train
from helpers import make_data

from mint_engine.client import ServiceClient
from mint_engine.engine import Engine
from mint_engine.errors import EngineClosedError
from mint_engine.store import Store
from mint_engine.types import Datum, ModelInput, SamplingParams

RESUME = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = {paths!r}
from helpers import make_data
from mint_engine.client import ServiceClient
from mint_engine.engine import Engine
from mint_engine.types import AdamParams
engine = Engine(dtype="float32", home=Path(sys.argv[1]))
session = engine.create_session()
model = engine.create_model_from_state(session, sys.argv[2], optimizer=True).result()
engine.optim_step(model, AdamParams(learning_rate=1e-2)).result()
data = make_data("cross_entropy", (6, 9), 199, 0)
for _ in range(2):
    engine.forward_backward(model, data, "cross_entropy").result()
    engine.optim_step(model, AdamParams(learning_rate=1e-2)).result()
print(engine.save_weights(model, "end").result().path)
engine.close()
"""


def test_stopping_and_going_on_in_a_new_process_is_bit_equal(tiny_tied: Path, tmp_path: Path) -> None:
    """Saved between forward_backward and optim_step: weights, moments, step and pending gradients all survive."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    engine = Engine(dtype="float32", home=tmp_path, kv_cache_bytes=1 << 22)
    try:
        session = engine.create_session()
        model = new_model(engine, session, tiny_tied)
        train(engine, model, 2)
        data = make_data("cross_entropy", (6, 9), VOCAB)
        engine.forward_backward(model, data, "cross_entropy").result()
        middle = engine.save_weights(model, "middle").result().path
        engine.optim_step(model, ADAM).result()
        train(engine, model, 2)
        end = engine.save_weights(model, "end").result().path
        paths = [p for p in sys.path if p]
        done = subprocess.run(
            [sys.executable, "-c", RESUME.format(paths=paths), str(tmp_path), middle],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        resumed = done.stdout.strip().splitlines()[-1]
        for name in ("adapter_model.safetensors", "optimizer.safetensors"):
            ours, theirs = (
                safetensors.torch.load_file(engine.store.resolve(p).directory / name) for p in (end, resumed)
            )
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[k], theirs[k]) for k in ours), name
    finally:
        engine.close()
        torch.set_num_threads(threads)


def run_script(body: str, home: Path) -> subprocess.CompletedProcess:
    code = f"import sys\nsys.path[:0] = {[p for p in sys.path if p]!r}\nhome = {str(home)!r}\n{body}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def test_what_was_accepted_is_done_before_the_process_ends(tiny_tied: Path, tmp_path: Path) -> None:
    """A script whose last line is save_state(), without reading its future, leaves the checkpoint."""
    body = f"""
from pathlib import Path
from helpers import make_data
from mint_engine.client import ServiceClient
from mint_engine.engine import get_engine
from mint_engine.types import AdamParams
client = ServiceClient(engine=get_engine("float32", Path(home))).create_lora_training_client({str(tiny_tied)!r}, rank=4)
data = make_data("cross_entropy", (6, 9), 199)
for _ in range(10):
    client.forward_backward(data)
    client.optim_step(AdamParams())
client.save_state("final")
"""
    done = run_script(body, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (saved,) = Store(tmp_path).list_user_checkpoints().checkpoints
    assert saved.checkpoint_id == "weights/final"


def test_a_forked_child_is_told_at_once(tiny_tied: Path, tmp_path: Path) -> None:
    body = f"""
import os, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from helpers import make_data
from mint_engine.client import ServiceClient
from mint_engine.engine import get_engine
data = make_data("cross_entropy", (6,), 199)
mine = ServiceClient(engine=get_engine("float32", Path(home))).create_lora_training_client({str(tiny_tied)!r}, rank=4)
mine.forward(data).result()
if os.fork() == 0:
    error = mine.forward(data).future().exception(timeout=30)
    print("child:", type(error).__name__, "by 'spawn'" in str(error), flush=True)
    os._exit(0)
os.wait()
print("parent:", mine.forward(data).result().loss != 0)
"""
    done = run_script(body, tmp_path)
    assert done.stdout.splitlines() == ["child: EngineClosedError True", "parent: True"], done.stderr


def test_clients_that_are_gone_leave_no_weights_behind(tiny_tied: Path, tmp_path: Path) -> None:
    """An RL loop makes a sampler a step: their snapshots must not pile up."""
    engine = Engine(dtype="float32", home=tmp_path, kv_cache_bytes=1 << 22)
    service = ServiceClient(engine=engine)
    trainer = service.create_lora_training_client(str(tiny_tied), rank=4)
    for step in range(5):
        sampler = trainer.save_weights_and_get_sampling_client(name="latest" if step % 2 else None)
        pending = sampler.sample([1, 2], 1, SamplingParams(max_tokens=4))
    assert trainer.save_weights_for_sampler("kept").result().path
    del sampler
    gc.collect()
    assert len(pending.sequences) == 1, "a sampler that is let go finishes what was asked of it"
    assert len(engine._samplers) <= 2, "those let go since the last one was made wait for the next"
    step = trainer.optim_step(ADAM)
    del trainer
    gc.collect()
    assert step.result().metrics is not None
    other = service.create_lora_training_client(str(tiny_tied), rank=4)
    other.forward([Datum(ModelInput.from_ints([1]), {"target_tokens": [1], "weights": [1]})]).result()
    assert list(engine._models) == [other.model_id]
    assert engine._samplers == {}
    service.close()
    assert engine._models == {}
    engine.close()


def test_a_closed_engine_refuses_work_and_says_so(tiny_tied: Path, tmp_path: Path) -> None:
    engine = Engine(dtype="float32", home=tmp_path, kv_cache_bytes=1 << 22)
    session = engine.create_session()
    model = new_model(engine, session, tiny_tied)
    sampler = engine.create_sampler(session, base_model=str(tiny_tied)).result()
    waiting = [engine.forward(model, make_data("cross_entropy", (50,), VOCAB), "cross_entropy") for _ in range(20)]
    engine.close()
    for future in waiting:
        error = future.exception(timeout=5)
        assert error is None or isinstance(error, EngineClosedError)
    with pytest.raises(EngineClosedError):
        engine.optim_step(model, ADAM).result(timeout=5)
    with pytest.raises(EngineClosedError):
        engine.sample(sampler, ModelInput.from_ints([1]), 1, SamplingParams(max_tokens=2)).result(timeout=5)
