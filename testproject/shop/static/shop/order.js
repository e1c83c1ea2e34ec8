// Follows the order: replaces the progress by a newer one, until the checkout has ended.
"use strict";

const progress = document.getElementById("progress");
let shown = progress.innerHTML.trim();

async function follow() {
  try {
    const response = await fetch(progress.dataset.url, { cache: "no-store" });
    if (response.ok) {
      const html = (await response.text()).trim();
      // Only what changed is replaced, or a screen reader would read the same again and again.
      if (html !== shown) {
        progress.innerHTML = shown = html;
      }
    }
  } catch {
    // The shop is restarting, or the network is gone: the order goes on all the same. Ask again.
  }
  if (progress.querySelector("[data-finished=no]")) {
    setTimeout(follow, 500);
  }
}

setTimeout(follow, 500);
