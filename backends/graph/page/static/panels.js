// What stands beside the drawing: the tree of modules, the hits of a search, the details of what is selected.
"use strict";

// Makes an element; text only ever becomes text, whatever a model calls its modules.
E2Step.make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") Object.entries(value).forEach(([event, act]) => element.addEventListener(event, act));
    else if (value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
};

E2Step.Tree = class {
  constructor(element, model, act) { this.element = element; this.model = model; this.act = act; this.total = model.root.all.energy || 1; }

  render(open, selected) {
    this.element.replaceChildren(...this._items(this.model.root, open, selected));
  }

  _items(group, open, selected) {
    return [...group.children.values()].map((child) => {
      const isOpen = open.has(child.id), make = E2Step.make;
      const share = child.all.energy / this.total;
      const row = make("div", { class: `row${selected === child ? " selected" : ""}`, title: child.path.join(".") },
        make("button", { type: "button", class: "twist", "aria-label": `${isOpen ? "Close" : "Open"} ${child.name}`, on: { click: () => this.act.toggle(child) } }, isOpen ? "\u25be" : "\u25b8"),
        make("button", { type: "button", class: "name", on: { click: () => this.act.select({ group: child }) } }, child.name),
        make("span", { class: "share", title: `${E2Step.si(child.all.energy, "J")}` },
          make("i", { style: `width:${(100 * share).toFixed(1)}%` })));
      const item = make("li", { role: "treeitem", "aria-expanded": String(isOpen), "data-group": child.id }, row);
      if (isOpen && child.children.size) item.append(make("ul", { role: "group" }, ...this._items(child, open, selected)));
      return item;
    });
  }
};

E2Step.Search = class {
  constructor(input, list, model, act) {
    this.list = list; this.model = model; this.act = act; this.texts = null;
    input.addEventListener("input", () => this.find(input.value));
    input.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { input.value = ""; this.find(""); }
      if (event.key === "Enter") this.list.querySelector("button")?.click();
    });
  }

  find(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    this.list.hidden = !words.length;
    if (!words.length) { this.list.replaceChildren(); return; }
    const { model } = this, make = E2Step.make, hits = [];
    this.texts ??= Array.from({ length: model.count }, (_, i) => this._textOf(i));
    for (const group of model.groups) {
      const path = group.path.join(".").toLowerCase();
      if (group.id && words.every((word) => path.includes(word))) hits.push({ group });
    }
    let more = Math.max(0, hits.length - 20);
    hits.splice(20);
    for (let i = 0; i < model.count; i++) {
      if (!model.isPicking(i) && words.every((word) => this.texts[i].includes(word))) {
        if (hits.length < 60) hits.push({ index: i }); else more += 1;
      }
    }
    const items = hits.map((hit) => make("li", {}, make("button", { type: "button", on: { click: () => this.act.reveal(hit) } }, ...this._label(hit))));
    if (more) items.push(make("li", { class: "more" }, `and ${more} more`));
    if (!items.length) items.push(make("li", { class: "more" }, "nothing found"));
    this.list.replaceChildren(...items);
  }

  _textOf(i) {
    const node = this.model.node(i);
    return [node.full, node.op, node.path, node.tag, node.technique, node.line, node.pass, ...node.state].join(" ").toLowerCase();
  }

  _label(hit) {
    const make = E2Step.make;
    if (hit.group) return [make("b", {}, hit.group.path.join(".")), make("small", {}, `module, ${hit.group.all.count} operations`)];
    const node = this.model.node(hit.index);
    return [make("b", {}, node.full), make("small", {}, [node.short, node.tag, node.path].filter(Boolean).join(" \u00b7 "))];
  }
};

