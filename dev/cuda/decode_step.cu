// decode_step: one token of each of a few sequences through a whole mamba-130m, in several versions. The
// smallest number of bytes is that of the weights and the states; the rest is waiting.
//
//   v1  a kernel for each operation, as in a forward pass over one token: 7 per layer
//   v2  4 kernels per layer: norm + W_in + conv | W_x | W_dt + state + gate | W_out. A weight is used once per
//       sequence, so a matmul is nothing but reading: each block makes 16 outputs of all sequences, and its warps
//       share the sum over k, on the tensor core
//   v3  the same launches recorded as a CUDA graph: the processor no longer waits for the host
//   v4  shipped: the whole token is one kernel (section 4.10 of train_mamba.cu)
//
// build: make build/dev/decode_step
#define LADDER_MODEL
// defines: Ladder, ladder_main, and all of train_mamba.cu
#include "ladder.h"

// ------------------------------------------------------------------------------------------------
// v2: two kernels, one for all matmuls

enum { LINEAR_WARPS = 8 };

// Linear: out (rows,O) = input (rows,K) weight^T + bias
//   input: act (rows,K); or act NULL: RMSNorm of res_in + delta, which is stored in res_out (not res_in:
//   other blocks still read it). With conv_weight the first E outputs go through the causal convolution and
//   SiLU; conv_state (rows,taps-1,E) holds its last inputs.
typedef struct {
    const bf16* weight;                // (O,K)
    const float* bias;                 // (O) or NULL
    size_t O, K;
    int rows;
    const bf16* act;
    size_t ld_act;
    const float* res_in;               // (rows,K)
    const bf16* delta;                 // (rows,K) or NULL
    float* res_out;
    const float* norm;                 // (K)
    float eps;
    bf16* out;                         // (rows,O), row stride ldo; NULL: out_float
    float* out_float;
    size_t ldo;
    const float *conv_weight, *conv_bias;
    float* conv_state;
    int taps;
    size_t E;
} Linear;

