// Smoothed tables: out[c] = sum_{c'} a_|c xor c'| table[c'].
//
// Compiled for VALUE, for OUT, and for OVERSAMPLE and HELD_BITS.
#include "common.cuh"
#include "smoothing.cuh"

constexpr int THREADS = 256;

// smooth_spheres
//   A launch crosses `cross` of the bits of the row numbers, from first_bit on: all of them if it is
//   the only one. A block takes the 2^cross rows that agree in the other bits, and `width` columns.
//   A thread takes one column. It holds 2^HELD_BITS of its rows, each with T_0 ... T_s, in registers
//   while it crosses HELD_BITS bits. After that the rows pass through shared memory to other threads
//   for the next bits. There a gap of one row after every 2^HELD_BITS keeps narrow blocks out of each
//   other's banks.
//
//   Neighboring threads have neighboring columns, so memory moves whole sectors if the block has 8
//   columns (4 in float64). Blocks with fewer share their sectors with the next block, in the L2
//   cache. The first launch reads the table; later ones also T_1 ... T_s from `spheres`. The last
//   one writes the smoothed rows, the others T_1 ... T_s. So a table of N numbers moves 2 N numbers
//   in one launch, and (2 s + 3) N in two. It takes s bits N additions. Each step to the next
//   HELD_BITS bits moves (2 s + 1) N numbers through shared memory, the first one N more.
//
//   `out` may be `table`: a block reads all its rows before it writes one. Columns are those from
//   first_column on of rows with `stride` columns; `spheres` (s, tables, rows, columns) holds these
//   columns only. Grid (slabs of columns for each set of rows, tables). Deterministic.
extern "C" __global__ void __launch_bounds__(THREADS)
smooth_spheres(const VALUE* table, ACC* __restrict__ spheres, OUT* out, int bits, int first_bit, int cross, int stride, int first_column,
               int columns, int width) {
  extern __shared__ double shared[];  // double, so that it is aligned for both types of ACC
  ACC* slab = reinterpret_cast<ACC*>(shared);

  const int slabs = ceil_div(columns, width), offset = threadIdx.x % width, column = blockIdx.x % slabs * width + offset;
  const int others = blockIdx.x / slabs, low = others & ((1 << first_bit) - 1);  // the bits that the block's rows agree in
  const long long first_row = (static_cast<long long>(blockIdx.y) << bits) + (static_cast<long long>(others - low) << cross) + low;
  const long long sphere_size = (static_cast<long long>(gridDim.y) << bits) * columns;
  const int slab_rows = (1 << cross) + (1 << cross >> HELD_BITS);
  const bool has_column = column < columns, is_first = first_bit == 0, is_last = first_bit + cross == bits;
  const Smoothing smoothing(bits);

  const auto in_slab = [&](int r, int row) -> ACC& { return slab[(r * slab_rows + row + (row >> HELD_BITS)) * width + offset]; };
  const auto row_of = [&](int row) { return first_row + (static_cast<long long>(row) << first_bit); };

  cross_bits(
      cross, threadIdx.x / width, blockDim.x / width,
      [&](int row, Spheres& sphere, bool begins) {
        if (!has_column) return;
        if (begins) sphere[0] = widen(table[row_of(row) * stride + first_column + column]);
        else sphere[0] = in_slab(0, row);
#pragma unroll
        for (int r = 1; r < SPHERES; ++r) {
          if (!begins) sphere[r] = in_slab(r, row);
          else if (!is_first) sphere[r] = spheres[(r - 1) * sphere_size + row_of(row) * columns + column];
        }
      },
      [&](int row, const Spheres& sphere, bool begins, bool ends) {
        if (!has_column) return;
        if (ends && is_last) out[row_of(row) * stride + first_column + column] = narrow<OUT>(nan_unless_finite(smoothing.of(sphere)));
        if (begins && !ends) in_slab(0, row) = sphere[0];  // for good: T_0 stays as it is
#pragma unroll
        for (int r = 1; r < SPHERES; ++r) {
          if (!ends) in_slab(r, row) = sphere[r];
          else if (!is_last) spheres[(r - 1) * sphere_size + row_of(row) * columns + column] = sphere[r];
        }
      },
      [] { __syncthreads(); });
}
