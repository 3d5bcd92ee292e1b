// The page: ties the drawing and the panels together.
"use strict";
(async () => {
  const $ = (id) => document.getElementById(`step-${id}`);
  const canvas = $("canvas"), holder = $("drawing"), status = $("status");
  const zoom = Panzoom(holder, { maxScale: 6, minScale: 0.05, canvas: true, cursor: "grab", origin: "0 0", step: 0.25 });
  await new Promise((done) => setTimeout(done)); // Panzoom moves to its start once more after this script
  const model = new E2Step.Model(JSON.parse($("data").textContent));
  const drawing = new E2Step.Drawing(model, await E2Step.layout());
  let selection = null;

  const act = {
    select(next) { selection = next; panels(); mark(); },
    toggle(group) {
      const before = new Set(drawing.open);
      if (drawing.open.has(group.id)) close(group); else open(group);
      if (!draw({ keep: group })) drawing.open = before;
    },
    reveal(hit) {
      const before = new Set(drawing.open);
      let group = hit.group || model.groupOf[hit.index];
      if (hit.group) group = group.parent;
      for (let at = group; at; at = at.parent) drawing.open.add(at.id);
      selection = hit;
      if (!draw({})) { drawing.open = before; panels(); return; }
      centre(boxOf(hit));
    },
  };
  const tree = new E2Step.Tree($("tree"), model, act);
  const details = new E2Step.Details($("details"), model, act);
  new E2Step.Search($("search"), $("hits"), model, act);

  function open(group) {
    for (let at = group; at; at = at.parent) drawing.open.add(at.id);
    while (group.children.size === 1 && !group.nodes.length) { [group] = group.children.values(); drawing.open.add(group.id); }
  }

  function close(group) {
    const stack = [group];
    while (stack.length) { const at = stack.pop(); drawing.open.delete(at.id); stack.push(...at.children.values()); }
  }

  function boxOf(hit) {
    const id = hit.group ? null : drawing.boxOf(hit.index);
    if (id) return document.getElementById(id);
    for (const column of "fbu") {
      const found = document.getElementById(`g${hit.group.id}${column}`) || document.getElementById(`c_g${hit.group.id}${column}`);
      if (found) return found;
    }
    return null;
  }

  // Draws what is open; a group to keep stays where it is on the screen.
  function draw({ keep, fit }) {
    const started = performance.now();
    const before = keep && place(boxOf({ group: keep })), pan = zoom.getPan();
    let svg;
    try { svg = drawing.render(); } catch (problem) { say(`Graphviz cannot draw this: ${problem.message}`); return false; }
    if (!svg) { say("That would be too much to read at once: close something first."); return false; }
    svg.querySelectorAll("title").forEach((title) => title.remove());
    holder.replaceChildren(svg);
    panels(); mark(); legend();
    if (fit) fitAll();
    const after = before && place(boxOf({ group: keep }));
    if (after) zoom.pan(pan.x + before.left - after.left, pan.y + before.top - after.top);
    holder.dataset.drawnMs = Math.round(performance.now() - started);
    say("");
    return true;
  }

  function say(text) { status.textContent = text; status.hidden = !text; }

  function panels() { tree.render(drawing.open, selection?.group); details.show(selection, drawing.open); }

  function mark() {
    holder.querySelectorAll(".selected, .near").forEach((element) => element.classList.remove("selected", "near"));
    holder.classList.toggle("picked", Boolean(selection));
    if (!selection) return;
    const ids = new Set(selection.group ? [..."fbu"].map((column) => `g${selection.group.id}${column}`) : [drawing.boxOf(selection.index)]);
    if (selection.group) [..."fbu"].forEach((column) => document.getElementById(`c_g${selection.group.id}${column}`)?.classList.add("selected"));
    ids.forEach((id) => document.getElementById(id)?.classList.add("selected"));
    for (const edge of holder.querySelectorAll("g.edge")) {
      const [, from, to] = edge.id.split("_");
      if (ids.has(from) || ids.has(to)) {
        edge.classList.add("near");
        [from, to].forEach((id) => document.getElementById(id)?.classList.add("near"));
      }
    }
  }

  function legend() {
    const make = E2Step.make, by = drawing.colour;
    const swatch = (colour, text) => make("span", {}, make("i", { style: `background:${colour}` }), text);
    if (E2Step.COLOUR[by]) {
      const used = new Set(Array.from({ length: model.count }, (_, index) => model.sort(index, by)));
      $("legend").replaceChildren(...Object.entries(E2Step.COLOUR[by]).filter(([key]) => used.has(key)).map(([key, colour]) => swatch(colour, key)));
      return;
    }
    const most = drawing.largest[by];
    const stops = [0, 0.25, 0.5, 0.75, 1].map((at) => E2Step.heat(at * at)).join(",");
    $("legend").replaceChildren(make("span", {}, "0"), make("i", { class: "ramp", style: `background:linear-gradient(90deg,${stops})` }),
      make("span", {}, E2Step.si(most, by === "energy" ? "J" : "s")));
  }

  function fitAll() {
    const svg = holder.firstElementChild, pane = canvas.getBoundingClientRect();
    const width = svg.width.baseVal.value, height = svg.height.baseVal.value;
    const scale = Math.min(1.4, (pane.width - 24) / width, Math.max((pane.height - 24) / height, 0.6));
    zoom.zoom(scale, { animate: false });
    const left = (pane.width - width * scale) / 2, top = Math.max(12, (pane.height - height * scale) / 2);
    zoom.pan(left / scale, top / scale, { animate: false });
  }

  // Where a box is in the drawing, whatever part of a movement the screen shows already.
  function place(box) {
    if (!box) return null;
    const at = box.getBoundingClientRect(), whole = holder.getBoundingClientRect(), scale = whole.width / holder.offsetWidth || 1;
    return { left: (at.left - whole.left) / scale, top: (at.top - whole.top) / scale, width: at.width / scale, height: at.height / scale };
  }

  function centre(box) {
    const at = place(box), pane = canvas.getBoundingClientRect();
    if (!at) return;
    const scale = Math.max(zoom.getScale(), 0.9);
    zoom.zoom(scale, { animate: false });
    zoom.pan(pane.width / 2 / scale - at.left - at.width / 2, pane.height / 2 / scale - at.top - at.height / 2, { animate: false });
  }

  // A click selects, unless it ended a drag; a double click opens what is closed and closes what is open.
  function hitOf(target) {
    const box = target.closest?.("g.box, g.open");
    if (!box) return null;
    const id = box.id.replace(/^c_/, "");
    return id[0] === "n" ? { index: Number(id.slice(1)) } : { group: model.groups[parseInt(id.slice(1), 10)] };
  }
  let pressed = null;
  canvas.addEventListener("pointerdown", (event) => { pressed = [event.clientX, event.clientY]; });
  canvas.addEventListener("click", (event) => {
    if (pressed && Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) > 5) return;
    act.select(hitOf(event.target));
  });
  canvas.addEventListener("dblclick", (event) => { const hit = hitOf(event.target); if (hit?.group) act.toggle(hit.group); });
  canvas.addEventListener("wheel", (event) => zoom.zoomWithWheel(event), { passive: false });

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { E2Step.known.clear(); draw({}); });
  if (!model.data.changes.length) $("colour").querySelector("[value=change]").remove();
  $("colour").addEventListener("change", (event) => { drawing.colour = event.target.value; draw({}); });
  $("saved").addEventListener("change", (event) => { drawing.showSaved = event.target.checked; draw({}); });
  $("home").addEventListener("click", () => { drawing.open = new Set([0]); selection = null; draw({ fit: true }); });
  $("fit").addEventListener("click", fitAll);
  $("in").addEventListener("click", () => zoom.zoomIn());
  $("out").addEventListener("click", () => zoom.zoomOut());

  draw({ fit: true });
  document.getElementById("step").dataset.ready = "true";
})();
