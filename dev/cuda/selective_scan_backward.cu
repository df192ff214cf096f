// The backward pass of the Mamba-1 scan, from one thread per state to the kernel that ships.
//
// Formulas: selective_scan_backward_kernel in train_mamba.cu. For every token, channel and state ("update"):
// h again, lambda = dLoss/dh backward in time, and four sums:
//   over channels   dBt_t[n] = sum_e lambda dt x    dCt_t[n] = sum_e g h         g = dy silu(z)
//   over states     q = sum_n lambda B_n            r = sum_n lambda A_n m_n      m = a h_{t-1}
// The floor is not memory (558 MB, 0.13 ms on an H200) but instructions. One update needs at least 12 of them
// (dt A, exp, dt x B, h; lambda, q, a lambda, m, r, dA, dBt, dCt), and a GPU with 132 processors starts 128
// per clock on each of them: 402.7M updates x 12 / (132 x 128 x 1.7 GHz) = 0.168 ms at B8 T2048 E1536. The
// exponentials alone need 0.112 ms: the special function units make 16 per clock and processor.
#include "ladder.h"

enum { N = 16, DIMS = 2 * N, LD = DIMS };                      // bc: Bt_t, then Ct_t
static const size_t TIMED[2][3] = {{8, 2048, 1536}, {2, 32768, 1536}};
static size_t B, T, E;
// inputs and outputs as the launcher has them; hs: states saved every 16 tokens, hs8: every 8
static bf16 *x, *dt_raw, *z, *dy, *bc, *y, *s, *hs, *hs8, *dx, *ddt, *dz, *dBt, *dCt;
static float *dt_bias, *A_log, *Dskip, *dA_log, *dDskip, *ddt_bias, *scratch;
static int* doc;
// what single rungs need besides: dt and g as floats, every state, sums of dBt and dCt, sums of channels
static float *dt32, *g32, *states, *dBC, *de;
// rung 4: (B,E,T) instead of (B,T,E), (B,2N,T)
static bf16 *x_t, *dt_t, *z_t, *dy_t, *s_t, *bc_t, *out_t;

static void reduce(const float* parts, size_t blocks) {
    size_t results = B * T * DIMS + E * (N + 2);
    selective_scan_reduce_kernel<bf16><<<(unsigned)((results + 255) / 256), 256>>>(
        dA_log, dDskip, ddt_bias, dBt, dCt, N, parts, de, blocks, B, T, E, N);
    cudaCheck(cudaGetLastError());
}

// ------------------------------------------------------------------------------------------------
// Rungs 1 to 3: a thread owns one state of one channel, 16 neighbouring lanes one channel

__device__ __forceinline__ float sum16(float v) {
    #pragma unroll
    for (int k = 8; k; k >>= 1) v += __shfl_xor_sync(0xffffffffu, v, k);
    return v;
}

// everything element-wise that comes before the scan: dt, g, dz, y
__global__ void gate_kernel(float* dt32, float* g32, bf16* dz, bf16* y, const bf16* dt_raw,
                            const float* dt_bias, const bf16* dy, const bf16* s, const bf16* z, size_t count,
                            size_t E) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float z_i = to_float(z[i]), sigma = 1.0f / (1.0f + expf(-z_i));
    float dy_i = to_float(dy[i]), s_i = to_float(s[i]);
    dt32[i] = scan_softplus(to_float(dt_raw[i]) + dt_bias[i % E]);
    g32[i] = dy_i * z_i * sigma;
    dz[i] = from_float<bf16>(dy_i * s_i * sigma * (1.0f + z_i * (1.0f - sigma)));
    y[i] = from_float<bf16>(s_i * z_i * sigma);
}

// every state, as a forward pass would have to save them for rung 1
__global__ void states_kernel(float* states, const bf16* x, const float* dt32, const float* A_log,
                              const bf16* bc, const int* doc, size_t T, size_t E) {
    size_t n = threadIdx.x & 15, e = blockIdx.x * 16 + (threadIdx.x >> 4), b = blockIdx.y;
    float h = 0.0f, A2 = scan_decay(A_log[e * N + n]);
    for (size_t t = 0; t < T; t++) {
        size_t row = b * T + t, i = row * E + e;
        float a = scan_resets_cuda(doc, b, t, T) ? 0.0f : exp2_unit(dt32[i] * A2);
        h = fmaf(a, h, dt32[i] * to_float(x[i]) * to_float(bc[row * LD + n]));
        states[i * N + n] = h;
    }
}

