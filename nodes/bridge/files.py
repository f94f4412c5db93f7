"""ComfyUI's folders: what lies in them under which name, and where what a user names is to be written."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import comfy.utils
import folder_paths
import torch

from ...accvideo_core.errors import AccVideoError, CheckpointError, InvalidValueError, LoraError


def diffusion_model_files() -> list[str]:
    """Names of the weight files in ComfyUI's `diffusion_models` folders: those it lists, and GGUF files and indices of shards."""
    names = folder_paths.get_filename_list("diffusion_models")
    for folder in map(Path, folder_paths.get_folder_paths("diffusion_models")):
        names = [
            *names,
            *(str(path.relative_to(folder)) for path in sorted(_files(folder)) if path.name.lower().endswith(_LISTED_TOO)),
        ]
    return list(dict.fromkeys(names))


_LISTED_TOO = (".gguf", ".safetensors.index.json", ".bin.index.json")


def _files(folder: Path) -> Iterator[Path]:
    """Every file below, also in linked folders, as in ComfyUI's own lists; a link to a folder that it lies in is passed over."""
    above: dict[str, tuple[str, ...]] = {}
    for root, folders, names in os.walk(folder, followlinks=True):
        chain = (*above.pop(root, ()), os.path.realpath(root))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) not in chain]
        above |= {os.path.join(root, name): chain for name in folders}
        yield from (Path(root, name) for name in names)


def diffusion_model_path(name: str) -> Path:
    """Where a file of `diffusion_model_files()` lies; CheckpointError when there is none of that name."""
    return _listed_path("diffusion_models", name, CheckpointError)


def _listed_path(kind: str, name: str, error: type[AccVideoError]) -> Path:
    path = folder_paths.get_full_path(kind, name) if isinstance(name, str) else None  # null: a list that was empty when saved
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(kind))
        raise error(f"no file {name!r} in ComfyUI's {kind} folders; put it into one of {folders} and refresh")
    return Path(path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A weight file as ComfyUI's own loaders read it: memory-mapped where it can, so that weights are not held twice."""
    return comfy.utils.load_torch_file(str(path), safe_load=True)


def lora_files() -> list[str]:
    """Names, as ComfyUI lists them, of the files in its `loras` folders."""
    return folder_paths.get_filename_list("loras")


def lora_path(name: str) -> Path:
    """Where a file of `lora_files()` lies; LoraError when there is none of that name."""
    return _listed_path("loras", name, LoraError)


def model_output(kind: str, name: str) -> tuple[Path, str]:
    """(file to write, its name in ComfyUI's list) for a `name` a user chose, in ComfyUI's folder of that kind (loras, ...).

    The ending .safetensors is added. Raises InvalidValueError for a name that leads out of the folder, is none, or is that of
    a file in another of ComfyUI's folders of that kind: under one name ComfyUI loads the first it finds.
    """
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(kind)]
    folder = next((folder for folder in folders if folder.name == kind), folders[0])
    path = inside(folder, name)
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    listed = str(path.relative_to(folder))
    found = folder_paths.get_full_path(kind, listed)
    if found is not None and Path(found).resolve() != path.resolve():
        raise InvalidValueError(
            f"{name!r} would be {path}, but there is {found}, too, and ComfyUI finds only one of them; write another name"
        )
    return path, listed


def inside(folder: Path, name: str) -> Path:
    """A file or folder of that name in a folder; InvalidValueError for a name that leads out of it or is none."""
    parts = [part.strip() for part in name.replace("\\", "/").split("/")]
    path = folder.joinpath(*parts)
    if any(part in ("", ".", "..") or set(part) & set(':*?"<>|\0') for part in parts):
        raise InvalidValueError(f"{name!r} is no name for a file in {folder}; write one like my_file or subfolder/my_file")
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise InvalidValueError(f"{name!r} leads out of {folder}; write a name inside it")
    return path


def input_files(suffixes: Iterable[str]) -> list[str]:
    """Names of the files in ComfyUI's input folder that end so, as its lists show them."""
    folder = Path(folder_paths.get_input_directory())
    paths = (path for path in _files(folder) if path.suffix.lower() in suffixes and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def input_path(name: str) -> Path:
    """Where a file of `input_files` lies; InvalidValueError when there is none of that name."""
    folder = Path(folder_paths.get_input_directory())
    given = Path(str(name))  # null: a list that was empty when the workflow was saved
    path = folder / given
    if given.anchor or ".." in given.parts:
        raise InvalidValueError(f"{name!r} leads out of {folder}; write a name inside it")
    if not path.is_file():
        raise InvalidValueError(f"no file {name!r} in ComfyUI's input folder; put it into {folder} and refresh")
    return path


def synvid_path(name: str) -> Path:
    """The folder of a dataset or plan: a name in ComfyUI's output folder, `synvid/` there, or in a folder that
    extra_model_paths.yaml lists under `synvid`, which goes before. A whole path may be given if it is inside one of them.

    Raises InvalidValueError for a name that leads out of them or is none.
    """
    folders = [Path(folder) for folder in folder_paths.folder_names_and_paths.get("synvid", ([],))[0]]
    folders.append(Path(folder_paths.get_output_directory(), "synvid"))
    if Path(name).is_absolute():
        home = next((folder for folder in folders if Path(name).is_relative_to(folder)), None)
        if home is None:
            raise InvalidValueError(f"{name!r} is in none of {', '.join(map(str, folders))}; write a name inside the first")
        return inside(home, str(Path(name).relative_to(home)))
    paths = [inside(folder, name) for folder in folders]
    return next((path for path in paths if path.is_dir()), paths[0])


def preview_file(suffix: str) -> tuple[Path, dict[str, str]]:
    """A new file in ComfyUI's temporary folder, and how its front end and HTTP clients are told of it."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    name = f"accvideo_{uuid.uuid4().hex[:16]}{suffix}"
    return folder / name, {"filename": name, "subfolder": "", "type": "temp"}
