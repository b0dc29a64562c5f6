// Attention of many rows of a sequence: bound by float32 multiply-adds, since chains are canonical. A tile of 64 queries (rows x
// query heads of a KV head) meets one attention block: scores to shared memory, weights in place of them, then chains of values.
//
// Keys, queries and values are converted to float32 once for the tile on their way to shared memory, in chunks of 4,096, of which
// one is on its way in registers while another is used. A thread has 8 queries x 8 positions of scores (64 multiply-adds for four
// loads of 16 bytes), then 8 queries x 4 columns of values (for four positions 128 for 12 loads; 4 x 4 where heads have up to 64
// columns: 64 for 8). Of the instructions in these loops 9 in 10 are multiply-adds. 109 KB of shared memory and 128 registers let
// two blocks of threads share a multiprocessor: one computes while the other waits at a barrier or weighs its scores.
#include "attention.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, QUERIES = 64;
constexpr int DEPTH = 16;                               // of head_dim in a chunk of keys and queries
constexpr int CHUNK = DEPTH * ATTENTION_BLOCK;          // numbers in a chunk of keys, or of values
// Rows in shared memory are padded by four banks: then four lanes that read 16 bytes of neighbouring rows do not meet.
constexpr int ROW = ATTENTION_BLOCK + 4, QUERY_ROW = QUERIES + 4;
constexpr int STAGE = DEPTH * (ROW + QUERY_ROW);

// What a block of threads works at, in shared memory.
struct alignas(16) Work {
    int table[BLOCK_PAGES];                             // pages of the attention block
    int2 spans[QUERIES];                                // positions that each query sees
    int places[QUERIES];                                // of its results, of which -1: nowhere
    float key_scales[ATTENTION_BLOCK], value_scales[ATTENTION_BLOCK];
};

// 16 bytes of a pool as float32, to an address in shared memory.
template <class T> __device__ inline void widen(uint4 vector, float* to) {
    constexpr int EACH = 16 / sizeof(T);
    uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
    float values[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        uint32_t word = words[i * sizeof(T) / 4];
        values[i] = sizeof(T) == 4   ? __uint_as_float(word)
                    : sizeof(T) == 2 ? half_value((uint16_t)(word >> i % 2 * 16))
                                     : byte_value(word ^ 0x80808080u, i % 4);
    }
#pragma unroll
    for (int i = 0; i < EACH; i += 4) *(float4*)(to + i) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
}

// One item: a tile of ``count`` queries of a KV head and an attention block, of which ``span`` is seen by any of them.
template <class T> struct Item {
    static constexpr int SIZE = sizeof(T), EACH = 16 / SIZE;    // SIZE is also how many vectors of a chunk a thread takes
    const Attention& a;
    const Work& work;
    const uint4 *keys, *values;                         // of the KV head in page 0
    const float* query;                                 // of which this thread loads, or null
    int2 span;
    int count, step;                                    // step: from one stage to the other, or 0 where there is but one
    float *stages, *scores;
    uint4 held[SIZE];                                   // of the next chunk, and queries that go with it
    float held_queries[4];

    __device__ bool wanted(int position) const { return position >= span.x && position < span.y; }

    __device__ void load_keys(int start) {
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            int vector = i * THREADS + threadIdx.x, page = vector / (DEPTH * SIZE), rest = vector % (DEPTH * SIZE);
            if (page >= span.x / PAGE && page <= (span.y - 1) / PAGE && start + rest / SIZE < a.head_dim)
                held[i] = keys[((int64)work.table[page] * a.kv_heads * a.head_dim + start) * SIZE + rest];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int d = start + threadIdx.x % 4 * 4 + i;
            held_queries[i] = query && d < a.head_dim ? query[d] : 0.0f;
        }
    }

    __device__ void store_keys(float* stage) {
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            int vector = i * THREADS + threadIdx.x, page = vector / (DEPTH * SIZE), rest = vector % (DEPTH * SIZE);
            widen<T>(held[i], stage + rest / SIZE * ROW + page * PAGE + rest % SIZE * EACH);
        }
        float* to = stage + DEPTH * ROW + threadIdx.x / 4;
