// ssm.c on the GPU: the layers of train_mamba.c as fused CUDA kernels, the device model, a CUDA backend.
//
// This file includes train_mamba.c: configuration, tensor table, files, data, training loop, generation,
// command line and the CPU oracle exist once. Sections 1 to 12 have the numbers and names of their
// counterparts there; the parts of section 4 are this file's own.
//   --precision bf16  bf16 activations and matmuls; fp32 parameters (masters), residual stream, states (see
//                     --state-dtype), decay and every reduction
//   --precision fp32  everything in fp32, for exact comparison with the CPU
// Hardware terms: a kernel is a function that runs on the GPU, launched as a grid of blocks; a block is a
// group of threads that share a small fast memory; a warp is 32 threads of a block that step together; a
// stream is a queue of kernels that run one after the other.
//
//  1. Basics: checks, device memory
//  3. Matmul: cuBLASLt
//  4. Layers
//  7. Optimizer: gradient norm, AdamW
//  5. Blocks
//  6. Model
//  9. Backend
// 12. Main

#define SSM_NO_MAIN
// defines: everything that is not a kernel, and the CPU oracle
#include "train_mamba.c"

#include <cublasLt.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

// ---------------------------------------------------------------------------------------------------
// 1. Basics: checks, device memory

static_assert(!REAL_IS_DOUBLE, "the host side is float; the tests build the double oracle on its own");

#define cudaCheck(call) cuda_check((call), __FILE__, __LINE__)
void cuda_check(cudaError_t status, const char* file, int line) {
    if (status == cudaSuccess) return;
    if (status == cudaErrorMemoryAllocation)
        die("the GPU's memory is exhausted; lower --batch-size, --seq-len or the model size, or use "
            "--recompute");
    if (status == cudaErrorNoKernelImageForDevice)
        die("this program was not compiled for this GPU; build it again with make cuda ARCH=-arch=native, or "
            "use --device cpu");
    die("%s:%d: CUDA: %s", file, line, cudaGetErrorString(status));
}

#define cublasCheck(call) cublas_check((call), __FILE__, __LINE__)
void cublas_check(cublasStatus_t status, const char* file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS)
        die("%s:%d: cuBLASLt: %s", file, line, cublasLtGetStatusString(status));
}

// device_calloc: zeroed memory on the device; `device_bytes` counts what has been asked for. The program's
// streams do not wait for the default stream, in which cudaMemset and cudaMemcpy work and from which both
// return early: without the wait for it, a busy GPU clears the memory after its first use.
static size_t device_bytes;

void* device_calloc(size_t count, size_t size) {
    void* p;
    cudaCheck(cudaMalloc(&p, count > 0 && size > 0 ? count * size : 1));
    cudaCheck(cudaMemset(p, 0, count * size));
    cudaCheck(cudaStreamSynchronize(0));
    device_bytes += count * size;
    return p;
}

// device_copy: n numbers of the host in new memory on the device
template <typename Y> static Y* device_copy(const Y* host, size_t n) {
    Y* p = (Y*)device_calloc(n, sizeof(Y));
    cudaCheck(cudaMemcpy(p, host, n * sizeof(Y), cudaMemcpyHostToDevice));
    cudaCheck(cudaStreamSynchronize(0));
    return p;
}

// to_device, to_host: copies in a stream
template <typename Y> static void to_device(Y* device, const Y* host, size_t n, cudaStream_t stream) {
    cudaCheck(cudaMemcpyAsync(device, host, n * sizeof(Y), cudaMemcpyHostToDevice, stream));
}
template <typename Y> static void to_host(Y* host, const Y* device, size_t n, cudaStream_t stream) {
    cudaCheck(cudaMemcpyAsync(host, device, n * sizeof(Y), cudaMemcpyDeviceToHost, stream));
}

// host_pinned: host memory that the GPU copies from and to by itself, while both sides go on
void* host_pinned(size_t bytes) {
    void* p;
    cudaCheck(cudaMallocHost(&p, bytes > 0 ? bytes : 1));
    return p;
}

// device_require: one line when there is no GPU that can run this program
void device_require(void) {
    int devices = 0, major = 0, minor = 0;
    cudaError_t status = cudaGetDeviceCount(&devices);
    if (status != cudaSuccess || devices == 0)
        die("no usable GPU (%s); --device cpu runs on the CPU",
            status == cudaSuccess ? "none found" : cudaGetErrorString(status));
    cudaCheck(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    cudaCheck(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
    if (major < 8)
        die("the GPU has compute capability %d.%d, this program needs 8.0 or newer; use --device cpu", major,
            minor);
}

// ---------------------------------------------------------------------------------------------------
// 3. Matmul: cuBLASLt
//
// A linear layer is y = x W^T + b. cuBLASLt thinks in columns: a row-major (M,K) matrix is its column-major
// (K,M) matrix, so out (M,O) is computed as out^T (O,M) = W (O,I) inp^T (I,M). Products of the activation
// type X, sums in fp32. The algorithm is fixed per shape, with a workspace of fixed size and no reduction in
// place: the same shape gives the same bits, whatever else uses the GPU.
//
// The algorithm is the first that the heuristic of cuBLASLt proposes, but see matmul_overlap_output. Others
// win when each matmul is timed alone (behind a cache full of writes): on one H200 (cuBLASLt 13.1) all
// matmuls of a step of mamba-130m, 8 x 2048 tokens, take 22.1 ms with the first, 21.4 with the fastest of
// eight proposals, 20.7 with the fastest of 400 algorithms; 17.1 is the floor. In the step little of that
// is left: training holds the GPU at the limit of its power (690 of 700 W, the clock at 1.7 to 1.8 of 1.98
// GHz), and a busier kernel lowers the clock. So nothing is timed at the start, and every run makes the
// same choice. (A choice by time would not change the bits: only the number of parts into which a sum is
// split does. All algorithms with the same split, hundreds for each shape, agreed in every bit.)

enum { MATMUL_WORKSPACE = 64 << 20 };

typedef struct {
    int op_a, op_b, type_ab, type_c;
    size_t M, N, K, lda, ldb, ldc;
    uint32_t align_a, align_b, align_c;      // of the pointers: 16, 8, 4 or 2 bytes
    uint32_t padding;
} MatmulKey;

typedef struct {
    MatmulKey key;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algo;
} MatmulPlan;

typedef struct {
    cublasLtHandle_t handle;
    void* workspace;
    MatmulPlan* plan;
    int n_plans;
} Matmul;

template <typename X> struct CudaType;
template <> struct CudaType<float> { static const cudaDataType_t value = CUDA_R_32F; };
template <> struct CudaType<__nv_bfloat16> { static const cudaDataType_t value = CUDA_R_16BF; };

static uint32_t pointer_alignment(const void* p) {
    uintptr_t bits = (uintptr_t)p;
    return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

template <typename X, typename C>
static MatmulKey matmul_key(const C* c, size_t ldc, const X* a, size_t lda, bool transpose_a, const X* b,
                            size_t ldb, bool transpose_b, size_t M, size_t N, size_t K) {
    MatmulKey key;
    memset(&key, 0, sizeof key);
    key.op_a = transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    key.op_b = transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    key.type_ab = CudaType<X>::value;
    key.type_c = CudaType<C>::value;
    key.M = M; key.N = N; key.K = K; key.lda = lda; key.ldb = ldb; key.ldc = ldc;
    key.align_a = pointer_alignment(a);
    key.align_b = pointer_alignment(b);
    key.align_c = pointer_alignment(c);
    return key;
}

// matmul_candidates: fills in the description of p->key and asks the heuristic of cuBLASLt for at most n
// algorithms, best first. Returns how many there are.
static int matmul_candidates(Matmul* mm, MatmulPlan* p, cublasLtMatmulHeuristicResult_t* result, int n) {
    const MatmulKey* key = &p->key;
    cublasOperation_t op_a = (cublasOperation_t)key->op_a, op_b = (cublasOperation_t)key->op_b;
    cudaDataType_t type_ab = (cudaDataType_t)key->type_ab, type_c = (cudaDataType_t)key->type_c;
    cublasCheck(cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    cublasCheck(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a));
    cublasCheck(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b));
    bool ta = op_a == CUBLAS_OP_T, tb = op_b == CUBLAS_OP_T;
    cublasCheck(cublasLtMatrixLayoutCreate(&p->a, type_ab, ta ? key->K : key->M, ta ? key->M : key->K,
                                           (int64_t)key->lda));
    cublasCheck(cublasLtMatrixLayoutCreate(&p->b, type_ab, tb ? key->N : key->K, tb ? key->K : key->N,
                                           (int64_t)key->ldb));
    cublasCheck(cublasLtMatrixLayoutCreate(&p->c, type_c, key->M, key->N, (int64_t)key->ldc));
    cublasLtMatmulPreference_t preference;
    cublasCheck(cublasLtMatmulPreferenceCreate(&preference));
    size_t workspace = MATMUL_WORKSPACE;
    // split sums are added from the workspace, in order
    uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const struct {
        cublasLtMatmulPreferenceAttributes_t name;
        const void* value;
        size_t size;
    } attribute[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &key->align_a, sizeof key->align_a},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &key->align_b, sizeof key->align_b},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &key->align_c, sizeof key->align_c},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &key->align_c, sizeof key->align_c},
    };
    for (size_t i = 0; i < sizeof attribute / sizeof attribute[0]; i++)
        cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, attribute[i].name, attribute[i].value,
                                                         attribute[i].size));
    int found = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(mm->handle, p->desc, p->a, p->b, p->c, p->c,
                                                           preference, n, result, &found);
    cublasCheck(cublasLtMatmulPreferenceDestroy(preference));
    if (status != CUBLAS_STATUS_SUCCESS || found == 0)
        die("cuBLASLt has no algorithm for a matmul of %zu x %zu x %zu", key->M, key->N, key->K);
    return found;
}

// matmul_overlap_output: on Hopper (compute capability 9), for an output larger than the L2 cache, another
// kernel than the proposed one, if this cuBLASLt has it. The proposed ones have large tiles, on which all
// warps of a block work together and then together write the result, while the tensor cores wait. With tiles
// of 128 x 152 two groups of warps take turns: one writes while the other computes. That pays where the
// writing goes to the memory and the sums are short: in_proj forward and the logits of mamba-130m. One H200,
// M 16384, timed alone: 0.101 ms for 0.112 and 1.74 for 2.27; in a row, at the power limit: 0.107 for 0.133
// and 1.91 for 2.22. Outputs that fit in the cache gained nothing or lost. The bits are the same.
static void matmul_overlap_output(const Matmul* mm, MatmulPlan* p) {
    enum { HOPPER_KERNELS = 66, TILE_128x152 = 407, TAKING_TURNS = 1 };    // numbers of cuBLASLt
    const uint32_t tile = TILE_128x152, option = TAKING_TURNS;
    const uint16_t cluster = CUBLASLT_CLUSTER_SHAPE_2x1x1;                 // two blocks share what they load
    const struct {
        cublasLtMatmulAlgoConfigAttributes_t name;
        const void* value;
        size_t size;
    } config[] = {
        {CUBLASLT_ALGO_CONFIG_TILE_ID, &tile, sizeof tile},
        {CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, &option, sizeof option},
        {CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, &cluster, sizeof cluster},
    };
    int device, cache_bytes;
    int32_t family = 0, split = 0;
    size_t written;
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaDeviceGetAttribute(&cache_bytes, cudaDevAttrL2CacheSize, device));
    cublasLtMatmulAlgo_t algo = p->algo;
    cublasCheck(cublasLtMatmulAlgoConfigGetAttribute(&algo, CUBLASLT_ALGO_CONFIG_ID, &family, sizeof family,
                                                     &written));
    if (family != HOPPER_KERNELS || p->key.type_c != CUDA_R_16BF ||
        p->key.M * p->key.N * 2 <= (size_t)cache_bytes)
        return;
    cublasCheck(cublasLtMatmulAlgoConfigGetAttribute(&algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &split,
                                                     sizeof split, &written));
    if (split > 1) return;
    for (size_t i = 0; i < sizeof config / sizeof config[0]; i++)
        if (cublasLtMatmulAlgoConfigSetAttribute(&algo, config[i].name, config[i].value, config[i].size) !=
            CUBLAS_STATUS_SUCCESS)
            return;
    cublasLtMatmulHeuristicResult_t result;
    if (cublasLtMatmulAlgoCheck(mm->handle, p->desc, p->a, p->b, p->c, p->c, &algo, &result) ==
            CUBLAS_STATUS_SUCCESS &&
        result.workspaceSize <= MATMUL_WORKSPACE)
        p->algo = algo;
}

// matmul_plan: the description and algorithm for one shape, made at its first use.
static MatmulPlan* matmul_plan(Matmul* mm, const MatmulKey* key) {
    for (int i = 0; i < mm->n_plans; i++)
        if (memcmp(&mm->plan[i].key, key, sizeof *key) == 0) return &mm->plan[i];
    mm->plan = (MatmulPlan*)xrealloc(mm->plan, (size_t)mm->n_plans + 1, sizeof(MatmulPlan));
    MatmulPlan* p = &mm->plan[mm->n_plans++];
    memset(p, 0, sizeof *p);
    p->key = *key;
    // fp32, for exact comparison: an output row has the bits that it has without the other rows. So the
    // algorithm of a linear layer's forward is that for 128 rows, however many there are, if it can do them.
    cublasLtMatmulHeuristicResult_t result;
    if (key->type_ab == CUDA_R_32F && key->op_a == CUBLAS_OP_T && key->op_b == CUBLAS_OP_N) {
        const uint64_t rows = key->N;
        p->key.N = 128;
        matmul_candidates(mm, p, &result, 1);
        p->key.N = key->N;
        p->algo = result.algo;
        cublasCheck(cublasLtMatrixLayoutSetAttribute(p->b, CUBLASLT_MATRIX_LAYOUT_COLS, &rows, sizeof rows));
        cublasCheck(cublasLtMatrixLayoutSetAttribute(p->c, CUBLASLT_MATRIX_LAYOUT_COLS, &rows, sizeof rows));
        if (cublasLtMatmulAlgoCheck(mm->handle, p->desc, p->a, p->b, p->c, p->c, &p->algo, &result) ==
                CUBLAS_STATUS_SUCCESS &&
            result.workspaceSize <= MATMUL_WORKSPACE)
            return p;
    }
    matmul_candidates(mm, p, &result, 1);
    p->algo = result.algo;
    matmul_overlap_output(mm, p);
    return p;
}

static void matmul_run(const Matmul* mm, const MatmulPlan* p, const cublasLtMatmulAlgo_t* algo, void* c,
                       const void* a, const void* b, float beta, cudaStream_t stream) {
    float one = 1;
    cublasCheck(cublasLtMatmul(mm->handle, p->desc, &one, a, p->a, b, p->b, &beta, c, p->c, c, p->c, algo,
                               mm->workspace, MATMUL_WORKSPACE, stream));
}

#ifdef SSM_SANITIZE
// plain_gemm: what gemm does, one thread per number: cuBLASLt's kernels do not survive what racecheck adds
template <typename X, typename C>
__global__ void plain_gemm_kernel(C* c, size_t ldc, const X* a, size_t lda, bool transpose_a, const X* b,
                                  size_t ldb, bool transpose_b, size_t M, size_t N, size_t K, float beta) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, m = i % M, n = i / M;
    if (n >= N) return;
    float sum = beta == 0 ? 0 : beta * (float)c[n * ldc + m];
    for (size_t k = 0; k < K; k++)
        sum += (float)a[transpose_a ? m * lda + k : k * lda + m] *
               (float)b[transpose_b ? k * ldb + n : n * ldb + k];
    c[n * ldc + m] = (C)sum;
}
#endif

// gemm: column-major C (M,N) = op(A) op(B) + beta C
template <typename X, typename C>
static void gemm(Matmul* mm, C* c, size_t ldc, const X* a, size_t lda, bool transpose_a, const X* b,
                 size_t ldb, bool transpose_b, size_t M, size_t N, size_t K, float beta,
                 cudaStream_t stream) {
#ifdef SSM_SANITIZE
    (void)mm;
    plain_gemm_kernel<<<(unsigned)((M * N + 255) / 256), 256, 0, stream>>>(
        c, ldc, a, lda, transpose_a, b, ldb, transpose_b, M, N, K, beta);
    cudaCheck(cudaGetLastError());
#else
    MatmulKey key = matmul_key(c, ldc, a, lda, transpose_a, b, ldb, transpose_b, M, N, K);
    const MatmulPlan* p = matmul_plan(mm, &key);
    matmul_run(mm, p, &p->algo, c, a, b, beta, stream);
#endif
}

// bias_forward_cuda: out[m,o] += bias[o].   out (M,O), row stride ldo
// cuBLASLt could add it while it writes out, but wants a bias in the type of out, and ours is float.
template <typename X> __global__ void bias_forward_kernel(X* out, size_t ldo, const float* bias, size_t O) {
    X* out_m = out + (size_t)blockIdx.x * ldo;
    for (size_t o = threadIdx.x; o < O; o += blockDim.x) out_m[o] = (X)((float)out_m[o] + bias[o]);
}

template <typename X>
void bias_forward_cuda(X* out, size_t ldo, const float* bias, size_t M, size_t O, cudaStream_t stream) {
    bias_forward_kernel<<<(unsigned)M, 256, 0, stream>>>(out, ldo, bias, O);
    cudaCheck(cudaGetLastError());
}

// the sum over tokens, in section 4
template <typename X>
void bias_backward_cuda(float* dbias, const X* dout, size_t ldo, size_t M, size_t O, float* scratch,
                        cudaStream_t stream, struct SumList* later = NULL);

// matmul_forward_cuda: out (M,O) = inp (M,I) weight^T + bias.   row strides ldo, ldi   weight (O,I)
// bias (O) float or NULL
template <typename X>
void matmul_forward_cuda(Matmul* mm, X* out, size_t ldo, const X* inp, size_t ldi, const X* weight,
                         const float* bias, size_t M, size_t I, size_t O, cudaStream_t stream) {
    gemm(mm, out, ldo, weight, I, true, inp, ldi, false, O, M, I, 0.0f, stream);
    if (bias) bias_forward_cuda(out, ldo, bias, M, O, stream);
}

// matmul_backward_cuda: as on the CPU. dinp is written, or added to with add_dinp; dweight and dbias are
// added to; without add_dweight dweight is written (the first part of a batch needs no zeros before it).
template <typename X>
void matmul_backward_cuda(Matmul* mm, X* dinp, size_t lddi, bool add_dinp, float* dweight, float* dbias,
                          const X* dout, size_t lddo, const X* inp, size_t ldi, const X* weight,
                          float* scratch, size_t M, size_t I, size_t O, cudaStream_t stream,
                          bool add_dweight = true) {
    if (dinp)
        gemm(mm, dinp, lddi, weight, I, false, dout, lddo, false, I, M, O, add_dinp ? 1.0f : 0.0f, stream);
    if (dweight)
        gemm(mm, dweight, I, inp, ldi, false, dout, lddo, true, I, O, M, add_dweight ? 1.0f : 0.0f, stream);
    if (dbias) bias_backward_cuda(dbias, dout, lddo, M, O, scratch, stream);
}

// ---------------------------------------------------------------------------------------------------
// 4. Layers
//
// None of these kernels computes much; each costs the time that its bytes need between the memory and the
// chip ("bytes" in the headers counts them). So all follow the same rules:
//   - every array is read once and written once; what is needed twice waits in registers or shared memory
//   - a thread loads several neighbouring values with one instruction (Pack), and neighbouring threads load
//     neighbouring packs, so that a warp (32 threads in step) fetches one contiguous piece of memory
//   - a thread starts several loads before it uses the first: one load takes about 600 ns, and only many of
//     them under way at once keep the memory busy
//   - sums over tokens are made in two stages: each block (a group of threads on one of the chip's
//     processors, sharing a small fast memory) writes its partial sum to `scratch`, a second kernel adds them
//     in order. Atomic additions would be simpler, but their order, and so the last bits, change from run to
//     run.
// X is the type of activations: float or __nv_bfloat16, the upper 16 bits of a float. The residual stream,
// parameters, their gradients and all sums are float. Gradients of parameters are ADDED, gradients of
// activations and states are WRITTEN. Launchers with more than one kernel return the name of the one used.

// --------------------------------------------------------------------------------------------------
// 4.1 Small things that all layers use

typedef __nv_bfloat16 bf16;

enum { WARP = 32 };

// Pack: W neighbouring values, loaded and stored by one instruction of at most 16 bytes
template <typename X, int W> struct alignas(sizeof(X) * W) Pack { X v[W]; };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
template <typename X> __device__ __forceinline__ X from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

template <int W, typename X> __device__ __forceinline__ Pack<X, W> load_pack(const X* p) {
    return *(const Pack<X, W>*)p;
}

template <int W, typename X> __device__ __forceinline__ void unpack(float* v, const Pack<X, W>& p) {
    #pragma unroll
    for (int j = 0; j < W; j++) v[j] = to_float(p.v[j]);
}

template <int W, typename X> __device__ __forceinline__ void store_pack(X* p, const float* v) {
    Pack<X, W> pack;
    #pragma unroll
    for (int j = 0; j < W; j++) pack.v[j] = from_float<X>(v[j]);
    *(Pack<X, W>*)p = pack;
}

// is_aligned: whether packs of `bytes` may be used at p (NULL: nothing is accessed) with this row stride
static inline bool is_aligned(const void* p, size_t bytes, size_t row_bytes) {
    return !p || ((uintptr_t)p % bytes == 0 && row_bytes % bytes == 0);
}

// One instruction each, of the special function unit: 2^x and 1/x, relative errors 2^-22 and 2^-23
__device__ __forceinline__ float exp2_unit(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal_unit(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float exp_cuda(float x) { return exp2_unit(x * 1.44269504f); }
__device__ __forceinline__ float sigmoid_cuda(float x) { return reciprocal_unit(1.0f + exp_cuda(-x)); }
__device__ __forceinline__ float silu_cuda(float x) { return x * sigmoid_cuda(x); }

// the derivative of silu, given sigma = sigmoid(x)
__device__ __forceinline__ float silu_grad_cuda(float x, float sigma) {
    return sigma * fmaf(x, 1.0f - sigma, 1.0f);
}

// copy_async: starts a copy of BYTES (4, 8 or 16) from the memory to shared memory that goes on by itself and
// needs no registers (cp.async). Copies are committed in groups; copy_async_wait waits until at most `groups`
// of the groups of this thread are still under way. A thread that reads only what it has copied itself needs
// no other barrier.
template <int BYTES> __device__ __forceinline__ void copy_async(void* shared, const void* global) {
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(global) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                     :: "r"(to), "l"(global), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copy_async_wait(int groups) {
    if (groups == 4) asm volatile("cp.async.wait_group 4;" ::: "memory");
    else if (groups == 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
    else if (groups == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
    else if (groups == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
    else asm volatile("cp.async.wait_group 0;" ::: "memory");
}

// load_matrices: four 8 x 8 matrices of bf16 from shared memory (ldmatrix), as the tensor core takes them.
// Lane l gives the address (of 16 bytes) of row l % 8 of matrix l / 8; r[k] is then matrix k, of which lane
// 4g + q holds row g, columns 2q and 2q+1; _trans: column g, rows 2q and 2q+1.
__device__ __forceinline__ void load_matrices(uint32_t* r, const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}
__device__ __forceinline__ void load_matrices_trans(uint32_t* r, const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}

// warp_sum: the sum over the 32 lanes of a warp, the same bits in every lane
__device__ __forceinline__ float warp_sum(float x) {
    #pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// group_sum: the sum over WARPS neighbouring warps. With one warp there is nothing to wait for; otherwise the
// group is the whole block, and `shared` holds 2 WARPS floats: `phase` alternates between the two halves, so
// that one barrier per sum is enough.
template <int WARPS> __device__ __forceinline__ float group_sum(float x, float* shared, int phase) {
    x = warp_sum(x);
    if (WARPS == 1) return x;
    float* part = shared + phase * WARPS;
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0;
    #pragma unroll
    for (int i = 0; i < WARPS; i++) sum += part[i];
    return sum;
}

// launch_early: between two kernels of a stream lie one or two microseconds, in which the first ends and the
// second starts. From sm_90 on a kernel can use them (programmatic dependent launch): its blocks start when
// those of the kernel before have ended or called allow_next, they load what that kernel does not write, and
// wait_before waits until everything it wrote is there.
__device__ __forceinline__ void allow_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <typename Kernel> static bool compiled_for_90(Kernel kernel) {
    static int compiled = 0;                                 // for this compute capability, times 10
    if (compiled == 0) {
        cudaFuncAttributes attributes;
        cudaCheck(cudaFuncGetAttributes(&attributes, kernel));
        compiled = attributes.ptxVersion;
    }
    return compiled >= 90;
}

// drivers before CUDA 12.3 cannot record early starts in a graph
static int early_starts_allowed(void) {
    static int driver = 0;
    if (driver == 0) cudaCheck(cudaDriverGetVersion(&driver));
    return driver >= 12030;
}

static cudaLaunchConfig_t launch_config(cudaLaunchAttribute attribute[2], unsigned cluster, dim3 grid,
                                        dim3 block, size_t shared, cudaStream_t stream) {
    attribute[0] = attribute[1] = {};
    attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[0].val.programmaticStreamSerializationAllowed = early_starts_allowed();
    attribute[1].id = cudaLaunchAttributeClusterDimension;
    attribute[1].val.clusterDim.x = cluster;
    attribute[1].val.clusterDim.y = attribute[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attribute;
    config.numAttrs = cluster > 0 ? 2 : 1;
    return config;
}

// launch_clusters: launch_early, where `cluster` neighbouring blocks can write to each other's shared memory;
// 0: none can
template <typename Kernel, typename... Arguments>
static void launch_clusters(unsigned cluster, Kernel kernel, dim3 grid, dim3 block, size_t shared,
                            cudaStream_t stream, const Arguments&... arguments) {
    cudaLaunchAttribute attribute[2];
    cudaLaunchConfig_t config = launch_config(attribute, cluster, grid, block, shared, stream);
    if (!compiled_for_90(kernel)) config.numAttrs = 0;       // compiled for less, it would not wait
    cudaCheck(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <typename Kernel, typename... Arguments>
static void launch_early(Kernel kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                         const Arguments&... arguments) {
    launch_clusters(0, kernel, grid, block, shared, stream, arguments...);
}

// sum_parts: the second stage of a sum.   out[i] += sum_p parts[p,i],  out2[i] += sum_p parts[p,n+i]
//   parts (P,n+n2), row stride ld   out (n)   out2 (n2)
// A block sums 32 columns, its 32 warps every 32nd part each; then one warp adds the 32 sums in order.
// One such sum is too little work for the chip. So a kernel does those of a SumList, one after the other in
// its grid: nothing in a step waits for the gradients of small parameters, so the sums of a layer are left to
// its end (`later` of the launchers).
enum { SUM_WARPS = 32, SUM_LIST = 8 };
struct SumParts { float *out, *out2; const float* parts; size_t P, n, n2, ld; };
struct SumList { SumParts sum[SUM_LIST]; int n; };

__host__ __device__ inline unsigned sum_blocks(const SumParts& s) {
    return (unsigned)((s.n + s.n2 + WARP - 1) / WARP);
}

__global__ void __launch_bounds__(WARP * SUM_WARPS) sum_parts_kernel(const __grid_constant__ SumList list) {
    __shared__ float sum[SUM_WARPS][WARP];
    unsigned block = blockIdx.x;
    int k = 0;
    while (block >= sum_blocks(list.sum[k])) block -= sum_blocks(list.sum[k++]);
    const SumParts& s = list.sum[k];
    const size_t i = (size_t)block * WARP + threadIdx.x;
    const bool here = i < s.n + s.n2;
    float acc = 0;
    #pragma unroll 8
    for (size_t p = threadIdx.y; p < s.P; p += SUM_WARPS) acc += here ? s.parts[p * s.ld + i] : 0.0f;
    sum[threadIdx.y][threadIdx.x] = acc;
    __syncthreads();
    if (threadIdx.y > 0 || !here) return;
    acc = 0;
    #pragma unroll
    for (int w = 0; w < SUM_WARPS; w++) acc += sum[w][threadIdx.x];
    (i < s.n ? s.out + i : s.out2 + (i - s.n))[0] += acc;
}

// sum_list_cuda: makes the sums of the list, which is empty then
void sum_list_cuda(SumList* list, cudaStream_t stream) {
    unsigned blocks = 0;
    for (int k = 0; k < list->n; k++) blocks += sum_blocks(list->sum[k]);
    if (blocks) sum_parts_kernel<<<blocks, dim3(WARP, SUM_WARPS), 0, stream>>>(*list);
    cudaCheck(cudaGetLastError());
    list->n = 0;
}

// sum_parts_cuda: now, or with the others of `later`; the parts must stay until then
void sum_parts_cuda(float* out, float* out2, const float* parts, size_t P, size_t n, size_t n2, size_t ld,
                    cudaStream_t stream, SumList* later = NULL) {
    SumList now;
    SumList* list = later ? later : &now;
    now.n = 0;
    assert(list->n < SUM_LIST);
    list->sum[list->n++] = SumParts{out, out2, parts, P, n, n2, ld};
    if (!later) sum_list_cuda(&now, stream);
}

// cast: out = inp in another type, n elements.   bytes: sizeof(Y) + sizeof(X) per element
//   packs: whether both are aligned to 4 elements
template <typename Y, typename X> __global__ void cast_kernel(Y* out, const X* inp, size_t n, bool packs) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4, end = i + 4;
    float v[4];
    if (packs && end <= n) {
        unpack<4>(v, load_pack<4>(inp + i));
        store_pack<4>(out + i, v);
    } else {
        for (; i < end && i < n; i++) out[i] = from_float<Y>(to_float(inp[i]));
    }
}

template <typename Y, typename X> void cast_cuda(Y* out, const X* inp, size_t n, cudaStream_t stream) {
    if (n == 0) return;
    const bool packs = is_aligned(out, 4 * sizeof(Y), 0) && is_aligned(inp, 4 * sizeof(X), 0);
    cast_kernel<<<(unsigned)((n + 1023) / 1024), 256, 0, stream>>>(out, inp, n, packs);
    cudaCheck(cudaGetLastError());
}

// DropoutCuda: the Dropout of train_mamba.c for kernels, which mask what they read or write anyway. The key
// changes from step to step and is read from device memory, so that a recorded graph of launches stays valid.
struct DropoutCuda {
    const uint64_t* key = NULL;
    uint64_t place = 0;          // 0 the embedding, l the delta that sub-layer l reads
    size_t first = 0;            // number of the call's first element
    uint32_t threshold = 0;      // 0: no dropout
    float scale = 1;
};

static inline DropoutCuda dropout_cuda(const Dropout* drop, const uint64_t* key, size_t D) {
    DropoutCuda d;
    d.key = key;
    d.place = (uint64_t)drop->place;
    d.first = drop->first * D;
    d.threshold = dropout_threshold(drop->rate);
    d.scale = (float)dropout_scale(d.threshold);
    return d;
}

__device__ __forceinline__ uint64_t dropout_key(const DropoutCuda& drop) {
    return mix64(*drop.key + drop.place);
}

// dropout_pack: W (1 or 4) neighbouring values, from element i of the array on; four are aligned and so
// share one hash
template <int W>
__device__ __forceinline__ void dropout_pack(float* v, size_t i, uint64_t key, const DropoutCuda& drop) {
    size_t element = drop.first + i;
    uint64_t bits = mix64(key + element / 4);
    #pragma unroll
    for (int j = 0; j < W; j++)
        v[j] = dropout_keeps(bits, W == 4 ? j : element, drop.threshold) ? v[j] * drop.scale : 0.0f;
}

// --------------------------------------------------------------------------------------------------
// 4.2 Embedding

// embedding_forward: res[m,:] = dropout(weight[tokens[m],:]).
//   res (M,D) float   weight (Vp,D)   tokens (M)
// One block per token.   bytes: 4 + sizeof(X) per element
template <typename X, int W>
__global__ void embedding_forward_kernel(float* res, const int* tokens, const X* weight, size_t D,
                                         DropoutCuda drop) {
    const X* row = weight + (size_t)tokens[blockIdx.x] * D;
    float* out = res + (size_t)blockIdx.x * D;
    uint64_t key = drop.threshold ? dropout_key(drop) : 0;
    for (size_t d = threadIdx.x * W; d < D; d += blockDim.x * W) {
        float v[W];
        unpack<W>(v, load_pack<W>(row + d));
        if (drop.threshold) dropout_pack<W>(v, blockIdx.x * D + d, key, drop);
        store_pack<W>(out + d, v);
    }
}

template <typename X>
void embedding_forward_cuda(float* res, const int* tokens, const X* weight, size_t M, size_t D,
                            cudaStream_t stream, DropoutCuda drop = DropoutCuda()) {
    if (is_aligned(weight, 4 * sizeof(X), D * sizeof(X)) && is_aligned(res, 16, D * 4)) {
        unsigned threads = (unsigned)(D < 1024 ? (D / 4 + WARP - 1) / WARP * WARP : 256);
        embedding_forward_kernel<X, 4><<<(unsigned)M, threads, 0, stream>>>(res, tokens, weight, D, drop);
    } else {
        embedding_forward_kernel<X, 1><<<(unsigned)M, 256, 0, stream>>>(res, tokens, weight, D, drop);
    }
    cudaCheck(cudaGetLastError());
}

// The backward adds all dres[m,:] of equal tokens to one row of dweight. To do that in a fixed order without
// searching, the positions m are first sorted by token: a stable radix sort, least significant digit of
// SORT_BITS bits first (one pass for bytes, two for vocabularies up to 262144). The positions are cut into at
// most SORT_TILES tiles, one block each, and a pass over a digit is two kernels: count the digits of every
// tile; move every position to its place.
enum { SORT_BITS = 9, SORT_DIGITS = 512, SORT_TILES = 128, EMBED_PIECE = 16 };

static inline size_t sort_tile(size_t M) {                   // positions in a tile
    return (M + SORT_TILES * SORT_DIGITS - 1) / (SORT_TILES * SORT_DIGITS) * SORT_DIGITS;
}

// count (tiles,SORT_DIGITS); one thread per digit
__global__ void __launch_bounds__(SORT_DIGITS)
sort_count_kernel(int* count, const int* keys, int shift, size_t tile, size_t M) {
    __shared__ int sum[SORT_DIGITS];
    sum[threadIdx.x] = 0;
    __syncthreads();
    size_t m0 = blockIdx.x * tile;
    for (size_t m = m0 + threadIdx.x; m < m0 + tile && m < M; m += SORT_DIGITS)
        atomicAdd(&sum[keys[m] >> shift & (SORT_DIGITS - 1)], 1);            // integers: any order, same sum
    __syncthreads();
    count[(size_t)blockIdx.x * SORT_DIGITS + threadIdx.x] = sum[threadIdx.x];
}

// A position's place is the number of positions before it in sorted order: those with a smaller digit; with
// the same one in earlier tiles; in earlier warps of this tile; in earlier lanes. A warp moves a stretch of
// its tile, 32 positions at a time. Lanes with the same digit find each other by __match_any_sync; their
// order in the warp is their order in the output, which makes the sort stable.
//   keys, order (M): tokens and where they stood, NULL: in order
__global__ void __launch_bounds__(SORT_DIGITS)
sort_move_kernel(int* keys_out, int* order_out, const int* keys, const int* order, const int* count,
                 int shift, size_t tile, size_t M) {
    enum { WARPS = SORT_DIGITS / WARP };
    __shared__ int place[WARPS][SORT_DIGITS], warp_total[WARPS];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, *own = place[warp];
    size_t first = blockIdx.x * tile + tile / WARPS * warp, last = first + tile / WARPS;
    if (last > M) last = M;
    for (int d = lane; d < SORT_DIGITS; d += WARP) own[d] = 0;
    __syncwarp();
    for (size_t m = first + lane; m < last; m += WARP)
        atomicAdd(&own[keys[m] >> shift & (SORT_DIGITS - 1)], 1);
    // one thread per digit from here ...
    int total = 0, start = 0;
    #pragma unroll 16
    for (unsigned t = 0; t < gridDim.x; t++) {
        int c = count[t * SORT_DIGITS + threadIdx.x];
        total += c;
        start += t < blockIdx.x ? c : 0;
    }
    int sum = total;                                         // of this digit and the lanes before it
    #pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        int below = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += below;
    }
    if (lane == WARP - 1) warp_total[warp] = sum;
    __syncthreads();
    start += sum - total;
    for (int w = 0; w < warp; w++) start += warp_total[w];
    #pragma unroll
    for (int w = 0; w < WARPS; w++) {
        int c = place[w][threadIdx.x];
        place[w][threadIdx.x] = start;
        start += c;
    }
    __syncthreads();                                         // ... to here
    for (size_t m0 = first; m0 < last; m0 += WARP) {
        size_t m = m0 + lane;
        int key = m < last ? keys[m] : 0, digit = m < last ? key >> shift & (SORT_DIGITS - 1) : -1;
        unsigned same = __match_any_sync(0xffffffffu, digit);
        int before = __popc(same & ((1u << lane) - 1)), to = m < last ? own[digit] + before : 0;
        __syncwarp();
        if (m < last && before == 0) own[digit] += __popc(same);
        __syncwarp();
        if (m < last) {
            keys_out[to] = key;
            order_out[to] = order ? order[m] : (int)m;
        }
    }
}

// embedding_sort: *keys, *order (M): the tokens in ascending order and where each stood, in scratch
size_t embedding_sort_scratch_cuda(size_t M) {
    size_t tile = sort_tile(M);
    return 4 * M + (M + tile - 1) / tile * SORT_DIGITS;
}

void embedding_sort_cuda(const int** keys, const int** order, const int* tokens, int* scratch, size_t M,
                         size_t Vp, cudaStream_t stream) {
    size_t tile = sort_tile(M);
    unsigned tiles = (unsigned)((M + tile - 1) / tile);
    int *to[2] = {scratch, scratch + 2 * M}, *count = scratch + 4 * M;
    *keys = tokens;
    *order = NULL;
    for (int shift = 0, k = 0; shift == 0 || (shift < 31 && (Vp - 1) >> shift); shift += SORT_BITS, k ^= 1) {
        sort_count_kernel<<<tiles, SORT_DIGITS, 0, stream>>>(count, *keys, shift, tile, M);
        cudaCheck(cudaGetLastError());
        sort_move_kernel<<<tiles, SORT_DIGITS, 0, stream>>>(to[k], to[k] + M, *keys, *order, count, shift,
                                                            tile, M);
        cudaCheck(cudaGetLastError());
        *keys = to[k];
        *order = to[k] + M;
    }
}

// embedding_backward: dweight[v,:] += sum of dres[m,:] over the positions m with tokens[m] = v
//   keys, order (M): the tokens in sorted order and where they stood; dres (M,D) float
// Frequent tokens have long runs, so the sorted positions are cut into pieces of EMBED_PIECE, one block each;
// a thread sums W neighbouring columns. A run inside one piece goes to dweight. The part of a run that began
// in an earlier piece goes to parts[piece,0], the beginning of a run that goes on to parts[piece,1]; the
// second kernel puts those together.   parts (pieces,2,D)
// bytes: 4 per element of dres, 8 D per distinct token
template <int W>
__global__ void embedding_backward_kernel(float* dweight, float* parts, const float* dres, const int* keys,
                                          const int* order, size_t M, size_t D) {
    size_t p0 = (size_t)blockIdx.x * EMBED_PIECE;
    int token[EMBED_PIECE + 2];                              // with the position before and the one behind
    #pragma unroll
    for (int i = 0; i < EMBED_PIECE + 2; i++) token[i] = p0 + i > 0 && p0 + i <= M ? keys[p0 + i - 1] : -1;
    for (size_t d = threadIdx.x * W; d < D; d += blockDim.x * W) {
        Pack<float, W> rows[EMBED_PIECE], old[EMBED_PIECE];  // all loads first
        #pragma unroll
        for (int i = 0; i < EMBED_PIECE; i++) {
            if (p0 + i >= M) break;
            rows[i] = load_pack<W>(dres + (size_t)order[p0 + i] * D + d);
            if (token[i + 1] != token[i + 2]) old[i] = load_pack<W>(dweight + (size_t)token[i + 1] * D + d);
        }
        float acc[W] = {0};
        bool earlier = token[0] == token[1];                 // the run at hand began in an earlier piece
        #pragma unroll
        for (int i = 0; i < EMBED_PIECE; i++) {
            if (p0 + i >= M) break;
            #pragma unroll
            for (int j = 0; j < W; j++) acc[j] += rows[i].v[j];
            bool more = token[i + 1] == token[i + 2];
            if (more && i + 1 < EMBED_PIECE) continue;
            float* to = earlier ? parts + 2 * (size_t)blockIdx.x * D + d
                        : more  ? parts + (2 * (size_t)blockIdx.x + 1) * D + d
                                : dweight + (size_t)token[i + 1] * D + d;
            #pragma unroll
            for (int j = 0; j < W; j++) acc[j] += earlier || more ? 0.0f : old[i].v[j];
            store_pack<W>(to, acc);
            #pragma unroll
            for (int j = 0; j < W; j++) acc[j] = 0;
            earlier = false;
        }
    }
}

// One block per piece; it acts when a run begins in the piece and goes on behind it. The parts are loaded
// AHEAD at a time, before it is known where the run ends.
template <int W>
__global__ void embedding_backward_parts_kernel(float* dweight, const float* parts, const int* keys, size_t M,
                                                size_t D) {
    enum { AHEAD = 16 };
    size_t piece = blockIdx.x, p0 = piece * EMBED_PIECE, p1 = p0 + EMBED_PIECE;
    if (p1 >= M || keys[p1] != keys[p1 - 1]) return;                         // no run goes on
    int token = keys[p1];
    if (p0 > 0 && keys[p0] == token && keys[p0 - 1] == token) return;        // it began earlier
    for (size_t d = threadIdx.x * W; d < D; d += blockDim.x * W) {
        Pack<float, W> acc = load_pack<W>(parts + (2 * piece + 1) * D + d);
        Pack<float, W> old = load_pack<W>(dweight + (size_t)token * D + d);
        bool more = true;
        for (size_t p = p1; more && p < M; p += AHEAD * EMBED_PIECE) {
            Pack<float, W> part[AHEAD];
            int key[AHEAD];
            #pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                size_t q = p + i * EMBED_PIECE;
                key[i] = q < M ? keys[q] : -1;
                if (q < M) part[i] = load_pack<W>(parts + 2 * (q / EMBED_PIECE) * D + d);
            }
            #pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                more = more && key[i] == token;
                #pragma unroll
                for (int j = 0; j < W; j++) acc.v[j] += more ? part[i].v[j] : 0.0f;
            }
        }
        #pragma unroll
        for (int j = 0; j < W; j++) acc.v[j] += old.v[j];
        store_pack<W>(dweight + (size_t)token * D + d, acc.v);
    }
}

// the scratch of embedding_backward_cuda, in ints
size_t embedding_backward_scratch_cuda(size_t M, size_t D) {
    return (M + EMBED_PIECE - 1) / EMBED_PIECE * 2 * D + embedding_sort_scratch_cuda(M);
}

void embedding_backward_cuda(float* dweight, const float* dres, const int* tokens, int* scratch,
                                    size_t M, size_t D, size_t Vp, cudaStream_t stream) {
    unsigned pieces = (unsigned)((M + EMBED_PIECE - 1) / EMBED_PIECE);
    float* parts = (float*)scratch;                          // (pieces,2,D)
    const int *keys, *order;
    embedding_sort_cuda(&keys, &order, tokens, scratch + (size_t)pieces * 2 * D, M, Vp, stream);
    if (is_aligned(dweight, 16, D * 4) && is_aligned(dres, 16, D * 4) && is_aligned(scratch, 16, 16)) {
        unsigned threads = (unsigned)(D < 1024 ? (D / 4 + WARP - 1) / WARP * WARP : 256);
        embedding_backward_kernel<4><<<pieces, threads, 0, stream>>>(dweight, parts, dres, keys, order, M, D);
        cudaCheck(cudaGetLastError());
        embedding_backward_parts_kernel<4><<<pieces, threads, 0, stream>>>(dweight, parts, keys, M, D);
    } else {
        embedding_backward_kernel<1><<<pieces, 256, 0, stream>>>(dweight, parts, dres, keys, order, M, D);
        cudaCheck(cudaGetLastError());
        embedding_backward_parts_kernel<1><<<pieces, 256, 0, stream>>>(dweight, parts, keys, M, D);
    }
    cudaCheck(cudaGetLastError());
}

// --------------------------------------------------------------------------------------------------
// 4.3 RMSNorm, with the residual addition

// rstd_of: the factor of a row of n numbers with this sum of squares; NaN where it is infinite, as on the CPU
__device__ __forceinline__ float rstd_of(float sum, float n, float eps) {
    float r = 1.0f / sqrtf(sum / n + eps);
    return r == 0 ? NAN : r;
}

// residual_rmsnorm_forward: what the block before adds to the residual stream, and the norm of the sum.
//   res_out = res_in + dropout(delta)     rstd = (mean_d res_out^2 + eps)^(-1/2)
//   y = weight * res_out * rstd
//   res_in, res_out (M,D) float, may be the same   delta (M,D) or NULL: nothing is added, and res_out is only
//   written when it is neither NULL nor res_in   y (M,D)   weight (D)   saved for backward: res_out, rstd (M)
// WARPS warps hold one row in registers, ITERS packs of 4 values per thread; a block is 4 warps. DROP: with
// dropout, an instance of its own because the other one must not pay for it.
// bytes: 8 + 2 sizeof(X) per element
template <typename X, int WARPS, int ITERS, bool DROP>
__global__ void __launch_bounds__(128)
residual_rmsnorm_forward_kernel(float* res_out, X* y, float* rstd, const float* res_in, const X* delta,
                                const float* weight, size_t M, size_t D, float eps, DropoutCuda drop) {
    __shared__ float shared[2 * WARPS];
    const int group = WARPS * WARP;                          // threads per row
    size_t m = (size_t)blockIdx.x * (128 / group) + threadIdx.x / group;
    if (m >= M) return;                                      // with WARPS = 4 all threads have the same m
    int d0 = (int)(threadIdx.x % group) * 4, D_ = (int)D;
    const float* in_m = res_in + m * D;
    float x[ITERS][4];
    #pragma unroll
    for (int i = 0; i < ITERS; i++) {
        int d = d0 + i * group * 4;
        #pragma unroll
        for (int j = 0; j < 4; j++) x[i][j] = 0;
        if (d < D_) unpack<4>(x[i], load_pack<4>(in_m + d));
    }
    if (delta) {
        Pack<X, 4> add[ITERS];
        #pragma unroll
        for (int i = 0; i < ITERS; i++)
            if (d0 + i * group * 4 < D_) add[i] = load_pack<4>(delta + m * D + d0 + i * group * 4);
        uint64_t key = DROP ? dropout_key(drop) : 0;
        #pragma unroll
        for (int i = 0; i < ITERS; i++) {
            if (d0 + i * group * 4 >= D_) continue;
            float v[4];
            unpack<4>(v, add[i]);
            if (DROP) dropout_pack<4>(v, m * D + d0 + i * group * 4, key, drop);
            #pragma unroll
            for (int j = 0; j < 4; j++) x[i][j] += v[j];
        }
    }
    bool write = delta || (res_out && res_out != res_in);
    float sum = 0;
    #pragma unroll
    for (int i = 0; i < ITERS; i++) {
        int d = d0 + i * group * 4;
        if (d < D_ && write) store_pack<4>(res_out + m * D + d, x[i]);
        #pragma unroll
        for (int j = 0; j < 4; j++) sum += x[i][j] * x[i][j];
    }
    float r = rstd_of(group_sum<WARPS>(sum, shared, 0), (float)D_, eps);
    #pragma unroll
    for (int i = 0; i < ITERS; i++) {
        int d = d0 + i * group * 4;
        if (d >= D_) continue;
        float w[4];
        unpack<4>(w, load_pack<4>(weight + d));
        #pragma unroll
        for (int j = 0; j < 4; j++) w[j] *= x[i][j] * r;
        store_pack<4>(y + m * D + d, w);
    }
    if (threadIdx.x % group == 0) rstd[m] = r;
}

// any D, any alignment: a block per row, which is read twice
template <typename X>
__global__ void residual_rmsnorm_forward_general_kernel(float* res_out, X* y, float* rstd,
                                                        const float* res_in, const X* delta,
                                                        const float* weight, size_t D, float eps,
                                                        DropoutCuda drop) {
    __shared__ float shared[2 * 8];
    size_t row = (size_t)blockIdx.x * D;
    uint64_t key = drop.threshold ? dropout_key(drop) : 0;
    float sum = 0;
    for (size_t d = threadIdx.x; d < D; d += blockDim.x) {
        float add = delta ? to_float(delta[row + d]) : 0.0f;
        if (drop.threshold) dropout_pack<1>(&add, row + d, key, drop);
        float x = res_in[row + d] + add;
        if (delta || (res_out && res_out != res_in)) res_out[row + d] = x;
        sum += x * x;
    }
    float r = rstd_of(group_sum<8>(sum, shared, 0), (float)D, eps);
    const float* x = delta ? res_out : res_in;
    for (size_t d = threadIdx.x; d < D; d += blockDim.x)
        y[row + d] = from_float<X>(weight[d] * x[row + d] * r);
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}

template <typename X>
const char* residual_rmsnorm_forward_cuda(float* res_out, X* y, float* rstd, const float* res_in,
                                          const X* delta, const float* weight, size_t M, size_t D, float eps,
                                          cudaStream_t stream, DropoutCuda drop = DropoutCuda()) {
    bool packs = is_aligned(res_out, 16, D * 4) && is_aligned(res_in, 16, D * 4) &&
                 is_aligned(weight, 16, 16) &&
                 is_aligned(y, 4 * sizeof(X), D * sizeof(X)) &&
                 is_aligned(delta, 4 * sizeof(X), D * sizeof(X));
    const char* name = "residual_rmsnorm_forward_kernel";
    unsigned warp_rows = (unsigned)((M + 3) / 4), rows = (unsigned)M;
    bool mask = drop.threshold && delta;
    #define NORM_FORWARD(warps, iters, blocks)                            \
        (mask ? residual_rmsnorm_forward_kernel<X, warps, iters, true>    \
              : residual_rmsnorm_forward_kernel<X, warps, iters, false>)  \
            <<<blocks, 128, 0, stream>>>(res_out, y, rstd, res_in, delta, weight, M, D, eps, drop)
    if (packs && D <= 256) NORM_FORWARD(1, 2, warp_rows);
    else if (packs && D <= 512) NORM_FORWARD(1, 4, warp_rows);
    else if (packs && D <= 768) NORM_FORWARD(1, 6, warp_rows);
    else if (packs && D <= 1024) NORM_FORWARD(1, 8, warp_rows);
    else if (packs && D <= 2048) NORM_FORWARD(4, 4, rows);
    else if (packs && D <= 4096) NORM_FORWARD(4, 8, rows);
    else {
        residual_rmsnorm_forward_general_kernel<<<rows, 256, 0, stream>>>(res_out, y, rstd, res_in, delta,
                                                                          weight, D, eps, drop);
        name = "residual_rmsnorm_forward_general_kernel";
    }
    #undef NORM_FORWARD
    cudaCheck(cudaGetLastError());
    return name;
}

// rmsnorm_backward, with xhat = res * rstd and q = weight * dy:
//   forward y = weight * xhat       =>  dweight += sum_m dy * xhat
//   forward xhat = res * rstd(res)  =>  dres    += rstd * (q - xhat * mean_d(q * xhat))
//   dres (M,D) float: on entry the gradient of res_out, which the residual passes on; on exit that of res_in
//   dres_x (M,D): the gradient of delta in X, for the matmuls, which is dropout(dres); NULL: there is no
//   delta, res_in is the embedding, and its dropout is applied to dres itself
//   u (M,D): the y of forward once more, the same bits; NULL: not wanted
//   dy (M,D)   res (M,D): res_out of forward
// The rows are dealt out to NORM_BLOCKS blocks. A thread always meets the same columns and so sums dweight in
// registers; parts (NORM_BLOCKS,D) takes the sums of the blocks.   bytes: 12 + 2 sizeof(X) per element
enum { NORM_BLOCKS = 528 };

template <typename X, int WARPS, int ITERS, bool DROP>
__global__ void __launch_bounds__(128, ITERS <= 6 ? 4 : 2)
rmsnorm_backward_kernel(float* dres, X* dres_x, X* u, float* parts, const X* dy, const float* res,
                        const float* weight, const float* rstd, size_t M, size_t D, DropoutCuda drop) {
    uint64_t key = DROP ? dropout_key(drop) : 0;
    const int group = WARPS * WARP, groups = 128 / group;
    __shared__ float shared[2 * WARPS];
    __shared__ float dw_shared[WARPS == 1 ? groups : 1][WARPS == 1 ? ITERS * group * 4 : 1];
    int d0 = (int)(threadIdx.x % group) * 4, D_ = (int)D, phase = 0;
    float dw[ITERS][4] = {{0}};
    for (size_t m = (size_t)blockIdx.x * groups + threadIdx.x / group; m < M;
         m += (size_t)gridDim.x * groups) {
        Pack<X, 4> dy_m[ITERS];
        Pack<float, 4> x[ITERS], dx[ITERS];
        #pragma unroll
        for (int i = 0; i < ITERS; i++) {
            int d = d0 + i * group * 4;
            if (d >= D_) continue;
            dy_m[i] = load_pack<4>(dy + m * D + d);
            x[i] = load_pack<4>(res + m * D + d);
            dx[i] = load_pack<4>(dres + m * D + d);
        }
        float r = rstd[m], dot = 0;
        #pragma unroll
        for (int i = 0; i < ITERS; i++) {
            if (d0 + i * group * 4 >= D_) continue;
            Pack<float, 4> w = load_pack<4>(weight + d0 + i * group * 4);
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                float g = to_float(dy_m[i].v[j]) * x[i].v[j];
                dot += w.v[j] * g;
                dw[i][j] += g * r;
            }
        }
        float mean = group_sum<WARPS>(dot, shared, phase) * r / (float)D_;
        phase ^= 1;
        #pragma unroll
        for (int i = 0; i < ITERS; i++) {
            int d = d0 + i * group * 4;
            if (d >= D_) continue;
            Pack<float, 4> w = load_pack<4>(weight + d);
            #pragma unroll
            for (int j = 0; j < 4; j++)
                dx[i].v[j] += r * (w.v[j] * to_float(dy_m[i].v[j]) - x[i].v[j] * r * mean);
            if (dres_x) store_pack<4>(dres + m * D + d, dx[i].v);
            if (DROP) dropout_pack<4>(dx[i].v, m * D + d, key, drop);
            if (dres_x) store_pack<4>(dres_x + m * D + d, dx[i].v);
            else store_pack<4>(dres + m * D + d, dx[i].v);
            if (!u) continue;
            #pragma unroll
            for (int j = 0; j < 4; j++) w.v[j] *= x[i].v[j] * r;
            store_pack<4>(u + m * D + d, w.v);
        }
    }
    float* part = parts + (size_t)blockIdx.x * D;
    #pragma unroll
    for (int i = 0; i < ITERS; i++) {
        int d = d0 + i * group * 4;
        if (WARPS == 1) store_pack<4>(&dw_shared[threadIdx.x / group][d], dw[i]);
        else if (d < D_) store_pack<4>(part + d, dw[i]);
    }
    if (WARPS > 1) return;
    __syncthreads();
    for (int d = (int)threadIdx.x; d < D_; d += 128) {       // the warps of the block, in order
        float sum = 0;
        for (int g = 0; g < groups; g++) sum += dw_shared[g % (WARPS == 1 ? groups : 1)][d];
        part[d] = sum;
    }
}

// any D, any alignment: a block per row, dweight summed in `parts` itself, each column by the same thread
template <typename X>
__global__ void rmsnorm_backward_general_kernel(float* dres, X* dres_x, X* u, float* parts, const X* dy,
                                                const float* res, const float* weight, const float* rstd,
                                                size_t M, size_t D, DropoutCuda drop) {
    __shared__ float shared[2 * 8];
    uint64_t key = drop.threshold ? dropout_key(drop) : 0;
    float* part = parts + (size_t)blockIdx.x * D;
    int phase = 0;
    for (size_t d = threadIdx.x; d < D; d += blockDim.x) part[d] = 0;
    for (size_t m = blockIdx.x; m < M; m += gridDim.x) {
        float r = rstd[m], dot = 0;
        for (size_t d = threadIdx.x; d < D; d += blockDim.x) {
            float g = to_float(dy[m * D + d]) * res[m * D + d];
            dot += weight[d] * g;
            part[d] += g * r;
        }
        float mean = group_sum<8>(dot, shared, phase) * r / (float)D;
        phase ^= 1;
        for (size_t d = threadIdx.x; d < D; d += blockDim.x) {
            float q = weight[d] * to_float(dy[m * D + d]);
            float dx = dres[m * D + d] + r * (q - res[m * D + d] * r * mean);
            if (dres_x) dres[m * D + d] = dx;
            if (drop.threshold) dropout_pack<1>(&dx, m * D + d, key, drop);
            if (dres_x) dres_x[m * D + d] = from_float<X>(dx);
            else dres[m * D + d] = dx;
            if (u) u[m * D + d] = from_float<X>(weight[d] * res[m * D + d] * r);
        }
    }
}

// the scratch of rmsnorm_backward_cuda, in floats
size_t rmsnorm_backward_scratch_cuda(size_t M, size_t D) {
    return (M < NORM_BLOCKS ? M : (size_t)NORM_BLOCKS) * D;
}

template <typename X>
const char* rmsnorm_backward_cuda(float* dres, X* dres_x, X* u, float* dweight, const X* dy,
                                  const float* res, const float* weight, const float* rstd, float* scratch,
                                  size_t M, size_t D, cudaStream_t stream, DropoutCuda drop = DropoutCuda(),
                                  SumList* later = NULL) {
    bool packs = is_aligned(dres, 16, D * 4) && is_aligned(res, 16, D * 4) && is_aligned(weight, 16, 16) &&
                 is_aligned(scratch, 16, 16) && is_aligned(dy, 4 * sizeof(X), D * sizeof(X)) &&
                 is_aligned(dres_x, 4 * sizeof(X), D * sizeof(X)) &&
                 is_aligned(u, 4 * sizeof(X), D * sizeof(X));
    const char* name = "rmsnorm_backward_kernel";
    size_t blocks = M < NORM_BLOCKS ? M : (size_t)NORM_BLOCKS;
    size_t warp_blocks = (M + 3) / 4 < NORM_BLOCKS ? (M + 3) / 4 : (size_t)NORM_BLOCKS;
    if (packs && D <= 768) blocks = warp_blocks;
    bool mask = drop.threshold > 0;
    #define NORM_BACKWARD(warps, iters)                                                                    \
        (mask ? rmsnorm_backward_kernel<X, warps, iters, true>                                             \
              : rmsnorm_backward_kernel<X, warps, iters, false>)                                           \
            <<<(unsigned)blocks, 128, 0, stream>>>(dres, dres_x, u, scratch, dy, res, weight, rstd, M, D,  \
                                                   drop)
    if (packs && D <= 256) NORM_BACKWARD(1, 2);
    else if (packs && D <= 512) NORM_BACKWARD(1, 4);
    else if (packs && D <= 768) NORM_BACKWARD(1, 6);
    else if (packs && D <= 1024) NORM_BACKWARD(4, 2);
    else if (packs && D <= 1536) NORM_BACKWARD(4, 3);
    else if (packs && D <= 2048) NORM_BACKWARD(4, 4);
    else if (packs && D <= 2560) NORM_BACKWARD(4, 5);
    else if (packs && D <= 4096) NORM_BACKWARD(4, 8);
    else {
        rmsnorm_backward_general_kernel<<<(unsigned)blocks, 256, 0, stream>>>(
            dres, dres_x, u, scratch, dy, res, weight, rstd, M, D, drop);
        name = "rmsnorm_backward_general_kernel";
    }
    #undef NORM_BACKWARD
    cudaCheck(cudaGetLastError());
    sum_parts_cuda(dweight, NULL, scratch, blocks, D, 0, D, stream, later);
    return name;
}

// --------------------------------------------------------------------------------------------------
// 4.4 Causal convolution, with SiLU or without

// A thread owns W neighbouring channels and a run of up to `steps` tokens of one sequence. It walks through
// the run with the inputs of the last TAPS tokens in registers (the window), so that each is loaded once and
// not K times; only the few inputs before a run are loaded by two threads. A block is 32 threads along the
// channels times CONV_ROWS runs; blockIdx is (channels, runs, sequence).
// The tokens go in groups of TAPS: while one is computed, the next are on their way into shared memory (the
// ring). Nearly all groups are plain: whole, of the run, of one document. In the others the tokens are taken
// one by one, and everything is asked for each.
// A document begins where the id differs from that of the token before; before the start it is 0. There the
// window is cleared, so that no tap sees another document.
// TAPS = K = 4 is the fast path. The general path has W = 1 and TAPS = 8; its first TAPS-K taps have the
// weight 0.
enum { CONV_ROWS = 4, CONV_THREADS = WARP * CONV_ROWS };
enum { CONV_FORWARD_RING = 3, CONV_BACKWARD_RING = 2 };        // groups
enum { CONV_FORWARD_STEPS = 32, CONV_BACKWARD_STEPS = 128 };   // the longest runs

// ConvGroup: the tokens of a group, each thread with a column of its own. A pack is one word: four bf16 that
// wait as separate numbers would be loaded as separate numbers, and take a register each.
template <typename X, int W> struct ConvWord { typedef uint2 T; };
template <typename X> struct ConvWord<X, 1> { typedef X T; };
template <typename X, int W, int TAPS> struct ConvGroup {
    typename ConvWord<X, W>::T word[TAPS][CONV_THREADS];
};

// conv_copy: starts the copies of the first `count` tokens of a group. Packs below 4 bytes, in the general
// path, cannot be copied that way and go through a register.
template <typename X, int W, int TAPS>
__device__ __forceinline__ void conv_copy(ConvGroup<X, W, TAPS>& group, const X* p, size_t ld, int count) {
    auto* to = &group.word[0][threadIdx.y * WARP + threadIdx.x];
    auto copy = [=](int i) {
        if constexpr (W == 1 && sizeof(X) < 4) to[i * CONV_THREADS] = p[i * ld];
        else copy_async<(int)sizeof(X) * W>(to + i * CONV_THREADS, p + i * ld);
    };
    if (count >= TAPS) {
        #pragma unroll
        for (int i = 0; i < TAPS; i++) copy(i);
    } else {
        #pragma unroll 1
        for (int i = 0; i < count; i++) copy(i);
    }
}

template <typename X, int W, int TAPS>
__device__ __forceinline__ void conv_unpack(float* v, const ConvGroup<X, W, TAPS>& group, int i) {
    typename ConvWord<X, W>::T word = group.word[i][threadIdx.y * WARP + threadIdx.x];
    Pack<X, W> pack;
    memcpy((void*)&pack, &word, sizeof pack);
    unpack<W>(v, pack);
}

template <int W, typename X> __device__ __forceinline__ void conv_store(X* p, const float* v) {
    if constexpr (W == 1) {
        *p = from_float<X>(v[0]);
    } else {
        Pack<X, W> pack;
        #pragma unroll
        for (int j = 0; j < W; j++) pack.v[j] = from_float<X>(v[j]);
        uint2 word;
        memcpy(&word, &pack, sizeof word);
        asm volatile("st.global.v2.b32 [%0], {%1, %2};" :: "l"(p), "r"(word.x), "r"(word.y) : "memory");
    }
}

// the weights of the channels of a thread, and the inputs of the last TAPS tokens, the newest last
template <int W, int TAPS> struct ConvWindow { float w[TAPS][W], bias[W], x[TAPS][W]; };

// conv_window: the window before the first token: the tail, K-1 tokens, or NULL: zeros
template <int W, int TAPS>
__device__ __forceinline__ void conv_window(ConvWindow<W, TAPS>& win, const float* weight, const float* bias,
                                            const float* tail, size_t E, int K, size_t e) {
    #pragma unroll
    for (int j = 0; j < W; j++) {
        Pack<float, 4> w_e;
        if (TAPS == 4) w_e = load_pack<4>(weight + (e + j) * 4);
        #pragma unroll
        for (int k = 0; k < TAPS; k++) {
            int tap = k - (TAPS - K);
            win.w[k][j] = TAPS == 4 ? w_e.v[k % 4] : tap >= 0 ? weight[(e + j) * K + tap] : 0.0f;
            win.x[k][j] = tail && k < TAPS - 1 && tap >= 0 ? tail[(size_t)tap * E + j] : 0.0f;
        }
        win.bias[j] = bias ? bias[e + j] : 0.0f;
    }
}

// conv_shift: one token further: the oldest row leaves, the newest is free
template <int W, int TAPS> __device__ __forceinline__ void conv_shift(float (&x)[TAPS][W]) {
    #pragma unroll
    for (int k = 0; k < TAPS; k++) {
        #pragma unroll
        for (int j = 0; j < W; j++) x[k][j] = k < TAPS - 1 ? x[(k + 1) % TAPS][j] : 0.0f;
    }
}

template <int W, int TAPS> __device__ __forceinline__ void conv_clear(float (&x)[TAPS][W]) {
    #pragma unroll
    for (int k = 0; k < TAPS; k++) {
        #pragma unroll
        for (int j = 0; j < W; j++) x[k][j] = 0;
    }
}

// c = bias + sum_k w_k x_k
template <int W, int TAPS>
__device__ __forceinline__ void conv_sum(float* c, const ConvWindow<W, TAPS>& win) {
    #pragma unroll
    for (int j = 0; j < W; j++) c[j] = win.bias[j];
    #pragma unroll
    for (int k = 0; k < TAPS; k++) {
        #pragma unroll
        for (int j = 0; j < W; j++) c[j] += win.w[k][j] * win.x[k][j];
    }
}

// conv_begins: bit j of begins[g]: a document begins at token j of group g, which is token t + g TAPS + j of
// the sequence.   Called by whole warps
typedef unsigned char ConvBegins[CONV_BACKWARD_STEPS / 4 + 2];

template <int TAPS>
__device__ __forceinline__ void conv_begins(ConvBegins begins, const int* doc_b, int t, int end) {
    for (int g = (int)threadIdx.x; t + g * TAPS < end; g += WARP) {
        int bits = 0;
        for (int j = 0; j < TAPS; j++) {
            int s = t + g * TAPS + j;
            if (s >= 0 && s < end) bits |= (doc_b[s] != (s == 0 ? 0 : doc_b[s - 1])) << j;
        }
        begins[g] = (unsigned char)bits;
    }
    __syncwarp();
}

template <bool SILU, int W, int TAPS, typename X>
__device__ __forceinline__ void conv_forward_token(X* out, const ConvWindow<W, TAPS>& win) {
    float c[W];
    conv_sum(c, win);
    #pragma unroll
    for (int j = 0; j < W; j++) c[j] = SILU ? silu_cuda(c[j]) : c[j];
    conv_store<W>(out, c);
}

// causal_conv1d_forward:   c_t[e] = bias[e] + sum_k weight[e,k] * inp_{t-K+1+k}[e]      out = silu(c)
//   SILU = false: out = c (attention)
//   inp (B,T,E), row stride ldi   weight (E,K)   bias (E) or NULL   tail0 (B,K-1,E) float or NULL
//   out (B,T,E)
//   a tap sees nothing where the document differs from that of t; saved for backward: nothing
// bytes: 2 sizeof(X) per element
template <typename X, int W, int TAPS, bool SILU>
__global__ void __launch_bounds__(CONV_THREADS, 6)
causal_conv1d_forward_kernel(X* out, const X* inp, size_t ldi, const float* tail0, const float* weight,
                             const float* bias, const int* doc, int T, size_t E, int K, int steps) {
    __shared__ ConvGroup<X, W, TAPS> ring[CONV_FORWARD_RING];
    __shared__ ConvBegins begins[CONV_ROWS];
    size_t b = blockIdx.z, e = ((size_t)blockIdx.x * WARP + threadIdx.x) * W;
    int t0 = (int)(blockIdx.y * CONV_ROWS + threadIdx.y) * steps, own = T - t0 < steps ? T - t0 : steps;
    if (doc) conv_begins<TAPS>(begins[threadIdx.y], doc + b * T, t0 - TAPS, t0 + own);
    if (own <= 0 || e >= E) return;
    int i = t0 > 0 ? -TAPS : 0;                  // the group: tokens t0+i ...; the first one fills the window
    inp += (b * T + t0 + i) * ldi + e;
    out += (b * T + t0 + i) * E + e;
    for (int n = 0; n < CONV_FORWARD_RING; n++) {
        conv_copy(ring[n], inp, ldi, own - i - n * TAPS);
        copy_async_commit();
        inp += TAPS * ldi;
    }
    ConvWindow<W, TAPS> win;
    conv_window(win, weight, bias, tail0 && t0 == 0 ? tail0 + b * (K - 1) * E + e : NULL, E, K, e);
    for (int slot = 0; i < own; i += TAPS) {
        copy_async_wait(CONV_FORWARD_RING - 1);
        int bits = doc ? begins[threadIdx.y][i / TAPS + 1] : 0;
        if (bits == 0 && i >= 0 && i + TAPS <= own) {
            #pragma unroll
            for (int j = 0; j < TAPS; j++) {
                conv_unpack(win.x[TAPS - 1], ring[slot], j);
                conv_forward_token<SILU, W>(out + j * E, win);
                conv_shift(win.x);
            }
        } else {
            #pragma unroll 1
            for (int j = 0; j < TAPS && i + j < own; j++) {
                if (bits >> j & 1) conv_clear(win.x);
                conv_unpack(win.x[TAPS - 1], ring[slot], j);
                if (i >= 0) conv_forward_token<SILU, W>(out + j * E, win);
                conv_shift(win.x);
            }
        }
        conv_copy(ring[slot], inp, ldi, own - i - CONV_FORWARD_RING * TAPS);
        copy_async_commit();
        slot = slot + 1 < CONV_FORWARD_RING ? slot + 1 : 0;
        inp += TAPS * ldi;
        out += TAPS * E;
    }
}

// conv_tail: the last K-1 inputs, 0 where they are of another document than the last token. tailT may be
// tail0: a thread reads an entry before it overwrites it, oldest first.
template <typename X>
__global__ void causal_conv1d_tail_kernel(float* tailT, const X* inp, size_t ldi, const float* tail0,
                                          const int* doc, size_t B, size_t T, size_t E, int K) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= B * E) return;
    size_t b = i / E, e = i % E;
    int last = doc ? doc[b * T + T - 1] : 0;
    for (int k = 0; k + 1 < K; k++) {
        ptrdiff_t s = (ptrdiff_t)T - K + 1 + k, row = (ptrdiff_t)(b * T) + s;
        float v = 0;
        if (s >= 0 && (!doc || doc[row] == last)) v = to_float(inp[row * (ptrdiff_t)ldi + (ptrdiff_t)e]);
        if (s < 0 && tail0 && last == 0) v = tail0[(b * (size_t)(K - 1) + (size_t)(s + K - 1)) * E + e];
        tailT[(b * (size_t)(K - 1) + (size_t)k) * E + e] = v;
    }
}

// conv_steps: the length of a run. Long runs repeat less work at their borders, but there must be enough of
// them for the whole chip: at least 1536 warps of 128 channels (384 blocks), down to 16 tokens each.
int conv_steps(size_t B, size_t T, size_t E, int longest) {
    size_t tiles = (E + 127) / 128, steps = (size_t)longest;
    while (steps > 16 && B * ((T + steps - 1) / steps) * tiles < 1536) steps /= 2;
    return (int)steps;
}

// the grid, with W channels per thread
dim3 conv_grid(size_t B, size_t T, size_t E, int steps, size_t W) {
    size_t block = (size_t)steps * CONV_ROWS;
    return dim3((unsigned)((E + WARP * W - 1) / (WARP * W)), (unsigned)((T + block - 1) / block),
                (unsigned)B);
}

template <typename X>
const char* causal_conv1d_forward_cuda(X* out, float* tailT, const X* inp, size_t ldi, const float* tail0,
                                       const float* weight, const float* bias, bool silu, const int* doc,
                                       size_t B, size_t T, size_t E, size_t K, cudaStream_t stream) {
    const int W = 8 / sizeof(X), steps = conv_steps(B, T, E, CONV_FORWARD_STEPS);
    bool fast = K == 4 && is_aligned(inp, 8, ldi * sizeof(X)) && is_aligned(out, 8, E * sizeof(X)) &&
                is_aligned(weight, 16, 16);
    dim3 grid = conv_grid(B, T, E, steps, fast ? W : 1), block(WARP, CONV_ROWS);
    auto kernel = fast ? silu ? causal_conv1d_forward_kernel<X, W, 4, true>
                              : causal_conv1d_forward_kernel<X, W, 4, false>
                       : silu ? causal_conv1d_forward_kernel<X, 1, 8, true>
                              : causal_conv1d_forward_kernel<X, 1, 8, false>;
    kernel<<<grid, block, 0, stream>>>(out, inp, ldi, tail0, weight, bias, doc, (int)T, E, (int)K, steps);
    cudaCheck(cudaGetLastError());
    if (tailT && K > 1) {
        causal_conv1d_tail_kernel<<<(unsigned)((B * E + 255) / 256), 256, 0, stream>>>(tailT, inp, ldi, tail0,
                                                                                       doc, B, T, E, (int)K);
        cudaCheck(cudaGetLastError());
    }
    return fast ? "causal_conv1d_forward_kernel<4>" : "causal_conv1d_forward_kernel<8>";
}

// The backward walks the same way; c is computed again.
//   forward: out = silu(c)                         =>  dc = dout * silu'(c);  without SiLU dc = dout
//   forward: c_t = bias + sum_k w_k inp_{t-K+1+k}  =>  dbias += sum_t dc_t,  dw_k += sum_t dc_t inp_{t-K+1+k}
//                                                      dinp_s = sum_k w_k dc_{s+K-1-k}
//   forward: tailT = the last inputs               =>  the same rows of dinp (or dtail0) += dtailT
// dinp of the last TAPS tokens is under way in registers; the oldest is complete after each token. So the
// rows of a thread are TAPS-1 behind its tokens. It begins TAPS tokens before its run, for dinp only: their
// weight gradients belong to another thread.
template <int W, int TAPS> struct ConvGradient { float dinp[TAPS][W], dw[TAPS][W], db[W]; };

// the newest token of the window, whose dout is in d; OWN: with its weight gradient
template <bool OWN, bool SILU, int W, int TAPS>
__device__ __forceinline__ void conv_backward_token(ConvGradient<W, TAPS>& grad,
                                                    const ConvWindow<W, TAPS>& win, float* d) {
    float c[W];
    if (SILU) conv_sum(c, win);
    #pragma unroll
    for (int j = 0; j < W; j++) {
        if (SILU) d[j] *= silu_grad_cuda(c[j], sigmoid_cuda(c[j]));
        if (OWN) grad.db[j] += d[j];
    }
    #pragma unroll
    for (int k = 0; k < TAPS; k++) {
        #pragma unroll
        for (int j = 0; j < W; j++) {
            grad.dinp[k][j] += win.w[k][j] * d[j];
            if (OWN) grad.dw[k][j] += win.x[k][j] * d[j];
        }
    }
}

// a plain group, or (not OWN) the one before the run
template <bool OWN, bool SILU, typename X, int W, int TAPS>
__device__ __forceinline__ void conv_backward_group(X* dinp, size_t lddi, ConvGradient<W, TAPS>& grad,
                                                    ConvWindow<W, TAPS>& win,
                                                    const ConvGroup<X, W, TAPS>& inp,
                                                    const ConvGroup<X, W, TAPS>& dout) {
    #pragma unroll
    for (int j = 0; j < TAPS; j++) {
        float d[W];
        conv_unpack(win.x[TAPS - 1], inp, j);
        conv_unpack(d, dout, j);
        conv_backward_token<OWN, SILU>(grad, win, d);
        if (OWN) conv_store<W>(dinp + j * lddi, grad.dinp[0]);
        conv_shift(grad.dinp);
        conv_shift(win.x);
    }
}

// where the gradients of inputs go, at the channels of the thread: dinp from the first token of the run on,
// which is token t0 of the sequence; dtail0 of the sequence, or NULL
template <typename X> struct ConvRows {
    X* dinp;
    size_t lddi;
    float* dtail0;
    bool has_tail0;          // in the forward; otherwise dtail0 is 0
    int t0;
};

// conv_put: row s of dinp, counted from t0; before the start of the sequence it belongs to dtail0
template <int W, typename X>
__device__ __forceinline__ void conv_put(const ConvRows<X>& rows, const float* v, int s, size_t E, int K) {
    int before = -(rows.t0 + s);
    if (before <= 0) {
        conv_store<W>(rows.dinp + (ptrdiff_t)s * (ptrdiff_t)rows.lddi, v);
    } else if (rows.dtail0 && before < K) {
        #pragma unroll
        for (int j = 0; j < W; j++)
            rows.dtail0[(size_t)(K - 1 - before) * E + j] = rows.has_tail0 ? v[j] : 0.0f;
    }
}

// causal_conv1d_backward
//   dinp (B,T,E), row stride lddi, written   dtail0, dtailT (B,K-1,E) float or NULL; dtail0 is written
//   parts (blocks,K+1,E): the sums of a block for dweight in the order (E,K), then those for dbias (E)
// bytes: 3 sizeof(X) per element
template <typename X, int W, int TAPS, bool SILU>
__global__ void __launch_bounds__(CONV_THREADS, 3)
causal_conv1d_backward_kernel(X* dinp, size_t lddi, float* dtail0, float* parts, const X* dout,
                              const float* dtailT, const X* inp, size_t ldi, const float* tail0,
                              const float* weight, const float* bias, const int* doc, int T, size_t E, int K,
                              int steps) {
    __shared__ union {
        ConvGroup<X, W, TAPS> ring[CONV_BACKWARD_RING][2];                  // inp, dout
        float sums[CONV_ROWS][TAPS + 1][WARP * W];
    } shared;
    __shared__ ConvBegins begins[CONV_ROWS];
    size_t b = blockIdx.z, e = ((size_t)blockIdx.x * WARP + threadIdx.x) * W, tail = b * (K - 1) * E + e;
    int t0 = (int)(blockIdx.y * CONV_ROWS + threadIdx.y) * steps, own = T - t0 < steps ? T - t0 : steps;
    ConvGradient<W, TAPS> grad = {};
    if (doc) conv_begins<TAPS>(begins[threadIdx.y], doc + b * T, t0 - 2 * TAPS, t0 + own);
    if (own > 0 && e < E) {
        ConvRows<X> rows = {dinp + (b * T + t0) * lddi + e, lddi, dtail0 ? dtail0 + tail : NULL,
                            tail0 != NULL, t0};
        int i = t0 > 0 ? -2 * TAPS : 0;          // the group; the first one fills the window
        inp += (b * T + t0 + i) * ldi + e;
        dout += (b * T + t0 + i) * E + e;
        dinp = rows.dinp + (ptrdiff_t)(i - (TAPS - 1)) * (ptrdiff_t)lddi;
        for (int n = 0; n < CONV_BACKWARD_RING; n++) {
            conv_copy(shared.ring[n][0], inp, ldi, own - i - n * TAPS);
            conv_copy(shared.ring[n][1], dout, E, i + n * TAPS < -TAPS ? 0 : own - i - n * TAPS);
            copy_async_commit();
            inp += TAPS * ldi;
            dout += TAPS * E;
        }
        ConvWindow<W, TAPS> win;
        conv_window(win, weight, bias, tail0 && t0 == 0 ? tail0 + tail : NULL, E, K, e);
        int first = 1 - TAPS;                    // the first row of this thread and document
        int plain = t0 > 0 ? 0 : 1;              // from this token on, all rows are of this document
        for (int slot = 0; i < own; i += TAPS) {
            copy_async_wait(CONV_BACKWARD_RING - 1);
            const ConvGroup<X, W, TAPS>&x = shared.ring[slot][0], &d = shared.ring[slot][1];
            int bits = doc ? begins[threadIdx.y][i / TAPS + 2] : 0;
            if (bits == 0 && i >= plain && i + TAPS <= own) {
                conv_backward_group<true, SILU>(dinp, lddi, grad, win, x, d);
            } else if (bits == 0 && i == -TAPS) {
                conv_backward_group<false, SILU>(dinp, lddi, grad, win, x, d);
            } else {
                #pragma unroll 1
                for (int j = 0; j < TAPS && i + j < own; j++) {
                    int t = i + j;
                    if (bits >> j & 1) {         // the rows that are under way are complete
                        #pragma unroll
                        for (int k = 0; k < TAPS - 1; k++)
                            if (t - (TAPS - 1) + k >= first)
                                conv_put<W>(rows, grad.dinp[k], t - (TAPS - 1) + k, E, K);
                        first = t > 1 - TAPS ? t : 1 - TAPS;
                        plain = first + TAPS - 1;
                        conv_clear(grad.dinp);
                        conv_clear(win.x);
                    }
                    conv_unpack(win.x[TAPS - 1], x, j);
                    if (t >= -TAPS) {
                        float d_t[W];
                        conv_unpack(d_t, d, j);
                        if (t >= 0) conv_backward_token<true, SILU>(grad, win, d_t);
                        else conv_backward_token<false, SILU>(grad, win, d_t);
                        if (t - (TAPS - 1) >= first) conv_put<W>(rows, grad.dinp[0], t - (TAPS - 1), E, K);
                        conv_shift(grad.dinp);
                    }
                    conv_shift(win.x);
                }
            }
            int left = own - i - CONV_BACKWARD_RING * TAPS;
            conv_copy(shared.ring[slot][0], inp, ldi, left);
            conv_copy(shared.ring[slot][1], dout, E, left);
            copy_async_commit();
            slot = slot + 1 < CONV_BACKWARD_RING ? slot + 1 : 0;
            inp += TAPS * ldi;
            dout += TAPS * E;
            dinp += TAPS * lddi;
        }
        for (int k = 0; k < TAPS - 1 && t0 + own == T; k++) {      // the end of the sequence
            int s = own - (TAPS - 1) + k, row = k - (TAPS - K);    // of dinp, of dtailT
            if (s >= first) {
                #pragma unroll
                for (int j = 0; j < W; j++)
                    if (dtailT && row >= 0) grad.dinp[0][j] += dtailT[tail + (size_t)row * E + j];
                conv_put<W>(rows, grad.dinp[0], s, E, K);
            }
            conv_shift(grad.dinp);
        }
    }
    __syncthreads();                             // the sums of the block, k = TAPS: the bias
    #pragma unroll
    for (int k = 0; k <= TAPS; k++) {
        #pragma unroll
        for (int j = 0; j < W; j++)
            shared.sums[threadIdx.y][k][threadIdx.x * W + j] = k < TAPS ? grad.dw[k % TAPS][j] : grad.db[j];
    }
    __syncthreads();
    float* part = parts + ((size_t)blockIdx.z * gridDim.y + blockIdx.y) * (size_t)(K + 1) * E;
    for (int i = (int)(threadIdx.y * WARP + threadIdx.x); i < (TAPS + 1) * WARP * W; i += CONV_THREADS) {
        int k = i / (WARP * W), j = i % (WARP * W), tap = k - (TAPS - K);
        size_t e_j = (size_t)blockIdx.x * WARP * W + j;
        if (tap < 0 || e_j >= E) continue;
        float sum = 0;
        #pragma unroll
        for (int r = 0; r < CONV_ROWS; r++) sum += shared.sums[r][k][j];
        part[k < TAPS ? e_j * K + tap : (size_t)K * E + e_j] = sum;
    }
}

// the scratch of causal_conv1d_backward_cuda, in floats
size_t causal_conv1d_scratch_cuda(size_t B, size_t T, size_t E, size_t K) {
    return B * conv_grid(B, T, E, conv_steps(B, T, E, CONV_BACKWARD_STEPS), 1).y * (K + 1) * E;
}

template <typename X>
const char* causal_conv1d_backward_cuda(X* dinp, size_t lddi, float* dweight, float* dbias, float* dtail0,
                                        const X* dout, const float* dtailT, const X* inp, size_t ldi,
                                        const float* tail0, const float* weight, const float* bias, bool silu,
                                        const int* doc, float* scratch, size_t B, size_t T, size_t E,
                                        size_t K, cudaStream_t stream, SumList* later = NULL) {
    const int W = 8 / sizeof(X), steps = conv_steps(B, T, E, CONV_BACKWARD_STEPS);
    bool fast = K == 4 && is_aligned(inp, 8, ldi * sizeof(X)) && is_aligned(dinp, 8, lddi * sizeof(X)) &&
                is_aligned(dout, 8, E * sizeof(X)) && is_aligned(weight, 16, 16);
    dim3 grid = conv_grid(B, T, E, steps, fast ? W : 1), block(WARP, CONV_ROWS);
    auto kernel = fast ? silu ? causal_conv1d_backward_kernel<X, W, 4, true>
                              : causal_conv1d_backward_kernel<X, W, 4, false>
                       : silu ? causal_conv1d_backward_kernel<X, 1, 8, true>
                              : causal_conv1d_backward_kernel<X, 1, 8, false>;
    kernel<<<grid, block, 0, stream>>>(dinp, lddi, dtail0, scratch, dout, dtailT, inp, ldi, tail0, weight,
                                       bias, doc, (int)T, E, (int)K, steps);
    cudaCheck(cudaGetLastError());
    sum_parts_cuda(dweight, dbias, scratch, B * grid.y, K * E, dbias ? E : 0, (K + 1) * E, stream, later);
    return fast ? "causal_conv1d_backward_kernel<4>" : "causal_conv1d_backward_kernel<8>";
}

// --------------------------------------------------------------------------------------------------
// 4.5 Gate of the MLP, sums for biases

// gate_forward: out = y * silu(z).   out, y, z (M,E) with row strides ldo, ldy, ldz
// A block per token, whose threads go through the packs of its row.   bytes: 3 sizeof(X) per element
template <typename X, int W>
__global__ void gate_forward_kernel(X* out, size_t ldo, const X* y, size_t ldy, const X* z, size_t ldz,
                                    size_t E) {
    size_t m = blockIdx.x;
    for (size_t e = threadIdx.x * W; e < E; e += blockDim.x * W) {
        Pack<X, W> y_m = load_pack<W>(y + m * ldy + e), z_m = load_pack<W>(z + m * ldz + e);
        float v[W];
        #pragma unroll
        for (int j = 0; j < W; j++) v[j] = to_float(y_m.v[j]) * silu_cuda(to_float(z_m.v[j]));
        store_pack<W>(out + m * ldo + e, v);
    }
}

// out = y * silu(z)  =>  dy = dout * silu(z)     dz = dout * y * silu'(z)
// gate_out, unless NULL, receives the output of the forward again, which the next weight gradient needs.
// bytes: 5 sizeof(X) per element, 6 with gate_out
template <typename X, int W>
__global__ void gate_backward_kernel(X* dy, size_t lddy, X* dz, size_t lddz, X* gate_out, size_t ldo,
                                     const X* dout, size_t lddo, const X* y, size_t ldy, const X* z,
                                     size_t ldz, size_t E) {
    size_t m = blockIdx.x;
    for (size_t e = threadIdx.x * W; e < E; e += blockDim.x * W) {
        Pack<X, W> dout_m = load_pack<W>(dout + m * lddo + e), y_m = load_pack<W>(y + m * ldy + e),
                   z_m = load_pack<W>(z + m * ldz + e);
        float dy_v[W], dz_v[W], out_v[W];
        #pragma unroll
        for (int j = 0; j < W; j++) {
            float d = to_float(dout_m.v[j]), y_j = to_float(y_m.v[j]), z_j = to_float(z_m.v[j]);
            float sigma = sigmoid_cuda(z_j);
            dy_v[j] = d * z_j * sigma;
            dz_v[j] = d * y_j * silu_grad_cuda(z_j, sigma);
            out_v[j] = y_j * z_j * sigma;
        }
        store_pack<W>(dy + m * lddy + e, dy_v);
        store_pack<W>(dz + m * lddz + e, dz_v);
        if (gate_out) store_pack<W>(gate_out + m * ldo + e, out_v);
    }
}

template <typename X>
const char* gate_forward_cuda(X* out, size_t ldo, const X* y, size_t ldy, const X* z, size_t ldz, size_t M,
                              size_t E, cudaStream_t stream) {
    const int W = 16 / sizeof(X);
    bool packs = E % W == 0 && is_aligned(out, 16, ldo * sizeof(X)) && is_aligned(y, 16, ldy * sizeof(X)) &&
                 is_aligned(z, 16, ldz * sizeof(X));
    auto kernel = packs ? gate_forward_kernel<X, W> : gate_forward_kernel<X, 1>;
    kernel<<<(unsigned)M, 256, 0, stream>>>(out, ldo, y, ldy, z, ldz, E);
    cudaCheck(cudaGetLastError());
    return packs ? "gate_forward_kernel" : "gate_forward_kernel<1>";
}

template <typename X>
const char* gate_backward_cuda(X* dy, size_t lddy, X* dz, size_t lddz, X* gate_out, size_t ldo, const X* dout,
                               size_t lddo, const X* y, size_t ldy, const X* z, size_t ldz, size_t M,
                               size_t E, cudaStream_t stream) {
    const int W = 16 / sizeof(X);
    bool packs = E % W == 0 && is_aligned(dy, 16, lddy * sizeof(X)) && is_aligned(dz, 16, lddz * sizeof(X)) &&
                 is_aligned(gate_out, 16, ldo * sizeof(X)) && is_aligned(dout, 16, lddo * sizeof(X)) &&
                 is_aligned(y, 16, ldy * sizeof(X)) && is_aligned(z, 16, ldz * sizeof(X));
    auto kernel = packs ? gate_backward_kernel<X, W> : gate_backward_kernel<X, 1>;
    kernel<<<(unsigned)M, 256, 0, stream>>>(dy, lddy, dz, lddz, gate_out, ldo, dout, lddo, y, ldy, z, ldz, E);
    cudaCheck(cudaGetLastError());
    return packs ? "gate_backward_kernel" : "gate_backward_kernel<1>";
}

// bias_backward: dbias[o] += sum_m dout[m,o].   dout (M,O), row stride ldo   parts (M / BIAS_ROWS, O)
// A block sums 32 columns over BIAS_ROWS tokens, its 8 warps every 8th token each.
enum { BIAS_ROWS = 128, BIAS_WARPS = 8 };

template <typename X>
__global__ void bias_backward_kernel(float* parts, const X* dout, size_t ldo, size_t M, size_t O) {
    __shared__ float sum[BIAS_WARPS][WARP];
    size_t o = (size_t)blockIdx.y * WARP + threadIdx.x, m0 = (size_t)blockIdx.x * BIAS_ROWS;
    float acc = 0;
    #pragma unroll
    for (size_t m = m0 + threadIdx.y; m < m0 + BIAS_ROWS; m += BIAS_WARPS)
        acc += m < M && o < O ? to_float(dout[m * ldo + o]) : 0.0f;
    sum[threadIdx.y][threadIdx.x] = acc;
    __syncthreads();
    if (threadIdx.y > 0 || o >= O) return;
    acc = 0;
    for (int w = 0; w < BIAS_WARPS; w++) acc += sum[w][threadIdx.x];
    parts[blockIdx.x * O + o] = acc;
}

// the scratch of bias_backward_cuda, in floats
size_t bias_backward_scratch_cuda(size_t M, size_t O) { return (M + BIAS_ROWS - 1) / BIAS_ROWS * O; }

template <typename X>
void bias_backward_cuda(float* dbias, const X* dout, size_t ldo, size_t M, size_t O, float* scratch,
                        cudaStream_t stream, SumList* later) {
    size_t rows = (M + BIAS_ROWS - 1) / BIAS_ROWS;
    bias_backward_kernel<<<dim3((unsigned)rows, (unsigned)((O + WARP - 1) / WARP)), dim3(WARP, BIAS_WARPS), 0,
                           stream>>>(scratch, dout, ldo, M, O);
    cudaCheck(cudaGetLastError());
    sum_parts_cuda(dbias, NULL, scratch, rows, O, 0, O, stream, later);
}

// --------------------------------------------------------------------------------------------------
// 4.6 Classifier: loss and gradient

// crossentropy: one block per token.
//   losses[m] = logsumexp_v(logits[m,v]) - logits[m,target]    dlogits = *scale * (softmax - onehot(target))
//   logits (M,V)   targets (M), a negative one is ignored (loss 0, gradient 0)   losses (M) float
//   dlogits (M,V) is written; it may be logits, or NULL   scale: one float in device memory
// One pass finds the maximum and the sum of exponentials together: `max` is the largest so far, and `sum` is
// rescaled whenever it grows. The row has to be seen a second time for the gradient. It waits in shared
// memory (SHARED), where copy_async has put it. Rows that do not fit there are read a second time from the
// memory, or from the cache in between when they are still in it.
// bytes: 2 sizeof(X) per logit
enum { CLASSIFIER_THREADS = 512, CLASSIFIER_STAGES = 4 };

// the maximum and the sum of exponentials below it, of two sets together
__device__ __forceinline__ void softmax_merge(float* max, float* sum, float max2, float sum2) {
    float m = fmaxf(*max, max2);
    float scale = *max == m ? 1.0f : exp_cuda(*max - m), scale2 = max2 == m ? 1.0f : exp_cuda(max2 - m);
    *sum = *sum * scale + sum2 * scale2;
    *max = m;
}

template <typename X, int W, bool SHARED>
__global__ void __launch_bounds__(CLASSIFIER_THREADS)
crossentropy_kernel(float* losses, X* dlogits, const X* logits, const int* targets, const float* scale,
                    size_t V) {
    extern __shared__ __align__(16) char row_bytes[];
    __shared__ float part_max[CLASSIFIER_THREADS / WARP], part_sum[CLASSIFIER_THREADS / WARP];
    const int step = CLASSIFIER_THREADS * W;
    X* row = (X*)row_bytes;                                  // (V) when SHARED
    const X* z_m = logits + blockIdx.x * V;
    X* dz_m = dlogits ? dlogits + blockIdx.x * V : NULL;
    int v0 = (int)threadIdx.x * W, V_ = (int)V;
    int target = targets[blockIdx.x];
    if (target < 0) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0;
        float zero[W] = {0};
        for (int v = v0; dz_m && v < V_; v += step) store_pack<W>(dz_m + v, zero);
        return;
    }
    float z_target = to_float(z_m[target]);
    // the row in CLASSIFIER_STAGES pieces: all are under way at once, each is used as soon as it is there
    int piece = (V_ + step * CLASSIFIER_STAGES - 1) / (step * CLASSIFIER_STAGES) * step;
    for (int v_piece = v0; SHARED && v_piece < v0 + piece * CLASSIFIER_STAGES; v_piece += piece) {
        for (int v = v_piece; v < v_piece + piece && v < V_; v += step) copy_async<16>(row + v, z_m + v);
        copy_async_commit();
    }
    const X* source = SHARED ? row : z_m;
    float max = -INFINITY, sum = 0;
    #pragma unroll
    for (int stage = 0; stage < CLASSIFIER_STAGES; stage++) {
        if (SHARED) copy_async_wait(CLASSIFIER_STAGES - 1 - stage);
        #pragma unroll 4
        for (int v = v0 + stage * piece; v < v0 + (stage + 1) * piece && v < V_; v += step) {
            float z[W];
            unpack<W>(z, load_pack<W>(source + v));
            float top = z[0];
            #pragma unroll
            for (int j = 1; j < W; j++) top = fmaxf(top, z[j]);
            if (top > max) {
                sum *= exp_cuda(max - top);
                max = top;
            }
            #pragma unroll
            for (int j = 0; j < W; j++) sum += exp_cuda(z[j] - max);
        }
    }
    #pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2)
        softmax_merge(&max, &sum, __shfl_xor_sync(0xffffffffu, max, lanes),
                      __shfl_xor_sync(0xffffffffu, sum, lanes));
    if (threadIdx.x % WARP == 0) {
        part_max[threadIdx.x / WARP] = max;
        part_sum[threadIdx.x / WARP] = sum;
    }
    __syncthreads();                                       // also: z_target is read before it is overwritten
    max = part_max[0];
    sum = part_sum[0];
    #pragma unroll
    for (int w = 1; w < CLASSIFIER_THREADS / WARP; w++) softmax_merge(&max, &sum, part_max[w], part_sum[w]);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + max - z_target;
    if (!dz_m) return;
    float s = *scale, norm = s / sum;
    #pragma unroll 4
    for (int v = v0; v < V_; v += step) {
        float z[W];
        unpack<W>(z, load_pack<W>(source + v));
        #pragma unroll
        for (int j = 0; j < W; j++) z[j] = norm * exp_cuda(z[j] - max) - (v + j == target ? s : 0.0f);
        store_pack<W>(dz_m + v, z);
    }
}

// shared_memory_limit: what a block may have, in bytes (more than 48 KiB has to be asked for)
size_t shared_memory_limit(void) {
    int device, bytes;
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return (size_t)bytes;
}

template <typename X>
const char* crossentropy_cuda(float* losses, X* dlogits, const X* logits, const int* targets,
                              const float* scale, size_t M, size_t V, cudaStream_t stream) {
    const int W = 16 / sizeof(X);
    size_t row = V * sizeof(X);
    const char* name;
    if (is_aligned(logits, 16, row) && is_aligned(dlogits, 16, row)) {
        if (row + 1024 <= shared_memory_limit()) {
            cudaCheck(cudaFuncSetAttribute(crossentropy_kernel<X, W, true>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, (int)row));
            crossentropy_kernel<X, W, true><<<(unsigned)M, CLASSIFIER_THREADS, row, stream>>>(
                losses, dlogits, logits, targets, scale, V);
            name = "crossentropy_kernel<shared>";
        } else {
            crossentropy_kernel<X, W, false><<<(unsigned)M, CLASSIFIER_THREADS, 0, stream>>>(
                losses, dlogits, logits, targets, scale, V);
            name = "crossentropy_kernel";
        }
    } else {
        crossentropy_kernel<X, 1, false><<<(unsigned)M, CLASSIFIER_THREADS, 0, stream>>>(
            losses, dlogits, logits, targets, scale, V);
        name = "crossentropy_kernel<1>";
    }
    cudaCheck(cudaGetLastError());
    return name;
}

// --------------------------------------------------------------------------------------------------
// 4.9 Selective scan
//
// selective scan on the GPU: the Mamba-1 recurrence with softplus, skip and gate fused, for training.
//   forward:  (F4) dt = softplus(dt_raw + dt_bias)        (F5) a_t = exp(dt_t A), A = -exp(A_log)
//             (F6) h_t = a_t h_{t-1} + dt_t x_t Bt_t      (F7) s_t = <Ct_t, h_t> + Dskip x_t
//             (F8) y_t = s_t silu(z_t)                    a_t := 0 where a document begins
//   shapes:   x, dt_raw, s, y (B,T,E)   Bt, Ct (B,T,N), row stride ldbc   z (B,T,E), row stride ldz
//             A_log (E,N)   Dskip, dt_bias (E)   h0, hT (B,E,N)   doc (B,T)
//   saved:    s, and hs (B, T/spacing, E, N): the state before tokens 0, spacing, 2 spacing, ...; the rest is
//             recomputed. Spacing 8 is faster, 16 needs half the memory (backward 0.431 and 0.475 ms: H200,
//             B8 T2048 E1536, bf16, cold cache)
// Mamba paper (arXiv 2312.00752), section 3.2 and algorithm 2. Oracle: selective_scan_forward/_backward of
// train_mamba.c.
//
// Two pairs of kernels with the same meaning:
//   general   any N, E, T, strides, X = float or bf16, accurate to float rounding
//   fast      N = 16, E a multiple of 32, rows that start on 16-byte boundaries; the backward only for bf16
// selective_scan_path_cuda() says which one backward takes. In both, a block of threads owns
// neighbouring channels of one sequence and walks through time, so that the state never leaves the chip. No
// sum depends on the order in which threads happen to run: results repeat bitwise.

// SCAN_STEPS: tokens that the kernels treat at once, a chunk. SCAN_SPACING: tokens between two saved states
// that training normally uses; launchers take 8 or 16. SCAN_GROUP: states that a block's four warps hold.
enum { SCAN_CHANNELS = 32, SCAN_STEPS = 8, SCAN_SPACING = 8, SCAN_GROUP = 16, SCAN_THREADS = 128 };

#define SCAN_LOG2E 1.44269504f
#define SCAN_LN2 0.69314718f
// the dt that the decay sees where a document begins: exp2(SCAN_RESET * A2) is 0 for every A2 of scan_decay
#define SCAN_RESET 3e38f

static inline size_t scan_blocks_cuda(size_t E) { return (E + SCAN_CHANNELS - 1) / SCAN_CHANNELS; }
static inline size_t scan_padded_cuda(size_t T) { return (T + 31) / 32 * 32; }

// elements of X that forward saves in hs
size_t selective_scan_saved_cuda(size_t B, size_t T, size_t E, size_t N, int spacing) {
    return B * ((T + spacing - 1) / spacing) * E * N;
}

// Where the channels of all sequences are too few blocks to fill the chip, the fast backward cuts time into
// segments as well: as many as make SCAN_FILL blocks (three on each of the 132 processors of an H200), none
// shorter than SCAN_SEGMENT tokens. Every segment costs a second, cheaper look at its tokens. Its kernel has
// room for more blocks, so it cuts a segment into pieces, up to SCAN_PIECES, none shorter than two tiles.
// With 8 pieces the look takes 0.40 ms, not 0.58, all of backward 2.07, not 2.28 (H200, B2 T32768 E1536).
// Of 1 to 12 segments this is the fastest choice for 1, 2, 4 and 5 sequences (H200, T8192 E1536). For 3 it
// takes 0.95 ms where 8 segments take 0.82, for 6 1.67 where 4 take 1.55: they fill the chip several times.
enum { SCAN_FILL = 396, SCAN_SEGMENT = 128, SCAN_PIECES = 8 };
static inline size_t scan_segments_cuda(size_t B, size_t T, size_t E) {
    size_t tiles = scan_padded_cuda(T) / 32, segments = SCAN_FILL / (B * scan_blocks_cuda(E));
    if (segments > T / SCAN_SEGMENT) segments = T / SCAN_SEGMENT;
    if (segments < 2) return 1;
    size_t each = (tiles + segments - 1) / segments;           // tiles of all segments but the last
    return (tiles + each - 1) / each;
}
// pieces of a segment of `each` tiles
static inline size_t scan_pieces_cuda(size_t each) {
    size_t pieces = each / 2;
    if (pieces > SCAN_PIECES) return SCAN_PIECES;
    return pieces > 0 ? pieces : 1;
}

// floats of backward's scratch: dBt and dCt of every block; dA_log, dDskip, ddt_bias of every sequence and
// segment, and what a piece hands to the one before
size_t selective_scan_scratch_cuda(size_t B, size_t T, size_t E, size_t N) {
    size_t tiles = scan_padded_cuda(T) / 32, segments = scan_segments_cuda(B, T, E);
    size_t pieces = segments > 1 ? segments * scan_pieces_cuda((tiles + segments - 1) / segments) : 0;
    return scan_blocks_cuda(E) * B * scan_padded_cuda(T) * 2 * N +
           B * E * (segments * (N + 2) + pieces * (N + 1));
}

// --- small pieces -------------------------------------------------------------------------------------

// tanh x, like exp2_unit: one instruction of the special function unit (16 results per clock and SM)
__device__ __forceinline__ float scan_tanh(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <typename X> __device__ __forceinline__ void scan_store(X* p, float x) { *p = from_float<X>(x); }

// A2 = A log2(e), so that exp(dt A) = exp2(dt A2). Kept between -FLT_MAX (dt = 0 must give 0, not NaN) and
// -1e-30 (a reset must give 0; for any real dt the decay is 1 all the same).
__device__ __forceinline__ float scan_decay(float A_log) {
    return -fminf(fmaxf(expf(A_log) * SCAN_LOG2E, 1e-30f), FLT_MAX);
}

// softplus to float rounding; its derivative is 1 - exp(-softplus)
__device__ __forceinline__ float scan_softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// the state of token t-1 does not reach token t of sequence b when t begins another document
__device__ __forceinline__ bool scan_resets_cuda(const int* doc, size_t b, size_t t, size_t T) {
    return doc && doc[b * T + t] != (t == 0 ? 0 : doc[b * T + t - 1]);
}

// --- general path -------------------------------------------------------------------------------------
// A block has four warps (a warp is 32 threads, "lanes", that execute together). Lane l works on channel l of
// the block; warp w on states 4w..4w+3 of a group of 16; larger N take several groups one after the other,
// the states of the resting groups wait in shared memory (fast memory that the threads of a block share).
// Element-wise work is laid out differently: thread (w, l) has tokens w and w + 4 of channel l.

// ScanTile: what the time loops need of 8 tokens, in shared memory
struct ScanTile {
    float dt[SCAN_STEPS][SCAN_CHANNELS];          // dt_t; 0 beyond the last token: the state stays as it is
    float decay_dt[SCAN_STEPS][SCAN_CHANNELS];    // the same, SCAN_RESET where a document begins
    float dtx[SCAN_STEPS][SCAN_CHANNELS];         // dt_t x_t
    float g[SCAN_STEPS][SCAN_CHANNELS];           // backward: gradient of s_t
    float part[4][2][SCAN_STEPS][SCAN_CHANNELS];  // sums over the states of one warp: s_t
};

// scan_load_element: dt, decay_dt and dtx of one token and channel; returns x
template <typename X>
__device__ __forceinline__ float scan_load_element(ScanTile& tile, const X* x, const X* dt_raw, float bias,
                                                   const int* doc, int step, int lane, size_t b, size_t t,
                                                   size_t e, size_t T, size_t E) {
    float dt = 0.0f, x_t = 0.0f;
    bool inside = t < T && e < E;
    if (inside) {
        x_t = to_float(x[(b * T + t) * E + e]);
        dt = scan_softplus(to_float(dt_raw[(b * T + t) * E + e]) + bias);
    }
    tile.dt[step][lane] = dt;
    tile.decay_dt[step][lane] = inside && scan_resets_cuda(doc, b, t, T) ? SCAN_RESET : dt;
    tile.dtx[step][lane] = dt * x_t;
    return x_t;
}

// scan_load_bc: rows of Bt and Ct of 8 tokens as floats, bc[step][0 or 1][n], zero beyond N and T
template <typename X>
__device__ __forceinline__ void scan_load_bc(float* bc, const X* Bt, const X* Ct, size_t ldbc, size_t b,
                                             size_t t0, size_t T, size_t N, int padded) {
    for (int i = threadIdx.x; i < SCAN_STEPS * padded; i += SCAN_THREADS) {
        int step = i / padded, n = i % padded;
        bool inside = t0 + step < T && n < (int)N;
        size_t at = (b * T + t0 + step) * ldbc + n;
        bc[step * 2 * padded + n] = inside ? to_float(Bt[at]) : 0.0f;
        bc[step * 2 * padded + padded + n] = inside ? to_float(Ct[at]) : 0.0f;
    }
}

// selective_scan_forward_kernel: formulas (F4)..(F8) above; s, hs, hT, h0, doc may be NULL.
//   shared memory behind the tile: bc (8,2,Np), h (Np,32), A2 (Np,32), Np = N rounded up to 16
template <typename X>
__global__ void __launch_bounds__(SCAN_THREADS)
selective_scan_forward_kernel(X* y, X* s, X* hs, float* hT, const X* x, const X* dt_raw, const float* dt_bias,
                              const float* A_log, const X* Bt, const X* Ct, size_t ldbc, const float* Dskip,
                              const X* z, size_t ldz, const float* h0, const int* doc,
                              size_t T, size_t E, size_t N, int spacing) {
    extern __shared__ __align__(128) char shared[];
    ScanTile& tile = *(ScanTile*)shared;
    const int padded = (int)(N + SCAN_GROUP - 1) / SCAN_GROUP * SCAN_GROUP;
    float* bc = (float*)(&tile + 1);
    float (*h)[SCAN_CHANNELS] = (float (*)[SCAN_CHANNELS])(bc + SCAN_STEPS * 2 * padded);
    float (*A2)[SCAN_CHANNELS] = h + padded;
    const int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
    const size_t blocks = (E + SCAN_CHANNELS - 1) / SCAN_CHANNELS, chunks = (T + 7) / SCAN_STEPS;
    const size_t b = blockIdx.x / blocks, e = blockIdx.x % blocks * SCAN_CHANNELS + lane;
    const size_t every = spacing / SCAN_STEPS, states = (chunks + every - 1) / every;      // saved states
    const bool channel = e < E;
    const float bias = channel ? dt_bias[e] : 0.0f, D = channel ? Dskip[e] : 0.0f;
    for (int n = w; n < padded; n += 4) {
        bool inside = channel && n < (int)N;
        A2[n][lane] = inside ? scan_decay(A_log[e * N + n]) : -1.0f;
        h[n][lane] = inside && h0 ? h0[(b * E + e) * N + n] : 0.0f;
    }
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        size_t t0 = chunk * SCAN_STEPS;
        float x_t[2];
        #pragma unroll
        for (int k = 0; k < 2; k++)
            x_t[k] =
                scan_load_element(tile, x, dt_raw, bias, doc, w + 4 * k, lane, b, t0 + w + 4 * k, e, T, E);
        scan_load_bc(bc, Bt, Ct, ldbc, b, t0, T, N, padded);
        __syncthreads();  // all threads of the block have arrived: the tile is there
        float sum[SCAN_STEPS] = {0};
        for (int n0 = 4 * w; n0 < padded; n0 += SCAN_GROUP) {
            float state[4], decay[4];
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                state[k] = h[n0 + k][lane];
                decay[k] = A2[n0 + k][lane];
                if (hs && chunk % every == 0 && channel && n0 + k < (int)N)
                    scan_store(hs + ((b * states + chunk / every) * E + e) * N + n0 + k, state[k]);
            }
            #pragma unroll
            for (int j = 0; j < SCAN_STEPS; j++) {
                const float *B_t = bc + j * 2 * padded + n0, *C_t = B_t + padded;
                float dt = tile.decay_dt[j][lane], dtx = tile.dtx[j][lane];
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    state[k] = fmaf(exp2_unit(dt * decay[k]), state[k], dtx * B_t[k]);
                    sum[j] = fmaf(C_t[k], state[k], sum[j]);
                }
            }
            #pragma unroll
            for (int k = 0; k < 4; k++) h[n0 + k][lane] = state[k];
        }
        #pragma unroll
        for (int j = 0; j < SCAN_STEPS; j++) tile.part[w][0][j][lane] = sum[j];
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            int j = w + 4 * k;
            size_t row = b * T + t0 + j;
            if (!channel || t0 + j >= T) continue;
            float s_t = D * x_t[k];
            for (int i = 0; i < 4; i++) s_t += tile.part[i][0][j][lane];
            float z_t = to_float(z[row * ldz + e]);
            if (s) scan_store(s + row * E + e, s_t);
            scan_store(y + row * E + e, s_t * z_t / (1.0f + expf(-z_t)));
        }
    }
    __syncthreads();
    for (int n = w; hT && channel && n < (int)N; n += 4) hT[(b * E + e) * N + n] = h[n][lane];
}

// ScanBackwardTile: 16 tokens in shared memory
enum { SCAN_PAIR = 2 * SCAN_STEPS };
struct ScanBackwardTile {
    float dt[SCAN_PAIR][SCAN_CHANNELS], decay_dt[SCAN_PAIR][SCAN_CHANNELS];      // as in ScanTile
    float dtx[SCAN_PAIR][SCAN_CHANNELS], g[SCAN_PAIR][SCAN_CHANNELS];
    float part[4][2][SCAN_PAIR][SCAN_CHANNELS];               // <lambda, Bt>, <lambda, A2 m> of every warp
    float sum[4][16][36];                                      // scan_sum_channels of every warp
};

// scan_sum_channels: lanes 2i and 2i+1 return the sum of row[i] over all lanes, which have written
// row[i][lane]. Two lanes share a row; rows of 36 spread these accesses over the banks of shared memory.
__device__ __forceinline__ float scan_sum_channels(const float (*row)[36], int lane) {
    __syncwarp();                                              // all have written
    float sum[4];
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        float4 v = *(const float4*)&row[lane >> 1][16 * (lane & 1) + 4 * k];
        sum[k] = (v.x + v.y) + (v.z + v.w);
    }
    float half = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    __syncwarp();                                              // all have read: rows may be written again
    return half + __shfl_xor_sync(0xffffffffu, half, 1);
}

// selective_scan_backward_kernel: from the last 16 tokens to the first. The states of 8 tokens are recomputed
// from the saved one, then lambda = dLoss/dh_t runs backward; `carry` is what a token hands to the previous.
// If only every second chunk has a saved state, the way to the others leads through 8 tokens.
//   forward (F8) y = s silu(z)          (B2)  g = dy silu(z)          dz = dy s silu'(z)
//   forward (F7) s = <Ct, h> + D x      (B4)  lambda = g Ct + carry   (B5) dCt = sum_e g h
//                                       (B3)  dx = D g + ..           dDskip = sum g x
//   forward (F6) h = m + dt x Bt        (B6)  dBt = sum_e lambda dt x
//           with m = a h_{t-1}          (B7)  dx += dt q              q = <lambda, Bt>
//   forward (F5) m = exp(dt A) h_{t-1}  (B8)  ddt = x q + <lambda, A m>
//                                       (B9)  dA_log = A sum lambda dt m    carry = a lambda  (B14) dh0
//   forward (F4) dt = softplus(p)       (B10) dp = ddt (1 - exp(-dt))       ddt_bias = sum dp
// dBC_part (blocks, B, T, 2, N) and de_part (B, E, N + 2) hold the sums of this block: no other block adds to
// them, selective_scan_reduce_kernel does, in a fixed order.
//   shared memory behind the tile: bc (16,2,Np), carry, A2, dA (Np,32), Np = N rounded up to 16
template <typename X>
__global__ void __launch_bounds__(SCAN_THREADS, 3)
selective_scan_backward_kernel(X* dx, X* ddt_raw, X* dz, size_t lddz, X* y, float* dh0, float* dBC_part,
                               float* de_part, const X* dy, const float* dhT, const X* hs, const X* s,
                               const X* x, const X* dt_raw, const float* dt_bias, const float* A_log,
                               const X* Bt, const X* Ct, size_t ldbc, const float* Dskip, const X* z,
                               size_t ldz, const int* doc, size_t T, size_t E, size_t N, int spacing) {
    extern __shared__ __align__(128) char shared[];
    ScanBackwardTile& tile = *(ScanBackwardTile*)shared;
    const int padded = (int)(N + SCAN_GROUP - 1) / SCAN_GROUP * SCAN_GROUP;
    float* bc = (float*)(&tile + 1);
    float (*carry)[SCAN_CHANNELS] = (float (*)[SCAN_CHANNELS])(bc + SCAN_PAIR * 2 * padded);
    float (*A2)[SCAN_CHANNELS] = carry + padded;
    float (*dA)[SCAN_CHANNELS] = A2 + padded;
    const int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
    const size_t blocks = (E + SCAN_CHANNELS - 1) / SCAN_CHANNELS, b = blockIdx.x / blocks;
    const size_t e = blockIdx.x % blocks * SCAN_CHANNELS + lane, states = (T + spacing - 1) / spacing;
    const bool channel = e < E;
    const float bias = channel ? dt_bias[e] : 0.0f, D = channel ? Dskip[e] : 0.0f;
    float dD = 0.0f, dbias = 0.0f;
    dBC_part += (blockIdx.x % blocks * (gridDim.x / blocks) + b) * T * 2 * N;
    de_part += (b * E + e) * (N + 2);
    for (int n = w; n < padded; n += 4) {
        bool inside = channel && n < (int)N;
        A2[n][lane] = inside ? scan_decay(A_log[e * N + n]) : -1.0f;
        carry[n][lane] = inside && dhT ? dhT[(b * E + e) * N + n] : 0.0f;
        dA[n][lane] = 0.0f;
    }
    for (size_t pair = (T + SCAN_PAIR - 1) / SCAN_PAIR; pair-- > 0;) {
        const size_t t0 = pair * SCAN_PAIR;
        float x_t[4] = {0}, p[4] = {0}, z_t[4] = {0}, dy_t[4] = {0}, s_t[4] = {0};
        #pragma unroll
        for (int k = 0; k < 4; k++) {                          // all loads first: they are under way together
            size_t t = t0 + w + 4 * k, row = b * T + t;
            if (!channel || t >= T) continue;
            x_t[k] = to_float(x[row * E + e]);
            p[k] = to_float(dt_raw[row * E + e]);
            z_t[k] = to_float(z[row * ldz + e]);
            dy_t[k] = to_float(dy[row * E + e]);
            s_t[k] = to_float(s[row * E + e]);
        }
        scan_load_bc(bc, Bt, Ct, ldbc, b, t0, T, N, padded);
        scan_load_bc(bc + SCAN_STEPS * 2 * padded, Bt, Ct, ldbc, b, t0 + SCAN_STEPS, T, N, padded);
        #pragma unroll
        for (int k = 0; k < 4; k++) {  // undo the gate; y once more, for the next matmul's weight
            int j = w + 4 * k;
            size_t row = b * T + t0 + j;
            bool inside = channel && t0 + j < T;
            float dt = inside ? scan_softplus(p[k] + bias) : 0.0f;
            float sigma = 1.0f / (1.0f + expf(-z_t[k])), silu = z_t[k] * sigma;
            if (inside) {
                scan_store(dz + row * lddz + e, dy_t[k] * s_t[k] * (sigma + silu * (1.0f - sigma)));
                scan_store(y + row * E + e, s_t[k] * silu);
            }
            tile.dt[j][lane] = dt;
            tile.decay_dt[j][lane] = inside && scan_resets_cuda(doc, b, t0 + j, T) ? SCAN_RESET : dt;
            tile.dtx[j][lane] = dt * x_t[k];
            tile.g[j][lane] = dy_t[k] * silu;
        }
        __syncthreads();
        #pragma unroll 1
        for (int j0 = SCAN_STEPS; j0 >= 0; j0 -= SCAN_STEPS) {
            float q[SCAN_STEPS] = {0}, r[SCAN_STEPS] = {0};              // <lambda, Bt>, <lambda, A2 m>
            for (int n0 = 4 * w; n0 < padded; n0 += SCAN_GROUP) {
                float h[4], lambda[4], decay[4], dA_n[4], a[SCAN_STEPS][4], m[SCAN_STEPS][4];
                const size_t state = (t0 + j0) / spacing;
                // lanes 2i, 2i+1 get the sums over channels for state i % 4 of token i / 4 of 4 tokens
                const size_t t = t0 + j0 + (lane >> 3), n = (size_t)(n0 + (lane >> 1) % 4);
                const bool store = n < N && lane % 2 == 0;
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    bool inside = channel && n0 + k < (int)N && state < states;
                    h[k] = inside ? to_float(hs[((b * states + state) * E + e) * N + n0 + k]) : 0.0f;
                    lambda[k] = carry[n0 + k][lane];
                    decay[k] = A2[n0 + k][lane];
                    dA_n[k] = dA[n0 + k][lane];
                }
                // from the saved state to that before token j0
                for (int j = (int)(state * spacing - t0); j < j0; j++) {
                    const float* B_t = bc + j * 2 * padded + n0;
                    float dt = tile.decay_dt[j][lane], dtx = tile.dtx[j][lane];
                    #pragma unroll
                    for (int k = 0; k < 4; k++) h[k] = fmaf(exp2_unit(dt * decay[k]), h[k], dtx * B_t[k]);
                }
                #pragma unroll
                for (int j = 0; j < SCAN_STEPS; j++) {
                    const float* B_t = bc + (j0 + j) * 2 * padded + n0;
                    float dt = tile.decay_dt[j0 + j][lane], dtx = tile.dtx[j0 + j][lane];
                    float g = tile.g[j0 + j][lane];
                    #pragma unroll
                    for (int k = 0; k < 4; k++) {
                        a[j][k] = exp2_unit(dt * decay[k]);
                        m[j][k] = a[j][k] * h[k];
                        h[k] = fmaf(dtx, B_t[k], m[j][k]);
                        tile.sum[w][4 * (j % 4) + k][lane] = g * h[k];
                    }
                    if (j % 4 < 3) continue;
                    float dC = scan_sum_channels(tile.sum[w], lane);
                    if (store && t + j - 3 < T) dBC_part[((t + j - 3) * 2 + 1) * N + n] = dC;
                }
                #pragma unroll
                for (int j = SCAN_STEPS - 1; j >= 0; j--) {
                    const float *B_t = bc + (j0 + j) * 2 * padded + n0, *C_t = B_t + padded;
                    float dt = tile.dt[j0 + j][lane], dtx = tile.dtx[j0 + j][lane], g = tile.g[j0 + j][lane];
                    #pragma unroll
                    for (int k = 0; k < 4; k++) {
                        lambda[k] = fmaf(g, C_t[k], lambda[k]);
                        float lambda_m = lambda[k] * m[j][k];
                        tile.sum[w][4 * (j % 4) + k][lane] = lambda[k] * dtx;
                        q[j] = fmaf(lambda[k], B_t[k], q[j]);
                        r[j] = fmaf(lambda_m, decay[k], r[j]);
                        dA_n[k] = fmaf(lambda_m, dt, dA_n[k]);
                        lambda[k] *= a[j][k];
                    }
                    if (j % 4 > 0) continue;
                    float dB = scan_sum_channels(tile.sum[w], lane);
                    if (store && t + j < T) dBC_part[(t + j) * 2 * N + n] = dB;
                }
                #pragma unroll
                for (int k = 0; k < 4; k++) { carry[n0 + k][lane] = lambda[k]; dA[n0 + k][lane] = dA_n[k]; }
            }
            #pragma unroll
            for (int j = 0; j < SCAN_STEPS; j++) {
                tile.part[w][0][j0 + j][lane] = q[j];
                tile.part[w][1][j0 + j][lane] = r[j];
            }
        }
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            int j = w + 4 * k;
            size_t row = b * T + t0 + j;
            float dt = tile.dt[j][lane], g = tile.g[j][lane], q_t = 0.0f, r_t = 0.0f;
            if (!channel || t0 + j >= T) continue;
            for (int i = 0; i < 4; i++) { q_t += tile.part[i][0][j][lane]; r_t += tile.part[i][1][j][lane]; }
            float dp = fmaf(x_t[k], q_t, r_t * SCAN_LN2) * -expm1f(-dt);
            scan_store(dx + row * E + e, fmaf(dt, q_t, D * g));
            scan_store(ddt_raw + row * E + e, dp);
            dD = fmaf(g, x_t[k], dD);
            dbias += dp;
        }
    }
    __syncthreads();                                   // tile.part is read no more
    tile.part[w][0][0][lane] = dD;
    tile.part[w][1][0][lane] = dbias;
    __syncthreads();
    if (!channel) return;
    for (int n = w; n < (int)N; n += 4) {
        de_part[n] = dA[n][lane] * A2[n][lane] * SCAN_LN2;
        if (dh0) dh0[(b * E + e) * N + n] = carry[n][lane];
    }
    if (w < 2) {
        float sum = 0.0f;
        for (int i = 0; i < 4; i++) sum += tile.part[i][w][0][lane];
        de_part[N + w] = sum;
    }
}

// selective_scan_reduce_kernel: the second stage of every sum, one thread per result, in a fixed order:
// dBt, dCt over the blocks (written), dA_log, dDskip, ddt_bias over the sequences (added).
template <typename X>
__global__ void __launch_bounds__(256)
selective_scan_reduce_kernel(float* dA_log, float* dDskip, float* ddt_bias, X* dBt, X* dCt, size_t lddbc,
                             const float* dBC_part, const float* de_part, size_t blocks,
                             size_t B, size_t T, size_t E, size_t N) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x, count = B * T * 2 * N;
    float sum = 0.0f;
    if (i < count) {
        for (size_t k = 0; k < blocks; k++) sum += dBC_part[k * count + i];
        size_t row = i / (2 * N), n = i % (2 * N);
        scan_store(n < N ? dBt + row * lddbc + n : dCt + row * lddbc + n - N, sum);
        return;
    }
    i -= count;
    if (i >= E * (N + 2)) return;
    for (size_t b = 0; b < B; b++) sum += de_part[b * E * (N + 2) + i];
    size_t e = i / (N + 2), n = i % (N + 2);
    if (n < N) dA_log[e * N + n] += sum;
    else if (n == N) dDskip[e] += sum;
    else ddt_bias[e] += sum;
}

// --- fast path: pieces ----------------------------------------------------------------------------------
// bf16, N = 16. A tile is 32 tokens x 32 channels; element-wise work is done in vectors of 8 channels (16
// bytes): vector v of a tile is token v / 4, channels 8 (v % 4) .. +7, 128 vectors in all. Tokens beyond T
// are read as zeros, with dt = 0: they leave the state and its gradient alone, and nothing of them is stored.

enum { SCAN_TILE_STEPS = 32 };

// A pair of bf16 lives in one 32-bit register. bf16 is the upper half of a float: unpacking moves bits.
__device__ __forceinline__ uint32_t scan_pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ float scan_low(uint32_t v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float scan_high(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ void scan_unpack8(float* v, const void* p) {
    uint4 q = *(const uint4*)p;
    v[0] = scan_low(q.x); v[1] = scan_high(q.x); v[2] = scan_low(q.y); v[3] = scan_high(q.y);
    v[4] = scan_low(q.z); v[5] = scan_high(q.z); v[6] = scan_low(q.w); v[7] = scan_high(q.w);
}
__device__ __forceinline__ uint4 scan_pack8(const float* v) {
    return make_uint4(scan_pack(v[0], v[1]), scan_pack(v[2], v[3]), scan_pack(v[4], v[5]),
                      scan_pack(v[6], v[7]));
}
// 16 bytes in one store (the compiler may split a plain one)
__device__ __forceinline__ void scan_store16(void* p, uint4 v) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Asynchronous copies from global to shared memory: the thread does not wait for them, it asks later whether
// its groups of copies have arrived. `inside` false: zeros are written, nothing is read.
__device__ __forceinline__ void scan_copy16(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ __forceinline__ void scan_copy8(void* to, const void* from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(inside ? 8 : 0) : "memory");
}
__device__ __forceinline__ void scan_copy4(void* to, const void* from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(inside ? 4 : 0) : "memory");
}

// select without a branch: the compiler turns some of these conditions into jumps
__device__ __forceinline__ float scan_select(bool c, float yes, float no) {
    float r;
    asm("{ .reg .pred q; setp.ne.u32 q, %3, 0; selp.f32 %0, %1, %2, q; }"
        : "=f"(r) : "f"(yes), "f"(no), "r"((uint32_t)c));
    return r;
}

// ScanSpecial: replaces dt where a document begins (SCAN_RESET) and beyond the last token (0), by bits: a
// condition would make the compiler jump around the whole computation of dt
struct ScanSpecial {
    uint32_t keep, set;
    __device__ __forceinline__ ScanSpecial(bool inside, bool reset) {
        keep = inside && !reset ? 0xffffffffu : 0u;
        set = inside && reset ? __float_as_uint(SCAN_RESET) : 0u;
    }
    __device__ __forceinline__ float operator()(float dt) const {
        uint32_t r;                                            // (dt & keep) | set in one step
        asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(__float_as_uint(dt)), "r"(keep), "r"(set));
        return __uint_as_float(r);
    }
};

// softplus from x2 = x log2(e): max(x, 0) + log(1 + e^-|x|). The logarithm is a polynomial (relative error
// below 1e-5): the special function unit is what the scan waits for, and the polynomial stays exact where e^x
// is small and 1 + e^x would lose its digits.
__device__ __forceinline__ float scan_softplus_fast(float x2) {
    float e = exp2_unit(-fabsf(x2)), p = -0.0238691047f;
    p = fmaf(p, e, 0.101222165f);
    p = fmaf(p, e, -0.210048586f);
    p = fmaf(p, e, 0.325206637f);
    p = fmaf(p, e, -0.499361366f);
    p = fmaf(p, e, 0.999991596f);
    return fmaf(p, e, fmaxf(x2, 0.0f) * SCAN_LN2);
}

// --- fast path: forward ---------------------------------------------------------------------------------

// A signal (mbarrier): threads arrive at it, and when `count` have, its phase ends and the next one begins.
// scan_wait returns when the phase of the given parity (the first has 0, the next 1, then 0 ..) has ended;
// what the threads wrote before they arrived is then visible.
// One lane arrives for its warp, after a __syncwarp.
//
// -DSSM_SANITIZE is for compute-sanitizer. Its racecheck does not see through that: every lane arrives, and a
// group of warps that only has to say that it has come waits for the others; and it wants a barrier before a
// block ends to which others write (cluster_end). Its synccheck wants barriers that two groups reach at
// different places to be of the kind that expects nothing of a warp. And none of its tools sees what wgmma
// reads; mma.sync takes its place (SSD_WGMMA).
#ifdef SSM_SANITIZE
enum { SCAN_ARRIVALS = WARP };
#define SSD_BARRIER "barrier.sync"
#define SSD_ARRIVE "barrier.sync"
#else
enum { SCAN_ARRIVALS = 1 };
#define SSD_BARRIER "bar.sync"
#define SSD_ARRIVE "bar.arrive"
#endif
__device__ __forceinline__ void scan_signal_init(uint64_t* signal, int warps) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(signal)), "r"(warps * SCAN_ARRIVALS) : "memory");
}
__device__ __forceinline__ void scan_arrive_warp(uint64_t* signal) {
    __syncwarp();
    if (threadIdx.x % WARP < SCAN_ARRIVALS)
        asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }"
                     :: "r"((uint32_t)__cvta_generic_to_shared(signal)) : "memory");
}
#if __CUDA_ARCH__ >= 900
#define SCAN_TEST "mbarrier.try_wait"                          // sleeps a little before it says no
#else
#define SCAN_TEST "mbarrier.test_wait"
#endif
__device__ __forceinline__ void scan_wait(uint64_t* signal, int parity) {
    asm volatile("{ .reg .pred done; "
                 "again: " SCAN_TEST ".parity.shared.b64 done, [%0], %1; @!done bra again; }"
                 :: "r"((uint32_t)__cvta_generic_to_shared(signal)), "r"(parity) : "memory");
}

// 8 channels of one token: one copy, load or store of 16 bytes for bf16, two for float
template <typename X> __device__ __forceinline__ void scan_copy_row(X* to, const X* from, bool inside) {
    #pragma unroll
    for (int k = 0; k < 8; k += 16 / (int)sizeof(X)) scan_copy16(to + k, from + k, inside);
}
__device__ __forceinline__ void scan_load_row(float* v, const bf16* p) { scan_unpack8(v, p); }
__device__ __forceinline__ void scan_load_row(float* v, const float* p) {
    *(float4*)v = *(const float4*)p;
    *(float4*)(v + 4) = *(const float4*)(p + 4);
}
__device__ __forceinline__ void scan_store_row(bf16* p, const float* v) { scan_store16(p, scan_pack8(v)); }
__device__ __forceinline__ void scan_store_row(float* p, const float* v) {
    *(float4*)p = *(const float4*)v;
    *(float4*)(p + 4) = *(const float4*)(v + 4);
}

// scan_save: stores a thread's S states if `condition`, without a jump: the compiler starts no load before a
// jump that stands before it.
__device__ __forceinline__ void scan_store_if(bool condition, void* p, uint32_t v) {
    asm volatile("{ .reg .pred q; setp.ne.u32 q, %2, 0; @q st.global.b32 [%0], %1; }"
                 :: "l"(p), "r"(v), "r"((uint32_t)condition) : "memory");
}
__device__ __forceinline__ void scan_store_if(bool condition, void* p, uint32_t v0, uint32_t v1) {
    asm volatile("{ .reg .pred q; setp.ne.u32 q, %3, 0; @q st.global.v2.b32 [%0], {%1, %2}; }"
                 :: "l"(p), "r"(v0), "r"(v1), "r"((uint32_t)condition) : "memory");
}
template <int S> __device__ __forceinline__ void scan_save(bool condition, bf16* p, const float* h) {
    if (S == 4) scan_store_if(condition, p, scan_pack(h[0], h[1]), scan_pack(h[S - 2], h[S - 1]));
    else scan_store_if(condition, p, scan_pack(h[0], h[1]));
}
template <int S> __device__ __forceinline__ void scan_save(bool condition, float* p, const float* h) {
    #pragma unroll
    for (int n = 0; n < S; n += 2)
        scan_store_if(condition, p + n, __float_as_uint(h[n]), __float_as_uint(h[n + 1]));
}

// softplus(x + bias) and silu(z) as exact as X: bf16 needs no more than four digits. The bias comes
// multiplied by scan_bias_unit, which saves an instruction.
template <typename X> __device__ __forceinline__ float scan_bias_unit() {
    return sizeof(X) == 2 ? SCAN_LOG2E : 1.0f;
}
template <typename X> __device__ __forceinline__ float scan_dt(float x, float bias) {
    return sizeof(X) == 2 ? scan_softplus_fast(fmaf(x, SCAN_LOG2E, bias)) : scan_softplus(x + bias);
}
template <typename X> __device__ __forceinline__ float scan_silu(float z) {
    float half = 0.5f * z;                                     // silu(z) = z/2 (1 + tanh(z/2))
    return sizeof(X) == 2 ? fmaf(half, scan_tanh(half), half) : silu_cuda(z);
}

// ScanForwardShared: S: states per thread. A block has 8 S channels, 16 / S threads each, and TEAMS teams of
// element-wise warps.
// The 32 banks of shared memory serve different addresses at once only if these differ modulo 32 words; the
// odd lengths of rows and the exclusive-or in bc spread simultaneous accesses over the banks.
template <typename X, int S, int TEAMS> struct ScanForwardShared {
    enum { TOKENS = SCAN_TILE_STEPS, CHANNELS = 8 * S, HELPERS = TOKENS * CHANNELS / 8, GROUPS = 16 / S };
    enum { DT_ROW = 2 * TOKENS + 4, SUM_ROW = TOKENS + 4, GAP = 32 / S,
           SUM_GROUP = CHANNELS * SUM_ROW + CHANNELS / 8 * GAP + 16,
           THREADS = SCAN_THREADS + TEAMS * HELPERS };
    struct alignas(16) Team {
        struct {
            X dt_raw[TOKENS][CHANNELS], bc[TOKENS][32];
            int doc[2][HELPERS];                               // document of token t and of token t-1
        } raw[2];
        struct { X x[TOKENS][CHANNELS], z[TOKENS][CHANNELS]; } rows[4];        // needed until the end
        struct {
            float dt_dtx[CHANNELS * DT_ROW + CHANNELS / 8 * GAP];      // (dt, dt x) of a channel, see dt_at
            float bc[TOKENS][32];                              // bc[t][n ^ 4 (t % 8)]: Bt_t, then Ct_t
        } tile[2];
        float sum[GROUPS * SUM_GROUP];                         // C h, summed over S states, see sum_at
        uint64_t ready[2], scanned[2], stored;
    } team[TEAMS];
    static __device__ __forceinline__ int dt_at(int c) { return c * DT_ROW + c / 8 * GAP; }
    static __device__ __forceinline__ int sum_at(int g, int c) {
        return g * SUM_GROUP + c * SUM_ROW + c / 8 * GAP;
    }
};

// selective_scan_forward_fast_kernel: the general kernel's function. The first four warps run the recurrence,
// the others do everything element-wise, around it:
//   prepare tile i+1 (softplus, dt x) | load tile i+3 | store tile i (skip, gate) || time loop of tile i
// The two kinds of work fill each other's gaps, and no one waits for the whole block: `ready` says that a
// tile is prepared, `scanned` that its sums are there, `stored` that these have been read.
// Time loop: a thread owns states S g .. S g + S - 1 of one channel. Its sums over these states go to shared
// memory, the element-wise warps add the 16 / S of them. All that waits is taken off the time loop: with 18
// special function instructions per token and channel and the rest of its instructions it keeps both the
// special function unit and the instruction issue busy for two thirds of the time.
// S: 4 is the most efficient. 2 makes twice as many threads, for few channels and sequences.
// TEAMS: with S = 2, preparing and storing a tile takes longer than the time loop. Where a processor has
// several blocks they fill each other's gaps; a block that is alone has two teams of element-wise warps, each
// for every second tile (H200, B1 T32768 E1536: 0.64 ms, with one team 0.83).
template <typename X, int S, int TEAMS>
__global__ void __launch_bounds__(ScanForwardShared<X, S, TEAMS>::THREADS,
                                  TEAMS > 1 ? 1 : sizeof(X) == 2 ? 3 : 2)
selective_scan_forward_fast_kernel(X* y, X* s, X* hs, float* hT, const X* x, const X* dt_raw,
                                   const float* dt_bias, const float* A_log, const X* Bt, const X* Ct,
                                   size_t ldbc, const float* Dskip, const X* z, size_t ldz, const float* h0,
                                   const int* doc, size_t T, size_t E, int spacing) {
    extern __shared__ __align__(128) char shared[];
    typedef ScanForwardShared<X, S, TEAMS> Shared;
    enum { TOKENS = Shared::TOKENS, STEP = TEAMS * TOKENS, CHANNELS = Shared::CHANNELS,
           HELPERS = Shared::HELPERS };
    Shared& sh = *(Shared*)shared;
    const int lane = threadIdx.x % WARP, tiles = (int)((T + TOKENS - 1) / TOKENS);
    const size_t b = blockIdx.x / (E / CHANNELS), e0 = blockIdx.x % (E / CHANNELS) * CHANNELS;
    if (threadIdx.x == 0) {
        for (auto& team : sh.team) {
            for (int q = 0; q < 2; q++) {
                scan_signal_init(&team.ready[q], HELPERS / WARP);
                scan_signal_init(&team.scanned[q], SCAN_THREADS / WARP);
            }
            scan_signal_init(&team.stored, HELPERS / WARP);
        }
    }
    __syncthreads();

    // the number of the warp, taken from lane 0: so the compiler knows that a warp never divides here
    const int w = __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0);
    if (w < SCAN_THREADS / WARP) {   // ---- the recurrence
        // bits of the lane: g, c, c, g, then c (S = 4) or g (S = 2). Any four neighbouring lanes then touch
        // two channels and two state groups only, and a shared load with few distinct addresses takes half
        // the time.
        const int g = (lane & 1) | ((lane >> 2) & (S == 4 ? 2 : 6));
        const int ch = w * 2 * S + (((lane >> 1) & 3) | ((lane >> 2) & (S == 4 ? 4 : 0)));
        const size_t state = (b * E + e0 + ch) * 16 + S * g, states = (T + spacing - 1) / spacing;
        float decay[S], h[S];
        #pragma unroll
        for (int n = 0; n < S; n++) {
            decay[n] = scan_decay(A_log[(e0 + ch) * 16 + S * g + n]);
            h[n] = h0 ? h0[state + n] : 0.0f;
        }
        const size_t next = E * 16 * SCAN_STEPS / spacing;     // what 8 tokens mean in hs
        X* saved = hs + (b * states * E + e0 + ch) * 16 + S * g;
        int left = hs ? (int)T : 0;                            // tokens with states to save
        auto store_sums = [](float* to, const float* sum) {
            *(float4*)to = *(const float4*)sum;
            *(float4*)(to + 4) = *(const float4*)(sum + 4);
        };
        #pragma unroll 1
        for (int all = 0; all < tiles; all++) {
            auto& team = sh.team[all % TEAMS];
            const int i = all / TEAMS;                         // tile i of this team
            auto& tile = team.tile[i & 1];
            float* sums = &team.sum[sh.sum_at(g, ch)];
            scan_wait(&team.ready[i & 1], (i >> 1) & 1);
            const float *dt_dtx = &tile.dt_dtx[sh.dt_at(ch)], *bc[4];
            #pragma unroll
            for (int m = 0; m < 4; m++) bc[m] = &tile.bc[m][(S * g) ^ (4 * m)];      // tokens m, m + 4, ..
            float sum[SCAN_STEPS];
            #pragma unroll
            for (int t0 = 0; t0 < TOKENS; t0 += SCAN_STEPS) {
                // The first loads for these 8 tokens come before the stores for the last 8: the compiler
                // keeps their order, and otherwise the warp would wait for the loads here.
                float2 d[SCAN_STEPS];                          // dt, dt x
                Pack<float, S> B_t[SCAN_STEPS], C_t[SCAN_STEPS];
                auto load_bc = [&](int j) {                    // tokens 4..7: Bt and Ct are exchanged, see bc
                    const float* row = bc[j & 3] + (t0 + (j & 4)) * 32;
                    B_t[j] = load_pack<S>(row + (j & 4) * 4);
                    C_t[j] = load_pack<S>(row + 16 - (j & 4) * 4);
                };
                #pragma unroll
                for (int j = 0; j < SCAN_STEPS; j += 2)
                    *(float4*)&d[j] = *(const float4*)(dt_dtx + 2 * (t0 + j));
                load_bc(0);
                if (t0 == SCAN_STEPS && i > 0) scan_wait(&team.stored, (i - 1) & 1);
                if (t0 > 0) store_sums(sums + t0 - SCAN_STEPS, sum);
                scan_save<S>(left > t0 && (t0 & (spacing - 1)) == 0, saved + t0 / SCAN_STEPS * next, h);
                #pragma unroll
                for (int j = 0; j < SCAN_STEPS; j++) {
                    if (j > 0) load_bc(j);
                    #pragma unroll
                    for (int n = 0; n < S; n++) {
                        h[n] = fmaf(exp2_unit(d[j].x * decay[n]), h[n], d[j].y * B_t[j].v[n]);
                        sum[j] = n == 0 ? h[0] * C_t[j].v[0] : fmaf(h[n], C_t[j].v[n], sum[j]);
                    }
                }
            }
            store_sums(sums + TOKENS - SCAN_STEPS, sum);
            saved += TOKENS / SCAN_STEPS * next;
            left -= TOKENS;
            scan_arrive_warp(&team.scanned[i & 1]);
        }
        #pragma unroll
        for (int n = 0; n < S; n++)
            if (hT) hT[state + n] = h[n];
        return;
    }

    // ---- element-wise: one row per thread, token r of the tile, channels c..c+7. It reads only what it has
    // copied itself, so that its copies need no barrier. Tile i of team q is tile i TEAMS + q of the block.
    const int q = TEAMS == 1 ? 0 : (w - SCAN_THREADS / WARP) / (HELPERS / WARP);
    const int v = threadIdx.x - SCAN_THREADS - q * HELPERS;
    const int r = v / (CHANNELS / 8), c = v % (CHANNELS / 8) * 8;
    auto& team = sh.team[q];
    const int mine = (tiles - q + TEAMS - 1) / TEAMS, left = (int)T - q * TOKENS - r;
    float bias[8], D[8];
    #pragma unroll
    for (int k = 0; k < 8; k++) {
        bias[k] = dt_bias[e0 + c + k] * scan_bias_unit<X>();
        D[k] = Dskip[e0 + c + k];
    }
    // what the next load reads and the next store writes; both go from tile to tile of the team
    const size_t row = b * T + q * TOKENS + r, at = row * E + e0 + c;
    const X *next_x = x + at, *next_dt = dt_raw + at, *next_z = z + row * ldz + e0 + c;
    X *next_y = y + at, *next_s = s + at;
    const int n0 = c * 4 / S, swizzle = 4 * (r & 7);           // of the 32 Bt_t, Ct_t: the 32 / S from n0 on
    const X* next_bc = (n0 < 16 ? Bt + n0 : Ct + n0 - 16) + row * ldbc;
    const int* next_doc = doc + row;

    auto load = [&](int i) {
        auto& raw = team.raw[i & 1];
        auto& rows = team.rows[i & 3];
        const bool inside = i * STEP < left;
        scan_copy_row(&rows.x[r][c], next_x, inside);
        scan_copy_row(&rows.z[r][c], next_z, inside);
        scan_copy_row(&raw.dt_raw[r][c], next_dt, inside);
        #pragma unroll
        for (int k = 0; k < 32 / S; k += 8) scan_copy_row(&raw.bc[r][n0 + k], next_bc + k, inside);
        if (doc) {                                             // the document before the first token is 0
            scan_copy4(&raw.doc[0][v], next_doc, inside);
            scan_copy4(&raw.doc[1][v], next_doc - 1, inside && (row > b * T || i > 0));
        }
        next_x += STEP * E;
        next_dt += STEP * E;
        next_z += STEP * ldz;
        next_bc += STEP * ldbc;
        next_doc += STEP;
    };
    auto prepare = [&](int i) {
        const auto& raw = team.raw[i & 1];
        auto& tile = team.tile[i & 1];
        float dt[8], dtx[8], bc_r[8];
        scan_load_row(dtx, &team.rows[i & 3].x[r][c]);
        scan_load_row(dt, &raw.dt_raw[r][c]);
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            dt[k] = scan_dt<X>(dt[k], bias[k]);
            dtx[k] *= dt[k];                                   // x beyond T is 0
        }
        const bool inside = i * STEP < left, resets = doc && raw.doc[0][v] != raw.doc[1][v];
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            if (!inside || resets) dt[k] = inside ? SCAN_RESET : 0.0f;
            *(float2*)&tile.dt_dtx[sh.dt_at(c) + k * Shared::DT_ROW + 2 * r] = make_float2(dt[k], dtx[k]);
        }
        #pragma unroll
        for (int k = 0; k < 32 / S; k += 8) {
            scan_load_row(bc_r, &raw.bc[r][n0 + k]);
            *(float4*)&tile.bc[r][(n0 + k) ^ swizzle] = *(float4*)bc_r;
            *(float4*)&tile.bc[r][(n0 + k + 4) ^ swizzle] = *(float4*)(bc_r + 4);
        }
        scan_arrive_warp(&team.ready[i & 1]);
    };
    auto store = [&](int i) {
        float x_t[8], y_t[8], s_t[8];
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            const float* sums = &team.sum[sh.sum_at(0, c) + k * Shared::SUM_ROW + r];
            s_t[k] = sums[0];
            #pragma unroll
            for (int g = 1; g < Shared::GROUPS; g++) s_t[k] += sums[g * Shared::SUM_GROUP];
        }
        scan_arrive_warp(&team.stored);
        scan_load_row(x_t, &team.rows[i & 3].x[r][c]);
        scan_load_row(y_t, &team.rows[i & 3].z[r][c]);
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            s_t[k] = fmaf(D[k], x_t[k], s_t[k]);
            y_t[k] = s_t[k] * scan_silu<X>(y_t[k]);
        }
        if (i * STEP < left) {
            if (s) scan_store_row(next_s, s_t);
            scan_store_row(next_y, y_t);
        }
        next_s += STEP * E;
        next_y += STEP * E;
    };
    if (mine > 0) load(0);
    copy_async_commit();
    if (mine > 1) load(1);
    copy_async_commit();
    copy_async_wait(1);
    if (mine > 0) prepare(0);
    if (mine > 2) load(2);
    copy_async_commit();
    #pragma unroll 1
    for (int i = 0; i < mine; i++) {
        copy_async_wait(1);
        if (i + 1 < mine) prepare(i + 1);
        if (i + 3 < mine) load(i + 3);
        copy_async_commit();
        scan_wait(&team.scanned[i & 1], (i >> 1) & 1);
        store(i);
    }
}

// --- fast path: backward --------------------------------------------------------------------------------
// The tensor core multiplies small matrices held by a warp, D (16 x 8) = C + A (16 x k) B (k x 8). Lane 4g+q
// of the warp holds of D: d[0], d[1] = row g, columns 2q, 2q+1, and d[2], d[3] = row g + 8, same columns.
//   tf32 (floats with 10 mantissa bits), k = 4:  a0 = (row g, k q)  a1 = (row g+8, k q)  b = (k q, column g)
//   bf16, k = 16: a[0] = (row g, k 2q, 2q+1)  a[1] = (row g+8, same)  a[2], a[3] = the same at k + 8
//                 b0 = (k 2q, 2q+1, column g)  b1 = the same at k + 8
__device__ __forceinline__ void scan_mma_tf32(float* d, const float* c, float a0, float a1, float b) {
    asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(b)),
          "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
__device__ __forceinline__ void scan_mma_bf16(float* d, const float* c, const uint32_t* a, uint32_t b0,
                                              uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
}
__device__ __forceinline__ void scan_mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
    scan_mma_bf16(d, d, a, b0, b1);
}
// mma_pair: D (16 x 16) += A B^T; B has 16 rows of 16 numbers in shared memory, of which this lane gives the
// address of row l % 8 + l / 16 * 8, numbers from l / 8 % 2 * 8 on.   _trans: D += A B, row l % 16, numbers
// from l / 16 * 8 on
__device__ __forceinline__ void mma_pair(float (*d)[4], const uint32_t* a, const bf16* b) {
    uint32_t r[4];
    load_matrices(r, b);
    scan_mma_bf16(d[0], a, r[0], r[1]);
    scan_mma_bf16(d[1], a, r[2], r[3]);
}
__device__ __forceinline__ void mma_pair_trans(float (*d)[4], const uint32_t* a, const bf16* b) {
    uint32_t r[4];
    load_matrices_trans(r, b);
    scan_mma_bf16(d[0], a, r[0], r[1]);
    scan_mma_bf16(d[1], a, r[2], r[3]);
}
// transposes an 8 x 8 matrix of bf16: lane 4g + q holds row g, columns 2q, 2q+1, before and after
__device__ __forceinline__ uint32_t scan_transpose(uint32_t v) {
    uint32_t r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}
// nearest tf32: the tensor core ignores the 13 low bits, which alone would shrink every product; half a unit
// more makes that rounding. Only for operands of the tensor core: the low bits are left as they come.
__device__ __forceinline__ float scan_round_tf32(float x) {
    return __uint_as_float(__float_as_uint(x) + 0x1000u);
}
__device__ __forceinline__ float scan_truncate_tf32(float x) {
    return __uint_as_float(__float_as_uint(x) & 0xffffe000u);
}

struct ScanBackwardChunk {                                     // 8 tokens, prepared
    float dt[416], dtx[416], g[416];                           // [channel][token], see at(); g = dLoss/ds
    bf16 g16[8][32], dtx16[8][32];                        // the same; later the results ddt_raw and dx
    float2 fragB[2][32][2], fragC[2][32][2];  // one-hot operands of dtx x Bt and g x Ct: half of it is zero
    uint2 fragQ[32];                                           // Bt as operand of q = <lambda, Bt>
    float4 dbc[4][64];  // dBt, dCt of every warp, as the tensor core left them
    static __device__ __forceinline__ int at(int ch) { return ch * 12 + 8 * (ch >> 3); }
};
// where channel c of token t is in the rows that are read along tokens as well as along channels: blocks of 8
// channels are permuted, so that neighbouring tokens lie in different banks
__device__ __forceinline__ int scan_column(int t, int c) { return c ^ (((t >> 1) & 3) * 8); }
struct ScanBackwardShared {
    ScanBackwardChunk chunk[4];
    // tile as loaded; read by the threads that loaded it
    bf16 z[32][32], s[32][32], dy[32][32], bc[32][32];
    bf16 x[2][32][32], dt[2][32][32];
    uint2 hs[2][4][SCAN_THREADS];  // saved states, read by the thread that loads them
    int doc[32][2];
    float bias2[32];
};

// partial sums over the channels of one block, four at a time
__device__ __forceinline__ void scan_store4(float* p, size_t i, float4 v) { ((float4*)p)[i] = v; }
__device__ __forceinline__ void scan_store4(bf16* p, size_t i, float4 v) {
    ((uint2*)p)[i] = make_uint2(scan_pack(v.x, v.y), scan_pack(v.z, v.w));
}

// selective_scan_backward_fast_kernel: the general kernel's formulas. A block of four warps walks tiles of 32
// tokens, four chunks each, from right to left. A warp owns 8 channels x 16 states as one tensor core matrix:
// lane (g, q) holds states 4q..4q+3 of channel g, v[0], v[1] = row g, columns 2q, 2q+1, v[2], v[3] = row g+8.
// In a chunk, 8 steps forward keep a_t and m_t in registers (one exponential per update in all of backward);
// 8 steps in reverse use them. With SPACING 16 only every second chunk has a saved state; before the others
// come 8 steps that only lead there.
//   dtx x Bt, g x Ct   (every channel times every state)  tf32: the A operand holds two steps of dtx, the
//                      one-hot B operand picks one; g and dtx are rounded to 10 bits, Bt and Ct are exact
//   q = <lambda, Bt>   lambda as bf16 is an A operand as it lies: rows g are the even, rows g+8 the odd step
//   dBt, dCt           sums over channels: the matrices of two steps are transposed and multiplied with a
//                      one-hot column per step; 8 steps fill one D of 16 states x 8 steps
//   <lambda, A m>      in the lane, then over the four lanes of the channel; lane q gets tokens 2q, 2q+1
// One block per 32 channels, segment of time (`each` tiles) and sequence; lambda enters a segment as
// selective_scan_carry_kernel says.
// P: type of the partial sums in dBC_part (B, blocks, T/32 tiles, 4 chunks, {dBt, dCt}, 32 lanes, 4).
template <typename P, int SPACING>
__global__ void __launch_bounds__(SCAN_THREADS, 3)
    selective_scan_backward_fast_kernel(bf16* dx, bf16* ddt_raw, bf16* dz, uint32_t lddz,
                                        bf16* y, float* dh0, P* dBC_part, float* de_part,
                                        const float* local, const float* dt_sum,
                                        const bf16* dy, const float* dhT, const bf16* hs,
                                        const bf16* s, const bf16* x, const bf16* dt_raw,
                                        const float* dt_bias, const float* A_log, const bf16* Bt,
                                        const bf16* Ct, uint32_t ldbc, const float* Dskip,
                                        const bf16* z, uint32_t ldz, const int* doc, uint32_t T,
                                        uint32_t E, uint32_t segments, uint32_t each, uint32_t pieces) {
    extern __shared__ __align__(128) char shared[];
    ScanBackwardShared& sh = *(ScanBackwardShared*)shared;
    const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5, g = lane >> 2, q = lane & 3, ch = w * 8 + g;
    const int r0 = tid >> 2, c0 = (tid & 3) * 8;  // element-wise work: token r0 of the tile, 8 channels
    const int s0 = scan_column(r0, c0);
    const uint32_t blocks = E / SCAN_CHANNELS, e0 = blockIdx.x % blocks * SCAN_CHANNELS;
    const uint32_t segment = blockIdx.x / blocks % segments, b = blockIdx.x / blocks / segments;
    const int tiles = (int)((T + 31) / 32), first = (int)(segment * each);      // tiles first..end-1 are ours
    const int end = first + (int)each < tiles ? first + (int)each : tiles;
    const int column = scan_column(2 * q, ch);                 // of tokens 2q, 2q+1 of a chunk
    const bool odd = q & 1;
    const bool mine[4] = {g >> 1 == 0, g >> 1 == 1, g >> 1 == 2, g >> 1 == 3};  // one-hot columns of dBt, dCt
    const float zero[4] = {0, 0, 0, 0}, D = Dskip[e0 + ch];
    float decay[4], dA[4] = {0, 0, 0, 0}, dD = 0.0f, dbias = 0.0f;
    float lambda[4];  // between chunks: a lambda of the step to the right
    #pragma unroll
    for (int n = 0; n < 4; n++) {
        decay[n] = scan_decay(A_log[(size_t)(e0 + ch) * 16 + 4 * q + n]);
        lambda[n] = dhT ? dhT[((size_t)b * E + e0 + ch) * 16 + 4 * q + n] : 0.0f;
    }
    #pragma unroll 4
    for (uint32_t i = segments * pieces; i-- > (segment + 1) * pieces;) {      // what comes from the right
        size_t at = ((size_t)b * segments * pieces + i) * E + e0 + ch;
        #pragma unroll
        for (int n = 0; n < 4; n++)
            lambda[n] = fmaf(exp2_unit(dt_sum[at] * decay[n]), lambda[n], local[at * 16 + 4 * q + n]);
    }
    if (tid < SCAN_CHANNELS) sh.bias2[tid] = dt_bias[e0 + tid] * SCAN_LOG2E;
    #pragma unroll
    for (int k = 0; k < 2; k++)
        sh.chunk[w].fragB[k][lane][q < 2] = sh.chunk[w].fragC[k][lane][q < 2] = make_float2(0, 0);

    auto load = [&](int i) {
        const uint32_t t = i * 32 + r0, row = b * T + t;       // B T < 2^31 on this path
        const bool inside = t < T;                             // otherwise nothing is read
        const size_t at = (size_t)row * E + e0 + c0;
        scan_copy16(&sh.x[i & 1][r0][s0], x + at, inside);
        scan_copy16(&sh.dt[i & 1][r0][s0], dt_raw + at, inside);
        scan_copy16(&sh.z[r0][c0], z + (size_t)row * ldz + e0 + c0, inside);
        scan_copy16(&sh.s[r0][c0], s + at, inside);
        scan_copy16(&sh.dy[r0][c0], dy + at, inside);
        scan_copy16(&sh.bc[r0][c0], (c0 < 16 ? Bt + c0 : Ct + (c0 - 16)) + (size_t)row * ldbc, inside);
        if (doc && c0 < 16) {
            bool known = inside && (c0 == 0 || t > 0);
            scan_copy4(&sh.doc[r0][c0 >> 3], doc + row - (c0 >> 3), known);
        }
        const int states = (int)((T + SPACING - 1) / SPACING), state = i * (32 / SPACING);
        const bf16* from = hs + ((size_t)(b * states + state) * E + e0 + ch) * 16 + 4 * q;
        #pragma unroll
        for (int k = 0; k < 32 / SPACING; k++, from += (size_t)E * 16)
            scan_copy8(&sh.hs[i & 1][k][tid], from, state + k < states);
        copy_async_commit();
    };
    auto prepare = [&](int i) {
        float x_t[8], dt[8], z_t[8], s_t[8], g_t[8], dz_t[8], bias2[8];
        uint32_t t = i * 32 + r0;
        const bool inside = t < T;
        const ScanSpecial special(inside, doc && sh.doc[r0][0] != sh.doc[r0][1]);
        *(float4*)bias2 = *(const float4*)&sh.bias2[c0];
        *(float4*)(bias2 + 4) = *(const float4*)&sh.bias2[c0 + 4];
        scan_unpack8(x_t, &sh.x[i & 1][r0][s0]);
        scan_unpack8(dt, &sh.dt[i & 1][r0][s0]);
        scan_unpack8(z_t, &sh.z[r0][c0]);
        scan_unpack8(s_t, &sh.s[r0][c0]);
        scan_unpack8(g_t, &sh.dy[r0][c0]);
        ScanBackwardChunk& chunk = sh.chunk[r0 >> 3];
        const int at = chunk.at(c0) + (r0 & 7);
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            float half = 0.5f * z_t[k], th = scan_tanh(half);
            float silu = fmaf(half, th, half), sigma = fmaf(0.5f, th, 0.5f);
            dz_t[k] = g_t[k] * s_t[k] * fmaf(silu, 1.0f - sigma, sigma);
            s_t[k] *= silu;                                    // y
            g_t[k] *= silu;
            dt[k] = scan_softplus_fast(fmaf(dt[k], SCAN_LOG2E, bias2[k]));
            x_t[k] *= dt[k];                                   // dt x; x beyond T is 0
            chunk.dt[at + 12 * k] = special(dt[k]);
            chunk.dtx[at + 12 * k] = scan_round_tf32(x_t[k]);
            chunk.g[at + 12 * k] = scan_truncate_tf32(scan_round_tf32(g_t[k]));
        }
        if (inside) {
            size_t row = b * T + t;
            scan_store16(dz + row * lddz + e0 + c0, scan_pack8(dz_t));
            scan_store16(y + row * E + e0 + c0, scan_pack8(s_t));
        }
        *(uint4*)&chunk.g16[r0 & 7][s0] = scan_pack8(g_t);
        *(uint4*)&chunk.dtx16[r0 & 7][s0] = scan_pack8(x_t);
        // warp w gathers the operands of chunk w (the rows it loaded itself)
        ScanBackwardChunk& own = sh.chunk[w];
        own.fragQ[lane] = *(const uint2*)&sh.bc[w * 8 + g][4 * q];
        // k slot q: steps 2 (q / 2), +1, half q % 2 of the states
        const int n = 4 * (g >> 1) + 2 * (q & 1) + (g & 1);
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            const bf16 (*row)[32] = &sh.bc[w * 8 + k * 4 + 2 * (q >> 1)];
            float B0 = __bfloat162float(row[0][n]), B1 = __bfloat162float(row[1][n]);
            float C0 = __bfloat162float(row[0][16 + n]), C1 = __bfloat162float(row[1][16 + n]);
            own.fragB[k][lane][q >> 1] = make_float2(B0, B1);
            own.fragC[k][lane][q >> 1] = make_float2(C0, C1);
        }
    };
    auto finish = [&](int i) {  // store dx, ddt_raw; sum dBt, dCt over the warps
        const ScanBackwardChunk& chunk = sh.chunk[r0 >> 3];
        uint32_t t = i * 32 + r0;
        if (t < T) {
            size_t at = (size_t)(b * T + t) * E + e0 + c0;
            scan_store16(dx + at, *(const uint4*)&chunk.dtx16[r0 & 7][s0]);
            scan_store16(ddt_raw + at, *(const uint4*)&chunk.g16[r0 & 7][s0]);
        }
        size_t out = (((size_t)b * blocks + e0 / SCAN_CHANNELS) * tiles + i) * 256;
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            int v = tid + k * SCAN_THREADS;
            const float4* part = &sh.chunk[v >> 6].dbc[0][v & 63];
            float4 sum = part[0];
            #pragma unroll
            for (int j = 1; j < 4; j++) {
                float4 p = part[64 * j];
                sum.x += p.x; sum.y += p.y; sum.z += p.z; sum.w += p.w;
            }
            scan_store4(dBC_part, out + v, sum);
        }
    };

    load(end - 1);
    #pragma unroll 1
    for (int i = end - 1; i >= first; i--) {
        copy_async_wait(0);
        __syncthreads();                                       // tile i+1 is done, raw tile i has arrived
        if (i < end - 1) finish(i + 1);
        prepare(i);
        __syncthreads();
        if (i > first) load(i - 1);
        #pragma unroll 2                                       // so that k is even or odd for the compiler
        for (int k = 3; k >= 0; k--) {
            ScanBackwardChunk& chunk = sh.chunk[k];
            const float* pdt = &chunk.dt[chunk.at(ch)];
            const float* pdtx = &chunk.dtx[chunk.at(ch) + 2 * (q >> 1)];
            const float* pg = &chunk.g[chunk.at(ch) + 2 * (q >> 1)];
            float h[4], a[8][4], m[8][4], dt[8], dB[4] = {0, 0, 0, 0}, dC[4] = {0, 0, 0, 0};
            uint2 start = sh.hs[i & 1][k / (SPACING / 8)][tid];
            h[0] = scan_low(start.x);
            h[1] = scan_high(start.x);
            h[2] = scan_low(start.y);
            h[3] = scan_high(start.y);
            if (SPACING == 16 && (k & 1)) {                    // the state was saved 8 tokens earlier
                const ScanBackwardChunk& left = sh.chunk[k - 1];
                #pragma unroll
                for (int f = 0; f < 2; f++) {
                    float4 dt4 = *(const float4*)&left.dt[left.at(ch) + 4 * f];
                    float2 dtx = *(const float2*)&left.dtx[left.at(ch) + 2 * (q >> 1) + 4 * f];
                    float4 B4 = *(const float4*)left.fragB[f][lane];
                    const float Bv[4] = {B4.x, B4.y, B4.z, B4.w}, dtv[4] = {dt4.x, dt4.y, dt4.z, dt4.w};
                    #pragma unroll
                    for (int jj = 0; jj < 4; jj++) {
                        float v = jj & 1 ? dtx.y : dtx.x, ah[4];
                        #pragma unroll
                        for (int n = 0; n < 4; n++) ah[n] = exp2_unit(dtv[jj] * decay[n]) * h[n];
                        scan_mma_tf32(h, ah, odd ? 0.0f : v, odd ? v : 0.0f, Bv[jj]);
                    }
                }
            }
            // B operands of dCt, dBt: step g, channels 2q, 2q+1; even steps in k 0..7, odd steps in k 8..15
            uint32_t gv = *(uint32_t*)&chunk.g16[g][scan_column(g, w * 8 + 2 * q)];
            uint32_t dv = *(uint32_t*)&chunk.dtx16[g][scan_column(g, w * 8 + 2 * q)];
            uint32_t gv0 = g & 1 ? 0u : gv, gv1 = g & 1 ? gv : 0u, dv0 = g & 1 ? 0u : dv,
                     dv1 = g & 1 ? dv : 0u;
            uint32_t pack[4], flip[2][4];                      // two steps as bf16, and transposed
            #pragma unroll
            for (int f = 0; f < 2; f++) {                      // forward, 4 steps at a time
                *(float4*)&dt[4 * f] = *(const float4*)&pdt[4 * f];
                float2 dtx = *(const float2*)&pdtx[4 * f];
                float4 B4 = *(const float4*)chunk.fragB[f][lane];
                const float Bv[4] = {B4.x, B4.y, B4.z, B4.w};
                #pragma unroll
                for (int jj = 0; jj < 4; jj++) {
                    const int j = 4 * f + jj, p = j >> 1;
                    #pragma unroll
                    for (int n = 0; n < 4; n++) {
                        a[j][n] = exp2_unit(dt[j] * decay[n]);
                        m[j][n] = a[j][n] * h[n];
                    }
                    float v = jj & 1 ? dtx.y : dtx.x;
                    scan_mma_tf32(h, m[j], odd ? 0.0f : v, odd ? v : 0.0f, Bv[jj]);
                    pack[2 * (jj & 1)] = scan_pack(h[0], h[1]);
                    pack[2 * (jj & 1) + 1] = scan_pack(h[2], h[3]);
                    if (jj & 1) {  // multiply the pair before: its transposition is done
                        const bool column_p = mine[p > 0 ? p - 1 : 0];
                        if (p > 0)
                            scan_mma_bf16(dC, flip[(p - 1) & 1], column_p ? gv0 : 0u, column_p ? gv1 : 0u);
#pragma unroll
                        for (int n = 0; n < 4; n++) flip[p & 1][n] = scan_transpose(pack[n]);
                    }
                }
            }
            uint2 Bq = chunk.fragQ[lane];
            // <lambda, A2 m> of 8 steps; <lambda, Bt>: Q[0] is that of step 2q, Q[3] that of step 2q + 1
            float r[8], Q[4] = {0, 0, 0, 0};
            #pragma unroll
            for (int f = 1; f >= 0; f--) {                     // reverse
                float2 g2 = *(const float2*)&pg[4 * f];
                float4 C4 = *(const float4*)chunk.fragC[f][lane];
                const float Cv[4] = {C4.x, C4.y, C4.z, C4.w};
                #pragma unroll
                for (int jj = 3; jj >= 0; jj--) {
                    const int j = 4 * f + jj, p = j >> 1;
                    float v = jj & 1 ? g2.y : g2.x, gC[4];
                    scan_mma_tf32(gC, j == 7 ? lambda : zero, odd ? 0.0f : v, odd ? v : 0.0f, Cv[jj]);
                    if (j == 7) scan_mma_bf16(dC, flip[1], mine[3] ? gv0 : 0u, mine[3] ? gv1 : 0u);
                    #pragma unroll
                    for (int n = 0; n < 4; n++) {
                        lambda[n] = j == 7 ? gC[n] : fmaf(a[j == 7 ? 7 : j + 1][n], lambda[n], gC[n]);
                        float lambda_m = lambda[n] * m[j][n];
                        dA[n] = fmaf(lambda_m, dt[j], dA[n]);
                        r[j] = n == 0 ? lambda_m * decay[0] : fmaf(lambda_m, decay[n], r[j]);
                    }
                    pack[2 * (jj & 1)] = scan_pack(lambda[0], lambda[1]);
                    pack[2 * (jj & 1) + 1] = scan_pack(lambda[2], lambda[3]);
                    if (!(jj & 1)) {
                        const uint32_t A[4] = {pack[0], pack[2], pack[1], pack[3]};
                        scan_mma_bf16(Q, A, mine[p] ? Bq.x : 0u, mine[p] ? Bq.y : 0u);
                        const bool column_p = mine[p < 3 ? p + 1 : 3];
                        if (p < 3)
                            scan_mma_bf16(dB, flip[(p + 1) & 1], column_p ? dv0 : 0u, column_p ? dv1 : 0u);
#pragma unroll
                        for (int n = 0; n < 4; n++) flip[p & 1][n] = scan_transpose(pack[n]);
                    }
                }
            }
            #pragma unroll
            for (int half = 4; half >= 2; half >>= 1) {        // lane q keeps r of steps 2q, 2q+1
                bool upper = q & (half >> 1);
                #pragma unroll
                for (int j = 0; j < half; j++) {
                    float send = scan_select(upper, r[j], r[j + half]);
                    float keep = scan_select(upper, r[j + half], r[j]);
                    r[j] = keep + __shfl_xor_sync(0xffffffffu, send, half >> 1);
                }
            }
            __syncwarp();                                      // every lane has read g16 and dtx16
            float2 dt2 = *(const float2*)&pdt[2 * q], g2 = *(const float2*)&chunk.g[chunk.at(ch) + 2 * q];
            if (fmaxf(dt2.x, dt2.y) == SCAN_RESET) {           // a document begins here: dt once more
                #pragma unroll 1
                for (int j = 0; j < 2; j++) {
                    float raw = __bfloat162float(sh.dt[i & 1][8 * k + 2 * q + j][column]);
                    float again = scan_softplus_fast(fmaf(raw, SCAN_LOG2E, sh.bias2[ch]));
                    if (j == 0) dt2.x = again;
                    else if (dt2.y != 0.0f) dt2.y = again;     // 0 beyond the last token
                }
            }
            #pragma unroll
            for (int j = 0; j < 2; j++) {
                int t = 8 * k + 2 * q + j;
                float dt_t = j ? dt2.y : dt2.x, g_t = j ? g2.y : g2.x, q_t = j ? Q[3] : Q[0];
                float x_t = __bfloat162float(sh.x[i & 1][t][column]);
                float dx_t = fmaf(dt_t, q_t, D * g_t);
                float dp = fmaf(x_t, q_t, r[j] * SCAN_LN2) * (1.0f - exp2_unit(-SCAN_LOG2E * dt_t));
                dD = fmaf(g_t, x_t, dD);
                dbias += dp;
                chunk.dtx16[2 * q + j][column] = __float2bfloat16(dx_t);
                chunk.g16[2 * q + j][column] = __float2bfloat16(dp);
            }
            scan_mma_bf16(dB, flip[0], mine[0] ? dv0 : 0u, mine[0] ? dv1 : 0u);
            #pragma unroll
            for (int n = 0; n < 4; n++) lambda[n] *= a[0][n];
            chunk.dbc[w][lane] = make_float4(dB[0], dB[1], dB[2], dB[3]);
            chunk.dbc[w][32 + lane] = make_float4(dC[0], dC[1], dC[2], dC[3]);
        }
    }
    __syncthreads();
    finish(first);
    if (dh0 && segment == 0)
        *(float4*)(dh0 + ((size_t)b * E + e0 + ch) * 16 + 4 * q) =
            make_float4(lambda[0], lambda[1], lambda[2], lambda[3]);
    float* de = de_part + (((size_t)b * segments + segment) * E + e0 + ch) * 18;
    #pragma unroll
    for (int n = 0; n < 4; n++) de[4 * q + n] = dA[n] * decay[n] * SCAN_LN2;        // dA_log = dA A
    #pragma unroll
    for (int k = 1; k < 4; k <<= 1) {
        dD += __shfl_xor_sync(0xffffffffu, dD, k);
        dbias += __shfl_xor_sync(0xffffffffu, dbias, k);
    }
    if (q == 0) { de[16] = dD; de[17] = dbias; }
}

// selective_scan_carry_kernel: what a piece of a segment hands to the token before it. Backward is linear in
// what enters from the right, (B9) carry_{t-1} = a_t (g_t Ct_t + carry_t), so that for a whole piece
//   carry out = local + exp(A sum dt) carry in
// local (B, segments, pieces, E, 16): carry out if nothing enters; dt_sum (B, segments, pieces, E). Segment 0
// is not needed. One block per 32 channels, piece and sequence.
// Thread: states 4k..4k+3 of one channel; element-wise: token r of the tile, 8 channels.
__global__ void __launch_bounds__(SCAN_THREADS)
selective_scan_carry_kernel(float* local, float* dt_sum, const bf16* dy, const bf16* dt_raw,
                            const float* dt_bias, const float* A_log, const bf16* Ct, uint32_t ldbc,
                            const bf16* z, uint32_t ldz, const int* doc, uint32_t T, uint32_t E,
                            uint32_t segments, uint32_t each, uint32_t pieces) {
    __shared__ float4 dt_g[32][16];                            // (dt, g) of two channels, at pair()
    __shared__ float C[32][16];
    auto pair = [](int t, int c) { return c ^ ((c >> 3) | ((t & 1) << 1)); };      // against bank conflicts
    const int lane = threadIdx.x & 31, r = threadIdx.x >> 2, c0 = (threadIdx.x & 3) * 8;
    // lanes of one channel: 0, 1, 8, 9 apart, as in the forward kernel
    const int k = (lane & 1) | ((lane >> 2) & 2), c = ((lane >> 1) & 3) | ((lane >> 2) & 4);
    const int ch = (threadIdx.x >> 5) * 8 + c;
    const uint32_t blocks = E / SCAN_CHANNELS, e0 = blockIdx.x % blocks * SCAN_CHANNELS;
    const uint32_t others = (segments - 1) * pieces, piece = pieces + blockIdx.x / blocks % others;
    const uint32_t b = blockIdx.x / blocks / others, part = (each + pieces - 1) / pieces;
    const uint32_t start = piece / pieces * each, tiles = (T + 31) / 32;
    const int first = (int)(start + piece % pieces * part);    // tiles first..end-1 are ours, perhaps none
    const int end = (int)min(min((uint32_t)first + part, start + each), tiles);
    float decay[4], carry[4] = {0, 0, 0, 0}, sum = 0.0f, bias2[8];
    #pragma unroll
    for (int n = 0; n < 4; n++) decay[n] = scan_decay(A_log[(size_t)(e0 + ch) * 16 + 4 * k + n]);
    #pragma unroll
    for (int n = 0; n < 8; n++) bias2[n] = dt_bias[e0 + c0 + n] * SCAN_LOG2E;

    uint4 next_dt, next_z, next_dy, next_C;                    // the tile to come
    bool reset, inside;
    auto load = [&](int i) {
        const uint32_t t = i * 32 + r;
        inside = t < T;
        const size_t row = (size_t)b * T + (inside ? t : 0), at = row * E + e0 + c0;
        next_dt = *(const uint4*)(dt_raw + at);
        next_z = *(const uint4*)(z + row * ldz + e0 + c0);
        next_dy = *(const uint4*)(dy + at);
        if (c0 < 16) next_C = *(const uint4*)(Ct + row * ldbc + c0);
        reset = inside && scan_resets_cuda(doc, b, t, T);
    };
    if (first < end) load(end - 1);
    #pragma unroll 1
    for (int i = end - 1; i >= first; i--) {
        float dt[8], z_t[8], g[8], C_t[8];
        const ScanSpecial special(inside, reset);
        scan_unpack8(dt, &next_dt);
        scan_unpack8(z_t, &next_z);
        scan_unpack8(g, &next_dy);
        #pragma unroll
        for (int n = 0; n < 8; n++) {
            float half = 0.5f * z_t[n];
            g[n] *= inside ? fmaf(half, scan_tanh(half), half) : 0.0f;
            dt[n] = special(scan_softplus_fast(fmaf(dt[n], SCAN_LOG2E, bias2[n])));
        }
        __syncthreads();                                       // nobody reads the tile before any more
        #pragma unroll
        for (int n = 0; n < 8; n += 2)
            dt_g[r][pair(r, (c0 + n) >> 1)] = make_float4(dt[n], g[n], dt[n + 1], g[n + 1]);
        if (c0 < 16) {
            scan_unpack8(C_t, &next_C);
            *(float4*)&C[r][c0] = *(float4*)C_t;
            *(float4*)&C[r][c0 + 4] = *(float4*)(C_t + 4);
        }
        __syncthreads();
        if (i > first) load(i - 1);
        const float2* even = (const float2*)&dt_g[0][pair(0, ch >> 1)] + (ch & 1);
        const float2* odd = (const float2*)&dt_g[0][pair(1, ch >> 1)] + (ch & 1);
        #pragma unroll
        for (int j = 31; j >= 0; j--) {
            float2 d = (j & 1 ? odd : even)[j * SCAN_CHANNELS];
            *(float4*)C_t = *(const float4*)&C[j][4 * k];
            #pragma unroll
            for (int n = 0; n < 4; n++) carry[n] = exp2_unit(d.x * decay[n]) * fmaf(d.y, C_t[n], carry[n]);
            sum += d.x;
        }
    }
    const size_t at = ((size_t)b * segments * pieces + piece) * E + e0 + ch;
    *(float4*)(local + at * 16 + 4 * k) = make_float4(carry[0], carry[1], carry[2], carry[3]);
    if (k == 0) dt_sum[at] = sum;
}

// sums of eight partial values at p[i]: one or two 16-byte loads
__device__ __forceinline__ void scan_add8(float* sum, const float* p, size_t i) {
    float4 u = ((const float4*)p)[2 * i], v = ((const float4*)p)[2 * i + 1];
    sum[0] += u.x; sum[1] += u.y; sum[2] += u.z; sum[3] += u.w;
    sum[4] += v.x; sum[5] += v.y; sum[6] += v.z; sum[7] += v.w;
}
__device__ __forceinline__ void scan_add8(float* sum, const bf16* p, size_t i) {
    float v[8];
    scan_unpack8(v, p + 8 * i);
    #pragma unroll
    for (int k = 0; k < 8; k++) sum[k] += v[k];
}

// selective_scan_reduce_fast_kernel: the same sums from the fast kernel's partial values. 256 threads
// make 64 groups of 8 values: four threads share the blocks of one group (every fourth each).
template <typename P>
__global__ void __launch_bounds__(256)
    selective_scan_reduce_fast_kernel(float* dA_log, float* dDskip, float* ddt_bias, bf16* dBt,
                                      bf16* dCt, size_t lddbc, const P* dBC_part, const float* de_part,
                                      int blocks, uint32_t B, uint32_t T, uint32_t E, uint32_t segments) {
    __shared__ float part[3][8][64];
    const size_t tiles = (T + 31) / 32, count = tiles * 128, groups = B * tiles * 2;
    if (blockIdx.x >= groups) {                                // dA_log, dDskip, ddt_bias
        size_t i = (blockIdx.x - groups) * 256 + threadIdx.x;
        if (i >= (size_t)E * 18) return;
        float sum = 0.0f;
        for (size_t b = 0; b < (size_t)B * segments; b++) sum += de_part[b * E * 18 + i];
        size_t e = i / 18, n = i % 18;
        if (n < 16) dA_log[e * 16 + n] += sum;
        else if (n == 16) dDskip[e] += sum;
        else ddt_bias[e] += sum;
        return;
    }
    const int v = threadIdx.x & 63, quarter = threadIdx.x >> 6;
    const size_t i = (size_t)blockIdx.x * 64 + v, b = i / count;
    float sum[8] = {0};
    #pragma unroll 12
    for (int k = quarter; k < blocks; k += 4) scan_add8(sum, dBC_part, (b * (blocks - 1) + k) * count + i);
    if (quarter > 0) {
        #pragma unroll
        for (int k = 0; k < 8; k++) part[quarter - 1][k][v] = sum[k];
    }
    __syncthreads();
    if (quarter > 0) return;
    #pragma unroll
    for (int k = 0; k < 8; k++) sum[k] += (part[0][k][v] + part[1][k][v]) + part[2][k][v];
    #pragma unroll
    for (int half = 0; half < 2; half++) {  // lane (g, q): states n, n + 2 of tokens t, t + 1
        const size_t j = 2 * i + half;
        const int lane = j & 31, g = lane >> 2, n = 4 * (g >> 1) + (g & 1);
        const size_t t = (j >> 6) % (4 * tiles) * 8 + 2 * (lane & 3);
        bf16* row = ((j >> 5) & 1 ? dCt : dBt) + (b * T + t) * lddbc + n;
        const float* d = sum + 4 * half;
        if (t < T) { scan_store(row, d[0]); scan_store(row + 2, d[2]); }
        if (t + 1 < T) { scan_store(row + lddbc, d[1]); scan_store(row + lddbc + 2, d[3]); }
    }
}

// --- launchers ------------------------------------------------------------------------------------------

// ScanPartial: type of the fast backward's partial sums (float works too). bf16 halves the traffic, 100 MB at
// B=8 T=2048 E=1536: 0.430 instead of 0.45 ms (H200); dBt and dCt, errors up to 4e-3, get about 0.5e-3 worse.
typedef bf16 ScanPartial;

static inline bool scan_aligned(const void* p, size_t stride) {
    return (uintptr_t)p % 16 == 0 && stride % 8 == 0;
}
template <typename X>
static inline bool scan_is_fast(const X* x, const X* Bt, const X* Ct, size_t ldbc, const X* z, size_t ldz,
                                size_t B, size_t T, size_t E, size_t N) {
    if (sizeof(X) != sizeof(bf16)) return false;  // float results must be exact to float rounding
    return N == 16 && E % SCAN_CHANNELS == 0 && B * T < (size_t)1 << 31 && E < (size_t)1 << 31 &&
           ldbc < (size_t)1 << 31 && ldz < (size_t)1 << 31 && scan_aligned(x, E) && scan_aligned(z, ldz) &&
           scan_aligned(Bt, ldbc) && scan_aligned(Ct, ldbc);
}
// which kernels serve these arguments: "fast" or "general". Of float only the backward is general: it must be
// exact to float rounding, and so is the fast forward
template <typename X>
const char* selective_scan_path_cuda(const X* x, const X* Bt, const X* Ct, size_t ldbc, const X* z,
                                     size_t ldz, size_t B, size_t T, size_t E, size_t N) {
    return scan_is_fast(x, Bt, Ct, ldbc, z, ldz, B, T, E, N) ? "fast" : "general";
}

// a block may use more than 48 KB of shared memory only after the kernel was told so
template <typename Kernel> static inline void scan_allow_shared(Kernel kernel, size_t bytes) {
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, most, (int)bytes);
    if (error == cudaErrorInvalidValue)
        die("a kernel for these sizes needs %zu bytes of shared memory per block, this GPU has %zu; choose a "
            "smaller --d-state or --dt-rank, or --device cpu", bytes, shared_memory_limit());
    cudaCheck(error);
}
static inline size_t scan_shared_bytes(size_t tile_bytes, size_t steps, size_t N, size_t state_arrays) {
    size_t padded = (N + SCAN_GROUP - 1) / SCAN_GROUP * SCAN_GROUP;
    return tile_bytes + (2 * steps + state_arrays * SCAN_CHANNELS) * padded * sizeof(float);
}

template <typename X, int S, int TEAMS>
static inline void scan_launch_forward_fast(X* y, X* s, X* hs, float* hT, const X* x, const X* dt_raw,
                                            const float* dt_bias, const float* A_log, const X* Bt,
                                            const X* Ct, size_t ldbc, const float* Dskip, const X* z,
                                            size_t ldz, const float* h0, const int* doc, size_t B, size_t T,
                                            size_t E, int spacing, cudaStream_t stream) {
    typedef ScanForwardShared<X, S, TEAMS> Shared;
    auto kernel = selective_scan_forward_fast_kernel<X, S, TEAMS>;
    scan_allow_shared(kernel, sizeof(Shared));
    const unsigned blocks = (unsigned)(B * (E / Shared::CHANNELS));
    kernel<<<blocks, Shared::THREADS, sizeof(Shared), stream>>>(
        y, s, hs, hT, x, dt_raw, dt_bias, A_log, Bt, Ct, ldbc, Dskip, z, ldz, h0, doc, T, E, spacing);
    cudaCheck(cudaGetLastError());
}
static inline void scan_launch_backward_fast(bf16* dx, bf16* ddt_raw, bf16* dz, size_t lddz,
                                             bf16* y, float* dA_log, float* dDskip, float* ddt_bias,
                                             bf16* dBt, bf16* dCt, size_t lddbc, float* dh0,
                                             const bf16* dy, const float* dhT, const bf16* hs,
                                             const bf16* s, const bf16* x, const bf16* dt_raw,
                                             const float* dt_bias, const float* A_log, const bf16* Bt,
                                             const bf16* Ct, size_t ldbc, const float* Dskip,
                                             const bf16* z, size_t ldz, const int* doc, float* scratch,
                                             size_t B, size_t T, size_t E, int spacing, size_t segments,
                                             cudaStream_t stream) {
    const size_t blocks = scan_blocks_cuda(E), tiles = scan_padded_cuda(T) / 32;
    const size_t each = (tiles + segments - 1) / segments, pieces = scan_pieces_cuda(each);
    const size_t all = segments > 1 ? B * segments * pieces : 0;
    float* local = scratch + blocks * B * scan_padded_cuda(T) * 32;        // 16-byte aligned
    float* dt_sum = local + all * E * 16;
    float* de_part = dt_sum + all * E;
    ScanPartial* dBC_part = (ScanPartial*)scratch;
    auto kernel = spacing == 8 ? selective_scan_backward_fast_kernel<ScanPartial, 8>
                               : selective_scan_backward_fast_kernel<ScanPartial, 16>;
    scan_allow_shared(kernel, sizeof(ScanBackwardShared));
    if (segments > 1) {
        selective_scan_carry_kernel<<<(unsigned)(blocks * (segments - 1) * pieces * B), SCAN_THREADS, 0,
                                      stream>>>(
            local, dt_sum, dy, dt_raw, dt_bias, A_log, Ct, (uint32_t)ldbc, z, (uint32_t)ldz, doc, (uint32_t)T,
            (uint32_t)E, (uint32_t)segments, (uint32_t)each, (uint32_t)pieces);
        cudaCheck(cudaGetLastError());
    }
    kernel<<<(unsigned)(blocks * segments * B), SCAN_THREADS, sizeof(ScanBackwardShared), stream>>>(
        dx, ddt_raw, dz, (uint32_t)lddz, y, dh0, dBC_part, de_part, local, dt_sum, dy, dhT, hs, s, x, dt_raw,
        dt_bias, A_log, Bt, Ct, (uint32_t)ldbc, Dskip, z, (uint32_t)ldz, doc, (uint32_t)T, (uint32_t)E,
        (uint32_t)segments, (uint32_t)each, (uint32_t)pieces);
    cudaCheck(cudaGetLastError());
    unsigned grid = (unsigned)(B * tiles * 2 + (E * 18 + 255) / 256);
    selective_scan_reduce_fast_kernel<<<grid, 256, 0, stream>>>(dA_log, dDskip, ddt_bias, dBt, dCt, lddbc,
        (const ScanPartial*)dBC_part, de_part, (int)blocks, (uint32_t)B, (uint32_t)T, (uint32_t)E,
        (uint32_t)segments);
    cudaCheck(cudaGetLastError());
}
// never called: scan_is_fast is false for float
static inline void scan_launch_backward_fast(float*, float*, float*, size_t, float*, float*, float*, float*,
                                             float*, float*, size_t, float*, const float*, const float*,
                                             const float*, const float*, const float*, const float*,
                                             const float*, const float*, const float*, const float*, size_t,
                                             const float*, const float*, size_t, const int*, float*, size_t,
                                             size_t, size_t, int, size_t, cudaStream_t) {}

// selective_scan_forward_cuda: formulas at the top of this section.
//   y (B,T,E) written   s (B,T,E), hs selective_scan_saved_cuda() elements: for backward, NULL in inference
//   hT, h0 (B,E,N) float, each may be NULL, may be one array   doc (B,T) or NULL; h0 is of document 0
//   spacing: tokens between two states in hs, 8 or 16
template <typename X>
void selective_scan_forward_cuda(X* y, X* s, X* hs, float* hT, const X* x, const X* dt_raw,
                                 const float* dt_bias, const float* A_log, const X* Bt, const X* Ct,
                                 size_t ldbc, const float* Dskip, const X* z, size_t ldz, const float* h0,
                                 const int* doc, size_t B, size_t T, size_t E, size_t N, int spacing,
                                 cudaStream_t stream) {
    const size_t w = sizeof(X);
    if (N == 16 && E % SCAN_CHANNELS == 0 && B * T < (size_t)1 << 31 && is_aligned(x, 16, E * w) &&
        is_aligned(dt_raw, 16, E * w) && is_aligned(z, 16, ldz * w) && is_aligned(Bt, 16, ldbc * w) &&
        is_aligned(Ct, 16, ldbc * w) && is_aligned(y, 16, E * w) && is_aligned(s, 16, E * w) &&
        is_aligned(hs, 16, E * w) && is_aligned(hT, 16, 16) && is_aligned(h0, 16, 16)) {
        int sms = 1;
        cudaCheck(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
        // few channels: blocks of half the size, as long as every processor has at most one of them
        const bool few = B * E / 16 <= (size_t)sms &&
                         sizeof(ScanForwardShared<X, 2, 2>) <= shared_memory_limit();
        auto launch = few ? scan_launch_forward_fast<X, 2, 2> : scan_launch_forward_fast<X, 4, 1>;
        launch(y, s, hs, hT, x, dt_raw, dt_bias, A_log, Bt, Ct, ldbc, Dskip, z, ldz, h0, doc, B, T, E,
               spacing, stream);
        return;
    }
    size_t bytes = scan_shared_bytes(sizeof(ScanTile), SCAN_STEPS, N, 2);
    scan_allow_shared(selective_scan_forward_kernel<X>, bytes);
    selective_scan_forward_kernel<X><<<(unsigned)(scan_blocks_cuda(E) * B), SCAN_THREADS, bytes, stream>>>(
        y, s, hs, hT, x, dt_raw, dt_bias, A_log, Bt, Ct, ldbc, Dskip, z, ldz, h0, doc, T, E, N, spacing);
    cudaCheck(cudaGetLastError());
}

// selective_scan_backward_cuda: formulas at selective_scan_backward_kernel. dy is the gradient of y.
//   dx, ddt_raw (B,T,E), dz (row stride lddz), dBt, dCt (row stride lddbc), dh0, y: written
//   dA_log (E,N), dDskip, ddt_bias (E): added to   dh0, dhT (B,E,N), doc: may be NULL
//   hs (with this spacing), s: as forward left them   scratch: selective_scan_scratch_cuda() floats
template <typename X>
void selective_scan_backward_cuda(X* dx, X* ddt_raw, X* dz, size_t lddz, X* y, float* dA_log, float* dDskip,
                                  float* ddt_bias, X* dBt, X* dCt, size_t lddbc, float* dh0, const X* dy,
                                  const float* dhT, const X* hs, const X* s, const X* x, const X* dt_raw,
                                  const float* dt_bias, const float* A_log, const X* Bt, const X* Ct,
                                  size_t ldbc, const float* Dskip, const X* z, size_t ldz, const int* doc,
                                  float* scratch, size_t B, size_t T, size_t E, size_t N, int spacing,
                                  cudaStream_t stream) {
    if (scan_is_fast(x, Bt, Ct, ldbc, z, ldz, B, T, E, N) && scan_aligned(dx, E) &&
        scan_aligned(ddt_raw, E) && scan_aligned(dz, lddz) && scan_aligned(y, E) && scan_aligned(dh0, E) &&
        scan_aligned(dy, E) && scan_aligned(hs, E) && scan_aligned(s, E) && scan_aligned(dt_raw, E) &&
        scan_aligned(scratch, E)) {
        scan_launch_backward_fast(dx, ddt_raw, dz, lddz, y, dA_log, dDskip, ddt_bias, dBt, dCt, lddbc, dh0,
                                  dy, dhT, hs, s, x, dt_raw, dt_bias, A_log, Bt, Ct, ldbc, Dskip, z, ldz, doc,
                                  scratch, B, T, E, spacing, scan_segments_cuda(B, T, E), stream);
        return;
    }
    size_t blocks = scan_blocks_cuda(E);
    size_t bytes = scan_shared_bytes(sizeof(ScanBackwardTile), SCAN_PAIR, N, 3);
    float* de_part = scratch + blocks * B * T * 2 * N;
    scan_allow_shared(selective_scan_backward_kernel<X>, bytes);
    selective_scan_backward_kernel<X><<<(unsigned)(blocks * B), SCAN_THREADS, bytes, stream>>>(
        dx, ddt_raw, dz, lddz, y, dh0, scratch, de_part, dy, dhT, hs, s, x, dt_raw, dt_bias, A_log, Bt, Ct,
        ldbc, Dskip, z, ldz, doc, T, E, N, spacing);
    cudaCheck(cudaGetLastError());
    size_t results = B * T * 2 * N + E * (N + 2);
    selective_scan_reduce_kernel<X><<<(unsigned)((results + 255) / 256), 256, 0, stream>>>(
        dA_log, dDskip, ddt_bias, dBt, dCt, lddbc, scratch, de_part, blocks, B, T, E, N);
    cudaCheck(cudaGetLastError());
}

// --------------------------------------------------------------------------------------------------
// 4.10 Decoding: one token of each of a few sequences
//
// With one token per sequence every weight is read to be used a few times: the time of a token is the time of
// reading the weights (bf16: 61 us for 130M parameters at 4.3 TB/s) plus that of a chain of short kernels, in
// which each waits for the one before. So a Mamba-1 layer is three kernels:
//   norm + W_in + conv + each block's share of W_x | sum of the shares + W_dt + state + gate | W_out
// (with more than 8 sequences the shares are too many, and W_x is a kernel of its own), and each starts early
// (launch_early): its weights are in shared memory when the results of the kernel before arrive, 0.4 us after
// the end of that one (0.7 us without). mamba-130m on one H200, us per token of one sequence: 429 with four
// kernels that start late, 344 early, 303 with three, 246 with loads that are all under way at once.
// (No faster: a whole token as one kernel with barriers between its blocks; W_x made by a cluster of blocks.)
// From DECODE_MANY sequences on section 4.16 makes the products; where it cannot, with more than DECODE_FEW,
// cuBLASLt does, with norm and convolution kernels of their own. us per token of all sequences, mamba-130m on
// one H200: 1 sequence 245, 8: 339, 9: 449, 16: 457 (without 4.16 502, 549), 64: 521. More than DECODE_ROWS
// are decoded in turns of so many: 128 sequences 1052, 256: 2100 (with the kernels for any number of tokens
// 2095 and 3438).

// DECODE_FEW: the most sequences of decode_linear; DECODE_MANY: the fewest for which decode_many is faster;
// DECODE_ROWS: the most at a time
enum { DECODE_WARPS = 8, DECODE_FEW = 16, DECODE_MANY = 9, DECODE_ROWS = 64 };
enum { DECODE_TAPS = 4, DECODE_STAGES = 6, DECODE_STAGE = 2048 };

// DecodeLinear: out (rows,O) = input (rows,K) weight^T + bias; in decode_linear at most DECODE_FEW rows, K a
//   multiple of 32; in decode_many (section 4.16) at most DECODE_ROWS
//   input: act (rows,K); or act NULL: RMSNorm of res_in + delta, which is stored in res_out (not res_in:
//   other blocks still read it); or with `squares` act that lacks the factor of its norm: squares
//   (rows,parts) are parts of the sum of the squares of a row. With conv_weight E outputs from conv_first on
//   go through the causal convolution (at most DECODE_TAPS taps) and SiLU; conv_state (rows,taps-1,E) holds
//   its last inputs. With second_weight (conv_first 0) each block multiplies those of the E that it has made
//   with another matrix; the sum of second_parts is the product.
typedef struct {
    const bf16* weight;                // (O,K)
    const float* bias;                 // (O) or NULL
    size_t O, K;
    int rows;
    const bf16* act;
    size_t ld_act;
    const float* res_in;               // (rows,K)
    const bf16* delta;                 // (rows,K) or NULL
    float* res_out;
    const float* norm;                 // (K)
    float eps;
    bf16* out;                         // (rows,O), row stride ldo; NULL: out_float
    float* out_float;
    size_t ldo;
    const float *conv_weight, *conv_bias;
    float* conv_state;
    int taps;
    size_t E, conv_first;
    const float* squares;
    int parts;
    float *res, *next_squares;         // section 4.16: out is added to res (rows,O), and becomes res * norm,
                                       // next_squares (rows,O / 64) parts of the sums of squares
    const bf16* second_weight;         // (second_O,E)
    float* second_parts;               // (decode_parts(O,E),rows,decode_padded(second_O))
    size_t second_O;
} DecodeLinear;

static inline size_t decode_padded(size_t O) { return (O + 7) / 8 * 8; }

// decode_each: outputs of a block, a multiple of 8: as many blocks as the GPU has multiprocessors, or fewer
static size_t decode_each(size_t O) {
    int sms = 1;
    cudaCheck(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    return ((O + 7) / 8 + (size_t)sms - 1) / (size_t)sms * 8;
}
// decode_parts: how many blocks make the first E of O outputs
static size_t decode_parts(size_t O, size_t E) { return (E + decode_each(O) - 1) / decode_each(O); }

// DecodeShared: what a block keeps in shared memory, as byte offsets
typedef struct {
    int each, ld;                      // outputs of the block; row stride of the inputs (at 0)
    int slots;                         // of the ring of a warp
    int pieces, ld_x;                  // second product: pieces of 32 of its inputs; their row stride
    int part, squares, ring, second, x, bytes;
} DecodeShared;

static DecodeShared decode_shared(const DecodeLinear& a) {
    DecodeShared s = {};
    int K = (int)a.K, stages = (K / 32 + DECODE_WARPS - 1) / DECODE_WARPS;
    s.each = (int)decode_each(a.O);
    s.ld = (K + 63) / 64 * 64 + 32;                          // rows begin 16 banks apart
    s.slots = s.each / 8 * ((stages + 3) / 4);
    if (s.slots > DECODE_STAGES) s.slots = DECODE_STAGES;
    if (a.second_weight) s.pieces = (s.each + 31) / 32;
    s.ld_x = 32 * s.pieces + 8;
    int second_units = (int)(decode_padded(a.second_O) / 8 + DECODE_WARPS - 1) / DECODE_WARPS;
    s.part = a.rows * s.ld * (int)sizeof(bf16);
    s.squares = s.part + 2 * DECODE_WARPS * 256 * (int)sizeof(float);
    s.ring = s.squares + DECODE_WARPS * DECODE_FEW * (int)sizeof(float);
    s.second = s.ring + DECODE_WARPS * s.slots * DECODE_STAGE;
    s.x = s.second + DECODE_WARPS * second_units * s.pieces * 512;
    s.bytes = s.x + (a.second_weight ? a.rows * s.ld_x * (int)sizeof(bf16) : 0);
    return s;
}

// decode_linear_fits: whether decode_linear is for these sizes on this GPU
static bool decode_linear_fits(const DecodeLinear& a) {
    int most = 0;
    cudaCheck(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    return a.rows <= DECODE_FEW && a.K % 32 == 0 && a.taps <= DECODE_TAPS && decode_shared(a).bytes <= most;
}

// decode_linear: a block makes s.each outputs of all sequences, 8 at a time; its eight warps share the sum
// over k: each takes a range of it, in pieces of 32. The tensor core multiplies inputs (16 sequences x 16 k)
// with weights (16 k x 8 outputs). The order of k within a piece does not matter as long as both sides have
// the same, so lane (g, q) simply takes k = 8q..8q+7 of row g, 16 bytes, for two multiplications.
// The weights go through a ring in shared memory, one for each warp: a stage is four pieces of 8 outputs, 256
// neighbouring bytes of each, laid out as the lanes will multiply them. The ring is filled before the results
// of the kernel before are there (launch_early). mamba-2.8b on one H200, 1 sequence: 1,945 us per token, with
// 4 stages instead of 6: 2,085, with 8: 1,911; with bulk copies of a row's
// piece by the copy engine: 2,159 and more; prefetches into the L2 cache beyond the ring add 100 to 200.
// MANY: more than 8 sequences.   bytes: 2 per weight
template <bool NORM, bool MANY>
__global__ void __launch_bounds__(DECODE_WARPS * WARP, 2)
decode_linear_kernel(const DecodeLinear a, const DecodeShared s) {
    extern __shared__ __align__(128) char shared[];
    allow_next();
    const int tid = threadIdx.x, lane = tid % WARP, w = tid / WARP, g = lane >> 2, q = lane & 3;
    const int K = (int)a.K, rows = a.rows, ld = s.ld;
    const int o_begin = blockIdx.x * s.each, o_end = min(o_begin + s.each, (int)a.O);
    const int c0 = K / 32 * w / DECODE_WARPS, c1 = K / 32 * (w + 1) / DECODE_WARPS;
    bf16* inputs = (bf16*)shared;                            // (rows,ld)
    float *part = (float*)(shared + s.part), *squares = (float*)(shared + s.squares);
    char* ring = shared + s.ring + w * s.slots * DECODE_STAGE;

    int next_o = o_begin, next_c = c0, next_slot = 0;
    auto fetch = [&]() {
        if (next_o < o_end && c0 < c1) {
            const int piece = lane % 16 / 4;                 // sixteen lanes copy the four pieces of a row
            const bf16* from = a.weight + 32 * next_c + 8 * (lane % 16);
            char* to = ring + next_slot * DECODE_STAGE + 512 * piece + lane / 16 * 64 + q * 16;
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                size_t o = min(next_o + 2 * i + lane / 16, o_end - 1);       // beyond the last: not used
                if (next_c + piece < c1) copy_async<16>(to + 128 * i, from + o * a.K);
            }
            next_c += 4;
            if (next_c >= c1) { next_c = c0; next_o += 8; }
            if (++next_slot == DECODE_STAGES) next_slot = 0;
        }
        copy_async_commit();
    };
    #pragma unroll 1
    for (int i = 0; i < DECODE_STAGES - 1; i++) fetch();

    // second product: the weights, and zeros for what is missing at the end of the last piece of its inputs
    const int channels = a.second_weight ? min(o_end, (int)a.E) - o_begin : 0;
    const int second_units = (int)(a.second_O + 7) / 8;
    char* second = shared + s.second + w * ((second_units + 7) / 8) * s.pieces * 512 + lane * 16;
    bf16* xs = (bf16*)(shared + s.x);                        // (rows,ld_x)
    if (channels > 0) {
        char* to = second;
        #pragma unroll 1
        for (int v = w; v < second_units; v += DECODE_WARPS) {
            size_t o = min(8 * v + g, (int)a.second_O - 1);
            const bf16* from = a.second_weight + o * a.E + o_begin + 8 * q;
            #pragma unroll 1
            for (int j = 0; j < s.pieces; j++, to += 512)
                scan_copy16(to, from + 32 * j, 32 * j + 8 * q < channels);
        }
        #pragma unroll 1
        for (int i = tid; i < rows * s.ld_x / 2; i += DECODE_WARPS * WARP) ((uint32_t*)xs)[i] = 0;
    }
    // what the end needs besides the sums: a thread ends one output of one sequence, for `batch` times 8
    // outputs at once
    const int shift = MANY ? 7 : 6, batch = 256 >> shift, n = tid % (1 << shift) / 8;
    const int my_o = (tid >> shift) * 8 + tid % 8;
    float bias = 0, conv_bias = 0, conv_weight[DECODE_TAPS] = {}, tail[DECODE_TAPS] = {};
    auto load_ends = [&](int o) {
        const size_t e = o - a.conv_first;                   // enormous for an output before conv_first
        if (n >= rows || o >= o_end) return;
        if (a.bias) bias = a.bias[o];
        if (!a.conv_weight || e >= a.E) return;
        if (a.conv_bias) conv_bias = a.conv_bias[e];
        #pragma unroll
        for (int k = 0; k < DECODE_TAPS; k++) {
            int tap = a.taps - DECODE_TAPS + k;              // the newest is the last
            if (tap < 0) continue;
            conv_weight[k] = a.conv_weight[e * a.taps + tap];
            if (k + 1 < DECODE_TAPS) tail[k] = a.conv_state[(n * (a.taps - 1) + tap) * a.E + e];
        }
    };
    load_ends(o_begin + my_o);
    wait_before();

    // each warp prepares the inputs that it uses, of all sequences; 1/rms is a factor of the whole row and
    // comes last
    if (NORM) {
        const int AT_ONCE = 4, k_begin = 32 * c0 + 4 * lane, k_end = 32 * c1;
        int row = 0, k = k_begin;
        float sum = 0;
        #pragma unroll 1
        while (row < rows) {
            float4 x[AT_ONCE], scale[AT_ONCE];
            uint2 add[AT_ONCE];
            int row_of[AT_ONCE], k_of[AT_ONCE];
            #pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                row_of[i] = row;
                k_of[i] = k;
                add[i] = make_uint2(0, 0);
                if (row < rows && k < k_end) {
                    x[i] = __ldcg((const float4*)(a.res_in + (size_t)row * K + k));
                    scale[i] = *(const float4*)(a.norm + k);
                    if (a.delta) add[i] = __ldcg((const uint2*)(a.delta + (size_t)row * K + k));
                }
                k += 4 * WARP;
                if (k - 4 * lane >= k_end) { k = k_begin; row++; }
            }
            #pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                int r = row_of[i], at = k_of[i];
                if (r >= rows) break;
                if (at < k_end) {
                    float4 v = x[i];
                    v.x += __uint_as_float(add[i].x << 16);
                    v.y += __uint_as_float(add[i].x & 0xffff0000u);
                    v.z += __uint_as_float(add[i].y << 16);
                    v.w += __uint_as_float(add[i].y & 0xffff0000u);
                    if (a.res_out && blockIdx.x == 0) *(float4*)(a.res_out + (size_t)r * K + at) = v;
                    sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
                    *(uint2*)(inputs + r * ld + at) =
                        make_uint2(scan_pack(v.x * scale[i].x, v.y * scale[i].y),
                                   scan_pack(v.z * scale[i].z, v.w * scale[i].w));
                }
                if (at - 4 * lane + 4 * WARP < k_end) continue;
                sum = warp_sum(sum);
                if (lane == 0) squares[w * DECODE_FEW + r] = sum;
                sum = 0;
            }
        }
    } else {
        #pragma unroll 1
        for (int r = 0; r < rows; r++)
            #pragma unroll 1
            for (int k = 32 * c0 + 8 * lane; k < 32 * c1; k += 8 * WARP)
                copy_async<16>(inputs + r * ld + k, a.act + r * a.ld_act + k);
        copy_async_commit();
        #pragma unroll 1
        for (int r = w; a.squares && r < rows; r += DECODE_WARPS) {
            float square = 0;
            for (int i = lane; i < a.parts; i += 8 * WARP)               // eight loads at once
                #pragma unroll
                for (int j = 0; j < 8; j++)
                    square += i + j * WARP < a.parts ? a.squares[r * a.parts + i + j * WARP] : 0.0f;
            square = warp_sum(square);
            if (lane == 0) squares[r] = rstd_of(square, (float)K, a.eps);
        }
        copy_async_wait(0);
    }
    __syncwarp();

    // beyond the last sequence the last again, what comes of it is not used
    const bf16 *low = inputs + min(g, rows - 1) * ld + 8 * q,
               *high = inputs + min(g + 8, rows - 1) * ld + 8 * q;
    int slot = 0;
    #pragma unroll 1
    for (int o = o_begin, in_batch = 0; o < o_end; o += 8) {
        float acc[4][4] = {};
        #pragma unroll 1
        for (int c = c0; c < c1; c += 4) {
            copy_async_wait(DECODE_STAGES - 2);
            __syncwarp();
            const char* from = ring + slot * DECODE_STAGE + lane * 16;
            uint4 b[4], x[4], y[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                b[i] = y[i] = make_uint4(0, 0, 0, 0);
                const int at = 32 * (c + i < c1 ? c + i : c);
                if (c + i < c1) b[i] = *(const uint4*)(from + 512 * i);
                x[i] = *(const uint4*)(low + at);
                if (MANY) y[i] = *(const uint4*)(high + at);
            }
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t first[4] = {x[i].x, y[i].x, x[i].y, y[i].y};
                scan_mma_bf16(acc[i], first, b[i].x, b[i].y);
            }
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t last[4] = {x[i].z, y[i].z, x[i].w, y[i].w};
                scan_mma_bf16(acc[i], last, b[i].z, b[i].w);
            }
            fetch();
            if (++slot == DECODE_STAGES) slot = 0;
        }
        #pragma unroll
        for (int i = 0; i < 4; i++) acc[0][i] = (acc[0][i] + acc[1][i]) + (acc[2][i] + acc[3][i]);
        float* sums = part + ((in_batch * DECODE_WARPS + w) << shift) + g * 8 + 2 * q;
        *(float2*)sums = make_float2(acc[0][0], acc[0][1]);
        if (MANY) *(float2*)(sums + 64) = make_float2(acc[0][2], acc[0][3]);
        if (++in_batch < batch && o + 8 < o_end) continue;
        __syncthreads();
        const int mine = o + 8 - 8 * in_batch + my_o;
        if (n < rows && mine < o_end && my_o < 8 * in_batch) {
            float sum = 0;
            const float* from = part + ((tid >> shift) * DECODE_WARPS << shift) + tid % (1 << shift);
            #pragma unroll
            for (int i = 0; i < DECODE_WARPS; i++) sum += from[i << shift];
            if (NORM) {
                float square = 0;
                #pragma unroll
                for (int i = 0; i < DECODE_WARPS; i++) square += squares[i * DECODE_FEW + n];
                sum *= rstd_of(square, (float)K, a.eps);
            } else if (a.squares) sum *= squares[n];
            sum += bias;
            const size_t e = mine - a.conv_first;
            if (a.conv_weight && e < a.E) {                  // as causal_conv1d_forward, with T = 1
                float c = conv_bias, x = to_float(from_float<bf16>(sum));
                tail[DECODE_TAPS - 1] = x;
                #pragma unroll
                for (int k = 0; k < DECODE_TAPS; k++) {
                    int tap = a.taps - DECODE_TAPS + k;
                    if (tap < 0) continue;
                    c += conv_weight[k] * tail[k];
                    if (k + 1 < DECODE_TAPS) a.conv_state[(n * (a.taps - 1) + tap) * a.E + e] = tail[k + 1];
                }
                sum = silu_cuda(c);
                if (channels > 0) xs[n * s.ld_x + mine - o_begin] = from_float<bf16>(sum);
            }
            if (a.out) a.out[n * a.ldo + mine] = from_float<bf16>(sum);
            else a.out_float[n * a.ldo + mine] = sum;
        }
        load_ends(o + 8 + my_o);
        in_batch = 0;
        part = part == (float*)(shared + s.part) ? part + DECODE_WARPS * 256 : (float*)(shared + s.part);
    }
    if (channels <= 0) return;

    copy_async_commit();                                     // by a warp without a piece of the sum over k
    copy_async_wait(0);
    __syncthreads();
    low = xs + min(g, rows - 1) * s.ld_x + 8 * q;
    high = xs + min(g + 8, rows - 1) * s.ld_x + 8 * q;
    #pragma unroll 1
    for (int v = w; v < second_units; v += DECODE_WARPS) {
        float acc[4] = {};
        #pragma unroll 1
        for (int j = 0; j < s.pieces; j++, second += 512) {
            uint4 b = *(const uint4*)second, x = *(const uint4*)(low + 32 * j), y = make_uint4(0, 0, 0, 0);
            if (MANY) y = *(const uint4*)(high + 32 * j);
            const uint32_t first[4] = {x.x, y.x, x.y, y.y}, last[4] = {x.z, y.z, x.w, y.w};
            scan_mma_bf16(acc, first, b.x, b.y);
            scan_mma_bf16(acc, last, b.z, b.w);
        }
        float* out = a.second_parts + (((size_t)blockIdx.x * rows + g) * second_units + v) * 8 + 2 * q;
        if (g < rows) *(float2*)out = make_float2(acc[0], acc[1]);
        if (MANY && g + 8 < rows) *(float2*)(out + 64 * second_units) = make_float2(acc[2], acc[3]);
    }
}

static void decode_linear_cuda(const DecodeLinear& a, cudaStream_t stream) {
    DecodeShared s = decode_shared(a);
    auto kernel = a.act ? decode_linear_kernel<false, false> : decode_linear_kernel<true, false>;
    if (a.rows > 8) kernel = a.act ? decode_linear_kernel<false, true> : decode_linear_kernel<true, true>;
    scan_allow_shared(kernel, (size_t)s.bytes);
    launch_early(kernel, dim3((unsigned)((a.O + s.each - 1) / s.each)), DECODE_WARPS * WARP,
                 (size_t)s.bytes, stream, a, s);
}

// DecodeStep: dt = softplus(W_dt r + b), then one step of the recurrence, skip and gate (formulas (F4) to
// (F8) of 4.9)
typedef struct {
    bf16* y;                           // (rows,E)
    void* h;                           // (rows,E,N)
    const float* rbc_parts;            // (parts,rows,decode_padded(R+2N)): their sum is r, B, C
    int parts, rows;
    const bf16 *x, *z;                 // (rows,E), row stride ldx
    size_t ldx, E, N, R;
    const bf16* dt_weight;             // (E,R)
    const float *dt_bias, *A_log, *D;
} DecodeStep;

// decode_step: a block has 32 channels of one sequence, eight lanes share a channel.
// S: the type in which the states are kept, float or bf16, here and below; the sums are of what they are
// before they are rounded.   bytes: 2 per weight, 2 sizeof(S) per state
template <typename S>
__global__ void __launch_bounds__(DECODE_WARPS * WARP, 3) decode_step_kernel(const DecodeStep a) {
    extern __shared__ __align__(128) char shared[];
    allow_next();
    const int tid = threadIdx.x, lane = tid % WARP, w = tid / WARP, l = tid % 8, c = tid / 8;
    const int n = blockIdx.y;
    const int AT_ONCE = 8, N = (int)a.N, R = (int)a.R, columns = (R + 2 * N + 7) / 8 * 8;
    const size_t e0 = (size_t)blockIdx.x * WARP, e = e0 + c;
    bf16* weight = (bf16*)shared;                            // (32,R)
    float* sums = (float*)(weight + WARP * R);               // (8,columns)
    float* rbc = sums + DECODE_WARPS * columns;
    // E is a multiple of 32: the rows of W_dt of this block are one aligned piece
    for (int i = tid; i < WARP * R / 8; i += DECODE_WARPS * WARP)
        copy_async<16>(weight + 8 * i, a.dt_weight + e0 * R + 8 * i);
    copy_async_commit();
    float bias = a.dt_bias[e], skip = a.D[e], rate[2], state[2];
    S* h_e = (S*)a.h + (n * a.E + e) * N;
    #pragma unroll
    for (int i = 0; i < 2; i++) {                            // the state was written one token ago
        rate[i] = 2 * l + i < N ? scan_decay(a.A_log[e * N + 2 * l + i]) : 0.0f;
        state[i] = 2 * l + i < N ? to_float(h_e[2 * l + i]) : 0.0f;
    }
    copy_async_wait(0);
    wait_before();
    float x = to_float(a.x[n * a.ldx + e]), z = to_float(a.z[n * a.ldx + e]);
    #pragma unroll 1
    for (int j = 4 * lane; j < columns; j += 4 * WARP) {
        const float* from = a.rbc_parts + n * columns + j;
        float4 sum = make_float4(0, 0, 0, 0);
        #pragma unroll 1
        for (int p0 = w; p0 < a.parts; p0 += AT_ONCE * DECODE_WARPS) {
            float4 v[AT_ONCE];
            #pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                int p = min(p0 + i * DECODE_WARPS, a.parts - 1);
                v[i] = __ldcg((const float4*)(from + p * a.rows * columns));
            }
            #pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                float once = p0 + i * DECODE_WARPS < a.parts ? 1.0f : 0.0f;
                sum.x = fmaf(once, v[i].x, sum.x);
                sum.y = fmaf(once, v[i].y, sum.y);
                sum.z = fmaf(once, v[i].z, sum.z);
                sum.w = fmaf(once, v[i].w, sum.w);
            }
        }
        *(float4*)(sums + w * columns + j) = sum;
    }
    __syncthreads();
    #pragma unroll 1
    for (int j = tid; j < columns; j += DECODE_WARPS * WARP) {
        float sum = 0;
        #pragma unroll
        for (int i = 0; i < DECODE_WARPS; i++) sum += sums[i * columns + j];
        rbc[j] = to_float(from_float<bf16>(sum));
    }
    __syncthreads();
    const float *B_n = rbc + R, *C_n = B_n + N;
    float dt = 0, sum = 0;
    #pragma unroll 4
    for (int i = l; i < R; i += 8) dt += to_float(weight[c * R + i]) * rbc[i];
    #pragma unroll
    for (int step = 1; step < 8; step *= 2) dt += __shfl_xor_sync(0xffffffffu, dt, step);
    dt = scan_softplus(dt + bias);
    #pragma unroll 1
    for (int first = 2 * l; first < N; first += 16)
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            int k = first + i;
            if (k >= N) continue;
            float before = first < 16 ? state[i] : to_float(h_e[k]);
            float decay = first < 16 ? rate[i] : scan_decay(a.A_log[e * N + k]);
            float after = fmaf(exp2_unit(dt * decay), before, dt * x * B_n[k]);
            h_e[k] = from_float<S>(after);
            sum = fmaf(C_n[k], after, sum);
        }
    #pragma unroll
    for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (l == 0) a.y[n * a.E + e] = from_float<bf16>(fmaf(skip, x, sum) * silu_cuda(z));
}

static size_t decode_step_shared(size_t R, size_t N) {
    return WARP * R * sizeof(bf16) + (DECODE_WARPS + 1) * decode_padded(R + 2 * N) * sizeof(float);
}
template <typename S> static void decode_step_cuda(const DecodeStep& a, cudaStream_t stream) {
    const size_t shared = decode_step_shared(a.R, a.N);
    dim3 grid((unsigned)(a.E / WARP), (unsigned)a.rows);
    scan_allow_shared(decode_step_kernel<S>, shared);
    launch_early(decode_step_kernel<S>, grid, DECODE_WARPS * WARP, shared, stream, a);
}

// decode_conv: causal convolution and SiLU of one token.   x (rows,E)   input: row stride ld
//   tail (rows,taps-1,E): the last inputs, updated.   One thread per channel of a sequence
__global__ void __launch_bounds__(256) decode_conv_kernel(bf16* x, float* tail, const bf16* input, size_t ld,
                                                          const float* weight, const float* bias, size_t E,
                                                          int taps) {
    size_t n = blockIdx.y, e = (size_t)blockIdx.x * 256 + threadIdx.x;
    allow_next();
    if (e >= E) return;
    float newest = to_float(input[n * ld + e]), c = bias ? bias[e] : 0.0f;
    float* tail_e = tail + n * (taps - 1) * E + e;
    for (int k = 0; k + 1 < taps; k++) {
        c += weight[e * taps + k] * tail_e[k * E];
        tail_e[k * E] = k + 2 < taps ? tail_e[(k + 1) * E] : newest;
    }
    x[n * E + e] = from_float<bf16>(silu_cuda(c + weight[e * taps + taps - 1] * newest));
}

static void decode_conv_cuda(bf16* x, float* tail, const bf16* input, size_t ld, const float* weight,
                             const float* bias, size_t rows, size_t E, size_t taps, cudaStream_t stream) {
    dim3 grid((unsigned)((E + 255) / 256), (unsigned)rows);
    decode_conv_kernel<<<grid, 256, 0, stream>>>(x, tail, input, ld, weight, bias, E, (int)taps);
    cudaCheck(cudaGetLastError());
}

// prefetch: asks for the 128 bytes at p to be brought into the L2 cache
__device__ __forceinline__ void prefetch(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" :: "l"(p));
}

// decode_scan: dt = softplus(W_dt r + b), then one step of the recurrence, skip and gate (formulas (F4) to
// (F8) of 4.9).   y (rows,E)   x, z (rows,E), row strides ldx, ldz   rbc (rows,R+2N)   h (rows,E,N)
// A block has 32 channels of 8 sequences. Their states start on their way to shared memory first; meanwhile
// the tensor core makes W_dt r, (32 channels x R) (R x 8 sequences): warp w makes channels 16 (w % 2).. and
// those steps of 16 r of which w / 2 is the parity. In the recurrence a lane has W states of a channel, 16
// bytes: four lanes share it, with states in bf16 two, and then two groups of threads have a sequence each.
// Every block runs through the code once, so that fetching the code costs time: loops stay loops, and FAST
// has no branches for sizes other than N = 16, R % 8 = 0 (23 KB of code instead of 96).
// bytes: 2 per weight, 2 sizeof(S) per state.   One H200, 64 sequences: mamba-130m 5.9 us (with a scalar
// product for each dt 9.6), mamba-2.8b 17 (46); the states alone need 2.9 and 9.8 us at 4.3 TB/s. Timed alone
// it takes 6.3 and 14.3 us, with states in bf16 4.8 and 10.7.
enum { DECODE_SCAN_ROWS = 8 };

// rows of shared memory are an odd number of 16 bytes long: the 8 rows of a matrix differ in banks
static __host__ __device__ __forceinline__ int decode_scan_padded(int n) { return (n + 15) / 16 * 16; }
static __host__ __device__ __forceinline__ int decode_scan_ldw(int R) { return decode_scan_padded(R) + 8; }
static __host__ __device__ __forceinline__ int decode_scan_ldr(int R, int N) {
    return decode_scan_padded(R) + decode_scan_padded(2 * N) + 8;
}

template <typename S, bool FAST>
__global__ void __launch_bounds__(4 * WARP)
decode_scan_kernel(bf16* y, S* h, const bf16* x, size_t ldx, const bf16* rbc, const bf16* dt_weight,
                   const float* dt_bias, const float* A_log, const float* Dskip, const bf16* z, size_t ldz,
                   int rows, int E, int states, int R) {
    const int ROWS = DECODE_SCAN_ROWS, N = FAST ? 16 : states, RBC = R + 2 * N;
    const int LANES = FAST ? sizeof(S) : 4, W = 16 / LANES, GROUPS = 4 / LANES;
    const int tid = threadIdx.x, w = tid / WARP, lane = tid % WARP, l4 = tid % 4, c4 = tid / 4;
    const int group = GROUPS > 1 ? tid / (LANES * WARP) : 0, own = tid - LANES * WARP * group;
    const int l = own % LANES, c = own / LANES;
    const int n0 = blockIdx.y * ROWS, n_rows = rows - n0 < ROWS ? rows - n0 : ROWS;
    const int Rp = decode_scan_padded(R), gap = Rp - R, ldw = decode_scan_ldw(R), ldr = decode_scan_ldr(R, N);
    extern __shared__ __align__(128) char shared[];
    __shared__ uint4 state[ROWS][LANES * WARP];
    __shared__ float part[2][WARP][ROWS + 1], dt_s[ROWS][WARP];
    __shared__ __align__(16) bf16 x_s[ROWS][WARP], z_s[ROWS][WARP];
    bf16* weight = (bf16*)shared;                            // (32,R), row stride ldw
    bf16* rbc_s = weight + WARP * ldw;                       // (8: r, zeros up to Rp, B, C), row stride ldr
    const int e0 = blockIdx.x * WARP, e = e0 + c;
    const size_t EN = (size_t)E * N;
    S* h_e = h + n0 * EN + e * N + (FAST ? W * l : 0);       // this thread's states of the first sequence
    allow_next();
    // what no kernel of this token writes; the states only on their way to the cache
    const int LINES = WARP * 16 * sizeof(S) / 128;           // of 128 bytes, for each sequence
    if (FAST && l4 == 0)
        #pragma unroll 1
        for (int n = c4 / LINES; n < n_rows; n += WARP / LINES)
            prefetch((const char*)(h + (n0 + n) * EN + e0 * N) + c4 % LINES * 128);
    #pragma unroll 1
    for (int k = FAST ? 8 * l4 : l4; k < R; k += FAST ? 32 : 4)
        if (FAST) copy_async<16>(weight + c4 * ldw + k, dt_weight + (size_t)(e0 + c4) * R + k);
        else weight[c4 * ldw + k] = dt_weight[(size_t)(e0 + c4) * R + k];
    #pragma unroll 1
    for (int n = c4; n < WARP + ROWS; n += WARP)             // zeros
        #pragma unroll 1
        for (int k = R + l4; k < Rp; k += 4)
            (n < WARP ? weight + n * ldw : rbc_s + (n - WARP) * ldr)[k] = bf16(0.0f);
    const float bias = dt_bias[e0 + lane], D = Dskip[e];
    float decay[W] = {};
    #pragma unroll
    for (int i = 0; FAST && i < W; i += 4) unpack<4>(decay + i, load_pack<4>(A_log + e * N + W * l + i));
    #pragma unroll
    for (int i = 0; i < W; i++) decay[i] = scan_decay(decay[i]);
    wait_before();
    if (tid < 8 * ROWS) {
        const int n = tid / 8, k = tid % 4 * 8;
        const size_t row = n0 + (n < n_rows ? n : 0);
        if (tid & 4) scan_copy16(z_s[n] + k, z + row * ldz + e0 + k, n < n_rows);
        else scan_copy16(x_s[n] + k, x + row * ldx + e0 + k, n < n_rows);
    }
    const int n_tid = tid / 16;
    const bf16* rbc_n = rbc + (size_t)(n0 + (n_tid < n_rows ? n_tid : 0)) * RBC;
    #pragma unroll 1
    for (int k = tid % 16 * (FAST ? 8 : 1); k < RBC; k += 16 * (FAST ? 8 : 1)) {
        bf16* to = rbc_s + n_tid * ldr + k + (k < R ? 0 : gap);
        if (FAST) scan_copy16(to, rbc_n + k, n_tid < n_rows);
        else *to = n_tid < n_rows ? rbc_n[k] : bf16(0.0f);
    }
    copy_async_commit();
    if (FAST)
        #pragma unroll 1
        for (int n = group; n < n_rows; n += GROUPS) copy_async<16>(&state[n][own], h_e + n * EN);
    copy_async_commit();
    copy_async_wait(1);
    __syncthreads();
    float acc[4] = {};
    #pragma unroll 1
    for (int k = 16 * (w / 2); k < Rp; k += 32) {
        uint32_t a[4], b[4];
        load_matrices(a, weight + (w % 2 * 16 + lane % 16) * ldw + k + lane / 16 * 8);
        load_matrices(b, rbc_s + lane % 8 * ldr + k + lane / 8 % 2 * 8);
        scan_mma_bf16(acc, a, b[0], b[1]);
    }
    #pragma unroll
    for (int i = 0; i < 4; i++) part[w / 2][w % 2 * 16 + lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = acc[i];
    __syncthreads();
    #pragma unroll
    for (int n = 0; n < ROWS; n += 4)
        dt_s[n + w][lane] =
            scan_softplus_fast((part[0][lane][n + w] + part[1][lane][n + w] + bias) * SCAN_LOG2E);
    __syncthreads();
    copy_async_wait(0);
    #pragma unroll 1
    for (int n4 = group; n4 < n_rows; n4 += 4) {             // what follows the sum: a lane for each sequence
        float mine = 0;                                      // <h, C> of sequence n4 + GROUPS l
        #pragma unroll
        for (int k = 0; k < LANES; k++) {
            const int n = n4 + GROUPS * k;
            if (n >= n_rows) break;
            const float dt = dt_s[n][c], dtx = dt * to_float(x_s[n][c]);
            const bf16 *B_n = rbc_s + n * ldr + Rp, *C_n = B_n + N;
            S* h_n = h_e + n * EN;
            float sum = 0;
            if (FAST) {
                float B[W], C[W], h_W[W];
                uint4 piece = state[n][own];
                unpack<W>(h_W, *(const Pack<S, W>*)&piece);
                unpack<W>(B, load_pack<W>(B_n + W * l));
                unpack<W>(C, load_pack<W>(C_n + W * l));
                #pragma unroll
                for (int i = 0; i < W; i++) {
                    h_W[i] = fmaf(exp2_unit(dt * decay[i]), h_W[i], dtx * B[i]);
                    sum = fmaf(C[i], h_W[i], sum);
                }
                store_pack<W>((S*)&piece, h_W);
                scan_store16(h_n, piece);
            } else {
                #pragma unroll 1
                for (int s = l; s < N; s += 4) {
                    const float rate = scan_decay(A_log[e * N + s]);
                    const float after = fmaf(exp2_unit(dt * rate), to_float(h_n[s]), dtx * to_float(B_n[s]));
                    h_n[s] = from_float<S>(after);
                    sum = fmaf(to_float(C_n[s]), after, sum);
                }
            }
            #pragma unroll
            for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
            if (k == l) mine = sum;
        }
        const int n = n4 + GROUPS * l;
        if (n < n_rows)
            y[(size_t)(n0 + n) * E + e] =
                from_float<bf16>(fmaf(D, to_float(x_s[n][c]), mine) * silu_cuda(to_float(z_s[n][c])));
    }
}

static size_t decode_scan_shared(size_t R, size_t N) {
    const int words = WARP * decode_scan_ldw((int)R) + DECODE_SCAN_ROWS * decode_scan_ldr((int)R, (int)N);
    return (size_t)words * sizeof(bf16);
}
template <typename S>
static void decode_scan_cuda(bf16* y, void* h, const bf16* x, size_t ldx, const bf16* rbc,
                             const bf16* dt_weight, const float* dt_bias, const float* A_log,
                             const float* Dskip, const bf16* z, size_t ldz, size_t rows, size_t E, size_t N,
                             size_t R, cudaStream_t stream) {
    const size_t shared = decode_scan_shared(R, N);
    const dim3 grid((unsigned)(E / WARP), (unsigned)((rows + DECODE_SCAN_ROWS - 1) / DECODE_SCAN_ROWS));
    const auto kernel = N == 16 && R % 8 == 0 ? decode_scan_kernel<S, true> : decode_scan_kernel<S, false>;
    scan_allow_shared(kernel, shared);
    launch_early(kernel, grid, 4 * WARP, shared, stream, y, (S*)h, x, ldx, rbc, dt_weight, dt_bias, A_log,
                 Dskip, z, ldz, (int)rows, (int)E, (int)N, (int)R);
}

// --------------------------------------------------------------------------------------------------
// 4.11 State space duality (SSD): forward
//
// ssd on the GPU: the recurrence of Mamba-2, with one decay per head and a state of P x N numbers per head.
//   (S2) dt_t = clip(softplus(dt_raw_t + dt_bias), lo, hi)       (S3) a_t = exp(dt_t A), A = -exp(A_log)
//   (S4) h_t = a_t h_{t-1} + dt_t x_t Bt_t^T      y_t = h_t Ct_t + Dskip x_t
//        a_t := 0 where a document begins: where its id differs from the id before (0 before the first token)
//   shapes:   x (B,T,H,P), row stride ldx   Bt, Ct (B,T,G,N), row stride ldbc; head h uses group h G / H
//             y (B,T,H,P)   dt (B,H,T) float   A_log (H)   Dskip (H), or (H,P) with D_has_hdim
//             h0, hT (B,H,P,N) float   doc (B,T)
//   saved:    states (B, ceil(T / SSD_SPACING), H, P, N) in X: the state before tokens 0, 256, 512, ..
//             (before token 0: h0 or 0). A document that begins at such a token has not yet cleared it.
// Mamba-2 paper (arXiv 2405.21060), sections 3 and 6. Oracle: ssd_recurrent_forward of train_mamba.c.

enum { SSD_SPACING = 256 };

// elements of X that forward saves in states
size_t ssd_saved_cuda(size_t B, size_t T, size_t H, size_t P, size_t N) {
    return B * ((T + SSD_SPACING - 1) / SSD_SPACING) * H * P * N;
}

// --- dt -----------------------------------------------------------------------------------------------

// ssd_dt_forward: formula (S2), dt_raw (B,T,H) with row stride ld to dt (B,H,T). A block turns 32 tokens of
// 32 heads around in shared memory: neighbours are the heads of a token before, the tokens of a head after.
template <typename X>
__global__ void __launch_bounds__(8 * WARP)
ssd_dt_forward_kernel(float* dt, const X* dt_raw, size_t ld, const float* dt_bias, float lo, float hi,
                      size_t T, size_t H) {
    __shared__ float tile[WARP][WARP + 1];
    const size_t blocks = (T + WARP - 1) / WARP, b = blockIdx.x / blocks, t0 = blockIdx.x % blocks * WARP;
    const size_t h0 = (size_t)blockIdx.y * WARP, h = h0 + threadIdx.x, t = t0 + threadIdx.x;
    for (size_t i = threadIdx.y; i < WARP; i += 8) {
        if (t0 + i >= T || h >= H) continue;
        float v = scan_softplus(to_float(dt_raw[(b * T + t0 + i) * ld + h]) + dt_bias[h]);
        tile[i][threadIdx.x] = v < lo ? lo : v > hi ? hi : v;  // NaN stays NaN
    }
    __syncthreads();
    for (size_t i = threadIdx.y; i < WARP; i += 8)
        if (h0 + i < H && t < T) dt[(b * H + h0 + i) * T + t] = tile[threadIdx.x][i];
}

template <typename X>
void ssd_dt_forward_cuda(float* dt, const X* dt_raw, size_t ld, const float* dt_bias, float lo, float hi,
                         size_t B, size_t T, size_t H, cudaStream_t stream) {
    dim3 grid((unsigned)(B * ((T + WARP - 1) / WARP)), (unsigned)((H + WARP - 1) / WARP));
    ssd_dt_forward_kernel<X><<<grid, dim3(WARP, 8), 0, stream>>>(dt, dt_raw, ld, dt_bias, lo, hi, T, H);
    cudaCheck(cudaGetLastError());
}

// --- general path -------------------------------------------------------------------------------------
// The recurrence itself, 8 tokens at a time. A block owns 32 channels of one head, lane l channel l. Warp w
// works on states 4w..4w+3 of a group of 16; the groups follow one another, and the states of those that
// rest are in shared memory.

enum { SSD_STEPS = 8, SSD_CHANNELS = 32, SSD_GROUP = 16 };

struct alignas(16) SsdTile {
    float dt[SSD_STEPS], a[SSD_STEPS];            // a: 1 beyond the last token
    bool reset[SSD_STEPS];
    float x[SSD_STEPS][SSD_CHANNELS];
    float part[4][SSD_STEPS][SSD_CHANNELS];       // sums over the states of one warp
};

// ssd_forward_kernel: formula (S4). states, hT, h0, doc may be NULL.
//   shared memory behind the tile: bc (8,2,Np), state (Np,32); Np = N rounded up to 16
template <typename X>
__global__ void __launch_bounds__(4 * WARP)
ssd_forward_kernel(X* y, X* states, float* hT, const X* x, size_t ldx, const float* dt, const float* A_log,
                   const X* Bt, const X* Ct, size_t ldbc, const float* Dskip, bool D_has_hdim,
                   const float* h0, const int* doc, size_t T, size_t H, size_t P, size_t G, size_t N) {
    extern __shared__ __align__(128) char shared[];
    SsdTile& tile = *(SsdTile*)shared;
    const int padded = (int)(N + SSD_GROUP - 1) / SSD_GROUP * SSD_GROUP;
    float* bc = (float*)(&tile + 1);
    float (*state)[SSD_CHANNELS] = (float (*)[SSD_CHANNELS])(bc + SSD_STEPS * 2 * padded);
    const int tid = threadIdx.x, lane = tid % WARP, w = tid / WARP;
    const size_t blocks = (P + SSD_CHANNELS - 1) / SSD_CHANNELS;
    const size_t p = blockIdx.x % blocks * SSD_CHANNELS + lane;
    const size_t b = blockIdx.x / blocks / H, h = blockIdx.x / blocks % H;
    const size_t saved = (T + SSD_SPACING - 1) / SSD_SPACING;
    const bool channel = p < P;
    const float A2 = scan_decay(A_log[h]), D = channel ? Dskip[D_has_hdim ? h * P + p : h] : 0.0f;
    Bt += h * G / H * N;
    Ct += h * G / H * N;
    const size_t row = (b * H + h) * P + p;                    // of h0 and hT
    for (int n = w; n < padded; n += 4)
        state[n][lane] = channel && n < (int)N && h0 ? h0[row * N + n] : 0.0f;
    for (size_t t0 = 0; t0 < T; t0 += SSD_STEPS) {
        __syncthreads();
        if (states && t0 % SSD_SPACING == 0 && channel) {
            X* save = states + (((b * saved + t0 / SSD_SPACING) * H + h) * P + p) * N;
            for (int n = w; n < (int)N; n += 4) save[n] = from_float<X>(state[n][lane]);
        }
        if (tid < SSD_STEPS) {
            bool inside = t0 + tid < T;
            float dt_t = inside ? dt[(b * H + h) * T + t0 + tid] : 0.0f;
            tile.dt[tid] = dt_t;
            tile.reset[tid] = inside && scan_resets_cuda(doc, b, t0 + tid, T);
            tile.a[tid] = exp2f(dt_t * A2);
        }
        for (int i = w; i < SSD_STEPS; i += 4)
            tile.x[i][lane] = channel && t0 + i < T ? to_float(x[(b * T + t0 + i) * ldx + h * P + p]) : 0.0f;
        scan_load_bc(bc, Bt, Ct, ldbc, b, t0, T, N, padded);
        __syncthreads();
        float sum[SSD_STEPS] = {};
        for (int n0 = 4 * w; n0 < padded; n0 += SSD_GROUP) {
            float s[4];
            #pragma unroll
            for (int j = 0; j < 4; j++) s[j] = state[n0 + j][lane];
            #pragma unroll
            for (int i = 0; i < SSD_STEPS; i++) {
                float B_t[4], C_t[4];
                *(float4*)B_t = *(float4*)&bc[i * 2 * padded + n0];
                *(float4*)C_t = *(float4*)&bc[(i * 2 + 1) * padded + n0];
                const float dtx = tile.dt[i] * tile.x[i][lane];
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    s[j] = fmaf(dtx, B_t[j], tile.reset[i] ? 0.0f : tile.a[i] * s[j]);
                    sum[i] = fmaf(s[j], C_t[j], sum[i]);
                }
            }
            #pragma unroll
            for (int j = 0; j < 4; j++) state[n0 + j][lane] = s[j];
        }
        #pragma unroll
        for (int i = 0; i < SSD_STEPS; i++) tile.part[w][i][lane] = sum[i];
        __syncthreads();
        for (int i = w; i < SSD_STEPS; i += 4) {
            if (!channel || t0 + i >= T) continue;
            float v = D * tile.x[i][lane];
            #pragma unroll
            for (int k = 0; k < 4; k++) v += tile.part[k][i][lane];
            y[((b * T + t0 + i) * H + h) * P + p] = from_float<X>(v);
        }
    }
    __syncthreads();
    if (hT && channel)
        for (int n = w; n < (int)N; n += 4) hT[row * N + n] = state[n][lane];
}

// --- fast path ----------------------------------------------------------------------------------------
// bf16, in chunks of Q = 64 tokens (i and j count the tokens of a chunk). With cs_i = log2(a_0 a_1 .. a_i),
// and S = the state before the chunk, (S4) becomes matrix products, the work of the tensor cores:
//   M_ij = (Ct_i . Bt_j) 2^(cs_i - cs_j) dt_j   for j <= i and of one document, else 0            64 x 64
//   y_i  = sum_j M_ij x_j + 2^cs_i S Ct_i + Dskip x_i                                             64 x P
//   S'   = 2^cs_63 S + sum_j (2^(cs_63 - cs_j) dt_j x_j) Bt_j^T                                   P x N
// No exponent but log2(dt) is above 0. Ct_i . Bt_j is the same for all heads of a group: a small kernel
// computes it first, and the decays of all heads. Then a block marches through the chunks of one sequence
// with a slice (64 channels of one head). It has two groups of four warps, which work side by side:
//   the state: S stays in float registers, warp w has rows 16w..16w+15; as bf16 it goes to shared memory
//   y:         from Ct, the S that it finds there, M and x
// One group alone would do everything one after the other, each step waiting for the one before: 0.123 ms
// instead of 0.086 (H200, B8 T2048 H24 P64 N128, bf16, cold cache). 0.094 took two slices per block with the
// same Bt and Ct, where one holds up the other, and decays that a warp makes on the way.
//
// Matrices live in shared memory as tiles of 64 rows x 64 bf16; a row is 8 pieces of 16 bytes, and piece c of
// row r lies in place c ^ (r % 8), so that the 8 pieces of a column are in different banks. Columns beyond N
// or P and tokens beyond T are zeros with dt = 0.

enum { SSD_TOKENS = 64, SSD_TILE = 64 * 64 };
enum { SSD_CB = 10 * WARP };                      // packs of 8 products Ct . Bt per chunk, see ssd_cb_kernel

// wgmma exists in code for sm_90a alone; code for sm_80, sm_90 and later has mma.sync
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(SSM_SANITIZE)
#define SSD_WGMMA 1
#else
#define SSD_WGMMA 0
#endif

// where piece c of row r of a tile begins
__device__ __forceinline__ int ssd_piece(int r, int c) { return r * 64 + ((c ^ (r & 7)) << 3); }

// log2 x, like exp2_unit; -infinity for 0
__device__ __forceinline__ float log2_unit(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The products, on tiles, by the four warps of a group: warp w makes rows 16w..16w+15 of d (64 x 64), in the
// layout of mma: d[i] are 8 columns 8i.., of which a lane has columns 2tg, 2tg+1 of row g, then of row g + 8
// (lane = 4g + tg).
// ssd_mma_rows: d += a b^T; the rows of both tiles are 64 numbers of the summed dimension.
__device__ __forceinline__ void ssd_mma_rows(float (&d)[8][4], const bf16* a, const bf16* b, int w) {
    const int lane = threadIdx.x % WARP;
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t ra[4];
        load_matrices(ra, a + ssd_piece(w * 16 + (lane & 15), 2 * k + (lane >> 4)));
        #pragma unroll
        for (int j = 0; j < 4; j++)
            mma_pair(d + 2 * j, ra,
                     b + ssd_piece(j * 16 + (lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
    }
}
// ssd_mma_columns: d += a b; a in registers (a[k]: columns 16k.. of this warp's rows), b a tile with one row
// for each number of the summed dimension, of which only the first 16 `steps` count.
__device__ __forceinline__ void ssd_mma_columns(float (&d)[8][4], const uint32_t (&a)[4][4], const bf16* b,
                                                int steps) {
    const int lane = threadIdx.x % WARP;
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        if (k >= steps) continue;
        #pragma unroll
        for (int j = 0; j < 4; j++)
            mma_pair_trans(d + 2 * j, a[k], b + ssd_piece(k * 16 + (lane & 15), 2 * j + (lane >> 4)));
    }
}
// ssd_mma_lower: d += a^T b; both tiles have one row for each number of the summed dimension. a is 0 above
// its diagonal of 16 x 16 pieces: only numbers from 16w on count.
__device__ __forceinline__ void ssd_mma_lower(float (&d)[8][4], const bf16* a, const bf16* b, int w) {
    const int lane = threadIdx.x % WARP;
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        if (k < w) continue;
        uint32_t ra[4];
        load_matrices_trans(ra,
                            a + ssd_piece(k * 16 + (lane & 7) + (lane >> 4) * 8, 2 * w + (lane >> 3 & 1)));
        #pragma unroll
        for (int j = 0; j < 4; j++)
            mma_pair_trans(d + 2 * j, ra, b + ssd_piece(k * 16 + (lane & 15), 2 * j + (lane >> 4)));
    }
}

// The same where the hardware can do better, sm_90: the four warps multiply together (wgmma), operands come
// straight from shared memory, and the warps go on meanwhile:
//   ssd_begin();  ssd_multiply_..();  ssd_end();  other work;  ssd_wait();  d is there
// `first`: = instead of +=. What warps write to shared memory becomes an operand by ssd_publish.
#if SSD_WGMMA
__device__ __forceinline__ void ssd_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void ssd_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT = 0> __device__ __forceinline__ void ssd_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
}
__device__ __forceinline__ void ssd_publish() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// the compiler must not use d before here
__device__ __forceinline__ void ssd_arrived(float (&d)[8][4]) {
    #pragma unroll
    for (int i = 0; i < 8; i++)
        asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]) :: "memory");
}
// a tile as operand: 1024 bytes from 8 rows to the next 8; bit 62: pieces in the order of ssd_piece. + 1: 16
// bytes further
__device__ __forceinline__ uint64_t ssd_operand(const bf16* tile) {
    const uint64_t address = (uint32_t)__cvta_generic_to_shared(tile);
    return address >> 4 | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
#define SSD_SUMS "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define SSD_WGMMA_64 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
#define SSD_SUMS4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SSD_SUMS16(i) SSD_SUMS4(i), SSD_SUMS4(i + 1), SSD_SUMS4(i + 2), SSD_SUMS4(i + 3)
#define SSD_SUMS32 SSD_SUMS16(0), SSD_SUMS16(4)
__device__ __forceinline__ void ssd_multiply_rows(float (&d)[8][4], const bf16* a, const bf16* b, bool first,
                                                  int) {
    #pragma unroll
    for (int k = 0; k < 4; k++)
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; " SSD_WGMMA_64 SSD_SUMS
                     ", %32, %33, p, 1, 1, 0, 0; }"
                     : SSD_SUMS32
                     : "l"(ssd_operand(a) + k * 2), "l"(ssd_operand(b) + k * 2),
                       "r"((int)!(first && k == 0)));
}
__device__ __forceinline__ void ssd_multiply_columns(float (&d)[8][4], const uint32_t (&a)[4][4],
                                                     const bf16* b, int) {
    #pragma unroll
    for (int k = 0; k < 4; k++)
        asm volatile(SSD_WGMMA_64 SSD_SUMS ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                     : SSD_SUMS32
                     : "r"(a[k][0]), "r"(a[k][1]), "r"(a[k][2]), "r"(a[k][3]),
                       "l"(ssd_operand(b) + k * 128));
}
__device__ __forceinline__ void ssd_multiply_lower(float (&d)[8][4], const bf16* a, const bf16* b, int) {
    #pragma unroll
    for (int k = 0; k < 4; k++)
        asm volatile(SSD_WGMMA_64 SSD_SUMS ", %32, %33, 1, 1, 1, 1, 1;"
                     : SSD_SUMS32
                     : "l"(ssd_operand(a) + k * 128), "l"(ssd_operand(b) + k * 128));
}
#else
__device__ __forceinline__ void ssd_begin() {}
__device__ __forceinline__ void ssd_end() {}
template <int LEFT = 0> __device__ __forceinline__ void ssd_wait() {}
__device__ __forceinline__ void ssd_publish() {}
__device__ __forceinline__ void ssd_arrived(float (&)[8][4]) {}
__device__ __forceinline__ void ssd_multiply_rows(float (&d)[8][4], const bf16* a, const bf16* b, bool first,
                                                  int w) {
    if (first) {
        #pragma unroll
        for (int i = 0; i < 8; i++) d[i][0] = d[i][1] = d[i][2] = d[i][3] = 0.0f;
    }
    ssd_mma_rows(d, a, b, w);
}
__device__ __forceinline__ void ssd_multiply_columns(float (&d)[8][4], const uint32_t (&a)[4][4],
                                                     const bf16* b, int steps) {
    ssd_mma_columns(d, a, b, steps);
}
__device__ __forceinline__ void ssd_multiply_lower(float (&d)[8][4], const bf16* a, const bf16* b, int w) {
    ssd_mma_lower(d, a, b, w);
}
#endif

// keeps the compiler from holding in registers, all the time, what follows quickly from x: the kernels below
// have none to spare
__device__ __forceinline__ void ssd_recompute(uint32_t& x) { asm volatile("" : "+r"(x)); }

// ssd_load_tile: starts the copy of 64 rows, of which `rows` exist, and 64 columns, of which `columns` exist
template <int THREADS>
__device__ __forceinline__ void ssd_load_tile(bf16* tile, const bf16* from, uint32_t ld, int rows,
                                              int columns, int thread) {
    const int r = thread / 8, c = thread % 8;
    bf16* to = tile + ssd_piece(r, c);                         // r + 16, r + 32 .. have the same place for c
    ssd_recompute(ld);
    #pragma unroll
    for (int i = 0; i < 64; i += THREADS / 8) {
        const bool inside = r + i < rows && c * 8 < columns;
        scan_copy16(to + i * 64, from + (inside ? (r + i) * ld + c * 8 : 0), inside);
    }
}

// SsdDecays: what the tokens of a chunk mean to one head
struct alignas(16) SsdDecays {
    float cs[SSD_TOKENS];
    float u[SSD_TOKENS];                          // cs_j - log2(dt_j): M_ij = (Ct_i . Bt_j) 2^(cs_i - u_j)
    float enter[SSD_TOKENS];                      // 2^cs_i; 0 in documents that begin in this chunk
    bf16 leave[SSD_TOKENS];                       // 2^(cs_63 - cs_j) dt_j; 0 in documents that end in it
    float pass;                                   // 2^cs_63; 0 if a document begins
    unsigned long long resets;                    // bit i: a document begins at token i
};

// ssd_decays: those of the chunk that begins at token t0 of sequence b, whose head has dt. By a whole warp:
// lane l has tokens l and l + 32.
__device__ __forceinline__ void ssd_decays(SsdDecays& k, const float* dt, float A2, const int* doc, size_t b,
                                           size_t t0, size_t T) {
    const uint32_t lane = threadIdx.x % WARP;
    float cs[2], dt_t[2];
    unsigned long long resets = 0;
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        const size_t t = t0 + i * 32 + lane;
        dt_t[i] = t < T ? dt[t] : 0.0f;
        const bool reset = doc && t < T && scan_resets_cuda(doc, b, t, T);
        resets |= (unsigned long long)__ballot_sync(0xffffffffu, reset) << 32 * i;
        cs[i] = fmaxf(A2 * dt_t[i], -256.0f);                  // 2^-256 is 0 in float
        #pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const float v = __shfl_up_sync(0xffffffffu, cs[i], step);
            if (lane >= step) cs[i] += v;
        }
    }
    cs[1] += __shfl_sync(0xffffffffu, cs[0], WARP - 1);
    const float last = __shfl_sync(0xffffffffu, cs[1], WARP - 1);
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t t = i * 32 + lane;
        k.cs[t] = cs[i];
        k.u[t] = cs[i] - log2_unit(dt_t[i]);
        k.enter[t] = resets & ((2ull << t) - 1) ? 0.0f : exp2_unit(cs[i]);
        k.leave[t] = from_float<bf16>(resets >> t >> 1 ? 0.0f : exp2_unit(last - cs[i]) * dt_t[i]);
    }
    if (lane == 0) {
        k.pass = resets ? 0.0f : exp2_unit(last);
        k.resets = resets;
    }
}

// ssd_cb_kernel: what the marching kernel needs, a block per chunk and group: cb = Ct_i . Bt_j in bf16, in
// the order in which its threads need them: for rows 16w.. and columns 16k.., k <= w, one pack of 8 per lane;
// and the decays of the group's heads, while Bt and Ct are on their way.
//   cb (B, chunks, G, 10, 32) packs   decays (B,H,chunks)
template <int NB>
__global__ void __launch_bounds__(4 * WARP)
ssd_cb_kernel(uint4* cb, SsdDecays* decays, const bf16* Bt, const bf16* Ct, size_t ldbc, const float* dt,
              const float* A_log, const int* doc, size_t T, size_t H, size_t G, size_t N, size_t chunks) {
    extern __shared__ __align__(128) char shared[];
    bf16 (*tile)[SSD_TILE] = (bf16 (*)[SSD_TILE])shared;       // Bt, Ct of 64 states, of the next 64, ..
    const int tid = threadIdx.x, lane = tid % WARP, w = tid / WARP;
    const size_t g = blockIdx.x % G, c = blockIdx.x / G % chunks, b = blockIdx.x / G / chunks;
    #pragma unroll
    for (int n = 0; n < NB; n++) {
        const size_t at = (b * T + c * SSD_TOKENS) * ldbc + g * N + n * 64;
        const int rows = (int)(T - c * SSD_TOKENS), columns = (int)N - n * 64;
        ssd_load_tile<128>(tile[2 * n], Bt + at, (uint32_t)ldbc, rows, columns, tid);
        ssd_load_tile<128>(tile[2 * n + 1], Ct + at, (uint32_t)ldbc, rows, columns, tid);
    }
    copy_async_commit();
    for (size_t h = g * (H / G) + w; h < (g + 1) * (H / G); h += 4)
        ssd_decays(decays[(b * H + h) * chunks + c], dt + (b * H + h) * T, scan_decay(A_log[h]), doc, b,
                   c * SSD_TOKENS, T);
    copy_async_wait(0);
    __syncthreads();
    float d[8][4] = {};
    #pragma unroll
    for (int n = 0; n < NB; n++) ssd_mma_rows(d, tile[2 * n + 1], tile[2 * n], w);
    cb += (size_t)blockIdx.x * SSD_CB + w * (w + 1) / 2 * WARP + lane;
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        const float *v = d[2 * k], *v8 = d[2 * k + 1];
        if (k <= w)
            cb[k * WARP] = make_uint4(scan_pack(v[0], v[1]), scan_pack(v[2], v[3]), scan_pack(v8[0], v8[1]),
                                      scan_pack(v8[2], v8[3]));
    }
}

// SsdShared: N up to 64 NB. The tiles come first: they start at multiples of 1024 bytes. Two stages: the next
// chunk arrives while this one is used.
enum { SSD_STAGES = 2 };
template <int NB> struct SsdShared {
    struct { bf16 Bt[NB][SSD_TILE], Ct[NB][SSD_TILE], x[SSD_TILE]; } stage[SSD_STAGES];
    bf16 S[NB][SSD_TILE];                         // rows: channels, columns: states
    bf16 y[SSD_TILE];                             // rows: tokens, on their way out
    SsdDecays decays[SSD_STAGES];                 // of the stages' chunks
    float skip[64];
    uint64_t full[SSD_STAGES], empty[SSD_STAGES]; // signals: a stage has arrived, is no longer needed
    uint64_t state_ready, state_read;             // S of the next chunk is there, has been used
};

// what the marching kernel needs, see ssd_forward_cuda
struct SsdForward {
    bf16 *y, *states;
    float* hT;
    const bf16* x;
    const bf16 *Bt, *Ct;
    const float *Dskip, *h0;
    const uint4* cb;
    const SsdDecays* decays;
    float *start, *decay;                         // of segments: see ssd_carry_kernel
    size_t ldx, ldbc, B, T, H, P, G, N, segments, each;        // each: chunks of a segment
    bool D_has_hdim;
};

// SsdPlace: the part of the work that this thread has
struct SsdPlace {
    int T, N, P, H;
    int h, p0, columns;                           // the slice: columns channels of head h, from p0
    int group, segment, begin, end, chunks;       // chunks begin..end-1 of `chunks`
    int thread, w, lane, g, tg;                   // thread of the group, warp, lane = 4g + tg
    size_t b, token;                              // sequence, its first token
};
__device__ __forceinline__ SsdPlace ssd_place(const SsdForward& p) {
    SsdPlace at;
    at.T = (int)p.T; at.N = (int)p.N; at.P = (int)p.P; at.H = (int)p.H;
    const int parts = (at.P + 63) / 64, slices = at.H * parts;         // slices of a head, of a sequence
    const int slice = (int)(blockIdx.x % slices);
    at.h = slice / parts;
    at.p0 = slice % parts * 64;
    at.columns = min(at.P - at.p0, 64);
    at.group = at.h * (int)p.G / at.H;
    at.b = blockIdx.x / slices % p.B;
    at.token = at.b * p.T;
    at.segment = (int)(blockIdx.x / slices / p.B);
    at.chunks = (at.T + SSD_TOKENS - 1) / SSD_TOKENS;
    at.begin = at.segment * (int)p.each;
    at.end = min(at.begin + (int)p.each, at.chunks);
    at.thread = threadIdx.x % 128;
    at.w = at.thread / WARP;
    at.lane = at.thread % WARP;
    at.g = at.lane / 4;
    at.tg = at.lane % 4;
    return at;
}

// ssd_forward_state: carries the state of a slice from chunk to chunk, in registers: S[n][i][..] are rows
// 16w + g and + 8, columns 64n + 8i + 2tg, +1.
template <int NB, bool ENDS>
__device__ __forceinline__ void ssd_forward_state(SsdShared<NB>& s, const SsdForward& p) {
    const SsdPlace at = ssd_place(p);
    const int w = at.w, g = at.g, tg = at.tg, r0 = w * 16 + g;
    float S[NB][8][4];
    // S for the next chunk, and every SSD_SPACING tokens for backward: a warp stores its own 16 rows
    auto publish = [&](int c) {
        const uint32_t to = ssd_piece(r0, 0) + 2 * tg;
        #pragma unroll
        for (int n = 0; n < NB; n++) {
            #pragma unroll
            for (int i = 0; i < 8; i++) {
                bf16* row = s.S[n] + (to ^ i << 3);
                *(uint32_t*)row = scan_pack(S[n][i][0], S[n][i][1]);
                *(uint32_t*)(row + 8 * 64) = scan_pack(S[n][i][2], S[n][i][3]);
            }
        }
        ssd_publish();
        scan_arrive_warp(&s.state_ready);
        if (!p.states || c % (SSD_SPACING / SSD_TOKENS) != 0) return;
        const int saved = (at.T + SSD_SPACING - 1) / SSD_SPACING, N = at.N;
        const size_t which = at.b * saved + c / (SSD_SPACING / SSD_TOKENS);
        bf16* save = p.states + ((which * at.H + at.h) * at.P + at.p0) * N;
        uint32_t lane = at.lane;
        ssd_recompute(lane);
        #pragma unroll
        for (int n = 0; n < NB; n++) {
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = w * 16 + i * 4 + lane / 8, q = lane % 8;
                if (r < at.columns && n * 64 + q * 8 < N)
                    *(uint4*)(save + r * N + n * 64 + q * 8) = *(uint4*)(s.S[n] + ssd_piece(r, q));
            }
        }
        __syncwarp();
    };

    // starts the copies of chunk c
    const bf16* Bt = p.Bt + at.token * p.ldbc + at.group * at.N;
    const bf16* Ct = p.Ct + at.token * p.ldbc + at.group * at.N;
    const bf16* x = p.x + at.token * p.ldx + at.h * at.P + at.p0;
    const SsdDecays* decays = p.decays + (at.b * at.H + at.h) * at.chunks;
    auto load = [&](int c) {
        const uint32_t ldbc = (uint32_t)p.ldbc, ldx = (uint32_t)p.ldx;
        uint32_t thread = threadIdx.x;
        ssd_recompute(thread);
        if (c < at.end) {
            const int i = c - at.begin, use = i / SSD_STAGES, rows = at.T - c * 64;
            auto& st = s.stage[i % SSD_STAGES];
            if (use > 0) scan_wait(&s.empty[i % SSD_STAGES], (use - 1) & 1);
            const bf16 *B_c = Bt + (size_t)c * 64 * ldbc, *C_c = Ct + (size_t)c * 64 * ldbc;
            #pragma unroll
            for (int n = 0; n < NB; n++) {
                ssd_load_tile<128>(st.Bt[n], B_c + n * 64, ldbc, rows, at.N - n * 64, thread);
                if (ENDS) continue;
                ssd_load_tile<128>(st.Ct[n], C_c + n * 64, ldbc, rows, at.N - n * 64, thread);
            }
            ssd_load_tile<128>(st.x, x + (size_t)c * 64 * ldx, ldx, rows, at.columns, thread);
            const int byte = thread * 16;
            char* to = (char*)&s.decays[i % SSD_STAGES] + byte;
            if (byte < (int)sizeof(SsdDecays)) scan_copy16(to, (const char*)(decays + c) + byte, true);
        }
        copy_async_commit();
    };
    #pragma unroll
    for (int i = 0; i < SSD_STAGES - 1; i++) load(at.begin + i);
    // h0, start and hT: two numbers of rows r0 and r0 + 8 at a time
    const size_t first = ((at.b * at.H + at.h) * at.P + at.p0) * at.N, states = p.B * p.H * p.P * p.N;
    const float* start = ENDS ? NULL : p.segments > 1 ? p.start + at.segment * states : p.h0;
    #pragma unroll
    for (int q = 0; q < 2; q++) {
        const float* from = start + first + (r0 + 8 * q) * at.N + 2 * tg;
        #pragma unroll
        for (int i = 0; i < 8 * NB; i++) {
            const bool inside = start && r0 + 8 * q < at.columns && i * 8 < at.N;
            const float2 v = inside ? *(const float2*)(from + i * 8) : make_float2(0.0f, 0.0f);
            S[i / 8][i % 8][2 * q] = v.x;
            S[i / 8][i % 8][2 * q + 1] = v.y;
        }
    }
    if (!ENDS) publish(at.begin);
    float decay = 1.0f;
    #pragma unroll 1
    for (int c = at.begin; c < at.end; c++) {
        const int i = c - at.begin;
        auto& st = s.stage[i % SSD_STAGES];
        const SsdDecays& k = s.decays[i % SSD_STAGES];
        copy_async_wait(SSD_STAGES - 2);
        ssd_publish();
        scan_arrive_warp(&s.full[i % SSD_STAGES]);
        scan_wait(&s.full[i % SSD_STAGES], i / SSD_STAGES & 1);
        uint32_t a[4][4];                                      // (leave x)^T, rows: channels, columns: tokens
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t r[4];
            load_matrices_trans(r, st.x + ssd_piece(j * 16 + (at.lane & 15), 2 * w + (at.lane >> 4)));
            const __nv_bfloat162 low = *(const __nv_bfloat162*)&k.leave[j * 16 + 2 * tg];
            const __nv_bfloat162 high = *(const __nv_bfloat162*)&k.leave[j * 16 + 8 + 2 * tg];
            *(__nv_bfloat162*)&a[j][0] = __hmul2(*(__nv_bfloat162*)&r[0], low);
            *(__nv_bfloat162*)&a[j][1] = __hmul2(*(__nv_bfloat162*)&r[2], low);
            *(__nv_bfloat162*)&a[j][2] = __hmul2(*(__nv_bfloat162*)&r[1], high);
            *(__nv_bfloat162*)&a[j][3] = __hmul2(*(__nv_bfloat162*)&r[3], high);
        }
        const float pass = k.pass;
        decay *= pass;
        #pragma unroll
        for (int q = 0; q < NB * 32; q++) S[q / 32][q / 4 % 8][q % 4] *= pass;
        ssd_begin();
        #pragma unroll
        for (int n = 0; n < NB; n++) ssd_multiply_columns(S[n], a, st.Bt[n], 4);
        ssd_end();
        load(c + SSD_STAGES - 1);
        ssd_wait();
        #pragma unroll
        for (int n = 0; n < NB; n++) ssd_arrived(S[n]);
        scan_arrive_warp(&s.empty[i % SSD_STAGES]);
        if (ENDS || c + 1 == at.end) continue;
        scan_wait(&s.state_read, i & 1);
        publish(c + 1);
    }
    if (ENDS && at.thread == 0 && at.p0 == 0) p.decay[((at.segment + 1) * p.B + at.b) * at.H + at.h] = decay;
    float* out = ENDS ? p.start + (at.segment + 1) * states : at.end == at.chunks ? p.hT : NULL;
    if (!out) return;
    #pragma unroll
    for (int q = 0; q < 2; q++) {
        float* to = out + first + (r0 + 8 * q) * at.N + 2 * tg;
        #pragma unroll
        for (int i = 0; i < 8 * NB; i++) {
            const float* v = &S[i / 8][i % 8][2 * q];
            if (r0 + 8 * q < at.columns && i * 8 < at.N) *(float2*)(to + i * 8) = make_float2(v[0], v[1]);
        }
    }
}

// ssd_weights: M, as the first operand of M x, from cb and the decays. This warp has rows 16w..; M[q] are
// columns 16q.., of which register e holds two: row g + 8 (e % 2), columns 8 (e / 2) + 2tg, +1.
__device__ __forceinline__ void ssd_weights(uint32_t (&M)[4][4], const uint4 (&cb)[4], const SsdDecays& k,
                                            int w, int g, int tg) {
    const int i0 = 16 * w + g;
    const float cs[2] = {k.cs[i0], k.cs[i0 + 8]};
    #pragma unroll
    for (int q = 0; q < 4; q++) {
        M[q][0] = M[q][1] = M[q][2] = M[q][3] = 0;
        if (q > w) continue;
        const uint32_t v[4] = {cb[q].x, cb[q].y, cb[q].z, cb[q].w};
        #pragma unroll
        for (int e = 0; e < 4; e++) {
            const float2 u = *(const float2*)&k.u[q * 16 + e / 2 * 8 + 2 * tg];
            float low = cs[e % 2] - u.x, high = cs[e % 2] - u.y;
            if (q == w && e != 1) {                            // on the diagonal: later tokens count 0
                if (e == 2 || 2 * tg > g) low = -INFINITY;
                if (e == 2 || 2 * tg + 1 > g) high = -INFINITY;
            }
            M[q][e] = scan_pack(scan_low(v[e]) * exp2_unit(low), scan_high(v[e]) * exp2_unit(high));
        }
    }
    if (!k.resets) return;
    int first[2];                                              // first token of the document of each row
    #pragma unroll
    for (int e = 0; e < 2; e++) {
        const unsigned long long before = k.resets & ((2ull << (i0 + 8 * e)) - 1);
        first[e] = before ? 63 - __clzll(before) : 0;
    }
    #pragma unroll
    for (int q = 0; q < 4; q++) {
        #pragma unroll
        for (int e = 0; e < 4; e++) {
            const int j = q * 16 + e / 2 * 8 + 2 * tg;
            M[q][e] &= j >= first[e % 2] ? 0xffffffffu : j + 1 == first[e % 2] ? 0xffff0000u : 0u;
        }
    }
}

// ssd_forward_y: y of a slice, chunk after chunk
template <int NB>
__device__ __forceinline__ void ssd_forward_y(SsdShared<NB>& s, const SsdForward& p) {
    const SsdPlace at = ssd_place(p);
    const int w = at.w, g = at.g, tg = at.tg, i0 = 16 * w + g, thread = at.thread;
    const uint4* cb = p.cb + ((at.b * at.chunks + at.begin) * p.G + at.group) * SSD_CB +
                      w * (w + 1) / 2 * WARP + at.lane;
    uint4 cb_q[4];
    auto fetch_cb = [&](int c) {
        #pragma unroll
        for (int q = 0; q < 4; q++) cb_q[q] = q <= w && c < at.end ? cb[q * WARP] : make_uint4(0, 0, 0, 0);
        cb += p.G * SSD_CB;
    };
    fetch_cb(at.begin);
    if (thread < 64)
        s.skip[thread] =
            thread < at.columns ? p.Dskip[p.D_has_hdim ? at.h * at.P + at.p0 + thread : at.h] : 0.0f;
    asm volatile("bar.sync 1, 128;" ::: "memory");             // a barrier of this group alone
    const float skip = s.skip[0];
    const int row = w * 16 + at.lane / 8, piece = at.lane % 8; // of y, when it is stored
    bf16* y = p.y + ((at.token + at.begin * 64 + row) * at.H + at.h) * at.P + at.p0 + piece * 8;
    #pragma unroll 1
    for (int c = at.begin; c < at.end; c++) {
        const int i = c - at.begin;
        auto& st = s.stage[i % SSD_STAGES];
        const SsdDecays& k = s.decays[i % SSD_STAGES];
        scan_wait(&s.full[i % SSD_STAGES], i / SSD_STAGES & 1);
        scan_wait(&s.state_ready, i & 1);
        float old[8][4], own[8][4] = {};                       // Ct S^T; M x
        ssd_begin();
        #pragma unroll
        for (int n = 0; n < NB; n++) ssd_multiply_rows(old, st.Ct[n], s.S[n], n == 0, w);
        ssd_end();
        uint32_t M[4][4];
        ssd_weights(M, cb_q, k, w, g, tg);
        fetch_cb(c + 1);
        ssd_begin();
        ssd_multiply_columns(own, M, st.x, w + 1);
        ssd_end();
        const float enter[2] = {k.enter[i0], k.enter[i0 + 8]};
        ssd_wait<1>();
        scan_arrive_warp(&s.state_read);
        ssd_wait();
        ssd_arrived(old);
        ssd_arrived(own);
        uint32_t x[4][4];                                      // the same tokens and channels
        uint32_t x_at = ssd_piece(w * 16 + (at.lane & 15), at.lane >> 4);
        ssd_recompute(x_at);
        #pragma unroll
        for (int j = 0; j < 4; j++) load_matrices(x[j], st.x + (x_at ^ j << 4));
        scan_arrive_warp(&s.empty[i % SSD_STAGES]);
        // out in whole rows, by way of shared memory
        uint32_t y_at = ssd_piece(i0, 0) + 2 * tg, ldy = at.H * at.P;
        ssd_recompute(y_at);
        ssd_recompute(ldy);
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 D = p.D_has_hdim ? *(float2*)&s.skip[j * 8 + 2 * tg] : make_float2(skip, skip);
            #pragma unroll
            for (int q = 0; q < 2; q++) {
                const uint32_t x_j = x[j / 2][j % 2 * 2 + q];
                const float low = fmaf(D.x, scan_low(x_j), own[j][2 * q]);
                const float high = fmaf(D.y, scan_high(x_j), own[j][2 * q + 1]);
                *(uint32_t*)(s.y + (y_at ^ j << 3) + q * 8 * 64) =
                    scan_pack(fmaf(enter[q], old[j][2 * q], low), fmaf(enter[q], old[j][2 * q + 1], high));
            }
        }
        __syncwarp();
        #pragma unroll
        for (int j = 0; j < 16; j += 4) {
            const uint4 v = *(uint4*)(s.y + ssd_piece(row + j, piece));
            if (c * 64 + row + j < at.T && piece * 8 < at.columns) *(uint4*)(y + j * ldy) = v;
        }
        y += 64 * ldy;
        __syncwarp();
    }
}

// ssd_forward_fast_kernel: y, states and hT, by two groups of four warps that work side by side: the first
// brings the chunks and carries the state, the second makes y. Four kinds of signals, in SsdShared,
// keep them in step. With ENDS only the first: the states after all segments but the last, if they began
// with 0, and the decays of the segments.
template <int NB, bool ENDS>
__global__ void __launch_bounds__((ENDS ? 1 : 2) * 128, NB <= 2 ? 2 : 1)
ssd_forward_fast_kernel(const __grid_constant__ SsdForward p) {
    extern __shared__ __align__(128) char shared[];
    SsdShared<NB>& s = *(SsdShared<NB>*)shared;
    if (threadIdx.x == 0) {
        for (int i = 0; i < SSD_STAGES; i++) {
            scan_signal_init(&s.full[i], 4);
            scan_signal_init(&s.empty[i], ENDS ? 4 : 8);
        }
        scan_signal_init(&s.state_ready, 4);
        scan_signal_init(&s.state_read, 4);
    }
    __syncthreads();
    if (ENDS || __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0) == 0) ssd_forward_state<NB, ENDS>(s, p);
    else ssd_forward_y(s, p);
}

// ssd_carry_kernel: the states before all segments; start (segments,B,H,P,N) holds, behind segment k - 1, the
// state that it leaves when it begins with 0; decay (segments,B,H) how much of the state before it is left.
//   start_0 = h0      start_k = start_k + decay_k start_(k-1)        a thread has 4 numbers of a state
__global__ void ssd_carry_kernel(float* start, const float* decay, const float* h0, size_t n, size_t size,
                                 size_t segments) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    float v[4] = {};
    if (h0) unpack(v, load_pack<4>(h0 + i));
    store_pack<4>(start + i, v);
    #pragma unroll 4
    for (size_t k = 1; k < segments; k++) {
        float added[4], a = decay[(k * n + i) / size];
        unpack(added, load_pack<4>(start + k * n + i));
        #pragma unroll
        for (int j = 0; j < 4; j++) v[j] = fmaf(a, v[j], added[j]);
        store_pack<4>(start + k * n + i, v);
    }
}

// --- launcher -----------------------------------------------------------------------------------------

static inline size_t ssd_chunks(size_t T) { return (T + SSD_TOKENS - 1) / SSD_TOKENS; }

// Where the heads of all sequences are too few to fill the chip, time is cut into segments as well: as many
// as make SSD_FILL blocks, none shorter than SSD_SEGMENT chunks. A first look at the segments,
// without y, finds the states that they begin with.
enum { SSD_FILL = 264, SSD_SEGMENT = 4 };
static inline size_t ssd_segments(size_t B, size_t T, size_t H, size_t P) {
    size_t chunks = ssd_chunks(T), segments = SSD_FILL / (B * H * ((P + 63) / 64));
    if (segments > chunks / SSD_SEGMENT) segments = chunks / SSD_SEGMENT;
    if (segments < 2) return 1;
    size_t each = (chunks + segments - 1) / segments;          // chunks of all segments but the last
    return (chunks + each - 1) / each;
}

// floats of forward's scratch: the products Ct . Bt; the decays of chunks; states and decays of segments
size_t ssd_forward_scratch_cuda(size_t B, size_t T, size_t H, size_t P, size_t G, size_t N) {
    size_t segments = ssd_segments(B, T, H, P);
    return B * ssd_chunks(T) * (G * SSD_CB * 4 + H * sizeof(SsdDecays) / 4) +
           (segments > 1 ? segments * B * H * (P * N + 1) : 0);
}

// false: the GPU has too little shared memory
template <int NB>
static inline bool ssd_launch_fast(const SsdForward& p, const float* dt, const float* A_log, const int* doc,
                                   cudaStream_t stream) {
    const size_t blocks = p.B * p.H * ((p.P + 63) / 64), chunks = ssd_chunks(p.T);
    const size_t tiles = 2 * NB * SSD_TILE * sizeof(bf16), shared = sizeof(SsdShared<NB>);
    const size_t n = p.B * p.H * p.P * p.N;
    int device = 0, most = 0;
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if ((size_t)most < shared) return false;
    scan_allow_shared(ssd_cb_kernel<NB>, tiles);
    ssd_cb_kernel<NB><<<(unsigned)(p.B * chunks * p.G), 4 * WARP, tiles, stream>>>(
        (uint4*)p.cb, (SsdDecays*)p.decays, p.Bt, p.Ct, p.ldbc, dt, A_log, doc, p.T, p.H, p.G, p.N, chunks);
    cudaCheck(cudaGetLastError());
    if (p.segments > 1) {
        auto ends = ssd_forward_fast_kernel<NB, true>;
        scan_allow_shared(ends, shared);
        ends<<<(unsigned)(blocks * (p.segments - 1)), 4 * WARP, shared, stream>>>(p);
        cudaCheck(cudaGetLastError());
        ssd_carry_kernel<<<(unsigned)((n / 4 + 255) / 256), 256, 0, stream>>>(p.start, p.decay, p.h0, n,
                                                                              p.P * p.N, p.segments);
        cudaCheck(cudaGetLastError());
    }
    auto kernel = ssd_forward_fast_kernel<NB, false>;
    scan_allow_shared(kernel, shared);
    kernel<<<(unsigned)(blocks * p.segments), 8 * WARP, shared, stream>>>(p);
    cudaCheck(cudaGetLastError());
    return true;
}

// false: not for the fast path
static bool ssd_forward_fast(SsdForward& p, const float* dt, const float* A_log, const int* doc,
                             float* scratch, cudaStream_t stream) {
    const size_t limit = (size_t)1 << 31, w = sizeof(bf16);
    if (p.P % 8 != 0 || p.N % 8 != 0 || p.N > 256 || p.B * p.T >= limit || 64 * p.ldx >= limit ||
        64 * p.ldbc >= limit || 64 * p.H * p.P >= limit || !is_aligned(p.x, 16, p.ldx * w) ||
        !is_aligned(p.Bt, 16, p.ldbc * w) || !is_aligned(p.Ct, 16, p.ldbc * w) || !is_aligned(p.y, 16, 16) ||
        !is_aligned(p.states, 16, 16) || !is_aligned(p.h0, 16, 16) || !is_aligned(p.hT, 16, 16) ||
        !is_aligned(scratch, 16, 16))
        return false;
    p.segments = ssd_segments(p.B, p.T, p.H, p.P);
    p.each = (ssd_chunks(p.T) + p.segments - 1) / p.segments;
    p.cb = (const uint4*)scratch;
    p.decays = (const SsdDecays*)(p.cb + p.B * ssd_chunks(p.T) * p.G * SSD_CB);
    p.start = (float*)(p.decays + p.B * ssd_chunks(p.T) * p.H);
    p.decay = p.start + p.segments * p.B * p.H * p.P * p.N;
    if (p.N > 128) return ssd_launch_fast<4>(p, dt, A_log, doc, stream);
    if (p.N > 64) return ssd_launch_fast<2>(p, dt, A_log, doc, stream);
    return ssd_launch_fast<1>(p, dt, A_log, doc, stream);
}

// ssd_forward_cuda: formula (S4), layouts at the top of this section.
//   y, states, hT written   states: NULL in inference   hT, h0: may be NULL, may be one array
//   doc: NULL, or ids of which only changes count; h0 belongs to document 0
//   scratch: ssd_forward_scratch_cuda() floats
template <typename X>
const char* ssd_forward_cuda(X* y, X* states, float* hT, const X* x, size_t ldx, const float* dt,
                             const float* A_log, const X* Bt, const X* Ct, size_t ldbc, const float* Dskip,
                             bool D_has_hdim, const float* h0, const int* doc, float* scratch, size_t B,
                             size_t T, size_t H, size_t P, size_t G, size_t N, cudaStream_t stream) {
    if constexpr (sizeof(X) == sizeof(bf16)) {         // results in float must be exact to float rounding
        SsdForward p = {y,   states, hT, x, Bt, Ct, Dskip, h0, NULL, NULL, NULL, NULL,
                        ldx, ldbc,   B,  T, H,  P,  G,     N,  1,    0,    D_has_hdim};
        if (ssd_forward_fast(p, dt, A_log, doc, scratch, stream)) return "fast";
    }
    size_t padded = (N + SSD_GROUP - 1) / SSD_GROUP * SSD_GROUP;
    size_t bytes = sizeof(SsdTile) + (2 * SSD_STEPS + SSD_CHANNELS) * padded * sizeof(float);
    scan_allow_shared(ssd_forward_kernel<X>, bytes);
    unsigned grid = (unsigned)(B * H * ((P + SSD_CHANNELS - 1) / SSD_CHANNELS));
    ssd_forward_kernel<X><<<grid, 4 * WARP, bytes, stream>>>(y, states, hT, x, ldx, dt, A_log, Bt, Ct, ldbc,
                                                             Dskip, D_has_hdim, h0, doc, T, H, P, G, N);
    cudaCheck(cudaGetLastError());
    return "general";
}

// --------------------------------------------------------------------------------------------------
// 4.12 State space duality (SSD): backward
//
// The gradients of 4.11, from dy = dLoss/dy and dhT = dLoss/dhT. Lambda_t = dLoss/dh_t (P x N per head):
//   Lambda_t = dy_t Ct_t^T + a_{t+1} Lambda_{t+1}
//   dx_t = dt_t Lambda_t Bt_t + Dskip dy_t     dBt_t = sum_h dt_t Lambda_t^T x_t     dCt_t = sum_h h_t^T dy_t
//   dalpha_t = a_t <Lambda_t, h_{t-1}>  (alpha_t = dt_t A)     ddt_t = x_t^T Lambda_t Bt_t + A dalpha_t
//   dA_log = A sum_t dt_t dalpha_t             dDskip = sum_t <dy_t, x_t>            dh0 = a_0 Lambda_0
// As products of matrices, over tiles of 64 tokens. cs_i: sum of alpha from the beginning of the tile up to
// token i; H: the state before the tile; Lambda: what the tokens after the tile add to the gradient of the
// state that leaves it; S_ij = <dy_i, x_j>, G_ij = <Ct_i, Bt_j>, L_ij = exp(cs_i - cs_j) for j <= i, else 0:
//   v_j = sum_i G_ij L_ij dy_i + exp(cs_end - cs_j) Lambda Bt_j
//   dx_j = dt_j v_j + Dskip dy_j      ddt_j = <v_j, x_j> + A dalpha_j      dG_ij = sum_h L_ij dt_j S_ij
//   dCt_i = sum_j dG_ij Bt_j + sum_h exp(cs_i) H^T dy_i
//   dBt_j = sum_i dG_ij Ct_i + sum_h exp(cs_end - cs_j) dt_j Lambda^T x_j
// alpha_m is a factor of every path from a token (or the state) before m to a token (or the state) at m or
// after. So dalpha_m is a sum over those pairs, W_ij = G_ij L_ij dt_j S_ij, and every one counts once:
//   dalpha_m = sum_{i >= m, j < m} W_ij + sum_{j < m} e_j + sum_{i >= m} f_i + exp(cs_end) <Lambda, H>
//   e_j = exp(cs_end - cs_j) dt_j <x_j, Lambda Bt_j>           f_i = exp(cs_i) <dy_i, H Ct_i>
// There is a shorter formula, sums of <y, dy> - dt ddt from m on; it subtracts nearly equal numbers and loses
// all digits where the decay is strong.
// Mamba-2 paper (arXiv 2405.21060), section 6; the sums over pairs: by hand. Oracle: ssd_recurrent_backward.
//
//   decays    of all tiles and heads
//   states    H and Lambda at every boundary between two tiles: a walk from a saved state to the right, and
//             one from the end to the left
//   tiles     everything else. A block owns one tile and walks through heads, so that the sums over heads
//             stay in its registers.
// Both as a general path (any shape, X = float or bf16, float arithmetic) and as a fast one (bf16, P 32, 64
// or 128, N 64 or 128, the tensor core). The states between tiles are scratch; to bound it, sequences are
// treated in rounds of SSD_ROUND tokens.

enum { SSD_SPAN = 64, SSD_PER_SAVED = SSD_SPACING / SSD_SPAN, SSD_ROUND = 16384 };
// log2 of a decay that is 0 in float. Nothing smaller is added to cs: its digits are needed for what follows
#define SSD_GONE -130.0f

// SsdTokens: the decays of a tile. from_i = exp(cs_i): what is left at i of the state before the tile, 0 when
// a document begins at i or before; to_j = exp(cs_end - cs_j): what is left after the tile of what j adds;
// all: from before the tile to after it. cs is in base 2.
struct alignas(16) SsdTokens {
    float cs[SSD_SPAN], dt[SSD_SPAN], from[SSD_SPAN], to[SSD_SPAN];
    float all, A2;
};

// ssd_begins: begin[i] = where in the tile the document of token i begins, -1: before it. By a whole warp.
__device__ __forceinline__ void ssd_begins(int* begin, const int* doc, size_t b, size_t t0, size_t T) {
    const int lane = threadIdx.x % WARP;
    int last = -1;
    #pragma unroll
    for (int k = 0; k < SSD_SPAN; k += WARP) {
        const size_t t = t0 + k + lane;
        const uint32_t resets = __ballot_sync(0xffffffffu, doc && t < T && scan_resets_cuda(doc, b, t, T));
        const uint32_t upto = resets & 0xffffffffu >> (WARP - 1 - lane);
        begin[k + lane] = upto ? k + 31 - __clz(upto) : last;
        if (resets) last = k + 31 - __clz(resets);
    }
    __syncwarp();
}

// ssd_tokens: fills *s from dt of tokens 2 lane, 2 lane + 1 (0 beyond the last token). By a whole warp.
__device__ __forceinline__ void ssd_tokens(SsdTokens* s, const int* begin, const float (&dt)[2], float A2) {
    const int lane = threadIdx.x % WARP, last = begin[SSD_SPAN - 1];
    const float a0 = fmaxf(dt[0] * A2, SSD_GONE), a1 = fmaxf(dt[1] * A2, SSD_GONE);
    float sum = a0 + a1;
    #pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        float left = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += left;
    }
    const float end = __shfl_sync(0xffffffffu, sum, WARP - 1), cs[2] = {sum - a1, sum};
    float from[2], to[2];
    #pragma unroll
    for (int k = 0; k < 2; k++) {
        const int i = 2 * lane + k;
        from[k] = begin[i] < 0 ? exp2_unit(cs[k]) : 0.0f;
        to[k] = i >= last ? exp2_unit(end - cs[k]) : 0.0f;
    }
    *(float2*)&s->cs[2 * lane] = make_float2(cs[0], cs[1]);
    *(float2*)&s->dt[2 * lane] = make_float2(dt[0], dt[1]);
    *(float2*)&s->from[2 * lane] = make_float2(from[0], from[1]);
    *(float2*)&s->to[2 * lane] = make_float2(to[0], to[1]);
    if (lane == 0) {
        s->all = last < 0 ? exp2_unit(end) : 0.0f;
        s->A2 = A2;
    }
}

// --- general path -------------------------------------------------------------------------------------

// ssd_states_kernel: REVERSE false: H, true: Lambda, at the tiles' boundaries. out (B,tiles,H,P,N): H before,
// Lambda after a tile. One thread per element of a state; walks to the right begin at every saved state, the
// one to the left at dhT (or NULL: 0) and ends with dh0 (or NULL).
//   rows (B,T,H,P), cols (B,T,G,N): x and Bt, or dy and Ct
template <typename X, bool REVERSE>
__global__ void __launch_bounds__(256)
ssd_states_kernel(float* out, float* dh0, const X* states, const float* dhT, const X* rows, size_t ldr,
                  const X* cols, size_t ldc, const float* dt, const float* A_log, const int* doc, size_t T,
                  size_t H, size_t P, size_t G, size_t N) {
    const size_t i = (size_t)blockIdx.x * 256 + threadIdx.x, h = blockIdx.y, p = i / N, n = i % N;
    const size_t tiles = (T + SSD_SPAN - 1) / SSD_SPAN, saved = (T + SSD_SPACING - 1) / SSD_SPACING;
    const size_t walks = REVERSE ? 1 : saved, b = blockIdx.z / walks, walk = blockIdx.z % walks;
    if (i >= P * N) return;
    const float A2 = scan_decay(A_log[h]);
    const float* dt_h = dt + (b * H + h) * T;
    const X *row = rows + b * T * ldr + h * P + p, *col = cols + b * T * ldc + h * G / H * N + n;
    out += (b * tiles * H + h) * P * N + i;
    if (REVERSE) {
        float s = dhT ? dhT[(b * H + h) * P * N + i] : 0.0f;
        for (size_t c = tiles; c-- > 0;) {
            out[c * H * P * N] = s;
            for (size_t t = c + 1 < tiles ? (c + 1) * SSD_SPAN : T; t-- > c * SSD_SPAN;) {
                s = fmaf(to_float(row[t * ldr]), to_float(col[t * ldc]), s);
                s = scan_resets_cuda(doc, b, t, T) ? 0.0f : s * exp2f(dt_h[t] * A2);
            }
        }
        if (dh0) dh0[(b * H + h) * P * N + i] = s;
        return;
    }
    float s = to_float(states[((b * saved + walk) * H + h) * P * N + i]);
    for (size_t c = walk * SSD_PER_SAVED; c < tiles && c < (walk + 1) * SSD_PER_SAVED; c++) {
        out[c * H * P * N] = s;
        for (size_t t = c * SSD_SPAN; t < (c + 1) * SSD_SPAN && t < T; t++) {
            float a = scan_resets_cuda(doc, b, t, T) ? 0.0f : exp2f(dt_h[t] * A2);
            s = fmaf(dt_h[t] * to_float(row[t * ldr]), to_float(col[t * ldc]), a * s);
        }
    }
}

// ssd_backward_kernel: one block per tile, head and sequence, the formulas above. dBC (B,T,H,2N): what the
// head adds to dBt and dCt. sums (B tiles, n_sums): H sums for dA_log, then H (or H P) for dDskip.
struct alignas(16) SsdBackward {
    float a[16][SSD_SPAN + 4], b[16][SSD_SPAN + 4];            // a slab of the operands of ssd_product
    float GL[SSD_SPAN][SSD_SPAN + 1];                          // L, then G L
    float dG[SSD_SPAN][SSD_SPAN + 1];                          // L dt S
    float W[SSD_SPAN][SSD_SPAN + 1];                           // then its sums along a row
    float dt[SSD_SPAN], alpha[SSD_SPAN], from[SSD_SPAN], to[SSD_SPAN];
    float e[SSD_SPAN], f[SSD_SPAN], direct[SSD_SPAN], dalpha[SSD_SPAN], part[8];
    float all;
};

// ssd_product: acc += a b, 64 x K times K x 64, in float, by a block of 256 threads. a(i,k), b(k,j): the
// operands' elements. Thread t has rows i = 4 (t / 16) .. + 3, columns j = 4 (t % 16) .. + 3.
template <typename A, typename B>
__device__ __forceinline__ void ssd_product(float (&acc)[4][4], SsdBackward& sh, int K, A a, B b) {
    const int tid = threadIdx.x;
    for (int k0 = 0; k0 < K; k0 += 16) {
        __syncthreads();
        #pragma unroll
        for (int i = tid; i < 16 * SSD_SPAN; i += 256) {
            sh.a[i % 16][i / 16] = k0 + i % 16 < K ? a(i / 16, k0 + i % 16) : 0.0f;
            sh.b[i / 64][i % 64] = k0 + i / 64 < K ? b(k0 + i / 64, i % 64) : 0.0f;
        }
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < 16; k++) {
            float u[4], v[4];
            *(float4*)u = *(const float4*)&sh.a[k][4 * (tid / 16)];
            *(float4*)v = *(const float4*)&sh.b[k][4 * (tid % 16)];
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                #pragma unroll
                for (int j = 0; j < 4; j++) acc[i][j] = fmaf(u[i], v[j], acc[i][j]);
            }
        }
    }
}

// sums[i] += sum_j acc_ij v(i,j)
template <typename V>
__device__ __forceinline__ void ssd_row_dots(float* sums, const float (&acc)[4][4], V v) {
    const int i0 = 4 * (threadIdx.x / 16), j0 = 4 * (threadIdx.x % 16);
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        float sum = 0.0f;
        #pragma unroll
        for (int j = 0; j < 4; j++) sum = fmaf(acc[i][j], v(i0 + i, j0 + j), sum);
        #pragma unroll
        for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (j0 == 0) sums[i0 + i] += sum;
    }
}

template <typename X>
__global__ void __launch_bounds__(256)
ssd_backward_kernel(X* dx, size_t lddx, float* ddt, float* dBC, float* sums, size_t n_sums,
                    const float* before, const float* after, const X* dy, const X* x, size_t ldx,
                    const float* dt, const float* A_log, const X* Bt, const X* Ct, size_t ldbc,
                    const float* Dskip, bool D_has_hdim, const int* doc, size_t T, size_t H, size_t P,
                    size_t G, size_t N) {
    extern __shared__ __align__(128) char shared[];
    SsdBackward& sh = *(SsdBackward*)shared;
    const int tid = threadIdx.x, lane = tid % WARP, w = tid / WARP, i0 = 4 * (tid / 16), j0 = 4 * (tid % 16);
    const size_t tiles = (T + SSD_SPAN - 1) / SSD_SPAN, b = blockIdx.x / tiles;
    const size_t t0 = blockIdx.x % tiles * SSD_SPAN, h = blockIdx.y, E = H * P;
    const int count = T - t0 < SSD_SPAN ? (int)(T - t0) : SSD_SPAN;
    const float A2 = scan_decay(A_log[h]);
    const X *x_h = x + (b * T + t0) * ldx + h * P, *dy_h = dy + (b * T + t0) * E + h * P;
    const size_t at_bc = (b * T + t0) * ldbc + h * G / H * N;
    const X *Bt_h = Bt + at_bc, *Ct_h = Ct + at_bc;
    X* dx_h = dx + (b * T + t0) * lddx + h * P;
    before += (blockIdx.x * H + h) * P * N;
    after += (blockIdx.x * H + h) * P * N;
    dBC += ((b * T + t0) * H + h) * 2 * N;
    sums += blockIdx.x * n_sums;
    // elements: token i, channel p or state n; 0 beyond the last one
    auto x_at = [&](int i, size_t p) { return i < count && p < P ? to_float(x_h[i * ldx + p]) : 0.0f; };
    auto dy_at = [&](int i, size_t p) { return i < count && p < P ? to_float(dy_h[i * E + p]) : 0.0f; };
    auto B_at = [&](int i, size_t n) { return i < count && n < N ? to_float(Bt_h[i * ldbc + n]) : 0.0f; };
    auto C_at = [&](int i, size_t n) { return i < count && n < N ? to_float(Ct_h[i * ldbc + n]) : 0.0f; };
    auto H_at = [&](size_t p, size_t n) { return p < P && n < N ? before[p * N + n] : 0.0f; };
    auto lambda_at = [&](size_t p, size_t n) { return p < P && n < N ? after[p * N + n] : 0.0f; };

    if (tid < SSD_SPAN) {
        sh.dt[tid] = tid < count ? dt[(b * H + h) * T + t0 + tid] : 0.0f;
        // a document that begins: more than any sum of other decays
        sh.alpha[tid] = tid < count && scan_resets_cuda(doc, b, t0 + tid, T) ? -FLT_MAX : sh.dt[tid] * A2;
        sh.e[tid] = sh.f[tid] = sh.direct[tid] = 0.0f;
    }
    __syncthreads();
    if (tid < SSD_SPAN) {                                      // sums that begin at token tid: no differences
        float sum = 0.0f;
        for (int i = 0; i < tid; i++) sh.GL[i][tid] = 0.0f;
        for (int i = tid; i < SSD_SPAN; i++) {
            if (i > tid) sum += sh.alpha[i];
            sh.GL[i][tid] = exp2f(sum);
        }
        sh.to[tid] = exp2f(sum);
        sum = 0.0f;
        for (int i = 0; i <= tid; i++) sum += sh.alpha[i];
        sh.from[tid] = exp2f(sum);
        if (tid == SSD_SPAN - 1) sh.all = exp2f(sum);
    }
    float S[4][4] = {}, Gram[4][4] = {};
    ssd_product(S, sh, (int)P, dy_at, [&](int p, int j) { return x_at(j, p); });
    ssd_product(Gram, sh, (int)N, C_at, [&](int n, int j) { return B_at(j, n); });
    #pragma unroll
    for (int r = 0; r < 4; r++) {
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            const int i = i0 + r, j = j0 + k;
            const float L = sh.GL[i][j];
            sh.dG[i][j] = L * sh.dt[j] * S[r][k];
            sh.GL[i][j] = L * Gram[r][k];
            sh.W[i][j] = j < i ? L * Gram[r][k] * sh.dt[j] * S[r][k] : 0.0f;
        }
    }
    for (size_t p0 = 0; p0 < P; p0 += SSD_SPAN) {              // rows j: v, <v, x>, e, dx
        float v[4][4] = {};
        ssd_product(v, sh, (int)N, B_at, [&](int n, int p) { return lambda_at(p0 + p, n); });
        #pragma unroll
        for (int r = 0; r < 4; r++) {
            #pragma unroll
            for (int k = 0; k < 4; k++) v[r][k] *= sh.to[i0 + r];
        }
        ssd_row_dots(sh.e, v, [&](int j, int p) { return sh.dt[j] * x_at(j, p0 + p); });
        ssd_product(v, sh, SSD_SPAN, [&](int j, int i) { return sh.GL[i][j]; },
                    [&](int i, int p) { return dy_at(i, p0 + p); });
        ssd_row_dots(sh.direct, v, [&](int j, int p) { return x_at(j, p0 + p); });
        #pragma unroll
        for (int r = 0; r < 4; r++) {
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                const int j = i0 + r;
                const size_t p = p0 + j0 + k;
                if (j >= count || p >= P) continue;
                const float D = Dskip[D_has_hdim ? h * P + p : h];
                dx_h[j * lddx + p] = from_float<X>(fmaf(sh.dt[j], v[r][k], D * dy_at(j, p)));
            }
        }
    }
    for (size_t n0 = 0; n0 < N; n0 += SSD_SPAN) {              // dCt, f; dBt
        float dC[4][4] = {}, dB[4][4] = {};
        ssd_product(dC, sh, (int)P, dy_at, [&](int p, int n) { return H_at(p, n0 + n); });
        ssd_product(dB, sh, (int)P, x_at, [&](int p, int n) { return lambda_at(p, n0 + n); });
        #pragma unroll
        for (int r = 0; r < 4; r++) {
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                dC[r][k] *= sh.from[i0 + r];
                dB[r][k] *= sh.to[i0 + r] * sh.dt[i0 + r];
            }
        }
        ssd_row_dots(sh.f, dC, [&](int i, int n) { return C_at(i, n0 + n); });
        ssd_product(dC, sh, SSD_SPAN, [&](int i, int j) { return sh.dG[i][j]; },
                    [&](int j, int n) { return B_at(j, n0 + n); });
        ssd_product(dB, sh, SSD_SPAN, [&](int j, int i) { return sh.dG[i][j]; },
                    [&](int i, int n) { return C_at(i, n0 + n); });
        #pragma unroll
        for (int r = 0; r < 4; r++) {
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                const size_t n = n0 + j0 + k;
                if (i0 + r >= count || n >= N) continue;
                dBC[(i0 + r) * H * 2 * N + n] = dB[r][k];
                dBC[(i0 + r) * H * 2 * N + N + n] = dC[r][k];
            }
        }
    }
    float through = 0.0f;
    for (size_t i = tid; i < P * N; i += 256) through = fmaf(before[i], after[i], through);
    through = warp_sum(through);
    if (lane == 0) sh.part[w] = through;
    __syncthreads();
    if (tid < SSD_SPAN) {                                      // W_ij := sum of W_i0 .. W_i,j-1
        float sum = 0.0f;
        for (int j = 0; j <= tid; j++) {
            float v = sh.W[tid][j];
            sh.W[tid][j] = sum;
            sum += v;
        }
    }
    __syncthreads();
    if (tid < SSD_SPAN) {
        float sum = 0.0f;
        for (int k = 0; k < 8; k++) sum += sh.part[k];
        sum *= sh.all;
        for (int j = 0; j < tid; j++) sum += sh.e[j];
        for (int i = tid; i < SSD_SPAN; i++) sum += sh.f[i] + sh.W[i][tid];
        sh.dalpha[tid] = sum;
        if (tid < count) ddt[(b * H + h) * T + t0 + tid] = fmaf(A2 * SCAN_LN2, sum, sh.direct[tid]);
    }
    __syncthreads();
    if (tid == 0) {
        float sum = 0.0f;
        for (int j = 0; j < SSD_SPAN; j++) sum = fmaf(sh.dt[j], sh.dalpha[j], sum);
        sums[h] = A2 * SCAN_LN2 * sum;
    }
    float skip = 0.0f;                                         // dDskip
    for (size_t p = tid; p < P; p += 256) {
        float sum = 0.0f;
        for (int j = 0; j < count; j++) sum = fmaf(dy_at(j, p), x_at(j, p), sum);
        if (D_has_hdim) sums[H + h * P + p] = sum;
        skip += sum;
    }
    if (D_has_hdim) return;
    skip = warp_sum(skip);
    if (lane == 0) sh.part[w] = skip;
    __syncthreads();
    if (tid > 0) return;
    for (int k = 1; k < 8; k++) skip += sh.part[k];
    sums[H + h] = skip;
}

// ssd_sum_parts_kernel: dBt, dCt (written) of M tokens, the sum of n_parts parts of 2N numbers per token and
// group, in order
template <typename X>
__global__ void __launch_bounds__(256)
ssd_sum_parts_kernel(X* dBt, X* dCt, size_t lddbc, const float* parts, size_t n_parts, size_t part_stride,
                     size_t token_stride, size_t group_stride, size_t M, size_t G, size_t N) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= M * G * 2 * N) return;
    size_t k = i % (2 * N), g = i / (2 * N) % G, m = i / (2 * N) / G;
    parts += m * token_stride + g * group_stride + k;
    float sum = 0.0f;
    for (size_t p = 0; p < n_parts; p++) sum += parts[p * part_stride];
    X* to = k < N ? dBt + m * lddbc + g * N + k : dCt + m * lddbc + g * N + k - N;
    *to = from_float<X>(sum);
}

// --- fast path: decays --------------------------------------------------------------------------------

// ssd_tokens_kernel: the decays of n tiles, out (B,H,tiles). A warp each.
__global__ void __launch_bounds__(4 * WARP)
ssd_tokens_kernel(SsdTokens* out, const float* dt, const float* A_log, const int* doc, size_t T, size_t H,
                  size_t n) {
    __shared__ int begin[4][SSD_SPAN];
    const int lane = threadIdx.x % WARP, w = threadIdx.x / WARP;
    const size_t i = (size_t)blockIdx.x * 4 + w, tiles = (T + SSD_SPAN - 1) / SSD_SPAN;
    if (i >= n) return;
    const size_t b = i / tiles / H, t = i % tiles * SSD_SPAN + 2 * lane;
    dt += i / tiles * T;
    const float dt_t[2] = {t < T ? dt[t] : 0.0f, t + 1 < T ? dt[t + 1] : 0.0f};
    ssd_begins(begin[w], doc, b, i % tiles * SSD_SPAN, T);
    ssd_tokens(out + i, begin[w], dt_t, scan_decay(A_log[i / tiles % H]));
}

// starts the copy of one into shared memory, by a block of 65 threads or more
__device__ __forceinline__ void ssd_load_tokens(SsdTokens* to, const SsdTokens* from) {
    const int i = threadIdx.x * 16;
    if (i < (int)sizeof(SsdTokens)) scan_copy16((char*)to + i, (const char*)from + i, true);
}

// --- fast path: states --------------------------------------------------------------------------------

// where H before, or Lambda after, tile c of sequence b is: H only between two saved ones
static __device__ __forceinline__ size_t ssd_slot(bool lambda, size_t b, size_t c, size_t tiles) {
    const size_t saved = (tiles + SSD_PER_SAVED - 1) / SSD_PER_SAVED;
    return lambda ? b * tiles + c : b * (tiles - saved) + c - c / SSD_PER_SAVED - 1;
}

// where the values r, c and r, c + 1 of a tile are, c even
__device__ __forceinline__ uint32_t* ssd_pair(bf16* tile, int r, int c) {
    return (uint32_t*)(tile + ssd_piece(r, c / 8) + c % 8);
}

// The walks go 64 tokens at a time; a state has as many warps as 16 rows, and stays in their registers, all N
// columns of them. Two stages, so that three blocks share a processor: 0.085 ms; two blocks of three stages:
// 0.087 (H200, B8 T2048 H24 P64 N128, bf16, cold cache).
enum { SSD_WALK_STAGES = 2, SSD_WALK_BLOCKS = 3 };
template <int P, int N> struct SsdWalkShared {
    enum { PB = (P + 63) / 64, NB = N / 64 };                  // 64 x 64 pieces of a state
    bf16 rows[SSD_WALK_STAGES][PB][SSD_TILE], cols[SSD_WALK_STAGES][NB][SSD_TILE];
    bf16 out[PB][NB][SSD_TILE];                          // 16 rows per warp, for stores of whole rows
    SsdTokens tokens[SSD_WALK_STAGES];
};

// SsdWalks: what the walks need. Walks to the left begin at dhT (or NULL: 0) and cover `each` pieces of 64
// tokens. Where that is less than a sequence they need what comes from the right, and are made twice:
//   LOCAL true     write local (B,walks,H,P,N), the state after the walk's first piece as if nothing came
//                  from the right, and decays (B,walks,H), from the walk's end to its beginning
//   LOCAL false    begin with what these make
struct SsdWalks {
    bf16 *before, *after;
    float *dh0, *local, *decays;                               // local NULL: one walk per sequence
    const bf16 *states, *x, *dy, *Bt, *Ct;
    const float* dhT;
    const SsdTokens* tokens;
    size_t ldx, ldbc, T, H, G;
    int lefts, walks, each, saved;                             // lefts: blocks that walk to the left
};

// ssd_walk: ssd_states_kernel for the tensor core; `block`: its number among the blocks of this direction
template <int P, int N, bool REVERSE, bool LOCAL>
__device__ __forceinline__ void ssd_walk(const SsdWalks& a, SsdWalkShared<P, N>& sh, int block) {
    enum { PB = (P + 63) / 64, NB = N / 64, THREADS = 128 * PB };
    const int lane = threadIdx.x % WARP, g = lane >> 2, q = lane & 3;
    const int W = __shfl_sync(0xffffffffu, (int)threadIdx.x / WARP, 0), w = W % 4, own = W / 4;
    const int kr = (lane & 7) + (lane >> 4) * 8, kc = lane >> 3 & 1;
    const int walks = REVERSE ? a.walks : a.saved, each = REVERSE ? a.each : SSD_SPACING / 64;
    const int walk = block % walks, pieces = (int)((a.T + 63) / 64);
    const size_t h = block / walks % a.H, b = block / walks / a.H, T = a.T, H = a.H;
    const int first = walk * each, end = min(first + each, pieces);
    // pieces to walk through: not the last one, unless somebody wants what is behind it
    const bool to_h0 = REVERSE && !LOCAL && first == 0 && a.dh0;
    const int steps = end - first - !(LOCAL || to_h0);
    const SsdTokens* tokens = a.tokens + (b * H + h) * pieces;
    const uint32_t ldr = (uint32_t)(REVERSE ? H * P : a.ldx), ldc = (uint32_t)a.ldbc;
    const bf16* rows = (REVERSE ? a.dy + b * T * ldr : a.x + b * T * ldr) + h * P;
    const bf16* cols = (REVERSE ? a.Ct : a.Bt) + b * T * ldc + h * a.G / H * N;
    auto piece_of = [&](int k) { return REVERSE ? end - 1 - k : first + k; };
    auto load = [&](int k) {
        if (k < steps) {
            const size_t t0 = (size_t)piece_of(k) * 64;
            const int count = (int)(T - t0 < 64 ? T - t0 : 64), stage = k % SSD_WALK_STAGES;
            #pragma unroll
            for (int p = 0; p < PB; p++)
                ssd_load_tile<THREADS>(sh.rows[stage][p], rows + t0 * ldr + 64 * p, ldr, count,
                                       P - 64 * p, threadIdx.x);
            #pragma unroll
            for (int n = 0; n < NB; n++)
                ssd_load_tile<THREADS>(sh.cols[stage][n], cols + t0 * ldc + 64 * n, ldc, count,
                                       64, threadIdx.x);
            ssd_load_tokens(&sh.tokens[stage], tokens + piece_of(k));
        }
        copy_async_commit();
    };
    #pragma unroll
    for (int k = 0; k < SSD_WALK_STAGES - 1; k++) load(k);

    float S[NB][8][4], decay = 1.0f;  // rows r0, r0 + 8, columns 64 n + 8 i + 2 q, + 1
    const int r0 = 64 * own + 16 * w + g;
    const size_t PN = P * N, mine = (size_t)r0 * N + 2 * q;
    const bool inside = P >= 64 || r0 < P;                     // for P < 64: the other rows are 0
    #pragma unroll
    for (int i = 0; i < N / 8; i++) {
        float* s = S[i / 8][i % 8];
        s[0] = s[1] = s[2] = s[3] = 0.0f;
        if (REVERSE || !inside) continue;
        const bf16* from = a.states + ((b * a.saved + walk) * H + h) * PN + mine + 8 * i;
        const uint32_t v0 = *(const uint32_t*)from, v1 = *(const uint32_t*)(from + 8 * N);
        s[0] = scan_low(v0); s[1] = scan_high(v0); s[2] = scan_low(v1); s[3] = scan_high(v1);
    }
    for (int k = LOCAL || !a.local ? walk : walks - 1; REVERSE && k >= walk && inside; k--) {
        // dhT enters the last walk; every other one gets what the one to its right leaves
        const bool start = k == walk;
        if (start && (walk < walks - 1 || !a.dhT)) break;
        const float* from = mine + (start ? a.dhT + (b * H + h) * PN
                                          : a.local + ((b * walks + k) * H + h) * PN);
        const float keep = start ? 0.0f : a.decays[(b * walks + k) * H + h];
        #pragma unroll
        for (int i = 0; i < N / 8; i++) {
            float* s = S[i / 8][i % 8];
            const float2 v0 = *(const float2*)(from + 8 * i), v1 = *(const float2*)(from + 8 * N + 8 * i);
            s[0] = fmaf(keep, s[0], v0.x); s[1] = fmaf(keep, s[1], v0.y);
            s[2] = fmaf(keep, s[2], v1.x); s[3] = fmaf(keep, s[3], v1.y);
        }
    }

    auto store = [&](int c) {
        #pragma unroll
        for (int i = 0; i < N / 8; i++) {
            const float* s = S[i / 8][i % 8];
            *ssd_pair(sh.out[own][i / 8], 16 * w + g, i % 8 * 8 + 2 * q) = scan_pack(s[0], s[1]);
            *ssd_pair(sh.out[own][i / 8], 16 * w + g + 8, i % 8 * 8 + 2 * q) = scan_pack(s[2], s[3]);
        }
        __syncwarp();
        bf16* to = (REVERSE ? a.after : a.before) + (ssd_slot(REVERSE, b, c, pieces) * H + h) * PN;
        #pragma unroll
        for (int v = lane; v < 16 * N / 8; v += WARP) {
            const int row = 16 * w + v / (N / 8), col = v % (N / 8) * 8;
            if (P < 64 && row >= P) continue;
            scan_store16(to + (64 * own + row) * N + col,
                         *(const uint4*)ssd_pair(sh.out[own][col / 64], row, col % 64));
        }
        __syncwarp();
    };
    #pragma unroll 1
    for (int k = 0; k < steps; k++) {
        const int c = piece_of(k), stage = k % SSD_WALK_STAGES;
        if (REVERSE && !LOCAL) store(c);
        copy_async_wait(SSD_WALK_STAGES - 2);
        ssd_publish();
        __syncthreads();                                       // the piece and its decays are there
        load(k + SSD_WALK_STAGES - 1);
        const SsdTokens& tk = sh.tokens[stage];
        const float all = tk.all;
        if (LOCAL) decay *= all;
        uint32_t m[4][4];                                      // rows of the state, columns: 16 tokens each
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            load_matrices_trans(m[i], sh.rows[stage][own] + ssd_piece(16 * i + kr, 2 * w + kc));
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                const int t = 16 * i + 8 * (j / 2) + 2 * q;    // what is left of tokens t, t + 1 at the end
                float2 weight = *(const float2*)&(REVERSE ? tk.from : tk.to)[t];
                const float2 dt_t = *(const float2*)&tk.dt[t];
                if (!REVERSE) weight = make_float2(weight.x * dt_t.x, weight.y * dt_t.y);
                m[i][j] = scan_pack(scan_low(m[i][j]) * weight.x, scan_high(m[i][j]) * weight.y);
            }
        }
        #pragma unroll
        for (int i = 0; i < N / 8; i++) {
            float* s = S[i / 8][i % 8];
            s[0] *= all; s[1] *= all; s[2] *= all; s[3] *= all;
        }
        ssd_begin();
        #pragma unroll
        for (int n = 0; n < NB; n++) ssd_multiply_columns(S[n], m, sh.cols[stage][n], 4);
        ssd_end();
        ssd_wait();
        #pragma unroll
        for (int n = 0; n < NB; n++) ssd_arrived(S[n]);
        if (!REVERSE) store(c + 1);
    }
    if (REVERSE && !LOCAL && steps < end - first) store(first);
    if ((LOCAL || to_h0) && inside) {
        float* to = (LOCAL ? a.local + ((b * walks + walk) * H + h) * PN : a.dh0 + (b * H + h) * PN) + mine;
        #pragma unroll
        for (int i = 0; i < N / 8; i++) {
            const float* s = S[i / 8][i % 8];
            *(float2*)(to + 8 * i) = make_float2(s[0], s[1]);
            *(float2*)(to + 8 * N + 8 * i) = make_float2(s[2], s[3]);
        }
    }
    if (LOCAL && threadIdx.x == 0) a.decays[(b * walks + walk) * H + h] = decay;
}

template <int P, int N>
__global__ void __launch_bounds__(P <= 64 ? 128 : 256)
ssd_walk_local_kernel(const __grid_constant__ SsdWalks a) {
    extern __shared__ __align__(1024) char tile_shared[];
    ssd_walk<P, N, true, true>(a, *(SsdWalkShared<P, N>*)tile_shared, blockIdx.x);
}
// both directions: the walks to the left take long and begin first, the short ones fill up
template <int P, int N>
__global__ void __launch_bounds__(P <= 64 ? 128 : 256, P <= 64 ? SSD_WALK_BLOCKS : 1)
ssd_walk_kernel(const __grid_constant__ SsdWalks a) {
    extern __shared__ __align__(1024) char tile_shared[];
    SsdWalkShared<P, N>& sh = *(SsdWalkShared<P, N>*)tile_shared;
    if ((int)blockIdx.x < a.lefts) ssd_walk<P, N, true, false>(a, sh, blockIdx.x);
    else ssd_walk<P, N, false, false>(a, sh, blockIdx.x - a.lefts);
}

// --- fast path: tiles ---------------------------------------------------------------------------------
// A block owns one tile of one sequence and the heads of one group, or of a part of it. Two groups of four
// warps work side by side, warp w of a group on tokens 16w..16w+15. For every head, by the products of 4.11:
//   both:   S = dy x^T, and of it dG, G L and sums of W, 16 x 16 pairs at a time; rows j have those on the
//           diagonal, so that no warp has more than three before G L is there: 0.259 ms in all, not 0.265
//   rows i: Ct H^T, for f; dCt += (from dy) H; <Lambda, H>
//   rows j: Bt Lambda^T, for e and v; dBt += (to dt x) Lambda; v += (G L)^T dy; dx
// The sums over heads stay: dCt and dBt in the registers of their group, dG in shared memory, each value with
// the thread that adds to it. G is the same for all heads of the group. Two blocks share a processor: one
// works while the other waits for the arrays of its next head (48 KB). One group that does both has 128
// registers for dBt and dCt alone and half as many warps: its best version took 0.211 ms instead of 0.164
// (H200, B8 T2048 H24 P64 N128, bf16, cold cache).
// Sums over pairs: what lies inside the warp's 16 tokens is summed as the formula says. Of the pairs between
// two warps only sums along rows and columns of W count.

template <int P, int N> struct SsdBackwardShared {             // 64 x 64 pieces of all matrices
    enum { PB = (P + 63) / 64, NB = N / 64 };
    bf16 Bt[NB][SSD_TILE], Ct[NB][SSD_TILE];
    bf16 x[PB][SSD_TILE], dy[PB][SSD_TILE];                    // x: later dx
    bf16 before[PB][NB][SSD_TILE], after[PB][NB][SSD_TILE];    // H, Lambda: a row is a channel
    bf16 gram[SSD_TILE];                                       // G, 0 where L is; in the end dG
    bf16 GL[SSD_TILE];                                         // G L of this head
    float4 dgram[20][WARP];  // dG: as the tensor core leaves it, 16 x 8 each
    SsdTokens tokens[2];
    int begin[SSD_SPAN];
    float direct[SSD_SPAN], skip[64 * PB];                     // skip: D
    float row[SSD_SPAN], inner[SSD_SPAN], e[SSD_SPAN];         // of the warps' tokens
    float column[3][48];                                       // of the tokens before warps 1, 2, 3
    float sums[4][8];
};

// What a warp leaves in sums: e of its tokens; pairs of its tokens with everything before tile column K = 0,
// 1, 2 of 16; its part of <Lambda, H>; of <dy, x>
enum { SSD_SUM_E, SSD_SUM_LEFT, SSD_SUM_THROUGH = SSD_SUM_LEFT + 3, SSD_SUM_SKIP };

// ssd_sum_quads: sums of eight values over a warp; quad g keeps value g. Every step halves the number of
// values and of lanes that hold one.
__device__ __forceinline__ float ssd_sum_quads(float* v, int g) {
    #pragma unroll
    for (int half = 4; half >= 1; half /= 2) {
        #pragma unroll
        for (int i = 0; i < half; i++) {
            float keep = g & half ? v[i + half] : v[i], give = g & half ? v[i] : v[i + half];
            v[i] = keep + __shfl_xor_sync(0xffffffffu, give, 4 * half);
        }
    }
    v[0] += __shfl_xor_sync(0xffffffffu, v[0], 2);
    return v[0] + __shfl_xor_sync(0xffffffffu, v[0], 1);
}

// ssd_inner_pairs: line[m] = sum_{i >= m, j < m} W_ij, i, j, m < 16, of W as the tensor core leaves it: w0
// its first 8 columns, w1 the others
__device__ __forceinline__ void ssd_inner_pairs(float* line, float* w0, float* w1, int g, int q, int lane) {
    if (g == 2 * q) w0[0] = w1[2] = 0.0f;                      // the diagonal
    if (g == 2 * q + 1) w0[1] = w1[3] = 0.0f;
    const float pair[3] = {w0[0] + w0[1], w0[2] + w0[3], w1[2] + w1[3]};       // row g; row g + 8, twice
    float left[3];                                             // sums over the lanes to the left
    #pragma unroll
    for (int k = 0; k < 3; k++) {
        float v1 = __shfl_up_sync(0xffffffffu, pair[k], 1), v2 = __shfl_up_sync(0xffffffffu, pair[k], 2),
              v3 = __shfl_up_sync(0xffffffffu, pair[k], 3);
        left[k] = (q >= 1 ? v1 : 0.0f) + (q >= 2 ? v2 : 0.0f) + (q >= 3 ? v3 : 0.0f);
    }
    const float half = __shfl_sync(0xffffffffu, left[1] + pair[1], lane | 3);  // row g + 8, columns 0..7
    float c[4];                                                // m = 2 q, 2 q + 1, 8 + 2 q, 9 + 2 q
    c[0] = left[1] + (g >= 2 * q ? left[0] : 0.0f);
    c[1] = left[1] + w0[2] + (g > 2 * q ? left[0] + w0[0] : 0.0f);
    c[2] = g >= 2 * q ? half + left[2] : 0.0f;
    c[3] = g > 2 * q ? half + left[2] + w1[2] : 0.0f;
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        c[k] += __shfl_xor_sync(0xffffffffu, c[k], 4);
        c[k] += __shfl_xor_sync(0xffffffffu, c[k], 8);
        c[k] += __shfl_xor_sync(0xffffffffu, c[k], 16);
    }
    if (g > 0) return;
    *(float2*)&line[2 * q] = make_float2(c[0], c[1]);
    *(float2*)&line[8 + 2 * q] = make_float2(c[2], c[3]);
}

// ssd_column_sums: column[j] = sum_i W_ij, W as above, 16 x 16
__device__ __forceinline__ void ssd_column_sums(float* column, const float* w0, const float* w1, int g,
                                                int q) {
    float c[4] = {w0[0] + w0[2], w0[1] + w0[3], w1[0] + w1[2], w1[1] + w1[3]}; // 2q, 2q + 1, 8 + 2q, 9 + 2q
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        float keep = g & 4 ? c[i + 2] : c[i], give = g & 4 ? c[i] : c[i + 2];
        c[i] = keep + __shfl_xor_sync(0xffffffffu, give, 16);
    }
    float keep = g & 2 ? c[1] : c[0], give = g & 2 ? c[0] : c[1];
    keep += __shfl_xor_sync(0xffffffffu, give, 8);
    keep += __shfl_xor_sync(0xffffffffu, keep, 4);
    if (!(g & 1)) column[(g & 4) * 2 + 2 * q + (g >> 1 & 1)] = keep;
}

// ssd_fragments: rows 16w.. of a tile as first operand, in registers
__device__ __forceinline__ void ssd_fragments(uint32_t (&a)[4][4], const bf16* tile, int w) {
    const int lane = threadIdx.x % WARP;
    #pragma unroll
    for (int k = 0; k < 4; k++)
        load_matrices(a[k], tile + ssd_piece(16 * w + (lane & 15), 2 * k + (lane >> 4)));
}
// ssd_scale: row g of them times f0, row g + 8 times f1. A factor is the sum of two bf16: one rounding.
__device__ __forceinline__ void ssd_scale(uint32_t (&a)[4][4], float f0, float f1) {
    const float f[2] = {f0, f1};
    __nv_bfloat162 high[2], low[2];
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        high[i] = __float2bfloat162_rn(f[i]);
        low[i] = __float2bfloat162_rn(f[i] - __low2float(high[i]));
    }
    #pragma unroll
    for (int i = 0; i < 16; i++) {
        __nv_bfloat162* v = (__nv_bfloat162*)&a[i / 4][i % 4];
        *v = __hfma2(*v, high[i % 2], __hmul2(*v, low[i % 2]));
    }
}
// ssd_rows_dot: sum0 += <a, d> of row g, sum1 of row g + 8: d as a product leaves it, a as ssd_fragments
__device__ __forceinline__ void ssd_rows_dot(float* sum0, float* sum1, const uint32_t (&a)[4][4],
                                             const float (&d)[8][4]) {
    #pragma unroll
    for (int n = 0; n < 8; n++) {
        const uint32_t v0 = a[n / 2][n % 2 * 2], v1 = a[n / 2][n % 2 * 2 + 1];
        *sum0 = fmaf(scan_low(v0), d[n][0], fmaf(scan_high(v0), d[n][1], *sum0));
        *sum1 = fmaf(scan_low(v1), d[n][2], fmaf(scan_high(v1), d[n][3], *sum1));
    }
}

// ssd_backward_fast_kernel: the formulas at the top. dBC: NULL, then dBt and dCt are written; or the sums of
// this part's heads, (parts,B,T,G,2N). sums: as ssd_backward_kernel.
template <int P, int N>
__global__ void __launch_bounds__(8 * WARP, P == 128 && N == 128 ? 1 : 2)
ssd_backward_fast_kernel(bf16* dx, size_t lddx, float* ddt, bf16* dBt, bf16* dCt, size_t lddbc, float* dBC,
                         float* sums, size_t n_sums, const bf16* states, const bf16* before,
                         const bf16* after, const bf16* dy, const bf16* x, size_t ldx,
                         const SsdTokens* tokens, const bf16* Bt, const bf16* Ct, size_t ldbc,
                         const float* Dskip, bool D_has_hdim, const int* doc, size_t B, size_t T, int H,
                         int G, int parts) {
    extern __shared__ __align__(1024) char tile_shared[];
    enum { PB = (P + 63) / 64, NB = N / 64, THREADS = 8 * WARP };
    SsdBackwardShared<P, N>& sh = *(SsdBackwardShared<P, N>*)tile_shared;
    const int W = __shfl_sync(0xffffffffu, (int)threadIdx.x / WARP, 0), w = W % 4;
    const bool rows_i = W < 4;
    const int lane = threadIdx.x % WARP, g = lane >> 2, q = lane & 3, r0 = 16 * w + g, r1 = r0 + 8;
    const int tiles = (int)((T + SSD_SPAN - 1) / SSD_SPAN), part = blockIdx.x % parts;
    const int group = blockIdx.x / parts % G, c = blockIdx.x / parts / G % tiles;
    const size_t b = blockIdx.x / parts / G / tiles, E = (size_t)H * P, m0 = b * T + (size_t)c * SSD_SPAN;
    const int count = (int)(T - (size_t)c * SSD_SPAN < SSD_SPAN ? T - (size_t)c * SSD_SPAN : SSD_SPAN);
    const int each = (H / G + parts - 1) / parts, h0 = group * (H / G) + part * each;
    const int h1 = min(h0 + each, (group + 1) * (H / G));
    const size_t PN = P * N, saved = (T + SSD_SPACING - 1) / SSD_SPACING;

    auto load = [&](int h) {                                   // what a head has
        uint32_t c_ = c;
        ssd_recompute(c_);                                     // the addresses are not kept in registers
        const size_t m = b * T + (size_t)c_ * SSD_SPAN;
        const bf16* from = c_ % SSD_PER_SAVED
            ? before + (ssd_slot(false, b, c_, tiles) * H + h) * PN
            : states + ((b * saved + c_ / SSD_PER_SAVED) * H + h) * PN;
        const bf16* lambda = after + (ssd_slot(true, b, c_, tiles) * H + h) * PN;
        #pragma unroll
        for (int p = 0; p < PB; p++) {
            const size_t at = h * P + 64 * p;
            ssd_load_tile<THREADS>(sh.x[p], x + m * ldx + at, (uint32_t)ldx, count, P - 64 * p, threadIdx.x);
            ssd_load_tile<THREADS>(sh.dy[p], dy + m * E + at, (uint32_t)E, count, P - 64 * p, threadIdx.x);
            #pragma unroll
            for (int n = 0; n < NB; n++) {
                ssd_load_tile<THREADS>(sh.before[p][n], from + 64 * p * N + 64 * n, N, P - 64 * p, 64,
                                       threadIdx.x);
                ssd_load_tile<THREADS>(sh.after[p][n], lambda + 64 * p * N + 64 * n, N, P - 64 * p, 64,
                                       threadIdx.x);
            }
        }
        ssd_load_tokens(&sh.tokens[(h - h0) & 1], tokens + (b * H + h) * tiles + c_);
    };
    #pragma unroll
    for (int n = 0; n < NB; n++) {
        const size_t at = m0 * ldbc + group * N + 64 * n;
        ssd_load_tile<THREADS>(sh.Bt[n], Bt + at, (uint32_t)ldbc, count, 64, threadIdx.x);
        ssd_load_tile<THREADS>(sh.Ct[n], Ct + at, (uint32_t)ldbc, count, 64, threadIdx.x);
    }
    copy_async_commit();
    if (h0 < h1) load(h0);
    copy_async_commit();
    if (W == 0) ssd_begins(sh.begin, doc, b, (size_t)c * SSD_SPAN, T);
    for (int k = 0; rows_i && k < 2 * (w + 1); k++)
        sh.dgram[w * (w + 1) + k][lane] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    copy_async_wait(1);
    ssd_publish();
    __syncthreads();
    const uint32_t pair = ssd_piece(r0, 0) + 2 * q;
    // columns 8k + 2q, + 1 of rows r0, r1
    auto store_pair = [](bf16* tile, uint32_t pair, int k, uint32_t low, uint32_t high) {
        *(uint32_t*)(tile + (pair ^ k << 3)) = low;
        *(uint32_t*)(tile + (pair ^ k << 3) + 8 * 64) = high;
    };
    // two values of columns 8k + 2q, + 1 of a row of G or dG: not later, and of one document
    auto masked = [&](int k, int row, float v0, float v1) {
        const int j = 8 * k + 2 * q, begin = sh.begin[row];
        return scan_pack(j <= row && j >= begin ? v0 : 0.0f, j + 1 <= row && j + 1 >= begin ? v1 : 0.0f);
    };
    // sum: of dCt or dBt: rows r0, r1, columns 64 n + 8 k + 2 q, + 1
    if (rows_i) {
        float s[8][4];                                         // G
        ssd_begin();
        #pragma unroll
        for (int n = 0; n < NB; n++) ssd_multiply_rows(s, sh.Ct[n], sh.Bt[n], n == 0, w);
        ssd_end();
        ssd_wait();
        ssd_arrived(s);
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            store_pair(sh.GL, pair, k, 0, 0);
            store_pair(sh.gram, pair, k, masked(k, r0, s[k][0], s[k][1]), masked(k, r1, s[k][2], s[k][3]));
        }
    }
    auto multiply = [&](float (&d)[8][4], const bf16 (*a)[SSD_TILE], const bf16 (*state)[SSD_TILE]) {
        ssd_begin();
        #pragma unroll
        for (int n = 0; n < NB; n++) ssd_multiply_rows(d, a[n], state[n], n == 0, w);
        ssd_end();
    };
    auto add = [&](float (&sum)[NB][8][4], const uint32_t (&a)[4][4], const bf16 (*state)[SSD_TILE]) {
        ssd_begin();
        #pragma unroll
        for (int n = 0; n < NB; n++) ssd_multiply_columns(sum[n], a, state[n], 4);
        ssd_end();
    };
    auto store = [&](float (&sum)[NB][8][4]) {
        ssd_end();
        ssd_wait();
        #pragma unroll
        for (int n = 0; n < NB; n++) ssd_arrived(sum[n]);
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            const int row = k ? r1 : r0;
            if (row >= count) continue;
            float* to = dBC + ((part * B * T + m0 + row) * G + group) * 2 * N + 2 * q + (rows_i ? N : 0);
            bf16* out = (rows_i ? dCt : dBt) + (m0 + row) * lddbc + group * N + 2 * q;
            #pragma unroll
            for (int i = 0; i < N / 8; i++) {
                const float* v = sum[i / 8][i % 8] + 2 * k;
                if (dBC) *(float2*)(to + 8 * i) = make_float2(v[0], v[1]);
                else *(uint32_t*)(out + 8 * i) = scan_pack(v[0], v[1]);
            }
        }
    };
    // a barrier of both groups, which reach it at different places: __syncthreads is one place for all
    auto both = []() { asm volatile(SSD_BARRIER " 2, 256;" ::: "memory"); };
    auto begin = [&]() {
        copy_async_wait(0);
        ssd_publish();
        both();                                                // x, dy, H and Lambda of this head are there
        uint32_t lane = threadIdx.x % WARP;                    // and what follows from it: not kept
        ssd_recompute(lane);
        return lane;
    };
    auto end = [&](int h) {
        both();                                                // everything but the decays is free
        if (h + 1 < h1) load(h + 1);
        copy_async_commit();
    };
    // the pairs of this warp's tokens with tokens 16J..: dG, G L; W and S (0 before) as a product leaves them
    auto pairs = [&](float (&W)[2][4], float (&S)[2][4], int J, const SsdTokens& tk, uint32_t lane) {
        const int g = lane >> 2, q = lane & 3, r0 = 16 * w + g, r1 = r0 + 8;
        const int lr = lane & 15, lc = lane >> 4, kr = (lane & 7) + lc * 8, kc = lane >> 3 & 1;
        const uint32_t pair = ssd_piece(r0, 0) + 2 * q;
        const float cs0 = tk.cs[r0], cs1 = tk.cs[r1];
        #pragma unroll
        for (int k = 0; k < 4 * PB; k++) {
            uint32_t a[4];
            load_matrices(a, sh.dy[k / 4] + ssd_piece(16 * w + lr, k % 4 * 2 + lc));
            mma_pair(S, a, sh.x[k / 4] + ssd_piece(16 * J + kr, k % 4 * 2 + kc));
        }
        #pragma unroll
        for (int n = 0; n < 2; n++) {
            const int k = 2 * J + n, j = 8 * k + 2 * q;
            const float2 cs_j = *(const float2*)&tk.cs[j], dt_j = *(const float2*)&tk.dt[j];
            const float L[4] = {exp2_unit(fminf(cs0 - cs_j.x, 0.0f)), exp2_unit(fminf(cs0 - cs_j.y, 0.0f)),
                                exp2_unit(fminf(cs1 - cs_j.x, 0.0f)), exp2_unit(fminf(cs1 - cs_j.y, 0.0f))};
            const float s[4] = {S[n][0] * dt_j.x, S[n][1] * dt_j.y, S[n][2] * dt_j.x, S[n][3] * dt_j.y};
            const uint32_t G0 = *(const uint32_t*)(sh.gram + (pair ^ k << 3));
            const uint32_t G1 = *(const uint32_t*)(sh.gram + (pair ^ k << 3) + 8 * 64);
            const float GL[4] = {scan_low(G0) * L[0], scan_high(G0) * L[1], scan_low(G1) * L[2],
                                 scan_high(G1) * L[3]};
            store_pair(sh.GL, pair, k, scan_pack(GL[0], GL[1]), scan_pack(GL[2], GL[3]));
            float4* to = &sh.dgram[w * (w + 1) + k][lane];
            const float4 v = *to;
            *to = make_float4(fmaf(L[0], s[0], v.x), fmaf(L[1], s[1], v.y), fmaf(L[2], s[2], v.z),
                              fmaf(L[3], s[3], v.w));
            #pragma unroll
            for (int e = 0; e < 4; e++) W[n][e] = GL[e] * s[e];
        }
    };
    if (rows_i) {
        float sum[NB][8][4] = {};
        #pragma unroll 1
        for (int h = h0; h < h1; h++) {
            const SsdTokens& tk = sh.tokens[(h - h0) & 1];
            const uint32_t lane = begin();
            const int g = lane >> 2, q = lane & 3, r0 = 16 * w + g, r1 = r0 + 8;
            const int lr = lane & 15, lc = lane >> 4, kr = (lane & 7) + lc * 8, kc = lane >> 3 & 1;
            float left[3] = {}, through = 0.0f, f0 = 0.0f, f1 = 0.0f, row0 = 0.0f, row1 = 0.0f;
            if (D_has_hdim) {
                for (int p = threadIdx.x; p < P; p += 4 * WARP) {
                    float dot = 0.0f;
                    #pragma unroll 1
                    for (int t = 0; t < SSD_SPAN; t++) {
                        const int at = ssd_piece(t, p % 64 / 8) + p % 8;
                        dot = fmaf(to_float(sh.dy[p / 64][at]), to_float(sh.x[p / 64][at]), dot);
                    }
                    sums[(b * tiles + c) * n_sums + H + h * P + p] = dot;
                }
            }
            #pragma unroll
            for (int J = 0; J < 3; J++) {
                if (J >= w) break;
                float W[2][4], S[2][4] = {};
                pairs(W, S, J, tk, lane);
                row0 += (W[0][0] + W[0][1]) + (W[1][0] + W[1][1]);
                row1 += (W[0][2] + W[0][3]) + (W[1][2] + W[1][3]);
                if (J < 2) left[J + 1] = row0 + row1;          // pairs with columns below 16 (J + 1)
                ssd_column_sums(&sh.column[w - 1][16 * J], W[0], W[1], g, q);
            }
            ssd_publish();
            asm volatile(SSD_ARRIVE " 1, 256;" ::: "memory");  // G L is there
            for (int i = w; i < P / 16; i += 4) {              // <Lambda, H>: the diagonal of Lambda H^T
                float s[2][4] = {};
                #pragma unroll
                for (int k = 0; k < N / 16; k++) {
                    uint32_t a[4];
                    load_matrices(a, sh.after[i / 4][k / 4] + ssd_piece(i % 4 * 16 + lr, k % 4 * 2 + lc));
                    mma_pair(s, a, sh.before[i / 4][k / 4] + ssd_piece(i % 4 * 16 + kr, k % 4 * 2 + kc));
                }
                if (q == g >> 1) through += g & 1 ? s[0][1] + s[1][3] : s[0][0] + s[1][2];
            }
            const float from0 = tk.from[r0], from1 = tk.from[r1];
            #pragma unroll
            for (int p = 0; p < PB; p++) {                     // dCt, f
                float v[8][4];
                uint32_t dy_p[4][4];
                multiply(v, sh.Ct, sh.before[p]);
                ssd_fragments(dy_p, sh.dy[p], w);
                ssd_wait();
                ssd_arrived(v);
                ssd_rows_dot(&f0, &f1, dy_p, v);
                ssd_scale(dy_p, from0, from1);
                add(sum, dy_p, sh.before[p]);
                ssd_wait();
            }
            row0 = fmaf(from0, f0, row0);
            row1 = fmaf(from1, f1, row1);
            left[0] = fmaf(from0, f0, from1 * f1);
            float all[8] = {0.0f, left[0], left[1] + left[0], left[2] + left[0], through};
            const float v = ssd_sum_quads(all, g);
            if (q == 0 && g >= SSD_SUM_LEFT && g <= SSD_SUM_THROUGH) sh.sums[w][g] = v;
            row0 += __shfl_xor_sync(0xffffffffu, row0, 1);
            row1 += __shfl_xor_sync(0xffffffffu, row1, 1);
            row0 += __shfl_xor_sync(0xffffffffu, row0, 2);
            row1 += __shfl_xor_sync(0xffffffffu, row1, 2);
            if (q == 0) { sh.row[r0] = row0; sh.row[r1] = row1; }
            end(h);
        }
        uint32_t a[4][4];                                      // what dG adds
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            float4 s = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (k / 2 <= w) s = sh.dgram[w * (w + 1) + k][lane];
            a[k / 2][k % 2 * 2] = masked(k, r0, s.x, s.y);
            a[k / 2][k % 2 * 2 + 1] = masked(k, r1, s.z, s.w);
            store_pair(sh.gram, pair, k, a[k / 2][k % 2 * 2], a[k / 2][k % 2 * 2 + 1]);
        }
        ssd_publish();
        both();
        ssd_begin();
        #pragma unroll
        for (int n = 0; n < NB; n++) ssd_multiply_columns(sum[n], a, sh.Bt[n], w + 1);
        store(sum);
    } else {
        float sum[NB][8][4] = {};
        #pragma unroll 1
        for (int h = h0; h < h1; h++) {
            const SsdTokens& tk = sh.tokens[(h - h0) & 1];
            const uint32_t lane = begin();
            const int g = lane >> 2, q = lane & 3, r0 = 16 * w + g, r1 = r0 + 8;
            const uint32_t pair = ssd_piece(r0, 0) + 2 * q;
            const int channel = (int)(threadIdx.x - 4 * WARP) % P;
            const float D = Dskip[D_has_hdim ? h * P + channel : h];
            float e0 = 0.0f, e1 = 0.0f, direct0 = 0.0f, direct1 = 0.0f;
            {                                                  // the pairs of the warp's own tokens
                float W[2][4], S[2][4] = {};
                pairs(W, S, w, tk, lane);
                float skip = q != g >> 1 ? 0.0f : g & 1 ? S[0][1] + S[1][3] : S[0][0] + S[1][2];
                skip = warp_sum(skip);
                if (lane == 0) sh.sums[w][SSD_SUM_SKIP] = skip;
                ssd_inner_pairs(&sh.inner[16 * w], W[0], W[1], g, q, lane);
            }
            ssd_publish();
            const float dt0 = tk.dt[r0], dt1 = tk.dt[r1], to0 = tk.to[r0], to1 = tk.to[r1];
            #pragma unroll
            for (int p = 0; p < PB; p++) {                     // e, dBt, v, dx
                float v[8][4];
                uint32_t x_p[4][4];
                multiply(v, sh.Bt, sh.after[p]);
                ssd_fragments(x_p, sh.x[p], w);
                ssd_wait();
                ssd_arrived(v);
                ssd_rows_dot(&e0, &e1, x_p, v);
                ssd_scale(x_p, to0 * dt0, to1 * dt1);
                add(sum, x_p, sh.after[p]);
                #pragma unroll
                for (int n = 0; n < 8; n++) {
                    v[n][0] *= to0; v[n][1] *= to0; v[n][2] *= to1; v[n][3] *= to1;
                }
                if (p == 0) {
                    sh.skip[channel] = D;
                    asm volatile(SSD_BARRIER " 1, 256;" ::: "memory");
                }
                ssd_begin();
                ssd_multiply_lower(v, sh.GL, sh.dy[p], w);
                ssd_end();
                ssd_wait();
                ssd_arrived(v);
                ssd_fragments(x_p, sh.x[p], w);
                ssd_rows_dot(&direct0, &direct1, x_p, v);
                ssd_fragments(x_p, sh.dy[p], w);
                __syncwarp();                                  // every lane has its part of x
                #pragma unroll
                for (int i = 0; i < 8; i++) {                  // dx, where x was
                    const float2 D_i = *(const float2*)&sh.skip[64 * p + 8 * i + 2 * q];
                    const uint32_t y0 = x_p[i / 2][i % 2 * 2], y1 = x_p[i / 2][i % 2 * 2 + 1];
                    store_pair(sh.x[p], pair, i, scan_pack(fmaf(dt0, v[i][0], D_i.x * scan_low(y0)),
                                                     fmaf(dt0, v[i][1], D_i.y * scan_high(y0))),
                               scan_pack(fmaf(dt1, v[i][2], D_i.x * scan_low(y1)),
                                         fmaf(dt1, v[i][3], D_i.y * scan_high(y1))));
                }
                __syncwarp();
                enum { PIECES = P < 64 ? P / 8 : 8, STEP = WARP / PIECES };
                const int row = 16 * w + lane / PIECES, piece = lane % PIECES;
                bf16* to = dx + (m0 + row) * lddx + h * P + 64 * p + piece * 8;
                #pragma unroll
                for (int i = 0; i < 16; i += STEP) {
                    if (row + i < count)
                        scan_store16(to, *(const uint4*)(sh.x[p] + ssd_piece(row + i, piece)));
                    to += STEP * lddx;
                }
            }
            // lanes 0 and 1 of a quad: direct of row r0, r1; lanes 2 and 3: e
            float keep0 = q & 2 ? e0 : direct0, keep1 = q & 2 ? e1 : direct1;
            keep0 += __shfl_xor_sync(0xffffffffu, q & 2 ? direct0 : e0, 2);
            keep1 += __shfl_xor_sync(0xffffffffu, q & 2 ? direct1 : e1, 2);
            float keep = q & 1 ? keep1 : keep0;
            keep += __shfl_xor_sync(0xffffffffu, q & 1 ? keep0 : keep1, 1);
            if (q & 2) keep *= q & 1 ? to1 * dt1 : to0 * dt0;
            (q & 2 ? sh.e : sh.direct)[q & 1 ? r1 : r0] = keep;
            float total = q & 2 ? keep : 0.0f;
            total = warp_sum(total);
            if (lane == 0) sh.sums[w][SSD_SUM_E] = total;
            end(h);
            if (W == 7) {                                          // ddt and the sums for dA_log, dDskip
                const float A = tk.A2 * SCAN_LN2;
                float through_all = 0.0f, skip_all = 0.0f, dA = 0.0f;
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    through_all += sh.sums[k][SSD_SUM_THROUGH];
                    skip_all += sh.sums[k][SSD_SUM_SKIP];
                }
                #pragma unroll
                for (int k = 0; k < 2; k++) {
                    const int m = lane + 32 * k, K = m / 16, i = m % 16;
                    float columns = sh.e[m], rows = sh.row[m];     // of 16 tokens: before m, from m on
                    #pragma unroll
                    for (int I = 0; I < 3; I++) columns += I >= K ? sh.column[I][min(m, 47)] : 0.0f;
                    #pragma unroll
                    for (int step = 1; step < 16; step *= 2) {
                        const float up = __shfl_up_sync(0xffffffffu, columns, step, 16);
                        const float down = __shfl_down_sync(0xffffffffu, rows, step, 16);
                        if (i >= step) columns += up;
                        if (i + step < 16) rows += down;
                    }
                    columns = __shfl_up_sync(0xffffffffu, columns, 1, 16);
                    float dalpha = sh.inner[m] + (i > 0 ? columns : 0.0f) + rows + tk.all * through_all;
                    #pragma unroll
                    for (int J = 0; J < 3; J++) dalpha += J < K ? sh.sums[J][SSD_SUM_E] : 0.0f;
                    #pragma unroll
                    for (int I = 1; I < 4; I++) dalpha += I > K ? sh.sums[I][SSD_SUM_LEFT + min(K, 2)] : 0.0f;
                    dA = fmaf(tk.dt[m], dalpha, dA);
                    if (m < count)
                        ddt[(b * H + h) * T + (size_t)c * SSD_SPAN + m] = fmaf(A, dalpha, sh.direct[m]);
                }
                dA = warp_sum(dA);
                if (lane == 0) {
                    float* to = sums + (b * tiles + c) * n_sums;
                    to[h] = A * dA;
                    if (!D_has_hdim) to[H + h] = skip_all;
                }
            }
        }
        both();
        ssd_begin();
        #pragma unroll
        for (int n = 0; n < NB; n++) ssd_multiply_lower(sum[n], sh.gram, sh.Ct[n], w);
        store(sum);
    }
}

// --- launchers ----------------------------------------------------------------------------------------

// blocks that fill the chip: two on each of the 132 processors of an H200
enum { SSD_BACKWARD_BLOCKS = 264 };

// SsdBackwardPlan: how the launcher cuts the work, and what it keeps in scratch, in floats
struct SsdBackwardPlan {
    size_t round, tiles, saved, walks, each, parts;            // sequences of a round; see the fast kernels
    size_t before, after, local, dBC, decays, tokens, sums;            // where they begin
    size_t floats;
};
static inline SsdBackwardPlan ssd_backward_plan(bool fast, size_t B, size_t T, size_t H, size_t P, size_t G,
                                                size_t N) {
    SsdBackwardPlan s;
    const size_t tokens = fast ? SSD_ROUND : SSD_ROUND / 4, PN = P * N;
    const size_t half = fast ? 2 : 1;                          // states are bf16, float
    s.round = tokens / T < 1 ? 1 : tokens / T < B ? tokens / T : B;
    s.tiles = (T + SSD_SPAN - 1) / SSD_SPAN;
    s.saved = (T + SSD_SPACING - 1) / SSD_SPACING;
    size_t walks = SSD_BACKWARD_BLOCKS / (s.round * H);
    walks = !fast || walks < 1 ? 1 : walks < s.saved ? walks : s.saved;
    s.each = (s.saved + walks - 1) / walks * (SSD_SPACING / 64);
    s.walks = (s.saved * (SSD_SPACING / 64) + s.each - 1) / s.each;
    s.parts = SSD_BACKWARD_BLOCKS / (s.round * s.tiles * G);
    s.parts = !fast ? H / G : s.parts < 1 ? 1 : s.parts < H / G ? s.parts : H / G;
    size_t at = 0;
    auto take = [&at](size_t n) { size_t from = at; at += (n + 3) / 4 * 4; return from; };
    s.before = take(s.round * (fast ? s.tiles - s.saved : s.tiles) * H * PN / half);
    s.after = take(s.round * s.tiles * H * PN / half);
    s.local = take(s.walks > 1 ? s.round * s.walks * H * PN : 0);
    s.decays = take(s.walks > 1 ? s.round * s.walks * H : 0);
    s.tokens = take(fast ? s.round * s.tiles * H * sizeof(SsdTokens) / sizeof(float) : 0);
    s.dBC = take(!fast || s.parts > 1 ? s.parts * s.round * T * G * 2 * N : 0);
    s.sums = take(B * s.tiles * (H + H * P));
    s.floats = at;
    return s;
}

// what both paths need for sequences b..b+n-1; X = bf16 in the fast one
template <typename X> struct SsdBackwardRound {
    X *dx, *dBt, *dCt;
    float *ddt, *sums, *dh0;
    const X *dy, *states, *x, *Bt, *Ct;
    const float *dt, *dhT;
    const int* doc;
    size_t n;
};
// and what does not change
struct SsdBackwardShape {
    size_t lddx, lddbc, ldx, ldbc, n_sums, T, H, P, G, N;
    const float *A_log, *Dskip;
    bool D_has_hdim;
};

template <typename X>
static void ssd_backward_general(const SsdBackwardRound<X>& r, const SsdBackwardShape& a,
                                 const SsdBackwardPlan& s, float* scratch, cudaStream_t stream) {
    float *before = scratch + s.before, *after = scratch + s.after, *dBC = scratch + s.dBC;
    const unsigned blocks = (unsigned)((a.P * a.N + 255) / 256), H = (unsigned)a.H;
    ssd_states_kernel<X, false><<<dim3(blocks, H, (unsigned)(r.n * s.saved)), 256, 0, stream>>>(
        before, NULL, r.states, NULL, r.x, a.ldx, r.Bt, a.ldbc, r.dt, a.A_log, r.doc, a.T, a.H, a.P, a.G,
        a.N);
    cudaCheck(cudaGetLastError());
    ssd_states_kernel<X, true><<<dim3(blocks, H, (unsigned)r.n), 256, 0, stream>>>(
        after, r.dh0, NULL, r.dhT, r.dy, a.H * a.P, r.Ct, a.ldbc, r.dt, a.A_log, r.doc, a.T, a.H, a.P, a.G,
        a.N);
    cudaCheck(cudaGetLastError());
    scan_allow_shared(ssd_backward_kernel<X>, sizeof(SsdBackward));
    ssd_backward_kernel<X><<<dim3((unsigned)(r.n * s.tiles), H), 256, sizeof(SsdBackward), stream>>>(
        r.dx, a.lddx, r.ddt, dBC, r.sums, a.n_sums, before, after, r.dy, r.x, a.ldx, r.dt, a.A_log, r.Bt,
        r.Ct, a.ldbc, a.Dskip, a.D_has_hdim, r.doc, a.T, a.H, a.P, a.G, a.N);
    cudaCheck(cudaGetLastError());
    ssd_sum_parts_kernel<X><<<(unsigned)((r.n * a.T * a.G * 2 * a.N + 255) / 256), 256, 0, stream>>>(
        r.dBt, r.dCt, a.lddbc, dBC, a.H / a.G, 2 * a.N, a.H * 2 * a.N, a.H / a.G * 2 * a.N, r.n * a.T, a.G,
        a.N);
    cudaCheck(cudaGetLastError());
}

template <int P, int N>
static void ssd_backward_fast(const SsdBackwardRound<bf16>& r, const SsdBackwardShape& a,
                              const SsdBackwardPlan& s, float* scratch, cudaStream_t stream) {
    bf16 *before = (bf16*)(scratch + s.before), *after = (bf16*)(scratch + s.after);
    float *local = s.walks > 1 ? scratch + s.local : NULL, *decays = scratch + s.decays;
    float* dBC = s.parts > 1 ? scratch + s.dBC : NULL;
    SsdTokens* tokens = (SsdTokens*)(scratch + s.tokens);
    const size_t T = a.T, H = a.H, G = a.G;
    const size_t walk_bytes = sizeof(SsdWalkShared<P, N>), tile_bytes = sizeof(SsdBackwardShared<P, N>);
    scan_allow_shared(ssd_walk_local_kernel<P, N>, walk_bytes);
    scan_allow_shared(ssd_walk_kernel<P, N>, walk_bytes);
    scan_allow_shared(ssd_backward_fast_kernel<P, N>, tile_bytes);
    const unsigned lefts = (unsigned)(r.n * H * s.walks);
    const unsigned rights = T > SSD_SPAN ? (unsigned)(r.n * H * s.saved) : 0;
    const SsdWalks walks = {before, after, r.dh0, local, decays, r.states, r.x, r.dy, r.Bt, r.Ct, r.dhT,
                            tokens, a.ldx, a.ldbc, T, H, G, (int)lefts, (int)s.walks, (int)s.each,
                            (int)s.saved};
    ssd_tokens_kernel<<<(unsigned)((r.n * H * s.tiles + 3) / 4), 4 * WARP, 0, stream>>>(
        tokens, r.dt, a.A_log, r.doc, T, H, r.n * H * s.tiles);
    cudaCheck(cudaGetLastError());
    if (local) {
        ssd_walk_local_kernel<P, N><<<lefts, P <= 64 ? 128 : 256, walk_bytes, stream>>>(walks);
        cudaCheck(cudaGetLastError());
    }
    ssd_walk_kernel<P, N><<<lefts + rights, P <= 64 ? 128 : 256, walk_bytes, stream>>>(walks);
    cudaCheck(cudaGetLastError());
    ssd_backward_fast_kernel<P, N><<<(unsigned)(r.n * s.tiles * G * s.parts), 8 * WARP, tile_bytes, stream>>>(
        r.dx, a.lddx, r.ddt, r.dBt, r.dCt, a.lddbc, dBC, r.sums, a.n_sums, r.states, before, after, r.dy, r.x,
        a.ldx, tokens, r.Bt, r.Ct, a.ldbc, a.Dskip, a.D_has_hdim, r.doc, r.n, T, (int)H, (int)G,
        (int)s.parts);
    cudaCheck(cudaGetLastError());
    if (!dBC) return;
    ssd_sum_parts_kernel<bf16><<<(unsigned)((r.n * T * G * 2 * N + 255) / 256), 256, 0, stream>>>(
        r.dBt, r.dCt, a.lddbc, dBC, s.parts, r.n * T * G * 2 * N, G * 2 * N, 2 * N, r.n * T, G, N);
    cudaCheck(cudaGetLastError());
}

// the fast path's launcher for these sizes; NULL: there is none, or the GPU has too little shared memory
typedef void (*SsdBackwardFast)(const SsdBackwardRound<bf16>&, const SsdBackwardShape&,
                                const SsdBackwardPlan&, float*, cudaStream_t);
static inline SsdBackwardFast ssd_backward_fast_of(size_t P, size_t N) {
    static const struct { size_t P, N, bytes; SsdBackwardFast launch; } paths[] = {
        {32, 64, sizeof(SsdBackwardShared<32, 64>), ssd_backward_fast<32, 64>},
        {32, 128, sizeof(SsdBackwardShared<32, 128>), ssd_backward_fast<32, 128>},
        {64, 64, sizeof(SsdBackwardShared<64, 64>), ssd_backward_fast<64, 64>},
        {64, 128, sizeof(SsdBackwardShared<64, 128>), ssd_backward_fast<64, 128>},
        {128, 64, sizeof(SsdBackwardShared<128, 64>), ssd_backward_fast<128, 64>},
        {128, 128, sizeof(SsdBackwardShared<128, 128>), ssd_backward_fast<128, 128>},
    };
    int device, bytes;
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    for (size_t i = 0; i < sizeof paths / sizeof paths[0]; i++)
        if (paths[i].P == P && paths[i].N == N && paths[i].bytes <= (size_t)bytes) return paths[i].launch;
    return NULL;
}

// floats of scratch
size_t ssd_backward_scratch_cuda(size_t B, size_t T, size_t H, size_t P, size_t G, size_t N) {
    size_t general = ssd_backward_plan(false, B, T, H, P, G, N).floats;
    size_t fast = ssd_backward_plan(true, B, T, H, P, G, N).floats;
    return fast > general ? fast : general;
}

// ssd_backward_cuda: formulas at the top of this section. dy (B,T,H,P) is the gradient of y.
//   dx (row stride lddx), dBt, dCt (row stride lddbc), ddt (B,H,T), dh0: written
//   dA_log (H), dDskip (H), or (H,P) with D_has_hdim: added to     dh0, dhT (B,H,P,N) float, doc: may be NULL
//   states: as forward left them (h0 is in them)     scratch: ssd_backward_scratch_cuda() floats
// Returns the path taken. B8 T2048 H24 P64 N128 (H200, bf16, cold cache): 0.26 ms, 0.09 of it the walks.
// 630 MB go through the memory, 350 MB of them states between tiles; inputs and outputs alone are 196 MB and
// would take 0.05 ms.
template <typename X>
const char* ssd_backward_cuda(X* dx, size_t lddx, float* ddt, float* dA_log, X* dBt, X* dCt, size_t lddbc,
                              float* dDskip, float* dh0, const X* dy, const float* dhT, const X* states,
                              const X* x, size_t ldx, const float* dt, const float* A_log, const X* Bt,
                              const X* Ct, size_t ldbc, const float* Dskip, bool D_has_hdim, const int* doc,
                              float* scratch, size_t B, size_t T, size_t H, size_t P, size_t G, size_t N,
                              cudaStream_t stream, SumList* later = NULL) {
    const size_t w = sizeof(X), n_skip = D_has_hdim ? H * P : H, PN = P * N;
    SsdBackwardFast launch = NULL;
    if (w == 2 && H % G == 0 && is_aligned(x, 16, ldx * w) && is_aligned(dx, 16, lddx * w) &&
        is_aligned(dy, 16, 16) && is_aligned(states, 16, 16) && is_aligned(Bt, 16, ldbc * w) &&
        is_aligned(Ct, 16, ldbc * w) && is_aligned(dBt, 4, lddbc * w) && is_aligned(dCt, 4, lddbc * w) &&
        is_aligned(dhT, 8, 8) && is_aligned(dh0, 8, 8) && is_aligned(scratch, 16, 16))
        launch = ssd_backward_fast_of(P, N);
    const SsdBackwardPlan s = ssd_backward_plan(launch != NULL, B, T, H, P, G, N);
    const SsdBackwardShape shape = {lddx, lddbc, ldx, ldbc, H + n_skip, T, H, P, G, N, A_log, Dskip,
                                    D_has_hdim};
    float* sums = scratch + s.sums;
    for (size_t b = 0; b < B; b += s.round) {
        const size_t m = b * T;
        SsdBackwardRound<X> r = {dx + m * lddx, dBt + m * lddbc, dCt + m * lddbc, ddt + m * H,
                                 sums + b * s.tiles * (H + n_skip), dh0 ? dh0 + b * H * PN : NULL,
                                 dy + m * H * P, states + b * s.saved * H * PN, x + m * ldx, Bt + m * ldbc,
                                 Ct + m * ldbc, dt + m * H, dhT ? dhT + b * H * PN : NULL,
                                 doc ? doc + m : NULL, b + s.round < B ? s.round : B - b};
        if constexpr (sizeof(X) == 2) {
            if (launch) launch(r, shape, s, scratch, stream);
            else ssd_backward_general(r, shape, s, scratch, stream);
        } else {
            ssd_backward_general(r, shape, s, scratch, stream);
        }
    }
    sum_parts_cuda(dA_log, dDskip, sums, B * s.tiles, H, n_skip, H + n_skip, stream, later);
    return launch ? "fast" : "general";
}

// ssd_dt_backward: of formula (S2), dt = clip(softplus(p), lo, hi), p = dt_raw + dt_bias
//   ddt_raw = ddt sigmoid(p), 0 where softplus(p) < lo or > hi         ddt_bias += sum over tokens of ddt_raw
//   ddt_raw, dt_raw (B,T,H) in X, row strides ldd and ld   ddt (B,H,T)
// A block turns SSD_DT_TOKENS tokens of 32 heads around, 32 at a time, and leaves its part of ddt_bias in
// parts (blocks,H). The `pad` columns behind ddt_raw become 0.   bytes: 4 + 2 sizeof(X) per token and head
enum { SSD_DT_TOKENS = 64 };

template <typename X>
__global__ void __launch_bounds__(8 * WARP)
ssd_dt_backward_kernel(X* ddt_raw, size_t ldd, float* parts, const float* ddt, const X* dt_raw, size_t ld,
                       const float* dt_bias, float lo, float hi, size_t T, size_t H, size_t pad) {
    __shared__ float tile[WARP][WARP + 1];
    const size_t blocks = (T + SSD_DT_TOKENS - 1) / SSD_DT_TOKENS, b = blockIdx.x / blocks;
    const size_t begin = blockIdx.x % blocks * SSD_DT_TOKENS;
    const size_t end = begin + SSD_DT_TOKENS < T ? begin + SSD_DT_TOKENS : T;
    const size_t h0 = (size_t)blockIdx.y * WARP, h = h0 + threadIdx.x;
    const float bias = h < H ? dt_bias[h] : 0.0f;
    float sum = 0.0f;
    for (size_t t0 = begin; t0 < end; t0 += WARP) {
        __syncthreads();
        for (size_t i = threadIdx.y; i < WARP; i += 8)
            if (h0 + i < H && t0 + threadIdx.x < end)
                tile[threadIdx.x][i] = ddt[(b * H + h0 + i) * T + t0 + threadIdx.x];
        __syncthreads();
        for (size_t i = threadIdx.y; i < WARP; i += 8) {
            if (t0 + i >= end || h >= H + pad) continue;
            size_t m = b * T + t0 + i;
            if (h >= H) {
                ddt_raw[m * ldd + h] = from_float<X>(0.0f);
                continue;
            }
            float p = to_float(dt_raw[m * ld + h]) + bias, v = scan_softplus(p);
            float dp = tile[i][threadIdx.x] * (p > 20.0f ? 1.0f : 1.0f / (1.0f + expf(-p)));
            if (v < lo || v > hi) dp = 0.0f;
            ddt_raw[m * ldd + h] = from_float<X>(dp);
            sum += dp;
        }
    }
    __syncthreads();
    tile[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || h >= H) return;
    for (int i = 1; i < 8; i++) sum += tile[i][threadIdx.x];
    parts[blockIdx.x * H + h] = sum;
}

// floats of ssd_dt_backward's scratch
size_t ssd_dt_backward_scratch_cuda(size_t B, size_t T, size_t H) {
    return B * ((T + SSD_DT_TOKENS - 1) / SSD_DT_TOKENS) * H;
}

template <typename X>
void ssd_dt_backward_cuda(X* ddt_raw, size_t ldd, float* ddt_bias, const float* ddt, const X* dt_raw,
                          size_t ld, const float* dt_bias, float lo, float hi, float* scratch, size_t B,
                          size_t T, size_t H, cudaStream_t stream, SumList* later = NULL, size_t pad = 0) {
    const size_t blocks = B * ((T + SSD_DT_TOKENS - 1) / SSD_DT_TOKENS);
    const dim3 grid((unsigned)blocks, (unsigned)((H + pad + WARP - 1) / WARP));
    ssd_dt_backward_kernel<X><<<grid, dim3(WARP, 8), 0, stream>>>(ddt_raw, ldd, scratch, ddt, dt_raw, ld,
                                                                  dt_bias, lo, hi, T, H, pad);
    cudaCheck(cudaGetLastError());
    sum_parts_cuda(ddt_bias, NULL, scratch, blocks, H, 0, H, stream, later);
}

// --------------------------------------------------------------------------------------------------
// 4.13 Gated RMSNorm

// gated_rmsnorm_forward: the norm of Mamba-2, over groups of S channels, with the gate before or behind it.
//   norm_first = false:  w = y silu(z)     out = weight * w * rstd
//   norm_first = true:   w = y             out = weight * y * rstd * silu(z)
//   rstd = (mean over the group of w^2 + eps)^(-1/2)
//   y (M,E)   z (M,E), row stride ldz   weight (E)   out (M,E), row stride ldo   E a multiple of S
//   saved for backward: rstd (M,E/S)
// In both orders out = weight * rstd * (y silu(z)): they differ only in what is squared.
// A block works on one group of a token, a thread on GATED_PACK neighbouring channels; blockIdx: token,
// group. So few registers suffice that many blocks are under way.   bytes: 3 sizeof(X) per element
enum { GATED_PACK = 8, GATED_THREADS = 1024 };

// gated_sum: the sum over the block, the same bits in every thread; `phase` as in group_sum
__device__ __forceinline__ float gated_sum(float x, float* shared, int phase) {
    x = warp_sum(x);
    if (blockDim.x == WARP) return x;
    float* part = shared + phase * WARP;
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % WARP < blockDim.x / WARP ? part[threadIdx.x % WARP] : 0.0f);
}

template <typename X>
__global__ void __launch_bounds__(GATED_THREADS)
gated_rmsnorm_forward_kernel(X* out, size_t ldo, float* rstd, const X* y, const X* z, size_t ldz,
                             const float* weight, size_t E, int S, float eps, bool norm_first) {
    __shared__ float shared[2 * WARP];
    const size_t m = blockIdx.x, e = (size_t)blockIdx.y * S + threadIdx.x * GATED_PACK;
    const bool own = (int)threadIdx.x * GATED_PACK < S;
    Pack<X, GATED_PACK> y_m = {}, z_m = {};
    wait_before();
    if (own) {
        y_m = load_pack<GATED_PACK>(y + m * E + e);
        z_m = load_pack<GATED_PACK>(z + m * ldz + e);
    }
    float v[GATED_PACK], sum = 0;
    #pragma unroll
    for (int j = 0; j < GATED_PACK; j++) {
        v[j] = to_float(y_m.v[j]) * silu_cuda(to_float(z_m.v[j]));
        float x = norm_first ? to_float(y_m.v[j]) : v[j];
        sum += x * x;
    }
    float r = rstd_of(gated_sum(sum, shared, 0), (float)S, eps);
    if (threadIdx.x == 0) rstd[m * gridDim.y + blockIdx.y] = r;
    if (!own) return;
    float w[GATED_PACK];
    unpack<GATED_PACK>(w, load_pack<GATED_PACK>(weight + e));
    #pragma unroll
    for (int j = 0; j < GATED_PACK; j++) v[j] *= w[j] * r;
    store_pack<GATED_PACK>(out + m * ldo + e, v);
}

// any S, any alignment: a block per token and group, whose values are read twice
template <typename X>
__global__ void gated_rmsnorm_forward_general_kernel(X* out, size_t ldo, float* rstd, const X* y, const X* z,
                                                     size_t ldz, const float* weight, size_t E, size_t S,
                                                     float eps, bool norm_first) {
    __shared__ float shared[2 * WARP];
    const size_t m = blockIdx.x, e0 = blockIdx.y * S;
    float sum = 0;
    for (size_t e = e0 + threadIdx.x; e < e0 + S; e += blockDim.x) {
        float x = to_float(y[m * E + e]);
        if (!norm_first) x *= silu_cuda(to_float(z[m * ldz + e]));
        sum += x * x;
    }
    float r = rstd_of(gated_sum(sum, shared, 0), (float)S, eps);
    for (size_t e = e0 + threadIdx.x; e < e0 + S; e += blockDim.x)
        out[m * ldo + e] =
            from_float<X>(weight[e] * r * (to_float(y[m * E + e]) * silu_cuda(to_float(z[m * ldz + e]))));
    if (threadIdx.x == 0) rstd[m * gridDim.y + blockIdx.y] = r;
}

// threads of a block that owns a group of S channels in packs, 0: it cannot
static inline unsigned gated_threads(size_t S) {
    if (S % GATED_PACK || S > GATED_THREADS * GATED_PACK) return 0;
    return (unsigned)((S / GATED_PACK + WARP - 1) / WARP * WARP);
}

template <typename X>
const char* gated_rmsnorm_forward_cuda(X* out, size_t ldo, float* rstd, const X* y, const X* z, size_t ldz,
                                       const float* weight, size_t M, size_t E, size_t S, float eps,
                                       bool norm_first, cudaStream_t stream) {
    const size_t pack = GATED_PACK * sizeof(X);
    const unsigned threads = gated_threads(S), groups = (unsigned)(E / S);
    if (threads && is_aligned(out, pack, ldo * sizeof(X)) && is_aligned(y, pack, E * sizeof(X)) &&
        is_aligned(z, pack, ldz * sizeof(X)) && is_aligned(weight, GATED_PACK * 4, 0)) {
        launch_early(gated_rmsnorm_forward_kernel<X>, dim3((unsigned)M, groups), threads, 0, stream, out, ldo,
                     rstd, y, z, ldz, weight, E, (int)S, eps, norm_first);
        return "gated_rmsnorm_forward_kernel";
    }
    gated_rmsnorm_forward_general_kernel<<<dim3((unsigned)M, groups), 256, 0, stream>>>(
        out, ldo, rstd, y, z, ldz, weight, E, S, eps, norm_first);
    cudaCheck(cudaGetLastError());
    return "gated_rmsnorm_forward_general_kernel";
}

// gated_rmsnorm_backward: with p = y silu(z), q = weight * dout, mean = mean over the group of q p rstd:
//   out = weight * rstd * p                      =>  dweight += sum_m dout * p * rstd
//   norm_first = false, w = p: dw = rstd (q - p rstd mean)   =>  dy = dw silu(z)    dz = dw y silu'(z)
//   norm_first = true,  w = y: dy = rstd (q silu(z) - y rstd mean)    dz = q y rstd silu'(z)
//   dy (M,E), may be dout   dz, dout with row strides lddz, lddo   y, z, rstd: as in forward
//   out (row stride ldo), unless NULL, receives the output of the forward again, the same bits, which the
//   next weight gradient needs
// A block takes every gridDim.x-th token and sums dweight in registers; parts (gridDim.x,E) takes the sums.
// bytes: 6 sizeof(X) per element with out
template <typename X>
__global__ void __launch_bounds__(GATED_THREADS)
gated_rmsnorm_backward_kernel(X* dy, X* dz, size_t lddz, X* out, size_t ldo, float* parts, const X* dout,
                              size_t lddo, const X* y, const X* z, size_t ldz, const float* weight,
                              const float* rstd, size_t M, size_t E, int S, bool norm_first) {
    __shared__ float shared[2 * WARP];
    const int s = (int)threadIdx.x * GATED_PACK;
    const size_t e = (size_t)blockIdx.y * S + s;
    const bool own = s < S;
    float dw[GATED_PACK] = {};
    int phase = 0;
    for (size_t m = blockIdx.x; m < M; m += gridDim.x, phase ^= 1) {
        Pack<X, GATED_PACK> d_m = {}, y_m = {}, z_m = {};
        float w[GATED_PACK] = {}, sigma[GATED_PACK], dot = 0;
        if (own) {
            d_m = load_pack<GATED_PACK>(dout + m * lddo + e);
            y_m = load_pack<GATED_PACK>(y + m * E + e);
            z_m = load_pack<GATED_PACK>(z + m * ldz + e);
            unpack<GATED_PACK>(w, load_pack<GATED_PACK>(weight + e));    // in the cache after the first token
        }
        const float r = rstd[m * gridDim.y + blockIdx.y];
        #pragma unroll
        for (int j = 0; j < GATED_PACK; j++) {
            float z_j = to_float(z_m.v[j]);
            sigma[j] = sigmoid_cuda(z_j);
            float g = to_float(d_m.v[j]) * (to_float(y_m.v[j]) * (z_j * sigma[j]));
            dot += w[j] * g;
            dw[j] += g * r;
        }
        float mean = gated_sum(dot, shared, phase) * r / (float)S;
        float dy_v[GATED_PACK], dz_v[GATED_PACK], out_v[GATED_PACK];
        #pragma unroll
        for (int j = 0; j < GATED_PACK; j++) {
            float y_j = to_float(y_m.v[j]), z_j = to_float(z_m.v[j]), q = w[j] * to_float(d_m.v[j]);
            float gate = z_j * sigma[j], p = y_j * gate, dgate = silu_grad_cuda(z_j, sigma[j]);
            float dw_j = r * (norm_first ? q : q - p * r * mean);
            dy_v[j] = norm_first ? r * (q * gate - y_j * r * mean) : dw_j * gate;
            dz_v[j] = dw_j * y_j * dgate;
            out_v[j] = p * (w[j] * r);
        }
        if (!own) continue;
        store_pack<GATED_PACK>(dy + m * E + e, dy_v);
        store_pack<GATED_PACK>(dz + m * lddz + e, dz_v);
        if (out) store_pack<GATED_PACK>(out + m * ldo + e, out_v);
    }
    if (own) store_pack<GATED_PACK>(parts + blockIdx.x * E + e, dw);
}

// any S, any alignment; dweight is summed in `parts` itself, each column by the same thread
template <typename X>
__global__ void gated_rmsnorm_backward_general_kernel(X* dy, X* dz, size_t lddz, X* out, size_t ldo,
                                                      float* parts, const X* dout, size_t lddo, const X* y,
                                                      const X* z, size_t ldz, const float* weight,
                                                      const float* rstd, size_t M, size_t E, size_t S,
                                                      bool norm_first) {
    __shared__ float shared[2 * WARP];
    const size_t e0 = blockIdx.y * S;
    float* part = parts + blockIdx.x * E;
    int phase = 0;
    for (size_t e = e0 + threadIdx.x; e < e0 + S; e += blockDim.x) part[e] = 0;
    for (size_t m = blockIdx.x; m < M; m += gridDim.x, phase ^= 1) {
        const float r = rstd[m * gridDim.y + blockIdx.y];
        float dot = 0;
        for (size_t e = e0 + threadIdx.x; e < e0 + S; e += blockDim.x) {
            float g = to_float(dout[m * lddo + e]) *
                      (to_float(y[m * E + e]) * silu_cuda(to_float(z[m * ldz + e])));
            dot += weight[e] * g;
            part[e] += g * r;
        }
        float mean = gated_sum(dot, shared, phase) * r / (float)S;
        for (size_t e = e0 + threadIdx.x; e < e0 + S; e += blockDim.x) {
            float y_e = to_float(y[m * E + e]), z_e = to_float(z[m * ldz + e]), sigma = sigmoid_cuda(z_e);
            float q = weight[e] * to_float(dout[m * lddo + e]), gate = z_e * sigma, p = y_e * gate;
            float dw_e = r * (norm_first ? q : q - p * r * mean);
            dy[m * E + e] = from_float<X>(norm_first ? r * (q * gate - y_e * r * mean) : dw_e * gate);
            dz[m * lddz + e] = from_float<X>(dw_e * y_e * silu_grad_cuda(z_e, sigma));
            if (out) out[m * ldo + e] = from_float<X>(weight[e] * r * p);
        }
    }
}

// the blocks of the backward: as many as fit on a chip of 132 SMs at a time, 1024 threads per SM. 16384
// tokens on an H200: 768 channels 0.046 ms (with half as many blocks 0.061), 1536 channels 0.085 ms.
static inline size_t gated_blocks(size_t M, size_t E, size_t S) {
    const size_t threads = gated_threads(S) ? gated_threads(S) : 256, groups = E / S;
    return min_size(M, 132 * max_size(GATED_THREADS / (threads * groups), 1));
}

// the scratch of gated_rmsnorm_backward_cuda, in floats
size_t gated_rmsnorm_scratch_cuda(size_t M, size_t E, size_t S) { return gated_blocks(M, E, S) * E; }

template <typename X>
const char* gated_rmsnorm_backward_cuda(X* dy, X* dz, size_t lddz, X* out, size_t ldo, float* dweight,
                                        const X* dout, size_t lddo, const X* y, const X* z, size_t ldz,
                                        const float* weight, const float* rstd, float* scratch, size_t M,
                                        size_t E, size_t S, bool norm_first, cudaStream_t stream,
                                        SumList* later = NULL) {
    const size_t pack = GATED_PACK * sizeof(X), blocks = gated_blocks(M, E, S);
    const unsigned threads = gated_threads(S);
    const dim3 grid((unsigned)blocks, (unsigned)(E / S));
    const char* name = "gated_rmsnorm_backward_kernel";
    if (threads && is_aligned(dy, pack, E * sizeof(X)) && is_aligned(dz, pack, lddz * sizeof(X)) &&
        is_aligned(out, pack, ldo * sizeof(X)) && is_aligned(dout, pack, lddo * sizeof(X)) &&
        is_aligned(y, pack, E * sizeof(X)) && is_aligned(z, pack, ldz * sizeof(X)) &&
        is_aligned(weight, GATED_PACK * 4, 0) && is_aligned(scratch, GATED_PACK * 4, E * 4)) {
        gated_rmsnorm_backward_kernel<<<grid, threads, 0, stream>>>(
            dy, dz, lddz, out, ldo, scratch, dout, lddo, y, z, ldz, weight, rstd, M, E, (int)S, norm_first);
    } else {
        gated_rmsnorm_backward_general_kernel<<<grid, 256, 0, stream>>>(
            dy, dz, lddz, out, ldo, scratch, dout, lddo, y, z, ldz, weight, rstd, M, E, S, norm_first);
        name = "gated_rmsnorm_backward_general_kernel";
    }
    cudaCheck(cudaGetLastError());
    sum_parts_cuda(dweight, NULL, scratch, blocks, E, 0, E, stream, later);
    return name;
}

// --------------------------------------------------------------------------------------------------
// 4.14 Attention
//
//   s_ij = scale <q_i, k_j>       lse_i = log sum_j exp(s_ij)     P_ij = exp(s_ij - lse_i)
//   out_i = sum_j P_ij v_j
// Token i sees the keys of its own document up to itself. Query head h uses KV head h Hkv / Hq. q, k and v of
// a token are one row of qkv, (Hq + 2 Hkv) dh wide: all q heads, all k heads, all v heads.
//
// The matrix of scores is never stored (FlashAttention, arXiv 2205.14135): a block takes a tile of queries
// and walks over the keys, tile by tile. What softmax needs of a whole row, its largest score and the sum of
// the exponentials, is corrected as it goes: when a larger score turns up, what has been summed so far
// shrinks by exp(old - new). lse is kept for backward, which computes any P_ij anew from two rows.
// Exponentials are powers of 2 (one instruction): scores are multiplied by scale log2(e), and lse is the
// logarithm to base 2.
//
// q and k are turned (rotary embedding) before, in place: 0.029 ms for 8 x 2048 tokens of 12 heads of 64
// (H200). As tiles are loaded it would be done anew for every tile of queries that meets the key. Backward
// turns the gradients of q and k back when it stores them.
//
// Tokens before the call are in a cache kv0 (B,capacity,2,Hkv,dh), keys turned, in X: position0[b] of them
// (whole numbers in float like all states; on the device, so that a recorded graph of launches stays valid).
// Keys are numbered on from there: key j is row j of the cache, or token j - position0[b] of the call.

enum { ROTARY_MAX = 256 };

// RotaryCuda: the first `dim` channels of a head are pairs that turn by position * theta[i]; pair i is
// channels (i, i + dim/2), interleaved: (2i, 2i + 1).   theta[i] = base^(-2i / dim)
// An angle is a whole number of 2^-64 turns: the product with a position then wraps around where a turn is
// full, and is exact at any position; as a float it would be off by 0.004 at position 131,072.
struct RotaryCuda {
    int dim = 0;
    bool interleaved = false;
    uint64_t theta[ROTARY_MAX / 2];
};

static inline RotaryCuda rotary_cuda(size_t dim, double base, bool interleaved) {
    RotaryCuda r;
    if (dim > ROTARY_MAX) die("rotary embedding of %zu channels; the GPU's has at most %d", dim, ROTARY_MAX);
    r.dim = (int)dim;
    r.interleaved = interleaved;
    for (size_t i = 0; i < dim / 2; i++) {
        double turns = pow(base, -2.0 * (double)i / (double)dim) / (2 * 3.14159265358979323846);
        r.theta[i] = (uint64_t)ldexp(turns - floor(turns), 64);
    }
    return r;
}

// rotary_turn: cosine and sine of position * theta. Between -pi and pi the special function unit is exact to
// 5e-7.
__device__ __forceinline__ float2 rotary_turn(int position, uint64_t theta) {
    const int turns = (int)((position * theta) >> 32);          // of 2^-32, from -2^31 to 2^31 - 1
    const float angle = (float)turns * 1.46291808e-9f;          // 2 pi / 2^32
    return make_float2(__cosf(angle), __sinf(angle));
}

// rotary_pairs: turns W pairs, (v[i], v[W + i]) or, interleaved, (v[2i], v[2i + 1]), by turn(i), or back
//   x' = x cos - y sin,  y' = x sin + y cos   =>   dx = dx' cos + dy' sin,  dy = dy' cos - dx' sin
template <int W, typename Turn>
__device__ __forceinline__ void rotary_pairs(float (&v)[2 * W], bool interleaved, bool back, Turn turn) {
    float a[2 * W];
    #pragma unroll
    for (int i = 0; i < W; i++) {
        const float2 by = turn(i);
        const float x = interleaved ? v[2 * i] : v[i], y = interleaved ? v[2 * i + 1] : v[W + i];
        const float s = back ? -by.y : by.y;
        a[i] = x * by.x - y * s;
        a[W + i] = x * s + y * by.x;
    }
    #pragma unroll
    for (int i = 0; i < 2 * W; i++) v[i] = interleaved ? a[i / 2 + i % 2 * W] : a[i];
}

// rotary_back: channel c of a head's gradient (dh floats), turned back
__device__ __forceinline__ float rotary_back(const float* head, int c, const RotaryCuda& rot, int position) {
    if (c >= rot.dim) return head[c];
    const int half = rot.dim / 2;
    const bool second = rot.interleaved ? c & 1 : c >= half;
    const int partner = rot.interleaved ? c ^ 1 : second ? c - half : c + half;
    float2 turn = rotary_turn(position, rot.theta[rot.interleaved ? c / 2 : second ? c - half : c]);
    return fmaf(head[c], turn.x, second ? -head[partner] * turn.y : head[partner] * turn.y);
}

// attention_span: of every token, the first key that it sees (x) and the last token that sees it (y). doc
// (B,T): document ids; the tokens of one document follow each other. What is in the cache is of document 0.
//   bytes: 12 per token
enum { SPAN_THREADS = 1024 };

__global__ void __launch_bounds__(SPAN_THREADS)
attention_span_kernel(int2* span, const int* doc, const float* position0, size_t T) {
    __shared__ int begin[SPAN_THREADS], end[SPAN_THREADS];
    const int* id = doc + blockIdx.x * T;
    const int tid = threadIdx.x, old = position0 ? (int)position0[blockIdx.x] : 0;
    span += blockIdx.x * T;
    // a thread has the tokens t0..t1-1: the last document that begins in them, and the first that ends
    const size_t each = (T + SPAN_THREADS - 1) / SPAN_THREADS, t0 = tid * each;
    const size_t t1 = t0 + each < T ? t0 + each : T;
    int first = -1, last = (int)T - 1;
    for (size_t t = t0; t < t1; t++) if (t > 0 && id[t] != id[t - 1]) first = (int)t;
    for (size_t t = t1; t > t0; t--) if (t < T && id[t] != id[t - 1]) last = (int)t - 1;
    begin[tid] = first;
    end[tid] = last;
    __syncthreads();
    for (int step = 1; step < SPAN_THREADS; step *= 2) {        // of this thread and all before (behind) it
        first = tid >= step ? begin[tid - step] : -1;
        last = tid + step < SPAN_THREADS ? end[tid + step] : (int)T - 1;
        __syncthreads();
        begin[tid] = max(begin[tid], first);
        end[tid] = min(end[tid], last);
        __syncthreads();
    }
    first = tid > 0 ? begin[tid - 1] : -1;
    last = tid + 1 < SPAN_THREADS ? end[tid + 1] : (int)T - 1;
    int from = first >= 0 ? old + first : id[0] == 0 ? 0 : old;
    for (size_t t = t0; t < t1; t++) {
        if (t > 0 && id[t] != id[t - 1]) from = old + (int)t;
        span[t].x = from;
    }
    for (size_t t = t1; t > t0; t--) {
        if (t < T && id[t] != id[t - 1]) last = (int)t - 1;
        span[t - 1].y = last;
    }
}

// span (B,T); NULL everywhere below means one document per sequence
static inline void attention_span_cuda(int2* span, const int* doc, const float* position0, size_t B, size_t T,
                                       cudaStream_t stream) {
    attention_span_kernel<<<(unsigned)B, SPAN_THREADS, 0, stream>>>(span, doc, position0, T);
    cudaCheck(cudaGetLastError());
}

// attention_rotate: turns q and k of every token, in place. W: pairs that a thread turns at once.
//   bytes: 4 per channel of q and k
enum { ROTATE_THREADS = 128, ROTATE_TOKENS = 4 };

template <typename X, int W>
__global__ void __launch_bounds__(ROTATE_THREADS)
attention_rotate_kernel(X* qkv, size_t ld, const float* position0, const int2* span,
                        const __grid_constant__ RotaryCuda rot, size_t M, size_t T, int heads, int dh) {
    __shared__ float2 turn[ROTATE_TOKENS][ROTARY_MAX / 2];
    const size_t m0 = (size_t)blockIdx.x * ROTATE_TOKENS;
    const int tokens = M - m0 < ROTATE_TOKENS ? (int)(M - m0) : (int)ROTATE_TOKENS, half = rot.dim / 2;
    for (int i = threadIdx.x; i < tokens * half; i += ROTATE_THREADS) {
        const size_t m = m0 + i / half;
        int position = (int)(m % T) + (position0 ? (int)position0[m / T] : 0) - (span ? span[m].x : 0);
        turn[i / half][i % half] = rotary_turn(position, rot.theta[i % half]);
    }
    __syncthreads();
    const int packs = half / W, units = heads * packs;          // heads: Hq + Hkv, one after the other
    for (int u = threadIdx.x; u < tokens * units; u += ROTATE_THREADS) {
        const int token = u / units, head = u % units / packs, i = u % packs * W;
        X* low = qkv + (m0 + token) * ld + head * dh + (rot.interleaved ? 2 * i : i);
        X* high = low + (rot.interleaved ? W : half);
        float v[2 * W];
        unpack<W>(v, load_pack<W>(low));
        unpack<W>(v + W, load_pack<W>(high));
        rotary_pairs<W>(v, rot.interleaved, false, [&](int j) { return turn[token][i + j]; });
        store_pack<W>(low, v);
        store_pack<W>(high, v + W);
    }
}

// attention_rotate_cuda: qkv in place, row stride ld
template <typename X>
void attention_rotate_cuda(X* qkv, size_t ld, const float* position0, const int2* span, const RotaryCuda& rot,
                           size_t B, size_t T, size_t Hq, size_t Hkv, size_t dh, cudaStream_t stream) {
    if (rot.dim == 0) return;
    const int W = 16 / (int)sizeof(X);
    const unsigned blocks = (unsigned)((B * T + ROTATE_TOKENS - 1) / ROTATE_TOKENS);
    const bool wide = rot.dim % (2 * W) == 0 && dh % W == 0 && is_aligned(qkv, 16, ld * sizeof(X));
    auto kernel = wide ? attention_rotate_kernel<X, W> : attention_rotate_kernel<X, 1>;
    kernel<<<blocks, ROTATE_THREADS, 0, stream>>>(qkv, ld, position0, span, rot, B * T, T, (int)(Hq + Hkv),
                                                  (int)dh);
    cudaCheck(cudaGetLastError());
}

// attention_append: the cache after the call holds the document of the last token, from row 0 on. With kvT =
// kv0 only new rows are written. A row of the cache is k and v of a token as they lie in qkv.
template <typename X, int W>
__global__ void __launch_bounds__(128)
attention_append_kernel(X* kvT, size_t capacity, const X* kv0, const float* position0, const X* kv, size_t ld,
                        const int2* span, int T, int width) {
    const size_t b = blockIdx.y;
    const int old = position0 ? (int)position0[b] : 0, length = old + T - (span ? span[b * T + T - 1].x : 0);
    const int kept = length > T ? length - T : 0;
    for (int row = (kvT == kv0 ? kept : 0) + blockIdx.x; row < length && row < (int)capacity;
         row += gridDim.x) {
        const X* from = row < kept ? kv0 + (b * capacity + row) * width
                                   : kv + (b * T + T - length + row) * ld;
        X* to = kvT + (b * capacity + row) * width;
        for (int c = threadIdx.x * W; c < width; c += 128 * W)
            *(Pack<X, W>*)(to + c) = load_pack<W>(from + c);
    }
}
__global__ void attention_position_kernel(float* positionT, const float* position0, const int2* span, int B,
                                          int T) {
    int b = blockIdx.x * blockDim.x + threadIdx.x;
    if (b >= B) return;
    const float first = span ? (float)span[b * T + T - 1].x : 0.0f;
    positionT[b] = (position0 ? position0[b] : 0.0f) + (float)T - first;
}

// attention_append_cuda: kvT (B,capacity,2,Hkv,dh), positionT (B) after the call; they may be kv0, position0
// (NULL: nothing before the call). qkv: rotated. Rows beyond the capacity are dropped.
template <typename X>
void attention_append_cuda(X* kvT, float* positionT, const X* kv0, size_t capacity, const float* position0,
                           const X* qkv, size_t ldqkv, const int2* span, size_t B, size_t T, size_t Hq,
                           size_t Hkv, size_t dh, cudaStream_t stream) {
    const int W = 16 / (int)sizeof(X);
    const size_t rows = kvT == kv0 ? T : capacity, width = 2 * Hkv * dh, w = sizeof(X);
    const X* kv = qkv + Hq * dh;
    const bool wide = width % W == 0 && is_aligned(kv, 16, ldqkv * w) && is_aligned(kvT, 16, 16) &&
                      is_aligned(kv0, 16, 16);
    auto kernel = wide ? attention_append_kernel<X, W> : attention_append_kernel<X, 1>;
    kernel<<<dim3((unsigned)(rows < 1024 ? rows : 1024), (unsigned)B), 128, 0, stream>>>(
        kvT, capacity, kv0, position0, kv, ldqkv, span, (int)T, (int)width);
    cudaCheck(cudaGetLastError());
    attention_position_kernel<<<(unsigned)((B + 127) / 128), 128, 0, stream>>>(positionT, position0, span,
                                                                               (int)B, (int)T);
    cudaCheck(cudaGetLastError());
}

// AttentionKeys: the keys of all sequences
template <typename X> struct AttentionKeys {
    const X *k, *cache;                         // of the call (first token), of the cache (or NULL)
    size_t ld, capacity;
    const float* position0;                     // with a cache
    const int2* span;
    int B, T, Hq, Hkv, dh;
};
// and what the kernels see of one sequence and KV head. v lies `value` behind k in the call and the cache.
template <typename X> struct AttentionHead {
    const X *call, *cache;
    size_t ld, ld_cache, value;
    int old;
    __device__ __forceinline__ AttentionHead(const AttentionKeys<X>& p, int b, int kv) {
        value = (size_t)p.Hkv * p.dh;
        ld = p.ld;
        ld_cache = 2 * value;
        call = p.k + b * (p.T * ld) + (size_t)kv * p.dh;
        cache = p.cache ? p.cache + b * (p.capacity * ld_cache) + (size_t)kv * p.dh : NULL;
        old = p.cache ? (int)p.position0[b] : 0;
    }
    __device__ __forceinline__ const X* row(int j) const {
        return j < old ? cache + j * ld_cache : call + (j - old) * ld;
    }
};

// AttentionCuda, AttentionBackwardCuda: what the kernels get
template <typename X> struct AttentionCuda : AttentionKeys<X> {
    X* out; size_t ldo;                         // (B,T,Hq,dh)
    float* lse;                                 // (B,Hq,T) or NULL
    const X* q;                                 // row stride ld
    float scale;                                // of scores, times log2(e)
};
template <typename X> struct AttentionBackwardCuda : AttentionKeys<X> {
    X* dqkv; size_t lddqkv;
    const X *dout, *out, *q; size_t lddo, ldo;
    const float* lse;
    float* delta;                               // (B,Hq,T): <dout_i, out_i>
    float scale;                                // of gradients
    RotaryCuda rotary;
};
static const float ATTENTION_LOG2E = 1.44269504f;

// --- general path: any head size and alignment, float as exact as float is -------------------------------
// A warp has one query (forward, dq) or one key (dk, dv) and goes over the others 32 at a time: first each
// lane has one of them, then each lane has some channels.

enum { ATTENTION_WARPS = 4 };

template <typename X>
__device__ __forceinline__ float attention_dot(const float* a, const X* b, int n) {
    float sum = 0;
    for (int c = 0; c < n; c++) sum = fmaf(a[c], to_float(b[c]), sum);
    return sum;
}
__device__ __forceinline__ float warp_max(float x) {
    #pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

template <typename X>
__global__ void __launch_bounds__(ATTENTION_WARPS * WARP)
attention_forward_kernel(const AttentionCuda<X> p) {
    extern __shared__ float attention_floats[];                 // per warp: q, sum (dh), weight (32)
    const int lane = threadIdx.x % WARP, w = threadIdx.x / WARP, dh = p.dh;
    const size_t row = (size_t)blockIdx.x * ATTENTION_WARPS + w, m = row / p.Hq, b = m / p.T, h = row % p.Hq;
    if (m >= (size_t)p.B * p.T) return;
    float *q = attention_floats + w * (2 * dh + WARP), *sum = q + dh, *weight = sum + dh;
    const AttentionHead<X> keys(p, (int)b, (int)h * p.Hkv / p.Hq);
    for (int c = lane; c < dh; c += WARP) {
        q[c] = p.scale * to_float(p.q[m * p.ld + h * dh + c]);
        sum[c] = 0;
    }
    __syncwarp();
    const int last = keys.old + (int)(m % p.T);
    float max = -INFINITY, total = 0;                           // total: of this lane's keys
    for (int j0 = p.span ? p.span[m].x : 0; j0 <= last; j0 += WARP) {
        float s = j0 + lane <= last ? attention_dot(q, keys.row(j0 + lane), dh) : -INFINITY;
        float larger = fmaxf(max, warp_max(s)), shrink = exp2f(max - larger);
        weight[lane] = exp2f(s - larger);
        total = fmaf(total, shrink, weight[lane]);
        max = larger;
        __syncwarp();
        const int n = last - j0 < WARP - 1 ? last - j0 + 1 : (int)WARP;
        for (int c = lane; c < dh; c += WARP) {
            float acc = sum[c] * shrink;
            for (int j = 0; j < n; j++)
                acc = fmaf(weight[j], to_float(keys.row(j0 + j)[keys.value + c]), acc);
            sum[c] = acc;
        }
        __syncwarp();
    }
    total = warp_sum(total);
    for (int c = lane; c < dh; c += WARP) p.out[m * p.ldo + h * dh + c] = from_float<X>(sum[c] / total);
    if (p.lse && lane == 0) p.lse[(b * p.Hq + h) * p.T + m % p.T] = max + log2f(total);
}

// forward: out_i = sum_j P_ij v_j     =>  dv_j = sum_i P_ij dout_i      dP_ij = <dout_i, v_j>
// forward: P_i = softmax(s_i)         =>  ds_ij = P_ij (dP_ij - delta_i)
//                                         delta_i = sum_j P_ij dP_ij = <dout_i, out_i>
// forward: s_ij = scale <q_i, k_j>    =>  dq_i = scale sum_j ds_ij k_j  dk_j = scale sum_i ds_ij q_i
template <typename X>
__global__ void __launch_bounds__(ATTENTION_WARPS * WARP)
attention_backward_q_kernel(const __grid_constant__ AttentionBackwardCuda<X> p) {
    extern __shared__ float attention_floats[];                 // per warp: q, dout, dq (dh), weight (32)
    const int lane = threadIdx.x % WARP, w = threadIdx.x / WARP, dh = p.dh;
    const size_t row = (size_t)blockIdx.x * ATTENTION_WARPS + w, m = row / p.Hq, b = m / p.T, h = row % p.Hq;
    if (m >= (size_t)p.B * p.T) return;
    float *q = attention_floats + w * (3 * dh + WARP), *dout = q + dh, *dq = dout + dh, *weight = dq + dh;
    const AttentionHead<X> keys(p, (int)b, (int)h * p.Hkv / p.Hq);
    float delta = 0;
    for (int c = lane; c < dh; c += WARP) {
        q[c] = to_float(p.q[m * p.ld + h * dh + c]);
        dout[c] = to_float(p.dout[m * p.lddo + h * dh + c]);
        delta = fmaf(dout[c], to_float(p.out[m * p.ldo + h * dh + c]), delta);
        dq[c] = 0;
    }
    delta = warp_sum(delta);
    const int last = keys.old + (int)(m % p.T), first = p.span ? p.span[m].x : 0;
    const size_t at = (b * p.Hq + h) * p.T + m % p.T;
    const float lse = p.lse[at], scale = p.scale * ATTENTION_LOG2E;
    if (lane == 0) p.delta[at] = delta;
    __syncwarp();
    for (int j0 = first; j0 <= last; j0 += WARP) {
        weight[lane] = 0;
        if (j0 + lane <= last) {
            const X* k = keys.row(j0 + lane);
            const float P = exp2f(fmaf(scale, attention_dot(q, k, dh), -lse));
            weight[lane] = P * (attention_dot(dout, k + keys.value, dh) - delta);
        }
        __syncwarp();
        const int n = last - j0 < WARP - 1 ? last - j0 + 1 : (int)WARP;
        for (int c = lane; c < dh; c += WARP) {
            float acc = dq[c];
            for (int i = 0; i < n; i++) acc = fmaf(weight[i], to_float(keys.row(j0 + i)[c]), acc);
            dq[c] = acc;
        }
        __syncwarp();
    }
    X* to = p.dqkv + m * p.lddqkv + h * dh;
    for (int c = lane; c < dh; c += WARP)
        to[c] = from_float<X>(p.scale * rotary_back(dq, c, p.rotary, last - first));
}

template <typename X>
__global__ void __launch_bounds__(ATTENTION_WARPS * WARP)
attention_backward_kv_kernel(const __grid_constant__ AttentionBackwardCuda<X> p) {
    extern __shared__ float attention_floats[];     // per warp: k, v, dk, dv (dh), P, dS (32)
    const int lane = threadIdx.x % WARP, w = threadIdx.x / WARP, dh = p.dh;
    const size_t row = (size_t)blockIdx.x * ATTENTION_WARPS + w, m = row / p.Hkv, b = m / p.T;
    const int kv = (int)(row % p.Hkv), j = (int)(m % p.T), group = p.Hq / p.Hkv;
    if (m >= (size_t)p.B * p.T) return;
    float *k = attention_floats + w * (4 * dh + 2 * WARP), *v = k + dh, *dk = v + dh, *dv = dk + dh;
    float *P = dv + dh, *dS = P + WARP;
    const size_t k_column = (size_t)(p.Hq + kv) * dh, v_column = k_column + (size_t)p.Hkv * dh;
    for (int c = lane; c < dh; c += WARP) {
        k[c] = to_float(p.q[m * p.ld + k_column + c]);
        v[c] = to_float(p.q[m * p.ld + v_column + c]);
        dk[c] = dv[c] = 0;
    }
    __syncwarp();
    const int last = p.span ? p.span[m].y : p.T - 1;
    const float scale = p.scale * ATTENTION_LOG2E;
    for (int h = kv * group; h < (kv + 1) * group; h++) {       // the query heads of a KV head, in order
        const X *q = p.q + b * p.T * p.ld + h * dh, *dout = p.dout + b * p.T * p.lddo + h * dh;
        const size_t stat = (b * p.Hq + h) * p.T;
        for (int i0 = j; i0 <= last; i0 += WARP) {
            const size_t i = i0 + lane;
            P[lane] = dS[lane] = 0;
            if (i <= (size_t)last) {
                P[lane] = exp2f(fmaf(scale, attention_dot(k, q + i * p.ld, dh), -p.lse[stat + i]));
                dS[lane] = P[lane] * (attention_dot(v, dout + i * p.lddo, dh) - p.delta[stat + i]);
            }
            __syncwarp();
            const int n = last - i0 < WARP - 1 ? last - i0 + 1 : (int)WARP;
            for (int c = lane; c < dh; c += WARP) {
                float acc_k = dk[c], acc_v = dv[c];
                for (int r = 0; r < n; r++) {
                    acc_k = fmaf(dS[r], to_float(q[(i0 + r) * p.ld + c]), acc_k);
                    acc_v = fmaf(P[r], to_float(dout[(i0 + r) * p.lddo + c]), acc_v);
                }
                dk[c] = acc_k;
                dv[c] = acc_v;
            }
            __syncwarp();
        }
    }
    X* to = p.dqkv + m * p.lddqkv;
    const int position = (p.cache ? (int)p.position0[b] : 0) + j - (p.span ? p.span[m].x : 0);
    for (int c = lane; c < dh; c += WARP) {
        to[k_column + c] = from_float<X>(p.scale * rotary_back(dk, c, p.rotary, position));
        to[v_column + c] = from_float<X>(dv[c]);
    }
}

// --- fast path: pieces ----------------------------------------------------------------------------------
// bf16, head sizes that are multiples of 8 up to 128, filled up with zeros to DH = 32, 64, 96 or 128. The
// products are made by the tensor core (mma, see scan_mma_bf16). Rows in shared memory are DH + 8 long: then
// eight rows of 16 bytes lie in different banks wherever they begin.

// Operands from tiles [row][channel] with rows of LD numbers: this lane's pointer into the 16 x 16 block at
// (row, col). attention_at: for A, rows are rows; for B (load_matrices_trans), rows are rows.
// attention_at_by_column: for B, whose columns are the rows of the tile: a product of two tiles along their
// channels
template <int LD> __device__ __forceinline__ const bf16* attention_at(const bf16* tile, int row, int col) {
    const int lane = threadIdx.x % WARP;
    return tile + (row + (lane & 15)) * LD + col + (lane >> 4) * 8;
}
template <int LD>
__device__ __forceinline__ const bf16* attention_at_by_column(const bf16* tile, int row, int col) {
    const int lane = threadIdx.x % WARP;
    return tile + (row + (lane & 7) + ((lane >> 4) << 3)) * LD + col + ((lane >> 3) & 1) * 8;
}

// attention_load: starts the copy of ROWS rows; rows beyond `rows` and channels beyond dh become zeros
template <int ROWS, int DH, int THREADS>
__device__ __forceinline__ void attention_load(bf16* to, const bf16* from, size_t ld, int rows, int dh) {
    #pragma unroll
    for (int i = 0; i < ROWS * DH / 8 / THREADS; i++) {
        const int u = threadIdx.x + i * THREADS, r = u / (DH / 8), c = u % (DH / 8) * 8;
        const int offset = (r < rows ? r : rows - 1) * (int)ld + (c < dh ? c : 0);
        scan_copy16(to + r * (DH + 8) + c, from + offset, r < rows && c < dh);
    }
}

// the same for keys (or values) j.., from the cache and the call
template <int ROWS, int DH, int THREADS>
__device__ __forceinline__ void attention_load_keys(bf16* to, const AttentionHead<bf16>& keys, size_t value,
                                                    int j, int rows, int dh) {
    if (j >= keys.old) {
        attention_load<ROWS, DH, THREADS>(to, keys.call + (j - keys.old) * keys.ld + value, keys.ld, rows,
                                          dh);
        return;
    }
    #pragma unroll 1
    for (int u = threadIdx.x; u < ROWS * DH / 8; u += THREADS) {
        const int r = u / (DH / 8), c = u % (DH / 8) * 8;
        const bool inside = r < rows && c < dh;
        scan_copy16(to + r * (DH + 8) + c, inside ? keys.row(j + r) + value + c : keys.cache, inside);
    }
}

// attention_product: s (16 MT x 16 N2) = c + A B^T over DH channels; A in registers or, NULL, rows a_row.. of
// a tile. c(m, n): a 16 x 8 block of c, 4 numbers per lane
template <int DH, int MT, int N2, typename C>
__device__ __forceinline__ void attention_product(float (&s)[MT][2 * N2][4], C c,
                                                  const uint32_t (*a)[DH / 16][4], const bf16* a_tile,
                                                  int a_row, const bf16* b_tile, int b_row) {
    #pragma unroll
    for (int k = 0; k < DH / 16; k++) {
        uint32_t own[MT][4];
        #pragma unroll
        for (int m = 0; m < MT; m++) {
            if (!a) load_matrices(own[m], attention_at<DH + 8>(a_tile, a_row + 16 * m, 16 * k));
            else {
                #pragma unroll
                for (int i = 0; i < 4; i++) own[m][i] = a[m][k][i];
            }
        }
        #pragma unroll
        for (int n = 0; n < N2; n++) {
            uint32_t b[4];
            load_matrices(b, attention_at_by_column<DH + 8>(b_tile, b_row + 16 * n, 16 * k));
            #pragma unroll
            for (int m = 0; m < MT; m++) {
                scan_mma_bf16(s[m][2 * n], k ? s[m][2 * n] : c(m, 2 * n), own[m], b[0], b[1]);
                scan_mma_bf16(s[m][2 * n + 1], k ? s[m][2 * n + 1] : c(m, 2 * n + 1), own[m], b[2], b[3]);
            }
        }
    }
}

// attention_mask: scores (rows row0.., columns col0..) that do not count become -infinity. Rows are queries,
// numbered like keys, and border is the first key of each row; or, KEYS, rows are keys, and border is the
// last query of each.
template <bool KEYS, int MT, int N>
__device__ __forceinline__ void attention_mask(float (&s)[MT][N][4], int col0, int row0,
                                               const int (&border)[MT][2]) {
    const int lane = threadIdx.x % WARP, g = lane >> 2, quad = lane & 3;
    #pragma unroll
    for (int m = 0; m < MT; m++) {
        #pragma unroll
        for (int n = 0; n < N; n++) {
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                const int col = col0 + 8 * n + 2 * quad + i % 2, row = row0 + 16 * m + i / 2 * 8 + g;
                if (KEYS ? col < row || col > border[m][i / 2] : col > row || col < border[m][i / 2])
                    s[m][n][i] = -INFINITY;
            }
        }
    }
}

// attention_accumulate: acc (16 MT x DH) += P B, P (16 MT x 16 K2) as the tensor core left it, B rows b_row..
template <int DH, int MT, int K2>
__device__ __forceinline__ void attention_accumulate(float (&acc)[MT][DH / 8][4],
                                                     const float (&P)[MT][2 * K2][4], const bf16* b_tile,
                                                     int b_row) {
    #pragma unroll
    for (int k = 0; k < K2; k++) {
        uint32_t a[MT][4];
        #pragma unroll
        for (int m = 0; m < MT; m++) {
            #pragma unroll
            for (int i = 0; i < 4; i++)
                a[m][i] = scan_pack(P[m][2 * k + i / 2][i % 2 * 2], P[m][2 * k + i / 2][i % 2 * 2 + 1]);
        }
        #pragma unroll
        for (int n = 0; n < DH / 16; n++) {
            uint32_t b[4];
            load_matrices_trans(b, attention_at<DH + 8>(b_tile, b_row + 16 * k, 16 * n));
            #pragma unroll
            for (int m = 0; m < MT; m++) {
                scan_mma_bf16(acc[m][2 * n], a[m], b[0], b[1]);
                scan_mma_bf16(acc[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// AttentionQueries: which 64 MT queries of which head a block has. Blocks start in order: first those of the
// last tiles, which see the most keys.
template <int MT> struct AttentionQueries {
    int head, b, h, i0, row0;            // i0: the block's first token, row0: the first one of this warp
    int begin, latest, first[MT][2];     // first key: of the block's first query, of the warp's last one, of
    const int2* span;                    //   this lane's rows row0 + 16 m + 8 half + g; span of the sequence
    template <typename P> __device__ __forceinline__ AttentionQueries(const P& p, int tiles) {
        const int heads = p.B * p.Hq, w = threadIdx.x / WARP, g = threadIdx.x % WARP / 4;
        head = blockIdx.x % heads;
        b = head / p.Hq;
        h = head % p.Hq;
        i0 = (tiles - 1 - blockIdx.x / heads) * 64 * MT;
        row0 = i0 + w * 16 * MT;
        span = p.span ? p.span + (size_t)b * p.T : NULL;
        auto first_key = [&](int t) { return span ? span[t < p.T ? t : p.T - 1].x : 0; };
        begin = first_key(i0);
        latest = first_key(row0 + 16 * MT - 1);
        #pragma unroll
        for (int i = 0; i < 2 * MT; i++) first[i / 2][i % 2] = first_key(row0 + 8 * i + g);
    }
};

// --- fast path: forward ---------------------------------------------------------------------------------
// A block has 64 MT queries of one head, a warp 16 MT of them; keys come in tiles of BN, the next one is
// copied while this one is used.
enum { ATTENTION_THREADS = ATTENTION_WARPS * WARP };

template <int DH, int MT, int BN> struct AttentionForwardShared {
    bf16 q[64 * MT][DH + 8], k[2][BN][DH + 8], v[2][BN][DH + 8];
};

template <int DH, int MT, int BN>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2)
attention_forward_fast_kernel(const __grid_constant__ AttentionCuda<bf16> p, int tiles) {
    enum { BM = 64 * MT, ROWS = 16 * MT, IN_REGISTERS = DH <= 64 };
    extern __shared__ __align__(128) char shared[];
    AttentionForwardShared<DH, MT, BN>& sh = *(AttentionForwardShared<DH, MT, BN>*)shared;
    const int lane = threadIdx.x % WARP, w = threadIdx.x / WARP, g = lane >> 2, quad = lane & 3;
    const AttentionQueries<MT> at(p, tiles);
    const int h = at.h, i0 = at.i0, row0 = at.row0;
    const AttentionHead<bf16> kv(p, at.b, h * p.Hkv / p.Hq);
    const int old = kv.old, keys = old + (i0 + BM < p.T ? i0 + BM : p.T);
    const size_t m0 = (size_t)at.b * p.T + i0;
    int j0 = at.begin / BN * BN;
    auto load = [&](int j, int stage) {
        attention_load_keys<BN, DH, ATTENTION_THREADS>(sh.k[stage][0], kv, 0, j, keys - j, p.dh);
        attention_load_keys<BN, DH, ATTENTION_THREADS>(sh.v[stage][0], kv, kv.value, j, keys - j, p.dh);
        copy_async_commit();
    };
    attention_load<BM, DH, ATTENTION_THREADS>(sh.q[0], p.q + m0 * p.ld + h * p.dh, p.ld, p.T - i0, p.dh);
    load(j0, 0);

    uint32_t q[MT][DH / 16][4];
    // base: what is subtracted from scores; finite, so that -infinity - base is no NaN
    float base[MT][2], total[MT][2] = {}, out[MT][DH / 8][4] = {};
    #pragma unroll
    for (int m = 0; m < MT; m++) base[m][0] = base[m][1] = -1e30f;
    const float zero[4] = {};
    auto none = [&](int, int) { return zero; };
    bool start = true;
    for (int stage = 0; j0 < keys; j0 += BN, stage ^= 1) {
        copy_async_wait(0);
        __syncthreads();
        if (j0 + BN < keys) load(j0 + BN, stage ^ 1);
        if (start && IN_REGISTERS) {
            #pragma unroll
            for (int m = 0; m < MT; m++) {
                #pragma unroll
                for (int c = 0; c < DH / 16; c++)
                    load_matrices(q[m][c], attention_at<DH + 8>(sh.q[0], w * ROWS + 16 * m, 16 * c));
            }
        }
        start = false;
        if (j0 > old + row0 + ROWS - 1) continue;               // all keys are in the future of these rows
        float s[MT][BN / 8][4];
        attention_product<DH, MT, BN / 16>(s, none, IN_REGISTERS ? q : NULL, sh.q[0], w * ROWS,
                                           sh.k[stage][0], 0);
        if (j0 + BN - 1 > old + row0 || j0 < at.latest) attention_mask<false>(s, j0, old + row0, at.first);
        // P is made with the largest score of some time ago, as long as no score is larger by more than 8 (of
        // exponents to base 2): then P is at most 256, and float and bf16 lose nothing
        float larger[MT][2];
        bool renew = false;
        #pragma unroll
        for (int m = 0; m < MT; m++) {
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                larger[m][half] = s[m][0][2 * half];
                #pragma unroll
                for (int n = 0; n < BN / 8; n++)
                    larger[m][half] = fmaxf(larger[m][half], fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                renew |= fmaf(larger[m][half], p.scale, -base[m][half]) > 8;
            }
        }
        if (__any_sync(0xffffffffu, renew)) {
            #pragma unroll
            for (int m = 0; m < MT; m++) {
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    float x = larger[m][half];
                    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
                    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2)) * p.scale;
                    x = fmaxf(x, base[m][half]);
                    const float shrink = exp2_unit(base[m][half] - x);
                    base[m][half] = x;
                    total[m][half] *= shrink;
                    #pragma unroll
                    for (int n = 0; n < DH / 8; n++) {
                        out[m][n][2 * half] *= shrink;
                        out[m][n][2 * half + 1] *= shrink;
                    }
                }
            }
        }
        #pragma unroll
        for (int m = 0; m < MT; m++) {
            #pragma unroll
            for (int n = 0; n < BN / 8; n++) {
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    s[m][n][i] = exp2_unit(fmaf(s[m][n][i], p.scale, -base[m][i / 2]));
                    total[m][i / 2] += s[m][n][i];
                }
            }
        }
        attention_accumulate<DH, MT, BN / 16>(out, s, sh.v[stage][0], 0);
    }
    // through shared memory (each warp its own rows of q) to whole rows
    __syncwarp();
    #pragma unroll
    for (int m = 0; m < MT; m++) {
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = total[m][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const float inverse = reciprocal_unit(sum);
            const int r = w * ROWS + 16 * m + 8 * half + g;
            #pragma unroll
            for (int n = 0; n < DH / 8; n++)
                *(uint32_t*)&sh.q[r][8 * n + 2 * quad] =
                    scan_pack(out[m][n][2 * half] * inverse, out[m][n][2 * half + 1] * inverse);
            if (p.lse && quad == 0 && i0 + r < p.T)
                p.lse[(size_t)at.head * p.T + i0 + r] = base[m][half] + log2f(sum);
        }
    }
    __syncwarp();
    #pragma unroll
    for (int u = lane; u < ROWS * DH / 8; u += WARP) {
        const int r = w * ROWS + u / (DH / 8), c = u % (DH / 8) * 8;
        if (i0 + r < p.T && c < p.dh)
            scan_store16(p.out + (m0 + r) * p.ldo + h * p.dh + c, *(const uint4*)&sh.q[r][c]);
    }
}

// --- fast path: backward --------------------------------------------------------------------------------
// Two kernels, each with its own scores: seven products instead of five, but each result stays in the
// registers of one warp until it is complete; a single kernel would have to add up dq (or dk and dv) over
// blocks, in memory.

// attention_store_gradient: ROWS x DH floats of a warp, in shared memory, times scale, `turned` back, to rows
// of dqkv. Units of 16 channels: two packs that hold 8 pairs, or any two.
template <int ROWS, int DH>
__device__ __forceinline__ void attention_store_gradient(bf16* to, size_t ld, const float (*rows)[DH + 4],
                                                         int t0, int T, int old, const int2* span,
                                                         float scale, const RotaryCuda& rotary, bool turned,
                                                         int dh) {
    const int dim = turned ? rotary.dim : 0;
    const bool whole = dim % 16 == 0;
    for (int u = threadIdx.x % WARP; u < ROWS * DH / 16; u += WARP) {
        const int r = u / (DH / 16), unit = u % (DH / 16), t = t0 + r;
        if (t >= T) continue;
        const int position = old + t - (span ? span[t].x : 0);
        const bool pairs = whole && 16 * unit < dim, apart = pairs && !rotary.interleaved;
        const int low = apart ? 8 * unit : 16 * unit, high = apart ? low + dim / 2 : low + 8;
        float v[16];
        #pragma unroll
        for (int i = 0; i < 8; i += 4) {
            *(float4*)(v + i) = *(const float4*)(rows[r] + low + i);
            *(float4*)(v + 8 + i) = *(const float4*)(rows[r] + high + i);
        }
        if (pairs) {
            rotary_pairs<8>(v, rotary.interleaved, true,
                            [&](int i) { return rotary_turn(position, rotary.theta[8 * unit + i]); });
        } else if (16 * unit < dim) {
            #pragma unroll
            for (int i = 0; i < 16; i++) v[i] = rotary_back(rows[r], 16 * unit + i, rotary, position);
        }
        #pragma unroll
        for (int i = 0; i < 16; i++) v[i] *= scale;
        if (low < dh) scan_store16(to + r * ld + low, scan_pack8(v));
        if (high < dh) scan_store16(to + r * ld + high, scan_pack8(v + 8));
    }
}

// dq: as forward, a block has 64 MT queries. Also makes delta.
template <int DH, int MT, int BN> struct AttentionBackwardQShared {
    union {
        struct { bf16 q[64 * MT][DH + 8], dout[64 * MT][DH + 8]; };
        float dq[64 * MT][DH + 4];
    };
    bf16 k[2][BN][DH + 8], v[2][BN][DH + 8];
    float delta[64 * MT];
};

template <int DH, int MT, int BN>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2)
attention_backward_q_fast_kernel(const __grid_constant__ AttentionBackwardCuda<bf16> p, int tiles) {
    enum { BM = 64 * MT, ROWS = 16 * MT, IN_REGISTERS = DH <= 64, STEP = 32 };
    extern __shared__ __align__(128) char shared[];
    AttentionBackwardQShared<DH, MT, BN>& sh = *(AttentionBackwardQShared<DH, MT, BN>*)shared;
    const int lane = threadIdx.x % WARP, w = threadIdx.x / WARP, g = lane >> 2, quad = lane & 3;
    const AttentionQueries<MT> at(p, tiles);
    const int h = at.h, i0 = at.i0, row0 = at.row0;
    const AttentionHead<bf16> kv(p, at.b, h * p.Hkv / p.Hq);
    const int old = kv.old, keys = old + (i0 + BM < p.T ? i0 + BM : p.T);
    const size_t m0 = (size_t)at.b * p.T + i0, stat = (size_t)at.head * p.T + i0;
    int j0 = at.begin / BN * BN;
    auto load = [&](int j, int stage) {
        attention_load_keys<BN, DH, ATTENTION_THREADS>(sh.k[stage][0], kv, 0, j, keys - j, p.dh);
        attention_load_keys<BN, DH, ATTENTION_THREADS>(sh.v[stage][0], kv, kv.value, j, keys - j, p.dh);
        copy_async_commit();
    };
    attention_load<BM, DH, ATTENTION_THREADS>(sh.q[0], p.q + m0 * p.ld + h * p.dh, p.ld, p.T - i0, p.dh);
    attention_load<BM, DH, ATTENTION_THREADS>(sh.dout[0], p.dout + m0 * p.lddo + h * p.dh, p.lddo, p.T - i0,
                                              p.dh);
    load(j0, 0);
    copy_async_wait(0);
    __syncthreads();
    if ((int)threadIdx.x < BM) {
        const int r = threadIdx.x;
        float delta = 0;
        if (i0 + r < p.T) {
            for (int c = 0; c < p.dh; c += 8) {
                float a[8], o[8];
                scan_unpack8(a, &sh.dout[r][c]);
                scan_unpack8(o, p.out + (m0 + r) * p.ldo + h * p.dh + c);
                #pragma unroll
                for (int i = 0; i < 8; i++) delta = fmaf(a[i], o[i], delta);
            }
            p.delta[stat + r] = delta;
        }
        sh.delta[r] = delta;
    }
    uint32_t q[MT][DH / 16][4], dout[MT][DH / 16][4];
    if (IN_REGISTERS) {
        #pragma unroll
        for (int m = 0; m < MT; m++) {
            #pragma unroll
            for (int c = 0; c < DH / 16; c++) {
                load_matrices(q[m][c], attention_at<DH + 8>(sh.q[0], w * ROWS + 16 * m, 16 * c));
                load_matrices(dout[m][c], attention_at<DH + 8>(sh.dout[0], w * ROWS + 16 * m, 16 * c));
            }
        }
    }
    __syncthreads();
    float lse[MT][2], delta[MT][4], dq[MT][DH / 8][4] = {};
    const float scale = p.scale * ATTENTION_LOG2E;
    #pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        const int r = w * ROWS + 8 * i + g;
        lse[i / 2][i % 2] = i0 + r < p.T ? p.lse[stat + r] : INFINITY;     // beyond T: P = 0
        delta[i / 2][i % 2 * 2] = delta[i / 2][i % 2 * 2 + 1] = -sh.delta[r];
    }
    const float zero[4] = {};
    auto none = [&](int, int) { return zero; };
    auto minus_delta = [&](int m, int) { return delta[m]; };
    for (int stage = 0; j0 < keys; j0 += BN, stage ^= 1) {
        copy_async_wait(0);
        __syncthreads();
        if (j0 + BN < keys) load(j0 + BN, stage ^ 1);
        #pragma unroll
        for (int j1 = 0; j1 < BN; j1 += STEP) {
            if (j0 + j1 > old + row0 + ROWS - 1) continue;
            float s[MT][STEP / 8][4], dP[MT][STEP / 8][4];
            attention_product<DH, MT, STEP / 16>(s, none, IN_REGISTERS ? q : NULL, sh.q[0], w * ROWS,
                                                 sh.k[stage][0], j1);
            attention_product<DH, MT, STEP / 16>(dP, minus_delta, IN_REGISTERS ? dout : NULL, sh.dout[0],
                                                 w * ROWS, sh.v[stage][0], j1);
            if (j0 + j1 + STEP - 1 > old + row0 || j0 + j1 < at.latest)
                attention_mask<false>(s, j0 + j1, old + row0, at.first);
            #pragma unroll
            for (int m = 0; m < MT; m++) {
                #pragma unroll
                for (int n = 0; n < STEP / 8; n++) {
                    #pragma unroll
                    for (int i = 0; i < 4; i++)
                        s[m][n][i] = exp2_unit(fmaf(s[m][n][i], scale, -lse[m][i / 2])) * dP[m][n][i];
                }
            }
            attention_accumulate<DH, MT, STEP / 16>(dq, s, sh.k[stage][0], j1);
        }
    }
    __syncthreads();                                            // dq takes the place of q and dout
    #pragma unroll
    for (int m = 0; m < MT; m++) {
        #pragma unroll
        for (int n = 0; n < DH / 8; n++) {
            #pragma unroll
            for (int half = 0; half < 2; half++)
                *(float2*)&sh.dq[w * ROWS + 16 * m + 8 * half + g][8 * n + 2 * quad] =
                    make_float2(dq[m][n][2 * half], dq[m][n][2 * half + 1]);
        }
    }
    __syncwarp();
    attention_store_gradient<ROWS, DH>(p.dqkv + (m0 + w * ROWS) * p.lddqkv + h * p.dh, p.lddqkv,
                                       sh.dq + w * ROWS, row0, p.T, old, at.span, p.scale, p.rotary, true,
                                       p.dh);
}

// dk, dv: a block has 64 MT keys of one KV head and walks over the queries that see them, of all query heads
// that use it, in order. Scores are made transposed, keys are rows: so P and dS are operands of the next
// products as they lie in the registers.
template <int DH, int MT, int BQ> struct AttentionBackwardKVShared {
    union {
        struct { bf16 k[64 * MT][DH + 8], v[64 * MT][DH + 8]; };
        float dkv[64 * MT][DH + 4];
    };
    bf16 q[2][BQ][DH + 8], dout[2][BQ][DH + 8];
    float lse[2][BQ], delta[2][BQ];
};

template <int DH, int MT, int BQ>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2)
attention_backward_kv_fast_kernel(const __grid_constant__ AttentionBackwardCuda<bf16> p, int) {
    enum { BN = 64 * MT, ROWS = 16 * MT, STEP = 32 };
    extern __shared__ __align__(128) char shared[];
    AttentionBackwardKVShared<DH, MT, BQ>& sh = *(AttentionBackwardKVShared<DH, MT, BQ>*)shared;
    const int lane = threadIdx.x % WARP, w = threadIdx.x / WARP, g = lane >> 2, quad = lane & 3;
    // the first tiles, which most queries see, start first
    const int heads = p.B * p.Hkv, head = blockIdx.x % heads, tile = blockIdx.x / heads;
    const int b = head / p.Hkv, kv = head % p.Hkv, group = p.Hq / p.Hkv, j0 = tile * BN, row0 = j0 + w * ROWS;
    const size_t m0 = (size_t)b * p.T + j0, first_token = (size_t)b * p.T;
    const bf16* k = p.q + m0 * p.ld + (size_t)(p.Hq + kv) * p.dh;
    const int2* span = p.span ? p.span + first_token : NULL;
    // last[m][half]: the last query that sees this lane's rows; last_all: the first row of this warp
    int last[MT][2], last_all = p.T - 1, queries = p.T;
    #pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        const int t = row0 + 8 * i + g;
        last[i / 2][i % 2] = span && t < p.T ? span[t].y : p.T - 1;
    }
    if (span) {
        last_all = span[row0 < p.T ? row0 : p.T - 1].y;
        queries = span[j0 + BN < p.T ? j0 + BN - 1 : p.T - 1].y + 1;
    }
    const int i_begin = j0 / BQ * BQ, steps = (queries - i_begin + BQ - 1) / BQ;
    auto load = [&](int step, int stage) {
        const int h = kv * group + step / steps, i = i_begin + step % steps * BQ;
        attention_load<BQ, DH, ATTENTION_THREADS>(sh.q[stage][0],
            p.q + (first_token + i) * p.ld + h * p.dh, p.ld, p.T - i, p.dh);
        attention_load<BQ, DH, ATTENTION_THREADS>(sh.dout[stage][0],
            p.dout + (first_token + i) * p.lddo + h * p.dh, p.lddo, p.T - i, p.dh);
        if ((int)threadIdx.x < BQ) {
            const bool inside = i + (int)threadIdx.x < p.T;
            const size_t at = ((size_t)b * p.Hq + h) * p.T + i + threadIdx.x;
            if (inside) scan_copy4(&sh.lse[stage][threadIdx.x], p.lse + at, true);
            else sh.lse[stage][threadIdx.x] = INFINITY;
            scan_copy4(&sh.delta[stage][threadIdx.x], inside ? p.delta + at : p.delta, inside);
        }
        copy_async_commit();
    };
    attention_load<BN, DH, ATTENTION_THREADS>(sh.k[0], k, p.ld, p.T - j0, p.dh);
    attention_load<BN, DH, ATTENTION_THREADS>(sh.v[0], k + (size_t)p.Hkv * p.dh, p.ld, p.T - j0, p.dh);
    load(0, 0);
    float dk[MT][DH / 8][4] = {}, dv[MT][DH / 8][4] = {};
    const float zero[4] = {};
    auto none = [&](int, int) { return zero; };
    const float scale = p.scale * ATTENTION_LOG2E;
    for (int step = 0; step < steps * group; step++) {
        const int stage = step & 1, i0 = i_begin + step % steps * BQ;
        copy_async_wait(0);
        __syncthreads();
        if (step + 1 < steps * group) load(step + 1, stage ^ 1);
        #pragma unroll
        for (int i1 = 0; i1 < BQ; i1 += STEP) {
            if (i0 + i1 + STEP - 1 < row0 || i0 + i1 >= queries) continue;
            float s[MT][STEP / 8][4], dP[MT][STEP / 8][4];
            attention_product<DH, MT, STEP / 16>(s, none, NULL, sh.k[0], w * ROWS, sh.q[stage][0], i1);
            if (i0 + i1 < row0 + ROWS - 1 || i0 + i1 + STEP - 1 > last_all)
                attention_mask<true>(s, i0 + i1, row0, last);
            #pragma unroll
            for (int n = 0; n < STEP / 8; n++) {
                const float2 lse = *(const float2*)&sh.lse[stage][i1 + 8 * n + 2 * quad];
                #pragma unroll
                for (int m = 0; m < MT; m++) {
                    #pragma unroll
                    for (int i = 0; i < 4; i++)
                        s[m][n][i] = exp2_unit(fmaf(s[m][n][i], scale, i % 2 ? -lse.y : -lse.x));
                }
            }
            attention_accumulate<DH, MT, STEP / 16>(dv, s, sh.dout[stage][0], i1);
            attention_product<DH, MT, STEP / 16>(dP, none, NULL, sh.v[0], w * ROWS, sh.dout[stage][0], i1);
            #pragma unroll
            for (int n = 0; n < STEP / 8; n++) {
                const float2 delta = *(const float2*)&sh.delta[stage][i1 + 8 * n + 2 * quad];
                #pragma unroll
                for (int m = 0; m < MT; m++) {
                    #pragma unroll
                    for (int i = 0; i < 4; i++) s[m][n][i] *= dP[m][n][i] - (i % 2 ? delta.y : delta.x);
                }
            }
            attention_accumulate<DH, MT, STEP / 16>(dk, s, sh.q[stage][0], i1);
        }
    }
    bf16* to = p.dqkv + (m0 + w * ROWS) * p.lddqkv + (size_t)(p.Hq + kv) * p.dh;
    const int old = p.cache ? (int)p.position0[b] : 0;
    #pragma unroll
    for (int which = 0; which < 2; which++) {                   // dk, then dv, in place of k and v
        __syncthreads();
        #pragma unroll
        for (int m = 0; m < MT; m++) {
            #pragma unroll
            for (int n = 0; n < DH / 8; n++) {
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float* d = which ? &dv[m][n][2 * half] : &dk[m][n][2 * half];
                    *(float2*)&sh.dkv[w * ROWS + 16 * m + 8 * half + g][8 * n + 2 * quad] =
                        make_float2(d[0], d[1]);
                }
            }
        }
        __syncwarp();
        attention_store_gradient<ROWS, DH>(to + which * (size_t)p.Hkv * p.dh, p.lddqkv, sh.dkv + w * ROWS,
                                           row0, p.T, old, span, which ? 1.0f : p.scale, p.rotary, !which,
                                           p.dh);
    }
}

// --- decoding -------------------------------------------------------------------------------------------
// One query per sequence against a long cache. The keys are split over blocks, each makes softmax over its
// part; a second kernel puts the parts together: with M = max_s max_s, w_s = exp(max_s - M),
//   out = sum_s w_s sum_s / sum_s w_s total_s
// A block has G query heads of one KV head, so that each key is read once for them. A row of dh channels is
// read by `lanes` neighbouring lanes, W channels each; a warp has 32 / lanes rows at once, 4 times. The block
// of the last part also sees the new token's key, which it turns and appends to the cache.
//   bytes: 4 dh per key and KV head
enum { ATTENTION_DECODE_WARPS = 8, ATTENTION_DECODE_ROWS = 4, ATTENTION_MAX_SPLITS = 128 };

// channels c..c+W-1 of a head, turned, as X holds them
template <typename X, int W>
__device__ __forceinline__ Pack<X, W> attention_turned(const X* head, int c, const RotaryCuda& rot,
                                                       int position) {
    Pack<X, W> own = load_pack<W>(head + c);
    if (c >= rot.dim) return own;
    const int half = rot.dim / 2;
    const bool second = c >= half;
    float v[W], other[W];
    unpack<W>(v, own);
    if (rot.interleaved) {
        #pragma unroll
        for (int j = 0; j < W; j++) other[j] = v[j ^ 1];
    } else unpack<W>(other, load_pack<W>(head + (second ? c - half : c + half)));
    #pragma unroll
    for (int j = 0; j < W; j++) {
        const int i = rot.interleaved ? (c + j) / 2 : second ? c + j - half : c + j;
        const float2 by = rotary_turn(position, rot.theta[i]);
        const bool is_y = rot.interleaved ? j % 2 : second;
        own.v[j] = from_float<X>(is_y ? other[j] * by.y + v[j] * by.x : v[j] * by.x - other[j] * by.y);
    }
    return own;
}

// parts (B,Hq,splits,dh+2): sums, then total and max
template <typename X, int G>
__global__ void __launch_bounds__(ATTENTION_DECODE_WARPS * WARP)
attention_decode_kernel(float* parts, X* append, const X* q_row, const AttentionKeys<X> p, float scale,
                        const __grid_constant__ RotaryCuda rot, int lanes) {
    enum { W = 16 / sizeof(X), ROWS = ATTENTION_DECODE_ROWS };
    __shared__ float sum[ATTENTION_DECODE_WARPS][WARP * W], stat[ATTENTION_DECODE_WARPS][2];
    const int lane = threadIdx.x % WARP, w = threadIdx.x / WARP, at = lane / lanes, c = lane % lanes * W;
    const int h0 = blockIdx.y * G, b = blockIdx.z, split = blockIdx.x, splits = gridDim.x;
    const int kv = h0 * p.Hkv / p.Hq, from = c < p.dh ? c : 0;
    const AttentionHead<X> keys(p, b, kv);
    const long long n = keys.old;
    const int begin = (int)(n * split / splits), end = (int)(n * (split + 1) / splits);
    const int together = WARP / lanes;
    float q[G][W], acc[G][W], max[G], total[G];
    #pragma unroll
    for (int i = 0; i < G; i++) {
        unpack<W>(q[i], attention_turned<X, W>(q_row + b * p.ld + (h0 + i) * p.dh, from, rot, keys.old));
        #pragma unroll
        for (int j = 0; j < W; j++) {
            q[i][j] *= c < p.dh ? scale : 0.0f;
            acc[i][j] = 0;
        }
        max[i] = -INFINITY;
        total[i] = 0;
    }
    if (split == splits - 1 && w == 0) {                        // the new token
        const Pack<X, W> key = attention_turned<X, W>(keys.call, from, rot, keys.old);
        const Pack<X, W> value = load_pack<W>(keys.call + keys.value + from);
        #pragma unroll
        for (int i = 0; i < G; i++) {
            float s = 0;
            #pragma unroll
            for (int j = 0; j < W; j++) s = fmaf(q[i][j], to_float(key.v[j]), s);
            for (int step = lanes / 2; step > 0; step /= 2) s += __shfl_xor_sync(0xffffffffu, s, step);
            if (at > 0) continue;
            max[i] = s;
            total[i] = 1;
            unpack<W>(acc[i], value);
        }
        if (at == 0 && c < p.dh && h0 * p.Hkv % p.Hq == 0 && (size_t)keys.old < p.capacity) {
            X* row = append + (b * p.capacity + keys.old) * keys.ld_cache + (size_t)kv * p.dh + c;
            *(Pack<X, W>*)row = key;
            *(Pack<X, W>*)(row + keys.value) = value;
        }
    }
    for (int j0 = begin + w * together * ROWS; j0 < end; j0 += ATTENTION_DECODE_WARPS * together * ROWS) {
        Pack<X, W> key[ROWS], value[ROWS];
        #pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int j = j0 + r * together + at;
            const X* row = keys.cache + (j < end ? j : end - 1) * keys.ld_cache + from;
            key[r] = load_pack<W>(row);
            value[r] = load_pack<W>(row + keys.value);
        }
        #pragma unroll
        for (int i = 0; i < G; i++) {
            float s[ROWS], larger = max[i];
            #pragma unroll
            for (int r = 0; r < ROWS; r++) {
                s[r] = 0;
                #pragma unroll
                for (int j = 0; j < W; j++) s[r] = fmaf(q[i][j], to_float(key[r].v[j]), s[r]);
            }
            for (int step = lanes / 2; step > 0; step /= 2) {
                #pragma unroll
                for (int r = 0; r < ROWS; r++) s[r] += __shfl_xor_sync(0xffffffffu, s[r], step);
            }
            #pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (j0 + r * together + at >= end) s[r] = -INFINITY;
                larger = fmaxf(larger, s[r]);
            }
            const float base = larger == -INFINITY ? 0.0f : larger, shrink = exp2_unit(max[i] - base);
            max[i] = larger;
            total[i] *= shrink;
            #pragma unroll
            for (int j = 0; j < W; j++) acc[i][j] *= shrink;
            #pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float P = exp2_unit(s[r] - base);
                total[i] += P;
                #pragma unroll
                for (int j = 0; j < W; j++) acc[i][j] = fmaf(P, to_float(value[r].v[j]), acc[i][j]);
            }
        }
    }
    #pragma unroll
    for (int i = 0; i < G; i++) {
        for (int step = lanes; step < WARP; step *= 2) {        // over the rows that a warp has at once
            const float other = __shfl_xor_sync(0xffffffffu, max[i], step), larger = fmaxf(max[i], other);
            const float base = larger == -INFINITY ? 0.0f : larger, shrink = exp2_unit(max[i] - base);
            max[i] = larger;
            total[i] *= shrink;
            total[i] += __shfl_xor_sync(0xffffffffu, total[i], step);
            #pragma unroll
            for (int j = 0; j < W; j++) {
                acc[i][j] *= shrink;
                acc[i][j] += __shfl_xor_sync(0xffffffffu, acc[i][j], step);
            }
        }
        __syncthreads();
        if (at == 0) {
            #pragma unroll
            for (int j = 0; j < W; j++) sum[w][c + j] = acc[i][j];
        }
        if (lane == 0) {
            stat[w][0] = total[i];
            stat[w][1] = max[i];
        }
        __syncthreads();
        float largest = -INFINITY, all = 0, weight[ATTENTION_DECODE_WARPS];
        #pragma unroll
        for (int r = 0; r < ATTENTION_DECODE_WARPS; r++) largest = fmaxf(largest, stat[r][1]);
        #pragma unroll
        for (int r = 0; r < ATTENTION_DECODE_WARPS; r++) {
            weight[r] = largest == -INFINITY ? 0.0f : exp2_unit(stat[r][1] - largest);
            all = fmaf(weight[r], stat[r][0], all);
        }
        float* part = parts + (((size_t)b * p.Hq + h0 + i) * splits + split) * (p.dh + 2);
        if (threadIdx.x < (unsigned)p.dh) {
            float o = 0;
            #pragma unroll
            for (int r = 0; r < ATTENTION_DECODE_WARPS; r++) o = fmaf(weight[r], sum[r][threadIdx.x], o);
            part[threadIdx.x] = o;
        }
        if (threadIdx.x == 0) {
            part[p.dh] = all;
            part[p.dh + 1] = largest;
        }
    }
}

template <typename X>
__global__ void __launch_bounds__(ATTENTION_MAX_SPLITS)
attention_decode_sum_kernel(X* out, size_t ldo, float* position, const float* parts, int splits, int Hq,
                            int dh) {
    __shared__ float weight[ATTENTION_MAX_SPLITS], total[ATTENTION_MAX_SPLITS];
    const int s = threadIdx.x;
    if (s == 0 && blockIdx.x == 0) position[blockIdx.y] += 1;
    const float* part = parts + ((size_t)blockIdx.y * Hq + blockIdx.x) * splits * (dh + 2);
    weight[s] = s < splits ? part[s * (dh + 2) + dh + 1] : -INFINITY;
    __syncthreads();
    float largest = -INFINITY, all = 0;
    for (int i = 0; i < splits; i++) largest = fmaxf(largest, weight[i]);
    __syncthreads();
    weight[s] = exp2_unit(weight[s] - largest);
    total[s] = s < splits ? weight[s] * part[s * (dh + 2) + dh] : 0.0f;
    __syncthreads();
    for (int i = 0; i < splits; i++) all += total[i];
    for (int c = s; c < dh; c += ATTENTION_MAX_SPLITS) {
        float sum = 0;
        for (int i = 0; i < splits; i++) sum = fmaf(weight[i], part[i * (dh + 2) + c], sum);
        out[blockIdx.y * ldo + blockIdx.x * dh + c] = from_float<X>(sum / all);
    }
}

// --- launchers ------------------------------------------------------------------------------------------

// AttentionTiles: how many times 16 rows a warp has (MT) and how long the tiles are that it walks over, as
// many as registers and shared memory hold
template <int DH> struct AttentionTiles {
    enum { MT = 2, KEYS = 64, Q_MT = 2, Q_KEYS = 64, KV_MT = 2, KV_QUERIES = 64 };
};
template <> struct AttentionTiles<96> {
    enum { MT = 2, KEYS = 64, Q_MT = 2, Q_KEYS = 32, KV_MT = 2, KV_QUERIES = 32 };
};
template <> struct AttentionTiles<128> {
    enum { MT = 2, KEYS = 32, Q_MT = 2, Q_KEYS = 32, KV_MT = 1, KV_QUERIES = 32 };
};

// false: the GPU has too little shared memory (compute capability 8.6 and 8.9, backward of heads above 96)
template <typename Kernel, typename P>
static inline bool attention_launch_fast(Kernel kernel, size_t shared, const P& p, int heads, int rows,
                                         cudaStream_t stream) {
    const int tiles = (p.T + rows - 1) / rows;
    int limit = 0;
    cudaCheck(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    if (shared > (size_t)limit) return false;
    scan_allow_shared(kernel, shared);
    kernel<<<(unsigned)(tiles * heads), ATTENTION_THREADS, shared, stream>>>(p, tiles);
    cudaCheck(cudaGetLastError());
    return true;
}
template <int DH>
static inline bool attention_forward_fast_cuda(const AttentionCuda<bf16>& p, cudaStream_t stream) {
    typedef AttentionTiles<DH> Tiles;
    return attention_launch_fast(attention_forward_fast_kernel<DH, Tiles::MT, Tiles::KEYS>,
                                 sizeof(AttentionForwardShared<DH, Tiles::MT, Tiles::KEYS>), p, p.B * p.Hq,
                                 64 * Tiles::MT, stream);
}
template <int DH>
static inline bool attention_backward_fast_cuda(const AttentionBackwardCuda<bf16>& p, cudaStream_t stream) {
    typedef AttentionTiles<DH> Tiles;
    return attention_launch_fast(attention_backward_q_fast_kernel<DH, Tiles::Q_MT, Tiles::Q_KEYS>,
                                 sizeof(AttentionBackwardQShared<DH, Tiles::Q_MT, Tiles::Q_KEYS>), p,
                                 p.B * p.Hq, 64 * Tiles::Q_MT, stream) &&
           attention_launch_fast(attention_backward_kv_fast_kernel<DH, Tiles::KV_MT, Tiles::KV_QUERIES>,
                                 sizeof(AttentionBackwardKVShared<DH, Tiles::KV_MT, Tiles::KV_QUERIES>), p,
                                 p.B * p.Hkv, 64 * Tiles::KV_MT, stream);
}
static inline bool attention_fast(const AttentionCuda<bf16>& p, cudaStream_t stream) {
    return p.dh <= 32   ? attention_forward_fast_cuda<32>(p, stream)
           : p.dh <= 64 ? attention_forward_fast_cuda<64>(p, stream)
           : p.dh <= 96 ? attention_forward_fast_cuda<96>(p, stream)
                        : attention_forward_fast_cuda<128>(p, stream);
}
static inline bool attention_fast(const AttentionBackwardCuda<bf16>& p, cudaStream_t stream) {
    return p.dh <= 32   ? attention_backward_fast_cuda<32>(p, stream)
           : p.dh <= 64 ? attention_backward_fast_cuda<64>(p, stream)
           : p.dh <= 96 ? attention_backward_fast_cuda<96>(p, stream)
                        : attention_backward_fast_cuda<128>(p, stream);
}
static inline bool attention_fast(const AttentionCuda<float>&, cudaStream_t) { return false; }
static inline bool attention_fast(const AttentionBackwardCuda<float>&, cudaStream_t) { return false; }

// attention_is_fast: rows of heads, each aligned to 16 bytes
template <typename X> static inline bool attention_is_fast(const X* rows, size_t ld, size_t dh) {
    return dh % 8 == 0 && dh <= 128 && is_aligned(rows, 16, ld * sizeof(X)) && ld < (size_t)1 << 23;
}

template <typename Kernel, typename P>
static inline void attention_launch_general(Kernel kernel, const P& p, size_t rows, size_t floats,
                                            cudaStream_t stream) {
    const size_t shared = ATTENTION_WARPS * floats * sizeof(float);
    if (shared > 200 << 10) die("attention head size %d is too large for the GPU", p.dh);
    scan_allow_shared(kernel, shared);
    const unsigned blocks = (unsigned)((rows + ATTENTION_WARPS - 1) / ATTENTION_WARPS);
    kernel<<<blocks, ATTENTION_THREADS, shared, stream>>>(p);
    cudaCheck(cudaGetLastError());
}

template <typename X>
static inline AttentionKeys<X> attention_keys(const X* qkv, size_t ld, const X* kv0, size_t capacity,
                                              const float* position0, const int2* span, size_t B, size_t T,
                                              size_t Hq, size_t Hkv, size_t dh) {
    AttentionKeys<X> p = {qkv + Hq * dh, position0 ? kv0 : NULL, ld, capacity, position0, span,
                          (int)B, (int)T, (int)Hq, (int)Hkv, (int)dh};
    return p;
}

// attention_forward_cuda: out and lse from qkv, whose q and k have been turned (attention_rotate_cuda).
//   qkv (B,T,(Hq+2Hkv)dh), row stride ldqkv   out (B,T,Hq dh), row stride ldo
//   lse (B,Hq,T): log2 of the sum of exp(scores); NULL in inference   scale: of the scores, 1/sqrt(dh)
//   kv0 (B,capacity,2,Hkv,dh), position0 (B): the cache before the call, or NULL
//   span (B,T): attention_span_cuda; NULL: one document per sequence
template <typename X>
const char* attention_forward_cuda(X* out, size_t ldo, float* lse, const X* qkv, size_t ldqkv, const X* kv0,
                                   size_t capacity, const float* position0, const int2* span, float scale,
                                   size_t B, size_t T, size_t Hq, size_t Hkv, size_t dh,
                                   cudaStream_t stream) {
    AttentionCuda<X> p;
    (AttentionKeys<X>&)p = attention_keys(qkv, ldqkv, kv0, capacity, position0, span, B, T, Hq, Hkv, dh);
    p.out = out; p.ldo = ldo; p.lse = lse; p.q = qkv; p.scale = scale * ATTENTION_LOG2E;
    if (attention_is_fast(qkv, ldqkv, dh) && attention_is_fast(out, ldo, dh) &&
        attention_is_fast(kv0, 8, dh) && attention_fast(p, stream))
        return "fast";
    attention_launch_general(attention_forward_kernel<X>, p, B * T * Hq, 2 * dh + WARP, stream);
    return "general";
}

// attention_backward_cuda: formulas at attention_backward_q_kernel.
//   dqkv (row stride lddqkv): written; gradients of q and k before they were turned
//   dout (B,T,Hq dh), row stride lddo   out, lse, qkv and the rest: as forward had and left them; the cache
//   gets no gradient   scratch: B Hq T floats
template <typename X>
const char* attention_backward_cuda(X* dqkv, size_t lddqkv, const X* dout, size_t lddo, const X* out,
                                    size_t ldo, const float* lse, const X* qkv, size_t ldqkv, const X* kv0,
                                    size_t capacity, const float* position0, const int2* span,
                                    const RotaryCuda& rotary, float scale, float* scratch, size_t B, size_t T,
                                    size_t Hq, size_t Hkv, size_t dh, cudaStream_t stream) {
    AttentionBackwardCuda<X> p;
    (AttentionKeys<X>&)p = attention_keys(qkv, ldqkv, kv0, capacity, position0, span, B, T, Hq, Hkv, dh);
    p.dqkv = dqkv; p.lddqkv = lddqkv;
    p.dout = dout; p.out = out; p.q = qkv; p.lddo = lddo; p.ldo = ldo;
    p.lse = lse; p.delta = scratch; p.scale = scale; p.rotary = rotary;
    if (attention_is_fast(qkv, ldqkv, dh) && attention_is_fast(dqkv, lddqkv, dh) &&
        attention_is_fast(dout, lddo, dh) && attention_is_fast(out, ldo, dh) &&
        attention_is_fast(kv0, 8, dh) && attention_fast(p, stream))
        return "fast";
    attention_launch_general(attention_backward_q_kernel<X>, p, B * T * Hq, 3 * dh + WARP, stream);
    attention_launch_general(attention_backward_kv_kernel<X>, p, B * T * Hkv, 4 * dh + 2 * WARP, stream);
    return "general";
}

// parts that a cache is split into: enough blocks for four per processor, at least 64 keys each
static inline size_t attention_splits_cuda(size_t blocks, size_t capacity) {
    int sms = 1;
    cudaCheck(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    size_t splits = (4 * (size_t)sms + blocks - 1) / blocks, most = (capacity + 63) / 64;
    splits = splits < most ? splits : most;
    return splits < ATTENTION_MAX_SPLITS ? splits : (size_t)ATTENTION_MAX_SPLITS;
}
static inline size_t attention_decode_scratch_cuda(size_t B, size_t Hq, size_t dh, size_t capacity) {
    return B * Hq * attention_splits_cuda(1, capacity) * (dh + 2);
}

// attention_decode_cuda: one token of each sequence: turns q and k, attends to the cache and itself, appends.
//   out (B,Hq dh), row stride ldo   kv (B,capacity,2,Hkv,dh), position (B): the state, in place
//   qkv (B,(Hq+2Hkv)dh), row stride ldqkv, not yet turned   scratch: attention_decode_scratch_cuda() floats
template <typename X>
const char* attention_decode_cuda(X* out, size_t ldo, X* kv, float* position, size_t capacity, X* qkv,
                                  size_t ldqkv, const RotaryCuda& rotary, float scale, float* scratch,
                                  size_t B, size_t Hq, size_t Hkv, size_t dh, cudaStream_t stream) {
    const int W = 16 / (int)sizeof(X);
    int lanes = 1;
    while (lanes * W < (int)dh) lanes *= 2;
    if (dh % W || lanes > WARP || rotary.dim % (2 * W) || !is_aligned(qkv, 16, ldqkv * sizeof(X)) ||
        !is_aligned(kv, 16, 16)) {
        attention_rotate_cuda<X>(qkv, ldqkv, position, NULL, rotary, B, 1, Hq, Hkv, dh, stream);
        attention_forward_cuda<X>(out, ldo, NULL, qkv, ldqkv, kv, capacity, position, NULL, scale, B, 1, Hq,
                                  Hkv, dh, stream);
        attention_append_cuda<X>(kv, position, kv, capacity, position, qkv, ldqkv, NULL, B, 1, Hq, Hkv, dh,
                                 stream);
        return "whole";
    }
    const size_t group = Hq / Hkv, G = group % 4 == 0 ? 4 : group % 2 == 0 ? 2 : 1;
    const size_t splits = attention_splits_cuda(B * Hq / G, capacity);
    auto kernel = G == 4 ? attention_decode_kernel<X, 4> : G == 2 ? attention_decode_kernel<X, 2>
                                                                  : attention_decode_kernel<X, 1>;
    kernel<<<dim3((unsigned)splits, (unsigned)(Hq / G), (unsigned)B), ATTENTION_DECODE_WARPS * WARP, 0,
             stream>>>(scratch, kv, qkv, attention_keys<X>(qkv, ldqkv, kv, capacity, position, NULL, B, 1, Hq,
                                                           Hkv, dh), scale * ATTENTION_LOG2E, rotary, lanes);
    cudaCheck(cudaGetLastError());
    attention_decode_sum_kernel<X><<<dim3((unsigned)Hq, (unsigned)B), ATTENTION_MAX_SPLITS, 0, stream>>>(
        out, ldo, position, scratch, (int)splits, (int)Hq, (int)dh);
    cudaCheck(cudaGetLastError());
    return "split";
}

// --------------------------------------------------------------------------------------------------
// 4.15 Decoding: Mamba-2
//
// A layer is three kernels, the first and the last of them from section 4.10 or 4.16:
//   norm + W_in + conv | dt, state, skip, gate | W_out, and the factor 1/rms of the gated norm
// A channel has N = 128 states, eight times those of Mamba-1: with 64 sequences of mamba2-130m they are nine
// of ten bytes. So the kernel in the middle is built like a copy: every thread has its pieces of the states
// under way before it looks at anything else, and before the kernel that makes x, B and C has ended.
// mamba2-130m on one H200, us per token of all sequences: 1 sequence 246, 8: 378, 9: 407, 16: 477, 64: 919,
// 256: 3655 (a kernel for each operation: 801, 1931 with 1 and 64). With 64 sequences decode_ssd takes 26 us
// in each of 24 layers: 3.9 TB/s, what a kernel reaches that only multiplies as many numbers in place by a
// constant. With the states in bf16 (--state-dtype) it takes 15 us, a token of 1, 64, 256 sequences 235, 651,
// 2585.
// (No faster: fetching states into the L2 cache while the matmuls run, for from there the same pass takes
// half as long and what is fetched displaces the rest; bulk copies through shared memory, 27 us; blocks that
// walk over the states, 27 us.)

// DecodeSsd: one token of each of `rows` sequences, formulas (S2) to (S5) at mamba2_block_forward.
//   x (rows,H,P), Bt, Ct (rows,G,N): after the convolution, row stride ldx
//   dt_raw (rows,H), z (rows,H,P): row stride ldz   h (rows,H,P,N): updated
//   out (rows,H,P), row stride ldo: y; with `gate` y silu(z); with `norm` (H,P), the weights of the gated
//   norm, all but its factor, to which squares (rows,H*splits) are the parts of the sum of squares
typedef struct {
    bf16* out;
    size_t ldo;
    float* squares;
    void* h;
    const bf16 *x, *Bt, *Ct;
    size_t ldx;
    const bf16 *dt_raw, *z;
    size_t ldz;
    const float *dt_bias, *A_log, *Dskip, *norm;
    float dt_low, dt_high;
    bool D_has_hdim, gate, norm_first;
    int H, P, G, N;
} DecodeSsd;

// decode_ssd: a row of N states is LANES VECS pieces of 16 bytes and belongs to LANES neighbouring lanes;
// each has two such rows.   S: the type of the states   blockIdx: part of a head, head, sequence
// bytes: 2 sizeof(S) per state
enum { DECODE_SSD_WARPS = 4, DECODE_SSD_ROWS = 2 };

static __host__ __device__ constexpr int decode_ssd_lanes(int N, int size) {
    return N * size / 16 < WARP ? N * size / 16 : WARP;
}

template <typename S, int N>
__global__ void __launch_bounds__(DECODE_SSD_WARPS * WARP,
                                  sizeof(S) == 2 || N * sizeof(S) > 16 * WARP ? 8 : 16)
decode_ssd_kernel(const DecodeSsd a) {
    enum { ROWS = DECODE_SSD_ROWS, W = 16 / sizeof(S), LANES = decode_ssd_lanes(N, sizeof(S)),
           VECS = N / (W * LANES) };
    __shared__ float part[DECODE_SSD_WARPS];
    const int lane = threadIdx.x % WARP, w = threadIdx.x / WARP, s0 = W * (lane % LANES), head = blockIdx.y;
    const int p = (blockIdx.x * DECODE_SSD_WARPS * WARP + threadIdx.x) / LANES * ROWS;
    const bool own = p < a.P;
    const size_t n = blockIdx.z, e = (size_t)head * a.P + (own ? p : 0);
    S* h = (S*)a.h + (n * a.H * a.P + e) * N + s0;
    allow_next();
    Pack<S, W> state[VECS][ROWS];
    #pragma unroll
    for (int v = 0; v < VECS; v++) {
        #pragma unroll
        for (int r = 0; r < ROWS; r++)
            *(float4*)&state[v][r] = __ldcs((const float4*)(h + r * N + v * W * LANES));
    }
    // all of this is written by no kernel of this token
    const float bias = a.dt_bias[head], rate = scan_decay(a.A_log[head]);
    float D[ROWS], weight[ROWS];
    #pragma unroll
    for (int r = 0; r < ROWS; r++) {
        D[r] = a.Dskip[a.D_has_hdim ? e + r : head];
        weight[r] = a.norm ? a.norm[e + r] : 1.0f;
    }
    const bf16 *B_n = a.Bt + n * a.ldx + head * a.G / a.H * N + s0, *C_n = B_n + (a.Ct - a.Bt);
    wait_before();
    float x[ROWS], z[ROWS], y[ROWS] = {}, square = 0;
    float dt = scan_softplus_fast((to_float(a.dt_raw[n * a.ldz + head]) + bias) * SCAN_LOG2E);
    unpack<ROWS>(x, load_pack<ROWS>(a.x + n * a.ldx + e));
    unpack<ROWS>(z, load_pack<ROWS>(a.z + n * a.ldz + e));
    dt = dt < a.dt_low ? a.dt_low : dt > a.dt_high ? a.dt_high : dt;       // NaN stays NaN
    const float decay = exp2_unit(dt * rate);
    #pragma unroll
    for (int v = 0; v < VECS; v++) {
        #pragma unroll
        for (int k = 0; k < W; k += 4) {
            float B[4], C[4];
            unpack<4>(B, load_pack<4>(B_n + v * W * LANES + k));
            unpack<4>(C, load_pack<4>(C_n + v * W * LANES + k));
            #pragma unroll
            for (int r = 0; r < ROWS; r++) {
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    float f = fmaf(decay, to_float(state[v][r].v[k + j]), dt * x[r] * B[j]);
                    y[r] = fmaf(C[j], f, y[r]);
                    state[v][r].v[k + j] = from_float<S>(f);
                }
            }
        }
        #pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (own) __stcs((float4*)(h + r * N + v * W * LANES), *(const float4*)&state[v][r]);
    }
    #pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
        #pragma unroll
        for (int r = 0; r < ROWS; r++) y[r] += __shfl_xor_sync(0xffffffffu, y[r], step);
    }
    if (own && s0 == 0) {
        #pragma unroll
        for (int r = 0; r < ROWS; r++) {
            y[r] = fmaf(D[r], x[r], y[r]);
            if (!a.gate) continue;
            float gated = y[r] * silu_cuda(z[r]), normed = a.norm_first ? y[r] : gated;
            square = fmaf(normed, normed, square);
            y[r] = gated * weight[r];
        }
        store_pack<ROWS>(a.out + n * a.ldo + e, y);
    }
    if (!a.squares) return;
    #pragma unroll
    for (int step = LANES; step < WARP; step *= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
    if (lane == 0) part[w] = square;
    __syncthreads();
    if (threadIdx.x > 0) return;
    float sum = 0;
    #pragma unroll
    for (int i = 0; i < DECODE_SSD_WARPS; i++) sum += part[i];
    a.squares[(n * a.H + head) * gridDim.x + blockIdx.x] = sum;
}

typedef void (*DecodeSsdKernel)(const DecodeSsd);
template <typename S> static DecodeSsdKernel decode_ssd_of(size_t N) {         // NULL: there is none
    return N == 16 ? decode_ssd_kernel<S, 16> : N == 32 ? decode_ssd_kernel<S, 32>
         : N == 64 ? decode_ssd_kernel<S, 64> : N == 128 ? decode_ssd_kernel<S, 128>
         : N == 256 ? decode_ssd_kernel<S, 256> : NULL;
}

// decode_ssd_splits: blocks per head; size: bytes of a state
static int decode_ssd_splits(size_t P, size_t N, size_t size) {
    size_t lanes = decode_ssd_lanes(N, size), each = DECODE_SSD_WARPS * (WARP / lanes) * DECODE_SSD_ROWS;
    return (int)((P + each - 1) / each);
}

template <typename S> static void decode_ssd_cuda(const DecodeSsd& a, size_t rows, cudaStream_t stream) {
    dim3 grid((unsigned)decode_ssd_splits(a.P, a.N, sizeof(S)), (unsigned)a.H, (unsigned)rows);
    launch_early(decode_ssd_of<S>(a.N), grid, DECODE_SSD_WARPS * WARP, 0, stream, a);
}

// --------------------------------------------------------------------------------------------------
// 4.16 Decoding: many sequences
//
// decode_many: what decode_linear does, for 9 to 64 sequences, on GPUs with clusters and the bulk copy
// engine (sm_90; elsewhere decode_linear, or cuBLASLt, norm and convolution kernels do it).
//   out (rows,O) = input (rows,K) weight^T
// The tensor core multiplies tiles of 64 sequences x 64 k with tiles of 64 k x 64 outputs, both in shared
// memory. The sum over k is divided among the blocks of a cluster, so that the inputs of all sequences for
// its k fit into a block: they are read once, and then the weights stream through a ring of tiles, 64 outputs
// after 64 outputs. A block has three groups of four warps, which wait for each other only:
//   load:      one thread starts the copies of weights as soon as there is room, at the start even before
//              the kernel before has ended
//   multiply:  tile after tile; the sums of 64 outputs go to the blocks that finish them, 64 / splits
//              sequences each, in the shared memory of these
//   finish:    adds the parts, and what follows (AFTER), for this block's sequences
// bytes: 2 per weight.   us per token on one H200, in parentheses with decode_linear (16 sequences) and
// cuBLASLt (64): mamba-130m 16: 457 (549), 64: 521 (712); mamba2-130m 16: 477 (594), 64: 919 (1092);
// mamba2-1.3b 16: 2453 (2651), 64: 4900 (5009). mamba-2.8b 64: 4490 (4340), there the matmuls of cuBLASLt are
// shorter, so models wider than DECODE_MANY_WIDTH take them.
// mamba2-130m with 64 sequences, by timestamps inside the kernels: W_out takes 3.8 us, W_in 7.5 (two rounds
// of tiles; most of its blocks find room only when those of W_out have ended), and from the last block of a
// kernel to the first that goes on lie 0.5 to 0.8 us, three times in a layer.
// (No faster, where it took 923 to 928: the sequences in two halves on two streams, so that the states of one
// are read beside the products of the other, 1060 us; no more shared memory than needed, so that W_in waits
// beside W_out, 1016, and flags of single tiles instead of the wait for all of W_out do not help then;
// finishing blocks that fetch the parts instead of being sent them, 987; W_in in one round, with half the
// splits, 929; the next weights fetched into the L2 cache while the states are read, 925 to 935; inputs by
// the bulk copy engine, and each multiplication begun before the one before has ended, 923 to 926.)
// shared: inputs (chunks,SSD_TILE), ring (DECODE_RING,SSD_TILE), parts (2,64,DECODE_LD) float: of this
// block's sequences, (splits,64 / splits)
enum { DECODE_LD = 68, DECODE_RING = 9 };                  // 64 outputs and 4 more: other banks
enum { DECODE_PLAIN, DECODE_CONV, DECODE_RES };              // what follows the sum, see DecodeLinear

static size_t decode_many_shared(int chunks) {
    return (size_t)(chunks + DECODE_RING) * SSD_TILE * sizeof(bf16) + 2 * 64 * DECODE_LD * sizeof(float);
}

// Signals (mbarrier) as in the scan, here between the blocks of a cluster as well
__device__ __forceinline__ uint32_t shared_of(const void* p, int block) {   // the same place in another block
    uint32_t there = 0;
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there)
        : "r"((uint32_t)__cvta_generic_to_shared(p)), "r"(block));
#endif
    return there;
}
__device__ __forceinline__ void signal_init(uint64_t* signal, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(signal)), "r"(count) : "memory");
}
// load_tile: the bulk copy engine fetches 64 x 64 numbers of a matrix, in the order of ssd_piece, zeros
// outside of it, and adds the bytes to the signal
__device__ __forceinline__ void load_tile(bf16* to, const CUtensorMap* matrix, int column, int row,
                                          uint64_t* signal) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];"
                 :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(matrix), "r"(column), "r"(row),
                    "r"((uint32_t)__cvta_generic_to_shared(signal)) : "memory");
#endif
}
__device__ __forceinline__ void signal_arrive(uint64_t* signal) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }"
                 :: "r"((uint32_t)__cvta_generic_to_shared(signal)) : "memory");
}
__device__ __forceinline__ void signal_expect(uint64_t* signal, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }"
                 :: "r"((uint32_t)__cvta_generic_to_shared(signal)), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void signal_block(uint64_t* signal, int block) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];"
                 :: "r"(shared_of(signal, block)) : "memory");
#endif
}
__device__ __forceinline__ void signal_wait(uint64_t* signal, int parity) {  // for what other blocks signal
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred done; again: "
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1; "
                 "@!done bra again; }"
                 :: "r"((uint32_t)__cvta_generic_to_shared(signal)), "r"(parity) : "memory");
#endif
}
// two numbers to another block, whose signal counts the bytes that have come
__device__ __forceinline__ void send(uint32_t to, float x, float y, uint32_t signal) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
                 :: "r"(to), "f"(x), "f"(y), "r"(signal) : "memory");
#endif
}
// All threads of a cluster tell that they run (cluster_arrive) and wait for the others (cluster_wait). At the
// end racecheck wants them to do so again; nothing is sent to a block that has all it waits for, and that
// barrier takes 2 % of a token.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_end() {
#ifdef SSM_SANITIZE
    cluster_arrive();
    cluster_wait();
#endif
}
template <int GROUP> __device__ __forceinline__ void group_barrier() {       // of the 128 threads of a group
    asm volatile("bar.sync %0, 128;" :: "n"(GROUP) : "memory");
}

// decode_begin: res (rows,D) = weight[tokens], and what the first decode_many reads: out = res * norm,
// squares (rows) the sum of the squares of each row.   One block per row.   bytes: 8 per number
__global__ void __launch_bounds__(256)
decode_begin_kernel(float* res, bf16* out, float* squares, const int* tokens, const bf16* weight,
                    const float* norm, int D) {
    __shared__ float parts[16];
    const size_t n = blockIdx.x;
    const bf16* row = weight + (size_t)tokens[n] * D;
    float sum = 0;
    for (int d = 4 * threadIdx.x; d < D; d += 4 * 256) {
        float v[4];
        unpack<4>(v, load_pack<4>(row + d));
        Pack<float, 4> scale = load_pack<4>(norm + d);
        store_pack<4>(res + n * D + d, v);
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            sum += v[i] * v[i];
            v[i] *= scale.v[i];
        }
        store_pack<4>(out + n * D + d, v);
    }
    sum = group_sum<8>(sum, parts, 0);
    if (threadIdx.x == 0) squares[n] = sum;
}

// DecodeStream: the residual stream between blocks with many sequences. No kernel normalizes it: the last
// matmul of a block leaves act = res * norm of the next block, and sums of squares by which the first matmul
// of that block divides its outputs.
typedef struct {
    float *res, *squares;              // (rows,D), (rows,parts)
    bf16* act;                         // (rows,D)
    const float* norm;                 // of the next block
    int parts;
} DecodeStream;

static inline size_t decode_many_parts(size_t D) { return (D + 63) / 64 * DECODE_ROWS; }

template <int AFTER>
__global__ void __launch_bounds__(3 * 128)
decode_many_kernel(const DecodeLinear a, const __grid_constant__ CUtensorMap weights, int log_splits) {
    extern __shared__ __align__(1024) char tile_shared[];
    __shared__ uint64_t full[DECODE_RING], empty[DECODE_RING], arrived[2], finished[2];
    __shared__ float scale[64];
    const int group = threadIdx.x / 128, tid = threadIdx.x % 128, lane = tid % WARP, w = tid / WARP;
    const int K = (int)a.K, O = (int)a.O, first_o = blockIdx.y * 64, step_o = gridDim.y * 64;
    const int splits = 1 << log_splits, rank = blockIdx.x, each = 8 >> log_splits;    // each: sequences / 8
    const int all = (K + 63) / 64, c0 = all * rank >> log_splits;
    const int chunks = (all * (rank + 1) >> log_splits) - c0;
    bf16 (*input)[SSD_TILE] = (bf16 (*)[SSD_TILE])tile_shared;
    bf16 (*ring)[SSD_TILE] = input + ((all + splits - 1) >> log_splits);
    float* parts = (float*)(ring + DECODE_RING);
    if (threadIdx.x == 0) {
        for (int i = 0; i < DECODE_RING; i++) { signal_init(&full[i], 1); signal_init(&empty[i], 128); }
        for (int i = 0; i < 2; i++) {
            signal_init(&arrived[i], splits > 1 ? 1 : 4 * SCAN_ARRIVALS);
            signal_init(&finished[i], splits);
        }
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
    __syncthreads();
    cluster_arrive();
    int stage = 0, parity = 0, half = 0, half_parity = 0;
    if (group == 0) {                                        // load
        #pragma unroll 1
        for (int o = first_o; tid == 0 && o < O; o += step_o)
            #pragma unroll 1
            for (int c = 0; c < chunks; c++) {
                scan_wait(&empty[stage], parity ^ 1);
                signal_expect(&full[stage], SSD_TILE * sizeof(bf16));
                load_tile(ring[stage], &weights, (c0 + c) * 64, o, &full[stage]);
                if (++stage == DECODE_RING) { stage = 0; parity ^= 1; }
            }
        cluster_wait();
        cluster_end();
        return;
    }
    wait_before();
    if (group == 1) {                                        // multiply
        #pragma unroll 1
        for (int i = 0; i < chunks; i++)
            ssd_load_tile<128>(input[i], a.act + (c0 + i) * 64, (uint32_t)a.ld_act, a.rows,
                               K - (c0 + i) * 64, tid);
        copy_async_commit();
        copy_async_wait(0);
        ssd_publish();
        group_barrier<1>();
        #pragma unroll 1
        for (int o = first_o; o < O; o += step_o) {
            float d[8][4] = {};                              // d[i]: outputs 8i..8i+7
            #pragma unroll 1
            for (int c = 0; c < chunks; c++) {
                scan_wait(&full[stage], parity);
                ssd_begin();
                ssd_multiply_rows(d, input[c], ring[stage], false, w);
                ssd_end();
                ssd_wait();
                ssd_arrived(d);
                signal_arrive(&empty[stage]);
                if (++stage == DECODE_RING) { stage = 0; parity ^= 1; }
            }
            // not before: what the next kernel loads early delays what this one loads (mamba-130m, 64
            // sequences, one H200: 539 us, 521 so)
            if (o == first_o) allow_next();
            if (o == first_o) cluster_wait();
            signal_wait(&finished[half], half_parity ^ 1);
            if (splits > 1 && tid == 0) signal_expect(&arrived[half], 64 * 64 * sizeof(float));
            #pragma unroll
            for (int h = 0; h < 2; h++) {                    // sequence 16w + lane / 4, and 8 later
                const int row = w * 16 + h * 8 + lane / 4, owner = row / 8 / each;
                const int at = half * 64 + rank * 8 * each + row - owner * 8 * each;
                float* here = parts + at * DECODE_LD + lane % 4 * 2;
                const uint32_t to = shared_of(here, owner), signal = shared_of(&arrived[half], owner);
                #pragma unroll
                for (int i = 0; i < 8; i++)
                    if (splits > 1) send(to + 32 * i, d[i][2 * h], d[i][2 * h + 1], signal);
                    else *(float2*)(here + 8 * i) = make_float2(d[i][2 * h], d[i][2 * h + 1]);
            }
            if (splits == 1) scan_arrive_warp(&arrived[half]);         // a block alone, all parts are its own
            half ^= 1;
            half_parity ^= !half;
        }
        cluster_end();
        return;
    }

    // finish: sequences 8 each rank .., eight at a time; of these a thread has one, n0 + 8 i, and 4 outputs
    const int n0 = 8 * each * rank + tid / 16, BATCH = AFTER == DECODE_PLAIN ? 1 : 2;
    const bool packs = AFTER != DECODE_PLAIN || (O % 4 == 0 && a.ldo % 4 == 0);
    if (a.squares) {
        const float inverse = 1.0f / (float)K;
        #pragma unroll 1
        for (int i = 0; i < each; i++) {
            float sum = 0;
            #pragma unroll 3
            for (int p = tid % 16; p < a.parts; p += 16)
                sum += n0 + 8 * i < a.rows ? a.squares[(n0 + 8 * i) * a.parts + p] : 0.0f;
            #pragma unroll
            for (int step = 1; step < 16; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
            const float r = rsqrtf(fmaf(sum, inverse, a.eps));
            if (tid % 16 == 0) scale[tid / 16 + 8 * i] = r == 0 ? NAN : r;         // as rstd_of
        }
        __syncwarp();
    }
    cluster_wait();
    #pragma unroll 1
    for (int tile_o = first_o; tile_o < O; tile_o += step_o) {
        const int o = tile_o + tid % 16 * 4;
        const int e = o - (int)a.conv_first;
        const bool conv = AFTER == DECODE_CONV && (unsigned)e < (unsigned)a.E;
        float4 bias = {}, factor[4] = {}, conv_bias = {}, old[2][3];   // factor: of the convolution or norm
        if (packs && o < O) {
            if (a.bias) bias = *(const float4*)(a.bias + o);
            if (AFTER == DECODE_RES) factor[0] = *(const float4*)(a.norm + o);
            if (conv && a.conv_bias) conv_bias = *(const float4*)(a.conv_bias + e);
            #pragma unroll
            for (int j = 0; j < 4; j++)                      // of output o + j, one weight for each tap
                if (conv && a.taps == 4) factor[j] = *(const float4*)(a.conv_weight + (e + j) * 4);
                else if (conv) {
                    const float* from = a.conv_weight + (e + j) * a.taps;
                    factor[j] = make_float4(from[0], a.taps > 1 ? from[1] : 0.0f, a.taps > 2 ? from[2] : 0.0f,
                                            0.0f);
                }
        }
        #pragma unroll 1
        for (int first = 0; first < each; first += BATCH) {
            #pragma unroll
            for (int i = 0; i < BATCH; i++) {                // what is added to the sums
                const int n = n0 + 8 * (first + i);
                if (first + i >= each || n >= a.rows || o >= O) break;
                if (AFTER == DECODE_RES) old[i][0] = *(const float4*)(a.res + (size_t)n * O + o);
                #pragma unroll
                for (int k = 0; k < 3; k++)
                    if (conv && k + 1 < a.taps)
                        old[i][k] = *(const float4*)(a.conv_state + ((size_t)n * (a.taps - 1) + k) * a.E + e);
            }
            if (first == 0) signal_wait(&arrived[half], half_parity);
            #pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int n = n0 + 8 * (first + i);
                if (first + i >= each) break;
                alignas(16) float x[4] = {};
                const float* from =
                    parts + (half * 64 + 8 * (first + i) + tid / 16) * DECODE_LD + tid % 16 * 4;
                #pragma unroll 1
                for (int p = 0; p < splits; p++, from += 8 * each * DECODE_LD) {
                    float4 v = *(const float4*)from;
                    x[0] += v.x; x[1] += v.y; x[2] += v.z; x[3] += v.w;
                }
                const float by = a.squares ? scale[tid / 16 + 8 * (first + i)] : 1.0f;
                #pragma unroll
                for (int j = 0; j < 4; j++) x[j] = fmaf(x[j], by, (&bias.x)[j]);
                const bool inside = o < O && n < a.rows;
                if (AFTER == DECODE_RES) {
                    float square = 0;
                    #pragma unroll
                    for (int j = 0; j < 4; j++) {
                        x[j] += (&old[i][0].x)[j];
                        if (inside) square += x[j] * x[j];
                    }
                    if (inside) *(float4*)(a.res + (size_t)n * O + o) = *(const float4*)x;
                    #pragma unroll
                    for (int j = 0; j < 4; j++) x[j] *= (&factor[0].x)[j];
                    #pragma unroll
                    for (int step = 1; step < 16; step *= 2)
                        square += __shfl_xor_sync(0xffffffffu, square, step);
                    if (tid % 16 == 0 && n < a.rows)
                        a.next_squares[n * ((O + 63) / 64) + tile_o / 64] = square;
                }
                if (!inside) continue;
                if (conv) {                                  // as causal_conv1d_forward, with T = 1
                    float* tail = a.conv_state + (size_t)n * (a.taps - 1) * a.E + e;
                    #pragma unroll
                    for (int j = 0; j < 4; j++) {
                        float sum = (&conv_bias.x)[j];
                        x[j] = to_float(from_float<bf16>(x[j]));
                        #pragma unroll
                        for (int k = 0; k < 4; k++)
                            if (k < a.taps)
                                sum += (&factor[j].x)[k] *
                                       (k + 1 < a.taps ? (&old[i][k < 3 ? k : 2].x)[j] : x[j]);
                        if (a.taps > 1) (&old[i][0].x)[j] = a.taps > 2 ? (&old[i][1].x)[j] : x[j];
                        if (a.taps > 2) (&old[i][1].x)[j] = a.taps > 3 ? (&old[i][2].x)[j] : x[j];
                        if (a.taps > 3) (&old[i][2].x)[j] = x[j];
                        x[j] = silu_cuda(sum);
                    }
                    #pragma unroll
                    for (int k = 0; k < 3; k++) if (k + 1 < a.taps) *(float4*)(tail + k * a.E) = old[i][k];
                }
                const size_t at = n * a.ldo + o;
                if (packs && (AFTER != DECODE_PLAIN || a.out)) store_pack<4>(a.out + at, x);
                else if (packs) *(float4*)(a.out_float + at) = *(const float4*)x;
                else
                    #pragma unroll
                    for (int j = 0; j < 4; j++) {
                        if (o + j >= O) break;
                        const float v = x[j] + (a.bias ? a.bias[o + j] : 0.0f);
                        if (a.out) a.out[at + j] = from_float<bf16>(v);
                        else a.out_float[at + j] = v;
                    }
            }
        }
        group_barrier<2>();
        if (tid < splits && tile_o + 2 * step_o < O) signal_block(&finished[half], tid);
        half ^= 1;
        half_parity ^= !half;
    }
    cluster_end();
}

// matrix_tiles: how load_tile finds the tiles of a row-major matrix
static CUtensorMap matrix_tiles(const bf16* matrix, size_t rows, size_t columns) {
    static CUresult (*encode)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        cudaCheck(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&encode, 12000,
                                                   cudaEnableDefault, &found));
        if (found != cudaDriverEntryPointSuccess) die("the GPU's driver is too old: it has no tensor maps");
    }
    CUtensorMap map;
    cuuint64_t size[2] = {columns, rows}, stride[1] = {columns * sizeof(bf16)};
    cuuint32_t box[2] = {64, 64}, step[2] = {1, 1};
    if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void*)matrix, size, stride, box, step,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
        die("a matrix of %zu x %zu has no tensor map", rows, columns);
    return map;
}

// whether K numbers of each sequence fit into the blocks of a cluster
enum { DECODE_MOST_SPLITS = 8, DECODE_MANY_WIDTH = 2048 };
static bool decode_many_fits(size_t K) {
    const size_t chunks = (K + 64 * DECODE_MOST_SPLITS - 1) / (64 * DECODE_MOST_SPLITS);
    return compiled_for_90(decode_many_kernel<DECODE_PLAIN>) &&
           decode_many_shared((int)chunks) + 2048 <= shared_memory_limit();
}

// The blocks of a cluster and the number of clusters (all run at once) are those with which the fewest tiles
// pass through a block; an exchange of sums counts as two.
template <int AFTER> static void decode_many_launch(const DecodeLinear& a, cudaStream_t stream) {
    const auto kernel = decode_many_kernel<AFTER>;
    const int tiles = (int)((a.O + 63) / 64), all = (int)((a.K + 63) / 64);
    int best = INT_MAX, log_splits = 0, clusters = 1;
    for (int log = 0; 1 << log <= DECODE_MOST_SPLITS && 1 << log <= all; log++) {
        const int chunks = (all + (1 << log) - 1) >> log;
        const size_t shared = decode_many_shared(chunks);
        int fit = 0;
        if (shared + 2048 > shared_memory_limit()) continue;
        scan_allow_shared(kernel, shared);
        cudaLaunchAttribute attribute[2];
        cudaLaunchConfig_t config = launch_config(attribute, 1u << log, dim3(1 << log, (unsigned)tiles),
                                                  3 * 128, shared, stream);
        cudaCheck(cudaOccupancyMaxActiveClusters(&fit, kernel, &config));
        if (fit < 1) continue;
        if (fit > tiles) fit = tiles;
        const int rounds = (tiles + fit - 1) / fit, cost = (rounds + 1) * chunks + 2 * rounds;
        if (cost < best) { best = cost; log_splits = log; clusters = fit; }
    }
    const size_t shared = decode_many_shared((all + (1 << log_splits) - 1) >> log_splits);
    scan_allow_shared(kernel, shared);
    launch_clusters(1u << log_splits, kernel, dim3(1 << log_splits, (unsigned)clusters), 3 * 128, shared,
                    stream, a, matrix_tiles(a.weight, a.O, a.K), log_splits);
}

static void decode_many_cuda(const DecodeLinear& a, cudaStream_t stream) {
    if (a.res) decode_many_launch<DECODE_RES>(a, stream);
    else if (a.conv_weight) decode_many_launch<DECODE_CONV>(a, stream);
    else decode_many_launch<DECODE_PLAIN>(a, stream);
}

// ---------------------------------------------------------------------------------------------------
// 7. Optimizer: gradient norm, AdamW

// gradient_norm: *norm = the L2 norm of n gradients, in double like on the CPU. NORM_PARTS blocks sum, then
// one block adds their sums in order.   bytes: 4 per parameter
enum { NORM_PARTS = 1056, NORM_THREADS = 512 };

__device__ __forceinline__ double block_sum_double(double x) {
    __shared__ double part[WARP];
    #pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = x;
    __syncthreads();
    double sum = 0;
    for (unsigned w = 0; w < blockDim.x / WARP; w++) sum += part[w];
    return sum;
}

__global__ void __launch_bounds__(NORM_THREADS)
gradient_norm_kernel(double* parts, const float* grads, size_t n) {
    double sum = 0;
    size_t stride = (size_t)gridDim.x * NORM_THREADS, i = (size_t)blockIdx.x * NORM_THREADS + threadIdx.x;
    size_t packs = n / 4;
    #pragma unroll 4
    for (size_t p = i; p < packs; p += stride) {
        Pack<float, 4> g = load_pack<4>(grads + p * 4);
        #pragma unroll
        for (int j = 0; j < 4; j++) sum += (double)g.v[j] * (double)g.v[j];
    }
    if (packs * 4 + i < n) sum += (double)grads[packs * 4 + i] * (double)grads[packs * 4 + i];
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__global__ void gradient_norm_parts_kernel(double* norm, const double* parts, int P) {
    double sum = 0;
    for (int p = (int)threadIdx.x; p < P; p += blockDim.x) sum += parts[p];
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) *norm = sqrt(sum);
}

// grads: aligned to 16 bytes (the whole array is)   scratch: NORM_PARTS doubles
void gradient_norm_cuda(double* norm, const float* grads, size_t n, double* scratch,
                               cudaStream_t stream) {
    gradient_norm_kernel<<<NORM_PARTS, NORM_THREADS, 0, stream>>>(scratch, grads, n);
    cudaCheck(cudaGetLastError());
    gradient_norm_parts_kernel<<<1, 1024, 0, stream>>>(norm, scratch, NORM_PARTS);
    cudaCheck(cudaGetLastError());
}

// What the update of one step needs, in device memory: a recorded CUDA graph, which repeats the same launches
// with the same arguments, then takes every step with its own numbers.
typedef struct {
    float beta1, beta2, eps;
    float rate;              // lr / (1 - beta1^step)
    float v_scale;           // 1 / sqrt(1 - beta2^step)
    float keep;              // 1 - lr * weight_decay
    double clip;             // the largest norm, 0: no clipping
} AdamWStep;

// AdamWPiece: at most ADAMW_PIECE neighbouring elements of one tensor, the work of one block
enum { ADAMW_PIECE = 8192, ADAMW_THREADS = 256 };
typedef struct { size_t offset; int count, decay; } AdamWPiece;

AdamWStep adamw_step_cuda(const AdamW* opt, double lr, double clip, int64_t step) {
    AdamWStep s = {(float)opt->beta1, (float)opt->beta2, (float)opt->eps,
                   (float)(lr / (1 - pow(opt->beta1, (double)step))),
                   (float)(1 / sqrt(1 - pow(opt->beta2, (double)step))),
                   (float)(1 - lr * opt->weight_decay), clip};
    return s;
}

// adamw_pieces: appends the pieces of one tensor to piece[n..], returns the new n; piece NULL: only counts
size_t adamw_pieces(AdamWPiece* piece, size_t n, size_t offset, size_t count, bool decay) {
    for (size_t i = 0; i < count; i += ADAMW_PIECE, n++) {
        size_t left = count - i;
        if (!piece) continue;
        piece[n].offset = offset + i;
        piece[n].count = left < ADAMW_PIECE ? (int)left : (int)ADAMW_PIECE;
        piece[n].decay = decay;
    }
    return n;
}

// adamw: one step on all tensors, one block per piece.
//   g = scale * grad,  scale = min(1, clip / (norm + 1e-6))
//   m = beta1 m + (1-beta1) g     v = beta2 v + (1-beta2) g^2
//   p = p (1 - lr wd) - lr * (m / (1-beta1^step)) / (sqrt(v / (1-beta2^step)) + eps)
//   params, grads, m, v float   params_x: the parameters in X for the matmuls, or NULL   norm: gradient_norm;
//   when it is not finite nothing changes
//   Loshchilov, Hutter (1711.05101)       bytes: 28 + sizeof(X) per parameter
__device__ __forceinline__ void adamw_element(float* p, float* m, float* v, float grad, float scale,
                                              float keep, const AdamWStep& s) {
    float g = scale * grad;
    *m = s.beta1 * *m + (1 - s.beta1) * g;
    *v = s.beta2 * *v + (1 - s.beta2) * g * g;
    *p = keep * *p - s.rate * *m / (sqrtf(*v) * s.v_scale + s.eps);
}

template <typename X>
__global__ void __launch_bounds__(ADAMW_THREADS)
adamw_kernel(float* params, X* params_x, const float* grads, float* m, float* v, const AdamWPiece* piece,
             const AdamWStep* step, const double* norm) {
    AdamWStep s = *step;
    if (!isfinite(*norm)) return;
    double ratio = s.clip / (*norm + 1e-6);
    float scale = s.clip > 0 && ratio < 1 ? (float)ratio : 1.0f;
    size_t offset = piece[blockIdx.x].offset;
    int count = piece[blockIdx.x].count, i = (int)threadIdx.x * 4;
    float keep = piece[blockIdx.x].decay ? s.keep : 1.0f;
    params += offset;
    params_x = params_x ? params_x + offset : NULL;
    grads += offset;
    m += offset;
    v += offset;
    if (offset % 4 == 0) {
        #pragma unroll 2
        for (; i + 4 <= count; i += ADAMW_THREADS * 4) {
            Pack<float, 4> g4 = load_pack<4>(grads + i), p4 = load_pack<4>(params + i),
                           m4 = load_pack<4>(m + i), v4 = load_pack<4>(v + i);
            #pragma unroll
            for (int j = 0; j < 4; j++) adamw_element(&p4.v[j], &m4.v[j], &v4.v[j], g4.v[j], scale, keep, s);
            store_pack<4>(m + i, m4.v);
            store_pack<4>(v + i, v4.v);
            store_pack<4>(params + i, p4.v);
            if (params_x) store_pack<4>(params_x + i, p4.v);
        }
        i = count / 4 * 4 + (int)threadIdx.x;                // what is left of an odd count
        if (i >= count) return;
    } else {
        i = (int)threadIdx.x;
    }
    for (; i < count; i += ADAMW_THREADS) {
        adamw_element(&params[i], &m[i], &v[i], grads[i], scale, keep, s);
        if (params_x) params_x[i] = from_float<X>(params[i]);
    }
}

// the arrays are aligned to 16 bytes; piece (n_pieces), step and norm are in device memory
template <typename X>
void adamw_cuda(float* params, X* params_x, const float* grads, float* m, float* v, const AdamWPiece* piece,
                const AdamWStep* step, const double* norm, size_t n_pieces, cudaStream_t stream) {
    adamw_kernel<<<(unsigned)n_pieces, ADAMW_THREADS, 0, stream>>>(params, params_x, grads, m, v, piece, step,
                                                                   norm);
    cudaCheck(cudaGetLastError());
}

#ifndef SSM_KERNELS_ONLY    // the ladders in dev/cuda need no model

// ---------------------------------------------------------------------------------------------------
// 5. Blocks
//
// The blocks of train_mamba.c with the neighbouring small layers fused: the residual addition of a block
// happens in the norm of the next one, softplus, skip and gate happen in the scan. A block therefore takes
// `delta`, what the block before it adds to the residual stream, and leaves its own.
// As there, a kind of block is one row of a table, kinds_cuda at the end of this section: what it saves for
// backward, its scratch, its functions. Everything else walks the table.

// Rows of the tables are TensorSpecs: a shape per token, or one of the sizes in array_count. In addition to
// the sizes and flags of train_mamba.c (BACKWARD_ONLY also among what is saved):
enum { DIM_IN2_ROW = 1000,            // DIM_IN2, padded
       DIM_QKV_CONV };                // DIM_QKV where attention has a conv, otherwise nothing
enum { IS_FLOAT = 1 << 16 };          // the elements are float, otherwise X

// The float parameters of a layer, as train_mamba.c names them. weight_x: one of them in the type of the
// matmuls
template <typename X> struct KindCuda;
template <typename X> struct LayerCuda {
    const KindCuda<X>* kind;
    float* p[MAX_FIELDS];           // the pointers of Mamba1Params, MlpParams, ...
    float* grad[MAX_FIELDS];
    const float* params;            // the first parameter of the model
    const X* params_x;
};

template <typename X> static const X* weight_x(const LayerCuda<X>* L, const float* p) {
    return L->params_x + (p - L->params);
}

// Activations of one layer, saved for backward: per layer unless --recompute.
template <typename X> struct ActsCuda {
    float *res, *rstd;              // residual stream that the norm read (B,T,D), (B,T)
    X* u;                           // normalized (B,T,D)
    void* field[MAX_FIELDS];        // those of the kind
    void** scratch;                 // of the kind: results on their way, gradients
};

// What all layers share.
template <typename X> struct ScratchCuda {
    X *delta, *du, *dres_x;
    float *dres, *sums;             // sums: partial sums of a block's kernels, see sums_take
    int* sort;
};

// SideCuda: a second stream for the gradients of weights. Nothing waits for them until the optimizer, so they
// fill the tails of the other kernels and run beside those that only move memory (in_proj's and the norm's
// backward, 16384 x 768 on an H200: 0.171 ms one after the other, 0.163 side by side).
typedef struct {
    cudaStream_t stream;
    Matmul matmul;                  // with a workspace of its own
    cudaEvent_t ready, done;
} SideCuda;

// SumsCuda: the sums of a block's backward that are still to be made, and what is free of their memory. Every
// kernel takes memory of its own for its parts; sums_finish makes the sums, on the side stream.
typedef struct {
    SumList list;
    float* free;
} SumsCuda;

static inline size_t sums_round(size_t n) { return (n + 7) / 8 * 8; }    // pieces begin at 32 bytes

template <typename X> struct CudaRun {
    const Config* config;
    Matmul* matmul;
    size_t B, T;
    const int* doc;
    cudaStream_t stream;
    int recompute;                  // RECOMPUTE_CHEAP: u and the CHEAP fields are overwritten since forward
    DropoutCuda dropout;            // of delta_in; for the first sub-layer (place 0) of the embedding
    bool add;                       // weight gradients of matmuls are added to; false: written
    SideCuda* side;
    SumsCuda* sums;                 // in backward
    DecodeStream* many;             // section 4.16; NULL: few sequences
    float* wide_states;             // with config.state_bf16: room for the floats of one layer's states
};

// side_fork: the side stream, which is returned, goes on behind what the main one has been given so far.
// side_join: the main stream waits for the side, whose inputs it may then overwrite. Without training there
// is only the main stream.
template <typename X> static cudaStream_t side_fork(const CudaRun<X>* run) {
    if (!run->side->stream) return run->stream;
    cudaCheck(cudaEventRecord(run->side->ready, run->stream));
    cudaCheck(cudaStreamWaitEvent(run->side->stream, run->side->ready, 0));
    return run->side->stream;
}
template <typename X> static void side_join(const CudaRun<X>* run) {
    if (!run->side->stream) return;
    cudaCheck(cudaEventRecord(run->side->done, run->side->stream));
    cudaCheck(cudaStreamWaitEvent(run->stream, run->side->done, 0));
}

// sums_take: memory for n floats of parts
template <typename X> static float* sums_take(const CudaRun<X>* run, size_t n) {
    float* piece = run->sums->free;
    run->sums->free += sums_round(n);
    return piece;
}

// sums_finish: the end of a block. The block before it takes the memory again behind a side_join.
template <typename X> static void sums_finish(const CudaRun<X>* run, const ScratchCuda<X>* shared) {
    sum_list_cuda(&run->sums->list, side_fork(run));
    run->sums->free = shared->sums;
}

// linear_backward_bias: dbias (O) += sum of dout (M,O)
template <typename X>
static void linear_backward_bias(const CudaRun<X>* run, float* dbias, const X* dout, size_t lddo, size_t O) {
    size_t M = run->B * run->T;
    if (dbias)
        bias_backward_cuda(dbias, dout, lddo, M, O, sums_take(run, bias_backward_scratch_cuda(M, O)),
                           run->stream, &run->sums->list);
}

// linear_backward_weight: dweight (O,I) = or += dout^T inp on the side stream.   dout (M,O), inp (M,I), row
// strides lddo, ldi
template <typename X>
static void linear_backward_weight(const CudaRun<X>* run, float* dweight, const X* dout, size_t lddo,
                                   const X* inp, size_t ldi, size_t I, size_t O) {
    size_t M = run->B * run->T;
    cudaStream_t stream = side_fork(run);
    matmul_backward_cuda(&run->side->matmul, (X*)NULL, 0, false, dweight, (float*)NULL, dout, lddo, inp, ldi,
                         (const X*)NULL, (float*)NULL, M, I, O, stream, run->add);
}

// linear_backward_input: dinp (M,I) = dout weight, with `add` it is added to.   dout (M,O)   lddi, lddo: row
// strides
template <typename X>
static void linear_backward_input(const CudaRun<X>* run, X* dinp, size_t lddi, bool add, const X* dout,
                                  size_t lddo, const X* weight, size_t I, size_t O) {
    matmul_backward_cuda(run->matmul, dinp, lddi, add, (float*)NULL, (float*)NULL, dout, lddo, (const X*)NULL,
                         0, weight, (float*)NULL, run->B * run->T, I, O, run->stream);
}

// matmul_outputs: how many outputs a matmul computes for O, when rows of the output have ld numbers. Other
// than multiples of 8 do not suit the tensor core (16 bytes of bf16): a step of 12 Mamba-2 layers of width
// 384, 1804 outputs, took 11.0 ms instead of 8.4 (16384 tokens, H200). Parameters have the rows for it
// (model_add_tensor): zeros; so has their gradient, from ssd_dt_backward. With D inputs of which no 16 bytes
// are aligned there is nothing to gain.
static size_t matmul_outputs(size_t O, size_t ld, size_t D) {
    size_t all = (O + 7) / 8 * 8;
    return all <= ld && D % 8 == 0 ? all : O;
}

// block_begin_forward: how every block begins.
//   res = res_in + dropout(delta_in)     u = RMSNorm(res)     out (M,O) = W u + bias, row stride ldo
template <typename X>
static void block_begin_forward(const CudaRun<X>* run, const LayerCuda<X>* L, const ActsCuda<X>* acts,
                                const float* res_in, const X* delta_in, const float* norm, X* out, size_t ldo,
                                const float* weight, const float* bias, size_t O) {
    size_t M = run->B * run->T, D = (size_t)run->config->d_model;
    residual_rmsnorm_forward_cuda(acts->res, acts->u, acts->rstd, res_in, delta_in, norm, M, D,
                                  (float)run->config->norm_eps, run->stream, run->dropout);
    matmul_forward_cuda(run->matmul, out, ldo, acts->u, D, weight_x(L, weight), (const float*)NULL, M, D,
                        matmul_outputs(O, ldo, D), run->stream);
    if (bias) bias_forward_cuda(out, ldo, bias, M, O, run->stream);
}

// block_begin_backward: its backward, the end of every block's. shared->dres is the gradient of what the next
// norm read, dres_x the same in X; both come out as the gradient of what this block's norm read.
//   dout (M,O): the gradient of out   dnorm, dweight, dbias (or NULL): gradients of the parameters
template <typename X>
static void block_begin_backward(const CudaRun<X>* run, const LayerCuda<X>* L, const ActsCuda<X>* acts,
                                 const ScratchCuda<X>* shared, float* dnorm, float* dweight, float* dbias,
                                 X* dout, size_t lddo, const float* norm, const float* weight, size_t O) {
    size_t M = run->B * run->T, D = (size_t)run->config->d_model;
    bool cheap = run->recompute == RECOMPUTE_CHEAP;          // u is made again by the norm's backward
    linear_backward_bias(run, dbias, dout, lddo, O);
    O = matmul_outputs(O, lddo, D);
    linear_backward_input(run, shared->du, D, false, dout, lddo, weight_x(L, weight), D, O);
    side_join(run);                                // dres_x, and with cheap u, are written again
    if (!cheap)
        linear_backward_weight(run, dweight, dout, lddo, acts->u, D, D, O);
    X* dres_x = run->dropout.place ? shared->dres_x : NULL;  // the first sub-layer has no other before it
    rmsnorm_backward_cuda(shared->dres, dres_x, cheap ? acts->u : NULL, dnorm, shared->du, acts->res, norm,
                          acts->rstd, sums_take(run, rmsnorm_backward_scratch_cuda(M, D)), M, D, run->stream,
                          run->dropout, &run->sums->list);
    if (cheap)
        linear_backward_weight(run, dweight, dout, lddo, acts->u, D, D, O);
    sums_finish(run, shared);
}

// Blocks with one token of each sequence (sections 4.10 and 4.15), in bf16. res_in and delta_in as above; the
// residual stream after the addition goes to res_out, what the block adds to shared->delta.

// decode_matmul: by section 4.16, 4.10 or cuBLASLt, whichever serves these sizes
static void decode_matmul(const CudaRun<bf16>* run, const DecodeLinear& a) {
    if (run->many && a.out) decode_many_cuda(a, run->stream);
    else if (decode_linear_fits(a)) decode_linear_cuda(a, run->stream);
    else if (a.out)
        matmul_forward_cuda(run->matmul, a.out, a.ldo, a.act, a.ld_act, a.weight, a.bias, run->B, a.K, a.O,
                            run->stream);
    else
        gemm(run->matmul, a.out_float, a.ldo, a.weight, a.K, true, a.act, a.ld_act, false, a.O, run->B, a.K,
             0.0f, run->stream);
}

// norm, then the first matmul of a block: few sequences in one kernel
static void decode_norm_linear(const CudaRun<bf16>* run, DecodeLinear a, bf16* u, float* rstd, float* res_out,
                               const float* res_in, const bf16* delta_in, const float* norm) {
    size_t D = (size_t)run->config->d_model;
    a.K = D;
    a.rows = (int)run->B;
    if (decode_linear_fits(a)) {
        a.res_in = res_in; a.delta = delta_in; a.res_out = res_out; a.norm = norm;
        a.eps = (float)run->config->norm_eps;
    } else {
        residual_rmsnorm_forward_cuda(res_out, u, rstd, res_in, delta_in, norm, run->B, D,
                                      (float)run->config->norm_eps, run->stream);
        a.act = u; a.ld_act = D;
    }
    decode_matmul(run, a);
}

static void decode_first_linear(const CudaRun<bf16>* run, DecodeLinear a, const ActsCuda<bf16>* acts,
                                float* res_out, const float* res_in, const bf16* delta_in,
                                const float* norm) {
    if (const DecodeStream* m = run->many) {
        a.K = a.ld_act = (size_t)run->config->d_model;
        a.rows = (int)run->B; a.act = m->act; a.squares = m->squares; a.parts = m->parts;
        a.eps = (float)run->config->norm_eps;
        decode_matmul(run, a);
    } else decode_norm_linear(run, a, acts->u, acts->rstd, res_out, res_in, delta_in, norm);
}

// the last matmul of a block: with many sequences it also adds to the residual stream
static void decode_last_linear(const CudaRun<bf16>* run, DecodeLinear a) {
    if (DecodeStream* m = run->many) {
        a.out = m->act; a.res = m->res; a.norm = m->norm; a.next_squares = m->squares;
        m->parts = (int)((a.O + 63) / 64);
    }
    decode_matmul(run, a);
}

static void decode_plain_linear(const CudaRun<bf16>* run, bf16* out, const bf16* act, const bf16* weight,
                                const float* bias, size_t K, size_t O) {
    DecodeLinear a = {};
    a.weight = weight; a.bias = bias; a.O = O; a.K = K; a.rows = (int)run->B;
    a.act = act; a.ld_act = K; a.out = out; a.ldo = O;
    decode_last_linear(run, a);
}

// bytes of a number in the states of recurrences
static size_t state_size(const Config* c) { return c->state_bf16 ? sizeof(bf16) : sizeof(float); }

// --------------------------------------------------------------------------------------------------
// 5.1 Mamba-1

template <typename X> struct Mamba1ActsCuda { X *xz, *x, *rbc, *dt_raw, *s, *hs; };

static const TensorSpec mamba1_acts_cuda[] = {
    {"xz",     {DIM_2E}, 0, 0},                          // x before the conv, gate z
    {"x",      {DIM_E}, 0, CHEAP},                       // after conv and SiLU
    {"rbc",    {DIM_R2N}, 0, 0},                         // r, B, C
    {"dt_raw", {DIM_E}, 0, CHEAP},                       // dt before bias and softplus
    {"s",      {DIM_E}, 0, BACKWARD_ONLY},               // scan output, before the gate
    {"hs",     {DIM_SCAN_SAVED}, 0, BACKWARD_ONLY},      // states
};

template <typename X> struct Mamba1ScratchCuda { X *y, *dy, *dxz, *dx, *ddt, *drbc; };

static const TensorSpec mamba1_scratch_cuda[] = {
    {"y",    {DIM_E}, 0, 0},                             // after the gate
    {"dy",   {DIM_E}, 0, BACKWARD_ONLY},
    {"dxz",  {DIM_2E}, 0, BACKWARD_ONLY},
    {"dx",   {DIM_E}, 0, BACKWARD_ONLY},
    {"ddt",  {DIM_E}, 0, BACKWARD_ONLY},
    {"drbc", {DIM_R2N}, 0, BACKWARD_ONLY},
};

// scan_spacing: tokens between two saved states; with --recompute cheap every second one is made again
static int scan_spacing(int recompute) { return recompute == RECOMPUTE_CHEAP ? 16 : SCAN_SPACING; }

// floats of partial sums that its kernels need
static size_t mamba1_sums_cuda(const Config* c, size_t B, size_t T, bool training) {
    size_t E = (size_t)c->d_inner;
    if (!training)                                           // decoding: parts of the product with W_x
        return decode_parts(2 * E, E) * min_size(B, 8) *
               decode_padded((size_t)(c->dt_rank + 2 * c->d_state));
    return sums_round(selective_scan_scratch_cuda(B, T, E, (size_t)c->d_state)) +
           sums_round(causal_conv1d_scratch_cuda(B, T, E, (size_t)c->d_conv)) +
           sums_round(bias_backward_scratch_cuda(B * T, (size_t)c->d_model)) +
           sums_round(bias_backward_scratch_cuda(B * T, 2 * E));
}

// mamba1_block_forward_cuda: delta = Mamba(RMSNorm(res)), res = res_in + delta_in.
// state: conv and ssm, float, NULL: zeros
template <typename X>
void mamba1_block_forward_cuda(const CudaRun<X>* run, const LayerCuda<X>* L, const ActsCuda<X>* acts,
                               const ScratchCuda<X>* shared, const float* res_in, const X* delta_in,
                               float* const* state0, float* const* stateT) {
    const Mamba1Params* p = (const Mamba1Params*)L->p;
    const Mamba1ActsCuda<X>* a = (const Mamba1ActsCuda<X>*)acts->field;
    const Mamba1ScratchCuda<X>* w = (const Mamba1ScratchCuda<X>*)acts->scratch;
    const Mamba1State *s0 = (const Mamba1State*)state0, *sT = (const Mamba1State*)stateT;
    const Config* c = run->config;
    size_t B = run->B, T = run->T, M = B * T, D = (size_t)c->d_model, E = (size_t)c->d_inner,
           N = (size_t)c->d_state;
    size_t K = (size_t)c->d_conv, R = (size_t)c->dt_rank, RBC = R + 2 * N;
    cudaStream_t stream = run->stream;
    block_begin_forward(run, L, acts, res_in, delta_in, p->norm, a->xz, 2 * E, p->in_proj, p->in_proj_bias,
                        2 * E);
    causal_conv1d_forward_cuda(a->x, sT->conv, a->xz, 2 * E, s0->conv, p->conv1d, p->conv1d_bias, true,
                               run->doc, B, T, E, K, stream);
    matmul_forward_cuda(run->matmul, a->rbc, RBC, a->x, E, weight_x(L, p->x_proj), (const float*)NULL, M, E,
                        RBC, stream);
    matmul_forward_cuda(run->matmul, a->dt_raw, E, a->rbc, RBC, weight_x(L, p->dt_proj), (const float*)NULL,
                        M, R, E, stream);
    selective_scan_forward_cuda<X>(w->y, a->s, a->hs, sT->ssm, a->x, a->dt_raw, p->dt_proj_bias, p->A_log,
                                   a->rbc + R, a->rbc + R + N, RBC, p->D, a->xz + E, 2 * E, s0->ssm, run->doc,
                                   B, T, E, N, scan_spacing(run->recompute), stream);
    matmul_forward_cuda(run->matmul, shared->delta, D, w->y, E, weight_x(L, p->out_proj), p->out_proj_bias, M,
                        E, D, stream);
}

// mamba1_block_backward_cuda: gradients as in block_begin_backward
template <typename X>
void mamba1_block_backward_cuda(const CudaRun<X>* run, const LayerCuda<X>* L, const ActsCuda<X>* acts,
                                const ScratchCuda<X>* shared, float* const* state0) {
    const Mamba1Params *p = (const Mamba1Params*)L->p, *dp = (const Mamba1Params*)L->grad;
    const Mamba1ActsCuda<X>* a = (const Mamba1ActsCuda<X>*)acts->field;
    const Mamba1ScratchCuda<X>* w = (const Mamba1ScratchCuda<X>*)acts->scratch;
    const Mamba1State* s0 = (const Mamba1State*)state0;
    const Config* c = run->config;
    size_t B = run->B, T = run->T, M = B * T, D = (size_t)c->d_model, E = (size_t)c->d_inner,
           N = (size_t)c->d_state;
    size_t K = (size_t)c->d_conv, R = (size_t)c->dt_rank, RBC = R + 2 * N;
    cudaStream_t stream = run->stream;
    if (run->recompute == RECOMPUTE_CHEAP) {                 // x, dt_raw now, u in block_begin_backward
        causal_conv1d_forward_cuda(a->x, (float*)NULL, a->xz, 2 * E, s0->conv, p->conv1d, p->conv1d_bias,
                                   true, run->doc, B, T, E, K, stream);
        matmul_forward_cuda(run->matmul, a->dt_raw, E, a->rbc, RBC, weight_x(L, p->dt_proj),
                            (const float*)NULL, M, R, E, stream);
    }
    // out = W_out y: the gradient of y first, the scan's backward makes y again for the weight gradient
    linear_backward_input(run, w->dy, E, false, shared->dres_x, D, weight_x(L, p->out_proj), E, D);
    side_join(run);                                // of the layer before: y, ddt, drbc, dxz are written again
    selective_scan_backward_cuda<X>(w->dx, w->ddt, w->dxz + E, 2 * E, w->y, dp->A_log, dp->D,
                                    dp->dt_proj_bias, w->drbc + R, w->drbc + R + N, RBC, (float*)NULL, w->dy,
                                    (const float*)NULL, a->hs, a->s, a->x, a->dt_raw, p->dt_proj_bias,
                                    p->A_log, a->rbc + R, a->rbc + R + N, RBC, p->D, a->xz + E, 2 * E,
                                    run->doc, sums_take(run, selective_scan_scratch_cuda(B, T, E, N)), B, T,
                                    E, N, scan_spacing(run->recompute), stream);
    linear_backward_bias(run, dp->out_proj_bias, shared->dres_x, D, D);
    linear_backward_weight(run, dp->out_proj, shared->dres_x, D, w->y, E, E, D);
    linear_backward_weight(run, dp->dt_proj, w->ddt, E, a->rbc, RBC, R, E);
    linear_backward_input(run, w->drbc, RBC, false, w->ddt, E, weight_x(L, p->dt_proj), R, E);
    linear_backward_weight(run, dp->x_proj, w->drbc, RBC, a->x, E, E, RBC);
    linear_backward_input(run, w->dx, E, true, w->drbc, RBC, weight_x(L, p->x_proj), E, RBC);
    causal_conv1d_backward_cuda(w->dxz, 2 * E, dp->conv1d, dp->conv1d_bias, (float*)NULL, w->dx,
                                (const float*)NULL, a->xz, 2 * E, s0->conv, p->conv1d, p->conv1d_bias, true,
                                run->doc, sums_take(run, causal_conv1d_scratch_cuda(B, T, E, K)), B, T, E, K,
                                stream, &run->sums->list);
    block_begin_backward(run, L, acts, shared, dp->norm, dp->in_proj, dp->in_proj_bias, w->dxz, 2 * E,
                         p->norm, p->in_proj, 2 * E);
}

// beside what decode_scan asks for, it has up to 24 KB
static bool mamba1_decodes(const Config* c) {
    return c->d_inner % 32 == 0 &&
           decode_scan_shared((size_t)c->dt_rank, (size_t)c->d_state) + (24 << 10) <= shared_memory_limit();
}

static void mamba1_block_decode_cuda(const CudaRun<bf16>* run, const LayerCuda<bf16>* L,
                                     const ActsCuda<bf16>* acts, const ScratchCuda<bf16>* shared,
                                     float* res_out, const float* res_in, const bf16* delta_in,
                                     float* const* state) {
    const Mamba1Params* p = (const Mamba1Params*)L->p;
    const Mamba1ActsCuda<bf16>* a = (const Mamba1ActsCuda<bf16>*)acts->field;
    const Mamba1ScratchCuda<bf16>* w = (const Mamba1ScratchCuda<bf16>*)acts->scratch;
    const Mamba1State* s = (const Mamba1State*)state;
    const Config* c = run->config;
    size_t D = (size_t)c->d_model, E = (size_t)c->d_inner, N = (size_t)c->d_state, R = (size_t)c->dt_rank;
    DecodeLinear in = {};
    in.weight = weight_x(L, p->in_proj); in.bias = p->in_proj_bias; in.O = 2 * E;
    in.out = a->xz; in.ldo = 2 * E;
    in.K = D; in.rows = (int)run->B; in.taps = (int)c->d_conv; in.E = E;
    const bool fused = run->B <= 8 &&                      // the product with W_x begins in the first kernel
                       decode_step_shared(R, N) + 1024 <= shared_memory_limit();
    if (fused) {
        in.second_weight = weight_x(L, p->x_proj); in.second_O = R + 2 * N; in.second_parts = shared->sums;
    }
    const bool few = decode_linear_fits(in), conv = few || run->many;
    if (conv) {                                            // the convolution happens there, too
        in.conv_weight = p->conv1d; in.conv_bias = p->conv1d_bias; in.conv_state = s->conv;
    }
    decode_first_linear(run, in, acts, res_out, res_in, delta_in, p->norm);
    if (!conv)
        decode_conv_cuda(a->x, s->conv, a->xz, 2 * E, p->conv1d, p->conv1d_bias, run->B, E, (size_t)c->d_conv,
                         run->stream);
    const bf16* x = conv ? a->xz : a->x;
    size_t ldx = conv ? 2 * E : E;
    DecodeLinear x_proj = {};
    x_proj.weight = weight_x(L, p->x_proj); x_proj.O = R + 2 * N; x_proj.K = E; x_proj.rows = (int)run->B;
    x_proj.act = x; x_proj.ld_act = ldx; x_proj.out = a->rbc; x_proj.ldo = R + 2 * N;
    if (few && fused) {
        DecodeStep step = {};
        step.y = w->y; step.h = s->ssm; step.rows = (int)run->B; step.E = E; step.N = N; step.R = R;
        step.rbc_parts = shared->sums; step.parts = (int)decode_parts(2 * E, E);
        step.x = x; step.z = a->xz + E; step.ldx = 2 * E;
        step.dt_weight = weight_x(L, p->dt_proj);
        step.dt_bias = p->dt_proj_bias; step.A_log = p->A_log; step.D = p->D;
        const auto decode_step = c->state_bf16 ? decode_step_cuda<bf16> : decode_step_cuda<float>;
        decode_step(step, run->stream);
    } else {
        decode_matmul(run, x_proj);
        const auto decode_scan = c->state_bf16 ? decode_scan_cuda<bf16> : decode_scan_cuda<float>;
        decode_scan(w->y, s->ssm, x, ldx, a->rbc, weight_x(L, p->dt_proj), p->dt_proj_bias, p->A_log, p->D,
                    a->xz + E, 2 * E, run->B, E, N, R, run->stream);
    }
    decode_plain_linear(run, shared->delta, w->y, weight_x(L, p->out_proj), p->out_proj_bias, E, D);
}

// mamba1_paths: which kernels serve these sizes, the fast ones or those for any shape
template <typename X> static void mamba1_paths(const Config* c) {
    size_t E = (size_t)c->d_inner, N = (size_t)c->d_state, R = (size_t)c->dt_rank, ldbc = R + 2 * N;
    const X* base = NULL;
    const char* scan =
        selective_scan_path_cuda(base, base + R, base + R + N, ldbc, base + E, 2 * E, 1, 1, E, N);
    bool conv = c->d_conv == 4 && E * sizeof(X) % 8 == 0;
    printf("scan %s%s, convolution %s, ", scan,
           strcmp(scan, "fast") && sizeof(X) == 2
               ? " (the fast one needs --d-state 16, E % 32 = 0, R % 8 = 0)" : "",
           conv ? "fast" : "general");
}

// --------------------------------------------------------------------------------------------------
// 5.2 Mamba-2

template <typename X> struct Mamba2ActsCuda { X *zxbcdt, *xbc; float* dt; X *y, *states; float* gated_rstd; };

static const TensorSpec mamba2_acts_cuda[] = {
    {"zxbcdt",     {DIM_IN2_ROW}, 0, 0},                 // z0, x0, gate z, x, B, C before the conv, dt_raw
    {"xbc",        {DIM_XBC}, 0, CHEAP},                 // x, B, C after conv and SiLU
    {"dt",         {DIM_H}, 0, CHEAP | IS_FLOAT},        // (B,H,T)
    {"y",          {DIM_ES}, 0, 0},                      // output of the SSM, before gate and norm
    {"states",     {DIM_SSD_SAVED}, 0, BACKWARD_ONLY},
    {"gated_rstd", {DIM_G}, 0, IS_FLOAT},
};

template <typename X> struct Mamba2ScratchCuda { X *n, *dn, *dy, *dzxbcdt, *dxbc; float* ddt; };

static const TensorSpec mamba2_scratch_cuda[] = {
    {"n",       {DIM_E}, 0, 0},                          // what out_proj reads
    {"dn",      {DIM_E}, 0, BACKWARD_ONLY},
    {"dy",      {DIM_JOINED}, 0, BACKWARD_ONLY},         // without the inner MLP it takes the place of dn
    {"dzxbcdt", {DIM_IN2_ROW}, 0, BACKWARD_ONLY},
    {"dxbc",    {DIM_XBC}, 0, BACKWARD_ONLY},
    {"ddt",     {DIM_H}, 0, BACKWARD_ONLY | IS_FLOAT},
};

// mamba2_row: the row stride of zxbcdt; rows begin at multiples of 128 bytes (bf16)
static size_t mamba2_row(size_t in) { return (in + 63) / 64 * 64; }

static Mamba2Sizes mamba2_sizes_cuda(const Config* c, size_t B, size_t T) {
    Run run;
    memset(&run, 0, sizeof run);
    run.config = c;
    run.B = B;
    run.T = T;
    return mamba2_sizes(&run);
}

static size_t mamba2_sums_cuda(const Config* c, size_t B, size_t T, bool training) {
    const Mamba2Sizes s = mamba2_sizes_cuda(c, B, T);
    const size_t forward = max_size(ssd_forward_scratch_cuda(B, T, s.H, s.P, s.G, s.N),
                                    min_size(B, DECODE_ROWS) * s.Es);      // squares of decode_ssd
    if (!training) return forward;
    return max_size(forward, sums_round(ssd_backward_scratch_cuda(B, T, s.H, s.P, s.G, s.N)) +
                                 sums_round(ssd_dt_backward_scratch_cuda(B, T, s.H)) +
                                 sums_round(gated_rmsnorm_scratch_cuda(s.M, s.Es, s.Es / s.G)) +
                                 sums_round(causal_conv1d_scratch_cuda(B, T, s.Cd, s.K)) +
                                 sums_round(bias_backward_scratch_cuda(s.M, s.D)) +
                                 sums_round(bias_backward_scratch_cuda(s.M, s.in)));
}

// the CHEAP activations: x, B, C; dt
template <typename X>
static void mamba2_conv_dt(const CudaRun<X>* run, const Mamba2Sizes& s, const Mamba2Params* p,
                           const Mamba2ActsCuda<X>* a, const float* tail0, float* tailT) {
    const Config* c = run->config;
    const size_t ld = mamba2_row(s.in);
    cudaStream_t side = side_fork(run);            // a small kernel, beside the convolution
    ssd_dt_forward_cuda(a->dt, a->zxbcdt + s.dt, ld, p->dt_bias, (float)c->dt_low, (float)c->dt_high, run->B,
                        run->T, s.H, side);
    causal_conv1d_forward_cuda(a->xbc, tailT, a->zxbcdt + s.xbc, ld, tail0, p->conv1d, p->conv1d_bias, true,
                               run->doc, run->B, run->T, s.Cd, s.K, run->stream);
    side_join(run);
}

// mamba2_block_forward_cuda: delta = Mamba2(RMSNorm(res)), res = res_in + delta_in; formulas (S1) to (S6) at
// mamba2_block_forward.   state: conv and ssm, float, NULL: zeros
template <typename X>
void mamba2_block_forward_cuda(const CudaRun<X>* run, const LayerCuda<X>* L, const ActsCuda<X>* acts,
                               const ScratchCuda<X>* shared, const float* res_in, const X* delta_in,
                               float* const* state0, float* const* stateT) {
    const Mamba2Params* p = (const Mamba2Params*)L->p;
    const Mamba2ActsCuda<X>* a = (const Mamba2ActsCuda<X>*)acts->field;
    const Mamba2ScratchCuda<X>* w = (const Mamba2ScratchCuda<X>*)acts->scratch;
    const Mamba2State *s0 = (const Mamba2State*)state0, *sT = (const Mamba2State*)stateT;
    const Config* c = run->config;
    const Mamba2Sizes s = mamba2_sizes_cuda(c, run->B, run->T);
    const size_t ld = mamba2_row(s.in);
    const X *z0 = a->zxbcdt, *x0 = z0 + s.mlp, *z = z0 + s.z, *Bt = a->xbc + s.Es, *Ct = Bt + s.G * s.N;
    cudaStream_t stream = run->stream;
    // (S1) to (S4)
    block_begin_forward(run, L, acts, res_in, delta_in, p->norm, a->zxbcdt, ld, p->in_proj, p->in_proj_bias,
                        s.in);
    mamba2_conv_dt(run, s, p, a, s0->conv, sT->conv);
    ssd_forward_cuda<X>(a->y, a->states, sT->ssm, a->xbc, s.Cd, a->dt, p->A_log, Bt, Ct, s.Cd, p->D,
                        c->D_has_hdim, s0->ssm, run->doc, shared->sums, run->B, run->T, s.H, s.P, s.G, s.N,
                        stream);
    // (S5) and (S6): the inner MLP and the normed and gated y side by side
    if (s.mlp) gate_forward_cuda(w->n, s.E, x0, ld, z0, ld, s.M, s.mlp, stream);
    if (c->rmsnorm)
        gated_rmsnorm_forward_cuda(w->n + s.mlp, s.E, a->gated_rstd, a->y, z, ld, p->gated_norm, s.M, s.Es,
                                   s.Es / s.G, (float)c->norm_eps, c->norm_before_gate, stream);
    else gate_forward_cuda(w->n + s.mlp, s.E, a->y, s.Es, z, ld, s.M, s.Es, stream);
    matmul_forward_cuda(run->matmul, shared->delta, s.D, w->n, s.E, weight_x(L, p->out_proj),
                        p->out_proj_bias, s.M, s.E, s.D, stream);
}

// mamba2_block_backward_cuda: gradients as in block_begin_backward
template <typename X>
void mamba2_block_backward_cuda(const CudaRun<X>* run, const LayerCuda<X>* L, const ActsCuda<X>* acts,
                                const ScratchCuda<X>* shared, float* const* state0) {
    const Mamba2Params *p = (const Mamba2Params*)L->p, *dp = (const Mamba2Params*)L->grad;
    const Mamba2ActsCuda<X>* a = (const Mamba2ActsCuda<X>*)acts->field;
    const Mamba2ScratchCuda<X>* w = (const Mamba2ScratchCuda<X>*)acts->scratch;
    const Mamba2State* s0 = (const Mamba2State*)state0;
    const Config* c = run->config;
    const Mamba2Sizes s = mamba2_sizes_cuda(c, run->B, run->T);
    const size_t B = run->B, T = run->T, ld = mamba2_row(s.in), GN = s.G * s.N;
    const X *z0 = a->zxbcdt, *x0 = z0 + s.mlp, *z = z0 + s.z, *Bt = a->xbc + s.Es;
    X *dz0 = w->dzxbcdt, *dx0 = dz0 + s.mlp, *dz = dz0 + s.z, *dy = s.mlp ? w->dy : w->dn;
    X* dBt = w->dxbc + s.Es;
    cudaStream_t stream = run->stream;
    if (run->recompute == RECOMPUTE_CHEAP) mamba2_conv_dt(run, s, p, a, s0->conv, (float*)NULL);
    // (S6) out = W_out n: the gradient of n first; what follows makes n again for the weight gradient
    linear_backward_input(run, w->dn, s.E, false, shared->dres_x, s.D, weight_x(L, p->out_proj), s.E, s.D);
    side_join(run);                                // of the layer before: n and dzxbcdt are written again
    if (s.mlp)
        gate_backward_cuda(dx0, ld, dz0, ld, w->n, s.E, w->dn, s.E, x0, ld, z0, ld, s.M, s.mlp, stream);
    // (S5)
    if (c->rmsnorm)
        gated_rmsnorm_backward_cuda(dy, dz, ld, w->n + s.mlp, s.E, dp->gated_norm, w->dn + s.mlp, s.E, a->y,
                                    z, ld, p->gated_norm, a->gated_rstd,
                                    sums_take(run, gated_rmsnorm_scratch_cuda(s.M, s.Es, s.Es / s.G)), s.M,
                                    s.Es, s.Es / s.G, c->norm_before_gate, stream, &run->sums->list);
    else
        gate_backward_cuda(dy, s.Es, dz, ld, w->n + s.mlp, s.E, w->dn + s.mlp, s.E, a->y, s.Es, z, ld, s.M,
                           s.Es, stream);
    linear_backward_bias(run, dp->out_proj_bias, shared->dres_x, s.D, s.D);
    linear_backward_weight(run, dp->out_proj, shared->dres_x, s.D, w->n, s.E, s.E, s.D);
    // (S4) to (S1)
    ssd_backward_cuda<X>(w->dxbc, s.Cd, w->ddt, dp->A_log, dBt, dBt + GN, s.Cd, dp->D, (float*)NULL, dy,
                         (const float*)NULL, a->states, a->xbc, s.Cd, a->dt, p->A_log, Bt, Bt + GN, s.Cd,
                         p->D, c->D_has_hdim, run->doc,
                         sums_take(run, ssd_backward_scratch_cuda(B, T, s.H, s.P, s.G, s.N)), B, T, s.H, s.P,
                         s.G, s.N, stream, &run->sums->list);
    cudaStream_t side = side_fork(run);            // a small kernel, beside the convolution
    ssd_dt_backward_cuda(w->dzxbcdt + s.dt, ld, dp->dt_bias, w->ddt, a->zxbcdt + s.dt, ld, p->dt_bias,
                         (float)c->dt_low, (float)c->dt_high,
                         sums_take(run, ssd_dt_backward_scratch_cuda(B, T, s.H)), B, T, s.H, side,
                         &run->sums->list, matmul_outputs(s.in, ld, s.D) - s.in);
    causal_conv1d_backward_cuda(w->dzxbcdt + s.xbc, ld, dp->conv1d, dp->conv1d_bias, (float*)NULL, w->dxbc,
                                (const float*)NULL, a->zxbcdt + s.xbc, ld, s0->conv, p->conv1d,
                                p->conv1d_bias, true, run->doc,
                                sums_take(run, causal_conv1d_scratch_cuda(B, T, s.Cd, s.K)), B, T, s.Cd, s.K,
                                stream, &run->sums->list);
    side_join(run);
    block_begin_backward(run, L, acts, shared, dp->norm, dp->in_proj, dp->in_proj_bias, w->dzxbcdt, ld,
                         p->norm, p->in_proj, s.in);
}

static bool mamba2_decodes(const Config* c) {
    return c->d_inner % 32 == 0 && c->d_ssm % 4 == 0 && c->headdim % DECODE_SSD_ROWS == 0 &&
           decode_ssd_of<float>((size_t)c->d_state);
}

static void mamba2_block_decode_cuda(const CudaRun<bf16>* run, const LayerCuda<bf16>* L,
                                     const ActsCuda<bf16>* acts, const ScratchCuda<bf16>* shared,
                                     float* res_out, const float* res_in, const bf16* delta_in,
                                     float* const* state) {
    const Mamba2Params* p = (const Mamba2Params*)L->p;
    const Mamba2ActsCuda<bf16>* a = (const Mamba2ActsCuda<bf16>*)acts->field;
    const Mamba2ScratchCuda<bf16>* w = (const Mamba2ScratchCuda<bf16>*)acts->scratch;
    const Mamba2State* s0 = (const Mamba2State*)state;
    const Config* c = run->config;
    const Mamba2Sizes s = mamba2_sizes_cuda(c, run->B, 1);
    const size_t ld = mamba2_row(s.in);
    const bf16* z = a->zxbcdt + s.z;
    DecodeLinear in = {}, out = {};
    in.weight = weight_x(L, p->in_proj); in.bias = p->in_proj_bias; in.O = s.in; in.K = s.D;
    in.rows = (int)run->B; in.out = a->zxbcdt; in.ldo = ld; in.taps = (int)s.K;
    out.weight = weight_x(L, p->out_proj); out.bias = p->out_proj_bias; out.O = s.D; out.K = s.E;
    out.rows = (int)run->B; out.act = w->n; out.ld_act = s.E; out.out = shared->delta; out.ldo = s.D;
    const bool conv = run->many || decode_linear_fits(in);     // it happens in the first kernel
    const bool late = (run->many || decode_linear_fits(out)) && c->rmsnorm && s.G == 1 && !s.mlp;
    if (conv) {                                                // late: the gated norm's factor in the last
        in.conv_weight = p->conv1d; in.conv_bias = p->conv1d_bias; in.conv_state = s0->conv;
        in.E = s.Cd; in.conv_first = s.xbc;
    }
    decode_first_linear(run, in, acts, res_out, res_in, delta_in, p->norm);
    if (!conv)
        decode_conv_cuda(a->xbc, s0->conv, a->zxbcdt + s.xbc, ld, p->conv1d, p->conv1d_bias, run->B, s.Cd,
                         s.K, run->stream);
    DecodeSsd step = {};
    step.x = conv ? a->zxbcdt + s.xbc : a->xbc; step.ldx = conv ? ld : s.Cd;
    step.Bt = step.x + s.Es; step.Ct = step.Bt + s.G * s.N;
    step.dt_raw = a->zxbcdt + s.dt; step.z = z; step.ldz = ld;
    step.h = s0->ssm; step.dt_bias = p->dt_bias; step.A_log = p->A_log; step.Dskip = p->D;
    step.dt_low = (float)c->dt_low; step.dt_high = (float)c->dt_high; step.D_has_hdim = c->D_has_hdim;
    step.H = (int)s.H; step.P = (int)s.P; step.G = (int)s.G; step.N = (int)s.N;
    step.gate = late || !c->rmsnorm;
    step.out = step.gate ? w->n + s.mlp : a->y; step.ldo = step.gate ? s.E : s.Es;
    if (late) {
        step.norm = p->gated_norm; step.norm_first = c->norm_before_gate; step.squares = shared->sums;
    }
    const auto decode_ssd = c->state_bf16 ? decode_ssd_cuda<bf16> : decode_ssd_cuda<float>;
    decode_ssd(step, run->B, run->stream);
    if (s.mlp) gate_forward_cuda(w->n, s.E, a->zxbcdt + s.mlp, ld, a->zxbcdt, ld, run->B, s.mlp, run->stream);
    if (!step.gate)
        gated_rmsnorm_forward_cuda(w->n + s.mlp, s.E, a->gated_rstd, a->y, z, ld, p->gated_norm, run->B, s.Es,
                                   s.Es / s.G, (float)c->norm_eps, c->norm_before_gate, run->stream);
    out.squares = step.squares; out.parts = (int)s.H * decode_ssd_splits(s.P, s.N, state_size(c));
    out.eps = (float)c->norm_eps;
    decode_last_linear(run, out);
}

template <typename X> static void mamba2_paths(const Config* c) {
    size_t S = (size_t)(c->d_ssm / c->ngroups), N = (size_t)c->d_state, P = (size_t)c->headdim;
    bool ssd = sizeof(X) == 2 && ssd_backward_fast_of(P, N) && (size_t)c->d_ssm * sizeof(X) % 16 == 0;
    printf("SSD %s%s, gated norm %s, ", ssd ? "fast" : "general",
           !ssd && sizeof(X) == 2
               ? " (the fast one needs --headdim 32, 64 or 128, --d-state 64 or 128)" : "",
           gated_threads(S) ? "fast" : "general");
}

// --------------------------------------------------------------------------------------------------
// 5.3 Attention

template <typename X> struct AttentionActsCuda { X *in, *qkv; float* lse; X* y; };

static const TensorSpec attention_acts_cuda[] = {
    {"in",  {DIM_IN_A}, 0, 0},                           // q, k, v before the conv, up, gate
    {"qkv", {DIM_QKV_CONV}, 0, CHEAP},                   // after conv and rotation; without conv part of `in`
    {"lse", {DIM_HQ}, 0, BACKWARD_ONLY | IS_FLOAT},      // (B,Hq,T)
    {"y",   {DIM_OUT_A}, 0, 0},                          // out of the heads, of the MLP
};

template <typename X> struct AttentionScratchCuda { int2* span; X *din, *dqkv, *dy; };

static const TensorSpec attention_scratch_cuda[] = {
    {"span", {DIM_2}, 0, IS_FLOAT},                      // of documents
    {"din",  {DIM_IN_A}, 0, BACKWARD_ONLY},
    {"dqkv", {DIM_QKV_CONV}, 0, BACKWARD_ONLY},
    {"dy",   {DIM_OUT_A}, 0, BACKWARD_ONLY},
};

static size_t attention_sums_cuda(const Config* c, size_t B, size_t T, bool training) {
    const Heads s = heads_of(c);
    if (!training) return attention_decode_scratch_cuda(B, s.Hq, s.dh, s.capacity);
    return sums_round(B * s.Hq * T) + (s.K ? sums_round(causal_conv1d_scratch_cuda(B, T, s.qkv, s.K)) : 0) +
           sums_round(bias_backward_scratch_cuda(B * T, (size_t)c->d_model)) +
           sums_round(bias_backward_scratch_cuda(B * T, s.in));
}

// the documents of the call; NULL: one per sequence
template <typename X>
static const int2* attention_spans(const CudaRun<X>* run, const AttentionScratchCuda<X>* w,
                                   const float* position0) {
    if (!run->doc) return NULL;
    attention_span_cuda(w->span, run->doc, position0, run->B, run->T, run->stream);
    return w->span;
}

// (A2) q, k, v through the conv
template <typename X>
static void attention_conv(const CudaRun<X>* run, const Heads& s, const AttentionParams* p,
                           const AttentionActsCuda<X>* a, const float* tail0, float* tailT) {
    causal_conv1d_forward_cuda(a->qkv, tailT, a->in, s.in, tail0, p->conv1d, p->conv1d_bias, false, run->doc,
                               run->B, run->T, s.qkv, s.K, run->stream);
}

// (A3) q and k turned in place
template <typename X>
static void attention_turn(const CudaRun<X>* run, const Heads& s, X* qkv, size_t ld, const float* position0,
                           const int2* span, const RotaryCuda& rotary) {
    attention_rotate_cuda(qkv, ld, position0, span, rotary, run->B, run->T, s.Hq, s.Hkv, s.dh, run->stream);
}

// attention_block_forward_cuda: delta = Attention(RMSNorm(res)), res = res_in + delta_in; formulas (A1) to
// (A4) at attention_block_forward.   state: conv, position float, kv (keys turned, values) in X; NULL: none
template <typename X>
void attention_block_forward_cuda(const CudaRun<X>* run, const LayerCuda<X>* L, const ActsCuda<X>* acts,
                                  const ScratchCuda<X>* shared, const float* res_in, const X* delta_in,
                                  float* const* state0, float* const* stateT) {
    const AttentionParams* p = (const AttentionParams*)L->p;
    const AttentionActsCuda<X>* a = (const AttentionActsCuda<X>*)acts->field;
    const AttentionScratchCuda<X>* w = (const AttentionScratchCuda<X>*)acts->scratch;
    const AttentionState *s0 = (const AttentionState*)state0, *sT = (const AttentionState*)stateT;
    const Config* c = run->config;
    const Heads s = heads_of(c);
    const size_t B = run->B, T = run->T, M = B * T, D = (size_t)c->d_model, ld = s.K ? s.qkv : s.in;
    const X* up = a->in + s.qkv;
    X *qkv = s.K ? a->qkv : a->in, *kv0 = (X*)s0->kv, *kvT = (X*)sT->kv;
    const RotaryCuda rotary = rotary_cuda(s.ro, c->rotary_base, c->rotary_interleaved);
    cudaStream_t stream = run->stream;
    block_begin_forward(run, L, acts, res_in, delta_in, p->norm, a->in, s.in, p->in_proj, p->in_proj_bias,
                        s.in);
    if (s.K) attention_conv(run, s, p, a, s0->conv, sT->conv);
    if (T == 1 && kv0 && kv0 == kvT && !a->lse && !run->doc) {           // generation
        attention_decode_cuda<X>(a->y, s.out, kvT, sT->position, s.capacity, qkv, ld, rotary, s.scale,
                                 shared->sums, B, s.Hq, s.Hkv, s.dh, stream);
    } else {
        const int2* span = attention_spans(run, w, s0->position);
        attention_turn(run, s, qkv, ld, s0->position, span, rotary);
        attention_forward_cuda<X>(a->y, s.out, a->lse, qkv, ld, kv0, s.capacity, s0->position, span, s.scale,
                                  B, T, s.Hq, s.Hkv, s.dh, stream);
        if (kvT)
            attention_append_cuda<X>(kvT, sT->position, kv0, s.capacity, s0->position, qkv, ld, span, B, T,
                                     s.Hq, s.Hkv, s.dh, stream);
    }
    if (s.F) gate_forward_cuda(a->y + s.Hq * s.dh, s.out, up, s.in, up + s.F, s.in, M, s.F, stream);
    matmul_forward_cuda(run->matmul, shared->delta, D, a->y, s.out, weight_x(L, p->out_proj),
                        p->out_proj_bias, M, s.out, D, stream);
}

// attention_block_backward_cuda: gradients as in block_begin_backward
template <typename X>
void attention_block_backward_cuda(const CudaRun<X>* run, const LayerCuda<X>* L, const ActsCuda<X>* acts,
                                   const ScratchCuda<X>* shared, float* const* state0) {
    const AttentionParams *p = (const AttentionParams*)L->p, *dp = (const AttentionParams*)L->grad;
    const AttentionActsCuda<X>* a = (const AttentionActsCuda<X>*)acts->field;
    const AttentionScratchCuda<X>* w = (const AttentionScratchCuda<X>*)acts->scratch;
    const AttentionState* s0 = (const AttentionState*)state0;
    const Config* c = run->config;
    const Heads s = heads_of(c);
    const size_t B = run->B, T = run->T, M = B * T, D = (size_t)c->d_model, ld = s.K ? s.qkv : s.in;
    const X* up = a->in + s.qkv;
    X *qkv = s.K ? a->qkv : a->in, *dup = w->din + s.qkv, *dqkv = s.K ? w->dqkv : w->din;
    const RotaryCuda rotary = rotary_cuda(s.ro, c->rotary_base, c->rotary_interleaved);
    cudaStream_t stream = run->stream;
    const int2* span = attention_spans(run, w, s0->position);
    if (run->recompute == RECOMPUTE_CHEAP && s.K) {          // qkv now, u in block_begin_backward
        attention_conv(run, s, p, a, s0->conv, (float*)NULL);
        attention_turn(run, s, qkv, ld, s0->position, span, rotary);
    }
    linear_backward_input(run, w->dy, s.out, false, shared->dres_x, D, weight_x(L, p->out_proj), s.out, D);
    side_join(run);                                // of the layer before: din is written again
    linear_backward_bias(run, dp->out_proj_bias, shared->dres_x, D, D);
    linear_backward_weight(run, dp->out_proj, shared->dres_x, D, a->y, s.out, s.out, D);
    if (s.F)
        gate_backward_cuda(dup, s.in, dup + s.F, s.in, (X*)NULL, 0, w->dy + s.Hq * s.dh, s.out, up, s.in,
                           up + s.F, s.in, M, s.F, stream);
    attention_backward_cuda<X>(dqkv, ld, w->dy, s.out, a->y, s.out, a->lse, qkv, ld, (const X*)s0->kv,
                               s.capacity, s0->position, span, rotary, s.scale,
                               sums_take(run, B * s.Hq * T), B, T, s.Hq, s.Hkv, s.dh, stream);
    if (s.K)
        causal_conv1d_backward_cuda(w->din, s.in, dp->conv1d, dp->conv1d_bias, (float*)NULL, dqkv,
                                    (const float*)NULL, a->in, s.in, s0->conv, p->conv1d, p->conv1d_bias,
                                    false, run->doc,
                                    sums_take(run, causal_conv1d_scratch_cuda(B, T, s.qkv, s.K)), B, T, s.qkv,
                                    s.K, stream, &run->sums->list);
    block_begin_backward(run, L, acts, shared, dp->norm, dp->in_proj, dp->in_proj_bias, w->din, s.in, p->norm,
                         p->in_proj, s.in);
}

static bool attention_decodes(const Config* c) { return heads_of(c).out % 32 == 0; }

static void attention_block_decode_cuda(const CudaRun<bf16>* run, const LayerCuda<bf16>* L,
                                        const ActsCuda<bf16>* acts, const ScratchCuda<bf16>* shared,
                                        float* res_out, const float* res_in, const bf16* delta_in,
                                        float* const* state) {
    const AttentionParams* p = (const AttentionParams*)L->p;
    const AttentionActsCuda<bf16>* a = (const AttentionActsCuda<bf16>*)acts->field;
    const AttentionState* s0 = (const AttentionState*)state;
    const Config* c = run->config;
    const Heads s = heads_of(c);
    const bf16* up = a->in + s.qkv;
    DecodeLinear in = {};
    in.weight = weight_x(L, p->in_proj); in.bias = p->in_proj_bias; in.O = s.in;
    in.out = a->in; in.ldo = s.in;
    decode_first_linear(run, in, acts, res_out, res_in, delta_in, p->norm);
    if (s.K) attention_conv(run, s, p, a, s0->conv, s0->conv);
    attention_decode_cuda<bf16>(a->y, s.out, (bf16*)s0->kv, s0->position, s.capacity, s.K ? a->qkv : a->in,
                                s.K ? s.qkv : s.in, rotary_cuda(s.ro, c->rotary_base, c->rotary_interleaved),
                                s.scale, shared->sums, run->B, s.Hq, s.Hkv, s.dh, run->stream);
    if (s.F)
        gate_forward_cuda(a->y + s.Hq * s.dh, s.out, up, s.in, up + s.F, s.in, run->B, s.F, run->stream);
    decode_plain_linear(run, shared->delta, a->y, weight_x(L, p->out_proj), p->out_proj_bias, s.out,
                        (size_t)c->d_model);
}

template <typename X> static void attention_paths(const Config* c) {
    printf("attention %s, ", sizeof(X) == 2 && c->attn_head_dim % 8 == 0 && c->attn_head_dim <= 128
                                 ? "fast" : "general");
}

// --------------------------------------------------------------------------------------------------
// 5.4 Gated MLP

template <typename X> struct MlpActsCuda { X* h; };

static const TensorSpec mlp_acts_cuda[] = {
    {"h", {DIM_2F}, 0, 0},                               // up, gate
};

template <typename X> struct MlpScratchCuda { X *m, *dm, *dh; };

static const TensorSpec mlp_scratch_cuda[] = {
    {"m",  {DIM_F}, 0, 0},
    {"dm", {DIM_F}, 0, BACKWARD_ONLY},
    {"dh", {DIM_2F}, 0, BACKWARD_ONLY},
};

template <typename X>
void mlp_block_forward_cuda(const CudaRun<X>* run, const LayerCuda<X>* L, const ActsCuda<X>* acts,
                            const ScratchCuda<X>* shared, const float* res_in, const X* delta_in,
                            float* const*, float* const*) {
    const MlpParams* p = (const MlpParams*)L->p;
    const MlpActsCuda<X>* a = (const MlpActsCuda<X>*)acts->field;
    const MlpScratchCuda<X>* w = (const MlpScratchCuda<X>*)acts->scratch;
    size_t M = run->B * run->T, D = (size_t)run->config->d_model, F = (size_t)run->config->d_intermediate;
    block_begin_forward(run, L, acts, res_in, delta_in, p->norm, a->h, 2 * F, p->fc1, (const float*)NULL,
                        2 * F);
    gate_forward_cuda(w->m, F, a->h, 2 * F, a->h + F, 2 * F, M, F, run->stream);
    matmul_forward_cuda(run->matmul, shared->delta, D, w->m, F, weight_x(L, p->fc2), (const float*)NULL, M, F,
                        D, run->stream);
}

template <typename X>
void mlp_block_backward_cuda(const CudaRun<X>* run, const LayerCuda<X>* L, const ActsCuda<X>* acts,
                             const ScratchCuda<X>* shared, float* const*) {
    const MlpParams *p = (const MlpParams*)L->p, *dp = (const MlpParams*)L->grad;
    const MlpActsCuda<X>* a = (const MlpActsCuda<X>*)acts->field;
    const MlpScratchCuda<X>* w = (const MlpScratchCuda<X>*)acts->scratch;
    size_t M = run->B * run->T, D = (size_t)run->config->d_model, F = (size_t)run->config->d_intermediate;
    linear_backward_input(run, w->dm, F, false, shared->dres_x, D, weight_x(L, p->fc2), F, D);
    side_join(run);                                // of the layer before: dh and m are written again
    gate_backward_cuda(w->dh, 2 * F, w->dh + F, 2 * F, w->m, F, w->dm, F, a->h, 2 * F, a->h + F, 2 * F, M, F,
                       run->stream);
    linear_backward_weight(run, dp->fc2, shared->dres_x, D, w->m, F, F, D);
    block_begin_backward(run, L, acts, shared, dp->norm, dp->fc1, (float*)NULL, w->dh, 2 * F, p->norm, p->fc1,
                         2 * F);
}

static bool mlp_decodes(const Config* c) { return c->d_intermediate % 32 == 0; }

static void mlp_block_decode_cuda(const CudaRun<bf16>* run, const LayerCuda<bf16>* L,
                                  const ActsCuda<bf16>* acts, const ScratchCuda<bf16>* shared, float* res_out,
                                  const float* res_in, const bf16* delta_in, float* const*) {
    const MlpParams* p = (const MlpParams*)L->p;
    const MlpActsCuda<bf16>* a = (const MlpActsCuda<bf16>*)acts->field;
    const MlpScratchCuda<bf16>* w = (const MlpScratchCuda<bf16>*)acts->scratch;
    size_t D = (size_t)run->config->d_model, F = (size_t)run->config->d_intermediate;
    DecodeLinear up = {};
    up.weight = weight_x(L, p->fc1); up.O = 2 * F; up.out = a->h; up.ldo = 2 * F;
    decode_first_linear(run, up, acts, res_out, res_in, delta_in, p->norm);
    gate_forward_cuda(w->m, F, a->h, 2 * F, a->h + F, 2 * F, run->B, F, run->stream);
    decode_plain_linear(run, shared->delta, w->m, weight_x(L, p->fc2), NULL, F, D);
}

// --------------------------------------------------------------------------------------------------
// 5.5 The table of kinds

template <typename X> struct KindCuda {
    char letter;                                   // of the kind in train_mamba.c
    const TensorSpec* acts;    int n_acts;         // saved for backward
    const TensorSpec* scratch; int n_scratch;
    size_t (*sums)(const Config*, size_t B, size_t T, bool training);  // floats of its parts of sums; NULL: 0
    void (*forward)(const CudaRun<X>*, const LayerCuda<X>*, const ActsCuda<X>*, const ScratchCuda<X>*,
                    const float* res_in, const X* delta_in, float* const* state0, float* const* stateT);
    void (*backward)(const CudaRun<X>*, const LayerCuda<X>*, const ActsCuda<X>*, const ScratchCuda<X>*,
                     float* const* state0);
    bool (*decodes)(const Config*);                // whether `decode` is for these sizes; NULL: for none
    void (*decode)(const CudaRun<bf16>*, const LayerCuda<bf16>*, const ActsCuda<bf16>*,
                   const ScratchCuda<bf16>*, float* res_out, const float* res_in, const bf16* delta_in,
                   float* const* state);
    void (*paths)(const Config*);                  // prints which of its kernels are fast; NULL: no choice
    int state_x;                                   // bit i: field i of its state is X, not float
};
#define FIELD(type, name) (offsetof(type, name) / sizeof(void*))

enum { N_KINDS_CUDA = 4 };
template <typename X> static const KindCuda<X> kinds_cuda[N_KINDS_CUDA] = {
    {'1', TABLE(mamba1_acts_cuda), TABLE(mamba1_scratch_cuda), mamba1_sums_cuda, mamba1_block_forward_cuda<X>,
     mamba1_block_backward_cuda<X>, mamba1_decodes, mamba1_block_decode_cuda, mamba1_paths<X>, 0},
    {'2', TABLE(mamba2_acts_cuda), TABLE(mamba2_scratch_cuda), mamba2_sums_cuda, mamba2_block_forward_cuda<X>,
     mamba2_block_backward_cuda<X>, mamba2_decodes, mamba2_block_decode_cuda, mamba2_paths<X>, 0},
    {'a', TABLE(attention_acts_cuda), TABLE(attention_scratch_cuda), attention_sums_cuda,
     attention_block_forward_cuda<X>, attention_block_backward_cuda<X>, attention_decodes,
     attention_block_decode_cuda, attention_paths<X>, 1 << FIELD(AttentionState, kv)},
    {'m', TABLE(mlp_acts_cuda), TABLE(mlp_scratch_cuda), NULL, mlp_block_forward_cuda<X>,
     mlp_block_backward_cuda<X>, mlp_decodes, mlp_block_decode_cuda, NULL, 0},
};

#define SAME_FIELDS(type, table)                                          \
    static_assert(FIELDS(type<float>) == sizeof(table) / sizeof(TensorSpec), "one row per field, in order")
SAME_FIELDS(Mamba1ActsCuda, mamba1_acts_cuda);
SAME_FIELDS(Mamba1ScratchCuda, mamba1_scratch_cuda);
SAME_FIELDS(Mamba2ActsCuda, mamba2_acts_cuda);
SAME_FIELDS(Mamba2ScratchCuda, mamba2_scratch_cuda);
SAME_FIELDS(AttentionActsCuda, attention_acts_cuda);
SAME_FIELDS(AttentionScratchCuda, attention_scratch_cuda);
SAME_FIELDS(MlpActsCuda, mlp_acts_cuda);
SAME_FIELDS(MlpScratchCuda, mlp_scratch_cuda);

template <typename X> static const KindCuda<X>* kind_cuda(const Kind* kind) {
    for (int k = 0; k < N_KINDS_CUDA; k++)
        if (kinds_cuda<X>[k].letter == kind->letter) return &kinds_cuda<X>[k];
    die("there are no GPU kernels for layers of kind %c (%s); use --device cpu", kind->letter, kind->name);
}

// array_count: elements of an array of a kind's table
static size_t array_count(const TensorSpec* spec, const Config* c, size_t B, size_t T, int recompute) {
    if (spec->dim[0] == DIM_SCAN_SAVED)
        return selective_scan_saved_cuda(B, T, (size_t)c->d_inner, (size_t)c->d_state,
                                         scan_spacing(recompute));
    if (spec->dim[0] == DIM_SSD_SAVED)
        return ssd_saved_cuda(B, T, (size_t)(c->d_ssm / c->headdim), (size_t)c->headdim, (size_t)c->d_state);
    if (spec->dim[0] == DIM_QKV_CONV) return c->attn_conv ? B * T * (size_t)config_dim(c, DIM_QKV) : 0;
    if (spec->dim[0] == DIM_IN2_ROW) return B * T * mamba2_row((size_t)config_dim(c, DIM_IN2));
    return B * T * spec_count(spec, c);
}

// ---------------------------------------------------------------------------------------------------
// 6. Model

enum { CLASSIFIER_ROWS_CUDA = 8192 };       // logits exist for this many tokens at a time

// ArenaCuda: hands out pieces of one device allocation; with base NULL it only counts.
typedef struct { char* base; size_t used; } ArenaCuda;

template <typename Y> static void arena_take(ArenaCuda* arena, Y** p, size_t count) {
    *p = arena->base ? (Y*)(arena->base + arena->used) : NULL;
    arena->used += (count * sizeof(Y) + 255) / 256 * 256;
}

// StepCuda: the numbers of one step, in device memory, where a recorded CUDA graph finds those of every step
typedef struct {
    AdamWStep adamw;
    float scale;             // 1 / number of targets
    uint64_t dropout_key;    // Dropout.key
} StepCuda;

// BatchCuda: what the host sends for one step, in one piece: the numbers, then the tokens of all
// micro-batches
typedef struct {
    char* base;
    StepCuda* step;
    int *tokens, *targets, *doc;    // (micros,B,T)
    bool* fresh;                    // (micros,B): rows whose carried state starts from zero
    size_t bytes;
} BatchCuda;

static void batch_plan(BatchCuda* batch, size_t micros, size_t B, size_t T, char* base) {
    ArenaCuda arena = {base, 0};
    batch->base = base;
    arena_take(&arena, &batch->step, 1);
    arena_take(&arena, &batch->tokens, micros * B * T);
    arena_take(&arena, &batch->targets, micros * B * T);
    arena_take(&arena, &batch->doc, micros * B * T);
    arena_take(&arena, &batch->fresh, micros * B);
    batch->bytes = arena.used;
}

// WorkCuda: the device memory of one forward (and backward) over at most B x T tokens.
template <typename X> struct WorkCuda {
    size_t B, T, micros;
    size_t bytes, saved_bytes;      // all; what waits from forward to backward
    bool training;
    int recompute;
    char* memory;
    BatchCuda batch;
    ActsCuda<X>* acts;              // [n_layers]
    void* (*kind_scratch)[MAX_FIELDS];       // [kind][field]
    ScratchCuda<X> scratch;
    float *res_last, *f_rstd, *losses, *squares;
    X *f, *df, *logits;
};

// The plan has three parts: the batch; what is saved; what is used for a short time. The logits and the
// scratch of the layers are never needed together, so they share their memory.
// An array that backward does not find again (recompute, inference) has the memory of the first layer that
// has it, one for all layers of its kind.
template <typename X> static void work_plan(WorkCuda<X>* w, const Model* m, ArenaCuda* arena) {
    const Config* c = &m->config;
    size_t B = w->B, T = w->T, M = B * T, D = (size_t)c->d_model, Vp = (size_t)c->vocab_padded;
    size_t rows = min_size(M, CLASSIFIER_ROWS_CUDA);
    bool train = w->training;
    char* batch;
    batch_plan(&w->batch, w->micros, B, T, NULL);
    arena_take(arena, &batch, w->batch.bytes);
    batch_plan(&w->batch, w->micros, B, T, batch);

    auto take = [&](void** p, const TensorSpec* spec) {
        size_t size = spec->flags & IS_FLOAT ? sizeof(float) : sizeof(X);
        arena_take(arena, (char**)p, array_count(spec, c, B, T, w->recompute) * size);
    };
    size_t before = arena->used;
    arena_take(arena, &w->losses, M);
    int first[N_KINDS_CUDA];        // the first layer of each kind, -1: not in this model
    for (int k = 0; k < N_KINDS_CUDA; k++) first[k] = -1;
    for (int l = 0; l < m->n_layers; l++) {
        ActsCuda<X>* a = &w->acts[l];
        const KindCuda<X>* kind = kind_cuda<X>(m->layer[l].kind);
        int k = (int)(kind - kinds_cuda<X>);
        bool keep = train && w->recompute != RECOMPUTE_ALL, keep_cheap = train && !w->recompute;
        if (first[k] < 0) first[k] = l;
        if (train || l < 2) arena_take(arena, &a->res, M * D);
        else a->res = w->acts[l % 2].res;      // inference: two residual buffers, in turn
        if (keep || l == 0) arena_take(arena, &a->rstd, M);
        else a->rstd = w->acts[0].rstd;
        if (keep_cheap || l == 0) arena_take(arena, &a->u, M * D);
        else a->u = w->acts[0].u;
        for (int i = 0; i < kind->n_acts; i++) {
            const TensorSpec* spec = &kind->acts[i];
            if ((spec->flags & BACKWARD_ONLY) && !train) continue;       // NULL: nothing is saved
            if (first[k] == l || (spec->flags & CHEAP ? keep_cheap : keep)) take(&a->field[i], spec);
            else a->field[i] = w->acts[first[k]].field[i];
        }
        a->scratch = w->kind_scratch[k];
    }
    arena_take(arena, &w->res_last, M * D);
    arena_take(arena, &w->f, M * D);
    arena_take(arena, &w->f_rstd, M);
    if (train) arena_take(arena, &w->df, M * D);
    else arena_take(arena, &w->squares, decode_many_parts(D));
    w->saved_bytes = arena->used - before;

    ScratchCuda<X>* s = &w->scratch;
    size_t start = arena->used, end;
    arena_take(arena, &w->logits, rows * Vp);
    end = arena->used;
    arena->used = train ? start : end;         // decoding keeps its last outputs beside the logits
    arena_take(arena, &s->delta, M * D);
    size_t sums = 0;
    for (int k = 0; k < N_KINDS_CUDA; k++) {
        const KindCuda<X>* kind = &kinds_cuda<X>[k];
        if (first[k] < 0) continue;
        for (int i = 0; i < kind->n_scratch; i++)
            if (train || !(kind->scratch[i].flags & BACKWARD_ONLY))
                take(&w->kind_scratch[k][i], &kind->scratch[i]);
        if (kind->sums) sums = max_size(sums, kind->sums(c, B, T, train));
        if (kind->sums && !train) sums = max_size(sums, kind->sums(c, M, 1, false));   // a token of each row
    }
    if (train) sums += sums_round(rmsnorm_backward_scratch_cuda(M, D));    // of every block
    // a smaller call may cut time differently; its partial sums are never more than twice those of the full
    // one
    if (sums) arena_take(arena, &s->sums, 2 * sums);
    if (train) {
        arena_take(arena, &s->dres, M * D);
        arena_take(arena, &s->dres_x, M * D);
        arena_take(arena, &s->du, M * D);
        arena_take(arena, &s->sort, 2 * embedding_backward_scratch_cuda(M, D));
    }
    arena->used = max_size(arena->used, end);
}

// work_measure: the bytes of a plan, without memory
template <typename X>
WorkCuda<X> work_measure(const Model* m, size_t B, size_t T, size_t micros, bool training, int recompute) {
    WorkCuda<X> w;
    memset(&w, 0, sizeof w);
    w.B = B; w.T = T; w.micros = micros; w.training = training; w.recompute = recompute;
    w.acts = (ActsCuda<X>*)xcalloc((size_t)m->n_layers, sizeof(ActsCuda<X>));
    w.kind_scratch = (void* (*)[MAX_FIELDS])xcalloc(N_KINDS_CUDA, sizeof *w.kind_scratch);
    ArenaCuda arena = {NULL, 0};
    work_plan(&w, m, &arena);
    w.bytes = arena.used;
    return w;
}

enum { GRID_MOST = 65535 };

// work_largest: the largest B whose work fits into `bytes`, 0: none
template <typename X>
size_t work_largest(const Model* m, size_t T, size_t micros, int recompute, size_t bytes) {
    auto fits = [&](size_t B) {
        WorkCuda<X> w = work_measure<X>(m, B, T, micros, true, recompute);
        free(w.acts);
        free(w.kind_scratch);
        return w.bytes <= bytes;
    };
    size_t low = 0, high = 1;
    while (high <= GRID_MOST && fits(high)) { low = high; high *= 2; }
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (fits(middle)) low = middle;
        else high = middle;
    }
    return low;
}

// grid_check: sequences and runs of tokens are the y and z of several grids, which end at 65535
static void grid_check(size_t B, size_t T) {
    const size_t longest = GRID_MOST * 128;
    if (B > GRID_MOST)
        die("%zu sequences at a time: a GPU takes at most %d; choose fewer", B, GRID_MOST);
    if (T > longest)
        die("rows of %zu tokens: a GPU takes at most %zu; lower --seq-len or give --window", T, longest);
}

template <typename X>
WorkCuda<X> work_create(const Model* m, size_t B, size_t T, size_t micros, bool training, int recompute) {
    grid_check(B, T);
    WorkCuda<X> w = work_measure<X>(m, B, T, micros, training, recompute);
    size_t available = 0, total = 0;
    cudaCheck(cudaMemGetInfo(&available, &total));
    if (w.bytes > available)
        die("activations and batch need %.1f GiB, the GPU has %.1f of %.1f GiB left; lower --batch-size or "
            "--seq-len, or use --recompute",
            (double)w.bytes / 1073741824.0, (double)available / 1073741824.0, (double)total / 1073741824.0);
    w.memory = (char*)device_calloc(w.bytes, 1);
    ArenaCuda arena = {w.memory, 0};
    work_plan(&w, m, &arena);
    return w;
}

template <typename X> void work_free(WorkCuda<X>* w) {
    cudaCheck(cudaFree(w->memory));
    device_bytes -= w->bytes;
    free(w->acts);
    free(w->kind_scratch);
    memset(w, 0, sizeof *w);
}

// ModelCuda: parameters, gradients and moments on the device, at the offsets of the host's flat arrays.
template <typename X> struct ModelCuda {
    float *params, *grads, *m, *v;
    X* params_x;                    // the parameters in the type of the matmuls; params itself in fp32
    LayerCuda<X>* layer;
    float *norm_f, *dnorm_f, *dembedding, *dhead;
    X *embedding_x, *head_x;
    AdamWPiece *piece, *clear, *frozen;      // see pieces_create
    size_t n_pieces, n_clear, n_frozen;
    double *norm, *norm_parts;
};

template <typename X> static X* x_of(const ModelCuda<X>* d, const Model* m, const real* host) {
    return d->params_x + (host - m->params);
}
template <typename X> static float* float_of(const ModelCuda<X>* d, const Model* m, const real* host) {
    return host ? d->params + (host - m->params) : NULL;
}

// by_matmul: whether the gradient of a tensor comes from matmuls alone, which can write instead of add; that
// of a tied embedding begins with the head's
static bool by_matmul(const Model* m, const Tensor* t) {
    return t->ndim == 2 && (t->spec->flags & DECAY) &&
           (t->spec->init != INIT_EMBEDDING || m->config.tie_embeddings);
}

// pieces_create: a list of pieces on the device: of the tensors that are updated; of those whose gradient is
// always added to; of those that --freeze names
enum { PIECES_UPDATED, PIECES_ADDED_TO, PIECES_FROZEN };
static AdamWPiece* pieces_create(const Model* m, int which, size_t* n) {
    AdamWPiece* piece = NULL;
    for (int pass = 0; pass < 2; pass++) {
        if (pass) piece = (AdamWPiece*)xcalloc(*n, sizeof(AdamWPiece));
        *n = 0;
        for (int i = 0; i < m->n_tensors; i++) {
            const Tensor* t = &m->tensor[i];
            if (which == PIECES_ADDED_TO ? !by_matmul(m, t) : t->frozen == (which == PIECES_FROZEN))
                *n = adamw_pieces(piece, *n, t->offset, t->count, t->spec->flags & DECAY);
        }
    }
    AdamWPiece* device = device_copy(piece, *n);
    free(piece);
    return device;
}

// clear_pieces: zeros in the pieces of an array, one block each
__global__ void clear_pieces_kernel(float* p, const AdamWPiece* piece) {
    AdamWPiece here = piece[blockIdx.x];
    for (int i = threadIdx.x; i < here.count; i += blockDim.x) p[here.offset + i] = 0;
}

template <typename X> ModelCuda<X> model_cuda_create(const Model* m, bool training) {
    ModelCuda<X> d;
    memset(&d, 0, sizeof d);
    d.params = (float*)device_calloc(m->n_elements, sizeof(float));
    if (training) {
        d.grads = (float*)device_calloc(m->n_elements, sizeof(float));
        d.m = (float*)device_calloc(m->n_elements, sizeof(float));
        d.v = (float*)device_calloc(m->n_elements, sizeof(float));
    }
    d.params_x =
        sizeof(X) == sizeof(float) ? (X*)(void*)d.params : (X*)device_calloc(m->n_elements, sizeof(X));
    d.layer = (LayerCuda<X>*)xcalloc((size_t)m->n_layers, sizeof(LayerCuda<X>));
    for (int l = 0; l < m->n_layers; l++) {
        d.layer[l].kind = kind_cuda<X>(m->layer[l].kind);
        d.layer[l].params = d.params;
        d.layer[l].params_x = d.params_x;
        for (int i = 0; i < m->layer[l].kind->n_params; i++) {
            const real* host = m->layer[l].params[i];
            d.layer[l].p[i] = float_of(&d, m, host);
            d.layer[l].grad[i] = host && training ? d.grads + (host - m->params) : NULL;
        }
    }
    d.norm_f = float_of(&d, m, m->norm_f);
    d.embedding_x = x_of(&d, m, m->embedding);
    d.head_x = x_of(&d, m, m->head);
    if (!training) return d;
    d.dnorm_f = d.grads + (m->norm_f - m->params);
    d.dembedding = d.grads + (m->embedding - m->params);
    d.dhead = d.grads + (m->head - m->params);
    d.piece = pieces_create(m, PIECES_UPDATED, &d.n_pieces);
    d.clear = pieces_create(m, PIECES_ADDED_TO, &d.n_clear);
    d.frozen = pieces_create(m, PIECES_FROZEN, &d.n_frozen);
    d.norm = (double*)device_calloc(1, sizeof(double));
    d.norm_parts = (double*)device_calloc(NORM_PARTS, sizeof(double));
    return d;
}

template <typename X> void model_cuda_free(ModelCuda<X>* d) {
    if ((void*)d->params_x != (void*)d->params) cudaCheck(cudaFree(d->params_x));
    void* memory[] = {d->params, d->grads, d->m, d->v, d->piece, d->clear, d->frozen, d->norm,
                      d->norm_parts};
    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) cudaCheck(cudaFree(memory[i]));
    free(d->layer);
}

// A State on the device: field after field like on the host, each aligned to 16 bytes. Its numbers are float;
// the keys and values of attention are X, and with config.state_bf16 the states of recurrences bf16.

// state_row: bytes of field i of layer l in one row
template <typename X> static size_t state_row(const Model* m, int l, int i) {
    const TensorSpec* spec = &m->layer[l].kind->state[i];
    size_t size = kind_cuda<X>(m->layer[l].kind)->state_x >> i & 1 ? sizeof(X)
                : spec->flags & RECURRENT ? state_size(&m->config) : sizeof(float);
    return spec_count(spec, &m->config) * size;
}

// where layer l begins, in words of 4 bytes; l = n_layers: how many there are
template <typename X> static size_t state_begin(const Model* m, size_t rows, int l) {
    size_t n = 0;
    for (int k = 0; k < l; k++)
        for (int i = 0; i < m->layer[k].kind->n_state; i++) n += (rows * state_row<X>(m, k, i) + 15) / 16 * 4;
    return n;
}

// the fields of one layer's state from row0 on, rows: of all; all NULL without a state
template <typename X>
static void state_fields(float* field[MAX_FIELDS], const Model* m, float* device, size_t rows, int l,
                         size_t row0) {
    for (int i = 0; i < MAX_FIELDS; i++) field[i] = NULL;
    if (!device) return;
    device += state_begin<X>(m, rows, l);
    for (int i = 0; i < m->layer[l].kind->n_state; i++) {
        field[i] = (float*)((char*)device + row0 * state_row<X>(m, l, i));
        device += (rows * state_row<X>(m, l, i) + 15) / 16 * 4;
    }
}

// state_copy_cuda: a State of the host to the device, or back; returns when it is there
template <typename X>
static void state_copy_cuda(const Model* m, float* device, const State* host, bool to_the_host,
                            cudaStream_t stream) {
    for (int l = 0; l < m->n_layers; l++) {
        float* field[MAX_FIELDS];
        state_fields<X>(field, m, device, host->rows, l, 0);
        for (int i = 0; i < m->layer[l].kind->n_state; i++) {
            size_t n = host->rows * spec_count(&m->layer[l].kind->state[i], &m->config);
            size_t bytes = host->rows * state_row<X>(m, l, i);
            real* p = host->field[l][i];
            bf16* narrow = bytes < n * sizeof(real) ? (bf16*)xcalloc(n, sizeof(bf16)) : NULL;
            void* there = narrow ? (void*)narrow : (void*)p;
            for (size_t j = 0; narrow && !to_the_host && j < n; j++) narrow[j] = (bf16)p[j];
            if (to_the_host) to_host((char*)there, (const char*)field[i], bytes, stream);
            else to_device((char*)field[i], (const char*)there, bytes, stream);
            cudaCheck(cudaStreamSynchronize(stream));
            for (size_t j = 0; narrow && to_the_host && j < n; j++) p[j] = (float)narrow[j];
            free(narrow);
        }
    }
}

// which field of a layer's state is bf16 because of config.state_bf16; -1: none
static int state_bf16_field(const Model* m, int l) {
    for (int i = 0; m->config.state_bf16 && i < m->layer[l].kind->n_state; i++)
        if (m->layer[l].kind->state[i].flags & RECURRENT) return i;
    return -1;
}

// model_forward_cuda: tokens (B,T) to w->f. state: states of `rows` rows on the device, from row0 on, or NULL
// The kernels for any number of tokens work on states in float. With config.state_bf16, where state0 is
// stateT, those of one layer at a time are in run->wide_states.
template <typename X>
void model_forward_cuda(const Model* m, const ModelCuda<X>* d, WorkCuda<X>* w, CudaRun<X>* run,
                        const int* tokens, float* state0, float* stateT, size_t rows, size_t row0) {
    size_t M = run->B * run->T, D = (size_t)m->config.d_model;
    const float* res = w->acts[0].res;
    run->dropout.place = 0;
    const X* delta = NULL;
    embedding_forward_cuda(w->acts[0].res, tokens, d->embedding_x, M, D, run->stream, run->dropout);
    for (int l = 0; l < m->n_layers; l++) {
        float *s0[MAX_FIELDS], *sT[MAX_FIELDS];
        state_fields<X>(s0, m, state0, rows, l, row0);
        state_fields<X>(sT, m, stateT, rows, l, row0);
        const int i = state_bf16_field(m, l);
        bf16* kept = i < 0 ? NULL : (bf16*)s0[i];
        const size_t n = kept ? run->B * spec_count(&m->layer[l].kind->state[i], &m->config) : 0;
        if (kept) s0[i] = sT[i] = run->wide_states;
        cast_cuda(run->wide_states, kept, n, run->stream);
        d->layer[l].kind->forward(run, &d->layer[l], &w->acts[l], &w->scratch, res, delta, s0, sT);
        cast_cuda(kept, run->wide_states, n, run->stream);
        res = w->acts[l].res;
        delta = w->scratch.delta;
        run->dropout.place++;
    }
    residual_rmsnorm_forward_cuda(w->res_last, w->f, w->f_rstd, res, delta, d->norm_f, M, D,
                                  (float)m->config.norm_eps, run->stream, run->dropout);
}

// whether section 4.16 can decode with many sequences
static bool model_decodes_many(const Config* c) {
    return c->d_conv <= 4 && c->d_model <= DECODE_MANY_WIDTH && decode_many_fits((size_t)c->d_inner) &&
           decode_many_fits((size_t)c->d_intermediate) &&
           (!strchr(c->pattern, 'a') || decode_many_fits(heads_of(c).out));
}

// model_decode_cuda: one token of each of run->B sequences, of `rows` from row0 on, to logits (B,Vp), the
// states updated in place. Returns false when the shapes do not fit section 4.10; then nothing was done.
static bool model_decode_cuda(const Model* m, const ModelCuda<bf16>* d, WorkCuda<bf16>* w,
                              CudaRun<bf16>* run, const int* tokens, float* state, size_t rows, size_t row0,
                              float* logits) {
    size_t D = (size_t)m->config.d_model, Vp = (size_t)m->config.vocab_padded;
    bool fits = run->B <= DECODE_ROWS && D % 32 == 0;
    for (int l = 0; l < m->n_layers; l++)
        fits = fits && d->layer[l].kind->decodes && d->layer[l].kind->decodes(&m->config);
    if (!fits) return false;
    float* res[2] = {w->acts[0].res, w->res_last};           // in turn
    const bf16* delta = NULL;
    DecodeStream stream = {w->res_last, w->squares, w->acts[0].u, (const float*)d->layer[0].p[0], 1};
    const bool many = run->B >= DECODE_MANY && model_decodes_many(&m->config);
    if (many) {
        run->many = &stream;
        decode_begin_kernel<<<(unsigned)run->B, 256, 0, run->stream>>>(
            stream.res, stream.act, stream.squares, tokens, d->embedding_x, stream.norm, (int)D);
        cudaCheck(cudaGetLastError());
    } else {
        embedding_forward_cuda(res[0], tokens, d->embedding_x, run->B, D, run->stream, run->dropout);
    }
    for (int l = 0; l < m->n_layers; l++) {
        stream.norm = l + 1 < m->n_layers ? d->layer[l + 1].p[0] : d->norm_f;
        float* fields[MAX_FIELDS];
        state_fields<bf16>(fields, m, state, rows, l, row0);
        d->layer[l].kind->decode(run, &d->layer[l], &w->acts[l], &w->scratch, res[1 - l % 2], res[l % 2],
                                 delta, fields);
        delta = w->scratch.delta;
    }
    float* last = many ? stream.res : res[m->n_layers % 2];
    if (many) delta = NULL;                                  // it has been added
    DecodeLinear head = {};
    head.weight = d->head_x; head.O = Vp; head.out_float = logits; head.ldo = Vp;
    decode_norm_linear(run, head, w->f, w->f_rstd, many ? last : res[1 - m->n_layers % 2], last, delta,
                       d->norm_f);
    return true;
}
static bool model_decode_cuda(const Model*, const ModelCuda<float>*, WorkCuda<float>*, CudaRun<float>*,
                              const int*, float*, size_t, size_t, float*) {
    return false;
}

// argmax: best = the index of the largest of n logits of each row, the first of equals, -1 when one is NaN
// or +infinity (an exploded model); token = the same for the next step to read, 0 instead of -1. One block
// per row. best is memory of the host: a copy after the kernel would take as long as the kernel.
__global__ void __launch_bounds__(1024)
argmax_kernel(int* best_token, int* token, const float* logits, size_t ld, int n) {
    __shared__ float best_of[WARP];
    __shared__ int index_of[WARP];
    const int AT_ONCE = 16;
    const float* row = logits + blockIdx.x * ld;
    float best = -INFINITY;
    int index = INT_MAX;
    bool bad = false;
    wait_before();
    for (int first = threadIdx.x; first < n; first += AT_ONCE * 1024) {
        float z[AT_ONCE];
        #pragma unroll
        for (int i = 0; i < AT_ONCE; i++) z[i] = first + i * 1024 < n ? row[first + i * 1024] : -INFINITY;
        #pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            bad = bad || !(z[i] <= 3.4e38f);
            if (z[i] > best) { best = z[i]; index = first + i * 1024; }
        }
    }
    bad = __syncthreads_or(bad);
    for (int pass = 0; pass < 2; pass++) {                   // the lanes of a warp, then the warps
        #pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) {
            float other = __shfl_xor_sync(0xffffffffu, best, step);
            int other_index = __shfl_xor_sync(0xffffffffu, index, step);
            if (other > best || (other == best && other_index < index)) { best = other; index = other_index; }
        }
        if (pass == 1) break;
        if (threadIdx.x % WARP == 0) {
            best_of[threadIdx.x / WARP] = best;
            index_of[threadIdx.x / WARP] = index;
        }
        __syncthreads();
        best = best_of[threadIdx.x % WARP];
        index = index_of[threadIdx.x % WARP];
    }
    if (threadIdx.x > 0) return;
    bad = bad || index == INT_MAX;
    best_token[blockIdx.x] = bad ? -1 : index;
    token[blockIdx.x] = bad ? 0 : index;
}

// is_best_kernel: each target becomes 1 when none of the V logits of its row is larger than its own, else 0.
// One block per row.
template <typename X>
__global__ void __launch_bounds__(256) is_best_kernel(int* target, const X* logits, size_t V) {
    const X* row = logits + blockIdx.x * V;
    int id = target[blockIdx.x];
    bool larger = id < 0;
    for (size_t v = threadIdx.x; id >= 0 && v < V; v += 256)
        larger = larger || !(to_float(row[v]) <= to_float(row[id]));
    larger = __syncthreads_or(larger);               // also: every thread has read the target
    if (threadIdx.x == 0) target[blockIdx.x] = !larger;
}

// model_loss_cuda: losses of `targets` into w->losses; with backward also w->df and the head's gradient,
// scaled by *scale. best: NULL or `targets`, which then become 0 or 1, see is_best_kernel
template <typename X>
void model_loss_cuda(const Model* m, const ModelCuda<X>* d, WorkCuda<X>* w, const CudaRun<X>* run,
                     const int* targets, const float* scale, bool backward, int* best = NULL) {
    size_t M = run->B * run->T, D = (size_t)m->config.d_model, Vp = (size_t)m->config.vocab_padded;
    for (size_t m0 = 0; m0 < M; m0 += CLASSIFIER_ROWS_CUDA) {
        size_t n = min_size(CLASSIFIER_ROWS_CUDA, M - m0);
        matmul_forward_cuda(run->matmul, w->logits, Vp, w->f + m0 * D, D, d->head_x, (const float*)NULL, n, D,
                            Vp, run->stream);
        crossentropy_cuda(w->losses + m0, backward ? w->logits : (X*)NULL, w->logits, targets + m0, scale, n,
                          Vp, run->stream);
        if (best) is_best_kernel<<<(unsigned)n, 256, 0, run->stream>>>(best + m0, w->logits, Vp);
        if (backward)
            matmul_backward_cuda(run->matmul, w->df + m0 * D, D, false, d->dhead, (float*)NULL, w->logits, Vp,
                                 w->f + m0 * D, D, d->head_x, (float*)NULL, n, D, Vp, run->stream,
                                 run->add || m0 > 0);
    }
}

// model_backward_cuda: from w->df to every gradient (+=). With --recompute on each layer runs forward again
// just before.
template <typename X>
void model_backward_cuda(const Model* m, const ModelCuda<X>* d, WorkCuda<X>* w, CudaRun<X>* run,
                         const int* tokens, float* state0) {
    size_t M = run->B * run->T, D = (size_t)m->config.d_model;
    ScratchCuda<X>* s = &w->scratch;
    SumsCuda sums = {{}, s->sums};
    run->sums = &sums;
    side_fork(run);
    cudaCheck(cudaMemsetAsync(s->dres, 0, M * D * sizeof(float), run->stream));
    run->dropout.place = (uint64_t)m->n_layers;
    rmsnorm_backward_cuda(s->dres, s->dres_x, (X*)NULL, d->dnorm_f, w->df, w->res_last, d->norm_f, w->f_rstd,
                          sums_take(run, rmsnorm_backward_scratch_cuda(M, D)), M, D, run->stream,
                          run->dropout, &sums.list);
    sums_finish(run, s);
    for (int l = m->n_layers - 1; l >= 0; l--) {
        float *s0[MAX_FIELDS], *none[MAX_FIELDS] = {NULL};
        state_fields<X>(s0, m, state0, run->B, l, 0);
        run->dropout.place = (uint64_t)l;
        const LayerCuda<X>* L = &d->layer[l];
        if (w->recompute == RECOMPUTE_ALL) {   // res of this layer is saved: no addition this time
            side_join(run);
            L->kind->forward(run, L, &w->acts[l], s, w->acts[l].res, (const X*)NULL, s0, none);
        }
        L->kind->backward(run, L, &w->acts[l], s, s0);
    }
    embedding_backward_cuda(d->dembedding, s->dres, tokens, s->sort, M, D, (size_t)m->config.vocab_padded,
                            run->stream);
    side_join(run);
}

// ------------------------------------------------------------------------------------------------
// 6.1 The small kernels of a step

// loss_sum: *sum += the sum of the losses, in double; `first`: *sum = it.   One block, a fixed order
__global__ void __launch_bounds__(1024)
    loss_sum_kernel(double* sum, const float* losses, size_t M, bool first) {
    double acc = 0;
    for (size_t i = threadIdx.x; i < M; i += 1024) acc += (double)losses[i];
    acc = block_sum_double(acc);
    if (threadIdx.x == 0) *sum = first ? acc : *sum + acc;
}

// StepOutput: what the device tells of a step
typedef struct {
    double loss, norm;       // sum of the losses; norm of the gradient, before clipping
    int taken;               // the update took place
    int halted;              // some step was not taken; until the host clears this no other is
} StepOutput;

// step_judge: a step is taken when its loss and the norm of its gradient are finite and none before it
// failed. Otherwise *norm becomes NaN, with which adamw and state_commit do nothing.
__global__ void step_judge_kernel(StepOutput* out, double* norm) {
    out->norm = *norm;
    out->taken = !out->halted && isfinite(out->loss) && isfinite(*norm);
    if (out->taken) return;
    out->halted = 1;
    *norm = NAN;
}

// Carried states of one micro-batch: for every layer and field (rows, count) words.
typedef struct { size_t offset, count; } StateField;

// state_fresh: clears the rows that start anew.   grid (fields, rows)
__global__ void state_fresh_kernel(float* state, const StateField* field, const bool* fresh) {
    if (!fresh[blockIdx.y]) return;
    StateField f = field[blockIdx.x];
    float* row = state + f.offset + blockIdx.y * f.count;
    for (size_t i = threadIdx.x; i < f.count; i += blockDim.x) row[i] = 0;
}

// state_commit: the states after the step become those before the next one
__global__ void state_commit_kernel(float* in, const float* out, size_t n, const double* norm) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && isfinite(*norm)) in[i] = out[i];
}

// ---------------------------------------------------------------------------------------------------
// 9. Backend

// One step of training is always the same list of about 500 launches; only numbers in memory change. So the
// list is recorded once as a CUDA graph, and every step is one call that starts it. The host sends the batch
// and its numbers in one copy, and asks for the loss of a step only after it has sent the next.

// SlotCuda: the host's side of one step under way, in pinned memory
typedef struct {
    BatchCuda batch;
    StepOutput* out;
    size_t accum, B, T, n_targets;
    bool has_doc;
    Dropout dropout;
    cudaEvent_t done;
} SlotCuda;

template <typename X> struct CudaBackend {
    ModelCuda<X> model;
    WorkCuda<X> work;
    Matmul matmul;
    cudaStream_t stream;
    SideCuda side;                     // when training
    // carried states of `micros` micro-batches, n_state words each
    float *carry_in, *carry_out;
    size_t micros, n_state;
    StateField* field;
    int n_fields;
    // the step
    StepOutput* out;
    SlotCuda slot[MAX_QUEUE];
    cudaGraphExec_t graph;
    int64_t begun, ended;
};

template <typename X> struct CudaSession {
    WorkCuda<X> work;
    float *state, *logits;
    size_t state_words;
    float* wide_states;                // (wide_states_count): see model_forward_cuda
    size_t wide_states_count;
    int* host_tokens;                  // pinned
    float* host_logits;
    int64_t decoded[2];                // calls with one token for all rows: for logits; for the next tokens
    cudaGraphExec_t graph[2];          // of such calls
};

template <typename X> static CudaBackend<X>* cuda_of(Backend* b) { return (CudaBackend<X>*)b->device; }

template <typename X>
static CudaRun<X> run_of(Backend* b, int micro, const int* doc, size_t B, size_t T, int recompute) {
    CudaBackend<X>* c = cuda_of<X>(b);
    Dropout drop = dropout_of(b, micro, B, T);
    const StepCuda* step = c->work.batch.step;
    CudaRun<X> run = {&b->model->config, &c->matmul, B, T, doc, c->stream, recompute,
                      dropout_cuda(&drop, step ? &step->dropout_key : NULL, (size_t)b->model->config.d_model),
                      true, &c->side, NULL, NULL, NULL};
    return run;
}

// graph_record: what `launch` puts into the stream becomes a graph instead of running
template <typename Launch> static cudaGraphExec_t graph_record(cudaStream_t stream, Launch launch) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaCheck(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    launch();
    cudaCheck(cudaStreamEndCapture(stream, &graph));
    cudaCheck(cudaGraphInstantiate(&exec, graph, 0));
    cudaCheck(cudaGraphDestroy(graph));
    return exec;
}

// carry_reserve: memory for the carried states of `micros` micro-batches of B rows
template <typename X> static void carry_reserve(Backend* b, size_t micros, size_t B) {
    CudaBackend<X>* c = cuda_of<X>(b);
    const Model* m = b->model;
    size_t n_state = state_begin<X>(m, B, m->n_layers);
    if (c->micros >= micros && c->n_state == n_state) return;
    cudaCheck(cudaFree(c->carry_in));
    cudaCheck(cudaFree(c->carry_out));
    cudaCheck(cudaFree(c->field));
    c->micros = micros;
    c->n_state = n_state;
    c->carry_in = (float*)device_calloc(micros * n_state, sizeof(float));
    c->carry_out = (float*)device_calloc(micros * n_state, sizeof(float));
    StateField* field = (StateField*)xcalloc((size_t)m->n_layers * MAX_FIELDS, sizeof(StateField));
    c->n_fields = 0;
    for (int l = 0; l < m->n_layers; l++) {
        float* fields[MAX_FIELDS];
        state_fields<X>(fields, m, c->carry_in, B, l, 0);
        for (int i = 0; i < m->layer[l].kind->n_state; i++) {
            StateField f = {(size_t)(fields[i] - c->carry_in), state_row<X>(m, l, i) / 4};
            field[c->n_fields++] = f;
        }
    }
    c->field = device_copy(field, (size_t)c->n_fields);
    free(field);
}

// --- one call at a time: evaluation, checks, and the parts of a step that failed

template <typename X>
static double cuda_forward(Backend* b, int micro, const int* tokens, const int* targets, const int* doc,
                           size_t B, size_t T, double scale) {
    CudaBackend<X>* c = cuda_of<X>(b);
    WorkCuda<X>* w = &c->work;
    const BatchCuda* batch = &w->batch;
    size_t M = B * T;
    float scale_float = (float)scale;
    float *s0 = NULL, *sT = NULL;
    if (b->carry_in && micro >= 0) {
        carry_reserve<X>(b, (size_t)micro + 1, B);
        s0 = c->carry_in + (size_t)micro * c->n_state;
        sT = c->carry_out + (size_t)micro * c->n_state;
        state_copy_cuda<X>(b->model, s0, &b->carry_in[micro], false, c->stream);
    }
    to_device(batch->tokens, tokens, M, c->stream);
    to_device(batch->targets, targets, M, c->stream);
    to_device(&batch->step->scale, &scale_float, 1, c->stream);
    to_device(&batch->step->dropout_key, &b->dropout.key, 1, c->stream);
    if (doc) to_device(batch->doc, doc, M, c->stream);
    CudaRun<X> run = run_of<X>(b, micro, doc ? batch->doc : NULL, B, T, w->recompute);
    model_forward_cuda(b->model, &c->model, w, &run, batch->tokens, s0, sT, B, 0);
    model_loss_cuda(b->model, &c->model, w, &run, batch->targets, &batch->step->scale, scale > 0,
                    b->token_best ? batch->targets : (int*)NULL);
    if (b->token_loss) to_host(b->token_loss, w->losses, M, c->stream);
    if (b->token_best) to_host(b->token_best, batch->targets, M, c->stream);
    loss_sum_kernel<<<1, 1024, 0, c->stream>>>(&c->out->loss, w->losses, M, true);
    cudaCheck(cudaGetLastError());
    double sum;
    to_host(&sum, &c->out->loss, 1, c->stream);
    if (sT) state_copy_cuda<X>(b->model, sT, &b->carry_out[micro], true, c->stream);
    cudaCheck(cudaStreamSynchronize(c->stream));
    return sum;
}

template <typename X>
static void cuda_backward(Backend* b, int micro, const int* tokens, const int* doc, size_t B, size_t T) {
    CudaBackend<X>* c = cuda_of<X>(b);
    WorkCuda<X>* w = &c->work;
    (void)tokens;       // still on the device from forward, like the document ids and the carried states
    bool carried = b->carry_in && micro >= 0;
    CudaRun<X> run = run_of<X>(b, micro, doc ? w->batch.doc : NULL, B, T, w->recompute);
    model_backward_cuda(b->model, &c->model, w, &run, w->batch.tokens,
                        carried ? c->carry_in + (size_t)micro * c->n_state : NULL);
}

template <typename X> static void cuda_zero_gradients(Backend* b) {
    CudaBackend<X>* c = cuda_of<X>(b);
    cudaCheck(cudaMemsetAsync(c->model.grads, 0, b->model->n_elements * sizeof(float), c->stream));
}

// norm_launch: the norm of all gradients, those of frozen tensors set to zero
template <typename X> static void norm_launch(CudaBackend<X>* c, const Model* m) {
    ModelCuda<X>* d = &c->model;
    if (d->n_frozen) clear_pieces_kernel<<<(unsigned)d->n_frozen, 256, 0, c->stream>>>(d->grads, d->frozen);
    cudaCheck(cudaGetLastError());
    gradient_norm_cuda(d->norm, d->grads, m->n_elements, d->norm_parts, c->stream);
}

template <typename X> static double cuda_gradient_norm(Backend* b) {
    CudaBackend<X>* c = cuda_of<X>(b);
    double norm;
    norm_launch(c, b->model);
    to_host(&norm, c->model.norm, 1, c->stream);
    cudaCheck(cudaStreamSynchronize(c->stream));
    b->norm = norm;
    return norm;
}

template <typename X> static void adamw_launch(CudaBackend<X>* c) {
    ModelCuda<X>* d = &c->model;
    X* copy = (void*)d->params_x == (void*)d->params ? NULL : d->params_x;
    adamw_cuda(d->params, copy, d->grads, d->m, d->v, d->piece, &c->work.batch.step->adamw, d->norm,
               d->n_pieces, c->stream);
}

template <typename X>
static void cuda_update(Backend* b, const AdamW* opt, double lr, double scale, int64_t step) {
    CudaBackend<X>* c = cuda_of<X>(b);
    AdamWStep s = adamw_step_cuda(opt, lr, scale < 1 ? scale * (b->norm + 1e-6) : 0, step);
    to_device(&c->work.batch.step->adamw, &s, 1, c->stream);
    adamw_launch(c);
}

// --- whole steps

// step_launch: everything that the device does in one step, from the batch on
template <typename X> static void step_launch(Backend* b, const SlotCuda* s) {
    CudaBackend<X>* c = cuda_of<X>(b);
    WorkCuda<X>* w = &c->work;
    ModelCuda<X>* d = &c->model;
    const BatchCuda* batch = &w->batch;
    size_t M = s->B * s->T;
    clear_pieces_kernel<<<(unsigned)d->n_clear, 256, 0, c->stream>>>(d->grads, d->clear);
    cudaCheck(cudaGetLastError());
    for (size_t micro = 0; micro < s->accum; micro++) {
        float *s0 = NULL, *sT = NULL;
        if (b->carry_in) {
            s0 = c->carry_in + micro * c->n_state;
            sT = c->carry_out + micro * c->n_state;
            state_fresh_kernel<<<dim3((unsigned)c->n_fields, (unsigned)s->B), 256, 0, c->stream>>>(
                s0, c->field, batch->fresh + micro * s->B);
            cudaCheck(cudaGetLastError());
        }
        const int* tokens = batch->tokens + micro * M;
        CudaRun<X> run =
            run_of<X>(b, (int)micro, s->has_doc ? batch->doc + micro * M : NULL, s->B, s->T, w->recompute);
        run.add = micro > 0;
        model_forward_cuda(b->model, d, w, &run, tokens, s0, sT, s->B, 0);
        model_loss_cuda(b->model, d, w, &run, batch->targets + micro * M, &batch->step->scale, true);
        loss_sum_kernel<<<1, 1024, 0, c->stream>>>(&c->out->loss, w->losses, M, micro == 0);
        cudaCheck(cudaGetLastError());
        model_backward_cuda(b->model, d, w, &run, tokens, s0);
    }
    norm_launch(c, b->model);
    step_judge_kernel<<<1, 1, 0, c->stream>>>(c->out, d->norm);
    cudaCheck(cudaGetLastError());
    adamw_launch(c);
    if (!b->carry_in) return;
    size_t n = s->accum * c->n_state;
    state_commit_kernel<<<(unsigned)((n + 255) / 256), 256, 0, c->stream>>>(c->carry_in, c->carry_out, n,
                                                                            d->norm);
    cudaCheck(cudaGetLastError());
}

// The first step is launched piece by piece, so that everything that is set up at first use is; the second is
// recorded.
template <typename X> static void cuda_step_begin(Backend* b, const Step* s) {
    CudaBackend<X>* c = cuda_of<X>(b);
    SlotCuda* slot = &c->slot[c->begun % MAX_QUEUE];
    size_t n = s->accum * s->B * s->T;
    assert(c->begun - c->ended < MAX_QUEUE && s->accum == c->work.micros &&
           s->B * s->T <= c->work.B * c->work.T);
    slot->accum = s->accum;
    slot->B = s->B;
    slot->T = s->T;
    slot->n_targets = s->n_targets;
    slot->has_doc = s->doc != NULL;
    slot->batch.step->adamw = adamw_step_cuda(&s->opt, s->lr, s->clip, s->number);
    slot->dropout = s->dropout;
    b->dropout = s->dropout;
    slot->batch.step->dropout_key = s->dropout.key;
    slot->batch.step->scale = s->n_targets ? (float)(1.0 / (double)s->n_targets) : 0.0f;
    memcpy(slot->batch.tokens, s->inputs, n * sizeof(int));
    memcpy(slot->batch.targets, s->targets, n * sizeof(int));
    if (s->doc) memcpy(slot->batch.doc, s->doc, n * sizeof(int));
    if (b->carry_in) memcpy(slot->batch.fresh, s->fresh, s->accum * s->B * sizeof(bool));
    to_device(c->work.batch.base, slot->batch.base, slot->batch.bytes, c->stream);
    if (c->begun == 0) {
        step_launch<X>(b, slot);
    } else {
        if (!c->graph) c->graph = graph_record(c->stream, [&] { step_launch<X>(b, slot); });
        cudaCheck(cudaGraphLaunch(c->graph, c->stream));
    }
    to_host(slot->out, c->out, 1, c->stream);
    cudaCheck(cudaEventRecord(slot->done, c->stream));
    c->begun++;
}

template <typename X> static StepResult cuda_step_end(Backend* b) {
    CudaBackend<X>* c = cuda_of<X>(b);
    SlotCuda* s = &c->slot[c->ended++ % MAX_QUEUE];
    cudaCheck(cudaEventSynchronize(s->done));
    StepResult r = {s->out->loss, s->out->norm, s->out->taken != 0, 0};
    if (r.taken) return r;
    // the step once more, without the update: its gradients, and the micro-batch where it goes wrong
    int halted = 0;
    double sum = 0, scale = s->n_targets ? 1.0 / (double)s->n_targets : 0;
    to_device(&c->out->halted, &halted, 1, c->stream);
    Dropout next = b->dropout;
    b->dropout = s->dropout;
    b->download(b);                                                 // the carried states
    cuda_zero_gradients<X>(b);
    for (size_t micro = 0; micro < s->accum; micro++) {
        size_t at = micro * s->B * s->T;
        const int* doc = s->has_doc ? s->batch.doc + at : NULL;
        sum += cuda_forward<X>(b, (int)micro, s->batch.tokens + at, s->batch.targets + at, doc, s->B, s->T,
                               scale);
        if (!isfinite(sum)) {
            r.micro = (int)micro;
            break;
        }
        cuda_backward<X>(b, (int)micro, s->batch.tokens + at, doc, s->B, s->T);
    }
    b->download(b);
    b->dropout = next;
    return r;
}

// --- transfers

// upload, download: parameters, when training moments and carried states (and on the way back gradients, for
// diagnosis)
template <typename X> static void cuda_upload(Backend* b) {
    CudaBackend<X>* c = cuda_of<X>(b);
    const Model* m = b->model;
    to_device(c->model.params, m->params, m->n_elements, c->stream);
    if (c->model.m) to_device(c->model.m, m->m, m->n_elements, c->stream);
    if (c->model.v) to_device(c->model.v, m->v, m->n_elements, c->stream);
    if ((void*)c->model.params_x != (void*)c->model.params)
        cast_cuda(c->model.params_x, c->model.params, m->n_elements, c->stream);
    for (size_t i = 0; b->carry_in && i < c->micros; i++)
        state_copy_cuda<X>(m, c->carry_in + i * c->n_state, &b->carry_in[i], false, c->stream);
    cudaCheck(cudaStreamSynchronize(c->stream));
}

template <typename X> static void cuda_download(Backend* b) {
    CudaBackend<X>* c = cuda_of<X>(b);
    Model* m = b->model;
    float *host[] = {m->params, m->grads, m->m, m->v},
          *device[] = {c->model.params, c->model.grads, c->model.m, c->model.v};
    for (int i = 0; i < 4; i++)
        if (host[i] && device[i]) to_host(host[i], device[i], m->n_elements, c->stream);
    for (size_t i = 0; b->carry_in && c->begun > 0 && i < c->micros; i++)
        state_copy_cuda<X>(m, c->carry_in + i * c->n_state, &b->carry_in[i], true, c->stream);
    cudaCheck(cudaStreamSynchronize(c->stream));
}

// --- generation

template <typename X> static void cuda_session_open(Backend* b, Session* s) {
    CudaSession<X>* d = (CudaSession<X>*)xcalloc(1, sizeof(CudaSession<X>));
    size_t tokens = s->chunk > s->rows ? s->chunk : s->rows, Vp = (size_t)b->model->config.vocab_padded;
    grid_check(s->rows, 1);
    d->work = work_create<X>(b->model, 1, tokens, 1, false, RECOMPUTE_NONE);
    d->state_words = state_begin<X>(b->model, s->rows, b->model->n_layers);
    d->state = (float*)device_calloc(d->state_words, sizeof(float));
    s->state_bytes = d->state_words * sizeof(float);
    d->logits = (float*)device_calloc(s->rows * Vp, sizeof(float));
    d->host_tokens = (int*)host_pinned(tokens * sizeof(int));
    d->host_logits = (float*)host_pinned(s->rows * Vp * sizeof(float));
    s->device = d;
}

// wide_reserve: room for the states of one layer of `rows` rows. A prompt is read in one row, so that this is
// little, unless single tokens need the kernels for any number, too.
template <typename X> static void wide_reserve(const Model* m, CudaSession<X>* d, size_t rows) {
    size_t n = 0;
    for (int l = 0; l < m->n_layers; l++) {
        const int i = state_bf16_field(m, l);
        if (i >= 0) n = max_size(n, rows * spec_count(&m->layer[l].kind->state[i], &m->config));
    }
    if (d->wide_states_count >= n) return;
    cudaCheck(cudaFree(d->wide_states));
    device_bytes -= d->wide_states_count * sizeof(float);
    d->wide_states = (float*)device_calloc(n, sizeof(float));
    d->wide_states_count = n;
}

template <typename X> static void cuda_session_close(Backend* b, Session* s) {
    CudaSession<X>* d = (CudaSession<X>*)s->device;
    cudaCheck(cudaStreamSynchronize(cuda_of<X>(b)->stream));
    work_free(&d->work);
    const size_t n_logits = s->rows * (size_t)b->model->config.vocab_padded;
    device_bytes -= (d->state_words + d->wide_states_count + n_logits) * sizeof(float);
    cudaCheck(cudaFree(d->state));
    cudaCheck(cudaFree(d->wide_states));
    cudaCheck(cudaFree(d->logits));
    cudaCheck(cudaFreeHost(d->host_tokens));
    cudaCheck(cudaFreeHost(d->host_logits));
    for (int i = 0; i < 2; i++)
        if (d->graph[i]) cudaCheck(cudaGraphExecDestroy(d->graph[i]));
    free(d);
}

template <typename X> static void cuda_session_sync(Backend* b, Session* s, bool to_the_host) {
    CudaBackend<X>* c = cuda_of<X>(b);
    CudaSession<X>* d = (CudaSession<X>*)s->device;
    state_copy_cuda<X>(b->model, d->state, &s->state, to_the_host, c->stream);
}

// decode_launch: the T tokens in work.batch of `rows` sequences from row0 on, then with `logits` those after
// the last token; they stay in d->logits
template <typename X>
static void decode_launch(Backend* b, Session* s, size_t row0, size_t rows, size_t T, bool logits) {
    CudaBackend<X>* c = cuda_of<X>(b);
    CudaSession<X>* d = (CudaSession<X>*)s->device;
    WorkCuda<X>* w = &d->work;
    size_t D = (size_t)b->model->config.d_model, Vp = (size_t)b->model->config.vocab_padded;
    bool decoded = T == 1 && logits;         // by section 4.10, DECODE_ROWS sequences at a time
    for (size_t r = 0; decoded && r < rows; r += DECODE_ROWS) {
        CudaRun<X> run = run_of<X>(b, -1, NULL, min_size(DECODE_ROWS, rows - r), 1, RECOMPUTE_NONE);
        decoded = model_decode_cuda(b->model, &c->model, w, &run, w->batch.tokens + r, d->state, s->rows,
                                    row0 + r, d->logits + r * Vp);
    }
    if (decoded) return;
    CudaRun<X> run = run_of<X>(b, -1, NULL, rows, T, RECOMPUTE_NONE);
    wide_reserve(b->model, d, rows);
    run.wide_states = d->wide_states;
    model_forward_cuda(b->model, &c->model, w, &run, w->batch.tokens, d->state, d->state, s->rows, row0);
    for (size_t r = 0; logits && r < rows; r += CLASSIFIER_ROWS_CUDA) {
        size_t n = min_size(CLASSIFIER_ROWS_CUDA, rows - r);
        const X* last = w->f + r * D;
        if (T > 1) {          // the last token of each row, side by side
            cudaCheck(cudaMemcpy2DAsync(w->scratch.delta, D * sizeof(X), w->f + (r * T + T - 1) * D,
                                        T * D * sizeof(X), D * sizeof(X), n, cudaMemcpyDeviceToDevice,
                                        c->stream));
            last = w->scratch.delta;
        }
        matmul_forward_cuda(&c->matmul, w->logits, Vp, last, D, c->model.head_x, (const float*)NULL, n, D, Vp,
                            c->stream);
        cast_cuda(d->logits + r * Vp, w->logits, n * Vp, c->stream);
    }
}

// decode_run: starts `launch` with n tokens, NULL: those that argmax left on the device. A token for every
// sequence, the usual case, is recorded as a graph the second time it comes.
template <typename X, typename Launch>
static void decode_run(Backend* b, Session* s, const int* tokens, size_t n, int kind, bool usual,
                       Launch launch) {
    CudaBackend<X>* c = cuda_of<X>(b);
    CudaSession<X>* d = (CudaSession<X>*)s->device;
    if (tokens) {
        memcpy(d->host_tokens, tokens, n * sizeof(int));
        to_device(d->work.batch.tokens, d->host_tokens, n, c->stream);
    }
    if (!usual || d->decoded[kind]++ == 0) {
        launch();
    } else {
        if (!d->graph[kind]) d->graph[kind] = graph_record(c->stream, launch);
        cudaCheck(cudaGraphLaunch(d->graph[kind], c->stream));
    }
}

template <typename X>
static void cuda_decode(Backend* b, Session* s, size_t row0, size_t rows, const int* tokens, size_t T,
                        real* logits) {
    CudaSession<X>* d = (CudaSession<X>*)s->device;
    cudaStream_t stream = cuda_of<X>(b)->stream;
    size_t n = rows * (size_t)b->model->config.vocab_padded;
    decode_run<X>(b, s, tokens, rows * T, 0, T == 1 && rows == s->rows && logits, [&] {
        decode_launch<X>(b, s, row0, rows, T, logits != NULL);
        if (logits) to_host(d->host_logits, d->logits, n, stream);
    });
    cudaCheck(cudaStreamSynchronize(stream));
    if (logits) memcpy(logits, d->host_logits, n * sizeof(float));
}

template <typename X> static void cuda_greedy_begin(Backend* b, Session* s, const int* tokens) {
    CudaSession<X>* d = (CudaSession<X>*)s->device;
    decode_run<X>(b, s, tokens, s->rows, 1, true, [&] {
        cudaStream_t stream = cuda_of<X>(b)->stream;
        decode_launch<X>(b, s, 0, s->rows, 1, true);
        launch_early(argmax_kernel, dim3((unsigned)s->rows), 1024, 0, stream, d->host_tokens,
                     d->work.batch.tokens, d->logits, (size_t)b->model->config.vocab_padded,
                     (int)b->model->config.vocab_size);
    });
}

template <typename X> static void cuda_greedy_end(Backend* b, Session* s, int* next) {
    cudaCheck(cudaStreamSynchronize(cuda_of<X>(b)->stream));
    memcpy(next, ((CudaSession<X>*)s->device)->host_tokens, s->rows * sizeof(int));
}

// --- beginning and end

template <typename X> static void cuda_destroy(Backend* b) {
    CudaBackend<X>* c = cuda_of<X>(b);
    cudaCheck(cudaStreamSynchronize(c->stream));
    for (int i = 0; i < MAX_QUEUE; i++) {
        if (!c->slot[i].out) continue;
        cudaCheck(cudaFreeHost(c->slot[i].batch.base));
        cudaCheck(cudaFreeHost(c->slot[i].out));
        cudaCheck(cudaEventDestroy(c->slot[i].done));
    }
    if (c->graph) cudaCheck(cudaGraphExecDestroy(c->graph));
    if (c->work.memory) work_free(&c->work);
    model_cuda_free(&c->model);
    if (c->side.stream) {
        cudaCheck(cudaStreamDestroy(c->side.stream));
        cudaCheck(cudaEventDestroy(c->side.ready));
        cudaCheck(cudaEventDestroy(c->side.done));
        cudaCheck(cudaFree(c->side.matmul.workspace));
        free(c->side.matmul.plan);
    }
    void* memory[] = {c->matmul.workspace, c->carry_in, c->carry_out, c->field, c->out};
    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) cudaCheck(cudaFree(memory[i]));
    cublasCheck(cublasLtDestroy(c->matmul.handle));
    free(c->matmul.plan);
    cudaCheck(cudaStreamDestroy(c->stream));
    free(c);
    device_bytes = 0;
    workspace_free(&b->work);
    state_free(&b->none);
}

// memory_print: what the device's memory is used for; the rows add up to what was allocated
template <typename X> static void memory_print(Backend* b) {
    const CudaBackend<X>* c = cuda_of<X>(b);
    const Model* m = b->model;
    const WorkCuda<X>* w = &c->work;
    size_t n = m->n_elements * sizeof(float), available, total,
           carried = 2 * c->micros * c->n_state * sizeof(float);
    struct { const char* what; size_t bytes; } row[] = {
        {"parameters, fp32", n},
        {"parameters, bf16 copy", sizeof(X) == 2 ? m->n_elements * sizeof(X) : 0},
        {"gradients, fp32", n},
        {"AdamW moments, fp32", 2 * n},
        {"activations kept for backward", w->saved_bytes},
        {"logits and scratch", w->bytes - w->saved_bytes - w->batch.bytes},
        {"batches", w->batch.bytes},
        {"carried states", carried},
        {"matmul workspaces", 2 * MATMUL_WORKSPACE},
    };
    size_t sum = 0, rows = sizeof row / sizeof row[0];
    for (size_t i = 0; i < rows; i++) sum += row[i].bytes;
    cudaCheck(cudaMemGetInfo(&available, &total));
    printf("memory on the GPU:\n");
    for (size_t i = 0; i < rows; i++)
        if (row[i].bytes) printf("  %-32s %10.1f MiB\n", row[i].what, mib((double)row[i].bytes));
    if (device_bytes > sum)
        printf("  %-32s %10.1f MiB\n", "small tables", mib((double)(device_bytes - sum)));
    printf("  %-32s %10.1f MiB, %.1f MiB of %.1f MiB are left\n", "sum", mib((double)device_bytes),
           mib((double)available), mib((double)total));
    printf("  largest --batch-size that would fit: %zu\n",
           work_largest<X>(m, w->T, w->micros, w->recompute, w->bytes + available));
}

// paths_print: which kernels serve this model, the fast ones or those for any shape
template <typename X> static void paths_print(const Backend* b) {
    const Config* c = &b->model->config;
    bool norm = c->d_model % 4 == 0 && c->d_model <= 4096,
         logits = (size_t)c->vocab_padded * sizeof(X) % 16 == 0;
    printf("kernels: ");
    for (int k = 0; k < N_KINDS_CUDA; k++)
        if (kinds_cuda<X>[k].paths && strchr(c->pattern, kinds_cuda<X>[k].letter)) kinds_cuda<X>[k].paths(c);
    printf("norm %s, classifier %s\n", norm ? "fast" : "general", logits ? "fast" : "general");
}

// device_peak: dense matmuls per second in bf16, from the data sheets; fp32 matmuls are exact, on the
// ordinary units: two operations per lane and clock
static double device_peak(bool bf16_) {
    static const struct { const char* name; double peak; } known[] = {
        {"H200", 989.4e12}, {"H100 PCIe", 756e12}, {"H100", 989.4e12}, {"H800", 989.4e12}, {"A100", 312e12},
        {"A800", 312e12},   {"L40S", 362e12},      {"4090", 165.2e12}, {"3090", 71e12},
    };
    cudaDeviceProp prop;
    int clock;
    cudaCheck(cudaGetDeviceProperties(&prop, 0));
    cudaCheck(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0));
    if (!bf16_)
        return 2.0 * (prop.major == 8 && prop.minor == 0 ? 64 : 128) * prop.multiProcessorCount * clock * 1e3;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (strstr(prop.name, known[i].name)) return known[i].peak;
    return 0;
}

template <typename X>
static Backend backend_cuda_of(Model* m, size_t B, size_t T, bool training, int recompute, size_t micros = 1,
                               bool carry = false) {
    Backend b;
    memset(&b, 0, sizeof b);
    b.name = sizeof(X) == 2 ? "cuda, bf16" : "cuda, fp32";
    b.model = m;
    b.none = state_none(m);
    CudaBackend<X>* c = (CudaBackend<X>*)xcalloc(1, sizeof(CudaBackend<X>));
    b.device = c;
    cudaCheck(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking));
    cublasCheck(cublasLtCreate(&c->matmul.handle));
    c->matmul.workspace = device_calloc(MATMUL_WORKSPACE, 1);
    if (training) {
        cudaCheck(cudaStreamCreateWithFlags(&c->side.stream, cudaStreamNonBlocking));
        cudaCheck(cudaEventCreateWithFlags(&c->side.ready, cudaEventDisableTiming));
        cudaCheck(cudaEventCreateWithFlags(&c->side.done, cudaEventDisableTiming));
        c->side.matmul.handle = c->matmul.handle;
        c->side.matmul.workspace = device_calloc(MATMUL_WORKSPACE, 1);
    }
    c->out = (StepOutput*)device_calloc(1, sizeof(StepOutput));
    c->model = model_cuda_create<X>(m, training);
    if (carry) carry_reserve<X>(&b, micros, B);
    if (B) c->work = work_create<X>(m, B, T, micros, training, recompute);
    for (int i = 0; training && i < MAX_QUEUE; i++) {
        char* base = (char*)host_pinned(c->work.batch.bytes);
        batch_plan(&c->slot[i].batch, micros, B, T, base);
        c->slot[i].out = (StepOutput*)host_pinned(sizeof(StepOutput));
        cudaCheck(cudaEventCreateWithFlags(&c->slot[i].done, cudaEventDisableTiming));
    }
    b.activation_bytes = c->work.bytes;
    b.forward = cuda_forward<X>;
    b.backward = cuda_backward<X>;
    b.zero_gradients = cuda_zero_gradients<X>;
    b.gradient_norm = cuda_gradient_norm<X>;
    b.update = cuda_update<X>;
    b.queue = 1;
    b.peak_flops = device_peak(sizeof(X) == 2);
    b.step_begin = cuda_step_begin<X>;
    b.step_end = cuda_step_end<X>;
    b.decode = cuda_decode<X>;
    b.greedy_begin = cuda_greedy_begin<X>;
    b.greedy_end = cuda_greedy_end<X>;
    b.download = cuda_download<X>;
    b.upload = cuda_upload<X>;
    b.session_open = cuda_session_open<X>;
    b.session_close = cuda_session_close<X>;
    b.session_sync = cuda_session_sync<X>;
    b.destroy = cuda_destroy<X>;
    return b;
}

// backend_cuda: --device cuda, in the precision asked for
template <typename X>
static Backend backend_cuda_from(const Options* o, Model* m, size_t B, size_t T, bool training,
                                 int recompute) {
    size_t micros = training ? (size_t)o->grad_accum : 1;
    Backend b = backend_cuda_of<X>(m, B, T, training, recompute, micros, training && o->carry_state);
    if (training) memory_print<X>(&b);
    if (training) paths_print<X>(&b);
    return b;
}

Backend backend_cuda(const Options* o, Model* m, size_t B, size_t T, bool training, int recompute) {
    device_require();
    return strcmp(o->precision, "fp32") == 0 ? backend_cuda_from<float>(o, m, B, T, training, recompute)
                                             : backend_cuda_from<bf16>(o, m, B, T, training, recompute);
}

// ---------------------------------------------------------------------------------------------------
// 12. Main

#ifndef SSM_NO_CUDA_MAIN
int main(int argc, char** argv) {
    other_backend = backend_cuda;
    return ssm_main(argc, argv);
}
#endif

#endif    // SSM_KERNELS_ONLY
