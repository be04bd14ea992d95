"""ComfyUI's own server, started for a test, and the prompts that it takes."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from tests.comfyui.pack import PACK

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


class Server:
    def __init__(self, address, process):
        self.address, self.process = address, process

    def get(self, path):
        with urllib.request.urlopen(f"{self.address}/{path}", timeout=30) as answer:
            return answer.read()

    def nodes(self):
        """What the nodes take and give, by name."""
        return json.loads(self.get("object_info"))

    def post(self, prompt):
        """Post a prompt; return the status and the answer."""
        data = json.dumps({"prompt": prompt}).encode()
        request = urllib.request.Request(f"{self.address}/prompt", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def run(self, prompt, seconds=300):
        """Run a prompt to its end; return its entry in the history."""
        status, answer = self.post(prompt)
        assert status == 200, answer
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            history = json.loads(self.get(f"history/{answer['prompt_id']}"))
            if history:
                return history[answer["prompt_id"]]
            time.sleep(0.2)
        raise TimeoutError(f"no answer within {seconds} seconds")

    def image(self, entry):
        """The only image of a prompt that was run."""
        assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
        ((output,),) = [output["images"] for output in entry["outputs"].values() if "images" in output]
        return Image.open(io.BytesIO(self.get(f"view?{urllib.parse.urlencode(output)}"))).convert("RGB")


@contextmanager
def start(folder):
    """Run ComfyUI on the CPU, with the pack, on models in a folder; its output goes to `log` there."""
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "atoms").symlink_to(PACK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(os.environ["COMFYUI_PATH"]) / "main.py"
    command = [sys.executable, program, "--cpu", "--port", str(port), "--base-directory", folder]
    command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch"]
    if find_spec("comfyui_frontend_package") is None:  # ComfyUI wants a page, and the tests of prompts do not
        (folder / "index.html").write_text("")
        command += ["--front-end-root", folder]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        server = Server(f"http://127.0.0.1:{port}", process)
        try:
            _wait(server, folder / "log")
            yield server
        finally:
            process.terminate()


def _wait(server, log, seconds=180):
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.process.poll() is None:
        try:
            server.get("system_stats")
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"ComfyUI did not start:\n{log.read_text()[-5000:]}")


def to_prompt(workflow, nodes):
    """Turn a workflow, as ComfyUI's page saves it, into a prompt, as the page sends it; bypassed nodes are not known.

    Args:
        workflow: the workflow.
        nodes: those of the server, from `Server.nodes`.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        values = iter(node["widgets_values"])
        inputs = {}
        for kind in ("required", "optional"):
            for name, (takes, *options) in nodes[node["type"]]["input"].get(kind, {}).items():
                if isinstance(takes, list) or takes in WIDGETS:
                    inputs[name] = next(values)
                    if options and options[0].get("control_after_generate"):
                        next(values)
        assert not list(values), node
        inputs |= {each["name"]: links[each["link"]] for each in node["inputs"] if each.get("link") is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def bypass(prompt, number):
    """Leave a node out, as the page does where one is bypassed: what goes in by a type comes out by it."""
    inputs = prompt[number]["inputs"]
    instead = {0: inputs["model"], 1: inputs["clip"]}
    rest = {key: {**node, "inputs": dict(node["inputs"])} for key, node in prompt.items() if key != number}
    for node in rest.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == number:
                node["inputs"][name] = instead[value[1]]
    return rest
