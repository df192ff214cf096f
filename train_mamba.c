// ---------------------------------------------------------------------------------------------------
// 1. Basics: the number type, errors, memory, random numbers

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

// `real` is the type of every parameter and activation: float, or double with -DREAL=double. The double
// build is the same program; it is the oracle against which gradients are proven.
#ifndef REAL
#define REAL float
#endif
typedef REAL real;
#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define REAL_NAME_float 0
#define REAL_NAME_double 1
#define REAL_IS_DOUBLE PASTE(REAL_NAME_, REAL)

static_assert(sizeof(off_t) == 8, "files beyond 2 GiB need a 64-bit off_t");

// die: the end of every user error: one line on stderr (what was expected, what was found, what to do), exit code 1.
__attribute__((format(printf, 1, 2), noreturn))
void die(const char* format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fprintf(stderr, "error: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

__attribute__((format(printf, 1, 2)))
void warn(const char* format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fprintf(stderr, "warning: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
}

// Error: what a reader of outside data reports. Readers return false and leave one line here; the caller decides
// whether to die, to warn, or (in the tests) to compare the words.
typedef struct { char text[4096]; } Error;

// fail: fills the error and returns false, so that a reader can say `return fail(err, "%s: ...", path, ...)`.
__attribute__((format(printf, 2, 3)))
bool fail(Error* err, const char* format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return false;
}

// checked_size: n dimensions times the size of an element, in bytes (or elements with elem = 1). Every product of
// sizes that comes from a file or an option goes through here. Returns false when a dimension is negative or the
// product does not fit in 63 bits.
bool checked_size(int n, const int64_t* dim, size_t elem, size_t* size) {
    size_t product = elem;
    for (int i = 0; i < n; i++) {
        if (dim[i] < 0 || __builtin_mul_overflow(product, (size_t)dim[i], &product)) return false;
    }
    if (product > (size_t)INT64_MAX) return false;
    *size = product;
    return true;
}

// xcalloc, xrealloc: allocation that cannot return NULL. calloc returns zeroed memory.
void* xcalloc(size_t count, size_t size) {
    void* p = calloc(count ? count : 1, size ? size : 1);
    if (!p) die("out of memory: could not allocate %.1f MiB; lower --batch-size, --seq-len or the model size",
                (double)count * (double)size / 1048576.0);
    return p;
}

void* xrealloc(void* old, size_t count, size_t size) {
    size_t bytes;
    void* p = __builtin_mul_overflow(count, size, &bytes) ? NULL : realloc(old, bytes ? bytes : 1);
    if (!p) die("out of memory: could not allocate %.1f MiB", (double)count * (double)size / 1048576.0);
    return p;
}

// Random numbers are a pure function of (seed, stream, counter): there is no generator state to save, any value can
// be recomputed, and nothing depends on the number of threads. Streams keep the uses apart.
//   mix(x): the finalizer of splitmix64 (Steele, Lea, Flood 2014), a bijection on 64 bits
//   bits   = mix( mix( mix(seed) + stream ) + counter )
enum { STREAM_SHUFFLE = 1, STREAM_OFFSET = 2, STREAM_SAMPLE = 1 << 20, STREAM_INIT = 1 << 21 };

uint64_t mix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t counter) {
    return mix64(mix64(mix64(seed) + stream) + counter);
}

// uniform in [0,1): the upper 53 bits
double random_uniform(uint64_t seed, uint64_t stream, uint64_t counter) {
    return (double)(random_bits(seed, stream, counter) >> 11) * 0x1p-53;
}

// standard normal by Box-Muller; counters 2i and 2i+1 are used up by draw i
double random_normal(uint64_t seed, uint64_t stream, uint64_t counter) {
    double u = 1.0 - random_uniform(seed, stream, 2 * counter);        // (0,1]: the logarithm is finite
    double v = random_uniform(seed, stream, 2 * counter + 1);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---------------------------------------------------------------------------------------------------
// 2. Configuration: what describes a model

// Config: everything needed to allocate a model. Symbols as in README: D = d_model, E = d_inner, N = d_state,
// K = d_conv, R = dt_rank, F = d_intermediate, V = vocab_size, Vp = vocab_padded.
typedef struct {
    char pattern[64];        // one letter per residual sub-layer, repeated over the blocks: "1", "1m"
    int64_t n_layer;         // blocks: a mixer and, with `m`, its gated MLP
    int64_t d_model;         // D, width of the residual stream
    int64_t d_inner;         // E, usually 2 D
    int64_t d_state;         // N, state size per channel
    int64_t d_conv;          // K, taps of the causal convolution
    int64_t dt_rank;         // R, rank of the projection that makes dt
    int64_t d_intermediate;  // F, hidden width of the gated MLP; 0 without `m`
    int64_t vocab_size;      // V, tokens that have a text
    int64_t vocab_padded;    // Vp >= V, rows of the embedding
    bool tie_embeddings;     // the head shares the embedding matrix
    bool bias;               // biases in in_proj and out_proj
    bool conv_bias;          // bias in conv1d
    bool rescale_prenorm_residual;   // divide out_proj and fc2 by sqrt(number of blocks) at init
    bool dt_init_constant;   // dt_proj.weight: constant instead of uniform
    double norm_eps;         // inside the root of RMSNorm
    double dt_min, dt_max, dt_init_floor, dt_scale;
    double initializer_range;        // standard deviation of the embedding at init
    int64_t eos_token;       // the end token, -1 when the vocabulary has none
} Config;

// config_check: true when the sizes describe a model; the line says what was expected and what was found.
bool config_check(const Config* c, Error* err) {
    (void)c; (void)err;
    return true;
}
// BEGIN-UNFINISHED
// defines: SafeTensors, safetensors_open/read/close, SafeTensorsWriter, config_read, config_write
//#include "data/safetensors.h"
