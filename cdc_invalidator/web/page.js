// Fetches the parts of the page that change, every two seconds, and all of them every ten. Without it the page stays as
// it was loaded. The parts are HTML that the daemon has escaped; the page's policy lets no script in them run.
"use strict";

const EVERY_MS = 2000;
const ALL_EACH = 5;
const DEADLINE_MS = 5000;
let turn = 0;

function gone(is) {
  document.getElementById("gone").hidden = !is;
  document.body.classList.toggle("gone", is);
}

async function refresh() {
  turn += 1;
  try {
    const answer = await fetch(turn % ALL_EACH ? "live" : "live?all=1", {
      cache: "no-store",
      signal: AbortSignal.timeout(DEADLINE_MS),
    });
    if (!answer.ok) throw new Error(answer.statusText);
    for (const [id, part] of Object.entries(await answer.json())) {
      const element = document.getElementById(id);
      if (element !== null) element.innerHTML = part;
    }
    document.body.dataset.turns = turn;
    gone(false);
  } catch {
    gone(true);
  }
  wait();
}

// A page that nobody looks at asks for nothing.
function wait() {
  if (document.hidden) document.addEventListener("visibilitychange", refresh, { once: true });
  else setTimeout(refresh, EVERY_MS);
}

wait();
