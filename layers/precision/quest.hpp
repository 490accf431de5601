// The spread of blocks of 32, from which Quartet takes its scales (mx.py, rule "quest").
#pragma once

#include "lanes.hpp"
#include "scales.hpp"

namespace zoo {

constexpr int kQuestBlock = 32;

// What brings a block near 1.
inline float near_one(int32_t peak) {
  return value(larger((254 - (smaller(peak, kInfinity - 1) >> 23)) << 23, kTiniestScale));
}

inline Lanes variance_of(Lanes sum, Lanes squares) {
  constexpr float share = 1.0f / kQuestBlock;
  const Lanes mean = sum * share;
  return squares * share - mean * mean;
}

// The variance of each block of one row of n numbers, near 1.
inline void variances_along_row(const float* x, int64_t n, const int32_t* peak, float* variance) {
  for (int64_t c = 0, b = 0; c < n; c += kQuestBlock, b++) {
    float block[kQuestBlock] = {};
    std::memcpy(block, x + c, sizeof(float) * least(kQuestBlock, n - c));
    const float scale = near_one(peak[b]);
    const Lanes low = lanes(block) * scale, high = lanes(block + kLanes) * scale;
    variance[b] = variance_of(sum_of(low + high), sum_of(low * low + high * high))[0];
  }
}

// That of one block of at most 32 rows down each of n columns.
inline void variances_down_columns(const float* x, int64_t stride, int rows, int n,
                                   const int32_t* peak, float* variance) {
  for (int c = 0; c < n; c += kLanes) {
    const int wide = smaller(kLanes, n - c);
    float scale[kLanes] = {}, found[kLanes];
    for (int i = 0; i < wide; i++) scale[i] = near_one(peak[c + i]);
    Lanes sum[kQuestBlock], squares[kQuestBlock];
    for (int r = 0; r < kQuestBlock; r++) {
      float row[kLanes] = {};
      if (r < rows) std::memcpy(row, x + r * stride + c, sizeof(float) * wide);
      sum[r] = lanes(row) * lanes(scale);
      squares[r] = sum[r] * sum[r];
    }
    for (int w = kQuestBlock / 2; w > 0; w /= 2)  // encoding.py block_sum
      for (int r = 0; r < w; r++) {
        sum[r] = sum[r] + sum[r + w];
        squares[r] = squares[r] + squares[r + w];
      }
    put(found, variance_of(sum[0], squares[0]));
    std::memcpy(variance + c, found, sizeof(float) * wide);
  }
}

// mx.py _quest
inline void scales_quest(const int32_t* __restrict peak, const float* __restrict variance, int n,
                         const Job& job, float* __restrict enc, float* __restrict dec) {
  constexpr float clip = float((2.92247856 / 6.0) * (2.92247856 / 6.0));
  for (int i = 0; i < n; i++) {
    const int32_t floor = (smaller(peak[i], kInfinity) >> 23) - job.max_exponent;
    const int32_t spread = (bits(variance[i] * clip) >> 23) - 127;
    const int32_t by_spread = (smaller(peak[i], kInfinity - 1) >> 23) + (spread >> 1);
    const bool usable = variance[i] > 0.0f && peak[i] < kInfinity;
    const int32_t code = smaller(larger(usable ? by_spread : floor, 0), 254);
    enc[i] = value(larger((254 - code) << 23, kTiniestScale));
    const int32_t scale = larger(code << 23, kTiniestScale);
    dec[i] = value(peak[i] > kInfinity ? kNan : scale);
  }
}

// mx.py, rule "three_quarters": the scale of "floor", and what undoes the 3/4.
inline void scales_three_quarters(const int32_t* __restrict peak, const float* up, int n,
                                  const Job& job, float* __restrict enc, float* __restrict dec) {
  scales_e8m0<kFloor>(peak, up, n, job, enc, dec);
  for (int i = 0; i < n; i++) dec[i] *= float(4.0 / 3.0);
}

}  // namespace zoo
