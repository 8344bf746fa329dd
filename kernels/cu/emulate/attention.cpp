// attention_bounds, attention_forward and attention_backward against plain loops in f64.
#include "check.h"

#include "../attention_bounds.cu"
#include "../attention_forward.cu"
#include "../attention_backward.cu"

using namespace check;

struct Case {
    int batch, entries, heads, kv_heads, width;
    int pattern = DENSE, size = 0;
    std::vector<int> lengths = {};
    std::vector<std::vector<int>> segments = {};
    bool slopes = false, places = false;
    // Rows continue a document of `document` entries.
    std::vector<int> prefix = {}, floor = {};
    int document = 0;
    // q, k and v lie side by side in one array, as one product of all three leaves them.
    bool packed = false;
    int warps = 2;
    // Of the scale, in 1/√D.
    float factor = 1.7f;

    int length(int b) const { return lengths.empty() ? entries : lengths[b]; }
    int before(int b) const { return prefix.empty() ? 0 : prefix[b]; }
    int keys(int b) const { return before(b) + length(b); }
    std::string line() const {
        static const char* names[] = {"dense", "shifted sparse", "shifted bidirectional", "window", "bidirectional"};
        return names[pattern] + std::string(prefix.empty() ? "" : ", prefix");
    }
    std::string text() const {
        char text[160];
        std::snprintf(text, sizeof text, "[%d, %d, %d/%d, %d] size %d, %d warps, factor %g%s%s%s%s", batch, entries, heads,
                      kv_heads, width, size, warps, double(factor), lengths.empty() ? "" : ", lengths", segments.empty() ? "" : ", segments",
                      slopes ? ", slopes" : "", packed ? ", packed" : "");
        return text;
    }

    // Whether query i of row b sees key j, both counted with the prefix. By group numbers, not by starts.
    bool sees(int b, int h, int i, int j) const {
        if (i >= keys(b) || j >= keys(b)) return false;
        if (!floor.empty() && j < floor[b]) return false;
        if (!segments.empty()) {
            auto segment = [&](int t) {
                int count = 0;
                for (int start : segments[b]) count += start <= t;
                return count;
            };
            if (segment(i) != segment(j)) return false;
        }
        const int whole = prefix.empty() ? entries : std::max(document, keys(b));
        const int shift = h < (heads + 1) / 2 ? 0 : size / 2;
        auto group = [&](int t) { return t < shift ? 0 : 1 + (t - shift) / size; };
        switch (pattern) {
            case DENSE: return j <= i;
            case SHIFTED_SPARSE: return j <= i && (size >= whole || group(i) == group(j));
            case SHIFTED_BIDIRECTIONAL: return size >= whole || group(i) == group(j);
            case SLIDING_WINDOW: return j <= i && i - j < size;
            default: return true;
        }
    }
};

template <class T>
struct Tensor {
    std::vector<T> values;
    int entries, heads, width;
    long long row, entry, offset = 0;
    bool together = false;

    Tensor(int batch, int entries, int heads, int width, uint64_t seed)
        : values(random<T>(size_t(batch) * entries * heads * width, seed)),
          entries(entries),
          heads(heads),
          width(width),
          row((long long)entries * heads * width),
          entry((long long)heads * width) {}
    double at(int b, int t, int h, int d) const { return get(values[((size_t(b) * entries + t) * heads + h) * width + d]); }
};

