"""Images of the engine are those of lone requests, whatever shares their calls."""

import hashlib
import threading
import time
from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from atomdiff.serving import concepts, worker
from atomdiff.serving.engine import Engine
from atomdiff.serving.errors import EngineClosedError, QueueFullError, RequestTimeoutError
from atomdiff.serving.schedulers import SCHEDULERS
from atomdiff.utils.errors import UserError
from tests.serving.helpers import TOLERANCE, Alone, ask
from tests.tiny_models import fresh_copy

MIXED = [
    ask("a photo of sks mug <atoms:ant>", 4, seed=1),
    ask("a photo of sks mug <atoms:bee:0.7>", 7, seed=2, guidance_scale=5.0),
    ask("a photo of a cat", 3, seed=3, negative_prompt="a blue table"),
    ask("a red sks mug", 5, seed=4, concepts={"cat": 1.2}, negative_prompt="sks"),
    ask('sks mug <atoms:ant:{"weight": 0.5, "steps": {"0": 1, "1": 0}}>', 6, seed=5),
    ask('a red mug <atoms:ant:0.5> <atoms:bee:{"blocks": {"down": 0.3}}>', 4, seed=6),
    ask("a photo of sks mug <atoms:bee>", 4, seed=7, guidance_scale=1.0),
    ask("a photo of sks mug <atoms:bee>", 2, seed=8, height=48, width=32),
]


@pytest.fixture
def alone(pipe_template, library):
    return Alone(fresh_copy(pipe_template, requires_safety_checker=False), library)


@pytest.fixture
def calls(monkeypatch):
    """How many rows each call of the denoiser had; the engine waits in each while `gate` is closed."""
    found, predict = [], worker.predict

    def count(pipe, rows):
        found.append(len(rows))
        assert found.gate.wait(30)
        return predict(pipe, rows)

    class Calls(list):
        gate = threading.Event()

    found = Calls()
    found.gate = threading.Event()
    found.gate.set()
    monkeypatch.setattr(worker, "predict", count)
    return found


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def difference(image, expected):
    return (image - expected).abs().max().item()


def test_images_are_those_of_lone_requests(make_engine, alone, calls):
    calls.gate.clear()
    engine = make_engine()
    jobs = engine.submit(MIXED[:1])
    wait_for(lambda: calls)
    jobs += engine.submit(MIXED[1:])  # they join in the middle of the first
    calls.gate.set()
    images = [job.future.result(60) for job in jobs]
    expected = [alone(request) for request in MIXED]
    assert max(map(difference, images, expected)) < TOLERANCE
    assert min(difference(images[0], other) for other in expected[1:4]) > 100 * TOLERANCE
    by_steps = engine.submit([MIXED[4]])[0].future.result(60)
    assert difference(by_steps, expected[4]) < TOLERANCE
    assert max(calls) >= 5 and engine.stats.steps / engine.stats.calls > 2


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_named_scheduler_may_be_at_different_steps(make_engine, alone, calls, name):
    calls.gate.clear()
    requests = [
        ask(prompt, steps, seed=steps, scheduler=name)
        for prompt, steps in (("sks mug <atoms:ant>", 5), ("a cat", 3), ("a red mug", 6))
    ]
    engine = make_engine()
    jobs = engine.submit(requests[:1])
    wait_for(lambda: calls)
    jobs += engine.submit(requests[1:])
    calls.gate.set()
    for job, request in zip(jobs, requests, strict=True):
        assert difference(job.future.result(60), alone(request)) < TOLERANCE
    assert 3 in calls


def test_sdxl(tiny_xl_pipe, xl_pipe_template):
    engine = Engine(tiny_xl_pipe)
    requests = [
        ask("a red mug", 3),
        ask("a cat", 4, seed=1, negative_prompt="blue"),
        ask("a cat", 2, guidance_scale=1.0),
    ]
    images = [job.future.result(60) for job in engine.submit(requests)]
    engine.close()
    alone = Alone(fresh_copy(xl_pipe_template, add_watermarker=False), ".")
    assert max(map(difference, images, map(alone, requests))) < TOLERANCE


def test_short_jobs_overtake_long_ones_and_pause_them(make_engine, alone, calls):
    engine = make_engine(max_batch=2)
    long = [ask("sks mug <atoms:ant>", 30, seed=seed) for seed in range(2)]
    jobs = engine.submit(long)
    wait_for(lambda: len(calls) > 2)
    (short,) = engine.submit([ask("sks mug <atoms:bee>", 3)])
    short.future.result(60)
    assert not any(job.future.done() for job in jobs)
    images = [job.future.result(60) for job in jobs]
    assert max(map(difference, images, map(alone, long))) < TOLERANCE


def test_long_jobs_are_not_overtaken_for_ever(make_engine, calls):
    engine = make_engine(max_batch=1)
    (long,) = engine.submit([ask(steps=30)])
    after = 0
    while not long.future.done():
        engine.submit([ask(steps=3)])[0].future.result(60)
        after += 1
    assert after < 15


