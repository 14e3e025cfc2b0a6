"""Reading a model's safetensors, one file or sharded, and checking them against the configuration. Never unpickles."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mint_engine.errors import ModelError
from mint_engine.models.config import ModelConfig

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_FLOATS = {"F64", "F32", "F16", "BF16"}


class WeightReader:
    """The tensors of a model directory, memory-mapped: ``get`` reads only what it returns.

    Opening checks every header, so a missing shard, a cut-off file or an index that names an absent tensor is found at
    once. Raises ModelError naming the file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        if (self.directory / SINGLE).is_file():
            self._where = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        elif (self.directory / INDEX).is_file():
            self._where = self._read_index()
        else:
            raise ModelError(_explain_absence(self.directory))

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def get(self, name: str) -> torch.Tensor:
        """The tensor as stored: its own shape and dtype, on the CPU, in memory of its own."""
        # safetensors gives a view of the mapped file: one norm that is kept would keep all of the file resident.
        tensor: torch.Tensor = self._file_of(name).get_tensor(name)
        return tensor.clone()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header; reads no data."""
        return tuple(self._file_of(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype from the header, as safetensors spells it ("BF16", "F32", ...); reads no data."""
        return self._file_of(name).get_slice(name).get_dtype()

    def _file_of(self, name: str) -> Any:
        if name not in self._where:
            raise ModelError(f"{self.directory}: no tensor {name!r}")
        return self._files[self._where[name]]

    def _open(self, file: str) -> Any:
        try:
            handle = safe_open(self.directory / file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.directory / file}: damaged or not a safetensors file: {error}") from error
        self._files[file] = handle
        return handle

    def _read_index(self) -> dict[str, str]:
        path = self.directory / INDEX
        try:
            where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(where.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: expected a 'weight_map' of tensor to file: {error!r}") from error
        outside = [s for s in shards if not isinstance(s, str) or Path(s).name != s]
        if outside:
            raise ModelError(f"{path}: expected names of files in this directory, got {outside[0]!r}")
        missing = [s for s in shards if not (self.directory / s).is_file()]
        if missing:
            raise ModelError(
                f"{self.directory}: {len(missing)} of {len(shards)} shards are missing: {_some(missing)}; "
                "the download or copy was not finished"
            )
        present = {shard: set(self._open(shard).keys()) for shard in shards}
        absent = sorted(name for name, shard in where.items() if name not in present[shard])
        if absent:
            absent = [f"{name} (in {where[name]})" for name in absent]
            raise ModelError(f"{path}: lists tensors that their files do not hold: {_some(absent)}")
        return dict(where)


def _explain_absence(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory}: no such directory"
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return (
            f"{directory}: holds only pickled weights ({_some(pickles)}), which can run code when they are read; "
            "convert them with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    others = sorted(p.name for p in directory.iterdir() if p.suffix == ".safetensors")
    found = f"; found {_some(others)}, but no index that says which tensor is where" if others else ""
    return f"{directory}: no weights: expected {SINGLE} or {INDEX}{found}"


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the model needs, as transformers names them; linear weights are ``[out, in]``.

    A tied model has no entry for the head: its head is ``model.embed_tokens.weight``.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            shapes[f"{layer}self_attn.{name}.weight"] = (rows, hidden)
            if config.qkv_bias:
                shapes[f"{layer}self_attn.{name}.bias"] = (rows,)
        if config.qk_norm:
            shapes[layer + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[layer + "self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[layer + "self_attn.o_proj.weight"] = (hidden, q)
        if config.o_bias:
            shapes[layer + "self_attn.o_proj.bias"] = (hidden,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        shapes[layer + "mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[layer + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[layer + "mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def validate(reader: WeightReader, config: ModelConfig) -> None:
    """Compare the stored tensors with ``expected_tensors``; raises one ModelError that lists all differences.

    A tensor nobody would read is a difference too (a bias, an extra layer): leaving it out would change the model. Two
    exceptions: the ``rotary_emb.inv_freq`` of old Llama files, which follows from the config, and the head of a tied
    model if it equals the embedding.
    """
    expected = expected_tensors(config)
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in reader]
    for name in reader.names():
        if name in expected:
            shape = reader.shape(name)
            if shape != expected[name]:
                problems.append(f"{name}: expected shape {list(expected[name])}, got {list(shape)}")
            if reader.dtype(name) not in _FLOATS:
                problems.append(f"{name}: expected a dtype of {', '.join(sorted(_FLOATS))}, got {reader.dtype(name)}")
        elif not (name.endswith("rotary_emb.inv_freq") or (name == HEAD and config.tie_word_embeddings)):
            problems.append(f"unexpected {name} {list(reader.shape(name))}")
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ModelError(f"{reader.directory}: the weights do not fit {config.architecture}'s config.json:\n  {shown}")
    if config.tie_word_embeddings and HEAD in reader and not torch.equal(reader.get(HEAD), reader.get(EMBEDDING)):
        raise ModelError(
            f"{reader.directory}: config.json says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}; "
            "set tie_word_embeddings to false if the head is meant to be its own"
        )
