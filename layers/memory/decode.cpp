// One token through a memory layer, on a CPU, in two calls: the slots that its queries find, and
// the sum of what stands in the rows read for it. Plain C ABI, no torch headers. Bound by reading
// keys and rows, once each, where they lie: normed keys are never written.

#include <cmath>

#include "search.hpp"

namespace {

constexpr float kEps = 1e-5f;  // layers/memory/norms.py: EPS
constexpr int kLanes = 8, kSums = 4, kStep = kLanes * kSums;  // numbers of a row in flight
constexpr int kAhead = 4;                                      // rows
typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline Floats load(const float* from) {
  Floats to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

// The sum of term(first number of a block) over whole blocks, and of one(number) over the rest.
template <class Blocks, class One>
inline float sum(int64_t n, Blocks blocks, One one) {
  Floats sums[kSums] = {};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int j = 0; j < kSums; j++) sums[j] += blocks(i + j * kLanes);
  for (; i + kLanes <= n; i += kLanes) sums[0] += blocks(i);
  float rest = 0;
  for (; i < n; i++) rest += one(i);
  const Floats s = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return (((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))) + rest;
}

inline float dot(const float* a, const float* b, int64_t n) {
  return sum(n, [=](int64_t i) { return load(a + i) * load(b + i); },
             [=](int64_t i) { return a[i] * b[i]; });
}

inline float mean_of(const float* a, int64_t n) {
  return sum(n, [=](int64_t i) { return load(a + i); }, [=](int64_t i) { return a[i]; }) / n;
}

inline float scale_of(const float* a, float mean, int64_t n) {
  const float squares = sum(
      n, [=](int64_t i) { return (load(a + i) - mean) * (load(a + i) - mean); },
      [=](int64_t i) { return (a[i] - mean) * (a[i] - mean); });
  return 1.0f / std::sqrt(squares / n + kEps);
}

}  // namespace

extern "C" {

// Both mirrored field by field by decode.py. A norm without gain is none, with bias it is centred.
struct MoeZooMemoryFind {
  const float* queries;                         // [Q, d], as projected
  const float *query_gain, *query_bias;         // [d]; of a batch norm [Q, d]
  const float *query_mean, *query_var;          // [Q, d], of a batch norm, or null
  const float* keys;                            // [key_blocks, n, d]
  const float *key_gain, *key_bias;             // [d]
  const float *cores, *leading;                 // [C, H, r, r] and [2, H, r]; null: product keys
  const int32_t* places;                        // product keys: [2, pairs], those to look at
  int64_t* slots;                               // [H, k]
  float* scores;                                // [C, H, k]
  int64_t n_queries, d, n, heads, key_blocks;   // product keys: blocks of a head, row and column
  int64_t k, m, pairs, rank, n_cores;
  int32_t both_signs, threads;
};

struct MoeZooMemoryRead {
  const int64_t* slots;  // [hits], of a head beside one another
  const float* scores;   // [C, hits]
  const int64_t* sigma;  // [groups' slots], or null: a slot is a row
  const float* x;        // [d_input], or null
  const float* inputs;   // [n_rows, d_input], or null: plain values
  const float* values;   // [n_rows, C, d_value / C]
  int64_t* rows;         // [hits], those that were read
  float* y;              // [groups, d_value]
  int64_t hits, k, n_cores, n_rows, d_input, d_value, groups;
  int64_t n_slots, visible, offset;  // of sigma
  int32_t weighting, activation;
};

}  // extern "C"

