"""Texts as token ids: byte-level BPE that a column trains, or the tokenizer of a folder or a hub name."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmdiff.errors import InputError
from mmdiff.trust import check_links, damage


class Tokens:
    """A tokenizer without special tokens of its own: ids 0 … size − 1.

    Args:
        tokenizer: of the library `tokenizers`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=-1) + 1
        named = {number: token for token, number in vocabulary.items()}
        self.names = [named.get(number, f"<unused {number}>") for number in range(self.size)]
        self.unknown = {vocabulary[t] for t in (_unknown(tokenizer),) if t in vocabulary}

    @classmethod
    def from_json(cls, text: str) -> Tokens:
        """The tokenizer of a `tokenizer.json`."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_str(text))

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def frame(self) -> tuple[list[int], list[int]]:
        """(ids before, ids after) that the tokenizer puts around a text for its own text encoder."""
        inner = self.encode("a")
        whole = self.tokenizer.encode("a").ids
        start = next((k for k in range(len(whole)) if whole[k : k + len(inner)] == inner), 0)
        return whole[:start], whole[start + len(inner) :]


def _unknown(tokenizer: Any) -> str | None:
    """The token for what the vocabulary lacks; byte-level vocabularies lack nothing."""
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_token")
    if unknown is None and isinstance(model.get("unk_id"), int):  # of Unigram
        unknown = model["vocab"][model["unk_id"]][0]
    return unknown


@functools.cache
def _alphabet() -> list[str]:
    """The 256 signs that stand for bytes, in one order for ever."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def byte_level(merges: Sequence[str]) -> Tokens:
    """Byte-level BPE (Sennrich et al., 2016, arXiv 1508.07909; Radford et al., 2019): every text has tokens.

    Args:
        merges: pairs "left right" in the order in which they apply.

    Raises:
        InputError: for a merge of tokens that are not there.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pairs = [tuple(merge.split(" ")) for merge in merges]
    for merge, pair in zip(merges, pairs):
        if len(pair) != 2 or not all(pair):
            raise InputError("merges", merge, "is no pair of tokens 'left right'; leave merges to the data")
    names = dict.fromkeys([*_alphabet(), *("".join(pair) for pair in pairs)])
    vocabulary = {name: number for number, name in enumerate(names)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # of the library
        raise InputError("merges", f"{len(pairs)} merges", f"are damaged ({error}); leave them to the data") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Tokens(tokenizer)


def trained_merges(texts: Iterable[str], size: int) -> list[str]:
    """Merges of a byte-level BPE with at most ``size`` tokens; a pair is merged where it occurs twice at least."""
    from tokenizers import trainers

    tokenizer = byte_level([]).tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, initial_alphabet=_alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


@functools.lru_cache(maxsize=8)
def tokenizer_json(key: str, name: str) -> str:
    """The `tokenizer.json` of a file, a folder or a repository of the hub; no code that it brings is run.

    Args:
        key: of the setting, for errors.
        name: as the setting has it.

    Raises:
        InputError: it cannot be read, or has no form that the library `tokenizers` reads.
    """
    from tokenizers import Tokenizer

    path = Path(name).expanduser()
    check_links(key, path)
    file = path if path.is_file() else path / "tokenizer.json"
    with damage(key, name):
        tokenizer = _opened(key, file) if file.is_file() else _of_transformers(name)
    if not isinstance(tokenizer, Tokenizer):
        raise InputError(key, name, "is no tokenizer that the library tokenizers reads; name one with a tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.to_str()


def _opened(key: str, file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain exceptions
        raise InputError(key, str(file), f"is no tokenizer.json: {error}") from None


def _of_transformers(name: str) -> Any:
    from transformers import AutoTokenizer

    return getattr(AutoTokenizer.from_pretrained(name, trust_remote_code=False), "backend_tokenizer", None)
