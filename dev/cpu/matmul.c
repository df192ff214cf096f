// The matmul ladder: how the linear layer of train_mamba.c becomes fast, one idea per rung.
//
//   make dev                 (OpenBLAS is the last rung where it is installed)
//   build/dev/cpu_matmul         all rungs           build/dev/cpu_matmul 3           rung 3 only
//
// All rungs compute C(i,j) += sum_l A(i,l) B(l,j); the three products of a layer differ only in the strides:
//   forward   out (M,O)     = inp (M,I) weight^T     A(i,l) = inp[i,l]     B(l,j) = weight[j,l]
//   dinp      dinp (M,I)    = dout (M,O) weight      A(i,l) = dout[i,l]    B(l,j) = weight[l,j]
//   dweight   dweight (O,I) = dout^T inp             A(i,l) = dout[l,i]    B(l,j) = inp[l,j]
// Every result is compared with a naive one in double (relative L2). The bound is measured in the same run:
// the rate of fused multiply-adds on registers alone, all cores; for a single row, the time to read the
// weights once. Times are medians of many repeats; on a machine that does other work at the same time, they
// are not worth much.

#define SSM_NO_MAIN
// defines: real, matmul_forward, matmul_add, pack, vec, VEC, TILE_ROWS, TILE_COLS, FMA_VEC
#include "../../train_mamba.c"

enum { FORWARD, DINP, DWEIGHT };
static const char* kind_name[] = {"forward", "dinp", "dweight"};

// Product: one of the three products of one layer. C has N columns without gaps.
typedef struct {
    int kind;
    size_t M, N, L;                 // C (M,N), L terms in each sum
    real* C;
    const real *A, *B;
    size_t ai, al, bl, bj;          // A(i,l) at A[i*ai + l*al], B(l,j) at B[l*bl + j*bj]
    real* scratch;                  // room for a copy of B
} Product;

// 1. Three loops as in the formula. In the forward both A and B are read along rows, but without -ffast-math
// the order of a sum may not be changed, so it stays scalar: one addition after the other, each waiting for
// the one before.
static void matmul_add1(const Product* p) {
    #pragma omp parallel for collapse(2)
    for (size_t i = 0; i < p->M; i++) {
        for (size_t j = 0; j < p->N; j++) {
            real sum = 0;
            const real *a = p->A + i * p->ai, *b = p->B + j * p->bj;
            for (size_t l = 0; l < p->L; l++) sum += a[l * p->al] * b[l * p->bl];
            p->C[i * p->N + j] += sum;
        }
    }
}

// rows_of_B: B as it is if its rows are contiguous, otherwise a transposed copy. The price of rungs 2 and 3.
static const real* rows_of_B(const Product* p, size_t* ld) {
    *ld = p->bl;
    if (p->bj == 1) return p->B;
    *ld = p->N;
    #pragma omp parallel for
    for (size_t j = 0; j < p->N; j += TILE_COLS) {
        pack(p->scratch + j, p->N, p->B + j * p->bj, p->bl, p->bj, p->L, min_size(TILE_COLS, p->N - j));
    }
    return p->scratch;
}

// 2. The same loops with j inside: neighbouring j are independent sums, so the compiler uses vectors. But
// each multiplication now loads and stores a sum: the loads and stores are the limit, not the arithmetic.
static void matmul_add2(const Product* p) {
    size_t ldb;
    const real* B = rows_of_B(p, &ldb);
    #pragma omp parallel for
    for (size_t i = 0; i < p->M; i++) {
        real* __restrict__ c = p->C + i * p->N;
        for (size_t l = 0; l < p->L; l++) {
            real a = p->A[i * p->ai + l * p->al];
            const real* b = B + l * ldb;
            for (size_t j = 0; j < p->N; j++) c[j] += a * b[j];
        }
    }
}

