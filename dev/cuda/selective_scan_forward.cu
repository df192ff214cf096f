// The forward selective scan of Mamba-1: from one thread per channel to the kernel that ships.
//   dt = softplus(dt_raw + dt_bias)      h_t = exp(dt_t A) h_{t-1} + dt_t x_t Bt_t,  16 numbers per channel
//   s_t = <Ct_t, h_t> + Dskip x_t        y_t = s_t silu(z_t)
// What the time goes into: 16 exponentials per token and channel, one more for softplus, one tanh for silu,
// and the special function unit of an SM (one of the chip's processors) makes 16 per clock. The floor here:
//   B T E (16 + 2) / (16 SMs clock)      0.108 ms at B8 T2048 E1536 on an H200 (132 SMs, 1.98 GHz);
// the bytes (x, dt_raw, z, y, s, hs: 12 per token and channel) would need 0.07 ms.
// All rungs save what backward needs: s, and hs, the state before every 16th token. They assume that E is a
// multiple of 32; what else the shipped kernels can (documents, initial states) is not asked for here.
#include "ladder.h"

#include <cub/block/block_load.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/block/block_store.cuh>

enum { N = 16, R = 48 };                               // R: columns before Bt, as x_proj leaves them

// one problem; shapes and strides as in selective_scan_forward_cuda
typedef struct {
    bf16 *y, *s, *hs;
    const bf16 *x, *dt_raw, *Bt, *Ct, *z;
    const float *dt_bias, *A_log, *Dskip;
    size_t ldbc, ldz, B, T, E;
} Scan;

__device__ __forceinline__ bf16* hs_at(const Scan& p, size_t b, size_t t, size_t e) {
    return p.hs + ((b * ((p.T + SCAN_SPACING - 1) / SCAN_SPACING) + t / SCAN_SPACING) * p.E + e) * N;
}

// ------------------------------------------------------------------------------------------------
// v1: the loop of the CPU, a thread per channel. The state is an array in memory, like everything else.

static float* state;                                   // (B,E,N)

__global__ void scan_kernel1(Scan p, float* state) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, b = i / p.E, e = i % p.E;
    if (b >= p.B) return;
    float* h = state + i * N;
    for (int n = 0; n < N; n++) h[n] = 0;
    for (size_t t = 0; t < p.T; t++) {
        size_t row = b * p.T + t, at = row * p.E + e;
        float dt = log1pf(expf(to_float(p.dt_raw[at]) + p.dt_bias[e])), x_t = to_float(p.x[at]);
        float s_t = p.Dskip[e] * x_t, z_t = to_float(p.z[row * p.ldz + e]);
        for (int n = 0; n < N; n++) {
            if (t % SCAN_SPACING == 0) hs_at(p, b, t, e)[n] = from_float<bf16>(h[n]);
            float a = expf(-dt * expf(p.A_log[e * N + n]));
            h[n] = a * h[n] + dt * x_t * to_float(p.Bt[row * p.ldbc + n]);
            s_t += to_float(p.Ct[row * p.ldbc + n]) * h[n];
        }
        p.s[at] = from_float<bf16>(s_t);
        p.y[at] = from_float<bf16>(s_t * z_t / (1 + expf(-z_t)));
    }
}

// ------------------------------------------------------------------------------------------------
// v2: the state and A stay in registers. Bt and Ct are the same for all channels: the block brings 32 tokens
// of them to shared memory, once.
// v3 (FAST): one instruction of the special function unit per exponential: A log2(e) is made beforehand and
// exp(dt A) becomes 2^(dt A2), softplus and silu need one each.

enum { CHANNELS2 = 64, TOKENS2 = 32 };

