// What the tests of emulated kernels share: inputs, comparison with an f64 reference, a table of errors.
#pragma once

#include <algorithm>
#include <map>
#include <string>

#include "../device.cuh"

namespace check {

using emulated::Guarded;
using emulated::Order;

// Even numbers of a run begin arrays at a page, odd ones end them there; the order of threads changes with it.
struct Run {
    unsigned number;
    bool at_end() const { return number % 2; }
    Order order() const { return Order(number % 3); }
};

struct Random {
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed * 2862933555777941757u + 3037000493u) {}
    // Uniform in −1..1.
    float next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return float(int64_t(state) >> 33) / float(1 << 30);
    }
};

template <class T>
const char* name();
template <>
inline const char* name<float>() {
    return "f32";
}
template <>
inline const char* name<Bf16>() {
    return "bf16";
}
template <>
inline const char* name<F16>() {
    return "f16";
}

// What results may be off by, relative to the greatest value of the reference: the project's bounds for f32 and bf16, and
// for f16, which has three bits more than bf16, a fourth of bf16's.
template <class T>
constexpr double tolerance() {
    return sizeof(T) == 4 ? 1e-4 : 2e-2;
}
template <>
constexpr double tolerance<F16>() {
    return 5e-3;
}

template <class T>
std::vector<T> random(size_t count, uint64_t seed, float size = 1.0f) {
    Random random(seed);
    std::vector<T> values(count);
    for (T& value : values) value = put<T>(size * random.next());
    return values;
}

// The greatest error of each line of the table.
inline std::map<std::string, double>& errors() {
    static std::map<std::string, double> table;
    return table;
}
inline int& failures() {
    static int count = 0;
    return count;
}

// Holds `got` against `expected`; NaN never passes.
template <class T, class Got>
void close(const std::string& line, const std::string& what, const Got& got, const std::vector<double>& expected,
           double bound = tolerance<T>()) {
    double size = 0, apart = 0;
    size_t where = 0;
    for (double e : expected) size = std::max(size, std::fabs(e));
    for (size_t i = 0; i < expected.size(); ++i) {
        const double difference = std::fabs(double(get(got[i])) - expected[i]);
        if (!(difference <= apart)) {
            apart = difference;
            where = i;
            if (difference != difference) break;
        }
    }
    const double relative = size > 0 ? apart / size : apart;
    double& worst = errors()[line + " " + name<T>()];
    worst = std::max(worst, relative);
    if (!(relative <= bound)) {
        ++failures();
        std::printf("FAILED %s %s, %s: at %zu got %g, expected %g (off by %.2e of the greatest, allowed %.0e)\n", line.c_str(),
                    name<T>(), what.c_str(), where, double(get(got[where])), expected[where], relative, bound);
    }
}

inline int finish() {
    for (const auto& [line, error] : errors()) std::printf("%-48s %.1e\n", line.c_str(), error);
    if (failures()) std::printf("%d comparisons failed\n", failures());
    return failures() ? 1 : 0;
}

}  // namespace check
