"""Attention of installed libraries: which one is chosen, and that each is called with the right meaning.

There is no GPU here: the libraries are stood in for by modules with their signatures that compute the same in float64.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from check import normal, within_budget
from test_attention import bounds
from torch import Tensor

from mint_engine.kernels import attention, attention_backward, gpu_plan
from mint_engine.kernels.attention import library, sdpa
from mint_engine.kernels.attention.bounds import Bounds

LENGTHS, N_Q, N_KV, D, SCALE = [5, 0, 30, 1], 4, 2, 16, 0.3


def forward_like(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
    assert longest >= int(cu.diff().max())
    flat = (t.flatten(1) for t in (q, k, v))
    o, lse = attention(*flat, cu, q.shape[1], k.shape[1], scale, face="reference")
    return o.view(q.shape), lse


def backward_like(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu: Tensor, scale: float) -> Any:
    flat = (t.flatten(1) for t in (do, q, k, v, o))
    grads = attention_backward(*flat, lse, cu, q.shape[1], k.shape[1], scale, face="reference")
    return [g.view(t.shape) for g, t in zip(grads, (q, k, v), strict=True)]


class FlashAttention2(ModuleType):
    """flash_attn 2.8's private functions, as far as they matter."""

    @staticmethod
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert causal
        assert dropout_p == 0.0
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        o, lse = forward_like(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)
        return o, lse, torch.empty(0), torch.empty(2)

    @staticmethod
    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert causal
        assert deterministic
        assert (window_size_left, window_size_right, softcap, dropout_p) == (-1, -1, 0.0, 0.0)
        made = backward_like(dout, q, k, v, out, softmax_lse, cu_seqlens_q, softmax_scale)
        for into, grad in zip((dq, dk, dv), made, strict=True):
            into.copy_(grad)


