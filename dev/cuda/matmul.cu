// The matmuls of one layer and the classifier: forward, the gradient of the input (dgrad), the gradient of
// the weight (wgrad).
//
// Ladders: four of them in several versions, compared with the CPU. Then the question whether the gradient of
// a weight, which keeps the tensor cores busy, can run beside a kernel that keeps the memory busy. Then, when
// no rung is given, a table of all shapes of two models: every algorithm that cuBLASLt proposes, timed in
// turn, and whether their results have the same bits; the choice in train_mamba.cu rests on that table.
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

// short_matmul: out (M,O) = inp (M,K) W, added to what out holds with `add`, for K of at most 96 that is a
// multiple of 8: the forward pass of dt_proj (W[k,o] = weight[o,k], WEIGHT_OK), the gradient of the input of
// x_proj (W[k,o] = weight[k,o]).   row strides ldo, ldi   weight (O,K) or (K,O)
// With so few terms there is nothing to compute: it is a copy into (M,O), or an addition to it. A warp keeps
// the W of its 32 columns in registers, in the layout that the tensor core wants, and marches down the tokens
// of its block, 32 at a time; what it will add to is on its way to shared memory three steps ahead.
//
// mma.m16n8k16 multiplies a 16 x 16 piece of inp by 16 x 8 of W. Of its result, the lane 4 g + t of a warp
// holds columns 2 t and 2 t + 1 in rows g and g + 8. Which columns of out these are is ours to say: in four
// mma together, lane t gets columns 8 t .. 8 t + 7 of the warp's 32, which are one store of 16 bytes.
// It does not ship: it is faster than cuBLASLt here (H200, behind a cache full of writes: x_proj dgrad 40 us
// for 44), but the step of mamba-130m, which runs at the power limit, did not get faster: 364.8 for 364.7
// thousand tokens/s.
enum { SHORT_ROWS = 32, SHORT_STAGES = 4, SHORT_WARPS = 8 };
enum { SHORT_COLUMNS = 32 * SHORT_WARPS, SHORT_THREADS = WARP * SHORT_WARPS };

// row stride of inp in shared memory: eight rows, one 16-byte piece of each, lie in different banks
__host__ __device__ constexpr int short_stride(int steps) { return steps * 16 + 8; }