#pragma unroll
        for (int i = 0; i < 4; i++) to[(threadIdx.x % 4 * 4 + i) * QUERY_ROW] = held_queries[i];
    }

    // The next chunk follows: where it takes the place of this one, when all have done with that.
    __device__ float* other_stage(int turn) {
        if (step == 0) __syncthreads();
        return stages + (turn ^ 1) * step;
    }

    // Scores of all queries and positions. A warp has 32 queries and 64 positions, and leaves out what nobody sees.
    __device__ void score() {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        int first = warp % 2 * 32 + lane / 8 * 8, position = warp / 2 * 64 + lane % 8 * 4;
        bool active = warp % 2 * 32 < count && warp / 2 * 64 < span.y && warp / 2 * 64 + 64 > span.x;
        float chain[8][8];
#pragma unroll
        for (int i = 0; i < 64; i++) chain[i / 8][i % 8] = 0.0f;
        load_keys(0);
        store_keys(stages);
        __syncthreads();
        for (int start = 0, turn = 0; start < a.head_dim; start += DEPTH, turn ^= 1) {
            const float *k = stages + turn * step + position, *q = stages + turn * step + DEPTH * ROW + first;
            int depth = min(DEPTH, a.head_dim - start);
            if (start + DEPTH < a.head_dim) load_keys(start + DEPTH);
            if (active)
#pragma unroll 2
                for (int d = 0; d < depth; d++) {
                    float4 k0 = *(const float4*)(k + d * ROW), k1 = *(const float4*)(k + d * ROW + 32);
                    float4 q0 = *(const float4*)(q + d * QUERY_ROW), q1 = *(const float4*)(q + d * QUERY_ROW + 4);
                    float ks[8] = {k0.x, k0.y, k0.z, k0.w, k1.x, k1.y, k1.z, k1.w};
                    float qs[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
#pragma unroll
                    for (int i = 0; i < 64; i++) chain[i / 8][i % 8] = __fmaf_rn(qs[i / 8], ks[i % 8], chain[i / 8][i % 8]);
                }
            if (start + DEPTH < a.head_dim) store_keys(other_stage(turn));
            __syncthreads();
        }
        if (!active) return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float4 factor = *(const float4*)(work.key_scales + position + 32 * half);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float* s = chain[i] + 4 * half;
                *(float4*)(scores + (first + i) * ROW + position + 32 * half) =
                    make_float4(s[0] * a.scale * factor.x, s[1] * a.scale * factor.y, s[2] * a.scale * factor.z,
                                s[3] * a.scale * factor.w);
            }
        }
    }

    template <int COLUMNS> __device__ void load_values(int panel, int start) {
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            int vector = i * THREADS + threadIdx.x, position = start + vector / (COLUMNS / EACH);
            int column = panel + vector % (COLUMNS / EACH) * EACH, width = padded(a.head_dim);
            // Others become zeros, which weights of zero meet.
            held[i] = wanted(position) && column < width
                ? values[((int64)work.table[position / PAGE] * a.kv_heads * PAGE + position % PAGE) * (width / EACH)
                         + column / EACH]
                : make_uint4(0, 0, 0, 0);
        }
    }

    __device__ void store_values(float* stage) {
#pragma unroll
        for (int i = 0; i < SIZE; i++) widen<T>(held[i], stage + (i * THREADS + threadIdx.x) * EACH);
    }

    // Chains of values of all queries, in panels of COLUMNS: a thread has OWN queries, of every fourth one, and four columns.
    template <int COLUMNS, int OWN> __device__ void weigh() {
        constexpr int POSITIONS = CHUNK / COLUMNS, PARTS = QUERIES / (4 * OWN);
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = padded(a.head_dim);
        int first = warp % PARTS * 4 * OWN + lane / 8, column = warp / PARTS * 32 + lane % 8 * 4;
        for (int panel = 0; panel < width; panel += COLUMNS) {
            bool active = warp % PARTS * 4 * OWN < count && panel + column < width;
            float chain[OWN][4];
#pragma unroll
            for (int i = 0; i < 4 * OWN; i++) chain[i / 4][i % 4] = 0.0f;
            int start = span.x / POSITIONS * POSITIONS;
            load_values<COLUMNS>(panel, start);
            store_values(stages);
            __syncthreads();
            for (int turn = 0; start < span.y; start += POSITIONS, turn ^= 1) {
                const float *v = stages + turn * step + column, *w = scores + first * ROW + start;
                int low = max(span.x - start, 0) / 4 * 4, high = min(span.y - start, POSITIONS);
                if (start + POSITIONS < span.y) load_values<COLUMNS>(panel, start + POSITIONS);
                if (active)
#pragma unroll 2
                    for (int p = low; p < high; p += 4) {
                        float4 weights[OWN];
#pragma unroll
                        for (int i = 0; i < OWN; i++) weights[i] = *(const float4*)(w + 4 * i * ROW + p);
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            float4 value = *(const float4*)(v + (p + j) * COLUMNS);
#pragma unroll
                            for (int i = 0; i < OWN; i++) {
                                const float4& all = weights[i];
                                float weight = j == 0 ? all.x : j == 1 ? all.y : j == 2 ? all.z : all.w;
                                chain[i][0] = __fmaf_rn(weight, value.x, chain[i][0]);
                                chain[i][1] = __fmaf_rn(weight, value.y, chain[i][1]);
                                chain[i][2] = __fmaf_rn(weight, value.z, chain[i][2]);
                                chain[i][3] = __fmaf_rn(weight, value.w, chain[i][3]);
                            }
                        }
                    }
                if (start + POSITIONS < span.y) store_values(other_stage(turn));
                __syncthreads();
            }
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                int place = work.places[first + 4 * i];
                if (active && place >= 0)
                    *(float4*)(a.chains + (int64)place * width + panel + column) =
                        make_float4(chain[i][0], chain[i][1], chain[i][2], chain[i][3]);
            }
        }
    }
};

