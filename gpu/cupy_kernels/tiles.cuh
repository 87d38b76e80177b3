// What kernels share that work on tiles in shared memory, and with whole warps.
#pragma once

// Four neighbors of a row, fetched from shared memory at one time.
struct alignas(16) Four { ACC at[4]; };

// The sum over the lanes of a warp, in every lane; always added in the same order.
__device__ inline ACC warp_sum(ACC x) {
  for (int stride = 16; stride > 0; stride /= 2) x += __shfl_xor_sync(FULL_WARP, x, stride);
  return x;
}

// A row's length is scale * length: entries are divided by the largest first, so that no square
// overflows or vanishes. Of a zero row `scale` is 0 and `length` 1.
struct RowSize {
  ACC scale, length;
  bool finite;
  // An entry of the row scaled to unit length.
  template <class T> __device__ ACC unit(T x) const { return scale > ACC(0) ? widen(x) / scale / length : ACC(0); }
};
// The whole warp measures a row.
template <class T> __device__ inline RowSize size_of_row(const T* row, int dim, int lane) {
  ACC largest = 0;
  bool finite = true;
  for (int c = lane; c < dim; c += 32) {
    const ACC x = widen(row[c]);
    largest = larger(largest, ACC(fabs(x)));
    finite = finite && is_finite(x);
  }
  for (int stride = 16; stride > 0; stride /= 2) largest = larger(largest, __shfl_xor_sync(FULL_WARP, largest, stride));
  finite = __all_sync(FULL_WARP, finite);
  ACC squares = 0;
  for (int c = lane; c < dim && largest > ACC(0); c += 32) {
    const ACC x = widen(row[c]) / largest;
    squares += x * x;
  }
  squares = warp_sum(squares);
  return {largest, squares > ACC(0) ? ACC(sqrt(squares)) : ACC(1), finite};
}
