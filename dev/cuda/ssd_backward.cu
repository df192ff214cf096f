// The backward pass of SSD (Mamba-2).
//
// Formulas: section 4.12 of train_mamba.cu. Memory: x, dy, Bt, Ct read, dx, dBt, dCt written, 6 bytes per
// channel and 8 N per token, and the saved states: the floor below. What is in the way are the states. As a
// recurrence every token needs its own (P x N numbers per head); as products of matrices one per tile of 64
// tokens is enough, and the tensor core does the rest.
#include "ladder.h"

enum { P = 64, N = 128, G = 1, DIMS = 2 * N };
static const size_t TIMED[2][3] = {{8, 2048, 24}, {1, 2048, 24}};
static size_t B, T, H;
static bf16 *xbc, *dy, *y, *states, *dxbc;
static float *dt, *A_log, *Dskip, *ddt, *dA_log, *dDskip, *scratch, *forward_scratch;
static bf16* all_states;                                      // rung 1
static float* dBC;
static int* doc;

static size_t columns(void) { return H * P + DIMS; }

static SsdBackwardShape shape_of(void) {
    return {columns(), columns(), columns(), columns(), 2 * H, T, H, P, G, N, A_log, Dskip, false};
}
static SsdBackwardRound<bf16> whole(const SsdBackwardPlan& s) {
    bf16 *dBt = dxbc + H * P, *Bt = xbc + H * P;
    return {dxbc, dBt, dBt + N, ddt, scratch + s.sums, NULL, dy, states, xbc, Bt, Bt + N, dt, NULL, doc, B};
}

// ------------------------------------------------------------------------------------------------
// Rung 1: the recurrence. A warp owns one channel of one head, a lane four of its 128 states; every state is
// saved by a forward pass (6.4 GB), and all channels of all heads add to the same dBt and dCt, atomically.

// states h_t of all tokens (B,T,H,P,N), one thread each
__global__ void __launch_bounds__(256)
all_states_kernel(bf16* h, const bf16* x, const bf16* Bt, size_t ld, const float* dt, const float* A_log,
                  const int* doc, size_t T, size_t H) {
    const size_t i = (size_t)blockIdx.x * 256 + threadIdx.x, head = blockIdx.y, b = blockIdx.z;
    const float A2 = scan_decay(A_log[head]);
    float s = 0.0f;
    for (size_t t = 0; t < T; t++) {
        const size_t m = b * T + t;
        const float dt_t = dt[(b * H + head) * T + t];
        const float a = scan_resets_cuda(doc, b, t, T) ? 0.0f : exp2f(dt_t * A2);
        s = fmaf(dt_t * to_float(x[m * ld + head * P + i / N]), to_float(Bt[m * ld + i % N]), a * s);
        h[(m * H + head) * P * N + i] = from_float<bf16>(s);
    }
}

__global__ void __launch_bounds__(256)
row_kernel(bf16* dx, float* ddt, float* dA_log, float* dDskip, float* dBC, const bf16* h_all, const bf16* dy,
           const bf16* x, const bf16* Bt, const bf16* Ct, size_t ld, const float* dt, const float* A_log,
           const float* Dskip, const int* doc, size_t T, size_t H) {
    const int lane = threadIdx.x % WARP, n = 4 * lane;
    const size_t p = blockIdx.x * 8 + threadIdx.x / WARP, head = blockIdx.y, b = blockIdx.z;
    const float A2 = scan_decay(A_log[head]), A = A2 * SCAN_LN2, D = Dskip[head];
    float carry[4] = {}, h[4] = {}, dA = 0.0f, dD = 0.0f;
    for (size_t t = T; t-- > 0;) {
        const size_t m = b * T + t, e = head * P + p, at = ((m * H + head) * P + p) * N + n;
        const float dt_t = dt[(b * H + head) * T + t], x_t = to_float(x[m * ld + e]);
        const float dy_t = to_float(dy[m * H * P + e]);
        const float a = scan_resets_cuda(doc, b, t, T) ? 0.0f : exp2_unit(dt_t * A2);
        float B_t[4], C_t[4], before[4] = {}, q = 0.0f, r = 0.0f;
        unpack<4>(B_t, load_pack<4>(Bt + m * ld + n));
        unpack<4>(C_t, load_pack<4>(Ct + m * ld + n));
        if (t == T - 1) unpack<4>(h, load_pack<4>(h_all + at));
        if (t > 0) unpack<4>(before, load_pack<4>(h_all + at - H * P * N));
        for (int j = 0; j < 4; j++) {
            float lambda = fmaf(dy_t, C_t[j], carry[j]);
            q = fmaf(lambda, B_t[j], q);
            r = fmaf(lambda, before[j], r);
            atomicAdd(dBC + m * DIMS + n + j, lambda * dt_t * x_t);
            atomicAdd(dBC + m * DIMS + N + n + j, dy_t * h[j]);
            carry[j] = a * lambda;
            h[j] = before[j];
        }
        q = warp_sum(q);
        r = a * warp_sum(r);
        dA = fmaf(dt_t, r, dA);
        dD = fmaf(dy_t, x_t, dD);
        if (lane > 0) continue;
        dx[m * ld + e] = from_float<bf16>(fmaf(dt_t, q, D * dy_t));
        atomicAdd(ddt + (b * H + head) * T + t, fmaf(x_t, q, A * r));
    }
    if (lane > 0) return;
    atomicAdd(dA_log + head, A * dA);
    atomicAdd(dDskip + head, dD);
}

