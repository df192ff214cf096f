// A whole layer of each kind, as a training step runs it: addition and RMSNorm, then the mixer with its
// projections. Forward is D numbers of the residual stream per token to the mixer's output; backward is the
// gradient of that output to those of the layer's input and of its parameters.
//
//   v1  one kernel after the other
//   v2  shipped: weight gradients and small kernels on a second stream, beside those that only move memory
//
// The floor is that of the matmuls alone, at 800 TFLOP/s (798 is what matmul.cu measured on an H200).
//
// build: make build/dev/layer
#define LADDER_MODEL
// defines: Ladder, ladder_main, and all of train_mamba.cu
#include "ladder.h"

static Model model;
static Backend backend;
static float* res_in;
static bf16* delta_in;
static size_t B, T;

static CudaBackend<bf16>* cuda(void) { return cuda_of<bf16>(&backend); }

// launch_layer: on the stream of the backend, which goes on behind stream 0, the one that is timed; stream 0
// then waits for it
template <typename Launch> static void launch_layer(bool second_stream, Launch launch) {
    static cudaEvent_t begin, end;
    if (!begin) {
        cudaCheck(cudaEventCreateWithFlags(&begin, cudaEventDisableTiming));
        cudaCheck(cudaEventCreateWithFlags(&end, cudaEventDisableTiming));
    }
    CudaRun<bf16> run = run_of<bf16>(&backend, -1, NULL, B, T, RECOMPUTE_NONE);
    SideCuda one = cuda()->side;
    one.stream = NULL;
    if (!second_stream) run.side = &one;
    run.dropout.place = 1;                             // there is a layer before this one
    run.add = false;
    cudaCheck(cudaEventRecord(begin, 0));
    cudaCheck(cudaStreamWaitEvent(run.stream, begin, 0));
    const LayerCuda<bf16>* L = &cuda()->model.layer[0];
    WorkCuda<bf16>* w = &cuda()->work;
    SumsCuda sums = {{}, w->scratch.sums};
    run.sums = &sums;
    float* none[MAX_FIELDS] = {NULL};
    launch(&run, L, &w->acts[0], &w->scratch, none);
    side_join(&run);
    cudaCheck(cudaEventRecord(end, run.stream));
    cudaCheck(cudaStreamWaitEvent(0, end, 0));
}
typedef const CudaRun<bf16>* RunOf;
typedef const LayerCuda<bf16>* LayerOf;
typedef const ActsCuda<bf16>* ActsOf;
typedef const ScratchCuda<bf16>* ScratchOf;

static void forward(RunOf run, LayerOf L, ActsOf acts, ScratchOf s, float** none) {
    L->kind->forward(run, L, acts, s, res_in, delta_in, none, none);
}
static void backward(RunOf run, LayerOf L, ActsOf acts, ScratchOf s, float** none) {
    L->kind->backward(run, L, acts, s, none);
}
static void forward1(void) { launch_layer(false, forward); }
static void forward2(void) { launch_layer(true, forward); }
static void backward1(void) { launch_layer(false, backward); }
static void backward2(void) { launch_layer(true, backward); }

static const Rung forward_rungs[] = {
    {"one kernel after the other", forward1, 0},
    {"shipped: small kernels, where there are any, on a second stream", forward2, 0},
};
static const Rung backward_rungs[] = {
    {"one kernel after the other", backward1, 0},
    {"shipped: weight gradients, small kernels on a second stream", backward2, 0},
};

// ------------------------------------------------------------------------------------------------
// The problem

static void close_model(void) {
    if (!model.params) return;
    backend.destroy(&backend);
    model_free(&model);
}

static Config config_of(const char* pattern, int which) {
    const char* const timed[] = {"--n-layer", "1", "--d-model", "768", "--vocab-size", "64", "--pattern"};
    const char* const small[] = {"--n-layer", "1", "--d-model", "64", "--vocab-size", "64", "--pattern"};
    const char* args[8];
    memcpy(args, which ? timed : small, sizeof timed);
    args[7] = pattern;
    return config_of(8, args);
}

