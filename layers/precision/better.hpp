// Blocks of 16 that take the better of two scales (nvfp4.py, rules "4over6").
#pragma once

#include <algorithm>
#include <memory>

#include "elements.hpp"
#include "lanes.hpp"

namespace zoo {

constexpr int kSixteen = 16, kBetterCols = 256;  // numbers of a block; columns in flight

struct Candidate {
  float enc[kBetterCols], dec[kBetterCols];
  float elements[kSixteen][kBetterCols], bad[kSixteen][kBetterCols];
};

struct Candidates {
  Candidate six, four;
};

// Rounds a tile with one candidate's scales and says how bad each number came out.
template <class Round>
inline void try_scales(const float* x, int64_t stride, int rows, int n, uint32_t index,
                       const Job& job, const float* up, const Round& round, Candidate& out) {
  for (int r = 0; r < rows; r++) {
    const float* xs = x + r * stride;
    const uint32_t at = index + uint32_t(r * job.out_cols);
    float *elements = out.elements[r], *bad = out.bad[r];
    for (int c = 0; c < n; c++) {
      elements[c] = round(xs[c] * out.enc[c] + 0.0f, at + uint32_t(c));
      const float error = xs[c] * up[c] - elements[c] * out.dec[c];
      bad[c] = job.rule == kSquares ? error * error : value(bits(error) & kSize);
    }
  }
}

// Sums of sixteen neighbours in a row, or the largest of them.
inline void fold_rows(float* bad, int n, bool largest) {
  for (int c = 0; c < n; c += kSixteen) {
    const Lanes v = lanes(bad + c);
    put(bad + c, largest ? Lanes(most_of(Ints(v))) : sum_of(v));
  }
}

inline float joined(float a, float b, bool largest) {
  return largest ? value(larger(bits(a), bits(b))) : a + b;  // as sizes NaN lies on top
}

// Along columns, into the first row.
inline void fold_columns(float (*bad)[kBetterCols], int n, bool largest) {
  for (int w = kSixteen / 2; w > 0; w /= 2)
    for (int r = 0; r < w; r++)
      for (int c = 0; c < n; c++) bad[r][c] = joined(bad[r][c], bad[r + w][c], largest);
}

// Tiles of 16 x 16, the mean of each and its transpose.
inline void symmetric(float (*bad)[kBetterCols], int n) {
  for (int c = 0; c < n; c += kSixteen)
    for (int i = 0; i < kSixteen; i++)
      for (int j = 0; j <= i; j++)
        bad[i][c + j] = bad[j][c + i] = (bad[i][c + j] + bad[j][c + i]) * 0.5f;
}

// How bad the blocks of a tile came out, at each of its columns in the first row.
inline void measure(Candidate& of, int rows, int n, const Job& job) {
  const int wide = (n + kSixteen - 1) / kSixteen * kSixteen;
  const bool largest = job.rule == kLargest, tiles = job.block_rows > 1 && job.block_cols > 1;
  for (int r = 0; r < job.block_rows; r++) {
    const int from = r < rows ? n : 0;
    std::memset(of.bad[r] + from, 0, sizeof(float) * (wide - from));
  }
  if (tiles && !largest) symmetric(of.bad, wide);
  if (job.block_rows > 1) fold_columns(of.bad, wide, largest);
  if (job.block_cols > 1) fold_rows(of.bad[0], wide, largest);
}

// The largest magnitude of each column's block.
inline void peaks_of(const float* x, int64_t stride, int rows, int n, const Job& job,
                     int32_t* peak) {
  std::memset(peak, 0, sizeof(int32_t) * kBetterCols);
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < n; c++) peak[c] = larger(peak[c], bits(x[r * stride + c]) & kSize);
  for (int c = 0; job.block_cols > 1 && c < n; c += kSixteen) {
    Ints v;
    std::memcpy(&v, peak + c, sizeof v);
    v = most_of(v);
    std::memcpy(peak + c, &v, sizeof v);
  }
}

// A candidate's scales at each column; blocks that span columns are worked out once.
inline void scales_at_columns(const int32_t* peak, const float* up, int n, const Job& job,
                              float more, Candidate& of) {
  if (job.block_cols == 1) return scales_two_level(peak, up, n, job, more, of.enc, of.dec);
  constexpr int kBlocks = kBetterCols / kSixteen;
  int32_t peaks[kBlocks] = {};
  float ups[kBlocks] = {}, enc[kBlocks], dec[kBlocks];
  const int blocks = (n + kSixteen - 1) / kSixteen;
  for (int b = 0; b < blocks; b++) peaks[b] = peak[b * kSixteen], ups[b] = up[b * kSixteen];
  scales_two_level(peaks, ups, blocks, job, more, enc, dec);
  for (int b = 0; b < blocks; b++)
    for (int i = 0; i < kSixteen; i++)
      of.enc[b * kSixteen + i] = enc[b], of.dec[b * kSixteen + i] = dec[b];
}

// One row of blocks: at most 16 rows, at most kBetterCols columns, the first a block's first.
template <class Round, class Out>
void better_tile(const float* x, int64_t stride, Out* out, int rows, int n, uint32_t index,
                 const Job& job, Above above, const Round& round, Candidates& both) {
  int32_t peak[kBetterCols];
  peaks_of(x, stride, rows, n, job, peak);
  scales_at_columns(peak, above.enc, n, job, 1.0f, both.six);
  scales_at_columns(peak, above.enc, n, job, 1.5f, both.four);
  for (Candidate* one : {&both.six, &both.four}) {
    try_scales(x, stride, rows, n, index, job, above.enc, round, *one);
    measure(*one, rows, n, job);
  }
  const Candidate &six = both.six, &four = both.four;
  for (int r = 0; r < rows; r++) {
    Out* os = out + r * job.out_cols;
    for (int c = 0; c < n; c++) {
      const float a = six.elements[r][c] * six.dec[c], b = four.elements[r][c] * four.dec[c];
      const float chosen = four.bad[0][c] < six.bad[0][c] ? b : a;
      store(os + c, chosen * (job.fold ? above.dec[c] : 1.0f));
    }
  }
}

template <class Round, class Out_>
struct Better {
  using Out = Out_;
  const Job& job;
  const Round round;
  const std::unique_ptr<Candidates> both{new Candidates};
  Better(const Job& job, const Round& round) : job(job), round(round) {}

  void row(const float* x, Out* out, int64_t n, uint32_t index, Upper above) {
    float enc[kBetterCols], dec[kBetterCols];
    std::fill_n(enc, kBetterCols, above.enc), std::fill_n(dec, kBetterCols, above.dec);
    for (int64_t c = 0; c < n; c += kBetterCols)
      better_tile(x + c, 0, out + c, 1, int(least(kBetterCols, n - c)), index + uint32_t(c), job,
                  {enc, dec}, round, *both);
  }
  void band(const float* x, int64_t stride, Out* out, int rows, int n, uint32_t index,
            Above above) {
    for (int c = 0; c < n; c += kBetterCols)
      better_tile(x + c, stride, out + c, rows, int(least(kBetterCols, n - c)),
                  index + uint32_t(c), job, {above.enc + c, above.dec + c}, round, *both);
  }
};

}  // namespace zoo
