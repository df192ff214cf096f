// ssm.c on the GPU: the layers of train_mamba.c as fused CUDA kernels, the device model, a CUDA backend.
//
// This file includes train_mamba.c: configuration, tensor table, files, data, training loop, generation,
// command line and the CPU oracle exist once. Sections have the numbers and names of their counterparts
// there.
//   --precision bf16  bf16 activations and matmuls; fp32 parameters (masters), residual stream, scan state,
//                     decay and every reduction
//   --precision fp32  everything in fp32, for exact comparison with the CPU
// Hardware terms: a kernel is a function that runs on the GPU, launched as a grid of blocks; a block is a
// group of threads that share a small fast memory; a warp is 32 threads of a block that step together; a
// stream is a queue of kernels that run one after the other.
//
//  1. Basics: checks, device memory
//  3. Matmul: cuBLASLt
//  4. Layers
//  5. Blocks
//  6. Model
//  7. Optimizer: gradient norm, AdamW
//  9. Backend
// 12. Main

#define SSM_NO_MAIN
// defines: everything that is not a kernel, and the CPU oracle
#include "train_mamba.c"

#include <cublasLt.h>
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
// The algorithm is the first that the heuristic of cuBLASLt proposes. Others win when each matmul is timed
// alone: on one H200 (cuBLASLt 13.1) all matmuls of a step of mamba-130m, 8 x 2048 tokens, take 22.1 ms with
// the first, 21.4 with the fastest of eight proposals, 20.7 with the fastest of 400 algorithms; 17.1 is the
// floor. In the step itself that gain is gone, within 0.3 %: training holds the GPU at the limit of its power
// (690 of 700 W, the clock at 1.7 to 1.8 of 1.98 GHz), and a kernel that is busier lowers the clock. So there
// is nothing to time at the start, and every run makes the same choice. (A choice by time would not have
// changed the bits: only the number of parts into which a sum is split does. All algorithms with the same
// split, hundreds for each shape, agreed in every bit.)

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

// matmul_plan: the description and algorithm for one shape, made at its first use.
static MatmulPlan* matmul_plan(Matmul* mm, const MatmulKey* key) {
    for (int i = 0; i < mm->n_plans; i++)
        if (memcmp(&mm->plan[i].key, key, sizeof *key) == 0) return &mm->plan[i];
    mm->plan = (MatmulPlan*)xrealloc(mm->plan, (size_t)mm->n_plans + 1, sizeof(MatmulPlan));
    MatmulPlan* p = &mm->plan[mm->n_plans++];
    memset(p, 0, sizeof *p);
    p->key = *key;
    cublasLtMatmulHeuristicResult_t result;
    matmul_candidates(mm, p, &result, 1);
    p->algo = result.algo;
    return p;
}

static void matmul_run(const Matmul* mm, const MatmulPlan* p, const cublasLtMatmulAlgo_t* algo, void* c,
                       const void* a, const void* b, float beta, cudaStream_t stream) {
    float one = 1;
    cublasCheck(cublasLtMatmul(mm->handle, p->desc, &one, a, p->a, b, p->b, &beta, c, p->c, c, p->c, algo,
                               mm->workspace, MATMUL_WORKSPACE, stream));
}

// gemm: column-major C (M,N) = op(A) op(B) + beta C
template <typename X, typename C>
static void gemm(Matmul* mm, C* c, size_t ldc, const X* a, size_t lda, bool transpose_a, const X* b,
                 size_t ldb, bool transpose_b, size_t M, size_t N, size_t K, float beta,
                 cudaStream_t stream) {
    MatmulKey key = matmul_key(c, ldc, a, lda, transpose_a, b, ldb, transpose_b, M, N, K);
    const MatmulPlan* p = matmul_plan(mm, &key);
    matmul_run(mm, p, &p->algo, c, a, b, beta, stream);
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
                        cudaStream_t stream);

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

