"""Everything that wants a GPU, in one command and within nine minutes: `make bench-gpu`.

    python benchmarks/gpu.py [--minutes 9] [--out out/bench-gpu] [--comfyui ~/comfy/ComfyUI]

In order of weight, each part in a process of its own with a share of the time: the 13 B model's step at 544 x 960 x 93 beside
diffusers and ComfyUI, at 720 x 1280 x 129, 5 steps against 50, the attention kernels and the network's tests on the device, a
training iteration with its utilisation, the growth with tokens, the tiny world's speed-up. What runs out of time is ended and
named; what was measured by then is in its file. Each part writes JSON into --out; `summary.json` says how each one ended.
`--device cpu` goes through the same parts in sizes a laptop manages, to see that they run.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from synthetic import SIZES, inputs, weights  # noqa: E402

from accvideo_core.devices import synchronize  # noqa: E402
from accvideo_core.dit import Conditioning, HunyuanVideoDiT  # noqa: E402
from accvideo_core.sampling import euler_flow  # noqa: E402
from accvideo_core.schedule import PRESETS  # noqa: E402


@dataclass
class Args:
    """Run every GPU benchmark and gather what they measured."""

    minutes: float = 9.0
    """Time for all parts together."""
    out: Path = Path("out/bench-gpu")
    """Folder for the results."""
    comfyui: Path = Path("~/comfy/ComfyUI")
    """A ComfyUI checkout to measure beside, if it is there."""
    device: str = "cuda"
    """cuda; or cpu, in small sizes."""
    only: tuple[str, ...] = ()
    """Parts to run; default: all."""
    speedup_of: str | None = None
    """Time 5 steps against 50 of this size in this process; used by the benchmark itself."""


class Part(NamedTuple):
    """A command, and the share of the time that is still there it may take."""

    name: str
    words: list[str]
    share: float


def parts(args: Args) -> list[Part]:
    python, gpu = sys.executable, args.device == "cuda"

    def script(name: str, *words: str, to: str) -> list[str]:
        return [python, str(HERE / name), *words, "--json", str(args.out / f"{to}.json")]

    def forward(sizes: list[str], repeats: int, *more: str, to: str) -> list[str]:
        dtype = "bfloat16" if gpu else "float32"
        words = ["--device", args.device, "--sizes", *sizes, "--dtypes", dtype, "--repeats", str(repeats), *more]
        return script("dit_forward.py", *words, "--comfyui", str(args.comfyui.expanduser()), to=to)

    where = ["--device", args.device, "--out", str(args.out)]
    alone = ["--no-compile", "--attentions", "pytorch"]
    big, bigger, growth = ("13b-544p", "13b-720p", ["13b-1k", "13b-4k", "13b-16k"]) if gpu else ("1k", "1k", ["tiny", "1k"])
    tested = ["tests/core/test_attention.py", "tests/core/test_dit.py"]
    return [
        Part("step-544p", forward([big], 5 if gpu else 2, "--attentions", "pytorch", to="step-544p"), 0.40),
        Part("step-720p", forward([bigger], 2, *(["--attentions", "pytorch"] if gpu else alone), to="step-720p"), 0.40),
        Part("speedup-13b", [python, __file__, "--speedup-of", growth[-1], *where], 0.35),
        Part("attention", script("attention.py", "--device", args.device, "--repeats", "5", to="attention"), 0.35),
        Part("tests", [python, "-m", "pytest", "-q", "-x", *tested], 0.40),
        Part("train-step", script("train_step.py", *train_step(gpu), to="train-step"), 0.60),
        Part("growth", forward(growth, 3, *alone, to="growth"), 0.60),
        Part("speedup-tiny", script("speedup.py", "--repeats", "5", "--device", args.device, to="speedup-tiny"), 1.0),
    ]


def train_step(gpu: bool) -> list[str]:
    return ["--size", "1b", "--variants", "both", "--repeats", "2"] if gpu else ["--size", "proof", "--variants", "plain"]


def measure_speedup(args: Args) -> int:
    """A student's 5 steps and a teacher's 50, which is the same network, on one noise: seconds, and their ratio."""
    assert args.speedup_of is not None
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    config = SIZES[args.speedup_of][0]
    with torch.inference_mode():
        network = HunyuanVideoDiT(config, device="meta", dtype=dtype).eval()
        network.load_state_dict(weights(config, args.device, dtype), assign=True)
        network.attention_kernel = "auto"
        given = inputs(args.speedup_of, args.device, dtype)
        told = Conditioning(given["text"], given["pooled"], given["guidance"])
        preset, place = PRESETS["hunyuan-t2v"], torch.device(args.device)

        def sample(steps: int) -> float:
            start = time.perf_counter()
            euler_flow(lambda x, s: network(x, s, told), given["latent"], preset.sigmas(steps))
            synchronize(place)
            return time.perf_counter() - start

        sample(1)
        student = [sample(preset.steps) for _ in range(3)]
        teacher = sample(preset.teacher_steps)
    found = {"size": args.speedup_of, "student_seconds": student, "teacher_seconds": teacher}
    found["ratio"] = teacher / statistics.median(student)
    print(f"{args.speedup_of}: 50 steps {teacher:.2f} s, 5 steps {statistics.median(student):.2f} s, ratio {found['ratio']:.2f}")
    (args.out / "speedup-13b.json").write_text(json.dumps(found) + "\n")
    return 0


def main(args: Args) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    if args.speedup_of is not None:
        return measure_speedup(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --device cpu goes through the same parts in small sizes")
    chosen = parts(args)
    if unknown := set(args.only) - {part.name for part in chosen}:
        raise SystemExit(f"no parts {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in chosen)}")
    end = time.monotonic() + 60 * args.minutes
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    summary = {"device": device, "torch": torch.__version__, "parts": {}}
    for part in (part for part in chosen if not args.only or part.name in args.only):
        left = end - time.monotonic()
        start = time.monotonic()
        ended = run(part, max(1.0, part.share * left), args.out) if left > 5 else "no time left"
        summary["parts"][part.name] = {"ended": ended, "seconds": round(time.monotonic() - start, 1)}
        print(f"== {part.name}: {ended}, {time.monotonic() - start:.0f} s", flush=True)
        (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return 0


def run(part: Part, seconds: float, out: Path) -> str:
    """How it ended. Its output is shown, and kept beside its results."""
    log = out / f"{part.name}.log"
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(part.words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
            ended = "done" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            end_group(process)
            ended = f"out of time after {seconds:.0f} s"
    print(*log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:], sep="\n", flush=True)
    return ended


def end_group(process: subprocess.Popen[bytes]) -> None:
    """The part and the workers it started, which hold the GPU's memory."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Args)))
