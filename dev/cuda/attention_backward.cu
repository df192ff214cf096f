// Attention backward: from one thread per row to the kernels that ship.
//   dv_j = sum_i P_ij dout_i    dS_ij = P_ij (<dout_i, v_j> - delta_i)    delta_i = <dout_i, out_i>
//   dq_i = scale sum_j dS_ij k_j       dk_j = scale sum_i dS_ij q_i
// Five products of 2 dh operations for each pair of a query and a key that it sees; the scores are one of
// them, made again because forward does not keep them. The floor is the time of these operations at the rate
// of a large bf16 matmul (dev/cuda/roofs: 790 TFLOP/s on an H200):
//   10 dh B Hq T^2 / 2 / 790e12      0.163 ms at B8 T2048 Hq12 dh64
// dq is a sum over keys, dk and dv are sums over queries: whichever way the work is divided among blocks, one
// of the two sums goes across them. Published kernels add dq up in memory, by atomic additions, whose order
// changes from run to run. Here every sum stays in one place, and the scores and <dout_i, v_j> are made
// twice: seven products.
#include "ladder.h"

enum { DH = 64 };

typedef struct {
    bf16* dqkv;
    const bf16 *dout, *out, *qkv;
    const float* lse;
    float *delta, *P, *dS;                             // P, dS (B,Hq,T,T)
    size_t B, T, Hq, Hkv, ld;
    float scale;
} Attention;
static Attention a;
static RotaryCuda rotary;                              // none: gradients of the turned q and k

static unsigned ceil_div(size_t x, size_t y) { return (unsigned)((x + y - 1) / y); }

// ------------------------------------------------------------------------------------------------
// v1: the formulas, a thread per query (delta, dq), then a thread per key (dk, dv)

__device__ __forceinline__ float dot(const float* a, const bf16* b) {
    float sum = 0;
    #pragma unroll
    for (int c = 0; c < DH; c++) sum += a[c] * to_float(b[c]);
    return sum;
}
__device__ __forceinline__ void load_row(float* v, const bf16* p) {
    #pragma unroll
    for (int c = 0; c < DH; c++) v[c] = to_float(p[c]);
}

__global__ void __launch_bounds__(128) query_kernel1(Attention p) {
    const size_t i = (size_t)blockIdx.x * 128 + threadIdx.x, h = blockIdx.y, b = blockIdx.z, m = b * p.T + i;
    if (i >= p.T) return;
    const bf16 *k = p.qkv + b * p.T * p.ld + (p.Hq + h * p.Hkv / p.Hq) * DH, *v = k + p.Hkv * DH;
    float q[DH], dout[DH], dq[DH] = {};
    load_row(q, p.qkv + m * p.ld + h * DH);
    load_row(dout, p.dout + (m * p.Hq + h) * DH);
    const float delta = dot(dout, p.out + (m * p.Hq + h) * DH), lse = p.lse[(b * p.Hq + h) * p.T + i];
    p.delta[(b * p.Hq + h) * p.T + i] = delta;
    for (size_t j = 0; j <= i; j++) {
        float P = exp2f(dot(q, k + j * p.ld) * p.scale * ATTENTION_LOG2E - lse);
        float dS = P * (dot(dout, v + j * p.ld) - delta);
        #pragma unroll
        for (int c = 0; c < DH; c++) dq[c] += dS * to_float(k[j * p.ld + c]);
    }
    for (int c = 0; c < DH; c++) p.dqkv[m * p.ld + h * DH + c] = from_float<bf16>(dq[c] * p.scale);
}
__global__ void __launch_bounds__(128) key_kernel1(Attention p) {
    const size_t j = (size_t)blockIdx.x * 128 + threadIdx.x, kv = blockIdx.y, b = blockIdx.z, m = b * p.T + j;
    if (j >= p.T) return;
    float k[DH], v[DH], dk[DH] = {}, dv[DH] = {};
    load_row(k, p.qkv + m * p.ld + (p.Hq + kv) * DH);
    load_row(v, p.qkv + m * p.ld + (p.Hq + p.Hkv + kv) * DH);
    const size_t group = p.Hq / p.Hkv;
    for (size_t h = kv * group; h < (kv + 1) * group; h++) {
        for (size_t i = j; i < p.T; i++) {
            const bf16* q = p.qkv + (b * p.T + i) * p.ld + h * DH;
            const bf16* dout = p.dout + ((b * p.T + i) * p.Hq + h) * DH;
            const size_t at = (b * p.Hq + h) * p.T + i;
            float P = exp2f(dot(k, q) * p.scale * ATTENTION_LOG2E - p.lse[at]);
            float dS = P * (dot(v, dout) - p.delta[at]);
            #pragma unroll
            for (int c = 0; c < DH; c++) {
                dk[c] += dS * to_float(q[c]);
                dv[c] += P * to_float(dout[c]);
            }
        }
    }
    bf16* to = p.dqkv + m * p.ld + (p.Hq + kv) * DH;
    for (int c = 0; c < DH; c++) {
        to[c] = from_float<bf16>(dk[c] * p.scale);
        to[p.Hkv * DH + c] = from_float<bf16>(dv[c]);
    }
}

