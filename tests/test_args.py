"""Command-line flags from dataclasses: values, switches, bad input in one line, help, and run_main's exit codes."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from util.args import OneLineParser, defaults, flag, make_parser, pick
from util.door import run_main


@dataclass(frozen=True)
class Settings:
    count: int = flag(3, "a count", low=1, high=10)
    scale: float = flag(1.5, "a scale of 100%", low=0)
    free: float | None = flag(None, "a number or nothing")
    kind: str = flag("red", "a colour", choices={"red": 1, "blue": 2})
    steps: int | str = flag("100", "digits kept as a text", type=str)
    fast: bool = flag(False, "be quick")
    safe: bool = flag(True, "be careful")
    name: str | None = flag(None, "a text")
    path: str = flag("", "another text")
    hidden: int = 7


@dataclass(frozen=True)
class More:
    count: int = flag(99, "the same flag again", low=1, high=10)
    other: int = flag(0, "another")


def parse(*argv):
    return vars(make_parser("prog", "what it does", Settings, More, sweep=("path",)).parse_args(argv))


def test_flags_given_and_not_given():
    assert parse() == {}
    given = parse(
        "--count", "10", "--scale=0", "--free", "-1000", "--kind", "blue", "--steps", "25", "--fast", "--other", "-4"
    )
    assert given == dict(count=10, scale=0.0, free=-1000.0, kind="blue", steps="25", fast=True, other=-4)
    assert type(given["scale"]) is float and type(given["count"]) is int
    assert pick(Settings, given) == Settings(10, 0.0, -1000.0, "blue", "25", True)
    assert pick(More, given, other=5) == More(10, 5)
    expected = dict(
        count=3, scale=1.5, free=None, kind="red", steps="100", fast=False, safe=True, other=0, name=None, path=""
    )
    assert defaults(Settings, More) == expected
    assert defaults(More, Settings)["count"] == 99


@pytest.mark.parametrize(
    "name, no", [("safe", "--no_safe"), ("safe", "--no-safe"), ("fast", "--no_fast"), ("fast", "--no-fast")]
)
def test_switches(name, no):
    assert parse(no) == {name: False} and parse(f"--{name}") == {name: True}
    assert parse(f"--{name}", no) == {name: False} and parse(no, f"--{name}") == {name: True}


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--count", "0"], ["--count", "'0'", "a whole number", "at least 1", "at most 10"]),
        (["--count", "11"], ["--count", "'11'", "at most 10"]),
        (["--count", "2.5"], ["--count", "'2.5'", "a whole number"]),
        (["--count", "many"], ["--count", "'many'"]),
        (["--count", "nan"], ["--count", "'nan'"]),
        (["--count", ""], ["--count", "''"]),
        (["--count"], ["--count"]),
        (["--path", ""], ["--path", "''", "empty text"]),
        (["--path= \t"], ["--path", "' ", "empty text"]),
        (["--path=,a"], ["--path", "''", "empty text"]),
        (["--name", ""], ["--name", "''", "empty text"]),
        (["--scale", "-0.1"], ["--scale", "'-0.1'", "a number", "at least 0"]),
        (["--scale", "nan"], ["--scale", "'nan'"]),
        (["--scale", "inf"], ["--scale", "'inf'"]),
        (["--scale=-inf"], ["--scale", "'-inf'"]),
        (["--scale", "1e999"], ["--scale", "'1e999'"]),
        (["--free", "nan"], ["--free", "'nan'", "a number"]),
        (["--free", "x\ny"], ["--free", r"'x\ny'"]),
        (["--kind", "green"], ["--kind", "'green'", "red, blue"]),
        (["--fast=1"], ["--fast"]),
        (["--cou", "3"], ["--cou"]),
        (["--unknown", "3"], ["--unknown"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_flags_are_one_line_and_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.endswith("\n") and err.startswith("prog: error: ")
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    "argv", [["", "--out", "x"], ["x", "y", " ", "--out", "x"], ["x", "--out", ""], ["x", "--out="]]
)
def test_an_empty_text_is_no_path_of_a_parser_made_by_hand(argv, capsys):
    """Path("") is the current folder."""
    parser = OneLineParser(prog="prog")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    assert vars(parser.parse_args(["x", "--out", "y"])) == dict(runs=[Path("x")], out=Path("y"))
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(argv)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and "empty text" in line
    assert ("--out" if argv[0] == "x" and len(argv) < 4 else "runs") in line


def test_help_names_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for part in (
        "--count",
        "a count (default: 3)",
        "a scale of 100% (default: 1.5)",
        "{red,blue}",
        "--no_safe",
        "what it does",
    ):
        assert part in text
    assert "hidden" not in text and "--no_fast" not in text


def test_run_main(capsys):
    def main(argv):
        if argv:
            raise ValueError("first\nsecond")
        return 3

    assert run_main(main, []) == 3 and capsys.readouterr().err == ""
    assert run_main(main, ["x"]) == 2 and capsys.readouterr().err == "error: first second\n"
