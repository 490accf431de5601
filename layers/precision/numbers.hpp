// Single numbers: float32 bits, small grids (grids.py), rounding, random bits (random.py).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace zoo {

constexpr int32_t kSize = 0x7FFFFFFF, kExponent = 0x7F800000, kMantissa = 0x007FFFFF;
constexpr int32_t kInfinity = 0x7F800000, kNan = 0x7FC00000, kTiniestScale = 0x00400000;
constexpr float kFloatMax = std::numeric_limits<float>::max();

inline int32_t bits(float value) { int32_t b; std::memcpy(&b, &value, 4); return b; }
inline float value(int32_t b) { float v; std::memcpy(&v, &b, 4); return v; }
inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline float load(const float* p) { return *p; }
inline float load(const uint16_t* p) { return value(int32_t(uint32_t(*p) << 16)); }
inline void store(float* p, float v) { *p = v; }
inline void store(uint16_t* p, float v) {  // to bfloat16, half to even; NaN stays NaN
  uint32_t b = uint32_t(bits(v));
  uint32_t rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
  *p = uint16_t((b & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

struct Grid {
  int32_t largest, smallest_exponent, magic, mantissa;
  Grid(int32_t mantissa_bits, int32_t min_exponent, float top)
      : largest(bits(top)), smallest_exponent((127 + min_exponent) << 23),
        magic((23 - mantissa_bits) << 23), mantissa(mantissa_bits << 23) {}
};

// grids.py to_grid
inline float nearest(float y, const Grid& g) {
  const int32_t b = bits(y);
  const int32_t size = smaller(b & kSize, g.largest);
  const float magic = value(larger(size & kExponent, g.smallest_exponent) + g.magic);
  const float rounded = (value(size) + magic) - magic;
  return value(bits(rounded) | (b & ~kSize));
}

// grids.py to_grid with noise
inline float stochastic(float y, const Grid& g, float noise) {
  const int32_t b = bits(y);
  const int32_t size = smaller(b & kSize, g.largest);
  const int32_t step = larger(size & kExponent, g.smallest_exponent) - g.mantissa;
  // what is truncated lies in [0, 2^24): its floor
  const float steps = float(int32_t(value(size) * value((254 << 23) - step) + noise));
  return value(bits(steps * value(step)) | (b & ~kSize));
}

// random.py _mix
inline uint32_t mix(uint32_t h) {
  h ^= h >> 16;
  h *= 0x21F0AAADu;
  h ^= h >> 15;
  h *= 0x735A2D97u;
  return h ^ (h >> 15);
}

// random.py hashed
struct Stream {
  uint32_t low = 0, high = 0;
  Stream() = default;
  Stream(int64_t key, int64_t operand)
      : low(mix(uint32_t(key) + uint32_t(operand) * 0x9E3779B9u)),
        high(mix(uint32_t(uint64_t(key) >> 32) ^ low)) {}
  uint32_t operator()(uint32_t index) const { return mix(mix(index + low) ^ high); }
  float uniform(uint32_t index) const {  // random.py uniform
    return float(int32_t((*this)(index) >> 16) * 2 + 1) * 0x1p-17f;
  }
};

// How elements find their grid value; index counts the elements of the whole tensor.
struct Nearest {
  Grid grid;
  float operator()(float y, uint32_t) const { return nearest(y, grid); }
};

struct Stochastic {
  Grid grid;
  Stream stream;
  float operator()(float y, uint32_t index) const { return stochastic(y, grid, stream.uniform(index)); }
};

}  // namespace zoo