template <bool FAST> __global__ void __launch_bounds__(CHANNELS2) scan_kernel2(Scan p) {
    __shared__ float bc[TOKENS2][2 * N];
    size_t b = blockIdx.y, e = (size_t)blockIdx.x * CHANNELS2 + threadIdx.x, e_in = e < p.E ? e : p.E - 1;
    float h[N], A[N], bias = p.dt_bias[e_in], D = p.Dskip[e_in];
    #pragma unroll
    for (int n = 0; n < N; n++) {
        h[n] = 0;
        A[n] = -expf(p.A_log[e_in * N + n]) * (FAST ? SCAN_LOG2E : 1.0f);
    }
    for (size_t t = 0; t < p.T; t++) {
        size_t row = b * p.T + t, at = row * p.E + e_in;
        if (t % TOKENS2 == 0) {
            __syncthreads();                           // all threads are done with the tokens before
            for (int i = threadIdx.x; i < TOKENS2 * 2 * N; i += CHANNELS2) {
                int j = i / (2 * N), n = i % (2 * N);
                const bf16* from = (n < N ? p.Bt + n : p.Ct + n - N) + (row + j) * p.ldbc;
                bc[j][n] = t + j < p.T ? to_float(*from) : 0.0f;
            }
            __syncthreads();
        }
        if (e >= p.E) continue;
        float x_t = to_float(p.x[at]), z_t = to_float(p.z[row * p.ldz + e]);
        float p_t = to_float(p.dt_raw[at]) + bias;
        float dt = FAST ? scan_softplus_fast(p_t * SCAN_LOG2E) : log1pf(expf(p_t));
        float dtx = dt * x_t, s_t = D * x_t;
        #pragma unroll
        for (int n = 0; n < N; n++) {
            if (t % SCAN_SPACING == 0) hs_at(p, b, t, e)[n] = from_float<bf16>(h[n]);
            h[n] = fmaf(FAST ? exp2_unit(dt * A[n]) : expf(dt * A[n]), h[n], dtx * bc[t % TOKENS2][n]);
            s_t = fmaf(bc[t % TOKENS2][N + n], h[n], s_t);
        }
        float half = 0.5f * z_t;                       // silu(z) = z/2 (1 + tanh(z/2))
        float silu = FAST ? fmaf(half, scan_tanh(half), half) : z_t / (1 + expf(-z_t));
        p.s[at] = from_float<bf16>(s_t);
        p.y[at] = from_float<bf16>(s_t * silu);
    }
}

// ------------------------------------------------------------------------------------------------
// v4: there are too few channels to keep the GPU busy with one thread each: four threads share a channel,
// four states each. Work that is done once per token and channel would then be done four times, so it moves
// out of the time loop: a tile of 32 tokens x 32 channels is prepared in shared memory (dt, dt x), scanned,
// finished (skip, gate).
// v5 (TRANSPOSED): the four partial sums of a token must be added across threads. Instead of adding all of
// them in all four threads, they exchange halves once for 8 tokens: 6 exchanges instead of 16.

enum { TILE = 32, THREADS = 128 };

