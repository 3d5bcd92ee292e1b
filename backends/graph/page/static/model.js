// Decodes the page's data into operations and the hierarchy of modules that they hang in.
"use strict";
const E2Step = {};

E2Step.COLUMNS = { f: "forward", b: "backward", u: "update" };

E2Step.Model = class {
  constructor(data) {
    this.data = data;
    this.count = data.nodes.name.length;
    this.picking = new Set(data.picking);
    this.column = data.nodes.kind.map((kind) => E2Step.columnOf(data.kinds[kind][2]));
    this.origin = this._throughPickings();
    this._readers = null;
    this._grow();
  }

  // One operation as an object; there are thousands, so they are made when they are looked at.
  node(index) {
    const { data } = this, columns = data.nodes;
    const [op, short, phase, technique, tag, pass, type] = data.kinds[columns.kind[index]];
    const [status, p, energy, time, macs, dram, levels, formula] = data.costs[columns.cost[index]];
    const [path, line, block] = data.origins[columns.origin[index]];
    const region = data.regions[columns.region[index]];
    return {
      index, op, short, phase, technique, tag, pass, type, status, p, energy, time, macs, dram, levels, formula, path,
      line, block, region, name: data.names[columns.name[index]], full: `${region}/${data.names[columns.name[index]]}`,
      reads: columns.reads[index], state: columns.state[index].map((number) => data.names[number]),
      column: this.column[index], group: this.groupOf[index],
    };
  }

  // What an operation counts as in a mode of colouring by kind.
  sort(index, mode) {
    if (mode === "change") return this.change(index).split(":")[0];
    return this.kind(index)[mode === "phase" ? 2 : 3];
  }

  change(index) { return this.data.changes[this.data.nodes.change[index]] || "same"; }

  cost(index) { return this.data.costs[this.data.nodes.cost[index]]; }

  kind(index) { return this.data.kinds[this.data.nodes.kind[index]]; }

  readers(index) {
    if (!this._readers) {
      this._readers = Array.from({ length: this.count }, () => []);
      this.data.nodes.reads.forEach((reads, reader) => reads.forEach((read) => this._readers[read].push(reader)));
    }
    return this._readers[index];
  }

  isPicking(index) { return this.picking.has(this.kind(index)[0]); }

  // For each operation the one that an edge from it starts at in the drawing.
  _throughPickings() {
    const origin = [];
    for (let i = 0; i < this.count; i++) {
      const reads = this.data.nodes.reads[i];
      origin.push(this.isPicking(i) && reads.length ? origin[reads[0]] ?? reads[0] : i);
    }
    return origin;
  }

  _grow() {
    this.root = { id: 0, name: "", path: [], parent: null, children: new Map(), nodes: [] };
    const leaves = this.data.groups.map((path) => this._descend(path));
    this.groups = [];
    this.groupOf = this.data.nodes.group.map((number) => leaves[number]);
    this.groupOf.forEach((group, index) => group.nodes.push(index));
    this._shorten(this.root);
    this._number(this.root);
    this._sort(this.root);
  }

  _descend(path) {
    let group = this.root;
    for (const name of path) {
      if (!group.children.has(name)) {
        group.children.set(name, { name, path: [...group.path, name], parent: group, children: new Map(), nodes: [] });
      }
      group = group.children.get(name);
    }
    return group;
  }

  // A group that holds one group and nothing else is shown as one, "blocks.0".
  _shorten(group) {
    for (const [key, child] of [...group.children]) {
      this._shorten(child);
      if (group.parent === null && !child.nodes.length && child.children.size === 1) {
        const [only] = child.children.values();
        only.name = `${child.name}.${only.name}`;
        only.parent = group;
        group.children.set(key, only);
      }
    }
  }

  // Modules are listed in the order in which the model's own operations run, not in that of what rewrites put in front.
  rank(index) { return this.kind(index)[3] === "base" ? index : this.count + index; }

  // The same of what a group does in one column.
  firstIn(group, column) {
    const own = group.nodes.filter((index) => this.column[index] === column).map((index) => this.rank(index));
    return Math.min(...own, ...[...group.children.values()].map((child) => this.firstIn(child, column)));
  }

  _sort(group) {
    group.children.forEach((child) => this._sort(child));
    group.children = new Map([...group.children].sort(([, a], [, b]) => a.first - b.first));
  }

  _number(group) {
    group.id = this.groups.length;
    group.totals = { f: E2Step.zero(), b: E2Step.zero(), u: E2Step.zero() };
    this.groups.push(group);
    for (const index of group.nodes) E2Step.add(group.totals[this.column[index]], this, index);
    for (const child of group.children.values()) {
      this._number(child);
      for (const column of "fbu") E2Step.merge(group.totals[column], child.totals[column]);
    }
    group.first = Math.min(...group.nodes.map((index) => this.rank(index)), ...[...group.children.values()].map((child) => child.first));
    group.all = E2Step.zero();
    for (const column of "fbu") E2Step.merge(group.all, group.totals[column]);
  }
};

E2Step.columnOf = (phase) =>
  phase === "data" || phase === "forward" || phase === "loss" ? "f" : phase === "update" ? "u" : "b";

E2Step.zero = () => ({ count: 0, energy: 0, time: 0, macs: 0, technique: {}, phase: {}, change: {} });

E2Step.add = (totals, model, index) => {
  const cost = model.cost(index);
  totals.count += 1; totals.energy += cost[2]; totals.time += cost[3]; totals.macs += cost[4];
  for (const mode of ["technique", "phase", "change"]) {
    const sort = model.sort(index, mode);
    totals[mode][sort] = (totals[mode][sort] || 0) + cost[2];
  }
};

E2Step.merge = (into, from) => {
  for (const key of ["count", "energy", "time", "macs"]) into[key] += from[key];
  for (const key of ["technique", "phase", "change"]) {
    for (const [name, joules] of Object.entries(from[key])) into[key][name] = (into[key][name] || 0) + joules;
  }
};

const PREFIXES = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "\u00b5"], [1e-9, "n"], [1e-12, "p"]];
E2Step.si = (value, unit) => {
  if (!value) return `0 ${unit}`.trim();
  const [factor, prefix] = PREFIXES.find(([size]) => Math.abs(value) >= size) || PREFIXES.at(-1);
  return `${Number((value / factor).toPrecision(3))} ${prefix}${unit}`.trim();
};
E2Step.percent = (share) => `${Number((100 * share).toPrecision(share >= 0.1 ? 3 : 2))} %`;
