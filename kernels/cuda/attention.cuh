// Attention over a paged KV cache: what its kernels read, and what they leave for attention_merge.cu. Canonical.
//
// Pools: keys [pages, kv_heads, head_dim, 16], values [pages, kv_heads, 16, width], width: head_dim rounded up to 16; T is
// uint16_t (float16 bits), float, or int8_t with float16 scales [pages, kv_heads, 16] of keys and of values. Attention blocks of
// 256 positions start at absolute multiples of 256. Of each block that a row sees, a query head leaves the maximum of its scores,
// the sum of its weights and its chains of weighted values; masked positions are skipped.
#pragma once
#include "numerics.cuh"

constexpr int BLOCK_PAGES = ATTENTION_BLOCK / PAGE;

// q: [rows, q_stride], a row's query heads first; pages: [sequences, pages_stride]; sequences, positions: [rows]; rows: how many
// there are, on the device; head_starts: [kv_heads + 1], the first query head of each KV head; window: visible positions, 0 for
// all. Rows are taken from first_row on; row first_row + i leaves maxima, sums [i, heads, blocks] and chains
// [i, heads, blocks, width], counted from the first block that the row sees.
#define ATTENTION_ARGUMENTS \
    const float *q, int q_stride, const void *keys, const void *values, const uint16_t *key_scales, \
    const uint16_t *value_scales, const int *pages, int pages_stride, const int *sequences, const int *positions, \
    const int *rows, int first_row, const int *head_starts, int kv_heads, int head_dim, int window, float scale, int heads, \
    int blocks, float *maxima, float *sums, float *chains
#define ATTENTION_OPERATION \
    q, q_stride, keys, values, key_scales, value_scales, pages, pages_stride, sequences, positions, rows, first_row, \
    head_starts, kv_heads, head_dim, window, scale, heads, blocks, maxima, sums, chains

struct Attention {
    const float* q; int q_stride; const void *keys, *values; const uint16_t *key_scales, *value_scales;
    const int* pages; int pages_stride; const int *sequences, *positions, *rows; int first_row; const int* head_starts;
    int kv_heads, head_dim, window; float scale; int heads, blocks; float *maxima, *sums, *chains;
};

__device__ inline int padded(int head_dim) { return (head_dim + PAGE - 1) / PAGE * PAGE; }

// The first position that a query at ``position`` sees, and the block that holds it.
__device__ inline int first_visible(int position, int window) {
    return window > 0 && position >= window ? position + 1 - window : 0;
}
__device__ inline int first_block(int position, int window) { return first_visible(position, window) / ATTENTION_BLOCK; }

// The positions of a block that a query sees, by their number in the block: low, ..., high - 1.
__device__ inline int2 visible(int position, int window, int block) {
    int start = block * ATTENTION_BLOCK;
    return make_int2(max(first_visible(position, window) - start, 0), min(position + 1 - start, ATTENTION_BLOCK));
}

// An int8 in byte ``number`` of ``bytes``, of which the highest bits are flipped, as float32: by its place in a mantissa, since
// conversions from integers are slow.
__device__ inline float byte_value(uint32_t bytes, int number) {
    return __uint_as_float(__byte_perm(bytes, 0x4B000000u, 0x7440 | number)) - 8388736.0f;
}

// Two neighbouring elements of a pool, as float32.
__device__ inline float2 load_pair(const float* at) { return *(const float2*)at; }
__device__ inline float2 load_pair(const uint16_t* at) {
    uint32_t bits = *(const uint32_t*)at;
    return make_float2(half_value((uint16_t)bits), half_value((uint16_t)(bits >> 16)));
}
__device__ inline float2 load_pair(const int8_t* at) {
    uint32_t bytes = *(const uint16_t*)at ^ 0x8080u;
    return make_float2(byte_value(bytes, 0), byte_value(bytes, 1));
}

// exp(s - maximum) of one head's scores of a block in place of them, a warp together; returns their sum, on all lanes, and sets
// ``maximum``. A NaN among the scores becomes a NaN weight, masked ones become zeros. ``value_scales`` [256], or null, multiply
// the weights behind the sum.
__device__ inline float weigh_scores(float* scores, int low, int high, const float* value_scales, float& maximum) {
    constexpr int EACH = ATTENTION_BLOCK / 32;
    float mine[EACH];
    maximum = -__int_as_float(INFINITY_BITS);
    int64 total = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int position = threadIdx.x % 32 + 32 * i;
        mine[i] = scores[position];
        if (position >= low && position < high && mine[i] > maximum) maximum = mine[i];
    }
    maximum = warp_max(maximum);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int position = threadIdx.x % 32 + 32 * i;
        bool masked = position < low || position >= high;
        float weight = masked ? 0.0f : canonical_exp(mine[i] - maximum);
        total += to_fixed(weight);
        scores[position] = masked || !value_scales ? weight : weight * value_scales[position];
    }
    return from_fixed(warp_sum(total));
}