template <bool TRANSPOSED> __global__ void __launch_bounds__(THREADS) scan_kernel4(Scan p) {
    __shared__ float dt[TILE][TILE + 1], dtx[TILE][TILE + 1], s[TILE][TILE + 1];
    __shared__ __align__(16) float bc[TILE][2 * N];
    const int g = threadIdx.x & 3, ch = threadIdx.x >> 2;       // states 4g.. of channel ch
    const size_t b = blockIdx.y, e0 = (size_t)blockIdx.x * TILE;
    float decay[4], h[4] = {0, 0, 0, 0};
    #pragma unroll
    for (int n = 0; n < 4; n++) decay[n] = scan_decay(p.A_log[(e0 + ch) * N + 4 * g + n]);
    for (size_t t0 = 0; t0 < p.T; t0 += TILE) {
        for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
            int j = i / TILE, c = i % TILE;
            size_t row = b * p.T + t0 + j, e = e0 + c;
            bool inside = t0 + j < p.T;
            float dt_t = inside ? to_float(p.dt_raw[row * p.E + e]) + p.dt_bias[e] : 0.0f;
            dt[j][c] = inside ? scan_softplus_fast(dt_t * SCAN_LOG2E) : 0.0f;
            dtx[j][c] = inside ? dt[j][c] * to_float(p.x[row * p.E + e]) : 0.0f;
            bc[j][c] = inside ? to_float((c < N ? p.Bt + c : p.Ct + c - N)[row * p.ldbc]) : 0.0f;
        }
        __syncthreads();
        for (int t1 = 0; t1 < TILE; t1 += 8) {
            float sum[8];
            if (t1 % SCAN_SPACING == 0 && t0 + t1 < p.T)
                store_pack<4>(hs_at(p, b, t0 + t1, e0 + ch) + 4 * g, h);
            #pragma unroll
            for (int j = 0; j < 8; j++) {
                float B_t[4], C_t[4];
                *(float4*)B_t = *(const float4*)&bc[t1 + j][4 * g];
                *(float4*)C_t = *(const float4*)&bc[t1 + j][N + 4 * g];
                sum[j] = 0;
                #pragma unroll
                for (int n = 0; n < 4; n++) {
                    h[n] = fmaf(exp2_unit(dt[t1 + j][ch] * decay[n]), h[n], dtx[t1 + j][ch] * B_t[n]);
                    sum[j] = fmaf(h[n], C_t[n], sum[j]);
                }
            }
            if (TRANSPOSED) {
                #pragma unroll
                for (int half = 4; half >= 2; half >>= 1) {     // keep one half, send the other half
                    bool upper = g & (half >> 1);
                    #pragma unroll
                    for (int k = 0; k < half; k++) {
                        float send = upper ? sum[k] : sum[k + half], keep = upper ? sum[k + half] : sum[k];
                        sum[k] = keep + __shfl_xor_sync(0xffffffffu, send, half >> 1);
                    }
                }
                s[t1 + 2 * g][ch] = sum[0];
                s[t1 + 2 * g + 1][ch] = sum[1];
            } else {
                #pragma unroll
                for (int j = 0; j < 8; j++) {
                    sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], 1);
                    sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], 2);
                    if (g == 0) s[t1 + j][ch] = sum[j];
                }
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
            int j = i / TILE, c = i % TILE;
            size_t row = b * p.T + t0 + j, e = e0 + c;
            if (t0 + j >= p.T) break;
            float s_t = fmaf(p.Dskip[e], to_float(p.x[row * p.E + e]), s[j][c]);
            float half = 0.5f * to_float(p.z[row * p.ldz + e]);
            p.s[row * p.E + e] = from_float<bf16>(s_t);
            p.y[row * p.E + e] = from_float<bf16>(s_t * fmaf(half, scan_tanh(half), half));
        }
        __syncthreads();                               // before the tile is written again
    }
}

// ------------------------------------------------------------------------------------------------
// v6: the element-wise work in vectors of 8 channels, 16 bytes: a thread has one vector of each tile. The
// vectors of the next tile are fetched by asynchronous copies while this one is scanned.

struct Tile6 {
    bf16 x[2][TILE][TILE], dt_raw[2][TILE][TILE], z[2][TILE][TILE], raw_bc[2][TILE][2 * N];
    float2 dt_dtx[TILE][TILE + 1];
    float bc[TILE][2 * N], s[TILE][TILE + 4];
};

