// What the ladders in dev/cuda share: random inputs, comparison with the CPU, timing with a cold cache, the
// table. A ladder is one kernel in several versions ("rungs"), from the obvious one to the one that ships.
//
//   static const Rung rungs[] = {{"one thread per row", launch1, 0}, {"shipped", launch2, 0}};
//   static void setup(int which) {...}    which 0: a small ragged problem, 1: the timed one. Makes the
//                                         inputs (random_array), the outputs (nan_array) and, with the CPU
//                                         functions of train_mamba.c, what is expected (expect).
//   int main(int argc, char** argv) {
//       const Ladder ladder = {"rmsnorm_forward", "B8 T2048 D768, bf16", rungs, COUNT(rungs), setup, bytes,
//                              0, 0};
//       return ladder_main(argc, argv, &ladder, 1);
//   }
//
// The list of rungs that is printed is the array that is launched. `./build/dev/<kernel>` runs all rungs,
// `./build/dev/<kernel> 3` the third of every ladder of the file.
//
// Time: events around one launch, after 512 MB of other data have been read through the cache; median and
// minimum of 50. Floor: the time that the bytes need at the bandwidth of a copy measured in the same run, or
// the one that the file gives (special functions, matmul). Error: the largest relative L2 difference of any
// output from the CPU in both problems; outputs are NaN before each launch, so what is not written fails.
// A problem of gigabytes repeats a smaller one (repeated_array, and expect with a count): the CPU computes
// that once, and still every element is compared.
#ifndef LADDER_H
#define LADDER_H

#ifdef LADDER_MODEL                    // a ladder that needs blocks and models, too
#define SSM_NO_CUDA_MAIN
#else
#define SSM_KERNELS_ONLY
#endif
// defines: the kernels and launchers, and all of train_mamba.c
#include "../../train_mamba.cu"

#include <algorithm>
#include <vector>

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

typedef struct {
    const char* idea;
    void (*launch)(void);              // on stream 0, on the problem of the last setup
    double limit;                      // largest error; 0: that of the output (expect)
} Rung;

typedef struct {
    const char *name, *shape;
    const Rung* rung;
    int n_rungs;
    void (*setup)(int which);
    double bytes, flop;                // of the timed problem; flop 0: GB/s is printed, otherwise TFLOP/s
    double floor_ms;                   // 0: bytes / measured copy bandwidth
} Ladder;

// ------------------------------------------------------------------------------------------------
// Arrays: the same numbers on both sides

// Output: an array on the device, what it must be, and what it is before each launch (empty: NaN). When
// expected and before are shorter than the array, they repeat.
typedef struct {
    const char* name;
    void* device;
    size_t count, width;               // elements, bytes of one
    std::vector<float> expected, before;
    double limit;
} Output;

static std::vector<Output> ladder_outputs;
static std::vector<void*> ladder_memory;

// the conversions of the kernels, on the host
static inline float host_float(float x) { return x; }
static inline float host_float(bf16 x) { return __bfloat162float(x); }
static inline void host_store(float* p, float x) { *p = x; }
static inline void host_store(bf16* p, float x) { *p = __float2bfloat16_rn(x); }

static float array_float(const void* p, size_t width, size_t i) {
    return width == 4 ? ((const float*)p)[i] : host_float(((const bf16*)p)[i]);
}

template <typename X> X* device_array(size_t n) {
    X* p;
    cudaCheck(cudaMalloc((void**)&p, n * sizeof(X) + 256));
    cudaCheck(cudaMemset(p, 0xff, n * sizeof(X)));               // NaN in both types
    ladder_memory.push_back(p);
    return p;
}

template <typename X> X* device_copy(const std::vector<X>& v) {
    X* p = device_array<X>(v.size());
    cudaCheck(cudaMemcpy(p, v.data(), v.size() * sizeof(X), cudaMemcpyHostToDevice));
    return p;
}

// fill_repeated: `to` (bytes long) = a, a, a ..., each copy made of all those before it
static void fill_repeated(void* to, size_t bytes, const void* a, size_t a_bytes) {
    size_t done = a_bytes < bytes ? a_bytes : bytes;
    cudaCheck(cudaMemcpy(to, a, done, cudaMemcpyHostToDevice));
    while (done < bytes) {
        size_t more = done < bytes - done ? done : bytes - done;
        cudaCheck(cudaMemcpy((char*)to + done, to, more, cudaMemcpyDeviceToDevice));
        done += more;
    }
}

// repeated_array: n numbers; number i is random number i % period. *host receives those, `period` of them,
// normally distributed, exact in X
template <typename X>
X* repeated_array(size_t n, size_t period, double scale, double mean, std::vector<float>* host) {
    static uint64_t stream = 1000;
    stream++;
    std::vector<X> x(period);
    host->resize(period);
    #pragma omp parallel for
    for (size_t i = 0; i < period; i++) {
        host_store(&x[i], (float)(scale * random_normal(7, stream, i) + mean));
        (*host)[i] = host_float(x[i]);
    }
    X* p = device_array<X>(n);
    fill_repeated(p, n * sizeof(X), x.data(), period * sizeof(X));
    return p;
}

