// Products of a warp: 16·M rows that the warp owns, with rows that its whole block has in shared memory.
//
// 16-bit storage goes through the tensor cores (mma.sync m16n8k16, f32 sums); f32 through FMA with the same ownership of
// results, so that everything between two products is written once. With g = lane/4 and t = lane mod 4 a lane owns, of
// each 16 × 8 piece, c[0], c[1] at row g and columns 2t, 2t+1, and c[2], c[3] at row g + 8.
//
// Rows in shared memory are padded by 16 bytes: the eight rows that one ldmatrix phase reads then lie in different banks.
#pragma once

#include "device.cuh"

// Values between two rows of D values in shared memory.
template <class T>
__host__ __device__ constexpr int stride_of(int width) {
    return width + 16 / int(sizeof(T));
}

// Copies rows of `width` values into shared memory, zero from there to D and in rows for which `row` gives null. `any` is
// an address that may be named where nothing is read.
template <class T, int D, class Row>
__device__ __forceinline__ void load_rows(T* to, int rows, int width, const T* any, Row row) {
    constexpr int VALUES = 16 / int(sizeof(T)), CHUNKS = D / VALUES;
    for (int i = int(threadIdx.x); i < rows * CHUNKS; i += int(blockDim.x)) {
        const int r = i / CHUNKS, at = i % CHUNKS * VALUES;
        const T* from = row(r);
        const bool there = from != nullptr && at < width;
        copy_async(to + r * stride_of<T>(D) + at, there ? from + at : any, there ? 16u : 0u);
    }
}

// Whether 128 threads copy tiles of ROWS rows of D values in whole rounds of 16 bytes each.
template <class T, int D, int ROWS>
__device__ __forceinline__ constexpr bool even_rounds() {
    constexpr int CHUNKS = D * int(sizeof(T)) / 16;
    return 128 % CHUNKS == 0 && ROWS % (128 / CHUNKS) == 0;
}

// Copies rows of D values, `entry` values apart, into shared memory by 128 threads: one address for each thread, moved on by as
// much every time. What load_rows asks for every 16 bytes was most of what a tile cost beside its products.
template <class T, int D, int ROWS>
__device__ __forceinline__ void load_whole_rows(T* to, const T* from, long long entry) {
    constexpr int VALUES = 16 / int(sizeof(T)), CHUNKS = D / VALUES, STEP = 128 / CHUNKS;
    const int r = int(threadIdx.x) / CHUNKS, at = int(threadIdx.x) % CHUNKS * VALUES;
    from += r * entry + at;
    to += r * stride_of<T>(D) + at;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; ++i) {
        copy_async(to + i * STEP * stride_of<T>(D), from);
        from += STEP * entry;
    }
}

// c [16·M, N] = a [16·M, D] · bᵀ with b [N, D].
template <class T, int M, int N, int D>
struct RowsProduct {
    static __device__ __forceinline__ void run(float (&c)[M][N / 8][4], const T* a, const T* b) {
        constexpr int LD = stride_of<T>(D);
        const int lane = int(threadIdx.x) % 32;
        const T* const a_row = a + (lane % 16) * LD + lane / 16 * 8;
        const T* const b_row = b + (lane % 8 + lane / 16 * 8) * LD + lane / 8 % 2 * 8;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
#pragma unroll
        for (int k = 0; k < D; k += 16) {
            unsigned left[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) load_matrices<false>(left[m], a_row + m * 16 * LD + k);
#pragma unroll
            for (int n = 0; n < N; n += 16) {
                unsigned words[4];
                load_matrices<false>(words, b_row + n * LD + k);
                const unsigned first[2] = {words[0], words[1]}, second[2] = {words[2], words[3]};
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply<T>(c[m][n / 8], left[m], first);
                    multiply<T>(c[m][n / 8 + 1], left[m], second);
                }
            }
        }
    }
};

