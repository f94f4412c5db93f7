"""The pack in ComfyUI's own page, in headless Chromium: workflows dropped onto the canvas, run from there, and what nodes show.

Skipped, by name, where there is no Chromium (ACCVIDEO_CHROMIUM, or one on the path) or no Playwright. With ACCVIDEO_SCREENSHOTS
set to a folder each test leaves its picture there; `make screenshots` makes those of the documentation so.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.comfyui.model_files import install
from tests.comfyui.server import ROOT, Server, gguf_pack, node

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SECONDS = 240_000  # milliseconds a run may take
# What the front end itself says of a fresh ComfyUI without the internet.
ITS_OWN = ("user.css", "/api/userdata", "graph accessed before initialization", "huggingface.co", "api.comfy.org", "favicon")
READY = (
    "(a => a && ('isGraphReady' in a ? a.isGraphReady : a.graph?.nodes) && document.querySelector('#graph-canvas'))(window.app)"
)
DROP = """([name, data, type]) => {
  const files = new DataTransfer();
  files.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type }));
  const canvas = document.querySelector('#graph-canvas'), box = canvas.getBoundingClientRect();
  const at = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
  for (const kind of ['dragover', 'drop'])
    canvas.dispatchEvent(new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: files, ...at }));
}"""
ALONE = """([name, id]) => {
  app.graph.clear();
  const node = LiteGraph.createNode(name);
  Object.assign(node, { pos: [0, 0], id });  // an id used before brings the values of its node's widgets back
  app.graph.add(node);
  Object.assign(app.canvas.ds, { scale: 1, offset: [600, 200] });
  app.canvas.deselectAll?.();
  app.canvas.setDirty(true, true);
  const canvas = document.querySelector('#graph-canvas').getBoundingClientRect(), title = LiteGraph.NODE_TITLE_HEIGHT;
  return [600 + canvas.x, 200 - title + canvas.y, node.size[0], node.size[1] + title];
}"""
NODES = """() => app.graph.nodes.map((node) => ({
  type: node.type, id: Number(node.id), known: node.type in LiteGraph.registered_node_types, red: !!node.has_errors }))"""


def chromium() -> str:
    named = os.environ.get("ACCVIDEO_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("no Chromium: install it, or set ACCVIDEO_CHROMIUM")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        running = playwright.chromium.launch(executable_path=chromium(), args=options)
        yield running
        running.close()


class Page:
    """ComfyUI's page, and the errors it has said since `open`."""

    def __init__(self, browser: Any, server: Server) -> None:
        self.server, self.errors = server, list[str]()
        self.page = browser.new_page(viewport={"width": 1920, "height": 1080})
        self.page.set_default_timeout(120_000)
        self.page.on("console", lambda it: it.type == "error" and self._note(f"{it.text} {it.location.get('url', '')}"))
        self.page.on("pageerror", lambda it: self._note(str(it)))

    def _note(self, error: str) -> None:
        if not any(own in error for own in ITS_OWN):
            self.errors.append(error)

    def set(self, name: str, value: Any) -> None:
        """A setting, for every page opened from now on."""
        body = json.dumps(value).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.server.url}/settings/{name}", body, method="POST")).close()

    def open(self, **settings: Any) -> None:
        for name, value in {"Comfy.TutorialCompleted": True, "Comfy.Locale": "en", **settings}.items():
            self.set(name, value)
        self.page.goto(self.server.url)
        self.page.wait_for_function(READY)
        self.page.wait_for_timeout(1500)  # it loads its own default workflow
        self.page.keyboard.press("Escape")
        self.errors.clear()

    def load(self, name: str) -> list[dict[str, Any]]:
        """Drop a shipped workflow."""
        return self.drop(ROOT / "workflows" / f"{name}.json", "application/json", len(shipped(name)))

    def drop(self, path: Path, kind: str, expected: int) -> list[dict[str, Any]]:
        """Drop a file onto the canvas; the nodes, once as many are there as expected."""
        self.page.evaluate(DROP, [path.name, base64.b64encode(path.read_bytes()).decode(), kind])
        self.page.wait_for_function(f"app.graph.nodes.length === {expected}")
        self.page.wait_for_timeout(500)
        return self.page.evaluate(NODES)

    def run(self) -> None:
        self.page.keyboard.press("Control+Enter")

    def picture(self, name: str) -> None:
        if folder := os.environ.get("ACCVIDEO_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder, self.server.checkout.name, f"{name}.png"))


@pytest.fixture
def page(browser: Any, server: Server, weights: Path) -> Iterator[Page]:
    install(server.base, weights)  # the page marks a node red whose file is not there
    made = Page(browser, server)
    yield made
    made.page.close()


def shipped(name: str) -> list[dict[str, Any]]:
    """The nodes of a shipped workflow."""
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))["nodes"]


