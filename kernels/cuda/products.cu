// Products y = x W^T of quantised weights and a few tokens: bound by the memory that weights come from.
//
// A warp multiplies 32 rows with up to 8 tokens on integer tensor cores, group by group, on the way from memory to registers; of
// weights nothing but a table passes through shared memory. All warps of the grid share the units of all tiles evenly.
#include "products.cuh"

// How lanes share the dots of 32 rows and up to 8 tokens. With few tokens the columns of ``b`` repeat them, so that all lanes of a
// quad get the same dots, and each keeps the float chains of its own rows: ROWS of them, CHAINS tokens each.
template <int TOKENS> struct Share {
    static constexpr int ROWS = TOKENS == 8 ? 4 : TOKENS == 4 ? 2 : 1, CHAINS = TOKENS == 1 ? 1 : 2;

    // Which quarter of the tile row r of this lane lies in: it is row g + 8 * quarter.
    static __device__ inline int quarter(int r, int t) { return ROWS == 4 ? r : ROWS == 2 ? t / 2 * 2 + r : t; }
    static __device__ inline int token(int chain, int t) { return (2 * t + chain) % TOKENS; }
    static __device__ inline int pick(const int (&d)[2][4], int r, int chain, int t) {
        if (ROWS == 4) return d[r / 2][r % 2 * 2 + chain];
        if (ROWS == 2) return t / 2 ? d[1][2 * r + chain] : d[0][2 * r + chain];
        int upper = t % 2 ? d[0][2 + chain] : d[0][chain], lower = t % 2 ? d[1][2 + chain] : d[1][chain];
        return t / 2 ? lower : upper;
    }
};

// The activations of a product, and its reduction blocks.
struct Inputs {
    const int8_t* x;
    const float* scales;
    int groups, per_unit, ends;                         // bit j of ``ends``: group j of a unit is the last one of a block
    int first, last;                                    // tokens first ... last - 1
};

// Adds the block values of units ``unit`` ... ``stop`` - 1 of a tile to ``sums``.
template <class Format, int TOKENS> __device__ inline void add_units(
        int64 (&sums)[Share<TOKENS>::ROWS][Share<TOKENS>::CHAINS], const unsigned char* tile, const float* row_scales,
        const Inputs& in, int unit, int stop, const unsigned char* table, uint32_t place, int& found) {
    typedef Share<TOKENS> S;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint2* x = (const uint2*)(in.x + (int64)min(in.first + g % TOKENS, in.last - 1) * in.groups * GROUP) + t;
    const float* scales[S::CHAINS];
#pragma unroll
    for (int c = 0; c < S::CHAINS; c++) scales[c] = in.scales + (int64)min(in.first + S::token(c, t), in.last - 1) * in.groups;
    float f[S::ROWS][S::CHAINS] = {}, row_scale[S::ROWS];
#pragma unroll
    for (int r = 0; r < S::ROWS; r++) row_scale[r] = row_scales[g + 8 * S::quarter(r, t)];
    for (; unit < stop; unit++) {
        const unsigned char* codes = tile + (int64)unit * UNIT_BYTES<Format>;
        const typename Format::Factors* listed = (const typename Format::Factors*)(codes + 16 * TILE * Format::VECTORS);
        uint32_t words[4 * Format::VECTORS];
        load_codes<Format>(words, codes, lane);
        typename Format::Factors factors[S::ROWS];
#pragma unroll
        for (int r = 0; r < S::ROWS; r++) factors[r] = listed[4 * g + S::quarter(r, t)];
        int first = unit * in.per_unit, count = min(in.per_unit, in.groups - first);
#pragma unroll
        for (int j = 0; j < UNIT; j++) {
            if (j >= count) break;
            uint2 pair = x[(first + j) * 4];
            uint32_t a[2][4], b[2] = {pair.x, pair.y};
            Format::decode(a, words, j, table, place);
            int d[2][4];
#pragma unroll
            for (int i = 0; i < 8; i++) d[i / 4][i % 4] = Dot<Format>::start();
            multiply_int8(d[0], a[0], b);
            multiply_int8(d[1], a[1], b);
#pragma unroll
            for (int r = 0; r < S::ROWS; r++) {
                float factor = Format::of(factors[r], j, table, place);
#pragma unroll
                for (int c = 0; c < S::CHAINS; c++)
                    f[r][c] = __fmaf_rn(Dot<Format>::value(S::pick(d, r, c, t)), factor * scales[c][first + j], f[r][c]);
            }
            // The end of a reduction block.
            if (!(in.ends >> j & 1) && j + 1 < count) continue;
#pragma unroll
            for (int r = 0; r < S::ROWS; r++)
#pragma unroll
                for (int c = 0; c < S::CHAINS; c++) {
                    float value = f[r][c] * row_scale[r];
                    if (!within(value, BLOCK_LIMIT)) found |= OUT_OF_RANGE;
                    sums[r][c] += to_fixed(value);
                    f[r][c] = 0;
                }
        }
    }
}

