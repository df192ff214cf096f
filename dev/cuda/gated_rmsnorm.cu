// The gated RMSNorm of Mamba-2, from the gate and the norm one after the other to the kernels that ship.
//   w = y silu(z)      rstd = (mean_e w^2 + eps)^(-1/2)      out = weight * w * rstd
// Rows of E values in bf16, z in wider rows (of the input projection). The rungs below the last know rows in
// whole packs of 8.
#include "ladder.h"

static size_t M, E, LD;
static const float eps = 1e-5f;
static float *rstd, *weight, *dweight, *scratch;
static bf16 *y, *z, *out, *dout, *dy, *dz, *again;
static float* w_row;                                           // v1: what is normalized, in float

// --------------------------------------------------------------------------------------------------
// Forward

// v1: two kernels, as the formulas stand. The product is written in float and read twice: 20 bytes for each
// element instead of 6.
__global__ void gate_kernel1(float* w, const bf16* y, const bf16* z, size_t ldz, size_t E) {
    for (size_t e = threadIdx.x; e < E; e += blockDim.x)
        w[blockIdx.x * E + e] =
            to_float(y[blockIdx.x * E + e]) * silu_cuda(to_float(z[blockIdx.x * ldz + e]));
}
__global__ void norm_kernel1(bf16* out, float* rstd, const float* w, const float* weight, size_t E,
                             float eps) {
    __shared__ float shared[2 * WARP];
    const float* row = w + blockIdx.x * E;
    float sum = 0;
    for (size_t e = threadIdx.x; e < E; e += blockDim.x) sum += row[e] * row[e];
    float r = 1.0f / sqrtf(gated_sum(sum, shared, 0) / (float)E + eps);
    for (size_t e = threadIdx.x; e < E; e += blockDim.x)
        out[blockIdx.x * E + e] = from_float<bf16>(weight[e] * row[e] * r);
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}
static void forward1(void) {
    gate_kernel1<<<(unsigned)M, 256>>>(w_row, y, z, LD, E);
    norm_kernel1<<<(unsigned)M, 256>>>(out, rstd, w_row, weight, E, eps);
}

// v2: one kernel, a value per load; the row is read a second time (from the cache) and gated again
static void forward2(void) {
    gated_rmsnorm_forward_general_kernel<<<(unsigned)M, 256>>>(out, E, rstd, y, z, LD, weight, E, E, eps,
                                                               false);
}

// v3: one warp per row, packs of 16 bytes, the row in registers: every byte moves once, no barrier
enum { PACKS = 6 };                    // of 8 values per lane: 1536 per row
__global__ void __launch_bounds__(4 * WARP)
forward_kernel3(bf16* out, float* rstd, const bf16* y, const bf16* z, size_t ldz, const float* weight,
                size_t M, size_t E, float eps) {
    const size_t m = (size_t)blockIdx.x * 4 + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (m >= M) return;
    Pack<bf16, 8> y_m[PACKS] = {}, z_m[PACKS] = {};
    #pragma unroll
    for (int i = 0; i < PACKS; i++) {
        size_t e = (size_t)(i * WARP + lane) * 8;
        if (e >= E) continue;
        y_m[i] = load_pack<8>(y + m * E + e);
        z_m[i] = load_pack<8>(z + m * ldz + e);
    }
    float w[PACKS][8], sum = 0;
    #pragma unroll
    for (int i = 0; i < PACKS; i++) {
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            w[i][j] = to_float(y_m[i].v[j]) * silu_cuda(to_float(z_m[i].v[j]));
            sum += w[i][j] * w[i][j];
        }
    }
    float r = 1.0f / sqrtf(warp_sum(sum) / (float)E + eps);
    #pragma unroll
    for (int i = 0; i < PACKS; i++) {
        size_t e = (size_t)(i * WARP + lane) * 8;
        if (e >= E) continue;
        float g[8];
        unpack<8>(g, load_pack<8>(weight + e));
        #pragma unroll
        for (int j = 0; j < 8; j++) w[i][j] *= g[j] * r;
        store_pack<8>(out + m * E + e, w[i]);
    }
    if (lane == 0) rstd[m] = r;
}
static void forward3(void) {
    forward_kernel3<<<(unsigned)((M + 3) / 4), 4 * WARP>>>(out, rstd, y, z, LD, weight, M, E, eps);
}

// shipped: a pack per thread, a block per row: few registers, so that many rows are under way
static void forward_shipped(void) {
    gated_rmsnorm_forward_cuda<bf16>(out, E, rstd, y, z, LD, weight, M, E, E, eps, false, 0);
}

// --------------------------------------------------------------------------------------------------
// Backward, with p = y silu(z), q = weight dout, mean = mean_e(q p rstd)
//   dw = rstd (q - p rstd mean)     dy = dw silu(z)    dz = dw y silu'(z)    dweight += sum_m dout p rstd
// and the output of the forward again

