// ssm.c on the GPU: the layers of train_mamba.c as fused CUDA kernels, the device model, a CUDA backend.
//
// This file includes train_mamba.c: configuration, tensor table, files, data, training loop, generation,
// command line and the CPU oracle exist once. Sections have the numbers and names of their counterparts
// there.
//   bf16  activations and matmuls, fp32 parameters (masters), residual stream, scan state, decay and every
//   reduction fp32  everything, for exact comparison (--precision fp32)
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
    die("%s:%d: CUDA: %s", file, line, cudaGetErrorString(status));
}

#define cublasCheck(call) cublas_check((call), __FILE__, __LINE__)
void cublas_check(cublasStatus_t status, const char* file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS)
        die("%s:%d: cuBLASLt: %s", file, line, cublasLtGetStatusString(status));
}

void* device_calloc(size_t count, size_t size) {
    void* p;
    cudaCheck(cudaMalloc(&p, count > 0 && size > 0 ? count * size : 1));
    cudaCheck(cudaMemset(p, 0, count * size));
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
// type X, sums in fp32. The first algorithm of the heuristic is fixed per shape, with a workspace of fixed
// size and no reduction in place: the same shape gives the same bits, whatever else uses the GPU.

enum { MATMUL_WORKSPACE = 64 << 20 };

typedef struct {
    int op_a, op_b, type_ab, type_c;
    size_t M, N, K, lda, ldb, ldc;
    int64_t align;           // of the pointers: 16 when all are multiples of 16 bytes, otherwise 2 or 4
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

// matmul_plan: the description and algorithm for one shape, made at its first use.
static MatmulPlan* matmul_plan(Matmul* mm, const MatmulKey* key, const void* a, const void* b,
                               const void* c) {
    for (int i = 0; i < mm->n_plans; i++)
        if (memcmp(&mm->plan[i].key, key, sizeof *key) == 0) return &mm->plan[i];
    mm->plan = (MatmulPlan*)xrealloc(mm->plan, (size_t)mm->n_plans + 1, sizeof(MatmulPlan));
    MatmulPlan* p = &mm->plan[mm->n_plans++];
    memset(p, 0, sizeof *p);
    p->key = *key;
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
    uint32_t schemes =
        CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;    // split sums are added from the workspace, in order
    uint32_t align_a = pointer_alignment(a), align_b = pointer_alignment(b), align_c = pointer_alignment(c);
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                     &workspace, sizeof workspace));
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                     &schemes, sizeof schemes));
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                                                     &align_a, sizeof align_a));
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                                                     &align_b, sizeof align_b));
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                                                     &align_c, sizeof align_c));
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                                                     &align_c, sizeof align_c));
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(mm->handle, p->desc, p->a, p->b, p->c, p->c,
                                                           preference, 1, &result, &found);
    cublasLtMatmulPreferenceDestroy(preference);
    if (status != CUBLAS_STATUS_SUCCESS || found == 0)
        die("cuBLASLt has no algorithm for a matmul of %zu x %zu x %zu", key->M, key->N, key->K);
    p->algo = result.algo;
    return p;
}

// gemm: column-major C (M,N) = op(A) op(B) + beta C
template <typename X, typename C>
static void gemm(Matmul* mm, C* c, size_t ldc, const X* a, size_t lda, bool transpose_a, const X* b,
                 size_t ldb, bool transpose_b, size_t M, size_t N, size_t K, float beta,
                 cudaStream_t stream) {
    MatmulKey key;
    memset(&key, 0, sizeof key);
    key.op_a = transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    key.op_b = transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    key.type_ab = CudaType<X>::value;
    key.type_c = CudaType<C>::value;
    key.M = M; key.N = N; key.K = K; key.lda = lda; key.ldb = ldb; key.ldc = ldc;
    key.align = pointer_alignment(a) * 10000 + pointer_alignment(b) * 100 + pointer_alignment(c);
    MatmulPlan* p = matmul_plan(mm, &key, a, b, c);
    float one = 1;
    cublasCheck(cublasLtMatmul(mm->handle, p->desc, &one, a, p->a, b, p->b, &beta, c, p->c, c, p->c, &p->algo,
                               mm->workspace, MATMUL_WORKSPACE, stream));
}

