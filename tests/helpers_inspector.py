"""What the tests of the inspector share: tiny models of all families, a server in a thread, and its client."""

import base64
import http.client
import io
import json
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from heads.policy import PolicyHeads
from models.tokenizers import build_tokenizer
from models.tokenizers.multiscale import MultiScaleTokenizer
from models.tokenizers.multiscale_vq import MultiScaleVQ, MultiScaleVQConfig
from models.var import VAR, VARConfig
from sampling.inspector.recording import record
from sampling.inspector.server import Inspector
from sampling.inspector.spec import Loaded, read_spec
from sampling.inspector.view import described
from sampling.settings import SampleConfig
from scripts.inspector import setting_choices
from tests.helpers import named_weights, on_cpu, tiny_mar
from tests.helpers_causal import tiny_ar, tiny_gpt
from tests.helpers_ids import GreyIds, tiny_ids
from tests.helpers_maskgil import tiny_maskgil
from tests.helpers_text import NUM_TOKENS, WIDTH, tiny_t2i
from tests.helpers_var import fill_by_name

FAMILIES = ("mar", "ids", "mar_ar", "causal_gpt", "var", "maskgil", "wide")
QUICK = (*FAMILIES[:3], pytest.param("causal_gpt", marks=pytest.mark.slow), "var", "maskgil", "wide")
FREE = ("mar", "ids", "maskgil", "wide")  # those whose groups are free
SCALES = (1, 2, 4)
BASE = SampleConfig(num_sampling_steps=3)


def tiny_var() -> tuple[VAR, MultiScaleTokenizer]:
    """A VAR of three scales and its tokenizer of 8×8 pixels, with random weights."""
    sizes = dict(vocab_size=16, z_channels=4, ch=8, in_channels=1, ch_mult=(1, 1), norm_groups=8, v_patch_nums=SCALES)
    tokenizer = MultiScaleTokenizer("var_vq", fill_by_name(MultiScaleVQ(MultiScaleVQConfig(**sizes))))
    sizes = dict(patch_nums=SCALES, vocab_size=16, z_channels=4, embed_dim=16, depth=1, num_heads=2, class_num=4)
    config = VARConfig(**sizes, img_size=8, vae_stride=2)
    return fill_by_name(VAR(config)).eval(), tokenizer


class Letters:
    """A text encoder whose features of a word are its letters."""

    num_tokens, width = NUM_TOKENS, WIDTH

    def encode(self, captions, quiet=False) -> list[np.ndarray]:
        """Features (n, C) float16 of each caption."""
        words = [caption.split()[: self.num_tokens] for caption in captions]
        return [np.array([[ord(letter) % 7 for letter in f"{w:8.8}"] for w in row], np.float16) for row in words]


def tiny_gallery() -> dict[str, Loaded]:
    """A model of each family, by name; "wide": a MaskGIL whose images are 8×16; "text": a model of text."""
    mar = tiny_mar()
    heads = named_weights(PolicyHeads(mar.width), scale=0.5).eval()
    maskgil = tiny_maskgil()
    confident = named_weights(PolicyHeads(maskgil.width), scale=0.5).eval()
    parts = {
        "mar": on_cpu(mar, build_tokenizer("pixel", channels=1), heads),
        "ids": on_cpu(tiny_ids(), GreyIds()),
        "mar_ar": on_cpu(tiny_ar(), GreyIds()),
        "causal_gpt": on_cpu(tiny_gpt(img_size=8, vae_stride=2), GreyIds()),
        "var": on_cpu(*tiny_var()),
        "maskgil": on_cpu(maskgil, GreyIds(), confident),
        "wide": on_cpu(tiny_maskgil(img_size="8x16"), GreyIds()),
    }
    classes = {name: [f"class {i}" for i in range(each.model.config.class_num)] for name, each in parts.items()}
    gallery = {name: Loaded(name, f"runs/{name}", each, classes[name], BASE) for name, each in parts.items()}
    of_text = on_cpu(tiny_t2i(), GreyIds())
    of_text.model.prompts = None
    return gallery | {"text": Loaded("text", "runs/text", of_text, [], BASE, Letters())}


@contextmanager
def serving(gallery, events=None, **options):
    """An `Inspector` that answers, at any port; events: those of a stored run that its page shows first."""
    content = {"checkpoints": [described(loaded) for loaded in gallery.values()], "settings": setting_choices()}
    content |= {"events": events} if events else {}
    server = Inspector("127.0.0.1", 0, gallery, content, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Client:
    """What a page is to a server."""

    def __init__(self, server):
        self.port = server.server_address[1]

    def send(self, method: str, path: str, body: bytes | None = None, **headers):
        """(status, content)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content

    def ask(self, name: str, request, **headers) -> tuple[int, bytes]:
        """The answer to a question."""
        headers = {"Content-Type": "application/json"} | headers
        return self.send("POST", f"/api/{name}", json.dumps(request).encode(), **headers)

    def events(self, name: str, request) -> list[dict]:
        """The events of a question that is answered."""
        status, content = self.ask(name, request)
        assert status == 200, content
        return [json.loads(line) for line in content.splitlines()]

    def run(self, **request) -> list[dict]:
        """The events of a run."""
        return self.events("run", request)

    def error(self, name: str, request) -> str:
        """The one line of a question that is refused, at once or while it is worked on."""
        status, content = self.ask(name, request)
        line = json.loads(content.splitlines()[-1])["error"]
        assert "\n" not in line and len(line) < 400 and status in (200, 400, 413, 503)
        return line


def steps_of(events: list[dict]) -> list[dict]:
    """The events that are steps."""
    return [event for event in events if "step" in event]


def end_of(events: list[dict]) -> dict:
    """What a run's last event says."""
    assert "end" in events[-1], events[-1]
    return events[-1]["end"]


def request(family="mar", **more) -> dict:
    """Two small images of a family's model."""
    settings = {"cfg": "2", **({"num_iter": "4"} if family in FREE else {}), **more.pop("settings", {})}
    return {"checkpoint": family, "settings": settings, "labels": [1, 2], "seed": 5, **more}


def made(gallery, family="mar", **more):
    """(Spec, Recording) of a request."""
    spec = read_spec(request(family, **more), gallery)
    return spec, record(spec, lambda event: None)


def picture(shape=(8, 8), value=200) -> str:
    """A grey picture as a request has it."""
    file = io.BytesIO()
    Image.new("L", shape, value).save(file, format="png")
    return base64.b64encode(file.getvalue()).decode()
