// test_mamba.c: what train_mamba.c claims, checked. One list of cases (at the end), compiled twice: `real` =
// float, and `real` = double, where gradients are proven by finite differences.
//   test_mamba [name]   run the case of that name, else those with it in their names       test_mamba --list
// Every row says: what is claimed (and where it was worst), the measured error, the limit. NaN fails.
//
// Contents
//   1. Harness: report, child processes, memory, files
//   2. A layer as a problem: named inputs and outputs, forward, backward, its formula in double precision
//   3. What every layer must do
//   4. The layers: shapes, calls, formulas
//   5. Pieces and documents: a split sequence, packed documents
//   6. Extreme and degenerate inputs
//   7. The whole model: counts, initialization, gradients, pieces, documents, threads, fixtures
//   8. Checkpoints and training runs
//   9. Optimizer, sampling, generation
//  10. List of cases, main
// Files, data and the command line are in dev/test/.

#define SSM_NO_MAIN
// defines: everything under test
#ifdef __CUDACC__
#define SSM_NO_CUDA_MAIN
#include "train_mamba.cu"
#else
#include "train_mamba.c"
#endif
#include <ftw.h>
#include <sys/wait.h>

// ---------------------------------------------------------------------------------------------------
// 1. Harness: report, child processes, memory, files

#define COUNT_OF(array) ((int)(sizeof(array) / sizeof(array[0])))

int rows_passed = 0, rows_failed = 0;
char** failed_names = NULL;
const char* case_name = "";

// limit: rounding differs by 2^29 between the two builds, so most limits come in pairs. Beside each pair
// stands the value measured with both builds.
double limit(double in_float, double in_double) { return REAL_IS_DOUBLE ? in_double : in_float; }

// report: one row of the table; ok iff measured <= limit, so NaN fails.
void report(const char* name, double measured, double at_most) {
    bool ok = measured <= at_most;
    printf("%-4s %-14s %-72s %9.2e %9.2e\n", ok ? "ok" : "FAIL", case_name, name, measured, at_most);
    fflush(stdout);
    if (ok) {
        rows_passed++;
    } else {
        failed_names = (char**)xrealloc(failed_names, (size_t)rows_failed + 1, sizeof(char*));
        size_t size = strlen(case_name) + strlen(name) + 3;
        failed_names[rows_failed] = (char*)xcalloc(size, 1);
        snprintf(failed_names[rows_failed++], size, "%s: %s", case_name, name);
    }
}

// Worst: the largest error of many measurements and where it was, so a claim about 50 tensors is one row.
typedef struct { double err; char where[80]; } Worst;

__attribute__((format(printf, 3, 4)))
void worst_add(Worst* w, double err, const char* format, ...) {
    if (w->where[0] && err <= w->err) return;       // NaN is not <= anything: it replaces every number
    if (w->where[0] && isnan(w->err)) return;       // and is replaced by nothing
    va_list args;
    va_start(args, format);
    vsnprintf(w->where, sizeof w->where, format, args);
    va_end(args);
    w->err = err;
}

// worst_report: a claim that was never measured is a failure
void worst_report(const char* claim, const Worst* w, double at_most) {
    char name[160];
    snprintf(name, sizeof name, "%.70s [%.80s]", claim, w->where[0] ? w->where : "never measured");
    report(name, w->where[0] ? w->err : NAN, at_most);
}

void use_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// SANITIZED: AddressSanitizer reserves terabytes of addresses, keeps freed memory, and slows everything down
#ifdef __has_feature
#define HAS_FEATURE(feature) __has_feature(feature)
#else
#define HAS_FEATURE(feature) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || HAS_FEATURE(address_sanitizer)
enum { SANITIZED = 1 };
#else
enum { SANITIZED = 0 };
#endif

// cpu_seconds: what this process has computed; unlike the clock it does not count what else the machine does
static double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// leave_child: ends a child before the leak checker of a sanitizer runs, which waits for the parent's threads
void leave_child(int status, void* unused) {
    (void)unused;
    fflush(stdout);
    fflush(stderr);
    _exit(status);
}

// in_child: runs f(arg) in a child process, so that die() and crashes can be tested. Captures the beginning
// of what it writes to stderr. Returns its exit code, 0 when f returns, 128 + signal when it is killed.
int in_child(void (*f)(void*), void* arg, char* err_text, size_t size) {
    int fd[2];
    fflush(stdout);
    fflush(stderr);
    if (pipe(fd) != 0) die("pipe: %s", strerror(errno));
    pid_t pid = fork();
    if (pid < 0) die("fork: %s", strerror(errno));
    if (pid == 0) {
        dup2(fd[1], 2);
        close(fd[0]);
        close(fd[1]);
        use_threads(1);                             // the threads of a pool do not survive a fork
        on_exit(leave_child, NULL);
        f(arg);
        exit(0);
    }
    close(fd[1]);
    size_t length = 0;
    for (;;) {                                      // read to the end, keep what fits
        char buffer[4096];
        ssize_t n = read(fd[0], buffer, sizeof buffer);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) break;
        for (ssize_t i = 0; i < n; i++) if (length + 1 < size) err_text[length++] = buffer[i];
    }
    if (size) err_text[length] = 0;
    close(fd[0]);
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// test_alloc: zeroed memory that lives until the case ends. Every array is an allocation of its own and
// exactly as long as the layer may touch, so that AddressSanitizer sees the first element beyond it.
void** allocations = NULL;
size_t n_allocations = 0;

void* test_alloc(size_t count, size_t size) {
    allocations = (void**)xrealloc(allocations, n_allocations + 1, sizeof(void*));
    return allocations[n_allocations++] = xcalloc(count, size);
}

void free_all(void) {
    for (size_t i = 0; i < n_allocations; i++) free(allocations[i]);
    free(allocations);
    allocations = NULL;
    n_allocations = 0;
}

char scratch_dir[160];                   // made by the first call of scratch, removed when the case ends

// scratch: the path of a file in a directory of the case's own. In memory where that is possible, because
// most of the time of a save goes into waiting for the disk.
const char* scratch(const char* name) {
    if (!scratch_dir[0]) {
        const char* base = getenv("TMPDIR");
        if (!base || strlen(base) > 100) base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
        snprintf(scratch_dir, sizeof scratch_dir, "%s/test_mamba_XXXXXX", base);
        if (!mkdtemp(scratch_dir)) die("test: cannot make a directory in %s: %s", base, strerror(errno));
    }
    size_t size = strlen(scratch_dir) + strlen(name) + 2;
    char* path = (char*)test_alloc(size, 1);
    snprintf(path, size, "%s/%s", scratch_dir, name);
    return path;
}

int remove_entry(const char* path, const struct stat* st, int type, struct FTW* ftw) {
    (void)st; (void)type; (void)ftw;
    return remove(path);
}

void remove_scratch(void) {
    if (scratch_dir[0]) nftw(scratch_dir, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    scratch_dir[0] = 0;
}

// file_bytes: at most 1 MiB of a file, NULL when there is none
char* file_bytes(const char* path, size_t* n) {
    FILE* f = fopen(path, "rb");
    *n = 0;
    if (!f) return NULL;
    char* bytes = (char*)test_alloc((1 << 20) + 1, 1);
    *n = fread(bytes, 1, 1 << 20, f);
    fclose(f);
    return bytes;
}

void file_put(const char* path, const void* bytes, size_t n) {
    FILE* f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, n, f) != n || fclose(f) != 0) die("test: cannot write %s", path);
}

double files_differ(const char* a, const char* b) {
    size_t n, m;
    char *x = file_bytes(a, &n), *y = file_bytes(b, &m);
    return !x || !y || n == 0 || n != m || memcmp(x, y, n) != 0;
}

// a fresh stream per fill: reset at the start of a case, so cases do not affect each other
uint64_t random_stream = 0;

double test_uniform(double lo, double hi, uint64_t stream, size_t i) {
    return lo < hi ? lo + (hi - lo) * random_uniform(7, stream, i) : lo;
}

// relative_l2: |a - reference| / |reference|; |a| where the reference is zero. NaN gives NaN.
double relative_l2(const double* a, const double* reference, size_t n) {
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        diff += (a[i] - reference[i]) * (a[i] - reference[i]);
        norm += reference[i] * reference[i];
    }
    return norm == 0 ? sqrt(diff) : sqrt(diff) / sqrt(norm);
}

// differing: how many elements are not equal (NaN is equal to nothing)
double differing(const double* a, const double* b, size_t n) {
    double count = 0;
    for (size_t i = 0; i < n; i++) count += !(a[i] == b[i]);
    return count;
}

// ---------------------------------------------------------------------------------------------------
// 2. A layer as a problem: named inputs and outputs, forward, backward, its formula in double precision

enum { SHARED, PER_SEQUENCE, PER_TOKEN };           // what the rows of a tensor are: weights, or B*.., or B*T
// HAS_STATE: initial state given; HAS_FINAL: final state and its gradient
enum { HAS_BIAS = 1, HAS_STATE = 2, HAS_FINAL = 4, IS_BIG = 8 };
enum { MAX_IN = 8, MAX_OUT = 2 };
#define SENTINEL ((real)12345.0)

// Operand: rows x cols at row stride ld. What lies between cols and ld belongs to somebody else: it is NaN in
// inputs (must not be read), SENTINEL in outputs and gradients (must not be written). value NULL: not given.
typedef struct {
    const char* name;
    int per;
    size_t rows, cols, ld;
    real* value;                 // input or output
    real* grad;                  // of an input: backward adds to it; of an output: weights of the loss
    bool skippable;              // backward accepts NULL for this gradient
} Operand;

// Problem: loss = sum over outputs of <grad, value>; backward computes the gradient of every input
typedef struct Problem {
    const struct LayerTest* layer;
    const char* shape;           // as given, and as shown in the table
    size_t B, T, D, E, N, K, V, H, P, G, Q, S;      // from it; unused ones are 0
    int flags;
    Operand in[MAX_IN], out[MAX_OUT];
    int n_in, n_out;
    int* ids;                    // tokens or targets (B*T)
    int* doc;                    // document of every token (B*T) or NULL
    real* saved;                 // kept by forward for backward
    real* scratch;               // workspace of backward
    size_t saved_size, scratch_size;
    real scale;
} Problem;

typedef struct LayerTest {
    const char* name;
    void (*make)(Problem* p);
    void (*forward)(Problem* p);
    void (*backward)(Problem* p);
    void (*formula)(const Problem* p, double** in, double** out);   // dense arrays, NULL: not given
    int state;                   // index of the initial state among the inputs, -1: every token stands alone
    bool overwrites;             // backward writes its gradient instead of adding to it
    bool rounds;                 // pieces of a sequence equal the whole to rounding only
} LayerTest;

size_t span(const Operand* t) { return t->rows ? (t->rows - 1) * t->ld + t->cols : 0; }
size_t count(const Operand* t) { return t->rows * t->cols; }

// fill_operand: columns get uniform random numbers, or lo where lo == hi; the gaps between rows get `gap`
void fill_operand(const Operand* t, real* v, double lo, double hi, real gap) {
    uint64_t stream = random_stream++;
    for (size_t r = 0; v && r < t->rows; r++)
        for (size_t c = 0; c < t->ld && r * t->ld + c < span(t); c++)
            v[r * t->ld + c] = c >= t->cols ? gap : (real)test_uniform(lo, hi, stream, r * t->cols + c);
}

Operand* add_operand(Operand* list, int* n, const char* name, int per, size_t rows, size_t cols, size_t gap) {
    Operand* t = &list[(*n)++];
    memset(t, 0, sizeof *t);
    t->name = name;
    t->per = per;
    t->rows = rows;
    t->cols = cols;
    t->ld = cols + gap;
    t->value = (real*)test_alloc(span(t), sizeof(real));
    t->grad = (real*)test_alloc(span(t), sizeof(real));
    return t;
}

Operand* add_input(Problem* p, const char* name, int per, size_t rows, size_t cols, size_t gap, double lo,
                   double hi) {
    Operand* t = add_operand(p->in, &p->n_in, name, per, rows, cols, gap);
    fill_operand(t, t->value, lo, hi, (real)NAN);
    return t;
}

Operand* add_output(Problem* p, const char* name, int per, size_t rows, size_t cols, size_t gap) {
    Operand* t = add_operand(p->out, &p->n_out, name, per, rows, cols, gap);
    fill_operand(t, t->grad, -1, 1, (real)NAN);
    return t;
}

void given_if(Operand* t, bool given) {
    if (!given) { t->value = NULL; t->grad = NULL; t->rows = 0; }
}

// Patterns of documents, one digit per token, the last one continued. They hold boundaries at 0 (the first id
// is not 0, so a given state must be ignored), at 1, at K-1 and K, neighbouring boundaries, documents of one
// token, ids with gaps, and, for even rows, boundaries one before, on and one behind the first chunk edge. No
// id is used for two documents of a sequence.
const char* doc_patterns[] = { "0001", "1", "0123456", "1112", "00", "01223444", "0033", "01" };

int* make_docs_at(size_t pattern, size_t B, size_t T, size_t edge) {
    int* doc = (int*)test_alloc(B * T, sizeof(int));
    for (size_t b = 0; b < B; b++) {
        const char* digits = doc_patterns[(pattern + b) % 8];
        size_t n = strlen(digits);
        for (size_t t = 0; t < T; t++) {
            doc[b * T + t] = digits[t < n ? t : n - 1] - '0';
            if (b % 2 == 0 && t + 1 >= edge) doc[b * T + t] += (int)(t - edge + 2 < 3 ? t - edge + 2 : 3);
        }
    }
    return doc;
}

int* make_docs(size_t pattern, size_t B, size_t T) { return make_docs_at(pattern, B, T, SCAN_CHUNK); }

// problem_make: shape is a text such as "B3 T7 E5 N2 state final documents1"
void problem_make(Problem* p, const LayerTest* layer, const char* shape) {
    memset(p, 0, sizeof *p);
    p->layer = layer;
    p->shape = shape;
    p->scale = (real)0.375;
    p->flags = (strstr(shape, "bias") ? HAS_BIAS : 0) | (strstr(shape, "state") ? HAS_STATE : 0) |
               (strstr(shape, "final") ? HAS_FINAL : 0) | (strstr(shape, "big") ? IS_BIG : 0);
    size_t* const sizes[] = { &p->B, &p->T, &p->D, &p->E, &p->N, &p->K, &p->V, &p->H, &p->P, &p->G, &p->Q,
                              &p->S };
    for (int i = 0; i < COUNT_OF(sizes); i++) {
        const char* at = strchr(shape, "BTDENKVHPGQS"[i]);
        if (at) *sizes[i] = (size_t)atoi(at + 1);
    }
    const char* docs = strstr(shape, "documents");
    if (docs) p->doc = make_docs_at((size_t)atoi(docs + 9), p->B, p->T, p->Q > 1 ? p->Q : (size_t)SCAN_CHUNK);
    if (p->V) {
        p->ids = (int*)test_alloc(p->B * p->T, sizeof(int));
        for (size_t i = 0; i < p->B * p->T; i++) p->ids[i] = (int)(random_bits(7, 1, i) % p->V);
    }
    layer->make(p);
    p->saved = (real*)test_alloc(p->saved_size, sizeof(real));
    p->scratch = (real*)test_alloc(p->scratch_size, sizeof(real));
}

// forward with poison: whatever a layer leaves unwritten is NaN and shows up in the next comparison
void run_forward(Problem* p) {
    for (int j = 0; j < p->n_out; j++) fill_operand(&p->out[j], p->out[j].value, NAN, NAN, SENTINEL);
    for (size_t i = 0; i < p->saved_size; i++) p->saved[i] = (real)NAN;
    p->layer->forward(p);
}

// backward onto gradients that hold `start` (or random numbers in +-start)
void run_backward(Problem* p, double start, bool random) {
    if (p->layer->overwrites) { start = NAN; random = false; }
    for (int i = 0; i < p->n_in; i++)
        fill_operand(&p->in[i], p->in[i].grad, random ? -start : start, start, SENTINEL);
    for (size_t i = 0; i < p->scratch_size; i++) p->scratch[i] = (real)NAN;
    p->layer->backward(p);
}

double* dense(const Operand* t, const real* v) {
    if (!v) return NULL;
    double* d = (double*)test_alloc(count(t), sizeof(double));
    for (size_t i = 0; i < count(t); i++) d[i] = (double)v[i / t->cols * t->ld + i % t->cols];
    return d;
}

// all values of the outputs and all gradients of the inputs, in one array
double* snapshot(const Problem* p, size_t* n) {
    *n = 0;
    for (int j = 0; j < p->n_out; j++) *n += count(&p->out[j]);
    for (int i = 0; i < p->n_in; i++) *n += count(&p->in[i]);
    double* all = (double*)test_alloc(*n, sizeof(double));
    size_t at = 0;
    for (int k = 0; k < p->n_out + p->n_in; k++) {
        const Operand* t = k < p->n_out ? &p->out[k] : &p->in[k - p->n_out];
        const real* v = k < p->n_out ? t->value : t->grad;
        for (size_t i = 0; i < count(t); i++) all[at++] = (double)v[i / t->cols * t->ld + i % t->cols];
    }
    return all;
}

double loss_of(const Problem* p) {
    double loss = 0;
    for (int j = 0; j < p->n_out; j++) {
        const Operand* t = &p->out[j];
        for (size_t i = 0; i < count(t); i++) {
            size_t at = i / t->cols * t->ld + i % t->cols;
            loss += (double)t->value[at] * (double)t->grad[at];
        }
    }
    return loss;
}

// ---------------------------------------------------------------------------------------------------
// 3. What every layer must do

typedef struct {
    Worst formula, direction, difference, accumulate, twice, threads, gaps, skipped, alone;
} Findings;

void formula_outputs(const Problem* p, double** in, double** out) {
    for (int j = 0; j < p->n_out; j++)
        out[j] = p->out[j].value ? (double*)test_alloc(count(&p->out[j]), sizeof(double)) : NULL;
    p->layer->formula(p, in, out);
}

// The outputs equal the formula, evaluated literally in double precision. Catches: an error that forward and
// backward share (taps in the wrong order, a missing factor), which differentiation cannot see.
void check_formula(Problem* p, Findings* f) {
    double *in[MAX_IN], *out[MAX_OUT];
    for (int i = 0; i < p->n_in; i++) in[i] = dense(&p->in[i], p->in[i].value);
    formula_outputs(p, in, out);
    for (int j = 0; j < p->n_out; j++) {
        const Operand* t = &p->out[j];
        if (t->value)
            worst_add(&f->formula, relative_l2(dense(t, t->value), out[j], count(t)), "%s, %s", t->name,
                      p->shape);
    }
}

// <dy, J dx> = <J^T dy, dx> for random directions dx, one tensor at a time. J dx is the derivative of the
// formula along dx by an 8th-order stencil (truncation below rounding), so it also judges the gradients of
// the float build. Measured against the typical size of a sum of random signs, sqrt(sum (g dx)^2). Catches: a
// wrong gradient anywhere.
void check_direction(Problem* p, Findings* f) {
    const double c[4] = { 4.0 / 5, -1.0 / 5, 4.0 / 105, -1.0 / 280 }, h = 2e-3;
    double *in[MAX_IN], *out[MAX_OUT], *dy[MAX_OUT];
    for (int i = 0; i < p->n_in; i++) in[i] = dense(&p->in[i], p->in[i].value);
    for (int j = 0; j < p->n_out; j++) {
        dy[j] = dense(&p->out[j], p->out[j].grad);
        out[j] = p->out[j].value ? (double*)test_alloc(count(&p->out[j]), sizeof(double)) : NULL;
    }
    for (int i = 0; i < p->n_in; i++) {
        size_t n = count(&p->in[i]);
        if (!n || !p->in[i].grad) continue;
        double *x = in[i], *dx = (double*)test_alloc(n, sizeof(double)), *g = dense(&p->in[i], p->in[i].grad);
        double product = 0, size = 0, derivative = 0;
        in[i] = (double*)test_alloc(n, sizeof(double));
        for (size_t k = 0; k < n; k++) dx[k] = test_uniform(-1, 1, random_stream, k);
        random_stream++;
        for (size_t k = 0; k < n; k++) { product += g[k] * dx[k]; size += g[k] * g[k] * dx[k] * dx[k]; }
        for (int step = -4; step <= 4; step++) {
            if (step == 0) continue;
            for (size_t k = 0; k < n; k++) in[i][k] = x[k] + step * h * dx[k];
            p->layer->formula(p, in, out);
            double sign = step < 0 ? -1 : 1;
            for (int j = 0; j < p->n_out; j++)
                for (size_t k = 0; k < count(&p->out[j]); k++)
                    derivative += sign * c[abs(step) - 1] * dy[j][k] * out[j][k] / h;
        }
        in[i] = x;
        double err = fabs(derivative - product);
        worst_add(&f->direction, size == 0 ? err : err / sqrt(size), "d%s, %s", p->in[i].name, p->shape);
    }
}

// Every element of every gradient equals the central difference of forward itself. Catches: a wrong gradient
// of a single element that a random direction could hide, and forward and formula differing in where they are
// smooth.
void check_difference(Problem* p, Findings* f) {
    const double h = 1e-5;      // values are about 1: truncation h^2, rounding 2^-53/h, both near 1e-11
    for (int i = 0; i < p->n_in; i++) {
        Operand* t = &p->in[i];
        if (!count(t)) continue;
        double* g = dense(t, t->grad);
        double* numeric = (double*)test_alloc(count(t), sizeof(double));
        for (size_t k = 0; k < count(t); k++) {
            real* x = &t->value[k / t->cols * t->ld + k % t->cols];
            real x0 = *x;
            *x = x0 + (real)h;
            p->layer->forward(p);
            double up = loss_of(p);
            *x = x0 - (real)h;
            p->layer->forward(p);
            numeric[k] = (up - loss_of(p)) / (2 * h);
            *x = x0;
        }
        worst_add(&f->difference, relative_l2(g, numeric, count(t)), "d%s, %s", t->name, p->shape);
    }
    p->layer->forward(p);
}

// What lies between the rows of a strided tensor is untouched. Catches: dz written over dx, a row too long.
void check_gaps(const Problem* p, Findings* f) {
    double touched = 0;
    for (int k = 0; k < p->n_out + p->n_in; k++) {
        const Operand* t = k < p->n_out ? &p->out[k] : &p->in[k - p->n_out];
        const real* v = k < p->n_out ? t->value : t->grad;
        for (size_t i = 0; v && i < span(t); i++) if (i % t->ld >= t->cols) touched += !(v[i] == SENTINEL);
    }
    worst_add(&f->gaps, touched, "%s", p->shape);
}

