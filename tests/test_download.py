"""scripts/download_weights.py against a server in this process: cut connections, checksums, what is there already."""

import argparse
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import main_mar
from models.tokenizers.ldm import PLACES
from models.tokenizers.vq import VQ_CONFIGS
from scripts import download_weights
from tests.test_cli import dry, refused
from tests.test_sample import SMALL, train_tiny
from util.checkpoint import FILE_NAME, load_checkpoint, save_checkpoint

BASE = "mar/mar_base/checkpoint-last.pth"
DATA = np.random.default_rng(0).bytes(300_000)


class Server:
    """Serves `files` ({path: bytes}); `cuts` are the numbers of bytes after which its next answers break off."""

    def __init__(self):
        self.files, self.cuts, self.ranges, self.requests, self.kind = {f"/{BASE}": DATA}, [], True, [], "binary/x"
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers.get("Range")
                server.requests.append((self.path, wanted))
                content = server.files.get(self.path)
                if content is None:
                    return self.send_error(404)
                start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Type", server.kind)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                self.wfile.write(content[start:][: server.cuts.pop(0) if server.cuts else None])

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def get(server, tmp_path):
    """A function that runs the program for mar_base into tmp_path/out."""
    return lambda *flags: download_weights.main(arguments(server, tmp_path, *flags))


def arguments(server, tmp_path, *flags):
    return ["mar_base", "--base_url", server.url, "--out", str(tmp_path / "out"), *flags]


def names(tmp_path):
    return sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file())


def test_a_file_is_fetched_once_and_its_checksum_kept(server, get, tmp_path, capsys):
    assert get() == 0
    file, note = tmp_path / "out" / BASE, tmp_path / "out" / f"{BASE}.sha256"
    digest = hashlib.sha256(DATA).hexdigest()
    assert file.read_bytes() == DATA and note.read_text() == f"{digest}  {FILE_NAME}\n"
    assert names(tmp_path) == [FILE_NAME, f"{FILE_NAME}.sha256"]
    assert "not known before" in capsys.readouterr().out
    before = file.stat().st_mtime_ns
    assert get() == 0 and get("--sha256", f"mar_base={digest.upper()}") == 0
    assert len(server.requests) == 1 and file.stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("already there") == 2


@pytest.mark.parametrize("cuts", [[100_000], [1, 0, 250_000], [299_999]])
def test_a_cut_connection_continues_where_it_was(server, get, tmp_path, cuts):
    server.cuts = list(cuts)
    assert get() == 0
    assert (tmp_path / "out" / BASE).read_bytes() == DATA
    starts = [int(r.removeprefix("bytes=").removesuffix("-")) if r else 0 for _, r in server.requests]
    assert starts == np.cumsum([0, *cuts]).tolist()


def test_a_server_that_keeps_cutting_is_given_up_and_continued_later(server, get, tmp_path, capsys):
    server.cuts = [10_000] * download_weights.ATTEMPTS
    line = refused(download_weights.main, arguments(server, tmp_path), Quiet(capsys))
    assert "cut" in line and "50000 bytes are kept" in line
    assert names(tmp_path) == [f"{FILE_NAME}.part"]
    server.requests.clear()
    assert get() == 0
    assert server.requests == [(f"/{BASE}", "bytes=50000-")] and (tmp_path / "out" / BASE).read_bytes() == DATA


class Quiet:
    """capsys without the progress bar's lines, which also go to stderr."""

    def __init__(self, capsys):
        self.capsys = capsys

    def readouterr(self):
        out, err = self.capsys.readouterr()
        lines = [part for line in err.split("\n") for part in line.split("\r")]
        return argparse.Namespace(out=out, err="\n".join(line for line in lines if not line.startswith("mar_base: ")))


def test_a_server_without_ranges_sends_all_of_it_again(server, get, tmp_path):
    server.ranges, server.cuts = False, [100_000]
    assert get() == 0
    assert (tmp_path / "out" / BASE).read_bytes() == DATA


@pytest.mark.parametrize("rest", [b"", b"more than there is"])
def test_a_partial_file_that_is_whole_or_of_another_file(server, get, tmp_path, rest):
    """Stopped between the last byte and the renaming; left over from a larger file."""
    partial = tmp_path / "out" / f"{BASE}.part"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(DATA + rest)
    assert get() == 0
    assert (tmp_path / "out" / BASE).read_bytes() == DATA and not partial.exists()


def test_another_checksum_than_given_leaves_nothing(server, get, tmp_path, capsys):
    given = "0" * 64
    line = refused(download_weights.main, arguments(server, tmp_path, "--sha256", f"mar_base={given}"), Quiet(capsys))
    assert given in line and hashlib.sha256(DATA).hexdigest() in line
    assert names(tmp_path) == []


def test_a_file_that_changed_on_disk_or_on_the_server_is_refused(server, get, tmp_path, capsys):
    assert get() == 0
    file = tmp_path / "out" / BASE
    file.write_bytes(DATA[:-1])
    assert str(file) in refused(download_weights.main, arguments(server, tmp_path), capsys)
    assert file.read_bytes() == DATA[:-1] and len(server.requests) == 1  # not ours to delete
    file.unlink()
    server.files[f"/{BASE}"] = DATA[::-1]
    assert "expected" in refused(download_weights.main, arguments(server, tmp_path), Quiet(capsys))
    assert names(tmp_path) == [f"{FILE_NAME}.sha256"]


