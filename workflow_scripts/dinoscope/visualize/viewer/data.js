/* Data files are scripts that call viewerData(KIND, KEY, VALUE): a page from disk may read no other file. */

const MAX_DATA_SETS = 12;  // of tiles; each may be some megabytes
const store = { pyramid: new Map(), tiles: new Map(), sample: new Map() };
const loading = new Map();

function viewerData(kind, key, value) {
  const make = { pyramid: value => value, tiles: value => new Tiles(value), sample: value => new Sample(value) }[kind];
  store[kind].set(key, make(value));
}

/** What a file holds, or null where it is missing; a file is loaded once. */
function load(kind, key, ...path) {
  const known = store[kind].get(key);
  if (known) {  // the one that was used last comes last
    store[kind].delete(key);
    store[kind].set(key, known);
    return Promise.resolve(known);
  }
  const name = `${kind} ${key}`;
  if (!loading.has(name)) {
    loading.set(name, new Promise(resolve => {
      const script = document.createElement("script");
      script.src = address(...path);
      const end = () => {
        script.remove();
        loading.delete(name);
        for (const oldest of store.tiles.keys()) {
          if (store.tiles.size <= MAX_DATA_SETS) break;
          store.tiles.delete(oldest);
        }
        resolve(store[kind].get(key) ?? null);
      };
      script.onload = script.onerror = end;
      document.head.append(script);
    }));
  }
  return loading.get(name);
}

/** Relative address of a file; names of slides may hold any character. */
const address = (...path) => path.map(encodeURIComponent).join("/");
const loadPyramid = slide => load("pyramid", slide, "slides", slide, "pyramid.js");
const loadTiles = (model, slide) => load("tiles", `${model}/${slide}`, "models", model, "slides", `${slide}.js`);
const loadSample = model => load("sample", model, "models", model, "sample.js");

function unpacked(text, Type = Uint8Array) {
  if (!text) return new Type(0);
  if (Uint8Array.fromBase64) return new Type(Uint8Array.fromBase64(text).buffer);
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return new Type(bytes.buffer);
}

/** The tiles of a collection that neighbours are numbers of. */
class Sample {
  constructor(value) {
    this.slides = value.slides;
    this.sides = value.sides;
    this.total = value.total;
    this.maxTiles = value.max_tiles;
    this.slide = unpacked(value.slide, Int32Array);
    this.coords = unpacked(value.coords, Int32Array);
    this.count = this.slide.length;
  }

  tile(number) {
    const slide = this.slide[number];
    return { slide: this.slides[slide], x: this.coords[2 * number], y: this.coords[2 * number + 1], side: this.sides[slide] };
  }
}

/** A model's tiles on a slide. */
class Tiles {
  constructor(value) {
    Object.assign(this, { count: value.count, side: value.side, step: value.step, inset: value.inset });
    Object.assign(this, { tilePx: value.tile_px, mpp: value.mpp, sampled: value.sampled, numNeighbours: value.neighbours });
    this.coords = unpacked(value.coords, Int32Array);
    this.rgb = unpacked(value.colors);
    this.labels = value.clusters && unpacked(value.clusters.labels, Int16Array);
    this.clusters = value.clusters && value.clusters.colors.map((color, i) => ({ color, name: value.clusters.names[i] }));
    this.lists = { nearest: this.neighbourList(value.nearest), elsewhere: this.neighbourList(value.elsewhere) };
    this.grid = new TileGrid(this.coords, this.side);
    this.paints = new Map();
  }

  /** Number of tiles that the colours leave out as background. */
  get numBackground() {
    return this.paint("pca", null).reduce((number, color) => number + !color, 0);
  }

  neighbourList(value) {
    if (!value) return null;
    return { tiles: unpacked(value.tiles, Uint16Array), cosines: unpacked(value.cosines), low: value.low, high: value.high };
  }

  /** Numbers of a tile's neighbours in the sample, and how similar they are. */
  neighbours(tile, elsewhere) {
    const list = this.lists[elsewhere ? "elsewhere" : "nearest"], found = [];
    for (let i = tile * this.numNeighbours; list && i < (tile + 1) * this.numNeighbours; i++) {
      if (list.tiles[i] === 65535) break;
      found.push({ number: list.tiles[i], cosine: list.low + (list.high - list.low) * list.cosines[i] / 255 });
    }
    return found;
  }

