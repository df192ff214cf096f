// The directory of a run: checkpoints with what a resume needs, log, plot, lock. Part of section 11 of
// train_mamba.c: it uses the Trainer.

// Options that a resumed run takes from its checkpoint. The first group may not change, the rest is listed
// when it does.
static bool option_is_saved(const Option* opt) {
    static const char* const not_saved[] = {"preset", "out",     "resume",     "from",
                                            "threads", "force-data", "tokenizer"};
    if (!opt->name || !(opt->words & WORD_TRAIN)) return false;
    for (size_t i = 0; i < sizeof not_saved / sizeof not_saved[0]; i++)
        if (strcmp(opt->name, not_saved[i]) == 0) return false;
    return true;
}

// option_is_fixed: what may not change. carried: with --carry-state, where the place of every row in the text
// follows from the second list and the sample counter
static bool option_is_fixed(const Option* opt, bool carried) {
    static const char* const fixed[] = {"pattern",    "n-layer",   "d-model",        "expand",
                                        "d-state",    "d-conv",    "dt-rank",        "d-intermediate",
                                        "vocab-size", "eos-token", "tie-embeddings", "carry-state",
                                        "headdim",    "ngroups",   "chunk-size",     "attn-heads",
                                        "attn-heads-kv", "attn-head-dim", "attn-conv", "rotary-dim",
                                        "rotary-base"};
    for (size_t i = 0; i < sizeof fixed / sizeof fixed[0]; i++)
        if (strcmp(opt->name, fixed[i]) == 0) return true;
    static const char* const place[] = {"seq-len", "batch-size", "grad-accum", "seed"};
    for (size_t i = 0; carried && i < sizeof place / sizeof place[0]; i++)
        if (strcmp(opt->name, place[i]) == 0) return true;
    return false;
}

// option_differs: whether two valid values of an option are different: 0.1 and 0.10 are not
static bool option_differs(const Option* opt, const char* a, const char* b) {
    if (opt->type == 'u') return strtoull(a, NULL, 10) != strtoull(b, NULL, 10);
    return opt->type == 'i' || opt->type == 'f' ? strtod(a, NULL) != strtod(b, NULL) : strcmp(a, b) != 0;
}

// What a validation loss is measured on: losses before and after a change do not compare
static bool option_is_validation(const Option* opt) {
    static const char* const names[] = {"val-data", "val-fraction", "seq-len", "batch-size", "eval-batches"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(opt->name, names[i]) == 0) return true;
    return false;
}

// save: writes a checkpoint with everything that a resume needs. A failure is a warning: training goes on.
static void trainer_save(Trainer* t, bool best) {
    const Options* o = &t->settings->o;
    Progress* p = &t->progress;
    const char* meta[MAX_META];
    static char names[N_OPTIONS][64];
    char text[4][64];
    int n = 0;
    t->backend.download(&t->backend);
    snprintf(text[0], 64, "%lld", (long long)p->samples);
    snprintf(text[1], 64, "%.17g", p->best_loss);
    snprintf(text[2], 64, "%lld", (long long)p->best_step);
    snprintf(text[3], 64, "%016llx", (unsigned long long)dataset_fingerprint(&t->data.train));
    const char* fixed[] = {"ssm_c_format", "1",     "samples", text[0], "best_loss",  text[1],
                           "best_step", text[2], "data", text[3]};
    for (size_t i = 0; i < sizeof fixed / sizeof fixed[0]; i++) meta[n++] = fixed[i];
    for (int i = 0; i < N_OPTIONS; i++) {
        if (!option_is_saved(&options[i])) continue;
        snprintf(names[i], sizeof names[i], "option.%s", options[i].name);
        meta[n++] = names[i];
        meta[n++] = t->settings->text[i];
    }
    meta[n] = NULL;
    Error err;
    int n_carry = o->carry_state ? (int)o->grad_accum : 0;
    bool ok = checkpoint_save(&t->model, &t->data.tokenizer, o->out, p->step, meta, t->backend.carry_in,
                              n_carry, &err);
    if (ok && best) ok = checkpoint_mark_best(o->out, p->step, &err);
    if (ok) {
        checkpoint_prune(o->out, (int)o->keep);
        printf("saved %s/step_%08lld%s\n", o->out, (long long)p->step, best ? " (best)" : "");
    } else {
        warn("could not save step %lld: %s; the previous checkpoint is whole, training goes on",
             (long long)p->step, err.text);
    }
    t->save_failed = !ok;
}

