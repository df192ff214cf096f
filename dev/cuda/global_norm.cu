// The ladder of gradient_norm: one number from all parameters, sqrt(sum g^2). Every version reads each
// gradient once; what differs is how the sums of many threads become one.
//   v1  every thread adds its sum to one float in memory (atomic addition): the order, and so the last bits,
//       change from run to run, and a float loses digits when it sums a hundred million numbers
//   v2  one atomic addition per block, in double: still in any order
//   v3  the shipped one: every block writes its sum, a second kernel adds them in order
#include "ladder.h"

enum { N_TIMED = 129135360, N_SMALL = 100003, PERIOD = 1000003 };
static float *grads, *result;
static double *sum_d, *norm_d, *parts;
static size_t n;

__global__ void square_root_kernel(float* norm, const float* sum) { *norm = sqrtf(*sum); }
__global__ void square_root_kernel(float* norm, const double* sum) { *norm = (float)sqrt(*sum); }
__global__ void to_float_kernel(float* out, const double* in) { *out = (float)*in; }

// v1
__global__ void norm_kernel1(float* sum, const float* grads, size_t n) {
    float acc = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        acc += grads[i] * grads[i];
    atomicAdd(sum, acc);
}
static void launch1(void) {
    float* sum = (float*)sum_d;
    cudaCheck(cudaMemsetAsync(sum, 0, sizeof *sum, 0));
    norm_kernel1<<<NORM_PARTS, NORM_THREADS>>>(sum, grads, n);
    square_root_kernel<<<1, 1>>>(result, sum);
}

// v2
__global__ void __launch_bounds__(NORM_THREADS) norm_kernel2(double* sum, const float* grads, size_t n) {
    double acc = 0;
    size_t stride = (size_t)gridDim.x * NORM_THREADS, i = (size_t)blockIdx.x * NORM_THREADS + threadIdx.x;
    #pragma unroll 4
    for (size_t p = i; p < n / 4; p += stride) {
        Pack<float, 4> g = load_pack<4>(grads + p * 4);
        #pragma unroll
        for (int j = 0; j < 4; j++) acc += (double)g.v[j] * (double)g.v[j];
    }
    if (n / 4 * 4 + i < n) acc += (double)grads[n / 4 * 4 + i] * (double)grads[n / 4 * 4 + i];
    acc = block_sum_double(acc);
    if (threadIdx.x == 0) atomicAdd(sum, acc);
}
static void launch2(void) {
    cudaCheck(cudaMemsetAsync(sum_d, 0, sizeof *sum_d, 0));
    norm_kernel2<<<NORM_PARTS, NORM_THREADS>>>(sum_d, grads, n);
    square_root_kernel<<<1, 1>>>(result, sum_d);
}

// v3
static void launch3(void) {
    gradient_norm_cuda(norm_d, grads, n, parts, 0);
    to_float_kernel<<<1, 1>>>(result, norm_d);
}

static const Rung rungs[] = {
    {"4-byte loads, one atomic addition of a float per thread", launch1, 1e-4},
    {"16-byte loads, one atomic addition of a double per block", launch2, 0},
    {"shipped: a sum per block, added in order by a second kernel", launch3, 0},
};

static void setup(int which) {
    n = which ? N_TIMED : N_SMALL;
    std::vector<float> host;
    grads = repeated_array<float>(n, which ? (size_t)PERIOD : n, 1, 0, &host);
    sum_d = device_array<double>(1);
    norm_d = device_array<double>(1);
    parts = device_array<double>(NORM_PARTS);
    result = nan_array<float>(1);
    double whole = 0, rest = 0;
    for (size_t i = 0; i < host.size(); i++) {
        whole += (double)host[i] * (double)host[i];
        if (i < n % host.size()) rest += (double)host[i] * (double)host[i];
    }
    double norm = sqrt((double)(n / host.size()) * whole + rest);
    expect("norm", result, std::vector<float>(1, (float)norm), 1e-7);
}

int main(int argc, char** argv) {
    const Ladder ladder = {"global_norm", "129M gradients, fp32", rungs, COUNT(rungs), setup, 4.0 * N_TIMED,
                           0, 0};
    return ladder_main(argc, argv, &ladder, 1);
}
