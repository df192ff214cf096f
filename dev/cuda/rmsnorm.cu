// RMSNorm with the residual addition, from one thread per row to the kernels that ship.
//   res_out = res_in + delta      rstd = (mean_d res_out^2 + eps)^(-1/2)      y = weight * res_out * rstd
// The residual stream is float, delta and y are bf16. The rungs below the last know rows of up to 768 values
// in whole packs of 4.
#include "ladder.h"

enum { PACKS = 6 };                    // packs of 4 values per lane of a warp: 768 values per row
enum { BLOCK_WARPS = 8, BLOCK = BLOCK_WARPS * WARP };         // where a block works on one row (D <= 1024)

static size_t M, D;
static const float eps = 1e-5f;
static float *res_in, *res_out, *rstd, *weight, *res, *dres, *dweight, *scratch;
static bf16 *delta, *y, *dy, *dres_x;

static unsigned blocks_of(size_t n, size_t size) { return (unsigned)((n + size - 1) / size); }

// --------------------------------------------------------------------------------------------------
// Forward

// the addition as a kernel of its own, for v1 and v2: 10 bytes per element, of which the norm reads 4 again
__global__ void residual_kernel(float* out, const float* a, const bf16* b, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    float x[4], add[4];
    unpack<4>(x, load_pack<4>(a + i));
    unpack<4>(add, load_pack<4>(b + i));
    for (int j = 0; j < 4; j++) x[j] += add[j];
    store_pack<4>(out + i, x);
}
static void residual(void) {
    residual_kernel<<<blocks_of(M * D / 4, 256), 256>>>(res_out, res_in, delta, M * D);
}

// v1: one thread per row, as on the CPU. The 32 threads of a warp load from 32 rows at a time, 4 bytes of
// each line of 128; and M threads are few.
__global__ void forward_kernel1(bf16* y, float* rstd, const float* res, const float* weight, size_t M,
                                size_t D, float eps) {
    size_t m = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (m >= M) return;
    const float* res_m = res + m * D;
    float sum = 0;
    for (size_t d = 0; d < D; d++) sum += res_m[d] * res_m[d];
    float r = 1.0f / sqrtf(sum / (float)D + eps);
    for (size_t d = 0; d < D; d++) y[m * D + d] = from_float<bf16>(weight[d] * res_m[d] * r);
    rstd[m] = r;
}
static void forward1(void) {
    residual();
    forward_kernel1<<<blocks_of(M, 128), 128>>>(y, rstd, res_out, weight, M, D, eps);
}

// v2 (delta NULL): one warp per row. A load of the warp is 32 packs of 16 bytes side by side, all loads of
// the row are under way at once, and the row waits in registers for its norm.
// v3: the addition in the same kernel: the sum is written, but not read again.
__global__ void forward_kernel2(float* res_out, bf16* y, float* rstd, const float* res_in, const bf16* delta,
                                const float* weight, size_t M, size_t D, float eps) {
    size_t m = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (m >= M) return;
    const int d0 = (int)(threadIdx.x % WARP) * 4;
    float x[PACKS][4] = {{0}}, sum = 0;
    #pragma unroll
    for (int i = 0; i < PACKS; i++) {
        int d = d0 + i * WARP * 4;
        if (d < (int)D) unpack<4>(x[i], load_pack<4>(res_in + m * D + d));
    }
    #pragma unroll
    for (int i = 0; i < PACKS; i++) {
        int d = d0 + i * WARP * 4;
        if (delta && d < (int)D) {
            float add[4];
            unpack<4>(add, load_pack<4>(delta + m * D + d));
            for (int j = 0; j < 4; j++) x[i][j] += add[j];
            store_pack<4>(res_out + m * D + d, x[i]);
        }
        for (int j = 0; j < 4; j++) sum += x[i][j] * x[i][j];
    }
    float r = 1.0f / sqrtf(warp_sum(sum) / (float)D + eps);
    #pragma unroll
    for (int i = 0; i < PACKS; i++) {
        int d = d0 + i * WARP * 4;
        if (d >= (int)D) continue;
        float w[4];
        unpack<4>(w, load_pack<4>(weight + d));
        for (int j = 0; j < 4; j++) w[j] *= x[i][j] * r;
        store_pack<4>(y + m * D + d, w);
    }
    if (d0 == 0) rstd[m] = r;
}
static void forward2(void) {
    residual();
    forward_kernel2<<<blocks_of(M, 4), 4 * WARP>>>(NULL, y, rstd, res_out, NULL, weight, M, D, eps);
}
static void forward3(void) {
    forward_kernel2<<<blocks_of(M, 4), 4 * WARP>>>(res_out, y, rstd, res_in, delta, weight, M, D, eps);
}

static void forward_shipped(void) {
    residual_rmsnorm_forward_cuda<bf16>(res_out, y, rstd, res_in, delta, weight, M, D, eps, 0);
}