// problem_slice: the tokens [t0, t1) of sequence b as a problem of their own, sharing the parent's arrays.
// Document ids are counted from the last token before the piece, because a state that is handed over belongs
// to document 0.
void problem_slice(Problem* q, const Problem* p, size_t b, size_t t0, size_t t1) {
    *q = *p;
    q->B = 1;
    q->T = t1 - t0;
    for (int k = 0; k < p->n_out + p->n_in; k++) {
        Operand* t = k < p->n_out ? &q->out[k] : &q->in[k - p->n_out];
        if (t->per == SHARED || !t->value) continue;
        size_t first = t->per == PER_TOKEN ? b * p->T + t0 : t->rows / p->B * b;
        t->rows = t->per == PER_TOKEN ? q->T : t->rows / p->B;
        t->value += first * t->ld;
        if (t->grad) t->grad += first * t->ld;
    }
    if (p->ids) q->ids += b * p->T + t0;
    if (p->doc) {
        q->doc = (int*)test_alloc(q->T, sizeof(int));
        int before = t0 ? p->doc[b * p->T + t0 - 1] : 0;
        for (size_t t = 0; t < q->T; t++) q->doc[t] = p->doc[b * p->T + t0 + t] - before;
    }
    q->saved = (real*)test_alloc(p->saved_size, sizeof(real));
    q->scratch = (real*)test_alloc(p->scratch_size, sizeof(real));
}

// A sequence computed alone (where there is no state: a token alone) has the bits it has inside the batch.
// Catches: blocks of rows whose edge takes another path. Generation and training then agree to the last bit.
void check_alone(const Problem* p, Findings* f) {
    size_t step = p->layer->state >= 0 ? p->T : 1;
    double wrong = 0;
    for (size_t b = 0; b < p->B; b++) {
        for (size_t t = 0; t < p->T; t += step) {
            Problem q;
            problem_slice(&q, p, b, t, t + step);
            double* together[MAX_OUT];
            for (int j = 0; j < q.n_out; j++) {
                together[j] = dense(&q.out[j], q.out[j].value);
                if (q.out[j].value) q.out[j].value = (real*)test_alloc(span(&q.out[j]), sizeof(real));
            }
            run_forward(&q);
            for (int j = 0; j < q.n_out; j++)
                wrong += differing(dense(&q.out[j], q.out[j].value), together[j], count(&q.out[j]));
        }
    }
    worst_add(&f->alone, wrong, "%s", p->shape);
}

void check_problem(Problem* p, Findings* f) {
    run_forward(p);
    run_backward(p, 0, false);
    assert(loss_of(p) != 0);            // a problem whose loss is 0 would prove nothing
    check_gaps(p, f);
    check_formula(p, f);
    check_direction(p, f);
    size_t n;
    double* base = snapshot(p, &n);
    if (REAL_IS_DOUBLE && !(p->flags & IS_BIG)) check_difference(p, f);
    check_alone(p, f);

    // Forward and backward again: the same bits. Catches: reads of memory nobody wrote, unordered reductions.
    run_forward(p);
    run_backward(p, 0, false);
    worst_add(&f->twice, differing(snapshot(p, &n), base, n), "%s", p->shape);

    // Any number of threads: the same bits. Catches: races, and sums whose order depends on the threads.
    // (All else runs with one thread.)
    const int threads[] = { 2, 3, 4, 7 };
    for (int k = 0; k < 4; k++) {
        use_threads(threads[k]);
        run_forward(p);
        run_backward(p, 0, false);
        worst_add(&f->threads, differing(snapshot(p, &n), base, n), "%d threads, %s", threads[k], p->shape);
    }
    use_threads(1);

    // Backward adds to what is there: start from random contents of about the size of the gradient, subtract
    // them again. Catches: = instead of +=, a gradient added twice.
    for (int i = 0; i < p->n_in && !p->layer->overwrites; i++) {
        Operand* t = &p->in[i];
        if (!count(t)) continue;
        run_backward(p, 0, false);
        double *g = dense(t, t->grad), size = 0;
        for (size_t k = 0; k < count(t); k++) size += g[k] * g[k];
        size = sqrt(size / (double)count(t)) + 1e-30;
        uint64_t stream = random_stream;
        run_backward(p, size, true);
        double* sum = dense(t, t->grad);
        random_stream = stream;                     // the same random numbers once more
        for (int k = 0; k <= i; k++) fill_operand(&p->in[k], p->in[k].grad, -size, size, SENTINEL);
        double* start = dense(t, t->grad);
        for (size_t k = 0; k < count(t); k++) sum[k] -= start[k];
        worst_add(&f->accumulate, relative_l2(sum, g, count(t)), "d%s, %s", t->name, p->shape);
    }

    // A gradient that is not wanted (NULL) changes no other. Catches: work shared between gradients and
    // skipped with one.
    for (int i = 0; i < p->n_in; i++) {
        if (!p->in[i].skippable || !p->in[i].value) continue;
        run_backward(p, 0, false);
        double* with[MAX_IN];
        for (int k = 0; k < p->n_in; k++) with[k] = dense(&p->in[k], p->in[k].grad);
        real* grad = p->in[i].grad;
        p->in[i].grad = NULL;
        run_backward(p, 0, false);
        for (int k = 0; k < p->n_in; k++)
            if (k != i && p->in[k].grad)
                worst_add(&f->skipped, differing(dense(&p->in[k], p->in[k].grad), with[k], count(&p->in[k])),
                          "no d%s: d%s, %s", p->in[i].name, p->in[k].name, p->shape);
        p->in[i].grad = grad;
    }
}

void check_layer(const LayerTest* layer, const char* const* shapes, int n_shapes) {
    Findings f;
    memset(&f, 0, sizeof f);
    bool skippable = false;
    for (int s = 0; s < n_shapes; s++) {
        Problem p;
        problem_make(&p, layer, shapes[s]);
        check_problem(&p, &f);
        for (int i = 0; i < p.n_in; i++) skippable |= p.in[i].skippable;
        free_all();
    }
    worst_report("outputs = formula", &f.formula, limit(3e-6, 1e-14));    // measured 2.3e-7, 3e-16
    worst_report("gradient along random directions", &f.direction, limit(3e-5, 1e-10));    // 9.6e-7, 2.1e-11
    if (REAL_IS_DOUBLE) worst_report("gradient = central differences", &f.difference, 1e-6);    // 4.5e-9
    // measured: 8.5e-7, 1.2e-15
    if (!layer->overwrites) worst_report("backward adds", &f.accumulate, limit(3e-6, 1e-14));
    worst_report("twice: differing bits", &f.twice, 0);
    worst_report("1, 2, 3, 4, 7 threads: differing bits", &f.threads, 0);
    worst_report("alone = in the batch: differing bits", &f.alone, 0);
    worst_report("elements written between rows", &f.gaps, 0);
    if (skippable) worst_report("one gradient NULL: differing bits", &f.skipped, 0);
}

// ---------------------------------------------------------------------------------------------------
// 4. The layers: shapes, calls, formulas
// Sizes are ragged on purpose; `big` ones give every thread work, cross block edges, and are not differenced.

// Embedding: out[m,:] = weight[token[m],:]. Tokens repeat, so gradients of one row meet.
void embedding_make(Problem* p) {
    add_input(p, "weight", SHARED, p->V, p->D, 0, -1, 1);
    add_output(p, "out", PER_TOKEN, p->B * p->T, p->D, 0);
}
void embedding_fwd(Problem* p) {
    embedding_forward(p->out[0].value, p->ids, p->in[0].value, p->B * p->T, p->D);
}
void embedding_bwd(Problem* p) {
    embedding_backward(p->in[0].grad, p->out[0].grad, p->ids, p->B * p->T, p->D);
}
void embedding_formula(const Problem* p, double** in, double** out) {
    for (size_t i = 0; i < p->B * p->T * p->D; i++)
        out[0][i] = in[0][(size_t)p->ids[i / p->D] * p->D + i % p->D];
}
const LayerTest embedding_layer = {
    "embedding", embedding_make, embedding_fwd, embedding_bwd, embedding_formula, -1, false, false
};
void test_embedding(void) {
    const char* const shapes[] = {
        "B3 T7 D5 V4", "B3 T37 D13 V11", "B1 T1 D1 V1", "B2 T7 D37 V50", "B4 T67 D70 V33 big" };
    check_layer(&embedding_layer, shapes, COUNT_OF(shapes));
}

// Matmul: out = inp weight^T + bias, rows of inp and out at a stride (a part of a wider activation).
void matmul_make(Problem* p) {
    add_input(p, "inp", PER_TOKEN, p->B * p->T, p->D, 3, -1, 1)->skippable = true;
    add_input(p, "weight", SHARED, p->E, p->D, 0, -1, 1)->skippable = true;
    Operand* bias = add_input(p, "bias", SHARED, 1, p->E, 0, -1, 1);
    bias->skippable = true;
    given_if(bias, p->flags & HAS_BIAS);
    add_output(p, "out", PER_TOKEN, p->B * p->T, p->E, 2);
}
void matmul_fwd(Problem* p) {
    matmul_forward(p->out[0].value, p->out[0].ld, p->in[0].value, p->in[0].ld, p->in[1].value, p->in[2].value,
                   p->B * p->T, p->D, p->E);
}
void matmul_bwd(Problem* p) {
    matmul_backward(p->in[0].grad, p->in[0].ld, p->in[1].grad, p->in[2].grad, p->out[0].grad, p->out[0].ld,
                    p->in[0].value, p->in[0].ld, p->in[1].value, p->B * p->T, p->D, p->E);
}
void matmul_formula(const Problem* p, double** in, double** out) {
    for (size_t m = 0; m < p->B * p->T; m++) {
        for (size_t o = 0; o < p->E; o++) {
            double sum = in[2] ? in[2][o] : 0;
            for (size_t i = 0; i < p->D; i++) sum += in[0][m * p->D + i] * in[1][o * p->D + i];
            out[0][m * p->E + o] = sum;
        }
    }
}
const LayerTest matmul_layer = {
    "matmul", matmul_make, matmul_fwd, matmul_bwd, matmul_formula, -1, false, false
};
void test_matmul(void) {
    const char* const shapes[] = {
        "B3 T7 D5 E13 bias", "B3 T7 D37 E33", "B1 T1 D1 E1 bias", "B1 T1 D33 E5", "B3 T37 D1 E5 bias",
        "B1 T17 D16 E16 bias", "B3 T67 D133 E71 bias big", "B2 T150 D48 E257 big" };
    check_layer(&matmul_layer, shapes, COUNT_OF(shapes));
}

// RMSNorm: out = weight * inp / sqrt(mean(inp^2) + eps). A large eps shows that it is inside the root.
#define TEST_EPS ((real)0.0625)
void rmsnorm_make(Problem* p) {
    add_input(p, "inp", PER_TOKEN, p->B * p->T, p->D, 0, -1, 1);
    add_input(p, "weight", SHARED, 1, p->D, 0, 0.5, 1.5);
    add_output(p, "out", PER_TOKEN, p->B * p->T, p->D, 0);
    p->saved_size = p->B * p->T;
}
void rmsnorm_fwd(Problem* p) {
    rmsnorm_forward(p->out[0].value, p->saved, p->in[0].value, p->in[1].value, p->B * p->T, p->D, TEST_EPS);
}
void rmsnorm_bwd(Problem* p) {
    rmsnorm_backward(p->in[0].grad, p->in[1].grad, p->out[0].grad, p->in[0].value, p->in[1].value, p->saved,
                     p->B * p->T, p->D);
}
void rmsnorm_formula(const Problem* p, double** in, double** out) {
    for (size_t m = 0; m < p->B * p->T; m++) {
        const double* x = in[0] + m * p->D;
        double sum = 0;
        for (size_t d = 0; d < p->D; d++) sum += x[d] * x[d];
        for (size_t d = 0; d < p->D; d++)
            out[0][m * p->D + d] = in[1][d] * x[d] / sqrt(sum / (double)p->D + (double)TEST_EPS);
    }
}
const LayerTest rmsnorm_layer = {
    "rmsnorm", rmsnorm_make, rmsnorm_fwd, rmsnorm_bwd, rmsnorm_formula, -1, false, false
};
void test_rmsnorm(void) {
    const char* const shapes[] = {
        "B3 T7 D5", "B3 T37 D13", "B1 T1 D1", "B3 T7 D37", "B4 T67 D133 big" };
    check_layer(&rmsnorm_layer, shapes, COUNT_OF(shapes));
}

// document_starts: does a new document begin at token t of sequence b? The id before the first token is 0.
bool document_starts(const Problem* p, size_t b, size_t t) {
    if (!p->doc) return false;
    return p->doc[b * p->T + t] != (t ? p->doc[b * p->T + t - 1] : 0);
}

// Causal conv: out_t = silu(bias + sum_k weight[k] inp_{t-K+1+k}); `linear`: without silu. Inputs before
// t = 0 come from the tail; none come from another document.
bool conv_silu(const Problem* p) { return !strstr(p->shape, "linear"); }
void conv_make(Problem* p) {
    add_input(p, "inp", PER_TOKEN, p->B * p->T, p->E, 3, -1, 1);
    add_input(p, "weight", SHARED, p->E, p->K, 0, -1, 1);
    given_if(add_input(p, "bias", SHARED, 1, p->E, 0, -1, 1), p->flags & HAS_BIAS);
    Operand* tail0 = add_input(p, "tail0", PER_SEQUENCE, p->B * (p->K - 1), p->E, 0, -1, 1);
    tail0->skippable = true;
    given_if(tail0, p->flags & HAS_STATE);
    add_output(p, "out", PER_TOKEN, p->B * p->T, p->E, 0);
    given_if(add_output(p, "tailT", PER_SEQUENCE, p->B * (p->K - 1), p->E, 0), p->flags & HAS_FINAL);
}
void conv_fwd(Problem* p) {
    causal_conv1d_forward(p->out[0].value, p->out[1].value, p->in[0].value, p->in[0].ld, p->in[3].value,
                          p->in[1].value, p->in[2].value, conv_silu(p), p->doc, p->B, p->T, p->E, p->K);
}
void conv_bwd(Problem* p) {
    causal_conv1d_backward(p->in[0].grad, p->in[0].ld, p->in[1].grad, p->in[2].grad, p->in[3].grad,
                           p->out[0].grad, p->out[1].grad, p->in[0].value, p->in[0].ld, p->in[3].value,
                           p->in[1].value, p->in[2].value, conv_silu(p), p->doc, p->B, p->T, p->E, p->K);
}
// the input j tokens before token t of sequence b, as token t sees it: 0 if it is of another document
double conv_past(const Problem* p, double** in, size_t b, size_t t, size_t j, size_t e) {
    for (size_t back = 0; back < j && back <= t; back++) if (document_starts(p, b, t - back)) return 0;
    if (j <= t) return in[0][(b * p->T + t - j) * p->E + e];
    return in[3] ? in[3][(b * (p->K - 1) + p->K - 1 + t - j) * p->E + e] : 0;
}
void conv_formula(const Problem* p, double** in, double** out) {
    for (size_t b = 0; b < p->B; b++) {
        for (size_t e = 0; e < p->E; e++) {
            for (size_t t = 0; t < p->T; t++) {
                double c = in[2] ? in[2][e] : 0;
                for (size_t k = 0; k < p->K; k++)
                    c += in[1][e * p->K + k] * conv_past(p, in, b, t, p->K - 1 - k, e);
                out[0][(b * p->T + t) * p->E + e] = conv_silu(p) ? c / (1 + exp(-c)) : c;
            }
            // oldest first: K-2-j tokens before the last one
            for (size_t j = 0; out[1] && j + 1 < p->K; j++)
                out[1][(b * (p->K - 1) + j) * p->E + e] = conv_past(p, in, b, p->T - 1, p->K - 2 - j, e);
        }
    }
}
const LayerTest conv_layer = {
    "causal_conv1d", conv_make, conv_fwd, conv_bwd, conv_formula, 3, false, false
};
void test_conv(void) {
    const char* const shapes[] = {
        "B3 T7 E5 K4 bias", "B3 T37 E13 K4 bias state final", "B3 T7 E33 K3 final", "B3 T7 E37 K2 state",
        "B3 T2 E5 K4 bias state final", "B1 T1 E1 K1 bias state final", "B1 T1 E5 K4 state final",
        "B3 T7 E5 K1", "B3 T7 E5 K4 state final documents0", "B3 T37 E5 K4 bias state final documents3",
        "B3 T7 E13 K3 bias final documents6", "B8 T2 E3 K4 state final documents0",
        "B8 T9 E5 K2 state final documents0", "B8 T7 E5 K1 bias state final documents0",
        "B8 T67 E70 K4 bias state final big documents0",
        "B2 T5 E31 K4 bias state final",         // one channel short of a tile
        "B3 T7 E5 K4 bias state final documents0 linear", "B1 T1 E33 K3 final linear" };
    check_layer(&conv_layer, shapes, COUNT_OF(shapes));
}

// Softplus: log1p(exp(x)), x above 20. Backward works from the output alone.
void softplus_make(Problem* p) {
    add_input(p, "inp", PER_TOKEN, p->B * p->T, p->E, 0, -6, 6);
    add_output(p, "out", PER_TOKEN, p->B * p->T, p->E, 0);
}
void softplus_fwd(Problem* p) { softplus_forward(p->out[0].value, p->in[0].value, p->B * p->T * p->E); }
void softplus_bwd(Problem* p) {
    softplus_backward(p->in[0].grad, p->out[0].grad, p->out[0].value, p->B * p->T * p->E);
}
double softplus_exact(double x) { return x > 20 ? x : log1p(exp(x)); }
void softplus_formula(const Problem* p, double** in, double** out) {
    for (size_t i = 0; i < p->B * p->T * p->E; i++) out[0][i] = softplus_exact(in[0][i]);
}
const LayerTest softplus_layer = {
    "softplus", softplus_make, softplus_fwd, softplus_bwd, softplus_formula, -1, false, false
};
void test_softplus(void) {
    const char* const shapes[] = {
        "B3 T7 E5", "B3 T37 E13", "B1 T1 E1", "B3 T67 E133 big" };
    check_layer(&softplus_layer, shapes, COUNT_OF(shapes));
}

// Selective scan: h_t = exp(dt_t A) h_{t-1} + dt_t Bt_t x_t,  y_t = <Ct_t, h_t> + Dskip x_t
// with A = -exp(A_log).
enum { SCAN_X, SCAN_DT, SCAN_A, SCAN_B, SCAN_C, SCAN_D, SCAN_H0 };
void scan_make(Problem* p) {
    size_t M = p->B * p->T;
    add_input(p, "x", PER_TOKEN, M, p->E, 0, -1, 1);
    add_input(p, "dt", PER_TOKEN, M, p->E, 0, 0.05, 1);
    add_input(p, "A_log", SHARED, p->E, p->N, 0, -2, 1.5);
    add_input(p, "Bt", PER_TOKEN, M, p->N, 3, -1, 1);
    add_input(p, "Ct", PER_TOKEN, M, p->N, 3, -1, 1);
    add_input(p, "Dskip", SHARED, 1, p->E, 0, -1, 1);
    Operand* h0 = add_input(p, "h0", PER_SEQUENCE, p->B * p->E, p->N, 0, -1, 1);
    h0->skippable = true;
    given_if(h0, p->flags & HAS_STATE);
    add_output(p, "y", PER_TOKEN, M, p->E, 0);
    given_if(add_output(p, "hT", PER_SEQUENCE, p->B * p->E, p->N, 0), p->flags & HAS_FINAL);
    p->saved_size = selective_scan_saved(p->B, p->T, p->E, p->N);
    p->scratch_size = selective_scan_scratch(p->B, p->T, p->E, p->N);
}
void scan_call(Problem* p, real* hs) {
    const Operand* in = p->in;
    selective_scan_forward(p->out[0].value, hs, p->out[1].value, in[SCAN_X].value, in[SCAN_DT].value,
                           in[SCAN_A].value, in[SCAN_B].value, in[SCAN_C].value, in[SCAN_B].ld,
                           in[SCAN_D].value, in[SCAN_H0].value, p->doc, p->B, p->T, p->E, p->N);
}
void scan_fwd(Problem* p) { scan_call(p, p->saved); }
void scan_bwd(Problem* p) {
    const Operand* in = p->in;
    selective_scan_backward(in[SCAN_X].grad, in[SCAN_DT].grad, in[SCAN_A].grad, in[SCAN_B].grad,
                            in[SCAN_C].grad, in[SCAN_B].ld, in[SCAN_D].grad, in[SCAN_H0].grad, p->out[0].grad,
                            p->out[1].grad, p->saved, in[SCAN_X].value, in[SCAN_DT].value, in[SCAN_A].value,
                            in[SCAN_B].value, in[SCAN_C].value, in[SCAN_B].ld, in[SCAN_D].value, p->doc,
                            p->scratch, p->B, p->T, p->E, p->N);
}
void scan_formula(const Problem* p, double** in, double** out) {
    size_t T = p->T, E = p->E, N = p->N;
    for (size_t b = 0; b < p->B; b++) {
        for (size_t e = 0; e < E; e++) {
            for (size_t t = 0; t < T; t++)
                out[0][(b * T + t) * E + e] = in[SCAN_D][e] * in[SCAN_X][(b * T + t) * E + e];
            for (size_t n = 0; n < N; n++) {
                double h = in[SCAN_H0] ? in[SCAN_H0][(b * E + e) * N + n] : 0;
                for (size_t t = 0; t < T; t++) {
                    size_t row = b * T + t;
                    double dt = in[SCAN_DT][row * E + e];
                    if (document_starts(p, b, t)) h = 0;
                    h = exp(-dt * exp(in[SCAN_A][e * N + n])) * h +
                        dt * in[SCAN_B][row * N + n] * in[SCAN_X][row * E + e];
                    out[0][row * E + e] += in[SCAN_C][row * N + n] * h;
                }
                if (out[1]) out[1][(b * E + e) * N + n] = h;
            }
        }
    }
}
const LayerTest scan_layer = {
    "selective_scan", scan_make, scan_fwd, scan_bwd, scan_formula, SCAN_H0, false, false
};
void test_scan(void) {
    const char* const shapes[] = {
        "B3 T7 E5 N5", "B3 T7 E13 N5 state final", "B3 T37 E5 N1 final", "B3 T7 E37 N1 state",
        "B1 T1 E1 N1 state final", "B1 T1 E33 N5", "B3 T37 E5 N3 state final documents0",
        "B3 T7 E13 N5 state final documents3", "B8 T7 E5 N2 state documents0",
        "B2 T37 E33 N2 final documents6", "B3 T37 E13 N5 state final documents2",
        "B8 T67 E70 N5 state final big documents0", "B1 T32 E3 N16 state final big", "B2 T33 E65 N17 big",
        "B2 T31 E31 N3 state final big", "B2 T63 E32 N2 final big", "B1 T64 E63 N1 state big",
        "B2 T9 E5 N33 state final" };       // states in three groups
    check_layer(&scan_layer, shapes, COUNT_OF(shapes));

    // Sizes by hand. Catches: memory for a tile or a chunk too many, which no result shows.
    size_t wrong_sizes = 0;
    for (size_t n = 1; n <= 96; n++) {
        size_t parts = n <= 32 ? 1 : n <= 64 ? 2 : 3;
        wrong_sizes += scan_tiles(n) != parts || scan_chunks(n) != parts;
        wrong_sizes += selective_scan_saved(2, n, 40, 5) != 2 * parts * 2 * 5 * 32;
        wrong_sizes += selective_scan_scratch(2, 7, n, 5) != parts * 2 * 7 * 2 * 5 + 2 * n * 5 + 2 * n;
    }
    report("tiles, chunks, saved, scratch: wrong sizes", (double)wrong_sizes, 0);

    // Without saved states (inference): the same bits. Catches: a second code path that drifts.
    Problem p;
    problem_make(&p, &scan_layer, shapes[11]);
    run_forward(&p);
    double *y = dense(&p.out[0], p.out[0].value), *hT = dense(&p.out[1], p.out[1].value);
    run_forward(&p);
    scan_call(&p, NULL);
    double wrong = differing(dense(&p.out[0], p.out[0].value), y, count(&p.out[0])) +
                   differing(dense(&p.out[1], p.out[1].value), hT, count(&p.out[1]));
    report("without saved states: differing bits", wrong, 0);
}

