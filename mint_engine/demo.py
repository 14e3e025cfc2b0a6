"""The demo: fine-tune a small chat model on two-digit multiplication, the way the MinT document does it.

``examples/sft.py`` is the same program without the progress bar, the table and the plot.
"""

from __future__ import annotations

import random
import re
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mint_engine import types
from mint_engine.client import SamplingClient, ServiceClient, TrainingClient
from mint_engine.models.hub import SMOLLM2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Run:
    """What the demo did, for the caller to look at."""

    losses: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    checkpoint: str = ""
    adapter: Path = Path()
    plot: Path = Path()


def process_sft_example(ex: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> types.Datum:
    """A (question, answer) pair as the document's canonical datum: prompt masked, targets shifted by one."""
    a, b = map(int, re.findall(r"\d+", ex["question"]))
    prompt_tokens = tokenizer.encode(f"Question: {ex['question']}\nAnswer:", add_special_tokens=True)
    completion_tokens = tokenizer.encode(f" {a * b}", add_special_tokens=False)
    completion_tokens.append(tokenizer.eos_token_id)
    all_tokens = prompt_tokens + completion_tokens
    all_weights = [0] * len(prompt_tokens) + [1] * len(completion_tokens)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens=all_tokens[:-1]),
        loss_fn_inputs={"target_tokens": all_tokens[1:], "weights": all_weights[1:]},
    )


def questions(n: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [{"question": f"What is {rng.randint(10, 99)} * {rng.randint(10, 99)}?"} for _ in range(n)]


def run(
    base_model: str = SMOLLM2, *, steps: int = 60, batch_size: int = 16, learning_rate: float = 5e-5, rank: int = 16,
    output: Path = Path("demo-output"), console: Console | None = None,
) -> Run:  # fmt: skip
    """Train, sample before and after, write the adapter and the loss curve under ``output``."""
    console = console or Console()
    out = Run()
    with ServiceClient() as service:
        console.print(f"Base model [bold]{base_model}[/], LoRA rank {rank} on attention, MLP and unembedding.")
        client = service.create_lora_training_client(base_model=base_model, rank=rank, seed=0)
        tokenizer = client.get_tokenizer()
        held_out = questions(4, seed=1)
        before = _answers(service.create_sampling_client(base_model=base_model), held_out, tokenizer)
        data = [process_sft_example(ex, tokenizer) for ex in questions(steps * batch_size, seed=0)]
        _train(client, data, batch_size, types.AdamParams(learning_rate=learning_rate), out, console)
        name = time.strftime("demo-%Y%m%d-%H%M%S")
        out.checkpoint = client.save_weights_for_sampler(name=name).result().path or ""
        sampler = client.create_sampling_client(model_path=out.checkpoint)
        after = _answers(sampler, held_out, tokenizer)
        archive = service.create_rest_client().get_checkpoint_archive_url_from_tinker_path(out.checkpoint).result().url
    _show(console, held_out, before, after)
    output.mkdir(parents=True, exist_ok=True)
    out.adapter, out.plot = output / "adapter", output / "loss.png"
    _extract(archive, out.adapter)
    _plot(out.losses, out.plot)
    console.print(
        f"Checkpoint  {out.checkpoint}\nAdapter     {out.adapter}  (loads with PEFT)\nLoss curve  {out.plot}",
        soft_wrap=True,
    )
    return out


def _train(
    client: TrainingClient, data: list[types.Datum], batch_size: int, adam: types.AdamParams, out: Run, console: Console
) -> None:
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:.0f} tokens/s"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(data) // batch_size, loss=float("nan"), speed=0.0)
        for start in range(0, len(data), batch_size):
            batch = data[start : start + batch_size]
            began = time.perf_counter()
            result = client.forward_backward(batch, loss_fn="cross_entropy").result()
            client.optim_step(adam).result()
            out.losses.append(result.loss)
            out.tokens_per_second.append(sum(d.model_input.length for d in batch) / (time.perf_counter() - began))
            progress.update(task, advance=1, loss=result.loss, speed=out.tokens_per_second[-1])


def _answers(sampler: SamplingClient, examples: list[dict[str, str]], tokenizer: Any) -> list[str]:
    params = types.SamplingParams(max_tokens=16, temperature=0.7, seed=0)
    prompts = [tokenizer.encode(f"Question: {ex['question']}\nAnswer:") for ex in examples]
    # All calls are made before the first result is read, so that they are decoded together.
    futures = [
        sampler.sample(prompt=types.ModelInput.from_ints(p), sampling_params=params, num_samples=2) for p in prompts
    ]
    return ["\n".join(repr(tokenizer.decode(s.tokens)) for s in future.sequences) for future in futures]


def _extract(archive_url: str, directory: Path) -> None:
    """Unpack the adapter's two files from the archive the RestClient built."""
    directory.mkdir(parents=True, exist_ok=True)
    with tarfile.open(url2pathname(urlparse(archive_url).path)) as tar:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            member = tar.extractfile(name)
            assert member is not None  # a regular file of an archive we have just built
            (directory / name).write_bytes(member.read())


def _show(console: Console, examples: list[dict[str, str]], before: list[str], after: list[str]) -> None:
    table = Table("question", "before", "after", title="Samples at temperature 0.7", show_lines=True)
    for ex, b, a in zip(examples, before, after, strict=True):
        table.add_row(ex["question"], b, a)
    console.print(table)


def _plot(losses: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses)
    axes.set(
        xlabel="step", ylabel="cross-entropy per answer token (nats)", title="LoRA fine-tuning on a * b", ylim=(0, None)
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
