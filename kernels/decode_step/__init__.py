"""One decode step, whole: every row is one token of its own cached sequence; all layers and the head in one call.

    h1 = h + x               x1 = norm(h1)   [q k v] = x1 Wqkv   q, k = rope(qk_norm(q, k));  k, v into the cache
    delta = attention(q) Wo  h = h1 + delta  x2 = norm(h)        x = (silu(gate) * up) Wd,  [gate up] = x2 Wgu
    at last: logits = norm(h + x) Whead of the rows that are asked for, fp32

Every W is bordered (``bordered_linear``); a row meets its own adapter only. Bytes moved: the weights once, K and V of
every row's context once; nothing else counts. Rows may be tokens of one sequence: all k and v are stored before any row
attends, and a row sees its own length.

A row's logits are the same bits whatever other rows there are, and its products those of ``bordered_linear`` with the
adapter first in the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mint_engine.kernels import args
from mint_engine.kernels.decode_step.words import Words
from mint_engine.kernels.op import Op
from mint_engine.kernels.pages import Arena

__all__ = ["StepAdapters", "StepModel", "Words", "decode_step", "decode_step_supported", "decode_words"]

_op = Op("decode_step")

GROUPS = ("qkv", "o", "gate_up", "down")


class Linear(Protocol):
    """``buf`` ``[[W, B], [A, 0]]`` with W [n, k] of m stacked modules; ``bias`` [n] or None.

    ``int8``: None, or (values int8 [n, k], scales float32 [n]): a step reads ``values * scales`` instead of W.
    ``words``: None, or what :func:`decode_words` made of W, of gate_up's in two parts: a step reads them instead.
    """

    buf: Tensor
    bias: Tensor | None
    int8: tuple[Tensor, Tensor] | None
    words: Words | None
    n: int
    k: int
    m: int


class Layer(Protocol):
    """The layer's weights, all of one dtype: norms [H]; ``q_norm``, ``k_norm`` [d] or both None."""

    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None

    @property
    def qkv(self) -> Linear: ...

    @property
    def o(self) -> Linear: ...

    @property
    def gate_up(self) -> Linear: ...

    @property
    def down(self) -> Linear: ...


@dataclass(frozen=True)
class StepAdapters:
    """Who sits in the border.

    ``segments`` int64 [n, 5], in row order: first row, last row + 1, rank offset, rank, and the groups of GROUPS and
    the head (16) that the adapter trains, as bits. ``scales`` float32 [n]. ``ranks``: of border in use. An adapter's B
    is block diagonal: the rows of one module are zero in the columns of the others (and need not be read there).

    ``words``: None, or int64 [n, 4 * layers + 1, 2]: of every linear, the head last, the addresses of what
    ``decode_words`` made of an adapter's columns of the border, in as many parts as W's (the first part's and the
    last's); 0 where there is nothing.
    """

    segments: Tensor
    scales: Tensor
    ranks: int
    words: np.ndarray | None = None


