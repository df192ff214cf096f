// test_mamba.c: what train_mamba.c claims, checked. One list of cases (at the end), compiled twice: `real` =
// float, and `real` = double, where gradients are proven by finite differences.
//   test_mamba [substring]   run the cases whose name contains the substring        test_mamba --list
// Every row says: what is claimed (and where it was worst), the measured error, the limit. NaN fails.
//
// Contents
//   1. Harness: report, child processes, memory
//   2. A layer as a problem: named inputs and outputs, forward, backward, its formula in double precision
//   3. What every layer must do
//   4. The layers: shapes, calls, formulas
//   5. Pieces and documents: a split sequence, packed documents
//   6. Extreme and degenerate inputs
//   7. List of cases, main

#define SSM_NO_MAIN
// defines: everything under test
#include "train_mamba.c"
#include <sys/wait.h>

// ---------------------------------------------------------------------------------------------------
// 1. Harness: report, child processes, memory

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
        f(arg);
        fflush(stdout);
        fflush(stderr);
        _exit(0);
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
    size_t B, T, D, E, N, K, V;  // from it; unused ones are 0
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
// token, ids with gaps, and, for even rows, boundaries around the chunk edge of the scan. No id is used
// for two documents of a sequence.
const char* doc_patterns[] = { "0001", "1", "0123456", "1112", "00", "01223444", "0033", "01" };

int* make_docs(size_t pattern, size_t B, size_t T) {
    int* doc = (int*)test_alloc(B * T, sizeof(int));
    for (size_t b = 0; b < B; b++) {
        const char* digits = doc_patterns[(pattern + b) % 8];
        size_t n = strlen(digits);
        for (size_t t = 0; t < T; t++) {
            doc[b * T + t] = digits[t < n ? t : n - 1] - '0';
            if (b % 2 == 0 && t + 1 >= SCAN_CHUNK)
                doc[b * T + t] += (int)(t - SCAN_CHUNK + 2 < 3 ? t - SCAN_CHUNK + 2 : 3);
        }
    }
    return doc;
}

// problem_make: shape is a text such as "B3 T7 E5 N2 state final documents1"
void problem_make(Problem* p, const LayerTest* layer, const char* shape) {
    memset(p, 0, sizeof *p);
    p->layer = layer;
    p->shape = shape;
    p->scale = (real)0.375;
    p->flags = (strstr(shape, "bias") ? HAS_BIAS : 0) | (strstr(shape, "state") ? HAS_STATE : 0) |
               (strstr(shape, "final") ? HAS_FINAL : 0) | (strstr(shape, "big") ? IS_BIG : 0);
    size_t* const sizes[] = { &p->B, &p->T, &p->D, &p->E, &p->N, &p->K, &p->V };
    for (int i = 0; i < 7; i++) {
        const char* at = strchr(shape, "BTDENKV"[i]);
        if (at) *sizes[i] = (size_t)atoi(at + 1);
    }
    const char* docs = strstr(shape, "documents");
    if (docs) p->doc = make_docs((size_t)atoi(docs + 9), p->B, p->T);
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

#define COUNT_OF(array) ((int)(sizeof(array) / sizeof(array[0])))

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
    "embedding", embedding_make, embedding_fwd, embedding_bwd, embedding_formula, -1, false
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
    "matmul", matmul_make, matmul_fwd, matmul_bwd, matmul_formula, -1, false
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
    "rmsnorm", rmsnorm_make, rmsnorm_fwd, rmsnorm_bwd, rmsnorm_formula, -1, false
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

// Causal conv: out_t = silu(bias + sum_k weight[k] inp_{t-K+1+k}). Inputs before t = 0 come from the tail;
// none come from another document.
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
                          p->in[1].value, p->in[2].value, p->doc, p->B, p->T, p->E, p->K);
}
void conv_bwd(Problem* p) {
    causal_conv1d_backward(p->in[0].grad, p->in[0].ld, p->in[1].grad, p->in[2].grad, p->in[3].grad,
                           p->out[0].grad, p->out[1].grad, p->in[0].value, p->in[0].ld, p->in[3].value,
                           p->in[1].value, p->in[2].value, p->doc, p->B, p->T, p->E, p->K);
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
                out[0][(b * p->T + t) * p->E + e] = c / (1 + exp(-c));
            }
            // oldest first: K-2-j tokens before the last one
            for (size_t j = 0; out[1] && j + 1 < p->K; j++)
                out[1][(b * (p->K - 1) + j) * p->E + e] = conv_past(p, in, b, p->T - 1, p->K - 2 - j, e);
        }
    }
}
const LayerTest conv_layer = {
    "causal_conv1d", conv_make, conv_fwd, conv_bwd, conv_formula, 3, false
};
void test_conv(void) {
    const char* const shapes[] = {
        "B3 T7 E5 K4 bias", "B3 T37 E13 K4 bias state final", "B3 T7 E33 K3 final", "B3 T7 E37 K2 state",
        "B3 T2 E5 K4 bias state final", "B1 T1 E1 K1 bias state final", "B1 T1 E5 K4 state final",
        "B3 T7 E5 K1", "B3 T7 E5 K4 state final documents0", "B3 T37 E5 K4 bias state final documents3",
        "B3 T7 E13 K3 bias final documents6", "B8 T2 E3 K4 state final documents0",
        "B8 T9 E5 K2 state final documents0", "B8 T7 E5 K1 bias state final documents0",
        "B8 T67 E70 K4 bias state final big documents0" };
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
    "softplus", softplus_make, softplus_fwd, softplus_bwd, softplus_formula, -1, false
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
    "selective_scan", scan_make, scan_fwd, scan_bwd, scan_formula, SCAN_H0, false
};
void test_scan(void) {
    const char* const shapes[] = {
        "B3 T7 E5 N5", "B3 T7 E13 N5 state final", "B3 T37 E5 N1 final", "B3 T7 E37 N1 state",
        "B1 T1 E1 N1 state final", "B1 T1 E33 N5", "B3 T37 E5 N3 state final documents0",
        "B3 T7 E13 N5 state final documents3", "B8 T7 E5 N2 state documents0",
        "B2 T37 E33 N2 final documents6", "B3 T37 E13 N5 state final documents2",
        "B8 T67 E70 N5 state final big documents0", "B1 T32 E3 N16 state final big", "B2 T33 E65 N17 big" };
    check_layer(&scan_layer, shapes, COUNT_OF(shapes));

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
    "gate", gate_make, gate_fwd, gate_bwd, gate_formula, -1, false
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
    "crossentropy", crossentropy_make, crossentropy_fwd, crossentropy_bwd, crossentropy_formula, -1, true
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
    worst_add(forward, differing(parts, whole, at), "cut %d, %s", (int)cut, p->shape);
    for (int i = 0; i < p->n_in; at += count(&p->in[i++]))
        worst_add(backward, relative_l2(parts + at, whole + at, count(&p->in[i])), "d%s, cut %d, %s",
                  p->in[i].name, (int)cut, p->shape);
}

