"""vLLM on the CPU behind lines of JSON: ``vllm_driver.py THREADS MODEL [ADAPTER ...]``; see ``__init__.py``."""

from __future__ import annotations

import json
import os
import sys

threads, model, *adapters = sys.argv[1:]
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{int(threads) - 1}",
}  # fmt: skip


def main() -> None:
    import vllm
    from vllm.lora.request import LoRARequest

    lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": 16} if adapters else {}
    engine = vllm.LLM(
        model=model, dtype="bfloat16", max_model_len=1024, max_num_seqs=128, enable_prefix_caching=True,
        **lora,
    )  # fmt: skip
    requests = [LoRARequest(f"a{i}", i + 1, path) for i, path in enumerate(adapters)]
    print(json.dumps({"version": vllm.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        params = vllm.SamplingParams(
            n=asked["samples"], temperature=1.0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
        who = [requests[i % len(requests)] for i in range(len(prompts))] if requests else None
        answers = engine.generate(prompts, params, lora_request=who, use_tqdm=False)
        print(json.dumps({"sampled": sum(len(o.token_ids) for a in answers for o in a.outputs)}), flush=True)


if __name__ == "__main__":
    main()