// bias_forward_cuda: out[m,o] += bias[o].   out (M,O), row stride ldo
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
// added to.
template <typename X>
void matmul_backward_cuda(Matmul* mm, X* dinp, size_t lddi, bool add_dinp, float* dweight, float* dbias,
                          const X* dout, size_t lddo, const X* inp, size_t ldi, const X* weight,
                          float* scratch, size_t M, size_t I, size_t O, cudaStream_t stream) {
    if (dinp)
        gemm(mm, dinp, lddi, weight, I, false, dout, lddo, false, I, M, O, add_dinp ? 1.0f : 0.0f, stream);
    if (dweight) gemm(mm, dweight, I, inp, ldi, false, dout, lddo, true, I, O, M, 1.0f, stream);
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

// Between two kernels of a stream lie one or two microseconds, in which the first ends and the second starts.
// A kernel may be launched (see sum_parts_cuda) to start as soon as all blocks of the one before have called
// let_next_kernel_start or ended; before it reads what that one writes it must call wait_for_previous_kernel.
// This needs compute capability 9.0; without it both functions do nothing.
__device__ __forceinline__ void let_next_kernel_start(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// sum_parts: the second stage of a sum.   out[i] += sum_p parts[p,i],  out2[i] += sum_p parts[p,n+i]
//   parts (P,n+n2), row stride ld   out (n)   out2 (n2)
// A block sums 32 columns, its warps every SUM_WARPSth part each; then one warp adds these sums in order. The
// kernel before it in the stream must be the one that writes parts.
enum { SUM_WARPS = 16 };

__global__ void __launch_bounds__(WARP * SUM_WARPS)
sum_parts_kernel(float* out, float* out2, const float* parts, size_t P, size_t n, size_t n2, size_t ld) {
    __shared__ float sum[SUM_WARPS][WARP];
    size_t i = (size_t)blockIdx.x * WARP + threadIdx.x;
    float acc = 0, *to = i < n ? out + i : out2 + (i - n);
    bool last = threadIdx.y == 0 && i < n + n2;
    float before = last ? *to : 0.0f;
    wait_for_previous_kernel();
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

// --------------------------------------------------------------------------------------------------
// 4.2 Embedding

// embedding_forward: res[m,:] = weight[tokens[m],:].   res (M,D) float   weight (Vp,D)   tokens (M)
// One block per token.   bytes: 4 + sizeof(X) per element
template <typename X, int W>
__global__ void embedding_forward_kernel(float* res, const int* tokens, const X* weight, size_t D) {
    const X* row = weight + (size_t)tokens[blockIdx.x] * D;
    float* out = res + (size_t)blockIdx.x * D;
    for (size_t d = threadIdx.x * W; d < D; d += blockDim.x * W) {
        float v[W];
        unpack<W>(v, load_pack<W>(row + d));
        store_pack<W>(out + d, v);
    }
}

template <typename X>
void embedding_forward_cuda(float* res, const int* tokens, const X* weight, size_t M, size_t D,
                            cudaStream_t stream) {
    if (is_aligned(weight, 4 * sizeof(X), D * sizeof(X)) && is_aligned(res, 16, D * 4)) {
        unsigned threads = (unsigned)(D < 1024 ? (D / 4 + WARP - 1) / WARP * WARP : 256);
        embedding_forward_kernel<X, 4><<<(unsigned)M, threads, 0, stream>>>(res, tokens, weight, D);
    } else {
        embedding_forward_kernel<X, 1><<<(unsigned)M, 256, 0, stream>>>(res, tokens, weight, D);
    }
    cudaCheck(cudaGetLastError());
}

// The backward adds all dres[m,:] of equal tokens to one row of dweight. To do that in a fixed order without
// searching, the positions m are first sorted by token: a stable radix sort, least significant digit of 8
// bits first. Each pass over a digit is three kernels: count the digits of every tile of SORT_TILE positions;
// turn the counts into the first place of each (digit, tile); move every position to its place.
enum { SORT_TILE = 512, SORT_DIGITS = 256, SORT_BITS = 8, EMBED_PIECE = 8 };

// count (SORT_DIGITS,tiles)
__global__ void sort_count_kernel(int* count, const int* keys, int shift, size_t M) {
    __shared__ int sum[SORT_DIGITS];
    sum[threadIdx.x] = 0;                                    // blockDim.x == SORT_DIGITS
    __syncthreads();
    size_t m0 = (size_t)blockIdx.x * SORT_TILE;
    for (size_t m = m0 + threadIdx.x; m < m0 + SORT_TILE && m < M; m += SORT_DIGITS)
        atomicAdd(&sum[(keys[m] >> shift) & (SORT_DIGITS - 1)], 1);      // integers: any order, same sum
    __syncthreads();
    count[(size_t)threadIdx.x * gridDim.x + blockIdx.x] = sum[threadIdx.x];
}

// count[i] = sum of count[j], j < i. One block; each of its 1024 threads has n / 1024 neighbouring entries.
__global__ void sort_scan_kernel(int* count, size_t n) {
    __shared__ int warp_total[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    size_t each = (n + blockDim.x - 1) / blockDim.x, first = threadIdx.x * each;
    size_t last = first + each < n ? first + each : n;
    int own = 0;
    for (size_t i = first; i < last; i++) own += count[i];
    int sum = own;                                           // sum over this thread and the lanes before it
    for (int step = 1; step < WARP; step *= 2) {
        int below = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += below;
    }
    if (lane == WARP - 1) warp_total[warp] = sum;
    __syncthreads();
    int start = sum - own;
    for (int w = 0; w < warp; w++) start += warp_total[w];
    for (size_t i = first; i < last; i++) {
        int c = count[i];
        count[i] = start;
        start += c;
    }
}

// One warp moves one tile, 32 positions at a time. Lanes with the same digit find each other by
// __match_any_sync; their order in the warp is their order in the output, which makes the sort stable.
__global__ void sort_move_kernel(int* keys_out, int* order_out, const int* keys, const int* order,
                                 const int* count, int shift, size_t M) {
    __shared__ int place[SORT_DIGITS];
    for (int i = threadIdx.x; i < SORT_DIGITS; i += WARP)
        place[i] = count[(size_t)i * gridDim.x + blockIdx.x];
    __syncwarp();
    size_t m0 = (size_t)blockIdx.x * SORT_TILE;
    int key[SORT_TILE / WARP];
    #pragma unroll
    for (int i = 0; i < SORT_TILE / WARP; i++) {
        size_t m = m0 + i * WARP + threadIdx.x;
        key[i] = m < M ? keys[m] : 0;
    }
    #pragma unroll
    for (int i = 0; i < SORT_TILE / WARP; i++) {
        size_t m = m0 + i * WARP + threadIdx.x;
        int digit = m < M ? (key[i] >> shift) & (SORT_DIGITS - 1) : -1;
        unsigned same = __match_any_sync(0xffffffffu, digit);
        int before = __popc(same & ((1u << threadIdx.x) - 1));
        int to = digit >= 0 ? place[digit] + before : 0;
        __syncwarp();
        if (digit >= 0 && before == 0) place[digit] += __popc(same);
        __syncwarp();
        if (digit >= 0) {
            keys_out[to] = key[i];
            order_out[to] = order ? order[m] : (int)m;
        }
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
__global__ void embedding_backward_parts_kernel(float* dweight, const float* parts, const int* keys, size_t M,
                                                size_t D) {
    enum { AHEAD = 16 };
    size_t piece = blockIdx.x, p0 = piece * EMBED_PIECE, p1 = p0 + EMBED_PIECE;
    if (p1 >= M || keys[p1] != keys[p1 - 1]) return;                         // no run goes on
    int token = keys[p1];
    if (p0 > 0 && keys[p0] == token && keys[p0 - 1] == token) return;        // it began earlier
    for (size_t d = threadIdx.x; d < D; d += blockDim.x) {
        float acc = parts[(2 * piece + 1) * D + d];
        bool more = true;
        for (size_t p = p1; more && p < M; p += AHEAD * EMBED_PIECE) {
            float part[AHEAD];
            int key[AHEAD];
            #pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                size_t q = p + i * EMBED_PIECE;
                key[i] = q < M ? keys[q] : -1;
                part[i] = q < M ? parts[2 * (q / EMBED_PIECE) * D + d] : 0.0f;
            }
            #pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                more = more && key[i] == token;
                acc += more ? part[i] : 0.0f;
            }
        }
        dweight[(size_t)token * D + d] += acc;
    }
}

// the scratch of embedding_backward_cuda, in ints
size_t embedding_backward_scratch_cuda(size_t M, size_t D) {
    size_t tiles = (M + SORT_TILE - 1) / SORT_TILE, pieces = (M + EMBED_PIECE - 1) / EMBED_PIECE;
    return pieces * 2 * D + 4 * M + SORT_DIGITS * tiles;
}

void embedding_backward_cuda(float* dweight, const float* dres, const int* tokens, int* scratch,
                                    size_t M, size_t D, size_t Vp, cudaStream_t stream) {
    unsigned tiles = (unsigned)((M + SORT_TILE - 1) / SORT_TILE);
    unsigned pieces = (unsigned)((M + EMBED_PIECE - 1) / EMBED_PIECE);
    float* parts = (float*)scratch;                          // (pieces,2,D)
    int* keys_order[2] = {scratch + (size_t)pieces * 2 * D, scratch + (size_t)pieces * 2 * D + 2 * M};
    int* count = scratch + (size_t)pieces * 2 * D + 4 * M;   // (SORT_DIGITS,tiles)
    const int *keys = tokens, *order = NULL;
    for (int shift = 0, to = 0; shift == 0 || (shift < 32 && (Vp - 1) >> shift);
         shift += SORT_BITS, to ^= 1) {
        sort_count_kernel<<<tiles, SORT_DIGITS, 0, stream>>>(count, keys, shift, M);
        cudaCheck(cudaGetLastError());
        sort_scan_kernel<<<1, 1024, 0, stream>>>(count, (size_t)SORT_DIGITS * tiles);
        cudaCheck(cudaGetLastError());
        sort_move_kernel<<<tiles, WARP, 0, stream>>>(keys_order[to], keys_order[to] + M, keys, order, count,
                                                     shift, M);
        cudaCheck(cudaGetLastError());
        keys = keys_order[to];
        order = keys + M;
    }
    if (is_aligned(dweight, 16, D * 4) && is_aligned(dres, 16, D * 4) && is_aligned(scratch, 16, 16)) {
        unsigned quarter = (unsigned)(D < 1024 ? (D / 4 + WARP - 1) / WARP * WARP : 256);
        embedding_backward_kernel<4><<<pieces, quarter, 0, stream>>>(dweight, parts, dres, keys, order, M, D);
    } else {
        embedding_backward_kernel<1><<<pieces, 256, 0, stream>>>(dweight, parts, dres, keys, order, M, D);
    }
    cudaCheck(cudaGetLastError());
    unsigned threads = D < 1024 ? (unsigned)((D + WARP - 1) / WARP * WARP) : 1024;
    embedding_backward_parts_kernel<<<pieces, threads, 0, stream>>>(dweight, parts, keys, M, D);
    cudaCheck(cudaGetLastError());
}

// --------------------------------------------------------------------------------------------------
// 4.3 RMSNorm, with the residual addition

// residual_rmsnorm_forward: what the block before adds to the residual stream, and the norm of the sum.
//   res_out = res_in + delta      rstd = (mean_d res_out^2 + eps)^(-1/2)      y = weight * res_out * rstd
//   res_in, res_out (M,D) float, may be the same   delta (M,D) or NULL: nothing is added, and res_out is only
//   written when it is neither NULL nor res_in   y (M,D)   weight (D)   saved for backward: res_out, rstd (M)
// WARPS warps hold one row in registers, ITERS packs of 4 values per thread; a block is 4 warps.
// bytes: 8 + 2 sizeof(X) per element
template <typename X, int WARPS, int ITERS>
__global__ void __launch_bounds__(128)
residual_rmsnorm_forward_kernel(float* res_out, X* y, float* rstd, const float* res_in, const X* delta,
                                const float* weight, size_t M, size_t D, float eps) {
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
        #pragma unroll
        for (int i = 0; i < ITERS; i++) {
            #pragma unroll
            for (int j = 0; j < 4; j++) x[i][j] += d0 + i * group * 4 < D_ ? to_float(add[i].v[j]) : 0.0f;
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
                                                        const float* weight, size_t D, float eps) {
    __shared__ float shared[2 * 8];
    size_t row = (size_t)blockIdx.x * D;
    float sum = 0;
    for (size_t d = threadIdx.x; d < D; d += blockDim.x) {
        float x = res_in[row + d] + (delta ? to_float(delta[row + d]) : 0.0f);
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
                                          cudaStream_t stream) {
    bool packs = is_aligned(res_out, 16, D * 4) && is_aligned(res_in, 16, D * 4) &&
                 is_aligned(weight, 16, 16) &&
                 is_aligned(y, 4 * sizeof(X), D * sizeof(X)) &&
                 is_aligned(delta, 4 * sizeof(X), D * sizeof(X));
    const char* name = "residual_rmsnorm_forward_kernel";
    unsigned warp_rows = (unsigned)((M + 3) / 4), rows = (unsigned)M;
    #define NORM_FORWARD(warps, iters, blocks)                                                              \
        residual_rmsnorm_forward_kernel<X, warps, iters><<<blocks, 128, 0, stream>>>(res_out, y, rstd,      \
                                                                                     res_in, delta, weight, \
                                                                                     M, D, eps)
    if (packs && D <= 256) NORM_FORWARD(1, 2, warp_rows);
    else if (packs && D <= 512) NORM_FORWARD(1, 4, warp_rows);
    else if (packs && D <= 768) NORM_FORWARD(1, 6, warp_rows);
    else if (packs && D <= 1024) NORM_FORWARD(1, 8, warp_rows);
    else if (packs && D <= 2048) NORM_FORWARD(4, 4, rows);
    else if (packs && D <= 4096) NORM_FORWARD(4, 8, rows);
    else {
        residual_rmsnorm_forward_general_kernel<<<rows, 256, 0, stream>>>(res_out, y, rstd, res_in, delta,
                                                                          weight, D, eps);
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
//   and of delta; dres_x: a copy in X for the matmuls, may be NULL   dy (M,D)   res (M,D): res_out of forward
// The rows are dealt out to NORM_BLOCKS blocks. A thread always meets the same columns and so sums dweight in
// registers; parts (NORM_BLOCKS,D) takes the sums of the blocks.   bytes: 12 + 2 sizeof(X) per element
enum { NORM_BLOCKS = 528 };

template <typename X, int WARPS, int ITERS>
__global__ void __launch_bounds__(128, ITERS <= 6 ? 4 : 2)
rmsnorm_backward_kernel(float* dres, X* dres_x, float* parts, const X* dy, const float* res,
                        const float* weight, const float* rstd, size_t M, size_t D) {
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
            store_pack<4>(dres + m * D + d, dx[i].v);
            if (dres_x) store_pack<4>(dres_x + m * D + d, dx[i].v);
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
__global__ void rmsnorm_backward_general_kernel(float* dres, X* dres_x, float* parts, const X* dy,
                                                const float* res, const float* weight, const float* rstd,
                                                size_t M, size_t D) {
    __shared__ float shared[2 * 8];
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
            dres[m * D + d] = dx;
            if (dres_x) dres_x[m * D + d] = from_float<X>(dx);
        }
    }
}

// the scratch of rmsnorm_backward_cuda, in floats
size_t rmsnorm_backward_scratch_cuda(size_t M, size_t D) {
    return (M < NORM_BLOCKS ? M : (size_t)NORM_BLOCKS) * D;
}

template <typename X>
const char* rmsnorm_backward_cuda(float* dres, X* dres_x, float* dweight, const X* dy, const float* res,
                                  const float* weight, const float* rstd, float* scratch, size_t M, size_t D,
                                  cudaStream_t stream) {
    bool packs = is_aligned(dres, 16, D * 4) && is_aligned(res, 16, D * 4) && is_aligned(weight, 16, 16) &&
                 is_aligned(scratch, 16, 16) && is_aligned(dy, 4 * sizeof(X), D * sizeof(X)) &&
                 is_aligned(dres_x, 4 * sizeof(X), D * sizeof(X));
    const char* name = "rmsnorm_backward_kernel";
    size_t blocks = M < NORM_BLOCKS ? M : (size_t)NORM_BLOCKS;
    size_t warp_blocks = (M + 3) / 4 < NORM_BLOCKS ? (M + 3) / 4 : (size_t)NORM_BLOCKS;
    if (packs && D <= 768) blocks = warp_blocks;
    #define NORM_BACKWARD(warps, iters)                                                                    \
        rmsnorm_backward_kernel<X, warps, iters><<<(unsigned)blocks, 128, 0, stream>>>(dres, dres_x,       \
                                                                                       scratch, dy, res,   \
                                                                                       weight, rstd, M, D)
    if (packs && D <= 256) NORM_BACKWARD(1, 2);
    else if (packs && D <= 512) NORM_BACKWARD(1, 4);
    else if (packs && D <= 768) NORM_BACKWARD(1, 6);
    else if (packs && D <= 1024) NORM_BACKWARD(4, 2);
    else if (packs && D <= 1536) NORM_BACKWARD(4, 3);
    else if (packs && D <= 2048) NORM_BACKWARD(4, 4);
    else if (packs && D <= 2560) NORM_BACKWARD(4, 5);
    else if (packs && D <= 4096) NORM_BACKWARD(4, 8);
    else {
        rmsnorm_backward_general_kernel<<<(unsigned)blocks, 256, 0, stream>>>(dres, dres_x, scratch, dy, res,
                                                                              weight, rstd, M, D);
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
enum { CONV_RING = 3 };                                // groups
enum { CONV_STEPS = 32 };                              // the longest runs

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
typedef unsigned char ConvBegins[CONV_STEPS / 4 + 2];

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
    __shared__ ConvGroup<X, W, TAPS> ring[CONV_RING];
    __shared__ ConvBegins begins[CONV_ROWS];
    size_t b = blockIdx.z, e = ((size_t)blockIdx.x * WARP + threadIdx.x) * W;
    int t0 = (int)(blockIdx.y * CONV_ROWS + threadIdx.y) * steps, own = T - t0 < steps ? T - t0 : steps;
    if (doc) conv_begins<TAPS>(begins[threadIdx.y], doc + b * T, t0 - TAPS, t0 + own);
    if (own <= 0 || e >= E) return;
    int i = t0 > 0 ? -TAPS : 0;                  // the group: tokens t0+i ...; the first one fills the window
    inp += (b * T + t0 + i) * ldi + e;
    out += (b * T + t0 + i) * E + e;
    for (int n = 0; n < CONV_RING; n++) {
        conv_copy(ring[n], inp, ldi, own - i - n * TAPS);
        copy_async_commit();
        inp += TAPS * ldi;
    }
    ConvWindow<W, TAPS> win;
    conv_window(win, weight, bias, tail0 && t0 == 0 ? tail0 + b * (K - 1) * E + e : NULL, E, K, e);
    for (int slot = 0; i < own; i += TAPS) {
        copy_async_wait(CONV_RING - 1);
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
        conv_copy(ring[slot], inp, ldi, own - i - CONV_RING * TAPS);
        copy_async_commit();
        slot = slot + 1 < CONV_RING ? slot + 1 : 0;
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
int conv_steps(size_t B, size_t T, size_t E) {
    size_t tiles = (E + 127) / 128, steps = CONV_STEPS;
    while (steps > 16 && B * ((T + steps - 1) / steps) * tiles < 1536) steps /= 2;
    return (int)steps;
}

// the grid; W channels per thread
dim3 conv_grid(size_t B, size_t T, size_t E, size_t W) {
    size_t block = (size_t)conv_steps(B, T, E) * CONV_ROWS;
    return dim3((unsigned)((E + WARP * W - 1) / (WARP * W)), (unsigned)((T + block - 1) / block),
                (unsigned)B);
}

template <typename X>
const char* causal_conv1d_forward_cuda(X* out, float* tailT, const X* inp, size_t ldi, const float* tail0,
                                       const float* weight, const float* bias, const int* doc, size_t B,
                                       size_t T, size_t E, size_t K, cudaStream_t stream) {
    const int W = 8 / sizeof(X), steps = conv_steps(B, T, E);
    bool fast = K == 4 && is_aligned(inp, 8, ldi * sizeof(X)) && is_aligned(out, 8, E * sizeof(X)) &&
                is_aligned(weight, 16, 16);
    dim3 grid = conv_grid(B, T, E, fast ? W : 1), block(WARP, CONV_ROWS);
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
__global__ void __launch_bounds__(CONV_THREADS, 4)
causal_conv1d_backward_kernel(X* dinp, size_t lddi, float* dtail0, float* parts, const X* dout,
                              const float* dtailT, const X* inp, size_t ldi, const float* tail0,
                              const float* weight, const float* bias, const int* doc, int T, size_t E, int K,
                              int steps) {
    __shared__ union {
        ConvGroup<X, W, TAPS> ring[CONV_RING][2];                  // inp, dout
        float sums[CONV_ROWS][TAPS + 1][WARP * W];
    } shared;
    __shared__ ConvBegins begins[CONV_ROWS];
    let_next_kernel_start();
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
        for (int n = 0; n < CONV_RING; n++) {
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
            copy_async_wait(CONV_RING - 1);
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
            int left = own - i - CONV_RING * TAPS;
            conv_copy(shared.ring[slot][0], inp, ldi, left);
            conv_copy(shared.ring[slot][1], dout, E, left);
            copy_async_commit();
            slot = slot + 1 < CONV_RING ? slot + 1 : 0;
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
    return B * conv_grid(B, T, E, 1).y * (K + 1) * E;
}

template <typename X>
const char* causal_conv1d_backward_cuda(X* dinp, size_t lddi, float* dweight, float* dbias, float* dtail0,
                                        const X* dout, const float* dtailT, const X* inp, size_t ldi,
                                        const float* tail0, const float* weight, const float* bias,
                                        const int* doc, float* scratch, size_t B, size_t T, size_t E,
                                        size_t K, cudaStream_t stream) {
    const int W = 8 / sizeof(X), steps = conv_steps(B, T, E);
    bool fast = K == 4 && is_aligned(inp, 8, ldi * sizeof(X)) && is_aligned(dinp, 8, lddi * sizeof(X)) &&
                is_aligned(dout, 8, E * sizeof(X)) && is_aligned(weight, 16, 16);
    dim3 grid = conv_grid(B, T, E, fast ? W : 1), block(WARP, CONV_ROWS);
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
//   saved:    s, and hs (B, T/8, E, N): the state before tokens 0, 8, 16, ...; the rest is recomputed
// Mamba paper (arXiv 2312.00752), section 3.2 and algorithm 2. Oracle: selective_scan_forward/_backward of
// train_mamba.c.
//
// Two pairs of kernels with the same meaning:
//   general   any N, E, T, strides, X = float or bf16, accurate to float rounding
//   fast      bf16, N = 16, E a multiple of 32, rows that start on 16-byte boundaries
// selective_scan_path_cuda() says which one serves given arguments. In both, a block of threads owns
// SCAN_CHANNELS channels of one sequence and walks through time, so that the state never leaves the chip; the
// grid is (E / 32, B). No sum depends on the order in which threads happen to run: results repeat bitwise.

// SCAN_STEPS: tokens between two saved states. SCAN_GROUP: states that a block's four warps hold at once.
enum { SCAN_CHANNELS = 32, SCAN_STEPS = 8, SCAN_GROUP = 16, SCAN_THREADS = 128 };

#define SCAN_LOG2E 1.44269504f
#define SCAN_LN2 0.69314718f
// the dt that the decay sees where a document begins: exp2(SCAN_RESET * A2) is 0 for every A2 of scan_decay
#define SCAN_RESET 3e38f

static inline size_t scan_blocks_cuda(size_t E) { return (E + SCAN_CHANNELS - 1) / SCAN_CHANNELS; }
static inline size_t scan_chunks_cuda(size_t T) { return (T + SCAN_STEPS - 1) / SCAN_STEPS; }
static inline size_t scan_padded_cuda(size_t T) { return (T + 31) / 32 * 32; }

// elements of X that forward saves in hs
size_t selective_scan_saved_cuda(size_t B, size_t T, size_t E, size_t N) {
    return B * scan_chunks_cuda(T) * E * N;
}

// floats of backward's scratch: dBt and dCt of every block, then dA_log, dDskip, ddt_bias of every sequence
size_t selective_scan_scratch_cuda(size_t B, size_t T, size_t E, size_t N) {
    return scan_blocks_cuda(E) * B * scan_padded_cuda(T) * 2 * N + B * E * (N + 2);
}

// --- small pieces -------------------------------------------------------------------------------------

// log2 x and tanh x, like exp2_unit: one instruction each of the special function unit (16 results per clock
// and SM)
__device__ __forceinline__ float scan_log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
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

// scan_sum_lanes: v[i] of all 32 lanes are summed, and lane i returns the sum of v[i]. In every round a lane
// keeps the half of the values whose index agrees with its own number in one bit and sends the other half to
// the lane that needs it (__shfl_xor_sync: lanes that differ in one bit exchange a register): 31 exchanges
// instead of 5 for each of 32 values.
__device__ __forceinline__ float scan_sum_lanes(float* v, int lane) {
    #pragma unroll
    for (int half = 16; half >= 1; half >>= 1) {
        #pragma unroll
        for (int i = 0; i < 16; i++) {
            if (i >= half) continue;                   // decided by the compiler: v must stay in registers
            bool upper = lane & half;
            float keep = upper ? v[i + half] : v[i], send = upper ? v[i] : v[i + half];
            v[i] = keep + __shfl_xor_sync(0xffffffffu, send, half);
        }
    }
    return v[0];
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
    float part[4][2][SCAN_STEPS][SCAN_CHANNELS];  // sums over the states of one warp: s_t, or backward's two
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
                              size_t T, size_t E, size_t N) {
    extern __shared__ __align__(128) char shared[];
    ScanTile& tile = *(ScanTile*)shared;
    const int padded = (int)(N + SCAN_GROUP - 1) / SCAN_GROUP * SCAN_GROUP;
    float* bc = (float*)(&tile + 1);
    float (*h)[SCAN_CHANNELS] = (float (*)[SCAN_CHANNELS])(bc + SCAN_STEPS * 2 * padded);
    float (*A2)[SCAN_CHANNELS] = h + padded;
    const int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
    const size_t b = blockIdx.y, e = (size_t)blockIdx.x * SCAN_CHANNELS + lane, chunks = (T + 7) / SCAN_STEPS;
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
                if (hs && channel && n0 + k < (int)N)
                    scan_store(hs + ((b * chunks + chunk) * E + e) * N + n0 + k, state[k]);
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

// selective_scan_backward_kernel: from the last 8 tokens to the first. The states of 8 tokens are recomputed
// from the saved one, then lambda = dLoss/dh_t runs backward; `carry` is what a token hands to the previous.
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
template <typename X>
__global__ void __launch_bounds__(SCAN_THREADS)
selective_scan_backward_kernel(X* dx, X* ddt_raw, X* dz, size_t lddz, X* y, float* dh0, float* dBC_part,
                               float* de_part, const X* dy, const float* dhT, const X* hs, const X* s,
                               const X* x, const X* dt_raw, const float* dt_bias, const float* A_log,
                               const X* Bt, const X* Ct, size_t ldbc, const float* Dskip, const X* z,
                               size_t ldz, const int* doc, size_t T, size_t E, size_t N) {
    extern __shared__ __align__(128) char shared[];
    ScanTile& tile = *(ScanTile*)shared;
    const int padded = (int)(N + SCAN_GROUP - 1) / SCAN_GROUP * SCAN_GROUP;
    float* bc = (float*)(&tile + 1);
    float (*carry)[SCAN_CHANNELS] = (float (*)[SCAN_CHANNELS])(bc + SCAN_STEPS * 2 * padded);
    float (*A2)[SCAN_CHANNELS] = carry + padded;
    float (*dA)[SCAN_CHANNELS] = A2 + padded;
    const int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
    const size_t b = blockIdx.y, e = (size_t)blockIdx.x * SCAN_CHANNELS + lane, chunks = (T + 7) / SCAN_STEPS;
    const bool channel = e < E;
    const float bias = channel ? dt_bias[e] : 0.0f, D = channel ? Dskip[e] : 0.0f;
    float dD = 0.0f, dbias = 0.0f;
    dBC_part += (blockIdx.x * (size_t)gridDim.y + b) * T * 2 * N;
    de_part += (b * E + e) * (N + 2);
    for (int n = w; n < padded; n += 4) {
        bool inside = channel && n < (int)N;
        A2[n][lane] = inside ? scan_decay(A_log[e * N + n]) : -1.0f;
        carry[n][lane] = inside && dhT ? dhT[(b * E + e) * N + n] : 0.0f;
        dA[n][lane] = 0.0f;
    }
    for (size_t chunk = chunks; chunk-- > 0;) {
        size_t t0 = chunk * SCAN_STEPS;
        float x_t[2];
        #pragma unroll
        for (int k = 0; k < 2; k++) {  // undo the gate; y once more, for the next matmul's weight
            int j = w + 4 * k;
            size_t row = b * T + t0 + j;
            float g = 0.0f;
            x_t[k] = scan_load_element(tile, x, dt_raw, bias, doc, j, lane, b, t0 + j, e, T, E);
            if (channel && t0 + j < T) {
                float z_t = to_float(z[row * ldz + e]), sigma = 1.0f / (1.0f + expf(-z_t)),
                      silu = z_t * sigma;
                float dy_t = to_float(dy[row * E + e]), s_t = to_float(s[row * E + e]);
                g = dy_t * silu;
                scan_store(dz + row * lddz + e, dy_t * s_t * (sigma + silu * (1.0f - sigma)));
                scan_store(y + row * E + e, s_t * silu);
            }
            tile.g[j][lane] = g;
        }
        scan_load_bc(bc, Bt, Ct, ldbc, b, t0, T, N, padded);
        __syncthreads();
        float q[SCAN_STEPS] = {0}, r[SCAN_STEPS] = {0};                  // <lambda, Bt>, <lambda, A2 m>
        for (int n0 = 4 * w; n0 < padded; n0 += SCAN_GROUP) {
            float h[4], lambda[4], decay[4], dA_n[4], a[SCAN_STEPS][4], m[SCAN_STEPS][4], v[32];
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                bool inside = channel && n0 + k < (int)N;
                h[k] = inside ? to_float(hs[((b * chunks + chunk) * E + e) * N + n0 + k]) : 0.0f;
                lambda[k] = carry[n0 + k][lane];
                decay[k] = A2[n0 + k][lane];
                dA_n[k] = dA[n0 + k][lane];
            }
            #pragma unroll
            for (int j = 0; j < SCAN_STEPS; j++) {
                const float* B_t = bc + j * 2 * padded + n0;
                float dt = tile.decay_dt[j][lane], dtx = tile.dtx[j][lane], g = tile.g[j][lane];
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    a[j][k] = exp2_unit(dt * decay[k]);
                    m[j][k] = a[j][k] * h[k];
                    h[k] = fmaf(dtx, B_t[k], m[j][k]);
                    v[4 * j + k] = g * h[k];
                }
            }
            // lane l gets the sum over channels for token l / 4, state l % 4
            size_t t = t0 + lane / 4, n = (size_t)(n0 + lane % 4);
            float dC = scan_sum_lanes(v, lane);
            if (t < T && n < N) dBC_part[(t * 2 + 1) * N + n] = dC;
            #pragma unroll
            for (int j = SCAN_STEPS - 1; j >= 0; j--) {
                const float *B_t = bc + j * 2 * padded + n0, *C_t = B_t + padded;
                float dt = tile.dt[j][lane], dtx = tile.dtx[j][lane], g = tile.g[j][lane];
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    lambda[k] = fmaf(g, C_t[k], lambda[k]);
                    float lambda_m = lambda[k] * m[j][k];
                    v[4 * j + k] = lambda[k] * dtx;
                    q[j] = fmaf(lambda[k], B_t[k], q[j]);
                    r[j] = fmaf(lambda_m, decay[k], r[j]);
                    dA_n[k] = fmaf(lambda_m, dt, dA_n[k]);
                    lambda[k] *= a[j][k];
                }
            }
            float dB = scan_sum_lanes(v, lane);
            if (t < T && n < N) dBC_part[t * 2 * N + n] = dB;
            #pragma unroll
            for (int k = 0; k < 4; k++) { carry[n0 + k][lane] = lambda[k]; dA[n0 + k][lane] = dA_n[k]; }
        }
        #pragma unroll
        for (int j = 0; j < SCAN_STEPS; j++) {
            tile.part[w][0][j][lane] = q[j];
            tile.part[w][1][j][lane] = r[j];
        }
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < 2; k++) {
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

enum { SCAN_TILE_STEPS = 32, SCAN_VECTORS = SCAN_TILE_STEPS * SCAN_CHANNELS / 8 };

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
        return __uint_as_float((__float_as_uint(dt) & keep) | set);
    }
};

// softplus from x2 = x log2(e). Three special function instructions would be enough for log(1 + e^x) alone;
// where e^x is small, 1 + e^x loses its digits and e - e^2/2 is better (relative error below 6e-6).
__device__ __forceinline__ float scan_softplus_fast(float x2) {
    float e = exp2_unit(x2), l = scan_log2(1.0f + e);
    float small = fmaf(-0.5f * SCAN_LOG2E, e, SCAN_LOG2E) * e;
    l = e < 0.004f ? small : l;
    return (x2 > 24.0f ? x2 : l) * SCAN_LN2;
}

// --- fast path: forward ---------------------------------------------------------------------------------

struct ScanForwardRaw {                                        // one tile as it lies in memory
    bf16 x[32][32], dt[32][32], z[32][32], bc[32][32];    // bc: Bt_t, then Ct_t
    int doc[32][2];                                            // document of token t and of token t-1
};
struct ScanForwardShared {
    ScanForwardRaw raw[3];
    float4 dt_dtx[2][32][16];                                  // (dt, dt x) of two channels, see pair()
    float bc[2][32][32], s[2][32][32];                         // bc[t][n ^ 4 (t % 2)], s[t][c ^ 4 (t % 8)]
    // The 32 banks of shared memory serve different addresses at once only if these differ modulo 32 words;
    // the exclusive-ors above and here spread simultaneous accesses over the banks.
    static __device__ __forceinline__ int pair(int t, int c) { return c ^ ((c >> 3) | ((t & 1) << 1)); }
};

// selective_scan_forward_fast_kernel: the general kernel's function. The first four warps run the recurrence,
// four more do everything element-wise, around it:
//   store tile i-1 (skip, gate) | load tile i+2 | prepare tile i+1 (softplus, dt x) || time loop of tile i
// so that there is one barrier per tile and the two kinds of work fill each other's gaps.
// Time loop: a thread owns states 4g..4g+3 of one channel, a group of four lanes one channel; their partial
// sums over the states are exchanged once for 8 tokens: lane g finishes tokens 2g, 2g+1.
__global__ void __launch_bounds__(SCAN_THREADS + SCAN_VECTORS, 3)
selective_scan_forward_fast_kernel(bf16* y, bf16* s, bf16* hs, float* hT, const bf16* x,
                                   const bf16* dt_raw, const float* dt_bias, const float* A_log,
                                   const bf16* Bt, const bf16* Ct, size_t ldbc, const float* Dskip,
                                   const bf16* z, size_t ldz, const float* h0, const int* doc,
                                   size_t T, size_t E) {
    extern __shared__ __align__(128) char shared[];
    ScanForwardShared& sh = *(ScanForwardShared*)shared;
    const int lane = threadIdx.x & 31, e0 = blockIdx.x * SCAN_CHANNELS;
    const int tiles = (int)((T + SCAN_TILE_STEPS - 1) / SCAN_TILE_STEPS);
    const size_t b = blockIdx.y;

    // the number of the warp, taken from lane 0: so the compiler knows that a warp never divides here
    if (__shfl_sync(0xffffffffu, threadIdx.x >> 5, 0) < 4) {   // ---- the recurrence
        // lanes of one channel: 0, 1, 8, 9 apart. Any four neighbouring lanes then touch two channels and two
        // state groups only, and a shared load with few distinct addresses takes half the time.
        const int g = (lane & 1) | ((lane >> 2) & 2), c = ((lane >> 1) & 3) | ((lane >> 2) & 4);
        const int ch = (threadIdx.x >> 5) * 8 + c;
        const size_t state = (b * E + e0 + ch) * 16 + 4 * g, chunks = (T + 7) / SCAN_STEPS;
        float decay[4], h[4];
        #pragma unroll
        for (int n = 0; n < 4; n++) {
            decay[n] = scan_decay(A_log[(size_t)(e0 + ch) * 16 + 4 * g + n]);
            h[n] = h0 ? h0[state + n] : 0.0f;
        }
        bf16* saved = hs + (b * chunks * E + e0 + ch) * 16 + 4 * g;                 // next state to save
        int left = hs ? (int)chunks : 0;                       // how many there are
        const size_t next = E * 16;
        #pragma unroll 1
        for (int i = 0; i <= tiles; i++) {
            __syncthreads();                                   // dt, dtx, bc of tile i are ready
            if (i == tiles) break;
            const int q = i & 1;
            const float2* dt_even = (const float2*)&sh.dt_dtx[q][0][sh.pair(0, ch >> 1)] + (ch & 1);
            const float2* dt_odd = (const float2*)&sh.dt_dtx[q][0][sh.pair(1, ch >> 1)] + (ch & 1);
            const float *bc_even = &sh.bc[q][0][4 * g], *bc_odd = &sh.bc[q][0][(4 * g) ^ 4];
            float* out0 = &sh.s[q][2 * g][ch ^ (8 * g)];
            float* out1 = &sh.s[q][2 * g + 1][ch ^ (8 * g + 4)];
            #pragma unroll
            for (int t0 = 0; t0 < SCAN_TILE_STEPS; t0 += SCAN_STEPS) {
                if (left > t0 / SCAN_STEPS)
                    *(uint2*)(saved + t0 / SCAN_STEPS * next) =
                        make_uint2(scan_pack(h[0], h[1]), scan_pack(h[2], h[3]));
                float sum[8];
                #pragma unroll
                for (int j = 0; j < SCAN_STEPS; j++) {
                    float2 d = (j & 1 ? dt_odd : dt_even)[(t0 + j) * SCAN_CHANNELS];
                    const float* row = (j & 1 ? bc_odd : bc_even) + (t0 + j) * 32;
                    float B_t[4], C_t[4];
                    *(float4*)B_t = *(const float4*)row;
                    *(float4*)C_t = *(const float4*)(row + 16);
                    #pragma unroll
                    for (int n = 0; n < 4; n++) {
                        h[n] = fmaf(exp2_unit(d.x * decay[n]), h[n], d.y * B_t[n]);
                        sum[j] = n == 0 ? h[0] * C_t[0] : fmaf(h[n], C_t[n], sum[j]);
                    }
                }
                #pragma unroll
                for (int half = 4; half >= 2; half >>= 1) {    // keep one half, send the other half
                    bool upper = half == 4 ? g & 2 : g & 1;
                    #pragma unroll
                    for (int k = 0; k < half; k++) {
                        float send = scan_select(upper, sum[k], sum[k + half]);
                        float keep = scan_select(upper, sum[k + half], sum[k]);
                        sum[k] = keep + __shfl_xor_sync(0xffffffffu, send, half == 4 ? 8 : 1);
                    }
                }
                out0[t0 * SCAN_CHANNELS] = sum[0];
                out1[t0 * SCAN_CHANNELS] = sum[1];
            }
            saved += SCAN_TILE_STEPS / SCAN_STEPS * next;
            left -= SCAN_TILE_STEPS / SCAN_STEPS;
        }
        if (hT) *(float4*)(hT + state) = make_float4(h[0], h[1], h[2], h[3]);
        return;
    }

    // ---- element-wise: one vector per thread, token r of the tile, channels c..c+7
    const int r = (threadIdx.x - SCAN_THREADS) >> 2, c = (threadIdx.x & 3) * 8;
    float bias2[8], D[8];
    #pragma unroll
    for (int k = 0; k < 8; k++) { bias2[k] = dt_bias[e0 + c + k] * SCAN_LOG2E; D[k] = Dskip[e0 + c + k]; }
    // what the next load reads and the next store writes; both go forward one tile at a time
    size_t load_t = r, store_t = r, row = b * T + r, at = row * E + e0 + c;
    const bf16 *next_x = x + at, *next_dt = dt_raw + at, *next_z = z + row * ldz + e0 + c;
    const bf16* next_bc = (c < 16 ? Bt + c : Ct + (c - 16)) + row * ldbc;
    const int* next_doc = doc ? doc + row : NULL;
    bf16 *next_y = y + at, *next_s = s ? s + at : NULL;

    auto load = [&](int slot) {
        ScanForwardRaw& raw = sh.raw[slot];
        bool inside = load_t < T;
        scan_copy16(&raw.x[r][c], inside ? next_x : x, inside);
        scan_copy16(&raw.dt[r][c], inside ? next_dt : dt_raw, inside);
        scan_copy16(&raw.z[r][c], inside ? next_z : z, inside);
        scan_copy16(&raw.bc[r][c], inside ? next_bc : Bt, inside);
        if (doc && c < 16) {  // two threads: documents of t and of t-1 (0 for t = 0)
            bool known = inside && (c == 0 || load_t > 0);
            scan_copy4(&raw.doc[r][c >> 3], known ? next_doc - (c >> 3) : doc, known);
        }
        load_t += SCAN_TILE_STEPS;
        next_x += SCAN_TILE_STEPS * E;
        next_dt += SCAN_TILE_STEPS * E;
        next_z += SCAN_TILE_STEPS * ldz;
        next_bc += SCAN_TILE_STEPS * ldbc;
        next_doc += SCAN_TILE_STEPS;
    };
    auto prepare = [&](int slot, int i) {
        ScanForwardRaw& raw = sh.raw[slot];
        const int q = i & 1;
        float dt[8], dtx[8], bc[8];
        bool inside = (size_t)i * SCAN_TILE_STEPS + r < T;
        const ScanSpecial special(inside, doc && raw.doc[r][0] != raw.doc[r][1]);
        scan_unpack8(dtx, &raw.x[r][c]);
        scan_unpack8(dt, &raw.dt[r][c]);
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            dt[k] = scan_softplus_fast(fmaf(dt[k], SCAN_LOG2E, bias2[k]));
            dtx[k] *= dt[k];                                   // x beyond T is 0
            dt[k] = special(dt[k]);
        }
        #pragma unroll
        for (int k = 0; k < 8; k += 2)
            sh.dt_dtx[q][r][sh.pair(r, (c + k) >> 1)] = make_float4(dt[k], dtx[k], dt[k + 1], dtx[k + 1]);
        scan_unpack8(bc, &raw.bc[r][c]);
        *(float4*)&sh.bc[q][r][c ^ ((r & 1) * 4)] = *(float4*)bc;
        *(float4*)&sh.bc[q][r][(c + 4) ^ ((r & 1) * 4)] = *(float4*)(bc + 4);
    };
    auto store = [&](int slot, int i) {
        const ScanForwardRaw& raw = sh.raw[slot];
        const int swizzled = c ^ ((r & 7) * 4);
        float x_t[8], z_t[8], s_t[8];
        scan_unpack8(x_t, &raw.x[r][c]);
        scan_unpack8(z_t, &raw.z[r][c]);
        *(float4*)s_t = *(float4*)&sh.s[i & 1][r][swizzled];
        *(float4*)(s_t + 4) = *(float4*)&sh.s[i & 1][r][swizzled ^ 4];
        #pragma unroll
        for (int k = 0; k < 8; k++) {                          // silu(z) = z/2 (1 + tanh(z/2))
            float half = 0.5f * z_t[k];
            s_t[k] = fmaf(D[k], x_t[k], s_t[k]);
            z_t[k] = s_t[k] * fmaf(half, scan_tanh(half), half);
        }
        if (store_t < T) {
            if (s) scan_store16(next_s, scan_pack8(s_t));
            scan_store16(next_y, scan_pack8(z_t));
        }
        store_t += SCAN_TILE_STEPS;
        next_s += SCAN_TILE_STEPS * E;
        next_y += SCAN_TILE_STEPS * E;
    };
    load(0);
    copy_async_commit();
    if (tiles > 1) load(1);
    copy_async_commit();
    copy_async_wait(1);
    __syncwarp();
    prepare(0, 0);
    int slot = 0;                                              // where raw tile i is
    #pragma unroll 1
    for (int i = 0; i <= tiles; i++) {
        int before = slot == 0 ? 2 : slot - 1, after = slot == 2 ? 0 : slot + 1;
        copy_async_wait(0);
        __syncthreads();                                       // sums of tile i-1 are ready
        if (i > 0) store(before, i - 1);
        if (i + 2 < tiles) load(before);                       // tile i+2 takes the place of tile i-1
        copy_async_commit();
        if (i + 1 < tiles) prepare(after, i + 1);
        slot = after;
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
    float4 fragB[2][32], fragC[2][32];                         // one-hot operands of dtx x Bt and g x Ct
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
// 8 steps in reverse use them.
//   dtx x Bt, g x Ct   (every channel times every state)  tf32: the A operand holds two steps of dtx, the
//                      one-hot B operand picks one; g and dtx are rounded to 10 bits, Bt and Ct are exact
//   q = <lambda, Bt>   lambda as bf16 is an A operand as it lies: rows g are the even, rows g+8 the odd step
//   dBt, dCt           sums over channels: the matrices of two steps are transposed and multiplied with a
//                      one-hot column per step; 8 steps fill one D of 16 states x 8 steps
//   <lambda, A m>      in the lane, then over the four lanes of the channel; lane q gets tokens 2q, 2q+1
// P: type of the partial sums in dBC_part (blocks, B, T/32 tiles, 4 chunks, {dBt, dCt}, 32 lanes, 4).
template <typename P>
__global__ void __launch_bounds__(SCAN_THREADS, 3)
    selective_scan_backward_fast_kernel(bf16* dx, bf16* ddt_raw, bf16* dz, uint32_t lddz,
                                        bf16* y, float* dh0, P* dBC_part, float* de_part,
                                        const bf16* dy, const float* dhT, const bf16* hs,
                                        const bf16* s, const bf16* x, const bf16* dt_raw,
                                        const float* dt_bias, const float* A_log, const bf16* Bt,
                                        const bf16* Ct, uint32_t ldbc, const float* Dskip,
                                        const bf16* z, uint32_t ldz, const int* doc, uint32_t T,
                                        uint32_t E) {
    extern __shared__ __align__(128) char shared[];
    ScanBackwardShared& sh = *(ScanBackwardShared*)shared;
    const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5, g = lane >> 2, q = lane & 3, ch = w * 8 + g;
    const int r0 = tid >> 2, c0 = (tid & 3) * 8;  // element-wise work: token r0 of the tile, 8 channels
    const int s0 = scan_column(r0, c0);
    const uint32_t e0 = blockIdx.x * SCAN_CHANNELS, b = blockIdx.y;
    const int tiles = (int)((T + 31) / 32);
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
    if (tid < SCAN_CHANNELS) sh.bias2[tid] = dt_bias[e0 + tid] * SCAN_LOG2E;

    auto load = [&](int i) {
        uint32_t t = i * 32 + r0;
        bool inside = t < T;
        uint32_t row = inside ? b * T + t : 0;  // B T < 2^31 on this path; the offsets have 64 bits
        size_t at = (size_t)row * E + e0 + c0;
        scan_copy16(&sh.x[i & 1][r0][s0], x + at, inside);
        scan_copy16(&sh.dt[i & 1][r0][s0], dt_raw + at, inside);
        scan_copy16(&sh.z[r0][c0], z + (size_t)row * ldz + e0 + c0, inside);
        scan_copy16(&sh.s[r0][c0], s + at, inside);
        scan_copy16(&sh.dy[r0][c0], dy + at, inside);
        scan_copy16(&sh.bc[r0][c0], (c0 < 16 ? Bt + c0 : Ct + (c0 - 16)) + (size_t)row * ldbc, inside);
        if (doc && c0 < 16) {
            bool known = inside && (c0 == 0 || t > 0);
            scan_copy4(&sh.doc[r0][c0 >> 3], doc + (known ? row - (c0 >> 3) : 0), known);
        }
        uint32_t chunks = (T + 7) / 8;
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            bool saved = i * 4 + k < (int)chunks;
            uint32_t chunk = saved ? b * chunks + i * 4 + k : 0;
            scan_copy8(&sh.hs[i & 1][k][tid], hs + ((size_t)chunk * E + e0 + ch) * 16 + 4 * q, saved);
        }
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
            own.fragB[k][lane] = q < 2 ? make_float4(B0, B1, 0, 0) : make_float4(0, 0, B0, B1);
            own.fragC[k][lane] = q < 2 ? make_float4(C0, C1, 0, 0) : make_float4(0, 0, C0, C1);
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
        size_t out = (((size_t)blockIdx.x * gridDim.y + b) * tiles + i) * 256;
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

    load(tiles - 1);
    #pragma unroll 1
    for (int i = tiles - 1; i >= 0; i--) {
        copy_async_wait(0);
        __syncthreads();                                       // tile i+1 is done, raw tile i has arrived
        if (i < tiles - 1) finish(i + 1);
        prepare(i);
        __syncthreads();
        if (i > 0) load(i - 1);
        #pragma unroll 1
        for (int k = 3; k >= 0; k--) {
            ScanBackwardChunk& chunk = sh.chunk[k];
            const float* pdt = &chunk.dt[chunk.at(ch)];
            const float* pdtx = &chunk.dtx[chunk.at(ch) + 2 * (q >> 1)];
            const float* pg = &chunk.g[chunk.at(ch) + 2 * (q >> 1)];
            float h[4], a[8][4], m[8][4], dt[8], dB[4] = {0, 0, 0, 0}, dC[4] = {0, 0, 0, 0};
            uint2 start = sh.hs[i & 1][k][tid];
            h[0] = scan_low(start.x);
            h[1] = scan_high(start.x);
            h[2] = scan_low(start.y);
            h[3] = scan_high(start.y);
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
                float4 B4 = chunk.fragB[f][lane];
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
            // <lambda, A2 m> of 8 steps; <lambda, Bt> of steps 2q, 2q+1
            float r[8], q_even = 0.0f, q_odd = 0.0f;
            #pragma unroll
            for (int f = 1; f >= 0; f--) {                     // reverse
                float2 g2 = *(const float2*)&pg[4 * f];
                float4 C4 = chunk.fragC[f][lane];
                const float Cv[4] = {C4.x, C4.y, C4.z, C4.w};
                #pragma unroll
                for (int jj = 3; jj >= 0; jj--) {
                    const int j = 4 * f + jj, p = j >> 1;
                    float v = jj & 1 ? g2.y : g2.x, gC[4], rm[4];
                    scan_mma_tf32(gC, j == 7 ? lambda : zero, odd ? 0.0f : v, odd ? v : 0.0f, Cv[jj]);
                    if (j == 7) scan_mma_bf16(dC, flip[1], mine[3] ? gv0 : 0u, mine[3] ? gv1 : 0u);
                    #pragma unroll
                    for (int n = 0; n < 4; n++) {
                        lambda[n] = j == 7 ? gC[n] : fmaf(a[j == 7 ? 7 : j + 1][n], lambda[n], gC[n]);
                        float lambda_m = lambda[n] * m[j][n];
                        dA[n] = fmaf(lambda_m, dt[j], dA[n]);
                        rm[n] = lambda_m * decay[n];
                    }
                    r[j] = (rm[0] + rm[1]) + (rm[2] + rm[3]);
                    pack[2 * (jj & 1)] = scan_pack(lambda[0], lambda[1]);
                    pack[2 * (jj & 1) + 1] = scan_pack(lambda[2], lambda[3]);
                    if (!(jj & 1)) {
                        float d[4] = {0, 0, 0, 0};
                        const uint32_t A[4] = {pack[0], pack[2], pack[1], pack[3]};
                        scan_mma_bf16(d, A, Bq.x, Bq.y);
                        q_even = q == p ? d[0] : q_even;  // column 2q of row g, and column 2q+1 of row g+8
                        q_odd = q == p ? d[3] : q_odd;
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
            #pragma unroll
            for (int j = 0; j < 2; j++) {
                int t = 8 * k + 2 * q + j;
                float dt_t = j ? dt2.y : dt2.x, g_t = j ? g2.y : g2.x, q_t = j ? q_odd : q_even;
                float x_t = __bfloat162float(sh.x[i & 1][t][column]);
                if (dt_t == SCAN_RESET) {                      // a document begins here: dt once more
                    float raw = __bfloat162float(sh.dt[i & 1][t][column]);
                    dt_t = scan_softplus_fast(fmaf(raw, SCAN_LOG2E, sh.bias2[ch]));
                }
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
    finish(0);
    const size_t channel = (size_t)b * E + e0 + ch;
    if (dh0) *(float4*)(dh0 + channel * 16 + 4 * q) = make_float4(lambda[0], lambda[1], lambda[2], lambda[3]);
    float* de = de_part + channel * 18;
    #pragma unroll
    for (int n = 0; n < 4; n++) de[4 * q + n] = dA[n] * decay[n] * SCAN_LN2;        // dA_log = dA A
    #pragma unroll
    for (int k = 1; k < 4; k <<= 1) {
        dD += __shfl_xor_sync(0xffffffffu, dD, k);
        dbias += __shfl_xor_sync(0xffffffffu, dbias, k);
    }
    if (q == 0) { de[16] = dD; de[17] = dbias; }
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
                                      int blocks, uint32_t B, uint32_t T, uint32_t E) {
    __shared__ float part[3][8][64];
    const size_t tiles = (T + 31) / 32, count = B * tiles * 128, groups = count / 64;
    if (blockIdx.x >= groups) {                                // dA_log, dDskip, ddt_bias
        size_t i = (blockIdx.x - groups) * 256 + threadIdx.x;
        if (i >= (size_t)E * 18) return;
        float sum = 0.0f;
        for (size_t b = 0; b < B; b++) sum += de_part[b * E * 18 + i];
        size_t e = i / 18, n = i % 18;
        if (n < 16) dA_log[e * 16 + n] += sum;
        else if (n == 16) dDskip[e] += sum;
        else ddt_bias[e] += sum;
        return;
    }
    const int v = threadIdx.x & 63, quarter = threadIdx.x >> 6;
    const size_t i = (size_t)blockIdx.x * 64 + v;
    float sum[8] = {0};
    #pragma unroll 12
    for (int k = quarter; k < blocks; k += 4) scan_add8(sum, dBC_part, k * count + i);
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
        const size_t chunk = j >> 6, b = chunk / (4 * tiles), t = chunk % (4 * tiles) * 8 + 2 * (lane & 3);
        bf16* row = ((j >> 5) & 1 ? dCt : dBt) + (b * T + t) * lddbc + n;
        const float* d = sum + 4 * half;
        if (t < T) { scan_store(row, d[0]); scan_store(row + 2, d[2]); }
        if (t + 1 < T) { scan_store(row + lddbc, d[1]); scan_store(row + lddbc + 2, d[3]); }
    }
}

// --- launchers ------------------------------------------------------------------------------------------

// ScanPartial: type of the fast backward's partial sums (float works too). bf16 halves the traffic, 100 MB at
// B=8 T=2048 E=1536: 0.430 instead of 0.45 ms (H200); dBt and dCt, errors up to 4e-3, get about 0.5e-3 worse.
// Measured there: forward 0.175 ms, 0.169 without s and hs; copy bandwidth 4.17 TB/s in the same run.
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
static inline size_t scan_shared_bytes(size_t N, size_t state_arrays) {
    size_t padded = (N + SCAN_GROUP - 1) / SCAN_GROUP * SCAN_GROUP;
    return sizeof(ScanTile) + (2 * SCAN_STEPS + state_arrays * SCAN_CHANNELS) * padded * sizeof(float);
}

static inline void scan_launch_forward_fast(bf16* y, bf16* s, bf16* hs, float* hT,
                                            const bf16* x, const bf16* dt_raw, const float* dt_bias,
                                            const float* A_log, const bf16* Bt, const bf16* Ct,
                                            size_t ldbc, const float* Dskip, const bf16* z, size_t ldz,
                                            const float* h0, const int* doc, size_t B, size_t T, size_t E,
                                            cudaStream_t stream) {
    auto kernel = selective_scan_forward_fast_kernel;
    scan_allow_shared(kernel, sizeof(ScanForwardShared));
    kernel<<<dim3((unsigned)scan_blocks_cuda(E), (unsigned)B), SCAN_THREADS + SCAN_VECTORS,
             sizeof(ScanForwardShared), stream>>>(y, s, hs, hT, x, dt_raw, dt_bias, A_log, Bt, Ct, ldbc,
                                                  Dskip, z, ldz, h0, doc, T, E);
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
                                             size_t B, size_t T, size_t E, cudaStream_t stream) {
    const size_t blocks = scan_blocks_cuda(E), tiles = scan_padded_cuda(T) / 32;
    float* de_part = scratch + blocks * B * scan_padded_cuda(T) * 32;
    ScanPartial* dBC_part = (ScanPartial*)scratch;
    auto kernel = selective_scan_backward_fast_kernel<ScanPartial>;
    scan_allow_shared(kernel, sizeof(ScanBackwardShared));
    kernel<<<dim3((unsigned)blocks, (unsigned)B), SCAN_THREADS, sizeof(ScanBackwardShared), stream>>>(
        dx, ddt_raw, dz, (uint32_t)lddz, y, dh0, dBC_part, de_part, dy, dhT, hs, s, x, dt_raw, dt_bias, A_log,
        Bt, Ct, (uint32_t)ldbc, Dskip, z, (uint32_t)ldz, doc, (uint32_t)T, (uint32_t)E);
    cudaCheck(cudaGetLastError());
    unsigned grid = (unsigned)(B * tiles * 2 + (E * 18 + 255) / 256);
    selective_scan_reduce_fast_kernel<<<grid, 256, 0, stream>>>(dA_log, dDskip, ddt_bias, dBt, dCt, lddbc,
        (const ScanPartial*)dBC_part, de_part, (int)blocks, (uint32_t)B, (uint32_t)T, (uint32_t)E);
    cudaCheck(cudaGetLastError());
}
// never called: scan_is_fast is false for float
static inline void scan_launch_forward_fast(float*, float*, float*, float*, const float*, const float*,
                                            const float*, const float*, const float*, const float*, size_t,
                                            const float*, const float*, size_t, const float*, const int*,
                                            size_t, size_t, size_t, cudaStream_t) {}
static inline void scan_launch_backward_fast(float*, float*, float*, size_t, float*, float*, float*, float*,
                                             float*, float*, size_t, float*, const float*, const float*,
                                             const float*, const float*, const float*, const float*,
                                             const float*, const float*, const float*, const float*, size_t,
                                             const float*, const float*, size_t, const int*, float*, size_t,
                                             size_t, size_t, cudaStream_t) {}

// selective_scan_forward_cuda: formulas at the top of this section.
//   y (B,T,E) written   s (B,T,E), hs selective_scan_saved_cuda() elements: for backward, NULL in inference
//   hT, h0 (B,E,N) float, each may be NULL, may be one array   doc (B,T) or NULL; h0 is of document 0
template <typename X>
void selective_scan_forward_cuda(X* y, X* s, X* hs, float* hT, const X* x, const X* dt_raw,
                                 const float* dt_bias, const float* A_log, const X* Bt, const X* Ct,
                                 size_t ldbc, const float* Dskip, const X* z, size_t ldz, const float* h0,
                                 const int* doc, size_t B, size_t T, size_t E, size_t N,
                                 cudaStream_t stream) {
    if (scan_is_fast(x, Bt, Ct, ldbc, z, ldz, B, T, E, N) && scan_aligned(y, E) && scan_aligned(s, E) &&
        scan_aligned(hs, E) && scan_aligned(hT, E) && scan_aligned(dt_raw, E)) {
        scan_launch_forward_fast(y, s, hs, hT, x, dt_raw, dt_bias, A_log, Bt, Ct, ldbc, Dskip, z, ldz, h0,
                                 doc, B, T, E, stream);
        return;
    }
    size_t bytes = scan_shared_bytes(N, 2);
    scan_allow_shared(selective_scan_forward_kernel<X>, bytes);
    dim3 grid((unsigned)scan_blocks_cuda(E), (unsigned)B);
    selective_scan_forward_kernel<X><<<grid, SCAN_THREADS, bytes, stream>>>(
        y, s, hs, hT, x, dt_raw, dt_bias, A_log, Bt, Ct, ldbc, Dskip, z, ldz, h0, doc, T, E, N);
    cudaCheck(cudaGetLastError());
}

// selective_scan_backward_cuda: formulas at selective_scan_backward_kernel. dy is the gradient of y.
//   dx, ddt_raw (B,T,E), dz (row stride lddz), dBt, dCt (row stride lddbc), dh0, y: written
//   dA_log (E,N), dDskip, ddt_bias (E): added to   dh0, dhT (B,E,N), doc: may be NULL
//   hs, s: as forward left them   scratch: selective_scan_scratch_cuda() floats
template <typename X>
void selective_scan_backward_cuda(X* dx, X* ddt_raw, X* dz, size_t lddz, X* y, float* dA_log, float* dDskip,
                                  float* ddt_bias, X* dBt, X* dCt, size_t lddbc, float* dh0, const X* dy,
                                  const float* dhT, const X* hs, const X* s, const X* x, const X* dt_raw,
                                  const float* dt_bias, const float* A_log, const X* Bt, const X* Ct,
                                  size_t ldbc, const float* Dskip, const X* z, size_t ldz, const int* doc,
                                  float* scratch, size_t B, size_t T, size_t E, size_t N,
                                  cudaStream_t stream) {
    if (scan_is_fast(x, Bt, Ct, ldbc, z, ldz, B, T, E, N) && scan_aligned(dx, E) &&
        scan_aligned(ddt_raw, E) && scan_aligned(dz, lddz) && scan_aligned(y, E) && scan_aligned(dh0, E) &&
        scan_aligned(dy, E) && scan_aligned(hs, E) && scan_aligned(s, E) && scan_aligned(dt_raw, E) &&
        scan_aligned(scratch, E)) {
        scan_launch_backward_fast(dx, ddt_raw, dz, lddz, y, dA_log, dDskip, ddt_bias, dBt, dCt, lddbc, dh0,
                                  dy, dhT, hs, s, x, dt_raw, dt_bias, A_log, Bt, Ct, ldbc, Dskip, z, ldz, doc,
                                  scratch, B, T, E, stream);
        return;
    }
    size_t bytes = scan_shared_bytes(N, 3), blocks = scan_blocks_cuda(E);
    float* de_part = scratch + blocks * B * T * 2 * N;
    scan_allow_shared(selective_scan_backward_kernel<X>, bytes);
    selective_scan_backward_kernel<X><<<dim3((unsigned)blocks, (unsigned)B), SCAN_THREADS, bytes, stream>>>(
        dx, ddt_raw, dz, lddz, y, dh0, scratch, de_part, dy, dhT, hs, s, x, dt_raw, dt_bias, A_log, Bt, Ct,
        ldbc, Dskip, z, ldz, doc, T, E, N);
    cudaCheck(cudaGetLastError());
    size_t results = B * T * 2 * N + E * (N + 2);
    selective_scan_reduce_kernel<X><<<(unsigned)((results + 255) / 256), 256, 0, stream>>>(
        dA_log, dDskip, ddt_bias, dBt, dCt, lddbc, scratch, de_part, blocks, B, T, E, N);
    cudaCheck(cudaGetLastError());
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
//   params, grads, m, v float   params_x: the parameters in X for the matmuls, or NULL   norm: gradient_norm
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

// The float parameters of a layer and the same in the type of the matmuls; gradients are float.
template <typename X> struct LayerCuda {
    const Kind* kind;
    const float* p[MAX_FIELDS];     // fields in the order of Mamba1Params, MlpParams
    const X* px[MAX_FIELDS];
    float* grad[MAX_FIELDS];
};

// Activations of one layer. The first group is saved for backward, per layer unless --recompute.
template <typename X> struct ActsCuda {
    float *res, *rstd;              // residual stream that the norm read (B,T,D), (B,T)
    X *u;                           // normalized (B,T,D)
    X *xz, *x, *rbc, *dt_raw, *s, *hs;      // Mamba-1: (2E) (E) (R+2N) (E) (E), states
    X *h;                           // MLP: up, gate (2F)
};

// What the layers share: results on their way, gradients, partial sums.
template <typename X> struct ScratchCuda {
    X *delta, *y, *dy, *dxz, *dx, *ddt, *drbc, *du, *dres_x;
    X *m, *dm, *dh;
    float *dres, *sums;
    int* sort;
};

template <typename X> struct CudaRun {
    const Config* config;
    Matmul* matmul;
    size_t B, T;
    const int* doc;
    cudaStream_t stream;
};

enum {
    P_NORM,
    P_IN,
    P_IN_BIAS,
    P_CONV,
    P_CONV_BIAS,
    P_X,
    P_DT,
    P_DT_BIAS,
    P_A_LOG,
    P_D,
    P_OUT,
    P_OUT_BIAS
};                                    // Mamba1Params
enum { P_MLP_NORM, P_FC1, P_FC2 };    // MlpParams
static_assert(FIELDS(Mamba1Params) == P_OUT_BIAS + 1 && FIELDS(MlpParams) == P_FC2 + 1,
              "the fields of train_mamba.c");

// mamba1_block_forward_cuda: delta_out = Mamba(RMSNorm(res)), res = res_in + delta_in.
// state: conv and ssm, float, NULL: zeros
template <typename X>
void mamba1_block_forward_cuda(const CudaRun<X>* run, const LayerCuda<X>* L, const ActsCuda<X>* a,
                               const ScratchCuda<X>* w, const float* res_in, const X* delta_in,
                               float* const* state0, float* const* stateT) {
    const Config* c = run->config;
    size_t B = run->B, T = run->T, M = B * T, D = (size_t)c->d_model, E = (size_t)c->d_inner,
           N = (size_t)c->d_state;
    size_t K = (size_t)c->d_conv, R = (size_t)c->dt_rank, RBC = R + 2 * N;
    cudaStream_t stream = run->stream;
    residual_rmsnorm_forward_cuda(a->res, a->u, a->rstd, res_in, delta_in, L->p[P_NORM], M, D,
                                  (float)c->norm_eps, stream);
    matmul_forward_cuda(run->matmul, a->xz, 2 * E, a->u, D, L->px[P_IN], L->p[P_IN_BIAS], M, D, 2 * E,
                        stream);
    causal_conv1d_forward_cuda(a->x, stateT[0], a->xz, 2 * E, state0[0], L->p[P_CONV], L->p[P_CONV_BIAS],
                               run->doc, B, T, E, K, stream);
    matmul_forward_cuda(run->matmul, a->rbc, RBC, a->x, E, L->px[P_X], (const float*)NULL, M, E, RBC, stream);
    matmul_forward_cuda(run->matmul, a->dt_raw, E, a->rbc, RBC, L->px[P_DT], (const float*)NULL, M, R, E,
                        stream);
    selective_scan_forward_cuda<X>(w->y, a->s, a->hs, stateT[1], a->x, a->dt_raw, L->p[P_DT_BIAS],
                                   L->p[P_A_LOG], a->rbc + R, a->rbc + R + N, RBC, L->p[P_D], a->xz + E,
                                   2 * E, state0[1], run->doc, B, T, E, N, stream);
    matmul_forward_cuda(run->matmul, w->delta, D, w->y, E, L->px[P_OUT], L->p[P_OUT_BIAS], M, E, D, stream);
}

// mamba1_block_backward_cuda: w->dres is the gradient of what the next norm read, w->dres_x the same in X;
// both come out as the gradient of what this block's norm read.
template <typename X>
void mamba1_block_backward_cuda(const CudaRun<X>* run, const LayerCuda<X>* L, const ActsCuda<X>* a,
                                const ScratchCuda<X>* w, float* const* state0) {
    const Config* c = run->config;
    size_t B = run->B, T = run->T, M = B * T, D = (size_t)c->d_model, E = (size_t)c->d_inner,
           N = (size_t)c->d_state;
    size_t K = (size_t)c->d_conv, R = (size_t)c->dt_rank, RBC = R + 2 * N;
    cudaStream_t stream = run->stream;
    Matmul* mm = run->matmul;
    // out = W_out y: the gradient of y first, the scan's backward makes y again for the weight gradient
    matmul_backward_cuda(mm, w->dy, E, false, (float*)NULL, (float*)NULL, w->dres_x, D, (const X*)NULL, 0,
                         L->px[P_OUT], w->sums, M, E, D, stream);
    selective_scan_backward_cuda<X>(w->dx, w->ddt, w->dxz + E, 2 * E, w->y, L->grad[P_A_LOG], L->grad[P_D],
                                    L->grad[P_DT_BIAS], w->drbc + R, w->drbc + R + N, RBC, (float*)NULL,
                                    w->dy, (const float*)NULL, a->hs, a->s, a->x, a->dt_raw, L->p[P_DT_BIAS],
                                    L->p[P_A_LOG], a->rbc + R, a->rbc + R + N, RBC, L->p[P_D], a->xz + E,
                                    2 * E, run->doc, w->sums, B, T, E, N, stream);
    matmul_backward_cuda(mm, (X*)NULL, 0, false, L->grad[P_OUT], L->grad[P_OUT_BIAS], w->dres_x, D, w->y, E,
                         L->px[P_OUT], w->sums, M, E, D, stream);
    matmul_backward_cuda(mm, w->drbc, RBC, false, L->grad[P_DT], (float*)NULL, w->ddt, E, a->rbc, RBC,
                         L->px[P_DT], w->sums, M, R, E, stream);
    matmul_backward_cuda(mm, w->dx, E, true, L->grad[P_X], (float*)NULL, w->drbc, RBC, a->x, E, L->px[P_X],
                         w->sums, M, E, RBC, stream);
    causal_conv1d_backward_cuda(w->dxz, 2 * E, L->grad[P_CONV], L->grad[P_CONV_BIAS], (float*)NULL, w->dx,
                                (const float*)NULL, a->xz, 2 * E, state0[0], L->p[P_CONV], L->p[P_CONV_BIAS],
                                run->doc, w->sums, B, T, E, K, stream);
    matmul_backward_cuda(mm, w->du, D, false, L->grad[P_IN], L->grad[P_IN_BIAS], w->dxz, 2 * E, a->u, D,
                         L->px[P_IN], w->sums, M, D, 2 * E, stream);
    rmsnorm_backward_cuda(w->dres, w->dres_x, L->grad[P_NORM], w->du, a->res, L->p[P_NORM], a->rstd, w->sums,
                          M, D, stream);
}

template <typename X>
void mlp_block_forward_cuda(const CudaRun<X>* run, const LayerCuda<X>* L, const ActsCuda<X>* a,
                            const ScratchCuda<X>* w, const float* res_in, const X* delta_in) {
    size_t M = run->B * run->T, D = (size_t)run->config->d_model, F = (size_t)run->config->d_intermediate;
    residual_rmsnorm_forward_cuda(a->res, a->u, a->rstd, res_in, delta_in, L->p[P_MLP_NORM], M, D,
                                  (float)run->config->norm_eps, run->stream);
    matmul_forward_cuda(run->matmul, a->h, 2 * F, a->u, D, L->px[P_FC1], (const float*)NULL, M, D, 2 * F,
                        run->stream);
    gate_forward_cuda(w->m, a->h, 2 * F, a->h + F, 2 * F, M, F, run->stream);
    matmul_forward_cuda(run->matmul, w->delta, D, w->m, F, L->px[P_FC2], (const float*)NULL, M, F, D,
                        run->stream);
}

template <typename X>
void mlp_block_backward_cuda(const CudaRun<X>* run, const LayerCuda<X>* L, const ActsCuda<X>* a,
                             const ScratchCuda<X>* w) {
    size_t M = run->B * run->T, D = (size_t)run->config->d_model, F = (size_t)run->config->d_intermediate;
    Matmul* mm = run->matmul;
    matmul_backward_cuda(mm, w->dm, F, false, (float*)NULL, (float*)NULL, w->dres_x, D, (const X*)NULL, 0,
                         L->px[P_FC2], w->sums, M, F, D, run->stream);
    gate_backward_cuda(w->dh, 2 * F, w->dh + F, 2 * F, w->m, w->dm, a->h, 2 * F, a->h + F, 2 * F, M, F,
                       run->stream);
    matmul_backward_cuda(mm, (X*)NULL, 0, false, L->grad[P_FC2], (float*)NULL, w->dres_x, D, w->m, F,
                         L->px[P_FC2], w->sums, M, F, D, run->stream);
    matmul_backward_cuda(mm, w->du, D, false, L->grad[P_FC1], (float*)NULL, w->dh, 2 * F, a->u, D,
                         L->px[P_FC1], w->sums, M, D, 2 * F, run->stream);
    rmsnorm_backward_cuda(w->dres, w->dres_x, L->grad[P_MLP_NORM], w->du, a->res, L->p[P_MLP_NORM], a->rstd,
                          w->sums, M, D, run->stream);
}

// ---------------------------------------------------------------------------------------------------
// 6. Model

enum { CLASSIFIER_ROWS_CUDA = 16384 };      // logits exist for this many tokens at a time

// ArenaCuda: hands out pieces of one device allocation; with base NULL it only counts.
typedef struct { char* base; size_t used; } ArenaCuda;

template <typename Y> static void arena_take(ArenaCuda* arena, Y** p, size_t count) {
    *p = arena->base ? (Y*)(arena->base + arena->used) : NULL;
    arena->used += (count * sizeof(Y) + 255) / 256 * 256;
}

// WorkCuda: the device memory of one forward (and backward) over at most B x T tokens.
template <typename X> struct WorkCuda {
    size_t B, T, bytes;
    bool training, recompute;
    char* memory;
    ActsCuda<X>* acts;              // [n_layers]
    ScratchCuda<X> scratch;
    float *res0, *res_last, *f_rstd, *losses, *scale;
    X *f, *df, *logits;
    int *tokens, *targets, *doc;
};

template <typename X> static void work_plan(WorkCuda<X>* w, const Model* m, ArenaCuda* arena) {
    const Config* c = &m->config;
    size_t B = w->B, T = w->T, M = B * T, D = (size_t)c->d_model, E = (size_t)c->d_inner,
           N = (size_t)c->d_state, K = (size_t)c->d_conv;
    size_t RBC = (size_t)c->dt_rank + 2 * N, F = (size_t)c->d_intermediate, Vp = (size_t)c->vocab_padded;
    size_t rows = min_size(M, CLASSIFIER_ROWS_CUDA);
    bool train = w->training;
    arena_take(arena, &w->tokens, M);
    arena_take(arena, &w->targets, M);
    arena_take(arena, &w->doc, M);
    arena_take(arena, &w->scale, 1);
    arena_take(arena, &w->losses, M);
    arena_take(arena, &w->res0, M * D);
    arena_take(arena, &w->res_last, M * D);
    arena_take(arena, &w->f, M * D);
    arena_take(arena, &w->f_rstd, M);
    arena_take(arena, &w->logits, rows * Vp);
    int shared[2] = {-1, -1};       // with one set of activations: the layer of each kind that owns it
    for (int l = 0; l < m->n_layers; l++) {
        ActsCuda<X>* a = &w->acts[l];
        bool mlp = m->layer[l].kind->letter == 'm';
        bool keep_res = train || l < 2;     // inference: two residual buffers, in turn
        if (keep_res) arena_take(arena, &a->res, M * D);
        else a->res = w->acts[l % 2].res;
        if ((!train || w->recompute) && shared[mlp] >= 0) {
            float* res = a->res;
            *a = w->acts[shared[mlp]];
            a->res = res;
            continue;
        }
        shared[mlp] = l;
        arena_take(arena, &a->rstd, M);
        arena_take(arena, &a->u, M * D);
        if (mlp) {
            arena_take(arena, &a->h, M * 2 * F);
            continue;
        }
        arena_take(arena, &a->xz, M * 2 * E);
        arena_take(arena, &a->x, M * E);
        arena_take(arena, &a->rbc, M * RBC);
        arena_take(arena, &a->dt_raw, M * E);
        if (train) arena_take(arena, &a->s, M * E);
        if (train) arena_take(arena, &a->hs, selective_scan_saved_cuda(B, T, E, N));
    }
    ScratchCuda<X>* s = &w->scratch;
    arena_take(arena, &s->delta, M * D);
    arena_take(arena, &s->y, M * E);
    if (F) arena_take(arena, &s->m, M * F);
    if (!train) return;
    arena_take(arena, &w->df, M * D);
    arena_take(arena, &s->dres, M * D);
    arena_take(arena, &s->dres_x, M * D);
    arena_take(arena, &s->du, M * D);
    arena_take(arena, &s->dy, M * E);
    arena_take(arena, &s->dxz, M * 2 * E);
    arena_take(arena, &s->dx, M * E);
    arena_take(arena, &s->ddt, M * E);
    arena_take(arena, &s->drbc, M * RBC);
    if (F) arena_take(arena, &s->dm, M * F);
    if (F) arena_take(arena, &s->dh, M * 2 * F);
    size_t sums = selective_scan_scratch_cuda(B, T, E, N),
           other[] = {causal_conv1d_scratch_cuda(B, T, E, K), rmsnorm_backward_scratch_cuda(M, D),
                      bias_backward_scratch_cuda(M, 2 * E), bias_backward_scratch_cuda(M, D)};
    for (size_t i = 0; i < sizeof other / sizeof other[0]; i++) sums = other[i] > sums ? other[i] : sums;
    // a smaller call may cut time differently; its partial sums are never more than twice those of the full
    // one
    arena_take(arena, &s->sums, 2 * sums);
    arena_take(arena, &s->sort, 2 * embedding_backward_scratch_cuda(M, D));
}

template <typename X>
WorkCuda<X> work_create(const Model* m, size_t B, size_t T, bool training, bool recompute) {
    WorkCuda<X> w;
    memset(&w, 0, sizeof w);
    w.B = B; w.T = T; w.training = training; w.recompute = recompute;
    w.acts = (ActsCuda<X>*)xcalloc((size_t)m->n_layers, sizeof(ActsCuda<X>));
    ArenaCuda arena = {NULL, 0};
    work_plan(&w, m, &arena);
    w.bytes = arena.used;
    size_t available = 0, total = 0;
    cudaCheck(cudaMemGetInfo(&available, &total));
    if (w.bytes > available)
        die("the activations need %.1f GiB, the GPU has %.1f GiB left; lower --batch-size or --seq-len, or "
            "use --recompute",
            (double)w.bytes / 1073741824.0, (double)available / 1073741824.0);
    w.memory = arena.base = (char*)device_calloc(w.bytes, 1);
    arena.used = 0;
    work_plan(&w, m, &arena);
    return w;
}

template <typename X> void work_free(WorkCuda<X>* w) {
    cudaCheck(cudaFree(w->memory));
    free(w->acts);
    memset(w, 0, sizeof *w);
}

// ModelCuda: parameters, gradients and moments on the device, at the offsets of the host's flat arrays.
template <typename X> struct ModelCuda {
    float *params, *grads, *m, *v;
    X* params_x;                    // the parameters in the type of the matmuls; params itself in fp32
    LayerCuda<X>* layer;
    float *norm_f, *dnorm_f, *dembedding, *dhead;
    X *embedding_x, *head_x;
    AdamWPiece* piece;
    size_t n_pieces;
    AdamWStep* step;
    double *norm, *norm_parts;
};

template <typename X> static X* x_of(const ModelCuda<X>* d, const Model* m, const real* host) {
    return host ? d->params_x + (host - m->params) : NULL;
}
template <typename X> static float* float_of(const ModelCuda<X>* d, const Model* m, const real* host) {
    return host ? d->params + (host - m->params) : NULL;
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
        d.layer[l].kind = m->layer[l].kind;
        for (int i = 0; i < m->layer[l].kind->n_params; i++) {
            const real* host = m->layer[l].params[i];
            d.layer[l].p[i] = float_of(&d, m, host);
            d.layer[l].px[i] = x_of(&d, m, host);
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
    size_t n = 0;
    for (int pass = 0; pass < 2; pass++) {
        AdamWPiece* piece = pass ? (AdamWPiece*)xcalloc(d.n_pieces, sizeof(AdamWPiece)) : NULL;
        for (int i = n = 0; i < m->n_tensors; i++)
            n = adamw_pieces(piece, n, m->tensor[i].offset, m->tensor[i].count,
                             m->tensor[i].spec->flags & DECAY);
        d.n_pieces = n;
        if (!pass) continue;
        d.piece = (AdamWPiece*)device_calloc(n, sizeof(AdamWPiece));
        cudaCheck(cudaMemcpy(d.piece, piece, n * sizeof(AdamWPiece), cudaMemcpyHostToDevice));
        free(piece);
    }
    d.step = (AdamWStep*)device_calloc(1, sizeof(AdamWStep));
    d.norm = (double*)device_calloc(1, sizeof(double));
    d.norm_parts = (double*)device_calloc(NORM_PARTS, sizeof(double));
    return d;
}

template <typename X> void model_cuda_free(ModelCuda<X>* d) {
    if ((void*)d->params_x != (void*)d->params) cudaCheck(cudaFree(d->params_x));
    void* memory[] = {d->params, d->grads, d->m, d->v, d->piece, d->step, d->norm, d->norm_parts};
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

// model_forward_cuda: w->tokens (B,T) to w->f. state: device copies of `host`-shaped states, from row0 on, or
// NULL
template <typename X>
void model_forward_cuda(const Model* m, const ModelCuda<X>* d, WorkCuda<X>* w, const CudaRun<X>* run,
                        float* state0, float* stateT, const State* host, size_t row0) {
    size_t M = run->B * run->T, D = (size_t)m->config.d_model;
    embedding_forward_cuda(w->res0, w->tokens, d->embedding_x, M, D, run->stream);
    const float* res = w->res0;
    const X* delta = NULL;
    for (int l = 0; l < m->n_layers; l++) {
        float *s0[MAX_FIELDS], *sT[MAX_FIELDS];
        state_fields(s0, m, state0, host, l, row0);
        state_fields(sT, m, stateT, host, l, row0);
        if (m->layer[l].kind->letter == 'm')
            mlp_block_forward_cuda(run, &d->layer[l], &w->acts[l], &w->scratch, res, delta);
        else mamba1_block_forward_cuda(run, &d->layer[l], &w->acts[l], &w->scratch, res, delta, s0, sT);
        res = w->acts[l].res;
        delta = w->scratch.delta;
    }
    residual_rmsnorm_forward_cuda(w->res_last, w->f, w->f_rstd, res, delta, d->norm_f, M, D,
                                  (float)m->config.norm_eps, run->stream);
}

// model_loss_cuda: losses of w->targets into w->losses; with backward also w->df and the head's gradient,
// scaled by *w->scale
template <typename X>
void model_loss_cuda(const Model* m, const ModelCuda<X>* d, WorkCuda<X>* w, const CudaRun<X>* run,
                     bool backward) {
    size_t M = run->B * run->T, D = (size_t)m->config.d_model, Vp = (size_t)m->config.vocab_padded;
    for (size_t m0 = 0; m0 < M; m0 += CLASSIFIER_ROWS_CUDA) {
        size_t n = min_size(CLASSIFIER_ROWS_CUDA, M - m0);
        matmul_forward_cuda(run->matmul, w->logits, Vp, w->f + m0 * D, D, d->head_x, (const float*)NULL, n, D,
                            Vp, run->stream);
        crossentropy_cuda(w->losses + m0, backward ? w->logits : (X*)NULL, w->logits, w->targets + m0,
                          w->scale, n, Vp, run->stream);
        if (backward)
            matmul_backward_cuda(run->matmul, w->df + m0 * D, D, false, d->dhead, (float*)NULL, w->logits, Vp,
                                 w->f + m0 * D, D, d->head_x, w->scratch.sums, n, D, Vp, run->stream);
    }
}

// model_backward_cuda: from w->df to every gradient (+=). With recompute each layer runs forward again just
// before.
template <typename X>
void model_backward_cuda(const Model* m, const ModelCuda<X>* d, WorkCuda<X>* w, const CudaRun<X>* run,
                         float* state0, const State* host) {
    size_t M = run->B * run->T, D = (size_t)m->config.d_model;
    ScratchCuda<X>* s = &w->scratch;
    cudaCheck(cudaMemsetAsync(s->dres, 0, M * D * sizeof(float), run->stream));
    rmsnorm_backward_cuda(s->dres, s->dres_x, d->dnorm_f, w->df, w->res_last, d->norm_f, w->f_rstd, s->sums,
                          M, D, run->stream);
    for (int l = m->n_layers - 1; l >= 0; l--) {
        float *s0[MAX_FIELDS], *none[MAX_FIELDS] = {NULL};
        state_fields(s0, m, state0, host, l, 0);
        bool mlp = m->layer[l].kind->letter == 'm';
        if (w->recompute) {      // res of this layer is saved: no addition this time
            if (mlp)
                mlp_block_forward_cuda(run, &d->layer[l], &w->acts[l], s, w->acts[l].res, (const X*)NULL);
            else
                mamba1_block_forward_cuda(run, &d->layer[l], &w->acts[l], s, w->acts[l].res, (const X*)NULL,
                                          s0, none);
        }
        if (mlp) mlp_block_backward_cuda(run, &d->layer[l], &w->acts[l], s);
        else mamba1_block_backward_cuda(run, &d->layer[l], &w->acts[l], s, s0);
    }
    embedding_backward_cuda(d->dembedding, s->dres, w->tokens, s->sort, M, D, (size_t)m->config.vocab_padded,
                            run->stream);
}

// ---------------------------------------------------------------------------------------------------
// 9. Backend

template <typename X> struct CudaBackend {
    ModelCuda<X> model;
    WorkCuda<X> work;
    Matmul matmul;
    cudaStream_t stream;
    float *state_in, *state_out;       // carried states of one micro-batch
    size_t carried;                    // their bytes
};

template <typename X> struct CudaSession {
    WorkCuda<X> work;
    float *state, *logits;
};

template <typename X> static CudaRun<X> run_of(Backend* b, const int* doc, size_t B, size_t T) {
    CudaBackend<X>* c = (CudaBackend<X>*)b->device;
    CudaRun<X> run = {&b->model->config, &c->matmul, B, T, doc, c->stream};
    return run;
}

template <typename Y> static void to_device(Y* device, const Y* host, size_t n, cudaStream_t stream) {
    cudaCheck(cudaMemcpyAsync(device, host, n * sizeof(Y), cudaMemcpyHostToDevice, stream));
}

// carried states live on the host between steps and travel with the micro-batch
template <typename X> static bool carried_states(Backend* b, int micro) {
    CudaBackend<X>* c = (CudaBackend<X>*)b->device;
    if (!b->carry_in || micro < 0) return false;
    size_t bytes = b->carry_in[micro].n_elements * sizeof(float);
    if (c->carried < bytes) {
        c->state_in = (float*)device_calloc(bytes, 1);
        c->state_out = (float*)device_calloc(bytes, 1);
        c->carried = bytes;
    }
    to_device(c->state_in, b->carry_in[micro].data, b->carry_in[micro].n_elements, c->stream);
    return true;
}

template <typename X>
static double cuda_forward(Backend* b, int micro, const int* tokens, const int* targets, const int* doc,
                           size_t B, size_t T, double scale) {
    CudaBackend<X>* c = (CudaBackend<X>*)b->device;
    WorkCuda<X>* w = &c->work;
    size_t M = B * T;
    float scale_float = (float)scale;
    bool carried = carried_states<X>(b, micro);
    to_device(w->tokens, tokens, M, c->stream);
    to_device(w->targets, targets, M, c->stream);
    to_device(w->scale, &scale_float, 1, c->stream);
    if (doc) to_device(w->doc, doc, M, c->stream);
    CudaRun<X> run = run_of<X>(b, doc ? w->doc : NULL, B, T);
    model_forward_cuda(b->model, &c->model, w, &run, carried ? c->state_in : NULL,
                       carried ? c->state_out : NULL, carried ? &b->carry_in[micro] : NULL, 0);
    model_loss_cuda(b->model, &c->model, w, &run, scale > 0);
    float* losses = (float*)xcalloc(M, sizeof(float));
    cudaCheck(cudaMemcpyAsync(losses, w->losses, M * sizeof(float), cudaMemcpyDeviceToHost, c->stream));
    if (carried)
        cudaCheck(cudaMemcpyAsync(b->carry_out[micro].data, c->state_out,
                                  b->carry_out[micro].n_elements * sizeof(float), cudaMemcpyDeviceToHost,
                                  c->stream));
    cudaCheck(cudaStreamSynchronize(c->stream));
    double sum = 0;
    for (size_t i = 0; i < M; i++) sum += (double)losses[i];
    free(losses);
    return sum;
}

template <typename X>
static void cuda_backward(Backend* b, int micro, const int* tokens, const int* doc, size_t B, size_t T) {
    CudaBackend<X>* c = (CudaBackend<X>*)b->device;
    (void)tokens;       // still on the device from forward, like the document ids and the carried states
    bool carried = b->carry_in && micro >= 0;
    CudaRun<X> run = run_of<X>(b, doc ? c->work.doc : NULL, B, T);
    model_backward_cuda(b->model, &c->model, &c->work, &run, carried ? c->state_in : NULL,
                        carried ? &b->carry_in[micro] : NULL);
}

template <typename X> static void cuda_zero_gradients(Backend* b) {
    CudaBackend<X>* c = (CudaBackend<X>*)b->device;
    cudaCheck(cudaMemsetAsync(c->model.grads, 0, b->model->n_elements * sizeof(float), c->stream));
}

template <typename X> static double cuda_gradient_norm(Backend* b) {
    CudaBackend<X>* c = (CudaBackend<X>*)b->device;
    double norm;
    gradient_norm_cuda(c->model.norm, c->model.grads, b->model->n_elements, c->model.norm_parts, c->stream);
    cudaCheck(cudaMemcpyAsync(&norm, c->model.norm, sizeof norm, cudaMemcpyDeviceToHost, c->stream));
    cudaCheck(cudaStreamSynchronize(c->stream));
    b->norm = norm;
    return norm;
}

template <typename X>
static void cuda_update(Backend* b, const AdamW* opt, double lr, double scale, int64_t step) {
    CudaBackend<X>* c = (CudaBackend<X>*)b->device;
    ModelCuda<X>* d = &c->model;
    AdamWStep s = adamw_step_cuda(opt, lr, scale < 1 ? scale * (b->norm + 1e-6) : 0, step);
    to_device(d->step, &s, 1, c->stream);
    X* copy = (void*)d->params_x == (void*)d->params ? NULL : d->params_x;
    adamw_cuda(d->params, copy, d->grads, d->m, d->v, d->piece, d->step, d->norm, d->n_pieces, c->stream);
}

// upload, download: parameters and, when training, moments (and on the way back gradients, for diagnosis)
template <typename X> static void cuda_upload(Backend* b) {
    CudaBackend<X>* c = (CudaBackend<X>*)b->device;
    const Model* m = b->model;
    to_device(c->model.params, m->params, m->n_elements, c->stream);
    if (c->model.m) to_device(c->model.m, m->m, m->n_elements, c->stream);
    if (c->model.v) to_device(c->model.v, m->v, m->n_elements, c->stream);
    if ((void*)c->model.params_x != (void*)c->model.params)
        cast_cuda(c->model.params_x, c->model.params, m->n_elements, c->stream);
    cudaCheck(cudaStreamSynchronize(c->stream));
}

template <typename X> static void cuda_download(Backend* b) {
    CudaBackend<X>* c = (CudaBackend<X>*)b->device;
    Model* m = b->model;
    float *host[] = {m->params, m->grads, m->m, m->v},
          *device[] = {c->model.params, c->model.grads, c->model.m, c->model.v};
    for (int i = 0; i < 4; i++)
        if (host[i] && device[i])
            cudaCheck(cudaMemcpyAsync(host[i], device[i], m->n_elements * sizeof(float),
                                      cudaMemcpyDeviceToHost, c->stream));
    cudaCheck(cudaStreamSynchronize(c->stream));
}

template <typename X> static void cuda_session_open(Backend* b, Session* s) {
    CudaSession<X>* d = (CudaSession<X>*)xcalloc(1, sizeof(CudaSession<X>));
    size_t tokens = s->chunk > s->rows ? s->chunk : s->rows;
    d->work = work_create<X>(b->model, 1, tokens, false, false);
    d->state = (float*)device_calloc(s->state.n_elements, sizeof(float));
    d->logits = (float*)device_calloc(s->rows * (size_t)b->model->config.vocab_padded, sizeof(float));
    s->device = d;
}

template <typename X> static void cuda_session_close(Backend* b, Session* s) {
    (void)b;
    CudaSession<X>* d = (CudaSession<X>*)s->device;
    work_free(&d->work);
    cudaCheck(cudaFree(d->state));
    cudaCheck(cudaFree(d->logits));
    free(d);
}

template <typename X> static void cuda_session_sync(Backend* b, Session* s, bool to_host) {
    CudaBackend<X>* c = (CudaBackend<X>*)b->device;
    CudaSession<X>* d = (CudaSession<X>*)s->device;
    if (!to_host) to_device(d->state, s->state.data, s->state.n_elements, c->stream);
    else
        cudaCheck(cudaMemcpyAsync(s->state.data, d->state, s->state.n_elements * sizeof(float),
                                  cudaMemcpyDeviceToHost, c->stream));
    cudaCheck(cudaStreamSynchronize(c->stream));
}

template <typename X>
static void cuda_decode(Backend* b, Session* s, size_t row0, size_t rows, const int* tokens, size_t T,
                        real* logits) {
    CudaBackend<X>* c = (CudaBackend<X>*)b->device;
    CudaSession<X>* d = (CudaSession<X>*)s->device;
    const Model* m = b->model;
    size_t D = (size_t)m->config.d_model, Vp = (size_t)m->config.vocab_padded;
    to_device(d->work.tokens, tokens, rows * T, c->stream);
    CudaRun<X> run = run_of<X>(b, NULL, rows, T);
    model_forward_cuda(m, &c->model, &d->work, &run, d->state, d->state, &s->state, row0);
    if (!logits) return;
    for (size_t r = 0; r < rows; r += CLASSIFIER_ROWS_CUDA) {
        size_t n = min_size(CLASSIFIER_ROWS_CUDA, rows - r);
        // the last token of each row, side by side
        cudaCheck(cudaMemcpy2DAsync(d->work.scratch.delta, D * sizeof(X), d->work.f + (r * T + T - 1) * D,
                                    T * D * sizeof(X), D * sizeof(X), n, cudaMemcpyDeviceToDevice,
                                    c->stream));
        matmul_forward_cuda(&c->matmul, d->work.logits, Vp, d->work.scratch.delta, D, c->model.head_x,
                            (const float*)NULL, n, D, Vp, c->stream);
        cast_cuda(d->logits, d->work.logits, n * Vp, c->stream);
        cudaCheck(cudaMemcpyAsync(logits + r * Vp, d->logits, n * Vp * sizeof(float), cudaMemcpyDeviceToHost,
                                  c->stream));
    }
    cudaCheck(cudaStreamSynchronize(c->stream));
}

template <typename X> static void cuda_destroy(Backend* b) {
    CudaBackend<X>* c = (CudaBackend<X>*)b->device;
    if (c->work.memory) work_free(&c->work);
    model_cuda_free(&c->model);
    cudaCheck(cudaFree(c->matmul.workspace));
    cudaCheck(cudaFree(c->state_in));
    cudaCheck(cudaFree(c->state_out));
    cublasCheck(cublasLtDestroy(c->matmul.handle));
    free(c->matmul.plan);
    cudaCheck(cudaStreamDestroy(c->stream));
    free(c);
    workspace_free(&b->work);
    state_free(&b->none);
}

template <typename X>
static Backend backend_cuda_of(Model* m, size_t B, size_t T, bool training, bool recompute) {
    Backend b;
    memset(&b, 0, sizeof b);
    b.name = sizeof(X) == 2 ? "cuda, bf16" : "cuda, fp32";
    b.model = m;
    b.none = state_none(m);
    CudaBackend<X>* c = (CudaBackend<X>*)xcalloc(1, sizeof(CudaBackend<X>));
    b.device = c;
    cudaCheck(cudaStreamCreate(&c->stream));
    cublasCheck(cublasLtCreate(&c->matmul.handle));
    c->matmul.workspace = device_calloc(MATMUL_WORKSPACE, 1);
    c->model = model_cuda_create<X>(m, training);
    if (B) c->work = work_create<X>(m, B, T, training, recompute);
    b.activation_bytes = c->work.bytes;
    b.forward = cuda_forward<X>;
    b.backward = cuda_backward<X>;
    b.zero_gradients = cuda_zero_gradients<X>;
    b.gradient_norm = cuda_gradient_norm<X>;
    b.update = cuda_update<X>;
    b.decode = cuda_decode<X>;
    b.download = cuda_download<X>;
    b.upload = cuda_upload<X>;
    b.session_open = cuda_session_open<X>;
    b.session_close = cuda_session_close<X>;
    b.session_sync = cuda_session_sync<X>;
    b.destroy = cuda_destroy<X>;
    return b;
}

// backend_cuda: --device cuda, in the precision asked for
Backend backend_cuda(const Options* o, Model* m, size_t B, size_t T, bool training, bool recompute) {
    device_require();
    if (strcmp(o->precision, "fp32") == 0) return backend_cuda_of<float>(m, B, T, training, recompute);
    return backend_cuda_of<__nv_bfloat16>(m, B, T, training, recompute);
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
