// State, events, keys and search.

const MAX_ZOOM = 64;
const state = { prompts: [], place: -1, tree: null, layout: null, node: ROOT, mode: "credit", zoom: 1, needle: "" };
let index = null;
let vocabulary = null;
let boxes = new Map();
let hits = null;
let searching = 0;
let opening = 0;

async function treeAt(place) {
  return new Tree(await readBlock(`tree-${place}`), vocabulary);
}

function inOrder() {
  const key = byId("sort").value;
  const chosen = hits ? state.prompts.filter((prompt) => hits.get(prompt.place)) : [...state.prompts];
  const rank = (prompt) => (prompt[key] === null ? -Infinity : prompt[key]);
  return key === "number" ? chosen : chosen.sort((one, other) => rank(other) - rank(one) || one.number - other.number);
}

function relist() {
  showList(inOrder(), state.place, hits);
}

async function openPrompt(place, node) {
  const turn = ++opening;
  // At once: a second press of j goes on from here.
  state.place = place;
  const tree = await treeAt(place);
  if (turn !== opening) return;
  state.tree = tree;
  state.layout = layOut(tree);
  state.mode = byId("colour").value;
  for (const button of byId("list").querySelectorAll("button")) {
    const current = Number(button.dataset.place) === place;
    button.setAttribute("aria-current", String(current));
    if (current) button.scrollIntoView({ block: "nearest" });
  }
  showFacts(tree, state.prompts[place]);
  const scale = scaleOf(tree, state.mode);
  showLegend(state.mode, scale, index.estimator);
  boxes = showTree(tree, state.layout, state.mode, scale);
  setZoom(1);
  fitRows();
  const first = tree.head.leaves.length ? state.layout.rows.find((one) => tree.leafAt.has(one)) : ROOT;
  select(node !== undefined && node < tree.head.size.length ? node : first);
  markHits();
}

function select(node) {
  state.node = node;
  const path = new Set(state.tree.path(node));
  for (const [one, box] of boxes) {
    box.classList.toggle("on", path.has(one));
    box.classList.toggle("chosen", one === node);
    box.setAttribute("aria-selected", String(one === node));
    box.tabIndex = one === node ? 0 : -1;
  }
  for (const label of byId("labels").children) {
    label.classList.toggle("chosen", Number(label.dataset.node) === node);
  }
  showPath(state.tree, node, state.needle);
  byId("path").scrollTop = 0;
  reveal(node);
  history.replaceState(null, "", `#prompt=${state.prompts[state.place].number}&node=${node}`);
}

// Scrolls the tree, and not the page, until the node is in sight.
function reveal(node) {
  const scroll = byId("scroll");
  const outer = scroll.getBoundingClientRect();
  const inner = boxes.get(node).getBoundingClientRect();
  if (inner.top < outer.top || inner.bottom > outer.bottom) scroll.scrollTop += inner.top - outer.top - 40;
  const labels = byId("labels").offsetWidth;
  if (inner.left > outer.right - labels - 20 || inner.right < outer.left + 20) {
    scroll.scrollLeft += inner.left - outer.left - 60;
  }
}

function setZoom(zoom, fixed) {
  const scroll = byId("scroll");
  const before = state.zoom;
  state.zoom = Math.min(MAX_ZOOM, Math.max(1, zoom));
  byId("canvas").style.setProperty("--zoom", state.zoom);
  // What is at `fixed`, pixels from the left, stays there.
  const at = fixed === undefined ? scroll.clientWidth / 2 : fixed;
  scroll.scrollLeft = ((scroll.scrollLeft + at) * state.zoom) / before - at;
}

// Few leaves get higher rows, which hold more text; many scroll.
function fitRows() {
  const rows = byId("rows");
  rows.style.removeProperty("--row");
  const least = byId("labels").firstElementChild?.offsetHeight ?? 0;
  const room = byId("middle").getBoundingClientRect().bottom - byId("scroll").getBoundingClientRect().top - 60;
  const height = Math.min(2.5 * least, room / Math.max(1, state.layout.rows.length));
  if (least && height > least) rows.style.setProperty("--row", `${Math.floor(height)}px`);
}

