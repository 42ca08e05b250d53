(function () {
  "use strict";
  var root = document.documentElement;
  var figures = JSON.parse(document.getElementById("figures").textContent);
  var plots = Array.prototype.slice.call(document.querySelectorAll(".plot"));
  var colourKeys = { color: 1, fillcolor: 1, fgcolor: 1, bgcolor: 1 };
  var dark = window.matchMedia("(prefers-color-scheme: dark)");

  // A figure names colours by CSS variable; each theme has its own values.
  function resolve(value, style) {
    if (Array.isArray(value)) return value.map(function (v) { return resolve(v, style); });
    if (value === null || typeof value !== "object") return value;
    var out = {};
    Object.keys(value).forEach(function (key) {
      var v = value[key];
      if (colourKeys[key] && typeof v === "string" && v.slice(0, 2) === "--") out[key] = style.getPropertyValue(v).trim();
      else out[key] = resolve(v, style);
    });
    return out;
  }

  function themed(figure, width) {
    var style = getComputedStyle(root);
    var css = function (name) { return style.getPropertyValue(name).trim(); };
    var f = resolve(figure, style);
    var l = f.layout;
    l.paper_bgcolor = css("--paper");
    l.plot_bgcolor = css("--paper");
    l.font = { family: css("--sans"), size: 12, color: css("--ink") };
    l.hoverlabel = { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--ink"), family: css("--mono"), size: 11 }, align: "left" };
    l.legend.bgcolor = "rgba(0,0,0,0)";
    ["xaxis", "yaxis"].forEach(function (a) {
      l[a].gridcolor = css("--grid"); l[a].linecolor = css("--line"); l[a].tickcolor = css("--line");
      l[a].tickfont = { size: 11, color: css("--ink") };
    });
    // A narrow chart has its legend in one column and less room for the axis title.
    if (width < 520) {
      var entries = f.data.filter(function (t) { return t.showlegend !== false; }).length;
      l.height += Math.max(0, 19 * entries - 30);
      l.xaxis.title.font = { size: 10 };
    }
    return f;
  }

  var config = { responsive: true, displayModeBar: false, scrollZoom: false, doubleClick: "reset" };
  var drawn = {};

  function draw(div) {
    var id = div.dataset.figure;
    var f = themed(figures[id], div.clientWidth);
    var old = drawn[id];
    if (old && div.layout && div.layout.xaxis) f.layout.xaxis.range = div.layout.xaxis.range.slice();
    drawn[id] = true;
    Plotly.react(div, f.data, f.layout, config);
  }
  function redraw() { plots.forEach(function (d) { if (drawn[d.dataset.figure]) draw(d); }); }

  var keys = { ArrowLeft: "left", ArrowRight: "right", "+": "in", "=": "in", "-": "out", "0": "all" };
  function move(div, what) {
    if (!div.layout) return false;
    var r = div.layout.xaxis.range.map(Number), w = r[1] - r[0], m = (r[0] + r[1]) / 2;
    var n = { left: [r[0] - w / 5, r[1] - w / 5], right: [r[0] + w / 5, r[1] + w / 5],
      "in": [m - w / 4, m + w / 4], out: [m - w, m + w],
      all: figures[div.dataset.figure].layout.xaxis.range.slice() }[what];
    Plotly.relayout(div, { "xaxis.range": n });
    return true;
  }

  plots.forEach(function (div) {
    div.style.minHeight = div.dataset.height + "px";
    var figure = div.closest("figure"), tools = figure.querySelector(".tools");
    tools.hidden = false;
    tools.addEventListener("click", function (e) {
      var what = e.target.dataset && e.target.dataset.do;
      if (what) move(div, what);
    });
    div.addEventListener("keydown", function (e) {
      if (e.ctrlKey || e.metaKey || e.altKey || !keys[e.key]) return;
      if (move(div, keys[e.key])) e.preventDefault();
    });
  });

  if ("IntersectionObserver" in window) {
    var watch = new IntersectionObserver(function (entries) {
      entries.forEach(function (e) { if (e.isIntersecting) { watch.unobserve(e.target); draw(e.target); } });
    }, { rootMargin: "600px 0px" });
    plots.forEach(function (d) { watch.observe(d); });
  } else plots.forEach(draw);

  // Theme: automatic, light, dark. Printing is always light and shows every chart.
  var button = document.getElementById("theme");
  var choices = ["automatic", "light", "dark"], at = 0;
  function apply(name) {
    if (name === "automatic") root.removeAttribute("data-theme"); else root.setAttribute("data-theme", name);
    redraw();
  }
  button.hidden = false;
  button.addEventListener("click", function () {
    at = (at + 1) % choices.length;
    button.textContent = "Theme: " + choices[at];
    apply(choices[at]);
  });
  dark.addEventListener("change", redraw);
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (d) { d.open = true; });
    root.setAttribute("data-theme", "light"); plots.forEach(draw); });
  window.addEventListener("afterprint", function () { apply(choices[at]); });
})();
