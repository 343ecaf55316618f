import numpy as np
import pytest
import torch

from mucs_cli.attribution import feature_scores as module
from mucs_cli.attribution.feature_scores import (
    DampedKernel,
    das_scores,
    pieces,
    relative_influence_scores,
    tracin_scores,
    trak_scores,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def damping_for(features, value):
    """The scale-free damping that makes lambda ``value``."""
    return value * features.shape[1] / float(features.square().sum())


def dense(features, value):
    """K^-1, written out."""
    return torch.linalg.inv(features.T @ features + value * torch.eye(features.shape[1], dtype=torch.float64))


TALL, WIDE = draw(40, 12), draw(9, 30)
SHAPES = pytest.mark.parametrize("features", [TALL, WIDE], ids=["tall", "wide"])
FORMS = pytest.mark.parametrize("form", ["primal", "dual"])


def queries_for(features, count=5):
    return draw(count, features.shape[1], seed=7)


@pytest.fixture(params=[False, True], ids=["whole", "pieces"])
def chunks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(module, "CHUNK_ENTRIES", 70)


@SHAPES
@FORMS
def test_products_leverages_and_norms_equal_those_of_the_inverse_written_out(features, form, chunks):
    kernel = DampedKernel(features, damping_for(features, 2.5), form)
    inverse, queries = dense(features, 2.5), queries_for(features)
    assert kernel.is_dual == (form == "dual")
    assert kernel.damping_lambda == pytest.approx(2.5)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(kernel.products(queries), queries @ inverse @ features.T, **close)
    leverage = torch.stack([row @ inverse @ row for row in features])
    torch.testing.assert_close(kernel.one_minus_leverage, 1 - leverage, **close)
    torch.testing.assert_close(kernel.solution_norms, (features @ inverse).norm(dim=1), **close)


def test_the_smaller_of_the_two_forms_is_chosen():
    assert not DampedKernel(TALL, 0.1).is_dual
    assert DampedKernel(WIDE, 0.1).is_dual
    assert not DampedKernel(draw(6, 6), 0.1).is_dual


@pytest.mark.parametrize("damping", [1e-4, 1.0, 100.0])
def test_primal_and_dual_agree_with_many_more_dimensions_than_images(damping):
    features = draw(15, 400) * torch.logspace(-2, 1, 400, dtype=torch.float64)
    primal, dual = (DampedKernel(features, damping, form) for form in ("primal", "dual"))
    queries = queries_for(features)
    torch.testing.assert_close(primal.products(queries), dual.products(queries), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(primal.one_minus_leverage, dual.one_minus_leverage, rtol=0, atol=1e-10)
    torch.testing.assert_close(primal.solution_norms, dual.solution_norms, rtol=1e-6, atol=0)
    residual = draw(15, seed=3).abs()
    for a, b in zip(das_scores(primal, queries, residual), das_scores(dual, queries, residual), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-10)


@FORMS
def test_under_infinite_damping_lambda_times_the_score_is_the_dot_product(form):
    kernel = DampedKernel(WIDE, 1e9, form)
    queries = queries_for(WIDE)
    scaled = kernel.products(queries) * kernel.damping_lambda
    torch.testing.assert_close(scaled, queries @ WIDE.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tracin_scores(WIDE, queries).double(), queries @ WIDE.T, rtol=1e-6, atol=1e-6)
    norms = WIDE.norm(dim=1)
    expected = queries @ WIDE.T / norms
    torch.testing.assert_close(relative_influence_scores(kernel, queries).double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, queries @ WIDE.T)


@FORMS
def test_a_single_image_has_its_closed_form(form):
    one, queries = WIDE[:1], queries_for(WIDE)
    square = float(one.square().sum())
    value = 0.3 * square / 30
    kernel = DampedKernel(one, 0.3, form)
    torch.testing.assert_close(kernel.products(queries), queries @ one.T / (square + value))
    assert float(kernel.one_minus_leverage) == pytest.approx(value / (square + value), rel=1e-8)


@SHAPES
@FORMS
def test_training_images_as_queries_have_scores_in_0_1_that_sum_to_the_effective_dimension(features, form):
    kernel = DampedKernel(features, 0.05, form)
    diagonal = kernel.products(features).diagonal()
    assert 0 <= float(diagonal.min()) < float(diagonal.max()) < 1
    singular = torch.linalg.svdvals(features).square()
    assert float(diagonal.sum()) == pytest.approx(float((singular / (singular + kernel.damping_lambda)).sum()))
    torch.testing.assert_close(1 - kernel.one_minus_leverage, diagonal)


@pytest.mark.parametrize("count", [40, 9])
@FORMS
def test_the_signed_das_score_is_the_leave_one_out_change_of_ridge_regression(count, form):
    features, target, value = draw(count, 12, seed=2), draw(count, seed=3), 0.7
    queries = draw(4, 12, seed=4)

    def fit(rows):
        x = features[rows]
        return torch.linalg.solve(x.T @ x + value * torch.eye(12, dtype=torch.float64), x.T @ target[rows])

    everything = list(range(count))
    whole = fit(everything)
    change = torch.stack([queries @ (whole - fit([j for j in everything if j != i])) for i in everything], dim=1)
    residual = target - features @ whole
    kernel = DampedKernel(features, damping_for(features, value), form)
    assert float(kernel.one_minus_leverage.min()) > 1e-3  # nothing is clamped
    exact = kernel.products(queries) * residual / kernel.one_minus_leverage
    assert float((exact - change).abs().max()) < 1e-10
    signed, num_clamped = das_scores(kernel, queries, residual, square=False)
    squared, _ = das_scores(kernel, queries, residual)
    assert num_clamped == 0
    torch.testing.assert_close(signed, change.float())
    torch.testing.assert_close(squared, change.square().float())
    assert bool((signed < 0).any())
    unlevelled, _ = das_scores(kernel, queries, residual, square=False, leverage=False)
    torch.testing.assert_close(unlevelled.double(), kernel.products(queries) * residual, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(unlevelled, signed)


@FORMS
def test_leverages_near_one_are_clamped_and_counted(form):
    features = torch.cat([torch.eye(3, 30, dtype=torch.float64) * 100, draw(6, 30)])  # three far outliers
    kernel = DampedKernel(features, damping_for(features, 4.0), form)
    margin = kernel.one_minus_leverage
    assert (margin < 1e-3).tolist() == [True] * 3 + [False] * 6
    scores, num_clamped = das_scores(kernel, features, torch.ones(9))
    assert num_clamped == 3
    expected = (kernel.products(features) / margin.clamp(min=1e-3)).square()
    torch.testing.assert_close(scores, expected.float())
    assert das_scores(kernel, features, torch.ones(9), leverage=False)[1] == 0


@FORMS
def test_scores_of_later_queries_are_those_of_all_queries_together(form):
    kernel, queries = DampedKernel(TALL, 0.1, form), queries_for(TALL)
    for score in (trak_scores, relative_influence_scores, lambda k, q: das_scores(k, q, torch.ones(40))[0]):
        whole = score(kernel, queries)
        assert whole.dtype == torch.float32
        torch.testing.assert_close(torch.cat([score(kernel, queries[:2]), score(kernel, queries[2:])]), whole)


@SHAPES
def test_features_mapped_from_disk_in_float32_score_like_those_in_memory(features, tmp_path, chunks):
    np.save(tmp_path / "features.npy", features.float().numpy())
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    queries = queries_for(features).float()
    on_disk, in_memory = DampedKernel(mapped, 0.1), DampedKernel(features.float(), 0.1)
    assert torch.equal(trak_scores(on_disk, queries.numpy()), trak_scores(in_memory, queries))
    assert torch.equal(tracin_scores(mapped, queries), tracin_scores(features.float(), queries.numpy()))
    expected = queries.double() @ dense(features, on_disk.damping_lambda) @ features.T
    torch.testing.assert_close(trak_scores(on_disk, queries).double(), expected, rtol=1e-4, atol=1e-5)


def test_scores_do_not_depend_on_the_scale_of_the_projection():
    queries = queries_for(TALL)
    scores = trak_scores(DampedKernel(TALL, 0.3), queries)
    torch.testing.assert_close(trak_scores(DampedKernel(100 * TALL, 0.3), 100 * queries), scores)
    assert not torch.allclose(trak_scores(DampedKernel(TALL, 0.6), queries), scores)


def test_pieces_hold_no_more_than_the_limit_and_cover_everything(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 70)
    for axis in (0, 1):
        parts = [piece for _, piece in pieces(TALL, axis, torch.device("cpu"))]
        assert len(parts) > 2
        assert max(part.numel() for part in parts) <= 70
        assert torch.equal(torch.cat(parts, dim=axis), TALL)


def test_an_image_without_a_gradient_scores_zero():
    features = torch.cat([TALL, torch.zeros(1, 12, dtype=torch.float64)])
    kernel = DampedKernel(features, 0.1)
    scores = relative_influence_scores(kernel, queries_for(TALL))
    assert torch.equal(scores[:, -1], torch.zeros(5))
    assert bool((scores[:, :-1] != 0).all())


@pytest.mark.parametrize(
    ("features", "arguments", "match"),
    [
        (TALL, (-1.0,), "damping=-1"),
        (TALL, (float("nan"),), "damping=nan"),
        (TALL, (0.1, "both"), "form='both'"),
        (TALL[0], (0.1,), r"shape \(12,\)"),
        (TALL[:0], (0.1,), r"shape \(0, 12\)"),
        (torch.zeros(3, 4), (0.1,), "sum to 0"),
        (torch.tensor([[1.0, torch.nan]]), (0.1,), "finite"),
        (WIDE, (0.0, "primal"), "more damping"),
        (torch.cat([WIDE, WIDE]), (0.0, "dual"), "more damping"),
    ],
)
def test_impossible_kernels_are_refused(features, arguments, match):
    with pytest.raises(ValueError, match=match):
        DampedKernel(features, *arguments)


def test_queries_and_residuals_that_do_not_fit_are_refused():
    kernel = DampedKernel(TALL, 0.1)
    for score in (trak_scores, relative_influence_scores):
        with pytest.raises(ValueError, match=r"shape \(2, 11\): expected \[Q, 12\]"):
            score(kernel, torch.zeros(2, 11))
    with pytest.raises(ValueError, match="not finite"):
        tracin_scores(TALL, torch.full((1, 12), torch.inf))
    with pytest.raises(ValueError, match=r"expected \[40\]"):
        das_scores(kernel, queries_for(TALL), torch.ones(39))
    with pytest.raises(ValueError, match="finite numbers"):
        das_scores(kernel, queries_for(TALL), torch.full((40,), torch.nan))
