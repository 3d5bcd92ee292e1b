// From what is open in the hierarchy to a drawing by Graphviz: forward down on the left, backward up on the right.
"use strict";

E2Step.COLOUR = {
  technique: { base: "#4e79a7", smd: "#9c755f", slu: "#f28e2b", bits: "#59a14f", psg: "#b07aa1" },
  change: { added: "#59a14f", replaced: "#f28e2b", same: "#9fb3c8" },
  phase: {
    data: "#9c755f", forward: "#4e79a7", loss: "#bab0ac", dx: "#f28e2b", dw: "#e15759", backward: "#76b7b2", update: "#59a14f",
  },
};
// A colour of the page's scheme, light or dark; when that changes, what is known is forgotten and the drawing made anew.
E2Step.known = new Map();
E2Step.scheme = (name) => {
  if (!E2Step.known.has(name)) E2Step.known.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  return E2Step.known.get(name);
};
const MOST_BOXES = 500;
const BAR_PX = 104;
E2Step.PAD_PT = 10.8;

const channels = (colour) => {
  const digits = colour.length === 4 ? [...colour.slice(1)].map((digit) => digit + digit).join("") : colour.slice(1);
  return [0, 2, 4].map((at) => parseInt(digits.slice(at, at + 2), 16));
};
const mixed = (from, to, share) => {
  const other = channels(to);
  return `#${channels(from).map((part, i) => Math.round(part + (other[i] - part) * share).toString(16).padStart(2, "0")).join("")}`;
};
E2Step.heat = (share) => {
  const ramp = E2Step.scheme("heat").split(/\s+/);
  const at = Math.sqrt(Math.min(1, Math.max(0, share))) * (ramp.length - 1), low = Math.min(ramp.length - 2, Math.floor(at));
  return mixed(ramp[low], ramp[low + 1], at - low);
};
E2Step.tint = (colour) => mixed(colour, E2Step.scheme("box"), 0.78);
const escapeLabel = (text) =>
  text.replace(/[\u0000-\u001f]/g, " ").replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/"/g, "&quot;");
