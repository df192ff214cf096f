#!/usr/bin/env python3
"""mutate.py: would the tests notice a wrong line? Changes the mathematics of train_mamba.c in one place at a
time (a mutant), builds the test suite with it and expects the suite to fail (the mutant is killed).

  make mutate        a random sample, at most five minutes          make mutate-all     every mutant (hours)
  mutate.py --only causal_conv1d_forward --all                      all mutants of one function

Each mutant runs the fast cases in a build without optimization, then the double suite; if that does not
notice, the float suite, and then the double suite under AddressSanitizer (an index one too far is often only
seen there). A crash or an endless loop is noticed, too.
A mutant whose machine code is that of the original in both builds changes nothing and is not counted, nor
is one that does not compile, nor one that equivalent.txt declares to be without effect. Of the others at
least 98 % must be killed; the rest are listed: each is a line that could be wrong without a test failing."""

import argparse, bisect, concurrent.futures, hashlib, os, random, re, shutil, signal, subprocess, sys
import tempfile, threading, time

HERE = os.path.dirname(os.path.abspath(__file__))
SECTIONS = ["Matmul", "Layers", "Blocks", "Model", "Optimizer", "Sampling"]     # the mathematics
NEEDED = 0.98
# cases about files and about the harness itself: they do not judge the mathematics
SKIPPED_CASES = {"harness", "basics", "files", "data", "cli", "models", "tokenizer", "eval", "checkpoint", "resume"}

# What is never mutated, and why
EXCLUDED = [
    (r"^[ \t]*(typedef )?enum\s*\{[^}]*\}", "kinds need only differ; block sizes change no result"),
    (r"__attribute__\s*\(\(.*?\)\)(?=[;,\s])", "alignment"),
    (r"\bstatic_assert\([^;]*;", "checked by the compiler"),
    (r"\b(assert|die|fail|warn|snprintf|printf|free|state_free)\([^;]*;", "messages, memory given back"),
    (r"^[^\n]*(__builtin_prefetch|const char\* next =)[^\n]*$", "only asks for memory ahead of time"),
    (r"^typedef [^\n{]*;|^typedef struct \{[^}]*\}[^;]*;", "declarations"),
]
EXCLUDED_FUNCTIONS = {
    "block_shape": "how the threads share out the work: no result depends on it",
    "model_free": "memory", "workspace_free": "memory", "state_free": "memory",
}
PARTNER = {}                           # a size or index -> one it is easily confused with
for pair in """B T, E N, D M, I O, R K, F D, V M, Vp D, RBC E, b t, e n, l n, i j, m o, d m, k t, r v, c v,
        e0 n0,
        i0 j0, l0 j, m0 m, ldi ldo, lddi lddo, ai al, bl bj, ldy ldz, lddy lddz, ldbc E, rows cols, lanes
        states, tile chunk, beta1 beta2, lr min_lr, warmup decay, steps warmup, norm clip, params grads, s0
        sT, ds0 dsT, before sum, kept n, lo hi, INIT_ONE INIT_ZERO, INIT_LINEAR INIT_RESIDUAL, INIT_CONV
        INIT_LINEAR, INIT_DT_WEIGHT INIT_DT_BIAS, INIT_A_LOG INIT_ONE, Hq Hkv, ldq ldkv, lddq
        lddkv, dk dv, dk_p dv_p, kept length, start end, keys seen, kv0 kvT, a_i b_i, H P, G N, heads
        chunks, q Q, lambda state, x_c y_c, B_c C_c, dB_c dC_c, Bt Ct, dBt dCt, xs dys, CB dCB, e f, mlp Es,
        Es Cd, dA dD""".split(","):
    one, other = pair.split()
    PARTNER.setdefault(one, other)
    PARTNER.setdefault(other, one)
# in the tables of tensors only to a smaller one: a piece of workspace that is too large changes no result
for pair in """DIM_D DIM_1, DIM_E DIM_D, DIM_2E DIM_E, DIM_F DIM_1, DIM_2F DIM_F, DIM_R2N DIM_R,
        DIM_N DIM_1, DIM_K DIM_1, DIM_K1 DIM_1, DIM_R DIM_1, DIM_VP DIM_D, DECAY 0, IF_BIAS
        0, IF_CONV_BIAS 0, DIM_IN2 DIM_D, DIM_XBC DIM_ES, DIM_ES DIM_D, DIM_H DIM_1, DIM_P DIM_1, DIM_G
        DIM_1, DIM_DSKIP DIM_H, DIM_JOINED DIM_D, DIM_SSD_SAVED DIM_1, DIM_SSD_SCRATCH DIM_1, IF_RMSNORM 0""".split(","):
    PARTNER.update([pair.split()])


