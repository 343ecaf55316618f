import math

import pytest
import torch

from mucs_cli.attribution import projection as module
from mucs_cli.attribution.projection import Projection, blocks_of_columns
from mucs_cli.rng import generator


def gradients(rows, columns, seed=0, dtype=torch.float64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "GAUSSIAN_ENTRIES", 700)  # 70 parameters a block at k = 10
    monkeypatch.setattr(module, "SPARSE_ROWS", 70)


def matrix(projection):
    """P written out from the documented streams, entry by entry."""
    size = projection.block_size
    rows = []
    for b, start in enumerate(range(0, projection.num_parameters, size)):
        count = min(size, projection.num_parameters - start)
        source = generator(projection.seed, "projection", b)
        if projection.kind == "gaussian":
            rows.append(torch.randn(count, projection.k, generator=source).double())
            continue
        draw = torch.rand(projection.nonzeros, count, generator=source, dtype=torch.float64)
        sign = torch.randint(2, (projection.nonzeros, count), generator=source)
        block = torch.zeros(count, projection.k, dtype=torch.float64)
        for j in range(projection.nonzeros):
            low, high = (i * projection.k // projection.nonzeros for i in (j, j + 1))
            for row in range(count):
                place = low + math.floor(float(draw[j, row]) * (high - low))
                block[row, place] = math.sqrt(projection.k / projection.nonzeros) * (1 if sign[j, row] else -1)
        rows.append(block)
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ["gaussian", "sparse"])
def test_products_in_blocks_are_those_with_the_whole_matrix(kind, small_blocks):
    projection = Projection(kind, 300, 10, seed=5, nonzeros=3)
    g = gradients(4, 300)
    whole = matrix(projection)
    assert whole.shape == (300, 10)
    assert not torch.equal(whole[:70], whole[70:140])
    out = projection.project(g)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), g @ whole, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "sparse"])
def test_the_matrix_is_the_same_for_every_call_and_batch_size_and_another_for_another_seed(kind):
    g = gradients(7, 500, dtype=torch.float32)
    whole = Projection(kind, 500, 64, seed=1).project(g)
    parts = torch.cat([Projection(kind, 500, 64, seed=1).project(g[i : i + 3]) for i in (0, 3, 6)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)
    other = Projection(kind, 500, 64, seed=2).project(g)
    assert float((other - whole).abs().mean()) > 5


@pytest.mark.parametrize("kind", ["gaussian", "sparse", "identity"])
def test_named_gradients_project_like_their_concatenation_in_order(kind, small_blocks):
    shapes = {"a": (3, 20), "b": (1,), "c": (149,), "d": (2, 3, 15)}  # blocks begin and end inside and across tensors
    named = {name: gradients(3, math.prod(shape), i).view(3, *shape) for i, (name, shape) in enumerate(shapes.items())}
    flat = torch.cat([tensor.flatten(1) for tensor in named.values()], dim=1)
    projection = Projection(kind, 300, 300 if kind == "identity" else 10, seed=0)
    assert torch.equal(projection.project_named(named), projection.project(flat))
    backwards = projection.project_named(dict(reversed(named.items())))
    assert not torch.allclose(backwards, projection.project(flat))


def test_the_identity_returns_the_gradients():
    g = gradients(3, 40, dtype=torch.float32)
    assert torch.equal(Projection("identity", 40, 40, seed=0).project(g), g)


@pytest.mark.parametrize("kind", ["gaussian", "sparse"])
def test_dot_products_are_k_times_the_true_ones_within_the_expected_error(kind):
    k, dimension = 2048, 3000
    g = gradients(20, dimension) + 0.5 * gradients(1, dimension, seed=9)  # correlated rows
    projected = Projection(kind, dimension, k, seed=3).project(g).double()
    true, found = g @ g.T, projected @ projected.T / k
    norms = g.norm(dim=1)
    # Gaussian: variance of an entry (|a|^2 |b|^2 + (a.b)^2)/k; the sparse kind has no more.
    bound = ((norms[:, None] * norms[None]) ** 2 + true**2).sqrt() / math.sqrt(k)
    error = (found - true).abs() / bound
    assert float(error.max()) < 4.5
    assert float(error.square().mean().sqrt()) < 1.3
    assert float(error.square().mean().sqrt()) > 0.3  # random, not exact


@pytest.mark.parametrize("kind", ["gaussian", "sparse"])
def test_the_mean_squared_norm_over_seeds_is_k_times_the_squared_norm(kind):
    g = gradients(1, 50)
    squares = torch.stack([Projection(kind, 50, 16, seed=s).project(g).double().square().sum() for s in range(400)])
    ratio = squares / (16 * g.square().sum())
    assert float(ratio.mean()) == pytest.approx(1, abs=4 * float(ratio.std()) / 20)
    assert float(ratio.std()) < 0.5


def test_sparse_rows_have_distinct_entries_with_squares_that_sum_to_k():
    for k, nonzeros, used in ((10, 4, 4), (3, 8, 3), (7, 1, 1)):
        projection = Projection("sparse", 60, k, seed=0, nonzeros=nonzeros)
        rows = projection.project(torch.eye(60))
        assert (rows != 0).sum(dim=1).tolist() == [used] * 60
        torch.testing.assert_close(rows.square().sum(dim=1), torch.full((60,), float(k)))
        assert bool((rows != 0).any(dim=0).all())  # every place is used by some parameter


@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_blocks_cover_the_columns_once_and_all_but_the_last_have_the_size(size):
    parts = [torch.arange(3.0)[None], torch.arange(3.0, 11)[None], torch.arange(11.0, 12)[None]]
    blocks = list(blocks_of_columns(parts, size))
    assert torch.cat(blocks, dim=1).flatten().tolist() == list(range(12))
    assert {block.shape[1] for block in blocks[:-1]} <= {size}
    assert len(blocks) == -(-12 // size)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("dense", 10, 3, 0), "kind='dense'"),
        (("gaussian", 0, 3, 0), "num_parameters=0"),
        (("sparse", 10, 0, 0), "k=0"),
        (("identity", 10, 3, 0), "expected num_parameters=10"),
    ],
)
def test_impossible_projections_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        Projection(*arguments)


def test_gradients_of_another_length_are_refused():
    projection = Projection("gaussian", 10, 3, 0)
    with pytest.raises(ValueError, match=r"\(2, 9\).*10 numbers a row"):
        projection.project(torch.zeros(2, 9))
    with pytest.raises(ValueError, match="numbers a row"):
        projection.project_named({"a": torch.zeros(2, 5), "b": torch.zeros(3, 5)})
