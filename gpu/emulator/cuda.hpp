// The part of CUDA C++ that the kernels use, for a C++ compiler. Anything else is not emulated: its
// use is a compile error.
#pragma once
#include "runtime.hpp"

#define __global__ __attribute__((noinline))  // so that every instruction of a kernel has a line of the kernel
#define __device__
#define __host__
#define __constant__  // those without a value are rewritten before
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)  // those of kernels are rewritten before

// What the standard's headers have, and CUDA without them.
typedef decltype(sizeof(0)) size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef __INTPTR_TYPE__ intptr_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef __INT8_TYPE__ int8_t;
typedef __INT16_TYPE__ int16_t;
typedef __INT32_TYPE__ int32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __UINT64_TYPE__ uint64_t;
#define NULL 0
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_PI 3.14159265358979323846
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define DBL_MAX __DBL_MAX__
#define DBL_MIN __DBL_MIN__
#define DBL_EPSILON __DBL_EPSILON__
#define INT_MAX __INT_MAX__
#define INT_MIN (-__INT_MAX__ - 1)
#define UINT_MAX (2u * __INT_MAX__ + 1)

using cuda_emulator::blockDim;
using cuda_emulator::blockIdx;
using cuda_emulator::dim3;
using cuda_emulator::gridDim;
using cuda_emulator::threadIdx;
using cuda_emulator::uint3;
constexpr int warpSize = 32;

// Vector types, aligned as on the device.
#define CUDA_EMULATOR_VECTORS(scalar, name, size)                                                                                    \
  struct alignas(2 * size) name##2 { scalar x, y; };                                                                                 \
  struct name##3 { scalar x, y, z; };                                                                                                \
  struct alignas(4 * size < 16 ? 4 * size : 16) name##4 { scalar x, y, z, w; };                                                      \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                                                               \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }                                                  \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