// 3. A tile of TILE_ROWS x TILE_COLS sums in registers: TILE_ROWS numbers of A and TILE_COLS of B serve all
// of their products. B is now read down its whole length, every row in another cache line: fine while B fits
// into the cache.
static void matmul_add3(const Product* p) {
    size_t ldb;
    const real* B = rows_of_B(p, &ldb);
    #pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < p->M; i += TILE_ROWS) {
        size_t rows = min_size(TILE_ROWS, p->M - i);
        for (size_t j = 0; j < p->N; j += TILE_COLS) {
            const real* a = p->A + i * p->ai;
            real* c = p->C + i * p->N + j;
            if (rows == TILE_ROWS && j + TILE_COLS <= p->N) {
                vec sum[TILE_ROWS][2];
                for (int r = 0; r < TILE_ROWS; r++) sum[r][0] = sum[r][1] = (vec){0};
                for (size_t l = 0; l < p->L; l++) {
                    const real* b = B + l * ldb + j;
                    for (int r = 0; r < TILE_ROWS; r++) {
                        vec a_r = a[(size_t)r * p->ai + l * p->al] - (vec){0};
                        sum[r][0] = FMA_VEC(a_r, *(const vec*)b, sum[r][0]);
                        sum[r][1] = FMA_VEC(a_r, *(const vec*)(b + VEC), sum[r][1]);
                    }
                }
                for (size_t r = 0; r < TILE_ROWS; r++) {
                    *(vec*)(c + r * p->N) += sum[r][0];
                    *(vec*)(c + r * p->N + VEC) += sum[r][1];
                }
            } else {
                for (size_t r = 0; r < rows; r++) {                    // the edges as in rung 2
                    for (size_t l = 0; l < p->L; l++) {
                        for (size_t k = 0; k < min_size(TILE_COLS, p->N - j); k++) {
                            c[r * p->N + k] += a[r * p->ai + l * p->al] * B[l * ldb + j + k];
                        }
                    }
                }
            }
        }
    }
}

// 4. The built-in of train_mamba.c: the tile, with A and B packed piece by piece into the caches, and blocks
// of C shared out to the threads. For a single row it reads the weights in place.
static void matmul_add4(const Product* p) {
    if (p->kind == FORWARD) {
        matmul_forward(p->C, p->N, p->A, p->ai, p->B, NULL, p->M, p->L, p->N);
    } else {
        #pragma omp parallel
        matmul_add(p->C, p->N, false, NULL, p->A, p->ai, p->al, p->B, p->bl, p->bj, p->M, p->N, p->L);
    }
}

// 5. OpenBLAS with its own threads.
#ifdef USE_OPENBLAS
#include <cblas.h>
#undef I            // <complex.h>, which cblas.h includes, takes this name; here it is the input width
#if REAL_IS_DOUBLE
#define cblas_gemm cblas_dgemm
#else
#define cblas_gemm cblas_sgemm
#endif
static void matmul_add5(const Product* p) {
    // a row stride must reach over a row, even if there is only one row
    bool a_rows = p->al == 1, b_rows = p->bj == 1;
    size_t lda = a_rows ? (p->ai < p->L ? p->L : p->ai) : p->al,
           ldb = b_rows ? (p->bl < p->N ? p->N : p->bl) : p->bj;
    openblas_set_num_threads(thread_count());
    cblas_gemm(CblasRowMajor, a_rows ? CblasNoTrans : CblasTrans, b_rows ? CblasNoTrans : CblasTrans,
               (int)p->M, (int)p->N, (int)p->L, 1, p->A, (int)lda, p->B, (int)ldb, 1, p->C, (int)p->N);
}
#endif

typedef struct { const char* idea; void (*run)(const Product* p); } Rung;
static const Rung rungs[] = {
    {"three loops", matmul_add1},
    {"vectors along j", matmul_add2},
    {"tile of sums in registers", matmul_add3},
    {"built-in: packed blocks", matmul_add4},
#ifdef USE_OPENBLAS
    {"OpenBLAS", matmul_add5},
#endif
};
enum { RUNGS = sizeof rungs / sizeof rungs[0] };

