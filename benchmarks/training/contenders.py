"""Who trains: our engine, and PEFT + transformers as people use it. Same modules, rank, data and adapter for all."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.training.workloads import RANK, Workload, home, weights

LEARNING_RATE = 5e-5
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
# Of a micro-batch of PEFT's: a padded ragged batch would not fit otherwise. The last target of a sequence comes on top.
PADDED_TOKENS = 4096


class Contender(Protocol):
    """One way to train one model in this process."""

    weight_bytes: int  # of the base model

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """Sum of the losses, and its gradients by PEFT's names, at the adapter as :func:`initial` makes it."""

    def step(self) -> object:
        """forward, backward and the optimiser's step."""


def initial(name: str, shape: torch.Size) -> Tensor:
    """The value at which everybody begins. B is not zero: A would have no gradients to compare."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * (0.02 if ".lora_B." in name else shape[-1] ** -0.5)


class Ours:
    """The engine in process, called as a program calls it."""

    def __init__(self, work: Workload, dtype: str, masked_logprobs: bool) -> None:
        import mint
        from mint_engine.engine import Engine
        from mint_engine.types import AdamParams

        self.engine = Engine(dtype=dtype, home=home(), kv_cache_bytes=1 << 22, masked_logprobs=masked_logprobs)
        service = mint.ServiceClient(engine=self.engine)
        self.client = service.create_lora_training_client(str(work.model), RANK, seed=0)
        self.data, self.adam = work.data, AdamParams(learning_rate=LEARNING_RATE)
        (self.model,) = self.engine._residents.models.values()
        adapter = self.model.adapter
        for name, tensor in adapter.named(adapter.params):
            tensor.copy_(initial(name, tensor.shape))
        adapter.version += 1
        decoder = self.model.base.decoder
        self.weight_bytes = sum(w.weight.nbytes for w in decoder.borders.weights)
        if not decoder.config.tie_word_embeddings:
            self.weight_bytes += decoder.embedding.nbytes

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        loss = self.client.forward_backward(self.data, "cross_entropy").result().metrics["loss:sum"]
        state, adapter = self.model.state, self.model.adapter
        grads = {name: tensor.clone() for name, tensor in adapter.named(state.grads)}
        state.grads.zero_()
        state.has_grads = False
        return loss, grads

    def step(self) -> object:
        self.client.forward_backward(self.data, "cross_entropy")
        return self.client.optim_step(self.adam).result()


@dataclass(frozen=True)
class Rows:
    """One forward of PEFT's: ids and labels [B, T]; the mask of a padded batch, or the positions of a packed one."""

    ids: Tensor
    labels: Tensor
    extra: dict[str, Tensor]


