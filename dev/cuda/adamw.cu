// The ladder of adamw: one optimizer step on all parameters (formula: adamw_update in train_mamba.c).
// Parameters and moments are float, and the matmuls of the next step want the parameters in bf16.
//   v1  one thread per element, then a second kernel that converts the parameters
//   v2  16-byte loads and stores: a quarter of the instructions, more bytes under way per thread
//   v3  the shipped one: the bf16 copy is written by the same kernel, from registers
#include "ladder.h"

enum { N_TIMED = 129135360, PERIOD = 1000003 };      // elements of mamba-130m; they repeat after PERIOD
static const AdamW hyper = {0.9, 0.95, 1e-8, 0.1};
static const double LR = 6e-4, CLIP = 0.05, STEP = 7;

static float *params, *grads, *m_d, *v_d;
static bf16* params_x;
static AdamWPiece* piece_d;
static AdamWStep* step_d;
static double* norm_d;
static size_t n0, n1, n_pieces;                      // elements with and without weight decay

// the factor of clipping, computed by every thread: it depends on a norm that only the GPU knows
__device__ float clip_factor(const AdamWStep& s, double norm) {
    double ratio = s.clip / (norm + 1e-6);
    return s.clip > 0 && ratio < 1 ? (float)ratio : 1.0f;
}

// v1
__global__ void adamw_kernel1(float* params, const float* grads, float* m, float* v, const AdamWStep* step,
                              const double* norm, size_t n0, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    adamw_element(&params[i], &m[i], &v[i], grads[i], clip_factor(*step, *norm), i < n0 ? step->keep : 1.0f,
                  *step);
}
static void launch1(void) {
    size_t n = n0 + n1;
    adamw_kernel1<<<(unsigned)((n + 255) / 256), 256>>>(params, grads, m_d, v_d, step_d, norm_d, n0, n);
    cast_cuda(params_x, params, n, 0);
}

// v2
__global__ void adamw_kernel2(float* params, const float* grads, float* m, float* v, const AdamWStep* step,
                              const double* norm, size_t n0, size_t n) {
    AdamWStep s = *step;
    float scale = clip_factor(s, *norm);
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i + 4 <= n) {
        Pack<float, 4> g4 = load_pack<4>(grads + i), p4 = load_pack<4>(params + i), m4 = load_pack<4>(m + i),
                       v4 = load_pack<4>(v + i);
        #pragma unroll
        for (int j = 0; j < 4; j++)
            adamw_element(&p4.v[j], &m4.v[j], &v4.v[j], g4.v[j], scale, i + j < n0 ? s.keep : 1.0f, s);
        store_pack<4>(m + i, m4.v);
        store_pack<4>(v + i, v4.v);
        store_pack<4>(params + i, p4.v);
    } else {
        for (; i < n; i++)
            adamw_element(&params[i], &m[i], &v[i], grads[i], scale, i < n0 ? s.keep : 1.0f, s);
    }
}
static void launch2(void) {
    size_t n = n0 + n1;
    adamw_kernel2<<<(unsigned)((n + 1023) / 1024), 256>>>(params, grads, m_d, v_d, step_d, norm_d, n0, n);
    cast_cuda(params_x, params, n, 0);
}

// v3
static void launch3(void) {
    adamw_cuda(params, params_x, grads, m_d, v_d, piece_d, step_d, norm_d, n_pieces, 0);
}

static const Rung rungs[] = {
    {"one thread per element, then a kernel for the bf16 copy", launch1, 0},
    {"16-byte loads and stores", launch2, 0},
    {"shipped: writes the bf16 copy too", launch3, 0},
};

// Two tensors, the first with weight decay. The oracle is adamw_update on a model of these two; `period` of
// their elements are computed, the others repeat them.
static void setup(int which) {
    size_t period = which ? PERIOD : 100003;
    n0 = which ? N_TIMED / PERIOD * PERIOD : period;
    n1 = which ? N_TIMED - n0 : 5003;                // shorter than the period
    size_t n = n0 + n1;
    std::vector<float> p, g, m, v;
    params = repeated_array<float>(n, period, 0.1, 0, &p);
    grads = repeated_array<float>(n, period, 1e-3, 0, &g);
    m_d = repeated_array<float>(n, period, 1e-3, 0, &m);
    v_d = repeated_array<float>(n, period, 1e-7, 1e-6, &v);          // positive
    params_x = nan_array<bf16>(n);
    double norm = 0;
    for (size_t i = 0; i < period; i++) norm += (double)g[i] * (double)g[i];
    norm = sqrt(norm * (double)n / (double)period);
    norm_d = device_copy(std::vector<double>(1, norm));
    AdamWStep step = adamw_step_cuda(&hyper, LR, CLIP * norm, (int64_t)STEP);
    step_d = device_copy(std::vector<AdamWStep>(1, step));
    std::vector<AdamWPiece> piece(n / ADAMW_PIECE + 2);
    n_pieces = adamw_pieces(piece.data(), 0, 0, n0, true);
    n_pieces = adamw_pieces(piece.data(), n_pieces, n0, n1, false);
    piece.resize(n_pieces);
    piece_d = device_copy(piece);

    const TensorSpec decays = {"", {0}, 0, DECAY}, does_not = {"", {0}, 0, 0};
    for (int k = 0; k < 2; k++) {
        std::vector<float> p1 = p, m1 = m, v1 = v;
        Tensor tensor;
        memset(&tensor, 0, sizeof tensor);
        tensor.spec = k ? &does_not : &decays;
        tensor.count = period;
        Model model;
        memset(&model, 0, sizeof model);
        model.n_tensors = 1;
        model.tensor = &tensor;
        model.params = p1.data(); model.grads = g.data(); model.m = m1.data(); model.v = v1.data();
        adamw_update(&model, &hyper, LR, clip_scale(norm, CLIP * norm), (int64_t)STEP);
        size_t at = k ? n0 : 0, count = k ? n1 : n0;
        expect("params", params + at, p1, 1e-6, p, count);
        expect("m", m_d + at, m1, 1e-6, m, count);
        expect("v", v_d + at, v1, 1e-6, v, count);
        expect("params_x", params_x + at, p1, 4e-3, std::vector<float>(), count);
    }
}

int main(int argc, char** argv) {
    const Ladder ladder = {"adamw", "129M parameters, fp32 with a bf16 copy", rungs, COUNT(rungs), setup,
                           30.0 * N_TIMED, 0, 0};
    return ladder_main(argc, argv, &ladder, 1);
}
