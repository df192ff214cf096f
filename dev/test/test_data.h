// ---------------------------------------------------------------------------------------------------
// test_data.h: data/dataloader.h and the byte tokenizer. Which tokens a batch holds (each sample once per
// epoch, the same for any split into micro-batches and processes, streams that go on where they stopped),
// data files of many sources and damaged ones, files beyond 4 GiB, bytes to text and back.
// Token shards whose token i has the value i show where every row was cut.

// data_shard: header and n tokens, token i has the id i mod `modulus`; width 2 or 4
void data_shard(const char* name, int width, uint32_t n, uint32_t modulus) {
    size_t size = 1024 + (size_t)n * (size_t)width;
    unsigned char* file = (unsigned char*)xcalloc(size, 1);
    uint32_t header[3] = { width == 2 ? 20240520u : 20240801u, width == 2 ? 1u : 7u, n };
    memcpy(file, header, sizeof header);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t id = i % modulus;
        uint16_t id16 = (uint16_t)id;
        memcpy(file + 1024 + (size_t)i * (size_t)width, width == 2 ? (void*)&id16 : (void*)&id,
               (size_t)width);
    }
    file_put(scratch(name), file, size);
    free(file);
}

Tokenizer data_ids(int64_t vocab_size) {
    Tokenizer t = { TOKENIZER_NONE, vocab_size, -1, NULL };
    return t;
}

void data_open_or_die(Dataset* d, const char* name, const Tokenizer* t) {
    Error err;
    char* path = (char*)scratch(name);
    if (!dataset_open(d, &path, 1, t, &err)) die("%s", err.text);
}

Loader data_loader(const Dataset* d, int64_t T) {
    Loader l;
    memset(&l, 0, sizeof l);
    l.data = d;
    l.seq_len = T;
    l.seed = 1337;
    l.eos = d->eos;
    l.world = 1;
    return l;
}

// ---- permutation: every index once, for several n; every place equally likely for element 0

void test_permute(void) {
    const uint64_t sizes[] = { 1, 2, 3, 4, 5, 7, 16, 17, 64, 65, 1000, 4096, 4097, 100003 };
    double wrong = 0, moved = 0;
    for (int s = 0; s < 14; s++) {
        for (uint64_t key = 0; key < 3; key++) {
            uint64_t n = sizes[s];
            char* seen = (char*)xcalloc(n, 1);
            for (uint64_t i = 0; i < n; i++) {
                uint64_t j = permute(i, n, key);
                if (j >= n || seen[j]++) wrong++;
                if (n == 100003 && j != i) moved++;
            }
            free(seen);
        }
    }
    report("permute: a bijection for 14 sizes x 3 keys", wrong, 0);
    report("permute: elements left in place (1 expected per key)", 3.0 * 100003 - moved, 15);
    double worst = 0;    // chi-square of the place of element 0 over 7000 keys, 6 degrees of freedom
    for (uint64_t i = 0; i < 7; i++) {
        double count[7] = { 0 }, chi2 = 0;
        for (uint64_t key = 0; key < 7000; key++) count[permute(i, 7, random_bits(5, STREAM_SHUFFLE, key))]++;
        for (int k = 0; k < 7; k++) chi2 += (count[k] - 1000) * (count[k] - 1000) / 1000;
        if (!(chi2 <= worst)) worst = chi2;
    }
    report("permute: chi-square of places, 6 degrees of freedom", worst, 30);
}

// ---- shuffled mode: each window of the epoch once, on the epoch's grid, and targets one token later

void test_shuffled(void) {
    const int64_t lengths[] = { 1, 7, 64 }, extra[] = { 1, 2, 6, 64, 65, 127, 128, 129, 200, 1000, 3001 };
    double wrong = 0, orders = 0, offsets = 0, reach = 0;
    for (int a = 0; a < 3; a++) {
        for (int b = 0; b < 11; b++) {
            int64_t T = lengths[a], n = T + extra[b];
            Dataset d;
            Tokenizer t = data_ids(65536);
            data_shard("count.bin", 2, (uint32_t)n, 65536);
            data_open_or_die(&d, "count.bin", &t);
            Loader l = data_loader(&d, T);
            int64_t samples = loader_samples(&l), first_order = -1, first_offset = -1, fitting = (n - 1) / T;
            if (samples != (fitting > 1 ? fitting - 1 : 1)) wrong++;         // one less leaves room to shift
            char* seen = (char*)xcalloc((size_t)n, 1);
            char* trained = (char*)xcalloc((size_t)n, 1);
            int row[2 * 64];
            bool fresh;
            Error err;
            for (int64_t epoch = 0; epoch < 40; epoch++) {
                int64_t offset = -1;
                memset(seen, 0, (size_t)n);
                for (int64_t i = 0; i < samples; i++) {
                    fresh = false;
                    if (!loader_batch(&l, epoch * samples + i, 1, row, row + T, NULL, &fresh, &err))
                        die("%s", err.text);
                    if (offset < 0) offset = row[0] % T;
                    if (!fresh || row[0] % T != offset || seen[row[0]]++) wrong++;
                    for (int64_t k = 0; k < T; k++) {
                        if (row[k] != row[0] + k || row[T + k] != row[0] + k + 1) wrong++;
                        trained[row[T + k]] = 1;
                    }
                    if (i == 0 && samples > 20) orders += first_order >= 0 && row[0] / T != first_order;
                    if (i == 0 && first_order < 0) first_order = row[0] / T;
                }
                if (T == 64 && n == 3065) offsets += first_offset >= 0 && offset != first_offset;
                if (first_offset < 0) first_offset = offset;
            }
            if (T == 7) for (int64_t i = 1; i < n; i++) reach += !trained[i];
            free(seen);
            free(trained);
            dataset_close(&d);
        }
    }
    report("shuffled: every window once per epoch, 33 shapes x 40 epochs", wrong, 0);
    report("shuffled: epochs with another order (1/changes)", 1 / (orders + 1e-9), 0.01);
    report("shuffled: epochs with another offset (1/changes)", 1 / (offsets + 1e-9), 0.04);
    report("shuffled: tokens never reached in 40 epochs", reach, 0);
}

