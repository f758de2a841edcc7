/* The attention weights of a model, computed from its GGUF file.
 *
 * llama.cpp in the page gives probabilities, and keeps what its heads do to itself. So the forward pass stands here once
 * more, for the kinds of model and of numbers that this course ships: llama's layers (RMSNorm, rotary positions, grouped
 * heads, SwiGLU) and the types F32, F16, Q4_1 and Q8_0. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
 */
const TYPES = { 0: { block: 1, bytes: 4 }, 1: { block: 1, bytes: 2 }, 3: { block: 32, bytes: 20 }, 8: { block: 32, bytes: 34 } };

function half(bits) {
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  const size = exponent === 0 ? fraction * 2 ** -24 : exponent === 31 ? Infinity : (1 + fraction / 1024) * 2 ** (exponent - 15);
  return bits & 0x8000 ? -size : size;
}
const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => half(bits));

function parse(buffer) {
  const view = new DataView(buffer);
  let at = 0;
  const take = (bytes, read) => { const value = view[read](at, true); at += bytes; return value; };
  const long = () => Number(take(8, "getBigUint64"));
  const word = () => { const size = long(); at += size; return new TextDecoder().decode(new Uint8Array(buffer, at - size, size)); };
  const read = {
    0: () => take(1, "getUint8"), 1: () => take(1, "getInt8"), 2: () => take(2, "getUint16"), 3: () => take(2, "getInt16"),
    4: () => take(4, "getUint32"), 5: () => take(4, "getInt32"), 6: () => take(4, "getFloat32"), 7: () => take(1, "getUint8"),
    8: word, 10: long, 11: () => Number(take(8, "getBigInt64")), 12: () => take(8, "getFloat64"),
    9: () => { const kind = take(4, "getUint32"); const size = long(); return Array.from({ length: size }, () => read[kind]()); },
  };
  if (take(4, "getUint32") !== 0x46554747) throw new Error("this is no GGUF file");
  take(4, "getUint32");
  const tensors = {};
  const fields = {};
  const count = long();
  for (let left = long(); left; left--) { const key = word(); fields[key] = read[take(4, "getUint32")](); }
  for (let i = 0; i < count; i++) {
    const name = word();
    const shape = Array.from({ length: take(4, "getUint32") }, long);
    tensors[name] = { shape, type: take(4, "getUint32"), offset: long() };
    if (!TYPES[tensors[name].type]) throw new Error(`${name} has a type that is not read here`);
  }
  const unit = fields["general.alignment"] || 32;
  const start = Math.ceil(at / unit) * unit;
  for (const one of Object.values(tensors)) one.offset += start;
  return { fields, tensors };
}

/* Numbers of a tensor, from packed bytes. */
function unpack(type, bytes, into) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const blocks = into.length / TYPES[type].block;
  for (let i = 0, at = 0, to = 0; i < blocks; i++) {
    if (type === 0) { into[to++] = view.getFloat32(at, true); at += 4; }
    else if (type === 1) { into[to++] = HALVES[view.getUint16(at, true)]; at += 2; }
    else if (type === 8) {
      const scale = HALVES[view.getUint16(at, true)];
      for (let j = 0; j < 32; j++) into[to + j] = scale * view.getInt8(at + 2 + j);
      at += 34; to += 32;
    } else {
      const scale = HALVES[view.getUint16(at, true)];
      const least = HALVES[view.getUint16(at + 2, true)];
      for (let j = 0; j < 16; j++) {
        const pair = bytes[at + 4 + j];
        into[to + j] = scale * (pair & 15) + least;
        into[to + j + 16] = scale * (pair >> 4) + least;
      }
      at += 20; to += 32;
    }
  }
  return into;
}

/* file: a Blob with a GGUF model. Returns the number of layers and heads, and attend(tokens, progress): for each layer,
 * head and row of a text its weights as bytes from 0 to 255, in that order; progress(layer) may return false to end it. */
