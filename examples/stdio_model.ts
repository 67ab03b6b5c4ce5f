// A model behind Evergate's stdio mode (docs/stdio-protocol.md), for Node.js without any package. Node runs TypeScript by
// itself from 22.18 on; for an older one, take the types out first: `npx tsc --target es2022 --module nodenext stdio_model.ts`.
// Copy it and fill in `load` and `answer`. As it stands it answers with the last message, word by word:
// process = { mode = "stdio", argv = ["node", "stdio_model.ts"] }

import { createInterface } from "node:readline";

type Request = { id: string; endpoint: "chat" | "completions" | "embeddings"; body: any; deadline_ms: number };
type Result = { text?: string; body?: object; usage?: object; finish_reason?: string };
type Frame = { type: string; id?: string; [field: string]: unknown };

const IN_FLIGHT = 4; // requests that `answer` is called for at once

/** A mistake of the client's, whose words it may read. */
class BadRequest extends Error {}

/** Loads the model; what it gives is the first argument of `answer`. */
async function load(): Promise<unknown> {
  return null;
}

/** Answers one request: calls `send` for each piece, looks at `signal.aborted`, and gives the rest. */
async function answer(_model: unknown, request: Request, send: (text: string) => void, signal: AbortSignal): Promise<Result> {
  if (request.endpoint === "embeddings") throw new BadRequest("this model makes no embeddings");
  const messages = request.body.messages ?? [{ content: request.body.prompt ?? "" }];
  for (const [index, word] of String(messages.at(-1)?.content ?? "").split(" ").entries()) {
    signal.throwIfAborted();
    send(index > 0 ? " " + word : word);
    await new Promise(setImmediate);
  }
  return { finish_reason: "stop" };
}

const out = process.stdout.write.bind(process.stdout);
process.stdout.write = process.stderr.write.bind(process.stderr) as typeof process.stdout.write; // whoever prints, prints there
const write = (frame: Frame) => out(JSON.stringify(frame) + "\n");

async function serve(model: unknown, request: Request, signal: AbortSignal): Promise<void> {
  const id = request.id;
  try {
    const result = await answer(model, request, (text) => write({ type: "delta", id, text }), signal);
    write({ type: "result", id, ...result });
  } catch (error) {
    if (signal.aborted) return void write({ type: "error", id, message: "cancelled", code: "cancelled" });
    if (error instanceof BadRequest) return void write({ type: "error", id, message: error.message, status: 400 });
    console.error(error);
    write({ type: "error", id, message: `${(error as Error)?.name ?? "an error"} in the model` });
  }
}

const model = await load();
const running = new Map<string, { abort: AbortController; done: Promise<void> }>();
write({ type: "ready", protocol: 1, in_flight: IN_FLIGHT });
for await (const line of createInterface({ input: process.stdin })) {
  const frame = JSON.parse(line) as Frame;
  if (frame.type === "request") {
    const request = frame as unknown as Request;
    const abort = new AbortController();
    const done = serve(model, request, abort.signal).finally(() => running.delete(request.id));
    running.set(request.id, { abort, done });
  } else if (frame.type === "cancel") {
    running.get(frame.id ?? "")?.abort.abort();
  } else if (frame.type === "drain") {
    await Promise.all([...running.values()].map(({ done }) => done));
    write({ type: "drained" });
    break;
  }
}
process.exit(0);