// Kernels by width, as a launcher chooses them.
template <class T, int D>
void run_sized(const Case& c, AttentionArgs args, const Run& run) {
    using S = Sizes<T, D>;
    const unsigned threads = 32 * c.warps;
    auto blocks = [&](int rows) { return unsigned((c.entries + rows - 1) / rows); };
    const unsigned batch = c.batch, heads = c.heads, kv_heads = c.kv_heads;
    emulated::launch(dim3(blocks(16 * S::FORWARD_PIECES * c.warps), heads, batch), dim3(threads),
                     S::forward_bytes(c.warps), [&] { forward<T, D>(args); }, run.order());
    const unsigned all = batch * c.entries * heads;
    emulated::launch(dim3((all + 1) / 2), dim3(64), 0, [&] { delta<T>(args, c.batch); }, run.order());
    const int warps = std::min(c.warps, S::BACKWARD_WARPS);
    emulated::launch(dim3(blocks(16 * warps), heads, batch), dim3(32 * warps), S::queries_bytes(warps),
                     [&] { queries<T, D>(args); }, run.order());
    emulated::launch(dim3(blocks(16 * warps) * (D / S::COLUMNS), kv_heads, batch), dim3(32 * warps), S::keys_bytes(warps),
                     [&] { keys<T, D>(args); }, run.order());
}