// linear_kernel2: a block makes 16 outputs of all sequences, its eight warps share the sum over k: warp w
// takes the chunks w, w + 8, ... of 32. The tensor core multiplies weights (16 outputs x 16 k) with inputs
// (16 k x 8 sequences). The order of k within a chunk does not matter as long as both sides have the same, so lane
// (g, q) simply takes k = 8q..8q+7 of its row, 16 bytes, for two multiplications.
// TILES: groups of 8 sequences.   bytes: 2 per weight
template <int TILES, bool NORM>
__global__ void __launch_bounds__(LINEAR_WARPS * WARP)
linear_kernel2(const Linear a) {
    extern __shared__ __align__(128) char shared[];
    bf16* normalized = (bf16*)shared;                        // NORM: (8, K + 32)
    __shared__ float part[LINEAR_WARPS][TILES][4 * WARP], squares[LINEAR_WARPS][8];
    // AHEAD: chunks of weights in registers; with many sequences these are needed for the inputs
    const int AHEAD = TILES == 8 ? 3 : 6;
    const int lane = threadIdx.x % WARP, w = threadIdx.x / WARP, g = lane >> 2, q = lane & 3;
    const size_t o0 = (size_t)blockIdx.x * 16, K = a.K, ld_norm = K + 32;
    const int chunks = (int)(K / 32);
    size_t o_low = o0 + g < a.O ? o0 + g : a.O - 1, o_high = o0 + g + 8 < a.O ? o0 + g + 8 : a.O - 1;
    const bf16 *low = a.weight + o_low * K + 8 * q, *high = a.weight + o_high * K + 8 * q;
    uint4 w_low[AHEAD], w_high[AHEAD];
    #pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        int c = w + i * LINEAR_WARPS;
        if (c >= chunks) break;
        w_low[i] = __ldg((const uint4*)(low + 32 * c));
        w_high[i] = __ldg((const uint4*)(high + 32 * c));
    }
    if (NORM) {
        // every block does it again, for at most 8 rows; 1/rms is a factor of the whole row and comes last
        for (int n = 0; n < a.rows; n++) {
            float sum = 0;
            for (size_t k = 2 * threadIdx.x; k < K; k += 2 * LINEAR_WARPS * WARP) {
                float2 x = *(const float2*)(a.res_in + n * K + k), scale = *(const float2*)(a.norm + k);
                if (a.delta) {
                    Pack<bf16, 2> add = load_pack<2>(a.delta + n * K + k);
                    x.x += to_float(add.v[0]);
                    x.y += to_float(add.v[1]);
                }
                if (blockIdx.x == 0) *(float2*)(a.res_out + n * K + k) = x;
                sum += x.x * x.x + x.y * x.y;
                *(uint32_t*)(normalized + n * ld_norm + k) = scan_pack(x.x * scale.x, x.y * scale.y);
            }
            sum = warp_sum(sum);
            if (lane == 0) squares[w][n] = sum;
        }
        __syncthreads();
    }
    // the inputs of the sequence that this lane loads in each tile; beyond the last one the last again, what
    // comes of it is not stored
    const bf16* input[TILES];
    #pragma unroll
    for (int t = 0; t < TILES; t++) {
        int n = 8 * t + g < a.rows ? 8 * t + g : a.rows - 1;
        input[t] = (NORM ? normalized + n * ld_norm : a.act + n * a.ld_act) + 8 * q;
    }
    float acc[TILES][4] = {};
    uint4 v[TILES], v_next[TILES];
    #pragma unroll
    for (int t = 0; t < TILES; t++) if (w < chunks) v[t] = *(const uint4*)(input[t] + 32 * w);
    for (int c0 = w; c0 < chunks; c0 += AHEAD * LINEAR_WARPS) {
        #pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int c = c0 + i * LINEAR_WARPS, next = c + AHEAD * LINEAR_WARPS;
            if (c >= chunks) break;
            #pragma unroll
            for (int t = 0; t < TILES; t++)
                if (c + LINEAR_WARPS < chunks)
                    v_next[t] = *(const uint4*)(input[t] + 32 * (c + LINEAR_WARPS));
            const uint32_t first[4] = {w_low[i].x, w_high[i].x, w_low[i].y, w_high[i].y},
                           second[4] = {w_low[i].z, w_high[i].z, w_low[i].w, w_high[i].w};
            #pragma unroll
            for (int t = 0; t < TILES; t++) {
                scan_mma_bf16(acc[t], first, v[t].x, v[t].y);
                scan_mma_bf16(acc[t], second, v[t].z, v[t].w);
                v[t] = v_next[t];
            }
            if (next < chunks) {
                w_low[i] = __ldg((const uint4*)(low + 32 * next));
                w_high[i] = __ldg((const uint4*)(high + 32 * next));
            }
        }
    }
    #pragma unroll
    for (int t = 0; t < TILES; t++) *(float4*)&part[w][t][4 * lane] = *(const float4*)acc[t];
    __syncthreads();
    for (int v = threadIdx.x; v < TILES * 128; v += LINEAR_WARPS * WARP) {
        // value j of lane (g, q) is output g + 8 (j / 2), sequence 2q + j % 2
        int t = v / 128, source = v % 128 / 4, j = v % 4;
        size_t o = o0 + (source >> 2) + 8 * (j >> 1);
        int n = 8 * t + 2 * (source & 3) + (j & 1);
        if (o >= a.O || n >= a.rows) continue;
        float sum = 0;
        #pragma unroll
        for (int i = 0; i < LINEAR_WARPS; i++) sum += part[i][t][v % 128];
        if (NORM) {
            float square = 0;
            #pragma unroll
            for (int i = 0; i < LINEAR_WARPS; i++) square += squares[i][n];
            sum *= 1.0f / sqrtf(square / (float)K + a.eps);
        }
        if (a.bias) sum += a.bias[o];
        if (!a.out) {
            a.out_float[n * a.ldo + o] = sum;
            continue;
        }
        if (a.conv_weight && o < a.E) {                      // as causal_conv1d_forward, with T = 1
            float x = to_float(from_float<bf16>(sum)), c = a.conv_bias ? a.conv_bias[o] : 0.0f;
            float* tail = a.conv_state + (size_t)n * (a.taps - 1) * a.E + o;
            for (int k = 0; k + 1 < a.taps; k++) {
                c += a.conv_weight[o * a.taps + k] * tail[k * a.E];
                tail[k * a.E] = k + 2 < a.taps ? tail[(k + 1) * a.E] : x;
            }
            sum = silu_cuda(c + a.conv_weight[o * a.taps + a.taps - 1] * x);
        }
        a.out[n * a.ldo + o] = from_float<bf16>(sum);
    }
}