export async function open(file) {
  const head = await file.slice(0, 16 << 20).arrayBuffer();
  const { fields, tensors } = parse(head);
  const layers = fields["llama.block_count"];
  const heads = fields["llama.attention.head_count"];
  const groups = heads / fields["llama.attention.head_count_kv"];
  const epsilon = fields["llama.attention.layer_norm_rms_epsilon"];
  const base = fields["llama.rope.freq_base"];
  const width = fields["llama.embedding_length"];
  const size = width / heads;

  async function load(name, row = null) {
    const { shape, type, offset } = tensors[name];
    const numbers = row === null ? shape.reduce((a, b) => a * b, 1) : shape[0];
    const bytes = (numbers / TYPES[type].block) * TYPES[type].bytes;
    const start = offset + (row || 0) * bytes;
    return unpack(type, new Uint8Array(await file.slice(start, start + bytes).arrayBuffer()), new Float64Array(numbers));
  }
  async function product(name, rows) {
    const weights = await load(name);
    const [wide, high] = tensors[name].shape;
    const found = rows.map(() => new Float64Array(high));
    for (let first = 0; first < rows.length; first += 4) { // four at a time: each weight is fetched once for them
      const [p, q, r, s] = [0, 1, 2, 3].map((more) => rows[Math.min(first + more, rows.length - 1)]);
      for (let out = 0, at = 0; out < high; out++, at += wide) {
        let a = 0, b = 0, c = 0, d = 0;
        for (let i = 0; i < wide; i++) {
          const weight = weights[at + i];
          a += weight * p[i]; b += weight * q[i]; c += weight * r[i]; d += weight * s[i];
        }
        [a, b, c, d].forEach((sum, more) => { if (first + more < rows.length) found[first + more][out] = sum; });
      }
    }
    return found;
  }
  async function normed(name, rows) {
    const gains = await load(name);
    return rows.map((row) => {
      const scale = 1 / Math.sqrt(row.reduce((sum, one) => sum + one * one, 0) / row.length + epsilon);
      return row.map((one, i) => one * scale * gains[i]);
    });
  }
  function turn(row, place) {
    for (let at = 0; at < row.length; at += 2) {
      const angle = place * base ** (-(at % size) / size);
      const [cos, sin, x, y] = [Math.cos(angle), Math.sin(angle), row[at], row[at + 1]];
      row[at] = x * cos - y * sin;
      row[at + 1] = x * sin + y * cos;
    }
  }
  function softmax(scores) {
    const top = Math.max(...scores);
    const powers = scores.map((one) => Math.exp(one - top));
    const sum = powers.reduce((a, b) => a + b, 0);
    return powers.map((one) => one / sum);
  }

  async function attend(tokens, progress) {
    const weights = new Uint8Array((layers * heads * tokens.length * (tokens.length + 1)) / 2);
    let written = 0;
    const rows = await Promise.all(tokens.map((token) => load("token_embd.weight", token)));
    for (let layer = 0; layer < layers; layer++) {
      if (progress(layer) === false) return null;
      await new Promise((resolve) => setTimeout(resolve)); // the page stays usable
      const name = (part) => `blk.${layer}.${part}.weight`;
      const seen = await normed(name("attn_norm"), rows);
      const queries = await product(name("attn_q"), seen);
      const keys = await product(name("attn_k"), seen);
      const values = await product(name("attn_v"), seen);
      [queries, keys].forEach((many) => many.forEach(turn));
      const mixed = rows.map(() => new Float64Array(width));
      for (let one = 0; one < heads; one++) {
        const from = one * size;
        const shared = Math.floor(one / groups) * size;
        rows.forEach((_, place) => {
          const shares = softmax(Array.from({ length: place + 1 }, (_, before) => {
            let sum = 0;
            for (let i = 0; i < size; i++) sum += queries[place][from + i] * keys[before][shared + i];
            return sum / Math.sqrt(size);
          }));
          shares.forEach((share, before) => {
            weights[written++] = Math.round(255 * share);
            for (let i = 0; i < size; i++) mixed[place][from + i] += share * values[before][shared + i];
          });
        });
      }
      if (layer === layers - 1) break; // what follows changes no weight any more
      const add = (many) => many.forEach((more, place) => more.forEach((value, i) => { rows[place][i] += value; }));
      add(await product(name("attn_output"), mixed));
      const again = await normed(name("ffn_norm"), rows);
      const gates = await product(name("ffn_gate"), again);
      const up = await product(name("ffn_up"), again);
      add(await product(name("ffn_down"), gates.map((gate, place) => gate.map((x, i) => (x / (1 + Math.exp(-x))) * up[place][i]))));
    }
    return weights;
  }
  return { layers, heads, attend };
}
