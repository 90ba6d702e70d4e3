"use strict";
// Both videos of a pair start together; a video that nobody looks at does not run.
for (const pair of document.querySelectorAll(".pair")) {
  const videos = [...pair.querySelectorAll("video")];
  const restart = () => videos.forEach((video) => { video.currentTime = 0; video.play().catch(() => {}); });
  // The shorter one waits on its last frame until the other has ended.
  videos.forEach((video) => video.addEventListener("ended", () => {
    if (videos.every((other) => other.ended)) setTimeout(restart, 1200);
  }));
  videos.forEach((video) => video.addEventListener("click", restart));
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
