// Fast Hadamard hashing: a code is tau sign bits of rotations H D, bit for bit as in the reference.
// block_per_part and warp_per_vector take the triples H D3 H D2 H D1 x of the paper's layout,
// warp_per_chain a chain of rotations.
//
// Compiled for VALUE and for D, the dimension of the vectors rounded up to a power of two.
//
// H is log2(D) stages of butterflies. At stride s, entry i (the lower) and entry i ^ s (the upper)
// become their sum and their difference. All kernels run the stages from the largest stride to the
// smallest, as the definition does, so every sum is the same float.
#include "common.cuh"

// One butterfly, seen from the entry `mine`; `other` is its partner. The upper entry becomes lower
// minus upper.
__device__ inline ACC butterfly(ACC mine, ACC other, bool upper) { return upper ? other - mine : mine + other; }

// block_per_part
//   A block rotates one vector by one part, and thread i holds entry i. Strides of 32 and more go
//   through shared memory (D entries), smaller strides are shuffles within a warp. Grid (vectors,
//   parts from `first_part` on), max(D, 32) threads. If D is below 32, the lanes beyond D work on zeros that nobody
//   reads. Moves, for each vector and part, d entries and 3 D signs in, and 4 bytes for each code
//   out. Deterministic.
extern "C" __global__ void __launch_bounds__(D < 32 ? 32 : D)
block_per_part(const VALUE* __restrict__ vectors, const signed char* __restrict__ signs, int* __restrict__ codes,
               long long vectors_per_head, int sign_sets, int parts, int first_part, int dim, int num_hash, int hash_code_len) {
  __shared__ ACC buffer[D < 32 ? 32 : D];
  __shared__ unsigned words[33];  // the sign bits of the part, 32 to a word, and a zero: a code may need two neighboring words
  __shared__ ACC largest_of_warp[32];

  const int i = threadIdx.x, lane = i % 32, part = first_part + blockIdx.y;
  const long long vector = blockIdx.x;
  const int set = int(vector / vectors_per_head % sign_sets);
  const signed char* diagonal = signs + (static_cast<long long>(set) * 3 * parts + part) * D;

  ACC x = i < dim ? widen(vectors[vector * dim + i]) : ACC(0);

  ACC largest = fabs(x);
  for (int stride = 16; stride > 0; stride /= 2) largest = larger(largest, __shfl_xor_sync(FULL_WARP, largest, stride));
  if (lane == 0) largest_of_warp[i / 32] = largest;
  __syncthreads();
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) largest = larger(largest, largest_of_warp[warp]);
  x *= range_scale(largest);

  for (int round = 0; round < 3; ++round) {
    if (i < D) x *= ACC(diagonal[static_cast<long long>(round) * parts * D + i]);
    for (int stride = D / 2; stride >= 32; stride /= 2) {
      __syncthreads();  // every thread has read the stage before
      buffer[i] = x;
      __syncthreads();
      x = butterfly(x, buffer[i ^ stride], i & stride);
    }
    for (int stride = D / 2 < 16 ? D / 2 : 16; stride > 0; stride /= 2) {
      x = butterfly(x, __shfl_xor_sync(FULL_WARP, x, stride), i & stride);
    }
  }

  if (hash_code_len > D) {  // a code spans parts: every block adds its bits to codes that start as zero
    const long long position = static_cast<long long>(part) * D + i, hash = position / hash_code_len;
    if (i < D && hash < num_hash && x > ACC(0)) {
      atomicOr(&codes[vector * num_hash + hash], 1 << (position % hash_code_len));
    }
    return;
  }
  const unsigned word = __ballot_sync(FULL_WARP, x > ACC(0));
  if (lane == 0) words[i / 32] = word;
  if (i == 0) words[blockDim.x / 32] = 0;
  __syncthreads();
  const int per = D / hash_code_len, hash = part * per + i;
  if (i < per && hash < num_hash) {
    const int first = i * hash_code_len;
    const unsigned long long bits = words[first / 32] | static_cast<unsigned long long>(words[first / 32 + 1]) << 32;
    codes[vector * num_hash + hash] = int(bits >> (first % 32)) & ((1 << hash_code_len) - 1);
  }
}

