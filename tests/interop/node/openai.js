// The npm package `openai` against a router: a chat streamed and whole, an
// error, and a stream that is given up. Prints what it got as one JSON object.
//
//   node openai.js --target 127.0.0.1:7440 --model sim --max 16
"use strict";

const { parseArgs } = require("node:util");
const OpenAI = require("openai");

const { values: options } = parseArgs({
  options: {
    target: { type: "string" },
    model: { type: "string" },
    max: { type: "string", default: "16" },
  },
});

async function main() {
  const client = new OpenAI({
    baseURL: `http://${options.target}/v1`,
    apiKey: "none",
    maxRetries: 0,
  });
  const asked = {
    model: options.model,
    messages: [{ role: "user", content: "hello" }],
    max_tokens: Number(options.max),
    seed: 11,
  };
  const whole = await client.chat.completions.create(asked);
  let streamed = "";
  let usage = null;
  const stream = await client.chat.completions.create({
    ...asked,
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    streamed += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  const models = [];
  for await (const model of client.models.list()) models.push(model.id);
  let refused = null;
  try {
    await client.chat.completions.create({ ...asked, tools: [{ type: "function", function: { name: "f" } }] });
  } catch (error) {
    refused = { status: error.status, param: error.param, code: error.code, kind: error.constructor.name };
  }
  const endless = await client.chat.completions.create({ ...asked, max_tokens: 100000, stream: true });
  for await (const chunk of endless) {
    if (chunk.choices[0].delta.content) break; // leaving the loop ends the request
  }
  const { content } = whole.choices[0].message;
  const reason = whole.choices[0].finish_reason;
  console.log(JSON.stringify({ content, reason, streamed, usage, models, refused }));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
