// ---------------------------------------------------------------------------------------------------
// test_eval.h: data/evaluation.h. Texts and windows against a definition of one row per token, items against
// rows computed alone, metrics with numbers made by hand, and the program: results, refusals. That the
// definitions are those of lm-evaluation-harness is checked by dev/reference/check_eval.py. Then
// data/generation.h: many prompts in one batch, stop texts, turns.

// the most that a sum may differ when it is made in rows of another length; on the CPU only its own rounding
// does
double eval_limit;

// loss_at: the loss of token `at` of the ids after those from `begin` on, by a row of its own; *best: see
// token_best
double loss_at(Backend* b, const int* ids, size_t begin, size_t at, int* best) {
    static int targets[4096];
    static real loss[4096];
    static int bests[4096];
    size_t T = at - begin;
    for (size_t t = 0; t < T; t++) targets[t] = t + 1 < T ? -1 : ids[at];
    b->token_loss = loss;
    b->token_best = bests;
    b->forward(b, -1, ids + begin, targets, NULL, 1, T, 0);
    b->token_loss = NULL;
    b->token_best = NULL;
    if (best) *best = bests[T - 1];
    return loss[T - 1];
}

// eval_options: the options of a call of `eval`
Settings* eval_options(const char* text) {
    static Settings s;
    char copy[512], *argv[64];
    Error err;
    settings_free(&s);
    snprintf(copy, sizeof copy, "%s", text);
    must(settings_parse(&s, WORD_EVAL, split_words(copy, argv), argv, &err), &err);
    return &s;
}

// Catches: a token scored twice or never, a window one too long, a state that is lost or kept too long, end
// tokens that count, bytes of tokens that are not scored.
void test_eval_text(Backend* (*make)(Model*, size_t, size_t), const char* pattern) {
    enum { N = 97 };
    Config c = toy_config(pattern, 2, 12, 18, 5, 4, 2, 257);
    c.context = 200;
    Model m = toy_model(&c, false, 6);
    int ids[N + 1] = {256};
    unsigned char text[N];
    for (int i = 0; i < N; i++) ids[i + 1] = text[i] = (unsigned char)random_bits(40, 0, (uint64_t)i);
    cli_write("eval.txt", text, N, "wb");
    cli_write("more.txt", text, 30, "wb");
    Backend *b = make(&m, 1, N), *rows = make(&m, 1, N);
    Worst carried = {0, ""}, windows = {0, ""};
    double counted = 0;
    char options_text[200];
    const int window[][2] = {{0, 1}, {0, 7}, {0, 64}, {0, 500}, {200, 0}, {97, 5}, {96, 96}, {40, 13},
                             {16, 1}, {1, 1}};
    for (int k = 0; k < COUNT_OF(window); k++) {
        int W = window[k][0], S = window[k][1] ? window[k][1] : W;
        if (W) snprintf(options_text, sizeof options_text,
                        "--task text --batch-size 3 --window %d --stride %d", W, window[k][1]);
        else snprintf(options_text, sizeof options_text, "--task text --batch-size 1 --seq-len %d", S);
        Settings* s = eval_options(options_text);
        Error err;
        Data data;
        memset(&data, 0, sizeof data);
        tokenizer_bytes(&data.tokenizer);
        must(open_list(&data.train, scratch("eval.txt"), &data.tokenizer, &err), &err);
        Backend* own = make(&m, W ? 3 : 1, (size_t)(W ? W : S));
        TextScore score;
        must(evaluate_text(own, &data, &s->o, W ? 3 : 1, W ? W : S, &score, &err), &err);
        double expected = 0;
        for (size_t at = 1, done = 0; at <= N; at++) {          // token at - 1 of the text, in which window?
            size_t first = min_size(W ? (size_t)W : (size_t)N, N);
            if (at > first && (at - first - 1) % (size_t)S == 0) done = at - 1;
            size_t end = at <= first ? first : min_size(done + (size_t)S, N);
            size_t begin = W && end > (size_t)W ? end - (size_t)W : 0;
            expected += loss_at(rows, ids, begin, at, NULL);
        }
        worst_add(W ? &windows : &carried, fabs(score.loss - expected) / expected, "window %d, stride %d", W,
                  S);
        counted += score.tokens != N || score.bytes != N;
        own->destroy(own);
        dataset_close(&data.train);
    }
    // two files: two documents, each as if alone; their end tokens are not scored
    char list[400];
    Error err;
    Data data;
    memset(&data, 0, sizeof data);
    tokenizer_bytes(&data.tokenizer);
    snprintf(list, sizeof list, "%s\n%s", scratch("eval.txt"), scratch("more.txt"));
    must(open_list(&data.train, list, &data.tokenizer, &err), &err);
    TextScore score;
    double expected = 0;
    must(evaluate_text(b, &data, &eval_options("--task text --batch-size 1 --seq-len 50")->o, 1, 50, &score,
                       &err), &err);
    for (size_t at = 1; at <= N; at++) expected += loss_at(rows, ids, 0, at, NULL) * (at <= 30 ? 2 : 1);
    worst_add(&carried, fabs(score.loss - expected) / expected, "two files");
    counted += score.tokens != N + 30 || score.bytes != N + 30;
    dataset_close(&data.train);
    worst_report("state carried, passes of 1 to 500: loss = one row per token", &carried, eval_limit);
    worst_report("windows and strides: loss = one row per token", &windows, eval_limit);
    report("tokens or bytes miscounted", counted, 0);
    b->destroy(b);
    rows->destroy(rows);
    model_free(&m);
}