__global__ void __launch_bounds__(THREADS, 4) scan_kernel6(Scan p) {
    extern __shared__ __align__(128) char shared[];
    Tile6& sh = *(Tile6*)shared;
    const int g = threadIdx.x & 3, ch = threadIdx.x >> 2;       // in the time loop: states 4g.. of channel ch
    const int r = threadIdx.x >> 2, c = (threadIdx.x & 3) * 8;  // elsewhere: channels c.. of token r
    const size_t b = blockIdx.y, e0 = (size_t)blockIdx.x * TILE;
    float decay[4], h[4] = {0, 0, 0, 0}, bias2[8], D[8];
    #pragma unroll
    for (int n = 0; n < 4; n++) decay[n] = scan_decay(p.A_log[(e0 + ch) * N + 4 * g + n]);
    #pragma unroll
    for (int k = 0; k < 8; k++) {
        bias2[k] = p.dt_bias[e0 + c + k] * SCAN_LOG2E;
        D[k] = p.Dskip[e0 + c + k];
    }
    auto load = [&](size_t t0) {
        const int q = t0 / TILE & 1;
        const bool inside = t0 + r < p.T;              // beyond the last token: zeros
        const size_t row = b * p.T + (inside ? t0 + r : 0);
        scan_copy16(&sh.x[q][r][c], p.x + row * p.E + e0 + c, inside);
        scan_copy16(&sh.dt_raw[q][r][c], p.dt_raw + row * p.E + e0 + c, inside);
        scan_copy16(&sh.z[q][r][c], p.z + row * p.ldz + e0 + c, inside);
        scan_copy16(&sh.raw_bc[q][r][c], (c < N ? p.Bt + c : p.Ct + c - N) + row * p.ldbc, inside);
        copy_async_commit();
    };
    load(0);
    for (size_t t0 = 0; t0 < p.T; t0 += TILE) {
        const int q = t0 / TILE & 1;
        copy_async_wait(0);
        float dt[8], dtx[8], s_t[8], y_t[8];
        scan_unpack8(dt, &sh.dt_raw[q][r][c]);
        scan_unpack8(dtx, &sh.x[q][r][c]);
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            dt[k] = t0 + r < p.T ? scan_softplus_fast(fmaf(dt[k], SCAN_LOG2E, bias2[k])) : 0.0f;
            sh.dt_dtx[r][c + k] = make_float2(dt[k], dt[k] * dtx[k]);
        }
        scan_unpack8(&sh.bc[r][c], &sh.raw_bc[q][r][c]);
        __syncthreads();
        if (t0 + TILE < p.T) load(t0 + TILE);
        for (int t1 = 0; t1 < TILE; t1 += 8) {
            float sum[8];
            if (t1 % SCAN_SPACING == 0 && t0 + t1 < p.T)
                store_pack<4>(hs_at(p, b, t0 + t1, e0 + ch) + 4 * g, h);
            #pragma unroll
            for (int j = 0; j < 8; j++) {
                float B_t[4], C_t[4];
                float2 d = sh.dt_dtx[t1 + j][ch];
                *(float4*)B_t = *(const float4*)&sh.bc[t1 + j][4 * g];
                *(float4*)C_t = *(const float4*)&sh.bc[t1 + j][N + 4 * g];
                sum[j] = 0;
                #pragma unroll
                for (int n = 0; n < 4; n++) {
                    h[n] = fmaf(exp2_unit(d.x * decay[n]), h[n], d.y * B_t[n]);
                    sum[j] = fmaf(h[n], C_t[n], sum[j]);
                }
            }
            #pragma unroll
            for (int half = 4; half >= 2; half >>= 1) {
                bool upper = g & (half >> 1);
                #pragma unroll
                for (int k = 0; k < half; k++) {
                    float send = upper ? sum[k] : sum[k + half], keep = upper ? sum[k + half] : sum[k];
                    sum[k] = keep + __shfl_xor_sync(0xffffffffu, send, half >> 1);
                }
            }
            sh.s[t1 + 2 * g][ch] = sum[0];
            sh.s[t1 + 2 * g + 1][ch] = sum[1];
        }
        __syncthreads();
        scan_unpack8(dtx, &sh.x[q][r][c]);
        scan_unpack8(y_t, &sh.z[q][r][c]);
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            float half = 0.5f * y_t[k];
            s_t[k] = fmaf(D[k], dtx[k], sh.s[r][c + k]);
            y_t[k] = s_t[k] * fmaf(half, scan_tanh(half), half);
        }
        if (t0 + r < p.T) {
            size_t at = (b * p.T + t0 + r) * p.E + e0 + c;
            scan_store16(p.s + at, scan_pack8(s_t));
            scan_store16(p.y + at, scan_pack8(y_t));
        }
    }
}

// ------------------------------------------------------------------------------------------------
// For comparison, the published approach (mamba_ssm): channels first, time is contiguous; a block has one
// channel of one sequence and 2048 tokens at once, 16 per thread. For one state after the other the pairs
// (a_t, b_t) of h_t = a_t h_{t-1} + b_t are combined by a parallel scan over the block. A parallel scan does
// each addition several times over, and Bt and Ct are fetched anew by every channel.
//   x, dt_raw, z, y, s (B,E,T)   Bt, Ct (B,N,T)

enum { SCAN_ITEMS = 16, SPAN = THREADS * SCAN_ITEMS };

struct Compose {                                       // first p, then q
    __device__ float2 operator()(float2 p, float2 q) const {
        return make_float2(q.x * p.x, fmaf(q.x, p.y, q.y));
    }
};
struct Carry {                                         // what the tokens before this span leave behind
    float2 value;
    __device__ float2 operator()(float2 span) {
        float2 before = value;
        value = Compose()(value, span);
        return before;
    }
};

