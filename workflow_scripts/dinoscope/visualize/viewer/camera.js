/* Which part of the slide is seen: its middle in level-0 pixels, and CSS pixels a level-0 pixel. */

class Camera {
  constructor() {
    Object.assign(this, { x: 0, y: 0, scale: 1, width: 1, height: 1, ratio: 1 });
    this.setSlide(1, 1, 1);
  }

  setSlide(width, height, closest) {
    Object.assign(this, { slideWidth: width, slideHeight: height, closest });
  }

  get farthest() {
    return 0.5 * this.fitting;
  }

  get fitting() {
    return 0.94 * Math.min(this.width / this.slideWidth, this.height / this.slideHeight);
  }

  fit() {
    this.move(this.slideWidth / 2, this.slideHeight / 2, this.fitting);
  }

  /** The middle stays on the slide, the scale between far too far and far too close. */
  move(x, y, scale = this.scale) {
    this.scale = Math.min(Math.max(scale, this.farthest), Math.max(this.closest, this.fitting));
    this.x = Math.min(Math.max(x, 0), this.slideWidth);
    this.y = Math.min(Math.max(y, 0), this.slideHeight);
  }

  pan(dx, dy) {
    this.move(this.x - dx / this.scale, this.y - dy / this.scale);
  }

  /** Zooms so that what is under (px, py) stays there. */
  zoomAt(px, py, factor) {
    const [x, y] = this.toSlide(px, py);
    this.move(this.x, this.y, this.scale * factor);
    this.move(x - (px - this.width / 2) / this.scale, y - (py - this.height / 2) / this.scale);
  }

  toSlide(px, py) {
    return [this.x + (px - this.width / 2) / this.scale, this.y + (py - this.height / 2) / this.scale];
  }

  /** Left, top, right, bottom of what is seen, in level-0 pixels. */
  get bounds() {
    return [...this.toSlide(0, 0), ...this.toSlide(this.width, this.height)];
  }

  /** Device pixels of a place in level-0 pixels. */
  deviceX(x) {
    return ((x - this.x) * this.scale + this.width / 2) * this.ratio;
  }

  deviceY(y) {
    return ((y - this.y) * this.scale + this.height / 2) * this.ratio;
  }

  get deviceScale() {
    return this.scale * this.ratio;
  }
}

/** The longest of 1, 2, 5, 10, 20, 50 … micrometres that takes at most `pixels` CSS pixels. */
function scaleBar(umPerPixel, pixels) {
  const power = 10 ** Math.floor(Math.log10(umPerPixel * pixels));
  const um = [5, 2, 1].map(step => step * power).find(length => length <= umPerPixel * pixels);
  return { pixels: um / umPerPixel, label: um >= 1000 ? `${um / 1000} mm` : `${+um.toPrecision(3)} µm` };
}