// Catches: padding that is seen, rows mixed up, a context cut elsewhere than the harness cuts it.
void test_eval_items(Backend* (*make)(Model*, size_t, size_t)) {
    Config c = toy_config("1m", 2, 12, 18, 5, 4, 2, 257);
    Model m = toy_model(&c, false, 6);
    // what the context and the choice become: white space at the end of the context goes to the choice
    static const struct { const char *line, *context, *choice; } pair[] = {
        {"{\"context\": \"ab\", \"choices\": [\"xyz\", \"p\"], \"gold\": 0}", "ab", " xyz"},
        {"{\"context\": \"ab \\n\\u3000\", \"choices\": [\"x\", \"p\"], \"gold\": 1}", "ab",
         " \n\xE3\x80\x80 x"},
        {"{\"context\": \"\", \"choices\": [\"x\", \"long enough\"], \"gold\": 0}", "", " x"},
        {"{\"context\": \" \\u00e9\", \"choices\": [\"\\u00e9\\u0000\", \"e\"], \"gold\": 0}", " \xC3\xA9",
         " \xC3\xA9"},
        {"{\"context\": \"a longer context than others have\", \"choices\": [\"x\", \" y\"], \"gold\": 1}",
         "a longer context than others have", " x"} };
    static const struct { const char *line, *context, *choice; } last[] = {
        {"{\"text\": \"one two  three.\"}", "one two", "  three."},
        {"{\"text\": \"word\", \"id\": 3}", "", " word"},
        {"{\"text\": \"two\\nlines here\"}", "two\nlines", " here"} };
    Backend* alone = make(&m, 1, 200);
    for (int lambada = 0; lambada < 2; lambada++) {
        int n = lambada ? COUNT_OF(last) : COUNT_OF(pair);
        for (int i = 0; i < n; i++) {
            const char* line = lambada ? last[i].line : pair[i].line;
            cli_write("items.jsonl", line, strlen(line), i ? "ab" : "wb");
            cli_write("items.jsonl", "\n\n", 2, "ab");
        }
        double miscounted = 0, split = 0, best = 0;
        Worst w = {0, ""}, batches = {0, ""};
        json_t* first = NULL;
        for (size_t B = 1; B < 12; B += 3) {
            char options_text[300];
            snprintf(options_text, sizeof options_text, "--task %s --data %s", lambada ? "lambada" : "choice",
                     scratch("items.jsonl"));
            const Options* o = &eval_options(options_text)->o;
            Tokenizer tok;
            tokenizer_bytes(&tok);
            Items f;
            Error err;
            int64_t T;
            must(items_open(&f, &tok, o, &T, &err), &err);
            Backend* b = make(&m, B, (size_t)T);
            Metrics sum;
            json_t* scores = json_array();
            must(evaluate_items(b, &f, B, (size_t)T, &sum, scores, &err), &err);
            miscounted += sum.items != n;
            for (int i = 0; first && i < n; i++)
                for (size_t k = 0; k < json_array_size(json_array_get(first, (size_t)i)); k++) {
                    double x = json_real_value(json_array_get(json_array_get(first, (size_t)i), k)),
                           y = json_real_value(json_array_get(json_array_get(scores, (size_t)i), k));
                    worst_add(&batches, fabs(x - y) / fabs(x), "item %d, choice %zu, batches of %zu", i, k,
                              B);
                }
            if (B == 1) {
                f.file = 0;
                double right = 0;
                for (int i = 0; i < n; i++) {
                    Item item;
                    if (!items_next(&f, &item, &err)) die("%s", err.text);
                    const char *context = lambada ? last[i].context : pair[i].context,
                               *choice = lambada ? last[i].choice : pair[i].choice;
                    int ids[200] = {256}, all = 1;
                    size_t k = strlen(context) ? strlen(context) : 1;
                    size_t e = strlen(choice) + (i == 3 && !lambada);
                    for (size_t j = 0; context[j]; j++) ids[j] = (unsigned char)context[j];
                    for (size_t j = 0; j < e; j++) ids[k + j] = (unsigned char)choice[j];
                    if (i == 3 && !lambada) split += item.choice[0].chars != 2 || item.choice[0].bytes != 3;
                    if (i == 2 && !lambada) split += item.choice[1].ids.n != 12;          // " long enough"
                    split += !same_ids(item.context.id, item.context.n, ids, k) ||
                             !same_ids(item.choice[0].ids.id, item.choice[0].ids.n, ids + k, e);
                    double score = 0;
                    for (size_t at = k; at < k + e; at++) {
                        int is;
                        score -= loss_at(alone, ids, 0, at, &is);
                        all = all && is;
                    }
                    right += all;
                    double found = json_real_value(json_array_get(json_array_get(scores, (size_t)i), 0));
                    worst_add(&w, fabs(found - score) / fabs(score), "item %d", i);
                    item_free(&item);
                }
                best = lambada ? sum.acc - right : 0;
                first = json_deep_copy(scores);
            }
            json_decref(scores);
            b->destroy(b);
            items_close(&f);
        }
        json_decref(first);
        worst_report(lambada ? "last words: log-likelihoods = one row per token"
                             : "choices: log-likelihoods = one row per token",
                     &w, eval_limit);
        report("contexts or choices cut elsewhere; greedy matches that differ", split + fabs(best), 0);
        worst_report("batches of 1 to 10 rows: log-likelihoods differ", &batches, eval_limit);
        report("items miscounted", miscounted, 0);
    }
    // token_best: against all logits, for a target that is the best, the second and the last
    int ids[3] = {1, 2, 0}, wrong = 0, n_best = 0;
    for (int t = 0; t < 264; t++) {
        int is;
        ids[2] = t;
        double loss = loss_at(alone, ids, 0, 2, &is), least = INFINITY;
        for (int v = 0; v < 264; v++) {
            ids[2] = v;
            least = fmin(least, loss_at(alone, ids, 0, 2, NULL));
            // one target has to be the best of all; the others, some of them
            if (t % 50) break;
        }
        if (t % 50 == 0) wrong += is != (loss <= least);
        n_best += is;
    }
    report("most likely tokens: wrong, or not one of 264", wrong + (n_best != 1), 0);
    // a row counts as most likely when all of its tokens do. Row k has another token than that at k, the last
    // row none
    int greedy[4][6] = {{1, 2}, {1, 2}, {1, 2}, {1, 2}};
    TokenList context = {ids, 2, 2};
    Choice row[4], *order[4];
    Error err;
    memset(row, 0, sizeof row);
    ids[0] = 1, ids[1] = 2;
    for (int k = 0; k < 4; k++) {
        for (size_t at = 2; at < 5; at++) {
            int is = 0, best = -1;
            for (int v = 0; v < 264 && !is; v++) {
                greedy[k][at] = best = v;
                loss_at(alone, greedy[k], 0, at, &is);
            }
            if ((int)at - 2 == k) greedy[k][at] = (best + 1) % 257;
        }
        row[k].ids.id = greedy[k] + 2;
        row[k].ids.n = 3;
        row[k].context = &context;
        order[k] = &row[k];
    }
    int room[2][16];
    Backend* four = make(&m, 4, 4);
    four->token_loss = (real*)test_alloc(16, sizeof(real));
    four->token_best = (int*)test_alloc(16, sizeof(int));
    must(choices_score(four, order, 4, room[0], room[1], &err), &err);
    report("greedy matches: wrong", row[0].best + row[1].best + row[2].best + !row[3].best, 0);
    four->destroy(four);
    alone->destroy(alone);
    model_free(&m);
}