static void linear2(const Linear& a, cudaStream_t stream) {
    unsigned blocks = (unsigned)((a.O + 15) / 16), threads = LINEAR_WARPS * WARP;
    if (!a.act) {
        size_t shared = 8 * (a.K + 32) * sizeof(bf16);
        scan_allow_shared(linear_kernel2<1, true>, shared);
        linear_kernel2<1, true><<<blocks, threads, shared, stream>>>(a);
    } else if (a.rows <= 8) linear_kernel2<1, false><<<blocks, threads, 0, stream>>>(a);
    else if (a.rows <= 16) linear_kernel2<2, false><<<blocks, threads, 0, stream>>>(a);
    else if (a.rows <= 32) linear_kernel2<4, false><<<blocks, threads, 0, stream>>>(a);
    else linear_kernel2<8, false><<<blocks, threads, 0, stream>>>(a);
    cudaCheck(cudaGetLastError());
}

// scan_kernel2: dt = softplus(W_dt r + b), then one step of the recurrence, skip and gate (formulas (F4) to
// (F8) of 4.9).   y (rows,E)   x, z (rows,E), row stride ldz   rbc (rows,R+2N)   h (rows,E,N)
// Four lanes share a channel; a block has 32 channels of `each` sequences, one after the other.
// bytes: 2 per weight, 8 per state
__global__ void __launch_bounds__(4 * WARP)
scan_kernel2(bf16* y, float* h, const bf16* x, const bf16* rbc, const bf16* dt_weight,
                   const float* dt_bias, const float* A_log, const float* Dskip, const bf16* z, size_t ldz,
                   int rows, int each, size_t E, int N, int R) {
    extern __shared__ __align__(128) char shared[];
    bf16* weight = (bf16*)shared;                            // (32,R)
    float* rbc_n = (float*)(weight + WARP * R);              // (each,R+2N)
    const int l = threadIdx.x % 4, c = threadIdx.x / 4, n0 = blockIdx.y * each;
    const int n1 = n0 + each < rows ? n0 + each : rows, RBC = R + 2 * N;
    const size_t e0 = (size_t)blockIdx.x * WARP, e = e0 + c;
    // E is a multiple of 32: the rows of W_dt of this block are one aligned piece
    for (int i = threadIdx.x; i < WARP * R / 8; i += 4 * WARP)
        ((uint4*)weight)[i] = __ldg((const uint4*)(dt_weight + e0 * R) + i);
    float bias = dt_bias[e], D = Dskip[e], decay[4], state[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) {                            // the states were written one token ago
        decay[i] = 4 * l + i < N ? scan_decay(A_log[e * N + 4 * l + i]) : -1.0f;
        state[i] = 4 * l + i < N ? h[(n0 * E + e) * N + 4 * l + i] : 0.0f;
    }
    for (int i = threadIdx.x; i < (n1 - n0) * RBC; i += 4 * WARP)
        rbc_n[i] = to_float(rbc[(size_t)n0 * RBC + i]);
    __syncthreads();
    for (int n = n0; n < n1; n++, rbc_n += RBC) {
        float dt = 0, sum = 0, x_e = to_float(x[n * ldz + e]);
        float* h_e = h + (n * E + e) * N;
        for (int i = l; i < R; i += 4) dt += to_float(weight[c * R + i]) * rbc_n[i];
        dt += __shfl_xor_sync(0xffffffffu, dt, 1);
        dt += __shfl_xor_sync(0xffffffffu, dt, 2);
        dt = scan_softplus(dt + bias);
        const float *B_n = rbc_n + R, *C_n = B_n + N;
        for (int first = 4 * l; first < N; first += 16) {
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                int s = first + i;
                if (s >= N) continue;
                float before = first < 16 ? state[i] : h_e[s];
                float rate = first < 16 ? decay[i] : scan_decay(A_log[e * N + s]);
                float after = fmaf(exp2_unit(dt * rate), before, dt * x_e * B_n[s]);
                h_e[s] = after;
                sum = fmaf(C_n[s], after, sum);
            }
        }
        #pragma unroll
        for (int i = 0; i < 4; i++) state[i] = n + 1 < n1 && 4 * l + i < N ? h_e[E * N + 4 * l + i] : 0.0f;
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (l == 0) y[n * E + e] = from_float<bf16>(fmaf(D, x_e, sum) * silu_cuda(to_float(z[n * ldz + e])));
    }
}

