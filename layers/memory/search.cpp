// The k best of all pairs of product keys, for rows of scores on a CPU:
//     slots = the k largest of rows[i] + cols[j] among the m best i and the m best j,
// best first; of equals the lower slot i * n + j. Plain C ABI, no torch headers.
//
// A row's k-th largest number is found by halving the range of bit patterns and counting, which
// vectorises, where a heap or a partial sort does not; it ends as soon as a threshold leaves k.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// Bits of a float as an integer of the same order; -0 and 0 alike, NaN above all.
inline int32_t ordered(float v) {
  v += 0.0f;  // -0 becomes 0
  int32_t b;
  std::memcpy(&b, &v, sizeof b);
  const int32_t in_order = b ^ ((b >> 31) & 0x7FFFFFFF);
  return (b & 0x7FFFFFFF) > 0x7F800000 ? INT32_MAX : in_order;
}

void order(const float* v, int n, int32_t* __restrict to) {
  for (int i = 0; i < n; i++) to[i] = ordered(v[i]);
}

// The float of such bits. Of those that are no number, another that is none.
inline float number(int32_t b) {
  b = b < 0 ? b ^ 0x7FFFFFFF : b;
  float v;
  std::memcpy(&v, &b, sizeof v);
  return v;
}

// A number and where it stands, as one integer: larger is better, of equals the lower place.
inline uint64_t packed(int32_t value, uint32_t place) {
  return uint64_t(uint32_t(value) ^ 0x80000000u) << 32 | uint32_t(~place);
}
inline uint32_t place_of(uint64_t p) { return ~uint32_t(p); }

int count_at_least(const int32_t* v, int n, int32_t least) {
  int found = 0;
  for (int i = 0; i < n; i++) found += v[i] >= least;
  return found;
}

constexpr int kBlock = 8;
typedef int32_t Block __attribute__((vector_size(4 * kBlock)));
typedef int64_t Halves __attribute__((vector_size(4 * kBlock)));

inline bool any_at_least(const int32_t* v, int32_t least) {
  Block block;
  std::memcpy(&block, v, sizeof block);
  const Halves found = Halves(block >= least);
  return (found[0] | found[1] | found[2] | found[3]) != 0;
}

// Sorts few integers, largest first: each goes where as many larger ones say, all at once.
void sort_down(uint64_t* p, int k, uint64_t* spare) {
  if (k > 96) {
    std::sort(p, p + k, [](uint64_t a, uint64_t b) { return a > b; });
    return;
  }
  std::copy(p, p + k, spare);
  for (int i = 0; i < k; i++) {
    const uint64_t mine = spare[i];
    int64_t above = 0;
    for (int j = 0; j < k; j++) above += spare[j] > mine;
    p[above] = mine;  // all differ: places do
  }
}

// The k largest of n, best first. place(i) is what decides between equals, and what is kept.
template <class Place>
void largest(const int32_t* v, int n, int k, Place place, uint64_t* best, uint64_t* spare) {
  int32_t low = v[0], high = v[0];
  for (int i = 1; i < n; i++) low = std::min(low, v[i]), high = std::max(high, v[i]);
  // at least k numbers are >= low; fewer than k are > high
  int at_low = n, rounds = 0;
  while (at_low > k && low < high) {
    // half-way as numbers, which settles sooner; as bit patterns where that no longer moves
    int32_t middle = rounds++ < 16 ? ordered(0.5f * (number(low) + number(high))) : low;
    if (middle <= low || middle > high) middle = int32_t(low + (int64_t(high) - low + 1) / 2);
    const int found = count_at_least(v, n, middle);
    if (found >= k)
      low = middle, at_low = found;
    else
      high = middle - 1;
  }
  if (at_low <= k) {  // exactly k
    int kept = 0;
    for (int i = 0; i < n; i += kBlock) {
      const int end = std::min(i + kBlock, n);
      if (end == i + kBlock && !any_at_least(v + i, low)) continue;
      for (int j = i; j < end; j++) {  // without a branch, which nothing would predict
        spare[kept] = packed(v[j], place(j));
        kept += v[j] >= low;
      }
    }
    std::copy(spare, spare + k, best);
  } else {  // equals at the cut: those of the lowest places
    int kept = 0, equal = 0;
    for (int i = 0; i < n; i++) {
      if (v[i] > low) best[kept++] = packed(v[i], place(i));
      if (v[i] == low) spare[equal++] = packed(v[i], place(i));
    }
    std::nth_element(spare, spare + (k - kept), spare + equal,
                     [](uint64_t a, uint64_t b) { return a > b; });
    std::copy(spare, spare + (k - kept), best + kept);
  }
  sort_down(best, k, spare);
}

struct Scratch {
  std::vector<int32_t> values;
  std::vector<uint64_t> rows, cols, best, spare;
  std::vector<float> a, b, sums;
  std::vector<uint32_t> slots;
};

}  // namespace

struct MoeZooProductSearch {  // layers/memory/native.py: Job
  const float *rows, *cols;   // [count, n]
  const int32_t *i, *j;       // the pairs of places to look at
  int64_t* slots;             // [count, k]
  int64_t count, n, k, m, pairs;
  int32_t threads;
};

extern "C" int moe_zoo_product_search(const MoeZooProductSearch* job) {
  const int n = int(job->n), k = int(job->k), m = int(job->m), pairs = int(job->pairs);
#pragma omp parallel num_threads(job->threads)
  {
    Scratch s;
    const size_t most = size_t(std::max(n, pairs));
    s.values.resize(most), s.spare.resize(most + 1), s.sums.resize(pairs), s.slots.resize(pairs);
    s.rows.resize(n), s.cols.resize(n), s.best.resize(k), s.a.resize(m), s.b.resize(m);
    const auto same = [](int i) { return uint32_t(i); };
#pragma omp for schedule(static)
    for (int64_t r = 0; r < job->count; r++) {
      const float *row = job->rows + r * n, *col = job->cols + r * n;
      order(row, n, s.values.data());
      largest(s.values.data(), n, m, same, s.rows.data(), s.spare.data());
      order(col, n, s.values.data());
      largest(s.values.data(), n, m, same, s.cols.data(), s.spare.data());
      for (int i = 0; i < m; i++) s.a[i] = row[place_of(s.rows[i])];
      for (int i = 0; i < m; i++) s.b[i] = col[place_of(s.cols[i])];
      for (int p = 0; p < pairs; p++) {
        const int i = job->i[p], j = job->j[p];
        s.sums[p] = s.a[i] + s.b[j];
        s.slots[p] = place_of(s.rows[i]) * uint32_t(n) + place_of(s.cols[j]);
      }
      order(s.sums.data(), pairs, s.values.data());
      const uint32_t* slots = s.slots.data();
      largest(s.values.data(), pairs, k, [slots](int p) { return slots[p]; }, s.best.data(),
              s.spare.data());
      for (int p = 0; p < k; p++) job->slots[r * k + p] = place_of(s.best[p]);
    }
  }
  return 0;
}
