// Attention, forward: softmax(scale·QKᵀ)·V over the keys that each query sees, and the log-sum-exp of each query.
//
// Per query, over tiles of keys in ascending order: top is the largest score so far, total = Σ 2^(score − top) and
// o = Σ 2^(score − top)·v, with scores in powers of two; a larger top rescales what was gathered. The result is o / total,
// and lse = (top + log2 total)·ln 2. Scores are made of products (one multiply-add) where the power is taken; masks and slopes
// have loops of their own, which most tiles and most models do without. A query that sees nothing gets zeros and −infinity; one past its row's length gets
// zeros in both, as on the CPU.
//
// Grid: [blocks of queries, H, B]; threads: 32 to 32·FORWARD_WARPS; shared memory: Sizes::forward_bytes.
#include "attention.cuh"

template <class T, int D>
__device__ void forward(const AttentionArgs& x) {
    using S = Sizes<T, D>;
    constexpr int M = S::FORWARD_PIECES, N = S::FORWARD_KEYS, LD = S::LD;
    static_assert(S::forward_bytes(S::FORWARD_WARPS) <= SHARED_LIMIT, "a block fits into a processor");
    SHARED(memory);
    const int block = 16 * M * int(blockDim.x / 32), warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const Row row(x, int(blockIdx.z), int(blockIdx.y));
    // The last queries see the most: they start first, so that no processor is left with one of them at the end.
    const int first = int(gridDim.x - 1 - blockIdx.x) * block, end = min(first + block, row.length);

    T* const q = reinterpret_cast<T*>(memory);
    const Pair<T, D, N> tiles{q + block * LD};
    const int mine = first + warp * 16 * M + lane / 4;
    int lo[M][2], hi[M][2];
    // top in products.
    float top[M][2], total[M][2], place[M][2], o[M][D / 8][4];
    const Powers powers(x.scale, row.slope);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = mine + m * 16 + r * 8;
            lo[m][r] = i < end ? row.lo[i] : 0;
            hi[m][r] = i < end ? row.hi[i] : 0;
            place[m][r] = i < end ? row.place(x, row.split + i) : 0.0f;
            top[m][r] = -INFINITY;
            total[m][r] = 0.0f;
        }
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[m][j][i] = 0.0f;
    }

    if (first < end) {
        const int from = row.lo[first], to = row.hi[end - 1];
        // Between these every query of the block sees every key.
        const int clear_from = row.lo[end - 1], clear_to = row.hi[first];
        const int count = from < to ? (to - from + N - 1) / N : 0;
        load_rows<T, D>(q, block, x.width, static_cast<const T*>(x.q.data), [&](int r) -> const T* {
            return first + r < end ? row.query<T>(x.q, first + r) : nullptr;
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
            float p[M][N / 8][4];
            RowsProduct<T, M, N, D>::run(p, q + warp * 16 * M * LD, tiles.first(stage));
            const auto key_of = [&](int n, int i) { return at + n * 8 + lane % 4 * 2 + i % 2; };
            const auto seen = [&](int m, int n, int i) {
                return lo[m][i / 2] <= key_of(n, i) && key_of(n, i) < hi[m][i / 2];
            };
            if (powers.first) {
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int n = 0; n < N / 8; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const float there = seen(m, n, i) ? row.place(x, key_of(n, i)) : 0.0f;
                            p[m][n][i] = p[m][n][i] * powers.factor - row.slope * fabsf(there - place[m][i / 2]);
                        }
            }
            if (at < clear_from || at + N > clear_to) {
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int n = 0; n < N / 8; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            if (!seen(m, n, i)) p[m][n][i] = -INFINITY;
            }
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float greatest = -INFINITY;
#pragma unroll
                    for (int n = 0; n < N / 8; ++n)
#pragma unroll
                        // NaN loses here, and shows up in the sum instead.
                        for (int e = 0; e < 2; ++e) greatest = fmaxf(greatest, p[m][n][2 * r + e]);
                    greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, 1));
                    greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, 2));
                    const float now = fmaxf(top[m][r], greatest);
                    // Scores that are all −infinity so far are 0 against any finite top.
                    const float against = now == -INFINITY ? 0.0f : __fmul_rn(now, powers.unit);
                    // Rounded as `against` is: contracted into one operation, a top that stays would rescale what was gathered by
                    // its rounding error in every tile.
                    const float keep = power2(__fmul_rn(top[m][r], powers.unit) - against);
                    top[m][r] = now;
                    float sum = 0.0f;
#pragma unroll
                    for (int n = 0; n < N / 8; ++n)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            float& score = p[m][n][2 * r + e];
                            score = power2(fmaf(score, powers.unit, -against));
                            sum += score;
                        }
                    total[m][r] = total[m][r] * keep + sum;
#pragma unroll
                    for (int j = 0; j < D / 8; ++j) {
                        o[m][j][2 * r] *= keep;
                        o[m][j][2 * r + 1] *= keep;
                    }
                }
            WeightedSum<T, M, N, D, LD>::run(o, p, tiles.second(stage));
            // The next round fills the stage that was read here.
            __syncthreads();
        }
        // A row without keys has copies of its own on the way.
        wait_for_copies<0>();
    }

#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = mine + m * 16 + r * 8;
            float sum = total[m][r];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (i >= x.entries) continue;
            // A row past its length has gathered whatever there was.
            const bool there = i < end && sum != 0.0f;
            const float inverse = there ? 1.0f / sum : 0.0f;
            const long long at = row.at(x, i);
            T* const out = static_cast<T*>(x.out) + at * x.width + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < D / 8; ++j)
                if (j * 8 < x.width)
                    put_pair<T>(out + j * 8, there ? o[m][j][2 * r] * inverse : 0.0f,
                                there ? o[m][j][2 * r + 1] * inverse : 0.0f);
            if (lane % 4 == 0) x.lse[at] = i < end ? (__fmul_rn(top[m][r], powers.unit) + log2f(sum)) * LN_2 : 0.0f;
        }
}

#define FORWARD(T, name, D)                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) attention_forward_##name##_##D(const AttentionArgs x) { \
        forward<T, D>(x);                                                                                   \
    }
#define FORWARDS(T, name) \
    FORWARD(T, name, 32) FORWARD(T, name, 64) FORWARD(T, name, 96) FORWARD(T, name, 128) FORWARD(T, name, 256)

FORWARDS(Bf16, bf16)
FORWARDS(F16, f16)
FORWARDS(float, f32)