// Metrics by hand. Catches: the wrong norm, ties, the first of a list taken for the best.
void test_eval_metrics(void) {
    Choice choice[3];
    memset(choice, 0, sizeof choice);
    const double score[3] = {-6, -8, -9}, chars[3] = {2, 4, 3}, bytes[3] = {2, 4, 9};
    for (int i = 0; i < 3; i++) {
        choice[i].score = score[i];
        choice[i].chars = chars[i];
        choice[i].bytes = bytes[i];
    }
    Item item = {{NULL, 0, 0}, choice, 3, 0};
    const int winner[3] = {0, 1, 2};             // -6 | -3, -2, -3 | -3, -2, -1
    double wrong = 0;
    for (int norm = 0; norm < 3; norm++)
        for (item.gold = 0; item.gold < 3; item.gold++)
            wrong += is_gold(&item, norm) != (winner[norm] == item.gold);
    choice[1].score = -6;                        // of equal ones the first
    item.gold = 1;
    wrong += is_gold(&item, 0);
    json_t* results = json_object();
    wrong += set_accuracy(results, "acc", 3, 4) != 0.75;
    // of 1, 1, 1, 0: 0.5 / 2
    wrong += fabs(json_real_value(json_object_get(results, "acc_stderr")) - 0.25) > 1e-12;
    json_decref(results);
    report("acc, acc_norm, acc_bytes, standard error: wrong", wrong, 0);
}

