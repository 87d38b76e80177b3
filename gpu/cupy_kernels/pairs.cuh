// What the kernels share that walk over pairs of rows in tiles, those of one side by those of the
// other: products, angles, weighted sums. A file that includes this says before it how many THREADS
// a block has.
#pragma once

constexpr ACC PI = ACC(3.14159265358979323846), INVERSE_PI = ACC(0.318309886183790671538);

constexpr int ROWS = THREADS / 4;                   // of a block: those that its result is for
constexpr int OTHERS = sizeof(ACC) == 8 ? 16 : 32;  // rows of the other side at one time
constexpr int DIMS = sizeof(ACC) == 8 ? 32 : 64;    // coordinates at one time
constexpr int COLUMNS = DIMS;                       // of a block's result
constexpr int ACROSS = COLUMNS / 4, DOWN = THREADS / ACROSS;  // the threads as a rectangle: others or columns across, rows down
constexpr int MY_ROWS = ROWS / DOWN, MY_OTHERS = OTHERS / ACROSS, MY_PAIRS = MY_ROWS * MY_OTHERS;

// Tiles whose rows are read many at one time are four entries longer than their content, so that
// these start in different banks.
constexpr int LONG_ROW = DIMS / 4 + 1, LONG_PAIRS = OTHERS / 4 + 1;

// A thread's place in the rectangle. A warp is 8 threads across and 4 down, so that it reads few
// different rows at one time.
struct Place {
  int lane, warp_across, warp_down;
  __device__ int across(int lane) const { return warp_across + lane % 8; }
  __device__ int down(int lane) const { return warp_down + lane / 8; }
  // Row and other of pair e of a lane.
  __device__ int row(int lane, int e) const { return down(lane) + DOWN * (e / MY_OTHERS); }
  __device__ int other(int lane, int e) const { return across(lane) + ACROSS * (e % MY_OTHERS); }
};
__device__ inline Place my_place() {
  const int warp = threadIdx.x / 32;
  return {static_cast<int>(threadIdx.x % 32), warp % (ACROSS / 8) * 8, warp / (ACROSS / 8) * 4};
}

template <int STRIDE> __device__ inline ACC& entry(Four (*tile)[STRIDE], int row, int column) {
  return tile[row][column / 4].at[column % 4];
}

// Rows first_row ... of a head, WIDTH of their entries from first_dim on, go to a tile. Rows that
// are masked, and what lies beyond the matrix, are zeros: nothing of a masked row is read.
template <int HEIGHT, int WIDTH, int STRIDE, class T>
__device__ inline void fetch_rows(Four (*tile)[STRIDE], const T* matrix, const unsigned char* mask, long long head, int rows, int first_row,
                                  int dim, int first_dim) {
  const int c = threadIdx.x % WIDTH;
#pragma unroll 4
  for (int t = threadIdx.x / WIDTH; t < HEIGHT; t += THREADS / WIDTH) {
    const long long row = head * rows + first_row + t;
    const bool there = first_dim + c < dim && first_row + t < rows && kept(mask, row);
    entry(tile, t, c) = there ? widen(matrix[row * dim + first_dim + c]) : ACC(0);
  }
}

// The dot products of a thread's pairs, over the coordinates in the tiles, added to what they were.
template <int STRIDE>
__device__ inline void add_products(ACC (&sum)[MY_PAIRS], const Four (*rows)[STRIDE], const Four (*others)[STRIDE], Place at, int dims) {
  const int across = at.across(at.lane), down = at.down(at.lane);
  ACC part[MY_PAIRS] = {};
#pragma unroll 1
  for (int r = 0; r < ceil_div(smaller(DIMS, dims), 4); ++r) {
    Four a[MY_ROWS], b[MY_OTHERS];
#pragma unroll
    for (int i = 0; i < MY_ROWS; ++i) a[i] = rows[down + DOWN * i][r];
#pragma unroll
    for (int j = 0; j < MY_OTHERS; ++j) b[j] = others[across + ACROSS * j][r];
#pragma unroll
    for (int e = 0; e < MY_PAIRS; ++e) {
#pragma unroll
      for (int u = 0; u < 4; ++u) part[e] += a[e / MY_OTHERS].at[u] * b[e % MY_OTHERS].at[u];
    }
  }
#pragma unroll
  for (int e = 0; e < MY_PAIRS; ++e) sum[e] += part[e];
}

// A thread's rows and four columns of weights (rows by others) times a matrix (others by columns),
// added to what they were.
template <int STRIDE>
__device__ inline void add_weighted(Four (&sum)[MY_ROWS], const Four (*weights)[LONG_PAIRS], const Four (*matrix)[STRIDE], Place at) {
  const int across = at.across(at.lane), down = at.down(at.lane);
  Four part[MY_ROWS] = {};
#pragma unroll 2
  for (int j = 0; j < OTHERS / 4; ++j) {
    Four w[MY_ROWS];
#pragma unroll
    for (int i = 0; i < MY_ROWS; ++i) w[i] = weights[down + DOWN * i][j];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const Four v = matrix[4 * j + u][across];
#pragma unroll
      for (int i = 0; i < MY_ROWS; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) part[i].at[c] += w[i].at[u] * v.at[c];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < MY_ROWS; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[i].at[c] += part[i].at[c];
  }
}

// 1 - theta / pi for a cosine; of NaN it is NaN.
__device__ inline ACC chance_of(ACC cosine) {
  const ACC angle = acos(smaller(ACC(1), ACC(fabs(cosine)))) * INVERSE_PI;  // in units of pi
  return cosine < ACC(0) ? angle : ACC(1) - angle;
}

// Every entry to the power of an exponent of at least 1, by squaring.
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

// Near +-1 a cosine has lost the angle and the sine. For the pairs e with bit e of `steep` they
// come from differences of the unit vectors: theta = 2 atan2(|a - b|, |a + b|), sin(theta) = |a -
// b| |a + b| / 2. The whole warp takes the pairs of all its lanes, one after the other; the lane
// whose pair it is calls found(row, other, 1 - theta / pi, sin(theta)).
template <class Found>
__device__ inline void measure_steep(unsigned steep, Place at, const ACC* rows, const ACC* others, int dim, Found found) {
  for (int e = 0; __any_sync(FULL_WARP, steep >> e); ++e) {
    for (unsigned lanes = __ballot_sync(FULL_WARP, steep >> e & 1); lanes != 0; lanes &= lanes - 1) {
      const int owner = __ffs(int(lanes)) - 1, row = at.row(owner, e), other = at.other(owner, e);
      const ACC* a = rows + static_cast<long long>(row) * dim;
      const ACC* b = others + static_cast<long long>(other) * dim;
      ACC apart = 0, along = 0;
      for (int c = at.lane; c < dim; c += 32) {
        apart += (a[c] - b[c]) * (a[c] - b[c]);
        along += (a[c] + b[c]) * (a[c] + b[c]);
      }
      apart = sqrt(warp_sum(apart)), along = sqrt(warp_sum(along));
      if (at.lane == owner) found(row, other, ACC(1) - 2 * INVERSE_PI * ACC(atan2(apart, along)), apart * along / 2);
    }
  }
}
