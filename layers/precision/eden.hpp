// MS-EDEN (eden.py): nearest elements of 16, scales corrected by rotated tile and rounded at random.
#pragma once

#include <algorithm>
#include <memory>

#include "elements.hpp"
#include "lanes.hpp"

namespace zoo {

constexpr int kEdenBlock = 16, kEdenCols = 256, kEdenBlocks = 16;  // the last two: in flight

struct EdenFactors {
  float enc[kEdenBlocks][kEdenCols], dec[kEdenBlocks][kEdenCols];
  float whole[kEdenBlocks][kEdenCols], kept[kEdenBlocks][kEdenCols];  // of x^2, of x times element
  float y[kEdenBlock][kEdenCols], z[kEdenBlock][kEdenCols];
};

// Halves onto halves (encoding.py block_sum) of n rows `step` apart, into the first.
inline void fold(float (*rows)[kEdenCols], int n, int cols) {
  for (int w = n / 2; w > 0; w /= 2)
    for (int r = 0; r < w; r++)
      for (int c = 0; c < cols; c++) rows[r][c] = rows[r][c] + rows[r + w][c];
}

template <class Round, class Out_>
struct Eden {
  using Out = Out_;
  const Job& job;
  const Grid elements, scales;
  const Stream stream;
  const std::unique_ptr<EdenFactors> f{new EdenFactors};
  Eden(const Job& job, const Round& round)
      : job(job), elements(round.grid),
        scales(job.scale_mantissa_bits, job.scale_min_exponent, job.scale_largest),
        stream(round.stream) {}

  // n: whole tiles.
  void row(const float* x, Out* out, int64_t n, uint32_t index, Upper above) {
    for (int64_t c = 0; c < n; c += kEdenCols)
      part_of_row(x + c, out + c, int(least(kEdenCols, n - c)), index + uint32_t(c), above);
  }

  // rows: one tile.
  void band(const float* x, int64_t stride, Out* out, int rows, int n, uint32_t index,
            Above above) {
    for (int c = 0; c < n; c += kEdenCols)
      part_of_band(x + c, stride, out + c, rows, smaller(kEdenCols, n - c), index + uint32_t(c),
                   {above.enc + c, above.dec + c});
  }

 private:
  void part_of_row(const float* x, Out* out, int n, uint32_t index, Upper above) {
    const int blocks = n / kEdenBlock, in_tile = job.hadamard / kEdenBlock;
    int32_t peak[kEdenBlocks];
    float up[kEdenBlocks], *enc = f->enc[0], *dec = f->dec[0];
    for (int b = 0; b < blocks; b++)
      peak[b] = most_of(Ints(lanes(x + b * kEdenBlock)) & kSize)[0];
    std::fill_n(up, kEdenBlocks, above.enc);
    scales_two_level(peak, up, blocks, job, 1.0f, enc, dec);
    for (int b = 0; b < blocks; b++) {
      float yy[kEdenBlock], yz[kEdenBlock];
      for (int i = 0; i < kEdenBlock; i++)
        products(x[b * kEdenBlock + i], enc[b], dec[b], &yy[i], &yz[i]);
      f->whole[b][0] = sum_of(lanes(yy))[0];
      f->kept[b][0] = sum_of(lanes(yz))[0];
    }
    for (int b = 0; b < blocks; b += in_tile) {
      fold(&f->whole[b], in_tile, 1);
      fold(&f->kept[b], in_tile, 1);
      for (int i = b; i < b + in_tile; i++)
        dec[i] = corrected(dec[i], f->whole[b][0], f->kept[b][0], index + uint32_t(i * kEdenBlock));
    }
    for (int b = 0; b < blocks; b++)
      for (int i = b * kEdenBlock; i < (b + 1) * kEdenBlock; i++)
        store(out + i, decoded(x[i], enc[b], dec[b], above.dec));
  }

  void part_of_band(const float* x, int64_t stride, Out* out, int rows, int n, uint32_t index,
                    Above above) {
    const int blocks = rows / kEdenBlock;
    for (int b = 0; b < blocks; b++)
      measure(x + b * kEdenBlock * stride, stride, n, above, b);
    fold(f->whole, blocks, n);
    fold(f->kept, blocks, n);
    for (int b = 0; b < blocks; b++) {
      const uint32_t first = index + uint32_t(b * kEdenBlock * job.out_cols);
      float* dec = f->dec[b];
      for (int c = 0; c < n; c++)
        dec[c] = corrected(dec[c], f->whole[0][c], f->kept[0][c], first + uint32_t(c));
    }
    for (int r = 0; r < rows; r++) {
      const float* xs = x + r * stride;
      const float *enc = f->enc[r / kEdenBlock], *dec = f->dec[r / kEdenBlock];
      Out* os = out + r * job.out_cols;
      for (int c = 0; c < n; c++) store(os + c, decoded(xs[c], enc[c], dec[c], above.dec[c]));
    }
  }

  // Scales and sums of block b of each column.
  void measure(const float* x, int64_t stride, int n, Above above, int b) {
    int32_t peak[kEdenCols] = {};
    for (int r = 0; r < kEdenBlock; r++)
      for (int c = 0; c < n; c++) peak[c] = larger(peak[c], bits(x[r * stride + c]) & kSize);
    float *enc = f->enc[b], *dec = f->dec[b];
    scales_two_level(peak, above.enc, n, job, 1.0f, enc, dec);
    for (int r = 0; r < kEdenBlock; r++)
      for (int c = 0; c < n; c++)
        products(x[r * stride + c], enc[c], dec[c], &f->y[r][c], &f->z[r][c]);
    fold(f->y, kEdenBlock, n);
    fold(f->z, kEdenBlock, n);
    std::copy_n(f->y[0], n, f->whole[b]);
    std::copy_n(f->z[0], n, f->kept[b]);
  }

  inline void products(float x, float enc, float dec, float* yy, float* yz) const {
    const float y = x * enc + 0.0f, element = nearest(y, elements);
    const int32_t there = -int32_t(dec != 0.0f);  // a block too small for any scale leaves nothing
    const float kept = value(bits(y) & there);
    *yy = kept * kept;
    *yz = kept * element;
  }
  inline float corrected(float dec, float whole, float kept, uint32_t index) const {
    const float ratio = whole / kept;
    const float scale = dec * (kept == 0.0f ? 1.0f : ratio);
    const float rounded = stochastic(scale, scales, stream.uniform(index));
    return (bits(scale) & kSize) > kInfinity ? scale : rounded;
  }
  inline float decoded(float x, float enc, float dec, float above) const {
    return nearest(x * enc + 0.0f, elements) * dec * (job.fold ? above : 1.0f);
  }
};

}  // namespace zoo
