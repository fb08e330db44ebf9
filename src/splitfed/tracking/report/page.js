// Says what is under the pointer, and lights up all that belongs to one client. The page is whole without it.
(() => {
  const tip = document.getElementById("tip");
  const place = (event) => {
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    const above = event.clientY - box.height - 12;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above < 8 ? event.clientY + 18 : above}px`;
  };
  const light = (name) => {
    document.querySelectorAll(".lit").forEach((element) => element.classList.remove("lit"));
    if (name === undefined) return;
    document.querySelectorAll(`[data-client="${CSS.escape(name)}"]`).forEach((element) => element.classList.add("lit"));
  };
  const show = (event) => {
    const told = event.target.closest("[data-tip]");
    const owner = event.target.closest("[data-client]");
    light(owner?.dataset.client);
    tip.hidden = !told;
    if (told) {
      const [first, ...rest] = told.dataset.tip.split("\n");
      tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: first }));
      rest.forEach((line) => tip.append(Object.assign(document.createElement("div"), { textContent: line })));
      place(event);
    }
  };
  addEventListener("pointermove", show);
  addEventListener("pointerdown", show);
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
})();
