"""tinker-cookbook's own training loops: `python cookbook.py request.json JOB`, JOB one of sft, rl-LOSS (the name of a
policy loss), dpo.

Nothing of the cookbook is changed but its download of Tinker's price list, for which there is no network here: it finds
no prices, and says so. Its metrics are in `<out>/<JOB>/metrics.jsonl`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from importlib import resources
from pathlib import Path

import context
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl
from tinker_cookbook.recipes.math_rl.arithmetic_env import ArithmeticDatasetBuilder
from tinker_cookbook.rl import train as rl
from tinker_cookbook.supervised import train as supervised
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.utils import cost_estimation

RENDERER = "qwen3_instruct"  # ChatML, which SmolLM2 speaks too


def no_prices(url: str, timeout: float) -> list[dict[str, object]]:
    return []


def common(ctx: context.Context, batch_size: int) -> ChatDatasetBuilderCommonConfig:
    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=ctx.base_model, renderer_name=RENDERER, max_length=128, batch_size=batch_size
    )


def sft(ctx: context.Context, log: Path) -> None:
    """12 steps on the conversations that come with the cookbook."""
    conversations = resources.files("tinker_cookbook") / "example_data" / "conversations.jsonl"
    config = supervised.Config(
        log_path=str(log), model_name=ctx.base_model, recipe_name="sl_basic", renderer_name=RENDERER,
        dataset_builder=FromConversationFileBuilder(file_path=str(conversations), common_config=common(ctx, 8)),
        learning_rate=1e-3, lr_schedule="linear", num_epochs=2, max_steps=12, save_every=6, eval_every=0,
        infrequent_eval_every=0, base_url=ctx.url,
    )  # fmt: skip
    asyncio.run(supervised.main(config))


def reinforce(ctx: context.Context, log: Path, loss_fn: str) -> None:
    """Three steps on sums of two numbers."""
    builder = ArithmeticDatasetBuilder(
        batch_size=4, model_name_for_tokenizer=ctx.base_model, renderer_name=RENDERER, n_batches=3, group_size=4
    )
    config = rl.Config(
        learning_rate=1e-4, dataset_builder=builder, model_name=ctx.base_model, recipe_name="rl_basic",
        max_tokens=12, log_path=str(log), eval_every=0, save_every=2, loss_fn=loss_fn, renderer_name=RENDERER,
        base_url=ctx.url,
    )  # fmt: skip
    asyncio.run(rl.main(config))


def dpo(ctx: context.Context, log: Path) -> None:
    """Six steps on comparisons from a local file: short answers preferred to long ones."""
    comparisons = log.with_suffix(".jsonl")
    with comparisons.open("w") as file:
        for a in range(2, 8):
            for b in range(2, 6):
                question = [{"role": "user", "content": f"What is {a} + {b}?"}]
                short = [{"role": "assistant", "content": f"{a + b}"}]
                long = [{"role": "assistant", "content": f"Let me think about {a} and {b} for a while."}]
                pair = {"prompt_conversation": question, "completion_A": short, "completion_B": long}
                file.write(json.dumps({"comparison": pair, "label": "A"}) + "\n")
    builder = DPODatasetBuilderFromComparisons(
        common_config=common(ctx, 4), comparison_builder=ComparisonBuilderFromJsonl(train_path=str(comparisons))
    )
    config = train_dpo.Config(
        log_path=str(log), model_name=ctx.base_model, recipe_name="dpo", dataset_builder=builder,
        renderer_name=RENDERER, learning_rate=2e-4, lr_schedule="constant", eval_every=0, infrequent_eval_every=0,
        save_every=3, max_steps=6, base_url=ctx.url,
    )  # fmt: skip
    train_dpo.main(config)


def main(path: str, job: str) -> None:
    ctx = context.opened(path)
    cost_estimation._download_pricing = no_prices
    log = ctx.out / job
    if job == "sft":
        sft(ctx, log)
    elif job == "dpo":
        dpo(ctx, log)
    else:
        reinforce(ctx, log, job.removeprefix("rl-"))
    (ctx.out / "report.json").write_text("{}")  # says that it came to its end


if __name__ == "__main__":
    main(*sys.argv[1:])
