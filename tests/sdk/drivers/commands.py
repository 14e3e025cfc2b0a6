"""Commands as the SDK's script `tinker` runs them, each in a process of its own. It is forked from this one, which has
done the imports: most of a command's time.

A line of JSON in: {"arguments": [...], "stdout": path, "stderr": path}. A line out: the status that it ended with.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib.metadata import entry_points


def main() -> None:
    (script,) = entry_points(group="console_scripts", name="tinker")
    command = script.load()
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for stream, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            signal.alarm(120)
            sys.argv = ["tinker", *asked["arguments"]]
            sys.exit(command())
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
