// Block quantisers for CPU rows x columns, equal bit for bit to layers/precision/blocks.py.
// Plain C ABI, no torch headers. Build without -ffast-math and with -ffp-contract=off: every
// operation below is one float32 operation of the definition, in the same order.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int32_t kSize = 0x7FFFFFFF, kExponent = 0x7F800000, kMantissa = 0x007FFFFF;
constexpr int32_t kInfinity = 0x7F800000, kNan = 0x7FC00000, kTiniestScale = 0x00400000;
constexpr float kFloatMax = std::numeric_limits<float>::max();

inline int32_t bits(float value) { int32_t b; std::memcpy(&b, &value, 4); return b; }
inline float value(int32_t b) { float v; std::memcpy(&v, &b, 4); return v; }
inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

inline float load(const float* p) { return *p; }
inline float load(const uint16_t* p) { return value(int32_t(uint32_t(*p) << 16)); }
inline void store(float* p, float v) { *p = v; }
inline void store(uint16_t* p, float v) {  // to bfloat16, half to even; NaN stays NaN
  uint32_t b = uint32_t(bits(v));
  uint32_t rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
  *p = uint16_t((b & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

struct Grid {
  int32_t largest, smallest_exponent, magic;
  Grid(int32_t mantissa_bits, int32_t min_exponent, float top)
      : largest(bits(top)), smallest_exponent((127 + min_exponent) << 23),
        magic((23 - mantissa_bits) << 23) {}
};

// blocks.py to_grid
inline float to_grid(float y, const Grid& g) {
  int32_t b = bits(y);
  int32_t size = smaller(b & kSize, g.largest);
  float magic = value(larger(size & kExponent, g.smallest_exponent) + g.magic);
  float rounded = (value(size) + magic) - magic;
  return value(bits(rounded) | (b & ~kSize));
}

enum Rule { kFloor = 0, kRceil = 1, kCeil = 2, kEven = 3, kTwoLevel = 4 };

}  // namespace

extern "C" {

// One call. Mirrored field by field by native.py Job.
struct MoeZooJob {
  const void* x;
  void* out;
  const int64_t* ends;  // [segments], inclusive cumulative row counts
  float* scale;         // [segments], written where rule == kTwoLevel
  int64_t rows, cols, stride, segments;
  int32_t block_rows, block_cols, rule, mantissa_bits, min_exponent, max_exponent;
  float largest;
  int32_t x_bf16, out_bf16, fold, threads;
};

}  // extern "C"

namespace {

using Job = MoeZooJob;

struct Segment {
  int64_t begin = 0, end = 0, first_band = 0;
  float s_enc = 1.0f, s_dec = 1.0f, fold = 1.0f;
};

// The scale of n blocks from the bits of their largest magnitudes: enc multiplies x, dec the code.
using Scales = void (*)(const int32_t* peak, int n, const Job& job, const Segment& s, float* enc,
                        float* dec);

// blocks.py encode_nvfp4
void scales_e4m3(const int32_t* __restrict peak, int n, const Job& job, const Segment& s,
                 float* __restrict enc, float* __restrict dec) {
  const Grid e4m3(3, -6, 448.0f);
  const float gain = s.s_enc * (1.0f / job.largest), s_dec = s.s_dec;
  for (int i = 0; i < n; i++) {
    float scale = to_grid(value(peak[i]) * gain, e4m3);
    scale = peak[i] > kInfinity ? value(kNan) : scale;
    float inverse = 1.0f / (scale * s_dec);
    enc[i] = inverse > kFloatMax ? kFloatMax : inverse;  // keeps NaN
    dec[i] = scale;
  }
}

// blocks.py MX_RULES and encode_mx
template <int rule>
void scales_e8m0(const int32_t* __restrict peak, int n, const Job& job, const Segment&,
                 float* __restrict enc, float* __restrict dec) {
  const float inverse_largest = 1.0f / job.largest;
  const int32_t top = job.max_exponent, half = 1 << (22 - job.mantissa_bits);
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
    dec[i] = value(peak[i] > kInfinity ? kNan : scale);
  }
}

constexpr Scales kScales[] = {scales_e8m0<kFloor>, scales_e8m0<kRceil>, scales_e8m0<kCeil>,
                              scales_e8m0<kEven>, scales_e4m3};

// What every element of a segment goes through.
struct Element {
  Grid grid;
  float zero;  // +0 turns -0 into +0, -0 changes nothing
  float fold;  // the tensor scale, or 1
  inline float operator()(float x, float enc, float dec) const {
    return (to_grid(x * enc + zero, grid) * dec) * fold;
  }
};

constexpr int kLane = 32;         // values per inner loop of fixed length, which compilers unroll
constexpr int kMostBlocks = 128;  // blocks in flight, so that scales are worked out as vectors
constexpr int kMostCols = 512;    // columns of a band in flight: stays in the first-level cache

template <class In>
inline int32_t peak_of(const In* x, int n) {
  int32_t lanes[kLane] = {}, peak = 0;
  int i = 0;
  for (; i + kLane <= n; i += kLane)
    for (int j = 0; j < kLane; j++) lanes[j] = larger(lanes[j], bits(load(x + i + j)) & kSize);
  for (int j = 0; j < kLane; j++) peak = larger(peak, lanes[j]);
  for (; i < n; i++) peak = larger(peak, bits(load(x + i)) & kSize);
  return peak;
}

// Blocks of 1 x block_cols in one row.
template <class In, class Out>
void along_row(const In* x, Out* out, const Job& job, const Segment& s, const Element& element) {
  const int64_t b = job.block_cols, cols = job.cols;
  int32_t peak[kMostBlocks];
  float enc[kMostBlocks], dec[kMostBlocks];
  for (int64_t from = 0; from < cols; from += b * kMostBlocks) {
    const int64_t end = cols - from < b * kMostBlocks ? cols : from + b * kMostBlocks;
    int n = 0;
    for (int64_t c = from; c < end; c += b) peak[n++] = peak_of(x + c, int(c + b < end ? b : end - c));
    kScales[job.rule](peak, n, job, s, enc, dec);
    n = 0;
    for (int64_t c = from; c < end; c += b, n++) {
      const int64_t stop = c + b < end ? c + b : end;
      int64_t i = c;
      for (; i + kLane <= stop; i += kLane)
        for (int j = 0; j < kLane; j++) store(out + i + j, element(load(x + i + j), enc[n], dec[n]));
      for (; i < stop; i++) store(out + i, element(load(x + i), enc[n], dec[n]));
    }
  }
}

// Blocks of rows x 1 or rows x block_cols in one band of at most block_rows rows.
template <class In, class Out>
void across_rows(const In* x, Out* out, int rows, const Job& job, const Segment& s,
                 const Element& element) {
  const int b = job.block_cols;
  int32_t peak[kMostCols];
  float enc[kMostCols], dec[kMostCols];
  const int64_t chunk = kMostCols / b * b;
  for (int64_t from = 0; from < job.cols; from += chunk) {
    const int n = int(job.cols - from < chunk ? job.cols - from : chunk);
    std::memset(peak, 0, sizeof peak);
    for (int r = 0; r < rows; r++) {
      const In* xs = x + r * job.stride + from;
      for (int c = 0; c < n; c++) peak[c] = larger(peak[c], bits(load(xs + c)) & kSize);
    }
    for (int i = 0; b > 1 && i < n; i += b) {  // past n the peaks are zero
      int32_t most = 0;
      for (int j = i; j < i + b; j++) most = larger(most, peak[j]);
      for (int j = i; j < i + b; j++) peak[j] = most;
    }
    kScales[job.rule](peak, n, job, s, enc, dec);
    for (int r = 0; r < rows; r++) {
      const In* xs = x + r * job.stride + from;
      Out* os = out + r * job.cols + from;
      for (int c = 0; c < n; c++) store(os + c, element(load(xs + c), enc[c], dec[c]));
    }
  }
}

// The work of one thread: bands [first, last) of all segments.
template <class In, class Out>
void bands(const Job& job, const std::vector<Segment>& segments, int64_t first, int64_t last) {
  const Grid grid(job.mantissa_bits, job.min_exponent, job.largest);
  size_t at = 0;
  for (int64_t band = first; band < last; band++) {
    while (at + 1 < segments.size() && segments[at + 1].first_band <= band) at++;
    const Segment& s = segments[at];
    const Element element{grid, job.rule == kTwoLevel ? 0.0f : -0.0f, s.fold};
    const int64_t row = s.begin + (band - s.first_band) * job.block_rows;
    const In* x = static_cast<const In*>(job.x) + row * job.stride;
    Out* out = static_cast<Out*>(job.out) + row * job.cols;
    const int64_t left = s.end - row;
    const int rows = int(left < job.block_rows ? left : job.block_rows);
    if (job.block_rows > 1) across_rows(x, out, rows, job, s, element);
    else along_row(x, out, job, s, element);
  }
}

// The largest magnitude of rows [first, last), added to each segment's.
template <class In>
void peaks(const Job& job, const std::vector<Segment>& segments, std::atomic<int32_t>* found,
           int64_t first, int64_t last) {
  for (size_t at = 0; at < segments.size(); at++) {
    const int64_t from = segments[at].begin > first ? segments[at].begin : first;
    const int64_t to = segments[at].end < last ? segments[at].end : last;
    if (from >= to) continue;
    int32_t peak = 0;
    for (int64_t row = from; row < to; row++) {
      const In* x = static_cast<const In*>(job.x) + row * job.stride;
      int32_t most = 0;
      for (int64_t c = 0; c < job.cols; c++) most = larger(most, bits(load(x + c)) & kSize);
      peak = larger(peak, most);
    }
    int32_t seen = found[at].load();
    while (seen < peak && !found[at].compare_exchange_weak(seen, peak)) {}
  }
}

// Calls work(first, last) with an equal share of n items for each thread.
template <class Work>
void share(int threads, int64_t n, Work work) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t of = omp_get_num_threads(), me = omp_get_thread_num();
      work(n * me / of, n * (me + 1) / of);
    }
    return;
  }