def test_a_full_queue_refuses_all_or_none(make_engine, calls):
    calls.gate.clear()
    engine = make_engine(max_batch=1, max_queue=2)
    jobs = engine.submit([ask(), ask()])
    with pytest.raises(QueueFullError, match="2 images are running or waiting, of 3") as refused:
        engine.submit([ask(), ask()])
    assert refused.value.retry_after >= 1
    with pytest.raises(UserError, match="4 images in one request; expected at most 3"):
        engine.submit([ask()] * 4)
    jobs += engine.submit([ask()])
    calls.gate.set()
    assert all(job.future.result(60).shape == (3, 32, 32) for job in jobs)
    assert engine.num_running == engine.num_waiting == 0


def test_cancelled_jobs_make_room_and_timed_out_ones_fail(make_engine, calls):
    calls.gate.clear()
    engine = make_engine(max_batch=1, max_queue=1)
    jobs = engine.submit([ask(steps=500)])
    wait_for(lambda: calls)
    (late,) = engine.submit([ask(steps=500)], timeout=0.01)
    assert jobs[0].future.cancel()
    jobs += engine.submit([ask()])
    time.sleep(0.02)
    calls.gate.set()
    with pytest.raises(RequestTimeoutError, match="in the queue"):
        late.future.result(60)
    jobs[1].future.result(60)
    assert (engine.stats.cancelled, engine.stats.timed_out, engine.stats.finished) == (1, 1, 1)
    assert len(calls) < 10


def test_a_row_that_fails_fails_alone(make_engine, alone, monkeypatch, calls):
    engine, predict = make_engine(), worker.predict

    def fail(pipe, rows):
        if any(row.geometry.width == 32 and row.num_steps == 13 for row in rows):
            raise RuntimeError("out of memory")
        return predict(pipe, rows)

    monkeypatch.setattr(worker, "predict", fail)
    requests = [ask("sks mug <atoms:ant>", 4), ask(steps=13), ask("sks mug <atoms:bee>", 5)]
    jobs = engine.submit(requests)
    with pytest.raises(RuntimeError, match="out of memory"):
        jobs[1].future.result(60)
    for job, request in ((jobs[0], requests[0]), (jobs[2], requests[2])):
        assert difference(job.future.result(60), alone(request)) < TOLERANCE


def test_images_that_end_in_the_same_step_are_decoded_together(make_engine, alone, monkeypatch):
    decoded, decode = [], worker.decode

    def count(pipe, latents):
        decoded.append(len(latents))
        if len(latents) > 2:
            raise RuntimeError("out of memory")
        return decode(pipe, latents)

    monkeypatch.setattr(worker, "decode", count)
    requests = [ask(f"sks mug <atoms:{name}>", 2, seed=3) for name in ("ant", "bee", "cat")] + [ask(steps=3)]
    images = [job.future.result(60) for job in make_engine().submit(requests)]
    assert max(map(difference, images, map(alone, requests))) < TOLERANCE
    assert decoded == [3, 1, 2, 1]  # what does not fit into memory is decoded by halves


def test_requests_that_cannot_be_fulfilled_are_refused_at_once(make_engine):
    engine = make_engine(max_side=64)
    refused = {
        "there is no concept 'dog'": ask("sks <atoms:dog>"),
        "does not end": ask("sks <atoms:ant"),
        "only prompts take concept tags": ask(negative_prompt="<atoms:ant>"),
        "which is no character": ask("a mug \udc00"),
        "the prompt 'blurry .*: found .*, which is no character": ask(negative_prompt="blurry \udc00"),
        "at most 64 a side": ask(height=72, width=64),
        "has no layer in 'text_encoder'": ask(concepts={"ant": {"blocks": {"text_encoder": 1}}}),
        "found the adapter weight 'much'": ask(concepts={"ant": "much"}),
        "has 'sks', the trigger word of 'ant' and 'bee'": ask("sks <atoms:ant> <atoms:bee>"),
        "zero terminal SNR": ask(scheduler="pndm"),
    }
    engine.pipe.scheduler = type(engine.pipe.scheduler).from_config(
        engine.pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    for message, request in refused.items():
        with pytest.raises(UserError, match=message):
            engine.submit([request])
    with pytest.raises(UserError, match="num_inference_steps=0"):
        ask(steps=0)


def test_schedulers_of_other_kinds_are_refused_by_name(make_engine, tiny_pipe):
    from diffusers import KDPM2DiscreteScheduler

    tiny_pipe.scheduler = KDPM2DiscreteScheduler.from_config(tiny_pipe.scheduler.config)
    engine = make_engine()
    with pytest.raises(UserError, match="KDPM2DiscreteScheduler, whose rows cannot be at different steps"):
        engine.submit([ask()])
    assert engine.submit([ask(scheduler="euler")])[0].future.result(60).isfinite().all()


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "pndm"])
def test_named_schedulers_start_without_any_signal(make_engine, tiny_pipe, name):
    tiny_pipe.scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        algorithm_type="sde-dpmsolver++",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    (job,) = make_engine().submit([ask(steps=25, scheduler=name)])
    assert job.future.result(60).isfinite().all()