def blank(match):
    return re.sub(r"[^\n]", " ", match.group())


def mask(text):
    """the text with everything blank that is not mutated; all positions stay"""
    text = re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'", blank, text, flags=re.S)
    text = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", blank, text, flags=re.M)
    for pattern, _ in EXCLUDED:
        text = re.sub(pattern, blank, text, flags=re.M)
    return text


def closing(text, at):
    """the position after the parenthesis that closes the one at `at`"""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i + 1
    return len(text)


def statement(text, at):
    """start and end of the statement around `at`, None inside parentheses (the head of a for)"""
    start, depth = at, 0
    while start > 0:
        ch = text[start - 1]
        if ch in "])":
            depth += 1
        elif ch in "[(":
            if depth == 0:
                return None
            depth -= 1
            if depth == 0 and ch == "(" and re.search(r"\b(for|if|while)\s*$", text[:start - 1][-8:]):
                start = closing(text, start - 1)
                break
        elif depth == 0 and ch in ";{}":
            break
        start -= 1
    while text[start].isspace():
        start += 1
    end = at
    while text[end] != ";":
        if text[end] in ")]}":
            return None
        end = closing(text, end) if text[end] in "([{" else end + 1
    return start, end


def arguments(text, open_at):
    """spans of the arguments of the call whose parenthesis is at `open_at`"""
    spans, start, depth, end = [], open_at + 1, 0, closing(text, open_at) - 1
    for i in range(start, end + 1):
        if i == end or (text[i] == "," and depth == 0):
            a, b = start, i
            while a < b and text[a].isspace():
                a += 1
            spans.append((a, b))
            start = i + 1
        depth += (text[i] in "([{") - (text[i] in ")]}")
    return spans


CALL = r"\b(?!(?:if|for|while|switch|return|sizeof)\b)\w+\("


def candidates(text, start, stop):
    """(from, to, replacement, operator) for every mutant between two positions of the masked text"""
    def find(pattern):
        return re.compile(pattern).finditer(text, start, stop)

    not_dropped = re.compile(r"\w+\**\s+\**\w+\s*(=|\(|,)|return|case|else if|do")      # declarations first
    for m in find(r" [+-]= | = 0;|" + CALL):
        span = statement(text, m.start())
        if not span or not_dropped.match(text, *span):
            continue
        if not m.group().endswith("(") or span[0] == m.start():     # not a call inside an expression
            yield span[0], span[1], "", "drop"
    for m in find(r"(?<= )([+-])(?==? )"):
        yield m.start(), m.end(), "-" if m.group() == "+" else "+", "sign"
    for m in find(r"(?:(?<=[(=?:*] )|(?<=[(\[])|(?<=return ))-(?=[\w(])"):
        yield m.start(), m.end(), "", "sign"
    other = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
    limited = r"(?P<a>[\w.\[\]]+) [<>]=? (?P<b>[\w.\[\]>-]+)(?: \? (?P=a) : (?P=b)\b|\) (?P=a) = (?P=b);)"
    same = {m.start() + len(m.group("a")) + 1 for m in find(limited)}      # min or max: equal where a == b
    for m in find(r"(?<= )(<=?|>=?|==|!=)(?= )"):
        if m.start() in same:
            continue
        yield m.start(), m.end(), other[m.group()], "bound"
    for m in find(r"(?<= )([*/])(?==? )"):
        yield m.start(), m.end(), "/" if m.group() == "*" else "*", "factor"
    for m in find(r"(?<![\w.])\d+(?![\w.])"):
        line_start = text.rfind("\n", 0, m.start()) + 1
        line = text[line_start:text.index("\n", m.start())]
        declares = re.match(r"\s*(const |static )*(real|vec4?|int|size_t|int64_t)\b", line)
        if text[m.start() - 1] == "[" and declares:
            continue                            # the length of an array
        if re.match(r"\s*\{\s{3,}", line):
            continue                            # a row of a table of tensors: `swap` changes those
        if re.search(r"memset\([^,]*, $", text[line_start:m.start()]):
            yield m.start(), m.end(), "255", "constant"        # NaN: bytes of 1 are as good as zero
            continue
        yield m.start(), m.end(), str(int(m.group()) + 1), "constant"
        if int(m.group()) > 0 and not re.search(r"[+-] $", text[m.start() - 2:m.start()]):     # see shift
            yield m.start(), m.end(), str(int(m.group()) - 1), "constant"
    for m in find(r"(?<![\w.])(\d+\.\d*|\d+(?=e))(e[+-]?\d+)?f?(?![\w.])"):
        yield m.start(), m.end(), "(2 * %s)" % m.group(), "constant"
    for m in find(r"\b(\w+|\)|\]) [+-] 1\b(?! *[*<])"):
        yield m.start() + len(m.group(1)), m.end(), "", "shift"
    times = r"(?<![\w.>*&] )(?<![\w.>&*])(t|k|s|T|K|chunk|step|position|t0|l0|m0|n0|e0)\b"
    for m in find(times + r"(?!\s*(=[^=]|\+\+|--|->|\[|\(|\.|[+-]=))"):
        yield m.start(), m.end(), "(%s - 1)" % m.group(), "shift"
    not_declared = r"(?<![\w.>*&])(?<!size_t )(?<!int )(?<!int64_t )(?<!double )(?<!real )"
    for m in find(not_declared + r"[A-Za-z]\w*\b(?!\s*(=[^=]|\())"):
        if m.group() in PARTNER:
            yield m.start(), m.end(), PARTNER[m.group()], "swap"
    for m in find(r"\bif \((?!0 )"):
        end = closing(text, m.end() - 1)
        for constant in ("0 && (", "1 || ("):
            yield m.end(), end - 1, constant + text[m.end():end - 1] + ")", "condition"
    for m in find(CALL):
        if m.group() == "xcalloc(":
            continue                            # a product
        spans = arguments(text, m.end() - 1)
        for (a, b), (c, d) in zip(spans, spans[1:]):
            one, other = text[a:b], text[c:d]
            if one != other and re.search(r"[A-Za-z]", one) and re.search(r"[A-Za-z]", other):
                yield a, d, other + text[b:c] + one, "arguments"


