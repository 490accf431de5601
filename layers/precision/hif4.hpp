// HiF4 (hif4.py): scales of units of 64, each number's own factors among them.
#pragma once

#include <memory>

#include "elements.hpp"
#include "lanes.hpp"

namespace zoo {

constexpr int kUnit = 64, kFours = kUnit / 4;

// hif4.py round_bits of grids.py
inline int32_t round_bits(int32_t size, int drop) {
  return (size + (1 << (drop - 1)) - 1 + ((size >> drop) & 1)) & -(1 << drop);
}

inline int32_t bfloat16_bits(float x) { return round_bits(smaller(bits(x) & kSize, kInfinity), 16); }

// hif4.py e6m2
inline float scale_e6m2(int32_t peak) {
  const int32_t rough = bfloat16_bits(value(peak) * 0.142578125f);
  const int32_t size = smaller(larger(rough, bits(0x1p-48f)), bits(49152.0f));
  return value(peak < kInfinity ? round_bits(size, 21) : kNan);
}

// What multiplies a number to give k, and k to give the number; merged by powers of two, exactly.
inline void factors(int32_t peak_4, int32_t peak_8, float scale, float inverse, float* enc,
                    float* dec) {
  const float double_8 = value(peak_8) * inverse >= 4.0f ? 2.0f : 1.0f;
  const float half_8 = value(peak_8) * inverse >= 4.0f ? 0.5f : 1.0f;
  const bool high = value(peak_4) * inverse * half_8 >= 2.0f;
  *enc = inverse * (half_8 * (high ? 2.0f : 4.0f));
  *dec = double_8 * (high ? 0.5f : 0.25f) * scale;
}

// k of at most 7, half away from zero, or up with the odds that noise gives.
inline float to_k(float y, float shift) {
  const int32_t b = bits(y);
  const float k = float(int32_t(value(smaller(b & kSize, bits(7.0f))) + shift));
  return value(bits(k) | (b & ~kSize));
}

struct HalfAway {
  float operator()(float y, uint32_t) const { return to_k(y, 0.5f); }
};

struct StochasticK {
  Stream stream;
  float operator()(float y, uint32_t index) const { return to_k(y, stream.uniform(index)); }
};

// One unit along a row: x, enc and dec of 64.
inline void unit_along_row(const float* x, float* enc, float* dec) {
  int32_t peak[kLanes], peak_4[kUnit], peak_8[kUnit];
  Ints all = {};
  for (int i = 0; i < kUnit; i += kLanes) {
    Ints p = Ints(lanes(x + i)) & kSize;
    p = most_paired<2>(most_paired<1>(p));
    std::memcpy(peak_4 + i, &p, sizeof p);
    p = most_paired<4>(p);
    std::memcpy(peak_8 + i, &p, sizeof p);
    all = most(all, p);
  }
  all = most_paired<8>(all);
  std::memcpy(peak, &all, sizeof all);
  float scale[kLanes], inverse[kLanes];
  for (int i = 0; i < kLanes; i++) {
    scale[i] = scale_e6m2(peak[i]);
    inverse[i] = value(bfloat16_bits(1.0f / scale[i]));
  }
  for (int j = 0; j < kUnit; j += kLanes)
    for (int i = 0; i < kLanes; i++)
      factors(peak_4[i + j], peak_8[i + j], scale[i], inverse[i], enc + i + j, dec + i + j);
}

constexpr int kUnitCols = 256;  // columns in flight

// One row of n numbers, at most kUnitCols; enc and dec of n, rounded up to units.
inline void units_along_row(const float* x, int n, float* enc, float* dec) {
  int c = 0;
  for (; c + kUnit <= n; c += kUnit) unit_along_row(x + c, enc + c, dec + c);
  if (c == n) return;
  float last[kUnit] = {};
  std::memcpy(last, x + c, sizeof(float) * (n - c));
  unit_along_row(last, enc + c, dec + c);
}

struct ColumnFactors {
  float enc[kFours][kUnitCols], dec[kFours][kUnitCols];  // by four rows and column
};

// One unit of at most 64 rows down each of n columns, at most kUnitCols.
inline void units_down_columns(const float* x, int64_t stride, int rows, int n, ColumnFactors& f) {
  int32_t peak_4[kFours][kUnitCols], peak[kUnitCols] = {};
  for (int j = 0; j < kFours; j++) {
    std::memset(peak_4[j], 0, sizeof(int32_t) * n);
    for (int r = 4 * j; r < rows && r < 4 * j + 4; r++)
      for (int c = 0; c < n; c++)
        peak_4[j][c] = larger(peak_4[j][c], bits(x[r * stride + c]) & kSize);
    for (int c = 0; c < n; c++) peak[c] = larger(peak[c], peak_4[j][c]);
  }
  float scale[kUnitCols], inverse[kUnitCols];
  for (int c = 0; c < n; c++) {
    scale[c] = scale_e6m2(peak[c]);
    inverse[c] = value(bfloat16_bits(1.0f / scale[c]));
  }
  for (int j = 0; j < kFours; j++)
    for (int c = 0; c < n; c++)
      factors(peak_4[j][c], larger(peak_4[j][c], peak_4[j ^ 1][c]), scale[c], inverse[c],
              &f.enc[j][c], &f.dec[j][c]);
}

template <class Round, class Out_>
struct Units {
  using Out = Out_;
  const Job& job;
  const Element<Family<false, false, false>, Round> element;
  const std::unique_ptr<ColumnFactors> f{new ColumnFactors};
  Units(const Job& job, const Round& round) : job(job), element{round} {}

  void row(const float* x, Out* out, int64_t n, uint32_t index, Upper) {
    for (int64_t c = 0; c < n; c += kUnitCols) {
      const int wide = int(least(kUnitCols, n - c));
      units_along_row(x + c, wide, f->enc[0], f->dec[0]);
      put_row(x + c, out + c, wide, index + uint32_t(c), 0);
    }
  }
  void band(const float* x, int64_t stride, Out* out, int rows, int n, uint32_t index, Above) {
    for (int c = 0; c < n; c += kUnitCols) {
      const int wide = int(least(kUnitCols, n - c));
      units_down_columns(x + c, stride, rows, wide, *f);
      for (int r = 0; r < rows; r++) {
        const int64_t skip = r * job.out_cols + c;
        put_row(x + r * stride + c, out + skip, wide, index + uint32_t(skip), r / 4);
      }
    }
  }

 private:
  void put_row(const float* x, Out* out, int n, uint32_t index, int four) const {
    const float *enc = f->enc[four], *dec = f->dec[four];
    for (int c = 0; c < n; c++)
      store(out + c, element(x[c], enc[c], dec[c], 1.0f, index + uint32_t(c)));
  }
};

}  // namespace zoo
