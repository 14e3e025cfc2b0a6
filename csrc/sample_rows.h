// From rows of logits to tokens: temperature, top-k, top-p, a draw, and log-probabilities. Nothing is sorted but the
// few entries at a filter's edge.
//
// A row becomes y = (z - max) / temperature <= 0 and e = exp(y), both in cache. Entries are ordered by y, the larger
// first, then by token, the smaller first. A filter's edge is found by a histogram over the bits of |y| (a bin is 1/16
// of an octave: non-negative floats are ordered as their bits are): counts or masses say in which bin it lies, and that
// bin alone is sorted. e beyond the edge becomes 0, and the draw is the inverse of the cumulative sum in token order:
// first over blocks, then inside one. A block is summed in fp32, blocks in float64. A row is one thread's: it never
// depends on the others.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_tile.h"  // Bump
#include "check.h"
#include "parallel.h"
#include "rms_norm.h"  // for_vectors, row_sum
#include "scratch.h"

namespace mint {

template <class S, class T>
struct RowSampler {
    using F = typename S::F;
    static constexpr int64_t kBlock = 256, kBins = 1 << 12;
    static constexpr int kShift = 19;

    struct Place {  // in the order of likelihood; a type of this template, so that std::sort is too
        uint32_t key;
        uint32_t token;
        bool operator<(const Place& other) const {
            return key < other.key || (key == other.key && token < other.token);
        }
    };

    int64_t vocab, blocks;
    float *y, *e;     // [blocks * kBlock]; e is 0 beyond the vocabulary
    double* sums;     // [blocks], cumulative
    double* mass;     // [kBins]
    uint32_t* count;  // [kBins]
    Place* found;     // [vocab]

    size_t place(char* base) {
        Bump b{base, 0};
        y = take<float>(b, blocks * kBlock);
        e = take<float>(b, blocks * kBlock);
        sums = take<double>(b, blocks);
        mass = take<double>(b, kBins);
        count = take<uint32_t>(b, kBins);
        found = take<Place>(b, vocab);
        return b.used;
    }

    // log(sum_v exp(y[v])): NaN if a logit is NaN or +inf, or all are -inf.
    double load(const T* z, float temperature) {
        F most = S::set1(-std::numeric_limits<float>::infinity());
        int64_t v = 0;
        for (; v + S::W <= vocab; v += S::W) most = S::max(S::load(z + v), most);
        float top = S::hmax(most);
        for (; v < vocab; ++v) top = to_float(z[v]) > top ? to_float(z[v]) : top;
        // A temperature that is no normal number would make 0 / 0 of the maximum.
        const F shift = S::set1(top), divisor = S::set1(temperature > 1e-30f ? temperature : 1e-30f);
        for_vectors<S>(vocab, [&](int64_t i, int n) __attribute__((always_inline)) {
            F x = S::sub(S::load_n(z + i, n), shift);
            if (temperature != 1.0f) x = S::div(x, divisor);
            S::store_n(y + i, x, n);
            S::store_n(e + i, S::exp(x), n);
        });
        std::memset(e + vocab, 0, size_t(blocks * kBlock - vocab) * sizeof(float));
        sum_blocks();
        return std::log(sums[blocks - 1]);
    }

    void sum_blocks() {
        double total = 0;
        for (int64_t b = 0; b < blocks; ++b) {
            const float* p = e + b * kBlock;
            total += row_sum<S>(kBlock, [=](int64_t i, int) __attribute__((always_inline)) { return S::load(p + i); });
            sums[b] = total;
        }
    }

    uint32_t key(int64_t v) const { return float_to_bits(y[v]) & 0x7fffffffu; }

    int64_t likeliest() const {
        for (int64_t v = 0; v < vocab; ++v)
            if (y[v] == 0.0f) return v;
        return 0;
    }

    void histogram() {
        std::memset(count, 0, kBins * sizeof(count[0]));
        std::memset(mass, 0, kBins * sizeof(mass[0]));
        for (int64_t v = 0; v < vocab; ++v) {
            const uint32_t bin = key(v) >> kShift;
            ++count[bin];
            mass[bin] += double(e[v]);
        }
    }

    // The entries of a bin up to `last`, in order, to `found`.
    int64_t sort_bin(uint32_t bin, Place last) {
        int64_t n = 0;
        for (int64_t v = 0; v < vocab; ++v) {
            const Place p{key(v), uint32_t(v)};
            if (p.key >> kShift == bin && !(last < p)) found[n++] = p;
        }
        std::sort(found, found + n);
        return n;
    }

    // The k-th entry, 1 <= k <= vocab; `kept` becomes the mass up to it. After histogram().
    Place kth(int64_t k, double* kept) {
        uint32_t bin = 0;
        *kept = 0;
        for (; int64_t(count[bin]) < k; ++bin) k -= count[bin], *kept += mass[bin];
        sort_bin(bin, {~0u, ~0u});
        for (int64_t i = 0; i < k; ++i) *kept += double(e[found[i].token]);
        return found[k - 1];
    }