static void launch_rows(void) {
    const size_t M = B * T;
    bf16 *dBt = dxbc + H * P, *Bt = xbc + H * P;
    cudaCheck(cudaMemsetAsync(dBC, 0, M * DIMS * sizeof(float)));
    cudaCheck(cudaMemsetAsync(ddt, 0, M * H * sizeof(float)));
    row_kernel<<<dim3(P / 8, (unsigned)H, (unsigned)B), 256>>>(
        dxbc, ddt, dA_log, dDskip, dBC, all_states, dy, xbc, Bt, Bt + N, columns(), dt, A_log, Dskip, doc, T,
        H);
    cudaCheck(cudaGetLastError());
    ssd_sum_parts_kernel<bf16><<<(unsigned)((M * DIMS + 255) / 256), 256>>>(
        dBt, dBt + N, columns(), dBC, 1, 0, DIMS, DIMS, M, G, N);
    cudaCheck(cudaGetLastError());
}

// ------------------------------------------------------------------------------------------------
// The kernels of train_mamba.cu

static void launch_general(void) {
    SsdBackwardPlan s = ssd_backward_plan(false, B, T, H, P, G, N);
    for (size_t b = 0; b < B; b += s.round) {
        SsdBackwardRound<bf16> r = whole(s);
        const size_t m = b * T, ld = columns();
        r.dx += m * ld; r.dBt += m * ld; r.dCt += m * ld; r.x += m * ld; r.Bt += m * ld; r.Ct += m * ld;
        r.ddt += m * H; r.dt += m * H; r.dy += m * H * P; r.sums += b * s.tiles * 2 * H;
        r.states += b * s.saved * H * P * N;
        if (doc) r.doc += m;
        r.n = b + s.round < B ? s.round : B - b;
        ssd_backward_general(r, shape_of(), s, scratch, 0);
    }
    sum_parts_cuda(dA_log, dDskip, scratch + s.sums, B * s.tiles, H, H, 2 * H, 0);
}

static void launch_shipped(void) {
    bf16 *dBt = dxbc + H * P, *Bt = xbc + H * P;
    ssd_backward_cuda<bf16>(dxbc, columns(), ddt, dA_log, dBt, dBt + N, columns(), dDskip, (float*)NULL, dy,
                            (const float*)NULL, states, xbc, columns(), dt, A_log, Bt, Bt + N, columns(),
                            Dskip, false, doc, scratch, B, T, H, P, G, N, 0);
}

// ------------------------------------------------------------------------------------------------

