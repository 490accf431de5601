// A few tokens through the neurons that each of them runs, on a CPU (layers/spark_ffn.py):
//     y[t] = sum over n with s[t, n] > theta[t] of
//            activation(s[t, n] - theta[t]) * <up[n], q2[t]> * down[n],    s[t, n] = <predictor[n], q1[t]>
// Plain C ABI, no torch headers. Bound by reading the predictor, then rows that lie anywhere, once
// each: hits go by neuron, so tokens share its rows. Sums are in float32; what torch would hand on
// in bfloat16 is rounded to it, half to even.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "bfloat16.hpp"

extern "C" {

// One call. Mirrored field by field by spark_native.py Job.
struct MoeZooSparkTokens {
  const void* x;          // [T, D], q1 its first r numbers and q2 its last d_value
  const void* predictor;  // [F, r], or null: scores are given
  const float* scores;    // [T, F], or null
  const void* up;         // [F, d_value]
  const void* down;       // [F, D], by neuron
  void* y;                // [T, D], in bfloat16 where computed in it, else float32
  int64_t* active;        // [1], hits of all tokens
  int64_t tokens, d_model, d_ff, r, d_value;
  float z, huber;         // of the threshold
  int32_t chosen;         // the scores are less the threshold already, 0 where not chosen
  int32_t x_bf16, stored_bf16, in_bf16;  // of x; of the matrices; operands and results rounded
  int32_t activation, threads;
};

}  // extern "C"

namespace {

using Job = MoeZooSparkTokens;

constexpr int kLanes = 16, kSums = 4, kBlock = kSums * kLanes;  // numbers of a row in flight
constexpr int kTogether = 4;  // tokens that share a read of the predictor's row
constexpr float kEps = 1.1920929e-7f;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// How a matrix is stored and read.
struct Float32 {
  using Stored = float;
  static Floats get(const float* w) { return read<Floats>(w); }
  static float one(float w) { return w; }
};
struct Float32ToBfloat16 {
  using Stored = float;
  static Floats get(const float* w) { return bits<Floats>(nearest(read<Words>(w))); }
  static float one(float w) { return to_bf16(w); }
};
struct Bfloat16 {
  using Stored = uint16_t;
  static Floats get(const uint16_t* w) {
    return bits<Floats>(__builtin_convertvector(read<Halves>(w), Words) << 16);
  }
  static float one(uint16_t w) { return from_bf16(w); }
};

inline float total(Floats s) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; j++) s[j] += s[j + width];
  return s[0];
}

// Products of a row of n numbers with those of N tokens, which lie `step` apart.
template <class Matrix, int N, int U>
inline void dots(const typename Matrix::Stored* w, const float* x, int64_t step, int64_t n,
                 float* out, int64_t out_step) {
  Floats sums[N][U] = {};
  int64_t i = 0;
  for (; i + U * kLanes <= n; i += U * kLanes)
    for (int j = 0; j < U; j++) {
      const Floats v = Matrix::get(w + i + j * kLanes);
      for (int t = 0; t < N; t++) sums[t][j] += v * read<Floats>(x + t * step + i + j * kLanes);
    }
  for (int t = 0; t < N; t++) {
    Floats s = sums[t][0];
    for (int j = 1; j < U; j++) s += sums[t][j];
    float rest = 0;
    for (int64_t k = i; k < n; k++) rest += Matrix::one(w[k]) * x[t * step + k];
    out[t * out_step] = total(s) + rest;
  }
}

enum Activation { kGeluTanh = 0, kGelu = 1, kSilu = 2, kRelu = 3 };

inline float activate(int32_t activation, float x) {
  switch (activation) {
    case kGeluTanh: return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case kGelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    case kSilu: return x / (1.0f + std::exp(-x));
    default: return x < 0 ? 0.0f : x;  // keeps NaN
  }
}

struct Hit {
  int32_t neuron, token;
  float h;
};

// Kept from call to call: fresh blocks of this size would cost page faults.
struct Scratch {
  std::vector<float> x, scores, y;  // [T, D]; [T, F]; [T, D]
  std::vector<Hit> hits;
  std::vector<float> mean, shift;   // [T]
};

// Sums of fn(number) in an order of their own, so that they vectorise.
template <class Fn>
inline float sum(const float* a, int64_t n, Fn fn) {
  float part[kBlock] = {};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock)
    for (int j = 0; j < kBlock; j++) part[j] += fn(a[i + j]);
  for (int j = 0; i + j < n; j++) part[j] += fn(a[i + j]);
  for (int width = kBlock / 2; width > 0; width /= 2)
    for (int j = 0; j < width; j++) part[j] += part[j + width];
  return part[0];
}

class Tokens {
 public:
  Tokens(const Job& job, Scratch& scratch) : job_(job), s_(scratch) {
    const int64_t t = job.tokens, d = job.d_model;
    s_.x.resize(t * d), s_.y.resize(t * d), s_.mean.resize(t), s_.shift.resize(t);
    s_.hits.clear();
    for (int64_t i = 0; i < t * d; i++) {
      s_.x[i] = job.x_bf16 ? from_bf16(static_cast<const uint16_t*>(job.x)[i])
                           : static_cast<const float*>(job.x)[i];
      if (job.in_bf16) s_.x[i] = to_bf16(s_.x[i]);
    }
    if (job.predictor) s_.scores.resize(t * job.d_ff);
    scores_ = job.predictor ? s_.scores.data() : job.scores;
  }

