// The roofs: what this GPU can do at most, measured. The floors of the ladders are made of some of these
// numbers (copy, matmul, special functions); others decided how a kernel is built, see the last column.
// "seen" is what one NVIDIA H200 gave when that was decided, 2026-11-21.
//
//   make build/dev/roofs && build/dev/roofs
//
// An SM (one of the GPU's processors, 132 on an H200) has four sub-cores, each of which issues at most one
// warp instruction per clock. Instructions are counted in clocks per warp instruction and sub-core, those of
// the shared memory, of which an SM has one, in clocks per SM. A warp keeps eight independent chains going,
// so that with several warps not the latency of an instruction is seen but its rate.
#include "ladder.h"

#include <cooperative_groups.h>

enum { CHAINS = 8, SHARED_FLOATS = 8192, MAX_WARPS = 16 };
static int n_sm;

static void head(const char* title, const char* first, const char* second) {
    printf("  %-52s %8s %8s %8s   %s\n", title, first, second, "seen", "decides");
}
// a number that is 0 is left out
static void row(const char* name, double first, double second, double seen, const char* decides) {
    printf("  %-52s", name);
    const double number[] = {first, second, seen};
    for (int i = 0; i < 3; i++) {
        if (number[i] > 0) printf(" %8.4g", number[i]);
        else printf(" %8s", "");
    }
    printf("   %s\n", decides);
}

// ------------------------------------------------------------------------------------------------
// Instructions

// One step is one instruction on each chain x[i]; a, b: constants; at: an address in shared memory. WIDTH:
// the bytes that a lane reads there
#define OPERATION(name, width, code)                                                                         \
    struct name {                                                                                            \
        enum { WIDTH = width };                                                                              \
        static __device__ __forceinline__ void step(float x[CHAINS][4], float a, float b, unsigned at) {     \
            (void)a; (void)b; (void)at;                                                                      \
            _Pragma("unroll") for (int i = 0; i < CHAINS; i++) { code }                                      \
        }                                                                                                    \
    };
#define BITS(f) __float_as_uint(f)

OPERATION(Ffma, 0, asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(x[i][0]) : "f"(a), "f"(b));)
OPERATION(Ex2, 0, asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i][0]));)
OPERATION(Lg2, 0, asm volatile("lg2.approx.ftz.f32 %0, %0;" : "+f"(x[i][0]));)
OPERATION(Tanh, 0, asm volatile("tanh.approx.f32 %0, %0;" : "+f"(x[i][0]));)
OPERATION(Shift, 0, asm volatile("{.reg .b32 t; mov.b32 t, %0; shf.l.wrap.b32 t, t, %1, %2; mov.b32 %0, t;}"
                                 : "+f"(x[i][0]) : "r"(BITS(a)), "r"(BITS(b)));)
OPERATION(ToBf16, 0, asm volatile("{.reg .b32 t; cvt.rn.bf16x2.f32 t, %0, %1; mov.b32 %0, t;}"
                                  : "+f"(x[i][0]) : "f"(a));)
OPERATION(ToTf32, 0, asm volatile("{.reg .b32 t; cvt.rna.tf32.f32 t, %0; mov.b32 %0, t;}" : "+f"(x[i][0]));)
OPERATION(Shuffle, 0, x[i][0] = __shfl_sync(0xffffffffu, x[i][0], (int)(threadIdx.x * 5 + 1) % WARP);)
// the mixture of the scans: one exponential, four multiply-adds, three integer instructions, on chains far
// enough from each other that none waits for the one before
OPERATION(Mixture, 0,
    asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i][0]));
    for (int k = 0; k < 4; k++)
        asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(x[(i + 2 * k) % CHAINS][1]) : "f"(a), "f"(b));
    for (int k = 0; k < 3; k++)
        asm volatile("{.reg .b32 t; mov.b32 t, %0; shf.l.wrap.b32 t, t, %1, %2; mov.b32 %0, t;}"
                     : "+f"(x[(i + 3 * k) % CHAINS][2]) : "r"(BITS(a)), "r"(BITS(b)));)
