// What the words train, generate and eval do: from the options to a trainer, a session, a result, with all
// checks before the first step. Part of section 12 of train_mamba.c.

static void print_model(const Model* m) {
    const Config* c = &m->config;
    printf("model: pattern %s, %lld blocks, D %lld", c->pattern, (long long)c->n_layer,
           (long long)c->d_model);
    if (strpbrk(c->pattern, "12"))
        printf(", E %lld, N %lld, K %lld", (long long)c->d_inner, (long long)c->d_state,
               (long long)c->d_conv);
    if (strchr(c->pattern, '1')) printf(", R %lld", (long long)c->dt_rank);
    if (strchr(c->pattern, '2'))
        printf(", H %lld, P %lld, G %lld", (long long)(c->d_ssm / c->headdim), (long long)c->headdim,
               (long long)c->ngroups);
    if (strchr(c->pattern, 'a'))
        printf(", Hq %lld, Hkv %lld, dh %lld", (long long)c->attn_heads, (long long)c->attn_heads_kv,
               (long long)c->attn_head_dim);
    if (c->d_intermediate) printf(", F %lld", (long long)c->d_intermediate);
    printf(", vocabulary %lld (padded %lld)\nparameters: %zu\n", (long long)c->vocab_size,
           (long long)c->vocab_padded, m->n_params);
}

