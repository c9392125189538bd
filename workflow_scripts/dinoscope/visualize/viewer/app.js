/* What is shown, and when it is drawn. */

const FLIGHT_MS = 380;

class App {
  constructor() {
    this.canvas = document.getElementById("view");
    this.context = this.canvas.getContext("2d", { alpha: false });
    this.camera = new Camera();
    Object.assign(this, { slide: null, model: null, kind: "pca", lastKind: "pca", cluster: null, opacity: 0.6 });
    Object.assign(this, { picture: null, tiles: null, overlay: null, sample: null, hovered: -1, held: -1 });
    Object.assign(this, { flight: null, crosshair: false, pending: false, numShown: 0, frames: 0, pictures: new Map() });
    Object.assign(this, { placed: null, loaded: null });  // the slide, and of which model, that have come: shows may overtake each other
    this.redraw = this.redraw.bind(this);
    this.panel = new Panel(this);
    this.minimap = new Minimap(document.getElementById("minimap"), this);
    makeControls(this);
    new ResizeObserver(() => this.resize()).observe(this.canvas);
    for (const query of ["(prefers-color-scheme: dark)", `(resolution: ${devicePixelRatio}dppx)`]) {
      matchMedia(query).addEventListener("change", () => this.resize());
    }
    this.resize();
    addEventListener("popstate", () => this.show(this.stateOfAddress()));  // comes with a changed hash, too
    this.ready = this.show(this.stateOfAddress());
  }

  get shownTile() {
    return this.held >= 0 ? this.held : this.hovered;
  }

  /** Shows a slide, a model, a place; what is not named stays as it is. Says when all has come. */
  async show({ slide = this.slide, model = this.model, x, y, zoom, tile }, remember = false) {
    const number = ++this.numShown, entry = CONTENTS.slides.find(([name]) => name === slide) ?? CONTENTS.slides[0];
    if (!CONTENTS.models.some(({ name }) => name === model)) model = CONTENTS.models[0]?.name ?? null;
    slide = entry[0];
    const isNew = slide !== this.placed, other = isNew || model !== this.loaded;
    if (other) {
      const held = tile !== undefined ? tile : isNew ? null : this.tileCorner(this.held);
      Object.assign(this, { slide, model, hovered: -1, held: -1, tiles: null, overlay: null, sample: null, loaded: null });
      if (isNew) this.picture = this.placed = null;
      tile = held;
      this.showControls();
      this.redraw();
    }
    if (isNew) {
      const picture = await this.pictureOf(slide);
      if (number !== this.numShown) return;
      this.picture = picture;
      if (this.picture) {
        this.camera.setSlide(this.picture.width, this.picture.height, 5 / this.picture.grain);
        imageAt(this.picture.source(0, 0, 0), this.redraw);
        this.camera.fit();
      }
      this.placed = slide;
    }
    if (x !== undefined && this.picture) {
      const scale = zoom === undefined ? this.camera.scale : this.picture.mpp / zoom;
      if (isNew || zoom === undefined) this.camera.move(x, y, scale);
      else this.flyTo(x, y, scale);
    }
    this.moved(remember);
    if (other && model !== null) await this.loadModel(entry, number);
    if (number !== this.numShown) return;
    this.loaded = model;
    if (tile !== undefined) this.hold(tile && this.tiles ? this.tiles.grid.at(tile[0], tile[1]) : -1);
    this.showControls();
    this.redraw();
  }

  async loadModel([slide, models], number) {
    const index = CONTENTS.models.findIndex(({ name }) => name === this.model);
    const wanted = models.includes(index) ? loadTiles(this.model, slide) : null;
    const [tiles, sample] = await Promise.all([wanted, CONTENTS.models[index].has_sample ? loadSample(this.model) : null]);
    if (number !== this.numShown) return;
    Object.assign(this, { tiles, sample, overlay: tiles && new Overlay(tiles) });
    if (this.kind === "clusters" && !tiles?.clusters) this.kind = "pca";
    if (!tiles?.clusters || this.cluster >= tiles.clusters.length) this.cluster = null;
  }

  /** The picture of any slide, null where it could not be read. */
  async pictureOf(slide) {
    if (!this.pictures.has(slide)) {
      const pyramid = await loadPyramid(slide);
      this.pictures.set(slide, pyramid && !pyramid.problem ? new SlidePicture(slide, pyramid, this.redraw) : null);
    }
    return this.pictures.get(slide);
  }