#define MMA(name, shape_types, a_list, b_list, ...)                                                          \
    OPERATION(name, 0, asm volatile("mma.sync.aligned." shape_types " {%0, %1, %2, %3}, {" a_list "}, {"     \
                                    b_list "}, {%0, %1, %2, %3};"                                            \
                                    : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])             \
                                    : __VA_ARGS__);)
MMA(MmaTf32K4, "m16n8k4.row.col.f32.tf32.tf32.f32", "%4, %5", "%4", "r"(BITS(a)), "r"(BITS(b)))
MMA(MmaTf32K8, "m16n8k8.row.col.f32.tf32.tf32.f32", "%4, %5, %4, %5", "%4, %5", "r"(BITS(a)), "r"(BITS(b)))
MMA(MmaBf16K8, "m16n8k8.row.col.f32.bf16.bf16.f32", "%4, %5", "%4", "r"(BITS(a)), "r"(BITS(b)))
MMA(MmaBf16K16, "m16n8k16.row.col.f32.bf16.bf16.f32", "%4, %5, %4, %5", "%4, %5", "r"(BITS(a)), "r"(BITS(b)))
OPERATION(Load4, 4, asm volatile("ld.volatile.shared.f32 %0, [%1];" : "=f"(x[i][0]) : "r"(at));)
OPERATION(Load8, 8, asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];"
                                 : "=f"(x[i][0]), "=f"(x[i][1]) : "r"(at));)
OPERATION(Load16, 16, asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                                   : "=f"(x[i][0]), "=f"(x[i][1]), "=f"(x[i][2]), "=f"(x[i][3]) : "r"(at));)

typedef struct { unsigned long long clocks, ns; } Span;

// distinct: how many different addresses a warp reads; equal ones in neighbouring lanes, or `apart`
template <typename Op>
__global__ void __launch_bounds__(MAX_WARPS * WARP)
rate_kernel(Span* span, float* out, float seed, int rounds, int distinct, bool apart) {
    __shared__ __align__(16) float buffer[SHARED_FLOATS];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int i = threadIdx.x; i < SHARED_FLOATS; i += blockDim.x) buffer[i] = seed;
    unsigned at = (unsigned)__cvta_generic_to_shared(buffer) + (unsigned)warp * WARP * 16 +
                  (unsigned)((apart ? lane % distinct : lane / (WARP / distinct)) * Op::WIDTH);
    float x[CHAINS][4];
    for (int i = 0; i < CHAINS; i++) for (int j = 0; j < 4; j++) x[i][j] = seed + 0.01f * (float)(i + j);
    float a = 0.5f * seed, b = 0.25f * seed;
    __syncthreads();
    unsigned long long ns0, ns1, clock0 = (unsigned long long)clock64();
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns0));
    #pragma unroll 1
    for (int round = 0; round < rounds; round++) {
        #pragma unroll
        for (int k = 0; k < 4; k++) Op::step(x, a, b, at);
    }
    __syncthreads();
    unsigned long long clock1 = (unsigned long long)clock64();
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns1));
    if (threadIdx.x == 0) {
        span[blockIdx.x].clocks = clock1 - clock0;
        span[blockIdx.x].ns = ns1 - ns0;
    }
    float sum = 0;
    for (int i = 0; i < CHAINS; i++) for (int j = 0; j < 4; j++) sum += x[i][j];
    if (sum == 1.2345678f) *out = sum;               // so that nothing is optimized away
}

// clocks per warp instruction with `warps` warps per SM, and the clock in GHz
template <typename Op> static double clocks_of(int warps, int rounds, double* ghz, int distinct, bool apart) {
    static Span* span = device_array<Span>((size_t)n_sm);
    static float* out = device_array<float>(1);
    std::vector<Span> host((size_t)n_sm);
    for (int i = 0; i < 2; i++)                      // the first warms up
        rate_kernel<Op><<<(unsigned)n_sm, (unsigned)(warps * WARP)>>>(span, out, 0.7f, rounds, distinct,
                                                                      apart);
    cudaCheck(cudaGetLastError());
    cudaCheck(cudaMemcpy(host.data(), span, host.size() * sizeof(Span), cudaMemcpyDeviceToHost));
    *ghz = (double)host[0].clocks / (double)host[0].ns;
    int units = Op::WIDTH > 0 ? 1 : 4;                 // an SM has one shared memory and four sub-cores
    return (double)host[0].clocks / ((double)rounds * 4 * CHAINS * warps / units);
}