    // The last of the smallest set, not beyond `last`, whose mass reaches `target`.
    Place reaching(double target, Place last) {
        const uint32_t end = uint32_t(std::min<int64_t>(last.key >> kShift, kBins - 1));
        double before = 0;
        uint32_t bin = 0;
        for (; bin < end && before + mass[bin] < target; ++bin) before += mass[bin];
        const int64_t n = sort_bin(bin, last);
        int64_t i = 0;
        for (; i < n && (i == 0 || before < target); ++i) before += double(e[found[i].token]);
        return i > 0 ? found[i - 1] : last;
    }

    // Sets e to 0 outside the filters. top_k < 1 and top_p >= 1 are off.
    void filter(int64_t top_k, double top_p) {
        Place last{~0u, ~0u};
        double kept = sums[blocks - 1];
        histogram();
        if (top_k >= 1 && top_k < vocab) last = kth(top_k, &kept);
        if (top_p < 1.0) last = reaching(top_p * kept, last);
        for (int64_t v = 0; v < vocab; ++v) {
            const uint32_t k = key(v);
            const bool stays = k < last.key || (k == last.key && uint32_t(v) <= last.token);
            e[v] = stays ? e[v] : 0.0f;
        }
        sum_blocks();
    }

    // The first token with u * sum(e) < cumulative sum of e. None whose e is 0.
    int64_t draw(double u) const {
        const double target = u * sums[blocks - 1];
        int64_t b = 0;
        while (b + 1 < blocks && !(sums[b] > target)) ++b;
        // Rounding may leave the target at the total: then the last entry that adds anything.
        while (b > 0 && sums[b] == sums[b - 1]) --b;
        double sum = b > 0 ? sums[b - 1] : 0.0;
        int64_t chosen = 0;
        for (int64_t v = b * kBlock; v < (b + 1) * kBlock; ++v) {
            if (e[v] == 0.0f) continue;
            chosen = v, sum += double(e[v]);
            if (sum > target) break;
        }
        return chosen;
    }
};

// Calls run(sampler, row) for every row, each on one thread.
template <class S, class T, class Run>
void for_sampled_rows(int64_t rows, int64_t vocab, Run run) {
    using R = RowSampler<S, T>;
    R shared{vocab, ceil_div(vocab, R::kBlock), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    const size_t bytes = shared.place(nullptr);
    Attempts attempts;
#pragma omp parallel if (rows > 1 && rows * vocab > kSerialWork)
    {
        R mine = shared;
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < rows; ++r) {
            attempts.run([&] {
                mine.place(static_cast<char*>(scratch(Slot::kTile, bytes)));
                run(mine, r);
            });
        }
    }
    attempts.finish();
}

// tokens[r] drawn from logits[r, :vocab], and its tempered log-probability (temperature 0: the likeliest, at 1). NaN
// and token 0 where a row is no distribution.
template <class S, class T>
void sample_rows(const T* logits, int64_t stride, const float* temperature, const int64_t* top_k, const double* top_p,
                 const double* uniforms, int64_t* tokens, float* logprobs, int64_t rows, int64_t vocab) {
    check::row_stride("sample_rows", "logits", stride, rows, vocab);
    check::at_least("sample_rows", "V", vocab, 1);
    for_sampled_rows<S, T>(rows, vocab, [=](RowSampler<S, T>& sampler, int64_t r) {
        const bool greedy = temperature[r] == 0.0f;
        const double log_sum = sampler.load(logits + r * stride, greedy ? 1.0f : temperature[r]);
        const bool broken = log_sum != log_sum;
        int64_t token = 0;
        if (greedy && !broken) {  // a NaN among finite logits hides behind their maximum
            token = sampler.likeliest();
        } else if (!broken) {
            if ((top_k[r] >= 1 && top_k[r] < vocab) || top_p[r] < 1.0) sampler.filter(top_k[r], top_p[r]);
            token = sampler.draw(uniforms[r]);
        }
        tokens[r] = token;
        logprobs[r] = float(double(sampler.y[token]) - log_sum);
    });
}

// The k likeliest tokens of each row, in order, and their tempered log-probabilities: [rows, k] both, 1 <= k <= vocab.
template <class S, class T>
void top_logprobs(const T* logits, int64_t stride, const float* temperature, int64_t* tokens, float* logprobs,
                  int64_t k, int64_t rows, int64_t vocab) {
    check::row_stride("top_logprobs", "logits", stride, rows, vocab);
    check::at_least("top_logprobs", "k", k, 1);
    check::at_least("top_logprobs", "V", vocab, k);
    for_sampled_rows<S, T>(rows, vocab, [=](RowSampler<S, T>& sampler, int64_t r) {
        using Place = typename RowSampler<S, T>::Place;
        const double log_sum = sampler.load(logits + r * stride, temperature[r] == 0.0f ? 1.0f : temperature[r]);
        double mass = 0;
        int64_t n = 0;
        if (log_sum == log_sum) {
            sampler.histogram();
            const Place last = sampler.kth(k, &mass);
            for (int64_t v = 0; v < vocab; ++v) {
                const Place p{sampler.key(v), uint32_t(v)};
                if (!(last < p)) sampler.found[n++] = p;
            }
            std::sort(sampler.found, sampler.found + n);
        }
        for (int64_t i = 0; i < k; ++i) {
            const int64_t token = n > 0 ? sampler.found[i].token : 0;
            tokens[r * k + i] = token;
            logprobs[r * k + i] = float(double(sampler.y[token]) - log_sum);
        }
    });
}

}  // namespace mint
