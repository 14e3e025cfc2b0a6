"""Records what the real SDKs write and read: tests/wire/golden/<version>.json.

    python tests/wire/record_golden.py 0.22 PYTHON_WITH_TINKER_0.22.0
    python tests/wire/record_golden.py 0.38 PYTHON_WITH_TINKER_0.38.0

Each file holds request bodies made by that SDK's encoders, our result bodies, and what its decoders read in those.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

from golden_results import FORWARD_BACKWARD, SAMPLES

from mint_engine import wire

HERE = Path(__file__).resolve().parent


def bodies() -> dict[str, tuple[str, str]]:
    """Kind and base64 body of every result."""
    made = {name: ("forward_backward", wire.encode_forward_backward_output(v)) for name, v in FORWARD_BACKWARD.items()}
    made |= {name: ("sample", wire.encode_sample_response(v)) for name, v in SAMPLES.items()}
    return {name: (kind, base64.b64encode(body).decode()) for name, (kind, body) in made.items()}


if __name__ == "__main__":
    version, python = sys.argv[1:]
    given = bodies()
    ran = subprocess.run(
        [python, str(HERE / "sdk_side.py")],
        input=json.dumps({"results": given}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer = json.loads(ran.stdout)
    answer["results"] = {
        name: {"kind": kind, "body": body, "read": answer["results"][name]} for name, (kind, body) in given.items()
    }
    (HERE / "golden" / f"{version}.json").write_text(json.dumps(answer, indent=1) + "\n")