template <typename Op>
static void instruction(const char* name, double seen, const char* decides, int distinct = 1,
                        bool apart = false) {
    double ghz, few = clocks_of<Op>(4, 500, &ghz, distinct, apart);
    row(name, few, clocks_of<Op>(MAX_WARPS, 500, &ghz, distinct, apart), seen, decides);
}

template <typename Op> static void clock_row(const char* name, double seen, const char* decides) {
    double ghz;
    clocks_of<Op>(MAX_WARPS, 100000, &ghz, 1, false);
    row(name, 0, ghz, seen, decides);
}

static void instructions(void) {
    head("clocks per warp instruction and sub-core", "1 warp", "4 warps");
    instruction<Ffma>("multiply-add (FFMA)", 1.1, "the issue roof: one instruction per clock");
    instruction<Shift>("integer shift (SHF)", 2.07, "");
    instruction<ToBf16>("two floats to bf16 (cvt.rn.bf16x2)", 2.07, "");
    instruction<ToTf32>("float to tf32 (cvt.rna)", 4.1, "scan: operands in tf32 cost more than they save");
    instruction<Shuffle>("exchange between lanes (SHFL)", 4, "sums over a row: several rows at once");
    instruction<Ex2>("2^x (MUFU.EX2)", 8, "the floor of the scans: N + 3 per token and channel");
    instruction<Lg2>("log2 (MUFU.LG2)", 8, "softplus");
    instruction<Tanh>("tanh (MUFU.TANH)", 8, "silu by one tanh instead of ex2 and rcp");
    instruction<Mixture>("1 EX2 + 4 FFMA + 3 SHF together", 8.5, "the pipes overlap: polynomials do not pay");
    instruction<MmaTf32K4>("mma m16n8k4 tf32", 4, "");
    instruction<MmaTf32K8>("mma m16n8k8 tf32", 6, "scan backward: outer products on the tensor cores");
    instruction<MmaBf16K8>("mma m16n8k8 bf16", 4, "");
    instruction<MmaBf16K16>("mma m16n8k16 bf16", 6, "scan backward: sums over channels by mma");
    head("clocks per warp instruction and SM (shared memory)", "4 warps", "16 warps");
    instruction<Load4>("LDS.32, 32 addresses", 1, "", 32);
    instruction<Load4>("LDS.32, 1 address", 1, "", 1);
    instruction<Load8>("LDS.64, 32 addresses", 2, "", 32);
    instruction<Load8>("LDS.64, 16 addresses, pairs of lanes", 1,
                       "scan: lanes that need the same B and C are neighbours", 16);
    instruction<Load8>("LDS.64, 16 addresses, equal ones 16 lanes apart", 2, "", 16, true);
    instruction<Load16>("LDS.128, 32 addresses", 4, "", 32);
    instruction<Load16>("LDS.128, 16 addresses, pairs of lanes", 2, "a broadcast halves the cost, no more",
                        16);
    instruction<Load16>("LDS.128, 1 address", 2, "", 1);
    instruction<Load16>("LDS.128, 8 addresses, equal ones 8 lanes apart", 4,
                        "equal addresses far apart save nothing", 8, true);
    instruction<Load16>("LDS.128, 4 addresses, equal ones 4 lanes apart", 4, "", 4, true);
    head("clock under load, GHz", "", "");
    clock_row<Ffma>("FFMA alone", 0, "");
    clock_row<Mixture>("1 EX2 + 4 FFMA + 3 SHF", 1.98, "the floor of the scans, in ms");
    clock_row<MmaBf16K16>("mma m16n8k16 bf16", 1.81, "tensor cores lower the clock of everything");
}

// ------------------------------------------------------------------------------------------------
// Memory

static float *numbers, *sums;
static double *norm_d, *parts;
static size_t n_numbers;
static void read_launch(void) { gradient_norm_cuda(norm_d, numbers, n_numbers, parts, 0); }
static void write_launch(void) { cudaCheck(cudaMemsetAsync(numbers, 0, n_numbers * 4, 0)); }

