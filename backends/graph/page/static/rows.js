// In which row a box stands: forward in the order of execution from the top, backward and update beside it.
"use strict";

// Every edge that moves something runs from a lower to a higher number, and boxes side by side share one, so that
// whatever is open, no two wishes contradict each other: Graphviz fails on those, and says so on the console.
E2Step.Rows = class {
  constructor(model, boxes, edges) {
    this.model = model; this.boxes = boxes; this.row = new Map(); this.pairs = [];
    this.small = 1 / (boxes.size + 1);
    const columns = { f: [], b: [], u: [] };
    for (const [id, box] of boxes) columns[box.column].push(id);
    this._forward(columns.f);
    this._backward(columns.b);
    this._update(columns.u, edges);
    this._closed();
  }

  // The boxes that stand side by side, all of a row at once.
  beside() {
    const sides = new Map();
    for (const ids of this.pairs) {
      const row = this.row.get(ids[0]);
      if (!sides.has(row)) sides.set(row, new Set());
      ids.forEach((id) => sides.get(row).add(id));
    }
    return sides.values();
  }

  above(one, other) { return this.row.get(one) < this.row.get(other); }

  // What rewrites put in front of a module's own operations does not move the module.
  _of(group) { return group.first < this.model.count ? group.first : group.first - this.model.count; }

  _isClosed(id) { return this.boxes.get(id).index === undefined; }

  _forward(ids) {
    for (const id of ids) this.row.set(id, this._isClosed(id) ? this._of(this.boxes.get(id).group) : this.boxes.get(id).index);
  }

  // Backward runs from the bottom up. Closed modules stand beside their forward; what is between them keeps its order,
  // and the last operation of an open module stands beside its first of forward where that leaves the order.
  _backward(ids) {
    const turn = (id) => (this._isClosed(id) ? this.model.firstIn(this.boxes.get(id).group, "b") : this.model.rank(this.boxes.get(id).index));
    const ordered = ids.map((id) => [turn(id), id]).sort(([a], [b]) => b - a).map(([, id]) => id);
    const fixed = ordered.map((id) => (this._isClosed(id) && this.boxes.get(id).group.totals.f.count ? this._of(this.boxes.get(id).group) : null));
    const below = new Array(ids.length + 1).fill(Infinity);
    for (let i = ids.length - 1; i >= 0; i--) below[i] = Math.min(below[i + 1], fixed[i] ?? Infinity);
    const starts = this._starts();
    let row = -1;
    ordered.forEach((id, i) => {
      const { group } = this.boxes.get(id), start = this._isClosed(id) ? undefined : starts.get(group);
      if (!this._isClosed(id)) starts.delete(group);
      if (fixed[i] !== null) {
        this.row.set(id, fixed[i]);
        row = Math.max(row, fixed[i]);
      } else if (start && this.row.get(start) > row && this.row.get(start) < below[i]) {
        row = this.row.get(start);
        this.row.set(id, row);
        this.pairs.push([start, id]);
      } else {
        row += this.small;
        this.row.set(id, row);
      }
    });
  }

  // The first operation of forward in each open module.
  _starts() {
    const starts = new Map();
    for (const [id, box] of this.boxes) {
      if (box.column === "f" && box.index !== undefined && !starts.has(box.group)) starts.set(box.group, id);
    }
    return starts;
  }

  // An update stands beside the gradient or the value that it reads, what follows from it below it.
  _update(ids, edges) {
    const reads = new Map();
    for (const { from, to } of edges) if (this.boxes.get(to).column === "u") reads.set(to, [...(reads.get(to) || []), from]);
    const loss = [...this.boxes].find(([, box]) => box.group.path[0] === "(loss)")?.[0];
    for (const id of ids) {
      const { group } = this.boxes.get(id), totals = group.totals;
      if (this._isClosed(id) && (totals.f.count || totals.b.count)) {
        this.row.set(id, this.row.get(`g${group.id}${totals.f.count ? "f" : "b"}`));
        continue;
      }
      const from = reads.get(id) || [], source = from.find((read) => this.boxes.get(read).column !== "u");
      const home = this._isClosed(id) ? loss : source;
      if (home) this.pairs.push([home, id]);
      const known = from.map((read) => this.row.get(read)).filter((row) => row !== undefined);
      this.row.set(id, home ? this.row.get(home) : Math.max(-1, ...known) + this.small);
    }
  }

  _closed() {
    const groups = new Set([...this.boxes.values()].filter((box) => box.index === undefined).map((box) => box.group));
    for (const group of groups) {
      const ids = [..."fbu"].map((column) => `g${group.id}${column}`).filter((id) => this.boxes.has(id));
      if (ids.length > 1) this.pairs.push(ids);
    }
  }
};
