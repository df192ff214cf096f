// The forward pass of state space duality (SSD, Mamba-2): from the recurrence to the kernel that ships.
//   h_t = exp(dt_t A) h_{t-1} + dt_t x_t Bt_t^T       one decay per head, a state of P x N numbers per head
//   y_t = h_t Ct_t + Dskip x_t
// As a recurrence it is 6 P N operations per token and head that no matrix unit can do. Chunks of Q tokens
// turn nearly all of it into matrix products (cs_i: the sum of dt A from the chunk's start up to token i, S:
// the state before the chunk):
//   CB = Ct Bt^T                                          (Q,Q), the same for all heads of a group
//   M_ij = CB_ij exp(cs_i - cs_j) dt_j for j <= i         (Q,Q)
//   y = M x + exp(cs) (Ct S^T) + Dskip x                  (Q,P)
//   S' = exp(cs_last) S + (exp(cs_last - cs_j) dt_j x_j)^T Bt
// The floor is the time of the bytes: x, Bt, Ct and y once, the states saved for backward (every 256 tokens).
// All rungs save these states; the general rungs of the shipped code (documents, initial states, any size)
// are not asked for here.
#include "ladder.h"

enum { P = 64, N = 128, Q = 64, EVERY = SSD_SPACING / Q };      // one group

// one problem; shapes as in ssd_forward_cuda
typedef struct {
    bf16 *y, *states;
    const bf16 *x, *Bt, *Ct;
    const float *dt, *A_log, *Dskip;
    size_t ldx, ldbc, B, T, H;
} Ssd;
static Ssd ssd;

// where the state before chunk c (a multiple of 256 tokens) is saved
__device__ __forceinline__ bf16* saved_at(const Ssd& p, size_t b, size_t c, size_t h) {
    return p.states + ((b * ((p.T + SSD_SPACING - 1) / SSD_SPACING) + c / EVERY) * p.H + h) * P * N;
}

// ------------------------------------------------------------------------------------------------
// v1: the loop of the CPU, a thread per channel; the state is an array in memory.

static float* memory;                                  // whatever a rung needs between its kernels

__global__ void ssd_kernel1(Ssd p, float* memory) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, b = i / (p.H * P), h = i / P % p.H, c = i % P;
    if (b >= p.B) return;
    float *state = memory + i * N, A = -expf(p.A_log[h]);
    for (int n = 0; n < N; n++) state[n] = 0;
    for (size_t t = 0; t < p.T; t++) {
        size_t row = b * p.T + t;
        float dt = p.dt[(b * p.H + h) * p.T + t], a = expf(dt * A);
        float x_t = to_float(p.x[row * p.ldx + h * P + c]), y_t = p.Dskip[h] * x_t;
        for (int n = 0; n < N; n++) {
            if (t % SSD_SPACING == 0) saved_at(p, b, t / Q, h)[c * N + n] = from_float<bf16>(state[n]);
            state[n] = a * state[n] + dt * x_t * to_float(p.Bt[row * p.ldbc + n]);
            y_t += to_float(p.Ct[row * p.ldbc + n]) * state[n];
        }
        p.y[row * p.H * P + h * P + c] = from_float<bf16>(y_t);
    }
}

// ------------------------------------------------------------------------------------------------
// v2: the chunk form in plain kernels, as it is published: cs; CB; what each chunk adds to the state; the
// states one after the other; y. A thread makes one number. Everything between the kernels goes through
// memory: at 8 x 2048 tokens, 24 heads the states alone are 200 MB, written, read, and written again.

// cs (B,H,T)   cb (B,chunks,Q,Q)   state (B,chunks,H,P,N)
typedef struct { float *cs, *cb, *state; } Between;
static Between between;

__host__ __device__ static inline size_t chunks_of(const Ssd& p) { return (p.T + Q - 1) / Q; }

// a block per sequence, chunk and head
typedef struct { size_t b, c, h; } Where;
__device__ __forceinline__ Where where(const Ssd& p) {
    return {blockIdx.x / p.H / chunks_of(p), blockIdx.x / p.H % chunks_of(p), blockIdx.x % p.H};
}