class FlashAttention3(ModuleType):
    """The same of hopper/flash_attn_interface.py."""

    @staticmethod
    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        softmax_scale=None, causal=False, num_splits=1,
    ):  # fmt: skip
        assert causal
        o, lse = forward_like(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)
        return o, lse, torch.empty(0), torch.empty(0)

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert is_causal
        assert deterministic
        made = backward_like(dout, q, k, v, out, softmax_lse, cu_seqlens_q, softmax_scale)
        for into, grad in zip((dq, dk, dv), made, strict=True):
            into.copy_(grad)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a module in the place of a library; what was chosen before is forgotten, before and after."""
    library.chosen.cache_clear()

    def install(name: str, module: ModuleType | None) -> None:
        parent = name.split(".", maxsplit=1)[0]
        if parent != name:
            package = ModuleType(parent)
            package.__path__ = []  # a package
            monkeypatch.setitem(sys.modules, parent, package)
        monkeypatch.setitem(sys.modules, name, module)

    yield install
    library.chosen.cache_clear()


def named(name: str) -> library.Library:
    return next(x for x in library.LIBRARIES if x.name == name)


@pytest.mark.parametrize(
    ("name", "fake"), [("flash-attn 3", FlashAttention3("fa3")), ("flash-attn 2", FlashAttention2("fa2"))]
)
@pytest.mark.parametrize("captured", [False, True])
def test_a_library_is_called_with_what_the_op_means(name: str, fake: ModuleType, captured: bool) -> None:
    """Views with strides in, gradients into the column blocks of one buffer out, empty sequences, grouped heads."""
    m, q_width, kv_width = sum(LENGTHS), N_Q * D, N_KV * D
    qkv, do = normal(m, q_width + 2 * kv_width, seed=1).double(), normal(m, q_width, seed=2).double()
    q, k, v = qkv.split([q_width, kv_width, kv_width], 1)
    cu: Tensor | Bounds = bounds(LENGTHS)
    heads = (N_Q, N_KV, SCALE)
    exact = attention(q, k, v, cu, *heads, face="reference")
    exact_grads = attention_backward(do, q, k, v, *exact, cu, *heads, face="reference")
    if captured:
        data = Bounds(m, 9, torch.device("cpu"))
        for new, buffer in data.write(cu.numpy()):
            buffer.copy_(torch.from_numpy(new))
        cu = data
    out, lse = torch.full_like(exact[0], torch.nan), torch.full_like(exact[1], torch.nan)
    library.attention((named(name), fake), q, k, v, cu, *heads, out, lse)
    assert torch.equal(out, exact[0])
    assert torch.equal(lse, exact[1])
    grads = torch.full_like(qkv, torch.nan)
    parts = grads.split([q_width, kv_width, kv_width], 1)
    library.attention_backward((named(name), fake), do, q, k, v, out, lse, cu, *heads, *parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, exact_grads, strict=True))


def test_torch_takes_these_arguments_and_gives_these_shapes() -> None:
    """The real operators, on tensors without values."""
    q, kv = torch.empty(36, N_Q, D, dtype=torch.bfloat16, device="meta"), torch.empty(
        36, N_KV, D, dtype=torch.bfloat16, device="meta"
    )  # fmt: skip
    cu = torch.empty(5, dtype=torch.int32, device="meta")
    torch_library = named("torch.nn.attention.varlen")
    o, lse = torch_library.forward(None, q, kv, kv, cu, 30, SCALE)
    assert (o.shape, lse.shape, lse.dtype) == (q.shape, (N_Q, 36), torch.float32)
    grads = torch.empty_like(q), torch.empty_like(kv), torch.empty_like(kv)
    torch_library.backward(None, q, q, kv, kv, o, lse, cu, 30, SCALE, grads)


def test_the_best_that_is_there_is_chosen_and_said(installed: Any) -> None:
    for name in ("flash_attn_interface", "flash_attn.flash_attn_interface"):
        installed(name, None)  # an import fails
    assert library.chosen(90)[0].name == "torch.nn.attention.varlen"
    assert library.report(90).startswith("torch.nn.attention.varlen (flash-attn 3: ")
    library.chosen.cache_clear()
    installed("flash_attn.flash_attn_interface", FlashAttention2("fa2"))
    assert library.chosen(90)[0].name == "flash-attn 2"
    library.chosen.cache_clear()
    installed("flash_attn_interface", FlashAttention3("fa3"))
    assert library.chosen(90)[0].name == "flash-attn 3"
    assert library.report(90) == "flash-attn 3"
    assert library.chosen(80)[0].name == "flash-attn 2"  # the other is for Hopper
    assert library.report(80) == "flash-attn 2 (flash-attn 3: for compute capability 9.0 to 9.0)"
    assert library.chosen(75) is None
    assert library.report(75).startswith("our own Triton kernels (flash-attn 3: for compute capability 9.0 to 9.0; ")


def test_another_version_of_a_library_is_not_called(installed: Any) -> None:
    old = ModuleType("fa2")
    installed("flash_attn.flash_attn_interface", old)
    assert library.lacks(named("flash-attn 2"), 90) == "a version without _flash_attn_varlen_forward"
    old._flash_attn_varlen_forward = lambda q, k, v: None
    reason = "a version whose _flash_attn_varlen_forward has no cu_seqlens_q"
    assert library.lacks(named("flash-attn 2"), 90) == reason
    assert library.report(90).startswith("torch.nn.attention.varlen (")
    assert reason in library.report(90)


def test_functions_that_are_custom_operators_are_known_by_their_own_parameters(installed: Any) -> None:
    """As flash-attn wraps them: what torch makes of them takes (*args, **kwargs)."""

    def wrapped(
        q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        softmax_scale: float, dropout_p: float, causal: bool, window_size_left: int, window_size_right: int,
        softcap: float, alibi_slopes: Tensor | None, dq: Tensor, deterministic: bool,
    ) -> Tensor:  # fmt: skip
        raise NotImplementedError

    operator = torch.library.custom_op("mint_test::flash", wrapped, mutates_args=("dq",), device_types="cuda")
    module = ModuleType("fa2")
    module._flash_attn_varlen_forward = module._flash_attn_varlen_backward = operator
    installed("flash_attn.flash_attn_interface", module)
    assert library.lacks(named("flash-attn 2"), 90) is module
    needs = library.Library("x", "flash_attn.flash_attn_interface", {"_flash_attn_varlen_forward": ("page",)}, 80, 90,
                            named("flash-attn 2").forward, None)  # fmt: skip
    assert library.lacks(needs, 90) == "a version whose _flash_attn_varlen_forward has no page"


def test_a_library_that_is_not_installed_says_so() -> None:
    missing = library.Library("x", "no_such_module_here", {}, 80, 90, named("flash-attn 2").forward, lambda *_: None)
    assert library.lacks(missing, 90) == "not installed"


def test_tensors_on_the_cpu_are_for_our_own_kernels() -> None:
    cu = bounds([3])
    assert library.library_for(torch.zeros(3, 16, dtype=torch.bfloat16), 16, cu, cu) is None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["cuDNN (SDPA)", "FlexAttention"])
def test_what_comes_with_torch_is_the_reference(name: str, dtype: torch.dtype) -> None:
    """The real ones, in float64's company: SDPA by its backend for CPUs, FlexAttention not compiled."""
    use = next(x for x in library.MEASURED if x.name == name)
    module = library.lacks(use, 90)
    assert not isinstance(module, str)
    m, width, kv_width, cu = sum(LENGTHS), N_Q * D, N_KV * D, bounds(LENGTHS)
    qkv = normal(m, width + 2 * kv_width, seed=1).to(dtype)
    q, k, v = qkv.split([width, kv_width, kv_width], 1)
    do, heads = normal(m, width, seed=2).to(dtype), (N_Q, N_KV, SCALE)
    exact = attention(q.double(), k.double(), v.double(), cu, *heads, face="reference")
    plain = attention(q, k, v, cu, *heads, face="reference")
    out, lse = torch.full_like(q, torch.nan), torch.full_like(plain[1], torch.nan)
    library.attention((use, module), q, k, v, cu, *heads, out, lse)
    within_budget("o", out, exact[0], plain[0])
    if dtype is torch.bfloat16:  # torch's kernel for CPUs takes exponentials of bf16 to some 14 bits
        assert float((lse - exact[1]).abs().max()) < 2.0**-13
    else:
        within_budget("lse", lse, exact[1], plain[1])
    if use.backward is None:
        return
    grads = torch.full_like(qkv, torch.nan)
    parts = grads.split([width, kv_width, kv_width], 1)
    library.attention_backward((use, module), do, q, k, v, out, lse, cu, *heads, *parts)
    wide = (t.double() for t in (do, q, k, v))
    exact_grads = attention_backward(*wide, *exact, cu, *heads, face="reference")
    plain_grads = attention_backward(do, q, k, v, *plain, cu, *heads, face="reference")
    for what, *values in zip(("dq", "dk", "dv"), parts, exact_grads, plain_grads, strict=True):
        within_budget(what, *values)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_captured_pass_gives_flex_attention_other_bounds() -> None:
    m, cu = sum(LENGTHS), bounds(LENGTHS)
    q, kv = normal(m, N_Q * D, seed=1), normal(m, N_KV * D, seed=2)
    data = Bounds(m, 9, torch.device("cpu"))
    for new, buffer in data.write(cu.numpy()):
        buffer.copy_(torch.from_numpy(new))
    flex, heads = next(x for x in library.MEASURED if x.name == "FlexAttention"), (N_Q, N_KV, SCALE)
    exact = attention(q, kv, kv, cu, *heads, face="reference")
    out, lse = torch.empty_like(q), torch.empty_like(exact[1])
    library.attention((flex, library.lacks(flex, 90)), q, kv, kv, data, *heads, out, lse)
    torch.testing.assert_close(out, exact[0])
    torch.testing.assert_close(lse, exact[1])


