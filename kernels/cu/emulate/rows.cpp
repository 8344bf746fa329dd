// Rows, activations, embeddings, dropout and DoRA's kernels against plain loops in f64.
//
// Each kernel file is in a namespace of its own, as in ops.cpp.
#include "check.h"

namespace streams {
#include "../rows.cu"
}
namespace feeding {
#include "../mlp.cu"
}
namespace tables {
#include "../embedding.cu"
}
namespace magnitudes {
#include "../dora.cu"
}

using namespace check;

static unsigned runs = 0;

// A launch of enough threads for `work`.
template <class Kernel>
void over(const Run& run, long long work, Kernel kernel, unsigned y = 1) {
    emulated::launch(dim3(unsigned((work + 63) / 64), y), dim3(64), 0, kernel, run.order());
}

// Short vectors at the end: arrays begin where memory is aligned.
template <class X, class Y, int V>
void check_streams(int rows, int width) {
    const Run run{runs++};
    char text[80];
    std::snprintf(text, sizeof text, "[%d, %d], V %d", rows, width, V);
    const std::string of = std::string(" of ") + name<X>();
    const auto x = random<X>(size_t(rows) * width, 1), bias = random<X>(width, 2);
    const auto y = random<Y>(x.size(), 3);
    const long long count = (long long)x.size(), work = (count + V - 1) / V;
    Guarded<X> device_x(x, false), device_bias(bias, false);
    std::vector<double> convert, add, fill, add_bias;
    for (size_t i = 0; i < x.size(); ++i) {
        convert.push_back(get(x[i]));
        add.push_back(double(get(y[i])) + get(x[i]));
        fill.push_back(get(bias[i % width]));
        add_bias.push_back(double(get(y[i])) + get(bias[i % width]));
    }
    using streams::Work;
    streams::RowsArgs args{device_x.data(), nullptr, count, count, 1.0f};
    Guarded<Y> got(y.size(), false), sum(y, false);
    args.y = got.data();
    over(run, work, [&] { streams::each<Work::Convert, false, X, Y, V>(args); });
    close<Y>("convert" + of, text, got, convert);
    args.y = sum.data();
    over(run, work, [&] { streams::each<Work::Add, false, X, Y, V>(args); });
    close<Y>("add" + of, text, sum, add);
    if (width % V && rows != 1) return;
    args.x = device_bias.data();
    args.width = width;
    args.y = got.data();
    over(run, work, [&] { streams::each<Work::Convert, true, X, Y, V>(args); });
    close<Y>("fill" + of, text, got, fill);
    Guarded<Y> biased(y, false);
    args.y = biased.data();
    over(run, work, [&] { streams::each<Work::Add, true, X, Y, V>(args); });
    close<Y>("add bias" + of, text, biased, add_bias);
}

template <class T, int V>
void check_scale_and_sums(int rows, int width, int rows_per_piece) {
    const Run run{runs++};
    char text[80];
    std::snprintf(text, sizeof text, "[%d, %d], %d rows a piece, V %d", rows, width, rows_per_piece, V);
    const auto x = random<T>(size_t(rows) * width, 1);
    const auto start = random<float>(width, 2);
    std::vector<double> scaled, sums(start.begin(), start.end());
    for (size_t i = 0; i < x.size(); ++i) {
        scaled.push_back(get(x[i]) * -0.75);
        sums[i % width] += get(x[i]);
    }
    const int pieces = (rows + rows_per_piece - 1) / rows_per_piece;
    Guarded<T> device_x(x, false);
    Guarded<float> partials(size_t(pieces) * width, run.at_end()), got(start, run.at_end());
    const streams::SumArgs args{device_x.data(), nullptr, nullptr,        partials.data(), got.data(),
                                rows,            width,   rows_per_piece, pieces};
    over(run, width / V, [&] { streams::sum_piece<T, V>(args); }, unsigned(pieces));
    over(run, width, [&] { streams::rows_sum(args); });
    close<float>(std::string("sum of rows of ") + name<T>(), text, got, sums);
    const long long count = (long long)x.size();
    const streams::RowsArgs in_place{device_x.data(), device_x.data(), count, count, -0.75f};
    over(run, (count + V - 1) / V, [&] { streams::each<streams::Work::Scale, false, T, T, V>(in_place); });
    close<T>("scale", text, device_x, scaled);
}

