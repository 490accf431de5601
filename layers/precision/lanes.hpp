// Sixteen numbers at once, and their neighbours.
#pragma once

#include <cstdint>
#include <cstring>

namespace zoo {

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Lanes lanes(const float* p) { Lanes v; std::memcpy(&v, p, sizeof v); return v; }
inline void put(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }

// Each lane's partner at distance w.
template <int w>
inline Lanes swapped(Lanes v) {
  return Lanes{v[0 ^ w], v[1 ^ w], v[2 ^ w],  v[3 ^ w],  v[4 ^ w],  v[5 ^ w],  v[6 ^ w],  v[7 ^ w],
               v[8 ^ w], v[9 ^ w], v[10 ^ w], v[11 ^ w], v[12 ^ w], v[13 ^ w], v[14 ^ w], v[15 ^ w]};
}

inline Ints most(Ints a, Ints b) { return a > b ? a : b; }
template <int w>
inline Ints most_paired(Ints v) { return most(v, Ints(swapped<w>(Lanes(v)))); }

// The largest of sixteen, in every lane.
inline Ints most_of(Ints v) {
  return most_paired<1>(most_paired<2>(most_paired<4>(most_paired<8>(v))));
}

// Their sum, halves onto halves (encoding.py block_sum), in every lane.
inline Lanes sum_of(Lanes v) {
  v = v + swapped<8>(v);
  v = v + swapped<4>(v);
  v = v + swapped<2>(v);
  return v + swapped<1>(v);
}

}  // namespace zoo