template <class T>
void check_case(const Case& c) {
    static unsigned number = 0;
    const Run run{number++};
    const bool at_end = run.at_end();
    const int B = c.batch, R = c.entries, H = c.heads, G = c.kv_heads, D = c.width;
    Tensor<T> q(B, R, H, D, 1), k(B, R, G, D, 2), v(B, R, G, D, 3), d_out(B, R, H, D, 4);
    Tensor<T> dk_(1, std::max(1, c.document), G, D, 5), dv_(1, std::max(1, c.document), G, D, 6);
    std::vector<float> slopes(H), places(R);
    for (int h = 0; h < H; ++h) slopes[h] = 0.3f / float(h + 1);
    for (int i = 0; i < R; ++i) places[i] = 1.5f * float(i) - float(i % 3);
    const float scale = c.factor / std::sqrt(float(D));

    // The reference.
    const size_t queries = size_t(B) * R * H;
    std::vector<double> out(queries * D), lse(queries), dq(queries * D), dk(size_t(B) * R * G * D), dv(dk.size());
    for (int b = 0; b < B; ++b)
        for (int i = 0; i < c.length(b); ++i)
            for (int h = 0; h < H; ++h) {
                const int g = h / (H / G), before = c.before(b), index = before + i;
                const size_t at = (size_t(b) * R + i) * H + h;
                auto key = [&](int j, int d) { return j < before ? dk_.at(0, j, g, d) : k.at(b, j - before, g, d); };
                auto value = [&](int j, int d) { return j < before ? dv_.at(0, j, g, d) : v.at(b, j - before, g, d); };
                auto place = [&](int j) { return c.places ? double(places[j]) : double(j); };
                std::vector<std::pair<int, double>> scores;
                for (int j = 0; j < c.keys(b); ++j)
                    if (c.sees(b, h, index, j)) {
                        double s = 0;
                        for (int d = 0; d < D; ++d) s += q.at(b, i, h, d) * key(j, d);
                        s *= scale;
                        if (c.slopes) s -= double(slopes[h]) * std::fabs(place(index) - place(j));
                        scores.push_back({j, s});
                    }
                double top = -INFINITY, total = 0, mean = 0;
                for (auto& [j, s] : scores) top = std::max(top, s);
                for (auto& [j, s] : scores) total += std::exp(s - top);
                lse[at] = top + std::log(total);
                std::vector<double> dp(scores.size());
                for (size_t n = 0; n < scores.size(); ++n) {
                    auto& [j, s] = scores[n];
                    s = std::exp(s - lse[at]);
                    for (int d = 0; d < D; ++d) {
                        out[at * D + d] += s * value(j, d);
                        dp[n] += d_out.at(b, i, h, d) * value(j, d);
                    }
                    mean += s * dp[n];
                }
                for (size_t n = 0; n < scores.size(); ++n) {
                    const auto [j, p] = scores[n];
                    const double ds = p * (dp[n] - mean) * scale;
                    for (int d = 0; d < D; ++d) {
                        dq[at * D + d] += ds * key(j, d);
                        if (j < before) continue;
                        const size_t own = ((size_t(b) * R + j - before) * G + g) * D + d;
                        dk[own] += ds * q.at(b, i, h, d);
                        dv[own] += p * d_out.at(b, i, h, d);
                    }
                }
            }

    // The kernels.
    Guarded<int> lo(size_t(B) * 2 * R, at_end), hi(size_t(B) * 2 * R, at_end);
    Guarded<int> lengths(c.lengths, at_end), prefix(c.prefix, at_end), floor(c.floor, at_end);
    std::vector<int> offsets{0}, starts;
    for (auto& row : c.segments) {
        starts.insert(starts.end(), row.begin(), row.end());
        offsets.push_back(int(starts.size()));
    }
    Guarded<int> device_offsets(offsets, at_end), device_starts(starts, at_end);
    BoundsArgs bounds{};
    bounds.pattern = c.pattern;
    bounds.size = c.size;
    bounds.batch = B;
    bounds.entries = R;
    bounds.document = c.document;
    if (!c.lengths.empty()) bounds.lengths = lengths.data();
    if (!c.segments.empty()) bounds.offsets = device_offsets.data(), bounds.segments = device_starts.data();
    if (!c.prefix.empty()) bounds.prefix = prefix.data();
    if (!c.floor.empty()) bounds.floor = floor.data();
    bounds.lo = lo.data();
    bounds.hi = hi.data();
    emulated::launch(dim3((B * 2 * R + 63) / 64), dim3(64), 0, [&] { attention_bounds(bounds); }, run.order());

    std::vector<T> together;
    if (c.packed) {
        const int heads = H + 2 * G;
        together.resize(size_t(B) * R * heads * D);
        long long offset = 0;
        for (Tensor<T>* of : {&q, &k, &v}) {
            for (int b = 0; b < B; ++b)
                for (int t = 0; t < R; ++t)
                    for (int i = 0; i < of->heads * D; ++i)
                        together[(size_t(b) * R + t) * heads * D + offset + i] =
                            of->values[(size_t(b) * R + t) * of->heads * D + i];
            of->row = (long long)R * heads * D;
            of->entry = (long long)heads * D;
            of->offset = offset;
            of->together = true;
            offset += of->heads * D;
        }
    }
    Guarded<T> device_all(together, at_end), device_q(q.values, at_end), device_k(k.values, at_end);
    Guarded<T> device_v(v.values, at_end), device_d_out(d_out.values, at_end);
    Guarded<T> device_document_k(dk_.values, at_end), device_document_v(dv_.values, at_end);
    Guarded<T> got_out(out.size(), at_end), got_dq(dq.size(), at_end), got_dk(dk.size(), at_end), got_dv(dv.size(), at_end);
    Guarded<float> got_lse(queries, at_end), got_delta(queries, at_end);
    Guarded<float> device_slopes(slopes, at_end), device_places(places, at_end);
    auto operand = [&](const Tensor<T>& of, const Guarded<T>& device) {
        return Operand{of.together ? device_all.data() + of.offset : device.data(), of.row, of.entry, D};
    };
    AttentionArgs args{};
    args.q = operand(q, device_q);
    args.k = operand(k, device_k);
    args.v = operand(v, device_v);
    args.d_out = operand(d_out, device_d_out);
    args.document_k = operand(dk_, device_document_k);
    args.document_v = operand(dv_, device_document_v);
    if (!c.prefix.empty()) args.prefix = prefix.data();
    if (!c.lengths.empty()) args.lengths = lengths.data();
    args.lo = lo.data();
    args.hi = hi.data();
    if (c.slopes) args.slopes = device_slopes.data();
    if (c.places) args.positions = device_places.data();
    args.out = got_out.data();
    args.lse = got_lse.data();
    args.delta = got_delta.data();
    args.dq = got_dq.data();
    args.dk = got_dk.data();
    args.dv = got_dv.data();
    args.entries = R;
    args.heads = H;
    args.kv_heads = G;
    args.width = D;
    args.scale = scale;
    if (D <= 32) run_sized<T, 32>(c, args, run);
    else if (D <= 64) run_sized<T, 64>(c, args, run);
    else if (D <= 96) run_sized<T, 96>(c, args, run);
    else if (D <= 128) run_sized<T, 128>(c, args, run);
    else run_sized<T, 256>(c, args, run);

    const std::string line = c.line(), text = c.text();
    close<T>("attention out, " + line, text, got_out, out);
    close<T>("attention dq, " + line, text, got_dq, dq);
    close<T>("attention dk, " + line, text, got_dk, dk);
    close<T>("attention dv, " + line, text, got_dv, dv);
    // Statistics are f32 whatever the storage.
    std::vector<double> finite = lse;
    for (size_t i = 0; i < finite.size(); ++i)
        if (std::isinf(finite[i]) && finite[i] == double(got_lse[i])) finite[i] = 0, got_lse[i] = 0;
    close<float>("attention lse of " + std::string(name<T>()) + ", " + line, text, got_lse, finite, 1e-4);
}