def history(server: Server) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.url}/history") as answer:
        return json.load(answer)


def see_help(page: Page, help_page: Path) -> None:
    """Open the help panel of an AccVideo Sampler: it shows that file, and the picture in it."""
    page.page.evaluate(ALONE, ["AccVideoSampler", 1])
    page.page.evaluate("app.canvas.selectNode(app.graph.nodes[0])")
    page.page.get_by_test_id("info-button").click()
    page.page.wait_for_function("document.querySelector('.node-help-content img')?.naturalWidth > 0")
    shown = page.page.locator(".node-help-content").first
    assert f"# {shown.locator('h1').inner_text()}" == help_page.read_text(encoding="utf-8").splitlines()[0]
    assert shown.locator("img").get_attribute("src").endswith("/extensions/accvideo/docs/img/AccVideoSampler.png")
    assert shown.locator("td").count() > 10
    page.set("Comfy.RightSidePanel.IsOpen", False)  # it would stay open for the next page


def test_every_workflow_loads_by_drag_and_drop(page: Page) -> None:
    page.open()
    for path in WORKFLOWS:
        if "gguf" in path.stem and gguf_pack() is None:
            continue  # its nodes are another pack's
        expected, nodes = shipped(path.stem), page.load(path.stem)
        assert sorted((it["type"], it["id"]) for it in nodes) == sorted((it["type"], it["id"]) for it in expected), path
        assert all(it["known"] and not it["red"] for it in nodes), path
        assert page.page.locator("[role=dialog]:visible").count() == 0, f"{path} opens a dialog"
        page.picture(path.stem)
    assert page.errors == []


def test_every_node_is_drawn_and_its_help_shows_its_picture(page: Page) -> None:
    """The pictures of the help pages are made here, where screenshots are wanted."""
    page.open()
    folder = os.environ.get("ACCVIDEO_SCREENSHOTS")
    names = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))
    assert names == sorted(
        page.page.evaluate("Object.keys(LiteGraph.registered_node_types).filter((it) => /^AccVideo(?!Test)/.test(it))")
    )
    for number, name in enumerate(names, 1000):
        x, y, width, height = page.page.evaluate(ALONE, [name, number])
        page.page.wait_for_timeout(300)
        assert width > 150 and height > 40
        if folder:
            area = {"x": x - 10, "y": y - 28, "width": width + 20, "height": height + 38}
            target = Path(folder, page.server.checkout.name, "nodes", f"{name}.png")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(page.page.screenshot(clip=area))).convert("P", palette=Image.Palette.ADAPTIVE).save(target)
        for text in (f"{name}.md", f"{name}/zh.md"):
            address = f"/extensions/accvideo/docs/{text}"
            page_text = page.page.evaluate("(address) => fetch(address).then((it) => it.text())", address)
            assert f"](img/{name}.png)" in page_text
        loads = "(address) => fetch(address).then((it) => it.ok && it.headers.get('content-type'))"
        assert page.page.evaluate(loads, f"/extensions/accvideo/docs/img/{name}.png") == "image/png"
    assert page.errors == []
    see_help(page, ROOT / "web" / "docs" / "AccVideoSampler.md")


def test_a_run_from_the_page_plays_and_its_file_brings_the_workflow_back(page: Page) -> None:
    before = set(history(page.server))
    page.open()
    page.load("accvideo_tiny_t2v")
    page.page.evaluate(
        "app.graph.nodes.find((it) => it.type === 'AccVideoSampler').widgets.find((it) => it.name === 'seed').value = 99"
    )
    page.run()
    video = page.page.locator("video").first
    video.wait_for(state="attached", timeout=SECONDS)
    page.page.wait_for_function(
        "[...document.querySelectorAll('video')].some((it) => it.readyState >= 2 && it.videoWidth === 64)"
    )
    said = page.page.locator(".accvideo-speed").first.inner_text()
    assert said.startswith("5 steps, ") and "50 steps would take about" in said and "10 times as long" in said
    page.picture("run")
    (run,) = set(history(page.server)) - before
    saved = next(it for shown in history(page.server)[run]["outputs"].values() for it in shown.get("images", []))
    page.load("accvideo_tiny_compare")
    video_file = page.server.base / "output" / saved["subfolder"] / saved["filename"]
    nodes = page.drop(video_file, "video/mp4", len(shipped("accvideo_tiny_t2v")))
    assert {it["type"] for it in nodes} >= {"AccVideoTinyModels", "AccVideoSampler", "SaveVideo"}
    seeds = "app.graph.nodes.find((it) => it.type === 'AccVideoSampler').widgets.find((it) => it.name === 'seed').value"
    assert page.page.evaluate(seeds) == 99
    assert page.errors == []