__global__ void cs_kernel(Ssd p, Between m) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, bh = i / chunks_of(p), c = i % chunks_of(p);
    if (bh >= p.B * p.H) return;
    float A = -expf(p.A_log[bh % p.H]), sum = 0;
    for (size_t t = c * Q; t < (c + 1) * Q && t < p.T; t++) {
        sum += A * p.dt[bh * p.T + t];
        m.cs[bh * p.T + t] = sum;
    }
}
__global__ void cb_kernel2(Ssd p, Between m) {
    size_t b = blockIdx.x / chunks_of(p), t0 = blockIdx.x % chunks_of(p) * Q;
    for (size_t e = threadIdx.x; e < Q * Q; e += blockDim.x) {
        size_t i = t0 + e / Q, j = t0 + e % Q;
        float sum = 0;
        for (int n = 0; n < N && j <= i && i < p.T; n++)
            sum += to_float(p.Ct[(b * p.T + i) * p.ldbc + n]) * to_float(p.Bt[(b * p.T + j) * p.ldbc + n]);
        m.cb[blockIdx.x * Q * Q + e] = sum;
    }
}
__global__ void states_kernel2(Ssd p, Between m) {
    const size_t b = where(p).b, c = where(p).c, h = where(p).h;
    size_t t0 = c * Q, t1 = t0 + Q < p.T ? t0 + Q : p.T;
    const float *cs = m.cs + (b * p.H + h) * p.T, *dt = p.dt + (b * p.H + h) * p.T;
    for (size_t e = threadIdx.x; e < P * N; e += blockDim.x) {
        float sum = 0;
        for (size_t t = t0; t < t1; t++)
            sum += expf(cs[t1 - 1] - cs[t]) * dt[t] * to_float(p.x[(b * p.T + t) * p.ldx + h * P + e / N]) *
                   to_float(p.Bt[(b * p.T + t) * p.ldbc + e % N]);
        m.state[(size_t)blockIdx.x * P * N + e] = sum;
    }
}
// in: what each chunk adds; out: the state before each chunk
__global__ void pass_kernel(Ssd p, Between m) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, size = P * N, chunks = chunks_of(p);
    size_t b = i / (p.H * size), h = i / size % p.H;
    float state = 0;
    if (b >= p.B) return;
    for (size_t c = 0; c < chunks; c++) {
        float *at = m.state + ((b * chunks + c) * p.H + h) * size + i % size, add = *at;
        size_t last = (c + 1) * Q < p.T ? (c + 1) * Q - 1 : p.T - 1;
        *at = state;
        if (c % EVERY == 0) saved_at(p, b, c, h)[i % size] = from_float<bf16>(state);
        state = expf(m.cs[(b * p.H + h) * p.T + last]) * state + add;
    }
}
__global__ void y_kernel2(Ssd p, Between m) {
    const size_t b = where(p).b, c = where(p).c, h = where(p).h, chunks = chunks_of(p);
    const float *cs = m.cs + (b * p.H + h) * p.T, *dt = p.dt + (b * p.H + h) * p.T;
    const float *cb = m.cb + (b * chunks + c) * Q * Q, *state = m.state + (size_t)blockIdx.x * P * N;
    for (size_t e = threadIdx.x; e < Q * P; e += blockDim.x) {
        size_t t0 = c * Q, i = t0 + e / P, col = e % P;
        if (i >= p.T) break;
        float sum = 0, old = 0;
        for (size_t j = t0; j <= i; j++)
            sum += cb[(i - t0) * Q + j - t0] * expf(cs[i] - cs[j]) * dt[j] *
                   to_float(p.x[(b * p.T + j) * p.ldx + h * P + col]);
        for (int n = 0; n < N; n++) old += to_float(p.Ct[(b * p.T + i) * p.ldbc + n]) * state[col * N + n];
        float x_i = to_float(p.x[(b * p.T + i) * p.ldx + h * P + col]);
        sum += expf(cs[i]) * old + p.Dskip[h] * x_i;
        p.y[(b * p.T + i) * p.H * P + h * P + col] = from_float<bf16>(sum);
    }
}

// ------------------------------------------------------------------------------------------------
// v3: the same kernels, with tensor cores (mma.sync) for the products. 4 warps make 64 rows; tiles of 64 x 64
// bf16 are brought to shared memory, from where ldmatrix fetches operands. The pieces (ssd_mma_rows, ..) are
// those of the shipped kernel.

enum { TILE = SSD_TILE * (int)sizeof(bf16) };
typedef bf16 Tile[SSD_TILE];

