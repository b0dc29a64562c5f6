// What the arithmetic of a GPU reaches at most: multiply-adds of float32 in registers.
#include "numerics.cuh"

constexpr int THREADS = 256, CHAINS = 8;

// out: float32 [threads of all blocks], the sum of a thread's chains, each of ``steps`` multiply-adds: independent ones, so that
// each can start before the one before it is done.
extern "C" __global__ void __launch_bounds__(THREADS) multiply_add(int steps, float factor, float* out) {
    float chains[CHAINS];
#pragma unroll
    for (int i = 0; i < CHAINS; i++) chains[i] = (float)(threadIdx.x + i);
#pragma unroll 16
    for (int step = 0; step < steps; step++)
#pragma unroll
        for (int i = 0; i < CHAINS; i++) chains[i] = __fmaf_rn(chains[i], factor, factor);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < CHAINS; i++) sum += chains[i];
    out[blockIdx.x * THREADS + threadIdx.x] = sum;
}