static inline size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

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
    if (groups == 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
    else if (groups == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
    else if (groups == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
    else asm volatile("cp.async.wait_group 0;" ::: "memory");
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

// sum_parts: the second stage of a sum.   out[i] += sum_p parts[p,i],  out2[i] += sum_p parts[p,n+i]
//   parts (P,n+n2), row stride ld   out (n)   out2 (n2)
// A block sums 32 columns, its 32 warps every 32nd part each; then one warp adds the 32 sums in order.
// Between two kernels of a stream lie one or two microseconds, in which the first ends and the second starts.
// From sm_90 on this one uses them (programmatic dependent launch): it starts when the blocks of the kernel
// before have ended or called allow_next, loads `out`, and then waits for the results of that kernel.
enum { SUM_WARPS = 32 };

__device__ __forceinline__ void allow_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__global__ void __launch_bounds__(WARP * SUM_WARPS)
sum_parts_kernel(float* out, float* out2, const float* parts, size_t P, size_t n, size_t n2, size_t ld) {
    __shared__ float sum[SUM_WARPS][WARP];
    size_t i = (size_t)blockIdx.x * WARP + threadIdx.x;
    float acc = 0, *to = i < n ? out + i : out2 + (i - n);
    bool last = threadIdx.y == 0 && i < n + n2;
    float before = last ? *to : 0.0f;
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    #pragma unroll 8
    for (size_t p = threadIdx.y; p < P; p += SUM_WARPS) acc += i < n + n2 ? parts[p * ld + i] : 0.0f;
    sum[threadIdx.y][threadIdx.x] = acc;
    __syncthreads();
    if (!last) return;
    acc = 0;
    #pragma unroll
    for (int w = 0; w < SUM_WARPS; w++) acc += sum[w][threadIdx.x];
    *to = before + acc;
}

void sum_parts_cuda(float* out, float* out2, const float* parts, size_t P, size_t n, size_t n2, size_t ld,
                    cudaStream_t stream) {
    static int compiled = 0;                                 // for this compute capability, times 10
    if (compiled == 0) {
        cudaFuncAttributes kernel;
        cudaCheck(cudaFuncGetAttributes(&kernel, sum_parts_kernel));
        compiled = kernel.ptxVersion;
    }
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)((n + n2 + WARP - 1) / WARP));
    config.blockDim = dim3(WARP, SUM_WARPS);
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = compiled >= 90;                        // compiled for less, it would not wait
    cudaCheck(cudaLaunchKernelEx(&config, sum_parts_kernel, out, out2, parts, P, n, n2, ld));
}

// cast: out = inp in another type, n elements.   bytes: sizeof(Y) + sizeof(X) per element
template <typename Y, typename X> __global__ void cast_kernel(Y* out, const X* inp, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    float v[4];
    if (i + 4 <= n) {
        unpack<4>(v, load_pack<4>(inp + i));
        store_pack<4>(out + i, v);
    } else {
        for (; i < n; i++) out[i] = from_float<Y>(to_float(inp[i]));
    }
}

// out and inp must be aligned to 4 elements (whole arrays are)
template <typename Y, typename X> void cast_cuda(Y* out, const X* inp, size_t n, cudaStream_t stream) {
    if (n == 0) return;
    cast_kernel<<<(unsigned)((n + 1023) / 1024), 256, 0, stream>>>(out, inp, n);
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
    float r = 1.0f / sqrtf(group_sum<WARPS>(sum, shared, 0) / (float)D_ + eps);
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
    float r = 1.0f / sqrtf(group_sum<8>(sum, shared, 0) / (float)D + eps);
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
                                  size_t M, size_t D, cudaStream_t stream, DropoutCuda drop = DropoutCuda()) {
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
    sum_parts_cuda(dweight, NULL, scratch, blocks, D, 0, D, stream);
    return name;
}

// --------------------------------------------------------------------------------------------------
// 4.4 Causal convolution with SiLU

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

template <int W, int TAPS, typename X>
__device__ __forceinline__ void conv_forward_token(X* out, const ConvWindow<W, TAPS>& win) {
    float c[W];
    conv_sum(c, win);
    #pragma unroll
    for (int j = 0; j < W; j++) c[j] = silu_cuda(c[j]);
    conv_store<W>(out, c);
}

// causal_conv1d_forward:   c_t[e] = bias[e] + sum_k weight[e,k] * inp_{t-K+1+k}[e]      out = silu(c)
//   inp (B,T,E), row stride ldi   weight (E,K)   bias (E) or NULL   tail0 (B,K-1,E) float or NULL
//   out (B,T,E)
//   a tap sees nothing where the document differs from that of t; saved for backward: nothing
// bytes: 2 sizeof(X) per element
template <typename X, int W, int TAPS>
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
                conv_forward_token<W>(out + j * E, win);
                conv_shift(win.x);
            }
        } else {
            #pragma unroll 1
            for (int j = 0; j < TAPS && i + j < own; j++) {
                if (bits >> j & 1) conv_clear(win.x);
                conv_unpack(win.x[TAPS - 1], ring[slot], j);
                if (i >= 0) conv_forward_token<W>(out + j * E, win);
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
                                       const float* weight, const float* bias, const int* doc, size_t B,
                                       size_t T, size_t E, size_t K, cudaStream_t stream) {
    const int W = 8 / sizeof(X), steps = conv_steps(B, T, E, CONV_FORWARD_STEPS);
    bool fast = K == 4 && is_aligned(inp, 8, ldi * sizeof(X)) && is_aligned(out, 8, E * sizeof(X)) &&
                is_aligned(weight, 16, 16);
    dim3 grid = conv_grid(B, T, E, steps, fast ? W : 1), block(WARP, CONV_ROWS);
    if (fast)
        causal_conv1d_forward_kernel<X, W, 4><<<grid, block, 0, stream>>>(out, inp, ldi, tail0, weight, bias,
                                                                          doc, (int)T, E, 4, steps);
    else
        causal_conv1d_forward_kernel<X, 1, 8><<<grid, block, 0, stream>>>(out, inp, ldi, tail0, weight, bias,
                                                                          doc, (int)T, E, (int)K, steps);
    cudaCheck(cudaGetLastError());
    if (tailT && K > 1) {
        causal_conv1d_tail_kernel<<<(unsigned)((B * E + 255) / 256), 256, 0, stream>>>(tailT, inp, ldi, tail0,
                                                                                       doc, B, T, E, (int)K);
        cudaCheck(cudaGetLastError());
    }
    return fast ? "causal_conv1d_forward_kernel<4>" : "causal_conv1d_forward_kernel<8>";
}

// The backward walks the same way; c is computed again.
//   forward: out = silu(c)                         =>  dc = dout * silu'(c)
//   forward: c_t = bias + sum_k w_k inp_{t-K+1+k}  =>  dbias += sum_t dc_t,  dw_k += sum_t dc_t inp_{t-K+1+k}
//                                                      dinp_s = sum_k w_k dc_{s+K-1-k}
//   forward: tailT = the last inputs               =>  the same rows of dinp (or dtail0) += dtailT
// dinp of the last TAPS tokens is under way in registers; the oldest is complete after each token. So the
// rows of a thread are TAPS-1 behind its tokens. It begins TAPS tokens before its run, for dinp only: their
// weight gradients belong to another thread.
template <int W, int TAPS> struct ConvGradient { float dinp[TAPS][W], dw[TAPS][W], db[W]; };

// the newest token of the window, whose dout is in d; OWN: with its weight gradient
template <bool OWN, int W, int TAPS>
__device__ __forceinline__ void conv_backward_token(ConvGradient<W, TAPS>& grad,
                                                    const ConvWindow<W, TAPS>& win, float* d) {
    float c[W];
    conv_sum(c, win);
    #pragma unroll
    for (int j = 0; j < W; j++) {
        d[j] *= silu_grad_cuda(c[j], sigmoid_cuda(c[j]));
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
template <bool OWN, typename X, int W, int TAPS>
__device__ __forceinline__ void conv_backward_group(X* dinp, size_t lddi, ConvGradient<W, TAPS>& grad,
                                                    ConvWindow<W, TAPS>& win,
                                                    const ConvGroup<X, W, TAPS>& inp,
                                                    const ConvGroup<X, W, TAPS>& dout) {
    #pragma unroll
    for (int j = 0; j < TAPS; j++) {
        float d[W];
        conv_unpack(win.x[TAPS - 1], inp, j);
        conv_unpack(d, dout, j);
        conv_backward_token<OWN>(grad, win, d);
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
template <typename X, int W, int TAPS>
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
    allow_next();
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
                conv_backward_group<true>(dinp, lddi, grad, win, x, d);
            } else if (bits == 0 && i == -TAPS) {
                conv_backward_group<false>(dinp, lddi, grad, win, x, d);
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
                        if (t >= 0) conv_backward_token<true>(grad, win, d_t);
                        else conv_backward_token<false>(grad, win, d_t);
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
                                        const float* tail0, const float* weight, const float* bias,
                                        const int* doc, float* scratch, size_t B, size_t T, size_t E,
                                        size_t K, cudaStream_t stream) {
    const int W = 8 / sizeof(X), steps = conv_steps(B, T, E, CONV_BACKWARD_STEPS);
    bool fast = K == 4 && is_aligned(inp, 8, ldi * sizeof(X)) && is_aligned(dinp, 8, lddi * sizeof(X)) &&
                is_aligned(dout, 8, E * sizeof(X)) && is_aligned(weight, 16, 16);
    dim3 grid = conv_grid(B, T, E, steps, fast ? W : 1), block(WARP, CONV_ROWS);
    if (fast)
        causal_conv1d_backward_kernel<X, W, 4><<<grid, block, 0, stream>>>(
            dinp, lddi, dtail0, scratch, dout, dtailT, inp, ldi, tail0, weight, bias, doc, (int)T, E, 4,
            steps);
    else
        causal_conv1d_backward_kernel<X, 1, 8><<<grid, block, 0, stream>>>(
            dinp, lddi, dtail0, scratch, dout, dtailT, inp, ldi, tail0, weight, bias, doc, (int)T, E, (int)K,
            steps);
    cudaCheck(cudaGetLastError());
    sum_parts_cuda(dweight, dbias, scratch, B * grid.y, K * E, dbias ? E : 0, (K + 1) * E, stream);
    return fast ? "causal_conv1d_backward_kernel<4>" : "causal_conv1d_backward_kernel<8>";
}

// --------------------------------------------------------------------------------------------------
// 4.5 Gate of the MLP, sums for biases

// gate_forward: out = y * silu(z).   y (M,E) row stride ldy   z (M,E) row stride ldz   out (M,E)
// One thread per pack; blockIdx.x counts tokens, blockIdx.y pieces of a row.   bytes: 3 sizeof(X) per element
template <typename X, int W>
__global__ void gate_forward_kernel(X* out, const X* y, size_t ldy, const X* z, size_t ldz, size_t E) {
    size_t m = blockIdx.x;
    for (size_t e = threadIdx.x * W; e < E; e += blockDim.x * W) {
        Pack<X, W> y_m = load_pack<W>(y + m * ldy + e), z_m = load_pack<W>(z + m * ldz + e);
        float v[W];
        #pragma unroll
        for (int j = 0; j < W; j++) v[j] = to_float(y_m.v[j]) * silu_cuda(to_float(z_m.v[j]));
        store_pack<W>(out + m * E + e, v);
    }
}

// out = y * silu(z)  =>  dy = dout * silu(z)     dz = dout * y * silu'(z)
// gate_out, unless NULL, receives the output of the forward again, which the next weight gradient needs.
// bytes: 5 sizeof(X) per element, 6 with gate_out
template <typename X, int W>
__global__ void gate_backward_kernel(X* dy, size_t lddy, X* dz, size_t lddz, X* gate_out, const X* dout,
                                     const X* y, size_t ldy, const X* z, size_t ldz, size_t E) {
    size_t m = blockIdx.x;
    for (size_t e = threadIdx.x * W; e < E; e += blockDim.x * W) {
        Pack<X, W> dout_m = load_pack<W>(dout + m * E + e), y_m = load_pack<W>(y + m * ldy + e),
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
        if (gate_out) store_pack<W>(gate_out + m * E + e, out_v);
    }
}

template <typename X>
const char* gate_forward_cuda(X* out, const X* y, size_t ldy, const X* z, size_t ldz, size_t M, size_t E,
                              cudaStream_t stream) {
    const int W = 16 / sizeof(X);
    bool packs = is_aligned(out, 16, E * sizeof(X)) && is_aligned(y, 16, ldy * sizeof(X)) &&
                 is_aligned(z, 16, ldz * sizeof(X));
    if (packs) gate_forward_kernel<X, W><<<(unsigned)M, 256, 0, stream>>>(out, y, ldy, z, ldz, E);
    else gate_forward_kernel<X, 1><<<(unsigned)M, 256, 0, stream>>>(out, y, ldy, z, ldz, E);
    cudaCheck(cudaGetLastError());
    return packs ? "gate_forward_kernel" : "gate_forward_kernel<1>";
}

template <typename X>
const char* gate_backward_cuda(X* dy, size_t lddy, X* dz, size_t lddz, X* gate_out, const X* dout, const X* y,
                               size_t ldy, const X* z, size_t ldz, size_t M, size_t E, cudaStream_t stream) {
    const int W = 16 / sizeof(X);
    bool packs = is_aligned(dy, 16, lddy * sizeof(X)) && is_aligned(dz, 16, lddz * sizeof(X)) &&
                 is_aligned(gate_out, 16, E * sizeof(X)) && is_aligned(dout, 16, E * sizeof(X)) &&
                 is_aligned(y, 16, ldy * sizeof(X)) && is_aligned(z, 16, ldz * sizeof(X));
    if (packs)
        gate_backward_kernel<X, W><<<(unsigned)M, 256, 0, stream>>>(dy, lddy, dz, lddz, gate_out, dout, y,
                                                                    ldy, z, ldz, E);
    else
        gate_backward_kernel<X, 1><<<(unsigned)M, 256, 0, stream>>>(dy, lddy, dz, lddz, gate_out, dout, y,
                                                                    ldy, z, ldz, E);
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
                        cudaStream_t stream) {
    size_t rows = (M + BIAS_ROWS - 1) / BIAS_ROWS;
    bias_backward_kernel<<<dim3((unsigned)rows, (unsigned)((O + WARP - 1) / WARP)), dim3(WARP, BIAS_WARPS), 0,
                           stream>>>(scratch, dout, ldo, M, O);
    cudaCheck(cudaGetLastError());
    sum_parts_cuda(dbias, NULL, scratch, rows, O, 0, O, stream);
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
// selective_scan_path_cuda() says which one serves given arguments. In both, a block of threads owns
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
// shorter than SCAN_SEGMENT tokens. Every segment costs a second, cheaper look at its tokens.
enum { SCAN_FILL = 396, SCAN_SEGMENT = 128 };
static inline size_t scan_segments_cuda(size_t B, size_t T, size_t E) {
    size_t tiles = scan_padded_cuda(T) / 32, segments = SCAN_FILL / (B * scan_blocks_cuda(E));
    if (segments > T / SCAN_SEGMENT) segments = T / SCAN_SEGMENT;
    if (segments < 2) return 1;
    size_t each = (tiles + segments - 1) / segments;           // tiles of all segments but the last
    return (tiles + each - 1) / each;
}

// floats of backward's scratch: dBt and dCt of every block; dA_log, dDskip, ddt_bias of every sequence and
// segment, and what a segment hands to the one before
size_t selective_scan_scratch_cuda(size_t B, size_t T, size_t E, size_t N) {
    size_t segments = scan_segments_cuda(B, T, E);
    return scan_blocks_cuda(E) * B * scan_padded_cuda(T) * 2 * N + segments * B * E * (2 * N + 3);
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
__device__ __forceinline__ void scan_signal_init(uint64_t* signal, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(signal)), "r"(count) : "memory");
}
__device__ __forceinline__ void scan_arrive_warp(uint64_t* signal) {
    __syncwarp();
    if (threadIdx.x % WARP == 0)
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

// ScanForwardShared: S: states per thread. A block has 8 S channels, 16 / S threads each.
// The 32 banks of shared memory serve different addresses at once only if these differ modulo 32 words; the
// odd lengths of rows and the exclusive-or in bc spread simultaneous accesses over the banks.
template <typename X, int S> struct ScanForwardShared {
    enum { TOKENS = SCAN_TILE_STEPS, CHANNELS = 8 * S, HELPERS = TOKENS * CHANNELS / 8, GROUPS = 16 / S };
    enum { DT_ROW = 2 * TOKENS + 4, SUM_ROW = TOKENS + 4, GAP = 32 / S,
           SUM_GROUP = CHANNELS * SUM_ROW + CHANNELS / 8 * GAP + 16 };
    struct {
        X dt_raw[TOKENS][CHANNELS], bc[TOKENS][32];
        int doc[2][HELPERS];                                   // document of token t and of token t-1
    } raw[2];
    struct { X x[TOKENS][CHANNELS], z[TOKENS][CHANNELS]; } rows[4];    // needed until the end
    struct {
        float dt_dtx[CHANNELS * DT_ROW + CHANNELS / 8 * GAP];  // (dt, dt x) of a channel's tokens, see dt_at
        float bc[TOKENS][32];                                  // bc[t][n ^ 4 (t % 8)]: Bt_t, then Ct_t
    } tile[2];
    float sum[GROUPS * SUM_GROUP];                             // C h, summed over S states, see sum_at
    uint64_t ready[2], scanned[2], stored;
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
template <typename X, int S>
__global__ void __launch_bounds__(SCAN_THREADS + ScanForwardShared<X, S>::HELPERS, sizeof(X) == 2 ? 3 : 2)
selective_scan_forward_fast_kernel(X* y, X* s, X* hs, float* hT, const X* x, const X* dt_raw,
                                   const float* dt_bias, const float* A_log, const X* Bt, const X* Ct,
                                   size_t ldbc, const float* Dskip, const X* z, size_t ldz, const float* h0,
                                   const int* doc, size_t T, size_t E, int spacing) {
    extern __shared__ __align__(128) char shared[];
    typedef ScanForwardShared<X, S> Shared;
    enum { TOKENS = Shared::TOKENS, CHANNELS = Shared::CHANNELS, HELPERS = Shared::HELPERS };
    Shared& sh = *(Shared*)shared;
    const int lane = threadIdx.x % WARP, tiles = (int)((T + TOKENS - 1) / TOKENS);
    const size_t b = blockIdx.x / (E / CHANNELS), e0 = blockIdx.x % (E / CHANNELS) * CHANNELS;
    if (threadIdx.x == 0) {
        for (int q = 0; q < 2; q++) {
            scan_signal_init(&sh.ready[q], HELPERS / WARP);
            scan_signal_init(&sh.scanned[q], SCAN_THREADS / WARP);
        }
        scan_signal_init(&sh.stored, HELPERS / WARP);
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
        float* sums = &sh.sum[sh.sum_at(g, ch)];
        auto store_sums = [](float* to, const float* sum) {
            *(float4*)to = *(const float4*)sum;
            *(float4*)(to + 4) = *(const float4*)(sum + 4);
        };
        #pragma unroll 1
        for (int i = 0; i < tiles; i++) {
            auto& tile = sh.tile[i & 1];
            scan_wait(&sh.ready[i & 1], (i >> 1) & 1);
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
                if (t0 == SCAN_STEPS && i > 0) scan_wait(&sh.stored, (i - 1) & 1);
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
            scan_arrive_warp(&sh.scanned[i & 1]);
        }
        #pragma unroll
        for (int n = 0; n < S; n++)
            if (hT) hT[state + n] = h[n];
        return;
    }

    // ---- element-wise: one row per thread, token r of the tile, channels c..c+7. It reads only what it has
    // copied itself, so that its copies need no barrier.
    const int v = threadIdx.x - SCAN_THREADS, r = v / (CHANNELS / 8), c = v % (CHANNELS / 8) * 8;
    float bias[8], D[8];
    #pragma unroll
    for (int k = 0; k < 8; k++) {
        bias[k] = dt_bias[e0 + c + k] * scan_bias_unit<X>();
        D[k] = Dskip[e0 + c + k];
    }
    // what the next load reads and the next store writes; both go forward one tile at a time
    const size_t row = b * T + r, at = row * E + e0 + c;
    const X *next_x = x + at, *next_dt = dt_raw + at, *next_z = z + row * ldz + e0 + c;
    X *next_y = y + at, *next_s = s + at;
    const int n0 = c * 4 / S, swizzle = 4 * (r & 7);           // of the 32 Bt_t, Ct_t: the 32 / S from n0 on
    const X* next_bc = (n0 < 16 ? Bt + n0 : Ct + n0 - 16) + row * ldbc;
    const int* next_doc = doc + row;

    auto load = [&](int i) {
        auto& raw = sh.raw[i & 1];
        auto& rows = sh.rows[i & 3];
        const bool inside = i * TOKENS + r < (int)T;
        scan_copy_row(&rows.x[r][c], next_x, inside);
        scan_copy_row(&rows.z[r][c], next_z, inside);
        scan_copy_row(&raw.dt_raw[r][c], next_dt, inside);
        #pragma unroll
        for (int k = 0; k < 32 / S; k += 8) scan_copy_row(&raw.bc[r][n0 + k], next_bc + k, inside);
        if (doc) {                                             // the document before the first token is 0
            scan_copy4(&raw.doc[0][v], next_doc, inside);
            scan_copy4(&raw.doc[1][v], next_doc - 1, inside && (i > 0 || r > 0));
        }
        next_x += TOKENS * E;
        next_dt += TOKENS * E;
        next_z += TOKENS * ldz;
        next_bc += TOKENS * ldbc;
        next_doc += TOKENS;
    };
    auto prepare = [&](int i) {
        const auto& raw = sh.raw[i & 1];
        auto& tile = sh.tile[i & 1];
        float dt[8], dtx[8], bc_r[8];
        scan_load_row(dtx, &sh.rows[i & 3].x[r][c]);
        scan_load_row(dt, &raw.dt_raw[r][c]);
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            dt[k] = scan_dt<X>(dt[k], bias[k]);
            dtx[k] *= dt[k];                                   // x beyond T is 0
        }
        const bool inside = i * TOKENS + r < (int)T, resets = doc && raw.doc[0][v] != raw.doc[1][v];
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
        scan_arrive_warp(&sh.ready[i & 1]);
    };
    auto store = [&](int i) {
        float x_t[8], y_t[8], s_t[8];
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            const float* sums = &sh.sum[sh.sum_at(0, c) + k * Shared::SUM_ROW + r];
            s_t[k] = sums[0];
            #pragma unroll
            for (int g = 1; g < Shared::GROUPS; g++) s_t[k] += sums[g * Shared::SUM_GROUP];
        }
        scan_arrive_warp(&sh.stored);
        scan_load_row(x_t, &sh.rows[i & 3].x[r][c]);
        scan_load_row(y_t, &sh.rows[i & 3].z[r][c]);
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            s_t[k] = fmaf(D[k], x_t[k], s_t[k]);
            y_t[k] = s_t[k] * scan_silu<X>(y_t[k]);
        }
        if (i * TOKENS + r < (int)T) {
            if (s) scan_store_row(next_s, s_t);
            scan_store_row(next_y, y_t);
        }
        next_s += TOKENS * E;
        next_y += TOKENS * E;
    };
    load(0);
    copy_async_commit();
    if (tiles > 1) load(1);
    copy_async_commit();
    copy_async_wait(1);
    prepare(0);
    if (tiles > 2) load(2);
    copy_async_commit();
    #pragma unroll 1
    for (int i = 0; i < tiles; i++) {
        copy_async_wait(1);
        if (i + 1 < tiles) prepare(i + 1);
        if (i + 3 < tiles) load(i + 3);
        copy_async_commit();
        scan_wait(&sh.scanned[i & 1], (i >> 1) & 1);
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
__device__ __forceinline__ void scan_mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
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
                                        uint32_t E, uint32_t segments, uint32_t each) {
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
    for (uint32_t i = segments - 1; i > segment; i--) {        // what the segments to the right make of it
        size_t at = ((size_t)b * segments + i) * E + e0 + ch;
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

// selective_scan_carry_kernel: what a segment of time hands to the token before it. Backward is linear in
// what enters from the right, (B9) carry_{t-1} = a_t (g_t Ct_t + carry_t), so that for a whole segment
//   carry out = local + exp(A sum dt) carry in
// local (B, segments, E, 16): carry out if nothing enters; dt_sum (B, segments, E). Segment 0 is not needed.
// Thread: states 4k..4k+3 of one channel; element-wise: token r of the tile, 8 channels.
__global__ void __launch_bounds__(SCAN_THREADS)
selective_scan_carry_kernel(float* local, float* dt_sum, const bf16* dy, const bf16* dt_raw,
                            const float* dt_bias, const float* A_log, const bf16* Ct, uint32_t ldbc,
                            const bf16* z, uint32_t ldz, const int* doc, uint32_t T, uint32_t E,
                            uint32_t segments, uint32_t each) {
    __shared__ float4 dt_g[32][16];                            // (dt, g) of two channels, at pair()
    __shared__ float C[32][16];
    auto pair = [](int t, int c) { return c ^ ((c >> 3) | ((t & 1) << 1)); };      // against bank conflicts
    const int lane = threadIdx.x & 31, r = threadIdx.x >> 2, c0 = (threadIdx.x & 3) * 8;
    // lanes of one channel: 0, 1, 8, 9 apart, as in the forward kernel
    const int k = (lane & 1) | ((lane >> 2) & 2), c = ((lane >> 1) & 3) | ((lane >> 2) & 4);
    const int ch = (threadIdx.x >> 5) * 8 + c;
    const uint32_t blocks = E / SCAN_CHANNELS, e0 = blockIdx.x % blocks * SCAN_CHANNELS;
    const uint32_t others = segments - 1, segment = 1 + blockIdx.x / blocks % others;
    const uint32_t b = blockIdx.x / blocks / others;
    const int tiles = (int)((T + 31) / 32), first = (int)(segment * each);
    const int end = first + (int)each < tiles ? first + (int)each : tiles;
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
    load(end - 1);
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
    const size_t at = ((size_t)b * segments + segment) * E + e0 + ch;
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
// which kernels serve these arguments: "fast" or "general"
template <typename X>
const char* selective_scan_path_cuda(const X* x, const X* Bt, const X* Ct, size_t ldbc, const X* z,
                                     size_t ldz, size_t B, size_t T, size_t E, size_t N) {
    return scan_is_fast(x, Bt, Ct, ldbc, z, ldz, B, T, E, N) ? "fast" : "general";
}

// a block may use more than 48 KB of shared memory only after the kernel was told so
template <typename Kernel> static inline void scan_allow_shared(Kernel kernel, size_t bytes) {
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}
static inline size_t scan_shared_bytes(size_t tile_bytes, size_t steps, size_t N, size_t state_arrays) {
    size_t padded = (N + SCAN_GROUP - 1) / SCAN_GROUP * SCAN_GROUP;
    return tile_bytes + (2 * steps + state_arrays * SCAN_CHANNELS) * padded * sizeof(float);
}

template <typename X, int S>
static inline void scan_launch_forward_fast(X* y, X* s, X* hs, float* hT, const X* x, const X* dt_raw,
                                            const float* dt_bias, const float* A_log, const X* Bt,
                                            const X* Ct, size_t ldbc, const float* Dskip, const X* z,
                                            size_t ldz, const float* h0, const int* doc, size_t B, size_t T,
                                            size_t E, int spacing, cudaStream_t stream) {
    typedef ScanForwardShared<X, S> Shared;
    auto kernel = selective_scan_forward_fast_kernel<X, S>;
    scan_allow_shared(kernel, sizeof(Shared));
    const unsigned blocks = (unsigned)(B * (E / Shared::CHANNELS));
    kernel<<<blocks, SCAN_THREADS + Shared::HELPERS, sizeof(Shared), stream>>>(
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
    const size_t each = (tiles + segments - 1) / segments;
    float* local = scratch + blocks * B * scan_padded_cuda(T) * 32;        // 16-byte aligned
    float* dt_sum = local + segments * B * E * 16;
    float* de_part = dt_sum + segments * B * E;
    ScanPartial* dBC_part = (ScanPartial*)scratch;
    auto kernel = spacing == 8 ? selective_scan_backward_fast_kernel<ScanPartial, 8>
                               : selective_scan_backward_fast_kernel<ScanPartial, 16>;
    scan_allow_shared(kernel, sizeof(ScanBackwardShared));
    if (segments > 1) {
        selective_scan_carry_kernel<<<(unsigned)(blocks * (segments - 1) * B), SCAN_THREADS, 0, stream>>>(
            local, dt_sum, dy, dt_raw, dt_bias, A_log, Ct, (uint32_t)ldbc, z, (uint32_t)ldz, doc, (uint32_t)T,
            (uint32_t)E, (uint32_t)segments, (uint32_t)each);
        cudaCheck(cudaGetLastError());
    }
    kernel<<<(unsigned)(blocks * segments * B), SCAN_THREADS, sizeof(ScanBackwardShared), stream>>>(
        dx, ddt_raw, dz, (uint32_t)lddz, y, dh0, dBC_part, de_part, local, dt_sum, dy, dhT, hs, s, x, dt_raw,
        dt_bias, A_log, Bt, Ct, (uint32_t)ldbc, Dskip, z, (uint32_t)ldz, doc, (uint32_t)T, (uint32_t)E,
        (uint32_t)segments, (uint32_t)each);
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
        const bool few = B * E / 16 <= (size_t)sms;
        auto launch = few ? scan_launch_forward_fast<X, 2> : scan_launch_forward_fast<X, 4>;
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
// reading the weights (bf16: 61 us for 130M parameters at 4.3 TB/s) plus what the reading has to wait for. As
// kernels one after the other, a token waits at each of 100 ends for 2 to 3 us. So the whole token is one
// kernel, with one block on every processor of the chip:
//
//   - The token is a list of steps (DecodeStep): a matmul, then what follows it element by element. Every block
//     makes its share of the outputs of a step and sends it to the others.
//   - The weights do not wait. Which weights a warp needs, and in which order, is known beforehand: a copy of
//     them in that order is made once (decode_pack), one stream per warp, and each warp keeps the next pieces
//     of its stream on their way into shared memory, whatever it is waiting for (DecodeStream).
//
//   Mamba-1:   IN: norm, W_in, conv | X: W_x | SCAN: W_dt, state, gate | OUT: W_out, residual
//   MLP:       UP: norm, W_1, gate | OUT: W_2, residual
//   at the end HEAD: norm, logits, the largest
//
// A block has the same channels in IN and SCAN, so x, z and the states stay with it; and the same columns of
// the residual stream in every OUT, so that never leaves its shared memory. Of the norm, 1/rms is a factor of
// a whole row: OUT sends res * weight and the block's sum of squares, and the matmul that reads them applies
// 1/rms at its end.
//
// With up to 8 sequences every word that is sent carries the number of its step (`tag`), and who needs it asks
// for it until it is there: 0.8 us from block to block. With more, the words would be too many: blocks count
// themselves in at the end of a step (decode_arrive, decode_wait: 1.5 us).
// With many sequences the blocks form groups, each with its own sequences: `blocks` of them share the rows of
// every matrix. Groups never wait for each other, and read the same weights at about the same time.

enum { DECODE_ROWS = 64, DECODE_MAX_STEPS = 4, DECODE_RING = 8 };
enum { DECODE_IN, DECODE_X, DECODE_SCAN, DECODE_OUT, DECODE_UP, DECODE_HEAD, DECODE_BC, DECODE_SSD };

// DecodeShape: TILES groups of 8 sequences; WARPS of a block share the sums over k; TALL tiles of 16 outputs
// and AHEAD chunks of 32 k per warp are worked on at a time; QUEUE pieces of weights are on their way
template <int TILES_, int WARPS_, bool TAGGED_, int TALL_, int AHEAD_, int QUEUE_, bool SSD_ = false> struct DecodeShape {
    static const bool TAGGED = TAGGED_, SSD = SSD_;
    static const int TILES = TILES_, WARPS = WARPS_, TALL = TALL_, AHEAD = AHEAD_, QUEUE = QUEUE_,
                     SEQUENCES = 8 * TILES, THREADS = WARP * WARPS, WIDTH = TAGGED ? 4 : 2,
                     PART = TALL * TILES * 128, VALUES = (PART + THREADS - 1) / THREADS,
                     BESTS = TILES * 128 > THREADS ? TILES * 128 / THREADS : 1, PAIRS = TILES == 1 ? 1 : 2;
    static const size_t MEMORY = (size_t)WARPS * (QUEUE * 1024 + AHEAD * TILES * 512 + PART * sizeof(float));
};

// DecodeStep: out (rows,O) = input (rows,K) weight^T + bias, then by kind:
//   IN    O = E, K = D: rows o (x) and second + o (z). x goes through the convolution.
//         p: conv weight, conv bias; state: conv (rows,taps-1,E)
//   X     O = R+2N, K = E: r, B, C
//   SCAN  O = E, K = R: dt, then one step of the recurrence, skip and gate.
//         p: A_log, D, bias of dt; state: h (rows,E,N)
//   OUT   O = D: added to the residual stream.   p: weight of the next norm
//   UP    O = F, K = D: rows o (up) and second + o (gate)
//   HEAD  O = Vp, K = D: logits
//   BC    O = 2GN+H, K = D: B, C (through the convolution), dt.   p, state as in IN, for all channels
//   SSD   O = E, K = 0: one step of the recurrence, skip, gate, gated norm but for its 1/rms
//         p: A_log, D, bias of dt, norm weight or NULL; state: h (rows,H,P,N)
// joined: it reads what the step before it has read. norm: OUT reads what a gated norm has sent
typedef struct {
    int kind, O, K, second, joined, gated;
    const bf16* weight;
    const float *bias, *p[4];
    float* state;
} DecodeStep;

// Decode: one token of `rows` sequences
typedef struct {
    const DecodeStep* step;
    int n_steps, blocks;               // of a group
    int rows, D, E, N, R, taps, F, V, Vp, H, P, G, channels;    // channels: of the convolution, as a row of its state
    bool D_has_hdim, norm_before_gate;
    float eps, dt_low, dt_high;
    const char* weights;               // the streams, see decode_pack
    const uint2* start;                // (blocks,WARPS): in units of 64 bytes; in run
    const uint32_t* run;
    const bf16* embedding;
    const float* norm;                 // weight of the first norm
    // what blocks send to each other
    char *u, *x, *rbc, *y;
    int ld_rbc;                        // row stride of rbc
    uint2* squares;                    // (2,groups,blocks,8 TILES): of the residual stream, of the gated norm
    float2* best;                      // the same: a logit, and its index as bits
    unsigned* arrived;                 // (groups,32), zero before and after
    unsigned tag;                      // of the first step
    // out
    float* logits;                     // (rows,Vp), or NULL
    int* next;                         // (rows) the most likely tokens, -1 after a logit that is not finite; or NULL
    int out_at, xz_at, bc_at, res_at, scale_at;    // in shared memory, floats
    int token[DECODE_ROWS];
#ifdef DECODE_PROFILE
    long long* profile;
#endif
} Decode;
#ifdef DECODE_PROFILE
#define MARK(i) do { if (a.profile && threadIdx.x == 0) a.profile[((size_t)blockIdx.x * a.n_steps + number) * 8 + i] = clock64(); } while (0)
static long long* decode_profile;
#else
#define MARK(i)
#endif

// Share: the outputs [first, first + count) of O that are those of block `index`, in pairs
struct Share {
    int first, count;
    __device__ __forceinline__ Share(int O, int index, int blocks) {
        first = 2 * (int)((unsigned)(O / 2) * (unsigned)index / (unsigned)blocks);
        count = 2 * (int)((unsigned)(O / 2) * (unsigned)(index + 1) / (unsigned)blocks) - first;
    }
    __device__ __forceinline__ Share(int first_, int count_) : first(first_), count(count_) {}
};

// power2_above: the smallest p with 2^p >= n. Threads are spread over rows of 2^p, which needs no division.
__device__ __forceinline__ int power2_above(int n) { return 32 - __clz(n - 1); }

// decode_pack: writes the streams. A unit is 32 k of up to 16 rows, only those that exist; k beyond K is 0. A
// run is a number of units with the same number of rows, units | rows << 24; 0 is the end of a stream.
// The order of the units of a step is that in which decode_kernel takes them. One block per stream; weights
// NULL: only counts, size[stream] = (units of 64 bytes, runs).
template <class S>
__global__ void __launch_bounds__(2 * WARP)
decode_pack_kernel(char* weights, uint32_t* run, const uint2* start, uint2* size, const DecodeStep* step, int n_steps,
                   int blocks) {
    const int w = (int)blockIdx.x % S::WARPS, lane = threadIdx.x % WARP, half = threadIdx.x / WARP;
    unsigned pieces = 0, runs = 0;
    if (weights) { weights += (size_t)start[blockIdx.x].x * 64; run += start[blockIdx.x].y; }
    for (int number = 0; number < n_steps; number++) {
        const DecodeStep s = step[number];
        const Share own(s.O, (int)blockIdx.x / S::WARPS, blocks);
        const int rows = s.second ? 2 * own.count : own.count, chunks = (s.K + 31) / 32;
        for (int first = 0; first < rows; first += 16 * S::TALL)
            for (int c0 = w; c0 < chunks; c0 += S::AHEAD * S::WARPS)
                for (int row0 = first; row0 < rows && row0 < first + 16 * S::TALL; row0 += 16) {
                    int tall = rows - row0 < 16 ? rows - row0 : 16, units = 0, i = row0 + 8 * half + lane / 4;
                    const bf16* from = s.weight + (ptrdiff_t)(own.first + (i < own.count ? i : s.second + i - own.count)) * s.K;
                    for (int c = c0; units < S::AHEAD && c < chunks; units++, c += S::WARPS) {
                        int k = 32 * c + 8 * (lane % 4);
                        if (weights && i < row0 + tall)
                            *(uint4*)(weights + (size_t)pieces * 64 + 16 * threadIdx.x) =
                                k < s.K ? *(const uint4*)(from + k) : make_uint4(0, 0, 0, 0);
                        pieces += tall;
                    }
                    if (weights && threadIdx.x == 0) run[runs] = (uint32_t)units | (uint32_t)tall << 24;
                    runs++;
                }
    }
    if (threadIdx.x > 0) return;
    if (weights) run[runs] = 0;
    else size[blockIdx.x] = make_uint2(pieces, runs + 1);
}

// DecodeStream: the weights of one warp. Lane (g, q) holds k = 8q..8q+7 of the rows g and g + 8 of a unit.
template <int QUEUE> struct DecodeStream {
    const char* at;                    // of this lane: the next unit to be asked for
    const uint32_t* run;
    uint32_t next, after;              // the next two runs
    uint64_t policy;
    uint32_t queue, slot;              // shared memory of this lane; the slot to be taken next
    int left, rows, lane;

    __device__ __forceinline__ void fetch() {
        if (left == 0) {
            left = (int)(next & 0xffffff);
            rows = (int)(next >> 24);
            next = after;
            if (next) after = __ldg(++run);
        }
        if (left) {
            uint32_t to = queue + 1024 * slot;
            if (lane < 4 * rows)
                asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
                             :: "r"(to), "l"(at), "l"(policy) : "memory");
            if (lane + 32 < 4 * rows)
                asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
                             :: "r"(to + 512), "l"(at + 512), "l"(policy) : "memory");
            at += 64 * rows;
            left--;
        }
        copy_async_commit();
    }
    __device__ __forceinline__ DecodeStream(const Decode& a, int stream, char* memory) {
        lane = threadIdx.x % WARP;
        uint2 start = a.start[stream];
        at = a.weights + (size_t)start.x * 64 + 16 * lane;
        run = a.run + start.y;
        next = __ldg(run);
        after = next ? __ldg(++run) : 0;
        left = 0;
        queue = (uint32_t)__cvta_generic_to_shared(memory) + 16 * lane;
        // used once: these lines shall leave the cache first, so that all else stays there from token to token
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        for (slot = 0; slot < QUEUE; slot++) fetch();
        slot = 0;
    }
    __device__ __forceinline__ void take(uint4* low, uint4* high) {
        asm volatile("cp.async.wait_group %0;" :: "n"(QUEUE - 1) : "memory");
        uint32_t from = queue + 1024 * slot;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(low->x), "=r"(low->y), "=r"(low->z), "=r"(low->w) : "r"(from) : "memory");
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(high->x), "=r"(high->y), "=r"(high->z), "=r"(high->w) : "r"(from + 512) : "memory");
        fetch();
        slot = slot + 1 == QUEUE ? 0 : slot + 1;
    }
};

// --- from block to block

// decode_arrive: everything that the block wrote is visible to blocks that have waited for it
__device__ __forceinline__ void decode_arrive(unsigned* arrived) {
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(arrived) : "memory");
}
__device__ __forceinline__ void decode_wait(const unsigned* arrived, unsigned count) {
    if (threadIdx.x == 0) {
        unsigned now;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
        while (now < count);
    }
    __syncthreads();
}

// one or two words of 8 bytes; tagged ones: the value and its tag
__device__ __forceinline__ uint2 decode_peek(const void* p) {
    unsigned long long x;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
    return make_uint2((uint32_t)x, (uint32_t)(x >> 32));
}
__device__ __forceinline__ uint4 decode_peek2(const void* p) {
    unsigned long long x, y;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(x), "=l"(y) : "l"(p) : "memory");
    return make_uint4((uint32_t)x, (uint32_t)(x >> 32), (uint32_t)y, (uint32_t)(y >> 32));
}
__device__ __forceinline__ void decode_post(void* p, uint32_t value, unsigned tag) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;"
                 :: "l"(p), "l"((unsigned long long)tag << 32 | value) : "memory");
}

template <class S>
__device__ __forceinline__ void decode_post_pair(char* to, size_t at, float low, float high, unsigned tag) {
    if (S::TAGGED) decode_post(to + 4 * at, scan_pack(low, high), tag);
    else *(uint32_t*)(to + 2 * at) = scan_pack(low, high);
}

// decode_send: neighbouring threads have neighbouring values; two of them become one word
template <class S> __device__ __forceinline__ void decode_send(char* to, size_t at, float value, unsigned tag) {
    int lane = threadIdx.x % WARP;
    float other = __shfl_xor_sync(3u << (lane & ~1), value, 1);
    if (!(lane & 1)) decode_post_pair<S>(to, at, value, other, tag);
}

// DecodeInput: 8 values that were sent
template <bool TAGGED> struct DecodeInput {
    uint4 a, b;
    __device__ __forceinline__ void load(const char* from, bool inside, unsigned tag) {
        a = b = TAGGED ? make_uint4(0, tag, 0, tag) : make_uint4(0, 0, 0, 0);
        if (inside && TAGGED) { a = decode_peek2(from); b = decode_peek2(from + 16); }
        if (inside && !TAGGED) a = __ldcg((const uint4*)from);
    }
    __device__ __forceinline__ bool arrived(unsigned tag) const {
        return !TAGGED || (a.y == tag && a.w == tag && b.y == tag && b.w == tag);
    }
    __device__ __forceinline__ uint4 value() const { return TAGGED ? make_uint4(a.x, a.z, b.x, b.z) : a; }
};

// --- element by element

// DecodeBlock: a block's place, and its shared memory
struct DecodeBlock {
    int index, blocks, row0, n;        // in its group; the first sequence and the number of them
    float *part, *out, *xz, *bc, *res, *scale;
    uint2 *squares, *gated_squares;
    float2* best;
};

// decode_prefetch: what a later step will read element by element, into the cache of the chip
static __device__ __noinline__ void decode_prefetch_rows(const float* p, int rows, size_t stride, int n) {
    #pragma unroll 1
    for (int row = 0; p && row < rows; row++)
        #pragma unroll 1
        for (int i = threadIdx.x % WARP * 32; i < n + 31; i += 32 * WARP)
            asm volatile("prefetch.global.L2 [%0];" :: "l"(p + row * stride + (i < n ? i : n - 1)));
}
__device__ __forceinline__ void decode_prefetch(const Decode& a, const DecodeStep& s, const DecodeBlock& b, Share own) {
    size_t e = (size_t)own.first;
    if (s.kind == DECODE_IN || s.kind == DECODE_BC) {
        decode_prefetch_rows(s.p[0] + e * a.taps, 1, 0, own.count * a.taps);
        decode_prefetch_rows(s.p[1] ? s.p[1] + e : NULL, 1, 0, own.count);
        decode_prefetch_rows(s.state + (size_t)b.row0 * (a.taps - 1) * a.channels + e, b.n * (a.taps - 1), a.channels,
                             own.count);
    } else if (s.kind == DECODE_SCAN || s.kind == DECODE_SSD) {
        if (s.kind == DECODE_SCAN) {
            decode_prefetch_rows(s.p[0] + e * a.N, 1, 0, own.count * a.N);
            decode_prefetch_rows(s.p[1] + e, 1, 0, own.count);
            decode_prefetch_rows(s.p[2] + e, 1, 0, own.count);
        } else decode_prefetch_rows(s.p[3] ? s.p[3] + e : NULL, 1, 0, own.count);
        size_t states = (size_t)a.E * a.N;
        if (states * a.rows < (size_t)4 << 20)               // else they would only push each other out
            decode_prefetch_rows(s.state + b.row0 * states + e * a.N, b.n, states, own.count * a.N);
    } else if (s.kind == DECODE_OUT) decode_prefetch_rows(s.p[0] + e, 1, 0, own.count);
}

// DecodeConv: what the convolution of one channel of one sequence needs besides its new input
struct DecodeConv {
    float weight[4], tail[3], bias;
    __device__ __forceinline__ void load(const Decode& a, const DecodeStep& s, const DecodeBlock& b, Share own, int at, int lg,
                                         int convolved) {
        int i = at & ((1 << lg) - 1), n = at >> lg, e = own.first + i;
        if (i >= own.count || n >= b.n || e >= convolved) return;
        bias = s.p[1] ? s.p[1][e] : 0.0f;
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            if (k < a.taps) weight[k] = s.p[0][(size_t)e * a.taps + k];
            if (k < a.taps - 1) tail[k] = s.state[((size_t)(b.row0 + n) * (a.taps - 1) + k) * a.channels + e];
        }
    }
};

