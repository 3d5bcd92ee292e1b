// Draws every chart of the page from the JSON beside it; a select with the chart's name changes its view.
"use strict";
(() => {
  const PREFIXES = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "\u00b5"], [1e-9, "n"]];

  function si(value, unit) {
    if (typeof value !== "number") return "";
    if (unit === "%") return `${Number((100 * value).toPrecision(3))} %`;
    const found = PREFIXES.find(([factor]) => Math.abs(value) >= factor) || (value === 0 ? [1, ""] : [1e-12, "p"]);
    return `${Number((value / found[0]).toPrecision(3))} ${found[1]}${unit}`;
  }

  // JSON holds no functions: numbers get their units here.
  function withUnits(option, units) {
    const axes = (which) => [].concat(option[which] || []);
    for (const which of ["xAxis", "yAxis"]) {
      for (const axis of axes(which)) {
        if (axis.type !== "category") {
          axis.axisLabel = { ...axis.axisLabel, formatter: (v) => si(v, units[which === "xAxis" ? "x" : "y"]) };
        }
      }
    }
    if (option.tooltip && option.tooltip.trigger === "axis") {
      option.tooltip.valueFormatter = (v) => si(v, units.value);
    } else if (option.tooltip) {
      const escape = echarts.format.encodeHTML;
      option.tooltip.formatter = (p) => p.seriesType === "line" ? escape(p.seriesName)
        : `${escape(p.data.name)}<br>${si(p.value[0], units.x)}, ${si(p.value[1], units.y)}, ${si(p.value[2], units.value)}`;
    }
    return option;
  }

  // Canvas knows no CSS: variables of the page's scheme are looked up here, by the charts' own colours and by the rest.
  const scheme = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  function looked(value) {
    if (typeof value === "string") return value.replace(/^var\((--[\w-]+)\)$/, (_, name) => scheme(name));
    if (Array.isArray(value)) return value.map(looked);
    return value && typeof value === "object" ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, looked(v)])) : value;
  }
  function theme() {
    const axis = { axisLine: { lineStyle: { color: "var(--axis)" } }, axisTick: { lineStyle: { color: "var(--axis)" } }, axisLabel: { color: "var(--axis)" } };
    return looked({
      categoryAxis: axis, valueAxis: axis, logAxis: axis,
      legend: { textStyle: { color: "var(--ink)" }, inactiveColor: "var(--field)", pageTextStyle: { color: "var(--soft)" }, pageIconColor: "var(--accent)", pageIconInactiveColor: "var(--field)" },
      tooltip: { backgroundColor: "var(--paper)", borderColor: "var(--field)", textStyle: { color: "var(--ink)" } },
      dataZoom: { borderColor: "var(--field)", backgroundColor: "var(--paper)", textStyle: { color: "var(--soft)" } },
    });
  }

  const charts = [];
  for (const source of document.querySelectorAll("script[data-chart]")) {
    const name = source.dataset.chart;
    const data = JSON.parse(source.textContent);
    const select = document.querySelector(`select[data-chart-view="${CSS.escape(name)}"]`);
    const chart = { shown: null };
    chart.draw = () => {
      const view = select ? select.value : Object.keys(data.views)[0];
      chart.shown.setOption(withUnits(looked(data.views[view]), data.units), { notMerge: true });
    };
    chart.start = () => {
      if (chart.shown) chart.shown.dispose();
      chart.shown = echarts.init(document.getElementById(name), theme());
      chart.draw();
    };
    chart.start();
    if (select) select.addEventListener("change", chart.draw);
    charts.push(chart);
  }
  window.addEventListener("resize", () => charts.forEach((chart) => chart.shown.resize()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.start()));

  // The sorting library listens to clicks; the keyboard gets the same.
  for (const heading of document.querySelectorAll("table.sortable thead th")) {
    heading.tabIndex = 0;
    heading.addEventListener("keydown", (event) => { if (event.key === "Enter") heading.click(); });
  }
})();
