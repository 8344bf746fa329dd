// RoPE, norms, losses and AdamW against plain loops in f64.
//
// Each kernel file is in a namespace of its own, since two of them call their templates alike.
#include "check.h"

namespace rotary {
#include "../rope.cu"
}
namespace norms {
#include "../norm.cu"
}
namespace losses {
#include "../loss.cu"
}
namespace optimiser {
#include "../adamw.cu"
}

using namespace check;

static unsigned runs = 0;

template <class T>
std::vector<double> wide(const std::vector<T>& values) {
    std::vector<double> out;
    for (const T& value : values) out.push_back(get(value));
    return out;
}

template <class T, int V>
void check_rope(int entries, int positions, int heads, int width, int rotated, float direction) {
    const Run run{runs++};
    const int half = rotated / 2;
    char text[80];
    std::snprintf(text, sizeof text, "%d entries, %d positions, %d heads, %d of %d, V %d", entries, positions, heads, rotated,
                  width, V);
    const auto x = random<T>(size_t(entries) * heads * width, 1);
    const auto cos = random<float>(size_t(positions) * half, 2), sin = random<float>(cos.size(), 3);
    std::vector<double> expected = wide(x);
    for (int n = 0; n < entries; ++n)
        for (int h = 0; h < heads; ++h)
            for (int i = 0; i < half; ++i) {
                const size_t at = (size_t(n) * heads + h) * width + i, table = size_t(n % positions) * half + i;
                const double a = get(x[at]), b = get(x[at + half]), c = cos[table], s = double(sin[table]) * direction;
                expected[at] = a * c - b * s;
                expected[at + half] = b * c + a * s;
            }
    Guarded<T> got(x, run.at_end());
    Guarded<float> device_cos(cos, run.at_end()), device_sin(sin, run.at_end());
    const rotary::RopeArgs args{got.data(), device_cos.data(), device_sin.data(), entries, positions,
                                heads,      width,             rotated,           direction};
    const unsigned threads = unsigned(entries * heads * (half / V));
    emulated::launch(dim3((threads + 31) / 32), dim3(32), 0, [&] { rotary::rotate<T, V>(args); }, run.order());
    close<T>("rope", text, got, expected);

    const auto g = random<float>(x.size(), 5), omega = random<float>(half, 6);
    auto start = random<float>(positions, 7);
    std::vector<double> sums(start.begin(), start.end());
    Guarded<double> got_sums(sums, run.at_end());
    for (int n = 0; n < entries; ++n)
        for (int h = 0; h < heads; ++h)
            for (int i = 0; i < half; ++i) {
                const size_t at = (size_t(n) * heads + h) * width + i;
                sums[n % positions] += double(omega[i]) * (double(g[at]) * get(x[at]) + double(g[at + half]) * get(x[at + half]));
            }
    Guarded<T> device_y(x, run.at_end());
    Guarded<float> device_g(g, run.at_end()), device_omega(omega, run.at_end());
    const rotary::DampingArgs damping{device_y.data(), device_g.data(), device_omega.data(), got_sums.data(), entries,
                                      positions,       heads,           width,               half};
    emulated::launch(dim3(positions), dim3(128), 128 * sizeof(double), [&] { rotary::damping<T>(damping); }, run.order());
    std::vector<float> rounded(got_sums.data(), got_sums.data() + positions);
    close<float>("rope damping of " + std::string(name<T>()), text, rounded, sums, 1e-5);
}

