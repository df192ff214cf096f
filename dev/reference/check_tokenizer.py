#!/usr/bin/env python3
"""Compares our byte-level BPE with Hugging Face `tokenizers`: ids, then speed.

usage: check_tokenizer.py [--program build/train_mamba] [--strings 100000] [--seconds 20] [--fixtures DIR] [FILE...]

Without FILE two tokenizers are trained with that library on real text (tinyshakespeare, when it is there, and the
sources of Python's standard library): one like GPT-NeoX's (NFC, GPT-2's expression, added runs of spaces), one like
Llama 3's (its expression, ignore_merges, added tokens with every flag). FILE: a published tokenizer.json instead.

For each, random strings go through `tokenize` as JSON lines, and the ids in the shards must equal
Tokenizer.encode(text, add_special_tokens=False).ids with the end token in front of each string. The strings mix all
Unicode planes, combining marks, runs of spaces, newlines, digits, code, real text and added tokens; a second set has
invalid UTF-8, one file per document, which both sides replace (Python's errors="replace"). Then both encode the same
real text on one thread, in turns.

--fixtures DIR: only write the fixtures of dev/test/test_tokenizer.h: for two small tokenizers trained here, and for
the part of FILE (a published GPT-NeoX tokenizer.json) that ten known texts need, DIR/NAME/tokenizer.json and
expected.jsonl with texts, their ids and what the ids decode to.
Exit code 1 if an id differs. Needs the Python packages tokenizers and numpy.
"""
import argparse
import glob
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import numpy
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
ENDS = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>"]


def real_text():
    files = [f for f in ("/work/shared/data/tinyshakespeare.txt", "data/tinyshakespeare.txt") if os.path.exists(f)][:1]
    files += sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py"))
    return "".join(open(f, encoding="utf-8", errors="replace").read() for f in files)


def train(kind, text, vocab):
    """kind: neox or llama"""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama"))
    if kind == "neox":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|padding|>"] if kind == "neox" else ["<|end_of_text|>"]
    tokenizer.train_from_iterator(text.splitlines(True), trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    if kind == "neox":
        tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    else:
        tokenizer.add_special_tokens([
            AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True),
            AddedToken("<both>", lstrip=True, rstrip=True)])
        tokenizer.add_tokens([
            AddedToken("word", single_word=True), AddedToken("<n>", normalized=False), AddedToken("<nn>", normalized=True),
            AddedToken("<n", normalized=False), AddedToken("Ελλάς", normalized=True)])
    return tokenizer


def random_character(rng):
    """any code point of a plane that has characters, or of a private or empty one"""
    while True:
        plane = rng.choice([0, 0, 0, 0, 1, 1, 2, 3, 14, 15, 16, rng.randrange(17)])
        c = rng.randrange(plane << 16, (plane + 1) << 16)
        if not 0xD800 <= c < 0xE000: return chr(c)


def random_string(rng, text, added):
    parts = []
    for _ in range(rng.randrange(1, 12)):
        kind = rng.randrange(13)
        n = rng.randrange(1, 9)
        if kind == 0: parts.append(" " * rng.choice([1, 1, 2, 3, 4, 7, 8, 16, 23, 24, 25, 26, 49]))
        elif kind == 1: parts.append("".join(rng.choice("\n\n\r\t \u00a0\u2003\u3000\u180e\u0085\u2028") for _ in range(n)))
        elif kind == 2: parts.append("".join(rng.choice("0123456789²½٣Ⅷ৩") for _ in range(n)))
        elif kind == 3: parts.append("".join(random_character(rng) for _ in range(n)))
        elif kind == 4: parts.append("".join(rng.choice("aeiouAEcn") + chr(rng.randrange(0x300, 0x370)) *
                                             rng.randrange(3) for _ in range(n)))
        elif kind == 5: parts.append("".join(chr(rng.randrange(0xAC00, 0xD7A4)) if rng.random() < 0.5 else
                                             chr(rng.randrange(0x1100, 0x1200)) for _ in range(n)))
        elif kind == 6: parts.append("".join(chr(rng.randrange(0x4E00, 0x9FA6)) for _ in range(n)))
        elif kind == 7: parts.append("".join(rng.choice("'\"()[]{}<>|_-+=*/\\.,;:!?#%&@^~`$") for _ in range(n)))
        elif kind == 8: parts.append(rng.choice(["'s", "'LL", "'ve", "'RE", "'ſ", "'d", "'x", "I'm", "n't"]))
        elif kind == 9 and added: parts.append(rng.choice(added))
        elif kind == 10: parts.append("".join(chr(rng.randrange(0x20, 0x7F)) for _ in range(n)))
        elif kind == 11: parts.append("".join(chr(rng.randrange(0x80, 0x600)) for _ in range(n)))
        else:
            start = rng.randrange(len(text) - 100)
            parts.append(text[start:start + rng.randrange(1, 80)])
    return "".join(parts)


