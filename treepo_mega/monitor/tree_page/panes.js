// Builds the three panes. Everything from a run becomes text by `textContent`, never markup.

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function byId(id) {
  return document.getElementById(id);
}

function showList(prompts, open, hits) {
  const items = prompts.map((prompt) => {
    const item = make("li");
    const button = make("button", "prompt");
    button.type = "button";
    button.dataset.place = prompt.place;
    button.setAttribute("aria-current", prompt.place === open ? "true" : "false");
    button.append(make("span", "label", visible(prompt.label) || prompt.id));
    const line = make("span", "small");
    line.append(make("span", "id", `${prompt.number} · ${visible(prompt.id)}`));
    const mean = prompt.mean === null ? "no reward" : `${show(prompt.mean)}, spread ${show(prompt.spread)}`;
    line.append(make("span", "", hits ? many(hits.get(prompt.place), "hit") : mean));
    button.append(rewardStrip(prompt), line);
    item.append(button);
    return item;
  });
  byId("list").replaceChildren(...items);
  byId("count").textContent = many(prompts.length, "prompt");
}

// A tick a leaf, the best first.
function rewardStrip(prompt) {
  const strip = make("span", "strip");
  const { low, high } = rewardRange;
  const rewards = prompt.rewards.filter((one) => one !== null).sort((one, other) => other - one);
  for (const reward of rewards.slice(0, 64)) {
    const tick = make("i");
    const share = (reward - low) / (high - low || 1);
    tick.style.background = `color-mix(in srgb, var(--plus) ${(share * 100).toFixed(0)}%, var(--minus))`;
    strip.append(tick);
  }
  strip.title = rewards.map((one) => show(one)).join(", ");
  return strip;
}

let rewardRange = { low: 0, high: 1 };

function showFacts(tree, prompt) {
  const stops = Object.entries(prompt.stops).map(([reason, count]) => `${reason} ${count}`);
  const facts = [
    many(prompt.leaves, "leaf", "leaves"),
    `${prompt.unique.toLocaleString("en")} distinct of ${many(prompt.flat, "token")}`,
    `stopped by ${stops.join(", ") || "nothing"}`,
  ];
  if (prompt.alike) facts.push(`${prompt.alike} look alike`);
  if (prompt.forks) facts.push(many(prompt.forks, "fork", "forks (◆)"));
  if (tree.head.fallback.length) facts.push(many(tree.head.fallback.length, "branch by fallback", "branches by fallback"));
  if (tree.head.shortfall) facts.push(tree.head.shortfall);
  byId("facts").replaceChildren(make("h2", "", visible(prompt.label) || prompt.id), make("p", "", facts.join(" · ")));
  const costs = Object.entries(tree.head.counts).flatMap(([name, count]) => {
    return [make("dt", "", name.replaceAll("_", " ")), make("dd", "", show(count, 6))];
  });
  byId("costs").hidden = !costs.length;
  byId("costs").querySelector("dl").replaceChildren(...costs);
}

function showLegend(mode, scale, by) {
  const words = {
    credit: [`−${show(scale.high)}`, `+${show(scale.high)}`, `advantage${by ? `, ${by}` : ""}`],
    value: [show(scale.low), show(scale.high), "V(node), mean reward of its leaves"],
    surprisal: ["0", show(scale.high), "mean surprisal of the sampled tokens, nats"],
    version: ["newest", `${show(scale.high)} older`, "age of the weights, steps"],
  }[mode];
  if (!scale.known) return byId("legend").replaceChildren(make("span", "", `no such figure in this file: ${words[2]}`));
  const bar = make("span", mode === "credit" ? "ramp both" : "ramp");
  byId("legend").replaceChildren(make("span", "", words[0]), bar, make("span", "", `${words[1]}  ${words[2]}`));
}

