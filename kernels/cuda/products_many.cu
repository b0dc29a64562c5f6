// Products y = x W^T of quantised weights and many tokens: bound by the instructions of the float chains, three for each output
// of a group, twelve for each instruction of the tensor cores.
//
// A block multiplies two tiles of 32 rows (with GATED one of gate and one of up) with 128 tokens, a warp one tile with 32. Unit
// by unit the warps of a tile decode its groups once into fragments in shared memory; then each multiplies them with its tokens,
// while the next unit's codes and activations are copied. Chains and sums stay in registers.
#include "products.cuh"

constexpr int THREADS = 256, TOKENS = 128, ROW_WARPS = 2, TOKEN_WARPS = 4, COLUMNS = 4;         // 8 tokens each, of a warp
constexpr int X_BYTES = TOKENS * UNIT * GROUP;
constexpr int FRAGMENT_BYTES = ROW_WARPS * UNIT * 2 * 32 * 16, FACTOR_BYTES = ROW_WARPS * UNIT * TILE * 4;

// Quantised activations: x [rows, groups, 32] and scales [rows, groups], tokens ``first`` ... ``last`` - 1 of this block.
struct Inputs {
    const int8_t* x;
    const float* scales;
    int groups, per_block, per_unit, first, last;
};

template <class Format> struct Multiplier {
    static constexpr int RAW_BYTES = ROW_WARPS * UNIT_BYTES<Format>, SCALES = TOKENS * UNIT / THREADS;
    static constexpr int STEPS = TOKENS * UNIT * 2 / THREADS;
    const Inputs& in;
    const unsigned char* tiles[ROW_WARPS];
    unsigned char *raw, *x, *fragments;
    float *factors, *scales;
    float next_scales[SCALES];

    // In shared memory, one behind the other: tables, raw units of both tiles, x of two units, fragments, factors, scales.
    __device__ inline Multiplier(const Inputs& in, const unsigned char* tile0, const unsigned char* tile1, unsigned char* shared)
            : in(in), tiles{tile0, tile1}, raw(shared), x(raw + RAW_BYTES), fragments(x + 2 * X_BYTES),
              factors((float*)(fragments + FRAGMENT_BYTES)), scales(factors + FACTOR_BYTES / 4) {}

    __device__ inline int groups_in(int unit) const { return min(in.per_unit, in.groups - unit * in.per_unit); }

    // Where group j of a token's unit lies: 32 bytes, moved so that the lanes of a warp read different banks.
    static __device__ inline int cell(int token, int j) { return token * UNIT * GROUP + (j ^ token % 4) * GROUP; }

    // Begins to copy a unit. Rows behind the last one repeat it.
    __device__ inline void fetch(int unit) {
        int first = unit * in.per_unit, count = groups_in(unit), thread = threadIdx.x;
#pragma unroll
        for (int tile = 0; tile < ROW_WARPS; tile++)
#pragma unroll
            for (int i = 0; i < UNIT_BYTES<Format>; i += 16 * THREADS)
                if (int at = i + 16 * thread; at < UNIT_BYTES<Format>)
                    copy_async(raw + tile * UNIT_BYTES<Format> + at, tiles[tile] + (int64)unit * UNIT_BYTES<Format> + at);
        // A thread copies the same half of the same group of every sixteenth token.
        int j = thread / 2 % UNIT, token = thread / (2 * UNIT), half = thread % 2 * 16;
        if (j < count) {
            const int8_t* source = in.x + (first + j) * GROUP + half;
            unsigned char* target = x + unit % 2 * X_BYTES + cell(token, j) + half;
#pragma unroll
            for (int i = 0; i < STEPS; i++)
                copy_async(target + i * (TOKENS / STEPS) * UNIT * GROUP,
                           source + (int64)min(in.first + token + i * (TOKENS / STEPS), in.last - 1) * (in.groups * GROUP));
        }
        commit_copies();
        const float* source = in.scales + (int64)min(in.first + thread % TOKENS, in.last - 1) * in.groups;
#pragma unroll
        for (int i = 0; i < SCALES; i++) next_scales[i] = source[min(first + thread / TOKENS * SCALES + i, in.groups - 1)];
    }

    // Decodes two groups of the tile of this warp, and the factors of its rows in these.
    __device__ inline void decode(uint32_t place, float held) {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile = warp / TOKEN_WARPS, pair = warp % TOKEN_WARPS;
        const unsigned char* unit = raw + tile * UNIT_BYTES<Format>;
        uint32_t words[PAIR_WORDS<Format>];
#pragma unroll
        for (int i = 0; i < PAIR_WORDS<Format>; i++) {
            int number = pair * PAIR_WORDS<Format> + i;
            words[i] = *(const uint32_t*)(unit + 16 * lane + number / 4 * (16 * TILE) + number % 4 * 4);
        }
        typename Format::Factors listed = ((const typename Format::Factors*)(unit + 16 * TILE * Format::VECTORS))[lane];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            uint32_t a[2][4];
            Format::decode(a, words, j, place);
            uint4* target = (uint4*)fragments + ((tile * UNIT + 2 * pair + j) * 2) * 32 + lane;
            target[0] = make_uint4(a[0][0], a[0][1], a[0][2], a[0][3]);
            target[32] = make_uint4(a[1][0], a[1][1], a[1][2], a[1][3]);
            factors[(tile * UNIT + 2 * pair + j) * TILE + lane] = Format::of(listed, 2 * pair + j, held);
        }
#pragma unroll
        for (int i = 0; i < SCALES; i++)
            scales[((int)threadIdx.x / TOKENS * SCALES + i) * TOKENS + threadIdx.x % TOKENS] = next_scales[i];
    }

    // One group: f = fma(dot, factor * scale, f) of 32 rows and 32 tokens.
    __device__ inline void multiply(float (&f)[COLUMNS][2][4], int unit, int j) const {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        int tile = threadIdx.x / 32 / TOKEN_WARPS, token = threadIdx.x / 32 % TOKEN_WARPS * (8 * COLUMNS);
        const uint4* source = (const uint4*)fragments + (tile * UNIT + j) * 2 * 32 + lane;
        uint4 upper = source[0], lower = source[32];
        uint32_t a[2][4] = {{upper.x, upper.y, upper.z, upper.w}, {lower.x, lower.y, lower.z, lower.w}};
        float4 listed = ((const float4*)(factors + (tile * UNIT + j) * TILE))[g];
        float factor[4] = {listed.x, listed.y, listed.z, listed.w};
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
            uint2 pair = *(const uint2*)(x + unit % 2 * X_BYTES + cell(token + 8 * n + g, j) + 8 * t);
            float2 scale = *(const float2*)(scales + j * TOKENS + token + 8 * n + 2 * t);
            uint32_t b[2] = {pair.x, pair.y};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int d[4];
#pragma unroll
                for (int i = 0; i < 4; i++) d[i] = Dot<Format>::start();
                multiply_int8(d, a[half], b);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    f[n][half][i] = __fmaf_rn(Dot<Format>::value(d[i]), factor[2 * half + i / 2] * (i % 2 ? scale.y : scale.x),
                                              f[n][half][i]);
            }
        }
    }
};

