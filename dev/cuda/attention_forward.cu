// Attention forward: from one thread per query to the kernel that ships.
//   s_ij = scale <q_i, k_j>, j <= i      P_ij = exp(s_ij) / sum_j exp(s_ij)      out_i = sum_j P_ij v_j
// 4 dh operations for each pair of a query and a key that it sees, and half of all pairs are seen. The floor
// is the time of these operations at the rate of a large bf16 matmul (dev/cuda/roofs: 790 TFLOP/s, H200):
//   4 dh B Hq T^2 / 2 / 790e12      0.065 ms at B8 T2048 Hq12 dh64
// The 2 x 10^8 exponentials need 0.05 ms beside it (16 per clock and processor, 132 processors, 1.98 GHz).
// q and k come turned (rotary embedding), which is a ladder of its own below: it works in place and is bound
// by memory. Decoding is the third: one query per sequence, all time goes into reading the cache.
#include "ladder.h"

enum { DH = 64 };

typedef struct {
    bf16* out;
    float *lse, *scores;                               // scores (B,Hq,T,T)
    bf16* qkv;
    size_t B, T, Hq, Hkv, ld;
    float scale;
} Attention;
static Attention a;

static unsigned ceil_div(size_t x, size_t y) { return (unsigned)((x + y - 1) / y); }

// ------------------------------------------------------------------------------------------------
// v1: the formula, a thread per query. The running maximum keeps exp from overflowing (see 4.14); q and the
// sum are in registers, every key is fetched by every thread.

__global__ void __launch_bounds__(128) attention_kernel1(Attention p) {
    const size_t t = (size_t)blockIdx.x * 128 + threadIdx.x, h = blockIdx.y, b = blockIdx.z;
    if (t >= p.T) return;
    const bf16 *q = p.qkv + (b * p.T + t) * p.ld + h * DH;
    const bf16 *k = p.qkv + b * p.T * p.ld + (p.Hq + h * p.Hkv / p.Hq) * DH, *v = k + p.Hkv * DH;
    float qr[DH], sum[DH], max = -INFINITY, total = 0;
    for (int c = 0; c < DH; c++) {
        qr[c] = to_float(q[c]) * p.scale;
        sum[c] = 0;
    }
    for (size_t j = 0; j <= t; j++) {
        float s = 0;
        #pragma unroll
        for (int c = 0; c < DH; c++) s += qr[c] * to_float(k[j * p.ld + c]);
        float larger = fmaxf(max, s), shrink = __expf(max - larger), P = __expf(s - larger);
        max = larger;
        total = total * shrink + P;
        #pragma unroll
        for (int c = 0; c < DH; c++) sum[c] = sum[c] * shrink + P * to_float(v[j * p.ld + c]);
    }
    bf16* out = p.out + ((b * p.T + t) * p.Hq + h) * DH;
    for (int c = 0; c < DH; c++) out[c] = from_float<bf16>(sum[c] / total);
    p.lse[(b * p.Hq + h) * p.T + t] = (max + __logf(total)) * ATTENTION_LOG2E;
}

// ------------------------------------------------------------------------------------------------
// v2: three kernels with all scores in memory, 1.6 GB: products of 32 x 32 tiles in shared memory

