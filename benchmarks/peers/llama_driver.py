"""llama.cpp behind lines of JSON: ``llama_driver.py THREADS MODEL.gguf``; see ``__init__.py``. Greedy, its fastest."""

from __future__ import annotations

import itertools
import json
import sys

threads, model = int(sys.argv[1]), sys.argv[2]


def main() -> None:
    import llama_cpp

    engine = llama_cpp.Llama(model_path=model, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        sampled = 0
        for prompt in asked["prompts"]:
            engine.reset()
            drawn = engine.generate(prompt, temp=0.0, repeat_penalty=1.0)
            sampled += len(list(itertools.islice(drawn, asked["tokens"])))
        print(json.dumps({"sampled": sampled}), flush=True)


if __name__ == "__main__":
    main()
