// Adam's and Adagrad's update of some rows of a table on a CPU, one pass over each row where torch
// goes over it a dozen times. Plain C ABI, no torch headers. A row is one thread's alone.

#include <cmath>
#include <cstdint>

// recipes/row_rules.py: Job
struct MoeZooRows {
  float* table;           // [M, d]
  float* state;           // Adam [M, d + d] or [M, d + 1], m first; Adagrad [M, d] or [M, 1]
  const int64_t* rows;    // [count], each once
  const float* g;         // [count, d]
  const float* keep;      // [count], what weight decay leaves of the weights
  const float* m_keep;    // [count], of m; Adam alone, as the three below
  const float* v_keep;    // [count], of v
  const float* step;      // [count], learning rate over m's bias correction
  const float* v_scale;   // [count], one over v's bias correction
  int64_t count, d;
  float m_new, v_new;     // shares of g and of g^2
  float lr, eps;          // lr: Adagrad alone
  int32_t by_row, threads;
};

namespace {

constexpr int kLanes = 16;  // partial sums, so that a sum vectorises in an order of its own
constexpr int kAhead = 2;   // rows fetched before they are wanted: they lie anywhere

float mean_square(const float* g, int64_t d) {
  float part[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes)
    for (int k = 0; k < kLanes; k++) part[k] += g[i + k] * g[i + k];
  float sum = 0;
  for (; i < d; i++) sum += g[i] * g[i];
  for (int k = 0; k < kLanes; k++) sum += part[k];
  return sum / float(d);
}

inline void fetch(const float* p, int64_t numbers) {
  for (int64_t i = 0; i < numbers; i += 16) __builtin_prefetch(p + i, 1);
}

template <class Update>
void over_rows(const MoeZooRows& job, int64_t width, Update update) {
#pragma omp parallel for schedule(static) num_threads(job.threads) if (job.threads > 1)
  for (int64_t i = 0; i < job.count; i++) {
    if (i + kAhead < job.count) {
      fetch(job.table + job.rows[i + kAhead] * job.d, job.d);
      fetch(job.state + job.rows[i + kAhead] * width, width);
    }
    update(i, job.table + job.rows[i] * job.d, job.state + job.rows[i] * width, job.g + i * job.d);
  }
}

}  // namespace

extern "C" int moe_zoo_adam_rows(const MoeZooRows* given) {
  const MoeZooRows job = *given;
  const int64_t d = job.d;
  over_rows(job, job.by_row ? d + 1 : 2 * d,
            [&job, d](int64_t i, float* __restrict w, float* __restrict m, const float* g) {
    const float keep = job.keep[i], m_keep = job.m_keep[i], v_keep = job.v_keep[i];
    const float step = job.step[i], v_scale = job.v_scale[i], eps = job.eps;
    const float m_new = job.m_new, v_new = job.v_new;
    float* __restrict v = m + d;
    if (job.by_row) {
      v[0] = v_keep * v[0] + v_new * mean_square(g, d);
      const float by = step / (std::sqrt(v[0] * v_scale) + eps);
      for (int64_t j = 0; j < d; j++) {
        m[j] = m_keep * m[j] + m_new * g[j];
        w[j] = keep * w[j] - by * m[j];
      }
      return;
    }
    for (int64_t j = 0; j < d; j++) {
      m[j] = m_keep * m[j] + m_new * g[j];
      v[j] = v_keep * v[j] + v_new * (g[j] * g[j]);
      w[j] = keep * w[j] - step * m[j] / (std::sqrt(v[j] * v_scale) + eps);
    }
  });
  return 0;
}

extern "C" int moe_zoo_adagrad_rows(const MoeZooRows* given) {
  const MoeZooRows job = *given;
  const int64_t d = job.d;
  over_rows(job, job.by_row ? 1 : d,
            [&job, d](int64_t i, float* __restrict w, float* __restrict a, const float* g) {
    const float keep = job.keep[i], lr = job.lr, eps = job.eps;
    if (job.by_row) {
      a[0] += mean_square(g, d);
      const float by = lr / (std::sqrt(a[0]) + eps);
      for (int64_t j = 0; j < d; j++) w[j] = keep * w[j] - by * g[j];
      return;
    }
    for (int64_t j = 0; j < d; j++) {
      a[j] += g[j] * g[j];
      w[j] = keep * w[j] - lr * g[j] / (std::sqrt(a[j]) + eps);
    }
  });
  return 0;
}