__global__ void __launch_bounds__(1024) scores_kernel2(Attention p) {
    __shared__ float q[32][DH + 1], k[32][DH + 1];
    const size_t i0 = blockIdx.y * 32, j0 = blockIdx.x * 32, h = blockIdx.z % p.Hq, b = blockIdx.z / p.Hq;
    if (j0 > i0 + 31) return;
    const int x = threadIdx.x, y = threadIdx.y;
    const size_t key = (p.Hq + h * p.Hkv / p.Hq) * DH;
    for (int c = x; c < DH; c += 32) {
        q[y][c] = i0 + y < p.T ? to_float(p.qkv[(b * p.T + i0 + y) * p.ld + h * DH + c]) : 0.0f;
        k[y][c] = j0 + y < p.T ? to_float(p.qkv[(b * p.T + j0 + y) * p.ld + key + c]) : 0.0f;
    }
    __syncthreads();
    float s = 0;
    for (int c = 0; c < DH; c++) s += q[y][c] * k[x][c];
    if (i0 + y < p.T && j0 + x < p.T) p.scores[(blockIdx.z * p.T + i0 + y) * p.T + j0 + x] = s * p.scale;
}
__global__ void __launch_bounds__(WARP) softmax_kernel2(Attention p) {
    const size_t i = blockIdx.x % p.T;
    float *s = p.scores + (size_t)blockIdx.x * p.T, max = -INFINITY, total = 0;
    for (size_t j = threadIdx.x; j <= i; j += WARP) max = fmaxf(max, s[j]);
    max = warp_max(max);
    for (size_t j = threadIdx.x; j <= i; j += WARP) {
        s[j] = __expf(s[j] - max);
        total += s[j];
    }
    total = warp_sum(total);
    for (size_t j = threadIdx.x; j <= i; j += WARP) s[j] /= total;
    if (threadIdx.x == 0) p.lse[blockIdx.x] = (max + __logf(total)) * ATTENTION_LOG2E;
}
__global__ void __launch_bounds__(1024) values_kernel2(Attention p) {
    __shared__ float P[32][33], v[32][DH];
    const size_t i0 = blockIdx.x * 32, h = blockIdx.y % p.Hq, b = blockIdx.y / p.Hq, i = i0 + threadIdx.y;
    const int x = threadIdx.x, y = threadIdx.y;
    float sum[DH / 32] = {};
    for (size_t j0 = 0; j0 <= i0; j0 += 32) {
        P[y][x] = j0 + x <= i && i < p.T ? p.scores[(blockIdx.y * p.T + i) * p.T + j0 + x] : 0.0f;
        for (int c = x; c < DH; c += 32)
            v[y][c] = j0 + y < p.T ? to_float(p.qkv[(b * p.T + j0 + y) * p.ld +
                                                    (p.Hq + p.Hkv + h * p.Hkv / p.Hq) * DH + c]) : 0.0f;
        __syncthreads();
        for (int j = 0; j < 32; j++)
            for (int c = 0; c < DH / 32; c++) sum[c] += P[y][j] * v[j][x + 32 * c];
        __syncthreads();
    }
    for (int c = 0; i < p.T && c < DH / 32; c++)
        p.out[(b * p.T + i) * p.Hq * DH + h * DH + x + 32 * c] = from_float<bf16>(sum[c]);
}

// ------------------------------------------------------------------------------------------------
// v3: no scores in memory. A block has 64 queries and walks over the keys in tiles of 64; running maximum and
// sum per query. A thread makes 4 x 4 of the products, in float.

struct Tile3 { float q[64][DH + 4], k[64][DH + 4], v[64][DH + 4], P[64][68]; };