function zoomTo(node) {
  const { tree } = state;
  setZoom((0.8 * tree.longest) / Math.max(1, tree.head.size[node]));
  const scroll = byId("scroll");
  scroll.scrollLeft += boxes.get(node).getBoundingClientRect().left - scroll.getBoundingClientRect().left - 40;
}

function recolour() {
  state.mode = byId("colour").value;
  const scale = scaleOf(state.tree, state.mode);
  showLegend(state.mode, scale, index.estimator);
  for (const [node, box] of boxes) paint(box, state.tree, node, state.mode, scale);
}

// Leaves of a tree whose path holds the needle, and the nodes that hold a part of it.
function search(tree, needle) {
  const nodes = new Set();
  let leaves = 0;
  for (const leaf of needle && tree.ids ? tree.head.leaves : []) {
    const path = tree.path(leaf);
    const found = findIn(tree.texts(path), needle);
    if (found.some((ranges) => ranges.length)) leaves++;
    found.forEach((ranges, place) => ranges.length && nodes.add(path[place]));
  }
  return { nodes, leaves };
}

function markHits() {
  const { nodes, leaves } = search(state.tree, state.needle);
  for (const [node, box] of boxes) box.classList.toggle("hit", nodes.has(node));
  const everywhere = hits ? "" : ` Enter searches all ${many(state.prompts.length, "prompt")}.`;
  say(state.needle ? `${many(leaves, "leaf", "leaves")} of this tree hold it.${everywhere}` : "");
}

function say(text) {
  byId("status").textContent = text;
}

async function searchEverywhere() {
  const needle = state.needle;
  const turn = ++searching;
  const found = new Map();
  for (const prompt of state.prompts) {
    // A newer search, or none, has taken its place.
    if (turn !== searching) return;
    const { leaves } = search(await treeAt(prompt.place), needle);
    if (leaves) found.set(prompt.place, leaves);
    if (prompt.place % 16 === 0) say(`searching: ${prompt.place} of ${many(state.prompts.length, "prompt")}`);
  }
  if (turn !== searching) return;
  hits = found;
  relist();
  say(`${many(found.size, "prompt")} of ${state.prompts.length} hold it. Esc shows all again.`);
  const first = inOrder()[0];
  if (first && !found.has(state.place)) await openPrompt(first.place);
}

function endSearch() {
  searching++;
  state.needle = "";
  byId("search").value = "";
  if (hits) {
    hits = null;
    relist();
  }
  markHits();
  showPath(state.tree, state.node, "");
}

function step(by) {
  const order = inOrder();
  const now = order.findIndex((prompt) => prompt.place === state.place);
  const next = order[Math.min(order.length - 1, Math.max(0, now + by))];
  if (next && next.place !== state.place) openPrompt(next.place);
}

// The node that stands above (-1) or below (+1) at the same token.
function beside(by) {
  const { tree, layout, node } = state;
  const row = by < 0 ? layout.top[node] - 1 : layout.top[node] + layout.height[node];
  if (row < 0 || row >= layout.rows.length) return node;
  const path = tree.path(layout.rows[row]);
  return path.find((one) => one && tree.begins[one] + tree.head.size[one] > tree.begins[node]) ?? path[path.length - 1];
}

function nextLeaf(by) {
  const { layout, node } = state;
  const at = layout.rows.indexOf(node);
  const from = at < 0 ? layout.top[node] - (by > 0 ? 1 : 0) : at;
  return layout.rows[Math.min(layout.rows.length - 1, Math.max(0, from + by))];
}

const KEYS = {
  j: () => step(1),
  k: () => step(-1),
  n: () => select(nextLeaf(1)),
  p: () => select(nextLeaf(-1)),
  z: () => zoomTo(state.node),
  "+": () => setZoom(state.zoom * 1.5),
  "=": () => setZoom(state.zoom * 1.5),
  "-": () => setZoom(state.zoom / 1.5),
  0: () => setZoom(1),
  "?": () => byId("keys").showModal(),
  "/": () => byId("search").focus(),
  ArrowLeft: () => select(Math.max(ROOT, state.tree.head.parent[state.node])),
  ArrowRight: () => select(state.tree.children[state.node][0] ?? state.node),
  ArrowUp: () => select(beside(-1)),
  ArrowDown: () => select(beside(1)),
  Enter: () => byId("path").focus(),
  Escape: () => (state.needle || hits ? endSearch() : document.activeElement.blur()),
};

