// Products of tokens with rows of a table: y[t, k] = sum over i of table[ids[t, k], i] * x[t, i].
// Rows lie anywhere in memory, so those to come are fetched ahead. Plain C ABI, no torch headers.

#include <cstdint>

// layers/row_dots.py: Job
struct MoeZooRowDots {
  const float* table;   // [n_rows, d]
  const int64_t* ids;   // [tokens, k]
  const float* x;       // [tokens, d]
  float* y;             // [tokens, k]
  int64_t tokens, k, d, n_rows;
  int32_t threads;
};

namespace {

constexpr int kLanes = 16;  // partial sums, in an order of their own so that they vectorise
constexpr int kAhead = 4;   // rows

float dot(const float* a, const float* b, int64_t d) {
  float part[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes)
    for (int j = 0; j < kLanes; j++) part[j] += a[i + j] * b[i + j];
  float sum = 0;
  for (; i < d; i++) sum += a[i] * b[i];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; j++) part[j] += part[j + width];
  return sum + part[0];
}

}  // namespace

// 1: an id is no row of the table, and nothing is written.
extern "C" int moe_zoo_row_dots(const MoeZooRowDots* given) {
  const MoeZooRowDots job = *given;
  const int64_t hits = job.tokens * job.k, d = job.d;
  for (int64_t i = 0; i < hits; i++)
    if (job.ids[i] < 0 || job.ids[i] >= job.n_rows) return 1;
#pragma omp parallel for schedule(static) num_threads(job.threads) if (job.threads > 1)
  for (int64_t t = 0; t < job.tokens; t++) {
    for (int64_t i = t * job.k; i < (t + 1) * job.k; i++) {
      if (i + kAhead < hits) {
        const float* next = job.table + job.ids[i + kAhead] * d;
        for (int64_t j = 0; j < d; j += 16) __builtin_prefetch(next + j);
      }
      job.y[i] = dot(job.table + job.ids[i] * d, job.x + t * d, d);
    }
  }
  return 0;
}
