// Scales from the bits of largest magnitudes: of blocks, and of what lies above the blocks.
#pragma once

#include "numbers.hpp"

// One call. Mirrored field by field by native.py Job.
struct MoeZooJob {
  const void* x;         // [rows, cols], rows `stride` numbers apart
  void* out;             // [out_rows, out_cols]
  const int64_t* ends;   // [segments], inclusive cumulative row counts of x
  int64_t* moved;        // [segments], those of out, written where rotation adds rows; or null
  float* scale;          // written: [segments], [out_rows] or [segments, out_cols], by level
  const float* given;    // [segments], decoding scales not to be found here; or null
  const float* signs;    // [hadamard], or null: drawn from signs_key
  const int64_t* key;    // of the noise; null: round to nearest
  const int64_t* signs_key;
  int64_t rows, cols, stride, segments, out_rows, out_cols;
  int32_t block_rows, block_cols, axis, rule, level, hadamard, operand;
  int32_t mantissa_bits, min_exponent, max_exponent;  // of elements
  int32_t scale_mantissa_bits, scale_min_exponent;    // of two levels' block scales
  float largest, scale_largest;
  float gain, top;  // of blocks: 1 / what the largest magnitude goes to; of what lies above: that
  float rotation;   // 1 / sqrt(hadamard)
  int32_t x_bf16, out_bf16, fold, threads;
};

namespace zoo {

using Job = MoeZooJob;

enum Rule {
  kFloor, kRceil, kCeil, kEven, kQuest, kThreeQuarters,  // a power of two per block
  kTwoLevel, kSquares, kSizes, kLargest, kEden,          // a small scale under a float32 one
  kScaled, kScaledP2, kHiF4, kRotate, kRules
};
enum Level { kNone, kSegment, kRow, kColumn };  // what one scale above the blocks spans

struct Upper {
  float enc = 1.0f, dec = 1.0f;
};

// encoding.py upper_of, nvfp4.py upper_nvfp4, scaled.py upper_scaled
inline Upper upper_of(int32_t peak_bits, int32_t rule, float top) {
  const float peak = value(peak_bits);
  const bool usable = peak_bits > 0 && peak_bits < kInfinity;
  const float ratio = top / peak;
  Upper u;
  u.enc = usable ? (ratio > kFloatMax ? kFloatMax : ratio) : 1.0f;
  if (rule < kScaled) {
    u.dec = peak / top;
    return u;
  }
  if (rule == kScaledP2) u.enc = value(larger(bits(u.enc) & kExponent, 1 << 23));
  u.dec = usable ? 1.0f / u.enc : peak;
  return u;
}

// The scales of n blocks: enc multiplies x, dec the element. up: enc of what lies above each.
using Scales = void (*)(const int32_t* peak, const float* up, int n, const Job& job, float* enc,
                        float* dec);

// mx.py MX_RULES and encode_mx
template <int rule>
void scales_e8m0(const int32_t* __restrict peak, const float*, int n, const Job& job,
                 float* __restrict enc, float* __restrict dec) {
  const float inverse_largest = job.gain;
  const int32_t top = job.max_exponent, half = 1 << (22 - job.mantissa_bits);
  const int32_t largest = top > 0 ? kInfinity : kInfinity - 1;  // integers cannot say infinity
  for (int i = 0; i < n; i++) {
    int32_t code = 0;
    if (rule == kFloor) code = (peak[i] >> 23) - top;
    if (rule == kCeil) code = (peak[i] >> 23) + ((peak[i] & kMantissa) > 0) - top;
    if (rule == kEven) code = ((peak[i] + half) >> 23) - top;
    if (rule == kRceil) {
      const int32_t ratio = bits(value(peak[i]) * inverse_largest);
      code = ratio >> 23;
      code += (ratio & kMantissa) > (code == 0 ? kTiniestScale : 0);
    }
    code = smaller(larger(code, 0), 254);
    enc[i] = value(larger((254 - code) << 23, kTiniestScale));
    const int32_t scale = larger(code << 23, kTiniestScale);
    dec[i] = value(peak[i] > largest ? kNan : scale);
  }
}

// nvfp4.py raw_scale and scaled_by. more: multiplies what is rounded
inline void scales_two_level(const int32_t* __restrict peak, const float* __restrict up, int n,
                             const Job& job, float more, float* __restrict enc,
                             float* __restrict dec) {
  const Grid grid(job.scale_mantissa_bits, job.scale_min_exponent, job.scale_largest);
  for (int i = 0; i < n; i++) {
    const float raw = value(peak[i]) * (up[i] * job.gain) * more;
    const int32_t scale = bits(nearest(raw, grid));
    dec[i] = value((bits(raw) & kSize) > kInfinity ? kNan : scale);
    const float inverse = 1.0f / (dec[i] * (1.0f / up[i]));
    enc[i] = inverse > kFloatMax ? kFloatMax : inverse;  // keeps NaN
  }
}

inline void scales_once(const int32_t* __restrict peak, const float* __restrict up, int n,
                        const Job& job, float* __restrict enc, float* __restrict dec) {
  scales_two_level(peak, up, n, job, 1.0f, enc, dec);
}

// scaled.py encode_scaled: each block's own
template <int rule>
void scales_own(const int32_t* __restrict peak, const float*, int n, const Job& job,
                float* __restrict enc, float* __restrict dec) {
  for (int i = 0; i < n; i++) {
    const Upper own = upper_of(peak[i], rule, job.top);
    enc[i] = own.enc;
    dec[i] = own.dec;
  }
}

// scaled.py encode_scaled: none below the tensor's or row's
inline void scales_above(const int32_t*, const float* __restrict up, int n, const Job&,
                         float* __restrict enc, float* __restrict dec) {
  for (int i = 0; i < n; i++) enc[i] = up[i], dec[i] = 1.0f;
}

// Whether blocks have no scale of their own.
inline bool only_above(const Job& job) {
  return (job.rule == kScaled || job.rule == kScaledP2) && job.level != kNone;
}

}  // namespace zoo