// decode_conv: the convolution and SiLU of those of the outputs below `convolved`; all are sent to `to`, unless
// that is NULL. z, the second half of the rows, is rounded.
template <class S>
__device__ __forceinline__ void decode_conv(const Decode& a, const DecodeStep& s, const DecodeBlock& b, Share own, float* values,
                                            int convolved, char* to, int ld, DecodeConv next, unsigned tag) {
    const int lg = power2_above(own.count);
    #pragma unroll 1
    for (int at = threadIdx.x; at < b.n << lg; at += S::THREADS) {
        DecodeConv now = next;
        if (at + S::THREADS < b.n << lg) next.load(a, s, b, own, at + S::THREADS, lg, convolved);
        int i = at & ((1 << lg) - 1), n = at >> lg, e = own.first + i;
        if (i >= own.count) continue;
        float *value = &values[i * S::SEQUENCES + n], *z = value + own.count * S::SEQUENCES;
        float out = to_float(from_float<bf16>(*value));
        if (s.second) *z = to_float(from_float<bf16>(*z));
        float x = out, c = now.bias;
        if (e < convolved) {
            #pragma unroll
            for (int k = 0; k < 4; k++)
                if (k < a.taps) c += now.weight[k] * (k == a.taps - 1 ? x : now.tail[k < 3 ? k : 2]);
            out = to_float(from_float<bf16>(silu_cuda(c)));
        }
        *value = out;
        if (to) decode_send<S>(to, (size_t)(b.row0 + n) * ld + e, out, tag);
        if (e >= convolved) continue;
        float* tail = s.state + (size_t)(b.row0 + n) * (a.taps - 1) * a.channels + e;
        #pragma unroll
        for (int k = 0; k < 3; k++)
            if (k < a.taps - 1) tail[(size_t)k * a.channels] = k + 2 < a.taps ? now.tail[k < 2 ? k + 1 : 2] : x;
    }
}