// A tile of rows from ``start`` on meets block ``block`` of a KV head.
template <class T>
__device__ void attend(const Attention& a, Work& work, float* shared, int step, int start, int rows, int block, int kv_head) {
    int head = a.head_starts[kv_head], heads = a.head_starts[kv_head + 1] - head, row = a.first_row + start;
    int count = rows * heads, position = a.positions[row], warp = threadIdx.x / 32;
    if (heads == 0) return;
    int2 span = make_int2(visible(position, a.window, block).x, visible(position + rows - 1, a.window, block).y);
    if (threadIdx.x < BLOCK_PAGES) {
        int page = max(span.x / PAGE, min((int)threadIdx.x, (span.y - 1) / PAGE));
        work.table[threadIdx.x] = a.pages[(int64)a.sequences[row] * a.pages_stride + block * BLOCK_PAGES + page];
    }
    if (threadIdx.x < QUERIES) {
        int r = threadIdx.x / heads, h = threadIdx.x % heads;
        int2 own = visible(position + r, a.window, block);
        bool sees = threadIdx.x < count && own.x < own.y;
        work.spans[threadIdx.x] = sees ? own : make_int2(0, 0);
        work.places[threadIdx.x] =
            sees ? ((start + r) * a.heads + head + h) * a.blocks + block - first_block(position + r, a.window) : -1;
    }
    __syncthreads();
    int64 scales_at = ((int64)work.table[threadIdx.x / PAGE] * a.kv_heads + kv_head) * PAGE + threadIdx.x % PAGE;
    work.key_scales[threadIdx.x] = a.key_scales ? half_value(a.key_scales[scales_at]) : 1.0f;
    work.value_scales[threadIdx.x] = a.value_scales ? half_value(a.value_scales[scales_at]) : 1.0f;
    int mine = threadIdx.x / 4, width = padded(a.head_dim);
    const float* query = a.q + (int64)(row + mine / heads) * a.q_stride + (head + mine % heads) * a.head_dim;
    Item<T> item{a, work, (const uint4*)((const T*)a.keys + (int64)kv_head * a.head_dim * PAGE),
                 (const uint4*)((const T*)a.values + (int64)kv_head * PAGE * width), mine < count ? query : nullptr, span, count,
                 step, shared + QUERIES * ROW, shared};
    item.score();
    __syncthreads();
    for (int i = warp; i < count; i += WARPS) {
        float maximum, sum = weigh_scores(item.scores + i * ROW, work.spans[i].x, work.spans[i].y,
                                          a.value_scales ? work.value_scales : nullptr, maximum);
        if (threadIdx.x % 32 == 0 && work.places[i] >= 0) a.maxima[work.places[i]] = maximum, a.sums[work.places[i]] = sum;
    }
    // The barrier in front of the first chunk of values orders these weights before their use.
    if (width <= 64) item.template weigh<64, 4>();
    else item.template weigh<128, 8>();
    __syncthreads();
}

// tiles, items, counts: what attention_plan.cu has made of the rows from first_row on. Grid: as many blocks as run at a time;
// each takes items in turn. Shared memory: scores and two stages, or one.
template <class T>
__device__ void prefill(const Attention& a, const int* tiles, const int* items, const int* counts, int stages) {
    DYNAMIC_SHARED(shared);
    __shared__ Work work;
    int tile = 0, total = counts[1];
    for (int item = blockIdx.x; item < total; item += gridDim.x) {
        while (item >= items[tile + 1]) tile++;
        int start = tiles[tile], rest = item - items[tile];
        int block = first_block(a.positions[a.first_row + start], a.window) + rest / a.kv_heads;
        attend<T>(a, work, (float*)shared, stages > 1 ? STAGE : 0, start, tiles[tile + 1] - start, block, rest % a.kv_heads);
    }
}

#define KERNEL(name, T) \
    extern "C" __global__ void \
    __launch_bounds__(THREADS, 2) name(ATTENTION_ARGUMENTS, const int* tiles, const int* items, const int* counts, int stages) { \
        prefill<T>({ATTENTION_OPERATION}, tiles, items, counts, stages); \
    }

KERNEL(prefill_half, uint16_t)
KERNEL(prefill_float, float)
KERNEL(prefill_int8, int8_t)
