// The matmuls of one layer and the classifier: forward, the gradient of the input (dgrad), the gradient of
// the weight (wgrad).
//
// Ladders: four of them in several versions, compared with the CPU. Then the question whether the gradient of
// a weight, which keeps the tensor cores busy, can run beside a kernel that keeps the memory busy. Then, with
// no argument, a table of all shapes of two models: every algorithm that cuBLASLt proposes, timed in turn, and
// whether their results have the same bits; that table is what the choice in train_mamba.cu rests on.
#include "ladder.h"

enum { FORWARD, DGRAD, WGRAD };
static const char* const pass_name[] = {"forward", "dgrad", "wgrad"};

// A linear layer out (M,O) = inp (M,I) weight^T, with the row strides that it has in the model
typedef struct {
    const char* name;
    size_t M, I, O, ldi, ldo;
    bool add_dinp;
    int calls;                             // per step
} Linear;

static Matmul mm;
static Linear lin;
static int pass;
static bf16 *inp, *weight, *dout, *out, *dinp;
static float* dweight;

static void matmul_open(void) {
    if (mm.handle) return;
    cublasCheck(cublasLtCreate(&mm.handle));
    mm.workspace = device_calloc(MATMUL_WORKSPACE, 1);
}

// ------------------------------------------------------------------------------------------------
// Versions

// one thread per sum; consecutive threads have consecutive columns
__global__ void naive_kernel(bf16* out_x, float* out_f, size_t ldc, const bf16* a, size_t a_row, size_t a_k,
                             const bf16* b, size_t b_k, size_t b_col, size_t rows, size_t cols, size_t K,
                             bool add) {
    size_t c = blockIdx.x * 32 + threadIdx.x, r = blockIdx.y * 8 + threadIdx.y;
    if (c >= cols || r >= rows) return;
    float sum = 0;
    for (size_t k = 0; k < K; k++)
        sum = fmaf(to_float(a[r * a_row + k * a_k]), to_float(b[k * b_k + c * b_col]), sum);
    if (out_f) out_f[r * ldc + c] += sum;
    else out_x[r * ldc + c] = from_float<bf16>(sum + (add ? to_float(out_x[r * ldc + c]) : 0.0f));
}

static void naive(void) {
    size_t M = lin.M, I = lin.I, O = lin.O, rows = pass == WGRAD ? O : M, cols = pass == FORWARD ? O : I;
    dim3 grid((unsigned)((cols + 31) / 32), (unsigned)((rows + 7) / 8)), block(32, 8);
    if (pass == FORWARD)
        naive_kernel<<<grid, block>>>(out, NULL, lin.ldo, inp, lin.ldi, 1, weight, 1, I, M, O, I, false);
    if (pass == DGRAD)
        naive_kernel<<<grid, block>>>(dinp, NULL, lin.ldi, dout, lin.ldo, 1, weight, I, 1, M, I, O,
                                      lin.add_dinp);
    if (pass == WGRAD)
        naive_kernel<<<grid, block>>>(NULL, dweight, I, dout, 1, lin.ldo, inp, lin.ldi, 1, O, I, M, true);
    cudaCheck(cudaGetLastError());
}

// the operands as cuBLASLt sees them: C (M,N) = A B
typedef struct {
    MatmulPlan plan;
    const bf16 *a, *b;
    void* c;
    float beta;
    cublasLtMatmulHeuristicResult_t candidate[16];
    int n;
} Proposed;
static Proposed proposed;

static Proposed propose(void) {
    Proposed p;
    memset(&p, 0, sizeof p);
    size_t M = lin.M, I = lin.I, O = lin.O;
    p.a = pass == WGRAD ? inp : weight;
    p.b = pass == FORWARD ? inp : dout;
    p.c = pass == FORWARD ? (void*)out : pass == DGRAD ? (void*)dinp : (void*)dweight;
    p.beta = pass == WGRAD || (pass == DGRAD && lin.add_dinp) ? 1 : 0;
    if (pass == FORWARD) p.plan.key = matmul_key(out, lin.ldo, p.a, I, true, p.b, lin.ldi, false, O, M, I);
    if (pass == DGRAD) p.plan.key = matmul_key(dinp, lin.ldi, p.a, I, false, p.b, lin.ldo, false, I, M, O);
    if (pass == WGRAD) p.plan.key = matmul_key(dweight, I, p.a, lin.ldi, false, p.b, lin.ldo, true, I, O, M);
    p.n = matmul_candidates(&mm, &p.plan, p.candidate, COUNT(p.candidate));
    return p;
}
static void run(const Proposed* p, int i) {
    matmul_run(&mm, &p->plan, &p->candidate[i].algo, p->c, p->a, p->b, p->beta, 0);
}

static int timed;                          // the fastest of the candidates
static void cublas_first(void) { run(&proposed, 0); }
static void cublas_timed(void) { run(&proposed, timed); }
static int current;
static void cublas_current(void) { run(&proposed, current); }

