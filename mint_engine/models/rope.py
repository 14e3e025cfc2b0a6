"""Rotary position embedding: the frequencies of every scaling kind we support, and the cos/sin table.

Sources of the formulas: RoPE, arXiv:2104.09864; linear ("position interpolation"), arXiv:2306.15595; YaRN,
arXiv:2309.00071; llama3, the scaling Meta published with Llama 3.1. All arithmetic is fp32 and in the order
transformers uses, because an angle is ``position * frequency``: one unit in the last place of a frequency is already
5e-4 rad at position 8192.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mint_engine.device import upload
from mint_engine.errors import ModelError

if TYPE_CHECKING:
    from mint_engine.models.config import ModelConfig

KINDS = ("default", "linear", "llama3", "yarn")
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate",
    },
}  # fmt: skip


@dataclass(frozen=True)
class RopeConfig:
    """Parameters of one RoPE; the fields past ``factor`` matter only to the kind named in the comment."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0  # linear, llama3, yarn
    original_max_positions: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> RopeConfig:
        """Read ``rope_parameters`` (transformers 5) or ``rope_theta`` + ``rope_scaling`` (earlier) of a config.json.

        Raises ModelError for a kind or a parameter we do not implement: none is ignored.
        """
        params = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(params, Mapping):
            raise ModelError(f"rope_parameters: expected a mapping, got {type(params).__name__}")
        nested = [key for key, value in params.items() if isinstance(value, Mapping)]
        if nested:
            raise ModelError(f"rope_parameters: a different RoPE per layer type ({', '.join(nested)}) is not supported")
        kind = params.get("rope_type") or params.get("type") or "default"
        if kind not in KINDS:
            raise ModelError(f"rope_parameters: RoPE type {kind!r} is not supported (supported: {', '.join(KINDS)})")
        partial = params.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise ModelError(f"partial_rotary_factor: expected 1.0 (the whole head is rotated), got {partial}")
        general = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        unknown = sorted(k for k, v in params.items() if v is not None and k not in _KEYS[kind] | general)
        if unknown:
            raise ModelError(f"rope_parameters: not understood for RoPE type {kind!r}: {', '.join(unknown)}")

        theta = params.get("rope_theta", config.get("rope_theta", 10000.0))
        fields: dict[str, Any] = {"theta": _positive(theta, "rope_theta"), "kind": kind}
        if kind in ("llama3", "yarn"):
            original = (
                config.get("original_max_position_embeddings")
                or params.get("original_max_position_embeddings")
                or config.get("max_position_embeddings")
            )
            fields["original_max_positions"] = int(_positive(original, "original_max_position_embeddings"))
        if kind == "yarn":
            fields.update(_yarn_fields(params, config, fields["original_max_positions"]))
        elif kind != "default":
            fields["factor"] = _positive(params.get("factor"), "factor")
        if kind == "llama3":
            for name in ("low_freq_factor", "high_freq_factor"):
                fields[name] = _positive(params.get(name), name)
            if fields["high_freq_factor"] <= fields["low_freq_factor"]:
                raise ModelError(
                    f"rope_parameters: expected high_freq_factor > low_freq_factor, "
                    f"got {fields['high_freq_factor']} and {fields['low_freq_factor']}"
                )
        return cls(**fields)


def _positive(value: Any, name: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ModelError(f"rope_parameters: {name}: expected a positive number, got {value!r}")
    return float(value)


def _yarn_fields(params: Mapping[str, Any], config: Mapping[str, Any], original: int) -> dict[str, Any]:
    factor = params.get("factor")
    if factor is None:
        factor = _positive(config.get("max_position_embeddings"), "max_position_embeddings") / original
    factor = _positive(factor, "factor")

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention = params.get("attention_factor")
    if attention is None:
        mscale, mscale_all = params.get("mscale"), params.get("mscale_all_dim")
        attention = temperature(mscale) / temperature(mscale_all) if mscale and mscale_all else temperature(1)
    return {
        "factor": factor,
        "attention_factor": _positive(attention, "attention_factor"),
        "beta_fast": _positive(params.get("beta_fast") or 32.0, "beta_fast"),
        "beta_slow": _positive(params.get("beta_slow") or 1.0, "beta_slow"),
        "truncate": bool(params.get("truncate", True)),
    }


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Angle per position of each rotated pair, fp32 ``[head_dim / 2]``; pair i is (x[i], x[i + head_dim / 2])."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = rope.theta**exponents
    plain = 1.0 / wavelengths
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    return _yarn(wavelengths, rope, head_dim)


def _llama3(plain: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Long waves are slowed by ``factor``, short ones kept, those between blended by how often they fit the context."""
    length = 2 * math.pi / plain
    longest_kept = rope.original_max_positions / rope.high_freq_factor
    shortest_scaled = rope.original_max_positions / rope.low_freq_factor
    rotations = rope.original_max_positions / length
    blend = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    mixed = (1 - blend) * plain / rope.factor + blend * plain
    ends = torch.where(length > shortest_scaled, plain / rope.factor, plain)
    between = (length >= longest_kept) & (length <= shortest_scaled)
    return torch.where(between, mixed, ends)


def _yarn(wavelengths: torch.Tensor, rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """A linear ramp over the dimensions from "kept" (many rotations in the old context) to "interpolated" (few)."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(rope.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001  # a ramp of no width would divide by zero
    steps = torch.arange(head_dim // 2, dtype=torch.float32)
    kept = 1 - ((steps - low) / width).clamp(0, 1)
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


class RopeTable:
    """cos and sin per position, computed once and grown when a longer sequence comes. fp32."""

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).to(device)
        self._scale = config.rope.attention_factor
        # One attribute, replaced whole, so that a reader on another thread never sees cos and sin of two sizes.
        self._table = self._compute(0)

    def _compute(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(length, dtype=torch.float32, device=self._frequencies.device)
        angles = positions[:, None] * self._frequencies
        return angles.cos() * self._scale, angles.sin() * self._scale

    @property
    def table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of all positions so far. A longer table replaces this one and leaves it as it is."""
        return self._table

    def rows(self, positions: torch.Tensor, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the rows of ``positions`` (int64 ``[M]``): (cos, sin), each fp32 ``[M, head_dim / 2]``, on the device.

        ``length``: a bound above every position, if the caller knows it; on a GPU this saves the synchronisation
        that finding it costs. Raises ValueError for a negative position.
        """
        if length is None:
            lowest, highest = (int(v) for v in torch.aminmax(positions)) if positions.numel() else (0, -1)
            if lowest < 0:
                raise ValueError(f"positions: expected values >= 0, got {lowest}")
            length = highest + 1
        positions = upload(positions, self._frequencies.device)
        cos, sin = self.first(length)
        return cos[positions], sin[positions]

    def first(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of the positions below ``length`` and of some more."""
        if length > self._table[0].shape[0]:
            # Doubling keeps the cost of a decode that grows token by token linear.
            self._table = self._compute(max(length, 2 * self._table[0].shape[0], 256))
        return self._table