template <class T, int V>
void check_heads(int entries, int heads, int width) {
    const Run run{runs++};
    const bool at_end = run.at_end();
    char text[80];
    std::snprintf(text, sizeof text, "%d entries, %d heads of %d, V %d", entries, heads, width, V);
    const auto fused = random<T>(size_t(entries) * heads * 3 * width, 1);
    std::vector<double> expected[3], whole;
    for (size_t i = 0; i < fused.size(); ++i) {
        expected[i / width % 3].push_back(get(fused[i]));
        whole.push_back(get(fused[i]));
    }
    Guarded<T> device_fused(fused, at_end), back(fused.size(), at_end);
    Guarded<T> q(fused.size() / 3, at_end), k(fused.size() / 3, at_end), v(fused.size() / 3, at_end);
    streams::HeadsArgs args{device_fused.data(), q.data(), k.data(), v.data(), entries * heads, width};
    over(run, (long long)fused.size() / V, [&] { streams::heads<T, V, false>(args); });
    close<T>("queries", text, q, expected[0], 0);
    close<T>("keys", text, k, expected[1], 0);
    close<T>("values", text, v, expected[2], 0);
    args.fused = back.data();
    over(run, (long long)fused.size() / V, [&] { streams::heads<T, V, true>(args); });
    close<T>("joined", text, back, whole, 0);
}

struct Slope {
    double value, slope;
};

Slope reference(int activation, double x) {
    const double sigmoid = 1 / (1 + std::exp(-x)), root = std::sqrt(2 / M_PI);
    const double phi = 0.5 * (1 + std::erf(x / std::sqrt(2.0))), density = std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
    const double tanh = std::tanh(root * (x + 0.044715 * x * x * x));
    switch (activation) {
        case 0: return {x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))};
        case 2: return {x * phi, phi + x * density};
        case 4: return {x > 0 ? x * x : 0, x > 0 ? 2 * x : 0};
        default:
            return {0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * root * (1 + 3 * 0.044715 * x * x)};
    }
}

template <class T, int V>
void check_mlp(int count) {
    for (int activation = 0; activation < 5; ++activation) {
        const Run run{runs++};
        const bool gated = activation < 2;
        char text[80];
        std::snprintf(text, sizeof text, "activation %d, %d values, V %d", activation, count, V);
        const auto gate = random<T>(count, 1, 9.0f), up = random<T>(count, 2, gated ? 2.0f : 9.0f);
        const auto g = random<float>(count, 3);
        std::vector<double> out, d_gate, d_up;
        for (int i = 0; i < count; ++i) {
            const Slope of = reference(activation, get(gated ? gate[i] : up[i]));
            const double u = get(up[i]);
            out.push_back(gated ? of.value * u : of.value);
            d_gate.push_back(g[i] * u * of.slope);
            d_up.push_back(gated ? g[i] * of.value : g[i] * of.slope);
        }
        Guarded<T> device_gate(gate, false), device_up(up, false), got(count, false);
        Guarded<float> device_g(g, false);
        const feeding::MlpArgs args{gated ? device_gate.data() : nullptr, device_up.data(), got.data(), device_g.data(), count,
                                    activation};
        over(run, (count + V - 1) / V, [&] { feeding::activate<T, V, false>(args); });
        close<T>("activation", text, got, out);
        over(run, (count + V - 1) / V, [&] { feeding::activate<T, V, true>(args); });
        if (gated) close<T>("gradient of gate", text, device_gate, d_gate);
        close<T>("gradient of up", text, device_up, d_up);
    }
}