__global__ void __launch_bounds__(256) attention_kernel3(Attention p) {
    extern __shared__ __align__(128) char shared[];
    Tile3& sh = *(Tile3*)shared;
    const size_t tiles = gridDim.x, i0 = (tiles - 1 - blockIdx.x) * 64, h = blockIdx.y, b = blockIdx.z;
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    const bf16* k = p.qkv + b * p.T * p.ld + (p.Hq + h * p.Hkv / p.Hq) * DH;
    auto load = [&](float (*to)[DH + 4], const bf16* from, size_t rows) {
        for (int u = threadIdx.x; u < 64 * DH / 8; u += 256) {
            float v[8] = {};
            size_t r = u / (DH / 8), c = u % (DH / 8) * 8;
            if (r < rows) scan_unpack8(v, from + r * p.ld + c);
            for (int i = 0; i < 8; i++) to[r][c + i] = v[i];
        }
    };
    load(sh.q, p.qkv + (b * p.T + i0) * p.ld + h * DH, p.T - i0);
    float out[4][4] = {}, max[4], total[4];
    for (int i = 0; i < 4; i++) max[i] = -INFINITY, total[i] = 0;
    for (size_t j0 = 0; j0 <= i0; j0 += 64) {
        __syncthreads();
        load(sh.k, k + j0 * p.ld, p.T - j0);
        load(sh.v, k + p.Hkv * DH + j0 * p.ld, p.T - j0);
        __syncthreads();
        float s[4][4] = {};
        for (int c = 0; c < DH; c++) {
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) s[i][j] += sh.q[4 * y + i][c] * sh.k[x + 16 * j][c];
        }
        for (int i = 0; i < 4; i++) {                  // the 16 threads of a row are neighbours in a warp
            float larger = max[i], sum = 0;
            for (int j = 0; j < 4; j++) {
                s[i][j] = j0 + x + 16 * j <= i0 + 4 * y + i ? s[i][j] * p.scale : -INFINITY;
                larger = fmaxf(larger, s[i][j]);
            }
            for (int step = 8; step > 0; step /= 2)
                larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, step));
            for (int j = 0; j < 4; j++) {
                float P = __expf(s[i][j] - larger);
                sh.P[4 * y + i][x + 16 * j] = P;
                sum += P;
            }
            float shrink = __expf(max[i] - larger);
            max[i] = larger;
            total[i] = total[i] * shrink + sum;
            for (int c = 0; c < 4; c++) out[i][c] *= shrink;
        }
        __syncwarp();                                  // a warp has whole rows of P
        for (int j = 0; j < 64; j++) {
            for (int i = 0; i < 4; i++)
                for (int c = 0; c < 4; c++) out[i][c] += sh.P[4 * y + i][j] * sh.v[j][x + 16 * c];
        }
    }
    for (int i = 0; i < 4; i++) {
        for (int step = 8; step > 0; step /= 2) total[i] += __shfl_xor_sync(~0u, total[i], step);
        size_t t = i0 + 4 * y + i;
        if (t >= p.T) continue;
        for (int c = 0; c < 4; c++)
            p.out[(b * p.T + t) * p.Hq * DH + h * DH + x + 16 * c] = from_float<bf16>(out[i][c] / total[i]);
        if (x == 0) p.lse[(b * p.Hq + h) * p.T + t] = (max[i] + __logf(total[i])) * ATTENTION_LOG2E;
    }
}

// ------------------------------------------------------------------------------------------------
// Launchers. From v4 on the kernel is the one that ships, with other tiles: the tensor core, scores and P
// stay in registers, keys are copied one tile ahead.

static void launch1(void) {
    attention_kernel1<<<dim3(ceil_div(a.T, 128), (unsigned)a.Hq, (unsigned)a.B), 128>>>(a);
}
static void launch2(void) {
    const unsigned tiles = ceil_div(a.T, 32), heads = (unsigned)(a.B * a.Hq);
    scores_kernel2<<<dim3(tiles, tiles, heads), dim3(32, 32)>>>(a);
    softmax_kernel2<<<(unsigned)(heads * a.T), WARP>>>(a);
    values_kernel2<<<dim3(tiles, heads), dim3(32, 32)>>>(a);
}
static void launch3(void) {
    scan_allow_shared(attention_kernel3, sizeof(Tile3));
    attention_kernel3<<<dim3(ceil_div(a.T, 64), (unsigned)a.Hq, (unsigned)a.B), 256, sizeof(Tile3)>>>(a);
}
template <int MT, int KEYS> static void launch_tiles(void) {
    AttentionCuda<bf16> p;
    (AttentionKeys<bf16>&)p = attention_keys<bf16>(a.qkv, a.ld, NULL, 0, NULL, NULL, a.B, a.T, a.Hq, a.Hkv,
                                                   DH);
    p.out = a.out; p.ldo = a.Hq * DH; p.lse = a.lse; p.q = a.qkv; p.scale = a.scale * ATTENTION_LOG2E;
    attention_launch_fast(attention_forward_fast_kernel<DH, MT, KEYS>,
                          sizeof(AttentionForwardShared<DH, MT, KEYS>), p, p.B * p.Hq, 64 * MT, 0);
}
static void shipped(void) {
    attention_forward_cuda<bf16>(a.out, a.Hq * DH, a.lse, a.qkv, a.ld, NULL, 0, NULL, NULL, a.scale, a.B, a.T,
                                 a.Hq, a.Hkv, DH, 0);
}