  /** Goes to a tile of the sample and holds it; the browser's Back leads back. */
  goTo(number) {
    const { slide, x, y, side } = this.sample.tile(number), middle = [x + side / 2, y + side / 2];
    this.remember();
    const mpp = this.picture.mpp / this.camera.scale, large = this.tiles.tilePx * this.tiles.mpp / 90;
    this.held = -1;  // not hold(-1), which the address would remember
    return this.show({ slide, x: middle[0], y: middle[1], zoom: Math.min(mpp, large), tile: middle }, true);
  }

  stepSlide(by) {
    const names = CONTENTS.slides.map(([name]) => name);
    this.show({ slide: names[(names.indexOf(this.slide) + by + names.length) % names.length] }, true);
  }

  stepModel() {
    const names = CONTENTS.models.map(({ name }) => name);
    if (names.length) this.show({ model: names[(names.indexOf(this.model) + 1) % names.length] });
  }

  setKind(kind) {
    if (kind === "clusters" && !this.tiles?.clusters) return;
    if (this.kind !== "none") this.lastKind = this.kind;
    this.kind = kind;
    this.showControls();
    this.redraw();
  }

  setCluster(cluster) {
    this.cluster = cluster;
    this.redraw();
  }

  setOpacity(opacity) {
    this.opacity = opacity;
    this.showControls();
    this.redraw();
  }

  /** Looks which tile is under a place of the canvas. */
  pointAt(px, py, crosshair = false) {
    const hovered = this.tiles ? this.tiles.grid.at(...this.camera.toSlide(px, py)) : -1;
    if (hovered === this.hovered && crosshair === this.crosshair) return;
    Object.assign(this, { hovered, crosshair });
    this.redraw();
  }

  hold(tile) {
    this.held = tile;
    this.remember();
    this.redraw();
  }

  tileCorner(tile) {
    return tile >= 0 && this.tiles ? [0, 1].map(i => this.tiles.coords[2 * tile + i] + this.tiles.side / 2) : null;
  }

  flyTo(x, y, scale) {
    const { camera } = this, from = [camera.x, camera.y, Math.log(camera.scale)], to = [x, y, Math.log(scale)];
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return camera.move(x, y, scale);
    const began = performance.now(), flight = now => {
      const part = Math.min(1, Math.max(0, now - began) / FLIGHT_MS), eased = part * part * (3 - 2 * part);
      const [atX, atY, log] = from.map((value, i) => value + (to[i] - value) * eased);
      camera.move(atX, atY, Math.exp(log));
      if (part === 1) this.flight = null;
      this.moved();
    };
    this.flight = flight;
  }

  resize() {
    const { camera, canvas } = this, isFirst = camera.width <= 1;
    Object.assign(camera, { width: Math.max(1, canvas.clientWidth), height: Math.max(1, canvas.clientHeight), ratio: Math.min(devicePixelRatio, 2) });
    canvas.width = Math.round(camera.width * camera.ratio);
    canvas.height = Math.round(camera.height * camera.ratio);
    const style = getComputedStyle(document.documentElement);
    this.accent = style.getPropertyValue("--accent").trim();
    this.ground = style.getPropertyValue("--stage").trim();
    this.minimap.drawn = "";
    if (isFirst && this.picture) camera.fit();
    this.redraw();
  }

  moved(remember = false) {
    this.redraw();
    if (remember) return this.remember(true);
    clearTimeout(this.remembering);
    this.remembering = setTimeout(() => this.remember(), 250);
  }

  /** Puts what is shown into the page's address, so that it can be copied, and Back leads back. */
  remember(isStep = false) {
    if (!this.picture) return;
    clearTimeout(this.remembering);
    const state = { slide: this.slide, x: Math.round(this.camera.x), y: Math.round(this.camera.y), zoom: +(this.picture.mpp / this.camera.scale).toPrecision(4) };
    if (this.model !== null) state.model = this.model;
    if (this.held >= 0) state.tile = this.tileCorner(this.held).map(Math.round).join();
    const hash = "#" + Object.entries(state).map(([key, value]) => `${key}=${encodeURIComponent(value)}`).join("&");
    if (hash === location.hash) return;
    try {
      history[isStep ? "pushState" : "replaceState"](null, "", hash);
    } catch {}  // some browsers allow so many a minute: then the address lags behind
  }

