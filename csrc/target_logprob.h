// Fused unembedding + log-softmax at the targets, and the gradient of its logits.
//
// The vocabulary is cut into blocks whose packed weight fits in half an L2. A thread packs a block once and runs all
// rows of x past it; a tile of logits lives only in cache, as exact fp32 sums. Forward: each (row, block) leaves its
// maximum and its sum of exponentials, and a last pass merges them in block order, so that neither the thread count
// nor the schedule changes a bit. Backward: the tile is computed again and becomes dlogits in place, or is made from
// what the forward kept of it, exp(logit - maximum).
#pragma once
#include <cmath>
#include <limits>

#include "check.h"
#include "gemm.h"
#include "rms_norm.h"  // for_vectors

namespace mint {

constexpr int64_t kTileRows = 96;       // rows of x per tile of logits
constexpr int64_t kRowChunk = 1 << 10;  // rows of x packed at once: bounds the scratch memory

// Columns per block: the packed weight takes about 400 KB.
template <class S, class T>
int64_t vocab_block(int64_t width) {
    using Q = Panel<S, T>;
    const int64_t fit = (int64_t(400) << 10) / (max64(Q::depth(width), 1) * 4) / Q::kCols * Q::kCols;
    return min64(max64(fit, Q::kCols), (512 + Q::kCols - 1) / Q::kCols * Q::kCols);
}

// Calls tile(block, first row, rows, first column, columns, logits, ld) for every tile of x @ weight.T. Tiles of one
// block run in row order on one thread. Columns beyond the vocabulary, up to a multiple of W, are -inf.
template <class S, class T, class Tile>
void for_logit_tiles(const T* x, int64_t x_stride, const T* weight, int64_t w_stride, int64_t rows, int64_t vocab,
                     int64_t width, Tile tile) {
    using Q = Panel<S, T>;
    const int64_t block = vocab_block<S, T>(width), blocks = ceil_div(vocab, block), depth = Q::depth(width);
    const bool turned = better_turned<S, T>(rows, vocab, width);
    Rows left{};
    typename Q::P* panels = nullptr;
    if (turned) {
        panels = panel_scratch<S, T>(Slot::kShared, ceil_div(rows, Q::kCols) * Q::kCols * depth);
        pack_panels<S, T>(x, x_stride, 1, rows, width, panels);
    } else {
        left = left_rows<S, T>(x, x_stride, 1, rows, width, Slot::kShared);
    }
    std::atomic<int64_t> claimed{0};
    Attempts attempts;
#pragma omp parallel if (blocks > 1)
    for_claimed(blocks, claimed, attempts, [&](int64_t b, int64_t following) {
        const int64_t v0 = b * block, cols = min64(block, vocab - v0), v1 = following * block;
        float* c = static_cast<float*>(scratch(Slot::kTile, size_t(kTileRows * (block + Q::kRows)) * 4));
        auto* pb = panel_scratch<S, T>(Slot::kPanelsB, turned ? 16 : block * depth);
        Rows weight_rows{};
        RightPanels<S, T> right(pb);
        if (turned) {
            weight_rows = left_rows<S, T>(weight + v0 * w_stride, w_stride, 1, cols, width, Slot::kPanelsA, true);
        } else {
            right.exact = pack_panels<S, T>(weight + v0 * w_stride, w_stride, 1, cols, width, pb, true);
        }
        Prefetch next;
        if (v1 < vocab)
            next.reads = panels_ahead(weight + v1 * w_stride, w_stride, 1, min64(block, vocab - v1), width,
                                      prefetch_calls<S, T>(rows, cols, depth));
        const typename S::Tiles registers;
        for (int64_t m0 = 0; m0 < rows; m0 += kTileRows) {
            const int64_t n = min64(kTileRows, rows - m0);
            if (turned) {
                float* sums = c + kTileRows * block;
                for (int64_t v = 0; v < cols; v += Q::kRows) {
                    const int64_t count = min64(Q::kRows, cols - v);
                    multiply_rows<S, T, true>(weight_rows.at(v), count, panels + m0 * depth, n, depth, sums, kTileRows,
                                              false, &next);
                    turn<S>(sums, kTileRows, count, n, c + v, block);
                }
            } else {
                for (int64_t i = 0; i < n; i += Q::kRows)
                    multiply_rows<S, T>(left.at(m0 + i), min64(Q::kRows, n - i), right, cols, depth, c + i * block,
                                        block, false, &next);
            }
            for (int64_t i = 0; i < n; ++i)
                for (int64_t v = cols; v < ceil_div(cols, S::W) * S::W; ++v)
                    c[i * block + v] = -std::numeric_limits<float>::infinity();
            tile(b, m0, n, v0, cols, c, block);
        }
    });
    attempts.finish();
}

// *columns = those of a block for rows of `width` elements.
template <class S, class T>
void logit_block(int64_t width, int64_t* columns) {
    *columns = vocab_block<S, T>(width);
}

// What the forward keeps of some rows' logits for the backward: exp(logit - the maximum of its block), rounded to T,
// and the maxima. Row m of x is row at[m], none if that is negative; at null: nothing is kept.
template <class T>
struct KeptRows {
    const int64_t* at;
    T* values;
    int64_t stride;
    float* tops;  // [kept rows, blocks]
};

template <class S, class T>
void target_logprob(const T* x, int64_t x_stride, const T* weight, int64_t w_stride, const int64_t* targets, int64_t k,
                    float* logprob, float* lse, const int64_t* kept_at, T* kept_values, int64_t kept_stride,
                    float* kept_tops, int64_t rows, int64_t vocab, int64_t width) {
    const char* op = "target_logprob";
    check::row_stride(op, "x", x_stride, rows, width);
    check::row_stride(op, "weight", w_stride, vocab, width);
    check::at_least(op, "V", vocab, 1);
    if (rows > kRowChunk) {
        for (int64_t m = 0; m < rows; m += kRowChunk)
            target_logprob<S, T>(x + m * x_stride, x_stride, weight, w_stride, targets + m * k, k, logprob + m * k,
                                 lse + m, kept_at == nullptr ? nullptr : kept_at + m, kept_values, kept_stride,
                                 kept_tops, min64(kRowChunk, rows - m), vocab, width);
        return;
    }
    const KeptRows<T> kept{kept_at, kept_values, kept_stride, kept_tops};
    const int64_t blocks = ceil_div(vocab, vocab_block<S, T>(width));
    float* peak = static_cast<float*>(scratch(Slot::kPartials, size_t(2 * blocks * rows + 1) * 4));
    float* total = peak + blocks * rows;
    for_logit_tiles<S, T>(x, x_stride, weight, w_stride, rows, vocab, width,
                          [=](int64_t b, int64_t m0, int64_t n, int64_t v0, int64_t cols, const float* c, int64_t ld) {
                              const int64_t padded = ceil_div(cols, S::W) * S::W;
                              for (int64_t i = 0; i < n; ++i) {
                                  const int64_t m = m0 + i, at = kept.at == nullptr ? -1 : kept.at[m];
                                  const float* row = c + i * ld;
                                  auto high = S::load(row);
                                  for (int64_t v = S::W; v < padded; v += S::W) high = S::max(high, S::load(row + v));
                                  const float top = S::hmax(high);
                                  const auto shift = S::set1(top == -INFINITY ? 0.0f : top);  // inf - inf is NaN
                                  T* values = at < 0 ? nullptr : kept.values + at * kept.stride + v0;
                                  const auto exponential = [&](int64_t v) __attribute__((always_inline)) {
                                      const auto e = S::exp_fast(S::sub(S::load(row + v), shift));
                                      if (values != nullptr) S::store_n(values + v, e, int(min64(S::W, cols - v)));
                                      return e;
                                  };
                                  auto sum = S::zero(), sum2 = S::zero();
                                  int64_t v = 0;
                                  for (; v + 2 * S::W <= padded; v += 2 * S::W) {
                                      sum = S::add(sum, exponential(v));
                                      sum2 = S::add(sum2, exponential(v + S::W));
                                  }
                                  if (v < padded) sum = S::add(sum, exponential(v));
                                  peak[m * blocks + b] = top;
                                  if (at >= 0) kept.tops[at * blocks + b] = top;
                                  total[m * blocks + b] = S::sum(S::add(sum, sum2));
                                  for (int64_t j = m * k; j < (m + 1) * k; ++j)
                                      if (targets[j] >= v0 && targets[j] < v0 + cols) logprob[j] = row[targets[j] - v0];
                              }
                          });
    for (int64_t m = 0; m < rows; ++m) {
        const float* peaks = peak + m * blocks;
        float top = peaks[0];
        for (int64_t b = 1; b < blocks; ++b) top = peaks[b] > top ? peaks[b] : top;
        double sum = 0;
        for (int64_t b = 0; b < blocks; ++b)
            // A block of -inf alone sums to 0, and its peak minus the top may be NaN; a NaN in a block is a NaN sum.
            if (total[m * blocks + b] != 0.0f)
                sum += double(total[m * blocks + b]) * std::exp(double(peaks[b]) - double(top));
        const double log_sum = double(top) + std::log(sum);
        lse[m] = float(log_sum);
        for (int64_t j = m * k; j < (m + 1) * k; ++j) logprob[j] = targets[j] < 0 ? 0.0f : float(logprob[j] - log_sum);
    }
}

// Some rows of x, [start, stop), and the columns of the border they use: from `column` on, as many as grad [V, width]
// has, rows `stride` apart. A row of the table that kernels/target_logprob/cpu.py makes.
struct Share {
    int64_t start, stop, column, width, grad, stride;
};

// grad[v, c] += sum_i d[i, v] * xb[i, c] for one tile and c < width; rows of xb (fp32) are `border` apart. Sums are
// made with vectors of v, and turned on their way out.
template <class S>
void accumulate_border(const float* d, int64_t ld, int64_t n, int64_t cols, const float* xb, int64_t border,
                       int64_t width, float* grad, int64_t stride) {
    constexpr int W = S::W;
    alignas(64) float sums[W * W], turned[W * W];
    for (int64_t v = 0; v < cols; v += W) {
        for (int64_t c0 = 0; c0 < width; c0 += W) {
            const int count = int(min64(W, width - c0));
            typename S::F acc[W];
            for (auto& a : acc) a = S::zero();
            if (count == W) {
                for (int64_t i = 0; i < n; ++i) {
                    const auto row = S::load(d + i * ld + v);
                    for (int c = 0; c < W; ++c) acc[c] = S::fma(row, S::set1(xb[i * border + c0 + c]), acc[c]);
                }
            } else {
                for (int64_t i = 0; i < n; ++i) {
                    const auto row = S::load(d + i * ld + v);
                    for (int c = 0; c < W; ++c)
                        if (c < count) acc[c] = S::fma(row, S::set1(xb[i * border + c0 + c]), acc[c]);
                }
            }
            for (int c = 0; c < W; ++c) S::store(sums + c * W, acc[c]);
            S::transpose(sums, W * 4, turned, W);
            for (int64_t l = 0; l < min64(W, cols - v); ++l) {
                float* to = grad + (v + l) * stride + c0;
                S::store_n(to, S::add(S::load_n(to, count), S::load(turned + l * W)), count);
            }
        }
    }
}

// The gradient of the logits, whose tiles are made by two ways:
// dlogits[m, v] = sum_k dlogprob[m, k] [v == targets[m, k]] - (sum_k dlogprob[m, k]) exp(logits[m, v] - lse[m]),
// rounded to T for the product with the weight; and from the fp32 values, for each share, grad[v, :] += dlogits.T @ x
// of its rows and its columns of the border, in which other rows' x is 0. dlogprob of a skipped target must be 0.
template <class S, class T>
struct LogitGradients {
    const int64_t* targets;
    int64_t k;
    const float* dlogprob;
    T* dlogits;
    int64_t d_stride;
    const float* xb;  // the border's columns of x, fp32
    int64_t border;
    const Share* shares;
    int64_t count;

