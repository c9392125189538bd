/* The tile under the pointer, and the tiles that look most alike to the model. */

const THUMBNAILS_AFTER_MS = 70;
const whole = new Intl.NumberFormat("en");

class Panel {
  constructor(app) {
    this.app = app;
    this.shown = "";
    this.elsewhere = document.getElementById("elsewhere");
    this.elsewhere.addEventListener("change", () => { this.shown = ""; app.redraw(); });
    document.getElementById("release").addEventListener("click", () => app.hold(-1));
  }

  /** Shows a tile, or what to do where there is none. */
  update() {
    const { app } = this, { tiles } = app, tile = app.shownTile;
    const key = [app.slide, app.model, app.kind, tile, app.held === tile, Boolean(app.sample), Boolean(tiles)].join("\n");
    if (key === this.shown) return;
    this.shown = key;
    this.sayWhatSampleIs();
    document.getElementById("hint").hidden = tile >= 0;
    document.getElementById("details").hidden = tile < 0;
    this.found = [];
    if (tile < 0 || !tiles) return;
    document.getElementById("release").hidden = app.held !== tile;
    document.getElementById("tile-title").textContent = app.held === tile ? "Held tile" : "Tile";
    this.sayFacts(tile);
    this.found = app.sample ? tiles.neighbours(tile, this.elsewhere.checked) : [];
    this.listNeighbours();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.drawPictures(tile), app.held === tile ? 0 : THUMBNAILS_AFTER_MS);
  }

  sayFacts(tile) {
    const { tiles, picture } = this.app, [x, y] = [tiles.coords[2 * tile], tiles.coords[2 * tile + 1]];
    const facts = document.getElementById("tile-facts"), mm = value => (value * picture.mpp / 1000).toFixed(2);
    const swatch = color => Object.assign(document.createElement("i"), { className: "swatch", style: `background: ${color}` });
    facts.replaceChildren(`${Math.round(tiles.tilePx * tiles.mpp)} µm at ${mm(x)}, ${mm(y)} mm `, document.createElement("br"));
    const color = tiles.paint("pca", null)[tile];
    facts.append(...(color ? [swatch(cssColor(color)), " PCA"] : ["background"]));
    const label = tiles.labels ? tiles.labels[tile] : -1;
    if (label >= 0) facts.append(" · ", swatch(tiles.clusters[label].color), ` ${tiles.clusters[label].name}`);
    const canvas = document.getElementById("tile");
    canvas.setAttribute("aria-label", `tile at ${mm(x)}, ${mm(y)} mm`);
  }

  listNeighbours() {
    const { app, found } = this, list = document.getElementById("neighbours");
    const several = app.sample?.slides.length > 1;
    document.getElementById("elsewhere-field").hidden = !several;
    list.replaceChildren(...found.map(({ number, cosine }, i) => {
      const { slide } = app.sample.tile(number), item = document.createElement("li"), button = document.createElement("button");
      const [likeness, name] = [document.createElement("b"), document.createElement("span")];
      const caption = document.createElement("span");
      likeness.textContent = cosine.toFixed(cosine > 0.995 ? 4 : 2);
      caption.append(`${i + 1} · `, likeness);
      name.textContent = slide === app.slide ? "this slide" : slide;
      button.disabled = !CONTENTS.slides.some(([name]) => name === slide);
      button.title = `similarity ${cosine.toFixed(4)}; ${button.disabled ? "not in this viewer, so one cannot go there" : "go there"}: ${slide}`;
      button.append(document.createElement("canvas"), caption, name);
      button.addEventListener("click", () => app.goTo(number));
      item.append(button);
      return item;
    }));
    const title = document.getElementById("neighbours-title");
    title.textContent = found.length ? "Most similar tiles" : "No similar tiles to show";
  }

  drawPictures(tile) {
    const { app, found } = this, { tiles, picture } = app;
    if (tile !== app.shownTile || !tiles || !picture) return;
    picture.crop(document.getElementById("tile"), tiles.coords[2 * tile], tiles.coords[2 * tile + 1], tiles.side);
    document.querySelectorAll("#neighbours canvas").forEach(async (canvas, i) => {
      const { slide, x, y, side } = app.sample.tile(found[i].number);
      (await app.pictureOf(slide))?.crop(canvas, x, y, side);
    });
  }

  sayWhatSampleIs() {
    const { sample, tiles } = this.app, said = document.getElementById("sampled");
    said.textContent = "";
    if (!sample || !tiles) return;
    const slides = sample.slides.length === 1 ? "1 slide" : `${whole.format(sample.slides.length)} slides`;
    said.textContent = sample.count === sample.total
      ? `Similar tiles are sought among all ${whole.format(sample.total)} tiles of ${slides}, by the cosine of this model's features.`
      : `Similar tiles are sought among a sample of ${whole.format(sample.count)} of the ${whole.format(sample.total)} tiles of ${slides} (at most ${whole.format(sample.maxTiles)}, as equal as possible a slide), by the cosine of this model's features.`;
    if (!tiles.sampled) said.textContent += " This slide came after the sample was drawn: its own tiles are not in it.";
  }
}