// which 0: small and ragged, with documents. The timed one is one sequence, several times
static void setup_problem(const size_t* size, bool small, bool recurrence) {
    B = size[0]; T = size[1]; H = size[2];
    const size_t once = small ? B : 1, M = B * T, M1 = once * T, E = H * P, ld = columns();
    std::vector<float> h_xbc, h_dy, h_dt, h_A, h_D;
    xbc = repeated_array<bf16>(M * ld, M1 * ld, 1, 0, &h_xbc);
    dy = repeated_array<bf16>(M * E, M1 * E, 1, 0, &h_dy);
    random_array<float>(M1 * H, 1, -3, &h_dt);
    Dskip = random_array<float>(H, 1, 0, &h_D);
    random_array<float>(H, 0.2, 0, &h_A);
    for (size_t h = 0; h < H; h++) h_A[h] += (float)log((double)(h % 16 + 1));
    A_log = device_copy(h_A);
    std::vector<float> turned(M1 * H);                         // (B,H,T)
    for (size_t i = 0; i < M1 * H; i++) {
        h_dt[i] = log1pf(expf(h_dt[i]));
        turned[(i / H / T * H + i % H) * T + i / H % T] = h_dt[i];
    }
    dt = device_array<float>(M * H);
    fill_repeated(dt, M * H * sizeof(float), turned.data(), turned.size() * sizeof(float));
    std::vector<int> h_doc(M1, 0);
    for (size_t i = 0; i < M1; i++)
        h_doc[i] = i % T == 0 ? 0 : h_doc[i - 1] + (random_normal(7, 99, i) > 2);
    doc = small ? device_copy(h_doc) : NULL;
    const int* d = small ? h_doc.data() : NULL;
    y = nan_array<bf16>(M * E);
    states = nan_array<bf16>(ssd_saved_cuda(B, T, H, P, N));
    dxbc = nan_array<bf16>(M * ld);
    ddt = nan_array<float>(M * H);
    dA_log = nan_array<float>(H);
    dDskip = nan_array<float>(H);
    scratch = nan_array<float>(ssd_backward_scratch_cuda(B, T, H, P, G, N));
    forward_scratch = nan_array<float>(ssd_forward_scratch_cuda(B, T, H, P, G, N));
    ssd_forward_cuda<bf16>(y, states, (float*)NULL, xbc, ld, dt, A_log, xbc + E, xbc + E + N, ld, Dskip,
                           false, (const float*)NULL, doc, forward_scratch, B, T, H, P, G, N, 0);
    if (recurrence) {
        all_states = nan_array<bf16>(M * E * N);
        dBC = nan_array<float>(M * DIMS);
        all_states_kernel<<<dim3(P * N / 256, (unsigned)H, (unsigned)B), 256>>>(
            all_states, xbc, xbc + E, ld, dt, A_log, doc, T, H);
        cudaCheck(cudaGetLastError());
    }
    cudaCheck(cudaDeviceSynchronize());

    std::vector<float> want(M1 * ld, 0), want_dt(M1 * H, 0), want_A(H, 0), want_D(H, 0);
    const float* x = h_xbc.data();
    float* dx = want.data();
    if (small) {
        ssd_recurrent_backward(dx, ld, want_dt.data(), want_A.data(), dx + E, dx + E + N, ld, want_D.data(),
                               NULL, h_dy.data(), NULL, x, ld, h_dt.data(), h_A.data(), x + E, x + E + N, ld,
                               h_D.data(), false, NULL, d, once, T, H, P, G, N);
    } else {                                                   // the same in chunks, which is faster
        std::vector<float> hs(ssd_saved(once, T, H, P, N, 64)), v(M1 * E);
        std::vector<float> work(ssd_scratch(once, T, H, P, G, N, 64));
        ssd_forward(v.data(), hs.data(), NULL, x, ld, h_dt.data(), h_A.data(), x + E, x + E + N, ld,
                    h_D.data(), false, NULL, d, work.data(), once, T, H, P, G, N, 64);
        ssd_backward(dx, ld, want_dt.data(), want_A.data(), dx + E, dx + E + N, ld, want_D.data(), NULL,
                     h_dy.data(), NULL, hs.data(), x, ld, h_dt.data(), h_A.data(), x + E, x + E + N, ld,
                     h_D.data(), false, NULL, d, work.data(), once, T, H, P, G, N, 64);
    }
    for (size_t h = 0; h < H; h++) { want_A[h] *= (float)(B / once); want_D[h] *= (float)(B / once); }
    for (size_t i = 0; i < M1 * H; i++) turned[(i / H / T * H + i % H) * T + i / H % T] = want_dt[i];
    expect("dx, dBt, dCt", dxbc, want, 5e-3, std::vector<float>(), M * ld);
    expect("ddt", ddt, turned, 4e-3, std::vector<float>(), M * H);
    expect("dA_log", dA_log, want_A, 3e-3, std::vector<float>(H, 0));
    expect("dDskip", dDskip, want_D, 3e-3, std::vector<float>(H, 0));
}

static const size_t SMALL[2][3] = {{2, 333, 6}, {1, 1000, 24}};
static void setup_wide(int which) { setup_problem(which ? TIMED[0] : SMALL[0], which == 0, true); }
static void setup_one(int which) { setup_problem(which ? TIMED[1] : SMALL[1], which == 0, false); }

static const Rung wide[] = {
    {"recurrence: warp = channel, every h stored (6.4 GB), atomics", launch_rows, 0},
    {"tiles of 64 tokens, products in float (the general path)", launch_general, 0},
    {"shipped: tensor core, walks, block = tile, rows i and j apart", launch_shipped, 0},
};
static const Rung one[] = {
    {"shipped: walks in parts, heads in parts", launch_shipped, 0},
};

// read: x, dy, Bt, Ct, dt, saved states; written: dx, dBt, dCt, ddt
static double bytes_of(const size_t* size) {
    double M = (double)(size[0] * size[1]), E = (double)size[2] * P;
    return M * (6 * E + 4 * DIMS + 8 * (double)size[2] + 2 * E * N / SSD_SPACING);
}
// the products at the measured rate of the tensor core: per token and head 64 P (S and v, half of each tile)
// and 5 P N (H^T dy, Lambda^T x, Lambda Bt, and the steps of both walks)
static double flop_of(const size_t* size) {
    return 2.0 * (double)(size[0] * size[1] * size[2]) * (64 * P + 5 * P * N);
}

int main(int argc, char** argv) {
    const Ladder ladders[] = {
        {"ssd_backward", "B8 T2048 H24 P64 N128, bf16", wide, COUNT(wide), setup_wide, bytes_of(TIMED[0]),
         flop_of(TIMED[0]), bytes_of(TIMED[0]) / 4.3e12 * 1e3},
        {"ssd_backward", "B1 T2048 H24 P64 N128, bf16", one, COUNT(one), setup_one, bytes_of(TIMED[1]),
         flop_of(TIMED[1]), bytes_of(TIMED[1]) / 4.3e12 * 1e3},
    };
    return ladder_main(argc, argv, ladders, COUNT(ladders));
}
