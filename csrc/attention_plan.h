// The units of work of attention: one (sequence, kv head), cut into chunks of query rows where it is long.
// Defined in attention_plan.cpp, which is compiled without -m flags.
#pragma once
#include <cstdint>

namespace mint {

// The query rows of a unit are numbered r = query * group + head: row r sees the keys 0 .. r / group. A task owns
// the rows [begin, end) of its sequence.
struct AttentionTask {
    int64_t token;  // first token of the sequence
    int64_t kv_head;
    int64_t begin, end;
};

class AttentionPlan {
  public:
    // Chunks of chunk_rows rows (0: never cut). Throws std::invalid_argument where cu_seqlens is not 0 .. tokens,
    // rising or level.
    AttentionPlan(const char* op, const int32_t* cu_seqlens, int64_t n_seqs, int64_t tokens, int64_t n_kv,
                  int64_t group, int64_t chunk_rows);
    AttentionPlan(const AttentionPlan&) = delete;
    AttentionPlan& operator=(const AttentionPlan&) = delete;
    ~AttentionPlan();

    int64_t n_tasks() const;
    int64_t longest() const;             // tokens of the longest sequence
    const AttentionTask* tasks() const;  // most work first, so that the last to finish is small

  private:
    struct State;
    State* state_;
};

}  // namespace mint