static void scan2(bf16* y, float* h, const bf16* x, const bf16* rbc, const bf16* dt_weight,
                             const float* dt_bias, const float* A_log, const float* Dskip, const bf16* z,
                             size_t ldz, size_t rows, size_t E, size_t N, size_t R, cudaStream_t stream) {
    size_t each = rows > 16 ? 8 : 1, shared = each * (R + 2 * N) * sizeof(float) + WARP * R * sizeof(bf16);
    scan_allow_shared(scan_kernel2, shared);
    dim3 grid((unsigned)(E / WARP), (unsigned)((rows + each - 1) / each));
    scan_kernel2<<<grid, 4 * WARP, shared, stream>>>(y, h, x, rbc, dt_weight, dt_bias, A_log, Dskip, z,
                                                           ldz, (int)rows, (int)each, E, (int)N, (int)R);
    cudaCheck(cudaGetLastError());
}

// ------------------------------------------------------------------------------------------------
// Launchers

static Model model;
static Backend backend;
static Session session;
static std::vector<int> tokens;
static cudaGraphExec_t recorded;

static CudaSession<bf16>* opened(void) { return (CudaSession<bf16>*)session.device; }
static const ModelCuda<bf16>* weights(void) { return &cuda_of<bf16>(&backend)->model; }

static CudaRun<bf16> run_on(cudaStream_t stream) {
    CudaRun<bf16> run = run_of<bf16>(&backend, -1, NULL, session.rows, 1, RECOMPUTE_NONE);
    run.stream = stream;
    return run;
}

static void launch1(void) {
    CudaSession<bf16>* d = opened();
    WorkCuda<bf16>* w = &d->work;
    CudaRun<bf16> run = run_on(0);
    size_t D = (size_t)model.config.d_model, Vp = (size_t)model.config.vocab_padded;
    model_forward_cuda(&model, weights(), w, &run, w->batch.tokens, d->state, d->state, session.rows, 0);
    matmul_forward_cuda(run.matmul, w->logits, Vp, w->f, D, weights()->head_x, (const float*)NULL, session.rows, D,
                        Vp, run.stream);
    cast_cuda(d->logits, w->logits, session.rows * Vp, run.stream);
}

// norm, then the first matmul of a block: up to 8 sequences in one kernel
static void first_linear2(const CudaRun<bf16>* run, Linear a, const ActsCuda<bf16>* acts, float* res_out,
                          const float* res_in, const bf16* delta_in, const float* norm) {
    size_t D = (size_t)run->config->d_model;
    a.K = D;
    a.rows = (int)run->B;
    if (run->B <= 8) {
        a.res_in = res_in; a.delta = delta_in; a.res_out = res_out; a.norm = norm;
        a.eps = (float)run->config->norm_eps;
    } else {
        residual_rmsnorm_forward_cuda(res_out, acts->u, acts->rstd, res_in, delta_in, norm, run->B, D,
                                      (float)run->config->norm_eps, run->stream);
        a.act = acts->u; a.ld_act = D;
    }
    linear2(a, run->stream);
}