// ---- the stream of rows does not depend on how a batch of 8 is split over micro-batches and ranks

void test_batch_split(void) {
    enum { T = 16, STEPS = 20, GLOBAL = 8, ROW = 3 * T };
    double wrong = 0;
    Tokenizer t = data_ids(257);
    Dataset d;
    Error err;
    t.eos = 5;
    data_shard("split.bin", 4, 1501, 257);
    data_open_or_die(&d, "split.bin", &t);
    int* expected = (int*)xcalloc(STEPS * GLOBAL * ROW, sizeof(int));
    int* found = (int*)xcalloc(STEPS * GLOBAL * ROW, sizeof(int));
    for (int mode = 0; mode < 2; mode++) {
        const int split[][2] = { { 8, 1 }, { 4, 1 }, { 2, 1 }, { 1, 1 }, { 4, 2 },
                                 { 2, 2 }, { 1, 4 }, { 2, 4 }, { 1, 8 } };
        for (int s = 0; s < 9; s++) {
            int rows = split[s][0], world = split[s][1];
            memset(found, -1, (size_t)(STEPS * GLOBAL * ROW) * sizeof(int));
            for (int64_t counter = 0; counter < STEPS * GLOBAL; counter += rows * world) {
                for (int rank = 0; rank < world; rank++) {
                    Loader l = data_loader(&d, T);
                    int in[8 * T], target[8 * T], doc[8 * T];
                    bool fresh[8];
                    l.sequential = mode == 1;
                    l.streams = GLOBAL;
                    l.rank = rank;
                    l.world = world;
                    if (!loader_batch(&l, counter, rows, in, target, doc, fresh, &err)) die("%s", err.text);
                    for (int i = 0; i < rows; i++) {
                        int* row = found + (counter + i * world + rank) * ROW;
                        memcpy(row, in + i * T, T * sizeof(int));
                        memcpy(row + T, target + i * T, T * sizeof(int));
                        memcpy(row + 2 * T, doc + i * T, T * sizeof(int));
                        row[2 * T] += 1000 * fresh[i];
                    }
                }
            }
            if (s == 0) memcpy(expected, found, (size_t)(STEPS * GLOBAL * ROW) * sizeof(int));
            if (memcmp(expected, found, (size_t)(STEPS * GLOBAL * ROW) * sizeof(int)) != 0) wrong++;
        }
    }
    report("batch 8x1 = 4x2 = 2x4 = 1x8, ranks 1, 2, 4, 8, both modes", wrong, 0);
    free(expected);
    free(found);
    dataset_close(&d);
}

// ---- sequential mode: every stream walks its own part without gaps and restarts from zero

void test_sequential(void) {
    const int64_t streams[] = { 1, 2, 3, 8 }, lengths[] = { 1, 5, 32 };
    double wrong = 0;
    for (int a = 0; a < 12; a++) {
        int64_t S = streams[a / 3], T = lengths[a % 3];
        for (int64_t n = S * T + 1; n <= S * T * 3 + 3; n += S * T > 20 ? 17 : 1) {
            Dataset d;
            Tokenizer t = data_ids(65536);
            Error err;
            data_shard("walk.bin", 2, (uint32_t)n, 65536);
            data_open_or_die(&d, "walk.bin", &t);
            Loader l = data_loader(&d, T);
            l.sequential = true;
            l.streams = S;
            int64_t steps = loader_samples(&l) / S, part = (n - 1) / S, next[8] = { 0 };
            if (steps < 1 || steps != part / T) wrong++;
            for (int64_t step = 0; step < 3 * steps; step++) {
                int in[8 * 32], target[8 * 32];
                bool fresh[8];
                if (!loader_batch(&l, step * S, S, in, target, NULL, fresh, &err)) die("%s", err.text);
                for (int64_t s = 0; s < S; s++) {
                    int64_t first = in[s * T], last = target[s * T + T - 1];
                    if (fresh[s] != (step % steps == 0)) wrong++;
                    if (!fresh[s] && first != next[s]) wrong++;
                    if (first < s * part || last > (s + 1) * part || last != first + T) wrong++;
                    next[s] = last;
                }
            }
            dataset_close(&d);
        }
    }
    report("sequential: parts contiguous, disjoint, fresh at the start", wrong, 0);
}

// ---- text files: end token in front of each, document ids, split

