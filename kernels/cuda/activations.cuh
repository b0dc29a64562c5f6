// Activations as products read them: float32 values [rows, columns], and quantised int8 x [rows, groups, 32] with float32
// scales [rows, groups]. Groups start afresh in each reduction block of ``block`` k; behind its last k are zeros.
#pragma once
#include "numerics.cuh"

__device__ inline int groups_of(int columns, int block) {
    int per_block = (block + GROUP - 1) / GROUP;
    return columns / block * per_block + (columns % block + GROUP - 1) / GROUP;
}

// Quantises one group of a row, a warp together: q = rint(x * (127 / amax)), scale = amax / 127; a group whose maximum is below
// 2**-100 is zero. Returns a status, the same on all lanes.
__device__ inline int quantize_group(const float* values, int8_t* x, float* scales, int group, int columns, int block) {
    int lane = threadIdx.x % 32, per_block = (block + GROUP - 1) / GROUP;
    int start = group / per_block * block, first = start + group % per_block * GROUP;
    int stop = min(min(first + GROUP, start + block), columns);
    float value = first + lane < stop ? values[first + lane] : 0.0f;
    int largest = warp_max(__float_as_int(value) & MAGNITUDE);
    float amax = __int_as_float(largest);
    bool small = largest < LOWEST_SCALE_BITS;
    float inverse = small ? 0.0f : 127.0f / amax;
    if (largest < INFINITY_BITS) x[group * GROUP + lane] = (int8_t)__float2int_rn(value * inverse);
    if (lane == 0) scales[group] = small ? 0.0f : amax / 127.0f;
    return largest < INFINITY_BITS ? OK : NOT_FINITE;
}