    // `x` [rows, border] in fp32, of this thread until its next call.
    static const float* border_of(const T* x, int64_t x_stride, int64_t rows, int64_t border) {
        float* xb = static_cast<float*>(scratch(Slot::kPartials, size_t(rows * border + 1) * 4));
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t c = 0; c < border; ++c) xb[m * border + c] = to_float(x[m * x_stride + c]);
        return xb;
    }

    float sum(int64_t m) const {
        float sum = 0;
        for (int64_t j = m * k; j < (m + 1) * k; ++j) sum += dlogprob[j];
        return sum;
    }

    // c [n, cols] of rows m0 and on, columns v0 and on: the second term of dlogits, to which the first is added here.
    void finish(int64_t m0, int64_t n, int64_t v0, int64_t cols, float* c, int64_t ld) const {
        for (int64_t i = 0; i < n; ++i) {
            const int64_t m = m0 + i;
            float* row = c + i * ld;
            for (int64_t j = m * k; j < (m + 1) * k; ++j)
                if (targets[j] >= v0 && targets[j] < v0 + cols) row[targets[j] - v0] += dlogprob[j];
            T* out = dlogits + m * d_stride + v0;
            for_vectors<S>(cols, [&](int64_t v, int lanes) __attribute__((always_inline)) {
                S::store_n(out + v, S::load_n(row + v, lanes), lanes);
            });
        }
        for (const Share* s = shares; s < shares + count; ++s) {
            const int64_t begin = max64(s->start, m0), end = min64(s->stop, m0 + n);
            if (begin < end)
                accumulate_border<S>(c + (begin - m0) * ld, ld, end - begin, cols, xb + begin * border + s->column,
                                     border, s->width, reinterpret_cast<float*>(s->grad) + v0 * s->stride, s->stride);
        }
    }
};