void test_documents(void) {
    const char* const names[] = { "a.txt", "b.txt", "c.txt", "d.txt" };
    const char* const texts[] = { "ab", "", "c\0\xFF", "defgh" };
    const size_t sizes[] = { 2, 0, 3, 5 };
    const int expected[] = { 256, 'a', 'b', 256, 256, 'c', 0, 0xFF, 256, 'd', 'e', 'f', 'g', 'h' };
    double wrong = 0, doc_wrong = 0;
    Tokenizer t;
    Dataset d, val;
    Error err;
    int ids[14], in[28], target[28], doc[28];
    tokenizer_bytes(&t);
    for (int i = 3; i >= 0; i--) file_put(scratch(names[i]), texts[i], sizes[i]);
    char* pattern = (char*)scratch("[a-d].txt");
    if (!dataset_open(&d, &pattern, 1, &t, &err)) die("%s", err.text);
    wrong += d.n_tokens != 14;
    for (int pos = 0; pos <= 14; pos++) {
        for (int n = 0; n <= 14 - pos; n++) {
            if (!dataset_read(&d, pos, n, ids, &err) || memcmp(ids, expected + pos, (size_t)n * sizeof(int)))
                wrong++;
        }
    }
    report("text: pattern sorted, end token in front, all ranges", wrong, 0);
    Loader l = data_loader(&d, 6);                       // 13 targets: two windows of 6 and a short one
    for (int samples = 1; samples <= 3; samples++) {
        for (int i = 0; i < 28; i++) in[i] = target[i] = doc[i] = -7;
        if (!loader_eval_batch(&l, 0, samples, in, target, doc, &err)) die("%s", err.text);
        const int docs[] = { 1, 1, 1, 2, 3, 3, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0 };
        for (int i = 0; i < 6 * samples; i++) {
            int next = i < 13 ? expected[i + 1] : -1;
            doc_wrong += doc[i] != docs[i] || target[i] != next || in[i] != (i < 13 ? expected[i] : 0);
        }
        doc_wrong += in[6 * samples] != -7 || target[6 * samples] != -7 || doc[6 * samples] != -7;
    }
    l.eos = -1;
    if (!loader_eval_batch(&l, 0, 2, in, target, doc, &err)) die("%s", err.text);
    for (int i = 0; i < 12; i++) doc_wrong += doc[i] != 0;
    report("documents: id rises at the end token, 0 at a row's start", doc_wrong, 0);

    double split_wrong = 0;
    split_wrong += dataset_split(&d, 0, &val) || dataset_split(&d, 1, &val) || dataset_split(&d, 0.01, &val)
                 || dataset_split(&d, NAN, &val) || d.n_tokens != 14;
    split_wrong += !dataset_split(&d, 0.3, &val) || d.n_tokens != 10 || val.n_tokens != 4;
    split_wrong += !dataset_read(&val, 0, 4, ids, &err) || memcmp(ids, expected + 10, 4 * sizeof(int)) != 0;
    split_wrong += !dataset_read(&d, 7, 3, ids, &err) || memcmp(ids, expected + 7, 3 * sizeof(int)) != 0;
    dataset_close(&val);
    split_wrong += !dataset_read(&d, 0, 3, ids, &err);
    report("split: last tokens, shared files", split_wrong, 0);
    dataset_close(&d);

    double name_wrong = 0;    // a name with pattern letters that exists is that file
    file_put(scratch("[x].txt"), "yy", 2);
    file_put(scratch("x.txt"), "zzz", 3);
    data_open_or_die(&d, "[x].txt", &t);
    name_wrong += d.n_tokens != 3;
    dataset_close(&d);
    char* single = (char*)scratch("[a]*.txt");
    if (!dataset_open(&d, &single, 1, &t, &err)) die("%s", err.text);
    name_wrong += d.n_tokens != 3;
    dataset_close(&d);
    report("text: a file named like a pattern, a pattern for one file", name_wrong, 0);
}

// ---- many small sources: any range across them; end token 0; the fingerprint of shards

void test_many_sources(void) {
    enum { FILES = 11, MAX = 200 };
    double wrong = 0;
    Dataset d;
    Error err;
    Tokenizer t = data_ids(1000);
    char* paths[FILES];
    char names[FILES][160];
    int expected[MAX], ids[MAX], n = 0;
    for (int i = 0; i < FILES; i++) {
        char name[32];
        uint32_t count = (uint32_t)(1 + (i * 5) % 7);
        snprintf(name, sizeof name, "part%d.bin", i);
        snprintf(names[i], sizeof names[i], "%s", scratch(name));
        paths[i] = names[i];
        data_shard(name, i % 2 ? 4 : 2, count, 1000);
        for (uint32_t k = 0; k < count; k++) expected[n++] = (int)k;
    }
    t.eos = 0;
    if (!dataset_open(&d, paths, FILES, &t, &err)) die("%s", err.text);
    wrong += d.n_tokens != n;
    for (int pos = 0; pos <= n; pos++) {
        for (int count = 0; count <= n - pos; count++) {
            wrong += !dataset_read(&d, pos, count, ids, &err) ||
                     memcmp(ids, expected + pos, (size_t)count * sizeof(int));
        }
    }
    Loader l = data_loader(&d, n - 1);
    int in[MAX], target[MAX], doc[MAX], id = 0;
    wrong += !loader_eval_batch(&l, 0, 1, in, target, doc, &err);
    for (int i = 0; i < n - 1; i++) wrong += doc[i] != (id += expected[i] == 0);
    uint64_t base = dataset_fingerprint(&d);
    dataset_close(&d);
    data_shard("part10.bin", 2, 1 + (10 * 5) % 7, 1);
    if (!dataset_open(&d, paths, FILES, &t, &err)) die("%s", err.text);
    wrong += base == dataset_fingerprint(&d);
    Dataset val;
    wrong += !dataset_split(&d, 1.01 / n, &val) || val.n_tokens != 1;
    Loader one = data_loader(&val, 8);
    wrong += loader_eval_samples(&one) != 0 || loader_eval_batch(&one, 0, 1, in, target, NULL, &err) ||
             !strstr(err.text, "validation data has 1 tokens, expected at least 2");
    dataset_close(&d);
    report("eleven shards: all ranges, end token 0, fingerprint", wrong, 0);
}

