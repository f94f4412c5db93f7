"""What holds the house up: the floors of the library, what it may import, what it asks a user to install."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import accvideo_core

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "accvideo_core"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TORCH_FAMILY = {"torch", "torchvision", "torchaudio", "triton", "xformers"}

# From the ground up; a part imports from floors below its own, never from beside it, and from above never.
FLOORS = (
    {"__init__", "errors"},
    {"files", "json_lines", "devices", "progress"},
    {"schedule", "dit", "media", "tiles", "comfy_client", "comfy_workflow"},
    {"sampling", "checkpoint"},
    {"lora", "synvid"},
    {"distill"},
    {"tiny"},
    {"studies", "headless"},
    {"comfy_run", "inspect"},
    {"comfy_queue", "cli"},
    {"__main__"},
)
FLOOR_OF = {part: height for height, parts in enumerate(FLOORS) for part in parts}


def part_of(path: Path) -> str:
    """The file or folder directly below accvideo_core that a source file belongs to."""
    return path.relative_to(CORE).with_suffix("").parts[0]


def imports_of(path: Path, everywhere: bool = True) -> Iterator[str]:
    """Absolute dotted names a source file imports, `from a import b` as a.b; only at module level unless `everywhere`."""
    package = path.relative_to(ROOT).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = () if everywhere else (ast.FunctionDef, ast.AsyncFunctionDef)

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, hidden):
                yield child
                yield from walk(child)

    for node in walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


SOURCES = sorted(CORE.rglob("*.py"))


def core_imports(path: Path, everywhere: bool = True) -> set[str]:
    """Source files of accvideo_core that this one imports, as paths relative to it."""
    found = set()
    for name in imports_of(path, everywhere):
        parts = name.split(".")
        if parts[0] != "accvideo_core":
            continue
        for length in range(len(parts), 0, -1):
            stem = ROOT.joinpath(*parts[:length])
            if (module := stem.with_suffix(".py")).is_file() or (module := stem / "__init__.py").is_file():
                found.add(module.relative_to(CORE).as_posix())
                break
    return found


def test_the_reader_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "accvideo_core" / "wing" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text("import av.error\nfrom . import b\nfrom ..top import c\ndef f():\n    from .inner import d\n")
    top = {"av.error", "accvideo_core.wing.b", "accvideo_core.top.c"}
    assert set(imports_of(path)) == top | {"accvideo_core.wing.inner.d"}
    assert set(imports_of(path, everywhere=False)) == top


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(CORE).as_posix())
def test_floors_import_only_from_below(path: Path) -> None:
    part = part_of(path)
    assert part in FLOOR_OF, f"{part} has no floor: give it one in this test and in the design"
    for imported in core_imports(path):
        below = part_of(CORE / imported)
        assert below == part or FLOOR_OF[below] < FLOOR_OF[part], f"{part} imports {imported}, which is not below it"


def test_no_circles_between_modules() -> None:
    """At module level; inside a wing, too, where the floors do not reach. `from . import x` in a function may look back."""
    graph = {path.relative_to(CORE).as_posix(): core_imports(path, everywhere=False) for path in SOURCES}
    for source, imported in graph.items():
        graph[source] = imported - {source}
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle of imports: {' -> '.join((*trail, module))}"
        if module not in finished:
            for below in graph[module]:
                visit(below, (*trail, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(CORE).as_posix())
def test_third_party_imports_are_declared_and_optional_ones_wait(path: Path) -> None:
    """At module level only what every install has; what an extra brings is imported where it is used."""
    names = {"PIL": "pillow"}
    runtime = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    extras = {canonicalize_name(Requirement(line).name) for lines in PROJECT["optional-dependencies"].values() for line in lines}
    for everywhere, allowed in ((False, runtime), (True, runtime | extras)):
        tops = {name.split(".")[0] for name in imports_of(path, everywhere)} - {"accvideo_core", "__future__"}
        foreign = {canonicalize_name(names.get(top, top)) for top in tops if top not in sys.stdlib_module_names}
        assert foreign <= allowed, f"{foreign - allowed} {'anywhere' if everywhere else 'at module level'}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(CORE).as_posix())
def test_imports_inside_the_library_are_relative(path: Path) -> None:
    """ComfyUI installs the folder under any name, so `accvideo_core` cannot be imported by its own."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").split(".")[0] != "accvideo_core"
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "accvideo_core" for alias in node.names)


def test_importing_the_library_imports_no_comfyui_and_starts_nothing() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
        if path.name != "__main__.py"
    ]
    program = f"""if True:
        import importlib, socket, subprocess, sys
        def refuse(*_, **__): raise AssertionError("network or subprocess at import")
        socket.socket.connect = subprocess.Popen.__init__ = refuse
        for name in {modules}: importlib.import_module(name)
        print(*sys.modules)
    """
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert loaded.isdisjoint({"comfy", "comfy_api", "comfy_extras", "nodes", "folder_paths", "server", "execution"})
    assert loaded.isdisjoint({"matplotlib", "tensorboard", "transformers", "diffusers", "sageattention", "gguf"})


