#!/usr/bin/env python3
"""Makes the demo model's corpus: generated stories and dialogues, public-domain prose, the
tokenizer trained on both, and token shards (train and held-out). The same seed gives the same
files, however many processes work on them; only the tokenizer is meant to be committed."""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

from scripts.demo import chat, prose
from scripts.demo.data import Shard

DOCUMENTS_PER_TASK = 500
HELD_OUT_DOCUMENTS = 2000
CONTEXT = 2048
_tokenizer: Tokenizer | None = None


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--out", type=Path, required=True, help="folder for shards and tokenizer")
    p.add_argument("--megabytes", type=float, default=60, help="size of the generated text")
    p.add_argument("--seed", type=int, default=1, help="names the text")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    p.add_argument(
        "--prose",
        type=Path,
        help=f"folder with the two packages ({prose.COMMANDS}), or a text file with a passage a"
        " line, as --prose-out writes it; without it the corpus has no prose",
    )
    p.add_argument("--prose-out", type=Path, help="also write the prose, a passage a line")
    p.add_argument("--tokenizer", type=Path, help="use this tokenizer.json instead of training one")
    p.add_argument("--vocab-size", type=int, default=4096, help="of the tokenizer trained")
    return p


def read_prose(source: Path | None, seed: int) -> list[str]:
    if source is None:
        return []
    if source.is_dir():
        return prose.passages(prose.read_packages(source), seed)
    return source.read_text(encoding="utf-8").splitlines()


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with DeepSeek's special tokens first; only ByteLevel as post-processor, so BOS
    is added by whoever reads `add_bos_token`, as for the published DeepSeek tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(chat.SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json as published DeepSeek checkpoints have them."""
    tokenizer.save(str(folder / "tokenizer.json"))

    def special(content: str) -> dict[str, object]:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": content, **flags}

    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": special(chat.BOS),
        "eos_token": special(chat.EOS),
        "pad_token": special(chat.PAD),
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": chat.CHAT_TEMPLATE,
    }
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _start_worker(tokenizer: str) -> None:
    global _tokenizer
    _tokenizer = Tokenizer.from_file(tokenizer)


def encode(tokenizer: Tokenizer, texts: list[str]) -> Shard:
    return Shard.join(np.array(e.ids, np.uint16) for e in tokenizer.encode_batch_fast(texts))


def _task(args: tuple[int, int, bool]) -> tuple[Shard, int]:
    """Writes and encodes one task's documents; also their size in bytes."""
    seed, task, held_out = args
    rng = random.Random(f"{seed}/{task}/{held_out}")
    texts = [chat.document(rng, held_out=held_out) for _ in range(DOCUMENTS_PER_TASK)]
    assert _tokenizer is not None
    return encode(_tokenizer, texts), sum(len(t.encode()) for t in texts)


def main() -> None:
    a = arguments().parse_args()
    start = time.monotonic()
    a.out.mkdir(parents=True, exist_ok=True)
    texts = read_prose(a.prose, a.seed)
    if a.prose_out:
        a.prose_out.write_text("\n".join(texts), encoding="utf-8")
    if a.tokenizer:
        tokenizer = Tokenizer.from_file(str(a.tokenizer))
    else:
        rng = random.Random(f"{a.seed}/tokenizer")
        stories = (chat.document(rng) for _ in range(min(9000, int(a.megabytes * 1100))))
        sample = itertools.chain(stories, texts[::2])
        markers = "|".join(map(str, chat.SPECIAL_TOKENS))
        tokenizer = train_tokenizer((_unmarked(t, markers) for t in sample), a.vocab_size)
    write_tokenizer(tokenizer, a.out)

    context = multiprocessing.get_context("spawn")
    total, shards, sizes = round(a.megabytes * 1e6), [], 0
    with (
        context.Pool(a.workers, _start_worker, (str(a.out / "tokenizer.json"),)) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="stories") as bar,
    ):
        held_out = [(a.seed, i, True) for i in range(-(-HELD_OUT_DOCUMENTS // DOCUMENTS_PER_TASK))]
        Shard.merge(s for s, _ in pool.map(_task, held_out)).save(a.out, "world-heldout")
        enough = -(-total // (DOCUMENTS_PER_TASK * 600))  # a document has 900 bytes and more
        for shard, size in pool.imap(_task, ((a.seed, i, False) for i in range(enough))):
            shards.append(shard)
            sizes += size
            bar.update(size)
            if sizes >= total:
                pool.terminate()
                break
    world = Shard.merge(shards)
    world.save(a.out, "world-train")
    marked = [chat.BOS + t + chat.EOS for t in texts]
    books = encode(tokenizer, [t for i, t in enumerate(marked) if i % 50])
    books.save(a.out, "prose-train")
    encode(tokenizer, marked[::50]).save(a.out, "prose-heldout")
    summary = {
        "seed": a.seed,
        "world_bytes": sizes,
        "world_tokens": len(world.tokens),
        "world_documents": len(world),
        "prose_bytes": sum(len(t.encode()) for t in texts),
        "prose_tokens": len(books.tokens),
        "vocab_size": tokenizer.get_vocab_size(),
        "seconds": round(time.monotonic() - start, 1),
    }
    (a.out / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))


def _unmarked(text: str, markers: str) -> str:
    """The text without chat markers, which would otherwise be learned as ordinary bytes."""
    for marker in markers.split("|"):
        text = text.replace(marker, "\n")
    return text


if __name__ == "__main__":
    main()