// ---- validation: every target exactly once, for all lengths and ranks

void test_validation(void) {
    double wrong = 0;
    for (int64_t n = 2; n < 80; n += n < 20 ? 1 : 13) {
        for (int64_t T = 1; T <= 24; T += T < 9 ? 1 : 5) {
            for (int world = 1; world <= 3; world++) {
                Dataset d;
                Tokenizer t = data_ids(65536);
                Error err;
                int count[80] = { 0 };
                data_shard("val.bin", 2, (uint32_t)n, 65536);
                data_open_or_die(&d, "val.bin", &t);
                Loader l = data_loader(&d, T);
                l.world = world;
                int in[3 * 24], target[3 * 24];
                for (int64_t counter = 0; counter < loader_eval_samples(&l); counter += 3 * world) {
                    for (l.rank = 0; l.rank < world; l.rank++) {
                        if (!loader_eval_batch(&l, counter, 3, in, target, NULL, &err)) die("%s", err.text);
                        for (int i = 0; i < 3 * T; i++) {
                            if (target[i] < 0) continue;
                            if (target[i] != in[i] + 1) wrong++;
                            count[target[i]]++;
                        }
                    }
                }
                for (int i = 0; i < n; i++) wrong += count[i] != (i > 0);
                dataset_close(&d);
            }
        }
    }
    report("validation: every target exactly once", wrong, 0);
}

// ---- hostile data files: one line with the expected words, exit code 1

typedef struct {
    const char* name;
    int kind;                            // tokenizer the file is opened with
    int64_t T;                           // > 0: also ask for one batch
    const char* words;                   // must occur in the error line; NULL: the file must be accepted
} HostileData;

void open_hostile(void* arg) {
    const HostileData* h = (const HostileData*)arg;
    Dataset d;
    Error err;
    Tokenizer t;
    int in[128], target[128];
    char* path = (char*)scratch(h->name);
    tokenizer_bytes(&t);
    if (h->kind == TOKENIZER_NONE) t = data_ids(1000);
    if (!dataset_open(&d, &path, strcmp(h->name, "nothing") != 0, &t, &err)) die("%s", err.text);
    Loader l = data_loader(&d, h->T);
    l.sequential = h->T == 3;
    l.streams = 4;
    if (h->T > 0 && !loader_batch(&l, 0, 1, in, target, NULL, NULL, &err)) die("%s", err.text);
    dataset_close(&d);
}

void data_header(const char* name, uint32_t magic, uint32_t version, uint32_t n, size_t size) {
    unsigned char file[2048] = { 0 };
    uint32_t header[3] = { magic, version, n };
    memcpy(file, header, sizeof header);
    file_put(scratch(name), file, size);
}