// tiles of 64 tokens: Bt and Ct two each, x one
__device__ __forceinline__ void load_bc(Tile* tiles, const Ssd& p, const bf16* from, size_t b, size_t t0) {
    for (int n = 0; n < N / 64; n++)
        ssd_load_tile<128>(tiles[n], from + (b * p.T + t0) * p.ldbc + n * 64, (uint32_t)p.ldbc,
                           (int)(p.T - t0), 64, threadIdx.x);
}
__device__ __forceinline__ void load_x(bf16* tile, const Ssd& p, size_t b, size_t t0, size_t h) {
    ssd_load_tile<128>(tile, p.x + (b * p.T + t0) * p.ldx + h * P, (uint32_t)p.ldx, (int)(p.T - t0), 64,
                       threadIdx.x);
}
__device__ __forceinline__ void arrive() {
    copy_async_commit();
    copy_async_wait(0);
    __syncthreads();
}
// cs and dt of 64 tokens in shared memory: beyond T dt is 0 and cs stays
struct Tokens { float cs[Q], dt[Q]; };
__device__ __forceinline__ void load_tokens(Tokens& k, const Ssd& p, const float* cs, size_t bh, size_t t0) {
    size_t t = t0 + threadIdx.x;
    if (threadIdx.x < Q) {
        k.dt[threadIdx.x] = t < p.T ? p.dt[bh * p.T + t] : 0.0f;
        k.cs[threadIdx.x] = cs[bh * p.T + (t < p.T ? t : p.T - 1)];
    }
}
// (exp(cs_last - cs_j) dt_j x_j)^T, rows 16w.. of 64 channels
__device__ __forceinline__ void weighted_x(uint32_t (&a)[4][4], const bf16* x, const Tokens& k, int w,
                                           int lane) {
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t r[4];
        load_matrices_trans(r, x + ssd_piece(j * 16 + (lane & 15), 2 * w + (lane >> 4)));
        const int order[4] = {0, 2, 1, 3};
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = j * 16 + i / 2 * 8 + 2 * (lane % 4);
            const float last = k.cs[Q - 1], w0 = expf(last - k.cs[t]) * k.dt[t];
            const float w1 = expf(last - k.cs[t + 1]) * k.dt[t + 1];
            a[j][i] = scan_pack(w0 * scan_low(r[order[i]]), w1 * scan_high(r[order[i]]));
        }
    }
}
// M from CB, rows 16w..
__device__ __forceinline__ void weighted_cb(uint32_t (&M)[4][4], const float (&cb)[8][4], const Tokens& k,
                                            int w, int lane) {
    #pragma unroll
    for (int q = 0; q < 4; q++) {
        #pragma unroll
        for (int e = 0; e < 4; e++) {
            const int i = w * 16 + lane / 4 + e % 2 * 8, j = q * 16 + e / 2 * 8 + 2 * (lane % 4);
            const float* v = &cb[2 * q + e / 2][e % 2 * 2];
            const float m0 = i >= j ? v[0] * expf(k.cs[i] - k.cs[j]) * k.dt[j] : 0.0f;
            const float m1 = i >= j + 1 ? v[1] * expf(k.cs[i] - k.cs[j + 1]) * k.dt[j + 1] : 0.0f;
            M[q][e] = scan_pack(m0, m1);
        }
    }
}
// a row of 8 x 8 columns of accumulators as bf16 into a tile
__device__ __forceinline__ void store_rows(bf16* tile, const float (&d)[8][4], int w, int lane) {
    #pragma unroll
    for (int i = 0; i < 8; i++) {
        bf16* to = tile + ssd_piece(w * 16 + lane / 4, i) + 2 * (lane % 4);
        *(uint32_t*)to = scan_pack(d[i][0], d[i][1]);
        *(uint32_t*)(to + 8 * 64) = scan_pack(d[i][2], d[i][3]);
    }
}
// y = d + Dskip x
__device__ __forceinline__ void store_y(const Ssd& p, const float (&d)[8][4], size_t b, size_t t0, size_t h,
                                        int w, int lane) {
    const float D = p.Dskip[h];
    #pragma unroll
    for (int i = 0; i < 8; i++) {
        #pragma unroll
        for (int q = 0; q < 2; q++) {
            const size_t t = t0 + w * 16 + lane / 4 + q * 8, col = h * P + i * 8 + 2 * (lane % 4);
            if (t >= p.T) continue;
            const uint32_t x = *(const uint32_t*)(p.x + (b * p.T + t) * p.ldx + col);
            *(uint32_t*)(p.y + (b * p.T + t) * p.H * P + col) =
                scan_pack(fmaf(D, scan_low(x), d[i][2 * q]), fmaf(D, scan_high(x), d[i][2 * q + 1]));
        }
    }
}