// Tokens of this warp and rows of its tile: sums [columns of 8 tokens, half tiles, 4] as ``multiply_int8`` deals them out.
template <class Format> __device__ inline void multiply_tile(
        int64 (&sums)[COLUMNS][2][4], Multiplier<Format>& multiplier, const float* row_scales, uint32_t place, int& found) {
    const Inputs& in = multiplier.in;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, units = (in.groups + in.per_unit - 1) / in.per_unit;
    bool any = in.first + warp % TOKEN_WARPS * (8 * COLUMNS) < in.last, beyond = false;
    float held = Format::held(), row_scale[4];
    // A power of two more than the row scale, for the step to fixed point: it rounds in the same way.
#pragma unroll
    for (int i = 0; i < 4; i++) row_scale[i] = row_scales[lane / 4 + 8 * i] * FIXED;
    multiplier.fetch(0);
    for (int unit = 0; unit < units; unit++) {
        wait_copies<0>();
        __syncthreads();
        multiplier.decode(place, held);
        __syncthreads();
        if (unit + 1 < units) multiplier.fetch(unit + 1);
        int count = any ? multiplier.groups_in(unit) : 0;
        for (int start = 0; start < count; start += in.per_block) {
            float f[COLUMNS][2][4] = {};
            int stop = min(start + in.per_block, count);
#pragma unroll 4
            for (int j = start; j < stop; j++) multiplier.multiply(f, unit, j);
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float value = f[n][half][i] * row_scale[2 * half + i / 2];
                        beyond |= !within(value, BLOCK_LIMIT * FIXED);
                        sums[n][half][i] += __float2ll_rn(value);
                    }
        }
    }
    if (beyond) found |= OUT_OF_RANGE;
}

