"""method=abu through the command line: its limits against plain autograd, the stored Fisher information, scoring."""

import shutil
from pathlib import Path

import pytest
import torch
from commands import fails, mucs
from safetensors.torch import load_file
from unlearning_runs import (
    DIT,
    UNET,
    attribute,
    bank_of,
    base_model,
    digits,
    image_gradients,
    make_run,
    manifest_of,
    parameters_of,
    query_gradient,
    scores_in,
    unlearned_of,
)

from mucs_cli.attribution.fisher import DiagonalFisher
from mucs_cli.cli import main
from mucs_cli.diffusion.sampler import karras_sigmas
from mucs_cli.rng import generator
from mucs_cli.stages import ascent

STEP = ["method=abu", "method.forget_batch_size=10", "method.num_batches=3", "method.fisher_passes=1"]
SMALL = [*STEP, "method.num_draws=4", "score.batch_size=48"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with two queries, without scores."""
    return make_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def finished_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a U-Net and a discrete schedule."""
    return make_run(tmp_path_factory.mktemp("runs") / "unet", UNET, num_steps=60)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "digits"))


@pytest.fixture
def unet_run(finished_unet: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_unet, tmp_path / "unet"))


@pytest.fixture(scope="module")
def shared(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to which several tests add variants."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("shared") / "digits"))


def only_fisher(run: Path) -> dict[str, torch.Tensor]:
    """F of the only settings that a run has been asked for."""
    (path,) = (run / "unlearn" / "_fisher").glob("*/fisher.safetensors")
    return load_file(path)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_a_small_step_gives_the_dot_products_of_gradients_under_the_inverse_fisher(
    kind: str, run: Path, unet_run: Path
) -> None:
    run = run if kind == "dit" else unet_run
    eta = 2e-5
    folder = attribute(run, *SMALL, f"method.eta={eta}", "method.flip=false")
    names = manifest_of(unlearned_of(folder))["trainable"]
    assert all(name.endswith(("to_qkv.weight", "to_k.weight", "to_v.weight")) for name in names)
    fisher = only_fisher(run)
    factors = []
    for name in names:
        factor = 1 / (fisher[name] + 0.1 * fisher[name].mean())
        if "qkv" in name:
            factor[: len(factor) // 3] = 0
        factors.append(factor.flatten())
    denoiser = base_model(run)
    of_images = image_gradients(denoiser, bank_of(folder), parameters_of(denoiser, names))
    measured = scores_in(folder).double() / eta
    for query in range(2):
        of_query = query_gradient(run, query, names, copies=10, num_batches=3)
        expected = of_images @ (torch.cat(factors) * of_query) / len(of_images)
        torch.testing.assert_close(measured[query], expected, rtol=0.02, atol=0.01 * float(expected.abs().max()))
        assert float(expected.std()) > 0.1 * float(expected.abs().max())


def test_the_stored_fisher_is_the_mean_of_squared_gradients_over_the_documented_visits(run: Path) -> None:
    mucs(
        "unlearn",
        f"run={run}",
        *STEP,
        "method.fisher_flip=false",
        "method.trainable=patterns",
        "method.patterns=[proj_out.weight]",
    )
    denoiser = base_model(run)
    (parameter,) = parameters_of(denoiser, ["proj_out.weight"])
    images, labels = digits()
    total = torch.zeros_like(parameter)
    for i, image in enumerate(images):
        source = generator(0, "fisher", 0, i, 0)
        sigma = denoiser.training_sigma(1, source).double()
        noise = torch.randn(1, 8, 8, generator=source).double()[None]
        loss = denoiser.loss(image[None], noise, sigma, labels[i : i + 1])[0]
        total += torch.autograd.grad(loss, parameter)[0].square() / len(images)
    stored = only_fisher(run)["proj_out.weight"]
    assert stored.dtype == torch.float64
    torch.testing.assert_close(stored, total.detach(), rtol=1e-3, atol=1e-5 * float(total.detach().max()))


def test_with_a_flat_fisher_it_is_plain_ascent_at_eta_over_n(run: Path) -> None:
    """Damping by a million times the mean leaves one factor for the whole tensor; Forward-INF takes the same step."""
    chosen = ["method.trainable=patterns", "method.patterns=[transformer_blocks.0.ff.net.0.proj.weight]"]
    natural = attribute(
        run,
        "method=abu",
        *chosen,
        "method.damping=1e6",
        "method.eta=1e4",
        "method.num_batches=1",
        "method.forget_batch_size=20",
        "method.fisher_passes=1",
    )
    fisher = only_fisher(run)["transformer_blocks.0.ff.net.0.proj.weight"]
    rate = 1e4 / 40 / (1e6 * float(fisher.mean()))
    plain = attribute(
        run,
        "method=forward_inf",
        *chosen,
        f"method.learning_rate={rate:.9g}",
        "method.optimizer=sgd",
        "method.num_steps=1",
        "method.forget_batch_size=20",
    )
    base = load_file(run / "train" / "model" / "diffusion_pytorch_model.safetensors")
    for query in range(2):
        ours, theirs = (load_file(unlearned_of(f) / f"query_{query:04d}.safetensors") for f in (natural, plain))
        assert list(ours) == list(theirs) == ["transformer_blocks.0.ff.net.0.proj.weight"]
        (name,) = ours
        step = theirs[name] - base[name]
        assert float(step.abs().max()) > 1e-4
        torch.testing.assert_close(ours[name] - base[name], step, rtol=1e-3, atol=1e-3 * float(step.abs().max()))


def test_the_query_rows_of_a_joint_matrix_and_everything_but_keys_and_values_stay(run: Path) -> None:
    folder = unlearned_of(attribute(run, *SMALL))
    base = load_file(run / "train" / "model" / "diffusion_pytorch_model.safetensors")
    changed = load_file(folder / "query_0000.safetensors")
    assert set(changed) == {f"transformer_blocks.{i}.attn.to_qkv.weight" for i in range(2)}
    for name, tensor in changed.items():
        third = len(tensor) // 3
        assert torch.equal(tensor[:third], base[name][:third])
        assert float((tensor[third:] != base[name][third:]).float().mean()) > 0.9


def test_the_query_loss_rises_and_the_parameters_are_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    folder = attribute(run, *SMALL)
    assert "2 trainable tensors: transformer_blocks.0.attn.to_qkv.weight, transf" in capsys.readouterr().err
    manifest = manifest_of(unlearned_of(folder))
    assert manifest["learning_rate"] == pytest.approx(0.01 / 40)
    for record in manifest["results"]:
        assert record["query_loss"] > record["base_query_loss"]
        assert (record["num_steps"], record["reached_bound"], record["retain_loss"]) == (1, None, None)
    mucs("report", f"run={run}", "report.k=3")
    assert folder.name in (run / "report" / "index.html").read_text()


@pytest.mark.parametrize("flip", [True, False])
def test_scores_are_the_mean_loss_differences_of_image_or_mirror_image_from_the_files_on_disk(
    flip: bool, run: Path
) -> None:
    folder = attribute(run, *SMALL, "method.eta=0.3", f"method.flip={str(flip).lower()}")
    base, moved = base_model(run), base_model(run)
    change = load_file(unlearned_of(folder) / "query_0001.safetensors")
    moved.network.load_state_dict({name: tensor.double() for name, tensor in change.items()}, strict=False)
    bank = bank_of(folder)
    torch.testing.assert_close(
        bank["sigma"].sort().values,
        karras_sigmas(torch.linspace(1, 0, 4), 0.002, 80.0, 7.0).double(),
        rtol=1e-6,
        atol=0,
    )
    images, labels = digits()
    sides = []
    with torch.no_grad():
        for side in [images, images.flip(3)] if flip else [images]:
            total = torch.zeros(len(images), dtype=torch.float64)
            for sigma, noise in zip(bank["sigma"], bank["noise"], strict=True):
                u, t = (d.loss(side, noise[None], sigma[None], labels) for d in (moved, base))
                total += (u - t) / 4
            sides.append(total)
    expected = torch.stack(sides).amax(0)
    torch.testing.assert_close(scores_in(folder)[1].double(), expected, rtol=1e-3, atol=2e-6)
    assert float(expected.std()) > 1e-3
    if flip:
        assert float((sides[1] > sides[0]).float().mean()) > 0.2


def test_a_discrete_schedule_is_scored_at_even_timesteps(unet_run: Path) -> None:
    run = unet_run
    folder = attribute(run, *STEP, "method.num_draws=5")
    levels = base_model(run).levels[2]  # type: ignore[attr-defined]
    torch.testing.assert_close(
        bank_of(folder)["sigma"].sort().values, levels[[0, 200, 400, 600, 800]], rtol=1e-6, atol=0
    )
    full = attribute(run, *STEP, "method.num_draws=5", "method.grid=full")
    assert unlearned_of(full) == unlearned_of(folder)
    assert not torch.equal(scores_in(full), scores_in(folder))


def test_an_interrupted_fisher_goes_on_to_the_same_bits(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = run, Path(shutil.copytree(run, tmp_path / "cut"))
    mucs("unlearn", f"run={whole}", *STEP)
    add, calls = DiagonalFisher.add, []

    def counted(self: DiagonalFisher, *arguments: object) -> None:
        calls.append(1)
        add(self, *arguments)  # type: ignore[arg-type]

    def interrupted(self: DiagonalFisher, *arguments: object) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        counted(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(DiagonalFisher, "add", interrupted)
        assert main(["unlearn", f"run={cut}", *STEP]) == 130
    (state,) = (cut / "unlearn" / "_fisher").glob("*/state.safetensors")
    assert int(load_file(state)["num_visits"]) == 2 * 32
    calls.clear()
    monkeypatch.setattr(DiagonalFisher, "add", counted)
    mucs("unlearn", f"run={cut}", *STEP)
    assert len(calls) == 1  # of three batches of at most 16 images
    assert not state.exists()
    for name, tensor in only_fisher(whole).items():
        assert torch.equal(tensor, only_fisher(cut)[name])
    names = [path.relative_to(whole) for path in (whole / "unlearn").glob("abu*/query_*")]
    assert len(names) == 2
    for path in names:
        assert (whole / path).read_bytes() == (cut / path).read_bytes()


def test_queries_and_settings_that_do_not_change_it_share_the_fisher_and_a_damaged_one_is_computed_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mucs("unlearn", f"run={run}", *STEP, "queries.index=0")
    (path,) = (run / "unlearn" / "_fisher").glob("*/fisher.safetensors")
    before = path.read_bytes()
    whole = DiagonalFisher.add
    monkeypatch.setattr(DiagonalFisher, "add", lambda *_: pytest.fail("the Fisher information is computed again"))
    mucs("unlearn", f"run={run}", *STEP)
    mucs("unlearn", f"run={run}", *STEP, "method.eta=0.1", "method.damping=0.5")
    monkeypatch.setattr(DiagonalFisher, "add", whole)
    path.write_bytes(before[:-8])
    capsys.readouterr()
    mucs("unlearn", f"run={run}", *STEP, "method.eta=0.2")
    assert f"{path} is damaged; computing it again" in capsys.readouterr().err.replace("\n", "")
    assert path.read_bytes() == before
    mucs("unlearn", f"run={run}", *STEP, "method.fisher_flip=false")
    assert len(list((run / "unlearn" / "_fisher").iterdir())) == 2


def test_status_lists_the_fisher_and_cleans_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mucs("unlearn", f"run={run}", *STEP)
    (kept,) = (run / "unlearn" / "_fisher").iterdir()
    capsys.readouterr()
    mucs("status", f"run={run}", "clean=true")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "unlearn/abu" in line]
    assert "done" in line
    assert not kept.exists()
    assert len(list((run / "unlearn").glob("abu*/query_*"))) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eta", 0.1),
        ("num_steps", 2),
        ("forget_batch_size", 12),
        ("num_batches", 2),
        ("fisher_passes", 2),
        ("fisher_flip", "false"),
        ("damping", 1.0),
        ("trainable", "mlp"),
        ("seed", 9),
        ("num_draws", 3),
        ("grid", "exact"),
        ("flip", "false"),
        ("noise_seed", 9),
    ],
)
def test_every_key_changes_what_it_should_and_nothing_else(key: str, value: object, shared: Path) -> None:
    default = shared / "score" / "abu__fisher_passes-1__method.forget_batch_size-10__method.num_draws-4__num_batches-3"
    if not default.exists():
        assert attribute(shared, *SMALL) == default
    folder = attribute(shared, *SMALL, f"method.{key}={value}")
    assert not torch.equal(scores_in(default), scores_in(folder))
    scores_only = key in ("num_draws", "grid", "flip", "noise_seed")
    assert (unlearned_of(folder) == unlearned_of(default)) == scores_only
    if not scores_only:
        old, new = (load_file(unlearned_of(f) / "query_0000.safetensors") for f in (default, folder))
        assert any(name not in new or not torch.equal(tensor, new[name]) for name, tensor in old.items())


def test_a_network_without_attention_takes_the_parameters_of_mucs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascent, "KEY_VALUE", ("of another network",))
    mucs("unlearn", f"run={run}", *STEP)
    (folder,) = (run / "unlearn").glob("abu*")
    mucs("unlearn", f"run={run}", "method=mucs", "unlearning.num_steps=0")
    (own,) = (run / "unlearn").glob("mucs*")
    assert manifest_of(folder)["trainable"] == manifest_of(own)["trainable"]
    assert any(".ff." in name for name in manifest_of(folder)["trainable"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["method.eta=1e30"], "method.eta: got a non-finite loss"),
        (["method.patterns=[ff]"], "method.patterns: got ['ff'] with method.trainable=key_value; expected patterns"),
        (["method.trainable=patterns", "method.patterns=[x]"], "method.patterns: got ['x']; no parameter"),
        (["method.trainable=last_blocks"], "method.num_blocks: got None with method.trainable=last_blocks"),
        (["method.grid=karras"], "method.grid: got 'karras'; expected one of auto, truncated, exact, full, even"),
        (["method.damping=-1"], "method.damping: got -1.0; expected at least 0"),
    ],
)
def test_wrong_values_are_named(
    keys: list[str], message: str, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(capsys, "unlearn", f"run={shared}", *STEP, *keys).startswith(f"mucs: error: {message}")


def test_a_weight_that_no_image_moves_needs_damping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first six digits are those of six classes: the embeddings of the other classes get no gradient."""
    few = [*DIT, "data.limit=6"]
    run = make_run(tmp_path / "few", few, num_steps=20)
    keys = [*STEP, "method.trainable=patterns", "method.patterns=[condition_embed.label_embedding.weight]"]
    line = fails(capsys, "unlearn", f"run={run}", *keys, "method.damping=0")
    assert "method.damping: got 0; the Fisher information of condition_embed.label_embedding.weight is zero" in line
    mucs("unlearn", f"run={run}", *keys)
