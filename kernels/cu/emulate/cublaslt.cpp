// cuBLASLt without a GPU: the functions of libcublasLt that `cuda/cublaslt.rs` calls, as plain loops on host memory. For tests
// alone; compiled as a shared library of that name, beside the emulated driver, whose memory it reads and writes.
//
// What it holds callers to:
// - D = alpha·op(A)·op(B) + beta·C over column-major matrices, in f32 sums over ascending k. A and B of one type (f32, bf16 or
//   f16), C and D of that type or f32, f32 scales, computed in f32; anything else is not supported, as there.
// - Sizes have to agree, leading dimensions have to hold a column, and addresses have to be aligned as the preference that the
//   algorithm came from said; an algorithm for other operands is refused.
// - The workspace is at least as large as the algorithm said it needs, and is overwritten. Partial sums in the result's type
//   are refused.
// Its own memory is counted (`emulated_cublaslt_objects`), so that a test sees what is not destroyed.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

enum Status : int { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum Type : int { F32 = 0, F16 = 2, BF16 = 14 };
constexpr int COMPUTE_32F = 68;
constexpr size_t WORKSPACE = 1024;

std::atomic<long> objects{0};

template <class T>
T* make(const T& value) {
    ++objects;
    return new T(value);
}
template <class T>
int drop(T* object) {
    if (!object) return INVALID_VALUE;
    --objects;
    delete object;
    return SUCCESS;
}

struct Handle {};
struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t leading;
};
struct Operation {
    int compute, scale;
    int transposed[2];
};
struct Preference {
    size_t workspace;
    uint32_t reduction;
    uint32_t alignment[4];
};
// What an algorithm was found for. It lies in the 64 bytes that the caller copies.
struct Algorithm {
    uint32_t alignment[4];
    size_t workspace;
    uint64_t key;
};
static_assert(sizeof(Algorithm) <= 64);
struct Heuristic {
    union {
        Algorithm algorithm;
        uint64_t data[8];
    };
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

float widen(int type, const void* data, size_t at) {
    if (type == F32) return static_cast<const float*>(data)[at];
    const uint16_t bits = static_cast<const uint16_t*>(data)[at];
    if (type == BF16) {
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return float(value);
}

void narrow(int type, void* data, size_t at, float value) {
    if (type == F32) {
        static_cast<float*>(data)[at] = value;
        return;
    }
    uint16_t bits;
    if (type == BF16) {
        uint32_t wide;
        std::memcpy(&wide, &value, 4);
        // To nearest, ties to even; a NaN stays one.
        bits = value != value ? uint16_t(wide >> 16 | 64) : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    } else {
        const _Float16 half = _Float16(value);
        std::memcpy(&bits, &half, 2);
    }
    static_cast<uint16_t*>(data)[at] = bits;
}

bool known(int type) { return type == F32 || type == F16 || type == BF16; }

// Whether the four matrices make one product, and its key.
int describe(const Operation& o, const Layout& a, const Layout& b, const Layout& c, const Layout& d, uint64_t& key) {
    if (o.compute != COMPUTE_32F || o.scale != F32 || a.type != b.type || !known(a.type)) return NOT_SUPPORTED;
    if (c.type != d.type || (d.type != a.type && d.type != F32)) return NOT_SUPPORTED;
    const uint64_t m = o.transposed[0] ? a.columns : a.rows, k = o.transposed[0] ? a.rows : a.columns;
    const uint64_t n = o.transposed[1] ? b.rows : b.columns, other = o.transposed[1] ? b.columns : b.rows;
    if (k != other || c.rows != m || d.rows != m || c.columns != n || d.columns != n || !m || !n || !k) return INVALID_VALUE;
    for (const Layout* l : {&a, &b, &c, &d})
        if (l->leading < int64_t(l->rows)) return INVALID_VALUE;
    key = 14695981039346656037u;
    for (uint64_t part : {m, n, k, uint64_t(a.type), uint64_t(d.type), uint64_t(o.transposed[0] * 2 + o.transposed[1]),
                          uint64_t(a.leading), uint64_t(b.leading), uint64_t(d.leading)})
        key = (key ^ part) * 1099511628211u;
    return SUCCESS;
}

}  // namespace

extern "C" {

long emulated_cublaslt_objects() { return objects; }

size_t cublasLtGetVersion() { return 120905; }

int cublasLtCreate(void** handle) {
    *handle = make(Handle{});
    return SUCCESS;
}
int cublasLtDestroy(void* handle) { return drop(static_cast<Handle*>(handle)); }

int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    *layout = make(Layout{type, rows, columns, leading});
    return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(void* layout) { return drop(static_cast<Layout*>(layout)); }

int cublasLtMatmulDescCreate(void** operation, int compute, int scale) {
    *operation = make(Operation{compute, scale, {0, 0}});
    return SUCCESS;
}
int cublasLtMatmulDescDestroy(void* operation) { return drop(static_cast<Operation*>(operation)); }
int cublasLtMatmulDescSetAttribute(void* operation, int attribute, const void* value, size_t bytes) {
    // TRANSA and TRANSB.
    if ((attribute != 3 && attribute != 4) || bytes != 4) return NOT_SUPPORTED;
    std::memcpy(&static_cast<Operation*>(operation)->transposed[attribute - 3], value, 4);
    return SUCCESS;
}

int cublasLtMatmulPreferenceCreate(void** preference) {
    *preference = make(Preference{0, 7, {256, 256, 256, 256}});
    return SUCCESS;
}
int cublasLtMatmulPreferenceDestroy(void* preference) { return drop(static_cast<Preference*>(preference)); }
int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t bytes) {
    auto& p = *static_cast<Preference*>(preference);
    // MAX_WORKSPACE_BYTES; REDUCTION_SCHEME_MASK; MIN_ALIGNMENT of A, B, C, D.
    if (attribute == 1 && bytes == 8) std::memcpy(&p.workspace, value, 8);
    else if (attribute == 3 && bytes == 4) std::memcpy(&p.reduction, value, 4);
    else if (attribute >= 5 && attribute <= 8 && bytes == 4) std::memcpy(&p.alignment[attribute - 5], value, 4);
    else return NOT_SUPPORTED;
    return SUCCESS;
}

int cublasLtMatmulAlgoGetHeuristic(void* handle, void* operation, void* a, void* b, void* c, void* d, void* preference,
                                   int most, Heuristic* found, int* count) {
    *count = 0;
    if (!handle || most < 1) return INVALID_VALUE;
    uint64_t key = 0;
    const int status = describe(*static_cast<Operation*>(operation), *static_cast<Layout*>(a), *static_cast<Layout*>(b),
                                *static_cast<Layout*>(c), *static_cast<Layout*>(d), key);
    if (status) return status;
    const auto& p = *static_cast<Preference*>(preference);
    // Sums in the result's type are not what callers here want.
    if (p.reduction & 4) return INVALID_VALUE;
    std::memset(found, 0, sizeof *found);
    std::memcpy(found->algorithm.alignment, p.alignment, sizeof p.alignment);
    found->algorithm.key = key;
    found->workspace = p.workspace < WORKSPACE ? p.workspace : WORKSPACE;
    found->algorithm.workspace = found->workspace;
    *count = 1;
    return SUCCESS;
}

int cublasLtMatmul(void* handle, void* operation, const float* alpha, const void* a, void* a_layout, const void* b,
                   void* b_layout, const float* beta, const void* c, void* c_layout, void* d, void* d_layout,
                   const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void*) {
    if (!handle || !a || !b || !d || !algorithm) return INVALID_VALUE;
    const auto &o = *static_cast<Operation*>(operation);
    const auto &la = *static_cast<Layout*>(a_layout), &lb = *static_cast<Layout*>(b_layout);
    const auto &lc = *static_cast<Layout*>(c_layout), &ld = *static_cast<Layout*>(d_layout);
    uint64_t key = 0;
    const int status = describe(o, la, lb, lc, ld, key);
    if (status) return status;
    if (key != algorithm->key) return INVALID_VALUE;
    const void* const addresses[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i)
        if (reinterpret_cast<uintptr_t>(addresses[i]) % algorithm->alignment[i]) return INVALID_VALUE;
    if (workspace_bytes < algorithm->workspace || (algorithm->workspace && !workspace)) return INVALID_VALUE;
    std::memset(workspace, 0xff, algorithm->workspace);
    const uint64_t m = ld.rows, n = ld.columns, k = o.transposed[0] ? la.rows : la.columns;
    for (uint64_t j = 0; j < n; ++j)
        for (uint64_t i = 0; i < m; ++i) {
            float sum = 0.0f;
            for (uint64_t l = 0; l < k; ++l) {
                const uint64_t left = o.transposed[0] ? l + i * la.leading : i + l * la.leading;
                const uint64_t right = o.transposed[1] ? j + l * lb.leading : l + j * lb.leading;
                sum += widen(la.type, a, left) * widen(lb.type, b, right);
            }
            float value = *alpha * sum;
            // What is multiplied by 0 is not read, as in BLAS.
            if (*beta != 0.0f) value += *beta * widen(lc.type, c, i + j * lc.leading);
            narrow(ld.type, d, i + j * ld.leading, value);
        }
    return SUCCESS;
}
}
