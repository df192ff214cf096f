"""Does `eval` measure what lm-evaluation-harness measures?

    python dev/reference/check_eval.py [--binary build/train_mamba] [checkpoint directory of ours]
                                       [--options '--device cuda --precision fp32']

Needs `pip install lm-eval accelerate peft`. Makes a small set of texts and items, lets our program and the
harness (its HFLM over transformers' MambaForCausalLM in float32, on the CPU) score them, and compares:

  text      loss, bits per byte: loglikelihood_rolling with windows as long as the text, and strided windows
            as its get_rolling_token_windows cuts them; JSON lines too
  lambada   every log-likelihood, acc, perplexity of its task lambada_openai
  choice    every log-likelihood, acc, acc_norm, acc_bytes of its multiple_choice tasks, and standard errors

The items come through the harness's own tasks (their fields are in tasks()), so that the splitting of
contexts, the metrics and their aggregation are the harness's, not ours. Without a directory a random model of
transformers with the tokenizer in dev/reference/fixtures/tokenizers/neox is used, then a model of bytes that our program
trains. Limit: 1e-4, relative. Exit code 1 on failure.
"""
import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows
from transformers import MambaForCausalLM, PreTrainedTokenizerFast

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
# defines: random_model
from check_checkpoint import random_model

LIMIT = 1e-4
WORDS = ("the model reads a text and keeps a state of fixed size which it carries from one word to next "
         "naïve café Zürich 日本語 emoji 🙂 1234 42 don't re-scan, (brackets) e.g. x_i = y").split()


def words(rng, n):
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=rng).tolist())


def make_files(directory):
    """The texts and items, less than 50 KB"""
    rng = torch.Generator().manual_seed(7)
    texts = [words(rng, 2 + 5 * i) + ("\n" if i % 2 else "") for i in range(8)]
    lambada = [{"text": words(rng, 3 + i)} for i in range(30)] + [{"text": "alone"}, {"text": "two  blanks"}]
    choice = []
    for i in range(40):
        n = 2 + i % 4
        context = words(rng, i) + ["", " ", "\n\n", "\u3000 "][i % 4] if i else ""
        choice.append({"context": context, "gold": i % n,
                       "choices": [words(rng, 1 + (i + k) % 7) for k in range(n)]})
    with open(os.path.join(directory, "text.txt"), "w") as file:
        file.write("\n".join(texts))
    for name, rows in (("documents", [{"text": t} for t in texts]), ("lambada", lambada), ("choice", choice)):
        with open(os.path.join(directory, name + ".jsonl"), "w") as file:
            file.writelines(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows))
    return "\n".join(texts), texts


def tasks(directory):
    """The harness's lambada_openai and multiple choice with our files as their data set"""
    def data(name):
        files = {"test": os.path.join(directory, name)}
        return dict(dataset_path="json", dataset_kwargs={"data_files": files}, test_split="test")

    return {
        "lambada": dict(task="lambada", output_type="loglikelihood", **data("lambada.jsonl"),
                        doc_to_text="{{text.split(' ')[:-1]|join(' ')}}",
                        doc_to_target="{{' '+text.split(' ')[-1]}}",
                        metric_list=[dict(metric="perplexity", aggregation="perplexity",
                                          higher_is_better=False),
                                     dict(metric="acc", aggregation="mean", higher_is_better=True)]),
        "choice": dict(task="choice", output_type="multiple_choice", **data("choice.jsonl"),
                       doc_to_text="{{context}}", doc_to_target="gold", doc_to_choice="{{choices}}",
                       metric_list=[dict(metric=m, aggregation="mean", higher_is_better=True)
                                    for m in ("acc", "acc_norm", "acc_bytes")])}


def ours(binary, checkpoint, scratch, *options):
    out = os.path.join(scratch, "results.json")
    if os.path.exists(out):
        os.remove(out)
    done = subprocess.run([binary, "eval", "--from", checkpoint, "--results", out, *options],
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{binary} eval {' '.join(options)}: {done.stderr.strip()}")
    with open(out) as file:
        return json.load(file)


class Rows:
    failed = False

    def add(self, claim, ours, theirs):
        error = max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(ours, theirs)) if ours else math.inf
        if len(ours) != len(theirs):
            error = math.inf
        Rows.failed |= not error <= LIMIT
        print(f"{'ok  ' if error <= LIMIT else 'FAIL'} {claim:58} {len(ours):5} numbers   worst {error:.1e}",
              flush=True)


