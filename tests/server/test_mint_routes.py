"""MinT's own calls, uploads and tokenizers on a running server with a real engine and a tiny model."""

from __future__ import annotations

import io
import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import archives
import httpx
import pytest
import torch
from archives import CONFIG, MODEL, tar_gz
from server_fixture import LiveServer, live_server
from tiny_tokenizer import save_byte_tokenizer

from mint_engine.models.tokenizer import load_tokenizer
from mint_engine.store import KeyLimits

PROMPT = [5, 6, 7, 8, 9, 10, 11]


class Client:
    """The wire, as an SDK uses it."""

    def __init__(self, server: LiveServer, key: str = "") -> None:
        headers = {"X-API-Key": key} if key else {}
        self.http = httpx.Client(base_url=f"{server.url}/api/v1", headers=headers, timeout=60)
        self.store = server.engine.store

    def post(self, url: str, status: int = 200, /, **body: Any) -> Any:
        response = self.http.post(url, json=body)
        assert response.status_code == status, response.text
        return response.json()

    def wait(self, url: str, /, **body: Any) -> Any:
        request_id = self.post(url, **body)["request_id"]
        while (answer := self.post("/retrieve_future", request_id=request_id)).get("type") == "try_again":
            pass
        return answer

    def session(self) -> str:
        session_id: str = self.post("/create_session", tags=[], sdk_version="0.22.0")["session_id"]
        return session_id

    def model(self, base: Path, session: str, number: int = 0) -> str:
        lora = {"rank": 4, "seed": number, "train_unembed": True, "train_mlp": True, "train_attn": True}
        body = {"session_id": session, "model_seq_id": number, "base_model": str(base), "lora_config": lora}
        model_id: str = self.wait("/create_model", **body)["model_id"]
        return model_id

    def train(self, model_id: str, seq_id: int) -> None:
        datum = {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": PROMPT[:-1]}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": PROMPT[1:], "dtype": "int64"},
                "weights": {"data": [1.0] * 6, "dtype": "float32"},
            },
        }
        step = {"data": [datum], "loss_fn": "cross_entropy"}
        done = self.wait("/forward_backward", forward_backward_input=step, model_id=model_id, seq_id=seq_id)
        assert "loss:sum" in done["metrics"]
        adam = {"learning_rate": 0.01}
        assert "error" not in self.wait("/optim_step", adam_params=adam, model_id=model_id, seq_id=seq_id + 1)

    def prompt_logprobs(self, session: str, path: str, number: int = 0) -> list[float | None]:
        body = {"session_id": session, "sampling_session_seq_id": number, "model_path": path}
        sampler = self.post("/create_sampling_session", **body)["sampling_session_id"]
        answer = self.wait(
            "/asample", sampling_session_id=sampler, seq_id=0, num_samples=1, prompt_logprobs=True,
            prompt={"chunks": [{"type": "encoded_text", "tokens": PROMPT}]}, sampling_params={"max_tokens": 1},
        )  # fmt: skip
        logprobs: list[float | None] = answer["prompt_logprobs"]
        return logprobs

    def upload(self, archive: bytes, **fields: str) -> httpx.Response:
        return self.http.post("/checkpoints/upload", files={"file": ("a.tar.gz", archive)}, data=fields)


Connect = Callable[..., Client]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import build_tiny

    directory = build_tiny("qwen3", tmp_path_factory.mktemp("base"), tie_word_embeddings=True, vocab_size=257)
    save_byte_tokenizer(directory)
    return directory


@pytest.fixture
def server(base: Path) -> Iterator[LiveServer]:
    with live_server(models=[base]) as live:
        yield live


@pytest.fixture
def connect(server: LiveServer) -> Iterator[Connect]:
    """Gives clients: with a new key of that name, or without a name as whoever is on this machine."""
    with ExitStack() as open_clients:

        def make(name: str | None = None, limits: KeyLimits | None = None) -> Client:
            secret = "" if name is None else server.engine.store.keys.create(name, limits=limits)[1]
            server.state.auth.forget()
            client = Client(server, secret)
            open_clients.enter_context(client.http)
            return client

        yield make


