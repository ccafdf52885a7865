// As much of CUDA C++ as the kernels use, for a C++ compiler. A block's threads run one after the
// other; the 32 of a block that is one warp run as fibers, and meet where a warp's threads meet.
#pragma once

#include <cstring>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned bits) { return bits_as<float>(bits); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float half_to_float(unsigned short bits) { return bits_as<_Float16>(bits); }
inline unsigned short float_to_half(float x) { return bits_as<unsigned short>(_Float16(x)); }

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline int __ffs(unsigned bits) { return __builtin_ffs(bits); }

namespace emulator {
constexpr int kLanes = 32;
// What each lane of the warp has brought to where all meet.
inline int brought[kLanes];
// Waits until all lanes have come. All of a block's threads must be one warp.
void meet();
}  // namespace emulator

inline void __syncwarp() { emulator::meet(); }
inline unsigned __ballot_sync(unsigned, bool vote) {
  using namespace emulator;
  brought[threadIdx.x] = vote;
  meet();
  unsigned votes = 0;
  for (int lane = 0; lane < kLanes; ++lane) votes |= unsigned(brought[lane]) << lane;
  meet();
  return votes;
}
inline int __shfl_sync(unsigned, int value, int from) {
  using namespace emulator;
  brought[threadIdx.x] = value;
  meet();
  const int got = brought[from];
  meet();
  return got;
}