void test_hostile_data(void) {
    const HostileData rows[] = {
        { "magic.bin", 0, 0, "found 1234" }, { "version.bin", 0, 0, "expected version 1" },
        { "version4.bin", 0, 0, "expected version 7" },
        { "short.bin", 0, 0, "header of 1024 bytes, found 1023" }, { "empty.bin", 0, 0, "found 0 bytes" },
        { "zero.bin", 0, 0, "empty (0 tokens)" }, { "cut.bin", 0, 0, "expected 1044 bytes, found 1042" },
        { "odd.bin", 0, 0, "found 1043" }, { "long.bin", 0, 0, "found 1046" },
        { "huge.bin", 0, 0, "expected 17179870204 bytes, found 1064" },
        { "width.bin", 0, 0, "tokens of 4 bytes" },
        { "big16.bin", 0, 0, "token 1000 is 1000, expected an id below" },
        { "big32.bin", 0, 0, "token 0 is 4294967295" },
        { "late.bin", 0, 64, "is 65535, expected an id below" },
        { "text.bin", 1, 0, "header of 1024 bytes, found 200" },
        { "prose.bin", 1, 0, "expected a token shard with magic" }, { "shard.txt", 1, 0, "must end in .bin" },
        { "utf16le.txt", 1, 0, "UTF-16" }, { "utf16be.txt", 1, 0, "UTF-16" },
        { "none.txt", 0, 0, "no tokenizer.json that can encode" },
        { "empty.txt", 1, 64, "data has 1 tokens, --seq-len 64 needs at least 65" },
        { "empty.txt", 1, 0, NULL }, { "one.txt", 1, 64, "data has 2 tokens" }, { "one.txt", 1, 1, NULL },
        { "lines.txt", 1, 64, NULL }, { "nul.txt", 1, 64, NULL }, { "crlf.txt", 1, 64, NULL },
        { "37.txt", 1, 64, "data has 37 tokens, --seq-len 64 needs at least 65" },
        { "12.txt", 1, 3, "4 streams (--carry-state) of --seq-len 3 need at least 13" },
        { "directory", 1, 0, "found a directory" }, { "fifo.txt", 1, 0, "found a" },
        { "device.txt", 1, 0, "found a" }, { "missing.txt", 1, 0, "No such file" },
        { "dangling.txt", 1, 0, "No such file" }, { "loop.txt", 1, 0, "cannot open" },
        { "link.txt", 1, 64, NULL }, { "no*match", 1, 0, "no file matches" }, { "nothing", 1, 0, "no data" },
    };
    char text[200];
    memset(text, 'x', sizeof text);
    data_header("magic.bin", 1234, 1, 10, 1044);
    data_header("version.bin", 20240520, 2, 10, 1044);
    data_header("version4.bin", 20240801, 1, 5, 1044);
    data_header("short.bin", 20240520, 1, 0, 1023);
    data_header("empty.bin", 0, 0, 0, 0);
    data_header("zero.bin", 20240520, 1, 0, 1024);
    data_header("cut.bin", 20240520, 1, 10, 1042);
    data_header("odd.bin", 20240520, 1, 10, 1043);
    data_header("long.bin", 20240520, 1, 10, 1046);
    data_header("huge.bin", 20240801, 7, 0xFFFFFFFFu, 1064);
    data_header("width.bin", 20240801, 7, 10, 1044);
    data_header("shard.txt", 20240520, 1, 10, 1044);
    data_shard("big16.bin", 2, 1001, 65536);
    unsigned char far_id[1028] = { 0 };
    const uint32_t header32[3] = { 20240801, 7, 1 };
    memcpy(far_id, header32, sizeof header32);
    memset(far_id + 1024, 0xFF, 4);
    file_put(scratch("big32.bin"), far_id, sizeof far_id);
    data_shard("late.bin", 2, 5000, 900);    // the wrong ids come after what is checked at opening
    unsigned char wrong_ids[6000];
    memset(wrong_ids, 0xFF, sizeof wrong_ids);
    int late = open(scratch("late.bin"), O_WRONLY);
    if (late < 0 || pwrite(late, wrong_ids, 6000, 1024 + 4000) != 6000 || close(late) != 0)
        die("test: late.bin");
    memcpy(text, "Once upon a time", 16);
    file_put(scratch("text.bin"), text, 200);
    data_header("prose.bin", 0x65636E4F, 0x6F707520, 0x2061206E, 2048);
    file_put(scratch("utf16le.txt"), "\xFF\xFEh\0i\0", 6);
    file_put(scratch("utf16be.txt"), "\xFE\xFF\0h\0i", 6);
    file_put(scratch("none.txt"), text, 200);
    file_put(scratch("empty.txt"), text, 0);
    file_put(scratch("one.txt"), text, 1);
    file_put(scratch("37.txt"), text, 36);
    file_put(scratch("12.txt"), text, 11);
    memset(text, '\n', sizeof text);
    file_put(scratch("lines.txt"), text, 200);
    memset(text, 0, sizeof text);
    file_put(scratch("nul.txt"), text, 200);
    for (int i = 0; i < 200; i++) text[i] = "ab\r\n"[i % 4];
    file_put(scratch("crlf.txt"), text, 200);
    if (mkdir(scratch("directory"), 0700) || mkfifo(scratch("fifo.txt"), 0600) ||
        symlink("/dev/zero", scratch("device.txt")) || symlink("nowhere", scratch("dangling.txt")) ||
        symlink("loop.txt", scratch("loop.txt")) || symlink("crlf.txt", scratch("link.txt")))
        die("test: scratch");
    double wrong = 0;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        HostileData h = rows[i];
        char line[4096] = "";
        alarm(60);                                       // a reader that hangs ends the test
        int code = in_child(open_hostile, &h, line, sizeof line);
        alarm(0);
        char* end = strchr(line, '\n');
        bool one_line = end && end[1] == '\0' && strncmp(line, "error: ", 7) == 0;
        bool named =
            strstr(line, h.name) || strncmp(line, "error: data has", 15) == 0 || !strcmp(h.name, "nothing");
        bool ok = h.words ? code == 1 && one_line && named && strstr(line, h.words) : code == 0 && !*line;
        if (!ok) fprintf(stderr, "  %s: exit code %d, found: %s\n", h.name, code, line);
        wrong += !ok;
    }
    report("hostile data files, 38 rows: one line or accepted", wrong, 0);
}

// ---- files larger than 4 GiB, files that change, fingerprint