def read_shards(directory, split="train"):
    ids = []
    for path in sorted(glob.glob(f"{directory}/{split}_*.bin")):
        header = numpy.fromfile(path, numpy.uint32, 3)
        assert (header[0], header[1]) in ((20240520, 1), (20240801, 7)), header
        tokens = numpy.fromfile(path, numpy.uint16 if header[0] == 20240520 else numpy.uint32, offset=1024)
        assert len(tokens) == header[2], (path, len(tokens), header[2])
        ids.append(tokens.astype(numpy.int64))
    return numpy.concatenate(ids)


def our_ids(program, tokenizer_file, directory, files, threads):
    out = os.path.join(directory, "shards%d" % len(os.listdir(directory)))
    subprocess.run([program, "tokenize", "--tokenizer", tokenizer_file, "--data", *files, "--out", out, "--val-fraction",
                    "0", "--threads", str(threads)], check=True, stdout=subprocess.DEVNULL)
    assert open(out + "/tokenizer.json", "rb").read() == open(tokenizer_file, "rb").read()
    return read_shards(out)


def compare(name, ours, expected, texts):
    """expected: one list of ids for each text"""
    joined = numpy.concatenate([numpy.array(e, numpy.int64) for e in expected])
    if len(ours) == len(joined) and (ours == joined).all():
        print(f"  {name}: {len(texts)} texts, {len(joined)} ids equal")
        return True
    at, wrong = 0, 0
    for text, e in zip(texts, expected):
        if list(ours[at:at + len(e)]) != list(e):
            print(f"  {name}: {text!r}\n    expected {e[:40]}\n    found    {ours[at:at + len(e)].tolist()[:40]}")
            wrong += 1
            if wrong == 5: break
            at = at + len(e)
            while at < len(ours) and ours[at] != expected[0][0]: at += 1
            continue
        at += len(e)
    print(f"  {name}: DIFFERENT")
    return False


