// The official Node SDK against Evergate, with the scripted upstream behind it.
//
// Reads EVERGATE_URL (with /v1) and EVERGATE_KEY. Prints one line per case, then "N passed, M failed"; exit 1 on failure.
// The models are scripts of the fake upstream; crates/testkit/src/fake/script.rs says what each does.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

// The SDK stands in the folder this is run from, not beside this file.
const resolve = createRequire(path.join(process.cwd(), "package.json")).resolve;
const {
  default: OpenAI,
  APIError,
  AuthenticationError,
  BadRequestError,
  InternalServerError,
  NotFoundError,
  RateLimitError,
} = await import(pathToFileURL(resolve("openai")));

const KEY = process.env.EVERGATE_KEY;
const TEXT = "Hello from the fake upstream";
// What `one-byte` says: characters of one to four bytes.
const MANY_BYTES_TEXT = "Hello é € 😀 👩‍💻 there";
const messages = [{ role: "user", content: "Say hello" }];
const tools = [
  {
    type: "function",
    function: {
      name: "weather",
      description: "The weather at a place",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];
const settings = { baseURL: process.env.EVERGATE_URL, apiKey: KEY, maxRetries: 0, timeout: 20_000, logLevel: "off" };
const client = new OpenAI(settings);

const chat = (model, more = {}, options = {}) =>
  client.chat.completions.create({ model, messages, ...more }, options);

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

const textOf = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? "").join("");

/** Awaits and returns the exception, which must be of exactly that class. */
async function raises(kind, call, status, code) {
  let result;
  try {
    result = await call();
  } catch (error) {
    assert.equal(error.constructor, kind, `${error.constructor.name}: ${error.message}`);
    if (status !== undefined) assert.equal(error.status, status);
    if (code !== undefined) assert.equal(error.code, code);
    return error;
  }
  assert.fail(`no ${kind.name} but ${JSON.stringify(result)}`);
}

const cases = {
  async chat_unary() {
    const completion = await chat("ok");
    assert.equal(completion.choices[0].message.content, TEXT);
    assert.equal(completion.choices[0].finish_reason, "stop");
    const { prompt_tokens, completion_tokens, total_tokens } = completion.usage;
    assert.equal(total_tokens, prompt_tokens + completion_tokens);
  },

  async chat_stream() {
    const chunks = await collect(await chat("ok", { stream: true }));
    assert.equal(textOf(chunks), TEXT);
    assert.equal(chunks.at(-1).choices[0].finish_reason, "stop");
  },

  async chat_stream_with_usage() {
    const chunks = await collect(await chat("stream-5", { stream: true, stream_options: { include_usage: true } }));
    assert.deepEqual(chunks.at(-1).choices, []);
    assert.equal(chunks.at(-1).usage.completion_tokens, 5);
    assert.ok(chunks.slice(0, -1).every((chunk) => chunk.usage === null));
  },

  async chat_stream_however_it_is_cut() {
    for (const [model, text] of [["one-byte", MANY_BYTES_TEXT], ["crlf", TEXT]]) {
      assert.equal(textOf(await collect(await chat(model, { stream: true }))), text, model);
    }
  },

  async tool_call() {
    const choice = (await chat("tools", { tools, tool_choice: "auto" })).choices[0];
    assert.equal(choice.finish_reason, "tool_calls");
    assert.equal(choice.message.tool_calls[0].function.name, "weather");
    assert.deepEqual(JSON.parse(choice.message.tool_calls[0].function.arguments), { city: "Oslo" });
  },

  async tool_call_stream() {
    const chunks = await collect(await chat("tools", { tools, stream: true }));
    const calls = chunks.flatMap((chunk) => chunk.choices[0].delta.tool_calls ?? []);
    assert.equal(calls[0].function.name, "weather");
    assert.deepEqual(JSON.parse(calls.map((call) => call.function.arguments ?? "").join("")), { city: "Oslo" });
  },

  async unknown_fields_reach_the_upstream() {
    const content = [
      { type: "text", text: "What is this?" },
      { type: "image_url", image_url: { url: "data:,x" } },
    ];
    const { received } = await client.chat.completions.create({
      model: "echo-request",
      messages: [{ role: "user", content }],
      tools,
      logprobs: true,
      response_format: { type: "json_object" },
      vendor_field: { deep: [1.5, null] },
    });
    const body = JSON.parse(received.body);
    assert.deepEqual(body.tools, tools);
    assert.deepEqual(body.messages[0].content, content);
    assert.deepEqual(body.response_format, { type: "json_object" });
    assert.deepEqual(body.vendor_field, { deep: [1.5, null] });
    assert.ok(!received.head.includes(KEY), "the client's key went to the upstream");
  },

  async embeddings_of_five_inputs() {
    const input = ["one", "two", "three", "four", "five"];
    const vectors = (await client.embeddings.create({ model: "ok", input })).data.map((item) => item.embedding);
    assert.equal(new Set(vectors.map(String)).size, 5);
    const alone = await Promise.all(input.map((word) => client.embeddings.create({ model: "ok", input: [word] })));
    assert.deepEqual(alone.map((answer) => answer.data[0].embedding), vectors);
  },

  async completions() {
    const completion = await client.completions.create({ model: "ok", prompt: "Say hello" });
    assert.equal(completion.choices[0].text, TEXT);
    const chunks = await collect(await client.completions.create({ model: "ok", prompt: "Say hello", stream: true }));
    assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), TEXT);
  },

  async models() {
    const listed = await collect(await client.models.list());
    assert.ok(listed.some((model) => model.id === "ok"));
    assert.equal((await client.models.retrieve("ok")).id, "ok");
    await raises(NotFoundError, () => client.models.retrieve("nothing"), 404, "model_not_found");
  },

  async request_id() {
    assert.ok((await chat("ok"))._request_id);
    const named = (name) => ({ headers: { "x-request-id": name } });
    assert.equal((await chat("ok", {}, named("sdk-check-1")))._request_id, "sdk-check-1");
    const error = await raises(NotFoundError, () => chat("nothing", {}, named("sdk-check-2")));
    assert.equal(error.requestID, "sdk-check-2");
  },

  async error_400() {
    const error = await raises(BadRequestError, () => chat(5), 400, "invalid_value");
    assert.equal(error.param, "model");
    await raises(BadRequestError, () => chat("status-400"), 400);
  },

  async error_401() {
    const stranger = new OpenAI({ ...settings, apiKey: "sk-wrong" });
    const call = () => stranger.chat.completions.create({ model: "ok", messages });
    await raises(AuthenticationError, call, 401, "invalid_api_key");
  },

  async error_401_of_the_upstream_is_not_the_clients() {
    for (const model of ["status-401", "status-403"]) {
      await raises(InternalServerError, () => chat(model), 502, "upstream_auth_failed");
    }
  },

  async error_404() {
    const error = await raises(NotFoundError, () => chat("nothing"), 404, "model_not_found");
    assert.match(error.message, /nothing/);
  },

  async error_429() {
    for (const stream of [false, true]) {
      await raises(RateLimitError, () => chat("status-429", { stream }), 429, "rate_limit_exceeded");
    }
  },

  async error_500() {
    for (const stream of [false, true]) {
      await raises(InternalServerError, () => chat("status-500", { stream }), 502, "upstream_failed");
    }
    // A defect of the gateway itself, which its debug build has on demand.
    const options = { headers: { "x-evergate-fault": "panic-handler" } };
    await raises(InternalServerError, () => chat("ok", {}, options), 500, "internal_error");
  },

  async error_504() {
    await raises(InternalServerError, () => chat("silent"), 504, "deadline_exceeded");
    await raises(InternalServerError, () => chat("never-headers", { stream: true }), 504, "first_token_timeout");
  },

  async broken_streams_raise() {
    for (const model of ["reset-mid", "eof-mid", "no-finish", "half-event", "error-event-mid"]) {
      const chunks = [];
      const read = async () => {
        for await (const chunk of await chat(model, { stream: true })) chunks.push(chunk);
        return model;
      };
      const error = await raises(APIError, read);
      assert.ok(error.message && error.code, `${model}: ${error.message} ${error.code}`);
      const text = textOf(chunks);
      assert.ok(TEXT.startsWith(text) && text !== "" && text !== TEXT, `${model}: ${text}`);
    }
  },

  async first_event_that_is_an_error_raises_with_a_status() {
    await raises(InternalServerError, () => chat("error-event-first", { stream: true }), 502);
  },
};

let failed = 0;
for (const [name, run] of Object.entries(cases)) {
  try {
    await run();
    console.log(`ok    node ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED node ${name}: ${error.name}: ${error.message}`);
    if (error.name !== "AssertionError") console.log(error.stack);
  }
}
console.log(`${Object.keys(cases).length - failed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
