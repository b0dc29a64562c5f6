// The parts of choose.cu: a draw, its logits in order, and where sums over the order reach an amount.
#pragma once
#include "sampling.cuh"

constexpr int BINS = 1024;                              // of the order, by the distance to the largest logit
constexpr float BINS_PER_UNIT = BINS / 24.0f;           // a weight is 0 from 22.9 on
constexpr int KEYS = 4096;                              // of a bin that fit into shared memory
constexpr int64 SHARE = 1ll << 32;                      // shares are multiples of 2**-32

// What a token is drawn with; ``sampling.DRAW`` is its like in NumPy. top_k 0, top_p SHARE and min_p 0 are off; temperature 0
// takes the first in order. penalties and biases: where their lists begin and end.
struct Draw {
    float temperature;
    int top_k;
    int64 top_p, min_p;
    uint64 key[2], counter[2];
    float repetition, frequency, presence;
    int row, penalties[2], biases[2];
};

// Philox4x64-10 (Salmon et al. 2011) for counters whose upper half is zero: the first of its four numbers.
__device__ inline uint64 philox(const uint64 (&key)[2], const uint64 (&counter)[2]) {
    uint64 k0 = key[0], k1 = key[1], c0 = counter[0], c1 = counter[1], c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        uint64 high0 = __umul64hi(c0, 0xD2E7470EE14C6C93ull), low0 = c0 * 0xD2E7470EE14C6C93ull;
        uint64 high1 = __umul64hi(c2, 0xCA5A826395121157ull), low1 = c2 * 0xCA5A826395121157ull;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B97F4A7C15ull, k1 += 0xBB67AE8584CAA73Bull;
    }
    return c0;
}

// The least integer that is not below total * share * 2**-32.
__device__ inline int64 share_of(int64 total, int64 share) {
    uint64 high = __umul64hi(total, share), low = (uint64)total * (uint64)share;
    return (int64)((high << 32 | low >> 32) + ((low & 0xFFFFFFFF) != 0));
}

// Places in the order: 64-bit integers, ascending, which hold the key. Nothing has the place ~0.
__device__ inline uint64 place_of(int64 key) { return 0x7FFFFFFFFFFFFFFFull - (uint64)key; }
__device__ inline int64 key_at(uint64 place) { return (int64)(0x7FFFFFFFFFFFFFFFull - place); }

// The adjusted logits of a draw with a temperature.
struct Row {
    const float* logits;
    int columns;
    float temperature, greatest, maximum, scale;
    int64 least;                                        // weights below it are 0 for min-p

    __device__ Row(const Draw& draw, const float* given, int count, int64 best)
        : logits(given), columns(count), temperature(draw.temperature), greatest(logit_of(best)),
          maximum(greatest / draw.temperature), scale(BINS_PER_UNIT / draw.temperature), least(draw.min_p) {}

    // Not one of these steps changes an order, so bins follow each other in it. The last takes what is far away, or NaN.
    __device__ int bin(float logit) const {
        float distance = (greatest - logit) * scale;
        return distance < BINS - 1 ? (int)distance : BINS - 1;
    }
    __device__ int64 weight(float logit) const { return ::weight_of(logit / temperature, maximum); }
    __device__ int64 kept(float logit) const {
        int64 found = weight(logit);
        return found < least ? 0 : found;
    }
};

// 64-bit sums in shared memory, in halves: additions of 32 bits are single instructions there, others are loops.
struct Sums {
    uint32_t low[BINS], high[BINS];

    __device__ void clear(int i) { low[i] = high[i] = 0; }
    __device__ int64 get(int i) const { return (int64)((uint64)high[i] << 32 | low[i]); }
    __device__ void add(int i, int64 value) {
        if (!value) return;
        uint32_t part = (uint32_t)value, rest = (uint32_t)(value >> 32);
        rest += atomicAdd(&low[i], part) > ~part;       // a carry
        if (rest) atomicAdd(&high[i], rest);
    }
};

struct Bins {
    const int* counts;
    const int64 *weights, *kept;
};

struct Place {
    int bin;
    int64 before;                                       // the sum of the bins before it
};

struct Shared {
    uint64 places[KEYS];                                // of the tokens of a bin, in no order
    Sums sums;
    int64 warps[MOST_WARPS];
    uint64 bounds[MOST_WARPS];
    Place place;
    int count, bin;                                     // tokens of the bin; listed if they fit
};