#define ITEMS "eval --from run --data items.jsonl --task "
static const struct { const char *line, *task, *words; } eval_bad[] = {
    {"", "choice", "items.jsonl: expected items as JSON lines, found none"},
    {"\n \n", "lambada", "found none"},
    {"{\"context\": \"a\"", "choice", "line 2: expected JSON"},
    {"not json", "lambada", "line 2: expected JSON"},
    {"{\"text\": \"a \xC3(\"}", "lambada", "line 2: expected JSON"},
    {"[1, 2]", "choice", "line 2: expected an object such as {\"context\""},
    {"7", "lambada", "line 2: expected an object such as {\"text\""},
    {"{\"choices\": [\"a\", \"b\"], \"gold\": 0}", "choice", "line 2: \"context\" is missing"},
    {"{\"context\": \"a\", \"gold\": 0}", "choice", "line 2: \"choices\" is missing"},
    {"{\"context\": \"a\", \"choices\": [\"a\", \"b\"]}", "choice", "line 2: \"gold\" is missing"},
    {"{\"context\": 3, \"choices\": [\"a\", \"b\"], \"gold\": 0}", "choice",
     "\"context\": expected a string"},
    {"{\"context\": \"a\", \"choices\": \"ab\", \"gold\": 0}", "choice",
     "\"choices\": expected a list of 2 to 1000 strings, found another"},
    {"{\"context\": \"a\", \"choices\": [\"a\"], \"gold\": 0}", "choice", "found fewer"},
    {"{\"context\": \"a\", \"choices\": [\"a\", 5], \"gold\": 0}", "choice",
     "choice 1: expected a string, found another type"},
    {"{\"context\": \"a\", \"choices\": [\"a\", \"\"], \"gold\": 0}", "choice",
     "choice 1: expected a string, found an empty one"},
    {"{\"context\": \"a\", \"choices\": [\"a\", \"b\"], \"gold\": 2}", "choice",
     "\"gold\": expected the number of the right choice, 0 to 1, found another number"},
    {"{\"context\": \"a\", \"choices\": [\"a\", \"b\"], \"gold\": -1}", "choice", "found another number"},
    {"{\"context\": \"a\", \"choices\": [\"a\", \"b\"], \"gold\": \"0\"}", "choice", "found another type"},
    {"{\"context\": \"a\", \"choices\": [\"a\", \"b\"], \"gold\": true}", "choice", "found another type"},
    {"{\"context\": \"a\", \"context\": \"b\", \"choices\": [\"a\", \"b\"], \"gold\": 0}", "choice",
     "line 2: expected JSON"},
    {"{\"id\": 1}", "lambada", "line 2: \"text\" is missing"},
    {"{\"text\": null}", "lambada", "\"text\": expected a string"},
    {"{\"text\": \"\"}", "lambada", "expected a word at the end, found no text"},
    {"{\"text\": \"two words \"}", "lambada", "expected a word at the end, found a blank"},
};

static const CliRow eval_options_bad[] = {
    {"eval --from run --task quiz --data a.txt", NULL, 1, "--task expects one of"},
    {"eval --from run --task lambada", NULL, 1, "--task lambada needs --data"},
    {"eval --from run --task choice --data nowhere.jsonl", NULL, 1, "nowhere.jsonl: cannot open"},
    {"eval --from run --task choice --data d_empty", NULL, 1, "expected a regular file, found a directory"},
    {"eval --from run --task choice --data fifo", NULL, 1, "found a FIFO"},
    {"eval --from run --task text --data a.txt --window 8 --stride 9", NULL, 1,
     "--stride 9 is larger than --window 8"},
    {"eval --from run --task text --data a.txt --stride 9", NULL, 1, "--stride needs --window"},
    {"eval --from run --task text --data a.txt --window 8 --seq-len 9", NULL, 1,
     "--seq-len has no meaning with --window"},
    {"eval --from run --data a.txt --window 8", NULL, 1, "--window has no meaning for --task loss"},
    {ITEMS "lambada --eval-batches 2", NULL, 1, "--eval-batches has no meaning for --task lambada"},
    {ITEMS "choice --seq-len 9", NULL, 1, "--seq-len has no meaning for --task choice"},
    {"eval --from run --task text --data empty.txt", NULL, 1, "the text has 1 tokens"},
    {"eval --from run --task text --data a.txt --results b.txt", NULL, 1, "b.txt: exists already"},
    {"eval --from run --task text --data a.txt --results nowhere/x.json", NULL, 1, "nowhere/x.json"},
    {"eval --from run --data a.txt --dump-logits b.txt", NULL, 1, "b.txt: exists already"},
    {"generate --from run --save-state b.txt --max-tokens 1", NULL, 1, "b.txt: exists and is no saved state"},
    {"--recompute maybe --steps 1", NULL, 1, "--recompute expects one of: off cheap on"},
    {"eval --from d_nan --task text --data a.txt", NULL, 1, "NaN"},
    {"eval --from run --task text --data a.txt --window 100000 --batch-size 1000000", NULL, 1, "memory"},
};

void test_eval_program(void) {
    cli_prepare();
    const char good[] = "{\"text\": \"fine words\", \"context\": \"a\", "
                        "\"choices\": [\"b\", \"c\"], \"gold\": 1}\n";
    for (int i = 0; i < COUNT_OF(eval_bad); i++) {
        char args[200];
        cli_write("items.jsonl", good, eval_bad[i].line[0] > ' ' ? strlen(good) : 0, "wb");
        cli_write("items.jsonl", eval_bad[i].line, strlen(eval_bad[i].line), "ab");
        snprintf(args, sizeof args, ITEMS "%s --results fresh.json", eval_bad[i].task);
        Finished f = cli_run(args);
        cli_check(f.code == 1 && cli_one_line(&f) && strstr(f.err, eval_bad[i].words) &&
                  !cli_exists("fresh.json") &&
                  f.out_size == 0, eval_bad[i].words, &f);
    }
    cli_group("items: each fault one line, no results file", COUNT_OF(eval_bad));
    cli_write("items.jsonl", good, strlen(good), "wb");
    cli_rows("eval: wrong options and files", eval_options_bad, COUNT_OF(eval_options_bad));
    static const char* const tasks[] = {"loss", "text", "lambada", "choice"};
    static const char* const keys[] = {"loss", "bits_per_byte", "perplexity", "acc_norm"};
    for (int i = 0; i < 4; i++) {
        char args[200], name[20];
        snprintf(name, sizeof name, "r%d.json", i);
        snprintf(args, sizeof args, "eval --from run --task %s --data %s --results %s", tasks[i],
                 i < 2 ? "a.txt" : "items.jsonl", name);
        Finished f = cli_run(args);
        json_t* results = json_load_file(scratch(name), 0, NULL);
        char temporary[40];
        snprintf(temporary, sizeof temporary, "%s.tmp", name);
        cli_check(f.code == 0 && f.err_size == 0 && json_is_number(json_object_get(results, keys[i])) &&
                  strcmp(json_string_value(json_object_get(results, "task")), tasks[i]) == 0 &&
                  !cli_exists(temporary),
                  args, &f);
        json_decref(results);
    }
    cli_group("results files: the task's figure is in each", 4);
}