// Gate: out = y silu(z); y and z are parts of wider rows.
void gate_make(Problem* p) {
    add_input(p, "y", PER_TOKEN, p->B * p->T, p->E, 1, -1, 1);
    add_input(p, "z", PER_TOKEN, p->B * p->T, p->E, 3, -4, 4);
    add_output(p, "out", PER_TOKEN, p->B * p->T, p->E, 0);
}
void gate_fwd(Problem* p) {
    gate_forward(p->out[0].value, p->in[0].value, p->in[0].ld, p->in[1].value, p->in[1].ld, p->B * p->T,
                 p->E);
}
void gate_bwd(Problem* p) {
    gate_backward(p->in[0].grad, p->in[0].ld, p->in[1].grad, p->in[1].ld, p->out[0].grad, p->in[0].value,
                  p->in[0].ld, p->in[1].value, p->in[1].ld, p->B * p->T, p->E);
}
void gate_formula(const Problem* p, double** in, double** out) {
    for (size_t i = 0; i < p->B * p->T * p->E; i++) out[0][i] = in[0][i] * in[1][i] / (1 + exp(-in[1][i]));
}
const LayerTest gate_layer = {
    "gate", gate_make, gate_fwd, gate_bwd, gate_formula, -1, false, false
};
void test_gate(void) {
    const char* const shapes[] = {
        "B3 T7 E5", "B3 T37 E13", "B1 T1 E1", "B3 T67 E133 big" };
    check_layer(&gate_layer, shapes, COUNT_OF(shapes));
}

// Cross entropy: loss = logsumexp(logits) - logits[target], 0 where the target is negative. Forward and
// backward are one function.
void crossentropy_make(Problem* p) {
    for (size_t i = 0; i < p->B * p->T; i++) if (random_bits(7, 2, i) % 4 == 0) p->ids[i] = i % 2 ? -1 : -100;
    add_input(p, "logits", PER_TOKEN, p->B * p->T, p->V, 0, -3, 3);
    Operand* losses = add_output(p, "losses", PER_TOKEN, p->B * p->T, 1, 0);
    fill_operand(losses, losses->grad, (double)p->scale, (double)p->scale, 0);
}
void crossentropy_fwd(Problem* p) {
    crossentropy(p->out[0].value, NULL, p->in[0].value, p->ids, p->scale, p->B * p->T, p->V);
}
void crossentropy_bwd(Problem* p) {
    crossentropy(p->out[0].value, p->in[0].grad, p->in[0].value, p->ids, p->scale, p->B * p->T, p->V);
}
void crossentropy_formula(const Problem* p, double** in, double** out) {
    for (size_t m = 0; m < p->B * p->T; m++) {
        const double* z = in[0] + m * p->V;
        double max = z[0], sum = 0;
        for (size_t v = 0; v < p->V; v++) max = fmax(max, z[v]);
        for (size_t v = 0; v < p->V; v++) sum += exp(z[v] - max);
        out[0][m] = p->ids[m] < 0 ? 0 : max + log(sum) - z[p->ids[m]];
    }
}
const LayerTest crossentropy_layer = {
    "crossentropy", crossentropy_make, crossentropy_fwd, crossentropy_bwd, crossentropy_formula, -1, true,
    false
};
void test_crossentropy(void) {
    const char* const shapes[] = {
        "B3 T7 V5", "B3 T37 V13", "B3 T7 V2", "B1 T7 V257", "B3 T67 V133 big" };
    check_layer(&crossentropy_layer, shapes, COUNT_OF(shapes));

    // In place, dlogits == logits, as training calls it. Catches: a logit read after it was overwritten.
    Problem p;
    problem_make(&p, &crossentropy_layer, shapes[1]);
    run_forward(&p);
    run_backward(&p, 0, false);
    double *losses = dense(&p.out[0], p.out[0].value), *dlogits = dense(&p.in[0], p.in[0].grad);
    crossentropy(p.out[0].value, p.in[0].value, p.in[0].value, p.ids, p.scale, p.B * p.T, p.V);
    report("in place: differing bits", differing(dense(&p.out[0], p.out[0].value), losses, count(&p.out[0])) +
           differing(dense(&p.in[0], p.in[0].value), dlogits, count(&p.in[0])), 0);

    // All positions ignored, and a vocabulary of one word: loss 0, gradient 0. Catches: 0/0.
    double nonzero = 0;
    for (int k = 0; k < 2; k++) {
        problem_make(&p, &crossentropy_layer, k ? "B3 T7 V1" : "B3 T7 V5");
        for (size_t i = 0; i < p.B * p.T; i++) p.ids[i] = k ? 0 : -1;
        run_backward(&p, 0, false);
        for (size_t i = 0; i < p.B * p.T; i++) nonzero += !(p.out[0].value[i] == 0);
        for (size_t i = 0; i < p.B * p.T * p.V; i++) nonzero += !(p.in[0].grad[i] == 0);
    }
    report("all ignored, or V = 1: losses and gradients not 0", nonzero, 0);
}

// ---------------------------------------------------------------------------------------------------
// 5. Pieces and documents: a split sequence, packed documents

// problem_join: what one piece returns as its final state is what the next one starts from, and the gradient
// goes back.
void problem_join(Problem* left, Problem* right) {
    Operand* in = &right->in[right->layer->state];
    *in = left->out[1];
    in->value = (real*)test_alloc(span(in), sizeof(real));
    in->grad = (real*)test_alloc(span(in), sizeof(real));
    left->out[1].value = in->value;
    left->out[1].grad = in->grad;
}

// compare_parts: the outputs of the parts equal the whole to the bit, their gradients, summed, to rounding
void compare_parts(const Problem* p, const double* whole, Worst* forward, Worst* backward, size_t cut) {
    size_t n, at = count(&p->out[0]) + count(&p->out[1]);
    double* parts = snapshot(p, &n);
    double err = p->layer->rounds ? relative_l2(parts, whole, at) : differing(parts, whole, at);
    worst_add(forward, err, "cut %d, %s", (int)cut, p->shape);
    for (int i = 0; i < p->n_in; at += count(&p->in[i++]))
        worst_add(backward, relative_l2(parts + at, whole + at, count(&p->in[i])), "d%s, cut %d, %s",
                  p->in[i].name, (int)cut, p->shape);
}

void report_parts(const LayerTest* layer, const Worst* forward, const Worst* backward) {
    char claim[80];
    snprintf(claim, sizeof claim, "%s: %s", layer->name, layer->rounds ? "outputs" : "differing bits");
    worst_report(claim, forward, layer->rounds ? limit(3e-6, 1e-14) : 0);
    snprintf(claim, sizeof claim, "%s: gradients", layer->name);
    worst_report(claim, backward, limit(3e-6, 1e-14));      // 3.9e-7, 9.5e-16
}

// problem_forget: outputs NaN, gradients 0, before the parts are computed into the same arrays
void problem_forget(Problem* p) {
    for (int j = 0; j < p->n_out; j++) fill_operand(&p->out[j], p->out[j].value, NAN, NAN, SENTINEL);
    for (int i = 0; i < p->n_in; i++) fill_operand(&p->in[i], p->in[i].grad, 0, 0, SENTINEL);
}

// A sequence computed in pieces, the state carried along, equals the sequence in one call. All cuts into two,
// and single tokens. Catches: a state off by one token, a tail in the wrong order, chunking that changes
// sums.
void check_split(const LayerTest* layer, const char* const* shapes, int n_shapes) {
    Worst forward = { 0, "" }, backward = { 0, "" };
    for (int s = 0; s < n_shapes; s++) {
        Problem p, piece[40];
        problem_make(&p, layer, shapes[s]);
        run_forward(&p);
        run_backward(&p, 0, false);
        size_t n;
        double* whole = snapshot(&p, &n);
        for (size_t cut = 1; cut <= p.T; cut++) {
            size_t pieces = cut < p.T ? 2 : p.T;        // the last round: T pieces of one token
            for (size_t k = 0; k < pieces; k++) {
                size_t start = cut < p.T ? k * cut : k,
                       end = cut < p.T && k ? p.T : start + (cut < p.T ? cut : 1);
                problem_slice(&piece[k], &p, 0, start, end);
            }
            for (size_t k = 0; k + 1 < pieces; k++) problem_join(&piece[k], &piece[k + 1]);
            problem_forget(&p);
            for (size_t k = 0; k < pieces; k++) layer->forward(&piece[k]);
            for (size_t k = pieces; k-- > 0;) layer->backward(&piece[k]);
            compare_parts(&p, whole, &forward, &backward, cut);
        }
        free_all();
    }
    report_parts(layer, &forward, &backward);
}

void test_split(void) {
    const char* const conv_shapes[] = {
        "B1 T40 E5 K4 bias state final", "B1 T40 E5 K4 state final documents1",
        "B1 T40 E3 K2 state final documents2", "B1 T40 E5 K4 bias state final documents3",
        "B1 T40 E5 K3 state final documents5", "B1 T7 E5 K4 state final documents4" };
    const char* const scan_shapes[] = {
        "B1 T40 E5 N3 state final", "B1 T40 E5 N3 state final documents1",
        "B1 T40 E33 N2 state final documents2", "B1 T40 E5 N1 state final documents3",
        "B1 T40 E5 N3 state final documents5", "B1 T7 E5 N3 state final documents4" };
    check_split(&conv_layer, conv_shapes, COUNT_OF(conv_shapes));
    check_split(&scan_layer, scan_shapes, COUNT_OF(scan_shapes));
}

// Documents packed into one sequence equal the documents computed one by one. Catches: state or taps that
// leak across a boundary, in forward or in backward.
void check_packed(const LayerTest* layer, const char* const* shapes, int n_shapes) {
    Worst forward = { 0, "" }, backward = { 0, "" };
    for (int s = 0; s < n_shapes; s++) {
        Problem p;
        problem_make(&p, layer, shapes[s]);
        run_forward(&p);
        run_backward(&p, 0, false);
        size_t n;
        double* packed = snapshot(&p, &n);
        problem_forget(&p);
        for (size_t b = 0; b < p.B; b++) {
            for (size_t start = 0, end; start < p.T; start = end) {
                for (end = start + 1; end < p.T && !document_starts(&p, b, end); end++) {}
                Problem q;
                problem_slice(&q, &p, b, start, end);
                q.doc = NULL;
                given_if(&q.in[layer->state], start == 0 && !document_starts(&p, b, 0));
                given_if(&q.out[1], end == p.T);
                layer->forward(&q);
                layer->backward(&q);
            }
        }
        compare_parts(&p, packed, &forward, &backward, 0);
        free_all();
    }
    report_parts(layer, &forward, &backward);
}

void test_packed(void) {
    const char* const conv_shapes[] = {
        "B8 T37 E5 K4 bias state final documents0", "B8 T3 E5 K4 state final documents0",
        "B8 T9 E5 K2 state final documents0" };
    const char* const scan_shapes[] = {
        "B8 T67 E5 N3 state final documents0", "B8 T3 E5 N3 state final documents0",
        "B8 T37 E33 N1 state final documents0" };
    check_packed(&conv_layer, conv_shapes, COUNT_OF(conv_shapes));
    check_packed(&scan_layer, scan_shapes, COUNT_OF(scan_shapes));
}

// ---------------------------------------------------------------------------------------------------
// 6. Extreme and degenerate inputs

// relative: the relative error, after an absolute error of `flushed`: numbers below that may become 0
double relative(double value, double exact, double flushed) {
    if (value == exact) return 0;
    double error = fabs(value - exact);
    return error <= flushed ? 0 : error / fabs(exact);
}

// exp over the whole range. Catches: a range reduction that fails at its ends.
void test_exp(void) {
    Worst w = { 0, "" };
    for (double x = limit(-120, -760); x <= limit(88.7, 709.7); x += 1.0 / 512) {
        real xr = (real)x;
        const double flushed = limit(1.7e-38, 2.3e-308);    // exp_real is 0 below 2^-125.5
        worst_add(&w, relative((double)exp_real(xr), exp((double)xr), flushed), "x = %g",
                  (double)xr);
    }
    worst_report("exp_real, relative", &w, limit(3e-7, 5e-16));    // 8.0e-8, 0
    const double x[] = { -1e30, -INFINITY, -0.0, 0, 1e3, 1e30, INFINITY };
    double wrong = !isnan(exp_real((real)NAN));
    for (int i = 0; i < COUNT_OF(x); i++) wrong += !((double)exp_real((real)x[i]) == (double)(real)exp(x[i]));
    report("exp_real(-inf .. inf, NaN): wrong", wrong, 0);
}

// softplus and its derivative from the output alone, far out on both sides. Catches: log(1 + exp(x)), which
// is 0 below -17; 1 - exp(-out), which cancels; overflow above 88.
void test_softplus_extremes(void) {
    Worst forward = { 0, "" }, backward = { 0, "" };
    const double x[] = { -1e30, -1e4, -200, -100, -88,  -80, -50,  -20, -17, -10, -6.9, -1,  -1e-6,
                         0,     1e-6, 1,    10,   19.5, 20,  20.5, 50,  88,  89,  100,  1e4, 1e30 };
    for (int i = 0; i < COUNT_OF(x); i++) {
        real in = (real)x[i], out = (real)NAN, dout = 1, din = 0;
        softplus_forward(&out, &in, 1);
        softplus_backward(&din, &dout, &out, 1);
        worst_add(&forward, relative((double)out, softplus_exact((double)in), 2e-38), "x = %g", x[i]);
        worst_add(&backward, relative((double)din, 1 / (1 + exp(-(double)in)), 2e-38), "x = %g", x[i]);
    }
    worst_report("softplus, relative", &forward, limit(1e-6, 1e-14));    // 9.6e-8, 0
    // identity above 20: exp(-20) is lost
    worst_report("sigmoid from softplus, relative", &backward, limit(1e-6, 3e-9));
}

// gate with |z| up to 1e4, where silu is 0 or z. Catches: exp(-z) = inf, inf / inf, inf * 0.
void test_gate_extremes(void) {
    Worst forward = { 0, "" }, backward = { 0, "" };
    const double zs[] = { -1e30, -1e4, -200, -89, -88, -87, -50, -20, 0, 20, 50, 88, 89, 200, 1e4, 1e30 };
    for (int i = 0; i < COUNT_OF(zs); i++) {
        real y = (real)0.75, z = (real)zs[i], out = (real)NAN, dout = 1, dy = 0, dz = 0;
        double zd = (double)z, sigmoid = 1 / (1 + exp(-zd));
        gate_forward(&out, &y, 1, &z, 1, 1, 1);
        gate_backward(&dy, 1, &dz, 1, &dout, &y, 1, &z, 1, 1, 1);
        double exact_dz = 0.75 * sigmoid * (1 + zd * (1 - sigmoid));
        double error = fmax(relative((double)dy, zd * sigmoid, 1e-36), relative((double)dz, exact_dz, 1e-36));
        worst_add(&forward, relative((double)out, 0.75 * zd * sigmoid, 1e-36), "z = %g", zs[i]);
        worst_add(&backward, isnan((double)dy + (double)dz) ? NAN : error, "z = %g", zs[i]);
    }
    worst_report("gate, relative", &forward, limit(1e-6, 1e-14));    // 1.9e-7, 0
    worst_report("gate backward, relative", &backward, limit(2e-5, 1e-12));    // 1.9e-7, 0
}

// logits of +-1e4, alone, together, all equal. Catches: a missing max, a loss of inf - inf.
void test_crossentropy_extremes(void) {
    Worst forward = { 0, "" }, backward = { 0, "" };
    const double rows[][3] = { { 1e4, -1e4, 0 },     { -1e4, 1e4, 0 },    { 1e4, 1e4, 1e4 },
                               { -1e4, -1e4, -1e4 }, { 1e4, 9999, 9998 }, { -1e30, 0, 0 } };
    for (int i = 0; i < COUNT_OF(rows); i++) {
        for (int target = 0; target < 3; target++) {
            real z[3], dz[3], loss = (real)NAN;
            double max = -INFINITY, sum = 0, exact[3], got[3];
            for (int v = 0; v < 3; v++) {
                z[v] = (real)rows[i][v];
                dz[v] = (real)NAN;
                max = fmax(max, (double)z[v]);
            }
            crossentropy(&loss, dz, z, &target, 1, 1, 3);
            for (int v = 0; v < 3; v++) sum += exp((double)z[v] - max);
            for (int v = 0; v < 3; v++) {
                exact[v] = exp((double)z[v] - max) / sum - (v == target);
                got[v] = (double)dz[v];
            }
            // the loss is a difference of numbers as large as max: its error is measured against them
            double exact_loss = max - (double)z[target] + log(sum);
            worst_add(&forward, fabs((double)loss - exact_loss) / fmax(fabs(max), fmax(exact_loss, 1)),
                      "row %d", i);
            worst_add(&backward, relative_l2(got, exact, 3), "row %d target %d", i, target);
        }
    }
    worst_report("losses", &forward, limit(1e-7, 1e-15));    // 3.8e-8, 5e-17
    worst_report("dlogits", &backward, limit(1e-6, 1e-14));    // 5.2e-8, 0
}

// scan_gradient: (B3) to (B9) of the backward derivation, literally, in double precision, B = 1 and no
// documents
void scan_gradient(const Problem* p, double** in, const double* g, const double* dhT, double** d) {
    size_t T = p->T, E = p->E, N = p->N;
    double* h = (double*)test_alloc(T + 1, sizeof(double));
    for (size_t e = 0; e < E; e++) {
        for (size_t t = 0; t < T; t++) {
            d[SCAN_D][e] += g[t * E + e] * in[SCAN_X][t * E + e];
            d[SCAN_X][t * E + e] += in[SCAN_D][e] * g[t * E + e];
        }
        for (size_t n = 0; n < N; n++) {
            double A = -exp(in[SCAN_A][e * N + n]), lambda = dhT[e * N + n];
            h[0] = in[SCAN_H0][e * N + n];              // h[t] is the state that enters token t
            for (size_t t = 0; t < T; t++)
                h[t + 1] = exp(in[SCAN_DT][t * E + e] * A) * h[t] +
                           in[SCAN_DT][t * E + e] * in[SCAN_B][t * N + n] * in[SCAN_X][t * E + e];
            for (size_t t = T; t-- > 0;) {
                double dt = in[SCAN_DT][t * E + e], x = in[SCAN_X][t * E + e], Bt = in[SCAN_B][t * N + n];
                double a = exp(dt * A), m = a * h[t];
                lambda += g[t * E + e] * in[SCAN_C][t * N + n];
                d[SCAN_C][t * N + n] += g[t * E + e] * h[t + 1];
                d[SCAN_B][t * N + n] += lambda * dt * x;
                d[SCAN_X][t * E + e] += dt * lambda * Bt;
                d[SCAN_DT][t * E + e] += lambda * (A * m + Bt * x);
                d[SCAN_A][e * N + n] += A * lambda * dt * m;
                lambda *= a;
            }
            d[SCAN_H0][e * N + n] = lambda;
        }
    }
}

// scan with dt of 0 and 1e3 and A_log of +-50 among ordinary values: finite, and equal to the double result
// per tensor. Catches: exp of a positive number, 0 * inf, states divided by decays that underflow.
void test_scan_extremes(void) {
    Worst finite = { 0, "" }, values = { 0, "" }, gradients = { 0, "" };
    for (int kind = 0; kind < 4; kind++) {              // extreme dt; extreme A_log; both; dt = 0 everywhere
        Problem p;
        problem_make(&p, &scan_layer, "B1 T37 E9 N4 state final");
        real *dt = p.in[SCAN_DT].value, *A_log = p.in[SCAN_A].value;
        for (size_t i = 0; i < count(&p.in[SCAN_DT]) && kind != 1; i++)
            if (i % 3 != 2 || kind == 3) dt[i] = i % 3 == 0 || kind == 3 ? 0 : (real)1e3;
        for (size_t i = 0; i < count(&p.in[SCAN_A]) && (kind == 1 || kind == 2); i++)
            if (i % 3 != 2) A_log[i] = i % 3 == 0 ? -50 : 50;
        run_forward(&p);
        run_backward(&p, 0, false);
        double *in[MAX_IN], *out[MAX_OUT], *d[MAX_IN];
        for (int i = 0; i < p.n_in; i++) {
            in[i] = dense(&p.in[i], p.in[i].value);
            d[i] = (double*)test_alloc(count(&p.in[i]), sizeof(double));
        }
        formula_outputs(&p, in, out);
        scan_gradient(&p, in, dense(&p.out[0], p.out[0].grad), dense(&p.out[1], p.out[1].grad), d);
        for (int k = 0; k < p.n_out + p.n_in; k++) {
            const Operand* t = k < p.n_out ? &p.out[k] : &p.in[k - p.n_out];
            const double* v = dense(t, k < p.n_out ? t->value : t->grad);
            double bad = 0;
            for (size_t i = 0; i < count(t); i++) bad += !isfinite(v[i]);
            worst_add(&finite, bad, "%s, kind %d", t->name, kind);
            worst_add(k < p.n_out ? &values : &gradients,
                      relative_l2(v, k < p.n_out ? out[k] : d[k - p.n_out], count(t)), "%s, kind %d", t->name,
                      kind);
        }
        free_all();
    }
    worst_report("scan: values not finite", &finite, 0);
    worst_report("scan: outputs", &values, limit(1e-6, 1e-14));    // 1.3e-7, 0
    worst_report("scan: gradients", &gradients, limit(3e-6, 1e-14));    // 2.1e-7, 2.6e-16
}

void test_extremes(void) {
    test_softplus_extremes();
    test_gate_extremes();
    test_crossentropy_extremes();
    test_scan_extremes();
}

// ---------------------------------------------------------------------------------------------------
// 7. The whole model: counts, initialization, gradients, pieces, documents, threads, fixtures

#include <pthread.h>

void must(bool ok, const Error* err) {
    if (!ok) die("test: %s", err->text);
}

// number_after_letter: 7 for "H" in "Q4 G2 H7", 0 when there is none
int64_t number_after_letter(const char* text, char letter) {
    const char* at = strchr(text, letter);
    return at ? atoll(at + 1) : 0;
}

