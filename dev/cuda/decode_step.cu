// decode_step: one token of each of a few sequences through a whole mamba-130m or mamba2-130m, in several
// versions. The smallest number of bytes is that of the weights and the states; the rest is waiting.
//
//   v1  a kernel for each operation, as in a forward pass over one token: 7 per layer
//   v2  3 kernels per layer that start early, 4 in a Mamba-1 layer with more than 8 sequences (sections 4.10,
//       4.15 and 4.16 of train_mamba.cu; 6 with more than 16 sequences where 4.16 cannot serve)
//   v3  shipped: the same launches recorded as a CUDA graph: the GPU no longer waits for the host
//
// build: make build/dev/decode_step
#define LADDER_MODEL
// defines: Ladder, ladder_main, and all of train_mamba.cu
#include "ladder.h"

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
    matmul_forward_cuda(run.matmul, w->logits, Vp, w->f, D, weights()->head_x, (const float*)NULL,
                        session.rows, D, Vp, run.stream);
    cast_cuda(d->logits, w->logits, session.rows * Vp, run.stream);
}

static void launch2_on(cudaStream_t stream) {
    CudaSession<bf16>* d = opened();
    CudaRun<bf16> run = run_on(stream);
    if (!model_decode_cuda(&model, weights(), &d->work, &run, d->work.batch.tokens, d->state, session.rows, 0,
                           d->logits))
        die("these sizes have no kernels for single tokens");
}
static void launch2(void) { launch2_on(0); }

static void launch3(void) {
    cudaStream_t stream = cuda_of<bf16>(&backend)->stream;
    if (!recorded) recorded = graph_record(stream, [&] { launch2_on(stream); });
    cudaCheck(cudaGraphLaunch(recorded, 0));
}

static const Rung rungs[] = {
    {"a kernel for each operation", launch1, 0},
    {"fused: 3 or 4 kernels per layer", launch2, 0},
    {"shipped: the same as a CUDA graph", launch3, 0},
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

static Config config_of(const char* preset) {
    const char* args[] = {"--preset", preset};
    return config_of(2, args);
}
static const char* const small[] = {"--n-layer", "3",    "--d-model", "96", "--d-state",    "5",
                                    "--dt-rank", "24",   "--d-conv",  "3",  "--vocab-size", "500"};
static const char* const small2[] = {"--n-layer", "3",  "--d-model", "96", "--d-state",    "32", "--pattern",
                                     "2", "--headdim", "16", "--d-conv",  "3",  "--vocab-size", "500"};

static void setup_rows(Config c, size_t rows) {
    close_model();
    random_model(&model, &c, false);
    backend = backend_cuda_of<bf16>(&model, 0, 0, false, RECOMPUTE_NONE);
    backend.upload(&backend);
    session = session_create(&backend, rows, 1);
    tokens.resize(rows);
    for (size_t r = 0; r < rows; r++) tokens[r] = (int)(random_bits(7, 1, r) % (uint64_t)c.vocab_size);
    cudaCheck(cudaMemcpy(opened()->work.batch.tokens, tokens.data(), rows * sizeof(int),
                         cudaMemcpyHostToDevice));

    Backend cpu = backend_cpu(&model, 0, 0, false, RECOMPUTE_NONE);
    Session s = session_create(&cpu, rows, 1);
    size_t n = s.state.n_elements;
    std::vector<float> noise(10007);
    for (size_t i = 0; i < noise.size(); i++) noise[i] = (float)(0.3 * random_normal(7, 2, i));
    for (size_t i = 0; i < n; i++) s.state.data[i] = noise[i % noise.size()];
    std::vector<float> before(s.state.data, s.state.data + n), logits(rows * (size_t)c.vocab_padded);
    cpu.decode(&cpu, &s, 0, rows, tokens.data(), 1, logits.data());
    expect("logits", opened()->logits, logits, 2e-2);
    expect("states", opened()->state, std::vector<float>(s.state.data, s.state.data + n), 2e-2, before);
    session_free(&cpu, &s);
    cpu.destroy(&cpu);
}
static void setup_one(int which) {
    setup_rows(which ? config_of("mamba-130m") : config_of(COUNT(small), small), which ? 1 : 3);
}
static void setup_many(int which) {
    setup_rows(which ? config_of("mamba-130m") : config_of(COUNT(small), small), which ? 64 : 37);
}
static void setup2_one(int which) {
    setup_rows(which ? config_of("mamba2-130m") : config_of(COUNT(small2), small2), which ? 1 : 3);
}
static void setup2_many(int which) {
    setup_rows(which ? config_of("mamba2-130m") : config_of(COUNT(small2), small2), which ? 64 : 37);
}

// bytes: every weight, every state in and out, the logits
static double bytes_of(const char* preset, size_t rows) {
    Model m;
    Config c = config_of(preset);
    model_describe(&m, &c);
    double bytes = 2.0 * (double)m.n_params + 8.0 * (double)(rows * state_count(&m)) +
                   4.0 * (double)(rows * (size_t)c.vocab_padded);
    model_free(&m);
    return bytes;
}

int main(int argc, char** argv) {
    const Ladder ladders[] = {
        {"decode_step", "mamba-130m, 1 sequence, bf16", rungs, COUNT(rungs), setup_one,
         bytes_of("mamba-130m", 1), 0, 0},
        {"decode_step", "mamba-130m, 64 sequences, bf16", rungs, COUNT(rungs), setup_many,
         bytes_of("mamba-130m", 64), 0, 0},
        {"decode_step", "mamba2-130m, 1 sequence, bf16", rungs, COUNT(rungs), setup2_one,
         bytes_of("mamba2-130m", 1), 0, 0},
        {"decode_step", "mamba2-130m, 64 sequences, bf16", rungs, COUNT(rungs), setup2_many,
         bytes_of("mamba2-130m", 64), 0, 0},
    };
    return ladder_main(argc, argv, ladders, COUNT(ladders));
}
