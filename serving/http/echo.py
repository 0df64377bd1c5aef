"""`echo`: the prompt's own text in front of the answer, and where each of its tokens begins."""

from __future__ import annotations

from collections.abc import Sequence

from serving.http.calls import Echo
from serving.tokenizer import Tokenizer


def echo_of(
    prompt: Sequence[int],
    text: str | None,
    tokenizer: Tokenizer,
    *,
    skip_special_tokens: bool,
    with_offsets: bool,
) -> Echo:
    """The prompt as the client gave it, or decoded where it gave token ids.

    A token whose bytes end inside a character begins where that character begins.
    """
    if text is not None:
        return Echo(text=text, offsets=_found_in(text, prompt, tokenizer) if with_offsets else ())
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
    pieces, offsets, num_chars = [], [], 0
    for token_id in prompt:
        offsets.append(num_chars)
        pieces.append(detokenizer.push(token_id))
        num_chars += len(pieces[-1])
    pieces.append(detokenizer.flush())
    return Echo(text="".join(pieces), offsets=tuple(offsets) if with_offsets else ())


def _found_in(text: str, prompt: Sequence[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Where each token's own text stands in the text that was tokenised.

    Tokens that are not in it (the begin-of-sequence token that was put in front, a character that
    the tokenizer normalised) take no room.
    """
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    offsets, position = [], 0
    for token_id in prompt:
        offsets.append(position)
        piece = detokenizer.push(token_id)
        # After a begin-of-sequence token some decoders write the space that they put before words.
        for found in (piece, piece.lstrip(" ")):
            if text.startswith(found, position):
                position += len(found)
                break
    return tuple(offsets)
