"use strict";
// Draws each chart when it comes near the window; all of them before the page is printed.
const places = [...document.querySelectorAll(".chart")];
const dark = matchMedia("(prefers-color-scheme: dark)");
const options = {responsive: true, displayModeBar: false};
// A finger that moves over a chart scrolls the page.
const touch = matchMedia("(pointer: coarse)").matches;

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  return {ink: of("--ink"), dim: of("--dim"), paper: of("--card"), rule: of("--rule")};
}

function dressed(layout) {
  const {ink, dim, paper, rule} = colours();
  const axis = {gridcolor: rule, zerolinecolor: rule, linecolor: rule, automargin: true, tickfont: {color: dim}};
  const own = layout || {};
  return {
    ...own,
    paper_bgcolor: paper,
    plot_bgcolor: paper,
    font: {family: "system-ui, sans-serif", size: 11, color: ink},
    margin: {l: 46, r: 12, t: 8, b: 36, ...own.margin},
    legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom"},
    dragmode: touch ? false : "zoom",
    hoverlabel: {namelength: 40},
    xaxis: {...axis, ...own.xaxis},
    yaxis: {...axis, ...own.yaxis},
  };
}

function draw(place) {
  const found = JSON.parse(document.getElementById(place.dataset.figure).textContent);
  place.dataset.drawn = "yes";
  return Plotly.react(place, found.data, dressed(found.layout), options);
}

function drawAll() {
  return Promise.all(places.map(draw));
}

function redrawDrawn() {
  return Promise.all(places.filter((place) => place.dataset.drawn).map(draw));
}

const watcher = new IntersectionObserver((seen) => {
  for (const one of seen) {
    if (one.isIntersecting) {
      watcher.unobserve(one.target);
      draw(one.target);
    }
  }
  document.documentElement.dataset.ready = "true";
}, {rootMargin: "600px"});
places.forEach((place) => watcher.observe(place));
if (!places.length) document.documentElement.dataset.ready = "true";
dark.addEventListener("change", redrawDrawn);
addEventListener("beforeprint", drawAll);
addEventListener("afterprint", redrawDrawn);

// A browser keeps the place in a page that reloads itself.
const seconds = Number(document.body.dataset.refresh);
if (seconds > 0) setTimeout(() => location.reload(), 1000 * seconds);
