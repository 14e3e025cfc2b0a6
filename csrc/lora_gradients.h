// What the adapters of a bordered linear need in the backward: dS = scale * dY B, dB += dYᵀ S, dA += dSᵀ X, for one
// adapter or for several that have rows of their own, in one parallel region.
//
// Tokens go by in blocks that fit in L2, and all three products take their share of a block before the next one comes:
// dY and X pass through memory once. Sums of a block start from zero and are added to dB and dA in the order of the
// blocks, so no bit depends on the threads, nor on whose rows lie beside.
#pragma once
#include "check.h"
#include "outer_accumulate.h"

namespace mint {

constexpr int64_t kTokenBlock = 512;

// Of one adapter: its rows of all operands. B_j and dB_j are found by the `Jobs` below.
template <class T>
struct GradientJob {
    const T *dy, *s;
    T* ds;
    const T* x;  // null: dA is left out
    float* da;
    int64_t rows, rank;
    float scale;
};

// A factor of module j: B_j [rows of j, rank] or dB_j.
template <class P>
struct Factor {
    P* data;
    int64_t stride;
};

// Row strides, K, and the modules' rows: what all jobs share.
struct GradientShape {
    int64_t dy_stride, s_stride, ds_stride, x_stride, k, da_stride, modules;
};

template <class S, class T>
class AdapterGradients {
    using Q = Panel<S, T>;
    static constexpr int64_t kRowsOfTask = 64, kColsOfTask = 6 * Q::kCols;

  public:
    explicit AdapterGradients(GradientShape shape) : g(shape) {}

    // Jobs: count; rows_of(j), rows of module j; job(i), a GradientJob; b(i, j) and db(i, j), Factors.
    template <class Jobs>
    void narrow_and_b(const Jobs& jobs) {
        run(jobs, true);
    }
    template <class Jobs>
    void only_a(const Jobs& jobs) {
        run(jobs, false);
    }

  private:
    const GradientShape g;

    static int64_t columns(int64_t rank) { return ceil_div(rank, Q::kCols) * Q::kCols; }

    // Where the packed B of module j of job i begins; of job `count`: how much there is.
    template <class Jobs>
    int64_t packed_at(const Jobs& jobs, int64_t i, int64_t j) const {
        int64_t depths = 0, before = 0, at = 0;
        for (int64_t l = 0; l < g.modules; ++l) {
            before += l < j ? Q::depth(jobs.rows_of(l)) : 0;
            depths += Q::depth(jobs.rows_of(l));
        }
        for (int64_t l = 0; l < i; ++l) at += columns(jobs.job(l).rank) * depths;
        return i < jobs.count ? at + columns(jobs.job(i).rank) * before : at;
    }

    template <class Jobs>
    void run(const Jobs& jobs, bool all) {
        int64_t most = 0, work = 0, pieces = 0;
        for (int64_t i = 0; i < jobs.count; ++i) {
            const GradientJob<T> job = jobs.job(i);
            most = max64(most, job.rows);
            work += job.rows * job.rank * g.modules * g.k;
        }
        for (int64_t j = 0; j < g.modules; ++j) pieces += ceil_div(jobs.rows_of(j), kColsOfTask);
        const int64_t pieces_a = ceil_div(g.k, kColsOfTask);
        using P = typename Q::P;
        P* packed = all ? panel_scratch<S, T>(Slot::kShared, packed_at(jobs, jobs.count, 0)) : nullptr;
        Attempts attempts;
#pragma omp parallel if (work > kSerialWork * 4)
        {
            const typename S::Tiles registers;
            if (all) {
#pragma omp for schedule(static)
                for (int64_t t = 0; t < jobs.count * g.modules; ++t) {
                    const int64_t i = t / g.modules, j = t % g.modules;
                    const auto b = jobs.b(i, j);
                    pack_panels<S, T>(b.data, 1, b.stride, jobs.job(i).rank, jobs.rows_of(j),
                                      packed + packed_at(jobs, i, j));
                }
            }
            for (int64_t m0 = 0; m0 < most; m0 += kTokenBlock) {
                const int64_t row_tasks = ceil_div(min64(kTokenBlock, most - m0), kRowsOfTask);
                const int64_t per_job = row_tasks + pieces;
                if (all) {
#pragma omp for schedule(dynamic, 1)
                    for (int64_t t = 0; t < jobs.count * per_job; ++t) {
                        const int64_t i = t / per_job, piece = t % per_job;
                        attempts.run([&] {
                            if (piece < row_tasks) {
                                narrow(jobs, i, m0 + piece * kRowsOfTask, packed);
                            } else {
                                tall(jobs, i, piece - row_tasks, m0);
                            }
                        });
                    }
                }
#pragma omp for schedule(dynamic, 1)
                for (int64_t t = 0; t < jobs.count * pieces_a; ++t)
                    attempts.run([&] { wide(jobs, t / pieces_a, t % pieces_a, m0); });
            }
        }
        attempts.finish();
    }

