"""The parts of the pretraining that its short runs do not check: Muon, the choice of the fastest way, resuming."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils.other import get_free_port
from torch import nn

from atomdiff.toybox.judge import Judge, load_judge, save_judge
from atomdiff.utils.assets import ASSETS
from benchmarks.pretrain import evaluate, muon, train
from benchmarks.pretrain.architecture import (
    assemble,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
)
from benchmarks.pretrain.data import World, as_signal
from benchmarks.pretrain.evaluate import area_under_curve
from benchmarks.pretrain.fastest import fastest
from benchmarks.pretrain.muon import Muon, make_optimizers, orthogonalize
from benchmarks.pretrain.stage import Average, Checkpoints, Phase, Stage, average_gradients, run_stage
from benchmarks.pretrain.train import load_what_fits
from benchmarks.pretrain.train_autoencoder import center_latents, crops
from benchmarks.pretrain.train_denoiser import Denoiser, make_loss
from benchmarks.pretrain.train_inner import InnerDenoiser
from benchmarks.pretrain.weights import load_weights, make_pipeline, save_pipeline
from tests.tiny_models import make_unet


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.fixture
def float32(monkeypatch):
    """Matrices are made orthogonal in float32 on any processor."""
    monkeypatch.setattr("benchmarks.pretrain.muon.has_instructions", lambda *_: False)


@pytest.mark.parametrize("shape", [(8, 8), (4, 32), (3, 100)])
def test_an_orthogonalized_matrix_keeps_its_directions_with_singular_values_near_one(shape, float32):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    solved = orthogonalize(matrix[None])[0]
    along = (left.T @ solved @ right.T).diagonal()
    assert ((along > 0.6) & (along < 1.3)).all()
    assert torch.allclose(solved, left @ along.diag() @ right, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 3, 3, 3)])
def test_a_step_of_muon_has_the_size_of_one_of_adamw_and_is_that_of_the_matrix_alone(
    shape, padded, float32, monkeypatch
):
    """arXiv 2502.16982, eq. 4; padding, as on a GPU, changes nothing."""
    bucket = muon._bucket
    monkeypatch.setattr(muon, "_bucket", lambda *sides, **_: bucket(*sides, padded=padded))
    torch.manual_seed(0)
    weight, other = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(64, 512))
    weight.grad, other.grad = torch.randn(shape), torch.randn(64, 512)
    Muon([weight, other], lr=0.1).step()
    matrix = weight.grad.flatten(1)
    expected = orthogonalize(matrix[None] if matrix.shape[0] <= matrix.shape[1] else matrix.T[None])[0]
    expected = expected if matrix.shape[0] <= matrix.shape[1] else expected.T
    scale = 0.1 * 0.2 * max(matrix.shape) ** 0.5
    assert torch.allclose(weight.detach().flatten(1), -scale * expected, atol=1e-4)
    assert 0.5 < weight.detach().square().mean().sqrt() / (0.1 * 0.2) < 1.5


def test_every_parameter_has_one_optimizer():
    model = nn.ModuleDict({"conv_in": nn.Conv2d(3, 4, 3), "inside": nn.Conv2d(4, 4, 3), "norm": nn.GroupNorm(2, 4)})
    held = [id(p) for each in make_optimizers(model, 1e-3, 0.0) for group in each.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


def test_a_way_with_other_gradients_or_an_error_is_never_the_fastest(tmp_path):
    model, x = make_model(), torch.randn(4, 6)

    def plain():
        return model(x).square().sum()

    def fails():
        raise RuntimeError("no kernel")

    ways = {"plain": plain, "wrong": lambda: 3 * model(x[:1]).sum(), "fails": fails}
    assert fastest("task", tmp_path, model, ways) == "plain"
    assert fastest("task", tmp_path, model, {}) == "plain"  # noted in the folder
    assert all(p.grad is None for p in model.parameters())


class Stopped(Exception):
    pass


def _groups(optimizers):
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def test_a_stage_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    """Steps, weights, momentum, averages, the clock: the second half is that of the run that kept the state."""
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    sampled = []

    def train(model, seconds, stop=None):
        average, stage = Average(model, (0.9,)), Stage("part", seconds, 1e-2)
        sampled.append([])

        def loss_of():
            if stop is not None and stage.steps == stop:
                raise Stopped
            sampled[-1].append(torch.rand(1).item())
            return (model(x) - 1).square().mean()

        run_stage(stage, model, [Phase(loss_of)], average, checkpoints=Checkpoints(tmp_path, 1e-9))
        return stage, average

    with pytest.raises(Stopped):
        train(make_model(), 3600.0, stop=30)
    kept = torch.load(tmp_path / "resume-part.pt", weights_only=True)
    assert kept["steps"] == 30 and kept["seconds"] == 3600 and 0 < kept["elapsed"] < 60

    resumed = make_model(seed=5)
    kept["elapsed"] = 3600.0  # its time is over: it is what was kept
    torch.save(kept, tmp_path / "resume-part.pt")
    stage, average = train(resumed, 7.0)
    assert stage.steps == 30 and stage.seconds == 3600 and len(stage.losses) == 1
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, kept["model"][name])
    assert all(torch.equal(a, b) for a, b in zip(average.copies[0], kept["average"]["0"], strict=True))

    kept["elapsed"] = 1.0
    torch.save(kept, tmp_path / "resume-part.pt")
    with pytest.raises(Stopped):
        train(make_model(), 7.0, stop=40)
    assert len(sampled[0]) == 30 and len(sampled[-1]) == 10 and not set(sampled[0]) & set(sampled[-1])
    later = torch.load(tmp_path / "resume-part.pt", weights_only=True)
    assert later["steps"] == 40 and later["losses"] and later["elapsed"] > 1
    momentum = [each["optimizer_0"]["state"][0]["momentum"] for each in (kept, later)]
    assert not torch.equal(*momentum) and momentum[0].abs().sum() > 0


def test_without_an_interval_nothing_is_kept(tmp_path):
    stage, model = Stage("part", 0.0, 1e-3), make_model()
    run_stage(stage, model, [Phase(lambda: model(torch.ones(1, 6)).sum())], checkpoints=Checkpoints(tmp_path))
    assert stage.steps == 2 and not list(tmp_path.iterdir())


def test_the_area_under_the_curve_counts_pairs():
    same, different = torch.tensor([0.9, 0.5, 0.5]), torch.tensor([0.5, 0.1, 0.7, 0.3])
    pairs = [(s > d) + 0.5 * (s == d) for s in same.tolist() for d in different.tolist()]
    assert area_under_curve(same, different) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.slow
def test_a_base_without_training_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "SUBJECTS", dict(list(evaluate.SUBJECTS.items())[:2]))
    tokenizer = build_tokenizer()
    pipe = assemble(build_vae(), tokenizer, build_text_encoder(tokenizer), build_unet())
    save_pipeline(pipe, tmp_path / "base")
    save_judge(Judge(), tmp_path / "judge")
    folders = {"pretrained_model_name_or_path": str(tmp_path / "base"), "judge": str(tmp_path / "judge")}
    few = {"count": 3, "families": 2, "restored": 2, "num_inference_steps": 2}
    config = evaluate.EvaluateConfig(**folders, **few, output=str(tmp_path / "result.json"))
    evaluate.main(config)
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert 0 < figures["psnr_unseen"] < 20 and figures["similarity_kept_least"] <= figures["similarity_kept_median"]
    assert all(0 <= figures[f"judge_auc_{kind}"] <= 1 for kind in ("shape", "pattern", "colors"))
    assert figures["sharpness_over_real"] > 0 and figures["frechet_over_real"] > 0
    assert (tmp_path / "result.png").exists()


def test_a_changed_architecture_keeps_the_weights_that_fit(capsys):
    one, other = make_model(1), make_model(2)
    load_what_fits("part", one, other.state_dict())
    assert torch.equal(one[0].weight, other[0].weight) and capsys.readouterr().out == ""
    wider = nn.Sequential(nn.Linear(7, 8))
    before = wider[0].weight.detach().clone()
    load_what_fits("part", wider, other.state_dict())
    assert torch.equal(wider[0].weight, before) and torch.equal(wider[0].bias, other[0].bias)
    assert "part: 1 of 2 weights are new" in capsys.readouterr().out


def test_training_can_go_on_from_the_embedded_base(tmp_path):
    embedded = ASSETS / "samples" / "toybox-sd"
    states, scaling_factor = load_weights(embedded)
    assert states["judge"].keys() == load_judge().state_dict().keys()
    save_pipeline(make_pipeline(states, scaling_factor), tmp_path)
    for part in ("vae", "text_encoder", "unet"):
        ours, theirs = (json.loads((folder / part / "config.json").read_text()) for folder in (tmp_path, embedded))
        versions = {"_diffusers_version", "_name_or_path", "transformers_version"}
        assert {k: v for k, v in ours.items() if k not in versions} == {
            k: v for k, v in theirs.items() if k not in versions
        }
        [file] = embedded.glob(f"{part}/*.safetensors")
        assert (tmp_path / part / file.name).read_bytes() == file.read_bytes()


def test_attention_that_is_new_starts_without_an_effect():
    torch.manual_seed(0)
    old, new = make_unet(), make_unet(down_block_types=("CrossAttnDownBlock2D",) * 2)
    load_what_fits("unet", new, old.state_dict())
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(new(*inputs).sample, old(*inputs).sample)


def test_the_loss_of_clean_predictions_is_zero_and_of_others_is_not():
    torch.manual_seed(0)
    alphas, latents = build_scheduler().alphas_cumprod, torch.ones(4, 2, 8, 8)

    def knows_the_latents(noisy, timesteps, ids):
        signal = alphas[timesteps].sqrt()[:, None, None, None]
        spread = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
        return (signal * noisy - 1) / spread.clamp(min=1e-4)  # v = signal * noise - spread * clean

    ids = torch.zeros(5, 3, dtype=torch.long)
    assert make_loss(knows_the_latents, latents, torch.ones(4, 1, 8, 8), ids, 64)() < 1e-3
    assert make_loss(lambda noisy, *_: noisy * 0, latents, torch.ones(4, 1, 8, 8), ids, 64)() > 0.1


def test_timesteps_of_a_batch_are_spread_evenly():
    seen = []

    def note(noisy, timesteps, ids):
        seen.append(timesteps)
        return noisy

    make_loss(note, torch.ones(4, 2, 8, 8), torch.ones(4, 1, 8, 8), torch.zeros(5, 3, dtype=torch.long), 16)()
    edges = torch.arange(17) / 16
    lowest, highest = edges[:-1].square() * 1000 - 1, edges[1:] * 1000  # uniform, or the squares of uniform numbers
    assert ((lowest <= seen[0]) & (seen[0] <= highest)).all(), seen[0]


def test_the_inner_part_computes_what_the_whole_unet_does_and_trains_nothing_else():
    torch.manual_seed(0)
    denoiser = Denoiser(build_text_encoder(build_tokenizer()), build_unet()).eval()
    inner = InnerDenoiser(denoiser).eval()
    inputs = torch.randn(2, 16, 16, 16), torch.tensor([3, 700]), torch.randint(0, 90, (2, 24))
    seen = []
    last = denoiser.unet.up_blocks[1]
    for module in (last.attentions[-1], inner.small):
        module.register_forward_hook(lambda _, before, after: seen.append((before[0], after)))
    denoiser(*inputs)
    prediction = inner(*inputs)
    whole = seen[0][1][0]  # what goes into the upsampler
    torch.testing.assert_close(seen[2][0], whole, rtol=0, atol=0)
    assert prediction.shape == inputs[0].shape and last.upsamplers is not None

    prediction.square().sum().backward()
    trained = {name for name, p in denoiser.unet.named_parameters() if p.grad is not None}
    outer = ("conv_in", "time_embedding", "down_blocks.0", "up_blocks.2", "up_blocks.1.upsamplers", "conv_")
    assert trained == {n for n, _ in denoiser.unet.named_parameters() if not n.startswith(outer)}
    assert not any(p.requires_grad for p in denoiser.text_encoder.parameters())
    assert not any(p.requires_grad for p in denoiser.unet.down_blocks[0].parameters())


def test_a_stage_may_end_after_its_steps_and_has_phases():
    stage, model, seen = Stage("part", 0.0, 1e-3, total_steps=5), make_model(), []

    def loss_of(phase):
        seen.append(phase)
        return model(torch.ones(1, 6)).sum()

    run_stage(stage, model, [Phase(partial(loss_of, "first"), 0.5), Phase(partial(loss_of, "second"))])
    assert stage.steps == 5 and seen == ["first"] * 3 + ["second"] * 2


def test_what_a_graph_would_read_stays_where_it_is_and_moves_with_the_run(monkeypatch):
    """On a CPU nothing is captured: here a step is kept with the rates and shares that it found at its first call."""
    made, read, kept = [], [], []

    def keep_optimizers(*args):
        made.append(make_optimizers(*args))
        return made[-1]

    def capture(step):
        rates = [group["lr"] for group in _groups(made[-1])]
        kept.append(step)

        def replay():
            assert all(rate is group["lr"] for rate, group in zip(rates, _groups(made[-1]), strict=True))
            read.append(rates[0].item())
            step()

        return replay

    monkeypatch.setattr("benchmarks.pretrain.stage.make_optimizers", keep_optimizers)
    monkeypatch.setattr("benchmarks.pretrain.stage.captured", capture)
    results = []
    for is_captured in (False, True):
        model, stage = make_model(), Stage("part", 0.0, 1e-2, total_steps=6)
        average = Average(model, (0.9,))

        def loss_of(model=model):
            return (model(torch.ones(1, 6)) - 1).square().sum()

        run_stage(stage, model, [Phase(loss_of, 0.5, is_captured), Phase(loss_of, 1.0, is_captured)], average)
        results.append([*model.parameters(), *average.copies[0]])
    assert len(kept) == 2 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(read) == 6 and len(set(read)) == 6
    assert not torch.equal(results[0][0], make_model()[0].weight)


def test_crops_are_parts_of_images_with_their_masks():
    images = torch.arange(2 * 3 * 8 * 8).remainder(256).to(torch.uint8).view(2, 3, 8, 8)
    masks = torch.rand(2, 1, 4, 4).half()
    fine = masks.float().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    parts = {
        image[:, y : y + 4, x : x + 4].tobytes(): mask[:, y : y + 4, x : x + 4]
        for image, mask in zip(images.numpy(), fine, strict=True)
        for y in range(5)
        for x in range(5)
    }
    torch.manual_seed(0)
    drawn, drawn_masks = crops(World(images, masks, {}, []), 4, 60)
    found = [((crop + 1) * 127.5).round().to(torch.uint8).contiguous().numpy().tobytes() for crop in drawn]
    assert drawn.shape == (60, 3, 4, 4) and len(set(found)) > 20
    for crop, mask in zip(found, drawn_masks, strict=True):
        assert torch.equal(mask, parts[crop])


def test_centered_latents_decode_to_the_same_image_and_have_unit_scale():
    torch.manual_seed(0)
    vae, images = build_vae().eval(), torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        signal = as_signal(images)
        raw = vae.encode(signal).latent_dist.mean
        before = vae.decode(raw).sample
        scaled = center_latents(vae, raw.clone())
        after = vae.decode(scaled / vae.config.scaling_factor).sample
    assert scaled.std() == pytest.approx(1, abs=0.01) and scaled.mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        vae.encode(signal).latent_dist.mean * vae.config.scaling_factor, scaled, atol=1e-3, rtol=1e-3
    )


def _train(rows: torch.Tensor, checkpoints: Checkpoints | None = None) -> nn.Module:
    model = make_model()
    phase = Phase(lambda: (model(rows) - 1).square().mean())
    run_stage(Stage("part", 0.0, 1e-2, total_steps=5), model, [phase], checkpoints=checkpoints)
    return model


def _train_beside(index: int, port: int, folder: Path, rows: torch.Tensor) -> None:
    """One of two processes that train the same model, each on its half of the rows."""
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"OMP_NUM_THREADS": "1"})
    PartialState(cpu=True)
    model = _train(rows[index::2], Checkpoints(folder / str(index), 60))
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, 3.0]) * (index + 1)
    average_gradients([parameter, nn.Parameter(torch.zeros(1))])
    torch.save(model.state_dict() | {"averaged": parameter.grad}, folder / f"{index}.pt")
    PartialState().destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one_does_on_the_images_of_both(tmp_path):
    for index in range(2):
        (tmp_path / str(index)).mkdir()
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    torch.multiprocessing.spawn(_train_beside, (get_free_port(), tmp_path, rows), nprocs=2)
    first, second = (torch.load(tmp_path / f"{index}.pt", weights_only=True) for index in range(2))
    for name, expected in (_train(rows).state_dict() | {"averaged": torch.tensor([1.5, 4.5])}).items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], expected, atol=1e-3)
    assert list(tmp_path.glob("*/resume-part.pt")) == [tmp_path / "0" / "resume-part.pt"]


@pytest.mark.parametrize("steps", [[], ["--steps", "2"]])
def test_several_processes_need_a_cpu_and_a_number_of_steps(steps, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(steps))
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path), "--tiny", *steps])
    with pytest.raises(SystemExit, match="found cuda and --steps 2" if steps else "found cpu and --steps 0"):
        train.main()
