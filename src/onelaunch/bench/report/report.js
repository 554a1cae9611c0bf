"use strict";
// Without this the page is whole: here a click on a header sorts, and devices can be left out.

function sortKey(row, column) {
  const cell = row.cells[column];
  const text = cell.textContent.trim();
  if (text === "" || text === "-") return { empty: true, text: text, number: NaN };
  const number = cell.dataset.n !== undefined ? Number(cell.dataset.n) : Number(text);
  return { empty: false, text: text, number: number };
}

function sortTable(header) {
  const body = header.closest("table").tBodies[0];
  const column = header.cellIndex;
  const down = header.getAttribute("aria-sort") === "ascending";
  const keyed = Array.from(body.rows, (row) => ({ row: row, key: sortKey(row, column) }));
  const full = keyed.filter((each) => !each.key.empty);
  const numbers = full.filter((each) => !Number.isNaN(each.key.number));
  // mostly numbers: a number's column, its words after its numbers
  const numeric = 2 * numbers.length >= full.length;
  const last = (key) => key.empty || (numeric && Number.isNaN(key.number));
  keyed.sort((a, b) => {
    if (last(a.key) || last(b.key)) return last(a.key) - last(b.key);
    const order = numeric
      ? a.key.number - b.key.number
      : a.key.text.localeCompare(b.key.text, "en", { numeric: true });
    return down ? -order : order;
  });
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...keyed.map((each) => each.row));
}

function showDevices(boxes) {
  const shown = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
  for (const each of document.querySelectorAll("[data-device]")) {
    each.hidden = !each.dataset.device.split(" ").some((device) => shown.has(device));
  }
}

for (const header of document.querySelectorAll("thead th")) {
  header.tabIndex = 0;
  header.title = "sort";
  header.addEventListener("click", () => sortTable(header));
  header.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      sortTable(header);
    }
  });
}
// a link to a section opens it
function openTarget() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const fold = target && target.querySelector("details");
  if (fold) fold.open = true;
}
addEventListener("hashchange", openTarget);
openTarget();
const filter = document.getElementById("devices");
if (filter) {
  const boxes = Array.from(filter.querySelectorAll("input"));
  filter.hidden = false;
  filter.addEventListener("change", () => showDevices(boxes));
  showDevices(boxes);
}
