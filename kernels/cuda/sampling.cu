// The largest logits of rows, and the sums of their softmax weights, by segments of the vocabulary: what greedy answers and
// log-probabilities need. One block a segment; grid: segments, rows. ``rows``: on the device; blocks beyond them do nothing.
#include "sampling.cuh"

constexpr int THREADS = 256, EACH = SEGMENT / THREADS;

// best [rows, segments]: the greatest key of each segment of logits [rows, columns] of tokens ``first`` ...; NOTHING of none.
extern "C" __global__ void __launch_bounds__(THREADS) find_best(
        const float* logits, int columns, int first, const int* rows, int64* best) {
    __shared__ int64 greatest[MOST_WARPS];
    int row = blockIdx.y, start = blockIdx.x * SEGMENT;
    if (row >= *rows) return;
    const float* own = logits + (int64)row * columns;
    int64 key = NOTHING;
    // Unrolled: the loads are all on their way before the first is compared.
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int column = start + i * THREADS + threadIdx.x;
        int64 other = column < columns ? key_of(own[column], first + column) : NOTHING;
        key = other > key ? other : key;
    }
    key = block_max(key, greatest);
    if (threadIdx.x == 0) best[(int64)row * gridDim.x + blockIdx.x] = key;
}

// totals [rows, segments]: the sum of rint(exp(l - maximum) * 2**32) over a segment, relative to the largest logit of the row.
extern "C" __global__ void __launch_bounds__(THREADS) find_totals(
        const float* logits, int columns, const int64* best, const int* rows, int64* totals) {
    __shared__ int64 sums[MOST_WARPS];
    int row = blockIdx.y, start = blockIdx.x * SEGMENT;
    if (row >= *rows) return;
    const float* own = logits + (int64)row * columns;
    float values[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int column = start + i * THREADS + threadIdx.x;
        values[i] = column < columns ? own[column] : -__int_as_float(INFINITY_BITS);
    }
    float maximum = logit_of(greatest_of(best + (int64)row * gridDim.x, gridDim.x));
    int64 total = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (start + i * THREADS + threadIdx.x < columns) total += weight_of(values[i], maximum);
    total = block_sum(total, sums);
    if (threadIdx.x == 0) totals[(int64)row * gridDim.x + blockIdx.x] = total;
}

// picked [rows]: the logit of tokens [rows] in each row of logits [rows, columns] of tokens ``first`` ...; 0 where it has none.
// Grid: THREADS rows each, ``most`` in all.
extern "C" __global__ void __launch_bounds__(THREADS) pick_logits(
        const float* logits, int columns, int first, const int* tokens, const int* rows, int most, float* picked) {
    int row = blockIdx.x * THREADS + threadIdx.x;
    if (row >= min(*rows, most)) return;
    int column = tokens[row] - first;
    picked[row] = column >= 0 && column < columns ? logits[(int64)row * columns + column] : 0.0f;
}
