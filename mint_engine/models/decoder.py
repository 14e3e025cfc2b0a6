"""The frozen base model: embedding, bordered layers, norm, unembedding; forward and backward over packed rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mint_engine import kernels
from mint_engine.adapters import LinearGroup
from mint_engine.batch import PackedBatch
from mint_engine.border_words import BorderWords
from mint_engine.borders import DEFAULT_RANKS, BorderedWeight, Borders, Seating
from mint_engine.device import upload
from mint_engine.kernels.attention import Bounds
from mint_engine.models import company, linear
from mint_engine.models import layer as decoder_layer
from mint_engine.models.config import ModelConfig
from mint_engine.models.layer import Attend, Cells, DecoderLayer, Pass, Saved
from mint_engine.models.rope import RopeTable
from mint_engine.models.weights import WeightReader
from mint_engine.models.workspace import Workspace

_LOGIT_BYTES = 96 << 20

# Memory for the activations of a pass; a call that needs more is cut at datum boundaries into passes, with the same
# sums. A pass of 2000 tokens or more is no faster per token, and this is enough for that up to models of 4B.
ACTIVATION_BYTES = 2 << 30


class Decoder:
    """One resident copy of a base model in the compute dtype; any number of adapters pass through its borders."""

    def __init__(self, config: ModelConfig, reader: WeightReader, dtype: torch.dtype, *,
                 device: torch.device | str = "cpu", int8: bool = False, activation_bytes: int = ACTIVATION_BYTES,
                 on_tensor: Callable[[str], None] = lambda name: None) -> None:  # fmt: skip
        """Read the weights to ``device``. ``on_tensor(name)`` is called after each, for a progress bar.

        ``activation_bytes``: what a training pass may take beside the weights, see :attr:`max_tokens`.
        """
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.activation_bytes = activation_bytes
        self.rope = RopeTable(config, self.device)
        self.space = Workspace(self.device)
        self.programs: Any = None  # of `mint_engine.gpu`, on a GPU
        self.keeps_words = False  # whether decode steps get a copy of the weights: `kernels.decode_words`
        self.border_words: BorderWords | None = None  # and of the adapters' B; there is one if the head has words

        def read(name: str) -> Tensor:
            tensor = reader.get(name).to(self.device).to(dtype)
            on_tensor(name)
            return tensor

        arena, int8_arena = kernels.Arena(self.device), kernels.Arena(self.device) if int8 else None

        def bordered(group: LinearGroup, bias: bool = False) -> BorderedWeight:
            weight = BorderedWeight(group, dtype, DEFAULT_RANKS, arena)
            row = 0
            for module, n in group.modules:
                name = module if not (module == "lm_head" and config.tie_word_embeddings) else "model.embed_tokens"
                weight.set_rows(row, read(f"{name}.weight"), int8_arena)
                row += n
            if bias:
                weight.bias = torch.cat([read(f"{module}.bias") for module, _ in group.modules])
            return weight

        self.layers = []
        for i, (qkv, o, gate_up, down) in enumerate(layer_groups(config)):
            prefix = f"model.layers.{i}"
            self.layers.append(
                DecoderLayer(
                    index=i,
                    attention_norm=read(f"{prefix}.input_layernorm.weight"),
                    qkv=bordered(qkv, config.qkv_bias),
                    o=bordered(o, config.o_bias),
                    mlp_norm=read(f"{prefix}.post_attention_layernorm.weight"),
                    gate_up=bordered(gate_up),
                    down=bordered(down),
                    q_norm=read(f"{prefix}.self_attn.q_norm.weight") if config.qk_norm else None,
                    k_norm=read(f"{prefix}.self_attn.k_norm.weight") if config.qk_norm else None,
                )
            )
        self.norm = read("model.norm.weight")
        self.head = bordered(head_group(config))
        self._embedding = None if config.tie_word_embeddings else read("model.embed_tokens.weight")
        self.borders = Borders(
            [w for la in self.layers for w in (la.qkv, la.o, la.gate_up, la.down)] + [self.head], DEFAULT_RANKS
        )
        self._step_model: tuple[int, kernels.StepModel] | None = None

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return tuple(w.group for w in self.borders.weights)

    def activation_bytes_per_token(self, rank: int) -> int:
        """What a training pass writes per token: what every layer keeps (layer.Saved), and what one needs at a time.

        ``rank``: of the adapters' the highest, for the columns of S and dS beside every linear's own.
        """
        return self.activation_bytes_of(self.config.num_layers, rank)

    def activation_bytes_of(self, layers: int, rank: int) -> int:
        """The same if ``layers`` layers keep something."""
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        # S of q, k, v, o, gate, up and down.
        kept = 2 * c.hidden_size + 2 * q + 2 * kv + 2 * c.intermediate_size + 7 * rank
        # Twice h (embedding, stream), the gradients of h twice, x, delta, dx; q, k, their and v's gradients; the MLP's;
        # S and dS where they are made.
        passing = 7 * c.hidden_size + 4 * (q + kv) + 4 * c.intermediate_size + 12 * rank
        statistics = 4 * layers * c.num_heads  # the log-sum-exps, fp32
        return (layers * kept + passing) * self.dtype.itemsize + statistics

    def max_tokens(self, rank: int) -> int:
        """Tokens of a training pass that ``activation_bytes`` allow; one longer sequence is a pass all the same.

        ``rank``: the highest of the adapters'. A ninth is left to buffers, which grow by an eighth more than they must.
        """
        left = self.activation_bytes - self.logit_bytes
        return max(1, left * 8 // (9 * self.activation_bytes_per_token(rank)))

    @property
    def logit_bytes(self) -> int:
        """Of ``activation_bytes``, what logits may take from a forward to its backward."""
        return min(_LOGIT_BYTES, self.activation_bytes // 8)

    @property
    def resident_bytes(self) -> int:
        """Memory of the weights, with their borders as wide as they are now."""
        tensors = [w.buf for w in self.borders.weights] + ([] if self._embedding is None else [self._embedding])
        tensors += [t for w in self.borders.weights for t in w.int8 or ()]
        words = sum(w.words.nbytes for w in self.borders.weights if w.words is not None)
        words += 0 if self.border_words is None else self.border_words.nbytes
        return words + sum(t.nbytes for t in tensors)

    @property
    def embedding(self) -> Tensor:
        """[V, H]; on tied models the unembedding's own rows (the storage is shared, the head's adapter is not)."""
        return self.head.weight if self._embedding is None else self._embedding

    def hidden(
        self, tokens: Tensor, positions: Tensor, seating: Seating, attend: Attend, saved: list[Saved] | None = None,
        *, rows: Tensor | None = None, space: Workspace | None = None, length: int | None = None,
        cells: Cells | None = None,
    ) -> tuple[Tensor, Pass]:  # fmt: skip
        """The residual stream after the last layer; what a backward needs is appended to ``saved``.

        [M, H]; or [rows, H] of the ``rows`` (int64, ascending) that are wanted. What is in ``saved``, and with
        ``space`` the result too, lives until the next pass over this base model, which writes into the same memory.
        ``length``: a bound above every position, if known. ``cells``: in a decode step, where K and V go.
        """
        p, delta = self.embed(tokens, positions, seating, attend, length)
        p.cells = cells
        h = None
        with p.waiting.together(self.space):
            for la in self.layers:
                some = rows if la is self.layers[-1] else None
                delta, h, kept = decoder_layer.forward(la, delta, h, p, saved is not None, some)
                if saved is not None and kept is not None:
                    saved.append(kept)
        assert h is not None
        return torch.add(h, delta, out=None if space is None else space.take("stream", tuple(h.shape), h.dtype)), p

    def embed(
        self, tokens: Tensor, positions: Tensor, seating: Seating, attend: Attend, length: int | None
    ) -> tuple[Pass, Tensor]:
        """What :meth:`hidden` begins with: what its layers share, and the tokens' embeddings [M, H]."""
        cos, sin = self.rope.rows(positions, length)
        p = Pass(self.config, seating, cos, sin, attend, self.space)
        delta = self.space.take("embedded", (len(tokens), self.config.hidden_size), self.dtype)
        return p, kernels.embedding(upload(tokens, self.device), self.embedding, out=delta)

    def rows(self, t: Tensor, rows: Tensor, name: str) -> Tensor:
        """Some rows of a matrix (int64, on the CPU), in memory of that name."""
        out = self.space.take(f"rows of {name}", (len(rows), t.shape[1]), t.dtype)
        return torch.index_select(t, 0, upload(rows, t.device), out=out)

    def hidden_backward(self, dh: Tensor, rows: Tensor, saved: list[Saved], p: Pass, grads: linear.Gradients) -> None:
        """Backward of :meth:`hidden`, which it does once: ``saved`` is overwritten.

        ``dh`` [rows, H]: the gradient of the ``rows`` (int64, ascending) that have one. The others need their K and V
        in the last layer, and nothing else of it.
        """
        saved[-1] = saved[-1].only(rows, self.space)
        gradient: Tensor | None = self.gradient_stream(dh, p)
        with p.waiting.together(self.space):
            for la in reversed(self.layers):
                assert gradient is not None
                gradient = decoder_layer.backward(la, gradient, saved[la.index], p, grads, need_dx=la.index > 0)

    def gradient_stream(self, dh: Tensor, p: Pass) -> Tensor:
        """``dh`` [rows, H] as :func:`layer.backward` takes it, with room for any dS beside it."""
        width = self.config.hidden_size
        stream = self.space.take("dh", (len(dh), width + p.seating.ranks), self.dtype)
        stream[:, :width] = dh
        return stream

    def head_input(self, h: Tensor, seating: Seating, space: Workspace | None = None) -> Tensor:
        """Final norm of ``h`` [M, H] with the head adapter's S in the tail: [M, H + p], new or in ``space``."""
        shape = len(h), self.head.k + linear.tail(self.head, seating)
        x = h.new_empty(shape) if space is None else space.take("head input", shape, h.dtype)
        along = linear.shrink_along(self.head, x, seating)
        kernels.rms_norm(h, self.norm, self.config.rms_norm_eps, y=x[:, : self.head.k], shrink=along)
        if along is None:
            linear.shrink_tail(self.head, x, seating)
        return x

    def target_logprob(
        self, x: Tensor, targets: Tensor, seating: Seating, kept: kernels.Kept | None = None
    ) -> tuple[Tensor, Tensor]:
        """fp32 (log-probabilities [M, K], log-sum-exp [M]) of ``targets`` given :meth:`head_input`'s rows."""
        weight = self.head.forward_weight(seating.ranks_of(self.head.group))
        return kernels.target_logprob(x, weight, upload(targets, self.device), kept=kept)

    def room_to_keep(self, rows: Tensor) -> kernels.Kept:
        """For :meth:`target_logprob`: of these rows (int64, ascending) as many as fit, in memory of the workspace."""
        vocab = self.config.vocab_size
        some = rows[: max(1, self.logit_bytes // (vocab * self.dtype.itemsize))]
        return kernels.Kept(some, self.space.take("kept logits", (len(some), vocab), self.dtype))

    def head_backward(
        self, h: Tensor, x: Tensor, targets: Tensor, dlogprob: Tensor, lse: Tensor, seating: Seating,
        grads: linear.Gradients, kept: kernels.Kept | None = None, rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Gradient with respect to ``h`` [M, H], given ``dlogprob`` [M, K]; the head adapters' go to ``grads``.

        ``rows`` of :meth:`target_logprob`'s x are these, if that has ``kept`` some.
        """
        w = self.head
        ranks = seating.ranks_of(w.group)
        x = x[:, : w.k + w.m * ranks]  # the rows with a gradient may all be of untrained heads
        shares = [
            kernels.BorderShare(s.start, s.stop, s.offset, grads[s.adapter.uid][w.group.name].b[0])
            for s in seating.of(w.group)
        ]
        dx_ext, _ = kernels.target_logprob_backward(
            x, w.forward_weight(ranks), targets, dlogprob, lse, border=w.m * ranks, shares=shares, kept=kept, rows=rows
        )
        return self._head_gradients(h, x, dx_ext, seating, grads)

    def head_both(
        self, h: Tensor, x: Tensor, targets: Tensor, gradient: Callable[[slice, Tensor], Tensor], seating: Seating,
        grads: linear.Gradients, logprobs: Tensor,
    ) -> Tensor:  # fmt: skip
        """:meth:`target_logprob` into ``logprobs`` [M, K] and :meth:`head_backward`, the logits computed once.

        ``gradient(rows, logprobs[rows])`` is d loss / d logprob of some rows; it must not wait for the device.
        """
        ranks = seating.ranks_of(self.head.group)
        x = x[:, : self.head.k + self.head.m * ranks]
        _, _, dx_ext, d_border = kernels.target_logprob_with_gradient(
            x, self.head.forward_weight(ranks), targets, gradient, border=self.head.m * ranks, logprob=logprobs
        )
        self._add_border(d_border, seating, grads)
        return self._head_gradients(h, x, dx_ext, seating, grads)

    def head_backward_logits(
        self, h: Tensor, x: Tensor, dlogits: Tensor, seating: Seating, grads: linear.Gradients
    ) -> Tensor:
        """The same for losses of whole distributions: ``dlogits`` fp32 [M, V] is kept whole, so pass a few rows."""
        weight = self.head.forward_weight(seating.ranks_of(self.head.group))
        self._add_border(dlogits.T @ x[:, self.head.k :].float(), seating, grads)
        return self._head_gradients(h, x, dlogits.to(x.dtype) @ weight, seating, grads)

    def _add_border(self, d_border: Tensor, seating: Seating, grads: linear.Gradients) -> None:
        """The gradient of the border's columns [V, p] to those of the adapters' B."""
        for s in seating.of(self.head.group):
            out = grads[s.adapter.uid][self.head.group.name].b[0]
            out.add_(d_border[:, s.offset : s.offset + s.adapter.rank])

    def _head_gradients(
        self, h: Tensor, x: Tensor, dx_ext: Tensor, seating: Seating, grads: linear.Gradients
    ) -> Tensor:
        """From the gradient of ``x`` to those of the adapters' A and of ``h``."""
        w, k = self.head, self.head.k
        dx, segments = dx_ext[:, :k], seating.of(w.group)
        for s in segments:  # the border's columns become dS
            dx_ext[s.start : s.stop, k + s.offset : k + s.offset + s.adapter.rank].mul_(s.adapter.scale)
        if len(segments) > 1 and x.is_cpu:
            company.head_gradients(w, dx_ext, x, seating, [grads[s.adapter.uid][w.group.name].a for s in segments])
        else:
            for s in segments:
                rows = slice(s.start, s.stop)
                d_s = dx_ext[rows, k + s.offset : k + s.offset + s.adapter.rank]
                kernels.outer_accumulate(d_s, x[rows, :k], grads[s.adapter.uid][w.group.name].a)
                dx[rows] = torch.addmm(dx[rows], d_s, w.a(s.offset, s.adapter.rank))
        return kernels.rms_norm_backward(dx, h, self.norm, self.config.rms_norm_eps)

    def logits(self, x: Tensor, seating: Seating) -> Tensor:
        """fp32 logits [M, V] of a few rows of :meth:`head_input`."""
        return kernels.logits(x, self.head.forward_weight(seating.ranks_of(self.head.group)))

    def draw(self, x: Tensor, temperature: Tensor, uniforms: Tensor, seating: Seating) -> tuple[Tensor, Tensor]:
        """A token for each row of :meth:`head_input` and its log-probability: see ``kernels.sample_head``."""
        weight = self.head.forward_weight(seating.ranks_of(self.head.group))
        return kernels.sample_head(x, weight, temperature, uniforms)

    def step_model(self) -> kernels.StepModel:
        """The weights as ``kernels.decode_step`` takes them: made again when the borders have grown."""
        if self._step_model is None or self._step_model[0] != self.borders.capacity:
            c = self.config
            if self.keeps_words and self._step_model is None:
                arena = kernels.Arena()
                for w in self.borders.weights:
                    if w.int8 is None:
                        # A step multiplies gate and up side by side.
                        parts = 2 if w.group.name.endswith(".gate_up") else 1
                        w.words = kernels.decode_words(w.weight, parts, arena)
                self.border_words = None if self.head.words is None else BorderWords(self.borders.weights)
            model = kernels.StepModel(
                self.layers, self.norm, self.head, self.embedding, c.num_heads, c.num_kv_heads, c.rms_norm_eps
            )
            self._step_model = self.borders.capacity, model
        return self._step_model[1]

    def packed_attend(self, batch: PackedBatch) -> Attend:
        """Causal attention within each sequence of the batch."""
        return self.attend_within(batch.cu_seqlens)

    def attend_within(self, bounds: Tensor | Bounds) -> Attend:
        """The same for sequences with these bounds."""
        return PackedAttend(bounds, self.config, self.space)


@dataclass(frozen=True)
class PackedAttend:
    """Causal attention within sequences that lie end to end, with ``bounds``."""

    bounds: Tensor | Bounds
    config: ModelConfig
    space: Workspace

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        c = self.config
        lse = self.space.take(("lse", layer), (c.num_heads, len(q)), torch.float32)
        args = (self.bounds, c.num_heads, c.num_kv_heads, c.head_dim**-0.5)
        return kernels.attention(q, k, v, *args, out=out, lse=lse)[1]


def layer_groups(config: ModelConfig) -> list[tuple[LinearGroup, LinearGroup, LinearGroup, LinearGroup]]:
    """The (qkv, o, gate_up, down) groups of every layer; module names are Hugging Face's."""
    hidden, ffn, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d

    def group(i: int, name: str, flag: str, block: str, k: int, **modules: int) -> LinearGroup:
        named = tuple((f"model.layers.{i}.{block}.{module}", n) for module, n in modules.items())
        return LinearGroup(f"layers.{i}.{name}", flag, k, named)

    return [
        (
            group(i, "qkv", "train_attn", "self_attn", hidden, q_proj=q, k_proj=kv, v_proj=kv),
            group(i, "o", "train_attn", "self_attn", q, o_proj=hidden),
            group(i, "gate_up", "train_mlp", "mlp", hidden, gate_proj=ffn, up_proj=ffn),
            group(i, "down", "train_mlp", "mlp", ffn, down_proj=hidden),
        )
        for i in range(config.num_layers)
    ]


def head_group(config: ModelConfig) -> LinearGroup:
    return LinearGroup("unembed", "train_unembed", config.hidden_size, (("lm_head", config.vocab_size),))
