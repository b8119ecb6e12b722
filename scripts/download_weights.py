"""Fetch published weights: MAR's and its KL-16 autoencoder (default: these four), LlamaGen's and VAR's.

    python scripts/download_weights.py mar_base kl16
    python scripts/download_weights.py llamagen_vq16 llamagen_ar_b

They go to the places below pretrained_models/ that MAR's, LlamaGen's and VAR's commands name. An interrupted download
continues. The SHA-256 of a file is compared with --sha256 NAME=HEX, else with the <file>.sha256 that the first download
wrote; an existing file that has it is not fetched again.
"""

import hashlib
import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from util.args import OneLineParser
from util.checkpoint import atomic_file
from util.door import run_main
from util.images.folders import check_output_folder

_DROPBOX = "https://www.dropbox.com/scl/fi"
_LLAMAGEN = "https://huggingface.co/FoundationVision/LlamaGen/resolve/main"
_VAR = "https://huggingface.co/FoundationVision/var/resolve/main"
# name: (file below pretrained_models/, address in the README of github.com/LTH14/mar). All addresses were written down
# without network access and are not tested; the checksums of the files are not known.
MARS_FILES = {
    "mar_base": (
        "mar/mar_base/checkpoint-last.pth",
        f"{_DROPBOX}/f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb&dl=1",
    ),
    "mar_large": (
        "mar/mar_large/checkpoint-last.pth",
        f"{_DROPBOX}/pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt&dl=1",
    ),
    "mar_huge": (
        "mar/mar_huge/checkpoint-last.pth",
        f"{_DROPBOX}/1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o&dl=1",
    ),
    "kl16": (
        "vae/kl16.ckpt",
        f"{_DROPBOX}/hhmuvaiacrarfg28qxhwz/kl16.ckpt?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=1",
    ),
}
# name: file in the repository of github.com/FoundationVision/LlamaGen, which is also its place below pretrained_models/
LLAMAGEN_FILES = {
    "llamagen_vq16": "vq_ds16_c2i.pt",
    "llamagen_vq8": "vq_ds8_c2i.pt",
    "llamagen_vq16_t2i": "vq_ds16_t2i.pt",
    "llamagen_ar_b": "c2i_B_256.pt",
    "llamagen_ar_l": "c2i_L_256.pt",
    "llamagen_ar_b_384": "c2i_B_384.pt",
    "llamagen_ar_l_384": "c2i_L_384.pt",
    "llamagen_ar_xl_384": "c2i_XL_384.pt",
    "llamagen_ar_xxl_384": "c2i_XXL_384.pt",
    "llamagen_ar_t2i_xl_256": "t2i_XL_stage1_256.pt",
    "llamagen_ar_t2i_xl_512": "t2i_XL_stage2_512.pt",
}
# name: file in the repository FoundationVision/var of huggingface.co, which is also its place below pretrained_models/
VAR_FILES = {
    "var_vq": "vae_ch160v4096z32.pth",
    "var_d16": "var_d16.pth",
    "var_d20": "var_d20.pth",
    "var_d24": "var_d24.pth",
    "var_d30": "var_d30.pth",
    "var_d36_s": "var_d36.pth",
}
FILES = {**MARS_FILES, **{name: (file, f"{_LLAMAGEN}/{file}") for name, file in LLAMAGEN_FILES.items()}}
FILES |= {name: (file, f"{_VAR}/{file}") for name, file in VAR_FILES.items()}
ATTEMPTS = 5  # requests in a row, each for the bytes that the last one left out
TIMEOUT = 30  # seconds without a byte


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def beside(path: Path, ending: str) -> Path:
    """The path with the ending added to its name."""
    return path.with_name(path.name + ending)


def recorded_sha256(path: Path) -> str | None:
    """The checksum in <path>.sha256; None without such a file, ValueError if it holds something else."""
    note = beside(path, ".sha256")
    if not note.is_file():
        return None
    digest = re.match(r"[0-9a-f]{64}\b", note.read_text())
    if digest is None:
        raise ValueError(f"{note} holds no SHA-256: remove it, or give --sha256")
    return digest[0]


def fetch(name: str, url: str, partial: Path) -> None:
    """Continue the file `partial` until it is whole; ValueError if the server lacks it or ATTEMPTS requests fail."""
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            if _fetch_rest(name, url, partial):
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise ValueError(f"{name}: {url} gives HTTP {error.code} {error.reason}") from None
            reason = f"HTTP {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = " ".join(str(error).split())
    size = partial.stat().st_size if partial.is_file() else 0
    raise ValueError(f"{name}: {url} failed ({reason}); {size} bytes are kept, the same command continues")


