// Attention over long sequences: what forward and backward share.
//
// Sources: tiled attention with an online softmax (Dao 2023, FlashAttention-2); shifted sparse attention (Chen et al. 2024)
// as a lower bound per head. Every query sees one range of keys lo..hi, and neither end falls as the query advances; the
// ranges are made by attention_bounds from a pattern, row lengths and packed segments, and the other kernels know nothing
// else of patterns.
//
// Shapes: q [B, T, H, D], k and v [B, T, Hkv, D] with any strides but D's, results and gradients row-major, log-sum-exp and
// delta [B, T, H] in f32. D is a multiple of 8 up to 256, and every row of D begins at a multiple of 16 bytes. Query head
// h reads kv head h / (H/Hkv) in place. Units: entries.
// With `prefix`, row b continues the first prefix[b] entries of one document whose keys and values are `document_*`
// [.., Hkv, D]: query i then stands at index prefix[b] + i, bounds are counted so, and the document gets no gradient.
//
// Determinism: every output has one owner and a fixed order of sums; there are no atomics. The gradient of q and those of
// k and v come from kernels of their own for that reason.
// Left out: a key that some queries of its tile do not see is multiplied by 0 there, so a NaN or infinity in its value
// reaches them; the CPU op takes such tiles apart.
#pragma once

#include "products.cuh"

// Addresses in values, not bytes.
struct Operand {
    const void* data;
    long long row, entry, head;
};

struct AttentionArgs {
    Operand q, k, v, d_out, document_k, document_v;
    // [B] or null: a document's entries before each row.
    const int* prefix;
    // [B] or null: valid entries of each row.
    const int* lengths;
    // [B, 2, T]: for heads with groups in place, then for heads with groups that are moved.
    const int* lo;
    const int* hi;
    // [H] or null: scores are lowered by slope·|distance| (ALiBi).
    const float* slopes;
    // [T] or null: places of entries for slopes; their numbers where null. Not together with a prefix.
    const float* positions;
    // Written by forward, read by backward.
    void* out;
    float* lse;
    float* delta;
    void* dq;
    void* dk;
    void* dv;
    int entries, heads, kv_heads, width;
    float scale;
};

// Dynamic shared memory of a block on sm_80, the least of the targets.
constexpr size_t SHARED_LIMIT = 163 << 10;

// Rows of a block of forward and of the two kernels of backward: 16 · pieces · warps, with at most the warps named here.
// What is there per block of other rows, and per pass over D in the gradients of k and v, is chosen for shared memory and
// registers.
template <class T, int D>
struct Sizes {
    static constexpr bool HALF = sizeof(T) == 2;
    static constexpr int FORWARD_PIECES = HALF && D <= 128 ? 2 : 1;
    static constexpr int FORWARD_KEYS = HALF ? (D <= 64 ? 64 : 32) : (D <= 128 ? 32 : 16);
    static constexpr int BACKWARD_KEYS = HALF ? (D <= 64 ? 64 : 32) : 16;
    static constexpr int BACKWARD_QUERIES = HALF ? (D <= 64 ? 64 : 32) : 16;
    static constexpr int COLUMNS = D <= 128 ? D : D / 2;
    static constexpr int FORWARD_WARPS = 4, BACKWARD_WARPS = HALF || D <= 128 ? 4 : 2;
    static constexpr int LD = stride_of<T>(D);

    __host__ __device__ static constexpr size_t forward_bytes(int warps) {
        return sizeof(T) * LD * (16 * FORWARD_PIECES * warps + 4 * FORWARD_KEYS);
    }
    __host__ __device__ static constexpr size_t queries_bytes(int warps) {
        return sizeof(T) * LD * (2 * 16 * warps + 4 * BACKWARD_KEYS);
    }
    __host__ __device__ static constexpr size_t keys_bytes(int warps) {
        return sizeof(T) * LD * (2 * 16 * warps + 4 * BACKWARD_QUERIES) + 2 * 4 * sizeof(float) * BACKWARD_QUERIES;
    }
};

