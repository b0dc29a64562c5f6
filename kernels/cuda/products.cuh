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

// Arguments of kernels, and what they are made into.
#define PART(n) const unsigned char *data##n, const uint16_t *codebook##n, const float *scales##n, const float *bias##n, \
                void *out##n, int outputs##n
#define PART_GIVEN(n) Part{data##n, codebook##n, scales##n, bias##n, out##n, outputs##n}
#define PARTS PART(0), PART(1), PART(2)
#define PARTS_GIVEN PART_GIVEN(0), PART_GIVEN(1), PART_GIVEN(2)
#define GATED_ARGUMENTS float *gated, int8_t *gated_x, float *gated_scales, int gated_columns, int gated_block
#define GATED_GIVEN Gated{gated, gated_x, gated_scales, gated_columns, gated_block}

// What takes silu(gate) * up: float32 values [rows, columns], and their quantised form if x is given. A tile is a group.
struct Gated {
    float* values;
    int8_t* x;
    float* scales;
    int columns, block;
};

// y = float32(sum * 2**-32), which is to be within the limit, + bias of this column.
__device__ inline float output(int64 sum, const float* bias, int column, int& found) {
    float y = from_fixed(sum);
    if (!within(y, OUTPUT_LIMIT)) found |= OUT_OF_RANGE;
    return bias ? y + bias[column] : y;
}

__device__ inline float output(const Part& part, int64 sum, int column, int& found) {
    return column < part.outputs ? output(sum, part.bias, column, found) : 0.0f;
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
__device__ inline void put_gated(const Gated& gated, int token, int tile, float gate, float up, int& found) {
    int column = tile * TILE + threadIdx.x % 32;
    float* values = gated.values + (int64)token * gated.columns;
    if (column < gated.columns) values[column] = silu_multiply(gate, up);
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

// What this block does: it is number ``block`` of ``blocks`` that share a part, whose first tile is ``tile0`` of all. Part 1
// begins at block ``start1`` and part 2 at ``start2``; with GATED all blocks share parts 0 and 1, gate and up.
struct Division {
    Part part, second;
    int block, blocks, tile0;

    __device__ inline Division(const Part& part0, const Part& part1, const Part& part2, int start1, int start2, int mode)
            : part(part0), second(part1), block(blockIdx.x), blocks(start1), tile0(0) {
        if (block >= start2) {
            tile0 = part.tiles() + second.tiles(), part = part2, block -= start2, blocks = gridDim.x - start2;
        } else if (block >= start1) {
            tile0 = part.tiles(), part = second, block -= start1, blocks = start2 - start1;
        }
    }
};

// Where a unit lies: its tile, whether it is up's, and its number.
struct Place {
    int tile, second, unit;

    __device__ inline Place(int item, int units, int gates) {
        int all = units << gates, rest = item % all;
        tile = item / all, second = rest >= units, unit = rest - second * units;
    }
    __device__ inline Place next(int units, int gates) const {
        Place other = *this;
        if (++other.unit == units) {
            other.unit = 0, other.second ^= gates;
            if (!other.second) other.tile++;
        }
        return other;
    }
};

// Multiplies all tiles of a part, or of gate and up, with tokens first ... last - 1, FEW at most. Warps take equal numbers of
// units, in the order of tiles, so that most of what a warp reads is in a row; with GATED those of a tile of gate come before
// those of up.
template <class Multiplier> __device__ inline void share_units(
        const Division& division, Multiplier& multiplier, int units, int first, int last, int mode, const Gated& gated,
        const Meeting& meeting, int* status) {
    int lane = threadIdx.x % 32, found = OK, gates = mode == GATED, all = units << gates;
    int items = division.part.tiles() * all, warps = division.blocks * (blockDim.x / 32);
    int warp = division.block * (blockDim.x / 32) + threadIdx.x / 32, each = items / warps, rest = items % warps;
    int item = each * warp + min(warp, rest), end = item + each + (warp < rest);
    Place place(item, units, gates);
    if (item < end) multiplier.fetch(place.second ? division.second : division.part, place);
    multiplier.prepare(division, gates);
    while (item < end) {
        Place start = place;
        int64 sums[Multiplier::ROWS][Multiplier::CHAINS] = {};
        multiplier.begin(place.second ? division.second : division.part, place);
        do {
            place = place.next(units, gates);
            multiplier.take();
            if (++item < end) multiplier.fetch(place.second ? division.second : division.part, place);
            multiplier.add(sums, found);
        } while (item < end && place.unit);
        int64* joined = meeting.sums + (int64)(division.tile0 + (start.tile << gates)) * FEW * TILE;
#pragma unroll
        for (int r = 0; r < Multiplier::ROWS; r++)
#pragma unroll
            for (int c = 0; c < Multiplier::CHAINS; c++) {
                int token = Multiplier::token(c, lane);
                if (first + token < last)
                    add_fixed(joined + (start.second * FEW + token) * TILE + Multiplier::row(r, lane), sums[r][c]);
            }
        if (arrive(meeting.arrived + division.tile0 + start.tile, (place.unit ? place.unit : units) - start.unit, all))
            for (int token = 0; token < last - first; token++) {
                int column = start.tile * TILE + lane;
                int64 sum = take(joined + token * TILE + lane);
                if (gates) {
                    int64 up = take(joined + (FEW + token) * TILE + lane);
                    put_gated(gated, first + token, start.tile, output(division.part, sum, column, found),
                              output(division.second, up, column, found), found);
                } else {
                    put(division.part, mode, first + token, column, sum, found);
                }
            }
    }
    report(status, found);
}