// ---- generation: many prompts, stop texts, turns

// read_ids: sequence r of g reads these ids
void read_ids(Generation* g, size_t r, const unsigned char* text, size_t n) {
    volatile sig_atomic_t no = 0;
    Error err;
    Prompt p = prompt_open(g->tok, "", NULL);
    p.text = (const char*)text;
    p.left = n;
    must(generation_read(g, r, &p, &no, &err), &err);
    prompt_close(&p);
}

void write_all_of(Generation* g) {
    volatile sig_atomic_t no = 0;
    Error err;
    must(generation_write(g, &no, &err), &err);
}

// Catches: padding that a short prompt sees, random numbers of another row, a row that goes on after its end,
// a stop text found only inside one token, a turn that forgets the one before.
void test_generation(Backend* (*make)(Model*, size_t, size_t)) {
    Config c = toy_config("1m", 2, 12, 18, 5, 4, 2, 257);
    Model m = toy_model(&c, false, 6);
    // so that the text depends on what was read
    for (size_t i = 0; i < 257 * 12; i++) m.embedding[i] *= 20;
    Backend* b = make(&m, 0, 0);
    Tokenizer tok;
    tokenizer_bytes(&tok);
    unsigned char text[400];
    for (int i = 0; i < 400; i++) text[i] = (unsigned char)('!' + random_bits(41, 0, (uint64_t)i) % 90);
    static Settings s[4];
    const char* const how[] = {"--temperature 0", "--temperature 1 --repetition-penalty 1.2",
                               "--temperature 1 --stop @",
                               "--top-k 40 --chunk 7"};
    const size_t length[] = {1, 300, 0, 17, 64, 2, 256, 33};
    double differ = 0, bits = 0;
    Error err;
    for (int k = 0; k < 4; k++) {
        char copy[200], *argv[64];
        snprintf(copy, sizeof copy, "%s --raw --max-tokens 40", how[k]);
        must(settings_parse(&s[k], WORD_GENERATE, split_words(copy, argv), argv, &err), &err);
        for (size_t n = 2; n <= 8; n += 3) {
            Generation all = generation_open(b, &tok, &s[k].o, n);
            for (size_t r = 0; r < n; r++) all.utf8[r].raw = true, read_ids(&all, r, text + r, length[r]);
            write_all_of(&all);
            for (size_t r = 0; r < n; r++) {
                Generation one = generation_open(b, &tok, &s[k].o, 1);
                one.utf8[0].raw = true;
                read_ids(&one, 0, text + r, length[r]);
                write_all_of(&one);
                const Text *x = &all.text[r].kept, *y = &one.text[0].kept;
                differ += x->n != y->n || (x->n && memcmp(x->data, y->data, x->n)) ||
                    all.position[r] != one.position[0];
                size_t Vp = (size_t)c.vocab_padded;      // after as many steps, unless one of them went on
                if (!all.done[r] && !one.done[0] && (k > 0 || !b->greedy_begin))
                    bits += memcmp(all.logits + r * Vp, one.logits, Vp * sizeof(real)) != 0;
                generation_close(&one);
            }
            generation_close(&all);
        }
    }
    report("2, 5, 8 prompts of 0 to 300 tokens: texts differ from each alone", differ, 0);
    report("and logits in any bit", bits, 0);
    // two turns = one prompt of all that was read and written
    Generation turns = generation_open(b, &tok, &s[1].o, 1), once = generation_open(b, &tok, &s[1].o, 1);
    turns.utf8[0].raw = once.utf8[0].raw = true;
    read_ids(&turns, 0, text, 30);
    write_all_of(&turns);
    unsigned char whole[100];
    size_t n = turns.text[0].kept.n;
    memcpy(whole, text, 30);
    memcpy(whole + 30, turns.text[0].kept.data, min_size(n, 40));
    memcpy(whole + 30 + n, text + 30, 9);
    read_ids(&turns, 0, text + 30, 9);
    read_ids(&once, 0, whole, 39 + n);
    double apart = 0;
    for (int v = 0; v < 257; v++) apart = fmax(apart, fabs((double)turns.logits[v] - (double)once.logits[v]));
    report("a second turn: logits differ from one prompt of everything before it", apart, eval_limit);
    write_all_of(&turns);
    write_all_of(&once);
    size_t more = turns.text[0].kept.n - n;
    report("and its text", n != 40 || more < 10 || more != once.text[0].kept.n ||
               memcmp(turns.text[0].kept.data + n, once.text[0].kept.data, more) != 0, 0);
    generation_close(&turns);
    generation_close(&once);
    b->destroy(b);
    model_free(&m);
    for (int k = 0; k < 4; k++) settings_free(&s[k]);
}

