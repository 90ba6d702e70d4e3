"use strict";
// The videos of a pair start together; a video that nobody looks at does not run.
for (const pair of document.querySelectorAll(".pair, .clip")) {
  const videos = [...pair.querySelectorAll("video")];
  const restart = () => videos.forEach((video) => { video.currentTime = 0; video.play().catch(() => {}); });
  // The shorter one waits on its last frame until the other has ended.
  videos.forEach((video) => video.addEventListener("ended", () => {
    if (videos.every((other) => other.ended)) setTimeout(restart, 1200);
  }));
  videos.forEach((video) => {
    video.addEventListener("click", restart);
    video.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); restart(); } });
    // The line in the action curves stands where the video is: frame t is control step t.
    const heads = video.parentElement.querySelectorAll(".playhead");
    const follow = () => {
      const share = video.duration ? video.currentTime / video.duration : 0;
      heads.forEach((head) => head.setAttribute("transform", `translate(${share * head.dataset.width} 0)`));
      if (!video.paused) requestAnimationFrame(follow);
    };
    if (heads.length) { video.addEventListener("play", follow); video.addEventListener("seeked", follow); }
  });
  new IntersectionObserver((entries) => {
    const reduced = matchMedia("(prefers-reduced-motion: reduce)").matches;
    for (const entry of entries) {
      if (entry.isIntersecting && !reduced) restart(); else videos.forEach((video) => video.pause());
    }
  }, { threshold: 0.4 }).observe(pair);
}
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copy).textContent;
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { button.textContent = "Select and copy"; }
  });
}
// A click on a column's head sorts by it; another one turns the order round.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => {
    if (!head.textContent) return;
    const button = document.createElement("button");
    button.type = "button"; button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => { const cell = row.cells[column]; return cell.dataset.sort ?? cell.textContent.trim(); };
      const compare = (a, b) => {
        const [x, y] = [parseFloat(a), parseFloat(b)];
        return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
      };
      const rows = [...table.tBodies[0].rows].sort((a, b) => (up ? 1 : -1) * compare(value(a), value(b)));
      table.tBodies[0].append(...rows);
    });
  });
}