// random_array: n normal numbers that are exact in X; *host receives them as floats
template <typename X>
X* random_array(size_t n, double scale, double mean, std::vector<float>* host) {
    return repeated_array<X>(n, n, scale, mean, host);
}

// nan_array: an output of n elements
template <typename X> X* nan_array(size_t n) { return device_array<X>(n); }

// expect: what the array must hold after a launch, compared by relative L2 error. `before`: what it holds
// before, for outputs that are added to; empty: NaN. count: elements of the array, 0: as many as expected
template <typename X>
void expect(const char* name, X* device, const std::vector<float>& expected, double limit,
            const std::vector<float>& before = std::vector<float>(), size_t count = 0) {
    Output o = {name, device, count ? count : expected.size(), sizeof(X), expected, before, limit};
    ladder_outputs.push_back(o);
}

static void outputs_reset(void) {
    for (Output& o : ladder_outputs) {
        cudaCheck(cudaMemset(o.device, 0xff, o.count * o.width));
        if (o.before.empty()) continue;
        std::vector<bf16> narrow(o.width == 2 ? o.before.size() : 0);
        for (size_t i = 0; i < narrow.size(); i++) host_store(&narrow[i], o.before[i]);
        const void* from = o.width == 2 ? (const void*)narrow.data() : (const void*)o.before.data();
        fill_repeated(o.device, o.count * o.width, from, o.before.size() * o.width);
    }
}

// outputs_check: the worst error, in units of its limit (above 1: failed), and the error itself
static double outputs_check(double limit, double* error, const char** worst_name) {
    double worst = 0;
    *error = 0;
    *worst_name = "";
    std::vector<char> host;
    for (Output& o : ladder_outputs) {
        host.resize(o.count * o.width);
        cudaCheck(cudaMemcpy(host.data(), o.device, host.size(), cudaMemcpyDeviceToHost));
        double diff = 0, norm = 0;
        #pragma omp parallel for reduction(+ : diff, norm)
        for (size_t i = 0; i < o.count; i++) {
            double want = (double)o.expected[i % o.expected.size()];
            double d = (double)array_float(host.data(), o.width, i) - want;
            diff += d * d;
            norm += want * want;
        }
        double e = norm > 0 ? sqrt(diff / norm) : sqrt(diff), ratio = e / (limit > 0 ? limit : o.limit);
        if (!(ratio <= worst)) { worst = ratio; *error = e; *worst_name = o.name; }
    }
    return worst;
}

static void ladder_release(void) {
    cudaCheck(cudaDeviceSynchronize());
    for (void* p : ladder_memory) cudaCheck(cudaFree(p));
    ladder_memory.clear();
    ladder_outputs.clear();
}

// ------------------------------------------------------------------------------------------------
// Time

enum { LADDER_REPEATS = 50 };
static const size_t LADDER_FLUSH = (size_t)512 << 20;

// Reads, not writes: what is written stays in the cache as a debt, and the kernel that is timed would pay it.
__global__ void flush_kernel(const uint4* p, size_t n, uint4* nowhere) {
    uint4 sum = make_uint4(0, 0, 0, 0);
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        sum.x ^= p[i].x; sum.y ^= p[i].y; sum.z ^= p[i].z; sum.w ^= p[i].w;
    }
    if ((sum.x & sum.y & sum.z & sum.w) == 0x12345678) *nowhere = sum;       // never: so that the loop stays
}

// time_cold: milliseconds of one launch with a cold cache, median; *least: the minimum
static double time_cold(void (*launch)(void), double* least) {
    static char* flush = NULL;
    static cudaEvent_t begin, end;
    if (!flush) {
        cudaCheck(cudaMalloc((void**)&flush, LADDER_FLUSH));
        cudaCheck(cudaMemset(flush, 0, LADDER_FLUSH));
        cudaCheck(cudaEventCreate(&begin));
        cudaCheck(cudaEventCreate(&end));
    }
    std::vector<float> ms(LADDER_REPEATS);
    for (int i = -2; i < LADDER_REPEATS; i++) {                    // two to warm up
        flush_kernel<<<1056, 512>>>((const uint4*)flush, LADDER_FLUSH / sizeof(uint4), (uint4*)flush);
        cudaCheck(cudaGetLastError());
        cudaCheck(cudaEventRecord(begin, 0));
        launch();
        cudaCheck(cudaEventRecord(end, 0));
        cudaCheck(cudaEventSynchronize(end));
        float t;
        cudaCheck(cudaEventElapsedTime(&t, begin, end));
        if (i >= 0) ms[(size_t)i] = t;
    }
    std::sort(ms.begin(), ms.end());
    *least = ms[0];
    return ms[LADDER_REPEATS / 2];
}

static char *copy_to, *copy_from;
static void copy_launch(void) {
    cudaCheck(cudaMemcpyAsync(copy_to, copy_from, LADDER_FLUSH, cudaMemcpyDeviceToDevice, 0));
}

