// Shared memory in bytes of the largest block of each attention kernel, as a table.
#include <cstdio>

#include "../attention.cuh"

template <class T, int D>
void line(const char* name) {
    using S = Sizes<T, D>;
    std::printf("%-5s %4d %10zu %10zu %10zu\n", name, D, S::forward_bytes(S::FORWARD_WARPS),
                S::queries_bytes(S::BACKWARD_WARPS), S::keys_bytes(S::BACKWARD_WARPS));
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
    std::printf("%-5s %4s %10s %10s %10s\n", "", "D", "forward", "queries", "keys");
    lines<Bf16>("16bit");
    lines<float>("f32");
}
