// Bits of other types, and float32 to and from bfloat16, one number or a vector of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

template <class To, class From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same bits, another type");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <class T>
inline T read(const void* from) {
  T to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

// The bits of floats to those of the nearest bfloat16, still as floats; NaN stays NaN.
template <class T>
inline T nearest(T b) {
  const T rounded = (b + 0x7FFF + ((b >> 16) & 1)) & 0xFFFF0000u;
  return (b & 0x7FFFFFFFu) > 0x7F800000u ? (b & 0xFFFF0000u) | 0x00400000u : rounded;
}
inline float to_bf16(float v) { return bits<float>(nearest(bits<uint32_t>(v))); }
inline float from_bf16(uint16_t v) { return bits<float>(uint32_t(v) << 16); }

}  // namespace