namespace {

using Find = MoeZooMemoryFind;
using Read = MoeZooMemoryRead;

std::vector<float> normed_queries(const Find& job) {
  const int64_t d = job.d;
  std::vector<float> q(job.queries, job.queries + job.n_queries * d);
  if (job.query_mean) {
    for (size_t i = 0; i < q.size(); i++) {
      const float scale = 1.0f / std::sqrt(job.query_var[i] + kEps) * job.query_gain[i];
      q[i] = (q[i] - job.query_mean[i]) * scale + job.query_bias[i];
    }
  } else if (job.query_gain) {
    for (float* one = q.data(); one < q.data() + q.size(); one += d) {
      const float mean = job.query_bias ? mean_of(one, d) : 0.0f, scale = scale_of(one, mean, d);
      for (int64_t i = 0; i < d; i++)
        one[i] = (one[i] - mean) * scale * job.query_gain[i] + (job.query_bias ? job.query_bias[i] : 0);
    }
  }
  return q;
}

// Products of n keys with one query: <norm(key), q> is scale * <key - mean, gain * q> + <bias, q>.
void multiply(const Find& job, const float* key, const float* q, float* scores) {
  const int64_t n = job.n, d = job.d;
  if (!job.key_gain) {
    for (int64_t i = 0; i < n; i++, key += d) scores[i] = dot(key, q, d);
    return;
  }
  std::vector<float> gained(q, q + d);
  for (int64_t i = 0; i < d; i++) gained[i] *= job.key_gain[i];
  if (!job.key_bias) {
    for (int64_t i = 0; i < n; i++, key += d)
      scores[i] = dot(key, gained.data(), d) * scale_of(key, 0, d);
    return;
  }
  const float shift = dot(job.key_bias, q, d), *to = gained.data();
  for (int64_t i = 0; i < n; i++, key += d) {
    const float mean = mean_of(key, d);
    const float product = sum(d, [=](int64_t j) { return (load(key + j) - mean) * load(to + j); },
                              [=](int64_t j) { return (key[j] - mean) * to[j]; });
    scores[i] = product * scale_of(key, mean, d) + shift;
  }
}

void find_product(const Find& job, const float* scores) {
  const int64_t n = job.n, k = job.k;
  PairSearch search(int(n), int(k), int(job.m), int(job.pairs), job.places,
                    job.places + job.pairs);
  for (int64_t h = 0; h < job.heads; h++) {
    const float *row = scores + 2 * h * n, *col = row + n;
    int64_t* slots = job.slots + h * k;
    search(row, col, slots);
    for (int64_t p = 0; p < k; p++) job.scores[h * k + p] = row[slots[p] / n] + col[slots[p] % n];
  }
}

// The search of one head by Tucker-decomposed keys: layers/memory/tucker.py.
class TuckerSearch {
 public:
  TuckerSearch(const Find& job, const float* scores, int64_t head)
      : job_(job), head_(head), n_(int(job.n)), m_(int(job.m)), rank_(int(job.rank)),
        total_(rank_ * rank_) {
    for (int side = 0; side < 2; side++)
      for (int a = 0; a < rank_; a++)
        at_[side].push_back(scores + ((side * rank_ + a) * job.heads + head) * n_);
    for (int c = 0; c < job.n_cores; c++)
      for (int ab = 0; ab < rank_ * rank_; ab++) total_[ab] += core(c)[ab];
  }

  void run() {
    const int blocks = job_.both_signs ? 2 : 1, k = int(job_.k), square = m_ * m_;
    for (int side = 0; side < 2; side++) {
      const float* along = job_.leading + (side * job_.heads + head_) * rank_;
      keep_best(side, along, 1);
      if (blocks == 2) keep_best(side, along, -1);
    }
    std::vector<float> g(blocks * square);
    for (int block = 0; block < blocks; block++) all_pairs(block, g.data() + block * square);
    if (blocks == 2) drop_twice(g.data() + square);
    const std::vector<uint64_t> best = best_of(g, k);
    for (int p = 0; p < k; p++) {
      const int place = int(place_of(best[p])), block = place / square * m_;
      keep(p, found_[0][block + place % square / m_], found_[1][block + place % m_]);
    }
  }

 private:
  const float* core(int64_t c) const {
    return job_.cores + (c * job_.heads + head_) * rank_ * rank_;
  }

  static std::vector<uint64_t> best_of(const std::vector<float>& v, int k) {
    const int n = int(v.size());
    std::vector<int32_t> bits(n);
    std::vector<uint64_t> best(k), spare(n + 1);
    order(v.data(), n, bits.data());
    largest(bits.data(), n, k, itself, best.data(), spare.data());
    return best;
  }

  // Adds to a side the m keys of largest sign * sum over a of along_a S_a.
  void keep_best(int side, const float* along, float sign) {
    std::vector<float> v(n_);
    for (int a = 0; a < rank_; a++)
      for (int i = 0; i < n_; i++) v[i] += along[a] * at_[side][a][i];
    for (float& one : v) one *= sign;
    for (uint64_t one : best_of(v, m_)) found_[side].push_back(int(place_of(one)));
  }

  // G of the m x m pairs of keys of one block.
  void all_pairs(int block, float* g) const {
    const int *rows = &found_[0][block * m_], *cols = &found_[1][block * m_];
    std::vector<float> through(m_), right(m_);
    for (int b = 0; b < rank_; b++) {
      std::fill(through.begin(), through.end(), 0.0f);
      for (int a = 0; a < rank_; a++)
        for (int i = 0; i < m_; i++) through[i] += total_[a * rank_ + b] * at_[0][a][rows[i]];
      for (int j = 0; j < m_; j++) right[j] = at_[1][b][cols[j]];
      for (int i = 0; i < m_; i++)
        for (int j = 0; j < m_; j++) g[i * m_ + j] += through[i] * right[j];
    }
  }

  // Pairs of the second block that stand in the first too.
  void drop_twice(float* g) const {
    const auto first = [this](int side, int at) {
      const auto begin = found_[side].begin(), end = begin + m_;
      return std::find(begin, end, found_[side][m_ + at]) != end;
    };
    for (int i = 0; i < m_; i++) {
      if (!first(0, i)) continue;
      for (int j = 0; j < m_; j++)
        if (first(1, j)) g[i * m_ + j] = -INFINITY;
    }
  }