// toy_attention: what describes attention layers, from a text: Q query heads, G KV heads, H numbers in each,
// R of them turned, a conv of K taps, an MLP of width F, room for T tokens after the C in the cache
void toy_attention(Config* c, const char* text, size_t T) {
    c->attn_heads = number_after_letter(text, 'Q');
    c->attn_heads_kv = number_after_letter(text, 'G');
    c->attn_head_dim = number_after_letter(text, 'H');
    c->rotary_dim = number_after_letter(text, 'R');
    c->attn_conv = number_after_letter(text, 'K');
    c->attn_mlp = 2 * number_after_letter(text, 'F');
    c->context = number_after_letter(text, 'C') + (int64_t)T;
    c->rotary_interleaved = strstr(text, "interleaved") != NULL;
    c->attn_in_bias = c->attn_out_bias = strstr(text, "biases") != NULL;
    c->softmax_scale = strstr(text, "scale") ? 0.4 : 0;
    c->rotary_base = 50;
}

// toy_mamba2: the same for Mamba-2 layers: P channels per head, S groups, chunks of L tokens, W of the E
// channels in the SSM (all when not given)
void toy_mamba2(Config* c, const char* text) {
    c->headdim = number_after_letter(text, 'P');
    c->ngroups = number_after_letter(text, 'S');
    c->chunk_size = number_after_letter(text, 'L');
    c->d_ssm = strchr(text, 'W') ? number_after_letter(text, 'W') : c->d_inner;
    c->D_has_hdim = strstr(text, "hdim") != NULL;
    c->norm_before_gate = strstr(text, "before") != NULL;
    c->rmsnorm = strstr(text, "plain") == NULL;
    c->dt_low = strstr(text, "limit") ? 0.3 : 0;
    c->dt_high = strstr(text, "limit") ? 0.8 : INFINITY;
    c->A_low = 1;
    c->A_high = 16;
}

// toy_config: a small model; Vp is V rounded up to 8, so most toys have padded ids
Config toy_config(const char* pattern, int64_t n_layer, int64_t D, int64_t E, int64_t N, int64_t K, int64_t R,
                  int64_t V) {
    Config c;
    memset(&c, 0, sizeof c);
    snprintf(c.pattern, sizeof c.pattern, "%s", pattern);
    c.n_layer = n_layer; c.d_model = D; c.d_inner = E; c.d_state = N; c.d_conv = K; c.dt_rank = R;
    c.d_intermediate = strchr(pattern, 'm') ? 6 : 0;
    c.vocab_size = V;
    c.vocab_padded = (V + 7) / 8 * 8;
    c.tie_embeddings = c.conv_bias = c.rescale_prenorm_residual = true;
    c.norm_eps = 1e-5; c.dt_min = 1e-3; c.dt_max = 0.1; c.dt_init_floor = 1e-4; c.dt_scale = 1;
    c.initializer_range = 0.02;
    c.eos_token = -1;
    if (strchr(pattern, 'a')) toy_attention(&c, "Q2 G1 H4 R2 K3", 100);
    if (strchr(pattern, '2')) toy_mamba2(&c, "P1 S1 L4");
    return c;
}

// toy_model: parameters far from their initial values, at sizes where every one of them changes the loss
Model toy_model(const Config* config, bool training, uint64_t seed) {
    Model m;
    Error err;
    must(config_check(config, &err), &err);
    model_describe(&m, config);
    model_alloc(&m, training);
    model_init(&m, seed);
    for (int i = 0; i < m.n_tensors; i++) {
        const Tensor* t = &m.tensor[i];
        int init = t->spec->init;
        for (size_t j = 0; j < t->count; j++) {
            real* p = &m.params[t->offset + j];
            double u = test_uniform(-1, 1, seed * 1000 + (uint64_t)i, j);
            if (init == INIT_EMBEDDING) *p = (real)u;
            else if (init == INIT_DT_BIAS) *p = (real)(1.5 * u - 0.5);
            else if (init == INIT_A_LOG || t->ndim == 1) *p += (real)(0.4 * u);
            else *p *= (real)1.5;
        }
    }
    return m;
}

// Toy: a model and one batch. loss = scale * sum of token losses + <dsT, states at the end>
typedef struct {
    Model m;
    Workspace w;
    State s0, sT, ds0, dsT, none;
    size_t B, T;
    int *tokens, *targets, *doc;
    real scale;
} Toy;

void toy_make(Toy* toy, const Config* config, size_t B, size_t T, int doc_pattern, int recompute) {
    memset(toy, 0, sizeof *toy);
    Model* m = &toy->m;
    *m = toy_model(config, true, 3);
    toy->w = workspace_alloc(m, B, T, true, recompute, false);
    toy->B = B;
    toy->T = T;
    toy->scale = (real)(1.0 / (double)T);
    State* states[4] = { &toy->s0, &toy->sT, &toy->ds0, &toy->dsT };
    for (int k = 0; k < 4; k++) *states[k] = state_alloc(m, B);
    toy->none = state_none(m);
    for (size_t i = 0; i < toy->s0.n_elements; i++) {
        toy->s0.data[i] = (real)test_uniform(-1, 1, 77, i);
        toy->dsT.data[i] = (real)test_uniform(-0.1, 0.1, 78, i);
    }
    for (int l = 0; l < m->n_layers; l++) {
        if (m->layer[l].kind->letter != 'a') continue;
        size_t most = config->context > (int64_t)T ? (size_t)config->context - T : 0;
        AttentionState* s0 = (AttentionState*)toy->s0.field[l];
        for (size_t b = 0; b < B; b++) s0->position[b] = (real)((most + 3 * b) % (most + 1));
    }
    toy->tokens = (int*)test_alloc(B * T, sizeof(int));
    toy->targets = (int*)test_alloc(B * T, sizeof(int));
    for (size_t i = 0; i < B * T; i++) {
        toy->tokens[i] = (int)(random_bits(5, 1, i) % (uint64_t)config->vocab_size);
        toy->targets[i] = (int)(random_bits(5, 3, i) % (uint64_t)config->vocab_size);
        if (random_bits(5, 2, i) % 5 == 0) toy->targets[i] = -1;           // ignored
    }
    if (doc_pattern >= 0) toy->doc = make_docs((size_t)doc_pattern, B, T);
}

void toy_free(Toy* toy) {
    State* states[5] = { &toy->s0, &toy->sT, &toy->ds0, &toy->dsT, &toy->none };
    for (int k = 0; k < 5; k++) state_free(states[k]);
    workspace_free(&toy->w);
    model_free(&toy->m);
}

double toy_loss(Toy* toy) {
    model_forward(&toy->m, &toy->w, toy->tokens, toy->doc, toy->B, toy->T, &toy->s0, &toy->sT);
    double loss = (double)toy->scale * model_loss(&toy->m, &toy->w, toy->targets, toy->B * toy->T, false, 0);
    const real *s = toy->sT.data, *weight = toy->dsT.data;
    for (size_t i = 0; i < toy->sT.n_elements; i++) loss += (double)weight[i] * (double)s[i];
    return loss;
}

// toy_gradients: adds to the gradients of the parameters and initial states
void toy_gradients(Toy* toy) {
    model_forward(&toy->m, &toy->w, toy->tokens, toy->doc, toy->B, toy->T, &toy->s0, &toy->sT);
    model_loss(&toy->m, &toy->w, toy->targets, toy->B * toy->T, true, toy->scale);
    model_backward(&toy->m, &toy->w, toy->tokens, toy->doc, toy->B, toy->T, &toy->s0, &toy->ds0, &toy->dsT);
}

// toy_packed: n documents packed into one row, whose gradients are made, and room for each alone, without a
// given state. lengths NULL: of one token each
void toy_packed(Toy* packed, Toy* alone, const Config* c, size_t T, const size_t* lengths, size_t n) {
    toy_make(packed, c, 1, T, 0, false);
    toy_make(alone, c, 1, T, -1, false);
    for (size_t d = 0, at = 0; d < n; d++)      // ids from 1: the given state belongs to none
        for (size_t t = 0; t < (lengths ? lengths[d] : 1); t++) packed->doc[at++] = (int)d + 1;
    for (int k = 0; k < 2; k++) {
        Toy* toy = k ? alone : packed;
        memset(toy->dsT.data, 0, toy->dsT.n_elements * sizeof(real));
        toy->scale = (real)0.25;
    }
    memset(alone->s0.data, 0, alone->s0.n_elements * sizeof(real));
    toy_gradients(packed);
}

double real_relative(const real* a, const real* reference, size_t n) {
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)a[i] - (double)reference[i];
        diff += d * d;
        norm += (double)reference[i] * (double)reference[i];
    }
    return norm == 0 ? sqrt(diff) : sqrt(diff / norm);
}

// bits_differ: 1 if any bit of n numbers differs
double bits_differ(const real* a, const real* b, size_t n) { return memcmp(a, b, n * sizeof(real)) != 0; }

double states_differ(const State* a, const State* b) { return bits_differ(a->data, b->data, a->n_elements); }

// compare_tensors: relative L2 of every parameter's part of two arrays laid out like the parameters
void compare_tensors(Worst* worst, const Model* m, const real* a, const real* reference) {
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor* t = &m->tensor[i];
        worst_add(worst, real_relative(a + t->offset, reference + t->offset, t->count), "%s", t->name);
    }
}

double* to_double(const real* x, size_t n) {
    double* d = (double*)test_alloc(n, sizeof(double));
    for (size_t i = 0; i < n; i++) d[i] = (double)x[i];
    return d;
}

// Parameter totals of the published sizes, to the unit. Catches: a wrong shape, a tensor counted twice,
// padding or dt_rank rounded another way.
void test_counts(void) {
    const struct { const char* preset; size_t total; } published[] = {
        { "mamba-130m", 129135360 }, { "mamba-370m", 371516416 }, { "mamba-790m", 793204224 },
        { "mamba-1.4b", 1372178432 }, { "mamba-2.8b", 2768345600 }, { "mamba2-130m", 128989632 },
        { "mamba2-370m", 368346624 }, { "mamba2-780m", 780161280 }, { "mamba2-1.3b", 1343757312 },
        { "mamba2-2.7b", 2702599680 }, { "mamba2attn-2.7b", 2697590880 } };
    for (int i = 0; i < COUNT_OF(published); i++) {
        char name[64], option[] = "--preset", value[32];
        char* argv[] = { option, value };
        Settings s;
        Error err;
        Model m;
        snprintf(value, sizeof value, "%s", published[i].preset);
        must(settings_parse(&s, WORD_INFO, 2, argv, &err), &err);
        Config c = config_from_options(&s, s.o.vocab_size, s.o.eos_token);
        must(config_check(&c, &err), &err);
        model_describe(&m, &c);
        snprintf(name, sizeof name, "%s: parameters", value);
        report(name, fabs((double)m.n_params - (double)published[i].total), 0);
        model_free(&m);
        settings_free(&s);
    }
    // by hand, with the gated MLP: D 7, E 9, N 5, K 4, R 2, F 6, Vp 24
    Config c = toy_config("1m", 2, 7, 9, 5, 4, 2, 19);
    size_t mixer = 7 + 18 * 7 + 9 * 4 + 9 + 12 * 9 + 9 * 2 + 9 + 9 * 5 + 9 + 7 * 9;
    size_t mlp = 7 + 12 * 7 + 7 * 6, total = 24 * 7 + 2 * (mixer + mlp) + 7, fc1 = 0;
    Model m;
    model_describe(&m, &c);
    report("pattern 1m: parameters", fabs((double)m.n_params - (double)total), 0);
    for (int i = 0; i < m.n_tensors; i++)
        if (ends_with(m.tensor[i].name, "mlp.fc1.weight"))
            fc1 += m.tensor[i].ndim == 2 && m.tensor[i].shape[0] == 12 && m.tensor[i].shape[1] == 7;
    report("pattern 1m: fc1.weight is not (2F,D)", fc1 != 2, 0);
    model_free(&m);
}

// Memory that is cleared or copied, and only that. Catches: a row of another sequence cleared, the last piece
// of an array left as it was.
void test_rows(void) {
    Config c = toy_config("1m", 2, 7, 9, 5, 4, 2, 19);
    Model m;
    model_describe(&m, &c);
    State src = state_alloc(&m, 3), dst = state_alloc(&m, 3);
    double wrong_clear = 0, wrong_copy = 0, wrong_zero = 0;
    const double one_state = 2 * (3 * 9 + 9 * 5);
    report("state of 3 sequences: numbers", fabs((double)src.n_elements - 3 * one_state), 0);
    report("state of one: numbers", fabs((double)state_count(&m) - one_state), 0);
    const struct { const TensorSpec* spec; size_t count; } field[] = {       // B 2, T 7: 14 tokens
        { &mamba1_acts[0], 14 }, { &mamba1_acts[1], 14 * 7 }, { &mamba1_acts[2], 14 * 18 },
        { &mamba1_acts[3], 14 * 9 }, { &mamba1_acts[4], 14 * 12 }, { &mamba1_acts[6], 2 * 5 * 32 },
        { &mamba1_scratch[8], 14 * 2 * 5 + 2 * 9 * 5 + 2 * 9 }, { &mlp_acts[2], 14 * 12 } };
    double wrong_count = 0;
    for (int i = 0; i < COUNT_OF(field); i++)
        wrong_count += activation_count(field[i].spec, &c, 2, 7) != field[i].count;
    report("activations of 2 x 7 tokens: wrong sizes", wrong_count, 0);
    State none = state_none(&m);
    report("no state: rows, numbers, memory", none.rows != 0 || none.n_elements != 0 || none.data, 0);
    state_free(&none);
    for (size_t i = 0; i < src.n_elements; i++) {
        src.data[i] = (real)(i + 1);
        dst.data[i] = -(real)(i + 1);
    }
    state_copy_row(&m, &dst, 1, NULL, 0);
    state_copy_row(&m, &dst, 0, &src, 2);
    for (int l = 0; l < m.n_layers; l += 2) {               // the mixers
        for (int k = 0; k < 2; k++) {
            size_t n = k == 0 ? 3 * 9 : 9 * 5;
            const real *d = dst.field[l][k], *s = src.field[l][k];
            for (size_t i = 0; i < n; i++) {
                wrong_copy += d[i] != s[2 * n + i];
                wrong_clear += d[n + i] != 0;
                wrong_clear += d[2 * n + i] != -s[2 * n + i];
            }
        }
    }
    report("state row copied: numbers not those of the source", wrong_copy, 0);
    report("state row cleared: not 0, or a neighbour changed", wrong_clear, 0);
    const size_t sizes[] = { 0, 1, 4095, 4096, 4097, 3 * 4096 + 5, 70000 };
    for (int i = 0; i < COUNT_OF(sizes); i++) {
        size_t n = sizes[i];
        real* p = (real*)test_alloc(n + 1, sizeof(real));
        for (size_t j = 0; j <= n; j++) p[j] = 7;
        zero_real(p, n);
        for (size_t j = 0; j < n; j++) wrong_zero += p[j] != 0;
        wrong_zero += p[n] != 7;
    }
    report("zero_real: not 0, or written beyond the end", wrong_zero, 0);
    model_alloc(&m, false);                                 // a fourth of the memory of training
    report("without training: gradients or moments", !m.params || m.grads || m.m || m.v, 0);
    state_free(&src);
    state_free(&dst);
    model_free(&m);
}

typedef struct { double mean, std, lo, hi; size_t n; } Moments;

Moments tensor_moments(const Model* m, const char* suffix) {
    Moments s = { 0, 0, INFINITY, -INFINITY, 0 };
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor* t = &m->tensor[i];
        for (size_t j = 0; ends_with(t->name, suffix) && j < t->count; j++) {
            double x = (double)m->params[t->offset + j];
            s.mean += x;
            s.std += x * x;
            s.lo = fmin(s.lo, x);
            s.hi = fmax(s.hi, x);
            s.n++;
        }
    }
    s.mean /= (double)s.n;
    s.std = sqrt(s.std / (double)s.n - s.mean * s.mean);
    return s;
}

// Initial values. Catches: a fan-in of the wrong side, a conv bias of zero, residual scaling missing or
// doubled, softplus inverted wrongly, random numbers that depend on the threads.
void test_init(void) {
    Config c = toy_config("1m", 4, 64, 96, 16, 4, 4, 250);
    c.d_intermediate = 80;
    c.tie_embeddings = false;
    c.bias = true;
    c.dt_scale = 0.5;
    Model m, other;
    model_describe(&m, &c);
    model_alloc(&m, false);
    model_init(&m, 1337);
    const struct { const char* suffix; double bound; } uniform[] = {
        { "in_proj.weight", 1 / sqrt(64) }, { "x_proj.weight", 1 / sqrt(96) },
        { "dt_proj.weight", 0.5 / sqrt(4) }, { "conv1d.weight", 1 / sqrt(4) },
            { "conv1d.bias", 1 / sqrt(4) }, { "mlp.fc1.weight", 1 / sqrt(64) },
        { "out_proj.weight", 1 / sqrt(96 * 4) }, { "mlp.fc2.weight", 1 / sqrt(80 * 4) },
        { "lm_head.weight", 1 / sqrt(64) } };
    Worst spread = { 0, "" }, outside = { 0, "" };
    for (int i = 0; i < COUNT_OF(uniform); i++) {
        Moments s = tensor_moments(&m, uniform[i].suffix);
        double bound = uniform[i].bound, n = (double)s.n;
        // the standard error of the standard deviation of n uniform numbers is sqrt(0.2 / n) of it
        worst_add(&spread, fabs(s.std * sqrt(3) / bound - 1) / sqrt(0.2 / n), "%s", uniform[i].suffix);
        worst_add(&spread, fabs(s.mean) / (bound / sqrt(3 * n)), "mean of %s", uniform[i].suffix);
        worst_add(&outside, fmax(s.hi, -s.lo) / bound, "%s", uniform[i].suffix);
    }
    worst_report("uniform: deviation and mean, in standard errors", &spread, 4);
    worst_report("uniform: largest value / bound", &outside, 1 + 1e-6);
    Moments e = tensor_moments(&m, "embeddings.weight"), dt = tensor_moments(&m, "dt_proj.bias");
    double unlike = 0;          // which random number: that of the tensor's stream and the element
    for (int i = 0; i < m.n_tensors; i++) {
        const Tensor* t = &m.tensor[i];
        for (size_t j = 0; j < t->count; j++) {
            uint64_t stream = STREAM_INIT + (uint64_t)i;
            real x = m.params[t->offset + j];
            if (ends_with(t->name, "embeddings.weight"))
                unlike += x != (real)(0.02 * random_normal(1337, stream, j));
            if (ends_with(t->name, "lm_head.weight"))
                unlike += x != (real)(0.125 * (2 * random_uniform(1337, stream, j) - 1));
        }
    }
    report("embedding and head: not the random number of that element", unlike, 0);
    report("embedding: standard deviation 0.02", fabs(e.std / 0.02 - 1), 0.03);       // standard error 0.0055
    double lo = log1p(exp(dt.lo)), hi = log1p(exp(dt.hi));
    report("softplus(dt bias) outside [1e-3, 1e-1]", fmax(1e-3 / lo, hi / 1e-1), 1 + 1e-5);
    report("softplus(dt bias) approaches both ends", fmax(lo / 1e-3, 1e-1 / hi), 1.1);
    double wrong = 0;
    for (int i = 0; i < m.n_tensors; i++) {
        const Tensor* t = &m.tensor[i];
        bool one = ends_with(t->name, "norm.weight") || ends_with(t->name, "norm2.weight") ||
                   ends_with(t->name, "norm_f.weight") || ends_with(t->name, ".D");
        bool zero = ends_with(t->name, "in_proj.bias") || ends_with(t->name, "out_proj.bias");
        for (size_t j = 0; j < t->count; j++) {
            real x = m.params[t->offset + j];
            if (one || zero) wrong += !(x == (real)one);
            if (ends_with(t->name, "A_log")) wrong += !(x == (real)log((double)(j % 16 + 1)));
        }
    }
    report("norms and D are 1, biases 0, A_log = ln(n+1)", wrong, 0);
    model_describe(&other, &c);
    model_alloc(&other, false);
    use_threads(4);
    model_init(&other, 1337);
    use_threads(1);
    report("same seed, 4 threads: bits differ", bits_differ(m.params, other.params, m.n_elements), 0);
    model_init(&other, 1338);
    double same = 0;
    for (int i = 0; i < m.n_tensors; i++) {
        const Tensor* t = &m.tensor[i];
        bool random = t->spec->init != INIT_ONE && t->spec->init != INIT_ZERO && t->spec->init != INIT_A_LOG;
        same += random && !bits_differ(m.params + t->offset, other.params + t->offset, t->count);
    }
    report("another seed: random tensors that did not change", same, 0);
    model_free(&other);
    model_free(&m);
}

typedef struct {
    const char* pattern;
    int64_t n_layer, D, E, N, K, R, V;
    bool tie, bias, conv_bias;
    size_t B, T;
    int docs;                // pattern of documents, -1: none
    double dropout;
    const char* mixers;      // see toy_attention and toy_mamba2
} ToyShape;
const ToyShape toy_shapes[] = {
    { "1", 2, 5, 7, 5, 4, 1, 11, true, false, true, 3, 7, -1, 0, "" },
    { "1", 2, 7, 9, 5, 2, 3, 11, false, true, false, 3, 7, 0, 0, "" },
    { "1m", 2, 5, 6, 3, 3, 2, 9, true, true, true, 3, 37, 1, 0, "" },
    { "11m", 2, 7, 5, 5, 4, 1, 8, false, false, true, 3, 7, 2, 0.3, "" },
    { "1m", 2, 8, 6, 3, 3, 2, 9, true, true, true, 2, 9, 1, 0.6, "" },
    { "1m", 1, 5, 7, 5, 2, 1, 11, false, true, true, 3, 37, 4, 0, "" },
    { "1", 2, 3, 5, 5, 3, 2, 7, true, false, false, 3, 37, -1, 0, "" },
    { "1", 1, 3, 4, 1, 1, 1, 2, true, true, true, 1, 1, -1, 0, "" },
    { "a", 2, 6, 5, 5, 4, 1, 11, true, false, true, 3, 7, -1, 0, "Q4 G2 H4 R2 K4 C3" },
    { "am", 1, 5, 6, 3, 3, 2, 9, false, false, true, 3, 9, 0, 0, "Q2 G1 H5 R4 C62 interleaved biases" },
    { "1am", 4, 5, 6, 3, 3, 2, 9, true, true, true, 3, 7, 2, 0.3, "Q3 G3 H2 K2 C1 scale" },
    { "a", 1, 5, 5, 5, 4, 1, 11, true, false, true, 2, 37, 1, 0, "Q2 G2 H3 R2 K3 F3 C4 biases" },
    { "a1", 2, 7, 5, 5, 4, 1, 7, true, false, true, 1, 1, -1, 0, "Q1 G1 H1 K1 F1" },
    { "2", 2, 5, 12, 5, 4, 1, 11, true, false, true, 3, 7, -1, 0, "P3 S2 L4" },
    { "2", 2, 7, 6, 3, 2, 1, 11, false, true, false, 3, 7, 0, 0, "P2 S1 L3 hdim" },
    { "2m", 2, 5, 12, 3, 3, 1, 9, true, true, true, 3, 19, 1, 0, "P2 S2 L8 W8 before" },
    { "12", 4, 5, 6, 3, 3, 2, 9, true, false, true, 2, 9, 2, 0.3, "P3 S1 L5 limit" },
    { "2", 1, 5, 12, 3, 4, 1, 9, false, true, true, 3, 37, 4, 0, "P3 S1 L16 W9 plain" },
    { "12am", 6, 4, 6, 3, 3, 1, 9, true, false, true, 2, 7, 0, 0, "Q2 G1 H4 R2 K3 C2 P2 S1 L2" },
    { "2", 1, 3, 4, 1, 1, 1, 2, true, true, true, 1, 1, -1, 0, "P4 S1 L1" },
};

