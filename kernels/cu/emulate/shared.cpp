// Tiles of the attention kernels as a table: shared memory in bytes of the largest block of each and of forward's
// smallest, queries of a warp of forward, blocks for the parts of a row in the gradients of keys, and warps.
#include <cstdio>

#include "../attention.cuh"

template <class T, int D>
void line(const char* name) {
    using S = Sizes<T, D>;
    std::printf("%-5s %4d %10zu %10zu %10zu %10zu %8d %6d %8d %9d\n", name, D, S::forward_bytes(S::FORWARD_WARPS),
                S::queries_bytes(S::BACKWARD_WARPS), S::keys_bytes(S::BACKWARD_WARPS), S::forward_bytes(1),
                16 * S::FORWARD_PIECES, D / S::COLUMNS, S::FORWARD_WARPS, S::BACKWARD_WARPS);
}

template <class T>
void lines(const char* name) {
    line<T, 32>(name);
    line<T, 64>(name);
    line<T, 96>(name);
    line<T, 128>(name);
    line<T, 256>(name);
}

int main() {
    std::printf("%-5s %4s %10s %10s %10s %10s %8s %6s %8s %9s\n", "", "D", "forward", "queries", "keys", "smallest", "of warp",
                "parts", "forward", "backward");
    lines<Bf16>("16bit");
    lines<float>("f32");
}
