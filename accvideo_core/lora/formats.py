"""Any LoRA file -> what it changes of the original network, with every key accounted for.

A key is a prefix, a module's name (`names.py`) and a suffix (the table here) that says which tensor of which adapter
(`adapters.py`) it is. Nothing is taken by file name and nothing is dropped: a key is applied, ignored for a reason that is
given, or unmatched, which is an error unless the caller allows it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from ..checkpoint.containers import PEFT_FILES, adapter_file, open_container
from ..checkpoint.layouts import some
from ..checkpoint.quantised import count_not_finite
from ..errors import AccVideoWarning, CheckpointError, LoraError
from .adapters import DIFFERENCE, LOHA, LOKR, LOW_RANK, REPLACEMENT, LoraModule, LoraPart, StoredTensor
from .alphas import ratio, read_alphas
from .names import (
    COMFYUI_NAMES,
    DIFFUSERS_NAMES,
    HUNYUAN_VIDEO,
    ORIGINAL_NAMES,
    WAN,
    dialect_of,
    find,
    find_parameter,
    has_no_parameters,
)

# (what follows a module's name, role). PEFT puts an adapter's name ("default") before `.weight`.
SUFFIXES: tuple[tuple[str, str], ...] = (
    (r"(?:\.lora_down|\.lora\.down|_lora\.down|\.lora_linear_layer\.down)\.weight", "down"),
    (r"(?:\.lora_up|\.lora\.up|_lora\.up|\.lora_linear_layer\.up)\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.lora_A(?:\.[\w-]+)??(?:\.weight)?", "down"),
    (r"\.lora_B(?:\.[\w-]+)??\.bias", "up_bias"),
    (r"\.lora_B(?:\.[\w-]+)??(?:\.weight)?", "up"),
    (r"\.dora_scale", "magnitude"),
    (r"\.lora_magnitude_vector(?:\.[\w-]+)??(?:\.weight)?", "row_magnitude"),
    (r"\.alpha", "alpha"),
    *((rf"\.hada_{x}", f"hada_{x}") for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *((rf"\.lokr_{x}", f"lokr_{x}") for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    (r"\.(?:diff|w_norm)", "diff"),
    (r"\.(?:diff_b|b_norm)", "diff_b"),
    (r"\.diff_m", "diff_m"),
    (r"\.set_weight", "set"),
)
_KEY = re.compile("(.*?)(?:" + "|".join(f"({pattern})" for pattern, _ in SUFFIXES) + ")", re.DOTALL)

# (naming, prefix, how the down factor is called, name of the format); None stands for any. The first that fits.
_FORMATS: tuple[tuple[str | None, str | None, str | None, str], ...] = (
    (None, "Hunyuan_video_I2V_lora_", None, "tencent-i2v"),
    (None, "lora_transformer_", None, "onetrainer"),
    (None, "lora_unet_", None, "musubi-kohya"),
    (None, "lora_unet__", None, "musubi-kohya"),
    (None, "lycoris_", None, "lycoris"),
    (DIFFUSERS_NAMES, None, None, "diffusers-peft"),
    (COMFYUI_NAMES, None, None, "comfyui"),
    (ORIGINAL_NAMES, None, "lora_A", "diffusion-pipe"),
    (ORIGINAL_NAMES, None, None, "original"),
)

# (what a key begins with, why it is no business of this network).
_ELSEWHERE: tuple[tuple[str, str], ...] = (
    (r"(lora_te\d*_|text_encoders?[._\d]|text_encoder_\d|lora_text_encoder|lora_llama|lora_clip)", "of a text encoder"),
    (r"(bundle_emb|emb_params|string_to_param)", "an embedding for a text encoder"),
    (r"(first_stage_model|vae)[._]", "of a VAE"),
)
_REQUIRED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    # form: sets of roles, one of which must be there whole
    LOW_RANK: (("down", "up"),),
    LOHA: (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    LOKR: tuple((*a, *b) for a in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")) for b in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))),
}
_OPTIONAL: Mapping[str, frozenset[str]] = {
    LOW_RANK: frozenset({"mid", "magnitude", "row_magnitude", "alpha", "up_bias"}),
    LOHA: frozenset({"hada_t1", "hada_t2", "magnitude", "alpha"}),
    LOKR: frozenset({"lokr_t2", "magnitude", "alpha"}),
}
_MARKERS = (("hada_", LOHA), ("lokr_", LOKR), ("down", LOW_RANK), ("up", LOW_RANK), ("mid", LOW_RANK))


class Lora:
    """An open LoRA file. Values are read when they are needed, so it stays open: a context manager.

    path       the file
    format     whose manner of naming it is: diffusion-pipe, musubi-kohya, comfyui, diffusers-peft, onetrainer, ...
    family     "hunyuan-video" or "wan"
    modules    {original tensor name: LoraModule}, in the file's order
    ignored    {key: why it changes nothing here}
    unmatched  keys that are not understood; empty unless they were allowed
    metadata   the file's own text
    """

    def __init__(self, path: Path, allow_unmatched: bool) -> None:
        self.path = path
        self._file = open_container(path)
        try:
            self._open(allow_unmatched)
        except LoraError as error:
            self._file.close()
            raise LoraError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
        except BaseException:
            self._file.close()
            raise

    def _open(self, allow_unmatched: bool) -> None:
        self.metadata: Mapping[str, str] = MappingProxyType(self._file.metadata)
        self.ignored: dict[str, str] = {}
        unmatched: list[str] = []
        grouped: dict[str, dict[str, str]] = {}
        for key in self._file.tensors:
            if (reason := next((why for pattern, why in _ELSEWHERE if re.match(pattern, key)), None)) is not None:
                self.ignored[key] = reason
            elif (split := split_key(key)) is None:
                unmatched.append(key)
            elif split[1] in (roles := grouped.setdefault(split[0], {})):
                raise LoraError(f"{roles[split[1]]} and {key} say the same thing twice; the file holds two LoRAs, remove one")
            else:
                roles[split[1]] = key
        dialect = dialect_of(grouped)
        if dialect is None:
            raise LoraError(
                f"no key ({some(self._file.tensors)}) names a module of HunyuanVideo or Wan; it is of another model or no LoRA"
            )
        self._dialect = dialect
        self.family: str = dialect.family
        self._alphas = read_alphas(self.metadata, self.path)
        parts: dict[str, list[LoraPart]] = {}
        signs: Counter[tuple[str, str, str]] = Counter()
        for name, roles in grouped.items():
            unmatched += self._add(name, roles, parts, signs)
        self.unmatched = tuple(unmatched)
        self.modules: dict[str, LoraModule] = {tensor: LoraModule(tensor, tuple(found)) for tensor, found in parts.items()}
        for module in self.modules.values():
            _check_parts(module)
        self.format = _format_of(signs)
        self._check_family()
        if self.unmatched and not allow_unmatched:
            raise LoraError(
                f"{len(self.unmatched)} of {len(self._file.tensors)} keys belong to no module of {self.family} "
                f"({some(self.unmatched)}); check that the LoRA is for this model, or allow unmatched keys to leave them out"
            )
        if not self.modules:
            raise LoraError("it changes nothing of this network; it is empty or of another model")

    def _add(
        self, name: str, roles: dict[str, str], parts: dict[str, list[LoraPart]], signs: Counter[tuple[str, str, str]]
    ) -> list[str]:
        """Sort one stored module into `parts`; gives its keys back that are not understood."""
        tensors = {role: StoredTensor(self._file, key) for role, key in roles.items()}
        left = dict(roles)
        if (parameter := find_parameter(name, self._dialect)) is not None:
            for given in [role for role in ("diff_m", "diff") if role in left]:
                parts.setdefault(parameter, []).append(LoraPart(left.pop(given), DIFFERENCE, {"value": tensors[given]}))
        found = find(name, self._dialect)
        if found is None:
            if has_no_parameters(name, self._dialect):
                for role in [
                    role for role in left if role in ("diff", "diff_b") and not bool(tensors[role].read().float().any())
                ]:
                    self.ignored[left.pop(role)] = "a difference of zero for a layer without parameters"
            return list(left.values())
        prefix, target = found

        def add(leaf: str, form: str, used: Mapping[str, StoredTensor], scale: float = 1.0) -> None:
            part = LoraPart(name, form, used, scale, None, target.swapped)
            rows = None
            if target.parts > 1:
                length = part.shape[0]
                # The last part of four is single blocks' MLP, four times as wide as q, k and v are.
                wide = target.part == 3 and target.parts == 4
                width = (part.shape[1] if leaf == "weight" else length // 4) if wide else length
                rows = (target.part * width, length)
            parts.setdefault(f"{target.module}.{leaf}", []).append(LoraPart(name, form, used, scale, rows, target.swapped))

        form = next((form for sign, form in _MARKERS if any(role.startswith(sign) for role in left)), None)
        scale = 1.0
        if form is not None:
            needed = next((names for names in _REQUIRED[form] if all(n in left for n in names)), None)
            if needed is None:
                raise LoraError(
                    f"{name} has {', '.join(sorted(left.values()))} but not all the tensors of a {form} adapter; "
                    "the file is damaged or was cut"
                )
            used = {role: tensors[role] for role in left if role in needed or role in _OPTIONAL[form]}
            # PEFT's patterns are for the module's own name, or for one with what was wrapped before it.
            scale = self._scale((name[len(prefix) :], name.removeprefix("base_model.model.")), form, needed, used)
            core = {role: tensor for role, tensor in used.items() if role not in ("alpha", "up_bias")}
            add("weight", form, core, scale)
            if "up_bias" in used:
                add("bias", DIFFERENCE, {"value": used["up_bias"]}, scale)
            down = re.search(r"lora_?\.?[A-Za-z]+", left.get("down", ""))
            signs[target.naming, prefix, down[0] if down else form] += 1
            for role in used:
                del left[role]
        for role, leaf, kind in (("diff", "weight", DIFFERENCE), ("diff_b", "bias", DIFFERENCE), ("set", "weight", REPLACEMENT)):
            if role in left:
                add(leaf, kind, {"value": tensors[role]})
                signs[target.naming, prefix, role] += 1
                del left[role]
        if "alpha" in left and len(roles) == 1:
            self.ignored[left.pop("alpha")] = "an alpha without a LoRA"
        return list(left.values())

    def _scale(self, names: tuple[str, ...], form: str, needed: tuple[str, ...], used: Mapping[str, StoredTensor]) -> float:
        """alpha / rank; 1 where no alpha is stored, or where LyCORIS' LoKr has no rank because both its matrices are whole."""
        down = {LOW_RANK: "down", LOHA: "hada_w1_b"}.get(form, "lokr_w2_b" if "lokr_w2_b" in needed else "lokr_w1_b")
        rank = used[down].shape[0] if down in used and used[down].shape else None
        if rank == 0:
            raise LoraError(f"{used[down].key} {list(used[down].shape)} has rank 0; the file is damaged")
        if "alpha" in used:
            stored = used["alpha"]
            if math.prod(stored.shape) != 1:
                raise LoraError(f"{stored.key} should be one number and is {list(stored.shape)}; the file is damaged")
            alpha = float(stored.read().float().reshape(()))
            return 1.0 if rank is None else ratio(alpha, rank, stored.key)
        return 1.0 if self._alphas is None else self._alphas.scale(names, rank)

    def _check_family(self) -> None:
        """Refuse a LoRA that says of itself that it is of another model with the same names; warn of one that looks so."""
        for key in ("modelspec.architecture", "ss_base_model_version"):
            said = self.metadata.get(key, "").lower()
            families = {HUNYUAN_VIDEO: ("hunyuan",), WAN: ("wan",)}
            if said and any(word in said for word in _OTHER_MODELS) and not any(w in said for w in families[self.family]):
                raise LoraError(f"its metadata says it was trained for {self.metadata[key]!r} ({key}), not for {self.family}")
        numbers: dict[str, set[int]] = {}
        for tensor in self.modules:
            if found := re.match(r"(double|single)_blocks\.(\d+)\.", tensor):
                numbers.setdefault(found[1], set()).add(int(found[2]))
        if numbers == {"double": set(range(19)), "single": set(range(38))}:
            warnings.warn(
                f"{self.path} changes 19 double and 38 single blocks, as many as Flux has, which shares its names with "
                "HunyuanVideo (20 and 40): check that it is for HunyuanVideo",
                AccVideoWarning,
                stacklevel=4,
            )

    @property
    def parts(self) -> int:
        """How many stored modules are applied."""
        return sum(len(module.parts) for module in self.modules.values())

    def not_finite(self) -> list[str]:
        """Keys of tensors with NaN or infinities, each with how many; reads the whole file."""
        counts = {key: count_not_finite(self._file.read(key)) for key in self._file.tensors}
        return [f"{key} ({count} values)" for key, count in counts.items() if count]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Lora:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


