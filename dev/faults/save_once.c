// save_once.c: the smallest program that run.sh can torture: it loads a checkpoint, saves the next one, and
// says the truth.
//
//   save_once DIR            loads DIR/last if there is one, saves the next step, exit code 0 only if that
//   save counts save_once --verify DIR   exit code 0 if DIR/last (or the checkpoint DIR) is whole and its
//   files belong to one save
//
// It uses data/safetensors.h as the trainer does: weights and moments in two files that carry step and save
// id. All values follow from the step, so that a mixture is seen even where the metadata would agree.
#define SSM_NO_MAIN
// defines: Config, data/safetensors.h
#include "../../train_mamba.c"

enum { VALUES = 3000 };

static real expected_value(int64_t step, int file, size_t i) {
    return (real)(step * 1000 + file * 500 + (int64_t)(i % 499));
}

static Config tiny_config(void) {
    Config c;
    memset(&c, 0, sizeof c);
    strcpy(c.pattern, "1");
    c.n_layer = 2, c.d_model = 12, c.d_inner = 24, c.d_state = 5, c.d_conv = 4, c.dt_rank = 1;
    c.vocab_size = 19, c.vocab_padded = 24, c.eos_token = -1, c.tie_embeddings = c.conv_bias = true;
    c.norm_eps = 1e-5, c.dt_min = 1e-3, c.dt_max = 0.1, c.dt_init_floor = 1e-4, c.dt_scale = 1,
    c.initializer_range = 0.02;
    return c;
}

static const char* const file_names[2] = {"model.safetensors", "optimizer.safetensors"};

// load: the step of the checkpoint in `out`, 0 when there is none yet, -1 with a line when it is not whole
static int64_t load(const char* out, Error* err) {
    char dir[4096], path[4096];
    struct stat info;
    if (!join_path(path, sizeof path, out, "last", err)) return -1;
    if (lstat(path, &info) < 0 && errno == ENOENT) {
        if (!join_path(path, sizeof path, out, "config.json", err) || lstat(path, &info) < 0) return 0;
    }
    if (!checkpoint_resolve(out, dir, sizeof dir, err)) return -1;
    SafeTensors st[2];
    int opened = 0;
    bool ok = true;
    for (; opened < 2 && ok; opened += ok)
        ok = join_path(path, sizeof path, dir, file_names[opened], err) &&
             safetensors_open(st + opened, path, err);
    ok = ok && checkpoint_same_save(st, st + 1, err);
    int64_t step = ok ? atoll(safetensors_metadata(st, "step")) : -1;
    for (int file = 0; file < 2 && ok; file++) {
        static real values[VALUES];
        const SafeTensor* t = safetensors_find(st + file, "w");
        ok = (t && t->count == VALUES) ||
             fail_line(err, "%s: no tensor w of %d values", st[file].path, VALUES);
        ok = ok && safetensors_read_real(st + file, t, values, err);
        for (size_t i = 0; i < VALUES && ok; i++)
            if (values[i] != expected_value(step, file, i))
                ok = fail_line(err, "%s: element %zu is wrong", st[file].path, i);
    }
    while (opened > 0) safetensors_close(st + --opened);
    Config c;
    size_t size;
    ok = ok && config_read(&c, dir, err) && join_path(path, sizeof path, dir, "tokenizer.json", err);
    char* text = ok ? read_text(path, 1000, &size, err) : NULL;
    if (ok && !text) ok = false;
    if (ok && strcmp(text, "{\"tokens\": []}\n") != 0) ok = fail_line(err, "%s: not what was written", path);
    free(text);
    return ok ? step : -1;
}

static bool save(const char* out, int64_t step, Error* err) {
    static real values[VALUES];
    char dir[4096], path[4096], number[32], id[64];
    Config c = tiny_config();
    if (!checkpoint_begin(out, step, dir, sizeof dir, err) || !config_write(&c, -1, "float32", dir, err) ||
        !checkpoint_write_text(dir, "tokenizer.json", "{\"tokens\": []}\n", err)) return false;
    snprintf(number, sizeof number, "%lld", (long long)step);
    snprintf(id, sizeof id, "%016llx",
             (unsigned long long)mix64((uint64_t)getpid() ^ (uint64_t)time(NULL) << 32));
    const char* meta[] = {"step", number, "save_id", id, NULL};
    for (int file = 0; file < 2; file++) {
        for (size_t i = 0; i < VALUES; i++) values[i] = expected_value(step, file, i);
        SafeTensorOut w = {"w", 2, {VALUES / 100, 100}, ST_F32, values};
        if (!join_path(path, sizeof path, dir, file_names[file], err) ||
            !safetensors_write(path, &w, 1, meta, err))
            return false;
    }
    if (!checkpoint_commit(out, step, err)) return false;
    if (step % 2 == 0 && !checkpoint_mark_best(out, step, err)) return false;
    checkpoint_prune(out, 2);
    return true;
}

int main(int argc, char** argv) {
    Error err;
    bool verify = argc == 3 && strcmp(argv[1], "--verify") == 0;
    if (!verify && argc != 2) die("usage: save_once [--verify] DIR");
    const char* out = argv[argc - 1];
    if (!verify && !checkpoint_probe(out, 1000, &err)) die("%s", err.text);
    int64_t step = load(out, &err);
    if (step < 0) die("%s", err.text);
    if (verify && step == 0) die("%s: no checkpoint", out);
    if (verify) printf("%lld\n", (long long)step);
    else if (!save(out, step + 1, &err)) die("%s", err.text);
    return 0;
}
