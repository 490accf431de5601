// One token through its chosen gated experts, on a CPU:
//     y = sum over k of down[e_k] @ (w_k * activation(gate_up[e_k][:F] @ x) * (gate_up[e_k][F:] @ x))
// Plain C ABI, no torch headers. Bound by reading the chosen matrices, once each, where they lie.
// Sums are in float32; what torch would hand on in bfloat16 is rounded to it, half to even.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "bfloat16.hpp"

namespace {

constexpr int kLanes = 8, kSums = 4, kBlock = kSums * kLanes;  // numbers of a row in flight
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// How a matrix is stored and read.
struct Float32 {
  using Stored = float;
  static Floats get(const float* w) { return read<Floats>(w); }
};
struct Float32ToBfloat16 {
  using Stored = float;
  static Floats get(const float* w) { return bits<Floats>(nearest(read<Words>(w))); }
};
struct Bfloat16 {
  using Stored = uint16_t;
  static Floats get(const uint16_t* w) {
    Words words;
    for (int j = 0; j < kLanes; j++) words[j] = w[j];  // becomes one instruction
    return bits<Floats>(words << 16);
  }
};

template <class Matrix>
inline void add_block(const typename Matrix::Stored* w, const float* x, Floats* sums) {
  for (int j = 0; j < kSums; j++)
    sums[j] += Matrix::get(w + j * kLanes) * read<Floats>(x + j * kLanes);
}

// y = w @ x for consecutive rows of n numbers; x is padded with zeros to a whole block.
template <class Matrix>
void multiply(const void* matrix, int64_t first, int64_t rows, int64_t n, const float* x, float* y) {
  using Stored = typename Matrix::Stored;
  const int64_t whole = n / kBlock * kBlock;
  const Stored* w = static_cast<const Stored*>(matrix) + first * n;
  for (int64_t r = 0; r < rows; r++, w += n) {
    Floats sums[kSums] = {};
    for (int64_t i = 0; i < whole; i += kBlock) add_block<Matrix>(w + i, x + i, sums);
    if (whole < n) {
      Stored rest[kBlock] = {};
      std::memcpy(rest, w + whole, (n - whole) * sizeof(Stored));
      add_block<Matrix>(rest, x + whole, sums);
    }
    const Floats s = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    y[r] = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
  }
}

using Multiply = void (*)(const void*, int64_t, int64_t, int64_t, const float*, float*);

Multiply multiplier(bool stored_bf16, bool in_bf16) {
  if (stored_bf16) return multiply<Bfloat16>;
  return in_bf16 ? multiply<Float32ToBfloat16> : multiply<Float32>;
}

enum Activation { kSilu = 0, kGelu = 1, kRelu = 2, kIdentity = 3 };

inline float activate(int32_t activation, float x) {
  switch (activation) {
    case kSilu: return x / (1.0f + std::exp(-x));
    case kGelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    case kRelu: return x < 0 ? 0.0f : x;  // keeps NaN
    default: return x;
  }
}

inline int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

}  // namespace

extern "C" {

// One call. Mirrored field by field by decode.py Job.
struct MoeZooToken {
  const void* x;           // [D], stride x_stride
  const int64_t* experts;  // [K]
  const float* weights;    // [K]
  const bool* keep;        // [K], or null for all
  const void* gate_up;     // [E, 2F, D]
  const void* down;        // [E, D, F]
  void* y;                 // [D], bfloat16 where down computes in it, else float32
  int64_t d_model, d_expert, n_experts, top_k, x_stride;
  int32_t x_bf16, gate_up_bf16, down_bf16;  // stored in bfloat16, else in float32
  int32_t gate_up_in_bf16, down_in_bf16;    // operands and results rounded to bfloat16
  int32_t activation, threads;
};

}  // extern "C"

namespace {

using Job = MoeZooToken;

struct Choice {
  int64_t expert;
  float weight;
};

// What the threads share. Each writes a part of its own.
struct Work {
  const Job& job;
  const std::vector<Choice> chosen;
  const Multiply gate_up, down;
  std::vector<float> x;             // [D], padded
  std::vector<float> h;             // [chosen, F], each row padded
  std::vector<float> products, y;   // [2F], or [D]; [D]

