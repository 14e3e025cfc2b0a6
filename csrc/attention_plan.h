// The units of work of attention: one (sequence, kv head), cut into chunks of query rows where it is long.
// Defined in attention_plan.cpp, which is compiled without -m flags.
#pragma once
#include <cstdint>

namespace mint {

// The query rows of a unit are numbered r = query * group + head: row r sees the keys 0 .. r / group. A task owns
// the rows [begin, end) of its sequence. Where a sequence has more keys than queries (its first tokens are in a cache),
// the queries are its last ones, and the rows before them belong to no task.
struct AttentionTask {
    int64_t token;  // where query 0 of the sequence is, or would be, in q
    int64_t key;    // where key 0 is in k and v
    int64_t kv_head;
    int64_t begin, end;
};

class AttentionPlan {
  public:
    // Chunks of chunk_rows rows (0: never cut). cu_keys: the bounds of the keys, null if they are cu_seqlens. Throws
    // std::invalid_argument where the bounds do not rise from 0 to tokens (to keys), or a sequence lacks keys.
    AttentionPlan(const char* op, const int32_t* cu_seqlens, const int32_t* cu_keys, int64_t n_seqs, int64_t tokens,
                  int64_t keys, int64_t n_kv, int64_t group, int64_t chunk_rows);
    AttentionPlan(const AttentionPlan&) = delete;
    AttentionPlan& operator=(const AttentionPlan&) = delete;
    ~AttentionPlan();

    int64_t n_tasks() const;
    int64_t longest() const;             // keys of the longest sequence
    const AttentionTask* tasks() const;  // most work first, so that the last to finish is small

  private:
    struct State;
    State* state_;
};

}  // namespace mint
