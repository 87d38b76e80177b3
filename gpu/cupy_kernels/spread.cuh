// The spread of the hashes' own rows, which tells how far a row is from its expectation:
//   error = sqrt((m S / |Y|^2 - 1) / (m - 1)),  Y = sum_h r_h,  S = sum_h |r_h|^2.
// The gather sums the squares beside the rows, and finish_attention takes the root. Both happen
// only if compiled with SPREAD=1: without it, kernels are as if this file were empty.
//
// Rows are multiplied by a power of two before they are squared, so that no square overflows: one
// over the head's largest value, about. scan_exponents finds the exponent.
#pragma once

#ifndef SPREAD
#define SPREAD 0
#endif

constexpr int EXPONENTS = sizeof(ACC) == 8 ? 1000 : 120;  // beyond them either way a power of two, or one over it, is not normal

// The exponent of a head's largest value as it is stored: at least 1, so that 0 says that there is
// no such value.
__device__ inline int stored_exponent(ACC largest) { return larger(-EXPONENTS, smaller(ilogb(largest), EXPONENTS)) + EXPONENTS + 1; }

__device__ inline ACC unit_of(int stored) { return scalbn(ACC(1), EXPONENTS + 1 - stored); }

// The error of a row y = Y / m, whose largest entry is `largest` and whose length is that times
// `length`. S comes in units squared. If the row is so short that its squares lose bits at the lower
// end of the range, then S does not tell, and the result is NaN. S is at least |Y|^2 / m: only
// rounding makes it less.
__device__ inline ACC error_of_row(ACC largest, ACC length, ACC unit, ACC squares, int num_hash) {
  if (largest == ACC(0)) return ACC(__uint_as_float(0x7f800000u));
  const ACC scaled = largest * unit;
  if (scaled < ACC(sizeof(ACC) == 8 ? 1e-140 : 1e-15)) return not_a_number();
  const ACC excess = squares / scaled / scaled / (length * length) / ACC(num_hash) - ACC(1);
  return ACC(sqrt(larger(ACC(0), excess) / ACC(num_hash - 1)));
}