constexpr int WARPS = 4;
constexpr int ENTRIES = D < 32 ? 1 : D / 32;
constexpr int WARM_UP = 3;  // rounds of a chain whose coordinates are not used

__device__ constexpr int log2_of(int power) { return power == 1 ? 0 : 1 + log2_of(power / 2); }
constexpr int STAGES = log2_of(D);

// H times a diagonal, for a vector in the registers of a warp: lane l holds the entries l, l + 32,
// ...
__device__ inline void rotate(ACC (&y)[ENTRIES], const signed char* diagonal, int lane) {
#pragma unroll
  for (int e = 0; e < ENTRIES; ++e) {
    if (e * 32 + lane < D) y[e] *= ACC(diagonal[e * 32 + lane]);
  }
#pragma unroll
  for (int step = ENTRIES / 2; step > 0; step /= 2) {
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
      if (e & step) continue;
      const ACC lower = y[e], upper = y[e + step];
      y[e] = lower + upper;
      y[e + step] = lower - upper;
    }
  }
#pragma unroll
  for (int stride = D / 2 < 16 ? D / 2 : 16; stride > 0; stride /= 2) {
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) y[e] = butterfly(y[e], __shfl_xor_sync(FULL_WARP, y[e], stride), lane & stride);
  }
}

// A vector into the registers of a warp, scaled into the range in which no sum overflows. Returns
// whether it is finite.
__device__ inline bool load_vector(ACC (&x)[ENTRIES], const VALUE* vector, int dim, int lane) {
  ACC largest = 0;
  bool finite = true;
#pragma unroll
  for (int e = 0; e < ENTRIES; ++e) {
    const int i = e * 32 + lane;
    x[e] = i < dim ? widen(vector[i]) : ACC(0);
    largest = larger(largest, ACC(fabs(x[e])));
    finite = finite && is_finite(x[e]);
  }
  for (int stride = 16; stride > 0; stride /= 2) largest = larger(largest, __shfl_xor_sync(FULL_WARP, largest, stride));
  const ACC scale = range_scale(largest);
#pragma unroll
  for (int e = 0; e < ENTRIES; ++e) x[e] *= scale;
  return __all_sync(FULL_WARP, finite);
}

// warp_per_vector
//   A warp hashes one vector, part after part. Lane l holds the entries l, l + 32, l + 64, ... in
//   registers. Strides of 32 and more are between registers of one lane, smaller strides are
//   shuffles. So no barrier is needed, and shared memory only for the sign bits, which a ballot
//   packs 32 to a word. If `nonfinite` is not null, it marks the vectors that hold an infinity or
//   NaN: their codes mean nothing. A block has 4 independent warps. Moves d entries and, from
//   cache, 3 parts D signs in and 4 m bytes out for each vector. Deterministic.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
warp_per_vector(const VALUE* __restrict__ vectors, const signed char* __restrict__ signs, int* __restrict__ codes,
                unsigned char* __restrict__ nonfinite, long long num_vectors, long long vectors_per_head, int sign_sets, int parts, int dim,
                int num_hash, int hash_code_len) {
  __shared__ unsigned words_of_warp[WARPS][ENTRIES + 1];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long vector = static_cast<long long>(blockIdx.x) * WARPS + warp;
  if (vector >= num_vectors) return;  // the whole warp
  const int set = int(vector / vectors_per_head % sign_sets);
  const signed char* diagonals = signs + static_cast<long long>(set) * 3 * parts * D;
  int* code = codes + vector * num_hash;
  unsigned* words = words_of_warp[warp];
  if (lane == 0) words[ENTRIES] = 0;  // a code may need two neighboring words

  ACC x[ENTRIES];
  const bool finite = load_vector(x, vectors + vector * dim, dim, lane);
  if (nonfinite != nullptr && lane == 0) nonfinite[vector] = !finite;

  const int per = D / hash_code_len;
  const unsigned mask = (1u << hash_code_len) - 1;
  unsigned long long stream = 0;  // if codes span parts: bits that have not made a code yet
  int waiting = 0, made = 0;

  for (int part = 0; part < parts; ++part) {
    ACC y[ENTRIES];
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) y[e] = x[e];

    for (int round = 0; round < 3; ++round) {
      rotate(y, diagonals + (static_cast<long long>(round) * parts + part) * D, lane);
    }

    if (per == 0) {  // hash_code_len > D: the bits of all parts form one stream, cut every hash_code_len bits
      const unsigned bits = __ballot_sync(FULL_WARP, lane < D && y[0] > ACC(0));
      stream |= static_cast<unsigned long long>(bits) << waiting;
      waiting += D;
      if (waiting >= hash_code_len && made < num_hash) {
        if (lane == 0) code[made] = int(unsigned(stream) & mask);
        ++made;
        stream >>= hash_code_len;
        waiting -= hash_code_len;
      }
      continue;
    }
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
      const unsigned word = __ballot_sync(FULL_WARP, y[e] > ACC(0));
      if (lane == 0) words[e] = word;
    }
    __syncwarp();
    for (int in_part = lane; in_part < per && part * per + in_part < num_hash; in_part += 32) {
      const int first = in_part * hash_code_len;
      const unsigned long long bits = words[first / 32] | static_cast<unsigned long long>(words[first / 32 + 1]) << 32;
      code[part * per + in_part] = int(unsigned(bits >> (first % 32)) & mask);
    }
    __syncwarp();  // all lanes have read the words
  }
}

