// The k largest of some numbers, and the k best pairs of two sides, of product keys. Included by
// search.cpp, many tokens, and decode.cpp, a single one.
//
// The k-th largest number is found by halving the range of bit patterns and counting, which
// vectorises, where a heap or a partial sort does not; it ends as soon as a threshold leaves k.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

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

inline uint32_t itself(int i) { return uint32_t(i); }

// The k best pairs of n keys a side, which a thread finds with room of its own:
//     slots = the k largest of row[i] + col[j] among the m best i and the m best j,
// best first; of equals the lower slot i * n + j. Only the pairs of places given are looked at.
class PairSearch {
 public:
  PairSearch(int n, int k, int m, int pairs, const int32_t* i, const int32_t* j)
      : n_(n), k_(k), m_(m), pairs_(pairs), i_(i), j_(j), values_(std::max(n, pairs)), rows_(m),
        cols_(m), best_(k), spare_(std::max(n, pairs) + 1), sums_(pairs), slots_(pairs) {}

  void operator()(const float* row, const float* col, int64_t* to) {
    side(row, rows_);
    side(col, cols_);
    for (int p = 0; p < pairs_; p++) {
      const uint32_t i = place_of(rows_[i_[p]]), j = place_of(cols_[j_[p]]);
      sums_[p] = row[i] + col[j];
      slots_[p] = i * uint32_t(n_) + j;
    }
    order(sums_.data(), pairs_, values_.data());
    const uint32_t* slots = slots_.data();
    largest(values_.data(), pairs_, k_, [slots](int p) { return slots[p]; }, best_.data(),
            spare_.data());
    for (int p = 0; p < k_; p++) to[p] = place_of(best_[p]);
  }

 private:
  void side(const float* scores, std::vector<uint64_t>& best) {
    order(scores, n_, values_.data());
    largest(values_.data(), n_, m_, itself, best.data(), spare_.data());
  }

  const int n_, k_, m_, pairs_;
  const int32_t *i_, *j_;
  std::vector<int32_t> values_;
  std::vector<uint64_t> rows_, cols_, best_, spare_;
  std::vector<float> sums_;
  std::vector<uint32_t> slots_;
};

}  // namespace
