// The words `info` and `convert`: what a model directory holds, and writing it in another form.

// print_files: what a checkpoint's directory consists of, and what it can be used for
static void print_files(const char* dir, const SafeTensors* st) {
    static const char* const others[] = {"tokenizer.json", "optimizer.safetensors"};
    static const char* const without[] = {"token ids instead of text", "cannot be resumed"};
    uint64_t bytes = 0, by_type[ST_DTYPES] = {0};
    char path[4352];
    struct stat info;
    for (int i = 0; i < (st->n_parts ? st->n_parts : 1); i++)
        bytes += (uint64_t)(st->n_parts ? st->parts[i].info : st->info).st_size;
    for (int i = 0; i < st->n; i++) by_type[st->tensor[i].dtype] += st->tensor[i].count;
    printf("checkpoint: %s\nweights: %s", dir, strrchr(st->path, '/') + 1);
    if (st->n_parts) printf(" with %d files", st->n_parts);
    printf(", %.1f MiB, %d tensors", mib((double)bytes), st->n);
    for (int i = 0; i < ST_DTYPES; i++)
        if (by_type[i]) printf(", %llu of %s", (unsigned long long)by_type[i], st_dtype[i].name);
    printf("\nfiles: complete");      // config.json and every tensor are there, or this is not reached
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, others[i]);
        if (stat(path, &info) != 0) printf("; without %s: %s", others[i], without[i]);
    }
    printf("\n");
}

int info_main(Settings* s) {
    Model m;
    Tokenizer tok;
    Error err;
    SafeTensors st;
    char dir[4096], shape[96];
    model_open(&m, &tok, s, dir);
    if (dir[0] && !weights_open(&st, dir, &err)) die("%s", err.text);
    if (dir[0]) print_files(dir, &st);
    print_model(&m);
    if (tok.kind == TOKENIZER_BPE)
        printf("tokenizer: byte-level BPE, %lld ids, %lld merges%s, end token %d\n",
               (long long)tok.bpe->n_ids, (long long)tok.bpe->n_merges, tok.bpe->nfc ? ", normal form C" : "",
               tok.eos);
    else printf("tokenizer: %s\n", tok.kind == TOKENIZER_BYTES ? "bytes" : "none (token ids)");
    tokenizer_free(&tok);
    printf("configuration:");
    for (int i = 0, n = 0; i < N_CONFIG_FIELDS; i++) {
        const ConfigField* f = config_fields + i;
        char value[96];
        if (config_has(&m.config, f))
            printf("%s%s %s", n++ % 6 ? ", " : "\n  ", f->name, config_text(value, &m.config, f));
    }
    printf("\n%-44s %-18s %12s  %-5s %-6s  %s\n", "tensor", "shape", "parameters", "decay", "dtype", "file");
    for (int i = 0; i < m.n_tensors; i++) {
        const Tensor* t = &m.tensor[i];
        const SafeTensor* stored = dir[0] ? file_tensor(&m, &st, i) : NULL;
        printf("%-44s %-18s %12zu  %-5s %-6s  %s\n", t->name,
               shape_text(shape, sizeof shape, t->ndim, t->shape),
               t->count, t->spec->flags & DECAY ? "yes" : "-", stored ? st_dtype[stored->dtype].name : "-",
               stored ? strrchr(file_of(&st, stored)->path, '/') + 1 : "-");
    }
    if (dir[0]) safetensors_close(&st);
    size_t state = state_count(&m);
    printf("recurrent state of one sequence: %zu numbers, %.2f MiB", state,
           mib((double)state * sizeof(real)));
    m.config.context = 1;
    size_t growth = state_count(&m) - state;
    if (growth)
        printf(", and %zu numbers, %.2f KiB, per token", growth, (double)growth * sizeof(real) / 1024);
    printf("\n");
    printf("training memory without activations: %.1f MiB\n", mib(4.0 * (double)m.n_elements * sizeof(real)));
    model_free(&m);
    return 0;
}

// convert_main: the model of --from, or a freshly initialized one, in a published form
int convert_main(Settings* s) {
    Model m;
    Tokenizer tok;
    Error err;
    char dir[4096];
    const Options* o = &s->o;
    if (settings_origin(s, "out") != FROM_USER || !o->out[0])
        die("--out DIR is missing: the new directory for the model");
    model_open(&m, &tok, s, dir);
    int dialect = strcmp(o->dialect, "hf") == 0 ? DIALECT_HF : DIALECT_MAMBA;
    int dtype = strcmp(o->dtype, "f32") == 0 ? ST_F32 : strcmp(o->dtype, "f16") == 0 ? ST_F16 : ST_BF16;
    if (!checkpoint_export(&m, dir[0] ? dir : NULL, o->out, dialect, dtype, &err)) die("%s", err.text);
    printf("wrote %s: %zu parameters, %s, matrices %s\n", o->out, m.n_params, o->dialect, o->dtype);
    tokenizer_free(&tok);
    model_free(&m);
    return 0;
}