  Work(const Job& given, std::vector<Choice> choices)
      : job(given), chosen(std::move(choices)),
        gate_up(multiplier(job.gate_up_bf16, job.gate_up_in_bf16)),
        down(multiplier(job.down_bf16, job.down_in_bf16)), x(padded(job.d_model)),
        h(chosen.size() * padded(job.d_expert)),
        products(std::max(2 * job.d_expert, job.d_model)), y(job.d_model) {
    for (int64_t i = 0; i < job.d_model; i++) {
      const int64_t at = i * job.x_stride;
      x[i] = job.x_bf16 ? from_bf16(static_cast<const uint16_t*>(job.x)[at])
                        : static_cast<const float*>(job.x)[at];
      if (job.gate_up_in_bf16) x[i] = to_bf16(x[i]);
    }
  }
};

// One number of h, rounded wherever torch would write it down.
inline float gated(const Job& job, float gate, float up, float weight) {
  if (!job.gate_up_in_bf16) {
    const float h = activate(job.activation, gate) * up * weight;
    return job.down_in_bf16 ? to_bf16(h) : h;
  }
  const float active = to_bf16(activate(job.activation, to_bf16(gate)));
  return to_bf16(to_bf16(active * to_bf16(up)) * to_bf16(weight));
}

// Columns [first, last) of h for every choice.
void hidden(Work& work, int64_t first, int64_t last) {
  const Job& job = work.job;
  const int64_t d = job.d_model, f = job.d_expert, rows = last - first;
  float *gate = work.products.data() + first, *up = gate + f, *h = work.h.data();
  for (const Choice& choice : work.chosen) {
    const int64_t row = choice.expert * 2 * f + first;
    work.gate_up(job.gate_up, row, rows, d, work.x.data(), gate);
    work.gate_up(job.gate_up, row + f, rows, d, work.x.data(), up);
    for (int64_t i = 0; i < rows; i++) h[first + i] = gated(job, gate[i], up[i], choice.weight);
    h += padded(f);
  }
}

// Numbers [first, last) of y, added up in the order of the choices.
void output(Work& work, int64_t first, int64_t last) {
  const Job& job = work.job;
  const int64_t d = job.d_model, f = job.d_expert;
  float *product = work.products.data(), *y = work.y.data(), *h = work.h.data();
  for (const Choice& choice : work.chosen) {
    work.down(job.down, choice.expert * d + first, last - first, f, h, product + first);
    for (int64_t i = first; i < last; i++)
      y[i] = job.down_in_bf16 ? to_bf16(y[i] + to_bf16(product[i])) : y[i] + product[i];
    h += padded(f);
  }
  for (int64_t i = first; i < last; i++) {
    if (job.down_in_bf16) static_cast<uint16_t*>(job.y)[i] = bits<uint32_t>(y[i]) >> 16;
    else static_cast<float*>(job.y)[i] = y[i];
  }
}

}  // namespace

// 0 when done, 1 for a chosen expert that does not exist.
extern "C" int moe_zoo_token(const MoeZooToken* given) {
  const Job& job = *given;
  std::vector<Choice> chosen;
  for (int64_t k = 0; k < job.top_k; k++) {
    if (job.keep && !job.keep[k]) continue;
    if (job.experts[k] < 0 || job.experts[k] >= job.n_experts) return 1;
    chosen.push_back({job.experts[k], job.weights[k]});
  }
  Work work(job, std::move(chosen));
#pragma omp parallel num_threads(job.threads)
  {
    int64_t me = 0, of = 1;
#ifdef _OPENMP
    me = omp_get_thread_num(), of = omp_get_num_threads();
#endif
    hidden(work, job.d_expert * me / of, job.d_expert * (me + 1) / of);
#pragma omp barrier
    output(work, job.d_model * me / of, job.d_model * (me + 1) / of);
  }
  return 0;
}
