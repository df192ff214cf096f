// ssm.c: the Mamba family of state space models, trained in plain C.
//
// One file, read from top to bottom: every layer with its backward pass, the blocks, the model, training,
// generation. Each function states its formula, the shapes, what is saved for the backward pass, and its
// source. Sizes and symbols:
//   B batch   T tokens   D d_model   E d_inner   N d_state   K conv taps   R dt_rank   F MLP width
//   V, Vp vocabulary (padded)
// Arrays are row-major and token-major: (B,T,channel). dX is the gradient of X; every backward function ADDS
// to its outputs (crossentropy, which has no other, writes). Mathematics: Mamba (arXiv 2312.00752) and the
// code of state-spaces/mamba; layers in the manner of llm.c.
//
//  1. Basics: the number type, errors, memory, random numbers
//  2. Configuration: what describes a model
//  3. Matmul
//  4. Layers: forward and backward side by side
//  5. Blocks: the residual sub-layers and the table of their kinds
//  6. Model: tensor table, memory plan, initialization, forward, backward
//  7. Optimizer: gradient norm, AdamW, learning rate schedules
//  8. Sampling: from logits to a token
//  9. Backend: what the loops call; the CPU one
// 10. Generation: data/generation.h
// 11. Training and evaluation
// 12. Main
//
// What goes in and out is in data/: files and checkpoints, tokenizer, data loader, command line, and what a
// configuration may be.

// ---------------------------------------------------------------------------------------------------
// 1. Basics: the number type, errors, memory, random numbers

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <fnmatch.h>
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
#include <sys/mman.h>
#include <sys/resource.h>
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

// defines: die, warn, Error, fail, checked_size, xcalloc, xrealloc, seconds_now, set_threads, check_memory
#include "data/machine.h"

static inline size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

// Random numbers are a pure function of (seed, stream, counter): there is no generator state to save, any
// value can be recomputed, and nothing depends on the number of threads. Streams keep the uses apart.
//   mix(x): the finalizer of splitmix64 (Steele, Lea, Flood 2014), a bijection on 64 bits
//   bits   = mix( mix( mix(seed) + stream ) + counter )
enum { STREAM_SHUFFLE = 1, STREAM_OFFSET = 2, STREAM_DROPOUT = 3, STREAM_SAMPLE = 1 << 20,
       STREAM_INIT = 1 << 21 };

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__    // also callable in the kernels of train_mamba.cu
#else
#define HOST_DEVICE
#endif

HOST_DEVICE static inline uint64_t mix64(uint64_t x) {
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

// ---------------------------------------------------------------------------------------------------
// 2. Configuration: what describes a model

// Config: everything needed to allocate a model. Symbols as in README: D = d_model, E = d_inner, N = d_state,
// K = d_conv, R = dt_rank, F = d_intermediate, V = vocab_size, Vp = vocab_padded.
typedef struct {
    char pattern[512];       // one letter per residual sub-layer, repeated over the blocks: "1", "2m", "222a"
    int64_t n_layer;         // blocks: a mixer and, with `m`, its gated MLP
    int64_t d_model;         // D, width of the residual stream
    int64_t d_inner;         // E, usually 2 D
    int64_t d_state;         // N, state size per channel
    int64_t d_conv;          // K, taps of the causal convolution
    int64_t dt_rank;         // R, rank of the projection that makes dt (Mamba-1)
    // Mamba-2
    int64_t d_ssm;           // Es <= E, channels that go through the SSM; the others form a gated MLP
    int64_t headdim;         // P, channels per head; H = Es / P heads
    int64_t ngroups;         // G, groups of heads that share B and C
    int64_t chunk_size;      // Q, tokens per chunk of the chunked form
    bool D_has_hdim;         // the skip D: one number per channel instead of one per head
    bool rmsnorm;            // the gate is followed (or preceded) by an RMSNorm
    bool norm_before_gate;
    double dt_low, dt_high;  // dt is clipped to these
    double A_low, A_high;    // A = -uniform(A_low, A_high) at init
    double conv_init;        // the conv's weights start uniform in +-conv_init; 0: +-1/sqrt(K)
    // attention
    int64_t attn_heads, attn_heads_kv, attn_head_dim;        // Hq, Hkv, dh
    int64_t attn_conv;       // taps of the convolution over q, k and v; 0: none
    int64_t attn_mlp;        // width of [up; gate] of an MLP beside the heads; 0: none
    int64_t rotary_dim;      // numbers of each head that rotary embedding turns; 0: none
    double rotary_base, softmax_scale;                       // scale 0: 1/sqrt(dh)
    bool rotary_interleaved; // pairs (2i, 2i+1) instead of (i, i + rotary_dim/2)
    bool attn_in_bias, attn_out_bias;
    int64_t context;         // tokens that the cache of keys and values holds; of a run, not of a model
    bool state_bf16;         // generation rounds the states of recurrences to bfloat16; of a run, too
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

enum { MAX_CONTEXT = 1 << 24 };      // positions are whole numbers in a float

// defines: SafeTensors and its reader and writer, checkpoint directories
#include "data/safetensors.h"
// defines: config_check, config_read, config_write
#include "data/config.h"
// defines: pickle_open, pickle_write: pytorch_model.bin
#include "data/pickle.h"
// defines: weights_open: a model in one file or in several
#include "data/shards.h"
// defines: Tokenizer, streaming decode
#include "data/tokenizer.h"
// defines: Dataset, Loader
#include "data/dataloader.h"

// ---------------------------------------------------------------------------------------------------
// 3. Matmul
//
// The three products of a linear layer (its output, the gradient of its input, the gradient of its weight)
// are one function, matmul_add: C(i,j) += sum_l A(i,l) B(l,j), where a transpose is only another pair of
// strides. It is fast for four reasons, which are the rungs of dev/cpu/matmul.c:
//   1. the inner loop runs over neighbouring j in vectors, so no sum is split over the lanes of a vector;
//   2. a tile of TILE_ROWS x TILE_COLS sums stays in registers, so each load serves several multiplications;
//   3. the pieces of A and B in use are copied ("packed") side by side, so that they stay in the caches;
//   4. the threads share out blocks of C, and no two of them write to the same sum.
// Every sum is made in one order: within groups of SUM_BLOCK consecutive l one after the other, then group
// after group. Nothing else enters: neither tile nor block, neither the thread nor the other rows. So a row
// of a large batch has the bits of that row alone, and a text fed token by token those of the whole text at
// once.
// The blocking follows Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008).

// A vector register has 64 bytes with AVX-512, 32 with AVX, otherwise 16. The tile follows the number of
// registers: 24 sums of 32 registers with AVX-512, 12 of 16 elsewhere.
#if defined(__AVX512F__)
enum { VEC_BYTES = 64, TILE_ROWS = 12 };
#elif defined(__AVX__)
enum { VEC_BYTES = 32, TILE_ROWS = 6 };
#else
enum { VEC_BYTES = 16, TILE_ROWS = 6 };
#endif
enum { VEC = VEC_BYTES / sizeof(real), TILE_COLS = 2 * VEC };
enum { SUM_BLOCK = 256 };            // l per group; a packed panel of B, SUM_BLOCK x TILE_COLS, has <= 32 KiB
enum { BLOCK_ROWS = 192 };           // rows of a block of C: how often a packed panel of B is used
enum { BLOCK_COLS = 256 };           // columns of a block of C: how often the packed rows of A are used
enum { PACK_LD = SUM_BLOCK + 16 };   // row length of packed A; rows 1024 bytes apart would share cache sets
enum { ROW_OUTPUTS = 8 };            // outputs that matmul_row makes together
enum { FEW_ROWS = 4 };               // below this many rows, packing costs more than it saves
// vec: a register full; vec4: four numbers. `aligned` lets them be loaded from any address of a real.
typedef real vec __attribute__((vector_size(VEC_BYTES), aligned(sizeof(real)), may_alias));
typedef real vec4 __attribute__((vector_size(4 * sizeof(real)), aligned(sizeof(real)), may_alias));

// FMA_VEC, FMA_VEC4: a*b + c with one rounding. Spelled out, because a compiler left to itself fuses some of
// these and not others (gcc: -mtune=znver3 splits them in some loops), and then equal sums would differ in
// the last bit.
#if !defined(__FMA__)
#define FMA_VEC4(a, b, c) ((a) * (b) + (c))
#define FMA_VEC(a, b, c) ((a) * (b) + (c))
#else
#include <immintrin.h>
#define FMA_VEC4 PASTE(FMA_VEC4_, REAL)
#define FMA_VEC4_float _mm_fmadd_ps
#define FMA_VEC4_double _mm256_fmadd_pd
#define FMA_VEC PASTE(FMA_VEC_, REAL)
#if defined(__AVX512F__)
#define FMA_VEC_float _mm512_fmadd_ps
#define FMA_VEC_double _mm512_fmadd_pd
#else
#define FMA_VEC_float _mm256_fmadd_ps
#define FMA_VEC_double _mm256_fmadd_pd
#endif
#endif

// transpose4: t[k] = { src[k], src[stride + k], src[2*stride + k], src[3*stride + k] }, k < 4
static inline __attribute__((always_inline)) void transpose4(vec4* t, const real* src, size_t stride) {
    vec4 a = *(const vec4*)src, b = *(const vec4*)(src + stride);
    vec4 c = *(const vec4*)(src + 2 * stride), d = *(const vec4*)(src + 3 * stride);
    vec4 ab_lo = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_hi = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    vec4 cd_lo = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_hi = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    t[0] = __builtin_shufflevector(ab_lo, cd_lo, 0, 1, 4, 5);
    t[1] = __builtin_shufflevector(ab_lo, cd_lo, 2, 3, 6, 7);
    t[2] = __builtin_shufflevector(ab_hi, cd_hi, 0, 1, 4, 5);
    t[3] = __builtin_shufflevector(ab_hi, cd_hi, 2, 3, 6, 7);
}

// pack: copies a piece of a strided matrix into rows: dst[r*ld + c] = src[r*row_stride + c*col_stride].
// One of the two strides is 1. When it is row_stride this is a transpose, made of 4 x 4 squares in registers.
static void pack(real* dst, size_t ld, const real* src, size_t row_stride, size_t col_stride,
                 size_t rows, size_t cols) {
    if (col_stride == 1) {
        for (size_t r = 0; r < rows; r++) memcpy(dst + r * ld, src + r * row_stride, cols * sizeof(real));
        return;
    }
    size_t c = 0;
    for (; c + 4 <= cols; c += 4) {
        const real* s = src + c * col_stride;
        size_t r = 0;
        for (; r + 4 <= rows; r += 4) {
            vec4 t[4];
            transpose4(t, s + r, col_stride);
            for (size_t k = 0; k < 4; k++) *(vec4*)(dst + (r + k) * ld + c) = t[k];
        }
        for (; r < rows; r++) {
            for (size_t k = 0; k < 4; k++) dst[r * ld + c + k] = s[k * col_stride + r];
        }
    }
    for (; c < cols; c++) {
        for (size_t r = 0; r < rows; r++) dst[r * ld + c] = src[r * row_stride + c * col_stride];
    }
}

// matmul_tile: C(r,j) += sum_l A(r,l) B(l,j) for r < rows, j < cols <= vecs*VEC, l < L. A and B are packed:
// A(r,l) at A[r*PACK_LD + l], B(l,j) at B[l*TILE_COLS + j]. rows and vecs are constants at every call: the
// loops over them unroll, and `sum` becomes registers.
static inline __attribute__((always_inline))
void matmul_tile(real* C, size_t ldc, const real* A, const real* B, size_t L, size_t cols,
                 int rows, int vecs) {
    vec sum[TILE_ROWS][2];
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < vecs; v++) sum[r][v] = (vec){0};
    }
    for (size_t l = 0; l < L; l++) {
        for (int r = 0; r < rows; r++) {
            vec a = A[r * PACK_LD + l] - (vec){0};                     // the same number in all lanes
            for (int v = 0; v < vecs; v++) {
                sum[r][v] = FMA_VEC(a, *(const vec*)(B + l * TILE_COLS + v * VEC), sum[r][v]);
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < vecs; v++) {
            real* c = C + r * ldc + v * VEC;
            size_t n = cols - (size_t)(v * VEC);                       // columns from here to the edge of C
            if (n >= VEC) {
                *(vec*)c += sum[r][v];
            } else {
                real edge[VEC];
                memcpy(edge, &sum[r][v], sizeof edge);
                for (size_t j = 0; j < n; j++) c[j] += edge[j];
            }
        }
    }
}

// matmul_block: one block of C, at most BLOCK_ROWS rows, any number of columns; strides as in matmul_add.
static void matmul_block(real* C, size_t ldc, const real* A, size_t ai, size_t al,
                         const real* B, size_t bl, size_t bj, size_t rows, size_t cols, size_t L) {
    real a_pack[BLOCK_ROWS * PACK_LD] __attribute__((aligned(64)));
    real b_pack[SUM_BLOCK * TILE_COLS] __attribute__((aligned(64)));
    for (size_t l0 = 0; l0 < L; l0 += SUM_BLOCK) {
        size_t Lb = min_size(SUM_BLOCK, L - l0);
        pack(a_pack, PACK_LD, A + l0 * al, ai, al, rows, Lb);
        for (size_t j = 0; j < cols; j += TILE_COLS) {
            size_t n = min_size(TILE_COLS, cols - j);
            bool narrow = n <= VEC;
            if (n < TILE_COLS) memset(b_pack, 0, Lb * TILE_COLS * sizeof(real));      // lanes past the edge
            pack(b_pack, TILE_COLS, B + l0 * bl + j * bj, bl, bj, Lb, n);
            for (size_t i = 0; i < rows;) {
                real* c = C + i * ldc + j;
                const real* a = a_pack + i * PACK_LD;
                size_t left = rows - i;
                if (left >= TILE_ROWS && !narrow) matmul_tile(c, ldc, a, b_pack, Lb, n, TILE_ROWS, 2);
                else if (left >= TILE_ROWS) matmul_tile(c, ldc, a, b_pack, Lb, n, TILE_ROWS, 1);
                else if (left >= 4 && !narrow) matmul_tile(c, ldc, a, b_pack, Lb, n, 4, 2);
                else if (left >= 4) matmul_tile(c, ldc, a, b_pack, Lb, n, 4, 1);
                else if (!narrow) matmul_tile(c, ldc, a, b_pack, Lb, n, 1, 2);
                else matmul_tile(c, ldc, a, b_pack, Lb, n, 1, 1);
                i += left >= TILE_ROWS ? TILE_ROWS : left >= 4 ? 4 : 1;
            }
        }
    }
}

// block_shape: the size of the blocks of an (M,N) matrix that the threads share out, halved until there are
// 16 blocks or they are small.
static void block_shape(size_t* mb, size_t* nb, size_t M, size_t N) {
    *mb = BLOCK_ROWS;
    *nb = BLOCK_COLS;
    while (((M + *mb - 1) / *mb) * ((N + *nb - 1) / *nb) < 16 && (*mb > 24 || *nb > TILE_COLS)) {
        if (*nb > TILE_COLS && *nb >= *mb) *nb /= 2;
        else if (*mb > 24) *mb /= 2;
        else *nb /= 2;
    }
}

// matmul_add: C(i,j) += sum_l A(i,l) B(l,j), i < M, j < N, l < L. With `fill`, C(i,j) starts at bias[j], or
// at 0.
//   C(i,j) at C[i*ldc + j], A(i,l) at A[i*ai + l*al], B(l,j) at B[l*bl + j*bj]
// Called by all threads of a parallel region, which share the blocks and do not wait for each other at the
// end.
static void matmul_add(real* C, size_t ldc, bool fill, const real* bias,
                       const real* A, size_t ai, size_t al, const real* B, size_t bl, size_t bj,
                       size_t M, size_t N, size_t L) {
    size_t mb, nb;
    block_shape(&mb, &nb, M, N);
    size_t across = (N + nb - 1) / nb, blocks = ((M + mb - 1) / mb) * across;
    #pragma omp for schedule(dynamic) nowait
    for (size_t block = 0; block < blocks; block++) {
        size_t i0 = block / across * mb, j0 = block % across * nb;
        size_t rows = min_size(mb, M - i0), cols = min_size(nb, N - j0);
        real* c = C + i0 * ldc + j0;
        for (size_t i = 0; fill && i < rows; i++) {
            for (size_t j = 0; j < cols; j++) c[i * ldc + j] = bias ? bias[j0 + j] : (real)0;
        }
        matmul_block(c, ldc, A + i0 * ai, ai, al, B + j0 * bj, bl, bj, rows, cols, L);
    }
}

// matmul_row: the forward for one row and ROW_OUTPUTS outputs, with the order of summation of matmul_tile.
// Reads each weight once and copies none: with few rows the time is that of reading the weights from memory.
// So it also asks for the next ROW_OUTPUTS rows ahead of time, which follow in memory (asking past the end
// does no harm).
static void matmul_row(real* out, const real* inp, const real* weight, const real* bias, size_t I) {
    vec4 total[ROW_OUTPUTS / 4], sum[ROW_OUTPUTS / 4], w[4];
    for (int g = 0; g < ROW_OUTPUTS / 4; g++) total[g] = bias ? *(const vec4*)(bias + 4 * g) : (vec4){0};
    for (size_t i = 0; i < I;) {
        size_t end = min_size(i + SUM_BLOCK, I);
        for (int g = 0; g < ROW_OUTPUTS / 4; g++) sum[g] = (vec4){0};
        for (; i + 4 <= end; i += 4) {
            const char* next = (const char*)weight + ROW_OUTPUTS * (I + i) * sizeof(real);
            for (size_t k = 0; k < 4 * ROW_OUTPUTS * sizeof(real); k += 64) __builtin_prefetch(next + k);
            for (int g = 0; g < ROW_OUTPUTS / 4; g++) {
                transpose4(w, weight + (size_t)g * 4 * I + i, I);
                for (int k = 0; k < 4; k++) sum[g] = FMA_VEC4(inp[i + k] - (vec4){0}, w[k], sum[g]);
            }
        }
        for (; i < end; i++) {
            for (int g = 0; g < ROW_OUTPUTS / 4; g++) {
                const real* w_g = weight + (size_t)g * 4 * I + i;
                vec4 w_i = {w_g[0], w_g[I], w_g[2 * I], w_g[3 * I]};
                sum[g] = FMA_VEC4(inp[i] - (vec4){0}, w_i, sum[g]);
            }
        }
        for (int g = 0; g < ROW_OUTPUTS / 4; g++) total[g] += sum[g];
    }
    for (int g = 0; g < ROW_OUTPUTS / 4; g++) *(vec4*)(out + 4 * g) = total[g];
}

// matmul_forward: the linear layer.   PyTorch: F.linear(inp, weight, bias)
//   out[m,o] = sum_i inp[m,i] * weight[o,i] + bias[o]
//   inp (M,I), row stride ldi   weight (O,I)   bias (O) or NULL   out (M,O), row stride ldo, overwritten
// Of a forward that some block calls inside a parallel region, NAME_share is what all threads of the region
// call: they share the work and wait for each other at the end, which costs less than a region of its own.
static void matmul_forward_share(real* out, size_t ldo, const real* inp, size_t ldi, const real* weight,
                                 const real* bias, size_t M, size_t I, size_t O) {
    size_t by_row = M < FEW_ROWS ? O / ROW_OUTPUTS * ROW_OUTPUTS : 0;        // outputs made by matmul_row
    #pragma omp for schedule(static) nowait      // static: a thread's next rows are those it asked for
    for (size_t o = 0; o < by_row; o += ROW_OUTPUTS) {
        for (size_t m = 0; m < M; m++) {
            matmul_row(out + m * ldo + o, inp + m * ldi, weight + o * I, bias ? bias + o : NULL, I);
        }
    }
    matmul_add(out + by_row, ldo, true, bias ? bias + by_row : NULL, inp, ldi, 1,
               weight + by_row * I, 1, I, M, O - by_row, I);
    #pragma omp barrier
}

void matmul_forward(real* out, size_t ldo, const real* inp, size_t ldi, const real* weight, const real* bias,
                    size_t M, size_t I, size_t O) {
    #pragma omp parallel if (M * I * O > 65536)    // below, waking the threads takes longer than the work
    matmul_forward_share(out, ldo, inp, ldi, weight, bias, M, I, O);
}

// Half: weight matrices in bfloat16, the upper half of a float, for generation on the CPU: half as much to
// read. from[i] is at bits + i, but for the order within a row: of 2 VEC neighbours, i and i + VEC share a
// 32-bit word, so that a shift and a mask make two vectors of floats out of one load. bits NULL: there are
// none.
typedef struct { const real* from; const uint16_t* bits; } Half;

typedef uint32_t vec_bits __attribute__((vector_size(VEC * 4), aligned(2), may_alias));
typedef float vec_float __attribute__((vector_size(VEC * 4)));

// half_at: where element i of a row of length I is in the row
static inline size_t half_at(size_t i, size_t I) {
    size_t block = i / (2 * VEC) * (2 * VEC), k = i - block;
    return block + 2 * VEC <= I ? block + 2 * (k % VEC) + k / VEC : i;
}

enum { HALF_ROWS = 2 };              // rows of the input that use a loaded weight

// half_tile: `rows` x `outputs` outputs, each a sum over vectors of neighbouring i, then over the lanes of
// the vector, then over the last i. The two sizes are constants at every call, see matmul_tile.
static inline __attribute__((always_inline))
void half_tile(real* out, size_t ldo, const real* inp, size_t ldi, const uint16_t* weight, const real* bias,
               size_t I, int rows, int outputs) {
    vec sum[HALF_ROWS][ROW_OUTPUTS];
    size_t i = 0;
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++) sum[r][o] = (vec){0};
    for (; i + 2 * VEC <= I; i += 2 * VEC)
        for (int o = 0; o < outputs; o++) {
            const uint16_t* w = weight + (size_t)o * I + i;
            vec_bits both = *(const vec_bits*)w;
            vec low = __builtin_convertvector((vec_float)(both << 16), vec);
            vec high = __builtin_convertvector((vec_float)(both & 0xffff0000u), vec);
            __builtin_prefetch(w + ROW_OUTPUTS * I);
            for (int r = 0; r < rows; r++) {
                const real* x = inp + (size_t)r * ldi + i;
                sum[r][o] = FMA_VEC(*(const vec*)x, low, sum[r][o]);
                sum[r][o] = FMA_VEC(*(const vec*)(x + VEC), high, sum[r][o]);
            }
        }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++) {
            real total = bias ? bias[o] : 0;
            for (int l = 0; l < VEC; l++) total += sum[r][o][l];
            for (size_t k = i; k < I; k++)
                total += inp[(size_t)r * ldi + k] * (real)widen_bf16(weight[(size_t)o * I + k]);
            out[(size_t)r * ldo + (size_t)o] = total;
        }
}

// matmul_forward_half: matmul_forward_share with weights in bfloat16. A row has the same bits whatever the
// others.
void matmul_forward_half(real* out, size_t ldo, const real* inp, size_t ldi, const uint16_t* weight,
                         const real* bias, size_t M, size_t I, size_t O) {
    #pragma omp for schedule(static)
    for (size_t o = 0; o < O; o += ROW_OUTPUTS)
        for (size_t m = 0; m < M; m += HALF_ROWS) {
            real* to = out + m * ldo + o;
            const real *from = inp + m * ldi, *b = bias ? bias + o : NULL;
            const uint16_t* w = weight + o * I;
            if (o + ROW_OUTPUTS <= O && m + 1 < M) half_tile(to, ldo, from, ldi, w, b, I, 2, ROW_OUTPUTS);
            else if (o + ROW_OUTPUTS <= O) half_tile(to, ldo, from, ldi, w, b, I, 1, ROW_OUTPUTS);
            else for (size_t r = m; r < min_size(m + HALF_ROWS, M); r++)
                for (size_t k = o; k < O; k++)
                    half_tile(out + r * ldo + k, ldo, inp + r * ldi, ldi, weight + k * I,
                              bias ? bias + k : NULL, I, 1, 1);
        }
}

// linear_forward: matmul_forward with the weights as they are kept
static void linear_share(const Half* half, real* out, size_t ldo, const real* inp, size_t ldi,
                         const real* weight, const real* bias, size_t M, size_t I, size_t O) {
    if (half->bits)
        matmul_forward_half(out, ldo, inp, ldi, half->bits + (weight - half->from), bias, M, I, O);
    else matmul_forward_share(out, ldo, inp, ldi, weight, bias, M, I, O);
}

static void linear_forward(const Half* half, real* out, size_t ldo, const real* inp, size_t ldi,
                           const real* weight, const real* bias, size_t M, size_t I, size_t O) {
    #pragma omp parallel if (M * I * O > 65536)
    linear_share(half, out, ldo, inp, ldi, weight, bias, M, I, O);
}

