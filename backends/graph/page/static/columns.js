// Puts the columns that Graphviz has laid out side by side, and draws the links that run from one to another.
"use strict";

const COLUMN_GAP = 44;
const SVG = "http://www.w3.org/2000/svg";

const svgElement = (name, attributes, ...children) => {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};
// The rectangle around what an element of Graphviz draws, which may not be on the screen yet.
const around = (element) => {
  const xs = [], ys = [];
  for (const part of element.querySelectorAll("path, polygon")) {
    for (const [, x, y] of (part.getAttribute("d") || part.getAttribute("points")).matchAll(/(-?[\d.]+)[, ](-?[\d.]+)/g)) { xs.push(Number(x)); ys.push(Number(y)); }
  }
  return { left: Math.min(...xs), right: Math.max(...xs), top: Math.min(...ys), bottom: Math.max(...ys) };
};

E2Step.Columns = class {
  constructor(svg, boxes) {
    this.svg = svg; this.boxes = boxes;
    this.parts = { f: [], b: [], u: [] };
    this.top = svg.querySelector("g.graph");
    for (const element of this.top.querySelectorAll(":scope > g")) this.parts[this._columnOf(element)].push(element);
  }

  _columnOf(element) {
    const id = element.classList.contains("edge") ? element.id.split("_")[1] : element.id;
    return this.boxes.get(id)?.column || id.at(-1);
  }

  // Forward, backward, update from left to right, whatever order Graphviz has found shortest.
  arrange() {
    this.shift = {};
    let at = 0;
    for (const [column, parts] of Object.entries(this.parts)) {
      if (!parts.length) continue;
      const rectangles = parts.map(around);
      const left = Math.min(...rectangles.map((one) => one.left)), right = Math.max(...rectangles.map((one) => one.right));
      this.shift[column] = at - left;
      for (const part of parts) part.setAttribute("transform", `translate(${(at - left).toFixed(2)} 0)`);
      at += right - left + COLUMN_GAP;
    }
    const { viewBox } = this.svg, width = at - COLUMN_GAP + 2 * E2Step.PAD_PT, [, y] = this.top.getAttribute("transform").match(/translate\(\S+ (\S+?)\)/);
    this.top.setAttribute("transform", `translate(${E2Step.PAD_PT} ${y})`);
    this.svg.setAttribute("width", `${width.toFixed(0)}pt`);
    this.svg.setAttribute("viewBox", `0 0 ${width.toFixed(2)} ${viewBox.baseVal.height}`);
  }

  // Links stand behind the boxes and before the frames.
  link(edges) {
    const layer = svgElement("g", {}), rectangles = new Map();
    for (const element of this.top.querySelectorAll(":scope > g.box")) {
      const at = around(element), shift = this.shift[this._columnOf(element)];
      rectangles.set(element.id, { ...at, left: at.left + shift, right: at.right + shift });
    }
    for (const edge of edges) layer.append(this._link(edge, rectangles.get(edge.from), rectangles.get(edge.to)));
    this.top.querySelector(":scope > g.edge, :scope > g.node").before(layer);
  }

  _link({ id, look }, from, to) {
    const y1 = (from.top + from.bottom) / 2, y2 = (to.top + to.bottom) / 2;
    const right = from.right <= to.left, left = to.right <= from.left;
    // Within a column it runs back around the right side.
    const x1 = left ? from.left : from.right, x2 = right ? to.left : to.right, ahead = right ? 1 : -1;
    const reach = right || left ? Math.max(18, Math.abs(x2 - x1) / 2) : Math.min(30, 14 + Math.abs(y2 - y1) / 12);
    const end = x2 - 5 * ahead;
    const path = `M${x1},${y1}C${x1 + (left ? -reach : reach)},${y1} ${end - ahead * reach},${y2} ${end},${y2}`;
    const { style, penwidth = 1, color, class: kind } = look;
    return svgElement("g", { id, class: kind },
      svgElement("path", { d: path, fill: "none", stroke: color, "stroke-width": penwidth, ...(style === "dashed" ? { "stroke-dasharray": "5,2" } : {}) }),
      svgElement("polygon", { points: `${x2},${y2} ${end},${y2 - 1.75} ${end},${y2 + 1.75}`, fill: color, stroke: color }));
  }
};
