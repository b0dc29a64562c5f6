// What all products share: their parts, how sums of blocks are joined, and what becomes of the outputs.
#pragma once
#include "activations.cuh"
#include "weights.cuh"

enum Mode { FLOAT, ADD, SUMS, GATED };
constexpr int FEW = 8;                  // tokens of products whose blocks share a tile

// One matrix: weights, the bias of its outputs (null: none), and where they go, [rows, outputs].
struct Part {
    const unsigned char* data;
    const uint16_t* codebook;
    const float *row_scales, *bias;
    void* out;
    int outputs;

    __device__ inline int tiles() const { return (outputs + TILE - 1) / TILE; }
};

#define PART(n) const unsigned char *data##n, const uint16_t *codebook##n, const float *scales##n, const float *bias##n, \
                void *out##n, int outputs##n
#define PART_OF(n) Part{data##n, codebook##n, scales##n, bias##n, out##n, outputs##n}

// What takes silu(gate) * up: float32 values [rows, columns], and their quantised form if x is given. A tile is a group.
struct Gated {
    float* values;
    int8_t* x;
    float* scales;
    int columns, block;
};

// y = float32(sum * 2**-32), which is to be within the limit, + bias.
__device__ inline float output(int64 sum, const float* bias, int at, int& found) {
    float y = from_fixed(sum);
    if (!within(y, OUTPUT_LIMIT)) found |= OUT_OF_RANGE;
    return bias ? y + bias[at] : y;
}

// Puts an output of a token where it belongs. Not for GATED.
__device__ inline void put(const Part& part, int mode, int token, int column, int64 sum, int& found) {
    if (column >= part.outputs) return;
    int64 at = (int64)token * part.outputs + column;
    if (mode == SUMS) {
        ((int64*)part.out)[at] = sum;
        return;
    }
    float y = output(sum, part.bias, column, found), *out = (float*)part.out + at;
    *out = mode == ADD ? *out + y : y;
}

// silu(gate) * up of 32 columns of a token, lane by lane, and their quantised form.
__device__ inline void put_gated(const Part& gate, const Part& up, const Gated& gated, int token, int tile, int64 gate_sum,
                                 int64 up_sum, int& found) {
    int lane = threadIdx.x % 32, column = tile * TILE + lane;
    float* values = gated.values + (int64)token * gated.columns;
    if (column < gate.outputs) {
        float g = output(gate_sum, gate.bias, column, found), u = output(up_sum, up.bias, column, found);
        values[column] = silu_multiply(g, u);
    }
    if (!gated.x) return;
    // Each lane reads what it has written.
    int groups = groups_of(gated.columns, gated.block);
    found |= quantize_group(values, gated.x + (int64)token * groups * GROUP, gated.scales + (int64)token * groups, tile,
                            gated.columns, gated.block);
}

// A sum that others have added to, which is left zero.
__device__ inline int64 take(int64* sum) { return (int64)atomicExch((uint64*)sum, 0ull); }

// Few tokens: warps of many blocks share the units of a tile and add to ``sums`` [tile, FEW, 32]; who adds the last of them, as
// ``arrived`` [tile] tells, puts the outputs in their places. Both are zero before and after a product.
struct Meeting {
    int64* sums;
    int* arrived;
};

// The whole warp: announces ``units`` more units of a tile; whether these were the last.
__device__ inline bool arrive(int* arrived, int units, int all) {
    __threadfence();
    __syncwarp();
    int before = 0;
    if (threadIdx.x % 32 == 0) before = atomicAdd(arrived, units);
    bool last = __shfl_sync(~0u, before, 0) + units == all;
    if (last) {
        if (threadIdx.x % 32 == 0) *arrived = 0;
        __threadfence();
    }
    return last;
}