template <class T>
void check_all() {
    const std::pair<int, int> patterns[] = {{DENSE, 0},          {SHIFTED_SPARSE, 8}, {SHIFTED_SPARSE, 5},        {SHIFTED_SPARSE, 50},
                               {SLIDING_WINDOW, 7}, {BIDIRECTIONAL, 0},  {SHIFTED_BIDIRECTIONAL, 9}, {SHIFTED_BIDIRECTIONAL, 2}};
    for (auto [pattern, size] : patterns) {
        // Odd lengths and heads, around the sizes of tiles.
        check_case<T>({1, 1, 3, 1, 32, pattern, size});
        check_case<T>({2, 33, 4, 2, 40, pattern, size, {33, 20}});
        check_case<T>({1, 71, 3, 3, 64, pattern, size, {}, {{0, 1, 30, 64}}});
        check_case<T>({2, 37, 2, 1, 32, pattern, size, {0, 36}, {{0, 3}, {0, 17, 35}}, true, true});
    }
    for (int width : {8, 72, 96, 104, 128, 136, 256}) check_case<T>({1, 45, 2, 1, width, SHIFTED_SPARSE, 12});
    // Several tiles and blocks, each number of warps.
    for (int warps : {1, 3, 4}) {
        Case c{1, 150, 2, 1, 64, DENSE};
        c.warps = warps;
        c.packed = true;
        check_case<T>(c);
        c.pattern = SHIFTED_SPARSE, c.size = 64, c.packed = false, c.slopes = true;
        check_case<T>(c);
    }
    // Whole tiles of every width beside others, by all threads.
    for (int width : {32, 64, 96, 128, 256}) {
        Case c{1, 140, 2, 1, width, SLIDING_WINDOW, 100};
        c.warps = 4;
        c.packed = width == 64;
        check_case<T>(c);
    }
    // A document's tiles and the rows' own, which lie otherwise.
    for (bool slopes : {false, true}) {
        Case c{2, 75, 2, 2, 64, DENSE};
        c.warps = 4;
        c.packed = true;
        c.slopes = slopes;
        c.prefix = {70, 128};
        c.document = 130;
        check_case<T>(c);
    }
    // Scales that turn the order of products around, or leave none.
    for (float factor : {-0.9f, 0.0f}) {
        Case c{1, 71, 2, 1, 32, SHIFTED_SPARSE, 24};
        c.factor = factor;
        check_case<T>(c);
        c.slopes = true;
        check_case<T>(c);
    }
    for (auto [pattern, size] : {std::pair{int(DENSE), 0}, {int(SHIFTED_SPARSE), 16}, {int(SLIDING_WINDOW), 20}}) {
        Case c{4, 19, 4, 2, 64, pattern, size};
        c.prefix = {0, 40, 77, 100};
        c.document = 100;
        check_case<T>(c);
        c.lengths = {19, 1, 0, 18};
        c.floor = {0, 33, 77, 0};
        c.slopes = true;
        check_case<T>(c);
    }
}

int main() {
    check_all<float>();
    check_all<Bf16>();
    check_all<F16>();
    return finish();
}