void test_large_data(void) {
    double wrong = 0;
    for (int width = 2; width <= 4; width += 2) {
        uint32_t n = width == 2 ? 2400000000u : 1400000000u;          // 4.8 and 5.6 GB, sparse
        int64_t size = 1024 + (int64_t)n * width;
        Dataset d;
        Tokenizer t = data_ids(1000);
        Error err;
        int in[9] = { 0 }, target[8];
        data_header("far.bin", width == 2 ? 20240520 : 20240801, width == 2 ? 1 : 7, n, 1024);
        int fd = open(scratch("far.bin"), O_WRONLY);
        unsigned char tail[40] = { 0 };
        for (int i = 0; i < 9; i++) tail[i * width] = (unsigned char)(i + 1);
        if (fd < 0 || ftruncate(fd, (off_t)size) != 0) die("test: no sparse files in %s", scratch_dir);
        if (pwrite(fd, tail, (size_t)(9 * width), (off_t)(size - 9 * width)) != 9 * width)
            die("test: pwrite");
        close(fd);
        data_open_or_die(&d, "far.bin", &t);
        wrong += d.n_tokens != (int64_t)n || !dataset_read(&d, (int64_t)n - 9, 9, in, &err);
        for (int i = 0; i < 9; i++) wrong += in[i] != i + 1;
        Loader l = data_loader(&d, 8);
        int64_t last = ((int64_t)n - 2) / 8;
        wrong += !loader_eval_batch(&l, last, 1, in, target, NULL, &err);
        for (int64_t i = 0; i < 8; i++) {
            int64_t pos = last * 8 + i + 1, found = target[i];
            int64_t tail_at = (int64_t)n - 9;
            wrong += found != (pos >= (int64_t)n ? -1 : pos >= tail_at ? pos - tail_at + 1 : 0);
        }
        for (int64_t k = 0; k < 200; k++) {    // some windows must begin beyond 2^31 tokens
            bool fresh;
            int64_t pos = loader_position(&l, k, &fresh);
            wrong += pos < 0 || pos + 9 > (int64_t)n || !loader_batch(&l, k, 1, in, target, NULL, NULL, &err);
        }
        dataset_close(&d);
        unlink(scratch("far.bin"));
    }
    report("shards of 4.8 GB (u16) and 5.6 GB (u32), far end", wrong, 0);

    enum { SIZE = DATA_IN_MEMORY + 100000 };
    char* text = (char*)xcalloc(SIZE, 1);
    Tokenizer t;
    Dataset d;
    Error err;
    int* ids = (int*)xcalloc(SIZE + 1, sizeof(int));
    double large_wrong = 0;
    for (int i = 0; i < SIZE; i++) text[i] = (char)(random_bits(3, 0, (uint64_t)i) >> 5);
    tokenizer_bytes(&t);
    file_put(scratch("large.txt"), text, SIZE);
    data_open_or_die(&d, "large.txt", &t);
    large_wrong += !dataset_read(&d, 0, SIZE + 1, ids, &err) || ids[0] != 256;
    for (int i = 0; i < SIZE; i++) large_wrong += ids[i + 1] != (unsigned char)text[i];
    for (int64_t pos = 0; pos < 40000; pos += 997) {
        int64_t n = 1 + pos / 2;
        int* part = (int*)xcalloc((size_t)n, sizeof(int));
        large_wrong +=
            !dataset_read(&d, pos, n, part, &err) || memcmp(part, ids + pos, (size_t)n * sizeof(int)) != 0;
        free(part);
    }
    if (truncate(scratch("large.txt"), SIZE - 1000) != 0) die("test: truncate");
    large_wrong += dataset_read(&d, SIZE - 1100, 500, ids, &err) || !strstr(err.text, "changed while reading")
                   || !strstr(err.text, "expected 4293703 bytes or more");
    dataset_close(&d);
    int fd = dup(0), fd_after;                           // a failure in the second file closes the first
    close(fd);
    char* two[2] = { (char*)scratch("large.txt"), (char*)scratch("missing.txt") };
    large_wrong += dataset_open(&d, two, 2, &t, &err) || d.source || d.n_tokens;
    fd_after = dup(0);
    close(fd_after);
    large_wrong += fd != fd_after;
    report("file read in pieces; cut while open; closed on failure", large_wrong, 0);

    double same = 0;    // edits that the fingerprint did not notice, or that it should have ignored
    for (int large = 0; large < 2; large++) {
        size_t n = large ? SIZE : 50000;
        const size_t edits[] = { 0, 70, 40000, n - 40000, n - 1 };
        file_put(scratch("print.txt"), text, n);
        file_put(scratch("other.txt"), text, n);
        data_open_or_die(&d, "print.txt", &t);
        uint64_t base = dataset_fingerprint(&d), again;
        same += base != dataset_fingerprint(&d);
        dataset_close(&d);
        data_open_or_die(&d, "other.txt", &t);
        same += base != dataset_fingerprint(&d);
        Dataset val;
        same += !dataset_split(&d, 0.1, &val) || base == dataset_fingerprint(&d) ||
                base == dataset_fingerprint(&val) || dataset_fingerprint(&d) == dataset_fingerprint(&val);
        dataset_close(&d);
        for (int i = 0; i < 7; i++) {
            if (i < 5) text[edits[i]] ^= 1;
            file_put(scratch("print.txt"), text, i == 5 ? n - 1 : i == 6 ? n - 4096 : n);
            if (i < 5) text[edits[i]] ^= 1;
            data_open_or_die(&d, "print.txt", &t);
            again = dataset_fingerprint(&d);
            same += base == again;
            dataset_close(&d);
        }
        for (size_t at = 65536; large && at + 2 * 65536 < n; at += 65536) {   // head to tail: 80 KiB always
            memset(text + at, text[at] ^ 1, 5 << 14);                         // contain a whole sampled piece
            file_put(scratch("print.txt"), text, n);
            data_open_or_die(&d, "print.txt", &t);
            again = dataset_fingerprint(&d);
            same += base == again;
            base = again;
            dataset_close(&d);
        }
        char* both[2] = { (char*)scratch("12.txt"), (char*)scratch("37.txt") };
        char* turned[2] = { both[1], both[0] };
        if (!dataset_open(&d, both, 2, &t, &err)) die("%s", err.text);
        again = dataset_fingerprint(&d);
        dataset_close(&d);
        if (!dataset_open(&d, turned, 2, &t, &err)) die("%s", err.text);
        same += again == dataset_fingerprint(&d);
        dataset_close(&d);
    }
    report("fingerprint: edits unnoticed (head, tail, size, range, order)", same, 0);
    free(text);
    free(ids);
}

