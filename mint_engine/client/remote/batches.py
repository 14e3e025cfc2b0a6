"""forward, forward_backward and losses of the caller's own, as requests of a lane."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx

from mint_engine.client.remote import chunks
from mint_engine.client.remote.background import in_thread
from mint_engine.client.remote.failures import unreadable
from mint_engine.client.remote.lane import Accepted, Lane
from mint_engine.client.remote.limits import Limits
from mint_engine.client.remote.transport import Body
from mint_engine.errors import MintError
from mint_engine.types import Datum, ForwardBackwardOutput
from mint_engine.wire import (
    ForwardBackwardRequest,
    WireError,
    encode_forward_backward,
    parse_forward_backward_output,
)

if TYPE_CHECKING:
    from mint_engine.custom_loss import CustomLoss

Output = Callable[[], Awaitable[ForwardBackwardOutput]]


async def send_data(
    lane: Lane, limits: Limits, data: Sequence[Datum], loss_fn: str, config: Mapping[str, Any] | None, *, backward: bool
) -> Output:
    """Post a batch, in several requests if it is large. Gives what waits for the output."""
    kind = "ForwardBackward" if backward else "Forward"
    accepted: list[Accepted] = []

    def encode(chunk: list[Datum], seq: int) -> Body:
        request = ForwardBackwardRequest(lane.model_id, seq, chunk, loss_fn, dict(config or {}), not backward)
        return Body.protobuf(encode_forward_backward(request))

    for chunk in chunks.cut(data, limits.chunk_datums, limits.chunk_bytes):
        try:
            accepted.append(await lane.post("forward_backward", kind, partial(encode, chunk)))
        except MintError as error:
            if accepted and backward:
                error.add_note(
                    f"The first {len(accepted)} parts of this large batch were accepted; their gradients stay."
                )
            raise

    async def output() -> ForwardBackwardOutput:
        parts = [_parse(await request.result()) for request in accepted]
        weights = chunks.sum_of_weights(data) if loss_fn == "cross_entropy" else None
        return chunks.join(parts, weights)

    return output


async def send_custom(lane: Lane, limits: Limits, data: list[Datum], fn: CustomLoss) -> Output:
    """forward there, the caller's loss here on a thread of its own, then its gradient there as cross-entropy's weights.

    The model's later calls wait until the gradient has been sent; other models do not.
    """
    custom_loss = await in_thread(_custom_loss)  # imports torch
    forward = await send_data(lane, limits, custom_loss.with_weights(data), "cross_entropy", None, backward=False)
    outputs = (await forward()).loss_fn_outputs
    evaluated = await in_thread(lambda: custom_loss.evaluate(fn, data, outputs))
    weighted = custom_loss.with_weights(data, evaluated.weights)
    surrogate = await send_data(lane, limits, weighted, "cross_entropy", None, backward=True)

    async def output() -> ForwardBackwardOutput:
        result: ForwardBackwardOutput = custom_loss.result(await surrogate(), evaluated)
        return result

    return output


def _custom_loss() -> Any:
    from mint_engine import custom_loss

    return custom_loss


def _parse(response: httpx.Response) -> ForwardBackwardOutput:
    try:
        return parse_forward_backward_output(response.content)
    except WireError as error:
        raise unreadable(response, f"the output of a batch ({error})") from error