class StepModel:
    """The weights of a model as a step takes them, checked once. To be made again when a ``buf`` is replaced.

    Args:
        layers: at least one.
        norm: the last norm, [H].
        head: of one module.
        embedding: [V, H], any row stride.
        n_q, n_kv: heads.
        eps: of the norms.

    Raises:
        ValueError: a weight does not fit the others, or is a vector (a row of the embedding) with gaps.
    """

    def __init__(
        self, layers: Sequence[Layer], norm: Tensor, head: Linear, embedding: Tensor, n_q: int, n_kv: int, eps: float
    ) -> None:
        self.layers, self.norm, self.head, self.embedding = tuple(layers), norm, head, embedding
        self.n_q, self.n_kv, self.eps = n_q, n_kv, eps
        self.hidden, self.d = head.k, layers[0].o.k // n_q
        hidden, dtype, qkv_width = self.hidden, norm.dtype, (n_q + 2 * n_kv) * self.d
        args.packed("decode_step", "norm", norm, (hidden,), dtype)
        args.packed("decode_step", "embedding", embedding, (head.n, hidden), dtype)
        self.ffn = layers[0].down.k
        sizes = (qkv_width, hidden, 3), (hidden, n_q * self.d, 1), (2 * self.ffn, hidden, 2), (hidden, self.ffn, 1)
        self.ranks = self._room("head", head, (head.n, hidden, 1))
        for i, layer in enumerate(layers):
            for name, weight in (("attention_norm", layer.attention_norm), ("mlp_norm", layer.mlp_norm)):
                args.packed("decode_step", f"layer {i}: {name}", weight, (hidden,), dtype)
            for name, of_heads in (("q_norm", layer.q_norm), ("k_norm", layer.k_norm)):
                if of_heads is not None:
                    args.packed("decode_step", f"layer {i}: {name}", of_heads, (self.d,), dtype)
            for name, size in zip(GROUPS, sizes, strict=True):
                self.ranks = min(self.ranks, self._room(f"layer {i}: {name}", getattr(layer, name), size))
        # Panels are as wide as the instruction set's that made them. One that has others reads the weights as they are.
        self.word_columns = 0 if head.words is None else head.words.columns
        self.table = np.array([self._addresses(layer) for layer in layers], dtype=np.int64)
        self.head_table = np.array([norm.data_ptr(), *self._addresses_of(head)], dtype=np.int64)
        self.addresses = self.table.ctypes.data, self.head_table.ctypes.data  # of the tables

    def _room(self, name: str, w: Linear, size: tuple[int, int, int]) -> int:
        n, k, m = size
        fits = (w.n, w.k, w.m) == size and w.buf.shape[0] >= n and w.buf.shape[1] >= k and w.buf.stride(1) == 1
        if not fits or w.buf.dtype is not self.norm.dtype:
            raise ValueError(
                f"{name}: expected {self.norm.dtype} of {m} modules of [{n}, {k}], got {w.m} of [{w.n}, {w.k}] in "
                f"{w.buf.dtype} {list(w.buf.shape)} (decode_step)"
            )
        if w.bias is not None:
            args.packed("decode_step", f"{name}: bias", w.bias, (n,), self.norm.dtype)
        if w.int8 is not None:
            args.packed("decode_step", f"{name}: int8 values", w.int8[0], (n, k), torch.int8)
            args.packed("decode_step", f"{name}: int8 scales", w.int8[1], (n,), torch.float32)
        return min(w.buf.shape[0] - n, w.buf.shape[1] - k) // m

    def _addresses(self, layer: Layer) -> list[int]:
        """The fields of StepLayer (csrc/decode_step.h)."""
        norms = (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
        linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
        return [*(_pointer(t) for t in norms), *(field for w in linears for field in self._addresses_of(w))]

    def _addresses_of(self, w: Linear) -> list[int]:
        """The fields of StepLinear."""
        stride = w.buf.stride(0)
        a = w.buf.data_ptr() + w.n * stride * w.buf.element_size()
        b = w.buf.data_ptr() + w.k * w.buf.element_size()
        weight, words = [w.buf.data_ptr(), stride, 0], [0, 0]
        if w.int8 is not None:
            values, scales = w.int8
            weight = [values.data_ptr(), values.stride(0), scales.data_ptr()]
        elif w.words is not None and w.words.columns == self.word_columns:
            words = [part.data_ptr() for part in w.words.parts]
        return [*weight, _pointer(w.bias), a, stride, b, stride, words[0], words[-1]]


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def decode_words(weight: Tensor, parts: int = 1, arena: Arena | None = None) -> Words | None:
    """The words of ``weight [n, k]`` as a decode step would read them here, in parts of n / parts rows; as large as it.
    ``arena``: where they go, with those of other weights.

    Nothing is transposed then at every step, and memory is read in the order in which it lies. (Layers of prompts and
    of training passes, ``decoder_layer``, read them in their forwards.) None where there are no
    words: in float32, for an odd k, on a GPU, and on CPUs that have neither AVX2 nor AVX-512 BF16.
    """
    n, k = args.matrix("decode_words", "weight", weight)
    if n % parts:
        raise ValueError(f"parts: expected a divisor of {n} rows, got {parts} (decode_words)")
    if weight.dtype is not torch.bfloat16 or k % 2 or not decode_step_supported(weight):
        return None
    words: Words | None = _op.cpu.words(weight, parts, arena)
    return words


def decode_step_supported(*tensors: Tensor) -> bool:
    """Whether the cpu face takes these. Where it does not, the ops one by one beat the reference."""
    return _op.cpu.supports(*tensors) is None


def decode_step(
    model: StepModel,
    tokens: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    wanted: Tensor,
    scale: float,
    *,
    adapters: StepAdapters | None = None,
    face: str | None = None,
) -> Tensor:
    """One step over M rows.

    Args:
        model: the weights, float32 or bfloat16 (the reference takes float64 too).
        tokens: ``[M]`` int64.
        cos, sin: ``[P, d/2]`` float32, any row stride, the rotary tables of positions 0 to P - 1; P at least the
            longest length.
        k_pool, v_pool: ``[layers, n_blocks, block, n_kv*d]``, contiguous; the rows' k and v are written to them.
        block_table, lengths: as in ``paged_attention``, lengths at least 1: a row's own token is the last of them.
        wanted: ``[R]`` int64, ascending: the rows whose logits are asked for.
        scale: of the attention scores.
        adapters: None for the base model alone.
        face: run this face ("cpu", "reference") or raise.

    Returns:
        logits ``[R, V]`` float32 (float64 in a float64 reference).

    Raises:
        ValueError: an argument does not fit, or ``face`` cannot run.
    """
    check_step("decode_step", model, tokens, cos, sin, k_pool, v_pool, block_table, lengths, adapters)
    args.tensor("decode_step", "wanted", wanted, (len(wanted),), torch.int64)
    tokens, block_table, lengths, wanted = (t.contiguous() for t in (tokens, block_table, lengths, wanted))
    logits: Tensor = _op.pick(face, model.norm, k_pool, v_pool, cos, sin).decode_step(
        model, tokens, cos, sin, k_pool, v_pool, block_table, lengths, wanted, scale, adapters
    )
    return logits


def check_step(
    op: str, model: StepModel, tokens: Tensor, cos: Tensor, sin: Tensor, k_pool: Tensor, v_pool: Tensor,
    block_table: Tensor, lengths: Tensor, adapters: StepAdapters | None,
) -> None:  # fmt: skip
    """Raises ValueError unless the arguments of :func:`decode_step` fit, in the name of ``op``."""
    m, d = len(tokens), model.d
    table = args.statistics_dtype(model.norm.dtype)
    args.tensor(op, "tokens", tokens, (m,), torch.int64)
    for name, t in (("cos", cos), ("sin", sin)):
        args.tensor(op, name, t, (len(cos), d // 2), table)
    width = model.n_kv * d
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        if pool.dim() != 4 or not pool.is_contiguous():
            raise ValueError(
                f"{name}: expected [layers, n_blocks, block, {width}], contiguous, got {list(pool.shape)} ({op})"
            )
        args.tensor(op, name, pool, (len(model.layers), *k_pool.shape[1:3], width), model.norm.dtype)
    args.tensor(op, "lengths", lengths, (m,), torch.int32)
    args.tensor(op, "block_table", block_table, (m, args.matrix(op, "block_table", block_table)[1]), torch.int32)
    if adapters is not None and adapters.ranks > model.ranks:
        raise ValueError(f"adapters: expected at most the border's {model.ranks} ranks, got {adapters.ranks} ({op})")
    if adapters is not None and adapters.words is not None:
        shape = len(adapters.scales), 4 * len(model.layers) + 1, 2
        if adapters.words.shape != shape or adapters.words.dtype != np.int64:
            got = f"{adapters.words.dtype} {list(adapters.words.shape)}"
            raise ValueError(f"adapters: expected words int64 {list(shape)}, got {got} ({op})")
