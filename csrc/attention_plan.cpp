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

AttentionPlan::AttentionPlan(const char* op, const int32_t* cu_seqlens, int64_t n_seqs, int64_t tokens, int64_t n_kv,
                             int64_t group, int64_t chunk_rows)
    : state_(nullptr) {
    bool rising = n_seqs == 0 ? tokens == 0 : cu_seqlens[0] == 0 && cu_seqlens[n_seqs] == tokens;
    for (int64_t s = 0; s < n_seqs; ++s) rising = rising && cu_seqlens[s] <= cu_seqlens[s + 1];
    if (!rising) {
        throw std::invalid_argument("cu_seqlens: expected bounds that rise from 0 to " + std::to_string(tokens) + " (" +
                                    std::string(op) + ")");
    }
    auto* state = new State;
    for (int64_t s = 0; s < n_seqs; ++s) {
        const int64_t rows = int64_t(cu_seqlens[s + 1] - cu_seqlens[s]) * group;
        state->longest = std::max(state->longest, rows / group);
        const int64_t chunk = chunk_rows > 0 ? chunk_rows : std::max<int64_t>(rows, 1);
        for (int64_t begin = 0; begin < rows; begin += chunk)
            for (int64_t h = 0; h < n_kv; ++h)
                state->tasks.push_back({cu_seqlens[s], h, begin, std::min(begin + chunk, rows)});
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