__global__ void __launch_bounds__(128) cb_kernel3(Ssd p, Between m) {
    extern __shared__ __align__(128) char shared[];
    Tile* tiles = (Tile*)shared;
    const int lane = threadIdx.x % WARP, w = threadIdx.x / WARP;
    const size_t b = blockIdx.x / chunks_of(p), t0 = blockIdx.x % chunks_of(p) * Q;
    float d[8][4] = {};
    load_bc(tiles, p, p.Ct, b, t0);
    load_bc(tiles + 2, p, p.Bt, b, t0);
    arrive();
    #pragma unroll
    for (int n = 0; n < N / 64; n++) ssd_mma_rows(d, tiles[n], tiles[2 + n], w);
    #pragma unroll
    for (int i = 0; i < 32; i++) {
        const int row = w * 16 + lane / 4 + i % 4 / 2 * 8, col = i / 4 * 8 + 2 * (lane % 4) + i % 2;
        m.cb[(blockIdx.x * Q + row) * Q + col] = d[i / 4][i % 4];
    }
}
__global__ void __launch_bounds__(128) states_kernel3(Ssd p, Between m) {
    extern __shared__ __align__(128) char shared[];
    __shared__ Tokens k;
    Tile* tiles = (Tile*)shared;
    const int lane = threadIdx.x % WARP, w = threadIdx.x / WARP;
    const size_t b = where(p).b, c = where(p).c, h = where(p).h;
    float d[N / 64][8][4] = {};
    uint32_t a[4][4];
    load_bc(tiles, p, p.Bt, b, c * Q);
    load_x(tiles[2], p, b, c * Q, h);
    load_tokens(k, p, m.cs, b * p.H + h, c * Q);
    arrive();
    weighted_x(a, tiles[2], k, w, lane);
    #pragma unroll
    for (int n = 0; n < N / 64; n++) {
        ssd_mma_columns(d[n], a, tiles[n], 4);
        #pragma unroll
        for (int i = 0; i < 32; i++) {
            const int row = w * 16 + lane / 4 + i % 4 / 2 * 8;
            const int col = n * 64 + i / 4 * 8 + 2 * (lane % 4) + i % 2;
            m.state[((size_t)blockIdx.x * P + row) * N + col] = d[n][i / 4][i % 4];
        }
    }
}
__global__ void __launch_bounds__(128) y_kernel3(Ssd p, Between m) {
    extern __shared__ __align__(128) char shared[];
    __shared__ Tokens k;
    Tile* tiles = (Tile*)shared;
    const int lane = threadIdx.x % WARP, w = threadIdx.x / WARP;
    const size_t b = where(p).b, c = where(p).c, h = where(p).h, chunks = chunks_of(p);
    float d[8][4] = {}, cb[8][4];
    uint32_t M[4][4];
    load_bc(tiles, p, p.Ct, b, c * Q);
    load_x(tiles[2], p, b, c * Q, h);
    load_tokens(k, p, m.cs, b * p.H + h, c * Q);
    for (int e = threadIdx.x; e < P * N / 2; e += 128) {        // the state, rounded
        const int row = 2 * e / N, col = 2 * e % N;
        const float* v = m.state + ((size_t)blockIdx.x * P + row) * N + col;
        *(uint32_t*)(tiles[3 + col / 64] + ssd_piece(row, col % 64 / 8) + col % 8) = scan_pack(v[0], v[1]);
    }
    #pragma unroll
    for (int i = 0; i < 32; i++) {
        const int row = w * 16 + lane / 4 + i % 4 / 2 * 8, col = i / 4 * 8 + 2 * (lane % 4) + i % 2;
        cb[i / 4][i % 4] = m.cb[((b * chunks + c) * Q + row) * Q + col];
    }
    arrive();
    #pragma unroll
    for (int n = 0; n < N / 64; n++) ssd_mma_rows(d, tiles[n], tiles[3 + n], w);
    #pragma unroll
    for (int i = 0; i < 32; i++) d[i / 4][i % 4] *= expf(k.cs[w * 16 + lane / 4 + i % 4 / 2 * 8]);
    weighted_cb(M, cb, k, w, lane);
    ssd_mma_columns(d, M, tiles[2], w + 1);
    store_y(p, d, b, c * Q, h, w, lane);
}

