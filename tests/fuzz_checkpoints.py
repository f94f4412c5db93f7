"""Fuzzing of the checkpoint readers: valid files of every container, damaged; whatever comes, the error is one of ours.

`python -m tests.fuzz_checkpoints --minutes 10` mutates at random, in a process that is watched: a crash, a foreign error, more
than 2 GB or more than 10 s are findings, written to tests/corpus/checkpoints.json as edits of a seed (not as files), which
tests/core/test_checkpoint_fuzz.py replays for ever.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from accvideo_core.checkpoint import open_checkpoint
from accvideo_core.checkpoint.inspect import check_values, describe
from accvideo_core.errors import AccVideoError

CORPUS = Path(__file__).parent / "corpus" / "checkpoints.json"
MEMORY = 2_000_000_000
SECONDS = 10.0
Edit = tuple[int, str]  # where (negative: from the end), and the bytes written there, as hex


def few_tensors() -> dict[str, torch.Tensor]:
    """The tensors that tell a network's sizes, and few others: enough to come past every check but the last."""
    shapes = {
        "img_in.proj.weight": (128, 16, 1, 2, 2),
        "vector_in.in_layer.weight": (128, 32),
        "txt_in.input_embedder.weight": (128, 32),
        "txt_in.individual_token_refiner.blocks.0.mlp.fc1.weight": (512, 128),
        "single_blocks.0.q_norm.weight": (128,),
        "final_layer.linear.weight": (64, 128),
        "final_layer.linear.bias": (64,),
    }
    return {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}


@functools.cache
def seeds() -> dict[str, dict[str, bytes]]:
    """{name: {file name: content}}; the first file is the one that is opened and damaged."""
    tensors, fp8 = few_tensors(), torch.float8_e4m3fn
    linear = "final_layer.linear"
    old = tensors | {f"{linear}.weight": tensors[f"{linear}.weight"].to(fp8), f"{linear}.scale_weight": torch.ones(())}
    settings = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    new = tensors | {f"{linear}.weight": old[f"{linear}.weight"], f"{linear}.weight_scale": torch.ones(())}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file(tensors, folder / "plain", {"key": "value"})
        save_file(old | {"scaled_fp8": torch.zeros(2).to(fp8)}, folder / "old")
        save_file(new | {f"{linear}.comfy_quant": settings}, folder / "new")
        torch.save({"module": tensors, "ema": tensors}, folder / "zip.pt")
        torch.save(tensors, folder / "legacy.pt", _use_new_zipfile_serialization=False)
        torch.save({"module": {k: v.to(fp8) if k.startswith("single") else v for k, v in tensors.items()}}, folder / "t.pt")
        torch.save({"single_blocks.0.q_norm": torch.ones(1)}, folder / "t_map.pt")
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "plain")}
        names = ("plain", "old", "new", "zip.pt", "legacy.pt", "t.pt", "t_map.pt")
        files = {name: (folder / name).read_bytes() for name in names}
        found = {name: {name: files[name]} for name in names[:5]}
        found["map"] = {"t_map.pt": files["t_map.pt"], "t.pt": files["t.pt"]}
        found["index.json"] = {"index.json": json.dumps(index).encode(), "plain": files["plain"]}
        try:
            import gguf
        except ImportError:
            return found
        writer = gguf.GGUFWriter(None, "hyvid")
        for tensor, value in tensors.items():
            kind = gguf.GGMLQuantizationType.Q8_0 if value.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(tensor, gguf.quants.quantize(value.float().numpy(), kind), raw_dtype=kind)
        writer.add_array("comfy.gguf.orig_shape.img_in.proj.weight", [128, 16, 1, 2, 2])
        writer.write_header_to_file(path=folder / "gguf")
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return found | {"gguf": {"gguf": (folder / "gguf").read_bytes()}}


def damage(content: bytes, edits: list[Edit], keep: float = 1.0) -> bytes:
    """`content` with bytes overwritten, and cut to the part `keep` of its length."""
    raw = bytearray(content)
    for place, text in edits:
        piece = bytes.fromhex(text)
        start = place % len(raw) if raw else 0
        raw[start : start + len(piece)] = piece[: len(raw) - start]
    return bytes(raw[: int(len(raw) * keep)])


