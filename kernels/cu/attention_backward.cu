// Attention, backward: probabilities are found again from the log-sum-exp.
//
// Source: Dao 2023. With P = e^(scale·QKᵀ − lse) and δ_i = Σ_d dO_id·O_id:
//   dV = PᵀdO,   dS = P∘(dO·Vᵀ − δ),   dQ = scale·dS·K,   dK = scale·dSᵀQ.
//
// Three kernels, in this order: attention_delta for δ; attention_queries for dQ, over keys; attention_keys for dK and dV,
// over the queries of all heads that share a kv head. Scores are computed in both of the latter: seven products instead of
// five, for sums in a fixed order and without a gradient in memory that many blocks add to.
//
// In the last one a warp owns keys and has scores transposed (K·Qᵀ), so that P and dS are left operands as they come.
#include "attention.cuh"

// δ [B, T, H]: a warp per query and head. Grid: B·T·H / warps of a block.
template <class T>
__device__ void delta(const AttentionArgs& x, int batch) {
    const long long at = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (at >= (long long)batch * x.entries * x.heads) return;
    const int lane = int(threadIdx.x) % 32;
    const int head = int(at % x.heads), i = int(at / x.heads % x.entries);
    const long long b = at / x.heads / x.entries;
    const T* const out = static_cast<const T*>(x.out) + at * x.width;
    const T* const d_out = static_cast<const T*>(x.d_out.data) + b * x.d_out.row + i * x.d_out.entry + head * x.d_out.head;
    float sum = 0.0f;
    for (int d = lane; d < x.width; d += 32) sum = fmaf(get(out[d]), get(d_out[d]), sum);
    sum = warp_sum(sum);
    if (lane == 0) x.delta[at] = sum;
}

// A query that saw nothing has no log-sum-exp; any finite value will do.
__device__ __forceinline__ float in_powers(float lse) { return lse == -INFINITY ? 0.0f : lse * LOG2_E; }

// Nothing comes of scores that are not seen, whatever they are.
template <int N, class Seen>
__device__ __forceinline__ void hide(float (&p)[N / 8][4], float (&ds)[N / 8][4], Seen seen) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (!seen(n, i)) {
                p[n][i] = ds[n][i] = 0.0f;
            }
}

