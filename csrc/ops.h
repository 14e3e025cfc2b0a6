// The list of ops: one #include and one X(...) line per function. Nothing else needs to know a new op.
//
// A function is `template <class S, class T> void name(...)` in namespace mint, S a SIMD vocabulary (simd/scalar.h says
// what each word means) and T float or bf16; its parameters are pointers, int64_t and float. Python calls it as
// `_native.name(dtype, ...)`, dtype 0 for float and 1 for bf16, pointers as integers (0 is null), all positional.
#pragma once

#include "adamw.h"
#include "attention.h"
#include "attention_backward.h"
#include "decode_step.h"
#include "decode_steps.h"
#include "decoder_layer.h"
#include "grouped_linear.h"
#include "logits.h"
#include "lora_gradients.h"
#include "matmul.h"
#include "outer_accumulate.h"
#include "paged_attention.h"
#include "peak.h"
#include "qk_norm_rope.h"
#include "rms_norm.h"
#include "sample_rows.h"
#include "shrink.h"
#include "swiglu.h"
#include "target_logprob.h"

#define MINT_OPS(X)            \
    X(adamw)                   \
    X(adamw_largest)           \
    X(adamw_norm)              \
    X(adamw_places)            \
    X(write_places)            \
    X(attention)               \
    X(attention_backward)      \
    X(decode_step)             \
    X(decode_steps)            \
    X(decoder_layers)          \
    X(decoder_layers_backward) \
    X(grouped_linear)          \
    X(grouped_outer)           \
    X(logit_block)             \
    X(logits)                  \
    X(lora_gradients)          \
    X(matmul)                  \
    X(outer_accumulate)        \
    X(paged_attention)         \
    X(peak)                    \
    X(qk_norm_rope)            \
    X(qk_norm_rope_backward)   \
    X(rms_norm)                \
    X(rms_norm_backward)       \
    X(rms_norm_shrink)         \
    X(sample_rows)             \
    X(swiglu)                  \
    X(swiglu_backward)         \
    X(swiglu_shrink)           \
    X(target_dlogits)          \
    X(target_dlogits_kept)     \
    X(target_logprob)          \
    X(top_logprobs)            \
    X(weight_words)            \
    X(word_panels)
