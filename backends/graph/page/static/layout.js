// Graphviz, whose errors are read here and never printed.
"use strict";

E2Step.layout = async () => {
  // What Graphviz writes to its error stream goes to where console.error leads while it starts.
  const said = [], error = console.error;
  console.error = (...words) => said.push(words.join(" "));
  const starting = Viz.instance();
  console.error = error;
  const viz = await starting;
  // Where curves around the boxes are too much for it, it draws straight lines instead of leaving edges out.
  return (graph) => {
    said.length = 0;
    const curved = viz.render(graph, { format: "svg" });
    const drawn = curved.status === "success" && !said.length ? curved
      : viz.render({ ...graph, graphAttributes: { ...graph.graphAttributes, splines: "line" } }, { format: "svg" });
    if (drawn.status !== "success") throw new Error(drawn.errors.map((one) => one.message).join("; "));
    return new DOMParser().parseFromString(drawn.output, "image/svg+xml").documentElement;
  };
};
