// The selective scan on the CPU, from the formula to the shipped function.
//
//   gcc -O3 -march=native -fopenmp -std=gnu11 dev/cpu/selective_scan.c -o selective_scan -lm
//       (and the libraries that train_mamba.c needs: make prints them)
//   ./selective_scan [B T E N]          default 8 256 512 16
//
//   v1  the formula: loops over (b,t,e,n), libm's exp, the states of all tokens in memory
//   v2  loops over (b,e) outside: A once per channel, the state of a channel in the first cache
//   v3  v2 with our exp, vector instructions over n: short vectors, and a sum across the vector per token
//   v4  the shipped functions on one thread: vector instructions over tiles of channels, chunks in backward
//   v5  the shipped functions on all threads
//
// Each rung is checked against a float64 oracle twice, at a ragged shape with documents and initial states
// and at the shape that is timed, and fails above a relative error of 1e-5. The bound is the larger of two
// times, measured in the same run on all threads: the arithmetic (for every b,t,e,n one exp_real and 4
// multiply-adds forward, 12 backward, in loops that do not leave the registers and the first cache) and the
// memory traffic (every input and output once) at the rate of a large copy. Shares of the bound mean
// nothing while other work runs on the machine.
#ifndef SSM_NO_MAIN
#define SSM_NO_MAIN
#endif
// defines: real, exp_real, selective_scan_forward/_backward, random_normal, seconds_now, xcalloc, die
#include "../../train_mamba.c"

// Scan: one problem; shapes as in selective_scan_forward. h0, dhT, doc, dh0 are NULL in the timed problem.
typedef struct {
    size_t B, T, E, N;
    real *x, *dt, *A_log, *Bt, *Ct, *Dskip, *h0, *dy, *dhT;      // inputs
    int* doc;
    real *y, *hT;                                                // outputs
    real *dx, *ddt, *dA_log, *dBt, *dCt, *dDskip, *dh0;          // gradients
    real *states;                                                // v1: h of every token (B,T,E,N)
    real *hs, *scratch;                                          // v4, v5
} Scan;

static bool resets(const Scan* s, size_t b, size_t t) {
    return s->doc && s->doc[b * s->T + t] != (t == 0 ? 0 : s->doc[b * s->T + t - 1]);
}

// ---------------------------------------------------------------------------------------------------
// v1: the formula

static void forward1(Scan* s) {
    size_t E = s->E, N = s->N;
    for (size_t b = 0; b < s->B; b++) {
        for (size_t t = 0; t < s->T; t++) {
            size_t row = b * s->T + t;
            for (size_t e = 0; e < E; e++) {
                size_t i = row * E + e;
                s->y[i] = s->Dskip[e] * s->x[i];
                for (size_t n = 0; n < N; n++) {
                    real h = t > 0 ? s->states[(i - E) * N + n]
                           : s->h0 ? s->h0[(b * E + e) * N + n] : 0;
                    real A = -(real)exp(s->A_log[e * N + n]);
                    real a = resets(s, b, t) ? 0 : (real)exp(s->dt[i] * A);
                    h = a * h + s->dt[i] * s->Bt[row * N + n] * s->x[i];
                    s->y[i] += s->Ct[row * N + n] * h;
                    s->states[i * N + n] = h;
                    if (t == s->T - 1) s->hT[(b * E + e) * N + n] = h;
                }
            }
        }
    }
}

