"""Prompts from a seed: every one is asked, none is dropped by hand."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

_OPENINGS = ("Tell me about", "List what is known of", "Write a letter to", "Compare a town with",
             "Explain the use of", "Continue the story of")  # fmt: skip
_NOUNS = ("river", "engine", "harvest", "teacher", "satellite", "violin", "market", "glacier",
          "prime number", "bakery", "compiler", "lighthouse", "orchard", "senate")  # fmt: skip
_VERBS = ("crosses", "feeds", "repairs", "forgets", "measures", "paints", "divides", "follows")
_ENDS = (". ", ", and then ", "; meanwhile ", "? ", ".\n", " because ")

_VARIANTS: tuple[dict[str, float | int], ...] = (
    {},
    {"top_p": 0.95},
    {"top_k": 40},
    {"repetition_penalty": 1.1, "presence_penalty": 0.3},
)


@dataclass(frozen=True)
class Prompt:
    number: int
    ids: tuple[int, ...]
    sampling: dict[str, Any] = field(hash=False)
    """Of the sampled run, for the client."""


def seeded_prompts(folder: Path, count: int, shortest: int, longest: int) -> list[Prompt]:
    """`count` prompts, lengths spread by their logarithm over both ends.

    Every second is text of seeded words, every other random ids of the
    vocabulary: text has clear next tokens, random ids unclear ones.
    """
    rng = random.Random(f"equality {count} {shortest} {longest}")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = []
    for number in range(count):
        share = number / (count - 1)
        length = round(shortest * math.exp(share * math.log(longest / shortest)))
        if number % 2:
            ids = tuple(rng.randrange(20, 49_000) for _ in range(length))
        else:
            ids = _text_ids(rng, tokenizer, length)
        sampling = {
            "temperature": 0.8, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0,
            "seed": rng.getrandbits(64), **_VARIANTS[number // 2 % len(_VARIANTS)],
        }  # fmt: skip
        prompts.append(Prompt(number, ids, sampling))
    # Long and short ones meet in a batch.
    rng.shuffle(prompts)
    return prompts


def _text_ids(rng: random.Random, tokenizer: Tokenizer, length: int) -> tuple[int, ...]:
    words = [f"{rng.choice(_OPENINGS)} the {rng.choice(_NOUNS)}: "]
    while True:
        for _ in range(length):
            words.append(
                f"the {rng.choice(_NOUNS)} {rng.choice(_VERBS)} the {rng.choice(_NOUNS)}"
                f"{rng.choice(_ENDS)}"
            )
            if len(words) * 6 > length:
                break
        ids = tokenizer.encode("".join(words), add_special_tokens=False).ids
        if len(ids) >= length:
            return tuple(ids[:length])
