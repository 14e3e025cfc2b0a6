"""Each loss's hand-written gradient is the derivative of its value, for weights and advantages of any sign."""

from __future__ import annotations

import pytest
import torch

from mint_engine.errors import UserError
from mint_engine.losses import LOSSES, get_loss

POLICY = ["importance_sampling", "ppo", "dro"]


def inputs(seed: int = 0, n: int = 400) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(n, 1, generator=generator, dtype=torch.float64)

    lp = -2 + normal()
    return lp, {"weights": normal(), "advantages": normal(), "logprobs": lp + 0.3 * normal()}


@pytest.mark.parametrize("name", ["cross_entropy", *POLICY])
def test_the_gradient_is_the_derivative_of_the_value(name: str) -> None:
    loss = get_loss(name)
    config = loss.resolve_config(None)
    lp, x = inputs()
    lp.requires_grad_()
    value, gradient = loss.fn(lp, x, config)
    (expected,) = torch.autograd.grad(value.sum(), lp)
    torch.testing.assert_close(gradient.detach(), expected, atol=1e-12, rtol=1e-12)


def test_cispo_stops_the_gradient_of_the_clipped_ratio() -> None:
    loss = get_loss("cispo")
    lp, x = inputs()
    _, gradient = loss.fn(lp, x, loss.resolve_config(None))
    ratio = torch.exp(lp - x["logprobs"]).clamp(0.8, 1.2)
    torch.testing.assert_close(gradient, -ratio * x["advantages"])


def test_a_token_with_no_advantage_adds_nothing_even_where_its_ratio_overflows() -> None:
    lp = torch.tensor([[-1.0], [-2.0]])
    x = {"advantages": torch.tensor([[0.0], [1.0]]), "logprobs": torch.tensor([[-1e9], [-2.0]])}
    for name in ("importance_sampling", "ppo", "cispo"):
        loss = get_loss(name)
        value, gradient = loss.fn(lp, x, loss.resolve_config(None))
        assert value[0] == 0
        assert gradient[0] == 0
        assert torch.isfinite(value).all()


def test_dro_leaves_padding_alone_but_not_a_sampled_token_without_advantage() -> None:
    loss = get_loss("dro")
    lp = torch.tensor([[-3.0], [-3.0]])
    x = {"advantages": torch.zeros(2, 1), "logprobs": torch.tensor([[0.0], [-1.0]])}
    value, gradient = loss.fn(lp, x, {"beta": 0.5})
    assert value[:, 0].tolist() == [0.0, 0.25 * 4.0]
    assert gradient[:, 0].tolist() == [0.0, 0.5 * -2.0]


def test_per_token_thresholds_override_the_config() -> None:
    loss = get_loss("ppo")
    lp, x = inputs()
    wide = {"clip_low_threshold": torch.full_like(lp, 0.0), "clip_high_threshold": torch.full_like(lp, 1e9)}
    value, _ = loss.fn(lp, {**x, **wide}, loss.resolve_config(None))
    expected, _ = get_loss("importance_sampling").fn(lp, x, {})
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("cross_entropy", {"beta": 1.0}, "has no key 'beta'; its keys: none"),
        ("ppo", {"clip_lo": 0.9}, "has no key 'clip_lo'"),
        ("ppo", {"clip_low_threshold": float("nan")}, "expected a finite number, got nan"),
        ("ppo", {"clip_low_threshold": 1.5}, "is above clip_high_threshold"),
        ("dro", {"beta": "big"}, "expected a finite number, got 'big'"),
    ],
)
def test_a_config_that_means_nothing_is_refused(name: str, config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_loss(name).resolve_config(config)


def test_an_unknown_loss_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(UserError, match=f"unknown loss 'gspo'; supported: {', '.join(LOSSES)}"):
        get_loss("gspo")
