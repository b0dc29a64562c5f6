// Enough of CUDA C++ to compile kernels for the host and to run them there exactly, one block after the other.
//
// The threads of a block are fibers that run until they wait: at a barrier of the block, or in an instruction of their warp,
// which all 32 lanes take part in. They take turns in ascending or in descending order, so that a missing barrier shows.
// Asynchronous copies arrive as late as they may. A block that waits for what never comes ends the process with a message.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <tuple>
#include <functional>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __constant__ static const
#define __shared__ static
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulation {

[[noreturn]] inline void fail(const char* why) {
    fprintf(stderr, "emulated block (%u, %u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, why);
    abort();
}

struct Copy { void* target; const void* source; };

struct Fiber {
    ucontext_t context;                         // of its beginning
    void* place[5];                             // where it has paused: as __builtin_setjmp keeps it, without calls of the system
    bool begun = false;
    std::vector<char> stack = std::vector<char>(1 << 16);
    bool ended = false;
    int lane = 0, warp = 0;
    uint64_t slots[2][4] = {};                  // what it shows to its warp, in turns
    std::vector<Copy> copies;                   // not yet committed
    std::deque<std::vector<Copy>> groups;       // committed, not yet arrived
};

// Where all threads of a block, or of a warp, wait for each other.
struct Meeting {
    long passed = 0;                            // how often they have met
    unsigned waiting = 0, ended = 0;            // threads that wait now, and threads that will never come again
};

struct Block {
    std::vector<Fiber> fibers;
    Meeting meeting;
    std::vector<Meeting> warps;
    void* scheduler[5];
    Fiber* current = nullptr;
    long events = 0;                            // how often a thread got further
    std::function<void()> body;
    std::vector<char> shared;
};

inline Block block;

// A jump is a function of its own, of which the compiler knows nothing: it must expect any change of memory, and a return.
__attribute__((noipa)) inline void jump(void** place) { __builtin_longjmp(place, 1); }

__attribute__((noipa)) inline void pause() {
    if (!__builtin_setjmp(block.current->place)) jump(block.scheduler);
}

// Lets a thread go on until it pauses.
__attribute__((noipa)) inline void go_on(Fiber& fiber) {
    if (__builtin_setjmp(block.scheduler)) return;
    if (fiber.begun) jump(fiber.place);
    fiber.begun = true;
    setcontext(&fiber.context);
}

inline void place(unsigned number) {
    threadIdx = {number % blockDim.x, number / blockDim.x % blockDim.y, number / (blockDim.x * blockDim.y)};
}

inline void entry() {
    block.body();
    for (auto& group : block.current->groups)
        if (!group.empty()) fail("ends before its copies have arrived");
    block.current->ended = true;
    block.meeting.ended++, block.warps[block.current->warp].ended++;
    block.events++;
    pause();
}

// Returns when all ``count`` threads are there.
inline void meet(Meeting& meeting, unsigned count, const char* ended) {
    long mine = meeting.passed + 1;
    block.events++;
    if (++meeting.waiting == count) meeting.waiting = 0, meeting.passed = mine;
    while (meeting.passed < mine) {
        if (meeting.ended) fail(ended);
        pause();
    }
}

inline void barrier() { meet(block.meeting, block.fibers.size(), "a thread has ended that others wait for"); }

// Shows up to four words to the warp, and returns when all lanes have; ``lane`` tells what another one shows.
inline int exchange(const uint64_t* words, int count) {
    Meeting& warp = block.warps[block.current->warp];
    int turn = (warp.passed + 1) % 2;
    memcpy(block.current->slots[turn], words, 8 * count);
    meet(warp, 32, "a lane has ended that its warp waits for");
    return turn;
}

inline const uint64_t* lane(int turn, int number) { return block.fibers[block.current->warp * 32 + number].slots[turn]; }

template <class T> T shuffle(unsigned mask, T value, int source) {
    if (mask != ~0u) fail("only whole warps exchange values here");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof(T));
    int turn = exchange(&word, 1);
    memcpy(&value, lane(turn, source & 31), sizeof(T));
    return value;
}

inline void run_block(bool descending) {
    unsigned count = blockDim.x * blockDim.y * blockDim.z;
    block.fibers.resize(count);
    block.meeting = {}, block.warps.assign(count / 32, {});
    for (unsigned i = 0; i < count; i++) {
        Fiber& fiber = block.fibers[i];
        fiber.ended = fiber.begun = false;
        fiber.copies.clear(), fiber.groups.clear();
        fiber.lane = i % 32, fiber.warp = i / 32;
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, entry, 0);
    }
    for (unsigned ended = 0; ended < count;) {
        long before = block.events;
        ended = 0;
        for (unsigned turn = 0; turn < count; turn++) {
            unsigned number = descending ? count - 1 - turn : turn;
            Fiber& fiber = block.fibers[number];
            if (!fiber.ended) {
                place(number);
                block.current = &fiber;
                go_on(fiber);
            }
            ended += fiber.ended;
        }
        if (block.events == before && ended < count) fail(ended ? "waits for threads that have ended" : "waits for ever");
    }
}

