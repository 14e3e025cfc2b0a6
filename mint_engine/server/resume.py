"""A model's side of the server on disk: what it has answered, what nobody has fetched, what it has still to do.

The note goes with the parked model (`engine.park`). With it a restarted server takes up every promise of the old one:
a client sees nothing but a connection that was gone for a while.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mint_engine import wire
from mint_engine.durable import replacing_file
from mint_engine.errors import MintError
from mint_engine.server.answers import Encoded
from mint_engine.server.failures import Failure
from mint_engine.server.lane import Lane, Operation
from mint_engine.server.promises import Promise, Promises

if TYPE_CHECKING:
    from concurrent.futures import Future

    from mint_engine.server.caller import Caller

log = logging.getLogger(__name__)

_VERSION = 1
_RESULTS = "results.json"  # in the home


class NotRepeatedError(MintError):
    """An operation that a restart has cost."""


def withdraw(lane: Lane) -> list[Operation]:
    """Take back what the engine has not begun, last first, so that none runs whose predecessor does not."""
    withdrawn: list[Operation] = []
    for operation in reversed(lane.started):
        promise = operation.promise
        if (future := promise.future) is None:
            continue
        if operation.saved is None:
            break  # it could not be done again
        promise.future = None  # its cancellation is no news to the promise
        if not future.cancel():
            promise.future = future  # it runs, or is done
            break
        withdrawn.append(operation)
    return withdrawn[::-1]


def to_note(lane: Lane, promises: Promises, withdrawn: list[Operation] | None = None) -> dict[str, Any]:
    """What `from_note` needs. As JSON.

    Results that were fetched go along while they are in memory (`Promises` says how many and how long): the answer may
    have been lost, and the client, which waits half a minute before it asks again, is far behind by then.
    """
    ids = [*lane.answered.values(), *lane.by_key.values()]
    known = [promise for request_id in ids if (promise := promises.get(request_id, lane.owner)) is not None]
    finished = [promise for promise in known if promise.done]
    return {
        "version": _VERSION,
        "next_seq": lane.next_seq,
        "refused": lane.refused,
        "answered": list(lane.answered.items()),
        "by_key": list(lane.by_key.items()),
        "results": [_result(promise) for promise in finished],
        "pending": [_pending(operation) for operation in [*(withdrawn or ()), *lane.waiting]],
    }


def from_note(
    note: dict[str, Any], lane: Lane, caller: Caller, promises: Promises,
    restart: Callable[[Caller, str, bytes], Callable[[], Future]] | None, begin: Callable[[Lane, Operation], None],
) -> None:  # fmt: skip
    """Put a lane and its promises back. ``begin`` is given the operations that are still to be done, in order."""
    if note.get("version") != _VERSION:
        log.warning("%s: parked by another version of the server; its unfetched results are lost", lane.model_id)
        lane.next_seq = int(note.get("next_seq", lane.next_seq))
        return
    lane.next_seq = note["next_seq"]
    lane.answered.update((seq_id, request_id) for seq_id, request_id in note["answered"])
    for seq_id in note["refused"]:
        lane.refuse(seq_id)
    lane.by_key.update((key, request_id) for key, request_id in note["by_key"])
    for entry in note["results"]:
        _restore(entry, lane.owner, lane.model_id, promises)
    for entry in note["pending"]:
        promise = promises.create(
            entry["kind"], lane.owner, lane.model_id, tokens=entry["tokens"], seq_id=entry["seq_id"],
            request_id=entry["request_id"],
        )  # fmt: skip
        if entry["body"] is None or restart is None:
            lost = f"the server was restarted before this {entry['kind']} ran, and cannot repeat it"
            promises.settle(promise, error=NotRepeatedError(lost))
            continue
        body = base64.b64decode(entry["body"])
        begin(lane, Operation(promise, restart(caller, entry["kind"], body), lambda body=body: body))  # type: ignore[misc]


def keep_others(home: Path, promises: Promises) -> None:
    """Write down the results that no model's note has: those of interpolations."""
    results = [{"owner": promise.owner} | _result(promise) for promise in promises.of_no_scope() if promise.done]
    if results:
        with replacing_file(home / _RESULTS) as path:
            path.write_text(json.dumps({"version": _VERSION, "results": results}))


def take_up_others(home: Path, promises: Promises) -> None:
    """Put them back, once."""
    path = home / _RESULTS
    if path.exists():
        written = path.read_text()
        path.unlink()
        note = json.loads(written)
        for entry in note["results"] if note["version"] == _VERSION else ():
            _restore(entry, entry["owner"], None, promises)


def _result(promise: Promise) -> dict[str, Any]:
    entry: dict[str, Any] = {"request_id": promise.request_id, "kind": promise.kind, "seq_id": promise.seq_id}
    entry |= {"fetched": promise.fetched, "tokens": promise.tokens, "finished": promise.finished}
    if (failure := promise.failure) is not None:
        return entry | {"failure": [failure.status, failure.detail, failure.category, failure.type]}
    encoded = promise.result(wire.PROTOBUF)
    body = base64.b64encode(encoded.body).decode()
    return entry | {"media_type": encoded.media_type, "body": body, "uneven": promise.uneven}


def _restore(entry: dict[str, Any], owner: str, model_id: str | None, promises: Promises) -> None:
    promise = Promise(
        entry["request_id"], entry["kind"], owner, model_id, entry["tokens"], seq_id=entry["seq_id"],
        finished=entry["finished"], uneven=entry.get("uneven", False),
    )  # fmt: skip
    if "failure" in entry:
        status, detail, category, kind = entry["failure"]
        promises.restore(promise, failure=Failure(status, detail, category, type=kind))
    else:
        promises.restore(promise, Encoded(base64.b64decode(entry["body"]), entry["media_type"]))
    if entry["fetched"]:
        promises.mark_fetched(promise)


def _pending(operation: Operation) -> dict[str, Any]:
    promise = operation.promise
    body = None if operation.saved is None else base64.b64encode(operation.saved()).decode()
    return {
        "request_id": promise.request_id,
        "kind": promise.kind,
        "seq_id": promise.seq_id,
        "tokens": promise.tokens,
        "body": body,
    }
