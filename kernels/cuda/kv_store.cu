// What attention begins with: norm and rotation of queries and keys, and keys and values into their pages (kernels/cpu/kv_store.py
// has the layout of the pools). One warp for each row and head: query heads first, then KV heads.
#include "numerics.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;

struct Step {
    const float *cosines, *sines;               // [positions, head_dim / 2]
    const int *sequences, *positions, *pages;   // [rows], [rows], [sequences, pages_stride]
    int pages_stride, heads, kv_heads, head_dim;
    const float *q_norm, *k_norm;               // [head_dim], or none
    double eps;
};

// RMS norm (Zhang & Sennrich 2019) of one head in place, a warp together. Lanes hold the pairs that are rotated next.
__device__ int norm_head(float* x, int head_dim, const float* weight, double eps) {
    int lane = threadIdx.x % 32, half = head_dim / 2, largest = 0;
    for (int i = lane; i < half; i += 32)
        for (int at = i; at < head_dim; at += half) {
            int bits = __float_as_int(x[at]) & MAGNITUDE;
            largest = bits > largest ? bits : largest;
        }
    largest = warp_max(largest);
    if (largest >= INFINITY_BITS) return NOT_FINITE;
    int exponent = largest & INFINITY_BITS;
    float unit = __int_as_float(exponent > LOWEST_SCALE_BITS ? exponent : LOWEST_SCALE_BITS), inverse = 1.0f / unit;
    int64 total = 0;
    for (int i = lane; i < half; i += 32)
        for (int at = i; at < head_dim; at += half) {
            float scaled = x[at] * inverse;
            total += to_fixed(scaled * scaled);
        }
    total = warp_sum(total);
    double mean = (__ll2double_rn(total) * UNFIXED / head_dim) * ((double)unit * (double)unit) + eps;
    float factor = __double2float_rn(1.0 / sqrt(mean));
    for (int i = lane; i < half; i += 32)
        for (int at = i; at < head_dim; at += half) x[at] = x[at] * factor * weight[at];
    return OK;
}

// RoPE (Su et al. 2021) of one head in place, in half-split pairs.
__device__ void rotate_head(float* x, const Step& step, int position) {
    int half = step.head_dim / 2;
    const float *cosines = step.cosines + (int64)position * half, *sines = step.sines + (int64)position * half;
    for (int i = threadIdx.x % 32; i < half; i += 32) {
        float a = x[i], b = x[i + half], c = cosines[i], s = sines[i];
        x[i] = __fmaf_rn(-b, s, a * c);
        x[i + half] = __fmaf_rn(a, s, b * c);
    }
}

// Stores one head of a key (``apart``: PAGE) or value (1) from ``x``; ``scale`` is where that of an int8 head goes.
__device__ int store_head(const float* x, uint16_t* target, int apart, int head_dim, uint16_t* scale) {
    bool beyond = false;
    for (int d = threadIdx.x % 32; d < head_dim; d += 32) {
        uint16_t bits = half_bits(x[d]);
        beyond |= (bits & 0x7C00) == 0x7C00;
        target[d * apart] = bits;
    }
    return beyond ? OUT_OF_RANGE : OK;
}

__device__ int store_head(const float* x, float* target, int apart, int head_dim, uint16_t* scale) {
    for (int d = threadIdx.x % 32; d < head_dim; d += 32) target[d * apart] = x[d];
    return OK;
}

// The scale is the least float16 that is not below amax / 127, so that nothing is beyond 127.
__device__ int store_head(const float* x, int8_t* target, int apart, int head_dim, uint16_t* scale) {
    int lane = threadIdx.x % 32, largest = 0;
    for (int d = lane; d < head_dim; d += 32) {
        int bits = __float_as_int(x[d]) & MAGNITUDE;
        largest = bits > largest ? bits : largest;
    }
    float exact = __int_as_float(warp_max(largest)) / 127.0f;
    uint16_t nearest = half_bits(exact);
    uint16_t bits = nearest + (half_value(nearest) < exact);
    float known = half_value(bits), inverse = known > 0.0f ? 1.0f / known : 0.0f;
    if (lane == 0) *scale = bits;
    if (bits >= 0x7C00) return OUT_OF_RANGE;
    for (int d = lane; d < head_dim; d += 32) target[d * apart] = (int8_t)__float2int_rn(x[d] * inverse);
    return OK;
}

template <class T>
__device__ void store(float* q, float* k, const float* v, const Step& step, T* keys, T* values, uint16_t* key_scales,
                      uint16_t* value_scales, const int* rows, int* status) {
    int heads = step.heads + step.kv_heads, task = blockIdx.x * WARPS + threadIdx.x / 32;
    int row = task / heads, head = task % heads, head_dim = step.head_dim, found = OK;
    if (row >= *rows) return;
    int position = step.positions[row];
    if (head < step.heads) {
        float* x = q + ((int64)row * step.heads + head) * head_dim;
        if (step.q_norm) found = norm_head(x, head_dim, step.q_norm, step.eps);
        rotate_head(x, step, position);
    } else {
        head -= step.heads;
        int64 at = ((int64)row * step.kv_heads + head) * head_dim;
        if (step.k_norm) found = norm_head(k + at, head_dim, step.k_norm, step.eps);
        rotate_head(k + at, step, position);
        // From here on lanes read what others have written.
        __syncwarp();
        int page = step.pages[(int64)step.sequences[row] * step.pages_stride + position / PAGE], slot = position % PAGE;
        int64 place = (int64)page * step.kv_heads + head;
        int width = (head_dim + 15) / 16 * 16;
        found |= store_head(k + at, keys + place * head_dim * PAGE + slot, PAGE, head_dim, key_scales + place * PAGE + slot);
        found |= store_head(v + at, values + (place * PAGE + slot) * width, 1, head_dim, value_scales + place * PAGE + slot);
    }
    report(status, found);
}

#define KERNEL(name, T) \
    extern "C" __global__ void __launch_bounds__(THREADS) name( \
            float* q, float* k, const float* v, const float* cosines, const float* sines, const int* sequences, \
            const int* positions, const int* pages, int pages_stride, int heads, int kv_heads, int head_dim, \
            const float* q_norm, const float* k_norm, double eps, T* keys, T* values, uint16_t* key_scales, \
            uint16_t* value_scales, const int* rows, int* status) { \
        Step step = {cosines, sines, sequences, positions, pages, pages_stride, heads, kv_heads, head_dim, q_norm, k_norm, eps}; \
        store<T>(q, k, v, step, keys, values, key_scales, value_scales, rows, status); \
    }

KERNEL(store_half, uint16_t)
KERNEL(store_float, float)
KERNEL(store_int8, int8_t)
