"""Laws of fusion: the equations as they are written, and order, padding and a single member that change nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
from refusals import refused
from torch import Generator, Tensor

from mmdiff.errors import InputError
from mmdiff.modalities.fusion import FUSIONS, QUERY_FUSIONS, Fused, Fusion, build_fusion

DIM, HIDDEN, TOKENS, QUERY = 6, 5, 3, 4
SIZES = [1, 4, 2, 7, 7, 3]  # of the sets in a batch
every_fusion = pytest.mark.parametrize("kind", [*FUSIONS, *QUERY_FUSIONS])
with_tokens = pytest.mark.parametrize("tokens", [(), (TOKENS,)], ids=["vectors", "tokens"])


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def fusion(kind: str, dtype: torch.dtype = torch.float64) -> Fusion:
    torch.manual_seed(0)
    return build_fusion(kind, DIM, HIDDEN, QUERY if kind in QUERY_FUSIONS else None).to(dtype)


def queries(module: Fusion, first: int, count: int) -> tuple[Tensor, ...]:
    """The arguments that follow the mask, for sets ``first``, ``first`` + 1, …: their queries, or nothing."""
    drawn = 3 * torch.randn(9, QUERY, generator=seeded(12), dtype=torch.float64)
    return (drawn[first : first + count],) if module.query_dim else ()


def fuse(module: Callable[..., Fused], members: Tensor, mask: Tensor, first: int = 0) -> Fused:
    return module(members, mask, *queries(module, first, len(mask)))


def ragged(tokens: tuple[int, ...] = (), sizes: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Members with gaps anywhere, which hold NaN, and the mask."""
    sizes = sizes or SIZES
    size = max(sizes) + 2
    mask = torch.rand(len(sizes), size, generator=seeded()).argsort(dim=1) < torch.tensor(sizes)[:, None]
    members = 2 * torch.randn(len(sizes), size, *tokens, DIM, generator=seeded(1), dtype=torch.float64)
    members[~mask] = torch.nan
    return members, mask


