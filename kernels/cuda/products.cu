// Products y = x W^T of quantised weights and a few tokens: bound by the memory that weights come from.
//
// A warp multiplies 32 rows with up to 8 tokens on integer tensor cores, group by group, straight from registers; only a table
// to look up codes lies in shared memory. All warps of the grid share the units of all tiles evenly.
#include "products.cuh"

// One block of a multiprocessor: 128 registers of a thread, or 168.
constexpr int threads_for(int tokens) { return tokens < 8 ? 512 : 384; }

// How lanes share the dots of 32 rows and up to 8 tokens. With few tokens the columns of ``b`` repeat them, so that all lanes of
// a quad get the same dots, and each keeps the float chains of its own rows: ROWS of them, CHAINS tokens each.
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

// How a warp of ``share_units`` multiplies. A unit is fetched, while another one is multiplied if the format goes AHEAD, then
// taken and added.
template <class Format, int TOKENS> struct Multiplier {
    typedef Share<TOKENS> S;
    typedef typename Format::Factors Factors;
    static constexpr int ROWS = S::ROWS, CHAINS = S::CHAINS;
    const Inputs& in;
    int units;
    const unsigned char *fetched_from, *taken_from;
    uint32_t words[4 * Format::VECTORS], fetched[Format::AHEAD ? 4 * Format::VECTORS : 1];
    Factors factors[ROWS], fetched_factors[ROWS];
    int unit, fetched_unit;
    uint32_t place;
    const uint2* x;                                     // of the token that is this lane's column of ``b``
    const float* scales[CHAINS];
    float row_scale[ROWS], held;

    __device__ inline Multiplier(const Inputs& in, int units) : in(in), units(units), held(Format::held()) {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        x = (const uint2*)(in.x + (int64)min(in.first + g % TOKENS, in.last - 1) * in.groups * GROUP) + t;
#pragma unroll
        for (int c = 0; c < CHAINS; c++)
            scales[c] = in.scales + (int64)min(in.first + S::token(c, t), in.last - 1) * in.groups;
    }
    static __device__ inline int row(int r, int lane) { return lane / 4 + 8 * S::quarter(r, lane % 4); }
    static __device__ inline int token(int chain, int lane) { return S::token(chain, lane % 4); }

    __device__ inline void prepare(const Division& division, int gates) {
        if (!Format::SHARED) return;
        fill_table(division.part.codebook, 0);
        if (gates) fill_table(division.second.codebook, 1);
        __syncthreads();
    }
    __device__ inline void begin(const Part& part, const Place& where) {
        int lane = threadIdx.x % 32;
        if (Format::SHARED) {
            DYNAMIC_SHARED(table);
            place = shared_address(table + 4 * lane + TABLE_BYTES * where.second);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) row_scale[r] = part.row_scales[where.tile * TILE + row(r, lane)];
    }
    __device__ inline void fetch(const Part& part, const Place& where) {
        fetched_from = part.data + (int64)(where.tile * units + where.unit) * UNIT_BYTES<Format>, fetched_unit = where.unit;
        if (Format::AHEAD) load(fetched, fetched_factors, fetched_from);
    }
    __device__ inline void take() {
        unit = fetched_unit, taken_from = fetched_from;
        if (!Format::AHEAD) return;
#pragma unroll
        for (int i = 0; i < 4 * Format::VECTORS; i++) words[i] = fetched[Format::AHEAD ? i : 0];
#pragma unroll
        for (int r = 0; r < ROWS; r++) factors[r] = fetched_factors[r];
    }
    template <int N>
    static __device__ inline void load(uint32_t (&words)[N], Factors (&factors)[ROWS], const unsigned char* from) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            uint4 vector = load_once(from + 16 * (TILE * i + lane));
            words[4 * i] = vector.x, words[4 * i + 1] = vector.y, words[4 * i + 2] = vector.z, words[4 * i + 3] = vector.w;
        }
        const Factors* listed = (const Factors*)(from + 16 * TILE * Format::VECTORS);