// ------------------------------------------------------------------------------------------------
// v4: one kernel. Four warps march through the chunks of one head; the state stays in their registers and
// goes to shared memory as bf16, where it is an operand of the next chunk. Nothing but x, Bt, Ct is read.
// v5 (CB): Ct Bt^T is the same for the 24 heads, so a small kernel makes it once, in the order in which the
// threads want it.

struct March { Tile Bt[2][N / 64], Ct[2][N / 64], x[2], S[N / 64]; Tokens k; };

template <bool CB> __global__ void __launch_bounds__(128, 2) march_kernel(Ssd p, const uint4* ready) {
    extern __shared__ __align__(128) char shared[];
    March& s = *(March*)shared;
    const int lane = threadIdx.x % WARP, w = threadIdx.x / WARP;
    const size_t chunks = chunks_of(p), h = blockIdx.x % p.H, b = blockIdx.x / p.H;
    const float A = -expf(p.A_log[h]);
    float S[N / 64][8][4] = {};
    auto load = [&](size_t c) {
        if (c < chunks) {
            load_bc(s.Bt[c % 2], p, p.Bt, b, c * Q);
            load_bc(s.Ct[c % 2], p, p.Ct, b, c * Q);
            load_x(s.x[c % 2], p, b, c * Q, h);
        }
        copy_async_commit();
    };
    load(0);
    for (size_t c = 0; c < chunks; c++) {
        const Tile *Bt = s.Bt[c % 2], *Ct = s.Ct[c % 2];
        const bf16* x = s.x[c % 2];
        __syncthreads();                                       // the chunk before is done
        load(c + 1);
        if (w == 0) {                                          // cs: two tokens per lane
            const size_t t = c * Q + 2 * lane;
            const float* dt = p.dt + (b * p.H + h) * p.T;
            const float dt0 = t < p.T ? dt[t] : 0.0f, dt1 = t + 1 < p.T ? dt[t + 1] : 0.0f;
            float sum = dt0 + dt1;
            for (int step = 1; step < WARP; step *= 2) {
                const float v = __shfl_up_sync(~0u, sum, step);
                if (lane >= step) sum += v;
            }
            s.k.dt[2 * lane] = dt0;
            s.k.dt[2 * lane + 1] = dt1;
            s.k.cs[2 * lane] = A * (sum - dt1);
            s.k.cs[2 * lane + 1] = A * sum;
        }
        #pragma unroll
        for (int n = 0; n < N / 64; n++) store_rows(s.S[n], S[n], w, lane);
        if (c % EVERY == 0) {
            #pragma unroll
            for (int i = 0; i < 32 * (N / 64); i += 2) {
                const int row = w * 16 + lane / 4 + i % 4 / 2 * 8;
                const int col = i / 32 * 64 + i % 32 / 4 * 8 + 2 * (lane % 4);
                const float* v = &S[i / 32][i % 32 / 4][i % 4];
                *(uint32_t*)(saved_at(p, b, c, h) + row * N + col) = scan_pack(v[0], v[1]);
            }
        }
        copy_async_wait(1);
        __syncthreads();
        float d[8][4] = {}, cb[8][4] = {};
        uint32_t M[4][4], a[4][4];
        if (CB) {
            const uint4* r = ready + (b * chunks + c) * SSD_CB + w * (w + 1) / 2 * WARP + lane;
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                const uint4 v = k <= w ? r[k * WARP] : make_uint4(0, 0, 0, 0);
                cb[2 * k][0] = scan_low(v.x); cb[2 * k][1] = scan_high(v.x);
                cb[2 * k][2] = scan_low(v.y); cb[2 * k][3] = scan_high(v.y);
                cb[2 * k + 1][0] = scan_low(v.z); cb[2 * k + 1][1] = scan_high(v.z);
                cb[2 * k + 1][2] = scan_low(v.w); cb[2 * k + 1][3] = scan_high(v.w);
            }
        } else {
            #pragma unroll
            for (int n = 0; n < N / 64; n++) ssd_mma_rows(cb, Ct[n], Bt[n], w);
        }
        weighted_cb(M, cb, s.k, w, lane);
        #pragma unroll
        for (int n = 0; n < N / 64; n++) ssd_mma_rows(d, Ct[n], s.S[n], w);
        #pragma unroll
        for (int i = 0; i < 32; i++) d[i / 4][i % 4] *= expf(s.k.cs[w * 16 + lane / 4 + i % 4 / 2 * 8]);
        ssd_mma_columns(d, M, x, w + 1);
        store_y(p, d, b, c * Q, h, w, lane);
        weighted_x(a, x, s.k, w, lane);
        const float pass = expf(s.k.cs[Q - 1]);
        #pragma unroll
        for (int n = 0; n < N / 64; n++) {
            #pragma unroll
            for (int i = 0; i < 32; i++) S[n][i / 4][i % 4] *= pass;
            ssd_mma_columns(S[n], a, Bt[n], 4);
        }
    }
}