  stateOfAddress() {
    const values = new URLSearchParams(location.hash.slice(1).replaceAll("+", "%2B")), state = {};
    for (const key of ["slide", "model"]) if (values.has(key)) state[key] = values.get(key);
    for (const key of ["x", "y", "zoom"]) if (Number.isFinite(parseFloat(values.get(key)))) state[key] = parseFloat(values.get(key));
    if (state.x === undefined || state.y === undefined || !(state.zoom > 0)) ["x", "y", "zoom"].forEach(key => delete state[key]);
    const tile = (values.get("tile") ?? "").split(",").map(Number);
    if (location.hash) state.tile = tile.length === 2 && tile.every(Number.isFinite) ? tile : null;
    return state;
  }

  redraw() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(now => {
      this.pending = false;
      if (this.flight) this.flight(now);
      this.draw();
    });
  }

  draw() {
    const { context, camera, picture, tiles, canvas } = this;
    this.frames++;
    context.fillStyle = this.ground;
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (picture) {
      picture.draw(context, camera);
      if (this.overlay && this.kind !== "none") this.overlay.draw(context, camera, this.kind, this.cluster, this.opacity);
    }
    this.panel.update();
    if (picture && tiles) this.drawOutlines();
    if (this.crosshair) this.drawCrosshair();
    this.minimap.draw();
    drawLegend(this);
    this.showPlace();
    this.showMessage();
  }

  drawOutlines() {
    const { context, camera, tiles, accent } = this;
    this.panel.found.forEach(({ number }, i) => {
      const { slide, x, y, side } = this.sample.tile(number);
      if (slide === this.slide) outline(context, camera, x, y, side, "#c2185b", 1.5, String(i + 1));
    });
    for (const [tile, width] of [[this.hovered, 1.5], [this.held, 3]]) {
      if (tile >= 0) outline(context, camera, tiles.coords[2 * tile], tiles.coords[2 * tile + 1], tiles.side, accent, width);
    }
  }

  drawCrosshair() {
    const { context, camera } = this, [x, y, arm] = [camera.width / 2, camera.height / 2, 10].map(value => value * camera.ratio);
    for (const [style, thickness] of [["#fff", 4], [this.accent, 2]]) {
      context.strokeStyle = style;
      context.lineWidth = thickness * camera.ratio;
      context.beginPath();
      context.moveTo(x - arm, y);
      context.lineTo(x + arm, y);
      context.moveTo(x, y - arm);
      context.lineTo(x, y + arm);
      context.stroke();
    }
  }

  showPlace() {
    const { picture, camera } = this, place = document.getElementById("place");
    place.hidden = !picture;
    if (!picture) return;
    const perPixel = picture.mpp / camera.scale, { pixels, label } = scaleBar(perPixel, Math.min(150, camera.width / 4));
    place.querySelector("i").style.width = `${pixels}px`;
    place.querySelector("b").textContent = label;
    const mm = value => (value * picture.mpp / 1000).toFixed(2);
    document.getElementById("position").textContent = `${mm(camera.x)}, ${mm(camera.y)} mm · ${perPixel.toPrecision(2)} µm a pixel`;
  }

  showMessage() {
    const pyramid = store.pyramid.get(this.slide), message = document.getElementById("message");
    let text = "";
    if (this.pictures.has(this.slide) && !this.picture) {
      text = pyramid ? `This slide cannot be shown: ${pyramid.problem}` : "The files of this slide are missing beside this page.";
    } else if (this.tiles && !this.tiles.count) text = "No tiles: no tissue was found on this slide, or it was skipped.";
    else if (this.model !== null && this.picture && !CONTENTS.slides.find(([name]) => name === this.slide)[1].length) {
      text = "There are no features of this slide, so it is shown without an overlay.";
    }
    if (message.textContent !== text) message.textContent = text;
    message.hidden = !text;
    message.classList.toggle("low", Boolean(this.picture));
  }

  showControls() {
    const element = id => document.getElementById(id), entry = CONTENTS.slides.find(([name]) => name === this.slide);
    element("slide").value = this.slide;
    element("models").querySelectorAll("input").forEach((input, i) => {
      input.checked = input.value === this.model;
      input.disabled = !entry[1].includes(i);
    });
    element("kinds").querySelectorAll("input").forEach(input => {
      input.checked = input.value === this.kind;
      if (input.value === "clusters") input.disabled = !this.tiles?.clusters;
    });
    element("opacity").value = Math.round(100 * this.opacity);
    element("opacity-said").textContent = `${Math.round(100 * this.opacity)} %`;
    document.title = `${this.slide} · dinoscope viewer`;
  }
}

const viewer = new App();
