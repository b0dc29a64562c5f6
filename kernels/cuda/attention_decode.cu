// Attention of single rows: memory-bound. One block of threads for a row, a KV head and an attention block; all query heads of
// the KV head share what is read.
//
// Keys, then values, stream through a ring of stages in shared memory, 16 KB each, by asynchronous copies of 16 bytes: two stages
// are on their way while a third is used, and three blocks of threads fit a multiprocessor (up to eight heads of 128 columns),
// so that some 96 KB are in flight there. A thread holds the scores of two positions for all heads: two float16 keys come by one
// load of 4 bytes, free of bank conflicts, and four numbers of a query by one of 16 bytes, the same for all lanes. Then a thread
// holds two chains of values for some of the heads, with weights read four positions at a time. With four heads to a KV head that
// is 16,000 instructions of a warp for 128 KB, two thirds of what an H200 issues while it reads them; with eight nearly all.
#include "attention.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32, STAGES = 3;
constexpr int PAGE_VECTORS = 64;                        // 16-byte vectors of a page in a stage of keys
constexpr int STAGE_VECTORS = BLOCK_PAGES * (PAGE_VECTORS + 4);     // a page is followed by a row of padding, 4 vectors at most
constexpr int VALUE_VECTORS = 1024;                     // of a stage of values, in whole pages
constexpr int QUERY_ROW = 256;                          // from query to query: as a constant it costs no instructions

// How keys and values of the pages first … last of a block get to shared memory: chunks of some head_dim of all those pages, then
// chunks of some pages of values.
template <class T> struct Stream {
    static constexpr int ROW = PAGE * sizeof(T) / 16;   // vectors for one of head_dim in a page
    static constexpr int CHUNK = PAGE_VECTORS / ROW;    // of head_dim in a stage
    const uint4 *keys, *values;                         // of this KV head in page 0
    const int* table;                                   // shared: the pages of the block
    uint4* stages;
    int first, last, key_vectors, value_vectors, stride_heads, value_pages, key_chunks, chunks, issued, slot;

    __device__ Stream(const Attention& a, int kv_head, int2 span, const int* table, uint4* stages)
        : table(table), stages(stages), first(span.x / PAGE), last((span.y - 1) / PAGE), key_vectors(a.head_dim * ROW),
          value_vectors(padded(a.head_dim) * ROW), stride_heads(a.kv_heads), issued(0), slot(0) {
        keys = (const uint4*)a.keys + (int64)kv_head * key_vectors;
        values = (const uint4*)a.values + (int64)kv_head * value_vectors;
        value_pages = VALUE_VECTORS / value_vectors;
        key_chunks = (a.head_dim + CHUNK - 1) / CHUNK;
        chunks = key_chunks + (last - first + value_pages) / value_pages;
    }

    __device__ void issue() {
        uint4* stage = stages + issued % STAGES * STAGE_VECTORS;
        if (issued < key_chunks) {
            int vector = threadIdx.x % PAGE_VECTORS, from = issued * PAGE_VECTORS + vector;
            if (from < key_vectors)
                for (int page = first + threadIdx.x / PAGE_VECTORS; page <= last; page += THREADS / PAGE_VECTORS)
                    copy_async(stage + page * (PAGE_VECTORS + ROW) + vector,
                               keys + (int64)table[page] * stride_heads * key_vectors + from);
        } else if (issued < chunks) {
            int start = first + (issued - key_chunks) * value_pages, stop = min(start + value_pages, last + 1);
            for (int page = start; page < stop; page++)
                for (int vector = threadIdx.x; vector < value_vectors; vector += THREADS)
                    copy_async(stage + (page - start) * value_vectors + vector,
                               values + (int64)table[page] * stride_heads * value_vectors + vector);
        }
        commit_copies();
        issued++;
    }

    // The next chunk, when all have done with the last one.
    __device__ const T* next() {
        wait_copies<STAGES - 2>();
        __syncthreads();
        issue();
        const T* stage = (const T*)(stages + slot * STAGE_VECTORS);
        slot = slot + 1 < STAGES ? slot + 1 : 0;
        return stage;
    }
};

