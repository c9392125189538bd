/* The tiles in their colours. Far away they are one picture, painted once; close by the few that are seen are drawn. */

const CLOSE_PX = 24;  // device pixels of a tile from which on each is drawn by itself
const MAX_SIDE = 8192, MAX_PIXELS = 24e6, MAX_PICTURES = 4;

class Overlay {
  constructor(tiles) {
    this.tiles = tiles;
    this.pictures = new Map();  // of colours and resolution -> { canvas, scale }
  }

  draw(context, camera, kind, cluster, opacity) {
    const tiles = this.tiles;
    if (!tiles.count || opacity <= 0) return;
    const pixels = tiles.step * camera.deviceScale;
    context.save();
    context.globalAlpha = opacity;
    if (pixels >= CLOSE_PX) this.drawTiles(context, camera, tiles.paint(kind, cluster));
    else this.drawPicture(context, camera, this.picture(kind, cluster, pixels), pixels);
    context.restore();
  }

  drawTiles(context, camera, colors) {
    const { coords, inset, step, grid } = this.tiles;
    grid.within(...camera.bounds, tile => {
      const color = colors[tile];
      if (!color) return;
      const x = coords[2 * tile] + inset, y = coords[2 * tile + 1] + inset;
      const [left, top] = [Math.round(camera.deviceX(x)), Math.round(camera.deviceY(y))];
      context.fillStyle = cssColor(color);
      context.fillRect(left, top, Math.round(camera.deviceX(x + step)) - left - 1, Math.round(camera.deviceY(y + step)) - top - 1);
    });
  }

  drawPicture(context, camera, { canvas, scale }, pixels) {
    const { grid, inset } = this.tiles;
    const [x, y] = [grid.x0 + inset, grid.y0 + inset];
    const [left, top] = [camera.deviceX(x), camera.deviceY(y)];
    context.imageSmoothingEnabled = scale > camera.deviceScale;
    const factor = camera.deviceScale / scale;
    context.drawImage(canvas, left, top, canvas.width * factor, canvas.height * factor);
  }

  /** The tiles as a picture in which one is at least as large as on the screen, if that is not too large. */
  picture(kind, cluster, pixels) {
    const { grid, side, step, coords, count, inset } = this.tiles;
    let size = 2 ** Math.ceil(Math.log2(Math.max(pixels, 1)));
    const [width, height] = [grid.x1 - grid.x0 + side, grid.y1 - grid.y0 + side];
    const tooLarge = () => Math.max(width, height) * size / step > MAX_SIDE || width * height * (size / step) ** 2 > MAX_PIXELS;
    while (tooLarge()) size /= 2;
    const key = `${kind} ${cluster} ${size}`;
    if (this.pictures.has(key)) return this.pictures.get(key);
    const scale = size / step, canvas = document.createElement("canvas");
    canvas.width = Math.ceil(width * scale) + 1;
    canvas.height = Math.ceil(height * scale) + 1;
    const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
    const target = new Uint32Array(image.data.buffer), colors = this.tiles.paint(kind, cluster);
    for (let i = 0; i < count; i++) {
      if (!colors[i]) continue;
      const [x, y] = [coords[2 * i] - grid.x0, coords[2 * i + 1] - grid.y0];
      const [left, top] = [Math.round(x * scale), Math.round(y * scale)];
      const right = Math.max(Math.round((x + step) * scale), left + 1), bottom = Math.max(Math.round((y + step) * scale), top + 1);
      for (let row = top; row < bottom; row++) target.fill(colors[i], row * canvas.width + left, row * canvas.width + right);
    }
    context.putImageData(image, 0, 0);
    const made = { canvas, scale };
    if (this.pictures.size >= MAX_PICTURES) this.pictures.delete(this.pictures.keys().next().value);
    this.pictures.set(key, made);
    return made;
  }
}

const cssColors = new Map();

function cssColor(color) {
  let text = cssColors.get(color);
  if (!text) {
    if (cssColors.size > 1e5) cssColors.clear();
    text = "#" + ((color & 255) << 16 | color & 65280 | color >>> 16 & 255).toString(16).padStart(6, "0");
    cssColors.set(color, text);
  }
  return text;
}

/** Outlines a tile, in light and dark so that it shows on any ground. */
function outline(context, camera, x, y, side, color, width, label) {
  const [left, top] = [camera.deviceX(x), camera.deviceY(y)], length = Math.max(side * camera.deviceScale, 8 * camera.ratio);
  const shift = (side * camera.deviceScale - length) / 2;
  for (const [style, thickness] of [["rgb(255 255 255 / .9)", width + 2], [color, width]]) {
    context.strokeStyle = style;
    context.lineWidth = thickness * camera.ratio;
    context.strokeRect(left + shift, top + shift, length, length);
  }
  if (!label) return;
  context.font = `600 ${11 * camera.ratio}px sans-serif`;
  const [across, down] = [context.measureText(label).width + 8 * camera.ratio, 15 * camera.ratio];
  context.fillStyle = color;
  context.fillRect(left + shift, top + shift - down, across, down);
  context.fillStyle = "#fff";
  context.fillText(label, left + shift + 4 * camera.ratio, top + shift - 4 * camera.ratio);
}