__global__ void __launch_bounds__(THREADS) scan_kernel_published(Scan p) {
    typedef cub::BlockScan<float2, THREADS, cub::BLOCK_SCAN_WARP_SCANS> BlockScan;
    typedef cub::BlockLoad<bf16, THREADS, SCAN_ITEMS, cub::BLOCK_LOAD_WARP_TRANSPOSE> Load;
    typedef cub::BlockStore<bf16, THREADS, SCAN_ITEMS, cub::BLOCK_STORE_WARP_TRANSPOSE> Store;
    __shared__ union {
        typename BlockScan::TempStorage scan;
        typename Load::TempStorage load;
        typename Store::TempStorage store;
    } sh;
    __shared__ float2 carry[N];
    const size_t e = blockIdx.x, b = blockIdx.y, channel = (b * p.E + e) * p.T;
    if (threadIdx.x < N) carry[threadIdx.x] = make_float2(1, 0);
    for (size_t t0 = 0; t0 < p.T; t0 += SPAN) {
        const int count = p.T - t0 < SPAN ? (int)(p.T - t0) : SPAN;
        bf16 v[SCAN_ITEMS], C_n[SCAN_ITEMS];
        float dt[SCAN_ITEMS], dtx[SCAN_ITEMS], s_t[SCAN_ITEMS];
        auto load = [&](bf16 (&items)[SCAN_ITEMS], const bf16* from) {
            __syncthreads();                           // the shared memory is used for one thing at a time
            Load(sh.load).Load(from, items, count, from_float<bf16>(0.0f));
        };
        load(v, p.dt_raw + channel + t0);
        #pragma unroll
        for (int j = 0; j < SCAN_ITEMS; j++) {
            bool inside = (int)threadIdx.x * SCAN_ITEMS + j < count;
            dt[j] = inside ? scan_softplus_fast((to_float(v[j]) + p.dt_bias[e]) * SCAN_LOG2E) : 0.0f;
        }
        load(v, p.x + channel + t0);
        #pragma unroll
        for (int j = 0; j < SCAN_ITEMS; j++) {
            dtx[j] = dt[j] * to_float(v[j]);
            s_t[j] = p.Dskip[e] * to_float(v[j]);
        }
        for (int n = 0; n < N; n++) {
            const float decay = scan_decay(p.A_log[e * N + n]);
            float2 pair[SCAN_ITEMS];
            load(v, p.Bt + (b * N + n) * p.T + t0);
            load(C_n, p.Ct + (b * N + n) * p.T + t0);
            #pragma unroll
            for (int j = 0; j < SCAN_ITEMS; j++)
                pair[j] = make_float2(exp2_unit(dt[j] * decay), dtx[j] * to_float(v[j]));
            Carry before = {carry[n]};
            __syncthreads();
            BlockScan(sh.scan).InclusiveScan(pair, pair, Compose(), before);
            if (threadIdx.x == 0) carry[n] = before.value;
            #pragma unroll
            for (int j = 0; j < SCAN_ITEMS; j++) s_t[j] = fmaf(to_float(C_n[j]), pair[j].y, s_t[j]);
        }
        load(v, p.z + channel + t0);
        bf16 y[SCAN_ITEMS];
        #pragma unroll
        for (int j = 0; j < SCAN_ITEMS; j++) {
            float half = 0.5f * to_float(v[j]);
            y[j] = from_float<bf16>(s_t[j] * fmaf(half, scan_tanh(half), half));
            v[j] = from_float<bf16>(s_t[j]);
        }
        __syncthreads();
        Store(sh.store).Store(p.s + channel + t0, v, count);
        __syncthreads();
        Store(sh.store).Store(p.y + channel + t0, y, count);
    }
}

// ------------------------------------------------------------------------------------------------
// Launchers

static Scan scan;

static unsigned ceil_div(size_t a, size_t b) { return (unsigned)((a + b - 1) / b); }

