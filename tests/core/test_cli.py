"""The `accvideo` command: exit codes, one-line errors, and no file left behind by bad input."""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path

import pytest
import torch
import tyro
from safetensors.torch import save_file

from accvideo_core import __version__, cli
from accvideo_core.dit import DiTConfig, HunyuanVideoDiT
from accvideo_core.errors import AccVideoWarning, InvalidValueError, PromptError
from accvideo_core.media import read_mp4
from accvideo_core.tiny import TinyTextEncoder, TinyVAE

NAMES = list(cli.COMMANDS)


@dataclass(frozen=True)
class WingArgs:
    """What the stand-in command does."""

    number: tyro.conf.Positional[int]
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


def test_help_of_a_first_word_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tiny", "--help"]) == 0
    said = capsys.readouterr().out
    assert "  tiny train    train the bundled models" in said and "merge-lora" not in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["generat"], "unknown command 'generat'; did you mean 'generate'? `accvideo --help` lists the commands"),
        (["--frames"], "unknown command '--frames'; `accvideo --help` lists the commands"),
        (["tiny"], "'tiny' is only the first word of a command; choose: tiny prompts, tiny judge, tiny train"),
        (["tiny", "paint"], "'tiny' is only the first word of a command; choose: tiny prompts, tiny judge, tiny train"),
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
            # a switch that is on is told by the word that turns it off
            assert f"--{'no-' if field.default is True else ''}{field.name.replace('_', '-')}" in out


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
    row = '{"prompt": "a red ball", "seed": 1, "named": {"colour": "%s"}}\n'
    (tmp_path / "plan.jsonl").write_text(row % "red")
    (tmp_path / "mauve.jsonl").write_text(row % "red" + row % "mauve")
    return tmp_path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained tiny models: what bad input does must not hang on how good the bundled ones are."""
    folder = tmp_path_factory.mktemp("weights")
    network = HunyuanVideoDiT(DiTConfig.tiny())
    parts = {"student": network, "teacher": network, "text_encoder": TinyTextEncoder(), "vae": TinyVAE()}
    for name, module in parts.items():
        save_file(module.state_dict(), folder / f"{name}.safetensors")
    return folder


# A command line, with FOLDER for the test's folder; the exit code; what the one line must hold: the value and the cure.
BAD_INPUT = [
    ("generate 'a red ball' -o FOLDER/a.mp4 --steps 0", 2, ["steps is 0", "at least 1"]),
    ("generate 'a red ball' -o FOLDER/a.mp4 --steps -5", 2, ["steps is -5", "at least 1"]),
    ("generate 'a red ball' -o FOLDER/a.mp4 --shift -1", 2, ["shift is -1", "above 0"]),
    ("generate 'a red ball' -o FOLDER/a.mp4 --shift 0", 2, ["shift is 0", "above 0"]),
    ("generate 'a red ball' -o FOLDER/a.mp4 --shift nan", 2, ["shift is nan", "finite"]),
    ("generate 'a red ball' -o FOLDER/a.mp4 --shift inf", 2, ["shift is inf", "finite"]),
    ("generate 'a red ball' -o FOLDER/a.mp4 --guidance nan", 2, ["guidance is nan", "finite"]),
    ("generate 'a red ball' -o FOLDER/a.gif", 2, ["a.gif", "no .mp4"]),
    ("generate 'a red ball' -o FOLDER/a.mp4 --frames 16", 2, ["frames is 16", "4n+1", "17"]),
    ("generate 'a red ball' -o FOLDER/a.mp4 --frames 0", 2, ["frames is 0", "4n+1"]),
    ("generate 'a red ball' -o FOLDER/a.mp4 --height 72", 2, ["height is 72", "multiple of 16"]),
    ("generate 'a red ball' -o FOLDER/a.mp4 --width 0", 2, ["width is 0", "multiple of 16"]),
    ("generate 'a red ball' -o FOLDER/a.mp4 --seed -1", 2, ["seed is -1", "2**64"]),
    ("generate 'a red ball' -o FOLDER/a.mp4 --upscale 0", 2, ["upscale is 0", "at least 1"]),
    ("generate 'a red ball' -o FOLDER/a.mp4 --device abacus", 2, ["abacus"]),
    ("generate '' -o FOLDER/a.mp4", 1, ["prompt is empty"]),
    ("generate 'xyzzy plugh' -o FOLDER/a.mp4", 1, ["xyzzy plugh", "red", "ball"]),
    ("generate 'a red ball' -o FOLDER/file/a.mp4", 1, ["FOLDER/file/a.mp4", "part of the path is a file"]),
    ("generate 'a red ball' -o FOLDER", 1, ["FOLDER", "name a file in it"]),
    ("compare 'a red ball' -o FOLDER/file", 1, ["FOLDER/file", "part of the path is a file"]),
    ("compare 'a red ball' '' -o FOLDER/out", 1, ["prompt is empty"]),
    ("compare 'a red ball' -o FOLDER/out --upscale 0", 2, ["upscale is 0"]),
    ("compare 'xyzzy' -o FOLDER/out", 1, ["xyzzy"]),
    ("evaluate --plan FOLDER/missing.jsonl", 1, ["FOLDER/missing.jsonl"]),
    ("evaluate --plan FOLDER/file", 1, ["FOLDER/file", "line 1"]),
    ("evaluate --plan FOLDER/mauve.jsonl", 1, ["FOLDER/mauve.jsonl", "line 2", "mauve", "red"]),
    ("evaluate --plan FOLDER/plan.jsonl --steps 0", 2, ["steps is 0"]),
    ("evaluate --plan FOLDER/plan.jsonl --batch 0", 2, ["batch is 0"]),
    ("evaluate --plan FOLDER/plan.jsonl --frames-out FOLDER/file/a.npz", 1, ["FOLDER/file/a.npz", "part of the path is a file"]),
    ("inspect FOLDER/missing.safetensors", 1, ["FOLDER/missing.safetensors", "check the path"]),
    ("inspect FOLDER/cut.safetensors", 1, ["FOLDER/cut.safetensors", "download it again"]),
    ("inspect FOLDER/text.safetensors", 1, ["FOLDER/text.safetensors"]),
    ("inspect FOLDER/other.safetensors", 1, ["FOLDER/other.safetensors"]),
    ("inspect FOLDER", 1, ["FOLDER"]),
    ("tiny prompts 0 -o FOLDER/new.jsonl", 2, ["count is 0", "1 prompt or more"]),
    ("tiny prompts 3 -o FOLDER/new.txt", 2, ["new.txt", "must end in .jsonl"]),
    ("tiny prompts 3 -o FOLDER/file/new.jsonl", 1, ["FOLDER/file", "part of the path is a file"]),
    ("tiny train vae --run FOLDER/file", 1, ["FOLDER/file", "part of the path is a file"]),
    ("tiny train vae --run FOLDER/run --weights FOLDER/file", 1, ["FOLDER/file", "part of the path is a file"]),
    ("tiny train vae --run FOLDER/run --steps -1", 2, ["steps is -1", "at least 1"]),
    ("tiny train vae --run FOLDER/run --lr nan", 2, ["lr nan", "above 0"]),
    ("tiny train vae --run FOLDER/run --device abacus", 2, ["abacus"]),
    ("tiny train teacher --run FOLDER/run --weights FOLDER/none", 1, ["FOLDER/none"]),
]


@pytest.mark.parametrize(("line", "code", "words"), BAD_INPUT, ids=[row[0] for row in BAD_INPUT])
def test_bad_input(
    folder: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    code: int,
    words: list[str],
) -> None:
    monkeypatch.setenv("ACCVIDEO_TINY_WEIGHTS", str(weights))
    before = files_in(folder)
    assert cli.main([word.replace("FOLDER", str(folder)) for word in shlex.split(line)]) == code
    out, err = capsys.readouterr()
    # A progress bar may stand before the line, and wipes itself.
    assert out == "" and err.split("\r")[-1].startswith("accvideo: error: ") and err.count("\n") == 1, err
    for word in words:
        assert word.replace("FOLDER", str(folder)) in err
    assert files_in(folder) == before


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
@pytest.mark.parametrize("part", ["student", "vae", "text_encoder"])
def test_damaged_bundled_weights(
    folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str, damage: str
) -> None:
    shutil.copytree(weights, folder / "weights")
    monkeypatch.setenv("ACCVIDEO_TINY_WEIGHTS", str(folder / "weights"))
    file = folder / "weights" / f"{part}.safetensors"
    file.unlink()
    if damage != "missing":
        shutil.copy(folder / f"{damage}.safetensors", file)
    assert cli.main(["generate", "a red ball", "-o", str(folder / "a.mp4")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("accvideo: error: ") and err.count("\n") == 1 and str(file) in err
    assert not (folder / "a.mp4").exists()


def test_generate_writes_the_video_it_names(
    folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCVIDEO_TINY_WEIGHTS", str(weights))
    made = folder / "new" / "a.mp4"
    words = [
        "generate",
        "a red zebra",
        "-o",
        str(made),
        "--steps",
        "1",
        "--frames",
        "5",
        "--width",
        "32",
        "--upscale",
        "2",
        "--json",
    ]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["file"] == str(made) and report["steps"] == 1 and report["model"] == "tiny-student"
    assert err.startswith("accvideo: warning: ") and "'zebra'" in err and err.count("\n") == 1
    video = read_mp4(made)
    assert video.frames.shape == (5, 128, 64, 3) and json.loads(video.metadata["accvideo"])["prompt"] == "a red zebra"