// ------------------------------------------------------------------------------------------------
// The rungs. The shipped kernel: see train_mamba.cu, 4.11.

static float* shipped_scratch;

static unsigned chunks(void) { return (unsigned)chunks_of(ssd); }
static unsigned blocks(size_t threads) { return (unsigned)((threads + 255) / 256); }
static void launch1(void) { ssd_kernel1<<<blocks(ssd.B * ssd.H * P), 256>>>(ssd, memory); }
static void launch2(void) {
    const unsigned each = (unsigned)(ssd.B * ssd.H) * chunks();
    cs_kernel<<<blocks(each), 256>>>(ssd, between);
    cb_kernel2<<<(unsigned)ssd.B * chunks(), 256>>>(ssd, between);
    states_kernel2<<<each, 256>>>(ssd, between);
    pass_kernel<<<blocks(ssd.B * ssd.H * P * N), 256>>>(ssd, between);
    y_kernel2<<<each, 256>>>(ssd, between);
}
static void launch3(void) {
    const unsigned each = (unsigned)(ssd.B * ssd.H) * chunks();
    scan_allow_shared(cb_kernel3, 4 * TILE);
    scan_allow_shared(states_kernel3, 3 * TILE);
    scan_allow_shared(y_kernel3, 5 * TILE);
    cs_kernel<<<blocks(each), 256>>>(ssd, between);
    cb_kernel3<<<(unsigned)ssd.B * chunks(), 128, 4 * TILE>>>(ssd, between);
    states_kernel3<<<each, 128, 3 * TILE>>>(ssd, between);
    pass_kernel<<<blocks(ssd.B * ssd.H * P * N), 256>>>(ssd, between);
    y_kernel3<<<each, 128, 5 * TILE>>>(ssd, between);
}
static void launch4(void) {
    scan_allow_shared(march_kernel<false>, sizeof(March));
    march_kernel<false><<<(unsigned)(ssd.B * ssd.H), 128, sizeof(March)>>>(ssd, NULL);
}
static void launch5(void) {
    uint4* cb = (uint4*)shipped_scratch;
    SsdDecays* decays = (SsdDecays*)(cb + ssd.B * chunks() * SSD_CB);
    scan_allow_shared(ssd_cb_kernel<N / 64>, 4 * TILE);
    ssd_cb_kernel<N / 64><<<(unsigned)ssd.B * chunks(), 128, 4 * TILE>>>(
        cb, decays, ssd.Bt, ssd.Ct, ssd.ldbc, ssd.dt, ssd.A_log, NULL, ssd.T, ssd.H, 1, N, chunks());
    scan_allow_shared(march_kernel<true>, sizeof(March));
    march_kernel<true><<<(unsigned)(ssd.B * ssd.H), 128, sizeof(March)>>>(ssd, cb);
}
static void shipped(void) {
    ssd_forward_cuda<bf16>(ssd.y, ssd.states, NULL, ssd.x, ssd.ldx, ssd.dt, ssd.A_log, ssd.Bt, ssd.Ct,
                           ssd.ldbc, ssd.Dskip, false, NULL, NULL, shipped_scratch, ssd.B, ssd.T, ssd.H, P, 1,
                           N, 0);
}