def node_imports(later: bool = False) -> tuple[set[str], set[str]]:
    """What ComfyUI's start brings in: (source files of the pack, other packages), through imports at module level from `nodes/`
    on, and from every package's __init__ on the way. With `later` also what functions of `nodes/` import when they run."""
    files: set[str] = set()
    others: set[str] = set()
    waiting = ["nodes/__init__.py", "accvideo_core/__init__.py"]
    while waiting:
        path = waiting.pop()
        if path in files:
            continue
        files.add(path)
        for name in imports_of(ROOT / path, everywhere=later and path.startswith("nodes/")):
            parts = name.split(".")
            if parts[0] not in ("accvideo_core", "nodes"):
                others.add(parts[0])
                continue
            for length in range(1, len(parts) + 1):
                stem = ROOT.joinpath(*parts[:length])
                for module in (stem.with_suffix(".py"), stem / "__init__.py"):
                    if module.is_file():
                        waiting.append(module.relative_to(ROOT).as_posix())
    return files, others


def test_the_nodes_start_with_little() -> None:
    """ComfyUI waits for every pack: no training, studies, tiny world or command line, and nothing ComfyUI itself lacks."""
    files, others = node_imports()
    assert {"nodes/bridge/sampling.py", "accvideo_core/lora/merge.py", "accvideo_core/synvid/store.py"} <= files
    heavy = ("distill", "studies", "headless", "tiny", "cli.py", "comfy_queue.py", "inspect.py")
    assert [file for file in files if file.startswith(tuple(f"accvideo_core/{part}" for part in heavy))] == []
    comfyui = {"comfy", "comfy_api", "folder_paths", "latent_preview", "node_helpers"}
    its_own = {"torch", "safetensors", "einops", "numpy", "av", "PIL", "tqdm", "aiohttp", "fsspec"}
    for found in (others, node_imports(later=True)[1]):
        assert found - comfyui - its_own - set(sys.stdlib_module_names) == set()


def test_no_module_of_this_run_is_the_repository_root() -> None:
    roots = [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == str(ROOT / "__init__.py")]
    assert roots == []


@pytest.mark.parametrize("arguments", [[], ["."], ["tests/core/test_a.py::test_a"]])
def test_a_test_run_never_imports_the_repository_root(tmp_path: Path, arguments: list[str]) -> None:
    """In a copy of our configuration whose root cannot be imported."""
    root = tmp_path / "pack"
    (root / "tests" / "core").mkdir(parents=True)
    (root / "nodes").mkdir()
    for name, text in {
        "__init__.py": "raise RuntimeError('the root was imported')",
        "nodes/__init__.py": "raise RuntimeError('the nodes were imported')",
        "pyproject.toml": (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        "tests/conftest.py": (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"),
        "tests/core/test_a.py": "def test_a(): pass",
    }.items():
        (root / name).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout


def test_requirements_are_plain_lower_bounds_of_what_comfyui_lacks() -> None:
    runtime = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines and len(lines) == len(set(lines))
    for line in lines:
        requirement = Requirement(line)  # no options, no comments, no includes
        assert not requirement.marker and not requirement.url
        assert [specifier.operator for specifier in requirement.specifier] == [">="], line
        assert canonicalize_name(requirement.name) not in TORCH_FAMILY
        assert requirement.specifier == runtime[canonicalize_name(requirement.name)].specifier


def test_dependencies_have_lower_bounds_and_development_pins_them_all() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"text", "train", "gguf", "sage", "dev"}
    for requirement in map(Requirement, [*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)]):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        assert [specifier.operator for specifier in requirement.specifier] == [">="], requirement
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_versions_agree() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert newest and newest.group(1) == PROJECT["version"] == accvideo_core.__version__


def test_registry_entry() -> None:
    comfy = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["comfy"]
    assert "comfyui" not in PROJECT["name"].lower()
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui"} <= set(comfy)
    assert comfy["Icon"].startswith("https://") or (ROOT / comfy["Icon"]).is_file()
    for ignored in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines():
        kept = ("accvideo_core", "nodes", "web", "locales", "workflows", "__init__.py", "requirements.txt", "pyproject.toml")
        assert ignored.strip("/") not in kept


