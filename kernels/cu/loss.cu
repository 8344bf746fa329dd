// Losses of positions over a chunk of logits, which become their own gradient in place.
//
// With p and q the softmaxes of teacher and student, z the logits and c the cap (z' = c·tanh(z/c), dz'/dz = 1 − (z'/c)²):
//   NLL = lse(z) − z_target,       gradient scale·(softmax(z) − onehot(target));
//   KL  = Σ p·(log p − log q),     gradient scale·(q − p).
// The walk over chunks of positions and the products with the head belong to the caller: the logits of all positions never
// exist at once.
//
// Shapes: z [rows, V] in f32 before the cap, t [rows, V]; targets, scales and losses [rows]. Units: nats. A row of scale 0
// has its loss, and zeros for a gradient. A target of IGNORE has loss 0 and zeros. NaN comes through, and an infinite logit
// gives NaN or infinity.
// Grid: rows; threads: whole warps; shared memory: 32 values.
#include "device.cuh"

constexpr unsigned IGNORE = 0xffffffffu;

struct LossArgs {
    float* logits;
    const unsigned* targets;
    const void* teacher;
    const float* scales;
    float* losses;
    int vocab;
    // 0 for none.
    float cap;
};

// log Σ e^z as a maximum and the logarithm of a sum: z − max − log is exact for large z, z − (max + log) is not.
struct LogSum {
    float max, log;
    __device__ __forceinline__ float of(float z) const { return z - max - log; }
};

// One pass: every thread keeps the greatest of its values and a sum against it. Values are capped on the way and written
// back where there is a cap.
template <class T, bool CAPPED>
__device__ __forceinline__ LogSum log_sum(T* z, int vocab, float cap, float* scratch) {
    float greatest = -INFINITY, sum = 0.0f;
    for (int i = int(threadIdx.x); i < vocab; i += int(blockDim.x)) {
        float value = get(z[i]);
        if constexpr (CAPPED)
            if (cap != 0.0f) z[i] = value = cap * tanhf(value / cap);
        if (value > greatest) {
            sum = sum * expf(greatest - value) + 1.0f;
            // Infinity minus itself is what a sum over infinity has to be.
            if (value == INFINITY) sum = NAN;
            greatest = value;
        } else if (greatest != -INFINITY) {
            sum += expf(value - greatest);
        } else if (value != value) {
            sum = NAN;
        }
    }
    const float max = block_max(greatest, scratch);
    // A thread without a finite value has nothing to add, but what is NaN stays so.
    const float part = greatest == -INFINITY ? (sum != sum ? sum : 0.0f) : sum * expf(greatest - max);
    return LogSum{max, logf(block_sum(part, scratch))};
}

__device__ __forceinline__ float through(float z, float cap) {
    const float part = cap != 0.0f ? z / cap : 0.0f;
    return 1.0f - part * part;
}

// Not inside the kernel itself: what has C linkage would give the shared memory a name of its own kind.
__device__ __forceinline__ void cross_entropy(const LossArgs& a) {
    SHARED(memory);
    float* const z = a.logits + blockIdx.x * (long long)a.vocab;
    const unsigned target = a.targets[blockIdx.x];
    const float scale = target == IGNORE ? 0.0f : a.scales[blockIdx.x];
    if (target != IGNORE) {
        const LogSum lse = log_sum<float, true>(z, a.vocab, a.cap, reinterpret_cast<float*>(memory));
        // All have to be done with capping before one of them reads what another wrote: log_sum ends with a barrier behind
        // every write. And none may overwrite the target's logit before it is read.
        const float hit = z[target];
        __syncthreads();
        if (threadIdx.x == 0) a.losses[blockIdx.x] = (lse.max - hit) + lse.log;
        if (scale != 0.0f) {
            for (int i = int(threadIdx.x); i < a.vocab; i += int(blockDim.x)) {
                const float q = expf(lse.of(z[i]));
                z[i] = scale * (unsigned(i) == target ? q - 1.0f : q) * through(z[i], a.cap);
            }
            return;
        }
    } else if (threadIdx.x == 0) {
        a.losses[blockIdx.x] = 0.0f;
    }
    for (int i = int(threadIdx.x); i < a.vocab; i += int(blockDim.x)) z[i] = 0.0f;
}

template <class T>
__device__ void divergence(const LossArgs& a) {
    SHARED(memory);
    float* const scratch = reinterpret_cast<float*>(memory);
    float* const z = a.logits + blockIdx.x * (long long)a.vocab;
    const T* const t = static_cast<const T*>(a.teacher) + blockIdx.x * (long long)a.vocab;
    const float scale = a.scales[blockIdx.x];
    const LogSum student = log_sum<float, true>(z, a.vocab, a.cap, scratch);
    const LogSum teacher = log_sum<const T, false>(t, a.vocab, 0.0f, scratch);
    float sum = 0.0f;
    for (int i = int(threadIdx.x); i < a.vocab; i += int(blockDim.x)) {
        const float log_p = teacher.of(get(t[i])), log_q = student.of(z[i]), p = expf(log_p);
        // What the teacher excludes adds nothing, though its logarithm is infinite.
        if (p != 0.0f) sum += p * (log_p - log_q);
        z[i] = scale != 0.0f ? scale * (expf(log_q) - p) * through(z[i], a.cap) : 0.0f;
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) a.losses[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(256) loss_nll(const LossArgs a) { cross_entropy(a); }

#define DIVERGENCE(T, name) \
    extern "C" __global__ void __launch_bounds__(256) loss_kl_##name(const LossArgs a) { divergence<T>(a); }
DIVERGENCE(float, f32)
DIVERGENCE(Bf16, bf16)
DIVERGENCE(F16, f16)
