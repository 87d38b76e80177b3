// Helpers for kernels that work on tiles in shared memory, and with whole warps.
#pragma once

// Four neighboring entries of a row, read from shared memory at once. A tile is an array of rows of
// fours: tile[row][four].at[u] is entry 4 four + u of the row.
struct alignas(16) Four { ACC at[4]; };

// The sum over the lanes of a warp, returned in every lane. The order of addition is fixed.
__device__ inline ACC warp_sum(ACC x) {
  for (int stride = 16; stride > 0; stride /= 2) x += __shfl_xor_sync(FULL_WARP, x, stride);
  return x;
}

// The length of a row, as scale * length: `scale` is the largest entry, and `length` the length of
// the row divided by it, so that no square overflows or vanishes. A zero row has scale 0 and length
// 1.
struct RowSize {
  ACC scale, length;
  bool finite;
  // An entry x of the row, scaled to unit length.
  template <class T> __device__ ACC unit(T x) const { return scale > ACC(0) ? widen(x) / scale / length : ACC(0); }
};
// The whole warp measures one row.
template <class T> __device__ inline RowSize size_of_row(const T* row, int dim, int lane) {
  ACC largest = 0;
  bool finite = true;
  for (int i = lane; i < dim; i += 32) {
    const ACC x = widen(row[i]);
    largest = larger(largest, ACC(fabs(x)));
    finite = finite && is_finite(x);
  }
  for (int stride = 16; stride > 0; stride /= 2) largest = larger(largest, __shfl_xor_sync(FULL_WARP, largest, stride));
  finite = __all_sync(FULL_WARP, finite);
  ACC squares = 0;
  for (int i = lane; i < dim && largest > ACC(0); i += 32) {
    const ACC x = widen(row[i]) / largest;
    squares += x * x;
  }
  squares = warp_sum(squares);
  return {largest, squares > ACC(0) ? ACC(sqrt(squares)) : ACC(1), finite};
}