def published() -> list[Path]:
    """What the registry hands out: the files git knows, less those .comfyignore names."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what is published cannot be listed")

    def listed(*options: str) -> set[str]:
        command = ["git", "-c", "core.quotepath=off", "ls-files", *options]
        return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines())

    return sorted(ROOT / name for name in listed() - listed("--cached", "--ignored", "--exclude-from=.comfyignore"))


def test_what_is_published_is_whole_and_holds_nothing_else() -> None:
    files = {path.relative_to(ROOT).as_posix(): path for path in published()}
    tops = {name.split("/")[0] for name in files}
    parts = {"__init__.py", "nodes", "accvideo_core", "web", "locales", "workflows"}
    papers = {"pyproject.toml", "requirements.txt", "LICENSE", "README.md", "CHANGELOG.md"}
    assert parts | papers <= tops <= parts | papers | {"README_zh.md", "README.zh.md", "docs", ".comfyignore", ".gitignore"}
    assert {path.relative_to(ROOT).as_posix() for path in SOURCES} <= set(files)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    assert max(sizes.values()) < 10e6 and sum(sizes.values()) < 32e6


def test_what_is_published_keeps_the_registrys_standards() -> None:
    """No eval or exec, nothing installed at run time, and sources every Windows console can show."""
    for path in published():
        if path.suffix != ".py":
            continue
        text = path.read_text(encoding="utf-8")
        text.encode("cp1252")
        for node in ast.walk(ast.parse(text)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in {"eval", "exec", "compile", "os.system", "__import__"}, f"{path}:{node.lineno}: {called}"
            words = [it.value for it in ast.walk(node) if isinstance(it, ast.Constant)] if called else []
            assert not {"pip", "install"} <= set(words), f"{path}:{node.lineno}: installs something"


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_a_github_workflow_runs_what_is_there(path: Path) -> None:
    """Its make targets and scripts exist, and no action of others is taken from a branch that can move."""
    yaml = pytest.importorskip("yaml", reason="no PyYAML, which transformers brings")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    steps = [step for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values() for step in job["steps"]]
    assert steps
    for step in steps:
        commands = step.get("run", "")
        assert set(re.findall(r"\bmake ([a-z-]+)", commands)) <= targets
        for file in re.findall(r"\bpython (\S+\.py)", commands) + re.findall(r"\bpytest (\S+)", commands):
            assert (ROOT / file).exists(), file
        owner, _, version = step.get("uses", "actions/").partition("@")
        assert owner.startswith("actions/") or re.fullmatch("[0-9a-f]{40}", version), step["uses"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the workflow runs it on Python 3.12, which has tomllib")
def test_a_release_says_what_the_registry_still_lacks(tmp_path: Path) -> None:
    (tmp_path / ".github").mkdir()
    shutil.copy2(ROOT / ".github" / "check_release.py", tmp_path / ".github")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lacking = re.sub(r"^Icon = .*$", 'Icon = "docs/icon.png"', re.sub(r"^Repository = .*$", "", text, flags=re.M), flags=re.M)
    whole = lacking.replace('"docs/icon.png"', '"https://example.org/icon.png"')
    whole += '[project.urls]\nRepository = "https://example.org/accvideo"\n'
    for content, code, said in ((lacking, 1, "not a web address"), (whole, 0, "new=true")):
        (tmp_path / "pyproject.toml").write_text(content, encoding="utf-8")
        run = subprocess.run([sys.executable, ".github/check_release.py"], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == code and said in run.stdout + run.stderr, run.stdout + run.stderr


@pytest.mark.parametrize(
    "path", [*SOURCES, *sorted((ROOT / "nodes").rglob("*.py"))], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_torch_load_takes_tensors_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("weights_only") == "True", f"line {node.lineno}: a pickle can run code"


DOCUMENTS = [*ROOT.glob("*.md"), *(p for part in ("accvideo_core", "docs", "web") for p in (ROOT / part).rglob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_document_points_at_files_that_exist_and_is_finished(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert not re.findall(r"@[A-Z]{3,}@|TODO|FIXME", text)
    help_pages = ROOT / "web" / "docs"  # ComfyUI takes all they point at from there, those of the other languages too
    folder = help_pages if help_pages in document.parents else document.parent
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith(("http://", "https://")) or (folder / target).exists(), target


def test_the_chinese_readme_says_what_the_english_one_does() -> None:
    """The same headings, commands, links and rows of tables, in the same order."""

    def skeleton(name: str) -> dict[str, list[str]]:
        text = (ROOT / name).read_text(encoding="utf-8")
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        links = set(re.findall(r"\]\(([^)\s]+)\)", prose)) - {"README.md", "README_zh.md"}
        return {
            "code": re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL),
            "headings": re.findall(r"^#+ ", prose, re.MULTILINE),
            "links": sorted(links),
            "rows": [re.sub("、", ", ", row) for row in re.findall(r"^\| (AccVideo[^|]*) \|", prose, re.MULTILINE)],
            "tables": re.findall(r"^\|(?=.*\|$)", prose, re.MULTILINE),
        }

    assert skeleton("README_zh.md") == skeleton("README.md")