def test_what_a_server_may_say_instead(server, tmp_path, capsys, monkeypatch):
    server.files = {}
    line = refused(download_weights.main, arguments(server, tmp_path), capsys)
    assert "404" in line and server.url in line and len(server.requests) == 1  # asking again would not help
    server.files, server.kind = {f"/{BASE}": b"<html>gone"}, "text/html; charset=utf-8"
    assert "web page" in refused(download_weights.main, arguments(server, tmp_path), capsys)
    assert names(tmp_path) == []
    closed = ["mar_base", "--base_url", "http://127.0.0.1:9", "--out", str(tmp_path / "out")]
    assert "refused" in refused(download_weights.main, closed, capsys)


def test_a_damaged_note_is_refused(server, get, tmp_path, capsys):
    note = tmp_path / "out" / f"{BASE}.sha256"
    note.parent.mkdir(parents=True)
    note.write_text("what?")
    assert str(note) in refused(download_weights.main, arguments(server, tmp_path), capsys)


def test_a_dry_run_lists_all_four_where_mars_commands_look_for_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert download_weights.main(["--dry_run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    files = {name: place["file"] for name, place in shown.items()}
    assert files == {
        **{f"mar_{size}": f"pretrained_models/mar/mar_{size}/{FILE_NAME}" for size in ("base", "large", "huge")},
        "kl16": "pretrained_models/vae/kl16.ckpt",
    }
    assert all(p["url"].startswith("https://") and p["url"].endswith("dl=1") for p in shown.values())
    assert len({p["url"] for p in shown.values()}) == 4 and not list(tmp_path.iterdir())


def test_llamagens_files_have_names_and_go_where_its_commands_look_for_them(tmp_path, monkeypatch, capsys):
    """The tokenizers under the names of their rows; none is fetched unless it is asked for."""
    monkeypatch.chdir(tmp_path)
    names = list(download_weights.LLAMAGEN_FILES)
    assert set(VQ_CONFIGS) <= set(names) and {"llamagen_ar_b", "llamagen_ar_l", "llamagen_ar_xl_384"} <= set(names)
    assert download_weights.main([*names, "--dry_run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["llamagen_vq16"]["file"] == "pretrained_models/vq_ds16_c2i.pt"
    assert all(place["url"].endswith(f"/{place['file'].split('/')[-1]}") for place in shown.values())
    assert len({place["url"] for place in shown.values()}) == len(names)


def test_vars_files_have_the_names_of_its_rows_and_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = list(download_weights.VAR_FILES)
    assert names == ["var_vq", "var_d16", "var_d20", "var_d24", "var_d30", "var_d36_s"]
    assert download_weights.main([*names, "--dry_run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["var_vq"]["file"] == "pretrained_models/vae_ch160v4096z32.pth"
    assert shown["var_d36_s"]["url"].endswith("/FoundationVision/var/resolve/main/var_d36.pth")


@pytest.mark.parametrize("name", PLACES)
def test_a_published_tokenizer_is_looked_for_where_it_is_downloaded_to(capsys, name):
    download_weights.main([name.removesuffix("_512").removesuffix("_1024"), "--dry_run"])
    [shown] = json.loads(capsys.readouterr().out).values()
    kind = "var_d16" if "var" in name else "mar_base" if name == "kl16" else "maskgil_b"
    assert dry(capsys, "--tokenizer", name, "--model", kind, "--data_path", "X")["vae_path"] == shown["file"]


def test_what_was_fetched_is_evaluated_with_mars_command(server, get, tmp_path, capsys):
    """A file in the published layout, from the server into --resume, as main_mar --evaluate takes it."""
    ours = load_checkpoint(train_tiny(tmp_path / "ours", "--batch_size", 600))
    published = {k: ours[k] for k in ("model", "model_ema", "optimizer", "epoch", "scaler")}
    place = save_checkpoint(tmp_path / "published", {**published, "args": argparse.Namespace(model="mar_base")})
    server.files[f"/{BASE}"] = place.read_bytes()
    assert get() == 0
    folder = tmp_path / "out" / "mar" / "mar_base"
    flags = ["--output_dir", str(folder), "--resume", str(folder), "--evaluate", "--num_images", "8"]
    capsys.readouterr()
    assert main_mar.main([*SMALL, *flags, "--num_sampling_steps", "2", "--metrics", "none", "--dtype", "fp32"]) == 0
    assert "generation of 8 images (1 of each of 8 classes, EMA weights, fp32)" in capsys.readouterr().out
    assert len(list(folder.glob("evaluation/*/*.png"))) == 8


@pytest.mark.parametrize("name, tokenizer", [("maskgil_b", "llamagen_vq16"), ("maskgil_t2i_xl", "llamagen_vq16_t2i")])
def test_maskgils_weights_are_not_published_and_its_tokenizers_are(name, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refused(download_weights.main, [name], capsys)
    assert line == f"error: {name}: no weights of MaskGIL are published; those of its tokenizer are {tokenizer}"
    assert tokenizer in download_weights.FILES and not list(tmp_path.iterdir())