static const Rung rungs[] = {
    {"the recurrence, a thread per channel, the state in memory", launch1, 0},
    {"chunks, five plain kernels", launch2, 0},
    {"the five kernels with tensor cores", launch3, 0},
    {"one kernel, four warps march through the chunks of a head", launch4, 0},
    {"Ct Bt^T once for all heads", launch5, 0},
    {"shipped: own warps for the state and for y", shipped, 0},
};
static const Rung rungs_few[] = {
    {"Ct Bt^T once for all heads", launch5, 0},
    {"shipped: time in segments", shipped, 0},
};

static void setup_ssd(size_t B, size_t T, size_t H) {
    const size_t M = B * T, E = H * P, width = E + 2 * N, saved = (T + SSD_SPACING - 1) / SSD_SPACING;
    std::vector<float> xbc, D, A_log(H), dt(M * H), turned(M * H), states(B * saved * E * N), y(M * E);
    std::vector<float> h(E * N);
    ssd.B = B; ssd.T = T; ssd.H = H; ssd.ldx = ssd.ldbc = width;
    ssd.y = nan_array<bf16>(M * E);
    ssd.states = nan_array<bf16>(B * saved * E * N);
    ssd.x = random_array<bf16>(M * width, 1, 0, &xbc);
    ssd.Bt = ssd.x + E;
    ssd.Ct = ssd.Bt + N;
    ssd.Dskip = random_array<float>(H, 1, 0, &D);
    for (size_t i = 0; i < H; i++) A_log[i] = (float)log(1.0 + 15.0 * (double)(7 * i % H) / (double)H);
    for (size_t i = 0; i < M * H; i++) dt[i] = (float)log1p(exp(random_normal(7, 1, i) - 3));
    for (size_t m = 0; m < M; m++)
        for (size_t i = 0; i < H; i++) turned[(m / T * H + i) * T + m % T] = dt[m * H + i];
    ssd.dt = device_copy(turned);
    ssd.A_log = device_copy(A_log);
    memory = nan_array<float>(B * E * N);
    between.cs = nan_array<float>(M * H);
    between.cb = nan_array<float>(B * chunks() * Q * Q);
    between.state = nan_array<float>(B * chunks() * E * N);
    shipped_scratch = nan_array<float>(ssd_forward_scratch_cuda(B, T, H, P, 1, N));
    for (size_t b = 0; b < B; b++) {                   // 256 tokens at a time, so that the states are seen
        std::fill(h.begin(), h.end(), 0.0f);
        for (size_t t = 0; t < T; t += SSD_SPACING) {
            const size_t at = b * T + t;
            std::copy(h.begin(), h.end(), &states[(b * saved + t / SSD_SPACING) * E * N]);
            const float *x = &xbc[at * width], *Bt = x + E, *Ct = Bt + N;
            ssd_recurrent_forward(&y[at * E], h.data(), x, width, &dt[at * H], A_log.data(), Bt, Ct, width,
                                  D.data(), false, h.data(), NULL, 1, min_size(T - t, SSD_SPACING), H, P, 1,
                                  N);
        }
    }
    expect("y", ssd.y, y, 5e-3);
    expect("states", ssd.states, states, 5e-3);
}

enum { B_MANY = 8, T_MANY = 2048, B_FEW = 1, T_FEW = 16384, H_TIMED = 24 };
static void setup(int which) { which == 0 ? setup_ssd(3, 333, 2) : setup_ssd(B_MANY, T_MANY, H_TIMED); }
static void setup_few(int which) { which == 0 ? setup_ssd(1, 777, 2) : setup_ssd(B_FEW, T_FEW, H_TIMED); }

int main(int argc, char** argv) {
    const double tokens = (double)B_MANY * T_MANY, E = H_TIMED * P;
    const double bytes = tokens * (4 * E + 4 * N + 4 * H_TIMED + 2 * E * N / SSD_SPACING);
    static_assert((int)B_MANY * T_MANY == (int)B_FEW * T_FEW, "one floor for both");
    const Ladder ladders[] = {
        {"ssd_forward", "B8 T2048 H24 P64 N128, bf16", rungs, COUNT(rungs), setup, bytes, 0, 0},
        {"ssd_forward, few sequences", "B1 T16384 H24 P64 N128, bf16", rungs_few, COUNT(rungs_few), setup_few,
         bytes, 0, 0},
    };
    return ladder_main(argc, argv, ladders, COUNT(ladders));
}