void report_parts(const LayerTest* layer, const Worst* forward, const Worst* backward) {
    char claim[80];
    snprintf(claim, sizeof claim, "%s: differing bits", layer->name);
    worst_report(claim, forward, 0);
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
// 7. List of cases, main

// The harness: a wrong result is seen. Catches: a comparison that lets NaN pass, a child whose death goes
// unnoticed.
void die_in_child(void* arg) { die("expected %s", (const char*)arg); }
void abort_in_child(void* arg) { (void)arg; signal(SIGSEGV, SIG_DFL); raise(SIGSEGV); }
void nothing_in_child(void* arg) { (void)arg; }
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
    { "crossentropy", test_crossentropy },
    { "split", test_split },
    { "packed", test_packed },
    { "extremes", test_extremes },
};

int main(int argc, char** argv) {
    const char* wanted = argc > 1 ? argv[1] : "";
    if (argc > 2) die("test_mamba takes one argument, a part of a case's name, or --list");
    if (strcmp(wanted, "--list") == 0) {
        for (int i = 0; i < COUNT_OF(cases); i++) printf("%s\n", cases[i].name);
        return 0;
    }
#ifdef _OPENMP
    // Threads that spin while they wait take most of the time on a busy machine, and only the environment of a
    // new process can tell them to sleep. Where it cannot be started, the tests just take longer.
    if (!getenv("OMP_WAIT_POLICY")) {
        setenv("OMP_WAIT_POLICY", "passive", 1);
        execv("/proc/self/exe", argv);
    }
#endif
    use_threads(1);
    int n_run = 0;
    double start = seconds_now();
    printf("%-4s %-14s %-72s %9s %9s\n", "", "case", "claim [where it was worst]", "measured", "limit");
    for (int i = 0; i < COUNT_OF(cases); i++) {
        if (!strstr(cases[i].name, wanted)) continue;
        case_name = cases[i].name;
        random_stream = 1 << 20;
        cases[i].function();
        free_all();
        n_run++;
    }
    if (!n_run) die("no case has '%s' in its name; test_mamba --list shows them", wanted);
    for (int i = 0; i < rows_failed; i++) printf("failed: %s\n", failed_names[i]);
    for (int i = 0; i < rows_failed; i++) free(failed_names[i]);
    free(failed_names);
    printf("%s build, %.1f s\n", REAL_IS_DOUBLE ? "double" : "float", seconds_now() - start);
    printf("%d passed, %d failed\n", rows_passed, rows_failed);
    return rows_failed ? 1 : 0;
}