// Threads of one (channel, sequence) pair in a scan: 4 states to each of them, at most a warp (log2)
template <bool SSD> __device__ __forceinline__ int decode_lanes(int N) {
    return N <= 16 ? 2 : N <= 32 ? 3 : N <= 64 || !SSD ? 4 : 5;
}

// DecodeStates: the first states of some (channel, sequence) pairs, 4 per thread, and their decays
template <class S, bool SSD> struct DecodeStates {
    float h[S::PAIRS][4], rate[S::PAIRS][4], bias[S::PAIRS], skip[S::PAIRS];
    __device__ __forceinline__ void load(const Decode& a, const DecodeStep& s, const DecodeBlock& b, Share own, int at, int lg) {
        const int lanes = decode_lanes<SSD>(a.N), l = threadIdx.x & ((1 << lanes) - 1);
        #pragma unroll
        for (int j = 0; j < S::PAIRS; j++, at += S::THREADS >> lanes) {
            int i = at & ((1 << lg) - 1), n = at >> lg, e = own.first + i;
            if (i >= own.count || n >= b.n) continue;
            int head = SSD ? e / a.P : e;
            const float *from = s.state + ((size_t)(b.row0 + n) * a.E + e) * a.N + 4 * l,
                        *A_log = SSD ? s.p[0] + head : s.p[0] + (size_t)e * a.N + 4 * l;
            skip[j] = s.p[1][SSD && !a.D_has_hdim ? head : e];
            bias[j] = s.p[2][head];
            rate[j][0] = *A_log;
            if (a.N % 4 == 0 && 4 * l < a.N) {
                *(float4*)h[j] = *(const float4*)from;
                if (!SSD) *(float4*)rate[j] = *(const float4*)A_log;
            } else
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    h[j][k] = 4 * l + k < a.N ? from[k] : 0.0f;
                    if (!SSD) rate[j][k] = 4 * l + k < a.N ? A_log[k] : 0.0f;
                }
        }
    }
};