static void launch1(void) { scan_kernel1<<<ceil_div(scan.B * scan.E, 128), 128>>>(scan, state); }
static dim3 grid2(void) { return dim3(ceil_div(scan.E, CHANNELS2), (unsigned)scan.B); }
static void launch2(void) { scan_kernel2<false><<<grid2(), CHANNELS2>>>(scan); }
static void launch3(void) { scan_kernel2<true><<<grid2(), CHANNELS2>>>(scan); }
static void launch4(void) { scan_kernel4<false><<<dim3(scan.E / TILE, scan.B), THREADS>>>(scan); }
static void launch5(void) { scan_kernel4<true><<<dim3(scan.E / TILE, scan.B), THREADS>>>(scan); }
static void launch6(void) {
    scan_allow_shared(scan_kernel6, sizeof(Tile6));
    scan_kernel6<<<dim3(scan.E / TILE, scan.B), THREADS, sizeof(Tile6)>>>(scan);
}
static void published(void) { scan_kernel_published<<<dim3(scan.E, scan.B), THREADS>>>(scan); }
static void shipped(void) {
    selective_scan_forward_cuda<bf16>(scan.y, scan.s, scan.hs, NULL, scan.x, scan.dt_raw, scan.dt_bias,
                                      scan.A_log, scan.Bt, scan.Ct, scan.ldbc, scan.Dskip, scan.z, scan.ldz,
                                      NULL, NULL, scan.B, scan.T, scan.E, N, SCAN_SPACING, 0);
}

template <int STATES, int TEAMS> static void launch_states(void) {
    scan_launch_forward_fast<bf16, STATES, TEAMS>(scan.y, scan.s, scan.hs, NULL, scan.x, scan.dt_raw,
                                                  scan.dt_bias, scan.A_log, scan.Bt, scan.Ct, scan.ldbc,
                                                  scan.Dskip, scan.z, scan.ldz, NULL, NULL, scan.B, scan.T,
                                                  scan.E, SCAN_SPACING, 0);
}

static const Rung rungs[] = {
    {"a thread per channel, everything in memory", launch1, 0},
    {"states in registers, Bt and Ct in shared memory", launch2, 0},
    {"exponentials, softplus, silu by single instructions", launch3, 0},
    {"4 threads x 4 states per channel; element-wise phases", launch4, 0},
    {"sums over the states exchanged for 8 tokens at once", launch5, 0},
    {"vectors of 8 channels, asynchronous copies", launch6, 0},
    {"shipped: own warps for the element-wise work", shipped, 0},
};
static const Rung rungs_few[] = {
    {"4 states per thread, 32 channels per block", launch_states<4, 1>, 0},
    {"2 states per thread, 16 channels per block", launch_states<2, 1>, 0},
    {"shipped: two teams of element-wise warps", shipped, 0},
};
static const Rung rungs_published[] = {{"a block per channel, parallel scan over the tokens", published, 0}};

// ------------------------------------------------------------------------------------------------
// The problem

// channels_first: (B,T,C) with row stride ld becomes (B,C,T)
static std::vector<float> channels_first(const float* v, size_t ld, size_t B, size_t T, size_t C) {
    std::vector<float> out(B * C * T);
    #pragma omp parallel for
    for (size_t b = 0; b < B; b++) {
        for (size_t t = 0; t < T; t++)
            for (size_t c = 0; c < C; c++) out[(b * C + c) * T + t] = v[(b * T + t) * ld + c];
    }
    return out;
}
static bf16* channels_first_copy(const float* v, size_t ld, size_t B, size_t T, size_t C) {
    std::vector<float> f = channels_first(v, ld, B, T, C);
    std::vector<bf16> h(f.size());
    for (size_t i = 0; i < f.size(); i++) host_store(&h[i], f[i]);
    return device_copy(h);
}