// ------------------------------------------------------------------------------------------------
// v2: P and dS in memory, 3.2 GB: products of 32 x 32 tiles in shared memory

__global__ void __launch_bounds__(128) delta_kernel2(Attention p) {
    const size_t at = (size_t)blockIdx.x * 4 + threadIdx.x / WARP, m = at / p.Hq;
    if (m >= p.B * p.T) return;
    float sum = 0;
    for (int c = threadIdx.x % WARP; c < DH; c += WARP)
        sum += to_float(p.dout[at * DH + c]) * to_float(p.out[at * DH + c]);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) p.delta[(m / p.T * p.Hq + at % p.Hq) * p.T + m % p.T] = sum;
}
__global__ void __launch_bounds__(1024) scores_kernel2(Attention p) {
    __shared__ float q[32][DH + 1], k[32][DH + 1], dout[32][DH + 1], v[32][DH + 1];
    const size_t i0 = blockIdx.y * 32, j0 = blockIdx.x * 32, h = blockIdx.z % p.Hq, b = blockIdx.z / p.Hq;
    if (j0 > i0 + 31) return;
    const int x = threadIdx.x, y = threadIdx.y;
    const size_t i = i0 + y, j = j0 + y, key = (p.Hq + h * p.Hkv / p.Hq) * DH;
    for (int c = x; c < DH; c += 32) {
        q[y][c] = i < p.T ? to_float(p.qkv[(b * p.T + i) * p.ld + h * DH + c]) : 0.0f;
        dout[y][c] = i < p.T ? to_float(p.dout[((b * p.T + i) * p.Hq + h) * DH + c]) : 0.0f;
        k[y][c] = j < p.T ? to_float(p.qkv[(b * p.T + j) * p.ld + key + c]) : 0.0f;
        v[y][c] = j < p.T ? to_float(p.qkv[(b * p.T + j) * p.ld + key + p.Hkv * DH + c]) : 0.0f;
    }
    __syncthreads();
    float s = 0, dP = 0;
    for (int c = 0; c < DH; c++) {
        s += q[y][c] * k[x][c];
        dP += dout[y][c] * v[x][c];
    }
    if (i >= p.T || j0 + x >= p.T) return;
    const size_t row = blockIdx.z * p.T + i, at = row * p.T + j0 + x;
    const float P = j0 + x <= i ? exp2f(s * p.scale * ATTENTION_LOG2E - p.lse[row]) : 0.0f;
    p.P[at] = P;
    p.dS[at] = P * (dP - p.delta[row]);
}
// sums over the rows or columns of P and dS: dq (KEYS false), or dk and dv of one KV head
template <bool KEYS> __global__ void __launch_bounds__(1024) sums_kernel2(Attention p) {
    __shared__ float w[2][32][33], r[2][32][DH];
    const size_t heads = KEYS ? p.Hkv : p.Hq, group = KEYS ? p.Hq / p.Hkv : 1, t0 = blockIdx.x * 32;
    const size_t own = blockIdx.y % heads, b = blockIdx.y / heads, tiles = (p.T + 31) / 32;
    const int x = threadIdx.x, y = threadIdx.y;
    float sum[2][DH / 32] = {};
    for (size_t h = own * group; h < (own + 1) * group; h++) {
        const size_t row = (b * p.Hq + h) * p.T;
        for (size_t u0 = KEYS ? t0 : 0; u0 < (KEYS ? tiles * 32 : t0 + 32); u0 += 32) {
            // w[..][y][x]: weight of row t0 + y (x, if KEYS) and the other row
            const size_t i = KEYS ? u0 + y : t0 + y, j = KEYS ? t0 + x : u0 + x;
            const bool inside = i < p.T && j < p.T;
            w[0][y][x] = inside ? p.dS[(row + i) * p.T + j] : 0.0f;
            w[1][y][x] = inside && KEYS ? p.P[(row + i) * p.T + j] : 0.0f;
            for (int c = x; c < DH; c += 32) {
                const size_t m = b * p.T + u0 + y;
                const bool real_row = u0 + y < p.T;
                const size_t column = (KEYS ? h : p.Hq + h * p.Hkv / p.Hq) * DH;
                r[0][y][c] = real_row ? to_float(p.qkv[m * p.ld + column + c]) : 0.0f;
                r[1][y][c] = real_row && KEYS ? to_float(p.dout[(m * p.Hq + h) * DH + c]) : 0.0f;
            }
            __syncthreads();
            for (int u = 0; u < 32; u++) {
                for (int which = 0; which < (KEYS ? 2 : 1); which++)
                    for (int c = 0; c < DH / 32; c++)
                        sum[which][c] += (KEYS ? w[which][u][y] : w[which][y][u]) * r[which][u][x + 32 * c];
            }
            __syncthreads();
        }
    }
    if (t0 + y >= p.T) return;
    bf16* to = p.dqkv + (b * p.T + t0 + y) * p.ld + (KEYS ? p.Hq + own : own) * DH;
    for (int c = 0; c < DH / 32; c++) {
        to[x + 32 * c] = from_float<bf16>(sum[0][c] * p.scale);
        if (KEYS) to[p.Hkv * DH + x + 32 * c] = from_float<bf16>(sum[1][c]);
    }
}