// decode_scan: formulas (F4) to (F8) of Mamba-1 (section 4.9), (S2) to (S5) of Mamba-2 for one token. Mamba-1
// sends y; Mamba-2 puts it where z was, and with a gated norm into `out` what its mean square is taken of
template <class S, bool SSD>
__device__ __forceinline__ void decode_scan(const Decode& a, const DecodeStep& s, const DecodeBlock& b, Share own,
                                            DecodeStates<S, SSD> next, unsigned tag) {
    const int lanes = decode_lanes<SSD>(a.N), l = threadIdx.x & ((1 << lanes) - 1), lg = power2_above(own.count);
    const int ld_bc = SSD ? 2 * a.G * a.N + a.H : 2 * a.N;
    #pragma unroll 1
    for (int at0 = 0; at0 < b.n << lg; at0 += S::PAIRS * S::THREADS >> lanes) {
        DecodeStates<S, SSD> now = next;
        int at = at0 + (int)(threadIdx.x >> lanes);
        if (at0 + (S::PAIRS * S::THREADS >> lanes) < b.n << lg)
            next.load(a, s, b, own, at + (S::PAIRS * S::THREADS >> lanes), lg);
        #pragma unroll
        for (int j = 0; j < S::PAIRS; j++, at += S::THREADS >> lanes) {
            int i = at & ((1 << lg) - 1), n = at >> lg;
            bool inside = i < own.count && n < b.n;
            if (!inside) i = n = 0;
            int e = own.first + i, head = SSD ? e / a.P : 0;
            float* h_e = s.state + ((size_t)(b.row0 + n) * a.E + e) * a.N;
            float* z = &b.xz[(own.count + i) * S::SEQUENCES + n];
            const float *row = b.bc + n * ld_bc, *B_n = row + (SSD ? head * a.G / a.H * a.N : 0), *C_n = B_n + a.G * a.N;
            float dt = (SSD ? row[2 * a.G * a.N + head] : b.out[i * S::SEQUENCES + n]) + now.bias[j],
                  x = b.xz[i * S::SEQUENCES + n], sum = 0, after[4], same = 0;
            dt = scan_softplus_fast(dt * SCAN_LOG2E);
            if (SSD) {
                dt = fminf(fmaxf(dt, a.dt_low), a.dt_high);
                same = exp2_unit(dt * scan_decay(now.rate[j][0]));
            }
            float dtx = dt * x;
            if (inside)
                #pragma unroll 1
                for (int first = 4 * l; first < a.N; first += 4 << lanes) {
                    #pragma unroll
                    for (int k = 0; k < 4; k++) {
                        if (first + k >= a.N) continue;
                        bool read = first == 4 * l;
                        float before = read ? now.h[j][k] : h_e[first + k], decay = same;
                        if (!SSD)
                            decay = exp2_unit(dt * scan_decay(read ? now.rate[j][k] : s.p[0][(size_t)e * a.N + first + k]));
                        after[k] = fmaf(decay, before, dtx * B_n[first + k]);
                        sum = fmaf(C_n[first + k], after[k], sum);
                    }
                    if (a.N % 4 == 0) *(float4*)(h_e + first) = *(float4*)after;
                    else
                        #pragma unroll
                        for (int k = 0; k < 4; k++) if (first + k < a.N) h_e[first + k] = after[k];
                }
            #pragma unroll 1
            for (int step = 1; step < 1 << lanes; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
            float y = fmaf(now.skip[j], x, sum), gate = silu_cuda(*z);
            if (!SSD) {                                        // a pair of channels: two groups of lanes
                y *= gate;
                float other = __shfl_xor_sync(0xffffffffu, y, 1 << lanes);
                if (inside && l == 0 && i % 2 == 0) decode_post_pair<S>(a.y, (size_t)(b.row0 + n) * a.E + e, y, other, tag);
            } else if (inside && l == 0) {
                if (s.p[3]) {
                    b.out[i * S::SEQUENCES + n] = a.norm_before_gate ? y : y * gate;
                    gate *= s.p[3][e];
                }
                *z = y * gate;
            }
        }
    }
}

// decode_squares: sends the sum of squares of the block's values (count,SEQUENCES), for every sequence
template <class S>
__device__ __forceinline__ void decode_squares(const DecodeBlock& b, const float* values, int count, uint2* squares,
                                               unsigned tag) {
    const int lanes = S::THREADS / S::SEQUENCES < WARP ? S::THREADS / S::SEQUENCES : WARP;   // of a sequence
    float sum = 0;
    int n = threadIdx.x / lanes;
    #pragma unroll 1
    for (int i = threadIdx.x % lanes; n < b.n && i < count; i += lanes) {
        float v = values[i * S::SEQUENCES + n];
        sum += v * v;
    }
    #pragma unroll
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % lanes == 0 && n < S::SEQUENCES) decode_post(&squares[b.index * S::SEQUENCES + n], __float_as_uint(sum), tag);
}

// decode_residual: the block's columns of the residual stream += out; what the next norm reads. embed: = the
// embedding
template <class S>
__device__ __forceinline__ void decode_residual(const Decode& a, const float* norm, float norm_first, const DecodeBlock& b,
                                                Share own, bool embed, unsigned tag) {
    const int lg = power2_above(own.count);
    #pragma unroll 1
    for (int at = threadIdx.x; at < b.n << lg; at += S::THREADS) {
        int i = at & ((1 << lg) - 1), n = at >> lg, o = own.first + i;
        if (i >= own.count) continue;
        float* res = &b.res[i * S::SEQUENCES + n];
        float r = embed ? to_float(a.embedding[(size_t)a.token[b.row0 + n] * a.D + o]) : *res + b.out[i * S::SEQUENCES + n];
        *res = r;
        decode_send<S>(a.u, (size_t)(b.row0 + n) * a.D + o, r * (at == (int)threadIdx.x ? norm_first : norm[o]), tag);
    }
    __syncthreads();
    decode_squares<S>(b, b.res, own.count, b.squares, tag);
}

// decode_rms: 1/rms of rows of `width` from the sums of all blocks
template <class S>
__device__ __forceinline__ void decode_rms(const Decode& a, const DecodeBlock& b, const uint2* squares, int width, unsigned tag) {
    const int lanes = S::THREADS / S::SEQUENCES < WARP ? S::THREADS / S::SEQUENCES : WARP, MANY = 5;
    float sum = 0;
    int n = (S::THREADS - 1 - (int)threadIdx.x) / lanes;     // the last warps: they may have less else to do
    if (n >= b.n) return;
    #pragma unroll 1
    for (int first = threadIdx.x % lanes; first < b.blocks; first += MANY * lanes) {
        uint2 v[MANY];
        bool arrived;
        do {
            arrived = true;
            #pragma unroll
            for (int j = 0; j < MANY; j++) {
                v[j] = make_uint2(0, tag);
                if (first + j * lanes < b.blocks) v[j] = decode_peek(&squares[(first + j * lanes) * S::SEQUENCES + n]);
            }
            #pragma unroll
            for (int j = 0; j < MANY; j++) arrived = arrived && (!S::TAGGED || v[j].y == tag);
        } while (!arrived);
        #pragma unroll
        for (int j = 0; j < MANY; j++) sum += __uint_as_float(v[j].x);
    }
    #pragma unroll
    for (int step = lanes / 2; step > 0; step /= 2)
        sum += __shfl_xor_sync(lanes == WARP ? 0xffffffffu : ((1u << lanes) - 1) << (threadIdx.x % WARP / lanes * lanes), sum, step);
    if (threadIdx.x % lanes == 0) b.scale[n] = 1.0f / sqrtf(sum / (float)width + a.eps);
}

__device__ __forceinline__ void decode_better(float2* best, float z, int index) {
    int other = __float_as_int(best->y);
    if (z > best->x || (z == best->x && index < other && z > -INFINITY)) *best = make_float2(z, __int_as_float(index));
}

// DecodeNow: a step in shared memory, and the share of the block
typedef struct { DecodeStep s; int first, count; } DecodeNow;

template <class S>
__global__ void __launch_bounds__(S::THREADS, 1) decode_kernel(const __grid_constant__ Decode a) {
    const int TILES = S::TILES, AHEAD = S::AHEAD, SEQUENCES = S::SEQUENCES, WIDTH = S::WIDTH;
    extern __shared__ __align__(128) char shared[];
    __shared__ DecodeNow ring[DECODE_RING];
    const int lane = threadIdx.x % WARP, w = threadIdx.x / WARP, g = lane >> 2, q = lane & 3;
    const int group = blockIdx.x / a.blocks;
    DecodeBlock b;
    b.index = blockIdx.x % a.blocks;
    b.blocks = a.blocks;
    b.row0 = group * SEQUENCES;
    b.n = a.rows - b.row0 < SEQUENCES ? a.rows - b.row0 : SEQUENCES;
    uint4* stage = (uint4*)(shared + S::WARPS * S::QUEUE * 1024) + w * AHEAD * TILES * WARP + lane;
    b.part = (float*)(shared + S::WARPS * (S::QUEUE * 1024 + AHEAD * TILES * 512));
    float* more = b.part + S::WARPS * S::PART;
    b.out = more + a.out_at; b.xz = more + a.xz_at; b.bc = more + a.bc_at; 
    b.res = more + a.res_at; b.scale = more + a.scale_at;
    b.squares = a.squares + (size_t)group * a.blocks * SEQUENCES;
    b.gated_squares = b.squares + (size_t)gridDim.x * SEQUENCES;
    b.best = a.best + (size_t)group * a.blocks * SEQUENCES;
    unsigned *arrived = a.arrived + 32 * group, waits = 0;

    DecodeStream<S::QUEUE> stream(a, b.index * S::WARPS + w, shared + w * S::QUEUE * 1024);
    auto look_ahead = [&](int number) {            // the last warp brings a step into the ring
        if (w != S::WARPS - 1 || number >= a.n_steps) return;
        DecodeNow* to = &ring[number % DECODE_RING];
        if (lane < (int)(sizeof(DecodeStep) / 4)) ((int*)&to->s)[lane] = ((const int*)(a.step + number))[lane];
        if (lane == 31) {
            Share own(a.step[number].O, b.index, b.blocks);
            to->first = own.first;
            to->count = own.count;
        }
    };
    for (int i = 0; i < 5; i++) look_ahead(i);
    {
        const Share own(a.D, b.index, b.blocks);
        int lg = power2_above(own.count), i = threadIdx.x & ((1 << lg) - 1);
        decode_residual<S>(a, a.norm, i < own.count ? a.norm[own.first + i] : 0.0f, b, own, true, a.tag);
    }
    if (!S::TAGGED) decode_arrive(arrived);

    DecodeStates<S, S::SSD> states;
    float2 best[S::BESTS];
    #pragma unroll
    for (int i = 0; i < S::BESTS; i++) best[i] = make_float2(-INFINITY, __int_as_float(INT_MAX));
    unsigned tag = a.tag - 1;
    #pragma unroll 1
    for (int number = 0; number < a.n_steps; number++) {
        const DecodeNow &now = ring[number % DECODE_RING], &later = ring[(number + 4) % DECODE_RING];
        const DecodeStep& s = now.s;
        MARK(0);
        const int kind = s.kind;
        const bool joined = S::SSD && s.joined;
        if (!joined) tag++;
        const Share own(now.first, now.count);
        const int rows = s.second ? 2 * own.count : own.count, tiles = (rows + 15) / 16, chunks = (s.K + 31) / 32;
        const char* input = kind == DECODE_X ? a.x : kind == DECODE_SCAN || (S::SSD && kind == DECODE_SSD) ? a.rbc : kind == DECODE_OUT ? a.y : a.u;
        const int ld = kind == DECODE_SCAN ? a.ld_rbc : s.K;
        const bool normed = kind == DECODE_IN || kind == DECODE_UP || kind == DECODE_HEAD || (S::SSD && (kind == DECODE_BC || s.gated));
        float* out = kind == DECODE_IN ? b.xz : b.out;
        // what does not depend on the other blocks
        look_ahead(number + 5);
        DecodeConv conv;
        float norm = 0;
        if (kind == DECODE_IN || (S::SSD && kind == DECODE_BC && own.count))
            conv.load(a, s, b, own, threadIdx.x, power2_above(own.count), kind == DECODE_IN ? a.E : 2 * a.G * a.N);
        if (kind == DECODE_IN) {
            const DecodeStep& scan = ring[(number + (S::SSD ? 1 : 2)) % DECODE_RING].s;
            states.load(a, scan, b, own, threadIdx.x >> decode_lanes<S::SSD>(a.N), power2_above(own.count));
        } else if (kind == DECODE_OUT) {
            int lg = power2_above(own.count), i = threadIdx.x & ((1 << lg) - 1);
            if (i < own.count) norm = s.p[0][own.first + i];
        }
        if (w == number % S::WARPS && number + 4 < a.n_steps && later.count)
            decode_prefetch(a, later.s, b, Share(later.first, later.count));
        MARK(1);
        if (!S::TAGGED && !joined) decode_wait(arrived, ++waits * b.blocks);
        if (!S::TAGGED) MARK(2);

        // the sequence that this lane loads in each tile; beyond the last one the last again
        const char* from[TILES];
        #pragma unroll
        for (int t = 0; t < TILES; t++)
            from[t] = input + ((size_t)(b.row0 + (8 * t + g < b.n ? 8 * t + g : b.n - 1)) * ld + 8 * q) * WIDTH;
        DecodeInput<S::TAGGED> v[AHEAD][TILES];
        auto load = [&](int c0) {
            #pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                int k = 32 * (c0 + i * S::WARPS);
                #pragma unroll
                for (int t = 0; t < TILES; t++) v[i][t].load(from[t] + k * WIDTH, k + 8 * q < s.K, tag);
            }
        };
        const bool once = chunks <= AHEAD * S::WARPS;                  // all inputs are in `stage` at a time
        #pragma unroll 1
        for (int first = 0; first < tiles; first += S::TALL) {
            #pragma unroll 1
            for (int c0 = first == 0 || !once ? w - AHEAD * S::WARPS : w; c0 < chunks; c0 += AHEAD * S::WARPS) {
                if (c0 >= 0 && (first == 0 || !once)) {
                    for (bool all = !S::TAGGED; !all;) {     // asked for together until all have arrived
                        all = true;
                        #pragma unroll
                        for (int i = 0; i < AHEAD; i++)
                            #pragma unroll
                            for (int t = 0; t < TILES; t++) all = all && v[i][t].arrived(tag);
                        if (!all) load(c0);
                    }
                    #pragma unroll
                    for (int i = 0; i < AHEAD; i++)
                        #pragma unroll
                        for (int t = 0; t < TILES; t++) stage[(i * TILES + t) * WARP] = v[i][t].value();
                    __syncwarp();
                    if (S::TAGGED && first == 0 && c0 == w) MARK(2);
                }
                if (c0 + AHEAD * S::WARPS < chunks) load(c0 + AHEAD * S::WARPS);
                if (c0 < 0) {
                    if (first > 0) continue;
                    // while the first inputs are on their way
                    if (normed && !joined)
                        decode_rms<S>(a, b, S::SSD && s.gated ? b.gated_squares : b.squares, S::SSD && s.gated ? a.E : a.D, tag);
                    if (kind != DECODE_SCAN && !(S::SSD && kind == DECODE_SSD)) continue;
                    const int words = S::SSD ? (2 * a.G * a.N + a.H) / 2 : a.N, lg = power2_above(words),
                              skip = S::SSD ? 0 : a.R;
                    #pragma unroll 1
                    for (int at = threadIdx.x; at < b.n << lg; at += S::THREADS) {
                        int i = at & ((1 << lg) - 1), n = at >> lg;
                        if (i >= words) continue;
                        const char* place = a.rbc + ((size_t)(b.row0 + n) * a.ld_rbc + skip + 2 * i) * WIDTH;
                        uint2 word = make_uint2(0, tag);
                        if (S::TAGGED) do word = decode_peek(place); while (word.y != tag);
                        else word.x = __ldcg((const uint32_t*)place);
                        *(float2*)&b.bc[(n * words + i) * 2] = make_float2(scan_low(word.x), scan_high(word.x));
                    }
                    __syncwarp();
                    continue;
                }
                const int mine = (chunks - c0 + S::WARPS - 1) / S::WARPS < AHEAD ? (chunks - c0 + S::WARPS - 1) / S::WARPS : AHEAD;
                #pragma unroll 1
                for (int r = 0; r < S::TALL && first + r < tiles; r++) {
                    float* part = &b.part[w * S::PART + r * TILES * 128 + 4 * lane];
                    float acc[2][TILES][4] = {};
                    #pragma unroll
                    for (int t = 0; t < TILES; t++) if (c0 > w) *(float4*)acc[0][t] = *(const float4*)(part + t * 128);
                    #pragma unroll 1
                    for (int i = 0; i < mine; i++) {
                        uint4 low, high;
                        stream.take(&low, &high);
                        const uint32_t k0[4] = {low.x, high.x, low.y, high.y}, k1[4] = {low.z, high.z, low.w, high.w};
                        #pragma unroll
                        for (int t = 0; t < TILES; t++) {
                            uint4 in = stage[(i * TILES + t) * WARP];
                            scan_mma_bf16(acc[0][t], k0, in.x, in.y);
                            scan_mma_bf16(acc[1][t], k1, in.z, in.w);
                        }
                    }
                    #pragma unroll
                    for (int t = 0; t < TILES; t++)
                        *(float4*)(part + t * 128) = make_float4(acc[0][t][0] + acc[1][t][0], acc[0][t][1] + acc[1][t][1],
                                                                 acc[0][t][2] + acc[1][t][2], acc[0][t][3] + acc[1][t][3]);
                }
            }
            MARK(3);
            __syncthreads();
            MARK(4);
            #pragma unroll
            for (int j = 0; j < S::VALUES; j++) {
                // value k of lane (g, q) is row g + 8 (k / 2), sequence 2q + k % 2
                int at = threadIdx.x + j * S::THREADS, tile = at / 128, source = at % 128 / 4, k = at % 4;
                int i = 16 * (first + tile / TILES) + (source >> 2) + 8 * (k >> 1);
                int n = 8 * (tile % TILES) + 2 * (source & 3) + (k & 1);
                if (at >= S::PART || i >= rows || n >= b.n) continue;
                float sum = 0;
                #pragma unroll
                for (int p = 0; p < S::WARPS; p++) if (p < chunks) sum += b.part[p * S::PART + at];
                int o = own.first + (i < own.count ? i : s.second + i - own.count);
                if (normed) sum *= b.scale[n];
                if (s.bias) sum += s.bias[o];
                if (kind != DECODE_HEAD) out[i * SEQUENCES + n] = sum;
                else {
                    if (a.logits) a.logits[(size_t)(b.row0 + n) * a.Vp + o] = sum;
                    if (o < a.V) decode_better(&best[j % S::BESTS], sum <= 3.4e38f ? sum : INFINITY, sum <= 3.4e38f ? o : -1);
                }
            }
            __syncthreads();
        }
        if (tiles == 0) __syncthreads();
        MARK(5);
        // values for the other blocks
        const DecodeStep& following = ring[(number + 1) % DECODE_RING].s;
        if (kind == DECODE_IN)
            decode_conv<S>(a, s, b, own, b.xz, a.E, S::SSD ? NULL : a.x, a.E, conv, tag + 1);
        else if (S::SSD && kind == DECODE_BC) {
            if (own.count) decode_conv<S>(a, s, b, own, b.out, 2 * a.G * a.N, a.rbc, a.ld_rbc, conv, tag + 1);
        } else if (kind == DECODE_OUT) decode_residual<S>(a, s.p[0], norm, b, own, false, tag + 1);
        else if (!S::SSD && kind == DECODE_SCAN) decode_scan<S, S::SSD>(a, s, b, own, states, tag + 1);
        else if (kind != DECODE_HEAD && own.count) {
            if (S::SSD && kind == DECODE_SSD) {
                decode_scan<S, S::SSD>(a, s, b, own, states, tag + 1);
                __syncthreads();
                if (s.p[3]) decode_squares<S>(b, b.out, own.count, b.gated_squares, tag + 1);
            }
            const int lg = power2_above(own.count), ld_out = kind == DECODE_X ? a.ld_rbc : s.O;
            char* to = kind == DECODE_X ? a.rbc : a.y;
            #pragma unroll 1
            for (int at = threadIdx.x; at < b.n << lg; at += S::THREADS) {
                int i = at & ((1 << lg) - 1), n = at >> lg;
                if (i >= own.count) continue;
                float z = S::SSD && kind == DECODE_SSD ? b.xz[(own.count + i) * SEQUENCES + n] : b.out[i * SEQUENCES + n];
                if (kind == DECODE_UP)
                    z = to_float(from_float<bf16>(z)) *
                        silu_cuda(to_float(from_float<bf16>(b.out[(own.count + i) * SEQUENCES + n])));
                decode_send<S>(to, (size_t)(b.row0 + n) * ld_out + own.first + i, z, tag + 1);
            }
        }
        MARK(6);
        if (!S::TAGGED && kind != DECODE_HEAD && !(S::SSD && following.joined)) decode_arrive(arrived);
        MARK(7);
    }
    if (!a.next) {          // nobody waits any more: the last one leaves a zero
        __syncthreads();
        if (threadIdx.x == 0 && atomicAdd(arrived, 1) == (waits + 1) * b.blocks - 1) *arrived = 0;
        return;
    }

    // the best of the block, of the group
    float2* all = (float2*)b.part;
    #pragma unroll
    for (int i = 0; i < S::BESTS; i++) all[threadIdx.x + i * S::THREADS] = best[i];
    __syncthreads();
    if ((int)threadIdx.x < b.n) {
        int n = threadIdx.x;
        float2 top = make_float2(-INFINITY, __int_as_float(INT_MAX));
        for (int p = n / 8; p < (TILES * 128 > S::THREADS ? TILES : S::THREADS / 128); p += TILES)
            #pragma unroll
            for (int i = 0; i < 16; i++) {
                float2 z = all[p * 128 + i / 2 * 16 + n % 8 / 2 * 4 + i % 2 * 2 + n % 2];
                decode_better(&top, z.x, __float_as_int(z.y));
            }
        b.best[b.index * SEQUENCES + n] = top;
    }
    decode_arrive(arrived);
    if (b.index > 0) return;
    decode_wait(arrived, ++waits * b.blocks);
    for (int n = w; n < b.n; n += S::WARPS) {
        float2 top = make_float2(-INFINITY, __int_as_float(INT_MAX));
        for (int i = lane; i < b.blocks; i += WARP) {
            float2 z = __ldcg(&b.best[i * SEQUENCES + n]);
            decode_better(&top, z.x, __float_as_int(z.y));
        }
        #pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2)
            decode_better(&top, __shfl_xor_sync(0xffffffffu, top.x, step), __float_as_int(__shfl_xor_sync(0xffffffffu, top.y, step)));
        int index = __float_as_int(top.y);
        if (lane == 0) a.next[b.row0 + n] = index == INT_MAX ? -1 : index;
    }
    if (threadIdx.x == 0) *arrived = 0;
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
// the flags of train_mamba.c (BACKWARD_ONLY also among what is saved):
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
    float *dres, *sums;             // sums: partial sums of the kernels
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
};