def try_to_open(folder: Path, seed: str, edits: list[Edit], keep: float = 1.0) -> str:
    """ "opened" or the name of our error; anything else that is raised is a finding. Everything is read."""
    names = list(seeds()[seed])
    for name in names:
        content = seeds()[seed][name]
        (folder / name).write_bytes(damage(content, edits, keep) if name == names[0] else content)
    opened = "t.pt" if seed == "map" else names[0]
    try:
        with open_checkpoint(folder / opened, strict=False) as checkpoint:
            describe(checkpoint)
            check_values(checkpoint)
        return "opened"
    except AccVideoError as error:
        assert "\n" not in str(error), f"an error of several lines: {error!r}"
        return type(error).__name__


def random_case(rng: random.Random) -> tuple[str, list[Edit], float]:
    """Edits that hit structure more often than weights: the first and last kilobytes, and numbers where lengths may be."""
    seed = rng.choice(list(seeds()))
    edits: list[Edit] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        place = rng.choice((rng.randrange(64), rng.randrange(4096), -1 - rng.randrange(2048), rng.randrange(1 << 20)))
        number = rng.choice((0, 1, 255, 2**31 - 1, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**64 - 1, rng.getrandbits(64)))
        piece = rng.choice(
            (
                bytes([rng.randrange(256)]),
                bytes([1 << rng.randrange(8)]),
                struct.pack("<Q", number),
                struct.pack("<Q", number)[:4],
                rng.randbytes(rng.randrange(1, 16)),
                rng.choice((b"null", b'"', b"{", b"[", b"}", b"-1", b"1e9", b"c__builtin__\neval\n", b".", b"\x80\x02", b"R")),
            )
        )
        edits.append((place, piece.hex()))
    return seed, edits, rng.choice((1.0,) * 8 + (rng.random(), 0.999))


def work(start: int, until: float, folder: Path) -> None:
    """Cases from the random seed `start` on; the running one is always on disk, for the process that watches."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY + 8_000_000_000, MEMORY + 8_000_000_000))  # torch alone maps gigabytes
    except ImportError:
        pass
    counts: Counter[str] = Counter()
    while time.time() < until:
        seed, edits, keep = random_case(random.Random(start))
        (folder / "case.json").write_text(json.dumps({"seed": seed, "edits": edits, "keep": keep, "start": start}))
        begun = time.perf_counter()
        try:
            outcome = try_to_open(folder, seed, edits, keep)
        except BaseException:
            (folder / "finding.txt").write_text(traceback.format_exc())
            raise SystemExit(1) from None
        if time.perf_counter() - begun > SECONDS:
            (folder / "finding.txt").write_text(f"took {time.perf_counter() - begun:.1f} s")
            raise SystemExit(1)
        counts[outcome] += 1
        start += 1
    print(json.dumps({"next": start, "counts": counts}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--start", type=int, default=0, help="first random seed")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    until = time.time() + args.minutes * 60
    if args.work:
        work(args.start, float(args.work.split(":", 1)[0]), Path(args.work.split(":", 1)[1]))
        return 0
    findings: list[dict[str, Any]] = []
    start, total = args.start, Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while time.time() < until - 5:
            command = [sys.executable, "-m", "tests.fuzz_checkpoints", "--start", str(start), "--work", f"{until}:{folder}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                told = json.loads(done.stdout.splitlines()[-1])
                total.update(told["counts"])
                break
            case = json.loads((folder / "case.json").read_text())
            note = folder / "finding.txt"
            why = note.read_text().strip().splitlines()[-1] if note.exists() else f"the process ended with {done.returncode}"
            note.unlink(missing_ok=True)
            total["before findings"] += case["start"] - start
            print(f"FINDING at {case['start']}: {case['seed']}: {why}\n{done.stderr[-1500:]}", flush=True)
            findings.append({"seed": case["seed"], "edits": case["edits"], "keep": case["keep"], "why": why[:200]})
            start = case["start"] + 1
    if findings:
        kept = json.loads(CORPUS.read_text()) if CORPUS.exists() else []
        CORPUS.parent.mkdir(exist_ok=True)
        CORPUS.write_text(json.dumps(kept + findings, indent=1) + "\n")
    print(f"{sum(total.values())} cases, {len(findings)} findings: {dict(total)}")
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
