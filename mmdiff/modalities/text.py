"""Texts: E is a small bidirectional encoder, the head a causal decoder that gives every token its probability."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, linear, normalize

from mmdiff.errors import InputError
from mmdiff.modalities.base import Shape
from mmdiff.modalities.grids import repeated
from mmdiff.modalities.heads import widened
from mmdiff.modalities.text_encoders import FrozenEncoder
from mmdiff.modalities.text_networks import Decoder, Encoder, drawn, likeliest, wide
from mmdiff.modalities.text_values import TokenText
from mmdiff.slots import Axis, ModalitySlots, slots


class Text(TokenText):
    """A text such as a caption; its value is (max_tokens,) int64 token ids, the end token from the end on.

    The likelihood is that of the whole text, its end included, Eq. (26). It is exact, and an empty text is a text. A
    longer text is cut, which a warning says once. A text is observed or absent, never aggregated: its mean encoding
    under the decoder has no closed form.

    Args:
        shape: the surroundings, see `Modality`.
        max_tokens: of the longest text. Default: that of the data, 256 at most.
        merges: of the byte-level BPE, which has a token for every byte; trained on the data's texts.
        vocabulary: number of tokens that this training may make, at least 256.
        tokenizer: in place of it, a `tokenizer.json`, its folder or a repository of the hub. The model keeps it.
        tokenizer_size: (bytes, tokens) of that tokenizer; read from it.
        encoder: a frozen text encoder of transformers, a folder or a repository of the hub, in place of the small one.
            Its tokenizer is used, and the model keeps its weights.
        encoder_config: of that encoder; read from it.
        dim: channels of the encoder and of the decoder.
        depth: blocks of each.
        heads: of their attention.
        grid: the decoder attends to a grid×grid average of the backbone's features, and to its pooled vector.
        beams: texts that the search for the likeliest one follows; 1 is greedy.
        attributes: {attribute: its words}; the evaluation compares which of the words a text has.
    """

    free_settings: ClassVar[frozenset[str]] = frozenset({"dim", "depth", "heads", "grid", "beams", "attributes"})
    aggregable: ClassVar[bool] = False

    def __init__(
        self,
        shape: Shape,
        max_tokens: int,
        merges: list[str] | None = None,
        vocabulary: int = 2048,
        tokenizer: str | None = None,
        tokenizer_size: tuple[int, int] | list[int] | None = None,
        encoder: str | None = None,
        encoder_config: dict[str, Any] | None = None,
        dim: int = 128,
        depth: int = 2,
        heads: int = 4,
        grid: int = 8,
        beams: int = 4,
        attributes: dict[str, list[str]] | None = None,
    ) -> None:
        _check_sizes(max_tokens=max_tokens, dim=dim, depth=depth, heads=heads, grid=grid, beams=beams)
        if dim % heads:
            raise InputError("heads", heads, f"must divide dim = {dim}")
        super().__init__(shape, max_tokens, merges, tokenizer or encoder, tokenizer_size)
        self.dim, self.beams, self.attributes = dim, beams, attributes or {}
        self.frozen = None if encoder is None else FrozenEncoder(encoder, encoder_config or {}, max_tokens)
        self.encoder = Encoder(max_tokens, dim, depth, heads) if self.frozen is None else None
        self.project = None if self.frozen is None else nn.Linear(self.frozen.width, dim)
        # as large as what blocks add, so that no token is lost among the steps of the optimizer
        self.table = nn.Parameter(torch.randn(self.end + 1, dim))
        self.decoder = Decoder(self.end + 1, max_tokens, dim, depth, heads)
        self._memory_layers(shape, grid)
        self.grid = (shape.space[0], *(math.gcd(side, 8) for side in shape.space[1:]))
        # fixed: what stands before it is learned
        self.register_buffer("map", nn.init.orthogonal_(torch.empty(math.prod(self.grid), dim)))

    def _memory_layers(self, shape: Shape, grid: int) -> None:
        """What makes the decoder's memory of the backbone's features."""
        self.memory_grid = tuple(min(grid, side // shape.stride) for side in shape.space[1:])
        self.from_features = nn.Sequential(nn.LayerNorm(shape.features), nn.Linear(shape.features, self.dim))
        self.from_pooled = nn.Sequential(nn.LayerNorm(shape.pooled), nn.Linear(shape.pooled, self.dim))
        self.places = nn.Parameter(0.02 * torch.randn(math.prod(self.memory_grid), self.dim))

    def load_initial_weights(self) -> None:
        """Keep the tokenizer, and read the weights of the frozen encoder."""
        super().load_initial_weights()
        if self.frozen is not None:
            self.frozen.load_initial_weights()

    def slots(self, by_name: bool) -> ModalitySlots:
        """A token is what it stands for; another vocabulary has some of them."""
        axes, of_tokens = (
            {0: Axis(slots([*self.tokens.names, ("end",)]))},
            ("table", "decoder.out.weight", "decoder.out.bias"),
        )
        return super().slots(by_name)._replace(state=dict.fromkeys(of_tokens, axes))

    # -------------------------------------------------------------------------------------------- value -> diffusion

    def pooled(self, value: Tensor) -> Tensor:
        """Texts (B, L) as directions (B, dim) of unit scale per number."""
        if self.frozen is not None:
            hidden = self.frozen(value, self.end, self.tokens.frame())
            pooled = linear(hidden, widened(self.project.weight), widened(self.project.bias))
        else:
            pooled = wide(self.encoder)(widened(self.table)[value], self._there(value))
        return normalize(pooled, dim=1) * math.sqrt(self.dim)

    def _there(self, value: Tensor) -> Tensor:
        """(B, L): where the text is, up to its end token."""
        ended = value == self.end
        return ended.cumsum(dim=1) - ended.long() == 0

    def encode(self, value: Tensor) -> Tensor:
        mapped = linear(self.pooled(value), widened(self.map))  # (B, C · rows · columns)
        mapped = mapped / mapped.square().mean(dim=1, keepdim=True).add(1e-12).sqrt()
        return repeated(mapped.reshape(-1, *self.grid), self.shape.space[1:])

    observation_channels = 0  # a text has no place in space

    @property
    def context_width(self) -> int:
        return self.dim

    def context(self, value: Tensor) -> Tensor:
        return self.pooled(value)

    # -------------------------------------------------------------------------------------------- diffusion -> value

    def decode(self, features: Tensor, pooled: Tensor) -> Tensor:
        """What the decoder attends to: (B, 1 + grid², dim)."""
        cells = adaptive_avg_pool2d(features, self.memory_grid).flatten(2).transpose(1, 2)  # (B, grid², F)
        return torch.cat([self.from_pooled(pooled)[:, None], self.from_features(cells) + self.places], dim=1)

    def _table(self, params: Tensor) -> Tensor:
        return self.table.to(torch.promote_types(self.table.dtype, params.dtype))

    def token_nll(self, params: Tensor, value: Tensor) -> Tensor:
        """−log p of every token in nats, that of the end included, 0 after it: (B, L)."""
        before = torch.cat([torch.full_like(value[:, :1], self.end), value[:, :-1]], dim=1)  # the end token also starts
        logits, _ = wide(self.decoder, params.dtype)(self._table(params)[before], params)
        return cross_entropy(logits.transpose(1, 2), value, reduction="none") * self._there(value)

    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        """Of the whole text, over ``max_tokens``."""
        return self.token_nll(params, value).sum(dim=1) / self.max_tokens

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        return drawn(wide(self.decoder, params.dtype), self._table(params), params, noise)

    def mode(self, params: Tensor) -> Tensor:
        """The likeliest text that a beam search finds."""
        return likeliest(wide(self.decoder, params.dtype), self._table(params), params, self.max_tokens, self.beams)

    def average(self, params: list[Tensor]) -> Tensor:
        """Of what the decoder attends to."""
        return super().average(params)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InputError(name, size, "needs 1 or more")