// the 16 x 16 piece at p (row stride in elements) for mma
__device__ __forceinline__ void load_matrix(uint32_t* a, const bf16* p, int stride) {
    int lane = (int)threadIdx.x % WARP;
    unsigned from = (unsigned)__cvta_generic_to_shared(p + lane % 16 * stride + lane / 16 * 8);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(from));
}
__device__ __forceinline__ void mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// STEPS: K / 16, rounded up.   tokens: of a block
template <int STEPS, bool WEIGHT_OK>
__global__ void __launch_bounds__(SHORT_THREADS, 2)
short_matmul_kernel(bf16* out, size_t ldo, const bf16* inp, size_t ldi, const bf16* weight, bool add, int M,
                    int K, int O, int tokens) {
    const int LD = short_stride(STEPS);
    extern __shared__ uint4 short_shared[];                     // 16 bytes each
    uint4* before = short_shared;                               // [SHORT_STAGES][4][SHORT_THREADS], with add
    bf16* rows = (bf16*)(short_shared + (add ? SHORT_STAGES * 4 * SHORT_THREADS : 0));
    // rows [SHORT_STAGES][SHORT_ROWS][LD]
    int tid = (int)threadIdx.x, g = tid % WARP / 4, t = tid % 4;
    int column0 = (int)blockIdx.x * SHORT_COLUMNS + tid / WARP * 32;
    int m_begin = (int)blockIdx.y * tokens, m_end = min(M, m_begin + tokens), pieces = K / 8;
    bool mine = column0 + 8 * t < O;
    bf16* out_t = out + column0 + 8 * t;

    auto copy = [&](int m0, int stage) {
        for (int i = tid; m0 < m_end && i < SHORT_ROWS * pieces; i += SHORT_THREADS) {
            int r = i / pieces, piece = i - r * pieces;
            copy_async<16>(rows + (stage * SHORT_ROWS + r) * LD + piece * 8,
                           inp + (size_t)min(m0 + r, M - 1) * ldi + piece * 8);
        }
        #pragma unroll
        for (int q = 0; q < 4; q++)
            if (add && mine && m0 + g + 8 * q < m_end)
                copy_async<16>(before + (stage * 4 + q) * SHORT_THREADS + tid,
                               out_t + (size_t)(m0 + g + 8 * q) * ldo);
        copy_async_commit();
    };
    // the terms that round K up to 16: zeros, so that they are not NaN
    for (int i = tid; K % 16 && i < SHORT_STAGES * SHORT_ROWS; i += SHORT_THREADS)
        *(uint4*)(rows + i * LD + K) = make_uint4(0, 0, 0, 0);
    for (int s = 0; s < SHORT_STAGES - 1; s++) copy(m_begin + s * SHORT_ROWS, s);

    uint32_t w[STEPS][4][2];                                    // W[k], W[k+1] of column o
    #pragma unroll
    for (int i = 0; i < STEPS * 8; i++) {
        int step = i / 8, j = i / 2 % 4, k = step * 16 + i % 2 * 8 + 2 * t;
        int o = column0 + 8 * (g / 2) + 2 * j + g % 2;
        uint32_t pair = 0;
        if (o < O && k < K && WEIGHT_OK) pair = *(const uint32_t*)(weight + (size_t)o * K + k);
        if (o < O && k < K && !WEIGHT_OK)
            pair = *(const uint16_t*)(weight + (size_t)k * O + o) |
                   (uint32_t)*(const uint16_t*)(weight + (size_t)(k + 1) * O + o) << 16;
        w[step][j][i % 2] = pair;
    }
    int stage = 0;
    for (int m0 = m_begin; m0 < m_end; m0 += SHORT_ROWS) {
        copy_async_wait(SHORT_STAGES - 2);
        __syncthreads();                                       // all are done with the stage filled next
        copy(m0 + (SHORT_STAGES - 1) * SHORT_ROWS, (stage + SHORT_STAGES - 1) % SHORT_STAGES);
        float sum[2][4][4] = {};
        #pragma unroll
        for (int i = 0; i < STEPS * 2; i++) {
            uint32_t a[4];
            load_matrix(a, rows + (stage * SHORT_ROWS + i % 2 * 16) * LD + i / 2 * 16, LD);
            #pragma unroll
            for (int j = 0; j < 4; j++) mma_bf16(sum[i % 2][j], a, w[i / 2][j][0], w[i / 2][j][1]);
        }
        #pragma unroll
        for (int q = 0; q < 4; q++) {                           // row g + 8 q
            int m = m0 + g + 8 * q;
            if (!mine || m >= m_end) continue;
            float v[8], was[8];
            #pragma unroll
            for (int j = 0; j < 8; j++) v[j] = sum[q / 2][j / 2][q % 2 * 2 + j % 2];
            if (add) {
                unpack<8>(was, load_pack<8>((const bf16*)(before + (stage * 4 + q) * SHORT_THREADS + tid)));
                #pragma unroll
                for (int j = 0; j < 8; j++) v[j] += was[j];
            }
            store_pack<8>(out_t + (size_t)m * ldo, v);
        }
        stage = (stage + 1) % SHORT_STAGES;
    }
}