template <class W, class X, int V>
void check_gather(int vocab, int width) {
    const Run run{runs++};
    char text[80];
    std::snprintf(text, sizeof text, "[%d, %d], V %d", vocab, width, V);
    const auto table = random<W>(size_t(vocab) * width, 1);
    std::vector<unsigned> ids{unsigned(vocab) - 1, 0, 1, 1};
    std::vector<double> expected;
    for (unsigned id : ids)
        for (int i = 0; i < width; ++i) expected.push_back(get(table[size_t(id) * width + i]));
    Guarded<W> device_table(table, run.at_end());
    Guarded<unsigned> device_ids(ids, run.at_end());
    Guarded<X> got(expected.size(), run.at_end());
    const tables::GatherArgs args{device_table.data(), device_ids.data(), got.data(), (long long)ids.size(), width};
    over(run, (long long)expected.size() / V, [&] { tables::gather<W, X, V>(args); });
    close<X>(std::string("gather of ") + name<W>(), text, got, expected);
}

template <int V>
void check_scatter(int width) {
    const Run run{runs++};
    const bool at_end = run.at_end();
    char text[80];
    std::snprintf(text, sizeof text, "width %d, V %d", width, V);
    // Tokens 3, 0, 3, 3, 1, by id.
    const std::vector<unsigned> tokens{3, 0, 3, 3, 1}, ids{0, 1, 3}, starts{0, 1, 2, 5}, places{1, 4, 0, 2, 3};
    const auto rows = random<float>(tokens.size() * width, 1), table = random<float>(size_t(5) * width, 2);
    // In f32, in token order: the same bytes.
    std::vector<float> expected = table;
    for (size_t n = 0; n < tokens.size(); ++n)
        for (int i = 0; i < width; ++i) expected[tokens[n] * width + i] += rows[n * width + i];
    Guarded<float> device_rows(rows, at_end), got(table, at_end);
    Guarded<unsigned> device_ids(ids, at_end), device_starts(starts, at_end), device_places(places, at_end);
    const tables::ScatterArgs args{device_rows.data(),   got.data(), device_ids.data(), device_starts.data(),
                                   device_places.data(), width};
    emulated::launch(dim3(3, unsigned((width / V + 31) / 32)), dim3(32), 0, [&] { tables::scatter<V>(args); }, run.order());
    close<float>("scatter", text, got, std::vector<double>(expected.begin(), expected.end()), 0);
}

// A tensor in two pieces: the mask goes by places of the whole.
template <class T, int V>
void check_dropout(int count, int first) {
    const Run run{runs++};
    char text[80];
    std::snprintf(text, sizeof text, "%d values from place %d on, V %d", count, first, V);
    const uint64_t seed = 0xfedcba9876543210u, threshold = uint64_t(0.3 * 4294967296.0);
    const auto x = random<T>(count, 1), y = random<T>(count, 2);
    std::vector<double> dropped, added;
    int kept = 0;
    for (int i = 0; i < count; ++i) {
        uint64_t z = seed + uint64_t(first + i) * 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        const bool keep = z >> 32 >= threshold;
        kept += keep;
        dropped.push_back(keep ? get(x[i]) : 0);
        added.push_back(get(y[i]) + dropped.back());
    }
    if (count > 400 && std::fabs(double(kept) / count - 0.7) > 0.1) {
        ++failures();
        std::printf("FAILED dropout: %d of %d kept, expected 0.7\n", kept, count);
    }
    Guarded<T> device_x(x, false), got(count, false), sum(y, false);
    streams::DropoutArgs args{device_x.data(), got.data(), count, uint64_t(first), seed, threshold};
    over(run, (count + V - 1) / V, [&] { streams::dropout<T, V, false>(args); });
    close<T>("dropout", text, got, dropped, 0);
    args.y = sum.data();
    over(run, (count + V - 1) / V, [&] { streams::dropout<T, V, true>(args); });
    close<T>("dropout, added", text, sum, added);
}

template <class X, class Y, int V>
void check_columns(int rows, int width) {
    const Run run{runs++};
    const bool at_end = run.at_end();
    char text[80];
    std::snprintf(text, sizeof text, "[%d, %d], V %d", rows, width, V);
    const auto x = random<X>(size_t(rows) * width, 1);
    const auto y = random<Y>(x.size(), 2);
    const auto c = random<float>(width, 3, 4.0f);
    for (int add : {0, 1}) {
        std::vector<double> expected;
        for (size_t i = 0; i < x.size(); ++i) expected.push_back((add ? get(y[i]) : 0) + double(c[i % width]) * get(x[i]));
        Guarded<X> device_x(x, at_end);
        Guarded<float> device_c(c, at_end);
        Guarded<Y> set(x.size(), at_end), sum(y, at_end);
        Guarded<Y>& got = add ? sum : set;
        const magnitudes::ColumnsArgs args{device_x.data(), device_c.data(), got.data(), (long long)x.size(), width, add};
        over(run, (long long)x.size() / V, [&] { magnitudes::columns<X, Y, V>(args); });
        close<Y>(std::string("columns of ") + name<X>(), text, got, expected);
    }
}

