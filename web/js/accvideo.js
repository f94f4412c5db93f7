// What a node shows after it ran: AccVideo Sampler its speed, AccVideo SynVid Writer its dataset, AccVideo Compare a slider
// over two videos. Everything here only looks: without this file the nodes work just the same.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const TEXTS = {
  en: {
    speed: (t) => `${t.steps} steps, ${seconds(t.seconds / t.steps)} each, ${seconds(t.seconds)} in all`,
    teacher: (t, all, times) => `its teacher's ${t.teacher_steps} steps would take about ${seconds(all)}: ${times} times as long`,
    warning: (w) => w.text.charAt(0).toUpperCase() + w.text.slice(1),
    attention: (names) => `attention by ${names}`,
    dataset: (d) => `${d.samples.toLocaleString("en")} samples, ${bytes(d.bytes)} of latents`,
    divider: "Drag to compare",
    play: "Play or pause",
  },
  zh: {
    speed: (t) => `${t.steps} 步，每步 ${seconds(t.seconds / t.steps)}，共 ${seconds(t.seconds)}`,
    teacher: (t, all, times) => `教师模型 ${t.teacher_steps} 步约需 ${seconds(all)}，是其 ${times} 倍`,
    warning: (w) => CHINESE_WARNINGS[w.about]?.(w) ?? w.text,
    attention: (names) => `注意力：${names}`,
    dataset: (d) => `${d.samples.toLocaleString("zh")} 个样本，潜变量 ${bytes(d.bytes)}`,
    divider: "拖动以比较",
    play: "播放或暂停",
  },
};

// What nodes/advice.py says, in Chinese.
const CHINESE_WARNINGS = {
  family: (w) => `所选系列 ${w.family} 与模型 ${w.kind} 不符，求解器和调度不同；请选择该模型的系列`,
  steps: (w) => `该学生模型为 ${w.own} 步蒸馏，现以 ${w.steps} 步采样；请将步数设为 ${w.own}`,
  shift: (w) => `该学生模型按 shift ${w.own} 蒸馏，现为 ${w.shift}；请将 shift 设为 ${w.own}`,
  cfg: (w) => `cfg 为 ${w.cfg}，而学生模型不需要：耗时加倍，颜色过硬；请将 cfg 设为 1`,
  guidance: (w) => `微型模型只用引导 ${w.own} 训练过，现为 ${w.guidance}；请设为 ${w.own}`,
  teacher: (w) => `这是教师模型，需要 ${w.own} 步，现以 ${w.steps} 步采样；请将步数设为 ${w.own}，或加载其学生模型`,
};

const texts = () => TEXTS[app.extensionManager?.setting?.get("Comfy.Locale")?.split("-")[0]] ?? TEXTS.en;

function seconds(value) {
  if (value < 10) return `${value.toPrecision(2)} s`;
  return value < 120 ? `${value.toFixed(1)} s` : `${(value / 60).toFixed(1)} min`;
}

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(value, 1)) / 3));
  return `${(value / 1000 ** power).toPrecision(3)} ${units[power]}`;
}

const url = ({ filename, subfolder, type }) => api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);

function element(tag, style, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  Object.assign(made.style, style);
  return made;
}

const SMALL = { font: "12px/1.4 sans-serif", color: "var(--input-text, #ddd)", overflow: "hidden" };

function speed(told) {
  const box = element("div", SMALL, { className: "accvideo-speed" });
  if (!told.steps || !told.seconds) return [box, 0];
  const all = (told.seconds / told.calls) * told.teacher_calls;
  box.append(element("div", {}, { textContent: texts().speed(told) }));
  const times = (all / told.seconds).toFixed(1).replace(/\.0$/, "");
  if (Number(times) > 1) {
    box.append(element("div", {}, { textContent: texts().teacher(told, all, times) }));
  }
  const names = Object.keys(told.attention ?? {}).join(" + ");
  if (names) box.append(element("div", {}, { textContent: texts().attention(names) }));
  const warnings = told.warnings ?? [];
  for (const warning of warnings) {
    const style = { color: "var(--warning-text, #f0b040)" };
    box.append(element("div", style, { className: "accvideo-warning", textContent: `⚠ ${texts().warning(warning)}` }));
  }
  return [box, 90 + 54 * warnings.length];
}

