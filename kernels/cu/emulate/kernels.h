// The kernels of this folder by name, for the emulated driver: how each is called, and what it is launched with at most.
#pragma once

#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "../attention_bounds.cu"
#include "../attention_forward.cu"
#include "../attention_backward.cu"
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

namespace emulated_driver {

// Calls a kernel with the arguments that `params` points to.
template <class... Args, size_t... I>
void call(void (*kernel)(Args...), void** params, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<Args>*>(params[I])...);
}
template <auto KERNEL, class... Args>
void through(void (*)(Args...), void** params) {
    call(KERNEL, params, std::make_index_sequence<sizeof...(Args)>());
}

struct Kernel {
    const char* module;
    unsigned threads;
    void (*run)(void** params);
    size_t shared = 48 << 10;
};

inline std::map<std::string, Kernel>& kernels() {
#define KERNEL(module, name, threads) \
    {#name, Kernel{module, threads, [](void** params) { through<&name>(&name, params); }}},
#define KINDS(module, name, threads) \
    KERNEL(module, name##_f32, threads) KERNEL(module, name##_bf16, threads) KERNEL(module, name##_f16, threads)
#define WIDTHS(module, name)                                                                                   \
    KINDS_OF(module, name, 32) KINDS_OF(module, name, 64) KINDS_OF(module, name, 96) KINDS_OF(module, name, 128) \
    KINDS_OF(module, name, 256)
#define KINDS_OF(module, name, D) \
    KERNEL(module, name##_f32_##D, 128) KERNEL(module, name##_bf16_##D, 128) KERNEL(module, name##_f16_##D, 128)
#define PAIRS(module, name)                                                                            \
    KINDS(module, name, 256)                                                                           \
    KERNEL(module, name##_f32_to_bf16, 256) KERNEL(module, name##_f32_to_f16, 256)                     \
    KERNEL(module, name##_bf16_to_f32, 256) KERNEL(module, name##_f16_to_f32, 256)
// One value at a time, and vectors.
#define BOTH(of, module, name) of(module, name) of(module, name##_vectors)
#define KINDS_256(module, name) KINDS(module, name, 256)
    using namespace rotary;
    using namespace norms;
    using namespace losses;
    using namespace optimiser;
    using namespace streams;
    using namespace feeding;
    using namespace tables;
    using namespace magnitudes;
    static std::map<std::string, Kernel> table{
        KERNEL("attention_bounds", attention_bounds, 1024)
        WIDTHS("attention_forward", attention_forward)
        KINDS("attention_backward", attention_delta, 256)
        WIDTHS("attention_backward", attention_queries)
        WIDTHS("attention_backward", attention_keys)
        KINDS("rope", rope, 256) KINDS("rope", rope_vectors, 256) KINDS("rope", rope_damping, 128)
        BOTH(PAIRS, "norm", rms_forward) BOTH(PAIRS, "norm", layer_forward)
        BOTH(KINDS_256, "norm", rms_backward) BOTH(KINDS_256, "norm", layer_backward)
        KERNEL("norm", norm_sums, 1024)
        KERNEL("loss", loss_nll, 256) KINDS("loss", loss_kl, 256)
        KERNEL("adamw", adamw, 256) KERNEL("adamw", adamw_rows, 256) KERNEL("adamw", sum_of_squares, 256)
        BOTH(PAIRS, "rows", rows_convert) BOTH(PAIRS, "rows", rows_add)
        BOTH(PAIRS, "rows", rows_fill) BOTH(PAIRS, "rows", rows_add_bias)
        BOTH(KINDS_256, "rows", rows_scale) BOTH(KINDS_256, "rows", rows_sum_piece) KERNEL("rows", rows_sum, 256)
        BOTH(KINDS_256, "rows", rows_split) BOTH(KINDS_256, "rows", rows_join)
        BOTH(KINDS_256, "rows", rows_dropout)
        KERNEL("rows", rows_dropout_add_f32, 256) KERNEL("rows", rows_dropout_add_vectors_f32, 256)
        BOTH(KINDS_256, "mlp", mlp_forward) BOTH(KINDS_256, "mlp", mlp_backward)
        BOTH(PAIRS, "embedding", embedding_gather)
        KERNEL("embedding", embedding_scatter, 256) KERNEL("embedding", embedding_scatter_vectors, 256)
        BOTH(PAIRS, "dora", dora_columns)
        KERNEL("dora", dora_lengths, 256)
    };
    return table;
}

}  // namespace emulated_driver
