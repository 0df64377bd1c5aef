"""Check that a tokenizer round-trips: `check_tokenizers.py FOLDER_OR_GGUF...`.

Texts in many scripts must come back from their ids unchanged, at once and token by token, and no
piece may hold half a character.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from serving.tokenizer import Tokenizer, TokenizerError

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, a tab\t, a newline\n\n and a carriage return\r\n",
    "Größe, naïve café, Ærøskøbing, Dvořák, Łódź",
    "Быстрая лиса; γρήγορη αλεπού; שועל מהיר; ثعلب سريع",
    "快速的棕色狐狸跳过懒狗。素早い茶色の狐。빠른 갈색 여우",
    "emoji: 🙂👩‍👩‍👧‍👦🏳️‍🌈 flags 🇨🇭🇯🇵, maths ∑∫√∞≠, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "def f(x: int) -> str:\n    return f'{x:>10}' + \"\\n\"  # 1234567890",
    '{"a": [1, 2.5e-3, null, true], "b": "\\u00e9"}',
    "नमस्ते दुनिया, สวัสดีชาวโลก, வணக்கம்",
    "",
)


def check(path: Path) -> dict[str, Any]:
    """What was checked, as numbers.

    Raises:
        AssertionError: a text did not come back.
    """
    tokenizer = Tokenizer.load(path)
    num_tokens = 0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]:
            ids = ids[1:]
        num_tokens += len(ids)
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == text, text
            detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
            pieces = [*map(detokenizer.push, ids), detokenizer.flush()]
            assert "".join(pieces) == text, text
            assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces), text
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text, text
    return {
        "path": str(path),
        "entries": tokenizer.num_entries,
        "texts": len(TEXTS),
        "tokens": num_tokens,
        "bos": tokenizer.encode("a")[:1] == [tokenizer.bos_token_id],
        "chat_template": tokenizer.has_chat_template,
    }


def main() -> int:
    """Check every path; one JSON line each."""
    for path in sys.argv[1:]:
        try:
            print(json.dumps(check(Path(path)), ensure_ascii=False))
        except (TokenizerError, AssertionError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
    return 0 if len(sys.argv) > 1 else 2


if __name__ == "__main__":
    sys.exit(main())
