/* Lets each .durable-progress on a page follow its run: by server-sent events, or else by asking for its status.
 *
 * The page may listen on the element, or on the document, for "durable:status" (detail: the status, as JSON has it),
 * "durable:value" (key, position, value), "durable:closed" (key) and "durable:end".
 */
(function () {
  "use strict";

  // Milliseconds between two questions where there are no events, and how long to wait for the first event.
  const ASK = 2000, ASK_RARELY = 15000, PATIENCE = 8000;

  function span(name, text) {
    const made = document.createElement("span");
    made.className = "durable-progress-" + name;
    made.textContent = text;
    return made;
  }

  // By textContent alone: a step's name may hold anything.
  function change(element, text) {
    if (element && element.textContent !== text) element.textContent = text;
  }

  function draw(root, run) {
    root.dataset.status = run.status;
    const head = root.querySelector(".durable-progress-status");
    change(head.querySelector(".durable-progress-label"), run.status_label);
    change(head.querySelector(".durable-progress-note"), run.note);
    const list = root.querySelector(".durable-progress-steps");
    const known = new Map(Array.from(list.children, (item) => [item.value, item]));
    const items = run.steps.map((step) => {
      let item = known.get(step.position);
      if (!item) {
        item = document.createElement("li");
        item.value = step.position;
        item.append(span("name", ""), " ", span("label", ""), " ", span("note", ""));
      }
      item.dataset.status = step.status;
      change(item.querySelector(".durable-progress-name"), step.name);
      change(item.querySelector(".durable-progress-label"), step.status_label);
      change(item.querySelector(".durable-progress-note"), step.note);
      return item;
    });
    if (items.length !== list.children.length || items.some((item, at) => list.children[at] !== item)) {
      list.replaceChildren(...items);
    }
  }

  function follow(root) {
    let source = null, timer = null, patience = null, over = false, last = "", polls = false, pause = ASK;
    // The positions that the page was told of, and the streams that it knows to be closed.
    const told = {}, closed = new Set();

    function tell(name, detail) {
      root.dispatchEvent(new CustomEvent("durable:" + name, { bubbles: true, detail: detail }));
    }
    function status(run) {
      draw(root, run);
      tell("status", run);
    }
    function value(item) {
      if (item.position <= (told[item.key] || 0)) return;
      told[item.key] = item.position;
      tell("value", item);
    }
    function close(key) {
      if (closed.has(key)) return;
      closed.add(key);
      tell("closed", { key: key });
    }
    function end() {
      if (over) return;
      over = true;
      stop();
      tell("end", {});
    }
    function stop() {
      if (source) source.close();
      source = null;
      clearTimeout(timer);
      clearTimeout(patience);
    }

    function listen() {
      const after = last ? "?after=" + encodeURIComponent(last) : "";
      source = new EventSource(root.dataset.progressUrl + after);
      patience = setTimeout(giveUp, PATIENCE);
      const on = (name, act) => source.addEventListener(name, (event) => {
        clearTimeout(patience);
        last = event.lastEventId;
        act(JSON.parse(event.data));
      });
      on("status", status);
      on("value", value);
      on("closed", (item) => close(item.key));
      on("end", end);
      source.onopen = () => { if (last) clearTimeout(patience); };
      // While it is CONNECTING, the browser asks again by itself.
      source.onerror = () => { if (source && source.readyState === EventSource.CLOSED) giveUp(); };
    }
    // No events come through: a proxy keeps them, or the server refuses. Asking tells which.
    function giveUp() {
      stop();
      polls = true;
      ask();
    }

    async function ask() {
      let answer = null;
      try {
        answer = await fetch(root.dataset.statusUrl, { headers: { Accept: "application/json" } });
        if (answer.status === 403 || answer.status === 404) return end();
        if (answer.ok) {
          const run = await answer.json();
          status(run);
          for (const [key, stream] of Object.entries(run.streams)) {
            stream.values.forEach((item) => value({ key: key, position: item.position, value: item.value }));
            if (stream.closed) close(key);
          }
          if (run.finished) return end();
          pause = ASK;
        }
      } catch (error) {
        answer = null;
      }
      if (!answer || !answer.ok) pause = Math.min(ASK_RARELY, pause * 2);
      if (!document.hidden) timer = setTimeout(ask, pause);
    }

    function start() {
      if (over) return;
      stop();
      if (document.hidden) return;
      if (polls || !window.EventSource) ask();
      else listen();
    }
    // A page that nobody looks at holds no connection.
    document.addEventListener("visibilitychange", start);
    start();
  }

  function begin() {
    for (const root of document.querySelectorAll(".durable-progress[data-progress-url]")) {
      // The script may be on the page more than once.
      if (root.dataset.following) continue;
      root.dataset.following = "yes";
      follow(root);
    }
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", begin);
  else begin();
})();