function onKey(event) {
  const { target } = event;
  if (byId("keys").open || event.ctrlKey || event.metaKey || event.altKey || !state.tree) return;
  if (target.matches("input, select")) {
    if (event.key === "Enter" && target.id === "search" && state.needle) searchEverywhere();
    else if (event.key === "Escape") {
      endSearch();
      target.blur();
    } else return;
    event.preventDefault();
    return;
  }
  // A button takes Enter itself, and the path's own arrows scroll it.
  if (event.key === "Enter" && target.matches("button, summary")) return;
  if (event.key.startsWith("Arrow") && target.closest("#path")) return;
  const act = KEYS[event.key];
  if (!act) return;
  act();
  event.preventDefault();
}

function listen() {
  document.addEventListener("keydown", onKey);
  byId("list").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) openPrompt(Number(button.dataset.place));
  });
  for (const id of ["canvas", "labels", "path"]) {
    byId(id).addEventListener("click", (event) => {
      const found = event.target.closest("[data-node]");
      if (!found) return;
      select(Number(found.dataset.node));
      // On a narrow screen the path lies below the tree.
      if (id !== "path" && matchMedia("(max-width: 760px)").matches) byId("path").scrollIntoView({ behavior: "smooth" });
    });
  }
  byId("canvas").addEventListener("dblclick", (event) => {
    const found = event.target.closest("[data-node]");
    if (found) zoomTo(Number(found.dataset.node));
  });
  byId("scroll").addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      const left = byId("scroll").getBoundingClientRect().left;
      setZoom(state.zoom * (event.deltaY < 0 ? 1.25 : 0.8), event.clientX - left);
    },
    { passive: false },
  );
  addEventListener("resize", fitRows);
  byId("sort").addEventListener("change", relist);
  byId("colour").addEventListener("change", recolour);
  byId("in").addEventListener("click", () => setZoom(state.zoom * 1.5));
  byId("out").addEventListener("click", () => setZoom(state.zoom / 1.5));
  byId("whole").addEventListener("click", () => setZoom(1));
  byId("help").addEventListener("click", () => byId("keys").showModal());
  byId("close").addEventListener("click", () => byId("keys").close());
  byId("search").addEventListener("input", () => {
    searching++;
    state.needle = byId("search").value.toLowerCase();
    if (!state.needle) return endSearch();
    markHits();
    showPath(state.tree, state.node, state.needle);
  });
}

async function start() {
  if (typeof DecompressionStream === "undefined") {
    say("This browser is too old to open the page's data: it has no DecompressionStream.");
    return;
  }
  index = asJson(await readBlock("index"));
  vocabulary = new Vocabulary(await readBlock("vocabulary"), index.tokens);
  state.prompts = index.prompts.map((prompt, place) => ({ ...prompt, place }));
  const rewards = state.prompts.flatMap((prompt) => prompt.rewards).filter((one) => one !== null);
  const reducer = (pick) => rewards.reduce((one, other) => pick(one, other), rewards[0] ?? 0);
  rewardRange = { low: reducer(Math.min), high: reducer(Math.max) };
  byId("title").textContent = `Step ${index.step} · ${index.run}`;
  byId("notes").replaceChildren(...index.notes.map((note) => make("li", "", note)));
  relist();
  const wanted = new URLSearchParams(location.hash.slice(1));
  const asked = state.prompts.find((prompt) => String(prompt.number) === wanted.get("prompt"));
  const node = wanted.get("node");
  await openPrompt(asked ? asked.place : 0, asked && /^\d+$/.test(node ?? "") ? Number(node) : undefined);
  // Not before there is a tree: a key or a resized window would find none.
  listen();
  document.documentElement.dataset.ready = "true";
}

start();
