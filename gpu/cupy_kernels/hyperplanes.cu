// Hashing by Gaussian planes: bit b of the code of a hash is x . planes[:, hash tau + b] > 0.
//
// Compiled for VALUE, the type in which the vectors are stored.
#include "common.cuh"

constexpr int MAX_BITS = 30;

// thread_per_code
//   A thread makes one code. It reads the vector twice, and keeps up to 30 dot products in
//   registers. Neighboring threads make the codes of one vector from neighboring planes. A vector
//   with an entry beyond 2^60 is scaled down by a power of two, as in the Hadamard hash. If
//   `nonfinite` is not null, the thread of the first code marks vectors that hold an infinity or
//   NaN. Moves, for each vector, d entries and, from cache, d m tau entries of the planes in, and
//   4 m bytes out. Deterministic.
extern "C" __global__ void thread_per_code(const VALUE* __restrict__ vectors, const ACC* __restrict__ planes, int* __restrict__ codes,
                                           unsigned char* __restrict__ nonfinite, long long num_codes, long long vectors_per_head,
                                           int plane_sets, int dim, int num_hash, int hash_code_len) {
  const long long code = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (code >= num_codes) return;
  const long long vector = code / num_hash;
  const int hash = int(code % num_hash), width = num_hash * hash_code_len, set = int(vector / vectors_per_head % plane_sets);
  const ACC* plane = planes + static_cast<long long>(set) * dim * width + hash * hash_code_len;
  const VALUE* x = vectors + vector * dim;

  ACC largest = 0;
  bool finite = true;
  for (int i = 0; i < dim; ++i) {
    largest = larger(largest, ACC(fabs(widen(x[i]))));
    finite = finite && is_finite(widen(x[i]));
  }
  if (nonfinite != nullptr && hash == 0) nonfinite[vector] = !finite;
  const ACC scale = range_scale(largest);

  ACC projection[MAX_BITS];
#pragma unroll
  for (int bit = 0; bit < MAX_BITS; ++bit) projection[bit] = 0;
  for (int i = 0; i < dim; ++i) {
    const ACC entry = widen(x[i]) * scale;
#pragma unroll
    for (int bit = 0; bit < MAX_BITS; ++bit) {
      if (bit < hash_code_len) projection[bit] += entry * plane[static_cast<long long>(i) * width + bit];
    }
  }
  int bits = 0;
#pragma unroll
  for (int bit = 0; bit < MAX_BITS; ++bit) {
    if (bit < hash_code_len && projection[bit] > ACC(0)) bits |= 1 << bit;
  }
  codes[code] = bits;
}
