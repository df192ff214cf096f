// The ladder of embedding_backward: dweight[v,:] += sum of dres[m,:] over the positions m with tokens[m] = v.
//   v1  one block per position adds its row to dweight, atomically: the order of the additions, and so the
//       last bits, change from run to run, and the rows of a frequent token wait for each other
//   v2  positions sorted by token; one block per run of equal tokens adds it up in order. A frequent token is
//       the work of one block
//   v3  the shipped one: the sorted positions are cut into pieces of equal length, one block each
// Two kinds of text: all tokens equally likely, and token v with probability near 1 / v (Zipf), as words are.
#include "ladder.h"

enum { M_TIMED = 16384, D_TIMED = 768, V_TIMED = 50280 };
static float *dweight, *dres;
static int *tokens_d, *scratch;
static size_t M, D, V;

// v1
__global__ void embedding_backward_kernel1(float* dweight, const float* dres, const int* tokens, size_t D) {
    float* to = dweight + (size_t)tokens[blockIdx.x] * D;
    for (size_t d = threadIdx.x; d < D; d += blockDim.x) atomicAdd(to + d, dres[blockIdx.x * D + d]);
}
static void launch1(void) {
    embedding_backward_kernel1<<<(unsigned)M, 256>>>(dweight, dres, tokens_d, D);
}

// v2: block p acts when a run begins at sorted position p
__global__ void embedding_backward_kernel2(float* dweight, const float* dres, const int* keys,
                                           const int* order, size_t M, size_t D) {
    size_t p0 = blockIdx.x;
    int token = keys[p0];
    if (p0 > 0 && keys[p0 - 1] == token) return;
    for (size_t d = threadIdx.x; d < D; d += blockDim.x) {
        float acc = dweight[(size_t)token * D + d];
        for (size_t p = p0; p < M && keys[p] == token; p++) acc += dres[(size_t)order[p] * D + d];
        dweight[(size_t)token * D + d] = acc;
    }
}
static void launch2(void) {
    const int *keys, *order;
    embedding_sort_cuda(&keys, &order, tokens_d, scratch, M, V, 0);
    embedding_backward_kernel2<<<(unsigned)M, 256>>>(dweight, dres, keys, order, M, D);
}

// v3
static void launch3(void) { embedding_backward_cuda(dweight, dres, tokens_d, scratch, M, D, V, 0); }

static const Rung rungs[] = {
    {"one block per position, atomic additions", launch1, 0},
    {"sorted by token, one block per run of equal tokens", launch2, 0},
    {"shipped: sorted by token, pieces of equal length", launch3, 0},
};

static void setup_tokens(int which, bool zipf) {
    M = which ? M_TIMED : 700;
    D = which ? D_TIMED : 37;
    V = which ? V_TIMED : 300;
    std::vector<int> tokens(M);
    for (size_t m = 0; m < M; m++) {
        double u = random_uniform(7, 99, m);
        tokens[m] = (int)(zipf ? pow((double)V, u) : u * (double)V);
        tokens[m] -= zipf;
    }
    std::vector<float> host, want;
    dres = random_array<float>(M * D, 1, 0, &host);
    tokens_d = device_copy(tokens);
    scratch = device_array<int>(embedding_backward_scratch_cuda(M, D));
    dweight = device_array<float>(V * D);
    want.assign(V * D, 1.0f);
    embedding_backward(want.data(), host.data(), tokens.data(), M, D);
    expect("dweight", dweight, want, 1e-6, std::vector<float>(1, 1.0f));
}
static void setup_uniform(int which) { setup_tokens(which, false); }
static void setup_zipf(int which) { setup_tokens(which, true); }

// bytes: dres once, and the row of every distinct token read and written
static double bytes(bool zipf) {
    double rows = 0;                                 // expected number of distinct tokens
    for (int v = 0; v < V_TIMED; v++) {
        double p = zipf ? log((v + 2.0) / (v + 1.0)) / log((double)V_TIMED) : 1.0 / V_TIMED;
        rows += 1 - pow(1 - p, M_TIMED);
    }
    return 4.0 * D_TIMED * (M_TIMED + 2 * rows);
}

int main(int argc, char** argv) {
    const Ladder ladders[] = {
        {"embedding_backward", "M16384 D768 V50280, fp32, uniform tokens", rungs, COUNT(rungs), setup_uniform,
         bytes(false), 0, 0},
        {"embedding_backward", "M16384 D768 V50280, fp32, Zipf tokens", rungs, COUNT(rungs), setup_zipf,
         bytes(true), 0, 0}};
    return ladder_main(argc, argv, ladders, COUNT(ladders));
}