    // dS of the rows from m0 on.
    template <class Jobs>
    void narrow(const Jobs& jobs, int64_t i, int64_t m0, const typename Q::P* packed) const {
        const GradientJob<T> job = jobs.job(i);
        const int64_t rows = min64(kRowsOfTask, job.rows - m0), ld = columns(job.rank);
        if (rows <= 0) return;
        float* c = static_cast<float*>(scratch(Slot::kTile, size_t(Q::kRows * ld) * 4));
        const auto scale = S::set1(job.scale);
        Prefetch none;
        const T* dy = job.dy + m0 * g.dy_stride;
        for (int64_t j = 0; j < g.modules; dy += jobs.rows_of(j++)) {
            const int64_t n = jobs.rows_of(j);
            const Rows left = left_rows<S, T>(dy, g.dy_stride, 1, rows, n, Slot::kPanelsA);
            const auto* panels = packed + packed_at(jobs, i, j);
            for (int64_t r = 0; r < rows; r += Q::kRows) {
                const int64_t some = min64(Q::kRows, rows - r);
                multiply_rows<S, T>(left.at(r), some, panels, job.rank, Q::depth(n), c, ld, false, &none);
                for (int64_t l = 0; l < some; ++l) {
                    T* out = job.ds + (m0 + r + l) * g.ds_stride + j * job.rank;
                    for_vectors<S>(job.rank, [&](int64_t v, int lanes) __attribute__((always_inline)) {
                        S::store_n(out + v, S::mul(S::load_n(c + l * ld + v, lanes), scale), lanes);
                    });
                }
            }
        }
    }

    // A piece of dB over the tokens from m0 on.
    template <class Jobs>
    void tall(const Jobs& jobs, int64_t i, int64_t piece, int64_t m0) const {
        const GradientJob<T> job = jobs.job(i);
        const int64_t tokens = min64(kTokenBlock, job.rows - m0);
        if (tokens <= 0) return;
        int64_t j = 0, row = 0;
        for (; piece >= ceil_div(jobs.rows_of(j), kColsOfTask); row += jobs.rows_of(j++))
            piece -= ceil_div(jobs.rows_of(j), kColsOfTask);
        const int64_t begin = piece * kColsOfTask, cols = min64(kColsOfTask, jobs.rows_of(j) - begin);
        const auto db = jobs.db(i, j);
        const Rows left =
            left_rows<S, T>(job.s + m0 * g.s_stride + j * job.rank, 1, g.s_stride, job.rank, tokens, Slot::kPanelsA);
        add_tall<S, T>(left, job.rank, job.dy + m0 * g.dy_stride + row + begin, g.dy_stride, cols, tokens,
                       db.data + begin * db.stride, db.stride, 1.0f);
    }

    // A piece of dA over the tokens from m0 on.
    template <class Jobs>
    void wide(const Jobs& jobs, int64_t i, int64_t piece, int64_t m0) const {
        const GradientJob<T> job = jobs.job(i);
        const int64_t tokens = min64(kTokenBlock, job.rows - m0), begin = piece * kColsOfTask;
        if (tokens <= 0 || job.x == nullptr) return;
        const int64_t cols = min64(kColsOfTask, g.k - begin), p = g.modules * job.rank, depth = Q::depth(tokens);
        const Rows left = left_rows<S, T>(job.ds + m0 * g.ds_stride, 1, g.ds_stride, p, tokens, Slot::kPanelsA);
        auto* panels = panel_scratch<S, T>(Slot::kPanelsB, kColsOfTask * depth);
        pack_beside<S, T>(job.x + m0 * g.x_stride + begin, g.x_stride, cols, tokens, panels);
        float* c = static_cast<float*>(scratch(Slot::kTile, size_t(Q::kRows * kColsOfTask) * 4));
        Prefetch none;
        for (int64_t r = 0; r < p; r += Q::kRows) {
            const int64_t some = min64(Q::kRows, p - r);
            multiply_rows<S, T>(left.at(r), some, panels, cols, depth, c, kColsOfTask, false, &none);
            for (int64_t l = 0; l < some; ++l) {
                float* row = job.da + (r + l) * g.da_stride + begin;
                for_vectors<S>(cols, [&](int64_t v, int lanes) __attribute__((always_inline)) {
                    S::store_n(row + v, S::add(S::load_n(row + v, lanes), S::load_n(c + l * kColsOfTask + v, lanes)),
                               lanes);
                });
            }
        }
    }
};

// One adapter, whose factors are anywhere: a row of the table for each of the modules stacked on N: N_j, B_j's address
// and row stride, dB_j's address and row stride.
template <class T>
struct OneJob {
    GradientJob<T> one;
    const int64_t* modules;
    int64_t count = 1;

    int64_t rows_of(int64_t j) const { return modules[j * 5]; }
    GradientJob<T> job(int64_t) const { return one; }
    Factor<const T> b(int64_t, int64_t j) const {
        return {reinterpret_cast<const T*>(modules[j * 5 + 1]), modules[j * 5 + 2]};
    }
    Factor<float> db(int64_t, int64_t j) const {
        return {reinterpret_cast<float*>(modules[j * 5 + 3]), modules[j * 5 + 4]};
    }
};

// x and da may be null.
template <class S, class T>
void lora_gradients(const T* dy, int64_t dy_stride, const T* s, int64_t s_stride, T* ds, int64_t ds_stride,
                    const int64_t* modules, int64_t count, float scale, const T* x, int64_t x_stride, int64_t k,
                    float* da, int64_t da_stride, int64_t rows, int64_t rank) {
    const char* op = "lora_gradients";
    int64_t n = 0;
    for (int64_t j = 0; j < count; ++j) n += modules[j * 5];
    check::row_stride(op, "dy", dy_stride, rows, n);
    check::row_stride(op, "s", s_stride, rows, count * rank);
    check::row_stride(op, "ds", ds_stride, rows, count * rank);
    const OneJob<T> jobs{{dy, s, ds, x, da, rows, rank, scale}, modules};
    AdapterGradients<S, T>({dy_stride, s_stride, ds_stride, x_stride, k, da_stride, count}).narrow_and_b(jobs);
}

}  // namespace mint