template <int M, int N, int D>
struct RowsProduct<float, M, N, D> {
    static __device__ __forceinline__ void run(float (&c)[M][N / 8][4], const float* a, const float* b) {
        constexpr int LD = stride_of<float>(D);
        const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
#pragma unroll 2
        for (int k = 0; k < D; k += 4) {
            float4 left[M][2];
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    left[m][r] = *reinterpret_cast<const float4*>(a + (m * 16 + r * 8 + g) * LD + k);
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float4 right = *reinterpret_cast<const float4*>(b + (n * 8 + 2 * t + e) * LD + k);
#pragma unroll
                    for (int m = 0; m < M; ++m)
#pragma unroll
                        for (int r = 0; r < 2; ++r) {
                            float& sum = c[m][n][2 * r + e];
                            sum = fmaf(left[m][r].x, right.x, sum);
                            sum = fmaf(left[m][r].y, right.y, sum);
                            sum = fmaf(left[m][r].z, right.z, sum);
                            sum = fmaf(left[m][r].w, right.w, sum);
                        }
                }
        }
    }
};

// o [16·M, P] += p [16·M, N] · b [N, P] with p as RowsProduct leaves it, rounded to T on the way; rows of b are `LD` apart.
template <class T, int M, int N, int P, int LD>
struct WeightedSum {
    static __device__ __forceinline__ void run(float (&o)[M][P / 8][4], const float (&p)[M][N / 8][4], const T* b) {
        const int lane = int(threadIdx.x) % 32;
        const T* const b_row = b + (lane % 16) * LD + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < N; k += 16) {
            // Two neighbouring pieces of a result are, lane by lane, one left operand.
            unsigned left[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float(&piece)[4] = p[m][k / 8 + i / 2];
                    left[m][i] = pack<T>(piece[i % 2 * 2], piece[i % 2 * 2 + 1]);
                }
#pragma unroll
            for (int n = 0; n < P; n += 16) {
                unsigned words[4];
                load_matrices<true>(words, b_row + k * LD + n);
                const unsigned first[2] = {words[0], words[1]}, second[2] = {words[2], words[3]};
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply<T>(o[m][n / 8], left[m], first);
                    multiply<T>(o[m][n / 8 + 1], left[m], second);
                }
            }
        }
    }
};

template <int M, int N, int P, int LD>
struct WeightedSum<float, M, N, P, LD> {
    static __device__ __forceinline__ void run(float (&o)[M][P / 8][4], const float (&p)[M][N / 8][4], const float* b) {
        const int lane = int(threadIdx.x) % 32, t = lane % 4;
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int key = 0; key < 8; ++key) {
                // The lane of the same rows that owns this key's column.
                const int owner = lane / 4 * 4 + key / 2;
                const float* const row = b + (n * 8 + key) * LD + 2 * t;
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    const float top = __shfl_sync(~0u, p[m][n][key % 2], owner);
                    const float bottom = __shfl_sync(~0u, p[m][n][2 + key % 2], owner);
#pragma unroll
                    for (int j = 0; j < P / 8; ++j) {
                        const float2 value = *reinterpret_cast<const float2*>(row + 8 * j);
                        o[m][j][0] = fmaf(top, value.x, o[m][j][0]);
                        o[m][j][1] = fmaf(top, value.y, o[m][j][1]);
                        o[m][j][2] = fmaf(bottom, value.x, o[m][j][2]);
                        o[m][j][3] = fmaf(bottom, value.y, o[m][j][3]);
                    }
                }
            }
    }
};

// Two neighbouring values to global memory.
template <class T>
__device__ __forceinline__ void put_pair(T* to, float first, float second) {
    *reinterpret_cast<unsigned*>(to) = pack<T>(first, second);
}
template <>
__device__ __forceinline__ void put_pair<float>(float* to, float first, float second) {
    *reinterpret_cast<float2*>(to) = float2{first, second};
}
