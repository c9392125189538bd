/* The picture of a slide, from its pyramid of JPEG tiles. */

const MAX_IMAGES = 240, MAX_LOADING = 10;
const images = new Map();  // address -> { image, ready, failed }, the one that was used last comes last
let numLoading = 0;

/** An image by its address; `then` is called when it has come. */
function imageAt(source, then) {
  let entry = images.get(source);
  if (entry) {
    images.delete(source);
    images.set(source, entry);
    return entry;
  }
  entry = { image: new Image(), ready: false, failed: false };
  images.set(source, entry);
  numLoading++;
  entry.image.src = source;
  entry.done = entry.image.decode().then(() => { entry.ready = true; }, () => { entry.failed = true; }).finally(() => { numLoading--; });
  if (then) entry.done.then(then);
  for (const [oldest, { ready, failed }] of images) {
    if (images.size <= MAX_IMAGES) break;
    if (ready || failed) images.delete(oldest);
  }
  return entry;
}

class SlidePicture {
  /** Of a slide, from what its pyramid.js says; `redraw` is called when more of it has come. */
  constructor(slide, pyramid, redraw) {
    Object.assign(this, { slide, redraw, width: pyramid.width, height: pyramid.height, mpp: pyramid.mpp });
    Object.assign(this, { tilePx: pyramid.tile_px, footprint: pyramid.footprint, background: pyramid.background });
    this.present = pyramid.present;
    this.finest = pyramid.present.length - 1;
    this.loaded = 0;
  }

  /** Level-0 pixels a pixel of the finest tiles. */
  get grain() {
    return this.footprint / this.tilePx;
  }

  side(z) {
    return this.footprint * 2 ** (this.finest - z);
  }

  columns(z) {
    return Math.ceil(this.width / this.side(z));
  }

  has(z, x, y) {
    return this.present[z][y * this.columns(z) + x] === "1";
  }

  source(z, x, y) {
    return address("slides", this.slide, "tiles", String(z), `${x}_${y}.jpg`);
  }

  /** The coarsest z whose pixels are not enlarged much at this many device pixels a level-0 pixel. */
  zAt(deviceScale) {
    const coarser = Math.floor(Math.log2(1.25 / (deviceScale * this.grain)));
    return Math.min(Math.max(this.finest - coarser, 0), this.finest);
  }

  draw(context, camera) {
    const [left, top, right, bottom] = camera.bounds, z = this.zAt(camera.deviceScale), side = this.side(z);
    const [x0, y0, x1, y1] = [camera.deviceX(0), camera.deviceY(0), camera.deviceX(this.width), camera.deviceY(this.height)].map(Math.round);
    context.save();
    context.beginPath();
    context.rect(x0, y0, x1 - x0, y1 - y0);
    context.clip();
    context.fillStyle = this.background;
    context.fillRect(x0, y0, x1 - x0, y1 - y0);
    context.imageSmoothingEnabled = true;
    const missing = [];
    for (let y = Math.max(0, Math.floor(top / side)); y * side < Math.min(bottom, this.height); y++) {
      for (let x = Math.max(0, Math.floor(left / side)); x * side < Math.min(right, this.width); x++) {
        if (!this.drawTile(context, camera, z, x, y)) missing.push([x, y]);
      }
    }
    context.restore();
    const middle = ([x, y]) => Math.hypot((x + 0.5) * side - camera.x, (y + 0.5) * side - camera.y);
    missing.sort((a, b) => middle(a) - middle(b));
    for (const [x, y] of missing) {
      if (numLoading >= MAX_LOADING) break;
      imageAt(this.source(z, x, y), this.redraw);
    }
  }

  /** Draws a tile, or what a coarser one that is there shows of it; says whether the tile itself is settled. */
  drawTile(context, camera, z, x, y) {
    const side = this.side(z);
    const [left, right] = [x * side, (x + 1) * side].map(value => Math.round(camera.deviceX(value)));
    const [top, bottom] = [y * side, (y + 1) * side].map(value => Math.round(camera.deviceY(value)));
    if (!this.has(z, x, y)) return true;
    for (let up = 0; up <= z; up++) {
      const [column, row] = [x >> up, y >> up];
      const entry = images.get(this.source(z - up, column, row));
      if (!entry?.ready) continue;
      if (up === 0) imageAt(this.source(z, x, y));
      const part = this.tilePx / 2 ** up;
      const [fromX, fromY] = [(x - (column << up)) * part, (y - (row << up)) * part];
      context.drawImage(entry.image, fromX, fromY, part, part, left, top, right - left, bottom - top);
      return up === 0;
    }
    return images.get(this.source(z, x, y))?.failed ?? false;
  }

  /** Draws a square of the slide into a canvas once its tiles have come; a later call on the same canvas wins. */
  async crop(canvas, x, y, side) {
    const pixels = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
    const ticket = canvas.ticket = {};
    const z = this.zAt(pixels / side), span = this.side(z), parts = [];
    for (let row = Math.floor(Math.max(y, 0) / span); row * span < Math.min(y + side, this.height); row++) {
      for (let column = Math.floor(Math.max(x, 0) / span); column * span < Math.min(x + side, this.width); column++) {
        if (this.has(z, column, row)) parts.push({ column, row, entry: imageAt(this.source(z, column, row)) });
      }
    }
    await Promise.all(parts.map(({ entry }) => entry.done));
    if (canvas.ticket !== ticket) return;
    // put together pixel by pixel first, since tiles that are enlarged one by one leave seams
    const grain = span / this.tilePx, [left, top] = [x, y].map(value => Math.floor(value / grain));
    const joined = document.createElement("canvas");
    joined.width = Math.ceil((x + side) / grain) - left;
    joined.height = Math.ceil((y + side) / grain) - top;
    const joining = joined.getContext("2d"), context = canvas.getContext("2d");
    joining.fillStyle = this.background;
    joining.fillRect(0, 0, joined.width, joined.height);
    for (const { column, row, entry } of parts) {
      if (entry.ready) joining.drawImage(entry.image, column * this.tilePx - left, row * this.tilePx - top);
    }
    canvas.width = canvas.height = pixels;
    context.imageSmoothingQuality = "high";
    context.drawImage(joined, x / grain - left, y / grain - top, side / grain, side / grain, 0, 0, pixels, pixels);
    canvas.dataset.shows = `${this.slide} ${x} ${y}`;
  }
}
