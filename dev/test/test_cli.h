// ---------------------------------------------------------------------------------------------------
// test_cli.h: the program at its command line. The real binary (beside this test) runs in a temporary
// directory as a user with bad luck would run it: wrong options, files and directories, odd sizes, signals,
// full disks, closed streams, second runs. Every refusal is one line on stderr that begins with "error: ",
// exit code 1, and leaves the existing run untouched.

#include <dirent.h>

enum { CLI_KEEP = 1 << 18 };         // bytes kept of stdout and of stderr
char cli_program[4096];

// Launch: how one run starts. args: separated by blanks; in an argument a tab stands for a blank, a final @
// for 10,000 letters A, and "" alone for an empty argument. Zeros everywhere else are the ordinary case.
typedef struct {
    const char* args;
    const char* input;               // stdin is this file; NULL: /dev/null
    const char* output;              // stdout goes to this file, "-" closes it; NULL: it is kept
    const char* env;                 // one more setting of the environment, or NULL
    rlim_t memory;                   // limit of the address space, 0: none
    bool bare;                       // without HOME, TERM
    bool hangup_ignored;             // as under nohup
    int in_fd, out_fd;               // a pipe instead of input, output (0: none)
} Launch;

typedef struct {
    int code;
    long peak_kib;
    double seconds;
    char *out, *err;
    size_t out_size, err_size;
} Finished;

char* cli_read(const char* name, size_t* size) {
    char* text = (char*)test_alloc(CLI_KEEP + 1, 1);
    FILE* f = fopen(scratch(name), "rb");
    *size = f ? fread(text, 1, CLI_KEEP, f) : 0;
    if (f) fclose(f);
    return text;
}

void cli_write(const char* name, const void* text, size_t size, const char* mode) {
    FILE* f = fopen(scratch(name), mode);
    if (!f || fwrite(text, 1, size, f) != size || fclose(f) != 0) die("test: cannot write %s", name);
}

// cli_replace: the first `from` in a file becomes `to`, of the same length. False when it is not there.
bool cli_replace(const char* name, const char* from, const char* to) {
    FILE* f = fopen(scratch(name), "r+b");
    size_t n = strlen(from), size = 0;
    char* text = (char*)test_alloc(CLI_KEEP, 1);
    if (f) size = fread(text, 1, CLI_KEEP, f);
    char* at = (char*)memmem(text, size, from, n);
    if (at && (fseek(f, at - text, SEEK_SET) != 0 || fwrite(to, 1, n, f) != n)) at = NULL;
    if (f) fclose(f);
    return at != NULL && strlen(to) == n;
}

bool cli_exists(const char* name) {
    struct stat info;
    return lstat(scratch(name), &info) == 0;
}

// cli_hash: names, kinds and contents of all below a path, so that two trees compare; 0 when there is
// nothing.
uint64_t cli_hash(const char* path) {
    struct stat info;
    unsigned char piece[4096];
    if (lstat(path, &info) != 0) return 0;
    uint64_t hash = mix64((uint64_t)info.st_mode);
    if (S_ISDIR(info.st_mode)) {
        DIR* dir = opendir(path);
        for (struct dirent* d; dir && (d = readdir(dir));) {    // summed: the order of entries does not count
            char name[4400];
            uint64_t entry = 0;
            if (strcmp(d->d_name, ".") == 0 || strcmp(d->d_name, "..") == 0) continue;
            if (strcmp(d->d_name, ".lock") == 0) continue;
            for (const char* p = d->d_name; *p; p++) entry = mix64(entry ^ (unsigned char)*p);
            snprintf(name, sizeof name, "%s/%s", path, d->d_name);
            hash += mix64(entry ^ cli_hash(name));
        }
        if (dir) closedir(dir);
        return hash;
    }
    ssize_t n = S_ISLNK(info.st_mode) ? readlink(path, (char*)piece, sizeof piece) : 0;
    int fd = S_ISREG(info.st_mode) ? open(path, O_RDONLY) : -1;
    do {
        for (ssize_t i = 0; i < n; i++) hash = mix64(hash ^ piece[i]);
        n = fd >= 0 ? read(fd, piece, sizeof piece) : 0;
    } while (n > 0);
    if (fd >= 0) close(fd);
    return hash;
}

void cli_shell(const char* format, const char* a, const char* b) {
    char command[1200], line[900];
    snprintf(line, sizeof line, format, a, b);
    snprintf(command, sizeof command, "cd %s && %s", scratch_dir, line);
    if (system(command) != 0) die("failed: %s", command);
}

void cli_redirect(const char* file, int pipe_end, int flags, int fd) {
    int from = pipe_end > 0 ? pipe_end : open(file, flags, 0644);
    if (from < 0) _exit(126);
    dup2(from, fd);
    if (from > 2) close(from);
}