// trainer_create: everything between the command line and the first step.
static void trainer_create(Trainer* t, Settings* s) {
    Error err;
    char dir[4096], path[4352];
    SafeTensors st, source;
    memset(t, 0, sizeof *t);
    t->settings = s;
    const Options* o = &s->o;
    t->progress.best_loss = INFINITY;
    Config config;
    if (o->from[0] && o->resume)
        die("--resume continues the run in %s, --from starts a new one with the weights of a model; give one",
            o->out);
    if (o->from[0] && model_option_given(s) >= 0)
        die("--%s describes a new model, but the model comes from %s; leave it out",
            options[model_option_given(s)].name, o->from);
    if (o->resume) {
        if (!checkpoint_resolve(o->out, dir, sizeof dir, &err)) die("%s", err.text);
        if (strcmp(dir, o->out) == 0)
            die("%s is a checkpoint; --resume needs the directory of the run, the one that holds the link "
                "`last`",
                o->out);
        snprintf(path, sizeof path, "%s/optimizer.safetensors", dir);
        if (!safetensors_open(&st, path, &err) || !resume_settings(s, &st, &err) ||
            !config_read(&config, dir, &err))
            die("%s", err.text);
    } else {
        snprintf(path, sizeof path, "%s/last", o->out);
        struct stat info;
        if (lstat(path, &info) == 0)
            die("%s already holds a run; --resume continues it, --out DIR starts another one elsewhere",
                o->out);
        snprintf(path, sizeof path, "%s/config.json", o->out);
        if (lstat(path, &info) == 0)
            warn("%s holds a model; from now on --from %s means the last checkpoint of this run", o->out,
                 o->out);
        if (checkpoint_any(o->out))
            die("%s holds checkpoints (step_*) but no link `last`; `ln -s step_<number> last` there and "
                "--resume, or choose "
                "another --out",
                o->out);
    }
    if (o->min_lr > o->lr && strcmp(o->schedule, "constant") != 0) {
        if (settings_origin(s, "min-lr") == FROM_USER) die("--min-lr %g is above --lr %g", o->min_lr, o->lr);
        s->o.min_lr = o->lr;        // the default, for a small --lr
    }
    if (o->check && on_cpu(o)) die("--check compares the GPU with the CPU; it needs --device cuda");
    const char* list = o->data;
    Tokenizer* tok = &t->data.tokenizer;
    if (!(o->from[0] ? model_from_checkpoint(&t->model, &source, tok, o->from, dir, &err)
          : o->resume ? tokenizer_open(tok, dir, &config, &err) : tokenizer_choose(tok, s, list, &err)))
        die("%s", err.text);
    if ((o->from[0] || o->resume) &&
        !tokenizer_given(tok, o->tokenizer, dir, o->from[0] ? &t->model.config : &config, &err))
        die("%s", err.text);
    if (o->from[0]) {
        config = t->model.config;
        settings_from_config(s, &config);
        model_free(&t->model);       // described again below, with the others
        if (tok->kind == TOKENIZER_NONE && (!list[0] || !ends_with(list, ".bin")))
            die("%s has no tokenizer.json, so it trains on token shards only: --data FILE.bin", dir);
    }
    if (settings_origin(s, "decay-steps") == FROM_USER && strcmp(o->schedule, "wsd") != 0)
        die("--decay-steps is of --schedule wsd, and this one is %s; leave it out", o->schedule);
    if (!data_open_all(&t->data, s, &err)) die("%s", err.text);
    if (!o->resume && !o->from[0]) {
        int64_t V = t->data.tokenizer.vocab_size;
        if (settings_origin(s, "vocab-size") == FROM_USER && o->vocab_size > V) V = o->vocab_size;
        if (!options_fit_pattern(s, &err)) die("%s", err.text);
        config = config_from_options(s, V, t->data.tokenizer.eos);
    }
    if (!config_check(&config, &err)) die("%s", err.text);
    model_describe(&t->model, &config);
    Model* m = &t->model;
    if (o->carry_state && has_cache(m))
        die("--carry-state: the cache of attention layers would grow from step to step; pattern \"%s\" has "
            "them, train it without", config.pattern);
    if (!freeze_tensors(m, o->freeze, &err)) die("%s", err.text);
    size_t B = (size_t)o->batch_size, T = (size_t)o->seq_len, accum = (size_t)o->grad_accum, step_size;
    int64_t dims[] = {o->batch_size, o->grad_accum, o->seq_len, 64};
    if (!checked_size(4, dims, 1, &step_size))
        die("--batch-size x --grad-accum x --seq-len does not fit in 63 bits");

    if (!workspace_fits(m, o->batch_size, o->seq_len))
        die("--batch-size x --seq-len x model does not fit in 63 bits");

    // memory, before anything is allocated
    Workspace measured = workspace_alloc(m, B, T, true, o->recompute, true);
    double parameter_bytes = (double)m->n_elements * sizeof(real);
    double activation_bytes = on_cpu(o) ? (double)measured.bytes : 0;
    double batch_bytes = (double)step_size / 64 * (3 * sizeof(int)), carried_bytes = 0;
    if (o->carry_state) carried_bytes = 2.0 * (double)(accum * B) * (double)state_count(m) * sizeof(real);
    workspace_free(&measured);
    print_model(m);
    if (on_cpu(o))
        printf("memory: parameters %.1f MiB, gradients %.1f MiB, AdamW moments %.1f MiB, activations %.1f "
               "MiB%s\n",
               mib(parameter_bytes), mib(parameter_bytes), mib(2 * parameter_bytes), mib(activation_bytes),
               o->recompute == RECOMPUTE_ALL ? " (--recompute)" : o->recompute ? " (--recompute cheap)" : "");
    if (!check_memory(4 * parameter_bytes + activation_bytes + batch_bytes + carried_bytes,
                      "try a smaller --batch-size, --seq-len or model, or --recompute", &err))
        die("%s", err.text);
    if (!checkpoint_make_dir(o->out, &err)) die("%s", err.text);
    lock_run(o->out);           // first: the probe removes unfinished saves, and must not meet another
    if (!checkpoint_probe(o->out, (uint64_t)(6 * parameter_bytes) + (1 << 20), &err)) die("%s", err.text);

    model_alloc(m, true);
    t->backend = backend_create(o, m, B, T, true, o->recompute);
    if (on_cpu(o)) assert(t->backend.activation_bytes == (size_t)activation_bytes);
    if (o->resume) {
        SafeTensors weights;
        snprintf(path, sizeof path, "%s/model.safetensors", dir);
        if (!resume_progress(t, &st, &err) || !safetensors_open(&weights, path, &err) ||
            !model_load_tensors(m, &weights, &err) ||
            !optimizer_load(m, &weights, &st, t->backend.carry_in, o->carry_state ? (int)accum : 0, &err))
            die("%s", err.text);
        safetensors_close(&weights);
        safetensors_close(&st);
        printf("resumed: %s, step %lld\n", dir, (long long)t->progress.step);
        if (s->validation_changed) {
            t->progress.best_loss = INFINITY;
            printf("validation is measured in another way now: the best loss starts anew\n");
        }
    } else if (o->from[0]) {
        if (!model_load_tensors(m, &source, &err)) die("%s", err.text);
        safetensors_close(&source);
        printf("weights: %s\n", dir);
    } else {
        model_init(m, o->seed);
    }
    t->backend.upload(&t->backend);

    Loader loader = {&t->data.train,        o->seq_len, o->seed, o->carry_state, (int64_t)(B * accum),
                     t->data.tokenizer.eos, 0,          1};
    t->loader = loader;
    if (!loader_check(&t->loader, &err)) die("%s", err.text);
    loader.data = &t->data.val;
    loader.sequential = false;
    t->val_loader = loader;
    if (t->data.has_val && loader_eval_samples(&t->val_loader) == 0)
        die("%s: the validation data has %lld tokens, an evaluation needs at least 2", o->val_data,
            (long long)t->data.val.n_tokens);
    t->inputs = (int*)xcalloc(accum * B * T, sizeof(int));
    t->targets = (int*)xcalloc(accum * B * T, sizeof(int));
    t->doc = (int*)xcalloc(accum * B * T, sizeof(int));
    t->fresh = (bool*)xcalloc(accum * B, sizeof(bool));
    if (!log_open(t, o->resume, &err)) die("%s", err.text);
    printf("data: %lld tokens for training, %lld for validation\n", (long long)t->data.train.n_tokens,
           t->data.has_val ? (long long)t->data.val.n_tokens : 0);
    printf("device: %s, %d threads, %s\n", t->backend.name, thread_count(),
           REAL_IS_DOUBLE ? "float64" : "float32");
}

