// The causal convolution with SiLU, from one thread per output to the kernels that ship.
//   c_t[e] = bias[e] + sum_k weight[e,k] * inp_{t-K+1+k}[e]      out = silu(c)
// The rungs below the last know K = 4 taps, whole packs of channels, no tails and no documents.
#include "ladder.h"

enum { K = 4 };
enum { STEPS = 32, ROWS = 8 };         // tokens of a thread; threads of a block along the tokens

static size_t B, T, E;
static bf16 *inp, *out, *dout, *dinp;
static float *weight, *bias, *dweight, *dbias, *scratch;

static unsigned blocks_of(size_t n, size_t size) { return (unsigned)((n + size - 1) / size); }

// --------------------------------------------------------------------------------------------------
// Forward

// v1: one thread per output. Neighbouring threads have neighbouring channels, so a warp loads 64 contiguous
// bytes per tap; every input is loaded by K threads, and every load brings 2 bytes.
__global__ void forward_kernel1(bf16* out, const bf16* inp, const float* weight, const float* bias, size_t n,
                                size_t T, size_t E) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    size_t e = i % E, t = i / E % T;
    float c = bias[e];
    for (int k = 0; k < K; k++)
        if (t + k + 1 >= K) c += weight[e * K + k] * to_float(inp[i - (K - 1 - k) * E]);
    out[i] = from_float<bf16>(silu_cuda(c));
}
static void forward1(void) {
    forward_kernel1<<<blocks_of(B * T * E, 256), 256>>>(out, inp, weight, bias, B * T * E, T, E);
}

// A block of the rungs below: 32 threads side by side, each with V neighbouring channels, times ROWS along
// the tokens of one sequence; it covers STEPS * ROWS tokens.
static dim3 walk_block(void) { return dim3(WARP, ROWS); }
static dim3 walk_grid(size_t V) {
    return dim3(blocks_of(E, WARP * V), blocks_of(T, STEPS * ROWS), (unsigned)B);
}

// the weights of V channels, once per thread
template <int V>
__device__ __forceinline__ void load_weights(float (&w)[K][V], float (&b)[V], const float* weight,
                                             const float* bias, size_t e) {
    for (int j = 0; j < V; j++) {
        b[j] = bias[e + j];
        for (int k = 0; k < K; k++) w[k][j] = weight[(e + j) * K + k];
    }
}

// v2: 8 channels per thread: 16 bytes per load and store, and the weights of these channels in registers for
// STEPS tokens, every ROWSth of the block. Inputs are still loaded K times, though mostly from the cache.
__global__ void forward_kernel2(bf16* out, const bf16* inp, const float* weight, const float* bias, size_t T,
                                size_t E) {
    const int V = 8;
    size_t e = ((size_t)blockIdx.x * WARP + threadIdx.x) * V, row = blockIdx.z * T;
    size_t t0 = (size_t)blockIdx.y * ROWS * STEPS, t1 = t0 + ROWS * STEPS < T ? t0 + ROWS * STEPS : T;
    if (e >= E) return;
    float w[K][V], b[V];
    load_weights(w, b, weight, bias, e);
    for (size_t t = t0 + threadIdx.y; t < t1; t += ROWS) {
        float c[V], x[V];
        for (int j = 0; j < V; j++) c[j] = b[j];
        for (int k = 0; k < K; k++) {
            if (t + k + 1 < K) continue;
            unpack<V>(x, load_pack<V>(inp + (row + t + k + 1 - K) * E + e));
            for (int j = 0; j < V; j++) c[j] += w[k][j] * x[j];
        }
        for (int j = 0; j < V; j++) c[j] = silu_cuda(c[j]);
        store_pack<V>(out + (row + t) * E + e, c);
    }
}
static void forward2(void) {
    forward_kernel2<<<walk_grid(8), walk_block()>>>(out, inp, weight, bias, T, E);
}

