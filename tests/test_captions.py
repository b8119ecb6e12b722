"""Files of captions and of prompts: what is a line, an entry and a text in them; encoders that cannot be."""

import json
import shutil
from pathlib import Path

import pytest

from models.text_encoder import load_text_encoder
from sampling.prompts import open_prompts
from scripts.demo_text import save_encoder
from tests.helpers_text import WORDS, tiny_encoder
from util.images.captions import captions_of_images, read_prompts

ENTRIES = [("a", "a cat on a mat"), ("a", "a dog, two"), ("b", "three \u2028 four"), ("b", 'says "hi"')]
CSV = 'image,caption\r\na,"a cat\r\non a mat"\r\n\r\na,"a dog, two"\r\n  \r\nb,three \u2028 four\r\nb,"says ""hi"""\r\n'
JSONL = """{"image": "a", "caption": "a cat\\non a mat"}
{"caption": "a dog, two", "image": "a"}

{"image": "b", "caption": "three \u2028 four"}
{"image": "b", "caption": "says \\"hi\\""}
"""


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("name, text", [("x.csv", CSV), ("x.jsonl", JSONL)])
def test_a_caption_in_a_table_is_one_text_whatever_is_in_it(name, text, mark, tmp_path):
    path = tmp_path / name
    path.write_bytes((mark + text).encode())
    cleaned = [" ".join(caption.split()) for _, caption in ENTRIES]
    assert captions_of_images(str(path), None, ["a", "b"]) == [cleaned[:2], cleaned[2:]]
    assert read_prompts("prompts", path) == cleaned
    config = dict(text=dict(num_tokens=3, width=2))
    assert open_prompts(str(path), None, config, dry=True).captions == cleaned


def test_prompts_need_a_column_caption_alone_and_other_files_have_one_a_line(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("number,caption\n1,A Cat\n2,a dog\n")
    assert read_prompts("prompts", path) == ["a cat", "a dog"]
    lines = tmp_path / "x.txt"
    lines.write_bytes("\ufeffA Cat\r\n\r\na dog\u2028of two\x0clines\n".encode())
    assert read_prompts("prompts", lines) == ["a cat", "a dog of two lines"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.csv", "image,text\na,b\n", "entry 1 needs a caption"),
        ("x.csv", "a cat\na dog\n", "entry 1 needs a caption"),
        ("x.csv", 'caption\n"a cat\n', "is no table"),
        ("x.csv", "caption\n", "has no entry"),
        ("x.csv", "", "has no entry"),
        ("x.jsonl", "a cat\n", "entry 1 needs a caption"),
        ("x.jsonl", '{"caption": "a cat"}\n{"caption": "<b>"}\n', "entry 2 needs a caption"),
        ("x.txt", "", "has no line with a text"),
    ],
)
def test_files_without_prompts_are_refused(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^--prompts {path}:? {message}"):
        read_prompts("prompts", path)


def test_tokenizers_that_do_not_fit_their_network_are_refused(tmp_path):
    """One without a token for padding, and one with more words than the network has rows."""
    few, many = (Path(tiny_encoder(tmp_path / name)) for name in ("few", "many"))
    save_encoder(tmp_path / "words", [*WORDS, "another"], 0, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1)
    shutil.copy(tmp_path / "words" / "tokenizer.json", many)
    settings = json.loads((few / "tokenizer_config.json").read_text())
    (few / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "pad_token"}))
    (few / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=f"^--text_encoder {few} has a tokenizer without a token for padding"):
        load_text_encoder(str(few), 6)
    ids = len(WORDS) + 3
    with pytest.raises(ValueError, match=f"^--text_encoder {many} has .* ids up to {ids} .* for those below {ids}: "):
        load_text_encoder(str(many), 6)
