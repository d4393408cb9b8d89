const number = text => {
  const found = text.replaceAll("−", "-").replaceAll(",", "").match(/[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?/i);
  return found ? Number(found[0]) : NaN;
};
const key = (cell, numeric) => {
  if (cell.dataset.order !== undefined) return cell.dataset.order === "" ? null : numeric ? Number(cell.dataset.order) : cell.dataset.order;
  const text = cell.textContent.trim(), value = numeric ? number(text) : text;
  return text === "–" || text === "" || Number.isNaN(value) ? null : value;
};
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending", numeric = head.classList.contains("n");
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map(row => [key(row.cells[column], numeric), row]);
    rows.sort(([x], [y]) => x === null || y === null ? (x === null) - (y === null)   // what has no number stays last
      : (numeric ? x - y : x.localeCompare(y)) * (up ? 1 : -1));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }));
}
for (const input of document.querySelectorAll(".filter input")) {
  const section = input.closest("section, details"), output = input.parentElement.querySelector("output");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0, all = 0;
    for (const row of section.querySelectorAll("table.sortable tbody tr")) {
      const text = row.textContent.toLowerCase(), fits = words.every(word => text.includes(word));
      row.hidden = !fits; shown += fits; all += 1;
    }
    output.textContent = words.length ? `${shown} of ${all} rows` : "";
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(each => { each.open = true; }));
