"""Command lines from dataclasses: one flag a field, with its help, range and choices standing on the field."""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import types
import typing
from pathlib import Path


def flag(default, help, *, low=None, high=None, choices=None, type=None, metavar=None):
    """A dataclass field that is also a command-line flag; low and high are inclusive bounds of a number."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "type": type, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


LARGEST = {int: 10**8, float: 3.4e38}  # of flags without a bound of their own: what can be meant, what a tensor holds

# a path's ~, which a shell leaves alone in --flag=~/x and diffusers:~/x
HOME = r"(?:^|(?<==)|(?<=^diffusers:)|(?<==diffusers:))~(?=/|$)"


class OneLineParser(argparse.ArgumentParser):
    """argparse, with errors of one line and exit code 2 instead of a page of usage."""

    def parse_known_args(self, args=None, namespace=None):
        # argparse takes the value in `--class_labels -1,3` for a flag, and that in `--lr=--` (before 3.12) for none
        joined = []
        for word in sys.argv[1:] if args is None else args:
            word = re.sub(HOME, os.path.expanduser("~"), word)
            if re.fullmatch(r"--\w+=--", word):
                self.error(f"argument {word[:-3]}: invalid value '--'")
            if re.fullmatch(r"-\d[-\d.,e]*", word) and joined and re.fullmatch(r"--\w+", joined[-1]):
                joined[-1] += "=" + word
            else:
                joined.append(word)
        return super().parse_known_args(joined, namespace)

    def add_argument(self, *names, **options):
        """argparse's, but that a value which is empty or all blank is refused, of flags and of positional arguments."""
        if options.get("action", "store") in ("store", "append", "extend"):
            options["type"] = _not_blank(options.get("type", str))
        return super().add_argument(*names, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def make_parser(prog: str, description: str, *configs, sweep=()) -> argparse.ArgumentParser:
    """A parser with one flag for each `flag` field of the dataclasses; a field in two of them is one flag.

    Flags not given are absent from the result, so that a preset or a checkpoint can fill them in. A flag named in sweep
    takes a comma list; its value is the list of its different values, each checked like a single one.
    """
    parser = OneLineParser(prog=prog, description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    seen = set()
    for config in configs:
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            if "help" in field.metadata and field.name not in seen:
                seen.add(field.name)
                _add_flag(parser, field, hints[field.name], field.name in sweep)
    return parser


def _add_flag(parser, field, hint, sweep):
    meta = field.metadata
    text = meta["help"] + ("" if field.default in (None, "", False) else f" (default: {field.default})")
    text = text.replace("%", "%%")
    if hint is bool:
        parser.add_argument(f"--{field.name}", action="store_true", help=text)
        parser.add_argument(
            f"--no_{field.name}",
            f"--no-{field.name}",
            dest=field.name,
            action="store_false",
            help=f"the opposite of --{field.name}" if field.default else argparse.SUPPRESS,
        )
        return
    value_type = meta["type"] or _plain_type(hint)
    choices = list(meta["choices"]) if meta["choices"] is not None else None
    shown = meta["metavar"] or ("{" + ",".join(map(str, choices)) + "}" if choices else value_type.__name__.upper())
    convert = _checked(value_type, meta["low"], meta["high"], choices)
    parser.add_argument(
        f"--{field.name}",
        type=_list_of(convert) if sweep else convert,
        metavar=f"{shown}[,...]" if sweep else shown,
        help=text,
    )


def _plain_type(hint):
    """The type inside `X | None`."""
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return hint


def _checked(value_type, low, high, choices):
    """The `type` of an argparse flag: text to a value of value_type, in its bounds and among its choices."""
    names = {int: "a whole number", float: "a number", str: "a text"}
    lower = "" if low is None else f" of at least {low}"
    upper = "" if high is None else f"{' and' if lower else ' of'} at most {high}"

    def convert(text):
        try:
            value = value_type(text)
        except ValueError as error:
            if choices is not None:
                raise not_a_choice(text) from None
            if value_type not in names:
                raise argparse.ArgumentTypeError(str(error)) from None
            raise out_of_bounds(text) from None
        if choices is not None and value not in choices:
            raise not_a_choice(text)
        finite = not isinstance(value, float) or math.isfinite(value)
        if not finite or (low is not None and value < low) or (high is not None and value > high):
            raise out_of_bounds(text)
        if high is None and value_type in LARGEST and abs(value) > LARGEST[value_type]:
            raise argparse.ArgumentTypeError(f"invalid value {text!r}: must be at most {LARGEST[value_type]}")
        return value

    def not_a_choice(text):
        valid = ", ".join(map(str, choices))
        return argparse.ArgumentTypeError(f"invalid value {text!r}: must be one of {valid}")

    def out_of_bounds(text):
        return argparse.ArgumentTypeError(f"invalid value {text!r}: must be {names[value_type]}{lower}{upper}")

    return convert


def _not_blank(convert):
    """The same `type` of an argument, but that it refuses a text of nothing, which is what an unset variable leaves."""

    def converted(text):
        value = convert(text)  # of a number and of choices it says what is valid
        if not text.strip():
            raise argparse.ArgumentTypeError(
                f"invalid value {text!r}: an empty text; name what is meant, or leave it out"
            )
        return value

    converted.__name__ = getattr(convert, "__name__", "value")  # argparse names it where a ValueError says nothing
    return converted


def _list_of(convert):
    convert = _not_blank(convert)
    return lambda text: list(dict.fromkeys(convert(part) for part in text.split(",")))


def parse_range(name: str, text: str, number_type, low, high=math.inf) -> tuple:
    """The two numbers of the text "lo,hi"; ValueError, naming the flag, unless low <= lo <= hi <= high."""
    try:
        first, last = (number_type(part) for part in text.split(","))
        valid = low <= first <= last <= high
    except ValueError:
        valid = False
    if not valid:
        upper = "" if high == math.inf else f" <= {high}"
        raise ValueError(f"--{name} must be lo,hi with {low} <= lo <= hi{upper}, got {text!r}")
    return first, last


def pick(config_class, values: dict, **overrides):
    """An instance of the dataclass from those of the values that are its fields; overrides replace values."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{k: v for k, v in {**values, **overrides}.items() if k in names})


def defaults(*configs) -> dict:
    """Default of every flag of the dataclasses; of a field in two of them the first counts."""
    result = {}
    for config in configs:
        for field in dataclasses.fields(config):
            if "help" in field.metadata:
                result.setdefault(field.name, field.default)
    return result


def run_with(run, config_class, prog: str, description: str, argv=None, check=None) -> int:
    """Exit code of run(args), args being the config_class of a command line; --dry_run only prints them.

    check(args) comes before either: what it refuses needs neither data nor a model.
    """
    args = pick(config_class, vars(make_parser(prog, description, config_class).parse_args(argv)))
    if check is not None:
        check(args)
    if args.dry_run:
        print(json.dumps(dataclasses.asdict(args), indent=2))
        return 0
    return run(args)


def read_texts(config_class, texts: dict[str, str]) -> dict:
    """The values of flags of the dataclass, switches apart, as the command line reads their texts; "" is not given.

    ValueError, naming the flag, for one that the dataclass does not have, for no text, and for what is no value of it.
    """
    hints = typing.get_type_hints(config_class)
    known = {f.name: f.metadata for f in dataclasses.fields(config_class) if "help" in f.metadata}
    known = {name: meta for name, meta in known.items() if hints[name] is not bool}
    values = {}
    for name, text in texts.items():
        if name not in known:
            raise ValueError(f"unknown setting {name!r}; valid: {', '.join(known)}")
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a text, got {text!r}")
        meta = known[name]
        convert = _checked(meta["type"] or _plain_type(hints[name]), meta["low"], meta["high"], meta["choices"])
        try:
            values |= {name: convert(text)} if text else {}
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{name}: {error}") from None
    return values


def check_values(config_class, values: dict, source) -> None:
    """Raise ValueError unless the values, read from the file `source`, fit the fields of the dataclass.

    Values of flags must be ones that the command line accepts, others of their field's type. Fields may be absent.
    """
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if field.name not in values:
            continue
        value, meta, hint = values[field.name], field.metadata, hints[field.name]
        value = tuple(value) if isinstance(value, list) and hint is tuple else value  # JSON has no tuples
        takes_float = float in (hint, *typing.get_args(hint))
        if not isinstance(value, hint | int if takes_float else hint):  # 1 may stand for 1.0
            raise ValueError(f"{source} is damaged: its {field.name} is {value!r}")
        if "help" not in meta or value is None or isinstance(value, bool):
            continue
        try:
            _checked(meta["type"] or _plain_type(hint), meta["low"], meta["high"], meta["choices"])(str(value))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{source} is damaged: {field.name}: {error}") from None


def check_output_file(name: str, path: str | Path, is_own, inputs=()) -> None:
    """Raise ValueError unless the file that --name gives may be written, and replaced where it exists.

    It must be no folder and none of the inputs; is_own(path): is what exists a file of the kind that is written?
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"--{name} {path} is a folder, expected the name of a file")
    if path.resolve() in {Path(place).resolve() for place in inputs}:
        raise ValueError(f"--{name} {path} is an input: it would be replaced")
    if path.exists() and not is_own(path):
        raise ValueError(f"--{name} {path} exists and is not of the kind that is written: choose another name")


def check_input_file(path: Path, usual_name: str, source: str = "") -> None:
    """Raise ValueError unless path is a file. Of a folder it names the file with the usual name that is in it.

    source: how such a file is made, for the error where there is none.
    """
    if path.is_dir():
        inside = path / usual_name
        raise ValueError(f"{path} is a folder; " + (f"take {inside}" if inside.is_file() else f"no {usual_name} in it"))
    if not path.is_file():
        raise ValueError(f"there is no file {path}" + (f"; {source}" if source else ""))


def check_folder(name: str, path: str) -> None:
    """Raise ValueError if --name cannot be a folder to write to; nothing is made yet."""
    folder = Path(path).absolute()
    if any(len(os.fsencode(part)) > 255 for part in folder.parts):
        raise ValueError(f"--{name} {path[:20]}...: a name in it has more than 255 bytes")
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"--{name} {path}: {existing} is a file, not a folder")
    # os.access allows root everything, but nobody can make a folder below /proc
    if not os.access(existing, os.W_OK) or existing.is_relative_to("/proc"):
        raise ValueError(f"--{name} {path}: {existing} cannot be written to")
