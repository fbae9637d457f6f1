"""A tokenizer without a vocabulary.

BERT's vocabulary would have to be downloaded, so words are hashed to ids instead. The ids have the right number and range,
which is all that times and the comparison of two computations need; they are not BERT's, so features mean nothing.
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor

# BERT's own special ids; the ids below 1000 are special or unused there, so no word hashes to one.
_CLS, _SEP, _FIRST_WORD = 101, 102, 1000


def hash_tokens(text: str, *, length: int = 40, vocab_size: int = 30522) -> tuple[Tensor, Tensor]:
    """[CLS] words [SEP], padded with 0: the same ids for the same text on every machine.

    Args:
        text: a sentence; words and punctuation marks become one token each, what does not fit is cut off.
        length: L.
        vocab_size: ids are below it; more than 1000.

    Returns:
        (ids [1, L] int64, mask [1, L] int64 with 1 where there is a token).
    """
    words = re.findall(r"\w+|[^\w\s]", text.lower())[: length - 2]
    ids = [_CLS, *(_FIRST_WORD + _hash(word) % (vocab_size - _FIRST_WORD) for word in words), _SEP]
    padding = length - len(ids)
    return torch.tensor([ids + [0] * padding]), torch.tensor([[1] * len(ids) + [0] * padding])


def _hash(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
