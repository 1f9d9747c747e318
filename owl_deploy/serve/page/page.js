"use strict";
// Chats with the served model and shows what this very request measured: time to its first token, and tokens per second.

const element = (id) => document.getElementById(id);
const messages = [];
let model = null;
let running = null;

function headers() {
  const key = element("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function explain(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function findModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) {
    element("key-label").hidden = false;
    throw new Error("This server wants its API key.");
  }
  if (!response.ok) throw new Error(await explain(response));
  model = (await response.json()).data[0];
  element("model").textContent = model.id;
  element("mode").textContent = model.has_chat_template
    ? `A conversation of at most ${model.max_model_len} tokens.`
    : `This model has no chat template: it goes on with your text, up to ${model.max_model_len} tokens.`;
}

function addTurn(kind, text) {
  const turn = document.createElement("section");
  turn.className = `turn ${kind}`;
  const body = document.createElement("p");
  body.className = "text";
  body.textContent = text;
  const figures = document.createElement("p");
  figures.className = "figures";
  turn.append(body, figures);
  element("turns").append(turn);
  turn.scrollIntoView({ block: "end" });
  return { turn, body, figures };
}

function requestOf(text) {
  const common = {
    model: model.id,
    max_tokens: Number(element("max-tokens").value),
    temperature: Number(element("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  return model.has_chat_template
    ? { path: "v1/chat/completions", body: { ...common, messages } }
    : { path: "v1/completions", body: { ...common, prompt: text } };
}

// Yields the data of server-sent events until [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(text) {
  const { turn, body, figures } = addTurn("assistant", "");
  const { path, body: request } = requestOf(text);
  const started = performance.now();
  let first = null;
  let last = null;
  try {
    const response = await fetch(path, {
      method: "POST", headers: headers(), body: JSON.stringify(request), signal: running.signal,
    });
    if (!response.ok) throw new Error(await explain(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const [choice] = chunk.choices;
      if (choice) {
        const added = choice.text ?? choice.delta.content ?? "";
        // The first chunk of a chat tells the role, and comes with the first token.
        last = performance.now();
        first ??= last;
        body.textContent += added;
      }
      if (chunk.usage) {
        const n = chunk.usage.completion_tokens;
        const rate = n > 1 ? `${((n - 1) / ((last - first) / 1000)).toFixed(1)} tokens/s, ` : "";
        figures.textContent =
          `${rate}first token after ${(first - started).toFixed(0)} ms, ${n} tokens behind ${chunk.usage.prompt_tokens}`;
      }
    }
    messages.push({ role: "assistant", content: body.textContent });
  } catch (error) {
    messages.pop(); // an unanswered turn would stand in the way of the next
    const isStopped = error.name === "AbortError";
    figures.textContent = isStopped ? "Stopped." : error.message;
    turn.classList.toggle("failed", !isStopped);
  }
}

element("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = element("prompt").value;
  if (running || !text.trim()) return;
  running = new AbortController();
  element("send").hidden = true;
  element("stop").hidden = false;
  try {
    if (model === null) await findModel();
    element("prompt").value = "";
    addTurn("user", text);
    messages.push({ role: "user", content: text });
    await answer(text);
  } catch (error) {
    element("mode").textContent = error.message;
  }
  running = null;
  element("send").hidden = false;
  element("stop").hidden = true;
});
element("stop").addEventListener("click", () => running?.abort());
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    element("form").requestSubmit();
  }
});
findModel().catch((error) => { element("mode").textContent = error.message; });
