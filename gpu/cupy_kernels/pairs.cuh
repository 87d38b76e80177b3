// Helpers for kernels that walk over pairs of rows in tiles, rows of one side by rows of the other
// side: products, angles, weighted sums. A file defines THREADS, the threads of a block, before it
// includes this one.
#pragma once

constexpr ACC PI = ACC(3.14159265358979323846), INVERSE_PI = ACC(0.318309886183790671538);

constexpr int ROWS = THREADS / 4;                   // rows of a block, for which it makes the result
constexpr int OTHERS = sizeof(ACC) == 8 ? 16 : 32;  // rows of the other side at a time
constexpr int DIMS = sizeof(ACC) == 8 ? 32 : 64;    // coordinates at a time
constexpr int COLUMNS = DIMS;                       // columns of a block's result
constexpr int ACROSS = COLUMNS / 4, DOWN = THREADS / ACROSS;  // the threads as a rectangle: others or columns across, rows down
constexpr int MY_ROWS = ROWS / DOWN, MY_OTHERS = OTHERS / ACROSS, MY_PAIRS = MY_ROWS * MY_OTHERS;

// Some tiles are read many rows at a time. Their rows are four entries longer than their content,
// so that they start in different banks.
constexpr int LONG_ROW = DIMS / 4 + 1, LONG_PAIRS = OTHERS / 4 + 1;

// A thread's position in the rectangle. A warp is 8 threads across and 4 down, so that it reads few
// different rows at a time.
struct Position {
  int lane, warp_across, warp_down;
  __device__ int across(int lane) const { return warp_across + lane % 8; }
  __device__ int down(int lane) const { return warp_down + lane / 8; }
  // The row and the other of pair e of a lane.
  __device__ int row(int lane, int e) const { return down(lane) + DOWN * (e / MY_OTHERS); }
  __device__ int other(int lane, int e) const { return across(lane) + ACROSS * (e % MY_OTHERS); }
};
__device__ inline Position my_position() {
  const int warp = threadIdx.x / 32;
  return {static_cast<int>(threadIdx.x % 32), warp % (ACROSS / 8) * 8, warp / (ACROSS / 8) * 4};
}

template <int STRIDE> __device__ inline ACC& entry(Four (*tile)[STRIDE], int row, int column) {
  return tile[row][column / 4].at[column % 4];
}

// Copies HEIGHT rows of a head from first_row on to a tile: WIDTH entries of each, from first_dim
// on. Masked rows and entries beyond the matrix become zeros. No load waits for the mask.
template <int HEIGHT, int WIDTH, int STRIDE, class T>
__device__ inline void fetch_rows(Four (*tile)[STRIDE], const T* matrix, const unsigned char* mask, long long head, int rows, int first_row,
                                  int dim, int first_dim) {
  static_assert(HEIGHT * WIDTH % THREADS == 0, "every thread copies as many entries");
  const int column = threadIdx.x % WIDTH;
#pragma unroll 4
  for (int turn = 0; turn < HEIGHT * WIDTH / THREADS; ++turn) {
    const int i = turn * (THREADS / WIDTH) + threadIdx.x / WIDTH;
    const long long row = head * rows + first_row + i;
    const bool inside = first_dim + column < dim && first_row + i < rows;
    const ACC x = inside ? widen(matrix[row * dim + first_dim + column]) : ACC(0);
    entry(tile, i, column) = inside && kept(mask, row) ? x : ACC(0);
  }
}

// Adds to `sum` the dot products of a thread's pairs, over the coordinates in the tiles.
template <int STRIDE>
__device__ inline void add_products(ACC (&sum)[MY_PAIRS], const Four (*rows)[STRIDE], const Four (*others)[STRIDE], Position at, int dims) {
  const int across = at.across(at.lane), down = at.down(at.lane);
  ACC part[MY_PAIRS] = {};
#pragma unroll 1
  for (int four = 0; four < ceil_div(smaller(DIMS, dims), 4); ++four) {
    Four a[MY_ROWS], b[MY_OTHERS];
#pragma unroll
    for (int i = 0; i < MY_ROWS; ++i) a[i] = rows[down + DOWN * i][four];
#pragma unroll
    for (int j = 0; j < MY_OTHERS; ++j) b[j] = others[across + ACROSS * j][four];
#pragma unroll
    for (int e = 0; e < MY_PAIRS; ++e) {
#pragma unroll
      for (int u = 0; u < 4; ++u) part[e] += a[e / MY_OTHERS].at[u] * b[e % MY_OTHERS].at[u];
    }
  }
#pragma unroll
  for (int e = 0; e < MY_PAIRS; ++e) sum[e] += part[e];
}

