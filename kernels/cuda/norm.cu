// RMS norm of rows, quantised for the products behind it. One block a row.
#include "activations.cuh"
#include "block.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;

// out [rows, columns] = x / sqrt(mean(x**2) + eps) * weight of rows of ``residual`` [.., columns]: row r, or selected[r] of them
// if given; then quantised into x and scales, if given. Grid: rows. ``rows``: on the device; blocks beyond them do nothing.
extern "C" __global__ void __launch_bounds__(THREADS) norm_rows(
        const float* residual, const int* selected, const int* rows, int columns, const float* weight, double eps,
        float* out, int8_t* x, float* scales, int block, int* status) {
    __shared__ int maxima[WARPS];
    __shared__ int64 sums[WARPS];
    int row = blockIdx.x;
    if (row >= *rows) return;
    const float* source = residual + (int64)(selected ? selected[row] : row) * columns;
    float* target = out + (int64)row * columns;
    int largest = 0;
    for (int i = threadIdx.x; i < columns; i += THREADS) {
        int bits = __float_as_int(source[i]) & MAGNITUDE;
        largest = bits > largest ? bits : largest;
    }
    largest = block_max(largest, maxima);
    if (largest >= INFINITY_BITS) {
        if (threadIdx.x == 0) report(status, NOT_FINITE);
        return;
    }
    // A power of two from the exact maximum, so that squares neither overflow nor vanish.
    int exponent = largest & 0x7F800000;
    float unit = __int_as_float(exponent > LOWEST_SCALE_BITS ? exponent : LOWEST_SCALE_BITS), inverse = 1.0f / unit;
    int64 total = 0;
    for (int i = threadIdx.x; i < columns; i += THREADS) {
        float scaled = source[i] * inverse;
        total += to_fixed(scaled * scaled);
    }
    total = block_sum(total, sums);
    double mean = (__ll2double_rn(total) * UNFIXED / columns) * ((double)unit * (double)unit) + eps;
    float factor = __double2float_rn(1.0 / sqrt(mean));
    for (int i = threadIdx.x; i < columns; i += THREADS) target[i] = source[i] * factor * weight[i];
    if (!x) return;
    __syncthreads();
    int groups = groups_of(columns, block), found = OK;
    for (int group = threadIdx.x / 32; group < groups; group += WARPS)
        found |= quantize_group(target, x + (int64)row * groups * GROUP, scales + (int64)row * groups, group, columns, block);
    if (threadIdx.x % 32 == 0) report(status, found);
}

// Quantises rows that are float32 already: values [rows, columns]. Grid: rows.
extern "C" __global__ void __launch_bounds__(THREADS) quantize_rows(
        const float* values, const int* rows, int columns, int8_t* x, float* scales, int block, int* status) {
    int row = blockIdx.x, groups = groups_of(columns, block), found = OK;
    if (row >= *rows) return;
    for (int group = threadIdx.x / 32; group < groups; group += WARPS)
        found |= quantize_group(values + (int64)row * columns, x + (int64)row * groups * GROUP, scales + (int64)row * groups,
                                group, columns, block);
    if (threadIdx.x % 32 == 0) report(status, found);
}