void toy_from_shape(Toy* toy, const ToyShape* s, int recompute) {
    Config c = toy_config(s->pattern, s->n_layer, s->D, s->E, s->N, s->K, s->R, s->V);
    c.tie_embeddings = s->tie;
    c.bias = s->bias;
    c.conv_bias = s->conv_bias;
    if (strchr(s->pattern, 'a')) toy_attention(&c, s->mixers, s->T);
    if (strchr(s->pattern, '2')) toy_mamba2(&c, s->mixers);
    toy_make(toy, &c, s->B, s->T, s->docs, recompute);
    Dropout drop = { s->dropout, random_bits(6, STREAM_DROPOUT, 2), 5, 0 };
    toy->w.dropout = drop;
}

// numeric_gradient: (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / (12 h), truncation h^4, rounding 2^-53 / h
void numeric_gradient(Toy* toy, real* x, double* numeric, size_t n) {
    const double h = 2e-4;
    for (size_t i = 0; i < n; i++) {
        real x0 = x[i];
        double f[5];
        for (int k = -2; k <= 2; k++) {
            x[i] = (real)((double)x0 + k * h);
            if (k) f[k + 2] = toy_loss(toy);
        }
        numeric[i] = (8 * (f[3] - f[1]) - (f[4] - f[0])) / (12 * h);
        x[i] = x0;
    }
}

// Gradients of whole models = central differences, for every parameter and every initial state. Catches:
// layers put together wrongly (an activation overwritten too early, the residual counted twice, a state of
// a wrong row).
void test_model_gradient(void) {
    Worst params = { 0, "" }, states = { 0, "" }, recompute = { 0, "" }, padding = { 0, "" },
        memory = { 0, "" };
    for (int k = 0; k < COUNT_OF(toy_shapes); k++) {
        const ToyShape* shape = &toy_shapes[k];
        Toy toy, again;
        toy_from_shape(&toy, shape, RECOMPUTE_NONE);
        toy_gradients(&toy);
        size_t bytes = toy.w.bytes;
        for (int level = RECOMPUTE_CHEAP; level <= RECOMPUTE_ALL; level++) {
            toy_from_shape(&again, shape, level);
            toy_gradients(&again);
            worst_add(&recompute, bits_differ(toy.m.grads, again.m.grads, toy.m.n_elements) +
                      states_differ(&toy.ds0, &again.ds0), "shape %d, level %d", k, level);
            worst_add(&memory, toy.m.n_layers > 2 && again.w.bytes >= bytes, "shape %d, level %d", k, level);
            bytes = again.w.bytes;
            toy_free(&again);
        }
        for (int i = 0; REAL_IS_DOUBLE && i < toy.m.n_tensors; i++) {
            const Tensor* t = &toy.m.tensor[i];
            double* numeric = (double*)test_alloc(t->count, sizeof(double));
            numeric_gradient(&toy, toy.m.params + t->offset, numeric, t->count);
            double* g = to_double(toy.m.grads + t->offset, t->count);
            worst_add(&params, relative_l2(g, numeric, t->count), "shape %d, %s", k, t->name);
        }
        for (int l = 0; REAL_IS_DOUBLE && l < toy.m.n_layers; l++) {
            const Kind* kind = toy.m.layer[l].kind;
            for (int i = 0; i < kind->n_state; i++) {
                size_t n = shape->B * spec_count(&kind->state[i], &toy.m.config);
                if (kind->state[i].flags & TOKENS) continue;
                double *numeric = (double*)test_alloc(n, sizeof(double)),
                    *g = to_double(toy.ds0.field[l][i], n);
                numeric_gradient(&toy, toy.s0.field[l][i], numeric, n);
                worst_add(&states, relative_l2(g, numeric, n), "shape %d, layer %d %s", k, l,
                          kind->state[i].name);
            }
        }
        double touched = 0;         // the gaps between tensors stay 0: norms and hashes run over them
        for (int i = 0; i < toy.m.n_tensors; i++)
            for (size_t j = toy.m.tensor[i].count; j % 16; j++)
                touched += toy.m.grads[toy.m.tensor[i].offset + j] != 0;
        worst_add(&padding, touched, "shape %d", k);
        toy_free(&toy);
        free_all();
    }
    if (REAL_IS_DOUBLE) worst_report("parameters: gradient = central differences", &params, 1e-6);
    if (REAL_IS_DOUBLE) worst_report("initial states: gradient = central differences", &states, 1e-6);
    worst_report("recompute: bits differ", &recompute, 0);
    worst_report("recompute: a higher level needs no less memory", &memory, 0);
    worst_report("padding between gradients touched", &padding, 0);
}

// dropout_mask: which of M x D ones are kept, with the value they then have
real* dropout_mask(double rate, uint64_t step, size_t first, int place, size_t M, size_t D) {
    Dropout drop = { rate, random_bits(6, STREAM_DROPOUT, step), first, place };
    real* mask = (real*)test_alloc(M * D, sizeof(real));
    for (size_t i = 0; i < M * D; i++) mask[i] = 1;
    dropout(mask, mask, &drop, M, D);
    return mask;
}

// Catches: elements scaled wrongly, a rate that is not the one asked for, masks that repeat from place to
// place, step to step or token to token, that depend on the threads or on how a batch is divided, dropout in
// an evaluation. (Its gradients: model gradient. That CPU and GPU agree: cuda layers, cuda model.)
void test_dropout(void) {
    enum { M = 301, D = 67, N = M * D };
    const double rates[] = { 0.1, 0.5, 0.9 };
    Worst rate_error = { 0, "" }, value = { 0, "" }, dependent = { 0, "" };
    for (int k = 0; k < COUNT_OF(rates); k++) {
        double rate = floor(rates[k] * 65536 + 0.5) / 65536, error = sqrt(rate * (1 - rate) / N), zeros = 0;
        real* mask = dropout_mask(rates[k], 3, 0, 1, M, D);
        const real* other[] = { dropout_mask(rates[k], 4, 0, 1, M, D),
                                dropout_mask(rates[k], 3, M, 1, M, D),
                                dropout_mask(rates[k], 3, 0, 2, M, D),
                                mask + 1, mask + 2, mask + 4, mask + D };
        for (size_t i = 0; i < N; i++) {
            zeros += mask[i] == 0;
            if (mask[i] != 0) worst_add(&value, fabs((double)mask[i] * (1 - rate) - 1), "rate %g", rate);
        }
        worst_add(&rate_error, fabs(zeros / N - rate) / error, "rate %g", rate);
        for (int j = 0; j < COUNT_OF(other); j++) {
            double both = 0, n = j < 3 ? N : N - D;
            for (size_t i = 0; i < (size_t)n; i++) both += mask[i] == 0 && other[j][i] == 0;
            // an element of a shifted mask is in two of the products, hence the second term
            double both_error = sqrt((rate * rate * (1 - rate * rate) + 2 * pow(rate, 3) * (1 - rate)) / n);
            worst_add(&dependent, fabs(both / n - rate * rate) / both_error, "rate %g, mask %d", rate, j);
        }
    }
    worst_report("kept values: 1 / (1 - rate)", &value, limit(1e-7, 1e-15));
    worst_report("part of zeros, in standard errors", &rate_error, 4);
    worst_report("zero in both of two masks, in standard errors", &dependent, 4);

    real *whole = dropout_mask(0.3, 3, 0, 1, M, D), *part = dropout_mask(0.3, 3, 100, 1, 50, D);
    real inp[8] = { 1 };
    double unlike = 0;                  // the definition, element by element
    for (size_t e = 100 * D; e < 150 * D; e++) {
        uint64_t hash = mix64(mix64(random_bits(6, STREAM_DROPOUT, 3) + 1) + e / 4);
        unlike += (part[e - 100 * D] == 0) != ((hash >> (16 * (e % 4))) % 65536 < 19661);    // 0.3 of 65536
    }
    report("kept: not as defined", unlike, 0);
    report("tokens 100 to 149 by themselves: bits differ", bits_differ(part, whole + 100 * D, 50 * D), 0);
    use_threads(4);
    report("4 threads: bits differ", bits_differ(dropout_mask(0.3, 3, 0, 1, M, D), whole, N), 0);
    use_threads(1);
    Dropout off = { 0, 1, 0, 0 };
    report("rate 0: not the input itself", dropout(NULL, inp, &off, 2, 4) != inp, 0);

    // a backend drops in training steps only, and differently in each step and micro-batch
    Toy toy;
    toy_from_shape(&toy, &toy_shapes[2], false);
    Backend b = backend_cpu(&toy.m, toy.B, toy.T, true, false);
    double loss[6];
    for (int k = 0; k < 6; k++) {       // none; evaluation; step 0; again; its second micro-batch; step 1
        b.dropout.rate = k ? 0.3 : 0;
        b.dropout.key = random_bits(6, STREAM_DROPOUT, k == 5);
        loss[k] = b.forward(&b, k == 1 ? -1 : k == 4, toy.tokens, toy.targets, NULL, toy.B, toy.T, 1);
    }
    report("evaluation: the loss differs from that without dropout", loss[1] != loss[0], 0);
    report("the same step: the loss differs", loss[3] != loss[2], 0);
    report("training, other micro-batch, other step: the loss is the same",
           (loss[2] == loss[0]) + (loss[4] == loss[2]) + (loss[5] == loss[2]) + (loss[5] == loss[4]), 0);
    b.destroy(&b);
    toy_free(&toy);
}

// guarded: memory of its own for one field, NaN at first, as much again behind it that nobody may write
real* guarded(real** fields, size_t* counts, size_t* n, size_t count) {
    real* p = (real*)test_alloc(2 * count + 64, sizeof(real));
    for (size_t i = 0; i < 2 * count + 64; i++) p[i] = i < count ? (real)NAN : SENTINEL;
    fields[*n] = p;
    counts[(*n)++] = count;
    return p;
}

// Every activation and scratch field in memory of its own. Catches: a layer that writes beyond its field into
// the next one of the workspace, or reads what it has not written.
void test_guards(void) {
    enum { MAX = 200 };
    Worst written = { 0, "" }, gradients = { 0, "" };
    for (int k = 0; k < COUNT_OF(toy_shapes); k++) {
        Toy plain, toy;
        toy_from_shape(&plain, &toy_shapes[k], RECOMPUTE_NONE);
        toy_gradients(&plain);
        toy_from_shape(&toy, &toy_shapes[k], RECOMPUTE_NONE);
        const Config* c = &toy.m.config;
        real* fields[MAX];
        size_t counts[MAX], n = 0, M = toy.B * toy.T, D = (size_t)c->d_model;
        for (int l = 0; l < toy.m.n_layers; l++) {
            const Kind* kind = toy.m.layer[l].kind;
            for (int i = 0; i < kind->n_acts; i++)
                toy.w.acts[l][i] = guarded(fields, counts, &n,
                                           activation_count(&kind->acts[i], c, toy.B, toy.T));
        }
        for (int kind = 0; kind < N_KINDS; kind++)
            for (int i = 0; strchr(c->pattern, kinds[kind].letter) && i < kinds[kind].n_scratch; i++)
                toy.w.scratch[kind][i] = guarded(fields, counts, &n,
                                                 activation_count(&kinds[kind].scratch[i], c, toy.B, toy.T));
        for (int l = 0; l <= toy.m.n_layers; l++) toy.w.res[l] = guarded(fields, counts, &n, M * D);
        toy.w.f = guarded(fields, counts, &n, M * D);
        toy.w.f_rstd = guarded(fields, counts, &n, M);
        toy.w.losses = guarded(fields, counts, &n, M);
        toy.w.dres = guarded(fields, counts, &n, M * D);
        toy.w.df = guarded(fields, counts, &n, M * D);
        assert(n <= MAX);
        toy_gradients(&toy);
        double wrong = 0;
        for (size_t f = 0; f < n; f++)
            for (size_t i = counts[f]; i < 2 * counts[f] + 64; i++) wrong += !(fields[f][i] == SENTINEL);
        worst_add(&written, wrong, "shape %d", k);
        worst_add(&gradients, bits_differ(plain.m.grads, toy.m.grads, toy.m.n_elements) +
                  states_differ(&plain.ds0, &toy.ds0), "shape %d", k);
        toy_free(&toy);
        toy_free(&plain);
        free_all();
    }
    worst_report("numbers written behind a field", &written, 0);
    worst_report("fields apart = in one workspace: bits differ", &gradients, 0);
}

// The gated MLP against its formula in double precision (fixtures have none). Catches: up and gate
// exchanged, eps
// missing: both invisible to differentiation.
void test_mlp(void) {
    enum { M = 5, D = 7, F = 6 };
    Config c = toy_config("1m", 1, D, 4, 2, 2, 1, 8);
    Toy toy;
    toy_make(&toy, &c, 1, M, -1, false);
    const Layer* layer = &toy.m.layer[1];
    const MlpParams* p = (const MlpParams*)layer->params;
    Run run = { &c, 1, M, NULL, RECOMPUTE_NONE, { 0, 0, 0, 0 }, { NULL, NULL } };
    real res[M * D], out[M * D];
    double want[M * D];
    for (size_t i = 0; i < M * D; i++) res[i] = (real)test_uniform(-0.01, 0.01, 81, i);     // eps counts
    for (size_t m = 0; m < M; m++) {
        double sum = 0, mid[F];
        for (size_t d = 0; d < D; d++) sum += (double)res[m * D + d] * (double)res[m * D + d] / D;
        for (size_t f = 0; f < F; f++) {
            double up = 0, gate = 0;
            for (size_t d = 0; d < D; d++) {
                double u = (double)p->norm[d] * (double)res[m * D + d] / sqrt(sum + 1e-5);
                up += (double)p->fc1[f * D + d] * u;
                gate += (double)p->fc1[(F + f) * D + d] * u;
            }
            mid[f] = up * gate / (1 + exp(-gate));
        }
        for (size_t d = 0; d < D; d++) {
            want[m * D + d] = (double)res[m * D + d];
            for (size_t f = 0; f < F; f++) want[m * D + d] += (double)p->fc2[d * F + f] * mid[f];
        }
    }
    layer->kind->forward(&run, out, res, layer->params, toy.w.acts[1], toy.w.scratch[layer->kind - kinds],
                         toy.none.field[1], toy.none.field[1]);
    report("gated MLP = formula", relative_l2(to_double(out, M * D), want, M * D), limit(3e-6, 1e-14));
    toy_free(&toy);
}

// Two micro-batches give the gradient of the batch of both. Catches: = instead of += in any layer, a scale
// per micro-batch. B*T is above CLASSIFIER_ROWS, so the loss is also made in pieces.
void test_accumulation(void) {
    Config c = toy_config("12m", 4, 9, 12, 5, 4, 2, 21);
    toy_mamba2(&c, "P3 S2 L16");
    c.tie_embeddings = false;
    Worst worst = { 0, "" };
    Toy whole, half;
    toy_make(&whole, &c, 4, 100, 0, false);
    toy_gradients(&whole);
    toy_make(&half, &c, 2, 100, 0, false);
    int *tokens = half.tokens, *targets = half.targets, *doc = half.doc;
    State s0 = half.s0, dsT = half.dsT, ds0 = half.ds0;
    for (size_t part = 0; part < 2; part++) {
        memcpy(tokens, whole.tokens + part * 200, 200 * sizeof(int));
        memcpy(targets, whole.targets + part * 200, 200 * sizeof(int));
        memcpy(doc, whole.doc + part * 200, 200 * sizeof(int));
        for (size_t r = 0; r < 2; r++) {
            state_copy_row(&half.m, &s0, r, &whole.s0, 2 * part + r);
            state_copy_row(&half.m, &dsT, r, &whole.dsT, 2 * part + r);
            state_copy_row(&half.m, &ds0, r, NULL, 0);
        }
        toy_gradients(&half);
    }
    compare_tensors(&worst, &whole.m, half.m.grads, whole.m.grads);
    worst_report("two micro-batches = one batch", &worst, limit(1e-5, 1e-12));
    toy_free(&half);
    toy_free(&whole);
}

// One sequence in two calls, or a prompt and then single tokens, has the bits of one call. Catches: a conv
// tail off by one, states handed over in another order, a sum whose order depends on the length.
void test_pieces(void) {
    enum { T = 40 };
    Worst split = { 0, "" }, steps = { 0, "" }, rows = { 0, "" };
    for (int64_t k = 0; k < 8; k++) {
        const char* const patterns[4] = { "1", "11m", "a", "1am" };
        int64_t K = k % 4 + 1;
        Config c = toy_config(patterns[k / 4 * 2 + K % 2], 2, 9, 14, 5, K, 2, 19);
        c.attn_conv = K;
        Toy toy;
        toy_make(&toy, &c, 1, T, -1, false);
        Model* m = &toy.m;
        const size_t D = 9;
        Workspace w = workspace_alloc(m, 1, T, false, false, false);
        State s = state_alloc(m, 1);
        real *f = (real*)test_alloc(T * D, sizeof(real)), *g = (real*)test_alloc(T * D, sizeof(real));
        model_forward(m, &w, toy.tokens, NULL, 1, T, &toy.none, &toy.sT);
        memcpy(f, w.f, T * D * sizeof(real));
        for (size_t cut = 1; cut < T; cut++) {
            model_forward(m, &w, toy.tokens, NULL, 1, cut, &toy.none, &s);
            memcpy(g, w.f, cut * D * sizeof(real));
            model_forward(m, &w, toy.tokens + cut, NULL, 1, T - cut, &s, &s);
            memcpy(g + cut * D, w.f, (T - cut) * D * sizeof(real));
            worst_add(&split, bits_differ(f, g, T * D) + states_differ(&s, &toy.sT), "%s, K %d, cut at %zu",
                      c.pattern, (int)K, cut);
        }
        for (size_t first = 1; first <= (size_t)K + 1; first++) {
            memset(s.data, 0, s.n_elements * sizeof(real));
            for (size_t t = 0, n = first; t < T; t += n, n = 1) {
                model_forward(m, &w, toy.tokens + t, NULL, 1, n, &s, &s);
                memcpy(g + t * D, w.f, n * D * sizeof(real));
            }
            worst_add(&steps, bits_differ(f, g, T * D) + states_differ(&s, &toy.sT),
                      "%s, K %d, prefill of %zu", c.pattern, (int)K, first);
        }
        workspace_free(&w);
        state_free(&s);
        toy_free(&toy);
    }
    worst_report("two calls = one call: bits differ", &split, 0);
    worst_report("prefill, then single tokens = one call: bits differ", &steps, 0);

    // Prompts of different lengths, decoded as one batch = each alone. Catches: rows that see each other's
    // state.
    Config c = toy_config("1am", 3, 9, 14, 5, 4, 2, 19);
    Model m = toy_model(&c, false, 4);
    Backend backend = backend_cpu(&m, 0, 0, false, false);
    enum { ROWS = 5, STEPS = 12 };
    const size_t length[ROWS] = { 1, 2, 3, 17, 33 };
    size_t Vp = (size_t)c.vocab_padded;
    Session batch = session_create(&backend, ROWS, 40), alone = session_create(&backend, 1, 40);
    real* together = (real*)test_alloc(ROWS * Vp, sizeof(real));
    real* single = (real*)test_alloc(ROWS * Vp, sizeof(real));
    State kept = state_alloc(&m, ROWS);
    int prompt[40], next[ROWS];
    for (int i = 0; i < 40; i++) prompt[i] = (int)(random_bits(6, 1, (uint64_t)i) % 19);
    for (size_t r = 0; r < ROWS; r++) {
        backend.decode(&backend, &batch, r, 1, prompt + r, length[r], together + r * Vp);
        memset(alone.state.data, 0, alone.state.n_elements * sizeof(real));
        backend.decode(&backend, &alone, 0, 1, prompt + r, length[r], single + r * Vp);
        state_copy_row(&m, &kept, r, &alone.state, 0);
    }
    for (int step = 0; step < STEPS; step++) {
        worst_add(&rows, bits_differ(together, single, ROWS * Vp), "step %d", step);
        for (size_t r = 0; r < ROWS; r++) {
            next[r] = (int)(random_bits(6, 2, (uint64_t)step * ROWS + r) % 19);
            state_copy_row(&m, &alone.state, 0, &kept, r);
            backend.decode(&backend, &alone, 0, 1, &next[r], 1, single + r * Vp);
            state_copy_row(&m, &kept, r, &alone.state, 0);
        }
        backend.decode(&backend, &batch, 0, ROWS, next, 1, together);
    }
    worst_add(&rows, states_differ(&kept, &batch.state), "states at the end");
    worst_report("batch of prompts of 5 lengths = each alone: bits differ", &rows, 0);
    state_free(&kept);
    session_free(&backend, &batch);
    session_free(&backend, &alone);
    backend.destroy(&backend);
    model_free(&m);
}

// Documents packed into one row = each in a row of its own, outputs and gradients of the whole model.
// Catches: a boundary missed by one of conv, scan and their backwards; lengths around K and around the
// chunk of the scan.
void test_model_packed(void) {
    // K-1 = 3
    const size_t lengths[] = { 1, 2, 3, SCAN_CHUNK, SCAN_CHUNK - 1, SCAN_CHUNK + 1, 1, 1, 1, 5 };
    Config c = toy_config("1am", 3, 7, 9, 5, 4, 2, 19);
    c.context = 200;
    for (int only_ends = 0; only_ends < 2; only_ends++) {
        Worst forward = { 0, "" }, backward = { 0, "" };
        size_t T = 0, n_docs = only_ends ? 37 : COUNT_OF(lengths);
        for (size_t d = 0; d < n_docs; d++) T += only_ends ? 1 : lengths[d];
        Toy packed, alone;
        toy_packed(&packed, &alone, &c, T, only_ends ? NULL : lengths, n_docs);
        int *tokens = alone.tokens, *targets = alone.targets;
        double loss = 0;
        for (size_t d = 0, at = 0; d < n_docs; d++, at += alone.T) {
            alone.T = only_ends ? 1 : lengths[d];
            alone.tokens = tokens + at;
            alone.targets = targets + at;
            toy_gradients(&alone);
            for (size_t i = 0; i < alone.T; i++)
                loss += (double)(alone.w.losses[i] - packed.w.losses[at + i]);
            worst_add(&forward, bits_differ(alone.w.f, packed.w.f + at * 7, alone.T * 7), "document %zu", d);
        }
        worst_add(&forward, fabs(loss), "loss");
        compare_tensors(&backward, &packed.m, packed.m.grads, alone.m.grads);
        const char* const claims[2][2] = { { "10 documents: outputs, bits differ",
                                             "10 documents: gradients" },
                                     { "only end tokens: outputs, bits differ",
                                       "only end tokens: gradients" } };
        worst_report(claims[only_ends][0], &forward, 0);
        worst_report(claims[only_ends][1], &backward, limit(1e-5, 1e-12));    // measured 3.7e-7, 9e-16
        toy_free(&packed);
        toy_free(&alone);
    }
}