// --------------------------------------------------------------------------------------------------
// Backward: dres += rstd * (q - xhat * mean_d(q * xhat)),  dweight += sum_m dy * xhat
//   with xhat = res * rstd, q = weight * dy;   dres_x: dres in bf16

// v1: one block per row. The sum over rows is an atomic addition per element: M on the same D numbers, in
// another order in every run.
__global__ void __launch_bounds__(BLOCK)
backward_kernel1(float* dres, bf16* dres_x, float* dweight, const bf16* dy, const float* res,
                 const float* weight, const float* rstd, size_t D) {
    __shared__ float shared[2 * BLOCK_WARPS];
    size_t m = blockIdx.x;
    float r = rstd[m], dot = 0;
    for (size_t d = threadIdx.x; d < D; d += BLOCK) {
        float g = to_float(dy[m * D + d]) * res[m * D + d];
        dot += weight[d] * g;
        atomicAdd(&dweight[d], g * r);
    }
    float mean = group_sum<BLOCK_WARPS>(dot, shared, 0) * r / (float)D;
    for (size_t d = threadIdx.x; d < D; d += BLOCK) {
        float dx = dres[m * D + d] + r * (weight[d] * to_float(dy[m * D + d]) - res[m * D + d] * r * mean);
        dres[m * D + d] = dx;
        dres_x[m * D + d] = from_float<bf16>(dx);
    }
}
static void backward1(void) {
    backward_kernel1<<<(unsigned)M, BLOCK>>>(dres, dres_x, dweight, dy, res, weight, rstd, D);
}

// One row, shared by WARPS warps: N packs per thread, WARPS * WARP packs apart. dw grows by dy * xhat; the
// other arguments are as in group_sum.
template <int WARPS, int N>
__device__ __forceinline__ void backward_row(float* dres, bf16* dres_x, float (&dw)[N][4], const bf16* dy,
                                             const float* res, const float* weight, float r, int D,
                                             float* shared, int phase) {
    const int step = WARPS * WARP * 4, d0 = (int)threadIdx.x % (WARPS * WARP) * 4;
    Pack<bf16, 4> dy_m[N];
    Pack<float, 4> x[N], dx[N];
    float dot = 0;
    #pragma unroll
    for (int i = 0; i < N; i++) {                                      // all loads of the row at once
        if (d0 + i * step >= D) continue;
        dy_m[i] = load_pack<4>(dy + d0 + i * step);
        x[i] = load_pack<4>(res + d0 + i * step);
        dx[i] = load_pack<4>(dres + d0 + i * step);
    }
    #pragma unroll
    for (int i = 0; i < N; i++) {
        if (d0 + i * step >= D) continue;
        for (int j = 0; j < 4; j++) {
            float g = to_float(dy_m[i].v[j]) * x[i].v[j];
            dot += weight[d0 + i * step + j] * g;
            dw[i][j] += g * r;
        }
    }
    float mean = group_sum<WARPS>(dot, shared, phase) * r / (float)D;
    #pragma unroll
    for (int i = 0; i < N; i++) {
        int d = d0 + i * step;
        if (d >= D) continue;
        for (int j = 0; j < 4; j++)
            dx[i].v[j] += r * (weight[d + j] * to_float(dy_m[i].v[j]) - x[i].v[j] * r * mean);
        store_pack<4>(dres + d, dx[i].v);
        store_pack<4>(dres_x + d, dx[i].v);
    }
}

