// From a tile of float32 numbers to decoded values: peaks and scales of its blocks, elements.
#pragma once

#include "quest.hpp"
#include "scales.hpp"

namespace zoo {

inline Scales scales_of(const Job& job) {
  if (only_above(job)) return scales_above;
  switch (job.rule) {
    case kFloor: return scales_e8m0<kFloor>;
    case kRceil: return scales_e8m0<kRceil>;
    case kCeil: return scales_e8m0<kCeil>;
    case kEven: return scales_e8m0<kEven>;
    case kQuest: return scales_quest;
    case kThreeQuarters: return scales_three_quarters;
    case kScaled: return scales_own<kScaled>;
    case kScaledP2: return scales_own<kScaledP2>;
    default: return scales_once;
  }
}

// What a family of formats does to an element beside rounding it.
template <bool no_negative_zero_, bool keeps_nan_, bool folds_, bool shrinks_ = false>
struct Family {
  static constexpr bool no_negative_zero = no_negative_zero_, keeps_nan = keeps_nan_;
  static constexpr bool folds = folds_, shrinks = shrinks_;
};

template <class F, class Round>
struct Element {
  Round round;
  inline float operator()(float x, float enc, float dec, float fold, uint32_t index) const {
    float y = (F::shrinks ? x * 0.75f : x) * enc;
    if (F::no_negative_zero) y = y + 0.0f;
    float element = round(y, index);
    if (F::keeps_nan) {  // without a branch, which would keep the loop from being a vector's
      const int32_t nan = -int32_t((bits(y) & kSize) > kInfinity);
      element = value((bits(y) & nan) | (bits(element) & ~nan));
    }
    element = element * dec;
    return F::folds ? element * fold : element;
  }
};

constexpr int kLane = 32;         // values per inner loop of fixed length, which compilers unroll
constexpr int kMostBlocks = 128;  // blocks in flight, so that scales are worked out as vectors
constexpr int kMostCols = 512;    // columns of a band in flight: stays in the first-level cache

template <int lane>
inline int32_t peak_of(const float* x, int64_t n) {
  int32_t found[lane] = {}, peak = 0;
  int64_t i = 0;
  for (; i + lane <= n; i += lane)
    for (int j = 0; j < lane; j++) found[j] = larger(found[j], bits(x[i + j]) & kSize);
  for (int j = 0; j < lane; j++) peak = larger(peak, found[j]);
  for (; i < n; i++) peak = larger(peak, bits(x[i]) & kSize);
  return peak;
}

// Blocks of 1 x block_cols in one row of n numbers, the first of which has that index.
template <int lane, class E, class Out>
void along_row(const float* x, Out* out, int64_t n, uint32_t index, const Job& job, Upper above,
               const E& element) {
  const int64_t b = job.block_cols;
  const Scales scales = scales_of(job);
  const float fold = job.fold ? above.dec : 1.0f;
  int32_t peak[kMostBlocks];
  float up[kMostBlocks], enc[kMostBlocks], dec[kMostBlocks];
  for (float& u : up) u = above.enc;
  for (int64_t from = 0; from < n; from += b * kMostBlocks) {
    const int64_t end = least(n, from + b * kMostBlocks);
    int blocks = 0;
    for (int64_t c = from; c < end; c += b, blocks++)
      if (!only_above(job)) peak[blocks] = peak_of<lane>(x + c, least(b, end - c));
    if (job.rule == kQuest) variances_along_row(x + from, end - from, peak, up);
    scales(peak, up, blocks, job, enc, dec);
    blocks = 0;
    for (int64_t c = from; c < end; c += b, blocks++) {
      const int64_t stop = least(end, c + b);
      const float e = enc[blocks], d = dec[blocks];
      int64_t i = c;
      for (; i + lane <= stop; i += lane)
        for (int j = 0; j < lane; j++)
          store(out + i + j, element(x[i + j], e, d, fold, index + uint32_t(i + j)));
      for (; i < stop; i++) store(out + i, element(x[i], e, d, fold, index + uint32_t(i)));
    }
  }
}

// Scales above the blocks, of each of n columns.
struct Above {
  const float *enc, *dec;
};

// Blocks of rows x 1 or rows x block_cols in one band of n columns, at most kMostCols.
template <class E, class Out>
void across_rows(const float* x, int64_t stride, Out* out, int rows, int n, uint32_t index,
                 const Job& job, Above above, const E& element) {
  const int b = job.block_cols;
  int32_t peak[kMostCols];
  float enc[kMostCols], dec[kMostCols], fold[kMostCols];
  if (!only_above(job)) {
    std::memset(peak, 0, sizeof peak);
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < n; c++) peak[c] = larger(peak[c], bits(x[r * stride + c]) & kSize);
    for (int i = 0; b > 1 && i < n; i += b) {  // past n the peaks are zero
      int32_t most = 0;
      for (int j = i; j < i + b; j++) most = larger(most, peak[j]);
      for (int j = i; j < i + b; j++) peak[j] = most;
    }
  }
  const bool by_spread = job.rule == kQuest;
  if (by_spread) variances_down_columns(x, stride, rows, n, peak, fold);
  scales_of(job)(peak, by_spread ? fold : above.enc, n, job, enc, dec);
  for (int c = 0; c < n; c++) fold[c] = job.fold ? above.dec[c] : 1.0f;
  for (int r = 0; r < rows; r++) {
    const float* xs = x + r * stride;
    Out* os = out + r * job.out_cols;
    const uint32_t at = index + uint32_t(r * job.out_cols);
    for (int c = 0; c < n; c++) store(os + c, element(xs[c], enc[c], dec[c], fold[c], at + uint32_t(c)));
  }
}

// What the drivers of kernels.cpp call, one for each thread: blocks of one row, or of a band.
template <class F, class Round, class Out_>
struct Blocks {
  using Out = Out_;
  const Job& job;
  const Element<F, Round> element;
  Blocks(const Job& job, const Round& round) : job(job), element{round} {}

  void row(const float* x, Out* out, int64_t n, uint32_t index, Upper above) {
    if (job.block_cols % kLane)
      along_row<16>(x, out, n, index, job, above, element);
    else
      along_row<kLane>(x, out, n, index, job, above, element);
  }
  void band(const float* x, int64_t stride, Out* out, int rows, int n, uint32_t index,
            Above above) {
    across_rows(x, stride, out, rows, n, index, job, above, element);
  }
};
template <class Round, class Out>
using Microscaling = Blocks<Family<false, false, false>, Round, Out>;
template <class Round, class Out>
using Shrunk = Blocks<Family<false, false, false, true>, Round, Out>;
template <class Round, class Out>
using TwoLevel = Blocks<Family<true, false, true>, Round, Out>;
template <class Round, class Out>
using Scaled = Blocks<Family<false, true, true>, Round, Out>;

}  // namespace zoo