def test_the_slider_compares_two_videos_on_one_clock(page: Page) -> None:
    page.open()
    compare_by_slider(page, "slider")
    boxes = page.page.evaluate("app.graph.nodes.map((node) => [node.title, ...node.pos, ...node.size])")
    for (one, x, y, w, h), (other, left, top, width, height) in itertools.combinations(boxes, 2):  # previews have grown in them
        apart = x + w <= left or left + width <= x or y + h <= top or top + height <= y
        assert apart, f"{one} and {other} lie on each other"


def test_the_shorter_video_holds_its_last_frame_until_both_begin_anew(page: Page, tmp_path: Path) -> None:
    frames = {name: node("EmptyImage", width=64, height=64, batch_size=count, color=255) for name, count in (("1", 24), ("2", 4))}
    prompt = frames | {"3": node("AccVideoCompare", first=["1", 0], second=["2", 0], fps=8.0)}
    (tmp_path / "lengths.json").write_text(json.dumps(prompt))
    page.open()
    page.drop(tmp_path / "lengths.json", "application/json", len(prompt))
    page.run()
    page.page.wait_for_selector(".accvideo-compare video", state="attached", timeout=SECONDS)
    one, other = (f"document.querySelectorAll('.accvideo-compare video')[{i}]" for i in (0, 1))
    for _ in range(2):
        page.page.wait_for_function(f"{one}.currentTime > 1 && {one}.currentTime < 2")
        assert page.page.evaluate(f"[{other}.currentTime, {other}.duration]") == [0.5, 0.5]
        page.page.wait_for_function(f"{one}.currentTime < 0.4 && !{other}.paused && {other}.currentTime < 0.45")
    assert page.errors == []


def test_in_nodes_2_few_inputs_show_and_the_slider_works(page: Page) -> None:
    """The page of newer versions can draw nodes as elements instead of on its canvas; what few need then shows on demand."""
    version = json.load(urllib.request.urlopen(f"{page.server.url}/system_stats"))["system"]["comfyui_version"]
    if version == "0.3.64":
        pytest.skip("the page of ComfyUI 0.3.64 draws nodes on its canvas")
    page.set("Comfy.VueNodes.Enabled", True)
    try:
        page.open()
        page.page.evaluate(ALONE, ["AccVideoSampler", 1])
        button = page.page.get_by_test_id("advanced-inputs-button")
        shown = ["seed", "family", "steps", "shift", "guidance"]
        for labels in (shown, [*shown, "cfg", "denoise"], shown):
            count = "(count) => document.querySelectorAll('[data-testid=node-widget]').length === count"
            page.page.wait_for_function(count, arg=len(labels))
            widgets = page.page.get_by_test_id("node-widget").all_inner_texts()
            assert [it.split("\n")[0] for it in widgets] == labels
            button.click()
        compare_by_slider(page, "slider-2")
    finally:
        page.set("Comfy.VueNodes.Enabled", False)