// Shape: rows M = B*T, inputs I, outputs O, row stride of inp. A small model in training, a smaller one, and
// the decoding of Mamba-130M (in_proj, out_proj, x_proj, dt_proj, head).
typedef struct { size_t M, I, O, ldi; } Shape;
static const Shape shapes[] = {
    {2048, 256, 1024, 256}, {2048, 512, 256, 512}, {2048, 512, 48, 512}, {2048, 16, 512, 48},
    {2048, 256, 264, 256},
    {768, 128, 512, 128}, {768, 256, 128, 256}, {768, 256, 40, 256}, {768, 8, 256, 40},
    {1, 768, 3072, 768}, {1, 1536, 768, 1536}, {1, 1536, 80, 1536}, {1, 48, 1536, 80}, {1, 768, 50280, 768},
};

static int compare_double(const void* a, const void* b) {
    double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

// peak_flops: fused multiply-adds on as many independent vectors as the tile has, nothing loaded or stored.
static double peak_flops(void) {
    enum { TURNS = 1 << 16 };
    double best = 0;
    for (int repeat = 0; repeat < 20; repeat++) {
        double start = seconds_now();
        int threads = 1;
        real total = 0;
        #pragma omp parallel reduction(+:total)
        {
#ifdef _OPENMP
            #pragma omp single
            threads = omp_get_num_threads();
#endif
            vec sum[TILE_ROWS][2], x = (real)0.999 - (vec){0}, y = (real)1e-3 - (vec){0};
            for (int r = 0; r < TILE_ROWS; r++) sum[r][0] = sum[r][1] = (real)r - (vec){0};
            for (int turn = 0; turn < TURNS; turn++) {
                for (int r = 0; r < TILE_ROWS; r++) {
                    sum[r][0] = FMA_VEC(sum[r][0], x, y);
                    sum[r][1] = FMA_VEC(sum[r][1], x, y);
                }
            }
            for (int r = 0; r < TILE_ROWS; r++) total += sum[r][0][0] + sum[r][1][0];
        }
        double rate = 4.0 * VEC * TILE_ROWS * TURNS * threads / (seconds_now() - start);
        if (rate > best && total == total) best = rate;
    }
    return best;
}

// read_seconds: the median time to read n numbers once, with all threads.
static double read_seconds(const real* x, size_t n) {
    enum { REPEATS = 41, PIECE = 1 << 13 };
    double times[REPEATS];
    volatile real keep = 0;
    for (int repeat = 0; repeat < REPEATS; repeat++) {
        double start = seconds_now();
        real total = 0;
        #pragma omp parallel for schedule(dynamic) reduction(+:total)
        for (size_t p = 0; p < n; p += PIECE) {
            vec sum[8];
            for (int k = 0; k < 8; k++) sum[k] = (vec){0};
            size_t end = min_size(p + PIECE, n);
            for (size_t i = p; i + 8 * VEC <= end; i += 8 * VEC) {
                for (int k = 0; k < 8; k++) sum[k] += *(const vec*)(x + i + (size_t)(k * VEC));
            }
            for (int k = 0; k < 8; k++) total += sum[k][0];
        }
        keep = total;
        times[repeat] = seconds_now() - start;
    }
    (void)keep;
    qsort(times, REPEATS, sizeof times[0], compare_double);
    return times[REPEATS / 2];
}

static real* random_array(size_t n, uint64_t stream) {
    real* x = (real*)xcalloc(n + 64, sizeof(real));
    for (size_t i = 0; i < n; i++) x[i] = (real)(random_uniform(1, stream, i) - 0.5);
    return x;
}

// relative_error: L2 norm of C - reference over L2 norm of the reference
static double relative_error(const real* C, const double* reference, size_t n) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)C[i] - reference[i];
        difference += d * d;
        norm += reference[i] * reference[i];
    }
    return sqrt(difference / norm);
}