// v3 (G = 1): the STEPS tokens of a thread are neighbours: it walks through them with the last K inputs in
// registers, and every input is loaded once, but for the K-1 before the first token. Faster only on paper: a
// load takes about 600 ns, and a thread has one under way where it had K.
// v4 (G = 4): the inputs of 4 tokens are loaded before the first is used.
template <int G>
__global__ void forward_kernel3(bf16* out, const bf16* inp, const float* weight, const float* bias, size_t T,
                                size_t E) {
    const int V = 8;
    size_t e = ((size_t)blockIdx.x * WARP + threadIdx.x) * V, row = blockIdx.z * T;
    size_t t0 = ((size_t)blockIdx.y * ROWS + threadIdx.y) * STEPS, t1 = t0 + STEPS < T ? t0 + STEPS : T;
    if (e >= E || t0 >= T) return;
    float w[K][V], b[V], x[K][V];
    load_weights(w, b, weight, bias, e);
    for (int k = 0; k < K - 1; k++) {
        for (int j = 0; j < V; j++) x[k][j] = 0;
        if (t0 > 0) unpack<V>(x[k], load_pack<V>(inp + (row + t0 + k + 1 - K) * E + e));
    }
    for (size_t t = t0; t < t1; t += G) {
        Pack<bf16, V> next[G];
        #pragma unroll
        for (int g = 0; g < G; g++)
            if (t + g < t1) next[g] = load_pack<V>(inp + (row + t + g) * E + e);
        #pragma unroll
        for (int g = 0; g < G; g++) {
            if (t + g >= t1) break;
            float c[V];
            unpack<V>(x[K - 1], next[g]);
            for (int j = 0; j < V; j++) {
                c[j] = b[j];
                for (int k = 0; k < K; k++) c[j] += w[k][j] * x[k][j];
                c[j] = silu_cuda(c[j]);
                for (int k = 0; k < K - 1; k++) x[k][j] = x[k + 1][j];
            }
            store_pack<V>(out + (row + t + g) * E + e, c);
        }
    }
}
static void forward3(void) {
    forward_kernel3<1><<<walk_grid(8), walk_block()>>>(out, inp, weight, bias, T, E);
}
static void forward4(void) {
    forward_kernel3<4><<<walk_grid(8), walk_block()>>>(out, inp, weight, bias, T, E);
}

// the last rung loads groups of 4 tokens as well, and the next ones while one is computed
static void forward_shipped(void) {
    causal_conv1d_forward_cuda<bf16>(out, NULL, inp, E, NULL, weight, bias, true, NULL, B, T, E, K, 0);
}

// --------------------------------------------------------------------------------------------------
// Backward
//   dc = dout * silu'(c)      dinp_s = sum_k w_k dc_{s+K-1-k}
//   dbias += sum_t dc_t       dw_k += sum_t dc_t inp_{t-K+1+k}

// v1: one thread per dinp. It needs dc of K tokens, and each of these needs K inputs again. The sums over
// tokens are atomic additions, K + 1 per element; they come in another order in every run.
__global__ void backward_kernel1(bf16* dinp, float* dweight, float* dbias, const bf16* dout, const bf16* inp,
                                 const float* weight, const float* bias, size_t n, size_t T, size_t E) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    size_t e = i % E, s = i / E % T;
    float dx = 0;
    for (int behind = 0; behind < K && s + behind < T; behind++) {     // token t = s + behind
        size_t t = s + behind, i_t = i + behind * E;
        float c = bias[e], x[K] = {0};
        for (int k = 0; k < K; k++) {
            if (t + k + 1 >= K) x[k] = to_float(inp[i_t - (K - 1 - k) * E]);
            c += weight[e * K + k] * x[k];
        }
        float dc = to_float(dout[i_t]) * silu_grad_cuda(c, sigmoid_cuda(c));
        dx += weight[e * K + K - 1 - behind] * dc;
        if (behind > 0) continue;
        atomicAdd(&dbias[e], dc);
        for (int k = 0; k < K; k++) atomicAdd(&dweight[e * K + k], dc * x[k]);
    }
    dinp[i] = from_float<bf16>(dx);
}
static void backward1(void) {
    backward_kernel1<<<blocks_of(B * T * E, 256), 256>>>(dinp, dweight, dbias, dout, inp, weight, bias,
                                                         B * T * E, T, E);
}

