// The npm package `openai` against a router: a chat streamed and whole, an
// error, an answer that takes too long, a stream that is given up, and tool calls of the model
// `--caller`. Prints what it got as one JSON object. With `--hold` it then lives until its
// standard input closes: what it left, it left alive. With `--retries` it asks a router that
// refuses it at first.
//
//   node openai.js --target 127.0.0.1:7440 --model sim --max 16
"use strict";

const { once } = require("node:events");
const { parseArgs } = require("node:util");
const OpenAI = require("openai");

const { values: options } = parseArgs({
  options: {
    target: { type: "string" },
    model: { type: "string" },
    max: { type: "string", default: "16" },
    caller: { type: "string" },
    retries: { type: "string" },
    hold: { type: "string" },
  },
});
const baseURL = `http://${options.target}/v1`;
const ENDLESS = 100000;

async function main() {
  const told = options.retries ? await tried(Number(options.retries)) : await all();
  console.log(JSON.stringify(told));
  if (options.hold) await once(process.stdin.resume(), "end");
}

// Two requests, however often the package has to send them.
async function tried(maxRetries) {
  let sent = 0;
  const counted = (...request) => {
    sent += 1;
    return fetch(...request);
  };
  const client = new OpenAI({ baseURL, apiKey: "none", maxRetries, fetch: counted });
  const reasons = [];
  for (let request = 0; request < 2; request += 1) {
    const answer = await client.completions.create({ model: options.model, prompt: [5, 6], max_tokens: 1 });
    reasons.push(answer.choices[0].finish_reason);
  }
  return { reasons, sent };
}

async function all() {
  const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 100000 });
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
  let late = null;
  try {
    await client.chat.completions.create({ ...asked, max_tokens: ENDLESS }, { timeout: 500 });
  } catch (error) {
    late = error.constructor.name;
  }
  const endless = await client.chat.completions.create({ ...asked, max_tokens: ENDLESS, stream: true });
  for await (const chunk of endless) {
    if (chunk.choices[0].delta.content) break; // leaving the loop ends the request
  }
  const called = options.caller ? await calls(client, options.caller) : null;
  const { content } = whole.choices[0].message;
  const reason = whole.choices[0].finish_reason;
  return { content, reason, streamed, usage, models, refused, late, called };
}

// What a model calls that says it will: whole, and put together by the package from a stream.
async function calls(client, model) {
  const asked = {
    model,
    messages: [{ role: "user", content: "hello" }],
    tools: [{ type: "function", function: { name: "weather", parameters: { type: "object" } } }],
  };
  const told = (choice) => ({
    reason: choice.finish_reason,
    calls: choice.message.tool_calls.map((call) => [call.function.name, call.function.arguments]),
  });
  const whole = await client.chat.completions.create(asked);
  const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
  return { whole: told(whole.choices[0]), streamed: told(streamed.choices[0]) };
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
