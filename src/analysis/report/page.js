// Tooltips and hiding of arms. The page says everything that matters without it.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  const cell = (row, text, tag) => row.appendChild(Object.assign(document.createElement(tag || "td"), { textContent: text }));
  const shown = (value) => (value === null ? "–" : String(Number(value.toPrecision(4))));

  // The tooltip's content is made of text nodes alone: names come from files.
  function show(event, heading, rows) {
    tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: heading }));
    const table = tip.appendChild(document.createElement("table"));
    for (const { colour, cells } of rows) {
      const row = table.insertRow();
      cells.forEach((text, i) => {
        const made = cell(row, text);
        if (i === 0 && colour !== undefined) {
          const swatch = Object.assign(document.createElement("i"), { className: "swatch" });
          swatch.style.setProperty("--colour", `var(--line-${colour})`);
          made.prepend(swatch);
        }
      });
    }
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - box.width - 16 : event.clientX + 16;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 12, innerHeight - box.height - 4))}px`;
  }

  const hidden = new Set();
  const drawn = JSON.parse(document.getElementById("palette").textContent);
  const colours = drawn.length;

  function linesAt(values, x) {
    const steps = [...new Set(values.arms.flatMap((arm) => arm.steps))];
    const step = steps.reduce((best, s) => (Math.abs(s - x) < Math.abs(best - x) ? s : best), steps[0]);
    const rows = values.arms.filter((arm) => !hidden.has(arm.colour % colours)).map((arm) => {
      const at = arm.steps.indexOf(step);
      const found = at < 0 ? [] : arm.runs.map((run) => run[at]).filter((v) => v !== null);
      const mean = found.length ? found.reduce((a, b) => a + b, 0) / found.length : null;
      const planned = (arm.planned || []).find((pair) => pair[0] === step);
      const cells = [arm.name, shown(mean)];
      if (found.length > 1) cells.push(`${shown(Math.min(...found))} to ${shown(Math.max(...found))}`);
      if (planned) cells.push(`planned ${shown(planned[1])}`);
      return { colour: arm.colour % colours, cells };
    });
    return { step, heading: `step ${step}${values.unit ? `, ${values.unit}` : ""}`, rows };
  }

  function mapAt(values, frame, x, y) {
    const column = Math.min(values.columns.length - 1, Math.floor(x));
    const row = Math.min(values.rows.length - 1, Math.floor(((y - frame.top) / (frame.bottom - frame.top)) * values.rows.length));
    const value = values.cells[row][column];
    return { heading: `layer ${values.rows[row]}, step ${values.columns[column]}`, rows: [{ cells: [value === null ? "nothing injected" : shown(value)] }] };
  }

  for (const figure of document.querySelectorAll("figure")) {
    const plot = figure.querySelector(".plot");
    const svg = plot.querySelector("svg");
    const cursor = plot.appendChild(Object.assign(document.createElement("div"), { className: "cursor", hidden: true }));
    let data;
    const leave = () => { tip.hidden = cursor.hidden = true; };
    plot.addEventListener("pointerleave", leave);
    plot.addEventListener("pointermove", (event) => {
      data = data || JSON.parse(figure.querySelector("script").textContent);
      const { frame, values } = data;
      const box = svg.getBoundingClientRect();
      const scale = svg.viewBox.baseVal.width / box.width;
      const [px, py] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
      if (px < frame.left || px > frame.right || py < frame.top || py > frame.bottom) return leave();
      const x = frame.x[0] + ((px - frame.left) / (frame.right - frame.left)) * (frame.x[1] - frame.x[0]);
      if (values.cells) {
        const found = mapAt(values, frame, x, py);
        return show(event, found.heading, found.rows);
      }
      const found = linesAt(values, x);
      show(event, found.heading, found.rows);
      const at = frame.left + ((found.step - frame.x[0]) / (frame.x[1] - frame.x[0])) * (frame.right - frame.left);
      Object.assign(cursor.style, { left: `${at / scale}px`, top: `${frame.top / scale}px`, height: `${(frame.bottom - frame.top) / scale}px` });
      cursor.hidden = false;
    });
  }

  // Lines are found by their colour: the drawing has no other mark of an arm.
  const style = document.head.appendChild(document.createElement("style"));
  const buttons = [...document.querySelectorAll(".legend button")];
  buttons.forEach((button) => button.addEventListener("click", () => {
    const colour = Number(button.dataset.colour);
    hidden.has(colour) ? hidden.delete(colour) : hidden.add(colour);
    buttons.filter((b) => Number(b.dataset.colour) === colour).forEach((b) => b.setAttribute("aria-pressed", String(!hidden.has(colour))));
    style.textContent = [...hidden].map((c) =>
      `.plot [stroke="${drawn[c]}"], .plot [fill="${drawn[c]}"], figure[data-colour="${c}"] { display: none; }`).join("\n");
  }));
})();