function dataset(told) {
  const box = element("div", { ...SMALL, display: "flex", gap: "8px", alignItems: "center" }, { className: "accvideo-dataset" });
  if (told.thumbnail) box.append(element("img", { height: "64px" }, { src: url(told.thumbnail), alt: "" }));
  box.append(element("div", {}, { textContent: texts().dataset(told) }));
  return [box, 76];
}

// The second video lies over the first and is cut off left of the divider. The longer one is the clock: the other follows it,
// and holds its last frame as in the video side by side.
function slider(...files) {
  const shown = files.filter((file) => file.role !== "both");
  const box = element("div", { ...SMALL, display: "flex", flexDirection: "column", gap: "4px" }, { className: "accvideo-compare" });
  const stage = element("div", { position: "relative", flex: "1", minHeight: "0", background: "#181818", cursor: "ew-resize" });
  const fill = { position: "absolute", inset: "0", width: "100%", height: "100%", objectFit: "contain" };
  const video = (file) => {
    const made = element("video", fill, { src: url(file), muted: true, playsInline: true, preload: "auto" });
    made.setAttribute("draggable", "false");
    return made;
  };
  const [first, second] = shown.map(video);
  const line = element("div", { position: "absolute", top: "0", bottom: "0", width: "2px", background: "#fff", pointerEvents: "none" });
  const range = element("input", { width: "100%", margin: "0" }, { type: "range", min: 0, max: 100, step: 0.1, value: 50 });
  range.setAttribute("aria-label", texts().divider);
  const captions = element("div", { display: "flex", justifyContent: "space-between", gap: "8px" });
  for (const { label } of shown) captions.append(element("span", {}, { textContent: label }));
  const button = element("button", { cursor: "pointer" }, { type: "button", textContent: "⏯", title: texts().play });
  const foot = element("div", { display: "flex", gap: "4px", alignItems: "center" });

  const place = () => {
    second.style.clipPath = `inset(0 0 0 ${range.value}%)`;
    line.style.left = `${range.value}%`;
  };
  let clock = first;
  const start = () => {
    if (!first.duration || !second.duration) return; // not both are known yet
    const other = second.duration > first.duration ? first : second;
    clock = other === first ? second : first;
    clock.loop = true;
    const follow = () => {
      const time = Math.min(clock.currentTime, other.duration);
      if (Math.abs(other.currentTime - time) > 0.04) other.currentTime = time;
      if (clock.paused) other.pause();
      else if (other.paused && time < other.duration - 0.1) other.play().catch(() => {}); // at its end it would begin anew
    };
    for (const name of ["timeupdate", "seeked", "play", "pause"]) clock.addEventListener(name, follow);
    clock.play().catch(() => {});
  };
  const drag = (event) => {
    if (!(event.buttons & 1)) return;
    event.preventDefault();
    event.stopPropagation();
    const area = stage.getBoundingClientRect();
    range.value = Math.min(100, Math.max(0, ((event.clientX - area.left) / area.width) * 100));
    place();
  };
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    drag(event);
  });
  stage.addEventListener("pointermove", drag);
  range.addEventListener("input", place);
  button.addEventListener("click", () => (clock.paused ? clock.play() : clock.pause()));
  for (const made of [first, second]) made.addEventListener("loadedmetadata", start, { once: true });

  stage.append(first, second, line);
  foot.append(button, range);
  box.append(captions, stage, foot);
  place();
  return [box, 260];
}

const SHOWN = {
  AccVideoSampler: ["accvideo_sampling", speed],
  AccVideoSynVidWriter: ["accvideo_dataset", dataset],
  AccVideoCompare: ["accvideo_compare", slider],
};

function show(node, told, make) {
  const [content, height] = make(...told);
  let widget = node.widgets?.find((it) => it.name === "accvideo");
  if (!widget) {
    const options = { serialize: false, hideOnZoom: false, getMinHeight: () => widget?.accvideoHeight ?? height };
    const holder = element("div", { width: "100%", height: "100%" });
    widget = node.addDOMWidget("accvideo", "accvideo", holder, options);
    widget.serialize = false;
  }
  widget.accvideoHeight = height;
  content.style.height = "100%";
  widget.element.replaceChildren(content);
  const [width, tall] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], tall)]);
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "accvideo",
  nodeCreated(node) {
    const shown = SHOWN[node.comfyClass];
    if (!shown) return;
    const [key, make] = shown;
    const executed = node.onExecuted;
    node.onExecuted = function (output, ...rest) {
      executed?.call(this, output, ...rest);
      const told = output?.[key];
      if (told?.length) show(this, told, make);
    };
  },
});