// Adds to `sum` the product of weights (rows by others) and a matrix (others by columns), for a
// thread's rows and four columns.
template <int STRIDE>
__device__ inline void add_weighted(Four (&sum)[MY_ROWS], const Four (*weights)[LONG_PAIRS], const Four (*matrix)[STRIDE], Position at) {
  const int across = at.across(at.lane), down = at.down(at.lane);
  Four part[MY_ROWS] = {};
#pragma unroll 2
  for (int four = 0; four < OTHERS / 4; ++four) {
    Four weight[MY_ROWS];
#pragma unroll
    for (int i = 0; i < MY_ROWS; ++i) weight[i] = weights[down + DOWN * i][four];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const Four other = matrix[4 * four + u][across];
#pragma unroll
      for (int i = 0; i < MY_ROWS; ++i) {
#pragma unroll
        for (int v = 0; v < 4; ++v) part[i].at[v] += weight[i].at[u] * other.at[v];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < MY_ROWS; ++i) {
#pragma unroll
    for (int v = 0; v < 4; ++v) sum[i].at[v] += part[i].at[v];
  }
}

// 1 - theta / pi for a cosine; NaN for NaN.
__device__ inline ACC chance_of(ACC cosine) {
  const ACC angle = acos(smaller(ACC(1), ACC(fabs(cosine)))) * INVERSE_PI;  // in units of pi
  return cosine < ACC(0) ? angle : ACC(1) - angle;
}

// Raises every entry to the power of an exponent of at least 1, by squaring.
template <int N> __device__ inline void to_power(ACC (&x)[N], int exponent) {
  ACC square[N];
#pragma unroll
  for (int e = 0; e < N; ++e) square[e] = x[e], x[e] = ACC(1);
  for (; exponent > 0; exponent /= 2) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (exponent % 2) x[e] *= square[e];
      square[e] *= square[e];
    }
  }
}

// Near +-1 a cosine does not determine the angle and the sine well enough. For every pair e with
// bit e of `steep` set, they are computed from differences of the unit vectors:
//   theta = 2 atan2(|a - b|, |a + b|), sin(theta) = |a - b| |a + b| / 2.
// The whole warp takes the pairs of all its lanes, one after the other. The lane that owns the pair
// calls found(row, other, 1 - theta / pi, sin(theta)).
template <class Found>
__device__ inline void measure_steep(unsigned steep, Position at, const ACC* rows, const ACC* others, int dim, Found found) {
  for (int e = 0; __any_sync(FULL_WARP, steep >> e); ++e) {
    for (unsigned lanes = __ballot_sync(FULL_WARP, steep >> e & 1); lanes != 0; lanes &= lanes - 1) {
      const int owner = __ffs(int(lanes)) - 1, row = at.row(owner, e), other = at.other(owner, e);
      const ACC* a = rows + static_cast<long long>(row) * dim;
      const ACC* b = others + static_cast<long long>(other) * dim;
      ACC difference = 0, sum = 0;  // their squared lengths, then their lengths
      for (int i = at.lane; i < dim; i += 32) {
        difference += (a[i] - b[i]) * (a[i] - b[i]);
        sum += (a[i] + b[i]) * (a[i] + b[i]);
      }
      difference = sqrt(warp_sum(difference)), sum = sqrt(warp_sum(sum));
      if (at.lane == owner) found(row, other, ACC(1) - 2 * INVERSE_PI * ACC(atan2(difference, sum)), difference * sum / 2);
    }
  }
}