// side_fork: the side stream goes on behind what the main one has been given so far. side_join: the main
// stream waits for the side, whose inputs it may then overwrite.
template <typename X> static void side_fork(const CudaRun<X>* run) {
    cudaCheck(cudaEventRecord(run->side->ready, run->stream));
    cudaCheck(cudaStreamWaitEvent(run->side->stream, run->side->ready, 0));
}
template <typename X> static void side_join(const CudaRun<X>* run) {
    cudaCheck(cudaEventRecord(run->side->done, run->side->stream));
    cudaCheck(cudaStreamWaitEvent(run->stream, run->side->done, 0));
}

// linear_backward_weight: dweight (O,I) = or += dout^T inp on the side stream, dbias += sum of dout on the
// main one.   dout (M,O), inp (M,I), row strides lddo, ldi
template <typename X>
static void linear_backward_weight(const CudaRun<X>* run, float* dweight, float* dbias, const X* dout,
                                   size_t lddo, const X* inp, size_t ldi, float* sums, size_t I, size_t O) {
    size_t M = run->B * run->T;
    side_fork(run);
    matmul_backward_cuda(&run->side->matmul, (X*)NULL, 0, false, dweight, (float*)NULL, dout, lddo, inp, ldi,
                         (const X*)NULL, (float*)NULL, M, I, O, run->side->stream, run->add);
    if (dbias) bias_backward_cuda(dbias, dout, lddo, M, O, sums, run->stream);
}

// linear_backward_input: dinp (M,I) = dout weight, with `add` it is added to.   dout (M,O)   lddi, lddo: row
// strides
template <typename X>
static void linear_backward_input(const CudaRun<X>* run, X* dinp, size_t lddi, bool add, const X* dout,
                                  size_t lddo, const X* weight, size_t I, size_t O) {
    matmul_backward_cuda(run->matmul, dinp, lddi, add, (float*)NULL, (float*)NULL, dout, lddo, (const X*)NULL,
                         0, weight, (float*)NULL, run->B * run->T, I, O, run->stream);
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
    matmul_forward_cuda(run->matmul, out, ldo, acts->u, D, weight_x(L, weight), bias, M, D, O, run->stream);
}

// block_begin_backward: its backward, the end of every block's. shared->dres is the gradient of what the next
// norm read, dres_x the same in X; both come out as the gradient of what this block's norm read.
//   dout (M,O): the gradient of out   dnorm, dweight, dbias (or NULL): gradients of the parameters
template <typename X>
static void block_begin_backward(const CudaRun<X>* run, const LayerCuda<X>* L, const ActsCuda<X>* acts,
                                 const ScratchCuda<X>* shared, float* dnorm, float* dweight, float* dbias,
                                 const X* dout, size_t lddo, const float* norm, const float* weight,
                                 size_t O) {
    size_t M = run->B * run->T, D = (size_t)run->config->d_model;
    bool cheap = run->recompute == RECOMPUTE_CHEAP;          // u is made again by the norm's backward
    linear_backward_input(run, shared->du, D, false, dout, lddo, weight_x(L, weight), D, O);
    side_join(run);                                // dres_x, and with cheap u, are written again
    if (!cheap)
        linear_backward_weight(run, dweight, dbias, dout, lddo, acts->u, D, shared->sums, D, O);
    X* dres_x = run->dropout.place ? shared->dres_x : NULL;  // the first sub-layer has no other before it
    rmsnorm_backward_cuda(shared->dres, dres_x, cheap ? acts->u : NULL, dnorm, shared->du, acts->res, norm,
                          acts->rstd, shared->sums, M, D, run->stream, run->dropout);
    if (cheap)
        linear_backward_weight(run, dweight, dbias, dout, lddo, acts->u, D, shared->sums, D, O);
}

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

// floats of partial sums that the kernels of its backward need
static size_t mamba1_sums_cuda(const Config* c, size_t B, size_t T) {
    size_t E = (size_t)c->d_inner, scan = selective_scan_scratch_cuda(B, T, E, (size_t)c->d_state),
           conv = causal_conv1d_scratch_cuda(B, T, E, (size_t)c->d_conv),
           bias = bias_backward_scratch_cuda(B * T, 2 * E);
    return max_size(scan, max_size(conv, bias));
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
    causal_conv1d_forward_cuda(a->x, sT->conv, a->xz, 2 * E, s0->conv, p->conv1d, p->conv1d_bias, run->doc, B,
                               T, E, K, stream);
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
                                   run->doc, B, T, E, K, stream);
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
                                    run->doc, shared->sums, B, T, E, N, scan_spacing(run->recompute), stream);
    linear_backward_weight(run, dp->out_proj, dp->out_proj_bias, shared->dres_x, D, w->y, E, shared->sums, E,
                           D);
    linear_backward_weight(run, dp->dt_proj, (float*)NULL, w->ddt, E, a->rbc, RBC, shared->sums, R, E);
    linear_backward_input(run, w->drbc, RBC, false, w->ddt, E, weight_x(L, p->dt_proj), R, E);
    linear_backward_weight(run, dp->x_proj, (float*)NULL, w->drbc, RBC, a->x, E, shared->sums, E, RBC);
    linear_backward_input(run, w->dx, E, true, w->drbc, RBC, weight_x(L, p->x_proj), E, RBC);
    causal_conv1d_backward_cuda(w->dxz, 2 * E, dp->conv1d, dp->conv1d_bias, (float*)NULL, w->dx,
                                (const float*)NULL, a->xz, 2 * E, s0->conv, p->conv1d, p->conv1d_bias,
                                run->doc, shared->sums, B, T, E, K, stream);
    block_begin_backward(run, L, acts, shared, dp->norm, dp->in_proj, dp->in_proj_bias, w->dxz, 2 * E,
                         p->norm, p->in_proj, 2 * E);
}

