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
        float dt = p.dt[(b * p.H + h) * p.T + t], a = expf(dt * A), x_t = to_float(p.x[row * p.ldx + h * P + c]);
        float y_t = p.Dskip[h] * x_t;
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

typedef struct { float *cs, *cb, *state; } Between;     // cs (B,H,T)  cb (B,chunks,Q,Q)  state (B,chunks,H,P,N)
static Between between;

__global__ void cs_kernel(Ssd p, Between m) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, chunks = (p.T + Q - 1) / Q, bh = i / chunks, c = i % chunks;
    if (bh >= p.B * p.H) return;
    float A = -expf(p.A_log[bh % p.H]), sum = 0;
    for (size_t t = c * Q; t < (c + 1) * Q && t < p.T; t++) m.cs[bh * p.T + t] = sum += A * p.dt[bh * p.T + t];
}
__global__ void cb_kernel2(Ssd p, Between m) {
    size_t chunks = (p.T + Q - 1) / Q, b = blockIdx.x / chunks, t0 = blockIdx.x % chunks * Q;
    for (size_t e = threadIdx.x; e < Q * Q; e += blockDim.x) {
        size_t i = t0 + e / Q, j = t0 + e % Q;
        float sum = 0;
        for (int n = 0; n < N && j <= i && i < p.T; n++)
            sum += to_float(p.Ct[(b * p.T + i) * p.ldbc + n]) * to_float(p.Bt[(b * p.T + j) * p.ldbc + n]);
        m.cb[blockIdx.x * Q * Q + e] = sum;
    }
}
__global__ void states_kernel2(Ssd p, Between m) {
    size_t chunks = (p.T + Q - 1) / Q, h = blockIdx.x % p.H, c = blockIdx.x / p.H % chunks, b = blockIdx.x / p.H / chunks;
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
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, size = P * N, b = i / (p.H * size), h = i / size % p.H;
    size_t chunks = (p.T + Q - 1) / Q;
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
    size_t chunks = (p.T + Q - 1) / Q, h = blockIdx.x % p.H, c = blockIdx.x / p.H % chunks, b = blockIdx.x / p.H / chunks;
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
        p.y[(b * p.T + i) * p.H * P + h * P + col] = from_float<bf16>(sum + expf(cs[i]) * old + p.Dskip[h] * x_i);
    }
}