def _fetch_rest(name: str, url: str, partial: Path) -> bool:
    """One request for the missing end of the file; is it whole now?"""
    start = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:  # 416: the server's file ends before `start`, or at it
            raise
        if error.headers.get("Content-Range") == f"bytes */{start}":
            return True
        partial.unlink()  # longer than the server's file, so it is of another one
        return False
    with response:
        if response.headers.get_content_type() == "text/html":
            raise ValueError(f"{name}: {url} gives a web page, not a file; is the address still right?")
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ValueError(f"{name}: {url} sends another part of the file than it was asked for")
        if response.status != 206:  # a server without ranges sends the whole file
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        bar = dict(total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024, desc=name)
        with open(partial, "ab" if start else "wb") as file, tqdm(**bar) as progress:
            while block := response.read(2**20):
                file.write(block)
                progress.update(len(block))
    return total is None or partial.stat().st_size == total


def download(name: str, url: str, path: Path, expected: str | None) -> str:
    """Fetch the file unless path exists, check and record its SHA-256; returns a line about it. Raises ValueError."""
    expected = expected or recorded_sha256(path)
    if path.is_file():
        digest, action = sha256_of(path), "already there"
        if expected not in (None, digest):
            refusal = f"{path} is another file: remove it to fetch it again"
            raise ValueError(f"{name}: SHA-256 {digest}, expected {expected}; {refusal}")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = beside(path, ".part")
        fetch(name, url, partial)
        digest, action = sha256_of(partial), "fetched"
        if expected not in (None, digest):
            partial.unlink()
            refusal = f"{url} gave another file, it was removed: try to fetch it again"
            raise ValueError(f"{name}: SHA-256 {digest}, expected {expected}; {refusal}")
        os.replace(partial, path)
    with atomic_file(beside(path, ".sha256")) as temporary:
        temporary.write_text(f"{digest}  {path.name}\n")
    known = "as expected" if expected else "not known before, recorded"
    return f"{path}: {action}, SHA-256 {digest} ({known})"


def parse_sha256(texts: list[str]) -> dict[str, str]:
    """{name: checksum} from NAME=HEX; anything else raises ValueError."""
    checksums = {}
    for text in texts:
        name, _, digest = text.partition("=")
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            raise ValueError(f"--sha256 {text!r} must be NAME=HEX with 64 digits")
        if name not in FILES:
            raise ValueError(f"--sha256 NAME=HEX: unknown name {name!r}; valid: {', '.join(FILES)}")
        checksums[name] = digest.lower()
    return checksums


def main(argv=None) -> int:
    """Parse, fetch, check; returns the exit code."""
    parser = OneLineParser(prog="download_weights.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FILES)} (default: MAR's four)")
    parser.add_argument("--out", default="pretrained_models", help="folder to put them below (default: %(default)s)")
    parser.add_argument("--base_url", help="a mirror with the files at the same paths as below --out")
    parser.add_argument("--sha256", action="append", default=[], metavar="NAME=HEX", help="checksum a file must have")
    parser.add_argument("--dry_run", action="store_true", help="print what would be fetched and stop")
    args = parser.parse_args(argv)
    for name in args.names:
        if name.startswith("maskgil"):
            tokenizer = "llamagen_vq16_t2i" if "t2i" in name else "llamagen_vq16"
            raise ValueError(f"{name}: no weights of MaskGIL are published; those of its tokenizer are {tokenizer}")
        if name not in FILES:
            raise ValueError(f"unknown weights {name!r}; valid: {', '.join(FILES)}")
    expected = parse_sha256(args.sha256)
    base = args.base_url.rstrip("/") if args.base_url else None
    if base and not re.match(r"https?://\w", base):
        raise ValueError(f"--base_url {base!r} must start with http:// or https://")
    wanted = {}
    for name in dict.fromkeys(args.names or MARS_FILES):
        place, url = FILES[name]
        wanted[name] = (f"{base}/{place}" if base else url, Path(args.out) / place)
    check_output_folder("out", args.out)
    if args.dry_run:
        print(json.dumps({name: {"url": url, "file": str(path)} for name, (url, path) in wanted.items()}, indent=2))
        return 0
    for name, (url, path) in wanted.items():
        print(download(name, url, path, expected.get(name)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