pid_t cli_start(const Launch* l) {
    char *copy = (char*)test_alloc(strlen(l->args) + 1, 1), *argv[64], *rest = NULL;
    int n = 0;
    argv[n++] = cli_program;
    strcpy(copy, l->args);
    for (char* a = strtok_r(copy, " ", &rest); a && n < 63; a = strtok_r(NULL, " ", &rest)) {
        size_t size = strlen(a);
        for (char* p = a; *p; p++) if (*p == '\t') *p = ' ';
        if (size && a[size - 1] == '@') {
            char* full = (char*)test_alloc(size + 10001, 1);
            memcpy(full, a, size - 1);
            memset(full + size - 1, 'A', 10000);
            a = full;
        }
        argv[n++] = strcmp(a, "\"\"") == 0 ? copy + strlen(l->args) : a;
    }
    argv[n] = NULL;
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0) die("fork: %s", strerror(errno));
    if (pid > 0) return pid;
    if (chdir(scratch_dir) != 0) _exit(126);
    cli_redirect(l->input ? l->input : "/dev/null", l->in_fd, O_RDONLY, 0);
    cli_redirect(l->output && strcmp(l->output, "-") ? l->output : "out.txt", l->out_fd,
                 O_WRONLY | O_CREAT | O_TRUNC, 1);
    cli_redirect("err.txt", 0, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 2);
    for (int fd = 3; fd < 64; fd++) close(fd);
    if (l->output && strcmp(l->output, "-") == 0) close(1);
    setenv("OMP_NUM_THREADS", "1", 1);
    setenv("PATH", "/nowhere", 1);               // without gnuplot
    if (l->bare) { unsetenv("HOME"); unsetenv("TERM"); }
    if (l->env) putenv(strdup(l->env));
    const int own[] = {SIGHUP, SIGINT, SIGPIPE, SIGTERM};      // whoever started the tests may ignore some
    for (int i = 0; i < COUNT_OF(own); i++) signal(own[i], SIG_DFL);
    if (l->hangup_ignored) signal(SIGHUP, SIG_IGN);
    struct rlimit limit = {l->memory, l->memory};
    if (l->memory) setrlimit(RLIMIT_AS, &limit);
    execv(cli_program, argv);
    _exit(127);
}

// cli_wait: the end of a run, its exit code or 128 + signal; -1 when it had to be killed, after `seconds` of
// computing or ten times as long on the clock (the machine may have other work).
Finished cli_wait(pid_t pid, double seconds) {
    Finished f;
    memset(&f, 0, sizeof f);
    struct rusage usage;
    int status = 0;
    bool late = false;
    double start = seconds_now();
    clockid_t clock;
    struct timespec used = {0, 0};
    if (SANITIZED) seconds *= 10;
    while (wait4(pid, &status, WNOHANG, &usage) == 0) {
        if (clock_getcpuclockid(pid, &clock) == 0) clock_gettime(clock, &used);
        bool over = (double)used.tv_sec >= seconds || seconds_now() - start > 10 * seconds;
        if (!late && over) late = true, kill(pid, SIGKILL);
        usleep(500);
    }
    f.seconds = seconds_now() - start;
    f.peak_kib = usage.ru_maxrss;
    f.code = late ? -1 : WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    f.out = cli_read("out.txt", &f.out_size);
    f.err = cli_read("err.txt", &f.err_size);
    return f;
}

Finished cli_run(const char* args) {
    Launch l;
    memset(&l, 0, sizeof l);
    l.args = args;
    return cli_wait(cli_start(&l), 10);
}

// cli_wait_for_rows: until a run's log has that many rows; false after 30 seconds
bool cli_wait_for_rows(const char* log, int rows) {
    for (double start = seconds_now(); seconds_now() - start < 30; usleep(500)) {
        size_t size;
        int lines = 0;
        char* text = cli_read(log, &size);
        for (size_t i = 0; i < size; i++) lines += text[i] == '\n';
        free(allocations[--n_allocations]);      // the text and
        free(allocations[--n_allocations]);      // the path: this is a loop
        if (lines > rows) return true;
    }
    return false;
}

// cli_signal_arrived: waits until a signal that was sent to a run waits no longer, for at most 5 seconds
void cli_signal_arrived(pid_t pid, int signal_number) {
    char path[64], line[256];
    snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
    for (int i = 0; i < 500; i++) {
        usleep(10000);
        bool waits = false;
        FILE* f = fopen(path, "r");
        if (!f) return;
        while (fgets(line, sizeof line, f))
            if (strncmp(line, "ShdPnd:", 7) == 0)
                waits = strtoull(line + 7, NULL, 16) >> (signal_number - 1) & 1;
        fclose(f);
        if (!waits) return;
    }
}

// cli_one_line: is this exactly one line, "error: ...", without control characters?
bool cli_one_line(const Finished* f) {
    if (f->err_size < 9 || strncmp(f->err, "error: ", 7) != 0 || f->err[f->err_size - 1] != '\n')
        return false;
    for (size_t i = 0; i + 1 < f->err_size; i++)
        if ((unsigned char)f->err[i] < 32 || f->err[i] == 127) return false;
    return f->err_size < 4400;
}

bool cli_utf8(const char* text, size_t n) {
    Utf8Stream s;
    memset(&s, 0, sizeof s);
    size_t before = 0, after = 0;    // valid text comes through unchanged; U+FFFD for a bad byte would not
    bool same = true;
    for (; before < n; before++) {
        char piece[TOKENIZER_MAX_TEXT];
        size_t k = utf8_push(&s, (unsigned char)text[before], piece);
        for (size_t i = 0; i < k; i++, after++) same = same && after < n && piece[i] == text[after];
    }
    return same && s.n == 0 && after == n;
}

int cli_bad;                                     // failed rows of the present group
void cli_check(bool ok, const char* name, const Finished* f) {
    if (ok) return;
    cli_bad++;
    char row[160];
    size_t n = strlen(name);
    snprintf(row, sizeof row, "%s", name + (n > 70 ? n - 70 : 0));      // the end of the arguments tells most
    for (char* p = row; *p; p++) if ((unsigned char)*p < 32) *p = '?';
    report(row, f ? f->code : 1, -2);
    if (f)
        printf("     exit code %d, %zu bytes of output, stderr: %.200s%s", f->code, f->out_size, f->err,
               f->err_size ? "" : "(empty)\n");
}

void cli_group(const char* claim, int n) {
    char name[160];
    snprintf(name, sizeof name, "%s [%d rows]", claim, n);
    report(name, cli_bad, 0);
    cli_bad = 0;
}

#define TOY " --d-model 16 --n-layer 1 --seq-len 16 --batch-size 2 --max-tokens 8 --eval-every 0 "
#define NEW TOY "--out fresh --data a.txt "
#define ONES "1111111111111111111111111111111111111111111111111111111111111111"

typedef struct { const char *args, *input; int code; const char* words; } CliRow;