E2Step.Details = class {
  constructor(element, model, act) { this.element = element; this.model = model; this.act = act; }

  show(selection, open) {
    const content = !selection ? this._nothing() : selection.group ? this._group(selection.group, open) : this._node(this.model.node(selection.index));
    this.element.replaceChildren(...content);
    this.element.scrollTop = 0;
  }

  _nothing() {
    const make = E2Step.make, all = this.model.root.all;
    return [make("h2", {}, "The whole step"), this._figures(all),
      make("p", { class: "hint" }, "Click a box for its cost and origin; double-click opens a module, a double click on an open frame closes it. Drag to move, scroll to zoom."),
      ...this._split("Energy by technique", all.technique, all.energy, E2Step.COLOUR.technique),
      ...this._split("Energy by phase", all.phase, all.energy, E2Step.COLOUR.phase),
      ...(this.model.data.changes.length ? this._split("Energy by change", all.change, all.energy, E2Step.COLOUR.change) : [])];
  }

  _figures(totals, p, formula) {
    const make = E2Step.make, whole = this.model.root.all;
    const share = (key) => (whole[key] ? ` (${E2Step.percent(totals[key] / whole[key])})` : "");
    return this._list([
      ["energy", make("strong", { "data-figure": "energy" }, E2Step.si(totals.energy, "J") + share("energy"))],
      ["time", E2Step.si(totals.time, "s") + share("time")],
      ["MACs", E2Step.si(totals.macs, "") + share("macs")],
      ...(totals.dram === undefined ? [] : [[`${this.model.data.dram} traffic`, E2Step.si(totals.dram, "B")]]),
      ...(p === undefined ? [["operations", String(totals.count)]] : [["executions", `${p} per nominal step`]]),
      ...(formula ? [["formula", make("span", { "data-figure": "formula" }, formula)]] : []),
    ]);
  }

  _list(rows) {
    const make = E2Step.make;
    return make("dl", {}, ...rows.filter(([, value]) => value).flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, value)]));
  }

  _split(title, parts, total, colours) {
    const make = E2Step.make;
    const rows = Object.entries(parts).filter(([, joules]) => joules > 0).sort((a, b) => b[1] - a[1]).map(([key, joules]) =>
      make("li", {}, make("span", { class: "key" }, make("i", { style: `background:${colours[key] || "#9aa5b1"}` }), key),
        make("span", { class: "meter" }, make("i", { style: `width:${(100 * joules / (total || 1)).toFixed(1)}%;background:${colours[key] || "#9aa5b1"}` })),
        make("span", { class: "value" }, E2Step.si(joules, "J"))));
    return rows.length ? [make("h3", {}, title), make("ul", { class: "split" }, ...rows)] : [];
  }

  _group(group, open) {
    const make = E2Step.make, isOpen = open.has(group.id), dearest = this._dearest(group);
    return [make("h2", {}, group.path.join(".")),
      make("p", {}, make("button", { type: "button", class: "primary", on: { click: () => this.act.toggle(group) } }, isOpen ? "Close" : "Open")),
      this._figures(group.all),
      ...this._split("Energy by technique", group.all.technique, group.all.energy, E2Step.COLOUR.technique),
      ...this._split("Energy by phase", group.all.phase, group.all.energy, E2Step.COLOUR.phase),
      make("h3", {}, "Most expensive operations"), this._links(dearest, (node) => E2Step.si(node.energy, "J"))];
  }

  _dearest(group) {
    const found = [], stack = [group];
    while (stack.length) { const at = stack.pop(); found.push(...at.nodes); stack.push(...at.children.values()); }
    return found.sort((a, b) => this.model.cost(b)[2] - this.model.cost(a)[2]).slice(0, 6).filter((i) => this.model.cost(i)[2] > 0);
  }

  _links(indices, note) {
    const make = E2Step.make;
    if (!indices.length) return make("p", { class: "hint" }, "none");
    return make("ul", { class: "links" }, ...indices.slice(0, 12).map((index) => {
      const node = this.model.node(index);
      return make("li", {}, make("button", { type: "button", "data-node": index, on: { click: () => this.act.reveal({ index }) } }, node.full), make("small", {}, note(node)));
    }), indices.length > 12 ? make("li", { class: "hint" }, `and ${indices.length - 12} more`) : null);
  }

  _node(node) {
    const make = E2Step.make;
    const badges = [node.phase, node.technique === "base" ? "" : node.technique, node.tag].filter(Boolean).map((text) => make("span", { class: "badge" }, text));
    return [make("h2", {}, node.full), make("p", { class: "op" }, node.op), make("p", {}, ...badges), ...this._price(node),
      make("h3", {}, "Origin"),
      this._list([["module", node.path], ["source line", node.line], ["made by", node.pass], ["change", this.model.data.changes.length ? this.model.change(node.index) : ""], ["region", node.region], ["block", node.block], ["produces", node.type], ["parameters", node.state.join(", ")]]),
      make("h3", {}, "Reads"), this.model.data.no_gradient.includes(node.index)
        ? make("p", { class: "hint" }, "a gradient that never arrives: the loss does not depend on this output")
        : this._links(this._beyond(node.reads, (i) => this.model.data.nodes.reads[i]), (other) => other.short),
      make("h3", {}, "Read by"), this._links(this._beyond(this.model.readers(node.index), (i) => this.model.readers(i)), (other) => other.short)];
  }

  // Neighbours, looking through what only picks a result.
  _beyond(indices, next) {
    const found = new Set(), stack = [...indices].reverse();
    while (stack.length) {
      const at = stack.pop();
      if (this.model.isPicking(at)) stack.push(...[...next(at)].reverse()); else found.add(at);
    }
    return [...found];
  }

  _price(node) {
    const make = E2Step.make;
    if (node.status !== "priced") {
      return [make("h3", {}, "Cost"), make("p", { class: node.status === "free" ? "" : "warn" }, `${node.status}: ${node.formula}`), this._list([["executions", `${node.p} per nominal step`]])];
    }
    const levels = this.model.data.levels.map(([level, sources], i) => ({ level, sources, joules: node.levels[i] })).filter((entry) => entry.joules > 0);
    return [make("h3", {}, "Cost in a nominal step"), this._figures(node, node.p, node.formula),
      make("ul", { class: "levels" }, ...levels.map(({ level, sources, joules }) => make("li", {},
        make("details", {}, make("summary", {}, make("span", { class: "key" }, level), make("span", { class: "value" }, `${E2Step.si(joules, "J")}`)),
          make("ul", { class: "sources" }, ...sources.map(([key, text]) => make("li", {}, make("code", {}, key), " ", text)))))))];
  }
};