static void trainer_free(Trainer* t) {
    for (int64_t i = 0; t->backend.carry_in && i < t->settings->o.grad_accum; i++) {
        state_free(&t->backend.carry_in[i]);
        state_free(&t->backend.carry_out[i]);
    }
    free(t->backend.carry_in);
    free(t->backend.carry_out);
    t->backend.destroy(&t->backend);
    model_free(&t->model);
    data_close_all(&t->data);
    free(t->inputs); free(t->targets); free(t->doc); free(t->fresh);
    if (t->log) fclose(t->log);
}

int train_main(Settings* s) {
    Trainer t;
    setvbuf(stdout, NULL, _IOLBF, 0);
    trainer_create(&t, s);
    printf("settings:\n");
    settings_print(s);
    catch_signals(true);
    int code = train_loop(&t);
    if (code == 0) {
        plot_loss(s->o.out);
        printf("checkpoint: %s/last\n", s->o.out);
    }
    trainer_free(&t);
    return code;
}

// model_open: the model of --from, or with --preset and no --from a freshly initialized one.
static void model_open(Model* m, Tokenizer* tok, const Settings* s, char dir[4096]) {
    Error err;
    const Options* o = &s->o;
    int given = model_option_given(s);
    bool from = settings_origin(s, "from") != FROM_DEFAULT;
    if (given >= 0 && (from || (!o->preset[0] && s->word != WORD_INFO)))
        die("--%s describes a new model, but the model comes from the checkpoint in %s; leave it out",
            options[given].name, o->from[0] ? o->from : "out");
    if (given >= 0) {
        if (o->tokenizer[0])
            die("--tokenizer is for a trained model; --%s makes a new one", options[given].name);
        int64_t V = o->vocab_size ? o->vocab_size : 257;
        tokenizer_bytes(tok);
        if (V != tok->vocab_size) { tok->kind = TOKENIZER_NONE; tok->vocab_size = V; }
        tok->eos = (int)(o->eos_token >= 0 ? o->eos_token : V - 1);
        if (!options_fit_pattern(s, &err)) die("%s", err.text);
        Config c = config_from_options(s, V, tok->eos);
        if (!config_check(&c, &err)) die("%s", err.text);
        model_describe(m, &c);
        dir[0] = 0;
        if (s->word == WORD_INFO) return;
        if (!check_memory((double)m->n_elements * sizeof(real), "choose a smaller model", &err))
            die("%s", err.text);
        model_alloc(m, false);
        model_init(m, o->seed);
        return;
    }
    SafeTensors st;
    if (!model_from_checkpoint(m, &st, tok, o->from[0] ? o->from : "out", dir, &err) ||
        !tokenizer_given(tok, o->tokenizer, dir, &m->config, &err))
        die("%s", err.text);
    if (s->word != WORD_INFO) {
        if (!check_memory((double)m->n_elements * sizeof(real), "choose a smaller model", &err))
            die("%s", err.text);
        model_alloc(m, false);
        if (!model_load_tensors(m, &st, &err)) die("%s", err.text);
    }
    safetensors_close(&st);
}

