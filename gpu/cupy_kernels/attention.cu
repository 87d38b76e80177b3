// What stands around the cumulation in YOSO attention: rows that are not finite, and the scaling of
// the result to unit length.
//
// Compiled for VALUE, how the result is stored.
#include "common.cuh"
#include "tiles.cuh"

constexpr int WARPS = 8;

// spoil_heads
//   A block takes one head and says whether any row of it that is kept is spoiled: holds an
//   infinity or NaN, as the hash has noted. Moves one or two bytes for each row in, 4 bytes for
//   each head out. Deterministic.
extern "C" __global__ void spoil_heads(const unsigned char* __restrict__ row_spoiled, const unsigned char* __restrict__ mask,
                                       int* __restrict__ head_spoiled, int rows_per_head) {
  const long long first = static_cast<long long>(blockIdx.x) * rows_per_head;
  int found = 0;
  for (int i = threadIdx.x; i < rows_per_head; i += blockDim.x) found |= row_spoiled[first + i] && kept(mask, first + i);
  found = __syncthreads_or(found);
  if (threadIdx.x == 0) head_spoiled[blockIdx.x] = found;
}

// finish_attention
//   A warp takes one row of sums: NaN where its query, or a key of its head, was not finite, else
//   scaled to unit length if that is wanted, then rounded to VALUE. A row of at most 1e-12 becomes
//   zeros, and so does a masked one. Blocks of 8 rows. The length is taken of the row divided by
//   its largest entry, so that no square overflows or vanishes. Moves one row of sums in and one
//   row out; the second and third look at the row are served by the cache. Deterministic.
extern "C" __global__ void finish_attention(const ACC* __restrict__ sums, const unsigned char* __restrict__ query_mask,
                                       const unsigned char* __restrict__ query_spoiled, const int* __restrict__ head_spoiled,
                                       VALUE* __restrict__ out, long long num_rows, long long rows_per_head, int value_dim, int normalize) {
  const int lane = threadIdx.x % 32;
  const long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= num_rows) return;  // the whole warp
  const ACC* x = sums + row * value_dim;
  VALUE* y = out + row * value_dim;

  const bool keep = kept(query_mask, row);
  const bool spoiled = (query_spoiled != nullptr && query_spoiled[row]) || (head_spoiled != nullptr && head_spoiled[row / rows_per_head]);
  if (!keep || spoiled || !normalize) {
    for (int i = lane; i < value_dim; i += 32) y[i] = narrow<VALUE>(!keep ? ACC(0) : spoiled ? not_a_number() : x[i]);
    return;
  }
  ACC largest = 0;
  bool finite = true;
  for (int i = lane; i < value_dim; i += 32) {
    largest = larger(largest, ACC(fabs(x[i])));
    finite = finite && is_finite(x[i]);
  }
  finite = __all_sync(FULL_WARP, finite);
  for (int stride = 16; stride > 0; stride /= 2) largest = larger(largest, __shfl_xor_sync(FULL_WARP, largest, stride));
  ACC squares = 0;
  for (int i = lane; i < value_dim && largest > ACC(0); i += 32) {
    const ACC scaled = x[i] / largest;
    squares += scaled * scaled;
  }
  const ACC length = sqrt(warp_sum(squares));  // of the scaled row: at least 1
  const bool tiny = !(largest * length > ACC(1e-12));
  for (int i = lane; i < value_dim; i += 32) {
    y[i] = narrow<VALUE>(!finite ? not_a_number() : tiny ? ACC(0) : x[i] / largest / length);
  }
}
