"use strict";
// The slider over the held-out evaluations: it puts each picture and its scores in place.
const source = document.getElementById("gallery");
if (source) {
  const gallery = JSON.parse(source.textContent);
  const slider = document.getElementById("iteration");
  const said = document.querySelector("output[for=iteration]");
  const pictures = document.querySelectorAll("img[data-column]");
  const show = () => {
    const at = Number(slider.value);
    said.textContent = gallery.iterations[at];
    slider.setAttribute("aria-valuetext", `after ${gallery.iterations[at]} iterations`);
    for (const picture of pictures) {
      const shown = gallery.columns[picture.dataset.column].pictures[at][picture.dataset.prompt];
      picture.src = shown.source;
      picture.parentElement.querySelector(".scores").textContent = shown.scores;
    }
  };
  slider.addEventListener("input", show);
  show(); // browsers keep the place of a slider when a page is loaded again
}
