// Sums and maxima over a block, the same on every thread. Of integers: any order gives the same.
#pragma once
#include "numerics.cuh"

constexpr int MOST_WARPS = 32;

// ``shared`` has a place for each warp.
template <class T> __device__ inline T block_max(T value, T* shared) {
    value = warp_max(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[0];
    for (int i = 1; i < blockDim.x / 32; i++) value = shared[i] > value ? shared[i] : value;
    return value;
}

template <class T> __device__ inline T block_sum(T value, T* shared) {
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
    for (int i = 0; i < blockDim.x / 32; i++) value += shared[i];
    return value;
}
