// Run an exported model without Python: a prompt to tokens, with onnxruntime-node.
//
//   cd examples/onnx_node && npm install --ignore-scripts
//   node generate.mjs FOLDER "Once upon a time" 40
//
// (The install script of onnxruntime-node only fetches libraries for CUDA.)

import { readFile } from "node:fs/promises";
import path from "node:path";

import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

const [folder, prompt, count = "40"] = process.argv.slice(2);
if (!folder || !prompt) {
  console.error("usage: node generate.mjs FOLDER PROMPT [NEW_TOKENS]");
  process.exit(2);
}

const readJson = async (name) => JSON.parse(await readFile(path.join(folder, name), "utf8"));
const { model } = await readJson("genai_config.json");
const { precision } = await readJson("manifest.json");
const tokenizer = new Tokenizer(
  await readJson("tokenizer.json"),
  await readJson("tokenizer_config.json"),
);
const session = await ort.InferenceSession.create(path.join(folder, model.decoder.filename));
const stop = new Set([model.eos_token_id].flat());

// Before the first token the cache of every layer is empty.
const heads = model.decoder.num_key_value_heads;
const emptyCache = () =>
  precision === "fp16"
    ? new ort.Tensor("float16", new Uint16Array(0), [1, heads, 0, model.decoder.head_size])
    : new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, model.decoder.head_size]);
let cache = Object.fromEntries(
  session.inputNames.filter((name) => name.startsWith("past_")).map((name) => [name, emptyCache()]),
);

const integers = (values) =>
  new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

/** Position of the largest value; float16 is compared by its bits, made to grow with the value. */
function largest(values) {
  const order = values instanceof Uint16Array ? (b) => (b & 0x8000 ? -(b & 0x7fff) : b) : (x) => x;
  let best = 0;
  for (let i = 1; i < values.length; i++) if (order(values[i]) > order(values[best])) best = i;
  return best;
}

const { ids } = tokenizer.encode(prompt);
const generated = [];
let next = ids;
while (generated.length < Number(count)) {
  const seen = ids.length + generated.length;
  const outputs = await session.run({
    input_ids: integers(next),
    attention_mask: integers(new Array(seen).fill(1)),
    ...cache,
  });
  cache = Object.fromEntries(
    Object.keys(cache).map((name) => [name, outputs[name.replace("past_key_values", "present")]]),
  );
  const token = largest(outputs.logits.data.subarray(-model.vocab_size));
  generated.push(token);
  if (stop.has(token)) break;
  next = [token];
}
console.log(JSON.stringify(generated));
console.log(tokenizer.decode(generated));
