"""One call as several requests: cutting a batch, and putting the outputs together again (wire-protocol 2.12)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from mint_engine.types import Datum, ForwardBackwardOutput

TOKEN_BYTES = 4


def cut(data: Sequence[Datum], most_datums: int, most_bytes: int) -> Iterator[list[Datum]]:
    """`data` in order, in chunks that keep to the limits. A datum beyond `most_bytes` has a chunk of its own.

    An empty batch is one empty chunk: the server has the sentence for it.
    """
    chunk: list[Datum] = []
    size = 0
    for datum in data:
        weight = datum_bytes(datum)
        if chunk and (len(chunk) >= most_datums or size + weight > most_bytes):
            yield chunk
            chunk, size = [], 0
        chunk.append(datum)
        size += weight
    if chunk or not data:
        yield chunk


def datum_bytes(datum: Datum) -> int:
    """About what a datum takes in a request."""
    tensors = (tensor.to_numpy().nbytes if tensor.sparse_crow_indices is None else 16 * len(tensor.data)
               for tensor in datum.loss_fn_inputs.values())  # fmt: skip
    return TOKEN_BYTES * datum.num_tokens + sum(tensors)


def join(outputs: Sequence[ForwardBackwardOutput], weight_sum: float | None) -> ForwardBackwardOutput:
    """The output of the whole call."""
    return ForwardBackwardOutput(
        loss_fn_output_type=outputs[0].loss_fn_output_type,
        loss_fn_outputs=[datum for output in outputs for datum in output.loss_fn_outputs],
        metrics=_reduce([o.metrics for o in outputs], [len(o.loss_fn_outputs) for o in outputs]),
        weight_sum=weight_sum,
    )


def _reduce(metrics: Sequence[Mapping[str, float]], counts: Sequence[int]) -> dict[str, float]:
    """Metrics of the whole from those of its chunks: the name says how, `loss:sum`. Others are left out."""
    if len(metrics) == 1:
        return dict(metrics[0])
    reduced: dict[str, float] = {}
    for name in metrics[0]:
        if not all(name in chunk for chunk in metrics):
            continue
        values = [chunk[name] for chunk in metrics]
        mean = sum(v * n for v, n in zip(values, counts, strict=True)) / max(sum(counts), 1)
        match name.rpartition(":")[2]:
            case "sum":
                reduced[name] = math.fsum(values)
            case "mean":
                reduced[name] = mean
            case "min":
                reduced[name] = min(values)
            case "max":
                reduced[name] = max(values)
            case "slack":
                reduced[name] = max(values) - mean
            case "hash2" | "hash_unordered":
                reduced[name] = float(sum(int(v) for v in values) % 2**64)
            case "unique":
                reduced |= {name if i == 0 else f"{name}_{i}": value for i, value in enumerate(values)}
    return reduced


def sum_of_weights(data: Sequence[Datum]) -> float:
    """What `ForwardBackwardOutput.loss` of cross-entropy divides by."""
    return float(
        sum(d.loss_fn_inputs["weights"].to_numpy().sum(dtype="float64") for d in data if "weights" in d.loss_fn_inputs)
    )