// Nodes of the tree; returns them by node.
function showTree(tree, layout, mode, scale) {
  const nodes = new Map();
  const canvas = byId("canvas");
  canvas.style.setProperty("--rows", layout.rows.length);
  tree.head.size.forEach((size, node) => {
    const box = make("div", node === ROOT ? "node root" : "node");
    box.dataset.node = node;
    box.setAttribute("role", "treeitem");
    box.tabIndex = -1;
    box.style.top = `calc(var(--row) * ${layout.top[node]})`;
    box.style.height = `calc(var(--row) * ${layout.height[node]})`;
    if (node === ROOT) {
      box.append(make("span", "text", `prompt ${many(size, "token")}`));
      box.title = "the prompt, not to scale";
    } else {
      box.style.left = `calc(var(--root) + (100% - var(--root)) * ${tree.begins[node] / tree.longest})`;
      box.style.width = `calc((100% - var(--root)) * ${size / tree.longest})`;
      box.append(make("span", "text", tree.texts([node])[0].slice(0, 600)));
      box.classList.toggle("void", tree.below[node].length === 0);
      box.title = about(tree, node).join("\n");
    }
    box.classList.toggle("branches", tree.branches(node).length > 1);
    box.setAttribute("aria-label", node === ROOT ? "prompt" : about(tree, node).join(", "));
    paint(box, tree, node, mode, scale);
    nodes.set(node, box);
  });
  const marks = Object.keys(tree.head.fork_places).map((at) => forkMark(tree, layout, Number(at)));
  canvas.replaceChildren(...nodes.values(), ...marks);
  byId("labels").replaceChildren(...layout.rows.map((node) => leafLabel(tree, node)));
  return nodes;
}

// A line across the branches that start after a token, and what is known of the choice there.
function forkMark(tree, layout, node) {
  const mark = make("div", "fork");
  mark.dataset.node = node;
  mark.style.left = `calc(var(--root) + (100% - var(--root)) * ${endOf(tree, node) / tree.longest})`;
  mark.style.top = `calc(var(--row) * ${layout.top[node]})`;
  mark.style.height = `calc(var(--row) * ${layout.height[node]})`;
  mark.title = aboutFork(tree, node).join("\n");
  mark.append(make("span", "", "◆"));
  return mark;
}

// Tokens of the response up to the end of a node.
function endOf(tree, node) {
  return node === ROOT ? 0 : tree.begins[node] + tree.head.size[node];
}

// What there is to say of the fork at the end of a node, one fact an item.
function aboutFork(tree, node) {
  const places = tree.head.fork_places;
  const count = Object.keys(places).length;
  const facts = [`fork at token ${endOf(tree, node) + 1}`, ...entropyAt(tree, node)];
  facts.push(`place ${places[node]} of ${count} by entropy`);
  const rules = new Set(tree.children[node].map((child) => tree.head.fork[child]).filter(Boolean));
  for (const rule of rules) facts.push(`chosen by ${rule}`);
  return facts;
}

function entropyAt(tree, node) {
  const known = tree.head.entropy[node];
  return known && known[0] !== null ? [ENTROPY[known[1]](show(known[0]))] : [];
}

function paint(box, tree, node, mode, scale) {
  if (node !== ROOT) box.style.background = colourOf(tree, node, mode, scale);
}

function leafLabel(tree, node) {
  const label = make("button", "leaf");
  label.type = "button";
  label.dataset.node = node;
  const index = tree.leafAt.get(node);
  if (index === undefined) {
    label.append(make("span", "stop", "not trained on"));
    return label;
  }
  const group = tree.head.alike[index];
  label.append(make("b", "reward", show(tree.head.rewards[index])));
  label.append(make("span", "credit", signed(tree.head.credit[node])));
  label.append(make("span", "stop", tree.head.stop[node] ?? ""));
  if (group !== null) {
    label.append(make("span", "alike", `≡${group + 1}`));
    label.title = "the responses with this mark are equal";
  }
  return label;
}

// What there is to say of a node, one fact an item.
function about(tree, node) {
  const { size, value, credit, surprisal, version, stop, fallback, fork, observation, hidden } = tree.head;
  const begin = tree.begins[node];
  const facts = [`tokens ${begin + 1} to ${begin + size[node]}`];
  facts.push(`V ${show(value[node])}`, `advantage ${signed(credit[node])}`);
  if (tree.below[node].length > 1) facts.push(many(tree.below[node].length, "leaf", "leaves"));
  if (tree.below[node].length === 0) facts.push("not trained on");
  if (surprisal[node] !== null) facts.push(`surprisal ${show(surprisal[node])} nats a token`);
  facts.push(`weights of step ${version[node]}`);
  if (observation.includes(node)) facts.push("said by the environment, not trained on");
  if (hidden[node]) {
    const [tokens, restated] = hidden[node];
    facts.push(`the chat template hides ${tokens} tokens before it from what follows; its first ${restated} stand for them`);
  }
  if (fallback.includes(node)) facts.push("made by fallback");
  if (fork[node]) facts.push(`forked by ${fork[node]}`);
  if (stop[node]) facts.push(`stopped: ${stop[node]}`);
  return facts;
}

const ENTROPY = {
  stored: (nats) => `entropy ${nats} nats`,
  likeliest: (nats) => `entropy at least ${nats} nats (of the likeliest tokens)`,
  drawn: (nats) => `entropy about ${nats} nats (surprisal of the first tokens)`,
};