@pytest.fixture
def client(connect: Connect) -> Client:
    return connect()


# ---- uploads ---------------------------------------------------------------------------------------------------------


def test_an_adapter_that_peft_saved_computes_here_what_it_computes_there(
    client: Client, base: Path, tmp_path: Path
) -> None:
    directory, wanted = _peft_adapter(base, tmp_path)
    archive = tar_gz({path.name: path.read_bytes() for path in directory.iterdir()})
    answer = client.upload(archive, name="mine").json()
    assert answer["path"].endswith("/sampler_weights/mine")
    assert answer["checkpoint_id"] == "sampler_weights/mine"
    session = client.session()
    ours = client.prompt_logprobs(session, answer["path"])
    assert ours[0] is None
    torch.testing.assert_close(torch.tensor(ours[1:]), wanted, rtol=1e-4, atol=1e-4)
    loaded = {"session_id": session, "model_seq_id": 1, "path": answer["path"], "optimizer": False}
    client.train(client.wait("/load_weights", **loaded)["model_id"], 1)


def _peft_adapter(base: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """An adapter with PEFT's own defaults (q and v, alpha 8), and the log-probabilities of PROMPT[1:] under it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
        logits = model(torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


def _adapter(base: Path | str, **changes: Any) -> bytes:
    tensors = archives.tensors({"model.layers.0.self_attn.q_proj": (64, 96)})
    return tar_gz({CONFIG: archives.config(base, **changes), MODEL: archives.model(tensors)})


def test_an_upload_belongs_to_who_made_it(connect: Connect, base: Path) -> None:
    alice, bob = connect("alice"), connect("bob")
    path = alice.upload(_adapter(base)).json()["path"]
    assert alice.post("/weights_info", tinker_path=path)["lora_rank"] == 4
    bob.post("/weights_info", 404, tinker_path=path)


@pytest.mark.parametrize(
    ("archive", "says"),
    [
        (lambda base: _adapter("some/other-model"), "serves"),
        (lambda base: _adapter("/etc"), "serves"),
        (lambda base: _adapter(base, use_dora=True), "use_dora"),
        (lambda base: b"hello", "tar.gz"),
        (lambda base: tar_gz({CONFIG: archives.config(base), MODEL: b"\x80\x04"}), "safetensors"),
        (lambda base: tar_gz({CONFIG: archives.config(base), "../../x": b""}), "relative"),
    ],
)
def test_a_bad_upload_is_refused_and_leaves_nothing_behind(
    server: LiveServer, client: Client, base: Path, archive: Any, says: str
) -> None:
    response = client.upload(archive(base))
    assert response.status_code == 400
    assert says in response.json()["detail"]
    assert str(server.engine.home) not in response.text
    assert not list((server.engine.home / "uploads").iterdir())
    assert client.http.get("/checkpoints").json()["checkpoints"] == []


def test_an_upload_without_its_file_is_refused(client: Client) -> None:
    for response in (
        client.http.post("/checkpoints/upload", json={}),
        client.http.post("/checkpoints/upload", data={"file": "text"}),
        client.http.post("/checkpoints/upload", files={"other": b"x"}),
        client.http.post("/checkpoints/upload", files=[("file", b"x"), ("file2", b"y")]),
        client.http.post("/checkpoints/upload", content=b"x", headers={"Content-Type": "multipart/form-data"}),
        client.http.post(
            "/checkpoints/upload", content=b"--x\r\n" * 9, headers={"Content-Type": "multipart/form-data; boundary=x"}
        ),
        client.upload(b"x", name="../evil"),
        client.upload(b"x", name="n" * 10_000),
    ):
        assert response.status_code == 400, response.text


def test_an_upload_counts_against_the_disk_of_its_key(connect: Connect, base: Path) -> None:
    response = connect("small", KeyLimits(max_disk_bytes=100)).upload(_adapter(base))
    assert response.status_code == 400
    assert "may take 100 bytes" in response.json()["detail"]


# ---- interpolation ---------------------------------------------------------------------------------------------------


def _two_versions(client: Client, base: Path) -> tuple[str, list[str]]:
    session = client.session()
    paths = []
    for number in range(2):
        model_id = client.model(base, session, number)
        client.train(model_id, 1)
        paths.append(client.wait("/save_weights_for_sampler", model_id=model_id, path="snap", seq_id=3)["path"])
    return session, paths


def test_checkpoints_are_interpolated(client: Client, base: Path) -> None:
    session, paths = _two_versions(client, base)
    request = {
        "source_paths": paths, "coefficients": [1.0, 0.0], "output_path": "ema", "output_checkpoint_type": "sampler",
        "type": "mint_interpolate_checkpoints",
    }  # fmt: skip
    answer = client.wait("/mint/checkpoints/interpolate", **request)
    assert answer["path"].endswith("/sampler_weights/ema")
    assert answer == {
        "path": answer["path"], "checkpoint_type": "sampler", "source_paths": paths, "coefficients": [1.0, 0.0],
        "has_rank_shards": False, "type": "mint_interpolate_checkpoints",
    }  # fmt: skip
    same = client.prompt_logprobs(session, answer["path"], 10)
    first = client.prompt_logprobs(session, paths[0], 11)
    assert [round(x, 3) for x in same[1:]] == [round(x, 3) for x in first[1:]]  # type: ignore[arg-type]


def test_an_interpolation_that_is_asked_for_again_is_made_once(client: Client, base: Path) -> None:
    _, paths = _two_versions(client, base)
    client.http.headers["X-Idempotency-Key"] = "once"
    request = {"source_paths": paths, "coefficients": [0.9, 0.1]}
    ids = {client.post("/mint/checkpoints/interpolate", **request)["request_id"] for _ in range(3)}
    assert len(ids) == 1


def test_a_wrong_interpolation_is_refused_or_fails_as_the_users_mistake(client: Client, base: Path) -> None:
    _, paths = _two_versions(client, base)
    url = "/mint/checkpoints/interpolate"
    client.post(url, 400, source_paths=paths, coefficients=[1.0])
    client.post(url, 400, source_paths=[], coefficients=[])
    client.post(url, 400, source_paths=paths, coefficients=[1.0, "x"])
    client.post(url, 400, source_paths=paths, coefficients=[1, 1], output_checkpoint_type="training")
    for wrong in (["tinker://none:train:0/sampler_weights/x"], ["../../etc"]):
        failed = client.wait(url, source_paths=wrong, coefficients=[1.0])
        assert failed["category"] == "user"
    failed = client.wait(url, source_paths=paths, coefficients=[1, 1], output_path="a/../b")
    assert failed["category"] == "user"


# ---- reverse KL ------------------------------------------------------------------------------------------------------


def _pair() -> dict[str, Any]:
    def chunks(tokens: list[int]) -> dict[str, Any]:
        return {"chunks": [{"type": "encoded_text", "tokens": tokens}]}

    return {
        "student_input": chunks(PROMPT),
        "reference_input": chunks([9, *PROMPT]),
        "target_tokens": {"data": PROMPT[-3:], "dtype": "int64", "shape": [3]},
        "weights": {"data": [1.0, 0.5, 1.0], "dtype": "float32", "shape": None},
    }


def test_reverse_kl_trains_the_student(client: Client, base: Path) -> None:
    session, paths = _two_versions(client, base)
    model_id = client.model(base, session, 7)
    request = {
        "model_id": model_id, "reference_model_path": paths[0].replace("tinker://", "mint://"), "data": [_pair()],
        "temperature": 1.5, "seq_id": None, "type": "mint_forward_backward_reverse_kl",
    }  # fmt: skip
    losses = []
    for step in range(3):
        answer = client.wait("/mint/forward_backward_reverse_kl", **request)
        assert answer["type"] == "mint_forward_backward_reverse_kl"
        (output,) = answer["outputs"]
        assert output["loss"]["dtype"] == "float32"
        assert output["loss"]["data"] == pytest.approx([answer["metrics"]["loss:sum"]])
        losses.append(answer["metrics"]["loss:sum"])
        client.wait("/optim_step", adam_params={"learning_rate": 0.01}, model_id=model_id, seq_id=step + 1)
    assert math.isfinite(losses[0])
    assert losses[0] > losses[1] > losses[2] > 0


def test_a_refused_reverse_kl_has_used_up_its_number(client: Client, base: Path) -> None:
    model_id = client.model(base, client.session())
    request = {"model_id": model_id, "reference_model_path": str(base), "data": [_pair()], "seq_id": 1}
    client.post("/mint/forward_backward_reverse_kl", 400, **{**request, "temperature": -1})
    done = client.wait("/optim_step", adam_params={"learning_rate": 0.01}, model_id=model_id, seq_id=2)
    assert "error" not in done


def test_a_reverse_kl_that_is_sent_twice_counts_once(client: Client, base: Path) -> None:
    model_id = client.model(base, client.session())
    request = {"model_id": model_id, "reference_model_path": str(base), "data": [_pair()], "seq_id": 1}
    ids = {client.post("/mint/forward_backward_reverse_kl", **request)["request_id"] for _ in range(2)}
    assert len(ids) == 1


def test_reverse_kl_of_anothers_model_or_reference_is_not_found(connect: Connect, base: Path) -> None:
    alice, bob = connect("alice"), connect("bob")
    _, paths = _two_versions(alice, base)
    url = "/mint/forward_backward_reverse_kl"
    theirs = {"model_id": paths[0].split("/")[2], "reference_model_path": str(base), "data": [_pair()]}
    bob.post(url, 404, **theirs)
    own = bob.model(base, bob.session())
    failed = bob.wait(url, model_id=own, reference_model_path=paths[0], data=[_pair()])
    missing = bob.wait(
        url, model_id=own, reference_model_path="tinker://x:train:0/sampler_weights/snap", data=[_pair()]
    )
    assert failed["category"] == missing["category"] == "user"
    assert failed["error"].replace(paths[0].split("/")[2], "x:train:0") == missing["error"]


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_session_that_has_ended_leaves_nothing_in_the_engine(base: Path) -> None:
    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with live_server(models=[base], kv_cache_bytes=1 << 22, session_timeout_s=0.3) as server:
        client, engine = Client(server), server.engine
        with client.http:
            session = client.session()
            model = client.model(base, session)
            body = {"model_id": model, "seq_id": 1, "sampling_session_seq_id": 0}
            sampler = client.wait("/save_weights_for_sampler", **body)["sampling_session_id"]
            until(lambda: not engine.is_resident(model) and not engine.is_resident(sampler))
            assert engine.store.parked(model) is not None
            client.post(f"/sessions/{session}/finish", reason={"type": "success"})
        until(lambda: engine.store.parked(model) is None and engine.store.parked(sampler) is None)
        until(lambda: not engine._residents._counts and not engine._owners)
        assert not engine._residents._lanes


def test_a_tokenizer_can_be_fetched_and_works(client: Client, base: Path, tmp_path: Path) -> None:
    response = client.http.get("/mint/tokenizer", params={"base_model": str(base)})
    assert response.headers["Content-Type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert "model.safetensors" not in archive.namelist()
        archive.extractall(tmp_path)
    assert load_tokenizer(tmp_path).encode("héllo") == load_tokenizer(base).encode("héllo")
    again = client.http.get(
        "/mint/tokenizer", params={"base_model": str(base)}, headers={"If-None-Match": response.headers["ETag"]}
    )
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["/etc", "../..", "Qwen/Qwen3-8B", "~root", "~nobody-of-this-name", "x" * 500, "a\0b"])
def test_nothing_but_the_tokenizers_of_served_models_can_be_fetched(client: Client, name: str) -> None:
    response = client.http.get("/mint/tokenizer", params={"base_model": name})
    assert response.status_code == 400
    assert json.loads(response.text)["detail"].startswith("base_model: ")