def test_concepts_replaced_or_deleted_are_kept_by_what_uses_them(make_engine, alone, library, calls):
    engine = make_engine()
    request = ask("sks mug <atoms:ant>", 4, seed=9)
    before, other = alone(request), alone(ask("sks mug <atoms:bee>", 4, seed=9))
    calls.gate.clear()
    jobs = engine.submit([request])
    (library / "bee.atoms.safetensors").replace(library / "ant.atoms.safetensors")
    jobs += engine.submit([request])
    (library / "ant.atoms.safetensors").unlink()
    with pytest.raises(UserError, match="there is no concept 'ant'"):
        engine.submit([request])
    calls.gate.set()
    first, second = (job.future.result(60) for job in jobs)
    assert difference(first, before) < TOLERANCE
    assert difference(second, other) < TOLERANCE


def test_a_concept_that_is_replaced_while_it_is_read_is_read_again(make_engine, alone, library, monkeypatch):
    """Contents, schedule and hash are of one file, also where it is replaced or deleted between them."""
    engine, request = make_engine(), ask("sks mug <atoms:ant>", 2, seed=9)
    expected = alone(ask("sks mug <atoms:bee>", 2, seed=9))
    digest = hashlib.sha256((library / "bee.atoms.safetensors").read_bytes()).hexdigest()
    read = concepts.library_source

    def replace_once(*args):
        source = read(*args)
        contents = source.read()
        if (library / "bee.atoms.safetensors").exists():
            (library / "bee.atoms.safetensors").replace(library / "ant.atoms.safetensors")
        return replace(source, read=lambda: contents)

    monkeypatch.setattr(concepts, "library_source", replace_once)
    (job,) = engine.submit([request])
    assert job.prompt.concepts[0][0].sha256 == digest
    assert difference(job.future.result(60), expected) < TOLERANCE

    def delete(*args):
        (library / "cat.atoms.safetensors").unlink()
        return read(*args)

    monkeypatch.setattr(concepts, "library_source", delete)
    with pytest.raises(UserError, match="there is no concept 'cat'"):
        engine.submit([ask("sks mug <atoms:cat>")])


def test_closing_finishes_what_was_taken(make_engine, calls):
    engine = make_engine(max_batch=1)
    jobs = engine.submit([ask(), ask()])
    engine.close()
    assert all(job.future.result(0).isfinite().all() for job in jobs)
    assert not engine.is_running
    with pytest.raises(EngineClosedError):
        engine.submit([ask()])


def test_closing_with_a_limit_gives_up_the_rest(make_engine):
    engine = make_engine(max_batch=1)
    jobs = engine.submit([ask(steps=500), ask(steps=500)])
    engine.close(timeout=0.05)
    for job in jobs:
        with pytest.raises(EngineClosedError, match="stopped before the image was done"):
            job.future.result(0)


def test_nothing_stays_behind(make_engine, tiny_pipe):
    from atomdiff.pipelines.loaded_concepts import list_atoms

    engine = make_engine()
    requests = [ask(f"sks mug <atoms:{name}>", 2) for name in ("ant", "bee", "cat")]
    [job.future.result(60) for job in engine.submit(requests)]
    loaded, rows = list_atoms(tiny_pipe), len(tiny_pipe.tokenizer)
    for _ in range(5):
        [job.future.result(60) for job in engine.submit(requests)]
    assert (list_atoms(tiny_pipe), len(tiny_pipe.tokenizer)) == (loaded, rows)
    wait_for(lambda: not engine._queue._jobs)  # an image is given away before its job is forgotten
    assert not any(layer.mixed_batch for layer in tiny_pipe.unet.modules() if hasattr(layer, "mixed_batch"))
    assert torch.get_num_threads() == 1


def test_lora_files_take_calls_of_their_own(make_engine, alone, library, tiny_pipe, calls):
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    tiny_pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        library, unet_lora_layers=get_peft_model_state_dict(tiny_pipe.unet), weight_name="style.safetensors"
    )
    tiny_pipe.unet.delete_adapters("default")
    requests = [
        ask("a cat <lora:style>", 3),
        ask("sks mug <atoms:ant>", 3),
        ask("a cat <lora:style:0.5>", 4),
        ask("a cat", 4),
        ask("sks mug <atoms:bee>", 2),
    ]
    expected = [alone(request) for request in requests]
    calls.gate.clear()
    engine = make_engine()
    jobs = engine.submit(requests)
    (library / "style.safetensors").unlink()  # it is kept for those that came before
    calls.gate.set()
    assert max(difference(job.future.result(60), each) for job, each in zip(jobs, expected, strict=True)) < TOLERANCE
    assert difference(expected[0], expected[3]) > 100 * TOLERANCE
    assert {1, 3} <= set(calls)
