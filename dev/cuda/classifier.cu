// The ladder of crossentropy: loss and gradient of every token from its row of logits. The gradient is
// written over the logits: nothing in training is larger, 1.65 GB here.
//   losses[m] = logsumexp_v(logits[m,v]) - logits[m,target]    dlogits = scale * (softmax - onehot(target))
//   v1  the formula: a kernel for the softmax (maximum, sum, probabilities: three passes), one for the
//       gradient
//   v2  one kernel: maximum and sum in one pass, the gradient in a second
//   v3  16-byte loads and stores. The row is read twice, the second time from the cache
//   v4  the shipped one: the row waits in shared memory for the second pass
// One block per row in all of them. The timed launches find the gradients of the launch before as their
// logits: other numbers, the same work.
#include "ladder.h"

enum { M_TIMED = 16384, V_TIMED = 50280, M_SMALL = 37, V_SMALL = 1008, PERIOD = 61, THREADS = 512 };
static const float SCALE = 1.0f / M_TIMED;
static bf16* logits;
static float *losses, *scale_d;
static int* targets_d;
static size_t M, V;

// block_reduce: the largest, or the sum, over the block, for all threads
template <bool MAX> __device__ float block_reduce(float x) {
    __shared__ float part[THREADS / WARP];
    for (int step = WARP / 2; step > 0; step /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, x, step);
        x = MAX ? fmaxf(x, other) : x + other;
    }
    __syncthreads();                                 // an earlier call may still be reading
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = x;
    __syncthreads();
    x = part[0];
    for (int w = 1; w < THREADS / WARP; w++) x = MAX ? fmaxf(x, part[w]) : x + part[w];
    return x;
}

// v1
__global__ void softmax_kernel1(float* losses, bf16* z, const int* targets, size_t V) {
    bf16* z_m = z + blockIdx.x * V;
    int target = targets[blockIdx.x];
    float z_target = target < 0 ? 0.0f : to_float(z_m[target]), max = -INFINITY, sum = 0;
    for (size_t v = threadIdx.x; v < V; v += THREADS) max = fmaxf(max, to_float(z_m[v]));
    max = block_reduce<true>(max);
    for (size_t v = threadIdx.x; v < V; v += THREADS) sum += expf(to_float(z_m[v]) - max);
    sum = block_reduce<false>(sum);
    for (size_t v = threadIdx.x; v < V; v += THREADS)
        z_m[v] = from_float<bf16>(expf(to_float(z_m[v]) - max) / sum);
    if (threadIdx.x == 0) losses[blockIdx.x] = target < 0 ? 0.0f : logf(sum) + max - z_target;
}
__global__ void gradient_kernel1(bf16* z, const int* targets, const float* scale, size_t V) {
    bf16* z_m = z + blockIdx.x * V;
    int target = targets[blockIdx.x];
    float s = target < 0 ? 0.0f : *scale;
    for (size_t v = threadIdx.x; v < V; v += THREADS)
        z_m[v] = from_float<bf16>(s * (to_float(z_m[v]) - ((int)v == target ? 1.0f : 0.0f)));
}
static void launch1(void) {
    softmax_kernel1<<<(unsigned)M, THREADS>>>(losses, logits, targets_d, V);
    gradient_kernel1<<<(unsigned)M, THREADS>>>(logits, targets_d, scale_d, V);
}

// v2
__global__ void crossentropy_kernel2(float* losses, bf16* z, const int* targets, const float* scale,
                                     size_t V) {
    bf16* z_m = z + blockIdx.x * V;
    int target = targets[blockIdx.x];
    float z_target = target < 0 ? 0.0f : to_float(z_m[target]), max = -INFINITY, sum = 0;
    for (size_t v = threadIdx.x; v < V; v += THREADS) {
        float x = to_float(z_m[v]);
        if (x > max) {                               // rescale what has been summed with the old maximum
            sum *= exp_cuda(max - x);
            max = x;
        }
        sum += exp_cuda(x - max);
    }
    float top = block_reduce<true>(max);
    sum = block_reduce<false>(max == -INFINITY ? 0.0f : sum * exp_cuda(max - top));
    float s = target < 0 ? 0.0f : *scale, norm = s / sum;
    for (size_t v = threadIdx.x; v < V; v += THREADS)
        z_m[v] = from_float<bf16>(norm * exp_cuda(to_float(z_m[v]) - top) - ((int)v == target ? s : 0.0f));
    if (threadIdx.x == 0) losses[blockIdx.x] = target < 0 ? 0.0f : logf(sum) + top - z_target;
}
static void launch2(void) {
    crossentropy_kernel2<<<(unsigned)M, THREADS>>>(losses, logits, targets_d, scale_d, V);
}

// v3: the shipped kernel as it is for rows that do not fit into shared memory
static void launch3(void) {
    crossentropy_kernel<bf16, 8, false>
        <<<(unsigned)M, CLASSIFIER_THREADS>>>(losses, logits, logits, targets_d, scale_d, V);
}

// v4
static void launch4(void) { crossentropy_cuda(losses, logits, logits, targets_d, scale_d, M, V, 0); }

static const Rung rungs[] = {
    {"softmax in three passes, then the gradient in a second kernel", launch1, 0},
    {"one kernel: maximum and sum in one pass, then the gradient", launch2, 0},
    {"16-byte loads and stores, the second pass from the cache", launch3, 0},
    {"shipped: the second pass from shared memory", launch4, 0},
};

static void setup(int which) {
    M = which ? M_TIMED : M_SMALL;
    V = which ? V_TIMED : V_SMALL;
    size_t period = which ? (size_t)PERIOD : M;              // rows
    std::vector<float> z, want_losses(period), want(period * V);
    std::vector<int> target(M);
    logits = repeated_array<bf16>(M * V, period * V, 2, 0, &z);
    for (size_t m = 0; m < M; m++) {                 // some tokens have no target
        size_t row = m % period;
        target[m] = row % 5 == 3 ? -1 : (int)(random_bits(7, 9, row) % V);
    }
    targets_d = device_copy(target);
    losses = nan_array<float>(M);
    scale_d = device_copy(std::vector<float>(1, SCALE));
    crossentropy(want_losses.data(), want.data(), z.data(), target.data(), SCALE, period, V);
    expect("losses", losses, want_losses, 1e-5, std::vector<float>(), M);
    expect("dlogits", logits, want, 4e-3, z, M * V);
}

int main(int argc, char** argv) {
    const Ladder ladder = {"classifier", "M16384 V50280, bf16, in place", rungs, COUNT(rungs), setup,
                           4.0 * M_TIMED * V_TIMED, 0, 0};
    return ladder_main(argc, argv, &ladder, 1);
}