class Mutant:
    def __init__(self, text, line_starts, section, function, start, end, new, operator):
        self.section, self.function, self.operator = section, function, operator
        self.start, self.end, self.new = start, end, new
        self.line = bisect.bisect(line_starts, start)
        first, last = line_starts[self.line - 1], text.index("\n", max(start, end - 1))
        self.before = text[first:last].strip()
        self.after = (text[first:start] + new + text[end:last]).strip()
        self.status, self.by, self.reason = "", "", ""

    def apply(self, text):
        missing = text[self.start:self.end].count("\n") - self.new.count("\n")
        return text[:self.start] + self.new + "\n" * missing + text[self.end:]


def make_mutants(text, only):
    masked, mutants, seen = mask(text), [], set()
    line_starts = [0] + [m.end() for m in re.finditer("\n", text)]
    heads = [(m.start(), m.group(1)) for m in re.finditer(r"^// -{90,}\n// \d+\. (\w+)", text, re.M)]
    heads.append((len(text), ""))
    # functions begin in the first column; their heads are left alone: a renamed parameter is no change
    head = re.compile(r"^(?!typedef|enum|\}|\s)[^\n;={}]*?(\w+)\([^;{}]*?\)\s*\{", re.M)
    functions = [(m.start(), m.group(1)) for m in head.finditer(masked)]
    masked = head.sub(lambda m: blank(m)[:-1] + "{", masked)
    starts = [f[0] for f in functions]
    for (begin, section), (end, _) in zip(heads, heads[1:]):
        if section not in SECTIONS:
            continue
        for a, b, new, operator in candidates(masked, begin, end):
            at = bisect.bisect(starts, a) - 1
            body = text[starts[at]:(starts + [len(text)])[at + 1]] if at >= 0 else ""
            inside = at >= 0 and "\n}" not in masked[starts[at]:a]
            function = functions[at][1] if inside else ""
            wanted = re.fullmatch(only or ".*", function) and function not in EXCLUDED_FUNCTIONS
            if not wanted or (a, b, new) in seen:
                continue
            if operator == "swap" and inside and not re.search(r"\b%s\b" % new, body):
                continue                        # the partner is unknown here
            seen.add((a, b, new))
            mutants.append(Mutant(text, line_starts, section, function, a, b, new, operator))
    return mutants


