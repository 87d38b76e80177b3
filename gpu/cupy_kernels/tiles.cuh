// What kernels share that work on tiles in shared memory, and with whole warps.
#pragma once

// Four neighbours of a row, fetched from shared memory at one time.
struct alignas(16) Four { ACC at[4]; };

// The sum over the lanes of a warp, in every lane; always added in the same order.
__device__ inline ACC warp_sum(ACC x) {
  for (int stride = 16; stride > 0; stride /= 2) x += __shfl_xor_sync(FULL_WARP, x, stride);
  return x;
}