// lambda lies in dh0, which ends as a_0 lambda_0, the gradient of the initial state
static void backward1(Scan* s) {
    size_t E = s->E, N = s->N;
    for (size_t i = 0; i < s->B * E * N; i++) s->dh0[i] = s->dhT ? s->dhT[i] : 0;
    for (size_t b = 0; b < s->B; b++) {
        for (size_t t = s->T; t-- > 0;) {
            size_t row = b * s->T + t;
            for (size_t e = 0; e < E; e++) {
                size_t i = row * E + e;
                s->dDskip[e] += s->dy[i] * s->x[i];
                s->dx[i] += s->Dskip[e] * s->dy[i];
                for (size_t n = 0; n < N; n++) {
                    real* carry = &s->dh0[(b * E + e) * N + n];
                    real before = t > 0 ? s->states[(i - E) * N + n]
                                : s->h0 ? s->h0[(b * E + e) * N + n] : 0;
                    real A = -(real)exp(s->A_log[e * N + n]);
                    real a = resets(s, b, t) ? 0 : (real)exp(s->dt[i] * A), m = a * before;
                    real lambda = s->dy[i] * s->Ct[row * N + n] + *carry;
                    s->dCt[row * N + n] += s->dy[i] * s->states[i * N + n];
                    s->dBt[row * N + n] += lambda * s->dt[i] * s->x[i];
                    s->dx[i] += s->dt[i] * lambda * s->Bt[row * N + n];
                    s->ddt[i] += lambda * (A * m + s->Bt[row * N + n] * s->x[i]);
                    s->dA_log[e * N + n] += lambda * s->dt[i] * m * A;
                    *carry = a * lambda;
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------
// v2: one channel of one sequence at a time

static void forward2(Scan* s) {
    size_t E = s->E, N = s->N;
    for (size_t b = 0; b < s->B; b++) {
        for (size_t e = 0; e < E; e++) {
            real A[256], h[256];
            for (size_t n = 0; n < N; n++) {
                A[n] = -(real)exp(s->A_log[e * N + n]);
                h[n] = s->h0 ? s->h0[(b * E + e) * N + n] : 0;
            }
            for (size_t t = 0; t < s->T; t++) {
                size_t row = b * s->T + t, i = row * E + e;
                real keep = resets(s, b, t) ? 0 : 1, sum = s->Dskip[e] * s->x[i];
                for (size_t n = 0; n < N; n++) {
                    real a = keep * (real)exp(s->dt[i] * A[n]);
                    h[n] = a * h[n] + s->dt[i] * s->Bt[row * N + n] * s->x[i];
                    sum += s->Ct[row * N + n] * h[n];
                }
                s->y[i] = sum;
            }
            for (size_t n = 0; n < N; n++) s->hT[(b * E + e) * N + n] = h[n];
        }
    }
}

// a and m = a h of the channel's tokens are recomputed into two arrays (T,N)
static void backward2(Scan* s) {
    size_t T = s->T, E = s->E, N = s->N;
    real *a = (real*)xcalloc(T * N, sizeof(real)), *m = (real*)xcalloc(T * N, sizeof(real));
    for (size_t b = 0; b < s->B; b++) {
        for (size_t e = 0; e < E; e++) {
            real A[256], h[256], carry[256], dA[256];
            for (size_t n = 0; n < N; n++) {
                A[n] = -(real)exp(s->A_log[e * N + n]);
                h[n] = s->h0 ? s->h0[(b * E + e) * N + n] : 0;
                carry[n] = s->dhT ? s->dhT[(b * E + e) * N + n] : 0;
                dA[n] = 0;
            }
            for (size_t t = 0; t < T; t++) {
                size_t row = b * T + t, i = row * E + e;
                real keep = resets(s, b, t) ? 0 : 1;
                for (size_t n = 0; n < N; n++) {
                    a[t * N + n] = keep * (real)exp(s->dt[i] * A[n]);
                    m[t * N + n] = a[t * N + n] * h[n];
                    h[n] = m[t * N + n] + s->dt[i] * s->Bt[row * N + n] * s->x[i];
                }
            }
            for (size_t t = T; t-- > 0;) {
                size_t row = b * T + t, i = row * E + e;
                real lambda_B = 0, lambda_Am = 0, dtx = s->dt[i] * s->x[i];
                for (size_t n = 0; n < N; n++) {
                    real lambda = s->dy[i] * s->Ct[row * N + n] + carry[n];
                    real lambda_m = lambda * m[t * N + n];
                    s->dCt[row * N + n] += s->dy[i] * (m[t * N + n] + dtx * s->Bt[row * N + n]);
                    s->dBt[row * N + n] += lambda * dtx;
                    lambda_B += lambda * s->Bt[row * N + n];
                    lambda_Am += lambda_m * A[n];
                    dA[n] += lambda_m * s->dt[i];
                    carry[n] = a[t * N + n] * lambda;
                }
                s->dDskip[e] += s->dy[i] * s->x[i];
                s->dx[i] += s->Dskip[e] * s->dy[i] + s->dt[i] * lambda_B;
                s->ddt[i] += s->x[i] * lambda_B + lambda_Am;
            }
            for (size_t n = 0; n < N; n++) {
                s->dA_log[e * N + n] += dA[n] * A[n];
                s->dh0[(b * E + e) * N + n] = carry[n];
            }
        }
    }
    free(a);
    free(m);
}

// ---------------------------------------------------------------------------------------------------
// v3: as v2; every loop over n is vector code, because exp_real is plain arithmetic. The pragma allows
// the sums over n to be taken in another order.

static void forward3(Scan* s) {
    size_t E = s->E, N = s->N;
    for (size_t b = 0; b < s->B; b++) {
        for (size_t e = 0; e < E; e++) {
            real A[256], h[256];
            #pragma omp simd
            for (size_t n = 0; n < N; n++) A[n] = -exp_real(s->A_log[e * N + n]);
            for (size_t n = 0; n < N; n++) h[n] = s->h0 ? s->h0[(b * E + e) * N + n] : 0;
            for (size_t t = 0; t < s->T; t++) {
                size_t row = b * s->T + t, i = row * E + e;
                const real *B_t = s->Bt + row * N, *C_t = s->Ct + row * N;
                real keep = resets(s, b, t) ? 0 : 1, dt = s->dt[i], dtx = dt * s->x[i], sum = 0;
                #pragma omp simd reduction(+:sum)
                for (size_t n = 0; n < N; n++) {
                    h[n] = keep * exp_real(dt * A[n]) * h[n] + dtx * B_t[n];
                    sum += C_t[n] * h[n];
                }
                s->y[i] = sum + s->Dskip[e] * s->x[i];
            }
            for (size_t n = 0; n < N; n++) s->hT[(b * E + e) * N + n] = h[n];
        }
    }
}

static void backward3(Scan* s) {
    size_t T = s->T, E = s->E, N = s->N;
    real *a = (real*)xcalloc(T * N, sizeof(real)), *m = (real*)xcalloc(T * N, sizeof(real));
    for (size_t b = 0; b < s->B; b++) {
        for (size_t e = 0; e < E; e++) {
            real A[256], h[256], carry[256], dA[256];
            #pragma omp simd
            for (size_t n = 0; n < N; n++) A[n] = -exp_real(s->A_log[e * N + n]);
            for (size_t n = 0; n < N; n++) {
                h[n] = s->h0 ? s->h0[(b * E + e) * N + n] : 0;
                carry[n] = s->dhT ? s->dhT[(b * E + e) * N + n] : 0;
                dA[n] = 0;
            }
            for (size_t t = 0; t < T; t++) {
                size_t row = b * T + t, i = row * E + e;
                const real* B_t = s->Bt + row * N;
                real keep = resets(s, b, t) ? 0 : 1, dt = s->dt[i], dtx = dt * s->x[i];
                #pragma omp simd
                for (size_t n = 0; n < N; n++) {
                    a[t * N + n] = keep * exp_real(dt * A[n]);
                    m[t * N + n] = a[t * N + n] * h[n];
                    h[n] = m[t * N + n] + dtx * B_t[n];
                }
            }
            for (size_t t = T; t-- > 0;) {
                size_t row = b * T + t, i = row * E + e;
                const real *B_t = s->Bt + row * N, *C_t = s->Ct + row * N;
                const real *a_t = a + t * N, *m_t = m + t * N;
                real *dB_t = s->dBt + row * N, *dC_t = s->dCt + row * N;
                real dt = s->dt[i], dtx = dt * s->x[i], dy = s->dy[i], lambda_B = 0, lambda_Am = 0;
                #pragma omp simd reduction(+:lambda_B, lambda_Am)
                for (size_t n = 0; n < N; n++) {
                    real lambda = dy * C_t[n] + carry[n], lambda_m = lambda * m_t[n];
                    dC_t[n] += dy * (m_t[n] + dtx * B_t[n]);
                    dB_t[n] += lambda * dtx;
                    lambda_B += lambda * B_t[n];
                    lambda_Am += lambda_m * A[n];
                    dA[n] += lambda_m * dt;
                    carry[n] = a_t[n] * lambda;
                }
                s->dDskip[e] += dy * s->x[i];
                s->dx[i] += s->Dskip[e] * dy + dt * lambda_B;
                s->ddt[i] += s->x[i] * lambda_B + lambda_Am;
            }
            for (size_t n = 0; n < N; n++) {
                s->dA_log[e * N + n] += dA[n] * A[n];
                s->dh0[(b * E + e) * N + n] = carry[n];
            }
        }
    }
    free(a);
    free(m);
}

// ---------------------------------------------------------------------------------------------------
// v4, v5: the shipped functions

static void forward_shipped(Scan* s) {
    selective_scan_forward(s->y, s->hs, s->hT, s->x, s->dt, s->A_log, s->Bt, s->Ct, s->N, s->Dskip, s->h0,
                           s->doc, s->B, s->T, s->E, s->N);
}

static void backward_shipped(Scan* s) {
    selective_scan_backward(s->dx, s->ddt, s->dA_log, s->dBt, s->dCt, s->N, s->dDskip, s->dh0, s->dy, s->dhT,
                            s->hs, s->x, s->dt, s->A_log, s->Bt, s->Ct, s->N, s->Dskip, s->doc, s->scratch,
                            s->B, s->T, s->E, s->N);
}

typedef struct {
    const char *name, *idea;
    void (*forward)(Scan*);
    void (*backward)(Scan*);
    bool all_threads;
} Rung;

static const Rung rungs[] = {
    { "v1", "formula, loops over (b,t,e,n)", forward1, backward1, false },
    { "v2", "loops over (b,e) outside", forward2, backward2, false },
    { "v3", "own exp, vectors over n", forward3, backward3, false },
    { "v4", "vectors over tiles of channels", forward_shipped, backward_shipped, false },
    { "v5", "shipped: v4 on all threads", forward_shipped, backward_shipped, true },
};
enum { RUNGS = sizeof rungs / sizeof rungs[0] };

// ---------------------------------------------------------------------------------------------------
// Problem, oracle, timing

static real* normals(uint64_t stream, size_t n) {
    real* v = (real*)xcalloc(n, sizeof(real));
    for (size_t i = 0; i < n; i++) v[i] = (real)random_normal(1, stream, i);
    return v;
}

static real* zeros(size_t n) { return (real*)xcalloc(n, sizeof(real)); }

static Scan scan_create(size_t B, size_t T, size_t E, size_t N, bool documents) {
    Scan s = { B, T, E, N, normals(1, B * T * E), zeros(B * T * E), zeros(E * N), normals(3, B * T * N),
               normals(4, B * T * N), normals(5, E), NULL, normals(6, B * T * E), NULL, NULL,
               zeros(B * T * E), zeros(B * E * N), zeros(B * T * E), zeros(B * T * E), zeros(E * N),
               zeros(B * T * N), zeros(B * T * N), zeros(E), zeros(B * E * N), zeros(B * T * E * N),
               zeros(selective_scan_saved(B, T, E, N)), zeros(selective_scan_scratch(B, T, E, N)) };
    for (size_t i = 0; i < B * T * E; i++) s.dt[i] = (real)(0.001 * pow(100, random_uniform(1, 2, i)));
    for (size_t i = 0; i < E * N; i++) s.A_log[i] = (real)log((double)(i % N + 1));
    if (documents) {
        s.h0 = normals(7, B * E * N);
        s.dhT = normals(8, B * E * N);
        s.doc = (int*)xcalloc(B * T, sizeof(int));
        for (size_t i = 0; i < B * T; i++) s.doc[i] = (int)(i % T * 4 / T);
    }
    return s;
}

static void scan_free(Scan* s) {
    real* all[] = { s->x, s->dt, s->A_log, s->Bt, s->Ct, s->Dskip, s->h0, s->dy, s->dhT, s->y, s->hT, s->dx,
                    s->ddt, s->dA_log, s->dBt, s->dCt, s->dDskip, s->dh0, s->states, s->hs, s->scratch };
    for (size_t k = 0; k < sizeof all / sizeof all[0]; k++) free(all[k]);
    free(s->doc);
}

// the nine results and their sizes, for zeroing and comparing; the first two are forward's
enum { RESULTS = 9 };
static void scan_results(const Scan* s, real** result, size_t* size) {
    size_t BTE = s->B * s->T * s->E, BTN = s->B * s->T * s->N, EN = s->E * s->N;
    real* r[RESULTS] = { s->y, s->hT, s->dx, s->ddt, s->dA_log, s->dBt, s->dCt, s->dDskip, s->dh0 };
    size_t n[RESULTS] = { BTE, s->B * EN, BTE, BTE, EN, BTN, BTN, s->E, s->B * EN };
    memcpy(result, r, sizeof r);
    memcpy(size, n, sizeof n);
}

static void zero_results(Scan* s) {
    real* result[RESULTS];
    size_t size[RESULTS];
    scan_results(s, result, size);
    for (int k = 0; k < RESULTS; k++) memset(result[k], 0, size[k] * sizeof(real));
}

// oracle: one state entry (b,e,n) at a time, in double throughout; results in the order of scan_results
static void oracle(const Scan* s, double** out) {
    size_t T = s->T, E = s->E, N = s->N;
    double* h = (double*)xcalloc(T + 1, sizeof(double));               // h[t+1] is the state after token t
    for (size_t k = 0; k < s->B * E * N; k++) {
        size_t b = k / (E * N), e = k / N % E, n = k % N;
        double A = -exp((double)s->A_log[e * N + n]), lambda = s->dhT ? (double)s->dhT[k] : 0;
        h[0] = s->h0 ? (double)s->h0[k] : 0;
        for (size_t t = 0; t < T; t++) {
            size_t row = b * T + t, i = row * E + e;
            double x = (double)s->x[i], dt = (double)s->dt[i], a = resets(s, b, t) ? 0 : exp(dt * A);
            h[t + 1] = a * h[t] + dt * (double)s->Bt[row * N + n] * x;
            out[0][i] += (double)s->Ct[row * N + n] * h[t + 1] + (n == 0 ? (double)s->Dskip[e] * x : 0);
        }
        out[1][k] = h[T];
        for (size_t t = T; t-- > 0;) {                                 // here lambda is a_{t+1} lambda_{t+1}
            size_t row = b * T + t, i = row * E + e;
            double x = (double)s->x[i], dt = (double)s->dt[i], a = resets(s, b, t) ? 0 : exp(dt * A);
            double dy = (double)s->dy[i], B_n = (double)s->Bt[row * N + n], m = a * h[t];
            lambda += dy * (double)s->Ct[row * N + n];
            out[2][i] += lambda * dt * B_n + (n == 0 ? (double)s->Dskip[e] * dy : 0);
            out[3][i] += lambda * (A * m + B_n * x);
            out[4][e * N + n] += lambda * dt * m * A;
            out[5][row * N + n] += lambda * dt * x;
            out[6][row * N + n] += dy * h[t + 1];
            if (n == 0) out[7][e] += dy * x;
            lambda *= a;
        }
        out[8][k] = lambda;
    }
    free(h);
}

// largest over the nine results of the relative L2 error
static double relative_error(const Scan* s, double** expected) {
    real* result[RESULTS];
    size_t size[RESULTS];
    double worst = 0;
    scan_results(s, result, size);
    for (int k = 0; k < RESULTS; k++) {
        double diff = 0, norm = 0;
        for (size_t i = 0; i < size[k]; i++) {
            double d = (double)result[k][i] - expected[k][i];
            diff += d * d;
            norm += expected[k][i] * expected[k][i];
        }
        double error = sqrt(diff / norm);
        if (!(error <= worst)) worst = error;
    }
    return worst;
}

static int compare_doubles(const void* a, const void* b) {
    double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

// median time in seconds over at most `most` runs, or as many as fit in two seconds
static double median_time(void (*f)(Scan*), Scan* s, int most) {
    double time[64], start = seconds_now();
    int runs = 0;
    while (runs < most && runs < 64 && (runs == 0 || seconds_now() - start < 2)) {
        double t0 = seconds_now();
        f(s);
        time[runs++] = seconds_now() - t0;
    }
    qsort(time, (size_t)runs, sizeof time[0], compare_doubles);
    return time[runs / 2];
}

// measure_rates: seconds per exp_real, per multiply-add, per byte, on all threads; the best of TRIALS.
// Every round reads another piece of the arguments, so that no round can be taken for a repetition.
enum { LANES = 256, ROUNDS = 20000, FMAS = 4, TRIALS = 7 };
static void measure_rates(double* per_exp, double* per_fma, double* per_byte, int threads, double* sink) {
    size_t floats = (size_t)1 << 24;
    real *from = zeros(floats), *to = zeros(floats);
    for (size_t i = 0; i < floats; i++) from[i] = (real)i;
    *per_exp = *per_fma = *per_byte = 1e9;
    for (int trial = 0; trial < TRIALS; trial++) {
        double sum = 0, t0 = seconds_now();
        #pragma omp parallel reduction(+:sum) num_threads(threads)
        {
            real arg[LANES + 16], v[LANES] = { 0 };
            for (size_t l = 0; l < LANES + 16; l++) arg[l] = (real)-0.01 * (real)l;
            for (int round = 0; round < ROUNDS; round++) {
                const real* arg_round = arg + round % 16;
                #pragma omp simd
                for (size_t l = 0; l < LANES; l++) v[l] = exp_real(arg_round[l]);
            }
            for (size_t l = 0; l < LANES; l++) sum += (double)v[l];
        }
        *per_exp = fmin(*per_exp, (seconds_now() - t0) / ((double)LANES * ROUNDS * threads));
        t0 = seconds_now();
        #pragma omp parallel reduction(+:sum) num_threads(threads)
        {
            real v[LANES];
            for (size_t l = 0; l < LANES; l++) v[l] = (real)0.001 * (real)l;
            for (int round = 0; round < ROUNDS; round++) {
                #pragma omp simd
                for (size_t l = 0; l < LANES; l++) {
                    real u = v[l];
                    for (int k = 0; k < FMAS; k++) u = u * (real)0.999 + (real)0.001;
                    v[l] = u;
                }
            }
            for (size_t l = 0; l < LANES; l++) sum += (double)v[l];
        }
        *per_fma = fmin(*per_fma, (seconds_now() - t0) / ((double)LANES * ROUNDS * FMAS * threads));
        t0 = seconds_now();
        #pragma omp parallel for simd schedule(static) num_threads(threads)
        for (size_t i = 0; i < floats; i++) to[i] = from[i];
        *per_byte = fmin(*per_byte, (seconds_now() - t0) / (2.0 * (double)floats * sizeof(real)));
        *sink += sum + (double)to[trial];
    }
    free(from);
    free(to);
}

int main(int argc, char** argv) {
    limit_spinning(argv);
    size_t shape[4] = { 8, 256, 512, 16 };                             // B T E N
    for (int i = 1; i < argc && i < 5; i++) shape[i - 1] = (size_t)strtoull(argv[i], NULL, 10);
    size_t B = shape[0], T = shape[1], E = shape[2], N = shape[3];
    if (!B || !T || !E || !N || N > 256) {
        die("expected B T E N, each at least 1 and N at most 256, found %zu %zu %zu %zu", B, T, E, N);
    }
    int threads = 1, failed = 0;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    double per_exp, per_fma, per_byte, sink = 0, ragged_error[RUNGS], error;
    measure_rates(&per_exp, &per_fma, &per_byte, threads, &sink);
    double n = (double)(B * T * E * N), bytes = sizeof(real) * (double)(B * T);
    double saved = (double)selective_scan_saved(B, T, E, N) * sizeof(real);
    double bound_f = fmax(n * (per_exp + 4 * per_fma), (bytes * (double)(3 * E + 2 * N) + saved) * per_byte);
    double bound_b = fmax(n * (per_exp + 12 * per_fma), (bytes * (double)(7 * E + 6 * N) + saved) * per_byte);

    printf("B %zu  T %zu  E %zu  N %zu, %d threads, %zu-byte numbers\n", B, T, E, N, threads, sizeof(real));
    printf("measured on all threads: %.2f Gexp/s, %.1f G multiply-adds/s, copy %.1f GB/s\n", 1e-9 / per_exp,
           1e-9 / per_fma, 1e-9 / per_byte);
    printf("bound: forward %.3f ms, backward %.3f ms\n\n", bound_f * 1e3, bound_b * 1e3);

    for (int pass = 0; pass < 2; pass++) {                           // 0: the ragged check, 1: check and time
        Scan s = pass == 0 ? scan_create(3, 67, 41, 5, true) : scan_create(B, T, E, N, false);
        real* result[RESULTS];
        double* expected[RESULTS];
        size_t size[RESULTS];
        scan_results(&s, result, size);
        for (int k = 0; k < RESULTS; k++) expected[k] = (double*)xcalloc(size[k], sizeof(double));
        oracle(&s, expected);
        if (pass == 1) {
            printf("%-4s %-32s %11s %7s %11s %7s %10s\n", "", "idea", "forward ms", "bound", "backward ms",
                   "bound", "rel error");
        }
        for (int r = 0; r < RUNGS; r++) {
#ifdef _OPENMP
            omp_set_num_threads(rungs[r].all_threads ? threads : 1);
#endif
            zero_results(&s);
            rungs[r].forward(&s);
            rungs[r].backward(&s);
            error = relative_error(&s, expected);
            if (pass == 0) {
                ragged_error[r] = error;
                continue;
            }
            if (!(ragged_error[r] <= error)) error = ragged_error[r];
            bool ok = error <= 1e-5;
            failed += !ok;
            double forward = median_time(rungs[r].forward, &s, 31);
            double backward = median_time(rungs[r].backward, &s, 31);
            printf("%-4s %-32s %11.3f %6.1f%% %11.3f %6.1f%% %10.1e%s\n", rungs[r].name, rungs[r].idea,
                   forward * 1e3, 100 * bound_f / forward, backward * 1e3, 100 * bound_b / backward, error,
                   ok ? "" : "  FAILED");
        }
        for (int k = 0; k < RESULTS; k++) free(expected[k]);
        scan_free(&s);
    }
    if (!(sink < 1e300)) printf("the timing loops produced no numbers\n");
    return failed > 0;
}
