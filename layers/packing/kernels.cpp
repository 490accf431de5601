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

#include "operands.hpp"

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
