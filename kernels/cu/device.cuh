// What the kernels need of the device: storage types, matrix fragments, asynchronous copies, sums over a warp.
//
// On a GPU each is a line of PTX (ISA 7.0, from sm_80 on); without nvcc the same names come from emulate/device.h.
#pragma once

#ifdef __CUDACC_RTC__
// NVRTC compiles without the host's headers, and these are in math.h.
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#endif
#ifdef __CUDACC__
#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "emulate/device.h"
#define SHARED(name) unsigned char* const name = emulated::block()->shared
#endif

// Storage types: bits here, computed with in f32.
struct Bf16 {
    unsigned short bits;
};
struct F16 {
    unsigned short bits;
};

#ifdef __CUDACC__

__device__ __forceinline__ float get(float x) { return x; }
__device__ __forceinline__ float get(Bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
__device__ __forceinline__ float get(F16 x) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
}

// Two values rounded to nearest even, the first one in the lower half.
template <class T>
__device__ __forceinline__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<Bf16>(float low, float high) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
template <>
__device__ __forceinline__ unsigned pack<F16>(float low, float high) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// 2^x; results below 2⁻¹²⁶ are 0.
__device__ __forceinline__ float power2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes from global to shared memory.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    const unsigned at = unsigned(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
// 4 bytes.
__device__ __forceinline__ void copy_word_async(void* to, const void* from) {
    const unsigned at = unsigned(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(from) : "memory");
}
// 16 bytes from global to shared memory, of which `bytes` (0 or 16) are read and the rest becomes zero.
__device__ __forceinline__ void copy_async(void* to, const void* from, unsigned bytes) {
    const unsigned at = unsigned(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8×8 matrices of 16-bit values; lane l gives row l mod 8 of matrix l/8.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(unsigned (&out)[4], const void* row) {
    const unsigned at = unsigned(__cvta_generic_to_shared(row));
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(at)
                     : "memory");
}

// c [16, 8] += a [16, 16] · b [16, 8].
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <>
__device__ __forceinline__ void multiply<Bf16>(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply<F16>(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

inline float get(float x) { return x; }
inline float get(Bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline float get(F16 x) {
    const unsigned sign = unsigned(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | fraction << 13);
    // Below 2⁻¹⁴ the fraction counts steps of 2⁻²⁴.
    const float size = exponent ? std::ldexp(float(1024 + fraction), int(exponent) - 25) : std::ldexp(float(fraction), -24);
    return sign ? -size : size;
}
inline unsigned bits_of_bf16(float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned bits_of_f16(float x) {
    const unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
    const float size = std::fabs(x);
    if (x != x) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size == 0.0f) return sign;
    int exponent;
    std::frexp(size, &exponent);
    // In units of the last place; nearbyint rounds ties to even. A carry moves on into the exponent by itself.
    const int place = exponent - 11 < -24 ? -24 : exponent - 11;
    const unsigned steps = unsigned(std::nearbyint(std::ldexp(size, -place)));
    return sign | (place == -24 ? steps : (unsigned(place + 25) << 10) + steps - 1024);
}
template <class T>
inline unsigned pack(float low, float high);
template <>
inline unsigned pack<Bf16>(float low, float high) {
    return bits_of_bf16(low) | bits_of_bf16(high) << 16;
}
template <>
inline unsigned pack<F16>(float low, float high) {
    return bits_of_f16(low) | bits_of_f16(high) << 16;
}
inline float power2(float x) {
    const float y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}
inline void copy_async(void* to, const void* from) { emulated::copy_later(to, from, 16); }
inline void copy_word_async(void* to, const void* from) { emulated::copy_later(to, from, 4, 4); }
inline void copy_async(void* to, const void* from, unsigned bytes) { emulated::copy_later(to, from, bytes); }
inline void commit_copies() { emulated::commit_copies(); }
template <int PENDING>
inline void wait_for_copies() {
    emulated::wait_for_copies(PENDING);
}
template <bool TRANSPOSED>
inline void load_matrices(unsigned (&out)[4], const void* row) {
    emulated::load_matrices(out, row, TRANSPOSED);
}
inline float read_bf16(uint16_t bits) { return get(Bf16{bits}); }
inline float read_f16(uint16_t bits) { return get(F16{bits}); }
template <class T>
inline void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <>
inline void multiply<Bf16>(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulated::multiply<read_bf16>(c, a, b);
}
template <>
inline void multiply<F16>(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulated::multiply<read_f16>(c, a, b);
}

#endif

// The nearest value of a storage type.
template <class T>
__device__ __forceinline__ T put(float x) {
    return T{static_cast<unsigned short>(pack<T>(x, 0.0f))};
}
template <>
__device__ __forceinline__ float put<float>(float x) {
    return x;
}

// Σ over the 32 lanes, the same bytes in every one of them.
__device__ __forceinline__ float warp_sum(float x) {
    for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(~0u, x, by);
    return x;
}

// The greatest of the 32 lanes' values that is a number.
__device__ __forceinline__ float warp_max(float x) {
    for (int by = 16; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, by));
    return x;
}

// Σ over the block, in a fixed order, the same bytes in every thread. `scratch` holds 32 values and may be used again at
// once: nothing is written to it before all have read what the last call left.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += scratch[warp];
    return sum;
}

// The greatest value of the block that is a number.
__device__ __forceinline__ float block_max(float x, float* scratch) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float greatest = -INFINITY;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) greatest = fmaxf(greatest, scratch[warp]);
    return greatest;
}

// Neighbouring values that are read and written at once.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
    T values[V];
};
template <int V, class T>
__device__ __forceinline__ Vector<T, V> load(const T* from) {
    return *reinterpret_cast<const Vector<T, V>*>(from);
}
template <int V, class T>
__device__ __forceinline__ void store(T* to, const Vector<T, V>& values) {
    *reinterpret_cast<Vector<T, V>*>(to) = values;
}

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