// dQ. Grid: [blocks of queries, H, B]; threads: 32 to 32·BACKWARD_WARPS; shared memory: Sizes::queries_bytes.
template <class T, int D>
__device__ void queries(const AttentionArgs& x) {
    using S = Sizes<T, D>;
    constexpr int N = S::BACKWARD_KEYS, LD = S::LD;
    static_assert(S::queries_bytes(S::BACKWARD_WARPS) <= SHARED_LIMIT, "a block fits into a processor");
    SHARED(memory);
    const int block = 16 * int(blockDim.x / 32), warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const Row row(x, int(blockIdx.z), int(blockIdx.y));
    const int first = int(gridDim.x - 1 - blockIdx.x) * block, end = min(first + block, row.length);
    T* const q = reinterpret_cast<T*>(memory);
    T* const d_out = q + block * LD;
    const Pair<T, D, N> tiles{d_out + block * LD};

    const int mine = first + warp * 16 + lane / 4;
    int lo[2], hi[2];
    float lse[2], delta[2], place[2], dq[1][D / 8][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int i = mine + r * 8;
        const bool valid = i < end;
        lo[r] = valid ? row.lo[i] : 0;
        hi[r] = valid ? row.hi[i] : 0;
        lse[r] = valid ? in_powers(x.lse[row.at(x, i)]) : 0.0f;
        delta[r] = valid ? x.delta[row.at(x, i)] : 0.0f;
        place[r] = valid ? row.place(x, row.split + i) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) dq[0][j][i] = 0.0f;

    if (first < end) {
        const int from = row.lo[first], to = row.hi[end - 1];
        // Between these every query of the block sees every key.
        const int clear_from = row.lo[end - 1], clear_to = row.hi[first];
        const Powers powers(x.scale, row.slope);
        const int count = from < to ? (to - from + N - 1) / N : 0;
        const T* const any = static_cast<const T*>(x.q.data);
        load_rows<T, D>(q, block, x.width, any, [&](int r) -> const T* {
            return first + r < end ? row.query<T>(x.q, first + r) : nullptr;
        });
        load_rows<T, D>(d_out, block, x.width, any, [&](int r) -> const T* {
            return first + r < end ? row.query<T>(x.d_out, first + r) : nullptr;
        });
        load_keys<T, D, N>(tiles, 0, x, row, from, to);
        commit_copies();
        for (int number = 0; number < count; ++number) {
            const int stage = number % 2, at = from + number * N;
            if (number + 1 < count) {
                load_keys<T, D, N>(tiles, stage ^ 1, x, row, at + N, to);
                commit_copies();
                wait_for_copies<1>();
            } else {
                wait_for_copies<0>();
            }
            __syncthreads();
            float p[1][N / 8][4], ds[1][N / 8][4];
            RowsProduct<T, 1, N, D>::run(p, q + warp * 16 * LD, tiles.first(stage));
            RowsProduct<T, 1, N, D>::run(ds, d_out + warp * 16 * LD, tiles.second(stage));
            const auto key_of = [&](int n, int i) { return at + n * 8 + lane % 4 * 2 + i % 2; };
            const auto seen = [&](int n, int i) { return lo[i / 2] <= key_of(n, i) && key_of(n, i) < hi[i / 2]; };
            if (powers.first) {
#pragma unroll
                for (int n = 0; n < N / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float there = seen(n, i) ? row.place(x, key_of(n, i)) : 0.0f;
                        p[0][n][i] = p[0][n][i] * powers.factor - row.slope * fabsf(there - place[i / 2]);
                    }
            }
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float e = power2(fmaf(p[0][n][i], powers.unit, -lse[i / 2]));
                    ds[0][n][i] = e * (ds[0][n][i] - delta[i / 2]);
                }
            if (at < clear_from || at + N > clear_to) hide<N>(p[0], ds[0], seen);
            WeightedSum<T, 1, N, D, LD>::run(dq, ds, tiles.first(stage));
            // The next round fills the stage that was read here.
            __syncthreads();
        }
        wait_for_copies<0>();
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int i = mine + r * 8;
        if (i >= x.entries) continue;
        T* const out = static_cast<T*>(x.dq) + row.at(x, i) * x.width + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
            if (j * 8 < x.width)
                put_pair<T>(out + j * 8, dq[0][j][2 * r] * x.scale, dq[0][j][2 * r + 1] * x.scale);
    }
}

// What is known of a tile's queries besides their rows, the log-sum-exp as forward left it.
template <int QUERIES>
struct Known {
    float* memory;
    __device__ __forceinline__ float* lse(int stage) const { return memory + stage * 4 * QUERIES; }
    __device__ __forceinline__ float* delta(int stage) const { return lse(stage) + QUERIES; }
    __device__ __forceinline__ int* lo(int stage) const { return reinterpret_cast<int*>(lse(stage) + 2 * QUERIES); }
    __device__ __forceinline__ int* hi(int stage) const { return reinterpret_cast<int*>(lse(stage) + 3 * QUERIES); }
};