// The first of BINS values with which their sum reaches ``amount``, at least 1.
template <class Value> __device__ inline Place find(Value value, int64 amount, Shared& s) {
    int each = BINS / blockDim.x, first = threadIdx.x * each, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64 own = 0;
    for (int i = 0; i < each; i++) own += value(first + i);
    int64 upto = own;
    for (int step = 1; step < 32; step *= 2) {
        int64 other = __shfl_up_sync(~0u, upto, step);
        if (lane >= step) upto += other;
    }
    __syncthreads();
    if (lane == 31) s.warps[warp] = upto;
    if (threadIdx.x == 0) s.place = {BINS - 1, 0};
    __syncthreads();
    for (int i = 0; i < warp; i++) upto += s.warps[i];
    int64 before = upto - own;
    if (before < amount && amount <= upto) {
        int bin = first;
        for (; bin < first + each - 1 && before + value(bin) < amount; bin++) before += value(bin);
        s.place = {bin, before};
    }
    __syncthreads();
    return s.place;
}

// Lists the tokens of a bin.
__device__ inline void gather(const Row& row, int bin, Shared& s) {
    constexpr int BATCH = 8;
    __syncthreads();
    if (threadIdx.x == 0) s.count = 0, s.bin = bin;
    __syncthreads();
    for (int start = threadIdx.x; start < row.columns; start += BATCH * blockDim.x) {
        float logits[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int token = start + i * blockDim.x;
            logits[i] = token < row.columns ? row.logits[token] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int token = start + i * blockDim.x;
            if (token >= row.columns || row.bin(logits[i]) != bin) continue;
            int number = atomicAdd(&s.count, 1);
            if (number < KEYS) s.places[number] = place_of(key_of(logits[i], token));
        }
    }
    __syncthreads();
}

// Calls use(place) for every token of the bin that was gathered, each on one thread. Where most logits are equal it may be most.
template <class Use> __device__ inline void for_members(const Row& row, const Shared& s, Use use) {
    if (s.count <= KEYS) {
        for (int i = threadIdx.x; i < s.count; i += blockDim.x) use(s.places[i]);
        return;
    }
    for (int token = threadIdx.x; token < row.columns; token += blockDim.x) {
        float logit = row.logits[token];
        if (row.bin(logit) == s.bin) use(place_of(key_of(logit, token)));
    }
}

// Narrows [low, high] to the first and the last token of the bin within it; of none, low is ~0.
__device__ inline void tighten(const Row& row, Shared& s, uint64& low, uint64& high) {
    uint64 least = ~0ull, most = 0;
    for_members(row, s, [&](uint64 place) {
        if (place < low || place > high) return;
        least = place < least ? place : least;
        most = place > most ? place : most;
    });
    low = ~block_max(~least, s.bounds);
    high = block_max(most, s.bounds);
}

// The place of the token of a bin with which the sum of quantity(logit) over them, in order, reaches ``amount``; ~0 of none.
template <class Quantity> __device__ inline uint64 last_of(const Row& row, Shared& s, int bin, int64 amount, Quantity quantity) {
    gather(row, bin, s);
    uint64 low = 0, high = ~0ull;
    tighten(row, s, low, high);
    while (low < high) {
        // Sums over equal parts of what lies between the first and the last, and on with one of them.
        int shift = max(0, 64 - 10 - __clzll((int64)(high - low)));
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) s.sums.clear(i);
        __syncthreads();
        for_members(row, s, [&](uint64 place) {
            if (place >= low && place <= high) s.sums.add((int)((place - low) >> shift), quantity(logit_of(key_at(place))));
        });
        __syncthreads();
        Place part = find([&](int i) { return s.sums.get(i); }, amount, s);
        amount -= part.before;
        uint64 end = low + (((uint64)part.bin + 1) << shift) - 1;
        low += (uint64)part.bin << shift;
        high = end < high ? end : high;
        tighten(row, s, low, high);
    }
    return low;
}

// The sums over a beginning of the order: of weights, and of those that min-p keeps.
struct Beginning {
    int64 weight, kept;
};

__device__ inline Beginning before(const Bins& bins, Shared& s, int end) {
    int64 weight = 0, kept = 0;
    for (int i = threadIdx.x; i < end; i += blockDim.x) weight += bins.weights[i], kept += bins.kept[i];
    weight = block_sum(weight, s.warps);
    return {weight, block_sum(kept, s.warps)};
}

// The shortest beginning over which quantity(logit), with ``of_bin(bin)`` its sum over a bin, reaches ``amount``.
template <class OfBin, class Quantity> __device__ inline Beginning beginning(
        const Row& row, const Bins& bins, Shared& s, OfBin of_bin, Quantity quantity, int64 amount) {
    Place place = find(of_bin, amount, s);
    Beginning sums = before(bins, s, place.bin);
    // Nobody can tell where it ends among tokens without weight.
    if (!bins.weights[place.bin]) return sums;
    uint64 last = last_of(row, s, place.bin, amount - place.before, quantity);
    int64 weight = 0, kept = 0;
    for_members(row, s, [&](uint64 member) {
        if (member > last) return;
        float logit = logit_of(key_at(member));
        weight += row.weight(logit), kept += row.kept(logit);
    });
    sums.weight += block_sum(weight, s.warps);
    sums.kept += block_sum(kept, s.warps);
    return sums;
}