// cli_rows: each row in a fresh state; the run in `run` must not change, and a refused one saves nothing.
void cli_rows(const char* claim, const CliRow* row, int n) {
    const char* run = scratch("run");
    uint64_t before = cli_hash(run);
    for (int i = 0; i < n; i++) {
        Launch l;
        memset(&l, 0, sizeof l);
        l.args = row[i].args;
        l.input = row[i].input;
        Finished f = cli_wait(cli_start(&l), 5);
        bool ok = f.code == row[i].code;
        if (row[i].code == 1) ok = ok && cli_one_line(&f) && !cli_exists("fresh/last");
        uint64_t after = cli_hash(run);
        cli_check(ok && strstr(f.err, row[i].words) && after == before, row[i].args, &f);
        before = after;
        cli_shell("rm -rf fresh", "", "");
    }
    cli_group(claim, n);
}

// Wrong options. Catches: a value read in part, a value for another option, a silent default.
const CliRow cli_options[] = {
    {NEW "--bogus 1", NULL, 1, "unknown option --bogus"}, {NEW "--setps 5", NULL, 1, "did you mean --steps"},
    {NEW "--steps 5 --steps 6", NULL, 1, "--steps is given twice"},
    {NEW "--resume --no-resume", NULL, 1, "--resume is given twice"},
    {NEW "--steps", NULL, 1, "--steps expects a value"},
    {NEW "--steps --lr 1", NULL, 1, "--steps expects a value"},
    {NEW "--steps=", NULL, 1, "--steps expects a whole number"},
    {NEW "--steps \"\"", NULL, 1, "--steps expects a whole number"},
    {NEW "--steps 0", NULL, 1, "--steps expects"}, {NEW "--steps -1", NULL, 1, "found -1"},
    {NEW "--steps 1.5", NULL, 1, "whole number"}, {NEW "--steps 1e400", NULL, 1, "1e400"},
    {NEW "--steps 99999999999999999999", NULL, 1, "--steps expects"}, {NEW "--steps 0x10", NULL, 1, "0x10"},
    {NEW "--steps \t5", NULL, 1, "' 5'"}, {NEW "--steps 5\t", NULL, 1, "'5 '"},
    {NEW "--steps 5x", NULL, 1, "5x"}, {NEW "--steps 5\nx", NULL, 1, "--steps expects"},
    {NEW "--steps \033[31m5", NULL, 1, "--steps expects"}, {NEW "--steps @", NULL, 1, "--steps expects"},
    {NEW "--lr 0,001", NULL, 1, "0,001"}, {NEW "--lr nan", NULL, 1, "nan"}, {NEW "--lr inf", NULL, 1, "inf"},
    {NEW "--lr -inf", NULL, 1, "inf"}, {NEW "--lr 1e400", NULL, 1, "1e400"},
    {NEW "--lr 1e-400", NULL, 1, "1e-400"}, {NEW "--lr 1e-3x", NULL, 1, "1e-3x"},
    {NEW "--lr 0x1p-3", NULL, 1, "0x1p-3"}, {NEW "--lr -1e-3", NULL, 1, "found -1e-3"},
    {NEW "--lr .", NULL, 1, "--lr"}, {NEW "--seed -1", NULL, 1, "--seed"},
    {NEW "--seed 1e3", NULL, 1, "--seed"}, {NEW "--seed 18446744073709551616", NULL, 1, "--seed"},
    {NEW "--beta1 1", NULL, 1, "--beta1"}, {NEW "--val-fraction 1", NULL, 1, "--val-fraction"},
    {NEW "--threads 4097", NULL, 1, "--threads"},
    {NEW "--schedule cos", NULL, 1, "constant linear cosine wsd"},
    {NEW "--schedule cosine\tlinear", NULL, 1, "expects one of"},
    {NEW "--on-nan retry", NULL, 1, "stop skip"}, {NEW "--carry-state maybe", NULL, 1, "found 'maybe'"},
    {NEW "--carry-state=1", NULL, 1, "on or off"}, {NEW "--no-steps", NULL, 1, "--no-steps"},
    {NEW "--no-carry-state=on", NULL, 1, "--no-carry-state"}, {NEW "--no-bogus", NULL, 1, "--no-bogus"},
    {NEW "--raw", NULL, 1, "'generate'"}, {"generate --from run --steps 5", NULL, 1, "not of 'generate'"},
    {"eval --from run --prompt x", NULL, 1, "not of 'eval'"},
    {"info --from run --data a.txt", NULL, 1, "not of 'info'"}, {"bogus", NULL, 1, "unknown word 'bogus'"},
    {"\"\"", NULL, 1, "unknown word ''"}, {"A@", NULL, 1, "unknown word"},
    {"--A@", NULL, 1, "unknown option"}, {"-steps 5", NULL, 1, "found '-steps'"},
    {"--", NULL, 1, "found '--'"}, {"--=5", NULL, 1, "unknown option"},
    {"train generate", NULL, 1, "found 'generate'"}, {"--preset bogus", NULL, 1, "mamba-2.8b"},
    {"--preset @", NULL, 1, "known are"}, {TOY "--out fresh --steps 1 --data", NULL, 1, "at least one file"},
    {TOY "--out fresh --data --steps 1", NULL, 1, "at least one file"},
    {TOY "--out fresh --steps 1 --data=", NULL, 1, "--data"},
    {TOY "--out fresh --steps 1 --data \"\"", NULL, 1, "--data"}, {NEW "--pattern 1z", NULL, 1, "letter 'z'"},
    {NEW "--pattern 3 --headdim 8", NULL, 1, "letter '3'"},
    {NEW "--eos-token 65", NULL, 1, "ends with token 256"},
    {NEW "--decay-steps 5", NULL, 1, "of --schedule wsd"},
    {NEW "--val-data a.txt --val-fraction 0.3", NULL, 1, "give one"},
    {NEW "--headdim 8", NULL, 1, "Mamba-2"}, {NEW "--pattern 2 --rotary-dim 4", NULL, 1, "attention (a)"},
    {NEW "--pattern m", NULL, 1, "must follow a mixer"}, {NEW "--pattern \"\"", NULL, 1, "0 letters"},
    {NEW "--pattern 1mm", NULL, 1, "1mm"},
    {NEW "--pattern a1 --carry-state", NULL, 1, "train it without"},
    {NEW "--pattern a --attn-head-dim 257", NULL, 1, "head_dim is 257, expected 1 .. 256"},
    {NEW "--pattern a --attn-heads 4 --attn-heads-kv 3", NULL, 1, "4 attention heads cannot share 3"},
    {NEW "--pattern a --rotary-dim 3", NULL, 1, "(--rotary-dim) is 3, expected an even"},
    {"generate --preset tiny --pattern a --context 0", NULL, 1, "--context expects"},
    {"generate --preset tiny --pattern a --context 50", NULL, 1, "--context is for --interactive"},
    {"generate --preset tiny --pattern a --max-tokens 99999999", NULL, 1, "lower --max-tokens"},
    {NEW "--steps 1 --pattern " ONES ONES ONES ONES ONES ONES ONES ONES,
     NULL, 1, "letters"},
    {NEW "--vocab-size 100", NULL, 1, "too small"}, {NEW "--d-conv 9", NULL, 1, "--d-conv"},
    {NEW "--d-state 257", NULL, 1, "--d-state"}, {"--d-model 0", NULL, 1, "--d-model"},
    {"--n-layer 10001", NULL, 1, "--n-layer"}, {NEW "--dt-rank -1", NULL, 1, "--dt-rank"},
    {"generate --from run --prompt a --prompt-file a.txt", NULL, 1, "only one"},
    {"generate --from run --prompt -", "run", 1, "the prompt cannot be read"},
    {"generate --from run --interactive", "run", 1, "standard input cannot be read"},
    {"convert --from run --out \"\"", NULL, 1, "--out"},
    {"generate --from run --dtype f16", NULL, 1, "f32 or bf16"},
    {"generate --from run --state-dtype f16", NULL, 1, "--state-dtype expects one of: f32 bf16; found 'f16'"},
    {TOY "--out run --state-dtype bf16", NULL, 1, "--state-dtype"},
    {"generate --preset tiny --pattern a --state-dtype bf16", NULL, 1, "no Mamba layers"},
    {"generate --from nowhere", NULL, 1, "nowhere"}, {"generate --from run --top-p 1.1", NULL, 1, "--top-p"},
    {"generate --from run --top-k -1", NULL, 1, "--top-k"},
    {"generate --from run --temperature -1", NULL, 1, "--temperature"},
    {"generate --from run --num-samples 0", NULL, 1, "--num-samples"},
    {"generate --from run --chunk 0", NULL, 1, "--chunk"},
    {"generate --from run --d-model 64 --max-tokens 1", NULL, 1, "--d-model"},
    {"info --from run --preset tiny", NULL, 1, "--preset"},
    {TOY "--out run --resume --d-state 8", NULL, 1, "cannot change"},
    {NEW "--steps 1 --lr 1e-5 --min-lr 1e-3", NULL, 1, "--min-lr"},
};

