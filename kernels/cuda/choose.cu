// Choosing a token for each draw, with the bits of kernels/sampling.py: penalties and biases, temperature, top-k, top-p, min-p,
// and a random number from Philox. Sums of integer weights are exact, so nothing is sorted: a token is found where sums over the
// order (logit descending, token ascending) reach an amount.
//
// The order is cut into bins by the distance to the largest logit. ``adjust_rows`` makes the logits of a draw, ``count_rows`` the
// sums of each bin, all segments of all draws at once; then ``choose_rows`` goes through the sums, and through the tokens of the
// bins where they reach what is looked for. Arrays: draws [most]; adjusted float32 [most, columns] and the greatest keys of its
// segments, best int64 [most, segments]; of bins counts int32 [most, BINS], and int64 [most, 2, BINS] the sums of weights and of
// those that min-p keeps. ``rows``: how many draws there are, on the device; blocks beyond them do nothing.
#include "choose.cuh"

constexpr int THREADS = 256, COUNTED = 4 * SEGMENT, COUNT_THREADS = 512;

// Copies the logits of each draw from row draw.row of ``logits`` [.., columns], and changes them: those of draw.penalties by how
// often the answer has them, then those of draw.biases. A list names no token twice. Clears the bins. Grid: segments, draws.
extern "C" __global__ void __launch_bounds__(THREADS) adjust_rows(
        const float* logits, int columns, const Draw* draws, const int* penalized, const int* occurrences, const int* biased,
        const float* biases, const int* rows, float* adjusted, int64* best, int* counts, int64* sums) {
    __shared__ int64 greatest[MOST_WARPS];
    int number = blockIdx.y, start = blockIdx.x * SEGMENT, stop = min(start + SEGMENT, columns);
    if (number >= *rows) return;
    Draw draw = draws[number];
    const float* source = logits + (int64)draw.row * columns;
    float* target = adjusted + (int64)number * columns;
#pragma unroll 8
    for (int i = start + threadIdx.x; i < stop; i += THREADS) target[i] = source[i];
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < BINS; i += gridDim.x * THREADS) {
        counts[number * BINS + i] = 0;
        sums[2 * number * BINS + i] = sums[(2 * number + 1) * BINS + i] = 0;
    }
    __syncthreads();
    for (int i = draw.penalties[0] + threadIdx.x; i < draw.penalties[1]; i += THREADS) {
        int token = penalized[i];
        if (token < start || token >= stop) continue;
        float value = target[token], count = __int2float_rn(occurrences[i]);
        value = value > 0.0f ? value / draw.repetition : value * draw.repetition;
        value = value - draw.frequency * count;
        target[token] = count > 0.0f ? value - draw.presence : value;
    }
    __syncthreads();
    for (int i = draw.biases[0] + threadIdx.x; i < draw.biases[1]; i += THREADS)
        if (biased[i] >= start && biased[i] < stop) target[biased[i]] += biases[i];
    __syncthreads();
    int64 key = NOTHING;
#pragma unroll 8
    for (int i = start + threadIdx.x; i < stop; i += THREADS) {
        int64 other = key_of(target[i], i);
        key = other > key ? other : key;
    }
    key = block_max(key, greatest);
    if (threadIdx.x == 0) best[(int64)number * gridDim.x + blockIdx.x] = key;
}