// RUNG 1: states (B,T,E,N) are read.   2: 16 are recomputed from a saved one, hs (B,T/16,E,N).
// 1, 2: dBC (B,T,2N) is added to by all channels, atomically.
// 3: the 16 channels of a block are summed in shared memory, dBC (blocks,B,T,2N) has a place for every block.
// 2 buys memory and 3 the same bits in every run, not time: a thread that owns one state reads dt, x, g,
// Bt and Ct again for every single update.
template <int RUNG>
__global__ void __launch_bounds__(256)
thread_per_state_kernel(bf16* dx, bf16* ddt_raw, float* dBC, float* de, const float* states, const bf16* hs,
                        const float* dt32, const float* g32, const bf16* x, const float* A_log,
                        const bf16* bc, const float* Dskip, const int* doc, size_t T, size_t E) {
    __shared__ float sum[RUNG == 3 ? 16 : 1][2][16][17];       // token, dBt or dCt, channel, state
    const int n = threadIdx.x & 15, c = threadIdx.x >> 4;
    const size_t e = blockIdx.x * 16 + c, b = blockIdx.y, saved = (T + 15) / 16;
    const float A2 = scan_decay(A_log[e * N + n]), D = Dskip[e];
    float carry = 0, dA = 0, dD = 0, dbias = 0;
    for (size_t chunk = saved; chunk-- > 0;) {
        float h[17], a[16];
        if (RUNG == 1) {
            size_t at = ((b * T + chunk * 16) * E + e) * N + n;
            h[0] = chunk ? states[at - E * N] : 0.0f;
            #pragma unroll
            for (int j = 0; j < 16; j++) h[j + 1] = chunk * 16 + j < T ? states[at + j * E * N] : 0.0f;
        } else {
            h[0] = to_float(hs[((b * saved + chunk) * E + e) * N + n]);
        }
        #pragma unroll
        for (int j = 0; j < 16; j++) {
            size_t t = chunk * 16 + j, row = b * T + t, i = row * E + e;
            bool inside = t < T;
            float dt = inside ? dt32[i] : 0.0f;
            a[j] = inside && scan_resets_cuda(doc, b, t, T) ? 0.0f : exp2_unit(dt * A2);
            if (RUNG > 1)
                h[j + 1] = inside ? fmaf(a[j], h[j], dt * to_float(x[i]) * to_float(bc[row * LD + n])) : h[j];
        }
        #pragma unroll
        for (int j = 15; j >= 0; j--) {
            size_t t = chunk * 16 + j, row = b * T + t, i = row * E + e;
            if (t >= T) continue;
            float dt = dt32[i], g = g32[i], x_t = to_float(x[i]), m = a[j] * h[j];
            float B_n = to_float(bc[row * LD + n]), C_n = to_float(bc[row * LD + N + n]);
            float lambda = fmaf(g, C_n, carry);
            float q = sum16(lambda * B_n), r = sum16(lambda * m * A2) * SCAN_LN2;
            dA = fmaf(lambda * m, dt, dA);
            carry = a[j] * lambda;
            if (RUNG < 3) {
                atomicAdd(dBC + row * DIMS + n, lambda * dt * x_t);
                atomicAdd(dBC + row * DIMS + N + n, g * h[j + 1]);
            } else {
                sum[j][0][c][n] = lambda * dt * x_t;
                sum[j][1][c][n] = g * h[j + 1];
            }
            if (n > 0) continue;
            float dp = fmaf(x_t, q, r) * (1.0f - exp_cuda(-dt));
            dx[i] = from_float<bf16>(fmaf(dt, q, D * g));
            ddt_raw[i] = from_float<bf16>(dp);
            dD = fmaf(g, x_t, dD);
            dbias += dp;
        }
        if (RUNG < 3) continue;
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < 2; k++) {                          // token c, dBt or dCt, state n
            float v = 0;
            for (int i = 0; i < 16; i++) v += sum[c][k][i][n];
            size_t t = chunk * 16 + c;
            if (t < T) dBC[((blockIdx.x * gridDim.y + b) * T + t) * DIMS + k * N + n] = v;
        }
        __syncthreads();
    }
    float* de_e = de + (b * E + e) * (N + 2);
    de_e[n] = dA * A2 * SCAN_LN2;
    if (n == 0) { de_e[N] = dD; de_e[N + 1] = dbias; }
}