// Stop texts over any pieces. Catches: one that begins in one token and ends in another, its overlap with
// itself.
void test_stop(void) {
    static const struct { const char *text, *stop, *expected; } row[] = {
        {"one END two", "END", "one "}, {"aaab", "aab", "a"}, {"ababac", "abac", "ab"},
        {"no stop EN", "END", "no stop EN"},
        {"END", "END", ""}, {"abc", "", "abc"}, {"x", "long stop text", "x"} };
    double wrong = 0;
    for (int i = 0; i < COUNT_OF(row); i++)
        for (size_t piece = 1; piece < 5; piece++) {
            Written w;
            memset(&w, 0, sizeof w);
            bool found = false;
            size_t n = strlen(row[i].text);
            for (size_t at = 0; at < n && !found; at += piece)
                found = written_add(&w, row[i].text + at, min_size(piece, n - at), row[i].stop);
            written_end(&w);
            wrong += found != (row[i].stop[0] && strstr(row[i].text, row[i].stop) != NULL);
            wrong += w.kept.n != strlen(row[i].expected) ||
                (w.kept.n && memcmp(w.kept.data, row[i].expected, w.kept.n));
            free(w.kept.data);
            free(w.waiting.data);
        }
    report("stop texts in pieces of 1 to 4 bytes: wrong", wrong, 0);
}

// ---- files of documents, items and prompts that ask for memory: at most twice the file and 16 MiB

enum { LARGE_ITEMS, LARGE_PROMPTS, LARGE_DOCUMENTS };
typedef struct {
    const char* name;
    int kind;
    const char *start, *unit, *end;      // n units
    size_t n;
    const char* words;
    size_t lines;                        // how often all this
} LargeRow;
static const LargeRow large_rows[] = {
    {"2^20 prompts of a letter", LARGE_PROMPTS, "", "a\n", "", 1 << 20, NULL, 1},
    {"one more", LARGE_PROMPTS, "", "a\n", "b", 1 << 20, "line 1048577: more than 1048576 prompts", 1},
    {"a prompt of 40 MB", LARGE_PROMPTS, "", "many tokens ", "", 40000000 / 12, NULL, 1},
    {"an empty line of 40 MB", LARGE_PROMPTS, "", "\r", "", 40000000, "found none", 1},
    {"JSON prompts", LARGE_PROMPTS, "{\"x\": 1, \"prompt\": \"begin\"}\n", "{\"prompt\": \"a\"}\n", "",
     500000, NULL, 1},
    {"a JSON prompt of 500 kB", LARGE_PROMPTS, "{\"prompt\": \"", "\\u0041", "\"}", 500000 / 6, NULL, 1},
    {"a JSON prompt of 600 kB", LARGE_PROMPTS, "{\"prompt\": \"", "\\u0041", "\"}", 600000 / 6,
     "line 1: expected at most 524288 bytes and 4096 values in a line of JSON, found 600014 and 2 or more",
     1},
    {"numbers", LARGE_PROMPTS, "{\"prompt\": \"a\", \"x\": [0", ",0", "]}", 200000,
     "found 400025 and 200005", 1},
    {"brackets", LARGE_PROMPTS, "{\"prompt\": \"a\", \"x\": ", "[", "", 4000, "line 1: expected JSON", 1},
    {"objects", LARGE_PROMPTS, "{\"prompt\": \"a\", \"x\": ", "{\"\":", "", 200000,
     "values in a line of JSON", 1},
    {"items: 20 choices after 500 kB", LARGE_ITEMS, "{\"gold\": 1, \"choices\": [\"a\", \"b\", \"c\", "
     "\"d\", \"e\", \"f\", \"g\", \"h\", \"i\", \"j\", \"k\", \"l\", \"m\", \"n\", \"o\", \"p\", \"q\", "
     "\"r\", \"s\", \"t\"], "
     "\"context\": \"", "many words ", "\"}", 500000 / 11, NULL, 1},
    {"items: 1000 choices", LARGE_ITEMS,
     "{\"gold\": 1, \"context\": \"a long one, that stands in front of all of "
     "these, and would be kept a thousand times\", \"choices\": [\"a\"", ",\"b\"", "]}", 999, NULL, 1},
    {"items: 1001 choices", LARGE_ITEMS, "{\"gold\": 1, \"context\": \"\", \"choices\": [\"a\"", ",\"b\"",
     "]}", 1000, "found more", 1},
    {"items: numbers", LARGE_ITEMS, "{\"gold\": 1, \"choices\": [0", ",0", "]}", 250000, "values in a line",
     1},
    {"items: empty lines", LARGE_ITEMS, "", " \n\r\n", "", 5000000, "found none", 1},
    {"documents of a letter", LARGE_DOCUMENTS, "", "{\"text\": \"a\"}\n", "", 1 << 20, NULL, 1},
    {"documents of words", LARGE_DOCUMENTS, "{\"text\": \"", "many words ", "\"}\n", 520000 / 11, NULL, 9},
    {"documents of one word", LARGE_DOCUMENTS, "{\"text\": \"", "qzxjzaa", "\"}\n", 520000 / 7, NULL, 1},
    {"documents that merge well", LARGE_DOCUMENTS, "{\"text\": \"", "the", "\"}\n", 520000 / 3, NULL, 2},
    {"documents of marks", LARGE_DOCUMENTS, "{\"text\": \"a", "\xCC\x81", "\"}\n", 520000 / 2, NULL, 1},
    {"documents of escapes", LARGE_DOCUMENTS, "{\"text\": \"", "\\ud83d\\ude00", "\"}\n", 520000 / 12, NULL,
     9},
    {"a document of 600 kB", LARGE_DOCUMENTS, "{\"text\": \"", "many words ", "\"}", 600000 / 11,
     "line 1: expected at most 524288 bytes and 4096 values in a line of JSON, found 6000", 1},
    {"a document of 600 kB in a file of 20 MB", LARGE_DOCUMENTS, "{\"text\": \"", "qzxjzaa", "\"}\n",
     600000 / 7, NULL, 33},
    {"a line of 40 MB", LARGE_DOCUMENTS, "\n{\"text\": \"", "\\u0041", "\"}", 40000000 / 6,
     "line 2: expected at most 12500", 1},
    {"an empty line of 40 MB", LARGE_DOCUMENTS, "", " ", "\n{\"text\": \"a\"}", 40000000,
     "line 1: expected", 1},
    {"documents with brackets", LARGE_DOCUMENTS, "{\"text\": \"a\", \"x\": ", "[", "\n", 4000,
     "line 1: expected JSON", 9},
    {"documents with objects", LARGE_DOCUMENTS, "{\"x\": ", "{\"\":", "\n", 100000, "values in a line", 9},
    {"documents with numbers", LARGE_DOCUMENTS, "{\"text\": \"a\", \"x\": [0", ",0", "]}\n", 2000, NULL, 999},
    {"documents with more numbers", LARGE_DOCUMENTS, "{\"text\": \"a\", \"x\": [0", ",0", "]}\n", 200000,
     "line 1: expected at most 524288 bytes and 4096 values in a line of JSON, found 400023 and 200005", 9},
};