template <class X, class Y, int V, bool LAYER>
void check_norm(int rows, int width, bool bias, bool learns, int rows_per_block) {
    const Run run{runs++};
    const std::string kind = LAYER ? "layer_norm" : "rms_norm";
    char text[80];
    std::snprintf(text, sizeof text, "[%d, %d], %d rows a block, V %d", rows, width, rows_per_block, V);
    auto x = random<X>(size_t(rows) * width, 1, 3.0f);
    // A mean that is not small against the deviation.
    for (X& value : x) value = put<X>(get(value) + 2.0f);
    const auto gain = random<float>(width, 2), b = random<float>(width, 3), g = random<float>(x.size(), 4);
    const auto dx_start = random<float>(x.size(), 5), dw_start = random<float>(width, 6), db_start = random<float>(width, 7);
    const float eps = 1e-3f;
    std::vector<double> y(x.size()), dx = wide(dx_start), dw = wide(dw_start), db = wide(db_start);
    for (int r = 0; r < rows; ++r) {
        const size_t at = size_t(r) * width;
        double mean = 0, square = 0, even = 0, pull = 0;
        for (int i = 0; i < width; ++i) mean += LAYER ? get(x[at + i]) / double(width) : 0.0;
        for (int i = 0; i < width; ++i) square += std::pow(get(x[at + i]) - mean, 2) / width;
        const double root = 1 / std::sqrt(square + eps);
        auto z = [&](int i) { return (get(x[at + i]) - mean) * root; };
        for (int i = 0; i < width; ++i) {
            const double gw = double(g[at + i]) * gain[i];
            if (LAYER) even += gw / width;
            pull += gw * z(i) / width;
        }
        for (int i = 0; i < width; ++i) {
            y[at + i] = z(i) * gain[i] + (LAYER && bias ? b[i] : 0.0f);
            dx[at + i] += root * (double(g[at + i]) * gain[i] - even - z(i) * pull);
            if (learns) dw[i] += g[at + i] * z(i);
            if (learns && LAYER) db[i] += g[at + i];
        }
    }
    const bool at_end = run.at_end();
    Guarded<X> device_x(x, at_end);
    Guarded<Y> got_y(x.size(), at_end);
    Guarded<float> device_gain(gain, at_end), device_bias(b, at_end), device_g(g, at_end);
    Guarded<float> got_dx(dx_start, at_end), got_dw(dw_start, at_end), got_db(db_start, at_end);
    const int blocks = (rows + rows_per_block - 1) / rows_per_block;
    Guarded<float> partials(size_t(blocks) * 2 * width, at_end);
    norms::NormArgs args{};
    args.x = device_x.data();
    args.gain = device_gain.data();
    args.bias = bias ? device_bias.data() : nullptr;
    args.y = got_y.data();
    args.gradient = device_g.data();
    args.dx = got_dx.data();
    args.partials = learns ? partials.data() : nullptr;
    args.rows = rows;
    args.width = width;
    args.rows_per_block = rows_per_block;
    args.eps = eps;
    emulated::launch(dim3(rows), dim3(64), 128, [&] { norms::forward<X, Y, V, LAYER>(args); }, run.order());
    close<Y>(kind + " y", text, got_y, y);
    emulated::launch(dim3(blocks), dim3(96), 128 + (learns ? 8u * width : 0u), [&] { norms::backward<X, V, LAYER>(args); },
                     run.order());
    close<float>(kind + " dx of " + name<X>(), text, got_dx, dx);
    if (!learns) return;
    emulated::launch(dim3((width + 31) / 32), dim3(32), 0,
                     [&] {
                         norms::norm_sums(partials.data(), blocks, width, got_dw.data(), LAYER ? got_db.data() : nullptr);
                     },
                     run.order());
    close<float>(kind + " dw of " + name<X>(), text, got_dw, dw);
    if (LAYER) close<float>(kind + " db of " + name<X>(), text, got_db, db);
}

