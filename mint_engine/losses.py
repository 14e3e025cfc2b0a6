"""Losses as functions of the target log-probabilities (DESIGN.md 2.4).

Every loss is a plain sum over tokens and datums: ``loss(lp, inputs) -> (value per token, d value / d lp)``. With
q = the given ``logprobs``, A = ``advantages``, r = exp(lp - q), the formulas are those of the Tinker documentation
("Loss functions"; the same text is in MinT's reference), see each function. Weights and advantages may have any sign.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mint_engine.errors import UserError

Tokens = Mapping[str, Tensor]
LossAndGradient = tuple[Tensor, Tensor]


def cross_entropy(lp: Tensor, x: Tokens, config: Mapping[str, float]) -> LossAndGradient:
    """``-lp * w``; with (N, K) targets the K log-probabilities of a row are summed with their own weights."""
    w = x["weights"]
    # A masked token is exactly zero even where its log-probability is not finite.
    return torch.where(w == 0, 0.0, -lp * w), -w


def importance_sampling(lp: Tensor, x: Tokens, config: Mapping[str, float]) -> LossAndGradient:
    """``-r * A``; the gradient of r is r."""
    loss = -_ratio(lp, x) * x["advantages"]
    return loss, loss


def ppo(lp: Tensor, x: Tokens, config: Mapping[str, float]) -> LossAndGradient:
    """``-min(r * A, clamp(r, lo, hi) * A)`` (arXiv:1707.06347) with lo, hi as ratio bounds, 0.8 and 1.2 by default."""
    r, a = _ratio(lp, x), x["advantages"]
    lo, hi = _bounds(x, config)
    free, clipped = r * a, torch.clamp(r, lo, hi) * a
    return -torch.minimum(free, clipped), torch.where(free <= clipped, -free, 0.0)


def cispo(lp: Tensor, x: Tokens, config: Mapping[str, float]) -> LossAndGradient:
    """``-stop_gradient(clamp(r, lo, hi)) * lp * A`` (arXiv:2506.13585)."""
    a = x["advantages"]
    lo, hi = _bounds(x, config)
    gradient = -torch.clamp(_ratio(lp, x), lo, hi) * a
    return torch.where(a == 0, 0.0, gradient * lp), gradient


def dro(lp: Tensor, x: Tokens, config: Mapping[str, float]) -> LossAndGradient:
    """``-(lp * A - beta/2 * (lp - q)^2)`` (arXiv:2405.19107).

    Padding (A = 0 and q = 0, as RL datums mark their prompts) is left out of the quadratic term: q = 0 there means
    "no sample", and pulling the prompt's log-probabilities to 0 is nobody's intention.
    """
    a, q, beta = x["advantages"], x["logprobs"], config["beta"]
    padding = _dro_padding(x)
    off = torch.where(padding, 0.0, lp - q)
    return torch.where(padding, 0.0, -(lp * a - 0.5 * beta * off * off)), -(a - beta * off)


def _ratio(lp: Tensor, x: Tokens) -> Tensor:
    # Where A is 0 the ratio is irrelevant, and 0 * inf must not appear.
    return torch.exp(torch.where(x["advantages"] == 0, 0.0, lp - x["logprobs"]))


def _bounds(x: Tokens, config: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Per-token thresholds of the datum override those of the config."""
    like = x["advantages"]
    names = ("clip_low_threshold", "clip_high_threshold")
    low, high = (x[name] if name in x else torch.full_like(like, config[name]) for name in names)
    return low, high


def _no_weight(x: Tokens) -> Tensor:
    return x["weights"] == 0


def _no_advantage(x: Tokens) -> Tensor:
    return x["advantages"] == 0


def _dro_padding(x: Tokens) -> Tensor:
    return (x["advantages"] == 0) & (x["logprobs"] == 0)


@dataclass(frozen=True)
class Loss:
    """What the engine must know of a loss: its inputs beside ``target_tokens``, its config and its function.

    ``masked(inputs)``: where value and gradient are zero whatever the log-probability is, NaN included.
    """

    name: str
    fn: Callable[[Tensor, Tokens, Mapping[str, float]], LossAndGradient]
    masked: Callable[[Tokens], Tensor]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    config: tuple[tuple[str, float], ...] = ()
    matrix_targets: bool = False

    def resolve_config(self, given: Mapping[str, float | str] | None) -> dict[str, float]:
        """The config with defaults filled in.

        Raises:
            UserError: an unknown key, a value that is not a finite number, or bounds that cross.
        """
        config = dict(self.config)
        for key, value in (given or {}).items():
            if key not in config:
                known = ", ".join(config) or "none"
                raise UserError(f"loss_fn_config: {self.name} has no key {key!r}; its keys: {known}")
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise UserError(f"loss_fn_config[{key!r}]: expected a finite number, got {value!r}")
            config[key] = float(value)
        low, high = config.get("clip_low_threshold", 0.0), config.get("clip_high_threshold", math.inf)
        if low > high:
            raise UserError(f"loss_fn_config: clip_low_threshold {low} is above clip_high_threshold {high}")
        return config


_POLICY = ("logprobs", "advantages")
_CLIP_NAMES = ("clip_low_threshold", "clip_high_threshold")
_CLIP = (("clip_low_threshold", 0.8), ("clip_high_threshold", 1.2))

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", cross_entropy, _no_weight, ("weights",), matrix_targets=True),
        Loss("importance_sampling", importance_sampling, _no_advantage, _POLICY),
        Loss("ppo", ppo, _no_advantage, _POLICY, _CLIP_NAMES, _CLIP),
        Loss("cispo", cispo, _no_advantage, _POLICY, _CLIP_NAMES, _CLIP),
        Loss("dro", dro, _dro_padding, _POLICY, config=(("beta", 0.05),)),
    )
}


def get_loss(name: str) -> Loss:
    """The loss of that name.

    Raises:
        UserError: the name is unknown; the message lists the losses there are.
    """
    if name not in LOSSES:
        raise UserError(f"loss_fn: unknown loss {name!r}; supported: {', '.join(LOSSES)}")
    return LOSSES[name]
