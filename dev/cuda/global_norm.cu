// The norm of the gradient: one number from all parameters.
#include "ladder.h"

enum { N_TIMED = 129135360, N_SMALL = 100003 };
static float* grads;
static double *norm_d, *parts;
static float* result;
static size_t n;

__global__ void to_float_kernel(float* out, const double* in) { *out = (float)*in; }

static void shipped(void) {
    gradient_norm_cuda(norm_d, grads, n, parts, 0);
    to_float_kernel<<<1, 1>>>(result, norm_d);
}
static const Rung rungs[] = {{"shipped", shipped, 0}};

static void setup(int which) {
    n = which ? N_TIMED : N_SMALL;
    std::vector<float> host;
    grads = random_array<float>(n, 1, 0, &host);
    norm_d = device_array<double>(1);
    parts = device_array<double>(NORM_PARTS);
    result = nan_array<float>(1);
    double sum = 0;
    for (float g : host) sum += (double)g * (double)g;
    expect("norm", result, std::vector<float>(1, (float)sqrt(sum)), 1e-6);
}

int main(int argc, char** argv) {
    const Ladder ladder = {"global_norm", "129M gradients, fp32", rungs, COUNT(rungs), setup, 4.0 * N_TIMED, 0, 0};
    return ladder_main(argc, argv, &ladder, 1);
}
