"""The frozen base model: embedding, bordered layers, norm, unembedding; forward and backward over packed rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mint_engine import kernels
from mint_engine.adapters import LinearGroup
from mint_engine.batch import PackedBatch
from mint_engine.borders import DEFAULT_RANKS, BorderedWeight, Borders, Seating
from mint_engine.device import upload
from mint_engine.models import layer as decoder_layer
from mint_engine.models import linear
from mint_engine.models.config import ModelConfig
from mint_engine.models.layer import Attend, DecoderLayer, Pass, Saved
from mint_engine.models.rope import RopeTable
from mint_engine.models.weights import WeightReader


class Decoder:
    """One resident copy of a base model in the compute dtype; any number of adapters pass through its borders."""

    def __init__(self, config: ModelConfig, reader: WeightReader, dtype: torch.dtype, *,
                 device: torch.device | str = "cpu", int8: bool = False,
                 on_tensor: Callable[[str], None] = lambda name: None) -> None:  # fmt: skip
        """Read the weights to ``device``. ``on_tensor(name)`` is called after each, for a progress bar."""
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.rope = RopeTable(config, self.device)

        def read(name: str) -> Tensor:
            tensor = reader.get(name).to(self.device).to(dtype)
            on_tensor(name)
            return tensor

        def bordered(group: LinearGroup, bias: bool = False) -> BorderedWeight:
            weight = BorderedWeight(group, dtype, DEFAULT_RANKS, self.device)
            row = 0
            for module, n in group.modules:
                name = module if not (module == "lm_head" and config.tie_word_embeddings) else "model.embed_tokens"
                weight.set_rows(row, read(f"{name}.weight"), int8)
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

    @property
    def activation_bytes_per_token(self) -> int:
        """What a training pass keeps per token (layer.Saved): h, qkv, o, h2, gate and up of every layer."""
        c = self.config
        heads = c.num_heads * c.head_dim
        kept = 2 * c.hidden_size + 2 * heads + 2 * c.num_kv_heads * c.head_dim + 2 * c.intermediate_size
        return c.num_layers * kept * self.dtype.itemsize

    @property
    def resident_bytes(self) -> int:
        """Memory of the weights, with their borders as wide as they are now."""
        tensors = [w.buf for w in self.borders.weights] + ([] if self._embedding is None else [self._embedding])
        return sum(t.nbytes for t in tensors)

    @property
    def embedding(self) -> Tensor:
        """[V, H]; on tied models the unembedding's own rows (the storage is shared, the head's adapter is not)."""
        return self.head.weight if self._embedding is None else self._embedding

    def hidden(
        self, tokens: Tensor, positions: Tensor, seating: Seating, attend: Attend, saved: list[Saved] | None = None
    ) -> tuple[Tensor, Pass]:
        """The residual stream after the last layer, [M, H]; what a backward needs is appended to ``saved``."""
        cos, sin = self.rope.rows(positions)
        p = Pass(self.config, seating, cos, sin, attend)
        delta, h = self.embedding[upload(tokens, self.device)], None
        for la in self.layers:
            delta, h, kept = decoder_layer.forward(la, delta, h, p, saved is not None)
            if saved is not None and kept is not None:
                saved.append(kept)
        assert h is not None
        return h + delta, p

    def hidden_backward(self, dh: Tensor, saved: list[Saved], p: Pass, grads: linear.Gradients) -> None:
        """Backward of :meth:`hidden`. Empties ``saved``: a layer's tensors are freed as soon as they are used."""
        gradient: Tensor | None = dh
        for la in reversed(self.layers):
            assert gradient is not None
            gradient = decoder_layer.backward(la, gradient, saved.pop(), p, grads, need_dx=la.index > 0)

    def head_input(self, h: Tensor, seating: Seating) -> Tensor:
        """Final norm of ``h`` [M, H] with the head adapter's S in the tail: [M, H + p]."""
        x = linear.input_buffer(self.head, h.shape[0], seating)
        kernels.rms_norm(h, self.norm, self.config.rms_norm_eps, y=x[:, : self.head.k])
        linear.shrink_tail(self.head, x, seating)
        return x

    def target_logprob(self, x: Tensor, targets: Tensor, seating: Seating) -> tuple[Tensor, Tensor]:
        """fp32 (log-probabilities [M, K], log-sum-exp [M]) of ``targets`` given :meth:`head_input`'s rows."""
        weight = self.head.forward_weight(seating.ranks_of(self.head.group))
        return kernels.target_logprob(x, weight, upload(targets, self.device))

    def head_backward(
        self, h: Tensor, x: Tensor, targets: Tensor, dlogprob: Tensor, lse: Tensor, seating: Seating,
        grads: linear.Gradients,
    ) -> Tensor:  # fmt: skip
        """Gradient with respect to ``h`` [M, H], given ``dlogprob`` [M, K]; the head adapters' go to ``grads``."""
        ranks = seating.ranks_of(self.head.group)
        x = x[:, : self.head.k + self.head.m * ranks]  # the rows with a gradient may all be of untrained heads
        spans = seating.columns(self.head.group, len(x))
        dx_ext, d_border = kernels.target_logprob_backward(
            x, self.head.forward_weight(ranks), targets, dlogprob, lse, border=self.head.m * ranks,
            spans=None if spans is None else upload(spans, self.device),
        )  # fmt: skip
        return self._head_gradients(h, x, dx_ext, d_border, seating, grads)

    def head_backward_logits(
        self, h: Tensor, x: Tensor, dlogits: Tensor, seating: Seating, grads: linear.Gradients
    ) -> Tensor:
        """The same for losses of whole distributions: ``dlogits`` fp32 [M, V] is kept whole, so pass a few rows."""
        weight = self.head.forward_weight(seating.ranks_of(self.head.group))
        d_border = dlogits.T @ x[:, self.head.k :].float()
        return self._head_gradients(h, x, dlogits.to(x.dtype) @ weight, d_border, seating, grads)

    def _head_gradients(
        self, h: Tensor, x: Tensor, dx_ext: Tensor, d_border: Tensor, seating: Seating, grads: linear.Gradients
    ) -> Tensor:
        """From the gradients of ``x`` and of the border's columns to the adapters' and that of ``h``."""
        w, k = self.head, self.head.k
        dx = dx_ext[:, :k]
        for s in seating.of(w.group):
            rows, columns = slice(s.start, s.stop), slice(s.offset, s.offset + s.adapter.rank)
            out = grads[s.adapter.uid][w.group.name]
            out.b[0].add_(d_border[:, columns])
            d_s = dx_ext[rows, k:][:, columns] * s.adapter.scale
            kernels.outer_accumulate(d_s, x[rows, :k], out.a)
            dx[rows] = torch.addmm(dx[rows], d_s, w.a(s.offset, s.adapter.rank))
        return kernels.rms_norm_backward(dx, h, self.norm, self.config.rms_norm_eps)

    def logits(self, x: Tensor, seating: Seating) -> Tensor:
        """fp32 logits [M, V] of a few rows of :meth:`head_input`."""
        return kernels.logits(x, self.head.forward_weight(seating.ranks_of(self.head.group)))

    def step_model(self) -> kernels.StepModel:
        """The weights as ``kernels.decode_step`` takes them: made again when the borders have grown."""
        if self._step_model is None or self._step_model[0] != self.borders.capacity:
            c = self.config
            model = kernels.StepModel(
                self.layers, self.norm, self.head, self.embedding, c.num_heads, c.num_kv_heads, c.rms_norm_eps
            )
            self._step_model = self.borders.capacity, model
        return self._step_model[1]

    def packed_attend(self, batch: PackedBatch) -> Attend:
        """Causal attention within each sequence of the batch."""
        c = self.config

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
            args = (batch.cu_seqlens, c.num_heads, c.num_kv_heads, c.head_dim**-0.5)
            return kernels.attention(q, k, v, *args, out=out)[1]

        return attend


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