// toy_train: optimizer steps on changing tokens
void toy_train(Toy* toy, int steps) {
    AdamW opt = { 0.9, 0.95, 1e-8, 0.1 };
    for (int step = 1; step <= steps; step++) {
        for (size_t i = 0; i < toy->B * toy->T; i++)
            toy->tokens[i] = (int)(random_bits(8, (uint64_t)step, i) % (uint64_t)toy->m.config.vocab_size);
        zero_real(toy->m.grads, toy->m.n_elements);
        toy_gradients(toy);
        adamw_update(&toy->m, &opt, 1e-2, clip_scale(gradient_norm(&toy->m), 1), step);
    }
}

// Ten steps end in the same bits for any number of threads. Catches: a reduction shared out over threads
// anywhere between the embedding and the optimizer.
void test_threads(void) {
    Config c = toy_config("1m2a", 4, 64, 96, 8, 4, 4, 300);
    toy_mamba2(&c, "P16 S2 L16");
    c.d_intermediate = 40;
    const int threads[] = { 1, 1, 2, 3, 4, 7 };
    Worst worst = { 0, "" };
    real* first = NULL;
    for (int k = 0; k < COUNT_OF(threads); k++) {
        Toy toy;
        toy_make(&toy, &c, 3, 40, 0, false);
        use_threads(threads[k]);
        toy_train(&toy, 10);
        use_threads(1);
        size_t n = toy.m.n_elements;
        const real* part[3] = { toy.m.params, toy.m.m, toy.m.v };
        if (!first) first = (real*)test_alloc(3 * n, sizeof(real));
        for (size_t i = 0; i < 3; i++) {
            if (k == 0) memcpy(first + i * n, part[i], n * sizeof(real));
            double wrong = bits_differ(first + i * n, part[i], n) + !all_finite(part[i], n);
            worst_add(&worst, wrong, "%d threads, run %d", threads[k], k);
        }
        toy_free(&toy);
    }
    worst_report("10 steps: parameters and moments, bits differ", &worst, 0);
}

// fixture_error: relative L2 of `have` against a tensor of the fixture; NaN when it has no such tensor
double fixture_error(const SafeTensors* st, const char* prefix, const char* name, const real* have,
                     size_t n) {
    char full[128];
    Error err;
    snprintf(full, sizeof full, "%s%s", prefix, name);
    const SafeTensor* t = safetensors_find(st, full);
    real* want = (real*)test_alloc(n, sizeof(real));
    if (!t || t->count != n || !safetensors_read_real(st, t, want, &err)) return NAN;
    return real_relative(have, want, n);
}

void fixture_tensors(Worst* worst, const SafeTensors* st, const char* prefix, const Model* m,
                     const real* have) {
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor* t = &m->tensor[i];
        worst_add(worst, fixture_error(st, prefix, t->name, have + t->offset, t->count), "%s", t->name);
    }
}

// test_fixture: the model of one fixture, against what another (or the same) one expects
void test_fixture(const char* name, const char* expected) {
    char dir[128], path[160], text[160];
    Error err;
    Model m;
    SafeTensors st;
    snprintf(dir, sizeof dir, "dev/reference/fixtures/%s", name);
    snprintf(path, sizeof path, "dev/reference/fixtures/%s/expected.safetensors", expected);
    if (!model_load(&m, dir, true, &err)) {
        printf("%s (run from the repository root)\n", err.text);
        report(name, NAN, 0);
        return;
    }
    if (!safetensors_open(&st, path, &err)) die("%s", err.text);
    const SafeTensor *ids = safetensors_find(&st, "input_ids"), *want = safetensors_find(&st, "targets");
    if (!ids || !want || ids->ndim != 2) die("%s: input_ids or targets are missing", path);
    size_t B = (size_t)ids->shape[0], T = (size_t)ids->shape[1], M = B * T;
    size_t D = (size_t)m.config.d_model, Vp = (size_t)m.config.vocab_padded;
    int64_t *wide = (int64_t*)test_alloc(2 * M, sizeof(int64_t)), n_targets = 0;
    int *tokens = (int*)test_alloc(M, sizeof(int)), *targets = (int*)test_alloc(M, sizeof(int));
    must(safetensors_read_int(&st, ids, wide, &err) && safetensors_read_int(&st, want, wide + M, &err), &err);
    for (size_t i = 0; i < M; i++) {
        tokens[i] = (int)wide[i];
        targets[i] = (int)wide[M + i];
        n_targets += targets[i] >= 0;
    }
    Worst forward = { 0, "" }, gradient = { 0, "" }, after = { 0, "" }, size = { 0, "" };
    Workspace w = workspace_alloc(&m, B, T, true, false, false);
    State none = state_none(&m);
    real losses[10], norms[10], *logits = (real*)test_alloc(M * Vp, sizeof(real));
    AdamW opt = { 0.9, 0.95, 1e-8, 0.1 };
    for (int step = 0; step < 10; step++) {
        zero_real(m.grads, m.n_elements);
        model_forward(&m, &w, tokens, NULL, B, T, &none, &none);
        real scale = 1 / (real)n_targets;
        losses[step] = (real)model_loss(&m, &w, targets, M, true, scale) * scale;
        model_backward(&m, &w, tokens, NULL, B, T, &none, &none, &none);
        norms[step] = (real)gradient_norm(&m);
        if (step == 0) {
            matmul_forward(logits, Vp, w.f, D, m.head, NULL, M, D, Vp);
            worst_add(&forward, fixture_error(&st, "", "logits", logits, M * Vp), "logits");
            worst_add(&forward, fixture_error(&st, "", "loss", losses, 1), "loss");
            fixture_tensors(&gradient, &st, "grad.", &m, m.grads);
        }
        adamw_update(&m, &opt, 1e-2, clip_scale((double)norms[step], 1), step + 1);
    }
    worst_add(&after, fixture_error(&st, "", "losses", losses, 10), "losses");
    worst_add(&size, fixture_error(&st, "", "grad_norms", norms, 10), "10 steps");
    fixture_tensors(&after, &st, "adamw.", &m, m.params);
    const Worst* rows[] = { &forward, &gradient, &after, &size };
    const char* claims[] = { "logits and loss", "gradients", "losses, 10 AdamW steps", "gradient norms" };
    // measured 1.1e-6, 3.1e-5, 3.1e-5, 2.5e-4; in double 3e-15, then 2e-10: above 20 torch takes the slope
    // of softplus as 1, we as sigmoid(20.5) = 1 - 1.2e-9. The norm of nearly cancelling gradients is the
    // most sensitive number.
    const double in_float[] = { 1e-4, 1e-4, 1e-4, 1e-3 };
    for (int i = 0; i < 4; i++) {
        snprintf(text, sizeof text, "%s: %s", name, claims[i]);
        worst_report(text, rows[i], limit(in_float[i], 1e-9));
    }
    workspace_free(&w);
    state_free(&none);
    safetensors_close(&st);
    model_free(&m);
}

// Logits, loss, gradients and ten optimizer steps of transformers in float64, and for layers that it does not
// have of an independent program (dev/reference/formulas.py). Catches: anything that differs from the
// published models and that no test of ours against ourselves can see.
void test_fixtures(void) {
    test_fixture("default", "default");
    test_fixture("bias_untied", "bias_untied");
    test_fixture("no_conv_bias", "no_conv_bias");
    test_fixture("mamba2", "mamba2");
    test_fixture("mamba2_ssm", "mamba2");          // the same as mamba_ssm publishes it
    test_fixture("mamba2_limits", "mamba2_limits");
    test_fixture("mamba2_groups", "mamba2_groups");
    test_fixture("hybrid", "hybrid");
    test_fixture("mixed", "mixed");
    test_fixture("attention", "attention");
}

// defines: test_dt_softplus, test_ssd_recurrent, test_ssd, test_gated_rmsnorm, test_mamba2
#include "dev/test/test_mamba2.h"

// ---------------------------------------------------------------------------------------------------
// 8. Checkpoints and training runs

// try_load: a weights file into m; false with the line
bool try_load(Model* m, const char* path, Error* err) {
    SafeTensors st;
    if (!safetensors_open(&st, path, err)) return false;
    bool ok = model_load_tensors(m, &st, err);
    safetensors_close(&st);
    return ok;
}

bool try_optimizer(Model* m, const char* weights, const char* moments, State* carry, Error* err) {
    SafeTensors a, b;
    must(safetensors_open(&a, weights, err) && safetensors_open(&b, moments, err), err);
    bool ok = optimizer_load(m, &a, &b, carry, 2, err);
    safetensors_close(&a);
    safetensors_close(&b);
    return ok;
}

// refused: 0 when the call failed and its line has every word, separated by '|'
double refused(bool ok, const Error* err, const char* words) {
    char copy[256], *rest = NULL;
    snprintf(copy, sizeof copy, "%s", words);
    if (ok) return 1;
    for (char* w = strtok_r(copy, "|", &rest); w; w = strtok_r(NULL, "|", &rest))
        if (!strstr(err->text, w)) {
            printf("expected '%s' in: %s\n", w, err->text);
            return 1;
        }
    return 0;
}

// What is saved comes back to the bit, and nothing else is accepted. Catches: a tensor missing from a file
// or read into another, weights of one save used with the moments of another, damage that goes unnoticed.
void test_checkpoint(void) {
    Config c = toy_config("1m", 2, 7, 14, 5, 4, 2, 19);
    Tokenizer tok = { TOKENIZER_NONE, 19, -1, NULL };
    Error err;
    Toy toy;
    Model back;
    State carry[2], carry_back[2];
    const char* settings[] = { "ssm_c_format", "1", NULL };
    const char* out = scratch("checkpoint");
    char old[200], last[200], weights[240], moments[240];
    toy_make(&toy, &c, 2, 9, -1, false);
    Model* m = &toy.m;
    for (int k = 0; k < 2; k++) {
        carry[k] = state_alloc(m, 3);
        carry_back[k] = state_alloc(m, 3);
        for (size_t i = 0; i < carry[k].n_elements; i++)
            carry[k].data[i] = (real)test_uniform(-1, 1, 90 + (uint64_t)k, i);
    }
    snprintf(old, sizeof old, "%s/step_00000100", out);
    snprintf(last, sizeof last, "%s/last", out);
    snprintf(weights, sizeof weights, "%s/model.safetensors", last);
    snprintf(moments, sizeof moments, "%s/optimizer.safetensors", last);
    must(checkpoint_probe(out, 1, &err), &err);
    for (int step = 100; step <= 200; step += 100) {
        toy_train(&toy, 3);
        must(checkpoint_save(m, &tok, out, step, settings, carry, 2, &err), &err);
    }
    size_t count = m->n_elements;
    bool ok = model_load(&back, last, true, &err);
    if (!ok) die("test: %s", err.text);
    report("weights: bits differ", bits_differ(back.params, m->params, count), 0);
    ok = try_optimizer(&back, weights, moments, carry_back, &err);
    double wrong = !ok + bits_differ(back.m, m->m, count) + bits_differ(back.v, m->v, count);
    for (int k = 0; k < 2; k++) wrong += states_differ(&carry[k], &carry_back[k]);
    report("moments and carried states: bits differ", wrong, 0);
    wrong = strcmp(back.config.pattern, c.pattern) != 0 || back.config.vocab_padded != c.vocab_padded;
    for (int i = 0; i < N_CONFIG_FIELDS; i++) {
        const ConfigField* f = config_fields + i;
        const char *have = (const char*)&back.config + f->offset, *want = (const char*)&c + f->offset;
        wrong += config_has(&c, f) && memcmp(have, want, config_field_size(f)) != 0;
    }
    report("configuration: fields that differ", wrong, 0);

    char other[240];
    snprintf(other, sizeof other, "%s/optimizer.safetensors", old);
    ok = try_optimizer(&back, weights, other, carry_back, &err);
    report("weights of step 200, moments of step 100: not refused", refused(ok, &err, "step 200|step 100"),
           0);
    back.params[3] += 1;
    ok = try_optimizer(&back, weights, moments, carry_back, &err);
    report("other weights of the same step: not refused", refused(ok, &err, "not those that were saved"), 0);

    // files that do not fit: written from the table of tensors, then edited
    const char* edited = scratch("edited.safetensors");
    int n = m->n_tensors;
    SafeTensorOut* t = model_file_tensors(m, true);
    real keep = m->params[m->tensor[4].offset + 1];
    m->params[m->tensor[4].offset + 1] = (real)NAN;
    must(safetensors_write(edited, t, n, NULL, &err), &err);
    ok = try_load(&back, edited, &err);
    report("NaN in a weights file: not named", refused(ok, &err, m->tensor[4].name), 0);
    m->params[m->tensor[4].offset + 1] = keep;
    for (int i = 0; i < n; i++) t[i].dtype = ST_F32;
    SafeTensorOut* bad = (SafeTensorOut*)test_alloc((size_t)n, sizeof *bad);
    memcpy(bad, t, (size_t)n * sizeof *bad);
    char words[256];
    snprintf(words, sizeof words, "%s|%s|surplus.weight|%s|I64", t[2].name, t[1].name, t[6].name);
    bad[2].name = "surplus.weight";                         // one missing, one extra
    bad[1].ndim = 2;
    bad[1].shape[0] = 1;
    bad[1].shape[1] = (int64_t)m->tensor[1].count;          // another shape
    bad[6].dtype = ST_F64;                                  // becomes I64
    must(safetensors_write(edited, bad, n, NULL, &err), &err);
    size_t size;
    char* file = file_bytes(edited, &size);
    char* dtype = (char*)memmem(file, size, "F64", 3);
    if (!dtype) die("test: no F64 in %s", edited);
    memcpy(dtype, "I64", 3);
    file_put(edited, file, size);
    ok = try_load(&back, edited, &err);
    report("missing, extra, shape, dtype: not all listed", refused(ok, &err, words), 0);

    // a head beside a tied embedding
    real* head = (real*)test_alloc(m->tensor[0].count, sizeof(real));
    memcpy(head, m->embedding, m->tensor[0].count * sizeof(real));
    for (int i = 0; i < n; i++) t[i].dtype = REAL_IS_DOUBLE ? ST_F64 : ST_F32;
    t[n] = t[0];
    t[n].name = "lm_head.weight";
    t[n].data = head;
    must(safetensors_write(edited, t, n + 1, NULL, &err), &err);
    ok = try_load(&back, edited, &err);
    report("tied, head present and equal: refused", !ok + bits_differ(back.params, m->params, count), 0);
    head[5] += 1;
    must(safetensors_write(edited, t, n + 1, NULL, &err), &err);
    ok = try_load(&back, edited, &err);
    report("tied, head present and different: not refused", refused(ok, &err, "lm_head.weight differs"), 0);
    free(t);
    for (int k = 0; k < 2; k++) { state_free(&carry[k]); state_free(&carry_back[k]); }
    model_free(&back);
    toy_free(&toy);
}

// TrainRun: a training run in a child process, with hooks in its backend. The stop is exact: the signal is
// raised when step stop_at has begun, so the loop finishes this step, saves and leaves.
enum { PLANT_NONE, PLANT_PARAM, PLANT_GRADIENT, PLANT_HUGE };
typedef struct {
    char options[1024];
    int64_t stop_at;                     // 0: runs to the end
    int plant, tensor;                   // what goes wrong, in which tensor,
    int64_t first, last;                 // in which steps, from 1
    bool print_stream;                   // writes the hash of all batches and the last loss to stderr
    // batch size 1: compares each loss with one call over all since the start
    bool check_carry;
} TrainRun;

TrainRun* train_run;
int64_t train_steps;                     // begun, since this process started
uint64_t train_stream;
double (*train_forward)(Backend*, int, const int*, const int*, const int*, size_t, size_t, double);
void (*train_backward)(Backend*, int, const int*, const int*, size_t, size_t);
void (*train_zero)(Backend*);
void (*train_step_begin)(Backend*, const Step*);

// carried_error: the loss of this window, computed by one forward without states over everything that its
// stream
// has read since the beginning of the epoch, against the loss from carried state. 6 windows of 16 in an
// epoch.
int carry_tokens[2][96], carry_targets[2][96];
double carry_error;

void carried_error(Backend* b, int micro, const int* tokens, const int* targets, size_t T, double loss) {
    size_t past = (size_t)((train_steps - 1) % 6) * T, n = past + T;
    int doc[96], id = 0;
    memcpy(carry_tokens[micro] + past, tokens, T * sizeof(int));
    memcpy(carry_targets[micro] + past, targets, T * sizeof(int));
    for (size_t t = 0; t < n; t++) doc[t] = id += carry_tokens[micro][t] == 256;
    Workspace w = workspace_alloc(b->model, 1, n, false, false, false);
    model_forward(b->model, &w, carry_tokens[micro], doc, 1, n, &b->none, &b->none);
    model_loss(b->model, &w, carry_targets[micro], n, false, 0);
    for (size_t t = past; t < n; t++) loss -= (double)w.losses[t];
    carry_error = fmax(carry_error, isnan(loss) ? INFINITY : fabs(loss));
    workspace_free(&w);
}

bool planted(int kind) {
    return train_run->plant == kind && train_steps >= train_run->first && train_steps <= train_run->last;
}

double hooked_forward(Backend* b, int micro, const int* tokens, const int* targets, const int* doc,
                      size_t B, size_t T, double scale) {
    for (size_t i = 0; i < B * T; i++)
        train_stream = mix64(train_stream ^ ((uint64_t)tokens[i] << 32 | (uint32_t)targets[i]));
    double loss = train_forward(b, micro, tokens, targets, doc, B, T, scale);
    if (train_run->check_carry) carried_error(b, micro, tokens, targets, T, loss);
    return loss;
}

void hooked_backward(Backend* b, int micro, const int* tokens, const int* doc, size_t B, size_t T) {
    train_backward(b, micro, tokens, doc, B, T);
    if (planted(PLANT_GRADIENT)) b->model->grads[b->model->tensor[train_run->tensor].offset] = (real)INFINITY;
}

void hooked_zero(Backend* b) {           // called once at the start of each step
    const Tensor* t = &b->model->tensor[train_run->tensor];
    real* p = b->model->params + t->offset;
    train_steps++;
    if (planted(PLANT_PARAM)) p[t->count - 1] = (real)NAN;
    for (size_t i = 0; i < t->count && planted(PLANT_HUGE); i++) p[i] = (real)(REAL_IS_DOUBLE ? 1e308 : 3e38);
    train_zero(b);
}

void hooked_step_begin(Backend* b, const Step* s) {
    train_step_begin(b, s);
    if (s->number == train_run->stop_at) raise(SIGTERM);
}

int split_words(char* text, char* argv[64]) {
    int argc = 0;
    char* rest = NULL;
    for (char* word = strtok_r(text, " ", &rest); word && argc < 64; word = strtok_r(NULL, " ", &rest))
        argv[argc++] = word;
    return argc;
}

void* train_thread(void* unused) {       // as train_main, without the plot
    char* argv[64];
    int argc = split_words(train_run->options, argv);
    static Settings s;
    static Trainer t;
    Error err;
    if (!settings_parse(&s, WORD_TRAIN, argc, argv, &err)) die("%s", err.text);
    set_threads(s.o.threads);
    trainer_create(&t, &s);
    catch_signals(true);
    train_forward = t.backend.forward;
    train_backward = t.backend.backward;
    train_zero = t.backend.zero_gradients;
    train_step_begin = t.backend.step_begin;
    t.backend.forward = hooked_forward;
    t.backend.backward = hooked_backward;
    t.backend.zero_gradients = hooked_zero;
    t.backend.step_begin = hooked_step_begin;
    int code = train_loop(&t);
    if (train_run->print_stream)
        fprintf(stderr, "%016llx %.17g", (unsigned long long)train_stream, t.progress.train_loss);
    if (train_run->check_carry) fprintf(stderr, "%.17g", carry_error);
    fflush(stderr);
    _exit(code);
    return unused;
}

void train_child(void* run) {
    train_run = (TrainRun*)run;
    if (!freopen("/dev/null", "w", stdout)) die("test: /dev/null: %s", strerror(errno));
    // A new thread has a pool of OpenMP threads of its own; that of the forked one died with the fork.
    pthread_t thread;
    if (pthread_create(&thread, NULL, train_thread, NULL) != 0) die("test: pthread_create failed");
    pthread_join(thread, NULL);
}

__attribute__((format(printf, 4, 5)))
int train(TrainRun* run, char* text, size_t size, const char* options, ...) {
    va_list args;
    va_start(args, options);
    int n = snprintf(run->options, sizeof run->options,
                     "--n-layer 2 --d-model 8 --d-state 4 --seq-len 16 --val-fraction 0 --eval-every 0 "
                     "--max-tokens 0 --log-every 1000 --warmup 2 --data %s %s %s ",
                     scratch("a.txt"), scratch("b.txt"), scratch("c.txt"));
    vsnprintf(run->options + n, sizeof run->options - (size_t)n, options, args);
    va_end(args);
    return in_child(train_child, run, text, size);
}

// Three files of 70 bytes are, with their end tokens, 213 tokens: 12 rows of 16 in an epoch, shuffled or
// sequential.
void write_data(void) {
    char text[70];
    for (int f = 0; f < 3; f++) {
        for (size_t i = 0; i < sizeof text; i++) text[i] = (char)('a' + random_bits(9, (uint64_t)f, i) % 26);
        file_put(scratch(f == 0 ? "a.txt" : f == 1 ? "b.txt" : "c.txt"), text, sizeof text);
    }
}

