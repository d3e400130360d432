"""How a text is read, checked, shown and saved: as token ids."""

from __future__ import annotations

import itertools
import logging
import math
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from mmdiff.errors import InputError
from mmdiff.modalities.base import ONLY_ALL_ROWS, Modality, Shape
from mmdiff.modalities.files import file_at
from mmdiff.modalities.text_encoders import read_encoder_config
from mmdiff.modalities.tokens import Tokens, byte_level, tokenizer_json, trained_merges

logger = logging.getLogger(__name__)

_ROWS = 100_000  # that the vocabulary and the longest text are read from
_LONGEST = 256  # tokens, by default


class TokenText(Modality):
    """A text as (max_tokens,) int64 token ids, the end token from the end on.

    Args:
        shape, max_tokens, merges: see `Text`.
        source: the tokenizer in place of the merges, and ``size``, its bytes and tokens.
    """

    def __init__(
        self, shape: Shape, max_tokens: int, merges: list[str] | None, source: str | None, size: Iterable[int] | None
    ) -> None:
        super().__init__(shape)
        self.max_tokens, self.source, self._told = max_tokens, source, False
        self._tokens = byte_level(merges or []) if source is None else None
        if source is None:
            self.end = self._tokens.size
        else:
            length, self.end = size or (0, 0)
            self.register_buffer("tokenizer", torch.zeros(length, dtype=torch.uint8))
            self.register_load_state_dict_post_hook(_forget)

    @classmethod
    def settings_from_files(
        cls,
        tokenizer: str | None = None,
        tokenizer_size: list[int] | None = None,
        encoder: str | None = None,
        encoder_config: dict[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        if encoder is not None and encoder_config is None:
            settings["encoder_config"] = read_encoder_config(encoder)
        if (source := tokenizer or encoder) is not None and tokenizer_size is None:
            text = tokenizer_json("tokenizer" if tokenizer else "encoder", source)
            settings["tokenizer_size"] = [len(text.encode()), Tokens.from_json(text).size]
        return settings

    @classmethod
    def settings_from_data(
        cls,
        feature: Any,
        values: Iterable[Any],
        max_tokens: int | None = None,
        merges: list[str] | None = None,
        vocabulary: int = 2048,
        tokenizer: str | None = None,
        encoder: str | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        source = tokenizer or encoder
        if max_tokens is not None and (merges is not None or source is not None):
            return {}
        texts = [_text(raw) for raw in itertools.islice((v for v in values if not _is_nothing(v)), _ROWS)]
        if not texts:
            raise InputError("text", None, "the column is empty; check data.columns")
        settings: dict[str, Any] = {}
        if merges is None and source is None:
            if vocabulary < 256:
                raise InputError("vocabulary", vocabulary, "needs 256 tokens at least, one per byte")
            settings["merges"] = merges = trained_merges(texts, vocabulary)
        if max_tokens is None:
            tokens = byte_level(merges) if source is None else Tokens.from_json(tokenizer_json("tokenizer", source))
            settings["max_tokens"] = min(_LONGEST, max(1, *(len(tokens.encode(text)) for text in texts)))
        return settings

    @classmethod
    def settings_from_stream(cls, feature: Any, max_tokens: int | None = None, **_: Any) -> dict[str, Any]:
        if max_tokens is None:
            raise InputError("max_tokens", None, ONLY_ALL_ROWS)
        return {}

    @classmethod
    def check_readable(cls, raw: Any) -> None:
        if not _is_nothing(raw):
            _text(raw)

    @property
    def tokens(self) -> Tokens:
        """The tokenizer; a saved model brings its own."""
        if self._tokens is None:
            saved = self.tokenizer.any()
            text = bytes(self.tokenizer.tolist()).decode() if saved else tokenizer_json("tokenizer", self.source)
            self._tokens = Tokens.from_json(text)
        return self._tokens

    def load_initial_weights(self) -> None:
        """Keep the tokenizer."""
        if self.source is not None:
            file = tokenizer_json("tokenizer", self.source).encode()
            if len(file) != len(self.tokenizer):
                remedy = f"has {len(file)} bytes, and {len(self.tokenizer)} when the run was set up; restore it"
                raise InputError("tokenizer", self.source, remedy)
            self.tokenizer.copy_(torch.frombuffer(bytearray(file), dtype=torch.uint8))
            self._tokens = None

    def preprocess(self, raw: Any) -> Tensor:
        ids = self.tokens.encode(_text(raw))
        lost = not self.tokens.unknown.isdisjoint(ids)
        if (len(ids) > self.max_tokens or lost) and not self._told:
            self._told = True
            reason = "has signs that the vocabulary lacks" if lost else f"is cut to max_tokens = {self.max_tokens}"
            logger.warning("a text of %d tokens %s: %r; further ones are not told", len(ids), reason, raw[:60])
        value = torch.full((self.max_tokens,), self.end)
        kept = torch.tensor(ids[: self.max_tokens], dtype=torch.int64)
        value[: len(kept)] = kept
        return value

    def postprocess(self, value: Tensor) -> list[str]:
        """Texts."""
        lengths = (value != self.end).sum(dim=1).tolist()
        return [self.tokens.decode(ids[:length]) for ids, length in zip(value.tolist(), lengths, strict=True)]

    def parse(self, text: str) -> str:
        """The text itself, or a .txt file that holds it, in UTF-8."""
        if not text.endswith(".txt"):
            return text
        try:
            return file_at("text", text).read_bytes().decode().removesuffix("\n")
        except UnicodeDecodeError:
            raise InputError("text", text, "is no text in UTF-8") from None

    def save(self, output: str, stem: Path) -> Path:
        """As .txt in UTF-8."""
        path = stem.with_name(f"{stem.name}.txt")
        path.write_bytes(f"{output}\n".encode())
        return path

    def check(self, value: Tensor) -> None:
        super().check(value)
        outside = value[(value < 0) | (value > self.end)]
        if len(outside):
            raise InputError("text", int(outside[0]), f"token ids are 0 … {self.end}, {self.end} being the end token")
        ended = value == self.end
        if bool((ended[:, :-1] & ~ended[:, 1:]).any()):
            raise InputError("text", "a text", f"goes on after the end token {self.end}")

    @property
    def value_shape(self) -> tuple[int, ...]:
        return (self.max_tokens,)

    def placeholder(self) -> Tensor:
        return torch.full((self.max_tokens,), self.end)

    def examples(self, count: int, generator: Generator) -> Tensor:
        """Texts of random letters, as many as fit."""
        letters = torch.randint(26, (count, self.max_tokens), generator=generator).tolist()
        lengths = torch.randint(self.max_tokens + 1, (count,), generator=generator).tolist()
        return torch.stack([self._example(row[:length]) for row, length in zip(letters, lengths, strict=True)])

    def _example(self, letters: list[int]) -> Tensor:
        """The longest beginning that comes back as the same tokens."""
        for length in range(len(letters), 0, -1):
            ids = self.tokens.encode("".join(string.ascii_lowercase[k] for k in letters[:length]))
            if len(ids) <= self.max_tokens and self.tokens.encode(self.tokens.decode(ids)) == ids:
                return torch.tensor(ids + [self.end] * (self.max_tokens - len(ids)))
        return self.placeholder()


def _forget(modality: TokenText, _: Any) -> None:
    """A state that is loaded brings its own tokenizer."""
    modality._tokens = None


def _is_nothing(raw: Any) -> bool:
    return raw is None or (isinstance(raw, float) and math.isnan(raw))


def _text(raw: Any) -> str:
    """A text that UTF-8 can hold."""
    if isinstance(raw, list | tuple):
        raise InputError("text", type(raw).__name__, "holds several texts; name its modality in data.one_of")
    if not isinstance(raw, str):
        raise InputError("text", type(raw).__name__, "is no text; check data.columns")
    try:
        raw.encode()
    except UnicodeEncodeError:
        raise InputError("text", ascii(raw[:60]), "is no valid Unicode: it has lone surrogates") from None
    return raw
