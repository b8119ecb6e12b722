"""Watch images being decided in a browser, and change their course: one page, no network (docs/inspector.md).

python scripts/inspector.py --checkpoint DIR [DIR ...] [--port 8000]
python scripts/inspector.py --checkpoint FILE --model var_d16 --vae_path FILE    a published file, as for sample.py
python scripts/inspector.py --trace OUT/<setting>/trace.npz [--export page.html]

--trace shows a trace of sample.py --save_trace; with --export it is written as one page that needs nothing else. The
server listens on this machine only; with another --host its address carries a token, without which nothing is answered.
"""

import secrets
import signal
import socket
import sys
from dataclasses import asdict, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from heads.policy import load_heads
from models.loading import LoadArgs
from sampling.inspector.server import LOOPBACK, Inspector
from sampling.inspector.spec import Loaded, base_settings
from sampling.inspector.view import described, events_of_trace, json_events, page_of
from sampling.inspector.work import share_cores
from sampling.prompts import open_encoder
from sampling.run import Parts
from sampling.settings import SampleConfig
from sampling.trace import load_trace
from util import dist
from util.args import check_output_file, make_parser, pick
from util.checkpoint import atomic_file, checkpoint_path, load_checkpoint
from util.door import run_main
from util.images.folders import check_output_folder

MADE_BY = b'<meta name="generator" content="Enhanced MAR, scripts/inspector.py">'  # in page/index.html
WILDCARDS = ("", "0.0.0.0", "::")  # hosts that stand for all addresses of this machine


def load(place: str, name: str, device, dtype, weights: LoadArgs | None = None, text_encoder=None) -> Loaded:
    """A checkpoint, under this name; text_encoder: a folder, None for the encoder that a model of text names itself."""
    weights, content = weights or LoadArgs(), load_checkpoint(place)
    model, tokenizer, config = weights.load(content, place)
    heads = load_heads(content, ema=not weights.no_ema)
    of_text, encoder = config.get("text") is not None, None
    if of_text:
        encoder = open_encoder(text_encoder, config)
    elif getattr(model.config, "reads_text", False):
        raise ValueError(f"--checkpoint {place} is of text and does not say which encoder it was trained with")
    for part in filter(None, (model, tokenizer, heads)):
        part.to(device)
    parts = Parts(model, tokenizer, device, dtype, heads, str(checkpoint_path(place).resolve()))
    flags = given_flags(weights) + (("--text_encoder", text_encoder) if of_text and text_encoder else ())
    classes = [] if of_text else config["data"]["classes"]
    return Loaded(name, place, parts, classes, base_settings(config), encoder, flags)


def given_flags(weights: LoadArgs) -> tuple[str, ...]:
    """The words of sample.py's command line that say the same."""
    words = [("--no_ema",)] if weights.no_ema else []
    words += [(f"--{k}", str(v)) for k, v in asdict(weights).items() if k != "no_ema" and v is not None]
    return sum(words, ())


def names_of(places: list[str]) -> list[str]:
    """A name for each checkpoint: that of its folder, with a number where two have the same."""
    names = []
    for place in places:
        name = own = Path(place).resolve().name
        number = 1
        while name in names:
            number += 1
            name = f"{own} {number}"
        names.append(name)
    return names


def setting_choices() -> list[dict]:
    """Name, help and choices of each setting that the page offers, switches apart."""
    known = [field for field in fields(SampleConfig) if field.metadata and field.type not in (bool, "bool")]
    choices = [field.metadata["choices"] and list(field.metadata["choices"]) for field in known]
    return [{"name": f.name, "help": f.metadata["help"], "choices": c} for f, c in zip(known, choices)]


def is_exported(path: Path) -> bool:
    """Is it a page that was exported, and may be replaced by another one?"""
    with open(path, "rb") as file:
        return MADE_BY in file.read(1000)


def export(trace: Path, place: Path) -> None:
    """Write the page of a trace."""
    check_output_folder("export", place.absolute().parent)
    check_output_file("export", place, is_exported, inputs=[trace])
    text = page_of(events_of_trace(load_trace(trace)))
    with atomic_file(place) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(place)


def interrupt(number, frame):
    """What a signal does that is to end as Ctrl-C does, so that a measurement ends too."""
    raise KeyboardInterrupt


def serve(args, gallery: dict[str, Loaded]) -> None:
    """Answer until Ctrl-C or SIGTERM."""
    content = {"checkpoints": [described(loaded) for loaded in gallery.values()], "settings": setting_choices()}
    if args.trace is not None:
        content["events"] = json_events(events_of_trace(load_trace(args.trace)))
    token = None if args.host in LOOPBACK else secrets.token_urlsafe(16)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        server = Inspector(args.host, args.port, gallery, content, token)
    except OSError as error:
        raise ValueError(f"--host {args.host} --port {args.port} cannot be listened on: {error.strerror}") from None
    try:
        host = socket.gethostname() if args.host in WILDCARDS else args.host
        host = f"[{host}]" if ":" in host else host
        print(f"http://{host}:{server.server_address[1]}/{f'?token={token}' if token else ''}", flush=True)
        server.serve_forever(poll_interval=0.1)
    finally:
        server.server_close()


def main(argv=None) -> int:
    """Read, serve or export; returns the exit code."""
    parser = make_parser("inspector.py", __doc__.splitlines()[0], LoadArgs)
    parser.add_argument("--checkpoint", nargs="+", action="extend", default=[], help="folders or files of checkpoints")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    parser.add_argument("--trace", type=Path, default=None, help="trace.npz of sample.py --save_trace to show")
    parser.add_argument("--text_encoder", default=None, help="folder of the T5 encoder of a model of text")
    parser.add_argument("--export", type=Path, default=None, help="write the page of --trace to this file and stop")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps, cpu")
    text = "arithmetic (default: bf16 where CUDA has it)"
    parser.add_argument("--dtype", choices=list(dist.FLOATS), default=None, help=text)
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port must be a whole number from 0 to {2**16 - 1}, got {args.port}")
    if args.export is not None and args.trace is None:
        raise ValueError("--export needs --trace; images of a checkpoint are exported in the page")
    if args.export is not None and args.checkpoint:
        raise ValueError(f"--export writes the page of --trace, without --checkpoint {args.checkpoint[0]}")
    if args.export is not None:
        export(args.trace, args.export)
        return 0
    if not args.checkpoint and args.trace is None:
        raise ValueError("--checkpoint or --trace is needed: there is nothing to show")
    device = dist.pick_device(args.device)
    dtype = dist.pick_dtype(args.dtype, device)
    share_cores()
    names, options = names_of(args.checkpoint), (pick(LoadArgs, vars(args)), args.text_encoder)
    gallery = {name: load(place, name, device, dtype, *options) for name, place in zip(names, args.checkpoint)}
    if args.text_encoder is not None and not any(loaded.encoder for loaded in gallery.values()):
        raise ValueError(f"--text_encoder {args.text_encoder} has no meaning: no --checkpoint is of text")
    serve(args, gallery)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