static void shipped(void) {
    if (pass == FORWARD)
        matmul_forward_cuda(&mm, out, lin.ldo, inp, lin.ldi, weight, (const float*)NULL, lin.M, lin.I, lin.O, 0);
    else
        matmul_backward_cuda(&mm, pass == DGRAD ? dinp : NULL, lin.ldi, lin.add_dinp,
                             pass == WGRAD ? dweight : NULL, (float*)NULL, dout, lin.ldo, inp, lin.ldi,
                             weight, (float*)NULL, lin.M, lin.I, lin.O, 0);
}

static const Rung rungs[] = {
    {"one thread per sum", naive, 0},
    {"cuBLASLt, the first of its proposals", cublas_first, 0},
    {"cuBLASLt, the fastest of its proposals", cublas_timed, 0},
    {"shipped", shipped, 0},
};

static void setup(const Linear* l, int which_pass, int which) {
    lin = *l;
    pass = which_pass;
    if (which == 0) lin.M = 1003;
    matmul_open();
    size_t M = lin.M, I = lin.I, O = lin.O;
    std::vector<float> h_inp, h_weight, h_dout, before, expected;
    inp = random_array<bf16>(M * lin.ldi, 1, 0, &h_inp);
    weight = random_array<bf16>(O * I, 0.05, 0, &h_weight);
    dout = random_array<bf16>(M * lin.ldo, 1, 0, &h_dout);
    if (pass == FORWARD) {
        out = random_array<bf16>(M * lin.ldo, 1, 0, &before);       // also what stays between the rows
        expected = before;
        matmul_forward(expected.data(), lin.ldo, h_inp.data(), lin.ldi, h_weight.data(), NULL, M, I, O);
        expect("out", out, expected, 4e-3, before);
    } else if (pass == DGRAD) {
        dinp = random_array<bf16>(M * lin.ldi, 1, 0, &before);
        expected = before;
        for (size_t m = 0; !lin.add_dinp && m < M; m++)
            for (size_t i = 0; i < I; i++) expected[m * lin.ldi + i] = 0;
        matmul_backward(expected.data(), lin.ldi, NULL, NULL, h_dout.data(), lin.ldo, h_inp.data(), lin.ldi,
                        h_weight.data(), M, I, O);
        expect("dinp", dinp, expected, 4e-3, before);
    } else {
        dweight = random_array<float>(O * I, 1, 0, &before);
        expected = before;
        matmul_backward(NULL, 0, expected.data(), NULL, h_dout.data(), lin.ldo, h_inp.data(), lin.ldi,
                        h_weight.data(), M, I, O);
        expect("dweight", dweight, expected, 1e-5, before);
    }
    proposed = propose();
    timed = 0;
    double least, best = 1e9;
    for (current = 0; which == 1 && current < proposed.n; current++) {
        double ms = time_cold(cublas_current, &least);
        if (ms < best) { best = ms; timed = current; }
    }
}

// ------------------------------------------------------------------------------------------------
// The ladders: layers of mamba-130m, 8 x 2048 tokens

static const Linear layer[] = {
    {"in_proj", 16384, 768, 3072, 768, 3072, false, 24},
    {"x_proj", 16384, 1536, 80, 1536, 80, true, 24},
    {"dt_proj", 16384, 48, 1536, 80, 1536, false, 24},
    {"out_proj", 16384, 1536, 768, 1536, 768, false, 24},
    {"head", 16384, 768, 50280, 768, 50280, false, 1},
};
static void setup_in_forward(int which) { setup(&layer[0], FORWARD, which); }
static void setup_out_wgrad(int which) { setup(&layer[3], WGRAD, which); }
static void setup_x_forward(int which) { setup(&layer[1], FORWARD, which); }
static void setup_x_dgrad(int which) { setup(&layer[1], DGRAD, which); }
static void setup_dt_forward(int which) { setup(&layer[2], FORWARD, which); }

int main(int argc, char** argv) {
    const double T = 16384;
    const Ladder ladder[] = {
        {"in_proj forward", "M 16384, 768 -> 3072, bf16", rungs, COUNT(rungs), setup_in_forward, 0,
         2 * T * 768 * 3072, 2 * T * 768 * 3072 / 811e9},
        {"out_proj wgrad", "M 16384, 1536 -> 768, bf16, added to fp32", rungs, COUNT(rungs), setup_out_wgrad, 0,
         2 * T * 1536 * 768, 2 * T * 1536 * 768 / 811e9},
        {"x_proj forward", "M 16384, 1536 -> 80, bf16", rungs, COUNT(rungs), setup_x_forward,
         2 * (T * 1616 + 1536 * 80), 0, 0},
        {"x_proj dgrad", "M 16384, 80 -> 1536, bf16, added", rungs, COUNT(rungs), setup_x_dgrad,
         2 * (T * (1536 * 2 + 80) + 1536 * 80), 0, 0},
        {"dt_proj forward", "M 16384, 48 -> 1536, bf16", rungs, COUNT(rungs), setup_dt_forward,
         2 * (T * 1584 + 1536 * 48), 0, 0},
    };
    return ladder_main(argc, argv, ladder, COUNT(ladder));
}