// The first i below `length` for which bound[i] >= least, as bounds never fall.
__device__ __forceinline__ int first_at_least(const int* bound, int length, int least) {
    int low = 0, high = length;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (bound[middle] >= least)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

// Queries `from`.. below `to`, with what is known of them; the rest are zeros that see nothing.
template <class T, int D, int QUERIES>
__device__ __forceinline__ void load_queries(const Pair<T, D, QUERIES>& tiles, const Known<QUERIES>& known, int stage,
                                             const AttentionArgs& x, const Row& row, int from, int to) {
    if constexpr (even_rounds<T, D, QUERIES>()) {
        if (from + QUERIES <= to && x.width == D && blockDim.x == 128) {
            load_whole_rows<T, D, QUERIES>(tiles.first(stage), row.query<T>(x.q, from), x.q.entry);
            load_whole_rows<T, D, QUERIES>(tiles.second(stage), row.query<T>(x.d_out, from), x.d_out.entry);
            const int r = int(threadIdx.x);
            if (r < QUERIES) {
                const long long at = row.at(x, from + r);
                copy_word_async(known.lse(stage) + r, x.lse + at);
                copy_word_async(known.delta(stage) + r, x.delta + at);
                copy_word_async(known.lo(stage) + r, row.lo + from + r);
                copy_word_async(known.hi(stage) + r, row.hi + from + r);
            }
            return;
        }
    }
    const T* const any = static_cast<const T*>(x.q.data);
    load_rows<T, D>(tiles.first(stage), QUERIES, x.width, any, [&](int r) -> const T* {
        return from + r < to ? row.query<T>(x.q, from + r) : nullptr;
    });
    load_rows<T, D>(tiles.second(stage), QUERIES, x.width, any, [&](int r) -> const T* {
        return from + r < to ? row.query<T>(x.d_out, from + r) : nullptr;
    });
    for (int r = int(threadIdx.x); r < QUERIES; r += int(blockDim.x)) {
        const int i = from + r;
        const bool valid = i < to;
        known.lse(stage)[r] = valid ? x.lse[row.at(x, i)] : 0.0f;
        known.delta(stage)[r] = valid ? x.delta[row.at(x, i)] : 0.0f;
        known.lo(stage)[r] = valid ? row.lo[i] : 0;
        known.hi(stage)[r] = valid ? row.hi[i] : 0;
    }
}

// dK and dV. Grid: [blocks of the rows' own keys · D/COLUMNS, Hkv, B]; threads: 32 to 32·BACKWARD_WARPS; shared memory:
// Sizes::keys_bytes. Where D is wider than COLUMNS, blocks next to each other make the parts of the same rows.
template <class T, int D>
__device__ void keys(const AttentionArgs& x) {
    using S = Sizes<T, D>;
    constexpr int N = S::BACKWARD_QUERIES, LD = S::LD, P = S::COLUMNS, PARTS = D / P;
    static_assert(S::keys_bytes(S::BACKWARD_WARPS) <= SHARED_LIMIT, "a block fits into a processor");
    SHARED(memory);
    const int block = 16 * int(blockDim.x / 32), warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const int b = int(blockIdx.z), kv_head = int(blockIdx.y), group = x.heads / x.kv_heads;
    const int first = int(blockIdx.x / PARTS) * block, column = int(blockIdx.x % PARTS) * P;
    T* const k = reinterpret_cast<T*>(memory);
    T* const v = k + block * LD;
    const Pair<T, D, N> tiles{v + block * LD};
    const Known<N> known{reinterpret_cast<float*>(tiles.first(2))};
    const int mine = first + warp * 16 + lane / 4;

    float dk[1][P / 8][4], dv[1][P / 8][4];
#pragma unroll
    for (int j = 0; j < P / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) dk[0][j][i] = dv[0][j][i] = 0.0f;

    {
        const Row row(x, b, kv_head * group);
        const T* const any = static_cast<const T*>(x.k.data);
        load_rows<T, D>(k, block, x.width, any, [&](int r) -> const T* {
            return first + r < row.length ? row.key<T>(x.k, x.document_k, row.split + first + r) : nullptr;
        });
        load_rows<T, D>(v, block, x.width, any, [&](int r) -> const T* {
            return first + r < row.length ? row.key<T>(x.v, x.document_v, row.split + first + r) : nullptr;
        });
        commit_copies();
    }
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        const Row row(x, b, head);
        const int end = min(first + block, row.length);
        if (first >= end) break;
        const Powers powers(x.scale, row.slope);
        const int from = first_at_least(row.hi, row.length, row.split + first + 1);
        const int to = first_at_least(row.lo, row.length, row.split + end);
        const int count = from < to ? (to - from + N - 1) / N : 0;
        if (count > 0) {
            load_queries<T, D, N>(tiles, known, 0, x, row, from, to);
            commit_copies();
        }
        for (int number = 0; number < count; ++number) {
            const int stage = number % 2, at = from + number * N;
            if (number + 1 < count) {
                load_queries<T, D, N>(tiles, known, stage ^ 1, x, row, at + N, to);
                commit_copies();
                wait_for_copies<1>();
            } else {
                wait_for_copies<0>();
            }
            __syncthreads();
            float p[1][N / 8][4], ds[1][N / 8][4];
            RowsProduct<T, 1, N, D>::run(p, k + warp * 16 * LD, tiles.first(stage));
            RowsProduct<T, 1, N, D>::run(ds, v + warp * 16 * LD, tiles.second(stage));
            const int *const lo = known.lo(stage), *const hi = known.hi(stage);
            const auto query_of = [&](int n, int i) { return n * 8 + lane % 4 * 2 + i % 2; };
            const auto key_of = [&](int i) { return row.split + mine + i / 2 * 8; };
            const auto seen = [&](int n, int i) { return lo[query_of(n, i)] <= key_of(i) && key_of(i) < hi[query_of(n, i)]; };
            if (powers.first) {
#pragma unroll
                for (int n = 0; n < N / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float away = 0.0f;
                        if (seen(n, i)) away = row.place(x, key_of(i)) - row.place(x, row.split + at + query_of(n, i));
                        p[0][n][i] = p[0][n][i] * powers.factor - row.slope * fabsf(away);
                    }
            }
#pragma unroll
            for (int n = 0; n < N / 8; ++n) {
                const float2 lse = *reinterpret_cast<const float2*>(known.lse(stage) + query_of(n, 0));
                const float2 delta = *reinterpret_cast<const float2*>(known.delta(stage) + query_of(n, 0));
                const float against[2] = {in_powers(lse.x), in_powers(lse.y)}, less[2] = {delta.x, delta.y};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float e = power2(fmaf(p[0][n][i], powers.unit, -against[i % 2]));
                    p[0][n][i] = e;
                    ds[0][n][i] = e * (ds[0][n][i] - less[i % 2]);
                }
            }
            // Bounds never fall: the first query sees the least far, the last one begins the latest.
            const int last = min(to - at, N) - 1;
            if (lo[last] > row.split + first || hi[0] < row.split + first + block) hide<N>(p[0], ds[0], seen);
            WeightedSum<T, 1, N, P, LD>::run(dv, p, tiles.second(stage) + column);
            WeightedSum<T, 1, N, P, LD>::run(dk, ds, tiles.first(stage) + column);
            // The next round, or the next head, fills the stage that was read here.
            __syncthreads();
        }
    }
    // Without a query that sees these keys they are still on their way.
    wait_for_copies<0>();

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int i = mine + r * 8;
        if (i >= x.entries) continue;
        const long long at = (((long long)b * x.entries + i) * x.kv_heads + kv_head) * x.width + column + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < P / 8; ++j)
            if (column + j * 8 < x.width) {
                put_pair<T>(static_cast<T*>(x.dk) + at + j * 8, dk[0][j][2 * r] * x.scale, dk[0][j][2 * r + 1] * x.scale);
                put_pair<T>(static_cast<T*>(x.dv) + at + j * 8, dv[0][j][2 * r], dv[0][j][2 * r + 1]);
            }
    }
}

#define BACKWARD(T, name, D)                                                                                \
    extern "C" __global__ void __launch_bounds__(128) attention_queries_##name##_##D(const AttentionArgs x) { \
        queries<T, D>(x);                                                                                   \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(128) attention_keys_##name##_##D(const AttentionArgs x) {  \
        keys<T, D>(x);                                                                                      \
    }
#define BACKWARDS(T, name)                                                                                \
    extern "C" __global__ void __launch_bounds__(256) attention_delta_##name(const AttentionArgs x, int batch) { \
        delta<T>(x, batch);                                                                               \
    }                                                                                                     \
    BACKWARD(T, name, 32)                                                                                 \
    BACKWARD(T, name, 64) BACKWARD(T, name, 96) BACKWARD(T, name, 128) BACKWARD(T, name, 256)

BACKWARDS(Bf16, bf16)
BACKWARDS(F16, f16)
BACKWARDS(float, f32)