def compare_by_slider(page: Page, picture: str) -> None:
    page.load("accvideo_tiny_compare")
    page.run()
    page.page.wait_for_selector(".accvideo-compare video", state="attached", timeout=SECONDS)
    videos = "[...document.querySelectorAll('.accvideo-compare video')]"
    page.page.wait_for_function(f"{videos}.every((it) => it.currentTime > 0)")
    page.page.wait_for_timeout(1500)
    one, other, length = page.page.evaluate(f"[...{videos}.map((it) => it.currentTime), {videos}[0].duration]")
    assert min(abs(one - other), length - abs(one - other)) < 0.15  # one may have begun anew a moment before the other
    captions = page.page.locator(".accvideo-compare span").all_inner_texts()
    assert captions[0].startswith("teacher, 50 steps, ") and captions[1].endswith(" times faster")
    cut = "document.querySelector('.accvideo-compare video:nth-of-type(2)').style.clipPath"
    assert "50%" in page.page.evaluate(cut)
    stage = page.page.locator(".accvideo-compare video").first.bounding_box()
    middle = stage["y"] + stage["height"] / 2
    page.page.mouse.move(stage["x"] + stage["width"] * 0.5, middle)
    page.page.mouse.down()
    page.page.mouse.move(stage["x"] + stage["width"] * 0.25, middle, steps=5)
    page.page.mouse.up()
    share = float(page.page.evaluate(cut).rsplit(" ", 1)[-1].rstrip("%)"))
    assert 20 < share < 30
    page.page.locator(".accvideo-compare button").click()
    page.page.wait_for_function(f"{videos}.every((it) => it.paused)")  # the second pauses upon the event of the first
    page.picture(picture)
    assert page.errors == []


@pytest.mark.parametrize(
    ("locale", "seed", "warning"),  # the same seed again would be answered from ComfyUI's cache, and nothing runs
    [
        ("en", 880, "⚠ This student was distilled for 5 steps and is sampled in 8: more take longer"),
        ("zh", 881, "⚠ 该学生模型为 5 步蒸馏，现以 8 步采样"),
    ],
)
def test_a_student_at_other_steps_is_warned_of_in_the_node(page: Page, locale: str, seed: int, warning: str) -> None:
    page.open(**{"Comfy.Locale": locale})
    try:
        page.load("accvideo_tiny_t2v")
        page.page.evaluate(
            """(values) => {
              const { widgets } = app.graph.nodes.find((it) => it.type === 'AccVideoSampler');
              for (const [name, value] of Object.entries(values)) widgets.find((it) => it.name === name).value = value;
            }""",
            {"steps": 8, "seed": seed},
        )
        page.run()
        box = page.page.locator(".accvideo-warning")
        box.wait_for(state="attached", timeout=SECONDS)
        assert box.inner_text().startswith(warning)
        page.picture(f"warning-{locale}")
        assert page.errors == []
    finally:
        page.open(**{"Comfy.Locale": "en"})


def test_the_writer_shows_its_dataset(page: Page) -> None:
    page.open()
    page.load("accvideo_tiny_synvid")
    page.run()
    box = page.page.locator(".accvideo-dataset")
    box.wait_for(state="attached", timeout=SECONDS)
    assert "1 samples, 51.2 kB of latents" in box.inner_text()
    page.page.wait_for_function("document.querySelector('.accvideo-dataset img').naturalWidth > 0")
    page.picture("dataset")
    assert page.errors == []


def test_without_the_extension_everything_runs(page: Page) -> None:
    page.open(**{"Comfy.Extension.Disabled": ["accvideo"]})
    try:
        page.load("accvideo_tiny_compare")
        before = set(history(page.server))
        page.page.evaluate(
            "app.graph.nodes.filter((it) => it.type === 'AccVideoSampler').forEach((it) => (it.widgets[0].value = 4321))"
        )
        page.run()
        page.page.wait_for_function("[...document.querySelectorAll('video')].some((it) => it.readyState >= 2)", timeout=SECONDS)
        (run,) = set(history(page.server)) - before
        assert history(page.server)[run]["status"]["status_str"] == "success"
        assert page.page.locator("[class^=accvideo]").count() == 0
        assert page.errors == []
    finally:
        page.open(**{"Comfy.Extension.Disabled": []})


def test_nodes_speak_chinese(page: Page) -> None:
    chinese = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    page.open(**{"Comfy.Locale": "zh"})
    try:
        made = page.page.evaluate(
            """() => {
              const node = LiteGraph.createNode('AccVideoSampler');
              app.graph.add(node);
              const names = [...node.widgets, ...node.inputs].map((it) => it.label ?? it.localized_name ?? it.name);
              return [node.title, names];
            }"""
        )
        assert made[0] == chinese["AccVideoSampler"]["display_name"]
        assert {it["name"] for it in chinese["AccVideoSampler"]["inputs"].values()} <= set(made[1])
        page.picture("chinese")
        see_help(page, ROOT / "web" / "docs" / "AccVideoSampler" / "zh.md")
    finally:
        page.open(**{"Comfy.Locale": "en"})