static void setup_scan(size_t B, size_t T, size_t E, bool first) {
    size_t M = B * T, ldbc = R + 2 * N, ldz = 2 * E, states = (T + SCAN_SPACING - 1) / SCAN_SPACING;
    std::vector<float> x, p, z, bc, bias, D, A_log(E * N);
    scan.y = nan_array<bf16>(M * E);
    scan.s = nan_array<bf16>(M * E);
    scan.hs = nan_array<bf16>(B * states * E * N);
    scan.x = random_array<bf16>(M * E, 1, 0, &x);
    scan.dt_raw = random_array<bf16>(M * E, 1, -3, &p);
    scan.z = random_array<bf16>(M * ldz, 1, 0, &z) + E;
    scan.Bt = random_array<bf16>(M * ldbc, 1, 0, &bc) + R;
    scan.Ct = scan.Bt + N;
    scan.dt_bias = random_array<float>(E, 0.3, 0, &bias);
    scan.Dskip = random_array<float>(E, 1, 0, &D);
    for (size_t i = 0; i < E * N; i++)
        A_log[i] = (float)(log(1.0 + (double)(i % N)) + 0.2 * random_normal(7, 1, i));
    scan.A_log = device_copy(A_log);
    scan.ldbc = ldbc; scan.ldz = ldz; scan.B = B; scan.T = T; scan.E = E;
    state = nan_array<float>(B * E * N);

    // the CPU's function, 16 tokens at a time, so that the states in between are seen
    std::vector<float> dt(M * E), s(M * E), y(M * E), hs(B * states * E * N), h(E * N);
    for (size_t i = 0; i < M * E; i++) p[i] += bias[i % E];
    softplus_forward(dt.data(), p.data(), M * E);
    for (size_t b = 0; b < B; b++) {
        std::fill(h.begin(), h.end(), 0.0f);
        for (size_t t = 0; t < T; t += SCAN_SPACING) {
            size_t row = b * T + t, at = row * E;
            std::copy(h.begin(), h.end(), &hs[(b * states + t / SCAN_SPACING) * E * N]);
            selective_scan_forward(&s[at], NULL, h.data(), &x[at], &dt[at], A_log.data(), &bc[row * ldbc + R],
                                   &bc[row * ldbc + R + N], ldbc, D.data(), h.data(), NULL, 1,
                                   min_size(T - t, SCAN_SPACING), E, N);
        }
    }
    gate_forward(y.data(), s.data(), E, &z[E], ldz, M, E);
    if (first) {
        for (size_t i = 0; i < M * E; i++) p[i] -= bias[i % E];
        scan.x = channels_first_copy(x.data(), E, B, T, E);
        scan.dt_raw = channels_first_copy(p.data(), E, B, T, E);
        scan.z = channels_first_copy(&z[E], ldz, B, T, E);
        scan.Bt = channels_first_copy(&bc[R], ldbc, B, T, N);
        scan.Ct = channels_first_copy(&bc[R + N], ldbc, B, T, N);
        s = channels_first(s.data(), E, B, T, E);
        y = channels_first(y.data(), E, B, T, E);
    }
    expect("y", scan.y, y, 4e-3);
    expect("s", scan.s, s, 4e-3);
    if (!first) expect("hs", scan.hs, hs, 4e-3);
}

enum { B_MANY = 8, T_MANY = 2048, B_FEW = 1, T_FEW = 16384, E_TIMED = 1536 };
static void setup_sizes(int which, size_t B, size_t T, bool first) {
    if (which == 0) setup_scan(3, 77, 96, first);
    else setup_scan(B, T, E_TIMED, first);
}
static void setup(int which) { setup_sizes(which, B_MANY, T_MANY, false); }
static void setup_few(int which) { setup_sizes(which, B_FEW, T_FEW, false); }
static void setup_published(int which) { setup_sizes(which, B_MANY, T_MANY, true); }

int main(int argc, char** argv) {
    int sms = 1, khz = 1;
    device_require();
    cudaCheck(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    cudaCheck(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, 0));
    const double elements = (double)B_MANY * T_MANY * E_TIMED;  // B_FEW T_FEW is the same number of tokens
    const double bytes = 10 * elements + elements / SCAN_SPACING * N * 2;
    const double floor_ms = elements * (N + 2) / (16.0 * sms * khz);
    static_assert((int)B_MANY * T_MANY == (int)B_FEW * T_FEW, "one floor for both");
    const Ladder ladders[] = {
        {"selective_scan_forward", "B8 T2048 E1536 N16, bf16", rungs, COUNT(rungs), setup, bytes, 0,
         floor_ms},
        {"selective_scan_forward, few sequences", "B1 T16384 E1536 N16, bf16", rungs_few, COUNT(rungs_few),
         setup_few, bytes, 0, floor_ms},
        {"selective_scan_forward, channels first", "B8 E1536 T2048 N16, bf16, no hs", rungs_published,
         COUNT(rungs_published), setup_published, 10 * elements, 0, floor_ms},
    };
    return ladder_main(argc, argv, ladders, COUNT(ladders));
}