// All tiles of a part, or of gate and up, by ``blocks`` blocks of which this is number ``block``.
template <class Format, int TOKENS> __device__ inline void multiply_few(
        Part part, Part second, int block, int blocks, int64 tile0, Inputs in, int mode, Gated gated, Meeting meeting, int* status) {
    DYNAMIC_SHARED(table);
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, found = OK;
    if (Format::SHARED) {
        fill_table(table, part.codebook, 0);
        if (mode == GATED) fill_table(table, second.codebook, 1);
        __syncthreads();
    }
    typedef Share<TOKENS> S;
    int units = (in.groups + in.per_unit - 1) / in.per_unit, all = mode == GATED ? 2 * units : units;
    int64 items = (int64)part.tiles() * all, warps = (int64)blocks * (blockDim.x / 32);
    int64 warp = (int64)block * (blockDim.x / 32) + threadIdx.x / 32;
    int64 item = items * warp / warps, end = items * (warp + 1) / warps;
    while (item < end) {
        int tile = (int)(item / all), unit = (int)(item % all), which = unit >= units;
        unit -= which * units;
        int stop = (int)min((int64)units, unit + end - item);
        const Part& mine = which ? second : part;
        int64 sums[S::ROWS][S::CHAINS] = {};
        add_units<Format, TOKENS>(sums, mine.data + (int64)tile * units * UNIT_BYTES<Format>, mine.row_scales + tile * TILE, in,
                                  unit, stop, table, 4 * lane + 128 * which, found);
        int64* shared = meeting.sums + (tile0 + (mode == GATED ? 2 * tile : tile)) * FEW * TILE;
#pragma unroll
        for (int r = 0; r < S::ROWS; r++)
#pragma unroll
            for (int c = 0; c < S::CHAINS; c++) {
                int token = S::token(c, t);
                // Of lanes that keep the same chain none is left out: with few tokens each has rows of its own.
                if (in.first + token < in.last)
                    add_fixed(shared + (which * FEW + token) * TILE + g + 8 * S::quarter(r, t), sums[r][c]);
            }
        if (arrive(meeting.arrived + tile0 + tile, stop - unit, all))
            for (int token = 0; token < in.last - in.first; token++) {
                int64 sum = take(shared + token * TILE + lane);
                if (mode == GATED) {
                    int64 up = take(shared + (FEW + token) * TILE + lane);
                    put_gated(part, second, gated, in.first + token, tile, sum, up, found);
                } else {
                    put(part, mode, in.first + token, tile * TILE + lane, sum, found);
                }
            }
        item += stop - unit;
    }
    report(status, found);
}

// Grid: blocks, of which ``start1`` and ``start2`` are the first of parts 1 and 2; with GATED all blocks share parts 0 and 1. Tokens
// from ``first`` on, as many as there are, up to TOKENS.
#define KERNEL(name, Format, TOKENS, THREADS, BLOCKS)                                                                            \
    extern "C" __global__ void                                                                                                   \
    __launch_bounds__(THREADS, BLOCKS) name(                                                                                     \
            PART(0), PART(1), PART(2), int start1, int start2, const int8_t* x, const float* scales, int groups, int per_unit,   \
            int ends, const int* rows, int first, int mode, float* gated, int8_t* gated_x, float* gated_scales,                  \
            int gated_columns, int gated_block, int64* sums, int* arrived, int* status) {                                        \
        Inputs in{x, scales, groups, per_unit, ends, first, min(*rows, first + TOKENS)};                                         \
        if (in.first >= in.last) return;                                                                                         \
        Gated target{gated, gated_x, gated_scales, gated_columns, gated_block};                                                  \
        Part part = PART_OF(0), second = PART_OF(1), third = PART_OF(2);                                                         \
        int block = blockIdx.x, blocks = start1, tile0 = 0;                                                                      \
        if (block >= start2) {                                                                                                   \
            tile0 = part.tiles() + second.tiles(), part = third, block -= start2, blocks = gridDim.x - start2;                   \
        } else if (block >= start1) {                                                                                            \
            tile0 = part.tiles(), part = second, block -= start1, blocks = start2 - start1;                                      \
        }                                                                                                                        \
        multiply_few<Format, TOKENS>(part, second, block, blocks, tile0, in, mode, target, Meeting{sums, arrived}, status);      \
    }

KERNEL(q3_5_for_1, Pairs, 1, 384, 2)
KERNEL(q3_5_for_2, Pairs, 2, 384, 2)
KERNEL(q3_5_for_4, Pairs, 4, 512, 1)
KERNEL(q3_5_for_8, Pairs, 8, 512, 1)
KERNEL(q4_for_1, Nibbles, 1, 384, 2)
KERNEL(q4_for_2, Nibbles, 2, 384, 2)
KERNEL(q4_for_4, Nibbles, 4, 512, 1)
KERNEL(q4_for_8, Nibbles, 8, 512, 1)
KERNEL(q8_for_1, Bytes, 1, 512, 1)
KERNEL(q8_for_2, Bytes, 2, 512, 1)
KERNEL(q8_for_4, Bytes, 4, 512, 1)
KERNEL(q8_for_8, Bytes, 8, 512, 1)