// every thread adds to `each` floats; the sums are `size` floats, those of a warp side by side
__global__ void reduction_kernel(float* sums, size_t size, int each) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, stride = (size_t)gridDim.x * blockDim.x;
    for (int k = 0; k < each; k++) atomicAdd(&sums[(i + (size_t)k * stride) % size], 1.0f);
}
static size_t reduction_size;
enum { REDUCTION_BLOCKS = 4096, REDUCTION_EACH = 64 };
static void reduction_launch(void) {
    reduction_kernel<<<REDUCTION_BLOCKS, 256>>>(sums, reduction_size, REDUCTION_EACH);
}
static double reductions_per_second(size_t size) {
    double least, additions = 256.0 * REDUCTION_BLOCKS * REDUCTION_EACH;
    reduction_size = size;
    cudaCheck(cudaMemset(sums, 0, size * 4));
    double ms = time_cold(reduction_launch, &least);
    return additions / ms * 1e3;
}

// Tiles of 16 KB in the shared memory of a block, made anew `tiles` times. Four partial sums of 4 KB each are
// added up, together with those of the other blocks of a cluster (blocks that can read each other's shared
// memory: "distributed shared memory", compute capability 9.0), a share of the result per block.
enum { SUM_LENGTH = 256, SUM_ROWS = 4, TILES = 256, TILE_THREADS = 128, TILE_BLOCKS = 384 };

template <int CLUSTER>
__global__ void __launch_bounds__(TILE_THREADS) cluster_kernel(float4* out) {
#if __CUDA_ARCH__ >= 900
    namespace cg = cooperative_groups;
    cg::cluster_group cluster = cg::this_cluster();
    __shared__ float4 tile[SUM_ROWS * SUM_LENGTH];
    const int share = SUM_LENGTH / CLUSTER, first = (int)cluster.block_rank() * share;
    for (int k = 0; k < TILES; k++) {
        for (int i = threadIdx.x; i < SUM_ROWS * SUM_LENGTH; i += TILE_THREADS)
            tile[i] = make_float4((float)k, (float)i, 1, 2);
        if (CLUSTER > 1) cluster.sync();
        else __syncthreads();
        for (int v = threadIdx.x; v < share; v += TILE_THREADS) {
            float4 sum = make_float4(0, 0, 0, 0);
            #pragma unroll
            for (int block = 0; block < CLUSTER; block++) {
                const float4* from = CLUSTER > 1 ? cluster.map_shared_rank(tile, (unsigned)block) : tile;
                #pragma unroll
                for (int row = 0; row < SUM_ROWS; row++) {
                    float4 x = from[row * SUM_LENGTH + first + v];
                    sum.x += x.x; sum.y += x.y; sum.z += x.z; sum.w += x.w;
                }
            }
            out[((size_t)blockIdx.x * TILES + k) * share + v] = sum;
        }
        if (CLUSTER > 1) cluster.sync();
        else __syncthreads();
    }
#else
    (void)out;
#endif
}

static float4* tiles_out;
template <int CLUSTER> static void cluster_launch(void) {
    cudaLaunchAttribute attribute;
    memset(&attribute, 0, sizeof attribute);
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = CLUSTER;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(TILE_BLOCKS);
    config.blockDim = dim3(TILE_THREADS);
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaCheck(cudaLaunchKernelEx(&config, cluster_kernel<CLUSTER>, tiles_out));
}
template <int CLUSTER> static void cluster_row(const char* name, double seen, const char* decides) {
    double least, ms = time_cold(cluster_launch<CLUSTER>, &least);
    row(name, 0, ms * 1e3 / TILES, seen, decides);
}