// Data, directories, damaged checkpoints. Catches: a silent default, work begun that must fail, a lost run.
const CliRow cli_files[] = {
    {TOY "--out fresh --data missing.txt", NULL, 1, "missing.txt"},
    {TOY "--out fresh --data run", NULL, 1, "directory"}, {TOY "--out fresh --data fifo", NULL, 1, "fifo"},
    {TOY "--out fresh --data zzz*.txt", NULL, 1, "no file matches"},
    {TOY "--out fresh --data empty.txt", NULL, 1, "too few"},
    {TOY "--out fresh --data empty.txt --val-fraction 0", NULL, 1, "at least 17"},
    {TOY "--out fresh --data one.txt --val-fraction 0", NULL, 1, "has 2 tokens"},
    {TOY "--out fresh --data utf16.txt", NULL, 1, "UTF-16"},
    {NEW "--val-data empty.txt --steps 3", NULL, 1, "empty.txt"},
    {"eval --from run --data empty.txt", NULL, 1, "at least 2"},
    {"generate --from run --prompt-file missing.txt", NULL, 1, "missing.txt"},
    {"generate --from run --prompt-file run --max-tokens 1", NULL, 1, "run"},
    {"generate --from run --save-state none/x --max-tokens 1", NULL, 1, "none/x: cannot"},
    {"generate --from run --load-state a.txt --max-tokens 1", NULL, 1, "a.txt"},
    {"generate --from a.txt", NULL, 1, "found a file"}, {"info --from d_empty", NULL, 1, "holds neither"},
    {TOY "--data a.txt --out run", NULL, 1, "already holds a run"},
    {TOY "--data a.txt --out a.txt", NULL, 1, "a file has this name"},
    {TOY "--data a.txt --out a.txt/x", NULL, 1, "a.txt"},
    {TOY "--data a.txt --out /proc/x", NULL, 1, "/proc/x"}, {TOY "--data a.txt --out \"\"", NULL, 1, "empty"},
    {TOY "--data a.txt --out @", NULL, 1, "long"}, {"--out nowhere --resume", NULL, 1, "nowhere"},
    {"--out d_empty --resume", NULL, 1, "holds neither"}, {"--out run --resume", NULL, 1, "is finished"},
    {"--out run/step_00000005 --resume --steps 9", NULL, 1, "step_00000005"},
    {TOY "--data a.txt --out d_steps --steps 5", NULL, 1, "step_"},
    {"--out d_dangling --resume", NULL, 1, "does not exist"},
    {"--out d_elsewhere --resume", NULL, 1, "expected step_"},
    {"--out d_plain --resume", NULL, 1, "found a directory"},
    {TOY "--data a.txt --out d_dangling", NULL, 1, "already holds a run"},
    {TOY "--data a.txt --out d_plain", NULL, 1, "already holds a run"},
    {"--out d_format --resume --steps 9", NULL, 1, "format"},
    {"--out d_letter --resume --steps 9", NULL, 1, "'q'"}, {"generate --from d_letter", NULL, 1, "'q'"},
    {"--out d_nan --resume --steps 9", NULL, 1, "NaN"}, {"generate --from d_nan", NULL, 1, "NaN"},
    {"--out d_samples --resume --steps 9", NULL, 1, "is damaged"},
    {"--out d_best --resume --steps 9", NULL, 1, "is damaged"},
    {"--out d_carry --resume --steps 9 --seq-len 8", NULL, 1, "resumes with --carry-state"},
    {"--out d_carry --resume --steps 9 --batch-size 1", NULL, 1, "resumes with --carry-state"},
    {"--out d_carry --resume --steps 9 --seq-len 16.0 --max-tokens 0", NULL, 0, ""},
    {"--out d_carry --resume --steps 12 --preset tiny --max-tokens 0", NULL, 0, "has other sizes"},
    {"--out d_data --resume --steps 9", NULL, 1, "--force-data"},
    {"--out d_data --resume --steps 9 --force-data --max-tokens 0", NULL, 0, ""},
};