static void launch_gate(void) {
    size_t count = B * T * E;
    gate_kernel<<<(unsigned)((count + 255) / 256), 256>>>(dt32, g32, dz, y, dt_raw, dt_bias, dy, s, z, count,
                                                          E);
    cudaCheck(cudaGetLastError());
}

template <int RUNG> static void launch_state(void) {
    size_t blocks = E / 16;
    launch_gate();
    if (RUNG < 3) cudaCheck(cudaMemsetAsync(dBC, 0, B * T * DIMS * sizeof(float)));
    thread_per_state_kernel<RUNG><<<dim3((unsigned)blocks, (unsigned)B), 256>>>(
        dx, ddt, dBC, de, states, hs, dt32, g32, x, A_log, bc, Dskip, doc, T, E);
    cudaCheck(cudaGetLastError());
    reduce(dBC, RUNG < 3 ? 1 : blocks);
}

// ------------------------------------------------------------------------------------------------
// Rung 4, the published way (Mamba paper, arXiv 2312.00752, section 3.3.2), plainly: time is parallel. A
// block owns one channel of one sequence and 2048 tokens at a time, a thread 16 neighbouring ones; for one
// state after the other, h_out = p h_in + s of all threads is combined by a scan over the block. Arrays are
// (B,E,T), so that threads read along time. What a channel adds to dBt and dCt goes through atomic additions.

enum { LINE = 128, STEPS = 16, SPAN = LINE * STEPS };

// line_scan: what enters this thread, if `start` enters the first (REVERSE: the last) one and every thread
// makes p h + s of what enters it
template <bool REVERSE>
__device__ float line_scan(float p, float s, float start, float2* total) {
    const int lane = REVERSE ? 31 - (threadIdx.x & 31) : threadIdx.x & 31;
    const int w = REVERSE ? 3 - (threadIdx.x >> 5) : threadIdx.x >> 5;
    #pragma unroll
    for (int k = 1; k < 32; k <<= 1) {
        float p0 = REVERSE ? __shfl_down_sync(0xffffffffu, p, k) : __shfl_up_sync(0xffffffffu, p, k);
        float s0 = REVERSE ? __shfl_down_sync(0xffffffffu, s, k) : __shfl_up_sync(0xffffffffu, s, k);
        if (lane >= k) { s = fmaf(p, s0, s); p *= p0; }
    }
    float p0 = REVERSE ? __shfl_down_sync(0xffffffffu, p, 1) : __shfl_up_sync(0xffffffffu, p, 1);
    float s0 = REVERSE ? __shfl_down_sync(0xffffffffu, s, 1) : __shfl_up_sync(0xffffffffu, s, 1);
    if (lane == 31) total[w] = make_float2(p, s);
    __syncthreads();
    for (int i = 0; i < w; i++) start = fmaf(total[i].x, start, total[i].y);
    __syncthreads();
    return lane == 0 ? start : fmaf(p0, start, s0);
}

