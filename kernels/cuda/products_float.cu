// Products y = x W^T of float32 and float16 weights: in each reduction block one chain of fused multiply-adds over single k.
//
// Weights of a tile of 32 rows: block by block (filled up to whole vectors), of each 4 or 8 k of a row in a vector of 16 bytes,
// that of lane l for row l. So a lane computes the chains of a row, and activations are the same for all lanes.
#include "products.cuh"

constexpr int THREADS = 256, AHEAD = 4;         // vectors of a lane that are on their way together

struct Inputs {
    const float* x;
    int columns, block, first, last;            // tokens first ... last - 1
};

struct Floats {
    static constexpr int COUNT = 4;
    static __device__ inline void decode(float (&w)[COUNT], const uint4& v) {
        w[0] = __uint_as_float(v.x), w[1] = __uint_as_float(v.y), w[2] = __uint_as_float(v.z), w[3] = __uint_as_float(v.w);
    }
};

struct Halves {
    static constexpr int COUNT = 8;
    static __device__ inline void decode(float (&w)[COUNT], const uint4& v) {
        uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 8; i++) w[i] = half_value((uint16_t)(words[i / 2] >> i % 2 * 16));
    }
};

template <class Format, int TOKENS> struct Multiplier {
    static constexpr int ROWS = 1, CHAINS = TOKENS, COUNT = Format::COUNT;
    const Inputs& in;

    static __device__ inline int row(int, int lane) { return lane; }
    static __device__ inline int token(int chain, int) { return chain; }

    // Multiplies a vector with k ... k + COUNT - 1 of the activations, or those before ``stop``.
    __device__ inline void multiply(float (&f)[TOKENS], const uint4& vector, int k, int stop, bool aligned) const {
        float w[COUNT];
        Format::decode(w, vector);
#pragma unroll
        for (int token = 0; token < TOKENS; token++) {
            const float* x = in.x + (int64)min(in.first + token, in.last - 1) * in.columns + k;
#pragma unroll
            for (int i = 0; i < COUNT; i += 4) {
                if (aligned && k + i + 4 <= stop) {
                    float4 four = *(const float4*)(x + i);
                    f[token] = __fmaf_rn(w[i], four.x, f[token]);
                    f[token] = __fmaf_rn(w[i + 1], four.y, f[token]);
                    f[token] = __fmaf_rn(w[i + 2], four.z, f[token]);
                    f[token] = __fmaf_rn(w[i + 3], four.w, f[token]);
                } else {
#pragma unroll
                    for (int e = i; e < i + 4; e++)
                        if (k + e < stop) f[token] = __fmaf_rn(w[e], x[e], f[token]);
                }
            }
        }
    }

    const unsigned char *rows, *taken_from;
    int unit, taken;

    __device__ inline void prepare(const Division&, int) {}
    __device__ inline void begin(const Part&, const Place&) {}
    __device__ inline void take() { taken_from = rows, taken = unit; }
    __device__ inline void fetch(const Part& part, const Place& where) {
        int per_block = (min(in.block, in.columns) + COUNT - 1) / COUNT;
        int per_tile = in.columns / in.block * per_block + (in.columns % in.block + COUNT - 1) / COUNT;
        unit = where.unit;
        rows = part.data + (((int64)where.tile * per_tile + unit * per_block) * TILE + threadIdx.x % 32) * 16;
    }
    __device__ inline void add(int64 (&sums)[1][TOKENS], int& found) {
        bool aligned = in.columns % 4 == 0 && in.block % 4 == 0;
        int start = taken * in.block, stop = min(start + in.block, in.columns), vectors = (stop - start + COUNT - 1) / COUNT;
        float f[TOKENS] = {};
        for (int v = 0; v < vectors; v += AHEAD) {
            uint4 loaded[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) loaded[i] = load_once(taken_from + (int64)min(v + i, vectors - 1) * TILE * 16);
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (v + i < vectors) multiply(f, loaded[i], start + (v + i) * COUNT, stop, aligned);
        }
#pragma unroll
        for (int token = 0; token < TOKENS; token++) {
            if (!within(f[token], BLOCK_LIMIT)) found |= OUT_OF_RANGE;
            sums[0][token] += to_fixed(f[token]);
        }
    }
};

// Grid: see ``Division``. Tokens from ``first`` on, as many as there are, up to TOKENS.
#define KERNEL(name, Format, TOKENS)                                                                                             \
    extern "C" __global__ void                                                                                                   \
    __launch_bounds__(THREADS) name(                                                                                             \
            PARTS, int start1, int start2, int mode, GATED_ARGUMENTS, int64* sums, int* arrived, const int* rows, int first,     \
            int* status, const float* x, int columns, int block) {                                                               \
        Inputs in{x, columns, block, first, min(*rows, first + TOKENS)};                                                         \
        if (in.first >= in.last) return;                                                                                         \
        Division division(PARTS_GIVEN, start1, start2, mode);                                                                    \
        Multiplier<Format, TOKENS> multiplier{in};                                                                               \
        share_units(division, multiplier, (columns + block - 1) / block, in.first, in.last, mode, GATED_GIVEN,                   \
                    Meeting{sums, arrived}, status);                                                                             \
    }

KERNEL(f32_for_1, Floats, 1)
KERNEL(f32_for_2, Floats, 2)
KERNEL(f32_for_4, Floats, 4)
KERNEL(f32_for_8, Floats, 8)
KERNEL(f16_for_1, Halves, 1)
KERNEL(f16_for_2, Halves, 2)
KERNEL(f16_for_4, Halves, 4)
KERNEL(f16_for_8, Halves, 8)