// Row 1 is ignored, row 2 has no scale.
template <class T>
void check_losses(int rows, int vocab, float cap, float size) {
    const Run run{runs++};
    const bool at_end = run.at_end();
    char text[80];
    std::snprintf(text, sizeof text, "[%d, %d], cap %g, logits to %g", rows, vocab, double(cap), double(size));
    auto z = random<float>(size_t(rows) * vocab, 1, size);
    auto t = random<T>(z.size(), 2, size);
    // What the teacher excludes.
    if (vocab > 2) t[1] = put<T>(-INFINITY);
    std::vector<unsigned> targets(rows);
    std::vector<float> scales(rows);
    for (int r = 0; r < rows; ++r) {
        targets[r] = r == 1 ? losses::IGNORE : unsigned(r * 31 % vocab);
        scales[r] = r == 2 ? 0.0f : 0.5f + 0.25f * float(r);
    }
    std::vector<double> nll(rows), kl(rows), dz(z.size()), dk(z.size());
    for (int r = 0; r < rows; ++r) {
        const size_t at = size_t(r) * vocab;
        auto capped = [&](int i) { return cap > 0 ? cap * std::tanh(double(z[at + i]) / cap) : double(z[at + i]); };
        double top = -INFINITY, teacher_top = -INFINITY, total = 0, teacher_total = 0;
        for (int i = 0; i < vocab; ++i) top = std::max(top, capped(i)), teacher_top = std::max(teacher_top, double(get(t[at + i])));
        for (int i = 0; i < vocab; ++i) total += std::exp(capped(i) - top), teacher_total += std::exp(get(t[at + i]) - teacher_top);
        for (int i = 0; i < vocab; ++i) {
            const double log_q = capped(i) - top - std::log(total), log_p = get(t[at + i]) - teacher_top - std::log(teacher_total);
            const double q = std::exp(log_q), p = std::exp(log_p);
            const double slope = cap > 0 ? 1 - std::pow(capped(i) / cap, 2) : 1.0;
            const bool hit = targets[r] == unsigned(i);
            if (hit) nll[r] = -log_q;
            if (targets[r] != losses::IGNORE) dz[at + i] = scales[r] * (q - hit) * slope;
            if (p > 0) kl[r] += p * (log_p - log_q);
            dk[at + i] = scales[r] * (q - p) * slope;
        }
    }
    Guarded<float> got_z(z, at_end), got_k(z, at_end), device_scales(scales, at_end), got_nll(rows, at_end), got_kl(rows, at_end);
    Guarded<unsigned> device_targets(targets, at_end);
    Guarded<T> device_t(t, at_end);
    losses::LossArgs args{got_z.data(), device_targets.data(), nullptr, device_scales.data(), got_nll.data(), vocab, cap};
    emulated::launch(dim3(rows), dim3(96), 128, [&] { losses::loss_nll(args); }, run.order());
    close<float>("nll", text, got_nll, nll);
    close<float>("nll gradient", text, got_z, dz);
    args.logits = got_k.data();
    args.targets = nullptr;
    args.teacher = device_t.data();
    args.losses = got_kl.data();
    emulated::launch(dim3(rows), dim3(96), 128, [&] { losses::divergence<T>(args); }, run.order());
    close<float>("kl, teacher " + std::string(name<T>()), text, got_kl, kl);
    close<float>("kl gradient, teacher " + std::string(name<T>()), text, got_k, dk);
}

// What is not finite shows in its own row's loss and in no other's.
static void check_not_finite() {
    const int vocab = 200;
    for (float bad : {float(NAN), float(INFINITY), -float(INFINITY)}) {
        auto z = random<float>(3 * vocab, 1);
        z[vocab + 150] = bad;
        Guarded<float> logits(z), scales(std::vector<float>(3, 1.0f)), nll(3);
        Guarded<unsigned> targets(std::vector<unsigned>(3, 7u));
        const losses::LossArgs args{logits.data(), targets.data(), nullptr, scales.data(), nll.data(), vocab, 0.0f};
        emulated::launch(dim3(3), dim3(64), 128, [&] { losses::loss_nll(args); });
        // An excluded token is none of the others' business.
        const bool expected = bad == -float(INFINITY);
        if (std::isfinite(nll[1]) != expected || !std::isfinite(nll[0]) || !std::isfinite(nll[2])) {
            ++failures();
            std::printf("FAILED nll of a row with %g: %g, and beside it %g and %g\n", double(bad), double(nll[1]),
                        double(nll[0]), double(nll[2]));
        }
    }
}

