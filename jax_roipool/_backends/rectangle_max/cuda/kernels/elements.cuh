// What every kernel is made of: the problem, elements and vectors of them, rectangles.
//
// A kernel is compiled for one problem. ../plans.py defines, as macros,
//   KERNEL                            the name of the kernel
//   GROUPS IMAGES HEIGHT WIDTH CHANNELS   maps are [G, n, H, W, C]
//   ROIS BIN_ROWS BIN_COLS            bins are [G, K, P, Q, C]
//   ELEMENT, ARGMAX                   Float32 ... Integer<unsigned char>; short or int
//   VECTOR                            channels that a thread takes at once; it divides CHANNELS
//   THREADS                           of a block
//   COUNT, OFFSET                     integers with room for the vectors of all bins, and of a map
// Nothing is included from elsewhere: the compiler comes without headers.
#pragma once

typedef long long Long;

#ifdef __CUDACC__
__device__ inline float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ inline unsigned short float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

// Elements: how they are stored, the values that they are compared and summed as, and the least.
template <class T>
struct Integer {
  typedef T Stored;
  typedef T Value;
  static __device__ bool is_nan(Value) { return false; }
  static __device__ Value load(Stored x) { return x; }
  static __device__ Stored store(Value x) { return x; }
  static __device__ Value least() {
    return T(-1) < T(0) ? T(~0ull << (8 * sizeof(T) - 1)) : T(0);
  }
};
template <class T>
struct Float {
  typedef T Stored;
  typedef T Value;
  static __device__ bool is_nan(Value x) { return x != x; }
  static __device__ Value load(Stored x) { return x; }
  static __device__ Stored store(Value x) { return x; }
  static __device__ Value least() { return __uint_as_float(0xff800000u); }  // -inf
};
typedef Float<float> Float32;
typedef Float<double> Float64;
struct Bfloat16 : Float<float> {
  typedef unsigned short Stored;
  static __device__ float load(Stored bits) { return __uint_as_float(unsigned(bits) << 16); }
  static __device__ Stored store(float x) {  // rounds half to even
    const unsigned bits = __float_as_uint(x);
    return is_nan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
};
struct Float16 : Float<float> {
  typedef unsigned short Stored;
  static __device__ float load(Stored bits) { return half_to_float(bits); }
  static __device__ Stored store(float x) { return float_to_half(x); }
};

typedef ELEMENT Element;
typedef Element::Stored Stored;
typedef Element::Value Value;

template <class T>
struct alignas(sizeof(T) * VECTOR) Vector {  // of 16 bytes and less, moved by one instruction
  T of[VECTOR];
};
typedef Vector<Stored> Elements;
typedef Vector<ARGMAX> Indices;

constexpr int kVectors = CHANNELS / VECTOR;  // of a cell, or of a bin
constexpr Long kCells = Long(HEIGHT) * WIDTH;
constexpr int kLanes = 1 + 2 * BIN_ROWS + 2 * BIN_COLS;  // of a RoI in the array of edges

// The edges of one RoI, kStride numbers apart.
template <Long kStride>
struct Edges {
  const int* lanes;

  __device__ int image() const { return lanes[0]; }
  __device__ int row_start(int p) const { return lanes[(1 + p) * kStride]; }
  __device__ int row_end(int p) const { return lanes[(1 + BIN_ROWS + p) * kStride]; }
  __device__ int col_start(int q) const { return lanes[(1 + 2 * BIN_ROWS + q) * kStride]; }
  __device__ int col_end(int q) const { return lanes[(1 + 2 * BIN_ROWS + BIN_COLS + q) * kStride]; }
};