// warp_per_chain
//   A warp hashes one vector. It stays in registers, as in warp_per_vector, through all rounds of
//   the chain. From the fourth round on, entry c of rotation p is position p D + c of one stream,
//   and position b * apart + h is bit b of code h: neighboring lanes hold neighboring hashes. A
//   block has 4 independent warps. The codes grow in shared memory, num_hash for each warp, or, if
//   in_shared is 0, in global memory, where they start as zero. Moves d entries and, from cache,
//   rounds D signs in and 4 m bytes out for each vector. Deterministic.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
warp_per_chain(const VALUE* __restrict__ vectors, const signed char* __restrict__ signs, int* __restrict__ codes,
               unsigned char* __restrict__ nonfinite, long long num_vectors, long long vectors_per_head, int sign_sets, int rounds, int dim,
               int num_hash, int hash_code_len, int in_shared) {
  extern __shared__ int codes_of_warp[];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long vector = static_cast<long long>(blockIdx.x) * WARPS + warp;
  if (vector >= num_vectors) return;  // the whole warp
  const int set = int(vector / vectors_per_head % sign_sets);
  const signed char* diagonals = signs + static_cast<long long>(set) * rounds * D;
  int* code = in_shared ? codes_of_warp + warp * num_hash : codes + vector * num_hash;
  if (in_shared) {
    for (int hash = lane; hash < num_hash; hash += 32) code[hash] = 0;
    __syncwarp();
  }

  ACC x[ENTRIES];
  const bool finite = load_vector(x, vectors + vector * dim, dim, lane);
  if (nonfinite != nullptr && lane == 0) nonfinite[vector] = !finite;

  const int apart = (rounds - WARM_UP) * D / hash_code_len;
  for (int round = 1; round <= rounds; ++round) {
    rotate(x, diagonals + static_cast<long long>(round - 1) * D, lane);
    const ACC factor = ACC(1) / ACC(1 << (round * STAGES / 2 - (round - 1) * STAGES / 2));  // exact: a power of two
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
      x[e] *= factor;
      const int position = (round - 1 - WARM_UP) * D + e * 32 + lane;
      if (round <= WARM_UP || e * 32 + lane >= D || !(x[e] > ACC(0))) continue;
      const int bit = position / apart, hash = position % apart;
      if (bit < hash_code_len && hash < num_hash) atomicOr(&code[hash], 1 << bit);  // two entries of a round may belong to one code
    }
  }
  if (in_shared) {
    __syncwarp();
    for (int hash = lane; hash < num_hash; hash += 32) codes[vector * num_hash + hash] = code[hash];
  }
}