CUDA_EMULATOR_VECTORS(signed char, char, 1)
CUDA_EMULATOR_VECTORS(unsigned char, uchar, 1)
CUDA_EMULATOR_VECTORS(short, short, 2)
CUDA_EMULATOR_VECTORS(unsigned short, ushort, 2)
CUDA_EMULATOR_VECTORS(int, int, 4)
CUDA_EMULATOR_VECTORS(float, float, 4)
CUDA_EMULATOR_VECTORS(double, double, 8)
CUDA_EMULATOR_VECTORS(long long, longlong, 8)
CUDA_EMULATOR_VECTORS(unsigned long long, ulonglong, 8)
#undef CUDA_EMULATOR_VECTORS
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace cuda_emulator {

#define CUDA_EMULATOR_SITE Site site = {__builtin_FILE(), __builtin_LINE()}

template <class T> struct SameType { typedef T type; };  // keeps a parameter out of deduction

template <class To, class From> inline To bits_as(From from) {
  static_assert(sizeof(To) >= sizeof(From), "too narrow");
  To to{};
  __builtin_memcpy(&to, &from, sizeof from);
  return to;
}
template <class To, class From> inline To low_bits_as(From from) {
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// `__launch_bounds__(threads, blocks)` of a kernel is rewritten as a constant with this value.
template <class... Rest> constexpr int first_of(int first, Rest...) { return first; }

template <class T> struct Extents {
  static constexpr unsigned element = sizeof(T), first = 0;
  typedef T inner, entry;
};
template <class T, decltype(sizeof(0)) n> struct Extents<T[n]> {
  static constexpr unsigned element = Extents<T>::element, first = n;
  typedef T inner;
  typedef typename Extents<T>::entry entry;
};
template <class T> constexpr Named named(const char* name) {
  typedef Extents<typename Extents<T>::inner> second;
  typedef Extents<typename second::inner> third;
  return {name, Extents<T>::element, {Extents<T>::first, second::first, third::first, Extents<typename third::inner>::first}};
}

// An array of `__shared__ T a[4], b;` is rewritten as a struct with it alone and a reference to it.
template <class Holder> inline Holder& shared(const char* name, CUDA_EMULATOR_SITE) {
  static Slot slot{0, nullptr};
  if (slot.launch != launch_number) allocate_shared(slot, sizeof(Holder), alignof(Holder), Holder::cuda_emulator_named(name), site);
  return *reinterpret_cast<Holder*>(slot.address);
}
template <class T> inline T* whole_dynamic_shared(const char* name) {
#if defined(CUDA_EMULATOR_COUNTED)
  dynamic_declared = named<T>(name);
#endif
  return reinterpret_cast<T*>(dynamic_shared);
}

template <class T> inline T shuffle(WarpOperation kind, unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
  return low_bits_as<T>(warp_operation(kind, mask, bits_as<unsigned long long>(value), source, site));
}

}  // namespace cuda_emulator

// Barriers, votes and shuffles.

// Macros, so that two barriers in one line are two.
#define CUDA_EMULATOR_BARRIER(kind, predicate) \
  cuda_emulator::barrier(cuda_emulator::Barrier::kind, (predicate) != 0, {__builtin_FILE(), __builtin_LINE(), __COUNTER__})
#define __syncthreads() static_cast<void>(CUDA_EMULATOR_BARRIER(plain, 0))
#define __syncthreads_or(predicate) CUDA_EMULATOR_BARRIER(any, predicate)
#define __syncthreads_and(predicate) CUDA_EMULATOR_BARRIER(all, predicate)
#define __syncthreads_count(predicate) CUDA_EMULATOR_BARRIER(count, predicate)
inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_emulator::CUDA_EMULATOR_SITE) {
  cuda_emulator::warp_operation(cuda_emulator::WarpOperation::sync, mask, 0, -1, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_emulator::CUDA_EMULATOR_SITE) {
  return static_cast<unsigned>(cuda_emulator::warp_operation(cuda_emulator::WarpOperation::ballot, mask, predicate != 0, -1, site));
}
inline int __any_sync(unsigned mask, int predicate, cuda_emulator::CUDA_EMULATOR_SITE) {
  return static_cast<int>(cuda_emulator::warp_operation(cuda_emulator::WarpOperation::any, mask, predicate != 0, -1, site));
}
inline int __all_sync(unsigned mask, int predicate, cuda_emulator::CUDA_EMULATOR_SITE) {
  return static_cast<int>(cuda_emulator::warp_operation(cuda_emulator::WarpOperation::all, mask, predicate != 0, -1, site));
}
template <class T> inline unsigned __match_any_sync(unsigned mask, T value, cuda_emulator::CUDA_EMULATOR_SITE) {
  const unsigned long long bits = cuda_emulator::bits_as<unsigned long long>(value);
  return static_cast<unsigned>(cuda_emulator::warp_operation(cuda_emulator::WarpOperation::match_any, mask, bits, -1, site));
}
// The hardware chooses which threads run together. No kernel should depend on it, so it is not
// emulated.
unsigned __activemask() = delete;

template <class T> inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, cuda_emulator::CUDA_EMULATOR_SITE) {
  const int me = static_cast<int>(cuda_emulator::warp_lane());
  return cuda_emulator::shuffle(cuda_emulator::WarpOperation::shuffle, mask, value, me / width * width + (lane & (width - 1)), site);
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, cuda_emulator::CUDA_EMULATOR_SITE) {
  const int me = static_cast<int>(cuda_emulator::warp_lane()), other = me ^ lane_mask;
  const bool beyond = other / width > me / width;
  return cuda_emulator::shuffle(cuda_emulator::WarpOperation::shuffle_xor, mask, value, beyond ? me : other, site);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, cuda_emulator::CUDA_EMULATOR_SITE) {
  const int me = static_cast<int>(cuda_emulator::warp_lane()), other = me - static_cast<int>(delta);
  const bool beyond = other < me / width * width;
  return cuda_emulator::shuffle(cuda_emulator::WarpOperation::shuffle_up, mask, value, beyond ? me : other, site);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, cuda_emulator::CUDA_EMULATOR_SITE) {
  const int me = static_cast<int>(cuda_emulator::warp_lane()), other = me + static_cast<int>(delta);
  const bool beyond = other >= me / width * width + width;
  return cuda_emulator::shuffle(cuda_emulator::WarpOperation::shuffle_down, mask, value, beyond ? me : other, site);
}

inline void __threadfence() { cuda_emulator::fence(cuda_emulator::Scope::device); }
inline void __threadfence_block() { cuda_emulator::fence(cuda_emulator::Scope::block); }
inline void __threadfence_system() { cuda_emulator::fence(cuda_emulator::Scope::device); }
inline void __trap(cuda_emulator::CUDA_EMULATOR_SITE) { cuda_emulator::trap("__trap()", site); }
#define assert(condition) ((condition) ? void() : cuda_emulator::trap("assertion failed: " #condition, {__builtin_FILE(), __builtin_LINE()}))

