"""Values for the tests of the wire: recorded bytes, and hypothesis strategies for what travels on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mint_engine.types import (
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    TensorData,
)
from mint_engine.wire import ForwardBackwardRequest

GOLDEN = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "golden").glob("*.json")}

FLOAT32 = st.floats(width=32)  # NaN and infinities too: the engine judges them, not the wire
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
TOKENS = st.integers(0, 2**31 - 1)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=12)
SHAPES = hnp.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=5)


@st.composite
def tensors(draw: st.DrawFn, elements: st.SearchStrategy[float] = FLOAT32) -> TensorData:
    """Dense or sparse, int64 or float32."""
    shape = draw(SHAPES)
    if draw(st.booleans()):
        array = draw(hnp.arrays(np.float32, shape, elements=elements))
    else:
        array = draw(hnp.arrays(np.int64, shape))
    if array.ndim == 2 and draw(st.booleans()):
        return sparse(array)
    return TensorData.from_numpy(array)


def sparse(array: np.ndarray) -> TensorData:
    """CSR of what is not zero."""
    keep = array != 0
    crow = np.concatenate([[0], np.cumsum(keep.sum(axis=1))])
    return TensorData(array[keep], TensorData.from_numpy(array).dtype, array.shape, crow, np.nonzero(keep)[1])


@st.composite
def datums(draw: st.DrawFn) -> Datum:
    """Known inputs with the dtypes the losses want, and unknown ones with any."""
    tokens = draw(st.lists(TOKENS, max_size=6))
    inputs = draw(st.dictionaries(NAMES, tensors(), max_size=2))
    inputs["target_tokens"] = TensorData(draw(st.lists(st.integers(-5, 2**40), max_size=5)), "int64")
    inputs["weights"] = TensorData(draw(st.lists(FLOAT32, max_size=5)), "float32")
    return Datum(ModelInput.from_ints(tokens), inputs)


REQUESTS = st.builds(
    ForwardBackwardRequest,
    model_id=NAMES,
    seq_id=st.none() | st.integers(1, 2**31 - 1),
    data=st.lists(datums(), max_size=3),
    loss_fn=st.sampled_from(["cross_entropy", "ppo", "a loss of tomorrow"]),
    loss_fn_config=st.dictionaries(NAMES, st.floats(-1e300, 1e300), max_size=3),
    forward_only=st.booleans(),
)


@st.composite
def outputs(draw: st.DrawFn) -> ForwardBackwardOutput:
    """Every datum has the same fields, in any shape."""
    names = draw(st.lists(NAMES, min_size=1, max_size=2, unique=True))
    shapes = st.tuples(st.integers(0, 5)) | st.tuples(st.integers(0, 5), st.integers(1, 3))
    arrays = hnp.arrays(np.float32, shapes, elements=FLOAT32)
    datums = draw(st.lists(st.fixed_dictionaries({n: arrays.map(TensorData.from_numpy) for n in names}), max_size=4))
    metrics = draw(st.dictionaries(NAMES, FLOAT32, max_size=3))
    return ForwardBackwardOutput("TorchLossReturn", datums, metrics, draw(st.none() | FINITE))


# JSON that is almost right.
NUMBERS = st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=3)
JSON = st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner))
LISTS = st.lists(NUMBERS, max_size=4) | st.lists(st.integers(-3, 5), max_size=6) | JSON
JSON_TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "data": LISTS, "dtype": st.sampled_from(["int64", "float32", "int32", None]), "shape": LISTS,
        "sparse_crow_indices": LISTS, "sparse_col_indices": LISTS,
    },
)  # fmt: skip
JSON_INPUTS = st.fixed_dictionaries(
    {"chunks": st.lists(st.fixed_dictionaries({"tokens": LISTS}, optional={"type": JSON}), max_size=3) | JSON}
)

CELLS = st.tuples(TOKENS, st.floats(-9999, 0, width=32))
TOPK = st.lists(st.none() | st.lists(CELLS, min_size=1, max_size=3), max_size=4)


@st.composite
def sequences(draw: st.DrawFn) -> SampledSequence:
    tokens = draw(st.lists(TOKENS, max_size=5))
    logprobs = draw(st.none() | st.lists(FINITE, min_size=len(tokens), max_size=len(tokens)))
    return SampledSequence(draw(st.sampled_from(["stop", "length"])), tokens, logprobs, draw(st.none() | TOPK))


RESPONSES = st.builds(
    SampleResponse,
    sequences=st.lists(sequences(), max_size=3),
    prompt_logprobs=st.none() | st.lists(st.none() | FINITE, max_size=5),
    topk_prompt_logprobs=st.none() | TOPK,
    target_prompt_logprobs=st.none() | tensors(),
    prompt_alt_tokens=st.none() | st.builds(PromptAltTokens, tensors(), tensors()),
    prompt_cache_hit_tokens=st.integers(0, 2**31 - 1),
)


def same_datum(a: Datum, b: Datum) -> bool:
    """Chunks may be joined on the way; a tensor keeps its dtype, shape, layout and values."""
    return a.model_input.to_ints() == b.model_input.to_ints() and same_tensors(a.loss_fn_inputs, b.loss_fn_inputs)


def same_tensors(a: dict[str, TensorData], b: dict[str, TensorData]) -> bool:
    return a.keys() == b.keys() and all(
        a[n] == b[n] and a[n].shape == b[n].shape and (a[n].csr is None) == (b[n].csr is None) for n in a
    )