// Odd but right. Catches: a size that is assumed to be even, more than 1, more than the taps; text that is
// not text.
const CliRow cli_odd[] = {
    {NEW "--steps 3", NULL, 0, ""}, {TOY "--steps 3 --out fresh --data newlines.txt", NULL, 0, ""},
    {TOY "--steps 3 --out fresh --data nonewline.txt", NULL, 0, ""},
    {TOY "--steps 3 --out fresh --data nul.txt crlf.txt", NULL, 0, ""},
    {"--d-model 8 --n-layer 1 --steps 3 --seq-len 1 --out fresh --data one.txt --val-fraction 0 "
     "--max-tokens 1", NULL, 0, ""},
    {"--d-model 37 --n-layer 2 --d-state 5 --d-conv 3 --seq-len 13 --batch-size 3 --steps 2 --max-tokens 3 "
     "--out fresh --data a.txt", NULL, 0, ""},
    {"--d-model 37 --pattern 1m --n-layer 1 --recompute --seq-len 7 --batch-size 1 --steps 2 --max-tokens 3 "
     "--out fresh --data a.txt", NULL, 0, ""},
    {"--d-model 1 --expand 1 --dt-rank 1 --d-state 1 --d-conv 1 --n-layer 1 --seq-len 1 --batch-size 1 "
     "--steps 2 --max-tokens 3 --out fresh --data a.txt", NULL, 0, ""},
    {NEW "--steps 2 --carry-state --grad-accum 3 --schedule wsd --decay-steps 100 --warmup 100", NULL, 0, ""},
    {"generate --from run --max-tokens 3 --prompt -", "empty.txt", 0, "prompt: 0 tokens"},
    {"generate --from run --max-tokens 3 --prompt -", "nul.txt", 0, "prompt: 6"},
    {"generate --from run --max-tokens 3 --prompt \t\t\t", NULL, 0, "prompt: 3 "},
    {"generate --from run --max-tokens 3 --prompt @", NULL, 0, "prompt: 10000"},
    {"generate --from run --max-tokens 0", NULL, 0, ""},
    {"generate --from run --max-tokens 3 --temperature 1e-30 --top-p 1e-300 --top-k 999 "
     "--seed 18446744073709551615", NULL, 0, ""},
    {"eval --from run --data a.txt --seq-len 100000 --batch-size 1", NULL, 0, ""},
    {"info --preset mamba-2.8b", NULL, 0, ""}, {"info --d-model 64", NULL, 0, ""}, {"--help", NULL, 0, ""},
    {"generate -h", NULL, 0, ""},
    {NEW "--steps 20 --lr 1e3 --warmup 0 --schedule constant --clip 0", NULL, 1, "not finite"},
    {NEW "--preset mamba-2.8b --n-layer 64 --batch-size 100000", NULL, 1, "given twice"},
    {"--out fresh --data a.txt --preset mamba-2.8b --batch-size 100000", NULL, 1, "GiB"},
    {"--out fresh --data a.txt --n-layer 1 --d-model 4611 --batch-size 301822 --seq-len 99965908",
     NULL, 1, "63 bits"},
};