// out (4,B,E,T): dx, ddt_raw, dz, y   dBC (B,2N,T)
__global__ void __launch_bounds__(LINE)
block_per_channel_kernel(bf16* out, float* dBC, float* de, const bf16* hs, const bf16* dy, const bf16* s,
                         const bf16* x, const bf16* dt_raw, const float* dt_bias, const float* A_log,
                         const bf16* bc, const float* Dskip, const bf16* z, const int* doc, size_t T,
                         size_t E) {
    __shared__ float line[2][SPAN + SPAN / 16], carry[N], dA[N];
    __shared__ float2 total[4];
    const int tid = threadIdx.x;
    const size_t e = blockIdx.x, b = blockIdx.y, base = (b * E + e) * T, plane = (size_t)gridDim.y * E * T;
    const size_t saved = (T + 15) / 16;
    const float D = Dskip[e];
    float dD = 0, dbias = 0;
    if (tid < N) carry[tid] = dA[tid] = 0.0f;
    for (size_t t_end = (T + SPAN - 1) / SPAN * SPAN; t_end > 0; t_end -= SPAN) {
        const size_t t_span = t_end - SPAN, t0 = t_span + tid * STEPS;
        float dt[STEPS], x_t[STEPS], g[STEPS], q[STEPS], r[STEPS];
        uint32_t resets = 0;
        #pragma unroll
        for (int j = 0; j < STEPS; j++) {
            size_t t = t0 + j;
            bool inside = t < T;
            float z_t = inside ? to_float(z[base + t]) : 0.0f, sigma = sigmoid_cuda(z_t);
            float dy_t = inside ? to_float(dy[base + t]) : 0.0f, s_t = inside ? to_float(s[base + t]) : 0.0f;
            dt[j] = inside ? scan_softplus(to_float(dt_raw[base + t]) + dt_bias[e]) : 0.0f;
            x_t[j] = inside ? to_float(x[base + t]) : 0.0f;
            g[j] = dy_t * z_t * sigma;
            q[j] = r[j] = 0.0f;
            if (inside && scan_resets_cuda(doc, b, t, T)) resets |= 1u << j;
            if (!inside) continue;
            out[2 * plane + base + t] = from_float<bf16>(dy_t * s_t * silu_grad_cuda(z_t, sigma));
            out[3 * plane + base + t] = from_float<bf16>(s_t * z_t * sigma);
        }
        #pragma unroll 1
        for (int n = 0; n < N; n++) {
            const float A2 = scan_decay(A_log[e * N + n]);
            const bf16 *B_n = bc + (b * DIMS + n) * T, *C_n = B_n + N * T;
            float a[STEPS], h[STEPS], p = 1.0f, sum = 0.0f;
            #pragma unroll
            for (int j = 0; j < STEPS; j++) {
                a[j] = resets >> j & 1 ? 0.0f : exp2_unit(dt[j] * A2);
                h[j] = dt[j] * x_t[j] * (t0 + j < T ? to_float(B_n[t0 + j]) : 0.0f);
                sum = fmaf(a[j], sum, h[j]);
                p *= a[j];
            }
            float start = to_float(hs[((b * saved + t_span / 16) * E + e) * N + n]);
            float before = line_scan<false>(p, sum, start, total);
            float m[STEPS], lambda = 0.0f;
            #pragma unroll
            for (int j = 0; j < STEPS; j++) { m[j] = a[j] * before; before = h[j] += m[j]; }
            p = 1.0f;
            #pragma unroll
            for (int j = STEPS - 1; j >= 0; j--) {
                lambda = a[j] * fmaf(g[j], t0 + j < T ? to_float(C_n[t0 + j]) : 0.0f, lambda);
                p *= a[j];
            }
            lambda = line_scan<true>(p, lambda, carry[n], total);
            float dA_n = 0.0f;
            #pragma unroll
            for (int j = STEPS - 1; j >= 0; j--) {
                float B_t = t0 + j < T ? to_float(B_n[t0 + j]) : 0.0f;
                lambda = fmaf(g[j], t0 + j < T ? to_float(C_n[t0 + j]) : 0.0f, lambda);
                q[j] = fmaf(lambda, B_t, q[j]);
                r[j] = fmaf(lambda * m[j], A2, r[j]);
                dA_n = fmaf(lambda * m[j], dt[j], dA_n);
                line[0][tid * 17 + j] = lambda * dt[j] * x_t[j];
                line[1][tid * 17 + j] = g[j] * h[j];
                lambda *= a[j];
            }
            if (tid == 0) carry[n] = lambda;
            dA_n = warp_sum(dA_n);
            if ((tid & 31) == 0) total[tid >> 5].x = dA_n;
            __syncthreads();
            if (tid == 0) dA[n] += (total[0].x + total[1].x) + (total[2].x + total[3].x);
            #pragma unroll 4
            for (int i = tid; i < SPAN; i += LINE) {           // neighbouring threads, neighbouring tokens
                if (t_span + i >= T) break;
                atomicAdd(dBC + (b * DIMS + n) * T + t_span + i, line[0][i + i / 16]);
                atomicAdd(dBC + (b * DIMS + N + n) * T + t_span + i, line[1][i + i / 16]);
            }
            __syncthreads();
        }
        #pragma unroll
        for (int j = 0; j < STEPS; j++) {
            if (t0 + j >= T) continue;
            float dp = fmaf(x_t[j], q[j], r[j] * SCAN_LN2) * (1.0f - exp_cuda(-dt[j]));
            out[base + t0 + j] = from_float<bf16>(fmaf(dt[j], q[j], D * g[j]));
            out[plane + base + t0 + j] = from_float<bf16>(dp);
            dD = fmaf(g[j], x_t[j], dD);
            dbias += dp;
        }
    }
    dD = warp_sum(dD);
    dbias = warp_sum(dbias);
    if ((tid & 31) == 0) total[tid >> 5] = make_float2(dD, dbias);
    __syncthreads();
    float* de_e = de + (b * E + e) * (N + 2);
    if (tid < N) de_e[tid] = dA[tid] * scan_decay(A_log[e * N + tid]) * SCAN_LN2;
    if (tid == N) de_e[N] = (total[0].x + total[1].x) + (total[2].x + total[3].x);
    if (tid == N + 1) de_e[N + 1] = (total[0].y + total[1].y) + (total[2].y + total[3].y);
}