// silu(gate) * up: the warps of both tiles meet in shared memory, then each has some tokens, a row a lane.
__device__ inline void gate_outputs(const int64 (&sums)[COLUMNS][2][4], const Part& mine, const Gated& gated, int tile, int first,
                                    int last, unsigned char* shared, int& found) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = warp % TOKEN_WARPS * (8 * COLUMNS);
    float(*outputs)[TOKENS][TILE + 1] = (float(*)[TOKENS][TILE + 1])shared;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int row = lane / 4 + i / 4 * 16 + i / 2 % 2 * 8, column = token + 8 * n + lane % 4 * 2 + i % 2;
            if (first + column < last)
                outputs[warp / TOKEN_WARPS][column][row] = output(mine, sums[n][i / 4][i % 4], tile * TILE + row, found);
        }
    __syncthreads();
    for (int column = warp; column < min(TOKENS, last - first); column += THREADS / 32)
        put_gated(gated, first + column, tile, outputs[0][column][lane], outputs[1][column][lane], found);
}

// Grid: 128 tokens each, two tiles each; ``start1`` and ``start2``: the first pairs of tiles of parts 1 and 2.
template <class Format> __device__ inline void multiply_many(
        Part part, Part second, int pair, Inputs in, int mode, const Gated& gated, int* status) {
    DYNAMIC_SHARED(shared);
    int gates = mode == GATED, lane = threadIdx.x % 32, warp = threadIdx.x / 32, which = warp / TOKEN_WARPS, found = OK;
    if (!gates) second = part;
    // A tile that there is not is another one again, whose outputs nobody wants.
    int units = (in.groups + in.per_unit - 1) / in.per_unit, tile0 = gates ? pair : 2 * pair;
    int tile1 = gates ? pair : min(2 * pair + 1, part.tiles() - 1);
    int64 tile_bytes = (int64)units * UNIT_BYTES<Format>;
    if (Format::SHARED) {
        fill_table(part.codebook, 0);
        if (gates) fill_table(second.codebook, 1);
    }
    uint32_t place = Format::SHARED ? shared_address(shared + 4 * lane + gates * which * TABLE_BYTES) : 0;
    unsigned char* behind = shared + Format::SHARED * (1 + gates);
    Multiplier<Format> multiplier(in, part.data + tile0 * tile_bytes, second.data + tile1 * tile_bytes, behind);
    Part mine = which ? second : part;
    int tile = which ? tile1 : tile0;
    int64 sums[COLUMNS][2][4] = {};
    multiply_tile(sums, multiplier, mine.row_scales + tile * TILE, place, found);
    if (gates) {
        gate_outputs(sums, mine, gated, tile, in.first, in.last, behind, found);
    } else if (!which || tile1 > tile0) {
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int row = lane / 4 + i / 4 * 16 + i / 2 % 2 * 8;
                int token = in.first + warp % TOKEN_WARPS * (8 * COLUMNS) + 8 * n + lane % 4 * 2 + i % 2;
                if (token < in.last) put(mine, mode, token, tile * TILE + row, sums[n][i / 4][i % 4], found);
            }
    }
    report(status, found);
}

#define KERNEL(name, Format)                                                                                                     \
    extern "C" __global__ void                                                                                                   \
    __launch_bounds__(THREADS, 1) name(                                                                                          \
            PARTS, int start1, int start2, int mode, GATED_ARGUMENTS, const int* rows, int* status, const int8_t* x,             \
            const float* scales, int groups, int per_block, int per_unit) {                                                      \
        Inputs in{x, scales, groups, per_block, per_unit, (int)blockIdx.x * TOKENS, min(*rows, ((int)blockIdx.x + 1) * TOKENS)}; \
        if (in.first >= in.last) return;                                                                                         \
        Part part = PART_GIVEN(0), second = PART_GIVEN(1);                                                                       \
        int pair = blockIdx.y;                                                                                                   \
        if (pair >= start2)                                                                                                      \
            part = PART_GIVEN(2), pair -= start2;                                                                                \
        else if (pair >= start1)                                                                                                 \
            part = second, pair -= start1;                                                                                       \
        multiply_many<Format>(part, second, pair, in, mode, GATED_GIVEN, status);                                                \
    }

KERNEL(q3_5_for_many, Pairs)
KERNEL(q4_for_many, Nibbles)
KERNEL(q8_for_many, Bytes)