// dlogits from logits computed again.
template <class S, class T>
void target_dlogits(const T* x, int64_t x_stride, const T* weight, int64_t w_stride, const int64_t* targets, int64_t k,
                    const float* dlogprob, const float* lse, T* dlogits, int64_t d_stride, int64_t border,
                    const int64_t* shares, int64_t count, int64_t rows, int64_t vocab, int64_t width) {
    const char* op = "target_dlogits";
    check::row_stride(op, "x", x_stride, rows, width);
    check::row_stride(op, "weight", w_stride, vocab, width);
    check::row_stride(op, "dlogits", d_stride, rows, vocab);
    const float* xb = LogitGradients<S, T>::border_of(x + width - border, x_stride, rows, border);
    const LogitGradients<S, T> to{
        targets, k, dlogprob, dlogits, d_stride, xb, border, reinterpret_cast<const Share*>(shares), count};
    for_logit_tiles<S, T>(x, x_stride, weight, w_stride, rows, vocab, width,
                          [=](int64_t, int64_t m0, int64_t n, int64_t v0, int64_t cols, float* c, int64_t ld) {
                              for (int64_t i = 0; i < n; ++i) {
                                  float* row = c + i * ld;
                                  const auto shift = S::set1(lse[m0 + i]), scale = S::set1(-to.sum(m0 + i));
                                  for (int64_t v = 0; v < cols; v += S::W)
                                      S::store(row + v, S::mul(scale, S::exp_fast(S::sub(S::load(row + v), shift))));
                              }
                              to.finish(m0, n, v0, cols, c, ld);
                          });
}

