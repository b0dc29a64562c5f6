// Rows of a table that is laid out for products, and the ends of products whose sums several ranks have joined.
#include "products.cuh"

constexpr int THREADS = 256;

// Where a number of a table of q4 or q8 lies: its row in the tile, its unit, its group there and its k in the group.
struct Cell {
    int row, unit, j, k;

    __device__ inline Cell(int row, int column, int block) : row(row % TILE) {
        int per_block = (block + GROUP - 1) / GROUP, per_unit = UNIT / per_block * per_block;
        int group = column / block * per_block + column % block / GROUP;
        unit = group / per_unit, j = group % per_unit, k = column % block % GROUP;
    }
    // Of the words that a lane has for a group of half a tile.
    __device__ inline int word() const { return k / 4 % 2 * 2 + row / 8 % 2; }
    __device__ inline int vector(int number) const { return 16 * (TILE * number + row % 8 * 4 + k / 8); }
};

// (value * factor) of a table whose row scales are 1.
template <class Format> struct Table {
    static __device__ inline float number(const unsigned char* data, int row, int column, int columns, int block) {
        Cell place(row, column, block);
        int per_block = (block + GROUP - 1) / GROUP, per_unit = UNIT / per_block * per_block;
        int units = (groups_of(columns, block) + per_unit - 1) / per_unit;
        const unsigned char* unit = data + ((int64)(row / TILE) * units + place.unit) * UNIT_BYTES<Format>;
        const uint16_t* factors = (const uint16_t*)(unit + 16 * TILE * Format::VECTORS);
        float factor = half_value(factors[(place.row % 8 * 4 + place.row / 8) * UNIT + place.j]);
        return (float)value(unit, place, Format()) * factor;
    }
    static __device__ inline int value(const unsigned char* unit, const Cell& place, Bytes) {
        return (int8_t)unit[place.vector(2 * place.j + place.row / 16) + 4 * place.word() + place.k % 4];
    }
    static __device__ inline int value(const unsigned char* unit, const Cell& place, Nibbles) {
        int byte = unit[place.vector(place.j) + place.row / 16 * 8 + place.k / 4 % 2 * 4 + place.k % 4];
        return (int8_t)(place.word() % 2 ? byte << 4 : byte & 0xF0) / 16;
    }
};

template <class T> struct Plain {
    static __device__ inline float number(const unsigned char* data, int row, int column, int columns, int block) {
        constexpr int COUNT = 16 / sizeof(T);
        int per_block = (min(block, columns) + COUNT - 1) / COUNT;
        int per_tile = columns / block * per_block + (columns % block + COUNT - 1) / COUNT;
        int vector = column / block * per_block + column % block / COUNT;
        const T* values = (const T*)(data + (((int64)(row / TILE) * per_tile + vector) * TILE + row % TILE) * 16);
        return as_float(values[column % block % COUNT]);
    }
    static __device__ inline float as_float(float value) { return value; }
    static __device__ inline float as_float(uint16_t bits) { return half_value(bits); }
};

// out [rows, columns] = row tokens[r] - first of a table of ``held`` rows, as float32; zeros where it is none of them. Grid: rows.
#define KERNEL(name, Kind)                                                                                                   \
    extern "C" __global__ void                                                                                               \
    __launch_bounds__(THREADS) name(const unsigned char* data, const int* tokens, int first, int held, const int* rows,      \
                                    int columns, int block, float* out) {                                                    \
        if (blockIdx.x >= *rows) return;                                                                                     \
        int row = tokens[blockIdx.x] - first;                                                                                \
        bool here = row >= 0 && row < held;                                                                                  \
        for (int i = threadIdx.x; i < columns; i += THREADS)                                                                 \
            out[(int64)blockIdx.x * columns + i] = here ? Kind::number(data, row, i, columns, block) : 0.0f;                 \
    }

KERNEL(embedding_q8, Table<Bytes>)
KERNEL(embedding_q4, Table<Nibbles>)
KERNEL(embedding_f32, Plain<float>)
KERNEL(embedding_f16, Plain<uint16_t>)

// residual [rows, columns] += float32(sums * 2**-32) + bias. Grid: rows.
extern "C" __global__ void __launch_bounds__(THREADS) finish_rows(
        const int64* sums, const int* rows, int columns, float* residual, const float* bias, int* status) {
    if (blockIdx.x >= *rows) return;
    int found = OK;
    for (int i = threadIdx.x; i < columns; i += THREADS) {
        int64 at = (int64)blockIdx.x * columns + i;
        residual[at] += output(sums[at], bias, i, found);
    }
    report(status, found);
}