// v1: one block per row; the sum over rows is an atomic addition per element, in another order in every run
__global__ void backward_kernel1(bf16* dy, bf16* dz, size_t ldz, bf16* again, float* dweight,
                                 const bf16* dout, const bf16* y, const bf16* z, const float* weight,
                                 const float* rstd, size_t E) {
    __shared__ float shared[2 * WARP];
    const size_t m = blockIdx.x;
    const float r = rstd[m];
    float dot = 0;
    for (size_t e = threadIdx.x; e < E; e += blockDim.x) {
        float g = to_float(dout[m * E + e]) * (to_float(y[m * E + e]) * silu_cuda(to_float(z[m * ldz + e])));
        dot += weight[e] * g;
        atomicAdd(&dweight[e], g * r);
    }
    float mean = gated_sum(dot, shared, 0) * r / (float)E;
    for (size_t e = threadIdx.x; e < E; e += blockDim.x) {
        float y_e = to_float(y[m * E + e]), z_e = to_float(z[m * ldz + e]), sigma = sigmoid_cuda(z_e);
        float p = y_e * (z_e * sigma), dw = r * (weight[e] * to_float(dout[m * E + e]) - p * r * mean);
        dy[m * E + e] = from_float<bf16>(dw * (z_e * sigma));
        dz[m * ldz + e] = from_float<bf16>(dw * y_e * silu_grad_cuda(z_e, sigma));
        again[m * E + e] = from_float<bf16>(weight[e] * r * p);
    }
}
static void backward1(void) {
    backward_kernel1<<<(unsigned)M, 256>>>(dy, dz, LD, again, dweight, dout, y, z, weight, rstd, E);
}

// v2: gated_blocks() blocks walk through the rows and leave partial sums, added in order by a second kernel
static void backward2(void) {
    size_t blocks = gated_blocks(M, E, E);
    gated_rmsnorm_backward_general_kernel<<<(unsigned)blocks, 256>>>(
        dy, dz, LD, again, E, scratch, dout, E, y, z, LD, weight, rstd, M, E, E, false);
    sum_parts_cuda(dweight, NULL, scratch, blocks, E, 0, E, 0);
}

// shipped: a pack per thread, dweight in registers
static void backward_shipped(void) {
    gated_rmsnorm_backward_cuda<bf16>(dy, dz, LD, again, E, dweight, dout, E, y, z, LD, weight, rstd, scratch,
                                      M, E, E, false, 0);
}

// --------------------------------------------------------------------------------------------------

static const Rung forward_rungs[] = {
    {"gate, then norm; the product in memory", forward1, 0},
    {"one kernel, value by value, the row read twice", forward2, 0},
    {"one warp per row, 16 bytes, the row in registers", forward3, 0},
    {"shipped: one block per row, 16 bytes per thread", forward_shipped, 0},
};
static const Rung backward_rungs[] = {
    {"one block per row, atomic weight gradient", backward1, 0},
    {"a grid of blocks, partial sums in order", backward2, 0},
    {"shipped: 16 bytes per thread, sums in registers", backward_shipped, 0},
};

static std::vector<float> h_y, h_z, h_weight, h_rstd;

static void inputs(int which) {
    M = which ? 16384 : 37, E = which ? 1536 : 488, LD = which ? 3392 : E + 8;
    y = random_array<bf16>(M * E, 1, 0, &h_y);
    z = random_array<bf16>(M * LD, 2, 0, &h_z);
    weight = random_array<float>(E, 0.3, 1, &h_weight);
    h_rstd.assign(M, 0);
}

static void forward_setup(int which) {
    inputs(which);
    std::vector<float> want(M * E);
    out = nan_array<bf16>(M * E);
    rstd = nan_array<float>(M);
    w_row = nan_array<float>(M * E);
    gated_rmsnorm_forward(want.data(), h_rstd.data(), h_y.data(), h_z.data(), LD, h_weight.data(), M, E, E,
                          eps, false);
    expect("out", out, want, 4e-3);
    expect("rstd", rstd, h_rstd, 1e-6);
}

static void backward_setup(int which) {
    inputs(which);
    std::vector<float> h_dout, want_out(M * E), want_dy(M * E), want_dz(M * LD), want_dweight;
    dout = random_array<bf16>(M * E, 1, 0, &h_dout);
    dweight = random_array<float>(E, 1, 0, &want_dweight);
    std::vector<float> before = want_dweight, zeros(M * LD);
    dy = nan_array<bf16>(M * E);
    again = nan_array<bf16>(M * E);
    scratch = nan_array<float>(gated_rmsnorm_scratch_cuda(M, E, E));
    gated_rmsnorm_forward(want_out.data(), h_rstd.data(), h_y.data(), h_z.data(), LD, h_weight.data(), M, E,
                          E, eps, false);
    rstd = device_copy(h_rstd);
    gated_rmsnorm_backward(want_dy.data(), want_dz.data(), LD, want_dweight.data(), h_dout.data(), h_y.data(),
                           h_z.data(), LD, h_weight.data(), h_rstd.data(), M, E, E, false);
    dz = nan_array<bf16>(M * LD);
    expect("dy", dy, want_dy, 4e-3);
    expect("again", again, want_out, 4e-3);
    expect("dz", dz, want_dz, 4e-3, zeros);
    expect("dweight", dweight, want_dweight, 2e-5, before);
}

int main(int argc, char** argv) {
    const double elements = 16384.0 * 1536;
    const Ladder ladders[] = {
        {"gated_rmsnorm_forward", "B8 T2048 E1536, bf16", forward_rungs, COUNT(forward_rungs), forward_setup,
         6 * elements, 0, 0},
        {"gated_rmsnorm_backward", "B8 T2048 E1536, bf16, with the output again", backward_rungs,
         COUNT(backward_rungs), backward_setup, 12 * elements, 0, 0},
    };
    return ladder_main(argc, argv, ladders, COUNT(ladders));
}