// Scores of HEADS queries, shared [HEADS, QUERY_ROW], at this thread's two positions; to shared scores [heads, 256].
template <class T, int HEADS>
__device__ void score(Stream<T>& stream, const float* queries, int head_dim, float scale, float2 factors, int heads,
                      float* scores) {
    constexpr int CHUNK = Stream<T>::CHUNK;
    int page = threadIdx.x * 2 / PAGE, column = threadIdx.x * 2 % PAGE;
    float2 chain[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) chain[h] = make_float2(0.0f, 0.0f);
    for (int start = 0; start < head_dim; start += CHUNK) {
        const T* key = stream.next() + page * (CHUNK + 1) * PAGE + column;
        int count = min(CHUNK, head_dim - start), d = 0;
#pragma unroll 2
        for (; d + 4 <= count; d += 4) {
            float2 k[4];
#pragma unroll
            for (int i = 0; i < 4; i++) k[i] = load_pair(key + (d + i) * PAGE);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float4 q = *(const float4*)(queries + h * QUERY_ROW + start + d);
                float each[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    chain[h].x = __fmaf_rn(each[i], k[i].x, chain[h].x);
                    chain[h].y = __fmaf_rn(each[i], k[i].y, chain[h].y);
                }
            }
        }
        for (; d < count; d++) {
            float2 k = load_pair(key + d * PAGE);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                chain[h].x = __fmaf_rn(queries[h * QUERY_ROW + start + d], k.x, chain[h].x);
                chain[h].y = __fmaf_rn(queries[h * QUERY_ROW + start + d], k.y, chain[h].y);
            }
        }
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++)
        if (h < heads)
            *(float2*)(scores + h * ATTENTION_BLOCK + 2 * threadIdx.x) =
                make_float2(chain[h].x * scale * factors.x, chain[h].y * scale * factors.y);
}

// Chains of values for HEADS heads from weights [HEADS, 256] on, two of the width to a thread that is ``active``; to ``out``
// [heads, stride].
template <class T, int HEADS>
__device__ void weigh(Stream<T>& stream, const float* weights, int2 span, int width, int column, bool active, int heads,
                      float* out, int64 stride) {
    float2 chain[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) chain[h] = make_float2(0.0f, 0.0f);
    for (int page = stream.first; page <= stream.last; page += stream.value_pages) {
        const T* value = stream.next() + column;
        if (!active) continue;
        int start = page * PAGE, low = max(span.x - start, 0), high = min(span.y - start, stream.value_pages * PAGE);
        auto one = [&](int position) {
            float2 v = load_pair(value + position * width);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float weight = weights[h * ATTENTION_BLOCK + start + position];
                chain[h] = make_float2(__fmaf_rn(weight, v.x, chain[h].x), __fmaf_rn(weight, v.y, chain[h].y));
            }
        };
        int position = low;
        for (; position % 4 && position < high; position++) one(position);
#pragma unroll 2
        for (; position + 4 <= high; position += 4) {
            float2 v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = load_pair(value + (position + i) * width);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float4 w = *(const float4*)(weights + h * ATTENTION_BLOCK + start + position);
                float each[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    chain[h].x = __fmaf_rn(each[i], v[i].x, chain[h].x);
                    chain[h].y = __fmaf_rn(each[i], v[i].y, chain[h].y);
                }
            }
        }
        for (; position < high; position++) one(position);
    }
    if (!active) return;
#pragma unroll
    for (int h = 0; h < HEADS; h++)
        if (h < heads) *(float2*)(out + h * stride) = chain[h];
}

// The smallest number of heads, a power of two, for which there is code.
template <class F> __device__ inline void for_heads(int heads, F with) {
    if (heads <= 1) with.template operator()<1>();
    else if (heads <= 2) with.template operator()<2>();
    else if (heads <= 4) with.template operator()<4>();
    else if (heads <= 8) with.template operator()<8>();
    else with.template operator()<16>();
}

template <class T> struct Score {
    Stream<T>& stream; const float* queries; int head_dim; float scale; float2 factors; int heads; float* scores;
    template <int HEADS> __device__ void operator()() {
        score<T, HEADS>(stream, queries, head_dim, scale, factors, heads, scores);
    }
};

template <class T> struct Weigh {
    Stream<T>& stream; const float* weights; int2 span; int width, column; bool active; int heads; float* out; int64 stride;
    template <int HEADS> __device__ void operator()() {
        weigh<T, HEADS>(stream, weights, span, width, column, active, heads, out, stride);
    }
};

__device__ inline float2 scales_at(const uint16_t* scales, const int* table, int kv_heads, int kv_head) {
    if (!scales) return make_float2(1.0f, 1.0f);
    int page = threadIdx.x * 2 / PAGE, column = threadIdx.x * 2 % PAGE;
    return load_pair(scales + ((int64)table[page] * kv_heads + kv_head) * PAGE + column);
}

