// Scales of packed weights: bytes to one float32 for each lane of a step of 64 bytes of codes.

#pragma once

#include <cstdint>
#include <cstring>
#ifndef __AVX512BW__
#error "packed weights are read by AVX-512 BW, which this CPU has not"
#endif
#include <immintrin.h>

namespace {

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }
inline __m512i words(const uint8_t* from) {  // 16 bytes, each a word of 32 bits
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

struct Unit {
  __m512 scale;   // of each lane of four bytes
  uint32_t fine;  // bit k: the k-th two bytes count twice
};
inline __m512 or_nan(__m512i bits, __mmask16 nan) {
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7FC00000)));
}

// Scales. kStored bytes serve kSteps steps; `each` hands every step the unit of its lanes.
struct NoScale {
  static constexpr int kSteps = 1, kStored = 0;
  template <class Step>
  void each(const uint8_t*, Step step) const { step(0, {_mm512_set1_ps(1.0f), 0}); }
};
struct E8M0 {
  static __m512 decode(__m512i c) {
    const __m512i bits = _mm512_max_epi32(_mm512_slli_epi32(c, 23), _mm512_set1_epi32(0x00400000));
    return or_nan(bits, _mm512_cmpeq_epi32_mask(c, _mm512_set1_epi32(255)));
  }
};
template <int kBias, int kNaN>  // three bits of mantissa, no sign
struct Small {
  static __m512 decode(__m512i c) {  // the product moves the bias, of subnormal numbers too
    const __m512 power = _mm512_castsi512_ps(_mm512_set1_epi32((254 - kBias) << 23));
    const __m512 v = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(c, 20)), power);
    return or_nan(_mm512_castps_si512(v), _mm512_cmpeq_epi32_mask(c, _mm512_set1_epi32(kNaN)));
  }
};
template <class Stored, int kLanes>  // so many lanes of four bytes share one
struct Shared {
  static constexpr int kSteps = kLanes, kStored = 16;
  __m512i at[kSteps];
  Shared() {
    for (int g = 0; g < kSteps; g++) {
      alignas(64) int32_t lane[16];
      for (int i = 0; i < 16; i++) lane[i] = 16 / kLanes * g + i / kLanes;
      at[g] = _mm512_load_si512(lane);
    }
  }
  template <class Step>
  void each(const uint8_t* s, Step step) const {
    const __m512 all = Stored::decode(words(s));
    for (int g = 0; g < kSteps; g++) step(g, {_mm512_permutexvar_ps(at[g], all), 0});
  }
};
struct HiF4 {  // two units: E6M2, eight exponents of a lane, sixteen of half a lane
  static constexpr int kSteps = 1, kStored = 8;
  template <class Step>
  void each(const uint8_t* s, Step step) const {
    uint32_t a, b;
    std::memcpy(&a, s, 4);
    std::memcpy(&b, s + 4, 4);
    const __m512i c = _mm512_mask_set1_epi32(_mm512_set1_epi32(a & 255), 0xFF00, b & 255);
    const __mmask16 coarse = ((a >> 8) & 255) | (b & 0xFF00);
    __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(c, _mm512_set1_epi32(79 << 2)), 21);
    bits = _mm512_mask_add_epi32(bits, coarse, bits, _mm512_set1_epi32(1 << 23));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(c, _mm512_set1_epi32(255));
    step(0, {or_nan(bits, nan), (a >> 16) | (b & 0xFFFF0000u)});
  }
};

}  // namespace