int generate_main(Settings* s) {
    Model m;
    Tokenizer tok;
    Error err;
    char dir[4096];
    const Options* o = &s->o;
    model_open(&m, &tok, s, dir);
    if (o->save_state[0] && !state_replaceable(o->save_state, &err)) die("%s", err.text);
    if (settings_origin(s, "dtype") != FROM_DEFAULT && !on_cpu(o))
        die("--dtype: only the CPU keeps weights in another type; on the GPU give --precision");
    if (strcmp(o->dtype, "f16") == 0) die("--dtype f16: the CPU generates with f32 or bf16");
    if (strcmp(o->dtype, "bf16") == 0) model_to_half(&m);
    Backend backend = backend_create(o, &m, 0, 0, false, false);
    backend.upload(&backend);
    PromptList list = {NULL, NULL, 0};
    if (o->prompts[0] &&
        (o->prompt[0] || o->prompt_file[0] || o->load_state[0] || o->save_state[0] || o->interactive))
        die("--prompts: leave out --prompt, --prompt-file, --interactive and the saved states, which are for "
            "one text");
    if (o->prompts[0] && !prompts_read(&list, o->prompts, &err)) die("%s", err.text);
    if (o->interactive &&
        (o->num_samples > 1 || strcmp(o->prompt, "-") == 0 || o->load_state[0] || o->save_state[0]))
        die("--interactive: leave out --num-samples, --prompt - and the saved states: lines are read from "
            "standard input");
    if (strcmp(o->state_dtype, "bf16") == 0 && !strpbrk(m.config.pattern, "12"))
        die("--state-dtype bf16: this model has no Mamba layers, of whose states it is; leave it out");
    if (!o->interactive && settings_origin(s, "context") == FROM_USER)
        die("--context is for --interactive; otherwise the room is counted: leave it out");
    size_t n = o->prompts[0] ? list.n : 1;
    Prompt prompt = prompt_open(&tok, o->prompt, NULL);
    if (o->prompt[0] && o->prompt_file[0]) die("--prompt and --prompt-file: give only one of them");
    bool from_stdin = strcmp(o->prompt, "-") == 0;
    if (from_stdin) prompt.file = stdin;
    if (o->prompt_file[0] && !(prompt.file = fopen(o->prompt_file, "rb")))
        die("%s: %s", o->prompt_file, strerror(errno));
    struct stat info;
    if (o->prompt_file[0] && fstat(fileno(prompt.file), &info) == 0 && S_ISDIR(info.st_mode))
        die("%s: expected a text file, found a directory", o->prompt_file);
    if (tok.kind == TOKENIZER_NONE && (o->prompt[0] || prompt.file || o->prompts[0] || o->interactive))
        die("this checkpoint has no tokenizer.json, so it cannot take a text prompt; give one with "
            "--tokenizer");
    Prompt* prompts = (Prompt*)xcalloc(n, sizeof(Prompt));
    for (size_t i = 0; i < list.n; i++) {
        prompts[i] = prompt_open(&tok, list.text + list.start[i], NULL);
        prompts[i].left = prompts_size(&list, i);
    }
    if (!context_set(&m, o, list.n ? prompts : &prompt, n, &err)) die("%s", err.text);
    double rows = (double)o->num_samples * (double)n, Vp = (double)m.config.vocab_padded;
    int64_t tokens = (double)o->chunk > rows ? o->chunk : (int64_t)rows;
    if (!workspace_fits(&m, 1, tokens))
        die("--prompts, --num-samples or --chunk: the memory does not fit in 63 bits");
    Workspace measured = workspace_alloc(&m, 1, (size_t)tokens, false, RECOMPUTE_NONE, true);
    double bytes =
        (double)measured.bytes + rows * ((double)state_count(&m) * sizeof(real) + Vp * (sizeof(real) + 1));
    workspace_free(&measured);
    const char* advice = has_cache(&m)
        ? "try fewer --prompts, a smaller --num-samples, --max-tokens or --context"
        : "try fewer --prompts, a smaller --num-samples or --chunk";
    if (!check_memory(bytes, advice, &err)) die("%s", err.text);
    if (!prompt.file && o->prompt[0] && !o->interactive &&
        o->num_samples == 1) {    // echoed like the output: valid UTF-8 unless --raw
        Utf8Stream echo = {{0}, 0, o->raw, 0};
        char text[TOKENIZER_MAX_TEXT];
        for (const char* p = o->prompt; *p; p++)
            fwrite(text, 1, utf8_push(&echo, (unsigned char)*p, text), stdout);
        fwrite(text, 1, tokenizer_flush(&echo, text), stdout);
    }
    if (!prompt.file && !o->interactive)
        catch_signals(false);    // waiting for a prompt, Ctrl-C simply ends it
    GenerateStats stats;
    bool ok =
        o->interactive
            ? generate_turns(&backend, &tok, o, &prompt, stdin, stdout, &stats, &stop_signal, &err)
            : generate(&backend, &tok, o, list.n ? prompts : &prompt, n, stdout, &stats, &stop_signal, &err);
    if (!ok) die("%s", err.text);
    for (size_t i = 0; i < list.n; i++) prompt_close(&prompts[i]);
    free(prompts);
    prompts_free(&list);
    fprintf(stderr, "prompt: %lld tokens, %.0f tok/s; new: %lld tokens, %.1f tok/s; state: %.2f MiB\n",
            (long long)stats.prompt_tokens,
            stats.prompt_tokens ? (double)stats.prompt_tokens / stats.prefill_seconds : 0,
            (long long)stats.new_tokens,
            stats.new_tokens ? (double)stats.new_tokens / stats.decode_seconds : 0, mib(stats.state_bytes));
    if (prompt.file && prompt.file != stdin) fclose(prompt.file);
    prompt_close(&prompt);
    tokenizer_free(&tok);
    backend.destroy(&backend);
    model_free(&m);
    return stop_signal ? 128 + (int)stop_signal : 0;
}

