"""The dispatcher."""

from __future__ import annotations

import pytest
import torch
from check import TRITON

from mint_engine import kernels
from mint_engine.kernels import op


def test_every_op_has_a_reference() -> None:
    assert all("reference" in faces for faces in kernels.faces().values())
    assert {"adamw", "outer_accumulate", "qk_norm_rope", "rms_norm", "swiglu", "target_logprob"} <= set(kernels.faces())


def test_a_face_asked_for_is_never_replaced() -> None:
    x = torch.zeros(2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"face: swiglu cannot run on 'cpu': .*float64"):
        kernels.swiglu(x, face="cpu")
    kernels.swiglu(x)  # the dispatcher's own choice is free


def test_triton_is_interpreted_only_for_those_who_ask() -> None:
    x = torch.randn(3, 8)
    assert op._ops["swiglu"].pick(None, x) is op._ops["swiglu"].cpu
    if TRITON and not torch.cuda.is_available():
        torch.testing.assert_close(kernels.swiglu(x, face="triton"), kernels.swiglu(x, face="cpu"))
        with pytest.raises(ValueError, match=r"face: swiglu cannot run on 'triton': dtype torch.float64"):
            kernels.swiglu(x.double(), face="triton")


def test_an_op_without_a_face_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 8)
    swiglu = op._ops["swiglu"]
    monkeypatch.setattr(swiglu, "_triton", None)
    monkeypatch.setattr(op, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="face: swiglu cannot run on 'triton': triton is not installed"):
        kernels.swiglu(x, face="triton")
    monkeypatch.setattr(swiglu, "_triton", None)
    monkeypatch.setattr(op, "find_spec", lambda name: None if name.startswith("mint_engine") else name)
    with pytest.raises(ValueError, match="face: swiglu cannot run on 'triton': it has no Triton kernel yet"):
        kernels.swiglu(x, face="triton")


def test_an_unknown_face_is_refused() -> None:
    with pytest.raises(ValueError, match=r"face: expected one of .* for swiglu, got 'cuda'"):
        kernels.swiglu(torch.zeros(2, 8), face="cuda")
    with pytest.raises(ValueError, match="name: expected one of"), kernels.force_face("cuda"):
        pass


def test_a_forced_face_holds_until_the_block_ends() -> None:
    x = torch.zeros(2, 8, dtype=torch.float64)
    with kernels.force_face("cpu"), pytest.raises(ValueError, match="cannot run on 'cpu'"):
        kernels.swiglu(x)
    kernels.swiglu(x)


def test_a_strided_last_dimension_goes_to_the_reference() -> None:
    x = torch.randn(8, 4).T
    with pytest.raises(ValueError, match="last dimension has stride"):
        kernels.swiglu(x, face="cpu")
    torch.testing.assert_close(kernels.swiglu(x), kernels.swiglu(x.contiguous()))


def test_an_isa_the_cpu_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name: expected one of .* on this CPU, got sve"):
        op.native.set_isa("sve")
    assert op.native.isas()[-1] == "scalar"


def test_native_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"gate_up: expected a row stride of at least 16, got 8 \(swiglu\)"):
        op.native.swiglu(0, 0, 8, 0, 8, 2, 8)


def test_the_extension_is_built() -> None:
    """Without it every other test would quietly run on the references alone."""
    assert op.native is not None
    assert "scalar" in op.native.isas()
