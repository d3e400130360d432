"""Small transformers of texts: pre-norm blocks (arXiv 2002.04745), a bidirectional encoder and a causal decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention

from mmdiff.likelihoods import categorical_sample

Pair = tuple[Tensor, Tensor]  # keys and values, (B, heads, n, d) each


class Attention(nn.Module):
    """Multi-head attention of a sequence (B, n, D) to keys and values.

    Args:
        dim: D.
        heads: of D / heads channels.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = (nn.Linear(dim, dim) for _ in range(3))
        self.key = nn.Linear(dim, dim, bias=False)  # a bias would shift all scores of a query alike

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def pair(self, context: Tensor) -> Pair:
        """Keys and values of a sequence (B, m, D)."""
        return self._split(self.key(context)), self._split(self.value(context))

    def forward(self, x: Tensor, pair: Pair, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """``mask`` (B, 1, 1, m): true where a key may be seen."""
        seen = scaled_dot_product_attention(self._split(self.query(x)), *pair, attn_mask=mask, is_causal=causal)
        return self.out(seen.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention to the sequence itself, to a memory if there is one, and a feed-forward layer."""

    def __init__(self, dim: int, heads: int, memory: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 + memory))
        self.itself = Attention(dim, heads)
        self.memory = Attention(dim, heads) if memory else None
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self,
        x: Tensor,
        memory: Pair | None = None,
        past: Pair | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> tuple[Tensor, Pair]:
        """(x (B, n, D), keys and values of the sequence so far)."""
        h = self.norms[0](x)
        pair = self.itself.pair(h)
        if past is not None:
            pair = torch.cat([past[0], pair[0]], dim=2), torch.cat([past[1], pair[1]], dim=2)
        x = x + self.itself(h, pair, mask, causal)
        if self.memory is not None:
            x = x + self.memory(self.norms[1](x), memory)
        return x + self.feed_forward(self.norms[-1](x)), pair


class Encoder(nn.Module):
    """Tokens that see one another, pooled.

    Args:
        length: of the longest sequence.
        dim, depth, heads: of the blocks.
    """

    def __init__(self, length: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.places = nn.Parameter(0.3 * torch.randn(length, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, memory=False) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """Embedded tokens (B, L, D), where they are (B, L) -> the mean of what they become (B, D)."""
        x, mask = x + self.places, there[:, None, None]
        for block in self.blocks:
            x, _ = block(x, mask=mask)
        counted = there[..., None].to(x.dtype)
        return (self.norm(x) * counted).sum(dim=1) / counted.sum(dim=1)


class State(NamedTuple):
    """What a decoder keeps between steps: of every block keys and values of the memory and of the tokens so far."""

    memory: list[Pair]
    past: list[Pair]

    def rows(self, index: Tensor, memory: bool = True) -> State:
        """Of the rows with these indices; ``memory``: whether they attend to other memories than the rows there."""
        return State(_rows(self.memory, index) if memory else self.memory, _rows(self.past, index))


def _rows(pairs: list[Pair], index: Tensor) -> list[Pair]:
    return [(keys[index], values[index]) for keys, values in pairs]


class Decoder(nn.Module):
    """p(w_k | w_1 … w_(k − 1), memory) of Eq. (26): a causal transformer that attends to a memory.

    Args:
        size: number of tokens, the end token included.
        length: of the longest sequence.
        dim, depth, heads: of the blocks.
    """

    def __init__(self, size: int, length: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.places = nn.Parameter(0.3 * torch.randn(length, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, memory=True) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, size)
        nn.init.normal_(self.out.weight, std=0.02)  # near the uniform law

    def forward(self, x: Tensor, memory: Tensor | None, state: State | None = None) -> tuple[Tensor, State]:
        """Embedded tokens (B, l, D) -> logits of the tokens that follow each (B, l, size), and the state after them.

        Args:
            x: all tokens at once, or the next one (l = 1) with a ``state``.
            memory: (B, M, D); not read where a ``state`` is given.
            state: of the tokens before.
        """
        pairs = [block.memory.pair(memory) for block in self.blocks] if state is None else state.memory
        pasts: Sequence[Pair | None] = [None] * len(pairs) if state is None else state.past
        start = 0 if state is None else pasts[0][0].shape[2]
        x, now = x + self.places[start : start + x.shape[1]], []
        for block, pair, past in zip(self.blocks, pairs, pasts, strict=True):
            x, after = block(x, pair, past, causal=state is None)
            now.append(after)
        return self.out(self.norm(x)), State(pairs, now)


def wide(network: nn.Module, dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
    """The network with its weights in this dtype at least: only `decode` computes in half precision.

    A model of half precision is not trained, so this costs nothing where gradients are needed.
    """
    own = next(network.parameters()).dtype
    dtype = torch.promote_types(own, dtype)
    if dtype == own:
        return network
    weights = {name: parameter.to(dtype) for name, parameter in network.named_parameters()}
    return lambda *arguments: functional_call(network, weights, arguments)


def drawn(decoder: Callable[..., tuple[Tensor, State]], table: Tensor, memory: Tensor, noise: Tensor) -> Tensor:
    """A draw, token by token: (B, L) ids, all the end token's after the first.

    Args:
        decoder: as `Decoder`.
        table: embeddings (size, D); the last is that of the end token, which also starts a text.
        memory: (B, M, D).
        noise: standard normal (B, L), a number per token.
    """
    end = len(table) - 1
    tokens = torch.full(noise.shape, end, device=memory.device)
    last, open_, state = tokens[:, 0], torch.ones(len(memory), dtype=torch.bool, device=memory.device), None
    for place in range(noise.shape[1]):
        logits, state = decoder(table[last][:, None], memory, state)
        last = torch.where(open_, categorical_sample(logits[:, 0].float(), noise[:, place]), end)
        tokens[:, place], open_ = last, open_ & (last != end)
        if not bool(open_.any()):
            break
    return tokens


def likeliest(
    decoder: Callable[..., tuple[Tensor, State]], table: Tensor, memory: Tensor, length: int, beams: int
) -> Tensor:
    """The likeliest text that a beam search finds (B, L); with one beam the greedy one, ended where it is likeliest.

    Args:
        decoder, table, memory: as of `drawn`.
        length: L.
        beams: texts that are followed at once.
    """
    end, count = len(table) - 1, len(memory)
    best = torch.full((count, length), end, device=memory.device)
    best_score = torch.full((count,), -torch.inf, device=memory.device)
    tokens, score, state = best[:, None], torch.zeros(count, 1, device=memory.device), None
    rows = torch.arange(count, device=memory.device)

    def keep(texts: Tensor, scores: Tensor) -> None:  # (B, k, L), (B, k)
        nonlocal best, best_score
        top, which = scores.max(dim=1)
        best = torch.where((top > best_score)[:, None], texts[rows, which], best)
        best_score = torch.maximum(top, best_score)

    for place in range(length):
        width = tokens.shape[1]
        last = tokens[:, :, place - 1] if place else tokens[:, :, 0]
        logits, state = decoder(table[last.flatten()][:, None], memory, state)
        total = score[..., None] + logits[:, 0].float().log_softmax(dim=1).reshape(count, width, end + 1)
        keep(tokens, total[..., end])
        score, index = total[..., :end].flatten(1).topk(min(beams, width * end), dim=1)
        parent = index // end
        tokens = tokens[rows[:, None], parent].clone()
        tokens[:, :, place] = index % end
        # beams of one row have one memory
        state = state.rows((rows[:, None] * width + parent).flatten(), memory=score.shape[1] != width)
        if bool((score[:, 0] <= best_score).all()):  # a longer text is no likelier
            break
    else:
        keep(tokens, score)
    return best
