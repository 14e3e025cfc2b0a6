"""More ops as `cases`: what multiplies with whole weights, the loss, the embedding, the optimiser with its border."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.case import Case, Results
from benchmarks.gpu.models import RANK, SHAPES
from mint_engine import kernels
from mint_engine.gpu.layout import TILE_ROWS


def product_cases(bench: Bench, model: str) -> list[Case]:
    """The MLP's first product for one adapter and for four by tile, forward and backward.

    By tile as a step does it, the border in steps of 16 columns; and forward with ranks padded to whole tiles of 64.
    """
    hidden, ffn, *_ = SHAPES[model]
    m, n, size, r, adapters = bench.rows, 2 * ffn, bench.dtype.itemsize, RANK, 4
    tile = min(TILE_ROWS, m // 2)
    normal = bench.normal

    def bordered(ranks: int) -> dict[str, Tensor]:
        return {"x": normal(m, hidden + ranks, seed=1), "w": normal(n, hidden + ranks, seed=2, scale=hidden**-0.5),
                "dy": normal(m, n + ranks, seed=3), "w2": normal(n + ranks, hidden, seed=4, scale=n**-0.5)}  # fmt: skip

    def spans(inner: int, rank: int = r) -> Tensor:
        tiles = -(-m // tile)
        at = inner + rank * (torch.arange(tiles) * adapters // tiles)
        return torch.stack([at, at, torch.full_like(at, rank)], 1).to(torch.int32).to(bench.device)

    one, many, whole = bordered(2 * r), bordered(adapters * r), bordered(adapters * 64)
    flop, moved = 2.0 * m * n * hidden, float((m * (n + hidden) + n * hidden) * size)
    forward, backward = {k: one[k] for k in ("x", "w")}, {k: one[k] for k in ("dy", "w2")}
    tiles, tiles2 = {**many, "spans": spans(hidden)}, {**many, "spans": spans(n)}
    # The base's columns must be whole tiles too, which the toy model's are not.
    padded = {**whole, "spans": spans(hidden, 64)} if hidden % 64 == 0 else None

    def by_whole_tiles(t: dict[str, Tensor], face: str | None) -> Results:
        return (kernels.bordered_by_tile(t["x"], t["w"], t["spans"], k=hidden, tile_rows=tile, step=64, face=face),)

    return [
        Case("bordered product", forward, lambda t, face: (kernels.bordered_linear(t["x"], t["w"], face=face),),
             moved=moved, flop=flop),
        Case("bordered product backward", backward,
             lambda t, face: (kernels.bordered_linear_backward(t["dy"], t["w2"], face=face),), moved=moved, flop=flop),
        Case("product by tile", tiles,
             lambda t, face: (kernels.bordered_by_tile(t["x"], t["w"], t["spans"], k=hidden, tile_rows=tile, face=face),
                              ), moved=moved, flop=flop),
        Case("product by tile backward", tiles2,
             lambda t, face: (kernels.bordered_by_tile_backward(t["dy"], t["w2"], t["spans"], n=n, tile_rows=tile,
                                                                face=face),), moved=moved, flop=flop),
        *([Case("product by whole tiles", padded, by_whole_tiles, moved=moved, flop=flop)] if padded else []),
    ]  # fmt: skip


def head_cases(bench: Bench, model: str) -> list[Case]:
    """Embedding and loss; of the rows a quarter are in the loss, as in a step."""
    hidden, _, _, _, _, _, vocab, _ = SHAPES[model]
    m, size, r = bench.rows, bench.dtype.itemsize, RANK
    rows = max(8, m // 4)
    generator = torch.Generator(bench.device).manual_seed(7)
    tokens = torch.randint(0, vocab, (m,), device=bench.device, generator=generator)
    table = {"tokens": tokens, "table": bench.normal(vocab, hidden, seed=8)}
    head = {
        "x": bench.normal(rows, hidden + r, seed=9), "w": bench.normal(vocab, hidden + r, seed=10, scale=hidden**-0.5),
        "targets": tokens[:rows, None].contiguous(), "weights": bench.normal(rows, 1, seed=11, dtype=torch.float32),
    }  # fmt: skip
    flop, moved = 2.0 * rows * hidden * vocab, float((vocab + rows) * hidden * size)
    face = "reference" if bench.dry else None
    after = {**head, "lse": kernels.target_logprob(head["x"], head["w"], head["targets"], face=face)[1]}

    def both(t: dict[str, Tensor], face: str | None) -> Results:
        logprob, _, dx, db = kernels.target_logprob_with_gradient(
            t["x"], t["w"], t["targets"], lambda at, lp: -t["weights"][at], border=r, face=face
        )
        return logprob, dx, db

    return [
        Case("embedding", table, lambda t, face: (kernels.embedding(t["tokens"], t["table"], face=face),),
             moved=2.0 * m * hidden * size),
        Case("log-probabilities", head,
             lambda t, face: kernels.target_logprob(t["x"], t["w"], t["targets"], face=face), moved=moved, flop=flop),
        Case("loss and gradient", head, both, moved=2 * moved, flop=2 * flop),
        Case("loss backward", after,
             lambda t, face: kernels.target_logprob_backward(t["x"], t["w"], t["targets"], -t["weights"], t["lse"],
                                                             border=r, face=face), moved=2 * moved, flop=2 * flop),
    ]  # fmt: skip


def optimizer_case(bench: Bench, model: str) -> Case:
    """AdamW that writes one group of 16 layers into its border: A as rows, B as columns."""
    hidden, ffn, *_ = SHAPES[model]
    r, layers = RANK, 16
    n = layers * r * (hidden + ffn)
    names = ("p", "g", "m", "v")
    state = {name: bench.normal(n, seed=15 + i, dtype=torch.float32).abs() for i, name in enumerate(names)}
    numbers = kernels.hyperparameters(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3)
    state["hyper"] = torch.tensor(numbers, dtype=torch.float32, device=bench.device)
    # Places hold addresses: made once for each dtype, as a step has them.
    made: dict[torch.dtype, tuple[Tensor, kernels.Places]] = {}

    def places(dtype: torch.dtype) -> tuple[Tensor, kernels.Places]:
        if dtype not in made:
            border = torch.zeros(layers, ffn + r, hidden + r, dtype=dtype, device=bench.device)
            pieces = [piece for b in border for piece in ((r * hidden, b[ffn:, :hidden]), (ffn * r, b[:ffn, hidden:]))]
            made[dtype] = border, kernels.Places(pieces, bench.device)
        return made[dtype]

    def run(t: dict[str, Tensor], face: str | None) -> Results:
        wide = t["p"].dtype is torch.float64
        border, where = places(torch.float64 if wide else bench.dtype)
        kernels.adamw_places_(t["p"], t["g"], t["m"], t["v"], t["hyper"], where, face=face)
        return t["p"], t["g"], t["m"], t["v"], border

    moved = (32.0 + bench.dtype.itemsize) * n
    return Case("AdamW into the border", state, run, moved=moved, writes=names)