// median_seconds: repeats for half a second, at least 3 and at most 101 times.
static double median_seconds(const Rung* rung, const Product* p) {
    enum { MAX_REPEATS = 101 };
    double times[MAX_REPEATS], begin = seconds_now();
    size_t n = 0;
    while (n < MAX_REPEATS && (n < 3 || seconds_now() - begin < 0.5)) {
        double start = seconds_now();
        rung->run(p);
        times[n++] = seconds_now() - start;
    }
    qsort(times, n, sizeof times[0], compare_double);
    return times[n / 2];
}

// bench: every chosen rung on one product; returns the number of wrong results.
static int bench(const Product* p, size_t only, double peak) {
    int failures = 0;
    double* reference = (double*)xcalloc(p->M * p->N, sizeof(double));
    #pragma omp parallel for
    for (size_t i = 0; i < p->M; i++) {
        for (size_t l = 0; l < p->L; l++) {
            double a = p->A[i * p->ai + l * p->al];
            const real* b = p->B + l * p->bl;
            for (size_t j = 0; j < p->N; j++) reference[i * p->N + j] += a * (double)b[j * p->bj];
        }
    }
    double flops = 2.0 * (double)p->M * (double)p->N * (double)p->L;
    double bound = p->M == 1 ? read_seconds(p->B, p->N * p->L) : flops / peak;
    for (size_t r = 0; r < RUNGS; r++) {
        if (only && r + 1 != only) continue;
        memset(p->C, 0, p->M * p->N * sizeof(real));
        rungs[r].run(p);
        double error = relative_error(p->C, reference, p->M * p->N), limit = REAL_IS_DOUBLE ? 1e-14 : 5e-6;
        double seconds = median_seconds(&rungs[r], p);
        bool ok = error <= limit;
        printf("%-8s %5zu %6zu %5zu  %zu %-26s %9.1f %8.1f %6.1f%% %8.1e %s\n",
               kind_name[p->kind], p->M, p->N, p->L, r + 1, rungs[r].idea, 1e6 * seconds,
               1e-9 * flops / seconds, 100 * bound / seconds, error, ok ? "ok" : "FAIL");
        failures += !ok;
    }
    fflush(stdout);
    free(reference);
    return failures;
}

int main(int argc, char** argv) {
    limit_spinning(argv);
    char* end = NULL;
    size_t only = argc > 1 ? (size_t)strtoul(argv[1], &end, 10) : 0;
    if (argc > 2 || (argc > 1 && (*end || only < 1 || only > RUNGS))) {
        die("expected the number of a rung, 1 to %d, found \"%s\"; without one, all run",
            (int)RUNGS, argv[1]);
    }
    int failures = 0;
    double peak = peak_flops();
    printf("bound: %.1f GFLOP/s, multiply-adds on registers, all cores; M = 1: reading the weights once\n",
           1e-9 * peak);
    printf("%-8s %5s %6s %5s  %-28s %9s %8s %7s %8s\n",
           "product", "M", "N", "L", "rung", "us", "GFLOP/s", "bound", "rel L2");
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        size_t M = shapes[s].M, I = shapes[s].I, O = shapes[s].O, ldi = shapes[s].ldi;
        real* inp = random_array(M * ldi, 1);
        real* weight = random_array(O * I, 2);
        real* dout = random_array(M * O, 3);
        real* C = (real*)xcalloc(M * O + M * I + O * I, sizeof(real));    // more than any of the three needs
        real* scratch = (real*)xcalloc(O * I, sizeof(real));
        Product forward = {FORWARD, M, O, I, C, inp, weight, ldi, 1, 1, I, scratch};
        Product dinp = {DINP, M, I, O, C, dout, weight, O, 1, I, 1, scratch};
        Product dweight = {DWEIGHT, O, I, M, C, dout, inp, 1, O, ldi, 1, scratch};
        failures += bench(&forward, only, peak);
        if (M > 1) failures += bench(&dinp, only, peak) + bench(&dweight, only, peak);
        free(inp);
        free(weight);
        free(dout);
        free(C);
        free(scratch);
    }
    if (failures) printf("%d wrong results\n", failures);
    return failures != 0;
}