// All rows of a batch are the same one: the CPU computes it once, and the gradients of parameters are B times
// those of the row.
static void setup_kind(const char* pattern, int which, bool backward) {
    close_model();
    B = which ? 8 : 3;
    T = which ? 2048 : 133;
    Config c = config_of(pattern, which);
    const size_t D = (size_t)c.d_model, M = B * T, row = T * D;
    random_model(&model, &c, true);
    std::vector<float> res, delta, dres(row);
    res_in = repeated_array<float>(M * D, row, 1, 0, &res);
    delta_in = repeated_array<bf16>(M * D, row, 0.3, 0, &delta);
    for (size_t i = 0; i < row; i++) dres[i] = host_float(__float2bfloat16_rn((float)random_normal(7, 3, i)));

    Backend cpu = backend_cpu(&model, 1, T, true, RECOMPUTE_NONE);
    Workspace* w = &cpu.work;
    State none = state_none(&model);
    Run run = {&c, 1, T, NULL, RECOMPUTE_NONE, w->dropout, model.half};
    for (size_t i = 0; i < row; i++) w->res[0][i] = res[i] + delta[i];
    const std::vector<float> between(w->res[0], w->res[0] + row);
    layer_forward(&model, w, &run, 0, &none, &none);
    std::vector<float> out(row);
    for (size_t i = 0; i < row; i++) out[i] = w->res[1][i] - between[i];

    backend = backend_cuda_of<bf16>(&model, B, T, true, RECOMPUTE_NONE);
    backend.upload(&backend);
    WorkCuda<bf16>* work = &cuda()->work;
    if (!backward) {
        expect("res", work->acts[0].res, between, 1e-6, std::vector<float>(), M * D);
        expect("output", work->scratch.delta, out, 2e-2, std::vector<float>(), M * D);
    } else {
        const Layer* layer = &model.layer[0];
        memcpy(w->dres, dres.data(), row * sizeof(float));
        layer->kind->backward(&run, w->dres, w->res[0], layer->grads, layer->params, w->acts[0],
                              w->scratch[layer->kind - kinds], none.field[0], none.field[0], none.field[0]);
        forward2();
        cudaCheck(cudaDeviceSynchronize());
        expect("dres", work->scratch.dres, std::vector<float>(w->dres, w->dres + row), 2e-2, dres, M * D);
        expect("dres_x", work->scratch.dres_x, std::vector<float>(w->dres, w->dres + row), 2e-2, dres, M * D);
        for (int i = 0; i < model.n_tensors; i++) {
            const Tensor* t = &model.tensor[i];
            if (strncmp(t->name, "backbone.layers.", 16)) continue;
            std::vector<float> want(model.grads + t->offset, model.grads + t->offset + t->count);
            for (float& g : want) g *= (float)B;
            expect(t->name, cuda()->model.grads + t->offset, want, 3e-2, std::vector<float>(t->count, 0.0f));
        }
    }
    state_free(&none);
    cpu.destroy(&cpu);
}

// flop of the matmuls of a layer for 8 x 2048 tokens; backward has each twice
static double flop_of(const char* pattern) {
    Model m;
    Config c = config_of(pattern, 1);
    double weights = 0;
    model_describe(&m, &c);
    for (int i = 0; i < m.n_tensors; i++)
        if (strstr(m.tensor[i].name, "proj") && m.tensor[i].ndim == 2) weights += (double)m.tensor[i].count;
    model_free(&m);
    return 2.0 * 8 * 2048 * weights;
}

#define SETUP(name, pattern)                                                        \
    static void name##_forward(int which) { setup_kind(pattern, which, false); }    \
    static void name##_backward(int which) { setup_kind(pattern, which, true); }
SETUP(mamba1, "1")
SETUP(mamba2, "2")
SETUP(attention, "a")

int main(int argc, char** argv) {
    const struct { const char *pattern, *forward_name, *backward_name; void (*setup[2])(int); } kind[] = {
        {"1", "Mamba-1 forward, B8 T2048 D768 N16, bf16", "Mamba-1 backward, B8 T2048 D768 N16, bf16",
         {mamba1_forward, mamba1_backward}},
        {"2", "Mamba-2 forward, B8 T2048 D768 N128, bf16", "Mamba-2 backward, B8 T2048 D768 N128, bf16",
         {mamba2_forward, mamba2_backward}},
        {"a", "attention forward, B8 T2048 D768 H12, bf16", "attention backward, B8 T2048 D768 H12, bf16",
         {attention_forward, attention_backward}},
    };
    std::vector<Ladder> ladders;
    for (int k = 0; k < COUNT(kind); k++) {
        const double flop = flop_of(kind[k].pattern);
        ladders.push_back({"layer", kind[k].forward_name, forward_rungs, COUNT(forward_rungs),
                           kind[k].setup[0], 0, flop, flop / 800e12 * 1e3});
        ladders.push_back({"layer", kind[k].backward_name, backward_rungs, COUNT(backward_rungs),
                           kind[k].setup[1], 0, 2 * flop, 2 * flop / 800e12 * 1e3});
    }
    return ladder_main(argc, argv, ladders.data(), (int)ladders.size());
}
