"""What ComfyUI's own LoRA loader and AccVideo's nodes apply of every LoRA format, counted in the ComfyUI versions found.

    python benchmarks/lora_formats.py [--json docs/benchmarks/lora_formats.json] [--docs docs/formats.md]

A file of each format, on the modules its tool trains by default, goes onto a network with HunyuanVideo's depth (20 + 40
blocks; Wan's 40) and a width of 128 by each loader. A module counts as applied when its weights changed, and as right when
they are base + difference, computed in float64 by the file's writer, to 1e-3 of the difference. The files are written by
the tools' published rules (`tests/lora_files.py`), not by AccVideo.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.dit import DiTConfig
from accvideo_core.files import atomic_path
from tests.comfyui.setup_envs import find_checkouts, prepare
from tests.comfyui.test_sampling import small_wan
from tests.comfyui.worker import run_jobs
from tests.lora_files import FORMATS, WAN_FORMATS, from_native, write
from tests.networks import random_weights

LOADERS = ("native", "ours")
BEGIN, END = "<!-- lora-formats: written by benchmarks/lora_formats.py -->", "<!-- lora-formats: end -->"


@dataclass
class Args:
    """Count the modules of every LoRA format that ComfyUI's loader and ours apply."""

    double: int = 20
    """Double blocks."""
    single: int = 40
    """Single blocks."""
    wan: int = 40
    """Wan's blocks."""
    json: Path | None = None
    """Also write the counts here."""
    docs: Path | None = None
    """Also write the table into this document, between its marks, or at its end."""


def wan_weights(folder: Path, blocks: int) -> dict[str, Tensor]:
    """The small Wan of the tests with more blocks."""
    small_wan(folder / "one_block.safetensors")
    one = load_file(folder / "one_block.safetensors")
    names = [(n, i) for n in one for i in range(blocks if "blocks.0." in n else 1)]
    return {n.replace("blocks.0.", f"blocks.{i}."): one[n].clone() for n, i in names}


def count(args: Args, checkout: Path) -> list[dict[str, Any]]:
    """A row for every format: modules in the file, and (applied, right) by each loader. One process does all the work."""
    config = DiTConfig(128, 1, args.double, args.single, text_dim=32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        states = {"HunyuanVideo": random_weights(config), "Wan 2.1": wan_weights(folder, args.wan)}
        cases = [(family, f) for family, table in (("HunyuanVideo", FORMATS), ("Wan 2.1", WAN_FORMATS)) for f in table.items()]
        for family, state in states.items():
            save_file(state, folder / f"{family}.safetensors")
        files, jobs = [], []
        for i, (family, (format, row)) in enumerate(cases):
            files.append(write(format, states[family], trained=row.trained))
            files[-1].save(folder / f"lora{i}.safetensors")
            job = {
                "file": f"{family}.safetensors",
                "dtype": "float32",
                "loader": "native",
                "gives": ["weights"],
                "loras": [{"file": f"lora{i}.safetensors", "strength": 1.0}],
            }
            jobs += [job | {"applied_by": loader, "output": f"{loader}{i}"} for loader in LOADERS]
        run_jobs(checkout, prepare(checkout), folder, jobs)
        rows = []
        for i, (family, (format, row)) in enumerate(cases):
            scores = {}
            for loader in LOADERS:
                weights = {n.removeprefix("weight."): t for n, t in load_file(folder / f"{loader}{i}").items()}
                scores[loader] = files[i].score(states[family], from_native(weights, states[family]))
            rows.append({"family": family, "format": format, "key": row.key, "modules": len(files[i].modules), **scores})
    return rows


def version_of(checkout: Path) -> str:
    return re.findall(r'"([^"]+)"', (checkout / "comfyui_version.py").read_text())[-1]


def table(counts: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row a format, a column a ComfyUI version and one for AccVideo (the same in every version, or both shown)."""
    versions = list(counts)
    lines = [
        "| Model | Format | Modules | " + " | ".join(f"ComfyUI {v} applies" for v in versions) + " | AccVideo applies |",
        "|---|---|--:|" + "--:|" * (len(versions) + 1),
    ]
    for i, row in enumerate(counts[versions[0]]):
        cells = [_cell(*counts[version][i]["native"]) for version in versions]
        ours = dict.fromkeys(_cell(*counts[version][i]["ours"]) for version in versions)
        lines.append(f"| {row['family']} | {row['format']} | {row['modules']} | {' | '.join(cells)} | {' / '.join(ours)} |")
    return "\n".join(lines)


def _cell(applied: int, right: int) -> str:
    return str(applied) if applied == right else f"{applied}, {right} of them right"


def into_document(path: Path, text: str) -> None:
    """Replace what stands between the marks, or add it at the end."""
    whole = path.read_text(encoding="utf-8") if path.exists() else ""
    section = f"{BEGIN}\n{text}\n{END}"
    if BEGIN in whole:
        before, _, rest = whole.partition(BEGIN)
        whole = before + section + rest.partition(END)[2]
    else:
        heading = "## What ComfyUI's own LoRA loader applies"
        told = (
            "Modules of a file on all that its tool trains by default, counted by `python benchmarks/lora_formats.py --docs "
            "docs/formats.md`. "
            "ComfyUI's loader tells of the others only in its console; AccVideo stops at a key that it does not understand."
        )
        whole = f"{whole.rstrip()}\n\n{heading}\n\n{told}\n\n{section}\n"
    with atomic_path(path) as temporary:
        temporary.write_text(whole, encoding="utf-8")


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    checkouts = find_checkouts()
    if not checkouts:
        print("no ComfyUI found: set COMFYUI_PATH", file=sys.stderr)
        return 1
    counts = {version_of(checkout): count(args, checkout) for checkout in checkouts}
    text = table(counts)
    print(text)
    if args.json:
        with atomic_path(args.json) as temporary:
            settings = {"double": args.double, "single": args.single, "wan": args.wan}
            temporary.write_text(json.dumps({"blocks": settings, "comfyui": counts}, indent=2) + "\n", encoding="utf-8")
    if args.docs:
        into_document(args.docs, text)
    lost = [row for rows in counts.values() for row in rows if row["ours"] != (row["modules"], row["modules"])]
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
