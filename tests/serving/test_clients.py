"""Requests as common clients send them: all of their fields, with what they leave at its default or at null."""

import base64
import io
import json

import pytest
from PIL import Image

from atomdiff.serving.webui_api import TextToImage, _scheduler
from atomdiff.utils.errors import UserError

GENERATE = "/v1/images/generations"
TXT2IMG = "/sdapi/v1/txt2img"
WEBUI = {  # what a client of the WebUI sends besides its own choices
    "enable_hr": False,
    "denoising_strength": 0,
    "firstphase_width": 0,
    "firstphase_height": 0,
    "hr_scale": 2,
    "hr_upscaler": None,
    "hr_second_pass_steps": 0,
    "styles": ["None"],
    "subseed": -1,
    "subseed_strength": 0,
    "seed_resize_from_h": 0,
    "seed_resize_from_w": 512,
    "restore_faces": False,
    "tiling": False,
    "do_not_save_samples": False,
    "do_not_save_grid": False,
    "eta": None,
    "s_churn": 0,
    "s_tmax": None,
    "s_noise": 1,
    "override_settings": {"sd_model_checkpoint": "tiny-sd", "CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
    "override_settings_restore_afterwards": True,
    "refiner_checkpoint": None,
    "script_name": None,
    "script_args": [],
    "send_images": True,
    "save_images": False,
    "alwayson_scripts": {},
    "infotext": None,
    "negative_prompt": None,
    "seed": -1,
    "steps": 2,
    "width": 32,
    "height": 32,
}


@pytest.fixture
def client(serve):
    return serve()


def post(client, path, body, status=200):
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def sizes(images):
    return [Image.open(io.BytesIO(base64.b64decode(image))).size for image in images]


def test_fields_of_openai(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert client.get(f"/v1/models/{model['id']}").json() == model
    assert client.get("/v1/models/dall-e-3").status_code == 404
    body = {
        "model": "dall-e-3",
        "prompt": "a red cat <atoms:ant>",
        "n": 2,
        "size": None,
        "quality": "standard",
        "style": "vivid",
        "response_format": None,
        "output_format": "png",
        "background": "auto",
        "moderation": "low",
        "user": "me",
        "stream": False,
        "seed": -1,
        "steps": 2,
    }
    images = post(client, GENERATE, body)["data"]
    assert sizes(image["b64_json"] for image in images) == [(32, 32)] * 2
    assert images[1]["seed"] == images[0]["seed"] + 1 > 0
    assert images[0]["seed"] != post(client, GENERATE, body)["data"][0]["seed"]
    assert "stream=true: expected false" in post(client, GENERATE, body | {"stream": True}, 400)["error"]["message"]


def test_fields_of_the_webui(client):
    options = client.get("/sdapi/v1/options").json()
    assert options["sd_model_checkpoint"] == client.get("/sdapi/v1/sd-models").json()[0]["title"]
    post(client, "/sdapi/v1/options", options | {"samples_format": "png"})
    post(client, "/sdapi/v1/refresh-loras", None)
    assert client.get("/sdapi/v1/upscalers").json() == client.get("/sdapi/v1/sd-vae").json() == []
    body = WEBUI | {"prompt": "a red cat, <lora:ant:0.8> sks mug", "batch_size": 2, "n_iter": 2, "cfg_scale": 7}
    answer = post(client, TXT2IMG, body)
    info = json.loads(answer["info"])
    assert sizes(answer["images"]) == [(32, 32)] * 4
    assert info["all_seeds"] == [info["seed"] + number for number in range(4)] and info["seed"] > 0
    assert info["infotexts"][3] == (
        f"{body['prompt']}\nSteps: 2, CFG scale: 7, Size: 32x32, Model: tiny-sd, Seed: {info['seed'] + 3}"
    )
    assert post(client, TXT2IMG, body | {"send_images": False})["images"] == []


@pytest.mark.parametrize(
    ("sampler", "schedule", "expected"),
    [
        ("DPM++ 2M Karras", None, "dpm++_2m_karras"),
        ("DPM++ 2M", "Karras", "dpm++_2m_karras"),
        ("DPM++ 2M Karras", "karras", "dpm++_2m_karras"),
        ("DPM++ 2M", "Automatic", "dpm++_2m"),
        ("DPM++ 2M SDE", None, "dpm++_2m_sde"),
        ("DPM++ 2M SDE", "Karras", "dpm++_2m_sde_karras"),
        ("Euler a", "automatic", "euler_ancestral"),
        (None, "Automatic", None),
    ],
)
def test_samplers_of_the_webui(sampler, schedule, expected):
    body = TextToImage.model_validate({"sampler_name": sampler, "scheduler": schedule})
    assert _scheduler(body.sampler_name, body.scheduler) == expected


@pytest.mark.parametrize(("sampler", "schedule"), [("Euler", "Karras"), (None, "Karras"), ("DPM++ SDE", None)])
def test_unknown_samplers_of_the_webui_are_refused(sampler, schedule):
    body = TextToImage.model_validate({"sampler_name": sampler, "scheduler": schedule})
    with pytest.raises(UserError, match="expected one of DDIM, Euler"):
        _scheduler(body.sampler_name, body.scheduler)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sd_model_checkpoint": "other"}, "sd_model_checkpoint='other': this server has 'tiny-sd' only"),
        ({"CLIP_stop_at_last_layers": 2}, "CLIP_stop_at_last_layers=2: this server has 1 only"),
    ],
)
def test_settings_of_the_webui_that_would_change_the_image_are_refused(client, settings, message):
    for path, body in ((TXT2IMG, WEBUI | {"override_settings": settings}), ("/sdapi/v1/options", settings)):
        assert message in post(client, path, body, 400)["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tiling": True}, "tiling=True"),
        ({"subseed_strength": 0.4}, "subseed_strength=0.4"),
        ({"seed_resize_from_h": 512}, "seed_resize_from_w=512"),
        ({"styles": ["None", "film"]}, "styles=['film']"),
        ({"refiner_checkpoint": "xl-refiner"}, "refiner_checkpoint='xl-refiner'"),
        ({"script_name": "x/y/z plot"}, "script_name='x/y/z plot'"),
        ({"alwayson_scripts": {"controlnet": {}}}, "alwayson_scripts={'controlnet': {}}"),
    ],
)
def test_steps_of_the_webui_that_would_change_the_image_are_refused(client, fields, message):
    expected = f"{message}: this server has no such step; leave it out"
    assert post(client, TXT2IMG, WEBUI | fields, 400)["error"]["message"] == expected


def test_names_and_aliases_of_concepts_can_be_written_into_tags(client):
    listed = client.get("/sdapi/v1/loras").json()
    assert {each["metadata"]["modelspec.trigger_phrase"] for each in listed} == {"sks mug"}
    for name in {each[key] for each in listed for key in ("name", "alias")}:
        post(client, TXT2IMG, WEBUI | {"prompt": f"sks mug <lora:{name}:1>"})


@pytest.mark.parametrize("fields", [{"prompt": "\ud83d"}, {"override_settings": {"x": ["\ud83d"]}}])
def test_halves_of_characters_are_refused(client, fields):
    answer = client.post(TXT2IMG, content=json.dumps(WEBUI | fields), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "found half of a character" in answer.json()["error"]["message"]
