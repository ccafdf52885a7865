// As much of CUDA C++ as the kernels use, for a C++ compiler. A block's threads run one after the
// other, or as fibers that meet where the threads of a warp or of a block do.
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

namespace emulator {
constexpr int kWarp = 32, kMostThreads = 1024;
enum class Meeting { kOfWarp, kOfBlock };
// What each thread has brought to where its warp meets.
inline int brought[kMostThreads];
// Waits until all threads of the warp, or of the block, have come.
void meet(Meeting);
}  // namespace emulator

inline void __syncthreads() { emulator::meet(emulator::Meeting::kOfBlock); }
inline int __shfl_up_sync(unsigned, int value, int distance) {
  using namespace emulator;
  brought[threadIdx.x] = value;
  meet(Meeting::kOfWarp);
  const bool has_one = int(threadIdx.x % kWarp) >= distance;
  const int got = has_one ? brought[threadIdx.x - distance] : value;
  meet(Meeting::kOfWarp);
  return got;
}