// resume_settings: the settings of the checkpoint below those given by the user.
static bool resume_settings(Settings* s, const SafeTensors* st, Error* err) {
    const char* format = safetensors_metadata(st, "ssm_c_format");
    if (!format || strcmp(format, "1") != 0)
        return fail(err, "%s: its format is %s, this program reads format 1; use the program that wrote it",
                    st->path, format ? format : "unknown");
    const char* carry = safetensors_metadata(st, "option.carry-state");
    const bool carried = carry && strcmp(carry, "on") == 0;
    bool other = false;
    for (int i = 0; i < N_OPTIONS; i++) {
        char name[80];
        if (!option_is_saved(&options[i])) continue;
        snprintf(name, sizeof name, "option.%s", options[i].name);
        const char* value = safetensors_metadata(st, name);
        if (!value) continue;
        if (s->origin[i] == FROM_USER && option_differs(&options[i], value, s->text[i])) {
            if (option_is_fixed(&options[i], carried))
                return fail(err, "--%s %s: the run in %s has %s, which cannot change when it resumes%s",
                            options[i].name, s->text[i], s->o.out, value,
                            option_is_fixed(&options[i], false) ? "" : " with --carry-state");
            printf("changed: --%s %s, was %s\n", options[i].name, s->text[i][0] ? s->text[i] : "-",
                   value[0] ? value : "-");
            if (option_is_validation(&options[i])) s->validation_changed = true;
        }
        if (s->origin[i] == FROM_PRESET && option_is_fixed(&options[i], carried))
            other = other || option_differs(&options[i], value, s->text[i]);
        if (!option_set(s, i, value, FROM_CHECKPOINT, err)) return false;
    }
    if (other)
        warn("--preset %s: the run in %s has other sizes and goes on with them", s->o.preset, s->o.out);
    return true;
}

static bool resume_progress(Trainer* t, const SafeTensors* st, Error* err) {
    const Options* o = &t->settings->o;
    static const char* const keys[] = {"step", "samples", "best_loss", "best_step", "data"};
    const char* value[5];
    for (int i = 0; i < 5; i++)
        if (!(value[i] = safetensors_metadata(st, keys[i])))
            return fail(err, "%s: metadata '%s' is missing", st->path, keys[i]);
    Progress* p = &t->progress;
    char* end[4];
    errno = 0;
    p->step = strtoll(value[0], &end[0], 10);
    p->samples = strtoll(value[1], &end[1], 10);
    p->best_loss = strtod(value[2], &end[2]);                  // infinite before the first validation
    p->best_step = strtoll(value[3], &end[3], 10);
    bool whole = errno == 0 && p->step >= 0 && p->samples >= 0 && p->samples <= INT64_MAX / 2 &&
                 p->best_loss > -INFINITY && p->best_step >= 0 && p->best_step <= p->step;
    for (int i = 0; i < 4; i++) whole = whole && end[i] != value[i] && !*end[i];
    if (!whole)
        return fail(err, "%s: is damaged: step %.40s, samples %.40s, best loss %.40s at step %.40s", st->path,
                    value[0], value[1], value[2], value[3]);
    char print[32];
    snprintf(print, sizeof print, "%016llx", (unsigned long long)dataset_fingerprint(&t->data.train));
    if (strcmp(print, value[4]) != 0 && !o->force_data)
        return fail(err,
                    "the training data changed since %s was saved (fingerprint %s, was %s); --force-data "
                    "goes on all the same",
                    st->path, print, value[4]);
    if (p->step >= o->steps)
        return fail(err, "the run in %s is finished: step %lld of %lld; give a larger --steps to continue it",
                    o->out, (long long)p->step, (long long)o->steps);
    return true;
}

// log_open: out/log.csv; a resumed run first drops the rows after its checkpoint.
static bool log_open(Trainer* t, bool resume, Error* err) {
    char path[4352], fresh[4352], line[512];
    snprintf(path, sizeof path, "%s/log.csv", t->settings->o.out);
    snprintf(fresh, sizeof fresh, "%s/log.csv.tmp", t->settings->o.out);
    FILE *old = resume ? fopen(path, "r") : NULL, *f = fopen(fresh, "w");
    if (!f) return fail(err, "%s: %s", fresh, strerror(errno));
    fprintf(f, "step,loss,lr,grad_norm,tokens_per_second,val_loss,val_bpb\n");
    while (old && fgets(line, sizeof line, old))
        if (isdigit((unsigned char)line[0]) && atoll(line) <= t->progress.step) fputs(line, f);
    if (old) fclose(old);
    if (fflush(f) != 0 || rename(fresh, path) != 0) return fail(err, "%s: %s", path, strerror(errno));
    t->log = f;
    return true;
}

// plot_loss: a picture of the log, when gnuplot is there. It never delays or fails a run by more than 20
// seconds.
static void plot_loss(const char* out) {
    if (strchr(out, '\'')) return;      // gnuplot's quote
    if (system("command -v gnuplot >/dev/null 2>&1") != 0) return;
    FILE* g = popen("timeout 20 gnuplot 2>/dev/null", "w");
    if (!g) return;
    fprintf(g,
            "set terminal png size 900,500\nset output '%s/loss.png'\nset datafile separator ','\nset grid\n"
            "set xlabel 'step'\nset ylabel 'loss (nats per token)'\n"
            "plot '%s/log.csv' using 1:2 with lines title 'training', '' using 1:6 with linespoints title "
            "'validation'\n",
            out, out);
    if (pclose(g) == 0) printf("plot: %s/loss.png\n", out);
}

static int lock_run(const char* out) {
    char path[4352], holder[64] = "another process";
    snprintf(path, sizeof path, "%s/.lock", out);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) die("%s: %s", path, strerror(errno));
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        ssize_t n = read(fd, holder, sizeof holder - 1);
        if (n > 0) holder[n] = 0;
        die("%s is in use by a running train_mamba (%s); wait for it or choose another --out", out, holder);
    }
    int n = snprintf(holder, sizeof holder, "pid %d", (int)getpid());
    if (ftruncate(fd, 0) != 0 || write(fd, holder, (size_t)n) != n) warn("%s: %s", path, strerror(errno));
    return fd;      // the kernel releases the lock when the process ends, however it ends
}
