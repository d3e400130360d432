"""The layers of `DiT`: attention with rotary positions, the feed-forward layer, the adaLN-Zero block around both."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm, scaled_dot_product_attention, silu

BASE = 100.0  # of the rotary wavelengths: grids have tens of patches a side, not thousands


class Rotation(torch.nn.Module):
    """Rotary positions in two dimensions (Su et al., 2021, arXiv 2104.09864; axial as in Lu et al., 2024, 2402.12376).

    Half of a head's channel pairs turn by the row, half by the column, so that the product of a query and a key depends
    on the difference of their places alone. Tokens without a place stand at (0, 0).

    Args:
        head_dim: channels of a head, a multiple of 4.
        unplaced: how many tokens without a place stand in front of the patches.
    """

    def __init__(self, head_dim: int, unplaced: int) -> None:
        super().__init__()
        self.unplaced = unplaced
        steps = torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4)
        self.register_buffer("frequencies", BASE**-steps, persistent=False)

    def forward(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """(1, unplaced + rows · columns, head_dim / 2, 2): cosine and sine of every token's angles."""
        frequencies = self.frequencies.to(torch.promote_types(dtype, torch.float32))
        by_row, by_column = (
            torch.arange(count, device=frequencies.device)[:, None] * frequencies for count in (rows, columns)
        )  # (rows, head_dim / 4), (columns, head_dim / 4)
        grid = [by_row[:, None].expand(-1, columns, -1), by_column[None].expand(rows, -1, -1)]
        angles = torch.cat(grid, dim=2).flatten(0, 1)  # (rows · columns, head_dim / 2)
        angles = torch.cat([angles.new_zeros(self.unplaced, angles.shape[1]), angles])
        return torch.stack([angles.cos(), angles.sin()], dim=-1).to(dtype)[None]


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the channel pairs (j, j + head_dim / 2) of x (B, L, 2, heads, head_dim) by (1 or B, L, head_dim / 2, 2)."""
    cos, sin = turn[:, :, None, None].unbind(-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Self-attention with normalised queries and keys (Dehghani et al., 2023, arXiv 2302.05442).

    Args:
        width, heads: of the tokens.
        value_residual: mix the values of the first block in, in learned shares (Zhou et al., 2024, arXiv 2410.17897).
    """

    def __init__(self, width: int, heads: int, value_residual: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(2, 1, width // heads))  # of queries and keys
        self.share = nn.Parameter(torch.tensor([0.5, 0.5])) if value_residual else None

    def forward(self, x: Tensor, turn: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, D) -> (tokens, their values (B, L, heads, head_dim)); ``first``: values of the first block."""
        qk, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).split([2, 1], dim=2)
        value = value[:, :, 0]
        qk = rotated(rms_norm(qk, qk.shape[-1:], eps=1e-6) * self.scale, turn).to(value.dtype)
        mixed = value
        if self.share is not None and first is not None:
            mixed = (self.share[0] * value + self.share[1] * first).to(value.dtype)
        query, key = qk.unbind(2)
        attended = scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, mixed)))
        return self.out(attended.transpose(1, 2).flatten(2)), value


class Gelu(nn.Module):
    """W₂ gelu(W₁ x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x), approximate="tanh"))


class SwiGlu(nn.Module):
    """W₂ (silu(W₁ x) ⊙ W₃ x), with as many parameters as `Gelu` (Shazeer, 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        inner = max(8, 2 * hidden // 3 // 8 * 8)
        self.up, self.down = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, linear = self.up(x).chunk(2, dim=-1)
        return self.down(silu(gate) * linear)


FEED_FORWARD: dict[str, type[nn.Module]] = {"gelu": Gelu, "swiglu": SwiGlu}


class Block(nn.Module):
    """Attention and feed-forward, each scaled, shifted and gated by the conditioning (adaLN-Zero, arXiv 2212.09748).

    The gates start at 0: a fresh block is the identity.

    Args:
        width, heads, value_residual: see `Attention`.
        conditioning: width of the conditioning.
        mlp: a key of `FEED_FORWARD`.
        mlp_ratio: hidden width of the feed-forward layer over ``width``.
    """

    def __init__(
        self, width: int, heads: int, conditioning: int, mlp: str, mlp_ratio: float, value_residual: bool = False
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, value_residual)
        self.mlp = FEED_FORWARD[mlp](width, round(mlp_ratio * width))
        self.modulation = nn.Linear(conditioning, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, x: Tensor, conditioning: Tensor, turn: Tensor, first: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, D) -> (tokens, values of the attention).

        Args:
            conditioning: (B, 1, K), or (B, L, K) for one of each token.
            turn: of `Rotation`.
            first: see `Attention`.
        """
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(conditioning).chunk(6, dim=-1)
        attended, value = self.attention(modulated(x, shift, scale), turn, first)
        x = x + gate * attended
        return x + gate_mlp * self.mlp(modulated(x, shift_mlp, scale_mlp)), value


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """RMS-normalised tokens (Zhang and Sennrich, 2019, arXiv 1910.07467), scaled and shifted."""
    return rms_norm(x, x.shape[-1:], eps=1e-6).to(x.dtype) * (1 + scale) + shift