static const Rung rungs[] = {
    {"a thread per query, keys from memory", launch1, 0},
    {"all scores in memory, products of shared tiles", launch2, 0},
    {"tiles of 64 keys, running maximum, no scores in memory", launch3, 0},
    {"tensor core, P in registers; 16 queries per warp", launch_tiles<1, 64>, 0},
    {"shipped: 32 queries per warp use each key that is read", shipped, 0},
};

// The rotation
static RotaryCuda rotary;
static void rotate1(void) {
    attention_rotate_kernel<bf16, 1><<<ceil_div(a.B * a.T, ROTATE_TOKENS), ROTATE_THREADS>>>(
        a.qkv, a.ld, NULL, NULL, rotary, a.B * a.T, a.T, (int)(a.Hq + a.Hkv), DH);
}
static void rotate_shipped(void) {
    attention_rotate_cuda<bf16>(a.qkv, a.ld, NULL, NULL, rotary, a.B, a.T, a.Hq, a.Hkv, DH, 0);
}
static const Rung rungs_rotate[] = {
    {"pair by pair", rotate1, 0},
    {"shipped: 8 pairs at once", rotate_shipped, 0},
};

// Decoding
static bf16* cache;
static size_t capacity;
static float *position, *scratch;
static void decode1(void) {
    AttentionKeys<bf16> p = attention_keys<bf16>(a.qkv, a.ld, cache, capacity, position, NULL, a.B, 1, a.Hq,
                                                 a.Hkv, DH);
    const dim3 blocks(1, (unsigned)a.Hq, (unsigned)a.B);
    attention_decode_kernel<bf16, 1><<<blocks, ATTENTION_DECODE_WARPS * WARP>>>(
        scratch, cache, a.qkv, p, a.scale * ATTENTION_LOG2E, rotary, 8);
    attention_decode_sum_kernel<bf16><<<dim3((unsigned)a.Hq, (unsigned)a.B), ATTENTION_MAX_SPLITS>>>(
        a.out, a.Hq * DH, position, scratch, 1, (int)a.Hq, DH);
}
static void decode_shipped(void) {
    attention_decode_cuda<bf16>(a.out, a.Hq * DH, cache, position, capacity, a.qkv, a.ld, rotary, a.scale,
                                scratch, a.B, a.Hq, a.Hkv, DH, 0);
}
static const Rung rungs_decode[] = {
    {"a block per head", decode1, 0},
    {"shipped: the cache split over all processors", decode_shipped, 0},
};

// ------------------------------------------------------------------------------------------------
// The problems. The sequences of the timed one are one sequence, eight times.

