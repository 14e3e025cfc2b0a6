"""Names become directories: paths, the hub client's cache, downloads (from a hub on localhost) and each way to fail."""

import errno
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_models import build_tiny

from mint_engine.errors import ModelError, StorageError
from mint_engine.models import hub
from mint_engine.models.config import load_config
from mint_engine.models.hub import ModelFiles, missing_files, resolve_model
from mint_engine.models.weights import WeightReader, validate

COMMIT = "c" * 40
NAME = "org/tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A whole sharded model directory, with files beside it that we must not download."""
    directory = build_tiny("qwen3", tmp_path_factory.mktemp("hub"), sharded=True)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    (directory / "README.md").write_text("about")
    return directory


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as its client needs for a snapshot."""

    protocol_version = "HTTP/1.1"
    files: Path
    broken: str | None = None  # a file whose download breaks off
    asked: list[str]

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        self.asked.append(path)
        names = sorted(p.name for p in self.files.iterdir())
        if path.startswith(("/api/models/org/gated", "/org/gated")):
            self.reply(403, b"", X_Error_Code="GatedRepo", X_Error_Message="terms not accepted")
        elif path == f"/api/models/{NAME}" or path == f"/api/models/{NAME}/revision/main":
            info = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            sizes = {n: (self.files / n).stat().st_size for n in names}
            tree = [{"type": "file", "path": n, "size": sizes[n], "oid": f"{i:040x}"} for i, n in enumerate(names)]
            self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/") and path.rpartition("/")[2] in names:
            name = path.rpartition("/")[2]
            if name == self.broken and self.command == "GET":
                self.reply(500, b"")
            else:
                etag = f'"{names.index(name):040x}"'
                self.reply(200, (self.files / name).read_bytes(), X_Repo_Commit=COMMIT, ETag=etag)
        else:
            self.reply(404, b"", X_Error_Code="RepoNotFound", X_Error_Message="no such repository")

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


def use_endpoint(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache and a hub that nobody answers for, unless the test starts one."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch, model):
    handler = type("Handler", (FakeHub,), {"files": model, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def fill_cache(cache, model, leave_out=()):
    """Write ``model`` into the cache in the layout of the hub's client."""
    repo = cache / "models--org--tiny"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for path in model.iterdir():
        if path.name not in leave_out:
            (snapshot / path.name).write_bytes(path.read_bytes())
    return snapshot


def test_a_directory_is_itself_under_its_absolute_name(model, monkeypatch, tmp_path):
    expected = ModelFiles(str(model.resolve()), model.resolve())
    assert resolve_model(str(model), tmp_path) == expected
    monkeypatch.chdir(model.parent)
    assert resolve_model(model.name, tmp_path) == expected
    assert resolve_model(f"./{model.name}", tmp_path) == expected
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve_model(f"~/{model.name}", tmp_path) == expected


def test_the_short_name_is_the_converted_package(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "smollm2_directory", lambda home: home / "converted")
    assert resolve_model("smollm2-135m", tmp_path) == ModelFiles("smollm2-135m", tmp_path / "converted")


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(name, tmp_path, server):
    with pytest.raises(ModelError, match=r"base_model: no such directory: .*nowhere"):
        resolve_model(name, tmp_path)
    assert server.asked == []


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"got the file '.*model.gguf'"):
        resolve_model(str(tmp_path / "model.gguf"), tmp_path)


@pytest.mark.parametrize("name", ["", "a/b/c", "two words", "org//model", "-model"])
def test_a_name_that_no_model_can_have_is_refused_without_network(name, tmp_path, server):
    with pytest.raises(ModelError, match=r"base_model: expected 'smollm2-135m', a directory or a hub name"):
        resolve_model(name, tmp_path)
    assert server.asked == []


def test_a_complete_cache_is_used_without_network(cache, model, tmp_path, server):
    snapshot = fill_cache(cache, model)
    assert resolve_model(NAME, tmp_path) == ModelFiles(NAME, snapshot)
    assert server.asked == []


def test_a_model_is_downloaded_once_and_only_the_files_we_read(cache, model, tmp_path, server):
    files = resolve_model(NAME, tmp_path)
    assert files.name == NAME
    validate(WeightReader(files.directory), load_config(files.directory))
    wanted = {p.name for p in model.iterdir()} - {"pytorch_model.bin", "README.md"}
    assert {p.name for p in files.directory.iterdir()} == wanted
    server.asked.clear()
    assert resolve_model(NAME, tmp_path) == files
    assert server.asked == []


def test_an_incomplete_cache_is_completed(cache, model, tmp_path, server):
    shard = sorted(p.name for p in model.glob("model-*.safetensors"))[1]
    snapshot = fill_cache(cache, model, leave_out=[shard])
    assert missing_files(snapshot) == [shard]
    assert resolve_model(NAME, tmp_path).directory == snapshot
    assert missing_files(snapshot) == []


def test_an_incomplete_cache_without_a_hub_names_what_is_missing(cache, model, tmp_path):
    shard = sorted(p.name for p in model.glob("model-*.safetensors"))[1]
    fill_cache(cache, model, leave_out=[shard])
    with pytest.raises(
        ModelError, match=f"we need {shard}, incomplete in the cache .*127.0.0.1:9 .* cannot be reached"
    ):
        resolve_model(NAME, tmp_path)


def test_an_unreachable_hub_is_named_with_what_to_do(cache, tmp_path):
    with pytest.raises(ModelError) as caught:
        resolve_model(NAME, tmp_path)
    for part in (NAME, str(cache), "http://127.0.0.1:9 cannot be reached", "HF_HOME", "smollm2-135m"):
        assert part in str(caught.value)


def test_offline_mode_is_named(monkeypatch, tmp_path, server):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE forbids to download it"):
        resolve_model(NAME, tmp_path)
    assert server.asked == []


def test_an_unknown_model_is_named(tmp_path, server):
    with pytest.raises(ModelError, match=r"'org/unheard-of': .* knows no such model.* check the spelling"):
        resolve_model("org/unheard-of", tmp_path)


def test_a_gated_model_says_how_to_get_in(tmp_path, server):
    with pytest.raises(ModelError, match=r"'org/gated': .*accept the terms at .*/org/gated, then `hf auth login`"):
        resolve_model("org/gated", tmp_path)


def test_a_download_that_breaks_off_is_a_model_error(tmp_path, server):
    server.broken = "config.json"
    with pytest.raises(ModelError, match=f"'{NAME}': .*the download from .* failed"):
        resolve_model(NAME, tmp_path)
    server.broken = None
    assert missing_files(resolve_model(NAME, tmp_path).directory) == []


def test_a_repository_without_safetensors_is_refused(tmp_path, server, monkeypatch):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    (bare / "pytorch_model.bin").write_bytes(b"pickle")
    monkeypatch.setattr(server, "files", bare)
    with pytest.raises(
        ModelError, match=r"we need model.safetensors, tokenizer.json, not in the cache .* has not got them"
    ):
        resolve_model(NAME, tmp_path)


def test_a_full_disk_while_downloading_is_a_storage_error(tmp_path, monkeypatch):
    def download(name, **options):
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("nothing")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        resolve_model(NAME, tmp_path)
    assert caught.value.errno == errno.ENOSPC


def test_a_damaged_index_counts_as_missing(model, tmp_path):
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert missing_files(tmp_path) == ["model.safetensors.index.json (damaged)"]