// dlogits from what the forward kept, in its place: row m comes from row at[m] of `values`, ascending, and becomes row
// m. At a target the probability is that of the forward, unrounded: where it is nearly 1, the difference counts.
// block: the columns that share a maximum; x_border: the columns of x that meet the border.
template <class S, class T>
void target_dlogits_kept(const int64_t* at, T* values, int64_t stride, const float* tops, int64_t block,
                         const int64_t* targets, int64_t k, const float* logprob, const float* dlogprob,
                         const float* lse, const T* x_border, int64_t x_stride, int64_t border, const int64_t* shares,
                         int64_t count, int64_t rows, int64_t vocab) {
    const char* op = "target_dlogits_kept";
    check::row_stride(op, "values", stride, rows, vocab);
    check::at_least(op, "block", block, 1);
    const float* xb = LogitGradients<S, T>::border_of(x_border, x_stride, rows, border);
    const LogitGradients<S, T> to{
        targets, k, dlogprob, values, stride, xb, border, reinterpret_cast<const Share*>(shares), count};
    const int64_t blocks = ceil_div(vocab, block), ld = ceil_div(block, S::W) * S::W;
    Attempts attempts;
#pragma omp parallel for schedule(static) if (blocks > 1)
    for (int64_t b = 0; b < blocks; ++b) {
        attempts.run([&] {
            const int64_t v0 = b * block, cols = min64(block, vocab - v0);
            float* c = static_cast<float*>(scratch(Slot::kTile, size_t(kTileRows * ld) * 4));
            for (int64_t m0 = 0; m0 < rows; m0 += kTileRows) {
                const int64_t n = min64(kTileRows, rows - m0);
                for (int64_t i = 0; i < n; ++i) {
                    const int64_t m = m0 + i;
                    const T* row = values + at[m] * stride + v0;
                    float* out = c + i * ld;
                    const float top = tops[at[m] * blocks + b], sum = to.sum(m);
                    // A block of -inf alone was kept as zeros, and lse may be -inf too.
                    const auto scale = S::set1(-sum * (top == -INFINITY ? 0.0f : std::exp(top - lse[m])));
                    for_vectors<S>(cols, [&](int64_t v, int lanes) __attribute__((always_inline)) {
                        S::store(out + v, S::mul(scale, S::load_n(row + v, lanes)));
                    });
                    for (int64_t j = m * k; j < (m + 1) * k; ++j)
                        if (targets[j] >= v0 && targets[j] < v0 + cols)
                            out[targets[j] - v0] = -sum * std::exp(logprob[j]);
                }
                to.finish(m0, n, v0, cols, c, ld);
            }
        });
    }
    attempts.finish();
}

}  // namespace mint
