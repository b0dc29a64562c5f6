// The canonical arithmetic of kernels/numerics.py, operation by operation. Compiled without contraction (--fmad=false).
#pragma once
#include "ptx.cuh"

constexpr int GROUP = 32, ATTENTION_BLOCK = 256, PAGE = 16;
constexpr float FIXED = 4294967296.0f, BLOCK_LIMIT = 524288.0f, OUTPUT_LIMIT = 1048576.0f;
constexpr double UNFIXED = 1.0 / 4294967296.0;
constexpr int OK = 0, NOT_FINITE = 1, OUT_OF_RANGE = 2;
constexpr int MAGNITUDE = 0x7FFFFFFF, INFINITY_BITS = 0x7F800000;
constexpr int LOWEST_SCALE_BITS = 27 << 23;             // 2**-100

typedef long long int64;
typedef unsigned long long uint64;

// int64 multiples of 2**-32 of a block value, and the nearest float32 of a sum of them.
__device__ inline int64 to_fixed(float value) { return __float2ll_rn(value * FIXED); }
__device__ inline float from_fixed(int64 sum) { return __double2float_rn(__ll2double_rn(sum) * UNFIXED); }

__device__ inline bool within(float value, float limit) { return fabsf(value) < limit; }        // false for NaN

__device__ inline void add_fixed(int64* sum, int64 value) { atomicAdd((uint64*)sum, (uint64)value); }

// A kernel's status is a bit set, OR of what any thread finds.
__device__ inline void report(int* status, int found) {
    if (found) atomicOr(status, found);
}

// float32 e**x within 1 ulp: 0 below -87, e**88 above 88, NaN for NaN.
__device__ inline float canonical_exp(float x) {
    float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(clamped * 1.4426950408889634f);
    float r = __fmaf_rn(-n, 0.693145751953125f, clamped);
    r = __fmaf_rn(-n, 1.4286068203094173e-06f, r);
    float p = __fmaf_rn((float)(1.0 / 5040), r, (float)(1.0 / 720));
    p = __fmaf_rn(p, r, (float)(1.0 / 120));
    p = __fmaf_rn(p, r, (float)(1.0 / 24));
    p = __fmaf_rn(p, r, (float)(1.0 / 6));
    p = __fmaf_rn(p, r, 0.5f);
    p = __fmaf_rn(p, r, 1.0f);
    p = __fmaf_rn(p, r, 1.0f);
    float scale = __int_as_float(((int)n + 127) << 23);
    return x < -87.0f ? 0.0f : p * scale;
}

__device__ inline float sigmoid(float x) {
    float e = canonical_exp(-fabsf(x));
    return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

__device__ inline float silu_multiply(float gate, float up) { return gate * sigmoid(gate) * up; }

// float64 natural logarithm of a positive normal number, by the series of artanh.
__device__ inline double canonical_log(double x) {
    int64 bits = __double_as_longlong(x), exponent = (bits >> 52) - 1023;
    double mantissa = __longlong_as_double((bits & ((1ll << 52) - 1)) | (1023ll << 52));
    if (mantissa > 1.4142135623730951) mantissa *= 0.5, exponent++;
    double s = (mantissa - 1.0) / (mantissa + 1.0), square = s * s, p = 0.0;
#pragma unroll
    for (int n = 23; n > 0; n -= 2) p = p * square + 1.0 / n;
    return __ll2double_rn(exponent) * 0.6931471805599453 + 2.0 * s * p;
}

// log softmax of one logit; ``total`` is the sum of rint(exp(l - maximum) * 2**32) over the vocabulary.
__device__ inline float log_probability(float logit, float maximum, int64 total) {
    double value = ((double)logit - (double)maximum) - canonical_log(__ll2double_rn(total) * UNFIXED);
    return __double2float_rn(value) + 0.0f;             // never -0
}

// Integers in the order of the float32 with these bits; the map is its own inverse.
__device__ inline int ascending(int bits) { return bits < 0 ? (int)(0x80000000u - (unsigned)bits) : bits; }

// Sums and maxima over a warp, the same on every lane. Of integers: any order gives the same.
template <class T> __device__ inline T warp_max(T value) {
    for (int step = 16; step; step /= 2) {
        T other = __shfl_xor_sync(~0u, value, step);
        value = other > value ? other : value;
    }
    return value;
}

template <class T> __device__ inline T warp_sum(T value) {
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}