typedef struct { const LargeRow* row; const char *path, *tokenizer; } LargeCase;

static bool large_count(void* count, const int* ids, size_t n, int64_t at, Error* err) {
    (void)ids, (void)at, (void)err;
    *(size_t*)count += n;
    return true;
}

static bool large_documents(const char* path, const Tokenizer* tok, size_t size, Error* err) {
    struct stat st;
    size_t n = 0;
    TextFile f = text_file(path, open_regular(path, &st, err), (int64_t)size, tok, tok->eos);
    return text_file_tokens(&f, large_count, &n, err) && n > 0;
}

static void large_case(void* arg) {
    const LargeCase* c = (const LargeCase*)arg;
    const LargeRow* r = c->row;
    struct stat info;
    Error err = {""};
    if (stat(c->path, &info) != 0) exit(1);
    Tokenizer tok;
    Options o;
    PromptList list;
    Items f;
    int64_t T;
    memset(&o, 0, sizeof o);
    if (c->tokenizer) tok = tokenizer_or_die(c->tokenizer);
    else tokenizer_bytes(&tok);
    o.data = c->path, o.task = "choice";
    limit_memory((size_t)info.st_size);
    bool ok = r->kind == LARGE_PROMPTS ? prompts_read(&list, c->path, &err)
              : r->kind == LARGE_ITEMS ? items_open(&f, &tok, &o, &T, &err)
                                       : large_documents(c->path, &tok, (size_t)info.st_size, &err);
    if (ok && r->kind == LARGE_PROMPTS) ok = list.start[list.n] <= (size_t)info.st_size + 1;
    if (r->words ? !ok && one_line(err.text, r->words) : ok) return;
    fprintf(stderr, "expected \"%s\", found \"%s\"", r->words ? r->words : "loads", err.text);
    exit(1);
}

void test_large_lines(void) {
    static const char* const tokenizers[] = {NULL, TOKENIZER_FIXTURES "neox", TOKENIZER_FIXTURES "llama"};
    int failed = 0;
    for (int i = 0; i < COUNT_OF(large_rows); i++) {
        const LargeRow* r = &large_rows[i];
        size_t unit = strlen(r->unit), start = strlen(r->start), lines = r->lines;
        size_t line = start + r->n * unit + strlen(r->end);
        char *text = (char*)malloc(line * lines + 1), *p = text + start, message[4096] = "";
        strcpy(text, r->start);
        for (size_t k = 0; k < r->n; k++, p += unit) memcpy(p, r->unit, unit);
        strcpy(p, r->end);
        for (size_t k = 1; k < lines; k++) memcpy(text + k * line, text, line);
        bool plain = r->kind == LARGE_PROMPTS && r->start[0] != '{';
        LargeCase c = {r, scratch(plain ? "large.txt" : "large.jsonl"), NULL};
        file_put(c.path, text, line * lines);
        free(text);
        for (int t = 0; t < (r->kind == LARGE_PROMPTS ? 1 : 3); t++) {
            c.tokenizer = tokenizers[t];
            int code = in_child(large_case, &c, message, sizeof message);
            if (code)
                fprintf(stderr, "  large row \"%s\", %s: exit code %d: %s\n", r->name,
                        c.tokenizer ? c.tokenizer : "bytes", code, message);
            failed += code != 0;
        }
    }
    report("large files of documents, items and prompts", failed, 0);
}