// ---- UTF-8: an oracle that knows only how a code point is encoded

int encode_code_point(uint32_t c, unsigned char out[4]) {
    if (c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF)) return 0;
    int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, c >>= 6) out[i] = (unsigned char)(0x80 | (c & 0x3F));
    out[0] = (unsigned char)(n == 1 ? c : (0xF00 >> n) | c);
    return n;
}

// is_prefix: do these k bytes begin the encoding of some code point? Completes them, takes the bits out as if
// they were right, and encodes again.
bool is_prefix(const unsigned char* bytes, int k) {
    for (int second = 0x80; second <= 0xA0; second += 0x10) {
        unsigned char trial[4] = { 0x80, (unsigned char)second, 0x80, 0x80 }, code[4];
        memcpy(trial, bytes, (size_t)k);
        for (int n = k; n <= 4; n++) {
            uint32_t c = trial[0] & (n == 1 ? 0x7F : (1 << (7 - n)) - 1);
            for (int i = 1; i < n; i++) c = c << 6 | (trial[i] & 0x3F);
            if (encode_code_point(c, code) == n && memcmp(code, trial, (size_t)n) == 0) return true;
        }
    }
    return false;
}

// utf8_replace: whole characters as they are, each longest prefix of a character, or else each byte, becomes
// U+FFFD
size_t utf8_replace(const unsigned char* text, size_t n, unsigned char* out) {
    size_t m = 0;
    for (size_t i = 0; i < n; ) {
        int longest = 1;
        bool whole = text[i] < 0x80;
        for (int k = 2; k <= 4 && i + (size_t)k <= n; k++) {
            if (!is_prefix(text + i, k)) break;
            longest = k;
            whole = k == (text[i] < 0xE0 ? 2 : text[i] < 0xF0 ? 3 : 4);
            if (whole) break;
        }
        if (whole) memcpy(out + m, text + i, (size_t)longest); else memcpy(out + m, "\xEF\xBF\xBD", 3);
        m += whole ? (size_t)longest : 3;
        i += (size_t)longest;
    }
    return m;
}

// decode_all: every piece must be whole characters by itself: nothing may be split between two calls
size_t decode_all(const Tokenizer* t, const int* ids, size_t n, bool raw, unsigned char* out,
                  double* broken) {
    Utf8Stream s;
    size_t m = 0;
    memset(&s, 0, sizeof s);
    s.raw = raw;
    for (size_t i = 0; i <= n; i++) {
        char piece[TOKENIZER_MAX_TEXT];
        unsigned char check[3 * TOKENIZER_MAX_TEXT];
        size_t k = i < n ? tokenizer_decode(t, &s, ids[i], piece) : tokenizer_flush(&s, piece);
        if (k > TOKENIZER_MAX_TEXT) die("test: decode wrote %zu bytes", k);
        if (!raw && (utf8_replace((unsigned char*)piece, k, check) != k || memcmp(piece, check, k) != 0))
            ++*broken;
        memcpy(out + m, piece, k);
        m += k;
    }
    return m;
}

