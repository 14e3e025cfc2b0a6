"""The engine's kernels: one folder per op, each with a plain-torch reference and faster faces (see ``op.py``)."""

from mint_engine.kernels.adamw import (
    Places,
    adamw_,
    adamw_largest,
    adamw_norm,
    adamw_places_,
    hyperparameters,
    write_places_,
)
from mint_engine.kernels.attention import attention, attention_backward
from mint_engine.kernels.bordered_by_tile import bordered_by_tile, bordered_by_tile_backward
from mint_engine.kernels.bordered_linear import (
    Shrink,
    bordered_linear,
    bordered_linear_backward,
    expand_backward,
    shrink,
)
from mint_engine.kernels.decode_step import (
    StepAdapters,
    StepModel,
    Words,
    decode_step,
    decode_step_supported,
    decode_words,
)
from mint_engine.kernels.decode_steps import StepDraws, decode_steps
from mint_engine.kernels.decoder_layer import (
    LayerCall,
    decoder_layer_supported,
    decoder_layers,
    decoder_layers_backward,
    op_by_op,
)
from mint_engine.kernels.embedding import embedding
from mint_engine.kernels.grouped_linear import grouped_linear, grouped_outer
from mint_engine.kernels.lora_gradients import lora_gradients
from mint_engine.kernels.op import faces, force_face, isa
from mint_engine.kernels.outer_accumulate import outer_accumulate
from mint_engine.kernels.paged_attention import paged_attention
from mint_engine.kernels.pages import Arena
from mint_engine.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_backward, qk_norm_rope_cached
from mint_engine.kernels.rms_norm import rms_norm, rms_norm_backward
from mint_engine.kernels.sample_head import sample_head
from mint_engine.kernels.sample_rows import sample_rows, top_logprobs
from mint_engine.kernels.swiglu import swiglu, swiglu_backward
from mint_engine.kernels.target_logprob import (
    BorderShare,
    Kept,
    Labels,
    logits,
    target_logprob,
    target_logprob_backward,
    target_logprob_with_gradient,
)

__all__ = [
    "Arena",
    "BorderShare",
    "Kept",
    "Labels",
    "LayerCall",
    "Places",
    "Shrink",
    "StepAdapters",
    "StepDraws",
    "StepModel",
    "Words",
    "adamw_",
    "adamw_largest",
    "adamw_norm",
    "adamw_places_",
    "attention",
    "attention_backward",
    "bordered_by_tile",
    "bordered_by_tile_backward",
    "bordered_linear",
    "bordered_linear_backward",
    "decode_step",
    "decode_step_supported",
    "decode_steps",
    "decode_words",
    "decoder_layer_supported",
    "decoder_layers",
    "decoder_layers_backward",
    "embedding",
    "expand_backward",
    "faces",
    "force_face",
    "grouped_linear",
    "grouped_outer",
    "hyperparameters",
    "isa",
    "logits",
    "lora_gradients",
    "op_by_op",
    "outer_accumulate",
    "paged_attention",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "qk_norm_rope_cached",
    "rms_norm",
    "rms_norm_backward",
    "sample_head",
    "sample_rows",
    "shrink",
    "swiglu",
    "swiglu_backward",
    "target_logprob",
    "target_logprob_backward",
    "target_logprob_with_gradient",
    "top_logprobs",
    "write_places_",
]
