// Tiles of a tensor as float32, rotated where asked (hadamard.py): the same additions in order.
#pragma once

#include <vector>

#include "lanes.hpp"
#include "scales.hpp"

namespace zoo {

// a + b in the lower lane of a pair, a - b in the upper one.
template <int w>
inline Lanes paired(Lanes v) {
  Ints upper;
  for (int i = 0; i < kLanes; i++) upper[i] = i & w ? int32_t(0x80000000u) : 0;
  return swapped<w>(v) + Lanes(Ints(v) ^ upper);
}

// Butterflies of width w and above among n vectors, kept in registers where those are few.
template <int n, int w = 1>
inline void butterflies(Lanes* v) {
  if constexpr (w < n) {
#pragma GCC unroll 16
    for (int p = 0; p < n / 2; p++) {
      const int i = p / w * 2 * w + p % w;
      const Lanes a = v[i], b = v[i + w];
      v[i] = a + b;
      v[i + w] = a - b;
    }
    butterflies<n, 2 * w>(v);
  }
}

// Tiles of d along one row, in place. n: a multiple of d and of kLanes.
template <int d>
void rotate_row(float* x, int64_t n, float scale) {
  constexpr int k = d < kLanes ? 1 : d / kLanes;
  for (int64_t i = 0; i < n; i += k * kLanes) {
    Lanes v[k];
#pragma GCC unroll 16
    for (int j = 0; j < k; j++) {
      v[j] = paired<1>(lanes(x + i + j * kLanes));
      if (d > 2) v[j] = paired<2>(v[j]);
      if (d > 4) v[j] = paired<4>(v[j]);
      if (d > 8) v[j] = paired<8>(v[j]);
    }
    butterflies<k>(v);
#pragma GCC unroll 16
    for (int j = 0; j < k; j++) put(x + i + j * kLanes, v[j] * scale);
  }
}

// One tile of d rows, in place. n: a multiple of kLanes.
template <int d>
void rotate_rows(float* x, int64_t stride, int64_t n, float scale) {
  for (int64_t c = 0; c < n; c += kLanes) {
    Lanes v[d];
#pragma GCC unroll 32
    for (int r = 0; r < d; r++) v[r] = lanes(x + r * stride + c);
    butterflies<d>(v);
#pragma GCC unroll 32
    for (int r = 0; r < d; r++) put(x + r * stride + c, v[r] * scale);
  }
}

using RotateRow = void (*)(float*, int64_t, float);
using RotateRows = void (*)(float*, int64_t, int64_t, float);
constexpr RotateRow kRotateRow[] = {rotate_row<2>,  rotate_row<4>,  rotate_row<8>,   rotate_row<16>,
                                    rotate_row<32>, rotate_row<64>, rotate_row<128>, rotate_row<256>};
constexpr RotateRows kRotateRows[] = {rotate_rows<2>,   rotate_rows<4>,  rotate_rows<8>,
                                      rotate_rows<16>,  rotate_rows<32>, rotate_rows<64>,
                                      rotate_rows<128>, rotate_rows<256>};

inline int log2_of(int d) {
  int log = 0;
  while (1 << log < d) log++;
  return log;
}

// Where numbers lie as float32.
struct Tile {
  const float* at;
  int64_t stride;
};

// Reads parts of a tensor. One for each thread.
class Reader {
 public:
  Reader(const Job& job, int64_t most) : job_(job) {
    const int d = job.hadamard;
    if (d || job.x_bf16) scratch_.resize(most + kLanes);
    if (!d) return;
    log2_ = log2_of(d);
    const Stream stream(job.signs ? 0 : *job.signs_key & 0xFFFFFFFF, 64 + job.operand / 2);
    for (int i = 0; i < d; i++)
      signs_.push_back(job.signs ? job.signs[i] : 1.0f - 2.0f * float(stream(uint32_t(i)) >> 31));
    for (int i = d; i < kLanes; i++) signs_.push_back(signs_[i & (d - 1)]);
  }

  // n columns from column `from` of `rows` rows from row `row`; zeros beyond row `end` and the
  // last column, as the rotation pads. With rotation along rows, `row` starts a tile.
  Tile operator()(int64_t row, int64_t end, int rows, int64_t from, int64_t n) {
    const int64_t at = row * job_.stride + from;
    if (job_.x_bf16) return read(static_cast<const uint16_t*>(job_.x) + at, end - row, rows, from, n);
    const float* x = static_cast<const float*>(job_.x) + at;
    if (!job_.hadamard) return {x, job_.stride};
    return read(x, end - row, rows, from, n);
  }

 private:
  // left: rows of x from there on that belong to the segment.
  template <class In>
  Tile read(const In* x, int64_t left, int rows, int64_t from, int64_t n) {
    const int64_t wide = (n + kLanes - 1) / kLanes * kLanes;
    const int64_t inside = job_.cols > from ? least(n, job_.cols - from) : 0;
    for (int r = 0; r < rows; r++)
      fill(scratch_.data() + r * wide, x + r * job_.stride, r < left ? inside : 0, wide, r);
    if (job_.hadamard) rotate(rows, wide);
    return {scratch_.data(), wide};
  }

  template <class In>
  void fill(float* out, const In* x, int64_t n, int64_t wide, int row) const {
    if (!job_.hadamard) {
      for (int64_t c = 0; c < n; c++) out[c] = load(x + c);
      return;
    }
    if (job_.axis == -2) {
      const float s = signs_[row & (job_.hadamard - 1)];
      for (int64_t c = 0; c < n; c++) out[c] = load(x + c) * s;
      for (int64_t c = n; c < wide; c++) out[c] = 0.0f * s;
      return;
    }
    const float* s = signs_.data();
    const int64_t period = int64_t(signs_.size()) - 1;
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes)
      for (int i = 0; i < kLanes; i++) out[c + i] = load(x + c + i) * s[(c & period) + i];
    for (; c < wide; c++) out[c] = (c < n ? load(x + c) : 0.0f) * s[c & period];
  }

  void rotate(int rows, int64_t wide) {
    const int d = job_.hadamard;
    if (job_.axis == -1)
      for (int r = 0; r < rows; r++)
        kRotateRow[log2_ - 1](scratch_.data() + r * wide, wide, job_.rotation);
    else
      for (int r = 0; r < rows; r += d)
        kRotateRows[log2_ - 1](scratch_.data() + r * wide, wide, wide, job_.rotation);
  }

  const Job& job_;
  std::vector<float> scratch_, signs_;
  int log2_ = 0;
};

}  // namespace zoo