// dump_logits: inputs and logits of the first batch, for comparison with other implementations.
static bool dump_logits(Backend* b, const Loader* loader, size_t B, size_t T, const char* path, Error* err) {
    const Model* m = b->model;
    size_t n = B * T, D = (size_t)m->config.d_model, Vp = (size_t)m->config.vocab_padded;
    int *inputs = (int*)xcalloc(n, sizeof(int)), *targets = (int*)xcalloc(n, sizeof(int));
    real *logits = (real*)xcalloc(n * Vp, sizeof(real)), *ids = (real*)xcalloc(n, sizeof(real));
    bool ok = loader_eval_batch(loader, 0, (int64_t)B, inputs, targets, NULL, err);
    if (ok) {
        model_forward(m, &b->work, inputs, NULL, B, T, &b->none, &b->none);
        matmul_forward(logits, Vp, b->work.f, D, m->head, NULL, n, D, Vp);
        for (size_t i = 0; i < n; i++) ids[i] = (real)inputs[i];
        SafeTensorOut out[2] = {flat_tensor("input_ids", ids, n), flat_tensor("logits", logits, n * Vp)};
        for (int i = 0; i < 2; i++) {
            out[i].ndim = 2 + i;
            out[i].shape[0] = (int64_t)B;
            out[i].shape[1] = (int64_t)T;
            out[i].shape[2] = (int64_t)Vp;
        }
        const char* meta[] = {"format", "pt", NULL};
        ok = safetensors_write(path, out, 2, meta, err);
    }
    free(inputs); free(targets); free(logits); free(ids);
    return ok;
}

