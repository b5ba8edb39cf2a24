"""Text to heal novels-25m with, like that of its pretraining: 50% novels, 38% facts, 12% recall.

    python examples/20_healing_text.py novels-25m novels.jsonl.xz healing.jsonl.xz 2624

writes 2624 documents (21M tokens, a minute on 16 cores). With the tokenizer's end token each is
just 8192 tokens long, so that packing gives one document a row and no fact is cut off its question.
"""

import json
import lzma
import random
import sys
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from transformers import AutoTokenizer

from hysparse_cli.texts.documents import read_documents
from hysparse_cli.texts.facts import Task, write_context

TOKENS = 8191  # and the end token
NOVELS, FACTS = 0.5, 0.38
FORMS = ("magic-number", "secret", "key-value")
SEED = 777  # eval's contexts have seed 0: other keys, other values


def prepare(model: str, novels: str) -> None:
    global tokenizer, texts
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    texts = list(read_documents(Path(novels)))


def document(index: int) -> str:
    """The ``index``-th document, which the tokenizer reads as TOKENS tokens."""
    rng = random.Random(f"{SEED} {index}")
    kind = rng.random()
    form = rng.choice(FORMS) if kind < NOVELS + FACTS else "recall"
    while True:
        if kind < NOVELS:
            novel = rng.choice(texts)
            begin = rng.randrange(max(1, len(novel) - 5 * TOKENS))
            ids = tokenizer(novel[begin : begin + 8 * TOKENS], verbose=False)["input_ids"]
        else:
            facts = rng.randint(1, 48)
            task = Task(form, TOKENS, facts, min(facts, rng.randint(1, 16)))
            ids = write_context(task, rng.randrange(2**31), tokenizer, texts, SEED).input_ids
        text = tokenizer.decode(ids[:TOKENS], skip_special_tokens=True)
        if len(tokenizer(text, verbose=False)["input_ids"]) == TOKENS:
            return text


if __name__ == "__main__":
    model, novels, out, count = sys.argv[1:]
    with Pool(initializer=partial(prepare, model, novels)) as pool, lzma.open(out, "wt") as file:
        for text in pool.imap(document, range(int(count)), chunksize=8):
            file.write(json.dumps({"text": text}) + "\n")