// out (B,cols,rows) = in (B,rows,cols) transposed
template <typename Y, typename X>
__global__ void transpose_kernel(Y* out, const X* in, size_t rows, size_t cols) {
    __shared__ float tile[32][33];
    size_t r0 = blockIdx.x * 32, c0 = blockIdx.y * 32, base = blockIdx.z * rows * cols;
    for (int i = threadIdx.y; i < 32; i += 8)
        if (r0 + i < rows && c0 + threadIdx.x < cols)
            tile[i][threadIdx.x] = to_float(in[base + (r0 + i) * cols + c0 + threadIdx.x]);
    __syncthreads();
    for (int i = threadIdx.y; i < 32; i += 8)
        if (r0 + threadIdx.x < rows && c0 + i < cols)
            out[base + (c0 + i) * rows + r0 + threadIdx.x] = from_float<Y>(tile[threadIdx.x][i]);
}
template <typename Y, typename X> static void transpose(Y* out, const X* in, size_t rows, size_t cols) {
    dim3 grid((unsigned)((rows + 31) / 32), (unsigned)((cols + 31) / 32), (unsigned)B);
    transpose_kernel<<<grid, dim3(32, 8)>>>(out, in, rows, cols);
    cudaCheck(cudaGetLastError());
}

static void launch_line(void) {
    cudaCheck(cudaMemsetAsync(dBC, 0, B * T * DIMS * sizeof(float)));
    block_per_channel_kernel<<<dim3((unsigned)E, (unsigned)B), LINE>>>(
        out_t, dBC, de, hs, dy_t, s_t, x_t, dt_t, dt_bias, A_log, bc_t, Dskip, z_t, doc, T, E);
    cudaCheck(cudaGetLastError());
    bf16* outs[4] = {dx, ddt, dz, y};                          // back to (B,T,E): 0.1 ms of the time
    for (int i = 0; i < 4; i++) transpose(outs[i], out_t + i * B * E * T, E, T);
    transpose(dBC + B * T * DIMS, dBC, DIMS, T);
    reduce(dBC + B * T * DIMS, 1);
}

// ------------------------------------------------------------------------------------------------
// Rungs 5 to 7: kernels of train_mamba.cu

static void launch_general(void) {
    size_t blocks = scan_blocks_cuda(E);
    size_t bytes = scan_shared_bytes(sizeof(ScanBackwardTile), SCAN_PAIR, N, 3);
    scan_allow_shared(selective_scan_backward_kernel<bf16>, bytes);
    selective_scan_backward_kernel<bf16><<<(unsigned)(blocks * B), SCAN_THREADS, bytes>>>(
        dx, ddt, dz, E, y, NULL, scratch, de, dy, NULL, hs, s, x, dt_raw, dt_bias, A_log, bc, bc + N, LD,
        Dskip, z, E, doc, T, E, N, 16);
    cudaCheck(cudaGetLastError());
    reduce(scratch, blocks);
}

template <int SPACING> static void launch_whole(void) {         // one segment of time
    scan_launch_backward_fast(dx, ddt, dz, E, y, dA_log, dDskip, ddt_bias, dBt, dCt, N, NULL, dy, NULL,
                              SPACING == 8 ? hs8 : hs, s, x, dt_raw, dt_bias, A_log, bc, bc + N, LD, Dskip, z,
                              E, doc, scratch, B, T, E, SPACING, 1, 0);
}