  /** Colours as ABGR numbers, 0 for tiles that are not painted. */
  paint(kind, cluster) {
    const key = `${kind} ${cluster}`;
    if (!this.paints.has(key)) {
      if (this.paints.size > 6) this.paints.clear();
      this.paints.set(key, kind === "pca" ? this.pcaPaint() : this.clusterPaint(cluster));
    }
    return this.paints.get(key);
  }

  pcaPaint() {
    const colors = new Uint32Array(this.count), rgb = this.rgb;
    for (let i = 0, j = 0; i < this.count; i++, j += 3) {
      const color = rgb[j + 2] << 16 | rgb[j + 1] << 8 | rgb[j];
      colors[i] = color ? (255 << 24 | color) >>> 0 : 0;  // black stands for background
    }
    return colors;
  }

  clusterPaint(only) {
    const table = this.clusters.map(({ color }, number) => {
      const rgb = parseInt(color.slice(1), 16);
      return only === null || only === number ? (255 << 24 | (rgb & 255) << 16 | (rgb & 65280) | rgb >> 16) >>> 0 : 0;
    });
    return Uint32Array.from(this.labels, label => label < 0 ? 0 : table[label]);
  }
}

/** Finds the tiles at a place: those whose corners lie in the cells around it. */
class TileGrid {
  constructor(coords, side) {
    const count = coords.length / 2;
    let [x0, y0, x1, y1] = [Infinity, Infinity, -Infinity, -Infinity];
    for (let i = 0; i < count; i++) {
      const x = coords[2 * i], y = coords[2 * i + 1];
      if (x < x0) x0 = x;
      if (x > x1) x1 = x;
      if (y < y0) y0 = y;
      if (y > y1) y1 = y;
    }
    Object.assign(this, { coords, side, count, x0, y0, x1, y1 });
    if (!count) return;
    this.cell = side;
    while (((x1 - x0) / this.cell + 1) * ((y1 - y0) / this.cell + 1) > 4e6) this.cell *= 2;
    this.columns = Math.floor((x1 - x0) / this.cell) + 1;
    this.rows = Math.floor((y1 - y0) / this.cell) + 1;
    const starts = new Int32Array(this.columns * this.rows + 1), cells = new Int32Array(count);
    for (let i = 0; i < count; i++) {
      cells[i] = Math.floor((coords[2 * i + 1] - y0) / this.cell) * this.columns + Math.floor((coords[2 * i] - x0) / this.cell);
      starts[cells[i] + 1]++;
    }
    for (let i = 1; i < starts.length; i++) starts[i] += starts[i - 1];
    const next = starts.slice(), items = new Int32Array(count);
    for (let i = 0; i < count; i++) items[next[cells[i]]++] = i;
    Object.assign(this, { starts, items });
  }

  /** Calls `visit` with each tile that a rectangle in level-0 pixels touches. */
  within(left, top, right, bottom, visit) {
    if (!this.count) return;
    const first = (value, origin) => Math.max(0, Math.floor((value - this.side - origin) / this.cell));
    const last = (value, origin, number) => Math.min(number - 1, Math.floor((value - origin) / this.cell));
    const columns = [first(left, this.x0), last(right, this.x0, this.columns)];
    for (let row = first(top, this.y0); row <= last(bottom, this.y0, this.rows); row++) {
      for (let column = columns[0]; column <= columns[1]; column++) {
        const cell = row * this.columns + column;
        for (let k = this.starts[cell]; k < this.starts[cell + 1]; k++) {
          const tile = this.items[k], x = this.coords[2 * tile], y = this.coords[2 * tile + 1];
          if (x <= right && x + this.side > left && y <= bottom && y + this.side > top) visit(tile);
        }
      }
    }
  }

  /** The tile at a place, of overlapping ones that whose centre is nearest; −1 where there is none. */
  at(x, y) {
    let best = -1, least = Infinity;
    this.within(x, y, x, y, tile => {
      const half = this.side / 2;
      const distance = Math.max(Math.abs(this.coords[2 * tile] + half - x), Math.abs(this.coords[2 * tile + 1] + half - y));
      if (distance < least) [best, least] = [tile, distance];
    });
    return best;
  }
}