static void layer2(const CudaRun<bf16>* run, const LayerCuda<bf16>* L, const ActsCuda<bf16>* acts, bf16* delta,
                   float* res_out, const float* res_in, const bf16* delta_in, float* const* state) {
    const Mamba1Params* p = (const Mamba1Params*)L->p;
    const Mamba1ActsCuda<bf16>* a = (const Mamba1ActsCuda<bf16>*)acts->field;
    const Mamba1ScratchCuda<bf16>* w = (const Mamba1ScratchCuda<bf16>*)acts->scratch;
    const Mamba1State* s = (const Mamba1State*)state;
    const Config* c = run->config;
    size_t D = (size_t)c->d_model, E = (size_t)c->d_inner, N = (size_t)c->d_state, R = (size_t)c->dt_rank;
    Linear in = {}, x_proj = {}, out = {};
    in.weight = weight_x(L, p->in_proj); in.bias = p->in_proj_bias; in.O = 2 * E;
    in.out = a->xz; in.ldo = 2 * E;
    in.conv_weight = p->conv1d; in.conv_bias = p->conv1d_bias; in.conv_state = s->conv;
    in.taps = (int)c->d_conv; in.E = E;
    first_linear2(run, in, acts, res_out, res_in, delta_in, p->norm);
    x_proj.weight = weight_x(L, p->x_proj); x_proj.O = R + 2 * N; x_proj.K = E; x_proj.rows = (int)run->B;
    x_proj.act = a->xz; x_proj.ld_act = 2 * E; x_proj.out = a->rbc; x_proj.ldo = R + 2 * N;
    linear2(x_proj, run->stream);
    scan2(w->y, s->ssm, a->xz, a->rbc, weight_x(L, p->dt_proj), p->dt_proj_bias, p->A_log, p->D, a->xz + E, 2 * E,
          run->B, E, N, R, run->stream);
    out.weight = weight_x(L, p->out_proj); out.bias = p->out_proj_bias; out.O = D; out.K = E;
    out.rows = (int)run->B; out.act = w->y; out.ld_act = E; out.out = delta; out.ldo = D;
    linear2(out, run->stream);
}

static void launch2_on(cudaStream_t stream) {
    CudaSession<bf16>* d = opened();
    WorkCuda<bf16>* w = &d->work;
    CudaRun<bf16> run = run_on(stream);
    size_t D = (size_t)model.config.d_model, Vp = (size_t)model.config.vocab_padded;
    float* res[2] = {w->acts[0].res, w->res_last};           // in turn
    const bf16* delta = NULL;
    embedding_forward_cuda(res[0], w->batch.tokens, weights()->embedding_x, run.B, D, stream, run.dropout);
    for (int l = 0; l < model.n_layers; l++) {
        float* fields[MAX_FIELDS];
        state_fields<bf16>(fields, &model, d->state, session.rows, l, 0);
        layer2(&run, &weights()->layer[l], &w->acts[l], w->scratch.delta, res[1 - l % 2], res[l % 2], delta,
               fields);
        delta = w->scratch.delta;
    }
    float* last = res[model.n_layers % 2];
    residual_rmsnorm_forward_cuda(last, w->f, w->f_rstd, last, delta, weights()->norm_f, run.B, D,
                                  (float)model.config.norm_eps, stream);
    Linear head = {};
    head.weight = weights()->head_x; head.O = Vp; head.K = D; head.rows = (int)run.B;
    head.act = w->f; head.ld_act = D; head.out_float = d->logits; head.ldo = Vp;
    linear2(head, stream);
}
static void launch2(void) { launch2_on(0); }

static void launch3(void) {
    cudaStream_t stream = cuda_of<bf16>(&backend)->stream;
    if (!recorded) recorded = graph_record(stream, [&] { launch2_on(stream); });
    cudaCheck(cudaGraphLaunch(recorded, 0));
}

static void shipped(void) { decode_cuda(&opened()->plan, tokens.data(), opened()->logits, NULL, 0); }

static const Rung rungs[] = {
    {"a kernel for each operation", launch1, 0},
    {"4 kernels per layer", launch2, 0},
    {"the same as a CUDA graph", launch3, 0},
    {"shipped: one kernel, weights on their way across all waits", shipped, 0},
};