// v2: one block per SM (one of the processors of the chip), which walks through its rows. A thread always
// meets the same columns, so it sums dweight in registers and adds it once. But a block has one row at a time
// under way, and waits for it.
__global__ void __launch_bounds__(BLOCK)
backward_kernel2(float* dres, bf16* dres_x, float* dweight, const bf16* dy, const float* res,
                 const float* weight, const float* rstd, size_t M, int D) {
    __shared__ float shared[2 * BLOCK_WARPS];
    float dw[1][4] = {{0}};
    int phase = 0, d0 = (int)threadIdx.x * 4;
    for (size_t m = blockIdx.x; m < M; m += gridDim.x) {
        backward_row<BLOCK_WARPS>(dres + m * D, dres_x + m * D, dw, dy + m * D, res + m * D, weight, rstd[m],
                                  D, shared, phase);
        phase ^= 1;
    }
    for (int j = 0; j < 4 && d0 < D; j++) atomicAdd(&dweight[d0 + j], dw[0][j]);
}
static void backward2(void) {
    int sms;
    cudaCheck(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    backward_kernel2<<<(unsigned)sms, BLOCK>>>(dres, dres_x, dweight, dy, res, weight, rstd, M, (int)D);
}

// v3: one warp per row, NORM_BLOCKS blocks of 4 warps: as many rows under way as fit on the chip, and no warp
// waits for another. No atomic additions: each warp writes its own row of `parts`, a second kernel adds the
// rows in order.
__global__ void __launch_bounds__(4 * WARP)
backward_kernel3(float* dres, bf16* dres_x, float* parts, const bf16* dy, const float* res,
                 const float* weight, const float* rstd, size_t M, int D) {
    size_t warp = (size_t)blockIdx.x * 4 + threadIdx.x / WARP;
    float dw[PACKS][4] = {{0}};
    for (size_t m = warp; m < M; m += (size_t)gridDim.x * 4)
        backward_row<1>(dres + m * D, dres_x + m * D, dw, dy + m * D, res + m * D, weight, rstd[m], D, NULL,
                        0);
    #pragma unroll
    for (int i = 0; i < PACKS; i++) {
        int d = (int)(threadIdx.x % WARP + i * WARP) * 4;
        if (d < D) store_pack<4>(parts + warp * (size_t)D + d, dw[i]);
    }
}
static void backward3(void) {
    backward_kernel3<<<NORM_BLOCKS, 4 * WARP>>>(dres, dres_x, scratch, dy, res, weight, rstd, M, (int)D);
    sum_parts_cuda(dweight, NULL, scratch, NORM_BLOCKS * 4, D, 0, D, 0);
}

// the shipped kernel also adds the 4 warps of a block in shared memory: a quarter of the rows of `parts`
static void backward_shipped(void) {
    rmsnorm_backward_cuda<bf16>(dres, dres_x, NULL, dweight, dy, res, weight, rstd, scratch, M, D, 0);
}

// --------------------------------------------------------------------------------------------------

static const Rung forward_rungs[] = {
    {"addition; one thread per row", forward1, 0},
    {"addition; one warp per row, 16 bytes, the row in registers", forward2, 0},
    {"both in one kernel", forward3, 0},
    {"shipped", forward_shipped, 0},
};
static const Rung backward_rungs[] = {
    {"one block per row, atomic weight gradient", backward1, 0},
    {"one block per SM, weight gradient in registers", backward2, 0},
    {"a grid of warps, partial sums in order", backward3, 0},
    {"shipped: and one partial sum per block", backward_shipped, 0},
};

static void forward_setup(int which) {
    M = which ? 16384 : 37, D = which ? 768 : 500;
    std::vector<float> h_res, h_delta, h_weight;
    res_in = random_array<float>(M * D, 2, 0, &h_res);
    delta = random_array<bf16>(M * D, 1, 0, &h_delta);
    weight = random_array<float>(D, 0.3, 1, &h_weight);
    res_out = nan_array<float>(M * D);
    y = nan_array<bf16>(M * D);
    rstd = nan_array<float>(M);
    std::vector<float> want_y(M * D), want_rstd(M);
    residual_forward(h_res.data(), h_res.data(), h_delta.data(), M * D);
    rmsnorm_forward(want_y.data(), want_rstd.data(), h_res.data(), h_weight.data(), M, D, eps);
    expect("res_out", res_out, h_res, 1e-7);
    expect("y", y, want_y, 4e-3);
    expect("rstd", rstd, want_rstd, 1e-6);
}

static void backward_setup(int which) {
    M = which ? 16384 : 37, D = which ? 768 : 500;
    std::vector<float> h_res, h_dy, h_weight, h_rstd(M), want_dres, want_dweight, ignored(M * D);
    res = random_array<float>(M * D, 2, 0, &h_res);
    dy = random_array<bf16>(M * D, 1, 0, &h_dy);
    weight = random_array<float>(D, 0.3, 1, &h_weight);
    dres = random_array<float>(M * D, 1, 0, &want_dres);
    dweight = random_array<float>(D, 1, 0, &want_dweight);
    dres_x = nan_array<bf16>(M * D);
    scratch = nan_array<float>(std::max((size_t)NORM_BLOCKS * 4 * D, rmsnorm_backward_scratch_cuda(M, D)));
    std::vector<float> dres_before = want_dres, dweight_before = want_dweight;
    rmsnorm_forward(ignored.data(), h_rstd.data(), h_res.data(), h_weight.data(), M, D, eps);
    rstd = device_copy(h_rstd);
    rmsnorm_backward(want_dres.data(), want_dweight.data(), h_dy.data(), h_res.data(), h_weight.data(),
                     h_rstd.data(), M, D);
    expect("dres", dres, want_dres, 1e-5, dres_before);
    expect("dres_x", dres_x, want_dres, 4e-3);
    expect("dweight", dweight, want_dweight, 2e-5, dweight_before);
}

int main(int argc, char** argv) {
    const double elements = 16384.0 * 768;
    const Ladder ladders[] = {
        {"rmsnorm_forward", "M16384 D768, bf16, with the residual addition", forward_rungs,
         COUNT(forward_rungs), forward_setup, 12 * elements, 0, 0},
        {"rmsnorm_backward", "M16384 D768, bf16", backward_rungs, COUNT(backward_rungs), backward_setup,
         16 * elements, 0, 0},
    };
    return ladder_main(argc, argv, ladders, COUNT(ladders));
}