inline void run_grid(dim3 grid, dim3 threads, size_t shared_bytes, bool descending, std::function<void()> body) {
    gridDim = grid, blockDim = threads;
    if (threads.x * threads.y * threads.z % 32) fail("a block is made of whole warps");
    block.body = std::move(body);
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
                // What nobody has written is not zero.
                block.shared.assign(shared_bytes + 16, (char)0xA5);
                run_block(descending);
            }
}

template <class... A> void launch(void (*kernel)(A...), dim3 grid, dim3 threads, size_t shared_bytes, bool descending, void** given) {
    int next = 0;
    // Braces: arguments are taken in order.
    std::tuple<A...> arguments{*(A*)given[next++]...};
    run_grid(grid, threads, shared_bytes, descending, [&] { std::apply(kernel, arguments); });
}

inline void* dynamic_shared() { return (void*)(((uintptr_t)block.shared.data() + 15) & ~(uintptr_t)15); }

inline uint32_t shared_address(const void* where) { return (uint32_t)((const char*)where - block.shared.data()); }
inline uint32_t load_shared(uint32_t address) {
    uint32_t word;
    if (address + 4 > block.shared.size()) fail("reads behind the shared memory");
    memcpy(&word, block.shared.data() + address, 4);
    return word;
}

inline uint4 aligned16(const void* where) {
    if ((uintptr_t)where % 16) fail("16 bytes are read from an address that is no multiple of 16");
    uint4 value;
    memcpy(&value, where, 16);
    return value;
}

inline void copy_async(void* shared, const void* global) {
    if ((uintptr_t)shared % 16 || (uintptr_t)global % 16) fail("16 bytes are copied between addresses that are no multiples of 16");
    block.current->copies.push_back({shared, global});
}

inline void commit_copies() {
    block.current->groups.push_back(std::move(block.current->copies));
    block.current->copies.clear();
}

inline void wait_copies(int left) {
    auto& groups = block.current->groups;
    for (; (int)groups.size() > left; groups.pop_front())
        for (auto& copy : groups.front()) memcpy(copy.target, copy.source, 16);
}

inline float half_value(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value = exponent == 31 ? (fraction ? NAN : INFINITY) : exponent ? std::ldexp(1024.0f + fraction, exponent - 25)
                                                                           : std::ldexp((float)fraction, -24);
    return bits & 0x8000 ? -value : value;
}

inline uint16_t half_bits(float value) {
    uint32_t bits, sign;
    memcpy(&bits, &value, 4);
    sign = bits >> 16 & 0x8000, bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return 0x7FFF;
    if (bits >= 0x477FF000) return sign | 0x7C00;
    if (bits < 0x38800000) return sign | (uint32_t)std::nearbyint(std::ldexp(std::fabs(value), 24));
    return sign | (bits + 0xFFF + (bits >> 13 & 1) - 0x38000000) >> 13;
}

inline int dot4(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(int8_t)(a >> 8 * i) * (int)(int8_t)(b >> 8 * i);
    return c;
}

inline void multiply_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint64_t words[3] = {a[0] | (uint64_t)a[1] << 32, a[2] | (uint64_t)a[3] << 32, b[0] | (uint64_t)b[1] << 32};
    int turn = exchange(words, 3), g = block.current->lane / 4, t = block.current->lane % 4;
    for (int i = 0; i < 4; i++) {
        int row = g + i / 2 * 8, column = 2 * t + i % 2;
        for (int part = 0; part < 2; part++)            // k below 16, and from there on
            for (int quarter = 0; quarter < 4; quarter++) {
                uint64_t left = lane(turn, row % 8 * 4 + quarter)[part];
                uint64_t right = lane(turn, column * 4 + quarter)[2];
                d[i] = dot4((int)(row < 8 ? left : left >> 32), (int)(part ? right >> 32 : right), d[i]);
            }
    }
}

