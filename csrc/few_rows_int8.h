// few_rows.h in tiles for a handful of rows of x and an int8 weight: blocks of the weight are turned in registers,
// widened to fp32, and meet x there with the sums of tiles (Chains, simd/amx.h). For tiles the weight had to be written
// as bf16 first, and they compute sixteen rows.
#pragma once
#include "panels.h"
#include "weight_rows.h"

namespace mint {

// c[M][ldc] = M rows of x * Nv * W rows of a weight, over k elements, whole steps of 32.
template <class S, int M, int Nv>
void int8_tile(const float* x, int64_t ldx, const int8_t* w, int64_t stride, int64_t k, float* c, int64_t ldc,
               Prefetch* next) {
    constexpr int64_t kBlock = 16, kStep = 32;
    typename S::F sums[M][Nv];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < Nv; ++j) sums[i][j] = S::zero();
    for (int64_t s = 0; s < k; s += kStep) {
        typename S::Chains chains[M][Nv];
        for (int64_t at = s; at < s + kStep; at += kBlock) {
            typename S::Words words[Nv][4];
            for (int j = 0; j < Nv; ++j) {
                next->some();  // a line or two: more at once would wait for each other
                S::transpose_words(w + j * S::W * stride + at, stride, words[j]);
            }
            const auto add = [&](int p, auto element) __attribute__((always_inline)) {
                constexpr int e = decltype(element)::value;
                for (int j = 0; j < Nv; ++j) {
                    const auto value = S::template widened<int8_t, e>(words[j][p]);
                    for (int i = 0; i < M; ++i)
                        chains[i][j].add_product(e % 2, S::set1(x[i * ldx + at + 4 * p + e]), value);
                }
            };
            for (int p = 0; p < 4; ++p) {
                add(p, std::integral_constant<int, 0>());
                add(p, std::integral_constant<int, 1>());
                add(p, std::integral_constant<int, 2>());
                add(p, std::integral_constant<int, 3>());
            }
        }
        for (int i = 0; i < M; ++i)
            for (int j = 0; j < Nv; ++j) sums[i][j] = S::add(sums[i][j], chains[i][j].sum());
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < Nv; ++j) S::store(c + i * ldc + j * S::W, sums[i][j]);
}

// Rows of x in fp32; kept by their thread until the next ones are prepared.
template <class S, class T>
class FewRowsInt8 {
    static constexpr int64_t C = Panel<S, T>::kCols;

  public:
    static constexpr int64_t kMost = 3;  // rows: beyond, tiles are faster

    static bool takes(const WeightRows<T>& w, int64_t rows, int64_t k) {
        return w.scales != nullptr && rows <= kMost && k % 32 == 0;
    }
    static int64_t prefetch_calls(int64_t k) { return k / 16 * (C / S::W); }

    void prepare(const T* x, int64_t stride, int64_t rows, int64_t k) {
        rows_ = rows, k_ = k;
        x_ = static_cast<float*>(scratch(Slot::kPanelsA, size_t(rows * k) * sizeof(float) + size_t(C * k)));
        edge_ = reinterpret_cast<int8_t*>(x_ + rows * k);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t v = 0; v < k; v += S::W) S::store(x_ + i * k + v, S::load(x + i * stride + v));
    }

    // See FewRows; without tails.
    void multiply(const WeightRows<T>& w, int64_t first, int64_t cols, float* c, Prefetch* next) const {
        const int8_t* rows = static_cast<const int8_t*>(w.data) + first * w.stride;
        int64_t stride = w.stride;
        if (cols % S::W != 0) {  // whole vectors of columns
            for (int64_t j = 0; j < cols; ++j) std::memcpy(edge_ + j * k_, rows + j * stride, size_t(k_));
            std::memset(edge_ + cols * k_, 0, size_t((C - cols) * k_));
            rows = edge_, stride = k_;
        }
        {
            const typename S::SubnormalsAreZero as_in_tiles;
            tiles(rows_, ceil_div(cols, S::W), rows, stride, c, next);
        }
        for (int64_t i = 0; i < rows_; ++i)
            for (int64_t j = 0; j < cols; ++j) c[i * C + j] *= w.scales[first + j];
    }

  private:
    // int8_tile for m <= M rows and nv vectors.
    template <int M = kMost>
    void tiles(int64_t m, int64_t nv, const int8_t* w, int64_t stride, float* c, Prefetch* next) const {
        if constexpr (M > 1) {
            if (m < M) return tiles<M - 1>(m, nv, w, stride, c, next);
        }
        constexpr int Nv = M <= 2 ? C / S::W : 1;  // what the registers hold beside a block
        if (Nv == nv) return int8_tile<S, M, Nv>(x_, k_, w, stride, k_, c, C, next);
        for (int64_t j = 0; j < nv; ++j)
            int8_tile<S, M, 1>(x_, k_, w + j * S::W * stride, stride, k_, c + j * S::W, C, next);
    }

    int64_t rows_ = 0, k_ = 0;
    float* x_ = nullptr;
    int8_t* edge_ = nullptr;
};

}  // namespace mint