function showPath(tree, node, needle) {
  const path = tree.path(node);
  const texts = tree.texts(path);
  const found = findIn(texts, needle);
  const out = [pathHead(tree, node)];
  if (!tree.ids) out.push(make("p", "note", "The text of this tree was left out to keep the page small."));
  path.forEach((one, place) => {
    if (one === ROOT) {
      const details = make("details", "segment");
      details.open = texts[place].length < 600 || found[place].length > 0;
      details.append(make("summary", "meta", `prompt, ${many(tree.head.size[ROOT], "token")}`));
      details.append(markedText(texts[place], found[place]));
      out.push(details);
    } else {
      out.push(segment(tree, one, texts[place], found[place]));
    }
    const branches = tree.branches(one);
    if (branches.length > 1 && place < path.length - 1) out.push(branchLine(tree, one, path[place + 1], branches));
  });
  byId("path").replaceChildren(...out);
}

function pathHead(tree, node) {
  const index = tree.leafAt.get(node);
  const head = make("div", "head");
  if (index === undefined) {
    const leaves = tree.below[node];
    head.append(make("h2", "", node === ROOT ? "prompt" : `segment ${node}, up to here`));
    const line = make("p", "links");
    line.append(`${many(leaves.length, "leaf", "leaves")} below: `);
    for (const one of leaves) line.append(link(tree.head.leaves[one], `${one + 1} (${show(tree.head.rewards[one])})`));
    head.append(line);
    return head;
  }
  const { rewards, verdicts, credit, stop, alike, leaves } = tree.head;
  head.append(make("h2", "", `leaf ${index + 1} of ${leaves.length}: reward ${show(rewards[index])}`));
  const facts = [`advantage ${signed(credit[node])}`, many(tree.begins[node] + tree.head.size[node], "token")];
  if (verdicts.length && verdicts[index] !== rewards[index]) facts.push(`verdict ${show(verdicts[index])}`);
  if (stop[node]) facts.push(`stopped: ${stop[node]}`);
  head.append(make("p", "", facts.join(" · ")));
  const twins = alike[index] === null ? [] : leaves.filter((_, one) => one !== index && alike[one] === alike[index]);
  if (twins.length) {
    const line = make("p", "links", "equal to ");
    for (const twin of twins) line.append(link(twin, `leaf ${tree.leafAt.get(twin) + 1}`));
    head.append(line);
  }
  return head;
}

function link(node, text) {
  const button = make("button", "link", text);
  button.type = "button";
  button.dataset.node = node;
  return button;
}

function segment(tree, node, text, ranges) {
  const part = make("section", "segment");
  part.append(make("p", "meta", about(tree, node).join(" · ")), markedText(text, ranges, forkOf(tree, node)));
  part.style.setProperty("--tint", colourOf(tree, node, "credit", scaleOf(tree, "credit")));
  return part;
}

// The first token of a segment, where branches fork: { length, title } of it, or null.
function forkOf(tree, node) {
  const parent = tree.head.parent[node];
  if (!(parent in tree.head.fork_places)) return null;
  return { length: tree.firstLength(node), title: aboutFork(tree, parent).join("\n") };
}

// The text of a segment, with what a search found in `ranges`, and the token at a fork.
function markedText(text, ranges, fork = null) {
  const block = make("div", "words");
  const cuts = new Set([0, fork ? fork.length : 0, text.length, ...ranges.flat()]);
  const places = [...cuts].filter((place) => place <= text.length).sort((one, other) => one - other);
  places.slice(1).forEach((to, index) => {
    const from = places[index];
    const found = ranges.some((range) => range[0] <= from && to <= range[1]);
    const piece = found ? make("mark", "", text.slice(from, to)) : text.slice(from, to);
    if (fork && to <= fork.length) {
      const token = make("span", "at-fork");
      token.title = fork.title;
      token.append(piece);
      block.append(token);
    } else block.append(piece);
  });
  return block;
}

function branchLine(tree, node, taken, branches) {
  const line = make("p", "branch links", `├ ${branches.length} branches`);
  const facts = node in tree.head.fork_places ? aboutFork(tree, node) : entropyAt(tree, node);
  for (const fact of facts) line.append(` · ${fact}`);
  line.append(" · V ");
  branches.forEach((child, place) => {
    const name = `${place + 1}: ${show(tree.head.value[child])}`;
    line.append(child === taken ? make("b", "taken", name) : link(child, name));
  });
  return line;
}
