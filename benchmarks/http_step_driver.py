"""Runs inside an SDK's environment: one training step for each line on standard input (see ``http_step.py``).

python http_step_driver.py DATA.json URL KEY MODEL
"""

import json
import sys

import tinker
from tinker import types


def main() -> None:
    path, url, key, model = sys.argv[1:]
    with open(path) as file:
        data = [
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens),
                loss_fn_inputs={"target_tokens": targets, "weights": weights},
            )
            for tokens, targets, weights in json.load(file)
        ]
    service = tinker.ServiceClient(base_url=url, api_key=key)
    client = service.create_lora_training_client(base_model=model, rank=16, seed=0).result()
    adam = types.AdamParams(learning_rate=5e-5)
    print("ready", flush=True)
    for _ in sys.stdin:
        result = client.forward_backward(data, "cross_entropy")
        client.optim_step(adam).result()
        print(json.dumps(result.result().metrics), flush=True)


main()
