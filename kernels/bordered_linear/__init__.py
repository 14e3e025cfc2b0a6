"""A frozen linear layer and its LoRA adapters as single GEMMs over one bordered buffer.

For a frozen weight ``W [N, K]`` and an adapter ``A [r, K]``, ``B [N, r]``, scale ``s = alpha / r``, one buffer holds
``[[W, B], [A, 0]]`` with ``p`` border rows and columns. Then

    forward    S = s * X Aᵀ,   Y  = [X | S]   @ buf[:N, :K+p]ᵀ
    backward   dS = s * dY B,  dX = [dY | dS] @ buf[:N+p, :K]

are algebraically exact, cost ``p / K`` more FLOPs, move no extra memory and round once. ``S`` lives in the tail
columns of X's own buffer and ``dS`` in dY's. Several adapters take disjoint columns, with zeros in the rows of the
others.
"""

from torch import Tensor

from . import reference

__all__ = ["bordered_linear", "bordered_linear_backward", "expand_backward", "shrink"]


def shrink(x: Tensor, a: Tensor, scale: float, *, out: Tensor) -> Tensor:
    """``out[M, r] = scale * x[M, K] @ a[r, K]ᵀ``, in the working dtype (fp32 accumulation inside the GEMM)."""
    return reference.shrink(x, a, scale, out)


def bordered_linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """``y[M, N] = x[M, K+p] @ weight[N, K+p]ᵀ (+ bias[N])``: base and adapters in one GEMM.

    ``x`` carries S in its last p columns and ``weight`` carries B there; both may be views with any row stride.
    """
    return reference.bordered_linear(x, weight, bias)


def bordered_linear_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """``dx[M, K] = dy[M, N+p] @ weight[N+p, K]``: ``dy`` carries dS in its last p columns, ``weight`` A in its last rows."""
    return reference.bordered_linear_backward(dy, weight)


def expand_backward(dy: Tensor, b: Tensor, scale: float, *, out: Tensor) -> Tensor:
    """``out[M, r] = scale * dy[M, N] @ b[N, r]``: the gradient of S."""
    return reference.expand_backward(dy, b, scale, out)
