// Sizes of the structs that kernels take, and where their fields lie, in the order of their declaration.
#include <cstdio>

#include "../attention.cuh"
#include "../attention_bounds.cu"
#include "../rope.cu"
namespace norms {
#include "../norm.cu"
}
namespace losses {
#include "../loss.cu"
}
#include "../adamw.cu"
namespace streams {
#include "../rows.cu"
}
namespace feeding {
#include "../mlp.cu"
}
#include "../embedding.cu"
#include "../dora.cu"

#define STRUCT(name, type) std::printf("\n%s %zu", name, sizeof(type))
#define FIELD(type, field) std::printf(" %s %zu", #field, offsetof(type, field))

int main() {
    STRUCT("Operand", Operand);
    FIELD(Operand, data), FIELD(Operand, row), FIELD(Operand, entry), FIELD(Operand, head);
    using A = AttentionArgs;
    STRUCT("AttentionArgs", A);
    FIELD(A, q), FIELD(A, k), FIELD(A, v), FIELD(A, d_out), FIELD(A, document_k), FIELD(A, document_v), FIELD(A, prefix);
    FIELD(A, lengths), FIELD(A, lo), FIELD(A, hi), FIELD(A, slopes), FIELD(A, positions), FIELD(A, out), FIELD(A, lse);
    FIELD(A, delta), FIELD(A, dq), FIELD(A, dk), FIELD(A, dv), FIELD(A, entries), FIELD(A, heads), FIELD(A, kv_heads);
    FIELD(A, width), FIELD(A, scale);
    using B = BoundsArgs;
    STRUCT("BoundsArgs", B);
    FIELD(B, pattern), FIELD(B, size), FIELD(B, batch), FIELD(B, entries), FIELD(B, lengths), FIELD(B, offsets);
    FIELD(B, segments), FIELD(B, prefix), FIELD(B, floor), FIELD(B, document), FIELD(B, lo), FIELD(B, hi);
    STRUCT("RopeArgs", RopeArgs);
    FIELD(RopeArgs, x), FIELD(RopeArgs, cos), FIELD(RopeArgs, sin), FIELD(RopeArgs, entries), FIELD(RopeArgs, positions);
    FIELD(RopeArgs, heads), FIELD(RopeArgs, width), FIELD(RopeArgs, rotated), FIELD(RopeArgs, direction);
    using D = DampingArgs;
    STRUCT("DampingArgs", D);
    FIELD(D, y), FIELD(D, gradient), FIELD(D, omega_squared), FIELD(D, sums), FIELD(D, entries), FIELD(D, positions);
    FIELD(D, heads), FIELD(D, width), FIELD(D, bands);
    using N = norms::NormArgs;
    STRUCT("NormArgs", N);
    FIELD(N, x), FIELD(N, gain), FIELD(N, bias), FIELD(N, y), FIELD(N, gradient), FIELD(N, dx), FIELD(N, partials);
    FIELD(N, rows), FIELD(N, width), FIELD(N, rows_per_block), FIELD(N, eps);
    using L = losses::LossArgs;
    STRUCT("LossArgs", L);
    FIELD(L, logits), FIELD(L, targets), FIELD(L, teacher), FIELD(L, scales), FIELD(L, losses), FIELD(L, vocab), FIELD(L, cap);
    using W = AdamWArgs;
    STRUCT("AdamWArgs", W);
    FIELD(W, p), FIELD(W, g), FIELD(W, m), FIELD(W, v), FIELD(W, count), FIELD(W, decay), FIELD(W, beta1), FIELD(W, beta2);
    FIELD(W, step_size), FIELD(W, root_scale), FIELD(W, eps), FIELD(W, gradient_scale), FIELD(W, ids), FIELD(W, touched);
    FIELD(W, width), FIELD(W, step_untouched);
    using R = streams::RowsArgs;
    STRUCT("RowsArgs", R);
    FIELD(R, x), FIELD(R, y), FIELD(R, count), FIELD(R, width), FIELD(R, factor);
    using S = streams::SumArgs;
    STRUCT("SumArgs", S);
    FIELD(S, g), FIELD(S, z), FIELD(S, norms), FIELD(S, partials), FIELD(S, sum), FIELD(S, rows), FIELD(S, width), FIELD(S, rows_per_piece), FIELD(S, pieces);
    using H = streams::HeadsArgs;
    STRUCT("HeadsArgs", H);
    FIELD(H, fused), FIELD(H, q), FIELD(H, k), FIELD(H, v), FIELD(H, heads), FIELD(H, width);
    using M = feeding::MlpArgs;
    STRUCT("MlpArgs", M);
    FIELD(M, gate), FIELD(M, up), FIELD(M, out), FIELD(M, gradient), FIELD(M, count), FIELD(M, activation);
    STRUCT("GatherArgs", GatherArgs);
    FIELD(GatherArgs, table), FIELD(GatherArgs, ids), FIELD(GatherArgs, out), FIELD(GatherArgs, count);
    FIELD(GatherArgs, width);
    using C = ScatterArgs;
    STRUCT("ScatterArgs", C);
    FIELD(C, rows), FIELD(C, table), FIELD(C, ids), FIELD(C, starts), FIELD(C, places), FIELD(C, width);
    using P = streams::DropoutArgs;
    STRUCT("DropoutArgs", P);
    FIELD(P, x), FIELD(P, y), FIELD(P, count), FIELD(P, first), FIELD(P, seed), FIELD(P, threshold);
    using K = ColumnsArgs;
    STRUCT("ColumnsArgs", K);
    FIELD(K, x), FIELD(K, c), FIELD(K, y), FIELD(K, count), FIELD(K, width), FIELD(K, add);
    std::printf("\n");
}