static void check_adamw(int count, int step) {
    const Run run{runs++};
    const bool at_end = run.at_end();
    const double lr = 1e-2, beta1 = 0.9, beta2 = 0.99, eps = 1e-8, decay = 0.1, scale = 0.5;
    const double correction1 = 1 - std::pow(beta1, step), correction2 = 1 - std::pow(beta2, step);
    auto p = random<float>(count, 1), g = random<float>(count, 2), m = random<float>(count, 3), v = random<float>(count, 4);
    for (float& value : v) value = std::fabs(value);
    std::vector<double> next_p(count), next_m(count), next_v(count);
    auto update = [&](int i, double gradient) {
        gradient *= scale;
        next_m[i] = beta1 * m[i] + (1 - beta1) * gradient;
        next_v[i] = beta2 * v[i] + (1 - beta2) * gradient * gradient;
        next_p[i] = p[i] * (1 - lr * decay) - lr * (next_m[i] / correction1) / (std::sqrt(next_v[i] / correction2) + eps);
    };
    char text[80];
    std::snprintf(text, sizeof text, "%d values, step %d", count, step);
    optimiser::AdamWArgs args{};
    args.count = count;
    args.decay = float(1 - lr * decay);
    args.beta1 = float(beta1);
    args.beta2 = float(beta2);
    args.step_size = float(lr / correction1);
    args.root_scale = float(1 / std::sqrt(correction2));
    args.eps = float(eps);
    args.gradient_scale = float(scale);
    {
        for (int i = 0; i < count; ++i) update(i, g[i]);
        // The last vector of four may be short, so arrays begin where memory is aligned.
        Guarded<float> got_p(p, false), got_g(g, false), got_m(m, false), got_v(v, false);
        args.p = got_p.data(), args.g = got_g.data(), args.m = got_m.data(), args.v = got_v.data();
        emulated::launch(dim3((count + 127) / 128), dim3(32), 0, [&] { optimiser::adamw(args); }, run.order());
        close<float>("adamw p", text, got_p, next_p);
        close<float>("adamw m", text, got_m, next_m);
        close<float>("adamw v", text, got_v, next_v);
    }
    // The same values as a table with a gradient for some rows.
    const int width = 5, table = count / width;
    const std::vector<unsigned> ids = table > 6 ? std::vector<unsigned>{0, 3, unsigned(table) - 1} : std::vector<unsigned>{};
    for (int untouched : {0, 1}) {
        for (int i = 0; i < count; ++i) next_p[i] = p[i], next_m[i] = m[i], next_v[i] = v[i];
        for (int row = 0; row < table; ++row) {
            const auto found = std::find(ids.begin(), ids.end(), unsigned(row));
            for (int i = 0; i < width; ++i) {
                if (found != ids.end()) update(row * width + i, g[(found - ids.begin()) * width + i]);
                else if (untouched) update(row * width + i, 0);
            }
        }
        Guarded<float> got_p(p, at_end), got_m(m, at_end), got_v(v, at_end);
        Guarded<float> rows(std::vector<float>(g.begin(), g.begin() + std::min<size_t>(g.size(), ids.size() * width)), at_end);
        Guarded<unsigned> device_ids(ids, at_end);
        args.p = got_p.data(), args.g = rows.data(), args.m = got_m.data(), args.v = got_v.data();
        args.ids = device_ids.data();
        args.touched = int(ids.size());
        args.width = width;
        args.step_untouched = untouched;
        emulated::launch(dim3(table), dim3(32), 0, [&] { optimiser::adamw_rows(args); }, run.order());
        close<float>("adamw rows p", text, got_p, next_p);
        close<float>("adamw rows m", text, got_m, next_m);
        close<float>("adamw rows v", text, got_v, next_v);
    }
    const int per_block = 100, blocks = (count + per_block - 1) / per_block;
    Guarded<float> device_g(g, at_end);
    Guarded<double> partials(blocks, at_end);
    emulated::launch(dim3(blocks), dim3(64), 64 * sizeof(double),
                     [&] { optimiser::sum_of_squares(device_g.data(), count, per_block, partials.data()); }, run.order());
    double sum = 0, expected = 0;
    for (int i = 0; i < blocks; ++i) sum += partials[i];
    for (float value : g) expected += double(value) * value;
    close<float>("sum of squares", text, std::vector<float>{float(sum)}, {expected}, 1e-7);
}

template <class T, int V>
void check_stored() {
    for (float direction : {1.0f, -1.0f}) {
        check_rope<T, 1>(5, 5, 3, 10, 10, direction);
        check_rope<T, 1>(6, 3, 2, 14, 6, direction);
        check_rope<T, V>(7, 7, 3, 64, 64, direction);
        check_rope<T, V>(8, 4, 1, 80, 48, direction);
    }
    for (bool learns : {false, true}) {
        check_norm<T, T, 1, false>(5, 37, false, learns, 2);
        check_norm<T, T, V, false>(7, 1040, false, learns, 3);
        check_norm<T, T, 1, true>(5, 37, true, learns, 5);
        check_norm<T, T, V, true>(7, 520, false, learns, 3);
        check_norm<T, T, V, true>(3, 64, true, learns, 1);
    }
    for (int vocab : {1, 5, 96, 1031})
        for (float cap : {0.0f, 15.0f}) {
            check_losses<T>(4, vocab, cap, 4.0f);
            check_losses<T>(3, vocab, cap, 90.0f);
        }
}

int main() {
    check_stored<float, 4>();
    check_stored<Bf16, 8>();
    check_stored<F16, 8>();
    check_norm<float, Bf16, 4, false>(4, 48, false, false, 2);
    check_norm<float, F16, 4, true>(4, 48, true, false, 2);
    check_norm<Bf16, float, 4, true>(4, 48, true, false, 2);
    check_norm<F16, float, 4, false>(4, 48, false, false, 2);
    check_not_finite();
    for (int count : {1, 7, 128, 515})
        for (int step : {1, 10}) check_adamw(count, step);
    return finish();
}