template <class G, int V>
void check_magnitudes(int rows, int width, int rows_per_piece) {
    const Run run{runs++};
    const bool at_end = run.at_end();
    char text[80];
    std::snprintf(text, sizeof text, "[%d, %d], %d rows a piece, V %d", rows, width, rows_per_piece, V);
    const auto g = random<G>(size_t(rows) * width, 1);
    const auto z = random<float>(g.size(), 2);
    auto norms = random<float>(width, 3);
    const auto start = random<float>(width, 4);
    for (float& norm : norms) norm = 1.5f + norm;
    std::vector<double> sums(start.begin(), start.end()), lengths(rows);
    for (size_t i = 0; i < g.size(); ++i) {
        sums[i % width] += double(get(g[i])) * z[i] / norms[i % width];
        lengths[i / width] += double(z[i]) * z[i];
    }
    for (double& length : lengths) length = std::sqrt(length);
    const int pieces = (rows + rows_per_piece - 1) / rows_per_piece;
    Guarded<G> device_g(g, at_end);
    Guarded<float> device_z(z, at_end), device_norms(norms, at_end), partials(size_t(pieces) * width, at_end);
    Guarded<float> got(start, at_end), got_lengths(rows, at_end);
    const streams::SumArgs args{device_g.data(), device_z.data(), device_norms.data(), partials.data(), got.data(),
                                         rows,            width,           rows_per_piece,      pieces};
    over(run, width / V, [&] { streams::sum_piece<G, V>(args); }, unsigned(pieces));
    over(run, width, [&] { streams::rows_sum(args); });
    close<float>(std::string("gradient of magnitudes of ") + name<G>(), text, got, sums);
    emulated::launch(dim3(rows), dim3(64), 64 * sizeof(double),
                     [&] { magnitudes::dora_lengths(device_z.data(), width, got_lengths.data()); }, run.order());
    close<float>("lengths of rows", text, got_lengths, lengths, 1e-6);
}

template <class X, class Y, int V>
void check_pair() {
    check_columns<X, Y, 1>(3, 37);
    check_columns<X, Y, V>(5, 48);
    check_streams<X, Y, 1>(3, 37);
    check_streams<X, Y, V>(5, 48);
    check_streams<X, Y, V>(1, 37);
    check_streams<X, Y, V>(3, 7);
    check_gather<X, Y, 1>(5, 37);
    check_gather<X, Y, V>(7, 48);
}

template <class T, int V>
void check_stored() {
    check_pair<T, T, V>();
    check_scale_and_sums<T, 1>(7, 37, 3);
    check_scale_and_sums<T, V>(12, 144, 4);
    check_scale_and_sums<T, V>(1, 8, 1);
    check_heads<T, 1>(3, 2, 5);
    check_heads<T, V>(2, 3, 16);
    check_magnitudes<T, 1>(7, 37, 3);
    check_magnitudes<T, V>(12, 144, 4);
    for (int count : {1, 7, 64, 515}) {
        check_mlp<T, 1>(count);
        check_mlp<T, V>(count);
        check_dropout<T, 1>(count, 0);
        check_dropout<T, V>(count, 1001);
    }
}

int main() {
    check_stored<float, 4>();
    check_stored<Bf16, 8>();
    check_stored<F16, 8>();
    check_pair<float, Bf16, 4>();
    check_pair<float, F16, 4>();
    check_pair<Bf16, float, 4>();
    check_pair<F16, float, 4>();
    for (int width : {1, 5, 150}) check_scatter<1>(width);
    check_scatter<4>(12);
    check_scatter<4>(200);
    return finish();
}
