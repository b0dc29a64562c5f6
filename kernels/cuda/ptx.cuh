// Instructions that CUDA C++ has no function for, each with a twin in plain C++ for hosts that emulate a GPU.
#pragma once

#ifdef LLAMA_HPC_EMULATION
#include "cuda_emulation.h"
#else
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
#endif

// 16 bytes that are read once: past the first-level cache. The address is a multiple of 16.
__device__ inline uint4 load_once(const void* where) {
#ifdef LLAMA_HPC_EMULATION
    return emulation::aligned16(where);
#else
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(where));
    return v;
#endif
}

// The float32 with the value of float16 bits, and the float16 nearest to a float32 (half to even; infinity beyond).
__device__ inline float half_value(uint16_t bits) {
#ifdef LLAMA_HPC_EMULATION
    return emulation::half_value(bits);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
}

__device__ inline uint16_t half_bits(float value) {
#ifdef LLAMA_HPC_EMULATION
    return emulation::half_bits(value);
#else
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#endif
}

// Copies of 16 bytes to shared memory that run beside other work: they are there when the last but N groups that this thread
// has committed are waited for, and the block has met. Both addresses are multiples of 16.
__device__ inline void copy_async(void* shared, const void* global) {
#ifdef LLAMA_HPC_EMULATION
    emulation::copy_async(shared, global);
#elif __CUDA_ARCH__ >= 800
    uint32_t target = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(target), "l"(global) : "memory");
#else
    *(uint4*)shared = *(const uint4*)global;
#endif
}

__device__ inline void commit_copies() {
#ifdef LLAMA_HPC_EMULATION
    emulation::commit_copies();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int N> __device__ inline void wait_copies() {
#ifdef LLAMA_HPC_EMULATION
    emulation::wait_copies(N);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
#endif
}

// d += a b on integer tensor cores: a int8 [16, 32], b int8 [32, 8], d int32 [16, 8], spread over a warp as PTX says of
// mma.m16n8k32. With g = lane / 4 and t = lane % 4: a[0] holds row g, k 4t to 4t + 3; a[1] row g + 8; a[2], a[3] the same for
// k + 16; b[0] column g, k 4t to 4t + 3, b[1] k + 16; d[0], d[1] row g, columns 2t and 2t + 1; d[2], d[3] row g + 8.
__device__ inline void multiply_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef LLAMA_HPC_EMULATION
    emulation::multiply_int8(d, a, b);
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
    // Four products of [8, 16] and [16, 8], of which PTX deals rows and columns to lanes in the same way.
    for (int half = 0; half < 2; half++)
        for (int part = 0; part < 2; part++)
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(d[2 * half]), "+r"(d[2 * half + 1]) : "r"(a[2 * part + half]), "r"(b[part]));
#endif
}

// Four 8x8 tiles of 16-bit elements from shared memory: lane l gives the address of row l % 8 of tile l / 8.
__device__ inline void load_matrices(uint32_t (&tiles)[4], const void* row) {
#ifdef LLAMA_HPC_EMULATION
    emulation::load_matrices(tiles, row);
#else
    uint32_t source = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3]) : "r"(source) : "memory");
#endif
}

// Words of shared memory by 32-bit addresses, which integer instructions make.
__device__ inline uint32_t shared_address(const void* where) {
#ifdef LLAMA_HPC_EMULATION
    return emulation::shared_address(where);
#else
    return (uint32_t)__cvta_generic_to_shared(where);
#endif
}

__device__ inline uint32_t load_shared(uint32_t address) {
#ifdef LLAMA_HPC_EMULATION
    return emulation::load_shared(address);
#else
    uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
    return word;
#endif
}

// The shared memory whose size a launch gives, at a multiple of 16.
#ifdef LLAMA_HPC_EMULATION
#define DYNAMIC_SHARED(name) unsigned char* name = (unsigned char*)emulation::dynamic_shared()
#else
#define DYNAMIC_SHARED(name) extern __shared__ uint4 name##_words[]; unsigned char* name = (unsigned char*)name##_words
#endif