def check_ids(program, tokenizer, path, text, n, seed):
    rng = random.Random(seed)
    added = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
    end = next(tokenizer.token_to_id(e) for e in ENDS if tokenizer.token_to_id(e) is not None)
    texts = [random_string(rng, text, added) for _ in range(n)]
    ok = True
    with tempfile.TemporaryDirectory() as directory:
        expected = [[end] + e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
        lines = os.path.join(directory, "strings.jsonl")
        with open(lines, "w", encoding="utf-8") as f:
            for t in texts: f.write(json.dumps({"text": t}, ensure_ascii=rng.random() < 0.5) + "\n")
        ok &= compare("random strings", our_ids(program, path, directory, [lines], 4), expected, texts)
        blobs, files = [], []
        for i in range(max(n // 50, 1)):                                  # 2 %: files, each a document
            data = bytearray(random_string(rng, text, added).encode())
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(0x80, 0x100)
            files.append(os.path.join(directory, f"invalid{i:06d}.txt"))
            blobs.append(bytes(data))
            with open(files[-1], "wb") as f: f.write(blobs[-1])
        texts = [b.decode("utf-8", errors="replace") for b in blobs]
        expected = [[end] + tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
        found = numpy.concatenate([our_ids_quiet(program, path, directory, files[i:i + 500])
                                   for i in range(0, len(files), 500)])
        ok &= compare("invalid UTF-8", found, expected, blobs)
        long = os.path.join(directory, "long.txt")                       # many pieces, which must equal the whole
        whole = text * (1 + 12000000 // len(text)) + "".join(random_string(rng, text, added) for _ in range(20000))
        whole = whole.replace("\r", "")
        with open(long, "w", encoding="utf-8", newline="") as f: f.write(whole)
        ok &= compare("one long text", our_ids(program, path, directory, [long], 4),
                      [[end] + tokenizer.encode(whole, add_special_tokens=False).ids], [whole[:40]])
    return ok


def our_ids_quiet(program, path, directory, files):
    out = os.path.join(directory, "shards%d" % len(os.listdir(directory)))
    subprocess.run([program, "tokenize", "--tokenizer", path, "--data", *files, "--out", out, "--val-fraction", "0"],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return read_shards(out)


def check_speed(program, tokenizer, path, text, seconds):
    """both in turns, one thread: theirs encodes the text as a list of documents of 4,096 characters, ours the same as JSON lines"""
    texts = [text[i:i + 4096] for i in range(0, len(text), 4096)]
    size = len(text.encode())
    ours, theirs, start = [], [], time.time()
    with tempfile.TemporaryDirectory() as directory:
        lines = os.path.join(directory, "text.jsonl")
        with open(lines, "w") as f:
            for t in texts: f.write(json.dumps({"text": t}) + "\n")
        while time.time() - start < seconds or len(ours) < 5:
            begin = time.time()
            for t in texts: tokenizer.encode(t, add_special_tokens=False)
            theirs.append(time.time() - begin)
            out = os.path.join(directory, f"speed{len(ours)}")
            begin = time.time()
            subprocess.run([program, "tokenize", "--tokenizer", path, "--data", lines, "--out", out, "--val-fraction", "0",
                            "--threads", "1"], check=True, stdout=subprocess.DEVNULL)
            ours.append(time.time() - begin)
    ratio = sorted(t / o for t, o in zip(theirs, ours))
    print(f"  speed, one thread, {size / 1e6:.1f} MB, {len(ours)} turns: ours {size / 1e6 / statistics.median(ours):.1f} MB/s "
          f"(with start, files and fsync), tokenizers {size / 1e6 / statistics.median(theirs):.1f} MB/s, "
          f"ratio {statistics.median(ratio):.2f} ({ratio[0]:.2f} .. {ratio[-1]:.2f})")
    return statistics.median(ratio) >= 1


KNOWN = ["Hey how are you doing?", "Hello world", "  hello", "def f(x):\n    return x\n", "a" + " " * 25 + "b",
         "a" + " " * 26 + "b", "\n\n\nend", "It's 2024.", "na\u00efve \u00e9", "\u65e5\u672c\u8a9e",
         "My cat wrote all this CUDA code for a new language model and"]


def part_of(path, texts):
    """A tokenizer.json with the merges that can take part in these texts, and the ids of the published one. Some
    published copies have other tokens at id 0 and from 50277 on; the original has <|endoftext|> there and none."""
    with open(path, encoding="utf-8") as f: data = json.load(f)
    symbols = "\n".join("".join(w for w, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
                                .pre_tokenize_str(t)) for t in texts)
    merges = []
    for merge in data["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left + right in symbols: merges.append(left + " " + right)
    keep = set(pre_tokenizers.ByteLevel.alphabet()) | {m.replace(" ", "") for m in merges}
    data["model"]["vocab"] = {k: v for k, v in data["model"]["vocab"].items() if k in keep}
    data["model"]["merges"] = merges
    end = {"id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
           "normalized": False, "special": True}
    data["added_tokens"] = [end] + [t for t in data["added_tokens"] if 0 < t["id"] < 50277]
    return data


def write_fixtures(directory, files, text):
    rng = random.Random(7)
    made = {name: train(name, text, vocab) for name, vocab in (("neox", 700), ("llama", 900))}
    data = {name: json.loads(t.to_str()) for name, t in made.items()}
    if files:
        made["neox-20b-part"] = Tokenizer.from_file(files[0])
        data["neox-20b-part"] = part_of(files[0], KNOWN)
    for name, tokenizer in made.items():
        os.makedirs(f"{directory}/{name}", exist_ok=True)
        with open(f"{directory}/{name}/tokenizer.json", "w", encoding="utf-8") as f:
            f.write(json.dumps(data[name], ensure_ascii=False, separators=(",", ":")) + "\n")
        added = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
        texts = KNOWN if name == "neox-20b-part" else [random_string(rng, text, added) for _ in range(50)]
        with open(f"{directory}/{name}/expected.jsonl", "w", encoding="utf-8") as f:
            for t in texts:
                ids = tokenizer.encode(t, add_special_tokens=False).ids
                f.write(json.dumps({"text": t, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=False)},
                                   separators=(",", ":")) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="build/train_mamba")
    parser.add_argument("--strings", type=int, default=100000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fixtures")
    parser.add_argument("file", nargs="*")
    args = parser.parse_args()
    text = real_text()
    ok = True
    if args.fixtures:
        write_fixtures(args.fixtures, args.file, text)
        return
    with tempfile.TemporaryDirectory() as directory:
        files = list(args.file)
        for kind, vocab in (("neox", 8000), ("llama", 12000)) if not files else ():
            files.append(os.path.join(directory, kind + ".json"))
            train(kind, text, vocab).save(files[-1])
        for path in files:
            tokenizer = Tokenizer.from_file(path)
            print(f"{os.path.basename(path)}: {tokenizer.get_vocab_size()} tokens")
            ok &= check_ids(args.program, tokenizer, path, text, args.strings, args.seed)
            if args.seconds: ok &= check_speed(args.program, tokenizer, path, text[:8000000], args.seconds)
    sys.exit(not ok)


if __name__ == "__main__":
    main()
