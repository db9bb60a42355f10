// A Node client of kvmesh: streams one generation from a router, with a stub
// made from proto/ at run time, and prints what it got as one JSON object.
//
//   node main.js --target 127.0.0.1:8080 --tokens 20,21,22 --max 16
"use strict";

const path = require("node:path");
const { parseArgs } = require("node:util");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const PROTO = path.join(__dirname, "../../../proto");

const { values: options } = parseArgs({
  options: {
    target: { type: "string" },
    model: { type: "string", default: "" },
    tokens: { type: "string", default: "20,21,22" },
    max: { type: "string", default: "16" },
    timeout: { type: "string", default: "30" },
  },
});

const definition = loader.loadSync("kvmesh/v1/inference.proto", {
  includeDirs: [PROTO],
  longs: String,
  enums: String,
  oneofs: true,
});
const { Inference } = grpc.loadPackageDefinition(definition).kvmesh.v1;
const client = new Inference(options.target, grpc.credentials.createInsecure());

const answer = {
  accepted: false,
  token_ids: [],
  text: "",
  finish_reason: "",
  output_tokens: 0,
  code: "",
  message: "",
};

// What breaks the promise of the protocol is an error; a status is not.
function fail(text) {
  console.error(text);
  process.exit(1);
}

function take(message) {
  if (answer.finish_reason !== "") fail("an event came after finished");
  switch (message.event) {
    case "accepted":
      answer.accepted = true;
      break;
    case "tokens": {
      const { firstIndex = 0, ids = [], text = "" } = message.tokens;
      if (ids.length > 0 && firstIndex !== answer.token_ids.length) {
        fail(`index ${firstIndex}, not ${answer.token_ids.length}`);
      }
      answer.token_ids.push(...ids);
      answer.text += text;
      break;
    }
    case "finished":
      answer.text += message.finished.text ?? "";
      answer.finish_reason = message.finished.reason;
      answer.output_tokens = message.finished.usage?.outputTokens ?? 0;
      break;
  }
}

const request = {
  model: options.model,
  tokenIds: { ids: options.tokens.split(",").map(Number) },
  stopping: { maxTokens: Number(options.max), ignoreEndOfText: true },
};
const deadline = new Date(Date.now() + Number(options.timeout) * 1000);
const stream = client.generate(request, { deadline });
stream.on("data", take);
stream.on("error", (error) => {
  answer.message = error.details;
});
stream.on("status", (status) => {
  answer.code = status.code === 0 ? "OK" : grpc.status[status.code];
  console.log(JSON.stringify(answer));
  client.close();
});