// v2 (V = 1): one thread walks through STEPS tokens. dc is computed once: it is added to the K gradients of
// inputs that are under way in registers, of which the oldest is then complete; the walk goes on for K-1
// tokens behind the own ones. The weight gradient grows in registers as well; of the atomic additions one in
// STEPS remains.
// v3 (V = 4): 4 channels per thread: 8 bytes per load and store. With 8 channels the sums, inputs, gradients
// and weights of all taps would not fit into the registers of a thread.
// v4 (PARTS): no atomic additions: the threads of a block that share channels add their sums in shared
// memory, each block writes its own row of `parts`, and a second kernel adds the rows in order. Same bits in
// every run, and faster.
// v5 (G = 4): the inputs of 4 tokens are loaded before the first is used.
template <int V, bool PARTS, int G>
__global__ void __launch_bounds__(WARP * ROWS)
backward_kernel2(bf16* dinp, float* dweight, float* dbias, float* parts, const bf16* dout, const bf16* inp,
                 const float* weight, const float* bias, size_t T, size_t E) {
    size_t e = ((size_t)blockIdx.x * WARP + threadIdx.x) * V, row = blockIdx.z * T;
    size_t t0 = ((size_t)blockIdx.y * ROWS + threadIdx.y) * STEPS, t1 = t0 + STEPS < T ? t0 + STEPS : T;
    float sum[K + 1][V] = {{0}};                                      // dw_k; the last row: dbias
    if (e < E && t0 < T) {
        float w[K][V], b[V], x[K][V], dx[K][V] = {{0}};
        load_weights(w, b, weight, bias, e);
        for (int k = 0; k < K - 1; k++) {
            for (int j = 0; j < V; j++) x[k][j] = 0;
            if (t0 > 0) unpack<V>(x[k], load_pack<V>(inp + (row + t0 + k + 1 - K) * E + e));
        }
        for (size_t t = t0; t < t1 + K - 1; t += G) {
            Pack<bf16, V> x_next[G], d_next[G];
            #pragma unroll
            for (int g = 0; g < G; g++) {
                if (t + g >= T) break;
                x_next[g] = load_pack<V>(inp + (row + t + g) * E + e);
                d_next[g] = load_pack<V>(dout + (row + t + g) * E + e);
            }
            #pragma unroll
            for (int g = 0; g < G; g++) {
                if (t + g >= t1 + K - 1) break;
                bool own = t + g < t1;
                float d[V] = {0};
                if (t + g < T) {
                    unpack<V>(x[K - 1], x_next[g]);
                    unpack<V>(d, d_next[g]);
                }
                for (int j = 0; j < V; j++) {
                    float c = b[j];
                    for (int k = 0; k < K; k++) c += w[k][j] * x[k][j];
                    d[j] *= silu_grad_cuda(c, sigmoid_cuda(c));
                    for (int k = 0; k < K; k++) {
                        dx[k][j] += w[k][j] * d[j];
                        if (own) sum[k][j] += d[j] * x[k][j];
                    }
                    if (own) sum[K][j] += d[j];
                }
                if (t + g >= t0 + K - 1) store_pack<V>(dinp + (row + t + g + 1 - K) * E + e, dx[0]);
                for (int j = 0; j < V; j++) {
                    for (int k = 0; k < K - 1; k++) {
                        x[k][j] = x[k + 1][j];
                        dx[k][j] = dx[k + 1][j];
                    }
                    dx[K - 1][j] = 0;
                }
            }
        }
    }
    if constexpr (PARTS) {
        __shared__ float shared[ROWS][K + 1][WARP * V];
        for (int k = 0; k <= K; k++) store_pack<V>(&shared[threadIdx.y][k][threadIdx.x * V], sum[k]);
        __syncthreads();
        float* part = parts + (blockIdx.z * gridDim.y + blockIdx.y) * (K + 1) * E;
        size_t e0 = (size_t)blockIdx.x * WARP * V;
        for (int i = (int)(threadIdx.y * WARP + threadIdx.x); i < (K + 1) * WARP * V; i += WARP * ROWS) {
            int k = i / (WARP * V), j = i % (WARP * V);
            if (e0 + j >= E) continue;
            float total = 0;
            for (int r = 0; r < ROWS; r++) total += shared[r][k][j];
            part[k < K ? (e0 + j) * K + k : K * E + e0 + j] = total;
        }
    } else {
        for (int j = 0; j < V && e < E; j++) {
            atomicAdd(&dbias[e + j], sum[K][j]);
            for (int k = 0; k < K; k++) atomicAdd(&dweight[(e + j) * K + k], sum[k][j]);
        }
    }
}
static void backward2(void) {
    backward_kernel2<1, false, 1><<<walk_grid(1), walk_block()>>>(dinp, dweight, dbias, NULL, dout, inp,
                                                                  weight, bias, T, E);
}
static void backward3(void) {
    backward_kernel2<4, false, 1><<<walk_grid(4), walk_block()>>>(dinp, dweight, dbias, NULL, dout, inp,
                                                                  weight, bias, T, E);
}
template <int G> static void backward_parts(void) {
    dim3 grid = walk_grid(4);
    backward_kernel2<4, true, G><<<grid, walk_block()>>>(dinp, NULL, NULL, scratch, dout, inp, weight, bias,
                                                         T, E);
    sum_parts_cuda(dweight, dbias, scratch, grid.y * grid.z, K * E, E, (K + 1) * E, 0);
}

