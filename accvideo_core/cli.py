"""The `accvideo` command. It only names commands: what one does, and its arguments, live in its wing, imported when chosen.

Exit codes: 0 ok, 1 failed, 2 wrong usage, 130 interrupted. Results go to stdout; errors and warnings to stderr, a line each.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Collection, Sequence
from typing import NamedTuple, TextIO

from . import __version__
from .errors import AccVideoError, AccVideoWarning

INTERRUPTED = 130


class Command(NamedTuple):
    """Where a command lives: `module` holds the dataclass `arguments`, `run(arguments) -> exit code`, and where the defaults can
    lie in a file, `defaults(words) -> arguments or None`."""

    module: str
    arguments: str
    summary: str


COMMANDS = {
    "generate": Command("headless.generate", "GenerateArgs", "a prompt to a video, with the bundled models or released ones"),
    "sample": Command("headless.sample", "SampleArgs", "a plan's videos as latents for ComfyUI, on one GPU or many"),
    "compare": Command("studies.compare", "CompareArgs", "teacher and student side by side: video, contact sheet, times"),
    "captions": Command("synvid.captions", "CaptionsArgs", "videos to a prompt file, described by a vision model"),
    "budget": Command("synvid.budget", "BudgetArgs", "GPU hours, bytes and files of a planned SynVid dataset"),
    "encode": Command("headless.encode", "EncodeArgs", "a prompt file to a plan of trajectories to capture"),
    "capture": Command("headless.capture", "CaptureArgs", "a plan's trajectories into a SynVid dataset"),
    "decode": Command("headless.decode", "DecodeArgs", "a SynVid dataset's latents as videos"),
    "queue": Command("comfy_queue", "QueueArgs", "a workflow on a running ComfyUI, once or for thousands of prompts"),
    "distill": Command("headless.distill", "DistillArgs", "a student from a SynVid dataset, on one device or many"),
    "merge-synvid": Command("synvid.merge", "MergeArgs", "SynVid datasets of one kind joined into one"),
    "evaluate": Command("studies.evaluation", "EvaluateArgs", "how well a model follows prompts, and its teacher"),
    "toy": Command("studies.toy", "ToyArgs", "the paper's 1-D experiment: data points that are no use to distillation"),
    "ablate": Command("studies.ablate", "AblateArgs", "what each part of the method is worth, measured on the tiny world"),
    "inspect": Command("inspect", "InspectArgs", "what a checkpoint, a LoRA or a dataset is, and whether it is whole and sound"),
    "merge-lora": Command("lora.merge_command", "MergeArgs", "a checkpoint with LoRAs merged into it"),
    "extract-lora": Command("lora.extract_command", "ExtractArgs", "the difference of two checkpoints as a LoRA"),
    "convert": Command("checkpoint.convert", "ConvertArgs", "a checkpoint in another layout or dtype"),
    "tiny prompts": Command("studies.plans", "PlanArgs", "prompts of the tiny world, to capture from and to judge by"),
    "tiny judge": Command("studies.judge", "JudgeArgs", "which captured trajectories of the tiny world are right"),
    "tiny train": Command("tiny.training", "TrainArgs", "train the bundled models: vae, base, guided, teacher, student, decoder"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the arguments default to the process's own. Returns the exit code, also where --help ends it."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console that lacks a letter of the prompt shows its code instead of failing
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(words)
        sys.stdout.flush()  # here, so that a reader who has gone is met below and not at the interpreter's exit
        return code
    except SystemExit as stop:  # tyro has printed help (0) or what is wrong with the usage (2)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except AccVideoError as error:
        _say("error", error)
        return error.exit_code
    except KeyboardInterrupt:
        _say("error", "interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader (`| head`) has gone; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    longer = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if longer and words[1:2] in (["-h"], ["--help"]):
        print(_help(longer))
        return 0
    for length in (2, 1):
        if (name := " ".join(words[:length])) in COMMANDS:
            return _run(name, words[length:])
    _say("error", _unknown(words[0], longer))
    return 2


def _run(name: str, words: list[str]) -> int:
    import tyro  # here, and the wing below, so that `accvideo --help` answers at once

    command = COMMANDS[name]
    wing = importlib.import_module(f".{command.module}", __package__)
    defaults = wing.defaults(words) if hasattr(wing, "defaults") else None
    arguments = tyro.cli(
        getattr(wing, command.arguments),
        prog=f"accvideo {name}",
        args=words,
        **({} if defaults is None else {"default": defaults}),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("default", AccVideoWarning)
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, AccVideoWarning):
                _say("warning", message)
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        code: int = wing.run(arguments)
        return code


def _say(kind: str, message: object) -> None:
    """One line, whatever a message quotes."""
    print(f"accvideo: {kind}:", " ".join(str(message).split()), file=sys.stderr)


def _unknown(word: str, longer: Sequence[str]) -> str:
    if longer:
        return f"{word!r} is only the first word of a command; choose: {', '.join(longer)}"
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    return (
        f"unknown command {word!r}; " + (f"did you mean {near[0]!r}? " if near else "") + "`accvideo --help` lists the commands"
    )


def _help(names: Collection[str] = COMMANDS) -> str:
    width = max(map(len, names))
    listed = "\n".join(f"  {name:<{width}}  {COMMANDS[name].summary}" for name in names)
    return (
        "usage: accvideo COMMAND [options]\n\n"
        "Few-step video generation by distilling a teacher on its own denoising trajectories.\n\n"
        f"commands:\n{listed}\n\n"
        "options:\n  -h, --help  this list; after a command, that command's options\n  --version   the version"
    )