// What products are multiplied by to be scores in powers of two. Slopes are taken off scores, and a factor that is not positive turns
// the order of products around: then scores are made of products first (`first`), and what is left to multiply by is 1.
struct Powers {
    float factor, unit;
    bool first;
    __device__ __forceinline__ Powers(float scale, float slope) : factor(scale * LOG2_E), first(slope != 0.0f || !(factor > 0.0f)) {
        unit = first ? 1.0f : factor;
    }
};

// Whether the groups of a query head are moved by half a group.
__device__ __forceinline__ int moved(int head, int heads) { return head >= (heads + 1) / 2; }

// One row of the batch as one query head sees it.
struct Row {
    int b, head, kv_head, length, split;
    const int *lo, *hi;
    float slope;

    __device__ __forceinline__ Row(const AttentionArgs& x, int b, int head)
        : b(b),
          head(head),
          kv_head(head / (x.heads / x.kv_heads)),
          length(x.lengths ? x.lengths[b] : x.entries),
          split(x.prefix ? x.prefix[b] : 0) {
        const long long at = ((long long)b * 2 + moved(head, x.heads)) * x.entries;
        lo = x.lo + at;
        hi = x.hi + at;
        slope = x.slopes ? x.slopes[head] * LOG2_E : 0.0f;
    }

    template <class T>
    __device__ __forceinline__ const T* query(const Operand& of, int i) const {
        return static_cast<const T*>(of.data) + b * of.row + i * of.entry + head * of.head;
    }
    // Key number j, of the document as far as the prefix goes.
    template <class T>
    __device__ __forceinline__ const T* key(const Operand& own, const Operand& document, int j) const {
        return j < split ? static_cast<const T*>(document.data) + j * document.entry + kv_head * document.head
                         : static_cast<const T*>(own.data) + b * own.row + (j - split) * own.entry + kv_head * own.head;
    }
    // Place of key number j for slopes.
    __device__ __forceinline__ float place(const AttentionArgs& x, int j) const {
        return x.positions ? x.positions[j] : float(j);
    }
    // Place of [b, i, head] in lse and delta, and of the row there in out and dq in units of D.
    __device__ __forceinline__ long long at(const AttentionArgs& x, int i) const {
        return ((long long)b * x.entries + i) * x.heads + head;
    }
};

// Two tensors' tiles, two of each in shared memory, so that one is filled while the other is read.
template <class T, int D, int ROWS>
struct Pair {
    T* memory;
    __device__ __forceinline__ T* first(int stage) const { return memory + stage * 2 * ROWS * stride_of<T>(D); }
    __device__ __forceinline__ T* second(int stage) const { return first(stage) + ROWS * stride_of<T>(D); }
};

// Keys `from`.. of both tensors; those from `to` on are zeros.
template <class T, int D, int KEYS>
__device__ __forceinline__ void load_keys(const Pair<T, D, KEYS>& tiles, int stage, const AttentionArgs& x, const Row& row,
                                          int from, int to) {
    if constexpr (even_rounds<T, D, KEYS>()) {
        // All of them are there, on one side of the document's end.
        const bool own = from >= row.split, whole = from + KEYS <= to && (own || from + KEYS <= row.split);
        if (whole && x.width == D && blockDim.x == 128) {
            const T* const k = row.key<T>(x.k, x.document_k, from);
            const T* const v = row.key<T>(x.v, x.document_v, from);
            load_whole_rows<T, D, KEYS>(tiles.first(stage), k, own ? x.k.entry : x.document_k.entry);
            load_whole_rows<T, D, KEYS>(tiles.second(stage), v, own ? x.v.entry : x.document_v.entry);
            return;
        }
    }
    const T* const any = static_cast<const T*>(x.k.data);
    load_rows<T, D>(tiles.first(stage), KEYS, x.width, any, [&](int r) -> const T* {
        return from + r < to ? row.key<T>(x.k, x.document_k, from + r) : nullptr;
    });
    load_rows<T, D>(tiles.second(stage), KEYS, x.width, any, [&](int r) -> const T* {
        return from + r < to ? row.key<T>(x.v, x.document_v, from + r) : nullptr;
    });
}
