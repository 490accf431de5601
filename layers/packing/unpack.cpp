// Nibbles to numbers: what storage.py's torch ops compute, bit for bit, without their temporaries.
// Plain C ABI, no torch headers.

#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

extern "C" {

// One call. Mirrored field by field by unpack.py Job.
struct MoeZooUnpack {
  const uint8_t* codes;   // [rows, row_bytes], two to a byte, the low one first
  const float* factors;   // [rows, blocks], or null: all 1
  const float* table;     // [16], numbers by code
  void* out;              // [rows, k], bfloat16 or float32
  int64_t rows, k, row_bytes, blocks, block;
  int32_t half, threads;
};

}  // extern "C"

namespace {

inline void write(float v, float* to) { *to = v; }
inline void write(float v, uint16_t* to) {  // half to even; NaN stays NaN
  uint32_t b;
  std::memcpy(&b, &v, 4);
  const uint32_t rounded = b + 0x7FFF + ((b >> 16) & 1);
  *to = ((b & 0x7FFFFFFF) > 0x7F800000 ? b | 0x00400000 : rounded) >> 16;
}

template <class Out>
void unpack(const MoeZooUnpack& job, int64_t row) {
  const uint8_t* codes = job.codes + row * job.row_bytes;
  const float* factors = job.factors ? job.factors + row * job.blocks : nullptr;
  Out* out = static_cast<Out*>(job.out) + row * job.k;
  for (int64_t begin = 0, b = 0; begin < job.k; begin += job.block, b++) {
    const float factor = factors ? factors[b] : 1.0f;
    Out scaled[16];  // the same sixteen products, whichever codes the block holds
    for (int c = 0; c < 16; c++) write(job.table[c] * factor, scaled + c);
    const int64_t end = begin + job.block < job.k ? begin + job.block : job.k;
    for (int64_t i = begin; i < end; i++) out[i] = scaled[codes[i / 2] >> (i % 2 * 4) & 15];
  }
}

}  // namespace

extern "C" int moe_zoo_unpack(const MoeZooUnpack* given) {
  const MoeZooUnpack& job = *given;
#pragma omp parallel for num_threads(job.threads)
  for (int64_t row = 0; row < job.rows; row++) {
    if (job.half) unpack<uint16_t>(job, row);
    else unpack<float>(job, row);
  }
  return 0;
}
