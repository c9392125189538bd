/* The whole slide in the corner, with what is seen of it; a click goes there. */

const MINIMAP_PX = 150;

class Minimap {
  constructor(canvas, app) {
    Object.assign(this, { canvas, app, drawn: "" });
    const go = event => {
      if (!event.buttons || !app.picture) return;
      const box = canvas.getBoundingClientRect();
      const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
      app.camera.move(x * app.picture.width, y * app.picture.height);
      app.moved();
    };
    canvas.addEventListener("pointerdown", event => { canvas.setPointerCapture(event.pointerId); go(event); });
    canvas.addEventListener("pointermove", go);
  }

  draw() {
    const { app, canvas } = this, { picture, camera } = app;
    canvas.hidden = !picture;
    if (!picture) return;
    const whole = images.get(picture.source(0, 0, 0));
    const key = [picture.slide, whole?.ready, app.kind, app.cluster, app.model, app.opacity, Boolean(app.tiles), ...camera.bounds].join();
    if (key === this.drawn) return;
    this.drawn = key;
    const scale = MINIMAP_PX / Math.max(picture.width, picture.height), [width, height] = [picture.width * scale, picture.height * scale];
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.width = Math.max(1, Math.round(width * camera.ratio));
    canvas.height = Math.max(1, Math.round(height * camera.ratio));
    const context = canvas.getContext("2d"), factor = scale * camera.ratio;
    context.fillStyle = picture.background;
    context.fillRect(0, 0, canvas.width, canvas.height);
    const side = picture.side(0) * factor;
    if (whole?.ready) context.drawImage(whole.image, 0, 0, side, side);
    const still = new Camera();
    Object.assign(still, { x: picture.width / 2, y: picture.height / 2, scale, width, height, ratio: camera.ratio });
    if (app.overlay && app.kind !== "none") app.overlay.draw(context, still, app.kind, app.cluster, app.opacity);
    const [left, top, right, bottom] = camera.bounds.map(value => value * factor);
    for (const [style, thickness] of [["#fff", 3], [app.accent, 1.5]]) {
      context.strokeStyle = style;
      context.lineWidth = thickness * camera.ratio;
      context.strokeRect(left, top, right - left, bottom - top);
    }
  }
}
