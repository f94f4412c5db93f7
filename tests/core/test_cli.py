"""The `accvideo` command: exit codes, one-line errors, and no file left behind by bad input."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accvideo_core import __version__, cli
from accvideo_core.errors import AccVideoWarning, InvalidValueError, PromptError

NAMES = list(cli.COMMANDS)


@dataclass(frozen=True)
class WingArgs:
    """What the stand-in command does."""

    number: int
    """a number"""
    loud: bool = False
    """a flag"""


@pytest.fixture
def wing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[WingArgs], int]], None]:
    """Makes `accvideo wing` a command that runs the given function, so that the frame is tested apart from the wings."""

    def install(run: Callable[[WingArgs], int]) -> None:
        module = types.ModuleType("accvideo_core.stand_in")
        module.WingArgs, module.run = WingArgs, run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "wing", cli.Command("stand_in", "WingArgs", "a stand-in"))

    return install


def fails(error: BaseException) -> Callable[[WingArgs], int]:
    def run(_: WingArgs) -> int:
        raise error

    return run


def test_arguments_reach_the_command_and_its_code_comes_back(wing, capsys: pytest.CaptureFixture[str]) -> None:
    got: list[WingArgs] = []
    wing(lambda arguments: (got.append(arguments), 7)[1])
    assert cli.main(["wing", "-3", "--loud"]) == 7
    assert cli.main(["wing", "4"]) == 7
    assert got == [WingArgs(-3, True), WingArgs(4, False)]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InvalidValueError("steps is 0; it must be at least 1"), 2, "accvideo: error: steps is 0; it must be at least 1"),
        (PromptError("no word of 'a\nb' is known"), 1, "accvideo: error: no word of 'a b' is known"),
        (KeyboardInterrupt(), 130, "accvideo: error: interrupted"),
    ],
)
def test_errors_are_one_line_and_have_their_code(wing, capsys: pytest.CaptureFixture[str], error, code: int, line: str) -> None:
    wing(fails(error))
    assert cli.main(["wing", "1"]) == code
    assert capsys.readouterr() == ("", line + "\n")


def test_a_bug_is_not_dressed_up_as_a_user_error(wing) -> None:
    wing(fails(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["wing", "1"])


def test_warnings_are_one_line_and_others_stay_what_they_are(wing, capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: WingArgs) -> int:
        for _ in range(3):
            warnings.warn("'zebra' is unknown\nand left out", AccVideoWarning, stacklevel=1)
        warnings.warn("another library's", UserWarning, stacklevel=1)
        return 0

    wing(run)
    before = warnings.showwarning
    with pytest.warns(UserWarning, match="another library's"):
        assert cli.main(["wing", "1"]) == 0
    assert capsys.readouterr().err == "accvideo: warning: 'zebra' is unknown and left out\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize("words", [["wing"], ["wing", "x"], ["wing", "1", "--lout"], ["wing", "1", "2"]])
def test_wrong_usage_is_code_2_on_stderr(wing, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    wing(fails(AssertionError("must not run")))
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and "accvideo wing --help" in err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["generat"], "unknown command 'generat'; did you mean 'generate'? `accvideo --help` lists the commands"),
        (["--frames"], "unknown command '--frames'; `accvideo --help` lists the commands"),
        (["tiny"], "'tiny' is only the first word of a command; choose: tiny train"),
        (["tiny", "paint"], "'tiny' is only the first word of a command; choose: tiny train"),
    ],
)
def test_unknown_commands(capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    assert cli.main(words) == 2
    assert capsys.readouterr() == ("", f"accvideo: error: {line}\n")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == cli.main(["-h"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(f"  {name}  " in out.replace(" " * 3, "  ") for name in NAMES)
    assert cli.main([]) == 2
    assert capsys.readouterr().out == ""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    program = "import sys; from accvideo_core.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "av", "tyro", "PIL"}.isdisjoint(run.stderr.split())


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_its_wing_and_explains_its_arguments(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = cli.COMMANDS[name]
    wing = importlib.import_module(f"accvideo_core.{command.module}")
    arguments = getattr(wing, command.arguments)
    assert is_dataclass(arguments) and callable(wing.run)
    assert cli.main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: accvideo {name}" in out
    for field in fields(arguments):
        if field.default is not MISSING:
            assert f"--{field.name.replace('_', '-')}" in out


def test_module_is_the_command_and_a_closed_pipe_is_no_traceback() -> None:
    command = [sys.executable, "-m", "accvideo_core"]
    run = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{__version__}\n", "")
    with subprocess.Popen([*command, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights of another model, a truncated file, and a plain file where a folder is wanted."""
    save_file({"conv.weight": torch.zeros(2, 2), "conv.bias": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-5])
    (tmp_path / "text.safetensors").write_text("no weights at all")
    (tmp_path / "file").write_text("a file, not a folder")
    return tmp_path


# A command line, with FOLDER for the test's folder; the exit code; what the one line must hold: the value and the cure.
BAD_INPUT = [
    ("inspect FOLDER/missing.safetensors", 1, ["FOLDER/missing.safetensors", "check the path"]),
    ("inspect FOLDER/cut.safetensors", 1, ["FOLDER/cut.safetensors", "download it again"]),
    ("inspect FOLDER/text.safetensors", 1, ["FOLDER/text.safetensors"]),
    ("inspect FOLDER/other.safetensors", 1, ["FOLDER/other.safetensors"]),
    ("inspect FOLDER", 1, ["FOLDER"]),
    ("tiny train vae --run FOLDER/file", 1, ["FOLDER/file", "part of the path is a file"]),
    ("tiny train vae --run FOLDER/run --weights FOLDER/file", 1, ["FOLDER/file", "part of the path is a file"]),
    ("tiny train vae --run FOLDER/run --steps -1", 2, ["steps -1", "at least 1"]),
    ("tiny train vae --run FOLDER/run --lr nan", 2, ["lr nan", "above 0"]),
    ("tiny train vae --run FOLDER/run --device abacus", 2, ["abacus"]),
    ("tiny train teacher --run FOLDER/run --weights FOLDER/none", 1, ["FOLDER/none"]),
]


@pytest.mark.parametrize(("line", "code", "words"), BAD_INPUT, ids=[row[0] for row in BAD_INPUT])
def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str], line: str, code: int, words: list[str]) -> None:
    before = files_in(folder)
    assert cli.main([word.replace("FOLDER", str(folder)) for word in shlex.split(line)]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("accvideo: error: ") and err.count("\n") == 1, err
    for word in words:
        assert word.replace("FOLDER", str(folder)) in err
    assert files_in(folder) == before