  void keep(int p, int row, int col) const {
    job_.slots[head_ * job_.k + p] = int64_t(row) * n_ + col;
    for (int64_t c = 0; c < job_.n_cores; c++) {
      float score = 0;
      for (int a = 0; a < rank_; a++)
        for (int b = 0; b < rank_; b++)
          score += at_[0][a][row] * at_[1][b][col] * core(c)[a * rank_ + b];
      job_.scores[(c * job_.heads + head_) * job_.k + p] = score;
    }
  }

  const Find& job_;
  const int64_t head_;
  const int n_, m_, rank_;
  std::vector<float> total_;            // [r, r], the sum of cores
  std::vector<const float*> at_[2];     // by side and rank: scores of n keys
  std::vector<int> found_[2];           // by side: m keys, and m of lowest scores
};

enum Weighting { kSoftmax = 0, kRaw = 1, kReluOf = 2, kSigmoid = 3 };
enum Activation { kSilu = 0, kGelu = 1, kRelu = 2, kIdentity = 3 };

// Weights of the k hits of one head and core, from their scores.
void weigh(int32_t kind, int64_t k, float* w) {
  if (kind == kSoftmax) {
    const float top = *std::max_element(w, w + k);
    float total = 0;
    for (int64_t i = 0; i < k; i++) total += w[i] = std::exp(w[i] - top);
    for (int64_t i = 0; i < k; i++) w[i] /= total;
  } else if (kind == kReluOf) {
    for (int64_t i = 0; i < k; i++) w[i] = w[i] < 0 ? 0.0f : w[i];  // keeps NaN
  } else if (kind == kSigmoid) {
    for (int64_t i = 0; i < k; i++) w[i] = 1.0f / (1.0f + std::exp(-w[i]));
  }
}

inline float activate(int32_t kind, float x) {
  switch (kind) {
    case kSilu: return x / (1.0f + std::exp(-x));
    case kGelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    case kRelu: return x < 0 ? 0.0f : x;
    default: return x;
  }
}

inline void fetch(const float* table, int64_t row, int64_t d) {
  for (int64_t j = 0; j < d; j += 16) __builtin_prefetch(table + row * d + j);
}

}  // namespace

extern "C" int moe_zoo_memory_find(const MoeZooMemoryFind* given) {
  const Find job = *given;
  const int64_t blocks = job.rank ? 2 * job.rank * job.heads : 2 * job.heads;
  const std::vector<float> queries = normed_queries(job);
  std::vector<float> scores(blocks * job.n);
#pragma omp parallel for schedule(static) num_threads(job.threads) if (job.threads > 1)
  for (int64_t b = 0; b < blocks; b++) {
    const float* q = queries.data() + b / (blocks / job.n_queries) * job.d;
    multiply(job, job.keys + b % job.key_blocks * job.n * job.d, q, scores.data() + b * job.n);
  }
  if (!job.rank) find_product(job, scores.data());
  for (int64_t h = 0; job.rank && h < job.heads; h++) TuckerSearch(job, scores.data(), h).run();
  return 0;
}

// 1: a slot is none of the layer, or its row none of the pool, and nothing is written to y.
extern "C" int moe_zoo_memory_read(const MoeZooMemoryRead* given) {
  const Read job = *given;
  const int64_t hits = job.hits, c_ = job.n_cores, d = job.d_value, part = d / c_;
  std::vector<float> w(job.scores, job.scores + c_ * hits);
  std::vector<int64_t> group(hits, 0);
  for (int64_t h = 0; h < hits; h++) {
    int64_t row = job.slots[h];
    if (job.sigma) {
      if (row < 0 || row >= job.n_slots) return 1;
      const int64_t z = job.sigma[row];
      row = (z % job.visible + job.offset) % job.n_rows;
      if (job.groups > 1) group[h] = z / job.visible;
    }
    if (row < 0 || row >= job.n_rows || group[h] >= job.groups) return 1;
    job.rows[h] = row;
    fetch(job.inputs ? job.inputs : job.values, row, job.inputs ? job.d_input : d);
  }
  for (int64_t i = 0; i < c_ * hits; i += job.k) weigh(job.weighting, job.k, w.data() + i);
  for (int64_t h = 0; job.inputs && h < hits; h++) {
    fetch(job.values, job.rows[h], d);
    const float g = dot(job.inputs + job.rows[h] * job.d_input, job.x, job.d_input);
    const float active = activate(job.activation, g);
    for (int64_t c = 0; c < c_; c++) w[c * hits + h] *= active;
  }
  std::fill(job.y, job.y + job.groups * d, 0.0f);
  for (int64_t h = 0; h < hits; h++) {
    if (h + kAhead < hits) fetch(job.values, job.rows[h + kAhead], d);
    for (int64_t c = 0; c < c_; c++) {
      const float *row = job.values + job.rows[h] * d + c * part, weight = w[c * hits + h];
      float* y = job.y + group[h] * d + c * part;
      for (int64_t i = 0; i < part; i++) y[i] += weight * row[i];
    }
  }
  return 0;
}
