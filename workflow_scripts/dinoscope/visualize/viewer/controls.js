/* Pointer, wheel, keys, and the bar at the top. */

const CLICK_PX = 4;

/** Moves and zooms the camera with the pointer, two fingers, or the wheel. */
function followPointer(app) {
  const { canvas, camera } = app, pointers = new Map();
  let start = null;
  const place = event => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointerdown", event => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, place(event));
    start = pointers.size === 1 ? place(event) : null;
    app.flight = null;
  });
  canvas.addEventListener("pointermove", event => {
    const [x, y] = place(event), before = pointers.get(event.pointerId);
    if (!before) return app.pointAt(x, y);
    if (start && Math.hypot(x - start[0], y - start[1]) < CLICK_PX) return;
    start = null;
    canvas.classList.add("dragging");
    if (pointers.size === 2) {
      const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
      const [from, to] = [before, [x, y]].map(point => Math.hypot(point[0] - other[0], point[1] - other[1]));
      camera.pan((x - before[0]) / 2, (y - before[1]) / 2);
      camera.zoomAt((x + other[0]) / 2, (y + other[1]) / 2, to / Math.max(from, 1));
    } else camera.pan(x - before[0], y - before[1]);
    pointers.set(event.pointerId, [x, y]);
    app.moved();
  });
  const end = event => {
    const was = pointers.get(event.pointerId);
    pointers.delete(event.pointerId);
    canvas.classList.remove("dragging");
    if (event.type === "pointerup" && was && start) {
      app.pointAt(...place(event));
      app.hold(app.hovered === app.held ? -1 : app.hovered);
    }
    start = null;
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 16 : 1, speed = event.ctrlKey ? 0.01 : 0.0016;
    app.flight = null;
    camera.zoomAt(...place(event), Math.exp(-Math.max(-400, Math.min(400, event.deltaY * lines)) * speed));
    app.moved();
    app.pointAt(...place(event));
  }, { passive: false });
}

function followKeys(app) {
  const { camera, canvas } = app;
  const onSlide = {
    ArrowLeft: () => camera.pan(camera.width / 8, 0), ArrowRight: () => camera.pan(-camera.width / 8, 0),
    ArrowUp: () => camera.pan(0, camera.height / 8), ArrowDown: () => camera.pan(0, -camera.height / 8),
  };
  const anywhere = {
    "+": () => zoomBy(app, 1.5), "=": () => zoomBy(app, 1.5), "-": () => zoomBy(app, 1 / 1.5), 0: () => showAll(app),
    "[": () => app.stepSlide(-1), "]": () => app.stepSlide(1), m: () => app.stepModel(), "?": () => toggleHelp(),
    p: () => app.setKind("pca"), c: () => app.setKind("clusters"), o: () => app.setKind(app.kind === "none" ? app.lastKind : "none"),
    Escape: () => app.hold(-1),
  };
  canvas.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (onSlide[event.key]) {
      event.preventDefault();
      app.flight = null;
      onSlide[event.key]();
      app.moved();
      app.pointAt(camera.width / 2, camera.height / 2, true);
    }
    if (event.key === "Enter") {
      app.pointAt(camera.width / 2, camera.height / 2, true);
      app.hold(app.hovered);
    }
  });
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.getElementById("help").open) return;
    if (event.target.matches("select, input:not([type=radio])")) return;
    const act = anywhere[event.key] ?? anywhere[event.key.toLowerCase()];
    if (act) {
      event.preventDefault();
      act();
    }
  });
}

function zoomBy(app, factor) {
  app.flight = null;
  app.camera.zoomAt(app.camera.width / 2, app.camera.height / 2, factor);
  app.moved();
}

function showAll(app) {
  app.flight = null;
  app.camera.fit();
  app.moved();
}

function toggleHelp() {
  const help = document.getElementById("help");
  if (help.open) help.close();
  else help.showModal();
}

/** Fills the bar at the top and listens to it. */
function makeControls(app) {
  const element = id => document.getElementById(id);
  element("slide").append(...CONTENTS.slides.map(([slide]) => new Option(slide, slide)));
  element("slide").addEventListener("change", event => app.show({ slide: event.target.value }, true));
  element("previous").addEventListener("click", () => app.stepSlide(-1));
  element("next").addEventListener("click", () => app.stepSlide(1));
  for (const { name } of CONTENTS.models) {
    const label = document.createElement("label"), text = document.createElement("span");
    text.textContent = name;
    label.append(Object.assign(document.createElement("input"), { type: "radio", name: "model", value: name }), text);
    element("models").append(label);
  }
  element("models").hidden = element("kinds").hidden = !CONTENTS.models.length;
  element("models").addEventListener("change", event => app.show({ model: event.target.value }));
  element("kinds").addEventListener("change", event => app.setKind(event.target.value));
  element("opacity").addEventListener("input", event => app.setOpacity(event.target.value / 100));
  element("in").addEventListener("click", () => zoomBy(app, 1.5));
  element("out").addEventListener("click", () => zoomBy(app, 1 / 1.5));
  element("fit").addEventListener("click", () => showAll(app));
  element("help-button").addEventListener("click", toggleHelp);
  followPointer(app);
  followKeys(app);
}

/** Says what the colours mean. */
function drawLegend(app) {
  const legend = document.getElementById("legend"), model = CONTENTS.models.find(({ name }) => name === app.model);
  const paragraph = (text, name = "") => Object.assign(document.createElement("p"), { textContent: text, className: name });
  const key = [app.model, app.kind, app.cluster, Boolean(app.tiles), app.slide].join("\n");
  if (legend.dataset.key === key) return;
  legend.dataset.key = key;
  legend.replaceChildren();
  if (!model || !app.tiles || app.kind === "none") return;
  const list = document.createElement("ul"), percent = ratio => `${Math.round(100 * ratio)} %`;
  const entry = (color, text) => {
    const item = document.createElement("li");
    item.append(Object.assign(document.createElement("i"), { className: "swatch", style: `background: ${color}` }), text);
    return item;
  };
  if (app.kind === "pca") {
    legend.append(paragraph(`PCA of the features of ${model.name}`));
    const names = ["red", "green", "blue"], colors = ["#d40000", "#009a00", "#2222e6"];
    list.append(...model.explained.map((ratio, i) => entry(colors[i], `${names[i]}: component ${i + 1}, ${percent(ratio)}`)));
    legend.append(list, paragraph(`Similar colour: similar to the model. The three hold ${percent(model.explained_by_top_3)} of the variance.`));
    const left = app.tiles.numBackground;
    if (left) legend.append(paragraph(`Not painted: ${whole.format(left)} of ${whole.format(app.tiles.count)} tiles, left out as background.`));
    if (model.note) legend.append(paragraph(model.note, "warn"));
    return;
  }
  legend.append(paragraph(`Clusters of ${model.name}`));
  const counts = new Array(app.tiles.clusters.length).fill(0);
  for (const label of app.tiles.labels) if (label >= 0) counts[label]++;
  app.tiles.clusters.forEach(({ color, name }, number) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.setAttribute("aria-pressed", app.cluster === number);
    button.append(...entry(color, `${name} (${whole.format(counts[number])})`).childNodes);
    button.addEventListener("click", () => app.setCluster(app.cluster === number ? null : number));
    item.append(button);
    list.append(item);
  });
  legend.append(list, paragraph("A click shows one cluster alone."));
}
