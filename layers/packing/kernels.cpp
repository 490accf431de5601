// Packed matrices times a few rows of numbers, on a CPU with AVX-512.
// Plain C ABI, no torch headers. Bound by reading the codes, once each, where they lie; sums are in
// float32. A table of 16 numbers by code is one permutation of a register, and the rows x are laid
// out once so that the codes need no other order than the one they are stored in.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifndef __AVX512BW__
#error "packed weights are read by AVX-512 BW, which this CPU has not"
#endif
#include <immintrin.h>

extern "C" {

// One call. Mirrored field by field by native.py Job. A row of codes is a whole number of bytes.
struct MoeZooPacked {
  const uint8_t* codes;    // [E, N, row_bytes]
  const uint8_t* scales;   // [E, N, row_scales]; not read where the kind is kNone
  const void* x;           // [T, K]
  const int64_t* which;    // [T], the matrix of each row of x; null for the only one
  const float* table;      // [16], numbers by 4-bit code
  float* y;                // [T, N]
  int64_t matrices, n, k, t, row_bytes, row_scales;
  int32_t element, scale;  // enum Element, enum Scale
  int32_t half;            // x is bfloat16, else float32
  int32_t threads;
};

}  // extern "C"

namespace {

using Job = MoeZooPacked;
enum Element { kNibble = 0, kE4M3 = 1, kE5M2 = 2 };
enum Scale { kNone = 0, kE8M0 = 1, kUE4M3 = 2, kUE5M3 = 3, kHiF4 = 4 };
constexpr int kBytes = 64;  // codes of one step

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

// y = w x for rows [first, last) of one matrix and T rows x.
template <class Operand, class Scales, int T>
void multiply(const Job& job, const uint8_t* codes, const uint8_t* scales, int64_t first,
              int64_t last, const typename Operand::Stored* const* x, float* const* y) {
  constexpr int64_t kStride = int64_t(Scales::kSteps) * kBytes;
  const Operand operand(job.table);
  const Scales each;
  const int64_t whole = job.row_bytes / kStride, rest = job.row_bytes % kStride;
  const int64_t rest_scales = job.row_scales - whole * Scales::kStored;
  for (int64_t row = first; row < last; row++) {
    const uint8_t *c = codes + row * job.row_bytes, *s = scales + row * job.row_scales;
    __m512 sums[T];
    for (int t = 0; t < T; t++) sums[t] = _mm512_setzero_ps();
    int64_t at = 0;
    const auto run = [&](const uint8_t* from, const uint8_t* scale) {
      each.each(scale, [&](int g, Unit unit) {
        operand.template step<T>(from + g * kBytes, x, at + g * Operand::kValues, unit, sums);
      });
      at += Scales::kSteps * Operand::kValues;
    };
    for (int64_t i = 0; i < whole; i++, c += kStride, s += Scales::kStored) run(c, s);
    if (rest) {
      uint8_t end[kStride] = {}, end_scales[16] = {};
      std::memcpy(end, c, rest);
      if (Scales::kStored) std::memcpy(end_scales, s, rest_scales);
      run(end, end_scales);
    }
    for (int t = 0; t < T; t++) y[t][row] = _mm512_reduce_add_ps(sums[t]);
  }
}

inline float to_float(const Job& job, int64_t at) {
  if (!job.half) return static_cast<const float*>(job.x)[at];
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(job.x)[at]) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline void put(const Job& job, int64_t at, float* to) { *to = to_float(job, at); }
inline void put(const Job& job, int64_t at, uint16_t* to) {
  *to = static_cast<const uint16_t*>(job.x)[at];
}

template <class Operand, class Scales>
void run(const Job& job) {
  using Stored = typename Operand::Stored;
  constexpr int64_t v = Operand::kValues * Scales::kSteps;
  const int64_t width = (job.k + v - 1) / v * v, n = job.n;
  std::vector<Stored> x(job.t * width);
  for (int64_t t = 0; t < job.t; t++)
    for (int64_t i = 0; i < job.k; i++)
      put(job, t * job.k + i, &x[t * width + i / Operand::kValues * Operand::kValues +
                                 Operand::place(i % Operand::kValues)]);
#pragma omp parallel num_threads(job.threads)
  {
    int64_t me = 0, of = 1;
#ifdef _OPENMP
    me = omp_get_thread_num(), of = omp_get_num_threads();
#endif
    const int64_t first = n * me / of, last = n * (me + 1) / of;
    for (int64_t t = 0; t < job.t;) {
      const int64_t matrix = job.which ? job.which[t] : 0;
      int64_t same = 1;  // rows that the same matrix takes
      while (same < 4 && t + same < job.t && (!job.which || job.which[t + same] == matrix)) same++;
      const Stored* xs[4];
      float* ys[4];
      for (int64_t j = 0; j < 4; j++) {
        const int64_t of_row = t + std::min(j, same - 1);  // the last again: written alike
        xs[j] = &x[of_row * width], ys[j] = job.y + of_row * n;
      }
      const uint8_t* codes = job.codes + matrix * n * job.row_bytes;
      const uint8_t* scales = job.scales + matrix * n * job.row_scales;
      if (same == 1) multiply<Operand, Scales, 1>(job, codes, scales, first, last, xs, ys);
      else multiply<Operand, Scales, 4>(job, codes, scales, first, last, xs, ys);
      t += same;
    }
  }
}

template <class Scales, bool kUnits = false>
void run_nibbles(const Job& job) {
#ifdef __AVX512BF16__
  if (job.half) return run<HalfNibbles<kUnits>, Scales>(job);
#endif
  run<Nibbles<kUnits>, Scales>(job);
}

template <bool kFine>
int run_octets(const Job& job) {
  if (job.scale == kE8M0) return run<Octets<kFine>, Shared<E8M0, 8>>(job), 0;
  if (job.scale == kNone) return run<Octets<kFine>, NoScale>(job), 0;
  return 2;
}

}  // namespace

// 0 when done, 1 for a matrix that does not exist, 2 for a format that is not read here.
extern "C" int moe_zoo_packed_multiply(const MoeZooPacked* given) {
  const Job& job = *given;
  for (int64_t t = 0; job.which && t < job.t; t++)
    if (job.which[t] < 0 || job.which[t] >= job.matrices) return 1;
  if (job.element == kE4M3) return run_octets<true>(job);
  if (job.element == kE5M2) return run_octets<false>(job);
  switch (job.scale) {
    case kNone: return run_nibbles<NoScale>(job), 0;
    case kE8M0: return run_nibbles<Shared<E8M0, 4>>(job), 0;
    case kUE4M3: return run_nibbles<Shared<Small<7, 127>, 2>>(job), 0;
    case kUE5M3: return run_nibbles<Shared<Small<15, 255>, 2>>(job), 0;
    case kHiF4: return run_nibbles<HiF4, true>(job), 0;
    default: return 2;
  }
}
