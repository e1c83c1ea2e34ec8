// Draws the order anew whenever its run has come further. {% durable_progress %} on the page follows the run, by
// server-sent events, and tells it as "durable:status".
"use strict";

const order = document.getElementById("order");
let shown = order.innerHTML.trim();
let asked = 0;

async function draw() {
  const mine = ++asked;
  try {
    const response = await fetch(order.dataset.url, { cache: "no-store" });
    const html = (await response.text()).trim();
    // Only what changed is replaced, or a screen reader would read the same again and again.
    if (response.ok && mine === asked && html !== shown) {
      order.innerHTML = shown = html;
    }
  } catch {
    // The shop is restarting, or the network is gone: the order goes on all the same. Ask again.
    setTimeout(draw, 1000);
  }
}

document.addEventListener("durable:status", draw);