// mamba1_decode_steps: the steps of section 4.10 that are this layer; norm: the weight of the next one. Returns
// their number, 0 when its sizes do not fit.
static int mamba1_decode_steps(const Config* c, const LayerCuda<bf16>* L, float* const* state,
                               const float* norm, DecodeStep* step) {
    const Mamba1Params* p = (const Mamba1Params*)L->p;
    const Mamba1State* s = (const Mamba1State*)state;
    int D = (int)c->d_model, E = (int)c->d_inner, R = (int)c->dt_rank;
    if (E % 32 || R % 8 || c->d_conv > 4) return 0;
    const DecodeStep steps[] = {
        {DECODE_IN, E, D, E, 0, 0, weight_x(L, p->in_proj), p->in_proj_bias, {p->conv1d, p->conv1d_bias}, s->conv},
        {DECODE_X, R + 2 * (int)c->d_state, E, 0, 0, 0, weight_x(L, p->x_proj), NULL, {}, NULL},
        {DECODE_SCAN, E, R, 0, 0, 0, weight_x(L, p->dt_proj), NULL, {p->A_log, p->D, p->dt_proj_bias}, s->ssm},
        {DECODE_OUT, D, E, 0, 0, 0, weight_x(L, p->out_proj), p->out_proj_bias, {norm}, NULL},
    };
    memcpy(step, steps, sizeof steps);
    return 4;
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
// 5.2 Gated MLP

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
    gate_forward_cuda(w->m, a->h, 2 * F, a->h + F, 2 * F, M, F, run->stream);
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
    gate_backward_cuda(w->dh, 2 * F, w->dh + F, 2 * F, w->m, w->dm, a->h, 2 * F, a->h + F, 2 * F, M, F,
                       run->stream);
    linear_backward_weight(run, dp->fc2, (float*)NULL, shared->dres_x, D, w->m, F, shared->sums, F, D);
    block_begin_backward(run, L, acts, shared, dp->norm, dp->fc1, (float*)NULL, w->dh, 2 * F, p->norm, p->fc1,
                         2 * F);
}

static int mlp_decode_steps(const Config* c, const LayerCuda<bf16>* L, float* const*, const float* norm,
                            DecodeStep* step) {
    const MlpParams* p = (const MlpParams*)L->p;
    int D = (int)c->d_model, F = (int)c->d_intermediate;
    if (F % 32) return 0;
    step[0] = {DECODE_UP, F, D, F, 0, 0, weight_x(L, p->fc1), NULL, {}, NULL};
    step[1] = {DECODE_OUT, D, F, 0, 0, 0, weight_x(L, p->fc2), NULL, {norm}, NULL};
    return 2;
}

// --------------------------------------------------------------------------------------------------
// 5.3 The table of kinds

template <typename X> struct KindCuda {
    char letter;                                   // of the kind in train_mamba.c
    const TensorSpec* acts;    int n_acts;         // saved for backward
    const TensorSpec* scratch; int n_scratch;
    size_t (*sums)(const Config*, size_t B, size_t T);       // floats of partial sums; NULL: none
    void (*forward)(const CudaRun<X>*, const LayerCuda<X>*, const ActsCuda<X>*, const ScratchCuda<X>*,
                    const float* res_in, const X* delta_in, float* const* state0, float* const* stateT);
    void (*backward)(const CudaRun<X>*, const LayerCuda<X>*, const ActsCuda<X>*, const ScratchCuda<X>*,
                     float* const* state0);
    int (*decode)(const Config*, const LayerCuda<bf16>*, float* const* state, const float* norm,
                  DecodeStep*);                    // section 4.10: its steps for one token
    void (*paths)(const Config*);                  // prints which of its kernels are fast; NULL: no choice
};

enum { N_KINDS_CUDA = 2 };
template <typename X> static const KindCuda<X> kinds_cuda[N_KINDS_CUDA] = {
    {'1', TABLE(mamba1_acts_cuda), TABLE(mamba1_scratch_cuda), mamba1_sums_cuda, mamba1_block_forward_cuda<X>,
     mamba1_block_backward_cuda<X>, mamba1_decode_steps, mamba1_paths<X>},
    {'m', TABLE(mlp_acts_cuda), TABLE(mlp_scratch_cuda), NULL, mlp_block_forward_cuda<X>,
     mlp_block_backward_cuda<X>, mlp_decode_steps, NULL},
};

#define SAME_FIELDS(type, table)                                          \
    static_assert(FIELDS(type<float>) == sizeof(table) / sizeof(TensorSpec), "one row per field, in order")
SAME_FIELDS(Mamba1ActsCuda, mamba1_acts_cuda);
SAME_FIELDS(Mamba1ScratchCuda, mamba1_scratch_cuda);
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
    float *res_last, *f_rstd, *losses;
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
    w->saved_bytes = arena->used - before;

    ScratchCuda<X>* s = &w->scratch;
    size_t start = arena->used, end;
    arena_take(arena, &w->logits, rows * Vp);
    end = arena->used;
    arena->used = train ? start : end;         // decoding keeps its last outputs beside the logits
    arena_take(arena, &s->delta, M * D);
    size_t sums = max_size(rmsnorm_backward_scratch_cuda(M, D), bias_backward_scratch_cuda(M, D));
    for (int k = 0; k < N_KINDS_CUDA; k++) {
        const KindCuda<X>* kind = &kinds_cuda<X>[k];
        if (first[k] < 0) continue;
        for (int i = 0; i < kind->n_scratch; i++)
            if (train || !(kind->scratch[i].flags & BACKWARD_ONLY))
                take(&w->kind_scratch[k][i], &kind->scratch[i]);
        if (kind->sums) sums = max_size(sums, kind->sums(c, B, T));
    }
    if (train) {
        arena_take(arena, &s->dres, M * D);
        arena_take(arena, &s->dres_x, M * D);
        arena_take(arena, &s->du, M * D);
        // a smaller call may cut time differently; its partial sums are never more than twice those of the
        // full one
        arena_take(arena, &s->sums, 2 * sums);
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
    while (high < (size_t)1 << 32 && fits(high)) { low = high; high *= 2; }
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (fits(middle)) low = middle;
        else high = middle;
    }
    return low;
}

