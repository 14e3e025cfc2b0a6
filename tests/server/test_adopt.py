"""Adapters that were not made here: the same function of the input, or a refusal that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import archives
import pytest
import torch
from archives import CONFIG, MODEL

from mint_engine.checkpoint import read_adapter
from mint_engine.errors import UserError
from mint_engine.models.config import load_config
from mint_engine.models.decoder import head_group, layer_groups
from mint_engine.server.adopt import adopt, named_base

QUERY, VALUE = "model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.v_proj"


@pytest.fixture
def shapes(tiny_tied: Path) -> dict[str, tuple[int, int]]:
    """Every linear of the base model: (in_features, out_features)."""
    config = load_config(tiny_tied)
    groups = [group for layer in layer_groups(config) for group in layer] + [head_group(config)]
    return {name: (group.in_features, n) for group in groups for name, n in group.modules}


class Upload:
    """An unpacked adapter for some modules of the tiny model."""

    def __init__(self, directory: Path, base: Path, shapes: dict[str, tuple[int, int]], **changes: Any) -> None:
        self.source, self.target, self.base = directory / "source", directory / "target", base
        self.source.mkdir()
        self.target.mkdir()
        rank = changes.get("r", 4)
        self.tensors = archives.tensors(shapes, rank)
        (self.source / CONFIG).write_bytes(archives.config("tiny", **changes))
        (self.source / MODEL).write_bytes(archives.model(self.tensors))

    def adopt(self) -> dict[str, torch.Tensor]:
        """The change of the weights that the adopted adapter makes, module by module."""
        self.lora = adopt(self.source, self.target, base_model="tiny", base_directory=self.base)
        meta, tensors = read_adapter(self.target)
        assert meta.base_model == "tiny"
        return _deltas(tensors, meta.scale)


def _deltas(tensors: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    end = ".lora_A.weight"
    names = [name.removesuffix(end) for name in tensors if name.endswith(end)]
    return {
        name.removeprefix("base_model.model."): scale
        * tensors[f"{name}.lora_B.weight"].double()
        @ tensors[f"{name}.lora_A.weight"].double()
        for name in names
    }


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 32 / 4),
        ({"r": 8, "lora_alpha": 16}, 16 / 8),
        ({"lora_alpha": 5.5}, 5.5 / 4),
        ({"lora_alpha": -8}, -8 / 4),
        ({"r": 16, "lora_alpha": 16, "use_rslora": True}, 16 / 4),
        ({"target_modules": "all-linear"}, 32 / 4),
    ],
)
def test_any_alpha_and_any_choice_of_modules_gives_the_same_function(
    tmp_path: Path, tiny_tied: Path, shapes: dict[str, tuple[int, int]], changes: dict[str, Any], scale: float
) -> None:
    upload = Upload(tmp_path, tiny_tied, {name: shapes[name] for name in (QUERY, VALUE)}, **changes)
    adopted = upload.adopt()
    for name, wanted in _deltas(upload.tensors, scale).items():
        # B is multiplied by a number once, in float32.
        torch.testing.assert_close(adopted.pop(name), wanted, rtol=1e-5, atol=1e-5)
    assert all("self_attn" in name and not delta.any() for name, delta in adopted.items())
    assert (upload.lora.train_attn, upload.lora.train_mlp, upload.lora.train_unembed) == (True, False, False)


def test_our_own_adapters_come_back_bit_for_bit(
    tmp_path: Path, tiny_tied: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    upload = Upload(tmp_path, tiny_tied, shapes)
    upload.adopt()
    _, tensors = read_adapter(upload.target)
    assert tensors.keys() == upload.tensors.keys()
    assert all(torch.equal(tensors[name], value) for name, value in upload.tensors.items())


def test_half_precision_is_widened(tmp_path: Path, tiny_tied: Path, shapes: dict[str, tuple[int, int]]) -> None:
    upload = Upload(tmp_path, tiny_tied, {QUERY: shapes[QUERY]})
    half = {name: value.bfloat16() for name, value in upload.tensors.items()}
    (upload.source / MODEL).write_bytes(archives.model(half))
    wanted = _deltas({name: value.float() for name, value in half.items()}, 8)[QUERY]
    torch.testing.assert_close(upload.adopt()[QUERY], wanted)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"bias": "all"}, "bias"),
        ({"r": 0}, "r: expected an integer"),
        ({"r": 10**9}, "r: expected an integer"),
        ({"r": 10**300}, "r: expected an integer"),
        ({"r": "4"}, "r: expected an integer"),
        ({"r": 8}, r"expected shape \[8, "),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": "32"}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"target_modules": 5}, "target_modules"),
    ],
)
def test_what_is_not_a_plain_lora_is_refused_by_name(
    tmp_path: Path, tiny_tied: Path, shapes: dict[str, tuple[int, int]], changes: dict[str, Any], says: str
) -> None:
    upload = Upload(tmp_path, tiny_tied, {QUERY: shapes[QUERY]})
    (upload.source / CONFIG).write_bytes(archives.config("tiny", **{**changes, "rank": changes.get("r", 4)}))
    with pytest.raises(UserError, match=says) as caught:
        upload.adopt()
    assert str(tmp_path) not in str(caught.value)  # where we put it is nobody's business


@pytest.mark.parametrize(
    ("module", "shape", "says"),
    [
        ("model.layers.9.self_attn.q_proj", (64, 96), "no LoRA factor of this base model"),
        ("model.layers.0.self_attn.x_proj", (64, 96), "no LoRA factor of this base model"),
        (QUERY, (64, 97), "expected shape"),
        (QUERY, (63, 96), "expected shape"),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    tmp_path: Path, tiny_tied: Path, module: str, shape: tuple[int, int], says: str
) -> None:
    upload = Upload(tmp_path, tiny_tied, {module: shape})
    with pytest.raises(UserError, match=says):
        upload.adopt()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, tiny_tied: Path, shapes: dict[str, tuple[int, int]], value: float
) -> None:
    upload = Upload(tmp_path, tiny_tied, {QUERY: shapes[QUERY]})
    next(iter(upload.tensors.values()))[0, 0] = value
    (upload.source / MODEL).write_bytes(archives.model(upload.tensors))
    with pytest.raises(UserError, match="not finite"):
        upload.adopt()


@pytest.mark.parametrize("what", ["A only", "nothing"])
def test_half_an_adapter_is_refused(
    tmp_path: Path, tiny_tied: Path, shapes: dict[str, tuple[int, int]], what: str
) -> None:
    upload = Upload(tmp_path, tiny_tied, {QUERY: shapes[QUERY]})
    left = {name: value for name, value in upload.tensors.items() if what == "A only" and "lora_A" in name}
    (upload.source / MODEL).write_bytes(archives.model(left))
    with pytest.raises(UserError, match=r"(?i)lora"):
        upload.adopt()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 10**6, b"\xff", b'{"base_model_name_or_path": 5}', b"{}"])
def test_a_config_that_names_no_base_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(UserError, match=CONFIG):
        named_base(tmp_path)


def test_the_base_model_is_the_one_the_config_names(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-0.6B"}).encode())
    assert named_base(tmp_path) == "Qwen/Qwen3-0.6B"
