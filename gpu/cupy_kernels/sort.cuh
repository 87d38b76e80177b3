// Lookup of buckets in sorted codes.
#pragma once

// The first position in ascending `codes` whose code is at least `code`; n if there is none.
__device__ inline int lower_bound(const int* codes, int n, int code) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (codes[middle] < code) low = middle + 1; else high = middle;
  }
  return low;
}