static void launch_shipped(void) {
    selective_scan_backward_cuda<bf16>(dx, ddt, dz, E, y, dA_log, dDskip, ddt_bias, dBt, dCt, N, (float*)NULL,
                                       dy, (const float*)NULL, hs8, s, x, dt_raw, dt_bias, A_log, bc, bc + N,
                                       LD, Dskip, z, E, doc, scratch, B, T, E, N, 8, 0);
}

// ------------------------------------------------------------------------------------------------

static void setup_problem(const size_t* size, bool docs) {
    B = size[0]; T = size[1]; E = size[2];
    const size_t M = B * T, ME = M * E;
    std::vector<float> h_x, h_dt, h_z, h_dy, h_bc, h_bias, h_A, h_D;
    x = random_array<bf16>(ME, 1, 0, &h_x);
    dt_raw = random_array<bf16>(ME, 1, -3, &h_dt);
    z = random_array<bf16>(ME, 1, 0, &h_z);
    dy = random_array<bf16>(ME, 1, 0, &h_dy);
    bc = random_array<bf16>(M * LD, 1, 0, &h_bc);
    dt_bias = random_array<float>(E, 0.3, 0, &h_bias);
    Dskip = random_array<float>(E, 1, 0, &h_D);
    random_array<float>(E * N, 0.2, 0, &h_A);
    for (size_t i = 0; i < E * N; i++) h_A[i] += (float)log((double)(i % N + 1));
    A_log = device_copy(h_A);
    std::vector<int> h_doc(M, 0);
    for (size_t i = 0; i < M; i++)
        h_doc[i] = i % T == 0 ? 0 : h_doc[i - 1] + (random_normal(7, 99, i) > 2);
    doc = docs ? device_copy(h_doc) : NULL;
    const int* d = docs ? h_doc.data() : NULL;

    y = nan_array<bf16>(ME); s = nan_array<bf16>(ME); dx = nan_array<bf16>(ME); ddt = nan_array<bf16>(ME);
    dz = nan_array<bf16>(ME); dBt = nan_array<bf16>(M * N); dCt = nan_array<bf16>(M * N);
    dA_log = nan_array<float>(E * N); dDskip = nan_array<float>(E); ddt_bias = nan_array<float>(E);
    hs = nan_array<bf16>(selective_scan_saved_cuda(B, T, E, N, 16));
    hs8 = nan_array<bf16>(selective_scan_saved_cuda(B, T, E, N, 8));
    scratch = nan_array<float>(selective_scan_scratch_cuda(B, T, E, N));
    dBC = nan_array<float>((E / 16) * M * DIMS);
    de = nan_array<float>(B * E * (N + 2));
    for (int spacing = 8; spacing <= 16; spacing += 8)
        selective_scan_forward_cuda<bf16>(y, s, spacing == 8 ? hs8 : hs, (float*)NULL, x, dt_raw, dt_bias,
                                          A_log, bc, bc + N, LD, Dskip, z, E, (const float*)NULL, doc, B, T,
                                          E, N, spacing, 0);
    if (T <= 2048) {                                           // rungs 1 to 4
        dt32 = nan_array<float>(ME);
        g32 = nan_array<float>(ME);
        states = nan_array<float>(ME * N);
        launch_gate();
        states_kernel<<<dim3((unsigned)(E / 16), (unsigned)B), 256>>>(states, x, dt32, A_log, bc, doc, T, E);
        const bf16* from[] = {x, dt_raw, z, dy, s};
        bf16** to[] = {&x_t, &dt_t, &z_t, &dy_t, &s_t};
        for (int i = 0; i < COUNT(to); i++) {
            *to[i] = nan_array<bf16>(ME);
            transpose(*to[i], from[i], T, E);
        }
        bc_t = nan_array<bf16>(M * LD);
        transpose(bc_t, bc, T, LD);
        out_t = nan_array<bf16>(4 * ME);
    }
    cudaCheck(cudaDeviceSynchronize());

    // the same on the CPU; arrays are used again where possible
    std::vector<float> dt(ME), S(ME), v(ME), dS(ME), saved(selective_scan_saved(B, T, E, N));
    std::vector<float> dxv(ME, 0), ddtv(ME, 0), dBv(M * N, 0), dCv(M * N, 0);
    std::vector<float> dAv(E * N, 0), dDv(E, 0), db(E, 0);
    std::vector<float> work(selective_scan_scratch(B, T, E, N));
    for (size_t i = 0; i < ME; i++) dt[i] = h_dt[i] + h_bias[i % E];
    softplus_forward(dt.data(), dt.data(), ME);
    const float* Bt = h_bc.data();
    selective_scan_forward(S.data(), saved.data(), NULL, h_x.data(), dt.data(), h_A.data(), Bt, Bt + N, LD,
                           h_D.data(), NULL, d, B, T, E, N);
    gate_forward(v.data(), S.data(), E, h_z.data(), E, M, E);
    expect("y", y, v, 4e-3);
    std::fill(v.begin(), v.end(), 0.0f);
    gate_backward(dS.data(), E, v.data(), E, h_dy.data(), S.data(), E, h_z.data(), E, M, E);
    expect("dz", dz, v, 4e-3);
    selective_scan_backward(dxv.data(), ddtv.data(), dAv.data(), dBv.data(), dCv.data(), N, dDv.data(), NULL,
                            dS.data(), NULL, saved.data(), h_x.data(), dt.data(), h_A.data(), Bt, Bt + N, LD,
                            h_D.data(), d, work.data(), B, T, E, N);
    std::fill(v.begin(), v.end(), 0.0f);
    softplus_backward(v.data(), ddtv.data(), dt.data(), ME);
    std::vector<double> sum(E, 0);
    for (size_t i = 0; i < ME; i++) sum[i % E] += (double)v[i];
    for (size_t e = 0; e < E; e++) db[e] = (float)sum[e];
    expect("dx", dx, dxv, 4e-3);
    expect("ddt_raw", ddt, v, 4e-3);
    expect("dBt", dBt, dBv, 5e-3);
    expect("dCt", dCt, dCv, 5e-3);
    expect("dA_log", dA_log, dAv, 3e-3, std::vector<float>(E * N, 0));
    expect("dDskip", dDskip, dDv, 3e-3, std::vector<float>(E, 0));
    expect("ddt_bias", ddt_bias, db, 3e-3, std::vector<float>(E, 0));
}