void test_utf8(void) {
    // text that tokenizers, terminals and parsers have stumbled over
    const char* const strings[] = {
        "", " ", "\n", "\r\n\r\n", "\t\v\f\x1b[31m", "undefined null NaN -1e999 0x0", "'; DROP TABLE t; --",
        "<|endoftext|>", "na\xC3\xAFve \xC3\xA9", "\xE6\x97\xA5\xE6\x9C\xAC\xE8\xAA\x9E",
        "\xD8\xA7\xD9\x84\xD8\xB9\xD8\xB1\xD8\xA8\xD9\x8A\xD8\xA9",
        "\xF0\x9F\x98\x80\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x91\xA7",
        "e\xCC\x81\xCC\xA7\xCC\x88", "\xEF\xBB\xBF" "bom", "\xE2\x80\xAE" "rtl",
        "\xE2\x80\x8B\xC2\xAD\xC2\xA0", "\xF0\x90\x80\x80\xF4\x8F\xBF\xBF\xEF\xBF\xBF",
        "\xED\x9F\xBF\xEE\x80\x80", "\xEF\xBF\xBD", "\xF0\x9D\x95\xB3\xF0\x9D\x96\x8E",
        "\xEF\xB7\xBA\xE1\xBA\x9E\xC4\xB0\xC4\xB1",
        "\xE0\xB8\xAA\xE0\xB8\xA7\xE0\xB8\xB1\xE0\xB8\xAA\xE0\xB8\x94\xE0\xB8\xB5", "%s%n%x \\u0000 &lt;",
        "\x7F\x01\x02",
    };
    // bad bytes and the number of U+FFFD that Python's errors="replace" gives for them
    const struct { const char* bytes; int replacements; } bad[] = {
        { "\x80", 1 }, { "\xC0\x80", 2 }, { "\xC1\xBF", 2 }, { "\xC3", 1 }, { "\xE2\x82", 1 },
        { "\xE0\x80\x80", 3 }, { "\xE0\x9F\xBF", 3 }, { "\xED\xA0\x80", 3 }, { "\xED\xBF\xBF", 3 },
        { "\xF0\x80\x80\x80", 4 }, { "\xF0\x8F\xBF\xBF", 4 }, { "\xF0\x9F\x98", 1 }, { "\xF0\x9F\xC3", 2 },
        { "\xF4\x90\x80\x80", 4 }, { "\xF5\x80\x80\x80", 4 }, { "\xFF\xFE", 2 }, { "\xE2\x82\xE2\x82", 2 },
        { "\xF1\x80\x80\xF1\x80", 2 }, { "\xC3\xC3\xC3", 3 }, { "\xF8\x88\x80\x80\x80", 5 },
    };
    enum { LENGTH = 24, TRIALS = 3000 };
    double wrong = 0, broken = 0;
    Tokenizer t;
    tokenizer_bytes(&t);
    unsigned char out[1024], expected[1024];
    for (int raw = 0; raw < 2; raw++) {
        for (size_t i = 0; i < sizeof strings / sizeof strings[0]; i++) {
            size_t n = strlen(strings[i]), count;
            int* ids = tokenizer_encode(&t, strings[i], n, &count);
            size_t m = decode_all(&t, ids, count, raw, out, &broken);
            wrong += count != n || m != n || memcmp(out, strings[i], n) != 0;
            free(ids);
        }
    }
    report("UTF-8: horrible strings, encode and decode", wrong, 0);
    double bad_wrong = 0;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char text[16];
        size_t count;
        snprintf(text, sizeof text, "a%sz", bad[i].bytes);           // within text, and at its end
        for (size_t n = strlen(text); n + 2 > strlen(text); n--) {
            int* ids = tokenizer_encode(&t, text, n, &count);
            size_t m = decode_all(&t, ids, count, false, out, &broken);
            bool z = text[n - 1] == 'z';
            int found = 0;
            for (size_t k = 1; k + 2 < m + 1 && out[k] != 'z'; k += 3)
                found += memcmp(out + k, "\xEF\xBF\xBD", 3) == 0;
            bad_wrong += found != bad[i].replacements || m != 1 + 3 * (size_t)found + z || out[0] != 'a';
            free(ids);
        }
    }
    report("UTF-8: invalid bytes, as many U+FFFD as Python", bad_wrong, 0);
    double random_wrong = 0;
    for (uint64_t trial = 0; trial < TRIALS; trial++) {
        const unsigned char pick[] = {'a',  0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0,
                                      0xE1, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF, 0x00, 0x7F};
        char text[LENGTH];
        size_t count;
        for (uint64_t i = 0; i < LENGTH; i++) {
            uint64_t r = random_bits(9, trial, i);
            text[i] = (char)(r % 8 == 0 ? r >> 40 : pick[(r >> 8) % sizeof pick]);
        }
        int* ids = tokenizer_encode(&t, text, LENGTH, &count);
        size_t m = decode_all(&t, ids, count, false, out, &broken);
        random_wrong +=
            m != utf8_replace((unsigned char*)text, LENGTH, expected) || memcmp(out, expected, m) != 0;
        m = decode_all(&t, ids, count, true, out, &broken);
        random_wrong += m != LENGTH || memcmp(out, text, LENGTH) != 0;
        free(ids);
    }
    report("UTF-8: random bytes against the definition", random_wrong, 0);
    report("UTF-8: pieces that split a character", broken, 0);

    double other = 0;    // the end token, ids without a text, the largest output, no tokenizer
    const int ids[] = { 'a', 0xF0, 0x9F, 0x98, 256, 257, -1, 0xE2, 1 << 30, 'b' };
    size_t m = decode_all(&t, ids, 10, false, out, &broken);
    const char* text = "a\xEF\xBF\xBD<|endoftext|>\xEF\xBF\xBD" "b";
    other += m != strlen(text) || memcmp(out, text, m) != 0;
    Tokenizer none = data_ids(50257);
    m = decode_all(&none, ids + 4, 3, true, out, &broken);
    other += m != 11 || memcmp(out, "256 257 -1 ", 11) != 0;
    size_t count = 9;
    other += tokenizer_encode(&none, "ab", 2, &count) != NULL || count != 0;
    report("decode: end token, unknown ids, no tokenizer", other, 0);
}

void test_data(void) {
    test_permute();
    test_shuffled();
    test_batch_split();
    test_sequential();
    test_documents();
    test_many_sources();
    test_validation();
    test_hostile_data();
    test_large_data();
    test_utf8();
}