// Block ``block`` of a row at ``position`` of a sequence, for ``heads`` query heads of a KV head from ``head`` on.
template <class T>
__device__ void attend(const Attention& a, unsigned char* shared, int index, int position, int sequence, int block, int kv_head,
                       int head, int heads, int tile) {
    int2 span = visible(position, a.window, block);
    int width = padded(a.head_dim);
    uint4* stages = (uint4*)shared;
    float* scores = (float*)(stages + STAGES * STAGE_VECTORS);
    float* value_scales = scores + tile * ATTENTION_BLOCK;
    float* queries = value_scales + ATTENTION_BLOCK;
    int* table = (int*)(queries + tile * QUERY_ROW);
    if (threadIdx.x < BLOCK_PAGES) {
        // Pages of which nothing is seen may not be in the table.
        int page = max(span.x / PAGE, min((int)threadIdx.x, (span.y - 1) / PAGE));
        table[threadIdx.x] = a.pages[(int64)sequence * a.pages_stride + block * BLOCK_PAGES + page];
    }
    __syncthreads();
    Stream<T> stream(a, kv_head, span, table, stages);
    for (int i = 0; i < STAGES - 1; i++) stream.issue();
    for (int h = 0; h < heads; h++)
        for (int d = threadIdx.x; d < a.head_dim; d += THREADS)
            queries[h * QUERY_ROW + d] = a.q[(int64)(a.first_row + index) * a.q_stride + (head + h) * a.head_dim + d];
    float2 factors = scales_at(a.key_scales, table, a.kv_heads, kv_head);
    *(float2*)(value_scales + 2 * threadIdx.x) = scales_at(a.value_scales, table, a.kv_heads, kv_head);
    // The stream's barriers order these stores before the first use.
    for_heads(heads, Score<T>{stream, queries, a.head_dim, a.scale, factors, heads, scores});
    __syncthreads();
    int64 place = ((int64)index * a.heads + head) * a.blocks + blockIdx.x;
    for (int h = threadIdx.x / 32; h < heads; h += WARPS) {
        float maximum, sum = weigh_scores(scores + h * ATTENTION_BLOCK, span.x, span.y, a.value_scales ? value_scales : nullptr,
                                          maximum);
        if (threadIdx.x % 32 == 0) a.maxima[place + h * a.blocks] = maximum, a.sums[place + h * a.blocks] = sum;
    }
    // Pairs of the width to whole warps; what threads are left takes other heads.
    int pairs = width / 2, lanes = pairs <= 32 ? 32 : pairs <= 64 ? 64 : THREADS, share = (heads * lanes + THREADS - 1) / THREADS;
    int own = threadIdx.x / lanes * share, column = threadIdx.x % lanes * 2;
    bool active = column < width && own < heads;
    int64 stride = (int64)a.blocks * width;
    for_heads(share, Weigh<T>{stream, scores + own * ATTENTION_BLOCK, span, width, column, active, min(share, heads - own),
                              a.chains + place * width + own * stride + column, stride});
}

// Grid: blocks that a row may see, KV heads x parts of up to ``tile`` (a power of two) of their query heads, rows. With a plan of
// attention_plan.cu the rows are those ``alone``, of which there are counts[2], and blocks of threads take them in turn.
// Shared memory: see attention.py.
template <class T> __device__ void decode(const Attention& a, const int* alone, const int* counts, int tile) {
    DYNAMIC_SHARED(shared);
    int kv_head = blockIdx.y % a.kv_heads, head = a.head_starts[kv_head] + blockIdx.y / a.kv_heads * tile;
    int heads = min(a.head_starts[kv_head + 1] - head, tile), i = blockIdx.z;
    int count = alone ? counts[2] : min(*a.rows - a.first_row, (int)gridDim.z);
    do {
        // Of the first row all this is asked for at once, before it is known whether there is such a row.
        int index = alone ? alone[i] : i, row = a.first_row + index, position = a.positions[row], sequence = a.sequences[row];
        int block = first_block(position, a.window) + blockIdx.x;
        if (heads <= 0 || i >= count) return;
        if (block <= position / ATTENTION_BLOCK)
            attend<T>(a, shared, index, position, sequence, block, kv_head, head, heads, tile);
        __syncthreads();
        i += gridDim.z;
    } while (i < count);
}

#define KERNEL(name, T) \
    extern "C" __global__ void \
    __launch_bounds__(THREADS, 3) name(ATTENTION_ARGUMENTS, const int* alone, const int* counts, int tile) { \
        decode<T>({ATTENTION_OPERATION}, alone, counts, tile); \
    }

KERNEL(decode_half, uint16_t)
KERNEL(decode_float, float)
KERNEL(decode_int8, int8_t)
