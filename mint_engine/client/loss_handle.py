"""`LossHandle`: a loss of the user's own on one datum at a time, made by `ServiceClient.create_custom_loss`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mint_engine.errors import UserError
from mint_engine.types import Datum, TensorData

if TYPE_CHECKING:
    import torch

# (log-probabilities, the loss_fn_inputs it names as parameters...) -> (loss of one element, metrics by name)
PerDatumLossFn = Callable[..., "tuple[torch.Tensor, Mapping[str, torch.Tensor]]"]

_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_RANKS = (0, 1, 2)


@dataclass(frozen=True)
class LossHandle:
    """Pass it to `TrainingClient.forward_backward_custom` in place of a function.

    name: the function's. input_ranks: of `logprobs` and of each of the loss_fn_inputs that the loss reads.
    """

    name: str
    input_ranks: dict[str, int]
    fn: PerDatumLossFn = field(repr=False)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The loss_fn_inputs that the loss reads, in the order in which it takes them."""
        return tuple(self.input_ranks)[1:]

    def check(self, data: Sequence[Datum]) -> None:
        """Raises UserError unless every datum has what the loss reads, with the ranks that were said."""
        for i, datum in enumerate(data):
            for name, rank in self.input_ranks.items():
                key = "target_tokens" if name == "logprobs" else name  # log-probabilities are shaped like the targets
                if key not in datum.loss_fn_inputs:
                    raise UserError(f"loss_fn_inputs: the loss {self.name} needs {key} (datum {i})")
                if (found := _rank(datum.loss_fn_inputs[key])) != rank:
                    raise UserError(
                        f"{key}: expected rank {rank}, as input_ranks says of {name} for the loss {self.name}, "
                        f"got {found} (datum {i})"
                    )

    def __call__(self, data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """The sum over the datums, as `forward_backward_custom` wants it; metrics are combined as their names end."""
        losses, sums = [], dict[str, float]()
        for i, (datum, own) in enumerate(zip(data, logprobs, strict=True)):
            returned: Any = self.fn(own, *(datum.loss_fn_inputs[name].to_torch() for name in self.input_names))
            if not (isinstance(returned, (tuple, list)) and len(returned) == 2 and isinstance(returned[1], Mapping)):
                raise UserError(f"loss {self.name}: expected (loss, dict of metrics), got {returned!r} (datum {i})")
            loss, metrics = returned
            if getattr(loss, "ndim", None) != 0:
                shape = tuple(loss.shape) if hasattr(loss, "shape") else type(loss).__name__
                raise UserError(f"loss {self.name}: expected a loss tensor without dimensions, got {shape} (datum {i})")
            losses.append(loss)
            for key, value in metrics.items():
                if not (isinstance(key, str) and _METRIC.fullmatch(key)):
                    raise UserError(
                        f"loss {self.name}: expected metrics custom/<name>:sum or custom/<name>:mean in lowercase, "
                        f"got {key!r} (datum {i})"
                    )
                sums[key] = sums.get(key, 0.0) + float(value)
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return total, {key: value / len(data) if key.endswith(":mean") else value for key, value in sums.items()}


def make_loss(fn: PerDatumLossFn, input_ranks: Mapping[str, int]) -> LossHandle:
    """The handle of `fn`. Raises UserError if it cannot be one."""
    if not callable(fn):
        raise UserError(f"fn: expected a function, got {type(fn).__name__}")
    name = getattr(fn, "__name__", type(fn).__name__)
    parameters = list(inspect.signature(fn).parameters.values())
    plain = all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)
    names = [parameter.name for parameter in parameters]
    if not plain or names[:1] != ["logprobs"]:
        raise UserError(
            f"fn: expected parameters logprobs and the loss_fn_inputs it reads, without defaults, as in "
            f"loss(logprobs, advantages), got {name}{inspect.signature(fn)}"
        )
    if not isinstance(input_ranks, Mapping) or set(input_ranks) != set(names):
        raise UserError(f"input_ranks: expected a rank for each of {', '.join(names)}, got {input_ranks!r}")
    for key in names:
        if (rank := input_ranks[key]) not in _RANKS[key == "logprobs" :]:
            raise UserError(f"input_ranks: expected 1 or 2 for logprobs, 0, 1 or 2 for others, got {rank!r} for {key}")
    return LossHandle(name, {key: int(input_ranks[key]) for key in names}, fn)


def _rank(tensor: TensorData) -> int:
    return tensor.to_numpy().ndim