static const size_t SMALL[2][3] = {{2, 333, 96}, {2, 2600, 64}};
static void setup_wide(int which) { setup_problem(which ? TIMED[0] : SMALL[0], which == 0); }
static void setup_long(int which) { setup_problem(which ? TIMED[1] : SMALL[1], which == 0); }

static const Rung wide[] = {
    {"thread = state, every h stored by forward (1.6 GB), atomics", launch_state<1>, 0},
    {"h saved every 16 tokens (50 MB), the others recomputed", launch_state<2>, 0},
    {"dBt, dCt summed per block, no atomics", launch_state<3>, 0},
    {"as published: block = channel, parallel in time, atomics", launch_line, 0},
    {"lane = 4 states, 8 steps in registers (the general path)", launch_general, 0},
    {"sums over channels and states by the tensor core", launch_whole<16>, 0},
    {"shipped: h saved every 8 tokens", launch_shipped, 0},
};
static const Rung longer[] = {
    {"lane = 4 states, 8 steps in registers (the general path)", launch_general, 0},
    {"sums over channels and states by the tensor core", launch_whole<16>, 0},
    {"h saved every 8 tokens", launch_whole<8>, 0},
    {"shipped: time in segments as well", launch_shipped, 0},
};

// read: x, dt_raw, z, s, dy, bc, hs; written: dx, ddt_raw, dz, y, dBt, dCt
static double bytes_of(const size_t* size) {
    double M = (double)(size[0] * size[1]), Ed = (double)size[2];
    return M * (9 * 2 * Ed + 2 * 2 * DIMS + 2 * Ed * N / 8);
}
static double floor_of(const size_t* size) {                   // milliseconds, see the top
    return (double)(size[0] * size[1] * size[2] * N) * 12 / (132 * 128 * 1.7e9) * 1e3;
}

int main(int argc, char** argv) {
    const Ladder ladders[] = {
        {"selective_scan_backward", "B8 T2048 E1536 N16, bf16", wide, COUNT(wide), setup_wide,
         bytes_of(TIMED[0]), 0, floor_of(TIMED[0])},
        {"selective_scan_backward", "B2 T32768 E1536 N16, bf16", longer, COUNT(longer), setup_long,
         bytes_of(TIMED[1]), 0, floor_of(TIMED[1])},
    };
    return ladder_main(argc, argv, ladders, COUNT(ladders));
}
