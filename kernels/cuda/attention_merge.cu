// Joins the attention blocks that attention_decode.cu and attention_prefill.cu have left, exactly: weighted by exp(m_b - max m),
// they are added as 64-bit fixed point. Then the head's output is quantised for the product behind it.
#include "activations.cuh"
#include "attention.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, COLUMNS = 128;

// Grid: query heads, rows. target [rows, heads * head_dim] from row first_row on; x and scales, if given: its quantised form, of
// which a head is one reduction block. Shared memory: a float32 for each block. ``status`` takes OUT_OF_RANGE and NOT_FINITE.
extern "C" __global__ void __launch_bounds__(THREADS) merge_blocks(
        const float* maxima, const float* sums, const float* chains, const int* positions, const int* rows, int first_row,
        int head_dim, int window, int blocks, float* target, int8_t* x, float* scales, int* status) {
    DYNAMIC_SHARED(shared);
    __shared__ int64 partial[WARPS][COLUMNS];
    float* weights = (float*)shared;
    int row = first_row + blockIdx.y, head = blockIdx.x, heads = gridDim.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= *rows) return;
    int position = positions[row], width = padded(head_dim);
    int count = position / ATTENTION_BLOCK - first_block(position, window) + 1;
    int64 place = ((int64)blockIdx.y * heads + head) * blocks, total = 0;
    // Every warp finds the same weights: that is less than meeting twice.
    float maximum = -__int_as_float(INFINITY_BITS);
    for (int b = lane; b < count; b += 32) maximum = maxima[place + b] > maximum ? maxima[place + b] : maximum;
    maximum = warp_max(maximum);
    for (int b = lane; b < count; b += 32) {
        float weight = canonical_exp(maxima[place + b] - maximum);
        total += to_fixed(sums[place + b] * weight);
        if (warp == 0) weights[b] = weight;
    }
    float divisor = from_fixed(warp_sum(total)), *out = target + ((int64)row * heads + head) * head_dim;
    __syncthreads();
    int found = OK;
    for (int start = 0; start < head_dim; start += COLUMNS) {
        // A warp takes every eighth block, a lane four neighbouring columns: many blocks are on their way at once.
        int column = start + 4 * lane;
        int64 sum[4] = {0, 0, 0, 0};
        if (column < head_dim)
#pragma unroll 4
            for (int b = warp; b < count; b += WARPS) {
                float4 chain = *(const float4*)(chains + (place + b) * width + column);
                float each[4] = {chain.x, chain.y, chain.z, chain.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float value = each[i] * weights[b];
                    if (column + i < head_dim && !within(value, BLOCK_LIMIT)) found = OUT_OF_RANGE;
                    sum[i] += to_fixed(value);
                }
            }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; i++) partial[warp][4 * lane + i] = sum[i];
        __syncthreads();
        column = start + threadIdx.x;
        if (threadIdx.x < COLUMNS && column < head_dim) {
            int64 whole = 0;
            for (int w = 0; w < WARPS; w++) whole += partial[w][threadIdx.x];
            out[column] = from_fixed(whole) / divisor;
        }
    }
    if (__syncthreads_or(found)) {
        if (threadIdx.x == 0) report(status, OUT_OF_RANGE);
        return;
    }
    if (!x) return;
    int per_head = (head_dim + GROUP - 1) / GROUP, groups = heads * per_head;
    for (int group = warp; group < per_head; group += WARPS)
        found |= quantize_group(out - head * head_dim, x + (int64)row * groups * GROUP, scales + (int64)row * groups,
                                head * per_head + group, heads * head_dim, head_dim);
    if (lane == 0) report(status, found);
}
