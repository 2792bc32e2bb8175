"use strict";
// What the page holds: base64 of zlib data, one block a tree, opened when the tree is looked at.

const ROOT = 0;
const HEAD_BYTES = 4;

async function readBlock(id) {
  const packed = atob(document.getElementById(id).textContent);
  const bytes = new Uint8Array(packed.length);
  for (let place = 0; place < packed.length; place++) bytes[place] = packed.charCodeAt(place);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function asJson(bytes) {
  return JSON.parse(new TextDecoder().decode(bytes));
}

// LEB128: seven bits a byte, the lowest first, the eighth bit set while more follow.
function readNumbers(bytes, start, count) {
  const values = new Uint32Array(count);
  let at = start;
  for (let place = 0; place < count; place++) {
    let value = 0;
    let shift = 0;
    let byte;
    do {
      byte = bytes[at++];
      value |= (byte & 127) << shift;
      shift += 7;
    } while (byte & 128);
    values[place] = value;
  }
  return { values, end: at };
}

class Vocabulary {
  constructor(bytes, count) {
    const { values, end } = readNumbers(bytes, 0, count);
    this.bytes = bytes;
    this.starts = new Uint32Array(count + 1);
    this.starts[0] = end;
    for (let place = 0; place < count; place++) this.starts[place + 1] = this.starts[place] + values[place];
  }

  // The bytes of tokens `from` to `to` of `ids`, one after the other.
  join(ids, from, to) {
    let length = 0;
    for (let at = from; at < to; at++) length += this.starts[ids[at] + 1] - this.starts[ids[at]];
    const out = new Uint8Array(length);
    let place = 0;
    for (let at = from; at < to; at++) {
      const piece = this.bytes.subarray(this.starts[ids[at]], this.starts[ids[at] + 1]);
      out.set(piece, place);
      place += piece.length;
    }
    return out;
  }
}

class Tree {
  constructor(bytes, vocabulary) {
    const length = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
    this.head = asJson(bytes.subarray(HEAD_BYTES, HEAD_BYTES + length));
    this.vocabulary = vocabulary;
    const { parent, size, leaves } = this.head;
    this.offsets = [0];
    for (const count of size) this.offsets.push(this.offsets[this.offsets.length - 1] + count);
    const total = this.offsets[size.length];
    const start = HEAD_BYTES + length;
    // A tree whose text was left out holds no ids.
    this.ids = bytes.length > start ? readNumbers(bytes, start, total).values : null;
    this.joined = [];
    this.children = size.map(() => []);
    for (let node = 1; node < size.length; node++) this.children[parent[node]].push(node);
    this.leafAt = new Map(leaves.map((node, index) => [node, index]));
    this.below = size.map(() => []);
    leaves.forEach((leaf, index) => {
      for (const node of this.path(leaf)) this.below[node].push(index);
    });
    // Tokens of the response before each node, and where the longest path ends.
    this.begins = size.map(() => 0);
    for (let node = 1; node < size.length; node++) {
      this.begins[node] = parent[node] === ROOT ? 0 : this.begins[parent[node]] + size[parent[node]];
    }
    this.longest = Math.max(1, ...size.map((count, node) => (node ? this.begins[node] + count : 0)));
  }

  // Nodes from the root to `node`.
  path(node) {
    const out = [];
    for (let at = node; at >= 0; at = this.head.parent[at]) out.push(at);
    return out.reverse();
  }

  // The text of each node of a path. A character of which a segment holds the beginning belongs to the next one.
  texts(path) {
    if (!this.ids) return path.map(() => "");
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return path.map((node, place) => {
      return visible(decoder.decode(this.bytesOf(node), { stream: place < path.length - 1 }));
    });
  }

  // Characters of a node's text that its first token holds, at least one of them.
  firstLength(node) {
    if (!this.ids) return 0;
    const bytes = this.vocabulary.join(this.ids, this.offsets[node], this.offsets[node] + 1);
    return Math.max(1, visible(new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes, { stream: true })).length);
  }

  // Kept: a segment stands on the paths of many leaves.
  bytesOf(node) {
    this.joined[node] ??= this.vocabulary.join(this.ids, this.offsets[node], this.offsets[node + 1]);
    return this.joined[node];
  }

  // Children with a leaf at or below them.
  branches(node) {
    return this.children[node].filter((child) => this.below[child].length);
  }
}

// Control characters as their pictures, and characters that turn the direction of text as their numbers: a response
// must not be able to look like another.
function visible(text) {
  return text
    .replace(/\r\n/g, "\n")
    .replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, (found) =>
      found === "\u007f" ? "\u2421" : String.fromCharCode(0x2400 + found.charCodeAt(0)),
    )
    .replace(/[\u0080-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/g, (found) => {
      return `⟨U+${found.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
    });
}
