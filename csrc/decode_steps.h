// Decode steps one after the other, with the draws between them, in one call: decode_step.h and sample_rows.h.
#pragma once
#include <chrono>
#include <cmath>

#include "decode_step.h"
#include "sample_rows.h"

namespace mint {

// Whether some row ends with the token it has just drawn: one of its stops [n_stops] (-1: none), or of a row whose
// logits were no distribution.
inline bool row_ends(const int64_t* tokens, const float* logprobs, const int64_t* stops, int64_t n_stops,
                     int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
        if (!std::isfinite(logprobs[i])) return true;
        for (int64_t s = 0; s < n_stops; ++s)
            if (stops[i * n_stops + s] == tokens[i]) return true;
    }
    return false;
}

// drawn [steps + 1, rows]: the rows' tokens, and what each step draws; lengths: of the first step, and at the end of
// the last; uniforms [steps, rows], logprobs [steps, rows]. `done` counts the steps: no further one is begun when a row
// has ended, after so many seconds, or while *interrupted (may be null) is not 0. The rest is decode_step's, with all
// rows wanted, and sample_rows's.
template <class S, class T>
void decode_steps(int64_t* drawn, const T* embedding, int64_t embedding_stride, const int64_t* layers, int64_t n_layers,
                  const int64_t* head, int64_t word_columns, const float* cos, int64_t cos_stride, const float* sin,
                  int64_t sin_stride, int64_t positions, T* k_pool, T* v_pool, int64_t n_blocks, int64_t block,
                  const int32_t* table, int64_t table_stride, int64_t max_blocks, int32_t* lengths,
                  const int64_t* segments, const float* scales, int64_t n_segments, const int64_t* words,
                  const int64_t* all_rows, float* logits, int64_t rows, int64_t hidden, int64_t ffn, int64_t n_q,
                  int64_t n_kv, int64_t d, int64_t vocab, float eps, float scale, const float* temperature,
                  const int64_t* top_k, const double* top_p, const double* uniforms, const int64_t* stops,
                  int64_t n_stops, const int32_t* interrupted, float seconds, int64_t steps, float* logprobs,
                  int64_t* done) {
    const char* op = "decode_steps";
    for (int64_t i = 0; i < rows; ++i) {  // of the first step decode_step sees to it
        const int64_t last = lengths[i] + max64(steps, 1) - 2;
        check::at_least(op, "positions of cos and sin", positions, last + 1);
        check::at_least(op, "tokens that block_table has room for", max_blocks * block, last + 1);
        if (lengths[i] > 0) check::at_least(op, "block_table", table[i * table_stride + last / block], 0);
    }
    const auto begun = std::chrono::steady_clock::now();
    for (*done = 0; *done < steps;) {
        const int64_t *tokens = drawn + *done * rows, at = *done * rows;
        decode_step<S, T>(tokens, embedding, embedding_stride, layers, n_layers, head, word_columns, cos, cos_stride,
                          sin, sin_stride, positions, k_pool, v_pool, n_blocks, block, table, table_stride, max_blocks,
                          lengths, segments, segments, scales, n_segments, words, all_rows, rows, logits, rows, hidden,
                          ffn, n_q, n_kv, d, vocab, eps, scale);
        sample_rows<S, float>(logits, vocab, temperature, top_k, top_p, uniforms + at, drawn + at + rows, logprobs + at,
                              rows, vocab);
        ++*done;
        if (row_ends(drawn + at + rows, logprobs + at, stops, n_stops, rows)) break;
        if (interrupted != nullptr && __atomic_load_n(interrupted, __ATOMIC_RELAXED) != 0) break;
        if (std::chrono::duration<float>(std::chrono::steady_clock::now() - begun).count() >= seconds) break;
        if (*done < steps)
            for (int64_t i = 0; i < rows; ++i) ++lengths[i];
    }
}

}  // namespace mint
