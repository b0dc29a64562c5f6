// Quantised weights as products read them: what ``multiply_int8`` takes as ``a``, so that a warp decodes codes into registers.
//
// A tile is 32 rows, in it units of whole reduction blocks, together 8 groups of 32 k at most (gaps hold zeros). Of a unit every
// lane has some vectors of 16 bytes with codes, stored vector by vector so that a load of a warp is 512 bytes in a row, and one
// vector or word with the factors of a row. Lane 4 g + t holds codes of rows g, g + 8, g + 16 and g + 24: of each group k 8 t to
// 8 t + 7, a permutation of a group's k that activations share when lanes read 8 bytes of them. Its factors are those of row
// g + 8 t.
//
// q3_5: of each two groups 32 codes of 7 bits, in 7 words and an eighth whose bits are the lowest ones of the others' bytes; a
// byte with any lowest bit is an index into a table of 256 entries. Bytes of a word: row g, k 4 h and 4 h + 2, then row g + 8.
// q4: a word has k 4 h to 4 h + 3 of row g in its high nibbles and of row g + 8 in its low ones, as two's complement.
// q8: words of four k as they are.
#pragma once
#include "numerics.cuh"

constexpr int TILE = 32, UNIT = 8;
// A table of words, 128 bytes for each byte of codes, that for 32 lanes hold the same pair: so lanes read different banks, and
// __dp4a alone makes an address of a byte. There may be a second one, of up's codebook.
constexpr int TABLE_BYTES = 32768;

__device__ const float FACTORS[16] = {
    1.148698354997f, -1.101905115877f, 1.049716683623f, -0.993092495437f, 0.933032991537f, -0.870550563296f,
    0.806641759222f, -0.742261785315f, 0.678302163724f, -0.615572206672f, 0.554784736034f, -0.496546247719f,
    0.441351498145f, -0.389582289830f, 0.341510064189f, -0.297301778751f};

// Fills the first or second table, with which dynamic shared memory begins. All threads take part, a barrier follows.
__device__ inline void fill_table(const uint16_t* codebook, int number) {
    DYNAMIC_SHARED(table);
    for (int i = threadIdx.x; i < 256 * 8; i += blockDim.x) {
        uint32_t pair = codebook[i / 16];
        *(uint4*)(table + number * TABLE_BYTES + 16 * i) = make_uint4(pair, pair, pair, pair);
    }
}

// Each format: how many vectors a unit has of codes, bytes of its factors, shared memory for its tables; UNITY is what dots are
// multiples of. ``decode`` gives two fragments, of the upper and the lower half of the tile, of the first or second of two groups
// from the words of both; ``place`` is where in shared memory a lane's words of the table begin. ``Factors`` are those
// of a row, ``of`` the one of group j, for a warp together. AHEAD: registers hold the codes of one unit more, which are loaded
// while others are multiplied.
struct Pairs {
    static constexpr int VECTORS = 7, ROW_BYTES = 4, SHARED = TABLE_BYTES;
    static constexpr bool AHEAD = true;
    static constexpr float UNITY = 1.0f;
    typedef uint32_t Factors;

    static __device__ inline void decode(uint32_t (&a)[2][4], const uint32_t* pair, int j, uint32_t place) {
        uint32_t last = 0;
        if (j) {
#pragma unroll
            for (int i = 0; i < 7; i++) last |= pair[i] << (i + 1) & 0x02020202u << i;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t word = j ? (i < 3 ? pair[4 + i] : last) : pair[i];
#pragma unroll
            for (int row = 0; row < 2; row++)
                a[i / 2][i % 2 * 2 + row] = __byte_perm(load_shared(__dp4a(word, 0x80u << 16 * row, place)),
                                                        load_shared(__dp4a(word, 0x8000u << 16 * row, place)), 0x5410);
        }
    }
    // Lane l brings factor l % 16, so the bit behind an index does not matter.
    static __device__ inline float held() { return FACTORS[threadIdx.x % 16]; }
    static __device__ inline float of(Factors indices, int j, float held) { return __shfl_sync(~0u, held, indices >> 4 * j); }
};

// Factors of q4 and q8 are float16.
struct HalfFactors {
    static constexpr int ROW_BYTES = 16, SHARED = 0;
    typedef uint4 Factors;

    static __device__ inline float held() { return 0; }
    static __device__ inline float of(const Factors& halves, int j, float) {
        uint32_t word = j / 2 == 0 ? halves.x : j / 2 == 1 ? halves.y : j / 2 == 2 ? halves.z : halves.w;
        return half_value((uint16_t)(j % 2 ? word >> 16 : word));
    }
};

// Values are decoded times 16, as the high halves of bytes.
struct Nibbles : HalfFactors {
    static constexpr int VECTORS = 8;
    static constexpr bool AHEAD = false;
    static constexpr float UNITY = 16.0f;

    static __device__ inline void decode(uint32_t (&a)[2][4], const uint32_t* pair, int j, uint32_t) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            a[i / 2][i % 2 * 2] = pair[4 * j + i] & 0xF0F0F0F0u;
            a[i / 2][i % 2 * 2 + 1] = pair[4 * j + i] << 4 & 0xF0F0F0F0u;
        }
    }
};

struct Bytes : HalfFactors {
    static constexpr int VECTORS = 16;
    static constexpr bool AHEAD = false;
    static constexpr float UNITY = 1.0f;

    static __device__ inline void decode(uint32_t (&a)[2][4], const uint32_t* pair, int j, uint32_t) {
#pragma unroll
        for (int i = 0; i < 8; i++) a[i / 4][i % 4] = pair[8 * j + i];
    }
};

template <class Format> constexpr int PAIR_WORDS = Format::VECTORS;         // of a lane for two groups
template <class Format> constexpr int UNIT_BYTES = TILE * (16 * Format::VECTORS + Format::ROW_BYTES);

// A dot as float32: ``multiply_int8`` adds to START, the bits of a number whose last place is worth a dot of 1.
template <class Format> struct Dot {
    static constexpr float OFFSET = 12582912.0f / Format::UNITY;
    static __device__ inline int start() { return __float_as_int(OFFSET); }
    static __device__ inline float value(int sum) { return __int_as_float(sum) - OFFSET; }
};