// A run that is stopped and resumed ends in the files of one that was not: weights, moments, carried
// states, step, sample counter, settings, all bytes. Catches: anything that a run depends on and that is
// not saved.
void test_resume(void) {
    Worst worst = { 0, "" }, stops = { 0, "" };
    char text[2048], straight[64], stopped[64], a[240], b[240];
    write_data();
    for (int k = 0; k < 32; k++) {
        bool accum = k & 1, carry = k & 2, documents = k & 4, at_end = k & 16;
        const char* recompute = k & 8 ? (k & 4 ? "cheap" : "on") : "off";
        int64_t stop = accum ? (at_end ? 2 : 3) : (at_end ? 6 : 4);       // 2 or 6 rows a step, 12 an epoch
        TrainRun run;
        memset(&run, 0, sizeof run);
        char options[200];
        snprintf(options, sizeof options, "--batch-size 2 --grad-accum %d --steps %d --threads 1 "
                 "--%scarry-state --%sreset-documents --recompute %s --dropout %g", accum ? 3 : 1,
                 (int)stop + 3, carry ? "" : "no-", documents ? "" : "no-", recompute, k % 3 ? 0.3 : 0);
        snprintf(straight, sizeof straight, "straight%d", k);
        snprintf(stopped, sizeof stopped, "stopped%d", k);
        int code = train(&run, text, sizeof text, "%s --out %s", options, scratch(straight));
        worst_add(&stops, code, "case %d, straight: %.50s", k, text);
        run.stop_at = stop;
        code = train(&run, text, sizeof text, "%s --out %s", options, scratch(stopped));
        worst_add(&stops, fabs(code - 128.0 - SIGTERM), "case %d, stopped: %.50s", k, text);
        char target[64] = "", expected[64];
        snprintf(a, sizeof a, "%s/last", scratch(stopped));
        snprintf(expected, sizeof expected, "step_%08d", (int)stop);
        bool there = readlink(a, target, sizeof target - 1) > 0 && strcmp(target, expected) == 0;
        worst_add(&stops, !there, "case %d stopped at %s", k, target);
        run.stop_at = 0;
        code = train(&run, text, sizeof text, "--resume --threads 4 --out %s", scratch(stopped));
        worst_add(&stops, code, "case %d, resumed: %.50s", k, text);
        for (int f = 0; f < 2; f++) {
            const char* file = f ? "optimizer.safetensors" : "model.safetensors";
            snprintf(a, sizeof a, "%s/last/%s", scratch(straight), file);
            snprintf(b, sizeof b, "%s/last/%s", scratch(stopped), file);
            worst_add(&worst, files_differ(a, b), "case %d, %s", k, file);
        }
        free_all();
    }
    worst_report("32 cases: straight, stopped and resumed runs end as they should", &stops, 0);
    worst_report("32 cases, 1 -> 4 threads: files differ", &worst, 0);

    // Carried state: a row of 16 tokens has the loss that it has inside one long row, from epoch to epoch.
    // Catches:
    // the state of another micro-batch, a state not cleared at the start of an epoch. No step changes a
    // weight.
    TrainRun carried;
    memset(&carried, 0, sizeof carried);
    carried.check_carry = true;
    int code = train(&carried, text, sizeof text, "--batch-size 1 --grad-accum 2 --carry-state --lr 0 "
                     "--min-lr 0 --steps 14 --out %s", scratch("carried"));
    // measured 0 and 3e-14, the rounding of the sum of 16 losses
    report("carried states = one long row, 14 steps: loss", code == 0 && *text ? atof(text) : NAN, 1e-12);

    // The batch does not depend on how it is divided. Catches: a loss averaged per micro-batch, rows dealt
    // differently, dropout of another token.
    double loss[4] = { 0, 0, 0, 0 };
    unsigned long long stream[4] = { 0, 0, 0, 0 };
    for (int k = 0; k < 4; k++) {
        TrainRun run;
        memset(&run, 0, sizeof run);
        run.print_stream = true;
        snprintf(straight, sizeof straight, "split%d", k);
        train(&run, text, sizeof text, "--batch-size %d --grad-accum %d --steps 4 --dropout %g --out %s",
              8 >> k % 3, 1 << k % 3, k < 3 ? 0.3 : 0, scratch(straight));
        if (sscanf(text, "%llx %lf", &stream[k], &loss[k]) != 2) printf("%s\n", text);
    }
    bool same = stream[0] && stream[0] == stream[1] && stream[0] == stream[2];
    report("batches 8x1, 4x2, 2x4: tokens differ", !same, 0);
    // measured 1.4e-9, 2e-16
    report("batches 8x1, 4x2: loss of step 4", fabs(loss[1] / loss[0] - 1), 1e-6);
    report("batches 8x1, 2x4: loss of step 4", fabs(loss[2] / loss[0] - 1), 1e-6);
    report("--dropout does not change the loss", !(fabs(loss[3] / loss[0] - 1) > 1e-4), 0);
}

// NaN, infinity and overflow stop the run before the update, name step, layer and tensor, and leave the
// last checkpoint. Catches: a non-finite number that reaches the weights; a message that blames the wrong
// tensor.
void test_nonfinite(void) {
    char text[4096], path[240];
    write_data();
    Config c = toy_config("1", 2, 8, 16, 4, 4, 1, 257);
    Model m;
    model_describe(&m, &c);
    const struct { int plant; const char *tensor, *words; } cases_[] = {
        { PLANT_PARAM, "backbone.layers.1.mixer.A_log", "parameter backbone.layers.1.mixer.A_log (layer 1)" },
        { PLANT_PARAM, "backbone.embeddings.weight", "parameter backbone.embeddings.weight" },
        { PLANT_GRADIENT, "backbone.layers.0.mixer.x_proj.weight", "layers.0.mixer.x_proj.weight (layer 0)" },
        { PLANT_GRADIENT, "backbone.norm_f.weight", "the gradient is not finite|gradient of backbone.norm" },
        { PLANT_HUGE, "backbone.layers.1.mixer.in_proj.weight", "activation xz of layer 1" },
        { PLANT_HUGE, "backbone.layers.0.mixer.conv1d.weight", "activation x of layer 0" },
        // the squares overflow
        { PLANT_HUGE, "backbone.layers.0.mixer.out_proj.weight", "activation rstd of layer 1" },
    };
    Worst worst = { 0, "" }, kept = { 0, "" };
    for (int k = 0; k < COUNT_OF(cases_); k++) {
        TrainRun run;
        Error err;
        char out[32], target[64] = "";
        memset(&run, 0, sizeof run);
        for (int i = 0; i < m.n_tensors; i++)
            if (strcmp(m.tensor[i].name, cases_[k].tensor) == 0) run.tensor = i;
        run.plant = cases_[k].plant;
        run.first = 3;
        run.last = 1000;
        snprintf(out, sizeof out, "nan%d", k);
        int code = train(&run, text, sizeof text, "--batch-size 2 --steps 5 --save-every 1 --%srecompute "
                         "--out %s", k % 2 ? "" : "no-", scratch(out));
        snprintf(err.text, sizeof err.text, "%s", text);
        bool named = !refused(false, &err, "step 3") && !refused(false, &err, cases_[k].words);
        worst_add(&worst, code != 1 || !named, "%s: exit code %d", cases_[k].tensor, code);
        snprintf(path, sizeof path, "%s/last", scratch(out));
        bool link = readlink(path, target, sizeof target - 1) > 0 && strcmp(target, "step_00000002") == 0;
        Model saved;
        bool loads = model_load(&saved, path, false, &err);
        worst_add(&kept, !link || !loads, "%s: last is %s", cases_[k].tensor, target);
        if (loads) model_free(&saved);
        free_all();
    }
    worst_report("7 plants: exit code 1; step, layer and tensor named", &worst, 0);
    worst_report("7 plants: the checkpoint of step 2 is kept", &kept, 0);

    // --on-nan skip: three bad steps in a row are skipped with a warning each, the fourth stops the run
    for (int bad = 3; bad <= 4; bad++) {
        TrainRun run;
        memset(&run, 0, sizeof run);
        run.plant = PLANT_GRADIENT;
        run.first = 2;
        run.last = bad + 1;
        int code = train(&run, text, sizeof text, "--batch-size 2 --steps 7 --on-nan skip --out %s",
                         scratch(bad == 3 ? "skip3" : "skip4"));
        int warnings = 0;
        for (const char* p = text; (p = strstr(p, "skipped (")) != NULL; p++) warnings++;
        report(bad == 3 ? "skip: 3 in a row, the run ends well" : "skip: 4 in a row, the run stops",
               code != (bad == 3 ? 0 : 1) || warnings != 3, 0);
    }
    // The last step is the bad one: what was trained before it must still be saved.
    TrainRun run;
    memset(&run, 0, sizeof run);
    run.plant = PLANT_GRADIENT;
    run.first = run.last = 4;
    train(&run, text, sizeof text, "--batch-size 2 --steps 4 --on-nan skip --out %s", scratch("skip_last"));
    snprintf(path, sizeof path, "%s/last", scratch("skip_last"));
    report("skip of the last step: nothing saved", access(path, F_OK) != 0, 0);
    model_free(&m);
}

// find_nonfinite by itself, on part of a workspace whose rest is NaN. Catches: memory searched that this call
// did not write, or only a part of an activation.
void test_find_nonfinite(void) {
    enum { B = 3, T = 40, V = 19 };
    Config c = toy_config("1m", 2, 7, 9, 5, 4, 2, V);
    c.bias = true;
    const double huge = REAL_IS_DOUBLE ? 1e200 : 1e30;
    const struct { const char *first, *second, *words; } plants[] = {      // multiplied by a huge number
        { "", "", "" },
        { "embeddings.weight", "", "activation rstd of layer 0" },
        { "0.norm.weight", "0.mixer.in_proj.weight", "activation xz of layer 0" },
        { "0.mixer.in_proj.bias", "0.mixer.conv1d.weight", "activation x of layer 0" },
        { "0.mixer.conv1d.bias", "0.mixer.x_proj.weight", "activation rbc of layer 0" },
        { "0.mixer.x_proj.weight", "0.mixer.dt_proj.weight", "activation dt of layer 0" },
        { "1.norm.weight", "", "activation hs of layer 2" },
        { "0.mixer.out_proj.bias", "", "activation rstd of layer 1" },
        { "1.norm2.weight", "", "residual stream after layer 3" },
        { "(state)", "0", "activation x of layer 0" },
        { "(state)", "1", "activation hs of layer 0" },
    };
    Worst worst = { 0, "" };
    for (int k = 0; k < COUNT_OF(plants); k++) {
        Toy toy;
        char text[256] = "";
        toy_make(&toy, &c, B, T, -1, false);
        Model* m = &toy.m;
        Workspace w = workspace_alloc(m, B + 1, T + 30, true, k % 3, false);
        for (size_t i = 0; i < w.bytes / sizeof(real); i++) w.data[i] = (real)NAN;
        for (int i = 0; i < B * T; i++) toy.tokens[i] %= V - 1;
        toy.tokens[B * T - 1] = V - 1;                      // the only token of its kind, at the very end
        for (int i = 0; k > 0 && i < m->n_tensors; i++) {
            const Tensor* t = &m->tensor[i];
            bool second = plants[k].second[0] && ends_with(t->name, plants[k].second);
            if (!second && !ends_with(t->name, plants[k].first)) continue;
            size_t from = k == 1 ? (V - 1) * 7 : 0, to = k == 1 ? V * 7 : t->count;
            for (size_t j = from; j < to; j++) {
                real* p = &m->params[t->offset + j];
                *p = (real)(huge * (ends_with(t->name, "bias") ? 1 : (double)*p));
            }
        }
        memset(m->grads, 0, m->n_elements * sizeof(real));
        if (plants[k].first[0] == '(') {                    // in the last number of the conv's or the scan's
            bool ssm = plants[k].second[0] == '1';
            toy.s0.field[0][ssm][B * (ssm ? 9 * 5 : 3 * 9) - 1] = (real)NAN;
        }
        bool found = find_nonfinite(m, &w, toy.tokens, NULL, B, T, &toy.s0, text, sizeof text);
        worst_add(&worst, found != (k > 0) || strncmp(text, plants[k].words, strlen(plants[k].words)) != 0,
                  "%s: %.40s", plants[k].first, text);
        workspace_free(&w);
        toy_free(&toy);
    }
    worst_report("called by itself: wrongly named", &worst, 0);
}

// ---------------------------------------------------------------------------------------------------
// 9. Optimizer, sampling, generation

// Learning rates at the corners, against the values one expects by hand. Catches: off by one in warmup or
// decay.
void test_schedules(void) {
    const struct { int schedule; int64_t step, steps, warmup, decay; double rate; } corner[] = {
        { SCHEDULE_CONSTANT, 0, 100, 10, 0, 0.1 },      { SCHEDULE_CONSTANT, 9, 100, 10, 0, 1 },
        { SCHEDULE_CONSTANT, 99, 100, 10, 0, 1 },       { SCHEDULE_CONSTANT, 0, 100, 0, 0, 1 },
        { SCHEDULE_LINEAR, 4, 110, 10, 0, 0.5 },        { SCHEDULE_LINEAR, 10, 110, 10, 0, 1 },
        { SCHEDULE_LINEAR, 60, 110, 10, 0, 0.55 },      { SCHEDULE_LINEAR, 110, 110, 10, 0, 0.1 },
        { SCHEDULE_COSINE, 10, 110, 10, 0, 1 },         { SCHEDULE_COSINE, 60, 110, 10, 0, 0.55 },
        { SCHEDULE_COSINE, 35, 110, 10, 0, 0.55 + 0.45 * sqrt(0.5) },
        { SCHEDULE_COSINE, 110, 110, 10, 0, 0.1 },
        { SCHEDULE_COSINE, 500, 110, 10, 0, 0.1 },      { SCHEDULE_COSINE, 0, 1, 0, 0, 1 },
        { SCHEDULE_WSD, 0, 100, 10, 20, 0.1 },          { SCHEDULE_WSD, 10, 100, 10, 20, 1 },
        { SCHEDULE_WSD, 80, 100, 10, 20, 1 },           { SCHEDULE_WSD, 90, 100, 10, 20, 0.55 },
        { SCHEDULE_WSD, 99, 100, 10, 20, 0.145 },       { SCHEDULE_WSD, 100, 100, 10, 20, 0.1 },
        { SCHEDULE_WSD, 99, 100, 10, 0, 1 },            { SCHEDULE_LINEAR, 3, 5, 8, 0, 0.5 },
        { SCHEDULE_LINEAR, 8, 8, 8, 0, 0.1 },           { SCHEDULE_WSD, 101, 100, 10, 0, 1 },
        { SCHEDULE_WSD, 100, 100, 10, 1, 0.1 },         { SCHEDULE_WSD, 99, 100, 10, 1, 1 } };
    Worst worst = { 0, "" };
    for (int i = 0; i < COUNT_OF(corner); i++) {
        int64_t step = corner[i].step, steps = corner[i].steps;
        double lr = lr_at(corner[i].schedule, step, steps, corner[i].warmup, corner[i].decay, 3e-3, 3e-4);
        worst_add(&worst, fabs(lr / 3e-3 / corner[i].rate - 1), "row %d, step %d", i, (int)step);
    }
    worst_report("learning rates at 26 corners", &worst, 1e-12);
    const double norm[][3] = { { 0, 1, 1 }, { 0.5, 1, 1 }, { 4, 1, 0.25 }, { 4, 0, 1 }, { 1e20, 2, 2e-20 } };
    double worst_clip = 0;
    for (int i = 0; i < COUNT_OF(norm); i++)
        worst_clip = fmax(worst_clip, fabs(clip_scale(norm[i][0], norm[i][1]) / norm[i][2] - 1));
    report("clip_scale", worst_clip, 1e-6);
}

// Spike: no alarm in 5,000 noisy, slowly falling values; one at the first value far above them; none before
// the window is full
void test_spike(void) {
    Spike spike, early;
    memset(&spike, 0, sizeof spike);
    memset(&early, 0, sizeof early);
    double alarms = 0;
    for (int i = 0; i < 5000; i++)
        alarms += spike_score(&spike, 3.0 - 0.0002 * i + 0.05 * random_normal(3, 1, (uint64_t)i)) > 6;
    report("spike: alarms in 5,000 healthy steps", alarms, 0);
    report("spike: a loss 20 deviations up is missed", !(spike_score(&spike, 3.2) > 6), 0);
    for (int i = 0; i < 100; i++) spike_score(&early, 1 + 0.01 * (i % 2));
    report("spike: alarms before the window is full", spike_score(&early, 100) > 6, 0);
}

// One AdamW step against the formula in double precision, and who is decayed. Catches: bias correction of
// the wrong step, eps inside the root, decay of a vector or of A_log.
void test_adamw(void) {
    Config c = toy_config("1m", 1, 8, 10, 5, 4, 3, 13);
    c.tie_embeddings = false;
    c.bias = true;
    Model m = toy_model(&c, true, 5);
    AdamW opt = { 0.9, 0.95, 1e-8, 0.1 };
    const char* decayed[] = { "in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight",
                              "fc1.weight",
                              "fc2.weight", "embeddings.weight", "lm_head.weight" };
    Worst worst = { 0, "" };
    double wrong_flags = 0, lr = 0.03, scale = 0.7;
    for (int64_t step = 1; step <= 8; step += 7) {
        double* want = (double*)test_alloc(3 * m.n_elements, sizeof(double));
        double *want_m = want + m.n_elements, *want_v = want_m + m.n_elements;
        for (int i = 0; i < m.n_tensors; i++) {
            const Tensor* t = &m.tensor[i];
            bool decays = false;
            for (int d = 0; d < COUNT_OF(decayed); d++) decays = decays || ends_with(t->name, decayed[d]);
            wrong_flags += decays != !!(t->spec->flags & DECAY);
            for (size_t j = t->offset; j < t->offset + t->count; j++) {
                m.grads[j] = (real)test_uniform(-1, 1, 50, j);
                m.m[j] = (real)(step == 1 ? 0 : test_uniform(-1, 1, 51, j));
                m.v[j] = (real)(step == 1 ? 0 : test_uniform(0, 1, 52, j));
                double g = scale * (double)m.grads[j];
                want_m[j] = 0.9 * (double)m.m[j] + 0.1 * g;
                want_v[j] = 0.95 * (double)m.v[j] + 0.05 * g * g;
                double m_hat = want_m[j] / (1 - pow(0.9, (double)step));
                double v_hat = want_v[j] / (1 - pow(0.95, (double)step)), p = (double)m.params[j];
                want[j] = p * (1 - (decays ? lr * 0.1 : 0)) - lr * m_hat / (sqrt(v_hat) + 1e-8);
            }
        }
        adamw_update(&m, &opt, lr, scale, step);
        for (int i = 0; i < m.n_tensors; i++) {
            const Tensor* t = &m.tensor[i];
            const real* have[3] = { m.params, m.m, m.v };
            for (int k = 0; k < 3; k++) {
                const double *d = to_double(have[k] + t->offset, t->count), *w = want +
                    (size_t)k * m.n_elements;
                worst_add(&worst, relative_l2(d, w + t->offset, t->count), "step %d, %s", (int)step, t->name);
            }
        }
    }
    worst_report("AdamW steps 1 and 8 = formula", &worst, limit(1e-6, 1e-14));
    report("tensors decayed that should not be, or the reverse", wrong_flags, 0);
    double sum = 0;
    for (size_t i = 0; i < m.n_elements; i++) sum += (double)m.grads[i] * (double)m.grads[i];
    report("gradient_norm", fabs(gradient_norm(&m) / sqrt(sum) - 1), 1e-12);
    Model large;                                            // in several blocks, the last one not full
    memset(&large, 0, sizeof large);
    large.n_elements = 3 * 65536 + 7;
    large.grads = (real*)test_alloc(large.n_elements, sizeof(real));
    sum = 0;
    for (size_t j = 0; j < large.n_elements; j++) {
        large.grads[j] = (real)test_uniform(-1, 1, 53, j);
        sum += (double)large.grads[j] * (double)large.grads[j];
    }
    report("gradient_norm of 196,615 numbers", fabs(gradient_norm(&large) / sqrt(sum) - 1), 1e-12);
    model_free(&m);
}

// sampler_formula: the probability of every token by the definitions, with a full sort. Returns how many
// are possible.
size_t sampler_formula(const Sampler* s, const real* logits, const unsigned char* seen, size_t V,
                       double* prob) {
    Candidate* c = (Candidate*)test_alloc(V, sizeof(Candidate));
    double *weight = (double*)test_alloc(V, sizeof(double)), total = 0, before = 0, kept = 0;
    size_t n = V;
    for (size_t v = 0; v < V; v++) {
        double z = (double)logits[v];
        if (seen[v]) z = z < 0 ? z * s->repetition_penalty : z / s->repetition_penalty;
        c[v].z = (float)z;
        c[v].token = (int)v;
        prob[v] = 0;
    }
    qsort(c, V, sizeof *c, compare_candidates);
    if (s->temperature == 0 || s->top_k == 1) n = 1;
    if (s->top_k > 0 && (size_t)s->top_k < n) n = (size_t)s->top_k;
    while (s->min_p > 0 && n > 1 && !((double)c[n - 1].z >= (double)c[0].z + log(s->min_p))) n--;
    for (size_t i = 0; i < n; i++) {
        weight[i] = i == 0 ? 1 : exp(((double)c[i].z - (double)c[0].z) / s->temperature);
        total += weight[i];
    }
    for (size_t i = 0; i < n; before += weight[i++]) {
        if (s->top_p > 0 && s->top_p < 1 && before >= s->top_p * total) break;     // reached without this one
        prob[c[i].token] = weight[i];
    }
    n = 0;
    for (size_t v = 0; v < V; v++) kept += prob[v];
    for (size_t v = 0; v < V; v++) { prob[v] /= kept; n += prob[v] > 0; }
    return n;
}

// Draws: impossible tokens drawn, likely ones never drawn, (chi2 - df) / sqrt(2 df)
typedef struct { double outside, missing, chi2; } Draws;

Draws draw_many(const Sampler* s, const real* logits, const unsigned char* seen, size_t V, int n) {
    Draws r = { 0, 0, 0 };
    Error err;
    double *prob = (double*)test_alloc(V, sizeof(double)), *count = (double*)test_alloc(V, sizeof(double));
    double df = -1;
    Candidate* c = (Candidate*)test_alloc(V, sizeof(Candidate));
    sampler_formula(s, logits, seen, V, prob);
    for (int i = 0; i < n; i++) {
        int token = -1;
        bool ok = sample_token(s, logits, seen, V, 3, (uint64_t)i, c, &token, &err);
        if (!ok || token < 0 || (size_t)token >= V) { r.outside++; continue; }
        count[token]++;
    }
    for (size_t v = 0; v < V; v++) {
        double expected = prob[v] * n;
        if (prob[v] == 0) r.outside += count[v];
        else if (expected > 40 && count[v] == 0) r.missing++;       // probability below e^-40
        if (expected >= 5) { r.chi2 += (count[v] - expected) * (count[v] - expected) / expected; df++; }
    }
    r.chi2 = df >= 1 ? (r.chi2 - df) / sqrt(2 * df) : 0;
    return r;
}

