// Which keys each query sees: lo [B, 2, T] and hi [B, 2, T] from a pattern, row lengths and packed segments.
//
//   shift       = 0 for heads with groups in place, floor(G/2) for the others
//   start(i)    = 0 if i < shift, else shift + G·floor((i − shift)/G)
//   causal      query i sees max(start(i), segment start of i) ..= i
//   both ways   query i sees its whole group, inside its segment
//
// With a prefix, query i of row b stands at index prefix[b] + i, the groups are those of the longer of document and row,
// and nothing before floor[b] is seen. Queries past the row's length see nothing.
// Grid: enough threads for B·2·T; no shared memory.
#include "device.cuh"

// The numbers of attention::Pattern, in its order.
enum Pattern { DENSE = 0, SHIFTED_SPARSE = 1, SHIFTED_BIDIRECTIONAL = 2, SLIDING_WINDOW = 3, BIDIRECTIONAL = 4 };

struct BoundsArgs {
    int pattern;
    // The group or the window; 0 where the pattern has none.
    int size;
    int batch, entries;
    // [B] or null.
    const int* lengths;
    // Starts of row b's segments are segments[offsets[b]..offsets[b + 1]], ascending from 0; both null without segments.
    const int* offsets;
    const int* segments;
    // [B] or null, with the document's entries.
    const int* prefix;
    const int* floor;
    int document;
    int* lo;
    int* hi;
};

extern "C" __global__ void attention_bounds(const BoundsArgs x) {
    const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (long long)x.batch * 2 * x.entries) return;
    const int i = int(at % x.entries), shifted = int(at / x.entries % 2), b = int(at / x.entries / 2);
    const int length = x.lengths ? x.lengths[b] : x.entries;
    if (i >= length) {
        x.lo[at] = x.hi[at] = 0;
        return;
    }
    const int prefix = x.prefix ? x.prefix[b] : 0, index = prefix + i;
    const int whole = x.prefix ? max(x.document, prefix + length) : x.entries;
    int start = 0, valid = prefix + length;
    if (x.segments) {
        // The last start that is not above i.
        int low = x.offsets[b], high = x.offsets[b + 1];
        const int last = high;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (x.segments[middle] <= i)
                low = middle;
            else
                high = middle;
        }
        start = x.segments[low];
        if (high < last) valid = min(valid, x.segments[high]);
    }
    if (x.floor) start = max(start, x.floor[b]);
    int lo = 0, hi = index + 1;
    const bool grouped = (x.pattern == SHIFTED_SPARSE || x.pattern == SHIFTED_BIDIRECTIONAL) && x.size < whole;
    if (grouped) {
        const int shift = shifted ? x.size / 2 : 0;
        const bool before = index < shift;
        lo = before ? 0 : shift + (index - shift) / x.size * x.size;
        if (x.pattern == SHIFTED_BIDIRECTIONAL) hi = before ? shift : lo + x.size;
    } else if (x.pattern == SHIFTED_BIDIRECTIONAL || x.pattern == BIDIRECTIONAL) {
        hi = whole;
    } else if (x.pattern == SLIDING_WINDOW) {
        lo = max(0, index + 1 - x.size);
    }
    x.lo[at] = max(start, lo);
    x.hi[at] = min(valid, hi);
}