template <typename X>
WorkCuda<X> work_create(const Model* m, size_t B, size_t T, size_t micros, bool training, int recompute) {
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

// the fields of one layer's state in a device copy of a State; all NULL without one
static void state_fields(float* field[MAX_FIELDS], const Model* m, float* device, const State* host, int l,
                         size_t row0) {
    for (int i = 0; i < MAX_FIELDS; i++) field[i] = NULL;
    for (int i = 0; device && i < m->layer[l].kind->n_state; i++)
        field[i] = device + (host->field[l][i] - host->data) +
                   row0 * spec_count(&m->layer[l].kind->state[i], &m->config);
}

// model_forward_cuda: tokens (B,T) to w->f. state: device copies of `host`-shaped states, from row0 on, or
// NULL
template <typename X>
void model_forward_cuda(const Model* m, const ModelCuda<X>* d, WorkCuda<X>* w, CudaRun<X>* run,
                        const int* tokens, float* state0, float* stateT, const State* host, size_t row0) {
    size_t M = run->B * run->T, D = (size_t)m->config.d_model;
    const float* res = w->acts[0].res;
    run->dropout.place = 0;
    const X* delta = NULL;
    embedding_forward_cuda(w->acts[0].res, tokens, d->embedding_x, M, D, run->stream, run->dropout);
    for (int l = 0; l < m->n_layers; l++) {
        float *s0[MAX_FIELDS], *sT[MAX_FIELDS];
        state_fields(s0, m, state0, host, l, row0);
        state_fields(sT, m, stateT, host, l, row0);
        d->layer[l].kind->forward(run, &d->layer[l], &w->acts[l], &w->scratch, res, delta, s0, sT);
        res = w->acts[l].res;
        delta = w->scratch.delta;
        run->dropout.place++;
    }
    residual_rmsnorm_forward_cuda(w->res_last, w->f, w->f_rstd, res, delta, d->norm_f, M, D,
                                  (float)m->config.norm_eps, run->stream, run->dropout);
}

// The shapes of decode_kernel, chosen by the number of sequences
typedef DecodeShape<1, 16, true, 4, 3, 10> DecodeFew;
typedef DecodeShape<2, 16, false, 2, 3, 6> DecodeSome;
typedef DecodeShape<4, 16, false, 2, 2, 4> DecodeMany;

// DecodePlan: what decode_kernel needs besides the tokens, with its device memory. Made once per session.
typedef struct {
    Decode a;
    int groups, threads;
    void (*kernel)(Decode);
    size_t shared, bytes;
    void *memory, *weights;
} DecodePlan;

// decode_pack: the streams of weights
template <class S> static void decode_pack(DecodePlan* p) {
    Decode* a = &p->a;
    size_t streams = (size_t)a->blocks * S::WARPS;
    uint2 *start = (uint2*)xcalloc(streams, sizeof(uint2)), *size, sum = {0, 0};
    cudaCheck(cudaMalloc((void**)&size, streams * sizeof(uint2)));
    cudaCheck(cudaDeviceSynchronize());                      // the weights may be on their way
    decode_pack_kernel<S><<<(unsigned)streams, 2 * WARP>>>(NULL, NULL, NULL, size, a->step, a->n_steps, a->blocks);
    cudaCheck(cudaGetLastError());
    cudaCheck(cudaMemcpy(start, size, streams * sizeof(uint2), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < streams; i++) {
        uint2 n = start[i];
        start[i] = sum;
        sum.x += n.x;
        sum.y += n.y;
    }
    uint2* start_on_device;
    uint32_t* run;
    char* weights;
    for (int pass = 0; pass < 2; pass++) {
        ArenaCuda arena = {(char*)p->weights, 0};
        arena_take(&arena, &weights, (size_t)sum.x * 64 + 1024);
        arena_take(&arena, &start_on_device, streams);
        arena_take(&arena, &run, (size_t)sum.y);
        if (!pass) p->weights = device_calloc(arena.used, 1);
        if (!pass) p->bytes += arena.used;
    }
    cudaCheck(cudaMemcpy(start_on_device, start, streams * sizeof(uint2), cudaMemcpyHostToDevice));
    decode_pack_kernel<S><<<(unsigned)streams, 2 * WARP>>>(weights, run, start_on_device, NULL, a->step, a->n_steps,
                                                           a->blocks);
    cudaCheck(cudaGetLastError());
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaFree(size));
    free(start);
    a->weights = weights;
    a->start = start_on_device;
    a->run = run;
}

// decode_plan: false when the sizes do not fit section 4.10; then nothing was allocated
template <class S>
static bool decode_plan_of(DecodePlan* p, const Model* m, const ModelCuda<bf16>* d, size_t rows, float* state,
                           const State* host) {
    const Config* c = &m->config;
    int D = (int)c->d_model, E = (int)c->d_inner, N = (int)c->d_state, R = (int)c->dt_rank, RBC = R + 2 * N,
        F = (int)c->d_intermediate, Vp = (int)c->vocab_padded, processors, most;
    memset(p, 0, sizeof *p);
    if (rows > DECODE_ROWS || D % 32) return false;
    p->groups = ((int)rows + S::SEQUENCES - 1) / S::SEQUENCES;
    cudaCheck(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
    cudaCheck(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    Decode* a = &p->a;
    a->blocks = processors / p->groups;
    if (a->blocks > D / 2) a->blocks = D / 2;      // every block has a part of every row
    a->rows = (int)rows;
    a->D = D; a->E = E; a->N = N; a->R = R; a->F = F; a->Vp = Vp;
    a->taps = (int)c->d_conv;
    a->V = (int)c->vocab_size;
    a->eps = (float)c->norm_eps;
    a->channels = E;
    a->G = 1;
    a->ld_rbc = (RBC + 7) / 8 * 8;
    auto share = [&](int O) { return 2 * ((O / 2 + a->blocks - 1) / a->blocks); };
    int floats = 0;
    auto take = [&](int n) {
        int at = floats;
        floats += (n + 3) / 4 * 4;
        return at;
    };
    int out = share(D);
    for (int n : {share(RBC), share(E), 2 * share(F)}) out = n > out ? n : out;
    a->out_at = take(out * S::SEQUENCES);
    a->xz_at = take(2 * share(E) * S::SEQUENCES);
    a->bc_at = take(2 * N * S::SEQUENCES);
    a->res_at = take(share(D) * S::SEQUENCES);
    a->scale_at = take(S::SEQUENCES);
    p->shared = S::MEMORY + (size_t)floats * sizeof(float);
    if (p->shared + 2048 > (size_t)most || a->blocks == 0) return false;

    DecodeStep* step = (DecodeStep*)xcalloc((size_t)m->n_layers * DECODE_MAX_STEPS + 1, sizeof(DecodeStep));
    int n = 0, added = 1;
    for (int l = 0; added && l < m->n_layers; l++, n += added) {
        float* field[MAX_FIELDS];
        state_fields(field, m, state, host, l, 0);
        const LayerCuda<bf16>* L = &d->layer[l];
        // the first parameter of every kind is its norm
        added = L->kind->decode(c, L, field, l + 1 < m->n_layers ? L[1].p[0] : d->norm_f, step + n);
    }
    if (!added) {
        free(step);
        return false;
    }
    step[n++] = {DECODE_HEAD, Vp, D, 0, 0, 0, d->head_x, NULL, {}, NULL};
    a->n_steps = n;
    a->embedding = d->embedding_x;
    a->norm = d->layer[0].p[0];
    size_t places = (size_t)p->groups * (size_t)a->blocks * S::SEQUENCES;
    DecodeStep* on_device;
    for (int pass = 0; pass < 2; pass++) {
        ArenaCuda arena = {(char*)p->memory, 0};
        arena_take(&arena, &on_device, (size_t)n);
        arena_take(&arena, &a->u, rows * (size_t)D * S::WIDTH);
        arena_take(&arena, &a->x, rows * (size_t)E * S::WIDTH);
        arena_take(&arena, &a->rbc, rows * (size_t)a->ld_rbc * S::WIDTH);
        arena_take(&arena, &a->y, rows * (size_t)(E > F ? E : F) * S::WIDTH);
        arena_take(&arena, &a->squares, 2 * places);
        arena_take(&arena, &a->best, places);
        arena_take(&arena, &a->arrived, (size_t)p->groups * 32);
        p->bytes = arena.used;
        if (!pass) p->memory = device_calloc(p->bytes, 1);
    }
    a->step = on_device;
    cudaCheck(cudaMemcpy(on_device, step, (size_t)n * sizeof(DecodeStep), cudaMemcpyHostToDevice));
    free(step);
    decode_pack<S>(p);
    p->kernel = decode_kernel<S>;
    p->threads = S::THREADS;
    cudaCheck(cudaFuncSetAttribute(p->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)p->shared));
    return true;
}

static bool decode_plan(DecodePlan* p, const Model* m, const ModelCuda<bf16>* d, size_t rows, float* state,
                        const State* host) {
#ifdef DECODE_EXPERIMENT
    const char* shape = getenv("SHAPE") ? getenv("SHAPE") : "";
    #define TRY(name, ...) if (strcmp(shape, name) == 0) return decode_plan_of<DecodeShape<__VA_ARGS__> >(p, m, d, rows, state, host)
    TRY("16a6", 1, 16, true, 4, 6, 8);
    TRY("8a6", 1, 8, true, 4, 6, 16);
    TRY("8c", 1, 8, false, 4, 6, 16);
    TRY("4c8", 4, 8, false, 2, 4, 8);
    TRY("2t8", 2, 8, true, 2, 3, 8);
#endif
    if (rows <= 8) return decode_plan_of<DecodeFew>(p, m, d, rows, state, host);
    if (rows <= 16) return decode_plan_of<DecodeSome>(p, m, d, rows, state, host);
    return decode_plan_of<DecodeMany>(p, m, d, rows, state, host);
}

// decode_cuda: one token of each sequence; the logits to `logits`, the most likely next tokens to `next`,
// which may be NULL
static void decode_cuda(DecodePlan* p, const int* tokens, float* logits, int* next, cudaStream_t stream) {
    p->a.tag += (unsigned)p->a.n_steps + 1;
    Decode a = p->a;
    a.logits = logits;
    a.next = next;
#ifdef DECODE_PROFILE
    a.profile = decode_profile;
#endif
    memcpy(a.token, tokens, (size_t)a.rows * sizeof(int));
    void* args[] = {&a};
    cudaCheck(cudaLaunchCooperativeKernel((const void*)p->kernel, dim3((unsigned)(p->groups * a.blocks)),
                                          dim3((unsigned)p->threads), args, p->shared, stream));
}

// argmax: *token = the index of the largest of n logits of each row, the first of equals, -1 when one is not
// finite (an exploded model). One block per row. The next step reads the tokens where they are.
__global__ void __launch_bounds__(1024) argmax_kernel(int* token, const float* logits, size_t ld, int n) {
    __shared__ float best_of[WARP];
    __shared__ int index_of[WARP];
    const float* row = logits + blockIdx.x * ld;
    float best = -INFINITY;
    int index = INT_MAX;
    bool bad = false;
    for (int i = threadIdx.x; i < n; i += 1024) {
        float z = row[i];
        bad = bad || !(z <= 3.4e38f);
        if (z > best) { best = z; index = i; }
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
    if (threadIdx.x == 0) token[blockIdx.x] = bad || index == INT_MAX ? -1 : index;
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
                         const int* tokens, float* state0, const State* host) {
    size_t M = run->B * run->T, D = (size_t)m->config.d_model;
    ScratchCuda<X>* s = &w->scratch;
    side_fork(run);
    cudaCheck(cudaMemsetAsync(s->dres, 0, M * D * sizeof(float), run->stream));
    run->dropout.place = (uint64_t)m->n_layers;
    rmsnorm_backward_cuda(s->dres, s->dres_x, (X*)NULL, d->dnorm_f, w->df, w->res_last, d->norm_f, w->f_rstd,
                          s->sums, M, D, run->stream, run->dropout);
    for (int l = m->n_layers - 1; l >= 0; l--) {
        float *s0[MAX_FIELDS], *none[MAX_FIELDS] = {NULL};
        state_fields(s0, m, state0, host, l, 0);
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

// Carried states of one micro-batch, laid out as State: for every layer and field (rows, count).
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
    // carried states of `micros` micro-batches, each as State; n_state floats each
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
    int* host_tokens;                  // pinned
    float* host_logits;
    DecodePlan plan;                   // bf16
    bool planned;
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
                      true, &c->side};
    return run;
}

template <typename Y> static void to_device(Y* device, const Y* host, size_t n, cudaStream_t stream) {
    cudaCheck(cudaMemcpyAsync(device, host, n * sizeof(Y), cudaMemcpyHostToDevice, stream));
}
template <typename Y> static void to_host(Y* host, const Y* device, size_t n, cudaStream_t stream) {
    cudaCheck(cudaMemcpyAsync(host, device, n * sizeof(Y), cudaMemcpyDeviceToHost, stream));
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
    size_t n_state = B * state_count(m);
    if (c->micros >= micros && c->n_state == n_state) return;
    cudaCheck(cudaFree(c->carry_in));
    cudaCheck(cudaFree(c->carry_out));
    cudaCheck(cudaFree(c->field));
    c->micros = micros;
    c->n_state = n_state;
    c->carry_in = (float*)device_calloc(micros * n_state, sizeof(float));
    c->carry_out = (float*)device_calloc(micros * n_state, sizeof(float));
    StateField* field = (StateField*)xcalloc((size_t)m->n_layers * MAX_FIELDS, sizeof(StateField));
    size_t offset = 0;
    c->n_fields = 0;
    for (int l = 0; l < m->n_layers; l++)
        for (int i = 0; i < m->layer[l].kind->n_state; i++) {
            StateField f = {offset, spec_count(&m->layer[l].kind->state[i], &m->config)};
            field[c->n_fields++] = f;
            offset += B * f.count;
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
    const State* host = NULL;
    if (b->carry_in && micro >= 0) {
        carry_reserve<X>(b, (size_t)micro + 1, B);
        host = &b->carry_in[micro];
        s0 = c->carry_in + (size_t)micro * c->n_state;
        sT = c->carry_out + (size_t)micro * c->n_state;
        to_device(s0, host->data, host->n_elements, c->stream);
    }
    to_device(batch->tokens, tokens, M, c->stream);
    to_device(batch->targets, targets, M, c->stream);
    to_device(&batch->step->scale, &scale_float, 1, c->stream);
    to_device(&batch->step->dropout_key, &b->dropout.key, 1, c->stream);
    if (doc) to_device(batch->doc, doc, M, c->stream);
    CudaRun<X> run = run_of<X>(b, micro, doc ? batch->doc : NULL, B, T, w->recompute);
    model_forward_cuda(b->model, &c->model, w, &run, batch->tokens, s0, sT, host, 0);
    model_loss_cuda(b->model, &c->model, w, &run, batch->targets, &batch->step->scale, scale > 0,
                    b->token_best ? batch->targets : (int*)NULL);
    if (b->token_loss) to_host(b->token_loss, w->losses, M, c->stream);
    if (b->token_best) to_host(b->token_best, batch->targets, M, c->stream);
    loss_sum_kernel<<<1, 1024, 0, c->stream>>>(&c->out->loss, w->losses, M, true);
    cudaCheck(cudaGetLastError());
    double sum;
    to_host(&sum, &c->out->loss, 1, c->stream);
    if (sT) to_host(b->carry_out[micro].data, sT, b->carry_out[micro].n_elements, c->stream);
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
                        carried ? c->carry_in + (size_t)micro * c->n_state : NULL,
                        carried ? &b->carry_in[micro] : NULL);
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
        const State* host = NULL;
        if (b->carry_in) {
            host = &b->carry_in[micro];
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
        model_forward_cuda(b->model, d, w, &run, tokens, s0, sT, host, 0);
        model_loss_cuda(b->model, d, w, &run, batch->targets + micro * M, &batch->step->scale, true);
        loss_sum_kernel<<<1, 1024, 0, c->stream>>>(&c->out->loss, w->losses, M, micro == 0);
        cudaCheck(cudaGetLastError());
        model_backward_cuda(b->model, d, w, &run, tokens, s0, host);
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
        to_device(c->carry_in + i * c->n_state, b->carry_in[i].data, c->n_state, c->stream);
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
        to_host(b->carry_in[i].data, c->carry_in + i * c->n_state, c->n_state, c->stream);
    cudaCheck(cudaStreamSynchronize(c->stream));
}

// --- generation

static bool session_plan(CudaSession<bf16>* d, const Model* m, const ModelCuda<bf16>* model, const Session* s) {
    return decode_plan(&d->plan, m, model, s->rows, d->state, &s->state);
}
static bool session_plan(CudaSession<float>*, const Model*, const ModelCuda<float>*, const Session*) { return false; }

template <typename X> static void cuda_session_open(Backend* b, Session* s) {
    CudaSession<X>* d = (CudaSession<X>*)xcalloc(1, sizeof(CudaSession<X>));
    size_t tokens = s->chunk > s->rows ? s->chunk : s->rows, Vp = (size_t)b->model->config.vocab_padded;
    d->work = work_create<X>(b->model, 1, tokens, 1, false, RECOMPUTE_NONE);
    d->state = (float*)device_calloc(s->state.n_elements, sizeof(float));
    d->logits = (float*)device_calloc(s->rows * Vp, sizeof(float));
    d->host_tokens = (int*)host_pinned(tokens * sizeof(int));
    d->host_logits = (float*)host_pinned(s->rows * Vp * sizeof(float));
    d->planned = session_plan(d, b->model, &cuda_of<X>(b)->model, s);
    s->device = d;
}

template <typename X> static void cuda_session_close(Backend* b, Session* s) {
    CudaSession<X>* d = (CudaSession<X>*)s->device;
    cudaCheck(cudaStreamSynchronize(cuda_of<X>(b)->stream));
    work_free(&d->work);
    device_bytes -= (s->state.n_elements + s->rows * (size_t)b->model->config.vocab_padded) * sizeof(float);
    cudaCheck(cudaFree(d->state));
    cudaCheck(cudaFree(d->logits));
    cudaCheck(cudaFreeHost(d->host_tokens));
    cudaCheck(cudaFreeHost(d->host_logits));
    for (int i = 0; i < 2; i++)
        if (d->graph[i]) cudaCheck(cudaGraphExecDestroy(d->graph[i]));
    if (d->planned) {
        device_bytes -= d->plan.bytes;
        cudaCheck(cudaFree(d->plan.memory));
        cudaCheck(cudaFree(d->plan.weights));
    }
    free(d);
}

template <typename X> static void cuda_session_sync(Backend* b, Session* s, bool to_the_host) {
    CudaBackend<X>* c = cuda_of<X>(b);
    CudaSession<X>* d = (CudaSession<X>*)s->device;
    if (to_the_host) to_host(s->state.data, d->state, s->state.n_elements, c->stream);
    else to_device(d->state, s->state.data, s->state.n_elements, c->stream);
    cudaCheck(cudaStreamSynchronize(c->stream));
}

// decode_launch: T tokens of `rows` sequences from row0 on, then with `logits` those after the last token;
// they stay in d->logits
template <typename X>
static void decode_launch(Backend* b, Session* s, size_t row0, size_t rows, size_t T, bool logits) {
    CudaBackend<X>* c = cuda_of<X>(b);
    CudaSession<X>* d = (CudaSession<X>*)s->device;
    WorkCuda<X>* w = &d->work;
    size_t D = (size_t)b->model->config.d_model, Vp = (size_t)b->model->config.vocab_padded;
    to_device(w->batch.tokens, d->host_tokens, rows * T, c->stream);
    CudaRun<X> run = run_of<X>(b, -1, NULL, rows, T, RECOMPUTE_NONE);
    model_forward_cuda(b->model, &c->model, w, &run, w->batch.tokens, d->state, d->state, &s->state, row0);
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

// A token for every sequence, the usual case, is recorded as a graph the second time it comes.
template <typename X, typename Launch>
static void decode_run(Backend* b, Session* s, const int* tokens, size_t n, int kind, bool usual,
                       Launch launch) {
    CudaBackend<X>* c = cuda_of<X>(b);
    CudaSession<X>* d = (CudaSession<X>*)s->device;
    memcpy(d->host_tokens, tokens, n * sizeof(int));
    if (!usual || d->decoded[kind]++ == 0) {
        launch();
    } else {
        if (!d->graph[kind]) d->graph[kind] = graph_record(c->stream, launch);
        cudaCheck(cudaGraphLaunch(d->graph[kind], c->stream));
    }
    cudaCheck(cudaStreamSynchronize(c->stream));
}

template <typename X>
static void cuda_decode(Backend* b, Session* s, size_t row0, size_t rows, const int* tokens, size_t T,
                        real* logits) {
    CudaSession<X>* d = (CudaSession<X>*)s->device;
    size_t n = rows * (size_t)b->model->config.vocab_padded;
    if (d->planned && T == 1 && rows == s->rows && logits) {
        cudaStream_t stream = cuda_of<X>(b)->stream;
        decode_cuda(&d->plan, tokens, d->logits, NULL, stream);
        to_host(d->host_logits, d->logits, n, stream);
        cudaCheck(cudaStreamSynchronize(stream));
    } else decode_run<X>(b, s, tokens, rows * T, 0, T == 1 && rows == s->rows && logits, [&] {
        decode_launch<X>(b, s, row0, rows, T, logits != NULL);
        if (logits) to_host(d->host_logits, d->logits, n, cuda_of<X>(b)->stream);
    });
    if (logits) memcpy(logits, d->host_logits, n * sizeof(float));
}

template <typename X>
static void cuda_decode_greedy(Backend* b, Session* s, const int* tokens, int* next) {
    CudaSession<X>* d = (CudaSession<X>*)s->device;
    if (d->planned) {                                       // pinned memory: the kernel writes it by itself
        decode_cuda(&d->plan, tokens, NULL, d->host_tokens, cuda_of<X>(b)->stream);
        cudaCheck(cudaStreamSynchronize(cuda_of<X>(b)->stream));
    } else decode_run<X>(b, s, tokens, s->rows, 1, true, [&] {
        cudaStream_t stream = cuda_of<X>(b)->stream;
        decode_launch<X>(b, s, 0, s->rows, 1, true);
        argmax_kernel<<<(unsigned)s->rows, 1024, 0, stream>>>(d->work.batch.targets, d->logits,
                                                              (size_t)b->model->config.vocab_padded,
                                                              (int)b->model->config.vocab_size);
        cudaCheck(cudaGetLastError());
        to_host(d->host_tokens, d->work.batch.targets, s->rows, stream);
    });
    memcpy(next, d->host_tokens, s->rows * sizeof(int));
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
    b.decode_greedy = cuda_decode_greedy<X>;
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