// eval_loss: --task loss
static bool eval_loss(Backend* b, const Data* data, const Options* o, json_t* results, Error* err) {
    size_t B = (size_t)o->batch_size, T = (size_t)o->seq_len;
    Loader loader = {&data->train, o->seq_len, o->seed, false, 0, data->tokenizer.eos, 0, 1};
    Evaluation result;
    if (o->dump_logits[0] && !dump_logits(b, &loader, B, T, o->dump_logits, err)) return false;
    double start = seconds_now();
    if (!evaluate(b, &loader, B, T, o->eval_batches, o->reset_documents, &stop_signal, &result, err))
        return false;
    double seconds = seconds_now() - start;
    char bpb[32];
    bits_per_byte(&data->tokenizer, result.loss, bpb);
    printf("tokens %lld | loss %.6f | perplexity %.4f | bits per byte %s | %.0f tok/s\n",
           (long long)result.targets, result.loss, exp(result.loss), bpb[0] ? bpb : "(--task text)",
           (double)result.targets / seconds);
    json_object_set_new(results, "tokens", json_integer(result.targets));
    json_object_set_new(results, "loss", json_finite(result.loss));
    return true;
}

int eval_main(Settings* s) {
    Model m;
    Data data;
    Items items;
    Error err;
    char dir[4096];
    const Options* o = &s->o;
    int task = task_of(o);
    memset(&data, 0, sizeof data);
    memset(&items, 0, sizeof items);
    if (!eval_check(s, &err)) die("%s", err.text);
    model_open(&m, &data.tokenizer, s, dir);
    // rows and tokens of a call: a text with its state carried is one long row
    int64_t B = o->batch_size, T = o->window ? o->window : o->seq_len;
    if (task == TASK_TEXT && !o->window) T = B > INT64_MAX / T ? INT64_MAX : B * T, B = 1;
    const char* list = o->data;
    if (!list[0]) list = data.default_list = default_data();
    if (task & TASK_ITEMS ? !items_open(&items, &data.tokenizer, o, &T, &err)
                          : !open_list(&data.train, list, &data.tokenizer, &err))
        die("%s", err.text);
    if (!workspace_fits(&m, B, T)) die("--batch-size x length of the rows x model does not fit in 63 bits");
    const char* advice = task & TASK_ITEMS ? "try a smaller --batch-size"
                                           : "try a smaller --batch-size, --seq-len or --window";
    if (task == TASK_TEXT && !o->window && has_cache(&m)) {      // attention keeps the whole text
        int64_t tokens = data.train.n_tokens - 1;
        if (o->eval_batches && o->eval_batches < tokens / T) tokens = o->eval_batches * T;
        if (tokens > MAX_CONTEXT)
            die("the text has %lld tokens, attention keeps at most %d; give --window", (long long)tokens,
                MAX_CONTEXT);
        m.config.context = tokens > 0 ? tokens : 0;
        advice = "attention keeps the keys and values of the whole text: give --window";
    }
    Workspace measured = workspace_alloc(&m, (size_t)B, (size_t)T, false, RECOMPUTE_NONE, true);
    double bytes = (double)measured.bytes + 5.0 * sizeof(int) * (double)(B * T) +
                   (double)state_count(&m) * sizeof(real);
    workspace_free(&measured);
    if (!check_memory(bytes, advice, &err)) die("%s", err.text);
    Backend backend = backend_create(o, &m, (size_t)B, (size_t)T, false, false);
    backend.upload(&backend);
    catch_signals(false);
    json_t* results = json_pack("{s:s, s:s, s:s}", "task", o->task, "model", dir, "device", backend.name);
    bool ok = task == TASK_LOSS   ? eval_loss(&backend, &data, o, results, &err)
              : task == TASK_TEXT ? eval_text(&backend, &data, o, B, T, results, &err)
                                  : eval_items(&backend, &items, B, T, results, &err);
    if (ok && o->results[0] && !stop_signal) ok = results_write(o->results, results, &err);
    if (!ok) die("%s", err.text);
    json_decref(results);
    items_close(&items);
    backend.destroy(&backend);
    data_close_all(&data);
    model_free(&m);
    return stop_signal ? 128 + (int)stop_signal : 0;
}
