// Smoothing, with the rows in registers. T_r[c] is the sum of the rows of a table at a distance of r
// bits from row c, for one column. Bit by bit,
//   T_r[c] += T_(r-1)[c xor 2^b]     for r = s ... 1, from T_0 = the table and zeros.
// So a bit is crossed by pairs of rows, each pair by itself and in place, and T_0 stays as it is.
// The smoothed row is sum_r a_r T_r, where a_r / a_(r-1) = (s - r + 1) / (bits - r + 1). Only
// positive numbers multiply, and nothing is subtracted: far from every key the result is zero.
//
// Compiled for OVERSAMPLE = s and for HELD_BITS: the bits that a thread crosses while its rows stay
// in registers. Without OVERSAMPLE this file is empty.
#pragma once

#ifdef OVERSAMPLE
constexpr int SPHERES = OVERSAMPLE + 1;  // T_0 ... T_s
constexpr int HELD_ROWS = 1 << HELD_BITS;
typedef ACC Spheres[SPHERES];  // of one row

struct Smoothing {
  ACC ratio[SPHERES];  // a_r / a_(r-1)

  __device__ explicit Smoothing(int bits) {
#pragma unroll
    for (int r = 1; r < SPHERES; ++r) ratio[r] = ACC(SPHERES - r) / ACC(bits - r + 1);
  }
  __device__ ACC of(const Spheres& sphere) const {
    ACC sum = sphere[OVERSAMPLE];
#pragma unroll
    for (int r = OVERSAMPLE; r > 0; --r) sum = sum * ratio[r] + sphere[r - 1];
    return sum;
  }
};

// Crosses `bits` bits of the 2^bits rows of a column, HELD_BITS of them in each sweep over the rows.
// Threads may share the column: this one takes share number `share` of `shares`. read(row, sphere,
// begins) fetches a row's spheres, and write(row, sphere, begins, ends) puts them back; `begins` in
// the first sweep, `ends` in the last. wait() is called between two sweeps. The last sweep may hold
// bits that have been crossed: it lets them be.
template <class Read, class Write, class Wait>
__device__ inline void cross_bits(int bits, int share, int shares, Read read, Write write, Wait wait) {
  const int rows = 1 << bits, bundles = larger(1, rows >> HELD_BITS);
  for (int done = 0; done < bits; done += HELD_BITS) {
    const bool begins = done == 0, ends = done + HELD_BITS >= bits;
    const int first_bit = ends ? larger(0, bits - HELD_BITS) : done;
    if (!begins) wait();
    for (int bundle = share; bundle < bundles; bundle += shares) {
      const int low = bundle & ((1 << first_bit) - 1), first_row = ((bundle - low) << HELD_BITS) + low;
      Spheres sphere[HELD_ROWS] = {};
#pragma unroll
      for (int i = 0; i < HELD_ROWS; ++i) {
        if (first_row + (i << first_bit) < rows) read(first_row + (i << first_bit), sphere[i], begins);
      }
#pragma unroll
      for (int bit = 0; bit < HELD_BITS; ++bit) {
        if (first_bit + bit < done) continue;
#pragma unroll
        for (int i = 0; i < HELD_ROWS; ++i) {
          if (i >> bit & 1) continue;
          const int across = i | 1 << bit;
#pragma unroll
          for (int r = OVERSAMPLE; r > 0; --r) {
            sphere[i][r] += sphere[across][r - 1];
            sphere[across][r] += sphere[i][r - 1];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < HELD_ROWS; ++i) {
        if (first_row + (i << first_bit) < rows) write(first_row + (i << first_bit), sphere[i], begins, ends);
      }
    }
  }
}
#endif