#pragma unroll
        for (int r = 0; r < ROWS; r++) factors[r] = listed[lane / 4 * 4 + S::quarter(r, lane % 4)];
    }

    __device__ inline void add(int64 (&sums)[ROWS][CHAINS], int& found) {
        if (!Format::AHEAD) load(words, factors, taken_from);
        if (in.ends == 1 << (UNIT - 1) && (unit + 1) * UNIT <= in.groups)
            multiply<true>(sums, found);
        else
            multiply<false>(sums, found);
    }

    // WHOLE: the unit is one reduction block of 8 groups. Others are filled up with groups of zeros, which multiply the last
    // activations there are and change no chain.
    template <bool WHOLE> __device__ inline void multiply(int64 (&sums)[ROWS][CHAINS], int& found) {
        int first = unit * in.per_unit, t = threadIdx.x % 4;
        float f[ROWS][CHAINS] = {};
#pragma unroll
        for (int j = 0; j < UNIT; j++) {
            int group = WHOLE ? first + j : min(first + j, in.groups - 1);
            uint2 pair = x[group * 4];
            uint32_t a[2][4], b[2] = {pair.x, pair.y};
            Format::decode(a, words + j / 2 * PAIR_WORDS<Format>, j % 2, place);
            int d[2][4];
#pragma unroll
            for (int i = 0; i < 8; i++) d[i / 4][i % 4] = Dot<Format>::start();
            multiply_int8(d[0], a[0], b);
            multiply_int8(d[1], a[1], b);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float factor = Format::of(factors[r], j, held);
#pragma unroll
                for (int c = 0; c < CHAINS; c++)
                    f[r][c] = __fmaf_rn(Dot<Format>::value(S::pick(d, r, c, t)), factor * scales[c][group], f[r][c]);
            }
            if (WHOLE ? j < UNIT - 1 : !(in.ends >> j & 1)) continue;
            // The end of a reduction block.
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int c = 0; c < CHAINS; c++) {
                    float value = f[r][c] * row_scale[r];
                    if (!within(value, BLOCK_LIMIT)) found |= OUT_OF_RANGE;
                    sums[r][c] += to_fixed(value);
                    f[r][c] = 0;
                }
        }
    }
};

// Grid: see ``Division``. Tokens from ``first`` on, as many as there are, up to TOKENS.
#define KERNEL(name, Format, TOKENS)                                                                                             \
    extern "C" __global__ void                                                                                                   \
    __launch_bounds__(threads_for(TOKENS), 1) name(                                                                              \
            PARTS, int start1, int start2, int mode, GATED_ARGUMENTS, int64* sums, int* arrived, const int* rows, int first,     \
            int* status, const int8_t* x, const float* scales, int groups, int per_unit, int ends) {                             \
        Inputs in{x, scales, groups, per_unit, ends, first, min(*rows, first + TOKENS)};                                         \
        if (in.first >= in.last) return;                                                                                         \
        Division division(PARTS_GIVEN, start1, start2, mode);                                                                    \
        Multiplier<Format, TOKENS> multiplier(in, (groups + per_unit - 1) / per_unit);                                           \
        share_units(division, multiplier, multiplier.units, in.first, in.last, mode, GATED_GIVEN,                                \
                    Meeting{sums, arrived}, status);                                                                             \
    }

KERNEL(q3_5_for_1, Pairs, 1)
KERNEL(q3_5_for_2, Pairs, 2)
KERNEL(q3_5_for_4, Pairs, 4)
KERNEL(q3_5_for_8, Pairs, 8)
KERNEL(q4_for_1, Nibbles, 1)
KERNEL(q4_for_2, Nibbles, 2)
KERNEL(q4_for_4, Nibbles, 4)
KERNEL(q4_for_8, Nibbles, 8)
KERNEL(q8_for_1, Bytes, 1)
KERNEL(q8_for_2, Bytes, 2)
KERNEL(q8_for_4, Bytes, 4)
KERNEL(q8_for_8, Bytes, 8)
