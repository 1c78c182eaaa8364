"use strict";
// Everything here is a convenience: without scripts the page shows the same facts, all panels at once.

const tip = document.getElementById("tip");

function describe(target) {
  const cell = target.closest("[data-c]");
  if (cell) {
    const [layer, expert, hundredths] = cell.dataset.c.split(",");
    return `layer ${layer}, expert ${expert}\n${(hundredths / 100).toFixed(2)} × even share`;
  }
  const marked = target.closest("[data-t]");
  return marked ? marked.dataset.t : "";
}

function showTip(event) {
  const text = event.target instanceof Element ? describe(event.target) : "";
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const box = tip.getBoundingClientRect();
  const room = document.documentElement.clientWidth;
  const left = Math.min(event.clientX + 14, room - box.width - 8);
  const below = event.clientY + 18;
  const top = below + box.height > window.innerHeight ? event.clientY - box.height - 12 : below;
  tip.style.transform = `translate(${Math.max(8, left)}px, ${Math.max(8, top)}px)`;
}

document.addEventListener("pointermove", showTip);
document.addEventListener("pointerdown", showTip);
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });

for (const group of document.querySelectorAll(".choices")) {
  const buttons = [...group.querySelectorAll(":scope > .tabs > button")];
  const panels = [...group.querySelectorAll(":scope > .panel")];
  const choose = (chosen) => {
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(index === chosen)));
    panels.forEach((panel, index) => { panel.hidden = index !== chosen; });
  };
  buttons.forEach((button, index) => button.addEventListener("click", () => choose(index)));
  choose(0);
}

function sortKey(row, column) {
  const cell = row.cells[column];
  if (column === 0) return cell.textContent;
  return cell.dataset.v === undefined ? -Infinity : Number(cell.dataset.v);
}

function sortBy(table, column) {
  const head = table.tHead.rows[0].cells;
  const down = head[column].getAttribute("aria-sort") !== "descending";
  for (const cell of head) cell.removeAttribute("aria-sort");
  head[column].setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows].map((row) => [sortKey(row, column), row]);
  rows.sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1));
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    cell.tabIndex = 0;
    cell.addEventListener("click", () => sortBy(table, column));
    cell.addEventListener("keydown", (event) => { if (event.key === "Enter") sortBy(table, column); });
  });
}

for (const input of document.querySelectorAll("input.filter")) {
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of input.parentElement.querySelectorAll("tbody tr")) {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    }
  });
}

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "copied";
  });
}

const recorded = document.getElementById("activation-data");
if (recorded) {
  const { rounds, peak, frames } = JSON.parse(recorded.textContent);
  const slider = document.getElementById("activation-round");
  const paint = () => {
    document.getElementById("activation-shown").textContent = `round ${rounds[slider.value]}`;
    for (const chart of document.querySelectorAll("svg[data-tier]")) {
      const frame = frames[chart.dataset.tier][slider.value];
      chart.classList.toggle("absent", !frame);
      const note = document.querySelector(`[data-load="${chart.dataset.tier}"]`);
      if (!frame) {
        note.textContent = "no client of this tier took part";
        continue;
      }
      const idle = frame.filter((value) => value === 0).length;
      note.textContent = `busiest ${(Math.max(...frame) / 100).toFixed(1)} × even share; ${idle} of ${frame.length} never used`;
      chart.querySelectorAll("rect").forEach((cell, index) => {
        cell.style.setProperty("--v", `${Math.round(200 * Math.sqrt(frame[index] / peak))}%`);
        const [layer, expert] = cell.dataset.c.split(",");
        cell.dataset.c = `${layer},${expert},${frame[index]}`;
      });
    }
  };
  slider.addEventListener("input", paint);
  paint();
}