class Suite:
    """builds and runs test_mamba.c in directories of its own"""
    BUILDS = {"quick": ["-O0", "-DREAL=double"], "double": ["-O1", "-DREAL=double"],
              "float": ["-O1", "-DREAL=float"], "sanitized": ["-O1", "-DREAL=double",
              "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]}

    def __init__(self, root, base, args):
        self.root, self.base, self.args = root, base, args
        libraries = subprocess.check_output(["pkg-config", "--cflags", "--libs", "jansson", "libpcre2-8",
                                             "libutf8proc"], text=True)
        self.libraries = libraries.split() + ["-lm"]
        self.hash, self.seconds, self.killers, self.local = {}, {}, {}, threading.local()
        self.lock, self.n = threading.Lock(), 0

    def directory(self):
        if not hasattr(self.local, "path"):
            with self.lock:
                self.n += 1
                self.local.path = path = os.path.join(self.base, "worker%d" % self.n)
            os.makedirs(path + "/tmp")
            shutil.copy(self.root + "/test_mamba.c", path)
            for name in ("data", "dev"):
                os.symlink(os.path.join(self.root, name), os.path.join(path, name))
        return self.local.path

    def build(self, kind):
        command = [os.environ.get("CC", "cc"), "-std=gnu11", "-march=native", "-fopenmp", "-w",
                   "-Werror=incompatible-pointer-types", "-Werror=int-conversion", *self.BUILDS[kind],
                   "test_mamba.c", "-o", "t_" + kind, *self.libraries]
        done = subprocess.run(command, cwd=self.directory(), capture_output=True, text=True)
        if done.returncode:
            return None, done.stderr
        with open(os.path.join(self.directory(), "t_" + kind), "rb") as f:
            return hashlib.sha256(f.read()).hexdigest(), ""

    def run(self, kind, case):
        """the exit code; a limit on processor time, and another on the clock, stop endless loops"""
        cpu = int(5 + 10 * self.seconds.get((kind, case), 6))
        memory = "unlimited" if kind == "sanitized" else "16000000"
        env = dict(os.environ, OMP_WAIT_POLICY="passive", TMPDIR=self.directory() + "/tmp",
                   ASAN_OPTIONS="detect_leaks=0:quarantine_size_mb=0:thread_local_quarantine_size_kb=0")
        command = "ulimit -t %d; ulimit -v %s; ulimit -c 0; exec ./t_%s '%s'" % (cpu, memory, kind, case)
        p = subprocess.Popen(["sh", "-c", command], cwd=self.directory(), env=env, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, start_new_session=True)
        try:
            self.local.output = p.communicate(timeout=4 * cpu)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            self.local.output = "stopped by the clock"
        try:
            os.killpg(p.pid, signal.SIGKILL)    # children of a test that was stopped
        except ProcessLookupError:
            pass
        return p.wait() if self.local.output != "stopped by the clock" else -1

    def baseline(self, kind, text):
        with open(os.path.join(self.directory(), "train_mamba.c"), "w") as f:
            f.write(text)
        self.hash[kind], errors = self.build(kind)
        if not self.hash[kind]:
            sys.exit("error: the unchanged program does not compile (%s):\n%s" % (kind, errors))
        self.run(kind, "--list")
        cases = [case for case in self.local.output.splitlines()
                 if case not in self.args.skip and (not self.args.cases or case in self.args.cases)]
        failed = []
        for case in cases:
            start = time.time()
            failed += [case] if self.run(kind, case) else []
            self.seconds[kind, case] = time.time() - start
        if failed or not cases:
            sys.exit("error: the unchanged program must pass, but in the %s suite there fail: %s; fix them "
                     "first or leave them out with --skip" % (kind, ", ".join(failed) or "(none selected)"))
        return cases

    def judge(self, mutant, text):
        with open(os.path.join(self.directory(), "train_mamba.c"), "w") as f:
            f.write(mutant.apply(text))
        same = []
        for kind in self.BUILDS:
            if kind == "sanitized" and "double" in same:        # what only the float build contains
                continue
            digest, _ = self.build(kind)
            if not digest:
                mutant.status = "not compiled"
                return
            if kind in ("double", "float") and digest == self.hash[kind]:
                same.append(kind)
                continue
            # first what killed in this function before, then the fast ones
            known = self.killers.get(mutant.function, [])
            cases = [c for k, c in self.seconds if k == kind and (k != "quick" or self.seconds[k, c] < 0.7)]
            for case in sorted(cases, key=lambda c: (-known.count(c), self.seconds[kind, c])):
                if self.run(kind, case):
                    mutant.status, mutant.by = "killed", kind + " " + case
                    self.killers.setdefault(mutant.function, []).append(case)
                    return
        mutant.status = "same code" if len(same) == 2 else "survived"


def read_equivalents(path):
    """rows: function | operator | part of the changed line | reason"""
    with open(path) as f:
        return [line.strip().split(" | ") for line in f if line.strip() and line[0] != "#"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the random sample")
    parser.add_argument("--sample", type=int, default=120, help="mutants to draw")
    parser.add_argument("--all", action="store_true", help="every mutant, in random order, no time limit")
    parser.add_argument("--minutes", type=float, help="start none after that (default 4.5; --all: no limit)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", help="regular expression: functions to mutate")
    parser.add_argument("--cases", type=lambda s: set(s.split(",")), help="run only these cases of the suite")
    parser.add_argument("--skip", type=lambda s: SKIPPED_CASES | set(s.split(",")), default=SKIPPED_CASES)
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--root", default=os.path.dirname(os.path.dirname(HERE)), help=argparse.SUPPRESS)
    args = parser.parse_args()
    with open(args.root + "/train_mamba.c") as f:
        text = f.read()
    mutants = make_mutants(text, args.only)
    total = len(mutants)
    random.Random(args.seed).shuffle(mutants)
    mutants = mutants if args.all else mutants[:args.sample]
    if args.list:
        for m in sorted(mutants, key=lambda m: m.line):
            print("%d %s %s: %s  =>  %s" % (m.line, m.function, m.operator, m.before, m.after))
        sys.exit("%d mutants" % total)
    for function, operator, part, reason in read_equivalents(HERE + "/equivalent.txt"):
        for m in mutants:
            if m.function == function and m.operator == operator and part in m.after and part not in m.before:
                m.reason = reason
    begin = time.time()
    minutes = args.minutes if args.minutes else 1e9 if args.all else 4.5
    base = tempfile.mkdtemp(prefix="mutate_", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    try:
        suite = Suite(args.root, base, args)
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            cases = list(pool.map(lambda kind: suite.baseline(kind, text), reversed(Suite.BUILDS)))[0]
            print("%d of %d mutants, %d cases, %d jobs, seed %d; the unchanged program passes (%.0f s)" %
                  (len(mutants), total, len(cases), args.jobs, args.seed, time.time() - begin), flush=True)

            def work(m):
                if time.time() - begin < 60 * minutes:
                    suite.judge(m, text)
                    if m.status == "survived":
                        print("survived: line %d" % m.line, file=sys.stderr, flush=True)
            list(pool.map(work, mutants))
    finally:
        shutil.rmtree(base, ignore_errors=True)
    report(mutants, time.time() - begin)


def report(mutants, seconds):
    for m in mutants:
        if m.status == "survived" and m.reason:
            m.status = "equivalent"
    columns = ["killed", "survived", "equivalent", "same code", "not compiled", ""]
    print("%-12s %7s" % ("section", "mutants") + "".join("%13s" % (c or "not reached") for c in columns))
    for section in SECTIONS:
        rows = [m for m in mutants if m.section == section]
        counts = ["%13d" % sum(m.status == c for m in rows) for c in columns]
        print("%-12s %7d" % (section, len(rows)) + "".join(counts))
    killed, survived = (sum(m.status == s for m in mutants) for s in ("killed", "survived"))
    kinds = ", ".join("%d by the %s build" % (sum(m.by.startswith(k) for m in mutants), k)
                      for k in Suite.BUILDS)
    print("killed: %s. Wall time %.0f s" % (kinds, seconds))
    for m in sorted(mutants, key=lambda m: m.line):
        if m.status == "equivalent":
            print("\nequivalent, line %d: %s\n  + %s\n  %s" % (m.line, m.before, m.after, m.reason))
        if m.status == "killed" and m.reason:
            print("\nequivalent.txt is wrong about line %d (killed by %s):\n  - %s\n  + %s" %
                  (m.line, m.by, m.before, m.after))
    for m in sorted(mutants, key=lambda m: m.line):
        if m.status == "survived":
            print("\nSURVIVED, line %d in %s, %s\n  - %s\n  + %s" %
                  (m.line, m.function, m.operator, m.before, m.after))
    score = killed / (killed + survived) if killed + survived else 0
    ok = score >= NEEDED
    print("\nscore: %d of %d killed, %.1f %%; expected at least %.0f %%" %
          (killed, killed + survived, 100 * score, 100 * NEEDED))
    print("%d passed, %d failed" % (ok, not ok))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