def test_cudnn_takes_these_arguments_and_gives_these_shapes() -> None:
    """The real operators, on tensors without values."""
    q, kv = (torch.empty(36, n, D, dtype=torch.bfloat16, device="meta") for n in (N_Q, N_KV))
    o, lse = sdpa.sdpa_forward(None, q, kv, kv, bounds(LENGTHS), 30, SCALE)
    assert (o.shape, lse.shape, lse.dtype) == (q.shape, (N_Q, 36), torch.float32)
    grads = torch.empty_like(q), torch.empty_like(kv), torch.empty_like(kv)
    sdpa.sdpa_backward(None, q, q, kv, kv, o, lse, bounds(LENGTHS), 30, SCALE, grads)


def test_a_row_names_a_library(installed: Any) -> None:
    names = [x.name for x in library.MEASURED]
    data, plain = Bounds(36, 9, torch.device("cpu")), bounds(LENGTHS)
    for name in ("flash_attn_interface", "flash_attn.flash_attn_interface"):
        installed(name, None)
    first = library.chosen(90)[0].name
    cudnn, flex, fa3 = (names.index(x) + 1 for x in ("cuDNN (SDPA)", "FlexAttention", "flash-attn 3"))
    assert library.usable(90, 0, plain)[0].name == library.usable(90, fa3, plain)[0].name == first  # not installed
    assert library.usable(90, library.OURS, plain) is None
    assert library.usable(90, cudnn, plain)[0].name == "cuDNN (SDPA)"
    assert library.usable(90, cudnn, data)[0].name == first  # one launch a sequence cannot be captured
    assert library.usable(90, flex, data)[0].name == "FlexAttention"
    assert flex in library.FORWARD.choices["use"]
    assert flex not in library.BACKWARD.choices["use"]
    assert library.FORWARD.lacking({"use": fa3}, 90).startswith(("not installed", "cannot be loaded"))
    assert library.FORWARD.lacking({"use": cudnn}, 90) is None
    with gpu_plan.trial("attention.library", 128, {"use": library.OURS}):
        assert library.report(90).startswith("forward our own Triton kernels (by kernels/plans); backward ")