template <int STEPS, bool WEIGHT_OK>
static void short_matmul_launch(bf16* out, size_t ldo, const bf16* inp, size_t ldi, const bf16* weight,
                                bool add, size_t M, size_t K, size_t O, cudaStream_t stream) {
    int processors;
    cudaCheck(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
    size_t slices = (O + SHORT_COLUMNS - 1) / SHORT_COLUMNS, parts = 2 * (size_t)processors / slices;
    size_t tokens = parts ? (M + parts - 1) / parts : M;
    tokens = (tokens + SHORT_ROWS - 1) / SHORT_ROWS * SHORT_ROWS;
    size_t bytes = SHORT_ROWS * short_stride(STEPS) * sizeof(bf16) + (add ? 4 * 16 * SHORT_THREADS : 0);
    bytes *= SHORT_STAGES;
    cudaCheck(cudaFuncSetAttribute(short_matmul_kernel<STEPS, WEIGHT_OK>,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    dim3 grid((unsigned)slices, (unsigned)((M + tokens - 1) / tokens));
    short_matmul_kernel<STEPS, WEIGHT_OK><<<grid, SHORT_THREADS, bytes, stream>>>(
        out, ldo, inp, ldi, weight, add, (int)M, (int)K, (int)O, (int)tokens);
    cudaCheck(cudaGetLastError());
}

static void short_sums(void) {
    if (pass == FORWARD)
        short_matmul_launch<3, true>(out, lin.ldo, inp, lin.ldi, weight, false, lin.M, lin.I, lin.O, 0);
    else
        short_matmul_launch<5, false>(dinp, lin.ldi, dout, lin.ldo, weight, lin.add_dinp, lin.M, lin.O, lin.I,
                                      0);
}

static void shipped(void) {
    if (pass == FORWARD)
        matmul_forward_cuda(&mm, out, lin.ldo, inp, lin.ldi, weight, (const float*)NULL, lin.M, lin.I, lin.O,
                            0);
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
static const Rung short_rungs[] = {
    {"one thread per sum", naive, 0},
    {"cuBLASLt, the first of its proposals", cublas_first, 0},
    {"cuBLASLt, the fastest of its proposals", cublas_timed, 0},
    {"the weight in registers", short_sums, 0},
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
// Side by side: in_proj's wgrad and the norm's backward need nothing of each other

static bf16 *norm_dy, *dres_x;
static float *norm_dres, *norm_res, *norm_weight, *norm_rstd, *norm_dweight, *norm_scratch;
static cudaStream_t other_stream;
static cudaEvent_t forked, joined;

static void norm_backward(void) {
    rmsnorm_backward_cuda(norm_dres, dres_x, (bf16*)NULL, norm_dweight, norm_dy, norm_res, norm_weight,
                          norm_rstd, norm_scratch, lin.M, lin.I, 0);
}
static void wgrad_on(cudaStream_t stream) {
    matmul_backward_cuda(&mm, (bf16*)NULL, 0, false, dweight, (float*)NULL, dout, lin.ldo, inp, lin.ldi,
                         (const bf16*)NULL, (float*)NULL, lin.M, lin.I, lin.O, stream);
}
static void wgrad_alone(void) { wgrad_on(0); }
static void one_stream(void) {
    wgrad_on(0);
    norm_backward();
}
static void two_streams(bool wgrad_first) {
    cudaCheck(cudaEventRecord(forked, 0));
    cudaCheck(cudaStreamWaitEvent(other_stream, forked, 0));
    if (wgrad_first) wgrad_on(other_stream);
    norm_backward();
    if (!wgrad_first) wgrad_on(other_stream);
    cudaCheck(cudaEventRecord(joined, other_stream));
    cudaCheck(cudaStreamWaitEvent(0, joined, 0));
}
static void matmul_before(void) { two_streams(true); }
static void norm_before(void) { two_streams(false); }

static const Rung side_rungs[] = {
    {"one stream", one_stream, 0},
    {"two streams, the matmul launched first", matmul_before, 0},
    {"two streams, the norm launched first", norm_before, 0},
};
static const Rung alone_rungs[] = {{"the matmul alone", wgrad_alone, 0}};

static void setup_norm(int which) {
    size_t M = which ? 16384 : 1003, D = 768;
    if (!other_stream) {
        cudaCheck(cudaStreamCreateWithFlags(&other_stream, cudaStreamNonBlocking));
        cudaCheck(cudaEventCreateWithFlags(&forked, cudaEventDisableTiming));
        cudaCheck(cudaEventCreateWithFlags(&joined, cudaEventDisableTiming));
    }
    std::vector<float> dy, dres, res, weight_h, rstd(M), dweight_h, dweight0;
    norm_dy = random_array<bf16>(M * D, 1, 0, &dy);
    norm_dres = random_array<float>(M * D, 1, 0, &dres);
    norm_res = random_array<float>(M * D, 1, 0, &res);
    norm_weight = random_array<float>(D, 0.1, 1, &weight_h);
    norm_dweight = random_array<float>(D, 1, 0, &dweight0);
    norm_scratch = device_array<float>(rmsnorm_backward_scratch_cuda(M, D));
    dres_x = nan_array<bf16>(M * D);
    std::vector<float> normed(M * D), before = dres;
    rmsnorm_forward(normed.data(), rstd.data(), res.data(), weight_h.data(), M, D, 1e-5f);
    norm_rstd = device_copy(rstd);
    dweight_h = dweight0;
    rmsnorm_backward(dres.data(), dweight_h.data(), dy.data(), res.data(), weight_h.data(), rstd.data(), M,
                     D);
    expect("dres", norm_dres, dres, 1e-5, before);
    expect("dres_x", dres_x, dres, 4e-3);
    expect("norm dweight", norm_dweight, dweight_h, 1e-5, dweight0);
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
static void setup_in_wgrad(int which) { setup(&layer[0], WGRAD, which); }
static void setup_side(int which) {
    setup(&layer[0], WGRAD, which);
    setup_norm(which);
}

// what the tensor cores can do: a product of 8192 x 8192 matrices, the fastest proposal, in TFLOP/s
static double matmul_roof(void) {
    const Linear square = {"", 8192, 8192, 8192, 8192, 8192, false, 0};
    const size_t n = (size_t)8192 * 8192;
    std::vector<float> host;
    matmul_open();
    lin = square;
    pass = FORWARD;
    inp = random_array<bf16>(n, 1, 0, &host);
    weight = random_array<bf16>(n, 1, 0, &host);
    out = device_array<bf16>(n);
    proposed = propose();
    double least, best = 1e9;
    for (current = 0; current < proposed.n; current++)
        best = std::min(best, time_cold(cublas_current, &least));
    ladder_release();
    return 2.0 * 8192 * (double)n / best * 1e-9;
}

// ------------------------------------------------------------------------------------------------
// The table

enum { NOISE = 1 << 22 };
static bf16* noise;                        // normal numbers; what is larger repeats them

static bf16* noisy_array(size_t n) {
    bf16* p = device_array<bf16>(n);
    for (size_t i = 0; i < n; i += NOISE)
        cudaCheck(cudaMemcpyAsync(p + i, noise, std::min((size_t)NOISE, n - i) * sizeof(bf16),
                                  cudaMemcpyDeviceToDevice, 0));
    return p;
}

__global__ void differ_kernel(unsigned* count, const unsigned* a, const unsigned* b, size_t n) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        if (a[i] != b[i]) atomicAdd(count, 1u);
}

// a property of proposal i, of 4 or 2 bytes
static int algorithm(int i, cublasLtMatmulAlgoConfigAttributes_t name) {
    const cublasLtMatmulAlgo_t* algo = &proposed.candidate[i].algo;
    int32_t wide = 0;
    uint16_t narrow = 0;
    size_t written;
    if (cublasLtMatmulAlgoConfigGetAttribute(algo, name, &wide, sizeof wide, &written) ==
        CUBLAS_STATUS_SUCCESS)
        return wide;
    cublasCheck(cublasLtMatmulAlgoConfigGetAttribute(algo, name, &narrow, sizeof narrow, &written));
    return narrow;
}

// The clock follows the power, and here the GPU rests between two matmuls: in the step, at the power limit,
// little is left of the differences. What a faster algorithm is worth, only the step tells.

// table_row: the proposals of one matmul and what ships, timed in turn (one after the other would compare the
// minutes: the clock follows the power), and how many give the bits of the first.
// sum: milliseconds of a step with the first, the fastest, what ships, and the floor
static void table_row(const Linear* l, int which_pass, double roof, double sum[4]) {
    enum { ROUNDS = 9 };
    static cudaEvent_t begin, end;
    static char* flush;
    if (!flush) {
        cudaCheck(cudaEventCreate(&begin));
        cudaCheck(cudaEventCreate(&end));
        cudaCheck(cudaMalloc((void**)&flush, LADDER_FLUSH));
        cudaCheck(cudaMemset(flush, 0, LADDER_FLUSH));
    }
    lin = *l;
    pass = which_pass;
    double M = (double)lin.M, I = (double)lin.I, O = (double)lin.O, flop = 2 * M * I * O;
    bool adds = pass == DGRAD && lin.add_dinp;
    double bytes = 2 * M * (I + O) + (pass == WGRAD ? 8 : 2) * I * O + (adds ? 2 * M * I : 0);
    double floor_ms = std::max(flop / roof * 1e-9, bytes / copy_bandwidth() * 1e3);
    size_t result[] = {lin.M * lin.ldo, lin.M * lin.ldi, 2 * lin.I * lin.O};       // in 2 bytes
    std::vector<float> host;
    noise = random_array<bf16>(NOISE, 1, 0, &host);
    inp = pass == DGRAD ? NULL : noisy_array(lin.M * lin.ldi);
    dout = pass == FORWARD ? NULL : noisy_array(lin.M * lin.ldo);
    weight = noisy_array(lin.I * lin.O);
    bf16 *start = noisy_array(result[pass]), *to = device_array<bf16>(result[pass]),
         *kept = device_array<bf16>(result[pass]);
    out = dinp = to;
    dweight = (float*)(void*)to;
    if (pass == WGRAD) cudaCheck(cudaMemset(start, 0, result[pass] * sizeof(bf16)));
    unsigned *count = device_array<unsigned>(1), differ = 0;
    proposed = propose();
    const int n = proposed.n + 1;                                // the last: what ships
    std::vector<std::vector<float>> ms((size_t)n);
    std::vector<bool> same((size_t)n);
    for (int i = 0; i < n; i++) {
        cudaCheck(cudaMemcpy(to, start, result[pass] * sizeof(bf16), cudaMemcpyDeviceToDevice));
        if (i < proposed.n) run(&proposed, i);
        else shipped();
        if (i == 0) cudaCheck(cudaMemcpy(kept, to, result[pass] * sizeof(bf16), cudaMemcpyDeviceToDevice));
        cudaCheck(cudaMemset(count, 0, sizeof differ));
        differ_kernel<<<1024, 256>>>(count, (unsigned*)to, (unsigned*)kept, result[pass] / 2);
        cudaCheck(cudaMemcpy(&differ, count, sizeof differ, cudaMemcpyDeviceToHost));
        same[(size_t)i] = differ == 0;
    }
    for (int round = 0; round < ROUNDS; round++)
        for (int i = 0; i < n; i++) {
            float t;
            flush_kernel<<<1056, 512>>>((const uint4*)flush, LADDER_FLUSH / sizeof(uint4), (uint4*)flush);
            cudaCheck(cudaGetLastError());
            cudaCheck(cudaEventRecord(begin, 0));
            if (i < proposed.n) run(&proposed, i);
            else shipped();
            cudaCheck(cudaEventRecord(end, 0));
            cudaCheck(cudaEventSynchronize(end));
            cudaCheck(cudaEventElapsedTime(&t, begin, end));
            ms[(size_t)i].push_back(t);
        }
    const cublasLtMatmulAlgoConfigAttributes_t SPLIT = CUBLASLT_ALGO_CONFIG_SPLITK_NUM;
    int best = 0, bits = 0, same_split = 0;
    for (int i = 0; i < n; i++) {
        std::sort(ms[(size_t)i].begin(), ms[(size_t)i].end());
        if (i == proposed.n) continue;
        if (ms[(size_t)i][ROUNDS / 2] < ms[(size_t)best][ROUNDS / 2]) best = i;
        bits += same[(size_t)i];
        same_split += algorithm(i, SPLIT) == algorithm(0, SPLIT);
    }
    double first_ms = ms[0][ROUNDS / 2], best_ms = ms[(size_t)best][ROUNDS / 2],
           our_ms = ms[(size_t)n - 1][ROUNDS / 2];
    printf("  %-9s %-8s %6zu %5zu %5zu %9.4f %9.4f %9.4f %7.0f %6.1f%%   tile %3d split %d cluster %d "
           "  %d of %d / %d / %s\n",
           lin.name, pass_name[pass], lin.M, lin.I, lin.O, first_ms, best_ms, our_ms, flop / our_ms * 1e-9,
           100 * floor_ms / our_ms, algorithm(best, CUBLASLT_ALGO_CONFIG_TILE_ID), algorithm(best, SPLIT),
           algorithm(best, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID), same_split, proposed.n, bits,
           same[(size_t)n - 1] ? "yes" : "no");
    fflush(stdout);
    const double row[] = {first_ms, best_ms, our_ms, floor_ms};
    for (int i = 0; i < 4; i++) sum[i] += lin.calls * row[i];
    ladder_release();
}

static void table(const char* title, const Linear* linear, int n, double roof) {
    double sum[4] = {0, 0, 0, 0};
    printf("%s\n  %-9s %-8s %6s %5s %5s %9s %9s %9s %7s %7s   the fastest proposal (numbers of cublasLt.h); "
           "split as the first / its bits / shipped too\n",
           title, "layer", "pass", "M", "I", "O", "first ms", "fastest", "shipped", "TFLOP/s", "floor");
    for (int i = 0; i < n; i++)
        for (int which = 0; which < 3; which++) table_row(&linear[i], which, roof, sum);
    printf("  a step: first %.2f ms, fastest %.2f ms, shipped %.2f ms, floor %.2f ms\n\n", sum[0], sum[1],
           sum[2], sum[3]);
}

int main(int argc, char** argv) {
    const double T = 16384, E = 1536;
    device_require();
    double roof = matmul_roof();
    printf("matmul 8192 x 8192 x 8192, bf16: %.0f TFLOP/s\n", roof);
    const Ladder ladder[] = {
        {"in_proj forward", "M 16384, 768 -> 3072, bf16", rungs, COUNT(rungs), setup_in_forward, 0,
         2 * T * 768 * 2 * E, 2 * T * 768 * 2 * E / roof * 1e-9},
        {"out_proj wgrad", "M 16384, 1536 -> 768, bf16, added to fp32", rungs, COUNT(rungs), setup_out_wgrad,
         0, 2 * T * E * 768, 2 * T * E * 768 / roof * 1e-9},
        {"x_proj forward", "M 16384, 1536 -> 80, bf16", rungs, COUNT(rungs), setup_x_forward,
         2 * (T * (E + 80) + E * 80), 0, 0},
        {"x_proj dgrad", "M 16384, 80 -> 1536, bf16, added", short_rungs, COUNT(short_rungs), setup_x_dgrad,
         2 * (T * (E * 2 + 80) + E * 80), 0, 0},
        {"dt_proj forward", "M 16384, 48 -> 1536, bf16", short_rungs, COUNT(short_rungs), setup_dt_forward,
         2 * (T * (E + 48) + E * 48), 0, 0},
        {"in_proj wgrad", "M 16384, 768 -> 3072, bf16, added to fp32", alone_rungs, 1, setup_in_wgrad,
         0, 2 * T * 768 * 2 * E, 2 * T * 768 * 2 * E / roof * 1e-9},
        {"in_proj wgrad and rmsnorm backward", "M 16384, D 768; floor: the matmul", side_rungs,
         COUNT(side_rungs), setup_side, 0, 2 * T * 768 * 2 * E, 2 * T * 768 * 2 * E / roof * 1e-9},
    };
    int status = ladder_main(argc, argv, ladder, COUNT(ladder));
    if (argc > 1) return status;
    const Linear more[] = {
        {"in_proj", 65536, 768, 3072, 768, 3072, false, 24},
        {"x_proj", 65536, 1536, 80, 1536, 80, true, 24},
        {"dt_proj", 65536, 48, 1536, 80, 1536, false, 24},
        {"out_proj", 65536, 1536, 768, 1536, 768, false, 24},
        {"head", 16384, 768, 50280, 768, 50280, false, 4},
    };
    const Linear chars[] = {
        {"in_proj", 16384, 384, 1536, 384, 1536, false, 12},
        {"x_proj", 16384, 768, 56, 768, 56, true, 12},
        {"dt_proj", 16384, 24, 768, 56, 768, false, 12},
        {"out_proj", 16384, 768, 384, 768, 384, false, 12},
        {"head", 16384, 384, 264, 384, 264, false, 1},
    };
    table("mamba-130m, 8 x 2048 tokens", layer, COUNT(layer), roof);
    table("mamba-130m, 32 x 2048 tokens", more, COUNT(more), roof);
    table("characters: 12 x 384, 64 x 256 tokens", chars, COUNT(chars), roof);
    return status;
}