// ------------------------------------------------------------------------------------------------
// Launchers. From v3 on the kernels are those that ship, with other tiles.

static void launch1(void) {
    query_kernel1<<<dim3(ceil_div(a.T, 128), (unsigned)a.Hq, (unsigned)a.B), 128>>>(a);
    key_kernel1<<<dim3(ceil_div(a.T, 128), (unsigned)a.Hkv, (unsigned)a.B), 128>>>(a);
}
static void launch2(void) {
    const unsigned tiles = ceil_div(a.T, 32), heads = (unsigned)(a.B * a.Hq);
    delta_kernel2<<<ceil_div(a.B * a.T * a.Hq, 4), 128>>>(a);
    scores_kernel2<<<dim3(tiles, tiles, heads), dim3(32, 32)>>>(a);
    sums_kernel2<false><<<dim3(tiles, heads), dim3(32, 32)>>>(a);
    sums_kernel2<true><<<dim3(tiles, (unsigned)(a.B * a.Hkv)), dim3(32, 32)>>>(a);
}
static AttentionBackwardCuda<bf16> problem(void) {
    AttentionBackwardCuda<bf16> p;
    (AttentionKeys<bf16>&)p = attention_keys<bf16>(a.qkv, a.ld, NULL, 0, NULL, NULL, a.B, a.T, a.Hq, a.Hkv,
                                                   DH);
    p.dqkv = a.dqkv; p.lddqkv = a.ld;
    p.dout = a.dout; p.out = a.out; p.q = a.qkv; p.lddo = p.ldo = a.Hq * DH;
    p.lse = a.lse; p.delta = a.delta; p.scale = a.scale; p.rotary = rotary;
    return p;
}
template <int MT, int KEYS> static void launch_q(void) {
    attention_launch_fast(attention_backward_q_fast_kernel<DH, MT, KEYS>,
                          sizeof(AttentionBackwardQShared<DH, MT, KEYS>), problem(), (int)(a.B * a.Hq),
                          64 * MT, 0);
}
template <int MT, int QUERIES> static void launch_kv(void) {
    attention_launch_fast(attention_backward_kv_fast_kernel<DH, MT, QUERIES>,
                          sizeof(AttentionBackwardKVShared<DH, MT, QUERIES>), problem(), (int)(a.B * a.Hkv),
                          64 * MT, 0);
}
static void launch3(void) {
    launch_q<1, 64>();
    launch_kv<1, 64>();
}
static void shipped(void) {
    attention_backward_cuda<bf16>(a.dqkv, a.ld, a.dout, a.Hq * DH, a.out, a.Hq * DH, a.lse, a.qkv, a.ld, NULL,
                                  0, NULL, NULL, rotary, a.scale, a.delta, a.B, a.T, a.Hq, a.Hkv, DH, 0);
}
static const Rung rungs[] = {
    {"a thread per query, then a thread per key", launch1, 0},
    {"P and dS in memory, products of shared tiles", launch2, 0},
    {"tensor core; 16 rows per warp", launch3, 0},
    {"shipped: 32 rows per warp use each operand that is read", shipped, 0},
};