_OTHER_MODELS = ("flux", "stable-diffusion", "sdxl", "sd3", "hunyuan", "wan", "ltx", "qwen", "cogvideo", "mochi", "chroma")


def read_lora(path: str | Path, allow_unmatched: bool = False) -> Lora:
    """Open a LoRA in any of the known formats: safetensors, PyTorch's .pt or .bin, or a PEFT folder with its adapter_model.

    allow_unmatched  leave keys that belong to no module of the network in `.unmatched` instead of refusing the file
    Raises LoraError for a file that is missing, damaged, of another model, or holds keys that are not understood.
    """
    path = Path(path)
    if path.is_dir():
        inside = adapter_file(path)
        if inside is None:
            raise LoraError(f"{path} is a folder without {PEFT_FILES[0]}; name one LoRA file")
        path = inside
    try:
        return Lora(path, allow_unmatched)
    except CheckpointError as error:
        raise LoraError(f"cannot read the LoRA: {error}") from error


def lora_files(path: Path) -> list[Path]:
    """What is read of a LoRA and may not be written over: what was named, the file of a PEFT folder, the settings beside it."""
    file = adapter_file(path) or path
    return [path, file, *([file.with_name("adapter_config.json")] if file.name in PEFT_FILES else [])]


def split_key(key: str) -> tuple[str, str] | None:
    """(module as the file names it, role) of a stored key; None for a suffix that no known adapter has."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    return found[1], next(role for i, (_, role) in enumerate(SUFFIXES) if found[i + 2] is not None)


def _check_parts(module: LoraModule) -> None:
    """Factors and magnitudes must fit each other, and two stored modules must not both be the whole, or the same rows, of one
    tensor in the same form."""
    for i, part in enumerate(module.parts):
        assert part.shape
        if part.has_magnitude:
            part.magnitude_by_row()
        for other in module.parts[:i]:
            if part.source != other.source and (part.rows is None or other.rows is None or part.rows == other.rows):
                raise LoraError(f"{other.source} and {part.source} both change {module.tensor}; the file holds two LoRAs")


def _format_of(signs: Counter[tuple[str, str, str]]) -> str:
    counted: Counter[str] = Counter()
    for sign, n in signs.items():
        fits = (f for f in _FORMATS if all(a is None or a == b for a, b in zip(f[:3], sign, strict=True)))
        counted[next(fits, _FORMATS[-1])[3]] += n
    # Names that every naming shares say little: a file with any of ComfyUI's or diffusers' own is theirs.
    if not counted:
        return "parameters"
    return max(counted, key=lambda name: (name not in ("original", "diffusion-pipe"), counted[name]))


def describe(path: str | Path, values: bool = False) -> dict[str, Any]:
    """What a LoRA file is, from its header and its scalars: for `accvideo inspect`. "problems" is empty for one that can be
    applied whole. LoraError if it cannot be read at all.

    values  also read every tensor and look for NaN and infinities
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AccVideoWarning)
        lora = read_lora(path, allow_unmatched=True)
    with lora:
        parts = [part for module in lora.modules.values() for part in module.parts]
        ranks = Counter(part.rank for part in parts if part.rank is not None)
        scales = Counter(round(part.scale, 6) for part in parts if part.form in _REQUIRED)
        dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for part in parts for tensor in part.tensors.values())
        problems = [f"{len(lora.unmatched)} keys are not understood: {some(lora.unmatched)}"] if lora.unmatched else []
        if values and (broken := lora.not_finite()):
            problems.append(f"{len(broken)} tensors have NaN or infinite values: {some(broken)}")
        return {
            "file": str(lora.path),
            "bytes": lora.path.stat().st_size,
            "kind": "lora",
            "format": lora.format,
            "family": lora.family,
            "tensors_changed": len(lora.modules),
            "forms": dict(Counter(part.form + (" with DoRA" if part.has_magnitude else "") for part in parts)),
            "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
            "scales": {str(scale): count for scale, count in sorted(scales.items())},
            "dtypes": dict(dtypes),
            "blocks": block_counts(lora),
            "ignored": dict(lora.ignored),
            "unmatched": list(lora.unmatched),
            "metadata": dict(lora.metadata),
            "problems": [*problems, *(str(warning.message) for warning in caught)],
        }


def block_counts(lora: Lora) -> dict[str, int]:
    """{kind of block: how many blocks the LoRA changes}; "other" counts tensors outside of blocks."""
    blocks: dict[str, set[str]] = {}
    for tensor in lora.modules:
        found = re.match(r"(\w*blocks)\.(\d+)\.", tensor)
        blocks.setdefault(found[1] if found else "other", set()).add(found[2] if found else tensor)
    return {kind: len(members) for kind, members in blocks.items()}
