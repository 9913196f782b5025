"use strict";
// The values under a finger or a mouse. The page is whole without this.
for (const figure of document.querySelectorAll("figure.chart")) {
  const area = figure.querySelector(".area");
  const chart = JSON.parse(figure.querySelector("script").textContent);
  const scale = chart.log ? Math.log : (x) => x;
  const [low, high] = chart.x.map(scale);
  const place = (x) => (scale(x) - low) / (high - low);
  const cross = document.createElement("div"), tip = document.createElement("div");
  cross.className = "cross";
  tip.className = "tip";

  const nearest = (points, at) => {
    let first = 0, last = points.length - 1;
    while (last - first > 1) {
      const middle = (first + last) >> 1;
      if (place(points[middle][0]) < at) first = middle; else last = middle;
    }
    return Math.abs(place(points[first][0]) - at) <= Math.abs(place(points[last][0]) - at) ? points[first] : points[last];
  };
  const line = (text, colour) => {
    const row = document.createElement("div");
    if (colour !== undefined) row.appendChild(document.createElement("i")).className = "c" + colour;
    row.append(text);
    tip.append(row);
  };
  const number = (x) => x.toLocaleString("en", { maximumSignificantDigits: 5 });

  const show = (event) => {
    const box = area.getBoundingClientRect();
    const at = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const found = chart.series.map((series) => nearest(series.points, at));
    const x = found.reduce((a, b) => Math.abs(place(b[0]) - at) < Math.abs(place(a[0]) - at) ? b : a)[0];
    tip.replaceChildren();
    const band = chart.bands.find(([, first, last]) => first < x && x <= last);
    line(chart.label + " " + Math.round(x).toLocaleString("en") + (band ? ", " + band[0] : ""));
    chart.series.forEach((series, i) => {
      const elsewhere = Math.abs(place(found[i][0]) - place(x)) > 0.02 ? " (at " + Math.round(found[i][0]).toLocaleString("en") + ")" : "";
      line(series.label + " " + number(found[i][1]) + elsewhere, series.colour);
    });
    for (const [markAt, label] of chart.marks) if (Math.abs(place(markAt) - at) < 0.008) line(label);
    area.append(cross, tip);
    cross.style.left = 100 * place(x) + "%";
    const left = place(x) * box.width;
    tip.style.left = Math.max(-40, left > box.width / 2 ? left - tip.offsetWidth - 10 : left + 10) + "px";
  };
  const hide = () => { cross.remove(); tip.remove(); };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", hide);
}