  template <class Matrix>
  void run() {
#ifdef _OPENMP
#pragma omp parallel num_threads(job_.threads) if (job_.threads > 1)
    work<Matrix>(omp_get_thread_num(), omp_get_num_threads());
#else
    work<Matrix>(0, 1);
#endif
  }

 private:
  template <class Matrix>
  void work(int64_t me, int64_t of) {
    if (job_.predictor) score<Matrix>(job_.d_ff * me / of, job_.d_ff * (me + 1) / of);
#pragma omp barrier
#pragma omp single
    find();
    const int64_t n = s_.hits.size();
    value<Matrix>(n * me / of, n * (me + 1) / of);
#pragma omp barrier
    output<Matrix>(part(me, of), part(me + 1, of));
  }

  // Columns of y, whole blocks to a thread.
  int64_t part(int64_t me, int64_t of) const {
    return me == of ? job_.d_model : job_.d_model * me / of / kBlock * kBlock;
  }

  // Scores of neurons [first, last).
  template <class Matrix>
  void score(int64_t first, int64_t last) {
    const int64_t r = job_.r, d = job_.d_model, f = job_.d_ff;
    for (int64_t n = first; n < last; n++) {
      const auto* row = static_cast<const typename Matrix::Stored*>(job_.predictor) + n * r;
      int64_t t = 0;
      for (; t + kTogether <= job_.tokens; t += kTogether)
        dots<Matrix, kTogether, 2>(row, &s_.x[t * d], d, r, &s_.scores[t * f + n], f);
      for (; t < job_.tokens; t++)
        dots<Matrix, 1, kSums>(row, &s_.x[t * d], d, r, &s_.scores[t * f + n], f);
      for (t = 0; job_.in_bf16 && t < job_.tokens; t++)
        s_.scores[t * f + n] = to_bf16(s_.scores[t * f + n]);
    }
  }

  // Mean of a token's scores, and how far above it those begin that are kept.
  void threshold(int64_t t) {
    const int64_t f = job_.d_ff;
    const float* a = scores_ + t * f;
    const float mean = sum(a, f, [](float v) { return v; }) / f;
    const float squares = sum(a, f, [mean](float v) { return (v - mean) * (v - mean); });
    const float sigma = std::sqrt(squares / f);
    s_.mean[t] = mean;
    s_.shift[t] = sigma <= 4 * kEps * std::fabs(mean) ? INFINITY : sigma * job_.z;
  }

  float smooth(float u) const {
    if (!(job_.huber > 0)) return u;
    return u < job_.huber ? u * u / (2 * job_.huber) : u - job_.huber / 2;
  }

  void find() {
    const int64_t f = job_.d_ff;
    for (int64_t t = 0; !job_.chosen && t < job_.tokens; t++) threshold(t);
    for (int64_t n = 0; n < f; n++)
      for (int64_t t = 0; t < job_.tokens; t++) {
        float u = scores_[t * f + n];
        if (!job_.chosen) {
          u = u - s_.mean[t] - s_.shift[t];
          if (u <= 0) continue;  // not NaN, which is to be seen in y
          u = smooth(u);
        } else if (u == 0) {
          continue;
        }
        s_.hits.push_back({int32_t(n), int32_t(t), u});
      }
    *job_.active = s_.hits.size();
  }

  template <class Matrix>
  void value(int64_t first, int64_t last) {
    const int64_t v = job_.d_value, d = job_.d_model;
    const auto* up = static_cast<const typename Matrix::Stored*>(job_.up);
    for (int64_t i = first; i < last; i++) {
      Hit& hit = s_.hits[i];
      float u;
      dots<Matrix, 1, kSums>(up + hit.neuron * v, &s_.x[hit.token * d + d - v], d, v, &u, 1);
      if (job_.in_bf16)
        hit.h = to_bf16(to_bf16(activate(job_.activation, to_bf16(hit.h))) * to_bf16(u));
      else
        hit.h = activate(job_.activation, hit.h) * u;
    }
  }

  template <class Matrix>
  void output(int64_t first, int64_t last) {
    const int64_t d = job_.d_model;
    const auto* down = static_cast<const typename Matrix::Stored*>(job_.down);
    for (int64_t t = 0; t < job_.tokens; t++)
      std::fill(&s_.y[t * d] + first, &s_.y[t * d] + last, 0.0f);
    const int64_t n = s_.hits.size();
    for (int64_t i = 0; i < n; i++) {
      const Hit hit = s_.hits[i];
      const auto* row = down + hit.neuron * d;
      float* y = &s_.y[hit.token * d];
      int64_t j = first;
      for (; j + kLanes <= last; j += kLanes) {
        const Floats sum = read<Floats>(y + j) + Matrix::get(row + j) * hit.h;
        std::memcpy(y + j, &sum, sizeof sum);
      }
      for (; j < last; j++) y[j] += Matrix::one(row[j]) * hit.h;
    }
    for (int64_t t = 0; t < job_.tokens; t++)
      for (int64_t j = t * d + first; j < t * d + last; j++) {
        if (job_.in_bf16) static_cast<uint16_t*>(job_.y)[j] = bits<uint32_t>(to_bf16(s_.y[j])) >> 16;
        else static_cast<float*>(job_.y)[j] = s_.y[j];
      }
  }

  const Job& job_;
  Scratch& s_;
  const float* scores_;
};

}  // namespace

extern "C" int moe_zoo_spark_tokens(const MoeZooSparkTokens* given) {
  static thread_local Scratch scratch;
  Tokens tokens(*given, scratch);
  if (given->stored_bf16) tokens.run<Bfloat16>();
  else if (given->in_bf16) tokens.run<Float32ToBfloat16>();
  else tokens.run<Float32>();
  return 0;
}