class Peft:
    """``dtype`` of the weights, ``autocast`` to bf16 in the forward, the batch in these ``rows``, ``compiled``."""

    def __init__(
        self, work: Workload, dtype: torch.dtype, rows: list[Rows], *, autocast: bool = False, compiled: bool = False
    ) -> None:
        import peft
        import transformers

        base = transformers.AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype)
        self.weight_bytes = sum(p.nbytes for p in base.parameters())
        config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=MODULES, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
        self.trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(initial(name, parameter.shape))
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=LEARNING_RATE, weight_decay=0.0)
        self.model = torch.compile(model) if compiled else model
        self.autocast, self.weighted, self.dtype, self.rows = autocast, work.weighted, dtype, rows

    def _backward(self) -> float:
        total = 0.0
        for rows in self.rows:
            loss = self._loss(rows)
            loss.backward()
            total += float(loss.detach())
        return total * self.weighted

    def _loss(self, rows: Rows) -> Tensor:
        if self.dtype is torch.float64:  # transformers' own loss rounds the logits to float32
            logits = self.model(input_ids=rows.ids, use_cache=False, **rows.extra).logits[:, :-1].flatten(0, 1)
            labels = rows.labels[:, 1:].flatten()
            return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / self.weighted
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            out = self.model(
                input_ids=rows.ids, labels=rows.labels, num_items_in_batch=self.weighted, use_cache=False, **rows.extra
            )
        loss: Tensor = out.loss
        return loss

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        loss, at_least = self._backward(), torch.promote_types(self.dtype, torch.float32)
        grads = {name: p.grad.to(at_least) * self.weighted for name, p in self.trained.items() if p.grad is not None}
        self.optimizer.zero_grad()
        return loss, grads

    def step(self) -> object:
        loss = self._backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def _sequences(work: Workload) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of each datum: transformers shifts the labels itself, so the last target is a token too."""
    out = []
    for d in work.data:
        targets = d.loss_fn_inputs["target_tokens"].tolist()
        labels = [t if w else -100 for t, w in zip(targets, weights(d), strict=True)]
        out.append(([*d.model_input.to_ints(), targets[-1]], [-100, *labels]))
    return out


def _padded(work: Workload, most: int = PADDED_TOKENS) -> list[Rows]:
    """Longest first, as many to a forward as ``most`` tokens allow, but at least one."""
    batches: list[list[tuple[list[int], list[int]]]] = []
    for sequence in sorted(_sequences(work), key=lambda s: -len(s[0])):
        if not batches or (len(batches[-1][0][0]) - 1) * (len(batches[-1]) + 1) > most:
            batches.append([])
        batches[-1].append(sequence)
    return [_pad(batch) for batch in batches]


def _pad(batch: list[tuple[list[int], list[int]]]) -> Rows:
    width = max(len(tokens) for tokens, _ in batch)
    ids, mask, labels = (torch.full((len(batch), width), fill) for fill in (0, 0, -100))
    for i, (tokens, wanted) in enumerate(batch):
        ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.tensor(tokens), 1
        labels[i, : len(tokens)] = torch.tensor(wanted)
    return Rows(ids, labels, {"attention_mask": mask})


def _packed(work: Workload) -> Rows:
    """One row; transformers finds the boundaries in the positions."""
    sequences = _sequences(work)
    ids = torch.tensor([t for tokens, _ in sequences for t in tokens])[None]
    labels = torch.tensor([t for _, wanted in sequences for t in wanted])[None]
    positions = torch.cat([torch.arange(len(tokens)) for tokens, _ in sequences])[None]
    return Rows(ids, labels, {"position_ids": positions})


@dataclass(frozen=True)
class Kind:
    """How a contender is made. ``dtype``: which floor is its own."""

    dtype: str
    ours: bool = False
    masked_logprobs: bool = True
    autocast: bool = False
    packed: bool = False
    alone: bool = False  # one sequence at a time
    compiled: bool = False

    def make(self, work: Workload) -> Contender:
        if self.ours:
            return Ours(work, self.dtype, self.masked_logprobs)
        dtype = torch.float32 if self.autocast else getattr(torch, self.dtype)
        rows = [_packed(work)] if self.packed else _padded(work, 1 if self.alone else PADDED_TOKENS)
        return Peft(work, dtype, rows, autocast=self.autocast, compiled=self.compiled)


BF16, FP32 = "bfloat16", "float32"
KINDS: dict[str, Kind] = {
    "ours bf16": Kind(BF16, ours=True),
    "ours bf16, masked rows skipped": Kind(BF16, ours=True, masked_logprobs=False),
    "ours float32": Kind(FP32, ours=True),
    "PEFT float32": Kind(FP32),
    "PEFT bf16 autocast": Kind(BF16, autocast=True),
    "PEFT all bf16": Kind(BF16),
    "PEFT float32, packed": Kind(FP32, packed=True),
    "PEFT all bf16, packed": Kind(BF16, packed=True),
    "PEFT float32, torch.compile": Kind(FP32, compiled=True),
    "PEFT all bf16, torch.compile": Kind(BF16, compiled=True),
}
DEFAULT, ORACLE = "PEFT float32", "PEFT float32"  # what people get; what our numbers are held to
FINEST = "PEFT float64"  # what the oracle's own rounding is measured by; not timed
ALL = KINDS | {FINEST: Kind("float64", alone=True)}
