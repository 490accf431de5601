"use strict";
(() => {
  const root = document.documentElement;
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const all = (selector, of = document) => [...of.querySelectorAll(selector)];
  const hidden = { variant: new Set(), precision: new Set() };
  const plots = new Map(); // key: { el, spec, view, axes, drawn }

  // How plots look: everything that follows the colour scheme is read from the style sheet.
  const themed = (layout) => {
    const axis = (given) => ({
      gridcolor: css("--grid"), linecolor: css("--line"), zerolinecolor: css("--soft"),
      zeroline: false, ticks: "", automargin: true, ...given,
      title: { standoff: 12, ...(given || {}).title },
    });
    return {
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--soft") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 8, r: 12, t: 12, b: 8 },
      hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--ink"), size: 13 }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--line"), activecolor: css("--soft") },
      showlegend: false, dragmode: "zoom", ...layout,
      xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
    };
  };
  const styled = (trace) => {
    const t = { ...trace, visible: seen(trace) };
    if (t.meta && t.meta.scale === "diverging")
      t.colorscale = [[0, css("--cool")], [0.5, css("--grid")], [1, css("--warm")]];
    if (t.type === "bar" && t.marker.pattern)
      t.marker = { ...t.marker, pattern: { ...t.marker.pattern, fgcolor: css("--surface") } };
    if (t.error_x) t.error_x = { ...t.error_x, color: css("--ink") };
    return t;
  };
  const seen = ({ meta = {} }) => meta.all
    ? !hidden.variant.size && !hidden.precision.size
    : !hidden.variant.has(meta.variant) && !hidden.precision.has(meta.precision);

  // A column of customdata as x or y: tabs of the loss curves.
  const picked = (trace, axes) => {
    const rows = trace.customdata.filter((row) => row[axes.y.column] !== null);
    return { ...trace, customdata: rows, x: rows.map((r) => r[axes.x.column]), y: rows.map((r) => r[axes.y.column]) };
  };
  // Labels that stand at the end of a bar, beyond its error bar.
  const labels = (data) => data.filter((t) => t.meta && t.meta.label && seen(t)).map((t) => ({
    x: Math.max(t.meta.edge, 0), y: t.y[0], text: t.meta.label, showarrow: false, xanchor: "left", xshift: 8, font: { color: css("--ink") },
  }));

  const draw = (plot) => {
    let { data, layout } = plot.spec.axes ? plot.spec : plot.spec.views[plot.view];
    if (plot.axes) {
      const { x, y } = plot.axes;
      data = data.map((t) => picked(t, plot.axes));
      layout = { ...layout, xaxis: { ...layout.xaxis, title: { text: x.title } }, yaxis: { ...layout.yaxis, title: { text: y.title } } };
    }
    const final = themed({ ...layout, annotations: labels(data) });
    plot.el.style.height = `${layout.height}px`;
    Plotly.react(plot.el, data.map(styled), final, { responsive: true, displaylogo: false, displayModeBar: plot.spec.tools ? "hover" : false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "autoScale2d", "resetScale2d"]] });
    plot.drawn = true;
  };
  const redraw = () => plots.forEach((plot) => plot.drawn && draw(plot));

  for (const el of all(".plot")) {
    const key = el.id.slice("plot-".length);
    const spec = JSON.parse(document.getElementById(`data-${key}`).textContent);
    const axes = spec.axes && { x: spec.axes.x[0], y: spec.axes.y[0] };
    plots.set(key, { el, spec, axes, view: 0, drawn: false });
  }
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      draw(plots.get(entry.target.id.slice("plot-".length)));
    }
  }, { rootMargin: "600px" });
  plots.forEach((plot) => near.observe(plot.el));
  addEventListener("beforeprint", () => plots.forEach(draw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  const press = (button) => {
    for (const other of all("button", button.parentElement)) other.setAttribute("aria-pressed", other === button);
  };
  for (const tabs of all(".tabs[data-plot]")) {
    tabs.addEventListener("click", ({ target }) => {
      if (!target.matches("button")) return;
      const plot = plots.get(tabs.dataset.plot), i = Number(target.dataset.i);
      if (tabs.dataset.of === "view") plot.view = i;
      else plot.axes[tabs.dataset.of] = plot.spec.axes[tabs.dataset.of][i];
      press(target);
      draw(plot);
    });
  }
  for (const select of all("select[data-plot]")) {
    select.addEventListener("change", () => {
      const plot = plots.get(select.dataset.plot);
      const picks = all(`select[data-plot="${select.dataset.plot}"]`);
      const found = plot.spec.views.findIndex((view) => picks.every((s) => view[s.dataset.of] === s.value));
      if (found >= 0) plot.view = found;
      for (const s of picks) s.value = plot.spec.views[plot.view][s.dataset.of];
      draw(plot);
    });
  }

  // Legends: one click hides a variant or a precision in every plot.
  for (const button of all(".legend button")) {
    const of = button.dataset.variant === undefined ? "precision" : "variant";
    const name = button.dataset[of];
    button.addEventListener("click", () => {
      if (!hidden[of].delete(name)) hidden[of].add(name);
      for (const twin of all(".legend button")) {
        if (twin.dataset[of] === name) twin.setAttribute("aria-pressed", !hidden[of].has(name));
      }
      redraw();
    });
  }

  // Tables: sort by the raw value; what has none stays last.
  const raw = (cell) => (cell.dataset.value === undefined ? cell.textContent : cell.dataset.value);
  const order = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  for (const table of all("table.sortable")) {
    all("thead th", table).forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        for (const other of all("thead th", table)) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        const rows = [...table.tBodies[0].rows].map((row) => [raw(row.cells[column]), row]);
        rows.sort(([a], [b]) => (a === "" || b === "" ? (a === "") - (b === "") : sign * order(a, b)));
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }
  for (const bar of all("[data-controls=bytes]")) {
    const table = bar.parentElement.querySelector("table[data-n]");
    const show = (button) => { table.dataset.n = button.dataset.n; press(button); };
    for (const button of all("button", bar)) button.addEventListener("click", () => show(button));
    show(bar.querySelector("button"));
  }

  // Contents: mark the section that is being read.
  const links = new Map(all("nav ol a").map((a) => [a.getAttribute("href").slice(1), a]));
  const here = () => {
    let current = "top";
    for (const id of links.keys()) if (document.getElementById(id).getBoundingClientRect().top < 140) current = id;
    links.forEach((a, id) => a.classList.toggle("here", id === current));
  };
  addEventListener("scroll", here, { passive: true });
  here();
})();
