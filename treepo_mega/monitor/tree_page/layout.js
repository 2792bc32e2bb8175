// Where nodes stand and what colour they have. Length is tokens; a row is a leaf.

// { rows: nodes that end a row, top: first row of each node, height: rows of each node }
function layOut(tree) {
  const count = tree.head.size.length;
  const top = new Array(count).fill(0);
  const height = new Array(count).fill(0);
  const rows = [];
  const open = [ROOT];
  while (open.length) {
    const node = open.pop();
    top[node] = rows.length;
    if (tree.children[node].length === 0 && node !== ROOT) rows.push(node);
    for (const child of [...tree.children[node]].reverse()) open.push(child);
  }
  for (const node of rows) for (const above of tree.path(node)) height[above]++;
  return { rows, top, height };
}

// The ends of the colours, over all nodes of a tree; `known`: whether any node has the figure.
function scaleOf(tree, mode) {
  const figures = tree.head[mode].slice(1).filter((one) => one !== null);
  const known = figures.length > 0;
  if (mode === "credit") return { known, low: 0, high: Math.max(1e-9, ...figures.map(Math.abs)) };
  if (mode === "value") return { known, low: Math.min(0, ...figures), high: Math.max(1e-9, ...figures) };
  if (mode === "surprisal") return { known, low: 0, high: Math.max(1e-9, ...figures) };
  const newest = Math.max(...figures);
  return { known, low: 0, high: Math.max(1, newest - Math.min(...figures)), newest };
}

function figureOf(tree, node, mode, scale) {
  if (mode === "version") return scale.newest - tree.head.version[node];
  return tree.head[mode][node];
}

// Mixed into the paper, so that text stays readable in either scheme. A square root shows small differences.
function colourOf(tree, node, mode, scale) {
  const figure = figureOf(tree, node, mode, scale);
  if (figure === null || figure === undefined) return "var(--card)";
  const share = Math.sqrt(Math.min(1, Math.abs(figure - scale.low) / (scale.high - scale.low || 1)));
  const end = mode === "credit" ? (figure < 0 ? "var(--minus)" : "var(--plus)") : "var(--scale)";
  return `color-mix(in srgb, ${end} ${(share * 62).toFixed(0)}%, var(--card))`;
}

function show(number, digits = 3) {
  if (number === null || number === undefined) return "–";
  return String(Number(number.toPrecision(digits)));
}

function signed(number) {
  if (number === null || number === undefined) return "–";
  return (number > 0 ? "+" : "") + show(number).replace("-", "−");
}

function many(count, one, several = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : several}`;
}

// Where `needle`, in lower case, stands in the text of a path: [[from, to] within the text of each node].
function findIn(texts, needle) {
  const found = texts.map(() => []);
  if (!needle) return found;
  const text = texts.join("");
  const lower = text.toLowerCase();
  // A few characters change their length in lower case: then capitals count.
  const where = lower.length === text.length ? lower : text;
  for (let at = where.indexOf(needle); at >= 0; at = where.indexOf(needle, at + needle.length)) {
    let begin = 0;
    texts.forEach((one, place) => {
      const from = Math.max(at, begin) - begin;
      const to = Math.min(at + needle.length, begin + one.length) - begin;
      if (from < to) found[place].push([from, to]);
      begin += one.length;
    });
  }
  return found;
}