#endif
  work(0, n);
}

// The two levels of scale that NVFP4 has: the upper one, for each segment.
template <class In>
void tensor_scales(const Job& job, std::vector<Segment>& segments) {
  std::vector<std::atomic<int32_t>> found(segments.size());
  for (auto& f : found) f.store(0);
  share(job.threads, job.rows,
        [&](int64_t a, int64_t b) { peaks<In>(job, segments, found.data(), a, b); });
  const float top = 448.0f * job.largest;
  for (size_t i = 0; i < segments.size(); i++) {
    const float peak = value(found[i].load());
    Segment& s = segments[i];
    if (peak > 0 && peak <= kFloatMax) {
      s.s_enc = top / peak;
      if (s.s_enc > kFloatMax) s.s_enc = kFloatMax;
    }
    s.s_dec = 1.0f / s.s_enc;
    if (int64_t(i) < job.segments) job.scale[i] = peak / top;
    if (job.fold) s.fold = peak / top;
  }
}

template <class In, class Out>
void run(const Job& job, std::vector<Segment>& segments) {
  if (job.rule == kTwoLevel) tensor_scales<In>(job, segments);
  int64_t n = 0;
  for (auto& s : segments) {
    s.first_band = n;
    n += (s.end - s.begin + job.block_rows - 1) / job.block_rows;
  }
  share(job.threads, n, [&](int64_t a, int64_t b) { bands<In, Out>(job, segments, a, b); });
}

}  // namespace

// 0 when done, 1 for ends that fall or leave the rows, 2 for an unknown rule or block.
extern "C" int moe_zoo_quantize(const MoeZooJob* given) {
  const Job& job = *given;
  if (job.rule < kFloor || job.rule > kTwoLevel || job.block_rows < 1 || job.block_cols < 1 ||
      (job.block_rows > 1 && job.block_cols > kMostCols))
    return 2;
  std::vector<Segment> segments;
  int64_t begin = 0;
  for (int64_t i = 0; i <= job.segments; i++) {  // one more for rows past the last end
    const int64_t end = i < job.segments ? job.ends[i] : job.rows;
    if (end < begin || end > job.rows) return 1;
    Segment s;
    s.begin = begin, s.end = begin = end;
    segments.push_back(s);
  }
  if (job.x_bf16)
    job.out_bf16 ? run<uint16_t, uint16_t>(job, segments) : run<uint16_t, float>(job, segments);
  else
    job.out_bf16 ? run<float, uint16_t>(job, segments) : run<float, float>(job, segments);
  return 0;
}