// Browsers without Helvetica draw letters wider than Graphviz measures them.
const room = (text) => "&#160;".repeat(Math.ceil(text.length / 9));
const roomy = (text) => room(text) + escapeLabel(text) + room(text);
E2Step.clip = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}\u2026` : text);

E2Step.Drawing = class {
  constructor(model, layout) {
    this.model = model; this.layout = layout; this.open = new Set([0]); this.colour = "technique"; this.showSaved = true;
  }

  // The group that stands for `group` in the drawing: the outermost closed one, or null if all around it is open.
  closed(group) {
    let found = null;
    for (let at = group; at; at = at.parent) if (!this.open.has(at.id)) found = at;
    return found;
  }

  boxOf(index) {
    const group = this.model.groupOf[index], closed = this.closed(group);
    if (closed) return `g${closed.id}${this.model.column[index]}`;
    const origin = this.model.origin[index];
    return origin === index ? `n${index}` : this.boxOf(origin);
  }

  _scan() {
    const { model } = this, closed = new Map();
    const prefix = model.groups.map((group) => { const found = this.closed(group); closed.set(group.id, found); return found; });
    const anchor = new Array(model.count);
    const boxes = new Map();
    for (let i = 0; i < model.count; i++) {
      const group = prefix[model.groupOf[i].id];
      const origin = model.origin[i];
      // What only picks a result in an open module stands where the result is, which may be in a closed one.
      anchor[i] = group ? `g${group.id}${model.column[i]}` : origin === i ? `n${i}` : anchor[origin];
      if (group) boxes.set(anchor[i], { group, column: model.column[i] });
      else if (origin === i) boxes.set(anchor[i], { index: i, group: model.groupOf[i], column: model.column[i] });
    }
    return { anchor, boxes };
  }

  count() { return this._scan().boxes.size; }

  _edges(anchor) {
    const { model } = this, edges = new Map();
    for (let i = 0; i < model.count; i++) {
      for (const read of model.data.nodes.reads[i]) {
        const from = anchor[model.origin[read]], to = anchor[i];
        if (from === to) continue;
        const key = `${from} ${to}`, kind = this._edgeKind(model.origin[read], i), known = edges.get(key);
        if (known) known.count += 1; else edges.set(key, { from, to, kind, count: 1 });
      }
    }
    return edges.values();
  }

  _edgeKind(source, target) {
    const a = this.model.kind(source), b = this.model.kind(target);
    if (b[2] === "update") return "update";
    const ahead = this.model.column[source] === "f", behind = this.model.column[target] === "b";
    if (ahead && behind) return a[2] === "loss" ? "gradient" : "saved";
    if (a[2] === "data") return "data";
    if (behind) return "gradient";
    return a[4] === "slu.gate" && this.model.data.nodes.region[source] !== this.model.data.nodes.region[target] ? "gate" : "value";
  }

  // Returns the SVG element, or null where too much is open to be read or drawn.
  render() {
    const { anchor, boxes } = this._scan();
    if (boxes.size > MOST_BOXES) return null;
    this.boxes = boxes;
    this.largest = { energy: 0, time: 0 };
    for (const box of boxes.values()) {
      const totals = this.totalsOf(box);
      for (const key of ["energy", "time"]) this.largest[key] = Math.max(this.largest[key], totals[key]);
    }
    const edges = [...this._edges(anchor)].filter((edge) => this.showSaved || edge.kind !== "saved");
    const rows = new E2Step.Rows(this.model, boxes, edges);
    const links = [], graph = this._graph(boxes);
    for (const edge of edges) if (!this._within(graph, rows, edge)) links.push({ ...edge, id: this._idOf(edge), look: this._line(edge) });
    this._lone(graph, rows);
    for (const ids of rows.beside()) graph.subgraphs.push({ graphAttributes: { rank: "same" }, nodes: [...ids].map((name) => ({ name })) });
    const columns = new E2Step.Columns(this.layout(graph), boxes);
    columns.arrange();
    columns.link(links);
    return columns.svg;
  }

  _graph(boxes) {
    const graph = {
      directed: true, name: "step",
      graphAttributes: { rankdir: "TB", nodesep: 0.16, ranksep: 0.28, bgcolor: "transparent", fontname: "Helvetica", pad: E2Step.PAD_PT / 72, newrank: true, outputorder: "edgesfirst" },
      nodeAttributes: { shape: "box", style: "rounded,filled", fillcolor: E2Step.scheme("box"), color: E2Step.scheme("box-line"), fontname: "Helvetica", fontsize: 10, fontcolor: E2Step.scheme("ink"), margin: "0.09,0.05", height: 0.3 },
      edgeAttributes: { arrowsize: 0.5, penwidth: 1 },
      nodes: [], edges: [], subgraphs: [],
    };
    this._clusters(graph, boxes);
    return graph;
  }

  totalsOf(box) {
    if (box.index === undefined) return box.group.totals[box.column];
    const cost = this.model.cost(box.index);
    return { energy: cost[2], time: cost[3], macs: cost[4], count: 1 };
  }

  _clusters(graph, boxes) {
    const columns = {}, clusters = new Map();
    for (const column of "fbu") {
      columns[column] = { name: `cluster_${column}`, nodes: [], subgraphs: [], graphAttributes: {
        id: `column_${column}`, label: E2Step.COLUMNS[column], labeljust: "l", fontname: "Helvetica", fontsize: 12, fontcolor: E2Step.scheme("soft"), style: "rounded,filled",
        fillcolor: E2Step.scheme("column"), color: E2Step.scheme("line"), class: "column", margin: 10 } };
    }
    const clusterOf = (group, column) => {
      if (group.id === 0) return columns[column];
      const key = `g${group.id}${column}`;
      if (!clusters.has(key)) {
        const made = { name: `cluster_${key}`, nodes: [], subgraphs: [], graphAttributes: {
          id: `c_${key}`, class: "open", label: E2Step.clip(this._text(group.name), 40), labeljust: "l", fontname: "Helvetica", fontsize: 10, fontcolor: E2Step.scheme("frame-ink"),
          style: "rounded,filled", fillcolor: E2Step.scheme("paper"), color: E2Step.scheme("frame-line"), margin: 7, tooltip: "double-click to close" } };
        clusters.set(key, made);
        clusterOf(group.parent, column).subgraphs.push(made);
      }
      return clusters.get(key);
    };
    for (const [id, box] of boxes) {
      const node = { name: id, attributes: this._look(id, box) };
      const parent = box.index === undefined ? box.group.parent : box.group;
      const special = parent.id === 0 && box.index === undefined && /^\((batch|loss)\)$/.test(box.group.name);
      if (special) graph.nodes.push(node); else clusterOf(parent, box.column).nodes.push(node);
    }
    for (const column of "fbu") {
      if (columns[column].nodes.length || columns[column].subgraphs.length) graph.subgraphs.push(columns[column]);
    }
  }

  _text(text) { return text.replace(/\\/g, "\\\\").replace(/[\u0000-\u001f]/g, " "); }

  _look(id, box) {
    const totals = this.totalsOf(box), common = { id, class: box.index === undefined ? "box closed" : "box op" };
    const fill = this._fill(box, totals);
    if (box.index === undefined) {
      return { ...common, ...fill, group: box.column, tooltip: "double-click to open", margin: "0.1,0.06", label: { html: this._groupLabel(box, totals) } };
    }
    const node = this.model.node(box.index);
    const lines = [E2Step.clip(node.short, 34)];
    if (node.tag) lines.push(node.tag);
    if (node.type && node.type !== "()") lines.push(E2Step.clip(node.type, 34));
    const small = (text) => `<FONT POINT-SIZE="8" COLOR="${this._soft()}">${roomy(text)}</FONT>`;
    const html = [roomy(lines[0]), ...lines.slice(1).map(small)].join("<BR/>");
    return { ...common, ...fill, tooltip: " ", label: { html } };
  }

  get _heats() { return this.colour === "energy" || this.colour === "time"; }

  // Small print in a box; on the hot end of the scale only the full ink can be read.
  _soft() { return E2Step.scheme(this._heats ? "ink" : "soft"); }

  _fill(box, totals) {
    if (this._heats) {
      const most = this.largest[this.colour];
      return { fillcolor: E2Step.heat(most ? totals[this.colour] / most : 0) };
    }
    if (box.index === undefined) return {};
    const sort = this.model.sort(box.index, this.colour), colour = E2Step.COLOUR[this.colour][sort];
    return sort === "base" || sort === "same" ? {} : { fillcolor: E2Step.tint(colour), color: colour };
  }

  _groupLabel(box, totals) {
    const shown = E2Step.clip(box.group.name, 30), name = escapeLabel(shown) + room(shown) + room(shown);
    const detail = `${totals.count} op${totals.count === 1 ? "" : "s"} \u00b7 ${E2Step.si(totals.energy, "J")}`;
    const by = E2Step.COLOUR[this.colour] ? this.colour : "technique";
    const parts = Object.entries(totals[by]).filter(([, joules]) => joules > 0);
    let cells = "";
    if (parts.length) {
      for (const [key, joules] of parts) {
        const width = Math.max(1, Math.round((joules / totals.energy) * BAR_PX));
        cells += `<TD FIXEDSIZE="TRUE" WIDTH="${width}" HEIGHT="4" BGCOLOR="${E2Step.COLOUR[by][key]}"></TD>`;
      }
      cells = `<TR><TD ALIGN="LEFT"><TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0"><TR>${cells}</TR></TABLE></TD></TR>`;
    }
    return `<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="1"><TR><TD ALIGN="LEFT"><B>${name}</B></TD></TR>` +
      `<TR><TD ALIGN="LEFT"><FONT POINT-SIZE="9" COLOR="${this._soft()}">${escapeLabel(detail)}</FONT></TD></TR>${cells}</TABLE>`;
  }

  // An operation that no edge of its column holds would rise to the top: it stands below the closed module before it.
  _lone(graph, rows) {
    const held = new Set(graph.edges.flatMap(({ tail, head }) => [tail, head]));
    const closed = [...this.boxes].filter(([, box]) => box.index === undefined);
    for (const [id, { index, column }] of this.boxes) {
      if (index === undefined || held.has(id)) continue;
      const before = closed.filter(([other, box]) => box.column === column && rows.above(other, id)).map(([other]) => other);
      const nearest = before.reduce((best, other) => (!best || rows.above(best, other) ? other : best), null);
      if (nearest) graph.edges.push({ tail: nearest, head: id, attributes: { style: "invis", weight: 0 } });
    }
  }

  _idOf(edge) { return `e_${edge.from}_${edge.to}`; }

  _line(edge) {
    const look = { color: E2Step.scheme(`edge-${edge.kind}`), class: `edge ${edge.kind}` };
    if (edge.count > 1) look.penwidth = Math.min(3, 1 + Math.log10(edge.count));
    if (edge.kind === "saved") look.style = "dashed";
    // What all gates share is updated from everywhere: those edges are there, but stand back.
    const far = edge.kind === "update" && this.boxes.get(edge.to).group.totals.b.count === 0;
    return far ? { ...look, class: "edge update far", penwidth: 0.8 } : look;
  }

  // Has Graphviz draw an edge within a column, and says whether it does. Gradients flow up beside the values they belong
  // to: laid out against their direction, drawn along it. What runs back to a module that had its turn moves nothing.
  _within(graph, rows, edge) {
    const column = this.boxes.get(edge.from).column, up = column === "b", [upper, lower] = up ? [edge.to, edge.from] : [edge.from, edge.to];
    if (this.boxes.get(edge.to).column !== column || !rows.above(upper, lower)) return false;
    const weight = edge.kind === "value" || edge.kind === "gradient" ? 2 : 1;
    graph.edges.push({ tail: upper, head: lower, attributes: { ...this._line(edge), id: this._idOf(edge), tooltip: " ", weight, ...(up ? { dir: "back" } : {}) } });
    return true;
  }
};