def written_out(kind: str, module: Fusion, h: Tensor, wholes: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """The equations for set ``row``, h (n, d), whose members are ``wholes`` (n, d): (embedding (d,), weights (n,))."""
    weights, size = {name: parameter.detach() for name, parameter in module.named_parameters()}, len(h)
    if kind == "max":
        winners = [[k for k in range(size) if h[k, j] == h[:, j].max()] for j in range(DIM)]
        share = [sum(1 / len(w) for w in winners if k in w) / DIM for k in range(size)]
        return h.max(dim=0).values, torch.tensor(share, dtype=h.dtype)
    if kind == "geometric_median":
        a = torch.full((size,), 1 / size, dtype=h.dtype)
        for _ in range(8):
            squares = torch.stack([(whole - a @ wholes).square().sum() for whole in wholes])
            steps = [float(1 / (square + 1e-3 * squares.mean()).sqrt()) if size > 1 else 1.0 for square in squares]
            a = torch.tensor([step / sum(steps) for step in steps], dtype=h.dtype)
        return a @ h, a
    scores = torch.zeros(size, DIM if kind == "per_feature_attention" else 1, dtype=h.dtype)
    for k, member in enumerate(h) if weights else ():
        inner = torch.tanh(weights["V.weight"] @ member)
        if "U.weight" in weights:
            inner = inner / (1 + torch.exp(-weights["U.weight"] @ member))
        scores[k] = weights["v.weight"] @ inner
        if kind == "agreement_attention":
            cosines = [float(one @ wholes[k] / (one.norm() * wholes[k].norm())) for one in wholes]
            scores[k] += weights["s"].exp() * sum(cosines) / size
        if kind == "query_attention":
            (asked,) = queries(module, row, 1)
            scores[k] += (weights["W.weight"] @ asked[0]) @ torch.tanh(weights["V.weight"] @ wholes[k]) / HIDDEN**0.5
    a = scores.exp() / scores.exp().sum(dim=0)  # (n, 1 or d)
    if kind == "value_gated_attention":
        a = a / (1 + torch.exp(-weights["g"].exp() * (size * a - 1)))
        a = a / a.sum(dim=0)
    return (a * h).sum(dim=0), a.mean(dim=1)


@with_tokens
@every_fusion
def test_it_is_the_equation(kind: str, tokens: tuple[int, ...]) -> None:
    module, (members, mask) = fusion(kind), ragged(tokens)
    embedding, weights = fuse(module, members, mask)
    assert embedding.shape == (len(SIZES), *tokens, DIM) and weights.shape == mask.shape
    for row in range(len(SIZES)):
        by_token = members[row, mask[row]].reshape(SIZES[row], -1, DIM).unbind(1)
        wholes = torch.stack(by_token).mean(dim=0)  # (n, d)
        fused = [written_out(kind, module, h, wholes, row) for h in by_token]
        expected = torch.stack([one for one, _ in fused]).reshape(*tokens, DIM)
        rounding = 1e-9 if kind == "geometric_median" else 1e-12  # its steps pass rounding on
        torch.testing.assert_close(embedding[row], expected, rtol=rounding, atol=rounding)
        pooled = torch.stack([a for _, a in fused]).mean(dim=0)
        torch.testing.assert_close(weights[row, mask[row]], pooled, rtol=rounding, atol=rounding)


def exactly(one: Fused, embedding: Tensor, weights: Tensor) -> None:
    assert torch.equal(one.embedding, embedding)
    assert torch.equal(one.weights, weights)


@with_tokens
@every_fusion
def test_order_changes_nothing(kind: str, tokens: tuple[int, ...]) -> None:
    module, (members, mask) = fusion(kind), ragged(tokens)
    order = torch.rand(mask.shape, generator=seeded(2)).argsort(dim=1)
    rows = torch.arange(len(mask))[:, None]
    fused = fuse(module, members, mask)
    assert not torch.equal(mask[rows, order], mask)
    exactly(fuse(module, members[rows, order], mask[rows, order]), fused.embedding, fused.weights[rows, order])


@pytest.mark.parametrize("more", [1, 2, 3, 5, 8, 16])
@with_tokens
@every_fusion
def test_padding_changes_nothing(kind: str, tokens: tuple[int, ...], more: int) -> None:
    module, (members, mask) = fusion(kind), ragged(tokens)
    gaps = 1e300 * torch.ones(len(mask), more, *tokens, DIM, dtype=torch.float64)
    fused = fuse(module, members, mask)
    padded = fuse(module, torch.cat([members, gaps], dim=1), torch.cat([mask, mask.new_zeros(len(mask), more)], dim=1))
    exactly(padded, fused.embedding, torch.cat([fused.weights, fused.weights.new_zeros(len(mask), more)], dim=1))


@with_tokens
@every_fusion
def test_one_member_is_its_own_fusion(kind: str, tokens: tuple[int, ...]) -> None:
    members, mask = ragged(tokens, sizes=[1] * 5)
    fused = fuse(fusion(kind), members, mask)
    exactly(fused, members[mask], mask.double())


@every_fusion
def test_weights_add_up_to_one_and_are_zero_in_gaps(kind: str) -> None:
    members, mask = ragged()
    _, weights = fuse(fusion(kind), members, mask)
    assert (weights[~mask] == 0).all() and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(mask), dtype=torch.float64))


