// The largest logits of rows, and the sums of their softmax weights, by segments of the vocabulary: integers, whose maxima and
// sums are the same in any order. One block for each row and segment.
#include "numerics.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, SEGMENT = 4096;
constexpr int64 NOTHING = -0x7FFFFFFFFFFFFFFFLL - 1;    // below the key of any logit

// best [rows, segments] = the greatest key of the segment: the logit's order in the upper half, below it the token, greatest for
// the lowest id. logits: float32 [rows, columns] of tokens ``first`` …; a segment without logits gets NOTHING.
extern "C" __global__ void __launch_bounds__(THREADS) find_best(const float* logits, int columns, int first, const int* rows,
                                                                int64* best) {
    __shared__ int64 found[WARPS];
    int row = blockIdx.y, segment = blockIdx.x, stop = min(columns, (segment + 1) * SEGMENT);
    if (row >= *rows) return;
    int64 largest = NOTHING;
    for (int i = segment * SEGMENT + threadIdx.x; i < stop; i += THREADS) {
        int64 order = ascending(__float_as_int(logits[(int64)row * columns + i]));
        int64 key = (int64)((uint64)order << 32) | (0x7FFFFFFF - (first + i));
        largest = key > largest ? key : largest;
    }
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = largest;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < WARPS; i++) largest = found[i] > largest ? found[i] : largest;
    best[(int64)row * gridDim.x + segment] = largest;
}

// totals [rows, segments] = sums of rint(exp(l - max) * 2**32), relative to the row's largest logit, which ``best`` tells.
extern "C" __global__ void __launch_bounds__(THREADS) find_totals(const float* logits, int columns, const int64* best,
                                                                  const int* rows, int64* totals) {
    __shared__ int64 sums[WARPS];
    int row = blockIdx.y, segment = blockIdx.x, stop = min(columns, (segment + 1) * SEGMENT);
    if (row >= *rows) return;
    int64 largest = NOTHING;
    for (int i = 0; i < gridDim.x; i++) {
        int64 key = best[(int64)row * gridDim.x + i];
        largest = key > largest ? key : largest;
    }
    float maximum = __int_as_float(ascending((int)(largest >> 32)));
    int64 total = 0;
    for (int i = segment * SEGMENT + threadIdx.x; i < stop; i += THREADS)
        total += to_fixed(canonical_exp(logits[(int64)row * columns + i] - maximum));
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < WARPS; i++) total += sums[i];
    totals[(int64)row * gridDim.x + segment] = total;
}
