// Elements of packed weights against rows: how a row is laid out, and one step of 64 bytes of codes.

#pragma once

#include "scales.hpp"

namespace {

#ifdef __AVX512BF16__
inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#endif

// What x is laid out as, and one step of 64 bytes of codes against it.

// 128 nibbles against float32: lane i of part j holds x[8 i + j].
template <bool kUnits>
struct Nibbles {
  using Stored = float;
  static constexpr int kValues = 128;
  const __m512 table;
  explicit Nibbles(const float* t) : table(_mm512_loadu_ps(t)) {}
  static int place(int i) { return i % 8 * 16 + i / 8; }

  template <int T>
  void step(const uint8_t* codes, const float* const* x, int64_t at, Unit unit,
            __m512* sums) const {
    const __m512i c = load(codes);
    const __mmask16 even = _pext_u32(unit.fine, 0x55555555u);
    const __mmask16 odd = _pext_u32(unit.fine, 0xAAAAAAAAu);
    __m512 w[8];
    for (int j = 0; j < 8; j++) w[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(c, 4 * j), table);
    for (int t = 0; t < T; t++) {
      const float* p = x[t] + at;
      __m512 a = _mm512_mul_ps(w[0], _mm512_loadu_ps(p));
      __m512 b = _mm512_mul_ps(w[4], _mm512_loadu_ps(p + 64));
      for (int j = 1; j < 4; j++) {
        a = _mm512_fmadd_ps(w[j], _mm512_loadu_ps(p + 16 * j), a);
        b = _mm512_fmadd_ps(w[4 + j], _mm512_loadu_ps(p + 64 + 16 * j), b);
      }
      if (kUnits) a = _mm512_mask_add_ps(a, even, a, a), b = _mm512_mask_add_ps(b, odd, b, b);
      sums[t] = _mm512_fmadd_ps(unit.scale, _mm512_add_ps(a, b), sums[t]);
    }
  }
};

#ifdef __AVX512BF16__
// 128 nibbles against bfloat16: word i of part j holds x[4 i + j]. Codes 16..31 count twice.
template <bool kUnits>
struct HalfNibbles {
  using Stored = uint16_t;
  static constexpr int kValues = 128;
  __m512i table;
  explicit HalfNibbles(const float* t) {
    alignas(64) uint16_t words[32];
    for (int i = 0; i < 32; i++) {
      const float v = i < 16 || !kUnits ? t[i % 16] : 2 * t[i % 16];
      uint32_t bits;
      std::memcpy(&bits, &v, 4);
      words[i] = bits >> 16;
    }
    table = load(words);
  }
  static int place(int i) { return i % 4 * 32 + i / 4; }

  template <int T>
  void step(const uint8_t* codes, const uint16_t* const* x, int64_t at, Unit unit,
            __m512* sums) const {
    const __m512i c = load(codes);
    __m512i w[4];
    for (int j = 0; j < 4; j++) {
      w[j] = _mm512_srli_epi16(c, 4 * j);
      if (kUnits) {
        const __m512i twice = _mm512_maskz_set1_epi16(unit.fine, 16);
        w[j] = _mm512_or_si512(_mm512_and_si512(w[j], _mm512_set1_epi16(15)), twice);
      }
      w[j] = _mm512_permutexvar_epi16(w[j], table);
    }
    for (int t = 0; t < T; t++) {
      const uint16_t* p = x[t] + at;
      __m512 a = dot(dot(_mm512_setzero_ps(), w[0], load(p)), w[1], load(p + 32));
      __m512 b = dot(dot(_mm512_setzero_ps(), w[2], load(p + 64)), w[3], load(p + 96));
      sums[t] = _mm512_fmadd_ps(unit.scale, _mm512_add_ps(a, b), sums[t]);
    }
  }
};
#endif

// 64 bytes of FP8 against float32; a lane of four bytes is one lane here too: x[4 i + j].
template <bool kFine>  // E4M3, else E5M2
struct Octets {
  using Stored = float;
  static constexpr int kValues = 64;
  explicit Octets(const float*) {}
  static int place(int i) { return i % 4 * 16 + i / 4; }

  static __m512 decode(__m512i c) {  // the low byte of each lane; the rest is zero
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(c, _mm512_set1_epi32(128)), 24);
    const __m512i size = _mm512_and_si512(c, _mm512_set1_epi32(127));
    const __m512 power = _mm512_set1_ps(kFine ? 0x1p120f : 0x1p112f);
    const __m512i bits = _mm512_slli_epi32(size, kFine ? 20 : 21);
    __m512i v = _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(bits), power));
    if (kFine) {
      const __mmask16 nan = _mm512_cmpeq_epi32_mask(size, _mm512_set1_epi32(127));
      v = _mm512_mask_mov_epi32(v, nan, _mm512_set1_epi32(0x7FC00000));
    } else {  // 0x7C is infinity, above it NaN
      const __mmask16 top = _mm512_cmpge_epi32_mask(size, _mm512_set1_epi32(0x7C));
      v = _mm512_mask_or_epi32(v, top, bits, _mm512_set1_epi32(0x7F800000));
    }
    return _mm512_castsi512_ps(_mm512_or_si512(v, sign));
  }

  template <int T>
  void step(const uint8_t* codes, const float* const* x, int64_t at, Unit unit,
            __m512* sums) const {
    const __m512i c = load(codes), byte = _mm512_set1_epi32(255);
    __m512 w[4];
    for (int j = 0; j < 4; j++) w[j] = decode(_mm512_and_si512(_mm512_srli_epi32(c, 8 * j), byte));
    for (int t = 0; t < T; t++) {
      const float* p = x[t] + at;
      __m512 a = _mm512_mul_ps(w[0], _mm512_loadu_ps(p));
      for (int j = 1; j < 4; j++) a = _mm512_fmadd_ps(w[j], _mm512_loadu_ps(p + 16 * j), a);
      sums[t] = _mm512_fmadd_ps(unit.scale, a, sums[t]);
    }
  }
};

}  // namespace