static void backward_shipped(void) {
    causal_conv1d_backward_cuda<bf16>(dinp, E, dweight, dbias, NULL, dout, NULL, inp, E, NULL, weight, bias,
                                      true, NULL, scratch, B, T, E, K, 0);
}

// --------------------------------------------------------------------------------------------------

static const Rung forward_rungs[] = {
    {"one thread per output", forward1, 0},
    {"8 channels per thread: 16 bytes per load", forward2, 0},
    {"32 neighbouring tokens per thread: every input loaded once", forward3, 0},
    {"loads of 4 tokens at a time", forward4, 0},
    {"shipped", forward_shipped, 0},
};
static const Rung backward_rungs[] = {
    {"one thread per input, atomic weight gradient", backward1, 0},
    {"32 tokens per thread: every dc once, sums in registers", backward2, 0},
    {"4 channels per thread: 8 bytes per load", backward3, 0},
    {"partial sums of blocks, added in order", backward_parts<1>, 0},
    {"loads of 4 tokens at a time", backward_parts<4>, 0},
    {"shipped", backward_shipped, 0},
};

// the inputs of both directions; *x: what the CPU needs of them
typedef struct { std::vector<float> inp, dout, weight, bias; } Host;
static void setup_inputs(int which, Host* x) {
    B = which ? 8 : 3, T = which ? 2048 : 77, E = which ? 1536 : 200;
    inp = random_array<bf16>(B * T * E, 1, 0, &x->inp);
    weight = random_array<float>(E * K, 0.5, 0, &x->weight);
    bias = random_array<float>(E, 0.5, 0, &x->bias);
}

static void forward_setup(int which) {
    Host x;
    setup_inputs(which, &x);
    out = nan_array<bf16>(B * T * E);
    std::vector<float> want(B * T * E);
    causal_conv1d_forward(want.data(), NULL, x.inp.data(), E, NULL, x.weight.data(), x.bias.data(), true,
                          NULL, B, T, E, K);
    expect("out", out, want, 4e-3);
}

static void backward_setup(int which) {
    Host x;
    setup_inputs(which, &x);
    dout = random_array<bf16>(B * T * E, 1, 0, &x.dout);
    dinp = nan_array<bf16>(B * T * E);
    std::vector<float> want_dinp(B * T * E), want_dweight, want_dbias;
    dweight = random_array<float>(E * K, 1, 0, &want_dweight);
    dbias = random_array<float>(E, 1, 0, &want_dbias);
    std::vector<float> dweight_before = want_dweight, dbias_before = want_dbias;
    size_t parts = B * ((T + STEPS * ROWS - 1) / (STEPS * ROWS)) * (K + 1) * E;
    scratch = nan_array<float>(std::max(parts, causal_conv1d_scratch_cuda(B, T, E, K)));
    causal_conv1d_backward(want_dinp.data(), E, want_dweight.data(), want_dbias.data(), NULL, x.dout.data(),
                           NULL, x.inp.data(), E, NULL, x.weight.data(), x.bias.data(), true, NULL, B, T, E,
                           K);
    expect("dinp", dinp, want_dinp, 4e-3);
    expect("dweight", dweight, want_dweight, 2e-5, dweight_before);
    expect("dbias", dbias, want_dbias, 2e-5, dbias_before);
}

int main(int argc, char** argv) {
    const double elements = 8.0 * 2048 * 1536;
    const Ladder ladders[] = {
        {"causal_conv1d_forward", "B8 T2048 E1536 K4, bf16", forward_rungs, COUNT(forward_rungs),
         forward_setup, 4 * elements, 0, 0},
        {"causal_conv1d_backward", "B8 T2048 E1536 K4, bf16", backward_rungs, COUNT(backward_rungs),
         backward_setup, 6 * elements, 0, 0},
    };
    return ladder_main(argc, argv, ladders, COUNT(ladders));
}