// ------------------------------------------------------------------------------------------------
// The problem. The sequences of the timed one are one sequence, eight times.

static void setup(int which) {
    const size_t B = which ? 8 : 3, n = which ? 1 : B, T = which ? 2048 : 77, Hq = which ? 12 : 4;
    const size_t Hkv = which ? 12 : 2, M = n * T, ld = (Hq + 2 * Hkv) * DH;
    std::vector<float> qkv, dout, position(M), out(M * Hq * DH), lse(n * Hq * T), want(M * ld);
    a.B = B; a.T = T; a.Hq = Hq; a.Hkv = Hkv; a.ld = ld;
    a.scale = 0.125f;
    a.qkv = repeated_array<bf16>(B * T * ld, M * ld, 1, 0, &qkv);
    a.dout = repeated_array<bf16>(B * T * Hq * DH, M * Hq * DH, 1, 0, &dout);
    a.dqkv = nan_array<bf16>(B * T * ld);
    a.delta = nan_array<float>(B * Hq * T);
    a.P = nan_array<float>(B * Hq * T * T);
    a.dS = nan_array<float>(B * Hq * T * T);
    token_positions(position.data(), NULL, NULL, n, T);
    const float *k = &qkv[Hq * DH], *v = k + Hkv * DH;
    attention_forward(out.data(), Hq * DH, lse.data(), qkv.data(), ld, k, v, ld, NULL, 0, position.data(),
                      a.scale, n, T, Hq, Hkv, DH);
    attention_backward(want.data(), ld, &want[Hq * DH], &want[(Hq + Hkv) * DH], ld, NULL, dout.data(),
                       out.data(), Hq * DH, lse.data(), qkv.data(), ld, k, v, ld, NULL, 0, position.data(),
                       a.scale, n, T, Hq, Hkv, DH);
    std::vector<bf16> out16(B * T * Hq * DH);
    std::vector<float> lse2(B * Hq * T);
    for (size_t i = 0; i < out16.size(); i++) host_store(&out16[i], out[i % out.size()]);
    for (size_t i = 0; i < lse2.size(); i++) lse2[i] = lse[i % lse.size()] * ATTENTION_LOG2E;
    a.out = device_copy(out16);
    a.lse = device_copy(lse2);
    expect("dqkv", a.dqkv, want, 5e-3, std::vector<float>(), B * T * ld);
}

int main(int argc, char** argv) {
    const double B = 8, T = 2048, heads = 12, flop = 10 * DH * B * heads * T * T / 2;
    const Ladder ladders[] = {
        {"attention_backward", "B8 T2048 H12 dh64 causal, bf16", rungs, COUNT(rungs), setup,
         B * T * heads * DH * 16, flop, flop / 790e9},
    };
    return ladder_main(argc, argv, ladders, COUNT(ladders));
}