// matmul_backward: out[m,o] = sum_i inp[m,i] * weight[o,i] + bias[o]  =>
//   dinp[m,i]    += sum_o dout[m,o] * weight[o,i]
//   dweight[o,i] += sum_m dout[m,o] * inp[m,i]           dbias[o] += sum_m dout[m,o]
//   dout (M,O), dinp (M,I), inp (M,I) with row strides lddo, lddi, ldi; dinp, dweight, dbias each may be NULL
void matmul_backward(real* dinp, size_t lddi, real* dweight, real* dbias, const real* dout, size_t lddo,
                     const real* inp, size_t ldi, const real* weight, size_t M, size_t I, size_t O) {
    #pragma omp parallel if (M * I * O > 65536)
    {
        if (dinp) matmul_add(dinp, lddi, false, NULL, dout, lddo, 1, weight, I, 1, M, I, O);
        if (dweight) matmul_add(dweight, I, false, NULL, dout, 1, lddo, inp, ldi, 1, O, I, M);
        #pragma omp for schedule(dynamic) nowait
        for (size_t o = 0; o < (dbias ? O : 0); o += TILE_COLS) {
            size_t n = min_size(TILE_COLS, O - o);
            for (size_t m0 = 0; m0 < M; m0 += SUM_BLOCK) {
                real sum[TILE_COLS] = {0};
                for (size_t m = m0; m < min_size(m0 + SUM_BLOCK, M); m++) {
                    for (size_t j = 0; j < n; j++) sum[j] += dout[m * lddo + o + j];
                }
                for (size_t j = 0; j < n; j++) dbias[o + j] += sum[j];
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------
// 4. Layers: forward and backward side by side

// exp, sigmoid, silu, softplus, expm1 as plain arithmetic: no branch, no call, only masks and moves of
// bits, so that a `#pragma omp simd` loop around them becomes vector code without -ffast-math. NaN comes out
// as NaN. Largest errors, against the double functions at every fifth float: exp_real 1.01 ulp; relative:
// expm1_neg_real 9e-8, softplus_real 2.3e-7, sigmoid_real 1.5e-7, silu_real 2.0e-7. The double build, our
// oracle, calls libm.
#if REAL_IS_DOUBLE
static inline real exp_real(real x) { return exp(x); }
static inline real expm1_neg_real(real x) { return expm1(x); }
static inline real softplus_real(real x) { return x > 20 ? x : log1p(exp(x)); }
static inline real sigmoid_real(real x) { return 1 / (1 + exp(-x)); }
static inline real silu_real(real x) { return x < -1000 ? 0 : x * sigmoid_real(x); }
#else
static inline uint32_t bits_of_float(float x) { uint32_t u; memcpy(&u, &x, sizeof u); return u; }
static inline float float_of_bits(uint32_t u) { float x; memcpy(&x, &u, sizeof x); return x; }

// mask: all bits where the condition holds. `condition ? a : b` would do, but gcc moves arithmetic that
// follows a select into one of its branches and then, for fear of traps, does not compute both, as AVX2 must.
static inline uint32_t mask(bool condition) { return -(uint32_t)condition; }

// exp_reduce: x = k ln2 + r with k = round(x / ln2) and |r| <= ln2 / 2, so that exp(x) = 2^k exp(r). Returns
//   exp(r) - 1 = r + r^2 q(r),   q of degree 4 with the smallest largest error (3e-9 of exp(r)).
// Adding 1.5 * 2^23 leaves no bits for a fraction: the sum is rounded to an integer, and its lowest bits are
// k as a two's complement number. Shifted left by 23 they are what to add to the bits of a float to multiply
// it by 2^k. ln2 is split into a first part of 9 bits, whose product with k is exact, and the rest.
static inline float exp_reduce(float x, uint32_t* k_shifted) {
    const float round_to_integer = 12582912.0f;
    float z = x * 1.44269504f + round_to_integer;
    float k = z - round_to_integer;
    float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float q = 1.38146177e-3f;
    q = q * r + 8.36871285e-3f;
    q = q * r + 4.16683890e-2f;
    q = q * r + 1.66665211e-1f;
    q = q * r + 4.99999940e-1f;
    *k_shifted = bits_of_float(z) << 23;
    return r + r * r * q;
}

// exp_real: exp(x) = (2 exp(r)) 2^(k-1), since 2^128 is no float. 0 below 2^-125.5, where k = -126 makes the
// bits of 2^(k-1) those of 0; infinity where the product overflows. The masks serve all x beyond. NaN passes.
static inline real exp_real(real x) {
    uint32_t k_shifted, small = mask(x < -87.0f), large = mask(x > 88.75f);
    float p = 2.0f + 2.0f * exp_reduce(x, &k_shifted);
    float y = p * float_of_bits(bits_of_float(0.5f) + k_shifted);
    return float_of_bits((bits_of_float(y) & ~(small | large)) | (large & bits_of_float(INFINITY)));
}

// expm1_neg_real: exp(x) - 1 for x <= 0, without the cancellation near 0:  2^k (exp(r) - 1) + (2^k - 1)
static inline real expm1_neg_real(real x) {
    uint32_t k_shifted, small = mask(x < -80.0f);
    float p = exp_reduce(x, &k_shifted);
    float scale = float_of_bits(bits_of_float(1.0f) + k_shifted);
    float y = scale * p + (scale - 1.0f);
    return float_of_bits((bits_of_float(y) & ~small) | (small & bits_of_float(-1.0f)));
}

// softplus_real: log(1 + exp(x)) = max(x, 0) + log1p(u),  u = exp(-|x|) in [0, 1]
//   log1p(u) = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...),  s = u / (2 + u) <= 1/3: no cancellation for any u
// The series is cut after s^9, its coefficients adjusted to the smallest largest error (5e-9). Above 20 the
// sum rounds to x itself.
static inline real softplus_real(real x) {
    float u = exp_real(-fabsf(x));
    float s = u / (2.0f + u), s2 = s * s;
    float p = 1.40064105e-1f;
    p = p * s2 + 1.40008241e-1f;
    p = p * s2 + 2.00107679e-1f;
    p = p * s2 + 3.33332092e-1f;
    float max_x_0 = float_of_bits(bits_of_float(x) & ~mask(x < 0));
    return max_x_0 + 2.0f * (s + s * (s2 * p));
}

static inline real sigmoid_real(real x) { return 1 / (1 + exp_real(-x)); }

// silu_real: x sigmoid(x). Below -100 sigmoid is 0 in float; the mask keeps -infinity * 0 from becoming NaN.
static inline real silu_real(real x) {
    return float_of_bits(bits_of_float(x * sigmoid_real(x)) & ~mask(x < -100));
}
#endif

// the derivative of silu: sigma(x) (1 + x (1 - sigma(x)))
static inline real silu_grad_real(real x) {
    real sigma = sigmoid_real(x);
    return sigma * (1 + x * (1 - sigma));
}

// Loops over columns that must not be split further go in tiles of this many channels (one to four vectors).
enum { CHANNEL_TILE = 32 };

static inline real sqrt_real(real x) {
    return REAL_IS_DOUBLE ? (real)sqrt((double)x) : (real)sqrtf((float)x);
}

void zero_real(real* p, size_t n) {
    #pragma omp parallel for if (n > 65536)
    for (size_t i = 0; i < n; i += 4096) memset(p + i, 0, min_size(4096, n - i) * sizeof(real));
}

// embedding_forward: a row of the embedding matrix for each token.   out (M,D)   weight (Vp,D)
// tokens (M), M = B*T
void embedding_forward(real* out, const int* tokens, const real* weight, size_t M, size_t D) {
    #pragma omp parallel for if (M > 64)
    for (size_t m = 0; m < M; m++) memcpy(out + m * D, weight + (size_t)tokens[m] * D, D * sizeof(real));
}

// embedding_forward_half: embedding_forward with the matrix in bfloat16, in the order of Half
void embedding_forward_half(real* out, const int* tokens, const uint16_t* weight, size_t M, size_t D) {
    #pragma omp parallel for if (M > 64)
    for (size_t m = 0; m < M; m++)
        for (size_t d = 0; d < D; d++)
            out[m * D + d] = (real)widen_bf16(weight[(size_t)tokens[m] * D + half_at(d, D)]);
}

// out[m,:] = W[tokens[m],:]  =>  dW[tokens[m],:] += dout[m,:].  Tokens repeat, so the parallel loop is over
// columns.
void embedding_backward(real* dweight, const real* dout, const int* tokens, size_t M, size_t D) {
    #pragma omp parallel for
    for (size_t d0 = 0; d0 < D; d0 += CHANNEL_TILE) {
        size_t n = min_size(CHANNEL_TILE, D - d0);
        for (size_t m = 0; m < M; m++) {
            const real* dout_m = dout + m * D + d0;
            real* dw = dweight + (size_t)tokens[m] * D + d0;
            for (size_t d = 0; d < n; d++) dw[d] += dout_m[d];
        }
    }
}

// Dropout: which elements a training step zeroes. A mask is nowhere stored: whether an element is kept is a
// function of (seed, step, place, element), so the backward, --recompute and a resumed run make it again.
//   place: 0 the embedding, l + 1 what sub-layer l adds    element: (first + m) * D + d
typedef struct {
    double rate;         // the part that is zeroed; 0: no dropout
    uint64_t key;        // random_bits(seed, STREAM_DROPOUT, step)
    size_t first;        // tokens of this step in the micro-batches before this one
    int place;
} Dropout;

// Four neighbouring elements share the 64 bits of mix(mix(key + place) + element / 4); each is zeroed when
// its 16 bits are below the threshold.
static inline uint32_t dropout_threshold(double rate) { return (uint32_t)(rate * 65536 + 0.5); }
static inline double dropout_scale(uint32_t threshold) { return 65536.0 / (65536.0 - threshold); }
HOST_DEVICE static inline bool dropout_keeps(uint64_t bits, size_t element, uint32_t threshold) {
    return (bits >> element % 4 * 16 & 0xffff) >= threshold;
}

// dropout: out = keep ? inp / (1 - rate) : 0, so that the mean stays.   inp, out (M,D), may be the same
// Returns out, or inp when there is nothing to do. It is linear, each element for itself, so the backward is
// the same function of the gradient.    Srivastava et al. (2014), Journal of Machine Learning Research 15
const real* dropout(real* out, const real* inp, const Dropout* drop, size_t M, size_t D) {
    uint32_t threshold = dropout_threshold(drop->rate);
    uint64_t key = mix64(drop->key + (uint64_t)drop->place);
    real scale = (real)dropout_scale(threshold);
    if (threshold == 0) return inp;
    #pragma omp parallel for if (M > 64)
    for (size_t m = 0; m < M; m++) {
        uint64_t bits = 0;
        for (size_t d = 0; d < D; d++) {
            size_t element = (drop->first + m) * D + d;
            if (d == 0 || element % 4 == 0) bits = mix64(key + element / 4);
            out[m * D + d] = dropout_keeps(bits, element, threshold) ? inp[m * D + d] * scale : 0;
        }
    }
    return out;
}

// rmsnorm_forward: divides each token's vector by its root mean square.
//   rstd = (mean_d inp_d^2 + eps)^(-1/2)        out = weight * inp * rstd
//   inp, out (M,D)   weight (D)   saved for backward: rstd (M)        Zhang and Sennrich (arXiv 1910.07467)
void rmsnorm_forward(real* out, real* rstd, const real* inp, const real* weight, size_t M, size_t D,
                     real eps) {
#pragma omp parallel for if (M > 16)
    for (size_t m = 0; m < M; m++) {
        const real* inp_m = inp + m * D;
        real* out_m = out + m * D;
        real sum = 0;
        #pragma omp simd reduction(+:sum)
        for (size_t d = 0; d < D; d++) sum += inp_m[d] * inp_m[d];
        real r = 1 / (real)sqrt((double)(sum / (real)D + eps));
        if (r == 0)
            r = (real)NAN;    // the squares overflowed: NaN is noticed, an output of zeros would not be
        for (size_t d = 0; d < D; d++) out_m[d] = weight[d] * inp_m[d] * r;
        rstd[m] = r;
    }
}

// With xhat = inp * rstd and q = weight * dout:
//   out = weight * xhat     =>  dweight += sum_m dout * xhat
//   xhat = inp * rstd(inp)  =>  dinp    += rstd * (q - xhat * mean_d(q * xhat))
void rmsnorm_backward(real* dinp, real* dweight, const real* dout, const real* inp, const real* weight,
                      const real* rstd, size_t M, size_t D) {
    #pragma omp parallel for
    for (size_t m = 0; m < M; m++) {
        const real *inp_m = inp + m * D, *dout_m = dout + m * D;
        real* dinp_m = dinp + m * D;
        real r = rstd[m], dot = 0;
        #pragma omp simd reduction(+:dot)
        for (size_t d = 0; d < D; d++) dot += weight[d] * dout_m[d] * inp_m[d];
        real mean = dot * r / (real)D;
        for (size_t d = 0; d < D; d++) dinp_m[d] += r * (weight[d] * dout_m[d] - inp_m[d] * r * mean);
    }
    #pragma omp parallel for
    for (size_t d0 = 0; d0 < D; d0 += CHANNEL_TILE) {
        size_t n = min_size(CHANNEL_TILE, D - d0);
        real sum[CHANNEL_TILE] = {0};
        for (size_t m = 0; m < M; m++) {
            const real *inp_m = inp + m * D + d0, *dout_m = dout + m * D + d0;
            for (size_t d = 0; d < n; d++) sum[d] += dout_m[d] * inp_m[d] * rstd[m];
        }
        for (size_t d = 0; d < n; d++) dweight[d0 + d] += sum[d];
    }
}

// residual_forward: out = a + b, n elements; out may be a. Its backward is the identity to both (see the
// blocks).
void residual_forward(real* out, const real* a, const real* b, size_t n) {
    #pragma omp parallel for simd if (parallel : n > 16384)
    for (size_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}

// copy_columns: n numbers of each of M rows, from row stride lds to row stride ldd
void copy_columns(real* dst, size_t ldd, const real* src, size_t lds, size_t M, size_t n) {
    #pragma omp parallel for if (M * n > 16384)
    for (size_t m = 0; m < M; m++) memcpy(dst + m * ldd, src + m * lds, n * sizeof(real));
}

// conv_row: the input row that a tap reads at time s for an output of document `id`, or NULL when the tap
// sees nothing: before the start without a tail, or across a document boundary. The tail belongs to document
// 0.
static inline const real* conv_row(const real* inp, size_t ldi, const real* tail, const int* doc, size_t b,
                                   ptrdiff_t s, int id, size_t T, size_t E, size_t K) {
    if (s < 0) return tail && id == 0 ? tail + (b * (K - 1) + (size_t)(s + (ptrdiff_t)K - 1)) * E : NULL;
    if (doc && doc[b * T + (size_t)s] != id) return NULL;
    return inp + (b * T + (size_t)s) * ldi;
}

enum { CONV_MAX_TAPS = 8 };

// causal_conv1d_forward: each channel sees its own last K inputs; then, with `silu`, the activation.
//   c_t[e] = bias[e] + sum_k weight[e,k] * inp_{t-K+1+k}[e]      out = silu(c), or c
//   tap K-1 is the current token
//   inp (B,T,E) with row stride ldi   weight (E,K)   bias (E) or NULL   doc (B,T) or NULL   out (B,T,E)
//   tail0, tailT (B,K-1,E): the K-1 inputs before t = 0 and before t = T, oldest first; either may be NULL,
//   they may be the same array; a tail holds only inputs of the last token's document, the rest is 0
//   saved for backward: nothing, c is recomputed        Mamba paper, section 3.4
static void causal_conv1d_share(real* out, real* tailT, const real* inp, size_t ldi, const real* tail0,
                                const real* weight, const real* bias, bool silu, const int* doc, size_t B,
                                size_t T, size_t E, size_t K) {
    size_t tiles = (E + CHANNEL_TILE - 1) / CHANNEL_TILE;
    #pragma omp for collapse(2)
    for (size_t b = 0; b < B; b++) {
        for (size_t tile = 0; tile < tiles; tile++) {
            size_t e0 = tile * CHANNEL_TILE, n = min_size(CHANNEL_TILE, E - e0);
            real w[CONV_MAX_TAPS][CHANNEL_TILE], c[CHANNEL_TILE];
            for (size_t k = 0; k < K; k++)
                for (size_t e = 0; e < n; e++) w[k][e] = weight[(e0 + e) * K + k];
            for (size_t t = 0; t < T; t++) {
                int id = doc ? doc[b * T + t] : 0;
                for (size_t e = 0; e < n; e++) c[e] = bias ? bias[e0 + e] : 0;
                for (size_t k = 0; k < K; k++) {
                    const real* row =
                        conv_row(inp, ldi, tail0, doc, b, (ptrdiff_t)(t + k) - (ptrdiff_t)K + 1, id, T, E, K);
                    if (!row) continue;
                    for (size_t e = 0; e < n; e++) c[e] += w[k][e] * row[e0 + e];
                }
                real* out_bt = out + (b * T + t) * E + e0;
                memcpy(out_bt, c, n * sizeof(real));
                if (!silu) continue;
                #pragma omp simd
                for (size_t e = 0; e < n; e++) out_bt[e] = silu_real(c[e]);
            }
            int id = doc ? doc[b * T + T - 1] : 0;
            for (size_t k = 0; tailT && k + 1 < K;
                 k++) {    // oldest first: in place, a row is read before it is overwritten
                const real* row =
                    conv_row(inp, ldi, tail0, doc, b, (ptrdiff_t)(T + k) - (ptrdiff_t)K + 1, id, T, E, K);
                for (size_t e = e0; e < e0 + n; e++) tailT[(b * (K - 1) + k) * E + e] = row ? row[e] : 0;
            }
        }
    }
}

void causal_conv1d_forward(real* out, real* tailT, const real* inp, size_t ldi, const real* tail0,
                           const real* weight, const real* bias, bool silu, const int* doc, size_t B,
                           size_t T, size_t E, size_t K) {
    #pragma omp parallel if (B * T * E * K > 8192)
    causal_conv1d_share(out, tailT, inp, ldi, tail0, weight, bias, silu, doc, B, T, E, K);
}

// forward: out = silu(c), or c                  =>  dc = dout * silu'(c), or dout
// forward: c_t = bias + sum_k w_k inp_{t-K+1+k}  =>  dbias += sum_t dc_t    dw_k += sum_t dc_t inp_{t-K+1+k}
//                                                    dinp_s += sum_k w_k dc_{s+K-1-k}
// forward: tailT = the last inputs              =>  the same rows of dinp (or dtail0) += dtailT
//   dtail0, dtailT, dbias may be NULL.  Parallel over channels only: the weight gradients sum over batch and
//   time.
void causal_conv1d_backward(real* dinp, size_t lddi, real* dweight, real* dbias, real* dtail0,
                            const real* dout, const real* dtailT, const real* inp, size_t ldi,
                            const real* tail0, const real* weight, const real* bias, bool silu,
                            const int* doc, size_t B, size_t T, size_t E, size_t K) {
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t e0 = 0; e0 < E; e0 += CHANNEL_TILE) {
        size_t n = min_size(CHANNEL_TILE, E - e0);
        real w[CONV_MAX_TAPS][CHANNEL_TILE], dw[CONV_MAX_TAPS][CHANNEL_TILE] = {{0}}, db[CHANNEL_TILE] = {0};
        for (size_t k = 0; k < K; k++)
            for (size_t e = 0; e < n; e++) w[k][e] = weight[(e0 + e) * K + k];
        for (size_t b = 0; b < B; b++) {
            for (size_t t = 0; t < T; t++) {
                int id = doc ? doc[b * T + t] : 0;
                const real* rows[CONV_MAX_TAPS];
                real c[CHANNEL_TILE], dc[CHANNEL_TILE];
                for (size_t e = 0; e < n; e++) c[e] = bias ? bias[e0 + e] : 0;
                for (size_t k = 0; k < K; k++) {
                    rows[k] =
                        conv_row(inp, ldi, tail0, doc, b, (ptrdiff_t)(t + k) - (ptrdiff_t)K + 1, id, T, E, K);
                    if (rows[k]) for (size_t e = 0; e < n; e++) c[e] += w[k][e] * rows[k][e0 + e];
                }
                const real* dout_bt = dout + (b * T + t) * E + e0;
                #pragma omp simd
                for (size_t e = 0; e < n; e++)
                    dc[e] = silu ? dout_bt[e] * silu_grad_real(c[e]) : dout_bt[e];
                for (size_t e = 0; e < n; e++) db[e] += dc[e];
                for (size_t k = 0; k < K; k++) {
                    if (!rows[k]) continue;
                    for (size_t e = 0; e < n; e++) dw[k][e] += dc[e] * rows[k][e0 + e];
                    real* drow = NULL;
                    if (t + k + 1 >= K) drow = dinp + (b * T + t + k + 1 - K) * lddi + e0;
                    else if (dtail0) drow = dtail0 + (b * (K - 1) + t + k) * E + e0;
                    if (drow) for (size_t e = 0; e < n; e++) drow[e] += w[k][e] * dc[e];
                }
            }
            int id = doc ? doc[b * T + T - 1] : 0;
            for (size_t k = 0; dtailT && k + 1 < K; k++) {
                if (!conv_row(inp, ldi, tail0, doc, b, (ptrdiff_t)(T + k) - (ptrdiff_t)K + 1, id, T, E, K))
                    continue;
                real* drow = NULL;
                if (T + k + 1 >= K) drow = dinp + (b * T + T + k + 1 - K) * lddi + e0;
                else if (dtail0) drow = dtail0 + (b * (K - 1) + T + k) * E + e0;
                if (drow) for (size_t e = 0; e < n; e++) drow[e] += dtailT[(b * (K - 1) + k) * E + e0 + e];
            }
        }
        for (size_t k = 0; k < K; k++)
            for (size_t e = 0; e < n; e++) dweight[(e0 + e) * K + k] += dw[k][e];
        for (size_t e = 0; dbias && e < n; e++) dbias[e0 + e] += db[e];
    }
}

// softplus_forward: out = log(1 + exp(inp)), the identity above 20.   inp, out (n), may be the same array
// saved for backward: out itself
// makes the step size dt positive: Mamba paper, section 3.2, algorithm 2
static void softplus_share(real* out, const real* inp, size_t n) {
    #pragma omp for simd
    for (size_t i = 0; i < n; i++) out[i] = softplus_real(inp[i]);
}

void softplus_forward(real* out, const real* inp, size_t n) {
    #pragma omp parallel if (n > 4096)
    softplus_share(out, inp, n);
}

// d softplus(p)/dp = sigma(p) = 1 - exp(-softplus(p)): the output is enough, the input need not be kept
void softplus_backward(real* dinp, const real* dout, const real* out, size_t n) {
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) dinp[i] -= dout[i] * expm1_neg_real(-out[i]);
}

// The selective scan works on tiles: SCAN_TILE neighbouring channels and SCAN_STATES entries of their
// states. The state of a tile lies in an array h[n][channel], so that one vector instruction serves many
// channels, Bt[n] and Ct[n] are the same number for all of them, and no sum runs across a vector. Tiles are
// independent of each other; nothing in the arithmetic of a tile depends on B, on the number of threads or
// on where a sequence is cut into calls. Whatever T, E and N are, the arrays fit in the first two caches and
// on the stack of a thread. Channels beyond E are computed as zeros.
// SCAN_CHUNK: forward saves the state every so many tokens, backward recomputes the states in between.
enum { SCAN_TILE = 32, SCAN_STATES = 16, SCAN_CHUNK = 32 };

// the largest finite number: A = -exp(A_log) stops here, so that dt * A with dt = 0 is 0 and not NaN
#define SCAN_MAX_DECAY ((real)(REAL_IS_DOUBLE ? DBL_MAX : FLT_MAX))

size_t scan_tiles(size_t E) { return (E + SCAN_TILE - 1) / SCAN_TILE; }
size_t scan_chunks(size_t T) { return (T + SCAN_CHUNK - 1) / SCAN_CHUNK; }

// saved: for every sequence, tile and chunk the state (N,SCAN_TILE) that enters the chunk
size_t selective_scan_saved(size_t B, size_t T, size_t E, size_t N) {
    return B * scan_tiles(E) * scan_chunks(T) * N * SCAN_TILE;
}

// scratch: dBt and dCt of every tile (tiles,B,T,2,N), dA_log and dDskip of every sequence (B,E,N), (B,E)
size_t selective_scan_scratch(size_t B, size_t T, size_t E, size_t N) {
    return scan_tiles(E) * B * T * 2 * N + B * E * N + B * E;
}

// the state of token t-1 does not reach token t when t begins another document
static inline bool scan_resets(const int* doc_b, size_t t) {
    return doc_b && doc_b[t] != (t == 0 ? 0 : doc_b[t - 1]);
}

// scan_load_lanes: the values of one token for the channels ("lanes") of a tile
static inline void scan_load_lanes(real* lane, const real* src, size_t lanes) {
    if (lanes == SCAN_TILE) {
        memcpy(lane, src, SCAN_TILE * sizeof(real));          // a constant size: a few vector moves
    } else {
        memset(lane, 0, SCAN_TILE * sizeof(real));
        memcpy(lane, src, lanes * sizeof(real));
    }
}

// scan_load_states: h[n][lane] from an array (E,N); src: the tile's first channel and n; NULL means zeros
static void scan_load_states(real (*h)[SCAN_TILE], const real* src, size_t states, size_t lanes, size_t N) {
    memset(h, 0, SCAN_STATES * sizeof h[0]);
    for (size_t l = 0; src && l < lanes; l++) {
        for (size_t n = 0; n < states; n++) h[n][l] = src[l * N + n];
    }
}

// scan_load_decay: A = -exp(A_log)
static void scan_load_decay(real (*A)[SCAN_TILE], const real* A_log, size_t states, size_t lanes, size_t N) {
    scan_load_states(A, A_log, states, lanes, N);
    for (size_t n = 0; n < states; n++) {
        #pragma omp simd
        for (size_t l = 0; l < SCAN_TILE; l++) {
            real decay = exp_real(A[n][l]);
            A[n][l] = -(decay > SCAN_MAX_DECAY ? SCAN_MAX_DECAY : decay);
        }
    }
}

// selective_scan_forward: the Mamba-1 recurrence, one state h[e,:] of length N per channel.
//   (F5) a_t = exp(dt_t A),  A = -exp(A_log)          a, h (E,N) per token; a_t := 0 where a document begins
//   (F6) h_t = a_t h_{t-1} + (dt_t x_t) Bt_t
//   (F7) y_t = sum_n Ct_t[n] h_t[:,n] + Dskip x_t
//   x, dt, y (B,T,E)   A_log (E,N)   Bt, Ct (B,T,N), row stride ldbc   Dskip (E)
//   h0, hT (B,E,N), each may be NULL, may be one array   doc (B,T) or NULL: document ids; h0 is of document 0
//   saved for backward: hs, the state that enters every chunk; NULL when there will be no backward
//   Mamba paper (arXiv 2312.00752), section 3.2, algorithm 2
static void selective_scan_share(real* y, real* hs, real* hT, const real* x, const real* dt,
                                 const real* A_log, const real* Bt, const real* Ct, size_t ldbc,
                                 const real* Dskip, const real* h0, const int* doc, size_t B, size_t T,
                                 size_t E, size_t N) {
    size_t tiles = scan_tiles(E), chunks = scan_chunks(T);
    #pragma omp for collapse(2) schedule(static)
    for (size_t b = 0; b < B; b++) {
        for (size_t tile = 0; tile < tiles; tile++) {
            size_t e0 = tile * SCAN_TILE, lanes = min_size(E - e0, SCAN_TILE);
            const int* doc_b = doc ? doc + b * T : NULL;
            real A[SCAN_STATES][SCAN_TILE], h[SCAN_STATES][SCAN_TILE], D_e[SCAN_TILE];
            real x_t[SCAN_TILE], dt_t[SCAN_TILE], dtx[SCAN_TILE], y_t[SCAN_TILE];
            scan_load_lanes(D_e, Dskip + e0, lanes);
            for (size_t n0 = 0; n0 < N; n0 += SCAN_STATES) {
                size_t states = min_size(N - n0, SCAN_STATES), state0 = (b * E + e0) * N + n0;
                scan_load_decay(A, A_log + e0 * N + n0, states, lanes, N);
                scan_load_states(h, h0 ? h0 + state0 : NULL, states, lanes, N);
                for (size_t t = 0; t < T; t++) {
                    size_t row = b * T + t, i = row * E + e0;
                    if (hs && t % SCAN_CHUNK == 0) {
                        size_t chunk = (b * tiles + tile) * chunks + t / SCAN_CHUNK;
                        memcpy(hs + (chunk * N + n0) * SCAN_TILE, h, states * sizeof h[0]);
                    }
                    if (scan_resets(doc_b, t)) memset(h, 0, sizeof h);
                    scan_load_lanes(x_t, x + i, lanes);
                    scan_load_lanes(dt_t, dt + i, lanes);
                    if (n0 > 0) scan_load_lanes(y_t, y + i, lanes);          // the sum over the n before n0
                    #pragma omp simd
                    for (size_t l = 0; l < SCAN_TILE; l++) {
                        dtx[l] = dt_t[l] * x_t[l];
                        y_t[l] = n0 > 0 ? y_t[l] : D_e[l] * x_t[l];
                    }
                    for (size_t n = 0; n < states; n++) {
                        real B_n = Bt[row * ldbc + n0 + n], C_n = Ct[row * ldbc + n0 + n];
                        #pragma omp simd
                        for (size_t l = 0; l < SCAN_TILE; l++) {
                            h[n][l] = exp_real(dt_t[l] * A[n][l]) * h[n][l] + dtx[l] * B_n;
                            y_t[l] += C_n * h[n][l];
                        }
                    }
                    memcpy(y + i, y_t, lanes * sizeof(real));
                }
                for (size_t l = 0; hT && l < lanes; l++) {
                    for (size_t n = 0; n < states; n++) hT[state0 + l * N + n] = h[n][l];
                }
            }
        }
    }
}

void selective_scan_forward(real* y, real* hs, real* hT, const real* x, const real* dt, const real* A_log,
                            const real* Bt, const real* Ct, size_t ldbc, const real* Dskip, const real* h0,
                            const int* doc, size_t B, size_t T, size_t E, size_t N) {
    #pragma omp parallel if (B * T * E * N > 8192)
    selective_scan_share(y, hs, hT, x, dt, A_log, Bt, Ct, ldbc, Dskip, h0, doc, B, T, E, N);
}

// scan_chunk_states: one chunk of the forward once more, for backward: a_t and m_t = a_t h_{t-1} of its
// tokens.
//   x, dt, Bt: at the first token of the chunk, t0   a, m (count,SCAN_STATES,SCAN_TILE)
static void scan_chunk_states(real (*a)[SCAN_STATES][SCAN_TILE], real (*m)[SCAN_STATES][SCAN_TILE],
                              const real* hs_chunk, real (*A)[SCAN_TILE], const real* x, const real* dt,
                              const real* Bt, size_t ldbc, const int* doc_b, size_t t0, size_t count,
                              size_t states, size_t lanes, size_t E) {
    real h[SCAN_STATES][SCAN_TILE], x_t[SCAN_TILE], dt_t[SCAN_TILE];
    memcpy(h, hs_chunk, states * sizeof h[0]);
    for (size_t i = 0; i < count; i++) {
        if (scan_resets(doc_b, t0 + i)) memset(h, 0, sizeof h);
        scan_load_lanes(x_t, x + i * E, lanes);
        scan_load_lanes(dt_t, dt + i * E, lanes);
        for (size_t n = 0; n < states; n++) {
            real B_n = Bt[i * ldbc + n];
            #pragma omp simd
            for (size_t l = 0; l < SCAN_TILE; l++) {
                a[i][n][l] = exp_real(dt_t[l] * A[n][l]);
                m[i][n][l] = a[i][n][l] * h[n][l];
                h[n][l] = m[i][n][l] + dt_t[l] * x_t[l] * B_n;
            }
        }
    }
}

// scan_token_backward: one token of one tile. lambda_t is dLoss/dh_t: the state receives it from y_t and from
// h_{t+1}, whose share a_{t+1} lambda_{t+1} is in `carry`, and hands it on to what h_t was made of.
//   forward (F7) y_t = sum_n C_n h_t + ..   lambda = dy C_n + carry     dC_n = sum_l dy h_t
//   forward (F6) h_t = m_t + dt x B_n       dB_n = sum_l lambda dt x    dx += dt sum_n lambda B_n
//                                           ddt += x sum_n lambda B_n
//   forward (F5) m_t = exp(dt A) h_{t-1}    ddt += sum_n lambda A m_t   dA += lambda dt m_t
// The sums over the channels of the tile go to dBC (2,N), the two sums over n to lambda_B and lambda_Am.
static void scan_token_backward(real* dBC, real (*dA)[SCAN_TILE], real (*carry)[SCAN_TILE], real* lambda_B,
                                real* lambda_Am, const real* dy_t, real (*a)[SCAN_TILE], real (*m)[SCAN_TILE],
                                real (*A)[SCAN_TILE], const real* x_t, const real* dt_t, const real* B_t,
                                const real* C_t, size_t states, size_t N) {
    for (size_t n = 0; n < states; n++) {
        real B_n = B_t[n], C_n = C_t[n], dB_n = 0, dC_n = 0;
        #pragma omp simd reduction(+:dB_n, dC_n)
        for (size_t l = 0; l < SCAN_TILE; l++) {
            real dtx = dt_t[l] * x_t[l];
            real lambda = dy_t[l] * C_n + carry[n][l];
            real lambda_m = lambda * m[n][l];
            dC_n += dy_t[l] * (m[n][l] + dtx * B_n);
            dB_n += lambda * dtx;
            lambda_B[l] += lambda * B_n;
            lambda_Am[l] += lambda_m * A[n][l];
            dA[n][l] += lambda_m * dt_t[l];
            carry[n][l] = a[n][l] * lambda;
        }
        dBC[n] = dB_n;
        dBC[N + n] = dC_n;
    }
}

// scan_sum_parts: the sums over sequences (dA_log, dDskip) and over tiles (dBt, dCt), in a fixed order
static void scan_sum_parts(real* dA_log, real* dBt, real* dCt, size_t lddbc, real* dDskip,
                           const real* dBC_part, const real* dA_part, const real* dD_part,
                           size_t B, size_t T, size_t E, size_t N) {
    #pragma omp parallel for schedule(static)
    for (size_t e = 0; e < E; e++) {
        for (size_t b = 0; b < B; b++) {
            dDskip[e] += dD_part[b * E + e];
            for (size_t n = 0; n < N; n++) dA_log[e * N + n] += dA_part[(b * E + e) * N + n];
        }
    }
    #pragma omp parallel for schedule(static)
    for (size_t row = 0; row < B * T; row++) {
        for (size_t tile = 0; tile < scan_tiles(E); tile++) {
            const real* dBC = dBC_part + (tile * B * T + row) * 2 * N;
            for (size_t n = 0; n < N; n++) dBt[row * lddbc + n] += dBC[n];
            for (size_t n = 0; n < N; n++) dCt[row * lddbc + n] += dBC[N + n];
        }
    }
}

// selective_scan_backward: from the last chunk to the first; in a chunk the states are recomputed forward,
// then lambda runs from its last token to its first (scan_token_backward). Outside of that is only:
//   forward (F7) y_t = .. + Dskip x_t       dx += Dskip dy,  dDskip += sum_{b,t} dy x
//   forward (F5) A = -exp(A_log)            dA_log += dA A
//   forward (F6) h_0 = a_0 h0 + ..          dh0 += a_0 lambda_0: the last `carry`; the first is dhT
//   dx, ddt, dy (B,T,E)   dA_log (E,N)   dBt, dCt (B,T,N), row stride lddbc   dDskip (E)
//   dh0, dhT (B,E,N), each may be NULL   hs: as forward left it   scratch: selective_scan_scratch() elements
// Every gradient is added to what is there.
void selective_scan_backward(real* dx, real* ddt, real* dA_log, real* dBt, real* dCt, size_t lddbc,
                             real* dDskip, real* dh0, const real* dy, const real* dhT, const real* hs,
                             const real* x, const real* dt, const real* A_log, const real* Bt, const real* Ct,
                             size_t ldbc, const real* Dskip, const int* doc, real* scratch,
                             size_t B, size_t T, size_t E, size_t N) {
    size_t tiles = scan_tiles(E), chunks = scan_chunks(T);
    real* dBC_part = scratch;                                  // (tiles,B,T,2,N)
    real* dA_part = dBC_part + tiles * B * T * 2 * N;          // (B,E,N)
    real* dD_part = dA_part + B * E * N;                       // (B,E)
    #pragma omp parallel for collapse(2) schedule(static) if (B * tiles > 1)
    for (size_t b = 0; b < B; b++) {
        for (size_t tile = 0; tile < tiles; tile++) {
            size_t e0 = tile * SCAN_TILE, lanes = min_size(E - e0, SCAN_TILE);
            const int* doc_b = doc ? doc + b * T : NULL;
            real a[SCAN_CHUNK][SCAN_STATES][SCAN_TILE], m[SCAN_CHUNK][SCAN_STATES][SCAN_TILE];
            real A[SCAN_STATES][SCAN_TILE], dA[SCAN_STATES][SCAN_TILE], carry[SCAN_STATES][SCAN_TILE];
            real x_t[SCAN_TILE], dt_t[SCAN_TILE], dy_t[SCAN_TILE];
            real lambda_B[SCAN_TILE], lambda_Am[SCAN_TILE];
            for (size_t l = 0; l < lanes; l++) dD_part[b * E + e0 + l] = 0;
            for (size_t n0 = 0; n0 < N; n0 += SCAN_STATES) {
                size_t states = min_size(N - n0, SCAN_STATES), state0 = (b * E + e0) * N + n0;
                scan_load_decay(A, A_log + e0 * N + n0, states, lanes, N);
                scan_load_states(carry, dhT ? dhT + state0 : NULL, states, lanes, N);
                memset(dA, 0, sizeof dA);
                for (size_t chunk = chunks; chunk-- > 0;) {
                    size_t t0 = chunk * SCAN_CHUNK, count = min_size(T - t0, SCAN_CHUNK), row0 = b * T + t0;
                    const real* hs_chunk = hs + (((b * tiles + tile) * chunks + chunk) * N + n0) * SCAN_TILE;
                    scan_chunk_states(a, m, hs_chunk, A, x + row0 * E + e0, dt + row0 * E + e0,
                                      Bt + row0 * ldbc + n0, ldbc, doc_b, t0, count, states, lanes, E);
                    for (size_t t = count; t-- > 0;) {         // t counts from the start of the chunk
                        size_t row = row0 + t, i = row * E + e0;
                        scan_load_lanes(x_t, x + i, lanes);
                        scan_load_lanes(dt_t, dt + i, lanes);
                        scan_load_lanes(dy_t, dy + i, lanes);
                        memset(lambda_B, 0, sizeof lambda_B);
                        memset(lambda_Am, 0, sizeof lambda_Am);
                        scan_token_backward(dBC_part + (tile * B * T + row) * 2 * N + n0, dA, carry, lambda_B,
                                            lambda_Am, dy_t, a[t], m[t], A, x_t, dt_t, Bt + row * ldbc + n0,
                                            Ct + row * ldbc + n0, states, N);
                        if (scan_resets(doc_b, t0 + t)) memset(carry, 0, sizeof carry);
                        for (size_t l = 0; l < lanes; l++) {
                            dx[i + l] += dt_t[l] * lambda_B[l];
                            ddt[i + l] += x_t[l] * lambda_B[l] + lambda_Am[l];
                        }
                        for (size_t l = 0; n0 == 0 && l < lanes; l++) {      // the skip, once
                            dx[i + l] += Dskip[e0 + l] * dy_t[l];
                            dD_part[b * E + e0 + l] += dy_t[l] * x_t[l];
                        }
                    }
                }
                for (size_t l = 0; l < lanes; l++) {
                    for (size_t n = 0; n < states; n++) {
                        dA_part[state0 + l * N + n] = dA[n][l] * A[n][l];
                        if (dh0) dh0[state0 + l * N + n] += carry[n][l];
                    }
                }
            }
        }
    }
    scan_sum_parts(dA_log, dBt, dCt, lddbc, dDskip, dBC_part, dA_part, dD_part, B, T, E, N);
}

// gate_forward: out = y * silu(z).   y (M,E) row stride ldy   z (M,E) row stride ldz   out (M,E)
// The output gate of a Mamba mixer (Mamba paper, section 3.4) and, with y = up and z = gate, the gated MLP.
static void gate_share(real* out, const real* y, size_t ldy, const real* z, size_t ldz, size_t M, size_t E) {
    #pragma omp for
    for (size_t m = 0; m < M; m++) {
        const real *y_m = y + m * ldy, *z_m = z + m * ldz;
        #pragma omp simd
        for (size_t e = 0; e < E; e++) out[m * E + e] = y_m[e] * silu_real(z_m[e]);
    }
}

void gate_forward(real* out, const real* y, size_t ldy, const real* z, size_t ldz, size_t M, size_t E) {
    #pragma omp parallel if (M > 16)
    gate_share(out, y, ldy, z, ldz, M, E);
}

// out = y * silu(z)  =>  dy += dout * silu(z)     dz += dout * y * silu'(z)
void gate_backward(real* dy, size_t lddy, real* dz, size_t lddz, const real* dout, const real* y, size_t ldy,
                   const real* z, size_t ldz, size_t M, size_t E) {
    #pragma omp parallel for
    for (size_t m = 0; m < M; m++) {
        const real *y_m = y + m * ldy, *z_m = z + m * ldz, *dout_m = dout + m * E;
        real *dy_m = dy + m * lddy, *dz_m = dz + m * lddz;
        #pragma omp simd
        for (size_t e = 0; e < E; e++) {
            dy_m[e] += dout_m[e] * silu_real(z_m[e]);
            dz_m[e] += dout_m[e] * y_m[e] * silu_grad_real(z_m[e]);
        }
    }
}

// dt_softplus_forward: the step size of Mamba-2, one number per token and head.
//   (S2) dt = clip(softplus(dt_raw + dt_bias), lo, hi)        lo = 0, hi = infinity: no limit
//   dt_raw (M,H), row stride ldr (columns of the input projection)   dt_bias (H)   dt (M,H), M = B*T
//   saved for backward: nothing, softplus is made again        Mamba-2 code, argument dt_limit
void dt_softplus_forward(real* dt, const real* dt_raw, size_t ldr, const real* dt_bias, real lo, real hi,
                         size_t M, size_t H) {
    #pragma omp parallel for if (M * H > 4096)
    for (size_t m = 0; m < M; m++) {
        #pragma omp simd
        for (size_t h = 0; h < H; h++) {
            real s = softplus_real(dt_raw[m * ldr + h] + dt_bias[h]);
            s = s < lo ? lo : s;
            dt[m * H + h] = s > hi ? hi : s;
        }
    }
}

// s = softplus(p), p = dt_raw + dt_bias  =>  ddt_raw += ddt (1 - exp(-s)), nothing where s was clipped
//                                            ddt_bias += sum_m of the same
void dt_softplus_backward(real* ddt_raw, size_t lddr, real* ddt_bias, const real* ddt, const real* dt_raw,
                          size_t ldr, const real* dt_bias, real lo, real hi, size_t M, size_t H) {
    #pragma omp parallel for
    for (size_t h0 = 0; h0 < H; h0 += CHANNEL_TILE) {
        size_t n = min_size(CHANNEL_TILE, H - h0);
        real sum[CHANNEL_TILE] = {0};
        for (size_t m = 0; m < M; m++) {
            const real *raw = dt_raw + m * ldr + h0, *bias = dt_bias + h0, *ddt_m = ddt + m * H + h0;
            real* draw = ddt_raw + m * lddr + h0;
            #pragma omp simd
            for (size_t h = 0; h < n; h++) {
                real s = softplus_real(raw[h] + bias[h]);
                real dp = s < lo || s > hi ? 0 : -ddt_m[h] * expm1_neg_real(-s);
                draw[h] += dp;
                sum[h] += dp;
            }
        }
        for (size_t h = 0; h < n; h++) ddt_bias[h0 + h] += sum[h];
    }
}

// ssd_rate: A = -exp(A_log) of a head, finite (see SCAN_MAX_DECAY)
static inline real ssd_rate(real A_log) {
    real rate = exp_real(A_log);
    return -(rate > SCAN_MAX_DECAY ? SCAN_MAX_DECAY : rate);
}

// ssd_decay: (S3) a_t = exp(dt_t A); 0 where a document begins, which hides from it all that was before
static inline real ssd_decay(real A, real dt, const int* doc_b, size_t t) {
    return scan_resets(doc_b, t) ? 0 : exp_real(dt * A);
}

enum { SSD_MAX_STATES = 256 };      // config_check's limit of N

// ssd_recurrent_forward: the recurrence of Mamba-2 (SSD: state space duality). A head has P channels, each
// with a state of length N; all of them decay by one number. The heads of a group share Bt and Ct.
//   (S3) a_t = exp(dt_t A),  A = -exp(A_log)     one number per token and head; 0 where a document begins
//   (S4) H_t = a_t H_{t-1} + dt_t x_t Bt_t^T     (P,N) per head
//        y_t = H_t Ct_t + Dskip x_t
//   x (B,T,H,P), row stride ldx   dt (B,T,H)   A_log (H)   Bt, Ct (B,T,G,N), row stride ldbc; head h is of
//   group h G / H   Dskip (H), or (H,P) with D_has_hdim   y (B,T,H,P)
//   h0, hT (B,H,P,N), each may be NULL, may be one array   doc (B,T) or NULL: ids; h0 is of document 0
// It is what generation runs, and what the chunked form (ssd_forward) is proven against.
//   Mamba-2 paper (arXiv 2405.21060), section 3.1
void ssd_recurrent_forward(real* y, real* hT, const real* x, size_t ldx, const real* dt, const real* A_log,
                           const real* Bt, const real* Ct, size_t ldbc, const real* Dskip, bool D_has_hdim,
                           const real* h0, const int* doc, size_t B, size_t T, size_t H, size_t P, size_t G,
                           size_t N) {
    #pragma omp parallel for collapse(2) if (B * T * H * P * N > 8192)
    for (size_t b = 0; b < B; b++) {
        for (size_t h = 0; h < H; h++) {
            const int* doc_b = doc ? doc + b * T : NULL;
            size_t group = h * G / H * N;
            real A = ssd_rate(A_log[h]), state[SSD_MAX_STATES];
            for (size_t p = 0; p < P; p++) {            // the rows of H_t do not see each other
                size_t row = ((b * H + h) * P + p) * N;
                real D_p = Dskip[D_has_hdim ? h * P + p : h];
                for (size_t n = 0; n < N; n++) state[n] = h0 ? h0[row + n] : 0;
                for (size_t t = b * T; t < b * T + T; t++) {
                    const real *B_t = Bt + t * ldbc + group, *C_t = Ct + t * ldbc + group;
                    real x_t = x[t * ldx + h * P + p], dtx = dt[t * H + h] * x_t, sum = 0;
                    real a = ssd_decay(A, dt[t * H + h], doc_b, t - b * T);
                    #pragma omp simd reduction(+:sum)
                    for (size_t n = 0; n < N; n++) {
                        state[n] = a * state[n] + dtx * B_t[n];
                        sum += C_t[n] * state[n];
                    }
                    y[(t * H + h) * P + p] = sum + D_p * x_t;
                }
                for (size_t n = 0; hT && n < N; n++) hT[row + n] = state[n];
            }
        }
    }
}

// ssd_recurrent_backward: with lambda_t = dLoss/dH_t, from the last token to the first, row by row of H
//   forward y_t = H_t C_t + D x_t        lambda_t = dy_t C_t^T + a_{t+1} lambda_{t+1}, the last is dhT
//                                        dC_t += H_t^T dy_t     dx_t += D dy_t     dD += dy_t x_t
//   forward H_t = a_t H_{t-1} + dt x B   dx_t += dt lambda_t B_t     dB_t += dt lambda_t^T x_t
//                                        ddt_t += x_t^T lambda_t B_t     dh0 += a_0 lambda_0
//   forward a_t = exp(dt_t A)            dalpha = a_t <lambda_t, H_{t-1}>, alpha = dt_t A
//                                        ddt_t += A dalpha     dA_log += A dt_t dalpha
//   shapes as in forward; dy (B,T,H,P)   dx, dBt, dCt with row strides lddx, lddbc   dh0, dhT may be NULL
void ssd_recurrent_backward(real* dx, size_t lddx, real* ddt, real* dA_log, real* dBt, real* dCt,
                            size_t lddbc, real* dDskip, real* dh0, const real* dy, const real* dhT,
                            const real* x, size_t ldx, const real* dt, const real* A_log, const real* Bt,
                            const real* Ct, size_t ldbc, const real* Dskip, bool D_has_hdim, const real* h0,
                            const int* doc, size_t B, size_t T, size_t H, size_t P, size_t G, size_t N) {
    #pragma omp parallel for schedule(dynamic, 1)
    for (size_t g = 0; g < G; g++) {                    // no two groups add to one sum
        real* states = (real*)xcalloc((T + 1) * N, sizeof(real));      // H_{t-1}[p,:] at t*N
        for (size_t row = 0; row < B * H * P; row++) {
            size_t b = row / (H * P), h = row / P % H, p = row % P;
            if (h * G / H != g) continue;
            const int* doc_b = doc ? doc + b * T : NULL;
            real A = ssd_rate(A_log[h]), lambda[SSD_MAX_STATES], dA = 0, dD = 0;
            size_t skip = D_has_hdim ? h * P + p : h;
            for (size_t n = 0; n < N; n++) states[n] = h0 ? h0[row * N + n] : 0;
            for (size_t n = 0; n < N; n++) lambda[n] = dhT ? dhT[row * N + n] : 0;
            for (size_t t = 0; t < T; t++) {
                size_t i = b * T + t;
                real a = ssd_decay(A, dt[i * H + h], doc_b, t), dtx = dt[i * H + h] * x[i * ldx + h * P + p];
                for (size_t n = 0; n < N; n++)
                    states[(t + 1) * N + n] = a * states[t * N + n] + dtx * Bt[i * ldbc + g * N + n];
            }
            for (size_t t = T; t-- > 0;) {
                size_t i = b * T + t;
                const real *B_t = Bt + i * ldbc + g * N, *C_t = Ct + i * ldbc + g * N, *H_t = states + t * N;
                real *dB_t = dBt + i * lddbc + g * N, *dC_t = dCt + i * lddbc + g * N;
                real x_t = x[i * ldx + h * P + p], dt_t = dt[i * H + h], dy_t = dy[(i * H + h) * P + p];
                real a = ssd_decay(A, dt_t, doc_b, t), lambda_B = 0, lambda_H = 0;
                #pragma omp simd reduction(+:lambda_B, lambda_H)
                for (size_t n = 0; n < N; n++) {
                    real l = dy_t * C_t[n] + lambda[n];
                    dC_t[n] += dy_t * H_t[N + n];
                    dB_t[n] += dt_t * x_t * l;
                    lambda_B += l * B_t[n];
                    lambda_H += l * H_t[n];
                    lambda[n] = a * l;
                }
                dx[i * lddx + h * P + p] += dt_t * lambda_B + Dskip[skip] * dy_t;
                ddt[i * H + h] += x_t * lambda_B + A * (a * lambda_H);
                dA += dt_t * (a * lambda_H);
                dD += dy_t * x_t;
            }
            dA_log[h] += A * dA;
            dDskip[skip] += dD;
            for (size_t n = 0; dh0 && n < N; n++) dh0[row * N + n] += lambda[n];
        }
        free(states);
    }
}

// The chunked form of SSD, with which training and prefill run: Q tokens at a time, all inner loops are small
// matrix products. With i and j counting the q <= Q tokens of chunk c, H_c (P,N) the state it starts from,
//   L_ij = a_{j+1} .. a_i  for j <= i, else 0       how much of token j's input is left at token i
//   in_i = a_0 .. a_i,  out_j = a_{j+1} .. a_{q-1}  the same from the entering state, and to the chunk's end
//   M_ij = (C_i . B_j) L_ij dt_j                    attention whose softmax is a mask of decays
// the recurrence is, without a loop over tokens,
//   y_i = sum_{j<=i} M_ij x_j + in_i H_c C_i + D x_i      H_{c+1} = in_{q-1} H_c + sum_j out_j dt_j x_j B_j^T
// L, in and out are products of factors between 0 and 1, made one factor at a time: exact to rounding, where
// the exponential of a difference of cumulative sums loses digits to their size. A document's first a is 0,
// so the zeros of all masks come by themselves. Products too small to matter become 0: a processor is slow
// on denormal numbers.    Mamba-2 paper (arXiv 2405.21060), section 6, listing 1
enum { SSD_MAX_CHUNK = 256 };       // the largest Q
enum { SSD_CHUNK = 128 };   // the fastest of 16 .. 256 at N 128, P 64 (AMD EPYC, one thread); Q changes
                            // the result by rounding only

typedef struct { real dt[SSD_MAX_CHUNK], a[SSD_MAX_CHUNK], in[SSD_MAX_CHUNK], out[SSD_MAX_CHUNK]; } SsdDecay;

// ssd_times: NaN passes
static inline real ssd_times(real a, real b) { return a * b < (real)1e-30 ? 0 : a * b; }

// ssd_load_decay: the numbers of one head for q tokens, from token t0 of a sequence on; dt points there
static void ssd_load_decay(SsdDecay* d, const real* dt, size_t H, real A, const int* doc_b, size_t t0,
                           size_t q) {
    for (size_t i = 0; i < q; i++) {
        d->dt[i] = dt[i * H];
        d->a[i] = ssd_decay(A, d->dt[i], doc_b, t0 + i);
        d->in[i] = i ? ssd_times(d->in[i - 1], d->a[i]) : d->a[0];
    }
    for (size_t j = q; j-- > 0;) d->out[j] = j + 1 < q ? ssd_times(d->out[j + 1], d->a[j + 1]) : 1;
}

// ssd_load_mask: L (q,q)
static void ssd_load_mask(real* L, const real* a, size_t q) {
    memset(L, 0, q * q * sizeof(real));
    for (size_t i = 0; i < q; i++) {
        for (size_t j = 0; j < i; j++) L[i * q + j] = ssd_times(a[i], L[(i - 1) * q + j]);
        L[i * q + i] = 1;
    }
}

// ssd_scale_rows: out[i,:] = scale[i] dt[i] x[i,:], dt NULL: 1.   x (q,P), row stride ldx   out (q,P)
static void ssd_scale_rows(real* out, const real* scale, const real* dt, const real* x, size_t ldx, size_t q,
                           size_t P) {
    for (size_t i = 0; i < q; i++) {
        real s = dt ? scale[i] * dt[i] : scale[i];
        for (size_t p = 0; p < P; p++) out[i * P + p] = s * x[i * ldx + p];
    }
}

// matmul_one: matmul_add by the calling thread alone; `fill`: C starts at 0
static void matmul_one(real* C, size_t ldc, bool fill, const real* A, size_t ai, size_t al, const real* B,
                       size_t bl, size_t bj, size_t M, size_t N, size_t L) {
    for (size_t i = 0; fill && i < M; i++) memset(C + i * ldc, 0, N * sizeof(real));
    for (size_t i = 0; i < M; i += BLOCK_ROWS)
        matmul_block(C + i * ldc, ldc, A + i * ai, ai, al, B, bl, bj, min_size(BLOCK_ROWS, M - i), N, L);
}

static inline real dot_real(const real* a, const real* b, size_t n) {
    real sum = 0;
    #pragma omp simd reduction(+:sum)
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// Sizes of arrays that serve every call with at most B sequences and B*T tokens in all.
// saved: the state (H,P,N) that enters each chunk
size_t ssd_saved(size_t B, size_t T, size_t H, size_t P, size_t N, size_t Q) {
    return (B * T / Q + B) * H * P * N;
}

// scratch: a state and two parts of sums for each chunk, the matrices of all tasks side by side
size_t ssd_scratch(size_t B, size_t T, size_t H, size_t P, size_t G, size_t N, size_t Q) {
    size_t q = min_size(Q, T);
    return ssd_saved(B, T, H, P, N, Q) + (B * T / Q + B) * (H + H * P) +
           B * (T + q) * G * (4 * Q + 2 * P + N) + B * q * H * P;
}

// ssd_forward: as ssd_recurrent_forward, Q <= SSD_MAX_CHUNK tokens at a time.
//   first the states, chunk after chunk, each head by itself; then y, each chunk and group by itself
//   saved for backward: hs, ssd_saved() elements; NULL when there will be no backward
//   scratch: ssd_scratch() elements
void ssd_forward(real* y, real* hs, real* hT, const real* x, size_t ldx, const real* dt, const real* A_log,
                 const real* Bt, const real* Ct, size_t ldbc, const real* Dskip, bool D_has_hdim,
                 const real* h0, const int* doc, real* scratch, size_t B, size_t T, size_t H, size_t P,
                 size_t G, size_t N, size_t Q) {
    if (T == 1 && !hs) {                                // one token: the recurrence is the shortest way
        ssd_recurrent_forward(y, hT, x, ldx, dt, A_log, Bt, Ct, ldbc, Dskip, D_has_hdim, h0, doc, B, T, H, P,
                              G, N);
        return;
    }
    Q = min_size(Q, T);
    size_t chunks = (T + Q - 1) / Q, size = P * N, heads = H / G;
    real* work = hs ? scratch : scratch + B * chunks * H * size;
    if (!hs) hs = scratch;
    #pragma omp parallel for schedule(static)
    for (size_t bh = 0; bh < B * H; bh++) {
        size_t b = bh / H, h = bh % H;
        const real* B_g = Bt + b * T * ldbc + h / heads * N;
        real *xs = work + bh * Q * P, *state = hs + (b * chunks * H + h) * size;
        for (size_t n = 0; n < size; n++) state[n] = h0 ? h0[bh * size + n] : 0;
        for (size_t c = 0; c < chunks; c++, state += H * size) {
            size_t t0 = c * Q, q = min_size(Q, T - t0), row = b * T + t0;
            real* next = c + 1 < chunks ? state + H * size : hT ? hT + bh * size : NULL;
            SsdDecay d;
            if (!next) continue;
            ssd_load_decay(&d, dt + row * H + h, H, ssd_rate(A_log[h]), doc ? doc + b * T : NULL, t0, q);
            ssd_scale_rows(xs, d.out, d.dt, x + row * ldx + h * P, ldx, q, P);
            for (size_t n = 0; n < size; n++) next[n] = d.in[q - 1] * state[n];
            matmul_one(next, N, false, xs, 1, P, B_g + t0 * ldbc, ldbc, 1, P, N, q);
        }
    }
    #pragma omp parallel for schedule(dynamic, 1)
    for (size_t task = 0; task < B * chunks * G; task++) {
        size_t b = task / G / chunks, c = task / G % chunks, g = task % G;
        size_t t0 = c * Q, q = min_size(Q, T - t0), row = b * T + t0;
        const real *B_c = Bt + row * ldbc + g * N, *C_c = Ct + row * ldbc + g * N;
        real *CB = work + task * Q * (2 * Q + P), *M = CB + Q * Q, *CH = M + Q * Q;
        matmul_one(CB, q, true, C_c, ldbc, 1, B_c, 1, ldbc, q, q, N);
        for (size_t h = g * heads; h < (g + 1) * heads; h++) {
            const real *x_c = x + row * ldx + h * P, *state = hs + ((b * chunks + c) * H + h) * size;
            real* y_c = y + (row * H + h) * P;
            bool has_state = c > 0 || h0;
            SsdDecay d;
            ssd_load_decay(&d, dt + row * H + h, H, ssd_rate(A_log[h]), doc ? doc + b * T : NULL, t0, q);
            if (has_state) matmul_one(CH, P, true, C_c, ldbc, 1, state, 1, N, q, P, N);
            ssd_load_mask(M, d.a, q);
            for (size_t i = 0; i < q; i++) {
                for (size_t j = 0; j <= i; j++) M[i * q + j] *= CB[i * q + j] * d.dt[j];
                for (size_t p = 0; p < P; p++) {
                    y_c[i * H * P + p] = Dskip[D_has_hdim ? h * P + p : h] * x_c[i * ldx + p];
                    if (has_state) y_c[i * H * P + p] += d.in[i] * CH[i * P + p];
                }
            }
            matmul_one(y_c, H * P, false, M, q, 1, x_c, ldx, 1, q, P, q);
        }
    }
}

// ssd_chunk_backward: one chunk of one head, given the state H_c that enters it and the gradient lambda of
// the state that leaves it (each NULL: zero). i and j count tokens from the chunk's first; CB_ij = C_i . B_j.
//   forward y_i = sum_{j<=i} M_ij x_j + D x_i      Z_ij = dM_ij = dy_i . x_j     v_j = sum_i CB_ij L_ij dy_i
//   forward M_ij = CB_ij L_ij dt_j                 dCB_ij += L_ij dt_j Z_ij      W_ij = M_ij Z_ij
//   forward H_{c+1} = .. + sum_j out_j dt_j x_j B_j^T           v_j += out_j lambda B_j
//                                                               dB_j += out_j dt_j lambda^T x_j
//   forward y_i = .. + in_i H_c C_i                             dC_i += in_i H_c^T dy_i
//   dx_j += dt_j v_j + D dy_j     ddt_j += v_j . x_j     dD += dy_i x_i
// L, in and out are products of a_m = exp(alpha_m), alpha_m = dt_m A. What holds a_m as a factor counts in
//   dalpha_m = sum_{i>=m, j<m} W_ij + sum_{j<m} e_j + sum_{i>=m} f_i + in_{q-1} <lambda, H_c>
//   e_j = out_j dt_j x_j^T lambda B_j     f_i = in_i dy_i^T H_c C_i
// and ddt_m += A dalpha_m, dA += dt_m dalpha_m. (The shorter way, y . dy - dt ddt summed backward in time,
// subtracts numbers that are nearly equal: with |A| = 16 none of its digits is right in float.)
// Adds to the first arguments and returns A dA.
static real ssd_chunk_backward(real* dx, size_t lddx, real* ddt, real* dB, real* dC, size_t lddbc, real* dCB,
                               real* dD, const real* dy, const real* lambda, const real* state, const real* x,
                               size_t ldx, const SsdDecay* d, real A, const real* B_c, const real* C_c,
                               size_t ldbc, const real* CB, const real* D_h, size_t D_step, real* work,
                               size_t q, size_t H, size_t P, size_t N) {
    real *L = work, *Z = L + q * q, *v = Z + q * q, *xs = v + q * P, *dyH = xs + q * P, dA = 0;
    real e[SSD_MAX_CHUNK] = {0}, f[SSD_MAX_CHUNK] = {0}, S[SSD_MAX_CHUNK] = {0}, kappa = 0;
    size_t ldy = H * P;
    ssd_load_mask(L, d->a, q);
    matmul_one(Z, q, true, dy, ldy, 1, x, 1, ldx, q, q, P);
    if (lambda) {
        matmul_one(v, P, true, B_c, ldbc, 1, lambda, 1, N, q, P, N);
        ssd_scale_rows(v, d->out, NULL, v, P, q, P);
        for (size_t j = 0; j < q; j++) e[j] = d->dt[j] * dot_real(x + j * ldx, v + j * P, P);
        ssd_scale_rows(xs, d->out, d->dt, x, ldx, q, P);
        matmul_one(dB, lddbc, false, xs, P, 1, lambda, N, 1, q, N, P);
    } else {
        memset(v, 0, q * P * sizeof(real));
    }
    if (state) {
        matmul_one(dyH, N, true, dy, ldy, 1, state, N, 1, q, N, P);
        for (size_t i = 0; i < q; i++) {
            f[i] = d->in[i] * dot_real(dyH + i * N, C_c + i * ldbc, N);
            for (size_t n = 0; n < N; n++) dC[i * lddbc + n] += d->in[i] * dyH[i * N + n];
        }
    }
    if (state && lambda) kappa = d->in[q - 1] * dot_real(state, lambda, P * N);
    for (size_t i = 0; i < q; i++) {
        for (size_t j = 0; j <= i; j++) {
            size_t ij = i * q + j;
            real dCB_ij = L[ij] * d->dt[j] * Z[ij];
            dCB[ij] += dCB_ij;
            Z[ij] = dCB_ij * CB[ij];                   // W
            L[ij] *= CB[ij];
        }
    }
    matmul_one(v, P, false, L, 1, q, dy, ldy, 1, q, P, q);
    for (size_t j = 0; j < q; j++) {
        ddt[j * H] += dot_real(v + j * P, x + j * ldx, P);
        for (size_t p = 0; p < P; p++) {
            real dy_p = dy[j * ldy + p];
            dx[j * lddx + p] += d->dt[j] * v[j * P + p] + D_h[p * D_step] * dy_p;
            dD[p] += dy_p * x[j * ldx + p];
        }
    }
    for (size_t j = 1; j < q; j++) e[j] += e[j - 1];   // sums of e up to j, of f from i on
    for (size_t i = q - 1; i-- > 0;) f[i] += f[i + 1];
    for (size_t m = q; m-- > 0;) {                     // S_j = sum_{i>=m} W_ij
        real dalpha = kappa + f[m] + (m ? e[m - 1] : 0);
        for (size_t j = 0; j < m; j++) S[j] += Z[m * q + j];
        #pragma omp simd reduction(+:dalpha)
        for (size_t j = 0; j < m; j++) dalpha += S[j];
        ddt[m * H] += A * dalpha;
        dA += d->dt[m] * dalpha;
    }
    return A * dA;
}

// ssd_backward: first the gradients of the states, from the last chunk to the first, each head by itself:
//   forward y_i = .. + in_i H_c C_i,  H_{c+1} = in_{q-1} H_c + ..
//     =>  lambda_c = in_{q-1} lambda_{c+1} + sum_i in_i dy_i C_i^T,  the last is dhT,  dh0 += lambda_0
// then everything else, each chunk and group by itself (ssd_chunk_backward). The heads of a group add to the
// same dB, dC and dCB, one after the other; at last
//   forward CB_ij = C_i . B_j         =>  dC_i += sum_j dCB_ij B_j,  dB_j += sum_i dCB_ij C_i
//   hs: as forward left it   scratch: ssd_scratch() elements   all else as in the recurrent form
void ssd_backward(real* dx, size_t lddx, real* ddt, real* dA_log, real* dBt, real* dCt, size_t lddbc,
                  real* dDskip, real* dh0, const real* dy, const real* dhT, const real* hs, const real* x,
                  size_t ldx, const real* dt, const real* A_log, const real* Bt, const real* Ct, size_t ldbc,
                  const real* Dskip, bool D_has_hdim, const real* h0, const int* doc, real* scratch, size_t B,
                  size_t T, size_t H, size_t P, size_t G, size_t N, size_t Q) {
    Q = min_size(Q, T);
    size_t chunks = (T + Q - 1) / Q, size = P * N, heads = H / G, work_size = Q * (4 * Q + 2 * P + N);
    real* lambdas = scratch;                            // (B,chunks,H,P,N)
    real* dA_part = lambdas + B * chunks * H * size;    // (B,chunks,H)
    real* dD_part = dA_part + B * chunks * H;           // (B,chunks,H,P)
    real* work = dD_part + B * chunks * H * P;
    #pragma omp parallel for schedule(static)
    for (size_t bh = 0; bh < B * H; bh++) {
        size_t b = bh / H, h = bh % H;
        const real* C_g = Ct + b * T * ldbc + h / heads * N;
        real *dys = work + bh * Q * P, *lambda = lambdas + ((b * chunks + chunks - 1) * H + h) * size;
        for (size_t n = 0; n < size; n++) lambda[n] = dhT ? dhT[bh * size + n] : 0;
        for (size_t c = chunks; c-- > 0; lambda -= H * size) {
            size_t t0 = c * Q, q = min_size(Q, T - t0), row = b * T + t0;
            real* before = c ? lambda - H * size : dh0 ? dh0 + bh * size : NULL;
            SsdDecay d;
            if (!before) break;
            ssd_load_decay(&d, dt + row * H + h, H, ssd_rate(A_log[h]), doc ? doc + b * T : NULL, t0, q);
            ssd_scale_rows(dys, d.in, NULL, dy + (row * H + h) * P, H * P, q, P);
            for (size_t n = 0; n < size; n++) before[n] = (c ? 0 : before[n]) + d.in[q - 1] * lambda[n];
            matmul_one(before, N, false, dys, 1, P, C_g + t0 * ldbc, ldbc, 1, P, N, q);
        }
    }
    #pragma omp parallel for schedule(dynamic, 1)
    for (size_t task = 0; task < B * chunks * G; task++) {
        size_t b = task / G / chunks, c = task / G % chunks, g = task % G;
        size_t t0 = c * Q, q = min_size(Q, T - t0), row = b * T + t0;
        const real *B_c = Bt + row * ldbc + g * N, *C_c = Ct + row * ldbc + g * N;
        real *dB_c = dBt + row * lddbc + g * N, *dC_c = dCt + row * lddbc + g * N;
        real *CB = work + task * work_size, *dCB = CB + Q * Q;
        matmul_one(CB, q, true, C_c, ldbc, 1, B_c, 1, ldbc, q, q, N);
        memset(dCB, 0, q * q * sizeof(real));
        for (size_t h = g * heads; h < (g + 1) * heads; h++) {
            size_t chunk = (b * chunks + c) * H + h;
            real A = ssd_rate(A_log[h]), *dD = dD_part + chunk * P;
            SsdDecay d;
            ssd_load_decay(&d, dt + row * H + h, H, A, doc ? doc + b * T : NULL, t0, q);
            memset(dD, 0, P * sizeof(real));
            dA_part[chunk] = ssd_chunk_backward(
                dx + row * lddx + h * P, lddx, ddt + row * H + h, dB_c, dC_c, lddbc, dCB, dD,
                dy + (row * H + h) * P, c + 1 < chunks || dhT ? lambdas + chunk * size : NULL,
                c > 0 || h0 ? hs + chunk * size : NULL, x + row * ldx + h * P, ldx, &d, A, B_c, C_c, ldbc, CB,
                Dskip + (D_has_hdim ? h * P : h), D_has_hdim, dCB + Q * Q, q, H, P, N);
        }
        matmul_one(dC_c, lddbc, false, dCB, q, 1, B_c, ldbc, 1, q, N, q);
        matmul_one(dB_c, lddbc, false, dCB, 1, q, C_c, ldbc, 1, q, N, q);
    }
    #pragma omp parallel for if (H > 64)
    for (size_t h = 0; h < H; h++) {
        for (size_t bc = 0; bc < B * chunks; bc++) {
            dA_log[h] += dA_part[bc * H + h];
            for (size_t p = 0; p < P; p++)
                dDskip[D_has_hdim ? h * P + p : h] += dD_part[(bc * H + h) * P + p];
        }
    }
}

// gated_rmsnorm_forward: the norm of Mamba-2, over groups of S channels, with the gate before or behind it.
//   norm_before_gate = false:  w = y silu(z);   out = weight * w * rstd(w)          (all released models)
//   norm_before_gate = true:   out = weight * y * rstd(y) * silu(z)
//   rstd = (mean over the group of the squares + eps)^(-1/2)
//   y, out (M,E)   z (M,E), row stride ldz   weight (E)   E a multiple of S
//   saved for backward: rstd (M,E/S)        Mamba-2 paper (arXiv 2405.21060), section 7.2
void gated_rmsnorm_forward(real* out, real* rstd, const real* y, const real* z, size_t ldz,
                           const real* weight, size_t M, size_t E, size_t S, real eps,
                           bool norm_before_gate) {
    #pragma omp parallel for if (M > 16)
    for (size_t m = 0; m < M; m++) {
        for (size_t e0 = 0; e0 < E; e0 += S) {
            const real *y_m = y + m * E + e0, *z_m = z + m * ldz + e0;
            real *out_m = out + m * E + e0, sum = 0;
            #pragma omp simd
            for (size_t s = 0; s < S; s++) out_m[s] = y_m[s] * silu_real(z_m[s]);
            sum = norm_before_gate ? dot_real(y_m, y_m, S) : dot_real(out_m, out_m, S);
            real r = 1 / (real)sqrt((double)(sum / (real)S + eps));
            if (r == 0) r = (real)NAN;        // as in rmsnorm_forward
            for (size_t s = 0; s < S; s++) out_m[s] *= weight[e0 + s] * r;
            rstd[m * (E / S) + e0 / S] = r;
        }
    }
}

// With w = what is normalized, xhat = w rstd(w), q = the gradient of xhat:
//   xhat = w rstd(w)            =>  dw += rstd (q - xhat mean_s(q xhat)), mean over the group
//   gate first:  out = weight xhat, w = y silu(z)  =>  q = weight dout          dweight += dout xhat
//                                                      dy += dw silu(z)         dz += dw y silu'(z)
//   norm first:  out = weight xhat silu(z), w = y  =>  q = weight dout silu(z)  dweight += dout xhat silu(z)
//                                                      dy += dw         dz += weight dout xhat silu'(z)
// In both cases q xhat and the summand of dweight hold the same product: dout y silu(z) rstd.
void gated_rmsnorm_backward(real* dy, real* dz, size_t lddz, real* dweight, const real* dout, const real* y,
                            const real* z, size_t ldz, const real* weight, const real* rstd, size_t M,
                            size_t E, size_t S, bool norm_before_gate) {
    #pragma omp parallel for
    for (size_t m = 0; m < M; m++) {
        for (size_t e0 = 0; e0 < E; e0 += S) {
            const real *y_m = y + m * E + e0, *z_m = z + m * ldz + e0, *dout_m = dout + m * E + e0;
            const real* weight_g = weight + e0;
            real *dy_m = dy + m * E + e0, *dz_m = dz + m * lddz + e0;
            real r = rstd[m * (E / S) + e0 / S], dot[CHANNEL_TILE] = {0}, mean = 0;
            for (size_t s0 = 0; s0 < S; s0 += CHANNEL_TILE) {
                size_t n = min_size(CHANNEL_TILE, S - s0);
                #pragma omp simd
                for (size_t s = 0; s < n; s++)
                    dot[s] += weight_g[s0 + s] * dout_m[s0 + s] * (y_m[s0 + s] * silu_real(z_m[s0 + s]));
            }
            for (size_t s = 0; s < CHANNEL_TILE; s++) mean += dot[s] * r / (real)S;
            if (norm_before_gate) {
                #pragma omp simd
                for (size_t s = 0; s < S; s++) {
                    real q = weight_g[s] * dout_m[s];
                    dy_m[s] += r * (q * silu_real(z_m[s]) - y_m[s] * r * mean);
                    dz_m[s] += q * y_m[s] * r * silu_grad_real(z_m[s]);
                }
            } else {
                #pragma omp simd
                for (size_t s = 0; s < S; s++) {
                    real gate = silu_real(z_m[s]);
                    real dw = r * (weight_g[s] * dout_m[s] - y_m[s] * gate * r * mean);
                    dy_m[s] += dw * gate;
                    dz_m[s] += dw * y_m[s] * silu_grad_real(z_m[s]);
                }
            }
        }
    }
    size_t tiles = (S + CHANNEL_TILE - 1) / CHANNEL_TILE;              // of a group
    #pragma omp parallel for
    for (size_t i = 0; i < E / S * tiles; i++) {
        size_t group = i / tiles, s0 = i % tiles * CHANNEL_TILE, e0 = group * S + s0;
        size_t n = min_size(CHANNEL_TILE, S - s0);
        real sum[CHANNEL_TILE] = {0};
        for (size_t m = 0; m < M; m++) {
            const real *y_m = y + m * E + e0, *z_m = z + m * ldz + e0, *dout_m = dout + m * E + e0;
            real r = rstd[m * (E / S) + group];
            #pragma omp simd
            for (size_t e = 0; e < n; e++) sum[e] += dout_m[e] * (y_m[e] * silu_real(z_m[e])) * r;
        }
        for (size_t e = 0; e < n; e++) dweight[e0 + e] += sum[e];
    }
}

// Attention sees a document through one number per token: its position, the number of tokens of the same
// document before it. A token sees the positions 0 .. its own. Position p of the document of token t is token
// t - position[t] + p of the call or, where that is before the call, row p of the cache. So document ids and
// the number of cached tokens occur in token_positions only.
//
// token_positions: position (B,T)   position0 (B) or NULL: tokens of document 0 before the call   doc as ever
// Positions are whole numbers, which a float holds exactly up to 2^24.
void token_positions(real* position, const real* position0, const int* doc, size_t B, size_t T) {
    for (size_t b = 0; b < B; b++) {
        real next = position0 ? position0[b] : 0;
        for (size_t t = 0; t < T; t++) {
            if (scan_resets(doc ? doc + b * T : NULL, t)) next = 0;
            position[b * T + t] = next++;
        }
    }
}

enum { ATTENTION_MAX_HEAD = 256 };       // numbers per head, at most

// rotate: pairs of numbers of every head turn by the angle direction * position * theta_i, in place.
//   theta_i = base^(-2i/ro), i < ro/2: pairs (2i, 2i+1) when interleaved, else (i, i + ro/2); the rest stays
// The angles are made in double: at position 131,072 a float would be off by 0.004.
static void rotate(real* x, size_t ldx, const real* position, double direction, double base, bool interleaved,
                   size_t M, size_t H, size_t dh, size_t ro) {
    double theta[ATTENTION_MAX_HEAD / 2];
    size_t half = ro / 2, step = interleaved ? 2 : 1, partner = interleaved ? 1 : half;
    for (size_t i = 0; i < half; i++) theta[i] = direction * pow(base, -2.0 * (double)i / (double)ro);
    #pragma omp parallel for if (M * half > 256)
    for (size_t m = 0; m < M; m++) {
        real c[ATTENTION_MAX_HEAD / 2], s[ATTENTION_MAX_HEAD / 2];
        for (size_t i = 0; i < half; i++) {
            double angle = (double)position[m] * theta[i];
            c[i] = (real)cos(angle);
            s[i] = (real)sin(angle);
        }
        for (size_t h = 0; h < H; h++) {
            real *a = x + m * ldx + h * dh, *b = a + partner;
            for (size_t i = 0; i < half; i++) {
                real a_i = a[i * step], b_i = b[i * step];
                a[i * step] = a_i * c[i] - b_i * s[i];
                b[i * step] = a_i * s[i] + b_i * c[i];
            }
        }
    }
}

// rotary_forward: x (M,H,dh), row stride ldx, turned in place; <q_i, k_j> of turned vectors depends on i - j.
//   saved for backward: nothing        Su et al., RoFormer (arXiv 2104.09864), section 3.2.2
void rotary_forward(real* x, size_t ldx, const real* position, double base, bool interleaved, size_t M,
                    size_t H, size_t dh, size_t ro) {
    rotate(x, ldx, position, 1, base, interleaved, M, H, dh, ro);
}

// x' = R x  =>  dx = R^T dx', and the transpose of a rotation turns back. In place like the forward: dx' is
// replaced, not added to.
void rotary_backward(real* dx, size_t lddx, const real* position, double base, bool interleaved, size_t M,
                     size_t H, size_t dh, size_t ro) {
    rotate(dx, lddx, position, -1, base, interleaved, M, H, dh, ro);
}

// Attention works on tiles: the scores of ATTENTION_ROWS neighbouring tokens with ATTENTION_KEYS neighbouring
// positions of their document. Tiles of keys start at multiples of ATTENTION_KEYS in the document, so a sum
// is split in the same places wherever the document was cut into calls.
enum { ATTENTION_ROWS = 64, ATTENTION_KEYS = 64 };

// KeyValues: where the keys and values of one KV head of one sequence lie; see token_positions
typedef struct {
    const real *k, *v, *cache;           // of the call (T,dh), row stride ld; cache (capacity,2,..) or NULL
    size_t ld, ld_cache, value;          // value: from a key in the cache to its value
} KeyValues;

static KeyValues key_values(const real* k, const real* v, size_t ldkv, const real* kv0, size_t capacity,
                            size_t b, size_t g, size_t T, size_t Hkv, size_t dh) {
    KeyValues x = {k + b * T * ldkv + g * dh, v + b * T * ldkv + g * dh,
                   kv0 ? kv0 + b * capacity * 2 * Hkv * dh + g * dh : NULL, ldkv, 2 * Hkv * dh, Hkv * dh};
    return x;
}

// kv_rows: n keys (or values) from position p on, rows at stride *ld. first: the token of position 0,
// negative when that is in the cache. Only rows from both sides of the edge of the cache are copied.
static const real* kv_rows(const KeyValues* x, bool values, ptrdiff_t first, size_t p, size_t n, size_t dh,
                           real* copy, size_t* ld) {
    const real *call = values ? x->v : x->k, *cache = x->cache;
    ptrdiff_t t = first + (ptrdiff_t)p;
    *ld = t >= 0 ? x->ld : x->ld_cache;
    if (t >= 0) return call + (size_t)t * x->ld;
    if (values) cache += x->value;
    if (t + (ptrdiff_t)n <= 0) return cache + p * x->ld_cache;
    for (size_t i = 0; i < n; i++, t++)
        memcpy(copy + i * dh, t < 0 ? cache + (p + i) * x->ld_cache : call + (size_t)t * x->ld,
               dh * sizeof(real));
    *ld = dh;
    return copy;
}

// same_document: how many of n tokens belong to the document of the first
static size_t same_document(const real* position, size_t n) {
    size_t i = 1;
    while (i < n && position[i] == position[i - 1] + 1) i++;
    return i;
}

// attention_scores: S(i,j) = scale <q_i, k_j>, j < keys; -infinity where row i does not see position p + j
static void attention_scores(real* S, const real* q, size_t ldq, const real* k, size_t ldk,
                             const real* position, size_t p, real scale, size_t rows, size_t keys,
                             size_t dh) {
    memset(S, 0, rows * ATTENTION_KEYS * sizeof(real));
    matmul_block(S, ATTENTION_KEYS, q, ldq, 1, k, 1, ldk, rows, keys, dh);
    for (size_t i = 0; i < rows; i++) {
        real* S_i = S + i * ATTENTION_KEYS;
        for (size_t j = 0; j < ATTENTION_KEYS; j++)
            S_i[j] = p + j <= (size_t)position[i] ? scale * S_i[j] : (real)-INFINITY;
    }
}

// attention_rows: `rows` tokens of one document and one head, tile of keys by tile of keys, with the running
// maximum max_i of the scores and the running sum of exp(S_ij - max_i)
//   position, q, out, lse: at the first of them   first: as in kv_rows
static void attention_rows(real* out, size_t ldo, real* lse, const real* q, size_t ldq, const KeyValues* x,
                           const real* position, ptrdiff_t first, real scale, size_t rows, size_t dh) {
    real S[ATTENTION_ROWS * ATTENTION_KEYS] __attribute__((aligned(64)));
    real copy[ATTENTION_KEYS * ATTENTION_MAX_HEAD], max[ATTENTION_ROWS], sum[ATTENTION_ROWS];
    size_t ld, seen = (size_t)position[rows - 1] + 1;          // keys that the last row sees
    for (size_t i = 0; i < rows; i++) {
        max[i] = (real)-INFINITY;
        sum[i] = 0;
        memset(out + i * ldo, 0, dh * sizeof(real));
    }
    for (size_t p = 0; p < seen; p += ATTENTION_KEYS) {
        size_t keys = min_size(ATTENTION_KEYS, seen - p);
        const real* k = kv_rows(x, false, first, p, keys, dh, copy, &ld);
        attention_scores(S, q, ldq, k, ld, position, p, scale, rows, keys, dh);
        for (size_t i = 0; i < rows; i++) {
            real *S_i = S + i * ATTENTION_KEYS, *out_i = out + i * ldo, top = max[i], tile_sum = 0;
            #pragma omp simd reduction(max:top)
            for (size_t j = 0; j < ATTENTION_KEYS; j++) top = S_i[j] > top ? S_i[j] : top;
            #pragma omp simd reduction(+:tile_sum)
            for (size_t j = 0; j < ATTENTION_KEYS; j++) {
                S_i[j] = exp_real(S_i[j] - top);
                tile_sum += S_i[j];
            }
            real shrink = exp_real(max[i] - top);              // what is there was made with the old maximum
            for (size_t d = 0; d < dh; d++) out_i[d] *= shrink;
            sum[i] = sum[i] * shrink + tile_sum;
            max[i] = top;
        }
        const real* v = kv_rows(x, true, first, p, keys, dh, copy, &ld);
        matmul_block(out, ldo, S, ATTENTION_KEYS, 1, v, ld, 1, rows, dh, keys);
    }
    for (size_t i = 0; i < rows; i++) {
        for (size_t d = 0; d < dh; d++) out[i * ldo + d] /= sum[i];
        lse[i] = max[i] + (real)log((double)sum[i]);
    }
}

// attention_forward: causal softmax attention of grouped heads; query head h uses KV head g = h Hkv / Hq.
//   P_ij = softmax_j(scale <q_i, k_j>) over the tokens j <= i of i's document       out_i = sum_j P_ij v_j
//   q, out (B,T,Hq,dh), row strides ldq, ldo   k, v (B,T,Hkv,dh), row stride ldkv   position: token_positions
//   kv0 (B,capacity,2,Hkv,dh): keys and values of the positions before the call; NULL when there are none
//   saved for backward: lse (B,Hq,T), the logarithm of the sum of exp(scores): P needs no T x T matrix
//   Vaswani et al. (1706.03762), section 3.2; groups: Ainslie et al. (2305.13245); running maximum:
//   Milakov and Gimelshein (1805.02867); tiles: Dao et al., FlashAttention (2205.14135)
void attention_forward(real* out, size_t ldo, real* lse, const real* q, size_t ldq, const real* k,
                       const real* v, size_t ldkv, const real* kv0, size_t capacity, const real* position,
                       real scale, size_t B, size_t T, size_t Hq, size_t Hkv, size_t dh) {
    size_t tiles = (T + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
    #pragma omp parallel for collapse(3) schedule(dynamic) if (B * Hq * T * (T + (kv0 ? capacity : 0)) > 1024)
    for (size_t b = 0; b < B; b++) {
        for (size_t h = 0; h < Hq; h++) {
            for (size_t tile = 0; tile < tiles; tile++) {
                KeyValues x = key_values(k, v, ldkv, kv0, capacity, b, h * Hkv / Hq, T, Hkv, dh);
                size_t end = min_size((tile + 1) * ATTENTION_ROWS, T);
                for (size_t t = tile * ATTENTION_ROWS, rows; t < end; t += rows) {
                    size_t row = b * T + t;
                    rows = same_document(position + row, end - t);
                    attention_rows(out + row * ldo + h * dh, ldo, lse + (b * Hq + h) * T + t,
                                   q + row * ldq + h * dh, ldq, &x, position + row,
                                   (ptrdiff_t)t - (ptrdiff_t)position[row], scale, rows, dh);
                }
            }
        }
    }
}

// attention_tile_backward: one tile of rows and one of keys of a head. P is made again from lse.
//   forward  out_i = sum_j P_ij v_j     =>  dv_j += sum_i P_ij dout_i           dP_ij = <dout_i, v_j>
//   forward  P_i = softmax(S_i)         =>  dS_ij = P_ij (dP_ij - delta_i)
//                                           delta_i = sum_j P_ij dP_ij = <dout_i, out_i>
//   forward  S_ij = scale <q_i, k_j>    =>  dq_i += scale sum_j dS_ij k_j       dk_j += scale sum_i dS_ij q_i
//   pointers at the first row; k, v, dk, dv (keys,dh) at position p, dk and dv contiguous
static void attention_tile_backward(real* dq, size_t lddq, real* dk, real* dv, const real* dout,
                                    const real* out, size_t ldo, const real* lse, const real* q, size_t ldq,
                                    const real* k, const real* v, size_t ldkv, const real* position,
                                    size_t p, real scale, size_t rows, size_t keys, size_t dh) {
    real P[ATTENTION_ROWS * ATTENTION_KEYS] __attribute__((aligned(64)));
    real dS[ATTENTION_ROWS * ATTENTION_KEYS] __attribute__((aligned(64))) = {0};
    attention_scores(P, q, ldq, k, ldkv, position, p, scale, rows, keys, dh);
    matmul_block(dS, ATTENTION_KEYS, dout, ldo, 1, v, 1, ldkv, rows, keys, dh);        // dP
    for (size_t i = 0; i < rows; i++) {
        real *P_i = P + i * ATTENTION_KEYS, *dS_i = dS + i * ATTENTION_KEYS, delta = 0;
        #pragma omp simd reduction(+:delta)
        for (size_t d = 0; d < dh; d++) delta += dout[i * ldo + d] * out[i * ldo + d];
        #pragma omp simd
        for (size_t j = 0; j < ATTENTION_KEYS; j++) {
            P_i[j] = exp_real(P_i[j] - lse[i]);
            dS_i[j] = scale * P_i[j] * (dS_i[j] - delta);
        }
    }
    matmul_block(dv, dh, P, 1, ATTENTION_KEYS, dout, ldo, 1, keys, dh, rows);
    matmul_block(dk, dh, dS, 1, ATTENTION_KEYS, q, ldq, 1, keys, dh, rows);
    matmul_block(dq, lddq, dS, ATTENTION_KEYS, 1, k, ldkv, 1, rows, dh, keys);
}

// attention_backward: tile of keys by tile of keys; each collects the gradients of its keys and values from
// the query heads that share them, one after the other, and their rows, then adds them where they belong.
//   dq (B,T,Hq,dh), row stride lddq   dk, dv (B,T,Hkv,dh), row stride lddkv   dkv0: of kv0, or NULL
//   dout like out, row stride ldo; the rest as in the forward. Every gradient is added to what is there.
void attention_backward(real* dq, size_t lddq, real* dk, real* dv, size_t lddkv, real* dkv0, const real* dout,
                        const real* out, size_t ldo, const real* lse, const real* q, size_t ldq,
                        const real* k, const real* v, size_t ldkv, const real* kv0, size_t capacity,
                        const real* position, real scale, size_t B, size_t T, size_t Hq, size_t Hkv,
                        size_t dh) {
    #pragma omp parallel for collapse(2) schedule(dynamic) if (B * Hq * T * T > 1024)
    for (size_t b = 0; b < B; b++) {
        for (size_t g = 0; g < Hkv; g++) {
            KeyValues x = key_values(k, v, ldkv, kv0, capacity, b, g, T, Hkv, dh);
            const real* position_b = position + b * T;
            real k_copy[ATTENTION_KEYS * ATTENTION_MAX_HEAD], v_copy[ATTENTION_KEYS * ATTENTION_MAX_HEAD];
            real dk_p[ATTENTION_KEYS * ATTENTION_MAX_HEAD], dv_p[ATTENTION_KEYS * ATTENTION_MAX_HEAD];
            for (size_t start = 0, end; start < T; start = end) {                      // documents
                end = start + same_document(position_b + start, T - start);
                ptrdiff_t first = (ptrdiff_t)start - (ptrdiff_t)position_b[start];
                size_t seen = (size_t)position_b[end - 1] + 1, ld;
                for (size_t p = 0; p < seen; p += ATTENTION_KEYS) {
                    size_t keys = min_size(ATTENTION_KEYS, seen - p);
                    ptrdiff_t key = first + (ptrdiff_t)p;            // the token of position p
                    const real* k_p = kv_rows(&x, false, first, p, keys, dh, k_copy, &ld);
                    const real* v_p = kv_rows(&x, true, first, p, keys, dh, v_copy, &ld);
                    memset(dk_p, 0, keys * dh * sizeof(real));
                    memset(dv_p, 0, keys * dh * sizeof(real));
                    for (size_t h = g * Hq / Hkv; h < (g + 1) * Hq / Hkv; h++) {
                        size_t t = key > (ptrdiff_t)start ? (size_t)key : start;
                        for (; t < end; t += ATTENTION_ROWS) {
                            size_t row = b * T + t;
                            attention_tile_backward(dq + row * lddq + h * dh, lddq, dk_p, dv_p,
                                                    dout + row * ldo + h * dh, out + row * ldo + h * dh, ldo,
                                                    lse + (b * Hq + h) * T + t, q + row * ldq + h * dh, ldq,
                                                    k_p, v_p, ld, position + row, p, scale,
                                                    min_size(ATTENTION_ROWS, end - t), keys, dh);
                        }
                    }
                    for (size_t j = 0; j < keys; j++, key++) {
                        size_t in_call = (b * T + (size_t)key) * lddkv + g * dh;
                        size_t in_cache = ((b * capacity + p + j) * 2 * Hkv + g) * dh;
                        real *dk_j = key >= 0 ? dk + in_call : dkv0 ? dkv0 + in_cache : NULL;
                        real *dv_j = key >= 0 ? dv + in_call : dkv0 ? dkv0 + in_cache + Hkv * dh : NULL;
                        for (size_t d = 0; dk_j && d < dh; d++) {
                            dk_j[d] += dk_p[j * dh + d];
                            dv_j[d] += dv_p[j * dh + d];
                        }
                    }
                }
            }
        }
    }
}

// kv_kept: after the call the cache holds the document of the last token: how many of its tokens were there
// before; *length: how many there are in all
static size_t kv_kept(const real* position_b, size_t T, size_t* length) {
    *length = (size_t)position_b[T - 1] + 1;
    return *length > T ? *length - T : 0;
}

// kv_append_forward: the cache and the number of tokens in it after the call. Behind them nothing is written.
//   kvT may be kv0, and then only the new rows are written; positionT (B)
void kv_append_forward(real* kvT, real* positionT, const real* kv0, const real* k, const real* v, size_t ldkv,
                       const real* position, size_t capacity, size_t B, size_t T, size_t Hkv, size_t dh) {
    size_t width = Hkv * dh;
    for (size_t b = 0; b < B; b++) {
        size_t length, kept = kv_kept(position + b * T, T, &length);
        if (length > capacity)
            die("attention: %zu tokens do not fit into a cache of %zu; raise --context", length, capacity);
        real* kvT_b = kvT + b * capacity * 2 * width;
        if (kvT != kv0 && kept)
            memcpy(kvT_b, kv0 + b * capacity * 2 * width, kept * 2 * width * sizeof(real));
        #pragma omp parallel for if (T > 64)
        for (size_t p = kept; p < length; p++) {
            size_t row = b * T + T - length + p;
            memcpy(kvT_b + p * 2 * width, k + row * ldkv, width * sizeof(real));
            memcpy(kvT_b + p * 2 * width + width, v + row * ldkv, width * sizeof(real));
        }
        positionT[b] = (real)length;
    }
}

// a row of kvT is a row of kv0 or of the call  =>  its gradient is added there; dkv0 may be NULL
void kv_append_backward(real* dk, real* dv, size_t lddkv, real* dkv0, const real* dkvT, const real* position,
                        size_t capacity, size_t B, size_t T, size_t Hkv, size_t dh) {
    size_t width = Hkv * dh;
    for (size_t b = 0; b < B; b++) {
        size_t length, kept = kv_kept(position + b * T, T, &length), cache = b * capacity * 2 * width;
        for (size_t i = 0; dkv0 && i < kept * 2 * width; i++) dkv0[cache + i] += dkvT[cache + i];
        for (size_t p = kept; p < length; p++) {
            size_t row = b * T + T - length + p;
            for (size_t i = 0; i < width; i++) {
                dk[row * lddkv + i] += dkvT[cache + p * 2 * width + i];
                dv[row * lddkv + i] += dkvT[cache + p * 2 * width + width + i];
            }
        }
    }
}

// crossentropy: the loss of each position and, unless dlogits is NULL, the gradient of scale * sum(losses).
//   losses[m] = logsumexp_v(logits[m,v]) - logits[m,target]
//   dlogits = scale * (softmax(logits) - onehot(target))
//   logits (M,V); targets (M), a negative target is ignored (loss 0, gradient 0); dlogits is WRITTEN and may
//   be logits
void crossentropy(real* losses, real* dlogits, const real* logits, const int* targets, real scale, size_t M,
                  size_t V) {
#pragma omp parallel for if (M > 1)
    for (size_t m = 0; m < M; m++) {
        const real* z = logits + m * V;
        real* dz = dlogits ? dlogits + m * V : NULL;
        int target = targets[m];
        losses[m] = 0;
        if (target < 0) {
            if (dz) memset(dz, 0, V * sizeof(real));
            continue;
        }
        real max = z[0], sum = 0;
        #pragma omp simd reduction(max:max)
        for (size_t v = 0; v < V; v++) max = z[v] > max ? z[v] : max;
        #pragma omp simd reduction(+:sum)
        for (size_t v = 0; v < V; v++) sum += exp_real(z[v] - max);
        losses[m] = (real)log((double)sum) + max - z[target];
        if (!dz) continue;
        real norm = scale / sum;
        #pragma omp simd
        for (size_t v = 0; v < V; v++) dz[v] = norm * exp_real(z[v] - max);
        dz[target] -= scale;
    }
}

// ---------------------------------------------------------------------------------------------------
// 5. Blocks: the residual sub-layers and the table of their kinds
//
// The model is a residual stream that sub-layers read (through an RMSNorm) and add to. A kind of sub-layer is
// one row of the table `kinds` at the end of this section: its parameters, the activations it saves for
// backward, the scratch it shares with the other layers, its recurrent state, and its two functions.
// Everything else (allocation, binding, initialization, checkpoints, optimizer groups, counts, memory print,
// test names) walks these tables.

// Symbolic sizes, so that a table can be written before the model is known.
enum { DIM_NONE, DIM_1, DIM_2, DIM_D, DIM_E, DIM_2E, DIM_N, DIM_K, DIM_R, DIM_R2N, DIM_F, DIM_2F, DIM_VP,
       DIM_K1, DIM_SCAN_SAVED, DIM_SCAN_SCRATCH,
       // Mamba-2: z0, x0, z, x, B, C, dt together; Es; x, B, C together; heads; their channels; groups; D;
       // E where Es < E
       DIM_IN2, DIM_ES, DIM_XBC, DIM_H, DIM_P, DIM_G, DIM_DSKIP, DIM_JOINED, DIM_SSD_SAVED, DIM_SSD_SCRATCH,
       // attention: q, k, v and MLP together; q, k, v; heads and MLP; heads; Hkv; dh; taps, taps - 1; cache
       DIM_IN_A, DIM_QKV, DIM_OUT_A, DIM_HQ, DIM_HKV, DIM_DH, DIM_KA, DIM_KA1, DIM_CONTEXT, DIM_MLP_A };

int64_t config_dim(const Config* c, int dim) {
    int64_t heads = c->headdim ? c->d_ssm / c->headdim : 0;        // H of Mamba-2
    switch (dim) {
        case DIM_1:   return 1;
        case DIM_2:   return 2;
        case DIM_D:   return c->d_model;
        case DIM_E:   return c->d_inner;
        case DIM_2E:  return 2 * c->d_inner;
        case DIM_N:   return c->d_state;
        case DIM_K:   return c->d_conv;
        case DIM_K1:  return c->d_conv - 1;
        case DIM_R:   return c->dt_rank;
        case DIM_R2N: return c->dt_rank + 2 * c->d_state;
        case DIM_F:   return c->d_intermediate;
        case DIM_2F:  return 2 * c->d_intermediate;
        case DIM_VP:  return c->vocab_padded;
        case DIM_IN2: return 2 * c->d_inner + 2 * c->ngroups * c->d_state + heads;
        case DIM_ES:  return c->d_ssm;
        case DIM_XBC: return c->d_ssm + 2 * c->ngroups * c->d_state;
        case DIM_H:   return heads;
        case DIM_P:   return c->headdim;
        case DIM_G:   return c->ngroups;
        case DIM_DSKIP: return c->D_has_hdim ? c->d_ssm : heads;
        case DIM_JOINED: return c->d_ssm < c->d_inner ? c->d_inner : 0;
        case DIM_IN_A:  return c->attn_head_dim * (c->attn_heads + 2 * c->attn_heads_kv) + c->attn_mlp;
        case DIM_QKV:   return c->attn_head_dim * (c->attn_heads + 2 * c->attn_heads_kv);
        case DIM_OUT_A: return c->attn_head_dim * c->attn_heads + c->attn_mlp / 2;
        case DIM_HQ:  return c->attn_heads;
        case DIM_HKV: return c->attn_heads_kv;
        case DIM_DH:  return c->attn_head_dim;
        case DIM_KA:  return c->attn_conv;
        case DIM_KA1: return c->attn_conv > 0 ? c->attn_conv - 1 : 0;
        case DIM_CONTEXT: return c->context;
        case DIM_MLP_A: return c->attn_mlp / 2;
    }
    return 0;
}

// How a parameter starts (Mamba code, state-spaces/mamba `mixer_seq_simple.py` and `mamba_simple.py`)
enum {
    INIT_NONE,
    INIT_ONE,
    INIT_EMBEDDING,    // normal, standard deviation initializer_range
    INIT_ZERO,
    INIT_LINEAR,       // uniform +-1/sqrt(fan_in), fan_in = the last dimension
    INIT_RESIDUAL,     // INIT_LINEAR / sqrt(n_layer): the sum of all layers keeps the size of one
    INIT_CONV,         // uniform +-1/sqrt(K), weight and bias: the fan_in of a depthwise convolution is K
    INIT_DT_WEIGHT,    // uniform +-dt_scale/sqrt(R), or that constant
    INIT_DT_BIAS,    // softplus(bias) is log-uniform in [dt_min, dt_max]: half-lives 0.4..700 tokens
    INIT_A_LOG,      // A[e,n] = -(n+1) in every channel (S4D-real)
    INIT_A_UNIFORM,  // A[h] = -uniform(A_low, A_high): Mamba-2
};

enum {
    DECAY = 1,          // AdamW weight decay: matrices only
    IF_BIAS = 2,        // exists only with config.bias
    IF_CONV_BIAS = 4,   // exists only with config.conv_bias
    BACKWARD_ONLY = 8,  // scratch that inference does not need
    CHEAP = 16,         // activation that backward can make again at little cost from the others
    IF_RMSNORM = 32,    // exists only with config.rmsnorm
    IF_ATTN_CONV = 64, IF_ATTN_IN_BIAS = 128, IF_ATTN_OUT_BIAS = 256,      // the same for attention
    TOKENS = 512,       // state: the number of tokens in a cache; it has no gradient
    RECURRENT = 1024,   // state: of a recurrence, see config.state_bf16
};

// What backward makes again instead of keeping it: nothing; the CHEAP activations; everything but the input
// of each layer, by running its forward again
enum { RECOMPUTE_NONE, RECOMPUTE_CHEAP, RECOMPUTE_ALL };      // the positions of --recompute

// TensorSpec: one row of a kind's table. Parameters have a full shape; activations and scratch are per token,
// (B*T) times the shape; state is per sequence, (B) times the shape. The rows stand in the order of the
// fields of the kind's struct of pointers, so binding a struct to memory is one loop over the table.
typedef struct {
    const char* name;
    int dim[4];
    int init, flags;
} TensorSpec;

// Run: what a block needs to know about the call.
typedef struct {
    const Config* config;
    size_t B, T;
    const int* doc;      // (B,T) document ids, or NULL: one document per row
    int recompute;       // RECOMPUTE_CHEAP: backward finds the CHEAP activations overwritten
    Dropout dropout;     // of what this sub-layer adds
    Half half;           // the weight matrices
} Run;

// ------------------------------------------------------------------------------------------------
// 5.1 Mamba-1

typedef struct {
    real *norm;                        // (D)
    real *in_proj, *in_proj_bias;      // (2E,D): rows 0..E-1 make x, rows E..2E-1 make the gate z
    real *conv1d, *conv1d_bias;        // (E,1,K), (E)
    real *x_proj;                      // (R+2N,E): rows for r (the input of dt), B and C
    real *dt_proj, *dt_proj_bias;      // (E,R), (E)
    real *A_log, *D;                   // (E,N), (E)
    real *out_proj, *out_proj_bias;    // (D,E), (D)
} Mamba1Params;

static const TensorSpec mamba1_params[] = {
    {"norm.weight",            {DIM_D},                INIT_ONE, 0},
    {"mixer.in_proj.weight",   {DIM_2E, DIM_D},        INIT_LINEAR, DECAY},
    {"mixer.in_proj.bias",     {DIM_2E},               INIT_ZERO, IF_BIAS},
    {"mixer.conv1d.weight",    {DIM_E, DIM_1, DIM_K},  INIT_CONV, 0},
    {"mixer.conv1d.bias",      {DIM_E},                INIT_CONV, IF_CONV_BIAS},
    {"mixer.x_proj.weight",    {DIM_R2N, DIM_E},       INIT_LINEAR, DECAY},
    {"mixer.dt_proj.weight",   {DIM_E, DIM_R},         INIT_DT_WEIGHT, DECAY},
    {"mixer.dt_proj.bias",     {DIM_E},                INIT_DT_BIAS, 0},
    {"mixer.A_log",            {DIM_E, DIM_N},         INIT_A_LOG, 0},
    {"mixer.D",                {DIM_E},                INIT_ONE, 0},
    {"mixer.out_proj.weight",  {DIM_D, DIM_E},         INIT_RESIDUAL, DECAY},
    {"mixer.out_proj.bias",    {DIM_D},                INIT_ZERO, IF_BIAS},
};

typedef struct { real *rstd, *u, *xz, *x, *rbc, *dt, *hs, *s; } Mamba1Acts;

static const TensorSpec mamba1_acts[] = {
    {"rstd", {DIM_1}, 0, 0},           // of the norm
    {"u",    {DIM_D}, 0, CHEAP},       // normalized input
    {"xz",   {DIM_2E}, 0, 0},          // x before the conv, gate z
    {"x",    {DIM_E}, 0, CHEAP},       // after conv and SiLU
    {"rbc",  {DIM_R2N}, 0, 0},         // r, B, C
    {"dt",   {DIM_E}, 0, CHEAP},       // step size, after softplus
    {"hs",   {DIM_SCAN_SAVED}, 0, 0},  // state at the start of each chunk
    {"s",    {DIM_E}, 0, 0},           // scan output, before the gate
};

typedef struct { real *y, *out, *du, *dxz, *dx, *drbc, *ddt, *ds, *scan; } Mamba1Scratch;

static const TensorSpec mamba1_scratch[] = {
    {"y",    {DIM_E}, 0, 0},           // after the gate
    {"out",  {DIM_D}, 0, 0},           // what the block adds to the residual stream
    {"du",   {DIM_D}, 0, BACKWARD_ONLY},
    {"dxz",  {DIM_2E}, 0, BACKWARD_ONLY},
    {"dx",   {DIM_E}, 0, BACKWARD_ONLY},
    {"drbc", {DIM_R2N}, 0, BACKWARD_ONLY},
    {"ddt",  {DIM_E}, 0, BACKWARD_ONLY},
    {"ds",   {DIM_E}, 0, BACKWARD_ONLY},
    {"scan", {DIM_SCAN_SCRATCH}, 0, BACKWARD_ONLY},
};

typedef struct { real *conv, *ssm; } Mamba1State;

static const TensorSpec mamba1_state[] = {
    {"conv", {DIM_K1, DIM_E}, 0, 0},   // the last K-1 inputs of the conv
    {"ssm",  {DIM_E, DIM_N}, 0, RECURRENT},    // h
};

// mamba1_block_forward: res_out = res_in + Mamba(RMSNorm(res_in)).   res (B,T,D), res_out may be res_in
//   (F1) [x; z] = W_in u,  u = RMSNorm(res_in)          (F2) x = silu(conv(x))
//   (F3) [r; B; C] = W_x x                              (F4) dt = softplus(W_dt r + b_dt)
//   (F5) a_t = exp(dt_t A)   (F6) h_t = a_t h_{t-1} + dt_t B_t x_t   (F7) s_t = <C_t, h_t> + D x_t
//   (F8) y = s silu(z),  out = W_out y
//   saved for backward: Mamba1Acts; y is made again from s and z
//   s0, sT: state before and after, fields may be NULL, may be the same
//   Mamba paper, section 3.4, figure 3
void mamba1_block_forward(const Run* run, real* res_out, const real* res_in, real* const* params,
                          real* const* acts, real* const* scratch, real* const* state0, real* const* stateT) {
    const Mamba1Params* p = (const Mamba1Params*)params;
    const Mamba1Acts* a = (const Mamba1Acts*)acts;
    const Mamba1Scratch* w = (const Mamba1Scratch*)scratch;
    const Mamba1State *s0 = (const Mamba1State*)state0, *sT = (const Mamba1State*)stateT;
    const Config* c = run->config;
    size_t B = run->B, T = run->T, M = B * T;
    size_t D = (size_t)c->d_model, E = (size_t)c->d_inner, N = (size_t)c->d_state, K = (size_t)c->d_conv,
           R = (size_t)c->dt_rank;
    size_t RBC = R + 2 * N;
    const real *z = a->xz + E, *Bt = a->rbc + R, *Ct = a->rbc + R + N;

    rmsnorm_forward(a->u, a->rstd, res_in, p->norm, M, D, (real)c->norm_eps);
    #pragma omp parallel if (M * D * E > 65536)
    {
        // (F1) to (F4)
        linear_share(&run->half, a->xz, 2 * E, a->u, D, p->in_proj, p->in_proj_bias, M, D, 2 * E);
        causal_conv1d_share(a->x, sT->conv, a->xz, 2 * E, s0->conv, p->conv1d, p->conv1d_bias, true, run->doc,
                            B, T, E, K);
        linear_share(&run->half, a->rbc, RBC, a->x, E, p->x_proj, NULL, M, E, RBC);
        linear_share(&run->half, a->dt, E, a->rbc, RBC, p->dt_proj, p->dt_proj_bias, M, R, E);
        softplus_share(a->dt, a->dt, M * E);
        // (F5) to (F8)
        selective_scan_share(a->s, a->hs, sT->ssm, a->x, a->dt, p->A_log, Bt, Ct, RBC, p->D, s0->ssm,
                             run->doc, B, T, E, N);
        gate_share(w->y, a->s, E, z, 2 * E, M, E);
        linear_share(&run->half, w->out, D, w->y, E, p->out_proj, p->out_proj_bias, M, E, D);
    }
    residual_forward(res_out, res_in, dropout(w->out, w->out, &run->dropout, M, D), M * D);
}

// mamba1_block_backward: the lines of the forward in reverse order. dres (B,T,D) holds the gradient of
// res_out on entry and of res_in on exit. ds0 and dsT are the gradients of the states, fields may be NULL.
void mamba1_block_backward(const Run* run, real* dres, const real* res_in, real* const* dparams,
                           real* const* params, real* const* acts, real* const* scratch, real* const* state0,
                           real* const* dstate0, real* const* dstateT) {
    const Mamba1Params *p = (const Mamba1Params*)params, *dp = (const Mamba1Params*)dparams;
    const Mamba1Acts* a = (const Mamba1Acts*)acts;
    const Mamba1Scratch* w = (const Mamba1Scratch*)scratch;
    const Mamba1State *s0 = (const Mamba1State*)state0, *ds0 = (const Mamba1State*)dstate0,
                      *dsT = (const Mamba1State*)dstateT;
    const Config* c = run->config;
    size_t B = run->B, T = run->T, M = B * T;
    size_t D = (size_t)c->d_model, E = (size_t)c->d_inner, N = (size_t)c->d_state, K = (size_t)c->d_conv,
           R = (size_t)c->dt_rank;
    size_t RBC = R + 2 * N;
    const real *z = a->xz + E, *Bt = a->rbc + R, *Ct = a->rbc + R + N;
    real *dxz = w->dxz, *dz = w->dxz + E, *dx = w->dx, *drbc = w->drbc, *dBt = w->drbc + R,
         *dCt = w->drbc + R + N;
    real* dy = w->ddt;         // the gradient of y is consumed before ddt is needed
    if (run->recompute == RECOMPUTE_CHEAP) {       // the CHEAP lines of the forward once more
        rmsnorm_forward(a->u, a->rstd, res_in, p->norm, M, D, (real)c->norm_eps);
        causal_conv1d_forward(a->x, NULL, a->xz, 2 * E, s0->conv, p->conv1d, p->conv1d_bias, true, run->doc,
                              B, T, E, K);
        matmul_forward(a->dt, E, a->rbc, RBC, p->dt_proj, p->dt_proj_bias, M, R, E);
        softplus_forward(a->dt, a->dt, M * E);
    }
    // every backward function adds to its outputs, so they start from zero
    zero_real(dy, M * E);
    zero_real(w->ds, M * E);
    zero_real(dxz, M * 2 * E);
    zero_real(dx, M * E);
    zero_real(drbc, M * RBC);
    zero_real(w->du, M * D);

    // (F8) out = W_out y, y = s silu(z); the residual passes dres on unchanged
    const real* dout = dropout(w->out, dres, &run->dropout, M, D);
    gate_forward(w->y, a->s, E, z, 2 * E, M, E);
    matmul_backward(dy, E, dp->out_proj, dp->out_proj_bias, dout, D, w->y, E, p->out_proj, M, E, D);
    gate_backward(w->ds, E, dz, 2 * E, dy, a->s, E, z, 2 * E, M, E);
    // (F5) to (F7): the first contribution to dx
    zero_real(w->ddt, M * E);
    selective_scan_backward(dx, w->ddt, dp->A_log, dBt, dCt, RBC, dp->D, ds0->ssm, w->ds, dsT->ssm, a->hs,
                            a->x, a->dt, p->A_log, Bt, Ct, RBC, p->D, run->doc, w->scan, B, T, E, N);
    // (F4) dt = softplus(W_dt r + b_dt): the gradient of the sum goes where ds was
    zero_real(w->ds, M * E);
    softplus_backward(w->ds, w->ddt, a->dt, M * E);
    matmul_backward(drbc, RBC, dp->dt_proj, dp->dt_proj_bias, w->ds, E, a->rbc, RBC, p->dt_proj, M, R, E);
    // (F3) [r; B; C] = W_x x: the second contribution to dx
    matmul_backward(dx, E, dp->x_proj, NULL, drbc, RBC, a->x, E, p->x_proj, M, E, RBC);
    // (F2) x = silu(conv(x)), (F1) [x; z] = W_in u, u = RMSNorm(res_in)
    causal_conv1d_backward(dxz, 2 * E, dp->conv1d, dp->conv1d_bias, ds0->conv, dx, dsT->conv, a->xz, 2 * E,
                           s0->conv, p->conv1d, p->conv1d_bias, true, run->doc, B, T, E, K);
    matmul_backward(w->du, D, dp->in_proj, dp->in_proj_bias, dxz, 2 * E, a->u, D, p->in_proj, M, D, 2 * E);
    rmsnorm_backward(dres, dp->norm, w->du, res_in, p->norm, a->rstd, M, D);
}

// ------------------------------------------------------------------------------------------------
// 5.2 Mamba-2

typedef struct {
    real *norm;                        // (D)
    real *in_proj, *in_proj_bias;      // (2E+2GN+H,D): rows for z0, x0 (each E-Es), z, x (Es), B, C, dt (H)
    real *conv1d, *conv1d_bias;        // (Es+2GN,1,K), (Es+2GN): over x, B and C
    real *dt_bias, *A_log, *D;         // (H), (H), (H) or (Es)
    real *gated_norm;                  // (Es)
    real *out_proj, *out_proj_bias;    // (D,E), (D)
} Mamba2Params;

static const TensorSpec mamba2_params[] = {
    {"norm.weight",            {DIM_D},                 INIT_ONE, 0},
    {"mixer.in_proj.weight",   {DIM_IN2, DIM_D},        INIT_LINEAR, DECAY},
    {"mixer.in_proj.bias",     {DIM_IN2},               INIT_ZERO, IF_BIAS},
    {"mixer.conv1d.weight",    {DIM_XBC, DIM_1, DIM_K}, INIT_CONV, 0},
    {"mixer.conv1d.bias",      {DIM_XBC},               INIT_CONV, IF_CONV_BIAS},
    {"mixer.dt_bias",          {DIM_H},                 INIT_DT_BIAS, 0},
    {"mixer.A_log",            {DIM_H},                 INIT_A_UNIFORM, 0},
    {"mixer.D",                {DIM_DSKIP},             INIT_ONE, 0},
    {"mixer.norm.weight",      {DIM_ES},                INIT_ONE, IF_RMSNORM},
    {"mixer.out_proj.weight",  {DIM_D, DIM_E},          INIT_RESIDUAL, DECAY},
    {"mixer.out_proj.bias",    {DIM_D},                 INIT_ZERO, IF_BIAS},
};

typedef struct { real *rstd, *u, *zxbcdt, *xbc, *dt, *hs, *y, *gated_rstd; } Mamba2Acts;

static const TensorSpec mamba2_acts[] = {
    {"rstd",       {DIM_1}, 0, 0},         // of the norm
    {"u",          {DIM_D}, 0, CHEAP},     // normalized input
    {"zxbcdt",     {DIM_IN2}, 0, 0},       // z0, x0, gate z, x, B, C before the conv, dt before softplus
    {"xbc",        {DIM_XBC}, 0, CHEAP},   // x, B, C after conv and SiLU
    {"dt",         {DIM_H}, 0, CHEAP},     // step size
    {"hs",         {DIM_SSD_SAVED}, 0, 0}, // state at the start of each chunk
    {"y",          {DIM_ES}, 0, 0},        // output of the SSM, before gate and norm
    {"gated_rstd", {DIM_G}, 0, 0},         // of the gated norm
};

typedef struct {
    real *n, *joined, *out, *du, *dzxbcdt, *dxbc, *ddt, *dn, *djoined, *dy, *ssd;
} Mamba2Scratch;

static const TensorSpec mamba2_scratch[] = {
    {"n",       {DIM_E}, 0, 0},            // y after gate and norm
    {"joined",  {DIM_JOINED}, 0, 0},       // beside the output of the inner MLP, if there is one
    {"out",     {DIM_D}, 0, 0},            // what the block adds to the residual stream
    {"du",      {DIM_D}, 0, BACKWARD_ONLY},
    {"dzxbcdt", {DIM_IN2}, 0, BACKWARD_ONLY},
    {"dxbc",    {DIM_XBC}, 0, BACKWARD_ONLY},
    {"ddt",     {DIM_H}, 0, BACKWARD_ONLY},
    {"dn",      {DIM_E}, 0, BACKWARD_ONLY},
    {"djoined", {DIM_JOINED}, 0, BACKWARD_ONLY},
    {"dy",      {DIM_ES}, 0, BACKWARD_ONLY},
    {"ssd",     {DIM_SSD_SCRATCH}, 0, 0},
};

typedef struct { real *conv, *ssm; } Mamba2State;

static const TensorSpec mamba2_state[] = {
    {"conv", {DIM_K1, DIM_XBC}, 0, 0},     // the last K-1 inputs of the conv
    {"ssm",  {DIM_H, DIM_P, DIM_N}, 0, RECURRENT},     // H
};

// Mamba2Sizes: the sizes of a block and, in a row of in_proj's output, where its parts begin
typedef struct {
    size_t M, D, E, K, H, P, G, N, Es, Cd, Q;
    size_t mlp, z, xbc, dt, in;            // width of z0 and of x0; columns of z, xbc, dt; their number
} Mamba2Sizes;

static Mamba2Sizes mamba2_sizes(const Run* run) {
    const Config* c = run->config;
    Mamba2Sizes s;
    s.M = run->B * run->T;
    s.D = (size_t)c->d_model; s.E = (size_t)c->d_inner; s.K = (size_t)c->d_conv; s.N = (size_t)c->d_state;
    s.P = (size_t)c->headdim; s.G = (size_t)c->ngroups; s.Es = (size_t)c->d_ssm; s.H = s.Es / s.P;
    s.Cd = s.Es + 2 * s.G * s.N;
    s.Q = min_size((size_t)c->chunk_size, SSD_CHUNK);
    s.mlp = s.E - s.Es; s.z = 2 * s.mlp; s.xbc = s.z + s.Es; s.dt = s.xbc + s.Cd; s.in = s.dt + s.H;
    return s;
}

// mamba2_join: what out_proj reads, (M,E): the inner MLP and the normed and gated y side by side
static const real* mamba2_join(const Config* c, const Mamba2Sizes* s, const Mamba2Params* p,
                               const Mamba2Acts* a, const Mamba2Scratch* w) {
    const real *z0 = a->zxbcdt, *x0 = z0 + s->mlp, *z = z0 + s->z;
    if (s->mlp) {
        gate_forward(w->n, x0, s->in, z0, s->in, s->M, s->mlp);
        copy_columns(w->joined, s->E, w->n, s->mlp, s->M, s->mlp);
    }
    if (c->rmsnorm)
        gated_rmsnorm_forward(w->n, a->gated_rstd, a->y, z, s->in, p->gated_norm, s->M, s->Es, s->Es / s->G,
                              (real)c->norm_eps, c->norm_before_gate);
    else gate_forward(w->n, a->y, s->Es, z, s->in, s->M, s->Es);
    if (s->mlp) copy_columns(w->joined + s->mlp, s->E, w->n, s->Es, s->M, s->Es);
    return s->mlp ? w->joined : w->n;
}

// mamba2_block_forward: res_out = res_in + Mamba2(RMSNorm(res_in)).   res (B,T,D), res_out may be res_in
//   (S1) [z0; x0; z; xBC; dt_raw] = W_in u,  u = RMSNorm(res_in);   [x; B; C] = silu(conv(xBC))
//   (S2) dt = clip(softplus(dt_raw + dt_bias))      (S3) a_t = exp(dt_t A)
//   (S4) H_t = a_t H_{t-1} + dt_t x_t B_t^T,  y_t = H_t C_t + D x_t          every head by itself
//   (S5) n = gated RMSNorm(y, z), without rmsnorm y silu(z)
//   (S6) out = W_out [x0 silu(z0); n]               (published models: no z0 and x0)
//   saved for backward: Mamba2Acts; n is made again
//   s0, sT: state before and after, fields may be NULL, may be the same
//   Mamba-2 paper (arXiv 2405.21060), section 7.1, figure 6
void mamba2_block_forward(const Run* run, real* res_out, const real* res_in, real* const* params,
                          real* const* acts, real* const* scratch, real* const* state0, real* const* stateT) {
    const Mamba2Params* p = (const Mamba2Params*)params;
    const Mamba2Acts* a = (const Mamba2Acts*)acts;
    const Mamba2Scratch* w = (const Mamba2Scratch*)scratch;
    const Mamba2State *s0 = (const Mamba2State*)state0, *sT = (const Mamba2State*)stateT;
    const Config* c = run->config;
    const Mamba2Sizes s = mamba2_sizes(run);
    const real *Bt = a->xbc + s.Es, *Ct = Bt + s.G * s.N;

    // (S1) and (S2)
    rmsnorm_forward(a->u, a->rstd, res_in, p->norm, s.M, s.D, (real)c->norm_eps);
    linear_forward(&run->half, a->zxbcdt, s.in, a->u, s.D, p->in_proj, p->in_proj_bias, s.M, s.D, s.in);
    causal_conv1d_forward(a->xbc, sT->conv, a->zxbcdt + s.xbc, s.in, s0->conv, p->conv1d, p->conv1d_bias,
                          true, run->doc, run->B, run->T, s.Cd, s.K);
    dt_softplus_forward(a->dt, a->zxbcdt + s.dt, s.in, p->dt_bias, (real)c->dt_low, (real)c->dt_high, s.M,
                        s.H);
    // (S3) to (S6), then the residual
    ssd_forward(a->y, a->hs, sT->ssm, a->xbc, s.Cd, a->dt, p->A_log, Bt, Ct, s.Cd, p->D, c->D_has_hdim,
                s0->ssm, run->doc, w->ssd, run->B, run->T, s.H, s.P, s.G, s.N, s.Q);
    const real* joined = mamba2_join(c, &s, p, a, w);
    linear_forward(&run->half, w->out, s.D, joined, s.E, p->out_proj, p->out_proj_bias, s.M, s.E, s.D);
    residual_forward(res_out, res_in, dropout(w->out, w->out, &run->dropout, s.M, s.D), s.M * s.D);
}

// mamba2_block_backward: the lines of the forward in reverse order; arguments as in mamba1_block_backward
void mamba2_block_backward(const Run* run, real* dres, const real* res_in, real* const* dparams,
                           real* const* params, real* const* acts, real* const* scratch, real* const* state0,
                           real* const* dstate0, real* const* dstateT) {
    const Mamba2Params *p = (const Mamba2Params*)params, *dp = (const Mamba2Params*)dparams;
    const Mamba2Acts* a = (const Mamba2Acts*)acts;
    const Mamba2Scratch* w = (const Mamba2Scratch*)scratch;
    const Mamba2State *s0 = (const Mamba2State*)state0, *ds0 = (const Mamba2State*)dstate0,
                      *dsT = (const Mamba2State*)dstateT;
    const Config* c = run->config;
    const Mamba2Sizes s = mamba2_sizes(run);
    const real *Bt = a->xbc + s.Es, *Ct = Bt + s.G * s.N, *z0 = a->zxbcdt, *x0 = z0 + s.mlp, *z = z0 + s.z;
    real *dBt = w->dxbc + s.Es, *dCt = dBt + s.G * s.N, *dz0 = w->dzxbcdt, *dz = dz0 + s.z;
    if (run->recompute == RECOMPUTE_CHEAP) {       // the CHEAP lines of the forward once more
        rmsnorm_forward(a->u, a->rstd, res_in, p->norm, s.M, s.D, (real)c->norm_eps);
        causal_conv1d_forward(a->xbc, NULL, a->zxbcdt + s.xbc, s.in, s0->conv, p->conv1d, p->conv1d_bias,
                              true, run->doc, run->B, run->T, s.Cd, s.K);
        dt_softplus_forward(a->dt, a->zxbcdt + s.dt, s.in, p->dt_bias, (real)c->dt_low, (real)c->dt_high, s.M,
                            s.H);
    }
    zero_real(w->du, s.M * s.D);
    zero_real(w->dzxbcdt, s.M * s.in);
    zero_real(w->dxbc, s.M * s.Cd);
    zero_real(w->ddt, s.M * s.H);
    zero_real(w->dy, s.M * s.Es);

    // (S6) out = W_out [x0 silu(z0); n]; the residual passes dres on unchanged
    const real *dout = dropout(w->out, dres, &run->dropout, s.M, s.D), *joined = mamba2_join(c, &s, p, a, w);
    real* djoined = s.mlp ? w->djoined : w->dn;
    zero_real(djoined, s.M * s.E);
    matmul_backward(djoined, s.E, dp->out_proj, dp->out_proj_bias, dout, s.D, joined, s.E, p->out_proj, s.M,
                    s.E, s.D);
    if (s.mlp) {
        copy_columns(w->dn, s.mlp, djoined, s.E, s.M, s.mlp);
        gate_backward(dz0 + s.mlp, s.in, dz0, s.in, w->dn, x0, s.in, z0, s.in, s.M, s.mlp);
        copy_columns(w->dn, s.Es, djoined + s.mlp, s.E, s.M, s.Es);
    }
    // (S5) n = gated RMSNorm(y, z) or y silu(z)
    if (c->rmsnorm)
        gated_rmsnorm_backward(w->dy, dz, s.in, dp->gated_norm, w->dn, a->y, z, s.in, p->gated_norm,
                               a->gated_rstd, s.M, s.Es, s.Es / s.G, c->norm_before_gate);
    else gate_backward(w->dy, s.Es, dz, s.in, w->dn, a->y, s.Es, z, s.in, s.M, s.Es);
    // (S4), (S3), (S2)
    ssd_backward(w->dxbc, s.Cd, w->ddt, dp->A_log, dBt, dCt, s.Cd, dp->D, ds0->ssm, w->dy, dsT->ssm, a->hs,
                 a->xbc, s.Cd, a->dt, p->A_log, Bt, Ct, s.Cd, p->D, c->D_has_hdim, s0->ssm, run->doc, w->ssd,
                 run->B, run->T, s.H, s.P, s.G, s.N, s.Q);
    dt_softplus_backward(w->dzxbcdt + s.dt, s.in, dp->dt_bias, w->ddt, a->zxbcdt + s.dt, s.in, p->dt_bias,
                         (real)c->dt_low, (real)c->dt_high, s.M, s.H);
    // (S1) [x; B; C] = silu(conv(xBC)), [..] = W_in u, u = RMSNorm(res_in)
    causal_conv1d_backward(w->dzxbcdt + s.xbc, s.in, dp->conv1d, dp->conv1d_bias, ds0->conv, w->dxbc,
                           dsT->conv, a->zxbcdt + s.xbc, s.in, s0->conv, p->conv1d, p->conv1d_bias, true,
                           run->doc, run->B, run->T, s.Cd, s.K);
    matmul_backward(w->du, s.D, dp->in_proj, dp->in_proj_bias, w->dzxbcdt, s.in, a->u, s.D, p->in_proj, s.M,
                    s.D, s.in);
    rmsnorm_backward(dres, dp->norm, w->du, res_in, p->norm, a->rstd, s.M, s.D);
}

// ------------------------------------------------------------------------------------------------
// 5.3 Attention

typedef struct {
    real *norm;                        // (D)
    real *in_proj, *in_proj_bias;      // rows: all query heads, all key heads, all value heads, up, gate
    real *conv1d, *conv1d_bias;        // over q, k and v; only with attn_conv
    real *out_proj, *out_proj_bias;    // columns: the heads, the MLP
} AttentionParams;

static const TensorSpec attention_params[] = {
    {"norm.weight",           {DIM_D},                  INIT_ONE, 0},
    {"mixer.in_proj.weight",  {DIM_IN_A, DIM_D},        INIT_LINEAR, DECAY},
    {"mixer.in_proj.bias",    {DIM_IN_A},               INIT_ZERO, IF_ATTN_IN_BIAS},
    {"mixer.conv1d.weight",   {DIM_QKV, DIM_1, DIM_KA}, INIT_CONV, IF_ATTN_CONV},
    {"mixer.conv1d.bias",     {DIM_QKV},                INIT_CONV, IF_ATTN_CONV},
    {"mixer.out_proj.weight", {DIM_D, DIM_OUT_A},       INIT_RESIDUAL, DECAY},
    {"mixer.out_proj.bias",   {DIM_D},                  INIT_ZERO, IF_ATTN_OUT_BIAS},
};

typedef struct { real *rstd, *u, *position, *in, *qkv, *lse, *y; } AttentionActs;

static const TensorSpec attention_acts[] = {
    {"rstd",     {DIM_1}, 0, 0},
    {"u",        {DIM_D}, 0, CHEAP},
    {"position", {DIM_1}, 0, 0},
    {"in",       {DIM_IN_A}, 0, 0},    // q, k, v before the conv, up, gate
    {"qkv",      {DIM_QKV}, 0, CHEAP}, // after conv and rotation
    {"lse",      {DIM_HQ}, 0, 0},
    {"y",        {DIM_OUT_A}, 0, 0},   // out of the heads, of the MLP
};

typedef struct { real *mlp, *out, *du, *din, *dqkv, *dy; } AttentionScratch;

static const TensorSpec attention_scratch[] = {
    {"mlp",  {DIM_MLP_A}, 0, 0},       // out of the MLP, or its gradient
    {"out",  {DIM_D}, 0, 0},
    {"du",   {DIM_D}, 0, BACKWARD_ONLY},
    {"din",  {DIM_IN_A}, 0, BACKWARD_ONLY},
    {"dqkv", {DIM_QKV}, 0, BACKWARD_ONLY},
    {"dy",   {DIM_OUT_A}, 0, BACKWARD_ONLY},
};

typedef struct { real *conv, *kv, *position; } AttentionState;

static const TensorSpec attention_state[] = {
    {"conv",     {DIM_KA1, DIM_QKV}, 0, 0},                  // the last inputs of the conv
    {"kv",       {DIM_CONTEXT, DIM_2, DIM_HKV, DIM_DH}, 0, 0},    // keys, turned, and values of the document
    {"position", {DIM_1}, 0, TOKENS},                        // how many of them there are
};

// Heads: the sizes of an attention layer
typedef struct { size_t Hq, Hkv, dh, ro, K, F, capacity, in, qkv, out; real scale; } Heads;

static Heads heads_of(const Config* c) {
    Heads s;
    s.Hq = (size_t)c->attn_heads;
    s.Hkv = (size_t)c->attn_heads_kv;
    s.dh = (size_t)c->attn_head_dim;
    s.ro = (size_t)c->rotary_dim;
    s.K = (size_t)c->attn_conv;
    s.F = (size_t)c->attn_mlp / 2;
    s.capacity = (size_t)c->context;
    s.qkv = (s.Hq + 2 * s.Hkv) * s.dh;
    s.in = s.qkv + 2 * s.F;
    s.out = s.Hq * s.dh + s.F;
    s.scale = (real)(c->softmax_scale > 0 ? c->softmax_scale : 1 / sqrt((double)s.dh));
    return s;
}

// attention_qkv: (A2) and (A3)
static void attention_qkv(const Run* run, const AttentionParams* p, const AttentionActs* a, real* tailT,
                          const real* tail0) {
    const Config* c = run->config;
    Heads s = heads_of(c);
    size_t M = run->B * run->T;
    if (s.K)
        causal_conv1d_forward(a->qkv, tailT, a->in, s.in, tail0, p->conv1d, p->conv1d_bias, false, run->doc,
                              run->B, run->T, s.qkv, s.K);
    else copy_columns(a->qkv, s.qkv, a->in, s.in, M, s.qkv);
    rotary_forward(a->qkv, s.qkv, a->position, c->rotary_base, c->rotary_interleaved, M, s.Hq + s.Hkv, s.dh,
                   s.ro);
}

// attention_block_forward: res_out = res_in + W_out [O; up * silu(gate)]
//   (A1) [q; k; v; up; gate] = W_in u,  u = RMSNorm(res_in)     (A2) [q; k; v] = conv of them, no activation
//   (A3) rotary embedding of q and k                      (A4) O_i = sum_j softmax_j(scale q_i k_j) v_j
//   the conv and the MLP are optional
//   saved for backward: AttentionActs       state: the inputs of the conv, and the keys and values so far
//   Hybrid models of the Mamba-2 paper (arXiv 2405.21060), section 9.2.3, as in mamba_ssm's modules/mha.py
void attention_block_forward(const Run* run, real* res_out, const real* res_in, real* const* params,
                             real* const* acts, real* const* scratch, real* const* state0,
                             real* const* stateT) {
    const AttentionParams* p = (const AttentionParams*)params;
    const AttentionActs* a = (const AttentionActs*)acts;
    const AttentionScratch* w = (const AttentionScratch*)scratch;
    const AttentionState *s0 = (const AttentionState*)state0, *sT = (const AttentionState*)stateT;
    const Config* c = run->config;
    Heads s = heads_of(c);
    size_t B = run->B, T = run->T, M = B * T, D = (size_t)c->d_model;
    const real *k = a->qkv + s.Hq * s.dh, *v = k + s.Hkv * s.dh, *up = a->in + s.qkv, *gate = up + s.F;

    rmsnorm_forward(a->u, a->rstd, res_in, p->norm, M, D, (real)c->norm_eps);
    linear_forward(&run->half, a->in, s.in, a->u, D, p->in_proj, p->in_proj_bias, M, D, s.in);
    token_positions(a->position, s0->position, run->doc, B, T);
    attention_qkv(run, p, a, sT->conv, s0->conv);
    attention_forward(a->y, s.out, a->lse, a->qkv, s.qkv, k, v, s.qkv, s0->kv, s.capacity, a->position,
                      s.scale, B, T, s.Hq, s.Hkv, s.dh);
    if (sT->kv)
        kv_append_forward(sT->kv, sT->position, s0->kv, k, v, s.qkv, a->position, s.capacity, B, T,
                          s.Hkv, s.dh);
    gate_forward(w->mlp, up, s.in, gate, s.in, M, s.F);
    copy_columns(a->y + s.Hq * s.dh, s.out, w->mlp, s.F, M, s.F);
    linear_forward(&run->half, w->out, D, a->y, s.out, p->out_proj, p->out_proj_bias, M, s.out, D);
    residual_forward(res_out, res_in, dropout(w->out, w->out, &run->dropout, M, D), M * D);
}

void attention_block_backward(const Run* run, real* dres, const real* res_in, real* const* dparams,
                              real* const* params, real* const* acts, real* const* scratch,
                              real* const* state0, real* const* dstate0, real* const* dstateT) {
    const AttentionParams *p = (const AttentionParams*)params, *dp = (const AttentionParams*)dparams;
    const AttentionActs* a = (const AttentionActs*)acts;
    const AttentionScratch* w = (const AttentionScratch*)scratch;
    const AttentionState *s0 = (const AttentionState*)state0, *ds0 = (const AttentionState*)dstate0,
                         *dsT = (const AttentionState*)dstateT;
    const Config* c = run->config;
    Heads s = heads_of(c);
    size_t B = run->B, T = run->T, M = B * T, D = (size_t)c->d_model;
    const real *k = a->qkv + s.Hq * s.dh, *v = k + s.Hkv * s.dh, *up = a->in + s.qkv, *gate = up + s.F;
    real *dk = w->dqkv + s.Hq * s.dh, *dv = dk + s.Hkv * s.dh, *dup = w->din + s.qkv, *dgate = dup + s.F;
    if (run->recompute == RECOMPUTE_CHEAP) {
        rmsnorm_forward(a->u, a->rstd, res_in, p->norm, M, D, (real)c->norm_eps);
        attention_qkv(run, p, a, NULL, s0->conv);
    }
    zero_real(w->dy, M * s.out);
    zero_real(w->dqkv, M * s.qkv);
    zero_real(w->din, M * s.in);
    zero_real(w->du, M * D);

    // out = W_out [O; up silu(gate)]
    const real* dout = dropout(w->out, dres, &run->dropout, M, D);
    matmul_backward(w->dy, s.out, dp->out_proj, dp->out_proj_bias, dout, D, a->y, s.out, p->out_proj, M,
                    s.out, D);
    copy_columns(w->mlp, s.F, w->dy + s.Hq * s.dh, s.out, M, s.F);
    gate_backward(dup, s.in, dgate, s.in, w->mlp, up, s.in, gate, s.in, M, s.F);
    // (A4), the cache
    attention_backward(w->dqkv, s.qkv, dk, dv, s.qkv, ds0->kv, w->dy, a->y, s.out, a->lse, a->qkv, s.qkv, k,
                       v, s.qkv, s0->kv, s.capacity, a->position, s.scale, B, T, s.Hq, s.Hkv, s.dh);
    if (dsT->kv)
        kv_append_backward(dk, dv, s.qkv, ds0->kv, dsT->kv, a->position, s.capacity, B, T, s.Hkv, s.dh);
    // (A3), (A2), (A1), u = RMSNorm(res_in)
    rotary_backward(w->dqkv, s.qkv, a->position, c->rotary_base, c->rotary_interleaved, M, s.Hq + s.Hkv, s.dh,
                    s.ro);
    if (s.K)
        causal_conv1d_backward(w->din, s.in, dp->conv1d, dp->conv1d_bias, ds0->conv, w->dqkv, dsT->conv,
                               a->in, s.in, s0->conv, p->conv1d, p->conv1d_bias, false, run->doc, B, T,
                               s.qkv, s.K);
    else copy_columns(w->din, s.in, w->dqkv, s.qkv, M, s.qkv);
    matmul_backward(w->du, D, dp->in_proj, dp->in_proj_bias, w->din, s.in, a->u, D, p->in_proj, M, D, s.in);
    rmsnorm_backward(dres, dp->norm, w->du, res_in, p->norm, a->rstd, M, D);
}

// ------------------------------------------------------------------------------------------------
// 5.4 Gated MLP

typedef struct { real *norm, *fc1, *fc2; } MlpParams;

static const TensorSpec mlp_params[] = {
    {"norm2.weight", {DIM_D}, INIT_ONE, 0},
    {"mlp.fc1.weight",
     {DIM_2F, DIM_D},
     INIT_LINEAR,
     DECAY},    // rows 0..F-1 make up, rows F..2F-1 make the gate
    {"mlp.fc2.weight", {DIM_D, DIM_F}, INIT_RESIDUAL, DECAY},
};

typedef struct { real *rstd, *u, *h; } MlpActs;

static const TensorSpec mlp_acts[] = {
    {"rstd", {DIM_1}, 0, 0},
    {"u",    {DIM_D}, 0, CHEAP},
    {"h",    {DIM_2F}, 0, 0},          // up, gate
};

typedef struct { real *m, *out, *du, *dh, *dm; } MlpScratch;

static const TensorSpec mlp_scratch[] = {
    {"m",   {DIM_F}, 0, 0},
    {"out", {DIM_D}, 0, 0},
    {"du",  {DIM_D}, 0, BACKWARD_ONLY},
    {"dh",  {DIM_2F}, 0, BACKWARD_ONLY},
    {"dm",  {DIM_F}, 0, BACKWARD_ONLY},
};

// mlp_block_forward: res_out = res_in + W_2 (up * silu(gate)),  [up; gate] = W_1 RMSNorm(res_in).
// Shazeer (arXiv 2002.05202)
void mlp_block_forward(const Run* run, real* res_out, const real* res_in, real* const* params,
                       real* const* acts, real* const* scratch, real* const* state0, real* const* stateT) {
    const MlpParams* p = (const MlpParams*)params;
    const MlpActs* a = (const MlpActs*)acts;
    const MlpScratch* w = (const MlpScratch*)scratch;
    (void)state0; (void)stateT;
    size_t M = run->B * run->T, D = (size_t)run->config->d_model, F = (size_t)run->config->d_intermediate;
    rmsnorm_forward(a->u, a->rstd, res_in, p->norm, M, D, (real)run->config->norm_eps);
    linear_forward(&run->half, a->h, 2 * F, a->u, D, p->fc1, NULL, M, D, 2 * F);
    gate_forward(w->m, a->h, 2 * F, a->h + F, 2 * F, M, F);
    linear_forward(&run->half, w->out, D, w->m, F, p->fc2, NULL, M, F, D);
    residual_forward(res_out, res_in, dropout(w->out, w->out, &run->dropout, M, D), M * D);
}

void mlp_block_backward(const Run* run, real* dres, const real* res_in, real* const* dparams,
                        real* const* params, real* const* acts, real* const* scratch, real* const* state0,
                        real* const* dstate0, real* const* dstateT) {
    const MlpParams *p = (const MlpParams*)params, *dp = (const MlpParams*)dparams;
    const MlpActs* a = (const MlpActs*)acts;
    const MlpScratch* w = (const MlpScratch*)scratch;
    (void)state0; (void)dstate0; (void)dstateT;
    size_t M = run->B * run->T, D = (size_t)run->config->d_model, F = (size_t)run->config->d_intermediate;
    if (run->recompute == RECOMPUTE_CHEAP)
        rmsnorm_forward(a->u, a->rstd, res_in, p->norm, M, D, (real)run->config->norm_eps);
    zero_real(w->dm, M * F);
    zero_real(w->dh, M * 2 * F);
    zero_real(w->du, M * D);
    const real* dout = dropout(w->out, dres, &run->dropout, M, D);
    gate_forward(w->m, a->h, 2 * F, a->h + F, 2 * F, M, F);
    // out = W_2 m, m = up silu(gate)
    matmul_backward(w->dm, F, dp->fc2, NULL, dout, D, w->m, F, p->fc2, M, F, D);
    gate_backward(w->dh, 2 * F, w->dh + F, 2 * F, w->dm, a->h, 2 * F, a->h + F, 2 * F, M, F);
    // [up; gate] = W_1 u, u = RMSNorm(res_in)
    matmul_backward(w->du, D, dp->fc1, NULL, w->dh, 2 * F, a->u, D, p->fc1, M, D, 2 * F);
    rmsnorm_backward(dres, dp->norm, w->du, res_in, p->norm, a->rstd, M, D);
}

// ------------------------------------------------------------------------------------------------
// 5.5 The table of kinds

enum { MAX_FIELDS = 16 };     // pointers in a kind's struct

typedef struct {
    char letter;              // in the pattern string
    const char* name;
    const TensorSpec* params;  int n_params;
    const TensorSpec* acts;
    int n_acts;    // saved for backward, one set per layer (one in all with recompute)
    const TensorSpec* scratch; int n_scratch;   // shared by all layers
    const TensorSpec* state;   int n_state;     // carried from token to token
    void (*forward)(const Run*, real* res_out, const real* res_in, real* const* params, real* const* acts,
                    real* const* scratch, real* const* state0, real* const* stateT);
    void (*backward)(const Run*, real* dres, const real* res_in, real* const* dparams, real* const* params,
                     real* const* acts, real* const* scratch, real* const* state0, real* const* dstate0,
                     real* const* dstateT);
} Kind;

#define TABLE(t) t, (int)(sizeof(t) / sizeof(t[0]))
static const Kind kinds[] = {
    {'1', "Mamba-1", TABLE(mamba1_params), TABLE(mamba1_acts), TABLE(mamba1_scratch), TABLE(mamba1_state),
     mamba1_block_forward, mamba1_block_backward},
    {'2', "Mamba-2", TABLE(mamba2_params), TABLE(mamba2_acts), TABLE(mamba2_scratch), TABLE(mamba2_state),
     mamba2_block_forward, mamba2_block_backward},
    {'a', "attention", TABLE(attention_params), TABLE(attention_acts), TABLE(attention_scratch),
     TABLE(attention_state), attention_block_forward, attention_block_backward},
    {'m', "gated MLP", TABLE(mlp_params), TABLE(mlp_acts), TABLE(mlp_scratch), NULL, 0,
     mlp_block_forward, mlp_block_backward},
};
enum { N_KINDS = sizeof(kinds) / sizeof(kinds[0]) };

#define FIELDS(type) (sizeof(type) / sizeof(void*))
#define ONE_ROW_PER_FIELD(type, table) \
    static_assert(FIELDS(type) == sizeof(table) / sizeof(TensorSpec), "one row per field, in order")
ONE_ROW_PER_FIELD(Mamba1Params, mamba1_params);
ONE_ROW_PER_FIELD(Mamba1Acts, mamba1_acts);
ONE_ROW_PER_FIELD(Mamba1Scratch, mamba1_scratch);
ONE_ROW_PER_FIELD(Mamba1State, mamba1_state);
ONE_ROW_PER_FIELD(Mamba2Params, mamba2_params);
ONE_ROW_PER_FIELD(Mamba2Acts, mamba2_acts);
ONE_ROW_PER_FIELD(Mamba2Scratch, mamba2_scratch);
ONE_ROW_PER_FIELD(Mamba2State, mamba2_state);
ONE_ROW_PER_FIELD(AttentionParams, attention_params);
ONE_ROW_PER_FIELD(AttentionActs, attention_acts);
ONE_ROW_PER_FIELD(AttentionScratch, attention_scratch);
ONE_ROW_PER_FIELD(AttentionState, attention_state);
ONE_ROW_PER_FIELD(MlpParams, mlp_params);
ONE_ROW_PER_FIELD(MlpActs, mlp_acts);
ONE_ROW_PER_FIELD(MlpScratch, mlp_scratch);

// ---------------------------------------------------------------------------------------------------
// 6. Model: tensor table, memory plan, initialization, forward, backward

// Tensor: one parameter of a concrete model. The same offset serves parameters, gradients and both AdamW
// moments.
typedef struct {
    char name[64];            // in checkpoints, in the published dialect
    const TensorSpec* spec;
    int layer;                // sub-layer, or -1 for the tensors outside the blocks
    int ndim;
    int64_t shape[3];
    size_t count, offset;     // elements; the offset is a multiple of 16
    bool frozen;              // --freeze: no update, no decay, not in the gradient norm
} Tensor;

typedef struct {
    const Kind* kind;
    int block;                                // number in the tensor names
    real *params[MAX_FIELDS], *grads[MAX_FIELDS];
} Layer;

typedef struct {
    Config config;
    int n_layers;             // residual sub-layers: with pattern "1m", two per block
    Layer* layer;
    int n_tensors;
    Tensor* tensor;
    size_t n_params;          // trainable numbers, the figure that is quoted
    size_t n_elements;        // the same with padding between tensors
    real *params, *grads, *m, *v;             // grads, m, v only when training
    Half half;                                // see model_to_half
    real *embedding, *norm_f, *head;          // head == embedding when tied
    real *dembedding, *dnorm_f, *dhead;
} Model;

// The tensors outside the blocks: field order of Model, see model_bind.
static const TensorSpec model_specs[] = {
    {"backbone.embeddings.weight", {DIM_VP, DIM_D}, INIT_EMBEDDING, DECAY},
    {"backbone.norm_f.weight",     {DIM_D},         INIT_ONE, 0},
    {"lm_head.weight",             {DIM_VP, DIM_D}, INIT_LINEAR, DECAY},
};

const Kind* kind_of(char letter) {
    for (int i = 0; i < N_KINDS; i++)
        if (kinds[i].letter == letter) return &kinds[i];
    die("pattern: there is no layer kind '%c'", letter);       // config_check has refused it before
}

static bool spec_exists(const TensorSpec* s, const Config* c) {
    return !((s->flags & IF_BIAS) && !c->bias) && !((s->flags & IF_CONV_BIAS) && !c->conv_bias) &&
           !((s->flags & IF_RMSNORM) && !c->rmsnorm) && !((s->flags & IF_ATTN_CONV) && !c->attn_conv) &&
           !((s->flags & IF_ATTN_IN_BIAS) && !c->attn_in_bias) &&
           !((s->flags & IF_ATTN_OUT_BIAS) && !c->attn_out_bias);
}

static void model_add_tensor(Model* m, const TensorSpec* spec, int layer) {
    if (!spec_exists(spec, &m->config)) return;
    m->tensor = (Tensor*)xrealloc(m->tensor, (size_t)m->n_tensors + 1, sizeof(Tensor));
    Tensor* t = &m->tensor[m->n_tensors++];
    memset(t, 0, sizeof *t);
    t->spec = spec;
    t->layer = layer;
    if (layer < 0) snprintf(t->name, sizeof t->name, "%s", spec->name);
    else snprintf(t->name, sizeof t->name, "backbone.layers.%d.%s", m->layer[layer].block, spec->name);
    for (int i = 0; i < 3 && spec->dim[i]; i++) t->shape[t->ndim++] = config_dim(&m->config, spec->dim[i]);
    if (!checked_size(t->ndim, t->shape, 1, &t->count)) die("%s: its size does not fit in 63 bits", t->name);
    t->offset = m->n_elements;
    m->n_params += t->count;
    // a matrix has 8 n rows: those behind its own are zero and let the matmuls of a GPU work on whole tiles
    size_t cols = t->ndim == 2 ? (size_t)t->shape[1] : 0, rows = ((size_t)t->shape[0] + 7) / 8 * 8;
    m->n_elements += (max_size(t->count, rows * cols) + 15) / 16 * 16;
}

// model_describe: fills the layer list and the tensor table from a configuration; allocates no parameters.
void model_describe(Model* m, const Config* config) {
    memset(m, 0, sizeof *m);
    m->config = *config;
    const char *pattern = config->pattern, *p = pattern;
    for (int block = 0; block < config->n_layer; block++) {
        do {        // a mixer, then its MLP
            m->layer = (Layer*)xrealloc(m->layer, (size_t)m->n_layers + 1, sizeof(Layer));
            Layer* layer = &m->layer[m->n_layers++];
            memset(layer, 0, sizeof *layer);
            layer->kind = kind_of(*p);
            layer->block = block;
            p = p[1] ? p + 1 : pattern;
        } while (*p == 'm' && p != pattern);
    }
    model_add_tensor(m, &model_specs[0], -1);
    for (int l = 0; l < m->n_layers; l++)
        for (int i = 0; i < m->layer[l].kind->n_params; i++)
            model_add_tensor(m, &m->layer[l].kind->params[i], l);
    model_add_tensor(m, &model_specs[1], -1);
    if (!config->tie_embeddings) model_add_tensor(m, &model_specs[2], -1);
}

// model_bind: points the layers' structs into the flat arrays.
static void model_bind(Model* m) {
    real** outside[3] = {&m->embedding, &m->norm_f, &m->head};
    real** doutside[3] = {&m->dembedding, &m->dnorm_f, &m->dhead};
    for (int i = 0; i < m->n_tensors; i++) {
        Tensor* t = &m->tensor[i];
        real *value = m->params + t->offset, *grad = m->grads ? m->grads + t->offset : NULL;
        if (t->layer < 0) {
            *outside[t->spec - model_specs] = value;
            *doutside[t->spec - model_specs] = grad;
        } else {
            Layer* layer = &m->layer[t->layer];
            layer->params[t->spec - layer->kind->params] = value;
            layer->grads[t->spec - layer->kind->params] = grad;
        }
    }
    if (m->config.tie_embeddings) {
        m->head = m->embedding;
        m->dhead = m->dembedding;
    }
}

// model_alloc: memory for the parameters and, for training, gradients and moments. All zero.
void model_alloc(Model* m, bool training) {
    m->params = (real*)xcalloc(m->n_elements, sizeof(real));
    if (training) {
        m->grads = (real*)xcalloc(m->n_elements, sizeof(real));
        m->m = (real*)xcalloc(m->n_elements, sizeof(real));
        m->v = (real*)xcalloc(m->n_elements, sizeof(real));
    }
    model_bind(m);
}

void model_free(Model* m) {
    free((void*)m->half.bits);
    free(m->layer);
    free(m->tensor);
    free(m->params);
    free(m->grads);
    free(m->m);
    free(m->v);
    memset(m, 0, sizeof *m);
}

// model_init: draws every parameter by its rule. A value depends on (seed, tensor, element) alone.
//   dt_proj.bias: dt = exp(u (ln dt_max - ln dt_min) + ln dt_min), at least dt_init_floor; bias = dt + ln(1 -
//   exp(-dt)), the inverse of softplus. out_proj and fc2 are divided by sqrt(n_layer) also with an MLP:
//   the published backbone divides by sqrt(2 n_layer) then, but its LM class draws them again with
//   sqrt(n_layer).
void model_init(Model* m, uint64_t seed) {
    const Config* c = &m->config;
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor* t = &m->tensor[i];
        real* p = m->params + t->offset;
        uint64_t stream = STREAM_INIT + (uint64_t)i;
        double scale = 1 / sqrt((double)t->shape[t->ndim - 1]);
        if (t->spec->init == INIT_CONV) {
            bool attention = t->spec->flags & IF_ATTN_CONV, weight = t->ndim == 3;
            scale = 1 / sqrt((double)(attention ? c->attn_conv : c->d_conv));
            if (weight && !attention && c->conv_init > 0 && strchr(c->pattern, '2')) scale = c->conv_init;
        }
        if (t->spec->init == INIT_DT_WEIGHT) scale = c->dt_scale / sqrt((double)c->dt_rank);
        if (t->spec->init == INIT_RESIDUAL && c->rescale_prenorm_residual) scale /= sqrt((double)c->n_layer);
        #pragma omp parallel for
        for (size_t j = 0; j < t->count; j++) {
            double x = 0, u = random_uniform(seed, stream, j);
            switch (t->spec->init) {
                case INIT_ZERO: x = 0; break;
                case INIT_ONE: x = 1; break;
                case INIT_EMBEDDING: x = c->initializer_range * random_normal(seed, stream, j); break;
                case INIT_LINEAR: case INIT_RESIDUAL: case INIT_CONV: x = scale * (2 * u - 1); break;
                case INIT_DT_WEIGHT: x = c->dt_init_constant ? scale : scale * (2 * u - 1); break;
                case INIT_DT_BIAS: {
                    double dt = exp(u * (log(c->dt_max) - log(c->dt_min)) + log(c->dt_min));
                    if (dt < c->dt_init_floor) dt = c->dt_init_floor;
                    x = dt + log(-expm1(-dt));
                    break;
                }
                case INIT_A_LOG: x = log((double)(j % (size_t)c->d_state) + 1); break;
                case INIT_A_UNIFORM: x = log(c->A_low + u * (c->A_high - c->A_low)); break;
            }
            p[j] = (real)x;
        }
    }
}

// ------------------------------------------------------------------------------------------------
// 6.1 State and workspace

// State: the recurrent state of `rows` sequences in every layer. It is all that a sequence leaves behind:
// constant memory, but for the cache of attention, which has room for `context` tokens.
typedef struct {
    size_t rows, n_elements;
    int64_t context;                // config.context when it was made
    real* data;
    real* (*field)[MAX_FIELDS];     // [layer][field]: (rows, shape)
} State;

// A state without memory: every field NULL. As an input it means "start from zero", as an output "not
// wanted".
State state_none(const Model* m) {
    State s = {0, 0, m->config.context, NULL, NULL};
    s.field = (real*(*)[MAX_FIELDS])xcalloc((size_t)m->n_layers, sizeof(*s.field));
    return s;
}

static size_t spec_count(const TensorSpec* spec, const Config* c) {
    size_t n = 1;
    for (int i = 0; i < 4 && spec->dim[i]; i++) n *= (size_t)config_dim(c, spec->dim[i]);
    return n;
}

State state_alloc(const Model* m, size_t rows) {
    State s = state_none(m);
    s.rows = rows;
    for (int l = 0; l < m->n_layers; l++)
        for (int i = 0; i < m->layer[l].kind->n_state; i++)
            s.n_elements += rows * spec_count(&m->layer[l].kind->state[i], &m->config);
    s.data = (real*)xcalloc(s.n_elements, sizeof(real));
    real* p = s.data;
    for (int l = 0; l < m->n_layers; l++)
        for (int i = 0; i < m->layer[l].kind->n_state; i++) {
            s.field[l][i] = p;
            p += rows * spec_count(&m->layer[l].kind->state[i], &m->config);
        }
    return s;
}

void state_free(State* s) {
    free(s->data);
    free(s->field);
    memset(s, 0, sizeof *s);
}

// state_copy_row: row `from` of src becomes row `to` of dst; src NULL clears the row. Of caches with room for
// different numbers of tokens it copies what both can hold.
void state_copy_row(const Model* m, State* dst, size_t to, const State* src, size_t from) {
    Config c_dst = m->config, c_src = m->config;
    c_dst.context = dst->context;
    if (src) c_src.context = src->context;
    for (int l = 0; l < m->n_layers; l++)
        for (int i = 0; i < m->layer[l].kind->n_state; i++) {
            const TensorSpec* spec = &m->layer[l].kind->state[i];
            size_t n = spec_count(spec, &c_dst), n_src = spec_count(spec, &c_src);
            real* row = dst->field[l][i] + to * n;
            if (src) memcpy(row, src->field[l][i] + from * n_src, min_size(n, n_src) * sizeof(real));
            else memset(row, 0, n * sizeof(real));
        }
}

// has_cache: does the state of the model grow with the number of tokens?
// The letters of a pattern that is longer than the model are no layers.
static bool has_cache(const Model* m) {
    for (int l = 0; l < m->n_layers; l++) if (m->layer[l].kind->letter == 'a') return true;
    return false;
}

// state_count: numbers in the state of one sequence
static size_t state_count(const Model* m) {
    size_t n = 0;
    for (int l = 0; l < m->n_layers; l++)
        for (int i = 0; i < m->layer[l].kind->n_state; i++)
            n += spec_count(&m->layer[l].kind->state[i], &m->config);
    return n;
}

// Workspace: the memory of one forward (and backward) over at most B x T tokens. A call may use
// any smaller number of rows and tokens in all. For inference nothing is kept per layer: the residual stream
// and the activations are reused from layer to layer.
typedef struct {
    size_t B, T;
    bool training;
    int recompute;
    Dropout dropout;                  // of the call at hand; rate 0 unless a training step sets it
    size_t bytes;                     // of everything below
    real* data;
    real** res;                       // [n_layers + 1] residual stream before each sub-layer, (B,T,D)
    real* (*acts)[MAX_FIELDS];        // [layer][field]
    real* (*scratch)[MAX_FIELDS];     // [kind][field]
    real *f, *f_rstd;                 // final norm (B,T,D), (B,T)
    real *logits, *losses, *dres, *df;
    int* best;                        // (B,T): see Backend.token_best; usually NULL
} Workspace;

enum { CLASSIFIER_ROWS = 256 };       // logits exist for this many tokens at a time

static size_t activation_count(const TensorSpec* spec, const Config* c, size_t B, size_t T) {
    size_t E = (size_t)c->d_inner, N = (size_t)c->d_state;
    if (spec->dim[0] == DIM_SCAN_SAVED) return selective_scan_saved(B, T, E, N);
    if (spec->dim[0] == DIM_SCAN_SCRATCH) return selective_scan_scratch(B, T, E, N);
    size_t H = (size_t)config_dim(c, DIM_H), P = (size_t)c->headdim, G = (size_t)c->ngroups;
    size_t Q = min_size((size_t)c->chunk_size, SSD_CHUNK);
    if (spec->dim[0] == DIM_SSD_SAVED) return ssd_saved(B, T, H, P, N, Q);
    if (spec->dim[0] == DIM_SSD_SCRATCH) return ssd_scratch(B, T, H, P, G, N, Q);
    return B * T * spec_count(spec, c);
}

// A Planner hands out pieces of one allocation; with base NULL it only counts, so that the plan can be
// printed and compared with the memory of the machine before anything is allocated.
typedef struct { real* base; size_t used; } Planner;

static real* plan(Planner* p, size_t count) {
    real* piece = p->base ? p->base + p->used : NULL;
    p->used += (count + 15) / 16 * 16;
    return piece;
}

static void workspace_plan(Workspace* w, const Model* m, Planner* p) {
    const Config* c = &m->config;
    size_t M = w->B * w->T, D = (size_t)c->d_model, Vp = (size_t)c->vocab_padded;
    for (int l = 0; l <= m->n_layers; l++) w->res[l] = w->training || l == 0 ? plan(p, M * D) : w->res[0];
    for (int k = 0; k < N_KINDS; k++) {
        bool used = false;      // a kind outside the pattern needs nothing
        int first = -1;
        for (int l = 0; l < m->n_layers; l++) {
            if (m->layer[l].kind != &kinds[k]) continue;
            used = true;
            for (int i = 0; i < kinds[k].n_acts; i++) {
                int dim = kinds[k].acts[i].dim[0];
                if (!w->training && (dim == DIM_SCAN_SAVED || dim == DIM_SSD_SAVED))
                    continue;    // stays NULL: nothing is saved
                bool made_again = w->recompute == RECOMPUTE_ALL ||
                                  (w->recompute == RECOMPUTE_CHEAP && (kinds[k].acts[i].flags & CHEAP));
                bool own = first < 0 || (w->training && !made_again);
                w->acts[l][i] =
                    own ? plan(p, activation_count(&kinds[k].acts[i], c, w->B, w->T)) : w->acts[first][i];
            }
            if (first < 0) first = l;
        }
        for (int i = 0; used && i < kinds[k].n_scratch; i++) {
            if (w->training || !(kinds[k].scratch[i].flags & BACKWARD_ONLY))
                w->scratch[k][i] = plan(p, activation_count(&kinds[k].scratch[i], c, w->B, w->T));
        }
    }
    w->f = plan(p, M * D);
    w->f_rstd = plan(p, M);
    w->logits = plan(p, min_size(CLASSIFIER_ROWS, M) * Vp);
    w->losses = plan(p, M);
    w->dres = w->training ? plan(p, M * D) : NULL;
    w->df = w->training ? plan(p, M * D) : NULL;
}

// workspace_alloc: with measure_only the bytes are computed and nothing is kept.
Workspace workspace_alloc(const Model* m, size_t B, size_t T, bool training, int recompute,
                          bool measure_only) {
    Workspace w;
    memset(&w, 0, sizeof w);
    w.B = B;
    w.T = T;
    w.training = training;
    w.recompute = recompute;
    w.res = (real**)xcalloc((size_t)m->n_layers + 1, sizeof(real*));
    w.acts = (real*(*)[MAX_FIELDS])xcalloc((size_t)m->n_layers, sizeof(*w.acts));
    w.scratch = (real*(*)[MAX_FIELDS])xcalloc(N_KINDS, sizeof(*w.scratch));
    Planner p = {NULL, 0};
    workspace_plan(&w, m, &p);
    w.bytes = p.used * sizeof(real);
    if (measure_only) return w;
    w.data = p.base = (real*)xcalloc(p.used, sizeof(real));
    p.used = 0;
    workspace_plan(&w, m, &p);
    return w;
}

void workspace_free(Workspace* w) {
    free(w->data);
    free(w->res);
    free(w->acts);
    free(w->scratch);
    memset(w, 0, sizeof *w);
}

// ------------------------------------------------------------------------------------------------
// 6.2 Forward, loss, backward

static void layer_forward(const Model* m, Workspace* w, const Run* run, int l, const State* s0,
                          const State* sT) {
    const Layer* layer = &m->layer[l];
    Run here = *run;
    here.dropout.place = l + 1;
    layer->kind->forward(&here, w->res[l + 1], w->res[l], layer->params, w->acts[l],
                         w->scratch[layer->kind - kinds], s0->field[l], sT->field[l]);
}

// model_forward: tokens (B,T) to the final normalized residual stream w->f (B,T,D).
//   res_0 = embedding[tokens]     res_{l+1} = res_l + layer_l(RMSNorm(res_l))     f = RMSNorm(res_last)
//   with dropout (w->dropout) on the embedding and on what each layer adds
//   doc (B,T) or NULL; s0 and sT: states before and after, see state_none; in inference they may be the same
//   state
void model_forward(const Model* m, Workspace* w, const int* tokens, const int* doc, size_t B, size_t T,
                   const State* s0, const State* sT) {
    assert(B * T <= w->B * w->T && B <= w->B);
    Run run = {&m->config, B, T, doc, w->recompute, w->dropout, m->half};
    size_t D = (size_t)m->config.d_model;
    if (m->half.bits)
        embedding_forward_half(w->res[0], tokens, m->half.bits + (m->embedding - m->half.from), B * T, D);
    else embedding_forward(w->res[0], tokens, m->embedding, B * T, D);
    dropout(w->res[0], w->res[0], &run.dropout, B * T, D);
    for (int l = 0; l < m->n_layers; l++) layer_forward(m, w, &run, l, s0, sT);
    rmsnorm_forward(w->f, w->f_rstd, w->res[m->n_layers], m->norm_f, B * T, D, (real)m->config.norm_eps);
}

// is_best: 1 when none of the V logits is larger than the target's, else 0
static int is_best(const real* z, int target, size_t V) {
    int best = target >= 0;
    for (size_t v = 0; best && v < V; v++) best = z[v] <= z[target];
    return best;
}

// model_loss: the classifier and the loss over `M` tokens of w->f, in pieces so that a whole logits array
// never exists.
//   logits = f W_head^T (M,Vp)
//   returns the sum of the losses; the caller divides by the number of targets
//   backward = true: also df = scale * d(sum)/df (written to w->df) and dW_head += scale * dlogits^T f
double model_loss(const Model* m, Workspace* w, const int* targets, size_t M, bool backward, real scale) {
    size_t D = (size_t)m->config.d_model, Vp = (size_t)m->config.vocab_padded;
    double sum = 0;
    if (backward) zero_real(w->df, M * D);
    for (size_t m0 = 0; m0 < M; m0 += CLASSIFIER_ROWS) {
        size_t n = min_size(CLASSIFIER_ROWS, M - m0);
        const real* f = w->f + m0 * D;
        matmul_forward(w->logits, Vp, f, D, m->head, NULL, n, D, Vp);
        crossentropy(w->losses + m0, backward ? w->logits : NULL, w->logits, targets + m0, scale, n, Vp);
        if (backward)
            matmul_backward(w->df + m0 * D, D, m->dhead, NULL, w->logits, Vp, f, D, m->head, n, D, Vp);
        for (size_t i = m0; i < m0 + n; i++) sum += (double)w->losses[i];
        for (size_t i = m0; w->best && !backward && i < m0 + n; i++)
            w->best[i] = is_best(w->logits + (i - m0) * Vp, targets[i], Vp);
    }
    return sum;
}

// model_backward: from w->df to every parameter gradient (+=). The arguments are those of model_forward; with
// recompute each layer runs forward again just before its backward. ds0, dsT: gradients of the states, see
// state_none.
void model_backward(const Model* m, Workspace* w, const int* tokens, const int* doc, size_t B, size_t T,
                    const State* s0, const State* ds0, const State* dsT) {
    Run run = {&m->config, B, T, doc, w->recompute, w->dropout, m->half};
    size_t D = (size_t)m->config.d_model, M = B * T;
    State none = state_none(m);
    zero_real(w->dres, M * D);
    rmsnorm_backward(w->dres, m->dnorm_f, w->df, w->res[m->n_layers], m->norm_f, w->f_rstd, M, D);
    for (int l = m->n_layers - 1; l >= 0; l--) {
        const Layer* layer = &m->layer[l];
        if (w->recompute == RECOMPUTE_ALL) layer_forward(m, w, &run, l, s0, &none);
        run.dropout.place = l + 1;
        layer->kind->backward(&run, w->dres, w->res[l], layer->grads, layer->params, w->acts[l],
                              w->scratch[layer->kind - kinds], s0->field[l], ds0->field[l], dsT->field[l]);
    }
    run.dropout.place = 0;
    embedding_backward(m->dembedding, dropout(w->dres, w->dres, &run.dropout, M, D), tokens, M, D);
    state_free(&none);
}

// p NULL: not kept
static bool all_finite(const real* p, size_t n) {
    for (size_t i = 0; p && i < n; i++)
        if (!isfinite((double)p[i])) return false;
    return true;
}

// ---------------------------------------------------------------------------------------------------
// 7. Optimizer: gradient norm, AdamW, learning rate schedules

// gradient_norm: the L2 norm of all gradients together; those of frozen tensors are set to zero. Sums of
// fixed
// blocks in double, added in order: the result does not depend on the number of threads.
double gradient_norm(Model* m) {
    enum { BLOCK = 65536 };
    for (int i = 0; i < m->n_tensors; i++)
        if (m->tensor[i].frozen) zero_real(m->grads + m->tensor[i].offset, m->tensor[i].count);
    size_t blocks = (m->n_elements + BLOCK - 1) / BLOCK;
    double *partial = (double*)xcalloc(blocks, sizeof(double)), sum = 0;
    #pragma omp parallel for
    for (size_t i = 0; i < blocks; i++) {
        const real* g = m->grads + i * BLOCK;
        size_t n = min_size(BLOCK, m->n_elements - i * BLOCK);
        double s = 0;
        #pragma omp simd reduction(+:s)
        for (size_t j = 0; j < n; j++) s += (double)g[j] * (double)g[j];
        partial[i] = s;
    }
    for (size_t i = 0; i < blocks; i++) sum += partial[i];
    free(partial);
    return sqrt(sum);
}

// clip_scale: what the gradients are multiplied with so that their norm is at most `clip` (0: no clipping)
double clip_scale(double norm, double clip) {
    double scale = clip / (norm + 1e-6);
    return clip > 0 && scale < 1 ? scale : 1;
}

typedef struct { double beta1, beta2, eps, weight_decay; } AdamW;

// adamw_update: step number `step` (from 1) on every tensor that is not frozen; tensors without the DECAY
// flag
// are not decayed.
//   g = scale * grad     m = beta1 m + (1-beta1) g     v = beta2 v + (1-beta2) g^2
//   p = p (1 - lr wd) - lr * (m / (1-beta1^step)) / (sqrt(v / (1-beta2^step)) + eps)
//   Loshchilov, Hutter (1711.05101)
void adamw_update(Model* model, const AdamW* opt, double lr, double scale, int64_t step) {
    real beta1 = (real)opt->beta1, beta2 = (real)opt->beta2, eps = (real)opt->eps, s = (real)scale;
    real rate = (real)(lr / (1 - pow(opt->beta1, (double)step)));
    real v_scale = (real)(1 / sqrt(1 - pow(opt->beta2, (double)step)));
    for (int i = 0; i < model->n_tensors; i++) {
        const Tensor* t = &model->tensor[i];
        if (t->frozen) continue;
        real *p = model->params + t->offset, *m = model->m + t->offset, *v = model->v + t->offset;
        const real* grad = model->grads + t->offset;
        real keep = t->spec->flags & DECAY ? (real)(1 - lr * opt->weight_decay) : 1;
        #pragma omp parallel for simd if (parallel : t->count > 16384)
        for (size_t j = 0; j < t->count; j++) {
            real g = s * grad[j];
            m[j] = beta1 * m[j] + (1 - beta1) * g;
            v[j] = beta2 * v[j] + (1 - beta2) * g * g;
            p[j] = keep * p[j] - rate * m[j] / (sqrt_real(v[j]) * v_scale + eps);
        }
    }
}

// lr_at: the learning rate of step `step` (from 0) of `steps`. Linear warmup over `warmup` steps, then by
// schedule:
//   constant | linear or cosine from lr to min_lr over the rest | wsd (warmup, stable, decay): constant, then
//   linear to min_lr over the last `decay` steps
enum { SCHEDULE_CONSTANT, SCHEDULE_LINEAR, SCHEDULE_COSINE, SCHEDULE_WSD };

double lr_at(int schedule, int64_t step, int64_t steps, int64_t warmup, int64_t decay, double lr,
             double min_lr) {
    if (step < warmup) return lr * (double)(step + 1) / (double)warmup;
    double done = steps > warmup ? (double)(step - warmup) / (double)(steps - warmup) : 1;
    if (schedule == SCHEDULE_WSD)
        done = decay > 0 && step > steps - decay ? (double)(step - (steps - decay)) / (double)decay : 0;
    if (done > 1) done = 1;
    switch (schedule) {
        case SCHEDULE_LINEAR: case SCHEDULE_WSD: return lr + (min_lr - lr) * done;
        case SCHEDULE_COSINE: return min_lr + (lr - min_lr) * 0.5 * (1 + cos(3.141592653589793 * done));
    }
    return lr;
}

// defines: checkpoint_save, model_load, model_load_tensors, optimizer_load, model_hash
#include "data/checkpoint.h"
// defines: Options, Settings, settings_parse, settings_print, help_print
#include "data/options.h"

// ---------------------------------------------------------------------------------------------------
// 8. Sampling: from logits to a token

// The order of the rules: repetition penalty, top-k, min-p, temperature, top-p, draw. Each is off at its
// neutral value.
typedef struct {
    double temperature;          // 0: the most likely token
    int64_t top_k;               // keep the k most likely (0: all); 1: the most likely token
    double top_p;    // keep the smallest set of best tokens whose probability reaches p (0 or 1: all)
    double min_p;                // keep tokens with at least min_p times the probability of the best (0: all)
    double repetition_penalty;   // logits of tokens already seen: z/rho when z >= 0, z*rho otherwise (1: off)
    uint64_t seed;
} Sampler;

typedef struct { float z; int token; } Candidate;

// better first: higher logit, then lower token
static int compare_candidates(const void* a, const void* b) {
    const Candidate *x = (const Candidate*)a, *y = (const Candidate*)b;
    if (x->z != y->z) return x->z > y->z ? -1 : 1;
    return (x->token > y->token) - (x->token < y->token);
}

// float_order: an unsigned integer that is ordered like the float: the bits, with negative numbers folded
// over.
static inline uint32_t float_order(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// keep_top_k: keeps exactly the k best of n candidates, in their order. The k-th largest logit is found by
// bisection over the 2^32 floats in order (their bits, sign-folded, are ordered integers): 32 passes and no
// sort.
static size_t keep_top_k(Candidate* c, size_t n, size_t k) {
    uint32_t lo = 0, hi = UINT32_MAX;        // the largest key that at least k candidates reach
    for (int pass = 0; pass < 32 && lo < hi; pass++) {
        uint32_t mid = lo + (hi - lo) / 2 + 1;
        size_t count = 0;
        for (size_t i = 0; i < n; i++) count += float_order(c[i].z) >= mid;
        if (count < k) {
            hi = mid - 1;
            continue;
        }
        lo = mid;
        size_t kept = 0;     // what is below can no longer be among the k best
        for (size_t i = 0; i < n; i++)
            if (float_order(c[i].z) >= mid) c[kept++] = c[i];
        n = kept;
    }
    size_t above = 0, kept = 0;
    for (size_t i = 0; i < n; i++) above += float_order(c[i].z) > lo;
    size_t ties = k - above;    // of the candidates equal to the k-th, those with the lowest tokens stay
    for (size_t i = 0; i < n; i++) {
        uint32_t key = float_order(c[i].z);
        if (key > lo || (key == lo && ties > 0)) {
            if (key == lo) ties--;
            c[kept++] = c[i];
        }
    }
    return kept;
}

// keep_top_p: sorts the best of the candidates [begin, end) to the front, until with `sum`, the total of
// those before them, they reach `total`; returns where they end. Quicksort, but the halves behind that end
// stay as they are.
static size_t keep_top_p(Candidate* c, size_t begin, size_t end, double total, double* sum) {
    while (end - begin > 32 && *sum < total) {
        Candidate three[3] = {c[begin], c[begin + (end - begin) / 2], c[end - 1]}, pivot;
        qsort(three, 3, sizeof *three, compare_candidates);
        pivot = three[1];
        size_t i = begin, j = end - 1;
        for (;; i++, j--) {              // then [begin, i) are no worse than the pivot, [i, end) no better
            while (compare_candidates(&c[i], &pivot) < 0) i++;
            while (compare_candidates(&c[j], &pivot) > 0) j--;
            if (i >= j) break;
            Candidate swap = c[i];
            c[i] = c[j];
            c[j] = swap;
        }
        begin = keep_top_p(c, begin, i, total, sum);
        if (begin < i) return begin;
    }
    if (*sum < total) qsort(c + begin, end - begin, sizeof *c, compare_candidates);
    while (begin < end && *sum < total) *sum += (double)c[begin++].z;
    return begin;
}

// sample_part: the candidates of tokens [begin, end), from c[begin] on: the k best of them, in their order.
// The k best of all are among the k best of the parts, so the parts can be made side by side.
enum { SAMPLE_PARTS = 16 };
typedef struct { Candidate best; size_t n; int64_t bad; } SamplePart;      // bad: the first that is no number

static SamplePart sample_part(const Sampler* s, const real* logits, const unsigned char* seen, size_t begin,
                              size_t end, size_t k, Candidate* c) {
    SamplePart part = {{-INFINITY, -1}, end - begin, -1};
    double rho = s->repetition_penalty;
    for (size_t v = begin; v < end; v++) {
        double z = (double)logits[v];
        if (rho != 1 && seen[v]) z = z >= 0 ? z / rho : z * rho;
        if (isnan(z) || z > 3.4e38) {
            part.bad = (int64_t)v;
            return part;
        }
        c[v].z = (float)z;
        c[v].token = (int)v;
        if (c[v].z > part.best.z) part.best = c[v];
    }
    if (k < part.n) part.n = keep_top_k(c + begin, part.n, k);
    return part;
}

// sample_token: one draw from logits (V). seen (V) marks the tokens of prompt and output so far. The random
// number is that of (seed, STREAM_SAMPLE + row, position): a sequence does not depend on the others in its
// batch. c: memory for V. false when the logits hold NaN or +infinity, or no finite value at all.
bool sample_token(const Sampler* s, const real* logits, const unsigned char* seen, size_t V, uint64_t row,
                  uint64_t position, Candidate* c, int* token, Error* err) {
    bool greedy = s->top_k == 1 || s->temperature == 0;
    size_t k = s->top_k > 0 && !greedy ? (size_t)s->top_k : V, n = 0;
    SamplePart part[SAMPLE_PARTS];
    #pragma omp parallel for if (V > 4096)
    for (size_t i = 0; i < SAMPLE_PARTS; i++)
        part[i] = sample_part(s, logits, seen, V * i / SAMPLE_PARTS, V * (i + 1) / SAMPLE_PARTS, k, c);
    Candidate best = {-INFINITY, -1};
    for (size_t i = 0; i < SAMPLE_PARTS; i++) {      // the parts move together
        if (part[i].bad >= 0)
            return fail(err, "the logit of token %lld is %f: the model has diverged or its file is damaged",
                        (long long)part[i].bad, (double)logits[part[i].bad]);
        if (part[i].best.z > best.z) best = part[i].best;
        memmove(c + n, c + V * i / SAMPLE_PARTS, part[i].n * sizeof *c);
        n += part[i].n;
    }
    if (best.token < 0)
        return fail(err, "no token has a finite logit: the model has diverged or its file is damaged");
    *token = best.token;
    if (greedy) return true;
    if (k < n) n = keep_top_k(c, n, k);
    if (s->min_p > 0) {         // z >= z_best + ln(min_p)
        size_t kept = 0;
        for (size_t i = 0; i < n; i++)
            if (c[i].z >= best.z + (float)log(s->min_p)) c[kept++] = c[i];
        n = kept;
    }
    #pragma omp parallel for if (n > 4096)
    for (size_t i = 0; i < n; i++)
        c[i].z = expf((float)(((double)c[i].z - (double)best.z) / s->temperature));
    double sum = 0;             // probabilities, not normalized, went where the logits were
    for (size_t i = 0; i < n; i++) sum += (double)c[i].z;
    if (s->top_p > 0 && s->top_p < 1) {
        // tokens below (1-p)/n lose together less than 1-p, so they are never in the set
        size_t kept = 0;
        for (size_t i = 0; i < n; i++)
            if ((double)c[i].z >= sum * (1 - s->top_p) / (double)n) c[kept++] = c[i];
        double before = 0;
        n = keep_top_p(c, 0, kept, s->top_p * sum, &before);
        sum = before;
    }
    double u = random_uniform(s->seed, STREAM_SAMPLE + row, position) * sum;
    for (size_t i = 0; i < n; i++) {
        *token = c[i].z > 0 ? c[i].token : *token;
        u -= (double)c[i].z;
        if (u < 0) break;
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------
// 9. Backend: what the loops call; the CPU one
//
// The training loop, evaluation and generation are written once against these functions. The model's arrays
// on the host are the CPU backend's own; another backend keeps its copy and moves it with upload and
// download.

// Session: sequences being generated, their recurrent state and the workspace of one call.
typedef struct {
    size_t rows, chunk;      // sequences; most tokens per call
    State state;
    State view;              // state from some row on: pointers only
    size_t state_bytes;      // of all rows, where the backend keeps it
    Workspace work;          // of the CPU backend
    void* device;            // of another one
} Session;

// Step: one optimizer step, and what comes out of it
typedef struct {
    const int *inputs, *targets;       // (accum,B,T): `accum` micro-batches
    const int* doc;                    // the same, or NULL: one document per row
    const bool* fresh;                 // (accum,B): rows whose carried state starts from zero
    size_t accum, B, T, n_targets;
    AdamW opt;
    double lr, clip;
    int64_t number;                    // from 1
    Dropout dropout;
} Step;

typedef struct {
    double loss;                       // sum over the targets
    double norm;                       // of the gradient, before clipping
    bool taken;                        // false: loss or norm is not finite, and nothing was updated
    int micro;                         // then: the first micro-batch with such a loss, or 0
} StepResult;

typedef struct Backend Backend;
struct Backend {
    const char* name;
    Model* model;
    Workspace work;
    State none;
    State *carry_in, *carry_out;       // with carried states: one per micro-batch
    size_t activation_bytes;
    void* device;                      // what another backend keeps for itself
    double norm;                       // of the last gradient_norm
    StepResult result;                 // of the last step
    Dropout dropout;                   // of the step at hand; see dropout_of
    double peak_flops;                 // of the device, in matmuls of this precision; 0: not known
    // step_begin starts a step, step_end waits for the oldest one begun. At most `queue` may be under way
    // when the next begins: a GPU computes one step while the host prepares the next. After a step that was
    // not taken the host's arrays hold its parameters and gradients.
    int queue;
    void (*step_begin)(Backend*, const Step*);
    StepResult (*step_end)(Backend*);
    // forward: the sum of the losses of (B,T) tokens; with scale > 0 also prepares the gradient of scale *
    // sum.
    //   micro: the micro-batch whose carried state is used, -1 for none
    //   token_loss, token_best (B,T), unless NULL: also what it says of each token: its loss, and (scale 0
    //   only) whether it is the most likely one, 1 or 0
    real* token_loss;
    int* token_best;
    double (*forward)(Backend*, int micro, const int* tokens, const int* targets, const int* doc, size_t B,
                      size_t T, double scale);
    void (*backward)(Backend*, int micro, const int* tokens, const int* doc, size_t B,
                     size_t T);    // adds to the gradients
    void (*zero_gradients)(Backend*);
    double (*gradient_norm)(Backend*);
    void (*update)(Backend*, const AdamW*, double lr, double scale, int64_t step);
    // decode: T more tokens of `rows` sequences from row0 on; logits (rows,Vp) after the last one, or NULL
    void (*decode)(Backend*, Session*, size_t row0, size_t rows, const int* tokens, size_t T, real* logits);
    // greedy_begin: starts one more token of every sequence; tokens NULL: the most likely ones after the last
    // begin. greedy_end: waits for it: the most likely next tokens, -1 after a logit of NaN or +inf. A
    // GPU computes one token while the host writes the one before. NULL: use decode
    void (*greedy_begin)(Backend*, Session*, const int* tokens);
    void (*greedy_end)(Backend*, Session*, int* next);
    void (*session_open)(Backend*, Session*);        // memory for decode
    void (*session_close)(Backend*, Session*);
    void (*session_sync)(Backend*, Session*, bool to_host);      // Session.state: host -> device, or back
    void (*download)(Backend*);        // device -> host: parameters, gradients, moments
    void (*upload)(Backend*);
    void (*destroy)(Backend*);
};

// dropout_of: that of one micro-batch of a training step; evaluation and generation (micro -1) have none
static Dropout dropout_of(const Backend* b, int micro, size_t B, size_t T) {
    Dropout drop = b->dropout;
    if (micro < 0) drop.rate = 0;
    else drop.first = (size_t)micro * B * T;
    return drop;
}

static double cpu_forward(Backend* b, int micro, const int* tokens, const int* targets, const int* doc,
                          size_t B, size_t T, double scale) {
    const State* s0 = b->carry_in && micro >= 0 ? &b->carry_in[micro] : &b->none;
    const State* sT = b->carry_in && micro >= 0 ? &b->carry_out[micro] : &b->none;
    b->work.dropout = dropout_of(b, micro, B, T);
    b->work.best = b->token_best;
    model_forward(b->model, &b->work, tokens, doc, B, T, s0, sT);
    double sum = model_loss(b->model, &b->work, targets, B * T, scale > 0, (real)scale);
    if (b->token_loss) memcpy(b->token_loss, b->work.losses, B * T * sizeof(real));
    return sum;
}

static void cpu_backward(Backend* b, int micro, const int* tokens, const int* doc, size_t B, size_t T) {
    const State* s0 = b->carry_in && micro >= 0 ? &b->carry_in[micro] : &b->none;
    model_backward(b->model, &b->work, tokens, doc, B, T, s0, &b->none, &b->none);
}

static void cpu_zero_gradients(Backend* b) { zero_real(b->model->grads, b->model->n_elements); }
static double cpu_gradient_norm(Backend* b) { return gradient_norm(b->model); }
static void cpu_update(Backend* b, const AdamW* opt, double lr, double scale, int64_t step) {
    adamw_update(b->model, opt, lr, scale, step);
}

// step_begin, step_end of backends that do everything at once
void plain_step_begin(Backend* b, const Step* s) {
    StepResult r = {0, NAN, false, 0};
    double scale = s->n_targets ? 1.0 / (double)s->n_targets : 0;
    b->dropout = s->dropout;
    b->zero_gradients(b);
    for (int micro = 0; micro < (int)s->accum; micro++) {
        size_t at = (size_t)micro * s->B * s->T;
        const int* doc = s->doc ? s->doc + at : NULL;
        for (size_t row = 0; b->carry_in && row < s->B; row++)
            if (s->fresh[(size_t)micro * s->B + row])
                state_copy_row(b->model, &b->carry_in[micro], row, NULL, 0);
        r.loss += b->forward(b, micro, s->inputs + at, s->targets + at, doc, s->B, s->T, scale);
        if (!isfinite(r.loss)) {
            r.micro = micro;
            break;
        }
        if (scale > 0) b->backward(b, micro, s->inputs + at, doc, s->B, s->T);
    }
    if (isfinite(r.loss)) r.norm = b->gradient_norm(b);
    r.taken = isfinite(r.norm);
    if (r.taken) b->update(b, &s->opt, s->lr, clip_scale(r.norm, s->clip), s->number);
    for (size_t i = 0; r.taken && b->carry_in && i < s->accum; i++) {
        State swap = b->carry_in[i];
        b->carry_in[i] = b->carry_out[i];
        b->carry_out[i] = swap;
    }
    b->result = r;
}

StepResult plain_step_end(Backend* b) { return b->result; }

// state_round: with config.state_bf16 the states of the recurrences of `rows` rows are rounded to bfloat16,
// to the nearest, ties to even, at the end of every call of decode: of a prompt after each --chunk. The CPU
// keeps them as `real` all the same; a GPU keeps two bytes.
static void state_round(const Model* m, const State* s, size_t rows) {
    for (int l = 0; m->config.state_bf16 && l < m->n_layers; l++)
        for (int i = 0; i < m->layer[l].kind->n_state; i++) {
            const TensorSpec* spec = &m->layer[l].kind->state[i];
            size_t n = spec->flags & RECURRENT ? rows * spec_count(spec, &m->config) : 0;
            real* h = s->field[l][i];
            #pragma omp parallel for if (n > 4096)
            for (size_t j = 0; j < n; j++) h[j] = isnan(h[j]) ? h[j] : (real)round_bf16((float)h[j]);
        }
}

static void cpu_decode(Backend* b, Session* s, size_t row0, size_t rows, const int* tokens, size_t T,
                       real* logits) {
    const Model* m = b->model;
    size_t D = (size_t)m->config.d_model, Vp = (size_t)m->config.vocab_padded;
    for (int l = 0; l < m->n_layers; l++)
        for (int i = 0; i < m->layer[l].kind->n_state; i++)
            s->view.field[l][i] =
                s->state.field[l][i] + row0 * spec_count(&m->layer[l].kind->state[i], &m->config);
    model_forward(m, &s->work, tokens, NULL, rows, T, &s->view, &s->view);
    state_round(m, &s->view, rows);
    for (size_t r = 0; logits && r < rows; r++)      // the last token of each row, side by side
        if (T > 1) memmove(s->work.f + r * D, s->work.f + (r * T + T - 1) * D, D * sizeof(real));
    if (logits) linear_forward(&m->half, logits, Vp, s->work.f, D, m->head, NULL, rows, D, Vp);
}

// `rows` x 1 or 1 x `chunk` tokens
static void cpu_session_open(Backend* b, Session* s) {
    s->work =
        workspace_alloc(b->model, s->rows, (s->chunk + s->rows - 1) / s->rows, false, RECOMPUTE_NONE, false);
}
static void cpu_session_close(Backend* b, Session* s) { (void)b; workspace_free(&s->work); }

// the host arrays are the backend's own
static void cpu_session_sync(Backend* b, Session* s, bool to_host) {
    if (!to_host) state_round(b->model, &s->state, s->rows);
}
static void cpu_transfer(Backend* b) { (void)b; }

static void cpu_destroy(Backend* b) {
    workspace_free(&b->work);
    state_free(&b->none);
}

// backend_cpu: B, T: the largest call of forward (0: decoding only)
Backend backend_cpu(Model* m, size_t B, size_t T, bool training, int recompute) {
    Backend b;
    memset(&b, 0, sizeof b);
    b.name = "cpu";
    b.model = m;
    b.none = state_none(m);
    if (B) b.work = workspace_alloc(m, B, T, training, recompute, false);
    b.forward = cpu_forward;
    b.backward = cpu_backward;
    b.zero_gradients = cpu_zero_gradients;
    b.gradient_norm = cpu_gradient_norm;
    b.update = cpu_update;
    b.step_begin = plain_step_begin;
    b.step_end = plain_step_end;
    b.decode = cpu_decode;
    b.activation_bytes = b.work.bytes;
    b.session_open = cpu_session_open;
    b.session_close = cpu_session_close;
    b.session_sync = cpu_session_sync;
    b.download = cpu_transfer;
    b.upload = cpu_transfer;
    b.destroy = cpu_destroy;
    return b;
}

Session session_create(Backend* b, size_t rows, size_t chunk) {
    Session s;
    memset(&s, 0, sizeof s);
    s.rows = rows;
    s.chunk = chunk;
    s.state = state_alloc(b->model, rows);
    s.view = state_none(b->model);
    s.state_bytes = s.state.n_elements * sizeof(real);
    b->session_open(b, &s);
    return s;
}

void session_free(Backend* b, Session* s) {
    b->session_close(b, s);
    state_free(&s->state);
    state_free(&s->view);
}

// ---------------------------------------------------------------------------------------------------
// 10. Generation: data/generation.h

// defines: prompts_read, Prompt, where a text ends, state_save, state_load, generate, generate_turns
#include "data/generation.h"

// ---------------------------------------------------------------------------------------------------
// 11. Training and evaluation

// defines: Data, default data, which tokenizer, which configuration, frozen tensors, which backend
#include "data/setup.h"

// defines: evaluate and, of the word `eval`, eval_check, eval_text, items_open, eval_items, results_write
#include "data/evaluation.h"

typedef struct {
    int64_t step, samples;       // finished optimizer steps; sample counter of the loader
    double best_loss;            // validation
    int64_t best_step;
    double train_loss;           // of the last step
} Progress;

// Record: what the log says of one step
typedef struct {
    int64_t step, samples, targets;   // its number; the sample counter before it; what the loss is a mean of
    double lr, loss, norm, rate;      // rate: tokens per second
} Record;

enum { MAX_QUEUE = 2 };

typedef struct {
    Settings* settings;
    Model model;
    Data data;
    Loader loader, val_loader;
    Backend backend;
    Progress progress;
    int *inputs, *targets, *doc;      // one optimizer step: (grad_accum * B, T)
    bool* fresh;
    Record queue[MAX_QUEUE];          // steps begun whose loss is not known yet, oldest first
    int queued;
    bool save_failed;
    FILE* log;
} Trainer;

// defines: trainer_save, resume_settings, resume_progress, log_open, plot_loss, lock_run
#include "data/run.h"

static void step_batch(Trainer* t, int64_t samples) {
    const Options* o = &t->settings->o;
    Error err;
    if (!loader_batch(&t->loader, samples, o->batch_size * o->grad_accum, t->inputs, t->targets, t->doc,
                      t->fresh, &err))
        die("%s", err.text);
}

static Dropout step_dropout(const Options* o, int64_t number) {
    Dropout drop = {o->dropout, random_bits(o->seed, STREAM_DROPOUT, (uint64_t)(number - 1)), 0, 0};
    return drop;
}

// defines: trainer_evaluate, trainer_sample, step_not_finite, trainer_check, spike_score, print_speed
#include "data/watch.h"

// step_start: begins one optimizer step; its loss comes from step_finish.
static void step_start(Trainer* t, double lr) {
    const Options* o = &t->settings->o;
    Progress* p = &t->progress;
    step_batch(t, p->samples);
    Step s = {t->inputs,
              t->targets,
              o->reset_documents ? t->doc : NULL,
              t->fresh,
              (size_t)o->grad_accum,
              (size_t)o->batch_size,
              (size_t)o->seq_len,
              0,
              {o->beta1, o->beta2, o->eps, o->weight_decay},
              lr,
              o->clip,
              p->step + 1,
              step_dropout(o, p->step + 1)};
    for (size_t i = 0; i < s.accum * s.B * s.T; i++) s.n_targets += t->targets[i] >= 0;
    t->backend.step_begin(&t->backend, &s);
    Record r = {p->step + 1, p->samples, (int64_t)s.n_targets, lr, 0, 0, 0};
    t->queue[t->queued++] = r;
    p->step++;
    p->samples += (int64_t)(s.accum * s.B);
}

// step_finish: waits for the oldest step that was begun. Returns false with a description when its loss or
// gradient is not finite; then it was not taken.
static bool step_finish(Trainer* t, Record* r, Error* err) {
    StepResult result = t->backend.step_end(&t->backend);
    *r = t->queue[0];
    memmove(t->queue, t->queue + 1, (size_t)--t->queued * sizeof(Record));
    r->loss = r->targets > 0 ? result.loss / (double)r->targets : 0;
    r->norm = result.norm;
    t->progress.train_loss = r->loss;
    if (result.taken) return true;
    return step_not_finite(t, r, &result, err);
}

// train_loop: steps until done or stopped. Returns the exit code.
static int train_loop(Trainer* t) {
    const Options* o = &t->settings->o;
    Progress* p = &t->progress;
    Error err;
    double tokens_per_step = (double)(o->batch_size * o->grad_accum * o->seq_len);
    double start = seconds_now(), since = start,
           other = 0;    // other: evaluation, saving, sampling since the last line
    double timed_seconds = 0;          // of `timed` steps, without the first and without what is in `other`
    int64_t timed = 0;
    int64_t first = p->step, shown = p->step;
    int bad_in_a_row = 0;
    Spike losses, norms;
    memset(&losses, 0, sizeof losses);
    memset(&norms, 0, sizeof norms);
    int64_t decay = o->decay_steps ? o->decay_steps : o->steps / 5;
    int schedule = SCHEDULE_CONSTANT;
    if (strcmp(o->schedule, "linear") == 0) schedule = SCHEDULE_LINEAR;
    if (strcmp(o->schedule, "cosine") == 0) schedule = SCHEDULE_COSINE;
    if (strcmp(o->schedule, "wsd") == 0) schedule = SCHEDULE_WSD;
    int queue = strcmp(o->on_nan, "skip") == 0 ? 0 : t->backend.queue;   // skipping needs to know at once
    double last_finish = 0;
    bool drain = false;      // before the model is evaluated, saved or sampled, every step begun is finished
    while ((p->step < o->steps && !stop_signal) || t->queued > 0) {
        bool going_on = p->step < o->steps && !stop_signal;
        if (t->queued == 0) drain = false;
        if (going_on && !drain)
            step_start(t, lr_at(schedule, p->step, o->steps, o->warmup, decay, o->lr, o->min_lr));
        bool last = p->step == o->steps;
        bool evaluate_now = t->data.has_val && (last || (o->eval_every && p->step % o->eval_every == 0));
        bool save_now = last || (o->save_every && p->step % o->save_every == 0);
        bool sample_now = !last && o->sample_every && p->step % o->sample_every == 0;
        drain = evaluate_now || save_now || sample_now || (o->check && p->step % o->check == 0);
        if (going_on && !drain && t->queued <= queue) continue;
        Record r;
        if (!step_finish(t, &r, &err)) {
            if (strcmp(o->on_nan, "skip") == 0 && ++bad_in_a_row <= 3) {
                warn("%s; skipped (%d in a row)", err.text, bad_in_a_row);
                continue;
            }
            fflush(stdout);
            fprintf(stderr,
                    "error: %s; this step was not taken, earlier checkpoints are untouched; try a lower --lr "
                    "(now %g) or --clip\n",
                    err.text, o->lr);
            return 1;
        }
        bad_in_a_row = 0;
        if (spike_score(&losses, r.loss) > 6)
            warn("step %lld: the loss jumped to %.4f", (long long)r.step, r.loss);
        if (spike_score(&norms, log(r.norm + 1e-12)) > 6)    // norms are spread over factors, not over sums
            warn("step %lld: the norm of the gradient jumped to %.3f", (long long)r.step, r.norm);
        bool newest = t->queued == 0;
        evaluate_now = evaluate_now && newest;
        double now = seconds_now();
        if (last_finish > 0) { timed_seconds += now - last_finish; timed++; }
        r.rate = tokens_per_step * (double)(r.step - shown) / (now - since - other);
        if (r.step == o->steps || evaluate_now || r.step % o->log_every == 0 || r.step == first + 1) {
            char left[32];
            format_time((now - start) / (double)(r.step - first) * (double)(o->steps - r.step), left);
            printf("step %6lld/%lld | loss %7.4f | lr %.2e | norm %7.3f | %8.0f tok/s | left %s\n",
                   (long long)r.step, (long long)o->steps, r.loss, r.lr, r.norm, r.rate, left);
            shown = r.step;
            since = seconds_now();
            other = 0;
        }
        double pause = seconds_now(), val_loss = 0;
        char bpb[32] = "", val_text[32] = "";
        bool best = false;
        if (evaluate_now) {
            if (!trainer_evaluate(t, &val_loss, &err)) die("%s", err.text);
            best = val_loss < p->best_loss;
            if (best) { p->best_loss = val_loss; p->best_step = p->step; }
            bits_per_byte(&t->data.tokenizer, val_loss, bpb);
            snprintf(val_text, sizeof val_text, "%.6f", val_loss);
            printf("step %6lld/%lld | validation loss %.4f%s%s%s\n", (long long)p->step, (long long)o->steps,
                   val_loss, bpb[0] ? " | bits per byte " : "", bpb, best ? " | best so far" : "");
        }
        fprintf(t->log, "%lld,%.6f,%.6e,%.6f,%.1f,%s,%s\n", (long long)r.step, r.loss, r.lr, r.norm, r.rate,
                val_text, bpb);
        fflush(t->log);
        if (best || (save_now && newest)) trainer_save(t, best);
        if (sample_now && newest && !trainer_sample(t, &err))
            warn("%s", err.text);       // a full disk under stdout must not end the run
        if (o->check && r.step % o->check == 0) trainer_check(t, &r);
        fflush(stdout);
        last_finish = seconds_now();
        other += last_finish - pause;
    }
    if (stop_signal) {
        printf("stopped by signal %d at step %lld\n", (int)stop_signal, (long long)p->step);
        if (p->step > first) trainer_save(t, false);
        if (p->step > 0) printf("continue with: train_mamba --out %s --resume\n", o->out);
        return 128 + (int)stop_signal;
    }
    if (bad_in_a_row) trainer_save(t, false);      // the last step was skipped, so the loop did not save
    char took[32];
    format_time(seconds_now() - start, took);
    printf("done: %lld steps in %s, training loss %.4f", (long long)(p->step - first), took, p->train_loss);
    if (t->data.has_val)
        printf(", best validation loss %.4f at step %lld", p->best_loss, (long long)p->best_step);
    printf("\n");
    if (timed > 0) print_speed(t, tokens_per_step * (double)timed / timed_seconds);
    if (!trainer_sample(t, &err)) warn("%s", err.text);
    return t->save_failed ? 1 : 0;
}

// ---------------------------------------------------------------------------------------------------
// 12. Main

// defines: train_main, generate_main, eval_main
#include "data/words.h"
// defines: info_main, convert_main
#include "data/info.h"
// defines: tokenize_main
#include "data/tokenize.h"

int ssm_main(int argc, char** argv) {
    // A closed stdin, stdout or stderr would lend its number to the next file opened, and messages would go
    // in there.
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDONLY) != fd) return 1;
    signal(SIGXFSZ, SIG_IGN);            // a file size limit becomes an ordinary write error
    limit_spinning(argv);
    int skip, word = word_parse(argc, argv, &skip);
    if (!word) return printed(0);
    Settings settings;
    Error err;
    if (!settings_parse(&settings, word, argc - skip, argv + skip, &err)) die("%s", err.text);
    set_threads(settings.o.threads);
    int code = 0;
    switch (word) {
        case WORD_TRAIN: code = train_main(&settings); break;
        case WORD_GENERATE: code = generate_main(&settings); break;
        case WORD_EVAL: code = printed(eval_main(&settings)); break;
        case WORD_INFO: code = printed(info_main(&settings)); break;
        case WORD_CONVERT: code = convert_main(&settings); break;
        case WORD_TOKENIZE: code = tokenize_main(&settings); break;
    }
    settings_free(&settings);
    return code;
}

#ifndef SSM_NO_MAIN
int main(int argc, char** argv) { return ssm_main(argc, argv); }
#endif
