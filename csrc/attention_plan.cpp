#include "attention_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace mint {

struct AttentionPlan::State {
    std::vector<AttentionTask> tasks;
    int64_t longest = 0;
};

namespace {

void check_bounds(const char* op, const char* name, const int32_t* bounds, int64_t n_seqs, int64_t rows) {
    bool rising = n_seqs == 0 ? rows == 0 : bounds[0] == 0 && bounds[n_seqs] == rows;
    for (int64_t s = 0; s < n_seqs; ++s) rising = rising && bounds[s] <= bounds[s + 1];
    if (!rising) {
        throw std::invalid_argument(std::string(name) + ": expected bounds that rise from 0 to " +
                                    std::to_string(rows) + " (" + op + ")");
    }
}

}  // namespace

AttentionPlan::AttentionPlan(const char* op, const int32_t* cu_seqlens, const int32_t* cu_keys, int64_t n_seqs,
                             int64_t tokens, int64_t keys, int64_t n_kv, int64_t group, int64_t chunk_rows)
    : state_(nullptr) {
    if (cu_keys == nullptr) cu_keys = cu_seqlens;
    check_bounds(op, "cu_seqlens", cu_seqlens, n_seqs, tokens);
    if (cu_keys != cu_seqlens) check_bounds(op, "cu_keys", cu_keys, n_seqs, keys);
    for (int64_t s = 0; s < n_seqs; ++s) {
        const int64_t queries = cu_seqlens[s + 1] - cu_seqlens[s], own = cu_keys[s + 1] - cu_keys[s];
        if (own >= queries) continue;
        throw std::invalid_argument("cu_keys: expected at least " + std::to_string(queries) + " keys, got " +
                                    std::to_string(own) + " (" + op + ", sequence " + std::to_string(s) + ")");
    }
    auto* state = new State;
    for (int64_t s = 0; s < n_seqs; ++s) {
        const int64_t own = cu_keys[s + 1] - cu_keys[s], earlier = own - (cu_seqlens[s + 1] - cu_seqlens[s]);
        state->longest = std::max(state->longest, own);
        const int64_t rows = own * group, first = earlier * group;
        const int64_t chunk = chunk_rows > 0 ? chunk_rows : std::max<int64_t>(rows, 1);
        for (int64_t begin = first; begin < rows; begin += chunk)
            for (int64_t h = 0; h < n_kv; ++h)
                state->tasks.push_back({cu_seqlens[s] - earlier, cu_keys[s], h, begin, std::min(begin + chunk, rows)});
    }
    const auto work = [](const AttentionTask& t) { return (t.end - t.begin) * (t.begin + t.end); };
    std::stable_sort(state->tasks.begin(), state->tasks.end(),
                     [&](const AttentionTask& a, const AttentionTask& b) { return work(a) > work(b); });
    state_ = state;
}

AttentionPlan::~AttentionPlan() { delete state_; }

int64_t AttentionPlan::n_tasks() const { return int64_t(state_->tasks.size()); }

int64_t AttentionPlan::longest() const { return state_->longest; }

const AttentionTask* AttentionPlan::tasks() const { return state_->tasks.data(); }

}  // namespace mint