// Atomics. Threads take turns, so a plain update is atomic. Only ThreadSanitizer needs real
// atomics.

namespace cuda_emulator {

#if defined(CUDA_EMULATOR_COUNTED)
#define CUDA_EMULATOR_ATOMIC __attribute__((noinline, no_sanitize("thread")))
#else
#define CUDA_EMULATOR_ATOMIC inline
#endif

template <class T, class Change> CUDA_EMULATOR_ATOMIC T update(T* address, Change change) {
#if defined(CUDA_EMULATOR_THREAD)
  T old, next;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do next = change(old);
  while (!__atomic_compare_exchange(address, &old, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
#else
#if defined(CUDA_EMULATOR_COUNTED)
  about_to_access(address, sizeof(T), Access::atomic, __builtin_return_address(0), true);
#endif
  updating = true;
  const T old = *address, next = change(old);
  *address = next;
  updating = false;
  if (bits_as<unsigned long long>(old) == bits_as<unsigned long long>(next)) found_unchanged(address);
#endif
  return old;
}

template <class T> struct IsAtomic { enum { add = 0, bits = 0, exchange = 0 }; };
template <> struct IsAtomic<int> { enum { add = 1, bits = 1, exchange = 1 }; };
template <> struct IsAtomic<unsigned> { enum { add = 1, bits = 1, exchange = 1 }; };
template <> struct IsAtomic<unsigned long long> { enum { add = 1, bits = 1, exchange = 1 }; };
template <> struct IsAtomic<long long> { enum { add = 0, bits = 1, exchange = 0 }; };
template <> struct IsAtomic<float> { enum { add = 1, bits = 0, exchange = 1 }; };
template <> struct IsAtomic<double> { enum { add = 1, bits = 0, exchange = 0 }; };

}  // namespace cuda_emulator

#define CUDA_EMULATOR_DEFINE_ATOMIC(name, has, expression)                                                                           \
  template <class T> CUDA_EMULATOR_ALWAYS_INLINE T name(T* address, typename cuda_emulator::SameType<T>::type value) {               \
    static_assert(cuda_emulator::IsAtomic<T>::has, "CUDA has no " #name " for this type");                                           \
    return cuda_emulator::update(address, [value](T old) -> T { return expression; });                                               \
  }
#define CUDA_EMULATOR_ALWAYS_INLINE inline __attribute__((always_inline))
CUDA_EMULATOR_DEFINE_ATOMIC(atomicAdd, add, old + value)
CUDA_EMULATOR_DEFINE_ATOMIC(atomicExch, exchange, value)
CUDA_EMULATOR_DEFINE_ATOMIC(atomicMax, bits, old < value ? value : old)
CUDA_EMULATOR_DEFINE_ATOMIC(atomicMin, bits, value < old ? value : old)
CUDA_EMULATOR_DEFINE_ATOMIC(atomicAnd, bits, old & value)
CUDA_EMULATOR_DEFINE_ATOMIC(atomicOr, bits, old | value)
CUDA_EMULATOR_DEFINE_ATOMIC(atomicXor, bits, old ^ value)
template <class T> CUDA_EMULATOR_ALWAYS_INLINE T atomicSub(T* address, typename cuda_emulator::SameType<T>::type value) {
  static_assert(sizeof(T) == 4 && cuda_emulator::IsAtomic<T>::bits, "CUDA has no atomicSub for this type");
  return cuda_emulator::update(address, [value](T old) -> T { return old - value; });
}
template <class T>
CUDA_EMULATOR_ALWAYS_INLINE T atomicCAS(T* address, typename cuda_emulator::SameType<T>::type compare,
                                        typename cuda_emulator::SameType<T>::type value) {
  static_assert(cuda_emulator::IsAtomic<T>::bits && cuda_emulator::IsAtomic<T>::exchange, "CUDA has no atomicCAS for this type");
  return cuda_emulator::update(address, [=](T old) -> T { return old == compare ? value : old; });
}
#undef CUDA_EMULATOR_DEFINE_ATOMIC
#undef CUDA_EMULATOR_ALWAYS_INLINE

// Bits and conversions.

template <class T> inline T __ldg(const T* address) { return *address; }
template <class T> inline T __ldcs(const T* address) { return *address; }
template <class T> inline T __ldcg(const T* address) { return *address; }
template <class T> inline void __stcs(T* address, T value) { *address = value; }
template <class T> inline void __stcg(T* address, T value) { *address = value; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(static_cast<unsigned long long>(x) * y >> 32); }
inline int __mulhi(int x, int y) { return static_cast<int>(static_cast<long long>(x) * y >> 32); }
inline float __int_as_float(int x) { return cuda_emulator::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_emulator::bits_as<float>(x); }
inline int __float_as_int(float x) { return cuda_emulator::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_emulator::bits_as<unsigned>(x); }
inline double __longlong_as_double(long long x) { return cuda_emulator::bits_as<double>(x); }
inline long long __double_as_longlong(double x) { return cuda_emulator::bits_as<long long>(x); }

// Mathematics. On the device some of these round differently in the last bit, and those called
// __name are less accurate.

#define CUDA_EMULATOR_MATH1(name)                                 \
  extern "C" double name(double);                                 \
  extern "C" float name##f(float);                                \
  inline float name(float x) { return name##f(x); }
#define CUDA_EMULATOR_MATH2(name)                                 \
  extern "C" double name(double, double);                         \
  extern "C" float name##f(float, float);                         \
  inline float name(float x, float y) { return name##f(x, y); }
CUDA_EMULATOR_MATH1(fabs) CUDA_EMULATOR_MATH1(sqrt) CUDA_EMULATOR_MATH1(cbrt) CUDA_EMULATOR_MATH1(exp) CUDA_EMULATOR_MATH1(exp2)
CUDA_EMULATOR_MATH1(expm1) CUDA_EMULATOR_MATH1(log) CUDA_EMULATOR_MATH1(log2) CUDA_EMULATOR_MATH1(log10) CUDA_EMULATOR_MATH1(log1p)
CUDA_EMULATOR_MATH1(sin) CUDA_EMULATOR_MATH1(cos) CUDA_EMULATOR_MATH1(tan) CUDA_EMULATOR_MATH1(asin) CUDA_EMULATOR_MATH1(acos)
CUDA_EMULATOR_MATH1(atan) CUDA_EMULATOR_MATH1(sinh) CUDA_EMULATOR_MATH1(cosh) CUDA_EMULATOR_MATH1(tanh) CUDA_EMULATOR_MATH1(erf)
CUDA_EMULATOR_MATH1(floor) CUDA_EMULATOR_MATH1(ceil) CUDA_EMULATOR_MATH1(trunc) CUDA_EMULATOR_MATH1(round) CUDA_EMULATOR_MATH1(rint)
CUDA_EMULATOR_MATH2(atan2) CUDA_EMULATOR_MATH2(pow) CUDA_EMULATOR_MATH2(fmod) CUDA_EMULATOR_MATH2(hypot) CUDA_EMULATOR_MATH2(fmin)
CUDA_EMULATOR_MATH2(fmax) CUDA_EMULATOR_MATH2(copysign) CUDA_EMULATOR_MATH2(fdim)
#undef CUDA_EMULATOR_MATH1
#undef CUDA_EMULATOR_MATH2
extern "C" double fma(double, double, double);
extern "C" float fmaf(float, float, float);
inline float fma(float x, float y, float z) { return fmaf(x, y, z); }
extern "C" double scalbn(double, int);
extern "C" float scalbnf(float, int);
inline float scalbn(float x, int n) { return scalbnf(x, n); }
extern "C" double ldexp(double, int);
extern "C" float ldexpf(float, int);
inline float ldexp(float x, int n) { return ldexpf(x, n); }
extern "C" double frexp(double, int*);
extern "C" float frexpf(float, int*);
inline float frexp(float x, int* n) { return frexpf(x, n); }
extern "C" int ilogb(double);
extern "C" int ilogbf(float);
inline int ilogb(float x) { return ilogbf(x); }
template <class... T> inline int printf(const char* format, T... values) { return cuda_emulator::print(format, values...); }

inline int abs(int x) { return x < 0 ? -x : x; }
inline long long abs(long long x) { return x < 0 ? -x : x; }
inline float abs(float x) { return fabsf(x); }
inline double abs(double x) { return fabs(x); }
template <class T> inline bool isnan(T x) { return __builtin_isnan(x); }
template <class T> inline bool isinf(T x) { return __builtin_isinf(x); }
template <class T> inline bool isfinite(T x) { return __builtin_isfinite(x); }
template <class T> inline bool signbit(T x) { return __builtin_signbit(x); }

inline float rsqrtf(float x) { return static_cast<float>(1 / sqrt(static_cast<double>(x))); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

// If one of two floats is NaN, the result is the other, as on the device.
#define CUDA_EMULATOR_MIN_MAX(T)                              \
  inline T min(T x, T y) { return y < x ? y : x; }            \
  inline T max(T x, T y) { return x < y ? y : x; }
CUDA_EMULATOR_MIN_MAX(int) CUDA_EMULATOR_MIN_MAX(unsigned) CUDA_EMULATOR_MIN_MAX(long) CUDA_EMULATOR_MIN_MAX(unsigned long)
CUDA_EMULATOR_MIN_MAX(long long) CUDA_EMULATOR_MIN_MAX(unsigned long long)
#undef CUDA_EMULATOR_MIN_MAX
// Of a signed and an unsigned number, both count as unsigned, as on the device.
#define CUDA_EMULATOR_MIXED_MIN_MAX(S, U)                                     \
  inline U min(S x, U y) { return min(static_cast<U>(x), y); }                \
  inline U min(U x, S y) { return min(x, static_cast<U>(y)); }                \
  inline U max(S x, U y) { return max(static_cast<U>(x), y); }                \
  inline U max(U x, S y) { return max(x, static_cast<U>(y)); }
CUDA_EMULATOR_MIXED_MIN_MAX(int, unsigned) CUDA_EMULATOR_MIXED_MIN_MAX(long, unsigned long)
CUDA_EMULATOR_MIXED_MIN_MAX(long long, unsigned long long)
#undef CUDA_EMULATOR_MIXED_MIN_MAX
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }
inline double min(float x, double y) { return fmin(static_cast<double>(x), y); }
inline double min(double x, float y) { return fmin(x, static_cast<double>(y)); }
inline double max(float x, double y) { return fmax(static_cast<double>(x), y); }
inline double max(double x, float y) { return fmax(x, static_cast<double>(y)); }

// Links every library to the runtime, even if its kernels call nothing there.
extern "C" const void* cuda_emulator_launch(const void* request);
extern "C" __attribute__((visibility("default"))) const void* cuda_emulator_run(const void* request) { return cuda_emulator_launch(request); }

// The call of a kernel, and the description of its parameters.

namespace cuda_emulator {

template <class T> struct Described { enum { kind = 'V', component = sizeof(T) }; };
#define CUDA_EMULATOR_DESCRIBE(T, letter) template <> struct Described<T> { enum { kind = letter, component = sizeof(T) }; };
#define CUDA_EMULATOR_DESCRIBE_VECTOR(T, letter) template <> struct Described<T> { enum { kind = letter, component = sizeof(T::x) }; };
#define CUDA_EMULATOR_DESCRIBE_VECTORS(T, letter)                                                                              \
  CUDA_EMULATOR_DESCRIBE_VECTOR(T##2, letter) CUDA_EMULATOR_DESCRIBE_VECTOR(T##3, letter) CUDA_EMULATOR_DESCRIBE_VECTOR(T##4, letter)
CUDA_EMULATOR_DESCRIBE(bool, 'b')
CUDA_EMULATOR_DESCRIBE(float, 'f') CUDA_EMULATOR_DESCRIBE(double, 'f')
CUDA_EMULATOR_DESCRIBE(char, 'i') CUDA_EMULATOR_DESCRIBE(signed char, 'i') CUDA_EMULATOR_DESCRIBE(short, 'i')
CUDA_EMULATOR_DESCRIBE(int, 'i') CUDA_EMULATOR_DESCRIBE(long, 'i') CUDA_EMULATOR_DESCRIBE(long long, 'i')
CUDA_EMULATOR_DESCRIBE(unsigned char, 'u') CUDA_EMULATOR_DESCRIBE(unsigned short, 'u') CUDA_EMULATOR_DESCRIBE(unsigned, 'u')
CUDA_EMULATOR_DESCRIBE(unsigned long, 'u') CUDA_EMULATOR_DESCRIBE(unsigned long long, 'u')
CUDA_EMULATOR_DESCRIBE_VECTORS(float, 'f') CUDA_EMULATOR_DESCRIBE_VECTORS(double, 'f')
CUDA_EMULATOR_DESCRIBE_VECTORS(char, 'i') CUDA_EMULATOR_DESCRIBE_VECTORS(short, 'i') CUDA_EMULATOR_DESCRIBE_VECTORS(int, 'i')
CUDA_EMULATOR_DESCRIBE_VECTORS(longlong, 'i') CUDA_EMULATOR_DESCRIBE_VECTORS(uchar, 'u') CUDA_EMULATOR_DESCRIBE_VECTORS(ushort, 'u')
CUDA_EMULATOR_DESCRIBE_VECTORS(uint, 'u') CUDA_EMULATOR_DESCRIBE_VECTORS(ulonglong, 'u')
#undef CUDA_EMULATOR_DESCRIBE
#undef CUDA_EMULATOR_DESCRIBE_VECTOR
#undef CUDA_EMULATOR_DESCRIBE_VECTORS

template <class T> struct DescribedParameter {
  static constexpr Parameter value{Described<T>::kind, sizeof(T), Described<T>::component, alignof(T), 0};
};
template <class T> struct DescribedParameter<const T> : DescribedParameter<T> {};
template <class T> struct DescribedParameter<T*> {
  static constexpr Parameter value{DescribedParameter<T>::value.kind, sizeof(T), DescribedParameter<T>::value.component, alignof(T), 1};
};
template <> struct DescribedParameter<void*> { static constexpr Parameter value{'V', 1, 1, 1, 1}; };
template <> struct DescribedParameter<const void*> : DescribedParameter<void*> {};

// A variable of `__constant__ T a[4], b;` is rewritten as a struct with it alone, in such pages, and a
// reference to it.
static Constant* first_constant = nullptr;
template <class Holder, class T> struct ConstantPages {
  struct alignas(4096) Pages { Holder held; } pages;
  Constant is;
  explicit ConstantPages(const char* name) : pages() {
    is = {reinterpret_cast<char*>(&pages), sizeof(Holder), named<T>(name), DescribedParameter<typename Extents<T>::entry>::value, 0, first_constant};
    first_constant = &is;
  }
};
extern "C" __attribute__((visibility("default"))) inline __attribute__((used)) Constant* cuda_emulator_constants() { return first_constant; }

template <int...> struct Numbers {};
template <int n, int... rest> struct UpTo : UpTo<n - 1, n - 1, rest...> {};
template <int... all> struct UpTo<0, all...> { typedef Numbers<all...> type; };

template <class T> struct Plain { typedef T type; };
template <class T> struct Plain<const T> { typedef T type; };

#define CUDA_EMULATOR_UNSEEN __attribute__((no_sanitize("thread", "address")))  // the array of arguments is not the kernel's

template <class... T, int... i> CUDA_EMULATOR_UNSEEN inline void call(void (*kernel)(T...), void** args, Numbers<i...>) {
  kernel(*static_cast<typename Plain<T>::type*>(args[i])...);
}
template <class... T> CUDA_EMULATOR_UNSEEN inline void call(void (*kernel)(T...), void** args) {
  call(kernel, args, typename UpTo<sizeof...(T)>::type{});
}

template <class... T> inline const Parameter* parameters(void (*)(T...), int* count) {
  static const Parameter all[] = {DescribedParameter<T>::value..., Parameter{}};
  *count = sizeof...(T);
  return all;
}

// Stands for a kernel that the file does not define under these macros.
struct Absent {};
inline void call(Absent, void**) {}
inline const Parameter* parameters(Absent, int*) { return nullptr; }

}  // namespace cuda_emulator

// If there is a global `name`, it hides the one from the namespace that is only used. In the same
// way the bound of a kernel, if it has one, hides the default.
#define CUDA_EMULATOR_KERNEL(name)                                                                                                \
  namespace cuda_emulator_absent { constexpr cuda_emulator::Absent name{}; }                                                      \
  using namespace cuda_emulator_absent;                                                                                           \
  namespace cuda_emulator_boundless { constexpr int name = 0; }                                                                   \
  namespace cuda_emulator_bounds { using namespace cuda_emulator_boundless; }                                                     \
  extern "C" __attribute__((visibility("default"))) CUDA_EMULATOR_UNSEEN void cuda_emulator_call_##name(void** args) {            \
    cuda_emulator::call(::name, args);                                                                                            \
  }                                                                                                                               \
  extern "C" __attribute__((visibility("default"))) const cuda_emulator::Parameter* cuda_emulator_parameters_##name(int* count) { \
    return cuda_emulator::parameters(::name, count);                                                                              \
  }                                                                                                                               \
  extern "C" __attribute__((visibility("default"))) int cuda_emulator_bound_##name() { return cuda_emulator_bounds::name; }
