// Streams one chat answer from a gateway.
//
//   node chat.js [--target 127.0.0.1:50051] [--max-tokens 128] [--json] [--proxy] "What is a KV cache?"
//
// --proxy heeds http_proxy, https_proxy and grpc_proxy, which gRPC would use for loopback too.
// --json prints one object at the end instead of text. The exit code is 0 on OK, else the gRPC code.
const path = require("node:path");
const { parseArgs } = require("node:util");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const PROTO = path.join(__dirname, "..", "..", "proto");
const definition = protoLoader.loadSync("nanoinfer/v1/gateway.proto", {
  includeDirs: [PROTO],
  longs: String, // seeds and nanoseconds do not fit a double
  enums: String,
  defaults: true,
});
const { nanoinfer } = grpc.loadPackageDefinition(definition);

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    target: { type: "string", default: "127.0.0.1:50051" },
    "max-tokens": { type: "string" },
    json: { type: "boolean", default: false },
    proxy: { type: "boolean", default: false },
  },
});

const client = new nanoinfer.v1.GatewayService(values.target, grpc.credentials.createInsecure(), {
  "grpc.enable_http_proxy": values.proxy ? 1 : 0,
});
const stopping = values["max-tokens"] ? { maxTokens: Number(values["max-tokens"]) } : {};
const request = {
  messages: [{ role: "user", content: [{ text: positionals.join(" ") }] }],
  options: { stopping },
};
const deadline = new Date(Date.now() + 60_000); // the deadline travels with the call
const stream = client.ChatStream(request, { deadline });

const answer = { text: "", messages: 0 };
stream.on("data", (message) => {
  answer.messages += 1;
  for (const delta of message.deltas) {
    answer.text += delta.text;
    if (!values.json) process.stdout.write(delta.text);
  }
  for (const finish of message.finishes) answer.finish = finish;
  if (message.summary) answer.summary = message.summary;
});
stream.on("error", (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = error.code;
  client.close();
});
stream.on("end", () => {
  const printed = (key, value) => (Buffer.isBuffer(value) ? value.toString("hex") : value);
  process.stdout.write(values.json ? JSON.stringify(answer, printed) + "\n" : "\n");
  client.close();
});
