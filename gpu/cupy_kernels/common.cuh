// Types and small helpers for every kernel in this folder. No CUDA header is included, because
// NVRTC finds none on many machines.
//
// VALUE is the type in which an array is stored (float, double, float16, bfloat16) and OUT the type
// in which a result is stored. ACC is the type of the computation: double for double, else float.
#pragma once

#ifndef VALUE
#define VALUE float
#endif
#ifndef OUT
#define OUT VALUE
#endif

constexpr unsigned FULL_WARP = 0xffffffffu;

struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

template <class T> struct Computed { typedef float type; };
template <> struct Computed<double> { typedef double type; };
typedef Computed<VALUE>::type ACC;

// Widening is exact. A subnormal float16 is a whole multiple of 2^-24, and that is a normal float,
// so nothing is flushed to zero. On a GPU one instruction converts a float16, either way: branches on
// what was loaded would make one load wait for another. The emulator's compiler has no such
// instruction and gets the arithmetic.
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
#ifdef __CUDACC__
__device__ inline float widen(float16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
#else
inline float widen(float16 x) {
  const unsigned exponent = x.bits >> 10 & 31u, mantissa = x.bits & 1023u;
  const float size = exponent == 0    ? float(mantissa) * 5.9604644775390625e-8f
                     : exponent == 31 ? __uint_as_float(0x7f800000u | mantissa << 13)
                                      : __uint_as_float((exponent + 112) << 23 | mantissa << 13);
  return x.bits & 0x8000u ? -size : size;
}
#endif

// Rounds to nearest, ties to even. Every NaN becomes the canonical NaN.
template <class T> __device__ inline T narrow(ACC x) { return T(x); }
template <> __device__ inline bfloat16 narrow<bfloat16>(ACC x) {
  const unsigned bits = __float_as_uint(float(x));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
#ifdef __CUDACC__
template <> __device__ inline float16 narrow<float16>(ACC x) {
  float16 narrowed;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrowed.bits) : "f"(float(x)));
  return narrowed;
}
#else
template <> inline float16 narrow<float16>(ACC x) {
  const unsigned bits = __float_as_uint(float(x)), size = bits & 0x7fffffffu;
  const unsigned short sign = static_cast<unsigned short>(bits >> 16 & 0x8000u);
  if (size > 0x7f800000u) return {0x7fff};
  if (size >= 0x477ff000u) return {static_cast<unsigned short>(sign | 0x7c00u)};  // 65520 and more round to infinity
  if (size < 0x38800000u) {  // below 2^-14: a multiple of 2^-24; adding 1/2 lets the float's own rounding do it
    const unsigned multiple = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u;
    return {static_cast<unsigned short>(sign | multiple)};
  }
  return {static_cast<unsigned short>(sign | ((size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13))};
}
#endif

__device__ inline ACC not_a_number() { return ACC(__uint_as_float(0x7fffffffu)); }

__device__ inline bool is_finite(ACC x) { return x - x == ACC(0); }

// A sum is non-finite if one of its terms is: the result is then NaN.
__device__ inline ACC nan_unless_finite(ACC x) { return is_finite(x) ? x : not_a_number(); }

template <class T> __device__ inline T smaller(T a, T b) { return a < b ? a : b; }
template <class T> __device__ inline T larger(T a, T b) { return a > b ? a : b; }
template <class T> __device__ inline T ceil_div(T a, T b) { return (a + b - 1) / b; }

// Codes may be unchecked. A code that is out of range has no bucket.
__device__ inline bool in_range(int code, int capacity) { return static_cast<unsigned>(code) < static_cast<unsigned>(capacity); }

// A mask has one byte for each row, nonzero = keep. A null pointer keeps every row.
__device__ inline bool kept(const unsigned char* mask, long long row) { return mask == nullptr || mask[row] != 0; }

constexpr float HUGE_ENTRY = 1152921504606846976.f;  // 2^60: a vector with a larger entry is scaled down, so that no sum overflows

// The factor for a vector with this largest entry: 1, or a power of two that brings the vector back
// into range. Scaling by a power of two is exact and changes no sign.
__device__ inline ACC range_scale(ACC largest) {
  return largest > ACC(HUGE_ENTRY) ? scalbn(ACC(1), -smaller(ilogb(largest), sizeof(ACC) == 8 ? 1000 : 100)) : ACC(1);
}