def check(rows, name, binary, checkpoint, extra, scratch):
    text, documents = make_files(scratch)
    at = lambda file: os.path.join(scratch, file)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=os.path.join(checkpoint, "tokenizer.json"),
                                        eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    model = MambaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=1 << 20, batch_size=1,
              device="cpu")

    run = lambda *options: ours(binary, checkpoint, scratch, *extra, *options)
    ids = lm.tok_encode(text)
    per_byte = lambda result: [result["loss"], result["bits_per_byte"]]

    def rolling(texts):
        requests = [Instance("loglikelihood_rolling", {}, (t,), 0) for t in texts]
        return -sum(lm.loglikelihood_rolling(requests, disable_tqdm=True))

    def expected(loss, tokens, texts):
        return [loss / tokens, loss / math.log(2) / sum(len(t.encode()) for t in texts)]

    theirs = expected(rolling([text]), len(ids), [text])
    for chunk in (7, 256):
        rows.add(f"{name}: text, state carried, passes of {chunk}",
                 per_byte(run("--task", "text", "--data", at("text.txt"), "--seq-len", str(chunk),
                              "--batch-size", "1")), theirs)
    if len(tokenizer) > 257:                     # a byte tokenizer has no documents in JSON lines
        rows.add(f"{name}: documents in JSON lines",
                 per_byte(run("--task", "text", "--data", at("documents.jsonl"))),
                 expected(rolling(documents), sum(len(lm.tok_encode(t)) for t in documents), documents))
    for window, stride in ((64, 64), (64, 16), (21, 8), (1 << 14, 7)):
        windows = get_rolling_token_windows(ids, lm.prefix_token_id, window, window - stride + 1)
        requests = [((None, None), *lm_window(w)) for w in windows]
        scores = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        rows.add(f"{name}: text, windows of {window} by {stride}",
                 per_byte(run("--task", "text", "--data", at("text.txt"), "--window", str(window), "--stride",
                              str(stride))),
                 expected(-sum(s[0] for s in scores), len(ids), [text]))

    manager = TaskManager(include_defaults=False)
    result = evaluator.simple_evaluate(lm, tasks=list(tasks(scratch).values()), task_manager=manager,
                                       log_samples=True, bootstrap_iters=2, cache_requests=False)
    for task, metrics in (("lambada", ("acc", "perplexity", "acc_stderr")),
                          ("choice", ("acc", "acc_norm", "acc_bytes", "acc_stderr", "acc_norm_stderr"))):
        mine = run("--task", task, "--data", at(task + ".jsonl"), "--batch-size", "5")
        got = result["results"][task]
        known = [m for m in metrics if isinstance(got.get(m + ",none"), (int, float))]
        print("    ", ", ".join(f"{m} {got[m + ',none']:.4f}" for m in known))
        rows.add(f"{name}: {task}: {len(known)} metrics", [mine[m] for m in known],
                 [got[m + ",none"] for m in known])
        samples = sorted(result["samples"][task], key=lambda s: s["doc_id"])
        theirs = [[float(np.ravel(r[0])[0]) for r in s["resps"]] for s in samples]
        rows.add(f"{name}: {task}: log-likelihoods", sum(mine["loglikelihoods"], []), sum(theirs, []))


def lm_window(window):
    """A rolling window as context and continuation"""
    inputs, targets = window
    whole = inputs + targets[-1:]
    return whole[:len(whole) - len(targets)], targets


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--binary", default="build/train_mamba")
    parser.add_argument("--options", default="", help="more options of our program")
    args = parser.parse_args()
    rows, extra = Rows(), args.options.split()
    with tempfile.TemporaryDirectory() as scratch:
        if args.checkpoint:
            check(rows, os.path.basename(args.checkpoint.rstrip("/")), args.binary, args.checkpoint, extra,
                  scratch)
        else:
            fixture = os.path.join(HERE, "fixtures", "tokenizers", "neox", "tokenizer.json")
            with open(fixture) as file:
                data = json.load(file)
            n_ids = 1 + max([*data["model"]["vocab"].values(), *(t["id"] for t in data["added_tokens"])])
            directory = os.path.join(scratch, "model")
            model = random_model(3, hidden_size=48, num_hidden_layers=3, vocab_size=n_ids)
            model.save_pretrained(directory)
            shutil.copy(fixture, directory)
            check(rows, "neox", args.binary, directory, extra, scratch)
            subprocess.run([args.binary, "train", "--data", os.path.join(scratch, "text.txt"), "--steps",
                            "300",
                            "--d-model", "32", "--n-layer", "2", "--seq-len", "64", "--val-fraction", "0",
                            "--max-tokens", "0", "--out", os.path.join(scratch, "run")],
                           check=True, capture_output=True)
            check(rows, "bytes, trained", args.binary, os.path.join(scratch, "run", "last"), extra, scratch)
    sys.exit(Rows.failed)


if __name__ == "__main__":
    main()
