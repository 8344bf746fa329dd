// Small work on rows: values into another storage type, sums of streams, biases, sums over rows, heads that lie together,
// dropout.
//
// Sources: none but their definitions; the mask of dropout is a hash of a value's place (SplitMix64's, Steele et al. 2014), the
// same as on the CPU. Queries, keys and values of each head may lie side by side, [N, H, 3, D] (GPT-NeoX):
// `split` takes them apart into three [N, H, D], `join` is its transpose.
//
// Shapes: x and y of one length, or x [O] beside y [n, O], in their storage types; sums over rows of g [n, O], or of g∘z, are f32, made in
// pieces of rows whose partial sums [pieces, O] are added in the order of pieces.
#include "device.cuh"

struct RowsArgs {
    const void* x;
    void* y;
    long long count;
    // Values of an x that repeats.
    long long width;
    float factor;
};

// What a thread writes of y from what it reads of x.
enum class Work { Convert, Add, Scale };

template <Work WORK, class X, class Y, int V>
__device__ __forceinline__ void some(const X* x, Y* y, float factor) {
    const Vector<X, V> from = load<V>(x);
    Vector<Y, V> to;
    if constexpr (WORK == Work::Add) to = load<V>(y);
#pragma unroll
    for (int e = 0; e < V; ++e) {
        const float value = get(from.values[e]);
        if constexpr (WORK == Work::Convert) to.values[e] = put<Y>(value);
        if constexpr (WORK == Work::Add) to.values[e] = put<Y>(get(to.values[e]) + value);
        if constexpr (WORK == Work::Scale) to.values[e] = put<Y>(value * factor);
    }
    store(y, to);
}

// Grid: enough threads for count / V. The last vector may be short; where x repeats, its width is a multiple of V, or there is
// one row.
template <Work WORK, bool REPEATS, class X, class Y, int V>
__device__ void each(const RowsArgs& a) {
    const long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * V;
    const X* const x = static_cast<const X*>(a.x);
    Y* const y = static_cast<Y*>(a.y);
    if (at + V <= a.count)
        some<WORK, X, Y, V>(x + (REPEATS ? at % a.width : at), y + at, a.factor);
    else
#pragma unroll 1
        for (long long i = at; i < a.count; ++i) some<WORK, X, Y, 1>(x + (REPEATS ? i % a.width : i), y + i, a.factor);
}

struct SumArgs {
    const void* g;
    // Null, or what g is multiplied by, [n, O].
    const float* z;
    // Null, or what the sums are divided by, [O].
    const float* norms;
    float* partials;
    float* sum;
    long long rows, width, rows_per_piece;
    int pieces;
};

template <bool TIMES, class G, int V>
__device__ __forceinline__ void sum_some(const SumArgs& a, long long column) {
    const long long first = blockIdx.y * a.rows_per_piece, end = min(first + a.rows_per_piece, a.rows);
    long long at = first * a.width + column;
    float sums[V] = {};
    for (long long row = first; row < end; ++row, at += a.width) {
        const Vector<G, V> values = load<V>(static_cast<const G*>(a.g) + at);
        if constexpr (TIMES) {
            // z is read in pieces of 16 bytes at most.
            constexpr int W = V < 4 ? V : 4;
#pragma unroll
            for (int from = 0; from < V; from += W) {
                const Vector<float, W> others = load<W>(a.z + at + from);
#pragma unroll
                for (int i = 0; i < W; ++i) sums[from + i] += get(values.values[from + i]) * others.values[i];
            }
        } else {
#pragma unroll
            for (int e = 0; e < V; ++e) sums[e] += get(values.values[e]);
        }
    }
    float* const partials = a.partials + blockIdx.y * a.width + column;
#pragma unroll
    for (int e = 0; e < V; ++e) partials[e] = sums[e];
}

// Partial sums of a piece of rows of g, or of g∘z. Grid: enough threads for O / V, pieces.
template <class G, int V>
__device__ void sum_piece(const SumArgs& a) {
    const long long column = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= a.width) return;
    if (a.z)
        sum_some<true, G, V>(a, column);
    else
        sum_some<false, G, V>(a, column);
}

// Adds the pieces to the sum. Grid: enough threads for O.
extern "C" __global__ void __launch_bounds__(256) rows_sum(const SumArgs a) {
    const long long column = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= a.width) return;
    float sum = 0.0f;
    for (int piece = 0; piece < a.pieces; ++piece) sum += a.partials[piece * a.width + column];
    a.sum[column] += a.norms ? sum / a.norms[column] : sum;
}

struct HeadsArgs {
    void* fused;
    void* q;
    void* k;
    void* v;
    // N·H and D.
    long long heads, width;
};