static void memory(int major) {
    double least;
    n_numbers = (size_t)1 << 27;
    numbers = device_array<float>(n_numbers);
    cudaCheck(cudaMemset(numbers, 0, n_numbers * 4));
    norm_d = device_array<double>(1);
    parts = device_array<double>(NORM_PARTS);
    sums = device_array<float>((size_t)1 << 24);
    const double terabytes = 4e-9 * (double)n_numbers;       // per millisecond
    head("memory, TB/s", "", "");
    row("copy of 512 MB, bytes read + written", 0, copy_bandwidth() * 1e-12, 4.2,
        "the floor of everything that computes little");
    row("read of 512 MB (gradient_norm)", 0, terabytes / time_cold(read_launch, &least), 0, "");
    row("write of 512 MB (memset)", 0, terabytes / time_cold(write_launch, &least), 0, "");
    head("additions to floats in memory (RED), G/s", "", "");
    row("side by side in 2 MB", 0, reductions_per_second((size_t)1 << 19) * 1e-9, 0,
        "scan backward: dB and dC of a layer would be 805M");
    row("side by side in 64 MB", 0, reductions_per_second((size_t)1 << 24) * 1e-9, 0, "");
    row("all to the same 128 bytes", 0, reductions_per_second(WARP) * 1e-9, 0,
        "sums for all: one per block, then a second kernel");
    if (major < 9) return;
    head("sum over a cluster, us per tile of 16 KB and block", "", "");
    tiles_out = device_array<float4>((size_t)TILE_BLOCKS * TILES * SUM_LENGTH);
    cluster_row<1>("1 block", 0.56, "");
    cluster_row<2>("2 blocks", 1.66, "scan backward: partial sums in memory, no clusters");
    cluster_row<4>("4 blocks", 3.66, "");
}

// ------------------------------------------------------------------------------------------------
// Matmul

static Matmul mm;
static bf16 *inp, *weight, *out;
static float* dweight;
static size_t M, I, O;
static void forward_launch(void) {
    matmul_forward_cuda(&mm, out, O, inp, I, weight, (const float*)NULL, M, I, O, 0);
}
static void dinp_launch(void) {
    matmul_backward_cuda(&mm, inp, I, false, (float*)NULL, (float*)NULL, out, O, inp, I, weight,
                         (float*)NULL, M, I, O, 0);
}
static void dweight_launch(void) {
    matmul_backward_cuda(&mm, (bf16*)NULL, I, false, dweight, (float*)NULL, out, O, inp, I, weight,
                         (float*)NULL, M, I, O, 0);
}

static void matmul_row(const char* name, size_t M_, size_t I_, size_t O_, void (*launch)(void), double seen,
                       const char* decides) {
    M = M_; I = I_; O = O_;
    std::vector<float> unused;
    inp = repeated_array<bf16>(M * I, 1000003, 1, 0, &unused);
    weight = repeated_array<bf16>(O * I, 1000003, 0.02, 0, &unused);
    out = repeated_array<bf16>(M * O, 1000003, 1, 0, &unused);
    dweight = repeated_array<float>(O * I, 1000003, 1, 0, &unused);
    double least, ms = time_cold(launch, &least);
    row(name, ms, 2e-9 * (double)M * (double)I * (double)O / ms, seen, decides);
    ladder_release();
}

static void matmuls(void) {
    memset(&mm, 0, sizeof mm);
    cublasCheck(cublasLtCreate(&mm.handle));
    mm.workspace = device_calloc(MATMUL_WORKSPACE, 1);
    head("matmul, bf16, random numbers (cuBLASLt)", "ms", "TFLOP/s");
    matmul_row("8192 x 8192 x 8192", 8192, 8192, 8192, forward_launch, 790, "the floor of large matmuls");
    matmul_row("in_proj, 16384 x 768 -> 3072", 16384, 768, 3072, forward_launch, 0, "short sums: K = 768");
    matmul_row("in_proj, gradient of the input", 16384, 768, 3072, dinp_launch, 0, "");
    matmul_row("in_proj, gradient of the weight", 16384, 768, 3072, dweight_launch, 0, "few tiles: split");
    matmul_row("head, 16384 x 768 -> 50280", 16384, 768, 50280, forward_launch, 0, "the largest in a step");
}

int main(void) {
    device_require();
    cudaDeviceProp prop;
    cudaCheck(cudaGetDeviceProperties(&prop, 0));
    n_sm = prop.multiProcessorCount;
    printf("roofs of one %s, %d SMs\n", prop.name, n_sm);
    memory(prop.major);
    matmuls();
    instructions();
    printf("\n");
    return 0;
}