@every_fusion
def test_what_is_duplicated_counts_twice(kind: str) -> None:
    """All members twice: nothing changes. One member twice: both get the same weight."""
    module, (members, mask) = fusion(kind), ragged()
    fused, twice = fuse(module, members, mask), fuse(module, members.repeat(1, 2, 1), mask.repeat(1, 2))
    torch.testing.assert_close(twice.embedding, fused.embedding, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(twice.weights, fused.weights.repeat(1, 2) / 2, rtol=1e-13, atol=1e-15)
    first = members[:, :1].nan_to_num(0.5)
    _, weights = fuse(
        module, torch.cat([members, first, first], dim=1), torch.nn.functional.pad(mask, (0, 2), value=True)
    )
    assert torch.equal(weights[:, -1], weights[:, -2])
    assert (weights[:, -1] > 0).any()


def test_a_tie_is_shared() -> None:
    members = torch.tensor([[[1.0, 5.0], [1.0, 2.0], [0.0, 5.0], [1.0, 0.0]]], requires_grad=True)
    embedding, weights = build_fusion("max", 2)(members, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(weights[0], torch.tensor([1 / 3 + 1 / 2, 1 / 3, 1 / 2, 1 / 3]) / 2)
    embedding.sum().backward()
    assert torch.equal(members.grad[0, :, 0] > 0, torch.tensor([True, True, False, True]))


@with_tokens
@every_fusion
def test_a_batch_is_its_sets(kind: str, tokens: tuple[int, ...]) -> None:
    module, (members, mask) = fusion(kind), ragged(tokens)
    fused = fuse(module, members, mask)
    parts = [fuse(module, members[k : k + 1, mask[k]], mask[k : k + 1, mask[k]], k) for k in range(len(mask))]
    torch.testing.assert_close(fused.embedding, torch.cat([p.embedding for p in parts]), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(fused.weights[mask], torch.cat([p.weights[0] for p in parts]), rtol=1e-13, atol=1e-15)
    nothing = fuse(module, members[:0], mask[:0])
    assert nothing.embedding.shape == (0, *tokens, DIM) and nothing.weights.shape == (0, mask.shape[1])


@with_tokens
@every_fusion
def test_gradients_are_those_of_finite_differences(kind: str, tokens: tuple[int, ...]) -> None:
    module, (members, mask) = fusion(kind), ragged(tokens, sizes=[1, 3])
    members = members.nan_to_num(0.5).requires_grad_()
    asked = queries(module, 0, len(mask))
    weighted = kind != "max"  # its weights are piecewise constant

    def both(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        fused = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, mask, *asked))
        return tuple(fused)[: 1 + weighted]

    names, parameters = zip(*module.named_parameters(), strict=True) if list(module.parameters()) else ((), ())
    assert torch.autograd.gradcheck(both, (members, *parameters))
    fuse(module, members, mask).embedding.sum().backward()
    assert (members.grad[~mask] == 0).all()
    assert all(parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
@every_fusion
def test_lower_precision_is_as_near_as_stated(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """2^-8, half a step of bfloat16, of the largest number that is fused; its weights are computed in float32."""
    members, mask = ragged()
    low = members.to(dtype)
    embedding, weights = fuse(fusion(kind, dtype), low, mask)
    module = fusion(kind, dtype).double()  # of the same rounded weights
    exact = fuse(module, low.double(), mask)
    assert (embedding.dtype, weights.dtype) == (dtype, torch.float32)
    largest = members.nan_to_num().abs().amax()
    assert float((embedding.double() - exact.embedding).detach().abs().max()) <= tolerance * largest
    torch.testing.assert_close(weights.double(), exact.weights, rtol=1e-5, atol=1e-6)


@every_fusion
def test_order_and_padding_are_exact_in_lower_precision_too(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        module, (members, mask) = fusion(kind, dtype), ragged()
        members = torch.cat([members, members], dim=1).to(dtype)
        fused = fuse(module, members[:, : mask.shape[1]], mask)
        flipped = fuse(module, members.flip(1), torch.cat([mask, torch.zeros_like(mask)], dim=1).flip(1))
        exactly(flipped, fused.embedding, torch.nn.functional.pad(fused.weights, (0, mask.shape[1])).flip(1))


def test_attention_without_a_score_is_the_mean() -> None:
    members, mask = ragged()
    for kind in ("attention", "gated_attention"):
        module = fusion(kind)
        torch.nn.init.zeros_(module.v.weight)
        exactly(fuse(module, members, mask), *fusion("mean")(members, mask))


@with_tokens
@every_fusion
def test_the_compiled_fusion_is_the_same_in_one_graph(kind: str, tokens: tuple[int, ...]) -> None:
    """As on an accelerator: every place keeps its row, and the host reads no number."""
    torch.compiler.reset()
    module, (members, mask) = fusion(kind), ragged(tokens)
    members.requires_grad_()
    fused, compiled = (
        fuse(module, members, mask),
        fuse(torch.compile(module, backend="aot_eager", fullgraph=True), members, mask),
    )
    torch.testing.assert_close(compiled.embedding, fused.embedding, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(compiled.weights, fused.weights, rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(fused.embedding.square().sum(), members)
    (actual,) = torch.autograd.grad(compiled.embedding.square().sum(), members)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------- what set and query say of each member


def sameness(count: int, odd: int | None, generator: Generator) -> Tensor:
    """(1, count, 64) members around one direction; ``odd`` points elsewhere."""
    h = torch.randn(1, 1, 64, generator=generator, dtype=torch.float64).repeat(1, count, 1)
    h = h + 0.3 * torch.randn(1, count, 64, generator=generator, dtype=torch.float64)
    if odd is not None:
        h[0, odd] = torch.randn(64, generator=generator, dtype=torch.float64)
    return h


def unscored(kind: str, dim: int = 64) -> Fusion:
    """The fusion whose members say nothing of themselves."""
    module = build_fusion(kind, dim, HIDDEN).double()
    if hasattr(module, "v"):
        torch.nn.init.zeros_(module.v.weight)
    return module


def everyone(members: Tensor) -> Tensor:
    return torch.ones(members.shape[:2], dtype=torch.bool)


def test_agreement_is_with_the_others_alone() -> None:
    """A member's own cosine shifts all scores alike: the sum over the others gives the same weights."""
    module, members = unscored("agreement_attention"), sameness(5, None, seeded(3))
    directions = torch.nn.functional.normalize(members[0], dim=1)
    others = (directions @ directions.T).fill_diagonal_(0.0).sum(dim=1) / 5
    expected = (module.s.exp() * others).softmax(dim=0)
    torch.testing.assert_close(module(members, everyone(members)).weights[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["agreement_attention", "geometric_median"])
def test_two_members_share_and_a_stranger_counts_little(kind: str) -> None:
    module, pair = unscored(kind), sameness(2, None, seeded(4))
    torch.testing.assert_close(module(pair, everyone(pair)).weights[0], torch.full((2,), 0.5, dtype=torch.float64))
    weights = []
    for seed in range(20):
        members = sameness(6, seed % 6, seeded(seed))
        weights.append(module(members, everyone(members)).weights[0, seed % 6])
    assert max(weights) < (0.02 if kind == "agreement_attention" else 1 / 6)


@pytest.mark.parametrize("kind", ["agreement_attention", "geometric_median"])
def test_members_agree_as_wholes(kind: str) -> None:
    """What the tokens' means leave out changes no weight; every token position has the same weights."""
    module, members = unscored(kind), sameness(4, 2, seeded(5))
    noise = torch.randn(1, 4, 64, generator=seeded(6), dtype=torch.float64)
    tokens = torch.stack([members + noise, members - noise], dim=2)  # (1, 4, 2, 64)
    fused, whole = module(tokens, everyone(members)), module(members, everyone(members))
    torch.testing.assert_close(fused.weights, whole.weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused.embedding, torch.einsum("bn,bntd->btd", whole.weights, tokens))


def test_the_median_follows_scale_rotation_and_shift() -> None:
    module, members = unscored("geometric_median"), sameness(7, 1, seeded(7))
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=seeded(8), dtype=torch.float64)).Q
    moved = 3.0 * members @ rotation + 5.0
    expected = 3.0 * module(members, everyone(members)).embedding @ rotation + 5.0
    torch.testing.assert_close(module(moved, everyone(members)).embedding, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strangers", [0, 1, 2, 3])
def test_the_median_is_near_the_minimum(strangers: int) -> None:
    """Within 1 % of the smallest sum of distances that a general minimiser finds."""
    members = sameness(8, None, seeded(9))[0]
    members[:strangers] = 2 * torch.randn(strangers, 64, generator=seeded(10), dtype=torch.float64)

    def cost(middle: np.ndarray) -> float:
        return float((members - torch.from_numpy(middle)).norm(dim=1).sum())

    least = scipy.optimize.minimize(cost, members.mean(dim=0).numpy()).fun
    median = unscored("geometric_median")(members[None], everyone(members[None])).embedding[0]
    assert cost(median.detach().numpy()) <= 1.01 * least


def test_every_feature_has_weights_of_its_own() -> None:
    module, (members, mask) = fusion("per_feature_attention"), ragged()
    weights, fused = module.feature_weights(members, mask), module(members, mask)
    assert weights.shape == members.shape and (weights[~mask] == 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(mask), DIM, dtype=torch.float64))
    torch.testing.assert_close((weights * members.nan_to_num()).sum(dim=1), fused.embedding, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights.mean(dim=2), fused.weights, rtol=1e-12, atol=1e-12)


def test_the_gate_raises_what_is_high_and_lowers_what_is_low() -> None:
    torch.manual_seed(0)
    plain, gated = build_fusion("attention", DIM, HIDDEN), build_fusion("value_gated_attention", DIM, HIDDEN)
    gated.load_state_dict(plain.state_dict(), strict=False)
    members = torch.randn(1, 6, DIM, generator=seeded(11))
    before, after = (module(members, everyone(members)).weights[0] for module in (plain, gated))
    high, low = before.argmax(), before.argmin()
    assert after[high] > before[high] > 1 / 6 > before[low] > after[low]


def test_a_query_of_zeros_is_attention() -> None:
    module, (members, mask) = fusion("query_attention"), ragged((TOKENS,))
    plain = build_fusion("attention", DIM, HIDDEN).double()
    plain.load_state_dict({name: weight for name, weight in module.state_dict().items() if name != "W.weight"})
    exactly(module(members, mask, torch.zeros(len(mask), QUERY)), *plain(members, mask))


def test_every_set_is_asked_its_own_query() -> None:
    """The member that the query names gets the weight, whichever others there are."""
    module = build_fusion("query_attention", 3, 3, 3)
    for layer, factor in ((module.V, 4.0), (module.v, 0.0), (module.W, 30.0)):
        torch.nn.init.eye_(layer.weight).data.mul_(factor)
    members, mask = torch.eye(3).repeat(3, 2, 1), torch.ones(3, 6, dtype=torch.bool)
    weights = module(members, mask, torch.eye(3)).weights
    torch.testing.assert_close(weights, torch.eye(3).repeat(1, 2) / 2, rtol=0, atol=1e-3)


@every_fusion
def test_a_query_is_given_where_it_is_taken(kind: str) -> None:
    module, (members, mask) = fusion(kind), ragged()
    asked = torch.zeros(len(mask), QUERY)
    wrong = [None, asked[1:], asked[:, 1:], asked[0]] if module.query_dim else [asked]
    for query in wrong:
        with refused("query", None if query is None else tuple(query.shape)):
            module(members, mask, query)


@every_fusion
def test_autocast_keeps_the_precision_of_the_members(kind: str) -> None:
    members, mask = ragged()
    module = fusion(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        embedding, weights = fuse(module, members.float(), mask)
    assert embedding.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(weights, fuse(module, members.float(), mask).weights, rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, m: (h, m & (torch.arange(len(m)) != 2)[:, None]), "mask = 'set 2 of 6': is empty"),
        (lambda h, m: (h[..., :4], m), r"members = \(6, 9, 4\): needs \(B, n, 6\) or \(B, n, tokens, 6\)"),
        (lambda h, m: (h[0], m[0]), r"members = \(9, 6\): needs"),
        (lambda h, m: (h, m.float()), r"mask = 'torch.float32 \(6, 9\)': needs torch.bool of shape \(6, 9\)"),
        (lambda h, m: (h, m[:, 1:]), r"mask = 'torch.bool \(6, 8\)': needs torch.bool of shape \(6, 9\)"),
    ],
)
@every_fusion
def test_what_does_not_fit_is_refused_in_one_line(kind: str, change: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        fuse(fusion(kind), *change(*ragged()))
    assert "\n" not in str(refused.value)


def test_names_and_widths_are_checked() -> None:
    with pytest.raises(InputError, match="fusion = 'median': choose one of mean, max, attention, gated_attention"):
        build_fusion("median", DIM)
    with pytest.raises(InputError, match="hidden = 0"):
        build_fusion("attention", DIM, 0)
    with refused("query", None, "query_attention"):
        build_fusion("query_attention", DIM)
    with refused("fusion", "attention", "query_attention"):
        build_fusion("attention", DIM, query_dim=QUERY)
    with refused("query_dim", 0):
        build_fusion("query_attention", DIM, query_dim=0)