// Grid: enough threads for N·H·3·D / V.
template <class T, int V, bool JOIN>
__device__ void heads(const HeadsArgs& a) {
    const long long number = (long long)blockIdx.x * blockDim.x + threadIdx.x, parts = a.width / V;
    const long long row = number / parts, head = row / 3;
    if (head >= a.heads) return;
    const int which = int(row % 3);
    const long long at = number % parts * V;
    T* const fused = static_cast<T*>(a.fused) + row * a.width + at;
    T* const part = static_cast<T*>(which == 0 ? a.q : which == 1 ? a.k : a.v) + head * a.width + at;
    if constexpr (JOIN)
        store(fused, load<V>(part));
    else
        store(part, load<V>(fused));
}

struct DropoutArgs {
    const void* x;
    void* y;
    long long count;
    // The place of the first value in its tensor.
    unsigned long long first, seed;
    // A value is zero where 32 bits of its place's hash are below this.
    unsigned long long threshold;
};

// y (+)= x where the mask keeps it, without a factor: that is the product's. Grid: enough threads for count / V; the last vector
// may be short.
template <class T, int V, bool ADD>
__device__ __forceinline__ void keep(const DropoutArgs& a, long long at) {
    const Vector<T, V> x = load<V>(static_cast<const T*>(a.x) + at);
    T* const y = static_cast<T*>(a.y) + at;
    Vector<T, V> out;
    if constexpr (ADD) out = load<V>(y);
#pragma unroll
    for (int e = 0; e < V; ++e) {
        unsigned long long z = a.seed + (a.first + (unsigned long long)(at + e)) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        const bool kept = z >> 32 >= a.threshold;
        if constexpr (ADD)
            out.values[e] = put<T>(get(out.values[e]) + (kept ? get(x.values[e]) : 0.0f));
        else
            out.values[e] = kept ? x.values[e] : put<T>(0.0f);
    }
    store(y, out);
}
template <class T, int V, bool ADD>
__device__ void dropout(const DropoutArgs& a) {
    const long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (at + V <= a.count)
        keep<T, V, ADD>(a, at);
    else
#pragma unroll 1
        for (long long i = at; i < a.count; ++i) keep<T, 1, ADD>(a, i);
}

// The ones with `vectors` where sizes and addresses are multiples of V.
#define ROWS_WORK(work, WORK, REPEATS, X, Y, name, V)                                                     \
    extern "C" __global__ void __launch_bounds__(256) rows_##work##_##name(const RowsArgs a) {            \
        each<Work::WORK, REPEATS, X, Y, 1>(a);                                                            \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) rows_##work##_vectors_##name(const RowsArgs a) {    \
        each<Work::WORK, REPEATS, X, Y, V>(a);                                                            \
    }
#define ROWS_PAIR(X, Y, name, V)                          \
    ROWS_WORK(convert, Convert, false, X, Y, name, V)     \
    ROWS_WORK(add, Add, false, X, Y, name, V)             \
    ROWS_WORK(fill, Convert, true, X, Y, name, V)         \
    ROWS_WORK(add_bias, Add, true, X, Y, name, V)
#define ROWS_DROPOUT(work, T, name, V, ADD)                                                               \
    extern "C" __global__ void __launch_bounds__(256) rows_##work##_##name(const DropoutArgs a) {         \
        dropout<T, 1, ADD>(a);                                                                            \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) rows_##work##_vectors_##name(const DropoutArgs a) { \
        dropout<T, V, ADD>(a);                                                                            \
    }
#define ROWS_KIND(T, name, V)                                                                             \
    ROWS_PAIR(T, T, name, V)                                                                              \
    ROWS_WORK(scale, Scale, false, T, T, name, V)                                                         \
    extern "C" __global__ void __launch_bounds__(256) rows_sum_piece_##name(const SumArgs a) {            \
        sum_piece<T, 1>(a);                                                                               \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) rows_sum_piece_vectors_##name(const SumArgs a) {    \
        sum_piece<T, V>(a);                                                                               \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) rows_split_##name(const HeadsArgs a) {              \
        heads<T, 1, false>(a);                                                                            \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) rows_split_vectors_##name(const HeadsArgs a) {      \
        heads<T, V, false>(a);                                                                            \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) rows_join_##name(const HeadsArgs a) {               \
        heads<T, 1, true>(a);                                                                             \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) rows_join_vectors_##name(const HeadsArgs a) {       \
        heads<T, V, true>(a);                                                                             \
    }                                                                                                     \
    ROWS_DROPOUT(dropout, T, name, V, false)

ROWS_KIND(float, f32, 4)
ROWS_KIND(Bf16, bf16, 8)
ROWS_KIND(F16, f16, 8)
ROWS_PAIR(float, Bf16, f32_to_bf16, 4)
ROWS_PAIR(float, F16, f32_to_f16, 4)
ROWS_PAIR(Bf16, float, bf16_to_f32, 4)
ROWS_PAIR(F16, float, f16_to_f32, 4)
ROWS_DROPOUT(dropout_add, float, f32, 4, true)
