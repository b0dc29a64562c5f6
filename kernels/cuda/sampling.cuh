// Logits of a row, float32, by segments of the vocabulary: what kernels/sampling.py calls keys, and their weights.
#pragma once
#include "block.cuh"

constexpr int SEGMENT = 4096;
constexpr int64 NOTHING = (int64)(1ull << 63);          // below the key of any logit

// The logit in the upper half, in the order of ``ascending``; below it the token, greatest for the lowest id.
__device__ inline int64 key_of(float logit, int token) {
    return ((int64)ascending(__float_as_int(logit)) << 32) | (int64)(0x7FFFFFFF - token);
}

__device__ inline float logit_of(int64 key) { return __int_as_float(ascending((int)(key >> 32))); }
__device__ inline int token_of(int64 key) { return 0x7FFFFFFF - (int)(key & 0xFFFFFFFF); }

// rint(exp(logit - maximum) * 2**32): 0 to 2**32.
__device__ inline int64 weight_of(float logit, float maximum) { return to_fixed(canonical_exp(logit - maximum)); }

// Of the keys of all segments of a row.
__device__ inline int64 greatest_of(const int64* keys, int segments) {
    int64 greatest = NOTHING;
    for (int i = 0; i < segments; i++) greatest = keys[i] > greatest ? keys[i] : greatest;
    return greatest;
}