static const CliRow generate_bad[] = {
    {"generate --from run --prompts nowhere.txt", NULL, 1, "nowhere.txt: cannot open"},
    {"generate --from run --prompts empty.txt", NULL, 1, "expected a prompt in every line, found none"},
    {"generate --from run --prompts newlines.txt", NULL, 1, "found none"},
    {"generate --from run --prompts d_empty", NULL, 1, "found a directory"},
    {"generate --from run --prompts bad.jsonl", NULL, 1, "bad.jsonl: line 2: expected JSON"},
    {"generate --from run --prompts field.jsonl", NULL, 1,
     "line 1: expected an object with a string \"prompt\", found none"},
    {"generate --from run --prompts type.jsonl", NULL, 1, "found another type"},
    {"generate --from run --prompts a.txt --prompt x", NULL, 1, "--prompts: leave out"},
    {"generate --from run --prompts a.txt --save-state s", NULL, 1, "--prompts: leave out"},
    {"generate --from run --interactive --num-samples 2", NULL, 1, "--interactive: leave out"},
    {"generate --from run --interactive --prompt -", NULL, 1, "--interactive: leave out"},
    {"eval --from run --interactive --data a.txt", NULL, 1, "--interactive is an option of 'generate'"},
};

// lines_of: how many lines begin with this
int lines_of(const char* text, const char* start) {
    int n = 0;
    for (const char* p = text; p; p = strchr(p, '\n') ? strchr(p, '\n') + 1 : NULL)
        n += strncmp(p, start, strlen(start)) == 0;
    return n;
}

void test_generate_program(void) {
    cli_write("bad.jsonl", "{\"prompt\": \"x\"}\n{\"prompt\": \"x\n", 30, "wb");
    cli_write("field.jsonl", "{\"text\": \"x\"}\n", 14, "wb");
    cli_write("type.jsonl", "{\"prompt\": 3}\n", 14, "wb");
    cli_write("p.jsonl", "{\"prompt\": \"the quick\"}\n\n{\"prompt\": \"brown fox jumps\"}\n", 55, "wb");
    cli_write("p.txt", "the quick\r\n\nbrown fox jumps", 27, "wb");
    cli_rows("prompts, turns: wrong options and files", generate_bad, COUNT_OF(generate_bad));
    Finished a = cli_run("generate --from run --prompts p.jsonl --max-tokens 20 --num-samples 2"),
             b = cli_run("generate --from run --prompts p.txt --max-tokens 20 --num-samples 2");
    cli_check(a.code == 0 && a.out_size > 60 && a.out_size == b.out_size &&
              memcmp(a.out, b.out, a.out_size) == 0 &&
              lines_of(a.out, "--- prompt 2, sample 2") == 1 && strstr(a.err, "prompt: 24 tokens"),
              "the same prompts in a text and in JSON lines", &a);
    Launch l;
    memset(&l, 0, sizeof l);
    l.args = "generate --from run --interactive --max-tokens 5 --prompt begin --temperature 1";
    l.input = "p.txt";
    a = cli_wait(cli_start(&l), 5);
    cli_check(a.code == 0 && lines_of(a.out, "") >= 4 && strstr(a.err, "prompt: 29 tokens") &&
              strstr(a.err, "new: 15 tokens"), "turns from a pipe: three lines, ends with the input", &a);
    l.output = "/dev/full";
    a = cli_wait(cli_start(&l), 5);
    cli_check(a.code == 1 && cli_one_line(&a) && strstr(a.err, "No space"), "turns into /dev/full: one line",
              &a);
    cli_group("prompts and turns of the program", 3);
}

Backend* eval_cpu(Model* m, size_t B, size_t T) {
    Backend* b = (Backend*)test_alloc(1, sizeof(Backend));
    *b = backend_cpu(m, B, T, false, RECOMPUTE_NONE);
    return b;
}

void test_eval(void) {
    scratch("x");
    eval_limit = 1e-14;
    test_eval_text(eval_cpu, "1m");
    test_eval_text(eval_cpu, "1am");
    test_eval_items(eval_cpu);
    test_eval_metrics();
    test_eval_program();
    test_generation(eval_cpu);
    test_stop();
    test_generate_program();
    test_large_lines();
}

#ifdef __CUDACC__
Backend* eval_gpu(Model* m, size_t B, size_t T) {
    Backend* b = (Backend*)test_alloc(1, sizeof(Backend));
    *b = backend_cuda_of<float>(m, B, T, false, RECOMPUTE_NONE);
    b->upload(b);
    return b;
}

void test_cuda_eval(void) {
    if (!gpu_present()) return;
    scratch("x");
    eval_limit = 1e-5;
    test_eval_text(eval_gpu, "1m");
    test_eval_items(eval_gpu);
    test_generation(eval_gpu);
}
#endif