// ------------------------------------------------------------------------------------------------
// The problem

static void close_model(void) {
    if (!model.params) return;
    if (recorded) cudaCheck(cudaGraphExecDestroy(recorded));
    recorded = NULL;
    session_free(&backend, &session);
    backend.destroy(&backend);
    model_free(&model);
}

static Config config_of(int n, const char* const* args) {
    Settings s;
    Error err;
    memset(&s, 0, sizeof s);
    if (!settings_parse(&s, WORD_TRAIN, n, (char**)args, &err)) die("%s", err.text);
    Config c = config_from_options(&s, 50277, 0);
    settings_free(&s);
    return c;
}
static const char* const timed[] = {"--preset", "mamba-130m"};
static const char* const small[] = {"--n-layer", "3",    "--d-model", "96", "--d-state",    "5",
                                    "--dt-rank", "24",   "--d-conv",  "3",  "--vocab-size", "500"};

static void setup_rows(int which, size_t rows) {
    close_model();
    Config c = which ? config_of(COUNT(timed), timed) : config_of(COUNT(small), small);
    model_describe(&model, &c);
    model_alloc(&model, false);
    model_init(&model, 1);
    for (int i = 0; i < model.n_tensors; i++) {              // what bf16 rounds is not an error of the kernels
        float* p = model.params + model.tensor[i].offset;
        for (size_t j = 0; model.tensor[i].ndim == 2 && j < model.tensor[i].count; j++)
            p[j] = host_float(__float2bfloat16_rn(p[j]));
    }
    backend = backend_cuda_of<bf16>(&model, 0, 0, false, RECOMPUTE_NONE);
    backend.upload(&backend);
    session = session_create(&backend, rows, 1);
    if (!session_planned(&backend, &session, opened())) die("these sizes do not fit decode_kernel");
    tokens.resize(rows);
    for (size_t r = 0; r < rows; r++) tokens[r] = (int)(random_bits(7, 1, r) % (uint64_t)c.vocab_size);
    cudaCheck(cudaMemcpy(opened()->work.batch.tokens, tokens.data(), rows * sizeof(int), cudaMemcpyHostToDevice));

    Backend cpu = backend_cpu(&model, 0, 0, false, RECOMPUTE_NONE);
    Session s = session_create(&cpu, rows, 1);
    size_t n = s.state.n_elements;
    for (size_t i = 0; i < n; i++) s.state.data[i] = (float)(0.3 * random_normal(7, 2, i));
    std::vector<float> before(s.state.data, s.state.data + n), logits(rows * (size_t)c.vocab_padded);
    cpu.decode(&cpu, &s, 0, rows, tokens.data(), 1, logits.data());
    expect("logits", opened()->logits, logits, 2e-2);
    expect("states", opened()->state, std::vector<float>(s.state.data, s.state.data + n), 2e-2, before);
    session_free(&cpu, &s);
    cpu.destroy(&cpu);
}
static void setup_one(int which) { setup_rows(which, which ? 1 : 3); }
static void setup_many(int which) { setup_rows(which, which ? 64 : 37); }

// bytes: every weight, every state in and out, the logits
static double bytes_of(size_t rows) {
    Model m;
    Config c = config_of(COUNT(timed), timed);
    model_describe(&m, &c);
    double bytes = 2.0 * (double)m.n_params + 8.0 * (double)(rows * state_count(&m)) +
                   4.0 * (double)(rows * (size_t)c.vocab_padded);
    model_free(&m);
    return bytes;
}

int main(int argc, char** argv) {
    const Ladder ladders[] = {
        {"decode_step", "mamba-130m, 1 sequence, bf16", rungs, COUNT(rungs), setup_one, bytes_of(1), 0, 0},
        {"decode_step", "mamba-130m, 64 sequences, bf16", rungs, COUNT(rungs), setup_many, bytes_of(64), 0, 0},
    };
    return ladder_main(argc, argv, ladders, COUNT(ladders));
}
