// Token embeddings: gathering rows of a table, and adding their gradients to it.
//
// Shapes: table [V, E], ids [N], rows [N, E]. The host has checked ids against the table. For gradients it sorts places of tokens
// by id: each id that came has one owner, which adds its rows in the order of tokens, so that bytes do not depend on threads.
#include "device.cuh"

struct GatherArgs {
    const void* table;
    const unsigned* ids;
    void* out;
    // N and E.
    long long count, width;
};

// Grid: enough threads for N·E / V.
template <class W, class X, int V>
__device__ void gather(const GatherArgs& a) {
    const long long number = (long long)blockIdx.x * blockDim.x + threadIdx.x, parts = a.width / V;
    const long long token = number / parts, at = number % parts * V;
    if (token >= a.count) return;
    const Vector<W, V> from = load<V>(static_cast<const W*>(a.table) + a.ids[token] * a.width + at);
    Vector<X, V> to;
#pragma unroll
    for (int e = 0; e < V; ++e) to.values[e] = put<X>(get(from.values[e]));
    store(static_cast<X*>(a.out) + token * a.width + at, to);
}

struct ScatterArgs {
    const float* rows;
    float* table;
    // Ids that came, each once; where the places of each begin, and the end of the last one's; places by id.
    const unsigned* ids;
    const unsigned* starts;
    const unsigned* places;
    long long width;
};

// Grid: ids that came, enough threads for E / V.
template <int V>
__device__ void scatter(const ScatterArgs& a) {
    const long long at = ((long long)blockIdx.y * blockDim.x + threadIdx.x) * V;
    if (at >= a.width) return;
    float* const out = a.table + a.ids[blockIdx.x] * a.width + at;
    Vector<float, V> sum = load<V>(out);
    for (unsigned i = a.starts[blockIdx.x]; i < a.starts[blockIdx.x + 1]; ++i) {
        const Vector<float, V> row = load<V>(a.rows + a.places[i] * a.width + at);
#pragma unroll
        for (int e = 0; e < V; ++e) sum.values[e] += row.values[e];
    }
    store(out, sum);
}

extern "C" __global__ void __launch_bounds__(256) embedding_scatter(const ScatterArgs a) { scatter<1>(a); }
extern "C" __global__ void __launch_bounds__(256) embedding_scatter_vectors(const ScatterArgs a) { scatter<4>(a); }

// The ones with `vectors` where E and addresses are multiples of V.
#define GATHER(W, X, name, V)                                                                                   \
    extern "C" __global__ void __launch_bounds__(256) embedding_gather_##name(const GatherArgs a) {             \
        gather<W, X, 1>(a);                                                                                     \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) embedding_gather_vectors_##name(const GatherArgs a) {     \
        gather<W, X, V>(a);                                                                                     \
    }

GATHER(float, float, f32, 4)
GATHER(Bf16, Bf16, bf16, 8)
GATHER(F16, F16, f16, 8)
GATHER(float, Bf16, f32_to_bf16, 4)
GATHER(float, F16, f32_to_f16, 4)
GATHER(Bf16, float, bf16_to_f32, 4)
GATHER(F16, float, f16_to_f32, 4)