// Counts and sums of the bins. Grid: parts of COUNTED logits, draws.
extern "C" __global__ void __launch_bounds__(COUNT_THREADS) count_rows(
        const float* adjusted, int columns, const Draw* draws, const int* rows, const int64* best, int segments, int* counts,
        int64* sums) {
    __shared__ int found[BINS];
    __shared__ Sums weights, kept;
    int number = blockIdx.y, start = blockIdx.x * COUNTED, stop = min(start + COUNTED, columns);
    if (number >= *rows || draws[number].temperature == 0.0f) return;
    Row row(draws[number], adjusted + (int64)number * columns, columns, greatest_of(best + (int64)number * segments, segments));
    for (int i = threadIdx.x; i < BINS; i += COUNT_THREADS) {
        found[i] = 0;
        weights.clear(i);
        kept.clear(i);
    }
    __syncthreads();
#pragma unroll 4
    for (int i = start + threadIdx.x; i < stop; i += COUNT_THREADS) {
        float logit = row.logits[i];
        int bin = row.bin(logit);
        int64 weight = row.weight(logit);
        atomicAdd(&found[bin], 1);
        weights.add(bin, weight);
        if (row.least > 0 && weight >= row.least) kept.add(bin, weight);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += COUNT_THREADS) {
        if (!found[i]) continue;
        atomicAdd(counts + number * BINS + i, found[i]);
        add_fixed(sums + 2 * number * BINS + i, weights.get(i));
        add_fixed(sums + (2 * number + 1) * BINS + i, kept.get(i));
    }
}

// The token of a draw with a temperature.
__device__ inline int drawn(const Draw& draw, const Row& row, const Bins& bins, Shared& s) {
    auto one = [](float) { return (int64)1; };
    auto weight = [&](float logit) { return row.weight(logit); };
    auto kept = [&](float logit) { return row.kept(logit); };
    auto count_of = [&](int bin) { return (int64)bins.counts[bin]; };
    auto weight_of = [&](int bin) { return bins.weights[bin]; };
    auto kept_of = [&](int bin) { return bins.kept[bin]; };
    // What top-k and top-p leave is a beginning of the order; an end that a larger amount reaches lies behind it.
    Beginning left = draw.top_k > 0 && draw.top_k < row.columns ? beginning(row, bins, s, count_of, one, draw.top_k)
                                                                 : before(bins, s, BINS);
    if (draw.top_p < SHARE) left = beginning(row, bins, s, weight_of, weight, max((int64)1, share_of(left.weight, draw.top_p)));
    int64 amount = (int64)__umul64hi(philox(draw.key, draw.counter), left.kept) + 1;
    Place place = find(kept_of, amount, s);
    uint64 last = last_of(row, s, place.bin, amount - place.before, kept);
    return last == ~0ull ? -1 : token_of(key_at(last));
}

// tokens, logprobs [draws]: the token of each draw, and its log-probability under the raw logits, of whose segments raw_best and
// raw_totals [.., raw_segments] tell the greatest keys and the sums. Grid: draws.
extern "C" __global__ void __launch_bounds__(1024) choose_rows(
        const float* logits, int columns, const Draw* draws, const int* rows, const float* adjusted, const int64* best,
        int segments, const int* counts, const int64* sums, const int64* raw_best, const int64* raw_totals, int raw_segments,
        int* tokens, float* logprobs) {
    __shared__ Shared s;
    int number = blockIdx.x;
    if (number >= *rows) return;
    Draw draw = draws[number];
    int64 greatest = greatest_of(best + (int64)number * segments, segments);
    int token = -1;
    if (draw.temperature != 0.0f) {
        const int64* weights = sums + 2 * number * BINS;
        Bins bins = {counts + number * BINS, weights, draw.min_p > 0 ? weights + BINS : weights};
        token = drawn(draw, Row(draw, adjusted + (int64)number * columns, columns, greatest), bins, s);
    }
    int64 total = 0;
    for (int i = threadIdx.x; i < raw_segments; i += blockDim.x) total += raw_totals[(int64)draw.row * raw_segments + i];
    total = block_sum(total, s.warps);
    float maximum = logit_of(greatest_of(raw_best + (int64)draw.row * raw_segments, raw_segments));
    if (threadIdx.x != 0) return;
    // Logits that are not finite have no draw; their status says so.
    if (token < 0) token = token_of(greatest);
    tokens[number] = token;
    logprobs[number] = log_probability(logits[(int64)draw.row * columns + token], maximum, total);
}
