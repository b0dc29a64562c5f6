// Which rows attention takes in tiles, and which one by one: so that a step may be replayed whatever its rows are.
#include "attention.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;

struct Sum { __device__ int operator()(int a, int b) { return a + b; } };
struct Larger { __device__ int operator()(int a, int b) { return max(a, b); } };

// What the threads up to this one have together, and in ``carry``: then all of them.
template <class F> __device__ int scan(int value, int& carry, F join) {
    __shared__ int parts[WARPS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(~0u, value, step);
        if (lane >= step) value = join(value, other);
    }
    __syncthreads();
    if (lane == 31) parts[warp] = value;
    __syncthreads();
    value = join(value, carry);
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) value = join(value, parts[w]);
        carry = join(carry, parts[w]);
    }
    return value;
}

// Cuts ``most`` rows from first_row on into tiles of up to tile_rows consecutive positions of one sequence: tiles [count + 1],
// their first rows, counted from first_row. Those of ``least`` rows and more are work for attention_prefill.cu: items
// [count + 1], the first of a tile's items, which are attention blocks x KV heads. Other rows are ``alone`` [..]. counts [3]:
// tiles, items, rows alone. Grid: 1.
extern "C" __global__ void __launch_bounds__(THREADS) plan_tiles(
        const int* sequences, const int* positions, const int* rows, int first_row, int most, int window, int kv_heads,
        int tile_rows, int least, int* tiles, int* items, int* alone, int* counts) {
    int held = max(min(*rows - first_row, most), 0), run = -1, count = 0, total = 0, left = 0;
    sequences += first_row, positions += first_row;
    for (int base = 0; base < held; base += THREADS) {
        int row = base + threadIdx.x;
        bool here = row < held;
        bool begins = here && (row == 0 || sequences[row] != sequences[row - 1] || positions[row] != positions[row - 1] + 1);
        int start = scan(begins ? row : -1, run, Larger());
        bool first = here && (row - start) % tile_rows == 0;
        int number = scan(first, count, Sum()) - 1;
        if (first) tiles[number] = row;
    }
    if (threadIdx.x == 0) tiles[count] = held;
    __syncthreads();
    for (int base = 0; base < count; base += THREADS) {
        int tile = base + threadIdx.x, start = tile < count ? tiles[tile] : 0;
        int own = tile < count ? tiles[tile + 1] - start : 0;
        bool shared = own >= least;
        int blocks = 0;
        if (shared) blocks = positions[start + own - 1] / ATTENTION_BLOCK - first_block(positions[start], window) + 1;
        int before = total, stop = scan(blocks * kv_heads, total, Sum());
        int place = scan(shared ? 0 : own, left, Sum());
        if (tile < count) items[tile + 1] = stop;
        if (tile == 0) items[0] = before;
        if (!shared)
            for (int i = 0; i < own; i++) alone[place - own + i] = start + i;
    }
    if (threadIdx.x == 0) counts[0] = count, counts[1] = total, counts[2] = left;
}