// Every rule alone and mixtures of them on random logits, against the definitions. Catches: a set one too
// large or too small, ties resolved by memory order, the rules in another order, a draw that is not
// proportional.
void test_sampling(void) {
    const Sampler samplers[] = {
        { 1, 0, 1, 0, 1, 1 }, { 0, 0, 1, 0, 1, 1 }, { 1e-30, 0, 1, 0, 1, 1 }, { 1e30, 0, 1, 0, 1, 1 },
        { 1, 0, 0, 0, 1, 1 }, { 1, 0, 0.5, 0, 1, 1 }, { 1, 0, 1e-9, 0, 1, 1 }, { 0.7, 0, 0.9, 0, 1, 1 },
        { 1, 1, 1, 0, 1, 1 }, { 1, 3, 1, 0, 1, 1 }, { 1, 11, 1, 0, 1, 1 }, { 1, 12, 1, 0, 1, 1 },
        { 1, 1 << 20, 1, 0, 1, 1 }, { 1, 0, 1, 0.3, 1, 1 }, { 1, 0, 1, 1, 1, 1 }, { 1.5, 0, 1, 0.3, 1, 1 },
        { 1, 0, 1, 0, 1.5, 1 }, { 0, 0, 1, 0, 4, 1 },
        { 1.3, 5, 0.8, 0.1, 1.2, 0 }, { 0.8, 6, 0.6, 0.05, 0.8, UINT64_MAX } };
    enum { V = 12 };
    Worst outside = { 0, "" }, missing = { 0, "" }, chi2 = { 0, "" };
    for (int kind = 0; kind < 4; kind++) {                // random; many ties; all equal; some -inf
        for (int k = 0; k < COUNT_OF(samplers); k++) {
            real logits[V];
            unsigned char seen[V];
            for (size_t v = 0; v < V; v++) {
                double u = test_uniform(-2, 2, 60 + (uint64_t)(kind * 100 + k), v);
                logits[v] = (real)(kind == 1 ? floor(u) : kind == 2 ? 0.25 : u);
                if (kind == 3 && v % 3 == 0) logits[v] = -(real)INFINITY;
                seen[v] = v % 2;
            }
            Draws r = draw_many(&samplers[k], logits, seen, V, 3000);
            worst_add(&outside, r.outside, "sampler %d, logits %d", k, kind);
            worst_add(&missing, r.missing, "sampler %d, logits %d", k, kind);
            worst_add(&chi2, r.chi2, "sampler %d, logits %d", k, kind);
        }
        free_all();
    }
    worst_report("tokens outside the set by definition", &outside, 0);
    worst_report("tokens inside it that never came", &missing, 0);
    worst_report("chi-square of 80 x 3000 draws, in standard deviations", &chi2, 5);
    // Equal logits: token = floor(V u) with the number of that row and position. Catches: row and position
    // exchanged, a number used twice.
    Sampler equal = { 1, 0, 1, 0, 1, 11 };
    double other = 0;
    for (uint64_t row = 0; row < 5; row++) {
        for (uint64_t position = 0; position < 50; position++) {
            enum { WORDS = 64 };
            real z[WORDS] = { 0 };
            unsigned char none_seen[WORDS] = { 0 };
            Candidate c[WORDS];
            Error err;
            int token = -1;
            must(sample_token(&equal, z, none_seen, WORDS, row, position, c, &token, &err), &err);
            other += token != (int)floor(WORDS * random_uniform(11, STREAM_SAMPLE + row, position));
        }
    }
    report("equal logits: tokens that are not floor(V u)", other, 0);
    enum { MANY = 500 };
    real* logits = (real*)test_alloc(MANY, sizeof(real));
    unsigned char* seen = (unsigned char*)test_alloc(MANY, 1);
    for (size_t v = 0; v < MANY; v++) logits[v] = (real)test_uniform(-3, 3, 61, v);
    Sampler plain = { 1, 0, 1, 0, 1, 7 };
    Draws r = draw_many(&plain, logits, seen, MANY, 20000);
    report("chi-square of 20,000 draws from 500 tokens, standard deviations", fabs(r.chi2), 4);
    // the same with top-p, where 3 % of the total are 11 tokens. Catches: a total a little too small or large
    Sampler nucleus = { 1, 0, 0.8, 0, 1, 7 };
    r = draw_many(&nucleus, logits, seen, MANY, 20000);
    report("top-p of 500 tokens: outside the set by definition, or never drawn", r.outside + r.missing, 0);
    // top-k of many candidates with ties, against a sort: exactly the lowest tokens among equals stay
    double wrong = 0;
    for (size_t k = 1; k <= MANY; k += 7) {
        Candidate a[MANY], b[MANY];
        for (size_t v = 0; v < MANY; v++) {
            a[v].z = b[v].z = (float)floor(test_uniform(-9, 9, 62, v));
            a[v].token = b[v].token = (int)v;
        }
        wrong += keep_top_k(a, MANY, k) != k;
        qsort(b, MANY, sizeof *b, compare_candidates);
        qsort(a, k, sizeof *a, compare_candidates);
        for (size_t i = 0; i < k; i++) wrong += a[i].token != b[i].token;
    }
    report("top-k with ties: tokens differ", wrong, 0);
    // A large vocabulary, made in parts by any number of threads. Catches: a part that ends elsewhere, parts
    // in another order, ties broken by the part.
    enum { LARGE = 20011 };
    logits = (real*)test_alloc(LARGE, sizeof(real));
    seen = (unsigned char*)test_alloc(LARGE, 1);
    Candidate* many = (Candidate*)test_alloc(LARGE, sizeof(Candidate));
    wrong = 0;
    for (int k = 0; k < 2 * COUNT_OF(samplers); k++) {
        const Sampler* s = &samplers[k / 2];
        const int threads[] = { 1, 3, 8 };
        Error err;
        for (uint64_t position = 0; position < 8; position++) {
            int token[3], few = 0;
            for (int i = 0; i < 3; i++) {
                use_threads(threads[i]);
                for (size_t v = 0; v < LARGE; v++) {             // all; or 12, the others impossible
                    double u = floor(test_uniform(-90, 90, 63, k % 2 ? v / 1700 : v)) / 9;
                    logits[v] = k % 2 && v % 1700 ? -(real)INFINITY : (real)u;
                    seen[v] = v % 3 == 0;
                }
                must(sample_token(s, logits, seen, LARGE, 3, position, many, &token[i], &err), &err);
            }
            wrong += token[0] != token[1] || token[0] != token[2];
            for (size_t v = 0; v < V; v++) logits[v] = logits[1700 * v], seen[v] = seen[1700 * v];
            must(sample_token(s, logits, seen, V, 3, position, many, &few, &err), &err);
            wrong += k % 2 && token[0] != 1700 * few;
        }
    }
    use_threads(1);
    report("20,011 tokens: draws that depend on the threads, or on impossible ones", wrong, 0);
    const double bad[] = { NAN, INFINITY, -INFINITY };
    double accepted = 0;
    for (int i = 0; i < 3; i++) {
        for (int k = 0; k < COUNT_OF(samplers); k++) {
            real z[V];
            Error err;
            Candidate c[V];
            int token;
            for (size_t v = 0; v < V; v++) z[v] = i == 2 || v == 7 ? (real)bad[i] : 0;
            accepted += sample_token(&samplers[k], z, seen, V, 0, 0, c, &token, &err);
        }
    }
    report("NaN, +inf, all -inf: accepted", accepted, 0);
}

// written: what `generate` writes for a prompt; NULL when it fails, the line is then in `written_error`. With
// `written_stop` as if Ctrl-C had been pressed before.
Error written_error;
volatile sig_atomic_t written_stop = 0;

char* written(Model* m, const char* prompt, const char* options) {
    static Settings s;
    Tokenizer tok;
    GenerateStats stats;
    char copy[512], *argv[64], *text = NULL;
    size_t size = 0;
    snprintf(copy, sizeof copy, "%s", options);
    int argc = split_words(copy, argv);
    must(settings_parse(&s, WORD_GENERATE, argc, argv, &written_error), &written_error);
    tokenizer_bytes(&tok);
    if (m->config.vocab_size != 257) tok.kind = TOKENIZER_NONE;
    Backend backend = backend_create(&s.o, m, 0, 0, false, false);
    backend.upload(&backend);
    Prompt source = prompt_open(&tok, prompt, NULL);
    FILE* f = open_memstream(&text, &size);
    bool ok = generate(&backend, &tok, &s.o, &source, 1, f, &stats, &written_stop, &written_error);
    prompt_close(&source);
    fclose(f);
    char* copy_of_text = (char*)test_alloc(size + 1, 1);
    memcpy(copy_of_text, text, size);
    free(text);
    backend.destroy(&backend);
    settings_free(&s);
    return ok ? copy_of_text : NULL;
}

double texts_differ(const char* a, const char* b) { return !a || !b || !*a || strcmp(a, b) != 0; }

size_t resident_bytes(void) {
    size_t size = 0, resident = 0;
    FILE* f = fopen("/proc/self/statm", "r");
    if (!f || fscanf(f, "%zu %zu", &size, &resident) != 2) resident = 0;
    if (f) fclose(f);
    return resident * (size_t)sysconf(_SC_PAGESIZE);
}

// Text does not depend on how it is made. Catches: a chunk boundary seen by the model, a saved state
// without the tokens seen or without its position, memory that grows with the text, ids that have no text.
void check_written(const char* pattern) {
    Config c = toy_config(pattern, 2, 12, 18, 5, 4, 2, 257);
    Model m = toy_model(&c, false, 6);
    char prompt[301], first[151], options[400];
    for (size_t i = 0; i < 300; i++) prompt[i] = (char)('!' + random_bits(10, 0, i) % 90);
    prompt[300] = 0;
    snprintf(first, sizeof first, "%.150s", prompt);
    const char* common = "--max-tokens 40 --temperature 1.5 --repetition-penalty 1.3 --seed 5";
    Worst chunks = { 0, "" };
    char* base[2] = { NULL, NULL };          // one sample, three samples
    const int chunk[] = { 1, 7, 256, 1000 };
    for (int k = 0; k < 4; k++) {
        for (int samples = 0; samples < 2; samples++) {
            snprintf(options, sizeof options, "%s --chunk %d --num-samples %d", common, chunk[k],
                     samples ? 3 : 1);
            char* text = written(&m, prompt, options);
            if (k == 0) base[samples] = text;
            worst_add(&chunks, texts_differ(base[samples], text), "%s, chunk %d, %d samples", pattern,
                      chunk[k], samples ? 3 : 1);
        }
    }
    worst_report("chunks of 1, 7, 256, 1000: texts differ", &chunks, 0);
    const char* sample1 = base[1] && base[0] ? strchr(base[1], '\n') : NULL;
    bool equal = sample1 && strncmp(sample1 + 1, base[0], strlen(base[0])) == 0;
    report("sample 1 of 3 differs from the only sample", !equal, 0);

    // the prompt in two runs, with the state saved between them
    snprintf(options, sizeof options, "--max-tokens 0 --save-state %s", scratch("half.state"));
    written(&m, first, options);
    snprintf(options, sizeof options, "%s --load-state %s", common, scratch("half.state"));
    char* text = written(&m, prompt + 150, options);
    report("save-state inside the prompt: texts differ", texts_differ(base[0], text), 0);
    snprintf(options, sizeof options, "--max-tokens 0 --save-state %s", scratch("whole.state"));
    written(&m, prompt, options);
    snprintf(options, sizeof options, "%s --load-state %s", common, scratch("whole.state"));
    report("save-state at its end: texts differ", texts_differ(base[0], written(&m, "", options)), 0);
    written_stop = 1;
    snprintf(options, sizeof options, "--chunk 7 --save-state %s", scratch("whole.state"));
    written(&m, first, options);
    written_stop = 0;
    snprintf(options, sizeof options, "%s --load-state %s", common, scratch("whole.state"));
    text = written(&m, "", options);
    report("stopped inside a prompt: the old state is lost", texts_differ(base[0], text), 0);
    m.params[20] += 1;
    text = written(&m, "", options);
    report("state of other weights: not refused", refused(text != NULL, &written_error, "other weights"), 0);
    m.params[20] -= 1;
    char* empty = written(&m, "", "--max-tokens 5 --raw");
    report("empty prompt: no text", !empty || !*empty, 0);
    model_free(&m);
}

// A prompt is given out in pieces as long as they are asked for, from memory and from a file. Catches: pieces
// that end where the text was read in pieces.
void check_prompt(void) {
    enum { N = 9001 };
    static char text[N + 1];
    static int tokens[N + 1];
    Tokenizer tok;
    double wrong = 0;
    tokenizer_bytes(&tok);
    for (int i = 0; i < N; i++) text[i] = (char)('!' + random_bits(12, 0, (uint64_t)i) % 90);
    FILE* file = tmpfile();
    if (!file || fwrite(text, 1, N, file) != N) die("tmpfile: %s", strerror(errno));
    const size_t most[] = { 1, 4095, 4096, 5000, N, N + 1 };
    for (int k = 0; k < 12; k++) {
        size_t at = 0, n = 1;
        rewind(file);
        Prompt p = prompt_open(&tok, k % 2 ? "" : text, k % 2 ? file : NULL);
        for (; n > 0; at += n) {
            must(prompt_read(&p, tokens, most[k / 2], &n, &written_error), &written_error);
            wrong += n != min_size(most[k / 2], N - at);
            for (size_t i = 0; i < n; i++) wrong += tokens[i] != (unsigned char)text[at + i];
        }
        wrong += at != N;
        prompt_close(&p);
    }
    fclose(file);
    report("a prompt of 9,001 bytes in pieces: wrong tokens or lengths", wrong, 0);
}

void test_generate(void) {
    check_prompt();
    check_written("1m");
    check_written("1am");

    // padded ids: here their logits are larger than all others
    Config c = toy_config("1", 1, 6, 8, 3, 2, 1, 11);
    Model m = toy_model(&c, false, 6);
    for (size_t v = 11; v < 16; v++)
        for (size_t d = 0; d < 6; d++) m.embedding[v * 6 + d] = (real)test_uniform(-1e3, 1e3, 66, v * 6 + d);
    char* ids = written(&m, "", "--max-tokens 300 --temperature 1");
    double padded = !ids, n_ids = 0;
    for (char* p = ids; p && isdigit((unsigned char)*p); p = strchr(p, ' ') + 1,
         n_ids++) padded += atoi(p) >= 11;
    report("padded ids drawn", padded + (n_ids != 300), 0);

    // constant memory
    Backend backend = backend_cpu(&m, 0, 0, false, false);
    Session s = session_create(&backend, 1, 16);
    real logits[16];
    int token = 1;
    size_t before = 0;
    for (int i = 0; i < 20000; i++) {
        if (i == 1000) before = resident_bytes();
        backend.decode(&backend, &s, 0, 1, &token, 1, logits);
        token = i % 11;
    }
    if (!SANITIZED)
        report("20,000 tokens: growth of memory, in bytes", (double)resident_bytes() - (double)before,
               1 << 20);
    session_free(&backend, &s);
    backend.destroy(&backend);
    model_free(&m);
}

// Each file adds one case to the table below: attention, then what goes in and out.
// defines: test_attention
#include "dev/test/test_attention.h"
// defines: test_files
#include "dev/test/test_files.h"
// defines: test_data
#include "dev/test/test_data.h"
// defines: test_cli
#include "dev/test/test_cli.h"
// defines: test_models
#include "dev/test/test_models.h"
// defines: test_tokenizer
#include "dev/test/test_tokenizer.h"
#ifdef __CUDACC__
// defines: test_cuda_resume, test_cuda_layers, test_cuda_scan, test_cuda_matmul, test_cuda_model, ...
#include "dev/test/test_cuda.h"
#endif
// defines: test_eval, with a GPU test_cuda_eval
#include "dev/test/test_eval.h"
// defines: test_half
#include "dev/test/test_half.h"

// ---------------------------------------------------------------------------------------------------
// 10. List of cases, main

// The harness: a wrong result is seen. Catches: a comparison that lets NaN pass, a child whose death goes
// unnoticed.
void die_in_child(void* arg) { die("expected %s", (const char*)arg); }
void abort_in_child(void* arg) { (void)arg; signal(SIGSEGV, SIG_DFL); raise(SIGSEGV); }
void nothing_in_child(void* arg) { (void)arg; }
bool case_selected(int i, const char* wanted);
int cases_selected(const char* wanted);
void test_harness(void) {
    char text[64];
    char words[] = "seven";
    report("die: exit code 1", fabs(in_child(die_in_child, words, text, sizeof text) - 1.0), 0);
    report("die: its line", strcmp(text, "error: expected seven\n") != 0, 0);
    report("signal: 128 + number", fabs(in_child(abort_in_child, NULL, text, sizeof text) - 128.0 - SIGSEGV),
           0);
    report("return: 0", in_child(nothing_in_child, NULL, text, sizeof text), 0);
    Worst w = { 0, "" };
    worst_add(&w, 1, "one");
    worst_add(&w, NAN, "not a number");
    worst_add(&w, 2, "two");
    report("NaN is worse than any number", !isnan(w.err), 0);
    const double with_nan[2] = { 1, NAN }, ones[2] = { 1, 1 };
    report("NaN is not equal to anything",
           relative_l2(with_nan, ones, 2) <= 1e30 || differing(with_nan, with_nan, 2) != 1, 0);
    report("argument: an exact name before a part of one",
           cases_selected("packed") != 1 || cases_selected("packe") != 2 || cases_selected("nothing") != 0,
           0);
}

// Sizes and random numbers. Catches: a product that wraps around, a stream that depends on history.
void test_basics(void) {
    const int64_t fits[] = { 3, 5, 7 }, zero[] = { 4, 0, 9 }, wraps[] = { 4194305, 4194305, 211106198978564 };
    const int64_t negative[] = { 3, -1 }, large[] = { INT64_MAX, 2 };
    size_t size = 0;
    double wrong = !checked_size(3, fits, 4, &size) || size != 420;
    wrong += !checked_size(3, zero, 4, &size) || size != 0;
    wrong += !checked_size(0, NULL, 4, &size) || size != 4;
    wrong += checked_size(3, wraps, 4, &size) + checked_size(2, negative, 4, &size) +
             checked_size(2, large, 1, &size);
    report("checked_size: wrong answers", wrong, 0);
    double sum = 0, square = 0, outside = 0;
    const int n = 1 << 16;
    for (int i = 0; i < n; i++) {
        double u = random_uniform(1, 2, (uint64_t)i), z = random_normal(1, 3, (uint64_t)i);
        outside += !(u >= 0 && u < 1);
        sum += u - 0.5 + z;
        square += z * z - 1;
    }
    report("random_uniform outside [0,1)", outside, 0);
    report("mean and variance, in standard errors",
           fmax(fabs(sum) / sqrt(n * (1 + 1.0 / 12)), fabs(square) / sqrt(2.0 * n)), 4);
}

typedef struct { const char* name; void (*function)(void); } Case;
const Case cases[] = {
    { "harness", test_harness },
    { "basics", test_basics },
    { "exp", test_exp },
    { "embedding", test_embedding },
    { "matmul", test_matmul },
    { "rmsnorm", test_rmsnorm },
    { "conv", test_conv },
    { "softplus", test_softplus },
    { "scan", test_scan },
    { "gate", test_gate },
    { "dt_softplus", test_dt_softplus },
    { "ssd recurrent", test_ssd_recurrent },
    { "ssd", test_ssd },
    { "gated rmsnorm", test_gated_rmsnorm },
    { "attention", test_attention },
    { "crossentropy", test_crossentropy },
    { "split", test_split },
    { "packed", test_packed },
    { "extremes", test_extremes },
    { "counts", test_counts },
    { "rows", test_rows },
    { "initialization", test_init },
    { "model gradient", test_model_gradient },
    { "dropout", test_dropout },
    { "guards", test_guards },
    { "mlp", test_mlp },
    { "mamba2", test_mamba2 },
    { "accumulation", test_accumulation },
    { "pieces", test_pieces },
    { "model packed", test_model_packed },
    { "threads", test_threads },
    { "fixtures", test_fixtures },
    { "schedules", test_schedules },
    { "adamw", test_adamw },
    { "spike", test_spike },
    { "sampling", test_sampling },
    { "generate", test_generate },
    { "checkpoint", test_checkpoint },
    { "find nonfinite", test_find_nonfinite },
    { "nonfinite", test_nonfinite },
    { "resume", test_resume },
    { "files", test_files },
    { "data", test_data },
    { "cli", test_cli },
    { "models", test_models },
    { "tokenizer", test_tokenizer },
    { "eval", test_eval },
    { "half", test_half },
#ifdef __CUDACC__                // the first two use the GPU in children, before this process does
    { "cuda resume", test_cuda_resume },
    { "cuda faults", test_cuda_faults },
    { "cuda layers", test_cuda_layers },
    { "cuda scan", test_cuda_scan },
    { "cuda ssd forward", test_cuda_ssd_forward },
    { "cuda ssd backward", test_cuda_ssd_backward },
    { "cuda matmul", test_cuda_matmul },
    { "cuda attention", test_cuda_attention },
    { "cuda model", test_cuda_model },
    { "cuda generate", test_cuda_generate },
    { "cuda eval", test_cuda_eval },
    { "cuda large", test_cuda_large },
    { "cuda kernels", test_cuda_kernels },
#endif
};

// case_selected: is case i the one called `wanted`; if none is, has its name this part?
bool case_selected(int i, const char* wanted) {
    for (int k = 0; k < COUNT_OF(cases); k++) if (strcmp(cases[k].name, wanted) == 0) return i == k;
    return strstr(cases[i].name, wanted) != NULL;
}

int cases_selected(const char* wanted) {
    int n = 0;
    for (int i = 0; i < COUNT_OF(cases); i++) n += case_selected(i, wanted);
    return n;
}

int main(int argc, char** argv) {
    const char* wanted = argc > 1 ? argv[1] : "";
    if (argc > 2) die("test_mamba takes one argument, a case's name or a part of it, or --list");
    if (strcmp(wanted, "--list") == 0) {
        for (int i = 0; i < COUNT_OF(cases); i++) printf("%s\n", cases[i].name);
        return 0;
    }
    limit_spinning(argv);
    use_threads(1);
    int n_run = 0;
    double start = seconds_now();
    printf("%-4s %-14s %-72s %9s %9s\n", "", "case", "claim [where it was worst]", "measured", "limit");
    for (int i = 0; i < COUNT_OF(cases); i++) {
        if (!case_selected(i, wanted)) continue;
        case_name = cases[i].name;
        random_stream = 1 << 20;
        double case_start = seconds_now();
        cases[i].function();
        remove_scratch();
        free_all();
        n_run++;
        if (seconds_now() - case_start >= 3)
            printf("%-4s %-14s took %.0f s\n", "", case_name, seconds_now() - case_start);
    }
    if (!n_run) die("no case has '%s' in its name; test_mamba --list shows them", wanted);
    for (int i = 0; i < rows_failed; i++) printf("failed: %s\n", failed_names[i]);
    for (int i = 0; i < rows_failed; i++) free(failed_names[i]);
    free(failed_names);
    printf("%s build, %.1f s\n", REAL_IS_DOUBLE ? "double" : "float", seconds_now() - start);
    printf("%d passed, %d failed\n", rows_passed, rows_failed);
    return rows_failed ? 1 : 0;
}