void cli_prepare(void) {
    char line[64], self[4000];
    const char nan_bytes[] = {0, 0, (char)0xC0, 0x7F, 0, 0, (char)0xF8, 0x7F};
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n > 0 ? n : 0] = 0;
    if (n <= 0) die("test: cannot find the program beside this test");
    *strrchr(self, '/') = 0;
    snprintf(cli_program, sizeof cli_program, "%s/train_mamba", self);
    if (access(cli_program, X_OK) != 0) die("%s: not found; build it first: make", cli_program);
    for (int i = 0; i < 200; i++)
        cli_write("a.txt", line, (size_t)sprintf(line, "the quick brown fox %d jumps over the lazy dog\n", i),
                  i ? "ab" : "wb");
    for (int i = 0; i < 300; i++) {
        cli_write("newlines.txt", "\n", 1, i ? "ab" : "wb");
        cli_write("nonewline.txt", "ab ", 3, i ? "ab" : "wb");
        cli_write("crlf.txt", "x\r\n", 3, i ? "ab" : "wb");
    }
    cli_write("empty.txt", "", 0, "wb");
    cli_write("one.txt", "x", 1, "wb");
    cli_write("utf16.txt", "\xFF\xFEh\0i\0", 6, "wb");
    cli_write("nul.txt", "a\0b\xFF\xC3z", 6, "wb");
    cli_shell("mkfifo fifo && mkdir d_empty d_dangling d_elsewhere && "
              "ln -s step_00000099 d_dangling/last && ln -s ../run d_elsewhere/last", "", "");
    Finished f = cli_run(TOY "--data a.txt --out run --steps 5");
    if (f.code != 0) die("the toy run ended with code %d: %.300s", f.code, f.err);
    cli_shell("for d in steps plain format letter nan samples best; do cp -r run d_$d; done; "
              "rm d_steps/last d_plain/last && mkdir d_plain/last && cp a.txt b.txt", "", "");
    if (!cli_replace("d_format/last/optimizer.safetensors", "\"ssm_c_format\":\"1\"",
                     "\"ssm_c_format\":\"2\"") ||
        !cli_replace("d_letter/last/config.json", "\"pattern\": \"1\"", "\"pattern\": \"q\""))
        die("the checkpoint does not look as expected");
    struct stat info;
    if (stat(scratch("d_nan/last/model.safetensors"), &info) != 0 ||
        truncate(scratch("d_nan/last/model.safetensors"), info.st_size - 8) != 0)
        die("d_nan");
    cli_write("d_nan/last/model.safetensors", nan_bytes, 8, "ab");
    if (!cli_replace("d_samples/last/optimizer.safetensors", "\"samples\":\"10\"", "\"samples\":\"-9\"") ||
        !cli_replace("d_best/last/optimizer.safetensors", "\"best_step\":\"5\"", "\"best_step\":\"9\""))
        die("the optimizer does not look as expected");
    f = cli_run(TOY "--data a.txt --out d_carry --steps 5 --carry-state");
    f = cli_run(TOY "--data b.txt --out d_data --steps 5");
    cli_write("b.txt", "more", 4, "ab");
}

// Signals: saved, and the resumed run equals one that was never stopped. Catches: a lost save, a lost
// evaluation.
void cli_signals(void) {
    static const struct {
        const char *name, *args;
        int signals[2], code;
        bool pipe_closed, nohup, saved;
    } row[] = {
        {"Ctrl-C once", "", {SIGINT, 0}, 130, false, false, true},
        {"Ctrl-C twice", "", {SIGINT, SIGINT}, 130, false, false, false},
        {"SIGTERM", "", {SIGTERM, 0}, 143, false, false, true},
        {"SIGHUP", "", {SIGHUP, 0}, 129, false, false, true},
        {"SIGTERM, then SIGHUP, as at shutdown", "", {SIGTERM, SIGHUP}, 143, false, false, true},
        {"SIGHUP under nohup, then SIGTERM", "", {SIGHUP, SIGTERM}, 143, false, true, true},
        {"Ctrl-C that also ends the reader of stdout (| tee)", "--log-every 1 ", {SIGINT, 0},
         130, true, false, true},
        {"Ctrl-C during evaluation", "--eval-every 1 --eval-batches 50 --lr 0 --min-lr 0 ", {SIGINT, 0},
         130, false, false, true},
        {"Ctrl-C while a sample reads its prompt", "--sample-every 1 --prompt @ ", {SIGINT, 0},
         130, false, false, true},
    };
    const int n = (int)(sizeof row / sizeof row[0]);
    for (int i = 0; i < n; i++) {
        char args[400];
        int fd[2] = {0, 0};
        bool evaluation = strstr(row[i].args, "--eval-every") != NULL;
        snprintf(args, sizeof args,
                 "--d-model 16 --n-layer 1 --seq-len 16 --batch-size 2 --max-tokens 0 --val-fraction 0.5 "
                 "--out sig --data a.txt %s --steps %d %s",
                 evaluation ? "" : "--eval-every 0",
                 evaluation ? 150 : 4000, row[i].args);
        if (strstr(args, "--prompt")) {
            *strstr(args, "--max-tokens 0") = 0;
            strcat(args, "--max-tokens 1 --out sig --data a.txt --eval-every 0 --steps 300 "
                         "--sample-every 1 --prompt @");
        }
        Launch l;
        memset(&l, 0, sizeof l);
        l.args = args;
        l.hangup_ignored = row[i].nohup;
        if (row[i].pipe_closed && pipe(fd) != 0) die("pipe: %s", strerror(errno));
        l.out_fd = fd[1];
        pid_t pid = cli_start(&l);
        if (fd[1]) close(fd[1]);
        bool ok = cli_wait_for_rows("sig/log.csv", 10);
        if (fd[0]) close(fd[0]);
        kill(pid, row[i].signals[0]);
        if (row[i].signals[1] != row[i].signals[0])
            cli_signal_arrived(pid, row[i].signals[0]);    // else they arrive together, in any order
        if (row[i].signals[1]) kill(pid, row[i].signals[1]);
        Finished f = cli_wait(pid, 5);
        bool pipe_end = row[i].pipe_closed && f.code == 128 + SIGPIPE;
        ok = ok && (f.code == row[i].code || pipe_end) && f.err_size == 0 &&
             (!row[i].saved || cli_exists("sig/last"));
        cli_check(ok, row[i].name, &f);
        if (row[i].saved && ok && (i == 0 || evaluation)) {    // goes on, and ends as if nothing had happened
            f = cli_run("--out sig --resume");
            cli_check(f.code == 0, "resumed after a signal", &f);
            char* out = strstr(args, "--out sig");
            memcpy(out, "--out ref", 9);
            f = cli_run(args);
            const char* const file[] = {"model.safetensors", "optimizer.safetensors", "config.json"};
            for (int k = 0; k < 3; k++) {
                char a[80], b[80];
                snprintf(a, sizeof a, "sig/last/%s", file[k]);
                snprintf(b, sizeof b, "ref/last/%s", file[k]);
                uint64_t hash = cli_hash(scratch(a));
                cli_check(hash != 0 && hash == cli_hash(scratch(b)), file[k], NULL);
            }
            cli_shell("cut -d, -f1-4,6- sig/log.csv > sig.cut; cut -d, -f1-4,6- ref/log.csv > ref.cut", "",
                      "");
            cli_check(cli_hash(scratch("sig.cut")) == cli_hash(scratch("ref.cut")),
                      evaluation ? "log.csv after a stop in an evaluation" : "log.csv after a stop", NULL);
        }
        cli_shell("rm -rf sig ref", "", "");
    }
    // Ctrl-C where nothing was trained yet, and where a prompt is awaited
    int fd[2];
    Launch l;
    memset(&l, 0, sizeof l);
    l.args = "generate --from run --prompt - --max-tokens 3";
    if (pipe(fd) != 0) die("pipe: %s", strerror(errno));
    l.in_fd = fd[0];
    pid_t pid = cli_start(&l);
    usleep(150000);
    kill(pid, SIGINT);
    Finished f = cli_wait(pid, 1);
    close(fd[0]);
    close(fd[1]);
    cli_check(f.code == 130, "generate: Ctrl-C while it waits for the prompt", &f);
    l.in_fd = 0;
    l.args = NEW "--steps 100000";
    pid = cli_start(&l);
    usleep(2000);
    kill(pid, SIGINT);
    f = cli_wait(pid, 2);
    cli_check(f.code == 130 && f.err_size == 0, "Ctrl-C before the first step", &f);
    cli_shell("rm -rf fresh", "", "");
    cli_group("signals: saved, resumed to the same bytes", n + 2);
}