// copy_bandwidth: bytes read and written per second by a large copy, the roof of everything that computes
// little
static double copy_bandwidth(void) {
    static double rate = 0;
    if (rate > 0) return rate;
    cudaCheck(cudaMalloc((void**)&copy_to, LADDER_FLUSH));
    cudaCheck(cudaMalloc((void**)&copy_from, LADDER_FLUSH));
    cudaCheck(cudaMemset(copy_from, 1, LADDER_FLUSH));
    double least, ms = time_cold(copy_launch, &least);
    cudaCheck(cudaFree(copy_to));
    cudaCheck(cudaFree(copy_from));
    rate = 2.0 * (double)LADDER_FLUSH / (ms * 1e-3);
    return rate;
}

// ------------------------------------------------------------------------------------------------
// The table

// ladder_run: checks and times all rungs (only > 0: that one). Returns the number of failures.
static int ladder_run(const Ladder* l, int only) {
    int failed = 0;
    std::vector<double> error((size_t)l->n_rungs, 0), ratio((size_t)l->n_rungs, 0);
    std::vector<const char*> where((size_t)l->n_rungs, "");
    double floor_ms = l->floor_ms > 0 ? l->floor_ms : l->bytes / copy_bandwidth() * 1e3;
    cudaDeviceProp prop;
    cudaCheck(cudaGetDeviceProperties(&prop, 0));
    printf("%s, %s: floor %.4f ms ", l->name, l->shape, floor_ms);
    if (l->bytes > 0) printf("(%.0f MB, copy %.2f TB/s), ", l->bytes / 1e6, copy_bandwidth() / 1e12);
    else printf("(%.0f GFLOP), ", l->flop / 1e9);
    printf("%s\n", prop.name);
    printf("  %-4s %-64s %9s %9s %9s %7s %9s\n", "rung", "idea", "ms", "least", l->flop ? "TFLOP/s" : "GB/s",
           "floor", "error");
    for (int which = 0; which < 2; which++) {
        l->setup(which);
        for (int r = 0; r < l->n_rungs; r++) {
            if (only > 0 && r + 1 != only) continue;
            double e, x, least, ms;
            const char* name;
            outputs_reset();
            l->rung[r].launch();
            cudaCheck(cudaDeviceSynchronize());
            x = outputs_check(l->rung[r].limit, &e, &name);
            if (!(x <= ratio[(size_t)r]) || which == 0) {
                ratio[(size_t)r] = x;
                error[(size_t)r] = e;
                where[(size_t)r] = name;
            }
            if (which == 0) continue;
            ms = time_cold(l->rung[r].launch, &least);
            bool ok = ratio[(size_t)r] <= 1;
            failed += !ok;
            printf("  v%-3d %-64s %9.4f %9.4f %9.1f %6.1f%% %9.1e%s%s\n", r + 1, l->rung[r].idea, ms, least,
                   l->flop ? l->flop / ms * 1e-9 : l->bytes / ms * 1e-6, 100 * floor_ms / ms,
                   error[(size_t)r], ok ? "" : "  FAILED: ", ok ? "" : where[(size_t)r]);
            fflush(stdout);
        }
        ladder_release();
    }
    printf("\n");
    return failed;
}

// ladder_main: the ladders of one file; argument: the number of one rung
static int ladder_main(int argc, char** argv, const Ladder* ladder, int n) {
    int only = argc > 1 ? atoi(argv[1]) : 0, failed = 0, most = 0;
    for (int i = 0; i < n; i++) most = ladder[i].n_rungs > most ? ladder[i].n_rungs : most;
    if (argc > 2 || (argc > 1 && (only < 1 || only > most)))
        die("expected the number of one rung, 1 to %d, or nothing for all; found '%s'", most,
            argv[argc > 2 ? 2 : 1]);
    device_require();
    for (int i = 0; i < n; i++) failed += ladder_run(&ladder[i], only);
    if (failed) printf("%d rungs failed\n", failed);
    return failed > 0;
}

#ifdef LADDER_MODEL
// ------------------------------------------------------------------------------------------------
// Models

// config_of: what options of `train` describe
static Config config_of(int n, const char* const* args) {
    Settings s;
    Error err;
    memset(&s, 0, sizeof s);
    if (!settings_parse(&s, WORD_TRAIN, n, (char**)args, &err)) die("%s", err.text);
    Config c = config_from_options(&s, 50277, 0);
    settings_free(&s);
    return c;
}

// random_model: as training begins, but with matrices that are exact in bf16: what it rounds is not an error
// of the kernels
static void random_model(Model* m, const Config* c, bool training) {
    model_describe(m, c);
    model_alloc(m, training);
    model_init(m, 1);
    for (int i = 0; i < m->n_tensors; i++) {
        float* p = m->params + m->tensor[i].offset;
        for (size_t j = 0; m->tensor[i].ndim == 2 && j < m->tensor[i].count; j++)
            p[j] = host_float(__float2bfloat16_rn(p[j]));
    }
}
#endif

#endif