static void setup_sizes(size_t B, size_t distinct, size_t T, size_t Hq, size_t Hkv, std::vector<float>* qkv) {
    a.B = B; a.T = T; a.Hq = Hq; a.Hkv = Hkv;
    a.ld = (Hq + 2 * Hkv) * DH;
    a.scale = 0.125f;
    a.qkv = repeated_array<bf16>(B * T * a.ld, distinct * T * a.ld, 1, 0, qkv);
}
static void setup(int which) {
    const size_t B = which ? 8 : 3, n = which ? 1 : B, T = which ? 2048 : 77, Hq = which ? 12 : 4;
    std::vector<float> qkv, position_(n * T), out(n * T * Hq * DH), lse(n * Hq * T);
    setup_sizes(B, n, T, Hq, which ? 12 : 2, &qkv);
    a.out = nan_array<bf16>(B * T * Hq * DH);
    a.lse = nan_array<float>(B * Hq * T);
    a.scores = nan_array<float>(B * Hq * T * T);
    token_positions(position_.data(), NULL, NULL, n, T);
    const float *k = &qkv[Hq * DH], *v = k + a.Hkv * DH;
    attention_forward(out.data(), Hq * DH, lse.data(), qkv.data(), a.ld, k, v, a.ld, NULL, 0,
                      position_.data(), a.scale, n, T, Hq, a.Hkv, DH);
    for (float& x : lse) x *= ATTENTION_LOG2E;
    expect("out", a.out, out, 5e-3, std::vector<float>(), B * T * Hq * DH);
    expect("lse", a.lse, lse, 1e-4, std::vector<float>(), B * Hq * T);
}
static void setup_rotate(int which) {
    const size_t B = which ? 8 : 3, n = which ? 1 : B, T = which ? 2048 : 77, heads = which ? 12 : 3;
    std::vector<float> qkv, position_(n * T);
    setup_sizes(B, n, T, heads, heads, &qkv);
    rotary = rotary_cuda(DH, 10000, false);
    std::vector<float> want = qkv;
    token_positions(position_.data(), NULL, NULL, n, T);
    rotary_forward(want.data(), a.ld, position_.data(), 10000, false, n * T, 2 * heads, DH, DH);
    expect("qkv", a.qkv, want, 4e-3, qkv, B * T * a.ld);
}
static void setup_decode(int which) {
    const size_t T = which ? 131072 : 77, heads = which ? 12 : 3, B = which ? 1 : 2;
    std::vector<float> qkv, kv, length(B, (float)(T - 1)), out(B * heads * DH), lse(B * heads);
    setup_sizes(B, B, 1, heads, heads, &qkv);
    rotary = rotary_cuda(DH, 10000, false);
    capacity = T + 64;                                 // every timed launch appends a token
    cache = random_array<bf16>(B * capacity * 2 * heads * DH, 1, 0, &kv);
    position = nan_array<float>(B);
    scratch = nan_array<float>(attention_decode_scratch_cuda(B, heads, DH, capacity));
    a.out = nan_array<bf16>(B * heads * DH);
    rotary_forward(qkv.data(), a.ld, length.data(), 10000, false, B, 2 * heads, DH, DH);
    attention_forward(out.data(), heads * DH, lse.data(), qkv.data(), a.ld, &qkv[heads * DH],
                      &qkv[2 * heads * DH], a.ld, kv.data(), capacity, length.data(), a.scale, B, 1, heads,
                      heads, DH);
    expect("out", a.out, out, 8e-3);                   // few numbers
    expect("position", position, std::vector<float>(B, (float)T), 1e-9, length);
}

int main(int argc, char** argv) {
    const double B = 8, T = 2048, heads = 12, flop = 4 * DH * B * heads * T * T / 2;
    const Ladder ladders[] = {
        {"attention_forward", "B8 T2048 H12 dh64 causal, bf16", rungs, COUNT(rungs), setup,
         B * T * heads * DH * 8, flop, flop / 790e9},
        {"attention_rotate", "B8 T2048 H12 dh64, bf16", rungs_rotate, COUNT(rungs_rotate), setup_rotate,
         B * T * 2 * heads * DH * 4, 0, 0},
        {"attention_decode", "B1 131072 cached H12 dh64, bf16", rungs_decode, COUNT(rungs_decode),
         setup_decode, 131072 * heads * DH * 4, 0, 0},
    };
    return ladder_main(argc, argv, ladders, COUNT(ladders));
}