// Two runs in one directory, leftovers, a directory that vanishes, little memory.
void scratch_directories(void) {
    Launch l;
    memset(&l, 0, sizeof l);
    l.args = NEW "--steps 100000000 --save-every 1000000";
    for (int i = 0; i < 8; i++) {                // both at the same moment: one trains, the other is refused
        Launch second = l;
        pid_t a = cli_start(&l), b = cli_start(&second), first = 0;
        int status = 0;
        double start = seconds_now();
        while ((first = waitpid(-1, &status, WNOHANG)) == 0 && seconds_now() - start < 30) usleep(500);
        pid_t other = first == a ? b : a;
        bool running = first > 0 && cli_wait_for_rows("fresh/log.csv", 3);
        size_t size;
        Finished refused = {
            WIFEXITED(status) ? WEXITSTATUS(status) : -1, 0, 0, NULL, cli_read("err.txt", &size), 0, 0};
        refused.err_size = size;
        kill(other, SIGINT);
        Finished f = cli_wait(other, 3);
        if (first <= 0) kill(a == other ? b : a, SIGKILL), waitpid(a == other ? b : a, &status, 0);
        cli_check(running && refused.code == 1 && strstr(refused.err, "in use") && f.code == 130,
                  "two runs started at once", &refused);
        cli_shell("rm -rf fresh", "", "");
    }
    cli_shell("mkdir -p fresh/step_00000007.tmp && echo > fresh/step_00000007.tmp/model.safetensors", "", "");
    int lock = open(scratch("fresh/.lock"), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (lock < 0 || flock(lock, LOCK_EX) != 0) die("flock: %s", strerror(errno));
    Finished f = cli_run(NEW "--steps 5");
    cli_check(f.code == 1 && strstr(f.err, "in use") && cli_exists("fresh/step_00000007.tmp"),
              "a refused second run leaves the save of the first alone", &f);
    close(lock);
    f = cli_run(NEW "--steps 5");
    cli_check(f.code == 0 && strstr(f.out, "removed fresh/step_00000007.tmp") &&
                  !cli_exists("fresh/step_00000007.tmp"),
              "a stale save is removed, with a line", &f);
    cli_shell("mkdir fresh/step_00000009.tmp", "", "");
    f = cli_run("--out fresh --resume --steps 6");
    cli_check(f.code == 0 && strstr(f.out, "step_00000005, step 5"), "a stale save is not resumed from", &f);
    cli_shell("rm -rf fresh", "", "");
    l.args = NEW "--steps 30000 --save-every 3000 --log-every 1000";
    pid_t pid = cli_start(&l);
    bool ok = cli_wait_for_rows("fresh/log.csv", 5);
    cli_shell("rm -rf fresh", "", "");
    f = cli_wait(pid, 8);
    cli_check(ok && f.code == 1 && strstr(f.err, "warning: could not save") && strstr(f.out, "done: 30000"),
              "out removed during the run: warnings, code 1 at the end", &f);
    l.memory = (rlim_t)1 << 30;
    static const char* const large[] = {
        "--out fresh --data a.txt --preset mamba-790m --batch-size 1",
        "eval --from run --data a.txt --batch-size 1000000",
        "--d-model 16 --n-layer 1 --seq-len 256 --out fresh --data a.txt --steps 1 --grad-accum 1000000",
        "generate --from run --num-samples 65536 --chunk 1000000 --max-tokens 1"};
    for (int i = 0; i < (SANITIZED ? 0 : 4); i++) {
        l.args = large[i];
        f = cli_wait(cli_start(&l), 5);
        cli_check(i == 3 ? f.code == 0 || (f.code == 1 && cli_one_line(&f))
                         : f.code == 1 && cli_one_line(&f) && strstr(f.err, "memory") &&
                               !strstr(f.err, "out of memory"),
                  large[i], &f);
        cli_shell("rm -rf fresh", "", "");
    }
    static const char* const limited[] = {"convert --from run --out fresh/limited",
                                          "--d-model 64 --data a.txt --out fresh --steps 1 --max-tokens 0"};
    for (int i = 0; i < 2; i++) {                        // a file size limit is an error, not a signal
        char command[10000];
        snprintf(command, sizeof command, "cd %s && (ulimit -f 8; %s %s > out.txt 2> err.txt; test $? = 1)",
                 scratch_dir, cli_program, limited[i]);
        ok = system(command) == 0;
        f.err = cli_read("err.txt", &f.err_size);
        cli_check(ok && strstr(f.err, "File too large") && !cli_exists("fresh/limited"), limited[i], &f);
        cli_shell("rm -rf fresh", "", "");
    }
    cli_group("directories and memory", 19);
}

// What is printed, and where to. Catches: text in a file of another descriptor, half characters, a locale.
void cli_output(void) {
    Launch l;
    memset(&l, 0, sizeof l);
    int fd[2];
    l.args = "generate --from run --max-tokens 100000000 --top-k 1";
    if (pipe(fd) != 0) die("pipe: %s", strerror(errno));
    l.out_fd = fd[1];
    pid_t pid = cli_start(&l);
    close(fd[1]);
    char byte;
    bool ok = read(fd[0], &byte, 1) == 1;
    close(fd[0]);
    Finished f = cli_wait(pid, 2);
    cli_check(ok && f.code == 128 + SIGPIPE && f.err_size == 0, "generate | head: ends quietly", &f);
    l.out_fd = 0;
    l.output = "/dev/full";
    f = cli_wait(cli_start(&l), 2);
    cli_check(f.code == 1 && cli_one_line(&f) && strstr(f.err, "No space"),
              "generate into /dev/full: a line, at once", &f);
    const char* const results[] = {"info --from run", "--help", "eval --from run --data a.txt --seq-len 16"};
    for (int i = 0; i < 3; i++) {
        l.args = results[i];
        f = cli_wait(cli_start(&l), 2);
        cli_check(f.code == 1 && cli_one_line(&f) && strstr(f.err, "No space"), results[i], &f);
    }
    l.args = NEW "--steps 20 --sample-every 5";
    f = cli_wait(cli_start(&l), 2);
    cli_check(cli_exists("fresh/step_00000020"), "train into /dev/full: trains and saves", &f);
    cli_shell("rm -rf fresh", "", "");
    l.output = "-";
    f = cli_wait(cli_start(&l), 2);
    size_t size, log_size;
    char *lock = cli_read("fresh/.lock", &size), *log = cli_read("fresh/log.csv", &log_size);
    cli_check(cli_exists("fresh/step_00000020") && size < 20 && !strstr(log, "--") && !strstr(lock, "data:"),
              "train with stdout closed: no file is written into", &f);
    cli_shell("rm -rf fresh", "", "");
    l.output = NULL;
    // the same bytes under any locale, without HOME and TERM, and no control codes
    static const char* const env[] = {NULL, "LC_ALL=de_DE.UTF-8", "LC_ALL=tr_TR.UTF-8", "LC_ALL=C"};
    uint64_t hash[4];
    for (int i = 0; i < 4; i++) {
        l.args = "--d-model 16 --n-layer 1 --seq-len 16 --batch-size 2 --steps 20 --eval-every 10 "
                 "--max-tokens 0 --out fresh --data a.txt";
        l.env = env[i];
        l.bare = i == 3;
        f = cli_wait(cli_start(&l), 5);
        cli_shell("cut -d, -f1-4,6- fresh/log.csv > cut && rm -rf kept && mkdir kept && "
                  "mv cut fresh/step_00000020 kept && rm -rf fresh", "", "");
        hash[i] = cli_hash(scratch("kept"));
        int control = 0;
        for (size_t k = 0; k < f.out_size; k++) control += f.out[k] != '\n' && (unsigned char)f.out[k] < 32;
        cli_check(f.code == 0 && control == 0 && hash[i] == hash[0], env[i] ? env[i] : "no control codes",
                  &f);
    }
    l.env = NULL;
    l.bare = false;
    // text: valid UTF-8 unless raw, whatever the prompt
    static const char* const text[] = {
        "--max-tokens 3000 --temperature 1", "--max-tokens 500 --num-samples 5",
        "--max-tokens 0 --prompt \xC3\x28\xFF", "--max-tokens 50 --prompt caf\xC3"};
    for (int i = 0; i < 4; i++) {
        char args[200];
        snprintf(args, sizeof args, "generate --from run %s", text[i]);
        f = cli_run(args);
        cli_check(f.code == 0 && f.out_size > 0 && cli_utf8(f.out, f.out_size),
                  "valid UTF-8 for any tokens and prompt", &f);
    }
    f = cli_run("generate --from run --raw --max-tokens 3000 --temperature 1");
    cli_check(f.code == 0 && !cli_utf8(f.out, f.out_size), "--raw passes bytes through", &f);
    // a long prompt streams: memory does not grow with it
    FILE* big = fopen(scratch("big.txt"), "wb");
    const int big_size = SANITIZED ? 1000000 : 10000000;
    for (int i = 0; big && i < big_size; i++) fputc('a' + i % 26, big);
    if (!big || fclose(big) != 0) die("big.txt: cannot write");
    l.args = "generate --from run --max-tokens 2 --prompt -";
    l.input = "a.txt";
    Finished little = cli_wait(cli_start(&l), 5);
    l.input = "big.txt";
    f = cli_wait(cli_start(&l), 10);
    bool all_read = f.code == 0 && strstr(f.err, SANITIZED ? "prompt: 1000000 t" : "prompt: 10000000 t");
    cli_check(all_read && (SANITIZED || f.peak_kib < little.peak_kib + 1024),
              "10 MB on stdin in constant memory", &f);
    cli_group("output: streams, locales, UTF-8", 17);
}

void test_cli(void) {
    cli_prepare();
    cli_rows("wrong options: one line, nothing touched", cli_options, COUNT_OF(cli_options));
    cli_rows("files and directories: one line, nothing touched", cli_files, COUNT_OF(cli_files));
    cli_rows("odd sizes, odd texts, diverging, too large", cli_odd, COUNT_OF(cli_odd));
    cli_signals();
    scratch_directories();
    cli_output();
}