inline void load_matrices(uint32_t (&tiles)[4], const void* row) {
    if ((uintptr_t)row % 16) fail("a row of a matrix at an address that is no multiple of 16");
    uint64_t word = (uint64_t)row;
    int turn = exchange(&word, 1), self = block.current->lane;
    for (int tile = 0; tile < 4; tile++)
        memcpy(&tiles[tile], (const char*)*lane(turn, tile * 8 + self / 4) + self % 4 * 4, 4);
}

}  // namespace emulation

inline void __syncthreads() { emulation::barrier(); }
inline int __syncthreads_or(int value) {
    static int any;
    emulation::barrier();
    any = 0;
    emulation::barrier();
    any |= value != 0;
    emulation::barrier();
    int found = any;
    emulation::barrier();
    return found;
}
inline void __syncwarp(unsigned = ~0u) { uint64_t nothing = 0; emulation::exchange(&nothing, 1); }
template <class T> T __shfl_sync(unsigned mask, T value, int source) { return emulation::shuffle(mask, value, source); }
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return emulation::shuffle(mask, value, emulation::block.current->lane ^ bits);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, int by) {
    int lane = emulation::block.current->lane;
    return emulation::shuffle(mask, value, lane + by < 32 ? lane + by : lane);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, int by) {
    int lane = emulation::block.current->lane;
    return emulation::shuffle(mask, value, lane >= by ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int value) {
    unsigned found = 0;
    if (mask != ~0u) emulation::fail("only whole warps exchange values here");
    uint64_t word = value != 0;
    int turn = emulation::exchange(&word, 1);
    for (int lane = 0; lane < 32; lane++) found |= (unsigned)*emulation::lane(turn, lane) << lane;
    return found;
}
inline int __any_sync(unsigned mask, int value) { return __ballot_sync(mask, value) != 0; }
inline void __threadfence() {}

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float_as_int(float value) { int bits; memcpy(&bits, &value, 4); return bits; }
inline float __int_as_float(int bits) { float value; memcpy(&value, &bits, 4); return value; }
inline uint32_t __float_as_uint(float value) { return (uint32_t)__float_as_int(value); }
inline float __uint_as_float(uint32_t bits) { return __int_as_float((int)bits); }
inline int __float2int_rn(float value) { return (int)std::nearbyint(value); }
inline float __int2float_rn(int value) { return (float)value; }
inline long long __float2ll_rn(float value) { return std::isnan(value) ? 0 : std::llrint(value); }
inline long long __double2ll_rn(double value) { return std::isnan(value) ? 0 : std::llrint(value); }
inline double __ll2double_rn(long long value) { return (double)value; }
inline float __double2float_rn(double value) { return (float)value; }
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 4; i++) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
    return c;
}
inline long long __double_as_longlong(double value) { long long bits; memcpy(&bits, &value, 8); return bits; }
inline double __longlong_as_double(long long bits) { double value; memcpy(&value, &bits, 8); return value; }
inline int __dp4a(int a, int b, int c) { return emulation::dot4(a, b, c); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    uint64_t bytes = x | (uint64_t)y << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t choice = selector >> 4 * i & 15, byte = (uint32_t)(bytes >> 8 * (choice & 7)) & 255;
        result |= (choice & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return result;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) {
    return (uint32_t)((low | (uint64_t)high << 32) >> (by & 31));
}
inline uint64_t __umul64hi(unsigned long long a, unsigned long long b) { return (uint64_t)((unsigned __int128)a * b >> 64); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value ? __builtin_clz(value) : 32; }
inline int __clzll(long long value) { return value ? __builtin_clzll(value) : 64; }
template <class T> T __ldg(const T* where) { return *where; }
template <class T> T atomicAdd(T* where, T value) { T old = *where; *where = old + value; return old; }
template <class T> T atomicOr(T* where, T value) { T old = *where; *where = old | value; return old; }
template <class T> T atomicExch(T* where, T value) { T old = *where; *where = value; return old; }
template <class T> T atomicMax(T* where, T value) { T old = *where; *where = old > value ? old : value; return old; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

// Exports a kernel for ``emulated_device.py``.
#define EXPORT(name) \
    extern "C" void launch_##name(const unsigned* sizes, size_t shared_bytes, int descending, void** arguments) { \
        emulation::launch(name, {sizes[0], sizes[1], sizes[2]}, {sizes[3], sizes[4], sizes[5]}, shared_bytes, descending, arguments); \
    }
